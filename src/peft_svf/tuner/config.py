# SPDX-License-Identifier: Apache-2.0
"""What a user says about an SVF adapter: `SVFConfig` and all its validation. Nothing here sees a model."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._registration import add_peft_type
from .plans import PLANS, Plan

add_peft_type()  # before the class below names it
logger = logging.getLogger(__name__)
BASIS_NAME = "svf_basis.safetensors"


@dataclass
class SVFConfig(PeftConfig):
    """
    Configuration of Singular Value Fine-tuning (arXiv 2501.06252): one multiplier per singular value of a weight.

    Args:
        target_modules (`list[str] | str`, *optional*):
            Names or name endings of the modules, a regex that matches whole names, or `"all-linear"`. Default: the MLP
            weights of the architecture (the paper's choice); where these are fused experts, attention q and v.
        target_parameters (`list[str]`, *optional*):
            Name endings of parameters that are matrices, or stacks of them as in fused mixture-of-experts modules:
            `"mlp.experts.gate_up_proj"`. With these and without `target_modules`, no modules are targeted.
        exclude_modules (`list[str] | str`, *optional*):
            Modules to leave out, in the same forms.
        layers_to_transform (`list[int] | int`, *optional*):
            Indices of the layers to adapt; needs `target_modules` as a list or the default.
        layers_pattern (`list[str] | str`, *optional*):
            Name of the list of layers, if it is not the first numbered one; needs `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole, such as a new classification head.
        trainable_token_indices (`list[int] | dict[str, list[int]]`, *optional*):
            Rows of the embedding that are trained as well (PEFT's `TrainableTokens`).
        init_weights (`bool`):
            `True` starts from z = 1, the base model to the bit; `False` from z ~ N(1, 0.5), for tests.
        rank (`int`, *optional*):
            Move only the `rank` largest singular values of each weight and keep the others as they are.
        basis_dtype (`str`):
            `"float32"`, or `"bfloat16"` for half the memory and faster products on a bfloat16 base (it rounds the
            directions, and the gradients of the smallest 5 % of singular values are then a third off: case B10 of
            benchmarks/speed.py). The first adapter of a model decides.
        plan (`str`):
            How the layers compute. `"auto"` decides for each forward: on a merged copy of the weight in inference and
            in training steps of enough tokens, by two thin products beside the base layer else, through the two
            factors of the weight where the rows of a batch differ. `"merged"`, `"narrow"`, `"factored"` ask for one.
            The first adapter of a model decides, `model.set_plan` changes it; it is not saved with an expert.
        basis_from (`str`):
            `"memory"`: the basis of the weights as loaded. `"checkpoint"`: of the stored weights, an error where no
            file holds them. `"auto"`: of the stored ones if loading has rounded them and the file is on this machine.
        save_basis (`bool`):
            Save the basis beside the offsets, in `svf_basis.safetensors`, `4 r k` bytes a weight: the expert then has
            the very same directions on the base in other dtypes and quantisations. `PeftModel.from_pretrained` and
            `load_adapter` of a `PeftModel` use it.
        description (`str`, *optional*):
            What the expert is good at, in a few words. The first pass of Transformer² reads it.
        fingerprint (`dict`, *optional*):
            Written by the package: per module a hash of the base weight's values and a probe of its basis. An adapter
            is refused on a base with other singular directions. Set it to `None` to start a new expert from a loaded
            config.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Names, a regex, or 'all-linear'."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters, such as fused experts."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding that are trained as well."}
    )
    init_weights: bool = field(default=True, metadata={"help": "True: start from z = 1, the base model."})
    rank: int | None = field(default=None, metadata={"help": "Move only the largest singular values."})
    basis_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Dtype of the basis."})
    plan: Plan = field(default="auto", metadata={"help": "Execution plan: auto, merged, narrow or factored."})
    basis_from: Literal["auto", "checkpoint", "memory"] = field(
        default="auto", metadata={"help": "Whose singular directions: the stored weights' or the loaded ones'."}
    )
    save_basis: bool = field(default=False, metadata={"help": "Save the singular directions beside the offsets."})
    description: str | None = field(default=None, metadata={"help": "What the expert is good at, in a few words."})
    fingerprint: dict[str, dict[str, str]] | None = field(
        default=None, metadata={"help": "Identifies the base weights; written by the package."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's tuners keep it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str (regex): put it in the regex."
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):  # True is no rank
            raise ValueError(
                f"`rank` is the number of singular values to move, at least 1, or None for all; got {self.rank!r}."
            )
        for name, allowed in (
            ("basis_dtype", ("float32", "bfloat16")),
            ("basis_from", ("auto", "checkpoint", "memory")),
            ("plan", PLANS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.fingerprint is not None and not isinstance(self.fingerprint, dict):
            raise ValueError(
                f"`fingerprint` must be a dict by module name or None; got {type(self.fingerprint).__name__}."
            )

    def to_dict(self) -> dict[str, Any]:
        """What is saved: everything but `plan`, which is about a machine, not about an expert."""
        return {key: value for key, value in super().to_dict().items() if key != "plan"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """
        Read a config as PEFT does. A damaged weights file beside it is refused here, before any model is touched.

        Raises:
            `ValueError`: if the adapter's weights are truncated or no safetensors.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path) / (subfolder or "") / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():
            with _reading(weights), safe_open(weights, "pt"):
                pass
        if isinstance(config, SVFConfig) and config.save_basis:
            config.__dict__["_basis_file"] = cls._find_basis(pretrained_model_name_or_path, subfolder, **kwargs)
        return config

    @classmethod
    def _find_basis(cls, source: str, subfolder: str | None, **kwargs: Any) -> Path | None:
        folder = Path(source) / (subfolder or "")
        if folder.is_dir():
            return folder / BASIS_NAME if (folder / BASIS_NAME).is_file() else None
        try:
            return Path(hf_hub_download(source, BASIS_NAME, subfolder=subfolder, **cls._split_kwargs(kwargs)[0]))
        except EntryNotFoundError:  # an expert without it is one as any other
            return None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config as PEFT does, and the bases that were recorded for it."""
        super().save_pretrained(save_directory, **kwargs)
        if bases := self.__dict__.pop("_bases", None):
            tensors = {f"{name}.Q": Q.contiguous() for name, (Q, _) in bases.items()}
            tensors |= {f"{name}.S": S.contiguous() for name, (_, S) in bases.items()}
            hashes = {name: entry["sha256"] for name, entry in (self.fingerprint or {}).items() if name in bases}
            path = Path(save_directory) / BASIS_NAME
            writing = path.with_name(f".{BASIS_NAME}.writing")
            try:
                save_file(tensors, writing, metadata={"format": "pt", "sha256": json.dumps(hashes, sort_keys=True)})
                writing.replace(path)
            finally:
                writing.unlink(missing_ok=True)
            logger.info(f"Saved the bases of {len(bases)} weights, {path.stat().st_size / 1e6:.1f} MB, in {path}.")

    def record_bases(self, bases: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Take the bases `(r, k)` and singular values `(k,)` by weight that the next `save_pretrained` writes."""
        self.__dict__["_bases"] = bases

    def read_bases(self) -> dict[str, tuple[Tensor, Tensor, str]]:
        """
        Read the bases that came with a loaded config: per weight Q, singular values, and the hash of the weight.

        Raises:
            `ValueError`: if the file is damaged.
        """
        path = self.__dict__.get("_basis_file")
        if path is None:
            return {}
        with _reading(path), safe_open(path, "pt") as file:
            hashes = json.loads((file.metadata() or {}).get("sha256", "{}"))
            return {
                name: (file.get_tensor(f"{name}.Q"), file.get_tensor(f"{name}.S"), h) for name, h in hashes.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: everything but bases on their way to a file."""
        return {key: value for key, value in self.__dict__.items() if key != "_bases"}

    @property
    def fingerprint_recorded(self) -> bool:
        """Whether the fingerprint was written by saving this very object, rather than read from a file."""
        return self.__dict__.get("_recorded") is self.fingerprint is not None

    def record_fingerprint(self, fingerprint: dict[str, dict[str, str]] | None) -> None:
        """Write the fingerprint of the base before saving. The object may still start an adapter elsewhere."""
        self.fingerprint = self.__dict__["_recorded"] = fingerprint


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read that it is damaged."""
    try:
        yield
    except (SafetensorError, ValueError, AttributeError) as error:
        raise ValueError(
            f"The adapter's weights {path} are damaged ({error}): the file is incomplete, or it is no safetensors "
            "file. Copy or download it again."
        ) from error
