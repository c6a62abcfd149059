# SPDX-License-Identifier: Apache-2.0
"""
Self-adaptive language models whose skills are tiny z-vectors: Transformer² (arXiv 2501.06252) for Hugging Face.

Importing the package registers the tuner `SVF` with PEFT and the pipeline `transformer2` with transformers, and sends
`push_to_hub` of SVF adapters to `peft_svf.experts.hub`; see `peft_svf._registration`.
"""

from ._registration import check_versions, register

check_versions()  # before the imports below, so that an old library is named instead of failing somewhere inside

from .experts.expert import Expert, Mixture  # noqa: E402
from .experts.hub import push_expert, push_to_hub  # noqa: E402
from .experts.library import ExpertLibrary  # noqa: E402
from .pipeline import REGISTRATION, Transformer2Pipeline  # noqa: E402
from .tuner.config import SVFConfig  # noqa: E402
from .tuner.model import SVFModel  # noqa: E402
from .two_pass import Transformer2Model  # noqa: E402

__version__ = "0.1.0"

register(config=SVFConfig, model=SVFModel, pipeline=REGISTRATION, push=push_to_hub)

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
