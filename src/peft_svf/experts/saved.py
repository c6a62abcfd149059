# SPDX-License-Identifier: Apache-2.0
"""
Files of an expert, in a folder or on the Hub -> checked offsets and config. Nothing from a file is run.

What has no readable, finite z-vectors is refused with the expert's name.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .. import files
from ..tuner.config import SVFConfig
from ..tuner.weights import FLOATS
from .key import KEY_NAME

SOURCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:::(?P<subfolder>[^@]+))?(?:@(?P<revision>\S+))?")
OFFSET_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.svf_offset\.weight")
LARGEST = 1e4  # of abs(z - 1) and of mixture weights; trained z stay between 0 and 2, and float16 ends at 65504
LIMIT = 16 << 30  # bytes of a weights file
WAITS = (1, 2, 4)  # seconds before a download that broke is tried again
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes that pass


class SavedOffsets(Mapping[str, Tensor]):
    """The offsets of a saved expert by weight: `sizes` are known, values are read on first use."""

    def __init__(self, name: str, folder: Path, sizes: dict[str, int]) -> None:
        self.name, self.folder, self.sizes = name, folder, sizes
        self._values: dict[str, Tensor] | None = None

    def __getitem__(self, module: str) -> Tensor:
        if self._values is None:
            self._values = self.read()
        return self._values[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self) -> dict[str, Tensor]:
        """Read the values without keeping them. Raises `ValueError` if the file is damaged or has other sizes now."""
        with naming(self.name, self.folder):
            offsets = read_offsets(self.folder)[0]
            if self.sizes != {module: len(offset) for module, offset in offsets.items()}:
                raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} has changed since it was loaded. Load it again.")
        return offsets


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `adapter_config.json` of an expert. Raises `ValueError` for what [`SVFConfig`] refuses."""
    config = files.read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict) or config.get("peft_type") != "SVF":
        raise ValueError(f"{folder} holds no SVF expert: {CONFIG_NAME} names another PEFT type.")
    SVFConfig.from_peft_type(**config)  # PEFT warns of settings that this version does not have
    return config


def read_offsets(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """
    Read the weights file of an expert, into memory since a mapped file may change under the model.

    Returns:
        `z - 1` by module, each `(k,)` float32; its other tensors by key; the expert's provenance.

    Raises:
        `ValueError`: if the file is damaged, or holds no offsets or none that could be.
    """
    content = files.read_bytes(folder / SAFETENSORS_WEIGHTS_NAME, LIMIT)
    try:
        others = load(content)
        provenance = json.loads(files.metadata_of(content).get("provenance", "{}"))
    except (SafetensorError, RecursionError, ValueError) as error:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} is damaged ({error}): fetch it again.") from error
    keys = {match["module"]: key for key in sorted(others) if (match := OFFSET_KEY.fullmatch(key))}
    if not keys:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} holds no offsets, only {sorted(others)[:3]}.")
    offsets = {module: others.pop(key) for module, key in keys.items()}
    check_offsets(offsets)
    return {module: offset.float() for module, offset in offsets.items()}, others, provenance


def check_offsets(offsets: Mapping[str, Tensor]) -> None:
    """Refuse offsets that aren't vectors, or are so large that they can only be damage, with a `ValueError`."""
    for module, offset in offsets.items():
        if offset.dim() != 1 or offset.dtype not in FLOATS:
            raise ValueError(
                f"the offset for {module} has shape {tuple(offset.shape)} and dtype {offset.dtype}; it needs one axis "
                "of floating point numbers."
            )
    broken = [module for module, offset in offsets.items() if not (offset.abs() <= LARGEST).all()]  # NaN too
    if broken:
        raise ValueError(
            f"z is not finite or beyond {LARGEST:g} in {len(broken)} of {len(offsets)} weights, first in "
            f"`{broken[0]}`."
        )


def check_modules(offsets: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse a fingerprint of other modules; it names the parameter of a stacked weight, the file its module."""
    fingerprint = config.get("fingerprint") or offsets
    listed = sorted(name if name in offsets else name.rpartition(".")[0] for name in fingerprint)
    if listed != sorted(name.replace(".base_layer", "") for name in offsets):
        odd = min({*fingerprint} ^ {*offsets})
        raise ValueError(f"config and weights do not name the same modules, first {odd}: fetch it again.")


def split_source(source: str | os.PathLike[str]) -> tuple[str, str | None, str | None]:
    """Split `org/zoo::code@v2` into repository, subfolder and revision; a folder stays whole."""
    match = None if os.path.isdir(source) else SOURCE.fullmatch(str(source))
    return (match["repo"], match["subfolder"], match["revision"]) if match else (str(source), None, None)


def name_of(source: str | os.PathLike[str]) -> str:
    """Name an expert after the last part of its folder, subfolder or repository."""
    place, subfolder, _ = split_source(source)
    return os.path.basename(os.path.abspath(subfolder or place))  # works for "." as well


def folder_of(source: str | os.PathLike[str], subfolder: str | None, revision: str | None, token: Any) -> Path:
    """
    Return the folder of an expert's files; those of a repository are downloaded, all from one commit.

    Raises:
        `FileNotFoundError`: if `source` is no folder and doesn't name a repository, and as in [`download`].
    """
    place, inside, at = split_source(source)
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
    Download files of a repository, all from one commit; what fails for a moment is tried again.

    Raises:
        `FileNotFoundError`: if repository or revision don't exist, aren't open to this user, or can't be reached and
            aren't in the cache; with the way out.
    """
    try:
        return _downloaded(repo_id, WAITS, **options)
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


def _downloaded(repo_id: str, waits: Sequence[float], **options: Any) -> Path:
    """Download files; a connection that breaks or a server that fails for a moment is tried again."""
    try:
        return Path(snapshot_download(repo_id, **options))
    except Exception as error:
        if not waits or not _passes(error):
            raise
    time.sleep(waits[0])
    return _downloaded(repo_id, waits[1:], **options)


def _passes(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of a kind that passes: a broken connection or a busy server."""
    while error is not None:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        broken = any(kind.__name__ in ("TransportError", "StreamError") for kind in type(error).__mro__)  # httpx's
        if status in TRANSIENT or broken or isinstance(error, (ConnectionError, TimeoutError)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming(name: str, folder: Path | None = None) -> Iterator[None]:
    """Name the expert in the error about its files or values."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Expert {name!r}{f' in {folder}' if folder else ''}: {error}") from error
