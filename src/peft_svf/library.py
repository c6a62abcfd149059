# SPDX-License-Identifier: Apache-2.0
"""
Experts + base model -> one model in which every row of a batch may have its own mixture of them.

The experts are ordinary PEFT adapters of the model. `activate` gives the rows of the next forwards their mixtures and
takes them away again; the weights themselves are never touched. Nothing here knows how a mixture is found.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from .config import SVFConfig
from .expert import OTHER, Expert, Mixture
from .layer import SVFLayer

Source = str | PathLike[str] | Expert
CLASSIFIER = "classifier: "  # in front of its name, so that no expert is called like it


class ExpertLibrary:
    """
    The experts of one base model.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The base model, or one with SVF adapters, each of which becomes an expert under its name. Experts are
            added to it as adapters.
        experts (`Sequence` or `Mapping[str, ...]`):
            Folders, Hub repositories or [`~expert.Expert`]s, with names of their own or as keys.
        classifier (folder, repository or [`~expert.Expert`], *optional*):
            An expert for the first pass only: it names the kind of a question. No mixture contains it.

    Raises:
        `ValueError`: if there are no experts, two have one name, a name is `"other"`, one belongs to another base
            model, or the model has adapters that cannot be mixed. The model is then as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
    ) -> None:
        given = experts.items() if isinstance(experts, Mapping) else [(None, source) for source in experts]
        loaded = [_load(source, name) for name, source in given]
        own = _own(model)
        names = [*(name for name in own if not name.startswith(CLASSIFIER)), *(expert.name for expert in loaded)]
        if not names:
            raise ValueError("There are no experts: pass experts=[...], folders or Hub repositories of SVF adapters.")
        for name in names:
            if name == OTHER:
                raise ValueError(f"No expert can be called {OTHER!r}: that name stands for the base model.")
            if names.count(name) > 1:
                raise ValueError(f"Two experts are called {name!r}: pass them as a dict with a name for each.")
        self.classifier = next((name for name in own if name.startswith(CLASSIFIER)), None)
        if classifier is not None:
            chosen = _load(classifier, None)
            self.classifier = CLASSIFIER + chosen.name
            loaded.append(Expert(self.classifier, chosen.offsets, chosen.config))
        self.names = sorted(names)
        self.model: PeftModel = model  # type: ignore[assignment]
        self._lock = threading.RLock()
        self._install(model, loaded)
        self.descriptions = {name: self.model.peft_config[name].description or "" for name in self.names}

    @contextmanager
    def activate(self, mixtures: Mixture | Sequence[Mixture]) -> Iterator[PeftModel]:
        """
        Give the model one mixture, or each row of a batch its own, while the context is open.

        Rows may be repeated side by side, as beams and returned sequences are. Other threads wait. Afterwards, also
        after an exception, the model is as it was.

        Args:
            mixtures ([`~expert.Mixture`] or a list of them):
                What to activate; a list has one for each row.

        Raises:
            `ValueError`: if a mixture names an expert that is not here, or adapters are merged or disabled.
        """
        rows = [mixtures] if isinstance(mixtures, Mixture) else list(mixtures)
        names = [*self.names, *([self.classifier] if self.classifier else [])]
        for mixture in rows:
            if unknown := sorted(set(mixture.alpha) - set(names)):
                known = ", ".join([*self.names, OTHER])
                raise ValueError(f"There is no expert {unknown[0]!r} in this library; there are {known}.")
        alpha = torch.tensor([[mixture.alpha.get(name, 0.0) for name in names] for mixture in rows])  # (B, experts)
        if len(rows) > 0 and bool((alpha == alpha[0]).all()):
            alpha = alpha[:1]  # the batch agrees
        with self._lock, ExitStack() as stack:
            for layer in self._layers:
                if layer.merged or layer.disable_adapters:
                    state = "merged: unmerge_adapter()" if layer.merged else "disabled: enable them"
                    raise ValueError(f"No mixture can be active while the model's adapters are {state} first.")
                stack.enter_context(layer.rows(_rows(layer, names, alpha)))
            yield self.model

    @property
    def _layers(self) -> list[SVFLayer]:
        return [module for module in self.model.modules() if isinstance(module, SVFLayer)]

    def _install(self, model: PreTrainedModel | PeftModel, experts: Sequence[Expert]) -> None:
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        added: list[str] = []
        try:
            for expert in experts:
                config = SVFConfig.from_peft_type(**{**expert.config, "inference_mode": True})
                if isinstance(self.model, PeftModel):
                    self.model.add_adapter(expert.name, config)
                else:
                    # not get_peft_model: it writes this model's name over that of the expert's base
                    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
                    self.model = kind(model, config, adapter_name=expert.name)
                added.append(expert.name)
                self._fill(expert)
        except BaseException:
            self._remove(model, added)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            raise
        self.model.eval()

    def _fill(self, expert: Expert) -> None:
        prefix = "base_model.model."
        layers = {
            name.removeprefix(prefix): module.svf_offset[expert.name].weight
            for name, module in self.model.named_modules()
            if isinstance(module, SVFLayer) and expert.name in module.svf_offset
        }
        for module, offset in expert.offsets.items():
            here = layers.pop(module, None)
            if here is None or here.shape != offset.shape:
                found = "no such module" if here is None else f"{here.shape[0]} directions"
                raise ValueError(
                    f"Expert {expert.name!r} has a z-vector of length {len(offset)} for {module}, but this model has "
                    f"{found} there. It was trained on {expert.base_model!r}; load the matching base."
                )
            here.data.copy_(offset)
        if layers:
            raise ValueError(f"Expert {expert.name!r} has no z-vector for {min(layers)}, which its config targets.")

    def _remove(self, model: PreTrainedModel | PeftModel, added: Sequence[str]) -> None:
        """Take half-installed experts out again, the whole tuner if the model came without one."""
        if model is self.model:
            for name in added:
                if isinstance(model, PeftModel):
                    model.delete_adapter(name)
        else:
            self.model.unload()


def _own(model: PreTrainedModel | PeftModel) -> list[str]:
    """The names of the adapters that a model comes with; refuses those that a mixture cannot hold."""
    if not isinstance(model, PeftModel):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "This model has adapters already, but is no PeftModel: pass the PeftModel that was made of it (of a "
                "pipeline: pipe.model.library.model), or load the base model anew and give them as experts=[...]."
            )
        return []
    for name, config in model.peft_config.items():
        if config.peft_type != "SVF" or config.modules_to_save or config.trainable_token_indices:
            raise ValueError(
                f"Adapter {name!r} of this model cannot be mixed: it is of PEFT type {config.peft_type.value} or "
                "trains more than z-vectors. Delete it, or load the base model without it."
            )
    return list(model.peft_config)


def _load(source: Source, name: str | None) -> Expert:
    if isinstance(source, Expert):
        return Expert(name or source.name, source.offsets, source.config)
    return Expert.load(source, name)


def _rows(layer: SVFLayer, names: Sequence[str], alpha: Tensor) -> Tensor:
    """The offsets `(B, k)` of one layer for weights `(B, experts)`; `(k,)` for one row, empty where all are 0."""
    used = [i for i, name in enumerate(names) if name in layer.svf_offset and bool(alpha[:, i].any())]
    if not used:
        return torch.zeros(0)
    table = layer.named_offsets([names[i] for i in used]).detach()  # (experts, k)
    rows = alpha[:, used].to(table) @ table
    return rows[0] if len(rows) == 1 else rows


def explicit(name: str) -> Mixture:
    """The mixture that is one expert, or the base model for `"other"`."""
    return Mixture() if name == OTHER else Mixture({name: 1.0})
