# SPDX-License-Identifier: Apache-2.0
"""Laws of the command line: a verb says what the library says; what a user gets wrong is one line."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import YAML, run, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from peft_svf import Expert, Mixture, Transformer2Model
from peft_svf.cli import find_task, main, read_mixture
from peft_svf.cli.sources import find_expert
from peft_svf.evaluation import choice_logps, evaluate
from peft_svf.experts.expert import SavedExpert
from peft_svf.tasks import Task
from peft_svf.tuner.cache import cache_dir, usage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny base, one's own rows, a ten-line YAML, `expert`, trained from it, and `wild`, random."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = write_rows(folder / "rows.jsonl")
    text = YAML.format(base=folder / "base", rows=rows, out=folder / "expert")
    (folder / "train.yaml").write_text(text)
    # bases that were just computed lie at another alignment than those read from the cache: sums round differently
    assert main(["factor", str(folder / "base")]) == 0
    assert main(["train", str(folder / "train.yaml")]) == 0
    # another expert of the same base, with known z
    config = Expert.load(folder / "expert").config
    draws = torch.Generator().manual_seed(0)
    offsets = {m: torch.randn(len(d), generator=draws) for m, d in Expert.load(folder / "expert").offsets.items()}
    Expert("wild", offsets, config).save(folder / "wild")
    return folder


def loaded(home, *experts):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    return Transformer2Model(model, tiny_tokenizer(), [Expert.load(home / name) for name in experts])


# --- train


def test_ten_lines_and_ones_own_rows_give_an_expert_with_a_card(home):
    assert len((home / "train.yaml").read_text().splitlines()) == 10
    expert = Expert.load(home / "expert")
    assert expert.description == "the larger of two numbers"
    assert max(float(d.abs().max()) for d in expert.offsets.values()) > 0.01
    result, card = (
        json.loads((home / "expert" / "result.json").read_text()),
        (home / "expert" / "README.md").read_text(),
    )
    assert result["command"] in card and result["command"].startswith("peft-svf train ")
    test = len(find_task(str(home / "rows.jsonl")).rows("test"))
    for said in ("`base`", "rows, training split, choice form", "steps: 4 of 2 questions with 8 samples", "seed: 42"):
        assert said in card
    assert f"| rows | test | accuracy (choice form) | {result['base']['accuracy']:.3f} |" in card
    assert f"| {test} | {result['gain']:+.3f} [" in card


def test_the_result_of_training_is_what_the_saved_expert_scores(home):
    rows = find_task(str(home / "rows.jsonl")).rows("test")
    result = json.loads((home / "expert" / "result.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    assert result["base"]["accuracy"] == evaluate(base, tiny_tokenizer(), rows).accuracy
    model = PeftModel.from_pretrained(base, home / "expert")
    assert result["expert"]["accuracy"] == evaluate(model, tiny_tokenizer(), rows).accuracy
    assert result["z"]["numbers"] == sum(len(d) for d in Expert.load(home / "expert").offsets.values())


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


def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(home, tmp_path, capsys, monkeypatch):
    train = ["train", home / "train.yaml", "--output_dir", tmp_path / "out"]
    interrupt(monkeypatch, times=1)
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = run(capsys, *train)
    assert code == 130 and "Stopped after step 1 of 4" in out and "--resume" in out
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "out" / "checkpoint-1").is_dir() and not (tmp_path / "out" / "result.json").exists()
    code, out, _ = run(capsys, *train, "--resume")
    assert code == 0 and re.search(r"^step +4  validation reward -?\d", out, re.MULTILINE)
    whole, resumed = (load_file(f / "adapter_model.safetensors") for f in (home / "expert", tmp_path / "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    code, _, err = run(capsys, *train, "--resume")
    assert code == 2 and "This run is finished (4 of 4 steps): raise max_steps" in err


def test_the_second_interrupt_ends_at_once(home, tmp_path, capsys, monkeypatch):
    interrupt(monkeypatch, times=2)
    code, _, err = run(capsys, "train", home / "train.yaml", "--output_dir", tmp_path / "out", "--eval_strategy", "no")
    assert code == 130 and err.splitlines()[-1] == "Interrupted."
    assert (tmp_path / "out" / "checkpoint-1").is_dir() is False


def test_a_dry_run_writes_nothing_and_names_the_cost(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "cache"))
    code, out, _ = run(capsys, "train", home / "train.yaml", "--output_dir", tmp_path / "out", "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    expert = Expert.load(home / "expert")
    assert f"{sum(map(len, expert.offsets.values())):,} multipliers z of {len(expert.offsets)} weights" in out
    assert "2 questions x 8 samples = 16 sequences" in out and "4 steps = 64 sequences" in out
    row = find_task(str(home / "rows.jsonl")).rows("train", seed=42)[0]
    with torch.no_grad():
        logps = choice_logps(tiny_model(), tiny_tokenizer(), [row])[0]
    for k, (text, logp) in enumerate(zip(row["choices"], logps.tolist(), strict=True)):
        reward = r"\+1" if k == row["label"] else "-1"
        assert re.search(rf"^{text} +{logp:.2f} +{logps.softmax(0)[k]:.3f} +{reward}$", out, re.MULTILINE)


def test_rows_without_choices_train_in_the_generated_form(home, tmp_path, capsys):
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"task": tmp_path / "sums.jsonl", "output_dir": tmp_path / "out", "max_steps": 1}
    settings |= {"max_completion_length": 4, "test_rows": 3, "eval_strategy": "no"}
    overrides = [part for key, value in settings.items() for part in (f"--{key}", value)]
    code, out, _ = run(capsys, "train", home / "train.yaml", *overrides)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert code == 0 and (result["form"], result["expert"]["n"]) == ("generate", 3)
    code, out, _ = run(capsys, "train", home / "train.yaml", *overrides, "--dry-run")
    assert code == 0 and "A sample of the base (reward -1)" in out and "completions of at most 4" in out


def test_the_example_settings_are_valid_and_their_rows_there(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    base = ["--model_name_or_path", home / "base", "--output_dir", tmp_path / "out"]
    code, out, _ = run(capsys, "train", "examples/train.yaml", *base, "--dry-run")
    assert code == 0 and "8 questions x 8 samples = 64 sequences" in out


# --- eval


def test_eval_says_what_evaluate_says(home, tmp_path, capsys):
    arguments = ["--experts", home / "expert", f"other_name={home / 'wild'}", "--task", home / "rows.jsonl"]
    code, out, _ = run(capsys, "eval", *arguments, "--out", tmp_path / "r.json", "--records")
    assert code == 0
    found = json.loads((tmp_path / "r.json").read_text())
    rows = find_task(str(home / "rows.jsonl")).rows("test")
    model = loaded(home, "expert", "wild")
    for way, name in (("base", "other"), ("expert", "expert"), ("other_name", "wild")):
        with model.using({name: 1.0}) as active:
            expected = evaluate(active, model.tokenizer, rows)
        assert found["summaries"][way]["records"] == [
            {**r, "probability": pytest.approx(r["probability"], abs=1e-5)} for r in expected.records
        ]
        assert re.search(rf"^{way} +{expected.accuracy:.3f} +\[{expected.interval[0]:.3f}, ", out, re.MULTILINE)
    gain = found["summaries"]["other_name"]["accuracy"] - found["summaries"]["base"]["accuracy"]
    assert found["gains"]["other_name"]["gain"] == pytest.approx(gain)


def test_eval_of_a_one_hot_mixture_is_that_expert(home, tmp_path, capsys):
    shared = ["--experts", home / "expert", home / "wild", "--task", home / "rows.jsonl", "--records"]
    run(capsys, "eval", *shared, "--out", tmp_path / "experts.json")
    run(capsys, "eval", *shared, "--out", tmp_path / "mixture.json", "--mixture", "wild=1")
    experts, mixture = (json.loads((tmp_path / f"{n}.json").read_text())["summaries"] for n in ("experts", "mixture"))
    assert mixture.keys() == {"base", "mixture"}
    assert mixture["mixture"]["records"] == experts["wild"]["records"]


def test_eval_without_experts_is_the_base(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = run(capsys, "eval", "--model", home / "base", "--task", home / "rows.jsonl", "--limit", 5)
    (path,) = tmp_path.glob("eval-rows-*.json")
    rows = find_task(str(home / "rows.jsonl")).rows("test", limit=5)
    assert code == 0
    expected = evaluate(tiny_model(), tiny_tokenizer(), rows).accuracy
    assert json.loads(path.read_text())["summaries"]["base"]["accuracy"] == expected


# --- factor, inspect


def test_factor_fills_the_cache_once(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path))
    code, out, _ = run(capsys, "factor", home / "base")
    weights = len(Expert.load(home / "expert").offsets)
    assert code == 0 and usage()[0] == weights
    assert f"{weights} of {weights} computed" in out and str(cache_dir()) in out
    code, out, _ = run(capsys, "factor", home / "base")
    assert code == 0 and f"0 of {weights} computed" in out


def test_inspect_shows_the_distance_from_1_of_every_layer_and_kind(home, tmp_path, capsys):
    code, out, _ = run(capsys, "inspect", home / "wild", "--plot", tmp_path / "z.png")
    offsets = load_file(home / "wild" / "adapter_model.safetensors")
    kinds = re.search(r"^layer +(.*)$", out, re.MULTILINE)[1].split()
    assert code == 0 and sorted(kinds) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    for layer in range(2):
        cells = [offsets[f"base_model.model.model.layers.{layer}.{kind}.svf_offset.weight"] for kind in kinds]
        assert re.search(rf"^{layer} +" + " +".join(f"{d.abs().mean():.4f}" for d in cells) + "$", out, re.MULTILINE)
    everything = torch.cat(list(offsets.values())).abs()
    assert f"mean |z-1| {everything.mean():.4f}, largest {everything.max():.4f}" in out
    assert (tmp_path / "z.png").read_bytes().startswith(b"\x89PNG")


# --- adapt, dispatch


def test_adapt_saves_the_mixture_that_the_search_finds(home, tmp_path, capsys):
    write_rows(tmp_path / "few.jsonl", 4)
    search = ["--population", 5, "--iterations", 2, "--elites", 0.4, "--seed", 3]
    arguments = ["--experts", home / "expert", home / "wild", "--examples", tmp_path / "few.jsonl", *search]
    code, out, _ = run(capsys, "adapt", *arguments, "--out", tmp_path / "m.json", "--plot", tmp_path / "m.png")
    assert code == 0 and (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    found = Mixture.load(tmp_path / "m.json")
    rows = [json.loads(line) for line in (tmp_path / "few.jsonl").read_text().splitlines()]
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    search = Search(population=5, iterations=2, elites=0.4, seed=3)
    expected = loaded(home, "expert", "wild").adapt(rows, search=search)
    assert found.alpha == pytest.approx(expected.alpha)
    for name in ("expert", "wild"):  # also one that has no weight
        assert re.search(rf"^{name} +{expected.alpha.get(name, 0.0):.3f}$", out, re.MULTILINE)


def test_dispatch_shows_what_the_first_pass_chooses(home, tmp_path, capsys):
    write_rows(tmp_path / "some.jsonl", 2)
    arguments = ["--experts", home / "expert", home / "wild", "--file", tmp_path / "some.jsonl"]
    code, out, _ = run(capsys, "dispatch", "what is larger", *arguments, "--plot", tmp_path / "p.png")
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    prompts = ["what is larger", *prompts]
    assert code == 0 and (tmp_path / "p.png").exists()
    for prompt, mixture in zip(prompts, loaded(home, "expert", "wild").first_pass(prompts), strict=True):
        line = rf"^{mixture.choice} +{mixture.confidence:.2f} +{re.escape(prompt)}$"
        assert re.search(line, out, re.MULTILINE)


def test_a_mixture_is_a_file_or_names_with_weights(tmp_path):
    Mixture({"a": 0.3}).save(tmp_path / "m=1.json")
    assert read_mixture([str(tmp_path / "m=1.json")]).alpha == {"a": 0.3}
    assert read_mixture(["a=0.7", "b=-0.25"]).alpha == {"a": 0.7, "b": -0.25}
    with pytest.raises(
        FileNotFoundError, match=r"no file 'sums': a mixture is one that .adapt. wrote, or expert names"
    ):
        read_mixture(["sums"])


# --- what a user can get wrong


def wrong(home, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "answer": "y"}\n{"prompt": 3}\n')
    train, eval_ = ["train", home / "train.yaml"], ["eval", "--task", home / "rows.jsonl"]
    adapt = ["adapt", "--experts", home / "wild", "--out", tmp_path / "m.json", "--examples"]
    misspelt = (home / "train.yaml").read_text().replace("max_steps", "max_step")
    (tmp_path / "misspelt.yaml").write_text(misspelt)
    (tmp_path / "type.yaml").write_text((home / "train.yaml").read_text().replace("max_steps: 4", "max_steps: [4]"))
    (tmp_path / "float.yaml").write_text((home / "train.yaml").read_text().replace("max_steps: 4", "max_steps: 4.5"))
    return {
        "no file": (["train", tmp_path / "nothing.yaml"], "There is no settings file '"),
        "no mapping": (["train", tmp_path / "list.yaml"], "key: value"),
        "no YAML": (["train", tmp_path / "broken.yaml"], "is no YAML"),
        "unknown key": (["train", tmp_path / "misspelt.yaml"], "'max_step': did you mean 'max_steps'?"),
        "wrong type": (["train", tmp_path / "type.yaml"], "'max_steps' is one value, not a list"),
        "no integer": (["train", tmp_path / "float.yaml"], "invalid int value: '4.5'"),
        "unknown override": ([*train, "--max_stepz", "3"], "'max_stepz': did you mean 'max_steps'?"),
        "bad value": ([*train, "--max_steps", "many"], "max_steps"),
        "unknown task": (
            [*train, "--task", "arc_eazy", "--output_dir", tmp_path / "o"],
            "There is no task 'arc_eazy'",
        ),
        "no rows": ([*train, "--task", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "o"], "rows.jsonl"),
        "bad row": ([*train, "--task", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "o"], "line 2"),
        "another run": (train, "holds another run already"),
        "no checkpoint": ([*train, "--resume", "--output_dir", tmp_path / "o"], "no whole checkpoint"),
        "no such checkpoint": (
            [*train, "--resume", tmp_path / "checkpoint-9", "--output_dir", tmp_path / "o", "--dry-run"],
            "or --resume",
        ),
        "no model": (
            [*train, "--model_name_or_path", tmp_path / "x", "--output_dir", tmp_path / "o"],
            "There is no folder '",
        ),
        "unknown expert": ([*eval_, "--experts", tmp_path / "nobody"], "nobody"),
        "expert not on the Hub": ([*eval_, "--experts", "me/nobody"], ""),
        "unknown name": ([*eval_, "--experts", home / "wild", "--mixture", "tame=1"], "There is no expert 'tame'"),
        "no mixture": ([*eval_, "--experts", home / "wild", "--mixture", "tame=x"], "math=0.7"),
        "mixture of nothing": ([*eval_, "--mixture", "tame=1"], "--experts"),
        "nothing to measure": (eval_, "--model"),
        "result is there": ([*eval_, "--model", home / "base", "--out", home / "train.yaml"], "is there already"),
        "no expert": (["inspect", home / "base"], "holds no expert"),
        "bad example": ([*adapt, tmp_path / "bad.jsonl"], "Line 2"),
        "no prompts": (["dispatch", "--experts", home / "wild"], "There are no prompts"),
        "no weights": (["factor", tmp_path / "y"], "y"),
    }


def test_what_a_user_gets_wrong_is_one_line_and_code_2(home, tmp_path, capsys):
    for case, (argv, said) in wrong(home, tmp_path).items():
        code, out, err = run(capsys, *argv)
        last = err.strip().splitlines()[-1:]
        assert code == 2 and last and last[0].startswith(f"peft-svf {argv[0]}: error: "), (case, out, err)
        assert said in last[0], (case, last)
        assert "Traceback" not in err, case
    assert not (tmp_path / "o").exists() and not (tmp_path / "m.json").exists()


def test_debug_raises_what_went_wrong(home, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        main(["train", str(tmp_path / "nothing.yaml"), "--debug"])


@pytest.mark.parametrize("verb", ["train", "eval", "factor", "inspect", "adapt", "dispatch"])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: peft-svf {verb}")


def test_an_argument_that_no_verb_has_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "x", "--loud"])
    assert ended.value.code == 2 and "--loud" in capsys.readouterr().err


def test_help_as_a_module_imports_no_extra():
    code = (
        "import atexit, runpy, sys; sys.argv = ['peft-svf', '--help']\n"
        "atexit.register(lambda: print('\\n', *sys.modules))\nrunpy.run_module('peft_svf', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, modules = done.stdout.strip().splitlines()
    assert text[0].startswith("usage: peft-svf")
    assert {"peft_svf.cli"} <= set(modules.split())
    assert not {"trl", "datasets", "matplotlib"} & set(modules.split())


def test_experts_are_found_but_not_read_before_they_are_needed(home, monkeypatch):
    monkeypatch.setattr(SavedExpert, "load", lambda self: pytest.fail("read"))
    assert [find_expert(text).name for text in (str(home / "expert"), f"sums={home / 'expert'}")] == ["expert", "sums"]
