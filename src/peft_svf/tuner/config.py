# SPDX-License-Identifier: Apache-2.0
"""The settings of an SVF adapter: `SVFConfig` and all its validation. Nothing here sees a model."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .plans import PLANS, Plan

CHOICES = {
    "basis_dtype": ("auto", "float32", "bfloat16"),
    "basis_from": ("auto", "checkpoint", "memory"),
    "plan": PLANS,
}


@dataclass
class SVFConfig(PeftConfig):
    """
    Configuration of Singular Value Fine-tuning (arXiv 2501.06252): one multiplier per singular value of a weight.

    Args:
        target_modules (`list[str] | str`, *optional*):
            Names or name endings of the modules, a regex that matches whole names, or `"all-linear"`, which
            leaves out what can't be adapted and names it in the log. Default: the MLP weights of the architecture (the
            paper's choice); if these are fused experts, attention q and v.
        target_parameters (`list[str]`, *optional*):
            Name endings of parameters that are matrices, or stacks of them as in fused mixture-of-experts modules:
            `"mlp.experts.gate_up_proj"`. With these and without `target_modules`, no modules are targeted.
        exclude_modules (`list[str] | str`, *optional*):
            Modules to leave out, in the same forms.
        layers_to_transform (`list[int] | int`, *optional*):
            Indices of the layers to adapt; needs `target_modules` as a list or the default. Without those of the
            first third, a library's experts are chosen inside the prefill (see [`RoutingKey`]).
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
            `"auto"` follows the base: `"bfloat16"` on a bfloat16 base, for half the memory and faster products, else
            `"float32"` (also with `save_basis`). Rounding the directions loses about .2 % of a learned change; z = 1
            stays the base model to the bit. The gradients of the smallest 5 % of singular values are then up to 6 %
            off (SmolLM2's q_proj, merged plan; .3 % with `"float32"`; tests/test_real.py). The first adapter decides.
        plan (`str`):
            How the layers compute. `"auto"` decides for each forward: on a merged copy of the weight in inference and
            in training steps of enough tokens, through the two factors of the weight if the rows of a batch differ,
            else by two thin products next to the base layer. `"merged"`, `"narrow"`, `"factored"` request one.
            The first adapter of a model decides, `model.set_plan` changes it; it isn't saved with an expert. If you
            write to a base weight through `.data`, which torch doesn't count, call `set_plan` to drop its copies.
        basis_from (`str`):
            `"memory"`: the basis of the weights as loaded. `"checkpoint"`: of the stored weights, an error if no file
            holds them. `"auto"`: of the stored ones if loading has rounded them and the file is on this machine.
        save_basis (`bool`):
            Save the basis with the offsets, `4 r k` bytes a weight: the expert then has the very same directions on
            the base in other dtypes and quantisations. `PeftModel.from_pretrained` and `load_adapter` of a
            `PeftModel` use it.
        description (`str`, *optional*):
            What the expert is good at, in a few words; the first pass of Transformer² reads it.
        fingerprint (`dict`, *optional*):
            Written by the package: per module a hash of the base weight's values and a sketch of its basis. An adapter
            is refused on a base with other singular directions. Set it to `None` to start a new expert from a loaded
            config.
    """

    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    rank: int | None = None
    basis_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    plan: Plan = "auto"
    basis_from: Literal["auto", "checkpoint", "memory"] = "auto"
    save_basis: bool = False
    description: str | None = None
    fingerprint: dict[str, dict[str, str]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SVF  # a member since `peft_svf` was imported
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name), list):
                setattr(self, name, set(names))  # as PEFT's tuners keep it
        if wrong := self._wrong():
            raise ValueError(wrong)

    def _wrong(self) -> str:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:  # PEFT ignores it silently
            return (
                "`layers_to_transform` cannot be used when `target_modules` is a str (a regex or 'all-linear'): list "
                "name endings, or put it in the regex."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:  # likewise
            return "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
        if self.rank is not None and not (type(self.rank) is int and self.rank >= 1):
            return f"`rank` is the number of singular values to move, at least 1, or None for all; got {self.rank!r}."
        if not isinstance(self.fingerprint, dict | None):
            return f"`fingerprint` must be a dict by module name or None; got {self.fingerprint!r:.80}."
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                return f"`{name}` must be one of {', '.join(allowed)}; got {value!r}."
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: everything but `plan`, which belongs to a machine and not to an expert."""
        return {key: value for key, value in super().to_dict().items() if key != "plan"}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """
        Read a config as PEFT does. A file's regular expressions are never run: the fingerprint lists their modules.

        Raises:
            `ValueError`: if it has regular expressions and no fingerprint.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path) / (subfolder or "") / SAFETENSORS_WEIGHTS_NAME
        if weights.is_file():
            with safe_open(weights, "pt"):  # refuses a damaged file before a model is touched
                pass
        if isinstance(config, SVFConfig):
            config.list_modules()
        return config

    def list_modules(self) -> None:
        """Replace regular expressions by the modules that the fingerprint lists."""
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        if (
            (not isinstance(self.target_modules, str) or self.target_modules == "all-linear")
            and not isinstance(self.exclude_modules, str)
            and all(re.fullmatch(r"[\w.]*", pattern) for pattern in patterns)
        ):
            return
        if not self.fingerprint:
            raise ValueError(
                "The adapter's config selects modules by a regular expression and has no fingerprint that lists them. "
                "A file's expressions are not run: replace it by a list in adapter_config.json."
            )
        self.select_listed()

    def select_listed(self) -> None:
        """Select the modules that the fingerprint lists, whatever selected them before."""
        stacks = tuple(f".{name}" for name in self.target_parameters or ())
        names = {name for name in self.fingerprint or () if not (stacks and f".{name}".endswith(stacks))}
        for field, value in (selecting(names, self.target_parameters or ()) | {"target_modules": names}).items():
            setattr(self, field, value)


def selecting(modules: Iterable[str], parameters: Iterable[str] = ()) -> dict[str, Any]:
    """Return the fields of a config that selects modules and parameters by name, and nothing else."""
    unset = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    return unset | {"target_modules": sorted(modules) or None, "target_parameters": list(parameters) or None}
