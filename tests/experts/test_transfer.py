# SPDX-License-Identifier: Apache-2.0
"""Laws of transfer: the same base changes nothing, a turned base is found out, a control keeps the numbers."""

from itertools import permutations

import pico
import pytest
import tiny_experts
import torch
from peft import get_peft_model
from tiny_experts import base, write
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_svf import Expert, ExpertLibrary, SVFConfig
from peft_svf.experts.convert import match, transfer_expert

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


def same(a, b):
    """Whether two experts have the same numbers, whatever their bases are called."""
    assert set(a.offsets) == set(b.offsets)
    assert all(torch.equal(a.offsets[name], b.offsets[name]) for name in a.offsets)


@pytest.mark.parametrize("mode", ["ordered", "aligned"])
def test_onto_the_same_base_it_is_the_identity(mode, expert, low):
    for whole in (expert, low):
        moved = transfer_expert(whole, base(), base(), mode)
        assert moved == whole
        keys = ("rank", "fingerprint", "base_model_name_or_path", "target_modules")
        assert [moved.config[key] for key in keys] == [whole.config[key] for key in keys]


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


def test_shuffled_is_a_permutation_of_the_same_numbers_and_repeats_with_its_seed(expert, low):
    for whole in (expert, low):
        moved, again, other = (
            transfer_expert(whole, base(), base(seed=5), "shuffled", seed=seed) for seed in (3, 3, 4)
        )
        assert moved == again != other
        for module, offset in whole.offsets.items():
            assert torch.equal(moved.offsets[module].sort().values, offset.sort().values)
            assert not torch.equal(moved.offsets[module], offset)


def test_ordered_onto_another_base_keeps_the_numbers_in_their_order(expert):
    same(transfer_expert(expert, base(), base(seed=5, name="b")), expert)


@pytest.mark.parametrize("mode", MODES)
def test_sizes_that_differ_are_refused(mode, expert):
    with pytest.raises(ValueError, match=r"24 singular values on side '.*' in the source and 16 on side"):
        transfer_expert(expert, base(), other_shape(hidden_size=16, head_dim=4), mode)


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
    assert loaded == found and loaded.provenance == found.provenance
    ExpertLibrary(target, [loaded])
    with pytest.raises(ValueError, match="does not belong to this base model"):
        ExpertLibrary(base(), [loaded])
    back = transfer_expert(loaded, base(seed=5, name="target-base"), base())
    assert back.provenance["before"] == loaded.provenance


def test_the_base_of_an_adapted_model_counts_and_stays(expert):
    target = base(seed=5, name="b")
    adapted = get_peft_model(base(seed=5, name="b"), SVFConfig(target_modules=["up_proj"]))
    before = tiny_experts.state(adapted)
    for mode in MODES:
        made = transfer_expert(expert, base(), adapted, mode)
        assert made == transfer_expert(expert, base(), target, mode) and made.base_model == "b"
    tiny_experts.assert_same(adapted, before)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_that_are_stored_transposed_transfer_too(kind, tmp_path):
    def make(seed):
        return pico.build(kind, seed=seed, name=f"{kind}-{seed}")

    one = Expert.load(write(tmp_path, "one", of=make(0)))
    found = transfer_expert(one, make(0), make(1), "aligned")
    assert all(len(found.offsets[module]) == len(offset) for module, offset in one.offsets.items())
    same(transfer_expert(one, make(0), get_peft_model(make(0), SVFConfig()), "aligned"), one)
    ExpertLibrary(make(1), [found])


def test_what_cannot_be_transferred_is_refused_by_name(expert, tmp_path):
    longer = Expert.load(write(tmp_path, "long", of=other_shape(num_hidden_layers=3)))
    refusals = {
        "no mode 'best'": (expert, base(), base(), "best"),
        r"no linear weight model.layers.0.*'math' moves": (expert, base(), pico.build("gpt2")),
        "does not belong to this base model": (expert, base(seed=5), base()),
        r"tiny-base has no linear weight model.layers.2.*'long' moves": (longer, base(), other_shape()),
    }
    for message, arguments in refusals.items():
        with pytest.raises(ValueError, match=message):
            transfer_expert(*arguments)


def test_the_matching_is_one_to_one_and_no_other_has_a_larger_sum():
    draws = torch.Generator().manual_seed(0)
    for r in (1, 2, 6):
        similarity = torch.rand(r, r, generator=draws)
        columns = match(similarity).tolist()
        sums = {order: sum(float(similarity[i, j]) for i, j in enumerate(order)) for order in permutations(range(r))}
        assert tuple(columns) == max(sums, key=sums.__getitem__)
    assert sorted(match(torch.ones(5, 5)).tolist()) == list(range(5))
    assert match(torch.eye(4)[[2, 0, 3, 1]]).tolist() == [2, 0, 3, 1]
