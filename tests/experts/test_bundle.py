# SPDX-License-Identifier: Apache-2.0
"""A model of two passes comes back from its folder with all that answers depend on, and no more than that is in it."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny_experts
import torch
from command_line import run
from huggingface_hub.errors import HfHubHTTPError
from tiny_experts import GREEDY, ids
from tiny_model import tiny_tokenizer
from transformers import pipeline

from peft_svf import Expert, Mixture, Transformer2Model
from peft_svf.adaptation import FirstPass, fit_calibration, fit_probe
from peft_svf.experts import expert as expert_module
from peft_svf.experts import make_key
from peft_svf.experts.bundle import find_bundle

TEXTS = ["3 + 4 =", "print(x)"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_experts.base(name="").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    seeds = tiny_experts.SEEDS.items()
    paths = {name: tiny_experts.write(folder, name, seed, tiny_experts.base(name=str(base))) for name, seed in seeds}
    classifier = paths.pop("kinds")
    reads = {"math": ["1 + 1", "8 * 9 = ?", "27 / 3"], "code": ["print(1)", "def f(x): return x", "import os"]}
    keys = {name: make_key(tiny_experts.base(), tiny_tokenizer(), texts) for name, texts in reads.items()}
    experts = {name: replace(Expert.load(path), key=keys[name]) for name, path in paths.items()}
    experts["odd/../name"] = experts["math"]
    model = Transformer2Model.from_pretrained(None, experts, classifier=classifier)
    shouts = make_key(tiny_experts.base(), tiny_tokenizer(), ["HELP ME", "STOP", "GO AWAY"])
    model.library.add_mixture("both", Mixture({"math": 0.7, "code": 0.3}), shouts)
    return model


def same(one, other):
    assert one.library.names == other.library.names and one.library.mixtures == other.library.mixtures
    assert [m.record() for m in one.first_pass(TEXTS)] == [m.record() for m in other.first_pass(TEXTS)]
    for mixture in ("both", "odd/../name", {"code": 0.4}):
        answers = [m.generate(**ids(*TEXTS[:1]), mixture=mixture, **GREEDY) for m in (one, other)]
        assert torch.equal(*answers)


@pytest.mark.parametrize("strategy", ["key", "classifier", "probe", "calibrated"])
def test_save_then_load_is_the_same_model(strategy, model, tmp_path):
    data = (model.library, model.tokenizer, TEXTS * 3, ["math", "code"] * 3)
    settings = {
        "key": lambda: FirstPass("key"),
        "classifier": lambda: FirstPass("classifier", threshold=0.1, temperature=2.0, fallback="mix"),
        "probe": lambda: FirstPass("probe", probe=fit_probe(*data)),
        "calibrated": lambda: FirstPass(calibration=fit_calibration(*data, FirstPass())),
    }
    model.default_first_pass = settings[strategy]()
    model.save_pretrained(tmp_path / "bundle")
    loaded = Transformer2Model.from_pretrained(str(tmp_path / "bundle"))
    same(loaded, model)
    piped = pipeline("transformer2", model=str(tmp_path / "bundle"))
    same(piped.model, model)
    piped.save_pretrained(tmp_path / "again")
    same(Transformer2Model.from_pretrained(tmp_path / "again"), model)
    assert not list(tmp_path.rglob("model*.safetensors"))
    assert {p.parent for p in tmp_path.rglob("adapter_model.safetensors")} == {
        tmp_path / place / part
        for place in ("bundle", "again")
        for part in ("experts/math", "experts/code", "experts/expert 2", "classifier")
    }


def test_command_line_takes_a_bundle_for_its_experts(model, tmp_path, capsys):
    model.default_first_pass = FirstPass(threshold=0.3)
    model.save_pretrained(tmp_path / "bundle")
    code, out, error = run(capsys, "dispatch", *TEXTS, "--experts", tmp_path / "bundle")
    chosen = [mixture.choice for mixture in model.first_pass(TEXTS)]
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == chosen, error


def test_places_outside_of_a_bundle_are_no_folders_of_it(model, tmp_path):
    model.save_pretrained(tmp_path / "bundle")
    listed = tmp_path / "bundle" / "transformer2_config.json"
    content = json.loads(listed.read_text())
    content["experts"]["math"] = "../../nowhere"
    listed.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"'\.\./\.\./nowhere' is neither"):
        Transformer2Model.from_pretrained(str(tmp_path / "bundle"))
    del content["experts"]
    listed.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        Transformer2Model.from_pretrained(str(tmp_path / "bundle"))


def test_bundle_whose_base_is_a_folder_is_not_pushed(model):
    with pytest.raises(ValueError, match='base_model="org/name"'):
        model.push_to_hub("me/it")


def test_a_bundle_whose_first_download_breaks_is_asked_for_again(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    busy = HfHubHTTPError("busy", response=SimpleNamespace(status_code=503, headers={}, request=None))
    snapshot = Mock(side_effect=[busy, str(tmp_path), ConnectionResetError(), str(tmp_path)])
    monkeypatch.setattr(expert_module, "snapshot_download", snapshot)
    monkeypatch.setattr(expert_module, "WAITS", (0,))
    assert find_bundle("me/bundle", "v2") == tmp_path
    assert [call.kwargs["revision"] for call in snapshot.call_args_list] == ["v2", "v2", *[tmp_path.name] * 2]
