# SPDX-License-Identifier: Apache-2.0
"""Laws of population scoring: a batch is its rows, gradients are slopes, and workers share it out without a trace."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pico
import pytest
import tiny_experts
import torch
from tiny_experts import base
from tiny_model import tiny_tokenizer

from peft_svf import ExpertLibrary, Mixture
from peft_svf.adaptation import judge as evaluator
from peft_svf.adaptation.judge import Judge, Weights, block_effects
from peft_svf.evaluation import choice_logps
from peft_svf.tasks import Task

CHOICES = [
    {"prompt": f"{a} + {b} =", "choices": [str(a + b), str(a - b), "none"], "label": 0}
    for a, b in [(4, 1), (70, 2), (9, 5)]
]
ANSWERS = [{"prompt": row["prompt"], "answer": row["choices"][0]} for row in CHOICES]
MEMBERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.3, 0.9], [0.5, 0.5], [0.3, 0.9]])
BLOCKS = ("model.layers.0", "model.layers.1")

tokenizer = tiny_tokenizer()


class Digits(Task):
    """Right is a completion with a character of the second half of the alphabet or a digit."""

    name, kind, description = "digits", "stub", "a stub"

    def score(self, completion, row):
        return float(any(letter in completion for letter in "nopqrstuvwxyz0123456789"))


GENERATION = {"task": Digits(), "generation": {"max_new_tokens": 4}}
FORMS = {"choices": (CHOICES, {}), "answers": (ANSWERS, {}), "checked": (ANSWERS, GENERATION)}


def judge(library, examples, blocks=(), normalize=False, **settings):
    return Judge(library, tokenizer, Weights(tuple(library.names), blocks, normalize), examples, **settings)


def assert_scores(one, other, atol=1e-4):
    np.testing.assert_allclose(np.array(one), np.array(other), atol=atol)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [4, 7, 64])
def test_a_population_in_one_batch_scores_as_its_members_one_by_one(form, batch_size, library):
    examples, settings = FORMS[form]
    together = judge(library, examples, batch_size=batch_size, **settings)(MEMBERS)
    alone = [judge(library, examples, batch_size=1, **settings)(member[None]) for member in MEMBERS]
    assert_scores(together.scores, [one.scores[0] for one in alone])
    assert_scores(judge(library, examples[::-1], **settings)(MEMBERS).scores, together.scores)
    assert together.tokens == sum(one.tokens for one in alone)
    assert len(set(map(tuple, np.round(together.scores, 6).tolist()))) > 3


def test_a_member_scores_as_its_mixture_in_plain_forwards(library):
    scores = judge(library, ANSWERS)(MEMBERS).scores
    for member, (share, logp) in zip(MEMBERS, scores, strict=True):
        mixture = Mixture(dict(zip(library.names, member.tolist(), strict=True)))
        rows = [{"prompt": row["prompt"], "choices": [row["answer"]]} for row in ANSWERS]
        with torch.no_grad(), library.activate(mixture) as model:
            expected = torch.cat([choice_logps(model, tokenizer, [row]) for row in rows]).double().mean()
        assert share == 0.0 and logp == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("examples", [CHOICES, ANSWERS], ids=["choices", "answers"])
def test_the_effect_of_a_block_is_that_of_an_expert_without_it(examples, library):
    expert = library.expert("math")
    kept = {"all": (), **{block: [m for m in expert.offsets if not m.startswith(block)] for block in BLOCKS}}
    rows = [{"prompt": row["prompt"], "choices": row.get("choices") or [row["answer"]]} for row in examples]

    def logps(modules):
        part = replace(expert, name="part", offsets={m: expert.offsets[m] for m in modules}) if modules else None
        without = ExpertLibrary(base(), [part or expert])
        with torch.no_grad(), without.activate(Mixture({"part": 1.0} if part else {})) as model:
            found = torch.stack([choice_logps(model, tokenizer, [row])[0] for row in rows])
        return (found.log_softmax(-1) if "label" in examples[0] else found)[:, 0]

    whole, effects = logps(list(expert.offsets)), block_effects(library, tokenizer, Mixture({"math": 1.0}), examples)
    assert list(effects) == ["all", *BLOCKS]
    for block, modules in kept.items():
        assert sorted(effects[block]) == pytest.approx(sorted((whole - logps(modules)).tolist()), abs=1e-4)


def test_the_effects_of_a_mixture_are_those_of_the_expert_that_it_is(library):
    mixture = Mixture({"math": 0.7, "code": -0.4})
    one = replace(mixture.expert({name: library.expert(name) for name in library.names}), name="sum")
    expected = block_effects(ExpertLibrary(base(), [one]), tokenizer, Mixture({"sum": 1.0}), ANSWERS)
    found = block_effects(library, tokenizer, mixture, ANSWERS)
    assert list(found) == list(expected) and all(found[b] == pytest.approx(expected[b], abs=1e-4) for b in found)


def test_weights_per_block_move_that_block_alone(library):
    vector = np.array([[0.7, 0.1, -0.2, 0.4]])  # code and math in block 0, then in block 1
    parts = {"model.layers.0": {"code": 0.7, "math": 0.1}, "model.layers.1": {"code": -0.2, "math": 0.4}}
    offsets = {
        module: sum(w * library.expert(name).offsets[module] for name, w in weights.items())
        for block, weights in parts.items()
        for module in library.expert("code").offsets
        if module.startswith(f"{block}.")
    }
    one = base()
    pico.fill(one, {module: 1 + offset.double() for module, offset in offsets.items()})
    rows = [{"prompt": row["prompt"], "choices": [row["answer"]]} for row in ANSWERS]
    with torch.no_grad():
        expected = float(torch.cat([choice_logps(one, tokenizer, [row]) for row in rows]).double().mean())
    assert judge(library, ANSWERS, BLOCKS)(vector).scores[0][1] == pytest.approx(expected, abs=1e-3)


def test_normalized_weights_sum_to_one_and_nothing_stays_the_base():
    weights = Weights(("a", "b", "c"), BLOCKS, normalize=True)
    found = weights.alpha(torch.tensor([[1.0, 3.0, 0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 4.0, 0.1, 0.1, 0.2]]))
    expected = [[[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]], [[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert weights.corners() == {
        "other": [0.0] * 6,
        "a": [1.0, 0.0, 0.0] * 2,
        "b": [0.0, 1.0, 0.0] * 2,
        "c": [0.0, 0.0, 1.0] * 2,
    }


def plain_logps(model, _, rows, members):
    """Log-likelihoods in float64, `(members * rows, choices)`: one forward over prompt and choice, no cache."""
    columns = []
    for k in range(len(rows[0]["choices"])):
        texts = [[tokenizer(text).input_ids for text in (row["prompt"], row["choices"][k])] for row in rows] * members
        width = max(len(p) + len(c) for p, c in texts)
        ids = torch.tensor([p + c + [0] * (width - len(p) - len(c)) for p, c in texts]) % pico.VOCABULARY
        logps = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        columns.append(
            torch.stack([logps[i, len(p) - 1 : len(p) + len(c) - 1].sum() for i, (p, c) in enumerate(texts)])
        )
    return torch.stack(columns, dim=1)


def slopes(own, point, h):
    """Central differences of the log-likelihood, `(members, size)`."""
    steps = h * np.eye(point.shape[1])
    above, below = ([np.array(own(point + sign * step).scores)[:, 1] for step in steps] for sign in (1, -1))
    return (np.stack(above, axis=1) - np.stack(below, axis=1)) / (2 * h)


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("examples", [CHOICES, ANSWERS], ids=["choices", "answers"])
def test_gradients_are_slopes_of_the_scores(examples, normalize, per_block, library, tmp_path, monkeypatch):
    """Of the real scores, as nearly as float32 can, and of the same in float64 exactly."""
    own = judge(library, examples, BLOCKS if per_block else (), normalize, gradients=True)
    point = np.random.default_rng(0).uniform(0.2, 0.8, (2, own.weights.size))
    numeric = slopes(own, point, 1e-2)
    np.testing.assert_allclose(own(point).gradients, numeric, rtol=2e-2, atol=2e-3 * np.abs(numeric).max())

    def model():  # GPT-2 has no step in float32, as the norms of Llama are
        return pico.build("gpt2", dtype=torch.float64, name="wide")

    folders = [tiny_experts.write(tmp_path, name, seed, model()) for name, seed in [("code", 1), ("math", 2)]]
    exact = ExpertLibrary(model(), folders)
    for layer in exact.layers().values():
        layer.svf_basis = layer.svf_basis.double()  # no basis of that dtype is offered: rounded, it would hide the law
    monkeypatch.setattr(evaluator, "choice_logps", plain_logps)
    blocks = ("transformer.h.0", "transformer.h.1") if per_block else ()
    own = judge(exact, examples, blocks, normalize, gradients=True)
    numeric = slopes(own, point, 1e-5)
    np.testing.assert_allclose(own(point).gradients, numeric, rtol=1e-5, atol=1e-7)
    assert np.abs(numeric).max() > 1e-2 and own.weights.size == (4 if per_block else 2)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_gradients_do_not_depend_on_the_batch_and_leave_none_behind(batch_size, library):
    found = judge(library, CHOICES, gradients=True, batch_size=batch_size)(MEMBERS).gradients
    np.testing.assert_allclose(found, judge(library, CHOICES, gradients=True)(MEMBERS).gradients, atol=1e-4)
    assert all(parameter.grad is None for parameter in library.model.parameters())


def test_sampled_completions_see_the_same_random_numbers_and_leave_torchs_alone(library):
    sampled = {"task": Digits(), "generation": {"max_new_tokens": 4, "do_sample": True}}
    random = torch.get_rng_state()
    one, two = (judge(library, ANSWERS, seed=3, **sampled)(MEMBERS).scores for _ in range(2))
    assert one == two and torch.equal(torch.get_rng_state(), random)


RAY = """
import functools, sys
import numpy as np, ray
import tiny_experts
from peft_svf import Transformer2Model
from peft_svf.adaptation import RayEvaluator, Search
from test_judge import ANSWERS, CHOICES, GENERATION, MEMBERS, judge, tokenizer

def make(folders):
    return Transformer2Model(tiny_experts.base(), tokenizer, folders)

def broken(folders):
    raise ZeroDivisionError("in the factory")

def refused(shared, own):
    try:
        shared(own, MEMBERS)
    except (ValueError, ZeroDivisionError) as error:
        print("refused:", " ".join(str(error).split()))

folders = [f"{sys.argv[1]}/code", f"{sys.argv[1]}/math"]
model, other = make(folders), make({"code": folders[1], "math": folders[0]})
ray.init(num_cpus=2, include_dashboard=False)
with RayEvaluator(functools.partial(make, folders), workers=2) as shared:
    for examples, settings in ((CHOICES, {"gradients": True}), (ANSWERS, {}), (ANSWERS, GENERATION)):
        own = judge(model.library, examples, **settings)
        here, there = own(MEMBERS), shared(own, MEMBERS)
        np.testing.assert_allclose(there.scores, here.scores, atol=1e-4)
        assert there.tokens == here.tokens and len(set(map(tuple, np.round(here.scores, 4)))) > 3
        if here.gradients is not None:
            np.testing.assert_allclose(there.gradients, here.gradients, atol=1e-4)
    assert len(shared(own, MEMBERS[:1]).scores) == 1  # fewer members than workers
    search = Search(population=6, iterations=2, elites=0.5, seed=1)
    found, alone = model.adapt(CHOICES, search=search, evaluator=shared), model.adapt(CHOICES, search=search)
    assert found.alpha == alone.alpha and found.provenance["tokens"] == alone.provenance["tokens"]
    refused(shared, judge(model.library, [{**CHOICES[0], "prompt": "x" * 600}]))
    refused(shared, judge(other.library, CHOICES))
    assert len(shared(own, MEMBERS).scores) == len(MEMBERS)  # an exception ends no worker
with RayEvaluator(functools.partial(broken, folders), workers=2) as shared:  # of two CPUs: the first two have ended
    refused(shared, own)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
def test_two_ray_workers_score_as_this_process_and_raise_their_errors_here(folders, tmp_path):
    (tmp_path / "driver.py").write_text(RAY)
    root, parts = Path(__file__).parents[2], ("src", "examples", "tests", "tests/adaptation")
    done = subprocess.run(
        [sys.executable, "driver.py", str(folders["code"].parent)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(root / part) for part in parts)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    told = ("the model's context is 512", "The expert 'code' of the search differs", "in the factory")
    assert len(refused) == len(told) and all(text in line for text, line in zip(told, refused, strict=True)), refused
