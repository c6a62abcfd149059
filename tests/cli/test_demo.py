# SPDX-License-Identifier: Apache-2.0
"""Laws of the page: it shows what the library answers, and what it receives is text and numbers."""

import shutil
import socket
import sys
from importlib.util import find_spec
from itertools import pairwise
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import tiny_experts
from command_line import run
from tiny_model import tiny_tokenizer

from peft_svf import Mixture, Transformer2Model
from peft_svf.adaptation import Search
from peft_svf.cli import main
from peft_svf.experts import make_key
from peft_svf.rows import encode

page = sys.modules[f"{main.__module__}.demo"]  # the package has a verb of that name
pytestmark = [  # Gradio leaves sockets and event loops to the collector
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CHAT = [{"role": "user", "content": "What is 3 + 4?"}]
ROWS = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "answer": str(2 * i)} for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    tiny_experts.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return Transformer2Model(tiny_experts.base(), tiny_tokenizer(), [folder / "math", folder / "code"])


def alone(model, chat, mixture, new_tokens=6):
    inputs = encode(model.tokenizer, [chat])
    ids = model.generate(**inputs, mixture=mixture, max_new_tokens=new_tokens, do_sample=False)
    return model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_both_answers_grow_token_by_token_to_those_that_generate_gives_alone(model):
    mixture = Mixture({"math": 0.7, "code": 0.3})
    longer = [*CHAT, {"role": "assistant", "content": "7"}, {"role": "user", "content": "And 4 + 4?"}]
    steps = list(page.answers(model, [CHAT, longer], mixture, 6))
    assert steps[-1] == [alone(model, CHAT, {}), alone(model, longer, mixture)]
    for before, after in pairwise(steps):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True)) and before != after


def test_who_leaves_ends_the_work_and_an_error_is_raised_where_it_is_read(model):
    steps = page.answers(model, [CHAT, CHAT], Mixture({"math": 1.0}), 400)
    next(steps)
    steps.close()  # returns when generation has ended
    assert model.library.lock.acquire(blocking=False)
    model.library.lock.release()
    with pytest.raises(ValueError, match="no expert 'none'"):
        list(page.answers(model, [CHAT, CHAT], Mixture({"none": 1.0}), 4))


def test_a_mixture_is_named_by_its_terms_and_the_rest_is_the_bases():
    assert [page.named(alpha) for alpha in ({}, {"math": 1.0})] == ["base", "math"]
    assert page.named({"math": 0.5, "code": 0.25}) == "0.50 math + 0.25 code + 0.25 base"
    assert page.shares_of(Mixture({"math": 0.5})) == {"math": 0.5, "base": 0.5}
    routed = Mixture({"math": 1.0}, "prompt", 0.5, {"math": 0.75, "other": 0.25})
    assert page.shares_of(routed) == {"math": 0.75, "base": 0.25}


def test_reasons_of_a_first_pass_by_keys_have_the_distance_of_each_kind(folder):
    model = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), [folder / "math", folder / "code"])
    assert "confidence" in page.reasons(model, CHAT, *model.first_pass([CHAT]))
    assert page.reasons(model, CHAT, Mixture({"math": 0.5})) == "**0.50 math + 0.50 base**, as you chose."
    prompts = {"math": [f"{i} + {i} =" for i in range(6)], "code": [f"def f{i}():" for i in range(6)]}
    with_keys = []
    for name, texts in prompts.items():
        expert = model.library.expert(name)
        key = make_key(tiny_experts.base(), tiny_tokenizer(), texts)
        with_keys.append(type(expert)(name, expert.offsets, expert.config, key=key))
    keyed = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), with_keys)
    (mixture,) = keyed.first_pass(["3 + 3 ="])
    text = page.reasons(keyed, "3 + 3 =", mixture)
    assert f"**{page.named(mixture.alpha)}**. First pass: key" in text
    listed = text.split("of each: ")[1].split(". If")[0]
    values = {name: float(value) for name, value in (part.rsplit(" ", 1) for part in listed.split(", "))}
    assert set(values) == {"math", "code", "everyday requests"} and list(values.values()) == sorted(values.values())
    assert next(iter(values)) == "math"


def test_the_picture_is_of_the_mixture_and_the_base_has_none(model):
    pytest.importorskip("matplotlib")
    assert page.picture(model, Mixture(), CHAT, "7") is None
    assert page.picture(model, Mixture({"math": 1.0}), CHAT, " ") is None
    figure = page.picture(model, Mixture({"math": 0.5, "code": 0.5}), CHAT, "7")
    assert "0.50 math + 0.50 code" in figure.axes[0].get_title() and len(figure.axes[0].patches) == 2


def test_a_search_shows_the_best_so_far_and_ends_with_what_adapt_returns(model, monkeypatch):
    monkeypatch.setattr(page, "SEARCH", {"population": 6, "iterations": 2})
    steps = list(page.searched(model, ROWS))
    assert len(steps) > 2 and steps[-1][0] == model.adapt(ROWS, search=Search(population=6, iterations=2)).alpha
    scores = [float(text.rpartition(" ")[2]) for _, text in steps if "best of" in text]
    assert scores == sorted(scores)
    assert "left out" in steps[-1][1] and "base" in steps[-1][1]


def test_uploaded_lines_become_cells_and_anything_else_is_refused():
    assert page.cells_of(b'{"prompt": "2 + 2?", "answer": "4"}\n\n') == [["2 + 2?", "4"]]
    for content in (b"x", b"[]", b'{"prompt": "x"}', b'{"prompt": ["/etc/passwd"], "answer": ""}', b"\xff"):
        with pytest.raises(ValueError, match=r'Lines like \{"prompt"'):
            page.cells_of(content)


def test_without_gradio_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run(capsys, "demo")
    assert code == 1 and "pip install 'peft-svf[demo]'" in err and err.count("\n") == 1


# --- what follows needs Gradio, and the last test a browser

needs_gradio = pytest.mark.skipif(not find_spec("gradio"), reason="needs gradio")


@needs_gradio
def test_a_taken_port_a_foreign_expert_and_no_names_are_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "EXAMPLES", tmp_path)
    code, _, err = run(capsys, "demo", "--port", 0)
    assert code == 2 and "Name a base model with --experts, or a bundle" in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run(capsys, "demo", "--port", taken.getsockname()[1])
    assert code == 1 and "choose another by --port" in err and err.count("\n") == 1
    tiny_experts.base(seed=1).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    code, _, err = run(capsys, "demo", tmp_path / "base", "--experts", folder / "math", "--port", 0)
    assert code == 1 and "does not belong to this base model" in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def address(model):
    """A page that is served; one expert has a description that a browser must not run."""
    pytest.importorskip("gradio")
    expert = model.library.expert("math")
    expert.config["description"] = "<img src=x onerror=\"document.title='broken in'\">"
    requests = {"math": [{"prompt": "5 + 5?", "answer": "10"}] * 2}
    blocks = page.build(model, requests, new_tokens=6)
    _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True)
    yield url
    blocks.close()


@needs_gradio
def test_the_page_answers_through_its_own_api(model, address, tmp_path, monkeypatch):
    from gradio_client import Client

    monkeypatch.chdir(tmp_path)
    client = Client(address, verbose=False)
    first, *_, told, last = client.submit("What is 3 + 4?", False, page.MIXED, 0.25, 0.75, api_name="/ask")
    (left, right), (bars, why, _), picture = told[1:3], first[3:], last[-1]
    assert shown(left)[-1] == alone(model, CHAT, {}).strip()
    mixture = {"code": 0.25, "math": 0.75}
    assert shown(right)[-1] == f"{alone(model, CHAT, mixture).strip()}\n\n*0.25 code + 0.75 math*"
    assert {bar["label"]: bar["confidence"] for bar in bars["confidences"]} == {**mixture, "base": 0.0}
    assert why == "**0.25 code + 0.75 math**, as you chose." and picture["plot"].startswith("data:image")
    table = {"headers": ["request", "answer"], "data": [["5 + 5?", "10"], ["", ""]], "metadata": None}
    monkeypatch.setattr(page, "SEARCH", {"population": 4, "iterations": 1})
    text, way, *weights = client.predict(table, api_name="/adapt")
    client.close()
    (tmp_path / "mine.txt").write_text("mine")
    for path in (tmp_path / "mine.txt", "mine.txt", "/etc/hostname", model.library.expert("math").base_model):
        with pytest.raises(HTTPError, match=r"40[34]"):
            urlopen(f"{address}gradio_api/file={path}")
    assert way == page.MIXED and len(weights) == 2 and text
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def shown(chat) -> list[str]:
    parts = [message["content"] for message in chat]
    return [part if isinstance(part, str) else part[0]["text"] for part in parts]


@pytest.mark.slow
@needs_gradio
def test_in_a_browser_both_answers_appear_and_nothing_of_an_expert_runs(model, address):
    """Needs `pip install playwright` and a Chromium of the system, such as Debian's package."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 420, "height": 900})
        strangers, errors = [], []
        view.on("request", lambda request: strangers.append(request.url) if address not in request.url + "/" else None)
        view.on("pageerror", lambda error: errors.append(error))
        view.goto(address)
        view.get_by_placeholder("Ask something").fill("What is 3 + 4?")
        view.keyboard.press("Enter")
        view.get_by_text("First pass: prompt").wait_for()
        (mixture,) = model.first_pass([CHAT])
        view.get_by_text(page.named(mixture.alpha), exact=True).first.wait_for()
        view.locator("input[type=range]").first.fill("0.5")
        playwright.expect(view.get_by_label(page.MIXED)).to_be_checked()
        assert view.title() == f"Experts of {tiny_experts.BASE}" and not errors
        wide = view.evaluate("document.documentElement.scrollWidth")
        assert wide <= 420  # nothing sticks out of a telephone
        strangers = [url for url in strangers if not url.startswith(("data:", "blob:"))]
        assert not strangers  # nothing is loaded from elsewhere
        browser.close()
