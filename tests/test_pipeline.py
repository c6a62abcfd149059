# SPDX-License-Identifier: Apache-2.0
"""Laws of `pipeline("transformer2", ...)`: text-generation's inputs and outputs, and one more key if asked for."""

import logging
import threading

import pytest
import tiny_experts
import torch
from tiny_experts import GREEDY, alone, assert_same, base, state, write
from tiny_model import tiny_tokenizer
from torch.utils.data import Dataset
from transformers import GenerationConfig, TextIteratorStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from peft_svf import Mixture, Transformer2Model, Transformer2Pipeline, files
from peft_svf.adaptation import FirstPass

TEXTS = ["What is 3 + 4?", "def", "Tell me a story."]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
HISTORY = [{"role": "system", "content": "Be brief."}, *CHATS[1], {"role": "assistant", "content": "pass"}, *CHATS[0]]
INPUTS = {
    "text": TEXTS[0],
    "texts": TEXTS,
    "chat": CHATS[0],
    "history": HISTORY,
    "chats": CHATS,
    "one in a list": TEXTS[:1],
}
OPTIONS = {
    "default": {},
    "batch of 3": {"batch_size": 3},
    "batch of 2": {"batch_size": 2},
    "new text": {"return_full_text": False},
    "tensors": {"return_tensors": True},
    "sequences": {"num_beams": 2, "num_return_sequences": 2},
    "sequences in batches": {"num_beams": 2, "num_return_sequences": 2, "batch_size": 3},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
}
NAMES = ["code", "math", "other"]


def make(folders, **kwargs):
    paths = [folders["math"], folders["code"]]
    given = {"model": base(), "tokenizer": tiny_tokenizer(), "experts": paths, "classifier": folders["kinds"]} | kwargs
    return pipeline("transformer2", **given)


@pytest.fixture(scope="module")
def pipe(folders):
    return make(folders)


@pytest.fixture(scope="module")
def stock():
    return pipeline("text-generation", model=base(), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def stock_math(folders):
    """What text-generation answers with the expert alone."""
    return pipeline("text-generation", model=alone(folders["math"]).base_model.model, tokenizer=tiny_tokenizer())


# --- outputs


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("inputs", [TEXTS, CHATS], ids=["texts", "chats"])
@pytest.mark.parametrize(
    "chosen",
    [{"expert": ["math", "other", "code"]}, {"mixture": [{"math": 0.6}, Mixture({"code": 1.0}), {}]}],
    ids=["expert", "mixture"],
)
def test_a_list_gives_each_prompt_its_own_choice(chosen, inputs, batch_size, pipe):
    ((kind, each),) = chosen.items()
    expected = [pipe(prompt, **{kind: one}, **GREEDY) for prompt, one in zip(inputs, each, strict=True)]
    assert len({str(answer[0]["generated_text"])[-9:] for answer in expected}) == 3
    assert pipe(inputs, batch_size=batch_size, **chosen, **GREEDY) == expected


def more_options(tokenizer):
    """What else a call of text-generation may say."""
    return {
        "generation config": {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False)},
        "long generation config": {"generation_config": GenerationConfig(max_new_tokens=33, do_sample=False)},
        "stop strings": GREEDY | {"stop_strings": ["a", "8"], "tokenizer": tokenizer},
        "stop sequence": GREEDY | {"stop_sequence": "a"},
        "maximal length": {"max_length": 40, "do_sample": False},
        "prefix": GREEDY | {"prefix": "go on: "},
        "shorter prompts": GREEDY | {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 4}},
        "special tokens": GREEDY | {"skip_special_tokens": False, "add_special_tokens": True},
        "text": GREEDY | {"return_text": True, "clean_up_tokenization_spaces": True},
        "no workers": GREEDY | {"num_workers": 0, "batch_size": 2},
        "sampling": {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7},
    }


CALLS = [(inputs, "default") for inputs in INPUTS]
CALLS += [(inputs, options) for inputs in ("text", "texts", "chats") for options in OPTIONS if options != "default"]
CALLS += [(inputs, options) for inputs in ("texts", "chats") for options in more_options(None)]


@pytest.mark.parametrize("inputs, options", CALLS)
def test_an_expert_answers_as_text_generation_on_its_weights_and_other_on_the_base(
    inputs, options, pipe, stock, stock_math
):
    answers = []
    for name, own in (("other", stock), ("math", stock_math)):
        settings = GREEDY | OPTIONS[options] if options in OPTIONS else more_options(own.tokenizer)[options]
        if name == "math" and options == "scores":
            continue  # the same within rounding: test_two_pass compares logits
        torch.manual_seed(3)
        answers.append(own(INPUTS[inputs], **settings))
        torch.manual_seed(3)
        assert pipe(INPUTS[inputs], expert=name, **settings) == answers[-1]
    assert len(answers) == 1 or answers[0] != answers[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"assistant_model": base(seed=7)},
        {"device": "cpu", "dtype": torch.float32},
        {"batch_size": 2, "num_workers": 0, "return_full_text": False, "num_beams": 2},
    ],
    ids=str,
)
def test_what_the_constructor_takes_is_text_generations(arguments, folders):
    stock = pipeline("text-generation", model=base(), tokenizer=tiny_tokenizer(), **arguments)
    for inputs in TEXTS if "assistant_model" in arguments else (TEXTS, CHATS):
        assert make(folders, **arguments)(inputs, expert="other", **GREEDY) == stock(inputs, **GREEDY)


# --- return_dispatch


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("inputs", ["text", "texts", "chat", "chats"])
def test_each_prompt_is_answered_with_its_own_decision_which_can_be_returned(inputs, batch_size, pipe):
    given = INPUTS[inputs]
    several = inputs.endswith("s")
    decided = pipe.model.first_pass(given if several else [given])
    assert len({mixture.choice for mixture in decided}) > several, (
        "the tiny model chooses one for all: choose other seeds"
    )
    plain = [pipe(x, mixture=m, **GREEDY) for x, m in zip(given if several else [given], decided, strict=True)]
    plain = plain if several else plain[0]
    assert pipe(given, batch_size=batch_size, **GREEDY) == plain
    found = pipe(given, batch_size=batch_size, return_dispatch=True, **GREEDY)
    records = [record.pop("dispatch") for (record,) in (found if several else [found])]
    assert found == plain
    for record, mixture in zip(records, decided, strict=True):
        expected = mixture.record()
        assert list(record) == list(expected) == ["choice", "confidence", "probabilities", "alpha"]
        assert record["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
        assert (record["choice"], record["alpha"]) == (expected["choice"], expected["alpha"])


def test_the_decision_beside_tensors(pipe):
    (output,) = pipe(TEXTS[0], return_tensors=True, return_dispatch=True, **GREEDY)
    assert sorted(output) == ["dispatch", "generated_token_ids"]


# --- choices

WORDS = ["yes", "no", "7"]
BY_ROW = [["7", "8"], ["pass", "return", "yield"], ["Once", "No"]]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("inputs", ["text", "texts", "chat", "chats", "history"])
def test_choices_are_answered_with_probabilities_however_prompts_come(inputs, batch_size, pipe):
    given = INPUTS[inputs]
    several = inputs.endswith("s")
    for choices in (WORDS, BY_ROW) if several else (WORDS,):
        expected, mixtures = pipe.model.choose(given if several else [given], choices)
        outputs = pipe(given, choices=choices, batch_size=batch_size, return_dispatch=True, **GREEDY)
        for (output,), record, mixture in zip(outputs if several else [outputs], expected, mixtures, strict=True):
            dispatch = output.pop("dispatch")
            assert dispatch["choice"] == mixture.choice and dispatch["alpha"] == mixture.alpha
            assert list(output) == ["choice", "confidence", "probabilities"]
            assert output["choice"] == record["choice"]
            assert output["probabilities"] == pytest.approx(record["probabilities"], abs=1e-5)


def test_choices_go_with_experts_generators_and_what_else_a_prompt_begins_with(pipe, monkeypatch):
    expert = ["math", "other", "code"]
    expected, _ = pipe.model.choose(TEXTS, BY_ROW, expert=expert)
    found = pipe(TEXTS, choices=BY_ROW, expert=expert, batch_size=2)
    for (one,), other in zip(found, expected, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    lazily = list(pipe((text for text in TEXTS), choices=WORDS, expert="math"))
    assert lazily == pipe(TEXTS, choices=WORDS, expert="math")
    prefilled = [*CHATS[0], {"role": "assistant", "content": "It is "}]
    (begun,) = pipe(prefilled, choices=WORDS, expert="math")
    (plain,) = pipe(CHATS[0], choices=WORDS, expert="math")
    assert begun["probabilities"] != pytest.approx(plain["probabilities"], abs=1e-3)
    monkeypatch.setattr(pipe.tokenizer, "chat_template", TEMPLATE)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    (with_tools,) = pipe(CHATS[0], choices=WORDS, expert="math", tools=tools)
    assert with_tools["probabilities"] != pytest.approx(plain["probabilities"], abs=1e-3)


# --- other ways in


def test_a_streamed_answer_is_the_second_pass_alone(pipe):
    for prompt in (TEXTS[0], CHATS[0]):
        expected = pipe(prompt, return_full_text=False, **GREEDY)[0]["generated_text"]
        streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = threading.Thread(target=pipe, args=(prompt,), kwargs={"streamer": streamer, **GREEDY})
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text == expected


TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<end>{% endfor %}<a>"
)


def test_system_prompts_and_tools_stand_before_the_second_pass_and_not_before_the_first(pipe, stock, monkeypatch):
    def add(a: int, b: int) -> int:
        """
        Add.

        Args:
            a: One.
            b: Other.
        """

    for tokenizer in (pipe.tokenizer, stock.tokenizer):
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    chats = [[{"role": "system", "content": "Be brief."}, *chat] for chat in CHATS]
    plain = pipe(chats, batch_size=2, expert="other", **GREEDY)
    with_tools = pipe(chats, batch_size=2, expert="other", tools=[add], **GREEDY)
    assert with_tools == stock(chats, tools=[add], **GREEDY) != plain
    found = pipe(chats, batch_size=3, tools=[add], return_dispatch=True, **GREEDY)
    decided = pipe.model.first_pass(CHATS)
    assert [row[0]["dispatch"]["choice"] for row in found] == [mixture.choice for mixture in decided]


class Prompts(Dataset):
    def __init__(self, prompts):
        self.prompts = prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return self.prompts[index]


def test_generators_and_datasets_are_answered_one_by_one_and_lazily(pipe):
    for prompts in (TEXTS, CHATS):
        expected = pipe(prompts, **GREEDY)
        read = []

        def lazily(prompts=prompts, read=read):
            for prompt in prompts:
                read.append(prompt)
                yield prompt

        answers = iter(pipe(lazily(), **GREEDY))
        assert next(answers) == expected[0] and len(read) < len(prompts)
        assert list(answers) == expected[1:]
        assert list(pipe(lazily(), batch_size=3, **GREEDY)) == expected
    expected = pipe(TEXTS, expert="math", **GREEDY)
    column = KeyDataset([{"prompt": text} for text in TEXTS], "prompt")
    for dataset in (Prompts(TEXTS), column):
        assert list(pipe(dataset, batch_size=2, expert="math", **GREEDY)) == expected
    assert pipe(column, expert=["math"] * 3, batch_size=2, **GREEDY) == expected


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on fork
def test_a_choice_stays_with_its_prompt_through_worker_processes(pipe):
    for prompts in (TEXTS, CHATS):
        settings = GREEDY | {"expert": ["math", "other", "code"], "batch_size": 2}
        assert pipe(prompts, num_workers=1, **settings) == pipe(prompts, **settings)


def test_options_of_the_constructor_hold_until_a_call_replaces_them(folders, pipe):
    def choices(records):
        return [row[0]["dispatch"]["choice"] for row in records]

    fixed = make(folders, expert="math", return_dispatch=True, batch_size=3, **GREEDY)
    assert fixed(TEXTS, return_dispatch=False) == pipe(TEXTS, expert="math", **GREEDY)
    assert choices(fixed(TEXTS)) == ["math"] * 3 and choices(fixed(TEXTS, expert="code")) == ["code"] * 3
    mixtures = [{"code": 1.0}, {}, {"math": 1.0}]
    assert choices(fixed(TEXTS, mixture=mixtures)) == ["code", "other", "math"]
    by_prompt = make(folders, first_pass="prompt")
    expected = pipe(TEXTS, first_pass="prompt", return_dispatch=True, **GREEDY)
    assert by_prompt(TEXTS, return_dispatch=True, **GREEDY) == expected


def test_every_kind_of_model_makes_the_same_pipeline(folders, pipe, tmp_path):
    name = str(tmp_path / "base")
    base().save_pretrained(name)
    tiny_tokenizer().save_pretrained(name)
    paths = [write(tmp_path, expert, tiny_experts.SEEDS[expert], base(name=name)) for expert in ("math", "code")]
    by_name = dict(zip(["math", "code"], paths, strict=True))
    wrapped = Transformer2Model(base(), tiny_tokenizer(), [folders["math"], folders["code"]])
    pipelines = {
        "folder": pipeline("transformer2", model=name, experts=by_name, device_map="auto"),
        "no model": pipeline("transformer2", experts=paths, device="cpu"),
        "no model, from_pretrained": Transformer2Pipeline.from_pretrained(experts=paths),
        "limit": pipeline("transformer2", experts=by_name, limit_bytes=4 * 6 * 24),
        "Transformer2Model": pipeline("transformer2", model=wrapped, tokenizer=wrapped.tokenizer),
        "its own tokenizer": Transformer2Pipeline(wrapped),
    }
    expected = {expert: pipe(TEXTS, expert=expert, **GREEDY) for expert in NAMES}
    for way, made in pipelines.items():
        assert isinstance(made, Transformer2Pipeline) and made.task in ("transformer2", ""), way
        assert {expert: made(TEXTS, expert=expert, **GREEDY) for expert in NAMES} == expected, way
    assert pipelines["limit"].model.library.nbytes == 4 * 6 * 24
    adapted = alone(folders["math"])
    adapted.load_adapter(str(folders["code"]), adapter_name="code")
    peft_model = pipeline("transformer2", model=adapted, tokenizer=tiny_tokenizer())
    assert peft_model.model.library.names == ["code", "default"]
    assert peft_model(TEXTS, expert="default", **GREEDY) == expected["math"]


def test_each_file_of_an_expert_is_opened_once(folders, tmp_path, monkeypatch):
    base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    names = ("math", "code")
    named = [write(tmp_path, name, i, base(name=str(tmp_path / "base"))) for i, name in enumerate(names)]
    opened, read = [], files.read_bytes
    monkeypatch.setattr(files, "read_bytes", lambda path, *limit: opened.append(path) or read(path, *limit))
    pipeline("transformer2", experts=named)(TEXTS, expert=["math", "code", "math"], **GREEDY)
    both = ("adapter_config.json", "adapter_model.safetensors")
    assert sorted(p for p in opened if p.name in both) == sorted(folder / file for folder in named for file in both)


def test_the_model_that_experts_name_is_loaded_as_the_call_asks(folders, tmp_path):
    base(seed=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    named = write(tmp_path, "math", 1, base(seed=3, name=str(tmp_path / "base")))
    half = FirstPass(threshold=0.5)
    settings = {"first_pass": half, "max_new_tokens": 3, "dtype": torch.bfloat16}
    pipe = pipeline("transformer2", experts=[named], return_dispatch=True, **settings)
    assert pipe.model.dtype == torch.bfloat16 and pipe.model.default_first_pass is half
    (output,) = pipe("x", expert="math", do_sample=False)
    assert output["dispatch"]["choice"] == "math" and len(output["generated_text"]) <= 4


# --- what is refused


@pytest.mark.parametrize(
    "inputs, chosen, message",
    [
        (TEXTS, {"expert": ["math"]}, "There are 3 prompts, but experts or mixtures for 1"),
        (TEXTS[0], {"expert": ["math", "code"]}, "There are 1 prompts, but experts or mixtures for 2"),
        (HISTORY, {"mixture": [{}] * 4}, "There are 1 prompts, but experts or mixtures for 4"),
        (TEXTS, {"expert": ["math", "maths", "other"]}, "no expert 'maths'"),
        (TEXTS, {"expert": "math", "mixture": {"math": 1.0}}, "not both"),
        (TEXTS, {"expert": ["math"] * 3, "mixture": {"math": 1.0}}, "not both"),
        (TEXTS, {"choices": [["a", "b"]] * 2}, "There are 3 prompts, but choices for 2"),
        (TEXTS[0], {"choices": [1, 2]}, "'choices' must be a list of texts"),
        ("x" * 600, {}, "The prompt has 600 tokens, but the model's context is 512"),
    ],
)
def test_a_call_that_cannot_be_is_refused(inputs, chosen, message, pipe):
    before = state(pipe.model.library.model)
    with pytest.raises(ValueError, match=message):
        pipe(inputs, **chosen, **GREEDY)
    assert_same(pipe.model.library.model, before)


def test_what_a_transformer2_model_has_already_is_not_taken_twice(folders, pipe):
    several = {"experts": [folders["math"]], "classifier": folders["kinds"], "first_pass": "prompt", "limit_bytes": 1}
    for name, value in several.items():
        with pytest.raises(ValueError, match="has its experts and the settings of the first pass"):
            Transformer2Pipeline(pipe.model, **{name: value})


def test_a_pipeline_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"name no base model. Write pipeline\(\"transformer2\", model=\"<base"):
        pipeline("transformer2")
    model = base()
    before = state(model)
    with pytest.raises(ValueError, match="no experts"):
        pipeline("transformer2", model=model, tokenizer=tiny_tokenizer())
    assert_same(model, before)


# --- compiled


def test_a_compiled_model_answers_alike_and_has_no_graph_per_expert(graphs, folders, pipe):
    model = base()
    model.compile(backend=graphs.backend, dynamic=True)
    with pytest.raises(ValueError, match=r"wrapped hides its modules.*model\.compile\(\)"):
        Transformer2Model(torch.compile(model, backend=graphs.backend), tiny_tokenizer(), [folders["math"]])
    compiled = make(folders, model=model)
    counts = []
    for name in ("math", "code"):
        assert compiled(TEXTS[0], expert=name, **GREEDY) == pipe(TEXTS[0], expert=name, **GREEDY)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


def test_a_text_to_a_model_of_chats_is_warned_of_once(folders, caplog):
    logging.Logger.warning_once.cache_clear()  # transformers' method
    pipe, tokenizer = make(folders), tiny_tokenizer()
    templated = tokenizer.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True)
    pipe([CHATS[0]], **GREEDY)
    pipe(templated, **GREEDY)
    assert "reads chats" not in caplog.text
    pipe(TEXTS, **GREEDY)
    pipe(TEXTS[0], choices=["a", "b"])
    assert caplog.text.count("reads chats") == 1


def test_a_model_without_its_tokenizer_is_refused(folders):
    with pytest.raises(ValueError, match="Pass the model's tokenizer too"):
        make(folders, tokenizer=None)
