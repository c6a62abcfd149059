# SPDX-License-Identifier: Apache-2.0
"""Laws of the first pass: a deterministic, bounded decision, and a search that never ends below where it began."""

import json
import logging
from threading import Thread

import numpy as np
import pytest
import tiny_experts
import torch
from tiny_experts import assert_same, base, state
from tiny_model import tiny_tokenizer

from peft_svf import ExpertLibrary, Mixture
from peft_svf.adaptation import few_shot as adaptation
from peft_svf.adaptation import judge as evaluator
from peft_svf.adaptation.few_shot import few_shot
from peft_svf.adaptation.judge import blocks_of
from peft_svf.evaluation import choice_logps, evaluate
from peft_svf.experts.expert import Expert, SavedOffsets
from peft_svf.tasks import Task

CHOICES = [
    {"prompt": f"{a} + {b} =", "choices": [str(a + b), str(a - b), "none"], "label": 0}
    for a, b in [(4, 1), (7, 2), (9, 5)]
]
ANSWERS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in [(4, 1), (7, 2), (9, 5)]]
SMALL = {"population": 8, "iterations": 2, "elites": 0.4}

tokenizer = tiny_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_experts.write_all(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def library(folders):
    return ExpertLibrary(base(), [folders["math"], folders["code"]], classifier=folders["kinds"])


# --- few-shot


class Contains(Task):
    """Right is a completion with one of a few characters."""

    name, kind, description = "contains", "stub", "a stub"
    letters = "aeiou0123456789"

    def score(self, completion, row):
        return any(letter in completion for letter in self.letters)


def choice_score(library, mixture, examples, temperature=8.0):
    """Share of right choices, then mean log-probability of the right one, one example at a time."""
    with torch.no_grad(), library.activate(mixture) as model:
        logps = torch.cat([choice_logps(model, tokenizer, [row]) for row in examples]).double()
    logps = (logps / temperature).log_softmax(-1)
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
    checked = few_shot(library, tokenizer, examples, **SMALL, **settings)
    assert checked.provenance["score"] == pytest.approx(score(library, checked, examples), abs=1e-4)
    found = few_shot(library, tokenizer, examples, holdout=0, **SMALL, **settings)
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
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in CHOICES]
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
    "an empty choice": (CHOICES, {"prompt": "1 + 1 =", "choices": ["", "2"], "label": 1}, "choices that are texts"),
    "choices in one text": (CHOICES, {"prompt": "1 + 1 =", "choices": "12", "label": 1}, "choices that are texts"),
    "an empty prompt": (ANSWERS, {"prompt": "", "answer": "2"}, "empty prompt"),
    "a chat without a message": (CHOICES, {**CHOICES[0], "prompt": []}, "empty prompt"),
    "an image": (CHOICES, {**CHOICES[0], "image": "cat.png"}, "has an image"),
    "a long prompt": (ANSWERS, {"prompt": "x" * 600, "answer": "y"}, "has 601 tokens, .*context is 512"),
    "a long choice": (CHOICES, {**CHOICES[0], "choices": ["y", "x" * 600]}, "tokens, .*context is 512"),
    "one choice": (CHOICES, {"prompt": "1 + 1 =", "choices": ["2"], "label": 0}, "at least 2 choices"),
    "an answer among choices": (CHOICES, {"prompt": "1 + 1 =", "answer": "2"}, "another form"),
    "choices among answers": (ANSWERS, CHOICES[0], "another form"),
    "both among answers": (ANSWERS, {**CHOICES[0], "answer": "2"}, "another form"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_example_is_refused_with_its_index(what, library):
    good, bad, message = BAD[what]
    with pytest.raises(ValueError, match=rf"Example 3 .*{message}"):
        few_shot(library, tokenizer, (row for row in [*good, bad]), **SMALL)
    with pytest.raises(ValueError, match=rf"Held-out example 3 .*{message}"):
        few_shot(library, tokenizer, good, holdout=(row for row in [*good, bad]), **SMALL)


def test_a_generator_of_examples_is_its_examples(library):
    listed = few_shot(library, tokenizer, EIGHT, holdout=ANSWERS, **SMALL)
    drawn = few_shot(library, tokenizer, (row for row in EIGHT), holdout=(row for row in ANSWERS), **SMALL)
    assert drawn == listed


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


PLANTED = {"code": 0.2, "math": 0.7}
SEARCHES = {
    "cem": {"population": 16, "iterations": 12},
    "cma": {"population": 10, "iterations": 15},
    "gradient": {"iterations": 40},
}
all_methods = pytest.mark.parametrize("method", SEARCHES)


@pytest.fixture(scope="module")
def planted(library):
    """Examples whose answers were drawn from the planted mixture."""
    torch.manual_seed(0)
    texts = [f"{a} + {b} =" for a in range(2, 10) for b in range(3, 8)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with library.activate(Mixture(PLANTED)) as model:
        drawn = model.generate(**inputs, do_sample=True, max_new_tokens=24, min_new_tokens=24, top_k=0)
    answers = tokenizer.batch_decode(drawn[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True) if answer]


@all_methods
def test_every_search_finds_the_planted_mixture(method, planted, library):
    found = few_shot(library, tokenizer, planted, method=method, batch_size=128, **SEARCHES[method])
    assert found.provenance["held_out"]["fell_back"] is None
    assert {name: found.alpha.get(name, 0.0) for name in PLANTED} == pytest.approx(PLANTED, abs=0.12)
    rows = [row for row in planted if row not in held_out_of(planted)]
    assert found.provenance["score"][1] >= answer_score(library, Mixture(PLANTED), rows)[1] - 1e-3


def held_out_of(examples, seed=0, share=0.25):
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    return [examples[i] for i in order[: round(share * len(examples))]]


@all_methods
def test_an_interrupted_search_leaves_the_base_and_goes_on_as_if_nothing_had_been(
    method, library, tmp_path, monkeypatch
):
    settings = {"method": method, "population": 6, "elites": 0.4, "iterations": 5}
    whole = few_shot(library, tokenizer, CHOICES, **settings)
    before, calls, score = state(library.model), [], evaluator.choice_logps

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(evaluator, "choice_logps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        few_shot(library, tokenizer, CHOICES, state=tmp_path / "search.json", **settings)
    assert_same(library.model, before)
    done = len(json.loads((tmp_path / "search.json").read_text())["populations"])
    assert done == 2
    resumed = few_shot(library, tokenizer, CHOICES, state=tmp_path / "search.json", **settings)
    assert resumed == whole and len(calls) == 3 + (5 - done)  # base and experts are not scored again


def test_a_state_file_of_other_examples_experts_or_settings_is_refused(library, folders, tmp_path):
    file = tmp_path / "search.json"
    few_shot(library, tokenizer, CHOICES, state=file, **SMALL)
    with pytest.raises(ValueError, match="of another search: examples is"):
        few_shot(library, tokenizer, CHOICES[:2], state=file, **SMALL)
    with pytest.raises(ValueError, match="of another search: seed is 0 there and 1 here"):
        few_shot(library, tokenizer, CHOICES, state=file, seed=1, **SMALL)
    others = ExpertLibrary(base(), {"math": folders["code"], "code": folders["math"]})
    with pytest.raises(ValueError, match="of another search: of its experts changed: code, math"):
        few_shot(others, tokenizer, CHOICES, state=file, **SMALL)


def scored_by(table, monkeypatch):
    """Judges that give a vector on each example the score that `table(vector, example's number)` says."""

    class Told:
        def __init__(self, library, tokenizer, weights, examples, **_):
            self.numbers = [int(example["prompt"].split()[0]) for example in examples]

        def __call__(self, members):
            each = np.array([[table(member.tolist(), i) for i in self.numbers] for member in members], float)
            return evaluator.Judged([tuple(mean) for mean in each.mean(1).tolist()], each=each)

    monkeypatch.setattr(adaptation, "Judge", Told)


EIGHT = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(8)]
CORNERS = {(0.0, 0.0): "other", (1.0, 0.0): "code", (0.0, 1.0): "math"}


@pytest.mark.parametrize(
    "unseen, alpha, what",
    [
        ({"other": 0.3, "code": 0.2, "math": 0.9, "found": 0.5}, None, None),  # math was not best on the examples
        ({"other": 0.3, "code": 0.6, "math": 0.0, "found": 0.5}, {"code": 1.0}, "code"),
        ({"other": 0.7, "code": 0.6, "math": 0.0, "found": 0.5}, {}, "other"),
        ({"other": 0.5, "code": 0.2, "math": 0.0, "found": 0.5}, {}, "other"),  # no better: the simpler one
    ],
)
@pytest.mark.parametrize("share", [True, False], ids=["a share", "other examples"])
def test_a_mixture_that_is_no_better_on_held_out_examples_gives_way(
    share, unseen, alpha, what, library, monkeypatch, caplog
):
    drawn = [int(row["prompt"].split()[0]) for row in held_out_of(EIGHT)] if share else [8, 9]

    def table(vector, example):
        kind = CORNERS.get(tuple(vector), "found")
        if example in drawn:
            return (0.0, unseen[kind])
        return (0.0, {"other": 0.1, "code": 0.2, "math": 0.15, "found": 1 - abs(vector[0] - 0.4)}[kind])

    scored_by(table, monkeypatch)
    others = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in (8, 9)]
    with caplog.at_level(logging.WARNING, "peft_svf.adaptation.few_shot"):
        found = few_shot(library, tokenizer, EIGHT, holdout=0.25 if share else others, **SMALL)
    check = found.provenance["held_out"]
    assert check["examples"] == 2 and check["fell_back"] == what
    assert found.provenance["examples"] == (6 if share else 8)
    assert check["found"] == [0.0, 0.5]
    assert check["rivals"] == {"other": [0.0, unseen["other"]], "code": [0.0, unseen["code"]]}
    if what is None:
        assert 0 < found.alpha["code"] < 1 and not caplog.records
    else:
        assert found.alpha == alpha and "is returned instead" in caplog.text
        assert found.provenance["score"] == pytest.approx([0.0, {"code": 0.2, "other": 0.1}[what]])


def test_leaving_one_out_scores_each_example_by_what_the_others_choose(library, monkeypatch):
    """Against a second search for each example, of the same candidates."""
    draws, known, asked = np.random.default_rng(1), {}, []

    def table(vector, example):
        if tuple(vector) not in known:
            known[tuple(vector)] = np.stack([draws.integers(0, 2, 8), draws.normal(size=8)], -1)
            asked.append(tuple(vector))
        return tuple(known[tuple(vector)][example])

    scored_by(table, monkeypatch)
    found = few_shot(library, tokenizer, EIGHT, **SMALL)
    check = found.provenance["held_out"]

    def left_out(vectors):
        total = np.zeros(2)
        for i in range(8):
            rest = [example for example in range(8) if example != i]
            total += known[max(vectors, key=lambda v: tuple(known[v][rest].mean(0)))][i]
        return total / 8

    experts = {name: corner for corner, name in CORNERS.items() if name != "other"}
    best = max(experts, key=lambda name: tuple(known[experts[name]].mean(0)))
    assert check["examples"] == 8 and check["by"] == "leave-one-out"
    assert check["found"] == pytest.approx(left_out(asked))
    rivals = check["rivals"]
    assert rivals[best] == pytest.approx(left_out(list(experts.values())))
    assert rivals["other"] == pytest.approx(known[0.0, 0.0].mean(0)) and set(rivals) == {"other", best}
    expected = None if check["found"] > max(rivals.values()) else max(rivals, key=rivals.get)
    assert check["fell_back"] == expected


@pytest.mark.parametrize("lucky", [False, True], ids=["a real gain", "luck"])
def test_leaving_one_out_tells_a_real_gain_from_a_chosen_one(lucky, library, monkeypatch):
    """Every example likes 0.4 of code, or candidates differ by noise around what is worse than the base."""
    kept, chosen, believed = [], [], []
    for seed in range(12):
        draws, known = np.random.default_rng(seed), {}

        def table(vector, example, draws=draws, known=known):
            luck = known.setdefault(tuple(vector), draws.normal(-0.2, 1, size=8))
            return (0.0, luck[example] * any(vector) if lucky else 0.1 * luck[example] - abs(vector[0] - 0.4))

        scored_by(table, monkeypatch)
        checked, taken = (few_shot(library, tokenizer, EIGHT, holdout=h, **SMALL) for h in ("leave-one-out", 0))
        kept.append(checked.alpha == taken.alpha)
        chosen.append(checked.provenance["held_out"]["found"][1])
        believed.append(taken.provenance["score"][1])
    if lucky:  # on average each is 0.2 worse than the base: the check knows, the search does not
        assert np.mean(believed) > 0.2 and np.mean(chosen) == pytest.approx(-0.2, abs=0.2)
        assert sum(kept) <= 6
    else:
        assert all(kept)


def test_an_evaluator_without_scores_by_example_is_told_that_the_check_needs_them(library):
    class Sums(evaluator.LocalEvaluator):
        def __call__(self, judge, members):
            return judge(members)._replace(each=None)

    with pytest.raises(ValueError, match=r"needs the scores of single examples.*holdout=0"):
        few_shot(library, tokenizer, CHOICES, evaluator=Sums(), **SMALL)
    few_shot(library, tokenizer, CHOICES, evaluator=Sums(), holdout=0, **SMALL)


def test_a_named_mixture_is_returned_where_the_library_changed_under_the_search(folders, caplog):
    own = ExpertLibrary(base(), {name: folders[name] for name in ("code", "math")})

    taken = Thread(target=own.add_mixture, args=("plus", Mixture()))

    class Takes(evaluator.LocalEvaluator):
        def __call__(self, judge, members):
            if not taken.ident:
                taken.start()
                taken.join()
            return judge(members)

    with caplog.at_level(logging.WARNING, "peft_svf.adaptation.few_shot"):
        found = few_shot(own, tokenizer, CHOICES, evaluator=Takes(), name="plus", holdout=0, **SMALL)
    assert "code" in found.alpha and found.provenance["name"] == "plus"
    assert "not kept in the library as 'plus'" in caplog.text and own.mixtures == {"plus": Mixture()}


def test_a_single_example_is_not_checked_and_the_log_says_so(library, caplog):
    with caplog.at_level(logging.INFO, "peft_svf.adaptation.few_shot"):
        found = few_shot(library, tokenizer, CHOICES[:1], **SMALL)
    assert found.provenance["held_out"] == {"examples": 0, "fell_back": None}
    assert "single example is not checked" in caplog.text


@pytest.mark.parametrize("holdout", [0.25, "leave-one-out"])
def test_the_best_expert_itself_is_kept_if_it_beats_the_base(holdout, library, monkeypatch):
    best = {(1.0, 0.0): 1.0, (0.0, 0.0): 0.4}
    scored_by(lambda vector, _: (0.0, best.get(tuple(vector), 0.2)), monkeypatch)
    found = few_shot(library, tokenizer, EIGHT, holdout=holdout, **SMALL)
    assert found.alpha == {"code": 1.0} and found.provenance["held_out"]["fell_back"] is None


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_temperature_divides_the_likelihoods_of_choices(temperature, library):
    found = few_shot(library, tokenizer, CHOICES, holdout=0, temperature=temperature, **SMALL)
    expected = choice_score(library, found, CHOICES, temperature)
    assert found.provenance["score"] == pytest.approx(expected, abs=1e-4)
    assert found.provenance["temperature"] == temperature
    with pytest.raises(ValueError, match="temperature of choices is more than 0, got 0"):
        few_shot(library, tokenizer, CHOICES, temperature=0, **SMALL)


def test_held_out_examples_are_not_searched_on(library, monkeypatch):
    searched = []

    class Watch(evaluator.Judge):
        def __init__(self, library, tokenizer, weights, examples, **settings):
            searched.append([row["prompt"] for row in examples])
            super().__init__(library, tokenizer, weights, examples, **settings)

    monkeypatch.setattr(adaptation, "Judge", Watch)
    few_shot(library, tokenizer, EIGHT, holdout=0.25, **SMALL)
    seen, unseen = (next(rows for rows in searched if len(rows) == count) for count in (6, 2))
    assert len(searched) > 1 and not set(seen) & set(unseen) and {len(rows) for rows in searched} == {6, 2}
    searched.clear()
    few_shot(library, tokenizer, EIGHT, holdout=ANSWERS, **SMALL)
    assert len(searched[0]) == 8 and [row["prompt"] for row in ANSWERS] in searched
    searched.clear()
    for all_seen in (0, "leave-one-out"):
        searched.clear()
        few_shot(library, tokenizer, EIGHT, holdout=all_seen, **SMALL)
        assert [len(rows) for rows in searched if rows] == [8] * len(searched)
    alone = few_shot(library, tokenizer, EIGHT[:1], holdout=0.4, **SMALL)  # none is left to hold out
    assert alone.provenance["held_out"] == {"examples": 0, "fell_back": None}
    for share in (-0.1, 1.0, "half"):
        with pytest.raises(ValueError, match="holdout is 'leave-one-out', a share"):
            few_shot(library, tokenizer, EIGHT, holdout=share, **SMALL)
    with pytest.raises(ValueError, match="held-out examples have another form"):
        few_shot(library, tokenizer, EIGHT, holdout=CHOICES, **SMALL)


@pytest.mark.parametrize("letters", ["", "".join(map(chr, range(32, 127)))], ids=["all fail", "all succeed"])
def test_where_all_fail_or_all_succeed_the_log_likelihood_decides_and_the_log_says_so(letters, library, caplog):
    class Same(Contains):
        def score(self, completion, row):
            return bool(letters)

    with caplog.at_level(logging.INFO, "peft_svf.adaptation.few_shot"):
        found = few_shot(library, tokenizer, ANSWERS, task=Same(), max_new_tokens=2, **SMALL)
    assert "log-likelihood alone decided" in caplog.text
    assert found.alpha == few_shot(library, tokenizer, ANSWERS, **SMALL).alpha
    assert found.provenance["score"][0] == float(bool(letters))


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_one_expert_is_enough(method, folders, library):
    single = ExpertLibrary(base(), [folders["math"]])
    found = few_shot(single, tokenizer, ANSWERS, method=method, **SMALL)
    assert set(found.alpha) <= {"math"} and 0 <= found.alpha.get("math", 0.0) <= 1
    with pytest.raises(ValueError, match='2 numbers or more, got 1: use method="cem"'):
        few_shot(single, tokenizer, ANSWERS, method="cma", **SMALL)


def test_experts_of_different_ranks_are_mixed(folders, tmp_path):
    short = tiny_experts.write(tmp_path, "short", 7, rank=5)
    mixed = ExpertLibrary(base(), [folders["math"], short])
    found = few_shot(mixed, tokenizer, ANSWERS, **SMALL)
    assert found.provenance["score"] == pytest.approx(answer_score(mixed, found, ANSWERS), abs=1e-4)


def test_weights_stay_in_their_range(library):
    found = few_shot(library, tokenizer, ANSWERS, low=-0.5, high=1.5, population=12, iterations=3)
    assert all(-0.5 <= weight <= 1.5 for weight in found.alpha.values())
    assert found.provenance["low"] == -0.5 and found.provenance["high"] == 1.5


def test_a_budget_ends_the_search_and_the_mixture_says_so(library):
    one = few_shot(library, tokenizer, CHOICES, **SMALL | {"iterations": 1})
    found = few_shot(library, tokenizer, CHOICES, max_tokens=3 * one.provenance["tokens"], **SMALL | {"iterations": 9})
    assert found.provenance["stopped"] == "max_tokens" and found.provenance["iterations"] == 3
    assert found.provenance["tokens"] == 3 * one.provenance["tokens"] and one.provenance["stopped"] == ""
    brief = few_shot(library, tokenizer, CHOICES, max_seconds=0.0, **SMALL)
    assert brief.provenance["stopped"] == "max_seconds" and brief.provenance["iterations"] == 1


@pytest.mark.parametrize("settings", [{}, {"holdout": 0.25}, {"holdout": ANSWERS}, {"low": 0.1, "normalize": True}])
def test_what_the_check_scores_counts_and_is_kept_within_the_budget(settings, library, monkeypatch):
    spent = []

    class Counting(evaluator.Judge):
        def __call__(self, members):
            spent.append(super().__call__(members))
            return spent[-1]

    monkeypatch.setattr(adaptation, "Judge", Counting)
    one = few_shot(library, tokenizer, EIGHT, **settings, **SMALL | {"iterations": 1}).provenance["tokens"]
    assert one == sum(judged.tokens for judged in spent)
    if not settings:
        assert len(spent) == 1  # the check of the whole search costs nothing: base and experts were in it
    first, limit = spent[0].tokens, one + spent[0].tokens
    spent.clear()
    found = few_shot(library, tokenizer, EIGHT, max_tokens=limit, **settings, **SMALL | {"iterations": 9}).provenance
    assert found["tokens"] == sum(judged.tokens for judged in spent) <= limit
    assert found["stopped"] == "max_tokens" and found["iterations"] == 2 and found["tokens"] == one + first


def test_what_cannot_work_is_refused_before_the_search(library, monkeypatch):
    monkeypatch.setattr(adaptation, "maximise", lambda *_, **__: pytest.fail("it searched"))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        few_shot(library, tokenizer, CHOICES, batch_size=0)
    with pytest.raises(ValueError, match="can be called 'other'"):
        few_shot(library, tokenizer, CHOICES, per_layer=True, name="other")
    with pytest.raises(ValueError, match="An expert of this library is called 'math'"):
        few_shot(library, tokenizer, CHOICES, per_layer=True, name="math")


@pytest.mark.parametrize("per_layer", [False, True])
def test_gradients_are_found_in_inference_mode_too(per_layer, folders):
    def found(own):
        settings = {"method": "gradient", "iterations": 2, "name": "sums", "per_layer": per_layer}
        return few_shot(own, tokenizer, ANSWERS, **settings), one_row(own)

    def one_row(own):
        with torch.no_grad(), own.activate(Mixture({own.names[-1]: 1.0})) as model:
            return model(**tiny_experts.ids("after")).logits

    libraries = [ExpertLibrary(base(), [folders["math"], folders["code"]]) for _ in range(2)]
    outside = found(libraries[0])
    with torch.inference_mode():
        inside = found(libraries[1])
    assert inside[0] == outside[0] and torch.equal(*(logits for _, logits in (inside, outside)))


@pytest.mark.parametrize("settings", [{}, {"method": "gradient"}, {"per_layer": True, "name": "sums"}])
def test_a_search_keeps_the_limit_and_finds_what_it_finds_without(settings, folders):
    free = ExpertLibrary(base(), [folders["math"], folders["code"]])
    each = 4 * sum(free.expert("math").sizes.values())
    tight = ExpertLibrary(base(), [folders["math"], folders["code"]], limit_bytes=each)
    found, expected = (few_shot(own, tokenizer, ANSWERS, holdout=0, **SMALL | settings) for own in (tight, free))
    assert tight.nbytes <= each and found.alpha == pytest.approx(expected.alpha, abs=1e-3)
    assert found.provenance["score"] == pytest.approx(expected.provenance["score"], abs=1e-4)


def test_a_search_reads_experts_into_the_library_alone(folders, monkeypatch):
    own = ExpertLibrary(base(), [folders["math"], folders["code"]])
    few_shot(own, tokenizer, ANSWERS, **SMALL)
    monkeypatch.setattr(SavedOffsets, "read", lambda self: pytest.fail("read again"))
    monkeypatch.setattr(adaptation, "digest_of_experts", lambda library: {})
    few_shot(own, tokenizer, ANSWERS, **SMALL)


def test_an_unknown_search_is_refused(library):
    with pytest.raises(ValueError, match="no search 'luck': choose 'cem', 'cma', 'gradient'"):
        few_shot(library, tokenizer, CHOICES, method="luck")


@all_methods
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_per_layer_become_an_expert_that_scores_as_found(method, normalize, folders, tmp_path):
    own = ExpertLibrary(base(), [folders["math"], folders["code"]])
    settings = SMALL | {"method": method, "per_layer": True, "name": "sums", "normalize": normalize}
    found = few_shot(own, tokenizer, ANSWERS, **settings)
    assert found.alpha == {"sums": 1.0} and own.names == ["code", "math", "sums"]
    assert found.provenance["score"] == pytest.approx(answer_score(own, found, ANSWERS), abs=1e-4)
    layers = found.provenance["layers"]
    assert tuple(layers) == blocks_of(own.layers()) and set(layers["model.layers.0"]) == {"code", "math"}
    made = own.expert("sums")
    for module, offset in made.offsets.items():
        weights = layers[module.rsplit(".", 2)[0]]
        expected = sum(weights[name] * own.expert(name).offsets[module] for name in weights)
        torch.testing.assert_close(offset, expected)
    made.save(tmp_path / "sums")
    assert Expert.load(tmp_path / "sums").provenance["layers"] == layers
    elsewhere = ExpertLibrary(base(), [tmp_path / "sums"])
    assert answer_score(elsewhere, found, ANSWERS) == pytest.approx(answer_score(own, found, ANSWERS), abs=1e-5)
    if normalize:
        assert all(sum(row.values()) == pytest.approx(1) or not any(row.values()) for row in layers.values())


def test_weights_per_layer_of_experts_of_different_ranks_and_targets(folders, tmp_path):
    short = tiny_experts.write(tmp_path, "short", 7, rank=5, target_modules=["q_proj"])
    longer = tiny_experts.write(tmp_path, "longer", 8, rank=9, target_modules=["up_proj", "q_proj"])
    own = ExpertLibrary(base(), [short, longer])
    found = few_shot(own, tokenizer, ANSWERS, per_layer=True, name="both", **SMALL)
    assert found.provenance["score"] == pytest.approx(answer_score(own, found, ANSWERS), abs=1e-4)
    assert set(own.expert("both").sizes.values()) == {9}


def test_weights_per_layer_need_a_name(library):
    with pytest.raises(ValueError, match=r"give it a name=\.\.\."):
        few_shot(library, tokenizer, ANSWERS, per_layer=True, **SMALL)


def test_few_shot_leaves_the_model_as_it_was_also_after_an_exception(library):
    class Breaks(Contains):
        calls = 0

        def score(self, completion, row):
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
        ids = tiny_experts.ids("after")
        assert torch.equal(model(**ids).logits, base()(**ids).logits)
