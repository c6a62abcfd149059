# SPDX-License-Identifier: Apache-2.0
"""Laws of the memo of content keys: it spares hashing what is known, and never believes what has changed."""

import json
import os

import pytest
import torch
from peft import get_peft_model
from pico import build, svf_layers
from transformers import AutoModelForCausalLM

from peft_svf import SVFConfig
from peft_svf.tuner import cache as basis_cache
from peft_svf.tuner.checkpoint import SAMPLES, STRIDES


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The folder of a checkpoint, and a basis cache of its own."""
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "cache"))
    build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def bases(model, **config):
    layers = svf_layers(get_peft_model(model, SVFConfig(**config)))
    return {name: (layer.svf_basis, layer.svf_fingerprint.sha256) for name, layer in layers.items()}


def same(one, other):
    return all(torch.equal(one[name][0], other[name][0]) and one[name][1] == other[name][1] for name in one)


@pytest.fixture
def hashed(monkeypatch):
    """How many weights were hashed."""
    count = []
    original = basis_cache.content_key
    monkeypatch.setattr(basis_cache, "content_key", lambda weight: count.append(1) or original(weight))
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_known_file_is_not_hashed_again(saved, hashed, dtype):
    first = bases(load(saved, dtype))
    assert len(hashed) == len(first)
    assert same(bases(load(saved, dtype)), first)
    assert len(hashed) == len(first)


def test_a_file_that_was_written_again_is_hashed_again(saved, hashed):
    first = bases(load(saved))
    build("llama", seed=1).save_pretrained(saved)
    other = bases(load(saved))
    assert len(hashed) == 2 * len(first)
    assert not any(torch.equal(first[name][0], other[name][0]) for name in first)


def test_a_touched_file_is_hashed_again(saved, hashed):
    first = bases(load(saved))
    os.utime(saved / "model.safetensors", ns=(1, 1))
    assert same(bases(load(saved)), first)
    assert len(hashed) == 2 * len(first)


def test_weights_that_were_trained_in_memory_are_hashed_and_have_their_own_basis(saved, hashed):
    first = bases(load(saved))
    model = load(saved)
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    trained = bases(model)
    assert len(hashed) == 2 * len(first)
    assert not any(trained[name][1] == first[name][1] for name in first)


def test_rows_that_were_pruned_in_memory_are_seen(saved, hashed):
    first = bases(load(saved))
    model, name = load(saved), "model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight.data[2:4] = 0
    pruned = bases(model)
    assert [n for n in first if pruned[n][1] != first[n][1]] == [name]


def test_the_sample_of_a_large_weight_reaches_every_row_and_column():
    rows, columns = 1536, 576
    seen = torch.zeros(rows * columns, dtype=torch.bool)
    seen[:: next(p for p in STRIDES if rows * columns >= SAMPLES * p)] = True
    assert seen.view(rows, columns).any(1).all() and seen.view(rows, columns).any(0).all()


def test_weights_that_are_not_the_files_are_not_remembered(saved, hashed):
    model = load(saved)
    model.model.layers[0].mlp.up_proj.weight.data[3, 1] += 1e-3  # a row that no sample looks at is still compared once
    changed = bases(model)
    plain = bases(load(saved))
    differing = [name for name in plain if plain[name][1] != changed[name][1]]
    assert differing == ["model.layers.0.mlp.up_proj"]


def test_a_base_in_another_dtype_has_its_own_entry(saved):
    wide = bases(load(saved))
    assert same(bases(load(saved, torch.bfloat16)), wide)  # of the stored weights
    memory = bases(load(saved, torch.bfloat16), basis_from="memory")
    assert not any(memory[name][1] == wide[name][1] for name in wide)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"path": 3}', "\0"], ids=str)
def test_a_damaged_memo_counts_as_none(saved, hashed, content):
    first = bases(load(saved))
    (memo,) = (basis_cache.cache_dir() / "memo").glob("*.json")
    memo.write_text(content)
    assert same(bases(load(saved)), first)
    assert len(hashed) == 2 * len(first)
    assert set(json.loads(memo.read_text())) == {"path", "size", "mtime_ns", "weights"}


def test_what_is_computed_after_pruning_is_kept_under_its_content(saved, hashed):
    first = bases(load(saved))
    basis_cache.prune()
    assert same(bases(load(saved)), first)
    assert len(hashed) == 2 * len(first)
