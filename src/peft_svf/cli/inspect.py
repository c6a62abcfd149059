# SPDX-License-Identifier: Apache-2.0
"""`inspect` and `search`: an expert -> its z, and what each block does; a base model -> its experts on the Hub."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import show_table
from .sources import load_base, read_examples

if TYPE_CHECKING:
    from ..experts.expert import Expert


def inspect(
    expert: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    examples: Annotated[
        Path | None, options.option("Solved rows, JSONL: measure what each block does to them.")
    ] = None,
    limit: Annotated[int, options.option("Examples at most.", min=1)] = 16,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 32,
    plot: options.Plot = None,
) -> None:
    """
    Show what an expert has moved: how far its multipliers z are from 1, by layer, kind of weight, and singular value.

    That needs no model, but says little, since Adam moves all z alike. With --examples it measures, for each block,
    how much less likely right answers get if the z of that block is 1 again.
    """
    from ..experts.expert import Expert
    from .plots import distances, spectrum

    if plot and not examples:
        raise typer.BadParameter("--plot draws what blocks do to examples: name a file of them by --examples.")
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
    if examples:
        _show_effects(loaded, read_examples(examples)[:limit], model, revision, dtype, batch_size, plot)


def _show_effects(
    expert: "Expert",
    rows: list[dict[str, Any]],
    model: str | None,
    revision: str | None,
    dtype: str,
    batch_size: int,
    plot: Path | None,
) -> None:
    from ..adaptation.judge import block_effects
    from ..experts.expert import Mixture
    from ..two_pass import Transformer2Model

    named = {expert.name: expert}
    two_pass = Transformer2Model(*load_base(named, model, revision, dtype), named)
    effects = block_effects(two_pass.library, two_pass.tokenizer, Mixture({expert.name: 1.0}), rows, batch_size)
    print(f"\nright answers less likely by (nats), if z is 1 in a block, mean of {len(rows)} examples")
    show_table(["block", "nats"], [[block, f"{effect.mean():+.3f}"] for block, effect in effects.items()])
    if plot:
        from .plots import draw_effects, save_figure

        save_figure(plot, lambda axes: draw_effects(axes, effects, expert.name), columns=len(effects) // 2)


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
