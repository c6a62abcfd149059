# SPDX-License-Identifier: Apache-2.0
"""Laws of the first pass: a deterministic, bounded decision, and a search that never ends below where it began."""

import json

import experts
import pytest
import torch
from experts import alone, assert_same, base, state
from tiny_model import tiny_tokenizer

from peft_svf import ExpertLibrary, Mixture, adaptation
from peft_svf.adaptation import QUESTION_TOKENS, dispatch, few_shot
from peft_svf.evaluation import choice_logps, evaluate
from peft_svf.tasks import Task, dispatch_prompt

PROMPTS = ["What is 3 + 4?", "def f(x):", "Tell me a story about a very old tree.", "7 * 6"]
KINDS = {"code": "about code", "math": "about math", "other": "anything else"}
NAMES = list(KINDS)
CHOICES = [
    {"prompt": f"{a} + {b} =", "choices": [str(a + b), str(a - b), "none"], "label": 0}
    for a, b in [(4, 1), (7, 2), (9, 5)]
]
ANSWERS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in [(4, 1), (7, 2), (9, 5)]]
SMALL = {"population": 8, "iterations": 2, "elites": 0.4}

tokenizer = tiny_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return experts.write_all(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def library(folders):
    return ExpertLibrary(base(), [folders["math"], folders["code"]], classifier=folders["kinds"])


def user(text):
    return {"role": "user", "content": text}


@torch.no_grad()
def oracle(model, prompt, kinds=KINDS):
    """Log-likelihoods of the kinds' names, each read in one plain forward of its own."""
    text = tokenizer.apply_chat_template(dispatch_prompt(prompt, kinds), tokenize=False, add_generation_prompt=True)
    start, found = tokenizer(text, add_special_tokens=False).input_ids, []
    for name in kinds:
        answer = tokenizer(name, add_special_tokens=False).input_ids
        logits = model(input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1].double()
        found.append(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum())
    return torch.stack(found)


def probabilities(mixtures):
    return torch.tensor([[m.probabilities[name] for name in NAMES] for m in mixtures], dtype=torch.float64)


# --- dispatch


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_a_decision_is_one_expert_or_none_with_probabilities_over_all(strategy, library):
    found = dispatch(library, tokenizer, PROMPTS, strategy=strategy)
    assert len(found) == len(PROMPTS)
    for mixture in found:
        assert mixture.alpha in ({}, {"math": 1.0}, {"code": 1.0}) and mixture.strategy == strategy
        assert list(mixture.probabilities) == NAMES and sum(mixture.probabilities.values()) == pytest.approx(1)
        best = max(mixture.probabilities.values())
        assert mixture.probabilities[mixture.choice] == best
        assert mixture.confidence == pytest.approx((best - 1 / 3) / (1 - 1 / 3)) and 0 <= mixture.confidence <= 1


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_dispatch_is_deterministic_and_draws_no_random_numbers(strategy, library):
    random = torch.get_rng_state()
    one = dispatch(library, tokenizer, PROMPTS, strategy=strategy)
    assert torch.equal(torch.get_rng_state(), random)
    assert one == dispatch(library, tokenizer, PROMPTS, strategy=strategy)


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_a_batch_is_decided_as_one_by_one(strategy, library):
    together = dispatch(library, tokenizer, PROMPTS, strategy=strategy)
    for settings in ({"batch_size": 1}, {"batch_size": 3}):
        apart = dispatch(library, tokenizer, PROMPTS, strategy=strategy, **settings)
        torch.testing.assert_close(probabilities(apart), probabilities(together), atol=1e-4, rtol=0)
        assert [m.choice for m in apart] == [m.choice for m in together]
    singles = [dispatch(library, tokenizer, [prompt], strategy=strategy)[0] for prompt in PROMPTS]
    torch.testing.assert_close(probabilities(singles), probabilities(together), atol=1e-4, rtol=0)


def test_nothing_to_decide_is_no_decision(library):
    assert dispatch(library, tokenizer, []) == []


def test_the_prompt_strategy_reads_the_likelihoods_of_the_base_model(library):
    logps = torch.stack([oracle(base(), prompt) for prompt in PROMPTS])
    found = probabilities(dispatch(library, tokenizer, PROMPTS, calibrate=False))
    torch.testing.assert_close(found, logps.softmax(-1), atol=1e-4, rtol=0)


def test_calibration_subtracts_the_likelihoods_of_the_empty_request(library):
    logps = torch.stack([oracle(base(), prompt) for prompt in PROMPTS]) - oracle(base(), "")
    calibrated = probabilities(dispatch(library, tokenizer, PROMPTS))
    torch.testing.assert_close(calibrated, logps.softmax(-1), atol=1e-4, rtol=0)
    empty = dispatch(library, tokenizer, [""])[0]
    assert empty.confidence == pytest.approx(0, abs=1e-5)


def test_the_classifier_strategy_reads_those_of_the_classifier(library, folders):
    classifier = alone(folders["kinds"])
    logps = torch.stack([oracle(classifier, prompt) for prompt in PROMPTS])
    found = probabilities(dispatch(library, tokenizer, PROMPTS, strategy="classifier"))
    torch.testing.assert_close(found, logps.softmax(-1), atol=1e-4, rtol=0)
    base_says = probabilities(dispatch(library, tokenizer, PROMPTS, calibrate=False))
    assert not torch.allclose(found, base_says, atol=1e-2)
    calibrated = probabilities(dispatch(library, tokenizer, PROMPTS, strategy="classifier", calibrate=True))
    torch.testing.assert_close(calibrated, (logps - oracle(classifier, "")).softmax(-1), atol=1e-4, rtol=0)


def test_below_the_threshold_the_base_answers(library):
    free = dispatch(library, tokenizer, PROMPTS, threshold=0.0)
    confidences = sorted(m.confidence for m in free if m.alpha)
    assert confidences, "the tiny model chooses no expert at all: choose other seeds"
    never = dispatch(library, tokenizer, PROMPTS, threshold=1.01)
    assert all(m.alpha == {} and m.choice == "other" for m in never)
    assert [(m.confidence, m.probabilities) for m in never] == [(m.confidence, m.probabilities) for m in free]
    just = dispatch(library, tokenizer, PROMPTS, threshold=confidences[-1])
    assert [m.confidence for m in just if m.alpha] == confidences[-1:]


def test_without_a_classifier_its_strategy_is_refused(folders):
    plain = ExpertLibrary(base(), [folders["math"]])
    with pytest.raises(ValueError, match="needs a classifier expert: pass classifier="):
        dispatch(plain, tokenizer, PROMPTS, strategy="classifier")
    with pytest.raises(ValueError, match="no dispatch strategy 'magic': choose 'prompt' or 'classifier'"):
        dispatch(plain, tokenizer, PROMPTS, strategy="magic")


def test_of_a_chat_only_the_last_user_message_is_read(library):
    text = PROMPTS[0]
    chats = [
        [user(text)],
        [{"role": "system", "content": "You write code."}, user("def f():"), user(text)],
        [user("def f():"), {"role": "assistant", "content": "pass"}, user(text)],
        [user(text), {"role": "assistant", "content": "The answer"}],
        [user([{"type": "image"}, {"type": "text", "text": text}])],
    ]
    found = probabilities(dispatch(library, tokenizer, [text, *chats], batch_size=1))
    assert all(torch.equal(row, found[0]) for row in found)


def test_a_long_prompt_is_read_up_to_a_bound(library):
    start = "abc " * (QUESTION_TOKENS // 4)
    assert len(tokenizer(start).input_ids) == QUESTION_TOKENS
    found = dispatch(library, tokenizer, [start, start + "x", start + "yz " * 5000], batch_size=1)
    assert found[0] == found[1] == found[2]
    assert dispatch(library, tokenizer, ["d" + start[1:]])[0] != found[0]


def test_dispatch_leaves_the_model_as_it_was_also_after_an_exception(library, monkeypatch):
    before = state(library.model)
    for strategy in ("prompt", "classifier"):
        dispatch(library, tokenizer, PROMPTS, strategy=strategy)
    monkeypatch.setattr(adaptation, "choice_logps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dispatch(library, tokenizer, PROMPTS, strategy="classifier")
    assert_same(library.model, before)


# --- few-shot


class Contains(Task):
    """Right is a completion with one of a few characters."""

    name, kind, description = "contains", "stub", "a stub"
    letters = "aeiou0123456789"

    def check(self, completion, row):
        return any(letter in completion for letter in self.letters)


def choice_score(library, mixture, examples):
    """Share of right choices, then mean log-probability of the right one, one example at a time."""
    with torch.no_grad(), library.activate(mixture) as model:
        logps = torch.cat([choice_logps(model, tokenizer, [row]) for row in examples]).double().log_softmax(-1)
    labels = torch.tensor([row["label"] for row in examples])
    right = (logps.argmax(-1) == labels).double().mean()
    return float(right), float(logps[torch.arange(len(labels)), labels].mean())


def answer_score(library, mixture, examples):
    rows = [{"prompt": row["prompt"], "choices": [row["answer"]]} for row in examples]
    with torch.no_grad(), library.activate(mixture) as model:
        return 0.0, float(torch.cat([choice_logps(model, tokenizer, [row]) for row in rows]).double().mean())


def check_score(library, mixture, examples):
    with library.activate(mixture) as model:
        summary = evaluate(model, tokenizer, examples, task=Contains(), max_new_tokens=3)
    return summary.accuracy, answer_score(library, mixture, examples)[1]


FORMS = {
    "choices": (CHOICES, {}, choice_score),
    "answers": (ANSWERS, {}, answer_score),
    "checked": (ANSWERS, {"task": Contains(), "max_new_tokens": 3}, check_score),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_no_worse_than_the_base_and_each_expert(form, library):
    examples, settings, score = FORMS[form]
    found = few_shot(library, tokenizer, examples, **SMALL, **settings)
    assert found.provenance["score"] == pytest.approx(score(library, found, examples), abs=1e-4)
    assert found.strategy == "few-shot" and set(found.alpha) <= {"code", "math"}
    for alpha in ({}, {"math": 1.0}, {"code": 1.0}):
        share, logp = score(library, Mixture(alpha), examples)
        assert found.provenance["score"] >= [share, logp - 1e-4]


@pytest.mark.parametrize("form", ["choices", "answers"])
def test_scores_do_not_depend_on_how_candidates_share_forwards(form, library):
    examples, settings, _ = FORMS[form]
    once = SMALL | {"iterations": 1}
    found = [few_shot(library, tokenizer, examples, batch_size=size, **once, **settings) for size in (1, 5, 64)]
    for other in found[1:]:
        assert other.provenance["score"] == pytest.approx(found[0].provenance["score"], abs=1e-4)
        means = [m.provenance["history"][0]["mean_score"] for m in (found[0], other)]
        assert means[0] == pytest.approx(means[1], abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_gives_the_same_mixture(form, library):
    examples, settings, _ = FORMS[form]
    one, two, other = (few_shot(library, tokenizer, examples, seed=s, **SMALL, **settings) for s in (3, 3, 4))
    assert one == two and one.provenance["history"] != other.provenance["history"]


def test_chats_are_examples_too(library):
    chats = [{**row, "prompt": [user(row["prompt"])]} for row in CHOICES]
    found = few_shot(library, tokenizer, chats, **SMALL)
    assert found.provenance["score"] == pytest.approx(choice_score(library, found, chats), abs=1e-4)


def test_choices_of_different_numbers_are_scored_alike(library):
    mixed = [
        CHOICES[0],
        {**CHOICES[1], "choices": ["9", "8", "7", "6", "none"]},
        {**CHOICES[2], "choices": ["a", "b"]},
    ]
    found = few_shot(library, tokenizer, mixed, **SMALL)
    scores = [choice_score(library, found, [row]) for row in mixed]
    assert found.provenance["score"][0] == pytest.approx(sum(right for right, _ in scores) / 3)
    assert found.provenance["score"][1] == pytest.approx(sum(logp for _, logp in scores) / 3, abs=1e-4)


def test_a_task_judges_completions_but_not_choices(library):
    class Never(Contains):
        letters = ""

    asked = few_shot(library, tokenizer, ANSWERS, task=Never(), max_new_tokens=2, **SMALL)
    assert asked.provenance["score"][0] == 0.0
    without, beside = (few_shot(library, tokenizer, CHOICES, task=task, **SMALL) for task in (None, Never()))
    assert without == beside


def test_normalized_weights_sum_to_one(library):
    found = few_shot(library, tokenizer, ANSWERS, normalize=True, seed=1, **SMALL)
    assert found.alpha == {} or sum(found.alpha.values()) == pytest.approx(1)
    free = few_shot(library, tokenizer, ANSWERS, seed=1, **SMALL)
    assert all(0 <= weight <= 1 for weight in free.alpha.values())
    for alpha in ({}, {"math": 1.0}, {"code": 1.0}):
        assert found.provenance["score"] >= [0.0, answer_score(library, Mixture(alpha), ANSWERS)[1] - 1e-4]


def test_the_mixture_says_how_it_was_found(library, tmp_path):
    found = few_shot(library, tokenizer, CHOICES, seed=5, **SMALL)
    kept = {"population": 8, "iterations": 2, "elites": 0.4, "seed": 5, "normalize": False, "examples": 3}
    assert {key: found.provenance[key] for key in kept} == kept
    assert len(found.provenance["history"]) == 2 and json.dumps(found.provenance)
    found.save(tmp_path / "m.json")
    assert Mixture.load(tmp_path / "m.json") == found


BAD = {
    "no prompt": (ANSWERS, {"answer": "5"}, "needs 'prompt'"),
    "no answer": (ANSWERS, {"prompt": "1 + 1 ="}, "'answer'"),
    "an empty answer": (ANSWERS, {"prompt": "1 + 1 =", "answer": ""}, "answer that is a text"),
    "an answer that is no text": (ANSWERS, {"prompt": "1 + 1 =", "answer": 2}, "answer that is a text, got 2"),
    "no label": (CHOICES, {"prompt": "1 + 1 =", "choices": ["1", "2"]}, "'label'"),
    "a label too large": (CHOICES, {"prompt": "1 + 1 =", "choices": ["1", "2"], "label": 2}, "2 choices and label 2"),
    "a label below 0": (CHOICES, {"prompt": "1 + 1 =", "choices": ["1", "2"], "label": -1}, "label -1"),
    "a label that is the text": (CHOICES, {"prompt": "1 + 1 =", "choices": ["1", "2"], "label": "2"}, "label '2'"),
    "one choice": (CHOICES, {"prompt": "1 + 1 =", "choices": ["2"], "label": 0}, "at least 2 choices"),
    "an answer among choices": (CHOICES, {"prompt": "1 + 1 =", "answer": "2"}, "another form"),
    "choices among answers": (ANSWERS, CHOICES[0], "another form"),
    "both among answers": (ANSWERS, {**CHOICES[0], "answer": "2"}, "another form"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_example_is_refused_with_its_index(what, library):
    good, bad, message = BAD[what]
    with pytest.raises(ValueError, match=rf"Example 3 .*{message}"):
        few_shot(library, tokenizer, [*good, bad], **SMALL)


def test_no_examples_are_refused(library):
    with pytest.raises(ValueError, match="needs examples"):
        few_shot(library, tokenizer, [])


def test_arguments_that_would_change_nothing_are_refused(library):
    for examples, task in ((ANSWERS, None), (CHOICES, None), (CHOICES, Contains())):
        with pytest.raises(TypeError, match="max_new_tokens"):
            few_shot(library, tokenizer, examples, task=task, max_new_tokens=3, **SMALL)
    with pytest.raises(TypeError, match="poplation"):
        few_shot(library, tokenizer, CHOICES, poplation=8)


def test_a_population_has_room_for_the_base_each_expert_and_their_mean(library):
    with pytest.raises(ValueError, match=r"population of 3 .* 2 experts .* 4 or more"):
        few_shot(library, tokenizer, CHOICES, population=3, elites=0.5)
    found = few_shot(library, tokenizer, CHOICES, population=4, elites=0.5, iterations=1)
    members = [{}, {"code": 1.0}, {"math": 1.0}, {"code": 0.5, "math": 0.5}]
    assert found.alpha == max(members, key=lambda alpha: choice_score(library, Mixture(alpha), CHOICES))


def test_few_shot_leaves_the_model_as_it_was_also_after_an_exception(library):
    class Breaks(Contains):
        calls = 0

        def check(self, completion, row):
            Breaks.calls += 1
            if Breaks.calls > 4:
                raise RuntimeError("in the middle")
            return True

    before = state(library.model)
    few_shot(library, tokenizer, CHOICES, **SMALL)
    with pytest.raises(RuntimeError, match="in the middle"):
        few_shot(library, tokenizer, ANSWERS, task=Breaks(), max_new_tokens=2, **SMALL)
    assert Breaks.calls == 5
    assert_same(library.model, before)
    with library.activate(Mixture()) as model:
        ids = experts.ids("after")
        assert torch.equal(model(**ids).logits, base()(**ids).logits)
