# SPDX-License-Identifier: Apache-2.0
"""
`pipeline("transformer2", model=..., experts=[...])`: a thin face on `Transformer2Model`.

Inputs and outputs are the same as in transformers' text-generation pipeline, or in its image-text-to-text pipeline for
a vision-language model; an option adds the decision of the first pass.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    GenerationConfig,
    GenerationMixin,
    ImageTextToTextPipeline,
    TextGenerationPipeline,
)
from transformers.utils import logging
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .adaptation.first_pass import FirstPass
from .experts.expert import Mixture
from .experts.library import Source
from .rows import Prompt
from .two_pass import Transformer2Model

logger = logging.get_logger(__name__)

SETTINGS = ("experts", "classifier", "first_pass", "limit_bytes")  # They go to `Transformer2Model`.
OPTIONS = ("expert", "mixture", "first_pass", "choices", "return_dispatch")  # They belong to a call.
# Arguments of `generate` that image-text-to-text would hand to the processor, which ignores them.
GENERATE = {*inspect.signature(GenerationMixin.generate).parameters, *GenerationConfig().to_dict()}
GENERATE -= {"max_new_tokens"}


class _TwoPasses:
    """What the two pipelines share; it precedes transformers' class in their bases."""

    model: Transformer2Model
    tokenizer: Any

    def __init__(self, model: Any, tokenizer: Any = None, *, processor: Any = None, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        if not isinstance(model, Transformer2Model):
            if (reader := processor or tokenizer) is None:
                raise ValueError("Pass the model's tokenizer too: tokenizer=AutoTokenizer.from_pretrained(...).")
            model = Transformer2Model(model, reader, **settings)
        elif any(settings.values()):
            raise ValueError(
                "This model is a Transformer2Model, which has its experts and the settings of the first pass: pass "
                "them when it is made."
            )
        if isinstance(self, ImageTextToTextPipeline):  # Given both readers, transformers fails to pad a batch.
            readers: dict[str, Any] = {"processor": processor or model.processor}
        else:
            readers = {"tokenizer": tokenizer or model.tokenizer}
        super().__init__(model=model, **readers, **kwargs)  # type: ignore[call-arg]

    def check_model_type(self, supported_models: Any) -> None:
        """Accept any model: transformers' check has no PEFT models."""

    def save_pretrained(self, folder: Any) -> None:
        """Write a bundle, as [`Transformer2Model.save_pretrained`] does, without the base's weights."""
        self.model.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload a bundle, as [`Transformer2Model.push_to_hub`] does."""
        return self.model.push_to_hub(repo_id, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        options = {name: kwargs.pop(name, None) for name in OPTIONS}
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        if options["expert"] is not None or options["mixture"] is not None:  # They replace both of the constructor.
            forward |= {"expert": None, "mixture": None}
        return preprocess, forward | {k: v for k, v in options.items() if v is not None}, postprocess

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        with self.model.library.lock:
            carried: dict[str, Any] = {}
            if any(isinstance(kwargs.get(name), (list, tuple)) for name in ("expert", "mixture")):
                carried = {name: kwargs.pop(name, None) for name in ("expert", "mixture")}
            if any(isinstance(texts, (list, tuple)) for texts in kwargs.get("choices") or ()):
                carried["choices"] = kwargs.pop("choices")
            if carried:
                key = next((key for key in ("text_inputs", "text") if key in kwargs), "images")  # (may be chats)
                if key == "images" and inputs:  # Text comes last, after images.
                    inputs = (*inputs[:-1], self._carrying(inputs[-1], **carried))
                else:
                    kwargs[key] = self._carrying(kwargs.get(key), **carried)
            return super().__call__(*inputs, **kwargs)  # type: ignore[misc]

    def _carrying(self, inputs: Any, choices: Sequence[Sequence[str]] | None = None, **chosen: Any) -> Any:
        """Attach its mixture and its choices to each prompt, which keeps them with its row however it is batched."""
        single = isinstance(inputs, str) or (isinstance(inputs, list) and inputs and is_valid_message(inputs[0]))
        prompts = [inputs] if single else list(inputs)
        if choices is not None and len(choices) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts, but choices for {len(choices)}.")
        items: list[Any] = [_Text(prompt) if isinstance(prompt, str) else Chat(prompt) for prompt in prompts]
        mixtures = self.model.first_pass(prompts, **chosen) if chosen else []
        for item, mixture in zip(items, mixtures, strict=False):
            item.mixture = mixture
        for item, texts in zip(items, choices or (), strict=False):
            item.choices = texts
        return items[0] if single else items

    def _forward(
        self,
        model_inputs: Any,
        expert: Any = None,
        mixture: Any = None,
        first_pass: str | FirstPass | None = None,
        choices: Sequence[str] | None = None,
        return_dispatch: bool = False,
        **kwargs: Any,
    ) -> Any:
        prompts = model_inputs["prompt_text" if "prompt_text" in model_inputs else "text"]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        texts = [prompt.messages if isinstance(prompt, Chat) else str(prompt) for prompt in prompts]
        if self.tokenizer.chat_template and any(map(self._is_plain, texts)):
            logger.warning_once(
                "The model reads chats, and a prompt is a text, which it continues as it is: for an answer, pass "
                '[{"role": "user", "content": "..."}].'
            )
        chosen: dict[str, Any] = {"mixture": [getattr(prompt, "mixture", None) for prompt in prompts]}
        if None in chosen["mixture"]:  # These prompts carry no choice of their own.
            chosen = {"prompts": texts, "first_pass": first_pass, "expert": expert, "mixture": mixture}
        listed = [getattr(prompt, "choices", None) for prompt in prompts]
        if None not in listed or choices is not None:
            if "pixel_values" in model_inputs:
                raise ValueError("choices= compares texts as answers to a text, and this request has an image.")
            seen = {name: model_inputs.get(name) for name in ("input_ids", "attention_mask")}
            own: Any = choices if None in listed else listed
            answers, mixtures = self.model.choose(choices=own, **{"prompts": texts, **chosen}, **seen)
            dispatches = [{"dispatch": mixture.record()} if return_dispatch else {} for mixture in mixtures]
            return {"answers": [answer | extra for answer, extra in zip(answers, dispatches, strict=True)]}
        decided: list[Mixture] = []
        outputs = self._answer(model_inputs, {**chosen, "on_dispatch": decided.extend}, **kwargs)
        if return_dispatch:
            outputs["dispatch"] = [mixture.record() for mixture in decided]
        return outputs

    def _is_plain(self, prompt: Prompt) -> bool:
        """Whether a prompt is a text that no chat template has written."""
        return isinstance(prompt, str) and not any(token in prompt for token in self.tokenizer.all_special_tokens)

    def _answer(self, model_inputs: Any, chosen: dict[str, Any], **kwargs: Any) -> Any:
        return super()._forward(model_inputs, **chosen, **kwargs)  # type: ignore[misc]

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> list[dict[str, Any]]:
        if (answers := model_outputs.get("answers")) is not None:
            return answers if isinstance(answers, list) else [answers]
        decision = model_outputs.pop("dispatch", None)
        records = super().postprocess(model_outputs, **kwargs)  # type: ignore[misc]
        if decision is not None:
            decisions = decision if isinstance(decision, list) else [decision]
            for i, record in enumerate(records):
                record["dispatch"] = decisions[i * len(decisions) // len(records)]
        return records


class Transformer2Pipeline(_TwoPasses, TextGenerationPipeline):
    """
    Two-pass generation with z-vector experts (arXiv 2501.06252).

    Takes what transformers' text-generation pipeline takes; in the constructor also the arguments of
    [`~two_pass.Transformer2Model`], and in a call:

    - `expert`: a name for all prompts, or a list with one for each; `"other"` is the base model.
    - `mixture`: weights by name such as `{"math": 0.7, "code": 0.3}`, a [`Mixture`], or a list.
    - `first_pass`: a strategy's name or a [`FirstPass`], instead of the constructor's.
    - `choices`: texts, the same for all prompts or a list of them for each. The answer is the likeliest, and an output
      has `choice`, `confidence` and `probabilities` in place of a generated text.
    - `return_dispatch`: adds the key `dispatch` to each output, with `choice`, `confidence`, `probabilities`, `alpha`.

    `pipeline("transformer2", experts=[...])` without `model` loads the base model that the experts name, in their
    revision, with `dtype` alone; [`Transformer2Pipeline.from_pretrained`] takes the other arguments for loading. For a
    vision-language model, with its processor, it is a [`Transformer2ImagePipeline`].

    Example:

        >>> import peft_svf
        >>> from transformers import pipeline
        >>> pipe = pipeline("transformer2", experts=["me/math", "me/code"])
        >>> pipe([{"role": "user", "content": "What is 3 * 14?"}], return_dispatch=True)
    """

    @classmethod
    def from_pretrained(
        cls, model: str | None = None, *, experts: Sequence[Source] | Mapping[str, Source], **kwargs: Any
    ) -> "Transformer2Pipeline | Transformer2ImagePipeline":
        """Load base model, tokenizer and experts; arguments as in [`~two_pass.Transformer2Model.from_pretrained`]."""
        return make_pipeline(Transformer2Model.from_pretrained(model, experts, **kwargs))


class Transformer2ImagePipeline(_TwoPasses, ImageTextToTextPipeline):
    """
    Two-pass generation of a vision-language model: transformers' image-text-to-text pipeline in two passes.

    The first pass reads the text of a request, not its images. Arguments as in [`Transformer2Pipeline`], with
    `processor` in place of the tokenizer; arguments of `generate` stand with or without `generate_kwargs`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer.padding_side = "left"  # A batch that generates grows on the right.

    def _sanitize_parameters(self, *args: Any, **kwargs: Any) -> tuple[dict, dict, dict]:
        if generation := {name: kwargs.pop(name) for name in GENERATE & kwargs.keys()}:
            kwargs["generate_kwargs"] = {**generation, **(kwargs.get("generate_kwargs") or {})}
        return super()._sanitize_parameters(*args, **kwargs)

    def _answer(self, model_inputs: Any, chosen: dict[str, Any], **kwargs: Any) -> Any:
        settings = {**(kwargs.get("generate_kwargs") or {}), **chosen}
        return ImageTextToTextPipeline._forward(self, model_inputs, generate_kwargs=settings)


def make_pipeline(
    model: Any = None, tokenizer: Any = None, processor: Any = None, dtype: Any = None, **kwargs: Any
) -> "Transformer2Pipeline | Transformer2ImagePipeline":
    """Make the pipeline that fits a model; without one, load the base model that the experts name."""
    if model is None:
        settings = {name: kwargs.pop(name) for name in SETTINGS if name in kwargs}
        model = Transformer2Model.from_pretrained(None, settings.pop("experts", ()), dtype=dtype, **settings)
    if processor is not None or getattr(model, "processor", None) is not None:
        return Transformer2ImagePipeline(model, processor=processor, **kwargs)
    return Transformer2Pipeline(model, tokenizer, **kwargs)


class _Text(str):
    """A prompt that carries its mixture and its choices through the pipeline's batching."""
