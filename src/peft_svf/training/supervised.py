# SPDX-License-Identifier: Apache-2.0
"""
Model and solved rows -> a trained z-vector expert, by the next-token loss on right answers.

A thin subclass of TRL's `SFTTrainer`: tokens, loss, logging and checkpoints are TRL's. It adds rows of tasks, the
penalty of [`retention`], and an evaluation of written answers. docs/results.md measures the defaults.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation import context_of
from ..rows import Reader, Row, has_image, prompt_text, tokenizer_of
from .objective import SFTConfig  # names the extra if TRL is missing
from .retention import Retaining, RetentionConfig
from .run import SHOWN, Graded, columns_of, z_statistics

from trl import SFTTrainer  # isort: skip


@dataclass
class SupervisedConfig(RetentionConfig, SFTConfig):
    """
    TRL's `SFTConfig` for right answers and z-vectors, and the settings of [`RetentionConfig`].

    Args:
        max_completion_length (`int`): Tokens of an answer that is written in an evaluation.
        reward_weights (`list[float]`, *optional*): One per reward function; default 1 each.
        max_length (`int`, *optional*): As in TRL, but no row is cut off by default, as its answer is at the end.
    """

    measured = "(.+_)?(reward|loss)"
    learning_rate: float = 3e-3
    per_device_train_batch_size: int = 16
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    logging_steps: float = 1
    gradient_checkpointing: bool = False
    max_length: int | None = None
    eval_packing: bool | None = False
    retention: float = 20.0
    max_completion_length: int = 256
    reward_weights: list[float] | None = None

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        yield from super().rules()
        yield "eval_packing", not self.eval_packing, "False, as an evaluation reads rows"

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()


class SupervisedTrainer(Graded, Retaining, SFTTrainer):
    """
    Train z-vectors, or any PEFT adapter, on right answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`), args ([`SupervisedConfig`]):
            As in `SFTTrainer`; the penalty refers to the base, even if a `PeftModel` has been trained before.
        train_dataset, eval_dataset (`datasets.Dataset`):
            Rows with `prompt`, and with `solution`, `answer`, or `choices` and `label`; or any other that TRL takes.
        reward_funcs (`Callable` or `list`, *optional*):
            `(completions, **columns) -> list[float]`, such as `Task.reward`: an evaluation then has `eval_reward`, the
            mean reward of the likeliest choices, or of greedy answers to rows without `choices`.
        kwargs:
            Everything else that `SFTTrainer` takes.

    Raises:
        `ValueError`: if nothing would be trained, or all of a plain model; for a row without an answer, with an image,
            or longer than the model's context; if the best checkpoint is to be chosen by rewards that nothing grades.
    """

    objective = "next-token loss on right answers"
    _evaluated: Any = None  # rows of the evaluation that is going on
    shown = {"loss": "loss", "eval_loss": "validation loss"} | {k: v for k, v in SHOWN.items() if k != "entropy"}

    def __init__(
        self,
        model: Any,
        args: SupervisedConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        reward_funcs: Any = None,
        processing_class: Reader,
        **kwargs: Any,
    ) -> None:
        self.check_adapter(model, args, kwargs.get("peft_config"))
        self.grade_by(reward_funcs, args.reward_weights)
        if args.load_best_model_at_end and "reward" in str(args.metric_for_best_model) and not self.reward_funcs:
            raise ValueError(
                "The best checkpoint by reward needs reward_funcs; or set metric_for_best_model='eval_loss'."
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=solved(train_dataset, processing_class),
            eval_dataset=solved(eval_dataset, processing_class),
            processing_class=processing_class,
            **kwargs,
        )
        limit = context_of(self.model) or math.inf
        data: Any = self.train_dataset  # a stream has no length
        for number, ids in enumerate(data["input_ids"] if hasattr(data, "__len__") else ()):
            if len(ids) > limit:
                raise ValueError(
                    f"Row {number} of the data has {len(ids)} tokens with its answer, but the model's context is "
                    f"{limit}: shorten or drop it, or cut such rows off by max_length={limit}."
                )
        self.ready()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the mean reward of written answers to the metrics, before callbacks read them."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.reward_funcs and self._evaluated is not None:
            output.metrics[f"{kwargs['metric_key_prefix']}_reward"] = self.greedy_reward(self._evaluated)
        self._evaluated = None
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the loss on right answers and, with reward functions, the mean reward of written ones."""
        rows = solved(eval_dataset, self.processing_class)
        named = self.eval_dataset[rows] if isinstance(rows, str) else rows
        self._evaluated = self.eval_dataset if named is None else named
        return super().evaluate(rows, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the distance of z from 1 to what is logged while training."""
        super().log(logs | z_statistics(self.model) if "loss" in logs else logs, start_time)


def solved(rows: Any, reader: Reader) -> Any:
    """Give the rows of a task the columns that TRL reads, `prompt` and `completion`; data of another kind stay."""
    if isinstance(rows, Mapping):
        return {name: solved(part, reader) for name, part in rows.items()}
    columns = columns_of(rows)
    if "prompt" not in columns or "completion" in columns:
        return rows
    return rows.map(lambda row, number: _pair(row, number, reader), with_indices=True)


def right_answer(row: Row, where: str) -> str:
    """Return the text that a row teaches: its `solution`, its right choice, or its `answer`."""
    choices, label = row.get("choices"), row.get("label")
    answer = row.get("answer") if choices is None or label is None else choices[label]
    text = str(answer if row.get("solution") is None else row["solution"])
    if answer is None or not text.strip():
        raise ValueError(f"{where} has no right answer: add 'solution', 'answer', or 'label' to its 'choices'.")
    return text


def _pair(row: Row, number: int, reader: Reader) -> dict[str, Any]:
    where, prompt = f"Row {row.get('id', number)!r}", row["prompt"]
    if has_image(row):
        raise ValueError(f"{where} has an image: SupervisedTrainer reads text. ReinforceTrainer reads images.")
    answer = right_answer(row, where)
    if not isinstance(prompt, str) and tokenizer_of(reader).chat_template is not None:
        return {"completion": [{"role": "assistant", "content": answer}]}
    return {"prompt": prompt_text(reader, prompt), "completion": answer}
