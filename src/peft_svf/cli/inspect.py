# SPDX-License-Identifier: Apache-2.0
"""`inspect` and `search`: an expert -> how far its z has moved from 1; a base model -> its experts on the Hub."""

import math
from typing import Annotated

import typer

from . import options
from .console import show_table


def inspect(
    expert: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    plot: options.Plot = None,
) -> None:
    """
    Show what an expert has moved: abs(z - 1) by layer and kind of weight, and along the spectrum.

    Loads no model.
    """
    from ..experts.expert import Expert
    from .plots import distances, draw_distances, save_figure, spectrum

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
        save_figure(plot, lambda axes: draw_distances(axes, loaded), len(layers), len(kinds))


def search(
    base: Annotated[str, typer.Argument(help="Hub repository of the base model.")],
    limit: Annotated[int, options.option("Experts at most, the most downloaded first.", min=1)] = 20,
) -> None:
    """List the experts and bundles of a base model on the Hub."""
    from huggingface_hub import HfApi

    tags = ["svf", f"base_model:adapter:{base}"]
    models = list(HfApi().list_models(filter=tags, sort="downloads", limit=limit))
    if not models:
        raise ValueError(f"The Hub has no experts of {base!r}, or none with the tags {' and '.join(tags)}.")
    rows = [
        [
            model.id,
            "bundle" if "transformer2" in (model.tags or ()) else "expert",
            str(model.downloads or 0),
            str(model.likes or 0),
            f"{model.last_modified:%Y-%m-%d}" if model.last_modified else "",
        ]
        for model in models
    ]
    show_table(["repository", "kind", "downloads", "likes", "changed"], rows)
