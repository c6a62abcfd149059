# SPDX-License-Identifier: Apache-2.0
"""
Prompts -> first pass -> `Mixture` per row -> second pass: Transformer² (arXiv 2501.06252, section 3.3).

`Transformer2Model.generate` holds both passes; the pipeline is a thin face on it. No key/value cache crosses the
passes: the weights differ. Between calls the model is the base model with its adapters, to the bit.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .adaptation.few_shot import few_shot
from .adaptation.first_pass import check_strategy, dispatch
from .evaluation import CACHES, context_of
from .experts.expert import OTHER, Expert, Mixture, SavedExpert
from .experts.library import ExpertLibrary, Source, no_expert
from .tasks import Task

logger = logging.getLogger(__name__)
Chosen = str | Mixture | Mapping[str, float]  # a name is of an expert or of a mixture in the library
# New tokens from which on merged weights pay: on SmolLM2-135M, one core, making them takes 0.43-0.56 s and saves 23 ms
# of 71 a token.
MERGE_FROM = 32
TOKENIZER_KWARGS = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "force_download")


class Transformer2Model:
    """
    A model that first finds out which expert a prompt needs and then answers with it.

    Everything else is the wrapped `PeftModel`'s: `config`, `device`, `generation_config`, `to`.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The base model, or one with SVF adapters.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Its tokenizer, or the processor of a model that sees images. The first pass reads text alone.
        experts (`Sequence` or `Mapping[str, ...]`):
            Folders, Hub repositories or [`Expert`]s; see [`ExpertLibrary`].
        classifier (folder, repository or [`Expert`], *optional*):
            An expert trained to name the kind of a question, for the first pass.
        strategy (`str`, *optional*):
            `"prompt"`, `"classifier"` or `"probe"`; default the last of them that there is something for.
        threshold (`float`):
            Below this confidence of the first pass the base model answers.
        limit_bytes (`int`, *optional*):
            Memory for z-vectors; experts that were used longest ago make room.
        dispatch_kwargs (`dict`, *optional*):
            For [`dispatch`]: `probe`, `read`, `temperature`, `fallback`, `soft`, `calibrate`.

    Raises:
        `ValueError`: for what [`ExpertLibrary`] refuses, a strategy without its classifier or probe, or a
            model that is wrapped by `torch.compile`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        strategy: str | None = None,
        threshold: float = 0.0,
        limit_bytes: int | None = None,
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "A model that torch.compile has wrapped hides its modules from the experts: compile it in place, "
                "model.compile(), before or after."
            )
        self.processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
        self.tokenizer: PreTrainedTokenizerBase = tokenizer if self.processor is None else self.processor.tokenizer
        self.library = ExpertLibrary(model, experts, classifier, limit_bytes)
        self.dispatch_kwargs = dict(dispatch_kwargs or {})
        probe = self.dispatch_kwargs.get("probe")
        self.strategy = strategy or ("probe" if probe else "classifier" if self.library.classifier else "prompt")
        check_strategy(self.library, self.strategy, probe)
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
        limit_bytes: int | None = None,
        dispatch_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> "Transformer2Model":
        """
        Load base model, tokenizer (for a model that sees images its processor) and experts.

        Args:
            model (`str`, *optional*):
                Folder or repository of the base model; default the one that the experts name, in their revision.
            kwargs:
                For the model's `from_pretrained`: `dtype`, `device_map`, ...; some for the tokenizer too: `revision`,
                `token`, `trust_remote_code`, `cache_dir`. The others as in [`Transformer2Model`].

        Raises:
            `ValueError`: without `model`, if the experts name none or several.
            `OSError`: if the base model cannot be loaded.
        """
        if model is None:
            model, revision = base_of(experts)
            kwargs = {"revision": revision, **kwargs} if revision else kwargs
        known = {key: kwargs[key] for key in TOKENIZER_KWARGS if key in kwargs}
        sees = type(AutoConfig.from_pretrained(model, **known)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        base = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(model, **kwargs)
        tokenizer = (AutoProcessor if sees else AutoTokenizer).from_pretrained(model, **known)
        return cls(base, tokenizer, experts, classifier, strategy, threshold, limit_bytes, dispatch_kwargs)

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
        dispatch_kwargs: Mapping[str, Any] | None = None,
        log: bool = True,
    ) -> list[Mixture]:
        """
        Find the mixture of each prompt; an explicit `expert` or `mixture` is taken as it is.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Texts or chats.
            expert (`str` or `Sequence[str]`, *optional*):
                One name for all prompts or a list with one for each; `"other"` is the base model.
            mixture ([`Mixture`], `dict[str, float]`, `str` or a sequence of them, *optional*):
                The same with mixtures, or names of mixtures in the library.
            strategy, threshold, dispatch_kwargs:
                Instead of the model's own.
            log (`bool`):
                Whether decisions are logged: not by whoever hands them to `generate`, which logs what it is given.

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
            settings = {**self.dispatch_kwargs, **(dispatch_kwargs or {})}
            if mark := getattr(self.processor, "image_token", None):  # the first pass reads no images
                prompts = [prompt.replace(mark, "") if isinstance(prompt, str) else prompt for prompt in prompts]
            found = dispatch(self.library, self.tokenizer, prompts, strategy=how, threshold=limit, **settings)
        else:
            found = _each(self.library, given, len(prompts))
            if len(found) != len(prompts):
                raise ValueError(f"There are {len(prompts)} prompts, but experts or mixtures for {len(found)}.")
            known = self._known(found)
            certain = {m.choice: {name: float(name == m.choice) for name in known} for m in found}
            found = [replace(m, probabilities=m.probabilities or certain[m.choice]) for m in found]
        if log:
            for each in found:
                logger.info(f"{each.strategy}: {each.record()}")
        return found

    def _known(self, mixtures: Sequence[Mixture]) -> list[str]:
        """The names of the experts and `"other"`; a `ValueError` where a mixture has another."""
        known = [*self.library.names, OTHER]
        for name in (name for mixture in mixtures for name in mixture.alpha if name not in known):
            raise ValueError(no_expert(name, self.library.choices))
        return known

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the wrapped model would write an adapter with z = 1 and lose the experts."""
        raise ValueError(
            "A Transformer2Model is saved by its experts, which name their base model: "
            "model.library.expert(name).save(folder) for each name in model.library.names. "
            "PeftModel.from_pretrained(base, folder).push_to_hub(...) shares one."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refuse as `save_pretrained` does."""
        self.save_pretrained()

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        prompts: Sequence[str | list[dict[str, Any]]] | None = None,
        expert: str | Sequence[str] | None = None,
        mixture: Chosen | Sequence[Chosen] | None = None,
        strategy: str | None = None,
        threshold: float | None = None,
        dispatch_kwargs: Mapping[str, Any] | None = None,
        return_dispatch: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Run both passes: find a mixture for each row, then generate with it.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, tokens)`):
                The prompts as the second pass reads them, left-padded. Without them an answer to nothing is generated,
                as `generate` does; then the expert or mixture has to be given, as with `inputs_embeds` alone.
            inputs (`torch.Tensor` of shape `(batch, tokens)`):
                The same under transformers' other name.
            prompts (`Sequence`, *optional*):
                The same as texts or chats, for the first pass; default `input_ids`, decoded.
            expert, mixture, strategy, threshold, dispatch_kwargs:
                As in [`Transformer2Model.first_pass`].
            return_dispatch (`bool`):
                Return the mixtures as well.
            kwargs:
                For the second pass: `attention_mask`, `pixel_values` and whatever `generate` takes, except a key/value
                cache. Where all rows have one mixture and many tokens are to come, it runs on merged weights.

        Returns:
            What `generate` returns; with `return_dispatch` a tuple of that and a `list[Mixture]`.

        Raises:
            `ValueError`: if a prompt fills the model's context, a cache is passed, or experts that change how images
                are seen differ in a batch with images.
            `TypeError`: for prompts that are no tensor.
        """
        if any(kwargs.get(name) is not None for name in CACHES):
            raise ValueError("A key/value cache holds the activations of other weights: pass input_ids alone.")
        if input_ids is not None and inputs is not None:
            raise ValueError("Give input_ids or inputs, not both: they are the same.")
        input_ids = inputs if input_ids is None else input_ids
        _check_ids(input_ids)
        states = kwargs.get("inputs_embeds")
        if input_ids is None and prompts is None and expert is None and mixture is None:
            if states is not None:
                raise ValueError("inputs_embeds cannot be read by a first pass: give prompts=, expert= or mixture=.")
            raise ValueError("generate needs input_ids of shape (batch, tokens).")
        read = states if input_ids is None else input_ids
        rows, length = (1, 0) if read is None else read.shape[:2]
        limit = context_of(self.library.model)
        if limit is not None and length >= limit:
            raise ValueError(
                f"The prompt has {length} tokens, but the model's context is {limit}: shorten it to leave "
                "room for an answer."
            )
        if prompts is None:
            prompts = (
                [""] * rows if input_ids is None else self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            )
        if len(prompts) != rows:
            raise ValueError(f"There are {len(prompts)} prompts for {rows} rows of input_ids.")
        merge = self._new_tokens(length, kwargs) >= MERGE_FROM
        with self.library.lock:
            mixtures = self.first_pass(
                prompts,
                expert=expert,
                mixture=mixture,
                strategy=strategy,
                threshold=threshold,
                dispatch_kwargs=dispatch_kwargs,
            )
            if kwargs.get("pixel_values") is not None:
                self._check_tower(mixtures)
            with self.library.activate(mixtures, merge) as model, torch.no_grad():
                output = model.generate(input_ids=input_ids, **kwargs)
        return (output, mixtures) if return_dispatch else output

    def _check_tower(self, mixtures: Sequence[Mixture]) -> None:
        """Refuse a z for each row where a batch is one of images or patches: they are not as many for each prompt."""
        if all(mixture.alpha == mixtures[0].alpha for mixture in mixtures):
            return
        base = self.get_base_model()
        rowwise = {*base.get_decoder().modules(), base.get_output_embeddings()}
        if seeing := [name for name, layer in self.library.layers().items() if layer not in rowwise]:
            raise ValueError(
                f"Experts move {seeing[0]}, which reads the images of a batch and knows nothing of its rows: give all "
                "rows one expert or mixture, or take batches of one (batch_size=1)."
            )

    def _new_tokens(self, length: int, kwargs: Mapping[str, Any]) -> int:
        """How many tokens `generate` may add to prompts of this length, for all that is said of it."""
        for settings in (kwargs, vars(kwargs.get("generation_config") or self.generation_config)):
            if settings.get("max_new_tokens") is not None:
                return settings["max_new_tokens"]
            if settings.get("max_length") is not None:
                return settings["max_length"] - length
        return 20  # transformers' own default

    def adapt(self, examples: Sequence[Mapping[str, Any]], task: Task | None = None, **search: Any) -> Mixture:
        """
        Find a mixture for a kind of question from a few solved examples; see [`few_shot`].

        Args:
            examples (`Sequence[Mapping]`):
                `{"prompt", "answer"}` or `{"prompt", "choices", "label"}`; prompts are texts or chats.
            task ([`Task`], *optional*):
                Checks generated answers.
            search:
                The other arguments of [`few_shot`].

        Returns:
            [`Mixture`], to be passed as `mixture=`, by its `name` too, or saved.
        """
        return few_shot(self.library, self.tokenizer, examples, task=task, **search)

    @contextmanager
    def using(self, mixture: Chosen) -> Iterator[PeftModel]:
        """Give the model one mixture while the context is open, for forwards of one's own, on merged weights."""
        mixtures = _each(self.library, mixture, 1)
        self._known(mixtures)
        with self.library.activate(mixtures, merge=True) as model:
            yield model


def _each(library: ExpertLibrary, given: Chosen | Sequence[Chosen], count: int) -> list[Mixture]:
    """The mixtures of `count` prompts, of what was given for all of them or as a list."""
    each = [given] * count if isinstance(given, (str, Mixture, Mapping)) else given
    named = (library.mixture(g) if isinstance(g, str) else g for g in each)
    return [g if isinstance(g, Mixture) else Mixture(dict(g)) for g in named]


def _check_ids(ids: Any) -> None:
    """Refuse what is no batch of token ids."""
    if isinstance(ids, Mapping):
        raise TypeError("generate takes a tokenizer's output by its names: model.generate(**inputs).")
    if ids is not None and not isinstance(ids, Tensor):
        raise TypeError(
            f"input_ids is a torch.Tensor of shape (batch, tokens), got a {type(ids).__name__}: "
            'tokenizer(texts, return_tensors="pt", padding=True), or torch.tensor(ids) of rows of one length.'
        )
    if ids is not None and ids.dim() != 2:
        raise ValueError(f"input_ids has shape (batch, tokens), got {tuple(ids.shape)}: ids[None] is a batch of one.")


def base_of(experts: Sequence[Source] | Mapping[str, Source]) -> tuple[str, str | None]:
    """
    The base model that experts name, and its revision where they name one.

    Raises:
        `ValueError`: if they name none, or several.
    """
    sources = experts.values() if isinstance(experts, Mapping) else experts
    configs = [(s if isinstance(s, (Expert, SavedExpert)) else SavedExpert.find(s)).config for s in sources]
    names = sorted({config["base_model_name_or_path"] for config in configs if config.get("base_model_name_or_path")})
    revisions = sorted({str(config["revision"]) for config in configs if config.get("revision")})
    if len(names) != 1 or len(revisions) > 1:
        named = ", ".join([*names, *(f"revision {revision}" for revision in revisions)])
        raise ValueError(
            f"The experts name {'several base models: ' + named if names else 'no base model'}. Write "
            'pipeline("transformer2", model="<base model>", experts=[...]).'
        )
    if not os.path.isdir(names[0]):
        try:
            validate_repo_id(names[0])
        except HFValidationError:
            raise ValueError(
                f"The experts were trained on {names[0]!r}, which is no folder and no Hub repository: say which model "
                "that is, by model=... (on the command line --model). For those of examples/ see examples/smollm2.py."
            ) from None
    return names[0], revisions[0] if revisions else None
