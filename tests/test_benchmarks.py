# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, on a tiny model, and their pages say what is in the result files; nothing here is timed."""

import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))

import dense_form  # noqa: E402
import race as racing  # noqa: E402
import report  # noqa: E402

import run as speed  # noqa: E402  isort: skip


def test_a_race_gives_every_contestant_a_sample_in_every_repetition():
    calls = []
    done = racing.race(
        racing.Race("X", "X", "x"),
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        budget=1e9, most=5, sample=0,
    )  # fmt: skip
    assert {name: len(samples) for name, samples in done.samples.items()} == {"a": 5, "b": 5}
    assert calls.count("a") == calls.count("b") == 5 + 3  # and the same warm-up


def test_who_cannot_run_is_reported_and_the_others_run():
    def broken():
        raise ValueError("no such thing")

    contestants = {"a": lambda: None, "b": broken, "c": racing.NotAvailable("not written yet")}
    done = racing.race(racing.Race("X", "X", "x"), contestants, most=3)
    assert list(done.samples) == ["a"]
    assert done.not_available == {"b": "ValueError: no such thing", "c": "not written yet"}


def test_a_ratio_is_formed_within_each_repetition():
    samples = {"a": [2.0, 8.0, 3.0], "b": [1.0, 2.0, 2.0], "c": [1.0, 2.0, 1.0]}
    assert racing.ratio(samples, "a", "b") == racing.Ratio(2.0, 1.5, 4.0)
    assert racing.ratio(samples, "a", "b", "c") == racing.Ratio(1.0, 1.0, 2.0)
    assert racing.ratio(samples, "a", "missing") is None


def test_runs_of_one_second_do_not_overwrite_each_other(tmp_path):
    runs = [racing.Run(tmp_path, {"seed": i}) for i in range(3)]
    assert len({run.path for run in runs}) == 3
    assert [json.loads(run.path.read_text())["settings"]["seed"] for run in runs] == [0, 1, 2]


@pytest.mark.parametrize("lean", [False, True])
def test_the_dense_form_has_the_weight_and_the_gradient_of_the_formula(lean):
    torch.manual_seed(0)
    fc = torch.nn.Linear(11, 7, bias=False)
    weight, x, g = fc.weight.detach().clone(), torch.randn(5, 11), torch.randn(5, 7)
    dense = dense_form.DenseWeight(fc, lean)
    z = dense.z.detach()
    dense.refresh()
    torch.testing.assert_close(fc.weight.double(), oracle.rescaled(weight, z), rtol=1e-5, atol=1e-6)
    fc(x).backward(g)
    dense.project()
    by_z = oracle.dense_gradient(weight, z, g.T @ x)  # (7,)
    expected = torch.autograd.grad(dense.z, dense.p, by_z.float())[0]
    torch.testing.assert_close(dense.p.grad, expected, rtol=1e-4, atol=1e-5)
    assert fc.weight.grad is None


def result(**samples):
    settings = {"seed": 0, "threads": 1, "quick": False}
    machine = {"processor": "p", "cores": 2, "cpu_capability": "c"}
    races = [
        {"case": "B2", "key": "B2/mlp", "title": "t", "about": {}, "samples": samples, "not_available": {}},
    ]
    return {
        "benchmark": "speed", "started": "s", "command": "c", "settings": settings, "versions": {}, "seconds": 1.0,
        "machine": machine, "races": races, "facts": {},
    }  # fmt: skip


def test_the_page_says_met_and_missed_by_the_samples_alone():
    samples = {"base": [1.0, 1.0], "SVF auto": [1.2, 1.2], "LoRA r=16, as shipped": [1.3, 1.3]}
    slow = {**samples, "SVF auto": [1.4, 1.4]}
    verdicts = [report.verdicts(result(**s))[0] for s in (samples, slow)]
    assert [verdict[2:] for verdict in verdicts] == [("0.92 (0.92..0.92)", "met"), ("1.08 (1.08..1.08)", "missed")]
    assert report.verdicts(result(**samples))[2][3].startswith("not available")
    assert report.verdicts(result(**samples))[4][3] == "not run: B2/all"


def test_the_speed_benchmark_runs_on_a_tiny_model_and_leaves_a_page(tmp_path, capsys):
    path = speed.main(["--tiny", "--out", str(tmp_path)])
    content = json.loads(path.read_text())
    assert {race["case"] for race in content["races"]} == {"B1", "B2", "B3", "B4", "B5", "B6", "B7"}
    assert all(race["not_available"] == {} for race in content["races"])
    assert {key.split("/")[0] for key in content["facts"]} == {"B8", "B9", "B10"}
    assert set(content["facts"]["B8/dense_gradient_entries_on_base_weights"].values()) == {0}
    page = path.with_suffix(".md").read_text()
    targets = page.split("## Targets")[1].split("##")[0]
    assert "not available" not in targets and "not run" not in targets
    assert all((tmp_path / line[2:].split("]")[0]).exists() for line in page.splitlines() if line.startswith("!["))
    assert capsys.readouterr().out.count("not available") == 0


GPU = """
import sys
sys.path.insert(0, "benchmarks")
import gpu
{before}
path = gpu.main(["--device", "cpu", "--tiny", "--cases", "{cases}", "--out", sys.argv[1]])
{after}
"""


def gpu_run(folder, cases, before="", after=""):
    code = GPU.format(cases=cases, before=before, after=after)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = Path(folder).glob("gpu-*.json")
    return json.loads(path.read_text()), path


def test_the_gpu_benchmark_runs_its_whole_model_cases_on_a_cpu(tmp_path):
    content, path = gpu_run(tmp_path, "G5,G6")
    assert {race["case"] for race in content["races"]} == {"G5", "G6"}
    assert all(race["not_available"] == {} for race in content["races"])
    assert not [key for key in content["facts"] if key.endswith("failed")]
    assert "G5" in report.write(path).read_text()


def test_the_gpu_benchmark_runs_its_layer_cases_without_peft(tmp_path):
    before = "gpu.missing_packages = lambda: ['peft>=0.21.2,<0.22']; sys.modules['peft'] = None"
    after = "assert not {'transformers', 'trl'} & set(sys.modules)"
    content, _ = gpu_run(tmp_path, "G1,G2,G3,G4,G5", before, after)
    assert {race["case"] for race in content["races"]} == {"G1", "G2", "G4"}
    assert all(race["not_available"] == {} for race in content["races"])
    assert content["facts"]["packages that are missing"] == ["peft>=0.21.2,<0.22"]
    assert "G3/all weights, by count (derived)" in content["facts"]
