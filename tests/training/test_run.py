# SPDX-License-Identifier: Apache-2.0
"""What both trainers do, and what they refuse or report before hours are lost."""

import math

import pico
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_model import tiny_model
from trainers import (
    CHOICE_ROWS,
    FORMS,
    QUIET,
    TEXT_ROWS,
    TOKENIZER,
    TRAINERS,
    flat,
    likeliest,
    offsets,
    random_rows,
    right_choice,
    soft_model,
    trained_z,
    uneven,
)
from trainers import trainer_of as reinforce
from transformers import TrainerCallback

from peft_svf import SVFConfig
from peft_svf.evaluation import BaseText
from peft_svf.training.evolution import EvolutionConfig, EvolutionTrainer
from peft_svf.training.reinforce import ReinforceConfig, ReinforceTrainer
from peft_svf.training.supervised import SupervisedConfig

both = pytest.mark.parametrize("trainer_of", TRAINERS.values(), ids=TRAINERS)


def returning(value):
    def graded(completions, **_):
        return value(len(completions)) if callable(value) else value

    return graded


BAD_REWARDS = {
    "a scalar": (1.0, "'graded' returned 1.0 for"),
    "nothing": (None, "'graded' returned None for"),
    "too few": (lambda n: [0.0] * (n - 1), r"'graded' returned \[0.0, .* for \d+ completions"),
    "infinite": (lambda n: [math.inf] * n, "'graded' returned inf for"),
    "too large": (lambda n: [1e38] * n, "'graded' returned 1e.38 for .*below 1e.15"),
    "text": (lambda n: ["good"] * n, "'graded' returned 'good' for .*a number below"),
}


@both
@pytest.mark.parametrize("value, message", BAD_REWARDS.values(), ids=BAD_REWARDS)
def test_a_reward_that_is_no_number_is_refused_before_the_first_step(value, message, trainer_of, tmp_path):
    trainer = trainer_of(tmp_path, TEXT_ROWS, returning(value))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@both
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
    "a long prompt": ([*TEXT_ROWS, {"prompt": "a " * 4000, "answer": "x"}], "Row 4 .* but the model's context"),
}


@both
@pytest.mark.parametrize("rows, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_the_model_cannot_read_is_refused_by_its_number(rows, message, trainer_of, tmp_path):
    rows = [row if isinstance(row["prompt"], str) else {**row, "prompt": row["prompt"][0]["content"]} for row in rows]
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows, uneven)


@both
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


@both
def test_a_run_that_loses_the_base_text_ends_with_the_best_checkpoint_before(trainer_of, tmp_path, monkeypatch):
    losses = iter([0.01, 0.03, 0.01])  # of two evaluations, and of what the run ends with
    monkeypatch.setattr(BaseText, "loss", lambda text, model, reader: next(losses))
    every = dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | {"eval_steps": 1, "save_steps": 1}
    every |= {"load_best_model_at_end": True, "learning_rate": 0.1, "svf": SVFConfig()}
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, eval_rows=TEXT_ROWS, keep_text=0.02, max_steps=5, **every)
    trainer.train()
    assert [e["eval_text_loss"] for e in trainer.state.log_history if "eval_text_loss" in e] == [0.01, 0.03]
    assert (trainer.state.global_step, trainer.state.best_global_step) == (2, 1)
    folders = (tmp_path / f"checkpoint-{step}" for step in (1, 2))
    best, last = (flat(offsets(PeftModel.from_pretrained(soft_model(), f, is_trainable=True))) for f in folders)
    assert torch.equal(best, trained_z(trainer)) and not torch.equal(last, trained_z(trainer))
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").stat().st_size < 20_000
    assert trainer.strength == 1


@both
def test_a_run_without_a_checkpoint_that_keeps_the_base_text_ends_with_a_weaker_one_that_does(trainer_of, tmp_path):
    settings = {"keep_text": 1e-4, "learning_rate": 0.1, "svf": SVFConfig(), "save_strategy": "steps", "max_steps": 2}
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, **settings)
    trainer.train()
    assert 0 <= trainer.strength < 1
    last = PeftModel.from_pretrained(soft_model(), tmp_path / "checkpoint-2", is_trainable=True)
    torch.testing.assert_close(trained_z(trainer), flat(offsets(last)) * trainer.strength)
    (kept,) = [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "KeptText"]
    assert kept.loss() <= 1e-4
    trainer.train(resume_from_checkpoint=True)
    torch.testing.assert_close(trained_z(trainer), flat(offsets(last)) * trainer.strength)


ONE = {"num_generations": 1, "advantage_estimator": "batch"}
LEARNING = (ReinforceConfig, SupervisedConfig)
WRONG = [  # config, settings, message
    (ReinforceConfig, {"max_steps": 0}, "`max_steps` must be a number of steps, or -1"),
    (ReinforceConfig, {"beta": -0.1}, "`beta` must be 0 or more; got -0.1"),
    (ReinforceConfig, {"reward_clip": -1}, "`reward_clip` must be 0 or more"),
    (ReinforceConfig, {"stop_after_dead_steps": 0}, "`stop_after_dead_steps` must be 1 or more; got 0"),
    (ReinforceConfig, {"metric_for_best_model": "accuracy"}, "`metric_for_best_model` must be 'eval_reward' or"),
    (ReinforceConfig, {"metric_for_best_model": "eval_text_loss"}, "`metric_for_best_model` must be 'eval_reward' or"),
    (EvolutionConfig, {"metric_for_best_model": "eval_reward_std"}, "`metric_for_best_model` must be 'eval_reward'"),
    (ReinforceConfig, {"advantage_estimator": "mean"}, "`advantage_estimator` must be one of .*'rloo'.*; got 'mean'"),
    (ReinforceConfig, {"kl_direction": "both"}, "`kl_direction` must be one of .*'policy_ref', 'ref_policy'"),
    (ReinforceConfig, {"greedy_rollouts": True}, "`greedy_rollouts` must be False with more than one completion"),
    (ReinforceConfig, {"beta": 0.1, "importance_sampling_level": "sequence"}, "must be 'token' with beta > 0"),
    (ReinforceConfig, {"num_generations": 1}, "`num_generations` must be 2 or more with .*'rloo'"),
    (ReinforceConfig, {"num_generations": 1, "advantage_estimator": "group"}, "`num_generations` must be 2 or more"),
    (ReinforceConfig, {**ONE, "prompt_filter": True}, "`num_generations` must be 2 or more .*prompt_filter"),
    (EvolutionConfig, {"population": 7}, "`population` must be even.*got 7"),
    (EvolutionConfig, {"population": 0}, "`population` must be even.*got 0"),
    (EvolutionConfig, {"sigma": float("nan")}, "`sigma` must be above 0; got nan"),
    (EvolutionConfig, {"shaping": "best"}, "`shaping` must be one of .*'z_score', 'none'.; got 'best'"),
    (EvolutionConfig, {"rows_per_forward": 0}, "`rows_per_forward` must be 1 or more; got 0"),
    (EvolutionConfig, {"fp16": True}, "load the base in float16"),
    *((config, {"retention": -1}, "`retention` must be 0 or more; got -1") for config in LEARNING),
    *((config, {"retention": math.nan}, "`retention` must be 0 or more; got nan") for config in LEARNING),
    *((config, {"retention_rows": 0}, "`retention_rows` must be 1 or more; got 0") for config in LEARNING),
]


@pytest.mark.parametrize("config, settings, message", WRONG)
def test_a_setting_that_would_run_and_do_something_else_is_refused(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **settings)


@both
def test_an_evaluation_set_without_rows_is_refused(trainer_of, tmp_path):
    with pytest.raises(ValueError, match="`eval_dataset` has no rows"):
        trainer_of(tmp_path, TEXT_ROWS, uneven, eval_rows=[])


def test_a_plain_model_without_an_adapter_is_refused(tmp_path):
    args = EvolutionConfig(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match="pass peft_config=SVFConfig"):
        EvolutionTrainer(tiny_model(), uneven, args, TEXT_ROWS, processing_class=TOKENIZER)


@both
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
    "No gradient reaches the trained parameters": (TEXT_ROWS, {}),
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
    trainer = reinforce(tmp_path, rows, uneven, kind=ReinforceTrainer, num_generations=3, **settings)
    if reason.startswith("No gradient"):
        trainer.callback_handler.callbacks.insert(0, NoGradient())
    trainer.train()
    assert f"Step 1 teaches nothing. {reason}" in caplog.text


def test_a_penalty_keeps_a_step_with_equal_rewards_alive(tmp_path, caplog):
    reinforce(tmp_path, TEXT_ROWS, returning(lambda n: [1.0] * n), num_generations=3, beta=0.1).train()
    assert "teaches nothing" not in caplog.text


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


@both
@pytest.mark.parametrize("rows, reward", FORMS.values(), ids=FORMS)
def test_evaluation_is_the_mean_reward_of_the_likeliest(rows, reward, trainer_of, tmp_path):
    trainer = trainer_of(tmp_path, rows, reward, eval_rows=rows, per_device_eval_batch_size=2)
    texts = [likeliest(trainer.model, row) for row in rows]
    rewards = reward([[{"content": text}] for text in texts])
    assert trainer.evaluate()["eval_reward"] == pytest.approx(sum(rewards) / len(rewards))


FAST = {
    "reinforce": {"num_generations": 8, "per_device_train_batch_size": 64, "max_steps": 50, "max_grad_norm": 1.0},
    "evolution": {"population": 32, "sigma": 0.2, "per_device_train_batch_size": 8, "max_steps": 40},
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_task_that_can_be_learned_is_learned(kind, tmp_path):
    rows, held_out = random_rows(64), random_rows(64, seed=1)
    more = {"eval_rows": held_out, "svf": SVFConfig(), "per_device_eval_batch_size": 64, "logging_steps": 50}
    trainer = TRAINERS[kind](tmp_path, rows, right_choice, learning_rate=0.1, **more, **FAST[kind])
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert (1 + before) / 2 < 0.4  # chance is 0.25, two standard deviations of 64 rows are 0.11
    assert (1 + trainer.evaluate()["eval_reward"]) / 2 > (0.7 if kind == "reinforce" else 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, reward", [(TEXT_ROWS, uneven), (CHOICE_ROWS, right_choice)], ids=["text", "choice"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_only_z_moves_in_float32_and_the_saved_expert_answers_alike(kind, rows, reward, dtype, tmp_path):
    model = soft_model(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"learning_rate": 0.05, "max_grad_norm": 1.0, "svf": SVFConfig(), "max_steps": 2}
    settings |= {"beta": 0.1} if kind == "reinforce" else {}
    trainer = TRAINERS[kind](tmp_path, rows, reward, model=model, **settings)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in offsets(trainer.model))
    assert float(trained_z(trainer).abs().max()) > 0.01
    assert all(layer.rows is None for layer in pico.svf_layers(trainer.model).values())
    trainer.model.save_pretrained(tmp_path / "expert")
    loaded = PeftModel.from_pretrained(soft_model(dtype=dtype), tmp_path / "expert").eval()
    ids = {"input_ids": torch.arange(3, 15).view(2, 6)}
    assert torch.equal(pico.logits(loaded, ids), pico.logits(trainer.model.eval(), ids))
    for name, value in trainer.model.unload().state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == dtype, name


@pytest.mark.parametrize("kind", TRAINERS)
def test_rows_whose_prompt_is_a_text_are_answered_in_text(kind, tmp_path):
    rows = [{"prompt": "a plain prompt", "choices": ["one", "two"]}, {"prompt": "and", "choices": ["a", "b", "c"]}]

    def reward(completions, prompts, choices, **_):
        assert all(text in options for text, options in zip(completions, choices, strict=True))
        assert set(prompts) <= {"a plain prompt", "and"}
        return [float(len(text)) for text in completions]

    plain = {"kind": ReinforceTrainer} if kind == "reinforce" else {}
    TRAINERS[kind](tmp_path, 2 * rows, reward, **plain).train()
