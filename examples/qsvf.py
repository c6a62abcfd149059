# SPDX-License-Identifier: Apache-2.0
"""
Train z-vectors on a 4-bit base, then use them on the base they were quantised from.

    python examples/qsvf.py --out qsvf_expert           # SmolLM2-135M in 4 bits on a CPU: some minutes
    python examples/qsvf.py --out qsvf_expert --tiny    # a random model: seconds

Needs `pip install "peft-svf[quant,eval]"`. The base stays packed, products with it go through bitsandbytes' kernels,
and z-vectors, in float32, are all that trains. Their directions come from the unquantised weights of the checkpoint:
the expert loads on the bfloat16 base as well. Data come from the folder that PEFT_SVF_DATA names, else from the Hub.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel, get_peft_model
from smollm2 import smollm2_folder
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.tasks import get_task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the expert")
    parser.add_argument("--task", default="arc_easy", help="a task with options, of which the right one is learnt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--tiny", action="store_true", help="a random model and sums to learn: seconds")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.tiny:
        with TemporaryDirectory() as folder:
            run(args, tiny_checkpoint(folder), sums(200), sums(40, 7))
        return
    task = get_task(args.task)
    train = [(row["prompt"], row["choices"][row["label"]]) for row in task.rows("train", "choice", seed=0)]
    test = [(row["prompt"], row["choices"][row["label"]]) for row in task.rows("validation", "choice", limit=64)]
    run(args, str(smollm2_folder()), train, test)


def run(args: argparse.Namespace, folder: str, train: list, test: list) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR_BITS, device_map=DEVICE)
    model = get_peft_model(packed, SVFConfig(task_type="CAUSAL_LM", basis_from="checkpoint"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"4-bit base: {packed.get_memory_footprint() / 1e6:.1f} MB; z: {sum(p.numel() for p in trained):,} numbers")
    print(f"bases of the adapted weights: {model.svf_memory()['total']['basis'] / 1e6:.1f} MB")

    before = loss_of(model, tokenizer, test)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    start = time.perf_counter()
    for step in range(args.steps):
        model.train()
        rows = [train[(step * args.batch_size + row) % len(train)] for row in range(args.batch_size)]
        loss = model(**encode(tokenizer, rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    after = loss_of(model, tokenizer, test)
    print(f"{args.steps} steps in {seconds:.0f} s")
    print(f"4-bit base:    loss of the right answers {before:.3f} -> {after:.3f}")
    model.save_pretrained(args.out)

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    before = loss_of(whole, tokenizer, test)
    expert = PeftModel.from_pretrained(whole, args.out)  # silently: it has the same directions
    print(f"bfloat16 base: loss of the right answers {before:.3f} -> {loss_of(expert, tokenizer, test):.3f}")
    print(f"Wrote {args.out}")


def encode(tokenizer, rows: list) -> dict[str, torch.Tensor]:
    """Token ids `(rows, tokens)`, padded on the right; labels are the answer's tokens, -100 elsewhere."""
    ids, labels = [], []
    for prompt, answer in rows:
        question = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        reply = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids.append(torch.tensor(question + reply))
        labels.append(torch.tensor([-100] * len(question) + reply))
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)}
    batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], batch_first=True)
    batch["labels"] = pad(labels, batch_first=True, padding_value=-100)
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


@torch.no_grad()
def loss_of(model, tokenizer, rows: list) -> float:
    """Mean over rows, not tokens."""
    model.eval()
    return sum(float(model(**encode(tokenizer, [row])).loss) for row in rows) / len(rows)


def tiny_checkpoint(folder: str) -> str:
    """A random Llama whose axes are multiples of 64, as bitsandbytes' CPU kernels want them."""
    config = tiny_model().config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sums(count: int, seed: int = 1) -> list:
    draws = torch.randint(5, (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [([{"role": "user", "content": f"{a}+{b}"}], str(a + b)) for a, b in draws]


if __name__ == "__main__":
    main()
