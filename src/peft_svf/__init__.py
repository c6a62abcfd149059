# SPDX-License-Identifier: Apache-2.0
"""
Self-adaptive language models whose skills are tiny z-vectors: Transformer² (arXiv 2501.06252) for Hugging Face.

Importing the package registers the tuner `SVF` with PEFT and the pipeline `transformer2` with transformers; see
`peft_svf._registration`. Public names load on first use. On the command line registration waits for a verb to start,
so that help and completion answer without torch.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .experts.expert import Expert as Expert
    from .experts.expert import Mixture as Mixture
    from .experts.hub import push_expert as push_expert
    from .experts.library import ExpertLibrary as ExpertLibrary
    from .pipeline import Transformer2Pipeline as Transformer2Pipeline
    from .tuner.config import SVFConfig as SVFConfig
    from .tuner.model import SVFModel as SVFModel
    from .two_pass import Transformer2Model as Transformer2Model

__version__ = "0.1.0"
_MODULES = {
    "Expert": "experts.expert",
    "ExpertLibrary": "experts.library",
    "Mixture": "experts.expert",
    "SVFConfig": "tuner.config",
    "SVFModel": "tuner.model",
    "Transformer2Model": "two_pass",
    "Transformer2Pipeline": "pipeline",
    "push_expert": "experts.hub",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("._registration", __name__).register()
    globals()[name] = value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def _on_command_line() -> bool:
    """Return whether this process is `peft-svf ...` or `python -m peft_svf.cli ...`, not a child of it."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # runpy is still looking for the module
        return "-m peft_svf.cli" in " ".join(sys.orig_argv)
    return os.path.basename(program) in ("peft-svf", "peft-svf.exe") and program in sys.orig_argv


if not _on_command_line():
    import_module("._registration", __name__).register()
