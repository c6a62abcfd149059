# SPDX-License-Identifier: Apache-2.0
"""
Command line -> one verb, each in a module or with its kin.

Each verb is a function whose signature is its options, and this package is the one place that prints. Modules of the
library are imported inside the verbs, so that help and shell completion don't wait for torch.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any

import typer

from .adapt import adapt
from .convert import export, import_
from .demo import demo
from .dispatch import dispatch
from .eval import evaluate
from .inspect import inspect, search
from .prepare import factor, key
from .push import push
from .serving import serve
from .train import HELP, train

EXPECTED = (ValueError, OSError, ImportError, RuntimeError)
UsageError: Any = typer.BadParameter.__mro__[1]  # typer exports only subclasses of it

app = typer.Typer(
    help="Small experts for language models (Transformer², arXiv 2501.06252): train, measure, mix, share, serve.",
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
        warnings.filterwarnings("ignore", category=FutureWarning)  # they are meant for the callers of libraries


def _verb(name: str, run: Callable[..., Any], **settings: Any) -> None:
    @wraps(run)
    def work(*args: Any, **kwargs: Any) -> Any:
        from .._registration import register

        register()
        return run(*args, **kwargs)

    app.command(name, **settings)(work)


_verb("train", train, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, epilog=HELP)
for run in (evaluate, factor, inspect, adapt, dispatch, key, export, import_, push, search, serve, demo):
    _verb({"evaluate": "eval", "import_": "import"}.get(run.__name__, run.__name__), run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 after an error, 2 if the command line itself is wrong, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = argv or ["--help"]
    verb = next((part for part in arguments if not part.startswith("-")), "")
    try:
        return typer.main.get_command(app).main(arguments, "peft-svf", standalone_mode=False, obj=argv) or 0
    except UsageError as error:
        ours = isinstance(error, typer.BadParameter) and error.param is None  # raised by a verb
        message = error.message if ours else error.format_message()
        context = error.ctx.command_path if error.ctx else f"peft-svf {verb}"
        return _fail(f"{context}: error: {message}", 2)
    except Exception as error:
        unreachable = type(error).__module__.partition(".")[0] == "httpx"  # the Hub's client lets them through
        if "--debug" in arguments or not (isinstance(error, EXPECTED) or unreachable):
            raise
        message = str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError) and error.filename:  # its own message is "[Errno 2] ..."
            message = f"There is no file {str(error.filename)!r}: check its name and its folder."
        return _fail(f"peft-svf {verb}: error: {message}", 1)


def _fail(message: str, code: int) -> int:
    """Print a message on one line; return the exit code."""
    print(" ".join(message.split()), file=sys.stderr)
    return code
