# SPDX-License-Identifier: Apache-2.0
"""
How often is each first pass right, how sure is it, and what does it cost? On held-out questions of four kinds.

    python benchmarks/adaptation/dispatch.py

Half of the questions are from sources that the classifier expert was not trained on, where there are such: HumanEval
and MATH-500, and requests written by hand for "other". SVAMP and ARC-Challenge are in its training split, though no
expert's. What is fitted, is fitted beforehand to validation questions: the probe, temperature and calibrations.

"Names" scores the names of the kinds as answers, "prompt", the default, the request as what each kind would ask.
"Content-free" divides by the likelihoods of requests that say nothing, "batch" by the mean over unlabelled questions,
"fitted" is a logistic regression on the likelihoods of labelled ones.
"""

import argparse
import functools
import json
import statistics
import time

import torch
from common import HERE, Cell, arguments, found, load, parse, run_cells

from peft_svf import Mixture
from peft_svf.adaptation.few_shot import ANYTHING_ELSE, dispatch, fit_calibration, fit_probe, fit_temperature
from peft_svf.adaptation.probe import METHODS, Probe
from peft_svf.evaluation import wilson
from peft_svf.experts.expert import OTHER
from peft_svf.rows import prompt_ids
from peft_svf.tasks import dispatch_prompt, get_task
from peft_svf.tasks.dispatch import everyday_requests
from peft_svf.tasks.task import shuffled

PER_KIND = 30
SOURCES = {  # name -> kind; the task of that name, test split
    "mbpp": "code",
    "humaneval": "code",
    "gsm8k": "math",
    "svamp": "math",
    "math": "math",
    "arc_easy": "reasoning",
    "arc_challenge": "reasoning",
    "everyday": OTHER,
    "written by hand": OTHER,
}
UNSEEN = ("humaneval", "math", "written by hand")  # by the classifier, in training
NAMES = {"strategy": "prompt", "read": "likelihood"}
WAYS = {  # settings of `dispatch`; "prompt" is the library's default
    "names": {**NAMES, "calibrate": False},
    "names, content-free": {**NAMES, "calibrate": True},
    "names, batch": {**NAMES, "fit": "unlabelled"},
    "names, fitted": {**NAMES, "fit": "labelled"},
    "prompt": {"strategy": "prompt"},
    "prompt, temperature": {"strategy": "prompt", "fit": "temperature"},
    "prompt, batch": {"strategy": "prompt", "fit": "unlabelled"},
    "prompt, fitted": {"strategy": "prompt", "fit": "labelled"},
    "classifier": {"strategy": "classifier"},
    "probe": {"strategy": "probe"},
}
FIT = 20  # validation questions of each kind that a probe or temperature is fitted to; as many others judge the method
TIMED = 8


def held_out(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs of source and question, as many of each kind."""
    per_kind = min(PER_KIND, args.rows or PER_KIND)
    kinds = list(SOURCES.values())
    asked = []
    for source, kind in SOURCES.items():
        asked += [(source, text) for text in texts(source, per_kind // kinds.count(kind), args.seed)]
    return asked


def texts(source: str, count: int, seed: int) -> list[str]:
    if source == "everyday":
        return everyday_requests("test", count)
    if source == "written by hand":
        return json.loads((HERE / "everyday.json").read_text())[:count]
    fields = ("question", "text", "problem", "prompt")
    records = shuffled(get_task(source).load("test"), f"dispatch:{seed}")[:count]
    return [next(record[field] for field in fields if field in record) for record in records]


def validation(args: argparse.Namespace, part: int) -> tuple[list[str], list[str]]:
    """Questions and kinds; part 0 is fitted to, part 1 judges settings."""
    records, count = shuffled(get_task("dispatch").load("validation"), f"fit:{args.seed}"), min(FIT, args.rows or FIT)
    kinds = [*dict.fromkeys(SOURCES.values())]
    taken = [r for kind in kinds for r in [r for r in records if r["kind"] == kind][part * count : (part + 1) * count]]
    return [r["question"] for r in taken], [r["kind"] for r in taken]


def probe_settings(args: argparse.Namespace) -> dict:
    """Accuracy of both methods in four layers on validation questions; the library reads the middle layer."""
    sets = [(every_layer(prompts), kinds) for prompts, kinds in (validation(args, 0), validation(args, 1))]
    (fitted, kinds), (judged, expected) = sets
    last = fitted.shape[1] - 1
    accuracy = {}
    for layer in (last // 4, (last + 1) // 2, 3 * last // 4, last):
        for method in METHODS:
            probe = Probe.fit(fitted[:, layer], kinds, method=method)
            chosen = [probe.labels[k] for k in probe.scores(judged[:, layer]).argmax(-1).tolist()]
            right = sum(a == b for a, b in zip(chosen, expected, strict=True))
            accuracy[f"{method}, layer {layer}"] = right / len(expected)
    middle = (last + 1) // 2
    method = max(METHODS, key=lambda m: accuracy[f"{m}, layer {middle}"])
    return {"layer": middle, "layers": last, "method": method, "validation accuracy": accuracy, "n": len(expected)}


@torch.no_grad()
def every_layer(prompts: list[str]) -> torch.Tensor:
    """The hidden states where the kind is to be named, `(prompts, layers + 1, d)`."""
    model, kinds = load(), {**load().library.descriptions, OTHER: ANYTHING_ELSE}
    states = []
    with model.library.activate(Mixture()) as active:
        for ids in prompt_ids(model.tokenizer, [dispatch_prompt(prompt, kinds) for prompt in prompts]):
            output = active(torch.tensor([ids]), output_hidden_states=True, use_cache=False, logits_to_keep=1)
            states.append(torch.stack([layer[0, -1].float() for layer in output.hidden_states]))
    return torch.stack(states)


@functools.cache
def probe_of(method: str, seed: int, rows: int | None) -> Probe:
    prompts, kinds = validation(argparse.Namespace(seed=seed, rows=rows), 0)
    return fit_probe(load().library, load().tokenizer, prompts, kinds, method=method)


def settings_of(way: str, args: argparse.Namespace) -> dict:
    """What was fixed on validation questions: probe, temperature or calibration."""
    settings, model = dict(WAYS[way]), load()
    fit = settings.pop("fit", None)
    prompts, kinds = validation(args, 0)
    if way == "probe":
        method = found(args.out, "dispatch-probe_settings")["method"]
        settings["probe"] = probe_of(method, args.seed, args.rows)
    if fit == "temperature":
        settings["temperature"] = fit_temperature(model.library, model.tokenizer, prompts, kinds, **settings)
    elif fit:
        known = kinds if fit == "labelled" else None
        settings["calibrate"] = fit_calibration(model.library, model.tokenizer, prompts, known, **settings)
    return settings


def judge(way: str, args: argparse.Namespace) -> dict:
    """The decisions of one way on all questions, with accuracy and calibration."""
    asked, settings, model = held_out(args), settings_of(way, args), load()
    mixtures = dispatch(model.library, model.tokenizer, [text for _, text in asked], **settings)
    kinds = [SOURCES[source] for source, _ in asked]
    decisions = [
        {"source": source, "kind": kind, "choice": m.choice, "probabilities": m.probabilities}
        for (source, _), kind, m in zip(asked, kinds, mixtures, strict=True)
    ]
    return {"way": way, "temperature": settings.get("temperature"), **measures(decisions), "decisions": decisions}


def measures(decisions: list[dict]) -> dict:
    """
    Accuracy, calibration error and Brier score of decisions.

    ECE: mean over ten bins of the largest probability, weighted by their size, of abs(accuracy - mean probability).
    Brier: mean of `Σ (p - y)²` over the kinds, 0 to 2.
    """
    right = [d["kind"] == d["choice"] for d in decisions]
    bins: dict[int, list[tuple[bool, float]]] = {}
    for d, is_right in zip(decisions, right, strict=True):
        top = max(d["probabilities"].values())
        bins.setdefault(min(9, int(10 * top)), []).append((is_right, top))
    ece = sum(abs(sum(r for r, _ in part) - sum(p for _, p in part)) for part in bins.values()) / len(decisions)
    brier = statistics.mean(sum((p - (k == d["kind"])) ** 2 for k, p in d["probabilities"].items()) for d in decisions)
    confusion: dict[str, dict[str, int]] = {}
    for d in decisions:
        row = confusion.setdefault(d["kind"], dict.fromkeys(d["probabilities"], 0))
        row[d["choice"]] += 1
    by_source = {
        source: [sum(r for r, _ in part), len(part)]
        for source in SOURCES
        if (part := [(r, d) for r, d in zip(right, decisions, strict=True) if d["source"] == source])
    }
    return {
        "n": len(decisions),
        "accuracy": statistics.mean(right),
        "interval": wilson(sum(right), len(right)),
        "ece": ece,
        "brier": brier,
        "confusion": confusion,
        "right_of_source": by_source,
    }


def cost(args: argparse.Namespace) -> dict:
    """CPU seconds of pass 1 and of the prefill and first token of pass 2, one request at a time."""
    model, asked = load(), held_out(args)
    some = [text for _, text in asked[:: max(1, len(asked) // TIMED)]][:TIMED]
    shares = {}
    for way in WAYS:
        if "fit" in WAYS[way]:
            continue  # costs what the way does without
        settings = settings_of(way, args)
        times = []
        for text in [some[0], *some]:  # the first warms up
            begin = time.process_time()
            (mixture,) = dispatch(model.library, model.tokenizer, [text], **settings)
            middle = time.process_time()
            ids = torch.tensor(prompt_ids(model.tokenizer, [[{"role": "user", "content": text}]]))
            mask = torch.ones_like(ids)
            model.generate(ids, attention_mask=mask, mixture=mixture, max_new_tokens=1, do_sample=False)
            times.append((middle - begin, time.process_time() - middle))
        first, second = (statistics.median(part) for part in zip(*times[1:], strict=True))
        shares[way] = {
            "first_pass_ms": round(1000 * first, 1),
            "first_token_of_second_pass_ms": round(1000 * second, 1),
            "share": round(statistics.median(a / (a + b) for a, b in times[1:]), 3),
        }
    return {"questions": len(some), "ways": shares}


def cells(args: argparse.Namespace) -> list[Cell]:
    made = [Cell("dispatch-probe_settings", lambda: probe_settings(args))]
    made += [Cell(f"dispatch-{way.replace(', ', '-')}", functools.partial(judge, way, args)) for way in WAYS]
    return [*made, Cell("dispatch-cost", lambda: cost(args))]


if __name__ == "__main__":
    args = parse(arguments(__doc__))
    run_cells(cells(args), args)
