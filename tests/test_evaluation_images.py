# SPDX-License-Identifier: Apache-2.0
"""Laws of evaluation where a processor reads: rows with pictures, and rows of text for a model that sees."""

import oracle
import pytest
import seeing
import torch
from seeing import IMAGES, KINDS, PICTURE, png
from test_evaluation import close
from tiny_model import tiny_model, tiny_tokenizer

from peft_svf.evaluation import choice_logps, evaluate, paired_difference, wilson
from peft_svf.rows import prompt_text
from peft_svf.tasks import get_task
from peft_svf.tasks.vqa import vqa_accuracy

every_kind = pytest.mark.parametrize("kind", KINDS)
QUESTIONS = ["What is it?", "How many?", "Is it red, or is it of another colour?"]
SHORT = {"max_new_tokens": 6}
ANSWERS = ["yes"] * 10


def row(i, image, **more):
    """A row of TextVQA as the task makes it, about an image in any form."""
    raw = {"question": QUESTIONS[i], "answers": ANSWERS, "id": f"textvqa-{i}", "image": image}
    return get_task("textvqa").row(raw) | more


def rows(images=(0, 1, 0)):
    return [row(i, IMAGES[image]) for i, image in enumerate(images)]


@torch.no_grad()
def answer(model, processor, kind, question, pictures, prompt=None):
    """What the model answers to one prompt that is written by hand: no template, no batch, no padding."""
    asked = f"<u>{PICTURE[kind] * len(pictures)}{question}\nAnswer with a single word or phrase.<end><a>"
    inputs = processor(text=[prompt or asked], images=[pictures] if pictures else None, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, do_sample=False, **SHORT)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def completions(summary):
    return [record["completion"] for record in summary.records]


@every_kind
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_rows_with_images_are_answered_as_one_by_one(kind, batch_size):
    model, processor = seeing.model(kind), seeing.processor(kind)
    processor.tokenizer.padding_side = "right"  # as many come: batches that generate are padded left all the same
    expected = [answer(model, processor, kind, QUESTIONS[i], [IMAGES[image]]) for i, image in enumerate((0, 1, 0))]
    before = repr(given := rows())
    summary = evaluate(model, processor, given, batch_size=batch_size, **SHORT)
    assert repr(given) == before  # still PIL images
    assert completions(summary) == expected and len(set(expected)) == 3
    assert (summary.task, summary.form, summary.n) == ("textvqa", "generate", 3)
    assert [record["id"] for record in summary.records] == ["textvqa-0", "textvqa-1", "textvqa-2"]
    assert completions(evaluate(model, processor, rows((1, 0, 1)), **SHORT)) != expected  # it sees the images
    processor.tokenizer.pad_token = None
    assert completions(evaluate(model, processor, rows(), batch_size=batch_size, **SHORT)) == expected
    assert processor.tokenizer.pad_token is None


@every_kind
def test_a_picture_is_the_same_in_every_form_it_may_have(kind, tmp_path):
    model, processor = seeing.model(kind), seeing.processor(kind)
    path = tmp_path / "red.png"
    path.write_bytes(png(IMAGES[0]))
    chat = [{"role": "user", "content": f"{QUESTIONS[0]}\nAnswer with a single word or phrase."}]
    part = {"type": "text", "text": chat[0]["content"], "image": None}  # as a table of parts gives it
    forms = {
        "PIL": row(0, IMAGES[0]),
        "path": row(0, path),
        "name": row(0, str(path)),
        "undecoded": row(0, {"path": str(path), "bytes": None}),
        "bytes": row(0, {"path": "red.png", "bytes": png(IMAGES[0])}),
        "grey": row(0, IMAGES[0].convert("P")),
        "images": row(0, None, images=[IMAGES[0]]),
        "no parts": row(0, IMAGES[0], prompt=chat),
        "part": row(0, None, prompt=seeing.asks(0, chat[0]["content"])),
        "part with its path": row(0, None, prompt=seeing.asks(str(path), chat[0]["content"])),
        "table": row(0, IMAGES[0], prompt=[{"role": "user", "content": [{"type": "image", "text": None}, part]}]),
    }
    expected = answer(model, processor, kind, QUESTIONS[0], [IMAGES[0]])
    for form, given in forms.items():
        assert completions(evaluate(model, processor, [given], **SHORT)) == [expected], form
    assert answer(model, processor, kind, QUESTIONS[0], [IMAGES[1]]) != expected


@every_kind
def test_several_images_keep_their_places(kind):
    model, processor, answers = seeing.model(kind), seeing.processor(kind), []
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    for pictures in (IMAGES, IMAGES[::-1]):
        given = row(0, None, prompt=[{"role": "user", "content": content}], images=pictures)
        text = f"<u>{PICTURE[kind]}and{PICTURE[kind]}<end><a>"
        expected = answer(model, processor, kind, "", pictures, text)
        answers += completions(evaluate(model, processor, [given], **SHORT))
        assert answers[-1] == expected
    assert answers[0] != answers[1]


@every_kind
def test_rows_of_text_are_answered_by_a_model_that_sees_also_beside_images(kind):
    model, processor = seeing.model(kind), seeing.processor(kind)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it 3?"}]
    text = {"id": "t", "task": "textvqa", "prompt": chat, "answers": ANSWERS}
    expected = answer(model, processor, kind, "", [], "<s>Be brief.<end><u>Is it 3?<end><a>")
    assert completions(evaluate(model, processor, [text], **SHORT)) == [expected]
    several = [text, row(0, IMAGES[0]), text]
    assert completions(evaluate(model, processor, several, **SHORT)) == [
        expected,
        answer(model, processor, kind, QUESTIONS[0], [IMAGES[0]]),
        expected,
    ]


@every_kind
def test_a_template_that_reads_parts_alone_loses_no_text(kind):
    processor = seeing.processor(kind)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for reader in (processor, processor.tokenizer):
        assert prompt_text(reader, chat) == "<s>s<end><u>u<end><a>"
    assert chat[1]["content"] == "u"  # what was given stays as it was
    processor.chat_template = None  # the tokenizer has one
    assert prompt_text(processor, chat) == "<s>s<end><u>u<end><a>"
    processor.tokenizer.chat_template = None
    assert prompt_text(processor, chat) == "s\nu\n"
    assert prompt_text(processor, seeing.asks(0, "u")) == "u\n"


@every_kind
def test_choices_score_as_in_plain_forwards_for_a_model_that_sees(kind):
    model, processor = seeing.model(kind), seeing.processor(kind)
    rows = [
        {"prompt": [{"role": "user", "content": "what falls?"}], "choices": ["rain", "a stone"]},
        {"prompt": "2=", "choices": ["4"]},
    ]
    ids = [processor.tokenizer(text).input_ids for text in ("<u>what falls?<end><a>", "2=")]
    for reader in (processor, processor.tokenizer):
        with torch.no_grad():
            scores = choice_logps(model, reader, rows)
            for one, prompt, logps in zip(rows, ids, scores, strict=True):
                choices = [processor.tokenizer(text).input_ids for text in one["choices"]]
                expected = torch.stack([oracle.logps(model, prompt, choice).sum() for choice in choices])
                close(logps[: len(choices)], expected)


def test_the_accuracy_is_the_mean_vqa_accuracy():
    model, processor = seeing.model(), seeing.processor()
    said = completions(evaluate(model, processor, rows(), **SHORT))
    people = [[said[0]] * 2 + ["no"] * 8, [said[1]] * 4 + ["no"] * 6, ["no"] * 10]
    graded = [{**one, "answers": answers} for one, answers in zip(rows(), people, strict=True)]
    summary = evaluate(model, processor, graded, **SHORT)
    assert [record["score"] for record in summary.records] == pytest.approx([2 / 3, 1.0, 0.0])
    assert [record["right"] for record in summary.records] == [False, True, False]
    assert summary.accuracy == pytest.approx(5 / 9) and summary.interval == pytest.approx(wilson(5 / 3, 3))
    for one, record in zip(graded, summary.records, strict=True):
        assert record["score"] == vqa_accuracy(record["completion"], one["answers"])
    nothing = evaluate(model, processor, [{**one, "answers": ["no"]} for one in rows()], **SHORT)
    assert paired_difference(summary, nothing)[0] == pytest.approx(5 / 9)


def image_rows(**more):
    return [row(0, IMAGES[0], **more)]


@pytest.mark.parametrize(
    "given, message",
    [
        (image_rows(choices=["a", "b"], label=0), "'textvqa-0' has an image: log-likelihoods are those of texts"),
        (image_rows(prompt="What is it?"), "'textvqa-0' has 0 image parts .* and 1 images.* a list of messages"),
        ([row(0, {"path": "gone.png", "bytes": None})], "'textvqa-0' has an image that cannot be read: .*'gone.png'"),
        ([row(0, None, picture=IMAGES[0])], r"1 image parts in its prompt and 0 images: .*'image' or .*picture"),
        (image_rows(images=[*IMAGES]), "1 image parts in its prompt and 2 images"),
        ([row(0, {"path": None, "bytes": None})], "'textvqa-0' has an image that cannot be read"),
        ([row(0, {"path": None, "bytes": b"no picture"})], "'textvqa-0' has an image that cannot be read"),
        (
            [row(0, {"path": None, "bytes": png(IMAGES[0])[:60]})],
            "'textvqa-0' has an image that cannot be read",
        ),
        ([row(0, 3)], "'textvqa-0' has an image that cannot be read"),
    ],
)
def test_a_row_that_cannot_be_seen_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        evaluate(seeing.model(), seeing.processor(), given, **SHORT)


def test_images_need_a_processor():
    with pytest.raises(ValueError, match=r"has an image, which a tokenizer cannot.*AutoProcessor"):
        evaluate(tiny_model(), tiny_tokenizer(), image_rows(), **SHORT)
