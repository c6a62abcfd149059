# SPDX-License-Identifier: Apache-2.0
"""
Train z-vectors on a 4-bit base, then use them on the base that it was quantised from. `python examples/qsvf.py`.

Needs `pip install -e ".[quant,eval]"`; some minutes on a CPU. The base stays packed and only z-vectors, in float32,
train. Their directions come from the unquantised weights of the checkpoint, so the expert loads on both bases.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from smollm2 import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peft_svf import SVFConfig
from peft_svf.tasks import jsonl_task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
STEPS, ROWS = 20, 8  # optimizer steps, and solved questions in each


def main() -> None:
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = jsonl_task(Path(__file__).parent / "data" / "larger.jsonl")
    train, test = (
        [encode(tokenizer, row["prompt"], row["choices"][row["label"]]) for row in task.rows(split, "choice")]
        for split in ("train", "test")
    )
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FOUR_BITS, device_map=DEVICE)
    model = get_peft_model(packed, SVFConfig(task_type="CAUSAL_LM", description="comparing two numbers"))
    print(f"4-bit base: {packed.get_memory_footprint() / 1e6:.0f} MB")
    model.print_trainable_parameters()

    before = loss_of(model, test)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        rows = [train[(step * ROWS + i) % len(train)] for i in range(ROWS)]
        sum(model(**row).loss for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss of the right answers on the 4-bit base:    {before:.3f} -> {loss_of(model, test):.3f}")
    model.save_pretrained("qsvf_expert")

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    before = loss_of(whole, test)
    expert = PeftModel.from_pretrained(whole, "qsvf_expert")  # the same directions: accepted silently
    print(f"loss of the right answers on the bfloat16 base: {before:.3f} -> {loss_of(expert, test):.3f}")


def encode(tokenizer, prompt: list, answer: str) -> dict[str, torch.Tensor]:
    """Encode a solved question as one row; only the answer's tokens have labels."""
    question = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    reply = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids, labels = torch.tensor([question + reply]), torch.tensor([[-100] * len(question) + reply])
    return {"input_ids": ids.to(DEVICE), "labels": labels.to(DEVICE)}


@torch.no_grad()
def loss_of(model, rows: list) -> float:
    """Average the loss over rows."""
    model.eval()
    return sum(float(model(**row).loss) for row in rows) / len(rows)


if __name__ == "__main__":
    main()
