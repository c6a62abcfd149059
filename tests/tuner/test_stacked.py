# SPDX-License-Identifier: Apache-2.0
"""Laws of SVF on parameters: the stacked weights of fused mixture-of-experts modules, against the oracle."""

from concurrent.futures import ThreadPoolExecutor

import accelerate
import oracle
import pytest
import torch
import transformers as hf
from peft import get_peft_model
from pico import COMMON, GROUPED, STACKED, STACKS, build, checkpoint, fill, inputs, logits, randomize, svf_layers

from peft_svf import SVFConfig

all_kinds = pytest.mark.parametrize("kind", STACKED)


def adapt(kind, **config):
    return get_peft_model(build(kind), SVFConfig(**STACKS, **config))


def weight_names(model):
    """Full names of the adapted parameters -> their wrappers."""
    return {layer.weight_name(name): layer for name, layer in svf_layers(model).items()}


def close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance * float(wanted.abs().max()))


@all_kinds
@pytest.mark.parametrize("rank", [None, 5])
def test_every_matrix_of_the_stack_is_rescaled_by_its_part_of_the_vector_and_restored_to_the_bit(kind, rank):
    model, base = adapt(kind, rank=rank).eval(), build(kind)
    model.add_adapter("whole", SVFConfig(**STACKS))  # short vectors are padded matrix by matrix
    layers, z = weight_names(model), randomize(model)
    filled = fill(build(kind), z)
    close(logits(model), logits(filled))
    assert model.svf_memory()["total"]["merged"] == sum(layer.base_weight.nbytes for layer in layers.values())
    for _ in range(5):
        model.merge_adapter()
        assert model.svf_memory()["total"]["merged"] == 0
        for name, layer in layers.items():
            close(layer.base_weight, filled.get_parameter(name).data)
        model.unmerge_adapter()
        assert all(torch.equal(layer.base_weight, base.get_parameter(name)) for name, layer in layers.items())
    model.add_weighted_adapter(["default"], [0.5], "weak")
    model.set_adapter("weak")
    close(logits(model), logits(fill(build(kind), {name: (1 + vectors) / 2 for name, vectors in z.items()})))


@all_kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_the_oracles_and_no_base_weight_keeps_one(kind, checkpointing):
    model = adapt(kind)
    z = randomize(model)
    model.train()
    if checkpointing:
        checkpoint(model.base_model.model, {"use_reentrant": False})
    ids = inputs(model)
    model(**ids, labels=ids["input_ids"], use_cache=False).loss.backward()
    plain = fill(build(kind), z).train()
    plain(**ids, labels=ids["input_ids"], use_cache=False).loss.backward()
    base = build(kind)
    for name, layer in weight_names(model).items():
        G = plain.get_parameter(name).grad
        wanted = [
            oracle.dense_gradient(W, row, g)
            for W, row, g in zip(base.get_parameter(name).data, z[name], G, strict=True)
        ]
        found = layer.svf_offset["default"].weight.grad.view(layer.matrices, -1)
        close(found, torch.stack(wanted), 1e-4)
    assert all(p.grad is None for n, p in model.named_parameters() if "svf_offset" not in n)


def test_an_exception_inside_the_experts_leaves_the_parameter_in_place(monkeypatch):
    model = adapt("mixtral").eval()
    randomize(model)
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    before = dict(experts.named_parameters())

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(experts, "forward", broken)
        with pytest.raises(RuntimeError, match="broken"):
            logits(model)
    assert all(parameter is before[name] for name, parameter in experts.named_parameters())


def test_what_is_no_stack_of_matrices_is_refused_and_leaves_the_model_alone():
    plain = build("gpt_oss")
    with pytest.raises(ValueError, match=r"'sinks' .*shape \(4,\).*stacks of them"):
        get_peft_model(plain, SVFConfig(target_parameters=["self_attn.sinks"]))
    assert not svf_layers(plain) and torch.equal(logits(plain), logits(build("gpt_oss")))


def test_the_basis_follows_the_model_and_inference_mode_leaves_nothing_behind():
    model = adapt("mixtral").eval()
    layer = next(iter(svf_layers(model).values()))
    moved = []
    layer._move_basis = moved.append
    model.double()
    assert moved and all(device.type == "cpu" for device in moved)
    model.float()
    with torch.inference_mode():
        logits(model)
        model(**inputs(model))
    randomize(model, seed=3)
    logits(model)
    model.train()(**inputs(model)).logits.sum().backward()


def test_threads_leave_the_parameter_in_place():
    model = adapt("mixtral").eval()
    randomize(model)
    expected = logits(model)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: logits(model), range(24)))
    assert all(torch.equal(answer, expected) for answer in answers)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_offloaded_stacks_are_refused_and_leave_the_model_alone(first):
    plain = build("mixtral").eval()
    if first == "offload":
        model = accelerate.cpu_offload(build("mixtral"), execution_device=torch.device("cpu")).eval()
        with pytest.raises(ValueError, match="is offloaded by accelerate"):
            get_peft_model(model, SVFConfig(**STACKS))
        assert torch.equal(logits(model), logits(plain))
        return
    model = adapt("mixtral").eval()
    accelerate.cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        logits(model)


def test_a_module_without_routing_beside_its_tokens_refuses_rows_of_their_own():
    experts = {"intermediate_size_mlp": 40, "num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 6}
    config = hf.Llama4TextConfig(**COMMON, **GROUPED, **experts)
    torch.manual_seed(0)
    model = get_peft_model(
        hf.AutoModelForCausalLM.from_config(config), SVFConfig(target_parameters=["feed_forward.experts.down_proj"])
    ).eval()
    model.add_adapter("other", SVFConfig(target_parameters=["feed_forward.experts.down_proj"]))
    randomize(model)
    logits(model)
    with pytest.raises(ValueError, match="cannot have z-vectors of their own here: give the batch one mixture"):
        logits(model, adapter_names=["default", "other", "__base__"])
