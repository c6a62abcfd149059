# SPDX-License-Identifier: Apache-2.0
"""
Experts and decisions -> figures. Needs matplotlib (`pip install 'peft-svf[demo]'`); loads no model.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .expert import Expert

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(columns: int, height: float = 3.8) -> "tuple[Figure, list[Axes]]":
    """
    Make a figure of panels side by side, without touching the user's backend or open figures.

    Raises:
        `ImportError`: if matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'peft-svf[demo]'") from error
    figure = Figure(figsize=(4.6 * columns, height), layout="constrained", dpi=150)
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
    axes.set_xticks(range(len(choices)), choices)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="chosen expert", ylabel="kind of question", title=title)


def draw_spectrum(axes: "Axes", experts: Sequence[Expert], bins: int = 24) -> None:
    """
    Draw how far z is from 1 along the spectrum: mean abs(z - 1) by rank of the singular value, largest first.

    Args:
        axes (`matplotlib.axes.Axes`):
            Panel to draw in.
        experts (`Sequence[Expert]`):
            One line each, averaged over all their weights.
        bins (`int`):
            Parts that each spectrum is cut into, so that weights of different size can be averaged.
    """
    for expert in experts:
        parts = [
            torch.stack([chunk.abs().mean() for chunk in torch.tensor_split(offset, bins)])
            for offset in expert.offsets.values()
            if len(offset) >= bins
        ]
        if parts:
            places = (torch.arange(bins) + 0.5) / bins
            axes.plot(places.numpy(), torch.stack(parts).mean(0).numpy(), label=expert.name)
    axes.set(xlabel="rank of the singular value / number of them", ylabel="mean |z − 1|", title="z-vectors")
    axes.set_ylim(bottom=0)
    axes.legend()
