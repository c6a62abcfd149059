# SPDX-License-Identifier: Apache-2.0
"""
What does it save to score a population of mixtures in mixed batches? Against one candidate at a time.

    PEFT_SVF_DATA=examples/data python benchmarks/adaptation/population.py

Both score the same candidates on the same examples. "One at a time" gives the model one mixture and reads all examples
in one batch, once with the activation form and once on merged weights. Each figure is the least of the repeats, in
seconds of CPU time (one thread), which other work on the machine disturbs less. Writes `population-<date>.json` beside
this file.
"""

import argparse
import json
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # smollm2.py


def one_at_a_time(library, tokenizer, mixtures, rows, merge, task=None, **generation):
    """The log-probabilities of the right choices, or right and wrong, `(candidates, examples)`."""
    from peft_svf.evaluation import choice_logps, evaluate

    found = []
    for mixture in mixtures:
        with torch.no_grad(), library.activate(mixture, merge=merge) as model:
            if task is None:
                logps = choice_logps(model, tokenizer, rows).log_softmax(-1)
                found.append([float(logps[i, row["label"]]) for i, row in enumerate(rows)])
            else:
                done = evaluate(model, tokenizer, rows, batch_size=len(rows), task=task, **generation)
                found.append([float(record["right"]) for record in done.records])
    return np.array(found)


def least_seconds(run, repeats):
    """The shortest of the repeats in CPU time, and what the last one gave."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        found = run()
        times.append(time.process_time() - begin)
    return min(times), found


def measure(library, tokenizer, weights, members, rows, args, task=None, **generation):
    """Seconds of each way for one population, and how far their answers are apart."""
    from peft_svf.adaptation.judge import Judge

    judge = Judge(
        library, tokenizer, weights, rows, task=task, generation=generation, batch_size=args.batch_size, seed=args.seed
    )
    inner = judge._likelihoods if task is None else judge._completions
    rows = judge.rows if task is None else judge.examples  # in the judge's order
    mixtures = [weights.mixture(member, {}) for member in members]
    ways = {
        "mixed batches": lambda: np.asarray(inner(members)[1 if task is None else 0]),
        "one at a time": lambda: one_at_a_time(library, tokenizer, mixtures, rows, False, task, **generation),
        "one at a time, merged": lambda: one_at_a_time(library, tokenizer, mixtures, rows, True, task, **generation),
    }
    timed = {}
    for name, run in ways.items():
        timed[name] = least_seconds(run, args.repeats)
        print(f"{name}: {timed[name][0]:.2f} s", flush=True)
    seconds = {name: round(t, 3) for name, (t, _) in timed.items()}
    batched = timed["mixed batches"]
    return {
        "candidates": len(members),
        "examples": len(rows),
        "CPU seconds": seconds,
        "ratio": {name: round(t / batched[0], 2) for name, t in seconds.items()},
        "largest difference": {name: float(np.abs(found - batched[1]).max()) for name, (_, found) in timed.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    from smollm2 import NAME, load_smollm2

    from peft_svf import Expert, ExpertLibrary
    from peft_svf.adaptation.judge import Weights
    from peft_svf.tasks import get_task
    from peft_svf.training.result import versions, write_file

    model, tokenizer = load_smollm2(torch.float32)
    folder = ROOT / "examples" / "experts"
    saved = [Expert.load(folder / name) for name in ("code", "math", "reasoning")]
    # their bases are in bfloat16; in the model's float32 rounding cannot make the ways answer differently
    library = ExpertLibrary(model, [Expert(e.name, e.offsets, e.config | {"basis_dtype": "float32"}) for e in saved])
    weights = Weights(tuple(library.names))
    members = np.random.default_rng(args.seed).uniform(0, 0.7, (args.population, weights.size))
    task = get_task("svamp")
    with torch.no_grad():
        choice = task.rows("validation", limit=args.examples, seed=args.seed)
        written = task.rows("validation", form="generate", limit=args.examples // 2, seed=args.seed)
        found = {
            "choice form": measure(library, tokenizer, weights, members, choice, args),
            "generated form": measure(
                library, tokenizer, weights, members, written, args, task, max_new_tokens=args.new_tokens
            ),
        }
    now = datetime.now(timezone.utc)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "seed": args.seed,
        "base_model": NAME,
        "dtype": "float32",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "settings": vars(args),
        "task": task.name,
        "results": found,
    }
    path = HERE / f"population-{now:%Y%m%d-%H%M%S}.json"
    write_file(path, json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(path.name)


if __name__ == "__main__":
    main()
