# SPDX-License-Identifier: Apache-2.0
"""
An adapted module: its base layer, the basis of its weight, one offset vector per adapter; forward, merge, unmerge.

The layer is given its basis by `SVFModel`; it does not know where bases come from. Private names of PEFT were read in
0.21.2.
"""

import copy
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .basis import change, rescale, side_of
from .config import SVFConfig
from .fingerprint import Fingerprint
from .parametrization import Parametrization, offset_of
from .plans import (
    Factored,
    Load,
    Merged,
    Plan,
    choose,
    factored_linear,
    fold,
    merged_linear,
    split,
    version_of,
)
from .weights import held_weight, offloaded, onloaded, refuse_shared, refuse_zero3, undo_cpu_packing

logger = logging.getLogger(__name__)

BASE = "__base__"  # PEFT's name for "no adapter" in mixed batches
BUILDING = threading.RLock()  # of threads that find z changed one builds, in the memory of what was there


def escape(name: str) -> str:
    """
    Turn any adapter name into a key that `nn.ModuleDict` takes: no dots, no name that the class itself uses.

    Ordinary names, `"default"` among them, stay as they are: TRL and PEFT look for them in parameter names.
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if (key and hasattr(nn.ModuleDict, key)) or key == "training" else key or "%"


class Offset(nn.Module):
    """Holds `z - 1` of one adapter as `weight (k,)`. A module, since PEFT and TRL find parameters by `.<adapter>.`"""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class OffsetDict(nn.ModuleDict):
    """A `nn.ModuleDict` of [`Offset`] whose keys are any strings."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # escaped key -> name
        super().__init__()

    def __getitem__(self, name: str) -> Offset:
        return super().__getitem__(escape(name))  # type: ignore[return-value]

    def __setitem__(self, name: str, module: nn.Module) -> None:
        super().__setitem__(escape(name), module)
        self._names[escape(name)] = name

    def __delitem__(self, name: str) -> None:
        super().__delitem__(escape(name))
        del self._names[escape(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(escape(name))

    def find(self, name: str) -> Tensor | None:
        """The offset of an adapter, or `None`: the short way of a forward, without attribute look-ups."""
        holder = self._modules.get(name if self._names.get(name) == name else escape(name))
        return None if holder is None else holder.weight  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:  # type: ignore[override]
        return [self._names[key] for key in self._modules]

    def values(self) -> list[Offset]:  # type: ignore[override]
        return list(self._modules.values())  # type: ignore[arg-type]

    def items(self) -> list[tuple[str, Offset]]:  # type: ignore[override]
        return list(zip(self.keys(), self.values(), strict=True))


def svf_layers(model: nn.Module) -> dict[str, "SVFLayer"]:
    """
    Find the SVF layers of a model, by the names of the base model's modules.

    The names are without what PEFT, `torch.compile`, FSDP and DDP put in front.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, SVFLayer):
            name = name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
            name = name.removeprefix("module.") if hasattr(model, "module") else name
            layers[name.removeprefix("base_model.model.")] = module
    return layers


@contextmanager
def active_rows(
    layers: Mapping[str, "SVFLayer"], offsets: Mapping[str, Tensor], index: Tensor | None = None, merge: bool = False
) -> Iterator[None]:
    """
    Put offsets in place of the adapters' in all layers at once, while the context is open.

    Args:
        layers (`Mapping[str, SVFLayer]`):
            Layers by module name, as [`svf_layers`] returns them.
        offsets (`Mapping[str, torch.Tensor]` of shapes `(n, k)` or `(k,)`):
            Offsets by module name; a layer without any is the base model.
        index (`torch.Tensor` of shape `(B,)`, *optional*):
            The offset of each row of the batch; default row i has offset i, and all rows share one alone.
        merge (`bool`):
            Many forwards will follow: if the rows share one offset, a merged copy of the weight pays.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            rows = offsets.get(name, torch.zeros(0))
            if rows.numel() == 0:
                rows = torch.zeros(0)
            elif rows.dim() == 2:
                rows = rows[0] if len(rows) == 1 else rows if index is None else rows[index.to(rows.device)]
            stack.enter_context(layer.rows(rows, merge))
        yield


class SVFLayer(BaseTunerLayer):
    """
    The state of an adapted module and everything PEFT asks of it.

    Attributes:
        svf_offset (`OffsetDict`):
            Per adapter the trainable `z - 1`, shape `(k,)`, float32.
        svf_basis (`torch.Tensor` of shape `(r, k)`, or `None`):
            The columns of the basis that the adapters move: all `r`, or the largest `rank` of any adapter. Not saved,
            and no buffer: DDP would send it to every process before every forward, and `.to(dtype)` would round it.
        svf_values (`torch.Tensor` of shape `(k,)`, or `None`):
            Their singular values.
        side (`str`):
            Where the basis multiplies, see [`Basis`].
        svf_plan (`str`):
            The execution plan that was asked for; [`choose`] decides for each forward.
    """

    base_layer: Any
    bias: Any
    svf_basis: Tensor | None
    svf_values: Tensor | None
    svf_shared: tuple[
        str, ...
    ] = ()  # the places in the model that hold the base weight, if [`note_shared`] found more
    weight: Tensor
    in_features: int
    out_features: int
    get_base_layer: Any
    _cast_input_dtype: Any  # methods of `BaseTunerLayer`, which has no types
    adapter_layer_names = ("svf_offset",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, shape: tuple[int, int] | None = None, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = shape or _get_in_out_features(self.get_base_layer())
        self.side = side_of(self.out_features, self.in_features)
        self.svf_offset = OffsetDict()
        self.svf_maps: dict[str, tuple[Parametrization, float]] = {}  # of adapters that train something else
        self.svf_rows: Tensor | None = None  # (B, k): an offset for each row of the batch, instead of the adapters'
        self._lasting = True  # the offset in force serves many forwards
        self._base_rows = False  # some of `svf_rows` are the base model
        self.svf_plan: Plan = "auto"
        self.svf_room = True  # memory for a second weight
        self.svf_forwards = 1  # forwards of an optimizer step
        self.svf_generating = False  # the same z serves the forwards of `generate`, in training mode too
        self.svf_trusted = False  # the offset is known to be the one that `svf_merged` was built from
        self.svf_chosen: Plan | None = None  # for the last forward
        self.svf_announced: set[Plan] | None = None  # the model's first layer logs each plan once
        self.svf_merged: Merged | None = None
        self.svf_factored: Factored | None = None
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.svf_fingerprint: Fingerprint | None = None
        self._pristine: Any = None
        self._known: tuple[Tensor, ...] = ()  # the base parameter when the plan was set, see `_plain`

    @property
    def directions(self) -> int:
        """The number `r = min(out, in)` of singular values of the weight."""
        return min(self.in_features, self.out_features)

    @property
    def base_weight(self) -> Tensor:
        """The parameter that holds the base weight, as the base layer keeps it; of packed layers the packed one."""
        return held_weight(self.get_base_layer())

    def size_of(self, rank: int | None) -> int:
        """The length of a z-vector that moves the `rank` largest singular values; `None`: all."""
        return min(rank or self.directions, self.directions)

    def weight_name(self, name: str) -> str:
        """What fingerprints call the weight of the layer with this module name."""
        return name

    def update_layer(self, adapter_name: str, config: SVFConfig) -> None:
        """Add the offset of an adapter, 0 everywhere (z = 1) unless `config.init_weights` is `False`."""
        size = self.size_of(config.rank)
        self.svf_maps.pop(adapter_name, None)
        if config.parametrization != "offset":
            self.svf_maps[adapter_name] = (config.parametrization, config.limit)
        self.svf_offset[adapter_name] = Offset(torch.zeros(size) if config.init_weights else 0.5 * torch.randn(size))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an offset and the basis beside the weight. Unlike PEFT's, it leaves offsets in float32."""
        device = device or self.base_layer_device()
        offset = self.svf_offset[adapter_name]
        if not offset.weight.is_meta:
            offset.to(device)
        self._move_basis(device)

    def base_layer_device(self) -> torch.device:
        """Where the base layer computes."""
        base: Any = self.get_base_layer()
        return torch.device(base._hf_hook.execution_device) if offloaded(base) else self.base_weight.device

    def _move_basis(self, device: torch.device) -> None:
        if self.svf_basis is not None and self.svf_basis.device != device and device.type != "meta":
            self.set_basis(self.svf_basis.to(device), self.svf_values)

    def set_basis(self, Q: Tensor | None, values: Tensor | None) -> None:
        """Take a basis `(r, k)` with its singular values `(k,)`; what was built from another one is dropped."""
        self.svf_basis = Q
        self.svf_values = values if Q is None or values is None else values.to(Q.device)
        self.svf_merged = self.svf_factored = None

    def svf_bytes(self) -> dict[str, int]:
        """Count what this layer keeps in memory beside its base layer, in bytes."""
        Q, merged, factored = self.svf_basis, self.svf_merged, self.svf_factored
        factors = [] if factored is None else [factored.first, factored.second]
        kept: dict[str, list[Tensor | None]] = {
            "basis": [Q, self.svf_values],
            "merged": [] if merged is None else [merged.weight, merged.thin],
            "pristine": [self._pristine[0]] if self._pristine and self.quantization_backend is None else [],
            "factored": [t for t in factors if Q is None or t.data_ptr() != Q.data_ptr()],  # the basis may be one
            "offsets": [offset.weight for offset in self.svf_offset.values()],
        }
        return {name: sum(0 if t is None else t.nbytes for t in tensors) for name, tensors in kept.items()}

    def lean_state(self) -> dict[str, Any]:
        """What a copy or a file gets: what is kept for speed is made anew there."""
        return self.__dict__ | {"svf_merged": None, "svf_factored": None, "_compiled_call_impl": None}

    def get_base_weight(self) -> Tensor:
        """The base weight as a plain tensor, dequantised if it is packed."""
        undo_cpu_packing(self.get_base_layer())
        return super().get_base_weight()

    def logical_weight(self) -> Tensor:
        """The base weight as `(out, in)`: dequantised if it is packed, transposed for `Conv1D`; never a merged one."""
        if self._pristine is None:
            weight = self.get_base_weight()
        elif self.quantization_backend is None:
            weight = self._pristine[0]
        else:
            merged = self._snapshot()
            self._restore(self._pristine)
            weight = self.get_base_weight()
            self._restore(merged)
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    @contextmanager
    def rows(self, offsets: Tensor | None, merge: bool = True) -> Iterator[None]:
        """
        Put offsets in place of the adapters' while the context is open.

        Args:
            offsets (`torch.Tensor`, *optional*):
                `(B, k)` gives each row of the batch its own, `(k,)` all rows one, an empty tensor the base model;
                `None` changes nothing.
            merge (`bool`):
                One offset `(k,)` serves many forwards: a merged copy of the weight pays. `False` for a single one.
        """
        before = self.svf_rows, self._lasting, self._base_rows
        if offsets is not None:
            self.svf_rows, self._lasting = offsets, merge
            self._base_rows = offsets.dim() == 2 and bool((offsets == 0).all(-1).any())
        try:
            yield
        finally:
            self.svf_rows, self._lasting, self._base_rows = before

    def named_offsets(self, adapter_names: list[str]) -> Tensor:
        """Stack the offsets of adapters into `(B, k)`: 0 for the base, and where an adapter has none here."""
        width = self._basis().shape[:-2].numel() * self._basis().shape[-1]
        zero = torch.zeros(width, device=self._basis().device)
        unique = list(dict.fromkeys(adapter_names))
        table = torch.stack([self._padded(name) if name in self.svf_offset else zero for name in unique])
        return table[torch.tensor([unique.index(name) for name in adapter_names], device=table.device)]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`W' - W` of one adapter, in the shape and dtype of the base weight (`Conv1D`: transposed)."""
        weight = self.logical_weight()
        delta = self._rescale(weight, self._padded(adapter)) - weight
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Write `U diag(S * z) V^T` into the base layer, from the pristine weight, which is kept.

        Args:
            safe_merge (`bool`):
                Look for NaN and infinities first and leave the weight alone if there are any.
            adapter_names (`list[str]`, *optional*):
                Adapters to merge; default the active ones. Those merged before stay merged.

        Raises:
            `ValueError`: with `safe_merge`, if an adapter makes a weight that is not finite.
            `TypeError`: if the weight is packed by a quantisation that cannot be undone, or sharded.
        """
        if isinstance(self.base_weight, DTensor):
            raise TypeError("A sharded weight cannot be merged: save the adapter and merge it into the whole model.")
        refuse_shared(self)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.svf_offset]
        for name in names:
            weight = self.logical_weight()
            offset = sum((self._padded(n) for n in (*self.merged_adapters, name)), torch.tensor(0.0))
            merged = self._rescale(weight, offset)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._pristine = self._pristine or self._snapshot()
            self.set_base_weight(merged.T.contiguous() if isinstance(self.get_base_layer(), Conv1D) else merged)
            self.merged_adapters.append(name)
            self.svf_merged = self.svf_factored = None

    def unmerge(self) -> None:
        """Put the pristine weight back, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore(self._pristine)
        self._pristine = None
        self.merged_adapters.clear()

    def _snapshot(self) -> tuple[Any, ...]:
        """Keep what `set_base_weight` replaces: the tensor, or for packed weights the parameter with its state."""
        base = self.get_base_layer()
        if self.quantization_backend is None:
            return (self.base_weight.data,)
        weight = base._parameters.get("weight")
        return base, weight, dict(getattr(weight, "__dict__", {})), copy.copy(getattr(base, "state", None))

    def _restore(self, snapshot: tuple[Any, ...]) -> None:
        base = self.get_base_layer()
        if self.quantization_backend is None:
            self.base_weight.data = snapshot[0].to(self.base_weight.device, self.base_weight.dtype)
            return
        pristine, weight, attributes, state = snapshot
        if base is not pristine:  # PEFT's setter for HQQ puts another module in its place
            self.base_layer = base = pristine
        if weight is not None:
            base.weight = weight
            weight.__dict__.update(attributes)  # PEFT's 4-bit setter edits the old parameter's flags as well
        if state is not None:
            base.state = state

    def _basis(self) -> Tensor:
        if self.svf_basis is None:
            raise RuntimeError(
                "This SVF layer has no basis: its weight was on the meta device when the adapter was added. "
                "Load the weights, then call `model.base_model.fetch_bases()`."
            )
        return self.svf_basis

    def _padded(self, adapter_name: str) -> Tensor:
        return self.padded(self.offset(adapter_name))

    def offset(self, adapter_name: str) -> Tensor:
        """The offset `z - 1` of an adapter, for the directions it moves."""
        return self.mapped(adapter_name, self.svf_offset[adapter_name].weight)

    def mapped(self, adapter_name: str, parameter: Tensor) -> Tensor:
        """The offset of an adapter from what it trains."""
        if adapter_name not in self.svf_maps:
            return parameter
        return offset_of(parameter, *self.svf_maps[adapter_name], self._values_of(parameter))

    def _values_of(self, parameter: Tensor) -> Tensor | None:
        return None if self.svf_values is None else self.svf_values[: len(parameter)]

    def fold_parametrization(self, adapter_name: str) -> None:
        """Replace what an adapter trains by the offset it stands for."""
        if adapter_name in self.svf_maps:
            parameter = self.svf_offset[adapter_name].weight
            parameter.data = self.mapped(adapter_name, parameter.data)
            del self.svf_maps[adapter_name]

    def _rescale(self, weight: Tensor, offset: Tensor) -> Tensor:
        return rescale(weight, self._basis(), offset)

    def padded(self, offset: Tensor) -> Tensor:
        """An offset with one entry per column of the basis: 0 for the directions that it does not move."""
        missing = self._basis().shape[-1] - offset.shape[0]
        return F.pad(offset, (0, missing)) if missing else offset

    def _active_offset(self) -> Tensor | None:
        """The offset in force, `(k,)` or `(B, k)`, or `None` where no adapter moves this weight."""
        if self.svf_rows is not None:
            return self.svf_rows if len(self.svf_rows) else None
        offsets: Any = self._modules["svf_offset"]
        total = None
        for name in [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter:
            if (offset := offsets.find(name)) is not None:
                offset = self.padded(self.mapped(name, offset) if self.svf_maps else offset)
                total = offset if total is None else total + offset
        return total

    def _without_bias(self, x: Tensor, y: Tensor) -> Tensor:
        """
        `x W^T`, for the gradient of z: in half precision `y - bias` has lost it where the bias is large.

        Qwen2.5's k_proj has a bias 20 times the signal; z gradients from `y - bias` are 8 % off there in bfloat16.
        """
        if offloaded(base := self.get_base_layer()):
            with onloaded(base):
                return self._without_bias(x, y)
        if y.dtype not in (torch.bfloat16, torch.float16) or self.quantization_backend is not None:
            return y - self.bias
        weight = self.weight.T if isinstance(self.get_base_layer(), Conv1D) else self.weight
        return F.linear(x, weight)


def _spread(offset: Tensor, x: Tensor) -> Tensor:
    """
    Bring an offset `(B, k)` to the shape of `x (N, ..., n)`, `N` a multiple of `B`: row i serves the i-th part of `x`.

    Beams and returned sequences repeat each row of a batch, and some models (OPT) flatten batch and tokens before
    their MLP: in both, the rows of one sample lie side by side.
    """
    if offset.dim() == 1:
        return offset
    if x.shape[0] % offset.shape[0]:
        raise ValueError(f"There are offsets for {offset.shape[0]} rows, but the batch has {x.shape[0]}.")
    offset = offset.repeat_interleave(x.shape[0] // offset.shape[0], dim=0)
    return offset.view(x.shape[0], *[1] * (x.dim() - 2), -1)


def capturing(x: Tensor) -> bool:
    """
    Whether a CUDA graph is being captured: nothing may wait for the device, and replays must see later values of z.

    The narrow plan reads z where it lies: the parameter of the adapter, or the tensor given to `rows`.
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _key(weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """Identifies a base weight and the dtype it is used in."""
    return weight.data_ptr(), version_of(weight), dtype, weight.device


def _untouched(base: nn.Module) -> bool:
    """Whether nobody has hung anything on the forward of a module, which another product would pass by."""
    return not (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    )


class Linear(nn.Module, SVFLayer):
    """SVF of `nn.Linear`, transformers' `Conv1D` and the packed linears that PEFT's quantisation backends know."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SVFConfig, **kwargs: Any) -> None:
        super().__init__()
        SVFLayer.__init__(self, base_layer, **kwargs)
        self.svf_basis = self.svf_values = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getstate__(self) -> dict[str, Any]:
        return self.lean_state()

    def _apply(self, fn: Any, recurse: bool = True) -> "Linear":
        super()._apply(fn, recurse)
        self._move_basis(self.base_layer_device())
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs or torch.compiler.is_compiling()) and (kept := self._kept_for(x)) is not None:
            if isinstance(kept, Merged):
                return F.linear(x, kept.weight, kept.bias)
            assert kept.scale is not None
            return factored_linear(x, kept, kept.scale)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        offset = None if self.merged else self._active_offset()
        if offset is None:
            return self.base_layer(x, *args, **kwargs)
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast and self.quantization_backend is None:
            x = self._cast_input_dtype(x, self.weight.dtype)
        if self._basis().device != x.device and not x.is_meta:
            self._move_basis(x.device)  # accelerate's offload moves the weight only while the layer runs
        self.svf_chosen = "narrow" if args or kwargs else self._plan(x, offset)
        if self.svf_chosen == "merged":
            merged = self._merged_for(offset, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)
            if merged is not None:
                with torch.autocast(x.device.type, enabled=False):
                    return merged_linear(x.to(merged.weight.dtype), offset, merged)
            self.svf_chosen = "narrow"
        if self.svf_chosen == "factored":
            factored, scale = self._factored(), 1 + _spread(offset, x)
            if not torch.is_grad_enabled():
                factored.remember(x, offset, scale)
            return factored_linear(x, factored, scale)
        Q, offset = self._basis(), _spread(offset, x)
        if self.side == "in":
            return self.base_layer(x + change(x, Q, offset), *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        u = y if self.bias is None else self._without_bias(x, y)
        return y + change(u, Q, offset)

    def _kept_for(self, x: Tensor) -> Merged | Factored | None:
        """
        What the last forward of inference built, if this one repeats it with the same z: the short way, for decoding.

        It asks what `forward`, `_plan` and `_merged_for` ask, without their attribute look-ups (25 -> 2 microseconds).
        """
        kept = self.svf_merged if self.svf_chosen == "merged" else self.svf_factored
        if (
            kept is None
            or (self.training and not self.svf_generating)
            or self._disable_adapters
            or self.merged_adapters
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or capturing(x)
        ):
            return None
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        if weight is None or not _untouched(base) or kept.key != _key(weight, x.dtype):
            return None
        if isinstance(kept, Merged):
            known = self._lasting and (self.svf_trusted or self._holds(kept, self._active_offset()))
        else:
            known = self.svf_chosen == "factored" and kept.knows(x, self.svf_rows)
        return kept if known else None

    def _holds(self, merged: Merged, offset: Tensor | None) -> bool:
        """Whether a merged weight was built from these values: writes through `.data` leave version counters alone."""
        return offset is not None and offset.dim() == 1 and torch.equal(merged.offset, offset)

    def _plan(self, x: Tensor, offset: Tensor) -> Plan:
        if torch.compiler.is_compiling() or capturing(x) or not self._plain():
            refuse_zero3(self.base_weight)
            return "narrow"
        rows = offset.dim() == 2
        load = Load(
            tokens=x.shape[:-1].numel() * self.svf_forwards,
            long=max(self.in_features, self.out_features),
            r=self.directions,
            k=offset.shape[-1],
            # not whether gradients are on: checkpointing runs a first forward without, and both must agree to the bit
            training=self.training and offset.requires_grad and not self.svf_generating,
            rows=rows,
            base_rows=self._base_rows,
            lasting=self._lasting,
            room=self.svf_room,
            precise=torch.finfo(self._basis().dtype).eps <= torch.finfo(self.base_layer.weight.dtype).eps,
        )
        chosen = choose(self.svf_plan, load)
        if self.svf_announced is not None and chosen not in self.svf_announced:
            self.svf_announced.add(chosen)
            logger.info(f"SVF plan {chosen!r} of {self.svf_plan!r} for {load}.")
        return chosen

    def _plain(self) -> bool:
        """
        Whether the base layer is nothing but a product with a frozen weight, which another one can stand in for.

        FSDP shards weights between forwards; while a module runs it has a plain parameter, another object than the one
        that the plan was set for. A copy of that one would undo the sharding.
        """
        base = self.base_layer
        return (
            type(base) in (nn.Linear, Conv1D)
            and len(self._known) == 1
            and base._parameters.get("weight") is self._known[0]
            and type(base.weight.data) is Tensor
            and not (base.weight.requires_grad or hasattr(base.weight, "ds_id"))
            and not (base.bias is not None and base.bias.requires_grad)
            and _untouched(base)
        )

    def _factored(self) -> Factored:
        """The two factors of the weight, made where they are not there."""
        weight = self.base_layer.weight
        key, kept = _key(weight, weight.dtype), self.svf_factored
        if kept is None or kept.key != key:
            kept = split(self.logical_weight(), self.base_layer.bias, self.side, self._basis(), key)
            self.svf_factored = kept
        return kept

    def _merged_for(self, offset: Tensor, dtype: torch.dtype) -> Merged | None:
        """The merged copy of the weight for an offset, built where it is not there."""
        key = _key(self.base_layer.weight, dtype)

        def found() -> Merged | None:
            merged = self.svf_merged
            same = merged is not None and merged.key == key and (self.svf_trusted or self._holds(merged, offset))
            return merged if same else None

        if (merged := found()) is not None:
            return merged
        bias = self.base_layer.bias
        assert self.svf_basis is not None and self.svf_values is not None
        with BUILDING:
            if (merged := found()) is None:
                merged = self.svf_merged = fold(
                    self.logical_weight().to(dtype),
                    bias if bias is None else bias.to(dtype),
                    self.side,
                    self.svf_basis,
                    self.svf_values,
                    offset.detach(),
                    key,
                    self.svf_merged,
                )
        return merged

    def extra_repr(self) -> str:
        kept = self.directions if self.svf_basis is None else self.svf_basis.shape[-1]
        chosen = f" ({self.svf_chosen})" if self.svf_plan == "auto" and self.svf_chosen else ""
        own = f"side={self.side!r}, directions={kept}, plan={self.svf_plan + chosen!r}"
        return ", ".join(filter(None, [quantization_extra_repr(self), own]))

    def __repr__(self) -> str:
        return "svf." + super().__repr__()
