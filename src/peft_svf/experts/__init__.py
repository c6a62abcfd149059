# SPDX-License-Identifier: Apache-2.0
"""z-vectors as values, over one base model, and on the Hub."""

from .expert import Expert, Mixture
from .hub import push_expert
from .library import ExpertLibrary
from .transfer import transfer_expert

__all__ = ["Expert", "ExpertLibrary", "Mixture", "push_expert", "transfer_expert"]
