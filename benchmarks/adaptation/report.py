# SPDX-License-Identifier: Apache-2.0
"""
Result files of this folder -> docs/results/adaptation.md with its figures. Every number comes from a result file.

    python benchmarks/adaptation/report.py [FOLDER]     # default: results/<hash of the experts as they are now>
"""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import few_shot
import selection
import transfer
from common import FOLDERS, HERE, ROOT, paired, results_folder
from dispatch import FIT, SOURCES, UNSEEN, WAYS

from peft_svf import Mixture
from peft_svf.plots import draw_alpha, draw_decisions, draw_layers, draw_search, new_figure

PAGE = ROOT / "docs" / "results" / "adaptation.md"
NOT_RUN = "not run"
DRAWN_WAYS = ("names", "names, content-free", "prompt", "classifier", "probe")
OTHER_SHAPE = "other_shape/"  # a folder in that of the results, and what begins their names here
MIXED_AT_MOST = 1.3  # of the base's time, as benchmarks/speed asks of decoding with a mixture for each row
POPULATION_AT_LEAST = 3.0  # times faster than one candidate at a time
DRAWN = ("cem_unchecked", 5, 0)  # the search in the figures
TITLES = {"svamp": "SVAMP", "arc_challenge": "ARC-Challenge", "math": "MATH-500", "humaneval": "HumanEval"}
TITLES |= {"cem_unchecked": "cem, unchecked", "per_layer": "gradient, per layer"}
Results = Mapping[str, dict[str, Any]]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def with_gain(result: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Accuracy, and its paired gain on the base."""
    if result is None:
        return NOT_RUN
    if base is None:
        return f"{result['accuracy']:.3f}"
    gain, half = paired(result, base)
    return f"{result['accuracy']:.3f} ({gain:+.3f} ± {half:.3f})"


def dispatch_part(found: Results) -> list[str]:
    lines = ["## First pass: which kind of question?", ""]
    results = {way: found.get(f"dispatch-{way.replace(', ', '-')}") for way in WAYS}
    cost = found.get("dispatch-cost", {}).get("ways", {})
    rows = []
    for way, result in results.items():
        priced = cost.get(way if "fit" not in WAYS[way] else way.partition(",")[0])
        share = f"{priced['share']:.0%} ({priced['first_pass_ms']:.0f} ms)" if priced else NOT_RUN
        if result is None:
            rows.append([way, NOT_RUN, "", "", share])
            continue
        low, high = result["interval"]
        accuracy = f"{result['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([way, accuracy, f"{result['ece']:.3f}", f"{result['brier']:.3f}", share])
    there = {way: result for way, result in results.items() if result}
    if there:
        n = next(iter(there.values()))["n"]
        lines += [
            f"{n} held-out questions, as many of each kind (code, math, reasoning, other); chance is 0.250. "
            "ECE is the calibration error in ten bins, the Brier score goes from 0 to 2. The "
            "share is that of pass 1 in the CPU time to the first token, for single requests.",
            "",
        ]
    lines += table(["first pass", "accuracy, 95 %", "ECE", "Brier", "share of time to first token"], rows)
    if there:
        lines += ["By source of the question (right of asked):", ""]
        head = ["source", "kind", "in the classifier's training", *there]
        body = []
        for source, kind in SOURCES.items():
            counts = [r["right_of_source"].get(source, [0, 0]) for r in there.values()]
            seen = "no" if source in UNSEEN else "other templates" if source == "everyday" else "its training split"
            body.append([source, kind, seen, *(f"{right}/{n}" for right, n in counts)])
        lines += table(head, body)
        drawn = {way: result for way, result in there.items() if way in DRAWN_WAYS}
        figure, axes = new_figure(len(drawn))
        for panel, (way, result) in zip(axes, drawn.items(), strict=True):
            draw_decisions(panel, dict(sorted(result["confusion"].items())), way)
        lines += [save(figure, "dispatch", "Confusion of each first pass"), ""]
    if settings := found.get("dispatch-probe_settings"):
        tried = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in settings["validation accuracy"].items())
        lines += [
            f"The probe reads layer {settings['layer']} of {settings['layers']}, as the library does, by "
            f"{settings['method']}, chosen on {settings['n']} validation questions after fitting on {FIT} others of "
            f"each kind: {tried}.",
            "",
        ]
    if fitted := results["prompt, temperature"]:
        lines += [
            f"The temperature {fitted['temperature']:.2f} and what is fitted to labelled questions saw the same {FIT} "
            "of each kind, batch calibration their texts alone.",
            "",
        ]
    return lines


def few_shot_part(found: Results) -> list[str]:
    def cell(task: str, way: str) -> dict[str, Any] | None:
        return found.get(few_shot.name_of(task, way))

    lines = [
        "## Tasks that no expert was trained on",
        "",
        'Accuracy in choice form, with the paired gain on the base and its 95 % interval. "Prompt" and '
        '"classifier" answer each question by the expert that this first pass chooses for it. Of searches the mean '
        'over the draws of examples that were run, and their range; the gain is that of the first draw. "Best single '
        'expert" is one for all tasks, "oracle" the best of base and experts for each task: both are chosen on the '
        "test rows, so no method could know them. Searches draw populations of "
        f"{few_shot.SEARCH['population']} (the gradient climbs from five points at once) and end after "
        f"{few_shot.SEARCH['iterations']} of them, or before {few_shot.SEARCH['max_tokens']:,} tokens are read "
        f"({few_shot.BACKWARD['max_tokens']:,} with gradients). The result is checked by leaving one example out at a "
        "time, and given up for base or best expert if it is no better; where it says unchecked, it is taken.",
        "",
    ]
    tasks = list(few_shot.TASKS)
    bases = {task: cell(task, "base") for task in tasks}
    rows = [["test rows", *(str(bases[t]["n"]) if bases[t] else "" for t in tasks)]]
    rows.append(["base", *(with_gain(bases[t], None) for t in tasks)])
    rows += [[way, *(with_gain(cell(t, way), bases[t]) for t in tasks)] for way in FOLDERS]
    complete = {t: {w: cell(t, w) for w in few_shot.ALONE} for t in tasks if all(cell(t, w) for w in few_shot.ALONE)}
    if complete:
        mean = {w: statistics.mean(of[w]["accuracy"] for of in complete.values()) for w in FOLDERS}
        best = max(mean, key=lambda way: mean[way])
        oracle = {t: max(of, key=lambda way: of[way]["accuracy"]) for t, of in complete.items()}
        rows.append([f"best single expert: {best}", *(with_gain(cell(t, best), bases[t]) for t in tasks)])
        shown = [f"{with_gain(cell(t, oracle[t]), bases[t])}: {oracle[t]}" if t in oracle else NOT_RUN for t in tasks]
        rows.append(["oracle", *shown])
    ways = ("uniform", *few_shot.FIRST_PASSES)
    rows += [[way, *(with_gain(cell(t, way), bases[t]) for t in tasks)] for way in ways]
    costs = []
    for method, shots in [*few_shot.SEARCHES, ("per_layer", max(few_shot.SHOTS))]:
        title = f"{TITLES.get(method, method)}, {shots} examples"
        names = [few_shot.search_name(method, shots, draw) for draw in range(few_shot.DRAWS)]
        draws = {task: [cell(task, name) for name in names] for task in tasks}
        rows.append([title, *(of_draws(draws[t], bases[t]) for t in tasks)])
        if done := [result for results in draws.values() for result in results if result]:
            costs.append([title, *cost_of(done)])
    lines += table(["", *(TITLES[t] for t in tasks)], rows)
    if costs:
        head = ["search", "CPU seconds, mean", "tokens read, mean", "tokens generated", "fell back", "runs"]
        lines += ["What adapting costs, over all tasks and draws that were run:", "", *table(head, costs)]
    passes = [r for t in tasks for w in few_shot.FIRST_PASSES if (r := cell(t, w))]
    if passes:
        each = statistics.mean(r["adapting_cpu_seconds"] / r["n"] for r in passes)
        lines += [f"The first pass by prompt or classifier takes {each:.2f} CPU seconds a question, in batches.", ""]
    shown = {t: result for t in tasks if (result := cell(t, few_shot.search_name(*DRAWN)))}
    if shown:
        weights, axes = new_figure(len(shown))
        course, curves = new_figure(len(shown))
        for bar, curve, (task, result) in zip(axes, curves, shown.items(), strict=True):
            mixture = Mixture(**result["mixture"])
            draw_alpha(bar, mixture)
            draw_search(curve, mixture)
            bar.set_title(TITLES[task])
            curve.set_title(TITLES[task])
        lines += [save(weights, "weights", "Weights that CEM found on 5 examples, unchecked, first draw"), ""]
        lines += [save(course, "curve", "Course of these searches"), ""]
    layered = {t: r for t in tasks if (r := cell(t, few_shot.search_name("per_layer", max(few_shot.SHOTS), 0)))}
    if drawable := {t: r["mixture"]["provenance"]["layers"] for t, r in layered.items()}:
        figure, axes = new_figure(len(drawable), height=5.0)
        for panel, (task, layers) in zip(axes, drawable.items(), strict=True):
            draw_layers(panel, layers, TITLES[task])
        lines += [save(figure, "layers", "Weights per layer that the gradient found on 10 examples, first draw"), ""]
    return lines


def selection_part(found: Results) -> list[str]:
    """What a few examples can choose, over many draws of them."""
    cells = {task: found.get(f"selection-{task}") for task in selection.POOL}
    lines = [
        "## What a few examples can choose, and what should check them",
        "",
        f"A search tells this for one draw of examples; here {selection.DRAWS} draws choose among the same "
        f"{len(selection.MIXTURES)} mixtures (base, experts, halves, sums), whose answers to all rows are known. Mean "
        "gain on the base over the rows that were not drawn; in brackets the share of draws that end worse than the "
        "base. Scores are the share of right choices, ties by the log-probability of the right one at temperature T. "
        "The best of the mixtures on all rows is what no choice can beat.",
        "",
    ]
    for task, cell in cells.items():
        if cell is None:
            lines += [f"{TITLES[task]}: {NOT_RUN}.", ""]
            continue
        table_of, rows = selection.compare(cell), []
        for check, title in (("leave-one-out", "leave-one-out"), ("0.25", "a quarter held out"), ("0", "unchecked")):
            for temperature in selection.TEMPERATURES:
                entries = [table_of.get((check, temperature, count)) for count in selection.SHOTS]
                shown = [f"{e['gain']:+.3f} ({e['worse']:.0%})" if e else "" for e in entries]
                rows.append([f"{title}, T = {temperature:g}", *shown])
        best, n = selection.best(cell), len(cell["labels"])
        lines += [f"{TITLES[task]}, {n} rows; base {best['base']:.3f}, best mixture {best['best']:.3f}:", ""]
        lines += table(["", *(f"{count} examples" for count in selection.SHOTS)], rows)
    return lines


def of_draws(results: list[dict[str, Any] | None], base: dict[str, Any] | None) -> str:
    done = [result for result in results if result]
    if len(done) < 2:
        return with_gain(done[0] if done else None, base)
    accuracies = [result["accuracy"] for result in done]
    gain = f"; {with_gain(results[0], base).partition(' ')[2].strip('()')}" if results[0] and base else ""
    return (
        f"{statistics.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f}, {len(done)} draws{gain})"
    )


def cost_of(done: list[dict[str, Any]]) -> list[str]:
    checks = [result["mixture"]["provenance"]["held_out"] for result in done]
    checked = [check for check in checks if check["examples"]]
    fell = sum(check["fell_back"] is not None for check in checked)
    return [
        f"{statistics.mean(result['adapting_cpu_seconds'] for result in done):.0f}",
        f"{statistics.mean(result['tokens_read'] for result in done):,.0f}",
        str(sum(result["tokens_generated"] for result in done)),
        f"{fell} of {len(checked)}" if checked else "not checked",
        str(len(done)),
    ]


def mixed_part(found: Results) -> list[str]:
    lines = ["## Eight requests with eight mixtures in one batch", ""]
    result = found.get("mixed_batch")
    if result is None:
        return [*lines, "Not run.", ""]
    lines += [
        f"Float32, {result['new_tokens']} new tokens each: {result['same_text_as_one_by_one']} of {result['rows']} "
        f"texts are equal to those of the requests one by one; {result['other_text_than_the_base']} differ from the "
        "base model's. CPU time of the whole batch:",
        "",
    ]
    least = {way: min(times) for way, times in result["CPU seconds"].items()}
    rows = [[way, f"{seconds:.2f}", f"{result['ratio_to_base'][way]:.2f}"] for way, seconds in least.items()]
    lines += table(["", "seconds", "of the base's"], rows)
    ratio = result["ratio_to_base"]["mixed batch"]
    lines += [f"Nearly the base's speed, at most {MIXED_AT_MOST} of its time: {verdict(ratio <= MIXED_AT_MOST)}.", ""]
    if populations := sorted(HERE.glob("population-*.json")):
        last = json.loads(populations[-1].read_text())
        rows = []
        for form, part in last["results"].items():
            gain = part["ratio"]["one at a time"]
            seconds = [f"{each:.1f}" for each in part["CPU seconds"].values()]
            rows.append([form, *seconds, f"{gain:.1f}x, {verdict(gain >= POPULATION_AT_LEAST)}"])
        ways = list(next(iter(last["results"].values()))["CPU seconds"])
        lines += [f"Scoring a population of mixtures, CPU seconds (`{populations[-1].name}`):", ""]
        lines += table(["", *ways, f"mixed over one at a time, at least {POPULATION_AT_LEAST:g}x"], rows)
    return lines


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def transfer_part(found: Results) -> list[str]:
    lines = [
        "## Experts given to another model",
        "",
        "From SmolLM2-135M to a sibling: the same checkpoint after a short full fine-tuning. It is the only pair of "
        "equal shape that was to be had; models that went their own ways are a harder test. Gains are paired with the "
        "target without an expert.",
        "",
    ]
    sibling = found.get("transfer-sibling")
    if sibling:
        settings, change = sibling["settings"], sibling["relative change of a weight"]
        lines += [
            f"{settings['steps']} steps of {settings['batch']} solved problems ({sibling['data']}), rate "
            f"{settings['rate']:g}, seed {settings['seed']}; loss {statistics.mean(sibling['losses'][:10]):.2f} over "
            f"the first ten steps, {statistics.mean(sibling['losses'][-10:]):.2f} over the last. A weight moved by "
            f"{change['mean']:.2%} of its norm on average.",
            "",
        ]
    tasks = list(transfer.TASKS)

    def cell(task: str, way: str) -> dict[str, Any] | None:
        return found.get(f"transfer-{task}-{way}")

    rows = [["test rows", *(str(base["n"]) if (base := cell(t, "target-base")) else "" for t in tasks)]]
    rows.append(["source, base", *(with_gain(cell(t, "source-base"), None) for t in tasks)])
    gains = [with_gain(cell(t, "source-expert"), cell(t, "source-base")) for t in tasks]
    rows.append(["source, its expert (gain on the source)", *gains])
    for way in ("base", *transfer.WAYS, "few_shot"):
        bases = [cell(t, "target-base") if way != "base" else None for t in tasks]
        shown = [with_gain(cell(t, f"target-{way}"), base) for t, base in zip(tasks, bases, strict=True)]
        rows.append([f"target, {way.replace('_', '-')}", *shown])
    lines += table(["", *tasks], rows)
    cosines = {t: r["mean_abs_cosine"] for t in tasks if "mean_abs_cosine" in (r := cell(t, "target-aligned") or {})}
    if cosines:
        shown = ", ".join(f"{task} {cosine:.3f}" for task, cosine in cosines.items())
        lines += [f"Mean abs(cos) between matched directions: {shown}.", ""]
    return [*lines, *shape_part(found)]


def shape_part(found: Results) -> list[str]:
    """The same experts, interpolated to a model of other widths and depth."""
    there = {name.removeprefix(OTHER_SHAPE): result for name, result in found.items() if name.startswith(OTHER_SHAPE)}
    lines = [
        "### A model of another shape",
        "",
        "Qwen2.5-Coder-0.5B-Instruct has 24 layers where SmolLM2 has 30, and wider ones: z is interpolated over "
        "spectrum and depth. Nothing speaks for its directions meaning the same, so this is the negative control.",
        "",
    ]
    if not there:
        command = "transfer.py --target FOLDER --out results/<this>/other_shape"
        return [*lines, f"It was {NOT_RUN}: `python benchmarks/adaptation/{command}`.", ""]

    def cell(task: str, way: str) -> dict[str, Any] | None:
        return there.get(f"transfer-{task}-target-{way}")

    tasks, ways = list(transfer.TASKS), [way for way in (*transfer.WAYS, "few_shot") if way != "aligned"]
    rows = [["test rows", *(str(base["n"]) if (base := cell(t, "base")) else "" for t in tasks)]]
    rows.append(["base", *(with_gain(cell(t, "base"), None) for t in tasks)])
    rows += [[way.replace("_", "-"), *(with_gain(cell(t, way), cell(t, "base")) for t in tasks)] for way in ways]
    return [*lines, *table(["", *tasks], rows), f"Made by `{next(iter(there.values()))['command']}`.", ""]


def save(figure: Any, name: str, text: str) -> str:
    """Write a figure beside the page; the line that shows it."""
    path = PAGE.with_name(f"adaptation-{name}.png")
    figure.savefig(path)
    return f"![{text}]({path.name})"


def main() -> None:
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else results_folder()
    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    files |= {OTHER_SHAPE + path.stem: path for path in sorted(folder.glob(f"{OTHER_SHAPE}*.json"))}
    found = {name: json.loads(path.read_text()) for name, path in files.items()}
    if not found:
        raise SystemExit(f"There are no results in {folder}: python benchmarks/adaptation/run_all.py")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder.name
    one = next(iter(found.values()))
    lines = [
        "# Adaptation, measured",
        "",
        "SmolLM2-135M-Instruct in bfloat16 on one CPU thread, with the experts of `examples/experts` (code: MBPP, "
        "math: GSM8K, reasoning: ARC-Easy) and the classifier of `examples/classifiers`. Answers are of the choice "
        "form, the likeliest of the given options: answers that a model of this size generates are hardly ever right, "
        "so they would not tell the ways apart.",
        "",
        f"Made by `python benchmarks/adaptation/report.py` from the files in `{shown}`; "
        "`python benchmarks/adaptation/run_all.py --minutes 20` runs what is missing there. A cell that the time did "
        f'not suffice for is "{NOT_RUN}". Versions: '
        + ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        + f"; {one['machine']['cores']} cores, {one['machine']['cpu_capability']}, shared with other work.",
        "",
        *dispatch_part(found),
        *few_shot_part(found),
        *selection_part(found),
        *mixed_part(found),
        *transfer_part(found),
    ]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(f"Wrote {PAGE}")


if __name__ == "__main__":
    main()
