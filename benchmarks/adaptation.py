# SPDX-License-Identifier: Apache-2.0
"""
What do first passes, few-shot searches and mixed batches gain, and what do they cost? SmolLM2-135M, choice form.

    python benchmarks/adaptation.py --minutes 20              # again: goes on with what is missing
    python benchmarks/adaptation.py --only few_shot-svamp     # some of the cells

A cell writes `results/adaptation/<folder>/<cell>.json` once. The folder is named for the experts of examples/ and the
edition of the measurements, so retrained experts get a new one. Cells run in the order of importance: first passes,
mixed batches, the tasks that no expert was trained on, searches of the first draw, the other draws.

First passes are judged on 120 held-out questions of four kinds; half are from sources that the classifier expert has
not seen (HumanEval, MATH-500, requests written by hand). Whatever is fitted is fitted to validation questions before.
"""

import argparse
import functools
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, ROOT, Cell, parser_of, result_of, run_cells
from smollm2 import load_smollm2

from peft_svf import Expert, Mixture, Transformer2Model
from peft_svf.adaptation import FirstPass, Search, dispatch, fit_calibration, fit_probe
from peft_svf.evaluation import evaluate, wilson
from peft_svf.rows import prompt_ids
from peft_svf.tasks import everyday_requests, get_task
from peft_svf.tasks.task import shuffled

EXPERTS = ("code", "math", "reasoning")
FOLDERS = {name: ROOT / "benchmarks" / "experts" / name for name in EXPERTS}
CLASSIFIER = ROOT / "benchmarks" / "experts" / "dispatch"
EDITION = 3  # raised with every change of settings or code that moves figures
BATCH = 16
SOURCES = {  # source -> kind; the test split of the task of that name
    "mbpp": "code", "humaneval": "code", "gsm8k": "math", "svamp": "math", "math": "math", "arc_easy": "reasoning",
    "arc_challenge": "reasoning", "everyday": "other", "written by hand": "other",
}  # fmt: skip
NAMES = {"strategy": "prompt", "read": "likelihood"}
WAYS: dict[str, dict[str, Any]] = {  # settings of `FirstPass`, and what is fitted; "prompt" is the library's default
    "names": NAMES,
    "names, fitted": {**NAMES, "fit": "labelled"},
    "prompt": {"strategy": "prompt"},
    "prompt, fitted": {"strategy": "prompt", "fit": "labelled"},
    "classifier": {"strategy": "classifier"},
    "probe": {"strategy": "probe", "fit": "probe"},
}
PER_KIND, FIT, TIMED = 30, 20, 8  # questions of a kind that judge, that something is fitted to; questions timed
TASKS = {"svamp": 150, "arc_challenge": 150, "math": 150, "humaneval": 134}  # test rows; HumanEval has 164 in all
ALONE: dict[str, dict[str, float]] = {"base": {}, **{name: {name: 1.0} for name in EXPERTS}}
STATIC = {**ALONE, "uniform": {name: 1 / len(EXPERTS) for name in EXPERTS}}
SEARCHES: dict[str, dict[str, Any]] = {
    "cem": {"method": "cem", "max_tokens": 50_000},
    "cma": {"method": "cma", "max_tokens": 50_000},
    "gradient": {"method": "gradient", "max_tokens": 35_000},  # a token costs two to three times as much
}
SHOTS, DRAWS = (3, 5, 10), 3
MIXED_ROWS, NEW_TOKENS = 8, 16


def fingerprint() -> str:
    """Name the experts and the edition of the measurements."""
    folders = [*FOLDERS.values(), CLASSIFIER]
    hashes = [hashlib.sha256((f / "adapter_model.safetensors").read_bytes()).hexdigest() for f in folders]
    return hashlib.sha256("".join([*hashes, str(EDITION)]).encode()).hexdigest()[:12]


@functools.cache
def load(dtype: torch.dtype = torch.bfloat16) -> Transformer2Model:
    """Load the base model with the experts and the classifier; bases have the model's dtype."""
    base, tokenizer = load_smollm2(dtype)
    kept = {"basis_dtype": str(dtype).removeprefix("torch.")}
    experts = {name: Expert.load(folder) for name, folder in FOLDERS.items()}
    experts = {name: Expert(name, e.offsets, e.config | kept) for name, e in experts.items()}
    return Transformer2Model(base, tokenizer, experts, CLASSIFIER)


def questions(task: str, count: int, seed: int, split: str = "test", start: int = 0) -> list[dict[str, Any]]:
    """Take rows of the choice form, leaving out the first `start`."""
    return get_task(task).rows(split, limit=start + count, seed=seed)[start:]


def score(model: Transformer2Model, rows: Sequence[Any], alpha: Mapping[str, float]) -> dict[str, Any]:
    """Return the accuracy of one mixture on rows of the choice form, with [id, right] of each row."""
    with model.using(Mixture(dict(alpha))) as active:
        records = evaluate(active, model.tokenizer, rows, BATCH).records
    return scored([(record["id"], int(record["right"])) for record in records])


def scored(records: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return the accuracy of records [id, right]."""
    return {"n": len(records), "accuracy": sum(right for _, right in records) / len(records), "records": records}


# --- first passes


def held_out(seed: int) -> list[tuple[str, str]]:
    """Return pairs of source and question, equally many of each kind."""
    kinds = list(SOURCES.values())
    return [(s, text) for s, kind in SOURCES.items() for text in texts(s, PER_KIND // kinds.count(kind), seed)]


def texts(source: str, count: int, seed: int) -> list[str]:
    """Draw questions of a source."""
    if source == "everyday":
        return everyday_requests("test", count)
    if source == "written by hand":
        return json.loads(Path(__file__).with_name("everyday_requests.json").read_text())[:count]
    records = shuffled(get_task(source).load("test"), f"dispatch:{seed}")[:count]
    return [next(r[name] for name in ("question", "text", "problem", "prompt") if name in r) for r in records]


def validation(seed: int) -> tuple[list[str], list[str]]:
    """Return questions and kinds to fit a probe, a temperature or a calibration to."""
    records = shuffled(get_task("dispatch").load("validation"), f"fit:{seed}")
    kinds = dict.fromkeys(SOURCES.values())
    taken = [record for kind in kinds for record in [r for r in records if r["kind"] == kind][:FIT]]
    return [record["question"] for record in taken], [record["kind"] for record in taken]


@functools.cache
def first_pass_of(way: str, seed: int) -> FirstPass:
    """Return a way's `FirstPass`, fitted if it says so."""
    settings, model = dict(WAYS[way]), load()
    fit, (prompts, kinds) = settings.pop("fit", None), validation(seed)
    asked = model.library, model.tokenizer, prompts
    if fit == "probe":
        return FirstPass(**settings, probe=fit_probe(*asked, kinds))
    plain = FirstPass(**settings)
    return replace(plain, calibration=fit_calibration(*asked, kinds, plain)) if fit else plain


def judge(way: str, seed: int) -> dict[str, Any]:
    """Measure the decisions of one way on all held-out questions."""
    asked, first_pass, model = held_out(seed), first_pass_of(way, seed), load()
    mixtures = dispatch(model.library, model.tokenizer, [text for _, text in asked], first_pass)
    decisions = [
        {"source": source, "kind": SOURCES[source], "choice": m.choice, "probabilities": m.probabilities}
        for (source, _), m in zip(asked, mixtures, strict=True)
    ]
    return {"way": way, "temperature": first_pass.temperature, **measures(decisions), "decisions": decisions}


def measures(decisions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Summarise decisions: accuracy, calibration error, Brier score, confusion.

    ECE is the mean over ten bins of the largest probability, weighted by size, of abs(accuracy - mean probability);
    Brier the mean of `Σ (p - y)²` over the kinds, 0 to 2.
    """
    right = [d["kind"] == d["choice"] for d in decisions]
    top = np.array([max(d["probabilities"].values()) for d in decisions])
    bins = np.minimum(9, (10 * top).astype(int))
    gaps = [abs((np.array(right)[bins == b] - top[bins == b]).sum()) for b in range(10)]
    brier = statistics.mean(sum((p - (k == d["kind"])) ** 2 for k, p in d["probabilities"].items()) for d in decisions)
    confusion: dict[str, dict[str, int]] = {}
    by_source: dict[str, list[int]] = {}
    for d, is_right in zip(decisions, right, strict=True):
        confusion.setdefault(d["kind"], dict.fromkeys(d["probabilities"], 0))[d["choice"]] += 1
        counts = by_source.setdefault(d["source"], [0, 0])
        counts[:] = counts[0] + is_right, counts[1] + 1
    return {
        "n": len(right), "accuracy": statistics.mean(right), "interval": wilson(sum(right), len(right)),
        "ece": sum(gaps) / len(right), "brier": brier, "confusion": confusion, "right_of_source": by_source,
    }  # fmt: skip


def cost(seed: int) -> dict[str, Any]:
    """Measure CPU seconds of pass 1 and of pass 2 up to its first token, one request at a time."""
    model, asked, ways = load(), held_out(seed), {}
    some = [text for _, text in asked[:: len(asked) // TIMED]][:TIMED]
    for way in (way for way, settings in WAYS.items() if settings.get("fit") in (None, "probe")):
        first_pass, times = first_pass_of(way, seed), []
        for text in [some[0], *some]:  # the first warms up
            begin = time.process_time()
            (mixture,) = dispatch(model.library, model.tokenizer, [text], first_pass)
            middle = time.process_time()
            ids = torch.tensor(prompt_ids(model.tokenizer, [[{"role": "user", "content": text}]]))
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False}
            model.generate(ids, mixture=mixture, **options)
            times.append((middle - begin, time.process_time() - middle))
        first, second = (statistics.median(part) for part in zip(*times[1:], strict=True))
        share = round(statistics.median(a / (a + b) for a, b in times[1:]), 3)
        ways[way] = {"first_pass_ms": 1000 * first, "first_token_of_second_pass_ms": 1000 * second, "share": share}
    return {"questions": len(some), "ways": ways}


# --- tasks that no expert was trained on


def test_rows(task: str, seed: int) -> list[dict[str, Any]]:
    """Return the test rows of a task; those of HumanEval begin after its examples."""
    return questions(task, TASKS[task], seed, start=max(SHOTS) * DRAWS if task == "humaneval" else 0)


def examples(task: str, shots: int, draw: int, seed: int) -> list[dict[str, Any]]:
    """Return the first `shots` of the ten questions of a draw."""
    split = "test" if task == "humaneval" else "validation"
    return questions(task, max(SHOTS) * DRAWS, seed, split)[draw * max(SHOTS) :][:shots]


def static(task: str, way: str, seed: int) -> dict[str, Any]:
    """Score the base, an expert or the uniform mixture."""
    return {"task": task, "alpha": STATIC[way], **score(load(), test_rows(task, seed), STATIC[way])}


def routed(task: str, strategy: str, folder: Path, seed: int) -> dict[str, Any]:
    """Score each question by the answer of the expert that a first pass chooses, from that expert's own cell."""
    rows, model, begin = test_rows(task, seed), load(), time.process_time()
    chosen = [m.choice.replace("other", "base") for m in model.first_pass([r["prompt"] for r in rows], strategy)]
    seconds = time.process_time() - begin
    answers = {way: dict(result_of(folder, f"few_shot-{task}-{way}")["records"]) for way in set(chosen)}
    counts = {way: chosen.count(way) for way in ALONE}
    records = [(row["id"], answers[way][row["id"]]) for row, way in zip(rows, chosen, strict=True)]
    return {"task": task, "chosen": counts, "adapting_cpu_seconds": round(seconds, 1), **scored(records)}


def searched(task: str, method: str, shots: int, draw: int, folder: Path, seed: int) -> dict[str, Any]:
    """Search on a draw of examples and score the result; known mixtures take their own cell's score."""
    model, begin = load(), time.process_time()
    search = Search(population=8, iterations=6, elites=0.25, seed=seed + draw, **SEARCHES[method])
    mixture = model.adapt(examples(task, shots, draw, seed), search=search)
    seconds = time.process_time() - begin
    known = next((way for way, alpha in ALONE.items() if alpha == mixture.alpha), None)
    tested = result_of(folder, f"few_shot-{task}-{known}") or score(model, test_rows(task, seed), mixture.alpha)
    return {
        "task": task, "settings": {**asdict(search), "examples": shots, "draw": draw}, "alpha": mixture.alpha,
        "mixture": asdict(mixture), "adapting_cpu_seconds": round(seconds, 1),
        "tokens_read": mixture.provenance["tokens"], **{key: tested[key] for key in ("n", "accuracy", "records")},
    }  # fmt: skip


# --- batches


def mixed_batch(seed: int) -> dict[str, Any]:
    """
    Compare eight requests with eight mixtures in one batch with the same one by one, in float32.

    CPU seconds are the least of two repeats, in each of which every way runs once.
    """
    model = load(torch.float32)
    tokenizer, draws = model.tokenizer, np.random.default_rng(seed)
    drawn = draws.uniform(0, 0.7, (MIXED_ROWS - 1 - len(EXPERTS), len(EXPERTS))).tolist()
    chosen = [Mixture(alpha) for alpha in ALONE.values()]
    chosen += [Mixture(dict(zip(EXPERTS, row, strict=True))) for row in drawn]
    sources = ["svamp", "gsm8k", "arc_easy", "mbpp"] * (MIXED_ROWS // 4)
    prompts = [questions(name, 2, seed)[i // 4]["prompt"] for i, name in enumerate(sources)]
    batch = tokenizer.pad({"input_ids": prompt_ids(tokenizer, prompts)}, return_tensors="pt", padding_side="left")
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def together(mixtures: list[Mixture]) -> list[str]:
        with torch.no_grad(), model.library.activate(mixtures) as active:
            return tokenizer.batch_decode(active.generate(**batch, **settings)[:, -NEW_TOKENS:])

    def in_turn(merge: bool) -> list[str]:
        written = []
        for ids, mixture in zip(prompt_ids(tokenizer, prompts), chosen, strict=True):
            one = torch.tensor([ids])
            with torch.no_grad(), model.library.activate(mixture, merge=merge) as active:
                output = active.generate(input_ids=one, attention_mask=torch.ones_like(one), **settings)
            written += tokenizer.batch_decode(output[:, -NEW_TOKENS:])
        return written

    ways: dict[str, Callable[[], list[str]]] = {
        "mixed batch": lambda: together(chosen),
        "base, same batch": lambda: together([Mixture()]),
        "one by one": lambda: in_turn(False),
        "one by one, merged": lambda: in_turn(True),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    written = {}
    for _ in range(2):
        for way, run in ways.items():
            begin = time.process_time()
            written[way] = run()
            seconds[way].append(round(time.process_time() - begin, 3))
    least = {way: min(times) for way, times in seconds.items()}
    mixed, alone, base = (written[way] for way in ("mixed batch", "one by one", "base, same batch"))
    return {
        "rows": MIXED_ROWS, "new_tokens": NEW_TOKENS, "mixtures": [m.alpha for m in chosen],
        "same_text_as_one_by_one": sum(a == b for a, b in zip(mixed, alone, strict=True)),
        "other_text_than_the_base": sum(a != b for a, b in zip(mixed, base, strict=True)),
        "CPU seconds": seconds, "texts": written,
        "ratio_to_base": {way: round(t / least["base, same batch"], 3) for way, t in least.items()},
    }  # fmt: skip


def cells(folder: Path, seed: int) -> list[Cell]:
    """List all cells in their order."""
    made = [(f"dispatch-{way.replace(', ', '-')}", judge, way) for way in WAYS]
    made += [("dispatch-cost", cost), ("mixed_batch", mixed_batch)]
    made += [(f"few_shot-{task}-{way}", static, task, way) for task in TASKS for way in STATIC]
    made += [(f"few_shot-{t}-{s}", routed, t, s, folder) for t in TASKS for s in ("prompt", "classifier")]
    for draw in range(DRAWS):
        for shots in sorted(SHOTS, key=lambda shots: shots != 5):  # draws of 5 examples first
            for task in TASKS:
                made += [
                    (f"few_shot-{task}-{m}-{shots}-{draw}", searched, task, m, shots, draw, folder) for m in SEARCHES
                ]
    return [Cell(name, functools.partial(measure, *given, seed)) for name, measure, *given in made]


def options(doc: str | None) -> argparse.ArgumentParser:
    """Make the parser of the options that adaptation.py, routing.py and transfer.py share."""
    parser, out = parser_of(doc), RESULTS / "adaptation" / fingerprint()
    parser.add_argument("--minutes", type=float, default=20, help="minutes after which no further cell begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=out, help="folder of the results")
    return parser


def main() -> None:
    """Run the missing cells."""
    args = options(__doc__).parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    sys.exit(bool(run_cells(cells(args.out, args.seed), args.out, args.only, args.minutes, args.seed)))


if __name__ == "__main__":
    main()
