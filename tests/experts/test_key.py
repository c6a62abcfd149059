# SPDX-License-Identifier: Apache-2.0
"""Laws of routing keys: what they hold, that they survive files, and which are refused."""

from dataclasses import replace

import pico
import pytest
import seeing
import tiny_experts
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from tiny_model import tiny_tokenizer

from peft_svf import Expert, SVFConfig
from peft_svf.experts.hub import expert_card
from peft_svf.experts.key import ANCHOR, KEY_NAME, RoutingKey, blocks_of, early_exit, key_ids, make_key, read_states

PROMPTS = ["2 + 2 =", "3 * 14 =", "a", "sort a list of words", "7 - 5 = "]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]


def inputs(model, prompts=PROMPTS):
    ids = [tiny_tokenizer()(text).input_ids for text in prompts]
    width, limit = max(map(len, ids)), model.config.vocab_size
    rows = torch.tensor([[0] * (width - len(row)) + row for row in ids]) % limit
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return rows, mask


@pytest.mark.parametrize("pooling", ["both", "mean", "last"])
@pytest.mark.parametrize("kind", pico.CAUSAL)
def test_early_exit_reads_the_hidden_state_of_transformers(kind, pooling):
    model = pico.build(kind)
    ids, mask = inputs(model)
    pooled = early_exit(model, ids, mask, 1, pooling)
    for row in range(len(ids)):
        alone = ids[row : row + 1, mask[row] == 1]
        hidden = model(alone, output_hidden_states=True).hidden_states[1][0]
        states = {"mean": hidden.mean(0), "last": hidden[-1], "both": torch.cat([hidden.mean(0), hidden[-1]])}
        assert torch.allclose(pooled[row], states[pooling], atol=1e-5), row


def test_blocks_from_the_key_on_do_not_run():
    model, ran = tiny_experts.base(), []
    for number, block in enumerate(blocks_of(model)):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    early_exit(model, *inputs(model), 1, "mean")
    assert ran == [0]
    assert len(blocks_of(model)[1]._forward_pre_hooks) == 0


def test_batches_and_order_change_nothing():
    model, ids = tiny_experts.base(), key_ids(tiny_tokenizer(), CHATS)
    whole = read_states(model, ids, 1)
    assert torch.allclose(read_states(model, ids[::-1], 1, batch_size=2).flip(0), whole, atol=1e-5)


def test_a_text_is_read_as_a_users_turn():
    tokenizer = tiny_tokenizer()
    assert key_ids(tokenizer, PROMPTS) == key_ids(tokenizer, CHATS)
    tokenizer.chat_template = None
    assert key_ids(tokenizer, PROMPTS) == [tokenizer(text.strip()).input_ids for text in PROMPTS]


TEMPLATES = {
    "its own": None,
    "without a system's turn": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    "with a preamble": "{{ '<s>system\nBe brief.<end>\n' }}{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_of_several_turns_is_read_as_its_last_one(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    system = [{"role": "system", "content": "Be kind."}] if "without" not in template else []
    for chat in CHATS:
        assert key_ids(tokenizer, [[*system, *turns, *chat]]) == key_ids(tokenizer, [[*system, *chat]])
        assert key_ids(tokenizer, [turns[:3]]) == key_ids(tokenizer, ["c"]) != key_ids(tokenizer, ["a"])


def test_a_compiled_model_reads_the_same():
    model, ids = tiny_experts.base(), inputs(tiny_experts.base())
    expected = early_exit(model, *ids, 1, "mean")
    model.compile(backend="eager")
    assert torch.equal(early_exit(model, *ids, 1, "mean"), expected)


def test_a_key_is_the_base_models_whatever_adapter_is_active():
    expected = make_key(tiny_experts.base(), tiny_tokenizer(), CHATS)
    model = get_peft_model(tiny_experts.base(), SVFConfig(task_type="CAUSAL_LM"))
    pico.randomize(model, seed=1)
    model.train()
    made = make_key(model, tiny_tokenizer(), CHATS)
    assert torch.equal(made.states, expected.states) and torch.equal(made.anchor, expected.anchor)
    assert model.training


def test_a_key_draws_by_its_seed_and_skips_images():
    model, reader = seeing.model(), seeing.processor()
    plain = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in PROMPTS]
    seen = [seeing.asks(0, text) for text in PROMPTS]
    keys = [make_key(model, reader, prompts, limit=3, seed=4) for prompts in (plain, seen)]
    assert torch.equal(keys[0].states, keys[1].states) and keys[0].states.shape == (3, 48)
    assert not torch.equal(make_key(model, reader, plain, limit=3, seed=5).states, keys[0].states)


def test_save_then_load_is_exact(tmp_path):
    folder = tiny_experts.write(tmp_path, "math", seed=2)
    assert Expert.load(folder).key is None
    key = make_key(tiny_experts.base(), tiny_tokenizer(), CHATS)
    replace(Expert.load(folder), key=key).save(tmp_path / "keyed")
    loaded = Expert.load(tmp_path / "keyed", lazy=True)
    assert loaded.key is not None and loaded.key.how == (1, "both")
    assert torch.equal(loaded.key.states, key.states) and loaded.key.states.dtype == torch.float16
    card = str(expert_card(tmp_path / "keyed", base_model="me/base"))
    assert "first 1 blocks make of 5 prompts" in card and "routing key" not in str(
        expert_card(folder, base_model="me/b")
    )
    replace(loaded, key=None).save(tmp_path / "keyed")  # the z of one expert and the key of another would lie together
    assert Expert.load(tmp_path / "keyed").key is None


def test_a_key_fits_the_base_that_made_it_and_its_rounded_copy():
    key, anchor = make_key(tiny_experts.base(), tiny_tokenizer(), CHATS), key_ids(tiny_tokenizer(), [ANCHOR])
    for model in (tiny_experts.base(), tiny_experts.base(dtype=torch.bfloat16)):
        key.check(read_states(model, anchor, 1)[0])
    for other in (read_states(tiny_experts.base(seed=1), anchor, 1)[0], torch.ones(5)):
        with pytest.raises(ValueError, match="another base model or chat template"):
            key.check(other)


GOOD = {"states": torch.ones(2, 3).half(), "anchor": torch.ones(3).half()}
FACTS = {"block": "1", "pooling": "mean"}
DAMAGED = {
    "nan": ({**GOOD, "states": torch.full((2, 3), torch.nan)}, FACTS, "not finite"),
    "infinite": ({**GOOD, "anchor": torch.full((3,), torch.inf)}, FACTS, "not finite"),
    "beyond float16": ({**GOOD, "states": torch.full((2, 3), 1e6)}, FACTS, "not finite"),
    "empty": ({**GOOD, "states": torch.ones(0, 3)}, FACTS, "states"),
    "flat": ({**GOOD, "states": torch.ones(3)}, FACTS, "states"),
    "another width": ({**GOOD, "anchor": torch.ones(4)}, FACTS, "states"),
    "no anchor": ({"states": GOOD["states"]}, FACTS, "anchor"),
    "no facts": (GOOD, None, "block"),
    "no number": (GOOD, {**FACTS, "block": "one"}, "one"),
    "block 0": (GOOD, {**FACTS, "block": "0"}, "block"),
    "pooling": (GOOD, {**FACTS, "pooling": "max"}, "max"),
}


def test_a_damaged_key_is_refused_by_the_name_of_its_expert(tmp_path):
    folder = tiny_experts.write(tmp_path, "math", seed=2)
    for tensors, facts, message in DAMAGED.values():
        save_file(tensors, folder / KEY_NAME, facts)
        with pytest.raises(ValueError, match=f"Expert 'math'.*{message}"):
            Expert.load(folder)
    for content, message in ((RoutingKey(**GOOD, block=1).to_bytes()[:-3], "damaged"), (bytes(33 << 20), "more than")):
        (folder / KEY_NAME).write_bytes(content)
        with pytest.raises(ValueError, match=f"Expert 'math'.*{KEY_NAME} .*{message}"):
            Expert.load(folder)


@pytest.mark.parametrize(
    ("kind", "prompts", "block", "message"),
    [
        ("llama", [], None, "needs prompts"),
        ("llama", ["a"], 2, "1 to 1 blocks"),
        ("t5", ["a"], None, "no stack of blocks"),
        ("bert", ["a"], 7, "1 to 1 blocks"),
    ],
)
def test_what_no_key_can_be_made_of_is_refused(kind, prompts, block, message):
    with pytest.raises(ValueError, match=message):
        make_key(pico.build(kind), tiny_tokenizer(), prompts, block=block)
