# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run on a tiny model, compare what they claim to compare, and their pages hold the files' numbers."""

import gzip
import json
import math
import random
import statistics
import sys
from types import SimpleNamespace

import oracle
import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer
from trainers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import dense_form
import gpu
import harness
import learning
import report
import speed
from learning import Training

from peft_svf.tasks import get_task

SMALL = {"lr": 0.01, "steps": 2, "questions": 2, "samples": 4, "eval_steps": 1, "test_rows": 4}
LEARNERS = [("reinforce", "svf-mlp"), ("sft", "svf-mlp"), ("sft", "lora16-mlp"), ("evolution", "svf_rank16-mlp")]


def test_every_contestant_that_can_run_has_a_sample_of_every_repetition():
    calls = []
    contestants = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    contestants |= {"broken": lambda: 1 / 0, "missing": harness.NotAvailable("not written yet")}
    done = harness.race(harness.Race("X", "X", "x"), contestants, budget=1e9, most=5, sample=0)
    assert {name: len(samples) for name, samples in done.samples.items()} == {"a": 5, "b": 5}
    assert calls.count("a") == calls.count("b") == 5 + 3  # and the same warm-up
    assert done.not_available == {"broken": "ZeroDivisionError: division by zero", "missing": "not written yet"}


def test_a_ratio_is_formed_within_each_repetition():
    samples = {"a": [2.0, 8.0, 3.0], "b": [1.0, 2.0, 2.0], "c": [1.0, 2.0, 1.0]}
    assert harness.ratio(samples, "a", "b") == harness.Ratio(2.0, 1.5, 4.0)
    assert harness.ratio(samples, "a", "b", "c") == harness.Ratio(1.0, 1.0, 2.0)
    assert harness.ratio(samples, "a", "missing") is None


def test_runs_of_one_second_do_not_overwrite_each_other(tmp_path):
    runs = [harness.Run(tmp_path, {"seed": i}) for i in range(3)]
    assert [json.loads(run.path.read_text())["settings"]["seed"] for run in runs] == [0, 1, 2]


def test_a_cell_runs_once_and_one_that_raises_stops_no_other(tmp_path):
    calls = []
    cells = [
        harness.Cell(name, lambda name=name: calls.append(name) or {"value": 1 / len(name)}) for name in ("", "b")
    ]
    assert harness.run_cells(cells, tmp_path) == [""] and harness.run_cells(cells[1:], tmp_path) == []
    assert calls == ["", "b"]
    result = harness.result_of(tmp_path, "b")
    assert result["value"] == 1 and result["command"] and result["versions"]["torch"] and result["machine"]["cores"]


def test_the_dense_form_has_the_weight_and_the_gradient_of_the_formula():
    torch.manual_seed(0)
    fc = torch.nn.Linear(11, 7, bias=False)
    weight, x, g = fc.weight.detach().clone(), torch.randn(5, 11), torch.randn(5, 7)
    dense = dense_form.DenseWeight(fc)
    z = dense.z.detach()
    dense.refresh()
    torch.testing.assert_close(fc.weight.double(), oracle.rescaled(weight, z), rtol=1e-5, atol=1e-6)
    fc(x).backward(g)
    dense.project()
    by_z = oracle.dense_gradient(weight, z, g.T @ x)  # (7,)
    expected = torch.autograd.grad(dense.z, dense.p, by_z.float())[0]
    torch.testing.assert_close(dense.p.grad, expected, rtol=1e-4, atol=1e-5)
    assert fc.weight.grad is None


@pytest.mark.parametrize("benchmark", [speed, gpu], ids=["on this machine", "as on cuda"])
def test_the_speed_benchmark_runs_on_a_tiny_model_and_leaves_a_page(benchmark, tmp_path):
    cases = [] if benchmark is speed else ["--device", "cpu", "--cases", "B7,B8"]
    path = benchmark.main(["--tiny", "--out", str(tmp_path), *cases])
    content, page = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    if benchmark is speed:
        assert {race["case"] for race in content["races"]} == {"B2", "B4", "B6", "B7"}
        assert all((tmp_path / line.split("](")[1][:-1]).exists() for line in page.splitlines() if line[:2] == "![")
    assert all(race["not_available"] == {} for race in content["races"])
    assert set(content["facts"]["B8/z_of_ones_equals_base"].values()) == {True}
    for race in content["races"]:
        assert race["title"] in page and str(harness.ratio(race["samples"], *list(race["samples"])[1::-1])) in page


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of a small cell for each learner on a tiny model and 24 questions, and each trainer's questions."""
    folder = tmp_path_factory.mktemp("learning")
    data = folder / "data" / "arc_easy"
    data.mkdir(parents=True)
    with gzip.open(ROOT / "examples" / "data" / "arc_easy" / "validation.jsonl.gz", "rt") as file:
        lines = [line for line in file.read().split("\n") if line][:24]
    for split, part in (("train", lines[:12]), ("validation", lines[12:18]), ("test", lines[18:])):
        with gzip.open(data / f"{split}.jsonl.gz", "wt") as file:
            file.write("\n".join(part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_SVF_DATA", str(data.parent))
        patch.chdir(folder)
        trainings = [Training("arc_easy", "base", test_rows=4)]
        trainings += [Training("arc_easy", method, learner=learner, **SMALL) for learner, method in LEARNERS]
        found = {t.name: learning.measure(t, lambda: (tiny_model(), tiny_tokenizer())) for t in trainings}
        asked = {learner: _asked(learner) for learner in ("reinforce", "sft", "evolution")}
    return trainings, found, asked


def _asked(learner):
    """The questions of two epochs as the trainer's loader gives them, each once; for "sft" as they are read."""
    cell = Training("arc_easy", "svf-mlp", learner=learner, **{**SMALL, "steps": 12})
    trainer = learning.trainer_of(cell, tiny_model(), tiny_tokenizer(), get_task("arc_easy"), "asked")
    sampler = trainer._get_train_sampler(trainer.train_dataset)
    places = [place for _ in range(2) for place in sampler][:: cell.samples if learner == "reinforce" else 1]
    rows = [trainer.train_dataset[place] for place in places][: cell.steps * cell.questions]
    if learner == "sft":
        return [tiny_tokenizer().decode(row["input_ids"]) for row in rows]
    return [row["prompt"][0]["content"] for row in rows]


def test_all_learners_read_the_same_questions_in_the_same_order(results):
    _, _, asked = results
    assert len(set(asked["reinforce"])) == 12 and asked["reinforce"][:12] != asked["reinforce"][12:]
    assert asked["evolution"] == asked["reinforce"]
    assert all(question in text for question, text in zip(asked["reinforce"], asked["sft"], strict=True))


def test_every_learner_leaves_a_whole_result(results):
    trainings, found, _ = results
    rows = [row for row, _ in found["arc_easy-base"]["test"]["records"]]
    for training in trainings[1:]:
        result = found[training.name]
        assert [row for row, _ in result["test"]["records"]] == rows
        checks = [entry for entry in result["curve"] if "eval_reward" in entry]
        assert [entry["step"] for entry in checks] == [1, 2]
        assert result["best_validation"] == max(entry["eval_reward"] for entry in checks)
        assert result["answers"] == 2 * 2 * (1 if training.learner == "sft" else 4)
        assert result["trainable"] > 0 and len(result["source"]) == 12


def test_next_token_loss_is_on_the_right_answer_alone():
    row = {"prompt": [{"role": "user", "content": "ab?"}], "choices": ["no", "yes"], "label": 1}
    cell = Training("own", "svf-mlp", learner="sft", **{**SMALL, "steps": 1, "questions": 1})
    task = SimpleNamespace(rows=lambda *args, **kwargs: [row], reward=lambda completions, **columns: [0.0])
    trainer = learning.trainer_of(cell, tiny_model(), tiny_tokenizer(), task, "unused")
    (batch,) = trainer.get_train_dataloader()
    learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert tiny_tokenizer().decode(learned) == "yes<end>"


def test_the_cells_of_the_benchmark_have_different_names_and_methods_that_exist():
    trainings = learning.read_trainings()
    assert len({training.name for training in trainings}) == len(trainings)
    assert all(learning.adapter(t.method) and report.label(t) for t in trainings if t.method != "base")


def result(right, validation=0.0):
    records = [[str(i), value] for i, value in enumerate(right)]
    test = {"n": len(right), "accuracy": statistics.mean(right), "interval": [0.0, 1.0], "records": records}
    curve = [{"step": 10, "eval_reward": validation}]
    return {"trainable": 100, "best_step": 10, "best_validation": validation, "curve": curve, "test": test}


def test_the_interval_of_one_seed_is_that_of_the_rows_and_several_seeds_widen_it():
    gaps = [1.0, 0.0, -1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    mean, half = report.mean_and_half([gaps])
    assert mean == pytest.approx(statistics.mean(gaps))
    assert half == pytest.approx(1.959964 * statistics.pstdev(gaps) / math.sqrt(8))
    assert report.mean_and_half([gaps, gaps, gaps])[1] == pytest.approx(half)  # seeds that agree add nothing
    mean, half = report.mean_and_half([[0.1] * 8, [0.2] * 8, [0.6] * 8])  # rows that agree leave the seeds' spread
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.303 * statistics.stdev([0.1, 0.2, 0.6]) / math.sqrt(3), rel=1e-3)


def test_the_interval_over_seeds_covers_the_truth():
    draw, missed = random.Random(0), 0
    for _ in range(400):
        rows, seeds = [draw.gauss(0.1, 0.5) for _ in range(60)], [draw.gauss(0, 0.05) for _ in range(3)]
        mean, half = report.mean_and_half([[row + seed + draw.gauss(0, 0.5) for row in rows] for seed in seeds])
        missed += abs(mean - 0.1) > half
    assert missed <= 0.05 * 400


def test_validation_chooses_the_setting_on_the_seeds_that_all_have_run():
    runs = [(0.01, 0, 0.2), (0.02, 0, 0.3), (0.02, 1, -0.9), (0.04, 0, 0.3)]
    trainings = [Training("arc_easy", "svf-mlp", lr, seed) for lr, seed, _ in runs]
    found = {t.name: result([1, 1], validation) for t, (_, _, validation) in zip(trainings, runs, strict=True)}
    assert report.chosen_setting(trainings, found) == (0.02, 1.0)  # of equals the one with more seeds


def test_gains_are_paired_by_row_and_other_rows_are_refused():
    assert report.gain([(result([1] * 30 + [0] * 10), result([1] * 15 + [0] * 25))]).startswith("+0.375 [+0.225")
    with pytest.raises(SystemExit, match="different rows"):
        report.gain([(result([1] * 39), result([1] * 40))])


def test_a_choice_table_has_the_numbers_of_the_files_and_lists_what_is_missing():
    base, svf, lora = (
        Training("arc_easy", method, lr) for method, lr in (("base", 0), ("svf-mlp", 0.01), ("lora16-mlp", 0.01))
    )
    found = {base.name: result([0, 1]), svf.name: result([1, 1], 0.5)}
    tables = report.choice_tables([base, svf, lora], found)
    assert "| arc_easy | SVF, MLP | 100 | 0.01 | 1 | 0.500 | 1.000 | +0.500 [" in tables["choices"]
    assert "LoRA" not in tables["choices"].partition("---")[2] and f"`{lora.name}`" in tables["missing"]


def generated_cell(task, method, right, seed=0, asked="Is it?"):
    training = {"task": task, "method": method, "lr": 0.01, "seed": seed, "steps": 1, "questions": 1, "samples": 1}
    texts = [[asked, "yes", "no"]]
    test = {**result(right)["test"], "mentions": 0.5, "texts": texts}
    about = {"cell": f"{task}-{method}", "training": training, "trainable": 9}
    return {**about, "test": test, "everyday": {"mean_logp": -1.0}}


def test_new_cells_are_taken_in_and_seeds_decide_what_is_called_better():
    once, thrice = [1] * 30 + [0] * 10, [1] * 31 + [0] * 9
    cells = {"new-base": generated_cell("new", "base", [0] * 40), "new-a": generated_cell("new", "svf-b", once)}
    page = report.generated_tables(cells)
    assert "| new | rewards | svf-b, lr 0.01, 1 × 1 × 1 | 9 | 0.000 (0.500) | 0.750 (0.500) |" in page["generated"]
    assert page["verdicts"] == "- SVF over the base better, one seed: new"
    cells |= {f"new-{seed}": generated_cell("new", "svf-b", thrice, seed) for seed in (1, 2)}
    cells["new-lora"] = generated_cell("new", "lora16-b", [1] * 40)
    assert report.generated_tables(cells)["verdicts"].splitlines() == [
        "- SVF over LoRA worse, one seed: new",
        "- SVF over the base better: new",
    ]


def test_a_cell_of_other_test_requests_is_left_out_and_named():
    cells = {"new-base": generated_cell("new", "base", [0] * 40)}
    cells["new-a"] = generated_cell("new", "svf-b", [1] * 40, asked="Is it so?")
    assert report.comparable(cells) == [] and report.comparable(cells, really=False) == [cells["new-a"]]


def test_the_page_is_what_the_files_say():
    assert (ROOT / "docs" / "results.md").read_text() == report.results_page(), "run make results"


@pytest.mark.slow
def test_a_tiny_server_is_measured(tmp_path):
    import serving

    short = ["--tiny", "--threads", "1", "--minutes", "0.2", "--leaving", "20"]
    assert serving.main([*short, "--out", str(tmp_path)]) == []
    ratios = json.loads((tmp_path / "throughput.json").read_text())["ratio"]
    assert all(set(ratio) == {"one after another", "base"} for ratio in ratios.values())
    counts = json.loads((tmp_path / "soak.json").read_text())["counts"]
    assert counts["wrong answers"] == 0 < counts["answers"] and counts["left"] >= 20
