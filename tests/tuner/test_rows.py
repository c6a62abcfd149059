# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch with z-vectors of their own: each activation's row is known, or the batch is refused by name."""

import copy

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from pico import build, inputs, one_layer, own_methods, randomize, rows_of, svf_layers
from torch import nn
from transformers.generation import ContinuousBatchingConfig

from peft_svf import SVFConfig
from peft_svf.tuner import layer as layer_module
from peft_svf.tuner.plans import PLANS
from peft_svf.tuner.rows import active_rows


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
    offsets, index, x = torch.randn(2, 5), torch.tensor([0, 0, 1, 0, 1, 1]), torch.randn(6, 5)
    for rows in (1, 2, 3):
        with torch.no_grad(), rows_of(layer, offsets, index):
            together = model(x.view(rows, 6 // rows, 5)).flatten(0, 1)
        for token, place in enumerate(index):
            with torch.no_grad(), rows_of(layer, offsets[place]):
                torch.testing.assert_close(together[token], model(x[None, None, token])[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("through", ["base", "peft"])  # an engine may hold either
@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("lengths", [[5], [1], [3, 1, 4], [1, 1, 1], [2, 5]], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_sequences_packed_into_one_row_equal_each_alone(lengths, padding, kind, through):
    model = adapt(kind)
    layers, runs = svf_layers(model), model if through == "peft" else model.get_base_model()
    offsets = {name: 0.5 * torch.randn(4, layer.directions) for name, layer in layers.items()}
    offsets["model.layers.0.mlp.up_proj"] = torch.zeros(0)  # no expert moves it
    which = torch.tensor([2, 0, 3])[: len(lengths)]  # a request -> its offset
    index = torch.cat([which.repeat_interleave(torch.tensor(lengths)), torch.zeros(padding, dtype=torch.long)])
    places = torch.cat([torch.arange(length) for length in lengths] + [torch.arange(padding)])
    ids = torch.randint(5, 40, (1, len(index)))
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in [*lengths, padding] if n)).bool()
    with torch.no_grad(), active_rows(layers, {}) as active:
        active.set(offsets, index)
        packed = {"input_ids": ids, "position_ids": places[None], "attention_mask": mask[None, None]}
        together = runs(**packed, use_cache=False).logits
    start = 0
    for place, length in zip(which, lengths, strict=True):
        alone = {name: table[place] if len(table) else table for name, table in offsets.items()}
        with torch.no_grad(), active_rows(layers, alone):
            part = ids[:, start : start + length]
            expected = model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).logits
        torch.testing.assert_close(together[:, start : start + length], expected, rtol=1e-4, atol=1e-4)
        start += length
    assert model.base_model.execution.rows == {}


def test_rows_set_during_a_forward_serve_the_layers_that_run_later():
    model = adapt("llama")
    layers, ids = svf_layers(model), inputs(model)
    offsets = {name: 0.5 * torch.randn(2, layer.directions) for name, layer in layers.items()}
    index = torch.tensor([0, 1, 0])
    above = {name: offset for name, offset in offsets.items() if "layers.1." in name}
    with torch.no_grad(), active_rows(layers, above, index):
        expected = model(**ids).logits
    base = model.get_base_model()
    with torch.no_grad(), active_rows(layers, {}) as active:
        plain = base(**ids).logits
        hook = base.model.layers[0].register_forward_hook(lambda *_: active.set(offsets, index))
        together = base(**ids).logits
        hook.remove()
        later = base(**ids).logits
        with active_rows(layers, {}):
            assert torch.equal(base(**ids).logits, plain)
            with pytest.raises(RuntimeError, match="innermost"):
                active.set(offsets)
    assert torch.equal(together, expected) and not torch.equal(later, expected)
    assert model.base_model.execution.rows == {} and model.base_model.execution.batch is None
    with pytest.raises(RuntimeError, match="innermost"):
        active.set(offsets)


@pytest.mark.parametrize("rows", [4, 6])
def test_rows_are_repeated_in_generation_alone(rows):
    model = adapt("llama")
    layers, ids = svf_layers(model), torch.randint(5, 40, (rows, 4))
    offsets = {name: torch.randn(2, layer.directions) for name, layer in layers.items()}
    with torch.no_grad(), active_rows(layers, offsets, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=f"offsets for 2 rows, but the batch has {rows}"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert len(model.generate(input_ids=ids[:2], num_beams=2, max_new_tokens=2, pad_token_id=0)) == 2


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


@own_methods
def test_transformers_own_adapters_notice_it_in_the_first_forward():
    model = build("llama")
    mlp = model.model.layers[1].mlp

    class Reading(type(mlp)):
        def forward(self, x):
            return nn.functional.linear(self.act_fn(self.up_proj(x)) * self.gate_proj(x), self.down_proj.weight)

    mlp.__class__ = Reading
    model.add_adapter(SVFConfig(target_modules=["up_proj", "down_proj"]))
    copied = copy.deepcopy(model)
    for broken in (model, copied):
        with pytest.raises(ValueError, match=r"weight of model.layers.1.mlp.down_proj was read, but the layer didn't"):
            broken(**inputs(model))
    whole = build("llama")
    whole.add_adapter(SVFConfig())
    whole(**inputs(whole))
    assert not whole._forward_hooks and not whole._forward_pre_hooks


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


def test_a_model_with_the_config_of_another_kind_is_adapted():
    base = one_layer("linear", 7, 5)
    base.config = hf.T5Config()
    assert get_peft_model(base, SVFConfig(target_modules=["fc"]))(torch.randn(2, 5)).shape == (2, 7)


def test_continuous_batching_answers_each_request_with_its_own_offsets():
    model = adapt("llama")
    base, layers = model.get_base_model(), svf_layers(model)
    offsets = {
        name: 0.5 * torch.randn(3, layer.directions).index_fill_(0, torch.tensor(2), 0)
        for name, layer in layers.items()
    }
    prompts = [torch.randint(5, 40, (length,)).tolist() for length in (9, 1, 4, 6, 2)]
    which = {f"r{i}": i % 3 for i in range(len(prompts))}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    engine = ContinuousBatchingConfig(
        num_blocks=16, max_batch_tokens=8, allow_block_sharing=False, use_async_batching=False
    )
    with active_rows(layers, {}) as active:

        def set_rows(*_):
            batch = manager.batch_processor.inputs_and_outputs
            lengths = torch.tensor([request.query_length for request in batch.requests_in_batch])
            places = torch.tensor([which[request.state.request_id] for request in batch.requests_in_batch])
            active.set(offsets, places.repeat_interleave(lengths))

        hook = base.register_forward_pre_hook(set_rows)
        manager = base.init_continuous_batching(hf.GenerationConfig(**options), continuous_batching_config=engine)
        manager.start()
        try:
            for name, prompt in zip(which, prompts, strict=True):
                manager.add_request(prompt, request_id=name)
            answers = [manager.get_result(timeout=60) for _ in prompts]
        finally:
            manager.stop(block=True)
            hook.remove()
    assert all(answer is not None and answer.error is None for answer in answers)
    base.set_attn_implementation("sdpa")
    for answer in answers:
        place = which[answer.request_id]
        with torch.no_grad(), active_rows(layers, {name: table[place] for name, table in offsets.items()}):
            prompt = torch.tensor([answer.prompt_ids])
            expected = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        assert answer.generated_tokens == expected[0, len(answer.prompt_ids) :].tolist()
