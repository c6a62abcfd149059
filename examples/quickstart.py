# SPDX-License-Identifier: Apache-2.0
"""
Your first expert: train it, measure it, ask it. `python examples/quickstart.py`, five to ten minutes on two CPU cores.

The task is to say which of two numbers is larger (`examples/data/larger.jsonl`), which the base model rarely does. The
same from a shell: `peft-svf train examples/train.yaml`.
"""

from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from peft_svf import SVFConfig
from peft_svf.evaluation import evaluate, paired_difference
from peft_svf.tasks import jsonl_task
from peft_svf.training import ReinforceConfig, ReinforceTrainer

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

task = jsonl_task(Path(__file__).parent / "data" / "larger.jsonl")  # any file of prompts, choices and labels
train, validation, test = (task.rows(split, "choice") for split in ("train", "validation", "test"))
tokenizer = AutoTokenizer.from_pretrained(BASE)
trainer = ReinforceTrainer(
    AutoModelForCausalLM.from_pretrained(BASE),
    task.reward,  # +1 for the right choice, -1 for a wrong one
    ReinforceConfig(
        "checkpoints/larger",
        max_steps=20,
        per_device_train_batch_size=64,  # 8 questions with 8 sampled answers each
        eval_strategy="steps",
        eval_steps=5,
        save_steps=5,
        load_best_model_at_end=True,
        report_to="none",
        bf16=False,
    ),
    Dataset.from_list(train),
    eval_dataset=Dataset.from_list(validation),
    processing_class=tokenizer,
    peft_config=SVFConfig(task_type="CAUSAL_LM", description="comparing two numbers"),
)
trainer.train()
trainer.model.save_pretrained("larger")

expert = evaluate(trainer.model, tokenizer, test)
with trainer.model.disable_adapter():
    base = evaluate(trainer.model, tokenizer, test)
gain, (low, high) = paired_difference(expert, base)
print(f"base {base.accuracy:.3f}, expert {expert.accuracy:.3f}, gain {gain:+.3f} [{low:+.3f}, {high:+.3f}]")

pipe = pipeline("transformer2", model=BASE, experts=["larger"])
question = [{"role": "user", "content": "Which number is larger, 62 or 59?"}]
for name in ("other", "larger"):  # "other" is the base model
    output = pipe(question, expert=name, max_new_tokens=24, do_sample=False)
    print(f"{name}: {output[0]['generated_text'][-1]['content']}")
