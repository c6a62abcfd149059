# SPDX-License-Identifier: Apache-2.0
"""
Base model, names of weights -> their bases: from the cache, the stored checkpoint, or an adapter's own files.

Finds weights wherever they are (adapted, packed, offloaded, sharded, in stacks) and refuses those of another base.
Private names of PEFT were read in 0.21.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .basis import Basis, side_of
from .cache import fetch
from .checkpoint import Checkpoint
from .config import SVFConfig
from .fingerprint import Fingerprint, check
from .layer import SVFLayer, svf_layers
from .stacked import ParamWrapper
from .targets import adaptable
from .weights import held_weight, offloaded, onloaded, refuse_zero3, undo_cpu_packing

MISFIT = 0.35  # SmolLM2's weights in 4 bits are below 0.2 and in 3 bits below 0.3; another layer's lie above 0.4
Known = dict[str, tuple[Basis, Fingerprint]]


@dataclass(frozen=True)
class Weight:
    """A weight of the model, adapted or not: a parameter of a linear module, or one that is targeted by name."""

    holder: nn.Module
    parameter: Tensor
    stored_name: str
    layer: SVFLayer | None = None

    def backend(self, model: nn.Module) -> Any:
        """PEFT's quantisation backend for the module, or `None` where the weight is not packed."""
        return resolve_quantization_backend(self.holder, **get_quantization_kwargs(model))

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        """`(out, in)` or `(E, out, in)`, of packed weights too."""
        if isinstance(self.holder, Conv1D) or self.backend(model) is not None:
            within, out = _get_in_out_features(self.holder)
            return out, within
        return tuple(self.parameter.shape)

    def values(self, model: nn.Module, name: str) -> Tensor:
        """The weight `(out, in)` or `(E, out, in)` as it is in memory, whole, dequantised, never a merged one."""
        refuse_zero3(self.parameter)
        backend = self.backend(model)
        with onloaded(self.holder):
            try:
                values = self._read(backend)
            except (TypeError, NotImplementedError) as error:
                if backend is None:
                    raise
                raise ValueError(
                    f"The weight of {name} is packed by {backend.backend_name}, which PEFT cannot unpack, so its "
                    "singular directions cannot be computed here. Load an expert that brings its basis along (made "
                    "with save_basis=True on the unpacked model), or quantise the base with bitsandbytes, HQQ or "
                    "torchao."
                ) from error
        return values.full_tensor() if isinstance(values, DTensor) else values

    def _read(self, backend: Any) -> Tensor:
        if self.layer is not None:
            return self.layer.logical_weight()
        if backend is not None:
            undo_cpu_packing(self.holder)
            return backend.get_base_weight(self.holder)
        values = getattr(self.holder, self.stored_name.rpartition(".")[2]).data
        return values.T if isinstance(self.holder, Conv1D) else values


def finder(model: nn.Module) -> Callable[[str], Weight | None]:
    """Look up weights as fingerprints call them: by module, or by module and parameter."""
    modules = dict(model.named_modules())
    layers = {layer.weight_name(name): layer for name, layer in svf_layers(model).items()}

    def find(name: str) -> Weight | None:
        if (layer := layers.get(name)) is not None:
            stored = name if isinstance(layer, ParamWrapper) else f"{name}.weight"
            return Weight(layer.get_base_layer(), layer.base_weight, stored, layer)
        if (module := modules.get(name)) is not None:
            return Weight(module, held_weight(module), f"{name}.weight") if adaptable(module) else None
        parent, _, parameter = name.rpartition(".")
        holder = modules.get(parent)
        if isinstance(holder, SVFLayer):  # another of its parameters is adapted
            holder = holder.get_base_layer()
        found = None if holder is None else holder._parameters.get(parameter)
        return None if found is None or holder is None else Weight(holder, found, name)

    return find


def bases_of(model: nn.Module, names: list[str], source: str) -> Known:
    """
    Fetch the bases of weights by name, from the cache or by computing them.

    Args:
        model (`torch.nn.Module`):
            Base model, adapted or not.
        names (`list[str]`):
            Weights as fingerprints call them: modules, or modules with a parameter.
        source (`str`):
            `basis_from` of [`SVFConfig`]: whether the values are those in memory, or what the checkpoint stores.

    Raises:
        `ValueError`: for weights whose values cannot be had.
    """
    find = finder(model)
    weights = {name: weight for name in names if (weight := find(name)) is not None}
    checkpoint = Checkpoint(model) if weights and source != "memory" else None

    def values_of(name: str) -> Tensor:
        weight = weights[name]
        packed = weight.backend(model) is not None
        rounded = packed or weight.parameter.dtype in (torch.bfloat16, torch.float16)
        loaded = weight.values(model, name)
        if checkpoint is None or not (rounded or source == "checkpoint"):
            return loaded
        transposed = isinstance(weight.holder, Conv1D)
        stored = checkpoint.weight(weight.stored_name, loaded.T if transposed else loaded, packed)
        if stored is None and source == "checkpoint":
            raise ValueError(
                f"basis_from='checkpoint', but no safetensors file of {checkpoint.name or 'this model'!r} on "
                f"this machine holds the weight of {name} as it is loaded. Use basis_from='memory', or "
                "load the model from a local folder or the Hub cache."
            )
        if stored is None:
            return loaded
        return stored.T if transposed else stored

    if any(isinstance(weight.parameter, DTensor) for weight in weights.values()):
        gathered: Known = {}  # all processes take part in gathering: none may hold the lock of the cache meanwhile
        for name in weights:
            whole = values_of(name)
            gathered |= fetch([name], lambda _, whole=whole: whole)  # type: ignore[misc]
        return gathered
    return fetch(weights, values_of)


def checked_bases(model: nn.Module, adapter_name: str, config: SVFConfig, source: str) -> Known:
    """
    Compare the fingerprint of a saved adapter with this base; returns the bases that were needed for it.

    Args are those of [`bases_of`], and the adapter with its config; an adapter without a fingerprint needs none.

    Raises:
        `ValueError`: if the adapter belongs to another base.
    """
    if not config.fingerprint or config.fingerprint_recorded:
        return {}
    saved = {name: Fingerprint.from_json(entry) for name, entry in config.fingerprint.items()}
    adapted = {layer.weight_name(name): layer.svf_fingerprint for name, layer in svf_layers(model).items()}
    find = finder(model)
    found = {name: weight for name in saved if (weight := find(name)) is not None}
    missing = [
        n for n, weight in found.items() if adapted.get(n) is None and not absent(weight.holder, weight.parameter)
    ]
    bases = _shipped(model, adapter_name, config, {name: found[name] for name in missing})
    bases |= bases_of(model, [name for name in missing if name not in bases], source)
    own = {name: fingerprint for name, fingerprint in adapted.items() if fingerprint is not None}
    own |= {name: fingerprint for name, (_, fingerprint) in bases.items()}
    here = getattr(model, "name_or_path", "") or type(model).__name__
    if getattr(model, "is_quantized", False):
        here += " (quantised)"
    check(
        saved,
        own,
        absent=[name for name in saved if name not in found],
        adapter=adapter_name,
        here=here,
        there=config.base_model_name_or_path,
    )
    return bases


def _shipped(model: nn.Module, adapter_name: str, config: SVFConfig, weights: dict[str, Weight]) -> Known:
    """Read the bases that an adapter has brought along, and refuse those of other weights than these."""
    bases = {}
    for name, (Q, values, sha256) in config.read_bases().items():
        if name not in weights:
            continue
        fingerprint = Fingerprint.from_json((config.fingerprint or {})[name])
        shape = weights[name].shape(model)
        side, r = side_of(*shape[-2:]), min(shape[-2:])
        fits = Q.shape[:-1] == (*shape[:-2], r) and min(config.rank or r, r) <= Q.shape[-1] <= r
        if sha256 != fingerprint.sha256 or not fits:
            raise ValueError(
                f"Adapter {adapter_name!r} has brought along a basis of shape {tuple(Q.shape)} for {name}, which "
                f"does not belong to its fingerprint and to a weight of shape {tuple(shape)}: its files "
                "are of different experts, or this base is not the one it was trained on. Fetch both again."
            )
        readable = getattr(weights[name].backend(model), "supports_merge", True)
        distance = misfit(weights[name].values(model, name).to(Q.device), Q, values) if readable else 0.0
        if not distance <= MISFIT:
            raise ValueError(
                f"Adapter {adapter_name!r} does not belong to this base model: the basis that it has brought "
                f"along for {name} does not fit the weight here (distance {distance:.2g}; 4 bits make 0.2, at "
                f"most {MISFIT:g} is accepted). Load {config.base_model_name_or_path!r}."
            )
        bases[name] = (Basis(side, Q, values), fingerprint)
    return bases


def misfit(weight: Tensor, Q: Tensor, values: Tensor) -> float:
    """
    Tell how far a weight is from having these singular directions and values: 0 if it has them, about 1.4 by chance.

    `norm(Q^T G Q - diag(values^2)) / norm(diag(values^2) - mean(eigenvalues of G))` with `G` the Gram matrix of the
    weight `(out, in)` on its narrow side, or of each of a stack. Rounding moves it by twice its own size.
    """
    wide, Q, squares = weight.double(), Q.double(), torch.diag_embed(values.double().square())
    h = wide @ Q if side_of(*weight.shape[-2:]) == "in" else wide.mT @ Q  # (..., long, k)
    mean = wide.square().mean() * max(weight.shape[-2:])
    uniform = mean * torch.eye(Q.shape[-1], dtype=wide.dtype, device=wide.device)
    return float((h.mT @ h - squares).norm() / (squares - uniform).norm())


def absent(holder: nn.Module, parameter: Tensor) -> bool:
    """Whether a weight has no values yet; one that accelerate offloads has, elsewhere."""
    return parameter.is_meta and not offloaded(holder)
