# SPDX-License-Identifier: Apache-2.0
"""
Benchmarks by name: `get_task("arc_easy").rows("train")`; your own from a JSONL: `jsonl_task("mine.jsonl")`.

Each kind of benchmark has a file, which opens with an example prompt, an answer and its reward; `task` is the base of
all. Another package adds tasks by an entry point of the group `peft_svf.tasks`, whose name is the task's and whose
object is a [`Task`] or a subclass of it.
"""

from importlib.metadata import entry_points

from .arc import CHALLENGE, EASY
from .competition_math import Math
from .dispatch import Dispatch, dispatch_prompt, everyday_requests
from .own import jsonl_task
from .programs import HumanEval, Mbpp, MbppPro
from .task import Task, format_reward
from .vqa import OkVqa, TextVqa
from .word_problems import Gsm8k, Svamp

GROUP = "peft_svf.tasks"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(EASY, CHALLENGE, Gsm8k(), Svamp(), Math()),
        *(Mbpp(), MbppPro(), HumanEval(), TextVqa(), OkVqa(), Dispatch()),
    )
}


def get_task(name: str) -> Task:
    """Find a benchmark by its name: the package's own, a registered one, or one of an entry point."""
    if name not in TASKS:
        points = list(entry_points(group=GROUP, name=name))
        if not points:
            raise ValueError(f"There is no task '{name}'; there are {', '.join(task_names())}.")
        task = points[0].load()
        TASKS[name] = register_task(task() if isinstance(task, type) else task)
    return TASKS[name]


def register_task(task: Task) -> Task:
    """
    Make a task known by its name to [`get_task`], and so to evaluation, adaptation and the command line.

    Raises:
        `ValueError`: if another task has that name.
    """
    taken = TASKS.setdefault(task.name, task)
    if taken is not task:
        raise ValueError(f"The name '{task.name}' is taken by {taken!r}. Give the task another `name`.")
    return task


def task_names() -> list[str]:
    """List the names that [`get_task`] finds, without loading the tasks of entry points."""
    return sorted({*TASKS, *(point.name for point in entry_points(group=GROUP))})


__all__ = [
    "TASKS",
    "Task",
    "dispatch_prompt",
    "everyday_requests",
    "format_reward",
    "get_task",
    "jsonl_task",
    "register_task",
    "task_names",
]
