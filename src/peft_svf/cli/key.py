# SPDX-License-Identifier: Apache-2.0
"""`key`: an expert and prompts that it is for -> its routing key, by which libraries find it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options
from .options import option
from .sources import load_model, read_examples


def key(
    expert: Annotated[Path, typer.Argument(help="Folder of the expert, which gets `routing.safetensors`.")],
    prompts: Annotated[Path, option("JSONL with `prompt` in each line: what the expert is for.")],
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    block: Annotated[int | None, option("Blocks that read a prompt. Default: a sixth of them.", min=1)] = None,
    pooling: Annotated[Literal["both", "mean", "last"], option("Over the tokens of a prompt.")] = "both",
    limit: Annotated[int, option("Prompts of the key; of more, so many are drawn.", min=1)] = 64,
    seed: Annotated[int, option("Of the draw.")] = 0,
    batch_size: options.BatchSize = 16,
) -> None:
    """
    Give an expert a routing key, made from prompts that it is for.

    The key holds what the base model makes of the prompts in its first blocks, no text.
    """
    from .. import files
    from ..experts.expert import Expert
    from ..experts.key import KEY_NAME, make_key
    from ..two_pass import base_of

    rows = read_examples(prompts)
    base, base_revision = (model, None) if model else base_of([Expert.load(expert)])
    loaded, reader = load_model(base, revision or base_revision, dtype)
    settings = {"block": block, "limit": limit, "seed": seed, "batch_size": batch_size}
    made = make_key(loaded, reader, [row["prompt"] for row in rows], pooling=pooling, **settings)  # type: ignore[arg-type]
    files.write(expert / KEY_NAME, made.to_bytes())
    print(f"Wrote {expert / KEY_NAME}: {len(made.states)} prompts, read by {made.block} blocks of {base}")
