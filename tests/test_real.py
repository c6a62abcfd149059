# SPDX-License-Identifier: Apache-2.0
"""Laws on a real model, SmolLM2-135M-Instruct in bfloat16, and on the experts of this repository that belong to it."""

from pathlib import Path

import oracle
import pytest
import torch
from peft import PeftModel, get_peft_model
from pico import svf_layers
from smollm2 import load_smollm2

from peft_svf import SVFConfig, Transformer2Model
from peft_svf.evaluation import evaluate, paired_difference
from peft_svf.tasks import get_task

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES, EXPERTS = ROOT / "examples", ROOT / "benchmarks" / "experts"
TASKS = {"reasoning": "arc_easy", "code": "mbpp", "math": "gsm8k"}


@pytest.fixture
def model_and_tokenizer():
    return load_smollm2()


def batch(tokenizer):
    texts = ["The singular values of a weight", "Water boils at a lower temperature on a mountain, since"]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("plan", ["merged", "narrow"])
def test_z_of_ones_is_the_model_and_unmerging_restores_it_to_the_bit(model_and_tokenizer, plan):
    model, tokenizer = model_and_tokenizer
    ids = batch(tokenizer)
    with torch.no_grad():
        expected = model(**ids).logits
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, SVFConfig(target_modules="all-linear", plan=plan))
    assert len(svf_layers(adapted)) == 210
    for training in (True, False):
        assert torch.equal(adapted.train(training)(**ids).logits, expected)
    for layer in svf_layers(adapted).values():
        layer.svf_offset["default"].weight.data.normal_(std=0.1)
    for _ in range(3):
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    bare = adapted.unload()
    assert all(torch.equal(parameter, before[name]) for name, parameter in bare.named_parameters())


# What the gradient of the smallest twentieth of directions may be off by, which a bfloat16 basis rounds more.
SMALL = {"float32": 3e-2, "auto": 1e-1}


@pytest.mark.parametrize("plan", ["merged", "narrow", "factored"])
@pytest.mark.parametrize("basis_dtype", SMALL)
@pytest.mark.parametrize("module", ["mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"])
def test_the_gradient_of_z_on_real_weights_in_bfloat16(model_and_tokenizer, module, basis_dtype, plan):
    """Real spectra have condition numbers up to 5e4; the small directions must have their gradient as well."""
    model, _ = model_and_tokenizer
    config = SVFConfig(target_modules=[f"layers.3.{module}"], plan=plan, basis_dtype=basis_dtype)
    layer = next(iter(svf_layers(get_peft_model(model, config).train()).values()))
    weight = layer.base_layer.weight.data
    z = 1 + 0.1 * torch.randn(layer.directions, generator=torch.Generator().manual_seed(0))
    layer.svf_offset["default"].weight.data.copy_(z - 1)
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(2048, layer.in_features, generator=draws).bfloat16().requires_grad_()
    g = torch.randn(2048, layer.out_features, generator=draws).bfloat16()
    layer(x).backward(g)
    assert layer.svf_chosen == plan
    dz, dx = oracle.gradients(weight, z, x, g)
    found = layer.svf_offset["default"].weight.grad.double()
    assert float((found - dz).norm() / dz.norm()) < 1e-2
    assert float(((found - dz).abs() / dz.abs()).median()) < 2e-2
    small = slice(-len(dz) // 20, None)
    if plan == "merged":
        assert float((found - dz)[small].norm() / dz[small].norm()) < SMALL[basis_dtype]
    assert float((x.grad.double() - dx).norm() / dx.norm()) < 1e-2


@pytest.mark.parametrize("name", TASKS)
def test_a_shipped_expert_loads_without_a_warning_and_answers_otherwise_than_the_base(model_and_tokenizer, name):
    model, tokenizer = model_and_tokenizer
    rows = get_task(TASKS[name]).rows("test", limit=48, folder=EXAMPLES / "data")
    adapted = PeftModel.from_pretrained(model, EXPERTS / name)
    expert = evaluate(adapted, tokenizer, rows)
    with adapted.disable_adapter():
        base = evaluate(adapted, tokenizer, rows)
    assert [r["choice"] for r in expert.records] != [r["choice"] for r in base.records]
    if name != "math":  # its gain is smaller than what 48 rows can show
        assert paired_difference(expert, base)[0] > 0


def test_the_classifier_names_the_kind_of_real_questions(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    experts = [str(EXPERTS / name) for name in TASKS]
    model = Transformer2Model(model, tokenizer, experts, classifier=str(EXPERTS / "dispatch"))
    right = total = 0
    for name, task in TASKS.items():
        rows = get_task(task).rows("test", "generate", limit=8, folder=EXAMPLES / "data")
        decisions = model.first_pass([row["prompt"] for row in rows])
        right += sum(decision.choice == name for decision in decisions)
        total += len(rows)
    assert right >= 0.8 * total
