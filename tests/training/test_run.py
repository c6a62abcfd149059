# SPDX-License-Identifier: Apache-2.0
"""What both trainers refuse or report before hours are lost: rewards, rows, adapters, steps that teach nothing."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_model import tiny_model
from trainers import CHOICE_ROWS, QUIET, TEXT_ROWS, TOKENIZER, chat, soft_model, trained_z, uneven
from trainers import trainer_of as reinforce
from transformers import TrainerCallback

from peft_svf import SVFConfig
from peft_svf.evaluation import BaseText
from peft_svf.training.evolution import EvolutionConfig, EvolutionTrainer
from peft_svf.training.reinforce import ReinforceConfig, ReinforceTrainer


def evolution(folder, rows, reward, *, model=None, eval_rows=None, **settings):
    args = EvolutionConfig(
        str(folder), population=4, max_completion_length=5, per_device_train_batch_size=4,
        **{**QUIET, "save_strategy": "no", "max_steps": 1, **settings},
    )  # fmt: skip
    model, config = (soft_model(), SVFConfig()) if model is None else (model, None)
    return EvolutionTrainer(model, reward, args, rows, eval_rows, processing_class=TOKENIZER, peft_config=config)


TRAINERS = {
    "reinforce": lambda *args, **kwargs: reinforce(*args, **{"num_generations": 3, **kwargs}),
    "evolution": evolution,
}


def returning(value):
    def graded(completions, **_):
        return value(len(completions)) if callable(value) else value

    return graded


BAD_REWARDS = {
    "a scalar": (1.0, "'graded' returned 1.0 for"),
    "nothing": (None, "'graded' returned None for"),
    "too few": (lambda n: [0.0] * (n - 1), "'graded' returned .* rewards for"),
    "infinite": (lambda n: [math.inf] * n, "'graded' returned inf for"),
    "too large": (lambda n: [1e38] * n, "'graded' returned 1e.38 for .*below 1e.15"),
    "text": (lambda n: ["good"] * n, "'graded' returned 'good' for .*should be numbers"),
}


@pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("value, message", BAD_REWARDS.values(), ids=BAD_REWARDS)
def test_a_reward_that_is_no_number_is_refused_before_the_first_step(value, message, trainer_of, tmp_path):
    trainer = trainer_of(tmp_path, TEXT_ROWS, returning(value))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)
def test_async_rewards_tensors_and_missing_rewards_work(trainer_of, tmp_path):
    async def later(completions, **kwargs):
        return [None if k % 3 == 0 else reward for k, reward in enumerate(uneven(completions))]

    def at_once(completions, **kwargs):
        return torch.tensor([math.nan if k % 3 == 0 else r for k, r in enumerate(uneven(completions))])

    moved = []
    for reward in (later, at_once):
        trainer = trainer_of(tmp_path, TEXT_ROWS, reward, seed=3)
        trainer.train()
        moved.append(trained_z(trainer))
    assert torch.isfinite(moved[0]).all() and torch.equal(*moved)


BAD_ROWS = {
    "an empty prompt": ([*TEXT_ROWS, {"prompt": "", "answer": "x"}], "Row 4 of the data has a prompt of 0 tokens"),
    "a long prompt": (
        [*TEXT_ROWS, {"prompt": "a " * 4000, "answer": "x"}],
        "Row 4 .* but the model's context",
    ),
}


@pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("rows, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_the_model_cannot_read_is_refused_by_its_number(rows, message, trainer_of, tmp_path):
    rows = [row if isinstance(row["prompt"], str) else {**row, "prompt": row["prompt"][0]["content"]} for row in rows]
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows, uneven)


@pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)
def test_a_model_that_cannot_be_trained_as_asked_is_refused(trainer_of, tmp_path):
    small = tiny_model()
    small.resize_token_embeddings(len(TOKENIZER) - 3)
    get_peft_model(tiny_model(), SVFConfig()).save_pretrained(tmp_path / "expert")
    named = get_peft_model(tiny_model(), SVFConfig(), adapter_name="math")
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
    for model, settings, message in (
        (get_peft_model(small, SVFConfig()), {}, "the model's vocabulary is"),
        (PeftModel.from_pretrained(tiny_model(), tmp_path / "expert"), {}, "is_trainable=True"),
        (named, {**best, "save_steps": 1}, "an adapter called 'default' alone, and this one is 'math'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, TEXT_ROWS, uneven, model=model, **settings)


@pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)
def test_a_run_that_loses_the_base_text_ends_and_that_checkpoint_is_not_the_best(trainer_of, tmp_path, monkeypatch):
    losses = iter([0.01, 0.03])
    monkeypatch.setattr(BaseText, "loss", lambda text, model, reader: next(losses))
    every = dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | {"eval_steps": 1, "save_steps": 1}
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, eval_rows=TEXT_ROWS, keep_text=0.02, max_steps=5, **every)
    trainer.train()
    assert [e["eval_text_loss"] for e in trainer.state.log_history if "eval_text_loss" in e] == [0.01, 0.03]
    assert (trainer.state.global_step, trainer.state.best_global_step) == (2, 1)


SETTINGS = {"max_steps": (0, "trains nothing"), "beta": (-0.1, "0 or more"), "reward_clip": (-1, "0 or more")}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_would_run_and_do_something_else_is_refused(name, tmp_path):
    value, message = SETTINGS[name]
    with pytest.raises(ValueError, match=f"`{name}` .*{message}"):
        ReinforceConfig(str(tmp_path), **{name: value})


@pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)
def test_an_evaluation_set_without_rows_is_refused(trainer_of, tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` has no rows"):
        trainer_of(tmp_path, TEXT_ROWS, uneven, eval_rows=[])


def test_a_plain_model_without_an_adapter_is_refused(tmp_path):
    args = ReinforceConfig(str(tmp_path), num_generations=2, per_device_train_batch_size=2, **QUIET)
    with pytest.raises(ValueError, match="pass peft_config=SVFConfig"):
        ReinforceTrainer(tiny_model(), uneven, args, Dataset.from_list(TEXT_ROWS), processing_class=TOKENIZER)


@pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)
def test_steps_that_teach_nothing_are_reported_once_and_end_the_run_if_asked(trainer_of, tmp_path, caplog):
    equal = returning(lambda n: [1.0] * n)
    trainer = trainer_of(tmp_path, TEXT_ROWS, equal, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("Step 1 teaches nothing") == 1 and caplog.text.count("teaches nothing") == 1
    trainer = trainer_of(tmp_path, TEXT_ROWS, equal, max_steps=4, stop_after_dead_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and "2 steps in a row taught nothing" in caplog.text


DEAD = {
    "All completions were cut off at max_completion_length=1, and mask_truncated_completions=True": (
        TEXT_ROWS,
        {"mask_truncated_completions": True, "max_completion_length": 1},
    ),
    "The policy gives one answer to each prompt at temperature=0.0001": (
        [{**row, "choices": row["choices"][:2]} for row in CHOICE_ROWS],
        {"temperature": 1e-4},
    ),
}


@pytest.mark.parametrize("reason", DEAD)
def test_the_reason_of_a_dead_step_is_reported(reason, tmp_path, caplog):
    rows, settings = DEAD[reason]
    reinforce(tmp_path, rows, uneven, num_generations=3, **settings).train()
    assert reason in caplog.text


def test_a_penalty_keeps_a_step_with_equal_rewards_alive(tmp_path, caplog):
    reinforce(tmp_path, TEXT_ROWS, returning(lambda n: [1.0] * n), num_generations=3, beta=0.1).train()
    assert "teaches nothing" not in caplog.text


def test_trained_parameters_without_a_gradient_are_reported(tmp_path, caplog):
    trainer = reinforce(tmp_path, TEXT_ROWS, uneven, kind=ReinforceTrainer, num_generations=3)
    trainer.callback_handler.callbacks.insert(0, NoGradient())
    trainer.train()
    assert "Step 1 teaches nothing. No gradient reaches the trained parameters" in caplog.text


class NoGradient(TrainerCallback):
    """Clears the gradients, as if the adapted layers had not run."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        model.zero_grad()


def test_the_settings_work_on_a_cpu_as_they_are(tmp_path):
    assert not torch.cuda.is_available()
    assert ReinforceConfig(str(tmp_path)).bf16 is False


def test_a_line_of_the_log_can_be_read_and_trackers_get_everything(tmp_path, capsys):
    trainer = reinforce(tmp_path, TEXT_ROWS, uneven, num_generations=3, beta=0.1)
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step    1/1  ")]
    assert len(line) < 200
    assert all(f"  {name} " in line for name in ("reward", "KL", "entropy", "length", "dead groups", "mean |z-1|"))
    tracked = {"kl", "reward_std", "completions/clipped_ratio", "grad_norm", "z/model.layers.0/mean_distance_from_1"}
    assert tracked <= trainer.state.log_history[0].keys()


def test_answers_of_one_token_are_drawn_from_the_forward_that_is_differentiated(tmp_path):
    few = [{"prompt": chat(text)} for text in ("say it", "why so")]
    runs = {}
    for shared in (True, False):
        settings = {"num_generations": 6, "max_completion_length": 1, "max_grad_norm": 0.0, "temperature": 0.7}
        trainer = reinforce(tmp_path, few, uneven, **settings)
        if not shared:
            trainer._can_share = lambda *_: False
        tokens = []
        embeddings = trainer.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _, args, out, tokens=tokens: tokens.append(args[0].numel()))
        trainer.train()
        runs[shared] = (trainer.texts, trainer.gradients[0], sum(tokens))
    assert runs[True][0] == runs[False][0]
    torch.testing.assert_close(runs[True][1], runs[False][1], rtol=1e-3, atol=1e-6)
    assert runs[True][2] < runs[False][2] / 4
