# SPDX-License-Identifier: Apache-2.0
"""
Adapters, new or from a file <-> the SVF layers of a model: compares fingerprints, gives layers their bases, and
selects the tensors to load and to save.

`model` in class methods is what PEFT or transformers pass: the base or the `PeftModel`. Private names of transformers
were read in 5.23.0.
"""

import logging
from collections import defaultdict
from collections.abc import Set
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .basis import Basis, deviation, exact, tolerance
from .cache import content_key
from .config import SVFConfig
from .fingerprint import Fingerprint, Recorded, check
from .layer import SVFLayer, svf_layers, svf_weights
from .plans import Plan
from .rows import Execution
from .weights import FLOATS, Known, absent, bases_of, note_shared, reader, refuse_parallel

logger = logging.getLogger(__name__)
MISFIT = 0.35  # SmolLM2's weights in 4 bits are below 0.2 and in 3 bits below 0.3; another layer's lie above 0.4
LARGEST = 1e30  # An offset beyond it overflows in float32; trained ones stay below 10.
MISSING = torch.empty(0)
OURS = (".svf_offset.weight", ".svf_basis", ".svf_values")  # what keys of a file end with
PREFIX = "base_model.model."  # PEFT's, before the names of the base model's modules


def from_file(config: SVFConfig) -> bool:
    """Whether a config has the fingerprint of a saved adapter, which names the base that it belongs to."""
    return bool(config.fingerprint) and not isinstance(config.fingerprint, Recorded)


def adopt_names(model: nn.Module, config: SVFConfig) -> None:
    """
    Rename the modules of a loaded config, if a backbone's adapter comes to the model with a head or the other way.

    Their names differ by the prefix of the backbone; the weights are compared as always. A model that lacks a few of
    the modules, such as a pooler, is refused for these.
    """
    saved, prefix = config.fingerprint or {}, f"{getattr(model, 'base_model_prefix', '')}."
    names = {name.replace(".base_layer", "") for name, _ in [*model.named_modules(), *model.named_parameters()]}
    longer = {f"{prefix}{name}": entry for name, entry in saved.items()}
    shorter = {name.removeprefix(prefix): entry for name, entry in saved.items()}
    renamed = max(saved, longer, shorter, key=lambda entries: len(entries.keys() & names))
    if renamed is not saved and prefix != ".":
        config.fingerprint = renamed
        config.select_listed()


class AdapterLoader(BaseTuner):
    """
    The half of [`SVFModel`] that binds adapters to a base: their bases, fingerprints and files.

    A refused adapter leaves the model as it was.
    """

    _follow: Any
    _asked: tuple[Plan, int] | None = None  # by `set_plan`
    execution: Execution
    _unchecked: frozenset[str] = frozenset()  # adapters whose fingerprint has not been compared yet

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model is a `PeftModel` already: an adapter around it would be saved under names that no other "
                "model has. Call `model.add_adapter(name, config)` on it, or begin with `model.unload()`, or with "
                "`model.merge_and_unload()` to keep what its adapters do."
            )
        self._defers = not isinstance(peft_config, SVFConfig)  # transformers does not hand a file's tensors over
        self._before: dict[str, tuple[Any, Any]] = {}  # what refusing an adapter restores, until its file is read
        self._shipped: dict[str, tuple[str, str]] = {}  # weight -> adapter and digest of a basis that only it may use
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """
        Add an adapter: check that it belongs to this base, replace its target modules, give them their bases.

        Raises:
            `ValueError`: if the adapter's fingerprint names another base, or a target cannot be adapted. The model is
                then as it was.
        """
        config = self.peft_config[adapter_name]
        self._before[adapter_name] = (
            [(parameter, parameter.requires_grad) for parameter in model.parameters()],
            {layer: list(layer.merged_adapters) for layer in svf_layers(model).values()},
        )
        try:
            refuse_parallel(model)
            if from_file(config):
                config.list_modules()
                adopt_names(model, config)
                self._unchecked |= {adapter_name}
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            most = max(layer.directions for layer in svf_layers(model).values() if adapter_name in layer.svf_offset)
            if config.rank is not None and config.rank > most:
                logger.warning(f"rank={config.rank} is beyond all {most} singular values of any weight; all move.")
                config.rank = None
            if from_file(config) and config.save_basis and self._defers:
                self.execution.waiting = True  # until `_remap_adapter_state_dict_for_load` has read the basis
            else:
                self.fetch_bases()
        except BaseException:
            self.withdraw(adapter_name)
            raise
        if not from_file(config):
            del self._before[adapter_name]
        elif not self._defers:
            self._guard_loading(model, adapter_name, config)

    def withdraw(self, adapter_name: str) -> None:
        """Take back an adapter that is refused: the model is as it was before."""
        model: Any = self.model
        frozen, merged = self._before.pop(adapter_name)
        self._unchecked -= {adapter_name}
        remove(model, adapter_name)
        self.peft_config.pop(adapter_name, None)
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
        for layer, names in merged.items():
            if names and not layer.merged:  # PEFT unmerges before it adds an adapter
                layer.merge(adapter_names=names)
        if not self.peft_config:
            vars(model).pop("peft_config", None)
            if hasattr(model, "_hf_peft_config_loaded"):  # transformers sets it before it comes here
                model._hf_peft_config_loaded = False

    def _guard_loading(self, model: Any, adapter_name: str, config: SVFConfig) -> None:
        """
        Check the file that transformers' `load_adapter` reads next: it would load any z, and any tensor of the base.

        It calls no hook of a tuner, so the model's own method is replaced for one call.
        """
        if not hasattr(model, "_hf_peft_config_loaded"):
            return
        original, tokens = model._load_pretrained_model, config.trainable_token_indices
        token_modules = tokens if isinstance(tokens, dict) else ["embed_tokens"] if tokens else []
        saved_whole = tuple(f".{name}." for name in (*(config.modules_to_save or ()), *token_modules))

        def load(*args: Any, checkpoint_files: Any = None, state_dict: Any = None, **kwargs: Any) -> Any:
            del vars(model)["_load_pretrained_model"]
            tensors = dict(state_dict or {})
            for path in checkpoint_files or ():
                with safe_open(path, "pt") as file:  # the values of offsets, and of others the name alone
                    tensors |= {key: file.get_tensor(key) if key.endswith(OURS[0]) else None for key in file.keys()}  # noqa: SIM118
            offsets = {key: value for key, value in tensors.items() if key.endswith(OURS[0])}
            others = {key for key in tensors if not key.endswith(OURS)}
            whole = {key for key in others if any(part in f".{key}" for part in saved_whole)}
            try:
                _refuse_extra(adapter_name, others - {key for key in whole if ".base_layer." not in key})
                _checked_keys(model, config, adapter_name, offsets)
                loaded = original(*args, checkpoint_files=checkpoint_files, state_dict=state_dict, **kwargs)
            except BaseException:
                self.withdraw(adapter_name)
                raise
            del self._before[adapter_name]
            return loaded

        vars(model)["_load_pretrained_model"] = load

    def fetch_bases(self, known: Known | None = None) -> None:
        """
        Give every SVF layer without a basis its own: one of `known`, by module name, one of the cache, or a new one.

        Fingerprints of loaded adapters are compared first, and a `ValueError` for another base changes no layer.
        Weights that come later, or that `load_state_dict` replaces, get theirs in the next forward of the `PeftModel`.
        """
        config = next(iter(self.peft_config.values()))  # The first adapter of a model decides for all.
        layers: dict[str, tuple[SVFLayer, int]] = {}
        waiting = False
        for name, layer in svf_layers(self.model).items():
            needed = max((len(offset.weight) // layer.matrices for offset in layer.svf_offset.values()), default=0)
            if needed > layer.columns:
                if absent(layer):
                    waiting = True
                else:
                    layers[layer.weight_name(name)] = layer, needed
        known = known or {}
        short = {n: layer for n, (layer, k) in layers.items() if n not in known or known[n][0].Q.shape[-1] < k}
        known |= bases_of(self.model, short, config.basis_from)
        for adapter_name in [] if waiting else sorted(self._unchecked & self.peft_config.keys()):
            self.check_fingerprint(adapter_name, self.peft_config[adapter_name], known)
            self._unchecked -= {adapter_name}
        for name, (layer, needed) in layers.items():
            basis, fingerprint = known[name]
            if layer.svf_fingerprint is not None and layer.svf_fingerprint.sha256 != fingerprint.sha256:
                raise ValueError(
                    f"An adapter has brought {layer.columns} directions of {name} along, and {needed} are needed now: "
                    "those of this base would be others. Load it on a base of its own, or ship all directions (an "
                    "adapter with rank=None and save_basis=True)."
                )
            layer.svf_fingerprint = fingerprint
            Q = basis.Q if needed == basis.Q.shape[-1] else basis.Q[..., :needed].clone()
            follows = layer.base_weight.dtype == torch.bfloat16 and not config.save_basis
            if Q.dtype == torch.float32 and {"auto": follows, "bfloat16": True, "float32": False}[config.basis_dtype]:
                Q = Q.bfloat16()
            layer.set_basis(Q.to(layer.base_layer_device()), basis.S[..., :needed])
        self.execution.waiting = waiting
        note_shared(self.model, svf_layers(self.model))
        self._follow(*(self._asked or (config.plan, 1)))

    def check_fingerprint(self, adapter_name: str, config: SVFConfig, known: Known | None = None) -> None:
        """
        Raise `ValueError` if a saved adapter belongs to another base; without a fingerprint it fits any.

        `known` has bases that layers get next.
        """
        known = known or {}
        saved = {name: Fingerprint.from_json(entry) for name, entry in (config.fingerprint or {}).items()}
        layers = svf_weights(self.model)
        present = {name: layer.svf_fingerprint for name, layer in layers.items() if layer.svf_fingerprint is not None}
        for name in saved:
            if name in self._shipped and self._shipped[name][0] != adapter_name and name not in known:
                raise ValueError(
                    f"The basis of {name} came with adapter {self._shipped[name][0]!r} and cannot be compared with "
                    f"the weight here, so adapter {adapter_name!r} is not given it: load each on a base of its own, "
                    "or load both on the base they were trained on."
                )
        here = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        check(
            saved,
            present | {name: fingerprint for name, (_, fingerprint) in known.items()},
            absent=[name for name in saved if name not in layers],
            adapter=adapter_name,
            here=here + (" (quantised)" if getattr(self.model, "is_quantized", False) else ""),
            there=config.base_model_name_or_path,
        )

    def _verified_bases(self, adapter_name: str, config: SVFConfig, shipped: dict[str, dict[str, Tensor]]) -> Known:
        """
        Verify the bases that a file ships, and return those that layers still need.

        A basis counts if it fits the weight up to rounding, as in the cache. If the weights here are rounded relative
        to the adapter's (quantised, or in another dtype), it may be off by `MISFIT`; then only this adapter uses it.
        """
        layers = svf_weights(self.model)
        read = reader(self.model, layers, next(iter(self.peft_config.values())).basis_from)
        known: Known = {}
        for name, tensors in shipped.items():
            layer, entry = layers.get(name), (config.fingerprint or {}).get(name)
            if layer is None or entry is None or adapter_name not in layer.svf_offset or absent(layer):
                continue
            Q, S = (tensors.get(kind, MISSING) for kind in ("svf_basis", "svf_values"))
            _check_shape(adapter_name, name, layer, Q, S)
            digest = content_key(Q) + content_key(S)
            if name in self._shipped and self._shipped[name][1] == digest:
                self._shipped[name] = adapter_name, digest
                continue
            if layer.svf_basis is not None:  # A later adapter uses the basis that is there, or is refused.
                continue
            fingerprint, apart = Fingerprint.from_json(entry), float("inf")
            if getattr(layer.quantization_backend, "supports_merge", True):
                values = exact(read(name))
                apart = deviation(values, Q.to(values.device), S.to(values.device))
                if apart > tolerance(torch.float32) and content_key(values) == fingerprint.sha256:
                    if apart <= 4 * torch.finfo(Q.dtype).eps:
                        continue  # It was saved in fewer digits than the one that this weight gives.
                    apart = float("inf")
                if not apart <= MISFIT:
                    raise ValueError(
                        f"Adapter {adapter_name!r} does not belong to this base model: the basis that it has brought "
                        f"along for {name} does not fit the weight here (distance {apart:.2g}; 4 bits make 0.2, at "
                        f"most {MISFIT:g} is accepted). Load {config.base_model_name_or_path!r}."
                    )
            if apart > tolerance(torch.float32):
                self._shipped[name] = adapter_name, digest
            known[name] = Basis(layer.side, Q, S), fingerprint
        return known

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SVFConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """
        Select the offsets of one adapter by visiting the layers: no adapter's name can be mistaken for a module's.

        PEFT saves the config next, so it gets the fingerprint of the base here.
        """
        key, prefix = f"svf_offset.{adapter_name}.weight", PREFIX if isinstance(model, PeftModel) else ""
        tensors, fingerprint = {}, Recorded()
        for name, layer in svf_layers(model).items():
            if adapter_name not in layer.svf_offset:
                continue
            offset = state_dict.get(f"{prefix}{name}.{key}")
            if offset is None or offset.is_meta:  # accelerate offloads it
                offset = layer.svf_offset[adapter_name].read().detach()
            stored = name if layer.parameter_name else layer.weight_name(name)
            tensors[f"{prefix}{stored}.{key}"] = offset.full_tensor() if isinstance(offset, DTensor) else offset
            if layer.svf_fingerprint is None or layer.svf_basis is None or layer.svf_values is None:
                continue
            fingerprint[layer.weight_name(name)] = layer.svf_fingerprint.to_json()
            if config.save_basis:
                for kind in ("svf_basis", "svf_values"):
                    tensors[f"{prefix}{layer.weight_name(name)}.{kind}"] = getattr(layer, kind).contiguous()
        config.fingerprint = fingerprint or config.fingerprint
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SVFConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map the keys of a file to the model's, give the layers the bases that it ships, and refuse the rest."""
        tuner: Any = model.base_model if isinstance(model, PeftModel) else None
        if not config.fingerprint:
            logger.warning(
                f"Adapter {adapter_name!r} has no fingerprint: whether it belongs to this base model is not checked."
            )
        try:
            shipped: dict[str, dict[str, Tensor]] = defaultdict(dict)
            for key in [key for key in state_dict if key.endswith(OURS[1:])]:
                name, _, kind = key.removeprefix(PREFIX).rpartition(".")
                shipped[name][kind] = state_dict.pop(key)
            renamed = _checked_keys(model, config, adapter_name, state_dict)
            if tuner is not None and (shipped or tuner.execution.waiting):
                tuner.fetch_bases(tuner._verified_bases(adapter_name, config, shipped))
        except ValueError:
            if tuner is not None and adapter_name in tuner._before:  # An adapter that trains keeps what it has.
                tuner.withdraw(adapter_name)
            raise
        if tuner is not None:
            tuner._before.pop(adapter_name, None)
        return {renamed.get(key, key): value for key, value in state_dict.items()}


def _checked_keys(
    model: nn.Module, config: SVFConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, str]:
    """Map the keys of offsets, with or without PEFT's prefix or the backbone's, to the model's; refuse others."""
    base, prefix = (model.get_base_model(), PREFIX) if isinstance(model, PeftModel) else (model, "")
    backbone = f"{getattr(base, 'base_model_prefix', '')}."
    renamed = {}
    for name, layer in svf_layers(model).items():
        if adapter_name not in layer.svf_offset:
            continue
        names = (name, layer.weight_name(name), f"{backbone}{name}", name.removeprefix(backbone))
        keys = (f"{start}{other}.svf_offset.weight" for other in names for start in (PREFIX, ""))
        if key := next((key for key in keys if key in state_dict), None):
            _check_offset(state_dict[key], len(layer.svf_offset[adapter_name].weight), name, adapter_name, config)
            renamed[key] = f"{prefix}{name}.svf_offset.{adapter_name}.weight"
    trained = {  # modules of `modules_to_save` and rows of `trainable_token_indices`
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }
    _refuse_extra(adapter_name, state_dict.keys() - renamed.keys() - trained)
    return renamed


def _check_shape(adapter_name: str, name: str, layer: SVFLayer, Q: Tensor, S: Tensor) -> None:
    """Raise `ValueError` if a basis from a file has the wrong shape for a layer, or fewer columns than z moves."""
    lead = tuple(layer.base_weight.shape[:-2])
    k = len(layer.svf_offset[adapter_name].weight) // layer.matrices
    shapes = (*lead, layer.directions), (*lead, *Q.shape[-1:])
    if (Q.shape[:-1], S.shape) != shapes or not (k <= Q.shape[-1] <= layer.directions and Q.is_floating_point()):
        raise ValueError(
            f"Adapter {adapter_name!r} has brought along a basis of shape {tuple(Q.shape)} for {name}, which does not "
            f"belong to a weight of {layer.out_features} x {layer.in_features} and {k} directions: its files are of "
            "different experts. Fetch both again."
        )


def _check_offset(offset: Tensor, expected: int, name: str, adapter_name: str, config: SVFConfig) -> None:
    """Raise `ValueError` for a z-vector of another length, of whole numbers, or with entries that aren't finite."""
    if offset.shape != (expected,) or offset.dtype not in FLOATS:
        reason = (
            f"but the basis there has {expected} directions, whose multipliers are floating point numbers. It was "
            f"trained on {config.base_model_name_or_path!r} with rank={config.rank}; load the matching base."
        )
    elif bad := int((~(offset.abs() < LARGEST)).sum()):  # NaN compares as false.
        reason = (
            f"of which {bad} entries are NaN, infinite or beyond {LARGEST:g}: the file is damaged or its training "
            "diverged. Use an earlier checkpoint."
        )
    else:
        return
    found = f"a z-vector for {name} of shape {tuple(offset.shape)} and {offset.dtype}"
    raise ValueError(f"Adapter {adapter_name!r} has {found}, {reason}")


def _refuse_extra(adapter_name: str, keys: Set[str]) -> None:
    """Raise `ValueError` for tensors of a file that aren't an adapter's."""
    if keys:
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise ValueError(
            f"Adapter {adapter_name!r} holds {min(keys)}{more}, which isn't a z-vector of a module it adapts: loading "
            "it would overwrite the base model. An adapter brings z-vectors and what its config lists in "
            "`modules_to_save` and `trainable_token_indices`; a resized embedding belongs into `modules_to_save`."
        )


def remove(model: nn.Module, adapter_name: str) -> None:
    """Drop an adapter, and the layers and wrappers that are left without any."""
    for name, module in reversed([*model.named_modules()]):  # wrappers of parameters are nested
        inner: Any = None
        if isinstance(module, SVFLayer):
            if adapter_name in module.svf_offset:
                del module.svf_offset[adapter_name]
            inner = None if len(module.svf_offset) else module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, [other for other in module.active_adapters if other != adapter_name])
            inner = None if module._adapters else module.unload_and_optionally_merge_module(False, False, None)
        if inner is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, inner)
