# SPDX-License-Identifier: Apache-2.0
"""
Basis -> a fingerprint of its weight; fingerprints of an expert and of a model -> silence, a warning or a refusal.

z indexes the singular directions of one base; on another base the same numbers mean something else. Weights with equal
values are the same base. Otherwise sketches of the two bases decide, by thresholds measured in
`benchmarks/fingerprint.py`: the same weight factorised by another driver stays below `ACCEPT`, weights rounded to
bfloat16 lie above `REFUSE`, weights rounded to float16 in between. Nothing here sees a model.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SKETCH_SIZE = 32
ACCEPT, REFUSE = 1e-3, 5e-3  # distances between sketches
STRANGER = 0.2  # rounding stays below this distance; other weights lie above it


@dataclass(frozen=True)
class Fingerprint:
    """
    Identifies the weight that an offset was trained on.

    Args:
        sha256 (`str`): Hash of the weight's values, see [`content_key`].
        sketch (`torch.Tensor` of shape `(32,)`): [`sketch`] of its basis, float64.
    """

    sha256: str
    sketch: Tensor

    def to_json(self) -> dict[str, str]:
        """Write two short strings. The sketch keeps six digits, a thousandth of `ACCEPT`."""
        return {"sha256": self.sha256, "probe": " ".join(f"{x:.6g}" for x in self.sketch.tolist())}

    @classmethod
    def from_json(cls, entry: Mapping[str, str]) -> "Fingerprint":
        """Read a fingerprint back. Raises `ValueError` if it is damaged."""
        try:
            numbers = torch.tensor([float(x) for x in entry["probe"].split()], dtype=torch.float64)
            return cls(str(entry["sha256"]), numbers)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"A fingerprint has the strings 'sha256' and 'probe', got {entry!r}.") from error


class Recorded(dict[str, dict[str, str]]):
    """Fingerprints that saving has written into a live config: unlike a file's, they don't bind it to this base."""


def sketch(Q: Tensor) -> Tensor:
    """
    Summarise a whole basis in 32 numbers that no sign of a direction changes.

    With `p_i = (q_i . c)^2` for a fixed random `c`, the sketch is `R @ p` for a fixed random `R (32, r)`, scaled so
    that distances between sketches estimate distances between the `p` (within about 12 %). The sketches of a stack
    `(E, r, r)` are added with random signs, so that the distance of two stacks estimates how far their weights differ.

    Returns:
        `torch.Tensor` of shape `(32,)`, float64, on the CPU.
    """
    if Q.dim() == 3:
        signs = np.random.RandomState(2501).choice([-1.0, 1.0], len(Q))
        zero = torch.zeros(SKETCH_SIZE, dtype=torch.float64)
        return sum((float(sign) * sketch(matrix) for sign, matrix in zip(signs, Q, strict=True)), zero)
    r = Q.shape[-1]
    draws = np.random.RandomState(2501)  # the legacy generator, because only its stream is frozen for good
    c = torch.from_numpy(draws.standard_normal(r))
    R = torch.from_numpy(draws.standard_normal((SKETCH_SIZE, r))) / SKETCH_SIZE**0.5
    return R @ (Q.detach().cpu().double().mT @ c).square()


def distance(sketch: Tensor, reference: Tensor) -> float:
    """Return `norm(sketch - reference) / norm(reference)`: 0 for the same basis, infinity for other shapes or NaN."""
    if sketch.shape != reference.shape:
        return float("inf")
    relative = float(torch.linalg.vector_norm(sketch - reference) / torch.linalg.vector_norm(reference))
    return relative if relative == relative else float("inf")


def check(
    saved: Mapping[str, Fingerprint],
    own: Mapping[str, Fingerprint],
    *,
    absent: Sequence[str],
    adapter: str,
    here: str,
    there: str | None,
) -> None:
    """
    Compare the weights that an adapter was trained on with a model's.

    Args:
        saved, own (`Mapping[str, Fingerprint]`):
            Fingerprints of the adapter and of this model, by module; modules that `own` lacks are not compared.
        absent (`Sequence[str]`):
            Modules of the adapter that this model does not have.
        adapter, here, there (`str`):
            Names of the adapter, of this model and of the model it was trained on. Adapters of a model without a name
            cause a warning instead of a refusal.

    Raises:
        `ValueError`: if the adapter belongs to another base.
    """
    if there == here:  # one name for two models, which the message gives once
        known, way_out = "another load of it", "Load the base it was trained on in the same class and dtype."
    else:
        known = repr(there) if there else "an unnamed model"
        way_out = f"Load the base it was trained on, {known}, as its checkpoint is: not quantised, in its own dtype."
    if absent:
        raise ValueError(
            f"Adapter {adapter!r} was trained on {known}, which has a module {absent[0]}; this model, {here!r}, has "
            f"none. {way_out}"
        )
    doubtful = []
    for name in sorted(saved.keys() & own.keys()):
        if own[name].sha256 == saved[name].sha256:
            continue
        apart = distance(own[name].sketch, saved[name].sketch)
        if apart > REFUSE and there:
            raise ValueError(
                f"Adapter {adapter!r} does not belong to this base model: the singular directions of {name} in "
                f"{here!r} differ from those in {known}, where it was trained (distance {apart:.2g}, at most "
                f"{REFUSE:g} is accepted). {way_out}"
            )
        if apart > ACCEPT:
            doubtful.append((apart, name))
    if doubtful:
        apart, name = max(doubtful)
        why = "the weights were probably rounded" if apart < STRANGER else "this is probably another base"
        warnings.warn(
            f"Adapter {adapter!r}: the singular directions of {len(doubtful)} modules in {here!r} differ from those "
            f"in {known}, where it was trained (distance up to {apart:.2g}, in {name}): {why}. Expect other "
            f"outputs. {way_out}",
            stacklevel=3,
        )
