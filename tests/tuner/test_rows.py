# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch with z-vectors of their own: each activation's row is known, or the batch is refused by name."""

import pytest
import torch
from peft import get_peft_model
from pico import build, inputs, one_layer, randomize, rows_of, svf_layers
from torch import nn

from peft_svf import SVFConfig
from peft_svf.tuner import layer as layer_module
from peft_svf.tuner.layer import active_rows
from peft_svf.tuner.plans import PLANS


def adapt(kind, plan="auto"):
    model = get_peft_model(build(kind), SVFConfig(plan=plan)).eval()
    randomize(model)
    return model


class Parts(nn.Module):
    """Runs one linear layer on activations that `arrange` makes of `(rows, tokens, features)`."""

    def __init__(self, arrange):
        super().__init__()
        self.experts, self.arrange = nn.ModuleList([nn.Linear(5, 7)]), arrange

    def forward(self, x):
        return self.experts[0](self.arrange(x))


REFUSED = {
    "time first": (lambda x: x.transpose(0, 1), (2, 4)),
    "time first, as many tokens as rows": (lambda x: x.transpose(0, 1), (3, 3)),
    "tokens of a router": (lambda x: x.flatten(0, 1), (2, 4)),
    "tokens of an expert": (lambda x: x.flatten(0, 1)[[5, 1]], (2, 4)),
    "as many tokens of an expert as rows": (lambda x: x.flatten(0, 1)[[5, 1, 0]], (3, 2)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_activations_whose_rows_are_not_known_are_refused_by_name(case):
    arrange, (rows, tokens) = REFUSED[case]
    model = get_peft_model(Parts(arrange), SVFConfig(target_modules=["0"])).eval()
    randomize(model)
    names = ["default", *["__base__"] * (rows - 1)]
    x = torch.randn(rows, tokens, 5)
    with pytest.raises(ValueError, match=r"experts\.0.*which row each of them belongs to isn't known"):
        model(x, adapter_names=names)
    assert model.base_model.execution.rows == {} and model(x).shape[-1] == 7


@pytest.mark.parametrize("kind", ["llama", "opt"])  # OPT flattens rows and tokens
@pytest.mark.parametrize("tokens", [1, 3, 4])  # as many tokens as rows too
@pytest.mark.parametrize("plan", PLANS)
def test_a_batch_with_an_index_equals_its_rows_one_by_one(plan, kind, tokens):
    model = adapt(kind, plan)
    layers = svf_layers(model)
    offsets = {name: 0.5 * torch.randn(2, layer.directions) for name, layer in layers.items()}
    index, ids = torch.tensor([1, 0, 1]), torch.randint(5, 40, (3, tokens))
    with torch.no_grad(), active_rows(layers, offsets, index):
        together = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    for row, place in enumerate(index):
        alone = {name: offset[place] for name, offset in offsets.items()}
        with torch.no_grad(), active_rows(layers, alone):
            mask = torch.ones_like(ids[row : row + 1])
            expected = model(input_ids=ids[row : row + 1], attention_mask=mask).logits
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_each_token_of_a_packed_batch_has_its_own_offset():
    model = get_peft_model(one_layer("linear", 7, 5), SVFConfig(target_modules=["fc"])).eval()
    layer = model.base_model.model.fc
    offsets, index, x = torch.randn(2, 5), torch.tensor([0, 0, 1, 0, 1, 1]), torch.randn(1, 6, 5)
    with torch.no_grad(), rows_of(layer, offsets, index):
        together = model(x)
    for token, place in enumerate(index):
        with torch.no_grad(), rows_of(layer, offsets[place]):
            torch.testing.assert_close(together[:, token], model(x[:, token]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_build_leaves_nobody_elses_weight(error, monkeypatch):
    model = adapt("llama")
    layers, ids = svf_layers(model), inputs(model)
    a, b = ({name: 0.5 * torch.randn(layer.directions) for name, layer in layers.items()} for _ in range(2))

    def answer(offsets):
        with torch.no_grad(), active_rows(layers, offsets, merge=True):
            return model(**ids).logits

    expected, fold = answer(a), layer_module.fold

    def breaks(*args):
        fold(*args)  # into the old memory
        raise error

    monkeypatch.setattr(layer_module, "fold", breaks)
    with pytest.raises(error):
        answer(b)
    monkeypatch.setattr(layer_module, "fold", fold)
    assert model.base_model.execution.rows == {} and torch.equal(answer(a), expected)


class Fused(nn.Module):
    """Computes with the weight of its child itself, under a name that no list has."""

    def __init__(self):
        super().__init__()
        self.fc, self.used = nn.Linear(5, 7), nn.Linear(7, 7)

    def forward(self, x):
        return self.used(torch.nn.functional.linear(x, self.fc.weight)).to(self.used.weight.dtype)


def test_a_weight_that_is_read_while_its_layer_does_not_run_is_noticed():
    model, x = get_peft_model(Fused(), SVFConfig(target_modules=["fc", "used"])), torch.randn(2, 5)
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(ValueError, match="The weight of fc was read, but the layer didn't run"):
            model(x)
    assert get_peft_model(Fused(), SVFConfig(target_modules=["used"]))(x).shape == (2, 7)


@pytest.mark.parametrize("parent", [nn.TransformerEncoderLayer(8, 2), nn.MultiheadAttention(8, 2)], ids=type)
def test_parents_that_read_weights_are_refused_beforehand(parent):
    targets = ["linear1"] if hasattr(parent, "linear1") else ["out_proj"]
    with pytest.raises(ValueError, match="reads its weight without running it"):
        get_peft_model(nn.Sequential(parent), SVFConfig(target_modules=targets))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")  # torch's own, in forward mode
def test_derivatives_of_torch_func_are_those_of_the_narrow_plan():
    torch.manual_seed(0)
    model = get_peft_model(one_layer("linear", 7, 5).double(), SVFConfig(target_modules=["fc"], plan="merged"))
    layer, x = model.base_model.model.fc, torch.randn(40, 5, dtype=torch.float64)
    name = next(name for name, _ in model.named_parameters() if "svf_offset" in name)
    d = 0.3 * torch.randn(5, dtype=torch.float64)

    def loss(offset, x):
        return torch.func.functional_call(model, {name: offset}, (x,)).square().sum()

    def dense(offset, x):
        Q = layer.svf_basis.double()
        y = nn.functional.linear(x + ((x @ Q) * offset) @ Q.T, layer.base_layer.weight, layer.base_layer.bias)
        return y.square().sum()

    for derive in (
        lambda f: torch.func.grad(f)(d, x),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(d, x),
        lambda f: torch.func.jvp(lambda offset: f(offset, x), (d,), (d,))[1],
        lambda f: torch.func.vjp(lambda offset: torch.func.grad(f)(offset, x), d)[1](x[0])[0],
    ):
        torch.testing.assert_close(derive(loss), derive(dense), rtol=1e-5, atol=1e-6)
    layer.svf_offset["default"].weight.data.copy_(d)
    with pytest.raises(RuntimeError, match=r"set_plan\('narrow'\)"):
        torch.autograd.grad(model(x).sum(), layer.svf_offset["default"].weight, create_graph=True)
