# SPDX-License-Identifier: Apache-2.0
"""
An expert of one base model -> an expert of another one of the same shape (arXiv 2501.06252, section 4.4).

A z-vector says how strongly to use each singular direction of a weight. Another model has other directions: which of
them gets which number is a choice, and this module has three. In go an expert and two models, or the bases of their
weights; out comes an expert as a value. Whether it is any good, only an evaluation can say.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .basis import Basis
from .basis_cache import Fingerprint, fetch
from .checkpoint import Checkpoint
from .expert import Expert
from .fingerprint import check
from .layer import SVFLayer

Bases = Mapping[str, tuple[Basis, Fingerprint]]
MODES = ("ordered", "shuffled", "aligned")
NARROW = (torch.bfloat16, torch.float16)


def transfer_expert(
    expert: Expert,
    source: nn.Module | Bases,
    target: nn.Module | Bases,
    mode: Literal["ordered", "shuffled", "aligned"] = "ordered",
    *,
    lengths: Literal["refuse", "interpolate"] = "refuse",
    seed: int = 0,
    name: str | None = None,
) -> Expert:
    """
    Give the z-vectors of an expert to another base model.

    Args:
        expert ([`~expert.Expert`]):
            Its modules must exist under the same names in both models.
        source, target (`torch.nn.Module` or `Mapping[str, tuple[Basis, Fingerprint]]`):
            The model that the expert belongs to and the one that gets it, or their bases by module as
            [`~basis_cache.fetch`] returns them. Models stay as they are.
        mode (`str`):
            `"ordered"`: the i-th number goes to the i-th largest singular value, as in the paper. `"shuffled"`: the
            same numbers in random order, its control. `"aligned"`: each number goes to the direction that points most
            nearly the same way, matched one to one and best pairs first by `abs(Q_source.T @ Q_target)` on the narrow
            side of the weight.
        lengths (`str`):
            What happens where the weights have different numbers of singular values: `"refuse"`, or `"interpolate"`
            linearly over the place in the spectrum, from the largest to the smallest. Aligned needs equal sizes.
        seed (`int`):
            Of the shuffling.
        name (`str`, *optional*):
            Of the result; default that of the expert.

    Returns:
        [`~expert.Expert`] of the target, with its fingerprint, and in `provenance` the source, the mode, the seed, and
        for aligned per module the mean of `abs(cos)` over the matched directions that the expert moves.

    Raises:
        `ValueError`: for another mode, a module that is missing, an expert of another source, or sizes that differ.
    """
    if mode not in MODES or lengths not in ("refuse", "interpolate"):
        raise ValueError(
            f"There is no mode {mode!r} with lengths={lengths!r}: choose {', '.join(map(repr, MODES))}, and 'refuse' "
            "or 'interpolate'."
        )
    ours, theirs = _bases(source, expert, "source"), _bases(target, expert, "target")
    _check_source(expert, source, ours)
    draws = torch.Generator().manual_seed(seed)
    offsets, cosines = {}, {}
    for module, offset in sorted(expert.offsets.items()):
        one, other = ours[module][0], theirs[module][0]
        if mode == "aligned":
            offsets[module], cosines[module] = _aligned(module, offset, one, other)
            continue
        if len(one.S) != len(other.S) and lengths == "refuse":
            raise ValueError(
                f"{module} has {len(one.S)} singular values in the source and {len(other.S)} in the target: choose "
                "lengths='interpolate', or a target of the same shape."
            )
        moved = _stretched(offset, max(1, round(len(offset) * len(other.S) / len(one.S))))
        offsets[module] = moved[torch.randperm(len(moved), generator=draws)] if mode == "shuffled" else moved
    # a config has one rank, so all vectors that are shorter than their weight allows get the length of the longest
    rank = max(map(len, offsets.values()))
    sizes = {module: min(rank, len(theirs[module][0].S)) for module in offsets}
    offsets = {module: F.pad(offset, (0, sizes[module] - len(offset))) for module, offset in offsets.items()}
    config = {
        **expert.config,
        "base_model_name_or_path": _name(target),
        "revision": None,
        "fingerprint": {module: theirs[module][1].to_json() for module in offsets},
        "rank": rank if any(sizes[module] < len(theirs[module][0].S) for module in offsets) else None,
    }
    provenance: dict[str, Any] = {"transfer": mode, "expert": expert.name, "from": expert.base_model}
    provenance |= {"to": _name(target), "lengths": lengths}
    if mode == "shuffled":
        provenance["seed"] = seed
    if mode == "aligned":
        provenance |= {"matching": "greedy", "mean_abs_cosine": cosines}
    if expert.provenance:
        provenance["before"] = expert.provenance
    return Expert(name or expert.name, offsets, config, provenance)


def match(similarity: Tensor) -> Tensor:
    """
    Match rows to columns one to one, best pairs first.

    Greedy, since no library that this package needs solves the assignment problem. Where one base is the other with
    its directions permuted, the matching is that permutation.

    Args:
        similarity (`torch.Tensor` of shape `(r, r)`):
            The larger, the better the pair.

    Returns:
        `torch.Tensor` of shape `(r,)`: the column of each row.
    """
    left = similarity.clone()
    columns = torch.full((len(left),), -1)
    while (columns < 0).any():
        best = left.argmax(1)  # of each row; the best pair of all is always mutual, so each round finds one or more
        mutual = (left.argmax(0)[best] == torch.arange(len(left))) & (columns < 0)
        columns[mutual] = best[mutual]
        left[mutual] = -torch.inf
        left[:, best[mutual]] = -torch.inf
    return columns


def _aligned(module: str, offset: Tensor, source: Basis, target: Basis) -> tuple[Tensor, float]:
    if source.side != target.side or source.Q.shape != target.Q.shape:
        raise ValueError(
            f"{module} has {len(source.S)} singular values on side {source.side!r} in the source and {len(target.S)} "
            f"on side {target.side!r} in the target: only directions of the same space align. Use mode='ordered'."
        )
    cosine = (source.Q.double().mT @ target.Q.double()).abs()  # (r, r)
    columns = match(cosine)[: len(offset)]
    moved = torch.zeros(len(target.S))
    moved[columns] = offset
    used = max([len(offset), *(moved.nonzero().flatten() + 1).tolist()])  # as short as the expert's where that will do
    return moved[:used], round(float(cosine[torch.arange(len(offset)), columns].mean()), 6)


def _stretched(offset: Tensor, size: int) -> Tensor:
    if size == len(offset):
        return offset.clone()
    return F.interpolate(offset[None, None].double(), size, mode="linear", align_corners=True)[0, 0].float()


def _name(model: nn.Module | Bases) -> str | None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "name_or_path", None) or None


def _check_source(expert: Expert, source: nn.Module | Bases, ours: Bases) -> None:
    """Refuse a source that is not the base model of the expert, as loading does."""
    saved = expert.config.get("fingerprint") or {}
    check(
        {module: Fingerprint.from_json(entry) for module, entry in saved.items()},
        {module: fingerprint for module, (_, fingerprint) in ours.items()},
        absent=[],
        adapter=expert.name,
        here=_name(source) or "the source",
        there=expert.base_model,
    )


def _bases(model: nn.Module | Bases, expert: Expert, which: str) -> Bases:
    """The bases of the weights that an expert moves, as the tuner takes them: of stored weights if loading rounds."""
    if isinstance(model, Mapping):
        found: Mapping[str, Any] = model
    else:
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        found = dict(model.named_modules())
    if missing := sorted(set(expert.offsets) - set(found)):
        raise ValueError(
            f"The {which} has no {missing[0]}, which expert {expert.name!r} moves: experts transfer between models "
            "whose weights have the same names."
        )
    if isinstance(model, Mapping):
        return model
    checkpoint = Checkpoint(model)

    def weight_of(module: str) -> Tensor:
        layer = found[module]
        base = layer.get_base_layer() if isinstance(layer, SVFLayer) else layer
        if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
            raise ValueError(
                f"{module} of the {which} is a {type(base).__name__}: pass the base that is not quantised."
            )
        adapted = isinstance(layer, SVFLayer)
        weight = layer.logical_weight() if adapted else base.weight.detach()
        weight = weight.T if adapted and isinstance(base, Conv1D) else weight  # as it is stored
        stored = checkpoint.weight(f"{module}.weight", weight) if weight.dtype in NARROW else None
        weight = weight if stored is None else stored
        return weight.T if isinstance(base, Conv1D) else weight

    return fetch(expert.offsets, weight_of)
