# SPDX-License-Identifier: Apache-2.0
"""What a command line names -> tasks, base models, experts, mixtures, examples. Nothing here prints."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..experts.expert import Mixture, SavedExpert
    from ..rows import Reader
    from ..tasks import Task
    from ..tuner.config import SVFConfig


def find_task(name: str) -> "Task":
    """Find a benchmark by its name, or make a task of a JSONL file or folder."""
    from ..tasks import get_task, jsonl_task, task_names

    own = name not in task_names() and (os.path.exists(name) or "/" in name or name.endswith((".jsonl", ".jsonl.gz")))
    return jsonl_task(name) if own else get_task(name)


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_model(
    name: str,
    revision: str | None = None,
    dtype: str = "auto",
    *,
    images: bool = False,
    reader: bool = True,
    device: "torch.device | None" = None,
    trust_remote_code: bool = False,
) -> "tuple[PreTrainedModel, Reader | None]":
    """
    Load a base model onto the accelerator, where there is one, and what reads its prompts.

    Args:
        name (`str`): Folder or Hub repository.
        revision (`str`, *optional*): Branch, tag or commit.
        dtype (`str`): Of the weights; `"auto"` is that of the checkpoint.
        images (`bool`): Whether the rows that it is to answer have images.
        reader (`bool`): Whether prompts are to be read at all.
        device (`torch.device`, *optional*): Instead of the accelerator.
        trust_remote_code (`bool`): As in transformers.

    Returns:
        The model and its tokenizer, or the processor of one that sees; `None` without a `reader`.

    Raises:
        `OSError`: if there is no such model.
        `ValueError`: for images, if the model sees none.
    """
    import torch
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}; got {dtype!r}.")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        sees = type(AutoConfig.from_pretrained(name, **shared)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    except OSError as error:
        if os.path.isdir(name):
            raise
        raise OSError(f"There is no folder {name!r}, and none could be had from the Hub: {error}") from error
    if images and not sees:
        raise ValueError(f"These rows have images, but {name} sees none: name a vision-language model.")
    found = (AutoProcessor if sees else AutoTokenizer).from_pretrained(name, **shared) if reader else None
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(name, dtype=dtype, **shared).to(device), found


def find_expert(source: str) -> "SavedExpert":
    """Find an expert by `SOURCE` or `NAME=SOURCE`; its values are read when they are needed."""
    from ..experts.expert import SavedExpert

    name, equals, rest = source.partition("=")
    return SavedExpert.find(rest, name) if equals and not os.path.exists(source) else SavedExpert.find(source)


def read_mixture(given: Sequence[str]) -> "Mixture":
    """Read a saved mixture, or one that is written out as `NAME=WEIGHT`s."""
    from ..experts.expert import Mixture

    if len(given) == 1 and ("=" not in given[0] or os.path.exists(given[0])):
        if not os.path.exists(given[0]):
            raise FileNotFoundError(
                f"There is no file {given[0]!r}: a mixture is one that `adapt` wrote, or expert names with weights "
                "such as math=0.7."
            )
        return Mixture.load(given[0])
    alpha: dict[str, float] = {}
    for entry in given:
        name, _, weight = entry.partition("=")
        try:
            alpha[name] = float(weight)
        except ValueError:
            raise ValueError(
                f"A mixture is a file, or expert names with weights such as math=0.7; got {entry!r}."
            ) from None
    return Mixture(alpha)


def read_examples(path: Path, *texts: str) -> list[dict[str, Any]]:
    """
    Read rows, one JSON object a line; a prompt that is a text becomes a user's turn, as in a task of one's own.

    Args:
        path (`Path`): The file.
        texts (`str`): What each row needs besides `prompt`, as a text.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if there is no row, or a line is no object with what it needs; the message has its number.
    """
    from ..rows import check
    from ..tasks.task import read_lines, user_turn

    found = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is no JSON: {error}.") from error
        check(row, f"Line {number} of {path}")
        if missing := [key for key in texts if not isinstance(row.get(key), str)]:
            raise ValueError(f"Line {number} of {path} has no {missing[0]!r} that is a text; it has {list(row)}.")
        found.append({**row, "prompt": user_turn(row["prompt"])})
    if not found:
        raise ValueError(f"{path} has no line: it needs one JSON object a line.")
    return found


def weights_of(model: "PreTrainedModel", svf: "SVFConfig") -> list[tuple[str, int, int, int]]:
    """Name the weights that a config targets, with their two sizes and numbers of multipliers; factors nothing."""
    from dataclasses import replace

    import torch
    from peft import get_peft_model

    from ..tuner.layer import svf_layers

    with torch.device("meta"):  # the shapes alone
        shell = type(model)(model.config)
    layers = svf_layers(get_peft_model(shell, replace(svf)))
    return [
        (
            name,
            *layer.get_base_layer().weight.shape,
            len(layer.svf_offset["default"].weight),
        )
        for name, layer in layers.items()
    ]
