# SPDX-License-Identifier: Apache-2.0
"""Laws of the file that touches the registries: the type is whole, nothing is done twice, strangers are refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from pico import build, logits, randomize
from transformers.pipelines import PIPELINE_REGISTRY

import peft_svf
from peft_svf import SVFConfig, SVFModel, _registration
from peft_svf.experts import hub


def test_the_type_is_a_whole_member_of_the_enum():
    member = PeftType.SVF
    assert member is PeftType("SVF") is PeftType["SVF"]
    assert member in list(PeftType) and list(PeftType).count(member) == 1
    assert member == "SVF" and member.value == "SVF" and member.name == "SVF" and hash(member) == hash("SVF")
    assert isinstance(member, PeftType) and repr(PeftType.LORA).replace("LORA", "SVF") == repr(member)


def test_the_type_leads_to_config_tuner_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SVF] is SVFConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SVF] is SVFModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SVF] == SVFModel.prefix == "svf_"
    assert type(get_peft_config({"peft_type": "SVF", "rank": 3})) is SVFConfig
    assert PeftType("LORA") is PeftType.LORA and PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig


def test_registering_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), PeftModel.push_to_hub
    _registration.register()
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), PeftModel.push_to_hub) == before


def test_a_type_of_that_name_from_another_package_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.SVF, LoraConfig)
    with pytest.raises(ImportError, match=r"The PEFT type SVF is taken by peft\.tuners\.lora\.config\.LoraConfig"):
        _registration.register()


@pytest.mark.parametrize("stranger", [LoraConfig, "transformers.pipelines.LazyPipeline"])
def test_a_pipeline_of_that_name_from_another_package_is_refused_by_name(stranger, monkeypatch):
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks, _registration.PIPELINE, {"impl": stranger})
    with pytest.raises(ImportError, match=f"'transformer2' is taken by {stranger}: import only one"):
        _registration.register()


@pytest.mark.parametrize("name", _registration.NEEDED)
def test_a_library_that_is_too_old_is_named_with_the_line_that_updates_it(name, monkeypatch):
    installed = _registration.version
    monkeypatch.setattr(_registration, "version", lambda n: "0.1.2" if n == name else installed(n))
    with pytest.raises(ImportError) as error:
        _registration.check_versions()
    message = str(error.value)
    floor = re.search(r"0\.1\.2 \(needs >= ([\d.]+)\)", message)[1]
    assert f"{name} 0.1.2" in message and message.endswith(f"pip install -U '{name}>={floor}'")
    assert f'"{name}>={floor},' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_push_is_wrapped_once_and_takes_svf_adapters_only(monkeypatch):
    calls = []
    monkeypatch.setattr(PeftModel, "push_to_hub", lambda self, repo_id, **kw: calls.append(("peft", repo_id, kw)))
    monkeypatch.setattr(hub, "push_expert", lambda model, repo_id, **kw: calls.append(("svf", repo_id, kw)))
    for _ in range(2):
        _registration.register()
    get_peft_model(build(), SVFConfig()).push_to_hub("me/svf", private=True)
    get_peft_model(build(), LoraConfig(target_modules=["q_proj"])).push_to_hub("me/lora", private=True)
    assert calls == [("svf", "me/svf", {"private": True}), ("peft", "me/lora", {"private": True})]


def test_a_saved_adapter_names_its_type_and_auto_classes_load_it(tmp_path):
    base = build()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), SVFConfig(task_type="CAUSAL_LM")).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "expert")
    assert json.loads((tmp_path / "expert" / "adapter_config.json").read_text())["peft_type"] == "SVF"
    assert type(PeftConfig.from_pretrained(tmp_path / "expert")) is SVFConfig
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "expert").eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
def test_importing_the_package_says_nothing():
    """Neither on the console nor as a warning, in a fresh interpreter."""
    code = (
        "import sys, peft, warnings; warnings.simplefilter('error'); sys.path.insert(0, sys.argv[1]); import peft_svf"
    )
    source = str(Path(peft_svf.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "peft_svf" not in done.stderr and "Warning" not in done.stderr
