# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, as types of their parameters."""

from pathlib import Path
from typing import Annotated, Literal

import typer

FIRST_PASS = "First pass"  # a panel of the help

Task = Annotated[str, typer.Option(help="Name of a benchmark, or a JSONL file or folder of your own.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    typer.Option(help="Dtype of the base model; auto is the checkpoint's."),
]
Model = Annotated[str | None, typer.Option(help="Base model: folder or Hub repository. Default: the experts' base.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base model.")]
Experts = Annotated[
    list[str],
    typer.Option(metavar="EXPERT...", help="Folders or Hub repositories; NAME=EXPERT gives another name."),
]
Plot = Annotated[Path | None, typer.Option(metavar="PNG", help="Draw it, too. Needs peft-svf\\[demo].")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per forward.")]

Strategy = Annotated[
    Literal["prompt", "classifier", "probe"] | None,
    typer.Option(rich_help_panel=FIRST_PASS, help="Default: what --classifier or --probe is for."),
]
Classifier = Annotated[
    str | None,
    typer.Option(metavar="EXPERT", rich_help_panel=FIRST_PASS, help="Expert trained to name the kind of a prompt."),
]
ProbeFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", rich_help_panel=FIRST_PASS, help="Saved probe; with --fit, its place."),
]
CalibrationFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", rich_help_panel=FIRST_PASS, help="Saved calibration; with --fit, its place."),
]
Fit = Annotated[
    Path | None,
    typer.Option(
        metavar="JSONL",
        rich_help_panel=FIRST_PASS,
        help="Prompts with their `expert` (or other): fits the probe, the --calibration, or else a temperature.",
    ),
]
Threshold = Annotated[
    float, typer.Option(min=0, max=1, rich_help_panel=FIRST_PASS, help="Below this confidence --fallback decides.")
]
Fallback = Annotated[
    Literal["base", "mix"],
    typer.Option(rich_help_panel=FIRST_PASS, help="The base, or all experts by their probabilities."),
]
Soft = Annotated[
    bool, typer.Option("--soft", rich_help_panel=FIRST_PASS, help="Always weight experts by their probabilities.")
]
Read = Annotated[
    Literal["likelihood", "channel", "generate"] | None,
    typer.Option(
        rich_help_panel=FIRST_PASS,
        help="Score the names, score the prompt for each kind, or let the model write a name. Default: channel for "
        "prompt, likelihood for classifier.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(rich_help_panel=FIRST_PASS, help="Divides the scores before the softmax. Default: 1.")
]
