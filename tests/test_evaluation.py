# SPDX-License-Identifier: Apache-2.0
"""Laws of scoring: log-likelihoods of choices against plain forwards, and the arithmetic of a summary."""

import contextlib
import inspect
import math
from types import SimpleNamespace

import oracle
import pico
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny_model import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from peft_svf import SVFConfig, evaluation
from peft_svf.evaluation import BaseText, Summary, choice_logps, complete, evaluate, paired_difference, wilson
from peft_svf.evaluation.reading import cache_name
from peft_svf.rows import check, prompt_text
from peft_svf.rows import prompt_ids as encoded_prompts
from peft_svf.tasks import get_task
from peft_svf.tuner.layer import svf_layers
from peft_svf.tuner.rows import active_rows

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


def chat(text):
    return [{"role": "user", "content": text}]


ROWS = [
    {"id": "a", "prompt": chat("what falls from clouds?"), "choices": ["rain", "a stone", "sand", "fish"], "label": 0},
    {"id": "b", "prompt": chat("2+2"), "choices": ["4", "22"], "label": 0},
    {"id": "c", "prompt": chat("which one is a metal"), "choices": ["x", "y", "iron"], "label": 2},
    {"id": "d", "prompt": "a plain text, no chat", "choices": ["only this"], "label": 0},
]


def build(kind="llama", dtype=torch.float32, **kwargs):
    """A tiny model that reads `TOKENIZER`; contexts have 64 tokens."""
    return pico.build(kind, dtype=dtype, vocabulary=len(TOKENIZER), **kwargs)


def ids_of(text):
    return TOKENIZER.convert_tokens_to_ids(list(text))


def prompt_ids(row):
    if isinstance(row["prompt"], str):
        return ids_of(row["prompt"])
    user, answer = TOKENIZER.convert_tokens_to_ids(["<u>", "<a>"])
    return [user, *ids_of(row["prompt"][0]["content"]), END, answer]


def plain_logps(model, row, end=()):
    return torch.stack([oracle.logps(model, prompt_ids(row), [*ids_of(t), *end]).sum() for t in row["choices"]])


def close(scores, expected, dtype=torch.float32):
    tolerance = {"rtol": 1e-5, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    torch.testing.assert_close(scores.double(), expected.double(), **tolerance)


def assert_plain(model, rows, dtype=torch.float32):
    """Compare a batch with plain forwards, and return its scores."""
    with torch.no_grad():
        scores = choice_logps(model, TOKENIZER, rows)
        for row, logps in zip(rows, scores, strict=True):
            close(logps[: len(row["choices"])], plain_logps(model, row), dtype)
    return scores


# --- the log-likelihoods

CASES = {
    **{kind: (kind, {}, ROWS) for kind in pico.CAUSAL},
    "bfloat16": ("llama", {"dtype": torch.bfloat16}, ROWS),
    "a prompt longer than the sliding window": ("gemma3_text", {"sliding_window": 8}, ROWS),
    "a long prompt beside a long choice": (
        "gpt2",
        {},
        [{"prompt": "a" * 60, "choices": ["bc", "f"]}, {"prompt": "ab", "choices": ["c" * 40, "d"]}],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_choices_score_as_in_plain_forwards(case):
    kind, settings, rows = CASES[case]
    scores = assert_plain(build(kind, **settings), rows, settings.get("dtype", torch.float32))
    most = max(len(row["choices"]) for row in rows)
    absent = torch.tensor([[k >= len(row["choices"]) for k in range(most)] for row in rows])
    assert scores.dtype == torch.float32 and torch.equal(scores == -math.inf, absent)


@pytest.mark.parametrize("choices", [["4", "48"], ["48", "4", "5"]])
def test_where_a_choice_begins_another_all_of_that_row_end_with_the_end_of_turn(choices):
    model = build()
    row = {"id": "n", "prompt": chat("6*8"), "choices": choices}
    with torch.no_grad():
        found = choice_logps(model, TOKENIZER, [row, ROWS[0]])
        close(found[0, : len(choices)], plain_logps(model, row, end=[END]))
        close(found[1], plain_logps(model, ROWS[0]))  # no other row is touched


def test_gradients_are_those_of_the_plain_forwards():
    model = get_peft_model(build(), SVFConfig(init_weights=False))
    offsets = [p for p in model.parameters() if p.requires_grad]
    draws = torch.Generator().manual_seed(1)
    total = plain_total = torch.tensor(0.0)
    for row, logps in zip(ROWS, choice_logps(model, TOKENIZER, ROWS), strict=True):
        weights = torch.randn(len(row["choices"]), generator=draws)
        total = total + (weights * logps[: len(row["choices"])]).sum()
        plain_total = plain_total + (weights * plain_logps(model, row)).sum()
    for one, other in zip(torch.autograd.grad(total, offsets), torch.autograd.grad(plain_total, offsets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "opt"])  # OPT flattens batch and tokens before its MLP
def test_members_of_a_batch_score_all_rows_as_one_by_one(kind):
    model = get_peft_model(build(kind), SVFConfig(init_weights=False))
    model.add_adapter("other", SVFConfig(init_weights=False))
    names = ["other", "__base__", "default", "other"]
    layers = pico.svf_layers(model)
    offsets = {name: layer.named_offsets(names) for name, layer in layers.items()}
    with torch.no_grad(), active_rows(layers, offsets):
        found = choice_logps(model, TOKENIZER, ROWS, len(names))
    for i, name in enumerate(names):
        with torch.no_grad(), model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            for row, logps in zip(ROWS, found[i * len(ROWS) : (i + 1) * len(ROWS)], strict=True):
                close(logps[: len(row["choices"])], plain_logps(model, row))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_what_prompts_begin_with_is_read_once_and_changes_nothing(kind):
    model = build(kind)
    rows = [{**row, "prompt": f"all begin alike: {i * 'so'}"} for i, row in enumerate(ROWS)]  # the first has no more
    one = choice_logps(model, TOKENIZER, rows)
    alone = [choice_logps(model, TOKENIZER, [row])[0] for row in rows]
    other = torch.stack([F.pad(logps, (0, one.shape[1] - len(logps)), value=float("-inf")) for logps in alone])
    close(one, other)
    weight = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(logps.clamp(min=-1e4).sum(), weight)[0] for logps in (one, other)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


def test_a_prompt_may_fill_the_context_and_not_exceed_it():
    model = build("gpt2")  # learned positions, 64 of them
    fits = {"id": "fits", "prompt": "a" * 60, "choices": ["bcde", "f"]}
    assert_plain(model, [fits])
    with pytest.raises(ValueError, match=r"65 tokens, but the model's context is 64"):
        choice_logps(model, TOKENIZER, [{**fits, "choices": ["bcdef", "f"]}])


BROKEN = {
    "choices' must be a list of texts": [{"choices": []}, {"choices": ["a", ""]}, {"choices": "ab"}, {"choices": [1]}],
    "choices' has 'a' twice": [{"choices": ["a", "b", "a"]}],
    "label' must be an index from 0 to 1": [{"label": -1}, {"label": 2}, {"label": True}, {"label": "a"}],
    "prompt' is empty": [{"prompt": " "}, {"prompt": chat("")}, {"prompt": [{"role": "user", "content": None}]}],
    "prompt' must be a": [
        {"prompt": prompt}
        for prompt in (None, 3, [], ["hi"], [{"role": "user"}], [{"role": "user", "content": ["a"]}])
    ],
}


@pytest.mark.parametrize("message, change", [(message, change) for message in BROKEN for change in BROKEN[message]])
def test_a_row_that_breaks_the_schema_is_refused_by_name(message, change):
    row = {"id": "x", "prompt": "which?", "choices": ["a", "b"], "label": 0} | change
    with pytest.raises(ValueError, match=f"^Row 'x': .*{message}"):
        evaluate(None, TOKENIZER, [row])


@pytest.mark.parametrize(
    "change", [{"choices": ["a"]}, {"label": None}, {"choices": None}, {"choices": None, "answer": " "}]
)
def test_a_row_that_must_be_answered_needs_its_answer(change):
    row = {"prompt": "which?", "choices": ["a", "b"], "label": 0} | change
    check(row, "Line 3")
    with pytest.raises(ValueError, match=r"^Line 3: "):
        check(row, "Line 3", answered=True)
    for answer in ("a", 4, 0.5):
        check({"prompt": "which?", "answer": answer}, "Line 3", answered=True)
    with pytest.raises(ValueError, match="Line 3: expected an object with 'prompt', got list"):
        check(["which?"], "Line 3")


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_in_and_out_by_the_name_that_forward_gives_it(name, monkeypatch):
    model = build()
    expected = [plain_logps(model, row) for row in ROWS]
    plain, own = model.forward, cache_name(model)
    signature = inspect.signature(plain)

    def forward(**kwargs):
        output = plain(**{own: kwargs.pop(name)}, **kwargs)
        return SimpleNamespace(logits=output.logits, **{name: output[own]})

    named = [p.replace(name=name) if p.name == own else p for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=named)
    monkeypatch.setattr(model, "forward", forward)
    with torch.no_grad():
        for logps, choices in zip(choice_logps(model, TOKENIZER, ROWS), expected, strict=True):
            close(logps[: len(choices)], choices)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("choices", [["a", "b"], ["abc", "b"]])
def test_gradient_checkpointing_is_refused_while_training(kind, choices):
    model = get_peft_model(build(kind), SVFConfig())
    pico.checkpoint(model.get_base_model())
    row = {"id": "r", "prompt": "abc", "choices": choices}
    with torch.no_grad():
        model.eval()  # transformers checkpoints only while training
        close(choice_logps(model, TOKENIZER, [row])[0], plain_logps(model, row))
    model.train()
    with pytest.raises(ValueError, match="turn gradient checkpointing off"):
        choice_logps(model, TOKENIZER, [row])


def test_a_chat_without_a_template_is_its_lines():
    bare = tiny_tokenizer()
    bare.chat_template = None
    assert prompt_text(bare, [{"role": "system", "content": "s"}, *chat("u")]) == "s\nu\n"
    assert prompt_text(TOKENIZER, chat("u")) == "<u>u<end><a>"
    assert prompt_text(TOKENIZER, "as it is") == "as it is"


def test_a_text_begins_with_the_tokenizer_s_own_tokens_and_a_chat_with_its_template_s():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<s>"
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    encoded = [tokenizer.convert_ids_to_tokens(ids) for ids in encoded_prompts(tokenizer, ["ab", chat("b?")])]
    assert encoded == [["<s>", "a", "b"], ["<u>", "b", "?", "<end>", "<a>"]]


# --- evaluate


def numbered(n):
    """Rows whose prompts' lengths are in no order."""
    return [
        {"id": i, "prompt": "q" * (1 + 7 * i % 11), "choices": [f"a{i}", f"b{i}", "c"], "label": i % 3, "task": "t"}
        for i in range(n)
    ]


def test_records_stand_in_the_order_of_the_rows():
    model, rows = tiny_model(), numbered(10)
    summary = evaluate(model, TOKENIZER, rows, batch_size=3)
    assert [record["id"] for record in summary.records] == list(range(10))
    with torch.no_grad():
        policy = torch.stack([plain_logps(model, row) for row in rows]).softmax(-1)
    best = policy.max(-1)
    assert [record["choice"] for record in summary.records] == best.indices.tolist()
    close(torch.tensor([record["probability"] for record in summary.records]), best.values)
    right = [k == row["label"] for row, k in zip(rows, best.indices.tolist(), strict=True)]
    assert [record["right"] for record in summary.records] == right
    assert summary.accuracy == sum(right) / 10
    assert summary.interval == wilson(sum(right), 10)
    assert (summary.task, summary.form, summary.n) == ("t", "choice", 10)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_mode_as_it_was_and_builds_no_graph(training):
    model = get_peft_model(tiny_model(), SVFConfig(init_weights=False)).train(training)
    evaluate(model, TOKENIZER, numbered(3))
    assert model.training is training and all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="has an image"):
        evaluate(model, TOKENIZER, [{**numbered(1)[0], "image": "a.png"}])
    assert model.training is training
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate(model, TOKENIZER, [])


def greedy(model, row, new_tokens):
    return TOKENIZER.decode(oracle.greedy(model, prompt_ids(row), new_tokens, END), skip_special_tokens=True)


def test_generated_rows_are_scored_on_greedy_completions():
    model, task = tiny_model(), get_task("svamp")
    rows = [{"id": i, "prompt": chat("q" * n), "answer": "5", "task": "svamp"} for i, n in enumerate([9, 2, 5, 30])]
    summary = evaluate(model, TOKENIZER, rows, batch_size=2, max_new_tokens=6)
    assert (summary.form, [record["id"] for record in summary.records]) == ("generate", [0, 1, 2, 3])
    for row, record in zip(rows, summary.records, strict=True):
        assert record["completion"] == greedy(model, row, 6)
        assert record["score"] == task.score(record["completion"], row)


def science(n):
    raw = {"question": "what falls?", "choices": ["rain", "x", "y", "z"], "answer": 0}
    return [get_task("arc_easy").make_row({**raw, "id": str(i)}, "letter", seed=i) for i in range(n)]


def test_asked_in_all_rotations_a_policy_of_one_letter_is_right_once_on_each_question(monkeypatch):
    monkeypatch.setattr(evaluation, "complete", lambda model, reader, prompts, **kwargs: ["A"] * len(prompts))
    summary = evaluate(tiny_model(), TOKENIZER, science(10), rotations=4)
    assert (summary.form, summary.n, summary.accuracy, summary.interval) == ("letter", 10, 0.25, wilson(2.5, 10))
    assert [record["completions"] for record in summary.records] == [["A"] * 4] * 10
    assert summary.classes["A"] == {"n": 10, "right": 10, "answered": 40} and summary.balanced_accuracy == 0.25
    with pytest.raises(ValueError, match="no lettered options"):
        evaluate(tiny_model(), TOKENIZER, ROWS, rotations=2)


def test_balanced_accuracy_is_the_mean_of_the_recalls_of_classes(monkeypatch):
    texts = ["code"] * 9 + ["math"] + ["so: math", "code", "none", "code"]
    answers = ["code"] * 10 + ["math"] * 4
    rows = [{"id": i, "prompt": f"{i:02}", "answer": answer, "task": "dispatch"} for i, answer in enumerate(answers)]
    answer_of = {row["prompt"]: text for row, text in zip(rows, texts, strict=True)}
    monkeypatch.setattr(evaluation, "complete", lambda m, r, prompts, **kwargs: [answer_of[p] for p in prompts])
    summary = evaluate(tiny_model(), TOKENIZER, rows)
    assert summary.accuracy == 10 / 14 and summary.balanced_accuracy == pytest.approx((0.9 + 0.25) / 2)
    assert summary.classes["math"] == {"n": 4, "right": 1, "answered": 2}
    assert summary.to_json()["classes"]["code"] == {"n": 10, "right": 9, "answered": 11}
    assert evaluate(tiny_model(), TOKENIZER, rows[:9]).balanced_accuracy is None  # of a single class


def test_where_all_rows_have_the_same_choices_these_are_classes():
    rows = [{"id": i, "prompt": f"{i}", "choices": ["x", "y"][:: (-1) ** i], "label": 0} for i in range(12)]
    summary = evaluate(tiny_model(), TOKENIZER, rows)
    assert sum(counts["answered"] for counts in summary.classes.values()) == 12
    assert evaluate(tiny_model(), TOKENIZER, numbered(12)).classes == {}


@pytest.mark.parametrize("padding", ["pad", "end", "none"])
def test_prompts_of_different_lengths_are_completed_as_one_by_one_with_or_without_a_pad_token(padding):
    reader, model = tiny_tokenizer(), tiny_model()
    if padding != "pad":
        reader.pad_token = model.generation_config.pad_token_id = None
    if padding == "none":
        reader.eos_token = None
    prompts = [chat("q" * 9), "a plain text", chat("2+2")]
    expected = [greedy(model, {"prompt": prompt}, 6) for prompt in prompts]
    assert complete(model, reader, prompts, max_new_tokens=6) == expected
    settings = GenerationConfig(max_new_tokens=6, eos_token_id=END)  # without a pad token: a copy of it gets one
    assert complete(model, reader, prompts, generation_config=settings) == expected and settings.pad_token_id is None
    assert reader.pad_token_id == (0 if padding == "pad" else None)
    with pytest.raises(ValueError, match="Prompt 1 of the batch is empty"):
        complete(model, reader, ["a", ""])


def test_text_lost_is_how_much_less_likely_the_base_finds_its_own_answers():
    model = get_peft_model(tiny_model(), SVFConfig())
    prompts = [chat("hello"), chat("what falls?"), chat("2+2")]
    with model.disable_adapter():
        text = BaseText.of(model, TOKENIZER, [prompts[0][0]["content"], *prompts[1:]], tokens=6)
    answers = [greedy(model, {"prompt": prompt}, 6) for prompt in prompts]
    assert text.rows == [{"prompt": p, "choices": [a]} for p, a in zip(prompts, answers, strict=True)]

    def total():
        return sum(plain_logps(model, row).item() for row in text.rows)

    before = total()
    assert text.tokens == sum(map(len, answers)) and text.logp == pytest.approx(before / text.tokens, rel=1e-4)
    assert text.loss(model, TOKENIZER) == pytest.approx(0, abs=1e-6)
    for layer in svf_layers(model).values():
        layer.svf_offset["default"].weight.data.fill_(-0.9)
    assert text.loss(model, TOKENIZER) == pytest.approx(total() / before - 1, rel=1e-3)


# --- the arithmetic


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 10, 0.0179, 0.4042),
        (50, 100, 0.4038, 0.5962),
        (81, 263, 0.2553, 0.3662),  # this and the next three: Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_has_its_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


def summary_of(right, ids=None):
    records = [{"id": i if ids is None else ids[i], "right": bool(r)} for i, r in enumerate(right)]
    return Summary("t", "choice", len(right), 0.0, (0.0, 1.0), 0.0, records)


def test_paired_difference_by_hand():
    one, other = summary_of([1, 1, 0, 1, 0, 1, 1, 0]), summary_of([1, 0, 0, 0, 1, 0, 1, 0])
    gaps = [0, 1, 0, 1, -1, 1, 0, 0]
    mean = sum(gaps) / 8
    half = 1.959964 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 8) / math.sqrt(8)
    gain, interval = paired_difference(one, other)
    assert (gain, *interval) == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert paired_difference(other, one)[0] == -gain


def test_summaries_of_different_rows_do_not_compare():
    one = summary_of([1, 0, 1])
    others = summary_of([1, 0]), summary_of([1, 0, 1], ids=[0, 2, 1]), summary_of([1, 0, 1], ids=[0, 1, 9])
    for pair in ((summary_of([]), summary_of([])), *((one, other) for other in others)):
        with pytest.raises(ValueError, match="Only summaries of the same rows compare"):
            paired_difference(*pair)


def test_a_summary_is_json_with_and_without_its_records():
    summary = summary_of([1, 0])
    assert "records" not in summary.to_json()
    assert summary.to_json(records=True)["records"] == summary.records
    assert summary.to_json()["interval"] == (0.0, 1.0)


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_rows_that_are_all_alike_leave_an_interval_open_that_ends_at_one(n):
    right, wrong, half = summary_of([1] * n), summary_of([0] * n), min(1.0, 3 / n)
    assert paired_difference(right, right) == (0.0, (-half, half))
    assert paired_difference(right, wrong) == (1.0, (max(-1.0, 1 - 3 / n), 1.0))
    assert paired_difference(wrong, right) == (-1.0, (-1.0, min(1.0, -1 + 3 / n)))
