# SPDX-License-Identifier: Apache-2.0
"""Laws of whole models with SVF adapters: architectures, several adapters, PEFT's and transformers' own methods."""

import copy
import logging
import re

import oracle
import pico
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_base_model_state_dict
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from pico import CONFIGS, STACKED, STACKS, build, fill, inputs, logits, matrix_of, own_methods, randomize, svf_layers
from safetensors.torch import load_file, save_file
from torch import nn

from peft_svf import SVFConfig
from peft_svf.tuner.model import DEFAULT_TARGETS

SOME = ["llama", "qwen2", "gpt2", "opt"]
DTYPES = [torch.float32, torch.bfloat16]
usual_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
some_kinds = pytest.mark.parametrize("kind", SOME)
ALL_LINEAR = {"target_modules": "all-linear"}
PLAIN = [(kind, {}) for kind in CONFIGS if kind != "gpt_oss"]
EVERY = [*PLAIN, *((kind, STACKS) for kind in STACKED)]
every_kind = pytest.mark.parametrize("kind, config", EVERY, ids=[f"{kind}{' stacks' * bool(c)}" for kind, c in EVERY])


def adapt(kind="llama", name="default", dtype=torch.float32, seed=None, **config):
    """A pico model with one adapter: z = 1, or random where a seed is given."""
    model = get_peft_model(
        build(kind, dtype=dtype, name=f"pico/{kind}"), SVFConfig(**config), adapter_name=name
    ).eval()
    if seed is not None:
        randomize(model, name, seed=seed)
    return model


def with_two(kind="llama", **config):
    """A pico model with the random adapters `a` (active) and `b`; also their z-vectors by module."""
    model = adapt(kind, "a", **config)
    model.add_adapter("b", SVFConfig(**config))
    return model, randomize(model, "a", seed=1), randomize(model, "b", seed=2)


def expected(kind, z, ids=None, **kwargs):
    """What the paper's weights answer."""
    return logits(fill(build(kind), z), ids, **kwargs)


def mixed(*parts):
    """`1 + sum of alpha (z - 1)` by module."""
    return {name: 1 + sum(alpha * (z[name] - 1) for alpha, z in parts) for name in parts[0][1]}


def close(found, wanted, atol=5e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def apart(found, other, atol=1e-2):
    assert (found - other).abs().max() > atol


# --- z = 1 is the base model


@every_kind
@usual_dtypes
def test_z_of_ones_is_the_base_model_to_the_bit(kind, config, dtype):
    base = logits(build(kind, dtype=dtype))
    model = adapt(kind, dtype=dtype, **config)
    assert torch.equal(logits(model), base) and torch.equal(model(**inputs(model)).logits, base)
    model.merge_adapter()
    assert torch.equal(logits(model), base)
    model.unmerge_adapter()
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model.merge_and_unload()), base)


@pytest.mark.parametrize("kind, config", [*((kind, ALL_LINEAR) for kind in SOME), ("mixtral", STACKS)])
@usual_dtypes
def test_unmerge_and_disable_and_unload_give_back_the_base_to_the_bit(kind, config, dtype):
    base = build(kind, dtype=dtype)
    model = adapt(kind, dtype=dtype, seed=1, **config)
    moved = logits(model)
    model.merge_adapter()
    apart(logits(model), logits(base))
    model.unmerge_adapter()
    assert torch.equal(logits(model), moved)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert not any(layer.merged for layer in svf_layers(model).values())
    model.merge_adapter()
    unloaded = model.unload()
    assert type(unloaded) is type(base) and not svf_layers(unloaded)
    for (name, mine), (other, theirs) in zip(unloaded.named_parameters(), base.named_parameters(), strict=True):
        assert name == other and torch.equal(mine, theirs)


# --- the paper's formula


LINEAR = [(kind, ALL_LINEAR) for kind, _ in PLAIN]


@pytest.mark.parametrize("kind, config", [*EVERY, *LINEAR, ("llama", {"target_modules": ["lm_head"]})])
def test_forward_and_merged_forward_equal_the_paper_formula(kind, config):
    model = adapt(kind, **config)
    wanted = expected(kind, randomize(model))
    apart(wanted, logits(build(kind)))
    close(logits(model), wanted)
    model.merge_adapter()
    close(logits(model), wanted)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert not svf_layers(merged)
    close(logits(merged), wanted)


@some_kinds
def test_gradient_of_z_is_that_of_the_dense_formula_and_nothing_else_gets_one(kind):
    model = adapt(kind, dtype=torch.float64, **ALL_LINEAR)
    z = randomize(model)
    plain = fill(build(kind, dtype=torch.float64), z)
    ids = inputs(model)
    for m in (model, plain):
        m(**ids, labels=ids["input_ids"]).loss.backward()
    for name, layer in svf_layers(model).items():
        G = plain.get_submodule(name).weight.grad
        G = G.T if kind == "gpt2" else G
        dz = oracle.dense_gradient(matrix_of(layer), z[name], G)
        found = layer.svf_offset["default"].weight.grad
        assert (found - dz).norm() <= 1e-6 * dz.norm(), name  # the offsets and their gradients are float32
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".svf_offset." in name) == (parameter.grad is not None), name


@pytest.mark.parametrize("reentrant", [True, False])
@usual_dtypes
def test_gradient_checkpointing_gives_the_same_gradient(reentrant, dtype):
    gradients = []
    for checkpointing in (False, True):
        base = build("llama", dtype=dtype)
        if checkpointing:
            pico.checkpoint(base, {"use_reentrant": reentrant})
        model = get_peft_model(base, SVFConfig()).train()
        randomize(model)
        ids = inputs(model)
        model(**ids, labels=ids["input_ids"]).loss.backward()
        gradients.append([layer.svf_offset["default"].weight.grad for layer in svf_layers(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        assert torch.equal(plain, checkpointed)


def test_compile_takes_one_graph_and_sees_a_change_of_z(graphs):
    model = adapt("llama", seed=1)
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    close(logits(compiled), logits(model))
    before = logits(model)
    randomize(model, seed=2)
    apart(logits(model), before)
    close(logits(compiled), logits(model))
    assert len(graphs) == 1


# --- several adapters


@some_kinds
def test_adapters_act_while_they_are_active_and_two_add_their_offsets(kind):
    model, z_a, z_b = with_two(kind)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.add_adapter("idle", SVFConfig(init_weights=False))
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    close(logits(model), expected(kind, z_a))
    model.base_model.set_adapter(["a", "b"])
    both = expected(kind, mixed((1, z_a), (1, z_b)))
    close(logits(model), both)
    model.merge_adapter()
    close(logits(model), both)
    model.unmerge_adapter()
    model.set_adapter("b")
    model.delete_adapter("a")
    close(logits(model), expected(kind, z_b))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(kind)))
    assert set(model.peft_config) == {"b", "idle"}
    assert all("a" not in layer.svf_offset for layer in svf_layers(model).values())


def test_adapters_on_different_modules_act_where_they_are():
    model = adapt("llama", "mlp", target_modules=["up_proj", "down_proj"])
    model.add_adapter("attention", SVFConfig(target_modules=["q_proj", "up_proj"]))
    z_mlp, z_attention = randomize(model, "mlp", seed=1), randomize(model, "attention", seed=2)
    close(logits(model), expected("llama", z_mlp))
    model.set_adapter("attention")
    close(logits(model), expected("llama", z_attention))
    both = {name: z_mlp.get(name, 1) + z_attention.get(name, 1) - 1 for name in {*z_mlp, *z_attention}}
    model.base_model.set_adapter(["mlp", "attention"])
    close(logits(model), expected("llama", both))


# --- add_weighted_adapter


@pytest.mark.parametrize("alpha", [(1.0, 0.0), (0.5, -0.2), (0.75, 0.25), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize(
    "configs",
    [
        ({}, {}),
        ({"rank": 3}, {"rank": 6}),
        ({"target_modules": ["up_proj"]}, {"target_modules": r".*\.0\.(mlp\.down_proj|self_attn\.q_proj)"}),
        ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
        ({"exclude_modules": ["up_proj"]}, {}),
    ],
)
def test_a_mixture_is_one_plus_the_weighted_offsets_and_its_sources_stay(alpha, configs):
    model = adapt("llama", "a", **configs[0])
    model.add_adapter("b", SVFConfig(**configs[1]))
    z = [randomize(model, name, seed=seed) for seed, name in enumerate("ab")]
    z = [{name: torch.cat([v, v.new_ones(24 - len(v))]) for name, v in part.items()} for part in z]
    model.add_weighted_adapter(["a", "b"], list(alpha), "mix")
    model.set_adapter("mix")
    ones = torch.ones(24)
    wanted = [{name: part.get(name, ones) for name in z[0] | z[1]} for part in z]
    close(logits(model), expected("llama", mixed(*zip(alpha, wanted, strict=True))))
    if not any(alpha):
        assert torch.equal(logits(model), logits(build("llama")))
    model.add_weighted_adapter(["b"], [1.0], "a")  # a name that is taken keeps its adapter
    randomize(model, "mix", seed=9)
    for name, part in zip("ab", z, strict=True):
        model.set_adapter(name)
        close(logits(model), expected("llama", part))


@pytest.mark.parametrize(
    "adapters, weights, message",
    [
        (["a", "b"], [0.5], r"a finite weight per adapter, got \[0.5\] for \['a', 'b'\]"),
        ([], [], "a finite weight per adapter"),
        (["a", "b"], [float("nan"), 1.0], "a finite weight per adapter"),
        (["a", "b"], [1e300, -1e300], "a finite weight per adapter"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(adapters, weights, message):
    model, z_a, _ = with_two()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, "mix")
    assert set(model.peft_config) == {"a", "b"}
    close(logits(model), expected("llama", z_a))


# --- mixed batches


@every_kind
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "other rank and modules"])
def test_a_mixed_batch_equals_one_by_one(kind, config, alike):
    model = adapt(kind, "a", seed=1, **config)
    model.add_adapter(
        "b", SVFConfig(**config | ({} if alike else {"rank": 3} if config else {"rank": 3, **ALL_LINEAR}))
    )
    randomize(model, "b", seed=2)
    ids, names = inputs(model, batch=4), ["b", "__base__", "a", "b"]
    together = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in ids.items()}
        if name == "__base__":
            with model.disable_adapter():
                wanted = logits(model, alone)
        else:
            model.set_adapter(name)
            wanted = logits(model, alone)
        close(together[row], wanted[0])
    assert all(layer.rows is None for layer in svf_layers(model).values())


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "returned sequences": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("how", GENERATION)
def test_mixed_generation_equals_one_by_one(kind, how):
    model, _, _ = with_two(kind)
    ids, names = inputs(model, batch=3)["input_ids"], ["b", "__base__", "a"]
    kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **GENERATION[how]}
    kwargs["attention_mask"] = torch.ones_like(ids)
    together = model.generate(input_ids=ids, adapter_names=names, **kwargs)
    count = kwargs.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        kwargs["attention_mask"] = torch.ones_like(ids[:1])
        alone = model.generate(input_ids=ids[row : row + 1], adapter_names=[name], **kwargs)
        assert torch.equal(together[row * count : (row + 1) * count], alone)


def test_a_mixed_batch_that_cannot_be_is_refused_and_leaves_no_trace():
    model, z_a, _ = with_two()
    with pytest.raises(ValueError, match=r"non-existing adapter.*: c, d"):
        logits(model, adapter_names=["a", "c", "d"])
    with pytest.raises(ValueError, match="got 2 and 3"):
        logits(model, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="training mode"):
        logits(model.train(), adapter_names=["a", "b", "a"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits(model, adapter_names=["a", "b", "a"])
    model.unmerge_adapter()
    close(logits(model), expected("llama", z_a))


# --- save and load


def offsets(model, name="default"):
    return {key: layer.svf_offset[name].weight.detach().clone() for key, layer in svf_layers(model).items()}


def same_offsets(a, b):
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype == torch.float32 and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("how", ["peft", "low_cpu_mem_usage", "transformers"])
@pytest.mark.parametrize(
    "kind, config, dtype", [*((*case, torch.float32) for case in EVERY), ("gpt2", {}, torch.bfloat16)]
)
def test_save_then_load_is_exact(kind, config, dtype, how, tmp_path):
    model = adapt(kind, dtype=dtype, seed=1, **config)
    before = logits(model)
    if how == "peft":  # of a merged model the same is saved
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    same_offsets(stored, {f"base_model.model.{key}.svf_offset.weight": value for key, value in offsets(model).items()})
    base = build(kind, dtype=dtype, name=f"pico/{kind}")
    if how == "transformers":
        base.load_adapter(str(tmp_path))
    else:
        base = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=how == "low_cpu_mem_usage")
        assert not any(parameter.requires_grad for parameter in base.parameters())
    same_offsets(offsets(base), offsets(model))
    assert torch.equal(logits(base), before)


def by_state_dict(model, folder):
    twin = adapt("llama", seed=2)
    twin.load_state_dict(model.state_dict())
    return twin


def by_pickle(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def by_copy(model, folder):
    model.merge_adapter()
    twin = copy.deepcopy(model)
    merged = logits(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(model), merged)
    return twin


@pytest.mark.parametrize("way", [by_state_dict, by_pickle, by_copy])
def test_a_copy_is_the_same_and_on_its_own(way, tmp_path):
    model = adapt("llama", seed=1)
    before = logits(model)
    twin = way(model, tmp_path)
    assert torch.equal(logits(twin), before) and twin.active_adapters == ["default"]
    randomize(model, seed=2)
    assert torch.equal(logits(twin), before)


@own_methods
def test_transformers_own_adapters_get_the_basis_of_weights_that_are_loaded_later():
    model, other, trained = build("llama"), build("llama", seed=5), adapt("llama")
    z = randomize(trained)
    model.add_adapter(SVFConfig())
    set_base_model_state_dict(trained, other.state_dict())
    model.load_state_dict({name.removeprefix("base_model.model."): t for name, t in trained.state_dict().items()})
    close(logits(model), logits(fill(other, z)))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("into", ["peft", "base"])
def test_weights_that_a_state_dict_replaces_get_the_basis_of_the_new_ones(into, merge):
    model, other = adapt("llama"), build("llama", seed=5)
    z = randomize(model)
    logits(model)  # so that something of the old weights is kept
    if into == "base":
        set_base_model_state_dict(model, other.state_dict())
    else:
        twin = adapt("llama")
        set_base_model_state_dict(twin, other.state_dict())
        model.load_state_dict(twin.state_dict() | {n: t for n, t in model.state_dict().items() if "svf_offset" in n})
    if merge:
        model.merge_adapter()
    close(logits(model), logits(fill(other, z)))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
def test_a_peft_model_is_not_wrapped_again():
    model = adapt("llama", seed=1)
    before = logits(model)
    with pytest.raises(ValueError, match="add_adapter"):
        get_peft_model(model, SVFConfig())
    assert torch.equal(logits(model), before)


def test_a_state_dict_that_is_given_wins_over_the_model():
    model = adapt("llama", seed=1)
    given = {key: value + 1 for key, value in model.state_dict().items()}
    found = get_peft_model_state_dict(model, state_dict=given)
    assert len(found) == 6
    for key, value in offsets(model).items():
        assert torch.equal(found[f"base_model.model.{key}.svf_offset.weight"], value + 1)


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.double()], ids=["to", "double"])
def test_a_model_cast_after_adapting_still_equals_the_paper_formula(move):
    model = adapt("llama")
    z = randomize(model)
    close(logits(move(model)).float(), expected("llama", z))
    base = build("llama", dtype=torch.bfloat16)
    model = get_peft_model(base, SVFConfig(), autocast_adapter_dtype=False)
    assert {layer.svf_offset["default"].weight.dtype for layer in svf_layers(model).values()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(build("llama", dtype=torch.bfloat16)))


# --- transformers' own methods


@own_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT's, for any second adapter
def test_an_expert_that_is_saved_beside_a_lora_of_the_same_modules_loads_without_it(tmp_path):
    base = build("llama", name="pico/llama")
    base.add_adapter(SVFConfig())
    z = randomize(base)
    base.add_adapter(LoraConfig(target_modules=["up_proj"]), adapter_name="lora")
    base.set_adapter("default")
    close(logits(base), expected("llama", z))
    base.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(build("llama", name="pico/llama"), tmp_path)), expected("llama", z))
    assert not set_peft_model_state_dict(base, load_file(tmp_path / "adapter_model.safetensors")).unexpected_keys


@own_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT's, for any second adapter
def test_transformers_own_methods_add_choose_delete_save_and_load(tmp_path):
    base = build("llama", name="pico/llama")
    base.add_adapter(SVFConfig(), adapter_name="a")
    base.add_adapter(SVFConfig(rank=4), adapter_name="b")
    z = {name: randomize(base, name, seed=seed) for seed, name in enumerate("ab")}
    for name in "ba":
        base.set_adapter(name)
        close(logits(base), expected("llama", z[name]))
    base.delete_adapter("b")
    assert list(base.peft_config) == base.active_adapters() == ["a"]
    base.disable_adapters()
    assert torch.equal(logits(base), logits(build("llama")))
    base.enable_adapters()
    base.save_pretrained(tmp_path)
    other = build("llama", name="pico/llama")
    other.load_adapter(str(tmp_path), adapter_name="again")
    peft = PeftModel.from_pretrained(build("llama", name="pico/llama"), tmp_path)
    assert torch.equal(logits(other), logits(base)) and torch.equal(logits(peft), logits(base))


# --- modules_to_save


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_modules_to_save_are_trained_saved_and_loaded_whole(low_cpu_mem_usage, tmp_path):
    model = get_peft_model(build("bert", name="pico/bert"), SVFConfig(task_type=TaskType.SEQ_CLS)).eval()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[-3] for name in trainable if "svf_offset" not in name} == {"modules_to_save"}
    randomize(model)
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.weight.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        build("bert", name="pico/bert"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(loaded), logits(model))
    same_offsets(offsets(loaded), offsets(model))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(build("bert")))


def test_modules_to_save_follow_a_mixed_batch():
    model = get_peft_model(build("bert"), SVFConfig(modules_to_save=["classifier"]), adapter_name="a").eval()
    model.add_adapter("b", SVFConfig(modules_to_save=["classifier"]))
    for seed, name in enumerate("ab"):
        randomize(model, name, seed=seed)
        torch.manual_seed(seed)
        model.base_model.model.classifier.modules_to_save[name].weight.data.normal_()
    ids = inputs(model)
    together = logits(model, ids, adapter_names=["a", "b", "a"])
    for row, name in enumerate("aba"):
        model.set_adapter(name)
        close(together[row], logits(model, ids)[row])
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mix")


# --- targets


def test_the_parameter_count_of_the_paper_on_llama_3_8b():
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    with torch.device("meta"):
        base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))
        model = get_peft_model(base, SVFConfig(target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters()[0] == 163_840


DEFAULTS = {
    **dict.fromkeys(["llama", "qwen2", "gemma3_text"], ({"gate_proj", "up_proj", "down_proj"}, 6)),
    "gpt2": ({"c_fc", "c_proj"}, 4),
    "opt": ({"fc1", "fc2"}, 4),
    "bert": ({"dense"}, 4),  # by a regex
    "t5": ({"wi", "wo"}, 8),
    "phi3": ({"gate_up_proj", "down_proj"}, 4),
    **dict.fromkeys(["mixtral", "qwen3_moe"], ({"q_proj", "v_proj"}, 4)),  # fused experts
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_default_targets_are_the_mlp_of_the_architecture_or_attention_which_is_logged(kind, caplog):
    with caplog.at_level(logging.INFO, logger="peft_svf"):
        names = list(svf_layers(adapt(kind)))
    assert ({name.rsplit(".", 1)[1] for name in names}, len(names)) == DEFAULTS[kind]
    assert kind not in ("gpt2", "bert") or not any("attn" in name or "attention" in name for name in names)
    assert caplog.text.count("attention q and v") == (kind in ("mixtral", "qwen3_moe"))


def test_an_architecture_without_a_default_takes_what_lora_adapts_or_says_so(caplog, monkeypatch):
    monkeypatch.delitem(DEFAULT_TARGETS, "opt")
    with caplog.at_level(logging.INFO, logger="peft_svf"):
        names = svf_layers(adapt("opt"))
    assert {name.rsplit(".", 1)[1] for name in names} == {"q_proj", "v_proj"} and "no 'opt'" in caplog.text
    strange = build("opt")
    monkeypatch.setattr(type(strange.config), "model_type", "strange")
    with pytest.raises(ValueError, match=r"specify `target_modules`.*no default for the architecture 'strange'"):
        get_peft_model(strange, SVFConfig())


# --- bad input


BAD_TARGETS = {  # targets, message
    "unknown": (["no_such_proj"], r"no_such_proj.* not found in the base model"),
    "embedding": (["embed_tokens"], r"model\.embed_tokens is not supported: it is a Embedding"),
    "norm after linears": (["q_proj", "post_attention_layernorm"], r"post_attention_layernorm is not supported"),
    "tied head": (["up_proj", "lm_head"], r"lm_head is the output head and shares its weight"),
    "NaN": (["up_proj", "v_proj"], r"^model\.layers\.1\.self_attn\.v_proj: .*NaN or"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")  # PEFT's, before ours
@pytest.mark.parametrize("case", BAD_TARGETS)
@pytest.mark.parametrize("how", ["get_peft_model", pytest.param("add_adapter", marks=own_methods), "a second adapter"])
def test_targets_that_cannot_be_adapted_are_refused_and_the_model_is_as_it_was(case, how):
    targets, message = BAD_TARGETS[case]
    base = build("llama", tie_word_embeddings=case == "tied head")
    if case == "NaN":
        base.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    base.model.layers[0].requires_grad_(False)
    model = base
    if how == "a second adapter":
        model = get_peft_model(base, SVFConfig(target_modules=["gate_proj"]), adapter_name="a").eval()
        randomize(model, "a")
    before = set(svf_layers(model)), [parameter.requires_grad for parameter in model.parameters()]
    answer = logits(model)
    with pytest.raises(ValueError, match=message):
        if how == "get_peft_model":
            get_peft_model(base, SVFConfig(target_modules=targets))
        else:
            model.add_adapter(*["b"] * (model is not base), SVFConfig(target_modules=targets))
    assert (set(svf_layers(model)), [parameter.requires_grad for parameter in model.parameters()]) == before
    torch.testing.assert_close(logits(model), answer, rtol=0, atol=0, equal_nan=True)
    if how == "a second adapter":
        assert list(model.peft_config) == ["a"]
        model.add_adapter("b", SVFConfig(target_modules=["gate_proj"]))
        model.set_adapter("b")
    else:
        assert not hasattr(base, "peft_config") and not getattr(base, "_hf_peft_config_loaded", False)


class Spelled(nn.Linear):
    """A linear layer with a forward of its own that is the same product, as Falcon has."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Rounding(nn.Linear):
    """A linear layer that isn't the product with its weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.bfloat16().float(), self.bias)


class Odd(nn.Module):
    """Linear layers that SVF adapts, reads in vain, can't read, or would rescale in one place of two."""

    def __init__(self):
        super().__init__()
        self.plain, self.spelled, self.rounding = nn.Linear(8, 8), Spelled(8, 8), Rounding(8, 8)
        self.attention, self.here = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.there = self.here

    def forward(self, x):
        x = self.rounding(self.spelled(torch.tanh(self.plain(x))))
        return self.there(torch.tanh(self.here(self.attention(x, x, x)[0])))


def test_all_linear_leaves_out_what_cannot_be_adapted_and_says_so(caplog):
    base, x = Odd().eval(), torch.randn(5, 3, 8)
    model = get_peft_model(copy.deepcopy(base), SVFConfig(target_modules="all-linear")).eval()
    assert set(svf_layers(model)) == {"plain", "spelled"} == model.peft_config["default"].target_modules
    (record,) = caplog.records
    assert re.search(r"leaves out 3 modules .*: attention\.out_proj, here, rounding$", record.message)
    wanted = fill(base, randomize(model))(x)
    close(model(x), wanted)
    close(model.merge_and_unload()(x), wanted)
    with pytest.raises(ValueError, match=r"rounding is not supported: it is a Rounding"):
        get_peft_model(base, SVFConfig(target_modules=["plain", "rounding"]))


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_refused_state_leaves_an_adapter_that_was_there_alone(adapters, tmp_path):
    model = adapt(seed=1)
    if adapters == 2:
        model.add_adapter("other", SVFConfig())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before, state = logits(model), get_peft_model_state_dict(model)
    bad = {name: torch.full_like(offset, torch.nan) for name, offset in state.items()}
    with pytest.raises(ValueError, match="NaN"):
        set_peft_model_state_dict(model, bad)
    model.save_pretrained(tmp_path)
    save_file(bad, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path, "default")  # as Trainer loads the best checkpoint
    with pytest.raises(ValueError, match="NaN"):
        model.load_adapter(tmp_path, "new")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert set(model.peft_config) == {"default", "other"} if adapters == 2 else {"default"}
    assert torch.equal(logits(model), before)


def test_the_batch_of_mixed_adapters_is_that_of_the_tokens():
    model = adapt(seed=1)
    ids = inputs(model)
    rows = len(ids["input_ids"])
    places = torch.arange(ids["input_ids"].shape[1])[None]
    with torch.no_grad():
        found = model(position_ids=places, **ids, adapter_names=["default"] * rows).logits
    torch.testing.assert_close(found, logits(model))


def test_replicas_of_data_parallel_training_compute_the_same():
    """torch's `replicate` leaves parameters as plain attributes."""
    model = adapt(seed=1)
    expected = logits(model)
    for layer in svf_layers(model).values():
        for module in layer.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    object.__setattr__(module, name, parameter.detach().clone())
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("name", ["expert-1", "mlp"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_offsets_and_gradients_of_a_named_adapter_are_trainable_after_loading(name, low_cpu_mem_usage, tmp_path):
    adapt("llama", "x", seed=1).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(
        build("llama", name="pico/llama"),
        tmp_path / "x",
        adapter_name=name,
        is_trainable=True,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    ids = inputs(model)
    model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(layer.svf_offset[name].weight.grad is not None for layer in svf_layers(model).values())


Q_AND_V = {"target_modules": r".*\.0\.self_attn\.[qv]_proj"}
SECOND = {"llama": (r"model\.layers\.1\.", 3), "bert": (r"bert\..*layer\.1\.", 2), "gpt2": (r"transformer\.h\.1\.", 2)}
SELECTED = {  # kind, config, what the names match whole, their number
    "a default is a regex": ("bert", {}, r"bert\.encoder\.layer\.[01]\.(intermediate|output)\.dense", 4),
    "excluded": ("llama", {"exclude_modules": ["layers.0.mlp.up_proj"]}, r"(?!.*0\.mlp\.up_proj).*\.mlp\..*", 5),
    "a regex matches whole names": ("llama", Q_AND_V, r".*\.0\..*[qv]_proj", 2),
    "all linear without the head": ("llama", ALL_LINEAR, r"model\.layers\..*_proj", 14),
    **{
        f"one layer of {kind}": (kind, {"layers_to_transform": [1]}, rf"{layer}.*", count)
        for kind, (layer, count) in (SECOND | {"mixtral": (r"model\.layers\.1\.self_attn\.", 2)}).items()
    },
}


@pytest.mark.parametrize("case", SELECTED)
def test_the_modules_that_a_config_selects(case):
    kind, config, pattern, count = SELECTED[case]
    names = list(svf_layers(adapt(kind, **config)))
    assert len(names) == count and all(re.fullmatch(pattern, name) for name in names)
