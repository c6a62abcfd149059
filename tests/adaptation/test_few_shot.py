# SPDX-License-Identifier: Apache-2.0
"""Laws of the few-shot search: it never ends below where it began, and its check tells a gain from luck."""

import json
import logging
from dataclasses import fields

import numpy as np
import pytest
import tiny_experts
import torch
from tiny_experts import assert_same, base, state
from tiny_model import tiny_tokenizer

from peft_svf import Expert, ExpertLibrary, Mixture
from peft_svf.adaptation import Search, judge
from peft_svf.adaptation import few_shot as few_shot_module
from peft_svf.adaptation.few_shot import few_shot
from peft_svf.adaptation.judge import Judge
from peft_svf.adaptation.search import Judged
from peft_svf.evaluation import choice_logps, complete
from peft_svf.tasks import Task

CHOICES = [  # numbers of choices and forms of prompts differ
    {"prompt": "4 + 1 =", "choices": ["5", "3", "none"], "label": 0},
    {"prompt": "7 + 2 =", "choices": ["9", "5", "7", "6", "none"], "label": 0},
    {"prompt": [{"role": "user", "content": "9 + 5 ="}], "choices": ["4", "14"], "label": 1},
]
ANSWERS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in [(4, 1), (7, 2), (9, 5)]]
SMALL = {"population": 8, "iterations": 2, "elites": 0.4}
FIELDS = {field.name for field in fields(Search)}
OWN = {"task", "holdout", "name", "state", "evaluator", "batch_size"}

tokenizer = tiny_tokenizer()


def adapt(library, examples, **settings):
    """A short search on examples; settings of `Search` and of `few_shot` side by side."""
    own = {name: settings.pop(name) for name in OWN & settings.keys()}
    values = {name: settings.pop(name) for name in FIELDS & settings.keys()}
    return few_shot(library, tokenizer, examples, Search(**SMALL | values), **own, **settings)


class Contains(Task):
    """Right is a completion with one of a few characters."""

    name, kind, description = "contains", "stub", "a stub"
    letters = "aeiou0123456789"

    def score(self, completion, row):
        return float(any(letter in completion for letter in self.letters))


def choice_score(library, mixture, examples, temperature=8.0):
    """Share of right choices, then mean log-probability of the right one, one example at a time."""
    scores = []
    with torch.no_grad(), library.activate(mixture) as model:
        for row in examples:
            logps = (choice_logps(model, tokenizer, [row])[0].double() / temperature).log_softmax(-1)
            scores.append([float(logps.argmax() == row["label"]), float(logps[row["label"]])])
    return tuple(np.mean(scores, axis=0).tolist())


def answer_score(library, mixture, examples):
    rows = [{"prompt": row["prompt"], "choices": [row["answer"]]} for row in examples]
    with torch.no_grad(), library.activate(mixture) as model:
        return 0.0, float(torch.cat([choice_logps(model, tokenizer, [row]) for row in rows]).double().mean())


def check_score(library, mixture, examples):
    with torch.no_grad(), library.activate(mixture) as model:
        texts = [complete(model, tokenizer, [row["prompt"]], max_new_tokens=3)[0] for row in examples]
    share = sum(Contains().score(text, None) for text in texts) / len(texts)
    return share, answer_score(library, mixture, examples)[1]


FORMS = {
    "choices": (CHOICES, {}, choice_score),
    "answers": (ANSWERS, {}, answer_score),
    "checked": (ANSWERS, {"task": Contains(), "max_new_tokens": 3}, check_score),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_no_worse_than_the_base_and_each_expert(form, library):
    examples, settings, score = FORMS[form]
    checked = adapt(library, examples, **settings)
    assert checked.provenance["score"] == pytest.approx(score(library, checked, examples), abs=1e-4)
    found = adapt(library, examples, holdout=[], **settings)
    assert found.provenance["score"] == pytest.approx(score(library, found, examples), abs=1e-4)
    assert found.strategy == "few-shot" and set(found.alpha) <= {"code", "math"}
    for alpha in ({}, {"math": 1.0}, {"code": 1.0}):
        share, logp = score(library, Mixture(alpha), examples)
        assert found.provenance["score"] >= [share, logp - 1e-4]


def test_a_task_judges_completions_but_not_choices(library):
    class Never(Contains):
        letters = ""

    assert adapt(library, ANSWERS, task=Never(), max_new_tokens=2).provenance["score"][0] == 0.0
    assert adapt(library, CHOICES, task=Never()) == adapt(library, CHOICES)


def test_a_seed_decides_everything_and_the_mixture_says_how_it_was_found(library, tmp_path):
    found, again, other = (adapt(library, CHOICES, seed=seed) for seed in (5, 5, 4))
    assert found == again and found.provenance["history"] != other.provenance["history"]
    facts = {"population": 8, "iterations": 2, "elites": 0.4, "seed": 5, "normalize": False, "examples": 3}
    assert {key: found.provenance[key] for key in facts} == facts and len(found.provenance["history"]) == 2
    found.save(tmp_path / "m.json")
    assert Mixture.load(tmp_path / "m.json") == found


BAD = {  # good examples, a bad one, the message; the schema of a row is tested in tests/test_rows.py
    "no answer": (ANSWERS, {"prompt": "1 + 1 ="}, "Xample 3: expected 'answer'"),
    "no label": (CHOICES, {"prompt": "1 + 1 =", "choices": ["1", "2"]}, "Xample 3: 'label' must be an index"),
    "a long prompt": (ANSWERS, {"prompt": "x" * 600, "answer": "y"}, "Xample 3 has 601 tokens, .*context is 512"),
    "a long choice": (CHOICES, {**CHOICES[0], "choices": ["y", "x" * 600]}, "Xample 3 has .*context is 512"),
    "an answer among choices": (CHOICES, {"prompt": "1 + 1 =", "answer": "2"}, "Xamples must have one form"),
    "choices among answers": (ANSWERS, {**CHOICES[0], "answer": "2"}, "Xamples must have one form"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_example_is_refused_before_the_search(what, library, monkeypatch):
    monkeypatch.setattr(few_shot_module, "maximise", lambda *_, **__: pytest.fail("it searched"))
    good, bad, message = BAD[what]
    with pytest.raises(ValueError, match=message.replace("X", "Ex")):
        adapt(library, (row for row in [*good, bad]))
    with pytest.raises(ValueError, match=message.replace("X", "Held-out ex")):
        adapt(library, good, holdout=(row for row in [*good, bad]))


def test_arguments_that_would_change_nothing_are_refused(library):
    for examples, task in ((ANSWERS, None), (CHOICES, Contains())):
        with pytest.raises(TypeError, match="no argument 'population'"):
            few_shot(library, tokenizer, examples, task=task, population=8)


def test_the_first_population_holds_the_base_each_expert_and_their_mean(library):
    found = adapt(library, CHOICES, population=4, elites=0.5, iterations=1, holdout=[])
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
    found = adapt(library, planted, method=method, batch_size=128, **SEARCHES[method])
    assert found.provenance["held_out"]["fell_back"] is None
    assert {name: found.alpha.get(name, 0.0) for name in PLANTED} == pytest.approx(PLANTED, abs=0.12)
    assert found.provenance["score"][1] >= answer_score(library, Mixture(PLANTED), planted)[1] - 1e-3


def test_an_interrupted_search_leaves_the_base_and_goes_on_as_if_nothing_had_been(library, tmp_path, monkeypatch):
    settings = {"population": 6, "iterations": 5}
    whole = adapt(library, CHOICES, **settings)
    before, calls, score = state(library.model), [], judge.choice_logps

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(judge, "choice_logps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt(library, CHOICES, state=tmp_path / "search.json", **settings)
    assert_same(library.model, before)
    assert len(json.loads((tmp_path / "search.json").read_text())) == 2
    examples = (row for row in CHOICES)  # read once
    assert adapt(library, examples, state=tmp_path / "search.json", **settings) == whole
    assert len(calls) == 3 + (5 - 2)  # base and experts are not scored again


def test_a_state_file_of_other_examples_experts_or_settings_is_refused(library, folders, tmp_path):
    file = tmp_path / "search.json"
    adapt(library, CHOICES, state=file)
    others = ExpertLibrary(base(), {"math": folders["code"], "code": folders["math"]})
    for own, examples, settings in (
        (library, CHOICES[:2], {}),
        (library, CHOICES, {"seed": 1}),
        (others, CHOICES, {}),
    ):
        with pytest.raises(ValueError, match="belongs to another search"):
            adapt(own, examples, state=file, **settings)


def scored_by(table, monkeypatch):
    """Judges that give a vector on each example the score that `table(vector, example's number)` says."""

    class Told:
        def __init__(self, library, tokenizer, weights, examples, **_):
            self.numbers = [int(example["prompt"].split()[0]) for example in examples]

        def __call__(self, members):
            return Judged(np.array([[table(member.tolist(), i) for i in self.numbers] for member in members], float))

    monkeypatch.setattr(few_shot_module, "Judge", Told)


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
def test_a_mixture_that_is_no_better_on_held_out_examples_gives_way(unseen, alpha, what, library, monkeypatch, caplog):
    def table(vector, example):
        kind = CORNERS.get(tuple(vector), "found")
        if example >= 8:
            return (0.0, unseen[kind])
        return (0.0, {"other": 0.1, "code": 0.2, "math": 0.15, "found": 1 - abs(vector[0] - 0.4)}[kind])

    scored_by(table, monkeypatch)
    others = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in (8, 9)]
    with caplog.at_level(logging.WARNING, "peft_svf.adaptation.few_shot"):
        found = adapt(library, EIGHT, holdout=others)
    check = found.provenance["held_out"]
    assert check["examples"] == 2 and check["fell_back"] == what
    assert found.provenance["examples"] == 8
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
    found = adapt(library, EIGHT)
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
        checked, taken = (adapt(library, EIGHT, holdout=h) for h in ("leave-one-out", []))
        kept.append(checked.alpha == taken.alpha)
        chosen.append(checked.provenance["held_out"]["found"][1])
        believed.append(taken.provenance["score"][1])
    if lucky:  # on average each is 0.2 worse than the base: the check knows, the search does not
        assert np.mean(believed) > 0.2 and np.mean(chosen) == pytest.approx(-0.2, abs=0.2)
        assert sum(kept) <= 6
    else:
        assert all(kept)


@pytest.mark.parametrize("holdout", [ANSWERS, "leave-one-out"], ids=["others", "leave-one-out"])
def test_the_best_expert_itself_is_kept_if_it_beats_the_base(holdout, library, monkeypatch):
    best = {(1.0, 0.0): 1.0, (0.0, 0.0): 0.4}
    scored_by(lambda vector, _: (0.0, best.get(tuple(vector), 0.2)), monkeypatch)
    found = adapt(library, EIGHT, holdout=holdout)
    assert found.alpha == {"code": 1.0} and found.provenance["held_out"]["fell_back"] is None


def test_a_temperature_divides_the_likelihoods_of_choices(library):
    found = adapt(library, CHOICES, holdout=[], temperature=4.0)
    assert found.provenance["score"] == pytest.approx(choice_score(library, found, CHOICES, 4.0), abs=1e-4)
    assert found.provenance["temperature"] == 4.0


def test_held_out_examples_are_not_searched_on_and_a_single_one_is_not_checked(library, monkeypatch):
    searched = []

    class Watch(Judge):
        def __init__(self, library, tokenizer, weights, examples, **settings):
            searched.append([row["prompt"] for row in examples])
            super().__init__(library, tokenizer, weights, examples, **settings)

    monkeypatch.setattr(few_shot_module, "Judge", Watch)
    adapt(library, EIGHT, holdout=ANSWERS)
    assert len(searched[0]) == 8 and [row["prompt"] for row in ANSWERS] in searched
    for all_seen in ([], "leave-one-out"):
        searched.clear()
        adapt(library, EIGHT, holdout=all_seen)
        assert {len(rows) for rows in searched} == {8}
    assert adapt(library, CHOICES[:1]).provenance["held_out"] == {"examples": 0, "fell_back": None}


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_one_expert_is_enough(method, folders):
    found = adapt(ExpertLibrary(base(), [folders["math"]]), ANSWERS, method=method)
    assert set(found.alpha) <= {"math"} and 0 <= found.alpha.get("math", 0.0) <= 1


@pytest.mark.parametrize("settings", [{}, {"per_layer": True, "name": "both"}], ids=["whole", "per layer"])
def test_experts_of_different_ranks_and_targets_are_mixed(settings, tmp_path):
    short = tiny_experts.write(tmp_path, "short", 7, rank=5, target_modules=["q_proj"])
    longer = tiny_experts.write(tmp_path, "longer", 8, rank=9, target_modules=["up_proj", "q_proj"])
    mixed = ExpertLibrary(base(), [short, longer])
    found = adapt(mixed, ANSWERS, **settings)
    assert found.provenance["score"] == pytest.approx(answer_score(mixed, found, ANSWERS), abs=1e-4)
    if settings:
        assert set(mixed.expert("both").sizes.values()) == {9}


@pytest.mark.parametrize("settings", [{}, {"holdout": ANSWERS}, {"low": 0.1, "normalize": True}])
def test_what_the_check_scores_counts_and_is_kept_within_the_budget(settings, library, monkeypatch):
    spent = []

    class Counting(Judge):
        def __call__(self, members):
            spent.append(super().__call__(members))
            return spent[-1]

    monkeypatch.setattr(few_shot_module, "Judge", Counting)
    one = adapt(library, EIGHT, **settings, **{"iterations": 1}).provenance["tokens"]
    assert one == sum(judged.tokens for judged in spent)
    if not settings:
        assert len(spent) == 1  # the check of the whole search costs nothing: base and experts were in it
    first, limit = spent[0].tokens, one + spent[0].tokens
    spent.clear()
    found = adapt(library, EIGHT, max_tokens=limit, **settings, **{"iterations": 9}).provenance
    assert found["tokens"] == sum(judged.tokens for judged in spent) <= limit
    assert found["stopped"] == "max_tokens" and found["iterations"] == 2 and found["tokens"] == one + first


@pytest.mark.parametrize(
    "examples, name, message",
    [
        ([], "sums", "must have one form"),
        (CHOICES, "other", "is called 'other'"),
        (CHOICES, "math", "called 'math'"),
        (CHOICES, None, r"name=\.\.\."),
    ],
)
def test_what_cannot_become_an_expert_is_refused_before_the_search(examples, name, message, library, monkeypatch):
    monkeypatch.setattr(few_shot_module, "maximise", lambda *_, **__: pytest.fail("it searched"))
    with pytest.raises(ValueError, match=message):
        adapt(library, examples, per_layer=True, name=name)


@pytest.mark.parametrize("per_layer", [False, True])
def test_gradients_are_found_in_inference_mode_too(per_layer, folders):
    def found(own):
        settings = {"method": "gradient", "iterations": 2, "name": "sums", "per_layer": per_layer}
        return adapt(own, ANSWERS, **settings), one_row(own)

    def one_row(own):
        with torch.no_grad(), own.activate(Mixture({own.names[-1]: 1.0})) as model:
            return model(**tiny_experts.ids("after")).logits

    libraries = [ExpertLibrary(base(), [folders["math"], folders["code"]]) for _ in range(2)]
    outside = found(libraries[0])
    with torch.inference_mode():
        inside = found(libraries[1])
    assert inside[0] == outside[0] and torch.equal(*(logits for _, logits in (inside, outside)))


@pytest.mark.parametrize("settings", [{}, {"per_layer": True, "name": "sums"}])
def test_a_search_keeps_the_limit_and_finds_what_it_finds_without(settings, folders):
    free = ExpertLibrary(base(), [folders["math"], folders["code"]])
    each = 4 * sum(free.expert("math").sizes.values())
    tight = ExpertLibrary(base(), [folders["math"], folders["code"]], limit_bytes=each)
    found, expected = (adapt(own, ANSWERS, holdout=[], **settings) for own in (tight, free))
    assert tight.nbytes <= each and found.alpha == pytest.approx(expected.alpha, abs=1e-3)
    assert found.provenance["score"] == pytest.approx(expected.provenance["score"], abs=1e-4)


@all_methods
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_per_layer_become_an_expert_that_scores_as_found(method, normalize, folders, tmp_path):
    own = ExpertLibrary(base(), [folders["math"], folders["code"]])
    settings = {"method": method, "per_layer": True, "name": "sums", "normalize": normalize}
    found = adapt(own, ANSWERS, **settings)
    assert found.alpha == {"sums": 1.0} and own.names == ["code", "math", "sums"]
    assert found.provenance["score"] == pytest.approx(answer_score(own, found, ANSWERS), abs=1e-4)
    layers = found.provenance["layers"]
    assert list(layers) == ["model.layers.0", "model.layers.1"] and set(layers["model.layers.0"]) == {"code", "math"}
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
