# SPDX-License-Identifier: Apache-2.0
"""Laws of what is trained: each parametrization is its formula, starts at the base model, and folds into offsets."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from pico import build, fill, inputs, logits, svf_layers

from peft_svf import Mixture, SVFConfig
from peft_svf.experts.library import ExpertLibrary
from peft_svf.tuner.parametrization import PARAMETRIZATIONS, offset_of

MAPS = [("sigmoid", 2.0), ("sigmoid", 1.3), ("reference", 2.0)]
all_maps = pytest.mark.parametrize("kind, limit", MAPS)


def formula(d, kind, limit, S):
    """z as the table of `offset_of` gives it, number by number in float64."""
    if kind == "sigmoid":
        start = math.log((1 / limit) / (1 - 1 / limit))
        return [limit / (1 + math.exp(-(start + x))) for x in d]
    mask = [1 / (1 + math.exp(-(0.1 + x))) for x in d]
    scale = sum(S) / sum(s * m for s, m in zip(S, mask, strict=True))
    return [m * scale for m in mask]


@all_maps
def test_each_map_is_its_formula(kind, limit):
    d, S = torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    found = 1 + offset_of(d, kind, limit, S)
    wanted = torch.tensor(formula(d.tolist(), kind, limit, S.tolist()), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_nuclear_norm_stays_under_the_reference_map():
    d, S = torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64)
    z = 1 + offset_of(d, "reference", 2.0, S)
    torch.testing.assert_close((S * z).sum(-1), S.sum(-1))


@all_maps
def test_the_gradient_of_each_map_is_that_of_finite_differences(kind, limit):
    d = torch.randn(6, dtype=torch.float64, requires_grad=True)
    S = torch.rand(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: offset_of(p, kind, limit, S), d)


@all_maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_training_starts_from_the_base_model_to_the_bit(kind, limit, dtype, training):
    plain = build("llama", dtype=dtype).train(training)
    model = get_peft_model(build("llama", dtype=dtype), SVFConfig(parametrization=kind, limit=limit)).train(training)
    assert torch.equal(model(**inputs(model)).logits, plain(**inputs(plain)).logits)


def moved(kind, limit, **config):
    model = get_peft_model(build("llama", name="pico/home"), SVFConfig(parametrization=kind, limit=limit, **config))
    draws = torch.Generator().manual_seed(0)
    for layer in svf_layers(model).values():
        parameter = layer.svf_offset["default"].weight
        parameter.data.copy_(torch.randn(parameter.shape, generator=draws))
    return model.eval()


@all_maps
@pytest.mark.parametrize("rank", [None, 4])
def test_the_model_answers_with_the_mapped_z_unmerged_merged_and_folded(kind, limit, rank):
    model = moved(kind, limit, rank=rank)
    z = {}
    for name, layer in svf_layers(model).items():
        d, S = layer.svf_offset["default"].weight, layer.svf_values
        z[name] = torch.tensor(formula(d.tolist(), kind, limit, S.tolist()[: len(d)]), dtype=torch.float64)
    wanted = logits(fill(build("llama"), z))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    before = logits(model)
    model.fold_parametrization()
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].parametrization == "offset"


@all_maps
def test_the_trained_parameter_survives_its_file_and_goes_on_from_there(kind, limit, tmp_path):
    model = moved(kind, limit)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama", name="pico/home"), tmp_path, is_trainable=True)
    for one, other in zip(svf_layers(model).values(), svf_layers(again).values(), strict=True):
        assert torch.equal(one.svf_offset["default"].weight, other.svf_offset["default"].weight)
    assert torch.equal(logits(again.eval()), logits(model))


@all_maps
def test_experts_are_offsets_others_are_refused_with_the_way_out(kind, limit, tmp_path):
    model = moved(kind, limit)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match=f"parametrization='{kind}'.*model.fold_parametrization"):
        ExpertLibrary(build("llama", name="pico/home"), [tmp_path / "raw"])
    expected = logits(model)
    mixed = ExpertLibrary(model)
    with mixed.activate(Mixture({"default": 1.0})):
        torch.testing.assert_close(logits(mixed.model), expected, rtol=1e-4, atol=1e-4)
    model = moved(kind, limit)
    model.fold_parametrization()
    model.save_pretrained(tmp_path / "folded")
    library = ExpertLibrary(build("llama", name="pico/home"), [tmp_path / "folded"])
    with library.activate(Mixture({"folded": 1.0})):
        torch.testing.assert_close(logits(library.model), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_different_parametrizations_live_side_by_side_and_mix_as_offsets():
    model = moved("sigmoid", 2.0)
    model.add_adapter("plain", SVFConfig())
    for layer in svf_layers(model).values():
        layer.svf_offset["plain"].weight.data.fill_(0.25)
    model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "mixed")
    for layer in svf_layers(model).values():
        wanted = 0.5 * layer.offset("default") + 0.5 * 0.25
        torch.testing.assert_close(layer.offset("mixed"), wanted)


@pytest.mark.parametrize("limit", [1.0, 0.5, float("nan")])
def test_a_limit_that_makes_no_range_is_refused(limit):
    with pytest.raises(ValueError, match="`limit` must be a finite number above 1"):
        SVFConfig(parametrization="sigmoid", limit=limit)


def test_an_unknown_parametrization_is_refused_with_the_list():
    with pytest.raises(ValueError, match=f"`parametrization` must be one of {', '.join(PARAMETRIZATIONS)}"):
        SVFConfig(parametrization="softplus")
