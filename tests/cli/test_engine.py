# SPDX-License-Identifier: Apache-2.0
"""Laws of the server's engine: each request of a running batch is answered as `generate` answers it alone."""

import asyncio
import copy

import pytest
import tiny_experts
from tiny_model import tiny_tokenizer

from peft_svf import Mixture, Transformer2Model

engine = pytest.importorskip("peft_svf.cli.serving.engine")
Capacity, Engine, Request = engine.Capacity, engine.Engine, engine.Request

SMALL = Capacity(cache_tokens=2048, batch_tokens=16, concurrent=8, new_tokens=64)
MIXTURES = [{}, {"math": 1.0}, {"code": 1.0}, {"math": 0.7, "code": 0.3}, {"code": 0.5}, {"math": -0.5}]
TEXT = "What is 3 + 4? "


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_experts.write_all(tmp_path_factory.mktemp("experts"))


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
        return "".join(parts), request.new_tokens
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


def test_long_prompts_are_read_in_parts_while_others_write(served, reference):
    jobs = [(TEXT * (1 + 3 * i), MIXTURES[i], 4 + 3 * i) for i in range(len(MIXTURES))]

    async def one_after_another():
        tasks = []
        for job in jobs:
            tasks.append(asyncio.create_task(ask(served, *job)))
            await asyncio.sleep(0.02)
        return await asyncio.gather(*tasks)

    assert asyncio.run(one_after_another()) == [alone(reference, *job) for job in jobs]
