# SPDX-License-Identifier: Apache-2.0
"""
Self-adaptive language models whose skills are tiny z-vectors: Transformer² (arXiv 2501.06252) for Hugging Face.

Importing the package registers the tuner `SVF` with PEFT and the pipeline `transformer2` with transformers, and sends
`push_to_hub` of SVF adapters to `peft_svf.experts.hub`; see `peft_svf._registration`. The command line is the one
exception: `peft-svf` and `python -m peft_svf` import the package without torch, so that help and completion answer at
once, and register when a verb starts to work or a public name is first used.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .experts.expert import Expert, Mixture
    from .experts.hub import push_expert
    from .experts.library import ExpertLibrary
    from .pipeline import Transformer2Pipeline
    from .tuner.config import SVFConfig
    from .tuner.model import SVFModel
    from .two_pass import Transformer2Model

__version__ = "0.1.0"
__all__ = [
    "Expert",
    "ExpertLibrary",
    "Mixture",
    "SVFConfig",
    "SVFModel",
    "Transformer2Model",
    "Transformer2Pipeline",
    "push_expert",
]


def _load() -> None:
    """Import the public names and register; again, it changes nothing."""
    from ._registration import check_versions, register

    check_versions()  # before the imports below, so that an old library is named instead of failing somewhere inside

    from .experts.expert import Expert, Mixture
    from .experts.hub import push_expert, push_to_hub
    from .experts.library import ExpertLibrary
    from .pipeline import REGISTRATION, Transformer2Pipeline
    from .tuner.config import SVFConfig
    from .tuner.model import SVFModel
    from .two_pass import Transformer2Model

    register(config=SVFConfig, model=SVFModel, pipeline=REGISTRATION, push=push_to_hub)
    public = (
        Expert,
        ExpertLibrary,
        Mixture,
        SVFConfig,
        SVFModel,
        Transformer2Model,
        Transformer2Pipeline,
        push_expert,
    )
    globals().update({value.__name__: value for value in public})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def _on_command_line() -> bool:
    """Return whether this process is `peft-svf ...` or `python -m peft_svf ...`, not a child of it."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # runpy is still looking for the module
        return "-m peft_svf" in " ".join(sys.orig_argv)
    return os.path.basename(program) in ("peft-svf", "peft-svf.exe") and program in sys.orig_argv


if not _on_command_line():
    _load()
