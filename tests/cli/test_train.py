# SPDX-License-Identifier: Apache-2.0
"""Laws of `peft-svf train`: a file gives an expert with a card, a stopped run goes on, settings are checked."""

import copy
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pico
import pytest
import seeing
import torch
from command_line import YAML, run, write_rows
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_model import tiny_model, tiny_tokenizer

from peft_svf import Expert
from peft_svf.cli.sources import find_task, load_model
from peft_svf.cli.train import table_of
from peft_svf.cli.train_config import SVFArguments, read_settings, svf_config
from peft_svf.evaluation import evaluate
from peft_svf.tasks import Task
from peft_svf.tuner.layer import svf_layers

ROOT = Path(__file__).resolve().parents[2]
EVOLUTION = "algorithm: evolution\npopulation: 4\nsigma: 0.2\n"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny base, rows, and settings of all algorithms."""
    folder = tmp_path_factory.mktemp("train")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    text = YAML.format(base=folder / "base", rows=write_rows(folder / "rows.jsonl"), out=folder / "expert")
    (folder / "reinforce.yaml").write_text(text)
    (folder / "evolution.yaml").write_text(text.replace("size: 16", "size: 4") + EVOLUTION)
    sums = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(60)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    lines = (f"model_name_or_path: {folder / 'base'}", f"task: {folder / 'sums.jsonl'}", "algorithm: sft")
    (folder / "sft.yaml").write_text("\n".join([*lines, f"output_dir: {folder / 'sums'}", "max_steps: 2"]))
    return folder


@pytest.fixture(scope="module")
def expert(home):
    from peft_svf.cli import main

    assert main(["factor", str(home / "base")]) == 0  # all runs read the same bases from the cache
    assert main(["train", str(home / "reinforce.yaml")]) == 0
    return home / "expert"


def test_ten_lines_and_a_file_of_rows_give_an_expert_with_a_card(home, expert):
    assert len((home / "reinforce.yaml").read_text().splitlines()) == 10
    trained = Expert.load(expert)
    assert trained.description == "the larger of two numbers"
    assert max(float(d.abs().max()) for d in trained.offsets.values()) > 0.01
    assert trained.key.states.shape == (58, 48)  # all rows of the training split
    result = json.loads((expert / "result.json").read_text())
    assert result["command"].startswith("peft-svf train ") and result["command"] in (expert / "README.md").read_text()
    rows = find_task(str(home / "rows.jsonl")).rows("test")
    assert result["base"]["accuracy"] == evaluate(tiny_model(), tiny_tokenizer(), rows).accuracy
    assert result["settings"]["learning_rate"] == 0.02 and result["settings"]["max_steps"] == 4


def interrupt(monkeypatch, times):
    """Send Ctrl-C from inside the first step."""
    left, reward = list(range(times)), Task.reward

    def interrupted(self, completions, **columns):
        while left:
            left.pop()
            signal.raise_signal(signal.SIGINT)
        return reward(self, completions, **columns)

    interrupted.__name__ = "reward"
    monkeypatch.setattr(Task, "reward", interrupted)


def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(home, expert, tmp_path, capsys, monkeypatch):
    train = ["train", home / "reinforce.yaml", "--output_dir", tmp_path / "out", "--hub_token", "topsecret"]
    interrupt(monkeypatch, times=1)
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = run(capsys, *train)
    assert code == 130 and "Stopped after step 1 of 4" in out and out.rstrip().endswith("--resume")
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "out" / "result.json").exists()
    code, _, err = run(capsys, *train)
    assert code == 1 and "holds another run already" in err
    code, out, err = run(capsys, *train, "--resume")
    assert code == 0 and re.search(r"^step +4/4  validation reward -?\d", out, re.MULTILINE), err
    assert "topsecret" not in (tmp_path / "out" / "result.json").read_text()
    whole, resumed = (load_file(folder / WEIGHTS) for folder in (expert, tmp_path / "out"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_second_interrupt_ends_at_once(home, tmp_path, capsys, monkeypatch):
    interrupt(monkeypatch, times=2)
    over = ["--output_dir", tmp_path / "out", "--eval_strategy", "no"]
    assert run(capsys, "train", home / "reinforce.yaml", *over)[0] == 130
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_five_lines_and_a_file_of_right_answers_give_an_expert(home, expert, capsys):
    assert len((home / "sft.yaml").read_text().splitlines()) == 5
    code, out, err = run(capsys, "train", home / "sft.yaml", "--max_completion_length", 4)
    assert code == 0 and re.search(r"^step +1/2  loss [\d.]+  KL of everyday answers 0 ", out, re.MULTILINE), err
    assert re.search(r"^Everyday answers of the base are [\d.]+% (less|more) likely per token.$", out, re.MULTILINE)
    result, card = json.loads((home / "sums" / "result.json").read_text()), (home / "sums" / "README.md").read_text()
    assert result["objective"].startswith("next-token loss on right answers + 20 KL(base || policy)")
    assert result["objective"] in card and "2 of 16 right answers" in card
    assert (result["form"], result["curve"][0]["step"], result["settings"]["algorithm"]) == ("generate", 1, "sft")
    assert "objective: policy gradient" in (expert / "README.md").read_text().replace("**", "").lower()


def test_right_answers_move_all_linear_weights_of_the_upper_half_unless_told_otherwise(home):
    (base, _), given = load_model(str(home / "base")), SVFArguments(first_block=1, target_modules=["down_proj"])
    for arguments, supervised, blocks, kinds in (
        (SVFArguments(), True, {"1"}, 7),
        (SVFArguments(), False, {"0", "1"}, 3),
        (SVFArguments(layers_to_transform=[0]), True, {"0"}, 3),
        (given, True, {"1"}, 1),
    ):
        config = svf_config(arguments, base, supervised=supervised)
        names = list(svf_layers(get_peft_model(copy.deepcopy(base), config)))
        assert {re.search(r"layers\.(\d+)", name)[1] for name in names} == blocks
        assert len({name.rpartition(".")[2] for name in names}) == kinds
    stackless = svf_config(SVFArguments(), pico.build("t5"), supervised=True)
    assert stackless.target_modules is None and stackless.exclude_modules is None
    both = replace(given, layers_to_transform=[1])
    for wrong in (SVFArguments(first_block=2), replace(given, first_block=-1), both):
        with pytest.raises(ValueError, match="first_block is 1 to 1 for this model"):
            svf_config(wrong, base)


def test_rows_with_choices_are_learned_as_text_unless_the_form_is_choice(home, tmp_path, capsys):
    over = ["--task", home / "rows.jsonl", "--output_dir", tmp_path / "out", "--dry-run"]
    for form, words in {"generate": '"solution": "', "choice": '"choices": ['}.items():
        code, out, err = run(
            capsys, "train", home / "sft.yaml", *over, *(["--form", form] if form == "choice" else [])
        )
        assert code == 0 and f"rows, {form} form" in out and words in out, err


def test_few_right_answers_are_read_for_24_steps_unless_steps_or_epochs_are_set(home, tmp_path, capsys):
    lines = [line for line in (home / "sft.yaml").read_text().splitlines() if not line.startswith("max_steps")]
    (tmp_path / "few.yaml").write_text("\n".join(lines))
    for over, steps in (([], 24), (["--num_train_epochs", "1"], 1), (["--max_steps", "3"], 3)):
        options = ["--output_dir", tmp_path / "out", "--max_completion_length", 4, "--train_rows", "20", *over]
        code, out, err = run(capsys, "train", tmp_path / "few.yaml", *options, "--dry-run")
        assert code == 0 and f"Cost: {steps} steps x 16 right answers" in out, err


@pytest.mark.parametrize("algorithm", ["reinforce", "sft", "evolution"])
def test_a_dry_run_writes_nothing_and_shows_prompt_success_and_cost(algorithm, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "cache"))
    over = ["--output_dir", tmp_path / "out", "--dry-run", "--max_steps", 4, "--task", home / "rows.jsonl"]
    over += ["--form", "choice"]
    code, out, err = run(capsys, "train", home / f"{algorithm}.yaml", *over)
    assert code == 0 and list(tmp_path.iterdir()) == [], err
    rows = find_task(str(home / "rows.jsonl")).rows("train", seed=42)[:16]
    assert "Its prompt as the model reads it:\n" in out and rows[0]["prompt"][0]["content"] in out
    share = evaluate(tiny_model(), tiny_tokenizer(), rows).accuracy
    assert f"The base is right on {share:.0%} of the first 16 training rows." in out
    products = {"reinforce": "2 questions x 8 answers", "evolution": "4 questions x 4 answers"}
    (cost,) = re.findall(r"^Cost: .*$", out, re.MULTILINE)
    assert f"4 steps x {products.get(algorithm, '16 right answers and 8 everyday answers of the base')}" in cost
    assert re.search(r"about [\d.]+ minutes", cost)


def test_evolution_and_written_answers_train(home, expert, tmp_path, capsys):
    over = ["--task", home / "sums.jsonl", "--output_dir", tmp_path / "out", "--max_steps", 1]
    over += ["--max_completion_length", 4, "--test_rows", 3, "--eval_strategy", "no"]
    over += ["--per_device_train_batch_size", 8]
    code, out, err = run(capsys, "train", home / "evolution.yaml", *over, "--dry-run")
    assert code == 0 and "The base's answer to it:" in out, err
    assert ("right on 0% of" in out) is ("`algorithm: sft` learns from right answers" in out)
    for algorithm in ("evolution", "reinforce"):
        folder = ["--output_dir", tmp_path / algorithm, "--routing", algorithm == "evolution"]
        code, _, err = run(capsys, "train", home / f"{algorithm}.yaml", *over, *folder)
        assert code == 0, err
        result = json.loads((tmp_path / algorithm / "result.json").read_text())
        assert (result["form"], result["expert"]["n"]) == ("generate", 3)
        assert (Expert.load(tmp_path / algorithm).key is None) == (algorithm == "reinforce")


def test_an_expert_is_trained_on_images(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_DATA", str(tmp_path / "data"))
    seeing.write_textvqa(tmp_path / "data")
    seeing.model(name=str(tmp_path / "base")).save_pretrained(tmp_path / "base")
    seeing.processor().save_pretrained(tmp_path / "base")
    over = {"model_name_or_path": tmp_path / "base", "task": "textvqa", "output_dir": tmp_path / "out", "max_steps": 1}
    over |= {"max_completion_length": 4, "eval_strategy": "no", "per_device_train_batch_size": 8}
    arguments = [part for key, value in over.items() for part in (f"--{key}", value)]
    code, _, err = run(capsys, "train", home / "reinforce.yaml", *arguments)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["task"], result["form"], result["expert"]["n"]) == ("textvqa", "generate", 4)
    assert Expert.load(tmp_path / "out").key.states.shape == (35, 48)
    code, _, err = run(capsys, "train", home / "evolution.yaml", *arguments, "--dry-run")
    assert code == 1 and "has an image" in err


def test_the_example_settings_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert read_settings("examples/train.yaml").script.task


@pytest.mark.parametrize("form", ["choice", "generate"])
def test_a_row_that_the_model_cannot_hold_is_refused_before_training(form, home, tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "choices": ["1", "2"], "label": 0} for i in range(30)]
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation", "test"):
        rows[2]["prompt"] = f"{split}?" + "x" * 505 * (split == "test")  # the context has 512 tokens
        texts = [json.dumps({**row, "prompt": f"{split} {row['prompt']}"}) for row in rows]
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(texts))
    over = ["--task", tmp_path / "rows", "--form", form, "--output_dir", tmp_path / "out", "--dry-run"]
    code, _, err = run(capsys, "train", home / "reinforce.yaml", *over)
    assert code == 1 and re.search(r"test\.jsonl', line 3: its prompt .* 512. Shorten", err), err


def test_chats_with_texts_and_parts_fit_in_one_table():
    part = [{"type": "text", "text": "1 or 2?"}]
    rows = [{"prompt": [{"role": "user", "content": content}]} for content in ("Hello", part)]
    first = table_of(rows)[0]["prompt"][0]["content"][0]
    assert (first["type"], first["text"]) == ("text", "Hello")


WRONG = {  # lines of a file -> part of the message
    "- 1": "isn't valid YAML of one `key: value` a line",
    "a: [1": "isn't valid YAML",
    "lr: 1e-3": "unknown key 'lr': did you mean 'learning_rate'?",
    "max_step: 3": "unknown key 'max_step': did you mean 'max_steps'?",
    "population: 4": "unknown key 'population': it belongs to `algorithm: evolution`",
    "algorithm: sft\nnum_generations: 4": "unknown key 'num_generations': it belongs to `algorithm: reinforce`",
    "algorithm: evolution\nretention: 1": "unknown key 'retention': it belongs to `algorithm: reinforce`",
    "retention: -1": "`retention` must be 0 or more; got -1.0",
    "dtype: bf16": "invalid choice: 'bf16' (choose from 'auto', 'float32', 'bfloat16'",
    "algorithm: walk": "argument --algorithm: invalid choice: 'walk'",
    "model_init_kwargs:\n  a: &x [1]\n  b: [*x, *x]": "write out its aliases",
    "a: " + "[" * 1000: "isn't valid YAML",
    "license:\ndtype:": "'dtype' is one value, not empty",
    "system: [short, answers]": "'system' is one value, not ['short', 'answers']",
    "description: {a: 1}": "'description' is one value, not {'a': 1}",
    "max_steps: 4.5": "invalid int value: '4.5'",
    "layers_to_transform: [a]": "invalid int value: 'a'",
    "env: 3": "'int' object is not iterable",
    "metric_for_best_model: eval_accuracy": "`metric_for_best_model` must be 'eval_reward' or another reward",
    "per_device_train_batch_size: 0": "`per_device_train_batch_size` must be 1 or more; got 0",
}


def settings(home, tmp_path, lines, name="reinforce.yaml"):
    keys = {line.partition(":")[0] for line in lines.splitlines()}
    others = [line for line in (home / name).read_text().splitlines() if line.partition(":")[0] not in keys]
    (tmp_path / "train.yaml").write_text("\n".join(lines.splitlines() if lines == "- 1" else [*others, lines]))
    return str(tmp_path / "train.yaml")


@pytest.mark.parametrize("lines", WRONG, ids=[line[:30] for line in WRONG])
def test_a_wrong_setting_is_refused_before_anything_is_loaded(lines, home, tmp_path):
    with pytest.raises(ValueError) as error:
        read_settings(settings(home, tmp_path, lines))
    assert WRONG[lines] in str(error.value) and str(tmp_path / "train.yaml") in str(error.value)


def test_the_folder_of_the_expert_is_required(home, tmp_path):
    lines = [line for line in (home / "reinforce.yaml").read_text().splitlines() if "output_dir" not in line]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="required: --output_dir"):
        read_settings(str(tmp_path / "train.yaml"))


def test_a_wrong_override_is_an_error_of_one_line(home, capsys):
    for over, message in {"--max_steps": "expected one argument", "--sigmma=1": "did you mean 'sigma'?"}.items():
        code, out, err = run(capsys, "train", home / "evolution.yaml", over)
        assert code == 1 and not out and err.startswith("peft-svf train: error: ") and message in err
        assert err.count("\n") == 1


def test_values_take_the_types_of_their_fields(home, tmp_path):
    lines = "rank: null\nreport_to: [none]\nlr_scheduler_kwargs: {a: 1e-5}\nresume_from_checkpoint: true\n"
    lines += "layers_to_transform: ['0', 1]\neval_strategy: no\nlearning_rate: 1e-3\nenv: {PEFT_SVF_TEST_ENV: 3}\n"
    read = read_settings(settings(home, tmp_path, lines), ["--max_steps=7", "--rank", "5"])
    assert (read.svf.rank, read.svf.layers_to_transform) == (5, [0, 1])
    training = read.training
    assert (training.lr_scheduler_kwargs, training.report_to, training.max_steps) == ({"a": 1e-5}, [], 7)
    assert (training.resume_from_checkpoint, training.eval_strategy, training.learning_rate) == ("True", "no", 1e-3)
    assert os.environ.pop("PEFT_SVF_TEST_ENV") == "3"
    assert read_settings(str(home / "evolution.yaml")).training.population == 4
