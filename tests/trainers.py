# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share: tiny rows and rewards, a trainer that keeps what it saw, its trained z."""

import copy
import gc
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import oracle
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_model import tiny_model, tiny_tokenizer
from torch.nn.functional import cosine_similarity
from transformers import TrainerCallback

from peft_svf import SVFConfig
from peft_svf.training.evolution import EvolutionConfig, EvolutionTrainer
from peft_svf.training.reinforce import ReinforceConfig, ReinforceTrainer
from peft_svf.training.supervised import SupervisedConfig, SupervisedTrainer

# transformers collects garbage at each start of a training: what was imported so far need not be looked through again
gc.collect()
gc.freeze()

ROOT = Path(__file__).parents[1]
TOKENIZER = tiny_tokenizer()
STILL = {"learning_rate": 0.0, "max_grad_norm": 0.0, "seed": 1}  # one that draws different completions of a prompt
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1}


def chat(text):
    return [{"role": "user", "content": text}]


# Prompts of different lengths, rows with two to four choices; the last row's end with the end of turn, as "7" begins
# "72". Choices of a row are of one length, or a model with random weights would have only one likely choice.
CHOICE_ROWS = [
    {"prompt": chat("which has an x"), "choices": ["abc", "axe", "bcd"], "label": 1, "id": "0"},
    {"prompt": chat("and here?"), "choices": ["xy", "ab", "wv", "vv"], "label": 0, "id": "1"},
    {"prompt": chat("8*9"), "choices": ["71", "72"], "label": 1, "id": "2"},
    {"prompt": chat("80-8"), "choices": ["7", "72"], "label": 1, "id": "3"},
]
TEXTS = [("say it", "a"), ("b?", "b"), ("why so", "c"), ("and now what", "d")]
TEXT_ROWS = [{"prompt": chat(text), "answer": answer} for text, answer in TEXTS]


def right_choice(completions, choices, label, **_):
    return [
        1.0 if completion[0]["content"] == options[k] else -1.0
        for completion, options, k in zip(completions, choices, label, strict=True)
    ]


def uneven(completions, **_):
    """A reward that differs between completions of random models: a number made from the text."""
    return [(sum(map(ord, completion[0]["content"])) % 17) / 8 - 1 for completion in completions]


def soft_model(**kwargs):
    """A tiny model with flat distributions: several choices and tokens are likely."""
    model = tiny_model(**kwargs)
    model.lm_head.weight.data.mul_(0.1)
    return model


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step of a trainer before clipping changes it."""

    def __init__(self, trainer):
        self.trainer = trainer
        trainer.gradients = []
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.gradients.append(flat(p.grad for p in offsets(self.trainer.model)))


class Recorder(ReinforceTrainer):
    """Keeps what was rolled out, and the gradients."""

    def __init__(self, *args, **kwargs):
        self.outputs, self.inputs, self.texts = [], [], []
        super().__init__(*args, **kwargs)
        Gradients(self)

    def _calculate_rewards(self, inputs, prompts, completions, *args, **kwargs):
        self.texts.append([completion[0]["content"] for completion in completions])
        return super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.inputs.append(self._batches[self._mode].inputs)
        self.outputs.append(copy.deepcopy(output))
        return output


class Evolving(EvolutionTrainer):
    """Keeps the rows and the gradient of each step."""

    def __init__(self, *args, **kwargs):
        self.inputs = []
        super().__init__(*args, **kwargs)
        Gradients(self)

    def training_step(self, model, inputs, *args):
        self.inputs.append(list(inputs))
        return super().training_step(model, inputs, *args)


def tokens_of(row):
    return TOKENIZER.convert_tokens_to_ids(["<u>", *row["prompt"][0]["content"], "<end>", "<a>"])


def option_logps(model, row):
    """Log-probabilities of a row's choices: the softmax of their summed token log-likelihoods, by plain forwards."""
    texts = row["choices"]
    ends = any(a != b and b.startswith(a) for a in texts for b in texts)
    choices = [TOKENIZER.convert_tokens_to_ids([*text, *["<end>"] * ends]) for text in texts]
    return torch.stack([oracle.logps(model, tokens_of(row), choice).sum() for choice in choices]).log_softmax(0)


def likeliest(model, row, length=5):
    """The likeliest choice, or completion of a few tokens, by plain forwards."""
    if "choices" in row:
        return row["choices"][int(option_logps(model, row).argmax())]
    new = oracle.greedy(model, tokens_of(row), length, TOKENIZER.eos_token_id)
    return TOKENIZER.decode(new, skip_special_tokens=True)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def offsets(model):
    return [parameter for name, parameter in model.named_parameters() if parameter.requires_grad]


def trained_z(trainer):
    return flat(offsets(trainer.model))


def table(rows):
    if isinstance(rows, dict):
        return {name: table(part) for name, part in rows.items()}
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def _made(kind, config, folder, rows, reward, model=None, svf=None, eval_rows=None, reader=TOKENIZER, **settings):
    """A trainer on a tiny model, from a random z unless `svf` says otherwise."""
    short = {"save_strategy": "no", "max_completion_length": 5, "max_steps": 1}
    return kind(
        model=soft_model() if model is None else model,
        reward_funcs=reward,
        args=config(str(folder), **{**QUIET, **short, **settings}),
        train_dataset=table(rows),
        eval_dataset=table(eval_rows),
        processing_class=reader,
        peft_config=svf or (None if isinstance(model, PeftModel) else SVFConfig(init_weights=False)),
    )


def trainer_of(*args, kind=Recorder, **settings):
    return _made(kind, ReinforceConfig, *args, **{"per_device_train_batch_size": 12, **settings})


def evolution_of(*args, kind=EvolutionTrainer, **settings):
    short = {"population": 6, "sigma": 0.2, "per_device_train_batch_size": 4}
    return _made(kind, EvolutionConfig, *args, **{**short, **settings})


def supervised_of(folder, rows, reward=uneven, **settings):
    short = {"per_device_train_batch_size": 4, "retention_rows": 3}
    return _made(SupervisedTrainer, SupervisedConfig, folder, rows, reward, **{**short, **settings})


def same(one, other, limit=1e-4):
    """Cosine 1 and norm ratio 1."""
    one, other = one.double(), other.double()
    assert float(other.norm()) > 1e-4, "a gradient of zero shows nothing"
    assert float(cosine_similarity(one, other, dim=0)) == pytest.approx(1, abs=limit)
    assert float(one.norm() / other.norm()) == pytest.approx(1, abs=limit)


TRAINERS = {
    "reinforce": lambda *args, **kwargs: trainer_of(*args, **{"num_generations": 3, **kwargs}),
    "evolution": evolution_of,
}
FORMS = {"generate": (TEXT_ROWS, uneven), "choice": (CHOICE_ROWS, uneven)}
RUN = {"num_generations": 3, "max_steps": 3, "learning_rate": 0.05, "max_grad_norm": 1.0}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": CHOICE_ROWS, "per_device_eval_batch_size": 2}


def random_rows(n, seed=0):
    """A task to learn: of four words of one length the right one has an x."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        words = ["".join(draw.choices("abcdef", k=4)) for _ in range(4)]
        label, place = draw.randrange(4), draw.randrange(4)
        words[label] = words[label][:place] + "x" + words[label][place + 1 :]
        rows.append({"prompt": chat(f"which {i}"), "choices": words, "label": label, "id": str(i)})
    return rows


class InTurn(ReinforceTrainer):
    """Picks the first and the second choice in turn, so that no process needs the chance of another."""

    def _generate(self, prompts):
        with mock.patch.object(torch, "multinomial", lambda weights, n: torch.arange(len(weights))[:, None] % 2):
            return super()._generate(prompts)


def divided(folder, kind, rows_each):
    """A trainer whose step does not depend on chance, so that several processes can be compared with one."""
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0}
    plain["per_device_train_batch_size"] = rows_each
    if kind == "penalty":  # rewards with penalties of all processes; they replace the same prompts
        more = {"num_generations": 3, "prompt_filter": True, "beta": 0.5, "max_steps": 3}
        return trainer_of(folder, CHOICE_ROWS, uneven, kind=InTurn, **plain, **more)
    if kind == "right answers":  # and everyday answers of the base, other ones in each process
        return supervised_of(folder, 2 * TEXT_ROWS, **plain | {"retention": 5.0, "retention_rows": rows_each})
    greedy = {"advantage_estimator": "batch", "num_generations": 1, "greedy_rollouts": True}
    return trainer_of(folder, FORMS[kind][0], uneven, **plain, **greedy)


def environment(**variables):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "examples", "tests", "tests/training"))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "default", **variables}


TWO = "distributed_type: MULTI_GPU\ncompute_environment: LOCAL_MACHINE\nnum_machines: 1\nmixed_precision: 'no'\n"


def in_two_processes(script, folder, *args, config=TWO):
    """Run a script by accelerate; return what each of two processes saved in `folder` under its number."""
    (folder / "train.py").write_text(script)
    (folder / "two.yaml").write_text(f"{config}num_processes: 2\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "two.yaml"]
    command = [*launch, folder / "train.py", folder, *args]
    # processes that wait for each other forever are an error, not a slow test
    run = subprocess.run(map(str, command), capture_output=True, text=True, env=environment(), timeout=240)
    assert run.returncode == 0, run.stderr[-9000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
