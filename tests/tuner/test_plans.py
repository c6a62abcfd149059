# SPDX-License-Identifier: Apache-2.0
"""Laws of the execution plans: each is the paper's formula, sees every change of z, and leaves the base alone."""

import copy
import gc
import random
import time
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from peft import get_peft_model
from pico import build, inputs, logits, matrix_of, one_layer, randomize, rows_of, svf_layers

from peft_svf import SVFConfig
from peft_svf.tuner import model, plans
from peft_svf.tuner.plans import Load, break_even, choose

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {FP64: 1e-12, FP32: 2e-5, BF16: 4e-2, FP16: 5e-3}  # relative to the largest entry
PLANS = ["merged", "narrow", "factored"]
all_plans = pytest.mark.parametrize("plan", PLANS)
usual_dtypes = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
both_sides = pytest.mark.parametrize("shape", [(11, 7), (5, 13)], ids=["in", "out"])


def adapted(plan, shape, kind="linear", bias=True, dtype=FP32, **config):
    """A one-layer model in training mode, its layer, and an untouched copy of its base."""
    base = one_layer(kind, *shape, bias=bias, dtype=dtype)
    plain = copy.deepcopy(base)
    config = SVFConfig(target_modules=["fc"], plan=plan, **config)
    adapted = get_peft_model(base, config, autocast_adapter_dtype=dtype != FP64).train()
    return adapted, adapted.base_model.model.fc, plain


def draw(seed):
    """A random case: shapes, kind, bias, dtype, tokens, rank, and a z with zeros, negatives and ones."""
    rng = random.Random(seed)
    shape = rng.choice([(rng.randint(3, 20), rng.randint(3, 20)), (9, 9)])
    kind = rng.choice(["linear", "conv1d"])
    case = {"shape": shape, "kind": kind, "bias": kind == "conv1d" or rng.random() < 0.5}
    case["dtype"] = rng.choice([FP64, FP32, BF16, FP16])
    case["rank"] = rng.choice([None, rng.randint(1, min(shape))])
    z = 1 + 0.5 * torch.randn(case["rank"] or min(shape), generator=torch.Generator().manual_seed(seed))
    for value in (0.0, -1.5, 1.0):
        if rng.random() < 0.5:
            z[rng.randrange(len(z))] = value
    batch = (rng.randint(1, 4), rng.randint(1, 12))
    return case, z, batch


def close(found, expected, dtype):
    scale = max(1e-3, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@all_plans
@pytest.mark.parametrize("seed", range(24))
def test_every_plan_is_the_paper_formula_with_its_gradients(plan, seed, monkeypatch):
    monkeypatch.setattr(plans, "emulates", lambda dtype: seed % 2 == 0 and dtype in (BF16, FP16))  # on any CPU
    case, z, batch = draw(seed)
    adapter, layer, plain = adapted(plan, **case)
    layer.svf_offset["default"].weight.data.copy_(z - 1)
    z = (z - 1).to(layer.svf_offset["default"].weight.dtype).double() + 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, layer.in_features, generator=generator).to(case["dtype"]).requires_grad_()
    g = torch.randn(*batch, layer.out_features, generator=generator).to(case["dtype"])
    y = adapter(x)
    y.backward(g)
    weight = matrix_of(plain.fc)
    dz, dx = oracle.gradients(weight, z, x, g)
    assert y.dtype == case["dtype"]
    close(y, oracle.output(weight, plain.fc.bias, z, x), case["dtype"])
    close(x.grad, dx, case["dtype"])
    close(layer.svf_offset["default"].weight.grad, dz, case["dtype"])
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())
    assert torch.equal(matrix_of(layer), weight)
    if case["rank"] is None and plan != "merged":  # merged gives way where many z are near 0
        assert layer.svf_chosen == plan


@pytest.mark.parametrize("plan", ["merged", "narrow", "auto"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@both_sides
@usual_dtypes
@pytest.mark.parametrize("kind, bias", [("linear", True), ("linear", False), ("conv1d", True)])
def test_z_of_ones_is_the_base_layer_to_the_bit(plan, training, shape, dtype, kind, bias):
    adapter, layer, plain = adapted(plan, shape, kind, bias, dtype)
    adapter.train(training)
    x = torch.randn(4, 6, layer.in_features).to(dtype)
    assert torch.equal(adapter(x), plain(x))
    assert layer.svf_chosen is not None


def by_data(layer, z):
    layer.svf_offset["default"].weight.data.copy_(z - 1)


def by_replaced_data(layer, z):
    layer.svf_offset["default"].weight.data = z - 1


def by_load_state_dict(layer, z):
    layer.load_state_dict({"svf_offset.default.weight": z - 1}, strict=False)


def by_an_optimizer(layer, z):
    parameter = layer.svf_offset["default"].weight
    parameter.grad = parameter.detach() - (z - 1)
    torch.optim.SGD([parameter], lr=1.0).step()


def by_another_parameter(layer, z):
    layer.svf_offset["default"].weight = torch.nn.Parameter(z - 1)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@both_sides
@pytest.mark.parametrize(
    "change", [by_data, by_replaced_data, by_load_state_dict, by_an_optimizer, by_another_parameter]
)
def test_a_change_of_z_by_any_way_is_seen_by_the_next_forward(change, shape, grad):
    adapter, layer, plain = adapted("merged", shape)
    x = torch.randn(3, 5, layer.in_features)
    with torch.set_grad_enabled(grad):
        adapter(x)
        for seed in range(3):
            z = 1 + 0.3 * torch.randn(layer.directions, generator=torch.Generator().manual_seed(seed))
            change(layer, z)
            close(adapter(x), oracle.output(matrix_of(plain.fc), plain.fc.bias, z, x), FP32)
            assert layer.svf_chosen == "merged"


@both_sides
def test_a_forward_with_another_z_before_the_backward_does_not_disturb_it(shape):
    """DPO runs the reference adapter between the policy's forward and its backward."""
    adapter, layer, plain = adapted("merged", shape)
    z, other = (1 + 0.3 * torch.randn(layer.directions) for _ in range(2))
    x = torch.randn(6, layer.in_features, requires_grad=True)
    g = torch.randn(6, layer.out_features)
    by_data(layer, z)
    y = adapter(x)
    with torch.no_grad(), rows_of(layer, other - 1):
        close(adapter(x), oracle.output(matrix_of(plain.fc), plain.fc.bias, other, x), FP32)
    y.backward(g)
    dz, dx = oracle.gradients(matrix_of(plain.fc), z, x, g)
    close(layer.svf_offset["default"].weight.grad, dz, FP32)
    close(x.grad, dx, FP32)


def test_a_second_backward_after_a_change_of_z_is_refused_not_wrong():
    adapter, layer, _ = adapted("merged", (11, 7))
    x = torch.randn(6, 7, requires_grad=True)
    loss = adapter(x).sum()
    loss.backward(retain_graph=True)
    by_data(layer, torch.full((7,), 0.5))
    adapter(x)
    with pytest.raises(RuntimeError, match="changed between a forward and a second backward"):
        loss.backward()


@pytest.mark.parametrize("checkpointed", [False, True])  # which runs each forward twice and drops the first graph
def test_merged_weights_are_rebuilt_in_place(checkpointed):
    adapter, layer, _ = adapted("merged", (11, 7))
    addresses = set()
    for step in range(4):
        by_data(layer, torch.full((7,), 1 + 0.1 * step))
        x = torch.randn(6, 7)
        y = torch.utils.checkpoint.checkpoint(adapter, x, use_reentrant=False) if checkpointed else adapter(x)
        y.sum().backward()
        gc.collect()
        assert not layer.svf_merged.pending
        addresses.add(layer.svf_merged.weight.data_ptr())
    assert len(addresses) == 1
    layer.base_layer.weight.data = torch.randn(11, 7)
    by_data(layer, torch.ones(7))
    assert torch.equal(adapter(x), layer.base_layer(x))  # a changed base weight is seen


def test_threads_that_find_another_z_agree(monkeypatch):
    """Both would build the merged weight in the same memory."""
    adapter, layer, plain = adapted("merged", (96, 64))
    adapter.eval()
    x = torch.randn(2, 64)
    real, running, most = plans.fold, [0], []

    def slow(*args):
        running[0] += 1
        most.append(running[0])
        time.sleep(0.05)  # a thread that came in would do so now
        built = real(*args)
        running[0] -= 1
        return built

    monkeypatch.setattr("peft_svf.tuner.layer.fold", slow)
    with torch.no_grad():
        adapter(x)
        z = 1 + 0.3 * torch.randn(64)
        by_data(layer, z)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: torch.no_grad()(adapter)(x), range(4)))
    assert most == [1, 1]
    for y in answers:
        close(y, oracle.output(matrix_of(plain.fc), plain.fc.bias, z, x), FP32)


@usual_dtypes
@pytest.mark.parametrize("plan", ["merged", "narrow"])
def test_a_large_bias_does_not_hide_the_gradient_of_z(plan, dtype):
    """Qwen2.5's k_proj has a bias 20 times its signal."""
    adapter, layer, plain = adapted(plan, (12, 40), dtype=dtype, basis_dtype="float32")
    for base in (layer.base_layer, plain.fc):
        base.bias.data.fill_(20 * float(base.weight.detach().std()) * 40**0.5)
    x, g = torch.randn(64, 40).to(dtype), torch.randn(64, 12).to(dtype)
    adapter(x).backward(g)
    dz, _ = oracle.gradients(matrix_of(plain.fc), torch.ones(12), x, g)
    found = layer.svf_offset["default"].weight.grad
    assert float((found - dz).norm() / dz.norm()) < 1e-2


@both_sides
def test_small_singular_values_have_their_gradient_in_bfloat16(shape):
    out, within = (4 * size for size in shape)
    base = one_layer("linear", out, within, bias=False, dtype=BF16)
    U, S, Vt = torch.linalg.svd(base.fc.weight.data.float(), full_matrices=False)
    S[-3:] = S[0] * 1e-4
    base.fc.weight.data.copy_(U * S @ Vt)
    S = oracle.singular_values(base.fc.weight)
    adapter = get_peft_model(base, SVFConfig(target_modules=["fc"], plan="merged", basis_dtype="float32")).train()
    layer = adapter.base_model.model.fc
    x, g = torch.randn(400, within).to(BF16), torch.randn(400, out).to(BF16)
    adapter(x).backward(g)
    dz, _ = oracle.gradients(matrix_of(layer), torch.ones(layer.directions), x, g)
    tail = 0.1 * S.median() > S
    assert tail.any() and not tail.all()
    found = layer.svf_offset["default"].weight.grad[tail]
    assert float((found - dz[tail]).norm() / dz[tail].norm()) < 2e-2


@usual_dtypes
def test_autocast_gives_its_dtype_and_float32_gradients(dtype):
    adapter, layer, plain = adapted("merged", (11, 7))
    z = 1 + 0.2 * torch.randn(7)
    x, g = torch.randn(64, 7, requires_grad=True), torch.randn(64, 11)
    with torch.autocast("cpu", dtype=dtype if dtype != FP32 else BF16, enabled=dtype != FP32):
        assert torch.equal(adapter(x), plain(x))
        by_data(layer, z)
        y = adapter(x)
    assert y.dtype == dtype and layer.svf_chosen == "merged"
    y.backward(g.to(y.dtype))
    dz, dx = oracle.gradients(matrix_of(plain.fc), z, x, g)
    close(y, oracle.output(matrix_of(plain.fc), plain.fc.bias, z, x), dtype)
    close(layer.svf_offset["default"].weight.grad, dz, dtype)
    close(x.grad, dx, dtype)
    assert x.grad.dtype == layer.svf_offset["default"].weight.grad.dtype == FP32


def test_rows_without_the_base_go_through_the_factors_and_others_through_the_base_weight():
    adapter, layer, plain = adapted("auto", (11, 7))
    adapter.eval()
    x = torch.randn(2, 3, 7)
    offsets = 0.3 * torch.randn(2, 7)
    rounded, other, _ = adapted("auto", (11, 7), basis_dtype="bfloat16")  # would blur what doesn't change
    with rows_of(other, offsets):
        rounded.eval()(x)
        assert other.svf_chosen == "narrow"
    with rows_of(layer, offsets):
        y = adapter(x)
        assert layer.svf_chosen == "factored"
    offsets[0] = 0
    with rows_of(layer, offsets):
        z = adapter(x)
        assert layer.svf_chosen == "narrow"
    assert torch.equal(z[0], plain(x)[0])
    close(y[1], oracle.output(matrix_of(plain.fc), plain.fc.bias, 1 + offsets[1], x[1]), FP32)


@both_sides
@torch.no_grad()
def test_what_decoding_repeats_is_seen_to_change(shape):
    """The short way of the factored plan keeps the rows' z from token to token."""
    adapter, layer, plain = adapted("factored", shape)
    adapter.eval()

    def check(x, offsets):
        z = (1 + offsets).repeat_interleave(len(x) // len(offsets), 0)
        for _ in range(2):
            y = adapter(x)
            assert layer.svf_chosen == "factored"
            for row in range(len(x)):
                close(y[row], oracle.output(matrix_of(layer.base_layer), plain.fc.bias, z[row], x[row]), FP32)

    offsets = 0.3 * torch.randn(2, layer.directions)
    with rows_of(layer, offsets):
        check(torch.randn(2, 3, layer.in_features), offsets)
        check(torch.randn(2, 1, layer.in_features), offsets)
        check(torch.randn(4, 1, layer.in_features), offsets)  # beams
        check(torch.randn(2, layer.in_features), offsets)
        offsets.mul_(-1)
        check(torch.randn(2, layer.in_features), offsets)
        layer.base_layer.weight.data = 2 * layer.base_layer.weight.data  # same directions
        check(torch.randn(2, layer.in_features), offsets)
        x = torch.randn(2, layer.in_features)
        with adapter.disable_adapter():
            assert torch.equal(adapter(x), layer.base_layer(x))
        assert adapter(x.bfloat16()).dtype == FP32  # the layer casts its input
    other = offsets.clone().mul_(0.5)
    with rows_of(layer, other):
        check(torch.randn(2, layer.in_features), other)
    merged = layer.svf_offset["default"].weight
    merged.data.fill_(0.2)
    check(torch.randn(2, layer.in_features), merged.detach().expand(2, -1))


@pytest.mark.parametrize("long, r, k", [(1536, 576, 576), (576, 576, 576), (4096, 1024, 64), (300, 200, 110)])
def test_break_even_is_where_the_flops_of_both_plans_meet(long, r, k):
    tokens = break_even(long, r, k)
    narrow = tokens * 4 * (2 * r * k)  # two thin products forward, two back
    through_D, through_factor = 2 * r * k * r + 2 * long * r * r, 2 * (2 * long * r * k)
    thin, product = tokens * 2 * (2 * r * k), tokens * 2 * r * r + 2 * r * r * k
    assert min(through_D, through_factor) + min(thin, product) == pytest.approx(narrow, rel=1e-9)


def test_auto_runs_few_tokens_narrow_and_many_merged_and_counts_accumulation():
    load = {"long": 1536, "r": 576, "k": 576, "training": True}
    edge = break_even(1536, 576, 576)
    assert choose("auto", Load(tokens=int(edge) - 1, **load)) == "narrow"
    assert choose("auto", Load(tokens=int(edge) + 1, **load)) == "merged"
    assert choose("auto", Load(tokens=10**6, room=False, **load)) == "narrow"
    long_prompt = {**load, "training": False, "lasting": False}
    assert choose("auto", Load(tokens=int(edge) - 1, **long_prompt)) == "narrow"
    assert choose("auto", Load(tokens=int(edge) + 1, **long_prompt)) == "merged"
    adapter = get_peft_model(build("llama"), SVFConfig()).train()
    layer = next(iter(svf_layers(adapter).values()))
    adapter(**inputs(adapter))
    assert layer.svf_chosen == "narrow"
    adapter.set_plan("auto", forwards_per_step=1000)
    adapter(**inputs(adapter))
    assert layer.svf_chosen == "merged"
    adapter.add_adapter("other", SVFConfig())  # a chosen plan outlives it
    assert (layer.execution.plan, layer.execution.forwards) == ("auto", 1000)
    with pytest.raises(ValueError, match="`plan` must be one of auto, merged, narrow, factored; got 'fast'"):
        adapter.set_plan("fast")


def test_without_memory_auto_is_narrow(monkeypatch):
    monkeypatch.setattr(model, "_room", lambda layers: False)
    adapter = get_peft_model(build("llama"), SVFConfig()).eval()
    logits(adapter)
    assert {layer.svf_chosen for layer in svf_layers(adapter).values()} == {"narrow"}


def test_values_are_compared_once_per_call():
    adapter = get_peft_model(build("llama"), SVFConfig(plan="merged")).eval()
    expected = logits(adapter)
    layers = list(svf_layers(adapter).values())
    trusted = []
    hook = layers[-1].register_forward_hook(lambda layer, *_: trusted.append(layer.execution.trusted))
    assert torch.equal(logits(adapter), expected)
    layers[0].svf_offset["default"].weight.data.add_(0.5)
    changed = logits(adapter)
    assert trusted == [True, False] and not torch.equal(changed, expected)
    adapter.set_plan("narrow")
    torch.testing.assert_close(logits(adapter), changed, rtol=1e-4, atol=1e-4)
    assert not any(layer.execution.trusted for layer in layers)
    hook.remove()


def test_a_graph_that_is_captured_compares_no_values_and_reads_z_where_it_lies(monkeypatch):
    adapter, layer, plain = adapted("merged", (11, 7))
    adapter.eval()
    x, offsets = torch.randn(2, 3, 7), 0.3 * torch.randn(2, 7)
    with torch.no_grad():
        adapter(x)
        assert layer.svf_chosen == "merged"
        monkeypatch.setattr("peft_svf.tuner.layer.capturing", lambda x: True)
        monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("waits for the device"))
        for z in (1 + 0.3 * torch.randn(7), 1 + 0.3 * torch.randn(7)):
            by_data(layer, z)
            close(layer(x), oracle.output(matrix_of(plain.fc), plain.fc.bias, z, x), FP32)
            assert layer.svf_chosen == "narrow"
        with rows_of(layer, offsets):
            for row, y in enumerate(layer(x)):
                close(y, oracle.output(matrix_of(plain.fc), plain.fc.bias, 1 + offsets[row], x[row]), FP32)
            assert layer.svf_chosen == "narrow"


def hook_forward(base, calls):
    base.register_forward_hook(lambda *_: calls.append(1))


def replace_forward(base, calls):
    real = base.forward
    base.forward = lambda x: (calls.append(1), real(x))[1]


@pytest.mark.parametrize("hang", [hook_forward, replace_forward])
def test_whatever_hangs_on_the_base_layer_still_runs(hang):
    adapter, layer, _ = adapted("merged", (11, 7))
    calls = []
    with torch.no_grad():
        adapter.eval()(torch.randn(2, 7))
    hang(layer.base_layer, calls)
    adapter.train()(torch.randn(2, 7, requires_grad=True)).sum().backward()
    assert calls and layer.svf_chosen == "narrow"


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_parameter_that_trains_keeps_its_gradient(name):
    adapter, layer, _ = adapted("merged", (11, 7))
    parameter = getattr(layer.base_layer, name).requires_grad_(True)
    x = torch.randn(5, 7)
    adapter(x).sum().backward()
    torch.testing.assert_close(parameter.grad, x.sum(0).expand(11, 7) if name == "weight" else torch.full((11,), 5.0))


def test_memory_is_counted_to_the_byte_and_given_back():
    adapter = get_peft_model(build("llama"), SVFConfig(plan="merged")).eval()
    layers = svf_layers(adapter)
    weights = {name: layer.base_layer.weight.nbytes for name, layer in layers.items()}
    bases = {n: 4 * layer.directions**2 + layer.svf_values.nbytes for n, layer in layers.items()}
    offsets = {n: 4 * layer.directions for n, layer in layers.items()}

    def expected(**kept):
        kinds = {"basis": bases, "merged": {}, "pristine": {}, "factored": {}, "offsets": offsets} | kept
        memory = {name: {kind: sizes.get(name, 0) for kind, sizes in kinds.items()} for name in layers}
        return memory | {"total": {kind: sum(sizes.values()) for kind, sizes in kinds.items()}}

    logits(adapter)
    assert adapter.svf_memory() == expected(merged=weights)
    adapter.merge_adapter()
    logits(adapter)
    assert adapter.svf_memory() == expected(pristine=weights)
    adapter.unmerge_adapter()
    for seed in range(3):  # one copy, however often z changes
        randomize(adapter, seed=seed)
        adapter.generate(input_ids=inputs(adapter)["input_ids"][:, : 3 + seed], max_new_tokens=3, pad_token_id=0)
        assert adapter.svf_memory() == expected(merged=weights)
    adapter.set_plan("narrow")
    assert adapter.svf_memory() == expected() and "plan='narrow'" in repr(adapter)


def test_auto_merges_in_evaluation_logs_it_once_and_copies_and_buffers_keep_nothing_of_it(caplog):
    """DDP sends every buffer to every process before every forward; bases would be most of the traffic."""
    adapter = get_peft_model(build("llama"), SVFConfig()).eval()
    randomize(adapter)
    with caplog.at_level("INFO", logger="peft_svf.tuner.layer"):
        expected = logits(adapter)
        assert torch.equal(adapter(**inputs(adapter)).logits, expected)  # gradients don't change the plan
    assert len([record for record in caplog.records if "'merged' of 'auto'" in record.message]) == 1
    assert "plan='auto (merged)'" in repr(adapter)
    twin = copy.deepcopy(adapter)
    assert all(layer.svf_merged is not None for layer in svf_layers(adapter).values())
    assert all(layer.svf_merged is None for layer in svf_layers(twin).values())
    assert torch.equal(logits(twin), expected)
    buffers = {name for name, _ in build("llama").named_buffers()}
    assert {name.removeprefix("base_model.model.") for name, _ in adapter.named_buffers()} == buffers
    assert not [name for name in adapter.state_dict() if "basis" in name]


@pytest.mark.parametrize("plan", ["auto", *PLANS])
def test_inference_mode_leaves_nothing_that_training_or_another_z_cannot_use(plan):
    adapter = get_peft_model(build("llama"), SVFConfig(plan=plan)).eval()
    adapter.add_adapter("other", SVFConfig())
    randomize(adapter, "default", 1)
    randomize(adapter, "other", 2)
    ids, names = inputs(adapter), ["default", "other", "default"]
    expected = logits(adapter), logits(adapter, adapter_names=names)
    with torch.inference_mode():
        torch.testing.assert_close(adapter(**ids).logits, expected[0])
        torch.testing.assert_close(adapter(**ids, adapter_names=names).logits, expected[1])
    for name in ("other", "default"):
        adapter.set_adapter(name)
        with torch.inference_mode(name == "default"):
            logits(adapter)
    adapter.train()(**ids).logits.square().mean().backward()
    torch.testing.assert_close(adapter.eval()(**ids).logits, expected[0])
