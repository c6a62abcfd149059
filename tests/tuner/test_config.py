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


LAYERS = {"layers_to_transform": [0]}
REFUSED = {
    "rank zero": ({"rank": 0}, r"`rank` is the number of singular values to move, at least 1.*got 0"),
    "rank as text": ({"rank": "4"}, "got '4'"),
    "rank as bool": ({"rank": True}, "got True"),
    "dtype": ({"basis_dtype": "float16"}, "`basis_dtype` must be one of auto, float32, bfloat16; got 'float16'"),
    "source": ({"basis_from": None}, "`basis_from` must be one of auto, checkpoint, memory; got None"),
    "plan": ({"plan": "fast"}, "`plan` must be one of .*; got 'fast'"),
    "fingerprint": ({"fingerprint": ["abc"]}, "`fingerprint` must be a dict"),
    "regex and layers": (
        {"target_modules": ".*proj"} | LAYERS,
        "`layers_to_transform` cannot be used when",
    ),
    "all-linear and layers": ({"target_modules": "all-linear"} | LAYERS, "`layers_to_transform` cannot"),
    "pattern alone": ({"target_modules": ["v_proj"], "layers_pattern": "h"}, "`layers_to_transform` must also be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_contradict_themselves_are_refused(case):
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        SVFConfig(**fields)


def test_save_then_load_is_the_same_config(tmp_path):
    modules = {"target_modules": ["up_proj", "v_proj"], "exclude_modules": ["0.up_proj"], "layers_pattern": "layers"}
    modules |= {"layers_to_transform": [0, 1], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    basis = {"rank": 3, "init_weights": False, "basis_dtype": "bfloat16", "basis_from": "memory"}
    facts = {"description": "counts: 50 % of α", "fingerprint": FINGERPRINT, "base_model_name_or_path": "pico/llama"}
    config = SVFConfig(**modules, **basis, **facts)
    config.save_pretrained(tmp_path)
    for cls in (SVFConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is SVFConfig
        assert loaded.to_dict() == config.to_dict()
    entry = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (entry["peft_type"], entry["fingerprint"]) == ("SVF", FINGERPRINT)
    assert not [key for key in entry if key.startswith("_")]
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
