# SPDX-License-Identifier: Apache-2.0
"""
SVF layers -> the values of their base weights, in whatever form they are kept, and their bases.

This is the one place that reads a base weight: packed, offloaded, sharded, shared, or as its checkpoint stores it.
It refuses by name what it cannot read. Private names were read in PEFT 0.21.2 and transformers 5.23.0.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft.utils import resolve_quantization_backend
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from .basis import Basis
from .cache import fetch
from .fingerprint import Fingerprint

Known = dict[str, tuple[Basis, Fingerprint]]
PACKED = 0.7  # 4 bits lose about 0.1 of a weight's norm, 2 bits 0.5; another weight differs by 1.4
NARROW = {torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors calls them
ZERO3 = (
    "SVF does not run on weights that DeepSpeed ZeRO-3 has partitioned. z-vectors are small: use DDP, ZeRO-1 or "
    "ZeRO-2, or FSDP2 (`torch.distributed.fsdp.fully_shard`) if the base model does not fit."
)
PARALLEL = (
    "SVF does not run on weights that tensor parallelism (`tp_plan`, `parallelize_module`) has split: singular "
    "directions belong to the whole weight. Load the base without it; FSDP2, offload and quantised bases work."
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def held_weight(base: nn.Module) -> Tensor:
    """Return the tensor that a linear module keeps its weight in, whatever a quantisation calls it."""
    for name in ("weight", "qweight", "W_q"):
        if isinstance(tensor := getattr(base, name, None), Tensor):
            return tensor
    return next(chain(base.parameters(), base.buffers()))


def undo_cpu_packing(base: nn.Module) -> None:
    """
    Undo what bitsandbytes (0.50) does to a 4-bit weight in its first forward of inference on a CPU with AVX512.

    It packs the weight again, for a kernel that has no gradient and whose layout PEFT cannot read. Saving takes that
    back, but leaves the scales in the order of the kernel, or rounds them once more; they stay in bfloat16.
    """
    state: Any = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()
        base.state_dict()
        state.absmax, state.nested = scales, False


def offloaded(base: nn.Module) -> bool:
    """Whether accelerate keeps the weight of a module elsewhere and brings it only while the module runs."""
    return getattr(getattr(base, "_hf_hook", None), "offload", False) and held_weight(base).is_meta


@contextmanager
def onloaded(base: nn.Module) -> Iterator[None]:
    """Bring the weight of a module that accelerate offloads into memory while the context is open."""
    hook: Any = base._hf_hook if offloaded(base) else None
    if hook is not None:
        hook.pre_forward(base)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(base, None)


def absent(layer: Any) -> bool:
    """Whether the base weight of an SVF layer has no values yet; one that accelerate offloads has them elsewhere."""
    return layer.base_weight.is_meta and not offloaded(layer.get_base_layer())


def refuse_split(weight: Tensor, whole: bool = True) -> None:
    """
    Raise `ValueError` for a weight that DeepSpeed's ZeRO-3 or torch's tensor parallelism has split over processes.

    FSDP2 splits weights too, but shows them `whole` while their module runs.
    """
    if hasattr(weight, "ds_id") or (whole and isinstance(weight, DTensor)):
        raise ValueError(ZERO3 if hasattr(weight, "ds_id") else PARALLEL)


def refuse_parallel(model: nn.Module) -> None:
    """Raise `ValueError` for a model with weights that tensor parallelism has split over processes."""
    modules = list(model.modules())
    split = any((getattr(module, "_tp_size", None) or 1) > 1 for module in modules)  # by transformers
    fsdp = any(hasattr(module, "_is_fsdp_managed_module") for module in modules)  # which is one of the ways to split
    for tensor in model.parameters():
        split |= isinstance(tensor, DTensor) and sum(not place.is_replicate() for place in tensor.placements) > fsdp
    if split:
        raise ValueError(PARALLEL)


def multiplies(module: nn.Module) -> bool:
    """
    Whether the output of a module is the product with the numbers in its `weight`, or PEFT can unpack its weight.

    Other linear modules scale or quantise their weight as they run (FP8, ternary), or compute it (parametrisations).
    """
    if resolve_quantization_backend(module) is not None:
        return True
    forward, replaced = type(module).forward, vars(module).get("forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not forward and not hasattr(module, "_hf_hook"):
        return False  # accelerate's hook sets an instance's forward too, and leaves the class's when it goes
    return readable(module._parameters.get("weight")) and is_product(module)


def is_product(module: nn.Module) -> bool:
    """Whether a module's forward is the product with `weight` plus `bias`; Falcon's own is, which a probe shows."""
    kind: Any = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear):
        return False
    probe = kind.__new__(kind)
    weight, bias, x = (torch.linspace(-2, 1, n, device="cpu").exp() for n in (12, 3, 8))
    parameters = {"weight": nn.Parameter(weight.view(3, 4)), "bias": nn.Parameter(bias)}
    # All else, such as a scale that its forward uses, is the module's own.
    probe.__dict__ = {**vars(module), "_parameters": {**module._parameters, **parameters}}
    try:
        with torch.no_grad():
            y = probe.forward(x := x.view(2, 4))
            return torch.allclose(y, nn.functional.linear(x, probe.weight, probe.bias))
    except Exception:  # It needs more than a weight and a bias.
        return False


def readable(weight: Tensor | None) -> bool:
    """Whether a tensor holds the numbers of a matrix themselves: no scaled, sparse or empty ones."""
    if weight is None or weight.dtype not in FLOATS or weight.layout != torch.strided:
        return False
    return hasattr(weight, "ds_id") or weight.numel() > 0  # ZeRO-3 empties it, see `refuse_split`


def note_shared(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """
    Note in each SVF layer the names under which its base weight appears in the model: shared weights refuse to merge.

    Raises:
        `ValueError`: if an adapted module has a second place in the model, where it would run without z.
    """
    bases = {id(layer.get_base_layer()): name for name, layer in layers.items()}
    wrapped = {id(layer) for layer in layers.values()}
    for parent, module in model.named_modules():
        for key, child in module._modules.items():
            if id(child) in bases and id(module) not in wrapped:
                raise ValueError(
                    f"{f'{parent}.{key}' if parent else key} is the same module as {bases[id(child)]}, so z would act "
                    "in one place and not in the other: give each place a module of its own before adding SVF."
                )
    places: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            places[id(parameter)].append(f"{name}.{key}".replace(".base_layer", ""))
    for layer in layers.values():
        layer.svf_shared = tuple(dict.fromkeys(places[id(layer.base_weight)]))


def reader(model: nn.Module, layers: Mapping[str, Any], source: str) -> Callable[[str], Tensor]:
    """
    Make a function that reads the weights whose singular directions count: those in memory, or the checkpoint's.

    Args:
        layers (`Mapping[str, SVFLayer]`): The layers of a base by the names that fingerprints give their weights.
        source (`str`): `basis_from` of [`SVFConfig`].

    Returns:
        A function of a name that returns its weight `(out, in)` or `(E, out, in)`: whole, dequantised, never a merged
        one. It raises `ValueError` if the values cannot be had.
    """
    checkpoint = Checkpoint(model) if layers and source != "memory" else None

    def read(name: str) -> Tensor:
        layer, required = layers[name], source == "checkpoint"
        loaded, packed = _in_memory(layer, name), layer.quantization_backend is not None
        if checkpoint is None or not (required or packed or checkpoint.rounds_to(loaded.dtype)):
            return loaded
        turned = isinstance(layer.get_base_layer(), Conv1D)
        parameter = name if layer.parameter_name else f"{name}.weight"
        stored = checkpoint.weight(parameter, loaded, packed, turned)
        if stored is None and required:
            raise ValueError(
                f"basis_from='checkpoint', but no safetensors file of {checkpoint.name or 'this model'!r} on this "
                f"machine holds the weight of {name} as it is loaded. Use basis_from='memory', or load the model from "
                "a local folder or the Hub cache."
            )
        return loaded if stored is None else stored

    return read


def _in_memory(layer: Any, name: str) -> Tensor:
    refuse_split(layer.base_weight, whole=False)
    backend = layer.quantization_backend
    with onloaded(layer.get_base_layer()):
        try:
            values = layer.logical_weight()
        except (TypeError, NotImplementedError) as error:
            if backend is None:
                raise
            raise ValueError(
                f"The weight of {name} is packed by {backend.backend_name}, which PEFT cannot unpack, so its singular "
                "directions cannot be computed here. Load an expert that brings its basis along (made with "
                "save_basis=True on the unpacked model), or quantise the base with bitsandbytes, HQQ or torchao."
            ) from error
    return values.full_tensor() if isinstance(values, DTensor) else values


def bases_of(model: nn.Module, layers: Mapping[str, Any], source: str) -> Known:
    """Fetch the bases of the weights of SVF layers, from the cache or by computing them; arguments of [`reader`]."""
    read = reader(model, layers, source)
    if not any(isinstance(layer.base_weight, DTensor) for layer in layers.values()):
        return fetch(layers, read)
    gathered: Known = {}  # All processes take part in gathering, so none may hold the lock of the cache meanwhile.
    for name in layers:
        whole = read(name)
        gathered |= fetch([name], lambda _, whole=whole: whole)  # type: ignore[misc]
    return gathered


class Checkpoint:
    """
    The safetensors files that a model was loaded from, if they are on this machine: its folder or the Hub cache.

    A float32 checkpoint loaded in bfloat16 holds rounded weights, whose singular directions differ from the stored
    ones by far more than an expert moves them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._files, self._dtypes = self._read_headers()

    def rounds_to(self, dtype: torch.dtype) -> bool:
        """Whether a load in a 16-bit dtype may have rounded: the files hold matrices in other dtypes."""
        return dtype in NARROW and bool(self._dtypes - {NARROW[dtype]})

    def weight(self, name: str, loaded: Tensor, packed: bool = False, turned: bool = False) -> Tensor | None:
        """
        Read the stored form of a loaded weight.

        Args:
            name (`str`):
                Name of the parameter in the model, such as `"model.layers.0.mlp.up_proj.weight"`.
            loaded (`torch.Tensor`):
                Its values. What the files hold counts only if it rounds to exactly these.
            packed (`bool`):
                Whether they were quantised and dequantised: then a relative distance of `PACKED` is rounding, too.
            turned (`bool`):
                Whether the parameter is their transpose, as in `Conv1D`.

        Returns:
            `torch.Tensor` like `loaded` in the dtype of the files, or `None` if no file holds this very weight.
        """
        shape, stored = (loaded.T if turned else loaded).shape, self._read(name)
        if stored is None or stored.shape != shape:
            stored = self._assemble(name, shape)
        if stored is None:
            return None
        stored = (stored.T if turned else stored).to(loaded.device)
        if packed:
            same = (stored.float() - loaded.float()).norm() <= PACKED * stored.float().norm()
        else:
            same = torch.equal(stored.to(loaded.dtype), loaded.detach())
        return stored if same else None

    def _assemble(self, name: str, shape: torch.Size) -> Tensor | None:
        """Put a weight together that transformers renames, turns or fuses while it loads the stored tensors."""
        if not self._files or not hasattr(self.model, "config"):
            return None
        places = torch.arange(shape.numel()).view(shape)  # the index of each stored number
        try:
            parts = revert_weight_conversion(self.model, {name: places})
        except Exception:  # This conversion needs other tensors as well.
            return None
        whole: Tensor | None = None
        for part_name, part in parts.items():
            stored = self._read(part_name)
            if stored is None or stored.shape != part.shape:
                return None
            whole = torch.empty(shape, dtype=stored.dtype) if whole is None else whole
            whole.view(-1)[part.reshape(-1)] = stored.reshape(-1)
        return whole

    def _read(self, name: str) -> Tensor | None:
        """Read a tensor that the files hold under its name with or without the prefix of the backbone."""
        for stored_name in (name, f"{self.prefix}{name}", name.removeprefix(self.prefix)):
            if stored_name in self._files:
                with safe_open(self._files[stored_name], framework="pt") as file:
                    return file.get_tensor(stored_name).clone()  # a copy, because others may write to the file
        return None

    def _read_headers(self) -> tuple[dict[str, Path], set[str]]:
        """Map the names of the stored tensors to their files, and collect the dtypes of matrices."""
        names, dtypes, paths = {}, set(), [self._file("model.safetensors")]
        try:
            if (index := self._file("model.safetensors.index.json")) is not None:
                paths = [self._file(shard) for shard in set(json.loads(index.read_text())["weight_map"].values())]
            for path in filter(None, paths):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        names[name] = path
                        if len(file.get_slice(name).get_shape()) > 1:
                            dtypes.add(file.get_slice(name).get_dtype())
        except (OSError, ValueError, KeyError, SafetensorError):
            return {}, set()  # An unreadable checkpoint is as good as none.
        return names, dtypes

    def _file(self, name: str) -> Path | None:
        if not self.name:
            return None
        if (local := Path(self.name) / name).is_file():
            return local
        if Path(self.name).exists() or self.name.count("/") != 1:
            return None
        cached = try_to_load_from_cache(self.name, name)
        return Path(cached) if isinstance(cached, str) else None
