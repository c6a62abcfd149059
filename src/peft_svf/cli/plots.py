# SPDX-License-Identifier: Apache-2.0
"""Experts and decisions -> figures. Needs matplotlib (`pip install 'peft-svf[demo]'`); loads no model."""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import files
from ..experts.expert import OTHER, Expert, Mixture
from ..tuner.targets import block_of
from .console import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 150  # the tallest panel; with more rows, only some are labelled
MOST_NUMBERED = 30  # rows whose cells show their numbers


def save_figure(path: Path, draw: "Callable[[Axes], None]", rows: int = 0, columns: int = 0) -> None:
    """Draw a panel into a PNG, with room for the labels of so many rows and columns."""
    figure, axes = new_figure(1, max(3.8, 1.6 + 0.2 * min(rows, MOST_ROWS)), max(4.8, 2.6 + 0.45 * columns))
    draw(axes[0])
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write(path, content.getvalue())
    print(f"Wrote {path}")


def new_figure(columns: int, height: float = 3.8, width: float = 4.8) -> "tuple[Figure, list[Axes]]":
    """Make a figure of panels of this size in inches, without touching the user's backend or open figures."""
    with files.extra("demo", "Figures need matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width * columns, height), layout="constrained", dpi=150)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def spectrum(expert: Expert, bins: int) -> Tensor | None:
    """
    Measure mean abs(z - 1) along the spectrum, averaged over the weights of an expert.

    Returns:
        `torch.Tensor` of shape `(bins,)`, largest singular values first: each spectrum is cut into parts of equal
        length, because weights differ in size. `None` if every z-vector is shorter than `bins`.
    """
    parts = [
        torch.stack([chunk.abs().mean() for chunk in torch.tensor_split(offset, bins)])
        for offset in expert.offsets.values()
        if len(offset) >= bins
    ]
    return torch.stack(parts).mean(0) if parts else None


def distances(expert: Expert) -> tuple[list[str], list[str], Tensor]:
    """
    Measure mean abs(z - 1) in each layer and kind of weight.

    Returns:
        Labels of the layers, kinds of weight (`"mlp.up_proj"`), and a `torch.Tensor` of shape `(layers, kinds)`, NaN
        if a layer has no weight of that kind.
    """
    cells: dict[tuple[str, int], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for module, offset in expert.offsets.items():
        block = block_of(module)
        stack, _, number = block.rpartition(".")
        inside = module.removeprefix(f"{block}.").split(".")
        kind = ".".join(part for part in inside if not part.isdigit())  # the experts of a layer count as one kind
        cells[("", -1) if block == module else (stack, int(number))][kind].append(offset)
    layers = sorted(cells)
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    table = torch.full((len(layers), len(kinds)), torch.nan)
    for i, layer in enumerate(layers):
        for kind, offsets in cells[layer].items():
            table[i, kinds.index(kind)] = torch.cat(offsets).abs().mean()
    alone = len({stack for stack, _ in layers}) == 1  # an encoder-decoder has two stacks
    labels = ["-" if number < 0 else str(number) if alone else f"{stack}.{number}" for stack, number in layers]
    return labels, kinds, table


def draw_effects(axes: "Axes", effects: Mapping[str, Any], name: str) -> None:
    """
    Draw what undoing each block of an expert costs, with 95 % intervals over examples.

    [`block_effects`][peft_svf.adaptation.judge.block_effects] measures `effects`.
    """
    parts = {block: torch.as_tensor(effects[block], dtype=torch.float64) for block in effects if block != "all"}
    means = [float(part.mean()) for part in parts.values()]
    errors = [1.96 * float(part.std(correction=0)) / math.sqrt(len(part)) for part in parts.values()]
    places, count = range(len(parts)), len(next(iter(parts.values())))
    axes.bar(places, means, yerr=errors, color="C0", error_kw={"linewidth": 0.8, "ecolor": "grey"})
    axes.axhline(0, color="black", linewidth=0.8)
    step = math.ceil(len(parts) / 16)
    axes.set_xticks(places[::step], [block.rpartition(".")[2] for block in parts][::step])
    total = sum(effects["all"]) / count
    axes.set(
        xlabel="block whose z is set back to 1",
        ylabel="right answers less likely by (nats)",
        title=f"{name}: all blocks {total:+.2f} nats, {count} example{'s' * (count != 1)}",
    )


def draw_layers(axes: "Axes", layers: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draw the weight of each expert in each block of a model, as in `provenance["layers"]` of a mixture."""
    names, alone = list(next(iter(layers.values()))), len({block.rpartition(".")[0] for block in layers}) == 1
    weights = torch.tensor([[row[name] for name in names] for row in layers.values()])  # (blocks, experts)
    labels = [block.rpartition(".")[2] if alone else block for block in layers]
    low, high = min(0.0, float(weights.min())), max(1.0, float(weights.max()))
    _draw_table(axes, weights, labels, names, "weight α", low, high)
    axes.set(ylabel="layer", title=title)


def draw_alpha(axes: "Axes", mixture: Mixture, names: Sequence[str] = ()) -> None:
    """Draw the weights of a mixture as bars, 0 for other `names`; what is left of 1 is the base's (`"other"`)."""
    shares = {**dict.fromkeys(names, 0.0), **mixture.alpha, OTHER: 1 - sum(mixture.alpha.values())}
    bars = axes.barh(list(shares), list(shares.values()), color=[*["C0"] * (len(shares) - 1), "lightgrey"])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.18)  # room for the numbers
    axes.invert_yaxis()  # the first expert on top
    axes.set(xlabel="weight α", title=f"mixture ({mixture.strategy})")


def draw_probabilities(axes: "Axes", prompts: Sequence[str], mixtures: Sequence[Mixture]) -> None:
    """Draw the probability of each expert for each prompt, the chosen one in bold; colours alone beyond 30 prompts."""
    rows = [mixture.record()["probabilities"] for mixture in mixtures]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])
    _draw_table(axes, table, [short(text, 30) for text in prompts], names, "probability", 0, 1, MOST_ROWS)
    if len(mixtures) <= MOST_NUMBERED:
        texts = [[f"{x:.2f}" for x in row] for row in table.tolist()]
        _write(axes, table, texts, [names.index(mixture.choice) for mixture in mixtures])
    axes.set(xlabel="expert", ylabel="prompt", title="first pass: probabilities")


def draw_decisions(axes: "Axes", counts: Mapping[str, Mapping[str, int]], title: str) -> None:
    """
    Draw which expert the first pass chose for each kind of question: shares by row as colour, counts as text.

    `counts` has the number of prompts by choice, for each kind.
    """
    kinds, choices = list(counts), sorted({choice for row in counts.values() for choice in row})
    table = torch.tensor([[float(counts[kind].get(choice, 0)) for choice in choices] for kind in kinds])
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    _draw_table(axes, shares, kinds, choices, "share of the kind", 0, 1)
    _write(axes, shares, [[f"{count:.0f}" for count in row] for row in table.tolist()])
    axes.set(xlabel="chosen expert", ylabel="kind of question", title=title)


def _draw_table(
    axes: "Axes",
    table: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    low: float | None = 0,
    high: float | None = None,
    most: int = 16,
) -> None:
    """Draw a table `(rows, columns)` as colours with a scale, at most `most` rows labelled."""
    image = axes.imshow(table.numpy(), cmap="Blues", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    every = math.ceil(len(rows) / most)
    axes.set_yticks(range(0, len(rows), every), rows[::every], parse_math=False)  # a "$" is a dollar
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.figure.colorbar(image, ax=axes, label=label)


def _write(axes: "Axes", table: Tensor, texts: Sequence[Sequence[str]], bold: Sequence[int] = ()) -> None:
    """Write texts into the cells of a drawn table; `bold` has a column for each row."""
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            weight = "bold" if list(bold[i : i + 1]) == [j] else "normal"
            colour = "white" if table[i, j] > 0.5 else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, weight=weight)
