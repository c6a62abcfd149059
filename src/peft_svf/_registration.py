# SPDX-License-Identifier: Apache-2.0
"""
The one file that touches the registries of PEFT and transformers.

`import peft_svf` calls `register`. The enum `peft.PeftType` gets the member SVF (PEFT has no entry point for it, read
in peft 0.21.2), the libraries' functions register the tuner and the pipeline, and `PeftModel.push_to_hub` hands SVF
adapters to `experts.hub`, because PEFT's upload loses the model card.
"""

import functools
import os
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.version import Version
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

NAME = "SVF"
PIPELINE = "transformer2"
NEEDED = ("torch", "transformers", "peft", "huggingface_hub")  # an old release of these fails at import, and unclearly


def check_versions() -> None:
    """Raise an `ImportError` that names each library that is too old, with the line that updates it."""
    try:
        lines = requires("peft-svf") or []
    except PackageNotFoundError:  # a source tree that isn't installed
        return
    old = []
    for line in lines:  # by hand: `packaging.requirements` takes longer to import than this package
        name, least = re.match(r"[\w.-]+", line), re.search(r">=\s*([\w.]+)", line)
        if name and least and name[0] in NEEDED and ";" not in line:
            installed = version(name[0])
            if Version(installed) < Version(least[1]):
                old.append((name[0], installed, least[1]))
    if old:
        listed = ", ".join(f"{name} {installed} (needs >= {least})" for name, installed, least in old)
        update = " ".join(f"'{name}>={least}'" for name, _, least in old)
        raise ImportError(f"peft_svf doesn't work with {listed}. Update: pip install -U {update}")


def add_peft_type() -> None:
    """
    Add the member SVF to `peft.PeftType`, as if PEFT's source defined it; calling it again changes nothing.

    Raises:
        `ImportError`: if another package has taken the name, or this Python's enum doesn't accept a new member.
    """
    if NAME in PeftType.__members__:
        owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
        if owner is not None and not owner.__module__.startswith("peft_svf"):
            raise ImportError(
                f"The PEFT type {NAME} is taken by {owner.__module__}.{owner.__qualname__}: import only one."
            )
        return
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_, member.__objclass__ = NAME, NAME, PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    if not (PeftType(NAME) is PeftType[NAME] is getattr(PeftType, NAME) is member and member in list(PeftType)):
        raise ImportError("This Python's enum doesn't accept a new member; please report it with your Python version.")


def register() -> None:
    """Register tuner, pipeline and upload; calling it again changes nothing."""
    check_versions()  # before the imports below, so that an old library is named instead of failing somewhere inside
    add_peft_type()
    from .tuner.config import SVFConfig
    from .tuner.model import SVFModel

    if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=SVFConfig, model_cls=SVFModel, prefix="svf_")
    taken = PIPELINE_REGISTRY.supported_tasks.get(PIPELINE)
    if taken is None:
        # They are tried in this order: bundles, models that read images too, models of text.
        autos = (_Bundle, AutoModelForImageTextToText, AutoModelForCausalLM)
        default = {"model": (_NamedByExperts(), None)}
        PIPELINE_REGISTRY.register_pipeline(PIPELINE, _TwoPasses, autos, default, "multimodal")
    elif taken["impl"] is not _TwoPasses:
        raise ImportError(f"The pipeline task {PIPELINE!r} is taken by {taken['impl']}: import only one.")
    if not hasattr(PeftModel.push_to_hub, "__wrapped__"):
        PeftModel.push_to_hub = _pushing(PeftModel.push_to_hub)


class _NamedByExperts(os.PathLike):
    """The base model of `pipeline("transformer2", experts=[...])`; not a string, so its name is looked up nowhere."""

    def __fspath__(self) -> str:
        return os.curdir  # transformers checks only that it exists, before it would look on the Hub

    def __repr__(self) -> str:
        return "the base model that the experts name"


class _Bundle:
    """Stands in for a model among transformers' classes: keeps the place of a bundle until `_TwoPasses` is made."""

    def __init__(self, folder: os.PathLike[str], settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> "_Bundle":
        """Find a bundle; its revision and code aren't those that transformers has looked up for the base."""
        from .experts.bundle import find_bundle

        if (folder := find_bundle(name, token=kwargs.get("token"))) is None:
            raise OSError(f"{name} is no bundle of experts.")
        foreign = ("revision", "code_revision", "_from_pipeline")
        return cls(folder, {key: value for key, value in kwargs.items() if key not in foreign})


class _TwoPasses(Pipeline):
    """Stands in for the two pipelines until transformers makes one: their module is imported then."""

    # The others stay None: unknown until the experts have named the model, and not every model has a processor.
    _load_image_processor = _load_feature_extractor = False

    def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        from .pipeline import make_pipeline

        if isinstance(model, _Bundle):
            from .two_pass import Transformer2Model

            model = Transformer2Model.from_pretrained(os.fspath(model.folder), **model.settings)
        return make_pipeline(None if isinstance(model, _NamedByExperts) else model, *args, **kwargs)


def _pushing(original: Any) -> Any:
    @functools.wraps(original)
    def push_to_hub(self: PeftModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type != NAME:
            return original(self, repo_id, *args, **kwargs)
        from .experts.hub import push_expert

        kwargs.pop("max_shard_size", None)  # an expert is one file
        return push_expert(self, repo_id, *args, **{k: value for k, value in kwargs.items() if value is not None})

    return push_to_hub
