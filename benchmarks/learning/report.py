# SPDX-License-Identifier: Apache-2.0
"""
Result files of run.py -> docs/results/learning.md with its tables, verdicts and curves, all from these files.

    python benchmarks/learning/report.py

A method's setting (learning rate, temperature) is the one with the highest mean validation reward on the seeds that
all its settings have run, of equals the one with more seeds; the test split chooses nothing. What is not run is shown
as not run.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import CHANGES, HERE, RESULTS, Cell, read_cells

from peft_svf.evaluation import NINETY_FIVE
from peft_svf.plots import new_figure

PAGE = HERE.parents[1] / "docs" / "results" / "learning.md"
ADAPTERS = {
    "svf": "SVF",
    "svf_reference": "SVF with the mask of the paper's code",
    "svf_rank16": "SVF, 16 largest",
    "svf_rank64": "SVF, 64 largest",
    "lora16": "LoRA r=16",
    "ia3": "IA3",
    "tinylora": "TinyLoRA",
}
PLACES = {"mlp": "MLP", "qv": "q and v", "both": "MLP, q and v", "all": "all linear"}
LEARNERS = {"reinforce": "", "sft": ", next-token loss", "evolution": ", evolution"}
WINDOW = 5  # steps over which sampled rewards are averaged in figures
FALL = 0.1  # of validation accuracy, from the best to the last: what is called a collapse here
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # two-sided 95 %, by freedom

SVF, LORA = "svf-mlp", "lora16-mlp"
CLAIMS = [  # one kind of cell is said to be ahead of another
    ("SVF learns better than LoRA under the same budget (paper)", SVF, LORA),
    ("REINFORCE teaches z more than next-token loss on the right answers (paper)", SVF, f"sft-{SVF}"),
    ("REINFORCE teaches LoRA more than next-token loss", LORA, f"sft-{LORA}"),
    ("Plain z learns better than the mask of the paper's code", SVF, "svf_reference-mlp"),
    ("MLP weights are better targets than q and v (paper: better, both best)", SVF, "svf-qv"),
    ("MLP, q and v together are better than MLP alone (paper)", "svf-both", SVF),
    ("The 64 largest singular values of a weight teach as much as all of them", "svf_rank64-mlp", SVF),
    ("A penalty of 0.05 KL(policy ‖ base) helps z", f"{SVF}-beta0.05", SVF),
    ("The question's other answers are a better baseline than the batch", SVF, f"{SVF}-baselinebatch"),
    ("REINFORCE teaches z more than evolution with as many answers", SVF, f"evolution-{SVF}"),
    ("The same with the 16 largest singular values of a weight", "svf_rank16-mlp", "evolution-svf_rank16-mlp"),
]

Result = dict[str, Any]
Setting = tuple[float, float]  # learning rate, temperature


class Pool:
    """
    Paired differences of several seeds: their mean and its 95 % interval over rows and seeds.

    The half width is `sqrt((1.96 s_rows / sqrt(n))² + (t s_seeds / sqrt(k))²)`: `s_rows` is the deviation over the `n`
    test rows of the difference averaged over the `k` seeds, `s_seeds` that of the seeds' means, `t` Student's with
    `k - 1` degrees of freedom. Chance that belongs to a row in a seed counts in both: the interval is rather too wide.
    With one seed it is that of the rows alone.

    Args:
        differences (sequence of sequences): One row of `n` differences for each seed.
    """

    def __init__(self, differences: Sequence[Sequence[float]]) -> None:
        self.seeds = [statistics.mean(each) for each in differences]
        self.mean = statistics.mean(self.seeds)
        rows = [statistics.mean(each) for each in zip(*differences, strict=True)]
        self.half = NINETY_FIVE * statistics.pstdev(rows) / math.sqrt(len(rows))
        if len(self.seeds) > 1:
            t = STUDENT.get(len(self.seeds) - 1, STUDENT[max(STUDENT)])
            self.half = math.hypot(self.half, t * statistics.stdev(self.seeds) / math.sqrt(len(self.seeds)))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.mean - self.half:+.3f}, {self.mean + self.half:+.3f}]"

    @property
    def sign(self) -> int:
        """Whether the interval lies above 0 (1), below (-1), or neither (0)."""
        return (self.mean > self.half) - (self.mean < -self.half)


class Runs:
    """The cells of one task that were run, and what they say."""

    def __init__(self, task: str, cells: Sequence[Cell], found: dict[str, Result]) -> None:
        self.task = task
        self.cells = [cell for cell in cells if cell.task == task]
        self.base = found.get(f"{task}-base")
        self.found = found if self.base else {}  # without it there is nothing to compare with
        self.done = [cell for cell in self.cells if cell.name in found and cell.method != "base"]

    def of(self, kind: str, setting: Setting | None = None) -> dict[int, Result]:
        """Results of a kind in one setting, default the chosen one, by seed."""
        setting = self.setting(kind) if setting is None else setting
        return {c.seed: self.found[c.name] for c in self.done if (c.kind, c.setting) == (kind, setting)}

    def setting(self, kind: str) -> Setting | None:
        """What validation chooses, of equals the one with more seeds, then the lower; `None` where nothing was run."""
        settings = sorted({cell.setting for cell in self.done if cell.kind == kind})
        if not settings:
            return None
        runs = {setting: self.of(kind, setting) for setting in settings}
        shared = set.intersection(*(set(by_seed) for by_seed in runs.values()))

        def reward(setting: Setting) -> tuple[float, int]:
            counted = (r["best_validation"] for seed, r in runs[setting].items() if seed in shared or not shared)
            return _mean(counted), len(runs[setting])

        return max(settings, key=reward)

    def gain(self, results: Sequence[Result]) -> Pool:
        """Gain over the base."""
        assert self.base is not None
        return Pool([differences(result, self.base) for result in results])

    def against(self, one: str, other: str) -> Pool | None:
        """One kind minus another, seed by seed on the same rows; `None` where they have no seed in common."""
        ones, others = self.of(one), self.of(other)
        shared = sorted(ones.keys() & others.keys())
        return Pool([differences(ones[seed], others[seed]) for seed in shared]) if shared else None


def differences(one: Result, other: Result) -> list[float]:
    """Right or not, row by row, of one result minus another."""
    before = dict(other["test"]["records"])
    if set(before) != {row for row, _ in one["test"]["records"]}:
        names = [result["cell"]["name"] for result in (one, other)]
        raise SystemExit(f"{names[0]} and {names[1]} were tested on different rows: run one of them again.")
    return [float(right - before[row]) for row, right in one["test"]["records"]]


def label(cell: Cell) -> str:
    adapter, _, where = cell.method.partition("-")
    budget = [f"{getattr(cell, n)} {n}" for n in CHANGES if getattr(cell, n) != getattr(Cell, n)]
    return ", ".join([f"{ADAPTERS[adapter]}, {PLACES[where]}{LEARNERS[cell.learner]}", *budget])


def written(setting: Setting | None) -> str:
    assert setting is not None
    lr, temperature = setting
    return f"{lr:g}" + (f", T = {temperature:g}" if temperature != 1 else "")


def header(titles: str) -> list[str]:
    """The head of a table, of titles with commas between them."""
    columns = titles.split(", ")
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def table(runs: Runs) -> list[str]:
    """One line per cell, missing ones too; the setting that validation chose is marked."""
    titles = "method, trained numbers, lr, seed, best step, validation, test, gain on the base"
    lines = header(f"{titles}, answers, tokens read, minutes")
    for cell in runs.cells:
        if cell.method == "base":
            continue
        result = runs.found.get(cell.name)
        if result is None:
            lines.append(f"| {label(cell)} | | {written(cell.setting)} | {cell.seed} | not run | | | | | | |")
            continue
        chosen = " *" if cell.setting == runs.setting(cell.kind) else ""
        lines.append(
            f"| {label(cell)} | {result['trainable']:,} | {written(cell.setting)}{chosen} | {cell.seed} | "
            f"{result['best_step']} | {accuracy(result['best_validation']):.3f} | {result['test']['accuracy']:.3f} | "
            f"{runs.gain([result])} | {result['answers']:,} | {tokens_of(result)} | {result['seconds'] / 60:.0f} |"
        )
    return lines


def tokens_of(result: Result) -> str:
    """Tokens that training read; nothing for runs from before they were counted."""
    counts = [entry["tokens"] for entry in result["curve"] if "tokens" in entry]
    return f"{max(counts):,}" if counts else ""


def summary(runs: Runs) -> list[str]:
    """One line per method in the setting that validation chose, over its seeds."""
    lines = header("method, lr, seeds, test (mean), gain on the base, gain by seed")
    for cell in {cell.kind: cell for cell in runs.done}.values():
        results = list(runs.of(cell.kind).values())
        gain = runs.gain(results)
        test = _mean(result["test"]["accuracy"] for result in results)
        each = ", ".join(f"{value:+.3f}" for value in gain.seeds)
        setting = written(runs.setting(cell.kind))
        lines.append(f"| {label(cell)} | {setting} | {len(results)} | {test:.3f} | {gain} | {each} |")
    return lines


def verdicts(runs: Runs) -> list[str]:
    """The claims, each with what these runs say of it."""
    lines = header("claim, here, numbers")
    wanted = {cell.kind for cell in runs.cells}
    for claim, one, other in CLAIMS:
        if {one, other} <= wanted:
            lines.append(f"| {claim} | {ahead(runs.against(one, other))} |")
    for claim, judge in (
        ("It does with under 3 % of LoRA's parameters (paper: 2.4 %)", smaller),
        (f"LoRA collapses under REINFORCE (paper: on some tasks), validation falling by more than {FALL}", collapse),
        ("At equal tokens REINFORCE is ahead of evolution", equal_tokens),
    ):
        if judge is not equal_tokens or f"evolution-{SVF}" in wanted:
            lines.append(f"| {claim} | {judge(runs)} |")
    return lines


def ahead(gap: Pool | None) -> str:
    if gap is None:
        return "not run |"
    count = len(gap.seeds)
    seeds = "one seed: the interval is of the test rows alone" if count == 1 else f"{count} seeds"
    verdict = {1: "holds", -1: "the other way round", 0: "undecided"}[gap.sign]
    return f"{verdict} | {gap}, {seeds}"


def smaller(runs: Runs) -> str:
    gap = runs.against(SVF, LORA)
    if gap is None:
        return "not run |"
    mine, theirs = (next(iter(runs.of(kind).values()))["trainable"] for kind in (SVF, LORA))
    share = 100 * mine / theirs
    least = {1: "more than", 0: "within the interval as much as", -1: "less than"}[gap.sign]
    verdict = {1: "holds", 0: "undecided", -1: "no"}[gap.sign] if share < 3 else "no"
    return f"{verdict} | {mine:,} of {theirs:,}, {share:.1f} %, learn {least} all of them"


def collapse(runs: Runs) -> str:
    """A run collapses if validation ends more than `FALL` below its best, or if the test lies below the base."""
    results = [runs.found[cell.name] for cell in runs.done if cell.kind == LORA]
    if not results:
        return "not run |"
    falls = [accuracy(r["best_validation"]) - accuracy(validations(r)[-1]["eval_reward"]) for r in results]
    below = [runs.gain([result]).sign < 0 for result in results]
    count = sum(fall > FALL or low for fall, low in zip(falls, below, strict=True))
    verdict = "no" if not count else "holds" if count == len(results) else "in some runs"
    return (
        f"{verdict} | {len(results)} runs: validation ends up to {max(falls):.3f} below its best, "
        f"{sum(below)} test below the base"
    )


def equal_tokens(runs: Runs) -> str:
    """Validation of evolution, in its best form, when it has read at least what REINFORCE reads in its whole run."""
    found = []
    for cell in runs.done:
        reinforced, evolved = runs.of(SVF).get(cell.seed), runs.found[cell.name]
        if cell.learner == "evolution" and cell.method == SVF and reinforced and "tokens" in reinforced["curve"][-1]:
            tokens = reinforced["curve"][-1]["tokens"]
            if validations(evolved)[-1]["tokens"] < tokens:
                continue
            found.append((*compared(reinforced, evolved, tokens), tokens))
    if not found:
        return "not run |"
    ours, theirs, tokens = max(found, key=lambda each: each[1] - each[0])
    verdict = "ahead" if ours > theirs else "not ahead"
    return f"{verdict} | validation accuracy {ours:.3f} against {theirs:.3f} after {tokens:,} tokens; no interval"


def compared(reinforced: Result, evolved: Result, tokens: int) -> tuple[float, float]:
    """Best validation accuracies of both, of the second up to the first validation with as many tokens."""
    checks = validations(evolved)
    enough = next((i for i, entry in enumerate(checks) if entry["tokens"] >= tokens), len(checks) - 1)
    return accuracy(reinforced["best_validation"]), accuracy(max(e["eval_reward"] for e in checks[: enough + 1]))


def validations(result: Result) -> list[dict[str, float]]:
    return [entry for entry in result["curve"] if "eval_reward" in entry]


def accuracy(reward: float) -> float:
    """Share of right answers, of rewards 1 and -1."""
    return (reward + 1) / 2


def draw(runs: Runs, folder: Path) -> Path:
    """Training reward and validation accuracy by step, and validation by tokens read where these were counted."""
    counted = [cell for cell in runs.done if "tokens" in runs.found[cell.name]["curve"][-1]]
    chosen = [cell for cell in runs.done if cell.setting == runs.setting(cell.kind)]
    panels: list[tuple[str, str, str, Sequence[Cell], Callable[[float], float]]] = [
        ("step", "reward", f"answers right, mean of {WINDOW} steps", chosen, accuracy),
        ("step", "eval_reward", "validation accuracy", runs.done, accuracy),
    ]
    if len({cell.learner for cell in counted}) > 1:
        panels.append(("tokens", "eval_reward", "validation accuracy", counted, accuracy))
    figure, axes = new_figure(len(panels))
    kinds = list(dict.fromkeys(cell.kind for cell in runs.done))
    looks = {kind: {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"} for i, kind in enumerate(kinds)}
    named: dict[str, Any] = {}
    for panel, (x, y, title, cells, scale) in zip(axes, panels, strict=True):
        for cell in cells:
            points = [(entry[x], scale(entry[y])) for entry in runs.found[cell.name]["curve"] if y in entry]
            if y == "reward":
                windows = [points[i : i + WINDOW] for i in range(len(points) - WINDOW + 1)]
                points = [(some[-1][0], _mean(value for _, value in some)) for some in windows]
            if points:
                style = {"alpha": 0.9 if cell in chosen else 0.25, "marker": "o" if y != "reward" else ""}
                (line,) = panel.plot(*zip(*points, strict=True), lw=1.2, ms=3, **looks[cell.kind], **style)
                if style["alpha"] > 0.5:
                    named.setdefault(label(cell), line)
        panel.set(xlabel="tokens read in training" if x == "tokens" else "optimizer step", ylabel=title)
        if x == "tokens":
            panel.set_xscale("log")
    figure.legend(named.values(), named.keys(), fontsize=7, loc="outside lower center", ncols=3)
    path = folder / f"learning-{runs.task}.png"
    figure.savefig(path)
    return path


def section(runs: Runs, folder: Path) -> list[str]:
    """What stands on the page about one task."""
    if runs.base is None:
        return [f"## {runs.task}", "", "The base was not run.", "", *table(runs)]
    test = runs.base["test"]
    low, high = test["interval"]
    lines = [f"## {runs.task}", "", f"Base {test['accuracy']:.3f} [{low:.3f}, {high:.3f}], n = {test['n']}.", ""]
    lines += [*verdicts(runs), "", *summary(runs), ""] if runs.done else []
    lines += ["Every cell; * is the setting that validation chose:", "", *table(runs)]
    return lines + (["", f"![Curves]({draw(runs, folder).name})"] if runs.done else [])


def page(cells: Sequence[Cell], found: dict[str, Result], folder: Path) -> str:
    """The whole page; figures go into the folder."""
    sources = Counter(found[cell.name].get("source", "not recorded") for cell in cells if cell.name in found)
    lines = [
        "# Does it learn?",
        "",
        "SmolLM2-135M-Instruct in bfloat16 on a CPU, choice form: the policy is the softmax over the log-likelihoods "
        "of the given answers. Every method sees the same questions in the same order, the same number of steps "
        f"({Cell.steps} of {Cell.questions} questions unless the table says otherwise) and the same test rows. "
        f"REINFORCE samples {Cell.samples} answers a question (reward +1 or -1, baseline the mean of the others), "
        f"evolution lets {Cell.samples} members answer it, next-token loss reads the right answer. T is the "
        "temperature of the policy that is sampled from, 1 unless it is given. Learning rate, temperature and "
        "checkpoint of a method are those with the highest validation reward (the first two on the seeds that all "
        "have run); the test split chooses nothing.",
        "",
        "Gains are paired over test rows, with 95 % intervals; over several seeds the interval holds the spread of "
        "rows and that of seeds (Student's t). *Holds* and *the other way round* say that the interval leaves 0 out. "
        "Tokens are positions read in forward passes of training, padding included; REINFORCE and next-token loss do "
        "a backward pass beside; cells from before they were counted have none. Minutes are wall clock on a machine "
        "with other work: no comparison. The experts in `examples/experts` are of runs of their own, whose commands "
        "and results lie beside their cards.",
        "",
        "Made by `python benchmarks/learning/report.py` from `benchmarks/learning/results/`; "
        "`python benchmarks/learning/run.py` runs what is missing. State of the package's code (sha256) by number of "
        f"cells: {', '.join(f'{name} {count}' for name, count in sources.items()) or 'none'}.",
    ]
    for task in dict.fromkeys(cell.task for cell in cells):
        lines += ["", *section(Runs(task, cells, found), folder)]
    return "\n".join(lines) + "\n"


def _mean(values: Any) -> float:
    return statistics.mean(values)


def main() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(read_cells(), found, PAGE.parent))
    print(f"Wrote {PAGE}")


if __name__ == "__main__":
    main()
