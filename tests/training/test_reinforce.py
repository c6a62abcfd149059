# SPDX-License-Identifier: Apache-2.0
"""Laws of training: gradients against a REINFORCE written by hand, and what a run may and may not change."""

import functools
import json
import logging
import math
from types import SimpleNamespace

import oracle
import pico
import pytest
import torch
from datasets import IterableDataset
from peft import get_peft_model
from tiny_model import tiny_model
from trainers import (
    CHOICE_ROWS,
    EVALUATED,
    FORMS,
    QUIET,
    RUN,
    STILL,
    TEXT_ROWS,
    chat,
    flat,
    likeliest,
    offsets,
    option_logps,
    right_choice,
    same,
    trained_z,
    trainer_of,
    uneven,
)
from trl import GRPOTrainer

from peft_svf import SVFConfig
from peft_svf.training.reinforce import PromptFilter, ReinforceConfig, advantages_of

# --- advantages


def by_hand(rewards, estimator, n):
    """Each estimator as its definition reads, one completion at a time; `None` is a missing reward."""
    advantages = []
    for i, reward in enumerate(rewards):
        group = range(i - i % n, i - i % n + n) if estimator in ("rloo", "group") else range(len(rewards))
        known = [rewards[j] for j in group if rewards[j] is not None]
        others = [rewards[j] for j in group if rewards[j] is not None and j != i]
        mean = sum(known) / len(known) if known else 0.0
        square = sum((r - mean) ** 2 for r in known)
        if reward is None:
            advantages.append(0.0)
        elif estimator == "none":
            advantages.append(reward)
        elif estimator in ("batch", "rloo"):
            advantages.append(reward - sum(others) / len(others) if others else 0.0)
        elif estimator == "batch_norm":
            advantages.append((reward - mean) / max(math.sqrt(square / len(known)), 1e-7))
        else:
            deviation = math.sqrt(square / (len(known) - 1)) if len(known) > 1 else 0.0
            advantages.append((reward - mean) / (deviation + 1e-4))
    return advantages


ESTIMATORS = ["none", "batch", "batch_norm", "rloo", "group"]
REWARDS = {
    "plain": [1.0, -1.0, -1.0, 1.0, 0.5, 0.25, -1.0, -1.0, -1.0, 1.0, 1.0, 0.0],
    "missing": [1.0, None, -1.0, None, None, 0.25, None, None, None, 1.0, 1.0, -1.0],  # one group keeps one, one none
    "all equal": [1.0] * 12,
    "all missing": [None] * 12,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_advantages_equal_their_definition(estimator, rewards):
    tensor = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64)
    found = advantages_of(tensor, estimator, 3)
    torch.testing.assert_close(found, torch.tensor(by_hand(rewards, estimator, 3), dtype=torch.float64))
    assert torch.equal(found[tensor.isnan()], torch.zeros(int(tensor.isnan().sum()), dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["none", "batch", "rloo"])
def test_the_unbiased_estimators_have_the_gradient_of_the_expected_reward(estimator):
    """Exact expectation over all triples of a policy over four actions; a z-score has another length."""
    reward = torch.tensor([1.0, -1.0, 0.25, -1.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    exact = torch.autograd.grad((logps.exp() * reward).sum(), logits, retain_graph=True)[0]

    def expected(name):
        loss = 0.0
        for triple in torch.cartesian_prod(*[torch.arange(4)] * 3):
            weight = logps[triple].sum().exp().detach()
            loss = loss + weight * (advantages_of(reward[triple], name, 3) * logps[triple]).mean()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(expected(estimator), exact)
    assert not torch.allclose(expected("group"), exact, rtol=0.01)


# --- settings


def config_of(**settings):
    return ReinforceConfig(**{"output_dir": "unused", **QUIET, "per_device_train_batch_size": 8, **settings})


@pytest.mark.parametrize("estimator", ["none", "batch", "batch_norm"])
def test_one_completion_a_prompt_is_accepted(estimator):
    config = config_of(num_generations=1, advantage_estimator=estimator, eval_strategy="steps", eval_steps=1)
    assert (config.num_generations, config.num_generations_eval) == (1, 1)
    assert config.generation_batch_size == 8
    config = config_of(num_generations=1, advantage_estimator=estimator, gradient_accumulation_steps=2)
    assert (config.num_generations, config.generation_batch_size) == (1, 16)


def test_one_row_on_each_of_several_processes_is_a_batch(monkeypatch):
    monkeypatch.setattr("peft_svf.training.objective._world", lambda: 2)  # as launchers announce it
    monkeypatch.setattr(ReinforceConfig, "world_size", property(lambda self: 2))  # as TRL counts, once it has started
    config = config_of(num_generations=1, advantage_estimator="batch", per_device_train_batch_size=1)
    assert (config.num_generations, config.generation_batch_size) == (1, 2)


def test_data_for_less_than_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="A step takes 12 different prompts, but the training data have 4 rows"):
        trainer_of(tmp_path, CHOICE_ROWS, right_choice, num_generations=1, advantage_estimator="batch")


AGREED = {  # text and code of arXiv 2501.06252
    "num_generations": 1, "advantage_estimator": "none", "reward_clip": None, "learning_rate": 2e-3,
    "max_grad_norm": 1e-3, "weight_decay": 0.0, "temperature": 1.0, "loss_type": "luspo", "num_iterations": 1,
    "greedy_eval": True, "load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "eval_steps": 10,
    "save_steps": 10, "generation_batch_size": 256, "prompt_filter": False,
}  # fmt: skip
PRESETS = {
    "paper": {
        "beta": 0.1, "kl_direction": "policy_ref", "use_bias_correction_kl": True, "greedy_rollouts": False,
        "lr_scheduler_type": "cosine", "early_stopping_patience": 5,
    },
    "reference": {
        "beta": 0.0, "kl_direction": "ref_policy", "use_bias_correction_kl": False, "greedy_rollouts": True,
        "lr_scheduler_type": "constant", "early_stopping_patience": None, "max_completion_length": 512,
        "max_steps": 200,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_text_and_the_code_of_the_paper(preset):
    make = getattr(ReinforceConfig, preset)
    config = make(output_dir="unused", per_device_train_batch_size=4, **QUIET)
    wanted = AGREED | PRESETS[preset]
    assert {name: getattr(config, name) for name in wanted} == wanted
    own = make(output_dir="unused", beta=0.2, gradient_accumulation_steps=3, eval_strategy="no", **QUIET)
    assert (own.beta, own.gradient_accumulation_steps) == (0.2, 3)
    assert (own.load_best_model_at_end, own.early_stopping_patience) == (False, None)


def test_only_trl_s_advice_about_luspo_is_silenced(tmp_path, caplog):
    source, advice = logging.getLogger(GRPOTrainer.__module__), "`importance_sampling_level` should be set to"
    before = list(source.filters)
    trainer_of(tmp_path, TEXT_ROWS, uneven, num_generations=3)
    assert advice not in caplog.text and source.filters == before
    trainer_of(tmp_path, TEXT_ROWS, uneven, num_generations=3, loss_type="dapo", importance_sampling_level="sequence")
    assert "weights each sequence by its completion length" in caplog.text


# --- gradients


def action_logps(trainer, model):
    """
    What was rolled out first, scored by hand: per completion the log-probabilities of its actions.

    Actions are tokens in the generated form, one choice in the choice form.
    """
    output, inputs = trainer.outputs[0], trainer.inputs[0]
    found = []
    for i, row in enumerate(inputs):
        if "choices" in row:
            place = row["choices"].index(trainer.texts[0][i])
            found.append(option_logps(model, row)[place, None])
        else:
            prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
            completion = output["completion_ids"][i][output["completion_mask"][i].bool()].tolist()
            found.append(oracle.logps(model, prompt, completion) if completion else torch.zeros(1))
    return found


def hand_gradient(trainer, reward, estimator, n, beta=0.0, direction="policy_ref"):
    """`-mean_i (A_i log p(y_i) - beta KL_i)` as it is written, differentiated."""
    inputs, texts = trainer.inputs[0], trainer.texts[0]
    columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
    rewards = reward([[{"role": "assistant", "content": text}] for text in texts], **columns)
    policy = action_logps(trainer, trainer.model)
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = action_logps(trainer, trainer.model)
    advantages = by_hand(rewards, estimator, n)
    loss = torch.tensor(0.0)
    for advantage, logps, ref in zip(advantages, policy, reference, strict=True):
        k3 = (ref - logps).exp() - (ref - logps) - 1
        if direction == "policy_ref":
            k3 = k3 * (logps - logps.detach()).exp()
        loss = loss - (advantage * logps.sum() - beta * k3.sum()) / len(inputs)
    return flat(torch.autograd.grad(loss, offsets(trainer.model)))


def one_step(folder, form, **settings):
    """Train one step with learning rate 0: z stays, so that the gradient can be taken again."""
    rows, reward = FORMS[form]
    trainer = trainer_of(folder, 3 * rows, reward, **STILL, **settings)
    trainer.train()
    assert len(trainer.gradients) == len(trainer.outputs) == 1
    return trainer, reward


@pytest.mark.parametrize("estimator, n", [("none", 1), ("batch", 1), ("rloo", 3), ("none", 2), ("batch", 3)])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_reinforce(form, estimator, n, tmp_path):
    padding = 4 if estimator == "rloo" else None  # changes nothing
    settings = {"advantage_estimator": estimator, "num_generations": n, "pad_to_multiple_of": padding}
    trainer, reward = one_step(tmp_path, form, **settings)
    same(trainer.gradients[0], hand_gradient(trainer, reward, estimator, n))


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_penalty_is_its_estimator_s(form, direction, tmp_path):
    settings = {"advantage_estimator": "none", "num_generations": 2}
    trainer, reward = one_step(tmp_path, form, beta=0.7, kl_direction=direction, **settings)
    whole = hand_gradient(trainer, reward, "none", 2, 0.7, direction)
    same(trainer.gradients[0], whole)
    bare = hand_gradient(trainer, reward, "none", 2)
    same(trainer.gradients[0] - bare, whole - bare, 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_give_the_gradient_of_the_whole(form, tmp_path):
    settings = {"advantage_estimator": "rloo", "num_generations": 3, "beta": 0.3}
    parts = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    whole, _ = one_step(tmp_path, form, **settings)
    split, reward = one_step(tmp_path, form, **settings, **parts)
    assert split.texts == whole.texts
    same(split.gradients[0], whole.gradients[0])
    same(split.gradients[0], hand_gradient(split, reward, "rloo", 3, 0.3))


def short_text(completions, **_):
    """A second reward, `None` where there is nothing to say."""
    texts = [completion[0]["content"] for completion in completions]
    return [None if "a" in text else -len(text) / 4 for text in texts]


@pytest.mark.parametrize("form", FORMS)
def test_several_rewards_are_added_by_their_weights(form, tmp_path):
    rows, reward = FORMS[form]
    settings = {"advantage_estimator": "rloo", "num_generations": 3, "reward_clip": 0.5, **STILL}
    trainer = trainer_of(tmp_path, 3 * rows, [reward, short_text], reward_weights=[1.0, 0.25], **settings)
    trainer.train()

    def clip(value):
        return 0.0 if value is None else min(0.5, max(-0.5, value))

    def both(completions, **columns):
        pairs = zip(reward(completions, **columns), short_text(completions), strict=True)
        return [clip(one) + 0.25 * clip(other) for one, other in pairs]

    same(trainer.gradients[0], hand_gradient(trainer, both, "rloo", 3))
    log = trainer.state.log_history[0]
    assert {"rewards/uneven/mean", "rewards/short_text/mean"} <= set(log)


# --- the choice form


def test_choices_are_drawn_from_the_policy(tmp_path):
    row, n = CHOICE_ROWS[1], 600
    trainer = trainer_of(tmp_path, [row], right_choice, num_generations=n, per_device_train_batch_size=n)
    with torch.no_grad():
        policy = option_logps(trainer.model, row).exp()
    torch.manual_seed(0)
    trainer.model.train()
    trainer._generate_and_score_completions([row] * n)
    counts = torch.tensor([trainer.texts[0].count(choice) for choice in row["choices"]])
    assert int(counts.sum()) == n
    deviation = (n * policy * (1 - policy)).sqrt()
    assert bool(((counts - n * policy).abs() <= 4 * deviation + 1).all()), (counts, n * policy)
    assert int((counts > 0).sum()) > 1


@pytest.mark.parametrize("greedy", [True, False])
def test_evaluation_is_greedy_unless_it_is_to_sample(greedy, tmp_path):
    sampling = {"num_generations": 3, "num_generations_eval": 8, "per_device_eval_batch_size": 8}
    trainer = trainer_of(
        tmp_path, CHOICE_ROWS, right_choice, eval_rows=CHOICE_ROWS, greedy_eval=greedy, **sampling
    )  # fmt: skip
    before = trainer.generation_config
    trainer.evaluate()
    assert trainer.generation_config is before and before.do_sample
    taken = {(row["id"], text) for rows, texts in zip(trainer.inputs, trainer.texts, strict=True)
             for row, text in zip(rows, texts, strict=True)}  # fmt: skip
    assert (taken == {(row["id"], likeliest(trainer.model, row)) for row in CHOICE_ROWS}) is greedy


def test_a_stream_of_rows_with_choices_is_of_the_choice_form(tmp_path):
    """A stream made by a generator does not know its columns."""
    stream = IterableDataset.from_generator(lambda: iter(CHOICE_ROWS))
    assert stream.column_names is None
    trainer = trainer_of(tmp_path, stream, right_choice, num_generations=3, svf=SVFConfig())
    trainer.train()
    assert 0 < trainer.state.log_history[0]["choices/probability"] < 1


@pytest.mark.parametrize("form", FORMS)
def test_greedy_rollouts_take_the_likeliest(form, tmp_path):
    settings = {"advantage_estimator": "none", "num_generations": 1, "greedy_rollouts": True}
    trainer, reward = one_step(tmp_path, form, **settings)
    assert trainer.texts[0] == [likeliest(trainer.model, row) for row in trainer.inputs[0]]
    same(trainer.gradients[0], hand_gradient(trainer, reward, "none", 1))


def test_evaluation_with_vllm_is_greedy_by_its_temperature(tmp_path):
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, num_generations=3)
    del trainer.generation_config  # TRL makes none for vLLM, and a server's client instead
    trainer.args.use_vllm, trainer.vllm_generation = True, SimpleNamespace(temperature=0.7)
    with pytest.raises(RuntimeError, match="inside"), trainer._greedy():
        assert trainer.vllm_generation.temperature == 0
        raise RuntimeError("inside")
    assert trainer.vllm_generation.temperature == 0.7


@pytest.mark.parametrize("use_vllm, switch", [(True, {"temperature": 0.0}), (False, {"do_sample": False})])
def test_greedy_rollouts_say_so_in_the_words_of_the_generator(use_vllm, switch):
    config = config_of(
        use_vllm=use_vllm, greedy_rollouts=True, num_generations=1, advantage_estimator="none",
        generation_kwargs={"min_p": 0.1},
    )  # fmt: skip
    assert config.generation_kwargs == {"min_p": 0.1, **switch}
    assert config.vllm_importance_sampling_correction is False


# --- a run


@pytest.mark.parametrize("greedy, every", [(True, {}), (False, {"steps_per_generation": 2})], ids=["fresh", "old"])
@pytest.mark.parametrize("form", FORMS)
def test_evaluating_in_the_middle_changes_nothing(form, greedy, every, tmp_path):
    rows, reward = FORMS[form]
    rows = 2 * rows
    evaluated = {**EVALUATED, "eval_rows": rows, "greedy_eval": greedy}
    without = trainer_of(tmp_path, rows, reward, **RUN, **every)
    without.train()
    between = trainer_of(tmp_path, rows, reward, **RUN, **every, **evaluated)
    between.train()
    assert len(between.texts) > len(without.texts)
    assert torch.equal(trained_z(without), trained_z(between))


def test_offsets_of_another_dtype_become_float32(tmp_path):
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), SVFConfig(init_weights=False))
    for parameter in offsets(model):  # as TRL does on quantised bases
        parameter.data = parameter.data.bfloat16()
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, model=model, num_generations=3)
    assert all(parameter.dtype == torch.float32 for parameter in offsets(trainer.model))


def test_how_far_z_has_moved_is_logged_whole_and_by_block(tmp_path):
    trainer = trainer_of(tmp_path, CHOICE_ROWS, right_choice, **{**RUN, "max_steps": 1, "learning_rate": 0.0})
    trainer.train()
    log = trainer.state.log_history[0]
    flattened = trained_z(trainer).abs()
    assert log["z/mean_distance_from_1"] == pytest.approx(float(flattened.mean()))
    assert log["z/max_distance_from_1"] == pytest.approx(float(flattened.max()))
    for block in range(2):
        name = f"model.layers.{block}"
        here = [m.svf_offset["default"].weight for n, m in pico.svf_layers(trainer.model).items() if f"{name}." in n]
        assert len(here) == 3
        assert log[f"z/{name}/mean_distance_from_1"] == pytest.approx(float(flat(here).abs().mean()))
    assert 0 < log["choices/probability"] <= 1


# --- the filter of prompts


def test_equal_groups_rest_longer_each_time_and_an_unequal_one_never():
    chosen, rests = PromptFilter(), []
    for _ in range(7):
        chosen.learn(3, equal=True)
        rest = 0
        while chosen.choose([3], 9, "seed") != [3]:
            rest += 1
        rests.append(rest)
    assert rests == [1, 3, 7, 15, 31, 31, 31]
    chosen.learn(3, equal=False)
    assert chosen.choose([3], 9, "seed") == [3]


def test_resting_prompts_are_replaced_by_others_as_long_as_there_are_any():
    chosen = PromptFilter()
    for row in (1, 2, 3, 4):
        chosen.learn(row, equal=True)
    again = PromptFilter.from_state(json.loads(json.dumps(chosen.state())))
    rows = chosen.choose([0, 1, 2, 3], 6, "seed")
    assert rows == again.choose([0, 1, 2, 3], 6, "seed") == [0, 5, 2, 3]  # 5 alone is awake and not asked
    assert chosen.record["4"] == [1, 1] and chosen.record["1"] == [1, 0]


def test_prompts_that_are_always_solved_make_room_for_others(tmp_path):
    """Of eight rows six have only right choices: after they were seen once, the other two fill the step."""
    rows = [{"prompt": chat(f"easy {i}"), "choices": ["aa", "bb"], "easy": True} for i in range(6)]
    rows += [{"prompt": chat(f"hard {i}"), "choices": ["aa", "bb"], "easy": False} for i in range(2)]

    def reward(completions, easy, **_):
        return [1.0 if simple or i % 2 else -1.0 for i, simple in enumerate(easy)]

    settings = {**RUN, "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 8}
    trainer = trainer_of(tmp_path, rows, reward, prompt_filter=True, **settings)
    trainer.train()
    shares = [sum(not row["easy"] for row in batch) / len(batch) for batch in trainer.inputs]
    assert sum(shares[:4]) == 1.0  # the first epoch: each row once, two of eight
    assert sum(shares[4:]) > 1.5
    log = [entry for entry in trainer.state.log_history if "prompts/replaced" in entry]
    assert [entry["prompts/replaced"] for entry in log[:4]] == [0.0] * 4
    assert sum(entry["prompts/replaced"] for entry in log[4:]) > 1
    for batch in trainer.inputs:  # whole groups, of different prompts
        prompts = [row["prompt"][0]["content"] for row in batch]
        assert prompts[:4] == [prompts[0]] * 4 and prompts[4:] == [prompts[4]] * 4 and prompts[0] != prompts[4]


# --- generation


def test_rollouts_run_on_merged_copies_and_leave_the_weights_alone(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, num_generations=3)
    model = trainer.model
    before = {name: value.clone() for name, value in model.state_dict().items() if "svf_offset" not in name}
    plans, original = [], type(model).generate

    @functools.wraps(original)
    def watched(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        plans.append({layer.svf_chosen for layer in pico.svf_layers(model).values()})
        return output

    monkeypatch.setattr(type(model), "generate", watched)
    trainer.train()
    assert plans and all(plan == {"merged"} for plan in plans)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


def test_the_plan_counts_the_forwards_of_a_whole_step(tmp_path):
    settings = {"svf": SVFConfig(plan="narrow"), "num_generations": 3, "gradient_accumulation_steps": 3}
    layers = pico.svf_layers(trainer_of(tmp_path, 3 * TEXT_ROWS, uneven, **settings).model).values()
    assert {(layer.execution.plan, layer.execution.forwards) for layer in layers} == {("narrow", 3)}
