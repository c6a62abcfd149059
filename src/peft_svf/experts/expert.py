# SPDX-License-Identifier: Apache-2.0
"""
z-vectors as values: `Expert`, offsets of one base model by weight, and `Mixture`, weights over experts.

An expert comes from a folder or a Hub repository that `save_pretrained`, `push_to_hub` or [`Expert.save`] wrote.
Experts add up as the paper's formula does: `0.7 * math + 0.3 * code`. A mixture is the same sum by name; every
adaptation strategy returns one. Nothing here loads a model.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from numbers import Real
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor

from .. import files
from ..tuner.fingerprint import Fingerprint, check
from .key import KEY_NAME, RoutingKey
from .saved import (
    LARGEST,
    SavedOffsets,
    check_modules,
    check_offsets,
    folder_of,
    name_of,
    naming,
    read_config,
    read_offsets,
)

OTHER = "other"  # the base model, in decisions and as an explicit choice
PREFIX = "base_model.model."  # PEFT puts it in front of the base model's module names


@dataclass(frozen=True, eq=False)
class Expert:
    """
    Named z-vectors of one base model, with the arithmetic of arXiv 2501.06252.

    `0.7 * math + 0.3 * code` has `z = 1 + 0.7 (z_math - 1) + 0.3 (z_code - 1)`: if the weights sum to 1 that is the
    paper's `Σ αᵢ zᵢ`, and else the base model (z = 1) has the share that is left. `==` compares z, not names.

    Args:
        name (`str`): Name in decisions and mixtures.
        offsets (`Mapping[str, torch.Tensor]`): `z - 1` by weight of the base model, each `(k,)` float32; a stacked
            weight has the vectors of its matrices, one after the other.
        config (`dict`): Its `adapter_config.json`, with base model and fingerprint.
        provenance (`dict`): How it was made if it wasn't trained, as JSON values.
        key ([`RoutingKey`], *optional*): By which a library knows the requests that it is for.

    Raises:
        `ValueError`: if an offset has more than one axis, or an entry that isn't finite or exceeds 10,000.
    """

    name: str
    offsets: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    key: RoutingKey | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.offsets, SavedOffsets):
            with naming(self.name):
                check_offsets(self.offsets)

    @property
    def z(self) -> dict[str, Tensor]:
        """Per weight the multipliers of its largest singular values, shape `(k,)`."""
        return {module: 1 + offset for module, offset in self.offsets.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Per weight the number of entries of z, without reading them again."""
        if isinstance(self.offsets, SavedOffsets):
            return self.offsets.sizes
        return {module: len(offset) for module, offset in self.offsets.items()}

    @property
    def base_model(self) -> str | None:
        """Name of the base model that the expert was trained on."""
        return self.config.get("base_model_name_or_path")

    @property
    def description(self) -> str:
        """What the expert is good at, in a few words; may be empty."""
        return self.config.get("description") or ""

    def __mul__(self, weight: float) -> "Expert":
        if not isinstance(weight, Real):
            return NotImplemented
        return _combined([(float(weight), self)])

    __rmul__ = __mul__

    def __neg__(self) -> "Expert":
        return -1.0 * self

    def __add__(self, other: "Expert") -> "Expert":
        if not isinstance(other, Expert):
            return NotImplemented
        return _combined([(1.0, self), (1.0, other)])

    def __sub__(self, other: "Expert") -> "Expert":
        return self + -other if isinstance(other, Expert) else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Whether two experts of one base have the same z; a weight that one does not move has z = 1."""
        if not isinstance(other, Expert):
            return NotImplemented
        if self.base_model != other.base_model:
            return False
        none = torch.zeros(0)
        pairs = ((self.offsets.get(m, none), other.offsets.get(m, none)) for m in {*self.offsets, *other.offsets})
        return all(torch.equal(*_padded(a, b)) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
        lazy: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Expert":
        """
        Read an expert from a folder or a Hub repository; its files are opened once.

        Args:
            source (`str` or path):
                Folder, or repository such as `"me/expert"`, with a subfolder and a revision `"me/zoo::code@v2"`.
            name (`str`, *optional*): Default: the last part of `subfolder`, else of `source`.
            lazy (`bool`): Check everything now, but keep no values in memory: they are read again on first use.
            subfolder, revision, token: As in `from_pretrained`. All files come from one commit.

        Raises:
            `FileNotFoundError`: if a file is missing.
            `ValueError`: if the files hold no SVF expert, hold more than z-vectors, or are damaged.
        """
        folder = folder_of(source, subfolder, revision, token)
        name = name or name_of(subfolder or source)
        with naming(name, folder):
            files.settle(folder)
            config = read_config(folder)
            offsets, others, provenance = read_offsets(folder)
            if others:
                raise ValueError(
                    f"it holds more than z-vectors, first {min(others)!r}, and cannot be mixed. If you trust it, load "
                    "it with PeftModel.from_pretrained instead."
                )
            check_modules(offsets, config)
            key = RoutingKey.load(folder)
        sizes = {module: len(offset) for module, offset in offsets.items()}
        return cls(name, SavedOffsets(name, folder, sizes) if lazy else offsets, config, provenance, key)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """
        Write the expert as PEFT does, `adapter_config.json` and `adapter_model.safetensors`, with its key if any.

        All appear together: an interruption or a full disk leaves the old ones.
        """
        targets = {} if self.config.get("target_parameters") else {"target_modules": sorted(self.offsets)}
        config = {"peft_type": "SVF"} | targets | self.config
        tensors = {f"{PREFIX}{module}.svf_offset.weight": o.contiguous() for module, o in self.offsets.items()}
        metadata = {"format": "pt"} | ({"provenance": json.dumps(self.provenance)} if self.provenance else {})
        text = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"  # PEFT keeps targets in sets
        contents: dict[str, str | bytes] = {SAFETENSORS_WEIGHTS_NAME: save(tensors, metadata), CONFIG_NAME: text}
        if self.key is None:
            (Path(folder) / KEY_NAME).unlink(missing_ok=True)  # of an expert that was saved here before
        else:
            contents[KEY_NAME] = self.key.to_bytes()
        files.write_together(folder, contents)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Upload the expert with its card, in one commit; arguments as in [`push_expert`]."""
        from . import push_expert

        return push_expert(self, repo_id, **kwargs)


@dataclass(frozen=True)
class Mixture:
    """
    Weights over experts: `z = 1 + Σ αᵢ (zᵢ - 1)`. What is left, `1 - Σ αᵢ`, belongs to the base model.

    Equal to `Σ αᵢ zᵢ` of arXiv 2501.06252 if the weights sum to 1; without any weight it is the base model.

    Args:
        alpha (`dict[str, float]`): Weight by name of expert; those at 0 are dropped.
        strategy (`str`): Origin: `"explicit"`, `"prompt"`, `"classifier"`, `"probe"`, `"few-shot"`.
        confidence (`float`): 0 (a guess) to 1 (certain), `(p - 1/n) / (1 - 1/n)` for the choice among n.
        probabilities (`dict[str, float]`): Probability of each expert and of `"other"`, if a first pass gave them.
        provenance (`dict`): Settings and scores of the search.
    """

    alpha: dict[str, float] = field(default_factory=dict)
    strategy: str = "explicit"
    confidence: float = 1.0
    probabilities: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, weight in self.alpha.items():
            _check_weight(name, weight)
        kept = {name: float(weight) for name, weight in self.alpha.items() if weight and name != OTHER}
        object.__setattr__(self, "alpha", kept)

    @property
    def choice(self) -> str:
        """The expert with the largest weight, or `"other"` if the base has the most."""
        shares = {**self.alpha, OTHER: 1 - sum(self.alpha.values())}
        return max(shares, key=lambda name: shares[name])

    def record(self) -> dict[str, Any]:
        """Return the decision with the fields of transformers' `decision` pipeline, and the weights."""
        return {
            "choice": self.choice,
            "confidence": self.confidence,
            "probabilities": self.probabilities or {self.choice: 1.0},
            "alpha": self.alpha,
        }

    def offsets(self, experts: Mapping[str, Expert]) -> dict[str, Tensor]:
        """Mix the offsets of experts by weight of the base model, each `(k,)`."""
        return _summed([(weight, experts[name].offsets) for name, weight in self.alpha.items()])

    def expert(self, experts: Mapping[str, Expert]) -> Expert:
        """
        Add experts up to one that answers like the mixture.

        Raises:
            `ValueError`: if it names none, or one that isn't among them, or as their sum.
        """
        if not self.alpha or set(self.alpha) - set(experts):
            raise ValueError(f"The mixture has the weights {self.alpha}; there are {', '.join(experts)}.")
        return reduce(add, [weight * experts[name] for name, weight in self.alpha.items()])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mixture as JSON."""
        files.write(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Mixture":
        """Read a mixture that [`Mixture.save`] wrote. Raises `ValueError` if the file holds none."""
        try:
            content = files.read_json(path)
            if "alpha" not in content:
                raise ValueError("'alpha', the weights by expert, is missing")
            return cls(**content)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no mixture: {error}.") from error


def _combined(terms: Sequence[tuple[float, Expert]]) -> Expert:
    """Add up experts of one base model; the sum is named for its terms."""
    experts = [expert for _, expert in terms]
    first, last = experts[0], experts[-1]
    shares: dict[str, float] = defaultdict(float)
    for weight, expert in terms:
        for name, part in (expert.provenance.get("sum") or {expert.name: 1.0}).items():
            shares[name] += weight * part
    for name, weight in shares.items():
        _check_weight(name, weight)
    prints = [expert.config.get("fingerprint") or {} for expert in (first, last)]
    saved = [{module: Fingerprint.from_json(entry) for module, entry in entries.items()} for entries in prints]
    here = last.base_model or last.name
    check(saved[0], saved[1], absent=[], adapter=first.name, here=here, there=first.base_model)
    ranks: list[Any] = [expert.config.get("rank") for expert in experts]
    rank = None if None in ranks else max(ranks)
    offsets = _summed([(weight, expert.offsets) for weight, expert in terms])
    parameters = [set(expert.config.get("target_parameters") or ()) for expert in (first, last)]
    widest = {module for expert in experts if expert.config.get("rank") == rank for module in expert.offsets}
    if parameters[0] != parameters[1] or (len(set(ranks)) > 1 and (parameters[0] or set(offsets) != widest)):
        raise ValueError(
            f"{' and '.join(repr(expert.name) for expert in experts)} have ranks {ranks} and move different or "
            "stacked weights: mix them in an ExpertLibrary, where the base model gives the sizes."
        )
    # PEFT nests one wrapper per parameter of a module, so a file calls them `experts`, `experts.base_layer`, ...
    owners = tuple(f".{parameter.rpartition('.')[0]}" for parameter in parameters[0])
    linear = [name for name in offsets if not f".{name.replace('.base_layer', '')}".endswith(owners)]
    unset = dict.fromkeys(("description", "exclude_modules", "layers_to_transform", "layers_pattern"))
    targets = {"rank": rank, "target_modules": sorted(linear), "fingerprint": {**prints[1], **prints[0]} or None}
    name = " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight in shares.items())
    return Expert(name.replace("+ -", "- "), offsets, first.config | unset | targets, {"sum": dict(shares)})


def _summed(terms: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Compute `Σ αᵢ (zᵢ - 1)` by weight, `(k,)` of the longest."""
    total: dict[str, Tensor] = {}
    for weight, offsets in terms:
        for module, offset in offsets.items():
            before, part = _padded(total.get(module, torch.zeros(0)), weight * offset)
            total[module] = before + part
    return total


def _padded(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Give two offsets the same length: directions that one does not move have z = 1."""
    size = max(len(one), len(other))
    return F.pad(one, (0, size - len(one))), F.pad(other, (0, size - len(other)))


def _check_weight(name: str, weight: Any) -> None:
    if not isinstance(weight, Real) or not abs(float(weight)) <= LARGEST:  # NaN compares as false
        raise ValueError(
            f"The mixture weight of {name!r} must be a finite number, at most {LARGEST:g} in size; got {weight!r}."
        )
