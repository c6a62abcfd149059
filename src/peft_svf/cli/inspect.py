# SPDX-License-Identifier: Apache-2.0
"""`inspect`: an expert -> how far its z has moved from 1."""

import math
from typing import Annotated

import typer

from . import options
from .console import save_figure, show_table


def inspect(
    expert: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    plot: options.Plot = None,
) -> None:
    """
    Show what an expert has moved: abs(z - 1) by layer and kind of weight, and along the spectrum.

    Loads no model.
    """
    from ..experts.expert import Expert
    from ..plots import distances, draw_distances, draw_z, spectrum

    loaded = Expert.load(expert)
    layers, kinds, means = distances(loaded)
    moves = [offset.abs() for offset in loaded.offsets.values()]
    count = sum(map(len, moves))
    print(f"{loaded.name}: {loaded.description or 'no description'}")
    print(f"base {loaded.base_model}; {count:,} multipliers z of {len(moves)} weights")
    mean, largest = sum(float(x.sum()) for x in moves) / count, max(float(x.max()) for x in moves)
    print(f"mean |z-1| {mean:.4f}, largest {largest:.4f}\n\nmean |z-1| by layer and kind of weight")
    rows = zip(layers, means.tolist(), strict=True)
    show_table(["layer", *kinds], [[name, *("" if math.isnan(x) else f"{x:.4f}" for x in row)] for name, row in rows])
    bins = min(8, min(map(len, moves)))
    if (line := spectrum(loaded, bins)) is not None:
        print("\nmean |z-1| along the spectrum, largest singular values first")
        header = [f"{100 * i / bins:.0f}-{100 * (i + 1) / bins:.0f} %" for i in range(bins)]
        show_table(header, [[f"{x:.4f}" for x in line.tolist()]])
    if plot:
        panels = [lambda axes: draw_distances(axes, loaded), lambda axes: draw_z(axes, [loaded])]
        save_figure(plot, panels, len(layers), len(kinds))
