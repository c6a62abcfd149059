# SPDX-License-Identifier: Apache-2.0
"""Laws of routing by keys in one pass: deciding in flight, by early exit and before the answer are the same."""

import pico
import pytest
import tiny_experts
import torch
from peft import get_peft_model
from tiny_model import tiny_tokenizer
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

from peft_svf import Expert, SVFConfig, Transformer2Model, two_pass
from peft_svf.adaptation import FirstPass
from peft_svf.adaptation.router import first_block
from peft_svf.experts.key import make_key

KINDS = ["llama", "gpt2", "gemma3_text"]
ASKED = {
    "digits": ["12 + 7 = 19", "3 * 14 = 42", "99 - 1 = 98", "5 / 2 = 2.5", "7 + 7 + 7 = 21", "1000 - 1 = 999"],
    "shouts": ["HELP ME NOW", "STOP THIS", "WHERE ARE YOU", "GO AWAY", "READ THE SIGN", "NOBODY KNOWS"],
}
TEXTS = (ASKED["digits"][1], ASKED["shouts"][2], "what a quiet day", ASKED["digits"][2])
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
CHOICES = ["digits", "shouts", "other", "digits"]
MORE = {"max_new_tokens": 6, "min_new_tokens": 6}


def base(kind="llama"):
    """A tiny model of four blocks with the tokenizer's vocabulary."""
    depth = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    config = pico.config(kind)
    config.vocab_size = len(tiny_tokenizer())
    setattr(config, depth, 4)
    setattr(config, "n_positions" if kind == "gpt2" else "max_position_embeddings", 128)
    if hasattr(config, "layer_types"):
        config.layer_types = (config.layer_types * 2)[:4]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config._name_or_path = model.name_or_path = f"tiny {kind}"
    return model


def experts(folder, kind="llama", layers=(1, 2, 3), pooling="both"):
    """Two experts that move some blocks, with keys of what they are for."""
    made = []
    for seed, (name, prompts) in enumerate(ASKED.items()):
        path = tiny_experts.write(folder, name, seed, base(kind), layers_to_transform=list(layers))
        key = make_key(base(kind), tiny_tokenizer(), prompts, block=1, pooling=pooling)
        made.append(Expert(name, (loaded := Expert.load(path)).offsets, loaded.config, key=key))
    return made


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Transformer2Model(base(request.param), tiny_tokenizer(), experts(folder, request.param))


def batch(model, chats=CHATS):
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "padding": True}
    return model.tokenizer.apply_chat_template(chats, **options)


@pytest.fixture
def passes(monkeypatch):
    """Counts the decisions that are made in flight and by a forward of their own."""
    counts = {"in flight": 0, "early exit": 0}

    def counting(name, run):
        def counted(*args, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        return counted

    monkeypatch.setattr(two_pass, "deciding", counting("in flight", two_pass.deciding))
    monkeypatch.setattr(two_pass, "key_scores", counting("early exit", two_pass.key_scores))
    return counts


WAYS = {
    "greedy": {"do_sample": False},
    "merged": {"do_sample": False, "max_new_tokens": 33},
    "beams": {"num_beams": 3, "do_sample": False},
    "returned sequences": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},  # can't be decided in flight
}


@pytest.mark.parametrize("way", WAYS)
def test_in_flight_early_exit_and_two_passes_agree(model, way, passes, monkeypatch):
    inputs, settings, outputs, records = batch(model), {**MORE, **WAYS[way]}, [], []
    for ahead in (False, True):
        with monkeypatch.context() as patch:
            if ahead:
                patch.setattr(two_pass, "can_decide", lambda *_: False)
            torch.manual_seed(3)
            output, mixtures = model.generate(**inputs, **settings, return_dispatch=True)
        outputs.append(output)
        records.append([mixture.record() for mixture in mixtures])
    mixtures = model.first_pass(CHATS)
    torch.manual_seed(3)
    outputs.append(model.generate(**inputs, **settings, mixture=mixtures))
    if not settings["do_sample"]:
        outputs.append(model.generate(**inputs, **settings, expert=CHOICES))
    in_flight = int(way != "chunked prefill")
    assert passes == {"in flight": in_flight, "early exit": 2 - in_flight}
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert [record["choice"] for record in records[0]] == [m.choice for m in mixtures] == CHOICES
    for mine, theirs in zip(*records, strict=True):
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


@pytest.mark.parametrize("helper", ["assistant", "prompt look-up"])
def test_assisted_decoding_is_decided_before_and_agrees(model, helper, passes):
    inputs, greedy = batch(model, CHATS[:1]), {**MORE, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    assert passes["in flight"] == 1
    drafts = {"assistant_model": base()} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    output, (mixture,) = model.generate(**inputs, **greedy, **drafts, return_dispatch=True)
    assert torch.equal(output, expected) and mixture.choice == CHOICES[0]
    assert passes == {"in flight": 1, "early exit": 1}


def test_a_row_gets_what_it_gets_alone(model):
    greedy = {**MORE, "do_sample": False}
    together = model.generate(**batch(model), **greedy)[:, -6:]
    for row, chat in zip(together, CHATS, strict=True):
        assert torch.equal(model.generate(**batch(model, [chat]), **greedy)[0, -6:], row)


def test_a_stream_is_the_same_and_the_choice_comes_first(model):
    inputs, greedy = batch(model, CHATS[:1]), {**MORE, "do_sample": False}
    events = []

    class Streamer(TextIteratorStreamer):
        def on_finalized_text(self, text, stream_end=False):
            events.append(text)

    streamer = Streamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **inputs, **greedy, streamer=streamer, on_dispatch=lambda chosen: events.append(chosen[0].choice)
    )
    text = model.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert events[0] == "digits" and "".join(events[1:]) == text


def test_a_compiled_model_decides_before(tmp_path, passes):
    model = Transformer2Model(base(), tiny_tokenizer(), experts(tmp_path))
    expected = model.generate(**batch(model), **MORE, do_sample=False)
    model.get_base_model().compile(backend="eager")
    output, again = model.generate(**batch(model), **MORE, do_sample=False, return_dispatch=True)
    assert torch.equal(output, expected) and [m.choice for m in again] == CHOICES
    assert passes == {"in flight": 1, "early exit": 1}


def test_experts_of_lower_blocks_are_decided_before(tmp_path, passes):
    model = Transformer2Model(base(), tiny_tokenizer(), experts(tmp_path, layers=(0, 2)))
    assert first_block(model.library) == 0
    output, mixtures = model.generate(**batch(model), **MORE, do_sample=False, return_dispatch=True)
    assert [m.choice for m in mixtures] == CHOICES and passes == {"in flight": 0, "early exit": 1}
    assert torch.equal(output, model.generate(**batch(model), **MORE, do_sample=False, mixture=mixtures))


def test_an_expert_that_moves_another_weight_than_the_blocks_is_decided_before():
    model = get_peft_model(base("gpt2"), SVFConfig(task_type="CAUSAL_LM", target_modules=["mlp.c_fc"]))
    library = Transformer2Model(model, tiny_tokenizer()).library
    assert first_block(library) == 0
    offset = library.expert("default").offsets["transformer.h.0.mlp.c_fc"]
    library._experts["default"] = Expert("default", {"transformer.wte_projection": offset})
    assert first_block(library) == -1


def test_ids_without_a_template_are_read_as_a_users_turn(model, passes):
    plain = [chat[0]["content"] for chat in CHATS]
    ids = model.tokenizer(plain, return_tensors="pt", padding=True)
    _, mixtures = model.generate(**ids, **MORE, do_sample=False, return_dispatch=True)
    assert [m.choice for m in mixtures] == [m.choice for m in model.first_pass(plain)] == CHOICES
    assert passes == {"in flight": 0, "early exit": 1}


def test_a_chat_of_several_turns_is_decided_by_the_last_one(model, passes):
    before = [{"role": "user", "content": TEXTS[1]}, {"role": "assistant", "content": "NO"}]
    whole = [[{"role": "system", "content": "Be brief."}, *before, *chat] for chat in CHATS]
    last = [[chat[0], *chat[3:]] for chat in whole]
    settings = {**MORE, "do_sample": False, "return_dispatch": True}
    output, mixtures = model.generate(**batch(model, whole), **settings)
    expected = [mixture.record() for mixture in model.first_pass(last)]
    assert [mixture.record() for mixture in mixtures] == expected
    assert [mixture.record() for mixture in model.first_pass(whole)] == expected
    assert torch.equal(output, model.generate(**batch(model, whole), **MORE, do_sample=False, mixture=mixtures))
    assert passes == {"in flight": 0, "early exit": 1}  # beside a chat, rows with one turn are read ahead as well
    model.generate(**batch(model, last), **settings)
    assert passes["in flight"] == 1


def test_the_pipeline_decides_in_flight_and_records_it(model, passes):
    pipe = pipeline("transformer2", model=model, batch_size=4)
    outputs = pipe(CHATS, **MORE, do_sample=False, return_dispatch=True)
    assert [output[0]["dispatch"]["choice"] for output in outputs] == CHOICES
    assert passes == {"in flight": 1, "early exit": 0}


def test_choices_are_answered_by_the_expert_that_is_chosen_in_flight(model, passes):
    pipe, words = pipeline("transformer2", model=model, batch_size=4), ["7", "no", "GO"]
    for prompts in (CHATS, [[{"role": "system", "content": "Be brief."}, *chat] for chat in CHATS]):
        written = pipe(prompts, **MORE, do_sample=False, return_dispatch=True)
        chosen = pipe(prompts, choices=words, return_dispatch=True)
        for (one,), (other,) in zip(written, chosen, strict=True):
            assert one["dispatch"]["choice"] == other["dispatch"]["choice"]
            assert one["dispatch"]["probabilities"] == pytest.approx(other["dispatch"]["probabilities"], abs=1e-4)
    assert passes == {"in flight": 2, "early exit": 2}


def test_after_an_exception_the_model_is_the_base_model(model):
    inputs = batch(model)
    before = model(**inputs).logits

    def stop(chosen):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **MORE, on_dispatch=stop)
    assert torch.equal(model(**inputs).logits, before)
    assert not any(block._forward_pre_hooks for block in model.get_base_model().modules())


def test_settings_of_the_first_pass_hold_in_flight(model, passes):
    threshold = FirstPass("key", threshold=1.1)
    _, base_only = model.generate(**batch(model), **MORE, first_pass=threshold, return_dispatch=True)
    assert all(mixture.alpha == {} for mixture in base_only)
    _, soft = model.generate(**batch(model), **MORE, first_pass=FirstPass("key", soft=True), return_dispatch=True)
    assert all(0 < sum(mixture.alpha.values()) < 1 for mixture in soft)
    assert passes["in flight"] == 2
