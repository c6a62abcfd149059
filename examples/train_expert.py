# SPDX-License-Identifier: Apache-2.0
"""
The training story in one file: a task, a reward, a z-vector expert, its card with an honest number.

    python examples/train_expert.py --task arc_easy --out my_expert           # SmolLM2-135M on a CPU, half an hour
    python examples/train_expert.py --task arc_easy --tiny --out tiny_expert  # seconds, random model

Data come from the folder that PEFT_SVF_DATA names, else from the Hub.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from smollm2 import load_smollm2
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import SVFConfig
from peft_svf.tasks import get_task, task_names
from peft_svf.training.reinforce import ReinforceConfig, ReinforceTrainer
from peft_svf.training.result import write_expert

GOOD_AT = {
    "reasoning": "a science question",
    "math": "a number to work out",
    "code": "a program to write",
    "dispatch": "naming the kind of a question",
    "vision": "a question about an image",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=task_names(), default="arc_easy")
    parser.add_argument("--out", type=Path, required=True, help="folder of the expert")
    parser.add_argument("--model", help="any model id or folder; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--form", choices=["choice", "generate"], default="choice")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps")
    parser.add_argument("--questions", type=int, default=16, help="questions a step")
    parser.add_argument("--samples", type=int, default=16, help="sampled answers a question")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--temperature", type=float, help="of the policy; default 4 for choices, else 1")
    parser.add_argument("--estimator", default="rloo", choices=["none", "batch", "batch_norm", "rloo", "group"])
    parser.add_argument("--beta", type=float, default=0.0, help="weight of KL(policy || base)")
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--eval-rows", type=int, default=160, help="validation rows for choosing the checkpoint")
    parser.add_argument("--test-rows", type=int, help="test rows for the card; default all")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per forward when evaluating")
    parser.add_argument("--targets", help="comma-separated names or 'all-linear'; default the MLP weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an interrupted run")
    parser.add_argument("--tiny", action="store_true", help="a random model, two steps: seconds")
    args = parser.parse_args()

    base_id = args.model
    if args.tiny:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        args.steps, args.questions, args.samples, args.eval_every, args.eval_rows, args.test_rows = 2, 4, 4, 1, 8, 8
    elif args.model is None:
        model, tokenizer = load_smollm2()
        base_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)

    task = get_task(args.task)
    train = task.rows("train", args.form, seed=args.seed)
    validation = task.rows("validation", args.form, limit=args.eval_rows)
    test = task.rows("test", args.form, limit=args.test_rows)
    print(f"{task.name}: {len(train)} training, {len(validation)} validation, {len(test)} test rows; the first:")
    print(json.dumps(train[0], indent=1))

    config = ReinforceConfig(
        output_dir=str(Path("runs") / args.out.name),  # checkpoints
        max_steps=args.steps,
        per_device_train_batch_size=args.questions * args.samples,
        per_device_eval_batch_size=args.batch_size,
        num_generations=args.samples,
        learning_rate=args.lr,
        temperature=args.temperature or (4.0 if args.form == "choice" else 1.0),  # a model is too sure of long choices
        warmup_steps=2,
        max_grad_norm=1.0,  # hundreds of samples a step are smooth enough
        advantage_estimator=args.estimator,
        beta=args.beta,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_strategy="steps",
        save_steps=args.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        early_stopping_patience=3,
        report_to="none",
        bf16=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
    )
    targets = args.targets.split(",") if args.targets and "," in args.targets else args.targets
    svf = SVFConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        basis_dtype="bfloat16" if model.dtype == torch.bfloat16 else "float32",
        description=GOOD_AT[task.kind],
    )
    trainer = ReinforceTrainer(
        model,
        task.reward,
        config,
        Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation),
        processing_class=tokenizer,
        peft_config=svf,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume)
    seconds = None if args.resume else time.perf_counter() - start

    print("Testing the expert and the base on rows that were never trained on ...")
    result = write_expert(
        trainer,
        task,
        test,
        args.out,
        command=shlex.join(["python", *sys.argv]),
        seconds=seconds,
        base_model=base_id,
        license="apache-2.0",
        batch_size=args.batch_size,
    )
    for name in ("base", "expert"):
        (low, high), accuracy = result[name]["interval"], result[name]["accuracy"]
        print(f"{name:6} {accuracy:.3f}  [{low:.3f}, {high:.3f}]  n={result[name]['n']}")
    low, high = result["gain_interval"]
    print(f"gain   {result['gain']:+.3f}  [{low:+.3f}, {high:+.3f}] (paired, 95 %)")
    if base_id is not None and args.model is None:
        load_from_pypi(args.out / "README.md", base_id)
    print(f"Wrote {args.out}")


def load_from_pypi(card: Path, base_id: str) -> None:
    """Let the card's snippet load the very bits that the expert belongs to: those of the Hub are refused."""
    text = card.read_text()
    text = text.replace("from transformers import AutoModelForCausalLM", "from smollm2 import load_smollm2")
    text = text.replace(f'base = AutoModelForCausalLM.from_pretrained("{base_id}")', "base, _ = load_smollm2()")
    card.write_text(text)


if __name__ == "__main__":
    main()
