# SPDX-License-Identifier: Apache-2.0
"""
Command line -> one verb: train, eval, factor, inspect, adapt, dispatch.

Each verb is a module whose function's signature is its options, and this package is the one place that prints. Modules
of the library are imported inside the verbs, so that help and shell completion don't wait for torch.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any

<<<<<<< HEAD
from ..adaptation.few_shot import LEAVE_ONE_OUT
from . import measure, train, weights
from .sources import find_task, read_mixture
from .train_config import TASK_HELP, describe
=======
import typer
>>>>>>> house

from .adapt import adapt
from .console import INTERRUPTED
from .dispatch import dispatch
from .eval import evaluate
from .factor import factor
from .inspect import inspect
from .train import KEYS, train

MANY = ("--experts", "--mixture", "--target-modules")  # options that take several values in a row
UsageError: Any = typer.BadParameter.__mro__[1]  # typer exports only subclasses of it

app = typer.Typer(
    help="z-vector experts (Transformer², arXiv 2501.06252): train, measure, inspect, mix.",
    epilog="`peft-svf VERB --help` lists the options of a verb.",
    rich_markup_mode="markdown",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"peft-svf {version('peft-svf')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # from libraries to their callers


def _verb(name: str, run: Callable[..., Any], **settings: Any) -> None:
    @wraps(run)
    def work(*args: Any, **kwargs: Any) -> Any:
        from .. import _load

        _load()
        try:
            return run(*args, **kwargs)
        except KeyboardInterrupt as stop:
            print(str(stop) or "Interrupted.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from stop

    app.command(name, **settings)(work)


_verb("train", train, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, epilog=KEYS)
_verb("eval", evaluate)
_verb("factor", factor)
_verb("inspect", inspect)
_verb("adapt", adapt)
_verb("dispatch", dispatch)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; default those of the process.

    Returns:
        `int`: exit code; 0, 1 after an error, 2 if the command line itself is wrong, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _click_form(argv) or ["--help"]
    try:
        return typer.main.get_command(app).main(arguments, "peft-svf", standalone_mode=False, obj=argv) or 0
    except UsageError as error:
        context = error.ctx.command_path if error.ctx else "peft-svf"
        print(f"{context}: error: {_line(error.format_message())}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if "--debug" in arguments:
            raise
        verb = next((part for part in arguments if not part.startswith("-")), "")
        print(f"peft-svf {verb}: error: {_line(error)}", file=sys.stderr)
        return 1


def _click_form(argv: Sequence[str]) -> list[str]:
    """
    Rewrite what click cannot read: `--experts a b` (to `--experts a --experts b`), `--resume` without a value, and
    `--debug` after the verb.
    """
    arguments: list[str] = []
    option, count = "", 0
    for place, part in enumerate(argv):
        if part == "--":
            return [*arguments, *argv[place:]]
        if part.startswith("--"):
            option, count = part, 0
        elif option in MANY:
            arguments += [option] if count else []
            count += 1
        if part == "--debug" and "--debug" not in arguments:
            arguments.insert(0, part)
            continue
        arguments.append(part)
        if part == "--resume" and (argv[place + 1 : place + 2] or ["--"])[0].startswith("--"):
            arguments.append("last")
    return arguments


<<<<<<< HEAD
def make_parser() -> argparse.ArgumentParser:
    """Describe all verbs and their arguments."""
    parser = _Parser(
        prog="peft-svf",
        description="z-vector experts (Transformer², arXiv 2501.06252): train, measure, look into, mix.",
        epilog="peft-svf VERB --help tells more. Data: docs/reference/cli.md.",
    )
    parser.add_argument("--version", action="version", version=f"peft-svf {version('peft-svf')}")
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

    _add_train(
        verb("train", train.train, "Train an expert as a YAML file says, test it, write its card.", epilog=describe())
    )
    _add_eval(
        verb(
            "eval",
            measure.evaluate,
            "Measure the base, experts, a mixture or two-pass answering on a task.",
            "Without experts the base alone, with experts each beside the base, with --mixture that mixture of them "
            "instead; with --strategy also the answers of experts that a first pass chooses, row by row. Prints "
            "accuracies with 95 % intervals and writes a result JSON.",
        )
    )
    _add_factor(
        verb(
            "factor",
            weights.factor,
            "Compute the singular directions of a model's weights into the basis cache and show their size.",
            "Training and loading an expert then read them from there.",
        )
    )
    _add_inspect(
        verb(
            "inspect",
            weights.inspect,
            "Show what an expert has moved: abs(z - 1) per layer and kind of weight, and along the spectrum.",
            "Loads no model.",
        )
    )
    _add_adapt(
        verb(
            "adapt",
            measure.adapt,
            "Search the mixture of experts that answers a few solved examples best; save it.",
            "Prints its weights. Use it with `peft-svf eval --mixture` or pipe(..., mixture=Mixture.load(...)).",
        )
    )
    _add_dispatch(
        verb(
            "dispatch",
            measure.dispatch,
            "Show which expert would answer prompts, and how sure the first pass is.",
        )
    )
    return parser


# The arguments of each verb, named as in Python. ---------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings; `--key value` after it overrides one")
    parser.add_argument(
        "--dry-run", action="store_true", help="show data, prompt, a scored sample and the cost; train nothing"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, without a name from the last one in output_dir",
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_experts(parser, required=False)
    parser.add_argument("--task", required=True, help=TASK_HELP)
    parser.add_argument(
        "--mixture", nargs="+", metavar="FILE or NAME=WEIGHT", help="a saved mixture, or weights by name of expert"
    )
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--form", choices=["choice", "generate"], help="default: what fits the task")
    parser.add_argument("--limit", type=_count, help="rows at most; default all")
    parser.add_argument("--batch-size", type=_count, default=16, help="rows per forward (%(default)s)")
    parser.add_argument("--max-new-tokens", type=_count, default=256, help="of generated answers (%(default)s)")
    parser.add_argument("--records", action="store_true", help="keep one entry per row in the result")
    parser.add_argument("--out", type=Path, help="result JSON; default eval-TASK-TIME.json here")
    _add_first_pass(parser, "which answers each row is measured only if named")


def _add_factor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--dtype", default="auto", help="of the weights (%(default)s: that of the checkpoint)")
    parser.add_argument("--target-modules", nargs="+", help="names or all-linear; default the MLP weights")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("expert", metavar="EXPERT", help="folder or Hub repository")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw it as well")


def _add_adapt(parser: argparse.ArgumentParser) -> None:
    _add_experts(parser)
    parser.add_argument("--examples", type=Path, required=True, help="JSONL: prompt and answer, or choices and label")
    parser.add_argument("--task", help="benchmark whose check judges generated answers; default: likelihoods")
    parser.add_argument("--max-new-tokens", type=_count, help="of generated answers, with --task (256)")
    parser.add_argument("--out", type=Path, help="default mixture.json; with --per-layer a folder, default --name")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the course of the search and the weights")
    search = parser.add_argument_group("the search")
    search.add_argument("--method", default="cem", help="cem, cma or gradient (%(default)s)")
    search.add_argument("--population", type=_count, default=32, help="candidates per iteration (%(default)s)")
    search.add_argument("--iterations", type=_count, default=50, help="(%(default)s)")
    search.add_argument("--elites", type=_share, default=0.2, help="share that shapes the next (%(default)s)")
    search.add_argument("--seed", type=int, default=0)
    search.add_argument("--batch-size", type=_count, default=32, help="rows per forward (%(default)s)")
    search.add_argument(
        "--holdout",
        default=LEAVE_ONE_OUT,
        metavar="SHARE or FILE",
        help="what checks the result: leave-one-out, a share of the examples, a JSONL of others, 0 for none "
        "(%(default)s)",
    )
    search.add_argument("--temperature", type=_positive, default=8.0, help="of choices (%(default)s)")
    search.add_argument("--max-tokens", type=_count, help="end the search before it has read more")
    search.add_argument("--max-seconds", type=_positive, help="end the search before it takes longer")
    search.add_argument(
        "--state", type=Path, metavar="FILE", help="scores so far: an interrupted search goes on from it"
    )
    weight = parser.add_argument_group("the weights")
    weight.add_argument("--low", type=_number, default=0.0, help="least weight of an expert (%(default)s)")
    weight.add_argument("--high", type=_number, default=1.0, help="largest weight of an expert (%(default)s)")
    weight.add_argument("--normalize", action="store_true", help="weights sum to 1, nothing is left for the base")
    weight.add_argument(
        "--per-layer",
        action="store_true",
        help="one weight per expert and block of the model: makes a new expert, a folder, instead of a mixture",
    )
    weight.add_argument("--name", help="of the mixture, or of the expert; default the name of its folder")


def _add_dispatch(parser: argparse.ArgumentParser) -> None:
    _add_experts(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what a user asks")
    parser.add_argument("--file", type=Path, help="more prompts: JSONL with `prompt` in each line")
    parser.add_argument("--batch-size", type=_count, default=16, help="prompts per forward (%(default)s)")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the probabilities, or what was chosen for each kind"
    )
    _add_first_pass(parser, "default: what --classifier or --probe is for, else prompt")


def _add_experts(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", help="base model; default the one that the experts name")
    parser.add_argument("--revision", help="of the base model: branch, tag or commit")
    parser.add_argument("--dtype", default="auto", help="of the base model (%(default)s: that of the checkpoint)")
    parser.add_argument(
        "--experts", nargs="+", required=required, default=[], metavar="EXPERT", help=EXPERTS_HELP
    )  # fmt: skip


def _add_first_pass(parser: argparse.ArgumentParser, default: str) -> None:
    """The settings of `adaptation.dispatch`; `None` where nothing was said."""
    group = parser.add_argument_group("the first pass")
    group.add_argument("--strategy", choices=["prompt", "classifier", "probe"], help=default)
    group.add_argument("--classifier", metavar="EXPERT", help="expert that was trained to name the kind")
    group.add_argument("--probe", type=Path, metavar="FOLDER", help="saved probe; with --fit where it is saved")
    group.add_argument(
        "--fit",
        type=Path,
        metavar="FILE",
        help="JSONL of prompts with their `expert` or other: fits the probe, the --calibration, or else a temperature",
    )
    group.add_argument("--threshold", type=_share, help="below this confidence --fallback decides (0)")
    group.add_argument(
        "--fallback", choices=["base", "mix"], help="the base, or all experts by their probabilities (base)"
    )
    group.add_argument(
        "--soft", action="store_true", default=None, help="probabilities are the weights of every decision"
    )
    group.add_argument(
        "--calibration", type=Path, metavar="FOLDER", help="saved calibration; with --fit where it is saved"
    )
    group.add_argument(
        "--read",
        choices=["likelihood", "channel", "generate"],
        help="score the names, score the request for each kind, or let the model write a name (prompt: channel; "
        "classifier: likelihood)",
    )
    group.add_argument("--temperature", type=_positive, help="divides the scores before the softmax (1)")


# Numbers that mean something. ----------------------------------------------------------------------------------


def _kind(name: str, read: Callable[[str], Any], fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type of argument whose errors name what was expected."""

    def convert(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {name}, got {text!r}")
        return value

    return convert


_count = _kind("a whole number from 1", int, lambda value: value >= 1)
_share = _kind("a number from 0 to 1", float, lambda value: 0 <= value <= 1)
_positive = _kind("a number above 0", float, lambda value: value > 0)
_number = _kind("a number", float, lambda value: True)

__all__ = ["find_task", "main", "make_parser", "read_mixture"]
=======
def _line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
>>>>>>> house
