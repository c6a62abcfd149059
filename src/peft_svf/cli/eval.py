# SPDX-License-Identifier: Apache-2.0
"""`eval`: the base, experts, a mixture or two-pass answering on a task -> accuracies and a result file."""

from argparse import Namespace
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options


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
    from . import measure
    from .console import command

    args = Namespace(**{k: v for k, v in locals().items() if k not in ("context", "measure", "command")})
    args.command, args.calibrate, args.probe_method = command(context.obj), None, "logistic"
    args.threshold, args.soft = args.threshold or None, args.soft or None
    args.fallback = None if args.fallback == "base" else args.fallback
    measure.evaluate(args)
