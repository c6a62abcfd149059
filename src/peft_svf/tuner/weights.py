# SPDX-License-Identifier: Apache-2.0
"""
Linear module -> the values of its base weight, wherever they are: packed, offloaded, sharded, stored.

This is the one place that reads a base weight. It does not know layers, bases or adapters. Private names of PEFT were
read in 0.21.2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn


def held_weight(base: nn.Module) -> Tensor:
    """The tensor that a linear module keeps its weight in, whatever a quantisation calls it."""
    for name in ("weight", "qweight", "W_q"):
        if isinstance(tensor := getattr(base, name, None), Tensor):
            return tensor
    return next(chain(base.parameters(), base.buffers()))


def undo_cpu_packing(base: nn.Module) -> None:
    """
    Undo what bitsandbytes (0.50) does to a 4-bit weight in its first forward of inference on a CPU with AVX512.

    It packs the weight anew for a kernel through which no gradient flows, and whose layout PEFT cannot read. Saving
    takes that back, but leaves the scales in the order of the kernel, or rounds them once more; they stay in bfloat16.
    """
    state: Any = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()
        base.state_dict()
        state.absmax, state.nested = scales, False


def refuse_zero3(weight: Tensor) -> None:
    """Raise `ValueError` for a weight that DeepSpeed's ZeRO-3 has partitioned: nobody has run SVF on those."""
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "SVF does not run on weights that DeepSpeed ZeRO-3 has partitioned. z-vectors are small: use DDP, ZeRO-1 "
            "or ZeRO-2, or FSDP2 (`torch.distributed.fsdp.fully_shard`) where the base model does not fit."
        )


def offloaded(base: nn.Module) -> bool:
    """Whether accelerate keeps the weight of a module elsewhere and brings it only while the module runs."""
    return getattr(getattr(base, "_hf_hook", None), "offload", False) and held_weight(base).is_meta


@contextmanager
def onloaded(base: nn.Module) -> Iterator[None]:
    """Have the weight of a module that accelerate offloads in memory while the context is open, to read it."""
    if not offloaded(base):
        yield
        return
    hook: Any = base._hf_hook
    hook.pre_forward(base)
    try:
        yield
    finally:
        hook.post_forward(base, None)
