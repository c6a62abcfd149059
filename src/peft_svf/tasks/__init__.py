# SPDX-License-Identifier: Apache-2.0
"""
Benchmarks by name: `get_task("arc_easy").rows("train")`.

One benchmark a file, each opening with an example prompt, an answer and its reward; `task` holds what they share.
"""

from __future__ import annotations

from .arc import ArcChallenge, ArcEasy
from .dispatch import Dispatch, dispatch_prompt
from .gsm8k import Gsm8k
from .mbpp import Mbpp
from .svamp import Svamp
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (ArcEasy(), ArcChallenge(), Gsm8k(), Svamp(), Mbpp(), Dispatch())
}


def get_task(name: str) -> Task:
    """
    Find a benchmark by its name.

    Raises:
        `ValueError`: if no task has that name; the message lists those that exist.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ValueError(f"There is no task '{name}'; there are {', '.join(sorted(TASKS))}.") from None


__all__ = ["TASKS", "Task", "dispatch_prompt", "get_task"]
