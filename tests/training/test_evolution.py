# SPDX-License-Identifier: Apache-2.0
"""Laws of training without a gradient: the estimate, members scored side by side, and runs that climb and resume."""

import pico
import pytest
import torch
from peft import get_peft_model
from tiny_model import tiny_model
from trainers import (
    CHOICE_ROWS,
    FORMS,
    TOKENIZER,
    Evolving,
    evolution_of,
    flat,
    in_two_processes,
    offsets,
    right_choice,
    same,
    trained_z,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.evaluation import choice_logps
from peft_svf.training.evolution import estimate, shaped


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_estimate_of_a_linear_reward_is_exact_where_directions_have_unit_covariance():
    """Any set of directions with `Σ e eᵀ = P 1` gives the gradient itself, from wherever it is taken."""
    size, slope, start, sigma = 11, draws(0, 11), draws(1, 11), 0.3
    noise = torch.linalg.qr(draws(2, size, size))[0] * size**0.5
    above, below = ((start + side * sigma * noise) @ slope + 5.0 for side in (1, -1))
    torch.testing.assert_close(estimate(noise, above, below, sigma), slope)


def test_what_is_even_in_the_direction_cancels_in_each_pair():
    noise, sigma, curve = draws(0, 7, 4), 0.3, draws(1, 4)

    def reward(z):
        return (z.square() * curve).sum(-1)  # even around 0, where its gradient is 0

    found = estimate(noise, reward(sigma * noise), reward(-sigma * noise), sigma)
    assert float(found.abs().max()) < 1e-12


def test_ranks_are_evenly_spread_and_equal_ones_share_theirs():
    fitness = torch.tensor([3.0, -1e9, 7.0, 3.0, 1e9])
    torch.testing.assert_close(shaped(fitness, "rank"), torch.tensor([-0.125, -0.5, 0.25, -0.125, 0.5]))
    assert torch.equal(shaped(torch.ones(4), "rank"), torch.zeros(4))


def test_a_z_score_has_mean_zero_and_unit_deviation():
    scores = shaped(torch.tensor([1.0, 2.0, 6.0, -3.0]), "z_score")
    torch.testing.assert_close(scores.mean(), torch.tensor(0.0))
    torch.testing.assert_close(scores.std(correction=0), torch.tensor(1.0))
    assert torch.equal(shaped(torch.full((4,), 0.1), "z_score"), torch.zeros(4))
    fitness = torch.tensor([0.5, -1.0])
    assert torch.equal(shaped(fitness, "none"), fitness)


def alone(trainer, member):
    """The trainer's model with one member written into its offsets, for plain forwards."""
    weights = trainer._weights()
    for weight, part in zip(weights, member.split([len(weight) for weight in weights]), strict=True):
        weight.data.copy_(part)
    return trainer.model


def by_hand(trainer, members, rows, reward):
    """Each member's mean reward, one row and one member at a time."""
    start = flat(trainer._weights()).clone()
    found = []
    for member in members:
        model, rewards = alone(trainer, member), []
        for row in rows:
            columns = {key: [value] for key, value in row.items() if key != "prompt"}
            if "choices" in row:
                with torch.no_grad():
                    p = choice_logps(model, TOKENIZER, [row])[0].softmax(-1)
                each = [reward([[{"content": text}]], **columns)[0] for text in row["choices"]]
                rewards.append(sum(float(a) * b for a, b in zip(p, each, strict=True)))
            else:
                rewards.append(reward([[{"content": trainer.answers([row])[0]}]], **columns)[0])
        found.append(sum(rewards) / len(rewards))
    alone(trainer, start)
    return torch.tensor(found)


@pytest.mark.parametrize("together", [1, 3, 8, 99], ids="{} rows a forward".format)
@pytest.mark.parametrize("form", FORMS)
def test_members_side_by_side_score_as_each_alone(form, together, tmp_path):
    rows, reward = FORMS[form]
    trainer = evolution_of(tmp_path, rows, reward, rows_per_forward=together)
    members = torch.cat([trained_z(trainer)[None], 0.5 * draws(0, 4, len(trained_z(trainer))).float()])
    wanted = by_hand(trainer, members, rows, reward)
    assert float(wanted.std()) > 1e-3
    torch.testing.assert_close(trainer._fitness(members, rows), wanted, rtol=1e-4, atol=1e-5)


def test_members_move_only_the_directions_of_the_adapter(tmp_path):
    trainer = evolution_of(tmp_path, CHOICE_ROWS, right_choice, svf=SVFConfig(rank=5, init_weights=False))
    assert {len(weight) for weight in offsets(trainer.model)} == {5}
    members = draws(0, 3, len(trained_z(trainer))).float()
    wanted = by_hand(trainer, members, CHOICE_ROWS, right_choice)
    torch.testing.assert_close(trainer._fitness(members, CHOICE_ROWS), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 5])
def test_members_of_stacked_experts_score_as_each_alone(rank, tmp_path):
    model = pico.build("qwen3_moe", vocabulary=len(TOKENIZER))
    svf = SVFConfig(target_modules=[], **pico.STACKS, rank=rank, init_weights=False)
    trainer = evolution_of(tmp_path, CHOICE_ROWS, right_choice, model=model, svf=svf)
    members = 0.5 * draws(0, 3, len(trained_z(trainer))).float()
    wanted = by_hand(trainer, members, CHOICE_ROWS, right_choice)
    assert float(wanted.std()) > 1e-3
    torch.testing.assert_close(trainer._fitness(members, CHOICE_ROWS), wanted, rtol=1e-3, atol=1e-4)


def test_several_rewards_are_added_by_their_weights_and_none_counts_as_zero(tmp_path):
    def second(completions, **_):
        return [None if "a" in completion[0]["content"] else 2.0 for completion in completions]

    trainer = evolution_of(tmp_path, CHOICE_ROWS, [right_choice, second], reward_weights=[1.0, 0.25])
    found = trainer._choice_rewards(CHOICE_ROWS)
    wanted = [[-1, 1, -0.5, 0], [1.5, -1, -0.5, -0.5], [-0.5, 1.5, 0, 0], [-0.5, 1.5, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_many_members_find_the_direction_of_the_true_gradient(tmp_path):
    """Against backpropagation through the expected reward: few directions, so that the population spans them."""
    settings = {"population": 600, "sigma": 0.01, "shaping": "none", "max_steps": 1, "rows_per_forward": 600}
    svf = SVFConfig(target_modules=["up_proj"], rank=3, init_weights=False)
    trainer = evolution_of(tmp_path, CHOICE_ROWS, right_choice, svf=svf, kind=Evolving, learning_rate=0.0, **settings)
    trainer.train()
    logps = choice_logps(trainer.model, TOKENIZER, CHOICE_ROWS)
    expected = (logps.softmax(-1) * trainer._choice_rewards(CHOICE_ROWS)).sum(-1).mean()
    exact = flat(torch.autograd.grad(expected, offsets(trainer.model)))
    same(-trainer.gradients[0], exact, 0.1)


def test_accumulated_batches_are_averaged(tmp_path):
    class Same(Evolving):
        """All steps draw the same directions."""

        def _draw(self, z):
            return draws(5, self.args.population // 2, len(z)).float()

    plain = {"shaping": "none", "max_steps": 1, "learning_rate": 0.0, "kind": Same}
    whole = evolution_of(tmp_path, CHOICE_ROWS, right_choice, **plain)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    split = evolution_of(tmp_path, CHOICE_ROWS, right_choice, **plain, **parts)
    whole.train()
    split.train()
    torch.testing.assert_close(split.gradients[0], whole.gradients[0])
    assert split.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-6)


def test_a_run_logs_its_population(tmp_path):
    trainer = evolution_of(tmp_path, CHOICE_ROWS, right_choice, learning_rate=0.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(-log["loss"], abs=1e-4)
    assert log["reward_best"] > log["reward"] and log["reward_std"] > 0
    assert log["z/mean_distance_from_1"] == pytest.approx(float(trained_z(trainer).abs().mean()))


def test_only_z_vectors_of_one_active_adapter_are_evolved(tmp_path):
    merged = get_peft_model(tiny_model(), SVFConfig(init_weights=False))
    merged.merge_adapter()
    for settings, message in (
        ({"svf": SVFConfig(modules_to_save=["lm_head"])}, r"1 other parameters .*lm_head"),
        ({"model": merged}, "unmerge, enable and activate"),
    ):
        with pytest.raises(ValueError, match=message):
            evolution_of(tmp_path, CHOICE_ROWS, right_choice, **settings)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_is_trained_as_it_is(bits, tmp_path):
    """Only forwards are needed, and without the adapter the base answers as before."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    config = LlamaConfig(**{**tiny_model().config.to_dict(), **sizes})  # in blocks that the packed kernels take
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    packing = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=packing, device_map="cpu")
    trainer = evolution_of(tmp_path, CHOICE_ROWS, right_choice, model=model, svf=SVFConfig(init_weights=False))
    assert all(layer.quantization_backend is not None for layer in pico.svf_layers(trainer.model).values())
    with trainer.model.disable_adapter():
        before = pico.logits(trainer.model, ids := {"input_ids": torch.arange(3, 15).view(2, 6)})
    members = 0.5 * draws(0, 3, len(trained_z(trainer))).float()
    wanted = by_hand(trainer, members, CHOICE_ROWS, right_choice)
    assert float(wanted.std()) > 1e-3
    torch.testing.assert_close(trainer._fitness(members, CHOICE_ROWS), wanted, rtol=0.01, atol=0.01)
    start = trained_z(trainer).clone()
    trainer.train()
    assert all(weight.dtype == torch.float32 for weight in offsets(trainer.model))
    assert float((trained_z(trainer) - start).abs().max()) > 1e-3
    with trainer.model.disable_adapter():
        assert torch.equal(pico.logits(trainer.model, ids), before)


SCRIPT = """
import sys, torch, trainers as t
trainer = t.evolution_of(sys.argv[1], t.random_rows(16), t.right_choice, kind=t.Evolving, max_steps=2)
trainer.train()
torch.save((trainer.inputs, trainer.gradients, t.trained_z(trainer)), f"{sys.argv[1]}/{trainer.args.process_index}.pt")
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_processes_share_their_estimates_of_different_rows_and_directions(tmp_path):
    (rows, gradients, z), other = in_two_processes(SCRIPT, tmp_path)
    ids = [{row["id"] for row in batch} for batch in rows]
    assert all(not mine & {row["id"] for row in batch} for mine, batch in zip(ids, other[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, other[1], strict=True))
    assert torch.equal(z, other[2])


def test_a_member_that_overflows_is_the_worst(tmp_path, monkeypatch):
    trainer = evolution_of(tmp_path, CHOICE_ROWS, right_choice, max_steps=1)
    real = trainer._fitness

    def broken(members, rows):
        fitness = real(members, rows)
        fitness[0] = torch.nan
        return fitness

    seen = []
    monkeypatch.setattr(trainer, "_fitness", broken)
    monkeypatch.setattr(
        "peft_svf.training.evolution.shaped", lambda fitness, how: seen.append(fitness) or shaped(fitness, how)
    )
    trainer.train()
    assert seen and all(each.isfinite().all() and each[0] == each.min() for each in seen)
