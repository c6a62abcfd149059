# SPDX-License-Identifier: Apache-2.0
"""
Offsets for the rows of a batch -> what each activation of each layer is rescaled by, while a context is open.

Rows and tokens are counted where a batch enters the model. Layers are `SVFLayer`s, which read what is active here.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .plans import Plan
from .targets import of_one_expert

TEXTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")  # have a row each


@dataclass(frozen=True, eq=False)
class Rows:
    """
    Offsets `(n, k)` that replace the adapters' in one layer; an empty tensor is the base model.

    With an index, offset `index[i]` belongs to row i of the batch, or to token i of a packed one; in generation each
    row may be repeated side by side, as beams are. Without, the offsets share the batch out in equal parts.
    """

    name: str  # messages name the layer
    offsets: Tensor
    index: Tensor | None = None  # (B,) or (B * T,); None if it is 0, 1, 2, ...
    indexed: bool = False  # each row, or token, has an offset of its own
    merge_at: int = 0  # the forward with this offset from which a merged copy serves it; 0 is never

    def __eq__(self, other: object) -> bool:
        """Whether the same tensors are set again, as in each step of a server's batch."""
        if not isinstance(other, Rows) or self.indexed != other.indexed:
            return False
        return self.offsets is other.offsets and self.index is other.index

    @property
    def mixed(self) -> bool:
        """Whether rows differ: each has one of several offsets."""
        return len(self.offsets) > 1

    @cached_property
    def any_base(self) -> bool:
        """Whether some of several offsets are the base model. It waits for the device, so once for these rows."""
        return self.mixed and bool((self.offsets == 0).all(-1).any())

    def of(self, lead: torch.Size, execution: "Execution") -> Tensor:
        """
        Spread the offsets over activations of shape `(*lead, n)`: broadcastable to `(*lead, k)`.

        Rows and tokens are counted where the batch enters the model, never inferred inside it.
        """
        offsets = self.offsets if self.index is None else self.offsets[self.index]  # (known, k)
        known = len(offsets)
        rows, tokens = execution.batch or (known, None)
        packed = self.indexed and known != rows and known == rows * (tokens or 0)
        if not packed and known != rows:
            if rows % known or (self.indexed and execution.called != known):
                raise ValueError(f"There are offsets for {known} rows, but the batch has {rows}.")
            offsets = offsets.repeat_interleave(rows // known, dim=0)  # (rows, k)
        in_order = execution.batch_first or rows == 1
        split = len(lead) > 1 and lead[0] == rows and (lead[1] != rows or in_order)
        if split and (not packed or lead[1:] == (tokens,)):
            return offsets.view(rows, *(lead[1:] if packed else [1] * (len(lead) - 1)), -1)
        if len(lead) == 1 and not of_one_expert(self.name):
            if lead[0] == rows and not packed:  # pooled, or one token for each row
                return offsets
            if tokens is not None and lead[0] == rows * tokens and in_order:
                return offsets if packed else offsets.repeat_interleave(tokens, dim=0)
        raise ValueError(
            f"The layer {self.name!r} has activations of shape {(*lead, '...')} in a batch of {rows} rows"
            + (f" and {tokens} tokens" if tokens else "")
            + ": which row each of them belongs to isn't known, so the rows can't have z-vectors of their own here. "
            "Give the batch one mixture, run its rows one by one, or leave the layer out of the targets."
        )


@dataclass(eq=False)
class Execution:
    """How the layers of a model compute: one object that all of them share."""

    plan: Plan = "auto"  # as the user chose it; [`choose`] decides for each forward
    room: bool = True  # there is memory for a second copy of the adapted weights
    forwards: int = 1  # in an optimizer step
    generating: bool = False  # the same z serves many forwards, in training mode too
    trusted: bool = False  # the merged weights are known to be built from the offsets in force
    announced: set[Plan] = field(default_factory=set)  # plans that the log has mentioned
    rows: dict[Any, Rows] = field(default_factory=dict)  # offsets that replace the adapters', by layer
    entries: "tuple[weakref.ref[nn.Module], ...]" = ()  # the modules that a batch enters by
    waiting: bool = False  # some bases come later: a file brings them, or their weights, or these were replaced
    called: int | None = None  # rows of the batch that generation was called with
    batch: tuple[int, int | None] | None = None  # rows and tokens of the batch that runs
    batch_first: bool = False  # the model is known to keep `(rows, tokens, ...)` in this order
    call: int = 0  # number of the model's running call, 0 outside of one
    read: set[Any] = field(default_factory=set)  # layers whose weight was read from outside during the call

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model starts outside of any call."""
        names = ("plan", "room", "forwards", "batch_first", "waiting")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """Read the rows and, if there are any, the tokens of what a model is called with."""
    inputs = [*(kwargs.get(name) for name in TEXTS), *args]
    inputs += [value for name, value in kwargs.items() if "position" not in name]  # these may be one row
    batch = next((value for value in inputs if isinstance(value, Tensor) and value.dim()), None)
    if batch is None:
        return None
    tokens = batch.shape[1] if batch.dim() == (3 if batch.is_floating_point() else 2) else None
    return batch.shape[0], tokens


class ActiveRows:
    """The open context of [`active_rows`]."""

    def __init__(self, layers: Mapping[str, Any], merge: int) -> None:
        self.layers, self.merge = layers, merge
        self.execution = next((layer.execution for layer in layers.values()), Execution())
        self.outer = self.rows = self.execution.rows

    def set(self, offsets: Mapping[str, Tensor], index: Tensor | None = None) -> None:
        """
        Replace the offsets of all layers, also during a forward: layers that run later in it use the new ones.

        Arguments as in [`active_rows`]. Raises `RuntimeError` if this context is closed or another is open inside it.
        """
        rows = dict(self.outer)
        in_order = index is None or torch.equal(index, torch.arange(len(index), device=index.device))
        for name, layer in self.layers.items():
            offset = offsets.get(name)
            if offset is None or not offset.numel():
                offset = torch.zeros(0, 0)
            offset = offset[None] if offset.dim() == 1 else offset
            place = None
            if index is not None and len(offset) > 1 and not (in_order and len(index) == len(offset)):
                place = index.to(offset.device)  # in order it would be a look-up for nothing
            rows[layer] = Rows(name, offset, place, index is not None, self.merge)
        if self.execution.rows is not self.rows:
            raise RuntimeError("Rows can be set only while their context is the innermost open one.")
        self.execution.rows = self.rows = rows


@contextmanager
def active_rows(
    layers: Mapping[str, Any], offsets: Mapping[str, Tensor], index: Tensor | None = None, merge: int = 0
) -> Iterator[ActiveRows]:
    """
    Put offsets in place of the adapters' in all layers at once, while the context is open.

    Args:
        layers (`Mapping[str, SVFLayer]`):
            Layers by module name, as [`svf_layers`] returns them.
        offsets (`Mapping[str, torch.Tensor]` of shapes `(n, k)` or `(k,)`):
            Offsets by module name; a layer without any is the base model. Without an index they share each batch out
            in n equal parts of consecutive rows.
        index (`torch.Tensor` of shape `(B,)` or `(B * T,)`, *optional*):
            The offset of each row of the batch, or of each token, row by row, as in several sequences packed into one
            row. In generation rows may be repeated side by side. One offset alone serves all rows. Offsets of tokens
            need all tokens in every layer: `logits_to_keep` is refused if `lm_head` is adapted.
        merge (`int`):
            Many forwards will follow: if the rows share one offset, a merged copy of the weight pays. It is made in
            the first (1 or `True`) or a later one of them; 0: never.

    Yields:
        [`ActiveRows`], whose `set` replaces the offsets.
    """
    active = ActiveRows(layers, merge)
    execution, batch = active.execution, active.execution.batch

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        execution.batch = batch_of(args, kwargs) or execution.batch

    with ExitStack() as hooks:
        for entry in execution.entries:
            if (module := entry()) is not None:
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            try:
                active.set(offsets, index)
                yield active
            finally:
                execution.rows, execution.batch = active.outer, batch
        finally:
            execution.rows, execution.batch = active.outer, batch  # an interrupt may hit the first one
