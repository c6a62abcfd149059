# SPDX-License-Identifier: Apache-2.0
"""`eval`, `adapt` and `dispatch`: experts over their base -> accuracies, a mixture, decisions of the first pass."""

import argparse
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adaptation.few_shot import LEAVE_ONE_OUT
from ..rows import Row, has_image
from .console import interval, new_path, save_figure, score, short, table, weights
from .sources import find_expert, find_task, load_model, read_examples, read_mixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel

    from ..evaluation import Summary
    from ..experts.expert import Mixture
    from ..rows import Reader
    from ..two_pass import Transformer2Model

FIRST_PASS = (
    "strategy", "threshold", "fallback", "soft", "calibration", "read", "temperature", "classifier", "probe",
)  # fmt: skip
SEARCH = ("method", "population", "iterations", "elites", "seed")
WAYS = ("base", "mixture", "two_pass")  # keys of a result beside the names of experts


# eval ----------------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> None:
    """Measure the base, experts, a mixture or two-pass answering on a task; write a result."""
    from .. import evaluation
    from ..training.result import versions, write_file

    task = find_task(args.task)
    form = args.form or task.forms[0]
    out = new_path(args.out or Path(f"eval-{task.name}-{datetime.now():%Y%m%d-%H%M%S}.json"))
    strategy, mixture = _asked(args)
    rows = task.rows(args.split, form, limit=args.limit)
    if not rows:
        raise ValueError(f"Task {task.name!r} has no {args.split} rows in the {form} form.")
    images = any(map(has_image, rows))
    generation = {"max_new_tokens": args.max_new_tokens} if form == "generate" else {}

    def measure(model: "PreTrainedModel", reader: "Reader", some: Sequence[Row]) -> "Summary":
        return evaluation.evaluate(model, reader, some, args.batch_size, task, **generation)

    first_pass = None
    if args.experts:
        two_pass = load_experts(args, images)
        base_model = two_pass.name_or_path
        summaries, first_pass = _measure_experts(args, two_pass, rows, mixture, strategy, measure)
    else:
        base_model = args.model
        base, reader = load_model(args.model, args.revision, args.dtype, images=images)
        assert reader is not None
        summaries = {"base": measure(base, reader, rows)}
    others = {way: found for way, found in summaries.items() if way != "base"}
    gains = {way: evaluation.paired_difference(found, summaries["base"]) for way, found in others.items()}
    print(f"{task.name}, {args.split} split, {form} form, n = {len(rows)}; 95 % intervals, gains paired")
    _show_summaries(summaries, gains)
    if mixture is not None:
        print(f"mixture: {weights(_shares(mixture))}")
    if first_pass is not None:
        chosen = ", ".join(f"{name} {count}" for name, count in first_pass["chosen"].items())
        print(f"chosen by the first pass ({strategy}): {chosen}; mean confidence {first_pass['confidence']:.2f}")
    result = {
        "command": args.command,
        "versions": versions(),
        "base_model": base_model,
        "experts": args.experts,
        "mixture": None if mixture is None else mixture.alpha,
        "first_pass": first_pass,
        "task": task.name,
        "form": form,
        "split": args.split,
        "summaries": {way: found.to_json(args.records) for way, found in summaries.items()},
        "gains": {way: {"gain": gain, "interval": ends} for way, (gain, ends) in gains.items()},
    }
    write_file(out, json.dumps(result, indent=1))
    print(f"Wrote {out}")


def _asked(args: argparse.Namespace) -> "tuple[str | None, Mixture | None]":
    """The strategy and the mixture that are to be measured; what cannot be is refused before anything is loaded."""
    given = first_pass_options(args)
    if not args.experts:
        if args.mixture or given:
            raise ValueError(f"{given[0] if given else '--mixture'} needs the experts to choose from: --experts ...")
        if args.model is None:
            raise ValueError("There is nothing to measure: name --experts, or a base model by --model.")
    strategy = strategy_of(args)
    if given and strategy is None:
        raise ValueError(f"{given[0]} is of a first pass: name one by --strategy prompt, classifier or probe.")
    return strategy, read_mixture(args.mixture) if args.mixture else None


def _measure_experts(
    args: argparse.Namespace,
    two_pass: "Transformer2Model",
    rows: Sequence[Row],
    mixture: "Mixture | None",
    strategy: str | None,
    measure: "Callable[[PreTrainedModel, Reader, Sequence[Row]], Summary]",
) -> "tuple[dict[str, Summary], dict[str, Any] | None]":
    """Measure the base, the mixture or each expert, and with a strategy two passes; what the first pass has found."""
    from ..experts.expert import Mixture
    from ..experts.library import explicit
    from ..two_pass import answer_each

    if taken := [name for name in two_pass.library.names if name in WAYS]:
        raise ValueError(f"An expert called {taken[0]!r} cannot be told from the row of that name: NAME=EXPERT.")
    ways = {"base": Mixture()}
    if mixture is None:
        ways |= {name: explicit(name) for name in two_pass.library.names}
    else:
        ways["mixture"] = mixture
        with two_pass.using(mixture):
            pass  # an unknown expert is refused before the base is measured
    reader = two_pass.processor or two_pass.tokenizer
    first_pass: dict[str, Any] | None = None
    mixtures: list[Mixture] = []
    if strategy is not None:
        first_pass, mixtures = decide(args, strategy, two_pass, [row["prompt"] for row in rows])
    summaries = {}
    for way, each in ways.items():
        with two_pass.using(each) as model:
            summaries[way] = measure(model, reader, rows)
    if mixtures:
        summaries["two_pass"] = answer_each(two_pass, rows, mixtures, lambda model, some: measure(model, reader, some))
    return summaries, first_pass


def _show_summaries(
    summaries: "Mapping[str, Summary]", gains: Mapping[str, tuple[float, tuple[float, float]]]
) -> None:
    lines = []
    for way, found in summaries.items():
        gain = [f"{gains[way][0]:+.3f}", interval(gains[way][1], "+")] if way in gains else ["", ""]
        name = "two passes" if way == "two_pass" else way
        lines.append([name, f"{found.accuracy:.3f}", interval(found.interval), *gain])
    print(table(["", "accuracy", "interval", "gain", "interval"], lines))


# adapt ---------------------------------------------------------------------------------------------------------


def adapt(args: argparse.Namespace) -> None:
    """Search the mixture of experts that answers solved examples best; save it, or the expert it makes per layer."""
    from ..adaptation import Search
    from ..plots import draw_alpha, draw_layers, draw_search

    out = args.out or Path((args.name or "") if args.per_layer else "mixture.json")
    if not out.name:
        raise ValueError("--per-layer makes an expert: name it by --name, or its folder by --out.")
    _new_result(out, args.per_layer)
    examples, held_out = read_examples(args.examples), _holdout(args.holdout)
    if any(map(has_image, examples)):
        raise ValueError(f"In {args.examples} an example has an image: the search scores texts.")
    task = find_task(args.task) if args.task else None
    if args.max_new_tokens is not None and (task is None or "choices" in examples[0]):
        raise ValueError("--max-new-tokens is of generated answers: it needs --task, and examples with an 'answer'.")
    if args.low >= args.high:
        raise ValueError(f"--low and --high are the ends of a weight's range; got {args.low} and {args.high}.")
    model = load_experts(args)
    names = [*SEARCH, "low", "high", "normalize", "per_layer", "temperature", "max_tokens", "max_seconds"]
    search = Search(**{name: getattr(args, name) for name in names})
    settings = {"batch_size": args.batch_size, "state": args.state, "holdout": held_out}
    if args.max_new_tokens is not None:
        settings["max_new_tokens"] = args.max_new_tokens
    name = args.name or (out.name if args.per_layer else None)
    try:
        mixture = model.adapt(examples, task, search, name=name, **settings)
    except KeyboardInterrupt:
        how = f"goes on from {args.state}" if args.state else "begins anew; with --state FILE it would go on"
        raise KeyboardInterrupt(f"Interrupted: the same command {how}.") from None
    found, check = mixture.provenance, mixture.provenance["held_out"]
    if args.per_layer:
        model.library.expert(str(name)).save(out)
        header = ["block", *next(iter(found["layers"].values()))]
        print(table(header, [[b, *(f"{w:.3f}" for w in row.values())] for b, row in found["layers"].items()]))
    else:
        mixture.save(out)
        shares = {**dict.fromkeys(model.library.names, 0.0), **_shares(mixture)}
        print(table(["expert", "weight"], [[each, f"{weight:.3f}"] for each, weight in shares.items()]))
    print(f"score on the {found['examples']} examples of the search: {score(found['score'])}")
    if check["examples"]:
        scores = [f"{each} {score(values)}" for each, values in {"found": check["found"], **check["rivals"]}.items()]
        which = "left out in turn" if "by" in check else "that it did not see"
        print(f"on {check['examples']} {which}: {', '.join(scores)}")
    if check["fell_back"]:
        print(f"The mixture that was found is no better there: this is {check['fell_back']!r} alone.")
    if found["stopped"]:
        print(f"Ended by {found['stopped']} after {len(found['history'])} of {args.iterations} iterations.")
    print("On other questions it may be less. Measure:")
    again = [
        *(["--model", args.model] if args.model else []),
        "--experts",
        *([out] if args.per_layer else args.experts),
    ]
    again += [] if args.per_layer else ["--mixture", out]
    print(f"  peft-svf eval {shlex.join(map(str, again))} --task ...")
    print(f"Wrote {out}")
    if args.plot:

        def draw_weights(axes: "Axes") -> None:
            if args.per_layer:
                draw_layers(axes, found["layers"], str(name))
            else:
                draw_alpha(axes, mixture, model.library.names)

        count = len(model.library.names) + 1
        save_figure(args.plot, [lambda axes: draw_search(axes, mixture), draw_weights], count, count)


def _new_result(out: Path, per_layer: bool) -> None:
    """Refuse a path that exists; of one that a search has written say that it has ended."""
    from ..experts.expert import Expert, Mixture

    found: dict[str, Any] = {}
    if out.exists():  # else an expert would be looked for on the Hub
        with suppress(OSError, ValueError):
            found = Expert.load(out).provenance if per_layer else Mixture.load(out).provenance
    if "history" in found:
        use = f"peft-svf eval {'--experts' if per_layer else '--mixture'} {out} ..."
        raise FileExistsError(
            f"{out} is there already, from a search that has ended: `{use}` measures it; another one needs another "
            "--out."
        )
    new_path(out)


def _holdout(given: str) -> str | list[dict[str, Any]]:
    """Each example in turn, no check, or examples of a file."""
    if given == LEAVE_ONE_OUT:
        return given
    if given == "none":
        return []
    if os.path.exists(given):
        return read_examples(Path(given))
    raise ValueError(f"--holdout is {LEAVE_ONE_OUT}, none, or a JSONL file of other examples; got {given!r}.")


# dispatch, and the first pass of eval --------------------------------------------------------------------------


def dispatch(args: argparse.Namespace) -> None:
    """Show which expert would answer prompts."""
    from ..plots import draw_decisions, draw_probabilities

    rows = [] if args.file is None else read_examples(args.file)
    prompts = [*args.prompts, *(row["prompt"] for row in rows)]
    if not prompts:
        raise ValueError("There are no prompts: name some, or a file of them by --file.")
    strategy = strategy_of(args) or "prompt"
    model = load_experts(args)
    _, mixtures = decide(args, strategy, model, prompts)
    texts = [_text(prompt) for prompt in prompts]
    mixed = any(mixture.alpha not in ({}, {mixture.choice: 1.0}) for mixture in mixtures)
    lines = [
        [m.choice, f"{m.confidence:.2f}", *([weights(_shares(m))] if mixed else []), short(text, 70)]
        for m, text in zip(mixtures, texts, strict=True)
    ]
    print(table(["expert", "confidence", *(["weights"] if mixed else []), "prompt"], lines))
    names = [*model.library.names, "other"]
    kinds: list[Any] = [] if args.prompts else [row.get("expert") for row in rows]
    if args.plot and kinds and all(isinstance(kind, str) for kind in kinds):
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in sorted(kinds)}
        for kind, mixture in zip(kinds, mixtures, strict=True):
            counts[kind][mixture.choice] += 1
        save_figure(
            args.plot, [lambda axes: draw_decisions(axes, counts, f"first pass: {strategy}")], *[len(names)] * 2
        )
    elif args.plot:
        save_figure(args.plot, [lambda axes: draw_probabilities(axes, texts, mixtures)], len(texts), len(names))


def first_pass_options(args: argparse.Namespace) -> list[str]:
    """The options of a first pass that were given."""
    return [f"--{name}" for name in (*FIRST_PASS, "fit") if getattr(args, name) is not None]


def strategy_of(args: argparse.Namespace) -> str | None:
    """
    The strategy that was named, or that of the classifier or probe that was; `None` where nothing says one.

    Raises:
        `ValueError`: where options do not go together.
        `FileExistsError`: if the probe or calibration that is to be fitted is there.
    """
    strategy = args.strategy or ("classifier" if args.classifier else "probe" if args.probe else None)
    for option in ("classifier", "probe"):
        if strategy == option and not (getattr(args, option) or (option == "probe" and args.fit)):
            fit = ", or prompts to fit one to by --fit" if option == "probe" else ""
            raise ValueError(f"--strategy {option} needs a {option}: name it by --{option}{fit}.")
        if getattr(args, option) and strategy != option:
            raise ValueError(f"--{option} goes with --strategy {option}, not with {strategy!r}.")
    if args.read == "generate" and (args.fit or strategy == "probe"):
        raise ValueError("--read generate has no scores to fit to or to read off a probe: leave it out.")
    if args.calibration and (strategy == "probe" or args.read == "generate"):
        raise ValueError("--calibration goes with prompt or classifier, without --read generate.")
    for option in ("probe", "calibration"):
        if args.fit and getattr(args, option):
            new_path(getattr(args, option), f"--{option}")
    if args.fit and args.temperature is not None and strategy != "probe" and not args.calibration:
        raise ValueError("--fit finds the temperature: leave --temperature out.")
    return strategy


def decide(
    args: argparse.Namespace, strategy: str, model: "Transformer2Model", prompts: Sequence[Any]
) -> "tuple[dict[str, Any], list[Mixture]]":
    """Run the first pass: what a result says of it, and the mixture of each prompt."""
    from ..adaptation import FirstPass

    settings = {name: getattr(args, name) for name in ("fallback", "soft", "read", "temperature")}
    settings = {name: value for name, value in settings.items() if value is not None}
    fitted = fit_first_pass(args, strategy, model)
    threshold = args.threshold or 0.0
    start = time.perf_counter()
    first_pass = FirstPass(strategy, threshold=threshold, **(settings | fitted))
    mixtures = model.first_pass(prompts, first_pass=first_pass, batch_size=args.batch_size)
    facts: dict[str, Any] = {
        "strategy": strategy,
        "threshold": threshold,
        **settings,
        **{name: value for name, value in fitted.items() if name == "temperature"},
        "classifier": args.classifier,
        "probe": None if args.probe is None else str(args.probe),
        "calibration": None if args.calibration is None else str(args.calibration),
        "fit": None if args.fit is None else str(args.fit),
        "chosen": dict(Counter(mixture.choice for mixture in mixtures).most_common()),
        "confidence": sum(mixture.confidence for mixture in mixtures) / len(mixtures),
        "seconds": time.perf_counter() - start,
    }
    return facts, mixtures


def fit_first_pass(args: argparse.Namespace, strategy: str, model: "Transformer2Model") -> dict[str, Any]:
    """Fit what `--fit` has prompts for: the probe, a calibration that has a place, or a temperature; else read it."""
    from ..adaptation import FirstPass, Probe, fit_calibration, fit_probe, fit_temperature

    folder = args.probe if strategy == "probe" else args.calibration
    name = "probe" if strategy == "probe" else "calibration" if folder else "temperature"
    if args.fit is None:
        return {} if folder is None else {name: Probe.load(folder)}
    rows = read_examples(args.fit, "expert")
    library, tokenizer, size = model.library, model.tokenizer, args.batch_size
    prompts, kinds = [row["prompt"] for row in rows], [row["expert"] for row in rows]
    if name == "temperature":
        temperature = fit_temperature(library, tokenizer, prompts, kinds, FirstPass(strategy, args.read), size)
        print(f"temperature fitted to {len(rows)} prompts: {temperature:.3f}")
        return {name: temperature}
    if name == "probe":
        fitted = fit_probe(library, tokenizer, prompts, kinds, size)
    else:
        fitted = fit_calibration(library, tokenizer, prompts, kinds, FirstPass(strategy, args.read), size)
    if folder is not None:
        fitted.save(folder)
        print(f"Wrote {folder}: a {'probe' if name == 'probe' else 'calibration'} fitted to {len(rows)} prompts")
    return {name: fitted}


# What the verbs share. -----------------------------------------------------------------------------------------


def load_experts(args: argparse.Namespace, images: bool = False) -> "Transformer2Model":
    """Load the experts that the arguments name, and the base model under them."""
    from ..two_pass import Transformer2Model, base_of

    experts = [find_expert(source) for source in args.experts]
    name, revision = (args.model, args.revision) if args.model else base_of(experts)
    model, reader = load_model(name, args.revision or revision, args.dtype, images=images)
    assert reader is not None
    return Transformer2Model(model, reader, experts, getattr(args, "classifier", None))


def _shares(mixture: "Mixture") -> dict[str, float]:
    """The weights of a mixture, and what is left for the base."""
    return {**mixture.alpha, "other": 1 - sum(mixture.alpha.values())}


def _text(prompt: str | list[Mapping[str, Any]]) -> str:
    """What a prompt says, on one line."""
    return prompt if isinstance(prompt, str) else " ".join(str(message["content"]) for message in prompt)
