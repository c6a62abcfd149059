# SPDX-License-Identifier: Apache-2.0
"""A base model -> the weights that an expert names, one at a time, each with its basis. Changes no model."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tuner.basis import Basis
from ..tuner.cache import content_key, fetch
from ..tuner.fingerprint import Fingerprint, check
from ..tuner.layer import SVFLayer
from ..tuner.weights import FLOATS, NARROW, Checkpoint
from .expert import Expert


def weights_in(model: nn.Module, config: Mapping[str, Any]) -> dict[str, str]:
    """Map the names of an expert's stacked offsets to the parameters: PEFT wraps them in order, the last outermost."""
    targets = tuple(f".{target}" for target in config.get("target_parameters") or ())
    names: dict[str, str] = {}
    for path, module in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules():
        if targets and not isinstance(module, BaseTunerLayer):
            path = path.replace(".base_layer", "")
            weights = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            chosen = [weight for weight in weights if f".{weight}".endswith(targets)]
            names |= {path + depth * ".base_layer": weight for depth, weight in enumerate(reversed(chosen))}
    return names


class BaseWeights:
    """
    The weights of a base model by the names that experts give them.

    Args:
        model (`torch.nn.Module`): The base model; of a `PeftModel` its base, with adapters left aside.
        config (`Mapping[str, Any]`): That of the expert, which names stacked weights.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any] = {}) -> None:
        base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
        self.name: str | None = getattr(base, "name_or_path", None) or None
        self._modules, self._parameters = dict(base.named_modules()), dict(base.named_parameters())
        self._stacked = weights_in(base, config)
        self._checkpoint = Checkpoint(base)

    def __contains__(self, name: object) -> bool:
        return name in self._stacked or name in self._modules

    def path(self, name: str) -> str:
        """What fingerprints call a weight: its module, or of a stacked weight its parameter."""
        return self._stacked.get(name, name)

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight `(out, in)` or `(E, out, in)`, in the parameter's memory; refuse a packed or absent one."""
        layer, inner = self._modules.get(name), self._linear(name)
        if name in self._stacked:
            weight = self._parameters[self._stacked[name]].detach()
        elif not isinstance(inner, (nn.Linear, Conv1D)) or inner.weight.dtype not in FLOATS:
            raise ValueError(f"{name} of {self.name} is a {type(inner).__name__}: pass the base that isn't quantised.")
        elif isinstance(layer, SVFLayer):
            weight = layer.logical_weight()
        else:
            weight = inner.weight.detach().T if isinstance(inner, Conv1D) else inner.weight.detach()
        if weight.is_meta:
            raise ValueError(f"{name} is offloaded: load the model on the CPU, without `device_map`.")
        return weight

    def stored(self, name: str) -> Tensor:
        """Return a weight like `[]`, but as the checkpoint stores it if loading has rounded it."""
        weight = self[name]
        if weight.dtype not in NARROW:
            return weight
        turned = name not in self._stacked and isinstance(self._linear(name), Conv1D)
        parameter = self._stacked.get(name, f"{name}.weight")
        stored = self._checkpoint.weight(parameter, weight.T if turned else weight)
        return weight if stored is None else stored.T if turned else stored

    def _linear(self, name: str) -> Any:
        layer = self._modules.get(name)
        return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer

    def bases(self, names: Iterable[str]) -> dict[str, tuple[Basis, Fingerprint]]:
        """Fetch the bases of weights from the cache, or compute them."""
        return fetch(names, self.stored)

    def check(self, expert: Expert) -> None:
        """Raise `ValueError` unless this is the expert's base; only of weights that differ a basis is looked at."""
        if missing := sorted(name for name in expert.offsets if name not in self):
            raise ValueError(
                f"{self.name or 'The model'} has no {missing[0]}, which expert {expert.name!r} moves: load its base, "
                f"{expert.base_model!r}."
            )
        saved = {name: Fingerprint.from_json(f) for name, f in (expert.config.get("fingerprint") or {}).items()}
        others = [
            name
            for name in sorted(expert.offsets)
            if (path := self.path(name)) in saved and content_key(self.stored(name)) != saved[path].sha256
        ]
        own = {self.path(name): self.bases([name])[name][1] for name in others}
        names: Any = {"adapter": expert.name, "here": self.name or "the model", "there": expert.base_model}
        check(saved, own, absent=[], **names)
