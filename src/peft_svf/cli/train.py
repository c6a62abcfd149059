# SPDX-License-Identifier: Apache-2.0
"""`train`: a YAML file -> an expert with its card, by rewards, right answers or evolution strategies, or a dry run."""

import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .console import command, interval, show_table
from .options import option
from .sources import find_task, load_model, rows_of
from .train_config import PARTS, Settings, read_settings, svf_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..rows import Reader, Row
    from ..tasks import Task
    from ..training import (
        EvolutionConfig,
        EvolutionTrainer,
        ReinforceConfig,
        ReinforceTrainer,
        SupervisedConfig,
        SupervisedTrainer,
    )
    from ..tuner.config import SVFConfig

Config: TypeAlias = "ReinforceConfig | SupervisedConfig | EvolutionConfig"
Trainer: TypeAlias = "ReinforceTrainer | SupervisedTrainer | EvolutionTrainer"
Rows: TypeAlias = "Mapping[str, Sequence[Row]]"

STEPS = 24  # at least, from right answers: few rows are read again, for 3 epochs of 30 rows teach next to nothing
SAMPLE = 16  # rows that the base answers in a dry run
KEYS = [f"- `{key.name}`: {key.metadata['help']}" for part in PARTS for key in fields(part)]
HELP = "\n".join(
    [
        "Keys of CONFIG.yaml (`--key value` after the file overrides one; `env:` sets environment variables):\n",
        *KEYS,
        "- `output_dir`: Folder of the expert; its checkpoints are in it.",
        "- `max_steps`, `learning_rate`, `per_device_train_batch_size`, `max_completion_length`, `seed`, "
        "`eval_strategy`, `save_steps`, `load_best_model_at_end`, `report_to`, and all other fields of TRL's "
        "GRPOConfig (`num_generations`, `beta`, `temperature`, ...), with sft of TRL's SFTConfig, with evolution of "
        "transformers' TrainingArguments (and `population`, `sigma`, `shaping`).",
        "- `retention`, `retention_rows`: Weight of a penalty for moving away from the base's own answers to everyday "
        "requests, and how many of these a step takes. Not with evolution.",
        "- `keep_text`: Stop at an evaluation if those answers are less likely by more than this share, such as 0.02.",
        "- `early_stopping_patience`: Stop after so many evaluations without a better one.\n",
        "Several devices: `torchrun --nproc_per_node 2 -m peft_svf.cli train CONFIG.yaml`.",
    ]
)


def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="Settings; `--key value` overrides one.")],
    dry_run: Annotated[
        bool, option("Show a row, its prompt, how the base does, and minutes; train nothing.", "--dry-run")
    ] = False,
    resume: Annotated[bool, option("Continue from output_dir's newest checkpoint.", "--resume")] = False,
) -> int:
    """
    Train an expert as a YAML file describes it, test it, write its card.

    Ctrl-C finishes the step and saves a checkpoint, from which --resume continues; a second Ctrl-C ends at once.
    """
    from ..rows import tokenizer_of
    from ..tasks.task import ANSWER_TOKENS, form_of

    settings = read_settings(config, context.args)
    source, args = settings.model, settings.training
    checkpoint = _checkpoint("true" if resume else args.resume_from_checkpoint, args, dry_run)
    task = find_task(settings.script.task)
    rows = _rows(task, settings)
    if "max_completion_length" not in settings.given:
        args.max_completion_length = ANSWER_TOKENS.get(form_of(rows["train"][0]), args.max_completion_length)
    if settings.script.algorithm == "sft" and not {"max_steps", "num_train_epochs"} & settings.given.keys():
        read = args.train_batch_size * args.gradient_accumulation_steps * args.world_size  # rows a step
        args.max_steps = STEPS if args.num_train_epochs * len(rows["train"]) < STEPS * read else args.max_steps
    trust = getattr(args, "trust_remote_code", False)  # a field of TRL's configs alone
    model, reader = load_model(
        source.model_name_or_path, source.model_revision, source.dtype, device=args.device, trust=trust
    )
    if settings.script.algorithm == "evolution":
        reader = tokenizer_of(reader)  # it scores texts: rows with images are refused below
    svf = svf_config(settings.svf, model, task.description, supervised=settings.script.algorithm == "sft")
    if args.process_index == 0:
        form = form_of(rows["train"][0])
        print(f"{task.name}, {form} form: " + ", ".join(f"{len(some)} {split}" for split, some in rows.items()))
    _check_rows(model, reader, task, rows, args)
    if dry_run:
        _show_cost(model, reader, rows["train"], args, _show_sample(model, reader, task, rows["train"], args))
        return 0
    trainer = make_trainer(model, reader, task, rows, args, svf)
    trainer.routing = settings.script.routing
    return _run(trainer, task, rows["test"], settings, checkpoint, context.obj)


def _run(
    trainer: Trainer, task: "Task", test: "Sequence[Row]", settings: Settings, checkpoint: str | None, argv: list[str]
) -> int:
    """Train, test and write the expert that the command `argv` describes."""
    from ..training.result import write_expert

    if trainer.is_fsdp_enabled:
        raise ValueError("peft-svf train tests in one process: with FSDP, use a script with ReinforceTrainer.")
    args, start = trainer.args, time.perf_counter()
    with _stopping(trainer) as stopped:
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds, state = time.perf_counter() - start, trainer.state
    interrupted = stopped and state.global_step < state.max_steps
    if interrupted and args.process_index == 0:
        again = command([*argv, *([] if "--resume" in argv else ["--resume"])])
        print(f"Stopped after step {state.global_step} of {state.max_steps}, which is saved. Go on with: {again}")
    elif args.process_index == 0:
        print(f"Testing expert and base on {len(test)} rows that were never trained on ...", flush=True)
        result = write_expert(
            trainer,
            task,
            test,
            args.output_dir,
            command=command(argv),
            settings=settings.given,
            seconds=None if checkpoint else seconds,  # a resumed run knows only its last part
            base_model=settings.script.base_model,
            license=settings.script.license,
            batch_size=args.per_device_eval_batch_size,
            **({} if "choices" in test[0] else {"max_new_tokens": args.max_completion_length}),
        )
        _show_result(result, args.output_dir)
    trainer.accelerator.wait_for_everyone()
    return 130 if interrupted else 0  # as a shell reports a command that Ctrl-C ended


def _checkpoint(chosen: str | None, config: Config, dry_run: bool) -> str | None:
    """Find the checkpoint to go on from; refuse a folder that holds another run."""
    from ..training.result import RESULT_NAME
    from ..training.run import ended, last_checkpoint

    folder = Path(config.output_dir)
    if chosen and chosen.lower() != "false":  # as a YAML file has it
        checkpoint = last_checkpoint(folder) if chosen.lower() == "true" else Path(chosen)
        finished = ended(checkpoint, config)  # also refuses what isn't a checkpoint
        if finished and (folder / RESULT_NAME).exists():
            raise ValueError(finished)
        return str(checkpoint)
    if not dry_run and (any(folder.glob("checkpoint-*")) or (folder / "adapter_config.json").exists()):
        ways = "go on with it by --resume, or name another folder by --output_dir"
        raise ValueError(f"output_dir {str(folder)!r} holds another run already: {ways}.")
    return None


def _rows(task: "Task", settings: Settings) -> "dict[str, list[dict[str, Any]]]":
    """Make the rows of the splits that a run needs; its seed shuffles the training rows."""
    script, config = settings.script, settings.training
    learns = script.algorithm == "sft"  # from answers, which the generated form has
    form = script.form or ("generate" if learns and "generate" in task.forms else task.forms[0])
    limits = {"train": script.train_rows, "test": script.test_rows}
    if config.eval_strategy != "no":
        limits["validation"] = script.eval_rows
    options = {"system": script.system, "shots": script.shots, "solved": learns}
    return {
        split: rows_of(task, split, form, limit, seed=config.seed if split == "train" else 0, **options)
        for split, limit in limits.items()
    }


def _check_rows(model: "PreTrainedModel", reader: "Reader", task: "Task", rows: Rows, config: Config) -> None:
    """Refuse rows that would end a run hours later: too few for a step, or too long, test rows among them."""
    from ..evaluation import context_of, row_lengths

    if check := getattr(config, "check_rows", None):
        check(len(rows["train"]))
    limit = context_of(model) or math.inf
    answer = 0 if "choices" in rows["train"][0] else 1  # at least one token is written
    for split, some in rows.items():
        for row, length in zip(some, row_lengths(reader, some), strict=True):
            if length + answer > limit:
                what = "its prompt alone has" if answer else "its prompt and longest choice have"
                many = f"{what} {length} tokens, but the model's context is {limit}"
                raise ValueError(f"{task.place(split, row)}: {many}. Shorten or drop such rows.")


def table_of(rows: "Sequence[Row]") -> Any:
    """Make a `datasets.Dataset` of rows; if some chats have parts, all get them, as a column has one type."""
    from datasets import Dataset, Image

    from ..rows import in_parts

    chats = [row["prompt"] for row in rows if not isinstance(row["prompt"], str)]
    if any(isinstance(message.get("content"), list) for chat in chats for message in chat):
        rows = [{**row, "prompt": in_parts(row)} for row in rows]
    table = Dataset.from_list(list(map(dict, rows)))
    return table.cast_column("image", Image()) if "image" in table.column_names else table  # decoded on access


def make_trainer(
    model: "PreTrainedModel", reader: "Reader", task: "Task", rows: Rows, config: Config, svf: "SVFConfig"
) -> Trainer:
    """Make the trainer that a config belongs to."""
    from ..training import EvolutionConfig, EvolutionTrainer, ReinforceTrainer, SupervisedConfig, SupervisedTrainer

    train, validation = rows["train"], rows.get("validation")
    settings: dict[str, Any] = {"peft_config": svf, "processing_class": reader}
    if isinstance(config, EvolutionConfig):
        return EvolutionTrainer(model, task.reward, config, train, validation, **settings)
    validation = validation and table_of(validation)
    if isinstance(config, SupervisedConfig):
        return SupervisedTrainer(model, config, table_of(train), validation, reward_funcs=task.reward, **settings)
    return ReinforceTrainer(model, task.reward, config, table_of(train), eval_dataset=validation, **settings)


@contextmanager
def _stopping(trainer: Trainer) -> Iterator[list[int]]:
    """Let Ctrl-C finish the step, because no checkpoint inside one resumes exactly; yields the signals received."""
    from transformers import TrainerCallback

    caught: list[int] = []
    if trainer.args.world_size > 1:  # the signal may reach processes in different steps, which then deadlock
        yield caught
        return

    def on_signal(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print("\nFinishing this step, then saving. Ctrl-C again ends at once.", file=sys.stderr, flush=True)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if caught:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(Stop())
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _show_sample(
    model: "PreTrainedModel", reader: "Reader", task: "Task", rows: "Sequence[Row]", config: Config
) -> float:
    """Print a row, its prompt as the model reads it, and how well the base answers some; return seconds a row."""
    from ..evaluation import evaluate
    from ..rows import prompt_text
    from ..training import SupervisedConfig

    row, some = rows[0], rows[:SAMPLE]
    print("\nThe first row:\n" + json.dumps(row, indent=1, ensure_ascii=False, default=repr))
    print(f"\nIts prompt as the model reads it:\n{prompt_text(reader, row['prompt'])}")
    generation = {} if "choices" in row else {"max_new_tokens": config.max_completion_length}
    summary = evaluate(model, reader, some, len(some), task, **generation)
    if generation:
        print(f"\nThe base's answer to it:\n{summary.records[0]['completion']}")
    print(f"\nThe base is right on {summary.accuracy:.0%} of the first {len(some)} training rows.")
    if summary.accuracy in (0, 1) and not isinstance(config, SupervisedConfig):
        print("If all answers to a question earn the same reward, it teaches nothing: take an easier or harder task.")
        if generation and not summary.accuracy:
            print("`algorithm: sft` learns from right answers instead.")
    return summary.seconds / len(some)


def _show_cost(
    model: "PreTrainedModel", reader: "Reader", rows: "Sequence[Row]", config: Config, seconds: float
) -> None:
    """Print an estimate of a run from the lengths of 100 rows, and the `seconds` that the base takes to answer one."""
    from ..evaluation import row_lengths
    from ..training import SupervisedConfig

    supervised, population = isinstance(config, SupervisedConfig), getattr(config, "population", None)
    answers = 1 if supervised else population or config.num_generations
    questions = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    questions = getattr(config, "generation_batch_size", questions * answers) // answers
    epoch = max(1, len(rows) // questions)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch)
    if supervised:
        kept = config.retention_rows * config.world_size if config.retention else 0
        minutes = _reading_seconds(model, reader, rows[:SAMPLE]) * steps * (3 * questions + 4 * kept) / 60
        what = f"{questions} right answers and {kept} everyday answers of the base"
    else:
        some = rows[:100]
        prompt = sum(row_lengths(reader, some)) / len(some)
        answer = 0 if "choices" in some[0] else config.max_completion_length
        # A sample costs as much as three readings of it, forward and back; members of a population share no prompt.
        read = answers * (prompt + answer) if population else 4 * (prompt + answers * answer)
        minutes = seconds * steps * questions * read / (prompt + answer) / 60
        what = f"{questions} questions x {answers} answers of at most {answer or 1} tokens"
    print(
        f"\nCost: {steps} steps x {what}: about {minutes:.1f} minutes at the pace of these rows, without evaluations."
    )


def _reading_seconds(model: "PreTrainedModel", reader: "Reader", rows: "Sequence[Row]") -> float:
    """Measure how long the base takes to read a row with its right answer; refuse a row that has none."""
    import torch

    from ..rows import encode, prompt_text
    from ..training.supervised import right_answer

    texts = [prompt_text(reader, row["prompt"]) + right_answer(row, f"Row {row['id']!r}") for row in rows]
    inputs, start = encode(reader, texts).to(model.device), time.perf_counter()
    with torch.no_grad():
        model(**inputs)
    return (time.perf_counter() - start) / len(rows)


def _show_result(result: Mapping[str, Any], folder: str) -> None:
    """Print the gain, and the folder that holds the expert."""
    lines = [
        [name, f"{result[name]['accuracy']:.3f}", interval(result[name]["interval"])] for name in ("base", "expert")
    ]
    lines.append(["gain", f"{result['gain']:+.3f}", interval(result["gain_interval"], "+")])
    print()
    show_table(["", "accuracy", "95 % interval"], lines)
    duration = "" if result["seconds"] is None else f" in {result['seconds']} s"
    best = f", the best was {result['best_step']}" if result["best_step"] else ""
    print(f"{result['task']}, n = {result['expert']['n']}; {result['steps']} steps{duration}{best}")
    if result["text_loss"] is not None:
        change = "less" if result["text_loss"] > 0 else "more"
        print(f"Everyday answers of the base are {abs(result['text_loss']):.1%} {change} likely per token.")
    z = result["z"]
    mean, largest = z["mean_distance_from_1"], z["max_distance_from_1"]
    print(f"{z['numbers']:,} multipliers z: mean |z-1| {mean:.4f}, largest {largest:.4f}")
    if largest == 0:
        print("z has not moved: this is the base model. If reward_std in result.json is 0, all answers to a question")
        print("earned the same reward, which teaches nothing: `algorithm: sft` learns from right answers instead.")
    print(f"Wrote {folder}: offsets, result.json, README.md. Next: peft-svf inspect {shlex.quote(folder)}")
