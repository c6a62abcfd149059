# SPDX-License-Identifier: Apache-2.0
"""
Prompts -> first pass -> `Mixture` per row -> second pass: Transformer² (arXiv 2501.06252, section 3.3).

`Transformer2Model.generate` holds both passes; the pipeline is a thin face on it. No key/value cache crosses the
passes: the weights differ. Between calls the model is the base model with its adapters, to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .adaptation import check_strategy, dispatch, few_shot
from .expert import OTHER, Expert, Mixture
from .library import ExpertLibrary, Source, explicit
from .tasks import Task

Chosen = Mixture | Mapping[str, float]
TOKENIZER_KWARGS = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "force_download")


class Transformer2Model:
    """
    A model that first finds out which expert a prompt needs and then answers with it.

    Everything else is the wrapped `PeftModel`'s: `config`, `device`, `generation_config`, `to`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The base model, or one with SVF adapters.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        experts (`Sequence` or `Mapping[str, ...]`):
            Folders, Hub repositories or [`~expert.Expert`]s; see [`~library.ExpertLibrary`].
        classifier (folder, repository or [`~expert.Expert`], *optional*):
            An expert trained to name the kind of a question, for the first pass.
        strategy (`str`, *optional*):
            `"prompt"` or `"classifier"`; default `"classifier"` where there is one.
        threshold (`float`):
            Below this confidence of the first pass the base model answers.

    Raises:
        `ValueError`: for what [`~library.ExpertLibrary`] refuses, or `"classifier"` without a classifier.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        strategy: str | None = None,
        threshold: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.library = ExpertLibrary(model, experts, classifier)
        self.strategy = strategy or ("classifier" if self.library.classifier else "prompt")
        check_strategy(self.library, self.strategy)
        self.threshold = threshold

    @classmethod
    def from_pretrained(
        cls,
        model: str | None,
        experts: Sequence[Source] | Mapping[str, Source],
        *,
        classifier: Source | None = None,
        strategy: str | None = None,
        threshold: float = 0.0,
        **kwargs: Any,
    ) -> "Transformer2Model":
        """
        Load base model, tokenizer and experts.

        Args:
            model (`str`, *optional*):
                Folder or repository of the base model; default the one that the experts name, in their revision.
            kwargs:
                For `AutoModelForCausalLM.from_pretrained`, some for the tokenizer too: `revision`, `token`,
                `trust_remote_code`, `cache_dir`. The others as in [`Transformer2Model`].

        Raises:
            `ValueError`: without `model`, if the experts name none or several.
            `OSError`: if the base model cannot be loaded.
        """
        if model is None:
            model, revision = base_of(experts)
            kwargs = {"revision": revision, **kwargs} if revision else kwargs
        base = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(model, **{k: kwargs[k] for k in TOKENIZER_KWARGS if k in kwargs})
        return cls(base, tokenizer, experts, classifier, strategy, threshold)

    def __getattr__(self, name: str) -> Any:
        if name == "library":  # not set yet: asking it for the model would never end
            raise AttributeError(name)
        return getattr(self.library.model, name)

    def first_pass(
        self,
        prompts: Sequence[str | list[dict[str, Any]]],
        *,
        expert: str | Sequence[str] | None = None,
        mixture: Chosen | Sequence[Chosen] | None = None,
        strategy: str | None = None,
        threshold: float | None = None,
    ) -> list[Mixture]:
        """
        Find the mixture of each prompt; an explicit `expert` or `mixture` is taken as it is.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Texts or chats.
            expert (`str` or `Sequence[str]`, *optional*):
                One name for all prompts or a list with one for each; `"other"` is the base model.
            mixture ([`~expert.Mixture`], `dict[str, float]` or a sequence of them, *optional*):
                The same with mixtures.
            strategy, threshold:
                Instead of the model's own.

        Returns:
            `list[Mixture]`, one per prompt.

        Raises:
            `ValueError`: if both are given, a name is unknown, or there is not one for each prompt.
        """
        if expert is not None and mixture is not None:
            raise ValueError("Give an expert or a mixture, not both.")
        given = mixture if expert is None else expert
        if given is None:
            how, limit = strategy or self.strategy, self.threshold if threshold is None else threshold
            return dispatch(self.library, self.tokenizer, prompts, strategy=how, threshold=limit)
        found = _each(given, len(prompts))
        if len(found) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts, but experts or mixtures for {len(found)}.")
        known = [*self.library.names, OTHER]
        for m in found:
            if unknown := [name for name in m.alpha if name not in known]:
                raise ValueError(f"There is no expert {unknown[0]!r}; there are {', '.join(known)}.")
        certain = {m.choice: {name: float(name == m.choice) for name in known} for m in found}
        return [replace(m, probabilities=m.probabilities or certain[m.choice]) for m in found]

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        prompts: Sequence[str | list[dict[str, Any]]] | None = None,
        expert: str | Sequence[str] | None = None,
        mixture: Chosen | Sequence[Chosen] | None = None,
        strategy: str | None = None,
        threshold: float | None = None,
        return_dispatch: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Run both passes: find a mixture for each row, then generate with it.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, tokens)`):
                The prompts as the second pass reads them, left-padded. Without them an answer to nothing is generated,
                as `generate` does; then the expert or mixture has to be given.
            prompts (`Sequence`, *optional*):
                The same as texts or chats, for the first pass; default `input_ids`, decoded.
            expert, mixture, strategy, threshold:
                As in [`Transformer2Model.first_pass`].
            return_dispatch (`bool`):
                Return the mixtures as well.
            kwargs:
                For the second pass: `attention_mask` and whatever `generate` takes, except a key/value cache.

        Returns:
            What `generate` returns; with `return_dispatch` a tuple of that and a `list[Mixture]`.

        Raises:
            `ValueError`: if a prompt fills the model's context, or a cache is passed.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError("A key/value cache holds the activations of other weights: pass input_ids alone.")
        if input_ids is None and prompts is None and expert is None and mixture is None:
            raise ValueError("generate needs input_ids of shape (batch, tokens).")
        rows, length = (1, 0) if input_ids is None else input_ids.shape
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise ValueError(
                f"The prompt has {length} tokens, but the model's context is {limit}: shorten it to leave "
                "room for an answer."
            )
        if prompts is None:
            prompts = [""] if input_ids is None else self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        if len(prompts) != rows:
            raise ValueError(f"There are {len(prompts)} prompts for {rows} rows of input_ids.")
        mixtures = self.first_pass(prompts, expert=expert, mixture=mixture, strategy=strategy, threshold=threshold)
        with self.library.activate(mixtures) as model, torch.no_grad():
            output = model.generate(input_ids=input_ids, **kwargs)
        return (output, mixtures) if return_dispatch else output

    def adapt(self, examples: Sequence[Mapping[str, Any]], task: Task | None = None, **search: Any) -> Mixture:
        """
        Find a mixture for a kind of question from a few solved examples; see [`~adaptation.few_shot`].

        Args:
            examples (`Sequence[Mapping]`):
                `{"prompt", "answer"}` or `{"prompt", "choices", "label"}`; prompts are texts or chats.
            task ([`~tasks.Task`], *optional*):
                Checks generated answers.
            search:
                `population`, `iterations`, `elites`, `seed`, `batch_size`, `normalize`, and arguments of `generate`.

        Returns:
            [`~expert.Mixture`], to be passed as `mixture=` or saved.
        """
        return few_shot(self.library, self.tokenizer, examples, task=task, **search)

    @contextmanager
    def using(self, mixture: Chosen) -> Iterator[PeftModel]:
        """Give the model one mixture while the context is open, for forwards of one's own."""
        with self.library.activate(_each(mixture, 1)) as model:
            yield model


def _each(given: str | Chosen | Sequence[str | Chosen], count: int) -> list[Mixture]:
    """The mixtures of `count` prompts, of what was given for all of them or as a list."""
    each = [given] * count if isinstance(given, (str, Mixture, Mapping)) else given
    mixtures = (explicit(g) if isinstance(g, str) else g if isinstance(g, Mixture) else Mixture(dict(g)) for g in each)
    return list(mixtures)


def base_of(experts: Sequence[Source] | Mapping[str, Source]) -> tuple[str, str | None]:
    """
    The base model that experts name, and its revision where they name one.

    Raises:
        `ValueError`: if they name none, or several.
    """
    sources = experts.values() if isinstance(experts, Mapping) else experts
    loaded = [source if isinstance(source, Expert) else Expert.load(source) for source in sources]
    names = sorted({expert.base_model for expert in loaded if expert.base_model})
    revisions = sorted({str(expert.config["revision"]) for expert in loaded if expert.config.get("revision")})
    if len(names) != 1 or len(revisions) > 1:
        named = ", ".join([*names, *(f"revision {revision}" for revision in revisions)])
        raise ValueError(
            f"The experts name {'several base models: ' + named if names else 'no base model'}. Write "
            'pipeline("transformer2", model="<base model>", experts=[...]).'
        )
    return names[0], revisions[0] if revisions else None
