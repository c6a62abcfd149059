# SPDX-License-Identifier: Apache-2.0
"""
Expert + base model -> files that other engines read: a merged checkpoint, a LoRA, a GGUF file.

Weights are handled one at a time, so the model is in memory once. A mixture is exported like an expert: it is one,
`0.7 * math + 0.3 * code`. docs/how_to/share.md lists the engines, and what was run.
"""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..rows import Reader
from ..tuner.basis import Basis, exact, rescale
from .base import BaseWeights, refuse_adapters
from .expert import PREFIX, Expert

MISSING = 0.05  # A truncated LoRA may leave out this share of the change of one kind of weight.


def merge_expert(expert: Expert, model: PreTrainedModel) -> None:
    """
    Rescale the weights of a base model in place: it becomes the merged model, and nothing of SVF is left in it.

    Args:
        expert ([`Expert`]): z-vectors of this base, such as `0.7 * math + 0.3 * code`.
        model (`PreTrainedModel`): The base, without adapters and not quantised.

    Raises:
        `ValueError`: if the expert belongs to another base, or moves a weight that the model uses in two places; the
            model is then as it was.
    """
    refuse_adapters(model)
    weights, places = BaseWeights(model, expert.config), defaultdict[int, list[str]](list)
    weights.check(expert)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[parameter.data_ptr()].append(name)
    for name in expert.offsets:
        if len(shared := places[weights[name].data_ptr()]) > 1:
            raise ValueError(f"{shared[0]} and {shared[1]} share one weight: z of {name} would rescale both.")
    for name, offset in _progress(expert, "Merging"):
        weight = weights[name]
        Q, offset = _used(weights.basis(name)[0], offset)
        weight.copy_(rescale(weight, Q.to(weight.device), offset.to(weight.device)))


def export_merged(
    expert: Expert, model: PreTrainedModel, folder: str | os.PathLike[str], reader: Reader | None = None
) -> None:
    """
    Write an ordinary checkpoint, for vLLM, SGLang, TGI or llama.cpp's converter; the folder appears when it is whole.

    Args:
        expert, model: As in [`merge_expert`], which changes the model.
        folder (`str` or path): A new folder.
        reader (tokenizer or processor, *optional*): Saved beside the weights.

    Raises:
        `FileExistsError`: if the folder exists.
        `ValueError`: as in [`merge_expert`].
    """
    with new_place(folder) as scratch:
        merge_expert(expert, model)
        model.save_pretrained(scratch)
        if reader is not None:
            reader.save_pretrained(scratch)


def export_lora(
    expert: Expert,
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    rank: int | float | None = None,
    force: bool = False,
) -> dict[str, dict[str, float]]:
    """
    Write an expert as a LoRA, which PEFT loads without this package, and vLLM, SGLang and llama.cpp serve.

    The factors need no SVD: `W' - W = (W Q diag(z - 1)) Q.T` on side "in", mirrored on side "out". With all moved
    directions they are exact: rank k for an expert of `rank=k`, else the largest `min(out, in)`.

    Args:
        expert ([`Expert`]): z-vectors of this base. A mixture of experts of `rank=k` is one LoRA of rank k.
        model (`PreTrainedModel`): The base, not quantised. It stays as it is.
        folder (`str` or path): A new folder.
        rank (`int` or `float`, *optional*):
            An integer keeps as many directions of each weight, the ones that change it most. A float below 1 keeps
            the fewest with that share of the squared change, as in PEFT's `save_as_lora`. Default: all.
        force (`bool`): Write the LoRA even if it leaves out more than 5 % of the change of a kind of weight.

    Returns:
        `dict`: by kind of weight (`"up_proj"`) the largest `rank` and the `error`, the Frobenius norm of what is left
            out over that of the change. The file's metadata has it as well.

    Raises:
        `FileExistsError`: if the folder exists.
        `ValueError`: for another base, stacked weights, or a larger error without `force`.
    """
    refuse_adapters(model)
    weights, factors, ranks = BaseWeights(model), dict[str, Tensor](), dict[str, int]()
    weights.check(expert)
    squares: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for name, offset in _progress(expert, "Factoring"):
        A, B, change, missed = _factors(weights.stored(name), weights.basis(name)[0], offset, rank)
        factors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        ranks[name] = len(A)
        squares[name.rpartition(".")[2]].append((change, missed, len(A)))
    report: dict[str, dict[str, float]] = {}
    for kind, entries in squares.items():
        changes, missing, sizes = zip(*entries, strict=True)
        report[kind] = {"rank": max(sizes), "error": (sum(missing) / (sum(changes) or 1.0)) ** 0.5}
    kind, worst = max(report.items(), key=lambda item: item[1]["error"])
    if worst["error"] > MISSING and not force:
        raise ValueError(
            f"A LoRA of rank {worst['rank']} leaves out {worst['error']:.1%} of the change of {kind}, more than "
            f"{MISSING:.0%}. Keep more directions (all of them, at most {max(expert.sizes.values())}, are exact), or "
            "train the expert with SVFConfig(rank=...); force=True (--force) writes it anyway."
        )
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        task_type=expert.config.get("task_type"),
        base_model_name_or_path=expert.base_model,
        revision=expert.config.get("revision"),
        inference_mode=True,
        r=largest,
        lora_alpha=largest,  # a scale of 1 everywhere, whether an engine reads the patterns or only `r`
        rank_pattern=smaller,
        alpha_pattern=smaller,
        target_modules=sorted(ranks),
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
    )
    with new_place(folder) as scratch:
        config.save_pretrained(str(scratch))
        metadata = {"format": "pt", "svf_expert": expert.name, "relative_error": json.dumps(report)}
        save_file(factors, scratch / SAFETENSORS_WEIGHTS_NAME, metadata)
    return report


def _factors(
    weight: Tensor, basis: Basis, offset: Tensor, rank: int | float | None
) -> tuple[Tensor, Tensor, float, float]:
    """
    Factor the change of a weight: `A (n, in)`, `B (out, n)`, its squared norm and that of what `B @ A` leaves out.

    Directions change a weight independently, each by a matrix of norm `abs(S * (z - 1))`.
    """
    Q, offset = _used(basis, offset)
    squares = (basis.S[: len(offset)] * offset).double().square()  # (k,)
    kept = torch.arange(len(offset))
    if rank is not None:
        order = squares.argsort(descending=True)
        shares = squares[order].cumsum(0)
        count = rank if isinstance(rank, int) else int(torch.searchsorted(shares, rank * shares[-1])) + 1
        kept = order[:count].sort().values
    missed = float(squares.sum() - squares[kept].sum())
    W, Q, offset = exact(weight).cpu(), Q[:, kept].to(exact(weight).dtype), offset[kept]
    if basis.side == "in":
        A, B = Q.T, (W @ Q) * offset
    else:
        A, B = offset[:, None] * (Q.T @ W), Q
    return A.contiguous(), B.contiguous(), float(squares.sum()), max(missed, 0.0)


def _used(basis: Basis, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions that an offset moves, `(..., r, k)`, and the offset in their shape, `(..., k)`."""
    offset = offset.view(*basis.Q.shape[:-2], -1)
    return basis.Q[..., : offset.shape[-1]], offset


def _progress(expert: Expert, what: str) -> Any:
    return tqdm(sorted(expert.offsets.items()), desc=what, unit="weight", name="peft_svf.export")


@contextmanager
def new_place(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a file or folder that gets its name when it is whole; refuse one that exists, before hours of work."""
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{path} exists already: name another place.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        yield Path(scratch) / target.name
        (Path(scratch) / target.name).rename(target)
