# SPDX-License-Identifier: Apache-2.0
"""`factor` and `inspect`: the bases of a model's weights, and how far an expert's z has moved along them."""

import argparse
import math
import time
from collections import defaultdict

from .console import save_figure, size, table
from .sources import load_model, weights_of
from .train_config import SVFArguments, svf_config


def factor(args: argparse.Namespace) -> None:
    """Compute the bases of a model into the cache and show their size."""
    from peft import get_peft_model

    from ..tuner.cache import cache_dir, usage

    before, _ = usage()
    model, _ = load_model(args.model, args.revision, args.dtype, reader=False)
    svf = svf_config(SVFArguments(target_modules=args.target_modules), model)
    found = weights_of(model, svf)
    start = time.perf_counter()
    get_peft_model(model, svf)
    seconds = time.perf_counter() - start
    groups: dict[tuple[str, int, int], int] = defaultdict(int)
    for name, out, into, _ in found:
        groups[name.rpartition(".")[2], out, into] += 1
    lines = []
    for (kind, out, into), count in groups.items():
        r = min(out, into)
        lines.append([kind, str(count), f"{out} x {into}", str(r), size(count * 4 * r * r)])
    print(table(["kind", "weights", "shape", "directions", "on disk"], lines))
    entries, total = usage()
    print(f"{entries - before} of {len(found)} computed in {seconds:.1f} s, the others were there or are alike.")
    print(f"Cache {cache_dir()}: {entries} entries, {size(total)}.")


def inspect(args: argparse.Namespace) -> None:
    """Show abs(z - 1) of an expert per layer and kind of weight, and along the spectrum."""
    from ..experts.expert import Expert
    from ..plots import distances, draw_distances, draw_spectrum, spectrum

    expert = Expert.load(args.expert)
    layers, kinds, means = distances(expert)
    numbers = [offset.abs() for offset in expert.offsets.values()]
    count, largest = sum(map(len, numbers)), max(float(x.max()) for x in numbers)
    mean = sum(float(x.sum()) for x in numbers) / count
    print(f"{expert.name}: {expert.description or 'no description'}")
    print(f"base {expert.base_model}; {count:,} multipliers z of {len(numbers)} weights")
    print(f"mean |z-1| {mean:.4f}, largest {largest:.4f}\n\nmean |z-1| by layer and kind of weight")
    lines = [
        [name, *("" if math.isnan(x) else f"{x:.4f}" for x in row)]
        for name, row in zip(layers, means.tolist(), strict=True)
    ]
    print(table(["layer", *kinds], lines))
    bins = min(8, min(map(len, numbers)))
    if (line := spectrum(expert, bins)) is not None:
        print("\nmean |z-1| along the spectrum, largest singular values first")
        shares = [f"{100 * i / bins:.0f}-{100 * (i + 1) / bins:.0f} %" for i in range(bins)]
        print(table(shares, [[f"{x:.4f}" for x in line.tolist()]]))
    if args.plot:
        save_figure(args.plot, [lambda axes: draw_distances(axes, expert), lambda axes: draw_spectrum(axes, [expert])])
