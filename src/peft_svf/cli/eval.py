# SPDX-License-Identifier: Apache-2.0
"""`eval`: the base, experts, a mixture or two-pass answering on a task -> accuracies and a result file."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .console import command, interval, mixed, new_path, show_table
from .dispatch import Choice
from .sources import find_task, load_experts, load_model, read_mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation import Summary
    from ..experts.expert import Mixture
    from ..rows import Reader, Row
    from ..two_pass import Transformer2Model

WAYS = ("base", "mixture", "two_pass")  # keys of a result next to the names of experts


def evaluate(
    context: typer.Context,
    task: options.Task,
    experts: options.Experts = [],  # noqa: B006
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    mixture: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE or NAME=WEIGHT...", help="A saved mixture, or weights by name of expert."),
    ] = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Rows of the task.")] = "test",
    form: Annotated[
        Literal["choice", "generate"] | None,
        typer.Option(help="Pick a choice, or write. Default: what fits the task."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows at most. Default: all.")] = None,
    batch_size: options.BatchSize = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of written answers.")] = 256,
    records: Annotated[bool, typer.Option("--records", help="Keep one entry per row in the result.")] = False,
    out: Annotated[Path | None, typer.Option(help="Result JSON. Default: eval-TASK-TIME.json here.")] = None,
    strategy: options.Strategy = None,
    classifier: options.Classifier = None,
    probe: options.ProbeFolder = None,
    calibration: options.CalibrationFolder = None,
    fit: options.Fit = None,
    threshold: options.Threshold = 0.0,
    fallback: options.Fallback = "base",
    soft: options.Soft = False,
    read: options.Read = None,
    temperature: options.Temperature = None,
) -> None:
    """
    Measure the base, experts, a mixture or two-pass answering on a task.

    Without experts the base alone; with experts each of them and the base; with --mixture that mixture of them and the
    base. A first pass (--strategy, --classifier or --probe) adds the answers of the experts it chooses row by row.
    Prints accuracies with 95 % intervals and writes a result JSON.
    """
    from .. import evaluation, files
    from ..rows import has_image

    choice = Choice(strategy, classifier, probe, calibration, fit, threshold, fallback, soft, read, temperature)
    if not experts and (model is None or mixture or choice.options):
        option = next(iter([*(["--mixture"] if mixture else []), *choice.options]), None)
        raise typer.BadParameter(
            f"{option} needs the experts to choose from: --experts ..."
            if option
            else "There is nothing to measure: name --experts, or a base model by --model."
        )
    if choice.checked().strategy is None and choice.options:
        raise typer.BadParameter(f"{choice.options[0]} belongs to a first pass: name one by --strategy.")
    alpha = read_mixture(mixture) if mixture else None
    benchmark = find_task(task)
    chosen_form = form or benchmark.forms[0]
    out = new_path(out or Path(f"eval-{benchmark.name}-{datetime.now():%Y%m%d-%H%M%S}.json"))
    rows = benchmark.rows(split, chosen_form, limit=limit)
    if not rows:
        raise ValueError(f"Task {benchmark.name!r} has no {split} rows in the {chosen_form} form.")
    generation = {"max_new_tokens": max_new_tokens} if chosen_form == "generate" else {}

    def measure(model: "PreTrainedModel", reader: "Reader", rows: "Sequence[Row]") -> "Summary":
        return evaluation.evaluate(model, reader, rows, batch_size, benchmark, **generation)

    images = any(map(has_image, rows))
    facts = None
    if experts:
        two_pass = load_experts(experts, model, revision, dtype, classifier, images=images)
        base_model = two_pass.name_or_path
        summaries, facts = _measure(two_pass, rows, alpha, choice.checked(), batch_size, measure)
    else:
        base, reader = load_model(str(model), revision, dtype, images=images)
        base_model, summaries = model, {"base": measure(base, reader, rows)}
    gains = {
        way: evaluation.paired_difference(summary, summaries["base"])
        for way, summary in summaries.items()
        if way != "base"
    }
    print(f"{benchmark.name}, {split} split, {chosen_form} form, n = {len(rows)}; 95 % intervals, gains paired")
    _show(summaries, gains)
    if alpha is not None:
        print(f"mixture: {mixed(alpha.alpha)}")
    if facts is not None:
        chosen = ", ".join(f"{name} {count}" for name, count in facts["chosen"].items())
        print(f"chosen by the first pass ({facts['strategy']}): {chosen}; mean confidence {facts['confidence']:.2f}")
    result = {
        "command": command(context.obj),
        "versions": files.versions(),
        "base_model": base_model,
        "experts": experts,
        "mixture": None if alpha is None else alpha.alpha,
        "first_pass": facts,
        "task": benchmark.name,
        "form": chosen_form,
        "split": split,
        "summaries": {way: summary.to_json(records) for way, summary in summaries.items()},
        "gains": {way: {"gain": gain, "interval": ends} for way, (gain, ends) in gains.items()},
    }
    files.write(out, json.dumps(result, indent=1))
    print(f"Wrote {out}")


def _measure(
    model: "Transformer2Model",
    rows: "Sequence[Row]",
    mixture: "Mixture | None",
    choice: Choice,
    batch_size: int,
    measure: "Callable[[PreTrainedModel, Reader, Sequence[Row]], Summary]",
) -> "tuple[dict[str, Summary], dict[str, Any] | None]":
    """Measure the base, the mixture or each expert, and with a strategy two passes; return the first pass's facts."""
    from ..experts.expert import Mixture
    from ..two_pass import answer_each

    if taken := [name for name in model.library.names if name in WAYS]:
        raise ValueError(f"An expert can't be called {taken[0]!r}, a row of the result: give a name by NAME=EXPERT.")
    reader = model.processor or model.tokenizer
    ways: dict[str, Any] = {"base": Mixture()}
    if mixture is None:
        ways |= {name: {name: 1.0} for name in model.library.names}
    else:
        ways["mixture"] = mixture
        with model.using(mixture):
            pass  # refuses an unknown expert before the base is measured
    facts: dict[str, Any] | None = None
    mixtures: list[Mixture] = []
    if choice.strategy is not None:
        first_pass = choice.first_pass(model, batch_size)
        start = time.perf_counter()
        mixtures = model.first_pass([row["prompt"] for row in rows], first_pass=first_pass, batch_size=batch_size)
        facts = {
            **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(choice).items()},
            "temperature": first_pass.temperature,
            "chosen": dict(Counter(mixture.choice for mixture in mixtures).most_common()),
            "confidence": sum(mixture.confidence for mixture in mixtures) / len(mixtures),
            "seconds": time.perf_counter() - start,
        }
    summaries = {}
    for way, chosen in ways.items():
        with model.using(chosen) as adapted:
            summaries[way] = measure(adapted, reader, rows)
    if mixtures:
        summaries["two_pass"] = answer_each(model, rows, mixtures, lambda m, some: measure(m, reader, some))
    return summaries, facts


def _show(summaries: "Mapping[str, Summary]", gains: "Mapping[str, tuple[float, tuple[float, float]]]") -> None:
    lines = []
    for way, summary in summaries.items():
        gain = [f"{gains[way][0]:+.3f}", interval(gains[way][1], "+")] if way in gains else ["", ""]
        name = "two passes" if way == "two_pass" else way
        lines.append([name, f"{summary.accuracy:.3f}", interval(summary.interval), *gain])
    show_table(["", "accuracy", "interval", "gain", "interval"], lines)
