# SPDX-License-Identifier: Apache-2.0
"""
Prompts -> first pass -> a `Mixture` per row -> second pass: Transformer² (arXiv 2501.06252, section 3.3).

`Transformer2Model.generate` runs both passes; the pipeline is a thin face on it. No key/value cache crosses from one
pass to the other: their weights differ. Between calls the model is the base model with its adapters, to the bit.
"""

import inspect
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
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
    ProcessorMixin,
)

from .adaptation.few_shot import DEFAULT as SEARCH
from .adaptation.few_shot import few_shot
from .adaptation.first_pass import FirstPass, decide, default_first_pass, dispatch
from .adaptation.probe import Probe
from .adaptation.router import can_decide, deciding, key_rows, key_scores, mask_of
from .adaptation.search import Search
from .evaluation import Summary, choice_logps, confidence_of, context_of, wilson
from .evaluation.reading import CACHES, evaluating
from .experts.bundle import find_bundle, push_bundle, read_bundle, save_bundle
from .experts.expert import OTHER, Mixture
from .experts.key import RoutingKey
from .experts.library import ExpertLibrary, Source, loaded
from .rows import Prompt, Reader, Row, encode, tokenizer_of
from .tasks import Task

logger = logging.getLogger(__name__)
Chosen = str | Mixture | Mapping[str, float]  # A name is an expert's or a mixture's in the library.
MERGE_FROM = 32  # new tokens; on SmolLM2-135M and one core a merge takes 0.43-0.56 s and saves 23 ms per token
MERGE_AT = 16  # their forward that merges: short answers by many experts in turn would never get that time back
READER_KWARGS = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "force_download")


class Transformer2Model:
    """
    Choose an expert for a prompt in a first pass, and answer with it in a second.

    Everything else is the wrapped `PeftModel`'s: `config`, `device`, `generation_config`, `to`.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The base model, or one with SVF adapters.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Its tokenizer, or the processor of a vision-language model. The first pass reads only text.
        experts (`Sequence` or `Mapping[str, ...]`): Folders, Hub repositories or [`Expert`]s; see [`ExpertLibrary`].
        classifier (folder, repository or [`Expert`], *optional*):
            An expert trained to name the kind of a question, for the first pass.
        first_pass (`str` or [`FirstPass`], *optional*):
            A strategy, or a [`FirstPass`]; default the classifier if there is one, else `"key"` if all experts have
            routing keys, else `"prompt"`.
        limit_bytes (`int`, *optional*): Memory for z-vectors; the least recently used experts make room.

    Raises:
        `ValueError`: for what [`ExpertLibrary`] refuses, a first pass without its classifier or probe, or a model
            that `torch.compile` wraps.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: Reader,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        first_pass: str | FirstPass | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                "A model that torch.compile has wrapped hides its modules from the experts: compile it in place with "
                "model.compile(), before or after."
            )
        self.processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
        self.tokenizer = tokenizer_of(tokenizer)
        self.library = ExpertLibrary(model, experts, classifier, limit_bytes)
        self._first_pass = None if first_pass is None else self._settings_of(first_pass)
        if self._first_pass is not None:
            self._first_pass.check(self.library)

    @classmethod
    def from_pretrained(
        cls,
        model: str | None,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        *,
        classifier: Source | None = None,
        first_pass: str | FirstPass | None = None,
        limit_bytes: int | None = None,
        **kwargs: Any,
    ) -> "Transformer2Model":
        """
        Load the base model, its tokenizer or processor, and experts; other arguments as in [`Transformer2Model`].

        Args:
            model (`str`, *optional*):
                Folder or repository of the base model; default the one that the experts name, in their revision.
                Without experts, one of a bundle that `save_pretrained` or `push_to_hub` has written.
            kwargs: As in [`load_model`].

        Raises:
            `ValueError`: without `model`, if the experts name none or several.
        """
        mixtures: Mapping[str, Mixture] = {}
        keys: Mapping[str, RoutingKey | None] = {}
        if not experts and (folder := find_bundle(model or "", kwargs.get("revision"), kwargs.get("token"))):
            bundle = read_bundle(folder)
            model, experts, mixtures, keys = bundle.base_model, bundle.experts, bundle.mixtures, bundle.keys
            parts = bundle.first_pass.items()
            settings: Any = {key: Probe.load(part) if isinstance(part, Path) else part for key, part in parts}
            classifier, first_pass = classifier or bundle.classifier, first_pass or FirstPass(**settings)
            kwargs["revision"] = bundle.revision
        experts = loaded(experts, lazy=limit_bytes is not None)  # opens each file once
        if model is None:
            model, revision = base_of(experts)
            kwargs = {"revision": revision, **kwargs} if revision else kwargs
        made = cls(*load_model(model, **kwargs), experts, classifier, first_pass, limit_bytes)
        for name, mixture in mixtures.items():
            made.library.add_mixture(name, mixture, keys.get(name))
        return made

    @property
    def default_first_pass(self) -> FirstPass:
        """The first pass of requests that name none."""
        return self._first_pass or default_first_pass(self.library, self.reader)

    @default_first_pass.setter
    def default_first_pass(self, first_pass: FirstPass) -> None:
        self._first_pass = first_pass

    def _settings_of(self, first_pass: str | FirstPass | None) -> FirstPass:
        """Return the settings of a first pass that a call names by them, by its strategy, or not at all."""
        first_pass = self.default_first_pass if first_pass is None else first_pass
        return FirstPass(first_pass) if isinstance(first_pass, str) else first_pass

    @property
    def reader(self) -> Reader:
        """The processor, or the tokenizer of a model without one."""
        return self.processor or self.tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "library":  # Before it is set, the lookup below would never end.
            raise AttributeError(name)
        attribute = getattr(self.library.model, name)
        if not inspect.ismethod(attribute):
            return attribute

        @wraps(attribute)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = attribute(*args, **kwargs)
            return self if result is self.library.model else result  # `model = model.to(device)` keeps both passes

        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward of the wrapped model, after any other thread's request and its mixture."""
        with self.library.lock:
            self.library.refuse_other_coroutine()
            return self.library.model(*args, **kwargs)

    forward = __call__

    def first_pass(
        self,
        prompts: Sequence[Prompt],
        first_pass: str | FirstPass | None = None,
        *,
        expert: str | Sequence[str] | None = None,
        mixture: Chosen | Sequence[Chosen] | None = None,
        batch_size: int = 16,
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Mixture]:
        """
        Choose the mixture of each prompt; an explicit `expert` or `mixture` is used as it is.

        Args:
            prompts (`Sequence[str | list[dict]]`): Texts or chats.
            first_pass (`str` or [`FirstPass`], *optional*): Replaces the model's own.
            expert (`str` or `Sequence[str]`, *optional*):
                One name for all prompts, or one per prompt; `"other"` is the base model.
            mixture ([`Mixture`], `dict[str, float]`, `str` or a sequence of them, *optional*):
                The same with mixtures, or names of mixtures in the library.
            dispatch_kwargs (`dict`, *optional*):
                Fields of [`FirstPass`] to replace in the first pass, such as `{"read": "generate"}`.

        Raises:
            `ValueError`: if both are given, a name is unknown, or there isn't one for each prompt.
        """
        with self.library.lock:
            if expert is not None or mixture is not None:
                return self._explicit(expert, mixture, len(prompts))
            if mark := getattr(self.processor, "image_token", None):  # The first pass reads no images.
                prompts = [prompt.replace(mark, "") if isinstance(prompt, str) else prompt for prompt in prompts]
            settings = replace(self._settings_of(first_pass), **(dispatch_kwargs or {}))
            reader = self.reader if settings.strategy == "key" else self.tokenizer
            return dispatch(self.library, reader, prompts, settings, batch_size)

    def _explicit(
        self, expert: str | Sequence[str] | None, mixture: Chosen | Sequence[Chosen] | None, count: int
    ) -> list[Mixture]:
        """Return the explicit mixture of each of `count` prompts."""
        if expert is not None and mixture is not None:
            raise ValueError("Give an expert or a mixture, not both.")
        chosen = mixture if expert is None else expert
        listed = [chosen] * count if isinstance(chosen, (str, Mixture, Mapping)) else list(chosen or ())
        if len(listed) != count:
            raise ValueError(f"There are {count} prompts, but experts or mixtures for {len(listed)}.")
        mixtures = [self._mixture(item) for item in listed]
        names = [*self.library.names, OTHER]
        certain = {m.choice: {name: float(name == m.choice) for name in names} for m in mixtures}
        return [replace(m, probabilities=m.probabilities or certain[m.choice]) for m in mixtures]

    def _mixture(self, chosen: Chosen) -> Mixture:
        """Turn a name or weights into a mixture; a `ValueError` if it has an unknown expert."""
        if isinstance(chosen, str):
            chosen = self.library.mixture(chosen)
        mixture = chosen if isinstance(chosen, Mixture) else Mixture(dict(chosen))
        self.library.check_experts(mixture.alpha)
        return mixture

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """
        Write experts, mixtures and the settings of the first pass as a bundle, which names the base model.

        [`Transformer2Model.from_pretrained`] and `pipeline("transformer2", model=folder)` load it.
        """
        with self.library.lock:
            save_bundle(self.library, folder, vars(self.default_first_pass))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Upload a bundle as `save_pretrained` writes it, with a card, in one commit; arguments of [`push_bundle`]."""
        with self.library.lock:
            return push_bundle(self.library, repo_id, vars(self.default_first_pass), **kwargs)

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        expert: str | Sequence[str] | None = None,
        mixture: Chosen | Sequence[Chosen] | None = None,
        first_pass: str | FirstPass | None = None,
        return_dispatch: bool = False,
        on_dispatch: Callable[[list[Mixture]], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Run both passes: choose a mixture for each row, then [`answer`][Transformer2Model.answer] with it.

        With routing keys the input ids themselves are read. If no expert moves weights below the keys' block, there is
        one pass: the prefill chooses the mixtures when it gets there. Else, and with an assistant, prompt look-up, a
        chunked prefill or a compiled model, a forward before it ends at that block; the choice is the same.

        Args:
            inputs (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                As in transformers' `generate`, which also takes it as `input_ids`.
            prompts (`Sequence[str | list[dict]]`, *optional*):
                Read by the first pass; default the decoded token ids. With keys it matters only if there are images.
            expert, mixture, first_pass: As in [`Transformer2Model.first_pass`].
            return_dispatch (`bool`): Return the mixtures as well.
            on_dispatch (`Callable`, *optional*): Gets the mixtures when they are chosen, before the first token.
            kwargs: As in [`Transformer2Model.answer`].

        Returns:
            What transformers' `generate` returns; with `return_dispatch` a tuple of that and a `list[Mixture]`.

        Raises:
            `ValueError`: if a first pass has nothing to read, and as the two passes.
            `TypeError`: for texts in the place of token ids.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        explicit = expert is not None or mixture is not None
        if prompts is None and not explicit and ids is None:
            raise ValueError("The first pass has nothing to read: pass input_ids, prompts=, expert= or mixture=.")
        if ids is not None and not (isinstance(ids, Tensor) and ids.dim() == 2):
            raise TypeError(
                f"generate reads token ids, a tensor (rows, tokens), and got a {type(ids).__name__}: call "
                'generate(**tokenizer(texts, return_tensors="pt", padding=True)), or pass texts to '
                'pipeline("transformer2", model=...).'
            )
        mixtures: list[Mixture] = []

        def note(chosen: list[Mixture]) -> None:
            mixtures.extend(chosen)
            for mixture in chosen:
                logger.info(f"{mixture.strategy}: {mixture.record()}")
            if on_dispatch is not None:
                on_dispatch(chosen)

        with self.library.lock:
            images = any(kwargs.get(name) is not None for name in ("pixel_values", "inputs_embeds"))
            reads_ids = not (explicit or images or ids is None) and ids.shape[1] > 0
            settings = self._settings_of(first_pass) if reads_ids else None
            if settings is not None and ids is not None and settings.strategy == "key":
                output = self._answer_by_key(settings, ids, kwargs, note)
            else:
                if prompts is None and explicit:
                    rows = kwargs.get("inputs_embeds") if ids is None else ids
                    prompts = [""] * (1 if rows is None else len(rows))
                elif prompts is None:
                    prompts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                note(self.first_pass(prompts, first_pass, expert=expert, mixture=mixture))
                output = self.answer(mixtures, ids, **kwargs)
        return (output, mixtures) if return_dispatch else output

    def _answer_by_key(
        self, first_pass: FirstPass, ids: Tensor, kwargs: dict[str, Any], note: Callable[[list[Mixture]], None]
    ) -> Any:
        """Choose mixtures by routing keys, inside the prefill if that is possible, and answer."""
        self._check_request(ids, kwargs)
        mask = mask_of(self.library.model, ids, kwargs.get("attention_mask"))
        kwargs = {**kwargs, "attention_mask": mask}
        rows, same = key_rows(self.reader, ids, mask)

        def choose(scores: Tensor) -> list[Mixture]:
            note(mixtures := decide(self.library, scores, first_pass))
            return mixtures

        if same and can_decide(self.library, self.reader, self._generation(kwargs)):
            merge = MERGE_AT if self._new_tokens(ids.shape[1], kwargs) >= MERGE_FROM else 0
            with torch.no_grad(), deciding(self.library, self.reader, mask, choose, merge) as model:
                return model.generate(ids, **kwargs)
        return self.answer(choose(key_scores(self.library, self.reader, rows)), ids, **kwargs)

    @torch.no_grad()
    def answer(self, mixtures: Sequence[Mixture], inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """
        Run the second pass: generate with one mixture per row, on merged weights if rows agree and many tokens follow.

        Pass `inputs` and `kwargs` as to transformers' `generate`, without a key/value cache.

        Raises:
            `ValueError`: if there isn't a mixture for each row, a prompt fills the model's context, a cache is
                passed, or mixtures differ in a batch of images whose vision tower they move.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        rows, length = self._check_request(inputs, kwargs)
        if len(mixtures) != rows:
            raise ValueError(f"There are {len(mixtures)} prompts for {rows} rows of input_ids.")
        if kwargs.get("pixel_values") is not None:
            self._check_tower(mixtures)
        merge = MERGE_AT if self._new_tokens(length, kwargs) >= MERGE_FROM else 0
        with self.library.activate(mixtures, merge) as model:
            return model.generate(inputs, **kwargs)

    def choose(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        expert: str | Sequence[str] | None = None,
        mixture: Chosen | Sequence[Chosen] | None = None,
        first_pass: str | FirstPass | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[list[dict[str, Any]], list[Mixture]]:
        """
        Answer each prompt with one of given texts, by their summed token log-likelihoods under its mixture.

        Args:
            prompts (`Sequence[str | list[dict]]`): Texts or chats.
            choices (`Sequence[str]` or `Sequence[Sequence[str]]`):
                Different texts, the same for all prompts or some for each.
            expert, mixture, first_pass: As in [`Transformer2Model.first_pass`].
            input_ids, attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                What the model reads, padded on the left; default the prompts as their template writes them.

        Returns:
            For each prompt the fields of transformers' decisions, `choice`, `confidence` and `probabilities` by choice
            (the softmax), and its [`Mixture`].

        Raises:
            `ValueError`: if there aren't choices for each prompt, for what [`choice_logps`] refuses (equal choices,
                images), and as the first pass.
        """
        by_row = any(isinstance(texts, (list, tuple)) for texts in choices)
        listed: Sequence[Any] = choices if by_row else [choices] * len(prompts)
        if len(listed) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts, but choices for {len(listed)}.")
        rows = [{"prompt": prompt, "choices": texts} for prompt, texts in zip(prompts, listed, strict=True)]
        with self.library.lock:
            if input_ids is None:
                encoded = encode(self.reader, prompts)
                input_ids, attention_mask = encoded["input_ids"], encoded["attention_mask"]
            mask = mask_of(self.library.model, input_ids, attention_mask)
            settings = self._settings_of(first_pass) if expert is None and mixture is None else None
            if settings is not None and settings.strategy == "key":  # reads the ids, as `generate` does
                scores = key_scores(self.library, self.reader, key_rows(self.reader, input_ids, mask)[0])
                mixtures = decide(self.library, scores, settings)
            else:
                mixtures = self.first_pass(prompts, first_pass, expert=expert, mixture=mixture)
            ids = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
            answers: dict[int, dict[str, Any]] = {}
            for places in by_mixture(mixtures):
                with self.library.activate(mixtures[places[0]]) as model, evaluating(model):
                    part = [rows[i] for i in places]
                    logps = choice_logps(model, self.reader, part, prompts=[ids[i] for i in places])
                for i, row in zip(places, logps.cpu().double().softmax(-1).tolist(), strict=True):
                    shares = dict(zip(listed[i], row, strict=False))  # rows with fewer choices are filled up
                    best = max(shares, key=lambda text: shares[text])
                    confidence = confidence_of(shares[best], len(shares))
                    answers[i] = {"choice": best, "confidence": confidence, "probabilities": shares}
        return [answers[i] for i in range(len(rows))], mixtures

    def _check_request(self, inputs: Tensor | None, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Return rows and tokens of a request; a `ValueError` for a cache, or a prompt that fills the context."""
        if any(kwargs.get(name) is not None for name in CACHES):
            raise ValueError("A key/value cache holds the activations of other weights: pass input_ids alone.")
        read = kwargs.get("inputs_embeds") if inputs is None else inputs
        rows, length = (1, 0) if read is None else read.shape[:2]
        limit = context_of(self.library.model)
        if limit is not None and length >= limit:
            raise ValueError(
                f"The prompt has {length} tokens, but the model's context is {limit}: leave room for an answer."
            )
        return rows, length

    def _generation(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a `generate` with these arguments: they, else its config's or the model's."""
        arguments = {key: value for key, value in kwargs.items() if value is not None}
        return {**vars(kwargs.get("generation_config") or self.generation_config), **arguments}

    def _check_tower(self, mixtures: Sequence[Mixture]) -> None:
        """Refuse mixtures that differ in a layer that reads images: its rows are patches, not prompts."""
        if all(mixture.alpha == mixtures[0].alpha for mixture in mixtures):
            return
        base = self.get_base_model()
        by_row = {*base.get_decoder().modules(), base.get_output_embeddings()}
        if tower := [name for name, layer in self.library.layers().items() if layer not in by_row]:
            raise ValueError(
                f"Experts move {tower[0]}, which reads the images of a batch regardless of its rows: give all rows "
                "one expert or mixture, or use batches of one (batch_size=1)."
            )

    def _new_tokens(self, length: int, kwargs: Mapping[str, Any]) -> int:
        """Return the number of tokens that `generate` may add to prompts of this length."""
        settings = self._generation(kwargs)
        if settings.get("max_new_tokens") is not None:
            return settings["max_new_tokens"]
        return settings["max_length"] - length if settings.get("max_length") else 20  # transformers' default

    def adapt(
        self, examples: Iterable[Row], task: Task | None = None, search: Search | None = None, **kwargs: Any
    ) -> Mixture:
        """
        Find a mixture, to be used as `mixture=` or saved, from solved examples.

        Args:
            examples, task: As in [`few_shot`].
            search ([`Search`], *optional*): How to search. Instead, its fields may be among the other arguments.
            kwargs: Fields of [`Search`] but `temperature`, which is `generate`'s here; arguments of [`few_shot`].

        Raises:
            `ValueError`: if both `search` and fields of it are given, and as [`few_shot`].
        """
        settings = {name: kwargs.pop(name) for name in (vars(SEARCH).keys() & kwargs.keys()) - {"temperature"}}
        if search is not None and settings:
            raise ValueError(f"Give a search or its fields, not both; got {search} and {settings}.")
        search = Search(**settings) if search is None else search
        return few_shot(self.library, self.tokenizer, examples, search, task=task, **kwargs)

    @contextmanager
    def using(self, mixture: Chosen) -> Iterator[PeftModel]:
        """Give the model one mixture while the context is open, on merged weights, for forwards of your own."""
        with self.library.activate(self._mixture(mixture), merge=True) as model:
            yield model


def by_mixture(mixtures: Sequence[Mixture]) -> list[list[int]]:
    """Return the places of rows that share their weights, one list for each mixture."""
    groups: dict[frozenset[tuple[str, float]], list[int]] = defaultdict(list)
    for place, mixture in enumerate(mixtures):
        groups[frozenset(mixture.alpha.items())].append(place)
    return list(groups.values())


def answer_each(
    model: Transformer2Model,
    rows: Sequence[Row],
    mixtures: Sequence[Mixture],
    evaluate: Callable[[PreTrainedModel, Sequence[Row]], Summary],
) -> Summary:
    """
    Evaluate each row under its own mixture; rows that share one are answered together.

    Returns the [`Summary`] of all rows, the records in their order, each with its `dispatch`.
    """
    records: dict[int, dict[str, Any]] = {}
    total = seconds = 0.0
    for places in by_mixture(mixtures):
        with model.using(mixtures[places[0]]) as adapted:
            part = evaluate(adapted, [rows[i] for i in places])
        total, seconds = total + part.accuracy * part.n, seconds + part.seconds
        for i, record in zip(places, part.records, strict=True):
            records[i] = {**record, "dispatch": mixtures[i].record()}
    n = len(rows)
    return Summary(part.task, part.form, n, total / n, wilson(total, n), seconds, [records[i] for i in range(n)])


def load_model(name: str, **kwargs: Any) -> tuple[PreTrainedModel, Reader]:
    """
    Load a base model and its tokenizer, or the processor of a vision-language model.

    `kwargs` go to the model's `from_pretrained`; those that locate files, such as `revision` and `token`, to both.
    """
    shared = {key: kwargs[key] for key in READER_KWARGS if key in kwargs}
    sees = type(AutoConfig.from_pretrained(name, **shared)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(name, **kwargs)
    return model, (AutoProcessor if sees else AutoTokenizer).from_pretrained(name, **shared)


def base_of(experts: Sequence[Source] | Mapping[str, Source]) -> tuple[str, str | None]:
    """Return the base model that experts name, with its revision if any; a `ValueError` for none or several."""
    configs = [expert.config for expert in loaded(experts)]
    names = sorted({config["base_model_name_or_path"] for config in configs if config.get("base_model_name_or_path")})
    revisions = sorted({str(config["revision"]) for config in configs if config.get("revision")})
    if len(names) != 1 or len(revisions) > 1:
        named = ", ".join([*names, *(f"revision {revision}" for revision in revisions)])
        raise ValueError(
            f"The experts name {'several base models: ' + named if names else 'no base model'}. Write "
            'pipeline("transformer2", model="<base model>", experts=[...]).'
        )
    try:
        if not os.path.isdir(names[0]):
            validate_repo_id(names[0])
    except HFValidationError:
        raise ValueError(
            f"The experts were trained on {names[0]!r}, which is neither a folder nor a Hub repository: pass the base "
            "model as model=... (on the command line --model). examples/smollm2.py builds that of examples/."
        ) from None
    return names[0], revisions[0] if revisions else None
