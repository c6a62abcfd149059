# SPDX-License-Identifier: Apache-2.0
"""Laws of the first pass: a deterministic and bounded decision that can be calibrated, and leaves the model alone."""

import math

import oracle
import pytest
import tiny_experts
import torch
from tiny_experts import alone, base
from tiny_model import tiny_tokenizer

from peft_svf import ExpertLibrary
from peft_svf.adaptation import FirstPass, Probe, dispatch, first_pass, fit_calibration, fit_probe, fit_temperature
from peft_svf.adaptation.first_pass import LABEL_TOKENS, QUESTION_TOKENS, boxed_prompt, kind_scores, read_boxed
from peft_svf.tasks import dispatch_prompt

PROMPTS = ["What is 3 + 4?", "def f(x):", "Tell me a story about a very old tree.", "7 * 6"]
KINDS = {"code": "about code", "math": "about math", "other": "anything else"}
NAMES = list(KINDS)

tokenizer = tiny_tokenizer()


def decide(library, prompts, batch_size=16, **settings):
    return dispatch(library, tokenizer, prompts, FirstPass(**settings), batch_size)


def user(text):
    return {"role": "user", "content": text}


@torch.no_grad()
def likelihood(model, start, text):
    start, answer = (tokenizer(part, add_special_tokens=False).input_ids for part in (start, text))
    return oracle.logps(model, start, answer).sum()


def by_names(model, prompt):
    """Log-likelihoods of the kinds' names as answers."""
    text = tokenizer.apply_chat_template(dispatch_prompt(prompt, KINDS), tokenize=False, add_generation_prompt=True)
    return torch.stack([likelihood(model, text, name) for name in KINDS])


def by_channel(model, prompt):
    """Log-likelihoods of a prompt after a system prompt for each kind."""
    found = []
    for what in KINDS.values():
        turns = [{"role": "system", "content": f"The user asks for {what}."}, user(prompt)]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        found.append(likelihood(model, text[: text.index(prompt)], prompt))
    return torch.stack(found)


def probabilities(mixtures):
    return torch.tensor([[m.probabilities[name] for name in NAMES] for m in mixtures], dtype=torch.float64)


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_a_decision_is_one_expert_or_none_with_probabilities_over_all(strategy, library):
    random = torch.get_rng_state()
    together = decide(library, PROMPTS, strategy=strategy)
    assert torch.equal(torch.get_rng_state(), random) and len(together) == len(PROMPTS)
    assert together == decide(library, PROMPTS, strategy=strategy) and decide(library, [], strategy=strategy) == []
    for mixture in together:
        assert mixture.alpha in ({}, {"math": 1.0}, {"code": 1.0}) and mixture.strategy == strategy
        assert list(mixture.probabilities) == NAMES and sum(mixture.probabilities.values()) == pytest.approx(1)
        best = max(mixture.probabilities.values())
        assert mixture.probabilities[mixture.choice] == best
        assert mixture.confidence == pytest.approx((best - 1 / 3) / (1 - 1 / 3)) and 0 <= mixture.confidence <= 1
    singles = [decide(library, [prompt], strategy=strategy)[0] for prompt in PROMPTS]
    for apart in (singles, decide(library, PROMPTS, 3, strategy=strategy)):
        torch.testing.assert_close(probabilities(apart), probabilities(together), atol=1e-4, rtol=0)
        assert [m.choice for m in apart] == [m.choice for m in together]


PROBE = Probe(("code", "math"), torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "magic"}, "no strategy='magic': choose one of 'key', 'prompt', 'classifier', 'probe'"),
        ({"read": "guess"}, "no read='guess': choose one of 'likelihood', 'channel', 'generate'"),
        ({"strategy": "probe"}, r"go together: fit one with fit_probe\(...\)"),
        ({"probe": PROBE}, "go together"),
        ({"strategy": "probe", "probe": PROBE, "read": "generate"}, "a probe reads hidden states"),
        ({"strategy": "probe", "probe": PROBE, "calibration": PROBE}, "Likelihoods alone are calibrated"),
        ({"read": "generate", "calibration": PROBE}, "Likelihoods alone are calibrated"),
        *[({"threshold": t}, f"a threshold of 0 or more.*; got {t} and 1.0") for t in (-0.1, math.nan)],
        *[({"temperature": t}, f"a positive temperature; got 0.0 and {t}") for t in (0.0, math.nan, math.inf)],
    ],
)
def test_settings_that_do_not_work_together_are_refused_before_any_model_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        FirstPass(**settings)


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"


@pytest.mark.parametrize(
    "template, prefix",
    [
        (None, "The user asks for sums.\n"),
        (REFUSING + "<u>{{ messages[0].content }}</u>", "<u>The user asks for sums.\n"),
        ("{% for m in messages[-1:] %}<u>{{ m.content }}{% endfor %}", "<u>The user asks for sums.\n"),  # drops it
    ],
)
def test_a_kind_is_announced_by_its_description_in_any_template(template, prefix, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert first_pass.channel_prompt(tokenizer, "math", "sums") == prefix
    assert first_pass.channel_prompt(tokenizer, "math", "") == prefix.replace("sums", "math")


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_names_are_read_by_the_likelihoods_of_the_base_or_of_the_classifier(strategy, library, folders):
    model = alone(folders["kinds"]) if strategy == "classifier" else base()
    logps = torch.stack([by_names(model, prompt) for prompt in PROMPTS])
    found = probabilities(decide(library, PROMPTS, strategy=strategy, read="likelihood"))
    torch.testing.assert_close(found, logps.softmax(-1), atol=1e-4, rtol=0)
    if strategy == "classifier":
        assert torch.equal(found, probabilities(decide(library, PROMPTS, strategy="classifier")))
        assert not torch.allclose(found, probabilities(decide(library, PROMPTS, read="likelihood")), atol=1e-2)


def test_the_prompt_strategy_reads_the_request_as_what_a_user_of_each_kind_says(library):
    logps = torch.stack([by_channel(base(), prompt) for prompt in PROMPTS])
    found = kind_scores(library, tokenizer, PROMPTS).double()
    torch.testing.assert_close(found, logps - logps.mean(-1, keepdim=True), atol=1e-3, rtol=0)
    assert torch.equal(kind_scores(library, tokenizer, PROMPTS, FirstPass(read="channel")).double(), found)
    for t in (0.5, 1.0, 3.0):
        shares = probabilities(decide(library, PROMPTS, temperature=t))
        torch.testing.assert_close(shares, (found / t).softmax(-1), atol=1e-6, rtol=0)
    assert decide(library, [PROMPTS[0], ""])[1].confidence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("read", ["likelihood", "channel"])
def test_batch_calibration_divides_by_the_mean_probability_of_each_kind(read, library, tmp_path):
    raw = kind_scores(library, tokenizer, PROMPTS, FirstPass(read=read)).double()
    fitted = fit_calibration(library, tokenizer, PROMPTS, first_pass=FirstPass(read=read))
    shares = raw.softmax(-1) / raw.softmax(-1).mean(0)
    fitted.save(tmp_path)
    found = probabilities(decide(library, PROMPTS, read=read, calibration=Probe.load(tmp_path)))
    torch.testing.assert_close(found, shares / shares.sum(-1, keepdim=True), atol=1e-4, rtol=0)


def test_a_calibration_to_known_kinds_makes_them_likelier(library):
    prompts, kinds = 3 * PROMPTS, 3 * ["math", "code", "other", "code"]
    fitted = fit_calibration(library, tokenizer, prompts, kinds)
    right = torch.tensor([NAMES.index(kind) for kind in kinds])
    before, after = (
        torch.nn.functional.cross_entropy(
            kind_scores(library, tokenizer, prompts, FirstPass(calibration=c)).double(), right
        )
        for c in (None, fitted)
    )
    assert after < before
    two = fit_calibration(library, tokenizer, PROMPTS, ["math", "other", "math", "other"])
    assert [m.probabilities["code"] for m in decide(library, PROMPTS, calibration=two)] == [0.0] * 4


def test_a_calibration_of_other_names_or_readings_is_refused(library, folders):
    fitted = fit_calibration(library, tokenizer, PROMPTS, first_pass=FirstPass(read="likelihood"))
    with pytest.raises(ValueError, match=r"fitted to .*'likelihood'.*, but this first pass has .*'channel'"):
        decide(library, PROMPTS, calibration=fitted)
    with pytest.raises(ValueError, match=r"fitted to .*'code'.*, but this first pass has .*.'math', 'other'."):
        fewer = ExpertLibrary(base(), [folders["math"]])
        decide(fewer, PROMPTS, read="likelihood", calibration=fitted)


def test_of_a_chat_only_the_last_user_message_is_read(library):
    text = PROMPTS[0]
    chats = [
        [user(text)],
        [{"role": "system", "content": "You write code."}, user("def f():"), user(text)],
        [user("def f():"), {"role": "assistant", "content": "pass"}, user(text)],
        [user(text), {"role": "assistant", "content": "The answer"}],
        [user([{"type": "image"}, {"type": "text", "text": text}])],
    ]
    found = probabilities(decide(library, [text, *chats], batch_size=1))
    assert all(torch.equal(row, found[0]) for row in found)


def test_a_long_prompt_is_read_up_to_a_bound(library):
    start = "abc " * (QUESTION_TOKENS // 4)
    assert len(tokenizer(start).input_ids) == QUESTION_TOKENS
    found = decide(library, [start, start + "x", start + "yz " * 5000], batch_size=1)
    assert found[0] == found[1] == found[2]
    assert decide(library, ["d" + start[1:]])[0] != found[0]


def test_a_fitted_temperature_makes_the_kinds_likelier(library):
    kinds = ["math", "code", "other", "code"]
    fitted = fit_temperature(library, tokenizer, PROMPTS, kinds)
    places = torch.tensor([NAMES.index(kind) for kind in kinds])
    scores = kind_scores(library, tokenizer, PROMPTS).double()

    def likelihood(t):  # a share of 1 / (4 + 2) of each label is spread
        logps = (scores / t).log_softmax(-1)
        return float((5 / 6 * logps[range(4), places] + logps.mean(-1) / 6).mean())

    assert all(likelihood(fitted) >= likelihood(fitted * factor) for factor in (0.7, 1.4))
    with pytest.raises(ValueError, match=r"There is no expert 'maths'; there are code, math, other"):
        fit_temperature(library, tokenizer, PROMPTS, ["maths"] * 4)
    for prompts, given, read in ((PROMPTS, kinds[:2], None), ([], [], None), (PROMPTS, kinds, "generate")):
        with pytest.raises(ValueError, match="prompts with one kind each, and a first pass that scores all"):
            fit_temperature(library, tokenizer, prompts, given, FirstPass(read=read))


@pytest.mark.parametrize("fallback", ["base", "mix"])
def test_a_soft_decision_weighs_by_probability_and_below_the_threshold_the_fallback_decides(fallback, library):
    free = decide(library, PROMPTS)
    for limit in (0.0, sorted(m.confidence for m in free)[2], 1.01):
        settings = {"threshold": limit, "fallback": fallback}
        hard, soft = (decide(library, PROMPTS, soft=soft, **settings) for soft in (False, True))
        for reference, mixture, mixed in zip(free, hard, soft, strict=True):
            weights = {name: p for name, p in reference.probabilities.items() if name != "other"}
            instead = weights if fallback == "mix" else {}
            sure = reference.confidence >= limit
            assert mixture.alpha == (reference.alpha if sure else instead)
            assert mixed.alpha == (weights if sure else instead)
            if sure:
                assert mixed.record() == {**mixture.record(), "alpha": weights}
            assert (mixture.confidence, mixture.probabilities) == (reference.confidence, reference.probabilities)


@pytest.mark.parametrize(
    "text, kind",
    [
        (r"It is \boxed{math}.", "math"),
        (r"\boxed{ 'Other' } or \boxed{math}", "other"),
        (r"$\boxed{\text{math}}$", "math"),
        (r"\boxed{maths}", None),
        (r"\boxed{math", None),
        ("math", None),
    ],
)
def test_a_boxed_kind_is_read(text, kind):
    assert read_boxed(text, NAMES) == kind


def test_the_written_form_takes_what_the_model_writes_and_else_the_base(library, monkeypatch):
    written = [r"\boxed{math}", "I think it is code.", r"\boxed{code}", r"\boxed{poems}"]
    shown = []

    def generate(self, input_ids, generation_config, **kwargs):
        shown.extend(tokenizer.batch_decode(input_ids, skip_special_tokens=False))
        assert generation_config.max_new_tokens == LABEL_TOKENS and not generation_config.do_sample
        texts = written[len(shown) - len(input_ids) : len(shown)]
        ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
        return torch.cat([input_ids, ids], dim=1)

    monkeypatch.setattr(type(library.model), "generate", generate)
    third = dict.fromkeys(NAMES, 1 / 3)
    mix = {"threshold": 0.1, "fallback": "mix"}
    for settings, unread in (({}, {}), ({"soft": True}, {}), (mix, {"code": 1 / 3, "math": 1 / 3})):
        shown.clear()
        mixtures = decide(library, PROMPTS, 3, read="generate", **settings)
        assert [m.alpha for m in mixtures] == [{"math": 1.0}, unread, {"code": 1.0}, unread]
        assert [m.confidence for m in mixtures] == pytest.approx([1.0, 0.0, 1.0, 0.0])
        assert mixtures[0].probabilities == {"code": 0.0, "math": 1.0, "other": 0.0}
        assert mixtures[1].probabilities == pytest.approx(third)
    for prompt, text in zip(PROMPTS, shown, strict=True):
        assert boxed_prompt(prompt, KINDS)[0]["content"] in text and "- code: about code" in text


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_the_written_form_is_greedy_and_one_by_one_what_it_is_in_a_batch(strategy, library, monkeypatch):
    monkeypatch.setattr(library.model.generation_config, "do_sample", True)  # the second pass samples
    together = decide(library, PROMPTS, strategy=strategy, read="generate")
    assert together == [decide(library, [p], strategy=strategy, read="generate")[0] for p in PROMPTS]
    assert all(m.strategy == strategy for m in together)


def test_a_first_pass_over_the_context_is_refused(folders, tmp_path):
    wordy = tiny_experts.write(tmp_path, "wordy", 5, description="word " * 120)
    long = ExpertLibrary(base(), [wordy])
    for settings in ({}, {"read": "generate"}):
        with pytest.raises(ValueError, match=r"tokens.* but the model's context is 512"):
            decide(long, PROMPTS, **settings)


FEW = {
    "math": ["1 + 1 = 2", "3 * 4 = 7", "9 - 2 = 1", "8 + 5 = 3"],
    "code": ["def f(x): pass", "for i in a: b", "import os; d()", "print(y or z)"],
    "other": ["Hello there you!", "How are you now?", "Tell me a story.", "What a nice day!"],
}
KNOWN = [(text, kind) for kind, texts in FEW.items() for text in texts]


def test_a_probe_names_the_kinds_it_was_fitted_to(library, tmp_path):
    texts, kinds = zip(*KNOWN, strict=True)
    probe = fit_probe(library, tokenizer, texts, kinds)
    found = decide(library, texts, strategy="probe", probe=probe)
    assert [m.choice for m in found] == list(kinds)
    assert all(list(m.probabilities) == NAMES and m.strategy == "probe" for m in found)
    probe.save(tmp_path)
    again = decide(library, texts, strategy="probe", probe=Probe.load(tmp_path), batch_size=5)
    torch.testing.assert_close(probabilities(again), probabilities(found), atol=1e-4, rtol=0)
    assert probe.provenance["base_model"] == tiny_experts.BASE and probe.provenance["kinds_listed"] == KINDS


def test_a_probe_gives_no_chance_to_a_kind_it_does_not_know(library):
    texts, kinds = zip(*[(text, kind) for text, kind in KNOWN if kind != "other"], strict=True)
    probe = fit_probe(library, tokenizer, texts, kinds)
    found = decide(library, PROMPTS, strategy="probe", probe=probe)
    assert all(m.probabilities["other"] == 0.0 and m.alpha for m in found)
    assert fit_temperature(library, tokenizer, texts, kinds, FirstPass("probe", probe=probe)) > 0


def test_a_probe_that_does_not_fit_is_refused(library, folders):
    texts, kinds = zip(*KNOWN, strict=True)
    probe = fit_probe(library, tokenizer, texts, kinds)
    with pytest.raises(ValueError, match="There is no expert 'code'; there are math, other"):
        decide(ExpertLibrary(base(), [folders["math"]]), PROMPTS, strategy="probe", probe=probe)
    with pytest.raises(ValueError, match="There is no expert 'poems'"):
        fit_probe(library, tokenizer, texts, ["poems"] * len(texts))


@pytest.mark.parametrize("way", ["channel", "likelihood", "generate", "probe"])
def test_no_pad_token_is_needed(way, library):
    padless = tiny_tokenizer()
    padless.pad_token = None
    texts, kinds = zip(*KNOWN, strict=True)
    passes = []
    for reader in (tokenizer, padless):
        probe = fit_probe(library, reader, texts, kinds) if way == "probe" else None
        first = FirstPass("probe", probe=probe) if probe else FirstPass(read=way)
        passes.append(dispatch(library, reader, PROMPTS, first))
    assert passes[0] == passes[1]
