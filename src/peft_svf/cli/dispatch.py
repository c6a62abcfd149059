# SPDX-License-Identifier: Apache-2.0
"""`dispatch`: prompts -> which expert the first pass chooses for each. Also the first pass that `eval` measures."""

import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from . import options
from .console import mixed, new_path, save_figure, short, show_table
from .sources import load_experts, read_examples

if TYPE_CHECKING:
    from ..adaptation import FirstPass, Probe
    from ..experts.expert import Mixture
    from ..two_pass import Transformer2Model


@dataclass(frozen=True)
class Choice:
    """The options of a first pass, which [`with_first_pass`] adds to a verb."""

    strategy: options.Strategy = None
    classifier: options.Classifier = None
    probe: options.Probe = None
    calibration: options.Calibration = None
    fit: options.Fit = None
    threshold: options.Threshold = 0.0
    fallback: options.Fallback = "base"
    soft: options.Soft = False
    read: options.Read = None
    temperature: options.Temperature = None

    def resolved(self) -> "Choice":
        """Choose the strategy: the one set, or the one that another option implies; without any the model's own."""
        implied = {"classifier": self.classifier, "probe": self.probe, "prompt": self.read or self.calibration}
        strategy: Any = self.strategy or next((name for name, option in implied.items() if option), None)
        if self != Choice():
            strategy = strategy or "auto"
        for option, source in {"classifier": self.classifier, "probe": self.probe}.items():
            if source and strategy != option:
                raise typer.BadParameter(f"--{option} goes with --strategy {option}, not with {strategy}.")
            if strategy == option and not source and not (self.fit and option == "probe"):
                raise typer.BadParameter(f"--strategy {option} needs a {option}: name it by --{option}.")
        if self.fit:
            for option, folder in {"--probe": self.probe, "--calibration": self.calibration}.items():
                new_path(folder, option) if folder else None
        return replace(self, strategy=strategy)

    def first_pass(self, model: "Transformer2Model", batch_size: int) -> "FirstPass":
        """Make the first pass; with `fit` what it needs is fitted, saved if it has a place, and reported."""
        from ..adaptation import FirstPass, Probe, fit_calibration, fit_probe, fit_temperature

        settings: dict[str, Any] = {name: getattr(self, name) for name in ("threshold", "fallback", "soft", "read")}
        strategy = model.default_first_pass.strategy if self.strategy == "auto" else self.strategy
        settings |= {"strategy": strategy, "temperature": self.temperature or 1.0}
        if not self.fit:
            folders = {"probe": self.probe, "calibration": self.calibration}
            settings |= {name: Probe.load(folder) for name, folder in folders.items() if folder}
            return FirstPass(**settings)
        rows = read_examples(self.fit, "expert")
        prompts, kinds = [row["prompt"] for row in rows], [row["expert"] for row in rows]
        data = (model.library, model.tokenizer, prompts, kinds)
        if self.strategy == "probe":
            settings["probe"] = _saved(fit_probe(*data, batch_size), self.probe)
            return FirstPass(**settings)
        first_pass = FirstPass(**settings)
        if self.calibration:
            fitted = _saved(fit_calibration(*data, first_pass, batch_size), self.calibration)
            return replace(first_pass, calibration=fitted)
        temperature = fit_temperature(*data, first_pass, batch_size)
        print(f"temperature fitted to {len(rows)} prompts: {temperature:.3f}")
        return replace(first_pass, temperature=temperature)


def with_first_pass(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of a first pass; it takes them as its argument `choice`."""

    @wraps(verb)
    def run(**values: Any) -> None:
        verb(choice=Choice(**{part.name: values.pop(part.name) for part in fields(Choice)}), **values)

    signature, hints = inspect.signature(verb, eval_str=True), get_type_hints(Choice, include_extras=True)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "choice"]
    for part in fields(Choice):
        settings: Any = {"default": part.default, "annotation": hints[part.name]}
        parameters.append(inspect.Parameter(part.name, inspect.Parameter.KEYWORD_ONLY, **settings))
    run.__signature__ = signature.replace(parameters=[p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    return run


@with_first_pass
def dispatch(
    experts: options.Experts,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What a user asks.")] = None,
    file: Annotated[Path | None, options.option("More prompts: JSONL with `prompt` in each line.")] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 16,
    plot: options.Plot = None,
    *,
    choice: Choice,
) -> None:
    """
    Show which expert would answer prompts, and how sure the first pass is.

    With --plot: the probabilities, or if each line of --file has its `expert`, what was chosen for each kind.
    """
    if not prompts and not file:
        raise typer.BadParameter("There are no prompts: name some, or a file of them by --file.")
    for prompt in prompts or []:
        if Path(prompt).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", prompt):
            raise typer.BadParameter(f"{prompt!r} is an expert, not a prompt: write --experts before each of them.")
    choice = choice.resolved()
    rows = read_examples(file) if file else []
    asked = [*(prompts or []), *(row["prompt"] for row in rows)]
    two_pass = load_experts(experts, model, revision, dtype, choice.classifier)
    first_pass = choice.first_pass(two_pass, batch_size) if choice.strategy else None
    mixtures = two_pass.first_pass(asked, first_pass=first_pass, batch_size=batch_size)
    texts = [p if isinstance(p, str) else " ".join(str(message["content"]) for message in p) for p in asked]
    weighted = any(mixture.alpha not in ({}, {mixture.choice: 1.0}) for mixture in mixtures)
    lines = [
        [mixture.choice, f"{mixture.confidence:.2f}", *([mixed(mixture.alpha)] if weighted else []), short(text, 70)]
        for mixture, text in zip(mixtures, texts, strict=True)
    ]
    show_table(["expert", "confidence", *(["weights"] if weighted else []), "prompt"], lines)
    if plot:
        kinds = [] if prompts else [row.get("expert") for row in rows]
        _draw(plot, texts, mixtures, kinds, [*two_pass.library.names, "other"])


def _draw(path: Path, texts: list[str], mixtures: "list[Mixture]", kinds: list[Any], names: list[str]) -> None:
    from ..plots import draw_decisions, draw_probabilities

    if not kinds or not all(isinstance(kind, str) for kind in kinds):
        save_figure(path, [lambda axes: draw_probabilities(axes, texts, mixtures)], len(texts), len(names))
        return
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in sorted(kinds)}
    for kind, mixture in zip(kinds, mixtures, strict=True):
        counts[kind][mixture.choice] += 1
    save_figure(path, [lambda axes: draw_decisions(axes, counts, "first pass")], len(names), len(names))


def _saved(fitted: "Probe", folder: Path | None) -> "Probe":
    if folder:
        fitted.save(folder)
        print(f"Wrote {folder}")
    return fitted
