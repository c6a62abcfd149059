# SPDX-License-Identifier: Apache-2.0
"""`adapt`: a few solved examples -> the mixture of experts that answers them best."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .console import new_path, save_figure, shares, show_table
from .sources import find_task, load_experts, read_examples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..experts.expert import Mixture

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
    from ..adaptation import Search
    from ..rows import has_image

    out = out or Path((name or "") if per_layer else "mixture.json")
    if not out.name:
        raise typer.BadParameter("--per-layer makes an expert: name it by --name, or its folder by --out.")
    rows = read_examples(examples)
    if any(map(has_image, rows)):
        raise ValueError(f"In {examples} an example has an image: the search scores texts.")
    if max_new_tokens is not None and (task is None or "choices" in rows[0]):
        raise typer.BadParameter("--max-new-tokens needs --task, and examples with an 'answer'.")
    _new_result(out, per_layer)
    two_pass = load_experts(experts, model, revision, dtype)
    name = name or (out.name if per_layer else None)
    search = Search(method, population, iterations, elites, low, high, seed, max_tokens, max_seconds)
    search = replace(search, per_layer=per_layer, normalize=normalize, temperature=temperature)
    try:
        mixture = two_pass.adapt(
            rows,
            find_task(task) if task else None,
            search,
            holdout=_holdout(holdout),
            name=name,
            state=state,
            batch_size=batch_size,
            **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
        )
    except KeyboardInterrupt:
        how = f"goes on from {state}" if state else "starts again; with --state FILE it would go on"
        raise KeyboardInterrupt(f"Interrupted: the same command {how}.") from None
    if per_layer:
        two_pass.library.expert(str(name)).save(out)
    else:
        mixture.save(out)
    _show(mixture, two_pass.library.names, per_layer, iterations)
    again = [*(["--model", model] if model else []), "--experts", *([out] if per_layer else experts)]
    again += [] if per_layer else ["--mixture", out]
    print(f"On other questions it may be less. Measure:\n  peft-svf eval {shlex.join(map(str, again))} --task ...")
    print(f"Wrote {out}")
    if plot:
        _draw(plot, mixture, two_pass.library.names, per_layer, str(name))


def _new_result(out: Path, per_layer: bool) -> None:
    """Refuse a path that exists; if it is the result of a search, the message shows how to measure it."""
    from ..experts.expert import Expert, Mixture

    provenance: dict[str, Any] = {}
    if out.exists():  # else an expert would be looked for on the Hub
        with suppress(OSError, ValueError):
            provenance = (Expert.load(out) if per_layer else Mixture.load(out)).provenance
    if "history" in provenance:
        use = f"peft-svf eval {'--experts' if per_layer else '--mixture'} {out} ..."
        raise FileExistsError(f"{out} is the result of a search that has ended: `{use}` measures it.")
    new_path(out)


def _holdout(text: str) -> Any:
    """Read what checks the result: each example in turn, nothing, or the examples of a file."""
    if text == "leave-one-out":
        return text
    return [] if text in ("none", "0") else read_examples(Path(text))


def _show(mixture: "Mixture", names: Sequence[str], per_layer: bool, iterations: int) -> None:
    facts, check = mixture.provenance, mixture.provenance["held_out"]
    if per_layer:
        layers = facts["layers"]
        show_table(
            ["block", *next(iter(layers.values()))],
            [[block, *(f"{weight:.3f}" for weight in row.values())] for block, row in layers.items()],
        )
    else:
        weights = {**dict.fromkeys(names, 0.0), **shares(mixture.alpha)}
        show_table(["expert", "weight"], [[name, f"{weight:.3f}"] for name, weight in weights.items()])
    print(f"score on the {facts['examples']} examples of the search: {_score(facts['score'])}")
    if check["examples"]:
        scores = {"found": check["found"], **check["rivals"]}
        how = "left out in turn" if "by" in check else "held out"
        print(f"on {check['examples']} {how}: {', '.join(f'{name} {_score(s)}' for name, s in scores.items())}")
    if check["fell_back"]:
        print(f"The mixture that was found is no better there: this is {check['fell_back']!r} alone.")
    if facts["stopped"]:
        print(f"Ended by {facts['stopped']} after {len(facts['history'])} of {iterations} iterations.")


def _score(entries: Sequence[float]) -> str:
    return " ".join(f"{entry:.3f}" for entry in entries)


def _draw(path: Path, mixture: "Mixture", names: Sequence[str], per_layer: bool, name: str) -> None:
    from ..plots import draw_alpha, draw_layers, draw_search

    def draw_weights(axes: "Axes") -> None:
        if per_layer:
            draw_layers(axes, mixture.provenance["layers"], name)
        else:
            draw_alpha(axes, mixture, names)

    save_figure(path, [lambda axes: draw_search(axes, mixture), draw_weights], len(names) + 1, len(names) + 1)
