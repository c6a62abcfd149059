# SPDX-License-Identifier: Apache-2.0
"""
Do experts help in generated text, beside LoRA, and what do they do to other text? SmolLM2-135M-Instruct.

    python benchmarks/generated.py                    # every cell without a result, in the order of `cells`
    python benchmarks/generated.py --only compare     # the cells whose name contains this

A cell trains one adapter on the requests of examples/data/requests, or none (method "base"), and leaves one JSON:
greedy accuracy on the test split, the likelihood of the base's own answers to everyday requests, and texts. An
interrupted cell goes on from its last checkpoint in runs/generated, where its adapter stays. Validation chooses the
checkpoint.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, run_trainings

from peft_svf.tasks.task import plain

FOLDER = RESULTS / "generated"
RUNS = Path("runs/generated")
REQUESTS = ROOT / "examples" / "data" / "requests"
LENGTHS = {"compare": 10, "subject": 8}  # of sampled answers
TEST_TOKENS = {"calculate": 48}  # of test answers; 16 in other tasks
TEST_ROWS = 200
STRENGTHS = (1.0, 0.9, 0.8, 0.65)  # of which validation chooses one, after training
MOST_LOSS = 0.0125  # of the likelihood of the base's everyday answers
MLP, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCKS = {"-upper": range(5, 30), "-third": range(10, 30), "-half": range(15, 30)}  # of 30
NEAR = [  # requests near the tasks, and far from them, whose answers a person reads
    "What is 3 * 14?", "Which is larger, 62 or 59?", "Wie heißt die Hauptstadt von Frankreich?", "Write a poem.",
    "Was the film good? 'I fell asleep after ten minutes.'", "What is the e-mail address in: write to kim@lake.org?",
]  # fmt: skip


@dataclass(frozen=True)
class Training:
    """
    One training run; method "base" is the untrained model.

    Args:
        task (`str`): Folder of the requests.
        method (`str`): "svf" or "lora16" on the MLP weights, "svf-third" on those of the last two thirds of the
            blocks (`BLOCKS`), "svf-all-third" on all linear weights there, and so on; or "base".
        lr (`float`): Learning rate.
        seed (`int`): Seed of the questions' order, of sampled answers and of an adapter's start.
        steps, questions, samples (`int`): Optimizer steps, questions in each, answers per question.
        beta (`float`): Weight of KL(policy ‖ base).
        temperature (`float`): Of sampled answers.
        retain (`float`): Weight of KL(base ‖ policy) per token of the base's own answers to everyday requests.
        retained (`int`): Everyday answers in each step.
        learner (`str`): "reinforce"; "sft", next-token loss on the right answers, one for each question.
    """

    task: str
    method: str
    lr: float = 0.0
    seed: int = 0
    steps: int = 10
    questions: int = 8
    samples: int = 8
    beta: float = 0.0
    temperature: float = 0.6
    retain: float = 20.0
    retained: int = 3
    learner: str = "reinforce"

    @property
    def name(self) -> str:
        """Stem of the result file."""
        setting = "" if self.method == "base" else f"-lr{self.lr:g}-seed{self.seed}"
        learner = "" if self.learner == "reinforce" else f"{self.learner}-"
        budget = f"-steps{self.steps}" * (self.steps != 10) + f"-retained{self.retained}" * (self.retained != 3)
        return f"{self.task}-{learner}{self.method}{setting}{budget}"


def solved(task: str, method: str, lr: float, steps: int, retained: int, **settings: Any) -> Training:
    """Describe a training on right answers."""
    return Training(
        task,
        method,
        lr,
        steps=steps,
        retained=retained,
        **{"questions": 16, "samples": 1, "learner": "sft"} | settings,
    )


SHIPPED = (
    solved("price", "svf-all-half", 0.006, 20, 6, questions=12, retain=40.0),
    solved("email", "svf-all-half", 0.006, 20, 6, questions=12),
    solved("language", "svf-all-half", 0.006, 20, 6, questions=12, retain=40.0),
    solved("sentiment", "svf-all-half", 0.006, 24, 8, questions=12),
    solved("topic", "svf-all-half", 0.006, 24, 8, questions=12),
)
LOWER = (  # of the same tasks, from lower blocks on
    solved("price", "svf-all-upper", 0.004, 20, 6, questions=12, retain=40.0),
    solved("price", "svf-all-third", 0.004, 20, 6, questions=12, retain=40.0),
    solved("email", "svf-all-upper", 0.006, 20, 6, questions=12),
    solved("email", "svf-all-third", 0.006, 20, 6, questions=12),
    solved("email", "svf-all-half", 0.01, 24, 8, questions=12),
    solved("language", "svf-all-upper", 0.004, 20, 6, questions=12, retain=40.0),
    solved("language", "svf-all-third", 0.004, 20, 6, questions=12, retain=40.0),
    solved("sentiment", "svf-all-upper", 0.006, 40, 6),
    solved("topic", "svf-upper", 0.006, 24, 8),
    solved("topic", "svf-all-third", 0.004, 24, 8, questions=12),
)
TRIED = (
    solved("sentiment", "svf-upper", 0.005, 20, 8),
    solved("subject", "svf-upper", 0.003, 12, 3),
    solved("subject", "svf-upper", 0.01, 20, 3),
    solved("calculate", "svf-upper", 0.004, 24, 8),
    solved("compare", "svf-upper", 0.004, 16, 8),
    Training("subject", "svf-upper", 0.01),
    Training("compare", "svf-upper", 0.01, steps=20),
)


def cells() -> Iterator[Training]:
    """Yield every cell, in the order in which they run."""
    for training in (*SHIPPED, *LOWER, *TRIED):
        yield Training(training.task, "base")
        yield training
    for training in (*SHIPPED, *LOWER):
        lora = replace(training, method=training.method.replace("svf", "lora16"), lr=1e-3)
        yield from (replace(method, seed=seed) for method in (training, lora) for seed in (0, 1, 2))


def measure(cell: Training) -> dict[str, Any]:
    """Train a cell, or go on with it, and test it."""
    import torch
    from smollm2 import load_smollm2
    from transformers.trainer_utils import get_last_checkpoint

    from peft_svf.evaluation import complete, evaluate
    from peft_svf.tasks import jsonl_task

    # float32: without bfloat16 instructions a CPU takes four times as long in bfloat16
    (model, tokenizer), task = load_smollm2(torch.float32), jsonl_task(REQUESTS / cell.task)
    result: dict[str, Any] = {"training": asdict(cell)}
    if cell.method != "base":
        folder = RUNS / cell.name
        trainer = trainer_of(cell, model, tokenizer, task, folder)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
        model = trainer.model
        history = [{k: v for k, v in e.items() if not k.startswith("z/model")} for e in trainer.state.log_history]
        result |= {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "best_step": trainer.state.best_global_step or cell.steps,
            "curve": [entry for entry in history if {"reward", "eval_reward", "loss"} & set(entry)],
            **weaken(model, tokenizer, task),
        }
        model.save_pretrained(folder / "expert")
    rows = task.rows("test", "generate", limit=TEST_ROWS)
    test = evaluate(model, tokenizer, rows, 50, task=task, max_new_tokens=TEST_TOKENS.get(task.name, 16)).to_json(
        records=True
    )
    answers = [row["answer"] for row in rows]
    mentions = [mentioned(r["completion"], answer) for r, answer in zip(test["records"], answers, strict=True)]
    test["mentions"] = sum(mentions) / len(mentions)
    test["texts"] = [
        [row["prompt"][-1]["content"], row["answer"], record["completion"]]
        for row, record in zip(rows[:12], test["records"], strict=False)
    ]
    test["records"] = [[record["id"], int(record["right"])] for record in test["records"]]
    near = [[{"role": "user", "content": text}] for text in NEAR]
    texts = complete(model, tokenizer, near, max_new_tokens=40)
    return result | {"test": test, "everyday": everyday(model, tokenizer), "near": dict(zip(NEAR, texts, strict=True))}


def weaken(model: Any, tokenizer: Any, task: Any) -> dict[str, Any]:
    """
    Scale what was trained by the strength that validation chooses, and return how each did.

    It is the strongest whose accuracy on validation rows is within a standard error of the best, among those that cost
    the base's answers to other everyday requests than those of the test at most `MOST_LOSS`; the weakest if none does.
    """
    import torch

    from peft_svf.evaluation import BaseText, evaluate
    from peft_svf.tasks import everyday_requests

    rows = task.rows("validation", "generate")
    with model.disable_adapter():
        text = BaseText.of(model, tokenizer, everyday_requests("validation", 40), 32)
    # an offset, or the second factor of LoRA, is linear in the strength
    scaled = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name]
    trained, tried = [p.detach().clone() for p in scaled], []

    def scale(strength: float) -> None:
        with torch.no_grad():
            for parameter, whole in zip(scaled, trained, strict=True):
                parameter.copy_(strength * whole)

    for strength in STRENGTHS:
        scale(strength)
        right = evaluate(model, tokenizer, rows, 64, task=task, max_new_tokens=TEST_TOKENS.get(task.name, 16)).accuracy
        tried.append({"strength": strength, "accuracy": right, "text_loss": text.loss(model, tokenizer)})
        print(tried[-1], flush=True)
    kept = [one for one in tried if one["text_loss"] <= MOST_LOSS] or tried[-1:]
    top = max(one["accuracy"] for one in kept)
    near = top - math.sqrt(top * (1 - top) / len(rows))
    best = next(one for one in kept if one["accuracy"] >= near)  # the strongest come first
    scale(best["strength"])
    return {"strength": best["strength"], "best_validation": best["accuracy"], "strengths": tried}


def share_of_answer(labels: set[str]) -> Callable[[str, Any], float]:
    """
    Make the grade of training: the share of a text that is the answer, so 1 if it is nothing else.

    A text that names another of the labels, or another number where the answer is one, gets 0: it hedges.
    """

    def score(completion: str, row: Any) -> float:
        text, answer = plain(completion).rstrip("."), row["answer"].lower()
        rivals = [other for other in labels if other in text and other != answer]
        if answer.isdigit():
            rivals += [number for number in re.findall(r"\d+", text) if number != answer]
        return len(answer) / len(text) if answer in text and not rivals else 0.0

    return score


def mentioned(completion: str, answer: str) -> bool:
    """Check whether a text has the answer in it at all, whatever else it says."""
    return answer.lower() in completion.lower()


def everyday(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the mean log-likelihood of a token of the base's own answers to everyday requests."""
    import torch

    from peft_svf.evaluation import complete
    from peft_svf.rows import prompt_ids

    path = RUNS / "everyday.json"
    prompts = [
        [{"role": "user", "content": text}]
        for text in json.loads((ROOT / "benchmarks" / "everyday_requests.json").read_text())
    ]
    if not path.exists():  # the first cell is a base
        answers = [text for part in halves(prompts) for text in complete(model, tokenizer, part, max_new_tokens=40)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answers))
    total = count = 0.0
    model.eval()
    for question, answer in zip(prompt_ids(tokenizer, prompts), json.loads(path.read_text()), strict=True):
        ids = torch.tensor([question + tokenizer(answer, add_special_tokens=False).input_ids])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, len(question) - 1 : -1].float().log_softmax(-1)
        total += float(logps.gather(-1, ids[0, len(question) :, None]).sum())
        count += len(logps)
    return {"requests": len(prompts), "tokens": int(count), "mean_logp": total / count}


def halves(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Cut a list in two."""
    return [items[: len(items) // 2], items[len(items) // 2 :]]


def adapter(method: str) -> Any:
    """Return the PEFT config of a method."""
    from peft import LoraConfig

    from peft_svf import SVFConfig

    targets = MLP + ATTENTION if "-all" in method else MLP
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    for suffix, blocks in BLOCKS.items():
        if method.endswith(suffix):
            common["layers_to_transform"] = list(blocks)
    return LoraConfig(**common, r=16, lora_alpha=32) if method.startswith("lora16") else SVFConfig(**common)


def trainer_of(cell: Training, model: Any, tokenizer: Any, task: Any, folder: Path) -> Any:
    """Make the trainer of a cell."""
    from datasets import Dataset

    from peft_svf.tasks import jsonl_task
    from peft_svf.training import ReinforceConfig, ReinforceTrainer, SupervisedConfig, SupervisedTrainer

    common: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": cell.steps, "learning_rate": cell.lr, "seed": cell.seed,
        "max_grad_norm": 1.0, "per_device_train_batch_size": cell.questions * cell.samples, "save_steps": 5,
        "save_total_limit": 2, "logging_steps": 1, "report_to": "none", "bf16": False, "dataloader_pin_memory": False,
        "retention": cell.retain, "retention_rows": cell.retained,
    }  # fmt: skip
    rows = task.rows("train", "generate")
    ours: dict[str, Any] = {"processing_class": tokenizer, "peft_config": adapter(cell.method)}
    if cell.learner == "sft":
        args = SupervisedConfig(**common, lr_scheduler_type="linear")
        trainer: Any = SupervisedTrainer(model, args, Dataset.from_list(rows), **ours)
    else:
        args = ReinforceConfig(
            **common, beta=cell.beta, num_generations=cell.samples, temperature=cell.temperature,
            max_completion_length=LENGTHS[cell.task], per_device_eval_batch_size=64, eval_strategy="steps",
            eval_steps=5, load_best_model_at_end=True,
        )  # fmt: skip
        labels = {row["answer"] for row in rows}
        graded = jsonl_task(REQUESTS / cell.task, score=share_of_answer(labels if len(labels) < 5 else set()))
        check = Dataset.from_list(task.rows("validation", "generate", limit=48))
        trainer = ReinforceTrainer(model, graded.reward, args, Dataset.from_list(rows), eval_dataset=check, **ours)
    trainer.retained_prompts = retained_prompts()
    return trainer


def retained_prompts() -> list[str]:
    """List the requests whose answers by the base are kept: everyday ones and questions of science."""
    from peft_svf.tasks import everyday_requests, get_task

    science = get_task("arc_easy").rows("validation", "generate", limit=32, folder=ROOT / "examples" / "data")
    questions = everyday_requests("train", 64) + [row["prompt"][-1]["content"].split("\n")[0] for row in science]
    random.Random(0).shuffle(questions)
    return questions


if __name__ == "__main__":
    run_trainings(__doc__, cells(), measure, FOLDER)
