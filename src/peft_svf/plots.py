# SPDX-License-Identifier: Apache-2.0
"""
Experts and decisions -> figures. Needs matplotlib (`pip install 'peft-svf[demo]'`); loads no model.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .experts.expert import OTHER, Expert, Mixture
from .tuner.targets import block_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 150  # of rows; where there are more, not each has one
MOST_NUMBERED = 30  # rows that are read cell by cell
PARTS = ("share right", "log-likelihood")  # of a score on examples


def size_of(rows: int = 0, names: int = 0) -> dict[str, float]:
    """The size in inches of a panel in which the labels of so many rows and columns do not run into each other."""
    return {"height": max(3.8, 1.6 + 0.2 * min(rows, MOST_LABELS)), "width": max(4.6, 2.6 + 0.45 * names)}


def new_figure(columns: int, height: float = 3.8, width: float = 4.6) -> "tuple[Figure, list[Axes]]":
    """
    Make a figure of panels side by side, without touching the user's backend or open figures.

    Raises:
        `ImportError`: if matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'peft-svf[demo]'") from error
    figure = Figure(figsize=(width * columns, height), layout="constrained", dpi=150)
    axes: Any = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def draw_decisions(axes: "Axes", counts: Mapping[str, Mapping[str, int]], title: str) -> None:
    """
    Draw which expert the first pass chose for each kind of question: shares by row, counts as text.

    Args:
        axes (`matplotlib.axes.Axes`):
            Panel to draw in.
        counts (`Mapping[str, Mapping[str, int]]`):
            Per kind of question the number of prompts by choice.
        title (`str`):
            Title of the panel.
    """
    kinds, choices = list(counts), sorted({choice for row in counts.values() for choice in row})
    table = torch.tensor([[float(counts[kind].get(choice, 0)) for choice in choices] for kind in kinds])
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(len(kinds)):
        for j in range(len(choices)):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{int(table[i, j])}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(choices)), choices, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="chosen expert", ylabel="kind of question", title=title)


def spectrum(expert: Expert, bins: int) -> Tensor | None:
    """
    Measure how far z is from 1 along the spectrum, averaged over the weights of an expert.

    Args:
        expert ([`Expert`]):
            The z-vectors.
        bins (`int`):
            Parts that each spectrum is cut into, so that weights of different size can be averaged.

    Returns:
        `torch.Tensor` of shape `(bins,)`: mean abs(z - 1), largest singular values first; `None` where every z-vector
        is shorter than `bins`.
    """
    parts = [
        torch.stack([chunk.abs().mean() for chunk in torch.tensor_split(offset, bins)])
        for offset in expert.offsets.values()
        if len(offset) >= bins
    ]
    return torch.stack(parts).mean(0) if parts else None


def distances(expert: Expert) -> tuple[list[str], list[str], Tensor]:
    """
    Measure how far z is from 1 in each layer and kind of weight.

    Args:
        expert ([`Expert`]):
            The z-vectors.

    Returns:
        Labels of the layers, kinds of weight (`"mlp.up_proj"`), and mean abs(z - 1) as a `torch.Tensor` of shape
        `(layers, kinds)`: over all weights of that kind in that layer, NaN where there is none.
    """
    cells: dict[tuple[str, int], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for module, offset in expert.offsets.items():
        block = block_of(module)
        stack, _, number = block.rpartition(".")
        inside = module.removeprefix(f"{block}.").split(".")
        kind = ".".join(part for part in inside if not part.isdigit())  # numbers here are those of a layer's experts
        cells[("", -1) if block == module else (stack, int(number))][kind].append(offset)
    layers = sorted(cells)
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    means = [
        [torch.cat(cells[x][k]).abs().mean() if k in cells[x] else torch.tensor(torch.nan) for k in kinds]
        for x in layers
    ]
    alone = len({stack for stack, _ in layers}) == 1  # an encoder-decoder has two stacks
    labels = ["-" if number < 0 else str(number) if alone else f"{stack}.{number}" for stack, number in layers]
    return labels, kinds, torch.stack([torch.stack(row) for row in means])


def draw_distances(axes: "Axes", expert: Expert) -> None:
    """Draw mean abs(z - 1) of each layer and kind of weight of an expert, with a scale beside it."""
    layers, kinds, table = distances(expert)
    image = axes.imshow(table.numpy(), cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    every = math.ceil(len(layers) / 16)  # labels that do not run into each other
    axes.set_yticks(range(0, len(layers), every), layers[::every])
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", rotation_mode="anchor")
    axes.set(ylabel="layer", title=f"{expert.name}: mean |z − 1|")
    axes.figure.colorbar(image, ax=axes)


def draw_layers(axes: "Axes", layers: Mapping[str, Mapping[str, float]], title: str) -> None:
    """
    Draw the weight of each expert in each block of a model, with a scale beside it.

    Args:
        axes (`matplotlib.axes.Axes`):
            Panel to draw in.
        layers (`Mapping[str, Mapping[str, float]]`):
            By block the weights by name, as a search per layer leaves them in `provenance["layers"]`.
        title (`str`):
            Title of the panel.
    """
    names, alone = list(next(iter(layers.values()))), len({block.rpartition(".")[0] for block in layers}) == 1
    weights = torch.tensor([[row[name] for name in names] for row in layers.values()])  # (blocks, experts)
    low, high = min(0.0, float(weights.min())), max(1.0, float(weights.max()))
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    every = math.ceil(len(layers) / 16)  # labels that do not run into each other
    labels = [block.rpartition(".")[2] if alone else block for block in layers]
    axes.set_yticks(range(0, len(labels), every), labels[::every])
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set(ylabel="layer", title=title)
    axes.figure.colorbar(image, ax=axes, label="weight α")


def draw_search(axes: "Axes", mixture: Mixture) -> None:
    """
    Draw the course of a few-shot search: the best score so far and the population's mean score by iteration.

    Raises:
        `ValueError`: if the mixture has no history of a search.
    """
    history = mixture.provenance.get("history")
    if not history:
        raise ValueError(f"This mixture was found by {mixture.strategy!r}: only a few-shot search has a course.")
    # a score is a tuple, of which later parts decide ties: the first part that tells members apart is drawn
    courses = {key: list(zip(*(entry[key] for entry in history), strict=True)) for key in ("best", "mean_score")}
    parts = range(len(courses["best"]))
    part = next((i for i in parts if len({*courses["best"][i], *courses["mean_score"][i]}) > 1), 0)
    for key, label in (("best", "best so far"), ("mean_score", "mean of the population")):
        axes.plot(range(1, len(history) + 1), courses[key][part], marker="o", markersize=3, label=label)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set(xlabel="iteration", ylabel=f"{PARTS[part]} of the examples", title="few-shot search")
    axes.legend()


def draw_alpha(axes: "Axes", mixture: Mixture, names: Sequence[str] = ()) -> None:
    """Draw the weights of a mixture as bars, 0 for other `names`; what is left of 1 is the base's (`"other"`)."""
    shares = {**dict.fromkeys(names, 0.0), **mixture.alpha, OTHER: 1 - sum(mixture.alpha.values())}
    axes.barh(list(shares), list(shares.values()))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="weight α", title=f"mixture ({mixture.strategy})")


def draw_probabilities(axes: "Axes", prompts: Sequence[str], mixtures: Sequence[Mixture]) -> None:
    """
    Draw the probability that the first pass gave each expert, one row per prompt; the chosen one is in bold.

    Above 30 prompts there is a scale instead of numbers.

    Args:
        axes (`matplotlib.axes.Axes`):
            Panel to draw in, as large as [`size_of`] says.
        prompts (`Sequence[str]`):
            Labels of the rows.
        mixtures (`Sequence[Mixture]`):
            One per prompt, as `dispatch` returns them.
    """
    names = list(dict.fromkeys(name for mixture in mixtures for name in mixture.record()["probabilities"]))
    table = torch.tensor([[m.record()["probabilities"].get(name, 0.0) for name in names] for m in mixtures])
    image = axes.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if len(mixtures) > MOST_NUMBERED:
        axes.figure.colorbar(image, ax=axes, label="probability")
    for i, mixture in enumerate(mixtures if len(mixtures) <= MOST_NUMBERED else ()):
        for j, name in enumerate(names):
            weight = "bold" if name == mixture.choice else "normal"
            colour = "white" if table[i, j] > 0.5 else "black"
            axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", color=colour, weight=weight)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    every = math.ceil(len(prompts) / MOST_LABELS)
    lines = [" ".join(text.split()) for text in prompts[::every]]
    shown = [line if len(line) <= 30 else line[:29] + "…" for line in lines]
    axes.set_yticks(range(0, len(prompts), every), shown, parse_math=False)  # a "$" is a dollar
    axes.set(xlabel="expert", title="first pass: probabilities")


def draw_spectrum(axes: "Axes", experts: Sequence[Expert], bins: int = 24) -> None:
    """
    Draw how far z is from 1 along the spectrum: mean abs(z - 1) by rank of the singular value, largest first.

    Args:
        axes (`matplotlib.axes.Axes`):
            Panel to draw in.
        experts (`Sequence[Expert]`):
            One line each, averaged over all their weights; none for z-vectors shorter than `bins`.
        bins (`int`):
            As in [`spectrum`].
    """
    for expert in experts:
        if (line := spectrum(expert, bins)) is not None:
            places = (torch.arange(bins) + 0.5) / bins
            axes.plot(places.numpy(), line.numpy(), label=expert.name)
    axes.set(xlabel="rank of the singular value / number of them", ylabel="mean |z − 1|", title="z-vectors")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend()
