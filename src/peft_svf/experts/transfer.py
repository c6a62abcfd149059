# SPDX-License-Identifier: Apache-2.0
"""
An expert of one base model -> an expert of another one of like architecture (arXiv 2501.06252, section 4.4).

A z-vector says how strongly to use each singular direction of a weight. Another model has other directions: which of
them gets which number is a choice, and this module has three. Widths and depths that differ are refused, or
interpolated. In go an expert and two models, or the bases of their weights; out comes an expert as a value. Whether it
is any good, only an evaluation can say.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..tuner.basis import Basis
from ..tuner.cache import fetch
from ..tuner.fingerprint import Fingerprint, check
from ..tuner.layer import SVFLayer
from ..tuner.weights import Checkpoint
from .expert import Expert

Bases = Mapping[str, tuple[Basis, Fingerprint]]
MODES = ("ordered", "shuffled", "aligned")
NARROW = (torch.bfloat16, torch.float16)
LAYER = re.compile(r"(?P<stack>.+?)\.(?P<index>\d+)\.(?P<rest>.+)")  # model.layers.3.mlp.up_proj


def transfer_expert(
    expert: Expert,
    source: nn.Module | Bases,
    target: nn.Module | Bases,
    mode: Literal["ordered", "shuffled", "aligned"] = "ordered",
    *,
    lengths: Literal["refuse", "interpolate"] = "refuse",
    depths: Literal["refuse", "interpolate"] = "refuse",
    seed: int = 0,
    name: str | None = None,
) -> Expert:
    """
    Give the z-vectors of an expert to another base model.

    Args:
        expert ([`Expert`]):
            Its modules must exist under the same names in both models; with `depths="interpolate"` the numbers of
            layers in these names may differ.
        source, target (`torch.nn.Module` or `Mapping[str, tuple[Basis, Fingerprint]]`):
            The model that the expert belongs to and the one that gets it, or their bases by module as
            [`fetch`] returns them. Models stay as they are.
        mode (`str`):
            `"ordered"`: the i-th number goes to the i-th largest singular value, as in the paper. `"shuffled"`: the
            same numbers in random order, its control. `"aligned"`: each number goes to the direction that points most
            nearly the same way, matched one to one and best pairs first by `abs(Q_source.T @ Q_target)` on the narrow
            side of the weight.
        lengths (`str`):
            What happens where the weights have different numbers of singular values: `"refuse"`, or `"interpolate"`
            linearly over the place in the spectrum, from the largest to the smallest. Aligned needs equal sizes.
        depths (`str`):
            What happens where the models have different numbers of layers: `"refuse"`, or `"interpolate"` linearly
            over the place in the stack: the first layer gets what the first has, the last what the last has, one
            between gets the mean of the two nearest by distance. Aligned needs equal depths.
        seed (`int`):
            Of the shuffling.
        name (`str`, *optional*):
            Of the result; default that of the expert.

    Returns:
        [`Expert`] of the target, with its fingerprint, and in `provenance` the source, the mode, the seed, and
        for aligned per module the mean of `abs(cos)` over the matched directions that the expert moves.

    Raises:
        `ValueError`: for another mode, a module that is missing, an expert of another source, or sizes or depths that
            differ.
        `TypeError`: for models that are not loaded.
    """
    if mode not in MODES or not {lengths, depths} <= {"refuse", "interpolate"}:
        raise ValueError(
            f"There is no mode {mode!r} with lengths={lengths!r} and depths={depths!r}: choose "
            f"{', '.join(map(repr, MODES))}, and 'refuse' or 'interpolate'."
        )
    for which, model in (("source", source), ("target", target)):
        if not isinstance(model, (nn.Module, Mapping)):
            raise TypeError(
                f"The {which} is a model or its bases, got {model!r}: load it first, "
                f"AutoModelForCausalLM.from_pretrained({model!r})."
            )
    ours = _bases(source, expert.offsets, expert, "source")
    _check_source(expert, source, ours)
    taken = _from_layers(expert, _depths(_names(source)), _depths(_names(target)), mode, depths)
    theirs = _bases(target, taken, expert, "target")
    draws = torch.Generator().manual_seed(seed)
    offsets, cosines = {}, {}
    for module, shares in sorted(taken.items()):
        other = theirs[module][0]
        if mode == "aligned":
            offsets[module], cosines[module] = _aligned(module, expert.offsets[module], ours[module][0], other)
            continue
        moved = []
        for of, share in shares.items():
            one, offset = ours[of][0], expert.offsets[of]
            if len(one.S) != len(other.S) and lengths == "refuse":
                raise ValueError(
                    f"{of} has {len(one.S)} singular values in the source and {len(other.S)} in the target: choose "
                    "lengths='interpolate', or a target of the same shape."
                )
            moved.append(share * _stretched(offset, max(1, round(len(offset) * len(other.S) / len(one.S)))))
        mixed = torch.nn.utils.rnn.pad_sequence(moved).sum(1)  # z = 1 where one of the two ends
        offsets[module] = mixed[torch.randperm(len(mixed), generator=draws)] if mode == "shuffled" else mixed
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
    if set(offsets) != set(expert.offsets):  # other layers than the config speaks of
        named = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config |= {"target_modules": sorted(offsets), **named}
    provenance: dict[str, Any] = {"transfer": mode, "expert": expert.name, "from": expert.base_model}
    provenance |= {"to": _name(target), "lengths": lengths, "depths": depths}
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


def _from_layers(
    expert: Expert, ours: Mapping[str, int], theirs: Mapping[str, int], mode: str, depths: str
) -> dict[str, dict[str, float]]:
    """Per module of the target the modules of the expert that it takes its numbers from, and their shares."""
    if depths == "interpolate" and not (ours and theirs):
        raise ValueError(
            "depths='interpolate' needs the source and the target as models: bases are of some weights and do not say "
            "how many layers there are."
        )
    taken: dict[str, dict[str, float]] = {}
    for module in expert.offsets:
        place = LAYER.fullmatch(module)
        before, after = (stacks.get(place["stack"], 0) if place else 0 for stacks in (ours, theirs))
        if place is None or before == after or not (before and after):
            taken.setdefault(module, {})[module] = 1.0
        elif depths == "refuse" or mode == "aligned":
            aligned = "mode='aligned' needs equal depths, " if mode == "aligned" else ""
            raise ValueError(
                f"{place['stack']} has {before} layers in the source and {after} in the target: {aligned}choose "
                "depths='interpolate' with mode='ordered' or 'shuffled', or a target of the same depth."
            )
        else:
            for layer in range(after):
                share = 1 - abs(layer * (before - 1) / max(after - 1, 1) - int(place["index"]))
                if share > 1e-9:
                    taken.setdefault(f"{place['stack']}.{layer}.{place['rest']}", {})[module] = share
    return taken


def _depths(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack of modules has: {"model.layers": 30}."""
    found: dict[str, int] = {}
    for place in filter(None, map(LAYER.fullmatch, names)):
        found[place["stack"]] = max(found.get(place["stack"], 0), int(place["index"]) + 1)
    return found


def _names(model: nn.Module | Bases) -> list[str]:
    """The modules of a model; of bases none, which may be those of some layers only."""
    if isinstance(model, Mapping):
        return []
    return [name for name, _ in (model.get_base_model() if isinstance(model, PeftModel) else model).named_modules()]


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


def _bases(model: nn.Module | Bases, modules: Iterable[str], expert: Expert, which: str) -> Bases:
    """The bases of some weights as the tuner takes them: of stored weights if loading rounds."""
    if isinstance(model, Mapping):
        found: Mapping[str, Any] = model
    else:
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        found = dict(model.named_modules())
    if missing := sorted(set(modules) - set(found)):
        place, there = LAYER.fullmatch(missing[0]), _depths(found)
        if place and 0 < (depth := there.get(place["stack"], 0)) < (own := _depths(modules)[place["stack"]]):
            hint = (
                f"the expert has {own} {place['stack']}, the {which} {depth}: should source and target change places?"
            )
        else:
            hint = "experts transfer between models whose weights have the same names."
        raise ValueError(f"The {which} has no {missing[0]}, which expert {expert.name!r} moves: {hint}")
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

    return fetch(modules, weight_of)
