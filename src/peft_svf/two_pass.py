# SPDX-License-Identifier: Apache-2.0
"""
Prompts -> first pass -> `Mixture` per row -> second pass: Transformer² (arXiv 2501.06252, section 3.3).

`Transformer2Model.generate` holds both passes; the pipeline is a thin face on it. No key/value cache crosses the
passes: the weights differ. Between calls the model is the base model with its adapters, to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .adaptation import dispatch, few_shot
from .expert import OTHER, Expert, Mixture
from .library import ExpertLibrary, Source
from .tasks import Task

Chosen = Mixture | Mapping[str, float]


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
        self.strategy = strategy or ("classifier" if classifier is not None else "prompt")
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
                Folder or repository of the base model; default the one that the experts name.
            kwargs:
                For `AutoModelForCausalLM.from_pretrained`. The others as in [`Transformer2Model`].

        Raises:
            `ValueError`: without `model`, if the experts name none or several.
            `OSError`: if the base model cannot be loaded.
        """
        model = model or base_of(experts)
        base = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(model)
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
                One name for all prompts or one for each; `"other"` is the base model.
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
        if expert is not None:
            chosen = [expert] if isinstance(expert, str) else list(expert)
            found = [Mixture() if name == OTHER else Mixture({name: 1.0}) for name in chosen]
        elif mixture is not None:
            given = [mixture] if isinstance(mixture, (Mixture, Mapping)) else list(mixture)
            found = [m if isinstance(m, Mixture) else Mixture(dict(m)) for m in given]
        else:
            how, limit = strategy or self.strategy, self.threshold if threshold is None else threshold
            return dispatch(self.library, self.tokenizer, prompts, strategy=how, threshold=limit)
        if len(found) == 1:
            found *= len(prompts)
        if len(found) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts, but experts or mixtures for {len(found)}.")
        known = [*self.library.names, OTHER]
        for m in found:
            if unknown := [name for name in m.alpha if name not in known]:
                raise ValueError(f"There is no expert {unknown[0]!r}; there are {', '.join(known)}.")
        return found

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
                The prompts as the second pass reads them, left-padded.
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
        if input_ids is None:
            raise ValueError("generate needs input_ids of shape (batch, tokens).")
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and input_ids.shape[1] >= limit:
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens, but the model's context is {limit}: shorten it to leave "
                "room for an answer."
            )
        if prompts is None:
            prompts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        if len(prompts) != input_ids.shape[0]:
            raise ValueError(f"There are {len(prompts)} prompts for {input_ids.shape[0]} rows of input_ids.")
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
                `population`, `iterations`, `elites`, `seed`, `batch_size`, `normalize`.

        Returns:
            [`~expert.Mixture`], to be passed as `mixture=` or saved.
        """
        return few_shot(self.library, self.tokenizer, examples, task=task, **search)

    @contextmanager
    def using(self, mixture: Chosen) -> Iterator[PeftModel]:
        """Give the model one mixture while the context is open, for forwards of one's own."""
        chosen = mixture if isinstance(mixture, Mixture) else Mixture(dict(mixture))
        with self.library.activate(chosen) as model:
            yield model


def base_of(experts: Sequence[Source] | Mapping[str, Source]) -> str:
    """
    The base model that experts name.

    Raises:
        `ValueError`: if they name none, or several.
    """
    sources = experts.values() if isinstance(experts, Mapping) else experts
    loaded = [source if isinstance(source, Expert) else Expert.load(source) for source in sources]
    names = sorted({expert.base_model for expert in loaded if expert.base_model})
    if len(names) != 1:
        raise ValueError(
            f"The experts name {'no base model' if not names else 'several base models: ' + ', '.join(names)}. Write "
            'pipeline("transformer2", model="<base model>", experts=[...]).'
        )
    return names[0]
