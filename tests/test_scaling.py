# SPDX-License-Identifier: Apache-2.0
"""The formulas behind docs/scaling.md against models: parameters and bytes counted on their tensors."""

import sys
from pathlib import Path

import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_svf import SVFConfig
from peft_svf.tuner.cache import usage
from peft_svf.tuner.plans import break_even

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import formulas as f  # noqa: E402

PICO = f.Architecture("pico llama", pico.WIDTH, pico.MLP, pico.LAYERS, pico.HEADS, pico.KV_HEADS, 6)
CHOICES = [f.QV, f.MLP, f.ALL]


def adapted(targets, plan="narrow", **config):
    model = pico.build("llama")
    config = SVFConfig(**{"target_modules": list(targets), "basis_dtype": "bfloat16", "plan": plan} | config)
    return get_peft_model(model, config)


def meta_model(arch):
    config = LlamaConfig(
        hidden_size=arch.hidden, intermediate_size=arch.mlp, num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads, num_key_value_heads=arch.kv_heads, head_dim=arch.head_dim, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("arch", [f.SMOLLM2_135M, f.LLAMA_3_8B], ids=lambda a: a.name)
def test_the_shapes_are_those_of_the_model_class(arch):
    linears = [m for name, m in meta_model(arch).named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    shapes = f.weights(arch)
    expected = sorted((s.tall, s.wide) for s in shapes for _ in range(s.count))
    assert sorted((m.out_features, m.in_features) for m in linears) == expected
    assert f.entries(shapes) == sum(m.weight.numel() for m in linears)


def test_shapes_and_bytes_of_stacked_experts_are_those_of_the_model():
    arch = f.Architecture("pico", pico.WIDTH, 32, pico.LAYERS, pico.HEADS, pico.KV_HEADS, 6, experts=4, active=2)
    model, shapes = pico.build("qwen3_moe"), f.weights(arch, f.MLP)
    matrices = [(name, p.numel()) for name, p in model.named_parameters() if p.dim() > 1]
    assert f.entries(shapes) == sum(size for name, size in matrices if ".mlp.experts." in name)
    assert f.entries(f.weights(arch, f.ATTENTION)) == sum(size for name, size in matrices if ".self_attn." in name)
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = SVFConfig(target_parameters=stacks, basis_dtype="bfloat16")
    total = get_peft_model(model, config).base_model.svf_memory()["total"]
    assert total["basis"] == f.basis_bytes(shapes)
    assert total["offsets"] == f.FP32 * f.svf_parameters(shapes)


def test_parameters_of_the_paper():
    qv = f.weights(f.LLAMA_3_8B, f.QV)
    assert f.svf_parameters(qv) == 163_840
    assert f.lora_parameters(qv) == 6_815_744
    assert f.svf_parameters(f.weights(f.SMOLLM2_135M, f.MLP)) == 51_840


@pytest.mark.parametrize("targets", CHOICES)
def test_trained_numbers_are_those_that_peft_counts(targets):
    shapes = f.weights(PICO, targets)
    lora = get_peft_model(pico.build("llama"), LoraConfig(target_modules=list(targets), r=3))
    assert adapted(targets).get_nb_trainable_parameters()[0] == f.svf_parameters(shapes)
    assert adapted(targets, rank=5).get_nb_trainable_parameters()[0] == f.svf_parameters(shapes, 5)
    assert lora.get_nb_trainable_parameters()[0] == f.lora_parameters(shapes, 3)


@pytest.mark.parametrize("targets", CHOICES)
def test_bytes_are_those_that_the_model_counts_on_its_tensors(targets):
    shapes = f.weights(PICO, targets)
    totals, in_float32 = {}, 4  # the tiny model, its copies and bases; without small z, so without thin products
    for plan in ("narrow", "merged", "factored"):
        model = adapted(targets, plan, basis_dtype="float32")
        pico.randomize(model, scale=0.1)
        pico.logits(model)
        totals[plan] = model.base_model.svf_memory()["total"]
    kept = {"basis": f.basis_bytes(shapes, in_float32), "merged": 0, "pristine": 0, "factored": 0}
    kept["offsets"], built = f.FP32 * f.svf_parameters(shapes), f.merged_bytes(shapes, in_float32)
    assert totals == {"narrow": kept, "merged": kept | {"merged": built}, "factored": kept | {"factored": built}}
    cut = adapted(targets, rank=5).base_model.svf_memory()["total"]
    assert cut["basis"] == f.basis_bytes(shapes, rank=5)


def test_bytes_on_disk_are_those_of_the_tensors_and_their_headers(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path))
    adapted(f.MLP)
    entries, size = usage()
    headers = size - f.cache_bytes(f.weights(PICO, f.MLP))
    assert 0 < headers < 1000 * entries


@pytest.mark.parametrize("targets", [f.MLP, f.ALL])
def test_bases_of_llama_3_8b_are_at_most_three_tenths_of_u_s_v(targets):
    shapes = f.weights(f.LLAMA_3_8B, targets)
    assert f.basis_bytes(shapes) <= 0.30 * f.dense_bytes(shapes)["factors"]


@pytest.mark.parametrize("tall, wide, tokens", [(8, 5, 3), (8, 5, 50), (6, 6, 20)])
def test_flops_are_those_that_pytorch_counts(tall, wide, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    from peft_svf.tuner.basis import factorize
    from peft_svf.tuner.plans import factored_linear, fold, merged_linear, split

    shape = f.Shape("fc", tall, wide, 1)
    weight, x = torch.randn(tall, wide), torch.randn(tokens, wide, requires_grad=True)
    basis = factorize(weight)
    Q, S, offset = basis.Q.float(), basis.S.float(), torch.full((shape.r,), 0.1, requires_grad=True)
    factored = split(weight, None, "in", Q)

    def counted(run):
        with FlopCounterMode(display=False) as counter:
            value = run()
        return counter.get_total_flops(), value

    cost, merged = counted(lambda: fold(weight, None, "in", Q, S, offset.detach()))
    assert cost == f.merge_flops([shape])
    cost, y = counted(lambda: merged_linear(x, offset, merged))
    assert cost == f.forward_flops([shape], tokens)
    cost, _ = counted(lambda: y.backward(torch.ones_like(y)))
    # the r x r product is projected on one side by a product, on the other by sums that are no products
    assert cost == f.forward_flops([shape], tokens) + f.gradient_flops([shape], tokens)
    cost, _ = counted(lambda: factored_linear(x, factored, 1 + offset))
    assert cost == f.factored_flops([shape], tokens)


def test_a_step_has_the_ratios_that_the_counts_of_the_plans_give():
    square = [f.Shape("fc", 64, 64, 3)]
    many = 1_000_000
    assert f.step_ratio(square, "merged", many) == pytest.approx(1.5, rel=1e-3)
    assert f.step_ratio(square, "narrow", many) == 3.0
    assert f.step_ratio(square, "factored", many) == 2.0
    assert f.step_ratio(square, "dense", many) == pytest.approx(1.5, rel=1e-3)


def test_the_tables_of_the_page_are_the_ones_the_formulas_give():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in f.TABLES:
        assert "\n".join(table()) in page, f"{table.__name__} has changed: python benchmarks/formulas.py"
    one_mlp_weight = break_even(f.LLAMA_3_8B.mlp, f.LLAMA_3_8B.hidden, f.LLAMA_3_8B.hidden)
    assert f"From {round(one_mlp_weight, -2):,.0f} tokens" in page
