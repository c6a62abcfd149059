# SPDX-License-Identifier: Apache-2.0
"""
Adapting to tasks that no expert was trained on: SVAMP, ARC-Challenge, MATH-500, HumanEval, all in choice form.

    python benchmarks/adaptation/few_shot.py --minutes 60    # what has no result yet, the most telling cells first

A cell is a task with the base, an expert, the uniform mixture, a first pass (each question by the expert that was
chosen for it), or a search on 3, 5 or 10 examples in one of three draws. Searches check their result by leaving one
example out at a time, as the library does by itself; "unchecked" doesn't; "per layer" has a weight for each expert and
block. All end after their iterations, or before a number of tokens read that keeps a cell at about three minutes of
one core. Examples are of the validation split; of HumanEval, which has none, of questions that are not tested.
Generated scores of this model are about 0, so nothing is generated.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from dataclasses import asdict

from common import EXPERTS, Cell, arguments, found, load, parse, questions, run_cells, score, scored

from peft_svf import Mixture
from peft_svf.adaptation import Search

TASKS = {"svamp": 150, "arc_challenge": 150, "math": 150, "humaneval": 134}  # test rows; HumanEval has 164 in all
ALONE = {"base": {}, **{name: {name: 1.0} for name in EXPERTS}}
STATIC = {**ALONE, "uniform": {name: 1 / len(EXPERTS) for name in EXPERTS}}
FIRST_PASSES = ("prompt", "classifier")
SEARCH = {"population": 8, "iterations": 6, "elites": 0.25, "max_tokens": 50_000}
BACKWARD = {"max_tokens": 35_000}  # a token costs two to three times as much with its gradient
METHODS = {
    "cem": {"method": "cem"},
    "cma": {"method": "cma"},
    "gradient": {"method": "gradient", **BACKWARD},
    "cem_unchecked": {"method": "cem", "holdout": []},  # the search sees all examples, its result is taken as it is
    "per_layer": {"method": "gradient", "per_layer": True, "name": "per layer", **BACKWARD},
}
SHOTS, DRAWS = (3, 5, 10), 3
# 30 weights an expert need the most examples
SEARCHES = [(m, shots) for m in ("cem", "cma", "gradient") for shots in SHOTS] + [("cem_unchecked", 5)]
PER_LAYER = ("svamp", "arc_challenge")


def name_of(task: str, way: str) -> str:
    return f"few_shot-{task}-{way}"


def search_name(method: str, shots: int, draw: int) -> str:
    return f"{method}-{shots}-{draw}"


def test_rows(task: str, args: argparse.Namespace) -> list[dict]:
    return questions(task, TASKS[task], args, start=0 if task != "humaneval" else max(SHOTS) * DRAWS)


def examples(task: str, shots: int, draw: int, args: argparse.Namespace) -> list[dict]:
    """The first `shots` of the ten questions of a draw: larger draws contain smaller ones."""
    split = "test" if task == "humaneval" else "validation"
    every = argparse.Namespace(seed=args.seed, rows=None)
    return questions(task, max(SHOTS) * DRAWS, every, split)[draw * max(SHOTS) :][:shots]


def static(task: str, way: str, args: argparse.Namespace) -> dict:
    return {"task": task, "alpha": STATIC[way], **score(load(), test_rows(task, args), STATIC[way])}


def first_pass(task: str, strategy: str, args: argparse.Namespace) -> dict:
    """Each question as the expert that the first pass chose has answered it in its own cell."""
    rows, model = test_rows(task, args), load()
    begin = time.process_time()
    chosen = [m.choice for m in model.first_pass([row["prompt"] for row in rows], first_pass=strategy)]
    seconds = time.process_time() - begin
    chosen = ["base" if choice == "other" else choice for choice in chosen]
    answers = {way: dict(found(args.out, name_of(task, way))["records"]) for way in set(chosen)}
    records = [(row["id"], answers[way][row["id"]]) for row, way in zip(rows, chosen, strict=True)]
    counts = {way: chosen.count(way) for way in ALONE}
    return {"task": task, "chosen": counts, "adapting_cpu_seconds": round(seconds, 1), **scored(records)}


def search(task: str, method: str, shots: int, draw: int, args: argparse.Namespace) -> dict:
    """Search, then test what came out; the base and single experts have been tested in cells of their own."""
    model, begin = load(), (time.perf_counter(), time.process_time())
    settings = {**SEARCH, **METHODS[method], "seed": args.seed + draw}
    own = {key: settings[key] for key in ("holdout", "name") if key in settings}
    values = {key: value for key, value in settings.items() if key not in own}
    mixture: Mixture = model.adapt(examples(task, shots, draw, args), search=Search(**values), **own)
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    try:
        known = next((way for way, alpha in ALONE.items() if alpha == mixture.alpha), None)
        tested = found(args.out, name_of(task, known)) if known else None
        tested = tested or score(model, test_rows(task, args), mixture.alpha)
    finally:
        if made := settings.get("name"):  # an expert of the library, which later cells share
            model.library.remove(made)
    return {
        "task": task,
        "settings": settings | {"examples": shots, "draw": draw},
        "alpha": mixture.alpha,
        "mixture": asdict(mixture),
        "adapting_seconds": round(wall, 1),
        "adapting_cpu_seconds": round(cpu, 1),
        "tokens_read": mixture.provenance["tokens"],
        "tokens_generated": 0,
        **{key: tested[key] for key in ("n", "accuracy", "records")},
    }


def static_cells(args: argparse.Namespace) -> list[Cell]:
    """Base, experts, uniform mixture and first passes on each task."""
    made = []
    for task in TASKS:
        made += [Cell(name_of(task, way), functools.partial(static, task, way, args)) for way in STATIC]
        made += [Cell(name_of(task, w), functools.partial(first_pass, task, w, args)) for w in FIRST_PASSES]
    return made


def search_cells(args: argparse.Namespace, draws: Sequence[int] = range(DRAWS)) -> list[Cell]:
    """The searches of some draws: first each with 5 examples, which the table can be read by, then with 3 and 10."""

    def cell(task: str, method: str, shots: int, draw: int) -> Cell:
        name = name_of(task, search_name(method, shots, draw))
        return Cell(name, functools.partial(search, task, method, shots, draw, args))

    made = []
    for draw in draws:
        for shots in sorted(SHOTS, key=lambda shots: (shots != 5, shots)):
            methods = [method for method, count in SEARCHES if count == shots]
            made += [cell(task, method, shots, draw) for task in TASKS for method in methods]
        made += [cell(task, "per_layer", max(SHOTS), draw) for task in PER_LAYER]
    return made


def cells(args: argparse.Namespace) -> list[Cell]:
    """All cells, the most telling first: few minutes fill the table from the top."""
    return [*static_cells(args), *search_cells(args)]


if __name__ == "__main__":
    args = parse(arguments(__doc__))
    run_cells(cells(args), args)
