# SPDX-License-Identifier: Apache-2.0
"""
`pipeline("transformer2", model=..., experts=[...])`: a thin face on `Transformer2Model`.

Inputs and outputs are those of transformers' text-generation pipeline; an option adds the decision of the first pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .expert import Mixture
from .library import Source
from .two_pass import Transformer2Model

OPTIONS = ("expert", "mixture", "strategy", "threshold")


class _Text(str):
    """A prompt that carries the mixture it was given, through the pipeline's batching."""

    mixture: Mixture | None = None


class Transformer2Pipeline(TextGenerationPipeline):
    """
    Two-pass generation with z-vector experts (arXiv 2501.06252).

    Takes what transformers' text-generation pipeline takes, in the constructor `experts`, `classifier`, `strategy` and
    `threshold` of [`~two_pass.Transformer2Model`] besides, and in a call:

    - `expert`: a name for all prompts, or a list with one for each; `"other"` is the base model.
    - `mixture`: weights by name such as `{"math": 0.7, "code": 0.3}`, a [`~expert.Mixture`], or a list.
    - `strategy`, `threshold`: instead of the constructor's.
    - `return_dispatch`: adds the key `dispatch` to each output, with `choice`, `confidence`, `probabilities`, `alpha`.

    Example:

        >>> import peft_svf
        >>> from transformers import pipeline
        >>> pipe = pipeline("transformer2", model="base", experts=["me/math", "me/code"])
        >>> pipe("What is 3 * 14?", return_dispatch=True)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        experts: Sequence[Source] | Mapping[str, Source] = (),
        classifier: Source | None = None,
        strategy: str | None = None,
        threshold: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, Transformer2Model):
            if experts or classifier is not None or strategy is not None or threshold:
                raise ValueError(
                    "This model is a Transformer2Model, which has its experts, classifier, strategy and threshold: "
                    "pass them when it is made."
                )
        else:
            if tokenizer is None:
                raise ValueError(
                    "The transformer2 pipeline needs a tokenizer: pass tokenizer=... with a loaded model."
                )
            model = Transformer2Model(model, tokenizer, experts, classifier, strategy, threshold)
        super().__init__(model=model, tokenizer=tokenizer or model.tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls, model: str | None = None, *, experts: Sequence[Source] | Mapping[str, Source], **kwargs: Any
    ) -> "Transformer2Pipeline":
        """Load base model, tokenizer and experts; arguments as in [`~two_pass.Transformer2Model.from_pretrained`]."""
        return cls(Transformer2Model.from_pretrained(model, experts, **kwargs))

    def check_model_type(self, supported_models: Any) -> None:
        """Accept any model: transformers' check knows no PEFT models."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Refuse: transformers would write the base model's full weights and lose the experts."""
        raise ValueError(
            "A transformer2 pipeline is saved by its experts, which name their base model: "
            "pipe.model.library.model.save_pretrained(folder), or for the Hub "
            "peft_svf.push_expert(pipe.model.library.model, repo_id, adapter_name=...) for each."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refuse as `save_pretrained` does, before transformers creates the repository."""
        self.save_pretrained(None)

    def _sanitize_parameters(self, return_dispatch: bool | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        chosen = {name: kwargs.pop(name) for name in OPTIONS if kwargs.get(name) is not None}
        if "expert" in chosen or "mixture" in chosen:  # one in a call goes before the other in the constructor
            chosen = {"expert": None, "mixture": None, **chosen}
        preprocess, forward, postprocess = super()._sanitize_parameters(
            **{name: value for name, value in kwargs.items() if name not in OPTIONS}
        )
        if return_dispatch is not None:
            forward["return_dispatch"] = return_dispatch
        return preprocess, {**forward, **chosen}, postprocess

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
        if kwargs.get("expert") is not None and kwargs.get("mixture") is not None:
            raise ValueError("Give an expert or a mixture, not both.")
        for name in ("expert", "mixture"):
            given = kwargs.get(name)
            if isinstance(given, (list, tuple)):
                text_inputs = self._directed(text_inputs, name, given)
                del kwargs[name]
        return super().__call__(text_inputs, **kwargs)

    def _directed(self, inputs: Any, name: str, given: Sequence[Any]) -> list[Any]:
        """Attach one choice to each prompt, so that it stays with its row however the pipeline batches."""
        if not isinstance(inputs, list) or _is_chat(inputs) or len(inputs) != len(given):
            count = len(inputs) if isinstance(inputs, list) and not _is_chat(inputs) else 1
            raise ValueError(f"A list of {name}s has one for each prompt of a list, got {len(given)} for {count}.")
        mixtures = self.model.first_pass(inputs, **{name: given})
        directed: list[Any] = []
        for prompt, mixture in zip(inputs, mixtures, strict=True):
            item: Any = _Text(prompt) if isinstance(prompt, str) else Chat(prompt)
            item.mixture = mixture
            directed.append(item)
        return directed

    def _forward(self, model_inputs: Any, return_dispatch: bool = False, **kwargs: Any) -> Any:
        prompts = model_inputs["prompt_text"]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        mixtures = [getattr(prompt, "mixture", None) for prompt in prompts]
        if None in mixtures:
            texts = [prompt.messages if isinstance(prompt, Chat) else str(prompt) for prompt in prompts]
            mixtures = self.model.first_pass(texts, **options)
        outputs = super()._forward(model_inputs, mixture=mixtures, **kwargs)
        if return_dispatch:
            outputs["dispatch"] = [mixture.record() for mixture in mixtures if mixture is not None]
        return outputs

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> list[dict[str, Any]]:
        decision = model_outputs.pop("dispatch", None)
        records = super().postprocess(model_outputs, **kwargs)
        if decision is not None:
            decision = decision[0] if isinstance(decision, list) else decision
            for record in records:
                record["dispatch"] = decision
        return records


def _is_chat(inputs: Any) -> bool:
    return isinstance(inputs, list) and bool(inputs) and is_valid_message(inputs[0])


class _NoDefault(dict):
    """What transformers looks up when `pipeline("transformer2", ...)` is called without `model`."""

    def __getitem__(self, key: Any) -> Any:
        raise ValueError(
            'The transformer2 pipeline needs a base model: pipeline("transformer2", model="<base>", experts=[...]). '
            "`peft_svf.Transformer2Pipeline.from_pretrained(experts=[...])` loads the one that the experts name."
        )


REGISTRATION = {
    "pipeline_class": Transformer2Pipeline,
    "pt_model": (AutoModelForCausalLM,),
    "default": _NoDefault(model=None),
    "type": "text",
}
