# SPDX-License-Identifier: Apache-2.0
"""`dispatch`: prompts -> which expert the first pass chooses for each. Also the first pass of `eval` and `serve`."""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .console import mixed, new_path, short, show_table
from .sources import load_experts, read_examples

if TYPE_CHECKING:
    from ..adaptation import FirstPass
    from ..experts.expert import Mixture
    from ..two_pass import Transformer2Model


def make_first_pass(
    model: "Transformer2Model",
    strategy: str | None,
    classifier: str | None,
    probe: Path | None,
    threshold: float,
    fit: Path | None = None,
    batch_size: int = 16,
) -> "FirstPass | None":
    """Make the first pass that a verb's options describe, fitting a probe to the rows of `fit`; `None` without any."""
    from ..adaptation import FirstPass, Probe, fit_probe

    implied = "classifier" if classifier else "probe" if probe or fit else None
    if strategy and implied not in (None, strategy):
        raise typer.BadParameter(f"--{implied} goes with --strategy {implied}, not with {strategy}.")
    if not (strategy or implied):
        return replace(model.default_first_pass, threshold=threshold) if threshold else None
    fitted = None
    if fit:
        if probe:
            new_path(probe, "--probe")
        rows = read_examples(fit)
        prompts, kinds = [row["prompt"] for row in rows], [str(row.get("expert")) for row in rows]
        fitted = fit_probe(model.library, model.tokenizer, prompts, kinds, batch_size)
        if probe:
            fitted.save(probe)
            print(f"Wrote {probe}")
    elif probe:
        fitted = Probe.load(probe)
    return FirstPass(str(strategy or implied), threshold=threshold, probe=fitted)


def dispatch(
    experts: options.Experts,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What a user asks.")] = None,
    file: Annotated[Path | None, options.option("More prompts: JSONL with `prompt` in each line.")] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 16,
    plot: options.Plot = None,
    strategy: options.Strategy = None,
    classifier: options.Classifier = None,
    probe: options.Probe = None,
    fit: options.Fit = None,
    threshold: options.Threshold = 0.0,
) -> None:
    """
    Show which expert would answer prompts, and how sure the first pass is.

    With --plot: the probabilities, or if each line of --file has its `expert`, what was chosen for each kind.
    """
    for prompt in prompts or []:
        if os.path.isdir(prompt) or re.fullmatch(r"[\w.-]+/[\w.-]+", prompt):
            raise typer.BadParameter(f"{prompt!r} is an expert, not a prompt: write --experts before each of them.")
    rows = read_examples(file) if file else []
    requests = [*(prompts or []), *(row["prompt"] for row in rows)]
    if not requests:
        raise typer.BadParameter("There are no prompts: name some, or a file of them by --file.")
    two_pass = load_experts(experts, model, revision, dtype, classifier)
    first_pass = make_first_pass(two_pass, strategy, classifier, probe, threshold, fit, batch_size)
    mixtures = two_pass.first_pass(requests, first_pass=first_pass, batch_size=batch_size)
    texts = [p if isinstance(p, str) else " ".join(str(message["content"]) for message in p) for p in requests]
    weighted = any(mixture.alpha not in ({}, {mixture.choice: 1.0}) for mixture in mixtures)
    lines = [
        [mixture.choice, f"{mixture.confidence:.2f}", *([mixed(mixture.alpha)] if weighted else []), short(text, 70)]
        for mixture, text in zip(mixtures, texts, strict=True)
    ]
    show_table(["expert", "confidence", *(["weights"] if weighted else []), "prompt"], lines)
    if plot:
        kinds = [] if prompts else [row.get("expert") for row in rows]
        _draw(plot, texts, mixtures, kinds, len(two_pass.library.names) + 1)


def _draw(path: Path, texts: list[str], mixtures: "list[Mixture]", kinds: list[Any], count: int) -> None:
    from .plots import draw_decisions, draw_probabilities, save_figure

    if kinds and all(isinstance(kind, str) for kind in kinds):
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in sorted(kinds)}
        for kind, mixture in zip(kinds, mixtures, strict=True):
            counts[kind][mixture.choice] += 1
        save_figure(path, lambda axes: draw_decisions(axes, counts, "first pass"), count, count)
    else:
        save_figure(path, lambda axes: draw_probabilities(axes, texts, mixtures), len(texts), count)
