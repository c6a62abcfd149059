# SPDX-License-Identifier: Apache-2.0
"""What a command line names -> tasks, base models, experts, mixtures, examples. Prints nothing."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..experts.expert import Mixture
    from ..rows import Reader
    from ..tasks import Task
    from ..two_pass import Transformer2Model


def find_task(name: str) -> "Task":
    """Find a benchmark by its name, or make a task of a JSONL file or folder."""
    from ..tasks import get_task, jsonl_task, task_names

    own = name not in task_names() and (os.path.exists(name) or "/" in name or name.endswith((".jsonl", ".jsonl.gz")))
    return jsonl_task(name) if own else get_task(name)


def rows_of(task: "Task", split: str, form: str, limit: int | None, **options: Any) -> "list[dict[str, Any]]":
    """Make the rows of a split; refuse a split without any."""
    rows = task.rows(split, form, limit, **options)
    if not rows:
        raise ValueError(f"Task {task.name!r} has no {split} rows in the {form} form.")
    return rows


def load_model(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    *,
    device: "str | torch.device | None" = None,
    trust: bool = False,
) -> "tuple[PreTrainedModel, Reader]":
    """Load a base model and its reader, by default onto the accelerator."""
    from ..two_pass import load_model

    try:
        model, reader = load_model(name, dtype=dtype, revision=revision, trust_remote_code=trust)
    except OSError as error:
        if name in str(error):
            raise
        raise OSError(f"{name!r} can't be loaded: {error}") from error
    return model.to(device or _accelerator()), reader


def load_base(
    experts: Any, model: str | None, revision: str | None, dtype: str, **settings: Any
) -> "tuple[PreTrainedModel, Reader]":
    """Load the base model of this name, or the one that experts name."""
    from ..two_pass import base_of

    name, own = (model, None) if model else base_of(experts)
    return load_model(name, revision or own, dtype, **settings)


def _accelerator() -> "torch.device":
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def named_sources(experts: Sequence[str]) -> dict[str, str]:
    """Read experts that are written `SOURCE` or `NAME=SOURCE`, sources as in [`Expert.load`]."""
    from ..experts.expert import name_of

    sources: dict[str, str] = {}
    for entry in experts:
        name, equals, source = entry.partition("=")
        if not equals or os.path.exists(entry):
            name, source = name_of(entry), entry
        if name in sources:
            raise ValueError(f"Two experts are called {name!r}: give one another name by NAME=EXPERT.")
        sources[name] = source
    return sources


def load_experts(
    experts: Sequence[str],
    model: str | None,
    revision: str | None,
    dtype: str,
    classifier: str | None = None,
) -> "Transformer2Model":
    """Load experts, written as in [`named_sources`], over a base model, default the one they name; or a bundle."""
    from ..experts.bundle import find_bundle
    from ..experts.library import loaded
    from ..two_pass import Transformer2Model

    bundle = find_bundle(experts[0]) if len(experts) == 1 and not model else None
    if bundle or not experts:
        source = str(bundle) if bundle else model
        two_pass = Transformer2Model.from_pretrained(source, classifier=classifier, dtype=dtype, revision=revision)
        two_pass.to(_accelerator())
        return two_pass
    named = loaded(named_sources(experts))  # so that each file is opened once
    base, reader = load_base(named, model, revision, dtype)
    return Transformer2Model(base, reader, named, classifier)


def read_mixture(entries: Sequence[str]) -> "Mixture":
    """Read a saved mixture, or one written as `NAME=WEIGHT`s."""
    from ..experts.expert import Mixture

    if len(entries) == 1 and ("=" not in entries[0] or os.path.exists(entries[0])):
        return Mixture.load(entries[0])
    alpha: dict[str, float] = {}
    for entry in entries:
        name, _, weight = entry.partition("=")
        try:
            alpha[name] = float(weight)
        except ValueError:
            what = "a file, or expert names with weights such as math=0.7"
            raise ValueError(f"A mixture is {what}; got {entry!r}.") from None
    return Mixture(alpha)


def read_examples(path: Path) -> list[dict[str, Any]]:
    """Read rows of JSON lines; a prompt that is a text becomes a user's turn."""
    from ..tasks.task import read_rows, user_turn

    rows = [{**row, "prompt": user_turn(row["prompt"])} for _, row in read_rows(path)]
    if not rows:
        raise ValueError(f"{path} is empty: it needs one JSON object a line.")
    return rows
