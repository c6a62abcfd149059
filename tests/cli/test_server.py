# SPDX-License-Identifier: Apache-2.0
"""Laws of the server: OpenAI's API, each request under its own mixture, and nothing else than what was asked."""

import asyncio
import base64
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import get_type_hints

import pytest
import seeing
import tiny_experts
import transformers
from command_line import run as command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer
from trainers import ROOT

from peft_svf import Mixture, Transformer2Model

app = pytest.importorskip("peft_svf.cli.serving.app")
httpx = pytest.importorskip("httpx")
from peft_svf.cli.serving.engine import Capacity, Engine  # noqa: E402
from peft_svf.cli.serving.gate import Gate, Rules  # noqa: E402

CAPACITY = Capacity(cache_tokens=2048, batch_tokens=64, concurrent=8, new_tokens=64)
KEY, ADMIN = "a-key", "an-admin-key"
RULES = Rules((KEY,), (ADMIN,), pending=40, body_bytes=10_000, seconds=30)
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


def client(gate, key=KEY):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(gate, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers, timeout=60)


def run(gate, *requests, key=KEY):
    """Send requests (method, path, body) at once; return their responses."""

    async def send():
        async with client(gate, key) as sender:
            return await asyncio.gather(*(sender.request(method, path, json=body) for method, path, body in requests))

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


def test_auto_is_what_the_first_pass_chooses(gate, reference):
    questions = ["What is 3 + 4?", "def f(x):", "Tell me a story.", "print(1)"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    responses = run(gate, *(chat(model="auto", messages=messages) for messages in chats))
    for messages, response, mixture in zip(chats, responses, reference.first_pass(chats), strict=True):
        dispatch = response.json()["dispatch"]
        assert dispatch["mixture"] == mixture.alpha and dispatch["choice"] == mixture.choice
        assert dispatch["probabilities"] == pytest.approx(mixture.probabilities, abs=1e-3)
        assert text(response) == alone(reference, mixture, messages)


def test_each_road_gives_the_same_answer(gate, reference):
    prompt = reference.tokenizer.apply_chat_template(ASK["messages"], add_generation_prompt=True, tokenize=False)
    common = {"model": "math", "temperature": 0}
    written = {**common, "prompt": prompt, "max_tokens": 8}
    asked = {**common, "input": "What is 3 + 4?", "max_output_tokens": 8}
    whole, streamed, completion, events, response, stream = run(
        gate,
        chat(model="math"),
        chat(model="math", stream=True),
        ("POST", "/v1/completions", written),
        ("POST", "/v1/completions", {**written, "stream": True}),
        ("POST", "/v1/responses", {**asked, "stream": False}),
        ("POST", "/v1/responses", {**asked, "stream": True}),
    )
    expected = alone(reference, "math")
    chunks, pieces = objects(streamed), objects(events)
    assert text(whole) == expected
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert completion.json()["choices"][0]["text"] == expected
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
    assert response.json()["output"][0]["content"][0]["text"] == expected
    assert objects(stream)[-1]["response"]["output"][0]["content"][0]["text"] == expected
    for first in (chunks[0], pieces[0], objects(stream)[0], completion.json(), response.json()):
        assert first["dispatch"] == whole.json()["dispatch"]
    assert chunks[-1]["usage"] == whole.json()["usage"] and streamed.text.endswith("data: [DONE]\n\n")


def objects(response):
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_an_answer_ends_before_a_stop_text(gate, reference):
    expected = alone(reference, "math", new=24)
    stop = expected[9:11]
    end = expected[: expected.index(stop)]
    whole, streamed = run(
        gate,
        chat(model="math", max_tokens=24, stop=stop),
        chat(model="math", max_tokens=24, stop=[stop, "never"], stream=True),
    )
    assert text(whole) == end and whole.json()["choices"][0]["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in objects(streamed)) == end


def test_a_seed_repeats_an_answer_beside_any_others(gate):
    drawn = {"model": "math", "temperature": 1.5, "max_tokens": 16}
    (one,) = run(gate, chat(**drawn, seed=7))
    others = run(gate, chat(model="base"), chat(**drawn, seed=7), chat(**drawn, seed=8), chat(**drawn), chat(**drawn))
    answers = [text(response) for response in others]
    assert answers[1] == text(one) and len({*answers[1:]}) == 4


def test_models_health_and_metrics(gate):
    paths = ("/v1/models", "/v1/models/math", "/v1/models/physics", "/health", "/metrics")
    listed, one, missing, health, metrics = run(gate, *(("GET", path, None) for path in paths))
    assert [entry["id"] for entry in listed.json()["data"]] == ["auto", tiny_experts.BASE, "code", "math"]
    assert one.json()["description"] == "about math" and health.json() == {"status": "ok"}
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    line = 'peft_svf_requests_total{expert="math",path="/v1/chat/completions",status="200"}'
    assert line in metrics.text and "peft_svf_first_token_seconds_bucket" in metrics.text


WRONG = {  # changes of a request -> part of the message
    "no messages": ({"messages": []}, "'messages'"),
    "messages of texts": ({"messages": ["hello"]}, "'messages.0'"),
    "content of numbers": ({"messages": [{"role": "user", "content": 3}]}, ""),
    "unknown field": ({"wishes": 3}, "'wishes' isn't supported"),
    "a config of transformers": ({"generation_config": '{"num_beams": 9}'}, "'generation_config' isn't supported"),
    "several answers": ({"n": 2}, "'n' isn't supported"),
    "a forced tool": ({"tool_choice": "required"}, "'tool_choice' isn't supported"),
    "hot": ({"temperature": 9}, "'temperature': Input should be less than or equal to 2"),
    "not finite": ({"top_p": "0.5"}, "'top_p': Input should be a valid number"),
    "no tokens": ({"max_tokens": 0}, "'max_tokens': Input should be greater than or equal to 1"),
    "true tokens": ({"max_tokens": True}, "'max_tokens'"),
    "too many tokens": ({"max_tokens": 65}, "at most 64, not 65"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 600}]}, "at most 0"),
    "stops": ({"stop": ["a"] * 5}, "'stop"),
    "a template": ({"chat_template_kwargs": {"chat_template": "x"}}, "can't set 'chat_template'"),
    "a bias for no token": ({"logit_bias": {"9999": 1.0}}, ""),
    "unknown expert": ({"expert": "physics"}, "There is no expert 'physics'"),
    "unknown weight": ({"mixture": {"physics": 1}}, "There is no expert 'physics'"),
    "no weight": ({"mixture": {"math": "much"}}, "math"),
    "both": ({"mixture": {"math": 1}, "expert": "code"}, "not both"),
    "a list of experts": ({"expert": ["math"]}, "'expert': Input should be a valid string"),
}


def test_what_is_wrong_is_refused_in_openais_form(gate):
    responses = run(gate, *(chat(**changes) for changes, _ in WRONG.values()))
    for (name, (_, message)), response in zip(WRONG.items(), responses, strict=True):
        error = response.json()["error"]
        assert response.status_code == 400 and error["type"] == "invalid_request_error", (name, response.text)
        assert message in error["message"] and error["message"], (name, error)


def test_without_a_key_only_health_answers(gate):
    paths = [("GET", "/v1/models", None), ("GET", "/metrics", None), chat(), ("GET", "/nowhere", None)]
    for key in ("", "another", KEY[:-1], KEY + "x"):
        *closed, health = run(gate, *paths, ("GET", "/health", None), key=key)
        assert [response.status_code for response in closed] == [401] * 4 and health.status_code == 200
    # those that would load or drop models are gone
    for response in run(
        gate, *(("POST", path, {"model": "x"}) for path in ("/load_model", "/reset", "/v1/systemone"))
    ):
        assert response.status_code == 404 and response.json()["error"]["message"] == "Not Found"


def behind(gate, **rules):
    """The same application behind other rules."""
    return Gate(gate.app, Rules((KEY,), (ADMIN,), **rules), gate.metrics)


def test_too_many_requests_are_refused_with_retry_after_and_large_bodies_at_all(gate):
    responses = run(behind(gate, pending=2), *(chat(model="math") for _ in range(5)))
    assert sorted(response.status_code for response in responses) == [200, 200, 429, 429, 429]
    busy = next(response for response in responses if response.status_code == 429)
    assert int(busy.headers["retry-after"]) >= 1 and busy.json()["error"]["type"] == "rate_limit_error"
    (response,) = run(behind(gate, body_bytes=1000), chat(messages=[{"role": "user", "content": "x" * 1000}]))
    assert response.status_code == 413


def slots(gate):
    """Requests that the batch holds."""
    scheduler = gate.app.state.engine.batch.batch_processor.scheduler
    return len(scheduler.active_requests) + len(scheduler.waiting_requests)


async def soon(condition):
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("It didn't happen within 10 seconds.")


@pytest.fixture
def slow(gate, monkeypatch):
    """Steps of the batch that take long, so that requests are still running when something happens to them."""
    kind, steps = type(gate.app.state.engine.batch), []
    step = kind._generation_step
    monkeypatch.setattr(kind, "_generation_step", lambda batch: (time.sleep(0.05), steps.append(0), step(batch)))
    return steps


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up_for_a_request_that_takes_too_long(gate, slow, stream):
    (response,) = run(behind(gate, seconds=0.5), chat(model="math", max_tokens=64, stream=stream))
    if stream:
        assert objects(response)[-1]["error"]["message"] == "The answer took too long."
    else:
        assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
    asyncio.run(soon(lambda: not slots(gate)))


async def leave(gate, request, seconds):
    """Send a request, and leave after a while; return the messages that were sent until then."""
    _, path, body = request
    start = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": headers, "scheme": "http", "root_path": "", "asgi": {"version": "3.0"}}
    sent = []

    async def receive():
        if start:
            return start.pop()
        await asyncio.sleep(seconds)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await gate(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_a_slot_within_two_steps(gate, slow, stream):
    async def leaving():
        request = chat(model="math", max_tokens=64, stream=stream)
        sent = asyncio.create_task(leave(gate, request, 0.4))
        await soon(lambda: slots(gate) == 1)
        return await sent, len(slow)

    sent, before = asyncio.run(leaving())
    assert not any(message.get("body") and not message["more_body"] for message in sent)
    asyncio.run(soon(lambda: not slots(gate)))
    assert len(slow) <= before + 2  # steps
    assert gate.pending == 0 and not gate.app.state.engine.batch.output_router.result_handlers


def test_experts_come_and_go_under_load(gate, reference, folder):
    expected = {name: alone(reference, name, new=24) for name in ("math", "code")}
    admin = run(gate, ("POST", "/v1/experts", {"source": "kinds"}), key=KEY)[0]
    assert admin.status_code == 403

    async def ask(name):
        async with client(gate) as sender:
            for _ in range(4):
                response = await sender.post("/v1/chat/completions", json=chat(model=name, max_tokens=24)[2])
                assert text(response) == expected[name]

    async def change():
        async with client(gate, ADMIN) as sender:
            for _ in range(3):
                added = await sender.post("/v1/experts", json={"source": "kinds", "name": "third"})
                assert added.status_code == 200 and "third" in [entry["id"] for entry in added.json()["data"]]
                answer = await sender.post("/v1/chat/completions", json=chat(model="third")[2])
                assert answer.status_code == 200
                assert (await sender.delete("/v1/experts/third")).status_code == 200
                gone = await sender.post("/v1/chat/completions", json=chat(model="third")[2])
                assert gone.status_code == 404

    async def all_at_once():
        await asyncio.gather(ask("math"), ask("code"), change())

    asyncio.run(all_at_once())


def test_a_name_never_becomes_a_path(gate, folder):
    (folder.parent / "outside").mkdir(exist_ok=True)
    wrong = ["../outside", str(folder / "kinds"), ".", "..", "kinds/../kinds", "", "kinds/", None, 3, ["kinds"]]
    responses = run(gate, *(("POST", "/v1/experts", {"source": source}) for source in wrong), key=ADMIN)
    assert [response.status_code for response in responses] == [400] * len(wrong)
    add, remove = ("POST", "/v1/experts", {"source": "kinds", "name": "math"}), ("DELETE", "/v1/experts/nobody", None)
    taken, unknown = run(gate, add, remove, key=ADMIN)
    names = ("auto", "base", tiny_experts.BASE, "a\nb", 3, ["x"])
    added = [("POST", "/v1/experts", {"source": "kinds", "name": name}) for name in names]
    assert {response.status_code for response in run(gate, *added, key=ADMIN)} == {400}
    assert taken.status_code == unknown.status_code == 400 and "is called 'math'" in taken.json()["error"]["message"]


JSON = st.recursive(
    st.sampled_from([None, True, 0, -1, 2**70, 1.5, float("nan"), "", "math", "user", "data: {}", "\ud800", "x" * 50]),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "id"]), part)
    ),
    max_leaves=5,
)
BROKEN = st.sampled_from(["", "{", "[]", "3", "[" * 5000, '{"a": ' * 500, "\x00"])
STARTS = {
    "/v1/chat/completions": (app.ChatCompletionHandler, ASK),
    "/v1/completions": (app.CompletionHandler, {"prompt": "What?", "max_tokens": 4}),
    "/v1/responses": (app.ResponseHandler, {"input": "What?", "max_output_tokens": 4, "stream": False}),
}


@st.composite
def contents(draw, declared):
    """A road with a body: a good one with some fields of any JSON, or of what the road declares."""
    path = draw(st.sampled_from(sorted(STARTS)))
    handler, start = STARTS[path]
    kinds = {**get_type_hints(handler._valid_params_class), "expert": str, "mixture": dict[str, float] | str}
    body = {"model": draw(st.sampled_from(["auto", "base", "math", "code"])), **start}
    for name in draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3)):
        body[name] = draw(JSON | st.from_type(kinds[name]) if declared else JSON)
    return path, draw(
        st.just(json.dumps(body, default=lambda part: list(part) if hasattr(part, "__iter__") else None)) | BROKEN
    )


@pytest.mark.parametrize("declared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_body_breaks_the_server_or_another_answer(gate, reference, declared):
    expected = {name: alone(reference, name) for name in ("math", "code")}
    sent = [("/v1/chat/completions", json.dumps(chat(model=name)[2])) for name in expected]

    async def send(calls):
        async with client(gate) as sender:
            headers = {"content-type": "application/json"}
            return await asyncio.gather(*(sender.post(path, content=body, headers=headers) for path, body in calls))

    checks, examples = [HealthCheck.too_slow, HealthCheck.data_too_large], 300 if declared else 20

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    @given(st.lists(contents(declared), min_size=1, max_size=8))
    def check(calls):
        one, two, *others = asyncio.run(send([*sent, *calls]))
        assert [text(one), text(two)] == list(expected.values())
        for call in others:
            assert call.status_code in (200, 400, 404), (call.status_code, call.text)
            assert call.status_code == 200 or call.json()["error"]["message"], call.text

    check()


@contextmanager
def loopback(gate):
    """The server on a port of this machine; its URL."""
    uvicorn = pytest.importorskip("uvicorn")
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(gate, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def test_a_storm_of_clients_changes_no_answer_and_leaves_nothing_behind(gate, reference, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    serving = pytest.importorskip("serving")
    mixtures = [{}, {"math": 1.0}, {"code": 1.0}, {"math": 0.7, "code": 0.3}]
    answers = [(mixture, alone(reference, mixture, serving.CHAT, serving.NEW)) for mixture in mixtures]
    with loopback(gate) as url:
        counts = asyncio.run(serving.Storm(url, answers, "math").run(seconds=3, leaving=30, rate=20))
    assert (
        counts["wrong answers"] == 0 < counts["answers"]
        and counts["left"] >= 30
        and counts["experts added and removed"]
    )
    assert {kind for kind in counts if "refused" in kind} <= {f"refused with {status}" for status in (400, 401, 404)}
    asyncio.run(soon(lambda: not slots(gate)))
    assert gate.pending == 0 and not gate.app.state.engine.batch.output_router.result_handlers


def test_the_openai_client_over_loopback(gate, reference):
    openai = pytest.importorskip("openai")
    with (
        loopback(gate) as url,
        openai.OpenAI(base_url=url, api_key=KEY) as sender,
        openai.OpenAI(base_url=url, api_key="no") as other,
    ):
        mixture = {"math": 0.7, "code": 0.3}
        answer = sender.chat.completions.create(model="auto", extra_body={"mixture": mixture}, **ASK)
        assert answer.choices[0].message.content == alone(reference, mixture)
        assert answer.dispatch["mixture"] == mixture
        raw = sender.chat.completions.with_raw_response.create(model="code", **ASK)
        assert raw.headers["x-peft-svf-expert"] == "code"
        chunks = list(sender.chat.completions.create(model="code", stream=True, **ASK))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone(reference, "code")
        assert chunks[0].dispatch["choice"] == "code"
        asked = {"input": "What is 3 + 4?", "max_output_tokens": 8, "temperature": 0}
        assert sender.responses.create(model="math", **asked, stream=False).output_text == alone(reference, "math")
        with pytest.raises(openai.NotFoundError, match="There is no model 'physics'"):
            sender.chat.completions.create(model="physics", **ASK)
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        assert "math" in [model.id for model in sender.models.list()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_sees_answers_one_request_at_a_time(tmp_path_factory, stream):
    folder = tmp_path_factory.mktemp("seeing")
    base = seeing.model(name="seeing")
    experts = [tiny_experts.write(folder, "math", 2, seeing.model(name="seeing"), target_modules=seeing.LANGUAGE)]
    model = Transformer2Model(base, seeing.processor(), experts)
    gate = app.build(Engine(model, CAPACITY), RULES)
    url = "data:image/png;base64," + base64.b64encode(seeing.png(seeing.IMAGES[0])).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    inputs = model.processor.apply_chat_template(
        seeing.asks(0, "What?"), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, mixture={"math": 1.0}, max_new_tokens=8, do_sample=False)
    expected = model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    responses = run(gate, *(chat(model="math", messages=messages, stream=stream) for _ in range(2)))
    for response in responses:
        if stream:
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in objects(response)) == expected
        else:
            assert text(response) == expected
    part["image_url"]["url"] = "http://127.0.0.1/image.png"
    (response,) = run(gate, chat(model="math", messages=messages))
    assert response.status_code == 400 and "data: URLs" in response.json()["error"]["message"]
    assert text(run(gate, chat(model="auto"))[0])


def test_the_verb_serves_a_bundle_to_those_with_a_key(folder, tmp_path, monkeypatch, capsys):
    uvicorn = pytest.importorskip("uvicorn")
    tiny_experts.base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "keys").write_text(f"{KEY}\nanother\n")
    Mixture({"math": 0.5, "code": 0.5}).save(tmp_path / "half.json")
    monkeypatch.setenv("PEFT_SVF_ADMIN_KEYS", ADMIN)
    monkeypatch.setattr(transformers.utils.logging, "set_verbosity_error", lambda: None)  # it stays set
    answers = {}

    def ask(gate, **settings):
        listed, half, wrong = run(gate, ("GET", "/v1/models", None), chat(model="half"), chat(max_tokens=20))
        answers.update(settings, names=[entry["id"] for entry in listed.json()["data"]], status=wrong.status_code)
        answers.update(half=half.json()["dispatch"]["mixture"], stranger=run(gate, chat(), key="x")[0].status_code)

    monkeypatch.setattr(uvicorn, "run", ask)
    experts = [f"--experts={folder / name}" for name in ("math", "code")]
    more = ["--mixtures", f"half={tmp_path / 'half.json'}", "--api-keys", tmp_path / "keys", "--new-tokens", 16]
    monkeypatch.setattr(logging.getLogger("peft_svf.cli.serving"), "handlers", [])
    code, out, err = command(capsys, "serve", tmp_path / "base", *experts, *more, "--port", 8001)
    assert code == 0 and "http://127.0.0.1:8001/v1" in out and "16384 tokens" in out, err
    assert answers["names"][:1] == ["auto"] and answers["names"][2:] == ["code", "math", "half"]
    assert (answers["half"], answers["status"], answers["stranger"]) == ({"math": 0.5, "code": 0.5}, 400, 401)
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert len(lines) == 4 and KEY not in err and "3 + 4" not in err


def test_what_cannot_be_served_is_one_line_before_a_model_is_loaded(tmp_path, capsys):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wrong = {
            ("--port", taken.getsockname()[1]): (1, "choose another by --port"),
            ("--port", 70000): (2, "Invalid value for '--port'"),
            ("--host", "999.1.1.1"): (1, "Can't listen on 999.1.1.1"),
            ("--mixtures", "half"): (2, "A mixture is written --mixtures NAME=FILE"),
            ("--folder", tmp_path / "none"): (2, "does not exist"),
        }
        for arguments, (code, message) in wrong.items():
            assert (result := command(capsys, "serve", tmp_path / "base", "--experts", "x", *arguments))[0] == code
            assert message in result[2] and result[2].count("\n") == 1, result


@pytest.fixture
def sums(reference, tmp_path):
    """A folder of two harnesses' tasks, of whose four questions the expert answers three as its target."""
    questions = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]
    rows = [(text, alone(reference, "math", [{"role": "user", "content": text}])) for text in questions]
    rows = [row for row in rows if row[1].strip() == row[1] != "" and row[1].isprintable()][:4]
    rows[0] = (rows[0][0], "something else")
    assert len(rows) == 4
    lines = [json.dumps({"input": question, "target": target}) for question, target in rows]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    page = (ROOT / "docs" / "how_to" / "serve.md").read_text()
    for name in ("sums.yaml", "sums.py"):
        code = page.split(f'title="{name}"\n')[1].split("```")[0]
        (tmp_path / name).write_text(code)
    return tmp_path


def harness(package, folder, *arguments, **environment):
    """Run a harness in a process of its own."""
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} isn't installed")
    call = [sys.executable, "-m", package, *arguments]
    done = subprocess.run(call, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_lm_eval_measures_what_the_expert_answers(gate, sums):
    with loopback(gate) as url:
        model = f"model=math,base_url={url}/chat/completions,num_concurrent=4,tokenizer_backend=none"
        task = ["--tasks", "sums", "--include_path", ".", "--apply_chat_template", "--output_path", "out"]
        harness("lm_eval", sums, "--model", "local-chat-completions", "--model_args", model, *task, OPENAI_API_KEY=KEY)
    results = json.loads(next((sums / "out").rglob("results_*.json")).read_text())["results"]["sums"]
    assert results["exact_match,none"] == 0.75


@pytest.mark.slow
def test_inspect_measures_what_the_expert_answers(gate, sums):
    with loopback(gate) as url:
        model = ["--model", "openai-api/svf/math", "--log-format", "json", "--log-dir", "out", "--display", "none"]
        harness("inspect_ai", sums, "eval", "sums.py", *model, SVF_BASE_URL=url, SVF_API_KEY=KEY)
    scores = json.loads(next((sums / "out").rglob("*.json")).read_text())["results"]["scores"]
    assert scores[0]["metrics"]["accuracy"]["value"] == 0.75


@contextmanager
def example(tmp_path, name, *arguments, **environment):
    """An example on a port of this machine, in a process of its own; a client once it answers."""
    openai = pytest.importorskip("openai")
    tiny_experts.base(name="").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    of = {name: tiny_experts.base(name=str(tmp_path / "base")) for name in ("math", "code")}
    experts = [tiny_experts.write(tmp_path, name, tiny_experts.SEEDS[name], base) for name, base in of.items()]
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    call = [sys.executable, str(ROOT / "examples" / name), *arguments, tmp_path / "base", *experts, "--port", port]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with subprocess.Popen([*map(str, call)], env=environment) as process:
        try:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=60, max_retries=0) as asks:
                for _ in range(300):
                    time.sleep(1)
                    assert process.poll() is None
                    try:
                        asks.chat.completions.create(model="math", **ASK)
                        break
                    except openai.OpenAIError:
                        pass
                yield asks
        finally:
            process.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_ray_serve_answers_from_replicas(reference, tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("grpc", reason="needs ray[serve]")
    with example(tmp_path, "serve_ray.py", RAY_USAGE_STATS_ENABLED="0", PEFT_SVF_API_KEYS=KEY) as asks:
        for name in ("math", "code", "math", "code"):
            answer = asks.chat.completions.create(model=name, **ASK)
            assert answer.choices[0].message.content == alone(reference, name)
            chunks = asks.chat.completions.create(model=name, stream=True, **ASK)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone(reference, name)


@pytest.mark.slow
def test_a_gateway_hands_requests_to_the_expert_of_another_engine(gate, reference, tmp_path, monkeypatch):
    engine = gate.app.state.engine
    monkeypatch.setattr(engine.base, "name_or_path", str(tmp_path / "base"))  # what other engines call it, too
    with loopback(app.build(engine, RULES)) as url, example(tmp_path, "gateway.py", url) as asks:
        mixture = reference.first_pass([ASK["messages"]])[0]
        answer = asks.chat.completions.create(model="auto", **ASK)
        assert answer.choices[0].message.content == alone(reference, mixture)
        chunks = asks.chat.completions.create(model="code", stream=True, **ASK)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone(reference, "code")
