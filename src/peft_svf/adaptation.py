# SPDX-License-Identifier: Apache-2.0
"""
The first pass of Transformer² (arXiv 2501.06252, section 3.3): a prompt, or a few examples -> `Mixture`.

`dispatch` reads the likelihoods of the experts' names as the answer to "which kind of request is this", with the base
model or with a classifier expert; `few_shot` searches mixture weights on solved examples. Both leave the model as it
was.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedTokenizerBase

from .cem import Search, cross_entropy_method
from .evaluation import choice_logps, evaluate
from .expert import OTHER, Mixture
from .library import ExpertLibrary
from .tasks import Task, dispatch_prompt

logger = logging.getLogger(__name__)
STRATEGIES = ("prompt", "classifier")
ANYTHING_ELSE = "anything else"  # what the prompt says of "other"
QUESTION_TOKENS = 256  # of the request that the first pass reads: it is bounded


def dispatch(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    strategy: str = "prompt",
    threshold: float = 0.0,
    calibrate: bool | None = None,
    batch_size: int = 16,
) -> list[Mixture]:
    """
    Choose one expert, or the base model, for each prompt by the likelihood of its name.

    Args:
        library ([`~library.ExpertLibrary`]):
            The experts; their names and descriptions stand in the question that the model is asked.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the base model.
        prompts (`Sequence[str | list[dict]]`):
            Texts or chats. Of a chat the last user message is read, of either the first 256 tokens.
        strategy (`str`):
            `"prompt"` asks the base model, `"classifier"` the library's classifier expert.
        threshold (`float`):
            Below this confidence the base model is chosen.
        calibrate (`bool`, *optional*):
            Divide the likelihoods by those of an empty request (contextual calibration): small models have a favourite
            answer. Default: for `"prompt"` only, a classifier is trained.
        batch_size (`int`):
            Prompts per forward.

    Returns:
        `list[Mixture]`, one-hot or empty, with confidence and probabilities; the same for the same input.

    Raises:
        `ValueError`: for another strategy, or `"classifier"` without a classifier.
    """
    check_strategy(library, strategy)
    calibrate = strategy == "prompt" if calibrate is None else calibrate
    asked_of = Mixture({library.classifier: 1.0}) if strategy == "classifier" and library.classifier else Mixture()
    kinds = {**library.descriptions, OTHER: ANYTHING_ELSE}
    names, mixtures = list(kinds), []
    for start in range(0, len(prompts), batch_size):
        questions = [_question(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        rows = [{"prompt": dispatch_prompt(question, kinds), "choices": names} for question in (*questions, "")]
        with torch.no_grad(), library.activate(asked_of) as model:
            logps = choice_logps(model, tokenizer, rows)
        scores = logps[:-1] - logps[-1] if calibrate else logps[:-1]
        for row in scores.softmax(-1).tolist():
            best = max(row)
            choice = names[row.index(best)]
            confidence = max(0.0, (best - 1 / len(names)) / (1 - 1 / len(names)))
            if confidence < threshold:
                choice = OTHER
            alpha = {} if choice == OTHER else {choice: 1.0}
            mixtures.append(Mixture(alpha, strategy, confidence, dict(zip(names, row, strict=True))))
            logger.debug(f"dispatch by {strategy}: {choice} (confidence {confidence:.2f})")
    return mixtures


def check_strategy(library: ExpertLibrary, strategy: str) -> None:
    """Raise a `ValueError` for a strategy that does not exist, or that needs a classifier where there is none."""
    if strategy not in STRATEGIES:
        raise ValueError(f"There is no dispatch strategy {strategy!r}: choose {' or '.join(map(repr, STRATEGIES))}.")
    if strategy == "classifier" and library.classifier is None:
        raise ValueError("strategy='classifier' needs a classifier expert: pass classifier=... with the experts.")


def few_shot(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    task: Task | None = None,
    population: int = 32,
    iterations: int = 50,
    elites: float = 0.2,
    seed: int = 0,
    batch_size: int = 32,
    normalize: bool = False,
    **generation: Any,
) -> Mixture:
    """
    Search mixture weights on a few solved examples by the cross-entropy method.

    The first population holds the base model and each single expert, so the result is never worse than these on the
    examples. On anything else it may be: look at rows that were not among them.

    Args:
        library ([`~library.ExpertLibrary`]):
            The experts.
        tokenizer (`PreTrainedTokenizerBase`):
            Of the base model.
        examples (`Sequence[Mapping]`):
            All of one form. `{"prompt", "choices", "label"}`: scored by the share of right choices, ties by the
            log-probability of the right one. `{"prompt", "answer"}` with a `task`: by the task's check of a greedy
            completion, ties by the log-likelihood of the answer. Without a task: by the latter alone.
        task ([`~tasks.Task`], *optional*):
            Checks completions; not asked about choices.
        population, iterations, elites, seed:
            Of the search, see [`~cem.cross_entropy_method`]; the defaults are the paper's code's. A population has
            room for the base, each expert and their mean.
        batch_size (`int`):
            Rows per forward; one forward scores several candidates, each row under its own mixture.
        normalize (`bool`):
            Divide the weights by their sum. By default what is left of 1 belongs to the base model.
        generation:
            Arguments of `generate`, only where completions are checked.

    Returns:
        [`~expert.Mixture`] with the settings and the history of the search in `provenance`.

    Raises:
        `ValueError`: if there are no examples, one has neither choices with a label nor an answer or another form than
            the first, or the population is too small.
        `TypeError`: for arguments of `generate` where nothing is generated.
    """
    if not examples:
        raise ValueError(
            "Few-shot adaptation needs examples: dicts with 'prompt' and 'answer', or 'choices' and 'label'."
        )
    form = "choices" if "choices" in examples[0] else "answer"
    for i, example in enumerate(examples):
        if "prompt" not in example or not ({"choices", "label"} <= set(example) or "answer" in example):
            raise ValueError(
                f"Example {i} needs 'prompt' and 'answer', or 'choices' and 'label'; it has {list(example)}."
            )
        if form not in example or (form == "answer" and "choices" in example):
            raise ValueError(f"Example {i} has another form than example 0, which has {form!r}: adapt to one form.")
        if form == "choices" and not (
            len(example["choices"]) > 1 and example["label"] in range(len(example["choices"]))
        ):
            raise ValueError(
                f"Example {i} needs at least 2 choices and as label the place of the right one, from 0; it has "
                f"{len(example['choices'])} choices and label {example['label']!r}."
            )
        if form == "answer" and not (isinstance(example["answer"], str) and example["answer"]):
            raise ValueError(f"Example {i} needs an answer that is a text, got {example['answer']!r}.")
    checked = form == "answer" and task is not None
    if generation and not checked:
        raise TypeError(f"few_shot does not know {', '.join(generation)}: these examples need no generation.")
    names = library.names
    if population < len(names) + 2:
        raise ValueError(
            f"A population of {population} is too small: with {len(names)} experts it takes {len(names) + 2} or more."
        )

    def mixture(vector: np.ndarray) -> Mixture:
        total = float(vector.sum())
        weights = vector / total if normalize and total > 0 else vector
        return Mixture(dict(zip(names, weights.tolist(), strict=True)), "few-shot")

    def scores(members: np.ndarray) -> list[tuple[float, ...]]:
        mixtures = [mixture(member) for member in members]
        if task is not None and checked:
            return [_checked(library, tokenizer, m, examples, task, generation) for m in mixtures]
        return _scored(library, tokenizer, mixtures, examples, batch_size)

    bar = tqdm(total=iterations, desc="Searching mixture weights", name="peft_svf.adaptation")

    def progress(state: Search) -> None:
        bar.update()
        bar.set_postfix(best=f"{state.score[0]:.3f}")

    with bar:
        found = cross_entropy_method(
            scores,
            len(names),
            population=population,
            iterations=iterations,
            elites=elites,
            seed=seed,
            starts=[[0.0] * len(names), *np.eye(len(names)).tolist()],
            on_iteration=progress,
        )
    settings = {"population": population, "iterations": iterations, "elites": elites, "seed": seed}
    settings |= {"normalize": normalize, "examples": len(examples)}
    result = mixture(found.best)
    provenance = {**settings, "score": list(found.score), "history": found.history}
    return Mixture(result.alpha, "few-shot", 1.0, {}, provenance)


def _question(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> str:
    """The text that is to be classified: the last user message, bounded."""
    if not isinstance(prompt, str):
        users = [message for message in prompt if message.get("role") == "user"] or list(prompt)
        content = users[-1]["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part.get("text")]
        prompt = " ".join(texts)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return prompt if len(ids) <= QUESTION_TOKENS else tokenizer.decode(ids[:QUESTION_TOKENS], skip_special_tokens=True)


def _scored(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    mixtures: Sequence[Mixture],
    examples: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[tuple[float, ...]]:
    """Score every mixture on every example, many of both in one forward: share right, then mean log-probability."""
    several = "choices" in examples[0]
    rows = examples if several else [{**e, "choices": [e["answer"]], "label": 0} for e in examples]
    pairs = [(m, e) for e in range(len(rows)) for m in range(len(mixtures))]  # one example's rows side by side
    right, logp = np.zeros((len(mixtures), len(rows))), np.zeros((len(mixtures), len(rows)))
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        with torch.no_grad(), library.activate([mixtures[m] for m, _ in batch]) as model:
            logps = choice_logps(model, tokenizer, [rows[e] for _, e in batch], share_prefix=False)
        logps = logps.log_softmax(-1) if several else logps
        for (m, e), row in zip(batch, logps.tolist(), strict=True):
            label = rows[e]["label"]
            right[m, e] = several and row[label] == max(row)
            logp[m, e] = row[label]
    return [(float(right[m].mean()), float(logp[m].mean())) for m in range(len(mixtures))]


def _checked(
    library: ExpertLibrary,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    examples: Sequence[Mapping[str, Any]],
    task: Task,
    generation: dict[str, Any],
) -> tuple[float, ...]:
    """Score one mixture by the task's check of greedy completions; ties by the answers' log-likelihood."""
    with library.activate(mixture) as model:
        summary = evaluate(model, tokenizer, examples, batch_size=len(examples), task=task, **generation)
    return summary.accuracy, _scored(library, tokenizer, [mixture], examples, len(examples))[0][1]
