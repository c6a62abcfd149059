# SPDX-License-Identifier: Apache-2.0
"""
Result JSON of a run -> a page (Markdown) with every target beside its measured value, tables and figures.

    python benchmarks/speed/report.py results/speed-<time>.json

Nothing is measured here, and no number on the page has another source than the file.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from race import Ratio, ratio  # noqa: E402

AUTO, NARROW, TRUNCATED, SHIPPED = "SVF auto", "SVF narrow", "SVF k=64", "SVF as shipped"
LORA, LORA_BASE_DTYPE, DENSE, LEAN = "LoRA r=16, as shipped", "LoRA r=16, base dtype", "dense form", "dense form, lean"

HIT, KNOWN, HASHED, READ = "cache hit", "cache hit, file known", "hashing the weights", "reading the bases"


@dataclass(frozen=True)
class Target:
    """
    One promise about speed or memory.

    Args:
        text (`str`): What is promised.
        limit (`float`): The ratio must not be above it.
        key (`str`): The race it is read from.
        name (`str`): The contestant whose time is the numerator.
        over (`tuple[str, ...]`): Those whose times together are the denominator.
    """

    text: str
    limit: float
    key: str
    name: str
    over: tuple[str, ...]


TARGETS = [
    Target("training step, MLP targets, over LoRA r=16 as PEFT ships it", 1.0, "B2/mlp", AUTO, (LORA,)),
    Target("the same, SVF as shipped (basis in float32)", 1.0, "B2/mlp", SHIPPED, (LORA,)),
    Target("training step, MLP targets, over LoRA in the base dtype", 1.1, "B2/mlp", AUTO, (LORA_BASE_DTYPE,)),
    Target("training step, MLP targets, over the dense form", 0.75, "B2/mlp", AUTO, (DENSE,)),
    Target("training step, all linear, over LoRA r=16 as PEFT ships it", 1.1, "B2/all", AUTO, (LORA,)),
    Target("the same, SVF as shipped (basis in float32)", 1.1, "B2/all", SHIPPED, (LORA,)),
    Target("generation, one expert merged, over the base", 1.02, "B6/merged", "SVF, merge_adapter()", ("base",)),
    Target("the same by the plan instead of merge_adapter()", 1.02, "B6/merged", "SVF merged", ("base",)),
    Target(
        "decoding, a mixture for each row, MLP targets, over the base",
        1.3,
        "B4/model",
        f"{AUTO}, {{fewest}}",
        ("base",),
    ),
    Target("the same with many experts, over few", 1.05, "B4/model", f"{AUTO}, {{most}}", (f"{AUTO}, {{fewest}}",)),
    Target(
        "training step, k=64, MLP targets, over LoRA in the base dtype", 1.0, "B2/mlp", TRUNCATED, (LORA_BASE_DTYPE,)
    ),
    Target(
        "training step, k=64, all linear, over LoRA in the base dtype", 1.0, "B2/all", TRUNCATED, (LORA_BASE_DTYPE,)
    ),
    Target(
        "factorisation, over torch.linalg.svd in float64",
        0.65,
        "B7/factorise",
        "SVF factorize",
        ("torch.linalg.svd, float64",),
    ),
    Target("basis cache hit, over hashing the weights and reading the bases", 1.3, "B7/cache", HIT, (HASHED, READ)),
    Target("basis cache hit on a known weight file, over reading alone", 1.3, "B7/cache", KNOWN, (READ,)),
    Target("the same for weights of width 2048", 1.3, "B7/cache/2048", KNOWN, (READ,)),
]


def races(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The races of a result by their keys."""
    return {race["key"]: race for race in result["races"]}


def _names(target: Target, race: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The contestants of a target, with the numbers of experts that were run put in."""
    counts = race.get("about", {}).get("experts") or [0]
    known = {"fewest": f"{min(counts)} experts", "most": f"{max(counts)} experts"}
    return target.name.format(**known), tuple(name.format(**known) for name in target.over)


def verdicts(result: Mapping[str, Any]) -> list[tuple[str, float, str, str]]:
    """Text, limit, measured value and "met", "missed" or why there is none, of each target."""
    rows = []
    for target in TARGETS:
        race = races(result).get(target.key)
        if race is None:
            rows.append((target.text, target.limit, "–", f"not run: {target.key}"))
            continue
        name, over = _names(target, race)
        measured = ratio(race["samples"], name, *over)
        if measured is None:
            missing = [f"{n}: {race['not_available'][n]}" for n in (name, *over) if n in race["not_available"]]
            rows.append((target.text, target.limit, "–", "not available: " + ("; ".join(missing) or name)))
            continue
        rows.append((target.text, target.limit, str(measured), "met" if measured.median <= target.limit else "missed"))
    for where, sizes in result["facts"].get("B8/resident", {}).items():
        share = sizes["svf"] / sizes["u_s_v"]
        text = f"resident factors of {sizes['model']}, {where} targets, over U, S and V (bytes, counted)"
        rows.append((text, 0.30, f"{share:.3f}", "met" if share <= 0.30 else "missed"))
    return rows


def page(result: Mapping[str, Any], figures: list[str]) -> str:
    """The page as Markdown."""
    settings, machine = result["settings"], result["machine"]
    lines = [f"# Speed, run of {result['started']}", ""]
    if settings.get("quick") or settings.get("tiny"):
        lines += ["**A quick run, for trying: too few repetitions to quote a number from.**", ""]
    lines += [
        f"`{result['command']}` · seed {settings['seed']} · {settings['threads']} thread(s), "
        f"{'CPU time' if settings['threads'] == 1 else 'wall clock'} · {result['seconds']:.0f} s in all",
        "",
        f"{machine['processor']}, {machine['cores']} cores ({machine['cpu_capability']}), "
        f"{machine.get('memory_gb', '?')} GB · " + ", ".join(f"{n} {v}" for n, v in result["versions"].items()),
        "",
        "Every number is the median over repetitions of the ratio within a repetition, with the smallest and the "
        "largest in brackets; all contestants of a race run in every repetition, in random order. The SVF contestants "
        "keep their basis in bfloat16, as their base is; *SVF as shipped* has every field at its default.",
    ]
    if result["benchmark"] == "speed":
        lines += ["", "## Targets", "", "| target | at most | measured | |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {text} | {limit:.2f} | {value} | {verdict} |" for text, limit, value, verdict in verdicts(result)
        ]
    lines += ["", *(f"![{name}]({name})" for name in figures)]
    for case, title in CASES.items():
        of_case = [race for race in result["races"] if race["case"] == case]
        facts = {key: value for key, value in result["facts"].items() if key.startswith(f"{case}/")}
        if of_case or facts:
            lines += ["", f"## {case}: {title}", ""]
        lines += _layer_table(of_case) if case == "B1" and of_case else [x for race in of_case for x in _table(race)]
        for key, value in facts.items():
            lines += [f"**{key.partition('/')[2].replace('_', ' ')}**", "", *_fact(value), ""]
    return "\n".join(lines) + "\n"


CASES = {
    "B1": "one layer, forward and backward",
    "B2": "a training step",
    "B3": "the work of a step beside its tokens",
    "B4": "decoding, a mixture for each row",
    "B5": "changing the expert",
    "B6": "generation",
    "B7": "factorising and the basis cache",
    "B8": "memory",
    "B9": "who may share an expert",
    "B10": "exactness",
    "G1": "one layer on a GPU, forward and backward",
    "G2": "merging all weights on a GPU",
    "G3": "factorising on a GPU",
    "G4": "decoding on a GPU, all linear layers in one CUDA graph",
    "G5": "a training step of the whole stack on a GPU",
    "G6": "decoding with the whole model on a GPU",
}


def _table(race: Mapping[str, Any]) -> list[str]:
    """One race: milliseconds, and ratios to the first contestant."""
    samples = race["samples"]
    first = next(iter(samples), "")
    about = ", ".join(f"{key} {value}" for key, value in race["about"].items())
    count = len(samples.get(first, []))
    lines = [f"**{race['title']}** ({about}; {count} repetitions)" if about else f"**{race['title']}**", ""]
    lines += [f"| | ms | over {first} |", "| --- | --- | --- |"]
    for name, values in samples.items():
        lines.append(f"| {name} | {_ms(statistics.median(values))} | {ratio(samples, name, first)} |")
    lines += [f"| {name} | – | not available: {reason} |" for name, reason in race["not_available"].items()]
    return [*lines, ""]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _layer_table(of_case: list[dict[str, Any]]) -> list[str]:
    """All cells of B1, one a line: ratios to the bare layer."""
    names = list(dict.fromkeys(name for race in of_case for name in (*race["samples"], *race["not_available"])))[1:]
    lines = ["| out x in, dtype, tokens | base, ms | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for race in of_case:
        about, samples = race["about"], race["samples"]
        ratios = [ratio(samples, name, "base") for name in names]
        cells = [str(x) if x else "–" for x in ratios]
        label = f"{about['out']}x{about['in']}, {about['dtype']}, {about['tokens']}"
        lines.append(f"| {label} | {_ms(statistics.median(samples['base']))} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _fact(value: Any) -> list[str]:
    """A fact as a table: nested dicts of one depth have their keys as columns."""
    if not isinstance(value, dict):
        return [_cell(value)]
    rows = {key: row for key, row in value.items() if isinstance(row, dict)}
    plain = {key: row for key, row in value.items() if key not in rows}
    lines = [", ".join(f"{key}: {_cell(x)}" for key, x in plain.items()), ""] if plain and rows else []
    if not rows:
        return ["| | |", "| --- | --- |", *(f"| {key} | {_cell(x)} |" for key, x in plain.items())]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if max(len(row) for row in rows.values()) > 8:  # a long dict reads better downwards
        for key, row in rows.items():
            lines += [f"{key}:", "", *_fact(row), ""]
        return lines
    lines += ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    lines += [
        f"| {key} | " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |"
        for key, row in rows.items()
    ]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(x) for x in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def figures(result: Mapping[str, Any], stem: Path) -> list[str]:
    """Draw what the result has; returns the names of the files, which lie beside it."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    plots: dict[str, Callable[[Mapping[str, Any], Any], bool]] = {"steps": _steps, "layers": _layers}
    for name, draw in plots.items():
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(11, 4.5), layout="constrained")
        if draw(result, figure):
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=120)
            drawn.append(path.name)
        pyplot.close(figure)
    return drawn


def _bars(axes: Any, race: Mapping[str, Any], title: str) -> None:
    samples = race["samples"]
    first = next(iter(samples))
    rows = {name: r for name in samples if name != first and (r := ratio(samples, name, first)) is not None}
    for y, (name, value) in enumerate(rows.items()):
        color = "tab:blue" if name.startswith("SVF") else "tab:gray"
        spread = [[value.median - value.low], [value.high - value.median]]
        axes.barh(y, value.median, color=color, xerr=spread, error_kw={"elinewidth": 1, "capsize": 2})
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time over {first}")
    axes.set_title(title, fontsize=10)


def _steps(result: Mapping[str, Any], figure: Any) -> bool:
    """Bars of whole operations: steps, generation, decoding."""
    wanted = ("B2/mlp", "B2/all", "B4/model", "B6/merged")
    found = [race for key, race in races(result).items() if key in wanted and race["samples"]]
    for axes, race in zip(figure.subplots(1, max(1, len(found)), squeeze=False)[0], found, strict=False):
        _bars(axes, race, race["title"])
    figure.set_size_inches(5.2 * max(1, len(found)), 4.5)
    return bool(found)


def _layers(result: Mapping[str, Any], figure: Any) -> bool:
    """Lines over the number of tokens, one panel for each shape and dtype of B1."""
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for race in result["races"]:
        if race["case"] == "B1" and race["samples"]:
            about = race["about"]
            panels.setdefault((f"{about['out']}x{about['in']}", about["dtype"]), []).append(race)
    panels = {key: of for key, of in panels.items() if len(of) > 1}
    if not panels:
        return False
    columns = min(4, len(panels))
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
    figure.set_size_inches(3.6 * columns, 2.9 * len(grid))
    for axes, ((shape, dtype), of) in zip(grid.flat, panels.items(), strict=False):
        for name in (LORA, LORA_BASE_DTYPE, AUTO, "SVF merged", NARROW, "SVF factored", TRUNCATED):
            points = [(race["about"]["tokens"], ratio(race["samples"], name, "base")) for race in of]
            seen: list[tuple[int, Ratio]] = [(tokens, r) for tokens, r in points if r is not None]
            if seen:
                style = "--" if name.startswith("LoRA") else "-"
                axes.plot(
                    [t for t, _ in seen], [r.median for _, r in seen], style, marker="o", markersize=3, label=name
                )
        axes.set_xscale("log", base=2)
        axes.set_title(f"{shape}, {dtype}", fontsize=9)
        axes.set_xlabel("tokens")
        axes.set_ylabel("time over the bare layer")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return True


def write(path: Path) -> Path:
    """Write the page and its figures beside a result file; returns the page."""
    result = json.loads(path.read_text(encoding="utf-8"))
    out = path.with_suffix(".md")
    out.write_text(page(result, figures(result, path.with_suffix(""))), encoding="utf-8")
    return out


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("Usage: python benchmarks/speed/report.py RESULT.json ...")
    for argument in sys.argv[1:]:
        print(f"Wrote {write(Path(argument))}")
