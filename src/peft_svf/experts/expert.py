# SPDX-License-Identifier: Apache-2.0
"""
z-vectors as values: `Expert`, offsets of one base model by weight, and `Mixture`, weights over experts.

An expert comes from a folder or a Hub repository that `save_pretrained`, `push_to_hub` or [`Expert.save`] wrote.
Experts add up as the paper's formula does: `0.7 * math + 0.3 * code`. A mixture is the same sum by name; every
adaptation strategy returns one. Nothing here loads a model.
"""

import json
import os
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from .. import files
from ..tuner.config import SVFConfig
from ..tuner.fingerprint import Fingerprint, check

OTHER = "other"  # the base model, in decisions and as an explicit choice
PREFIX = "base_model.model."  # PEFT puts it in front of the base model's module names
OFFSET_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.svf_offset\.weight")
DTYPES = {"F16", "BF16", "F32", "F64"}
LARGEST = 1e4  # of abs(z - 1) and of mixture weights; trained z stay between 0 and 2, and float16 ends at 65504
KNOWN = {entry.name for entry in fields(SVFConfig)}
LIMIT = 16 << 30  # bytes of a weights file
WAITS = (1, 2, 4)  # seconds before a download that broke is tried again
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes that pass


@dataclass(frozen=True, eq=False)
class Expert:
    """
    Named z-vectors of one base model, with the arithmetic of arXiv 2501.06252.

    `0.7 * math + 0.3 * code` has `z = 1 + 0.7 (z_math - 1) + 0.3 (z_code - 1)`: if the weights sum to 1 that is the
    paper's `Σ αᵢ zᵢ`, and else the base model (z = 1) has the share that is left. `==` compares z, not names.

    Args:
        name (`str`): Name in decisions and mixtures.
        offsets (`Mapping[str, torch.Tensor]`): `z - 1` by weight of the base model, each `(k,)` float32; of a stacked
            weight the vectors of its matrices, one after the other.
        config (`dict`): Its `adapter_config.json`, with base model and fingerprint.
        provenance (`dict`): How it was made if it was not trained, as JSON values.

    Raises:
        `ValueError`: if an offset has more than one axis, or an entry that is not finite or beyond 10,000.
    """

    name: str
    offsets: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.offsets, SavedOffsets):
            return
        for module, offset in self.offsets.items():
            if offset.dim() != 1 or not offset.is_floating_point():
                raise ValueError(
                    f"Expert {self.name!r} has an offset of shape {tuple(offset.shape)} and {offset.dtype} for "
                    f"{module}; it needs one axis of floating point numbers."
                )
        with _naming(self.name, "memory"):
            check_values(self.offsets)

    @property
    def z(self) -> dict[str, Tensor]:
        """Per weight the multipliers of its largest singular values, shape `(k,)`."""
        return {module: 1 + offset for module, offset in self.offsets.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Per weight the number of entries of z, without reading them."""
        if isinstance(self.offsets, SavedOffsets):
            return dict(self.offsets.sizes)
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
        Read an expert from a folder or a Hub repository.

        Args:
            source (`str` or path):
                Folder, or repository id such as `"me/expert"`.
            name (`str`, *optional*):
                Default: the last part of `subfolder`, else of `source`.
            lazy (`bool`):
                Check config and shapes now, and read the values when they are first used.
            subfolder, revision, token:
                As in `from_pretrained`. Both files come from one commit.

        Raises:
            `FileNotFoundError`: if there is no such folder or file.
            `ValueError`: if the files hold no SVF expert, hold more than z-vectors, are damaged, or z is not finite.
        """
        folder = Path(source)
        if not folder.is_dir():
            if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
                raise FileNotFoundError(
                    f"There is no folder {str(source)!r}, and it isn't a Hub repository id either."
                )
            patterns = [f"{subfolder}/{f}" if subfolder else f for f in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
            folder = _download(str(source), revision=revision, token=token, allow_patterns=patterns)
        folder = folder / subfolder if subfolder else folder
        name = name or os.path.basename(os.path.abspath(subfolder or source))  # works for "." as well
        with _naming(name, folder):
            files.settle(folder)
            for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                if not (folder / file).is_file():
                    raise FileNotFoundError(f"{str(source)!r} holds no expert: {file} is missing in {folder}.")
            config = read_config(folder)
            offsets, provenance = _read_header(name, folder, config)
        return cls(name, offsets if lazy else offsets.read(), config, provenance)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """
        Write the expert as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        Both appear together: an interruption or a full disk leaves the old ones.
        """
        linear = set(self.offsets) - stacked_in(self.offsets, self.config)
        own = {"peft_type": "SVF", "target_modules": sorted(linear)} | self.config
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in own.items()}
        tensors = {f"{PREFIX}{module}.svf_offset.weight": o.contiguous() for module, o in self.offsets.items()}
        metadata = {"format": "pt"} | ({"provenance": json.dumps(self.provenance)} if self.provenance else {})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        files.write_together(folder, {SAFETENSORS_WEIGHTS_NAME: save(tensors, metadata), CONFIG_NAME: text})


class SavedOffsets(Mapping[str, Tensor]):
    """
    The offsets of a saved expert by weight: sizes are known, values are read on first use.

    Args:
        name (`str`): Name of the expert, for messages.
        folder (`Path`): Folder of its files.
        keys (`dict[str, str]`): Key in the file by weight.
        sizes (`dict[str, int]`): Number of entries by weight.
    """

    def __init__(self, name: str, folder: Path, keys: dict[str, str], sizes: dict[str, int]) -> None:
        self.name, self.folder, self.keys_in_file, self.sizes = name, folder, keys, sizes
        self._values: dict[str, Tensor] | None = None

    def __getitem__(self, module: str) -> Tensor:
        if module not in self.sizes:
            raise KeyError(module)
        if self._values is None:
            self._values = self.read()
        return self._values[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self) -> dict[str, Tensor]:
        """
        Read the values without keeping them, each `(k,)` float32.

        Raises:
            `FileNotFoundError`: if the file is gone.
            `ValueError`: if it is damaged, z is not finite, or the file has changed since the expert was loaded.
        """
        path = self.folder / SAFETENSORS_WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"Expert {self.name!r} is gone: {path} was there when it was loaded.")
        with _naming(self.name, self.folder):
            tensors = read_tensors(self.folder)
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            if shapes != {key: (self.sizes[module],) for module, key in self.keys_in_file.items()}:
                raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} has changed since it was loaded. Load it again.")
            offsets = {module: tensors[key].float() for module, key in self.keys_in_file.items()}
            check_values(offsets)
        return offsets


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
        """
        Mix the offsets of experts by weight of the base model, each `(k,)`.

        Raises:
            `ValueError`: if an expert of the mixture isn't among `experts`.
        """
        if unknown := sorted(set(self.alpha) - set(experts)):
            raise ValueError(f"There is no expert {unknown[0]!r}; there are {', '.join(sorted(experts))} and 'other'.")
        return _summed([(weight, experts[name].offsets) for name, weight in self.alpha.items()])

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


def read_config(folder: Path) -> dict[str, Any]:
    """
    Read the `adapter_config.json` of a saved expert.

    Raises:
        `ValueError`: if there is none, it is damaged, or it names another PEFT type.
    """
    path = folder / CONFIG_NAME
    try:
        config = files.read_json(path) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{CONFIG_NAME} is damaged ({error}): fetch it again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "SVF":
        raise ValueError(f"{folder} holds no SVF expert: {CONFIG_NAME} is missing or names another PEFT type.")
    if (rank := config.get("rank")) is not None and (type(rank) is not int or not 1 <= rank <= 1 << 24):
        raise ValueError(f"{CONFIG_NAME} has rank={rank!r}, which isn't a number of singular values.")
    if unknown := sorted(key for key in set(config) - KNOWN if config[key] not in (None, False)):
        warnings.warn(
            f"{folder / CONFIG_NAME} has settings that this version of peft-svf doesn't know, first {unknown[0]!r}: "
            "they are ignored. A newer version may have written them.",
            stacklevel=3,
        )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a saved adapter, into memory since a mapped file may change under the model."""
    try:
        return load(files.read_bytes(folder / SAFETENSORS_WEIGHTS_NAME, LIMIT))
    except SafetensorError as error:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} is damaged ({error}): fetch it again.") from error


def _read_header(name: str, folder: Path, config: Mapping[str, Any]) -> tuple[SavedOffsets, dict[str, Any]]:
    """Read the sizes of a saved expert's offsets and its provenance, and refuse what is no set of z-vectors."""
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it isn't a mapping
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: part.get_dtype() for key, part in slices.items()}
            provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
    except (SafetensorError, RecursionError, ValueError) as error:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} is damaged ({error}): fetch it again.") from error
    modules = {match["module"]: key for key in shapes if (match := OFFSET_KEY.fullmatch(key))}
    if not modules:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} holds no offsets, only {sorted(shapes)[:3]}.")
    if others := sorted(set(shapes) - set(modules.values())):
        raise ValueError(
            f"it holds more than z-vectors, first {others[0]!r}, and cannot be mixed. If you trust it, load it with "
            "PeftModel.from_pretrained instead."
        )
    for module, key in modules.items():
        if len(shapes[key]) != 1 or dtypes[key] not in DTYPES:
            raise ValueError(
                f"its offset for {module} has shape {shapes[key]} and dtype {dtypes[key]}; it needs one axis of "
                "floating point numbers."
            )
    fingerprint = config.get("fingerprint") or modules
    known = set(fingerprint if isinstance(fingerprint, Mapping) else ())
    stacked = stacked_in(modules, config) - known
    owners = sorted(name.replace(".base_layer", "") for name in stacked)
    parameters = sorted(name for name in known - set(modules) if name.rpartition(".")[0] in owners)
    agree = [name.rpartition(".")[0] for name in parameters] == owners
    if odd := sorted(known.difference(parameters) ^ (set(modules) - stacked)) or ([] if agree else owners):
        raise ValueError(
            f"it is damaged: config and weights do not name the same modules, first {odd[0]}. Fetch it again."
        )
    return SavedOffsets(name, folder, modules, {module: shapes[key][0] for module, key in modules.items()}), provenance


def stacked_in(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """
    Return which offsets belong to stacked weights. PEFT nests one wrapper per parameter of a module, so the file names
    them `experts`, `experts.base_layer`, ...; only the model has the parameters' order.
    """
    owners = tuple(f".{str(target).rpartition('.')[0]}" for target in config.get("target_parameters") or ())
    return {name for name in names if f".{name.replace('.base_layer', '')}".endswith(owners)}


def _combined(terms: Sequence[tuple[float, Expert]]) -> Expert:
    """Add up experts of one base model; the sum is named for what it is made of."""
    experts = [expert for _, expert in terms]
    shares: dict[str, float] = defaultdict(float)
    for weight, expert in terms:
        for name, part in (expert.provenance.get("sum") or {expert.name: 1.0}).items():
            shares[name] += weight * part
    for name, weight in shares.items():
        _check_weight(name, weight)
    prints = [expert.config.get("fingerprint") or {} for expert in experts]
    saved = [{module: Fingerprint.from_json(entry) for module, entry in entries.items()} for entries in prints]
    here, there = experts[-1].base_model or experts[-1].name, experts[0].base_model
    check(saved[0], saved[-1], absent=[], adapter=experts[0].name, here=here, there=there)
    ranks = [expert.config.get("rank") for expert in experts]
    rank = None if None in ranks else max(ranks)
    offsets = _summed([(weight, expert.offsets) for weight, expert in terms])
    parameters = [sorted(expert.config.get("target_parameters") or ()) for expert in experts]
    widest = {module for expert in experts if expert.config.get("rank") == rank for module in expert.offsets}
    if parameters[0] != parameters[-1] or (len(set(ranks)) > 1 and (parameters[0] or set(offsets) != widest)):
        raise ValueError(
            f"{' and '.join(repr(expert.name) for expert in experts)} have ranks {ranks} and move different or "
            "stacked weights: mix them in an ExpertLibrary, where the base model gives the sizes."
        )
    config = experts[0].config | {
        "rank": rank, "description": None, "fingerprint": {**prints[-1], **prints[0]} or None,
        "target_modules": sorted(set(offsets) - stacked_in(offsets, experts[0].config)),
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    name = " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight in shares.items())
    return Expert(name.replace("+ -", "- "), offsets, config, {"sum": dict(shares)})


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
    if not isinstance(weight, Real) or not abs(weight) <= LARGEST:  # NaN compares as false
        raise ValueError(
            f"The mixture weight of {name!r} must be a finite number, at most {LARGEST:g} in size; got {weight!r}."
        )


def check_values(offsets: Mapping[str, Tensor]) -> None:
    """Refuse offsets that are not finite or so large that they can only be damage."""
    broken = [module for module, offset in offsets.items() if not (offset.abs() <= LARGEST).all()]
    if broken:
        raise ValueError(
            f"z is not finite or beyond {LARGEST:g} in {len(broken)} of {len(offsets)} weights, first in "
            f"`{broken[0]}`."
        )


def _download(repo_id: str, **options: Any) -> Path:
    """Download files of a repository; a connection that breaks or a server that fails for a moment is tried again."""
    for wait in (*WAITS, None):
        try:
            return Path(snapshot_download(repo_id, **options))
        except Exception as error:
            if wait is None or not _passes(error):
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")


def _passes(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of a kind that passes: a broken connection or a busy server."""
    while error is not None:
        status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
        if status in TRANSIENT or isinstance(error, (ConnectionError, TimeoutError)):
            return True
        if any(kind.__name__ in ("TransportError", "StreamError") for kind in type(error).__mro__):  # httpx's
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _naming(name: str, folder: object) -> Iterator[None]:
    """Name the expert in the error about a file that cannot be read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Expert {name!r} in {folder} cannot be loaded: {error}") from error
