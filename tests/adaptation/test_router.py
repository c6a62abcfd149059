# SPDX-License-Identifier: Apache-2.0
"""Laws of the router: the classifier, its confidence, which keys go together, and what is kept."""

import logging
from dataclasses import replace

import pytest
import tiny_experts
import torch
from tiny_model import tiny_tokenizer

from peft_svf import Expert, ExpertLibrary, Transformer2Model
from peft_svf.adaptation import FirstPass, Search, router
from peft_svf.adaptation.router import Router, keys_of, router_of
from peft_svf.experts.key import make_key
from peft_svf.tuner.cache import cache_dir

PROMPTS = {"code": ["def f():", "x = [1]", "for i in x:", "import os"], "math": ["1 + 1", "2 * 3", "9 - 4", "8 / 2"]}


def clouds(n=40, d=7, apart=4.0, seed=0):
    draws = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(3, d, generator=draws)
    return {name: c + torch.randn(n, d, generator=draws) for name, c in zip(("a", "b", "other"), centres, strict=True)}


def test_distances_are_mahalanobis_under_the_shared_diagonal_covariance():
    states = clouds(n=5)  # fewer states than a full covariance needs
    fitted, new = Router.fit(states), clouds(n=3, seed=1)["a"]
    parts = [part.double() for part in states.values()]
    variances = torch.cat([part - part.mean(0) for part in parts]).square().mean(0)
    for kind, part in enumerate(parts):
        expected = ((new.double() - part.mean(0)).square() / variances).sum(-1)
        assert torch.allclose(fitted.distances(new)[:, kind].double(), expected, rtol=1e-3)


def test_scores_are_those_of_logistic_regression():
    states = clouds(n=30, apart=0.7)
    fitted = Router.fit(states)
    X, y = fitted._features(torch.cat([*states.values()])), torch.arange(3).repeat_interleave(30)
    W = fitted.weights.requires_grad_()
    loss = torch.nn.functional.cross_entropy(X @ W.T, y, reduction="sum") + W.square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, W)
    assert gradient.abs().max() < 1e-2  # a minimum, and the problem is convex


def test_confidence_is_that_of_left_out_states():
    states = clouds(n=200, apart=0.7)
    fitted = Router.fit(states)
    new = clouds(n=400, apart=0.7)  # the same centres: one generator draws them first
    probabilities = torch.cat([fitted.scores(part).softmax(-1) for part in new.values()])
    right = torch.arange(3).repeat_interleave(400)
    sure, hit = probabilities.max(-1).values.mean(), (probabilities.argmax(-1) == right).float().mean()
    assert states.keys() == new.keys() and abs(float(sure - hit)) < 0.08 and 0.5 < hit < 0.98


def test_what_is_far_from_every_expert_is_other():
    fitted = Router.fit(clouds())
    far = 1e3 * torch.randn(20, 7, generator=torch.Generator().manual_seed(2))
    assert (fitted.scores(far).softmax(-1)[:, -1] == 1).all()


def test_a_fit_is_deterministic_and_takes_one_state():
    states = clouds(n=9)
    assert torch.equal(Router.fit(states).scores(states["a"]), Router.fit(states).scores(states["a"]))
    single = {"a": states["a"][:1], "other": states["other"]}
    assert Router.fit(single).scores(states["a"][:1]).argmax(-1) == 0


# --- libraries


@pytest.fixture
def experts(tmp_path):
    found = {}
    for name, path in tiny_experts.write_all(tmp_path).items():
        if name in PROMPTS:
            key = make_key(tiny_experts.base(), tiny_tokenizer(), PROMPTS[name])
            found[name] = replace(Expert.load(path), key=key)
    return found


def test_keys_are_the_default_where_all_experts_have_one(experts):
    model = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), experts)
    assert model.default_first_pass == FirstPass("key")
    mixtures = model.first_pass([text for texts in PROMPTS.values() for text in texts])
    assert [mixture.choice for mixture in mixtures] == ["code"] * 4 + ["math"] * 4
    assert {mixture.strategy for mixture in mixtures} == {"key"}
    assert model.first_pass(["", "  "])[0].choice == "other"


def other_base(experts):
    key = make_key(tiny_experts.base(seed=1), tiny_tokenizer(), PROMPTS["math"])
    return {**experts, "math": replace(experts["math"], key=key)}


def of_block(experts, block):
    return {name: replace(expert, key=replace(expert.key, block=block)) for name, expert in experts.items()}


def with_key(experts, **changes):
    return {**experts, "math": replace(experts["math"], key=replace(experts["math"].key, **changes))}


ODD = {
    "a block that the model lacks": (lambda e: of_block(e, 9), r"Expert 'code': .*1 to 1 blocks.* not 9"),
    "none": (lambda e: {**e, "math": replace(e["math"], key=None)}, "'math' has no routing key"),
    "another pooling": (lambda e: with_key(e, pooling="mean"), "keys of 'code' and 'math' can't be compared"),
    "another base": (other_base, "Expert 'math': .*another base model"),
    "another width": (
        lambda e: with_key(e, states=torch.ones(2, 5), anchor=torch.ones(5)), "Expert 'math': .*width 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_keys_fall_back_with_a_warning_and_are_refused_if_keys_are_chosen(experts, case, caplog):
    change, message = ODD[case]
    model = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), change(experts))
    with caplog.at_level(logging.WARNING, logger="peft_svf"):
        assert model.default_first_pass.strategy == "prompt"
    assert "Until then the first pass is 'prompt'" in caplog.text
    with pytest.raises(ValueError, match=message):
        model.first_pass(["1 + 1"], FirstPass("key"))


def test_reading_keys_leaves_each_module_in_its_mode(experts):
    model = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), experts)
    inner = model.get_base_model().model
    inner.layers[1].mlp.train()
    modes = {name: module.training for name, module in model.library.model.named_modules()}
    model.first_pass(["1 + 1"])
    assert {name: module.training for name, module in model.library.model.named_modules()} == modes
    assert inner.layers[1].mlp.training and not inner.layers[0].training


def test_experts_that_come_and_go_refit_the_router(experts):
    library, tokenizer = ExpertLibrary(tiny_experts.base(), {"code": experts["code"]}), tiny_tokenizer()
    first = router_of(library, tokenizer)
    assert router_of(library, tokenizer) is first and first.names == ("code", "other")
    library.add(experts["math"])
    assert router_of(library, tokenizer).names == ("code", "math", "other")
    library.remove("code")
    assert router_of(library, tokenizer).names == ("math", "other")
    library.add(replace(experts["code"], key=None))
    with pytest.raises(ValueError, match="'code' has no routing key"):
        keys_of(library)


def test_everyday_requests_are_read_once_for_a_base(experts, monkeypatch):
    tokenizer = tiny_tokenizer()
    expected = router_of(ExpertLibrary(tiny_experts.base(), experts), tokenizer).means
    sizes, read = [], router.read_states
    monkeypatch.setattr(router, "read_states", lambda *args: sizes.append(len(args[1])) or read(*args))
    assert torch.equal(router_of(ExpertLibrary(tiny_experts.base(), experts), tokenizer).means, expected)
    assert max(sizes) == 1  # anchors alone
    for path in (cache_dir() / "routing").iterdir():
        path.write_bytes(b"damaged")
    assert torch.equal(router_of(ExpertLibrary(tiny_experts.base(), experts), tokenizer).means, expected)
    assert max(sizes) > 100


def test_few_examples_point_to_the_expert_whose_prompts_they_resemble(experts):
    model = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), experts)
    examples = [{"prompt": text, "answer": "x"} for text in PROMPTS["math"][:2]]
    mixture = model.adapt(examples, search=Search("key"), name="sums")
    assert mixture.alpha == {"math": 1.0} and model.library.mixture("sums") == mixture
    assert max(mixture.probabilities, key=mixture.probabilities.get) == "math"
    assert model.adapt(examples, search=Search("key")).alpha == {"math": 1.0}


# --- keys of named mixtures


SUMS = [{"prompt": text, "answer": "x"} for text in ("HELP ME", "STOP", "GO AWAY")]


@pytest.mark.parametrize("per_layer", [False, True], ids=["mixture", "expert"])
def test_what_examples_made_is_chosen_for_requests_like_them(experts, per_layer):
    model = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), experts)
    search = Search(population=4, iterations=1, elites=0.5, per_layer=per_layer)
    made = model.adapt(SUMS, search=search, name="shouts", key=True, holdout=[])
    asked = ["HELP ME", "def f():"]
    shout, code = model.first_pass(asked)
    assert (shout.choice, code.choice) == ("shouts", "code") and set(shout.probabilities) >= {"shouts", "other"}
    assert shout.alpha == made.alpha and shout.record()["choice"] == "shouts"
    inputs = {**model.tokenizer(asked[:1], return_tensors="pt"), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs), model.generate(**inputs, mixture=made))
    soft = model.first_pass(asked, dispatch_kwargs={"soft": True})[1]
    shares = {n: p * made.alpha.get(n, 0.0) for n in ("math", "code") for p in [soft.probabilities["shouts"]]}
    if not per_layer:
        assert soft.alpha["code"] == pytest.approx(soft.probabilities["code"] + shares["code"])
    model.library.remove("shouts")
    assert "shouts" not in model.first_pass(asked)[0].probabilities


def test_a_key_of_examples_needs_a_name_and_the_keys_of_all_experts(experts):
    model = Transformer2Model(tiny_experts.base(), tiny_tokenizer(), experts)
    with pytest.raises(ValueError, match="named mixture"):
        model.adapt(SUMS, method="key", key=True)
    model.library.add(replace(experts["code"], name="plain", key=None))
    with pytest.raises(ValueError, match="'plain' has no routing key"):
        model.adapt(SUMS, population=4, iterations=1, name="shouts", key=True)
    assert not model.library.mixtures
