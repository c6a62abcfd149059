# SPDX-License-Identifier: Apache-2.0
"""`search`: a base model -> the experts of it on the Hub."""

from typing import Annotated

import typer

from .console import show_table
from .options import option


def search(
    base: Annotated[str, typer.Argument(help="Hub repository of the base model.")],
    limit: Annotated[int, option("Experts at most, the most downloaded first.", min=1)] = 20,
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
