# SPDX-License-Identifier: Apache-2.0
"""Laws of `pipeline("transformer2", ...)` for models that see: image-text-to-text's inputs and outputs, two passes."""

import copy
import threading
from types import SimpleNamespace

import pytest
import seeing
import torch
from peft import PeftModel
from PIL import Image
from seeing import IMAGES, KINDS, LANGUAGE, PICTURE, asks
from tiny_experts import write
from tiny_model import CHAT
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from peft_svf import Transformer2Model, Transformer2Pipeline
from peft_svf.adaptation import FirstPass, fit_probe
from peft_svf.adaptation.first_pass import kind_scores
from peft_svf.pipeline import Transformer2ImagePipeline

SHORT = {"max_new_tokens": 5}
NAMES = ["code", "math", "other"]
TEXTS = ["What is 3 + 4?", "def"]
TOWER = r".*(vision_model.*\.(fc1|fc2)|visual.*\.(gate|up|down)_proj)"


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A pipeline; transformers' own with each expert alone; what both read; the experts, which name the base."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    name = str(folder / "base")
    named = [
        write(folder, n, i, seeing.model(kind, name), target_modules=LANGUAGE) for n, i in (("math", 2), ("code", 1))
    ]
    read = {"processor": seeing.processor(kind)}
    stock = {"other": pipeline("image-text-to-text", model=seeing.model(kind), **read)}
    for path in named:
        one = PeftModel.from_pretrained(seeing.model(kind), str(path)).eval().base_model.model
        stock[path.name] = pipeline("image-text-to-text", model=one, **read)
    classifier = write(folder, "kinds", 3, seeing.model(kind, name), target_modules=LANGUAGE)
    pipe = pipeline("transformer2", model=seeing.model(kind, name), experts=named, classifier=classifier, **read)
    return SimpleNamespace(pipe=pipe, stock=stock, kind=kind, named=named, classifier=classifier, folder=folder)


def chats():
    return [asks(i, text) for i, text in enumerate(TEXTS)]


def words(records):
    """The last of each chat: what was answered."""
    return [record["generated_text"][-1]["content"] for record in records]


def test_choices_are_for_texts_and_a_picture_is_refused(made):
    text = [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}]}]
    (output,) = made.pipe(text=text, choices=["yes", "no"], expert="math")
    (expected,), _ = made.pipe.model.choose([text], ["yes", "no"], expert="math")
    assert output["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    with pytest.raises(ValueError, match="this request has an image"):
        made.pipe(text=chats()[0], choices=["yes", "no"], expert="math")
    with pytest.raises(ValueError, match="has an image"):
        made.pipe.model.choose(chats()[:1], ["yes", "no"], expert="math")


def test_an_expert_answers_as_image_text_to_text_on_it(made):
    assert isinstance(made.pipe, Transformer2ImagePipeline)
    answers = {}
    for name in NAMES:
        answers[name] = made.stock[name](text=chats(), **SHORT)
        for batch_size in (1, 2):
            assert made.pipe(text=chats(), expert=name, batch_size=batch_size, **SHORT) == answers[name]
        assert made.pipe(text=chats()[0], expert=name, **SHORT) == made.stock[name](text=chats()[0], **SHORT)
        given = {"images": IMAGES, "text": [f"{PICTURE[made.kind]}a", f"{PICTURE[made.kind]}bcd"]}
        assert made.pipe(**given, expert=name, **SHORT) == made.stock[name](**given, **SHORT)
    assert answers["math"] != answers["code"] != answers["other"] != answers["math"]
    turned = [asks(1 - i, text) for i, text in enumerate(TEXTS)]
    assert list(map(words, made.pipe(text=turned, expert="other", **SHORT))) != list(map(words, answers["other"]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"generate_kwargs": {"num_beams": 2, "num_return_sequences": 2}},
        {"generate_kwargs": {"cache_implementation": "static"}},
        {"generate_kwargs": {"prefill_chunk_size": 7}},
        {"generate_kwargs": {"repetition_penalty": 1.5}, "stop_sequence": "a"},
        {"return_full_text": False},
        {"max_new_tokens": 34},
    ],
    ids=["default", "sequences", "static cache", "chunked prefill", "penalty and stop", "new text", "merged"],
)
def test_rows_stay_with_their_choice_and_their_image(settings, made):
    settings = SHORT | copy.deepcopy(settings)  # transformers writes into generate_kwargs
    each = ["math", "other"]
    asked = zip(each, chats(), strict=True)
    expected = [made.stock[name](text=chat, **copy.deepcopy(settings)) for name, chat in asked]
    settings = {**settings, **settings.pop("generate_kwargs", {})}  # beside the others, as in text-generation
    for batch_size in (1, 2):
        assert made.pipe(text=chats(), expert=each, batch_size=batch_size, **settings) == expected
    mixtures = [{"math": 1.0}, {}]
    found = made.pipe(chats(), mixture=mixtures, batch_size=2, return_dispatch=True, **settings)
    for records, own, name in zip(found, expected, each, strict=True):
        assert [record.pop("dispatch")["choice"] for record in records] == [name] * len(own)
        assert records == own


def test_each_of_several_prompts_has_its_choice_however_they_are_given(made):
    texts = [f"{PICTURE[made.kind]}{text}" for text in TEXTS]
    each, own = ["math", "other"], {"images": IMAGES, "text": texts}
    expected = [made.stock[name](**own, **SHORT)[i] for i, name in enumerate(each)]
    assert made.pipe(**own, expert=each, **SHORT) == expected
    assert made.pipe(IMAGES, texts, expert=each, **SHORT) == expected
    assert made.pipe(IMAGES, text=texts, expert=each, **SHORT) == expected
    expected = [made.stock[name](text=chat, **SHORT) for name, chat in zip(each, chats(), strict=True)]
    assert made.pipe(images=chats(), expert=each, **SHORT) == expected
    column = KeyDataset([{"chat": chat} for chat in chats()], "chat")
    assert made.pipe(text=column, expert="math", **SHORT) == made.stock["math"](text=chats(), **SHORT)
    assert made.pipe(text=column, expert=each, **SHORT) == expected


def test_text_alone_is_answered_too(made):
    for given in ("abc", ["abc", "de"], [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]):
        assert made.pipe(text=given, expert="math", **SHORT) == made.stock["math"](text=given, **SHORT)


def test_threads_with_different_experts_and_images_never_mix(made):
    """A model like Qwen's keeps the positions of its last image: they are one caller's, as its z is."""
    large = Image.new("RGB", (28, 36), (0, 200, 0))
    jobs = [(name, image) for name in NAMES for image in (0, 1, large)]
    expected = [words(made.pipe(text=asks(image, "What?"), expert=name, **SHORT)) for name, image in jobs]
    found = [None] * len(jobs)

    def work(i):
        name, image = jobs[i]
        found[i] = words(made.pipe(text=asks(image, "What?"), expert=name, **SHORT))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected and len({text for (text,) in expected}) > len(NAMES)


def probe(made):
    prompts = ["3 + 4", "9 * 9", "def f", "import os"]
    model = made.pipe.model
    return fit_probe(model.library, model.tokenizer, prompts, ["math", "math", "code", "code"])


@pytest.mark.parametrize("strategy", ["prompt", "names", "classifier", "probe", "written"])
def test_the_first_pass_reads_the_words_and_not_the_images(strategy, made):
    settings = {
        "names": lambda: FirstPass(read="likelihood"),
        "probe": lambda: FirstPass("probe", probe=probe(made)),
        "written": lambda: FirstPass(read="generate"),
    }
    settings = {"first_pass": settings[strategy]() if strategy in settings else strategy}
    decided = made.pipe.model.first_pass(TEXTS, **settings)
    for batch_size in (1, 2):
        for given in (chats(), [asks(1, text) for text in TEXTS]):
            found = made.pipe(text=given, return_dispatch=True, batch_size=batch_size, **settings, **SHORT)
            assert [record["dispatch"]["choice"] for (record,) in found] == [mixture.choice for mixture in decided]
            assert [record["dispatch"]["confidence"] for (record,) in found] == pytest.approx(
                [mixture.confidence for mixture in decided], abs=1e-4
            )
    mark = made.pipe.processor.image_token
    assert made.pipe.model.first_pass([f"{mark}{text}" for text in TEXTS], **settings) == decided


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_the_first_pass_loses_no_word_to_a_template_that_reads_parts(strategy, made, monkeypatch):
    model = made.pipe.model
    scores = [kind_scores(model.library, model.tokenizer, TEXTS, FirstPass(strategy))]
    assert not torch.allclose(*scores[0])
    monkeypatch.setattr(model.tokenizer, "chat_template", CHAT)  # the same for contents that are strings
    scores.append(kind_scores(model.library, model.tokenizer, TEXTS, FirstPass(strategy)))
    assert torch.equal(*scores)


def test_examples_with_images_are_refused(made):
    with pytest.raises(ValueError, match="has an image: log-likelihoods are those of texts"):
        made.pipe.model.adapt([{"prompt": chat, "answer": "7"} for chat in chats()], population=8, iterations=1)


def test_the_model_answers_inputs_of_its_processor_row_by_row(made):
    model, processor = made.pipe.model, made.pipe.processor
    how = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    padding = {"padding": True, "padding_side": "left"}
    inputs = processor.apply_chat_template(chats(), processor_kwargs=padding, **how)
    output, mixtures = model.generate(**inputs, expert=["math", "other"], return_dispatch=True, **SHORT)
    new = output[:, inputs["input_ids"].shape[1] :]
    expected = [made.stock[name](text=chat, **SHORT) for name, chat in zip(["math", "other"], chats(), strict=True)]
    assert processor.batch_decode(new, skip_special_tokens=True) == [words(records)[0] for records in expected]
    assert [mixture.choice for mixture in mixtures] == ["math", "other"]


def test_a_model_that_sees_images_is_loaded_whole(tmp_path):
    name = str(tmp_path / "base")  # Qwen's processor is not read from a folder where torchvision is missing
    seeing.model().save_pretrained(name)
    seeing.processor().save_pretrained(name)
    named = [
        write(tmp_path, n, i, seeing.model(name=name), target_modules=LANGUAGE) for n, i in (("math", 2), ("code", 1))
    ]
    alone = PeftModel.from_pretrained(seeing.model(), str(named[0])).eval().base_model.model
    expected = pipeline("image-text-to-text", model=alone, processor=seeing.processor())(text=asks(0, "x"), **SHORT)
    for found in (
        pipeline("transformer2", model=name, experts=named),
        pipeline("transformer2", model=name, experts=named, device_map="auto"),
        pipeline("transformer2", experts=named),
        Transformer2Pipeline.from_pretrained(experts=named),
    ):
        assert isinstance(found, Transformer2ImagePipeline)
        assert found(text=asks(0, "x"), expert="math", **SHORT) == expected
        assert found.model.first_pass(TEXTS) == found.model.first_pass([asks(0, text) for text in TEXTS])


def test_experts_that_change_how_images_are_seen_do_not_differ_within_a_batch(made, tmp_path):
    kind = made.kind
    named = [
        write(tmp_path, n, i, seeing.model(kind), target_modules=TOWER, scale=2.0)
        for n, i in (("math", 2), ("code", 1))
    ]
    model = Transformer2Model(seeing.model(kind), seeing.processor(kind), named)
    pipe = Transformer2ImagePipeline(model)
    given = [asks(0, "abc"), asks(Image.new("RGB", (32, 16), (0, 250, 0)), "abc")]  # of 16 and 32 patches
    one = PeftModel.from_pretrained(seeing.model(kind), str(named[0])).eval().base_model.model
    stock = pipeline("image-text-to-text", model=one, processor=seeing.processor(kind))
    assert pipe(text=given, expert="math", batch_size=2, **SHORT) == stock(text=given, **SHORT)
    each = ["math", "code"]
    singles = [pipe(text=chat, expert=name, **SHORT) for name, chat in zip(each, given, strict=True)]
    assert pipe(text=given, expert=each, batch_size=1, **SHORT) == singles
    with pytest.raises(
        ValueError, match=r"Experts move model\.vis.*, which reads the images of a batch.*batch_size=1"
    ):
        pipe(text=given, expert=each, batch_size=2, **SHORT)
    texts = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in TEXTS]
    pipe(text=texts, expert=each, batch_size=2, **SHORT)  # no image is seen
