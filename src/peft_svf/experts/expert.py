# SPDX-License-Identifier: Apache-2.0
"""
z-vectors as values: `Expert`, offsets of one base model by module name, and `Mixture`, weights over experts.

An expert comes from a folder or a Hub repository that `save_pretrained`, `push_to_hub` or [`Expert.save`] wrote; as a
`SavedExpert` it stays there until its vectors are needed. A mixture is what every adaptation strategy returns. Nothing
here loads a model.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

OTHER = "other"  # the base model, in decisions and as an explicit choice
PREFIX = "base_model.model."  # PEFT's, of modules of the base model
OFFSET_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.svf_offset\.weight")


@dataclass(frozen=True)
class Expert:
    """
    Named z-vectors of one base model.

    Args:
        name (`str`): How decisions and mixtures call it.
        offsets (`dict[str, torch.Tensor]`): Per module of the base model `z - 1`, shape `(k,)`, float32.
        config (`dict`): Its `adapter_config.json`, with base model and fingerprint.
        provenance (`dict`): How it came about if it was not trained, as JSON values; empty for a trained one.

    Raises:
        `ValueError`: if a z-vector has more than one axis or is not finite.
    """

    name: str
    offsets: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for module, offset in self.offsets.items():
            if offset.dim() != 1 or not torch.isfinite(offset).all():
                raise ValueError(
                    f"Expert {self.name!r} has an offset of shape {tuple(offset.shape)} for {module}; it needs one "
                    "axis and finite entries."
                )

    @property
    def z(self) -> dict[str, Tensor]:
        """Per module the multipliers of its largest singular values, shape `(k,)`."""
        return {module: 1 + offset for module, offset in self.offsets.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Per module the number of singular values that z moves."""
        return {module: len(offset) for module, offset in self.offsets.items()}

    @property
    def base_model(self) -> str | None:
        """Name of the base model that the expert was trained on."""
        return self.config.get("base_model_name_or_path")

    @property
    def description(self) -> str:
        """What the expert is good at, in a few words; may be empty."""
        return self.config.get("description") or ""

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
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
            subfolder, revision, token:
                As in `from_pretrained`. Both files come from one commit.

        Raises:
            `FileNotFoundError`: if there is no such folder or file.
            `ValueError`: if the files hold no SVF expert, hold more than z-vectors, are damaged, or z is not finite.
        """
        return SavedExpert.find(source, name, subfolder=subfolder, revision=revision, token=token).load()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """
        Write the expert as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        Files that are there are replaced only when the new ones are whole.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        own = {"peft_type": "SVF", "target_modules": sorted(self.offsets)} | self.config
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in own.items()}
        tensors = {f"{PREFIX}{module}.svf_offset.weight": o.contiguous() for module, o in self.offsets.items()}
        metadata = {"format": "pt"} | ({"provenance": json.dumps(self.provenance)} if self.provenance else {})
        temporary = {name: target / f".{name}.writing" for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)}
        try:
            save_file(tensors, temporary[SAFETENSORS_WEIGHTS_NAME], metadata=metadata)
            temporary[CONFIG_NAME].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for name, path in temporary.items():
                path.replace(target / name)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class SavedExpert:
    """
    An expert that stays on disk until [`SavedExpert.load`]: everything is checked but the values of its z-vectors.

    Args:
        name (`str`): How decisions and mixtures call it.
        folder (`Path`): Where its two files lie.
        config (`dict`): Its `adapter_config.json`.
        sizes (`dict[str, int]`): Per module the number of singular values that z moves.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    sizes: dict[str, int]

    @classmethod
    def find(
        cls,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "SavedExpert":
        """Find an expert in a folder or a Hub repository; arguments and errors as in [`Expert.load`]."""
        folder = Path(source)
        if not folder.is_dir():
            if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
                raise FileNotFoundError(f"There is no folder {str(source)!r}, and it is no Hub repository id.")
            wanted = [f"{subfolder}/{f}" if subfolder else f for f in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
            folder = Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=wanted))
        folder = folder / subfolder if subfolder else folder
        for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{str(source)!r} holds no expert: {file} is missing in {folder}.")
        name = name or os.path.basename(os.path.abspath(subfolder or source))  # of "." too
        with _naming(name, folder):
            config = read_config(folder)
            shapes, others = read_shapes(folder)
        if others:
            raise ValueError(
                f"Expert {name!r} in {folder} holds more than z-vectors, first {min(others)!r}, and cannot be mixed. "
                "Load it with PeftModel.from_pretrained instead."
            )
        if stacks := config.get("target_parameters"):
            raise ValueError(
                f"Expert {name!r} in {folder} rescales stacked weights ({', '.join(map(str, stacks))}), which are not "
                "mixed here: load it with PeftModel.from_pretrained, where rows choose adapters by `adapter_names`."
            )
        if wide := [(module, shape) for module, shape in shapes.items() if len(shape) != 1]:
            raise ValueError(
                f"Expert {name!r} in {folder} cannot be loaded: its offset for {wide[0][0]} has shape {wide[0][1]}; "
                "it needs one axis."
            )
        fingerprint = config.get("fingerprint") or shapes
        if odd := sorted(set(fingerprint if isinstance(fingerprint, Mapping) else ()) ^ set(shapes)):
            raise ValueError(
                f"Expert {name!r} in {folder} is damaged: config and weights do not name the same modules, first "
                f"{odd[0]}. Fetch it again."
            )
        return cls(name, folder, config, {module: shape[0] for module, shape in shapes.items()})

    def load(self) -> Expert:
        """
        Read the z-vectors.

        Raises:
            `FileNotFoundError`: if the files are gone.
            `ValueError`: if they are damaged or not finite, or have changed since they were found.
        """
        path = self.folder / SAFETENSORS_WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(f"Expert {self.name!r} is gone: {path} was there when it was found.")
        with _naming(self.name, self.folder):
            expert = Expert(self.name, read_offsets(self.folder)[0], self.config, _read_provenance(path))
            if expert.sizes != self.sizes:
                raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} has changed since it was found. Add the expert again.")
        return expert


@dataclass(frozen=True)
class Mixture:
    """
    Weights over experts: `z = 1 + Σ αᵢ (zᵢ - 1)`. What is left, `1 - Σ αᵢ`, belongs to the base model.

    Equal to `Σ αᵢ zᵢ` of arXiv 2501.06252 wherever the weights sum to 1; without any weight it is the base model.

    Args:
        alpha (`dict[str, float]`): Weight by name of expert; those at 0 are dropped.
        strategy (`str`): What found it: `"explicit"`, `"prompt"`, `"classifier"`, `"few-shot"`.
        confidence (`float`): 0 (a guess) to 1 (certain), `(p - 1/n) / (1 - 1/n)` for the choice among n.
        probabilities (`dict[str, float]`): Probability of each expert and of `"other"`, where a first pass gave them.
        provenance (`dict`): How it was found: settings, scores.
    """

    alpha: dict[str, float] = field(default_factory=dict)
    strategy: str = "explicit"
    confidence: float = 1.0
    probabilities: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, weight in self.alpha.items():
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"The mixture weight of {name!r} must be a finite number, got {weight!r}.")
        kept = {name: float(weight) for name, weight in self.alpha.items() if weight and name != OTHER}
        object.__setattr__(self, "alpha", kept)

    @property
    def choice(self) -> str:
        """The expert with the largest weight, or `"other"` where the base has the most."""
        shares = {**self.alpha, OTHER: 1 - sum(self.alpha.values())}
        return max(shares, key=lambda name: shares[name])

    def record(self) -> dict[str, Any]:
        """The decision with the fields of transformers' `decision` pipeline, and the weights."""
        return {
            "choice": self.choice,
            "confidence": self.confidence,
            "probabilities": self.probabilities or {self.choice: 1.0},
            "alpha": self.alpha,
        }

    def offsets(self, experts: Mapping[str, Expert]) -> dict[str, Tensor]:
        """
        Mix the offsets of experts by module, shape `(k,)`; an expert has 0 where it does not reach.

        Raises:
            `ValueError`: if an expert with a weight is not among `experts`.
        """
        if unknown := sorted(set(self.alpha) - set(experts)):
            raise ValueError(f"There is no expert {unknown[0]!r}; there are {', '.join(sorted(experts))} and 'other'.")
        mixed: dict[str, Tensor] = {}
        for name, weight in self.alpha.items():
            for module, offset in experts[name].offsets.items():
                before = mixed.get(module, torch.zeros(0))
                size = max(len(before), len(offset))
                pad = torch.nn.functional.pad
                mixed[module] = pad(before, (0, size - len(before))) + weight * pad(offset, (0, size - len(offset)))
        return mixed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mixture as JSON; a file that is there is replaced only when the new one is whole."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.writing")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Mixture":
        """Read a mixture that [`Mixture.save`] wrote. Raises `ValueError` if the file holds none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
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
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{CONFIG_NAME} is damaged ({error}): fetch it again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "SVF":
        raise ValueError(f"{folder} holds no SVF expert: {CONFIG_NAME} is missing or names another PEFT type.")
    return config


def read_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """
    Read the shapes of a saved expert's offsets by module name, and the keys of its other tensors, without the values.

    Raises:
        `ValueError`: if the file is damaged, cut short too, or holds no offsets.
    """
    with _reading(), safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # no mapping
    matches = {key: match for key in shapes if (match := OFFSET_KEY.fullmatch(key))}
    if not matches:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} holds no offsets, only {sorted(shapes)[:3]}.")
    return {match["module"]: shapes[key] for key, match in matches.items()}, sorted(set(shapes) - set(matches))


def read_offsets(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Read the offsets of a saved expert by module name, each `(k,)` float32, and the other saved tensors by their key.

    Raises:
        `ValueError`: if the file is damaged, holds no offsets, or one that is not finite.
    """
    with _reading():
        tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    matches = {key: match for key in tensors if (match := OFFSET_KEY.fullmatch(key))}
    offsets = {match["module"]: tensors[key].float() for key, match in matches.items()}
    if not offsets:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} holds no offsets, only {sorted(tensors)[:3]}.")
    if broken := [module for module, offset in offsets.items() if not torch.isfinite(offset).all()]:
        raise ValueError(f"z is not finite in {len(broken)} of {len(offsets)} weights, first in `{broken[0]}`.")
    return offsets, {key: tensor for key, tensor in tensors.items() if key not in matches}


def _read_provenance(path: Path) -> dict[str, Any]:
    with _reading(), safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("provenance", "{}"))


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} is damaged ({error}): fetch it again.") from error


@contextmanager
def _naming(name: str, folder: Path) -> Iterator[None]:
    """Say of a file that cannot be read which expert's it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Expert {name!r} in {folder} cannot be loaded: {error}") from error
