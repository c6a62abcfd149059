# SPDX-License-Identifier: Apache-2.0
"""
A model that adapts itself, the whole story: experts, two passes, mixtures, a few examples, a library that changes.

`python examples/self_adapt.py` takes SmolLM2-135M-Instruct (92 MB from PyPI, see `smollm2.py`) and the experts beside
this file; `--tiny` a random model and random experts, which answer nonsense in seconds.
"""

import argparse
import tempfile
from pathlib import Path
from threading import Thread

import torch
from peft import get_peft_model
from smollm2 import load_smollm2
from tiny_model import tiny_model, tiny_tokenizer
from transformers import TextIteratorStreamer, pipeline

from peft_svf import Mixture, SVFConfig
from peft_svf.adaptation import FirstPass, Search
from peft_svf.experts.transfer import transfer_expert

HERE = Path(__file__).resolve().parent
QUESTIONS = [
    "Anna has 12 apples and buys 7 more. How many apples has she now?",
    "Write a Python function that reverses a list.",
    "Which of these is a mammal: a trout, a bat, an owl?",
]
EXAMPLES = [
    {"prompt": "A pen costs 3 coins. What do 4 pens cost?", "choices": ["12", "7", "34"], "label": 0},
    {"prompt": "Tom has 9 nuts and eats 5. How many are left?", "choices": ["14", "4", "5"], "label": 1},
    {"prompt": "2 boxes of 6 eggs are how many eggs?", "choices": ["8", "26", "12"], "label": 2},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model and random experts, in seconds")
    tiny = parser.parse_args().tiny
    with tempfile.TemporaryDirectory() as scratch:
        if tiny:
            base, tokenizer = tiny_model(), tiny_tokenizer()
            names = ("code", "math", "reasoning", "dispatch")
            folders = {name: random_expert(Path(scratch) / name, seed) for seed, name in enumerate(names)}
        else:
            base, tokenizer = load_smollm2()
            folders = {name: HERE / "experts" / name for name in ("code", "math", "reasoning")}
            folders["dispatch"] = HERE / "classifiers" / "dispatch"
        settings = {"max_new_tokens": 8 if tiny else 48, "do_sample": False, "return_full_text": False}
        tell(base, tokenizer, folders, settings, Path(scratch))


def tell(base, tokenizer, folders: dict[str, Path], settings: dict, scratch: Path) -> None:
    experts = [folders["math"], folders["reasoning"]]
    pipe = pipeline("transformer2", model=base, tokenizer=tokenizer, experts=experts, classifier=folders["dispatch"])
    model, library = pipe.model, pipe.model.library

    print("1. The first pass names the kind of each question, the second answers with that expert:")
    library.add(folders["code"])  # at any time, also while it answers
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = pipe(chats, batch_size=3, return_dispatch=True, **settings)
    for question, (output,) in zip(QUESTIONS, outputs, strict=True):
        found = output["dispatch"]
        print(f"   {question}\n   -> {found['choice']} ({found['confidence']:.2f}): {output['generated_text']!r}")
    unsure = model.first_pass(QUESTIONS, first_pass=FirstPass("classifier", threshold=0.9, fallback="mix"))
    print(f"   where it is not sure enough all may answer: {[shown(mixture) for mixture in unsure]}")

    print("\n2. Or you say who answers, row by row; what the weights leave of 1 is the base model:")
    chosen = [{"math": 1.0}, {"math": 0.5, "reasoning": 0.5}, {}]
    for mixture, (output,) in zip(chosen, pipe([chats[0]] * 3, mixture=chosen, batch_size=3, **settings), strict=True):
        print(f"   {mixture or 'the base'}: {output['generated_text']!r}")

    print("\n3. Or a few solved examples say it:")
    mixture = model.adapt(EXAMPLES, search=Search(population=8, iterations=3, elites=0.25))
    check = mixture.provenance["held_out"]  # each example was left out once; right, then its log-probability
    found, base_alone = ([round(x, 2) for x in scores] for scores in (check["found"], check["rivals"]["other"]))
    verdict = f"given up for {check['fell_back']!r}" if check["fell_back"] else "kept"
    print(f"   on examples that did not choose it what was found scores {found}, the base {base_alone}: {verdict}")
    print(f"   {shown(mixture)}, saved and loaded again")
    mixture.save(scratch / "sums.json")
    mixture = Mixture.load(scratch / "sums.json")
    with model.using(mixture) as active, torch.no_grad():  # for forwards of your own
        active(**tokenizer("2 + 2 =", return_tensors="pt").to(model.device))

    print("\n4. As a stream, with that mixture:")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    asking = Thread(target=pipe, args=(chats[0],), kwargs={"mixture": mixture, "streamer": streamer, **settings})
    asking.start()
    print("   " + repr("".join(streamer)))
    asking.join()

    print("\n5. Weights for each layer make a new expert, which the first pass can choose from then on:")
    search = Search("gradient", iterations=3, per_layer=True)
    # no check: leaving one out flatters a search over many weights
    layers = model.adapt(EXAMPLES, search=search, name="sums", holdout=[]).provenance["layers"]
    library.expert("sums").save(scratch / "sums")
    (output,) = pipe(chats[0], expert="sums", **settings)
    print(
        f"   {len(layers)} layers, the last {shown(Mixture(list(layers.values())[-1]))}: {output['generated_text']!r}"
    )

    print("\n6. The library holds z-vectors, not models:")
    print(f"   {library.names}, in memory {library.in_memory}: {library.nbytes / 1e3:.0f} kB")
    math = library.expert("math")
    library.add(transfer_expert(math, base, base, mode="shuffled", seed=0, name="control"))
    rows = model.first_pass([""] * 3, expert=["math", "control", "other"])
    print(f"   asked by name: {[mixture.choice for mixture in rows]}; its control has the same numbers, shuffled")
    library.remove("control")
    library.remove("sums")
    print(f"   {library.names}; the model between calls is the base model, to the bit")


def shown(mixture: Mixture) -> str:
    """The weights of a mixture on one line."""
    return ", ".join(f"{name} {weight:.2f}" for name, weight in mixture.alpha.items()) or "the base alone"


def random_expert(folder: Path, seed: int) -> Path:
    """Save an expert of the tiny model with random z-vectors, as `save_pretrained` of a trained one does."""
    base = tiny_model()
    torch.manual_seed(seed)
    config = SVFConfig(task_type="CAUSAL_LM", init_weights=False, description=f"about {folder.name}")
    get_peft_model(base, config).save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    main()
