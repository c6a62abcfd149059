# SPDX-License-Identifier: Apache-2.0
"""
Base model + `SVFConfig` -> the model with SVF layers: finds targets, replaces them, gives them their bases.

Private names of PEFT were read in 0.21.2.
"""

import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _get_submodules
from peft.utils.quantization_utils import get_quantization_kwargs
from psutil import virtual_memory
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import SVFConfig, selecting
from .layer import BASE, Linear, SVFLayer, svf_layers
from .loading import AdapterLoader
from .plans import PLANS, Plan, fast
from .rows import TEXTS, Execution, active_rows, batch_of
from .stacked import ParamWrapper
from .targets import DEFAULT_TARGETS, batch_first, default_targets, reads_weight
from .weights import multiplies, onloaded, readable, undo_cpu_packing

logger = logging.getLogger(__name__)


class SVFModel(AdapterLoader):
    """
    A model whose target weights can be rescaled along their singular directions (arXiv 2501.06252).

    Made by `peft.get_peft_model(model, SVFConfig(...))` or by loading an adapter; see PEFT's `BaseTuner` for
    `merge_and_unload`, `set_adapter`, `delete_adapter` and the others.
    """

    prefix = "svf_"
    tuner_layer_cls = SVFLayer
    target_module_mapping = DEFAULT_TARGETS  # type: ignore[assignment]
    execution: Execution
    _calls = 0

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.__dict__["execution"] = Execution()
        self._first = ExitStack()  # holds the first forward's context while it runs
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; transformers runs the model itself, so its first forward and its loading are watched."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not self._defers:
            end = model.register_forward_hook(self._end_of_first, always_call=True)
            self._watching = model.register_forward_pre_hook(self._begin_first), end
            model.register_load_state_dict_post_hook(self._catch_up)

    def set_plan(self, plan: Plan, forwards_per_step: int = 1) -> None:
        """
        Choose how all layers compute, now and later, see [`plans`]; what another plan has kept in memory is freed.

        Args:
            plan (`str`):
                `"auto"`, `"merged"`, `"narrow"` or `"factored"`. Layers that cannot follow (a quantised base, a rank
                below the full one, rows of a batch that differ) use the narrow plan.
            forwards_per_step (`int`):
                Forwards of an optimizer step, if gradients are accumulated: `"auto"` counts their tokens.
        """
        if plan not in PLANS:
            raise ValueError(f"`plan` must be one of {', '.join(PLANS)}; got {plan!r}.")
        self._asked = plan, forwards_per_step
        self._follow(plan, forwards_per_step)

    def _follow(self, plan: Plan, forwards_per_step: int) -> None:
        layers = svf_layers(self.model)
        room = _room(list(layers.values()))
        if not room and plan == "auto":
            logger.info("There is no memory for a merged copy of the adapted weights: SVF uses the narrow plan.")
        execution = self.execution
        execution.plan, execution.forwards, execution.room, execution.announced = plan, forwards_per_step, room, set()
        execution.batch_first = batch_first(self.model)
        self._link()
        for layer in layers.values():
            layer.execution = execution
            layer.svf_merged = layer.svf_factored = None
            layer._planned_for = (layer.base_weight,)

    def _link(self) -> None:
        """Note the modules that a batch enters by: the model, and an encoder, which generation runs on its own."""
        model: Any = self.model
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        entries = [model, model.get_encoder()] if encodes and hasattr(model, "get_encoder") else [model]
        self.execution.entries = tuple(map(weakref.ref, entries))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._link()

    def svf_memory(self) -> dict[str, dict[str, int]]:
        """
        Count the bytes that SVF adds to the base model, by module name and as `"total"`.

        The kinds are `basis`, `merged` and `factored` (both kept from the first forward that needs them), `pristine`
        (weights that `merge_adapter` has replaced) and `offsets`.
        """
        memory = {name: layer.svf_bytes() for name, layer in svf_layers(self.model).items()}
        kinds = ("basis", "merged", "pristine", "factored", "offsets")
        return memory | {"total": {kind: sum(of[kind] for of in memory.values()) for kind in kinds}}

    def train(self, mode: bool = True) -> "SVFModel":
        """Switch between training, which needs weights as bitsandbytes loads them, and evaluation."""
        for module in self.model.modules() if mode else ():
            undo_cpu_packing(module)
        return super().train(mode)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """
        Add an adapter that is a mixture of others: `z = 1 + Σ αᵢ (zᵢ - 1)`; what is left of 1 belongs to the base.

        The weights α are any finite numbers, one per adapter. An adapter that has the new name already stays as it is.

        Raises:
            `ValueError`: for an unknown adapter, a weight that isn't finite, lengths that differ, or adapters that
                share a module of `modules_to_save`.
        """
        if adapter_name in self.peft_config:
            return
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Adapter {unknown[0]!r} does not exist. There are: {', '.join(self.peft_config)}.")
        configs = [self.peft_config[name] for name in adapters]
        if not adapters or len(adapters) != len(weights) or not torch.tensor(weights).float().isfinite().all():
            raise ValueError(f"A mixture needs a finite weight per adapter, got {weights} for {adapters}.")
        for wrapper in self.modules():
            if isinstance(wrapper, ModulesToSaveWrapper) and sum(a in wrapper.modules_to_save for a in adapters) > 1:
                raise ValueError("Cannot mix adapters that target the same module with modules_to_save.")
        ranks = [config.rank for config in configs]
        layers = {n: m for n, m in svf_layers(self.model).items() if any(a in m.svf_offset for a in adapters)}
        stacks = [layer.weight_name(name) for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
        self.peft_config[adapter_name] = replace(
            configs[0],
            # by name: the union of two configs' fields may select other modules
            **selecting((name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)), stacks),
            modules_to_save=None,
            rank=None if None in ranks else max(ranks),
            fingerprint=None,
            init_weights=True,
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            mixed = layer.svf_offset[adapter_name].weight.data.view(layer.matrices, -1)  # (experts or 1, k)
            offsets = layer.named_offsets(adapters).unflatten(-1, (layer.matrices, -1))[..., : mixed.shape[-1]]
            mixed.copy_(torch.tensordot(torch.tensor(weights).to(mixed), offsets.to(mixed), dims=1))

    def _prepare_adapter_config(self, peft_config: SVFConfig, model_config: dict) -> SVFConfig:  # type: ignore[override]
        if peft_config.target_modules is None:
            named = peft_config.target_parameters
            targets = set() if named else default_targets(self.model, model_config.get("model_type"))
            peft_config.target_modules = targets  # type: ignore[assignment]
        elif peft_config.target_modules == "all-linear":
            found: Any = _maybe_include_all_linear_layers(peft_config, self.model)
            peft_config.target_modules = self._suited(found.target_modules)  # type: ignore[assignment]
        return peft_config

    def _suited(self, names: set[str]) -> set[str]:
        """Leave out of `"all-linear"` what can't be adapted, and log it."""
        places = Counter(child for module in self.model.modules() for child in module._modules.values())
        unsuited = set()
        for name in names:
            parent, target, child = _get_submodules(self.model, name)
            weight = target._parameters.get("weight")
            if isinstance(target, BaseTunerLayer) or not (weight is None or readable(weight)):
                continue  # Left out, a packed base would have next to nothing adapted: it is refused instead.
            if places[target] > 1 or self._unsuited(target, child, parent, None):
                unsuited.add(name)
        if unsuited:
            shown = ", ".join(sorted(unsuited)[:4]) + (", ..." if len(unsuited) > 4 else "")
            logger.warning(f"'all-linear' leaves out {len(unsuited)} modules that SVF can't adapt: {shown}")
        return names - unsuited

    def _create_and_replace(
        self,
        config: SVFConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, SVFLayer) and target.parameter_name == parameter_name:
            target.update_layer(adapter_name, config)
            return
        if reason := self._unsuited(target, target_name, parent, parameter_name):
            raise ValueError(f"Target module {current_key} {reason}")
        with onloaded(target):
            layer: SVFLayer = (
                Linear(target, adapter_name, config, **get_quantization_kwargs(self.model))
                if parameter_name is None
                else ParamWrapper(target, adapter_name, parameter_name, config)
            )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is active
        layer.train(target.training)
        with onloaded(target):  # PEFT moves the offset to where the weight is: with accelerate's offload it is nowhere
            self._replace_module(parent, target_name, layer, target)

    def _unsuited(self, target: nn.Module, name: str, parent: nn.Module, parameter_name: str | None) -> str | None:
        """Return why SVF can't adapt a module, if it can't."""
        if isinstance(target, BaseTunerLayer) and not isinstance(target, SVFLayer):
            return (
                "carries an adapter of another method, and SVF rescales a weight alone: merge that adapter first with "
                "`model.merge_and_unload()`, or leave the module out of `target_modules`."
            )
        if parameter_name is None and not multiplies(target):
            weight = target._parameters.get("weight")
            held = "a computed weight" if weight is None else f"{weight.dtype}, {weight.layout}".replace("torch.", "")
            return (
                f"is not supported: it is a {type(target).__name__} ({held}). SVF adapts `torch.nn.Linear` and "
                "transformers' `Conv1D` if they multiply by a `weight` of plain numbers alone, and linears that "
                "bitsandbytes, HQQ or torchao has quantised. Leave it out of `target_modules`, or load the base "
                "unquantised."
            )
        if reads_weight(self.model, parent, name):
            return (
                f"cannot be adapted: {type(parent).__name__} reads its weight without running it, so z would change "
                "nothing. Leave it out of `target_modules`, or name it in `exclude_modules`."
            )
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if target is head and self.model.config.get_text_config().tie_word_embeddings:
            return (
                "is the output head and shares its weight with the input embedding: rescaling one would change the "
                "other when merged. Leave it out, or load the model with `tie_word_embeddings=False`."
            )
        return None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in another's place. PEFT's own also copies `weight`, which a stack of experts does not have."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Offsets are float32; with `autocast_adapter_dtype=False` they take the dtype of their base weight."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in svf_layers(self.model).values():
                dtype = layer.base_weight.dtype
                if adapter_name in layer.svf_offset and dtype.is_floating_point:
                    layer.svf_offset[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Serve a mixed batch: `adapter_names` gives one adapter, or `"__base__"`, for each row."""
        names = kwargs.pop("adapter_names", None)
        self._catch_up()
        with ExitStack() as stack:
            if not torch.compiler.is_compiling():
                texts = {name: kwargs.get(name) for name in TEXTS}
                stack.enter_context(self._calling(batch_of(args, texts)))
            if names is not None:
                layers = svf_layers(self.model)
                if wrong := self._wrong_names(names, batch_of(args, kwargs)):
                    raise ValueError(wrong)
                unique = list(dict.fromkeys(names))
                offsets = {name: layer.named_offsets(unique) for name, layer in layers.items()}
                index = torch.tensor([unique.index(name) for name in names])
                stack.enter_context(active_rows(layers, offsets, index, merge=True))
                for name, module in self.named_modules():
                    if isinstance(module, AuxiliaryTrainingWrapper):
                        beams = kwargs.get("num_beams") or 1
                        repeated = list(names) if "encoder" in name else [n for n in names for _ in range(beams)]
                        hook = partial(_pass_names, names=repeated)
                        stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        self._catch_up()

    def _catch_up(self, *_: Any) -> None:
        """Fetch the bases of weights that have come since the adapter was added."""
        if self.execution.waiting:
            self.fetch_bases()

    def _wrong_names(self, names: list[str], batch: tuple[int, int | None] | None) -> str:
        """Return why `adapter_names` can't be served, in PEFT's words, or nothing."""
        layers, rows = svf_layers(self.model).values(), batch[0] if batch else len(names)
        if self.training:
            return "Cannot pass `adapter_names` when the model is in training mode."
        if unknown := sorted(set(names) - {BASE}.union(*(layer.svf_offset for layer in layers))):
            return f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}"
        if any(layer.merged for layer in layers):
            return "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        if len(names) != rows:
            return (
                "Length of `adapter_names` should be the same as the number of inputs, "
                f"but got {len(names)} and {rows} respectively."
            )
        return ""

    def _begin_first(self, *_: Any) -> None:
        self._first.enter_context(self._calling(None))

    def _end_of_first(self, *_: Any) -> None:
        for handle in self._watching:
            handle.remove()
        self._first.close()

    @contextmanager
    def _calling(self, batch: tuple[int, int | None] | None) -> Iterator[None]:
        """
        Let the layers use what one call of the `PeftModel` knows for all of its forwards.

        Without gradients it is generation or scoring, in training mode too (TRL's rollouts): one z for what follows.
        Merged weights are compared with their z all at once; on a GPU that is one wait instead of one for each layer.

        Raises:
            `ValueError`: after the call, if a parent has read the weight of an adapted layer that it didn't run.
        """
        execution = self.execution
        before = execution.generating, execution.trusted, execution.call, execution.called
        kept = [layer for layer in svf_layers(self.model).values() if layer.svf_merged is not None]
        same = bool(kept) and not execution.rows and _unchanged(kept)
        self._calls = self._calls + 1
        execution.generating, execution.trusted, execution.call = not torch.is_grad_enabled(), same, self._calls
        execution.called = None if batch is None else batch[0]
        try:
            yield
            passed_by = [layer for layer in execution.read if layer._ran < execution.call and layer.moves]
        finally:
            execution.read.clear()
            execution.generating, execution.trusted, execution.call, execution.called = before
        if passed_by:
            names = [name for name, layer in svf_layers(self.model).items() if layer in passed_by]
            raise ValueError(
                f"The weight of {names[0]} was read, but the layer didn't run ({len(names)} such layers): the module "
                "around it computes with the weight itself, so z changes nothing and gets no gradient. Leave it out "
                "of `target_modules`."
            )


def _room(layers: list[SVFLayer]) -> bool:
    """Whether a second copy of the adapted weights takes at most half of the free memory."""
    needed: dict[torch.device, int] = defaultdict(int)
    for layer in layers:
        weight = layer.base_weight
        needed[weight.device] += weight.numel() * fast(weight.new_empty(0)).element_size()
    free = {"cuda": lambda device: torch.cuda.mem_get_info(device)[0], "cpu": lambda _: virtual_memory().available}
    return all(2 * count <= free[device.type](device) for device, count in needed.items() if device.type in free)


def _unchanged(layers: list[SVFLayer]) -> bool:
    """Whether all merged weights were built from the offsets in force, with one comparison for each device."""
    pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for layer in layers:
        built, now = layer.svf_merged.offset, layer._active_offset()  # type: ignore[union-attr]
        if now is None or isinstance(now, DTensor) or (built.shape, built.device) != (now.shape, now.device):
            return False  # FSDP shards z between forwards
        pairs[now.device].append((built, now.detach()))
    return all(torch.equal(*map(torch.cat, zip(*known, strict=True))) for known in pairs.values())


def _pass_names(module: nn.Module, args: Any, kwargs: dict, names: list[str]) -> tuple[Any, dict]:
    return args, {**kwargs, "adapter_names": names}
