# SPDX-License-Identifier: Apache-2.0
"""Laws of training: gradients against a REINFORCE written by hand, and what a run may and may not change."""

import functools
import gzip
import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pico
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_model import tiny_model, tiny_tokenizer
from torch.nn.functional import cosine_similarity
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from peft_svf import SVFConfig
from peft_svf.training import MergedGenerationMixin, ReinforceConfig, ReinforceTrainer, advantages_of, merged

ROOT = Path(__file__).parents[1]
TOKENIZER = tiny_tokenizer()
SHORT = {"max_completion_length": 5, "per_device_train_batch_size": 12, "max_steps": 1}
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


class Recorder(ReinforceTrainer):
    """Keeps what was rolled out, and the gradient of each optimizer step before clipping changes it."""

    def __init__(self, *args, **kwargs):
        self.outputs, self.inputs, self.texts, self.gradients = [], [], [], []
        super().__init__(*args, **kwargs)
        recorder = self

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                recorder.gradients.append(flat(p.grad for p in offsets(recorder.model)))

        self.add_callback(Gradients())

    def _calculate_rewards(self, inputs, prompts, completions, *args, **kwargs):
        self.texts.append([completion[0]["content"] for completion in completions])
        return super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.inputs.append(inputs)
        self.outputs.append({name: value.clone() for name, value in output.items()})
        return output


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def offsets(model):
    return [parameter for name, parameter in model.named_parameters() if parameter.requires_grad]


def trained_z(trainer):
    return flat(offsets(trainer.model))


def trainer_of(folder, rows, reward, *, model=None, svf=None, kind=Recorder, eval_rows=None, **settings):
    """A trainer on a tiny model, from a random z unless `svf` says otherwise."""
    args = ReinforceConfig(**{"output_dir": str(folder), "save_strategy": "no", **QUIET, **SHORT, **settings})
    return kind(
        soft_model() if model is None else model,
        reward,
        args,
        Dataset.from_list(rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=TOKENIZER,
        peft_config=svf or (None if isinstance(model, PeftModel) else SVFConfig(init_weights=False)),
    )


def same(one, other, limit=1e-4):
    """Cosine 1 and norm ratio 1."""
    one, other = one.double(), other.double()
    assert float(other.norm()) > 1e-4, "a gradient of zero shows nothing"
    assert float(cosine_similarity(one, other, dim=0)) == pytest.approx(1, abs=limit)
    assert float(one.norm() / other.norm()) == pytest.approx(1, abs=limit)


# --- advantages


def by_hand(rewards, estimator, n):
    """Each estimator as its definition reads, one completion at a time; `None` is a missing reward."""
    found = []
    for i, reward in enumerate(rewards):
        group = range(i - i % n, i - i % n + n) if estimator in ("rloo", "group") else range(len(rewards))
        known = [rewards[j] for j in group if rewards[j] is not None]
        others = [rewards[j] for j in group if rewards[j] is not None and j != i]
        mean = sum(known) / len(known) if known else 0.0
        square = sum((r - mean) ** 2 for r in known)
        if reward is None:
            found.append(0.0)
        elif estimator == "none":
            found.append(reward)
        elif estimator in ("batch", "rloo"):
            found.append(reward - sum(others) / len(others) if others else 0.0)
        elif estimator == "batch_norm":
            found.append((reward - mean) / max(math.sqrt(square / len(known)), 1e-7))
        else:
            deviation = math.sqrt(square / (len(known) - 1)) if len(known) > 1 else 0.0
            found.append((reward - mean) / (deviation + 1e-4))
    return found


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_missing_reward_does_not_move_the_others(estimator):
    rewards = torch.tensor([1.0, -1.0, 0.5, math.nan])
    found = advantages_of(rewards, estimator, 4)
    torch.testing.assert_close(found[:3], advantages_of(rewards[:3], estimator, 3))


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


def test_group_advantages_are_those_of_trl(tmp_path):
    found = {}
    for kind, config in ((GRPOTrainer, GRPOConfig), (ReinforceTrainer, ReinforceConfig)):
        settings = {"advantage_estimator": "group"} if config is ReinforceConfig else {}
        args = config(output_dir=str(tmp_path), num_generations=3, save_strategy="no", **QUIET, **SHORT, **settings)
        trainer = kind(
            tiny_model(), uneven, args, Dataset.from_list(TEXT_ROWS), processing_class=TOKENIZER,
            peft_config=SVFConfig(),
        )  # fmt: skip
        batch = [row for row in TEXT_ROWS[:2] for _ in range(3)]
        torch.manual_seed(0)
        found[kind] = trainer._generate_and_score_completions(batch)["advantages"]
    assert found[GRPOTrainer].std() > 0.1
    torch.testing.assert_close(found[ReinforceTrainer], found[GRPOTrainer])


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


@pytest.mark.parametrize("estimator", ["rloo", "group"])
def test_one_completion_a_prompt_has_no_group(estimator):
    with pytest.raises(ValueError, match=f"{estimator}.*num_generations is 1: use 'none' or 'batch'"):
        config_of(num_generations=1, advantage_estimator=estimator)


def test_a_generation_batch_of_one_is_refused():
    with pytest.raises(ValueError, match=r"batch of 1.*raise per_device_train_batch_size"):
        config_of(num_generations=1, advantage_estimator="none", per_device_train_batch_size=1)
    config = config_of(
        num_generations=1, advantage_estimator="none", per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    assert (config.num_generations, config.generation_batch_size) == (1, 2)


@pytest.mark.parametrize("direction, correction", [("policy_ref", True), ("ref_policy", False)])
def test_the_direction_of_the_divergence_sets_trls_switch(direction, correction):
    assert config_of(kl_direction=direction, beta=0.1).use_bias_correction_kl is correction
    assert config_of(beta=0.1).use_bias_correction_kl is True  # the paper's direction is the default


def test_data_for_less_than_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="A step takes 12 different prompts, but the training data have 4 rows"):
        trainer_of(tmp_path, CHOICE_ROWS, right_choice, num_generations=1, advantage_estimator="batch")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"advantage_estimator": "mean"}, "`advantage_estimator` cannot be 'mean'"),
        ({"kl_direction": "both"}, "`kl_direction` must be 'policy_ref' or 'ref_policy', got 'both'"),
        ({"greedy_rollouts": True, "num_generations": 4}, "4 equal completions: set num_generations=1"),
        ({"beta": 0.1, "importance_sampling_level": "sequence"}, "only importance_sampling_level='token'"),
        ({"early_stopping_patience": 2}, "early_stopping_patience.*eval_strategy"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_sequence_ratios_are_allowed_without_a_penalty():
    assert config_of(importance_sampling_level="sequence").importance_sampling_level == "sequence"


def test_paper_preset_is_the_text_of_the_paper():
    config = ReinforceConfig.paper(output_dir="unused", per_device_train_batch_size=4, **QUIET)
    assert (config.num_generations, config.advantage_estimator, config.reward_clip) == (1, "none", None)
    assert (config.beta, config.kl_direction, config.use_bias_correction_kl) == (0.1, "policy_ref", True)
    assert (config.learning_rate, config.lr_scheduler_type, config.max_grad_norm) == (2e-3, "cosine", 1e-3)
    assert (config.temperature, config.greedy_rollouts, config.greedy_eval) == (1.0, False, True)
    assert (config.loss_type, config.weight_decay, config.num_iterations) == ("luspo", 0.0, 1)
    assert ReinforceConfig.paper(output_dir="unused", beta=0.2, per_device_train_batch_size=4, **QUIET).beta == 0.2


@pytest.mark.parametrize("metric, greater", [(None, True), ("eval_loss", False), ("eval_z", True)])
def test_the_best_checkpoint_is_the_one_with_the_best_reward(metric, greater):
    chosen = {} if metric is None else {"metric_for_best_model": metric}
    config = config_of(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, **chosen
    )
    assert config.metric_for_best_model == (metric or "eval_reward")
    assert config.greater_is_better is greater


# --- gradients


def token_logps(model, prompt, completion):
    """Log-likelihoods of a completion's tokens by one plain forward, without padding."""
    ids = torch.tensor([prompt + completion])
    logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


def option_logps(model, row):
    """Log-probabilities of a row's choices: the softmax of their summed token log-likelihoods, by plain forwards."""
    vocabulary = TOKENIZER.get_vocab()
    prompt = [vocabulary[t] for t in ("<u>", *row["prompt"][0]["content"], "<end>", "<a>")]
    texts = row["choices"]
    ends = any(a != b and b.startswith(a) for a in texts for b in texts)
    choices = [[*(vocabulary[t] for t in text), *[vocabulary["<end>"]] * ends] for text in texts]
    return torch.stack([token_logps(model, prompt, choice).sum() for choice in choices]).log_softmax(0)


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
            found.append(token_logps(model, prompt, completion))
    return found


def hand_gradient(trainer, reward, estimator, n, beta=0.0, direction="policy_ref"):
    """`-mean_i (A_i log p(y_i) - beta KL_i)` as it is written, differentiated."""
    inputs, texts = trainer.inputs[0], trainer.texts[0]
    columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
    rewards = reward([[{"role": "assistant", "content": text}] for text in texts], **columns)
    advantages = by_hand(rewards, estimator, n)
    policy = action_logps(trainer, trainer.model)
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = action_logps(trainer, trainer.model)
    loss = torch.tensor(0.0)
    for advantage, logps, ref in zip(advantages, policy, reference, strict=True):
        k3 = (ref - logps).exp() - (ref - logps) - 1
        if direction == "policy_ref":
            k3 = k3 * (logps - logps.detach()).exp()
        loss = loss - (advantage * logps.sum() - beta * k3.sum()) / len(inputs)
    return flat(torch.autograd.grad(loss, offsets(trainer.model)))


FORMS = {"generate": (TEXT_ROWS, uneven), "choice": (CHOICE_ROWS, uneven)}


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
    trainer, reward = one_step(tmp_path, form, advantage_estimator=estimator, num_generations=n)
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


def test_the_estimators_of_the_penalty_have_the_gradients_of_both_divergences():
    """Exact expectation over a policy's actions: what `kl_direction` promises."""
    ref = torch.tensor([0.1, 0.9, -0.4, 0.0, 0.3], dtype=torch.float64).log_softmax(0)
    logits = torch.tensor([0.5, -0.3, 0.2, 0.8, -1.0], dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    k3 = (ref - logps).exp() - (ref - logps) - 1
    samples = logps.exp().detach()
    estimators = {"policy_ref": k3 * (logps - logps.detach()).exp(), "ref_policy": k3}
    exact = {
        "policy_ref": (logps.exp() * (logps - ref)).sum(),
        "ref_policy": (ref.exp() * (ref - logps)).sum(),
    }
    for name in exact:
        found = torch.autograd.grad((samples * estimators[name]).sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(found, torch.autograd.grad(exact[name], logits, retain_graph=True)[0])


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_give_the_gradient_of_the_whole(form, tmp_path):
    settings = {"advantage_estimator": "rloo", "num_generations": 3, "beta": 0.3}
    parts = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
    whole, _ = one_step(tmp_path, form, **settings)
    split, reward = one_step(tmp_path, form, **settings, **parts)
    assert split.texts == whole.texts
    same(split.gradients[0], whole.gradients[0])
    same(split.gradients[0], hand_gradient(split, reward, "rloo", 3, 0.3))


def test_clipped_rewards_are_what_the_gradient_sees(tmp_path):
    settings = {"advantage_estimator": "none", "num_generations": 2, "reward_clip": 0.25}
    trainer, reward = one_step(tmp_path, "generate", **settings)

    def clipped(*args, **kwargs):
        return [min(0.25, max(-0.25, r)) for r in reward(*args, **kwargs)]

    same(trainer.gradients[0], hand_gradient(trainer, clipped, "none", 2))


def test_padding_to_a_multiple_changes_no_choice(tmp_path):
    settings = {"advantage_estimator": "rloo", "num_generations": 3, "pad_to_multiple_of": 4}
    trainer, reward = one_step(tmp_path, "choice", **settings)
    same(trainer.gradients[0], hand_gradient(trainer, reward, "rloo", 3))


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
def test_evaluation_takes_the_likeliest_choice(greedy, tmp_path):
    trainer = trainer_of(
        tmp_path, CHOICE_ROWS, right_choice, eval_rows=CHOICE_ROWS, num_generations=3, greedy_eval=greedy,
        num_generations_eval=8, per_device_eval_batch_size=8,
    )  # fmt: skip
    metrics = trainer.evaluate()
    taken = [(row["id"], text) for rows, texts in zip(trainer.inputs, trainer.texts, strict=True)
             for row, text in zip(rows, texts, strict=True)]  # fmt: skip
    with torch.no_grad():
        best = {(row["id"], row["choices"][option_logps(trainer.model, row).argmax()]) for row in CHOICE_ROWS}
    assert len(taken) == 32
    assert (set(taken) == best) is greedy
    rewards = right_choice([[{"content": text}] for _, text in taken], **{
        key: [CHOICE_ROWS[int(i)][key] for i, _ in taken] for key in ("choices", "label")
    })  # fmt: skip
    assert metrics["eval_reward"] == pytest.approx(sum(rewards) / 32)


def test_rewards_see_the_text_that_was_chosen(tmp_path):
    seen = []

    def reward(completions, choices, **_):
        seen.extend(zip((completion[0]["content"] for completion in completions), choices, strict=True))
        return [0.0] * len(completions)

    trainer_of(tmp_path, CHOICE_ROWS, reward, num_generations=3).train()
    assert len(seen) == 12
    assert all(text in choices for text, choices in seen)


def test_rows_whose_prompt_is_a_text_are_answered_in_text(tmp_path):
    rows = [{"prompt": "a plain prompt", "choices": ["one", "two"], "label": 0}]

    def reward(completions, **_):
        assert set(completions) <= {"one", "two"}
        return [1.0] * len(completions)

    trainer_of(tmp_path, 6 * rows, reward, num_generations=2, kind=ReinforceTrainer).train()


@pytest.mark.parametrize("form", FORMS)
def test_greedy_rollouts_take_the_likeliest(form, tmp_path):
    settings = {"advantage_estimator": "none", "num_generations": 1, "greedy_rollouts": True}
    trainer, reward = one_step(tmp_path, form, **settings)
    texts = {}
    for row, text in zip(trainer.inputs[0], trainer.texts[0], strict=True):
        assert texts.setdefault(json.dumps(row["prompt"]), text) == text
    for i, row in enumerate(trainer.inputs[0]):
        with torch.no_grad():
            if form == "choice":
                assert trainer.texts[0][i] == row["choices"][option_logps(trainer.model, row).argmax()]
            else:
                assert trainer.texts[0][i] == greedy_text(trainer.model, row)
    same(trainer.gradients[0], hand_gradient(trainer, reward, "none", 1))


def greedy_text(model, row, length=5):
    vocabulary = TOKENIZER.get_vocab()
    prompt = [vocabulary[t] for t in ("<u>", *row["prompt"][0]["content"], "<end>", "<a>")]
    ids = list(prompt)
    while len(ids) < len(prompt) + length and ids[len(prompt) :][-1:] != [TOKENIZER.eos_token_id]:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_evaluation_completes_greedily(tmp_path):
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, eval_rows=TEXT_ROWS, num_generations=3)
    before = trainer.generation_config
    trainer.evaluate()
    assert trainer.generation_config is before and before.do_sample
    with torch.no_grad():
        for rows, texts in zip(trainer.inputs, trainer.texts, strict=True):
            assert texts == [greedy_text(trainer.model, row) for row in rows]


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


@pytest.mark.parametrize("form", FORMS)
def test_same_seed_same_z(form, tmp_path):
    rows, reward = FORMS[form]
    runs = []
    for seed in (0, 0, 1):
        trainer = trainer_of(tmp_path, rows, reward, svf=SVFConfig(), seed=seed, **{**RUN, "max_steps": 2})
        trainer.train()
        runs.append(trained_z(trainer))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("every", [{}, {"steps_per_generation": 2}], ids=["fresh rollouts", "old rollouts"])
@pytest.mark.parametrize("greedy", [True, False])
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


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    rows = random_rows(24)
    settings = {**RUN, **EVALUATED, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", rows, right_choice, **settings)
    whole.train()
    again = trainer_of(tmp_path / "again", rows, right_choice, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.texts[-1] == whole.texts[-1]
    assert again.state.global_step == whole.state.global_step == 4
    assert torch.equal(trained_z(again), trained_z(whole))


def test_checkpoints_hold_offsets_and_the_best_is_loaded_at_the_end(tmp_path):
    values = iter([0.1, 0.9, 0.3, 0.2])

    class Scripted(Recorder):
        """Its second evaluation is the best."""

        def evaluate(self, *args, **kwargs):
            self.now = next(values)
            return super().evaluate(*args, **kwargs)

    def reward(completions, **_):
        training = scripted[0].model.training
        return [float(i % 2) for i in range(len(completions))] if training else [scripted[0].now] * len(completions)

    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    settings = {**RUN, **EVALUATED, **saving, "max_steps": 4}
    scripted = [None]
    scripted[0] = trainer_of(tmp_path, CHOICE_ROWS, reward, kind=Scripted, **settings)
    scripted[0].train()
    state = scripted[0].state
    assert (state.best_global_step, state.best_metric) == (2, pytest.approx(0.9))
    best = tmp_path / "checkpoint-2"
    loaded = PeftModel.from_pretrained(tiny_model(), best)
    found = {name: value for name, value in loaded.named_parameters() if "svf_offset" in name}
    now = dict(scripted[0].model.named_parameters())
    last = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-4")
    assert found and all(torch.equal(value, now[name]) for name, value in found.items())
    assert not all(torch.equal(value, now[name]) for name, value in last.named_parameters() if name in found)
    assert (best / "adapter_model.safetensors").stat().st_size < 20_000


def test_training_stops_early_when_nothing_gets_better(tmp_path):
    settings = {**RUN, **EVALUATED, "max_steps": 9, "early_stopping_patience": 2}
    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}

    def constant(completions, **_):
        return [0.5] * len(completions)

    trainer = trainer_of(tmp_path, CHOICE_ROWS, constant, **settings, **saving)
    trainer.train()
    assert trainer.state.global_step == 3  # the first is the best, then two no better


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_only_z_moves_and_stays_float32(form, dtype, tmp_path):
    rows, reward = FORMS[form]
    model = soft_model(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(tmp_path, rows, reward, model=model, svf=SVFConfig(), **{**RUN, "beta": 0.1})
    grads = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads.extend(name for name, p in trainer.model.named_parameters() if p.grad is not None)

    trainer.add_callback(Watch())
    trainer.train()
    assert grads and all("svf_offset" in name for name in grads)
    assert all(parameter.dtype == torch.float32 for parameter in offsets(trainer.model))
    assert float(trained_z(trainer).abs().max()) > 0.01
    for name, value in trainer.model.unload().state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == dtype, name


def test_z_moves_off_one_in_steps_smaller_than_bfloat16_resolves(tmp_path):
    trainer = trainer_of(
        tmp_path, CHOICE_ROWS, uneven, model=soft_model(dtype=torch.bfloat16), svf=SVFConfig(),
        **{**RUN, "learning_rate": 1e-5, "max_steps": 1, "advantage_estimator": "none"},
    )  # fmt: skip
    trainer.train()
    moved = trained_z(trainer).abs()
    assert float((moved > 0).double().mean()) > 0.9  # around z = 1 bfloat16 has steps of 4e-3
    assert float(moved.max()) < 2e-5


def test_offsets_of_another_dtype_become_float32(tmp_path):
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), SVFConfig(init_weights=False))
    for parameter in offsets(model):  # as TRL does on quantised bases
        parameter.data = parameter.data.bfloat16()
    trainer = trainer_of(tmp_path, TEXT_ROWS, uneven, model=model, num_generations=3)
    assert all(parameter.dtype == torch.float32 for parameter in offsets(trainer.model))


def test_how_far_z_has_moved_is_logged(tmp_path):
    trainer = trainer_of(tmp_path, CHOICE_ROWS, right_choice, **{**RUN, "max_steps": 1, "learning_rate": 0.0})
    trainer.train()
    log = trainer.state.log_history[0]
    flattened = trained_z(trainer).abs()
    assert log["z/mean_distance_from_1"] == pytest.approx(float(flattened.mean()))
    assert log["z/max_distance_from_1"] == pytest.approx(float(flattened.max()))
    assert 0 < log["choices/probability"] <= 1


def test_a_task_that_can_be_learned_is_learned(tmp_path):
    rows, held_out = random_rows(64), random_rows(64, seed=1)
    trainer = trainer_of(
        tmp_path, rows, right_choice, eval_rows=held_out, svf=SVFConfig(), kind=ReinforceTrainer,
        num_generations=8, per_device_train_batch_size=64, per_device_eval_batch_size=64, max_steps=50,
        learning_rate=0.1, max_grad_norm=1.0, logging_steps=50,
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert (1 + before) / 2 < 0.4  # chance is 0.25, two standard deviations of 64 rows are 0.11
    assert (1 + after) / 2 > 0.7


# --- generation on merged weights


class Stock(MergedGenerationMixin, GRPOTrainer):
    """The mixin alone, over TRL's own trainer."""


def merging_trainer(folder, kind=ReinforceTrainer, **settings):
    config = ReinforceConfig if kind is ReinforceTrainer else GRPOConfig
    args = config(output_dir=str(folder), num_generations=3, save_strategy="no", **QUIET, **SHORT, **settings)
    return kind(
        tiny_model(), uneven, args, Dataset.from_list(TEXT_ROWS), processing_class=TOKENIZER,
        peft_config=SVFConfig(init_weights=False),
    )  # fmt: skip


def states_while_generating(trainer, monkeypatch, fail=False):
    """Whether the layers were merged, at each forward of `generate`."""
    found = []

    def watched(original):
        @functools.wraps(original)
        def generate(*args, **kwargs):
            found.append([layer.merged for layer in pico.svf_layers(trainer.model).values()])
            if fail:
                raise RuntimeError("generation broke")
            return original(*args, **kwargs)

        return generate

    monkeypatch.setattr(type(trainer.model), "generate", watched(type(trainer.model).generate))
    return found


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", [ReinforceTrainer, Stock])
def test_completions_on_merged_weights_are_those_on_unmerged_ones(kind, tmp_path, monkeypatch):
    trainer = merging_trainer(tmp_path, kind, generation_kwargs={"do_sample": False})
    before, found = weights_of(trainer), states_while_generating(trainer, monkeypatch)
    prompts = [row["prompt"] for row in TEXT_ROWS]
    trainer.model.train()
    merged_ids = trainer._generate(prompts)[1]
    unmerged_ids = GRPOTrainer._generate(trainer, prompts)[1]
    assert [all(state) for state in found] == [True, False] and not any(found[1])
    assert merged_ids == unmerged_ids
    after = weights_of(trainer)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_merging_can_be_turned_off(tmp_path, monkeypatch):
    trainer = merging_trainer(tmp_path, merge_for_generation=False)
    found = states_while_generating(trainer, monkeypatch)
    trainer.train()
    assert found and not any(map(any, found))


def test_an_exception_while_generating_leaves_the_weights_unmerged(tmp_path, monkeypatch):
    trainer = merging_trainer(tmp_path)
    before, found = weights_of(trainer), states_while_generating(trainer, monkeypatch, fail=True)
    with pytest.raises(RuntimeError, match="generation broke"):
        trainer.train()
    assert all(found[0])
    after = weights_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(layer.merged for layer in pico.svf_layers(trainer.model).values())


def test_leaving_merged_restores_the_weights_in_bfloat16():
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), SVFConfig(init_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        with merged(model):
            assert all(layer.merged for layer in pico.svf_layers(model).values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- TRL's own trainers


def stock(kind, folder, model, peft_config=None, **settings):
    common = {"output_dir": str(folder), "save_strategy": "no", "max_steps": 2, "learning_rate": 0.01, **QUIET}
    if kind == "sft":
        rows = [{"messages": [*row["prompt"], {"role": "assistant", "content": "abc"}]} for row in TEXT_ROWS]
        args = SFTConfig(per_device_train_batch_size=2, max_length=64, **common, **settings)
        return SFTTrainer(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER, peft_config=peft_config
        )
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    args = config(num_generations=3, per_device_train_batch_size=6, max_completion_length=5, **common, **settings)
    data = Dataset.from_list(TEXT_ROWS)
    return trainer(model, uneven, args, data, processing_class=TOKENIZER, peft_config=peft_config)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "sft"])
def test_stock_trainers_move_z_and_nothing_else(kind, tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = stock(kind, tmp_path, model, SVFConfig(task_type="CAUSAL_LM"))
    assert all("svf_offset" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert float(trained_z(trainer).abs().max()) == 0
    trainer.train()
    assert float(trained_z(trainer).abs().max()) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.unload().state_dict().items())


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_trained_expert_passed_in_is_its_own_reference(kind, tmp_path):
    model = get_peft_model(tiny_model(), SVFConfig(task_type="CAUSAL_LM", init_weights=False))
    trainer = stock(kind, tmp_path, model, beta=0.1)
    layers = pico.svf_layers(trainer.model)
    assert layers
    start = {name: layer.svf_offset["default"].weight.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        assert torch.equal(layer.svf_offset["ref"].weight, start[name])
        assert layer.svf_offset["default"].weight.requires_grad
    trainer.train()
    for name, layer in layers.items():
        assert torch.equal(layer.svf_offset["ref"].weight, start[name])
        assert not torch.equal(layer.svf_offset["default"].weight, start[name])


# --- scripts and imports


def environment(**variables):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "examples", "tests"))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "default", **variables}


def test_importing_training_without_trl_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "peft_svf.training")
    with pytest.raises(ImportError, match=r"pip install 'peft-svf\[train\]'"):
        importlib.import_module("peft_svf.training")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["choice", "generate"])
def test_the_training_example_runs(form, tmp_path):
    data = tmp_path / "data" / "arc_easy"
    data.mkdir(parents=True)
    with gzip.open(ROOT / "examples" / "data" / "arc_easy" / "validation.jsonl.gz", "rt") as file:
        lines = [line for line in file.read().split("\n") if line][:24]
    for split, part in (("train", lines[:8]), ("validation", lines[8:16]), ("test", lines[16:])):
        with gzip.open(data / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(part))
    out = tmp_path / "expert"
    script = [sys.executable, str(ROOT / "examples" / "train_expert.py"), "--tiny", "--task", "arc_easy"]
    run = subprocess.run(
        [*script, "--form", form, "--out", str(out)], capture_output=True, text=True,
        env=environment(PEFT_SVF_DATA=str(data.parent)),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert (result["task"], result["form"], result["steps"], result["expert"]["n"]) == ("arc_easy", form, 2, 8)
    assert result["command"].endswith(f"--out {out}")
    assert (out / "adapter_model.safetensors").is_file() and (out / "adapter_config.json").is_file()
    assert not list(out.glob("*.bin")) and not list(out.glob("*.pt"))
    stored = load_file(out / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny_model(), out).state_dict()
    assert stored and all("svf_offset" in name for name in stored)
    assert all(torch.equal(loaded[name.replace("svf_offset", "svf_offset.default")], stored[name]) for name in stored)


TWO_PROCESSES = """
import sys, torch, test_training as t
rows = t.FORMS[sys.argv[2]][0]
trainer = t.trainer_of(
    sys.argv[1], rows, t.uneven, advantage_estimator="batch", num_generations=1, greedy_rollouts=True,
    per_device_train_batch_size=2, optim="sgd", lr_scheduler_type="constant", learning_rate=0.1, max_grad_norm=0.0,
)
trainer.train()
torch.save(t.trained_z(trainer), f"{sys.argv[1]}/{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_take_the_step_of_one(form, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d"]
    run = subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(tmp_path), form], capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = trainer_of(
        tmp_path, FORMS[form][0], uneven, advantage_estimator="batch", num_generations=1, greedy_rollouts=True,
        per_device_train_batch_size=4, optim="sgd", lr_scheduler_type="constant", learning_rate=0.1,
        max_grad_norm=0.0,
    )  # fmt: skip
    start = trained_z(alone).clone()
    alone.train()
    assert torch.equal(one, other)
    same(one - start, trained_z(alone) - start)
