# SPDX-License-Identifier: Apache-2.0
"""
Result files -> pages and figures. Nothing is measured here, and no number on a page has another source.

    python benchmarks/report.py                    # docs/results/learning.md, generated.md and adaptation.md
    python benchmarks/report.py FILE.json ...      # the page beside a file of the speed benchmark
"""

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptation import fingerprint
from formulas import table
from harness import RESULTS, ROOT, ratio
from learning import CHANGES, Training, read_trainings
from scipy.stats import t as student

from peft_svf.cli.plots import draw_decisions, new_figure

PAGES = ROOT / "docs" / "results"
NINETY_FIVE = 1.959964  # standard normal
Result = dict[str, Any]


def save(figure: Any, path: Path, text: str) -> list[str]:
    """Write a figure beside its page and return the lines that show it."""
    figure.savefig(path)
    return [f"![{text}]({path.name})", ""]


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
            lines += table(["", "ms", f"over {first}"], rows)
        for key, value in facts.items():
            lines += [f"**{key.partition('/')[2].replace('_', ' ')}**", "", *table(["", ""], flat(value))]
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
    return save(figure, path.with_name(f"{path.stem}-steps.png"), "Time of whole operations over the frozen base's")


# --- learning


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


def gain(pairs: Sequence[tuple[Result, Result]]) -> str:
    """Write the gain of results over others, seed by seed on the same rows."""
    differences = []
    for one, other in pairs:
        before = dict(other["test"]["records"])
        if set(before) != {row for row, _ in one["test"]["records"]}:
            raise SystemExit("Two results were tested on different rows: run one of them again.")
        differences.append([float(right - before[row]) for row, right in one["test"]["records"]])
    mean, half = mean_and_half(differences)
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


def learning_page(trainings: Sequence[Any], results: Mapping[str, Result], folder: Path) -> str:
    """Write the page of the learning benchmark; figures go into the folder."""
    lines = [
        "# Does it learn?", "",
        "SmolLM2-135M-Instruct in bfloat16 on a CPU, choice form: the policy is a softmax over log-likelihoods of "
        f"the given answers. All methods see the same questions in the same order, {Training.steps} steps of "
        f"{Training.questions} questions unless the table shows others, {Training.samples} sampled answers a question "
        "(reward +1 or -1, the mean of the others as baseline), and the same test rows. T is the temperature of the "
        "policy, 1 unless it is given. Validation chooses learning rate, temperature and checkpoint; the test split "
        "chooses nothing. Gains are paired over test rows, with 95 % intervals that include the spread of seeds.", "",
        "Made by `python benchmarks/report.py` from `benchmarks/results/learning/`; `python benchmarks/learning.py` "
        "runs the missing cells.", "",
    ]  # fmt: skip
    for task in dict.fromkeys(training.task for training in trainings):
        of_task = [t for t in trainings if t.task == task and t.method != "base"]
        base, done = results.get(f"{task}-base"), [t for t in of_task if t.name in results]
        lines += [f"## {task}", ""]
        if base is None or not done:
            lines += ["Not run.", ""]
            continue
        low, high = base["test"]["interval"]
        lines += [f"Base {base['test']['accuracy']:.3f} [{low:.3f}, {high:.3f}], n = {base['test']['n']}.", ""]
        kinds = {t.kind: t for t in done}
        settings = {kind: chosen_setting([t for t in done if t.kind == kind], results) for kind in kinds}
        seeds = {k: {t.seed: results[t.name] for t in done if (t.kind, t.setting) == (k, settings[k])} for k in kinds}
        rows = []
        for kind, training in kinds.items():
            runs, lora = seeds[kind], seeds.get("lora16-mlp", {}) if kind != "lora16-mlp" else {}
            both = [(runs[seed], lora[seed]) for seed in sorted(runs.keys() & lora.keys())]
            accuracy = f"{statistics.mean(r['test']['accuracy'] for r in runs.values()):.3f}"
            trained = f"{max(r['trainable'] for r in runs.values()):,}"
            gains = gain([(r, base) for r in runs.values()]), gain(both) if both else ""
            rows.append([label(training), trained, written(settings[kind]), len(runs), accuracy, *gains])
        head = ["method", "trained numbers", "lr", "seeds", "test", "gain on the base", "gain on LoRA r=16, MLP"]
        lines += [*table(head, rows), "Every cell; * marks the setting that validation chose:", ""]
        rows = []
        for t in of_task:
            r, row = results.get(t.name), [label(t), written(t.setting), t.seed]
            if r is None:
                rows.append([*row, "not run", "", "", "", ""])
                continue
            row[1] += " *" if t.setting == settings[t.kind] else ""
            tokens = max((entry.get("tokens", 0) for entry in r["curve"]), default=0)
            shown = f"{(r['best_validation'] + 1) / 2:.3f}", f"{r['test']['accuracy']:.3f}", gain([(r, base)])
            rows.append([*row, r["best_step"], *shown, f"{tokens:,}" if tokens else ""])
        head = ["method", "lr", "seed", "best step", "validation", "test", "gain on the base", "tokens read"]
        lines += table(head, rows) + curves(done, settings, results, folder / f"learning-{task}.png")
    return "\n".join(lines).rstrip() + "\n"


def written(setting: tuple[float, float]) -> str:
    """Write a learning rate and a temperature."""
    return f"{setting[0]:g}" + (f", T = {setting[1]:g}" if setting[1] != 1 else "")


def curves(done: Sequence[Any], settings: Mapping[str, Any], results: Mapping[str, Result], path: Path) -> list[str]:
    """Draw validation accuracy by optimizer step; chosen settings are strong, others faint."""
    figure, (axes,) = new_figure(1, height=6.0)
    kinds = list(dict.fromkeys(t.kind for t in done))
    for t in done:
        strong, i = t.setting == settings[t.kind], kinds.index(t.kind)
        points = [(e["step"], (e["eval_reward"] + 1) / 2) for e in results[t.name]["curve"] if "eval_reward" in e]
        style = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--", "alpha": 0.9 if strong else 0.25}
        name = label(t) if strong and label(t) not in axes.get_legend_handles_labels()[1] else None
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=name, **style)
    axes.set(xlabel="optimizer step", ylabel="validation accuracy")
    figure.legend(fontsize=6, loc="outside lower center", ncols=2)
    return save(figure, path, "Validation accuracy while training")


# --- adaptation


def with_gain(result: Result | None, base: Result | None) -> str:
    """Write an accuracy and its paired gain on the base."""
    if result is None:
        return "not run"
    if base is None or base is result:
        return f"{result['accuracy']:.3f}"
    before = dict(base["records"])
    mean, half = mean_and_half([[right - before[row] for row, right in result["records"]]])
    return f"{result['accuracy']:.3f} ({mean:+.3f} ± {half:.3f})"


def adaptation_page(results: Mapping[str, Result], folder: str) -> str:
    """Write the page of adaptation; figures go beside it."""
    lines = [
        "# Adaptation, measured", "",
        "SmolLM2-135M-Instruct in bfloat16 on one CPU thread, with the experts of `benchmarks/experts` (code: MBPP, "
        "math: GSM8K, reasoning: ARC-Easy) and its classifier `dispatch`. Answers are in the choice "
        "form, the likeliest of given options.", "",
        f"Made by `python benchmarks/report.py` from `{folder}` and `benchmarks/results/adaptation/routing`; "
        "`benchmarks/adaptation.py`, `routing.py` and `transfer.py` run the missing cells.", "",
        *routing_part(results), *first_pass_part(results), *few_shot_part(results), *mixed_part(results),
        *transfer_part(results),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def routing_part(results: Mapping[str, Result]) -> list[str]:
    """Show what routing keys decide, what they claim of far-away text, what they cost, and their few-shot guess."""
    keys, qwen, guess, memory = (results.get(f"routing/{name}") for name in ("keys", "qwen", "few_shot", "memory"))
    ttft = [result for name, result in results.items() if name.startswith("routing/ttft")]
    lines = ["## Routing keys: the default", ""]
    heads = ["blocks", "pooling", "prompts", "accuracy", "calibration error", "claimed", "logistic"]
    if keys:
        best = [r for r in keys["rows"] if r["pooling"] == "both" and r["prompts"] == 64]
        far = keys["far_away"]
        groups = {g: [sum(d["claimed_of_group"][g] for d in r["draws"]) for r in best] for g in far}
        sources = {name: count for name, (_, count) in best[0]["draws"][0]["right_of_source"].items()}
        right = {s: [sum(d["right_of_source"][s][0] for d in r["draws"]) for r in best] for s in sources}
        draws = len(best[0]["draws"])
        lines += [
            "Keys are made of training questions (code: MBPP, math: GSM8K, reasoning: ARC-Easy); nothing else is "
            "fitted. Accuracy is that on the 120 held-out questions below, the mean of three disjoint draws of key "
            "prompts and its range; *claimed* the share of "
            f"{sum(far.values())} far-away texts that an expert would answer. The defaults are 5 blocks, "
            "*both* and 64 prompts. *Logistic* is a logistic regression on the same states.", "",
            *table(heads, keys_rows(keys)),
            "Where it fails, with 64 prompts and *both*: questions of three draws that are right, by source,", "",
            *table(["blocks read", *(f"{s} (of {draws * n})" for s, n in sources.items())],
                   [[r["block"], *(counts[i] for counts in right.values())] for i, r in enumerate(best)]),
            "and far-away texts that are claimed, by group:", "",
            *table(["blocks read", *(f"{g} (of {draws * n})" for g, n in far.items())],
                   [[r["block"], *(counts[i] for counts in groups.values())] for i, r in enumerate(best)]),
            "MATH-500 and HumanEval are sources that no key has seen. The first block counts are the cheaper ones: a "
            "first pass of its own costs about the share of the blocks that it reads, and one inside the prefill "
            "costs next to nothing. A sixth is the default because experts that leave these blocks alone route "
            "inside the prefill. `peft-svf key --block 15` is right more often where kinds are as close "
            "as these, and with experts of the upper half it is as free.", "",
        ]  # fmt: skip
        blocks, shrinkages = (list(dict.fromkeys(r[n] for r in keys["shrinkages"])) for n in ("block", "shrinkage"))
        cells = {(r["block"], r["shrinkage"]): f"{r['accuracy']:.3f} / {r['claimed']:.1%}" for r in keys["shrinkages"]}
        lines += [
            "The shrinkage of the covariance was chosen on "
            f"{keys['shrinkages'][0]['questions']} other questions (accuracy / claimed, means of the draws):", "",
            *table(["blocks", *map(str, shrinkages)], [[b, *(cells[b, s] for s in shrinkages)] for b in blocks]),
            "Tried on the same states of 5 and 10 blocks without a gain: states scaled to unit variance, standard "
            "deviations and maxima over tokens, tokens of the request without those of the template, cosines, two or "
            "four centres for each kind, a kernel density, a prior for *other*, and logistic regression after "
            "whitening. Logistic regression on standardised states is ahead at 10 blocks and not at 5.", "",
        ]  # fmt: skip
    if qwen:
        lines += [
            "Qwen2.5-Coder-0.5B-Instruct (weights from a 4-bit file, float32) with keys of its own, same texts:", "",
            *table(heads, keys_rows(qwen)),
        ]  # fmt: skip
    if ttft:
        rows = []
        for name in ttft[0]["over_base"]["first"]:
            cells = [part[name] for result in ttft for part in result["over_base"].values()]
            rows.append([name, *("{:.2f} ({:.2f} to {:.2f})".format(*cell) for cell in cells)])
        counts = [f"{r['tokens']} tokens × {r['rows']}" for r in ttft]
        heads = ["", *(f"{token}, {c}" for c in counts for token in ("first", "second", "later"))]
        lines += [
            "CPU time over the base's for answers of up to 64 tokens, median and range; the request before had the "
            "same expert unless it says so. The weights of an expert are merged at the second token of its first "
            "answer, and serve until another takes their place:", "",
            *table(heads, rows),
        ]  # fmt: skip
    if memory:
        lines += [
            "Peak memory of a first pass over "
            f"{memory['rows']} prompts of {memory['tokens']} tokens beyond what the model holds: "
            f"{memory['early_exit_mb']:.0f} MB, that of the base's own first token {memory['base_mb']:.0f} MB.", "",
        ]  # fmt: skip
    if guess:
        titles = list(dict.fromkeys(r["task"] for r in guess["rows"]))
        rows = []
        for shots in sorted({r["examples"] for r in guess["rows"]}):
            row = [f"{shots} examples"]
            for task in titles:
                some = [r for r in guess["rows"] if (r["task"], r["examples"]) == (task, shots)]
                chosen = ", ".join(f"{n} {count}" for n, count in Counter(r["chosen"] for r in some).most_common())
                known = [r["accuracy"] for r in some if r["accuracy"] is not None]
                row.append(f"{statistics.mean(known):.3f} ({chosen})" if known else f"not run ({chosen})")
            rows.append(row)
        lines += [
            "`Search('key')` takes the expert that a few examples point to, without a search and within a second. "
            "Below: the mean accuracy over draws of the expert that it takes, and how often it takes which. It sees "
            "what a task is, not whether the expert helps: on ARC-Challenge the reasoning expert doesn't, and the "
            "searches further down fall back to the base. So a search stays the default of `adapt`.", "",
            *table(["", *titles], rows),
        ]  # fmt: skip
    return lines if len(lines) > 2 else []


def keys_rows(keys: Mapping[str, Any]) -> list[list[Any]]:
    """Show accuracy, calibration and far-away text for each block, pooling and size."""
    rows = []
    for r in (r for r in keys["rows"] if r["pooling"] == "both" or r["prompts"] == 64):
        accuracies = [draw["accuracy"] for draw in r["draws"]]
        spread = f"{r['accuracy']:.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})"
        other = f"{statistics.mean(r['logistic']):.3f}" if r["logistic"] else ""
        name = [f"{r['block']} of {keys['blocks']}", r["pooling"], r["prompts"]]
        rows.append([*name, spread, f"{r['ece']:.3f}", f"{r['claimed']:.1%}", other])
    return rows


def first_pass_part(results: Mapping[str, Result]) -> list[str]:
    """Show accuracy, calibration, cost and confusion of each first pass."""
    done = {r["way"]: r for name, r in results.items() if name.startswith("dispatch-") and "way" in r}
    cost, rows = results.get("dispatch-cost", {}).get("ways", {}), []
    for way, r in done.items():
        priced = cost.get(way) or cost.get(way.partition(",")[0])
        share = f"{priced['share']:.0%} ({priced['first_pass_ms']:.0f} ms)" if priced else ""
        low, high = r["interval"]
        accuracy = f"{r['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append([way, accuracy, f"{r['ece']:.3f}", f"{r['brier']:.3f}", share])
    lines = [
        "## First pass: which kind of question?", "",
        "120 held-out questions, equally many of each kind (code, math, reasoning, other), chance .250. *Prompt* "
        "reads the request's likelihood, *names* scores the names of the kinds; *temperature*, *batch* and *fitted* "
        "are calibrations on validation questions. The share is that of pass 1 in the CPU time to the first token, "
        "for single requests.", "",
        *table(["first pass", "accuracy, 95 %", "calibration error", "Brier score", "share of time"], rows),
    ]  # fmt: skip
    drawn = {way: done[way] for way in ("names", "prompt", "classifier", "probe") if way in done}
    if drawn:
        figure, panels = new_figure(len(drawn))
        for axes, (way, r) in zip(panels, drawn.items(), strict=True):
            draw_decisions(axes, dict(sorted(r["confusion"].items())), way)
        lines += save(figure, PAGES / "adaptation-dispatch.png", "Confusion of each first pass")
    return lines


def few_shot_part(results: Mapping[str, Result]) -> list[str]:
    """Show what experts, first passes and searches reach on tasks that no expert was trained on."""
    titles = {"svamp": "SVAMP", "arc_challenge": "ARC-Challenge", "math": "MATH-500", "humaneval": "HumanEval"}
    bases = {task: results.get(f"few_shot-{task}-base") for task in titles}

    def cells_of(name: str) -> list[Result | None]:
        return [results.get(f"few_shot-{task}-{name}") for task in titles]

    rows = [["test rows", *(base["n"] if base else "" for base in bases.values())]]
    for way in ("base", "code", "math", "reasoning", "uniform", "prompt", "classifier"):
        rows.append([way, *map(with_gain, cells_of(way), bases.values())])
    for method in ("cem", "cma", "gradient", "cem_unchecked", "per_layer"):
        for shots in (3, 5, 10):
            draws = [cells_of(f"{method}-{shots}-{draw}") for draw in range(3)]  # (draws, tasks)
            done = [cell for cells in draws for cell in cells if cell]
            if done:
                seconds = statistics.mean(cell["adapting_cpu_seconds"] for cell in done)
                name = f"{method.replace('_', ', ')}, {shots} examples ({seconds:.0f} CPU s)"
                rows.append([name, *map(of_draws, zip(*draws, strict=True), bases.values())])
    return [
        "## Tasks that no expert was trained on", "",
        "Accuracy with the paired gain on the base and its 95 % interval. *Prompt* and *classifier* answer each "
        "question by the expert that this first pass chooses. Searches see a draw of examples, check their result by "
        "leaving one out at a time (*unchecked* does not), and fall back to the best expert or the base.", "",
        *table(["", *titles.values()], rows),
    ]  # fmt: skip


def of_draws(draws: Sequence[Result | None], base: Result | None) -> str:
    """Write the mean accuracy over draws of examples and its range, of a single draw its gain on the base."""
    accuracies = [cell["accuracy"] for cell in draws if cell]
    if len(accuracies) < 2:
        return with_gain(next(filter(None, draws), None), base)
    spread = f"{min(accuracies):.3f} to {max(accuracies):.3f}, {len(accuracies)} draws"
    return f"{statistics.mean(accuracies):.3f} ({spread})"


def mixed_part(results: Mapping[str, Result]) -> list[str]:
    """Show the mixed batch."""
    result = results.get("mixed_batch")
    lines = ["## Eight requests with eight mixtures in one batch", ""]
    if result is None:
        return [*lines, "Not run.", ""]
    rows = [[way, f"{min(t):.2f}", result["ratio_to_base"][way]] for way, t in result["CPU seconds"].items()]
    return [
        *lines,
        f"Float32, {result['new_tokens']} new tokens: {result['same_text_as_one_by_one']} of {result['rows']} texts "
        f"equal those of the requests one by one; {result['other_text_than_the_base']} differ from the base's.", "",
        *table(["", "CPU seconds", "over the base"], rows),
    ]  # fmt: skip


def transfer_part(results: Mapping[str, Result]) -> list[str]:
    """Show what experts do on another model, of equal and (older results) of another shape."""
    tasks = ("arc_easy", "gsm8k", "mbpp")
    ways = ("base", "ordered", "shuffled-0", "shuffled-1", "shuffled-2", "aligned", "few_shot")
    lines = [
        "## Experts given to another model", "",
        "From SmolLM2-135M to a sibling: the same checkpoint after a short full fine-tuning on GSM8K. Models that "
        "went their own ways are a harder test. Gains are paired with the model without an expert.", "",
    ]  # fmt: skip
    other = "Qwen2.5-Coder-0.5B, z interpolated over spectrum and depth (an earlier version; the negative control):"
    for place, title in (("", ""), ("other_shape/", other)):

        def cells_of(name: str, place: str = place) -> list[Result | None]:
            return [results.get(f"{place}transfer-{task}-{name}") for task in tasks]

        named = ["source-base", "source-expert", *(f"target-{way}" for way in ways)]
        bases = {side: cells_of(f"{side}-base") for side in ("source", "target")}
        shown = [name for name in named if any(cells_of(name))]
        rows = [[name, *map(with_gain, cells_of(name), bases[name[:6]])] for name in shown]
        lines += [*([title, ""] if title else []), *(table(["", *tasks], rows) if rows else ["Not run.", ""])]
    return lines


def shipped_table() -> list[str]:
    """Show the experts of examples/experts by their result files."""
    rows = []
    for path in sorted((ROOT / "examples" / "experts").glob("*/result.json")):
        result = json.loads(path.read_text())
        (low, high), mentions = result["gain_interval"], result["mentions"]
        rows.append([
            f"[{path.parent.name}](../../examples/experts/{path.parent.name})", result["expert"]["n"],
            f"{result['base']['accuracy']:.3f}", f"{result['expert']['accuracy']:.3f}",
            f"{result['gain']:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{mentions['base']:.3f}, {mentions['expert']:.3f}", f"{result['everyday_fall']:.1%}",
        ])  # fmt: skip
    return table(["expert", "n", "base", "expert", "gain, 95 %", "mentions", "everyday answers fall by"], rows)


def generated_page(found: Mapping[str, Result]) -> str:
    """Write the page of answers in text: accuracy, mentions, and the likelihood of everyday answers."""
    kinds: dict[tuple[str, str, str], list[Result]] = {}
    for result in found.values():
        training = result["training"]
        if training["method"] != "base":
            learner = "next token" if training.get("learner") == "sft" else "rewards"
            budget = f"{training['steps']} × {training['questions']} × {training['samples']}"
            name = f"{training['method']}, lr {training['lr']:g}, {budget}"
            kinds.setdefault((training["task"], learner, name), []).append(result)
    rows, falls = [], []
    for (task, learner, name), results in sorted(kinds.items()):
        base, tests = found.get(f"{task}-base"), [result["test"] for result in results]
        untouched = found["sentiment-base"]["everyday"]["mean_logp"]  # the same in every base cell
        fall = [result["everyday"]["mean_logp"] / untouched - 1 for result in results]
        strengths = ", ".join(f"{result.get('strength', 1):g}" for result in results)
        accuracies = ", ".join(f"{test['accuracy']:.3f}" for test in tests)
        before, gains, mentioned = "not run", "", ""
        if base is not None:
            before, mentioned = (f"{base['test'][key]:.3f}" for key in ("accuracy", "mentions"))
            gains = gain([(result, base) for result in results])
        shown = [task, learner, name]
        rows.append([*shown, strengths, before, accuracies, gains, tests[0]["n"]])
        mentions = ", ".join(f"{test['mentions']:.3f}" for test in tests)
        losses = ", ".join(f"{f:.1%}" for f in fall)
        falls.append([*shown, mentioned, mentions, losses])
    return "\n".join([
        "# Answers in text", "",
        "SmolLM2-135M-Instruct in float32, one CPU thread: MLP weights from block 5 on (*svf-upper*, *lora16-upper*) "
        "or of all blocks (*svf*). *Next token* is the usual loss on right answers, *rewards* is REINFORCE on sampled "
        "ones; a budget is steps × requests in each × answers to each. The loss has 20 times KL(base ‖ policy) on "
        "everyday answers of the base, for all methods alike. Test requests have templates, products, numbers and "
        "sentences of their own; *right* is a greedy text that is the answer and nothing else, or ends with the right "
        "number. Where the strength isn't 1, what was trained was scaled by it afterwards, as validation rows and "
        "everyday requests other than the test's chose: the base's answers to those may become at most 1.5 % less "
        "likely. The runs on rewards were not scaled; the shipped *sentiment* is the first of two with 10 steps, at "
        "0.75.", "",
        "Made by `python benchmarks/report.py`; `python benchmarks/generated.py` runs the missing cells.", "",
        "## Shipped experts", "", *shipped_table(), "## Every cell", "",
        *table(["task", "learner", "method", "strength", "base", "right, by seed", "gain, 95 %", "n"], rows),
        "A single seed has the interval of its rows alone: it says nothing of the spread over seeds.", "",
        "## What else changes", "",
        "*Mentions* counts greedy texts that have the right answer anywhere. The last column is by how much the mean "
        "log-likelihood of a token of the base's own answers to 40 everyday requests falls.", "",
        *table(["task", "learner", "method", "mentions, base", "mentions", "everyday answers fall by"], falls),
    ]).rstrip() + "\n"  # fmt: skip


def read(folder: Path) -> dict[str, Result]:
    """Read the result files below a folder, by name."""
    paths = sorted(folder.rglob("*.json"))
    return {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text()) for path in paths}


def main() -> None:
    """Write the pages."""
    if len(sys.argv) > 1:
        print(*(speed_page(Path(name)) for name in sys.argv[1:]))
        return
    folder = RESULTS / "adaptation" / fingerprint()
    adaptation = read(folder) | {f"routing/{name}": r for name, r in read(folder.with_name("routing")).items()}
    pages = {
        "learning": learning_page(read_trainings(), read(RESULTS / "learning"), PAGES),
        "generated": generated_page(read(RESULTS / "generated")),
        "adaptation": adaptation_page(adaptation, folder.relative_to(ROOT).as_posix()),
    }
    for name, page in pages.items():
        (PAGES / f"{name}.md").write_text(page)
    print("Wrote docs/results/learning.md, generated.md and adaptation.md")


if __name__ == "__main__":
    main()
