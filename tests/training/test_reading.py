# SPDX-License-Identifier: Apache-2.0
"""Laws of sharing: a prompt that is read once gives the completions and gradients of one that is read each time."""

from contextlib import nullcontext

import pico
import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cosine_similarity
from trainers import chat, evolution_of, same, trainer_of, uneven
from trl.trainer.utils import add_fused_lm_head

from peft_svf import SVFConfig
from peft_svf.evaluation.reading import (
    can_share,
    checkpoints_activations,
    completion_logps,
    distinct_prompts,
    shared_prompts,
)

BEGIN = [5, 9, 11, 4]
PROMPTS = {
    "several samples": [[7, 8, 9], [3, 4], [12, 13, 14, 15, 16]] * 2 + [[3, 4]],
    "of one length": [[7, 8, 9], [3, 4, 5]] * 2,
    "a common beginning": [BEGIN + rest for rest in ([7, 8, 9], [3], [12, 13, 14, 15, 16])],
    "both": [BEGIN + rest for rest in ([7, 8, 9], [3], [12, 13, 14, 15, 16], [3], [7, 8, 9])],
}
every_kind = pytest.mark.parametrize(  # Llama with all prompts, the others with those that share in both ways
    "kind, prompts", [("llama", name) for name in PROMPTS] + [(kind, "both") for kind in pico.CAUSAL[1:]]
)


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def adapted(kind, **kwargs):
    return get_peft_model(pico.build(kind, **kwargs), SVFConfig(init_weights=False))


def counted(model):
    """Count the tokens that the model reads, padding included."""
    tokens = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: tokens.append(args[0].numel()))
    return tokens


def generated(model, prompts, seed=0, **kwargs):
    torch.manual_seed(seed)
    ids, mask = padded(prompts)
    return model.generate(
        input_ids=ids, attention_mask=mask, **{"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0, **kwargs}
    )


@every_kind
def test_shared_rollouts_are_the_same_completions_for_the_same_seed(kind, prompts):
    model, prompts = adapted(kind), PROMPTS[prompts]
    tokens = counted(model)
    for settings in ({}, {"do_sample": False}, {"do_sample": False, "no_repeat_ngram_size": 2}):
        tokens.clear()
        expected = generated(model, prompts, **settings)
        alone = sum(tokens)
        tokens.clear()
        with shared_prompts(model):
            assert torch.equal(generated(model, prompts, **settings), expected)
        assert sum(tokens) < alone
    assert "forward" not in vars(model.get_base_model())


def test_a_sliding_window_sees_what_it_saw():
    model = adapted("gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    for prompts in PROMPTS.values():
        expected = generated(model, prompts, do_sample=False)
        with shared_prompts(model):
            assert torch.equal(generated(model, prompts, do_sample=False), expected)


def test_prompts_are_shared_by_beams_and_several_sequences():
    model, prompts = adapted("llama"), PROMPTS["both"][:3]
    for settings in ({"num_return_sequences": 3}, {"do_sample": False, "num_beams": 2}):
        expected = generated(model, prompts, **settings)
        with shared_prompts(model):
            assert torch.equal(generated(model, prompts, **settings), expected)


def gradients(model, logps, weights):
    (logps * weights).sum().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("length", [1, 4])
@every_kind
def test_shared_log_probabilities_have_the_gradient_of_separate_ones(kind, prompts, length):
    model, prompts = adapted(kind), PROMPTS[prompts]
    add_fused_lm_head(model.get_base_model(), temperature=0.7, outputs=("log_probs", "entropy"))
    ids, mask = padded(prompts)
    draws = torch.Generator().manual_seed(3)
    completions = torch.randint(3, pico.VOCABULARY, (len(prompts), length), generator=draws)
    seen = (torch.arange(length) < 1 + torch.arange(len(prompts))[:, None] % length).long()
    weights = torch.randn(seen.shape, generator=draws)
    whole, both = torch.cat([ids, completions], 1), torch.cat([mask, seen], 1)
    labels = whole.masked_fill(both == 0, -100)
    labels[:, :-length] = -100
    places = {"position_ids": (both.cumsum(-1) - 1).clamp(min=0)} if kind != "opt" else {}  # as `generate` counts them
    output = model(input_ids=whole, attention_mask=both, labels=labels, fused_lm_head=True, **places)
    tokens = counted(model)
    shared = distinct_prompts(ids, mask)
    logps, entropies = completion_logps(model, shared, completions, seen, 0.7)
    torch.testing.assert_close(logps, output.log_probs[:, -length:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies, output.entropy[:, -length:], rtol=1e-4, atol=1e-5)
    one = gradients(model, logps, weights)
    other = gradients(model, output.log_probs[:, -length:], weights)
    assert float(other.norm()) > 1e-3
    assert float(cosine_similarity(one, other, dim=0)) == pytest.approx(1, abs=1e-6)
    assert float(one.norm() / other.norm()) == pytest.approx(1, abs=1e-5)
    assert sum(tokens) < whole.numel()


def test_what_has_no_cache_to_repeat_is_not_shared():
    import transformers as hf

    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=53, hidden_size=24, num_hidden_layers=2, state_size=4))
    assert not can_share(mamba.eval())
    expected = generated(mamba, PROMPTS["both"])
    with shared_prompts(mamba):
        assert torch.equal(generated(mamba, PROMPTS["both"]), expected)
    model = pico.build("llama")
    model.gradient_checkpointing_enable()
    assert can_share(model) and not checkpoints_activations(model) and checkpoints_activations(model.train())


def test_different_prompts_with_nothing_in_common_are_not_shared():
    assert distinct_prompts(*padded([[3, 4], [5, 4], [6]])) is None
    assert distinct_prompts(*padded([[3, 4], [3, 4]])).distinct == [[3, 4]]


STEPS = {  # settings, and by how much fewer tokens are read
    "plain": ({}, 1),
    "penalty": ({"beta": 0.2}, 1),
    "checkpointing": ({"gradient_checkpointing": True}, 1),
    "one token, drawn from the forward that is differentiated": ({"max_completion_length": 1, "temperature": 0.7}, 4),
}


@pytest.mark.parametrize("settings, times", STEPS.values(), ids=STEPS)
def test_a_step_of_the_trainer_is_the_one_that_reads_each_prompt_each_time(settings, times, tmp_path, monkeypatch):
    rows = [{"prompt": chat(text)} for text in ("say it", "why so")]
    steps = []
    for shared in (True, False):
        trainer = trainer_of(tmp_path, rows, uneven, num_generations=6, max_grad_norm=0.0, **settings)
        if not shared:
            monkeypatch.setattr(trainer, "_can_share", lambda *_: False)
            monkeypatch.setattr("peft_svf.training.reinforce.shared_prompts", lambda model: nullcontext())
        tokens = counted(trainer.model)
        trainer.train()
        steps.append((trainer.texts, trainer.gradients[0], sum(tokens)))
    (texts, gradient, read), (plain_texts, plain_gradient, plain_read) = steps
    assert texts == plain_texts and times * read < plain_read
    same(gradient, plain_gradient, 1e-5)


def test_members_of_a_population_share_what_their_rows_begin_with(tmp_path, monkeypatch):
    rows = [{"prompt": chat(text)} for text in ("say it", "say why so")]
    trainer = evolution_of(tmp_path, rows, uneven, population=4, svf=SVFConfig())
    size = sum(len(layer.svf_offset["default"].weight) for layer in pico.svf_layers(trainer.model).values())
    members = 0.3 * torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    tokens = counted(trainer.model)
    fitness = trainer._fitness(members, rows)
    read = sum(tokens)
    tokens.clear()
    monkeypatch.setattr("peft_svf.training.run.shared_prompts", lambda *_: nullcontext())
    assert torch.equal(fitness, trainer._fitness(members, rows))
    assert len(fitness.unique()) > 1 and read < sum(tokens)
