# SPDX-License-Identifier: Apache-2.0
"""Laws of the cache on disk: an entry is computed once per content, and a wrong, damaged or missing one costs time."""

import logging
import multiprocessing
import os
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from pico import build, logits, randomize
from safetensors.torch import load_file, save_file

from peft_svf import SVFConfig
from peft_svf.tuner import cache
from peft_svf.tuner.basis import factorize
from peft_svf.tuner.cache import cache_dir, content_key, fetch, prune, usage
from peft_svf.tuner.fingerprint import sketch

SHAPES = [(11, 7), (5, 13), (9, 9), (3, 6, 4)]


def matrix(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "bases"))
    return tmp_path / "bases"


@pytest.fixture
def computed(monkeypatch):
    """The shapes of the matrices that were decomposed."""
    shapes = []

    def counting(weight):
        shapes.extend([tuple(weight.shape[-2:])] * (weight.shape[0] if weight.dim() > 2 else 1))
        return factorize(weight)

    monkeypatch.setattr(cache, "factorize", counting)
    return shapes


@pytest.fixture
def weights():
    return {f"layer.{i}": matrix(shape, seed=i) for i, shape in enumerate(SHAPES)}


def get(weights):
    return fetch(weights, weights.__getitem__)


def entry_of(weight):
    return cache_dir() / f"{content_key(weight)}.safetensors"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_fetched_basis_is_that_of_the_weight_in_float32_and_computed_once(folder, weights, computed):
    first = get(weights)
    assert len(computed) == 6
    second = get(weights)
    assert len(computed) == 6
    for name, (basis, fingerprint) in first.items():
        expected = factorize(weights[name])
        assert basis.side == expected.side and basis.Q.dtype == basis.S.dtype == torch.float32
        torch.testing.assert_close(basis.Q.double(), expected.Q, atol=1e-7, rtol=0)
        torch.testing.assert_close(basis.S.double(), expected.S, atol=0, rtol=1e-7)
        torch.testing.assert_close(fingerprint.sketch, sketch(expected.Q), atol=1e-5, rtol=1e-6)
        again, known = second[name]
        assert torch.equal(again.Q, basis.Q) and torch.equal(again.S, basis.S) and again.side == basis.side
        assert fingerprint.sha256 == known.sha256 == content_key(weights[name])
        assert torch.equal(known.sketch, fingerprint.sketch)
    assert names_in(folder) == sorted(entry_of(weight).name for weight in weights.values())


def test_weights_of_one_content_are_one_entry_and_others_are_not(folder, computed):
    stored = matrix((11, 7), dtype=torch.bfloat16)
    get({"a": stored, "b": stored.clone(), "c": stored.float()})
    get({"d": stored.double()})  # keeps its precision
    assert len(computed) == 2
    assert get({"d": stored.double()})["d"][0].Q.dtype == torch.float64
    assert len(computed) == 2
    weight = matrix((6, 4))
    changed = weight.clone()
    changed[5, 3] = torch.nextafter(changed[5, 3], torch.tensor(9.0))
    keys = {content_key(w) for w in (weight, changed, weight.reshape(4, 6), weight.T, weight.bfloat16())}
    assert len(keys) == 5
    assert content_key(weight.T.contiguous().T) == content_key(weight)  # strides are no content


def test_models_with_the_same_weights_share_entries_and_answer_alike(folder, computed, monkeypatch):
    outputs = []
    for config in (SVFConfig(), SVFConfig(rank=3), SVFConfig()):
        model = get_peft_model(build("llama"), config)
        randomize(model)
        outputs.append(logits(model))
    assert len(computed) == 6
    assert torch.equal(outputs[0], outputs[2])  # computed and read
    monkeypatch.setattr(cache, "_look_up", lambda weight: pytest.fail("the layers have their bases"))
    model.add_adapter("second", SVFConfig())


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e25])
def test_tiny_and_huge_weights_have_entries_too(folder, computed, scale):
    for _ in range(2):
        get({"a": scale * matrix((11, 7))})
    assert len(computed) == 1


# --- entries that lie


def tensors_of(weight):
    return load_file(entry_of(weight))


def rewrite(weight, **tensors):
    save_file({name: tensor.contiguous() for name, tensor in (tensors_of(weight) | tensors).items()}, entry_of(weight))


def flip_a_bit(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def turn_two_directions(weight):
    Q = tensors_of(weight)["Q"]
    rewrite(weight, Q=torch.cat([Q[:, 1:2], Q[:, :1], Q[:, 2:]], dim=1))


def plant(weight):
    """A basis of another weight under this name: orthogonal, of the right shape."""
    other = factorize(matrix(weight.shape, seed=99))
    rewrite(weight, Q=other.Q.float(), S=other.S.float())


def replace(path, make):
    path.unlink()
    make(path)


def bind(path):
    os.chdir(path.parent)  # the path of a socket is short
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path.name)


LIES = {
    "planted": lambda w: plant(w),
    "swapped with another entry": lambda w: entry_of(w).write_bytes(entry_of(matrix(w.shape, seed=1)).read_bytes()),
    "two directions swapped": lambda w: turn_two_directions(w),
    "singular values of another weight": lambda w: rewrite(w, S=tensors_of(w)["S"] * 1.001),
    "singular values that do not descend": lambda w: rewrite(w, S=tensors_of(w)["S"].flip(0)),
    "NaN": lambda w: rewrite(w, Q=tensors_of(w)["Q"] * float("nan")),
    "another shape": lambda w: rewrite(w, Q=tensors_of(w)["Q"][:, :3], S=tensors_of(w)["S"][:3]),
    "another dtype": lambda w: rewrite(w, Q=tensors_of(w)["Q"].double()),
    "no Q": lambda w: save_file({"S": tensors_of(w)["S"]}, entry_of(w)),
    "a flipped bit of Q": lambda w: flip_a_bit(entry_of(w), -4 * 7 - 2, 5),
    "a flipped bit of the header": lambda w: flip_a_bit(entry_of(w), 12, 3),
    "truncated": lambda w: entry_of(w).write_bytes(entry_of(w).read_bytes()[:-20]),
    "too long": lambda w: entry_of(w).write_bytes(bytes(1 << 20)),
    "a FIFO": lambda w: replace(entry_of(w), os.mkfifo),
    "a socket": lambda w: replace(entry_of(w), bind),
    "a link to a device": lambda w: replace(entry_of(w), lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.skipif(os.name == "nt", reason="FIFOs and links of POSIX")
@pytest.mark.parametrize("lie", LIES)
def test_an_entry_that_lies_is_reported_and_rebuilt(folder, computed, caplog, monkeypatch, lie):
    monkeypatch.chdir(".")
    weight = matrix((11, 7))
    get({"other": matrix((11, 7), seed=1)})
    whole = get({"a": weight})["a"][0]
    LIES[lie](weight)
    with caplog.at_level(logging.WARNING):
        rebuilt = get({"a": weight})["a"][0]
    assert len(computed) == 3
    (record,) = caplog.records
    assert "is damaged" in record.getMessage() and content_key(weight) in record.getMessage()
    assert torch.equal(rebuilt.Q, whole.Q) and torch.equal(rebuilt.S, whole.S)
    get({"a": weight})
    assert len(computed) == 3


def test_a_link_is_replaced_and_what_it_names_is_left_alone(folder, tmp_path):
    weight = matrix((11, 7))
    get({"a": weight})
    outside = tmp_path / "outside"
    entry_of(weight).replace(outside)
    entry_of(weight).symlink_to(outside)
    before = outside.read_bytes()
    os.utime(outside, (1, 1))
    get({"a": weight})
    assert not entry_of(weight).is_symlink() and entry_of(weight).is_file()
    entry_of(weight).unlink()
    entry_of(weight).symlink_to(outside)
    prune()
    assert outside.read_bytes() == before and outside.stat().st_mtime == 1


# --- folders that cannot be written


@pytest.mark.parametrize("place", ["full disk", "file", ".lock"])
def test_a_folder_that_cannot_be_written_costs_only_time(place, tmp_path, monkeypatch, weights, computed, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "file" / "bases" if place == "file" else tmp_path
    monkeypatch.setenv("PEFT_SVF_CACHE", str(folder))
    if place == "full disk":
        monkeypatch.setattr(cache.files, "write", full)
    elif place == "file":
        (tmp_path / "file").write_text("no folder")
    else:
        (tmp_path / ".lock").mkdir()
    with caplog.at_level(logging.WARNING):
        assert set(get(weights)) == set(weights)
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage() and str(folder) in record.getMessage()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_cache_that_is_only_readable_is_read(folder, weights, computed, monkeypatch, caplog):
    get(weights)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.os, "utime", refuse)
    monkeypatch.setattr(cache, "_lock", refuse)
    with caplog.at_level(logging.WARNING):
        get(weights)
    assert len(computed) == 6 and not caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/full")], ids=["FIFO", "link"])
def test_a_lock_that_somebody_has_replaced_is_made_anew(folder, weights, make):
    folder.mkdir()
    make(folder / ".lock")
    get(weights)
    assert usage()[0] == len(SHAPES) and (folder / ".lock").is_file()


# --- the folder


def test_the_folder_is_the_one_of_the_environment_or_under_the_hub_cache(folder, monkeypatch):
    assert cache_dir() == folder
    monkeypatch.delenv("PEFT_SVF_CACHE")
    assert cache_dir() == Path(constants.HF_HOME) / "peft_svf"


def test_prune_deletes_what_was_used_longest_ago_and_keeps_the_rest(folder, weights, computed):
    assert fetch([], None) == {} and not folder.exists() and prune() == 0 and usage() == (0, 0)
    get(weights)
    assert usage() == (len(SHAPES), sum((folder / name).stat().st_size for name in names_in(folder)))
    for age, weight in enumerate(weights.values()):  # layer.0 was used last
        os.utime(entry_of(weight), (1e9 - age, 1e9 - age))
    get({"layer.2": weights["layer.2"]})  # now layer.2 is the freshest
    before, fresh = usage()[1], entry_of(weights["layer.2"])
    assert prune(before) == 0
    freed = prune(fresh.stat().st_size)
    assert usage() == (1, before - freed) and fresh.exists()
    assert prune() == before - freed
    assert names_in(folder) == [] and usage() == (0, 0)
    get(weights)
    assert len(computed) == 12


# --- processes


def fetch_in_a_child(barrier, results):
    """Count the decompositions of a process."""
    calls = []

    def slow(weight):
        calls.append(weight)
        time.sleep(0.1)
        return factorize(weight)

    cache.factorize = slow
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


def test_writing_to_an_entry_changes_no_basis_that_was_read(folder):
    weight = matrix((11, 7))
    get({"a": weight})
    basis = get({"a": weight})["a"][0]
    before = basis.Q.clone()
    with open(entry_of(weight), "r+b") as file:
        file.write(bytes(entry_of(weight).stat().st_size))
    assert torch.equal(basis.Q, before)


def test_a_flip_that_stays_unseen_changes_no_number_by_more_than_two_hundredths(folder):
    """The check has a random part: most flips of a thousandth are seen, too."""
    weight = matrix((11, 7))
    whole = get({"a": weight})["a"][0]
    content = entry_of(weight).read_bytes()
    for place in range(len(content) - 4 * (49 + 7), len(content), 3):
        for bit in (0, 3, 7):
            entry_of(weight).write_bytes(content)
            flip_a_bit(entry_of(weight), place, bit)
            basis = get({"a": weight})["a"][0]
            torch.testing.assert_close(basis.Q, whole.Q, rtol=0, atol=2e-2)
            torch.testing.assert_close(basis.S, whole.S, rtol=2e-2, atol=1e-3)


def test_pruning_beside_loading_crashes_neither(folder, weights):
    expected = get(weights)
    stop = threading.Event()

    def keep_pruning():
        while not stop.is_set():
            prune()

    thread = threading.Thread(target=keep_pruning)
    thread.start()
    try:
        for _ in range(25):
            assert all(torch.equal(get(weights)[name][0].Q, basis.Q) for name, (basis, _) in expected.items())
            usage()
    finally:
        stop.set()
        thread.join()
