# SPDX-License-Identifier: Apache-2.0
"""
z-vectors as values: `Expert`, offsets of one base model by weight, and `Mixture`, weights over experts.

An expert is read from a folder or a Hub repository that `save_pretrained`, `push_to_hub` or [`Expert.save`] wrote;
nothing from a file is run. Experts add up as in the paper's formula: `0.7 * math + 0.3 * code`. A mixture is the same
sum by name; every adaptation strategy returns one. Nothing here loads a model.
"""

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, reduce
from numbers import Real
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import Tensor

from .. import files
from ..tuner.config import SVFConfig, selecting
from ..tuner.fingerprint import Fingerprint, check
from ..tuner.weights import FLOATS
from .key import KEY_NAME, RoutingKey

OTHER = "other"  # the base model, in decisions and as an explicit choice
PREFIX = "base_model.model."  # PEFT puts it in front of the base model's module names
SOURCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:::(?P<subfolder>[^@]+))?(?:@(?P<revision>\S+))?")
OFFSET_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.svf_offset\.weight")
LARGEST = 1e4  # abs(z - 1) and mixture weights end here; trained z stay between 0 and 2, and float16 ends at 65504
LIMIT = 16 << 30  # bytes of a weights file
WAITS = (1, 2, 4)  # seconds before a download that broke is tried again
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes that pass


class SavedOffsets(Mapping[str, Tensor]):
    """The offsets of a saved expert by weight: `sizes` are known, values are read on first use."""

    def __init__(self, name: str, folder: Path, sizes: dict[str, int]) -> None:
        self.name, self.folder, self.sizes = name, folder, sizes

    def __getitem__(self, module: str) -> Tensor:
        return self._values[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        return self.read()

    def read(self) -> dict[str, Tensor]:
        """Read the values without keeping them. Raises `ValueError` if the file is damaged or has other sizes now."""
        with naming(self.name, self.folder):
            offsets = read_offsets(self.folder)[0]
            if self.sizes != {module: len(offset) for module, offset in offsets.items()}:
                raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} has changed since it was loaded. Load it again.")
        return offsets


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
                _check_offsets(self.offsets)

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

    @property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """Fingerprints of the base's weights, by module; by parameter if they are stacked."""
        return {name: Fingerprint.from_json(entry) for name, entry in (self.config.get("fingerprint") or {}).items()}

    def check_base(self, weights: Mapping[str, Fingerprint], name: str) -> None:
        """Raise `ValueError` if the weights of a model are another base's; those that it lacks aren't compared."""
        check(self.fingerprints, weights, absent=[], adapter=self.name, here=name, there=self.base_model)

    def __mul__(self, weight: float) -> "Expert":
        return _combined((float(weight), self)) if isinstance(weight, Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> "Expert":
        return -1.0 * self

    def __add__(self, other: "Expert") -> "Expert":
        return _combined((1.0, self), (1.0, other)) if isinstance(other, Expert) else NotImplemented

    def __sub__(self, other: "Expert") -> "Expert":
        return self + -other if isinstance(other, Expert) else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Whether two experts of one base have the same z; a weight that one of them doesn't move has z = 1."""
        if not isinstance(other, Expert):
            return NotImplemented
        none = torch.zeros(0)
        pairs = ((self.offsets.get(m, none), other.offsets.get(m, none)) for m in {*self.offsets, *other.offsets})
        return self.base_model == other.base_model and all(torch.equal(*_padded(a, b)) for a, b in pairs)

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
            if missing := [n for n in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / n).exists()]:
                raise FileNotFoundError(
                    f"{str(source)!r} holds no expert: there is no file {folder / missing[0]}. A base model, or a "
                    "bundle of experts, is loaded as model=..."
                )
            config = read_config(folder)
            offsets, others, provenance = read_offsets(folder)
            if others:
                raise ValueError(
                    f"it holds more than z-vectors, first {min(others)!r}, and cannot be mixed. If you trust it, load "
                    "it with PeftModel.from_pretrained instead."
                )
            # The fingerprint names the parameter of a stacked weight, and the file its module.
            listed = config.get("fingerprint") or offsets
            modules = sorted(module if module in offsets else module.rpartition(".")[0] for module in listed)
            if modules != sorted(module.replace(".base_layer", "") for module in offsets):
                odd = min({*listed} ^ {*offsets})
                raise ValueError(f"config and weights do not name the same modules, first {odd}: fetch it again.")
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
            (Path(folder) / KEY_NAME).unlink(missing_ok=True)  # left by an expert that was saved here before
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
        name (`str`): What the library calls it, if a first pass chose it by that.
    """

    alpha: dict[str, float] = field(default_factory=dict)
    strategy: str = "explicit"
    confidence: float = 1.0
    probabilities: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        _check_weights(self.alpha)
        kept = {name: float(weight) for name, weight in self.alpha.items() if weight and name != OTHER}
        object.__setattr__(self, "alpha", kept)

    @property
    def choice(self) -> str:
        """Its name, else the expert with the largest weight, or `"other"` if the base has the most."""
        shares = {**self.alpha, OTHER: 1 - sum(self.alpha.values())}
        return self.name or max(shares, key=lambda name: shares[name])

    def record(self) -> dict[str, Any]:
        """Return the decision with the fields of transformers' `decision` pipeline, and the weights."""
        probabilities = self.probabilities or {self.choice: 1.0}
        facts = {"choice": self.choice, "confidence": self.confidence, "probabilities": probabilities}
        return facts | {"alpha": self.alpha}

    def offsets(self, experts: Mapping[str, Expert]) -> dict[str, Tensor]:
        """Mix the offsets of experts by weight of the base model, each `(k,)`."""
        return _summed((weight, experts[name].offsets) for name, weight in self.alpha.items())

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
        content = files.read_json(path)
        try:
            return cls(content.pop("alpha"), **content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no mixture: {error!r}.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `adapter_config.json` of an expert. Raises `ValueError` for what [`SVFConfig`] refuses."""
    config = files.read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict) or config.get("peft_type") != "SVF":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        way_out = "; `peft-svf import` turns a LoRA into the nearest expert" if kind == "LORA" else ""
        raise ValueError(f"{folder} holds no SVF expert: its {CONFIG_NAME} has the PEFT type {kind}{way_out}.")
    SVFConfig.from_peft_type(**config)  # PEFT warns of settings that this version does not have
    return config


def read_offsets(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """
    Read the weights file of an expert.

    Returns `z - 1` by module, each `(k,)` float32; its other tensors by key; the expert's provenance. Raises
    `ValueError` if the file is damaged, or holds no offsets or none that could be.
    """
    others, metadata = files.read_tensors(folder / SAFETENSORS_WEIGHTS_NAME, LIMIT)
    keys = {match["module"]: key for key in sorted(others) if (match := OFFSET_KEY.fullmatch(key))}
    if not keys:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} holds no offsets, only {sorted(others)[:3]}.")
    offsets = {module: others.pop(key) for module, key in keys.items()}
    _check_offsets(offsets)
    provenance = json.loads(metadata.get("provenance", "{}"))
    return {module: offset.float() for module, offset in offsets.items()}, others, provenance


def _check_offsets(offsets: Mapping[str, Tensor]) -> None:
    """Refuse offsets that aren't vectors, or are so large that they can only be damage, with a `ValueError`."""
    for module, offset in offsets.items():
        if offset.dim() != 1 or offset.dtype not in FLOATS or not (offset.abs() <= LARGEST).all():  # NaN too
            raise ValueError(
                f"the offset for {module}, of shape {tuple(offset.shape)} and dtype {offset.dtype}, isn't a vector of "
                f"finite floating point numbers up to {LARGEST:g}."
            )


def name_of(source: str | os.PathLike[str]) -> str:
    """Name an expert after the last part of its folder, subfolder or repository."""
    place, subfolder, _ = _split(source)
    return os.path.basename(os.path.abspath(subfolder or place))  # works for "." as well


def folder_of(source: str | os.PathLike[str], subfolder: str | None, revision: str | None, token: Any) -> Path:
    """Return the folder of an expert's files, after downloading them from one commit if they are on the Hub."""
    place, inside, at = _split(source)
    subfolder, folder = subfolder or inside, Path(place)
    if not folder.is_dir():
        if not SOURCE.fullmatch(place) or place.startswith("."):
            raise FileNotFoundError(f"{str(source)!r} is neither a folder nor the id of a Hub repository.")
        names = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, KEY_NAME)
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
        folder = download(place, revision=revision or at, token=token, allow_patterns=patterns)
    return folder / subfolder if subfolder else folder


def download(repo_id: str, **options: Any) -> Path:
    """
    Download files of a repository, all from one commit; a broken connection or a busy server is asked again.

    Raises:
        `FileNotFoundError`: if repository or revision don't exist, aren't open to this user, or can't be reached and
            aren't in the cache; with the way out.
    """
    try:
        for wait in WAITS:
            try:
                return Path(snapshot_download(repo_id, **options))
            except Exception as error:  # httpx, the Hub and the system raise their own
                if not _passes(error):
                    raise
            time.sleep(wait)
        return Path(snapshot_download(repo_id, **options))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} on the Hub has no revision {options['revision']!r}.") from error
    except RepositoryNotFoundError as error:  # also a gated one
        raise FileNotFoundError(
            f"The Hub shows no repository {repo_id!r}: check its name; if it is private or gated, run `hf auth login` "
            "or pass token=..."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id!r} isn't in the cache, and the Hub can't be reached or HF_HUB_OFFLINE is set: run "
            f"`hf download {repo_id}` once with a connection, or name a folder."
        ) from error


def _passes(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of a kind that passes: a broken connection or a busy server."""
    while error is not None:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        broken = any(kind.__name__ in ("TransportError", "StreamError") for kind in type(error).__mro__)  # httpx's
        if isinstance(error, OfflineModeIsEnabled):
            return False
        if status in TRANSIENT or broken or isinstance(error, (ConnectionError, TimeoutError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _split(source: str | os.PathLike[str]) -> tuple[str, str | None, str | None]:
    """Split `org/zoo::code@v2` into repository, subfolder and revision; a folder stays whole."""
    match = None if os.path.isdir(source) else SOURCE.fullmatch(str(source))
    return (match["repo"], match["subfolder"], match["revision"]) if match else (str(source), None, None)


@contextmanager
def naming(name: str, folder: Path | None = None) -> Iterator[None]:
    """Name the expert in the error about its files or values."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Expert {name!r}{f' in {folder}' if folder else ''}: {error}") from error


def _combined(*terms: tuple[float, Expert]) -> Expert:
    """Add up one or two experts of one base model; the sum is named for its terms."""
    first, last = terms[0][1], terms[-1][1]
    shares: dict[str, float] = defaultdict(float)
    for weight, expert in terms:
        for name, part in (expert.provenance.get("sum") or {expert.name: 1.0}).items():
            shares[name] += weight * part
    _check_weights(shares)
    first.check_base(last.fingerprints, last.base_model or last.name)
    rank, stacks = first.config.get("rank"), first.config.get("target_parameters") or ()
    if rank != last.config.get("rank") or set(stacks) != set(last.config.get("target_parameters") or ()):
        raise ValueError(
            f"{first.name!r} and {last.name!r} have the ranks {rank} and {last.config.get('rank')}, or move different "
            "stacked weights: mix them in an ExpertLibrary, where the base model gives the sizes."
        )
    offsets = _summed((weight, expert.offsets) for weight, expert in terms)
    # PEFT nests one wrapper per parameter of a module, so a file calls them `experts`, `experts.base_layer`, ...
    owners = tuple(f".{parameter.rpartition('.')[0]}" for parameter in stacks)
    linear = [name for name in offsets if not f".{name.replace('.base_layer', '')}".endswith(owners)]
    prints = {**(last.config.get("fingerprint") or {}), **(first.config.get("fingerprint") or {})}
    config = first.config | selecting(linear, stacks) | {"description": None, "fingerprint": prints or None}
    name = " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight in shares.items())
    return Expert(name.replace("+ -", "- "), offsets, config, {"sum": dict(shares)})


def _summed(terms: Iterator[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Compute `Σ αᵢ (zᵢ - 1)` by weight, `(k,)` of the longest."""
    total: dict[str, Tensor] = {}
    for weight, offsets in terms:
        for module, offset in offsets.items():
            before, part = _padded(total.get(module, torch.zeros(0)), weight * offset)
            total[module] = before + part
    return total


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give two offsets the same length: directions that one of them doesn't move have z = 1."""
    size = max(len(a), len(b))
    return F.pad(a, (0, size - len(a))), F.pad(b, (0, size - len(b)))


def _check_weights(alpha: Mapping[str, Any]) -> None:
    for name, weight in alpha.items():
        if not isinstance(weight, Real) or not abs(float(weight)) <= LARGEST:  # NaN compares as false
            raise ValueError(
                f"The mixture weight of {name!r} must be a finite number, at most {LARGEST:g} in size; got {weight!r}."
            )
