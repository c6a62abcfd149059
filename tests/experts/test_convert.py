# SPDX-License-Identifier: Apache-2.0
"""What others have trained becomes an expert: with equal weights if z-vectors can express it, else the nearest."""

import pickle

import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_svf import Expert, SVFConfig
from peft_svf.experts import import_reference, merge_expert, nearest_expert


def published(weight, logits):
    """`U diag(S m) V^T sum(S) / sum(S m)`, `m = sigmoid(logits)` in bfloat16: the original in float64."""
    U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    m = torch.sigmoid(logits).to(torch.bfloat16).double()
    return (U * (S * m)) @ Vt * (S.sum() / (S * m).sum())


def mlp(model):
    """Names of the weights that the original moves, in its order."""
    return [name for name in model.state_dict() if "mlp" in name and name.endswith(".weight")]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("listed", [False, True], ids=["learnable_params", "policy_params"])
def test_expert_of_the_original_has_equal_weights(kind, listed, tmp_path):
    base, merged = pico.build(kind, name="base"), pico.build(kind, name="base")
    draws = torch.Generator().manual_seed(4)
    logits = {
        name: torch.nn.Parameter((0.1 + torch.randn(min(base.state_dict()[name].shape), generator=draws)).bfloat16())
        for name in mlp(base)
    }
    numbered = {f"learnable_params_module_list.{i}": p for i, p in enumerate(logits.values())}
    torch.save(numbered if listed else logits, tmp_path / "params.pt")
    expert = import_reference(tmp_path / "params.pt", base, "math", "sums")
    expert.save(tmp_path / "math")
    loaded = Expert.load(tmp_path / "math")
    assert loaded == expert and loaded.description == "sums" and loaded.base_model == "base"
    merge_expert(loaded, merged)
    for name, p in logits.items():
        module = name.removesuffix(".weight")
        expected = published(pico.matrix_of(base.get_submodule(module)), p.detach())
        torch.testing.assert_close(pico.matrix_of(merged.get_submodule(module)).double(), expected, rtol=0, atol=2e-6)
    model = PeftModel.from_pretrained(base, tmp_path / "math").eval()
    torch.testing.assert_close(pico.logits(model), pico.logits(merged), rtol=1e-4, atol=1e-4)


class Payload:
    def __reduce__(self):
        return print, ("a file of tensors was run",)


def test_files_that_are_no_expert_of_the_original_are_refused_and_never_run(tmp_path, capsys):
    base = pico.build("llama", name="base")
    good = {name: torch.zeros(24) for name in mlp(base)}
    contents = {
        "tensors alone": {"x": Payload()},
        "isn't a learnable_params.pt": {"adaptive_weights": torch.zeros(3)},
        "a logit for each singular value": {**good, mlp(base)[0]: torch.zeros(7)},
    }
    for message, content in contents.items():
        torch.save(content, tmp_path / "params.pt", pickle_module=pickle)
        with pytest.raises(ValueError, match=message):
            import_reference(tmp_path / "params.pt", base, "x")
    for content in (b"", b"hello", b"PK", pickle.dumps(good)[:-20]):
        (tmp_path / "params.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"isn't a learnable_params\.pt"):
            import_reference(tmp_path / "params.pt", base, "x")
    assert capsys.readouterr().out == ""


def test_expert_nearest_to_a_merged_expert_is_that_expert_and_explains_all():
    base, tuned = pico.build("gpt2", name="base"), pico.build("gpt2", name="tuned")
    model = get_peft_model(pico.build("gpt2", name="base"), SVFConfig(task_type="CAUSAL_LM"))
    z = pico.randomize(model, seed=1)
    pico.fill(tuned, z)
    expert = nearest_expert(tuned, "x", base)
    assert set(expert.z) == set(z)
    for name, vector in z.items():
        torch.testing.assert_close(expert.z[name].double(), vector, rtol=0, atol=1e-3)
    assert expert.provenance["explained"]["all"] == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_expert_nearest_to_a_lora_is_the_projection_of_its_change(kind):
    base = pico.build(kind, name="base")
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_fc"]
    torch.manual_seed(0)
    config = LoraConfig(target_modules=targets, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    lora = get_peft_model(pico.build(kind, name="base"), config)
    expert = nearest_expert(lora, "x")
    kept = total = 0.0
    for name, vector in expert.z.items():
        W = pico.matrix_of(base.get_submodule(name)).double()
        layer = lora.get_base_model().get_submodule(name)
        D = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double() * layer.scaling[
            "default"
        ]
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        coefficients = (U * (D @ Vt.T)).sum(0)
        torch.testing.assert_close(vector.double(), 1 + coefficients / S, rtol=1e-3, atol=1e-3)
        kept, total = kept + coefficients.square().sum(), total + D.square().sum()
    assert expert.provenance["explained"]["all"] == pytest.approx((kept / total).item(), abs=1e-3)
    assert 0 < kept / total < 0.5


def test_models_and_adapters_that_cannot_be_projected_are_refused_by_name():
    base = pico.build("llama", name="base")
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    refusals = {
        "No linear weight has changed": lambda: nearest_expert(pico.build("llama"), "x", base),
        "The base has no": lambda: nearest_expert(pico.build("qwen2"), "x", base),
        "does more than add": lambda: nearest_expert(get_peft_model(pico.build("llama"), lora), "x"),
    }
    for message, run in refusals.items():
        with pytest.raises(ValueError, match=message):
            run()
