# SPDX-License-Identifier: Apache-2.0
"""Laws of the linear probe: it separates what can be, is no surer than it is right, and is stored exactly."""

import math

import pytest
import torch

from peft_svf.adaptation.probe import FILES, Probe, temperature

CENTRES = {"code": [3.0, 0.0, 0.0, 0.0, 1.0], "math": [0.0, 3.0, 0.0, 0.0, 1.0], "other": [0.0, 0.0, 3.0, 0.0, 1.0]}


def clouds(each, noise=1.0, seed=0):
    """Points around the centres with their kinds; the axes differ in scale."""
    draws = torch.Generator().manual_seed(seed)
    kinds = [kind for kind in CENTRES for _ in range(each)]
    centres = torch.tensor([CENTRES[kind] for kind in kinds])
    scale = torch.tensor([1.0, 20.0, 0.1, 5.0, 1.0])
    return (centres + noise * torch.randn(centres.shape, generator=draws)) * scale, kinds


def accuracy(probe, X, kinds):
    return sum(probe.labels[i] == k for i, k in zip(probe.scores(X).argmax(-1).tolist(), kinds, strict=True)) / len(X)


def test_it_tells_apart_what_it_has_not_seen_and_is_about_as_sure_as_it_is_right():
    probe = Probe.fit(*clouds(6))
    assert probe.labels == ("code", "math", "other") and accuracy(probe, *clouds(200, seed=1)) > 0.88
    probe = Probe.fit(*clouds(40, noise=2.0))
    X, kinds = clouds(400, noise=2.0, seed=1)
    sure = float(probe.scores(X).softmax(-1).max(-1).values.mean())
    assert abs(sure - accuracy(probe, X, kinds)) < 0.07


def test_a_few_prompts_do_not_make_it_certain():
    probe = Probe.fit(*clouds(3, noise=0.01))
    X, _ = clouds(50, noise=0.01, seed=1)
    assert 0.8 < float(probe.scores(X).softmax(-1).max(-1).values.mean()) < 0.99


def test_the_order_of_the_prompts_and_the_units_of_the_features_do_not_matter():
    X, kinds = clouds(5)
    one = Probe.fit(X, kinds)
    units = torch.tensor([1e3, 1.0, 1e-2, 7.0, 1.0])
    rescaled = Probe.fit(X * units, kinds)
    torch.testing.assert_close(one.scores(X), rescaled.scores(X * units), atol=2e-3, rtol=0)
    assert torch.equal(one.weight, Probe.fit(X, kinds).weight)


def test_a_logistic_probe_minimises_its_loss():
    X, kinds = clouds(10)
    probe = Probe.fit(X, kinds)
    std, X64 = X.double().std(0, correction=0), X.double()
    y = torch.tensor([probe.labels.index(kind) for kind in kinds])

    def loss(weight, bias):  # in the standardised space, before the temperature
        scores = ((X64 - X64.mean(0)) / std) @ weight.T + bias
        return torch.nn.functional.cross_entropy(scores, y, reduction="sum") + (weight**2).sum() / 2

    weight, bias = probe.weight.double() * std, probe.bias.double() + probe.weight.double() @ X64.mean(0)
    fits = [(float(loss(weight * t, bias * t)), t) for t in torch.logspace(-2, 2, 401, dtype=torch.float64)]
    best, t = min(fits)
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 0.05 * torch.randn(weight.shape, generator=draws, dtype=torch.float64)
        assert float(loss(weight * t + step, bias * t)) > best - 1e-3


def test_save_then_load_is_exact(tmp_path):
    probe = Probe.fit(*clouds(4), base_model="tiny")
    probe.save(tmp_path / "bundle")
    loaded = Probe.load(tmp_path / "bundle")
    assert torch.equal(loaded.weight, probe.weight) and torch.equal(loaded.bias, probe.bias)
    assert (loaded.labels, loaded.provenance) == (probe.labels, probe.provenance)
    assert loaded.provenance == {"prompts": 12, "base_model": "tiny"}
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_or_missing_file_is_refused(name, tmp_path):
    Probe.fit(*clouds(4)).save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        Probe.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Probe.load(tmp_path)


X, KINDS = clouds(2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Probe.fit(X[:-1], KINDS[:-1]), r"two or more prompts each; got \{'code': 2, 'math': 2, 'other': 1\}"),
        (lambda: Probe.fit(X[:2], KINDS[:2]), r"two or more kinds .*\{'code': 2\}"),
        (lambda: Probe.fit(X, KINDS).scores(torch.zeros(1, 7)), "fitted to 5 features, but this model has 7"),
        (lambda: Probe(("a", "b"), torch.full((2, 3), math.nan), torch.zeros(2)), "finite weights"),
        (lambda: Probe(("a", "a"), torch.zeros(2, 3), torch.zeros(2)), "for the labels"),
        (lambda: Probe(("a", "b"), torch.zeros(2, 3), torch.zeros(3)), r"biases \(labels,\); got \(2, 3\) and \(3,\)"),
    ],
)
def test_what_cannot_be_a_probe_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("planted", [0.3, 1.0, 4.0])
def test_temperature_recovers_the_planted_one(planted):
    draws = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4000, 4, generator=draws)
    labels = torch.multinomial((scores / planted).softmax(-1), 1, generator=draws).squeeze(1)
    assert temperature(scores, labels) == pytest.approx(planted, rel=0.1)


def test_temperature_stays_in_bounds_and_takes_absent_kinds():
    always_wrong = torch.tensor([[5.0, 0.0]] * 4)
    assert temperature(always_wrong, torch.tensor([1, 1, 1, 1])) == pytest.approx(100, rel=1e-3)
    scores, labels = torch.tensor([[2.0, 0.0, -torch.inf]] * 50), torch.tensor([0] * 40 + [1] * 10)
    assert temperature(scores, labels) == pytest.approx(temperature(scores[:, :2], labels))
