# SPDX-License-Identifier: Apache-2.0
"""
The one file that touches the registries of PEFT and transformers.

`import peft_svf` calls `add_peft_type` and `register`. What happens to other libraries happens here, visibly:
the enum `peft.PeftType` gets the member SVF (no entry point exists, read in peft 0.21.2), the tuner and the pipeline
are registered by the libraries' own functions, and `PeftModel.push_to_hub` hands SVF adapters to `experts.hub`
because PEFT's own loses the model card.
"""

import functools
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers.pipelines import PIPELINE_REGISTRY

NAME = "SVF"
PIPELINE = "transformer2"
OLDEST = {"torch": "2.6", "transformers": "5.20", "peft": "0.21.2", "huggingface_hub": "1.31"}


def check_versions() -> None:
    """Raise an `ImportError` that names each library that is too old, with the line that updates it."""
    old = {name: least for name, least in OLDEST.items() if Version(version(name)) < Version(least)}
    if old:
        found = ", ".join(f"{name} {version(name)} (needs >= {least})" for name, least in old.items())
        wanted = " ".join(f"'{name}>={least}'" for name, least in old.items())
        raise ImportError(f"peft_svf cannot work with {found}. Update: pip install -U {wanted}")


def add_peft_type() -> PeftType:
    """
    Give `peft.PeftType` the member SVF, as if it stood in PEFT's source. Calling it again changes nothing.

    Raises:
        `ImportError`: if another package has taken the name, or the enum of this Python does not take a member.
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
        raise ImportError("This Python's enum does not take a new member; please report it with your Python version.")
    return member


def register(*, config: type, model: type, pipeline: dict[str, Any] | None = None, push: Any = None) -> None:
    """
    Make the tuner known to PEFT, the pipeline to transformers, and the upload to `PeftModel.push_to_hub`.

    Args:
        config (`type`):
            `SVFConfig`.
        model (`type`):
            `SVFModel`.
        pipeline (`dict`, *optional*):
            Arguments of `PIPELINE_REGISTRY.register_pipeline` besides the task name.
        push (`Callable`, *optional*):
            `(peft_model, repo_id, **kwargs) -> CommitInfo`, called instead of PEFT's upload for SVF adapters only.
    """
    if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model, prefix="svf_")
    if pipeline is not None:
        taken = PIPELINE_REGISTRY.supported_tasks.get(PIPELINE)
        owner = (
            None if taken is None else getattr(taken["impl"], "__module__", "transformers")
        )  # its own are lazy names
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
