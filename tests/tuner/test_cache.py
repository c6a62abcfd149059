# SPDX-License-Identifier: Apache-2.0
"""Laws of the cache on disk: an entry is computed once per content, and a damaged or missing cache costs only time."""

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from pico import build, logits, randomize, svf_layers
from safetensors.torch import load_file

from peft_svf import SVFConfig
from peft_svf.tuner import cache as basis_cache
from peft_svf.tuner.basis import factorize
from peft_svf.tuner.cache import cache_dir, content_key, fetch, prune, usage
from peft_svf.tuner.fingerprint import Fingerprint, sketch

SHAPES = [(11, 7), (5, 13), (9, 9)]


def matrix(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of its own."""
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "bases"))
    return tmp_path / "bases"


@pytest.fixture
def computed(monkeypatch):
    """The shapes of the weights that were decomposed."""
    shapes = []

    def counting(weight):
        shapes.extend([tuple(weight.shape[-2:])] * (weight.shape[0] if weight.dim() > 2 else 1))
        return factorize(weight)

    monkeypatch.setattr(basis_cache, "factorize", counting)
    return shapes


@pytest.fixture
def weights():
    return {f"layer.{i}": matrix(shape, seed=i) for i, shape in enumerate(SHAPES)}


def get(weights):
    return fetch(weights, weights.__getitem__)


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "locks")


def test_fetch_gives_the_basis_of_each_weight_in_float32(folder, weights):
    for name, (basis, fingerprint) in get(weights).items():
        expected = factorize(weights[name])
        assert basis.side == expected.side
        assert basis.Q.dtype == basis.S.dtype == torch.float32
        torch.testing.assert_close(basis.Q.double(), expected.Q, atol=1e-7, rtol=0)
        torch.testing.assert_close(basis.S.double(), expected.S, atol=0, rtol=1e-7)
        assert fingerprint.sha256 == content_key(weights[name])
        torch.testing.assert_close(fingerprint.sketch, sketch(expected.Q), atol=1e-12, rtol=0)


def test_a_second_fetch_computes_nothing_and_gives_the_same_bits(folder, weights, computed):
    first = get(weights)
    assert len(computed) == len(SHAPES)
    second = get(weights)
    assert len(computed) == len(SHAPES)
    for name in weights:
        (a, fa), (b, fb) = first[name], second[name]
        assert torch.equal(a.Q, b.Q) and torch.equal(a.S, b.S) and a.side == b.side
        assert fa.sha256 == fb.sha256 and torch.equal(fa.sketch, fb.sketch)


def test_a_second_model_with_the_same_weights_computes_nothing(folder, computed):
    get_peft_model(build("llama"), SVFConfig())
    assert len(computed) == 6
    get_peft_model(build("llama"), SVFConfig())
    get_peft_model(build("llama"), SVFConfig(rank=3))
    assert len(computed) == 6


def test_a_second_adapter_reads_nothing_at_all(folder, monkeypatch):
    model = get_peft_model(build("llama"), SVFConfig())
    monkeypatch.setattr(basis_cache, "_read", lambda key: pytest.fail("the layers have their bases"))
    model.add_adapter("second", SVFConfig())


def test_equal_weights_under_two_names_are_computed_once(folder, computed):
    get({"a": matrix((9, 9)), "b": matrix((9, 9)), "c": matrix((9, 9), seed=1)})
    assert len(computed) == 2


def test_float64_weights_keep_float64_bases(folder, computed):
    weights = {"a": matrix((11, 7)).double()}
    assert get(weights)["a"][0].Q.dtype == torch.float64
    assert get(weights)["a"][0].Q.dtype == torch.float64
    assert len(computed) == 1


def test_fetching_nothing_touches_nothing(folder):
    assert fetch([], lambda name: pytest.fail("no weight was named")) == {}
    assert not folder.exists()


# --- the name of an entry


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_one_checkpoint_in_a_narrow_and_a_wide_dtype_is_one_entry(folder, computed, narrow):
    stored = matrix((11, 7), dtype=narrow)
    get({"a": stored})
    get({"a": stored.float()})
    assert len(computed) == 1


def test_a_rounded_copy_is_another_entry():
    weight = matrix((11, 7))
    assert content_key(weight.bfloat16()) != content_key(weight)


def test_the_name_of_an_entry_sees_every_value_and_the_shape():
    weight = matrix((6, 4))
    changed = weight.clone()
    changed[5, 3] = torch.nextafter(changed[5, 3], torch.tensor(9.0))
    keys = {content_key(w) for w in (weight, changed, weight.reshape(4, 6), weight.T)}
    assert len(keys) == 4
    assert content_key(weight.T.contiguous().T) == content_key(weight)  # strides are no content


# --- damage


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda tensors, manifest: flip_a_byte(tensors),
    "truncated tensors": lambda tensors, manifest: tensors.write_bytes(tensors.read_bytes()[:-20]),
    "empty tensors": lambda tensors, manifest: tensors.write_bytes(b""),
    "no tensors": lambda tensors, manifest: tensors.unlink(),
    "no json": lambda tensors, manifest: manifest.write_text("{"),
    "an empty manifest": lambda tensors, manifest: manifest.write_text(""),
    "a manifest without checksum": lambda tensors, manifest: manifest.write_text('{"side": "in"}'),
    "a manifest of another kind": lambda tensors, manifest: manifest.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_reported_and_computed_again(folder, computed, caplog, damage):
    weights = {"a": matrix((11, 7))}
    whole = get(weights)["a"][0]
    (manifest,) = folder.glob("*.json")
    DAMAGE[damage](manifest.with_suffix(".safetensors"), manifest)
    with caplog.at_level(logging.WARNING):
        mended = get(weights)["a"][0]
    assert len(computed) == 2
    (record,) = caplog.records
    assert "is damaged" in record.getMessage() and manifest.stem in record.getMessage()
    assert torch.equal(mended.Q, whole.Q)
    get(weights)
    assert len(computed) == 2


def test_an_entry_without_manifest_is_not_there(folder, computed, caplog):
    weights = {"a": matrix((11, 7))}
    get(weights)
    next(folder.glob("*.json")).unlink()
    with caplog.at_level(logging.WARNING):
        get(weights)
    assert len(computed) == 2
    assert not caplog.text


def test_the_manifest_is_written_last_and_holds_the_checksum(folder, monkeypatch):
    order = []
    replace = basis_cache._replace
    monkeypatch.setattr(
        basis_cache, "_replace", lambda path, content: (order.append(path.suffix), replace(path, content))
    )
    get({"a": matrix((11, 7))})
    assert order == [".safetensors", ".json"]
    manifest = json.loads(next(folder.glob("*.json")).read_text())
    assert manifest["side"] == "in" and manifest["directions"] == 7 and len(manifest["sha256"]) == 64


def test_no_temporary_file_is_left(folder, weights):
    get(weights)
    keys = {content_key(weight) for weight in weights.values()}
    assert entries(folder) == sorted(f"{key}{end}" for key in keys for end in (".json", ".safetensors"))


def test_a_failed_write_leaves_no_file_and_still_gives_the_bases(folder, weights, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(basis_cache.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        found = get(weights)
    assert set(found) == set(weights)
    assert "No space left on device" in caplog.text
    assert entries(folder) == []


def test_a_folder_that_cannot_be_made_costs_only_time(tmp_path, monkeypatch, weights, computed, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "file" / "bases"))
    with caplog.at_level(logging.WARNING):
        found = get(weights)
    assert set(found) == set(weights) and len(computed) == len(SHAPES)
    assert "cannot be written" in caplog.text and str(tmp_path / "file" / "bases") in caplog.text


def test_a_cache_that_is_only_readable_is_read(folder, weights, computed, monkeypatch, caplog):
    get(weights)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(basis_cache.os, "utime", refuse)
    with caplog.at_level(logging.WARNING):
        get(weights)
    assert len(computed) == len(SHAPES)
    assert not caplog.text


# --- the folder


def test_the_folder_is_the_one_of_the_environment(folder, weights):
    assert cache_dir() == folder
    get(weights)
    assert len(list(folder.glob("*.safetensors"))) == len(SHAPES)


def test_the_folder_is_under_the_hub_cache_by_default(monkeypatch):
    monkeypatch.delenv("PEFT_SVF_CACHE")
    assert cache_dir() == Path(constants.HF_HOME) / "peft_svf"


def test_usage_counts_entries_and_bytes(folder, weights):
    assert usage() == (0, 0)
    get(weights)
    size = sum((folder / name).stat().st_size for name in entries(folder))
    assert usage() == (len(SHAPES), size)


def test_the_size_of_the_cache_is_logged_when_it_grew(folder, weights, caplog):
    with caplog.at_level(logging.INFO):
        get(weights)
    assert f"{len(SHAPES)} entries" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        get(weights)
    assert not caplog.text


def test_prune_drops_what_was_read_longest_ago_and_keeps_the_rest(folder, weights, computed):
    get(weights)
    manifests = {name: folder / f"{content_key(weight)}.json" for name, weight in weights.items()}
    for age, name in enumerate(weights):  # layer.0 was read last
        os.utime(manifests[name], (1e9 - age, 1e9 - age))
    get({"layer.2": weights["layer.2"]})  # now layer.2 is the freshest
    before = usage()[1]
    keep = sum(manifests["layer.2"].with_suffix(end).stat().st_size for end in (".json", ".safetensors"))
    freed = prune(keep)
    assert usage() == (1, before - freed) and manifests["layer.2"].exists()
    assert prune() == before - freed
    assert entries(folder) == [] and usage() == (0, 0)
    get(weights)
    assert len(computed) == 2 * len(SHAPES)


def test_prune_of_a_cache_that_is_small_enough_or_absent_frees_nothing(folder, weights):
    assert prune() == 0
    get(weights)
    assert prune(usage()[1]) == 0


# --- processes


def fetch_in_a_child(barrier, results):
    """Runs in a process of its own: how many decompositions it took."""
    calls = []

    def slow(weight):
        calls.append(weight)
        time.sleep(0.1)
        return factorize(weight)

    basis_cache.factorize = slow
    barrier.wait(30)
    get({str(i): matrix((6 + i, 5), seed=i) for i in range(4)})
    results.put(len(calls))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a fresh import takes seconds")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 and later
def test_two_processes_at_once_compute_each_entry_once_and_a_third_reads_them(folder, computed):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=fetch_in_a_child, args=(barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    calls = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(30)
    assert sum(calls) == 4
    get({str(i): matrix((6 + i, 5), seed=i) for i in range(4)})
    assert computed == []
    assert all(name.endswith((".json", ".safetensors")) for name in entries(folder))


# --- fingerprints


def test_a_fingerprint_survives_json_with_an_error_far_below_the_thresholds():
    fingerprint = Fingerprint(content_key(matrix((11, 7))), sketch(factorize(matrix((11, 7))).Q))
    again = Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json())))
    assert again.sha256 == fingerprint.sha256
    torch.testing.assert_close(again.sketch, fingerprint.sketch, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "entry", [{}, {"sha256": "a"}, {"sha256": "a", "probe": "1 x"}, {"sha256": "a", "probe": 1}, "a", None]
)
def test_a_damaged_fingerprint_is_refused(entry):
    with pytest.raises(ValueError, match="A fingerprint has"):
        Fingerprint.from_json(entry)


def test_experts_do_not_depend_on_whether_the_basis_was_computed_or_read(folder):
    outputs = []
    for _ in range(2):
        model = get_peft_model(build("llama"), SVFConfig())
        randomize(model)
        outputs.append(logits(model))
        assert len(svf_layers(model)) == 6
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (17, 40)])
def test_numbers_of_an_entry_begin_where_those_of_a_tensor_do(folder, shape):
    """Products of operands that lie elsewhere round otherwise: a cold cache and a warm one would differ."""
    basis_cache.fetch(["fc"], lambda _: torch.randn(shape))
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
    assert len(load_file(file)["S"]) == min(shape)
