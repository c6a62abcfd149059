# SPDX-License-Identifier: Apache-2.0
"""
Do routing keys send requests to the right expert, and what does it cost? SmolLM2-135M.

    python benchmarks/routing.py --only keys        # accuracy, calibration, far-away text: 10 CPU minutes
    python benchmarks/routing.py --only few_shot    # the expert that a few examples point to: 2 CPU minutes
    python benchmarks/routing.py --only ttft        # seconds to the first token, on a quiet machine: 10 minutes

A cell writes `results/adaptation/routing/<cell>.json` once. Keys are made of training questions (code: MBPP, math:
GSM8K, reasoning: ARC-Easy), a third of them for each draw, and judged on the 120 held-out questions of adaptation.py
and on texts that are far from all of them (`far_away.json`). `other.json` got its long texts after a first run had
claimed long documents; those of `far_away.json` are others.
"""

import functools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adaptation import EXPERTS, SOURCES, held_out, measures, options, questions
from harness import RESULTS, Cell, Race, race, ratio, result_of, run_cells, wall_clock
from smollm2 import load_smollm2

from peft_svf import Expert, Transformer2Model
from peft_svf.adaptation.router import EVERYDAY, Router
from peft_svf.experts.key import ANCHOR, RoutingKey, key_ids, read_states
from peft_svf.tasks import get_task
from peft_svf.tasks.task import shuffled

OUT = RESULTS / "adaptation" / "routing"
CHOICE_EXPERTS = RESULTS / "adaptation" / "c4d8e52972a6"  # what each expert alone reaches on the tasks of `few_shot`
TRAINED_ON = {"code": "mbpp", "math": "gsm8k", "reasoning": "arc_easy"}
BLOCKS, SIZES, DRAWS = (5, 10, 15), (8, 16, 32, 64), 3  # of 30 blocks; prompts of a key
TASKS, SHOTS, SHOT_DRAWS = ("svamp", "arc_challenge", "math", "humaneval"), (3, 5, 10), 5
NEW_TOKENS = 1

base = functools.partial(load_smollm2, torch.float32)


def training_prompts(task: str, count: int) -> list[str]:
    """Draw questions of a task's training split."""
    records = shuffled(get_task(task).load("train"), "key")[:count]
    return [next(r[name] for name in ("question", "text") if name in r) for r in records]


def far_away() -> dict[str, list[Any]]:
    """Read the texts that no expert is for, by group, as chats."""

    def chat(text: str) -> Any:
        kind, _, rest = text.partition(":")
        if kind == "SYSTEM":
            system, _, user = rest.partition("|")
            return [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return [{"role": "user", "content": 12 * rest if kind == "LONG" else text}]

    groups = json.loads(Path(__file__).with_name("far_away.json").read_text())
    return {group: [chat(text) for text in texts] for group, texts in groups.items()}


def keys(seed: int) -> dict[str, Any]:
    """Judge keys of each block, pooling, size and draw; the states are read once for each block."""
    model, tokenizer = base()
    asked = held_out(seed)
    texts = {name: training_prompts(task, max(SIZES) * DRAWS) for name, task in TRAINED_ON.items()}
    texts |= {"other": json.loads(EVERYDAY.read_text()), "held out": [text for _, text in asked]}
    texts |= {f"far: {group}": chats for group, chats in far_away().items()}
    rows = []
    for block in BLOCKS:
        states = {name: read_states(model, key_ids(tokenizer, some), block) for name, some in texts.items()}
        half = states["other"].shape[1] // 2
        for pooling, part in {"both": slice(None), "mean": slice(half), "last": slice(half, None)}.items():
            pooled = {name: some[:, part] for name, some in states.items()}
            for size in SIZES:
                done = [judged(pooled, asked, size, draw) for draw in range(DRAWS)]
                rows.append({"block": block, "pooling": pooling, "prompts": size, "draws": done})
                rows[-1] |= {name: statistics.mean(d[name] for d in done) for name in ("accuracy", "ece", "claimed")}
                rows[-1]["logistic"] = [logistic(pooled, asked, size, d) for d in range(DRAWS)] if size == 64 else None
                print({k: v for k, v in rows[-1].items() if k != "draws"}, flush=True)
    return {"blocks": 30, "far_away": {g: len(c) for g, c in far_away().items()}, "rows": rows}


def drawn(states: dict[str, torch.Tensor], size: int, draw: int) -> dict[str, torch.Tensor]:
    """Return the states of one draw of keys, and of everyday requests, as a key file has them."""
    first = draw * max(SIZES)
    return {name: states[name][first : first + size].half() for name in EXPERTS} | {"other": states["other"]}


def judged(states: dict[str, torch.Tensor], asked: Sequence[tuple[str, str]], size: int, draw: int) -> dict[str, Any]:
    """Fit a router to one draw of keys and measure its decisions."""
    router = Router.fit(drawn(states, size, draw))

    def choices(name: str) -> list[dict[str, float]]:
        probabilities = router.scores(states[name]).softmax(-1).tolist()
        return [dict(zip(router.names, row, strict=True)) for row in probabilities]

    decisions = [
        {"source": source, "kind": SOURCES[source], "choice": max(p, key=lambda k: p[k]), "probabilities": p}
        for (source, _), p in zip(asked, choices("held out"), strict=True)
    ]
    groups = [name for name in states if name.startswith("far: ")]
    claimed = {g[5:]: sum(max(p, key=lambda k: p[k]) != "other" for p in choices(g)) for g in groups}
    share = sum(claimed.values()) / sum(len(states[group]) for group in groups)
    return {**measures(decisions), "claimed": share, "claimed_of_group": claimed, "temperature": router.temperature}


def logistic(states: dict[str, torch.Tensor], asked: Sequence[tuple[str, str]], size: int, draw: int) -> float:
    """Return the accuracy of a logistic regression on the same states, standardised."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = drawn(states, size, draw)
    kinds = [name for name, part in parts.items() for _ in part]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(torch.cat([part.float() for part in parts.values()]).numpy(), kinds)
    chosen = model.predict(states["held out"].numpy())
    return statistics.mean(SOURCES[source] == kind for (source, _), kind in zip(asked, chosen, strict=True))


def few_shot(seed: int) -> dict[str, Any]:
    """Guess the expert of a task from a few of its examples, by their mean log-probability; nothing is searched."""
    model, tokenizer = base()
    block, rows = BLOCKS[0], []
    texts = {name: training_prompts(task, max(SIZES)) for name, task in TRAINED_ON.items()}
    texts |= {"other": json.loads(EVERYDAY.read_text())}
    router = Router.fit({name: read_states(model, key_ids(tokenizer, some), block) for name, some in texts.items()})
    for task in TASKS:
        count = max(SHOTS) * SHOT_DRAWS
        asked = questions(task, count, seed, "test" if task == "humaneval" else "validation")
        states = read_states(model, key_ids(tokenizer, [row["prompt"] for row in asked]), block)
        scores = router.scores(states).log_softmax(-1)
        for shots in SHOTS:
            for draw in range(min(SHOT_DRAWS, len(asked) // max(SHOTS))):
                mean = scores[draw * max(SHOTS) :][:shots].mean(0)
                chosen = router.names[int(mean.argmax())]
                alone = result_of(CHOICE_EXPERTS, f"few_shot-{task}-{chosen.replace('other', 'base')}")
                rows.append({"task": task, "examples": shots, "draw": draw, "chosen": chosen})
                rows[-1]["accuracy"] = alone and alone["accuracy"]
    return {"rows": rows}


def ttft(seed: int) -> dict[str, Any]:
    """
    Race the first token of an answer: the base, a named expert, and each way to choose one.

    The experts are the base's own directions moved at random in the blocks from the key's on, which costs what trained
    ones cost; `early exit` has an expert that moves a lower block as well.
    """
    torch.manual_seed(seed)
    model, tokenizer = base()
    texts = {name: training_prompts(task, 64) for name, task in TRAINED_ON.items()}
    block, made = BLOCKS[0], {}
    for name, prompts in texts.items():
        *states, anchor = read_states(model, key_ids(tokenizer, [*prompts, ANCHOR]), block)
        made[name] = RoutingKey(torch.stack(states), anchor, block)
    weights = {n: m for n, m in model.named_modules() if ".mlp." in n and isinstance(m, torch.nn.Linear)}
    sizes = {name: min(weight.weight.shape) for name, weight in weights.items()}
    upper = [name for name in sizes if int(name.split(".")[2]) >= block]
    facts = {"peft_type": "SVF", "base_model_name_or_path": model.name_or_path, "basis_dtype": "float32"}

    def experts(names: Sequence[str]) -> list[Expert]:
        moved = {name: {weight: 0.02 * torch.randn(sizes[weight]) for weight in names} for name in made}
        return [Expert(name, moved[name], facts | {"target_modules": list(names)}, key=made[name]) for name in made]

    plain = [replace(expert, key=None) for expert in experts(list(sizes))]
    kinds = replace(plain[0], name="kinds")  # stands for a trained classifier
    ways = {"in flight": Transformer2Model(model, tokenizer, experts(upper))}
    ways["early exit"] = Transformer2Model(base()[0], tokenizer, experts(list(sizes)))
    ways["classifier"] = Transformer2Model(base()[0], tokenizer, plain, kinds)
    bare, races = base()[0], dict[str, Any]()
    for rows in (1, 8):
        chats = [[{"role": "user", "content": text}] for text in texts["math"][:rows]]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "padding": True}
        inputs = tokenizer.apply_chat_template(chats, tokenizer_kwargs={"padding_side": "left"}, **options)
        settings = {**inputs, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        contestants = {"base": lambda s=settings: bare.generate(**s)}
        contestants["named expert"] = lambda s=settings: ways["in flight"].generate(**s, expert="math")
        for name in ("in flight", "early exit", "classifier"):
            contestants[name] = lambda s=settings, name=name: ways[name].generate(**s)
        prompts = [chat[0]["content"] for chat in chats]
        if rows == 1:  # it takes minutes for eight
            contestants["prompt"] = lambda s=settings, p=prompts: ways["in flight"].generate(
                **s, prompts=p, first_pass="prompt"
            )
        result = race(Race("R", f"R/{rows}", ""), contestants, clock=wall_clock, budget=60.0, least=5)
        ratios = {name: ratio(result.samples, name, "base") for name in result.samples}
        tokens = int(inputs["input_ids"].shape[1])
        races[str(rows)] = {"tokens": tokens, "seconds": result.samples, "over_base": ratios}
        races[str(rows)]["not_available"] = result.not_available
    return {"rows": races, "dtype": "float32"}


def main() -> None:
    """Run the missing cells."""
    args = options(__doc__).parse_args()
    out = OUT if args.out.parent == OUT.parent else args.out
    cells = [Cell(run.__name__, functools.partial(run, args.seed)) for run in (keys, few_shot, ttft)]
    sys.exit(bool(run_cells(cells, out, args.only, args.minutes, args.seed)))


if __name__ == "__main__":
    main()
