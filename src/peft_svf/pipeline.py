# SPDX-License-Identifier: Apache-2.0
"""
`pipeline("transformer2", model=..., experts=[...])`: a thin face on `Transformer2Model`.

Inputs and outputs are those of transformers' text-generation pipeline, for a model that sees images those of its
image-text-to-text pipeline; an option adds the decision of the first pass.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    ImageTextToTextPipeline,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TextGenerationPipeline,
)
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .adaptation.first_pass import FirstPass
from .experts.expert import Mixture
from .experts.library import Source
from .two_pass import Transformer2Model

OPTIONS = ("expert", "mixture", "first_pass")  # of a call
# Arguments of `generate` that image-text-to-text would hand to the processor, which ignores them.
GENERATE = {*inspect.signature(GenerationMixin.generate).parameters, *GenerationConfig().to_dict()}
GENERATE -= {"max_new_tokens"}  # which it takes
SETTINGS = ("experts", "classifier", "first_pass", "limit_bytes")  # of the model


class _Text(str):
    """A prompt that carries the mixture it was given, through the pipeline's batching."""

    mixture: Mixture | None = None


class _NamedByExperts(os.PathLike):
    """
    Stands for the base model in `pipeline("transformer2", experts=[...])`: transformers takes a task's default model
    before our class sees the experts. It is no string, so nothing is looked up under its name.
    """

    def __fspath__(self) -> str:
        return os.curdir  # transformers asks only whether it is there, before it would ask the Hub

    def __repr__(self) -> str:
        return "the base model that the experts name"


class _TwoPasses:
    """What the pipelines below share; stands before transformers' own class in their bases."""

    model: Transformer2Model

    def check_model_type(self, supported_models: Any) -> None:
        """Accept any model: transformers' check knows no PEFT models."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Refuse: transformers would write the base model's full weights and lose the experts."""
        raise ValueError(
            "A transformer2 pipeline is saved by its experts, which name their base model: "
            "pipe.model.library.expert(name).save(folder) for each name in pipe.model.library.names."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refuse as `save_pretrained` does, before transformers creates the repository."""
        self.save_pretrained(None)

    def _sanitize_parameters(self, return_dispatch: bool | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        chosen = {name: kwargs.pop(name) for name in OPTIONS if kwargs.get(name) is not None}
        if "expert" in chosen or "mixture" in chosen:  # one in a call goes before the other in the constructor
            chosen = {"expert": None, "mixture": None, **chosen}
        preprocess, forward, postprocess = super()._sanitize_parameters(  # type: ignore[misc]
            **{name: value for name, value in kwargs.items() if name not in OPTIONS}
        )
        if return_dispatch is not None:
            forward["return_dispatch"] = return_dispatch
        return preprocess, {**forward, **chosen}, postprocess

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        if kwargs.get("expert") is not None and kwargs.get("mixture") is not None:
            raise ValueError("Give an expert or a mixture, not both.")
        with self.model.library.lock:
            for name in ("expert", "mixture"):
                given = kwargs.get(name)
                if isinstance(given, (list, tuple)):
                    key = next((key for key in ("text_inputs", "text") if key in kwargs), "images")  # may be chats
                    if key == "images" and inputs:  # text stands last, after images
                        inputs = (*inputs[:-1], self._directed(inputs[-1], name, given))
                    else:
                        kwargs[key] = self._directed(kwargs.get(key), name, given)
                    del kwargs[name]
            return super().__call__(*inputs, **kwargs)  # type: ignore[misc]

    def _directed(self, inputs: Any, name: str, given: Sequence[Any]) -> list[Any]:
        """Attach one choice to each prompt, so that it stays with its row however the pipeline batches."""
        if not isinstance(inputs, list) or _is_chat(inputs) or len(inputs) != len(given):
            found: Any = len(inputs) if isinstance(inputs, list) and not _is_chat(inputs) else 1
            if not isinstance(inputs, (str, list, Chat)):
                found = f"a {type(inputs).__name__}: make a list of it"
            raise ValueError(f"A list of {name}s has one for each prompt of a list, got {len(given)} for {found}.")
        chosen: dict[str, Any] = {name: given}
        mixtures = self.model.first_pass(inputs, **chosen)
        return [_carrying(prompt, mixture) for prompt, mixture in zip(inputs, mixtures, strict=True)]

    def _decide(self, prompts: Any, options: dict[str, Any]) -> list[Mixture]:
        """The mixtures of a batch: those that its prompts carry, else those of a first pass."""
        prompts = prompts if isinstance(prompts, list) else [prompts]
        carried = [getattr(prompt, "mixture", None) for prompt in prompts]
        if None not in carried:
            return carried  # type: ignore[return-value]
        texts = [prompt.messages if isinstance(prompt, Chat) else str(prompt) for prompt in prompts]
        return self.model.first_pass(texts, **options)

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> list[dict[str, Any]]:
        decision = model_outputs.pop("dispatch", None)
        records = super().postprocess(model_outputs, **kwargs)  # type: ignore[misc]
        if decision is not None:
            each = decision if isinstance(decision, list) else [decision]
            for i, record in enumerate(records):
                record["dispatch"] = each[i * len(each) // len(records)]
        return records


class Transformer2Pipeline(_TwoPasses, TextGenerationPipeline):
    """
    Two-pass generation with z-vector experts (arXiv 2501.06252).

    Takes what transformers' text-generation pipeline takes; in the constructor also `experts`, `classifier`,
    `first_pass` and `limit_bytes` of [`~two_pass.Transformer2Model`], and in a call:

    - `expert`: a name for all prompts, or a list with one for each; `"other"` is the base model.
    - `mixture`: weights by name such as `{"math": 0.7, "code": 0.3}`, a [`Mixture`], or a list.
    - `first_pass`: a strategy's name or a [`FirstPass`], instead of the constructor's.
    - `return_dispatch`: adds the key `dispatch` to each output, with `choice`, `confidence`, `probabilities`, `alpha`.

    `pipeline("transformer2", experts=[...])` without `model` loads the base model that the experts name, in their
    revision; of pipeline's arguments for loading only `dtype` reaches it, [`Transformer2Pipeline.from_pretrained`]
    takes the others. For a model that sees images, with its processor, it is a [`Transformer2ImagePipeline`].

    Example:

        >>> import peft_svf
        >>> from transformers import pipeline
        >>> pipe = pipeline("transformer2", experts=["me/math", "me/code"])
        >>> pipe("What is 3 * 14?", return_dispatch=True)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        first_pass: str | FirstPass | None = None,
        limit_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        model = _two_passes(model, tokenizer, experts, classifier, first_pass, limit_bytes)
        super().__init__(model=model, tokenizer=tokenizer or model.tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls, model: str | None = None, *, experts: Sequence[Source] | Mapping[str, Source], **kwargs: Any
    ) -> "Transformer2Pipeline | Transformer2ImagePipeline":
        """Load base model, tokenizer and experts; arguments as in [`~two_pass.Transformer2Model.from_pretrained`]."""
        return _Registered(Transformer2Model.from_pretrained(model, experts, **kwargs))

    def _forward(self, model_inputs: Any, return_dispatch: bool = False, **kwargs: Any) -> Any:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        with self.model.library.lock:
            mixtures = self._decide(model_inputs["prompt_text"], options)
            outputs = super()._forward(model_inputs, mixture=mixtures, **kwargs)
        if return_dispatch:
            outputs["dispatch"] = [mixture.record() for mixture in mixtures]
        return outputs


class Transformer2ImagePipeline(_TwoPasses, ImageTextToTextPipeline):
    """
    The same for a model that sees images: transformers' image-text-to-text pipeline in two passes.

    The first pass reads the text of a request, not its images. Arguments as in [`Transformer2Pipeline`], with
    `processor` in place of the tokenizer; those of a call are image-text-to-text's, and those of `generate` may stand
    beside them as well as in `generate_kwargs`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        processor: ProcessorMixin | None = None,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        first_pass: str | FirstPass | None = None,
        limit_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        model = _two_passes(model, processor, experts, classifier, first_pass, limit_bytes)
        super().__init__(model=model, processor=processor or model.processor, **kwargs)
        self.tokenizer.padding_side = "left"  # batches of a model that generates

    def _sanitize_parameters(self, return_dispatch: bool | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if own := {name: kwargs.pop(name) for name in GENERATE & kwargs.keys()}:
            kwargs["generate_kwargs"] = {**own, **(kwargs.get("generate_kwargs") or {})}
        return super()._sanitize_parameters(return_dispatch, **kwargs)

    def _forward(
        self,
        model_inputs: Any,
        return_dispatch: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        with self.model.library.lock:
            mixtures = self._decide(model_inputs["text"], options)
            settings = {**(generate_kwargs or {}), "mixture": mixtures}
            outputs = super()._forward(model_inputs, generate_kwargs=settings)
        if return_dispatch:
            outputs["dispatch"] = [mixture.record() for mixture in mixtures]
        return outputs


class _Registered(Transformer2Pipeline):
    """What transformers calls: it makes one of the two pipelines, and loads the base model that the experts name."""

    _load_tokenizer = None  # not known yet where the experts name the model
    _load_processor = None  # where the model has one

    def __new__(
        cls, model: Any, tokenizer: Any = None, processor: Any = None, dtype: Any = None, **kwargs: Any
    ) -> Any:
        if isinstance(model, _NamedByExperts):
            given = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
            model = Transformer2Model.from_pretrained(None, given.pop("experts", ()), dtype=dtype, **given)
        if processor is not None or getattr(model, "processor", None) is not None:
            return Transformer2ImagePipeline(model, processor=processor, **kwargs)
        return Transformer2Pipeline(model, tokenizer, **kwargs)


def _two_passes(
    model: Any,
    reader: PreTrainedTokenizerBase | ProcessorMixin | None,
    experts: Sequence[Source] | Mapping[str, Source],
    classifier: Source | None,
    first_pass: str | FirstPass | None,
    limit_bytes: int | None,
) -> Transformer2Model:
    if not isinstance(model, Transformer2Model):
        if reader is None:
            raise ValueError(
                "The transformer2 pipeline needs a tokenizer: pass tokenizer=... (or processor=...) with the model."
            )
        return Transformer2Model(model, reader, experts, classifier, first_pass, limit_bytes)
    if experts or any(x is not None for x in (classifier, first_pass, limit_bytes)):
        raise ValueError(
            "This model is a Transformer2Model, which has its experts and the settings of the first pass: pass them "
            "when it is made."
        )
    return model


def _is_chat(inputs: Any) -> bool:
    return isinstance(inputs, list) and bool(inputs) and is_valid_message(inputs[0])


def _carrying(prompt: Any, mixture: Mixture) -> Any:
    item: Any = _Text(prompt) if isinstance(prompt, str) else Chat(prompt)
    item.mixture = mixture
    return item


REGISTRATION = {
    "pipeline_class": _Registered,
    "pt_model": (AutoModelForImageTextToText, AutoModelForCausalLM),  # the first takes the whole of what sees images
    "default": {"model": (_NamedByExperts(), None)},
    "type": "multimodal",
}
