# SPDX-License-Identifier: Apache-2.0
"""
Weights -> their bases, computed once per content and kept on disk.

An entry `<key>.safetensors` holds Q and S and is named for the values of its weight, upcast without loss, so that one
checkpoint loaded in bfloat16 or in float32 is one entry. Nothing in the folder is trusted: an entry is read into
memory in one piece and counts only if it fits the weight ([`deviation`]), so a damaged, swapped or planted one is
computed again. The folder is `PEFT_SVF_CACHE`, else `peft_svf` under `HF_HOME`. Nothing here knows modules.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.utils import tqdm
from safetensors.torch import save
from torch import Tensor

from .. import files
from .basis import Basis, deviation, exact, factorize, side_of, tolerance
from .fingerprint import Fingerprint, sketch

logger = logging.getLogger(__name__)
PROCEDURE = "svf-basis v1"
AT_ONCE = 8  # matrices that an accelerator factorises together
THREADS = min(8, os.cpu_count() or 1)  # hash and verify weights; both release the GIL
HEADER = 1 << 16  # bytes; an entry may have so many beyond its numbers


def cache_dir() -> Path:
    """Return the folder of the cache: `PEFT_SVF_CACHE`, else `peft_svf` under `HF_HOME`. It may not exist yet."""
    return Path(os.environ.get("PEFT_SVF_CACHE") or Path(constants.HF_HOME) / "peft_svf").expanduser()


def content_key(weight: Tensor) -> str:
    """
    Hash a weight `(out, in)` or `(E, out, in)`: sha256 over its shape and its values, upcast losslessly.

    One checkpoint loaded in bfloat16 or in float32 has one key; a rounded copy has another.
    """
    values = exact(weight.detach()).cpu().contiguous()
    digest = hashlib.sha256(f"{PROCEDURE} {tuple(values.shape)} {values.dtype}".encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()


def fetch(names: Iterable[str], weight_of: Callable[[str], Tensor]) -> dict[str, tuple[Basis, Fingerprint]]:
    """
    Get the bases of weights from the cache; compute and add those that are missing there or do not fit their weight.

    Args:
        weight_of (`Callable[[str], torch.Tensor]`):
            Reads the weight `(out, in)`, or a stack `(E, out, in)`, of a name; called in this thread.

    Returns:
        `dict[str, tuple[Basis, Fingerprint]]`: per name the basis, on the CPU in float32 (float64 for float64).
    """
    names, keys = list(names), dict[str, str]()
    bases: dict[str, Basis] = {}  # by key
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(names), THREADS):  # a few at a time: upcast copies are large
            batch = names[start : start + THREADS]
            for name, (key, basis) in zip(batch, pool.map(_look_up, [weight_of(name) for name in batch]), strict=True):
                keys[name] = key
                if basis is not None:
                    bases[key] = basis
    if missing := {key: name for name, key in keys.items() if key not in bases}:
        bases |= _compute(missing, weight_of)
    prints = {key: Fingerprint(key, sketch(basis.Q)) for key, basis in bases.items()}
    return {name: (bases[key], prints[key]) for name, key in keys.items()}


def usage() -> tuple[int, int]:
    """Count the entries of the cache and their bytes on disk."""
    sizes = [status.st_size for _, status in _entries()]
    return len(sizes), sum(sizes)


def prune(keep_bytes: int = 0) -> int:
    """
    Delete the entries that were used longest ago until at most `keep_bytes` are left.

    Returns the freed bytes. Deleting is always safe: a reader that has opened an entry still gets all of it, and any
    other computes it again.
    """
    if not cache_dir().is_dir():
        return 0
    freed = 0
    with _lock():
        size = usage()[1]
        for path, status in sorted(_entries(), key=lambda entry: entry[1].st_mtime):
            if size - freed <= keep_bytes:
                break
            path.unlink(missing_ok=True)
            freed += status.st_size
    return freed


def _entries() -> Iterator[tuple[Path, os.stat_result]]:
    """Visit the entries with their status; links are not followed, and entries that vanish meanwhile are skipped."""
    for path in cache_dir().glob("*.safetensors"):
        with suppress(FileNotFoundError):
            yield path, path.lstat()


@contextmanager
def _lock() -> Iterator[None]:
    """Serialise what changes the cache, in all processes. Reading needs no lock: an entry is opened once, whole."""
    path = cache_dir() / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.unlink()  # It is a link or a pipe, which would be followed or block.
    with FileLock(path, mode=0o666):
        yield


def _look_up(weight: Tensor) -> tuple[str, Basis | None]:
    """Return the key of a weight and its basis, if the cache has one that fits."""
    values = exact(weight.detach()).cpu()
    return (key := content_key(values)), _read(key, values)


def _read(key: str, weight: Tensor) -> Basis | None:
    """Read an entry and verify it against its weight; return `None` if it is missing or does not fit."""
    path, values = cache_dir() / f"{key}.safetensors", exact(weight.detach()).cpu()
    lead, r = values.shape[:-2], min(values.shape[-2:])
    try:
        limit = lead.numel() * r * (r + 1) * values.element_size() + HEADER
        tensors = {} if path.is_symlink() else files.read_tensors(path, limit)[0]
        Q, S = (tensors[name].clone() for name in "QS")  # clones are aligned, and products round by alignment
        fits = (Q.shape, S.shape, Q.dtype, S.dtype) == ((*lead, r, r), (*lead, r), values.dtype, values.dtype)
        if not (fits and (apart := deviation(values, Q, S)) <= tolerance(values.dtype)):
            raise ValueError(f"deviation {apart:.2g}" if fits else f"shape {tuple(Q.shape)}, {Q.dtype}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # Whatever is wrong with the entry, the weight is at hand to compute it again.
        logger.warning(f"The entry {path} of the basis cache is damaged and is computed again: {error}.")
        with suppress(OSError):
            path.unlink()
        return None
    with suppress(OSError):  # a shared cache may be read-only
        os.utime(path, follow_symlinks=False)  # `prune` deletes what was used longest ago
    return Basis(side_of(*values.shape[-2:]), Q, S)


def _compute(missing: dict[str, str], weight_of: Callable[[str], Tensor]) -> dict[str, Basis]:
    """Compute the bases of `missing` (key -> name of a weight), batched by shape on an accelerator, and write them."""
    bases: dict[str, Basis] = {}
    todo, keep = dict(missing), True
    with tqdm(total=len(missing), desc="Computing SVF bases", unit="weight", name="peft_svf.basis") as bar:
        while todo:
            key, *others = list(todo)[:AT_ONCE]
            batch = {key: weight_of(todo[key])}
            if batch[key].is_cuda and batch[key].dim() == 2:  # On a CPU one matrix at a time already uses all threads.
                alike = {other: weight_of(todo[other]) for other in others}
                batch |= {other: weight for other, weight in alike.items() if weight.shape == batch[key].shape}
            try:
                with _lock() if keep else nullcontext():  # if two processes load one model, one of them computes
                    bases |= _computed(batch, keep)
            except OSError as error:
                keep = False
                logger.warning(
                    f"The basis cache {cache_dir()} cannot be written ({error}); bases are computed again next time."
                )
                bases |= _computed(batch, keep)
            except ValueError as error:  # `factorize` doesn't know the names
                raise ValueError(f"{', '.join(todo[key] for key in batch)}: {error}") from error
            for key in batch:
                del todo[key]
                bar.update()
    if keep:
        count, size = usage()
        logger.info(f"Basis cache {cache_dir()}: {count} entries, {size / 1e6:.0f} MB.")
    return bases


def _computed(batch: dict[str, Tensor], keep: bool) -> dict[str, Basis]:
    """Compute the bases of weights of one shape, by key, unless another process has just written them."""
    bases = {key: basis for key, weight in batch.items() if keep and (basis := _read(key, weight)) is not None}
    todo = {key: weight for key, weight in batch.items() if key not in bases}
    if todo:
        weights = torch.stack(list(todo.values()))  # (N, out, in), or one stack (1, E, out, in)
        matrices = weights.flatten(0, -3).split(AT_ONCE if weights.is_cuda else 1)  # few, because they become float64
        side, Q, S = zip(*((basis.side, basis.Q, basis.S) for basis in map(factorize, matrices)), strict=True)
        dtype, lead = exact(weights[:0]).dtype, weights.shape[:-2]
        whole = (torch.cat(parts).unflatten(0, lead).to("cpu", dtype).unbind() for parts in (Q, S))
        for key, q, s in zip(todo, *whole, strict=True):
            bases[key] = Basis(side[0], q.contiguous(), s.contiguous())
            if keep:
                content = save({"Q": bases[key].Q, "S": bases[key].S}, metadata={"procedure": PROCEDURE})
                files.write(cache_dir() / f"{key}.safetensors", content)
    return bases
