# SPDX-License-Identifier: Apache-2.0
"""
Files that are written whole or not at all, and files from outside that are read within bounds.

This module doesn't know their contents or the rest of the package.
"""

import errno
import glob
import gzip
import json
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("peft-svf", "torch", "transformers", "peft", "trl")
LIMIT = 64 << 20  # bytes of a text file from outside; the largest of ours, a fingerprint of an 8B model, has 0.1 MB
STALE = 3600  # seconds after which a temporary file belongs to nobody
SECRET = r"(?:(?<!pad_)(?<!eos_)(?<!bos_)token|api[_-]?key|passw(?:or)?d|secret|credentials?)"
SECRET_NAME = re.compile(rf"(?:^|[_-]){SECRET}$", re.IGNORECASE)
SECRET_TEXT = re.compile(r"\bhf_\w{8,}|(?<=://)[^/\s@]+(?=@)")  # tokens of the Hub, and user:password of a URL
# `token=x`, `"token": "x"` and `--token x` inside a text, such as a whole command
SECRET_PAIR = re.compile(
    rf"((?:\b|_){SECRET}[\"']?\s*[=:]\s*[\"']?|--(?:[\w-]+[_-])?{SECRET}\s+)[^\s\"',}}\]]+", re.IGNORECASE
)
PENDING = ".pending.json"  # names the files of a set that is complete but not yet in place


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace a file when its new content is whole on the disk; its folder is made if it is missing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.writing"):  # left by a process that was killed
        with suppress(OSError):  # another process may be cleaning up too
            if time.time() - stale.stat().st_mtime > STALE:
                stale.unlink()
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"The disk is full; the old {target.name} is intact", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_together(folder: str | os.PathLike[str], contents: Mapping[str, str | bytes]) -> None:
    """
    Replace several files of a folder as one: a reader that calls [`settle`] first sees all old or all new.

    The new files wait under temporary names until all of them are whole. [`PENDING`] then decides: a crash before it
    leaves the old set, a crash after it leaves renames that [`settle`] finishes. Other files of the folder stay.
    """
    target = Path(folder)
    settle(target)
    with ExitStack() as undo:
        for name, content in contents.items():
            undo.callback(_waiting(target, name).unlink, missing_ok=True)
            write(_waiting(target, name), content)
        write(target / PENDING, json.dumps(sorted(contents)))
        undo.pop_all()
    settle(target)


def settle(folder: str | os.PathLike[str]) -> None:
    """Finish the renames of a [`write_together`] that was interrupted after its decision; else change nothing."""
    target = Path(folder)
    if not (target / PENDING).is_file():
        return
    names = read_json(target / PENDING)
    if not isinstance(names, list) or any(os.path.basename(str(name)) != name for name in names):
        raise ValueError(f"{target / PENDING} is damaged: it should list file names. Remove it and save again.")
    for name in names:
        if _waiting(target, name).is_file():
            _waiting(target, name).replace(target / name)
    (target / PENDING).unlink(missing_ok=True)


def _waiting(folder: Path, name: str) -> Path:
    return folder / f".{name}.waiting"


def read_bytes(path: str | os.PathLike[str], limit: int = LIMIT) -> bytes:
    """
    Read a file from outside; one that ends in `.gz` is unpacked.

    Raises:
        `FileNotFoundError`: if it is missing.
        `ValueError`: if it isn't a regular file (a pipe or a device would block), holds more than `limit` bytes
            (unpacked), or is a damaged or truncated gzip file.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=opener) as raw:
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise ValueError(f"{path} isn't a regular file.")
        try:
            content = (gzip.GzipFile(fileobj=raw) if str(path).endswith(".gz") else raw).read(limit + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged or truncated gzip file ({error}): fetch it again.") from error
    if len(content) > limit:
        raise ValueError(f"{path} holds more than {limit:,} bytes, too many for a file of its kind.")
    return content


def read_json(path: str | os.PathLike[str], limit: int = LIMIT) -> Any:
    """
    Read a JSON file from outside; errors as in [`read_bytes`], and `ValueError` for bad or deeply nested JSON.

    A repeated key is refused, because readers differ in which one counts. NaN is accepted, as transformers writes it.
    """
    content = read_bytes(path, limit)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a key is repeated")
        return table

    try:
        return json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also of other encodings, and of integers with too many digits
        raise ValueError(f"{path} isn't valid JSON ({error}): fetch it again.") from error


def read_tensors(path: str | os.PathLike[str], limit: int = LIMIT) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """
    Read the tensors and the metadata of a safetensors file from outside; errors as in [`read_bytes`].

    The file is read into memory, because a mapped one may change under its tensors.
    """
    from safetensors import SafetensorError  # here, as help on the command line does without torch
    from safetensors.torch import load

    content = read_bytes(path, limit)
    try:
        tensors = load(content)  # checks the header as well
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{os.path.basename(path)} is damaged ({error}): fetch it again.") from error
    return tensors, header.get("__metadata__") or {}


def without_secrets(value: Any) -> Any:
    """
    Drop entries whose name is a secret's, at any depth, and replace secrets inside texts by dots.

    A text loses Hub tokens, passwords in URLs, values that follow a secret's name, and secrets of the environment.
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(inner) for key, inner in value.items() if not SECRET_NAME.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):  # JSON, as in --model_init_kwargs '{"token": ...}'
        with suppress(ValueError, RecursionError):
            return json.dumps(without_secrets(json.loads(value)))
    for name, secret in os.environ.items():
        if SECRET_NAME.search(name) and len(secret) >= 8:
            value = value.replace(secret, "...")
    return SECRET_TEXT.sub("...", SECRET_PAIR.sub(r"\1...", value))


def public(value: Any) -> Any:
    """Return JSON values without secrets, and with paths of this machine relative to the project or its home."""
    text = json.dumps(without_secrets(value))
    for folder, short in ((f"{Path.cwd()}{os.sep}", ""), (str(Path.home()), "~")):
        if folder.strip(os.sep):  # a root is part of every path
            text = text.replace(json.dumps(folder)[1:-1], short)
    return json.loads(text)


@contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Name the extra of this package that brings what is imported in the context, if it is missing."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{need} ({error}): pip install 'peft-svf[{name}]'.") from error


def versions() -> dict[str, str]:
    """Return the installed versions of this package and of the libraries that decide a number."""
    installed = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name.replace("-", "_")] = version(name)
    return installed
