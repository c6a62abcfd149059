# SPDX-License-Identifier: Apache-2.0
"""Laws of the server: OpenAI's API, each request under its own mixture, and nothing else than what was asked."""

import asyncio

import pytest
import tiny_experts
from tiny_model import tiny_tokenizer

from peft_svf import Transformer2Model

app = pytest.importorskip("peft_svf.cli.serving.app")
httpx = pytest.importorskip("httpx")
from peft_svf.cli.serving.engine import Capacity, Engine  # noqa: E402
from peft_svf.cli.serving.gate import Rules  # noqa: E402

CAPACITY = Capacity(cache_tokens=2048, batch_tokens=64, concurrent=8, new_tokens=64)
KEY, ADMIN = "a-key", "an-admin-key"
RULES = Rules((KEY,), (ADMIN,), pending=12, body_bytes=10_000, seconds=30)
ASK = {"messages": [{"role": "user", "content": "What is 3 + 4?"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    tiny_experts.write_all(folder)
    return folder


def two_pass(folder):
    return Transformer2Model(tiny_experts.base(), tiny_tokenizer(), [folder / "math", folder / "code"])


@pytest.fixture(scope="module")
def gate(folder):
    built = app.build(Engine(two_pass(folder), CAPACITY), RULES, folder)
    yield built
    built.app.state.engine.stop()


@pytest.fixture(scope="module")
def reference(folder):
    return two_pass(folder)


def alone(reference, mixture, messages=ASK["messages"], new=8):
    inputs = reference.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = reference.generate(**inputs, mixture=mixture, max_new_tokens=new, do_sample=False)
    return reference.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(gate, *requests, key=KEY):
    """Send requests (method, path, body) at once; return their responses."""

    async def send():
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers) as client:
            calls = [client.request(method, path, json=body, timeout=60) for method, path, body in requests]
            return await asyncio.gather(*calls)

    return asyncio.run(send())


def chat(**changes):
    return "POST", "/v1/chat/completions", {**ASK, **changes}


def text(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_model_names_base_expert_or_mixture_and_fields_go_before_it(gate, reference):
    asked = {
        "base": ({"model": "base"}, {}),
        "name": ({"model": tiny_experts.BASE}, {}),
        "expert": ({"model": "math"}, {"math": 1.0}),
        "field": ({"model": "math", "expert": "code"}, {"code": 1.0}),
        "mixture": ({"model": "base", "mixture": {"math": 0.7, "code": 0.3}}, {"math": 0.7, "code": 0.3}),
    }
    responses = run(gate, *(chat(**fields) for fields, _ in asked.values()))
    for (fields, mixture), response in zip(asked.values(), responses, strict=True):
        assert text(response) == alone(reference, mixture)
        assert response.json()["dispatch"]["mixture"] == mixture and response.json()["model"] == fields["model"]
        assert response.headers["x-peft-svf-expert"] == response.json()["dispatch"]["choice"]
