# SPDX-License-Identifier: Apache-2.0
"""Laws of transfer: the same base changes nothing, a turned base is found out, a control keeps the numbers."""

import sys
from itertools import permutations

import pico
import pytest
import tiny_experts
import torch
from peft import get_peft_model
from tiny_experts import base, write
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_svf import Expert, ExpertLibrary, Mixture, SVFConfig
from peft_svf.experts.transfer import match, transfer_expert
from peft_svf.tuner.cache import fetch

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"  # sides "in" and "out"
MODES = ["ordered", "shuffled", "aligned"]


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    return Expert.load(write(tmp_path_factory.mktemp("experts"), "math", seed=2))


@pytest.fixture(scope="module")
def low(tmp_path_factory):
    """An expert that moves the largest 9 of 24 singular values."""
    return Expert.load(write(tmp_path_factory.mktemp("experts"), "low", seed=3, rank=9))


def permuted(model, seed=1, keep=0):
    """
    Give every MLP weight its singular values in another order of its directions: U diag(S) V^T -> U diag(S p) V^T.

    Returns the model and per module the place of each direction in the new one, which is sorted by size.
    """
    draws = torch.Generator().manual_seed(seed)
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "mlp" in name:
            U, S, Vh = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
            order = torch.cat([torch.arange(keep), keep + torch.randperm(len(S) - keep, generator=draws)])
            module.weight.data = (U @ torch.diag(S[order]) @ Vh).float()
            places[name] = order  # direction i now has the singular value of rank order[i]
    return model, places


def other_shape(**fields):
    """A model like the base whose config has other fields."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**base().config.to_dict() | fields))
    model.name_or_path = "other shape"
    return model


def same(one, other):
    assert set(one.offsets) == set(other.offsets)
    assert all(torch.equal(one.offsets[name], other.offsets[name]) for name in one.offsets)


# --- laws


@pytest.mark.parametrize("mode", ["ordered", "aligned"])
def test_onto_the_same_base_it_is_the_identity(mode, expert, low):
    for one in (expert, low):
        found = transfer_expert(one, base(), base(), mode)
        same(found, one)
        keys = ("rank", "fingerprint", "base_model_name_or_path", "target_modules")
        assert [found.config[key] for key in keys] == [one.config[key] for key in keys]


def test_aligned_finds_the_permutation_of_directions(expert):
    target, places = permuted(base(name="permuted"))
    found = transfer_expert(expert, base(), target, "aligned")
    for module, offset in expert.offsets.items():
        expected = torch.empty_like(offset)
        expected[places[module]] = offset
        assert torch.equal(found.offsets[module], expected), module
        assert found.provenance["mean_abs_cosine"][module] == pytest.approx(1, abs=1e-5)


def test_aligned_moves_the_directions_of_an_expert_of_few(low):
    target, places = permuted(base(name="permuted"))
    found = transfer_expert(low, base(), target, "aligned")
    for module, offset in low.offsets.items():
        expected = torch.zeros(24)
        expected[places[module][:9]] = offset
        assert torch.equal(found.offsets[module], expected[: len(found.offsets[module])]), module
        assert not expected[len(found.offsets[module]) :].any()
    ExpertLibrary(target, [found])


def test_an_aligned_expert_rescales_the_directions_that_the_expert_rescaled(expert):
    target, _ = permuted(base(name="permuted"))
    found = transfer_expert(expert, base(), target, "aligned")
    weight = target.get_submodule(UP).weight.detach().double()
    U, _, Vh = torch.linalg.svd(base().get_submodule(UP).weight.detach().double(), full_matrices=False)
    S = (U.mT @ weight @ Vh.mT).diagonal()
    expected = U @ torch.diag(S * expert.z[UP].double()) @ Vh  # the target along the source's directions
    filled = pico.fill(target, {UP: 1 + found.offsets[UP].double()})
    torch.testing.assert_close(filled.get_submodule(UP).weight.double(), expected, atol=1e-5, rtol=1e-4)


def test_shuffled_is_a_permutation_of_the_same_numbers_and_repeats_with_its_seed(expert, low):
    for one in (expert, low):
        found = transfer_expert(one, base(), base(seed=5, name="b"), "shuffled", seed=3)
        for module, offset in one.offsets.items():
            assert torch.equal(found.offsets[module].sort().values, offset.sort().values)
            assert not torch.equal(found.offsets[module], offset)
        same(found, transfer_expert(one, base(), base(seed=5, name="b"), "shuffled", seed=3))
        again = transfer_expert(one, base(), base(seed=5, name="b"), "shuffled", seed=4)
        assert any(not torch.equal(found.offsets[module], again.offsets[module]) for module in found.offsets)


def test_ordered_onto_another_base_keeps_the_numbers_in_their_order(expert):
    same(transfer_expert(expert, base(), base(seed=5, name="b")), expert)


@pytest.mark.parametrize("mode", MODES)
def test_sizes_that_differ_are_refused(mode, expert):
    with pytest.raises(ValueError, match=r"24 singular values on side '.*' in the source and 16 on side"):
        transfer_expert(expert, base(), other_shape(hidden_size=16, head_dim=4), mode)


def test_bases_of_some_layers_are_taken_one_to_one(tmp_path):
    first = Expert.load(write(tmp_path, "first", seed=2, layers_to_transform=[0]))
    target = base(seed=5, name="b")
    expected = transfer_expert(first, base(), target)

    def bases(model):
        return fetch(first.offsets, lambda name: model.get_submodule(name).weight)

    for pair in ((bases(base()), target), (base(), bases(target)), (bases(base()), bases(target))):
        same(transfer_expert(first, *pair), expected)


# --- what goes in and comes out


@pytest.mark.parametrize("mode", MODES)
def test_the_result_belongs_to_the_target_and_says_where_it_is_from(mode, expert, tmp_path):
    target = base(seed=5, name="target-base")
    found = transfer_expert(expert, base(), target, mode, seed=7, name="moved")
    assert (found.name, found.base_model) == ("moved", "target-base")
    known = {"transfer": mode, "expert": "math", "from": tiny_experts.BASE, "to": "target-base"}
    assert found.provenance | known == found.provenance
    assert found.provenance.get("seed") == (7 if mode == "shuffled" else None)
    found.save(tmp_path / "moved")
    loaded = Expert.load(tmp_path / "moved")
    same(loaded, found)
    assert loaded.provenance == found.provenance
    library = ExpertLibrary(target, [tmp_path / "moved"])
    with library.activate(Mixture({"moved": 1.0})):
        pass
    with pytest.raises(ValueError, match="does not belong to this base model"):
        ExpertLibrary(base(), [loaded])
    back = transfer_expert(loaded, base(seed=5, name="target-base"), base())
    assert back.provenance["before"] == loaded.provenance


def test_models_adapted_models_and_bases_are_the_same(expert):
    target = base(seed=5, name="b")
    adapted = get_peft_model(base(seed=5, name="b"), SVFConfig(target_modules=["up_proj"]))
    bases = fetch(expert.offsets, lambda name: target.get_submodule(name).weight)
    before = tiny_experts.state(adapted)
    for mode in MODES:
        expected = transfer_expert(expert, base(), target, mode)
        same(transfer_expert(expert, base(), adapted, mode), expected)
        same(transfer_expert(expert, base(), bases, mode), expected)
    tiny_experts.assert_same(adapted, before)
    assert transfer_expert(expert, base(), bases).base_model is None
    assert transfer_expert(expert, base(), adapted).base_model == "b"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_that_are_stored_transposed_transfer_too(kind, tmp_path):
    def make(seed):
        return pico.build(kind, seed=seed, name=f"{kind}-{seed}")

    one = Expert.load(write(tmp_path, "one", of=make(0)))
    found = transfer_expert(one, make(0), make(1), "aligned")
    assert all(len(found.offsets[module]) == len(offset) for module, offset in one.offsets.items())
    same(transfer_expert(one, make(0), get_peft_model(make(0), SVFConfig()), "aligned"), one)
    ExpertLibrary(make(1), [found])


def test_models_that_change_places_are_refused(expert, tmp_path):
    longer = Expert.load(write(tmp_path, "long", of=other_shape(num_hidden_layers=3)))
    with pytest.raises(ValueError, match=r"source has no model.layers.2.*'long' moves.*change places"):
        transfer_expert(longer, base(), other_shape(num_hidden_layers=3))


def test_what_cannot_be_transferred_is_refused_by_name(expert):
    with pytest.raises(ValueError, match="no mode 'best'"):
        transfer_expert(expert, base(), base(), "best")
    with pytest.raises(ValueError, match=r"target has no model.layers.0.*'math' moves"):
        transfer_expert(expert, base(), pico.build("gpt2"))
    with pytest.raises(ValueError, match="does not belong to this base model"):
        transfer_expert(expert, base(seed=5), base())


# --- the matching


def test_the_matching_is_one_to_one_and_no_other_has_a_larger_sum():
    draws = torch.Generator().manual_seed(0)
    for r in (1, 2, 6):
        similarity = torch.rand(r, r, generator=draws)
        columns = match(similarity).tolist()
        sums = {order: sum(float(similarity[i, j]) for i, j in enumerate(order)) for order in permutations(range(r))}
        assert tuple(columns) == max(sums, key=sums.__getitem__)
    assert sorted(match(torch.ones(5, 5)).tolist()) == list(range(5))
    assert match(torch.eye(4)[[2, 0, 3, 1]]).tolist() == [2, 0, 3, 1]


def test_without_scipy_aligned_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"peft-svf\[transfer\]"):
        match(torch.eye(2))
