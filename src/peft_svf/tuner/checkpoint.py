# SPDX-License-Identifier: Apache-2.0
"""
Loaded model -> the weights as its checkpoint stores them.

A float32 checkpoint loaded in bfloat16 holds rounded weights, whose singular directions differ from the stored ones by
far more than an expert moves them. If the file is on this machine, the basis comes from the file. Nothing here
loads a model or reaches the Hub.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PACKED = 0.7  # 4 bits lose about 0.1 of a weight's norm, 2 bits 0.5; another weight differs by 1.4


class Checkpoint:
    """
    The safetensors files that a model was loaded from, if they lie on this machine: its folder or the Hub cache.

    Args:
        model (`torch.nn.Module`):
            Base model. `config._name_or_path` names its folder or repository.
    """

    def __init__(self, model: nn.Module) -> None:
        self.name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        self.prefix = getattr(model, "base_model_prefix", "")
        self._files = self._find_files()

    def weight(self, name: str, loaded: Tensor, packed: bool = False) -> Tensor | None:
        """
        Read the stored form of a loaded weight.

        Args:
            name (`str`):
                Name of the parameter in the model, such as `"model.layers.0.mlp.up_proj.weight"`.
            loaded (`torch.Tensor`):
                The parameter. What the file holds counts only if it rounds to exactly these values.
            packed (`bool`):
                They were quantised and dequantised: then a relative distance of `PACKED` is rounding, too.

        Returns:
            `torch.Tensor` like `loaded` in the dtype of the file, or `None` if no file holds this very weight.
        """
        found = self._stored(name)
        if found is None:
            return None
        with safe_open(found[0], framework="pt") as file:
            stored = file.get_tensor(found[1])
        same = stored.shape == loaded.shape and _rounds_to(stored, loaded.detach().cpu(), packed)
        return stored.to(loaded.device) if same else None

    def _stored(self, name: str) -> tuple[Path, str] | None:
        """The file that holds a parameter, and its name there."""
        for candidate in (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")):
            if (path := self._files.get(candidate)) is not None:
                return path, candidate
        parts = name.split(".")
        for start in range(1, len(parts) - 1):  # transformers renames parts of models that see while it loads them
            ending = "." + ".".join(parts[start:])
            if alike := [stored for stored in self._files if f".{stored}".endswith(ending)]:
                return (self._files[alike[0]], alike[0]) if len(alike) == 1 else None
        return None

    def _find_files(self) -> dict[str, Path]:
        """Map the names of the stored tensors to their files; empty where there are none."""
        index = self._file("model.safetensors.index.json")
        single = self._file("model.safetensors")
        try:
            if index is not None:
                shards = json.loads(index.read_text())["weight_map"]
                return {name: path for name, shard in shards.items() if (path := self._file(shard)) is not None}
            if single is not None:
                with safe_open(single, framework="pt") as file:
                    return dict.fromkeys(file.keys(), single)
        except (OSError, ValueError, KeyError, SafetensorError):
            pass  # an unreadable checkpoint is as good as none: the weights in memory are the only source
        return {}

    def _file(self, name: str) -> Path | None:
        if not self.name:
            return None
        local = Path(self.name) / name
        if local.is_file():
            return local
        if Path(self.name).exists() or self.name.count("/") != 1:
            return None
        cached = try_to_load_from_cache(self.name, name)
        return Path(cached) if isinstance(cached, str) else None


def _rounds_to(stored: Tensor, loaded: Tensor, packed: bool) -> bool:
    if not packed:
        return torch.equal(stored.to(loaded.dtype), loaded)
    wide = stored.float()
    return bool((wide - loaded.float()).norm() <= PACKED * wide.norm())
