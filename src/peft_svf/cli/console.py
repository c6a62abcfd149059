# SPDX-License-Identifier: Apache-2.0
"""Numbers, tables, commands -> what the user sees, without secrets. Knows no verb."""

import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import files


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, without line breaks unless a terminal is too narrow."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def interval(ends: Sequence[float], sign: str = "") -> str:
    """Format an interval in brackets; `sign="+"` for differences."""
    return f"[{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def mixed(alpha: Mapping[str, float]) -> str:
    """Format mixture weights on one line, with the base's share."""
    return ", ".join(f"{name} {weight:.3f}" for name, weight in shares(alpha).items())


def shares(alpha: Mapping[str, float]) -> dict[str, float]:
    """Add the base's share, what is left of 1, to mixture weights."""
    return {**alpha, "other": 1 - sum(alpha.values())}


def size(count: float) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def short(text: str, width: int) -> str:
    """Put a text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def new_path(path: Path, option: str = "--out") -> Path:
    """Refuse a path that exists, before anything is computed: no run overwrites another's."""
    if path.exists():
        raise FileExistsError(f"{path} exists already: name another place by {option}.")
    return path


def check_address(host: str, port: int) -> None:
    """Refuse an address that can't be listened on, before a model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise OSError(
            f"Can't listen on {host}:{port} ({error.strerror}): choose another by --port or --host."
        ) from error


def command(arguments: Sequence[str]) -> str:
    """Write a command as a shell reads it, without secrets."""
    return files.without_secrets(shlex.join(["peft-svf", *arguments]))
