# SPDX-License-Identifier: Apache-2.0
"""`adapt`: a few solved examples -> the mixture of experts that answers them best."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .console import new_path, shares, show_table
from .options import option, search, weight
from .sources import find_task, load_experts, read_examples

if TYPE_CHECKING:
    from ..experts.expert import Mixture


def adapt(
    experts: options.Experts,
    examples: Annotated[Path, option("JSONL: prompt and answer, or prompt, choices and label.")],
    model: options.Model = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    task: Annotated[str | None, option("Benchmark that scores written answers. Default: likelihoods.")] = None,
    max_new_tokens: Annotated[int | None, option("Length of written answers. Default: 256.", min=1)] = None,
    out: Annotated[Path | None, option("Default: mixture.json; with --per-layer a folder, --name.")] = None,
    plot: options.Plot = None,
    method: Annotated[Literal["key", "cem", "cma", "gradient"], search("How; key takes the nearest expert.")] = "cem",
    population: Annotated[int, search("Candidates per iteration.", min=1)] = 32,
    iterations: Annotated[int, search("Iterations at most.", min=1)] = 50,
    elites: Annotated[float, search("Share that shapes the next iteration.", min=0, max=1)] = 0.2,
    seed: Annotated[int, search("Seed of the draws.")] = 0,
    batch_size: options.BatchSize = 32,
    holdout: Annotated[str, search("Check the result by: leave-one-out, none, or a file.")] = "leave-one-out",
    temperature: Annotated[float, search("Divides the log-likelihoods of choices.")] = 8.0,
    max_tokens: Annotated[int | None, search("End the search before it reads more.", min=1)] = None,
    max_seconds: Annotated[float | None, search("End the search before it takes longer.", min=0)] = None,
    state: Annotated[Path | None, search("File that lets an interrupted search continue.")] = None,
    low: Annotated[float, weight("Least weight of an expert.")] = 0.0,
    high: Annotated[float, weight("Largest weight of an expert.")] = 1.0,
    normalize: Annotated[bool, weight("Weights sum to 1; the base has no share.", "--normalize")] = False,
    per_layer: Annotated[bool, weight("One weight per expert and block: a new expert.", "--per-layer")] = False,
    name: Annotated[str | None, weight("Name of the mixture or expert. Default: its folder's name.")] = None,
) -> None:
    """
    Search the mixture of experts that answers a few solved examples best; save it.

    Use it with `peft-svf eval --mixture` or `pipe(..., mixture=Mixture.load(...))`.
    """
    from ..adaptation import Search

    out = out or Path((name or "") if per_layer else "mixture.json")
    rows = read_examples(examples)
    if max_new_tokens and (task is None or any("choices" in row for row in rows)):
        raise typer.BadParameter("--max-new-tokens needs --task, and examples with an 'answer'.")
    new_path(out)
    two_pass = load_experts(experts, model, revision, dtype)
    name = name or (out.name if per_layer else None)
    limits: Any = {"low": low, "high": high, "max_tokens": max_tokens, "max_seconds": max_seconds}
    limits |= {"per_layer": per_layer, "normalize": normalize, "temperature": temperature, "seed": seed}
    plan = Search(method, population, iterations, elites, **limits)
    more: Any = {"holdout": _holdout(holdout), "name": name, "state": state, "batch_size": batch_size}
    more |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    try:
        mixture = two_pass.adapt(rows, find_task(task) if task else None, plan, **more)
    except KeyboardInterrupt:
        how = f"continues from {state}" if state else "starts again; with --state FILE it would continue"
        print(f"Interrupted: the same command {how}.", file=sys.stderr)
        raise
    (two_pass.library.expert(str(name)) if per_layer else mixture).save(out)
    _show(mixture, two_pass.library.names, per_layer)
    measured = [out] if per_layer else experts
    again = ["--model", model] * bool(model) + [part for expert in measured for part in ("--experts", expert)]
    again += [] if per_layer else ["--mixture", out]
    print(f"On other questions it may be less. Measure:\n  peft-svf eval {shlex.join(map(str, again))} --task ...")
    print(f"Wrote {out}")
    if plot:
        from .plots import draw_alpha, draw_layers, save_figure

        names = two_pass.library.names
        draw: Any = partial(draw_alpha, mixture=mixture, names=names)
        if per_layer:
            draw = partial(draw_layers, layers=mixture.provenance["layers"], title=str(name))
        save_figure(plot, draw, len(names) + 1, len(names) + 1)


def _holdout(text: str) -> Any:
    """Read what checks the result: each example in turn, nothing, or the examples of a file."""
    if text == "leave-one-out":
        return text
    return [] if text in ("none", "0") else read_examples(Path(text))


def _show(mixture: "Mixture", names: list[str], per_layer: bool) -> None:
    """Print weights, scores, and what the check decided."""
    facts, check = mixture.provenance, mixture.provenance["held_out"]
    weights = {**dict.fromkeys(names, 0.0), **shares(mixture.alpha)}
    header, table = ["expert", "weight"], {name: [weight] for name, weight in weights.items()}
    if per_layer:
        header = ["block", *next(iter(facts["layers"].values()))]
        table = {block: list(row.values()) for block, row in facts["layers"].items()}
    show_table(header, [[name, *(f"{weight:.3f}" for weight in row)] for name, row in table.items()])
    print(f"score on the {facts['examples']} examples of the search: {_score(facts['score'])}")
    if check["examples"]:
        scores = {"found": check["found"], **check["rivals"]}
        how = "left out in turn" if "by" in check else "held out"
        print(f"on {check['examples']} {how}: {', '.join(f'{name} {_score(s)}' for name, s in scores.items())}")
    if check["fell_back"]:
        print(f"The mixture that was found is no better there: this is {check['fell_back']!r} alone.")
    if facts["stopped"]:
        print(f"Ended by {facts['stopped']} after {len(facts['history'])} iterations.")


def _score(entries: list[float]) -> str:
    return " ".join(f"{entry:.3f}" for entry in entries)
