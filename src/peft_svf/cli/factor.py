# SPDX-License-Identifier: Apache-2.0
"""`factor`: a base model -> its bases in the cache."""

import time
from collections import Counter
from typing import Annotated

import typer

from . import options
from .console import show_table, size
from .sources import load_model, weights_of
from .train_config import SVFArguments, svf_config


def factor(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    target_modules: Annotated[
        list[str] | None,
        options.option("Name, once per kind, or all-linear. Default: the MLP weights.", metavar="NAME"),
    ] = None,
) -> None:
    """
    Compute the singular directions of a model's weights into the basis cache and show their size.

    Training and loading an expert then read them from there.
    """
    from peft import get_peft_model

    from ..tuner.cache import cache_dir, usage

    before, _ = usage()
    base, _ = load_model(model, revision, dtype)
    svf = svf_config(SVFArguments(target_modules=target_modules), base)
    shapes = weights_of(base, svf)
    start = time.perf_counter()
    get_peft_model(base, svf)
    seconds = time.perf_counter() - start
    lines = []
    kinds = Counter((name.rpartition(".")[2], out, into) for name, out, into, _ in shapes)
    for (kind, out, into), count in kinds.items():
        r = min(out, into)
        lines.append([kind, str(count), f"{out} x {into}", str(r), size(count * 4 * r * r)])
    show_table(["kind", "weights", "shape", "directions", "on disk"], lines)
    entries, total = usage()
    print(f"{entries - before} of {len(shapes)} computed in {seconds:.1f} s, the others were cached or are equal.")
    print(f"Cache {cache_dir()}: {entries} entries, {size(total)}.")
