# SPDX-License-Identifier: Apache-2.0
"""
An expert of one base model -> an expert of another one of the same shape (arXiv 2501.06252, section 4.4).

A z-vector scales each singular direction of a weight. Another model has other directions: this module has three ways
to choose which of them gets which number. In go an expert and two models, or the bases of their weights; out comes an
expert as a value. Whether it helps, only an evaluation can tell.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from ..tuner.basis import Basis
from ..tuner.fingerprint import Fingerprint, check
from .base import BaseWeights
from .expert import Expert

Bases = Mapping[str, tuple[Basis, Fingerprint]]
MODES = ("ordered", "shuffled", "aligned")


def transfer_expert(
    expert: Expert,
    source: nn.Module | Bases,
    target: nn.Module | Bases,
    mode: Literal["ordered", "shuffled", "aligned"] = "ordered",
    *,
    seed: int = 0,
    name: str | None = None,
) -> Expert:
    """
    Give the z-vectors of an expert to another base model.

    Args:
        expert ([`Expert`]):
            Both models must have its modules, under the same names and with as many singular values.
        source, target (`torch.nn.Module` or `Mapping[str, tuple[Basis, Fingerprint]]`):
            The model that the expert belongs to and the one that gets it, or their bases by module as [`fetch`]
            returns them. Models stay as they are.
        mode (`str`):
            `"ordered"`: the i-th number goes to the i-th largest singular value, as in the paper. `"shuffled"`: the
            same numbers in random order, its control. `"aligned"`: each number goes to the direction that points most
            nearly the same way, matched one to one so that the sum of `abs(Q_source.T @ Q_target)` on the narrow side
            of the weight is largest (needs scipy).
        seed (`int`): Seed of the shuffling.
        name (`str`, *optional*): Name of the result; default that of the expert.

    Returns:
        [`Expert`] of the target, with its fingerprint, and in `provenance` the source, the mode, the seed, and for
        aligned per module the mean of `abs(cos)` over the matched directions that the expert moves.

    Raises:
        `ValueError`: for another mode, a module that is missing or stacked, a foreign source, or sizes that differ.
    """
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}: choose {', '.join(map(repr, MODES))}.")
    if stacks := expert.config.get("target_parameters"):
        raise ValueError(
            f"Expert {expert.name!r} moves stacked weights, {', '.join(stacks)}: only z-vectors of linear layers can "
            "be transferred."
        )
    ours, theirs = _bases(source, expert, "source"), _bases(target, expert, "target")
    _check_source(expert, source, ours)
    draws = torch.Generator().manual_seed(seed)
    offsets, cosines = {}, {}
    for module, offset in sorted(expert.offsets.items()):
        old, new = ours[module][0], theirs[module][0]
        if len(old.S) != len(new.S) or (mode == "aligned" and old.side != new.side):
            raise ValueError(
                f"{module} has {len(old.S)} singular values on side {old.side!r} in the source and {len(new.S)} on "
                f"side {new.side!r} in the target: choose a target of the same shape."
            )
        if mode == "aligned":
            offsets[module], cosines[module] = _aligned(offset, old, new)
        else:
            offsets[module] = offset[torch.randperm(len(offset), generator=draws)] if mode == "shuffled" else offset
    details: dict[str, dict[str, Any]] = {
        "shuffled": {"seed": seed},
        "aligned": {"matching": "assignment", "mean_abs_cosine": cosines},
    }
    provenance: dict[str, Any] = {
        "transfer": mode,
        "expert": expert.name,
        "from": expert.base_model,
        "to": _name(target),
    }
    provenance |= details.get(mode, {}) | ({"before": expert.provenance} if expert.provenance else {})
    padded, config = _fitted(offsets, theirs)
    config = expert.config | config | {"base_model_name_or_path": _name(target), "revision": None}
    return Expert(name or expert.name, padded, config, provenance)


def _fitted(offsets: Mapping[str, Tensor], bases: Bases) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pad shorter offsets to the longest, as far as their weights allow, because a config has one rank."""
    rank = max(map(len, offsets.values()))
    directions = {module: len(bases[module][0].S) for module in offsets}
    sizes = {module: min(rank, r) for module, r in directions.items()}
    padded = {module: F.pad(offset, (0, sizes[module] - len(offset))) for module, offset in offsets.items()}
    fingerprint = {module: bases[module][1].to_json() for module in offsets}
    return padded, {"rank": rank if sizes != directions else None, "fingerprint": fingerprint}


def match(similarity: Tensor) -> Tensor:
    """
    Match rows to columns one to one, so that the sum of their similarities is largest.

    `similarity (r, r)` -> the column of each row, `(r,)`.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('mode="aligned" needs scipy: pip install "peft-svf[transfer]".') from error
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])


def _aligned(offset: Tensor, source: Basis, target: Basis) -> tuple[Tensor, float]:
    """Move each entry of an offset `(k,)` to the direction that matches; also the mean `abs(cos)` of these pairs."""
    cosine = (source.Q.double().mT @ target.Q.double()).abs()  # (r, r)
    columns = match(cosine)[: len(offset)]
    moved = torch.zeros(len(target.S))
    moved[columns] = offset
    used = max([len(offset), *(moved.nonzero().flatten() + 1).tolist()])  # no longer than it has to be
    return moved[:used], round(float(cosine[torch.arange(len(offset)), columns].mean()), 6)


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
    """Fetch the bases of the expert's weights."""
    weights = model if isinstance(model, Mapping) else BaseWeights(model)
    if missing := sorted(name for name in expert.offsets if name not in weights):
        raise ValueError(
            f"The {which} has no {missing[0]}, which expert {expert.name!r} moves: experts transfer between models "
            "whose weights have the same names. Perhaps source and target should change places."
        )
    return weights if isinstance(weights, Mapping) else weights.bases(expert.offsets)
