# SPDX-License-Identifier: Apache-2.0
"""Laws of `SVFConfig`: what it refuses, and that it survives its file."""

import copy
import json
import pickle

import pytest
from peft import PeftConfig, PeftType

from peft_svf import SVFConfig

FINGERPRINT = {"model.layers.0.mlp.up_proj": {"sha256": "ab", "probe": "0.5 1.5"}}


def test_defaults_are_the_paper():
    config = SVFConfig()
    assert config.peft_type is PeftType.SVF
    assert config.target_modules is None and config.rank is None and config.init_weights is True
    assert (config.basis_dtype, config.basis_from) == ("auto", "auto")
    assert config.fingerprint is None and config.description is None


@pytest.mark.parametrize("rank", [0, -1, 2.5, "4", True])
def test_a_rank_that_is_no_count_is_refused(rank):
    with pytest.raises(ValueError, match=r"`rank` is the number of singular values to move, at least 1.*got"):
        SVFConfig(rank=rank)


@pytest.mark.parametrize("field", ["basis_dtype", "basis_from"])
@pytest.mark.parametrize("value", ["float16", None, ""])
def test_a_value_outside_the_list_is_refused_with_the_list(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be one of .*, .*got"):
        SVFConfig(**{field: value})


@pytest.mark.parametrize("field, value", [("layers_to_transform", [0]), ("layers_pattern", "layers")])
def test_layers_cannot_be_picked_beside_a_regex(field, value):
    with pytest.raises(ValueError, match=f"`{field}` cannot be used when `target_modules` is a str"):
        SVFConfig(target_modules=".*up_proj", **{field: value})


def test_a_pattern_needs_layers():
    with pytest.raises(ValueError, match="`layers_to_transform` must also be specified"):
        SVFConfig(target_modules=["up_proj"], layers_pattern="layers")
    assert (
        SVFConfig(target_modules=["up_proj"], layers_pattern="layers", layers_to_transform=0).layers_to_transform == 0
    )


@pytest.mark.parametrize("fingerprint", ["abc", ["abc"], 3])
def test_a_fingerprint_of_another_kind_is_refused(fingerprint):
    with pytest.raises(ValueError, match="`fingerprint` must be a dict"):
        SVFConfig(fingerprint=fingerprint)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        SVFConfig(r=8)


def test_save_then_load_is_the_same_config(tmp_path):
    config = SVFConfig(
        target_modules=["up_proj", "v_proj"],
        exclude_modules=["0.up_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["lm_head"],
        rank=3,
        init_weights=False,
        basis_dtype="bfloat16",
        basis_from="memory",
        description="counts: 50 % of α",
        fingerprint=FINGERPRINT,
        base_model_name_or_path="pico/llama",
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    for cls in (SVFConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is SVFConfig
        assert loaded.to_dict() == config.to_dict()


def test_the_file_can_be_read_by_a_person(tmp_path):
    SVFConfig(target_modules=["b", "a"], fingerprint=FINGERPRINT).save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "adapter_config.json").read_text())
    assert entry["peft_type"] == "SVF"
    assert sorted(entry["target_modules"]) == ["a", "b"]
    assert entry["fingerprint"] == FINGERPRINT
    assert not [key for key in entry if key.startswith("_")]


def test_copies_and_pickles_are_equal():
    config = SVFConfig(target_modules=["up_proj"], rank=2, fingerprint=FINGERPRINT)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and other.peft_type is PeftType.SVF


@pytest.mark.parametrize(
    "regex", [{"target_modules": r"(.*a)*b"}, {"exclude_modules": r"(.*a)*b"}, {"layers_pattern": r"(.*a)*b"}], ids=str
)
def test_regular_expressions_of_a_file_give_way_to_the_modules_of_the_fingerprint(regex, tmp_path):
    stacks = {"layers.0.experts.gate_up_proj": FINGERPRINT["model.layers.0.mlp.up_proj"]}
    extra = {"layers_to_transform": [0]} if "layers_pattern" in regex else {}
    fields = {"target_modules": ["up_proj"], "target_parameters": ["experts.gate_up_proj"], **extra, **regex}
    SVFConfig(**fields, fingerprint=FINGERPRINT | stacks).save_pretrained(tmp_path)
    config = SVFConfig.from_pretrained(tmp_path)
    assert config.target_modules == set(FINGERPRINT)
    assert config.exclude_modules is config.layers_pattern is config.layers_to_transform is None
    SVFConfig(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"regular expression and has no fingerprint.*adapter_config.json"):
        SVFConfig.from_pretrained(tmp_path)


def test_unknown_fields_of_a_file_are_ignored_with_the_warning_of_peft(tmp_path):
    SVFConfig(rank=2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"parametrization": "offset", "limit": 2}))  # what the first versions wrote
    assert SVFConfig.from_pretrained(tmp_path).rank == 2
    path.write_text(json.dumps(entry | {"rnak": 3}))
    with pytest.warns(UserWarning, match=r"\['rnak'\] for class SVFConfig, these are ignored"):
        assert SVFConfig.from_pretrained(tmp_path).rank == 2
