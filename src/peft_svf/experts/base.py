# SPDX-License-Identifier: Apache-2.0
"""A base model -> the weights that an expert names, one at a time, each with its basis. Changes no model."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tuner.basis import Basis
from ..tuner.cache import content_key, fetch
from ..tuner.fingerprint import Fingerprint
from ..tuner.layer import SVFLayer
from ..tuner.weights import FLOATS, Checkpoint
from .expert import Expert


def refuse_adapters(model: nn.Module) -> None:
    """Raise `ValueError` for a model that has adapters, which would count as its own weights or be left out."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "This model has adapters already: load the base model again, or, for a library, pass the PeftModel that "
            "was made of it (of a pipeline: pipe.model.library.model)."
        )


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
        config (`Mapping[str, Any]`): That of the expert, if its stacked weights count as well.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any] = {}) -> None:
        base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
        self.name: str | None = getattr(base, "name_or_path", None) or None
        self._modules, self._parameters = dict(base.named_modules()), dict(base.named_parameters())
        self._stacked = weights_in(base, config)
        self._checkpoint = Checkpoint(base)

    def __contains__(self, name: object) -> bool:
        return name in self._stacked or isinstance(self._linear(name), (nn.Linear, Conv1D))

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight `(out, in)` or `(E, out, in)`, in the parameter's memory; refuse a packed or absent one."""
        layer, inner, weight = self._modules.get(name), self._linear(name), None
        if name in self._stacked:
            weight = self._parameters[self._stacked[name]].detach()
        elif name in self and inner.weight.dtype in FLOATS:
            plain = inner.weight.detach().T if isinstance(inner, Conv1D) else inner.weight.detach()
            weight = layer.logical_weight() if isinstance(layer, SVFLayer) else plain
        if weight is None or weight.is_meta:
            raise ValueError(
                f"{name} of {self.name}, a {type(inner).__name__}, has no linear weight in memory: load the base on "
                "the CPU, and not quantised."
            )
        return weight

    def stored(self, name: str) -> Tensor:
        """Return a weight like `[]`, but as the checkpoint stores it if loading has rounded it."""
        weight = self[name]
        if not self._checkpoint.rounds_to(weight.dtype):
            return weight
        turned = name not in self._stacked and isinstance(self._linear(name), Conv1D)
        stored = self._checkpoint.weight(self._stacked.get(name, f"{name}.weight"), weight, turned=turned)
        return weight if stored is None else stored

    def _linear(self, name: Any) -> Any:
        layer = self._modules.get(name)
        return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer

    def basis(self, name: str) -> tuple[Basis, Fingerprint]:
        """Fetch the basis of a weight from the cache, or compute it."""
        return fetch([name], self.stored)[name]

    def check_names(self, expert: Expert) -> None:
        """Raise `ValueError` if this model lacks a weight that an expert moves."""
        if missing := sorted(name for name in expert.offsets if name not in self):
            stacks = expert.config.get("target_parameters") and not self._stacked
            way_out = "stacked weights go into merged checkpoints only" if stacks else f"load {expert.base_model!r}"
            raise ValueError(
                f"{self.name or 'The model'} has no linear weight {missing[0]}, which expert {expert.name!r} moves: "
                f"{way_out}."
            )

    def check(self, expert: Expert) -> None:
        """Raise `ValueError` unless this is the expert's base; only of weights that differ a basis is looked at."""
        self.check_names(expert)
        saved, weights = expert.fingerprints, dict[str, Fingerprint]()
        for name in sorted(expert.offsets):
            path = self._stacked.get(name, name)  # as fingerprints name it
            if path in saved and content_key(self.stored(name)) != saved[path].sha256:
                weights[path] = self.basis(name)[1]
        expert.check_base(weights, self.name or "the model")
