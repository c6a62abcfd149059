# SPDX-License-Identifier: Apache-2.0
"""
The one file that touches the registries of PEFT and transformers.

`import peft_svf` calls `check_versions` and `register`. All changes to other libraries are made here: the enum
`peft.PeftType` gets the member SVF (PEFT has no entry point for it, read in peft 0.21.2), the libraries' functions
register the tuner and the pipeline, and `PeftModel.push_to_hub` hands SVF adapters to `experts.hub`, because PEFT's
upload loses the model card.
"""

import functools
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers.pipelines import PIPELINE_REGISTRY

NAME = "SVF"
PIPELINE = "transformer2"
NEEDED = ("torch", "transformers", "peft", "huggingface_hub")  # an old release of these fails at import, and unclearly


def floors() -> dict[str, Requirement]:
    """Read the requirements in [`NEEDED`] from the package's metadata; a source tree that isn't installed has none."""
    try:
        lines = requires("peft-svf") or []
    except PackageNotFoundError:
        return {}
    return {line.name: line for line in map(Requirement, lines) if line.name in NEEDED and line.marker is None}


def check_versions() -> None:
    """Raise an `ImportError` that names each library that is too old, with the line that updates it."""
    old = []
    for name, needed in floors().items():
        least = next(bound for bound in needed.specifier if bound.operator == ">=")
        if not least.contains(version(name), prereleases=True):
            old.append((name, version(name), least.version))
    if old:
        listed = ", ".join(f"{name} {installed} (needs >= {least})" for name, installed, least in old)
        update = " ".join(f"'{name}>={least}'" for name, _, least in old)
        raise ImportError(f"peft_svf doesn't work with {listed}. Update: pip install -U {update}")


def add_peft_type() -> PeftType:
    """
    Add the member SVF to `peft.PeftType`, as if PEFT's source defined it; again, it changes nothing.

    Raises:
        `ImportError`: if another package has taken the name, or this Python's enum doesn't accept a new member.
    """
    if NAME in PeftType.__members__:
        owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
        if owner is not None and not owner.__module__.startswith("peft_svf"):
            raise ImportError(
                f"The PEFT type {NAME} is taken by {owner.__module__}.{owner.__qualname__}: import only one."
            )
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_, member.__objclass__ = NAME, NAME, PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    if not (PeftType(NAME) is PeftType[NAME] is getattr(PeftType, NAME) is member and member in list(PeftType)):
        raise ImportError("This Python's enum doesn't accept a new member; please report it with your Python version.")
    return member


def register(*, config: type, model: type, pipeline: dict[str, Any] | None = None, push: Any = None) -> None:
    """
    Register the tuner with PEFT, the pipeline with transformers, and the upload with `PeftModel.push_to_hub`.

    Args:
        config (`type`):
            `SVFConfig`.
        model (`type`):
            `SVFModel`.
        pipeline (`dict`, *optional*):
            Arguments of `PIPELINE_REGISTRY.register_pipeline` other than the task's name.
        push (`Callable`, *optional*):
            `(peft_model, repo_id, **kwargs) -> CommitInfo`, called instead of PEFT's upload for SVF adapters only.
    """
    if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model, prefix="svf_")
    if pipeline is not None:
        taken = PIPELINE_REGISTRY.supported_tasks.get(PIPELINE)
        # transformers' own classes are registered as names
        owner = None if taken is None else getattr(taken["impl"], "__module__", "transformers")
        if owner is not None and not owner.startswith("peft_svf"):
            raise ImportError(f"The pipeline task {PIPELINE!r} is taken by {owner}: import only one.")
        if taken is None:
            PIPELINE_REGISTRY.register_pipeline(PIPELINE, **pipeline)
    if push is not None and not hasattr(PeftModel.push_to_hub, "__wrapped__"):
        PeftModel.push_to_hub = _pushing(PeftModel.push_to_hub, push)


def _pushing(original: Any, push: Any) -> Any:
    @functools.wraps(original)
    def push_to_hub(self: PeftModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type == NAME:
            return push(self, repo_id, *args, **kwargs)
        return original(self, repo_id, *args, **kwargs)

    return push_to_hub
