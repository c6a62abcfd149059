# SPDX-License-Identifier: Apache-2.0
"""z-vectors as values, over one base model, and on the Hub."""

from .convert import import_reference, nearest_expert, transfer_expert
from .expert import Expert, Mixture
from .export import export_gguf, export_lora, export_merged, merge_expert
from .hub import push_expert
from .key import RoutingKey, make_key
from .library import ExpertLibrary

__all__ = [
    "Expert",
    "ExpertLibrary",
    "Mixture",
    "RoutingKey",
    "export_gguf",
    "export_lora",
    "export_merged",
    "import_reference",
    "make_key",
    "merge_expert",
    "nearest_expert",
    "push_expert",
    "transfer_expert",
]
