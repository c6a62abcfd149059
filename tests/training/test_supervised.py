# SPDX-License-Identifier: Apache-2.0
"""Laws of learning from right answers, and of the penalty for moving away from the base's own answers."""

import oracle
import pico
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from trainers import (
    CHOICE_ROWS,
    QUIET,
    STILL,
    TEXT_ROWS,
    TOKENIZER,
    Gradients,
    chat,
    evolution_of,
    flat,
    likeliest,
    offsets,
    soft_model,
    supervised_of,
    tokens_of,
    trained_z,
    trainer_of,
    uneven,
)

from peft_svf import SVFConfig
from peft_svf.training import SupervisedConfig, SupervisedTrainer, retention

PROMPTS = ["hello", "and what now?", "b"]


def equal(completions, **_):
    return [1.0] * len(completions)


def retaining(kind, folder, **settings):
    """A trainer on z far from 1 whose other gradient is known: that of equal rewards is 0."""
    if kind == "reinforce":
        trainer = trainer_of(folder, TEXT_ROWS, equal, num_generations=3, **STILL | settings)
    else:
        trainer = supervised_of(folder, TEXT_ROWS, **STILL | settings)
        Gradients(trainer)
    trainer.retained_prompts = PROMPTS
    return trainer


def by_formula(trainer):
    """KL(base ‖ policy) and its gradient by `U diag(S * z) V^T` in float64, row by row, with answers made here."""
    base = soft_model().double()
    moved = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    z = [1 + p.detach().double().requires_grad_() for p in moved.values()]
    weights = {}
    for name, vector in zip(moved, z, strict=True):
        key = name.removeprefix("base_model.model.").replace("svf_offset.default.weight", "weight")
        U, S, Vt = torch.linalg.svd(base.get_parameter(key).detach(), full_matrices=False)
        weights[key] = U * (S * vector) @ Vt
    total, count = 0.0, 0
    for prompt in PROMPTS[: trainer.args.retention_rows]:
        row = {"prompt": chat(prompt)}
        answer = TOKENIZER(likeliest(soft_model(), row, 24), add_special_tokens=False).input_ids
        ids, start = torch.tensor([tokens_of(row) + answer]), len(tokens_of(row)) - 1
        with torch.no_grad():
            p = base(ids, use_cache=False).logits[0, start:-1].log_softmax(-1)
        logits = torch.func.functional_call(base, weights, (ids,), {"use_cache": False}).logits
        q = logits[0, start:-1].log_softmax(-1)
        total, count = total + (p.exp() * (p - q)).sum(), count + len(answer)
    return flat(torch.autograd.grad(total / count, z)), float(total.detach() / count)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", ["reinforce", "sft"])
def test_the_penalty_has_the_gradient_of_its_formula(kind, accumulated, tmp_path):
    batch = {"per_device_train_batch_size": 12 if kind == "reinforce" else 4, "retention_rows": 3}
    batch = {**batch, "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0}
    if accumulated == 2:
        batch["per_device_train_batch_size"] //= 2
    gradients = []
    for weight in (5.0, 0.0):
        trainer = retaining(kind, tmp_path, retention=weight, **batch)
        trainer.train()
        gradients.append(trainer.gradients[0])
        if weight:
            expected, value = by_formula(trainer)
            assert value > 1e-3 and trainer.state.log_history[0]["retention"] == pytest.approx(value, rel=1e-4)
    torch.testing.assert_close((gradients[0] - gradients[1]).double(), 5 * expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["reinforce", "sft"])
def test_the_penalty_moves_nothing_where_the_policy_is_the_base(kind, tmp_path):
    trainer = retaining(kind, tmp_path, svf=SVFConfig(), retention=100.0)
    trainer.train()
    plain = retaining(kind, tmp_path, svf=SVFConfig(), retention=0.0)
    plain.train()
    assert trainer.state.log_history[0]["retention"] == 0
    torch.testing.assert_close(trainer.gradients[0], plain.gradients[0], rtol=0, atol=1e-5)


def test_the_penalty_keeps_the_base_text(tmp_path):
    lost = []
    for weight in (1e-6, 50.0):
        trainer = retaining("sft", tmp_path, svf=SVFConfig(), retention=weight, learning_rate=0.1, max_steps=10)
        trainer.train()
        lost.append(by_formula(trainer)[1])
    assert lost[1] < lost[0] / 2


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
def test_a_resumed_run_is_the_uninterrupted_one_and_reads_the_answers_of_its_checkpoint(more, tmp_path, monkeypatch):
    settings = {"max_steps": 5, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1, "retention": 5.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": TEXT_ROWS, "retention_rows": 2, **more}
    whole = supervised_of(tmp_path / "whole", 2 * TEXT_ROWS, **settings)
    whole.retained_prompts = PROMPTS
    whole.train()
    monkeypatch.setattr(retention, "base_answers", None)  # the answers aren't made again
    again = supervised_of(tmp_path / "again", 2 * TEXT_ROWS, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))  # two steps an epoch
    assert torch.equal(trained_z(again), trained_z(whole))
    logs = [[e["retention"] for e in one.state.log_history if "retention" in e] for one in (again, whole)]
    assert logs[0] == logs[1] != []


@pytest.mark.parametrize("rows", [TEXT_ROWS, CHOICE_ROWS], ids=["text", "choice"])
def test_the_loss_is_that_of_the_right_answer_and_the_end_of_turn(rows, tmp_path):
    rows = [{**row, "solution": "worked out"} if k == 0 else row for k, row in enumerate(rows)]
    trainer = supervised_of(tmp_path, rows, **STILL, retention=0.0)
    trainer.train()
    logps = []
    for row in rows:
        text = row.get("solution") or row.get("answer") or row["choices"][row["label"]]
        answer = TOKENIZER.convert_tokens_to_ids([*text, "<end>"])
        logps.append(oracle.logps(trainer.model, tokens_of(row), answer).detach())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-float(torch.cat(logps).mean()), rel=1e-4)


@pytest.mark.parametrize("rows", [TEXT_ROWS, CHOICE_ROWS], ids=["text", "choice"])
def test_an_evaluation_is_the_mean_reward_of_the_likeliest_and_chooses_the_best(rows, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "learning_rate": 0.1, "retention": 0.0}
    trainer = supervised_of(tmp_path, rows, eval_rows=rows, per_device_eval_batch_size=3, **settings)
    rewards = uneven([[{"content": likeliest(trainer.model, row)}] for row in rows])
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == pytest.approx(sum(rewards) / len(rewards)) and metrics["eval_loss"] > 0
    part = Dataset.from_list(rows[:1])
    assert trainer.evaluate(part, metric_key_prefix="first")["first_reward"] == pytest.approx(rewards[0])
    trainer.train()
    best = max(e["eval_reward"] for e in trainer.state.log_history if e.get("step") and "eval_reward" in e)
    assert trainer.state.best_metric == best == trainer.evaluate()["eval_reward"]


@pytest.mark.parametrize("make", [supervised_of, evolution_of])
def test_of_several_evaluation_sets_the_one_that_is_named_chooses_the_best(make, tmp_path):
    sets = {"first": CHOICE_ROWS[:1], "rest": CHOICE_ROWS[1:]}
    with pytest.raises(ValueError, match="'eval_first_reward'; got 'eval_reward'"):
        make(tmp_path, CHOICE_ROWS, uneven, eval_rows=sets)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_rest_reward"}
    trainer = make(tmp_path, CHOICE_ROWS, uneven, eval_rows=sets, **settings)
    trainer.train()
    rewards = uneven([[{"content": likeliest(trainer.model, row)}] for row in sets["rest"]])
    assert trainer.state.best_metric == pytest.approx(sum(rewards) / len(rewards))


def test_a_stream_has_the_tokens_of_a_table(tmp_path):
    table = supervised_of(tmp_path, TEXT_ROWS, retention=0.0)
    args = SupervisedConfig(str(tmp_path), **QUIET, save_strategy="no", max_steps=1, retention=0.0)
    stream = IterableDataset.from_generator(lambda: iter(TEXT_ROWS))
    trainer = SupervisedTrainer(soft_model(), args, stream, processing_class=TOKENIZER, peft_config=SVFConfig())
    assert next(iter(trainer.train_dataset))["input_ids"] == table.train_dataset[0]["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_answers_are_learned_by_z_alone_in_float32(dtype, tmp_path):
    def right(completions, answer, **_):
        return [float(c[0]["content"] == text) for c, text in zip(completions, answer, strict=True)]

    rows = [{**row, "answer": "ok"} for row in TEXT_ROWS]
    model = soft_model(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"learning_rate": 0.2, "max_steps": 30, "svf": SVFConfig(), "retention": 0.01, "logging_steps": 30}
    trainer = supervised_of(tmp_path, rows, right, model=model, eval_rows=rows, **settings)
    trainer.retained_prompts = PROMPTS
    assert trainer.evaluate()["eval_reward"] == 0
    trainer.train()
    assert trainer.evaluate()["eval_reward"] == 1
    assert all(parameter.dtype == torch.float32 for parameter in offsets(trainer.model))
    trainer.save_model(str(tmp_path / "expert"))
    loaded = PeftModel.from_pretrained(soft_model(dtype=dtype), tmp_path / "expert").eval()
    ids = {"input_ids": torch.arange(3, 15).view(2, 6)}
    assert torch.equal(pico.logits(loaded, ids), pico.logits(trainer.model.eval(), ids))
    after = trainer.model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_tokenizer_without_a_chat_template_learns_the_lines_that_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    row = supervised_of(tmp_path, TEXT_ROWS, retention=0.0).train_dataset[0]
    assert TOKENIZER.decode(row["input_ids"]).endswith("say it\na<end>") and row["labels"].count(-100) > 5


NO_ANSWER = {"prompt": chat("why"), "choices": ["a", "b"], "id": "seven"}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
REFUSED = {
    "Row 'seven' has no right answer: add 'solution', 'answer', or 'label'": ([NO_ANSWER], {}),
    "Row 0 has no right answer": ([{"prompt": chat("why"), "answer": " "}], {}),
    "Row 0 has an image: SupervisedTrainer reads text": ([{**TEXT_ROWS[0], "image": "a.png"}], {}),
    "Row 1 of the data has [0-9]+ tokens with its answer": (
        [TEXT_ROWS[0], {"prompt": chat("a"), "answer": "b" * 600}],
        {},
    ),
    "needs reward_funcs; or set metric_for_best_model='eval_loss'": (
        TEXT_ROWS,
        {**BEST, "save_steps": 1, "reward": None, "eval_rows": TEXT_ROWS},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_learned_is_refused_by_its_name(message, tmp_path):
    rows, settings = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        supervised_of(tmp_path, rows, **settings)


def test_the_settings_work_on_a_cpu_as_they_are(tmp_path):
    config = SupervisedConfig(str(tmp_path))
    assert config.bf16 is False and (config.retention, config.learning_rate) == (20, 3e-3)
    trainer = SupervisedTrainer(
        soft_model(), SupervisedConfig(str(tmp_path), **QUIET), Dataset.from_list(TEXT_ROWS),
        processing_class=TOKENIZER, peft_config=SVFConfig(),
    )  # fmt: skip
    assert trainer.args.metric_for_best_model == "eval_reward" and not trainer.args.load_best_model_at_end
