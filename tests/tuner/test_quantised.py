# SPDX-License-Identifier: Apache-2.0
"""
Laws of SVF on a quantised base: bitsandbytes, HQQ and torchao where they are installed, and packed layers in general.

Axes are multiples of 64: others bitsandbytes' 4-bit CPU kernels (0.50) refuse, or dequantise with twice the error.
"""

import importlib.util
from types import SimpleNamespace

import oracle
import pytest
import torch
import transformers as hf
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import quantization_utils
from pico import COMMON, OneLayer, edit_config, edit_tensors, inputs, logits, one_layer, randomize, svf_layers
from safetensors.torch import load_file
from torch import nn

from peft_svf import SVFConfig
from peft_svf.tuner import cache as basis_cache
from peft_svf.tuner import layer, targets, weights

FP32, BF16 = torch.float32, torch.bfloat16
INSTALLED = {"8-bit": "bitsandbytes", "4-bit": "bitsandbytes", "double": "bitsandbytes"}
INSTALLED |= {"torchao": "torchao", "hqq": "hqq"}
TOLERANCE = {"8-bit": 2e-2, "4-bit": 1e-5, "double": 1e-5, "torchao": 1e-5, "hqq": 1e-5}
every_kind = pytest.mark.parametrize("kind", INSTALLED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in bfloat16 of a tiny random Llama."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = hf.LlamaConfig(**COMMON, **sizes, num_attention_heads=4, num_key_value_heads=2)
    hf.LlamaForCausalLM(config).to(BF16).save_pretrained(path)
    return path


def quantisation(kind):
    if importlib.util.find_spec(INSTALLED[kind]) is None:
        pytest.skip(f"{INSTALLED[kind]} is not installed")
    if kind == "8-bit":
        return hf.BitsAndBytesConfig(load_in_8bit=True)
    if kind in ("4-bit", "double"):
        return hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4" if kind == "4-bit" else "fp4",
            bnb_4bit_use_double_quant=kind == "double",
            bnb_4bit_compute_dtype=FP32,
        )
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return hf.TorchAoConfig(Int8WeightOnlyConfig())
    return None


def load(folder, kind=None, dtype=FP32):
    """The base, quantised or (`None`) as it is stored."""
    if kind is None:
        return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    config = quantisation(kind)
    if kind != "hqq":
        return hf.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config, device_map="cpu"
        ).eval()
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # transformers 5.23 does not load HQQ yet

    base = load(folder, dtype=dtype)
    for block in base.model.layers:
        for name, linear in list(block.mlp.named_children()):
            if isinstance(linear, nn.Linear):
                packed = HQQLinear(
                    linear, BaseQuantizeConfig(nbits=4, group_size=32), compute_dtype=dtype, device="cpu"
                )
                setattr(block.mlp, name, packed)
    return base


def adapt(base, **config):
    return get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", **config)).eval()


def plain_twin(adapter, folder, z=None):
    """The stored base with the dequantised weights of an adapted one, rescaled by the oracle where z is given."""
    twin = load(folder)
    for name, module in adapter.get_base_model().named_modules():
        if isinstance(module, layer.SVFLayer):
            weight = module.logical_weight().float()
            twin.get_submodule(name).weight.data = weight if z is None else oracle.rescaled(weight, z[name]).float()
        elif not name.endswith("base_layer"):
            backend = quantization_utils.resolve_quantization_backend(module, get_apply_tensor_subclass=id)
            if backend is not None:
                weights.undo_cpu_packing(module)
                twin.get_submodule(name).weight.data = backend.get_base_weight(module).float()
    return twin


def close(found, wanted, relative):
    found, wanted = found.detach().float(), wanted.detach().float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=relative * float(wanted.abs().max()))


def alike(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


@every_kind
def test_z_of_ones_is_the_quantised_model_to_the_bit(kind, folder):
    base = load(folder, kind)
    expected = logits(base)
    assert torch.equal(logits(adapt(base)), expected)


@every_kind
def test_forward_and_gradient_are_those_of_the_dequantised_weights(kind, folder):
    """In training mode, where bitsandbytes multiplies by the dequantised 4-bit weight itself."""
    adapter = adapt(load(folder, kind), basis_from="memory").train()
    z = randomize(adapter)
    twin = plain_twin(adapter, folder, z)
    ids = inputs(adapter)
    found, wanted = (m(**ids, labels=ids["input_ids"]) for m in (adapter, twin))
    close(found.logits, wanted.logits, TOLERANCE[kind])
    assert {svf.svf_chosen for svf in svf_layers(adapter).values()} == {"narrow"}
    for loss in (found.loss, wanted.loss):
        loss.backward()
    weights = plain_twin(adapter, folder)
    for name, svf in svf_layers(adapter).items():
        G = twin.get_submodule(name).weight.grad
        dz = oracle.dense_gradient(weights.get_submodule(name).weight, z[name], G)
        gradient = svf.svf_offset["default"].weight.grad
        assert (gradient - dz).norm() <= (0.1 if kind == "8-bit" else 1e-4) * dz.norm(), name
    assert all(not parameter.requires_grad for name, parameter in adapter.named_parameters() if "svf_" not in name)


@every_kind
def test_unmerging_and_disabling_restore_the_packed_weights_to_the_bit(kind, folder):
    adapter = adapt(load(folder, kind))
    base = logits(adapter)
    packed = [weights.held_weight(svf.get_base_layer()) for svf in svf_layers(adapter).values()]
    randomize(adapter)
    moved = logits(adapter)
    for _ in range(2):
        adapter.merge_adapter()
        # they are quantised anew: near the moved model, and further from the base
        assert alike(logits(adapter), moved) > max(0.9, alike(base, moved) + 0.05)
        adapter.unmerge_adapter()
        torch.testing.assert_close(logits(adapter), moved, rtol=0, atol=1e-6)
    assert all(
        weights.held_weight(svf.get_base_layer()) is p
        for svf, p in zip(svf_layers(adapter).values(), packed, strict=True)
    )
    with adapter.disable_adapter():
        torch.testing.assert_close(logits(adapter), base, rtol=0, atol=1e-6)


@every_kind
def test_the_base_has_the_same_directions_before_and_after_its_first_forward(kind, folder):
    base = load(folder, kind)
    fresh = adapt(load(folder, kind), basis_from="memory")
    logits(base)
    used = adapt(base, basis_from="memory")
    for one, other in zip(svf_layers(fresh).values(), svf_layers(used).values(), strict=True):
        error = (one.logical_weight() - other.logical_weight()).norm() / one.logical_weight().norm()
        assert error < 5e-3  # bitsandbytes rounds the scales of 4-bit weights to bfloat16 in a forward on such CPUs


@pytest.mark.parametrize("kind", ["4-bit", "double", "8-bit"])
def test_gradients_after_an_evaluation_are_those_before_it(kind, folder):
    """bitsandbytes' CPU kernels for inference let no gradient through; generation in between must not cut training."""
    gradients = []
    for evaluate in (False, True):
        adapter = adapt(load(folder, kind))
        randomize(adapter)
        if evaluate:
            logits(adapter.eval())
        adapter.train()
        ids = inputs(adapter)
        adapter(**ids, labels=ids["input_ids"]).loss.backward()
        gradients.append(torch.cat([svf.svf_offset["default"].weight.grad for svf in svf_layers(adapter).values()]))
    assert (gradients[0] - gradients[1]).norm() < 5e-2 * gradients[0].norm()


# --- the basis from the unquantised checkpoint


@every_kind
@pytest.mark.parametrize("source", ["checkpoint", "auto"])
def test_an_expert_of_the_bfloat16_base_loads_on_the_quantised_one_with_the_same_directions(
    kind, source, folder, tmp_path
):
    trained = adapt(load(folder, dtype=BF16), basis_from=source)
    z = randomize(trained, scale=0.2)
    trained.save_pretrained(tmp_path)
    if kind == "hqq":
        base = load(folder, kind)
        base.config._name_or_path = str(folder)
    else:
        base = load(folder, kind, dtype=BF16)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()  # a warning would be an error here
    for name, svf in svf_layers(loaded).items():
        mine = svf_layers(trained)[name]
        assert torch.equal(svf.svf_basis.bfloat16(), mine.svf_basis)
        assert svf.svf_fingerprint.sha256 == mine.svf_fingerprint.sha256
        # z scales the singular directions of the stored weight, found by the oracle, in the quantised one
        stored, packed = mine.logical_weight(), svf.logical_weight()
        U, _, Vt = torch.linalg.svd(stored.double(), full_matrices=False)
        scale = torch.diag(z[name] - 1)
        W = packed.double()
        wanted = W @ Vt.T @ scale @ Vt if svf.side == "in" else U @ scale @ U.T @ W
        close(svf.get_delta_weight("default"), wanted, 2e-2 if packed.dtype == BF16 else 1e-4)


def test_a_basis_from_memory_is_that_of_the_dequantised_weight_and_other_experts_are_refused(folder, tmp_path):
    adapter = adapt(load(folder, "4-bit"), basis_from="memory")
    svf = next(iter(svf_layers(adapter).values()))
    S = oracle.singular_values(svf.logical_weight())
    torch.testing.assert_close(svf.svf_values.double(), S, rtol=1e-4, atol=1e-6)
    trained = adapt(load(folder, dtype=BF16), basis_from="memory")
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not belong to this base model.*not quantised"):
        PeftModel.from_pretrained(load(folder, "4-bit", dtype=BF16), tmp_path)


def test_a_base_that_is_stored_quantised_has_no_stored_values(folder, tmp_path):
    load(folder, "4-bit").save_pretrained(tmp_path)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    with pytest.raises(ValueError, match="basis_from='checkpoint', but no safetensors file of"):
        adapt(base, basis_from="checkpoint")
    assert not svf_layers(base)
    assert all(svf.svf_basis is not None for svf in svf_layers(adapt(base)).values())


# --- the basis that an expert brings along


def save_with_basis(folder, path, **config):
    trained = adapt(load(folder, dtype=BF16), save_basis=True, **config)
    randomize(trained, scale=0.2)
    trained.save_pretrained(path)
    return trained


def basis_keys(path):
    return {key for key in load_file(path / "adapter_model.safetensors") if ".svf_basis" in key or "_values" in key}


def rounded(folder):
    """The base with weights of its own directions, which no file holds: float16 copies of bfloat16 are exact."""
    base = load(folder)
    for parameter in base.parameters():
        parameter.data = (parameter.data * 1.01).half().float()
    base.config._name_or_path = ""
    return base


@every_kind
@pytest.mark.parametrize("config", [{}, {"rank": 5}, {"basis_dtype": "bfloat16"}], ids=str)
def test_a_basis_that_is_brought_along_is_used_to_the_bit_and_not_computed(
    kind, config, folder, tmp_path, monkeypatch
):
    trained = save_with_basis(folder, tmp_path, basis_from="memory", **config)
    base = load(folder, kind)
    base.config._name_or_path = ""  # the stored weights are out of reach
    monkeypatch.setattr(basis_cache, "factorize", None)  # whoever calls it fails
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    for name, svf in svf_layers(loaded).items():
        mine = svf_layers(trained)[name]
        assert torch.equal(svf.svf_basis, mine.svf_basis) and torch.equal(svf.svf_values, mine.svf_values)
        assert svf.svf_fingerprint.sha256 == mine.svf_fingerprint.sha256
    assert loaded.peft_config["default"].save_basis


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
def test_an_expert_with_its_basis_is_the_same_on_every_dtype_of_the_base(dtype, folder, tmp_path):
    trained = save_with_basis(folder, tmp_path, basis_from="memory")
    base = load(folder, dtype=FP32)
    base.to(dtype)
    base.config._name_or_path = "somewhere/else"
    loaded = PeftModel.from_pretrained(base, tmp_path)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (again, tmp_path))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    config, before = (PeftConfig.from_pretrained(path).fingerprint for path in (again, tmp_path))
    assert config == before
    for name, svf in svf_layers(loaded).items():
        assert torch.equal(svf.svf_basis, svf_layers(trained)[name].svf_basis)


def evil(tensors):
    """Turn the directions of one weight among themselves: orthogonal still, and of the same shape."""
    key = "base_model.model.model.layers.1.mlp.up_proj.svf_basis"
    tensors[key] = tensors[key].roll(7, dims=1).contiguous()


@pytest.mark.parametrize("config", [{"basis_dtype": "float32"}, {"basis_dtype": "bfloat16"}], ids=str)
def test_an_evil_basis_is_refused_on_its_own_base_and_changes_nothing(config, folder, tmp_path):
    save_with_basis(folder, tmp_path, **config)
    edit_tensors(tmp_path, evil)
    base = load(folder)
    with pytest.raises(ValueError, match=r"brought along for model.layers.1.mlp.up_proj does not fit the weight here"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not svf_layers(base)
    model = adapt(base, **config)
    before = {name: layer.svf_basis for name, layer in svf_layers(model).items()}
    model.load_adapter(tmp_path, "evil")  # uses the basis that is there
    assert all(layer.svf_basis is before[name] for name, layer in svf_layers(model).items())


def test_a_few_directions_that_are_not_the_top_ones_are_refused(folder, tmp_path):
    save_with_basis(folder, tmp_path, basis_dtype="float32")
    edit_config(tmp_path, rank=4)
    edit_tensors(tmp_path, lambda tensors: tensors.update({k: t[..., -4:].contiguous() for k, t in tensors.items()}))
    for base in (load(folder), rounded(folder)):
        with pytest.raises(ValueError, match=r"brought along for model.layers.0.mlp.\w+ does not fit the weight here"):
            PeftModel.from_pretrained(base, tmp_path)


FIRST = "base_model.model.model.layers.0.mlp.up_proj."
DAMAGE = {
    "no values": lambda t: t.pop(f"{FIRST}svf_values"),
    "no basis": lambda t: t.pop(f"{FIRST}svf_basis"),
    "few directions": lambda t: t.update({f"{FIRST}svf_basis": t[f"{FIRST}svf_basis"][:, :3].contiguous()}),
    "whole numbers": lambda t: t.update({f"{FIRST}svf_basis": t[f"{FIRST}svf_basis"].long()}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_basis_is_refused_by_name(damage, folder, tmp_path):
    save_with_basis(folder, tmp_path)
    edit_tensors(tmp_path, DAMAGE[damage])
    base = load(folder)
    with pytest.raises(ValueError, match=r"a basis of shape .* for model.layers.0.mlp.up_proj, which does not belong"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not svf_layers(base)


def test_an_expert_without_the_bases_that_its_config_names_is_one_as_any_other(folder, tmp_path):
    trained = save_with_basis(folder, tmp_path)
    assert len(basis_keys(tmp_path)) == 2 * 6
    edit_tensors(tmp_path, lambda tensors: [tensors.pop(key) for key in basis_keys(tmp_path)])
    loaded = PeftModel.from_pretrained(load(folder, dtype=BF16), tmp_path)
    assert torch.equal(logits(loaded), logits(trained))


def test_a_basis_that_the_weight_cannot_confirm_serves_its_own_adapter_alone(folder, tmp_path):
    save_with_basis(folder, tmp_path / "whole")
    save_with_basis(folder, tmp_path / "few", rank=4)
    adapt(load(folder, dtype=BF16)).save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(rounded(folder), tmp_path / "whole")
    loaded.load_adapter(tmp_path / "whole", "again")  # has brought the same bits
    before = logits(loaded)
    with pytest.raises(ValueError, match=r"came with adapter 'again' and cannot be compared.*'plain' is not given it"):
        loaded.load_adapter(tmp_path / "plain", "plain")
    assert torch.equal(logits(loaded), before)
    few = PeftModel.from_pretrained(rounded(folder), tmp_path / "few")
    before = svf_layers(few)["model.layers.0.mlp.up_proj"].svf_basis
    with pytest.raises(ValueError, match=r"has brought 4 directions of .* along, and 64 are needed now"):
        few.add_adapter("more", SVFConfig(task_type="CAUSAL_LM"))
    assert list(svf_layers(few)["model.layers.0.mlp.up_proj"].svf_offset) == ["default"]
    assert svf_layers(few)["model.layers.0.mlp.up_proj"].svf_basis is before


# --- packed layers that cannot be unpacked


class Packed(nn.Module):
    """A linear layer that multiplies and gives nothing else away, as those of GPTQ, AWQ, EETQ and AQLM."""

    def __init__(self, fc):
        super().__init__()
        self.qweight = nn.Parameter((fc.weight.data * 1000).round().to(torch.int32), requires_grad=False)
        self.bias = fc.bias
        self.infeatures, self.outfeatures = fc.in_features, fc.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 1000, self.bias)


@pytest.fixture
def gptq(monkeypatch):
    """PEFT takes `Packed` for a layer of GPTQ."""

    def resolve(base_layer, **kwargs):
        if isinstance(base_layer, Packed):
            return quantization_utils.ForwardOnlyQuantizationBackend("gptq")
        return quantization_utils.resolve_quantization_backend(base_layer, **kwargs)

    for module in (layer, weights, targets):
        monkeypatch.setattr(module, "resolve_quantization_backend", resolve)


def test_weights_that_cannot_be_unpacked_are_refused_with_the_way_out(gptq):
    base = OneLayer(Packed(one_layer().fc))
    with pytest.raises(
        ValueError, match=r"weight of fc is packed by gptq.*save_basis=True.*bitsandbytes, HQQ or torchao"
    ):
        get_peft_model(base, SVFConfig(target_modules=["fc"]))
    assert isinstance(base.fc, Packed)


@pytest.mark.parametrize("shape", [(11, 7), (5, 13)], ids=["in", "out"])
def test_weights_that_cannot_be_unpacked_serve_an_expert_that_brings_its_basis(shape, gptq, tmp_path):
    plain = one_layer("linear", *shape)
    packed = OneLayer(Packed(plain.fc))
    weight = packed.fc.qweight.float() / 1000
    for base in (plain, packed):
        base.config = SimpleNamespace(model_type="one", _name_or_path="", to_dict=dict)
    trained = get_peft_model(plain, SVFConfig(target_modules=["fc"], save_basis=True))
    z = randomize(trained)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(packed, tmp_path)
    x = torch.randn(3, shape[1])
    Q = trained.base_model.model.fc.svf_basis.double()
    U = Q @ torch.diag(z["fc"]) @ Q.T
    rescaled = weight.double() @ U if shape[0] > shape[1] else U @ weight.double()
    close(loaded(x), x.double() @ rescaled.T + packed.fc.bias.double(), 1e-5)
    with pytest.raises(TypeError, match="not supported for gptq"):
        loaded.merge_adapter()


def test_no_error_of_the_base_is_hidden_by_the_reading_of_packed_weights(monkeypatch):
    base = one_layer()
    monkeypatch.setattr(layer.Linear, "logical_weight", lambda *_: (_ for _ in ()).throw(TypeError("other")))
    with pytest.raises(TypeError, match="other"):
        get_peft_model(base, SVFConfig(target_modules=["fc"]))
