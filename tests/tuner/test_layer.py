# SPDX-License-Identifier: Apache-2.0
"""Laws of one adapted layer, on both sides, `nn.Linear` and `Conv1D`, with and without bias, against the oracle."""

import copy

import oracle
import pytest
import torch
from peft import get_peft_model
from pico import build, matrix_of, one_layer, randomize, rows_of
from torch import nn

from peft_svf import SVFConfig
from peft_svf.tuner.layer import Linear, svf_layers
from peft_svf.tuner.targets import block_of

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
TOLERANCE = {FP64: 1e-12, FP32: 1e-5, BF16: 4e-2}  # relative to the largest entry
SIDES = {"in": (11, 7), "out": (5, 13)}

both_sides = pytest.mark.parametrize("side", SIDES)
all_kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
all_layers = pytest.mark.parametrize(
    "kind, bias", [("linear", True), ("linear", False), ("conv1d", True)], ids=["linear", "linear-no-bias", "conv1d"]
)  # a `Conv1D` always has a bias
usual_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def adapted(kind="linear", side="in", bias=True, dtype=FP32, **config):
    """A one-layer model with an SVF adapter, its layer, and an untouched copy."""
    base = one_layer(kind, *SIDES[side], bias=bias, dtype=dtype)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, SVFConfig(target_modules=["fc"], **config), autocast_adapter_dtype=dtype != FP64)
    return model, model.base_model.model.fc, plain


def z_vector(size, seed=3):
    """A z-vector with a zero, a negative entry and a one; exact in float32, as offsets are."""
    z = 1 + 0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    z[:3] = torch.tensor([0.0, -1.5, 1.0])
    return z


def set_z(layer, z, adapter="default"):
    layer.svf_offset[adapter].weight.data.copy_(z - 1)
    return (z - 1).double() + 1


def tokens(layer, *batch, dtype=FP32, seed=5):
    return torch.randn(*batch, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, expected, dtype):
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max())
    )


def expected_output(plain, z, x):
    return oracle.output(matrix_of(plain.fc), plain.fc.bias, z, x)


# --- z = 1


@both_sides
@all_layers
@usual_dtypes
def test_z_of_ones_is_the_base_layer_to_the_bit(kind, side, bias, dtype):
    model, layer, plain = adapted(kind, side, bias, dtype)
    assert layer.side == side
    x = tokens(layer, 3, 4, dtype=dtype)
    expected = plain(x)
    assert torch.equal(model(x), expected)
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc))
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


@both_sides
@usual_dtypes
def test_z_of_ones_is_the_base_layer_under_autocast(side, dtype):
    model, layer, plain = adapted("linear", side, True, FP32)
    x = tokens(layer, 3, 4)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(model(x), plain(x))


# --- W' and y


@both_sides
@all_layers
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
def test_forward_and_merged_forward_equal_the_oracle(kind, side, bias, dtype):
    model, layer, plain = adapted(kind, side, bias, dtype)
    z, x = set_z(layer, z_vector(layer.directions)), tokens(layer, 3, 4, dtype=dtype)
    expected = expected_output(plain, z, x)
    assert model(x).dtype == dtype
    close(model(x), expected, dtype)
    model.merge_adapter()
    close(matrix_of(layer), oracle.rescaled(matrix_of(plain.fc), z), dtype)
    close(model(x), expected, dtype)


@both_sides
@all_kinds
def test_delta_weight_is_the_difference_of_the_weights(kind, side):
    _, layer, plain = adapted(kind, side)
    z = set_z(layer, z_vector(layer.directions))
    delta = layer.get_delta_weight("default")
    assert delta.shape == plain.fc.weight.shape
    delta = delta.T if kind == "conv1d" else delta
    close(matrix_of(plain.fc) + delta, oracle.rescaled(matrix_of(plain.fc), z), FP32)


@both_sides
@all_kinds
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_moves_the_top_directions_only_and_equals_the_oracle_with_padded_ones(kind, side, rank):
    model, layer, plain = adapted(kind, side, dtype=FP64, rank=rank)
    assert layer.svf_offset["default"].weight.shape == (rank,)
    assert layer.svf_basis.shape == (layer.directions, rank)
    layer.svf_offset["default"].weight.data.copy_(torch.linspace(-1.5, 2, rank))
    z, x = 1 + layer.svf_offset["default"].weight.detach(), tokens(layer, 3, 4, dtype=FP64)
    padded = torch.cat([z, torch.ones(layer.directions - rank, dtype=FP64)])
    expected = expected_output(plain, padded, x)
    close(model(x), expected, FP64)
    model.merge_adapter()
    close(model(x), expected, FP64)


@both_sides
def test_init_weights_false_draws_a_z_that_moves_the_output(side):
    torch.manual_seed(0)
    model, layer, plain = adapted(side=side, init_weights=False)
    z = 1 + layer.svf_offset["default"].weight.detach().double()
    x = tokens(layer, 3, 4)
    close(model(x), expected_output(plain, z, x), FP32)
    assert not torch.allclose(model(x), plain(x), atol=0.1)


@both_sides
def test_input_of_another_dtype_gives_what_the_base_dtype_gives(side):
    model, layer, plain = adapted(side=side, dtype=BF16)
    z = set_z(layer, z_vector(layer.directions))
    x = tokens(layer, 3, 4)
    close(model(x), expected_output(plain, z, x), BF16)


@both_sides
def test_a_bfloat16_basis_is_close_and_still_the_base_at_z_of_ones(side):
    model, layer, plain = adapted(side=side, dtype=BF16, basis_dtype="bfloat16")
    x = tokens(layer, 3, 4, dtype=BF16)
    assert layer.svf_basis.dtype == BF16 and layer.svf_offset["default"].weight.dtype == FP32
    assert torch.equal(model(x), plain(x))
    z = set_z(layer, z_vector(layer.directions))
    close(model(x), expected_output(plain, z, x), BF16)


# --- gradients


def loss_gradients(model, layer, x, g):
    x = x.clone().requires_grad_()
    layer.svf_offset["default"].weight.grad = None
    model(x).backward(g)
    return layer.svf_offset["default"].weight.grad, x.grad


@both_sides
@all_layers
@pytest.mark.parametrize("dtype, tolerance", [(FP64, 1e-10), (FP32, 1e-4), (BF16, 3e-2)], ids=["fp64", "fp32", "bf16"])
def test_gradients_of_z_and_of_the_input_equal_the_oracle(kind, side, bias, dtype, tolerance):
    model, layer, plain = adapted(kind, side, bias, dtype)
    z = set_z(layer, z_vector(layer.directions))
    x, g = tokens(layer, 3, 4, dtype=dtype), torch.randn(3, 4, layer.out_features).to(dtype)
    dz, dx = loss_gradients(model, layer, x, g)
    for found, expected in zip((dz, dx), oracle.gradients(matrix_of(plain.fc), z, x, g), strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@both_sides
def test_gradient_of_a_rank_is_that_of_its_directions(side):
    model, layer, plain = adapted(side=side, dtype=FP64, rank=3)
    layer.svf_offset["default"].weight.data.copy_(torch.tensor([-1.0, 0.25, -2.0]))
    z = 1 + layer.svf_offset["default"].weight.detach()
    x, g = tokens(layer, 3, 4, dtype=FP64), torch.randn(3, 4, layer.out_features, dtype=FP64)
    dz, dx = loss_gradients(model, layer, x, g)
    expected_dz, expected_dx = oracle.gradients(matrix_of(plain.fc), z, x, g)
    torch.testing.assert_close(dz, expected_dz, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(dx, expected_dx, atol=1e-10, rtol=1e-10)


def test_a_bias_far_above_the_signal_leaves_the_bfloat16_gradient_alone():
    """Qwen2.5's k_proj: the bias is 20 and more times the signal, so `y - bias` has lost it in half precision."""
    model, layer, plain = adapted("linear", "out", True, BF16)
    for fc in (layer.get_base_layer(), plain.fc):
        fc.bias.data.mul_(200)
    z = set_z(layer, z_vector(layer.directions))
    x, g = tokens(layer, 16, 4, dtype=BF16), torch.randn(16, 4, layer.out_features).to(BF16)
    dz, _ = loss_gradients(model, layer, x, g)
    expected, _ = oracle.gradients(matrix_of(plain.fc), z, x, g)
    assert (dz.double() - expected).norm() <= 3e-2 * expected.norm()


@both_sides
@all_kinds
@usual_dtypes
def test_base_weights_never_get_a_gradient(kind, side, dtype):
    model, layer, _ = adapted(kind, side, True, dtype)
    model(tokens(layer, 3, 4, dtype=dtype).requires_grad_()).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is not None] == [
        "base_model.model.fc.svf_offset.default.weight"
    ]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["base_model.model.fc.svf_offset.default.weight"]


# --- every way of changing z is seen


def by_data(model, layer, offset):
    layer.svf_offset["default"].weight.data = offset.clone()


def by_data_copy(model, layer, offset):
    layer.svf_offset["default"].weight.data.copy_(offset)


def by_state_dict(model, layer, offset):
    name = "base_model.model.fc.svf_offset.default.weight"
    assert not model.load_state_dict({name: offset}, strict=False).unexpected_keys


def by_optimizer(model, layer, offset):
    weight = layer.svf_offset["default"].weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = weight.detach() - offset
    optimizer.step()


def by_new_parameter(model, layer, offset):
    layer.svf_offset["default"].weight = nn.Parameter(offset.clone())


@both_sides
@pytest.mark.parametrize("way", [by_data, by_data_copy, by_state_dict, by_optimizer, by_new_parameter])
def test_a_change_of_z_is_seen_by_the_next_forward(side, way):
    model, layer, plain = adapted(side=side)
    x = tokens(layer, 3, 4)
    model(x)
    for seed in (3, 4):
        z = z_vector(layer.directions, seed)
        way(model, layer, z - 1)
        close(model(x), expected_output(plain, z, x), FP32)


# --- merge and unmerge


@both_sides
@all_kinds
@usual_dtypes
def test_unmerge_restores_the_weight_to_the_bit_also_after_a_hundred_rounds(kind, side, dtype):
    model, layer, plain = adapted(kind, side, True, dtype)
    parameter, x = layer.get_base_layer().weight, tokens(layer, 3, 4, dtype=dtype)
    for seed in range(100):
        set_z(layer, z_vector(layer.directions, seed))
        model.merge_adapter()
        assert not torch.equal(matrix_of(layer), matrix_of(plain.fc))
        model.unmerge_adapter()
        assert torch.equal(matrix_of(layer), matrix_of(plain.fc))
    assert layer.get_base_layer().weight is parameter
    set_z(layer, torch.ones(layer.directions))
    assert torch.equal(model(x), plain(x))


@both_sides
def test_a_merged_zero_is_undone(side):
    model, layer, plain = adapted(side=side)
    set_z(layer, torch.zeros(layer.directions))
    model.merge_adapter()
    assert matrix_of(layer).abs().max() < 1e-5
    model.unmerge_adapter()
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@both_sides
@all_kinds
def test_safe_merge_refuses_a_broken_z_and_leaves_the_weight_untouched(kind, side, value):
    model, layer, plain = adapted(kind, side)
    layer.svf_offset["default"].weight.data[1] = value
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc)) and not layer.merged
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc))


def test_merging_twice_and_unmerging_twice_only_warn():
    model, layer, plain = adapted()
    set_z(layer, z_vector(layer.directions))
    model.merge_adapter()
    merged = matrix_of(layer).clone()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(matrix_of(layer), merged)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc))


@both_sides
def test_adapters_merged_one_after_the_other_add_their_offsets_on_the_pristine_weight(side):
    model, layer, plain = adapted(side=side)
    model.add_adapter("second", SVFConfig(target_modules=["fc"], rank=3))
    z1 = set_z(layer, z_vector(layer.directions))
    layer.svf_offset["second"].weight.data.copy_(torch.tensor([0.5, 0.25, -0.75]))
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="now additionally merging second"):
        model.merge_adapter(adapter_names=["second"])
    z = z1 + torch.cat([torch.tensor([0.5, 0.25, -0.75]), torch.zeros(layer.directions - 3)])
    close(matrix_of(layer), oracle.rescaled(matrix_of(plain.fc), z), FP32)
    model.unmerge_adapter()
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc))


def test_the_delta_of_a_merged_layer_is_that_of_the_pristine_weight():
    model, layer, plain = adapted()
    z = set_z(layer, z_vector(layer.directions))
    model.merge_adapter()
    close(matrix_of(plain.fc) + layer.get_delta_weight("default"), oracle.rescaled(matrix_of(plain.fc), z), FP32)


def test_an_adapter_added_to_a_merged_layer_gets_the_pristine_basis():
    model, layer, plain = adapted(rank=2)
    layer.svf_offset["default"].weight.data.fill_(-0.9)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("whole", SVFConfig(target_modules=["fc"]))
    model.set_adapter("whole")
    z, x = set_z(layer, z_vector(layer.directions), "whole"), tokens(layer, 3, 4)
    close(model(x), expected_output(plain, z, x), FP32)


# --- rows of a batch


@both_sides
@with_and_without_bias
def test_rows_with_their_own_offsets_equal_one_by_one(side, bias):
    model, layer, plain = adapted(side=side, bias=bias)
    offsets, x = torch.randn(3, layer.directions), tokens(layer, 3, 4)
    with rows_of(layer, offsets):
        together = model(x)
    for row in range(3):
        close(together[row], expected_output(plain, 1 + offsets[row], x[row]), FP32)
    assert torch.equal(model(x), plain(x))


@both_sides
@pytest.mark.parametrize("shape", [(12,), (6, 5), (3, 2, 5)], ids=["flattened tokens", "two beams", "more axes"])
def test_offsets_repeat_to_rows_that_lie_side_by_side(side, shape):
    model, layer, plain = adapted(side=side)
    offsets, x = torch.randn(3, layer.directions), tokens(layer, *shape)
    with rows_of(layer, offsets):
        together = model(x)
    repeat = shape[0] // 3
    for i in range(shape[0]):
        close(together[i], expected_output(plain, 1 + offsets[i // repeat], x[i]), FP32)


def test_rows_that_do_not_divide_the_batch_are_refused_and_forgotten():
    model, layer, _ = adapted()
    with pytest.raises(ValueError, match="offsets for 3 rows, but the batch has 4"), rows_of(layer, torch.zeros(3, 7)):
        model(tokens(layer, 4, 2))
    assert layer.rows is None


def test_a_copy_of_a_layer_is_on_its_own():
    model, layer, plain = adapted()
    twin = copy.deepcopy(model)
    set_z(layer, z_vector(layer.directions))
    x = tokens(layer, 3, 4)
    assert torch.equal(twin(x), plain(x))
    assert list(twin.base_model.model.fc.svf_offset) == ["default"]


# --- what it shows and what it says


def test_the_layer_says_its_side_and_its_directions():
    _, layer, _ = adapted(side="out", rank=2)
    assert isinstance(layer, Linear)
    assert repr(layer).startswith("svf.Linear(") and "side='out', directions=2" in repr(layer)


def test_a_layer_without_basis_says_what_to_do():
    _, layer, _ = adapted()
    layer.svf_basis = None
    with pytest.raises(RuntimeError, match=r"no basis.*fetch_bases"):
        layer(tokens(layer, 2))


def test_the_basis_is_neither_trained_nor_saved():
    model, layer, _ = adapted()
    assert not layer.svf_basis.requires_grad
    assert not [key for key in model.state_dict() if "basis" in key]


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, torch.compile, nn.DataParallel, lambda m: m.get_base_model()],
    ids=["", "compile", "dp", "base"],
)
def test_layers_are_named_as_in_the_base_model(wrap):
    base = build("llama")
    names = {name for name, module in base.named_modules() if name.endswith("_proj") and "mlp" in name}
    assert set(svf_layers(wrap(get_peft_model(base, SVFConfig())))) == names


@pytest.mark.parametrize(
    "name, block",
    {
        "model.layers.11.mlp.experts.3.up_proj": "model.layers.11",
        "encoder.block.0.layer.1.wi": "encoder.block.0",
        "lm_head": "lm_head",
        "layers.2": "layers.2",
    }.items(),
)
def test_a_block_ends_with_the_first_number_of_a_name(name, block):
    assert block_of(name) == block


class Tied(nn.Module):
    """Two linear modules with one weight, one after the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_weight_that_modules_share_is_not_merged_and_stays_as_it_is():
    model = get_peft_model(Tied().eval(), SVFConfig(target_modules=["a", "b"]))
    randomize(model)
    x = torch.randn(3, 7)
    before, weight = model(x), model.base_model.model.a.base_layer.weight
    pristine = weight.detach().clone()
    for merge in (model.merge_adapter, copy.deepcopy(model).merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"a\.weight and b\.weight share one weight"):
            merge()
    assert torch.equal(weight, pristine) and torch.equal(model(x), before)


def test_a_module_at_two_places_is_refused_and_the_base_stays():
    base = Tied()
    base.b = base.a
    with pytest.raises(ValueError, match="b is the same module as a"):
        get_peft_model(base, SVFConfig(target_modules=["a"]))
    assert type(base.a) is nn.Linear and base.b is base.a
