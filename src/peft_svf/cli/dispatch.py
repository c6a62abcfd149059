# SPDX-License-Identifier: Apache-2.0
"""`dispatch`: prompts -> which expert the first pass chooses for each, and how sure it is."""

from argparse import Namespace
from pathlib import Path
from typing import Annotated

import typer

from . import options


def dispatch(
    experts: options.Experts,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What a user asks.")] = None,
    file: Annotated[Path | None, typer.Option(help="More prompts: JSONL with `prompt` in each line.")] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 16,
    plot: options.Plot = None,
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
    Show which expert would answer prompts, and how sure the first pass is.

    With --plot: the probabilities, or if each line of --file has its `expert`, what was chosen for each kind.
    """
    from . import measure

    args = Namespace(**{k: v for k, v in locals().items() if k != "measure"})
    args.calibrate, args.probe_method, args.prompts = None, "logistic", prompts or []
    args.threshold, args.soft = args.threshold or None, args.soft or None
    args.fallback = None if args.fallback == "base" else args.fallback
    measure.dispatch(args)
