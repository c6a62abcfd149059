# SPDX-License-Identifier: Apache-2.0
"""`eval`: the base, experts, a mixture or two-pass answering on a task -> accuracies and a result file."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .console import command, interval, mixed, new_path, show_table
from .dispatch import make_first_pass
from .options import option
from .sources import find_task, load_experts, load_model, read_mixture, rows_of

if TYPE_CHECKING:
    from ..adaptation import FirstPass
    from ..evaluation import Summary
    from ..experts.expert import Mixture
    from ..rows import Row
    from ..two_pass import Transformer2Model


def evaluate(
    context: typer.Context,
    task: options.Task,
    experts: options.Experts = [],  # noqa: B006
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    mixture: options.Mixture = None,
    split: Annotated[Literal["train", "validation", "test"], option("Rows of the task.")] = "test",
    form: options.Form = None,
    system: options.System = None,
    shots: options.Shots = 0,
    rotations: Annotated[int, option("Ask with the options in so many orders; form letter only.", min=1)] = 1,
    limit: Annotated[int | None, option("Rows at most. Default: all.", min=1)] = None,
    batch_size: options.BatchSize = 16,
    everyday: Annotated[
        int, option("Also measure how likely the base's answers to so many everyday requests stay.", min=0)
    ] = 0,
    max_new_tokens: Annotated[int | None, option("Length of written answers. Default: the form's.", min=1)] = None,
    records: Annotated[bool, option("Keep one entry per row in the result.", "--records")] = False,
    out: Annotated[Path | None, option("Result JSON. Default: eval-TASK-TIME.json here.")] = None,
    strategy: options.Strategy = None,
    classifier: options.Classifier = None,
    probe: options.Probe = None,
    fit: options.Fit = None,
    threshold: options.Threshold = 0.0,
) -> None:
    """
    Measure the base, experts, a mixture or two-pass answering on a task.

    With --experts: the base and each expert; with --mixture: the base and that mixture of them. An option of the first
    pass adds two-pass answering, in which it chooses the expert for each row. Prints accuracies with 95 % intervals
    and writes a result JSON.
    """
    from ..evaluation import evaluate as score

    if not experts and (model is None or mixture or strategy or classifier or probe or fit or threshold):
        raise typer.BadParameter("Name --experts; only a base model alone, by --model, is measured without.")
    alpha = read_mixture(mixture) if mixture else None
    benchmark = find_task(task)
    form = form or benchmark.forms[0]  # type: ignore[assignment]
    out = new_path(out or Path(f"eval-{benchmark.name}-{datetime.now():%Y%m%d-%H%M%S}.json"))
    rows = rows_of(benchmark, split, str(form), limit, system=system, shots=shots)
    generation = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    result: dict[str, Any] = {"command": command(context.obj), "task": benchmark.name, "form": form, "split": split}
    result |= {"experts": experts, "mixture": alpha and alpha.alpha, "first_pass": None, "text_loss": {}}

    def measure(model: Any, reader: Any, some: "Sequence[Row]" = rows) -> "Summary":
        return score(model, reader, some, batch_size, benchmark, rotations, **generation)

    if experts:
        two_pass = load_experts(experts, model, revision, dtype, classifier)
        first_pass = make_first_pass(two_pass, strategy, classifier, probe, threshold, fit, batch_size)
        ways = {"mixture": alpha} if alpha else {name: {name: 1.0} for name in two_pass.library.names}
        result["base_model"] = two_pass.name_or_path
        summaries, result["first_pass"] = _measure(two_pass, rows, measure, ways, first_pass, batch_size)
        if everyday:
            result["text_loss"] = _text_losses(two_pass, ways, everyday)
    else:
        result["base_model"] = model
        summaries = {"base": measure(*load_model(str(model), revision, dtype))}
    print(f"{benchmark.name}, {split} split, {form} form, n = {len(rows)}; 95 % intervals, gains paired")
    _report(out, result, summaries, records)


def _report(out: Path, result: dict[str, Any], summaries: "Mapping[str, Summary]", records: bool) -> None:
    """Print accuracies and gains over the base, and write the result."""
    from .. import files
    from ..evaluation import paired_difference

    gains = {way: paired_difference(summary, summaries["base"]) for way, summary in summaries.items() if way != "base"}
    losses, classes = result["text_loss"], summaries["base"].balanced_accuracy is not None
    lines = []
    for way, summary in summaries.items():
        gain = [f"{gains[way][0]:+.3f}", interval(gains[way][1], "+")] if way in gains else ["", ""]
        balanced = "" if summary.balanced_accuracy is None else f"{summary.balanced_accuracy:.3f}"
        lost = f"{losses[way]:.1%}" if way in losses else ""
        line = [way.replace("two_pass", "two passes"), f"{summary.accuracy:.3f}", interval(summary.interval), *gain]
        lines.append([*line, *[balanced] * classes, *[lost] * bool(losses)])
    header = ["", "accuracy", "interval", "gain", "interval", *["balanced"] * classes, *["text lost"] * bool(losses)]
    show_table(header, lines)
    if result["mixture"] is not None:
        print(f"mixture: {mixed(result['mixture'])}")
    if facts := result["first_pass"]:
        chosen = ", ".join(f"{name} {count}" for name, count in facts["chosen"].items())
        print(f"chosen by the first pass ({facts['strategy']}): {chosen}; mean confidence {facts['confidence']:.2f}")
    result["versions"] = files.versions()
    result["summaries"] = {way: summary.to_json(records) for way, summary in summaries.items()}
    result["gains"] = {way: {"gain": gain, "interval": ends} for way, (gain, ends) in gains.items()}
    files.write(out, json.dumps(result, indent=1))
    print(f"Wrote {out}")


def _measure(
    model: "Transformer2Model",
    rows: "Sequence[Row]",
    measure: "Callable[..., Summary]",
    ways: Mapping[str, Any],
    first_pass: "FirstPass | None",
    batch_size: int,
) -> "tuple[dict[str, Summary], dict[str, Any] | None]":
    """Measure the base and each way of mixing; with a first pass two passes too, and return its facts."""
    from ..two_pass import answer_each

    if taken := {*model.library.names} & {"base", "mixture", "two_pass"}:
        raise ValueError(f"An expert can't be called {min(taken)!r}, a row of the result: rename by NAME=EXPERT.")
    reader, facts, summaries = model.processor or model.tokenizer, None, {}
    mixtures: list[Mixture] = []
    if first_pass:
        start, prompts = time.perf_counter(), [row["prompt"] for row in rows]
        mixtures = model.first_pass(prompts, first_pass=first_pass, batch_size=batch_size)
        facts = {"strategy": first_pass.strategy, "threshold": first_pass.threshold}
        facts["chosen"] = dict(Counter(mixture.choice for mixture in mixtures).most_common())
        facts["confidence"] = sum(mixture.confidence for mixture in mixtures) / len(mixtures)
        facts["seconds"] = time.perf_counter() - start
    for way, weights in {**ways, "base": {}}.items():  # the base last, so that an unknown expert fails at once
        with model.using(weights) as adapted:
            summaries[way] = measure(adapted, reader)
    if mixtures:
        summaries["two_pass"] = answer_each(model, rows, mixtures, lambda m, some: measure(m, reader, some))
    return {"base": summaries["base"], **summaries}, facts


def _text_losses(model: "Transformer2Model", ways: Mapping[str, Any], count: int) -> dict[str, float]:
    """Measure by how much the base's answers to everyday requests are less likely under each way of mixing."""
    from ..evaluation import BaseText
    from ..tasks import everyday_requests

    with model.using({}) as base:
        text = BaseText.of(base, model.tokenizer, everyday_requests("test", count))
    losses = {}
    for way, weights in ways.items():
        with model.using(weights) as adapted:
            losses[way] = text.loss(adapted, model.tokenizer)
    return losses
