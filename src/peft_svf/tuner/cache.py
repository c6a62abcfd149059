# SPDX-License-Identifier: Apache-2.0
"""
Weights -> their bases, computed once per content and kept on disk.

An entry is named for the values of the weight it came from (upcast without loss, so one checkpoint loaded in bfloat16
or in float32 is one entry): `<key>.safetensors` with Q, S and the probe, and `<key>.json`, the manifest with its
checksum, which is written last: its presence means that the entry is whole. The checksum is compared where the file's
size or time is not the manifest's. The folder is `PEFT_SVF_CACHE`, else
`peft_svf` under `HF_HOME`. Nothing here knows of modules or adapters.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.utils import tqdm
from safetensors.torch import load_file, save
from torch import Tensor

from .basis import Basis, exact, factorize
from .fingerprint import Fingerprint, sketch

logger = logging.getLogger(__name__)
PROCEDURE = "svf-basis v1"
AT_ONCE = 8  # matrices that an accelerator factorises together
ALIGNMENT = 64  # bytes, of tensors in memory


def cache_dir() -> Path:
    """The folder that holds the bases: `PEFT_SVF_CACHE`, else `peft_svf` under `HF_HOME`. It may not exist yet."""
    return Path(os.environ.get("PEFT_SVF_CACHE") or Path(constants.HF_HOME) / "peft_svf").expanduser()


def content_key(weight: Tensor) -> str:
    """
    Hash the values of a weight `(out, in)` or `(E, out, in)`: sha256 over its shape and its values, upcast losslessly.

    One checkpoint loaded in bfloat16 or in float32 has one key; a rounded copy has another.
    """
    values = exact(weight.detach()).cpu().contiguous()
    digest = hashlib.sha256(f"{PROCEDURE} {tuple(values.shape)} {values.dtype}".encode())
    digest.update(values.numpy().data)
    return digest.hexdigest()


def fetch(
    names: Iterable[str], weight_of: Callable[[str], Tensor], known: Mapping[str, str] | None = None
) -> dict[str, tuple[Basis, Fingerprint]]:
    """
    Get the bases of weights from the cache; what is missing or damaged there is computed and added.

    Args:
        names (`Iterable[str]`):
            Names of the weights.
        weight_of (`Callable[[str], torch.Tensor]`):
            Gives the weight `(out, in)`, or a stack `(E, out, in)`, of a name. Called up to three times a name, one
            after the other, so it may read lazily.
        known (`Mapping[str, str]`, *optional*):
            Content keys that are known without hashing, by name.

    Returns:
        `dict[str, tuple[Basis, Fingerprint]]`: per name the basis, on the CPU in float32 (float64 for float64).
    """
    shapes = {}

    def key_of(name: str) -> str:
        weight = weight_of(name)
        shapes[name] = weight.shape
        return content_key(weight)

    keys = {name: (known or {}).get(name) or key_of(name) for name in names}
    found = {key: entry for key in dict.fromkeys(keys.values()) if (entry := _read(key)) is not None}
    for name in known or ():
        if keys[name] not in found:  # what is computed is kept under the name of its content
            keys[name] = key_of(name)
    if missing := {key: name for name, key in keys.items() if key not in found}:
        try:
            (cache_dir() / "locks").mkdir(parents=True, exist_ok=True)
            lock = cache_dir() / "locks" / hashlib.sha256("".join(sorted(missing)).encode()).hexdigest()
            with FileLock(lock, mode=0o666):  # two processes with the same model: one computes, the other reads
                found |= _compute(missing, weight_of, shapes)
        except OSError as error:
            logger.warning(
                f"The basis cache {cache_dir()} cannot be written ({error}); bases are computed again next time."
            )
            found |= _compute(missing, weight_of, shapes, keep=False)
        else:
            entries, size = usage()
            logger.info(f"Basis cache {cache_dir()}: {entries} entries, {size / 1e6:.0f} MB.")
    return {name: found[key] for name, key in keys.items()}


def usage() -> tuple[int, int]:
    """Count the entries of the cache and their bytes on disk."""
    files = [path for path in cache_dir().glob("*.*") if path.suffix in (".safetensors", ".json")]
    return sum(path.suffix == ".json" for path in files), sum(path.stat().st_size for path in files)


def prune(keep_bytes: int = 0) -> int:
    """
    Delete the entries that were read longest ago until at most `keep_bytes` are left. Deleting is always safe.

    Returns:
        `int`: the bytes that were freed.
    """
    freed, (_, size) = 0, usage()
    for manifest in sorted(cache_dir().glob("*.json"), key=lambda path: path.stat().st_mtime):
        if size - freed <= keep_bytes:
            break
        for path in (manifest, manifest.with_suffix(".safetensors")):  # the manifest first: it says the entry is whole
            freed += path.stat().st_size if path.exists() else 0
            path.unlink(missing_ok=True)
    return freed


def _compute(
    missing: dict[str, str], weight_of: Callable[[str], Tensor], shapes: Mapping[str, torch.Size], keep: bool = True
) -> dict[str, tuple[Basis, Fingerprint]]:
    """Compute the bases of `missing` (key -> name of a weight), batched by shape on an accelerator, and write them."""
    found = {}
    with tqdm(total=len(missing), desc="Computing SVF bases", unit="weight", name="peft_svf.basis") as bar:
        todo = dict(missing)
        while todo:
            key, name = next(iter(todo.items()))
            if keep and (entry := _read(key)) is not None:  # another process was faster
                found[key] = entry
                del todo[key]
                bar.update()
                continue
            weight = weight_of(name)
            batch = {key: weight}
            if weight.is_cuda and weight.dim() == 2:  # on a CPU one matrix at a time already uses all threads
                same = [k for k, n in todo.items() if shapes[n] == weight.shape][:AT_ONCE]
                batch = {k: weight_of(todo[k]) for k in same}
            stacked = _factorize(torch.stack(list(batch.values())))
            for k, Q, S in zip(batch, stacked.Q, stacked.S, strict=True):
                dtype = exact(weight[:0]).dtype
                basis = Basis(stacked.side, Q.to("cpu", dtype), S.to("cpu", dtype))
                found[k] = (basis, Fingerprint(k, sketch(Q)))
                if keep:
                    _write(k, *found[k])
                del todo[k]
                bar.update()
    return found


def _factorize(weights: Tensor) -> Basis:
    """Factorise `(N, out, in)`, or stacks `(1, E, out, in)`, a few matrices at a time: float64 copies are large."""
    flat = weights.flatten(0, -3)
    parts = [factorize(part) for part in flat.split(AT_ONCE if weights.is_cuda else 1)]
    Q, S = torch.cat([part.Q for part in parts]), torch.cat([part.S for part in parts])
    leading = weights.shape[:-2]
    return Basis(parts[0].side, Q.unflatten(0, leading), S.unflatten(0, leading))


def _write(key: str, basis: Basis, fingerprint: Fingerprint) -> None:
    tensors = {"Q": basis.Q.contiguous(), "S": basis.S.contiguous(), "probe": fingerprint.sketch}
    content = _aligned(save(tensors, metadata={"procedure": PROCEDURE, "side": basis.side}))
    manifest = {
        "procedure": PROCEDURE,
        "side": basis.side,
        "directions": basis.S.numel(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    _replace(cache_dir() / f"{key}.safetensors", content)
    _seal(key, manifest)


def _aligned(content: bytes) -> bytes:
    """Pad the header of a safetensors file so that its numbers lie where those in memory do: products round alike."""
    start = 8 + int.from_bytes(content[:8], "little")
    padding = -start % ALIGNMENT
    return (start - 8 + padding).to_bytes(8, "little") + content[8:start] + b" " * padding + content[start:]


def _seal(key: str, manifest: dict[str, Any]) -> None:
    """Write the manifest of a whole entry, with the size and time of its file: while these stay, so do its bytes."""
    manifest |= _state(cache_dir() / f"{key}.safetensors")
    _replace(cache_dir() / f"{key}.json", json.dumps(manifest, indent=1).encode())


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _replace(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: readers see the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # a cache may be shared, and `mkstemp` lets nobody else read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(key: str) -> tuple[Basis, Fingerprint] | None:
    """Read an entry, or `None` where there is none. A damaged one is reported and counts as missing."""
    path = cache_dir() / f"{key}.safetensors"
    manifest_path = path.with_suffix(".json")
    if not manifest_path.exists():
        return None
    try:
        manifest = json.loads(manifest_path.read_text())
        if any(manifest.get(name) != value for name, value in _state(path).items()):  # copied, or written to
            if hashlib.sha256(path.read_bytes()).hexdigest() != manifest["sha256"]:
                raise ValueError("its checksum differs from the manifest")
            with suppress(OSError):  # a shared cache may be only readable
                _seal(key, manifest)
        tensors = load_file(path)
        Q = tensors["Q"] if tensors["Q"].data_ptr() % ALIGNMENT == 0 else tensors["Q"].clone()
        with suppress(OSError):
            os.utime(manifest_path)  # `prune` drops what was read longest ago
        return Basis(manifest["side"], Q, tensors["S"]), Fingerprint(key, tensors["probe"])
    except Exception as error:  # whatever is wrong with it, the weight itself is at hand to compute it again
        logger.warning(f"The entry {path} of the basis cache is damaged and is computed again: {error}.")
        with suppress(OSError):
            manifest_path.unlink()  # it says that the entry is whole
        return None
