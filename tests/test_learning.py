# SPDX-License-Identifier: Apache-2.0
"""Laws of the learning benchmark: equal questions, one count of tokens, rates by validation, honest intervals."""

import gzip
import importlib.util
import json
import math
import random
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer
from trainers import ROOT

FOLDER = ROOT / "benchmarks" / "learning"
sys.path.insert(0, str(FOLDER))

import cells  # noqa: E402
import learners  # noqa: E402
from cells import Cell  # noqa: E402

from peft_svf.tasks import get_task  # noqa: E402


def module(name):
    """`run` and `report`, whose names other benchmarks have, too."""
    spec = importlib.util.spec_from_file_location(f"learning_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


run, report = module("run"), module("report")

SMALL = {"lr": 0.01, "steps": 2, "questions": 2, "samples": 4, "eval_steps": 1, "test_rows": 4}
LEARNERS = [("reinforce", "svf-mlp"), ("sft", "svf-mlp"), ("sft", "lora16-mlp"), ("evolution", "svf_rank16-mlp")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of one small cell for each learner, on a tiny model and 24 questions; and what each was asked."""
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
        todo = [Cell("arc_easy", "base", test_rows=4)]
        todo += [Cell("arc_easy", method, learner=learner, **SMALL) for learner, method in LEARNERS]
        for cell in todo:
            run.run(cell, lambda: (tiny_model(), tiny_tokenizer()), folder / "results")
        asked = {learner: _asked(learner) for learner in ("reinforce", "sft", "evolution")}
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}
    return todo, found, asked


def _asked(learner):
    """The questions of two epochs as the trainer's loader gives them, each once; for "sft" as they are read."""
    cell = Cell("arc_easy", "svf-mlp", learner=learner, **{**SMALL, "steps": 12})
    trainer = learners.train(cell, tiny_model(), tiny_tokenizer(), get_task("arc_easy"), "asked")
    sampler = trainer._get_train_sampler(trainer.train_dataset)
    places = [place for _ in range(2) for place in sampler][:: cell.samples if learner == "reinforce" else 1]
    rows = [trainer.train_dataset[place] for place in places][: cell.steps * cell.questions]
    if learner == "sft":
        return [tiny_tokenizer().decode(row["input_ids"]) for row in rows]
    return [row["prompt"][0]["content"] for row in rows]


def test_all_learners_are_asked_the_same_questions_in_the_same_order(results):
    _, _, asked = results
    assert len(set(asked["reinforce"])) == 12 and asked["reinforce"][:12] != asked["reinforce"][12:]
    assert asked["evolution"] == asked["reinforce"]
    assert all(question in text for question, text in zip(asked["reinforce"], asked["sft"], strict=True))


def test_every_learner_leaves_a_whole_result(results):
    todo, found, _ = results
    assert sorted(found) == sorted(cell.name for cell in todo)
    for cell in todo[1:]:
        result = found[cell.name]
        assert [row for row, _ in result["test"]["records"]] == [
            row for row, _ in found["arc_easy-base"]["test"]["records"]
        ]
        checks = report.validations(result)
        assert [entry["step"] for entry in checks] == [1, 2]
        assert result["best_validation"] == max(entry["eval_reward"] for entry in checks)
        assert result["answers"] == 2 * 2 * (1 if cell.learner == "sft" else 4)
        assert result["trainable"] > 0 and len(result["source"]) == 12


def test_next_token_loss_is_on_the_right_answer_alone(results):
    """The labels of a row are the tokens of its right choice and of the end of the turn."""
    row = {"prompt": [{"role": "user", "content": "ab?"}], "choices": ["no", "yes"], "label": 1}
    cell = Cell("own", "svf-mlp", learner="sft", **{**SMALL, "steps": 1, "questions": 1})

    class Own:
        def rows(self, *args, **kwargs):
            return [row]

    trainer = learners.train(cell, tiny_model(), tiny_tokenizer(), Own(), "unused")
    (batch,) = trainer.get_train_dataloader()
    learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert tiny_tokenizer().decode(learned) == "yes<end>"


def test_tokens_are_those_that_training_reads_and_go_on_after_a_resumption():
    model = tiny_model()
    counter = learners.TokensRead(model)
    state = SimpleNamespace(log_history=[{"tokens": 100}, {"eval_reward": 0.0, "tokens": 100}])

    def read(rows, length):
        model(torch.zeros(rows, length, dtype=torch.long))

    read(5, 5)  # before the run
    counter.on_train_begin(None, state, None)
    read(3, 7)
    read(2, 4)
    counter.on_step_end(None, state, None)
    state.log_history.append({})
    counter.on_log(None, state, None)
    read(9, 9)  # validation
    counter.on_evaluate(None, state, None)
    read(1, 6)
    counter.on_step_end(None, state, None)
    state.log_history.append({})
    counter.on_log(None, state, None)
    assert [entry["tokens"] for entry in state.log_history] == [100, 100, 129, 135]


def test_evolution_reads_each_question_once_for_every_member(results):
    """The choices of a question are read behind its prompt: tokens grow with the population, not with the samples."""
    _, found, _ = results
    tokens = {
        name.split("-lr")[0]: result["curve"][-1]["tokens"] for name, result in found.items() if "curve" in result
    }
    small = "-steps2-questions2-samples4"
    assert tokens[f"arc_easy-evolution-svf_rank16-mlp{small}"] > tokens[f"arc_easy-svf-mlp{small}"] > 0
    for result in found.values():
        counts = [entry["tokens"] for entry in result.get("curve", [])]
        assert counts == sorted(counts)


# --- the page


def result(cell, right, validation=0.0, trainable=100, **more):
    """A result file's content: which of the test rows are right, and one validation."""
    return {
        "cell": {"name": cell.name},
        "trainable": trainable,
        "answers": 7680,
        "seconds": 60,
        "best_step": 10,
        "best_validation": validation,
        "curve": [{"step": 1, "reward": 0.0}, {"step": 10, "eval_reward": validation, **more}],
        "test": {
            "n": len(right),
            "accuracy": sum(right) / len(right),
            "interval": [0.0, 1.0],
            "records": [[str(i), value] for i, value in enumerate(right)],
        },
    }


def cell(method, lr=0.01, seed=0, learner="reinforce"):
    return Cell("arc_easy", method, lr, seed, learner)


BASE = cell("base", 0.0)


def runs_of(entries):
    done = {each.name: content for each, content in entries}
    return report.Runs("arc_easy", [each for each, _ in entries], done)


def test_the_interval_of_one_seed_is_that_of_the_rows_and_several_seeds_widen_it():
    gaps = [1.0, 0.0, -1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    one = report.Pool([gaps])
    assert one.mean == pytest.approx(statistics.mean(gaps))
    assert one.half == pytest.approx(1.959964 * statistics.pstdev(gaps) / math.sqrt(8))
    assert report.Pool([gaps, gaps, gaps]).half == pytest.approx(one.half)  # seeds that agree add nothing
    flat = report.Pool([[0.1] * 8, [0.2] * 8, [0.6] * 8])  # rows that agree leave the seeds' spread
    assert flat.mean == pytest.approx(0.3)
    assert flat.half == pytest.approx(4.303 * statistics.stdev([0.1, 0.2, 0.6]) / math.sqrt(3), rel=1e-3)


def test_the_interval_over_seeds_covers_the_truth():
    """Rows, seeds and their interplay drawn with a known mean: 95 % intervals miss it in at most 5 % of the draws."""
    draw, missed = random.Random(0), 0
    for _ in range(400):
        rows, seeds = [draw.gauss(0.1, 0.5) for _ in range(60)], [draw.gauss(0, 0.05) for _ in range(3)]
        pool = report.Pool([[row + seed + draw.gauss(0, 0.5) for row in rows] for seed in seeds])
        missed += abs(pool.mean - 0.1) > pool.half
    assert missed <= 0.05 * 400


def test_validation_chooses_the_setting_and_the_test_does_not():
    entries = [(BASE, result(BASE, [0, 0, 1, 1]))]
    for lr, validation, right in ((0.01, 0.2, [1, 1, 1, 1]), (0.02, 0.3, [0, 0, 0, 0]), (0.04, 0.3, [1, 1, 1, 1])):
        entries.append((cell("svf-mlp", lr), result(cell("svf-mlp", lr), right, validation)))
    assert runs_of(entries).setting("svf-mlp") == (0.02, 1.0)  # of equal ones the smaller


def test_settings_are_compared_on_the_seeds_that_all_have_run():
    entries = [(BASE, result(BASE, [0, 1]))]
    for lr, seed, validation in ((0.01, 0, 0.2), (0.02, 0, 0.3), (0.02, 1, -0.9), (0.02, 2, -0.9)):
        entries.append((cell("svf-mlp", lr, seed), result(cell("svf-mlp", lr, seed), [1, 1], validation)))
    runs = runs_of(entries)
    assert runs.setting("svf-mlp") == (0.02, 1.0)
    assert sorted(runs.of("svf-mlp")) == [0, 1, 2]


def test_methods_are_compared_seed_by_seed_on_the_same_rows():
    svf, lora = cell("svf-mlp"), cell("lora16-mlp")
    entries = [(BASE, result(BASE, [0] * 40)), (svf, result(svf, [1] * 30 + [0] * 10))]
    entries.append((lora, result(lora, [1] * 15 + [0] * 25)))
    alone = cell("lora16-mlp", seed=1)  # has no partner
    gap = runs_of([*entries, (alone, result(alone, [1] * 40))]).against("svf-mlp", "lora16-mlp")
    assert gap.seeds == [pytest.approx(15 / 40)] and gap.sign == 1
    assert runs_of(entries).against("svf-mlp", "svf-qv") is None
    other = result(lora, [1] * 39)
    with pytest.raises(SystemExit, match=r"lora16-mlp.*different rows"):
        runs_of([*entries[:2], (lora, other)]).gain([other])


@pytest.mark.parametrize(
    "right, verdict",
    [([1] * 40, "holds"), ([0] * 40, "the other way round"), ([1] * 20 + [0] * 20, "undecided")],
)
def test_a_verdict_follows_from_the_interval(right, verdict):
    svf, lora = cell("svf-mlp"), cell("lora16-mlp")
    half = [0] * 10 + [1] * 20 + [0] * 10
    entries = [(BASE, result(BASE, half)), (svf, result(svf, right)), (lora, result(lora, half, trainable=5000))]
    lines = report.verdicts(runs_of(entries))
    (line,) = [line for line in lines if line.startswith("| SVF learns better than LoRA")]
    assert f"| {verdict} |" in line and "one seed" in line
    (line,) = [line for line in lines if "under 3 %" in line]
    assert f"| {'no' if verdict == 'the other way round' else verdict} |" in line and "100 of 5,000, 2.0 %" in line


def test_what_was_not_run_says_so(tmp_path):
    todo = [BASE, cell("svf-mlp"), cell("lora16-mlp"), cell("svf-mlp", learner="sft")]
    empty = report.page(todo, {}, tmp_path)
    assert "The base was not run." in empty and empty.count("not run |") == 3
    found = {BASE.name: result(BASE, [0, 1]), todo[1].name: result(todo[1], [1, 1], 0.5)}
    text = report.page(todo, found, tmp_path)
    assert "| SVF, MLP | 100 | 0.01 * | 0 | 10 | 0.750 | 1.000 | +0.500" in text
    assert "| LoRA r=16, MLP | | 0.01 | 0 | not run |" in text
    assert "next-token loss on the right answers (paper) | not run |" in text
    assert (tmp_path / "learning-arc_easy.png").is_file()


def test_evolution_is_compared_at_the_tokens_that_reinforce_read():
    svf, evolved = cell("svf-mlp"), cell("svf-mlp", learner="evolution")
    one, other = result(svf, [1, 1], 0.4, tokens=100), result(evolved, [1, 1], 0.8)
    other["curve"] = [
        {"step": i, "eval_reward": v, "tokens": t} for i, v, t in ((1, 0.0, 60), (2, 0.2, 120), (3, 0.8, 180))
    ]
    runs = runs_of([(BASE, result(BASE, [0, 1])), (svf, one), (evolved, other)])
    assert report.equal_tokens(runs).startswith("ahead | validation accuracy 0.700 against 0.600 after 100 tokens")


def test_the_cells_of_the_benchmark_have_names_of_their_own_and_methods_that_exist():
    todo = cells.read_cells()
    assert len({each.name for each in todo}) == len(todo)
    for each in todo:
        assert each.learner in learners.LEARNERS
        if each.method != "base":
            assert learners.adapter(each.method) and report.label(each)
    with pytest.raises(SystemExit, match="no method 'svf-nowhere'"):
        learners.adapter("svf-nowhere")
