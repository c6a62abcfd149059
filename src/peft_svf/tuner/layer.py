# SPDX-License-Identifier: Apache-2.0
"""
An adapted module: its base layer, the basis of its weight, one offset vector per adapter; forward, merge, unmerge.

`SVFModel` gives the layer its basis; the layer doesn't know where bases come from. Private names of PEFT were read in
0.21.2.
"""

import copy
import logging
import threading
import warnings
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
from .plans import (
    Factored,
    Load,
    Merged,
    Plan,
    capturing,
    choose,
    factored_linear,
    fast,
    fold,
    key_of,
    merged_linear,
    split,
    transforming,
)
from .rows import Execution, Rows
from .weights import held_weight, offloaded, onloaded, refuse_split, undo_cpu_packing

logger = logging.getLogger(__name__)

BASE = "__base__"  # PEFT's name for "no adapter" in mixed batches
BUILDING = threading.RLock()  # if several threads notice a new z, one rebuilds in place and the others reuse it


class Offset(nn.Module):
    """Holds `z - 1` of one adapter as `weight (k,)`. A module, since PEFT and TRL find parameters by `.<adapter>.`"""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def read(self) -> Tensor:
        """Return the weight, brought into memory if accelerate offloads it: no forward of this module would."""
        if not self.weight.is_meta:
            return self.weight
        with onloaded(self):
            return self.weight


def svf_layers(model: nn.Module) -> dict[str, "SVFLayer"]:
    """Find the SVF layers of a model, by module name without what PEFT, `torch.compile`, FSDP and DDP put in front."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, SVFLayer):
            name = name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
            name = name.removeprefix("module.") if hasattr(model, "module") else name
            layers[name.removeprefix("base_model.model.")] = module
    return layers


def svf_weights(model: nn.Module) -> dict[str, "SVFLayer"]:
    """Find the SVF layers of a model by what files call their weights; of a stacked weight it is the parameter."""
    return {layer.weight_name(name): layer for name, layer in svf_layers(model).items()}


class SVFLayer(nn.Module, BaseTunerLayer):
    """
    The state of an adapted module and everything PEFT asks of it.

    Attributes:
        svf_offset (`nn.ModuleDict`):
            Per adapter the trainable `z - 1`, shape `(k,)`, float32.
        svf_basis (`torch.Tensor` of shape `(r, k)`, or `None`):
            The columns of the basis that the adapters move: all `r`, or the largest `rank` of any adapter. Neither
            saved nor a buffer: DDP would send it to every process in every forward, and `.to(dtype)` would round it.
        svf_values (`torch.Tensor` of shape `(k,)`, or `None`):
            Their singular values.
        svf_chosen (`str`, or `None`):
            The plan of the last forward.
    """

    adapter_layer_names = ("svf_offset",)
    other_param_names = ()
    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it
    base_layer: Any
    bias: Any
    in_features: int
    out_features: int
    get_base_layer: Any  # this and the next three are methods of `BaseTunerLayer`, which has no types
    set_base_weight: Any
    set_adapter: Any
    _cast_input_dtype: Any
    svf_offset: Any  # an `nn.ModuleDict` of `Offset`, a type that mypy cannot write
    svf_basis: Tensor | None = None
    svf_values: Tensor | None = None
    svf_fingerprint: Fingerprint | None = None
    svf_shared: tuple[str, ...] = ()  # the places that hold the base weight, if [`note_shared`] found more
    svf_chosen: Plan | None = None
    svf_merged: Merged | None = None
    svf_factored: Factored | None = None
    parameter_name: str | None = None  # what its module calls a stacked weight
    matrices = 1  # A stack of experts has several.
    _pristine: Any = None  # what merging has replaced
    _planned_for: tuple[Tensor, ...] = ()  # the base parameter when the plan was set, see `_plain`
    _ran = 0  # number of the model's call in which this layer ran last
    _met: tuple[Tensor | None, int] = (None, 0)  # the offsets that rows had last, and in how many forwards

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SVFConfig,
        shape: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = shape or _get_in_out_features(self.get_base_layer())
        self.side = side_of(self.out_features, self.in_features)
        self.svf_offset = nn.ModuleDict()
        self.execution = Execution()
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def rows(self) -> Rows | None:
        """The offsets that replace the adapters' for now, if any."""
        rows = self.execution.rows
        return rows.get(self) if rows else None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight. A parent that reads it and then doesn't run the layer would ignore z."""
        if not torch.compiler.is_compiling() and self.execution.call:
            self.execution.read.add(self)
        return super().weight

    @property
    def directions(self) -> int:
        """The number `r = min(out, in)` of singular values of the weight."""
        return min(self.in_features, self.out_features)

    @property
    def columns(self) -> int:
        """The number of directions in the basis, 0 without one."""
        return 0 if self.svf_basis is None else self.svf_basis.shape[-1]

    @property
    def base_weight(self) -> Tensor:
        """The parameter that holds the base weight, as the base layer keeps it; if the layer is packed, packed."""
        return held_weight(self.get_base_layer())

    @property
    def moves(self) -> bool:
        """Whether an adapter is in force here, so that the layer should run."""
        return self._offset_in_force(self.rows) is not None

    def size_of(self, rank: int | None) -> int:
        """Count the multipliers that move the `rank` largest singular values, or all, of each matrix of the layer."""
        return self.matrices * min(rank or self.directions, self.directions)

    def weight_name(self, name: str) -> str:
        """What files call the weight of the layer with this module name, inside a LoRA added later too."""
        return name.replace(".base_layer", "")

    def update_layer(self, adapter_name: str, config: SVFConfig) -> None:
        """Add the offset of an adapter, 0 everywhere (z = 1) unless `config.init_weights` is `False`."""
        size = self.size_of(config.rank)
        self.svf_offset[adapter_name] = Offset(torch.zeros(size) if config.init_weights else 0.5 * torch.randn(size))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an offset and the basis to where the weight is. Unlike PEFT's, it leaves offsets in float32."""
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
        self.svf_merged, self.svf_factored, self._met = None, None, (None, 0)

    def svf_bytes(self) -> dict[str, int]:
        """Count the bytes that this layer adds to its base layer."""
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

    def __getstate__(self) -> dict[str, Any]:
        """A copy builds again what is kept for speed."""
        dropped = {"svf_merged": None, "svf_factored": None, "_met": (None, 0), "_compiled_call_impl": None}
        return self.__dict__ | dropped

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._move_basis(self.base_layer_device())
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load; if the base weight gets other values, the basis goes and the model fetches another one."""
        weight = self.base_weight
        name = next((name for name, parameter in self.named_parameters() if parameter is weight), None)
        new = None if weight.is_meta or isinstance(weight, DTensor) else state_dict.get(f"{prefix}{name}")
        readable = new is not None and not new.is_meta and self.quantization_backend is None
        if new is not None and readable and not torch.equal(new.to(weight), weight):
            self.svf_fingerprint, self.execution.waiting = None, True
            self.set_basis(None, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the base module back, merged or as it was before any merging; PEFT would leave it as it is."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.get_base_layer()

    def __repr__(self) -> str:
        return "svf." + super().__repr__()

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

    def named_offsets(self, adapter_names: list[str]) -> Tensor:
        """Stack the offsets of adapters into `(n, k)`: 0 for the base, and for an adapter that has none here."""
        width = self._basis().shape[:-2].numel() * self._basis().shape[-1]
        zero = torch.zeros(width, device=self._basis().device)
        return torch.stack([self._offset_of(name) if name in self.svf_offset else zero for name in adapter_names])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`W' - W` of one adapter, in the shape and dtype of the base weight (`Conv1D`: transposed)."""
        weight = self.logical_weight()
        delta = self._rescale(weight, self._offset_of(adapter)) - weight
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Write `U diag(S * z) V^T` into the base layer, from the pristine weight, which is kept.

        Adapters that are merged already stay merged. With `safe_merge` a result that isn't finite is refused.
        """
        if isinstance(self.base_weight, DTensor):
            raise TypeError("A sharded weight cannot be merged: save the adapter and merge it into the whole model.")
        if len(self.svf_shared) > 1:
            raise ValueError(
                f"{self.svf_shared[0]} and {self.svf_shared[1]} share one weight, which cannot be merged with the "
                "z-vector of one of them. Leave the adapter unmerged, or give each module its own weight before "
                "adding it."
            )
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.svf_offset]
        for name in names:
            weight = self.logical_weight()
            offset = sum((self._offset_of(n) for n in (*self.merged_adapters, name)), torch.tensor(0.0))
            merged = self._rescale(weight, offset)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._pristine = self._pristine or self._snapshot()
            self.svf_merged, self.svf_factored, self._met = None, None, (None, 0)
            self.merged_adapters.append(name)  # first, so that an interrupted merge can be undone
            self.set_base_weight(merged.T.contiguous() if isinstance(self.get_base_layer(), Conv1D) else merged)

    def unmerge(self) -> None:
        """Put the pristine weight back, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore(self._pristine)
        self.merged_adapters.clear()
        self._pristine = None

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
                "This SVF layer has no basis: its weight came, or was replaced, after the adapter was added. "
                "Load the weights, then call `model.base_model.fetch_bases()`."
            )
        return self.svf_basis

    def _offset_of(self, adapter_name: str) -> Tensor:
        return self.padded(self.svf_offset[adapter_name].read())

    def _rescale(self, weight: Tensor, offset: Tensor) -> Tensor:
        Q = self._basis()
        return rescale(weight, Q, offset.view(*Q.shape[:-2], Q.shape[-1]))

    def padded(self, offset: Tensor) -> Tensor:
        """An offset with one entry per column of each basis: 0 for the directions that it does not move."""
        missing = self._basis().shape[-1] - offset.shape[0] // self.matrices
        return F.pad(offset.view(self.matrices, -1), (0, missing)).flatten() if missing else offset

    def _active_offset(self) -> Tensor | None:
        """The offset `(k,)` of the active adapters, or `None` if none of them moves this weight."""
        offsets: Any = self._modules["svf_offset"]._modules  # type: ignore[union-attr]
        total = None
        for name in [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter:
            if (holder := offsets.get(name)) is not None:
                offset = self.padded(holder.read())
                total = offset if total is None else total + offset
        return total

    def _offset_in_force(self, rows: Rows | None) -> Tensor | None:
        """The offset `(k,)` that all rows share, or the first of several; `None` if the base layer runs alone."""
        if self.disable_adapters or self.merged:
            return None
        if rows is None:
            return self._active_offset()
        return rows.offsets[0] if len(rows.offsets) else None

    def _without_bias(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Compute `x W^T` for the gradient of z: in half precision `y - bias` has lost it if the bias is large.

        Qwen2.5's k_proj has a bias 20 times the signal; z gradients from `y - bias` are 8 % off there in bfloat16.
        """
        if offloaded(base := self.get_base_layer()):
            with onloaded(base):
                return self._without_bias(x, y)
        if y.dtype not in (torch.bfloat16, torch.float16) or self.quantization_backend is not None:
            return y - self.bias
        return F.linear(x, self.base_weight.T if isinstance(base, Conv1D) else self.base_weight)


def _untouched(base: nn.Module) -> bool:
    """Whether the forward of a module has no hooks, which a product in its place would skip."""
    return not (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    )


class Linear(SVFLayer):
    """SVF of `nn.Linear`, transformers' `Conv1D` and the packed linears that PEFT's quantisation backends know."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, compiling = self.rows, torch.compiler.is_compiling()
        if not compiling and self.execution.call:
            self.__dict__["_ran"] = self.execution.call  # the short way around `nn.Module.__setattr__`
        if not (args or kwargs or compiling) and (kept := self._kept_for(x, rows)) is not None:
            if isinstance(kept, Merged):
                return F.linear(x, kept.weight, kept.bias)
            assert kept.scale is not None
            return factored_linear(x, kept, kept.scale)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if (spread := self._offset_in_force(rows)) is None:
            return self.base_layer(x, *args, **kwargs)
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast and self.quantization_backend is None:
            x = self._cast_input_dtype(x, self.base_weight.dtype)
        if self._basis().device != x.device and not x.is_meta:
            self._move_basis(x.device)  # accelerate's offload moves the weight only while the layer runs
        if rows is not None and rows.mixed:
            spread = rows.of(x.shape[:-1], self.execution)
        self.svf_chosen = "narrow" if args or kwargs else self._plan(x, spread, rows)
        if self.svf_chosen == "merged":
            merged = self._merged_for(spread, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)
            if merged is not None:
                with torch.autocast(x.device.type, enabled=False):
                    return merged_linear(x.to(merged.weight.dtype), spread, merged)
            self.svf_chosen = "narrow"
        if self.svf_chosen == "factored":
            factored, scale = self._factored(), 1 + spread
            if rows is not None and not torch.is_grad_enabled():
                factored.remember((rows, x.shape[:-1], self.execution.batch), rows.offsets, scale)
            return factored_linear(x, factored, scale)
        Q = fast(self._basis(), x.shape[:-1].numel())
        if self.side == "in":
            return self.base_layer(x + change(x, Q, spread), *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        u = y if self.bias is None else self._without_bias(x, y)
        return y + change(u, Q, spread)

    def _kept_for(self, x: Tensor, rows: Rows | None) -> Merged | Factored | None:
        """
        What the last forward of inference built, if this one repeats it with the same z: the short way, for decoding.

        It checks what `_plan` and `_merged_for` check, without their attribute look-ups (25 -> 2 microseconds).
        """
        kept = self.svf_merged if self.svf_chosen == "merged" else self.svf_factored
        execution = self.execution
        if (
            kept is None
            or (self.training and not execution.generating)
            or self._disable_adapters
            or self.merged_adapters
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or capturing(x)
            or transforming()
        ):
            return None
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        if weight is None or not _untouched(base) or kept.key != key_of(weight, x.dtype):
            return None
        if not isinstance(kept, Merged):
            same = rows is not None and self.svf_chosen == "factored"
            return kept if same and kept.knows((rows, x.shape[:-1], execution.batch), rows.offsets) else None  # type: ignore[union-attr]
        if rows is not None:
            return kept if len(rows.offsets) == 1 and kept.holds(rows.offsets[0]) else None
        return kept if execution.trusted or kept.holds(self._active_offset()) else None

    def _plan(self, x: Tensor, offset: Tensor, rows: Rows | None) -> Plan:
        if torch.compiler.is_compiling() or capturing(x) or transforming() or not self._plain():
            refuse_split(self.base_weight)
            return "narrow"
        execution = self.execution
        load = Load(
            tokens=x.shape[:-1].numel() * execution.forwards,
            long=max(self.in_features, self.out_features),
            r=self.directions,
            k=offset.shape[-1],
            # not whether gradients are on: checkpointing runs a first forward without, and both must agree to the bit
            training=self.training and offset.requires_grad and not execution.generating,
            rows=rows is not None and rows.mixed,
            base_rows=rows is not None and rows.any_base,
            lasting=rows is None or self._lasts(offset, rows),
            room=execution.room,
            precise=torch.finfo(self._basis().dtype).eps <= torch.finfo(self.base_layer.weight.dtype).eps,
        )
        chosen = choose(execution.plan, load)
        if chosen not in execution.announced:
            execution.announced.add(chosen)
            logger.info(f"SVF plan {chosen!r} of {execution.plan!r} for {load}.")
        return chosen

    def _lasts(self, offset: Tensor, rows: Rows) -> bool:
        """Whether a merged copy serves these rows: it is there, or they have had enough forwards in a row."""
        if self.svf_merged is not None and self.svf_merged.holds(offset):
            return True
        if not rows.merge_at:
            return False
        last, count = self._met
        again = last is rows.offsets or (last is not None and torch.equal(last, rows.offsets))
        count = count + 1 if again else 1
        self.__dict__["_met"] = (rows.offsets, count)  # the short way around `nn.Module.__setattr__`
        return count >= rows.merge_at

    def _plain(self) -> bool:
        """
        Whether the base layer is nothing but a product with a frozen weight, which another one can stand in for.

        FSDP shards weights between forwards; while a module runs it has a plain parameter, another object than the one
        that the plan was set for. A copy of that one would undo the sharding.
        """
        base = self.base_layer
        return (
            type(base) in (nn.Linear, Conv1D)
            and len(self._planned_for) == 1
            and base._parameters.get("weight") is self._planned_for[0]
            and type(base.weight.data) is Tensor
            and not (base.weight.requires_grad or hasattr(base.weight, "ds_id"))
            and not (base.bias is not None and base.bias.requires_grad)
            and _untouched(base)
        )

    def _factored(self) -> Factored:
        """Return the two factors of the weight, and make them if they are missing or out of date."""
        weight = self.base_layer.weight
        key, kept = key_of(weight, weight.dtype), self.svf_factored
        if kept is None or kept.key != key:
            self.svf_merged = None  # there is room for one copy of the weight
            kept = split(self.logical_weight(), self.base_layer.bias, self.side, self._basis(), key)
            self.svf_factored = kept
        return kept

    def _merged_for(self, offset: Tensor, dtype: torch.dtype) -> Merged | None:
        """Return the merged copy of the weight for an offset, and build it if it is missing or out of date."""
        base, key = self.base_layer, key_of(self.base_layer.weight, dtype)
        with BUILDING:
            old = self.svf_merged
            trusted = self.execution.trusted and self.rows is None
            if old is not None and old.key == key and (trusted or old.holds(offset)):
                return old
            assert self.svf_basis is not None and self.svf_values is not None
            # An interrupted build must not leave the old key on a weight that is half new.
            self.svf_merged = self.svf_factored = None
            bias = base.bias if base.bias is None else base.bias.to(dtype)
            weight, offset = self.logical_weight().to(dtype), offset.detach()
            self.svf_merged = fold(weight, bias, self.side, self.svf_basis, self.svf_values, offset, key, old)
            return self.svf_merged

    def extra_repr(self) -> str:
        chosen = f" ({self.svf_chosen})" if self.execution.plan == "auto" and self.svf_chosen else ""
        svf = (
            f"side={self.side!r}, directions={self.columns or self.directions}, plan={self.execution.plan + chosen!r}"
        )
        return ", ".join(filter(None, [quantization_extra_repr(self), svf]))
