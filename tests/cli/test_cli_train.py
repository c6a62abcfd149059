# SPDX-License-Identifier: Apache-2.0
"""Laws of `train` and `eval` beyond policy gradients on texts: evolution strategies, questions about images."""

import json
import re

import pytest
import seeing
import tiny_experts
import torch
from command_line import YAML, run, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from peft_svf import Expert, SVFConfig
from peft_svf.cli import find_task
from peft_svf.cli.train import as_table
from peft_svf.cli.train_config import read_settings
from peft_svf.evaluation import evaluate
from peft_svf.training.evolution import EvolutionConfig, EvolutionTrainer

EVOLUTION = "algorithm: evolution\npopulation: 4\nsigma: 0.2\n"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny base, rows, a settings file of evolution, and `evolved`, trained from it."""
    folder = tmp_path_factory.mktemp("cli_train")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = write_rows(folder / "rows.jsonl")
    text = YAML.format(base=folder / "base", rows=rows, out=folder / "evolved")
    (folder / "reinforce.yaml").write_text(text)
    (folder / "train.yaml").write_text(text.replace("size: 16", "size: 4") + EVOLUTION)
    return folder


@pytest.fixture(scope="module")
def evolved(home):
    from peft_svf.cli import main

    assert main(["factor", str(home / "base")]) == 0  # all runs read their bases from the cache
    assert main(["train", str(home / "train.yaml")]) == 0
    return home / "evolved"


# --- evolution strategies


def test_evolution_from_a_file_is_evolution_from_python(home, evolved, tmp_path):
    task = find_task(str(home / "rows.jsonl"))
    rows = {split: task.rows(split, "choice", seed=42 if split == "train" else 0) for split in ("train", "validation")}
    config = EvolutionConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=2e-2, population=4,
        sigma=0.2, eval_strategy="steps", eval_steps=2, disable_tqdm=True, logging_steps=10, report_to="none",
        dataloader_pin_memory=False,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    trainer = EvolutionTrainer(
        base, task.reward, config, rows["train"], rows["validation"], processing_class=tiny_tokenizer(),
        peft_config=SVFConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "expert")
    here, there = load_file(tmp_path / "expert" / WEIGHTS), load_file(evolved / WEIGHTS)
    assert here.keys() == there.keys() and any(bool(z.any()) for z in here.values())
    for key, z in here.items():
        torch.testing.assert_close(there[key], z)


def test_an_evolved_expert_is_tested_and_has_a_card(home, evolved):
    rows = find_task(str(home / "rows.jsonl")).rows("test")
    result, card = json.loads((evolved / "result.json").read_text()), (evolved / "README.md").read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), evolved)
    assert result["expert"]["accuracy"] == evaluate(model, tiny_tokenizer(), rows).accuracy
    assert [entry["step"] for entry in result["curve"] if "eval_reward" in entry] == [2, 4]
    assert "steps: 4 of 4 questions with 4 " in card and result["command"] in card
    assert Expert.load(evolved).description == "the larger of two numbers"


def test_the_result_has_the_settings_that_repeat_it(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (home / "train.yaml").read_text().replace(f"output_dir: {home}/evolved", "output_dir: ~/first")
    (tmp_path / "train.yaml").write_text(text + "hub_token: secret\nenv: {SOME_KEY: secret}\nwarmup_steps: 1\n")
    assert run(capsys, "train", tmp_path / "train.yaml", "--seed", "7", "--warmup_steps", "0")[0] == 0
    written = (tmp_path / "first" / "result.json").read_text()
    settings = json.loads(written)["settings"]
    assert (settings["output_dir"], settings["seed"], settings["warmup_steps"]) == ("~/first", 7, 0)
    assert settings["learning_rate"] == 0.02 and settings["eval_strategy"] == "steps" and "secret" not in written
    (tmp_path / "again.yaml").write_text(json.dumps({**settings, "output_dir": "~/again"}))  # JSON is YAML
    assert run(capsys, "train", tmp_path / "again.yaml")[0] == 0
    first, again = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_an_interrupted_and_resumed_evolution_is_the_uninterrupted_one(home, evolved, tmp_path, capsys, monkeypatch):
    from test_cli import interrupt

    train = ["train", home / "train.yaml", "--output_dir", tmp_path / "out"]
    interrupt(monkeypatch, times=1)
    code, out, _ = run(capsys, *train)
    assert code == 130 and "Stopped after step 1 of 4" in out
    code, out, _ = run(capsys, *train, "--resume")
    assert code == 0 and re.search(r"^step +4  validation reward -?\d", out, re.MULTILINE)
    whole, resumed = load_file(evolved / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_progress_is_shown_as_it_is_made(home, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("builtins.print", lambda *parts, flush=False, **more: shown.append((parts, flush)))
    run(capsys, "train", home / "train.yaml", "--output_dir", tmp_path / "out")
    steps = [flush for parts, flush in shown if str(parts[0] if parts else "").startswith("step ")]
    assert steps and all(steps)


ENDED = {
    "steps": ("reinforce.yaml", {"lr_scheduler_type": "constant"}),
    "epochs": ("reinforce.yaml", {"max_steps": -1, "num_train_epochs": 0.1, "lr_scheduler_type": "constant"}),
    "early stop": (
        "reinforce.yaml",
        {"max_steps": 20, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 1, "load_best_model_at_end": 1},
    ),
    "evolution": ("train.yaml", {"lr_scheduler_type": "constant"}),
}


@pytest.mark.parametrize("kind", ENDED)
def test_a_run_that_died_in_its_last_test_is_tested_and_not_trained_again(kind, home, tmp_path, capsys, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    settings, over = ENDED[kind]
    parts = [part for key, value in over.items() for part in (f"--{key}", value)]
    whole, dead = (["train", home / settings, *parts, "--output_dir", tmp_path / name] for name in ("whole", "dead"))
    assert run(capsys, *whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("peft_svf.training.result.write_expert", die)
        assert run(capsys, *dead)[0] == 130
    there = sorted(path.name for path in (tmp_path / "dead").iterdir())
    code, _, err = run(capsys, *dead, "--resume")
    assert code == 0 and "fingerprint" not in err, err
    assert {path.name for path in (tmp_path / "dead").glob("checkpoint-*")} <= set(there)
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "dead"))
    assert [one[key] for key in ("steps", "best_step", "z")] == [other[key] for key in ("steps", "best_step", "z")]
    assert one["expert"]["accuracy"] == other["expert"]["accuracy"]
    z, again = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "dead"))
    assert any(bool(v.any()) for v in z.values()) and all(torch.equal(z[key], again[key]) for key in z)
    code, _, err = run(capsys, *dead, "--resume")
    assert code == 2 and ("This run stopped early" if kind == "early stop" else "This run is finished") in err


def test_a_dry_run_of_evolution_counts_rows_times_members(home, tmp_path, capsys):
    code, out, _ = run(capsys, "train", home / "train.yaml", "--output_dir", tmp_path / "out", "--dry-run")
    assert code == 0 and not (tmp_path / "out").exists()
    assert "4 questions x 4 members = 16 sequences" in out and "4 steps = 64 sequences" in out
    assert "read once by each member" in out
    # the other algorithm over the same file: an override decides, and what it does not know is left out
    over = ["--algorithm=evolution", "--population", "6", "--output_dir", tmp_path / "out", "--dry-run"]
    code, out, _ = run(capsys, "train", home / "reinforce.yaml", *over)
    assert code == 0 and "16 questions x 6 members = 96 sequences" in out


def test_the_greedy_answer_is_the_sample_of_a_dry_run_of_evolution(home, tmp_path, capsys):
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    over = ["--task", tmp_path / "sums.jsonl", "--output_dir", tmp_path / "out", "--max_completion_length", "4"]
    code, out, _ = run(capsys, "train", home / "train.yaml", *over, "--dry-run")
    row = find_task(str(tmp_path / "sums.jsonl")).rows("train", "generate", seed=42)[0]
    task = find_task(str(tmp_path / "sums.jsonl"))
    expected = evaluate(tiny_model(), tiny_tokenizer(), [row], 1, task, max_new_tokens=4).records[0]["completion"]
    assert code == 0 and f"The greedy answer of the base (reward -1):\n{expected}" in out


def test_what_does_not_belong_to_the_algorithm_is_refused_by_name(home, tmp_path, capsys):
    def file(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    plain, evolution = ((home / name).read_text() for name in ("reinforce.yaml", "train.yaml"))
    train, out = ["train", home / "train.yaml"], ["--output_dir", tmp_path / "out"]
    cases = {
        "key of the other": (["train", file("a.yaml", plain + "population: 4\n")], "'population' is a setting of alg"),
        "and the other way": (
            ["train", file("b.yaml", evolution + "beta: 0.1\n")],
            "'beta' is a setting of algorithm",
        ),
        "override": ([*train, "--num_generations", "8"], "'num_generations' is a setting of algorithm 'reinforce'"),
        "dashes": ([*train, "--num-generations=8"], "'num_generations' is a setting of algorithm 'reinforce'"),
        "algorithm over the file": (
            [*train, "--algorithm", "reinforce"],
            "'population' is a setting of algorithm 'evo",
        ),
        "no such algorithm": (["train", file("c.yaml", plain + "algorithm: walk\n")], "'algorithm' is 'reinforce' or"),
        "nor over it": ([*train, "--algorithm", "walk"], "'algorithm' is 'reinforce' or 'evolution', got 'walk'"),
        "no value": ([*train, "--algorithm"], "'algorithm' is 'reinforce' or 'evolution', got None"),
        "a list": (["train", file("d.yaml", plain + "algorithm: [evolution]\n")], "'algorithm' is 'reinforce' or"),
        "odd population": ([*train, *out, "--population", "5"], "an even number"),
        "no sigma": ([*train, *out, "--sigma", "0"], "must be above 0"),
        "no number": ([*train, *out, "--sigma", "wide"], "invalid float value: 'wide'"),
        "no such shaping": ([*train, *out, "--shaping", "square"], "square"),
        "patience": ([*train, *out, "--eval_strategy", "no", "--early_stopping_patience", "2"], "counts evaluations"),
        "misspelt": (["train", file("e.yaml", evolution + "sigmma: 1\n")], "did you mean 'sigma'?"),
    }
    for case, (argv, said) in cases.items():
        code, printed, err = run(capsys, *argv)
        last = err.strip().splitlines()[-1:]
        assert code == 2 and last and last[0].startswith("peft-svf train: error: "), (case, printed, err)
        assert said in last[0], (case, last)
    assert not (tmp_path / "out").exists()


SETTINGS = {  # a line for the file -> what is said of it
    "task:": "names no task: the benchmark or the JSONL file",
    "model_name_or_path:": "names no model_name_or_path: the folder or Hub",
    "output_dir:": "names no output_dir: the folder that",
    "learning_rate:": "'learning_rate' has no value",
    "learning_rate: {a: 1}": "'learning_rate' is one value, not a mapping",
    "seed: null": "'seed' has no value",
    "max_steps: 2026-01-01": "invalid int value: '2026-01-01'",
    "eval_steps: true": "'eval_steps' is neither true nor false",
    "eval_strategy: no": "stands in quotes",
    "temperature: 0": "`temperature` must be above 0; got 0",
    "beta: -1": "`beta` must be 0 or more; got -1",
    "reward_clip: 0": "`reward_clip` must be above 0; got 0",
    "early_stopping_patience: 0": "`early_stopping_patience` must be 1 or more; got 0",
    "per_device_train_batch_size: 0": "`per_device_train_batch_size` must be 1 or more; got 0",
    "per_device_eval_batch_size: -1": "`per_device_eval_batch_size` must be 1 or more; got -1",
    "gradient_accumulation_steps: 0": "`gradient_accumulation_steps` must be 1 or more; got 0",
    "max_completion_length: 0": "`max_completion_length` must be 1 or more; got 0",
    "max_steps: 0": "max_steps=0 with num_train_epochs=3 trains nothing",
    "max_steps: -1\nnum_train_epochs: 0": "max_steps=-1 with num_train_epochs=0 trains nothing",
    "metric_for_best_model: eval_foo": "there is no 'foo' in an evaluation, but reward, ",
    "algorithm: evolution\nmetric_for_best_model: eval_loss": "there is no 'loss' in an evaluation, but reward.",
    "metric_for_best_model: eval_kl": "there is no 'kl' in an evaluation, but reward, reward_std, entropy, loss.",
    "metric_for_best_model: null\nearly_stopping_patience: 2": "early_stopping_patience needs metric_for_best_model",
    "report_to: nothing_of_the_kind": "'nothing_of_the_kind' is not installed here",
    "reward_weights: [1, 2]": "a list of one weight, as a task has one reward; got [1, 2]",
    "reward_weights: 1": "a list of one weight",
}


@pytest.mark.parametrize("line", SETTINGS)
def test_a_setting_that_means_nothing_is_refused_before_anything_is_loaded(line, home, tmp_path, capsys):
    key = line.partition(":")[0]
    others = [other for other in (home / "reinforce.yaml").read_text().splitlines() if not other.startswith(f"{key}:")]
    if "\nnum_train_epochs" in line or "evolution" in line:
        others = [other for other in others if not other.startswith("max_steps")]
    (tmp_path / "train.yaml").write_text("\n".join([*others, line]))
    code, _, err = run(capsys, "train", tmp_path / "train.yaml", "--dry-run")
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("peft-svf train: error: ") and SETTINGS[line] in last, err


def test_what_admits_nothing_a_list_a_mapping_or_a_word_takes_it(home, tmp_path):
    admitted = "rank: null\nreport_to: [none]\nlr_scheduler_kwargs: {a: 1}\nresume_from_checkpoint: true\n"
    (tmp_path / "train.yaml").write_text((home / "reinforce.yaml").read_text() + admitted)
    settings = read_settings(str(tmp_path / "train.yaml"))
    assert settings.svf.rank is None and settings.training.lr_scheduler_kwargs == {"a": 1}
    assert settings.training.resume_from_checkpoint == "True" and settings.training.report_to == []
    for name in ("reinforce.yaml", "train.yaml"):
        (tmp_path / "train.yaml").write_text((home / name).read_text() + "metric_for_best_model: null\n")
        assert read_settings(str(tmp_path / "train.yaml")).training.metric_for_best_model is None
    kept = "beta: 0.1\nmetric_for_best_model: eval_kl\n"
    (tmp_path / "train.yaml").write_text((home / "reinforce.yaml").read_text() + kept)
    assert read_settings(str(tmp_path / "train.yaml")).training.metric_for_best_model == "eval_kl"


def test_tokens_are_left_out_of_what_a_run_was_told_at_any_depth(home, tmp_path):
    nested = "model_init_kwargs: {token: secret, dtype: float32, a: [{hub_token: secret, b: 1}]}\n"
    (tmp_path / "train.yaml").write_text((home / "reinforce.yaml").read_text() + nested)
    settings = read_settings(str(tmp_path / "train.yaml"))
    assert settings.given["model_init_kwargs"] == {"dtype": "float32", "a": [{"b": 1}]}
    assert settings.training.model_init_kwargs["token"] == "secret"


@pytest.mark.parametrize("given", [["--hub_token", "secret"], ["--hub_token=secret"]], ids=["apart", "joined"])
def test_a_token_of_the_command_line_is_not_in_the_result(given, home, tmp_path, capsys):
    more = ["--max_steps", 1, "--output_dir", tmp_path / "out"]
    code, _, err = run(capsys, "train", home / "train.yaml", *more, *given)
    assert code == 0, err
    result = (tmp_path / "out" / "result.json").read_text()
    assert "secret" not in result and "--hub_token" in result and "max_steps" in result


def test_a_run_that_is_not_to_be_resumed_begins_anew(home, tmp_path, capsys):
    text = (home / "train.yaml").read_text() + "resume_from_checkpoint: false\nmax_steps: 1\n"
    (tmp_path / "train.yaml").write_text(text)
    code, _, err = run(capsys, "train", tmp_path / "train.yaml", "--output_dir", tmp_path / "out")
    assert code == 0, err
    code, _, err = run(capsys, "train", tmp_path / "train.yaml", "--output_dir", tmp_path / "out")
    assert code == 2 and "holds another run already" in err


@pytest.mark.parametrize("algorithm", ["reinforce", "evolution"])
@pytest.mark.parametrize("form", ["choice", "generate"])
def test_a_row_that_the_model_cannot_hold_is_named_before_anything_is_trained(form, algorithm, home, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    for split, count in {"train": 30, "validation": 4, "test": 4}.items():
        rows = [{"prompt": f"{split} {i}?", "choices": ["1", "2"], "label": 0} for i in range(count)]
        if split == "test":
            rows[2]["prompt"] += "x" * 505  # of 512 tokens: with the template and a choice too many
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = home / ("train.yaml" if algorithm == "evolution" else "reinforce.yaml")
    over = {"task": tmp_path / "rows", "form": form, "max_completion_length": 4, "output_dir": tmp_path / "out"}
    arguments = [part for key, value in over.items() for part in (f"--{key}", value)]
    for more in ((), ("--dry-run",)):
        code, out, err = run(capsys, "train", settings, *arguments, *more)
        last = err.strip().splitlines()[-1]
        assert code == 2 and "The first row" not in out, (out, err)
        what = "its prompt and longest choice" if form == "choice" else "its prompt alone"
        tokens = len("test 2?") + 505 + 3 + (form == "choice")  # three marks of the template
        assert f"test.jsonl', line 3: {what} are {tokens} tokens, but the model's context is 512. Shorten" in last, (
            last
        )
    # a question that leaves too little room for the longest answer
    (tmp_path / "rows" / "test.jsonl").write_text(json.dumps({"prompt": 507 * "x", "choices": ["1", "2"], "label": 0}))
    code, _, err = run(capsys, "train", settings, *arguments, "--dry-run")
    said = "its prompt and max_completion_length=4 are 514 tokens, and the model's context is 512."
    assert code == 0 and (said in err and "lower max_completion_length." in err) == (form == "generate"), err


PART = [{"type": "text", "text": "1 or 2?"}]
MIXED = {  # extra fields of the third line -> what is said of it where a table is made; nothing where one takes it
    "text": ({"level": "hard"}, "'level' is a text, but a number in "),
    "truth": ({"level": True}, "'level' is a truth value, but a number in "),
    "number": ({"tags": [1, "x"]}, "'tags[]' is a text, but a number in "),
    "answer": ({"answer": 3}, "'answer' is a number, but a text in "),
    "other chats": ({"prompt": [{"role": "user", "content": PART}]}, ""),
    "two contents": ({"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": PART}]}, ""),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_field_of_two_types_is_named_where_a_table_is_made_and_there_alone(kind, home, tmp_path, capsys):
    more, said = MIXED[kind]
    rows = [{"prompt": f"{i}?", "choices": ["1", "2"], "label": 0, "level": 1, "answer": "x"} for i in range(20)]
    rows[2] |= more
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows" / "test.jsonl").write_text("\n".join(json.dumps({**row, "prompt": "!"}) for row in rows[1:4]))
    over = ["--task", tmp_path / "rows", "--output_dir", tmp_path / "out", "--eval_strategy", "no", "--max_steps", 1]
    for more in (["--dry-run"], []):
        code, _, err = run(capsys, "train", home / "reinforce.yaml", *over, *more)
        assert (code, said in err, bool(said) == ("train.jsonl', line 3: " in err)) == (
            2 if said else 0,
            True,
            True,
        ), err
    assert run(capsys, "train", home / "train.yaml", *over, "--output_dir", tmp_path / "evolved")[0] == 0


def test_texts_among_parts_keep_the_place_of_their_picture():
    task = find_task("textvqa")
    rows = [
        {"id": "a", "image": "a.png", "prompt": [{"role": "user", "content": "What?"}]},
        {"id": "b", "image": "b.png", "prompt": [{"role": "user", "content": [{"type": "image"}, *PART]}]},
    ]
    first, second = (row["prompt"][0]["content"] for row in as_table(task, "train", rows))
    assert first == [{"type": "image"}, {"type": "text", "text": "What?"}] and second == [{"type": "image"}, *PART]


def test_a_dry_run_refuses_a_step_of_more_prompts_than_there_are_rows(home, tmp_path, capsys):
    over = ["--train_rows", 3, "--per_device_train_batch_size", 32, "--output_dir", tmp_path / "out", "--dry-run"]
    code, _, err = run(capsys, "train", home / "reinforce.yaml", *over)
    assert code == 2 and "A step takes 4 different prompts, but the training data have 3 rows" in err


def test_a_file_without_an_algorithm_reinforces(home):
    from peft_svf.training.reinforce import ReinforceConfig

    assert isinstance(read_settings(str(home / "reinforce.yaml")).training, ReinforceConfig)


# --- questions about images


@pytest.fixture(scope="module")
def sights(tmp_path_factory):
    """A folder with a tiny base that sees, an expert of it, and the published files of TextVQA with two images."""
    folder = tmp_path_factory.mktemp("sights")
    seeing.model(name=str(folder / "base")).save_pretrained(folder / "base")
    seeing.processor().save_pretrained(folder / "base")
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    tiny_experts.write(folder, "seer", seed=1, of=base)
    data = folder / "data" / "textvqa"
    data.mkdir(parents=True)
    for number, image in enumerate(seeing.IMAGES):
        image.save(data / f"{number}.png")
    for split, count in {"train": 40, "val": 4}.items():
        rows = [
            {"question_id": i, "question": f"What is {i}?", "image_id": i, "image": f"{i % 2}.png",
             "answers": ["red" if i % 2 == 0 else "blue"] * 10}
            for i in range(count)
        ]  # fmt: skip
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_base_that_sees_and_its_experts_are_measured_on_images(sights, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_DATA", str(sights / "data"))
    short = ["--task", "textvqa", "--max-new-tokens", 4, "--records", "--out", tmp_path / "r.json"]
    code, _, err = run(capsys, "eval", "--experts", sights / "seer", "--strategy", "prompt", *short)
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    task = find_task("textvqa")
    base = AutoModelForImageTextToText.from_pretrained(sights / "base")
    model = PeftModel.from_pretrained(base, sights / "seer")
    rows, processor = task.rows("test", "generate"), AutoProcessor.from_pretrained(sights / "base")
    expected = evaluate(model, processor, rows, task=task, max_new_tokens=4)
    assert len(rows) == 4
    assert [r["completion"] for r in found["summaries"]["seer"]["records"]] == [
        r["completion"] for r in expected.records
    ]
    assert sum(found["first_pass"]["chosen"].values()) == len(found["summaries"]["two_pass"]["records"]) == 4


def test_a_base_that_sees_nothing_is_refused_for_images(sights, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_DATA", str(sights / "data"))
    code, _, err = run(capsys, "eval", "--model", home / "base", "--task", "textvqa", "--out", tmp_path / "r.json")
    assert code == 2 and "sees none: name a vision-language model" in err.splitlines()[-1]


def test_what_would_not_see_the_images_is_refused_for_them(sights, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_DATA", str(sights / "data"))
    base = ["--model_name_or_path", sights / "base", "--task", "textvqa", "--output_dir", tmp_path / "out"]
    code, _, err = run(capsys, "train", home / "train.yaml", *base)
    assert code == 2 and "these rows have images" in err.splitlines()[-1] and not (tmp_path / "out").exists()
    part = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    example = {"prompt": part, "image": str(sights / "data" / "textvqa" / "0.png"), "answer": "red"}
    (tmp_path / "few.jsonl").write_text(json.dumps(example))
    adapt = ["adapt", "--experts", sights / "seer", "--examples", tmp_path / "few.jsonl", "--out", tmp_path / "m.json"]
    code, _, err = run(capsys, *adapt)
    assert code == 2 and "an example has an image" in err.splitlines()[-1]


def test_an_expert_is_trained_on_images(sights, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_DATA", str(sights / "data"))
    over = {"model_name_or_path": sights / "base", "task": "textvqa", "output_dir": tmp_path / "out", "max_steps": 1}
    over |= {"max_completion_length": 4, "eval_strategy": "no", "per_device_train_batch_size": 8}
    arguments = [part for key, value in over.items() for part in (f"--{key}", value)]
    code, out, err = run(capsys, "train", home / "reinforce.yaml", *arguments, "--dry-run")
    assert code == 0 and "those of images not counted" in out, err
    code, out, err = run(capsys, "train", home / "reinforce.yaml", *arguments)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["task"], result["form"], result["expert"]["n"]) == ("textvqa", "generate", 4)
