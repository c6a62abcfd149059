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
from .dispatch import Choice, with_first_pass
from .options import option
from .sources import find_task, load_experts, load_model, read_mixture, rows_of

if TYPE_CHECKING:
    from ..evaluation import Summary
    from ..experts.expert import Mixture
    from ..rows import Row
    from ..two_pass import Transformer2Model


@with_first_pass
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
    rotations: Annotated[int, option("Orders of the options to ask in, in the form letter.", min=1)] = 1,
    limit: Annotated[int | None, option("Rows at most. Default: all.", min=1)] = None,
    batch_size: options.BatchSize = 16,
    everyday: Annotated[
        int, option("Measure, on so many everyday requests, how much of the base's text experts lose.", min=0)
    ] = 0,
    max_new_tokens: Annotated[int | None, option("Length of written answers. Default: the form's.", min=1)] = None,
    records: Annotated[bool, option("Keep one entry per row in the result.", "--records")] = False,
    out: Annotated[Path | None, option("Result JSON. Default: eval-TASK-TIME.json here.")] = None,
    *,
    choice: Choice,
) -> None:
    """
    Measure the base, experts, a mixture or two-pass answering on a task.

    Without experts the base alone; with experts each of them and the base; with --mixture that mixture of them and the
    base. An option of the first pass adds the answers of the experts it chooses row by row.
    Prints accuracies with 95 % intervals and writes a result JSON.
    """
    from ..evaluation import evaluate as score
    from ..rows import has_image

    if not experts and (model is None or mixture or choice != Choice()):
        raise typer.BadParameter("Name --experts; only a base model alone, by --model, is measured without.")
    choice = choice.resolved()
    alpha = read_mixture(mixture) if mixture else None
    benchmark = find_task(task)
    chosen = form or benchmark.forms[0]
    out = new_path(out or Path(f"eval-{benchmark.name}-{datetime.now():%Y%m%d-%H%M%S}.json"))
    rows = rows_of(benchmark, split, chosen, limit, system=system, shots=shots)
    generation = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}

    def measure(model: Any, reader: Any, some: "Sequence[Row]" = rows) -> "Summary":
        return score(model, reader, some, batch_size, benchmark, rotations, **generation)

    images = any(map(has_image, rows))
    if experts:
        two_pass = load_experts(experts, model, revision, dtype, choice.classifier, images=images)
        name, (summaries, facts) = two_pass.name_or_path, _measure(two_pass, rows, measure, alpha, choice, batch_size)
        losses = _text_losses(two_pass, alpha, everyday) if everyday else {}
    else:
        base, reader = load_model(str(model), revision, dtype, images=images)
        name, summaries, facts, losses = str(model), {"base": measure(base, reader)}, None, {}
    print(f"{benchmark.name}, {split} split, {chosen} form, n = {len(rows)}; 95 % intervals, gains paired")
    result = {"command": command(context.obj), "base_model": name, "experts": experts, "form": chosen, "split": split}
    result |= {"mixture": alpha and alpha.alpha, "first_pass": facts, "task": benchmark.name, "text_loss": losses}
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
        name = "two passes" if way == "two_pass" else way
        lost = f"{losses[way]:.1%}" if way in losses else ""
        lines.append([name, f"{summary.accuracy:.3f}", interval(summary.interval), *gain])
        lines[-1] += [*[balanced] * classes, *[lost] * bool(losses)]
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
    mixture: "Mixture | None",
    choice: Choice,
    batch_size: int,
) -> "tuple[dict[str, Summary], dict[str, Any] | None]":
    """Measure the base, the mixture or each expert, and with a strategy two passes, with its facts."""
    from ..two_pass import answer_each

    if taken := {*model.library.names} & {"base", "mixture", "two_pass"}:
        raise ValueError(f"An expert can't be called {min(taken)!r}, a row of the result: rename by NAME=EXPERT.")
    ways = _ways(model, mixture)
    reader, facts, summaries = model.processor or model.tokenizer, None, {}
    mixtures: list[Mixture] = []
    if choice.strategy:
        mixtures, facts = _first_pass(model, rows, choice, batch_size)
    for way, weights in {**ways, "base": {}}.items():  # the base last, so that an unknown expert fails at once
        with model.using(weights) as adapted:
            summaries[way] = measure(adapted, reader)
    if mixtures:
        summaries["two_pass"] = answer_each(model, rows, mixtures, lambda m, some: measure(m, reader, some))
    return {"base": summaries["base"], **summaries}, facts


def _ways(model: "Transformer2Model", mixture: "Mixture | None") -> dict[str, Any]:
    return {"mixture": mixture} if mixture else {name: {name: 1.0} for name in model.library.names}


def _text_losses(model: "Transformer2Model", mixture: "Mixture | None", count: int) -> dict[str, float]:
    """Measure by how much the base's own answers to everyday requests are less likely under each expert."""
    from ..evaluation import BaseText
    from ..tasks import everyday_requests

    with model.using({}) as base:
        text = BaseText.of(base, model.tokenizer, everyday_requests("test", count))
    losses = {}
    for way, weights in _ways(model, mixture).items():
        with model.using(weights) as adapted:
            losses[way] = text.loss(adapted, model.tokenizer)
    return losses


def _first_pass(
    model: "Transformer2Model", rows: "Sequence[Row]", choice: Choice, batch_size: int
) -> "tuple[list[Mixture], dict[str, Any]]":
    """Choose a mixture for each row; return them with what the result file keeps."""
    first_pass, start = choice.first_pass(model, batch_size), time.perf_counter()
    mixtures = model.first_pass([row["prompt"] for row in rows], first_pass=first_pass, batch_size=batch_size)
    facts = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(choice).items()}
    facts |= {"strategy": first_pass.strategy, "temperature": first_pass.temperature}
    facts["chosen"] = dict(Counter(mixture.choice for mixture in mixtures).most_common())
    facts["confidence"] = sum(mixture.confidence for mixture in mixtures) / len(mixtures)
    facts["seconds"] = time.perf_counter() - start
    return mixtures, facts
