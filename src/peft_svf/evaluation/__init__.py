# SPDX-License-Identifier: Apache-2.0
"""
Model and rows -> scored records and their summary.

A row of the choice form has `prompt`, `choices` and `label`; the policy over its choices is the softmax of their
summed token log-likelihoods as the assistant's answer. A row of any other form has `prompt`, and its task grades the
completion; it may have a picture in its column `image`, or several in `images`, which a processor reads. Training
differentiates `choice_logps`, and the first pass scores labels with it.
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import NormalDist, fmean, pstdev
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from ..rows import Prompt, Reader, Row, check, encode, has_image, pad_id, prompt_ids, prompt_of, tokenizer_of
from ..tasks import Task, get_task
from ..tasks.task import ANSWER_TOKENS, form_of, rotated, user_turn
from .reading import context_of as context_of
from .reading import evaluating, read_on, read_prompts, repeated, shared_prompts, unwrapped

NINETY_FIVE = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Summary:
    """
    The accuracy of a model on rows.

    Args:
        task (`str`): Name of the task.
        form (`str`): Form of the rows, such as `"choice"` or `"generate"`.
        n (`int`): Number of questions.
        accuracy (`float`): Mean grade of the rows: the share answered right, or the task's own such as VQA accuracy.
        interval (`tuple[float, float]`): 95 % Wilson interval of the accuracy; grades between 0 and 1 vary less.
        seconds (`float`): Wall clock.
        records (`list[dict]`): Per question `id`, `right`, and the choice with its probability, or the completion with
            its `score`, the grade from 0 to 1. With rotations the mean `score`, and a list of `completions`.
        balanced_accuracy (`float`, *optional*): Mean of the classes' recalls, if the answers are classes: at most 20
            letters or labels, each of five rows or more on average.
        classes (`dict[str, dict[str, int]]`): By class, how many rows have it as their answer (`n`), how many of these
            are answered right, and how many rows are `answered` by it.
    """

    task: str
    form: str
    n: int
    accuracy: float
    interval: tuple[float, float]
    seconds: float
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    balanced_accuracy: float | None = None
    classes: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)

    def to_json(self, records: bool = False) -> dict[str, Any]:
        """Return the summary as JSON values, with or without its records."""
        return {key: value for key, value in asdict(self).items() if records or key != "records"}


def wilson(right: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of `right` successes, or a sum of grades from 0 to 1, in `n` trials."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, NINETY_FIVE**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NINETY_FIVE * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(one: Summary, other: Summary) -> tuple[float, tuple[float, float]]:
    """
    Compare two models on the same rows: `one - other` in accuracy with the 95 % normal interval of paired differences.

    Raises:
        `ValueError`: if the summaries are of different rows.
    """
    if [r["id"] for r in one.records] != [r["id"] for r in other.records] or not one.n:
        raise ValueError(f"Only summaries of the same rows compare: {one.task} ({one.n}), {other.task} ({other.n}).")
    gaps = [_grade(a) - _grade(b) for a, b in zip(one.records, other.records, strict=True)]
    mean, half = fmean(gaps), NINETY_FIVE * pstdev(gaps) / math.sqrt(one.n)
    half = max(half, 3 / one.n)  # rule of three, if all rows agree
    return mean, (max(-1.0, mean - half), min(1.0, mean + half))


def choice_logps(
    model: PreTrainedModel,
    tokenizer: Reader,
    rows: Sequence[Row],
    members: int = 1,
    prompts: Sequence[list[int]] | None = None,
) -> Tensor:
    """
    Compute the log-likelihood of each choice of each row, summed over its tokens. Gradients flow.

    If one choice begins another ("4", "48"), it could never be the less likely one: in such a row all choices end
    with the end of turn. Prompts are read once for their choices, and what all prompts begin with once for all rows.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model; gradient checkpointing must be off, because it drops the cache.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Its tokenizer, or its processor.
        rows (`Sequence[Mapping]`):
            Each with `prompt` (chat or text) and `choices` (texts); rows may have different numbers of choices.
        members (`int`):
            How many adapters the model has at once (`SVFLayer.rows` of as many offsets): each scores all rows.
        prompts (`Sequence[list[int]]`, *optional*):
            Token ids of the prompts; default those that the tokenizer makes.

    Returns:
        `torch.Tensor` of shape `(members * rows, choices)`, float32, the rows of the first member first; `-inf` if a
        row has fewer choices.

    Raises:
        `ValueError`: if a prompt or a choice is empty, if a row has an image, if a prompt with its longest choice
            exceeds the model's context, or if gradient checkpointing is on.
    """
    device = next(model.parameters()).device
    encoded, options = _encoded(tokenizer, rows)
    prompts = encoded if prompts is None else prompts
    longest, limit = max(_lengths(prompts, options)), context_of(model)
    if limit is not None and longest > limit:
        raise ValueError(f"A prompt and its choice have up to {longest} tokens, but the model's context is {limit}.")

    read = read_prompts(model, prompts, pad_id(tokenizer), members)
    first = read.logits.float().log_softmax(-1)  # (M * N, vocabulary): the first token of every choice
    places = [(n, k) for n, choices in enumerate(options) for k in range(len(choices))]
    places.sort(key=lambda place: len(options[place[0]][place[1]]))  # equal lengths share a forward
    scores = torch.full((members * len(rows), max(map(len, options))), float("-inf"), device=device)
    for group in _batches(places, len(rows)):
        flat = [options[n][k] for n, k in group] * members
        where = [(m * len(rows) + n, k) for m in range(members) for n, k in group]
        rows_of, column = torch.tensor(where, device=device).T
        length = max(map(len, flat))
        labels = torch.tensor([c + [-100] * (length - len(c)) for c in flat], device=device)  # (M * G, C) right-padded
        logps = first[rows_of, labels[:, 0]]
        if length > 1:
            both = torch.cat([read.mask[rows_of], (labels[:, :-1] >= 0).long()], dim=1)
            output = read_on(model, labels[:, :-1].clamp(min=0), both, repeated(read.cache, rows_of))
            rest = F.cross_entropy(output.logits.float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            logps = logps - rest.view(len(flat), length - 1).sum(-1)
        scores = scores.index_put((rows_of, column), logps)
    return scores


def _encoded(reader: Reader, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Encode the prompts, and the choices of each, which end with the end of turn if one begins another."""
    for number, row in enumerate(rows):
        check(row, where := f"Row {row.get('id', number)!r}")
        if has_image(row) or row.get("choices") is None:
            what = "an image" if has_image(row) else "no choices"
            raise ValueError(
                f"{where} has {what}: log-likelihoods are those of texts. Let the model write its answer, in a row "
                "without `choices` and in no search that scores given answers."
            )
    tokenizer = tokenizer_of(reader)
    end, options = tokenizer.eos_token_id, []
    for row in rows:
        choices = [tokenizer(text, add_special_tokens=False).input_ids for text in row["choices"]]
        begins = any(a is not b and b[: len(a)] == a for a in choices for b in choices)
        options.append([[*ids, end] for ids in choices] if begins and end is not None else choices)
    return prompt_ids(reader, [row["prompt"] for row in rows]), options


def _lengths(prompts: Sequence[list[int]], options: list[list[list[int]]]) -> list[int]:
    return [len(prompt) + max(map(len, choices)) for prompt, choices in zip(prompts, options, strict=True)]


def row_lengths(reader: Reader, rows: Sequence[Row]) -> list[int]:
    """Count the tokens of each row: of its prompt and its longest choice, if it has choices. Images count none."""
    if rows and "choices" in rows[0]:
        return _lengths(*_encoded(reader, rows))
    return [len(ids) for ids in prompt_ids(reader, [row["prompt"] for row in rows])]


def evaluate(
    model: PreTrainedModel,
    tokenizer: Reader,
    rows: Sequence[Row],
    batch_size: int = 16,
    task: Task | None = None,
    rotations: int = 1,
    **generation: Any,
) -> Summary:
    """
    Answer rows greedily and score them.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model, with the adapters it is to answer with; it may see images.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Its tokenizer; rows with images need its processor.
        rows (`Sequence[Mapping]`):
            Rows of one form, see the module docstring. A picture is a PIL image, the name of a file, or
            `{"path", "bytes"}` as `datasets` has it undecoded; it is opened with its batch. It belongs to an image
            part of the prompt, or precedes the first user's text if the contents are strings, as in TRL.
        batch_size (`int`):
            Rows per forward.
        task ([`Task`], *optional*):
            Grades completions; default the task that each row names.
        rotations (`int`, defaults to 1):
            Ask each question of the form "letter" so many times, each time with its options moved by one place. The
            accuracy is the mean over all; its interval counts questions, not rotations.
        generation:
            As in [`complete`], for rows whose answers are written; `max_new_tokens` follows their form.

    Raises:
        `ValueError`: without rows, and for what [`choice_logps`] or [`prompt_of`] refuses.
    """
    if not rows:
        raise ValueError("There are no rows to evaluate.")
    for number, row in enumerate(rows):
        check(row, f"Row {row.get('id', number)!r}")
    start, form = time.perf_counter(), form_of(rows[0])
    if rotations > 1:
        rows = [rotated(row, places) for row in rows for places in range(rotations)]
    if "generation_config" not in generation:
        generation.setdefault("max_new_tokens", ANSWER_TOKENS.get(form))
    by_place = dict[int, dict[str, Any]]()
    order = sorted(range(len(rows)), key=lambda i: len(str(rows[i]["prompt"])))  # less padding
    bar = tqdm(order, desc="Evaluating", leave=False, name="peft_svf.evaluation")
    with evaluating(model):
        for places in _batches(bar, batch_size):
            batch = [rows[i] for i in places]
            if form == "choice":
                records = score_choices(choice_logps(model, tokenizer, batch), batch)
            else:
                with shared_prompts(model):
                    texts = complete(model, tokenizer, [prompt_of(row) for row in batch], **generation)
                records = [_graded(text, row, task) for text, row in zip(texts, batch, strict=True)]
            by_place.update(zip(places, records, strict=True))
    records = [by_place[i] for i in range(len(rows))]
    balanced, classes = _by_class(rows, records, task)
    if rotations > 1:
        records = [_mean(group) for group in _batches(records, rotations)]
    right, n, seconds = sum(map(_grade, records)), len(records), time.perf_counter() - start
    name = task.name if task is not None else str(rows[0].get("task", "rows"))
    return Summary(name, form, n, right / n, wilson(right, n), seconds, records, balanced, classes)


def _by_class(rows: Sequence[Row], records: Sequence[Mapping[str, Any]], task: Task | None) -> tuple[Any, Any]:
    """Compute balanced accuracy and counts as [`Summary`] has them; `None` and nothing if answers aren't classes."""
    answers = [str(row["choices"][row["label"]] if "choices" in row else row.get("answer")) for row in rows]
    labels = sorted(set(answers))
    same = all(sorted(row.get("choices", labels)) == labels for row in rows)
    if not same or not 1 < len(labels) <= min(20, len(rows) // 5):
        return None, {}
    counts = {label: {"n": 0, "right": 0, "answered": 0} for label in labels}
    for row, record, answer in zip(rows, records, answers, strict=True):
        counts[answer]["n"] += 1
        counts[answer]["right"] += record["right"]
        if "choices" in row:
            counts[row["choices"][record["choice"]]]["answered"] += 1
            continue
        grades = ((label, _graded(record["completion"], {**row, "answer": label}, task)) for label in labels)
        if chosen := next((label for label, grade in grades if grade["right"]), None):
            counts[chosen]["answered"] += 1
    return fmean(count["right"] / count["n"] for count in counts.values()), counts


def _mean(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the records of one question's rotations."""
    score = fmean(map(_grade, group))
    return {"id": group[0]["id"], "completions": [r["completion"] for r in group], "right": score == 1, "score": score}


def confidence_of(best: float, n: int) -> float:
    """Rescale the largest of `n` probabilities, from 0 (a guess) to 1 (certain), as transformers' decisions do."""
    return min(1.0, max(0.0, (best - 1 / n) / (1 - 1 / n))) if n > 1 else 1.0


def score_choices(logps: Tensor, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Turn the log-likelihoods `(rows, choices)` into records: the likeliest choice, its probability, right or not."""
    confidence, choice = logps.softmax(-1).max(-1)
    return [
        {"id": row.get("id"), "choice": k, "probability": p, "right": k == row["label"]}
        for row, k, p in zip(rows, choice.tolist(), confidence.tolist(), strict=True)
    ]


def _graded(text: str, row: Row, task: Task | None) -> dict[str, Any]:
    score = (task or get_task(row["task"])).grade(text, row)
    return {"id": row.get("id"), "completion": text, "right": score == 1, "score": score}


def _grade(record: Mapping[str, Any]) -> float:
    return float(record.get("score", record["right"]))


def complete(model: PreTrainedModel, reader: Reader, prompts: Sequence[Prompt], **generation: Any) -> list[str]:
    """
    Complete a batch of prompts; return texts without special tokens.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            With the adapters it is to answer with.
        reader (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Its tokenizer, with or without a pad token; chats with image parts need its processor.
        prompts (`Sequence[str | list[dict]]`):
            Texts or chats; [`prompt_of`] puts the pictures of a row into its chat.
        generation:
            Arguments of `generate`; default `max_new_tokens=256`, no sampling. A `generation_config` replaces these.

    Raises:
        `ValueError`: if a prompt is empty, or has a picture and `reader` is a tokenizer.
    """
    inputs = encode(reader, prompts)
    if "pixel_values" in inputs:
        inputs = inputs.to(dtype=unwrapped(model).dtype)
    inputs = inputs.to(next(model.parameters()).device)
    config, pad = copy.copy(generation.pop("generation_config", None)), pad_id(reader)
    if config is None:
        generation = {"max_new_tokens": 256, "do_sample": False, "pad_token_id": pad, **generation}
    elif config.pad_token_id is None:
        config.pad_token_id = pad
    output = model.generate(**inputs, generation_config=config, **generation)
    return tokenizer_of(reader).batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def base_answers(
    base: PreTrainedModel, reader: Reader, prompts: Sequence[Prompt], tokens: int
) -> list[dict[str, Any]]:
    """
    Let a base answer prompts greedily, with so many tokens at most; texts become users' turns.

    Returns:
        Rows of the choice form: `prompt`, and the answer as the only one of `choices`. Empty answers have none.

    Raises:
        `ValueError`: if all answers are empty.
    """
    rows = [
        {"prompt": chat, "choices": [text]}
        for chats in tqdm([*_batches(map(user_turn, prompts), 16)], desc="The base answers", leave=False)
        for chat, text in zip(chats, complete(base, reader, chats, max_new_tokens=tokens), strict=True)
        if text.strip()
    ]
    if not rows:
        raise ValueError(f"The base answers none of {len(prompts)} prompts, so there is no text to compare with.")
    return rows


@dataclass(frozen=True)
class BaseText:
    """
    What a base answers to prompts outside a task: the measure of what an adapter leaves of it.

        with model.disable_adapter():
            text = BaseText.of(model, tokenizer, everyday_requests("test", 32))
        text.loss(model, tokenizer)  # 0.013: its own answers are 1.3 % less likely per token

    Args:
        rows (`list[dict]`): `prompt`, and the greedy answer in `choices`.
        tokens (`int`): Of all answers.
        logp (`float`): Mean log-likelihood of a token of the answers under the base.
    """

    rows: list[dict[str, Any]]
    tokens: int
    logp: float

    @classmethod
    def of(cls, base: PreTrainedModel, reader: Reader, prompts: Sequence[Prompt], tokens: int = 48) -> "BaseText":
        """Let a base answer, as [`base_answers`] does, and measure how likely it finds its answers."""
        rows, encode = base_answers(base, reader, prompts, tokens), tokenizer_of(reader)
        count = sum(len(encode(row["choices"][0], add_special_tokens=False).input_ids) for row in rows)
        return cls(rows, count, _total_logp(base, reader, rows) / count)

    def loss(self, model: PreTrainedModel, reader: Reader) -> float:
        """Return the share by which the mean log-likelihood of the answers is lower under an adapted model."""
        return _total_logp(model, reader, self.rows) / self.tokens / self.logp - 1


def _total_logp(model: PreTrainedModel, reader: Reader, rows: Sequence[Row]) -> float:
    with evaluating(model):
        return sum(float(choice_logps(model, reader, batch).sum()) for batch in _batches(rows, 16))


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
