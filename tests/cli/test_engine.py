# SPDX-License-Identifier: Apache-2.0
"""Laws of the server's engine: each request of a running batch is answered as `generate` answers it alone."""

import asyncio
import copy
from types import SimpleNamespace

import pytest
import tiny_experts
import torch
from tiny_model import tiny_tokenizer

from peft_svf import Expert, Mixture, Transformer2Model

engine = pytest.importorskip("peft_svf.cli.serving.engine")
Capacity, Engine, Request = engine.Capacity, engine.Engine, engine.Request

SMALL = Capacity(cache_tokens=2048, batch_tokens=16, concurrent=8, new_tokens=64)
MIXTURES = [{}, {"math": 1.0}, {"code": 1.0}, {"math": 0.7, "code": 0.3}, {"code": 0.5}, {"math": -0.5}]
TEXT = "What is 3 + 4? "


def two_pass(folders, names=("math", "code")):
    return Transformer2Model(tiny_experts.base(), tiny_tokenizer(), [folders[name] for name in names])


@pytest.fixture(scope="module")
def served(folders):
    running = Engine(two_pass(folders), SMALL)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def reference(folders):
    """A model of its own, since the served one belongs to its batch."""
    return two_pass(folders)


async def ask(served, text, mixture, new=8, streaming=False, **settings):
    """Ask the engine as a handler does; return text and token ids."""
    request = Request(Mixture(mixture), max_new_tokens=new, seed=settings.pop("seed", None))
    request.stop = settings.pop("stop", ())
    request.offsets = served.offsets(request.mixture)
    token = engine.REQUEST.set(request)
    config = copy.deepcopy(served.base.generation_config)
    config.update(do_sample=False, **settings)
    call = (served.base, served.model.tokenizer, served.model.tokenizer(text), config, f"{id(request)}")
    try:
        if not streaming:
            answer, _, ids = await served.generate_non_streaming(*call)
            return answer, ids
        queue, _ = served.generate_streaming(*call)
        parts = []
        while (part := await queue.get()) is not None:
            parts.append(part)
        return "".join(parts), list(request.tokens)
    finally:
        engine.REQUEST.reset(token)


def alone(reference, text, mixture, new=8, **settings):
    inputs = reference.tokenizer(text, return_tensors="pt")
    settings = {"max_new_tokens": new, "do_sample": False} | settings
    ids = reference.generate(**inputs, mixture=mixture, **settings)[0, inputs.input_ids.shape[1] :]
    return reference.tokenizer.decode(ids, skip_special_tokens=True), ids.tolist()


def test_equal_prompts_with_different_mixtures_are_answered_as_alone(served, reference):
    async def all_at_once():
        return await asyncio.gather(*(ask(served, TEXT * 4, mixture) for mixture in MIXTURES))

    answers = asyncio.run(all_at_once())
    assert answers == [alone(reference, TEXT * 4, mixture) for mixture in MIXTURES]
    assert len({text for text, _ in answers}) > 3


def test_a_mixture_that_is_alone_for_long_is_merged_until_another_comes(served, reference, monkeypatch):
    monkeypatch.setattr(engine, "MERGE_AT", 8)
    layers = served.model.library.layers().values()

    def copies():
        return {(layer.svf_merged is not None, layer.svf_factored is not None) for layer in layers}

    assert asyncio.run(ask(served, TEXT, MIXTURES[3], 16)) == alone(reference, TEXT, MIXTURES[3], 16)
    assert copies() == {(True, False)}

    async def two():
        return await asyncio.gather(*(ask(served, TEXT, mixture) for mixture in MIXTURES[1:3]))

    assert asyncio.run(two()) == [alone(reference, TEXT, mixture) for mixture in MIXTURES[1:3]]
    assert copies() == {(False, True)}  # never both: there is room for one


def test_long_prompts_are_read_in_parts_while_others_write(served, reference):
    jobs = [(TEXT * (1 + 3 * i), MIXTURES[i], 4 + 3 * i) for i in range(len(MIXTURES))]

    async def one_after_another():
        tasks = []
        for job in jobs:
            tasks.append(asyncio.create_task(ask(served, *job)))
            await asyncio.sleep(0.02)
        return await asyncio.gather(*tasks)

    assert asyncio.run(one_after_another()) == [alone(reference, *job) for job in jobs]


def test_requests_that_take_turns_in_a_small_cache_are_answered_as_alone(folders, reference):
    tight = Engine(two_pass(folders), Capacity(cache_tokens=512, batch_tokens=64, concurrent=8, new_tokens=64))
    try:

        async def all_at_once():
            return await asyncio.gather(*(ask(tight, TEXT * 14, m, 50, True) for m in MIXTURES))

        answers = asyncio.run(all_at_once())
        expected = [alone(reference, TEXT * 14, mixture, 50) for mixture in MIXTURES]
        assert [text for text, _ in answers] == [text for text, _ in expected]
    finally:
        tight.stop()


def test_settings_of_a_request_are_those_of_generate(served, reference):
    settings = [{}, {"repetition_penalty": 1.5}, {"sequence_bias": {(20,): 8.0}}, {"temperature": 0.01, "top_k": 1}]

    async def all_at_once():
        return await asyncio.gather(*(ask(served, TEXT, {"math": 1.0}, 16, **each) for each in settings))

    answers = asyncio.run(all_at_once())
    assert answers == [alone(reference, TEXT, {"math": 1.0}, 16, **each) for each in settings]
    assert len({text for text, _ in answers}) >= 3


def test_draws_follow_the_softmax_of_the_scores():
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = engine._Sampler()
    job = engine.Job({}, [], True, torch.Generator().manual_seed(0), torch.zeros(1, 2))
    state = SimpleNamespace(logit_processor_kwargs={"job": job}, initial_tokens=[1], generated_tokens=[])
    sampler.states = [state] * 4000
    drawn = sampler(scores.repeat(4000, 1), None).argmax(-1).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, scores.softmax(-1), atol=0.03)


def test_a_prompt_must_leave_room(served):
    for text, new, message in [("x" * 511, 2, "at most 1, not 2"), ("x", 65, "at most 64, not 65")]:
        with pytest.raises(ValueError, match=message):
            asyncio.run(ask(served, text, {}, new))


def test_a_prompt_that_the_first_pass_cannot_read_fails_alone(served, monkeypatch):
    choose = served.model.first_pass

    def first_pass(prompts):
        if "bad" in prompts:
            raise ValueError("It's bad.")
        return choose(prompts)

    monkeypatch.setattr(served.model, "first_pass", first_pass)

    async def all_at_once():
        return await asyncio.gather(*(served.choose(text) for text in ("def", "bad", "3 + 4")), return_exceptions=True)

    one, bad, other = asyncio.run(all_at_once())
    assert isinstance(bad, ValueError) and [one, other] == choose(["def", "3 + 4"])


def test_an_expert_of_the_output_head_is_refused(served):
    offsets = {"lm_head": torch.full((tiny_experts.base().config.hidden_size,), 0.1)}
    with pytest.raises(ValueError, match="lm_head"):
        served.add(Expert("head", offsets, {"peft_type": "SVF", "task_type": "CAUSAL_LM"}))
    assert served.model.library.names == ["code", "math"]
    assert asyncio.run(ask(served, TEXT, {"math": 1.0}))[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [("one two", ["one two"]), ("one.\nQ: two", ["one.\nQ", ": two"]), ("Q:", ["Q", ":"]), ("a\n\nb", ["a\n", "\nb"])],
)
def test_a_stream_never_shows_the_beginning_of_a_stop(text, parts):
    queue = engine.Stops(("\nQ:", "\n\n"))
    for part in [*parts, None]:
        queue.put_nowait(part)
    shown = [queue.get_nowait() for _ in range(queue.qsize())]
    assert shown.pop() is None and "".join(shown) == engine.cut(text, queue.stops)


def test_an_expert_of_higher_rank_may_come_while_others_write(tmp_path, folders, reference):
    thin = tiny_experts.write(tmp_path, "thin", seed=7, rank=4)
    running = Engine(Transformer2Model(tiny_experts.base(), tiny_tokenizer(), [thin]), SMALL)
    expected = alone(Transformer2Model(tiny_experts.base(), tiny_tokenizer(), [thin]), TEXT, {"thin": 1.0}, 48)

    async def meanwhile():
        answers = [asyncio.create_task(ask(running, TEXT, mixture, 48)) for mixture in ({"thin": 1.0}, {})]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(running.add, folders["math"])
        return await asyncio.gather(*answers, ask(running, TEXT, {"math": 1.0}))

    try:
        one, other, new = asyncio.run(meanwhile())
    finally:
        running.stop()
    assert one == expected and other == alone(reference, TEXT, {}, 48) and new == alone(reference, TEXT, {"math": 1.0})
