# SPDX-License-Identifier: Apache-2.0
"""`train`: a YAML file -> an expert with its card, by policy gradients or evolution strategies, or a dry run."""

import argparse
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..rows import Reader, Row, has_image, in_parts, prompt_text, tokenizer_of
from .console import interval, short, size, table
from .sources import find_task, load_model, weights_of
from .train_config import ScriptArguments, read_settings, svf_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..tasks import Task
    from ..training.evolution import EvolutionConfig, EvolutionTrainer
    from ..training.reinforce import ReinforceConfig, ReinforceTrainer
    from ..tuner.config import SVFConfig

    Config = ReinforceConfig | EvolutionConfig
    Trainer = ReinforceTrainer | EvolutionTrainer

INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


def train(args: argparse.Namespace) -> int:
    """Train an expert, test it, write its card; with `--dry-run` show what that would be."""
    settings = read_settings(args.config, args.overrides)
    script, config = settings.script, settings.training
    checkpoint = _checkpoint(args, config)
    task = find_task(script.task)
    form = script.form or task.forms[0]
    rows = _rows(task, form, script, config)
    images = any(map(has_image, rows["train"]))
    if images and script.algorithm == "evolution":
        raise ValueError("algorithm: evolution scores texts, and these rows have images: set algorithm: reinforce.")
    source = settings.model
    model, reader = load_model(
        source.model_name_or_path,
        source.model_revision,
        source.dtype,
        images=images,
        device=config.device,
        trust_remote_code=getattr(config, "trust_remote_code", False),  # a field of TRL's alone
    )
    assert reader is not None
    svf = svf_config(settings.svf, model, task.description)
    loud = config.process_index == 0
    if loud:
        print(f"{task.name}, {form} form: " + ", ".join(f"{len(found)} {split}" for split, found in rows.items()))
    check_rows(model, reader, task, rows, config)
    if args.dry_run:
        show_sample(model, reader, task, rows["train"][0], config)
        show_cost(model, reader, rows, config, svf)
        return 0
    trainer = make_trainer(model, reader, task, rows, config, svf)
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "peft-svf train tests and saves in one process, which FSDP does not allow: use DDP, or a script with "
            "ReinforceTrainer (docs/how_to/distributed.md)."
        )
    _show_progress(trainer)
    start = time.perf_counter()
    with _stopping(trainer) as stopped:
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds, state = time.perf_counter() - start, trainer.state
    if stopped and state.global_step < state.max_steps:
        if loud:
            again = shlex.join(["peft-svf", "train", args.config, *args.overrides, "--resume"])
            print(f"Stopped after step {state.global_step} of {state.max_steps}, which is saved. Go on with: {again}")
        return INTERRUPTED
    if loud:
        from ..training.result import write_expert

        print(f"Testing expert and base on {len(rows['test'])} rows that were never trained on ...", flush=True)
        folder = Path(config.output_dir)
        result = write_expert(
            trainer,
            task,
            rows["test"],
            folder,
            command=args.command,
            settings=settings.given,
            seconds=None if checkpoint else seconds,  # of a part only
            base_model=script.base_model,
            license=script.license,
            batch_size=config.per_device_eval_batch_size,
            **({"max_new_tokens": config.max_completion_length} if form == "generate" else {}),
        )
        show_result(result, folder)
    trainer.accelerator.wait_for_everyone()
    return 0


def check_rows(
    model: "PreTrainedModel", reader: Reader, task: "Task", rows: Mapping[str, Sequence[Row]], config: "Config"
) -> None:
    """Raise a `ValueError` for rows that would end a run in its course: too few for a step, not alike, too long."""
    from ..evaluation import context_of, row_lengths
    from ..training.evolution import EvolutionConfig

    if not isinstance(config, EvolutionConfig):
        config.check_rows(len(rows["train"]))
        for split in rows:
            if split != "test":  # which is only read
                as_table(task, split, rows[split])
    limit = context_of(model)
    if limit is None:
        return
    choices = "choices" in rows["train"][0]
    lengths = [
        (task.place(split, row), length)
        for split, some in rows.items()
        for row, length in zip(some, row_lengths(reader, some), strict=True)
    ]
    what = "its prompt and longest choice" if choices else "its prompt alone"
    if long := [(place, length) for place, length in lengths if length + (not choices) > limit]:  # a token to answer
        raise ValueError(f"{_first(long, what)}, but the model's context is {limit}. Shorten or drop these rows.")
    answer = 0 if choices else config.max_completion_length or 0
    long = [(place, length + answer) for place, length in lengths if length + answer > limit]
    if long and config.process_index == 0:
        print(
            f"Warning: {_first(long, f'its prompt and max_completion_length={answer}')}, and the model's context is "
            f"{limit}. What it writes past it is poor, or an error where positions are learned: lower "
            "max_completion_length.",
            file=sys.stderr,
        )


def _first(long: Sequence[tuple[str, int]], what: str) -> str:
    """The first of the rows that are too long, and how many there are."""
    place, length = long[0]
    others = f" ({len(long) - 1} other rows are too long as well)" if len(long) > 1 else ""
    return f"{place}: {what} are {length} tokens{others}"


def as_table(task: "Task", split: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """
    Give the rows of a split as a table takes them: each field of one type, all contents of chats texts or all parts.

    Raises:
        `ValueError`: if a field has two types.
    """
    found = [dict(row) for row in rows]
    chats = [row["prompt"] for row in rows if not isinstance(row["prompt"], str)]
    if len({type(message.get("content")) for chat in chats for message in chat} - {type(None)}) > 1:
        found = [{**row, "prompt": in_parts(row)} for row in found]
    first: dict[str, tuple[str, Row]] = {}  # the type of a field, and the row that had it first
    for row in found:
        for field, kind in _kinds(row):
            before, there = first.setdefault(field, (kind, row))
            if before != kind:
                raise ValueError(
                    f"{task.place(split, row)}: {field!r} is {kind}, but {before} in {task.place(split, there)}: a "
                    "field has one type in all rows that are trained on. Write it alike, or leave it out."
                )
    return found


def _kinds(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """The types of a value and of all in it, by place; a table has one for each. What is null may be anything."""
    if isinstance(value, dict):
        yield field, "an object"
        for key, inner in value.items():
            yield from _kinds(inner, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        yield field, "a list"
        for inner in value:
            yield from _kinds(inner, f"{field}[]")
    elif value is not None:
        yield field, "a truth value" if isinstance(value, bool) else "a text" if isinstance(value, str) else "a number"


def make_trainer(
    model: "PreTrainedModel",
    reader: Reader,
    task: "Task",
    rows: Mapping[str, Sequence[Row]],
    config: "Config",
    svf: "SVFConfig",
) -> "Trainer":
    """Make the trainer that a config belongs to; what needs TRL is imported for its own config only."""
    from ..training.evolution import EvolutionConfig, EvolutionTrainer

    if isinstance(config, EvolutionConfig):
        return EvolutionTrainer(
            model,
            task.reward,
            config,
            rows["train"],
            rows.get("validation"),
            processing_class=tokenizer_of(reader),
            peft_config=svf,
        )
    from datasets import Dataset, Image

    from ..training.reinforce import ReinforceTrainer

    def dataset(split: str) -> Dataset:
        found = Dataset.from_list(as_table(task, split, rows[split]))
        return found.cast_column("image", Image()) if "image" in found.column_names else found  # decoded on access

    return ReinforceTrainer(
        model,
        task.reward,
        config,
        dataset("train"),
        eval_dataset=dataset("validation") if "validation" in rows else None,
        processing_class=reader,
        peft_config=svf,
    )


def _rows(task: "Task", form: str, script: ScriptArguments, config: "Config") -> "dict[str, list[dict[str, Any]]]":
    """Make the rows of the splits that a run needs; the seed of the run orders those it is trained on."""
    limits = {"train": script.train_rows, "validation": script.eval_rows, "test": script.test_rows}
    if config.eval_strategy == "no":
        del limits["validation"]
    rows = {}
    for split, limit in limits.items():
        rows[split] = task.rows(split, form, limit=limit, seed=config.seed if split == "train" else 0)
        if not rows[split]:
            raise ValueError(f"Task {task.name!r} has no {split} rows in the {form} form.")
    return rows


def _checkpoint(args: argparse.Namespace, config: "Config") -> str | None:
    """Name the checkpoint to go on from; refuse a folder that holds another run."""
    from ..training.result import RESULT_NAME
    from ..training.run import ended, last_checkpoint

    folder = Path(config.output_dir)
    wanted = args.resume or config.resume_from_checkpoint
    if wanted and str(wanted).lower() != "false":  # as a file's word comes
        found = last_checkpoint(folder) if str(wanted).lower() in ("last", "true") else Path(wanted)
        finished = ended(found, config)  # also refuses what is no checkpoint
        if finished and (folder / RESULT_NAME).exists():
            raise ValueError(finished)
        return str(found)
    if not args.dry_run and (any(folder.glob("checkpoint-*")) or (folder / "adapter_config.json").exists()):
        raise ValueError(
            f"output_dir {str(folder)!r} holds another run already: go on with it by --resume, or name another folder "
            "by --output_dir."
        )
    return None


def _show_progress(trainer: "Trainer") -> None:
    """Put a short line in the place of transformers' dict of thirty numbers, which loggers still get."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    shown = {
        "eval_reward": "validation reward",
        "reward": "reward",
        "reward_best": "best member",
        "entropy": "entropy",
    }
    shown |= {"kl": "KL", "z/mean_distance_from_1": "mean |z-1|"}

    def say(state: Any, logs: Mapping[str, Any], write: Callable[[str], None]) -> None:
        known = [f"{label} {logs[key]:.4g}" for key, label in shown.items() if key in logs]
        if known and state.is_world_process_zero:
            write(f"step {state.global_step:>4}  " + "  ".join(known))

    class Bar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None:
                say(state, logs or {}, self.training_bar.write)

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            say(state, logs or {}, partial(print, flush=True))  # a pipe shows each line when it is written

    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(Lines() if trainer.args.disable_tqdm else Bar())


@contextmanager
def _stopping(trainer: "Trainer") -> Iterator[list[int]]:
    """
    While the context is open, Ctrl-C lets the step end and saves a checkpoint; the second Ctrl-C ends at once.

    Gives a list that holds the signal once it came. A checkpoint in the middle of a step could not be resumed exactly.
    """
    from transformers import TrainerCallback

    caught: list[int] = []
    if trainer.args.world_size > 1:  # the signal may find processes in different steps, which then wait for each other
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


# What a dry run and the end of a run show. ---------------------------------------------------------------------


class Step(NamedTuple):
    """What a step asks: so many questions, each answered so many times, by samples or by members of a population."""

    questions: int
    answers: int
    each: str


def step_of(config: "Config") -> Step:
    """Read the size of a step, on all processes, off a config."""
    from ..training.evolution import EvolutionConfig

    if isinstance(config, EvolutionConfig):
        rows = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        return Step(rows, config.population, "members")
    return Step(config.generation_batch_size // config.num_generations, config.num_generations, "samples")


def show_sample(model: "PreTrainedModel", reader: Reader, task: "Task", row: Row, config: "Config") -> None:
    """Print a row, its prompt as the model reads it, and what the base answers, with rewards."""
    import torch

    from ..evaluation import choice_logps, evaluate

    print("\nThe first row:\n" + json.dumps(row, indent=1, ensure_ascii=False, default=repr))
    print(f"\nIts prompt as the model reads it:\n{prompt_text(reader, row['prompt'])}")
    columns = {key: [value] for key, value in row.items() if key != "prompt"}
    temperature = getattr(config, "temperature", None)  # evolution answers greedily
    if "choices" in row:
        with torch.no_grad():
            logps = choice_logps(model, reader, [row])[0].tolist()
        shares = torch.tensor(logps).div(temperature or 1.0).softmax(0).tolist()
        lines = []
        for choice, logp, share in zip(row["choices"], logps, shares, strict=True):
            (reward,) = task.reward([choice], **columns)
            lines.append([short(choice, 60), f"{logp:.2f}", f"{share:.3f}", f"{reward:+g}"])
        print("\nThe base on it:\n" + table(["choice", "log-likelihood", "probability", "reward"], lines))
        return
    torch.manual_seed(config.seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    summary = evaluate(model, reader, [row], 1, task, max_new_tokens=config.max_completion_length, **sampling)
    completion = summary.records[0]["completion"]
    (reward,) = task.reward([completion], **columns)
    what = "A sample" if temperature else "The greedy answer"
    print(f"\n{what} of the base (reward {reward:+g}):\n{completion}")


def show_cost(
    model: "PreTrainedModel",
    reader: Reader,
    rows: Mapping[str, Sequence[Row]],
    config: "Config",
    svf: "SVFConfig",
) -> None:
    """Print how many sequences and tokens a run takes and how much memory the bases; token counts are of 100 rows."""
    step = step_of(config)
    sequences = step.questions * step.answers
    steps = config.max_steps
    if steps <= 0:
        steps = math.ceil(config.num_train_epochs * max(1, len(rows["train"]) // step.questions))
    some = rows["train"][:100]
    tokenizer = tokenizer_of(reader)

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = sum(tokens(prompt_text(reader, row["prompt"])) for row in some) / len(some)
    if "choices" in some[0]:
        answer = sum(sum(map(tokens, row["choices"])) for row in some) / len(some)
        # a policy gradient scores a question once for all its samples, evolution once for each member
        a_step = (step.questions if step.each == "samples" else sequences) * (prompt + answer)
        again = "read once to choose and once to learn" if step.each == "samples" else "read once by each member"
        how = f"prompts of {prompt:.0f} tokens, their choices {answer:.0f}; {again}"
    else:
        answer = config.max_completion_length
        a_step = sequences * (prompt + answer)
        how = f"prompts of {prompt:.0f} tokens, completions of at most {answer}"
    if any(map(has_image, some)):
        how += "; those of images not counted"
    found = weights_of(model, svf)
    numbers = sum(k for *_, k in found)
    itemsize = {"float32": 4, "bfloat16": 2}[svf.basis_dtype]
    memory = sum(min(out, into) * k for _, out, into, k in found) * itemsize
    disk = sum(min(out, into) ** 2 for _, out, into, _ in found) * 4
    of_model = sum(p.numel() * p.element_size() for p in model.parameters())
    lines = [
        ["a step", f"{step.questions} questions x {step.answers} {step.each} = {sequences} sequences"],
        ["", f"about {a_step:,.0f} tokens ({how})"],
        ["the run", f"{steps} steps = {steps * sequences:,} sequences, about {steps * a_step:,.0f} tokens"],
        ["evaluation", f"{len(rows.get('validation', ()))} validation rows each time, {len(rows['test'])} test rows"],
        ["", "for the expert and the base in the end"],
        ["trained", f"{numbers:,} multipliers z of {len(found)} weights"],
        ["memory", f"model {size(of_model)}, bases {size(memory)} ({svf.basis_dtype})"],
        ["basis cache", f"{size(disk)} on disk"],
    ]
    print("\nThe cost:\n" + table(None, lines))


def show_result(result: Mapping[str, Any], folder: Path) -> None:
    """Print what training has gained, and where it lies."""
    found = [(name, result[name]["accuracy"], result[name]["interval"]) for name in ("base", "expert")]
    lines = [[name, f"{accuracy:.3f}", interval(ends)] for name, accuracy, ends in found]
    lines.append(["gain", f"{result['gain']:+.3f}", interval(result["gain_interval"], "+")])
    print("\n" + table(["", "accuracy", "95 % interval"], lines))
    time_taken = "" if result["seconds"] is None else f" in {result['seconds']} s"
    best = f", the best was {result['best_step']}" if result["best_step"] else ""
    print(f"{result['task']}, n = {result['expert']['n']}; {result['steps']} steps{time_taken}{best}")
    z = result["z"]
    mean, largest = z["mean_distance_from_1"], z["max_distance_from_1"]
    print(f"{z['numbers']:,} multipliers z: mean |z-1| {mean:.4f}, largest {largest:.4f}")
    if largest == 0:
        print("z has not moved: this is the base model. Look at reward_std in result.json; at 0 all answers to a")
        print("question earned the same reward, which teaches nothing.")
    print(f"Wrote {folder}: offsets, result.json, README.md. Look into it with: peft-svf inspect {folder}")
