# SPDX-License-Identifier: Apache-2.0
"""`push`: an expert -> a repository on the Hub, with what its card can show."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import option
from .sources import load_model

ENERGY = 0.9975  # share of the squared change that a LoRA keeps: it leaves out 5 % of the change


def push(
    expert: Annotated[str, typer.Argument(help="Folder of an expert, as train and export write it.")],
    repo: Annotated[str, typer.Argument(help="Hub repository, made if need be.", metavar="ORG/NAME")],
    model: Annotated[str | None, option("Hub id of the base model. Default: the expert's base.")] = None,
    license: Annotated[str | None, option("Licence of the expert, such as apache-2.0.")] = None,
    lora: Annotated[bool, option("Also write lora/, for PEFT without this package and vLLM.", "--lora")] = False,
    collection: Annotated[str | None, option("Put it into this collection of yours.", metavar="TITLE")] = None,
    private: Annotated[bool, option("Make a private repository.", "--private")] = False,
) -> None:
    """
    Upload an expert to the Hub with its card: how it was trained and measured, how to use it, what its blocks do.
    """
    from huggingface_hub import HfApi

    from ..experts.expert import Expert
    from ..experts.export import export_lora
    from ..experts.hub import PICTURE, base_id, push_expert

    if "/" not in repo:
        raise typer.BadParameter(f"{repo!r} isn't a repository: write ORG/NAME.")
    loaded, result = Expert.load(expert), Path(expert) / "result.json"
    base = base_id(loaded.base_model, model)
    facts: Any = json.loads(result.read_text("utf-8")).get("card", {}) if result.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        beside = Path(scratch)
        if (drawn := Path(expert) / PICTURE).is_file():  # by peft-svf inspect
            shutil.copy(drawn, beside)
        if lora:
            rank = None if loaded.config.get("rank") else ENERGY  # a LoRA of rank k is exact
            base_model, _ = load_model(base, loaded.config.get("revision"), device="cpu")
            export_lora(loaded, base_model, beside / "lora", rank)
        options: Any = {"license": license, "private": private or None, **facts}
        push_expert(loaded, repo, base_model=base, beside=beside, **options)
    print(f"Uploaded {repo}")
    if collection:
        made = HfApi().create_collection(collection, namespace=repo.split("/")[0], exists_ok=True)
        HfApi().add_collection_item(made.slug, repo, "model", exists_ok=True)
        print(f"It is in the collection {made.url}")
