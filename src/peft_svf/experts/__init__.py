# SPDX-License-Identifier: Apache-2.0
"""z-vectors as values, over one base model, and on the Hub."""

from .expert import Expert, Mixture
from .hub import push_expert
from .key import RoutingKey, make_key
from .library import ExpertLibrary
from .transfer import transfer_expert

__all__ = ["Expert", "ExpertLibrary", "Mixture", "RoutingKey", "make_key", "push_expert", "transfer_expert"]
