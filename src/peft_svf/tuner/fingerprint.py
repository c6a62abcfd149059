# SPDX-License-Identifier: Apache-2.0
"""
Fingerprints of an expert and of a base model -> silence, a warning or a refusal.

z indexes the singular directions of one base; on others the same numbers mean something else. Weights with the same
values are the same base. Otherwise the probes of the bases decide, by thresholds measured in `benchmarks/fingerprint`:
the same weight factorised by another driver stays below `ACCEPT`, weights rounded to bfloat16 lie above `REFUSE`, and
between them are weights rounded to float16. Nothing here sees a model.
"""

import warnings
from collections.abc import Mapping, Sequence

from .basis import probe_distance
from .cache import Fingerprint

ACCEPT, REFUSE = 1e-3, 5e-3  # distances between probes
STRANGER = 0.2  # from here on it is no rounding any more, but other weights


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
    Compare what an adapter was trained on with the base it is loaded on.

    Args:
        saved (`Mapping[str, Fingerprint]`):
            Of the adapter, by module.
        own (`Mapping[str, Fingerprint]`):
            Of this base; modules that are missing here are not compared.
        absent (`Sequence[str]`):
            Modules of the adapter that this base does not have.
        adapter, here, there (`str`):
            Names of the adapter, of this base and of the base it was trained on; a base without a name is one of many
            alike, so its adapters are warned about, not refused.

    Raises:
        `ValueError`: if the adapter belongs to another base; the message names the module, both models, the way out.
    """
    known = repr(there) if there else "an unnamed model"
    way_out = f"Load the base it was trained on, {known}, as its checkpoint is: not quantised, in its own dtype."
    if absent:
        raise ValueError(
            f"Adapter {adapter!r} was trained on {known}, which has a module {absent[0]}; this model, {here!r}, has "
            f"none. {way_out}"
        )
    doubtful = []
    for name, fingerprint in saved.items():
        mine = own.get(name)
        if mine is None or mine.sha256 == fingerprint.sha256:
            continue
        comparable = mine.probe.shape == fingerprint.probe.shape
        distance = probe_distance(mine.probe, fingerprint.probe) if comparable else float("inf")
        if not distance <= REFUSE and there:
            raise ValueError(
                f"Adapter {adapter!r} does not belong to this base model: the singular directions of {name} in "
                f"{here!r} differ from those in {known}, where it was trained (distance {distance:.2g}, at "
                f"most {REFUSE:g} is accepted). {way_out}"
            )
        if not distance <= ACCEPT:
            doubtful.append((distance, name))
    if doubtful:
        distance, name = max(doubtful)
        why = "the weights were probably rounded" if distance < STRANGER else "this is probably another base"
        warnings.warn(
            f"Adapter {adapter!r}: the singular directions of {len(doubtful)} modules in {here!r} differ from those "
            f"in {known}, where it was trained (distance up to {distance:.2g}, in {name}): {why}. Expect other "
            f"outputs. {way_out}",
            stacklevel=3,
        )
