# SPDX-License-Identifier: Apache-2.0
"""Numbers, tables, figures -> what the user sees, and the refusal to write over what is there. Knows no verb."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns as wide as their widest cell."""
    lines = [*([header] if header else []), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def score(values: Sequence[float]) -> str:
    """The entries of a score, side by side."""
    return " ".join(f"{x:.3f}" for x in values)


def interval(ends: Sequence[float], sign: str = "") -> str:
    """An interval in brackets; `sign="+"` for differences."""
    return f"[{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def weights(alpha: Mapping[str, float]) -> str:
    """Mixture weights on one line."""
    return ", ".join(f"{name} {weight:.3f}" for name, weight in alpha.items())


def size(count: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def short(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def new_path(path: Path, option: str = "--out") -> Path:
    """Refuse a path that exists before anything is computed: one run never overwrites another's."""
    if path.exists():
        raise FileExistsError(f"{path} is there already: name another place by {option}.")
    return path


def save_figure(path: Path, panels: "Sequence[Callable[[Axes], None]]", rows: int = 0, names: int = 0) -> None:
    """Draw panels side by side into a PNG, with room for so many labelled rows and columns."""
    from ..plots import new_figure, size_of
    from ..training.result import write_file

    figure, axes = new_figure(len(panels), **size_of(rows, names))
    for draw, panel in zip(panels, axes, strict=True):
        draw(panel)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_file(path, content.getvalue())
    print(f"Wrote {path}")
