# SPDX-License-Identifier: Apache-2.0
"""Laws of SVF on parameters: the stacked weights of fused mixture-of-experts modules, against the oracle."""

from concurrent.futures import ThreadPoolExecutor

import accelerate
import oracle
import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from pico import VOCABULARY, checkpoint, inputs, logits, svf_layers

from peft_svf import SVFConfig

COMMON = dict(  # noqa: C408
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, initializer_range=0.2, tie_word_embeddings=False, num_experts_per_tok=2,
)  # fmt: skip
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(intermediate_size=24, num_local_experts=3, **COMMON),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(moe_intermediate_size=24, num_experts=4, **COMMON),
    "gpt_oss": lambda: hf.GptOssConfig(intermediate_size=24, num_local_experts=3, **COMMON),  # (E, in, out)
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
all_kinds = pytest.mark.parametrize("kind", CONFIGS)
usual_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def build(kind, dtype=torch.float32, name="", seed=0):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.config._name_or_path = model.name_or_path = name
    return model.to(dtype).eval()


def adapt(kind, dtype=torch.float32, **config):
    return get_peft_model(build(kind, dtype), SVFConfig(target_parameters=EXPERTS, **config))


def weight_names(model):
    """Full names of the adapted parameters -> their wrappers."""
    return {layer.weight_name(name): layer for name, layer in svf_layers(model).items()}


def randomize(model, adapter="default", seed=0, scale=0.3):
    """Draw offsets; returns z `(E, k)` by parameter name."""
    draws, z = torch.Generator().manual_seed(seed), {}
    for name, layer in weight_names(model).items():
        offset = layer.svf_offset[adapter].weight
        offset.data.copy_(scale * torch.randn(offset.shape, generator=draws))
        offset.data[0] = -1.0  # z = 0
        z[name] = 1 + offset.detach().double().view(layer.matrices, -1)
    return z


def rescaled(stack, z):
    return torch.stack([oracle.rescaled(W, row) for W, row in zip(stack, z, strict=True)])


def expected(kind, z, dtype=torch.float32):
    """A plain model with the oracle's weights in place."""
    model = build(kind, dtype)
    for name, vectors in z.items():
        parameter = model.get_parameter(name)
        parameter.data = rescaled(parameter.data, vectors).to(dtype)
    return model


def close(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance * float(wanted.abs().max()))


@all_kinds
@usual_dtypes
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_z_of_ones_is_the_base_model_to_the_bit(kind, dtype, training):
    plain = build(kind, dtype).train(training)
    config = SVFConfig(target_modules=["q_proj"], target_parameters=EXPERTS)
    model = get_peft_model(build(kind, dtype), config).train(training)
    assert len(svf_layers(model)) == 6
    ids = inputs(plain)
    assert torch.equal(model(**ids).logits, plain(**ids).logits)
    assert torch.equal(logits(model), logits(plain))


@all_kinds
@pytest.mark.parametrize("rank", [None, 5])
def test_every_matrix_of_the_stack_is_rescaled_by_its_part_of_the_vector_and_restored_to_the_bit(kind, rank):
    model, base = adapt(kind, rank=rank).eval(), build(kind)
    model.add_adapter("whole", SVFConfig(target_parameters=EXPERTS))  # short vectors are padded matrix by matrix
    layers = weight_names(model)
    logits(model)
    z = randomize(model)
    wanted = logits(expected(kind, z))
    close(logits(model), wanted)
    assert model.svf_memory()["total"]["merged"] == sum(layer.base_weight.nbytes for layer in layers.values())
    assert not torch.allclose(wanted, logits(base), atol=1e-3)
    for _ in range(5):
        model.merge_adapter()
        close(logits(model), wanted)
        assert model.svf_memory()["total"]["merged"] == 0
        for name, layer in layers.items():
            close(layer.base_weight, rescaled(base.get_parameter(name).data, z[name]))
        model.unmerge_adapter()
        assert all(torch.equal(layer.base_weight, base.get_parameter(name)) for name, layer in layers.items())
    bare = model.merge_and_unload()
    assert not svf_layers(bare) and type(bare.model.layers[0].mlp.experts) is type(base.model.layers[0].mlp.experts)
    close(logits(bare), wanted)


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
    plain = expected(kind, z).train()
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


@all_kinds
def test_save_then_load_is_exact_and_another_base_is_refused(kind, tmp_path):
    model = get_peft_model(build(kind, name="pico/moe"), SVFConfig(target_parameters=EXPERTS))
    randomize(model)
    model.save_pretrained(tmp_path)
    plain = build(kind, name="pico/moe")
    plain.load_adapter(tmp_path)  # transformers' own
    for again in (plain, PeftModel.from_pretrained(build(kind, name="pico/moe"), tmp_path)):
        assert torch.equal(logits(again), logits(model.eval()))
    other = build(kind, name="pico/other", seed=1)
    before = logits(other)
    with pytest.raises(ValueError, match=r"does not belong to this base model: .*mlp\.experts\.(gate_up|down)_proj"):
        PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(logits(other), before) and not svf_layers(other)


@all_kinds
def test_several_adapters_and_mixed_batches_equal_one_by_one(kind):
    model = adapt(kind).eval()
    model.add_adapter("other", SVFConfig(target_parameters=EXPERTS))
    randomize(model, "default", seed=1)
    randomize(model, "other", seed=2)
    mixed = logits(model, adapter_names=["default", "__base__", "other"])
    for row, name in enumerate(["default", None, "other"]):
        if name is None:
            with model.disable_adapter():
                alone = logits(model)
        else:
            model.set_adapter(name)
            alone = logits(model)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("other")
    model.add_weighted_adapter(["default"], [0.5], "weak")
    for layer in svf_layers(model).values():
        assert torch.equal(layer.svf_offset["weak"].weight, 0.5 * layer.svf_offset["default"].weight)


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
    with pytest.raises(ValueError, match=r"'sinks' .*shape \(2,\).*stacks of them"):
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
            get_peft_model(model, SVFConfig(target_parameters=EXPERTS))
        assert torch.equal(logits(model), logits(plain))
        return
    model = adapt("mixtral").eval()
    accelerate.cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        logits(model)


def test_a_module_without_routing_beside_its_tokens_refuses_rows_of_their_own():
    config = hf.Llama4TextConfig(
        intermediate_size=24, intermediate_size_mlp=24, num_local_experts=3,
        **{**COMMON, "num_experts_per_tok": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(
        hf.AutoModelForCausalLM.from_config(config), SVFConfig(target_parameters=["feed_forward.experts.down_proj"])
    ).eval()
    model.add_adapter("other", SVFConfig(target_parameters=["feed_forward.experts.down_proj"]))
    randomize(model)
    logits(model)
    with pytest.raises(ValueError, match="cannot have z-vectors of their own here: give the batch one mixture"):
        logits(model, adapter_names=["default", "other", "__base__"])
