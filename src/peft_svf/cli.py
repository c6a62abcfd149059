# SPDX-License-Identifier: Apache-2.0
"""
Command line -> one verb: train, eval, factor, inspect, adapt, dispatch.

Each verb is a thin face on the library, and this is the one module that prints. What a user can get wrong ends with
one line and exit code 2; `--debug` shows where it comes from. Imports that take time stand inside the verbs.
"""

import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import TASK_HELP, ScriptArguments, SVFArguments, describe, read_settings, svf_config

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import SVFConfig
    from .evaluation import Row, Summary
    from .expert import Expert, Mixture
    from .tasks import Task
    from .training import ReinforceConfig, ReinforceTrainer
    from .two_pass import Transformer2Model

INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


# The command line. ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments; default those of the process.

    Returns:
        `int`: exit code, 0 if all went well, 2 for what the user can mend, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.verb != "train":
        parser.error(f"{args.verb} does not know {' '.join(rest)}; see peft-svf {args.verb} --help")
    args.command, args.overrides = shlex.join(["peft-svf", *argv]), rest
    if not args.debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their callers
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"peft-svf {args.verb}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """Describe all verbs and their arguments."""
    parser = argparse.ArgumentParser(
        prog="peft-svf",
        description="z-vector experts (Transformer², arXiv 2501.06252): train, measure, look into, mix.",
        epilog="peft-svf VERB --help tells more. Data: docs/reference/cli.md.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, what: str, more: str = "", epilog: str = "") -> argparse.ArgumentParser:
        found = verbs.add_parser(
            name,
            help=what,
            description=f"{what} {more}".strip(),
            epilog=epilog,
            allow_abbrev=False,  # `--resume` is no part of an override
            formatter_class=argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter,
        )
        found.add_argument("--debug", action="store_true", help="show the traceback of an error")
        found.set_defaults(run=run)
        return found

    train = verb("train", _train, "Train an expert as a YAML file says, test it, write its card.", epilog=describe())
    train.add_argument("config", metavar="CONFIG.yaml", help="settings; `--key value` after it overrides one")
    train.add_argument(
        "--dry-run", action="store_true", help="show data, prompt, a scored sample and the cost; train nothing"
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, without a name from the last one in output_dir",
    )

    evaluate = verb(
        "eval",
        _eval,
        "Measure the base, experts or a mixture on a task.",
        "Without experts the base alone, with experts each beside the base, with --mixture that mixture of them. "
        "Prints accuracies with 95 %% intervals and writes a result JSON.",
    )
    _add_experts(evaluate, required=False)
    evaluate.add_argument("--task", required=True, help=TASK_HELP)
    evaluate.add_argument(
        "--mixture", nargs="+", metavar="FILE or NAME=WEIGHT", help="a saved mixture, or weights by name of expert"
    )
    evaluate.add_argument("--split", default="test", choices=["train", "validation", "test"])
    evaluate.add_argument("--form", choices=["choice", "generate"], help="default: what fits the task")
    evaluate.add_argument("--limit", type=int, help="rows at most; default all")
    evaluate.add_argument("--batch-size", type=int, default=16, help="rows per forward (%(default)s)")
    evaluate.add_argument("--max-new-tokens", type=int, default=256, help="of generated answers (%(default)s)")
    evaluate.add_argument("--records", action="store_true", help="keep one entry per row in the result")
    evaluate.add_argument("--out", type=Path, help="result JSON; default eval-TASK-TIME.json here")

    factor = verb(
        "factor",
        _factor,
        "Compute the singular directions of a model's weights into the basis cache and show their size.",
        "Training and loading an expert then read them from there.",
    )
    factor.add_argument("model", metavar="MODEL", help="folder or Hub repository")
    factor.add_argument("--revision", help="branch, tag or commit")
    factor.add_argument("--dtype", default="auto", help="of the weights (%(default)s: that of the checkpoint)")
    factor.add_argument("--target-modules", nargs="+", help="names or all-linear; default the MLP weights")

    inspect = verb(
        "inspect",
        _inspect,
        "Show what an expert has moved: abs(z - 1) per layer and kind of weight, and along the spectrum.",
        "Loads no model.",
    )
    inspect.add_argument("expert", metavar="EXPERT", help="folder or Hub repository")
    inspect.add_argument("--plot", type=Path, metavar="PNG", help="draw it as well")

    adapt = verb(
        "adapt",
        _adapt,
        "Search the mixture of experts that answers a few solved examples best; save it.",
        "Prints its weights. Use it with `peft-svf eval --mixture` or pipe(..., mixture=Mixture.load(...)).",
    )
    _add_experts(adapt)
    adapt.add_argument("--examples", type=Path, required=True, help="JSONL: prompt and answer, or choices and label")
    adapt.add_argument("--task", help="benchmark whose check judges generated answers; default: likelihoods")
    adapt.add_argument("--population", type=int, default=32, help="candidates per iteration (%(default)s)")
    adapt.add_argument("--iterations", type=int, default=50, help="(%(default)s)")
    adapt.add_argument("--elites", type=float, default=0.2, help="share that shapes the next (%(default)s)")
    adapt.add_argument("--seed", type=int, default=0)
    adapt.add_argument("--batch-size", type=int, default=32, help="rows per forward (%(default)s)")
    adapt.add_argument("--method", default="cem", help="cem, cma or gradient (%(default)s)")
    adapt.add_argument("--holdout", type=float, default=0.25, help="share that checks the result (%(default)s)")
    adapt.add_argument(
        "--state", type=Path, metavar="FILE", help="scores so far: an interrupted search goes on from it"
    )
    adapt.add_argument("--normalize", action="store_true", help="weights sum to 1, nothing is left for the base")
    adapt.add_argument("--out", type=Path, default=Path("mixture.json"), help="(%(default)s)")
    adapt.add_argument("--plot", type=Path, metavar="PNG", help="draw the course of the search and the weights")

    dispatch = verb("dispatch", _dispatch, "Show which expert would answer prompts, and how sure the first pass is.")
    _add_experts(dispatch)
    dispatch.add_argument("prompts", nargs="*", metavar="PROMPT", help="what a user asks")
    dispatch.add_argument("--file", type=Path, help="more prompts: JSONL with `prompt` in each line")
    dispatch.add_argument("--classifier", metavar="EXPERT", help="expert that was trained to name the kind")
    dispatch.add_argument("--strategy", help="prompt or classifier; default classifier where there is one")
    dispatch.add_argument("--threshold", type=float, default=0.0, help="below this confidence the base answers")
    dispatch.add_argument("--plot", type=Path, metavar="PNG", help="draw the probabilities")
    return parser


def _add_experts(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", help="base model; default the one that the experts name")
    parser.add_argument("--revision", help="of the base model: branch, tag or commit")
    parser.add_argument("--dtype", default="auto", help="of the base model (%(default)s: that of the checkpoint)")
    parser.add_argument(
        "--experts",
        nargs="+",
        required=required,
        default=[],
        metavar="EXPERT",
        help="folders or Hub repositories; NAME=EXPERT gives a name of your own",
    )


# train ---------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    settings = read_settings(args.config, args.overrides)
    script, config = settings.script, settings.training
    checkpoint = _checkpoint(args, config)
    task = find_task(script.task)
    form = script.form or task.forms[0]
    rows = _rows(task, form, script, config)
    source = settings.model
    model, tokenizer = load_model(
        source.model_name_or_path,
        source.model_revision,
        source.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    svf = svf_config(settings.svf, model, task.description)
    loud = config.process_index == 0
    if loud:
        print(f"{task.name}, {form} form: " + ", ".join(f"{len(found)} {split}" for split, found in rows.items()))
    if args.dry_run:
        show_sample(model, tokenizer, task, rows["train"][0], config)
        show_cost(model, tokenizer, rows, config, svf)
        return 0

    from datasets import Dataset

    from .result import write_expert
    from .training import ReinforceTrainer

    trainer = ReinforceTrainer(
        model,
        task.reward,
        config,
        Dataset.from_list(rows["train"]),
        eval_dataset=Dataset.from_list(rows["validation"]) if "validation" in rows else None,
        processing_class=tokenizer,
        peft_config=svf,
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
        print(f"Testing expert and base on {len(rows['test'])} rows that were never trained on ...", flush=True)
        folder = Path(config.output_dir)
        result = write_expert(
            trainer,
            task,
            rows["test"],
            folder,
            command=args.command,
            seconds=None if checkpoint else seconds,  # of a part only
            base_model=script.base_model,
            license=script.license,
            batch_size=config.per_device_eval_batch_size,
            **({"max_new_tokens": config.max_completion_length} if form == "generate" else {}),
        )
        show_result(result, folder)
    trainer.accelerator.wait_for_everyone()
    return 0


def _rows(
    task: "Task", form: str, script: ScriptArguments, config: "ReinforceConfig"
) -> "dict[str, list[dict[str, Any]]]":
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


def _checkpoint(args: argparse.Namespace, config: "ReinforceConfig") -> str | None:
    """Name the checkpoint to go on from; refuse a folder that holds another run."""
    from .runs import last_checkpoint

    folder = Path(config.output_dir)
    wanted = args.resume or config.resume_from_checkpoint
    if wanted:
        return str(last_checkpoint(folder)) if str(wanted).lower() in ("last", "true") else str(wanted)
    if not args.dry_run and (any(folder.glob("checkpoint-*")) or (folder / "adapter_config.json").exists()):
        raise ValueError(
            f"output_dir {str(folder)!r} holds another run already: go on with it by --resume, or name another folder "
            "by --output_dir."
        )
    return None


def _show_progress(trainer: "ReinforceTrainer") -> None:
    """Put a short line in the place of transformers' dict of thirty numbers, which loggers still get."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    shown = {"eval_reward": "validation reward", "reward": "reward", "entropy": "entropy", "kl": "KL"}
    shown |= {"z/mean_distance_from_1": "mean |z-1|"}

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
            say(state, logs or {}, print)

    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(Lines() if trainer.args.disable_tqdm else Bar())


@contextmanager
def _stopping(trainer: "ReinforceTrainer") -> Iterator[list[int]]:
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


def show_sample(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: "Task",
    row: "Row",
    config: "ReinforceConfig",
) -> None:
    """Print a row, its prompt as the model reads it, and what the base answers, with rewards."""
    import torch

    from .evaluation import choice_logps, prompt_text

    print("\nThe first row:\n" + json.dumps(row, indent=1, ensure_ascii=False))
    text = prompt_text(tokenizer, row["prompt"])
    print(f"\nIts prompt as the model reads it:\n{text}")
    columns = {key: value for key, value in row.items() if key != "prompt"}
    if "choices" in row:
        with torch.no_grad():
            logps = choice_logps(model, tokenizer, [row])[0].tolist()
        shares = torch.tensor(logps).div(config.temperature).softmax(0).tolist()
        lines = []
        for choice, logp, share in zip(row["choices"], logps, shares, strict=True):
            (reward,) = task.reward([choice], **{key: [value] for key, value in columns.items()})
            lines.append([_short(choice, 60), f"{logp:.2f}", f"{share:.3f}", f"{reward:+g}"])
        print("\nThe base on it:\n" + _table(["choice", "log-likelihood", "probability", "reward"], lines))
        return
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    torch.manual_seed(config.seed)
    sampling = {"do_sample": True, "temperature": config.temperature, "max_new_tokens": config.max_completion_length}
    with torch.no_grad():
        output = model.generate(**inputs, **sampling)
    completion = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    (reward,) = task.reward([completion], **{key: [value] for key, value in columns.items()})
    print(f"\nA sample of the base (reward {reward:+g}):\n{completion}")


def show_cost(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Mapping[str, Sequence[Row]]",
    config: "ReinforceConfig",
    svf: "SVFConfig",
) -> None:
    """Print how many sequences and tokens a run takes and how much memory the bases; token counts are of 100 rows."""
    from .evaluation import prompt_text

    sequences = config.generation_batch_size
    questions = sequences // config.num_generations
    steps = config.max_steps
    if steps <= 0:
        steps = math.ceil(config.num_train_epochs * max(1, len(rows["train"]) // questions))
    some = rows["train"][:100]

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompt = sum(tokens(prompt_text(tokenizer, row["prompt"])) for row in some) / len(some)
    if "choices" in some[0]:
        answer = sum(sum(map(tokens, row["choices"])) for row in some) / len(some)
        a_step = questions * (prompt + answer)
        how = f"prompts of {prompt:.0f} tokens, their choices {answer:.0f}; read once to choose and once to learn"
    else:
        answer = config.max_completion_length
        a_step = sequences * (prompt + answer)
        how = f"prompts of {prompt:.0f} tokens, completions of at most {answer}"
    found = weights_of(model, svf)
    numbers = sum(k for *_, k in found)
    itemsize = {"float32": 4, "bfloat16": 2}[svf.basis_dtype]
    memory = sum(min(out, into) * k for _, out, into, k in found) * itemsize
    disk = sum(min(out, into) ** 2 for _, out, into, _ in found) * 4
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    lines = [
        ["a step", f"{questions} questions x {config.num_generations} samples = {sequences} sequences"],
        ["", f"about {a_step:,.0f} tokens ({how})"],
        ["the run", f"{steps} steps = {steps * sequences:,} sequences, about {steps * a_step:,.0f} tokens"],
        ["evaluation", f"{len(rows.get('validation', ()))} validation rows each time, {len(rows['test'])} test rows"],
        ["", "for the expert and the base in the end"],
        ["trained", f"{numbers:,} multipliers z of {len(found)} weights"],
        ["memory", f"model {_bytes(size)}, bases {_bytes(memory)} ({svf.basis_dtype})"],
        ["basis cache", f"{_bytes(disk)} on disk"],
    ]
    print("\nThe cost:\n" + _table(None, lines))


def weights_of(model: "PreTrainedModel", svf: "SVFConfig") -> list[tuple[str, int, int, int]]:
    """Name the weights that a config targets, with their two sizes and numbers of multipliers; factors nothing."""
    from dataclasses import replace

    import torch
    from peft import get_peft_model

    with torch.device("meta"):  # the shapes alone
        shell = type(model)(model.config)
    layers = get_peft_model(shell, replace(svf)).named_modules()
    return [
        (
            name.removeprefix("base_model.model."),
            *layer.get_base_layer().weight.shape,
            len(layer.svf_offset["default"].weight),
        )
        for name, layer in layers
        if hasattr(layer, "svf_offset") and hasattr(layer, "base_layer")
    ]


def show_result(result: Mapping[str, Any], folder: Path) -> None:
    """Print what training has gained, and where it lies."""
    found = [(name, result[name]["accuracy"], result[name]["interval"]) for name in ("base", "expert")]
    lines = [[name, f"{accuracy:.3f}", _interval(interval)] for name, accuracy, interval in found]
    lines.append(["gain", f"{result['gain']:+.3f}", _interval(result["gain_interval"], "+")])
    print("\n" + _table(["", "accuracy", "95 % interval"], lines))
    time_taken = "" if result["seconds"] is None else f" in {result['seconds']} s"
    best = f", the best was {result['best_step']}" if result["best_step"] else ""
    print(f"{result['task']}, n = {result['expert']['n']}; {result['steps']} steps{time_taken}{best}")
    z = result["z"]
    mean, largest = z["mean_distance_from_1"], z["max_distance_from_1"]
    print(f"{z['numbers']:,} multipliers z: mean |z-1| {mean:.4f}, largest {largest:.4f}")
    if largest == 0:
        print("z has not moved: this is the base model. Look at frac_reward_zero_std in result.json; at 1 every")
        print("completion of a prompt earned the same reward, which teaches nothing.")
    print(f"Wrote {folder}: offsets, result.json, README.md. Look into it with: peft-svf inspect {folder}")


# eval, adapt, dispatch -----------------------------------------------------------------------------------------


def _eval(args: argparse.Namespace) -> None:
    from .evaluation import evaluate, paired_difference
    from .expert import Mixture
    from .library import explicit
    from .result import versions, write_file

    task = find_task(args.task)
    form = args.form or task.forms[0]
    out = _new_file(args.out or Path(f"eval-{task.name}-{datetime.now():%Y%m%d-%H%M%S}.json"))
    rows = task.rows(args.split, form, limit=args.limit)
    if not rows:
        raise ValueError(f"Task {task.name!r} has no {args.split} rows in the {form} form.")
    if args.mixture and not args.experts:
        raise ValueError("A mixture needs the experts that it names: --experts ...")
    ways: dict[str, Mixture] = {"base": Mixture()}
    if args.mixture:
        ways["mixture"] = read_mixture(args.mixture)
    generation = {"max_new_tokens": args.max_new_tokens} if form == "generate" else {}
    summaries: dict[str, Summary] = {}
    if not args.experts:
        if args.model is None:
            raise ValueError("There is nothing to measure: name --experts, or a base model by --model.")
        model, tokenizer = load_model(args.model, args.revision, args.dtype)
        summaries["base"] = evaluate(model, tokenizer, rows, args.batch_size, task, **generation)
        base_model = args.model
    else:
        two_pass = _two_pass(args)
        base_model = two_pass.name_or_path
        if not args.mixture:
            ways |= {name: explicit(name) for name in two_pass.library.names}
        for mixture in ways.values():
            with two_pass.using(mixture):
                pass  # an unknown expert is refused before the base is measured
        for way, mixture in ways.items():
            with two_pass.using(mixture) as model:
                summaries[way] = evaluate(model, two_pass.tokenizer, rows, args.batch_size, task, **generation)
    base = summaries["base"]
    gains = {way: paired_difference(found, base) for way, found in summaries.items() if found is not base}
    lines = []
    for way, found in summaries.items():
        gain = [f"{gains[way][0]:+.3f}", _interval(gains[way][1], "+")] if way in gains else ["", ""]
        lines.append([way, f"{found.accuracy:.3f}", _interval(found.interval), *gain])
    print(f"{task.name}, {args.split} split, {form} form, n = {base.n}; 95 % intervals, gains paired")
    print(_table(["", "accuracy", "interval", "gain", "interval"], lines))
    if "mixture" in ways:
        print("mixture: " + ", ".join(f"{name} {weight:.3f}" for name, weight in _shares(ways["mixture"]).items()))
    result = {
        "command": args.command,
        "versions": versions(),
        "base_model": base_model,
        "experts": args.experts,
        "mixture": ways["mixture"].alpha if "mixture" in ways else None,
        "task": task.name,
        "form": form,
        "split": args.split,
        "summaries": {way: found.to_json(args.records) for way, found in summaries.items()},
        "gains": {way: {"gain": gain, "interval": interval} for way, (gain, interval) in gains.items()},
    }
    write_file(out, json.dumps(result, indent=1))
    print(f"Wrote {out}")


def _adapt(args: argparse.Namespace) -> None:
    from .plots import draw_alpha, draw_search

    out = _new_file(args.out)
    examples = read_examples(args.examples)
    task = find_task(args.task) if args.task else None
    model = _two_pass(args)
    names = ("method", "population", "iterations", "elites", "seed", "holdout", "state", "batch_size", "normalize")
    mixture = model.adapt(examples, task, **{name: getattr(args, name) for name in names})
    mixture.save(out)
    print(_table(["expert", "weight"], [[name, f"{weight:.3f}"] for name, weight in _shares(mixture).items()]))
    found, held_out = mixture.provenance, mixture.provenance["held_out"]
    print(f"score on the {found['examples']} examples of the search: {_score(found['score'])}")
    if held_out["examples"]:
        scores = [f"{name} {_score(score)}" for name, score in held_out.items() if isinstance(score, list)]
        print(f"on {held_out['examples']} that it did not see: {', '.join(scores)}")
    if held_out["fell_back"]:
        print(f"The mixture that was found is no better there: this is {held_out['fell_back']!r} alone.")
    print("On other questions it may be less. Measure:")
    experts = shlex.join(map(str, args.experts))
    print(f"  peft-svf eval --experts {experts} --mixture {out} --task ...")
    print(f"Wrote {out}")
    if args.plot:
        _save_figure(args.plot, [lambda axes: draw_search(axes, mixture), lambda axes: draw_alpha(axes, mixture)])


def _dispatch(args: argparse.Namespace) -> None:
    from .plots import draw_probabilities

    rows = [] if args.file is None else read_examples(args.file)
    prompts = [*args.prompts, *(row["prompt"] for row in rows)]
    if not prompts:
        raise ValueError("There are no prompts: name some, or a file of them by --file.")
    model = _two_pass(args, args.classifier)
    mixtures = model.first_pass(prompts, strategy=args.strategy, threshold=args.threshold)
    texts = [_text(prompt) for prompt in prompts]
    lines = [[m.choice, f"{m.confidence:.2f}", _short(text, 70)] for m, text in zip(mixtures, texts, strict=True)]
    print(_table(["expert", "confidence", "prompt"], lines))
    if args.plot:
        _save_figure(args.plot, [lambda axes: draw_probabilities(axes, texts, mixtures)])


def _two_pass(args: argparse.Namespace, classifier: str | None = None) -> "Transformer2Model":
    """Load the experts that the arguments name, and the base model under them."""
    from .expert import Expert
    from .two_pass import Transformer2Model, base_of

    experts = [_expert(source) for source in args.experts]
    name, revision = (args.model, args.revision) if args.model else base_of(experts)
    model, tokenizer = load_model(name, args.revision or revision, args.dtype)
    chosen = None if classifier is None else Expert.load(classifier)
    return Transformer2Model(model, tokenizer, experts, chosen)


def _expert(source: str) -> "Expert":
    """Load an expert from `SOURCE` or `NAME=SOURCE`."""
    from .expert import Expert

    name, equals, rest = source.partition("=")
    return Expert.load(rest, name) if equals and not os.path.exists(source) else Expert.load(source)


def read_mixture(given: Sequence[str]) -> "Mixture":
    """Read a saved mixture, or one that is written out as `NAME=WEIGHT`s."""
    from .expert import Mixture

    if len(given) == 1 and ("=" not in given[0] or os.path.exists(given[0])):
        return Mixture.load(given[0])
    alpha: dict[str, float] = {}
    for entry in given:
        name, _, weight = entry.partition("=")
        try:
            alpha[name] = float(weight)
        except ValueError:
            raise ValueError(
                f"A mixture is a file, or expert names with weights such as math=0.7; got {entry!r}."
            ) from None
    return Mixture(alpha)


# factor, inspect -----------------------------------------------------------------------------------------------


def _factor(args: argparse.Namespace) -> None:
    from peft import get_peft_model

    from .basis_cache import cache_dir, usage

    before, _ = usage()
    model, _ = load_model(args.model, args.revision, args.dtype, tokenizer=False)
    svf = svf_config(SVFArguments(target_modules=args.target_modules), model)
    found = weights_of(model, svf)
    start = time.perf_counter()
    get_peft_model(model, svf)
    seconds = time.perf_counter() - start
    groups: dict[tuple[str, int, int], int] = defaultdict(int)
    for name, out, into, _ in found:
        groups[name.rpartition(".")[2], out, into] += 1
    lines = []
    for (kind, out, into), count in groups.items():
        r = min(out, into)
        lines.append([kind, str(count), f"{out} x {into}", str(r), _bytes(count * 4 * r * r)])
    print(_table(["kind", "weights", "shape", "directions", "on disk"], lines))
    entries, size = usage()
    print(f"{entries - before} of {len(found)} computed in {seconds:.1f} s, the others were there or are alike.")
    print(f"Cache {cache_dir()}: {entries} entries, {_bytes(size)}.")


def _inspect(args: argparse.Namespace) -> None:
    from .expert import Expert
    from .plots import distances, draw_distances, draw_spectrum, spectrum

    expert = Expert.load(args.expert)
    layers, kinds, table = distances(expert)
    numbers = [offset.abs() for offset in expert.offsets.values()]
    count, largest = sum(map(len, numbers)), max(float(x.max()) for x in numbers)
    mean = sum(float(x.sum()) for x in numbers) / count
    print(f"{expert.name}: {expert.description or 'no description'}")
    print(f"base {expert.base_model}; {count:,} multipliers z of {len(numbers)} weights")
    print(f"mean |z-1| {mean:.4f}, largest {largest:.4f}\n\nmean |z-1| by layer and kind of weight")
    lines = [
        [name, *("" if math.isnan(x) else f"{x:.4f}" for x in row)]
        for name, row in zip(layers, table.tolist(), strict=True)
    ]
    print(_table(["layer", *kinds], lines))
    bins = min(8, min(map(len, numbers)))
    if (line := spectrum(expert, bins)) is not None:
        print("\nmean |z-1| along the spectrum, largest singular values first")
        shares = [f"{100 * i / bins:.0f}-{100 * (i + 1) / bins:.0f} %" for i in range(bins)]
        print(_table(shares, [[f"{x:.4f}" for x in line.tolist()]]))
    if args.plot:
        _save_figure(
            args.plot, [lambda axes: draw_distances(axes, expert), lambda axes: draw_spectrum(axes, [expert])]
        )


# What the verbs share. -----------------------------------------------------------------------------------------


def find_task(name: str) -> "Task":
    """Find a benchmark by its name, or make a task of a JSONL file or folder."""
    from .tasks import get_task, jsonl_task, task_names

    own = name not in task_names() and (os.path.exists(name) or "/" in name or name.endswith((".jsonl", ".jsonl.gz")))
    return jsonl_task(name) if own else get_task(name)


def load_model(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    *,
    device: "torch.device | None" = None,
    tokenizer: bool = True,
    trust_remote_code: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a base model and its tokenizer onto the accelerator, where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    reader = AutoTokenizer.from_pretrained(name, **shared) if tokenizer else None
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **shared).to(device), reader


def read_examples(path: Path) -> list[dict[str, Any]]:
    """
    Read rows, one JSON object a line; a prompt that is a text becomes a user's turn, as in a task of one's own.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if a line is no object with a prompt; the message has its number.
    """
    from .tasks.task import read_lines, user_turn

    found = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), (str, list)):
            raise ValueError(f"Line {number} of {path} is no object with a 'prompt', a text or a chat.")
        prompt = row["prompt"]
        found.append({**row, "prompt": user_turn(prompt) if isinstance(prompt, str) else prompt})
    return found


def _shares(mixture: "Mixture") -> dict[str, float]:
    """The weights of a mixture, and what is left for the base."""
    return {**mixture.alpha, "other": 1 - sum(mixture.alpha.values())}


def _text(prompt: str | list[dict[str, Any]]) -> str:
    """What a prompt says, on one line."""
    return prompt if isinstance(prompt, str) else " ".join(str(message["content"]) for message in prompt)


def _new_file(path: Path) -> Path:
    """Refuse a file that exists before anything is computed: one run never overwrites another's."""
    if path.exists():
        raise FileExistsError(f"{path} is there already: name another file by --out.")
    return path


def _save_figure(path: Path, panels: "Sequence[Callable[[Axes], None]]") -> None:
    """Draw panels side by side into a PNG."""
    from .plots import new_figure
    from .result import write_file

    figure, axes = new_figure(len(panels))
    for draw, panel in zip(panels, axes, strict=True):
        draw(panel)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_file(path, content.getvalue())
    print(f"Wrote {path}")


def _table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns as wide as their widest cell."""
    lines = [*([header] if header else []), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _score(score: Sequence[float]) -> str:
    return " ".join(f"{x:.3f}" for x in score)


def _interval(interval: Sequence[float], sign: str = "") -> str:
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _short(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
