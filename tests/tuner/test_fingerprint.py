# SPDX-License-Identifier: Apache-2.0
"""Laws of belonging: an expert is at home on its own base in any dtype, and refused or warned anywhere else."""

import copy
import json
import warnings

import oracle
import pytest
import seeing
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from pico import build, edit_config, edit_tensors, logits, matrix_of, randomize, svf_layers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peft_svf import SVFConfig
from peft_svf.tuner.cache import content_key
from peft_svf.tuner.weights import Checkpoint

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MODULE = "model.layers.0.mlp.up_proj"
HOW = ["PeftModel", "load_adapter", "transformers"]


def make_expert(base, folder, seed=1, **config):
    """Save a random expert of a base; returns its z-vectors."""
    model = get_peft_model(base, SVFConfig(**config)).eval()
    z = randomize(model, seed=seed)
    model.save_pretrained(folder)
    return z


def load_expert(base, folder, how="PeftModel"):
    """Load an expert in each of the ways that exist; returns the model that answers with it."""
    if how == "PeftModel":
        return PeftModel.from_pretrained(base, folder)
    if how == "load_adapter":
        model = get_peft_model(base, SVFConfig(), adapter_name="first")
        model.load_adapter(folder, "second")
        model.set_adapter("second")
        return model
    base.load_adapter(str(folder))
    return base


def fingerprint_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["fingerprint"]


def scale_the_probe(folder, factor):
    """Pretend that the expert was made on other bits, whose directions are this far away."""
    saved = fingerprint_of(folder)
    probe = " ".join(str(float(x) * factor) for x in saved[MODULE]["probe"].split())
    edit_config(folder, fingerprint=saved | {MODULE: {"sha256": "0" * 64, "probe": probe}})


def state_of(base):
    return (
        {name: list(layer.svf_offset) for name, layer in svf_layers(base).items()},
        [(name, type(module)) for name, module in base.named_modules()],
        [name for name, parameter in base.named_parameters() if parameter.requires_grad],
        hasattr(base, "peft_config") and sorted(base.peft_config),
        getattr(base, "_hf_peft_config_loaded", False),
    )


def refused(base, folder, message=None, how="PeftModel"):
    """Check that an expert isn't loaded, and that the base, or the first expert, answers as before."""
    model = base
    if how == "load_adapter":
        model = get_peft_model(base, SVFConfig(), adapter_name="first").eval()
        randomize(model, "first", seed=9)
    before, answer = state_of(base), logits(model)
    with pytest.raises((ValueError, OSError, SafetensorError), match=message):
        if how == "PeftModel":
            PeftModel.from_pretrained(base, folder)
        else:
            model.load_adapter(str(folder), "second")
    assert state_of(base) == before and torch.equal(logits(model), answer)
    if how == "load_adapter":
        assert list(model.peft_config) == model.active_adapters == ["first"]


@pytest.fixture
def expert(tmp_path):
    """An expert of `pico/home` (seed 0, float32)."""
    make_expert(build(name="pico/home"), tmp_path / "expert")
    return tmp_path / "expert"


every_way = pytest.mark.parametrize("how", HOW)


# --- what is written


def test_the_fingerprint_names_the_values_of_every_adapted_weight_and_saving_again_keeps_it(expert, tmp_path):
    entry = json.loads((expert / "adapter_config.json").read_text())
    base = build(name="pico/home")
    assert entry["base_model_name_or_path"] == "pico/home"
    assert set(entry["fingerprint"]) == {
        f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")
    }
    for name, fingerprint in entry["fingerprint"].items():
        assert fingerprint["sha256"] == content_key(matrix_of(base.get_submodule(name)))
        assert len(fingerprint["probe"].split()) == 32
    PeftModel.from_pretrained(base, expert).save_pretrained(tmp_path / "again")
    assert fingerprint_of(expert) == fingerprint_of(tmp_path / "again")


def test_a_config_that_was_saved_may_start_an_adapter_on_another_base(tmp_path):
    config = SVFConfig(target_modules=["up_proj"])
    get_peft_model(build(name="pico/home"), config).save_pretrained(tmp_path / "a")
    for other in (copy.copy(config), config):
        model = get_peft_model(build(seed=5, name="pico/home"), other)
        assert torch.equal(logits(model), logits(build(seed=5)))


# --- the own base


@every_way
@pytest.mark.parametrize("case", ["own", "another name", "float64", "another driver"])
def test_the_own_base_is_accepted_in_silence(how, case, expert, caplog):
    base = build(name="somewhere/else" if case == "another name" else "pico/home")
    if case == "another driver":
        scale_the_probe(expert, 1 + 2e-4)
    model = load_expert(base.double() if case == "float64" else base, expert, how)  # warnings are errors
    assert len(svf_layers(model)) == 6
    assert not [record for record in caplog.records if record.name.startswith("peft_svf")]


@every_way
@pytest.mark.parametrize("narrow", [BF16, FP16], ids=["bf16", "fp16"])
def test_one_narrow_checkpoint_loaded_in_two_dtypes_is_one_base(how, narrow, tmp_path):
    make_expert(build(dtype=narrow, name="pico/home"), tmp_path)
    load_expert(build(dtype=narrow, name="pico/home").float(), tmp_path, how)
    load_expert(build(dtype=narrow, name="pico/home").double(), tmp_path, how)


# --- another base


def of_another_size(base):
    mlp, sizes = base.model.layers[0].mlp, [(24, 44), (24, 44), (44, 24)]
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(*size, bias=False) for size in sizes)


STRANGERS = {  # a change of the base `pico/stranger`, the message
    "other values": (
        lambda base: base.model.embed_tokens.requires_grad_(False),
        r"\.mlp\..*_proj in 'pico/stranger'.*'pico/home'.*Load the base it was trained on",
    ),
    "fewer layers": (
        lambda base: base.model.layers.pop(1),
        r"'pico/home', which has a module model\.layers\.1\.mlp.*'pico/stranger', has none",
    ),
    "another size": (of_another_size, "does not belong to this base model"),
}


@every_way
@pytest.mark.parametrize("case", STRANGERS)
def test_another_base_is_refused_with_module_models_and_way_out(case, how, expert):
    change, message = STRANGERS[case]
    base = build(seed=3, name="pico/stranger")
    change(base)
    refused(base, expert, f"(?s){message}", how)


BARE, HEADED = hf.AutoModel, hf.AutoModelForTokenClassification  # the latter has no pooler


@pytest.mark.parametrize("made, used, lacks", [(BARE, HEADED, r"bert\.pooler"), (HEADED, BARE, "classifier")])
def test_an_expert_goes_from_a_backbone_to_a_model_with_a_head_and_back(made, used, lacks, tmp_path):
    build("bert", name="pico/home").save_pretrained(tmp_path / "base")
    model = get_peft_model(
        from_disk(tmp_path / "base", FP32, made), SVFConfig(target_modules=["query", "intermediate.dense"])
    )
    z = randomize(model)
    model.save_pretrained(tmp_path / "expert")
    loaded = PeftModel.from_pretrained(from_disk(tmp_path / "base", FP32, used), tmp_path / "expert")
    assert len(svf_layers(loaded)) == len(z)
    for name, layer in svf_layers(loaded).items():
        bare = name.removeprefix("bert.")
        assert torch.equal(layer.svf_offset["default"].weight.double() + 1, z[bare if bare in z else f"bert.{bare}"])
    get_peft_model(from_disk(tmp_path / "base", FP32, made), SVFConfig(target_modules="all-linear")).save_pretrained(
        tmp_path / "whole"
    )
    with pytest.raises(ValueError, match=f"which has a module {lacks}.*has none"):
        PeftModel.from_pretrained(from_disk(tmp_path / "base", FP32, used), tmp_path / "whole")


def test_the_first_adapters_of_a_base_do_not_hide_that_another_is_foreign(expert):
    model = get_peft_model(build(seed=3, name="pico/stranger"), SVFConfig(), adapter_name="first")
    randomize(model, "first")
    model.merge_adapter()
    merged = logits(model)
    unmerging = pytest.warns(UserWarning, match="Unmerging the model first")  # PEFT's, before it adds an adapter
    with unmerging, pytest.raises(ValueError, match="does not belong to this base model"):
        model.load_adapter(expert, "second")
    assert torch.equal(logits(model), merged)


@every_way
def test_a_base_without_a_name_only_warns(how, tmp_path):
    make_expert(build(), tmp_path)
    base = build(seed=3)
    with pytest.warns(UserWarning, match=r"singular directions of 6 modules.*an unnamed model.*Expect other outputs"):
        load_expert(base, tmp_path, how)


def test_the_grey_zone_warns_with_the_way_out(expert):
    scale_the_probe(expert, 1 + 3e-3)
    message = rf"1 modules.*in {MODULE}.*probably rounded.*Load the base it was trained on"
    with pytest.warns(UserWarning, match=message):
        load_expert(build(name="pico/home"), expert)


@every_way
@pytest.mark.parametrize("made, used", [(FP32, BF16), (FP32, FP16), (BF16, FP32)], ids=str)
def test_weights_rounded_in_memory_are_refused_or_warned(how, made, used, tmp_path):
    make_expert(build(dtype=made, name="pico/home"), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            load_expert(build(name="pico/home").to(used), tmp_path, how)
        except ValueError as error:
            assert "does not belong to this base model" in str(error)
            return
    assert any("weights were probably rounded" in str(warning.message) for warning in caught)


# --- the stored weights


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path):
    """A float32 checkpoint on disk."""
    size = {"one file": "1GB", "shards": "20KB"}[request.param]
    build(name="pico/home").save_pretrained(tmp_path / "base", max_shard_size=size)
    return tmp_path / "base"


def from_disk(folder, dtype, auto=hf.AutoModelForCausalLM):
    return auto.from_pretrained(folder, dtype=dtype).eval()


@every_way
@pytest.mark.parametrize("made, used", [(FP32, BF16), (BF16, FP32), (FP16, BF16), (BF16, BF16)], ids=str)
def test_an_expert_made_on_one_load_of_a_checkpoint_works_on_another_in_silence(how, made, used, folder, tmp_path):
    z = make_expert(from_disk(folder, made), tmp_path / "expert")
    model = load_expert(from_disk(folder, used), tmp_path / "expert", how)  # warnings are errors
    layer, stored = svf_layers(model)[MODULE], build().get_submodule(MODULE).weight
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(used)
    expected = oracle.output(stored, None, z[MODULE], x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_the_basis_of_a_narrow_load_is_that_of_the_file_and_z_of_ones_that_base_to_the_bit(folder):
    model = get_peft_model(from_disk(folder, BF16), SVFConfig())
    assert torch.equal(logits(model), logits(from_disk(folder, BF16)))
    wide, narrow = svf_layers(get_peft_model(from_disk(folder, FP32), SVFConfig())), svf_layers(model)
    config = SVFConfig(basis_from="checkpoint", basis_dtype="float32")
    for name, layer in svf_layers(get_peft_model(from_disk(folder, BF16, hf.AutoModel), config)).items():
        assert torch.equal(layer.svf_basis, wide[f"model.{name}"].svf_basis)
    for name, layer in narrow.items():  # kept in the dtype of the base
        assert layer.svf_basis.dtype == BF16 and torch.equal(layer.svf_basis, wide[name].svf_basis.bfloat16())
        assert layer.svf_fingerprint.sha256 == wide[name].svf_fingerprint.sha256


@pytest.mark.parametrize("kind", ["gpt2", "bert", "opt", "qwen2", *seeing.KINDS])
def test_every_kind_of_layer_finds_its_stored_weight(kind, tmp_path):
    base = seeing.model(kind) if kind in seeing.KINDS else build(kind, name="pico/home")
    base.save_pretrained(tmp_path)
    narrow = type(base).from_pretrained(tmp_path, dtype=BF16)
    layers = svf_layers(get_peft_model(narrow, SVFConfig(basis_from="checkpoint", basis_dtype="float32")))
    for name, layer in svf_layers(get_peft_model(base, SVFConfig())).items():
        assert torch.equal(layers[name].svf_basis, layer.svf_basis)


def test_a_load_that_rounds_nothing_reads_no_stored_weight(tmp_path, monkeypatch):
    build(name="pico/home", dtype=BF16).save_pretrained(tmp_path)
    monkeypatch.setattr(Checkpoint, "weight", None)  # whoever calls it fails
    get_peft_model(from_disk(tmp_path, BF16), SVFConfig())


def test_weights_that_were_changed_after_loading_are_not_those_of_the_file(folder):
    base = from_disk(folder, BF16)
    base.get_submodule(MODULE).weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=f"holds the weight of {MODULE} as it is loaded"):
        get_peft_model(base, SVFConfig(basis_from="checkpoint"))
    layer = svf_layers(get_peft_model(base, SVFConfig()))[MODULE]
    assert layer.svf_fingerprint.sha256 == content_key(matrix_of(layer))
    narrow = get_peft_model(from_disk(folder, BF16), SVFConfig(basis_from="memory"))
    for layer in svf_layers(narrow).values():
        assert layer.svf_fingerprint.sha256 == content_key(matrix_of(layer))


@pytest.mark.parametrize("name", ["", "pico/home", "no/such/folder"])
def test_basis_from_checkpoint_without_a_file_is_a_clear_error_and_the_base_stays(name):
    base = build(name=name)
    before = state_of(base)
    with pytest.raises(ValueError, match=r"basis_from='checkpoint', but no safetensors file.*Use basis_from='memory'"):
        get_peft_model(base, SVFConfig(basis_from="checkpoint"))
    assert state_of(base) == before


DAMAGES = [lambda f: f.write_bytes(f.read_bytes()[:100]), lambda f: f.write_text("{"), lambda f: f.unlink()]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "text", "missing"])
def test_a_checkpoint_that_became_unreadable_is_as_good_as_none(damage, folder):
    base = from_disk(folder, BF16)
    for file in folder.glob("*.safetensors"):
        damage(file)
    layer = svf_layers(get_peft_model(base, SVFConfig()))[MODULE]
    assert layer.svf_fingerprint.sha256 == content_key(matrix_of(layer))


# --- Checkpoint on its own


def test_checkpoint_gives_the_stored_weight_only_where_it_rounds_to_the_loaded_one(tmp_path):
    build(name="pico/home").save_pretrained(tmp_path)
    checkpoint = Checkpoint(from_disk(tmp_path, BF16))
    stored = load_file(tmp_path / "model.safetensors")[f"{MODULE}.weight"]
    weight = checkpoint.weight(f"{MODULE}.weight", stored.bfloat16())
    assert weight.dtype == FP32 and torch.equal(weight, stored)
    assert checkpoint.weight(f"{MODULE}.weight", stored.bfloat16() * 2) is None
    assert checkpoint.weight(f"{MODULE}.weight", stored.bfloat16()[:3]) is None
    assert checkpoint.weight("no.such.weight", stored) is None


def test_checkpoint_reads_the_hub_cache(tmp_path, monkeypatch):
    """The layout of the Hub's cache: models--org--name/snapshots/<revision>."""
    snapshot = tmp_path / "models--pico--cached" / "snapshots" / "abc"
    build(name="pico/home").save_pretrained(snapshot)
    (tmp_path / "models--pico--cached" / "refs").mkdir()
    (tmp_path / "models--pico--cached" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "peft_svf.tuner.weights.try_to_load_from_cache",
        lambda name, file: __import__("huggingface_hub").try_to_load_from_cache(name, file, cache_dir=tmp_path),
    )
    loaded = build(dtype=BF16, name="pico/cached")
    wide = svf_layers(get_peft_model(build(), SVFConfig()))
    config = SVFConfig(basis_from="checkpoint", basis_dtype="float32")
    for name, layer in svf_layers(get_peft_model(loaded, config)).items():
        assert torch.equal(layer.svf_basis, wide[name].svf_basis)


# --- tampered files


KEY = f"base_model.model.{MODULE}.svf_offset.weight"
TAMPERED = {  # a change of the tensors, the message
    "wrong shape": (lambda t: t.update({KEY: torch.zeros(7)}), rf"for {MODULE} of shape \(7,\).*has 24 directions"),
    "NaN": (lambda t: t[KEY].fill_(float("nan")), rf"for {MODULE} of shape \(24,\).*24 entries are NaN"),
    "one infinity": (lambda t: t[KEY][3:4].fill_(float("inf")), r"which 1 entries.*Use an earlier checkpoint"),
    "1e30": (lambda t: t[KEY][3:4].fill_(1e30), rf"for {MODULE} .*which 1 entries .*beyond 1e\+30"),
    "int64": (lambda t: t.update({KEY: t[KEY].long()}), rf"{MODULE} of .* and torch.int64"),
    "float8": (lambda t: t.update({KEY: t[KEY].to(torch.float8_e5m2)}), rf"{MODULE} of .* and torch.float8_e5m2"),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(53, 24)}),
        r"holds base_model.model.model.embed_tokens.weight, which isn't a z-vector.*overwrite the base model",
    ),
    "a target's weight": (
        lambda t: t.update({f"base_model.model.{MODULE}.base_layer.weight": torch.zeros(40, 24)}),
        rf"holds base_model.model.{MODULE}.base_layer.weight",
    ),
    "a z-vector of another module": (
        lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.svf_offset.weight": torch.ones(24)}),
        r"holds .*q_proj.svf_offset.weight",
    ),
}


def truncated(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def with_fingerprint(folder, **entry):
    edit_config(folder, fingerprint=fingerprint_of(folder) | {MODULE: entry})


NOTHING = {"sha256": "0" * 64}
DAMAGED = {  # a change of the folder, the message
    **{case: (lambda f, change=change: edit_tensors(f, change), text) for case, (change, text) in TAMPERED.items()},
    **{f"cut at {keep}": (lambda f, keep=keep: truncated(f, keep), None) for keep in (0, 5, 200, -10)},
    "no probe": (lambda f: with_fingerprint(f, sha256="a"), "A fingerprint has"),
    "a probe of words": (lambda f: with_fingerprint(f, **NOTHING, probe="x"), "A fingerprint has"),
    "a probe of NaN": (lambda f: with_fingerprint(f, **NOTHING, probe="nan " * 32), "does not belong to this base"),
    "an empty probe": (lambda f: with_fingerprint(f, **NOTHING, probe=""), "does not belong to this base model"),
}


WAYS = [(case, how) for case in DAMAGED for how in HOW]


# transformers opens the file after the adapter is in place, and leaves it there if the file is cut off
@pytest.mark.parametrize("case, how", [way for way in WAYS if (way[0][:3], way[1]) != ("cut", "transformers")])
def test_a_tampered_file_is_refused(case, how, expert):
    change, message = DAMAGED[case]
    change(expert)
    refused(build(name="pico/home"), expert, message, how)


@pytest.mark.parametrize("seed, message", [(0, "NaN, infinite"), (3, "does not belong to this base model")])
def test_a_refused_file_leaves_modules_that_would_be_saved_as_they_were(seed, message, tmp_path):
    config = {"modules_to_save": ["classifier"], "trainable_token_indices": {"word_embeddings": [1, 4]}}
    make_expert(build("bert", name="pico/bert"), tmp_path, **config)
    edit_tensors(
        tmp_path, lambda tensors: next(t for key, t in tensors.items() if "svf_offset" in key).fill_(float("nan"))
    )
    refused(build("bert", seed=seed, name="pico/bert" if seed == 0 else "pico/stranger"), tmp_path, message)


def test_what_the_config_lists_is_loaded(tmp_path):
    config = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 4]}}
    make_expert(build(name="pico/home"), tmp_path, **config)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in keys if "lm_head" in key] and [key for key in keys if "embed_tokens" in key]
    PeftModel.from_pretrained(build(name="pico/home"), tmp_path)


def test_an_adapter_without_a_fingerprint_is_taken_as_it_is(expert):
    edit_config(expert, fingerprint=None)
    PeftModel.from_pretrained(build(seed=3, name="pico/stranger"), expert)


def test_missing_vectors_are_warned_about_by_name(expert):
    edit_tensors(expert, lambda tensors: tensors.pop(KEY))
    with pytest.warns(UserWarning, match=rf"missing adapter keys.*{MODULE}"):
        PeftModel.from_pretrained(build(name="pico/home"), expert)
