# SPDX-License-Identifier: Apache-2.0
"""What a command line names -> tasks, base models, experts, mixtures, examples. Prints nothing."""

import json
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
    from ..tuner.config import SVFConfig
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
    images: bool = False,
    device: "torch.device | None" = None,
    trust: bool = False,
) -> "tuple[PreTrainedModel, Reader]":
    """Load a base model and its reader, by default onto the accelerator; for `images`, the model has to see."""
    from transformers import ProcessorMixin

    from ..two_pass import load_model

    model, reader = load_model(name, dtype=dtype, revision=revision, trust_remote_code=trust)
    if images and not isinstance(reader, ProcessorMixin):
        raise ValueError(f"These rows have images, but {name} doesn't see: name a vision-language model.")
    return model.to(device or _accelerator()), reader


def _accelerator() -> "torch.device":
    """Return the accelerator, or the CPU if there is none."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


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
    *,
    images: bool = False,
) -> "Transformer2Model":
    """Load experts, written as in [`named_sources`], and the base model that they name; or one bundle."""
    from ..experts.bundle import find_bundle
    from ..experts.library import loaded
    from ..two_pass import Transformer2Model, base_of

    if len(experts) == 1 and not model and (folder := find_bundle(experts[0])):
        bundle = Transformer2Model.from_pretrained(str(folder), classifier=classifier, dtype=dtype)
        bundle.to(_accelerator())
        return bundle
    named = loaded(named_sources(experts))  # so that each file is opened once
    base, base_revision = (model, None) if model else base_of(named)
    base_model, reader = load_model(base, revision or base_revision, dtype, images=images)
    return Transformer2Model(base_model, reader, named, classifier)


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
            raise ValueError(
                f"A mixture is a file, or expert names with weights such as math=0.7; got {entry!r}."
            ) from None
    return Mixture(alpha)


def read_examples(path: Path, *texts: str) -> list[dict[str, Any]]:
    """Read rows of JSON lines, each with the fields `texts`; a prompt that is a text becomes a user's turn."""
    from ..rows import check
    from ..tasks.task import read_lines, user_turn

    rows = []
    for number, line in read_lines(path):
        where = f"Line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} isn't JSON: {error}.") from error
        check(row, where)
        if missing := [key for key in texts if not isinstance(row.get(key), str)]:
            raise ValueError(f"{where} needs a text as {missing[0]!r}; it has {', '.join(row)}.")
        rows.append({**row, "prompt": user_turn(row["prompt"])})
    if not rows:
        raise ValueError(f"{path} is empty: it needs one JSON object a line.")
    return rows


def weights_of(model: "PreTrainedModel", svf: "SVFConfig") -> list[tuple[str, int, int, int]]:
    """List name, both sizes and number of multipliers of the weights that a config targets; factors nothing."""
    from dataclasses import replace

    import torch
    from peft import get_peft_model

    from ..tuner.layer import svf_layers

    with torch.device("meta"):  # the shapes alone
        shell = type(model)(model.config)
    layers: dict[str, Any] = svf_layers(get_peft_model(shell, replace(svf)))
    return [
        (name, *layer.get_base_layer().weight.shape, len(layer.svf_offset["default"].weight))
        for name, layer in layers.items()
    ]
