# SPDX-License-Identifier: Apache-2.0
"""Laws of one adapted layer, on both sides, `nn.Linear` and `Conv1D`, against the oracle: merging, dtypes, names."""

import copy

import oracle
import pytest
import torch
from peft import get_peft_model
from pico import build, matrix_of, one_layer, randomize, rows_of
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import parametrize, prune

from peft_svf import SVFConfig
from peft_svf.tuner import plans
from peft_svf.tuner.layer import Linear, svf_layers
from peft_svf.tuner.targets import block_of

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
TOLERANCE = {FP64: 1e-12, FP32: 1e-5, BF16: 4e-2}  # relative to the largest entry
SIDES = {"in": (11, 7), "out": (5, 13)}

both_sides = pytest.mark.parametrize("side", SIDES)
all_kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])
usual_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def adapted(kind="linear", side="in", dtype=FP32, bias=True, **config):
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


def close(output, expected, dtype):
    torch.testing.assert_close(
        output.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max())
    )


def expected_output(plain, z, x):
    return oracle.output(matrix_of(plain.fc), plain.fc.bias, z, x)


# --- forward: see `test_plans.py` for the formula, its gradients and every way of changing z


@both_sides
def test_init_weights_false_draws_a_z_that_moves_the_output(side):
    torch.manual_seed(0)
    model, layer, plain = adapted(side=side, init_weights=False)
    z = 1 + layer.svf_offset["default"].weight.detach().double()
    x = tokens(layer, 3, 4)
    close(model(x), expected_output(plain, z, x), FP32)
    assert not torch.allclose(model(x), plain(x), atol=0.1)


@both_sides
@pytest.mark.parametrize("emulated", [False, True])
def test_a_bfloat16_base_is_close_for_inputs_of_any_dtype_and_the_base_at_z_of_ones(side, emulated, monkeypatch):
    monkeypatch.setattr(plans, "emulates", lambda dtype: emulated and dtype == BF16)
    model, layer, plain = adapted(side=side, dtype=BF16)
    assert layer.svf_basis.dtype == BF16 and layer.svf_offset["default"].weight.dtype == FP32
    x = tokens(layer, 3, 4)
    assert torch.equal(model(x.to(BF16)), plain(x.to(BF16)))
    z = set_z(layer, z_vector(layer.directions))
    for dtype in (FP32, BF16):
        close(model(x.to(dtype)), expected_output(plain, z, x.to(dtype)), BF16)
    many = tokens(layer, 9, 5).to(BF16)
    close(model.train()(many), expected_output(plain, z, many), BF16)


@both_sides
@all_kinds
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_merging_writes_the_weight_of_the_oracle_and_the_delta_is_what_it_adds(kind, side, dtype, rank):
    model, layer, plain = adapted(kind, side, dtype, rank=rank)
    size = layer.directions if rank is None else rank
    z, x = set_z(layer, z_vector(layer.directions)[:size]), tokens(layer, 3, 4, dtype=dtype)
    assert layer.svf_basis.shape == (layer.directions, size)
    delta = layer.get_delta_weight("default")
    assert delta.shape == plain.fc.weight.shape
    model.merge_adapter(safe_merge=True)
    wanted = oracle.rescaled(matrix_of(plain.fc), z)
    close(matrix_of(layer), wanted, dtype)
    close(model(x), expected_output(plain, z, x), dtype)
    close(matrix_of(plain.fc) + (delta.T if kind == "conv1d" else delta), wanted, dtype)
    assert torch.equal(layer.get_delta_weight("default"), delta)  # of the pristine weight


@both_sides
@all_kinds
@usual_dtypes
def test_unmerge_restores_the_weight_to_the_bit_also_after_a_hundred_rounds(kind, side, dtype):
    model, layer, plain = adapted(kind, side, dtype)
    parameter, x = layer.get_base_layer().weight, tokens(layer, 3, 4, dtype=dtype)
    for seed in range(100):
        set_z(layer, z_vector(layer.directions, seed) if seed else torch.zeros(layer.directions))
        model.merge_adapter()
        assert not torch.equal(matrix_of(layer), matrix_of(plain.fc))
        model.unmerge_adapter()
        assert torch.equal(matrix_of(layer), matrix_of(plain.fc))
    assert layer.get_base_layer().weight is parameter
    set_z(layer, torch.ones(layer.directions))
    model.merge_adapter()
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc)) and torch.equal(model(x), plain(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@all_kinds
def test_safe_merge_refuses_a_broken_z_and_leaves_the_weight_untouched(kind, value):
    model, layer, plain = adapted(kind)
    layer.svf_offset["default"].weight.data[1] = value
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The adapter default seems to be broken"):
            merge(safe_merge=True)
        assert torch.equal(matrix_of(layer), matrix_of(plain.fc)) and not layer.merged


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
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(matrix_of(layer), matrix_of(plain.fc))


def test_an_adapter_added_to_a_merged_layer_gets_the_pristine_basis():
    model, layer, plain = adapted(rank=2)
    layer.svf_offset["default"].weight.data.fill_(-0.9)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("whole", SVFConfig(target_modules=["fc"]))
    model.set_adapter("whole")
    z, x = set_z(layer, z_vector(layer.directions), "whole"), tokens(layer, 3, 4)
    close(model(x), expected_output(plain, z, x), FP32)


@both_sides
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "shape", [(3, 4), (12,), (6, 5), (3, 2, 5)], ids=["rows", "flattened tokens", "two beams", "more axes"]
)
def test_each_row_has_its_own_offset_and_repeats_lie_side_by_side(side, bias, shape):
    model, layer, plain = adapted(side=side, bias=bias)
    offsets, x = torch.randn(3, layer.directions), tokens(layer, *shape)
    with rows_of(layer, offsets):
        together = model(x)
    for i in range(shape[0]):
        close(together[i], expected_output(plain, 1 + offsets[i // (shape[0] // 3)], x[i]), FP32)
    assert torch.equal(model(x), plain(x))


def test_the_layer_shows_its_side_and_its_directions_and_names_what_it_lacks():
    _, layer, _ = adapted(side="out", rank=2)
    assert isinstance(layer, Linear)
    assert repr(layer).startswith("svf.Linear(") and "side='out', directions=2" in repr(layer)
    layer.svf_basis = None
    with pytest.raises(RuntimeError, match=r"no basis.*fetch_bases"):
        layer(tokens(layer, 2))


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, torch.compile, nn.DataParallel, lambda m: m.get_base_model()],
    ids=["", "compile", "dp", "base"],
)
def test_layers_are_named_as_in_the_base_model(wrap):
    base = build("llama")
    names = {name for name, module in base.named_modules() if name.endswith("_proj") and "mlp" in name}
    assert set(svf_layers(wrap(get_peft_model(base, SVFConfig())))) == names


def test_a_block_ends_with_the_first_number_of_a_name():
    names = ["model.layers.11.mlp.experts.3.up_proj", "encoder.block.0.layer.1.wi", "lm_head", "layers.2"]
    assert [block_of(name) for name in names] == ["model.layers.11", "encoder.block.0", "lm_head", "layers.2"]


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


class Zero(nn.Module):
    def forward(self, weight):
        return 0 * weight


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


def with_weight(change):
    fc = nn.Linear(5, 7)
    change(fc)
    return fc


UNREADABLE = {
    "empty": lambda: nn.Linear(0, 7),
    "sparse": lambda: with_weight(lambda fc: setattr(fc, "weight", nn.Parameter(fc.weight.detach().to_sparse()))),
    "float8": lambda: with_weight(lambda fc: setattr(fc.weight, "data", fc.weight.data.to(torch.float8_e5m2))),
    "complex": lambda: nn.Linear(5, 7, dtype=torch.complex64),
    "parametrised": lambda: with_weight(lambda fc: parametrize.register_parametrization(fc, "weight", Zero())),
    "weight norm": lambda: with_weight(nn.utils.parametrizations.weight_norm),
    "pruned": lambda: with_weight(lambda fc: prune.l1_unstructured(fc, "weight", 3)),
    "a forward of the class": lambda: Doubling(5, 7),
    "a scale of the instance": lambda: vars(fc := Scaled(5, 7)).update(scale=0.5) or fc,
    "a forward of the instance": lambda: with_weight(lambda fc: setattr(fc, "forward", lambda x: 2 * x @ fc.weight.T)),
    "convolution": lambda: nn.Conv2d(3, 4, 2),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_a_weight_that_cannot_be_read_is_refused_by_the_name_of_its_module(case):
    base = nn.ModuleDict({"part": UNREADABLE[case]()})
    with pytest.raises(ValueError, match="Target module part is not supported"):
        get_peft_model(base, SVFConfig(target_modules=["part"]))
    assert not svf_layers(base)


def test_a_weight_that_torch_has_split_over_processes_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        base = parallelize_module(nn.Sequential(nn.Linear(5, 7)), mesh, {"0": ColwiseParallel()})
        with pytest.raises(ValueError, match="tensor parallelism"):
            get_peft_model(base, SVFConfig(target_modules=["0"]))
        assert not svf_layers(base)
        model = get_peft_model(nn.Sequential(nn.Linear(5, 7)), SVFConfig(target_modules=["0"]))
        parallelize_module(model, mesh, {"base_model.model.0.base_layer": ColwiseParallel()})
        with pytest.raises(ValueError, match="tensor parallelism"):
            model(torch.randn(2, 5))
    finally:
        torch.distributed.destroy_process_group()


def test_rows_that_do_not_divide_the_batch_are_refused_and_forgotten():
    model, layer, _ = adapted()
    with pytest.raises(ValueError, match="offsets for 3 rows, but the batch has 4"), rows_of(layer, torch.zeros(3, 7)):
        model(tokens(layer, 4, 2))
    assert layer.rows is None


@pytest.mark.parametrize("values", [torch.zeros(2, 0, 5), torch.zeros(2, 7, 5).to(torch.float8_e4m3fn)])
def test_a_stack_that_cannot_be_read_is_refused_by_the_name_of_its_parameter(values):
    base = nn.Module()
    base.experts = nn.Module()
    base.experts.stack = nn.Parameter(values, requires_grad=False)
    with pytest.raises(ValueError, match="parameter 'stack' of Module has shape"):
        get_peft_model(base, SVFConfig(target_parameters=["experts.stack"]))
    assert not svf_layers(base)


def test_a_rank_beyond_every_weight_moves_all_directions_and_says_so(caplog):
    with caplog.at_level("WARNING", logger="peft_svf.tuner.model"):
        model = get_peft_model(build("llama"), SVFConfig(rank=10**18))
    largest = max(layer.directions for layer in svf_layers(model).values())
    assert f"rank=1000000000000000000 is beyond all {largest} singular values" in caplog.text
    assert model.peft_config["default"].rank is None
