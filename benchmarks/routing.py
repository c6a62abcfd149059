# SPDX-License-Identifier: Apache-2.0
"""
Do routing keys send requests to the right expert, and what does it cost? SmolLM2-135M.

    python benchmarks/routing.py --only keys        # accuracy, calibration, far-away text: 5 CPU minutes
    python benchmarks/routing.py --only qwen        # the same for Qwen2.5-Coder-0.5B (a folder in PEFT_SVF_QWEN)
    python benchmarks/routing.py --only qwen --states FOLDER    # keeps what it has read there, and goes on with it
    python benchmarks/routing.py --only few_shot    # the expert that a few examples point to: 2 CPU minutes
    python benchmarks/routing.py --only ttft        # CPU seconds of the first tokens: 4 minutes
    python benchmarks/routing.py --only memory      # of a first pass

A cell writes `results/adaptation/routing/<cell>.json` once. Keys are made of training questions (code: MBPP, math:
GSM8K, reasoning: ARC-Easy), a third of them for each draw, and judged on the 120 held-out questions of adaptation.py
and on texts that are far from all of them (`far_away.json`); the classifier and its constants were chosen on 85 other
questions of these sources. `other.json` got its long texts after a first run had claimed long documents; those of
`far_away.json` are others.
"""

import functools
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from adaptation import EXPERTS, SOURCES, held_out, measures, options, questions
from harness import RESULTS, Cell, ratio, result_of, run_cells
from smollm2 import load_smollm2
from torch import Tensor, nn

from peft_svf import Expert, Transformer2Model
from peft_svf.adaptation import router
from peft_svf.adaptation.router import EVERYDAY, Router
from peft_svf.experts.key import ANCHOR, RoutingKey, blocks_of, early_exit, hidden_of, key_ids, pooled, read_states
from peft_svf.tasks import get_task
from peft_svf.tasks.task import shuffled
from peft_svf.two_pass import MERGE_AT, load_model

OUT = RESULTS / "adaptation" / "routing"
CHOICE_EXPERTS = RESULTS / "adaptation" / "c4d8e52972a6"  # what each expert alone reaches on the tasks of `few_shot`
TRAINED_ON = {"code": "mbpp", "math": "gsm8k", "reasoning": "arc_easy"}
BLOCKS, SIZES, DRAWS = (5, 10, 15), (8, 16, 32, 64), 3  # of 30 blocks; prompts of a key
QWEN, QWEN_BLOCKS = os.environ.get("PEFT_SVF_QWEN", "Qwen/Qwen2.5-Coder-0.5B-Instruct"), (4, 8)  # of 24 blocks
DEFAULT = BLOCKS[1]
CONSTANTS = (0.0, 1.0, 3.0, 5.0, 10.0)
TASKS, SHOTS, SHOT_DRAWS = ("svamp", "arc_challenge", "math", "humaneval"), (3, 5, 10), 5
NEW_TOKENS, REPEATS = 6, 3

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


def keys(
    seed: int,
    load: Callable[[], tuple[nn.Module, Any]],
    blocks: Sequence[int],
    sizes: Sequence[int],
    folder: Path | None,
) -> dict[str, Any]:
    """Judge keys of each block, pooling, size and draw, and constants on other questions; each text is read once."""
    asked, load = held_out(seed), functools.cache(load)
    others = [question for question in held_out(seed + 1) if question not in asked]
    texts = {name: training_prompts(task, max(SIZES) * DRAWS) for name, task in TRAINED_ON.items()}
    texts = {name: [p for d in range(DRAWS) for p in ps[d * max(SIZES) :][: max(sizes)]] for name, ps in texts.items()}
    texts |= {"other": json.loads(EVERYDAY.read_text()), "held out": [text for _, text in asked]}
    texts |= {"validation": [text for _, text in others]}
    texts |= {f"far: {group}": chats for group, chats in far_away().items()}
    read = {name: states_of(load, some, blocks, folder and folder / f"{name}.pt") for name, some in texts.items()}
    rows, constants = [], []
    for i, block in enumerate(blocks):
        states = {name: some[i] for name, some in read.items()}
        half = states["other"].shape[1] // 2
        for pooling, part in {"both": slice(None), "mean": slice(half), "last": slice(half, None)}.items():
            pools = {name: some[:, part] for name, some in states.items()}
            for size in sizes if pooling == "both" else sizes[-1:]:
                done = [judged(pools, asked, size, draw) for draw in range(DRAWS)]
                rows.append({"block": block, "pooling": pooling, "prompts": size, "draws": done, **means(done)})
                draws = range(DRAWS) if (pooling, size) == ("both", sizes[-1]) else ()
                rows[-1]["covariance"] = [shrunk_covariance(pools, asked, size, draw) for draw in draws]
                print({k: v for k, v in rows[-1].items() if k != "draws"}, flush=True)
        for size in (sizes[0], sizes[-1]):
            scores = [shrunk_covariance(states, others, size, draw, "validation") for draw in range(DRAWS)]
            facts = {"questions": len(others), "covariance": statistics.mean(scores)}
            for constant in CONSTANTS:
                with patch.object(router, "CONSTANT", constant):
                    done = [judged(states, others, size, draw, "validation") for draw in range(DRAWS)]
                constants.append({"block": block, "constant": constant, "prompts": size, **means(done), **facts})
                print(constants[-1], flush=True)
    facts = {"blocks": len(blocks_of(load()[0])), "far_away": {g: len(c) for g, c in far_away().items()}}
    return {**facts, "constant": router.CONSTANT, "rows": rows, "constants": constants}


def qwen() -> tuple[nn.Module, Any]:
    """Load Qwen2.5-Coder."""
    return load_model(QWEN, dtype=torch.float32)


def states_of(
    load: Callable[[], tuple[nn.Module, Any]], texts: Sequence[Any], blocks: Sequence[int], path: Path | None
) -> Tensor:
    """Read texts up to the last of the blocks: the pooled inputs of each block, `(blocks, texts, width)`."""
    if path is not None and path.exists():
        return torch.load(path, weights_only=True)
    (model, tokenizer), states = load(), []
    for row in key_ids(tokenizer, texts):
        mask, lower = torch.ones(1, len(row), dtype=torch.long), list[Tensor]()

        def keep(module: nn.Module, args: Any, kwargs: Any, mask: Tensor = mask, lower: list[Tensor] = lower) -> None:
            lower.append(pooled(hidden_of(args, kwargs), mask, "both"))

        stack = blocks_of(model)
        hooks = [stack[block].register_forward_pre_hook(keep, with_kwargs=True) for block in blocks[:-1]]
        last = early_exit(model, torch.tensor([[*row]]), mask, blocks[-1], "both")
        states.append(torch.cat([*lower, last]))
        for hook in hooks:
            hook.remove()
    read = torch.stack(states, 1)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(read, path)
    return read


def means(done: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Average what draws have measured."""
    return {name: statistics.mean(d[name] for d in done) for name in ("accuracy", "ece", "claimed")}


def drawn(states: dict[str, Tensor], size: int, draw: int) -> dict[str, Tensor]:
    """Return the states of one draw of keys, and of everyday requests, as a key file has them."""
    first = draw * (len(states[EXPERTS[0]]) // DRAWS)
    return {name: states[name][first : first + size].half() for name in EXPERTS} | {"other": states["other"]}


def judged(
    states: dict[str, Tensor], asked: Sequence[tuple[str, str]], size: int, draw: int, name: str = "held out"
) -> dict[str, Any]:
    """Fit a router to one draw of keys and measure its decisions on the questions whose states have this name."""
    fitted = Router.fit(drawn(states, size, draw))

    def choices(name: str) -> list[dict[str, float]]:
        probabilities = fitted.scores(states[name]).softmax(-1).tolist()
        return [dict(zip(fitted.names, row, strict=True)) for row in probabilities]

    decisions = [
        {"source": source, "kind": SOURCES[source], "choice": max(p, key=lambda k: p[k]), "probabilities": p}
        for (source, _), p in zip(asked, choices(name), strict=True)
    ]
    groups = [name for name in states if name.startswith("far: ")]
    claimed = {g[5:]: sum(max(p, key=lambda k: p[k]) != "other" for p in choices(g)) for g in groups}
    share = sum(claimed.values()) / sum(len(states[group]) for group in groups)
    return {**measures(decisions), "claimed": share, "claimed_of_group": claimed}


def shrunk_covariance(
    states: dict[str, Tensor], asked: Sequence[tuple[str, str]], size: int, draw: int, name: str = "held out"
) -> float:
    """Return the accuracy of linear discriminant analysis on the same states, its covariance shrunk by half."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    parts = drawn(states, size, draw)
    kinds = [name for name, part in parts.items() for _ in part]
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.5, priors=[1 / len(parts)] * len(parts))
    model.fit(torch.cat([part.float() for part in parts.values()]).numpy(), kinds)
    chosen = model.predict(states[name].numpy())
    return statistics.mean(SOURCES[source] == kind for (source, _), kind in zip(asked, chosen, strict=True))


def few_shot(seed: int) -> dict[str, Any]:
    """Guess the expert of a task from a few of its examples, by their mean log-probability; nothing is searched."""
    model, tokenizer = base()
    block, rows = DEFAULT, []
    texts = {name: training_prompts(task, max(SIZES)) for name, task in TRAINED_ON.items()}
    texts |= {"other": json.loads(EVERYDAY.read_text())}
    fitted = Router.fit({name: read_states(model, key_ids(tokenizer, some), block) for name, some in texts.items()})
    for task in TASKS:
        count = max(SHOTS) * SHOT_DRAWS
        asked = questions(task, count, seed, "test" if task == "humaneval" else "validation")
        states = read_states(model, key_ids(tokenizer, [row["prompt"] for row in asked]), block)
        scores = fitted.scores(states).log_softmax(-1)
        for shots in SHOTS:
            for draw in range(min(SHOT_DRAWS, len(asked) // max(SHOTS))):
                mean = scores[draw * max(SHOTS) :][:shots].mean(0)
                chosen = fitted.names[int(mean.argmax())]
                alone = result_of(CHOICE_EXPERTS, f"few_shot-{task}-{chosen.replace('other', 'base')}")
                rows.append({"task": task, "examples": shots, "draw": draw, "chosen": chosen})
                rows[-1]["accuracy"] = alone and alone["accuracy"]
    return {"rows": rows}


def ttft(seed: int, rows: int) -> dict[str, Any]:
    """
    Time the first tokens of answers that may have 64: the base, a named expert, routing in flight and by early exit.

    The experts are the base's own directions moved at random in the blocks from the key's on, which costs what trained
    ones cost; `early exit` has experts that move lower blocks as well. The request before was answered by the same
    expert, or, where it says so, by another.
    """
    torch.manual_seed(seed)
    model, tokenizer = base()
    texts = {name: training_prompts(task, 64) for name, task in TRAINED_ON.items()}
    block, made = DEFAULT, {}
    for name, prompts in texts.items():
        *states, anchor = read_states(model, key_ids(tokenizer, [*prompts, ANCHOR]), block)
        made[name] = RoutingKey(torch.stack(states), anchor, block)
    weights = {n: m for n, m in model.named_modules() if ".mlp." in n and isinstance(m, nn.Linear)}
    sizes = {name: min(weight.weight.shape) for name, weight in weights.items()}
    upper = [name for name in sizes if int(name.split(".")[2]) >= block]
    facts = {"peft_type": "SVF", "base_model_name_or_path": model.name_or_path, "basis_dtype": "float32"}

    def experts(names: Sequence[str]) -> list[Expert]:
        moved = {name: {weight: 0.02 * torch.randn(sizes[weight]) for weight in names} for name in made}
        return [Expert(name, moved[name], facts | {"target_modules": list(names)}, key=made[name]) for name in made]

    upper_model = Transformer2Model(model, tokenizer, experts(upper))
    whole_model = Transformer2Model(base()[0], tokenizer, experts(list(sizes)))
    ways: dict[str, tuple[Any, str | None, dict[str, Any]]] = {  # model, expert of the request before, arguments
        "base": (base()[0], None, {}),
        "named expert": (upper_model, "math", {"expert": "math"}),
        "named expert, another before": (upper_model, "code", {"expert": "math"}),
        "in flight": (upper_model, "math", {}),
        "in flight, another before": (upper_model, "code", {}),
        "early exit": (whole_model, "math", {}),
    }
    chats = [[{"role": "user", "content": text}] for text in texts["math"][:rows]]
    some: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chats, padding=True, tokenizer_kwargs={"padding_side": "left"}, **some)
    short = tokenizer.apply_chat_template(chats[0], max_length=16, truncation=True, **some)
    done: dict[str, list[list[float]]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):  # the first warms up
        for name in random.Random(repeat).sample(list(ways), len(ways)):
            asked, before, arguments = ways[name]
            if before:
                tokens_of(asked, short, MERGE_AT + 1, expert=before)  # which merges it
            done[name].append(tokens_of(asked, inputs, NEW_TOKENS, **arguments))
    parts = {
        "first": {name: [seconds[0] for seconds in runs[1:]] for name, runs in done.items()},
        "second": {name: [seconds[1] for seconds in runs[1:]] for name, runs in done.items()},
        "later": {name: [statistics.mean(seconds[2:]) for seconds in runs[1:]] for name, runs in done.items()},
    }
    over_base = {part: {name: ratio(s, name, "base") for name in ways} for part, s in parts.items()}
    facts = {"rows": rows, "tokens": int(inputs["input_ids"].shape[1]), "dtype": "float32"}
    return {**facts, "clock": "CPU seconds of one thread", "seconds": parts, "over_base": over_base}


def memory(seed: int) -> dict[str, Any]:
    """Measure what early exit, and the base's own first token, take at most beyond the model (Linux alone)."""
    model, tokenizer = base()
    ids = key_ids(tokenizer, training_prompts("gsm8k", 8))
    width, rows = max(map(len, ids)), len(ids)
    padded = torch.tensor([[0] * (width - len(row)) + [*row] for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    model.generate(padded[:, -8:], attention_mask=mask[:, -8:], max_new_tokens=1, do_sample=False)  # allocates

    def peak(run: Callable[[], Any]) -> float:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before = resident("VmHWM")
        run()
        return (resident("VmHWM") - before) / 1024

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    early = peak(lambda: early_exit(model, padded, mask, DEFAULT, "both"))
    whole = peak(lambda: model.generate(padded, attention_mask=mask, max_new_tokens=1, do_sample=False))
    return {"rows": rows, "tokens": width, "early_exit_mb": early, "base_mb": whole}


def tokens_of(model: Any, inputs: dict[str, Any], count: int, **arguments: Any) -> list[float]:
    """Measure CPU seconds for each of the first `count` tokens of an answer that may have 64."""
    times = [time.process_time()]

    def tick(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        times.append(time.process_time())
        return torch.full((len(ids),), len(times) > count)

    model.generate(
        **inputs, min_new_tokens=64, max_new_tokens=64, do_sample=False, stopping_criteria=[tick], **arguments
    )
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    """Run the missing cells."""
    parser = options(__doc__)
    parser.add_argument("--states", type=Path, help="folder for the states of texts: read if there, else kept")
    args = parser.parse_args()
    out = OUT if args.out.parent == OUT.parent else args.out
    models: dict[str, Any] = {
        "keys": {"load": base, "blocks": BLOCKS, "sizes": SIZES},
        "qwen": {"load": qwen, "blocks": QWEN_BLOCKS, "sizes": SIZES[:3]},
    }
    runs: dict[str, Any] = {
        name: functools.partial(keys, **settings, folder=args.states and args.states / name)
        for name, settings in models.items()
    }
    runs |= {"few_shot": few_shot, "memory": memory}
    runs |= {f"ttft-{rows}": functools.partial(ttft, rows=rows) for rows in (1, 8)}
    cells = [Cell(name, functools.partial(run, args.seed)) for name, run in runs.items()]
    sys.exit(bool(run_cells(cells, out, args.only, args.minutes, args.seed)))


if __name__ == "__main__":
    main()
