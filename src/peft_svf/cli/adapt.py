# SPDX-License-Identifier: Apache-2.0
"""`adapt`: a few solved examples -> the mixture of experts that answers them best."""

from argparse import Namespace
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options

SEARCH, WEIGHTS = "Search", "Weights"  # panels of the help


def adapt(
    experts: options.Experts,
    examples: Annotated[Path, typer.Option(help="JSONL: prompt and answer, or prompt, choices and label.")],
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    task: Annotated[
        str | None, typer.Option(help="Benchmark that scores written answers. Default: likelihoods.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of written answers, with --task. Default: 256.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: mixture.json; with --per-layer a folder, default --name.")
    ] = None,
    plot: options.Plot = None,
    method: Annotated[
        Literal["cem", "cma", "gradient"], typer.Option(rich_help_panel=SEARCH, help="How to search.")
    ] = "cem",
    population: Annotated[int, typer.Option(min=1, rich_help_panel=SEARCH, help="Candidates per iteration.")] = 32,
    iterations: Annotated[int, typer.Option(min=1, rich_help_panel=SEARCH, help="Iterations at most.")] = 50,
    elites: Annotated[
        float,
        typer.Option(min=0, max=1, rich_help_panel=SEARCH, help="Share that shapes the next population."),
    ] = 0.2,
    seed: Annotated[int, typer.Option(rich_help_panel=SEARCH, help="Of the draws.")] = 0,
    batch_size: options.BatchSize = 32,
    holdout: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            rich_help_panel=SEARCH,
            help="Checks the result: leave-one-out, none, or other examples.",
        ),
    ] = "leave-one-out",
    temperature: Annotated[
        float, typer.Option(rich_help_panel=SEARCH, help="Divides the log-likelihoods of choices.")
    ] = 8.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=SEARCH, help="End the search before it reads more.")
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=SEARCH, help="End the search before it takes longer."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(rich_help_panel=SEARCH, help="Scores so far: an interrupted search goes on from this file."),
    ] = None,
    low: Annotated[float, typer.Option(rich_help_panel=WEIGHTS, help="Least weight of an expert.")] = 0.0,
    high: Annotated[float, typer.Option(rich_help_panel=WEIGHTS, help="Largest weight of an expert.")] = 1.0,
    normalize: Annotated[
        bool,
        typer.Option("--normalize", rich_help_panel=WEIGHTS, help="Weights sum to 1; the base has no share."),
    ] = False,
    per_layer: Annotated[
        bool,
        typer.Option("--per-layer", rich_help_panel=WEIGHTS, help="One weight per expert and block: a new expert."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(rich_help_panel=WEIGHTS, help="Of the mixture or expert. Default: its folder's name."),
    ] = None,
) -> None:
    """
    Search the mixture of experts that answers a few solved examples best; save it.

    Use it with `peft-svf eval --mixture` or `pipe(..., mixture=Mixture.load(...))`.
    """
    from . import measure

    args = Namespace(**{k: v for k, v in locals().items() if k != "measure"})
    if holdout == "none":
        args.holdout = "0"
    measure.adapt(args)
