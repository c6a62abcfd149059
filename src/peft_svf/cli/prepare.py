# SPDX-License-Identifier: Apache-2.0
"""`factor` and `key`, what later runs read: a base model -> its bases; an expert and prompts -> its routing key."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options
from .console import show_table, size
from .options import option
from .sources import load_base, load_model, read_examples
from .train_config import SVFArguments, svf_config


def factor(
    model: Annotated[str, typer.Argument(help="Folder or Hub repository.")],
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    target_modules: Annotated[
        list[str] | None, option("Name, once per kind, or all-linear. Default: the MLP weights.", metavar="NAME")
    ] = None,
) -> None:
    """
    Compute the singular directions of a model's weights into the basis cache and show their size.

    Training and loading an expert then read them from there.
    """
    from peft import get_peft_model

    from ..tuner.cache import cache_dir, usage
    from ..tuner.layer import svf_layers

    before, _ = usage()
    base, _ = load_model(model, revision, dtype)
    start = time.perf_counter()
    layers = svf_layers(get_peft_model(base, svf_config(SVFArguments(target_modules=target_modules), base)))
    seconds = time.perf_counter() - start
    named = layers.items()
    kinds = Counter((name.rpartition(".")[2], layer.out_features, layer.in_features) for name, layer in named)
    lines = [
        [kind, str(count), f"{out} x {into}", str(r := min(out, into)), size(count * 4 * r * r)]
        for (kind, out, into), count in kinds.items()
    ]
    show_table(["kind", "weights", "shape", "directions", "on disk"], lines)
    entries, total = usage()
    print(f"{entries - before} of {len(layers)} computed in {seconds:.1f} s, the others were cached or are equal.")
    print(f"Cache {cache_dir()}: {entries} entries, {size(total)}.")


def key(
    expert: Annotated[Path, typer.Argument(help="Folder of the expert, which gets `routing.safetensors`.")],
    prompts: Annotated[Path, option("JSONL with `prompt` in each line: what the expert is for.")],
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    block: Annotated[int | None, option("Blocks that read a prompt. Default: a third of them.", min=1)] = None,
    pooling: Annotated[
        Literal["both", "mean", "last"],
        option("What it keeps of a prompt's tokens."),
    ] = "both",
    limit: Annotated[int, option("Prompts in the key; more are sampled down to this.", min=1)] = 64,
    seed: Annotated[int, option("Seed of the draw.")] = 0,
    batch_size: options.BatchSize = 16,
) -> None:
    """
    Give an expert a routing key, made from prompts that it is for.

    The key holds what the base model makes of the prompts in its first blocks, no text.
    """
    from .. import files
    from ..experts.expert import Expert
    from ..experts.key import KEY_NAME, make_key

    chats = [row["prompt"] for row in read_examples(prompts)]
    base, reader = load_base([Expert.load(expert)], model, revision, dtype)
    settings = {"block": block, "limit": limit, "seed": seed, "batch_size": batch_size}
    made = make_key(base, reader, chats, pooling=pooling, **settings)  # type: ignore[arg-type]
    files.write(expert / KEY_NAME, made.to_bytes())
    print(f"Wrote {expert / KEY_NAME}: {len(made.states)} prompts, read by {made.block} blocks of {base.name_or_path}")
