# SPDX-License-Identifier: Apache-2.0
"""Laws of experts and mixtures as values: what is loaded is what was saved, and a mixture is the paper's sum."""

import errno
import json
import math
import os
import re
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pico
import pytest
import tiny_experts
import torch
from huggingface_hub import errors
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model
from pico import edit_config, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_experts import write

from peft_svf import Expert, Mixture, SVFConfig, files
from peft_svf.experts import expert as module

WEIGHTS, CONFIG, KEY = "adapter_model.safetensors", "adapter_config.json", "routing.safetensors"
UP = "model.layers.1.mlp.up_proj"
TENSOR = f"base_model.model.{UP}.svf_offset.weight"


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: Expert.load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_load_after_save_is_exact(dtype, tmp_path):
    model = get_peft_model(tiny_experts.base(dtype=dtype), SVFConfig(description="sums"))
    z = pico.randomize(model, seed=5)
    model.save_pretrained(str(tmp_path / "math"))
    expert = Expert.load(tmp_path / "math")
    assert expert.name == "math" and expert.base_model == tiny_experts.BASE and expert.description == "sums"
    assert set(expert.offsets) == set(expert.z) == set(expert.config["fingerprint"]) == set(z)
    for name, layer in pico.svf_layers(model).items():
        assert expert.offsets[name].dtype == torch.float32
        assert torch.equal(expert.offsets[name], layer.svf_offset["default"].weight)
        assert torch.equal(expert.z[name], 1 + expert.offsets[name])


def test_the_name_is_the_last_part_of_the_path_unless_given(folders, tmp_path, monkeypatch):
    folder = folders["math"]
    assert Expert.load(f"{folder}/").name == "math"
    assert Expert.load(folder.parent, subfolder="math").name == "math"
    assert Expert.load(folder, "sums").name == "sums"
    monkeypatch.chdir(folder)
    assert Expert.load(".").name == Expert.load("../math").name == "math"


def test_a_repository_is_fetched_as_files_of_one_revision(folders, monkeypatch):
    asked = {}

    def snapshot(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(folders["math"].parent)

    monkeypatch.setattr(module, "snapshot_download", snapshot)
    expert = Expert.load("me/zoo", subfolder="math", revision="v2", token="t")
    assert expert.name == "math" and set(expert.offsets)
    patterns = [f"math/{CONFIG}", f"math/{WEIGHTS}", f"math/{KEY}"]
    short = dict(asked)
    assert Expert.load("me/zoo::math@v2", token="t").name == "math" and asked == short
    assert asked == {"repo_id": "me/zoo", "revision": "v2", "token": "t", "allow_patterns": patterns}


def edit_one(folder, change):
    """Change the tensor of one module."""
    edit_tensors(folder, lambda tensors: tensors.update({TENSOR: change(tensors[TENSOR])}))


def fingerprint_without_a_module(folder):
    saved = json.loads((folder / CONFIG).read_text())["fingerprint"]
    edit_config(folder, fingerprint={name: entry for name, entry in saved.items() if name != UP})


DAMAGES = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]), "is damaged"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "is damaged"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"<html>not found</html>" * 9), "is damaged"),
    "no tensors": (lambda f: save_file({}, f / WEIGHTS), "holds no offsets"),
    "config no JSON": (lambda f: (f / CONFIG).write_text("{"), "isn't valid JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "holds no SVF expert"),
    "another type": (lambda f: edit_config(f, peft_type="LOHA"), "PEFT type LOHA"),
    "NaN": (lambda f: edit_one(f, lambda t: t * math.nan), f"{UP}.*finite"),
    "infinity": (lambda f: edit_one(f, lambda t: t / 0), "finite"),
    "beyond all reason": (lambda f: edit_one(f, lambda t: t + 1e30), "up to 10000"),
    "whole numbers": (lambda f: edit_one(f, lambda t: t.long()), "dtype torch.int64"),
    "float8": (lambda f: edit_one(f, lambda t: t.to(torch.float8_e5m2)), "dtype torch.float8"),
    "a matrix": (lambda f: edit_one(f, lambda t: t.view(2, -1)), "isn't a vector"),
    "a rank of text": (lambda f: edit_config(f, rank="7"), "rank"),
    "provenance nested deeply": (
        lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS, {"provenance": "[" * 10**5}), "recursion",
    ),
    "weights lack a module": (lambda f: edit_tensors(f, lambda t: t.pop(TENSOR)), f"first {UP}"),
    "config lacks a module": (fingerprint_without_a_module, f"first {UP}"),
    "fingerprint a number": (lambda f: edit_config(f, fingerprint=5), "must be a dict"),
    "another tensor": (lambda f: edit_tensors(f, lambda t: t.update(lm_head=torch.ones(2))), "more than z-vec"),
}  # fmt: skip


def test_damaged_files_are_refused_with_expert_and_folder(tmp_path):
    whole = write(tmp_path, "whole", target_modules=["up_proj"])
    for name, (harm, message) in DAMAGES.items():
        folder = shutil.copytree(whole, tmp_path / name)
        harm(folder)
        with pytest.raises(ValueError, match=f"Expert '{name}' in {re.escape(str(folder))}.*{message}"):
            Expert.load(folder)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named_and_a_pipe_is_not_waited_for(file, tmp_path):
    folder = write(tmp_path, "math", target_modules=["up_proj"])
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder / file))):
        Expert.load(folder)
    os.mkfifo(folder / file)
    with pytest.raises(ValueError, match=rf"{file} isn't a regular file"):
        Expert.load(folder)


def test_files_are_opened_once_and_those_of_a_lazy_expert_again_for_its_values(folders, loaded, monkeypatch):
    reads, read = [], files.read_bytes
    monkeypatch.setattr(files, "read_bytes", lambda path, *limit: reads.append(path.name) or read(path, *limit))
    assert Expert.load(folders["math"]) == loaded["math"] and reads == [CONFIG, WEIGHTS, KEY]
    expert = Expert.load(folders["math"], lazy=True)
    assert expert.sizes == loaded["math"].sizes and set(expert.offsets) == set(expert.sizes) and len(reads) == 6
    assert expert == loaded["math"] and expert.z.keys() == loaded["math"].z.keys() and reads[6:] == [WEIGHTS]


@pytest.mark.parametrize("breaks", [1, 2])
def test_a_save_that_fails_leaves_the_old_expert(breaks, loaded, tmp_path, monkeypatch):
    loaded["math"].save(tmp_path)
    write_file, calls = files.write, []

    def full(path, content):
        calls.append(path)
        if len(calls) == breaks:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_file(path, content)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space"):
        loaded["code"].save(tmp_path)
    assert Expert.load(tmp_path) == loaded["math"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_adapters_that_are_more_than_z_are_refused(tmp_path):
    get_peft_model(tiny_experts.base(), LoraConfig(target_modules=["up_proj"])).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match=r"'lora'.*PEFT type LORA; `peft-svf import`"):
        Expert.load(tmp_path / "lora")
    folder = write(tmp_path, "head", target_modules=["up_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"'head'.*more than z-vectors.*PeftModel.from_pretrained"):
        Expert.load(folder)


def response(status):
    return HfHubHTTPError("broken", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize("error", [response(503), ConnectionResetError()], ids=["503", "reset"])
def test_a_download_that_breaks_once_is_tried_again(error, folders, monkeypatch):
    answers = iter([error, str(folders["math"])])

    def snapshot(repo_id, **options):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module, "snapshot_download", snapshot)
    monkeypatch.setattr(module, "WAITS", (0,))
    assert Expert.load("me/math").name == "math"


OFFLINE = errors.LocalEntryNotFoundError("")
OFFLINE.__cause__ = errors.OfflineModeIsEnabled()  # a ConnectionError, but none that passes
MISSING = {
    "private or gated, run `hf auth login`": errors.RepositoryNotFoundError("", response=Mock()),
    "no revision 'v9'": errors.RevisionNotFoundError("", response=Mock()),
    "isn't in the cache": errors.LocalEntryNotFoundError(""),
    "HF_HUB_OFFLINE is set": OFFLINE,
}


@pytest.mark.parametrize("message", MISSING)
def test_a_repository_that_is_missing_is_not_tried_again_and_the_way_out_is_named(message, monkeypatch):
    snapshot = Mock(side_effect=MISSING[message])
    monkeypatch.setattr(module, "snapshot_download", snapshot)
    with pytest.raises(FileNotFoundError, match=rf"me/nothing.*{message}"):
        Expert.load("me/nothing@v9")
    assert snapshot.call_count == 1


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/where", "~/where", "a/b/c"])
def test_a_path_that_leads_nowhere_is_named(source):
    with pytest.raises(FileNotFoundError, match=source):
        Expert.load(source)


def test_an_expert_made_by_hand_is_checked_too():
    for offset in (torch.tensor([0.0, math.nan]), torch.tensor([math.inf]), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"'mine'.*layers\.0"):
            Expert("mine", {"layers.0": offset})


def test_settings_of_a_newer_version_cause_a_warning_as_in_peft(tmp_path):
    folder = write(tmp_path, "math", target_modules=["up_proj"])
    edit_config(folder, twist=3)
    for load in (Expert.load, SVFConfig.from_pretrained):
        with pytest.warns(UserWarning, match="twist"):
            load(folder)


@pytest.mark.parametrize("a, b", [(0.7, 0.3), (0.5, 0.2), (1.5, -0.75)])
def test_a_sum_of_experts_is_the_papers_formula_and_the_base_has_what_is_left(a, b, loaded):
    both = a * loaded["math"] + loaded["code"] * b
    for name, z in both.z.items():
        paper = a * loaded["math"].z[name].double() + b * loaded["code"].z[name].double() + (1 - a - b)
        torch.testing.assert_close(z.double(), paper, atol=1e-6, rtol=0)
    mixed = Mixture({"math": a, "code": b}).offsets(loaded)
    assert all(torch.equal(both.offsets[name], offset) for name, offset in mixed.items())


def test_the_algebra_of_experts(loaded):
    math_, code = loaded["math"], loaded["code"]
    assert 1.0 * math_ == math_ and math_ + code == code + math_ and math_ - code == math_ + -code
    assert 0.5 * math_ + 0.5 * math_ == math_ and math_ != code and math_ != "math"
    assert all((z == 1).all() for z in (math_ - math_).z.values())
    assert (0.7 * math_ + 0.3 * code).name == "0.7 * math + 0.3 * code" and (math_ - code).name == "math - 1 * code"
    assert (2 * (0.5 * math_ + code)).provenance["sum"] == {"math": 1.0, "code": 2.0}


def test_a_sum_is_an_expert_that_peft_loads(loaded, tmp_path):
    both = 0.7 * loaded["math"] + 0.3 * loaded["code"]
    both.save(tmp_path)
    assert Expert.load(tmp_path) == both
    model = tiny_experts.alone(tmp_path)
    for name, layer in pico.svf_layers(model).items():
        assert torch.equal(layer.svf_offset["default"].weight, both.offsets[name])


def test_experts_that_do_not_add_up_are_refused(loaded, tmp_path):
    other = Expert.load(write(tmp_path, "foreign", seed=4, of=tiny_experts.base(seed=9, name="another-base")))
    with pytest.raises(ValueError, match=r"'math' does not belong.*another-base"):
        loaded["math"] + other
    low = Expert.load(write(tmp_path, "low", rank=5, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'math' and 'low' have the ranks None and 5.*ExpertLibrary"):
        loaded["math"] + low
    for weight in (math.nan, 1e300):
        with pytest.raises(ValueError, match="weight of 'math' must be a finite number"):
            weight * loaded["math"]
    with pytest.raises(TypeError):
        loaded["math"] + 1


def test_a_one_hot_mixture_is_that_expert_to_the_bit(loaded):
    mixed = Mixture({"math": 1.0}).offsets(loaded)
    assert set(mixed) == set(loaded["math"].offsets)
    assert all(torch.equal(mixed[name], offset) for name, offset in loaded["math"].offsets.items())
    assert all(mixed[name] is not offset for name, offset in loaded["math"].offsets.items())


def test_a_mixture_without_weights_and_the_weight_of_other_are_the_base(loaded):
    for alpha in ({}, {"math": 0.0}, {"math": 0, "code": 0.0}, {"other": 1.0}):
        mixture = Mixture(alpha)
        assert mixture.alpha == {} and mixture.choice == "other" and mixture.offsets(loaded) == {}
    assert Mixture({"math": 0.5, "other": 0.5}) == Mixture({"math": 0.5})


def test_experts_of_different_ranks_and_modules_mix():
    short = Expert("short", {"a": torch.tensor([1.0, 2.0])})
    long = Expert("long", {"a": torch.tensor([4.0, 8.0, 16.0]), "b": torch.tensor([3.0])})
    for names in (("short", "long"), ("long", "short")):
        mixed = Mixture(dict.fromkeys(names, 0.5)).offsets({"short": short, "long": long})
        assert mixed["a"].tolist() == [2.5, 5.0, 8.0] and mixed["b"].tolist() == [1.5]


def test_weights_that_are_no_finite_numbers_are_refused():
    for weight in (math.nan, math.inf, -1e300, "1", None, torch.tensor(1.0), 1j):
        with pytest.raises(ValueError, match="'math' must be a finite number"):
            Mixture({"math": weight})


def test_weights_of_numpy_are_numbers(tmp_path):
    mixture = Mixture({"math": np.float32(0.5), "code": np.float64(0.25), "kinds": np.int64(1)})
    assert mixture.alpha == {"math": 0.5, "code": 0.25, "kinds": 1.0}
    mixture.save(tmp_path / "m.json")


def test_the_choice_has_the_largest_share():
    choices = [({"math": 0.6, "code": 0.4}, "math"), ({"math": 0.3}, "other"), ({"math": -1.0}, "other")]
    for alpha, choice in [*choices, ({"math": 0.5}, "math")]:
        assert Mixture(alpha).choice == choice


def test_a_record_has_the_fields_of_a_decision():
    record = Mixture({"math": 1.0}, "prompt", 0.4, {"math": 0.7, "code": 0.2, "other": 0.1}).record()
    assert list(record) == ["choice", "confidence", "probabilities", "alpha"]
    assert record["choice"] == "math" and record["confidence"] == 0.4 and record["alpha"] == {"math": 1.0}
    assert sum(record["probabilities"].values()) == pytest.approx(1)
    explicit = Mixture({"math": 1.0}).record()
    assert explicit["confidence"] == 1.0 and explicit["probabilities"] == {"math": 1.0}
    json.dumps([record, explicit])


def test_a_mixture_survives_saving_and_one_that_cannot_be_written_leaves_it(tmp_path):
    mixture = Mixture({"math": 1 / 3, "code": -0.1}, "few-shot", 0.5, {"math": 0.9}, {"seed": 3, "score": [0.5]})
    path = tmp_path / "new" / "mixture.json"
    mixture.save(path)
    with pytest.raises(TypeError):
        Mixture({"code": 1.0}, provenance={"task": object()}).save(path)
    assert Mixture.load(path) == mixture and [file.name for file in path.parent.iterdir()] == ["mixture.json"]


def test_a_file_without_a_mixture_is_named(tmp_path):
    path = tmp_path / "mixture.json"
    alphas = ["[1]", '{"math": NaN}', '"math"']
    for text in ["", "{", "[]", "5", "{}", '{"weights": {}}', *(f'{{"alpha": {alpha}}}' for alpha in alphas)]:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mixture\.json (holds no mixture|isn't valid JSON)"):
            Mixture.load(path)
