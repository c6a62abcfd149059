# SPDX-License-Identifier: Apache-2.0
"""
An expert of one base model -> an expert of another one of the same shape (arXiv 2501.06252, section 4.4).

A z-vector scales each singular direction of a weight. Another model has other directions: this module has three ways
to choose which of them gets which number. Whether it helps, only an evaluation can tell.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tuner.basis import Basis
from .base import BaseWeights
from .expert import Expert

MODES = ("ordered", "shuffled", "aligned")


def transfer_expert(
    expert: Expert,
    source: nn.Module,
    target: nn.Module,
    mode: Literal["ordered", "shuffled", "aligned"] = "ordered",
    *,
    seed: int = 0,
    name: str | None = None,
) -> Expert:
    """
    Give the z-vectors of an expert to another base model.

    Args:
        expert ([`Expert`]):
            Both models must have its linear weights, under the same names and with as many singular values.
        source, target (`torch.nn.Module`):
            The model that the expert belongs to and the one that gets it. Both stay as they are.
        mode (`str`):
            `"ordered"`: the i-th number goes to the i-th largest singular value, as in the paper. `"shuffled"`: the
            same numbers in random order, its control. `"aligned"`: each number goes to the direction that points most
            nearly the same way, matched one to one so that the sum of `abs(Q_source.T @ Q_target)` on the narrow side
            of the weight is largest (needs scipy).
        seed (`int`): Seed of the shuffling.
        name (`str`, *optional*): Name of the result; default the expert's.

    Returns:
        [`Expert`] of the target, with its fingerprint, and in `provenance` the source, the mode, the seed, and for
        aligned per module the mean of `abs(cos)` over the matched directions that the expert moves.

    Raises:
        `ValueError`: for another mode, a module that is missing or stacked, a foreign source, or sizes that differ.
    """
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}: choose {', '.join(map(repr, MODES))}.")
    ours, theirs = BaseWeights(source), BaseWeights(target)
    ours.check(expert)
    theirs.check_names(expert)
    draws = torch.Generator().manual_seed(seed)
    offsets, cosines, prints, directions = dict[str, Tensor](), dict[str, float](), {}, {}
    for module, offset in sorted(expert.offsets.items()):
        old, (new, fingerprint) = ours.basis(module)[0], theirs.basis(module)
        if len(old.S) != len(new.S) or (mode == "aligned" and old.side != new.side):
            raise ValueError(
                f"{module} has {len(old.S)} singular values on side {old.side!r} in the source and {len(new.S)} on "
                f"side {new.side!r} in the target: choose a target of the same shape."
            )
        if mode == "aligned":
            offset, cosines[module] = _aligned(offset, old, new)
        elif mode == "shuffled":
            offset = offset[torch.randperm(len(offset), generator=draws)]
        offsets[module], prints[module], directions[module] = offset, fingerprint.to_json(), len(new.S)
    rank = max(map(len, offsets.values()))  # A config has one rank, so shorter offsets get zeros.
    sizes = {module: min(rank, r) for module, r in directions.items()}
    padded = {module: F.pad(offset, (0, sizes[module] - len(offset))) for module, offset in offsets.items()}
    details: dict[str, dict[str, Any]] = {
        "shuffled": {"seed": seed},
        "aligned": {"matching": "assignment", "mean_abs_cosine": cosines},
    }
    provenance = {"transfer": mode, "expert": expert.name, "from": expert.base_model, "to": theirs.name}
    provenance |= details.get(mode, {}) | ({"before": expert.provenance} if expert.provenance else {})
    base = {"base_model_name_or_path": theirs.name, "revision": None, "fingerprint": prints}
    config = expert.config | base | {"rank": rank if sizes != directions else None}
    return Expert(name or expert.name, padded, config, provenance)


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
