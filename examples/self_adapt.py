# SPDX-License-Identifier: Apache-2.0
"""
A model that adapts itself: experts, two passes, mixtures, a few examples. `python examples/self_adapt.py`.

The base is SmolLM2-135M-Instruct from a PyPI package (92 MB, see `smollm2.py`), to which the experts beside this file
belong. They were trained to choose among given answers, so expect little of the text that they write.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from smollm2 import load_smollm2
from transformers import pipeline

from peft_svf import Mixture
from peft_svf.adaptation import Search

HERE = Path(__file__).parent
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
    base, tokenizer = load_smollm2()
    pipe = pipeline(
        "transformer2",
        model=base,
        tokenizer=tokenizer,
        experts=[HERE / "experts" / name for name in ("math", "reasoning")],
        classifier=HERE / "classifiers" / "dispatch",
    )
    model, library = pipe.model, pipe.model.library
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    settings = {"max_new_tokens": 32, "do_sample": False, "return_full_text": False}

    print("1. The first pass names the kind of each question, and the second answers with that expert:")
    library.add(HERE / "experts" / "code")  # at any time
    for question, (output,) in zip(
        QUESTIONS, pipe(chats, batch_size=3, return_dispatch=True, **settings), strict=True
    ):
        decision = output["dispatch"]
        print(
            f"   {question}\n   -> {decision['choice']} ({decision['confidence']:.2f}): {output['generated_text']!r}"
        )

    print("\n2. You choose, row by row; what the weights leave of 1 is the base model:")
    mixtures = [{"math": 1.0}, {"math": 0.5, "reasoning": 0.5}, {}]
    for mixture, (output,) in zip(
        mixtures, pipe([chats[0]] * 3, mixture=mixtures, batch_size=3, **settings), strict=True
    ):
        print(f"   {mixture or 'the base'}: {output['generated_text']!r}")

    print("\n3. A few solved examples choose:")
    mixture = model.adapt(EXAMPLES, search=Search(population=8, iterations=3, elites=0.25))
    check = mixture.provenance["held_out"]
    print(
        f"   {mixture.alpha or 'the base'}; {'given up in the check' if check['fell_back'] else 'kept by the check'}"
    )
    with TemporaryDirectory() as folder:
        mixture.save(Path(folder) / "sums.json")
        library.add_mixture("sums", Mixture.load(Path(folder) / "sums.json"))
    (output,) = pipe(chats[0], mixture="sums", **settings)
    print(f"   {output['generated_text']!r}")

    print("\n4. The library holds z-vectors, not models:")
    print(f"   {library.names} take {library.nbytes / 1e3:.0f} kB")
    library.remove("sums")
    with model.using({"code": 1.0}) as active:  # for forwards of your own
        active(**tokenizer("def reverse(items):", return_tensors="pt"))
    print("   Between calls the model is the base model, to the bit.")


if __name__ == "__main__":
    main()
