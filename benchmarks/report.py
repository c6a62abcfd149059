# SPDX-License-Identifier: Apache-2.0
"""
Result files -> pages and figures. Nothing is measured here, and no number on a page has another source.

    python benchmarks/report.py                    # docs/results.md
    python benchmarks/report.py FILE.json ...      # the page beside a file of the speed benchmark
"""

import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import formulas
from adaptation import fingerprint
from harness import RESULTS, ROOT, ratio
from learning import CHANGES, Training, read_trainings
from scipy.stats import t as student

from peft_svf.cli.plots import new_figure
from peft_svf.experts.key import SHARE

PAPER = json.loads((RESULTS / "paper.json").read_text())
METHODS = ("svf-mlp", "lora16-mlp", "ia3-mlp", "tinylora-mlp")  # side by side; all else is an ablation
UNSEEN = {"svamp": "SVAMP", "arc_challenge": "ARC-Challenge", "math": "MATH-500", "humaneval": "HumanEval"}
TRANSFER = ("arc_easy", "gsm8k", "mbpp")
FIRST_PASSES = ("probe", "classifier", "prompt", "prompt, fitted", "names", "names, fitted")
SHOTS = (3, 5, 10)
SHIPPED = ROOT / "examples" / "experts"
TIMED = ("B2/mlp", "B2/all", "B4/model", "B6/merged", "B6/beside")  # races of the speed benchmark, and who is shown
CONTESTANTS = (
    "SVF auto", "SVF auto, 8 experts", "SVF narrow", "dense form",
    "LoRA r=16, as shipped", "LoRA r=16, base dtype", "LoRA r=16, 16 adapters",
)  # fmt: skip
NINETY_FIVE = 1.959964  # standard normal
Result = dict[str, Any]


# --- speed


CASES = {
    "B1": "one layer, forward and backward", "B2": "a training step", "B3": "the work of a step beside its tokens",
    "B4": "decoding, a mixture for each row", "B5": "changing the expert", "B6": "generation",
    "B7": "factorising and the basis cache", "B8": "memory", "B9": "exactness", "B10": "exactness",
}  # fmt: skip


def speed_page(path: Path) -> Path:
    """Write the page of a speed run and its figure beside the result file; return the page."""
    result, out = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".md")
    settings, machine = result["settings"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    clock = "CPU time of one thread" if settings["threads"] == 1 else f"wall clock, {settings['threads']} threads"
    lines = [f"# Speed, run of {result['started']}", ""]
    if settings.get("quick") or settings.get("tiny"):
        lines += ["**A quick run: too few repetitions to quote a number from.**", ""]
    lines += [
        f"`{result['command']}` · seed {settings['seed']} · {clock} · {result['seconds']:.0f} s",
        "",
        f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores · {versions}",
        "",
        "A ratio is the median over repetitions of the ratio within a repetition, with its range in brackets; all "
        "contestants of a race run in every repetition, in random order.",
        "",
        *speed_figure(result, path),
    ]
    for case, title in CASES.items():
        races = [race for race in result["races"] if race["case"] == case]
        facts = {key: value for key, value in result["facts"].items() if key.startswith(f"{case}/")}
        lines += [f"## {case}: {title}", ""] if races or facts else []
        for race in races:
            first = next(iter(race["samples"]), "")
            about = ", ".join(f"{key} {value}" for key, value in race["about"].items())
            lines += [f"**{race['title']}** ({about}; {len(race['samples'].get(first, []))} repetitions)", ""]
            rows = [
                [name, f"{1e3 * statistics.median(samples):.3g}", ratio(race["samples"], name, first)]
                for name, samples in race["samples"].items()
            ]
            rows += [[name, "", f"not available: {reason}"] for name, reason in race["not_available"].items()]
            lines += formulas.table(["", "ms", f"over {first}"], rows)
        for key, value in facts.items():
            lines += [f"**{key.partition('/')[2].replace('_', ' ')}**", "", *formulas.table(["", ""], flat(value))]
    out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return out


def flat(value: Any, *names: str) -> list[list[Any]]:
    """List a fact, one number a row; keys of nested dicts are joined."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in flat(inner, *names, key)]
    return [[" ".join(names), value]]


def speed_figure(result: Result, path: Path) -> list[str]:
    """Draw bars of whole operations: steps, decoding, generation."""
    keys = ("B2/mlp", "B2/all", "B4/model", "B6/merged")
    races = [race for race in result["races"] if race["key"] in keys and race["samples"]]
    if not races:
        return []
    figure, panels = new_figure(len(races))
    for axes, race in zip(panels, races, strict=True):
        first, *others = race["samples"]
        for y, name in enumerate(others):
            value = ratio(race["samples"], name, first)
            assert value is not None
            spread = [[value.median - value.low], [value.high - value.median]]
            axes.barh(y, value.median, color="tab:blue" if name.startswith("SVF") else "tab:gray", xerr=spread)
        axes.set_yticks(range(len(others)), others, fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel=f"time over {first}", title=race["title"])
    picture = path.with_name(f"{path.stem}-steps.png")
    figure.savefig(picture)
    return [f"![Time of whole operations over the frozen base's]({picture.name})", ""]


# --- gains


NAMES = {
    "svf": "SVF", "svf_reference": "SVF with the mask of the paper's code", "svf_rank16": "SVF, 16 largest",
    "svf_rank64": "SVF, 64 largest", "lora16": "LoRA r=16", "ia3": "IA3", "tinylora": "TinyLoRA",
}  # fmt: skip
PLACES = {"mlp": "MLP", "qv": "q and v", "both": "MLP, q and v", "all": "all linear"}
LEARNERS = {"reinforce": "", "sft": ", next-token loss", "evolution": ", evolution"}


def mean_and_half(differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """
    Return the mean of paired differences `(k seeds, n rows)` and the half width of its 95 % interval.

    `sqrt((1.96 s_rows / sqrt(n))² + (t s_seeds / sqrt(k))²)`: `s_rows` is the deviation over the test rows of the
    difference averaged over the seeds, `s_seeds` that of the seeds' means, `t` Student's with `k - 1` degrees of
    freedom. One seed has the interval of the rows alone.
    """
    seeds = [statistics.mean(row) for row in differences]
    rows = [statistics.mean(column) for column in zip(*differences, strict=True)]
    half, k = NINETY_FIVE * statistics.pstdev(rows) / math.sqrt(len(rows)), len(seeds)
    if k > 1:
        half = math.hypot(half, float(student.ppf(0.975, k - 1)) * statistics.stdev(seeds) / math.sqrt(k))
    return statistics.mean(seeds), half


def difference(pairs: Sequence[tuple[Result, Result]]) -> tuple[float, float]:
    """Return the gain of results over others, seed by seed on the same rows, and half its 95 % interval."""
    differences = []
    for one, other in pairs:
        before = dict(other["test"]["records"])
        if set(before) != {row for row, _ in one["test"]["records"]}:
            raise SystemExit("Two results were tested on different rows: run one of them again.")
        differences.append([float(right - before[row]) for row, right in one["test"]["records"]])
    return mean_and_half(differences)


def gain(pairs: Sequence[tuple[Result, Result]]) -> str:
    """Write [`difference`] with its interval."""
    mean, half = difference(pairs)
    return f"{mean:+.3f} [{max(-1.0, mean - half):+.3f}, {min(1.0, mean + half):+.3f}]"


def label(training: Any) -> str:
    """Name what a cell trains."""
    method, _, where = training.method.partition("-")
    changed = [name for name in CHANGES if getattr(training, name) != getattr(Training, name)]
    budget = [f"{getattr(training, name)} {name}" for name in changed]
    return ", ".join([f"{NAMES[method]}, {PLACES[where]}{LEARNERS[training.learner]}", *budget])


def chosen_setting(trainings: Sequence[Any], results: Mapping[str, Result]) -> tuple[float, float]:
    """
    Choose the setting of a kind: the highest mean validation reward on the seeds that all its settings have run.

    Of equal settings the one with more seeds wins, then the lower one.
    """
    seeds: dict[tuple[float, float], dict[int, float]] = {s: {} for s in sorted({t.setting for t in trainings})}
    for t in trainings:
        seeds[t.setting][t.seed] = results[t.name]["best_validation"]
    shared = set.intersection(*map(set, seeds.values()))

    def rank(setting: tuple[float, float]) -> tuple[float, int]:
        rewards = [reward for seed, reward in seeds[setting].items() if seed in shared or not shared]
        return statistics.mean(rewards), len(seeds[setting])

    return max(seeds, key=rank)


def written(setting: tuple[float, float]) -> str:
    """Write a learning rate and a temperature."""
    return f"{setting[0]:g}" + (f", T = {setting[1]:g}" if setting[1] != 1 else "")


def verdict(pairs: Sequence[tuple[Result, Result]]) -> str:
    """Say what the interval of [`gain`] allows; a single seed allows nothing about seeds."""
    mean, half = difference(pairs)
    seen = "better" if mean - half > 0 else "worse" if mean + half < 0 else "open"
    return seen if len(pairs) > 1 else f"{seen}, one seed"


# --- docs/results.md: one function for each table of results_page.md


def published(part: str) -> str:
    """Write a table of the paper, each figure over its base's in parentheses."""
    rows: list[list[str]] = []
    base: list[float] = []
    for name, *figures in PAPER[part]["rows"]:
        base = base if name.startswith("+") else figures
        ratios = ["" if base is figures else f" ({x / y:.2f})" for x, y in zip(figures, base, strict=True)]
        rows.append([name, *(f"{x:.2f}{ratio}" for x, ratio in zip(figures, ratios, strict=True))])
    return written_table(["", *PAPER[part]["tasks"]], rows)


def generated_tables(results: Mapping[str, Result]) -> dict[str, str]:
    """Show every cell of generated.py, its seeds together, beside the base and LoRA with the same budget."""
    kinds: dict[tuple[Any, ...], dict[int, Result]] = {}
    for r in comparable(results):
        t = r["training"]
        learner = "right answers" if t.get("learner") == "sft" else "rewards"
        budget = (t["steps"], t["questions"], t["samples"], t.get("retained", 3), t.get("retain", 0.0))
        kinds.setdefault((t["task"], learner, budget, t["method"], t["lr"]), {})[t["seed"]] = r
    rows, verdicts = [], defaultdict[str, list[str]](list)
    for (task, learner, budget, method, lr), seeds in sorted(kinds.items()):
        base, where = results[f"{task}-base"], (task, learner, budget, method.replace("svf", "lora16"))
        lora = best_lora(kinds, where) if "svf" in method else {}
        pairs, rivals = [(r, base) for r in seeds.values()], [(r, lora[s]) for s, r in seeds.items() if s in lora]
        if "svf" in method:
            verdicts[f"over the base {verdict(pairs)}"].append(task)
        if rivals:
            verdicts[f"over LoRA {verdict(rivals)}"].append(task)
        right = ", ".join(f"{r['test']['accuracy']:.3f}" for r in seeds.values())
        fall = statistics.mean(r["everyday"]["mean_logp"] / base["everyday"]["mean_logp"] - 1 for r in seeds.values())
        mentions = statistics.mean(r["test"]["mentions"] for r in seeds.values())
        rows.append([
            task, learner, f"{method}, lr {lr:g}, {' × '.join(map(str, budget[:3]))}",
            f"{max(r.get('trainable', 0) for r in seeds.values()):,}",
            f"{base['test']['accuracy']:.3f} ({base['test']['mentions']:.3f})", f"{right} ({mentions:.3f})",
            gain(pairs), verdict(pairs), gain(rivals) if rivals else "", f"{fall:.1%}",
        ])  # fmt: skip
    head = [
        "task",
        "learned from",
        "method",
        "numbers",
        "base",
        "right, by seed",
        "gain, 95 %",
        "verdict",
        "over LoRA",
        "fall",
    ]
    shipped = [(path.parent.name, json.loads(path.read_text())) for path in SHIPPED.glob("*/result.json")]
    return {
        "generated": written_table(head, rows),
        "verdicts": "\n".join(
            f"- SVF {kind}: {', '.join(f'{t} ({n})' if n > 1 else t for t, n in Counter(tasks).items())}"
            for kind, tasks in sorted(verdicts.items())
        ),
        "shipped": "; ".join(
            f"*{name}* {r['base']['accuracy']:.3f} to {r['expert']['accuracy']:.3f}" for name, r in sorted(shipped)
        ),
    }  # fmt: skip


def comparable(results: Mapping[str, Result], really: bool = True) -> list[Result]:
    """Return the trained cells whose test requests are their base's, or the others: texts can change, ids stay."""
    chosen = []
    for r in (r for r in results.values() if r["training"]["method"] != "base"):
        tests = [other["test"] for other in (r, results.get(f"{r['training']['task']}-base")) if other]
        asked = [([row[0] for row in test["records"]], [text[0] for text in test["texts"]]) for test in tests]
        if (len(asked) == 2 and asked[0] == asked[1]) is really:
            chosen.append(r)
    return chosen


def best_lora(kinds: Mapping[tuple[Any, ...], dict[int, Result]], where: tuple[Any, ...]) -> dict[int, Result]:
    """Return the seeds of the LoRA that was trained on the same with the same budget, at its best validated rate."""
    rates = [seeds for (*place, _), seeds in kinds.items() if tuple(place) == where]
    return max(rates, key=lambda s: statistics.mean(r.get("best_validation", 0) for r in s.values()), default={})


def choice_tables(trainings: Sequence[Any], results: Mapping[str, Result]) -> dict[str, str]:
    """Show the choice form of learning.py: methods side by side, and what differs from SVF in one respect."""
    tables: dict[str, list[Any]] = {"choices": [], "ablations": []}
    for task in dict.fromkeys(t.task for t in trainings):
        base = results[f"{task}-base"]
        done = [t for t in trainings if t.task == task and t.method != "base" and t.name in results]
        kinds = {t.kind: t for t in done}
        settings = {kind: chosen_setting([t for t in done if t.kind == kind], results) for kind in kinds}
        seeds = {k: {t.seed: results[t.name] for t in done if (t.kind, t.setting) == (k, settings[k])} for k in kinds}
        for kind, training in kinds.items():
            runs, lora = seeds[kind], seeds.get("lora16-mlp", {}) if kind != "lora16-mlp" else {}
            pairs, rivals = [(r, base) for r in runs.values()], [(r, lora[s]) for s, r in runs.items() if s in lora]
            tables["choices" if kind in METHODS else "ablations"].append([
                task, label(training), f"{max(r['trainable'] for r in runs.values()):,}", written(settings[kind]),
                len(runs), f"{base['test']['accuracy']:.3f}",
                f"{statistics.mean(r['test']['accuracy'] for r in runs.values()):.3f}", gain(pairs), verdict(pairs),
                gain(rivals) if rivals else "",
            ])  # fmt: skip
    head = ["task", "method", "numbers", "lr", "seeds", "base", "right", "gain, 95 %", "verdict", "over LoRA, MLP"]
    missing = [f"`{t.name}`" for t in trainings if t.name not in results]
    planned = f"- Planned cells of `learning_cells.json`: {', '.join(missing)}." if missing else ""
    return {name: written_table(head, rows) for name, rows in tables.items()} | {"missing": planned}


def unseen_tables(results: Mapping[str, Result]) -> dict[str, str]:
    """Show first passes, and experts and routed answers on tasks that no expert was trained on."""
    cost, keys, rows = results["dispatch-cost"]["ways"], results["routing/keys"], []
    models = {"": keys, "Qwen2.5-Coder-0.5B, ": results.get("routing/qwen")}
    for model, judged in ((m, r) for m, r in models.items() if r):
        most = max(row["prompts"] for row in judged["rows"])
        for r in (r for r in judged["rows"] if (r["pooling"], r["prompts"]) == ("both", most)):
            spread = [draw["accuracy"] for draw in r["draws"]]
            accuracy = f"{r['accuracy']:.3f} [{min(spread):.3f}, {max(spread):.3f}]"
            name = f"{model}keys, {r['block']} of {judged['blocks']} blocks, {r['prompts']} prompts"
            name += "" if "constant" in judged else " (shrunken covariance)"
            rows.append([name, accuracy, f"{r['ece']:.3f}", f"{r['claimed']:.1%}", ""])
    block = keys["blocks"] // SHARE
    default = next(r for r in keys["rows"] if (r["block"], r["pooling"], r["prompts"]) == (block, "both", 64))
    counts = {name: [draw["right_of_source"][name] for draw in default["draws"]] for name in UNSEEN}
    failing = (f"{UNSEEN[n]} {sum(r for r, _ in c)} of {sum(n for _, n in c)}" for n, c in counts.items())
    tried = [r for r in keys["constants"] if r["block"] == block]
    ways = {r["way"]: r for name, r in results.items() if name.startswith("dispatch-") and "way" in r}
    for way in FIRST_PASSES:
        accuracy = "{:.3f} [{:.3f}, {:.3f}]".format(ways[way]["accuracy"], *ways[way]["interval"])
        rows.append([way, accuracy, f"{ways[way]['ece']:.3f}", "", f"{cost[way]['share']:.0%}" if way in cost else ""])
    answers = []
    for way in ("base", "code", "math", "reasoning", "uniform", "prompt", "classifier"):
        cells = [(results.get(f"few_shot-{task}-{way}"), results[f"few_shot-{task}-base"]) for task in UNSEEN]
        answers.append([way, *(with_gain(*pair) for pair in cells)])
    sizes = ["questions", *(results[f"few_shot-{task}-base"]["n"] for task in UNSEEN)]
    ttft = [r for name, r in results.items() if name.startswith("routing/ttft-")]
    memory = results["routing/memory"]
    tokens = [(part, r) for part in ("first", "second", "later") for r in ttft]
    parts = [(f"{part}, {r['rows']} at once", r["over_base"][part]) for part, r in tokens]
    contestants = [way for way in (parts[0][1] if parts else ()) if way != "base"]
    slower = [[way, *("{:.2f} [{:.2f}, {:.2f}]".format(*part[way]) for _, part in parts)] for way in contestants]
    chosen = json.loads((RESULTS / "demo" / "routing.json").read_text())["chosen"].items()
    return {
        "first_passes": written_table(
            ["first pass", "accuracy", "calibration error", "claimed", "share of time"], rows
        ),
        "far_away": str(sum(keys["far_away"].values())),
        "unseen": written_table(["", *UNSEEN.values()], [sizes, *answers]),
        "failing": ", ".join(failing),
        "constants": "; ".join(
            f"{n} prompts "
            + ", ".join(
                f"{r['constant']:g}: {r['accuracy']:.3f} and {r['claimed']:.1%}" for r in tried if r["prompts"] == n
            )
            + f", shrunken covariance {next(r['covariance'] for r in tried if r['prompts'] == n):.3f}"
            for n in sorted({r["prompts"] for r in tried})
        ),
        "covariance": ", ".join(
            f"{statistics.mean(r['covariance']):.3f} with {r['block']} blocks"
            for r in keys["rows"]
            if (r["pooling"], r["prompts"]) == ("both", 64)
        ),
        "first_token": written_table(["", *(name for name, _ in parts)], slower),
        "memory": f"{memory['rows']} prompts of at most {memory['tokens']} tokens takes {memory['early_exit_mb']:.0f} "
        f"MB at its peak beyond the model, the base's own first token {memory['base_mb']:.0f} MB",
        "machine_ttft": ", ".join({r["machine"]["processor"] for r in ttft}),
        "routing": "; ".join(
            f"*{kind}* " + ", ".join(f"{name} {count}" for name, count in counts.items()) for kind, counts in chosen
        ),
    }


def few_shot_tables(results: Mapping[str, Result]) -> dict[str, str]:
    """Show the mixtures that searches find, with what they reach, by number of examples."""
    rows = []
    for name, r in results.items():
        if name.startswith("few_shot-") and "settings" in r:
            task, method, shots, draw = name.removeprefix("few_shot-").rsplit("-", 3)
            base = results[f"few_shot-{task}-base"]
            rows.append([UNSEEN[task], int(shots), method.replace("_", ", "), int(draw), *reached(r, base)])
    rows.sort(key=lambda row: row[:4])
    for task in TRANSFER:
        r, base = (results[f"transfer-{task}-target-{way}"] for way in ("few_shot", "base"))
        rows.append([f"{task}, on the sibling model", "", "cem", 0, *reached(r, base)])
    guess, guesses = results["routing/few_shot"]["rows"], []
    for task in dict.fromkeys(r["task"] for r in guess):
        counts = [Counter(r["chosen"] for r in guess if (r["task"], r["examples"]) == (task, n)) for n in SHOTS]
        guesses.append([UNSEEN[task], *(", ".join(f"{name} {k}" for name, k in c.most_common()) for c in counts)])
    return {
        "few_shot": written_table(["task", "examples", "search", "draw", "weights", "right", "CPU s"], rows),
        "guesses": written_table(["", *(f"{n} examples" for n in SHOTS)], guesses),
    }


def reached(result: Result, base: Result) -> list[str]:
    """Write a mixture, what it reaches, and the seconds of its search."""
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in result["alpha"].items())
    return [weights or "base", with_gain(result, base), f"{result['adapting_cpu_seconds']:.0f}"]


def transfer_table(results: Mapping[str, Result], place: str = "") -> str:
    """Show what experts do on another model."""
    bases = [results[f"{place}transfer-{task}-target-base"] for task in TRANSFER]
    rows = []
    for way in ("base", "ordered", "shuffled-0", "shuffled-1", "shuffled-2", "aligned", "few_shot"):
        cells = [results.get(f"{place}transfer-{task}-target-{way}") for task in TRANSFER]
        rows += [[way, *map(with_gain, cells, bases)]] * any(cells)
    return written_table(["", *TRANSFER], rows)


def cost_tables(mixed: Result, speeds: Mapping[str, Result]) -> dict[str, str]:
    """Show numbers and bytes on Llama-3-8B, and times beside LoRA's."""
    sizes, times = [], []
    for name in ("q, v", "MLP", "all linear"):
        shapes = formulas.weights(formulas.LLAMA_3_8B, formulas.TARGETS[name])
        svf, hours = formulas.svf_parameters(shapes), f"{formulas.eigh_seconds(shapes) / 3600:.2g}"
        numbers = [f"{svf:,}", f"{formulas.lora_parameters(shapes):,}"]
        sizes.append([name, *numbers, *map(formulas.human, (4 * svf, formulas.basis_bytes(shapes))), hours])
    for name, speed in speeds.items():
        for r in (r for r in speed["races"] if r["key"] in TIMED):
            first, *others = r["samples"]
            ratios = [f"{way} {ratio(r['samples'], way, first).median:.2f}" for way in others if way in CONTESTANTS]
            times.append([r["title"], speed["machine"]["processor"].split(" @")[0], f"`{name}`", "; ".join(ratios)])
    over = mixed["ratio_to_base"]["mixed batch"]
    return {
        "sizes": written_table(["weights", "SVF", "LoRA r=16", "an expert", "bases", "hours"], sizes),
        "times": written_table(["", "processor", "file", "over the base"], sorted(times)),
        "mixed_batch": f"{mixed['same_text_as_one_by_one']} of {mixed['rows']} get the text that they get one by one, "
        f"in {over:.2f}",
    }  # fmt: skip


def results_page() -> str:
    """Fill benchmarks/results_page.md with the tables of the files."""
    folder = RESULTS / "adaptation" / fingerprint()
    adaptation = read(folder) | {f"routing/{name}": r for name, r in read(folder.with_name("routing")).items()}
    generated = read(RESULTS / "generated")
    tables = {f"paper_{part}": published(part) for part in ("trained", "unseen", "transfer")}
    tables |= generated_tables(generated) | choice_tables(read_trainings(), read(RESULTS / "learning"))
    tables |= unseen_tables(adaptation) | few_shot_tables(adaptation)
    tables |= cost_tables(adaptation["mixed_batch"], read(RESULTS / "speed"))
    tables |= {"transfer": transfer_table(adaptation), "transfer_other": transfer_table(adaptation, "other_shape/")}
    if stale := [f"`{r['cell']}`" for r in comparable(generated, really=False)]:
        tables["missing"] += f"\n- Left out, because the test requests have changed since: {', '.join(stale)}."
    return Template((ROOT / "benchmarks" / "results_page.md").read_text()).substitute(tables).rstrip() + "\n"


def written_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a Markdown table."""
    return "\n".join(formulas.table(head, rows))


def with_gain(result: Result | None, base: Result | None) -> str:
    """Write an accuracy and its paired gain on the base."""
    if result is None or base is None or base is result:
        return "" if result is None else f"{result['accuracy']:.3f}"
    before = dict(base["records"])
    mean, half = mean_and_half([[right - before[row] for row, right in result["records"]]])
    return f"{result['accuracy']:.3f} ({mean:+.3f} ± {half:.3f})"


def read(folder: Path) -> dict[str, Result]:
    """Read the result files below a folder, by name."""
    paths = sorted(folder.rglob("*.json"))
    return {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text()) for path in paths}


def main() -> None:
    """Write the page, or those of speed runs."""
    if len(sys.argv) > 1:
        print(*(speed_page(Path(name)) for name in sys.argv[1:]))
        return
    (ROOT / "docs" / "results.md").write_text(results_page())
    print("Wrote docs/results.md")


if __name__ == "__main__":
    main()
