# SPDX-License-Identifier: Apache-2.0
"""Laws of the command line: help is quick, a verb prints what the library returns, an error is one line."""

import json
import re
import shutil
import subprocess
import sys

import httpx
import pytest
import tiny_experts
import torch
from command_line import run, write_rows
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from peft_svf import Expert, Mixture, Transformer2Model
from peft_svf.adaptation.judge import block_effects
from peft_svf.cli import app, main
from peft_svf.cli.sources import find_task, read_examples, read_mixture
from peft_svf.evaluation import evaluate
from peft_svf.experts import make_key
from peft_svf.tuner.cache import cache_dir, usage


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny base, two experts, rows and prompts of known kind."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("math", "code")):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        tiny_experts.write(folder, name, seed=seed, of=base)
    write_rows(folder / "rows.jsonl")
    kinds = [{"prompt": f"{i} + {i} =", "expert": "math"} for i in range(3)]
    kinds += [{"prompt": f"def f{i}():", "expert": "code"} for i in range(3)]
    (folder / "kinds.jsonl").write_text("\n".join(map(json.dumps, kinds)))
    return folder


@pytest.fixture
def both(home):
    return ["--experts", home / "math", "--experts", home / "code"]


def loaded(home):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    return Transformer2Model(model, tiny_tokenizer(), [home / "math", home / "code"])


def test_help_of_a_verb_lists_its_options(capsys):
    for verb in (command.name for command in app.registered_commands):
        code, out, err = run(capsys, verb, "--help")
        assert code == 0 and f"peft-svf {verb}" in out and "--help" in out and not err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["--version"], ["eval", "--limit", "0"]])
def test_help_version_and_usage_errors_import_no_torch(argv):
    code = (
        "import sys; sys.argv = ['peft-svf', *sys.argv[1:]]; sys.orig_argv = ['python', *sys.argv]\n"
        "from peft_svf.cli import main; main()\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'torch', 'peft', 'transformers', 'trl', 'numpy', 'fastapi', 'uvicorn', 'gradio'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_shell_completion_imports_no_torch():
    environment = {"_PEFT_SVF_COMPLETE": "complete_bash", "COMP_WORDS": "peft-svf dis", "COMP_CWORD": "1"}
    code = f"import os, sys; os.environ.update({environment}); import peft_svf.cli\nsys.exit(peft_svf.cli.main([]))"
    code = "import sys; sys.argv = ['peft-svf']; sys.orig_argv = ['python', 'peft-svf']\n" + code
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["dispatch"] and not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_a_public_name_registers_on_the_command_line_too():
    code = (
        "import sys; sys.argv = ['peft-svf']; sys.orig_argv = ['python', 'peft-svf']\n"
        "import peft_svf; assert 'peft' not in sys.modules; from peft_svf import SVFConfig\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as types; print(types['SVF'] is SVFConfig)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_a_usage_error_is_one_line_and_code_2(home, both, tmp_path, capsys):
    task, few = ["--task", home / "rows.jsonl"], ["--examples", home / "rows.jsonl"]
    (tmp_path / "keys").write_text("\n")
    wrong = {
        ("trian",): "No such command 'trian'. Did you mean 'train'?",
        ("eval",): "Missing option '--task'",
        ("eval", *task): "Name --experts; only a base model alone, by --model, is measured without",
        ("eval", *task, "--model", "m", "--threshold", 0.5): "Name --experts",
        ("dispatch", *both): "There are no prompts",
        ("dispatch", *both, home / "code", "Sort a list"): "is an expert, not a prompt: write --experts before each",
        ("dispatch", *both, "--strategy", "prompt", "--probe", "p", "--", "x"): "--probe goes with --strategy probe",
        ("adapt", *both, *few, "--max-new-tokens", 3): "needs --task",
        ("serve",): "Name a base model with --experts, or a bundle",
        ("serve", home / "base", "--api-keys", tmp_path / "keys"): "holds no key",
    }
    for argv, message in wrong.items():
        code, out, err = run(capsys, *argv)
        assert code == 2 and not out and message in err, (argv, err)
        assert err.count("\n") == 1 and err.startswith("peft-svf"), err


def test_a_failure_is_one_line_and_code_1(home, both, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "answer": "y"}\n{"prompt": 3}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt"')
    (tmp_path / "empty.jsonl").write_text("\n")
    task, base = ["--task", home / "rows.jsonl"], ["--model", home / "base"]
    wrong = {
        ("train", "nothing.yaml"): "There is no file 'nothing.yaml': check its name",
        ("key", home / "math", "--prompts", "no.jsonl"): "There is no file 'no.jsonl'",
        ("import", "no.pt", *base, "--out", tmp_path / "new"): "There is no file 'no.pt'",
        ("key", tmp_path / "nobody", "--prompts", home / "kinds.jsonl"): "nobody",
        ("eval", "--model", tmp_path / "no", *task): str(tmp_path / "no"),
        ("eval", *both, "--task", "no_such_task"): "no_such_task",
        ("eval", *both, *task, "--out", tmp_path / "bad.jsonl"): "exists already: name another",
        ("eval", *both, *task, "--mixture", "physics=1"): "physics",
        ("eval", *both, *task, "--mixture", "math=1", "--mixture", "code"): "such as math=0.7; got 'code'",
        ("eval", *both, *task, "--experts", f"math={home / 'code'}"): "Two experts are called 'math'",
        ("eval", "--experts", f"base={home / 'math'}", *task): "can't be called 'base'",
        ("adapt", *both, "--examples", tmp_path / "bad.jsonl"): "line 2",
        ("adapt", *both, "--examples", tmp_path / "broken.jsonl"): "not JSON",
        ("adapt", *both, "--examples", tmp_path / "empty.jsonl"): "is empty: it needs one JSON object a line",
        ("adapt", *both, "--examples", home / "rows.jsonl", "--per-layer"): "name another place by --out",
        ("dispatch", *both, "--strategy", "classifier", "--", "x"): "needs a classifier",
        ("dispatch", *both, "--fit", home / "rows.jsonl", "--", "x"): "'None'",
    }
    for argv, message in wrong.items():
        code, _, err = run(capsys, *argv)
        assert code == 1 and message.lower() in err.splitlines()[-1].lower(), (argv, err)
        assert err.splitlines()[-1].startswith(f"peft-svf {argv[0]}: error: ") and "Traceback" not in err
    with pytest.raises((OSError, ValueError)):
        main(["--debug", "inspect", "/no/such/expert"])


def test_a_hub_that_cannot_be_reached_is_one_line(capsys, monkeypatch):
    def refuse(self, **options):
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(HfApi, "list_models", refuse)
    code, _, err = run(capsys, "search", "org/base")
    assert (code, err) == (1, "peft-svf search: error: [Errno 111] Connection refused\n")


def test_eval_writes_what_evaluate_returns(home, tmp_path, capsys):
    arguments = ["--experts", home / "math", "--experts", f"other_name={home / 'code'}", "--task", home / "rows.jsonl"]
    code, out, err = run(capsys, "eval", *arguments, "--out", tmp_path / "r.json", "--records")
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["command"].startswith("peft-svf eval --experts ")
    rows, model = find_task(str(home / "rows.jsonl")).rows("test"), loaded(home)
    for way, name in (("base", "other"), ("math", "math"), ("other_name", "code")):
        with model.using({name: 1.0}) as active:
            expected = evaluate(active, model.tokenizer, rows)
        assert result["summaries"][way]["accuracy"] == expected.accuracy
        assert len(result["summaries"][way]["records"]) == len(rows)
        assert re.search(rf"^{way} +{expected.accuracy:.3f} +\[{expected.interval[0]:.3f}, ", out, re.MULTILINE)
    gain = result["summaries"]["math"]["accuracy"] - result["summaries"]["base"]["accuracy"]
    assert result["gains"]["math"]["gain"] == pytest.approx(gain)


def test_eval_asks_for_letters_in_all_rotations_and_measures_text_lost(home, both, tmp_path, capsys):
    form = ["--form", "letter", "--rotations", 2, "--shots", 1, "--system", "Be brief.", "--everyday", 2, "--limit", 3]
    code, out, err = run(capsys, "eval", *both, "--task", home / "rows.jsonl", *form, "--out", tmp_path / "r.json")
    assert code == 0 and "letter form, n = 3" in out and "text lost" in out, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["form"] == "letter" and result["text_loss"].keys() == {"math", "code"}


def test_eval_without_experts_is_the_base(home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "eval", "--model", home / "base", "--task", home / "rows.jsonl", "--limit", 5)[0] == 0
    (path,) = tmp_path.glob("eval-rows-*.json")
    rows = find_task(str(home / "rows.jsonl")).rows("test", limit=5)
    expected = evaluate(tiny_model(), tiny_tokenizer(), rows).accuracy
    assert json.loads(path.read_text())["summaries"]["base"]["accuracy"] == expected


def test_eval_of_a_one_hot_mixture_is_that_expert_and_two_passes_answer_each_row(home, both, tmp_path, capsys):
    shared = ["eval", *both, "--task", home / "rows.jsonl", "--records"]
    assert run(capsys, *shared, "--out", tmp_path / "experts.json")[0] == 0
    first_pass = ["--strategy", "prompt", "--threshold", 1]
    code, out, err = run(capsys, *shared, "--out", tmp_path / "mixture.json", "--mixture", "code=1", *first_pass)
    assert code == 0 and "mixture: code 1.000, other 0.000" in out and "first pass (prompt): other" in out, err
    experts, mixture = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("experts", "mixture"))
    assert mixture["summaries"].keys() == {"base", "mixture", "two_pass"}
    assert mixture["summaries"]["mixture"]["records"] == experts["summaries"]["code"]["records"]
    # above the threshold of 1 is nothing: each row falls back to the base
    assert mixture["summaries"]["two_pass"]["accuracy"] == mixture["summaries"]["base"]["accuracy"]
    assert mixture["first_pass"]["chosen"] == {"other": len(mixture["summaries"]["two_pass"]["records"])}


def test_factor_fills_the_cache_once(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path))
    weights = len(Expert.load(home / "math").offsets)
    kinds = [part for kind in ("gate", "up", "down") for part in ("--target-modules", f"{kind}_proj")]
    code, out, _ = run(capsys, "factor", home / "base", *kinds)
    assert code == 0 and usage()[0] == weights
    assert f"{weights} of {weights} computed" in out and str(cache_dir()) in out
    code, out, _ = run(capsys, "factor", home / "base")
    assert code == 0 and f"0 of {weights} computed" in out


def test_inspect_shows_the_distance_from_1_of_each_layer_and_kind(home, tmp_path, capsys):
    code, out, err = run(capsys, "inspect", home / "code")
    assert code == 0, err
    offsets = load_file(home / "code" / "adapter_model.safetensors")
    kinds = re.search(r"^layer +(.*)$", out, re.MULTILINE)[1].split()
    assert sorted(kinds) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    for layer in range(2):
        cells = [offsets[f"base_model.model.model.layers.{layer}.{kind}.svf_offset.weight"] for kind in kinds]
        row = rf"^{layer} +" + " +".join(f"{d.abs().mean():.4f}" for d in cells) + " *$"
        assert re.search(row, out, re.MULTILINE)
    moved = torch.cat(list(offsets.values())).abs()
    assert f"mean |z-1| {moved.mean():.4f}, largest {moved.max():.4f}" in out


def test_inspect_measures_and_draws_what_each_block_does_to_examples(home, tmp_path, capsys):
    asked = ["--examples", home / "rows.jsonl", "--limit", 3, "--plot", tmp_path / "blocks.png"]
    code, out, err = run(capsys, "inspect", home / "code", *asked)
    assert code == 0, err
    rows, model = read_examples(home / "rows.jsonl")[:3], loaded(home)
    effects = block_effects(model.library, model.tokenizer, Mixture({"code": 1.0}), rows)
    for block, effect in effects.items():
        assert re.search(rf"^{re.escape(block)} +{re.escape(f'{effect.mean():+.3f}')}", out, re.MULTILINE)
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "inspect", home / "code", "--plot", tmp_path / "z.png")
    assert code == 2 and "--examples" in err


def test_key_gives_an_expert_the_key_that_python_makes(home, tmp_path, capsys):
    shutil.copytree(home / "math", tmp_path / "math")
    settings = ["--limit", 4, "--seed", 1, "--pooling", "last"]
    code, out, err = run(capsys, "key", tmp_path / "math", "--prompts", home / "kinds.jsonl", *settings)
    assert code == 0 and "4 prompts, read by 1 blocks" in out, err
    chats = [row["prompt"] for row in read_examples(home / "kinds.jsonl")]
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    expected = make_key(base, tiny_tokenizer(), chats, limit=4, seed=1, pooling="last")
    assert torch.equal(Expert.load(tmp_path / "math").key.states, expected.states)


def test_dispatch_prints_what_the_first_pass_chooses(home, both, tmp_path, capsys):
    prompts = ["what is larger", "a [b] c"]
    long = "x" * 400  # no file has a name of this length
    code, out, err = run(capsys, "dispatch", *both, "--plot", tmp_path / "p.png", "--", *prompts, long)
    assert code == 0 and (tmp_path / "p.png").exists(), err
    for prompt, mixture in zip(prompts, loaded(home).first_pass(prompts), strict=True):
        line = rf"^{mixture.choice} +{mixture.confidence:.2f} +{re.escape(prompt)} *$"
        assert re.search(line, out, re.MULTILINE), out


def test_a_fitted_probe_is_saved_and_decides_the_same_when_read(home, both, tmp_path, capsys):
    kinds, shared = home / "kinds.jsonl", ["dispatch", *both, "--probe", tmp_path / "fitted"]
    plot = ["--file", kinds, "--plot", tmp_path / "k.png"]
    code, fitted, err = run(capsys, *shared, "--fit", kinds, *plot)
    assert code == 0 and f"Wrote {tmp_path / 'fitted'}" in fitted and (tmp_path / "k.png").exists(), err
    code, read, err = run(capsys, *shared, "--file", kinds)
    assert code == 0 and read.splitlines()[-6:] == fitted.splitlines()[-7:-1], err


SEARCH = ["--population", 5, "--iterations", 2, "--elites", 0.4]


def test_adapt_saves_the_mixture_that_the_search_finds(home, both, tmp_path, capsys):
    few = write_rows(tmp_path / "few.jsonl", 4)
    options = [*SEARCH, "--seed", 3, "--low", -0.5, "--high", 2, "--state", tmp_path / "state.json"]
    plot = ["--out", tmp_path / "m.json", "--plot", tmp_path / "m.png"]
    code, out, err = run(capsys, "adapt", *both, "--examples", few, *options, *plot)
    assert code == 0 and (tmp_path / "m.png").exists() and (tmp_path / "state.json").exists(), err
    mixture = Mixture.load(tmp_path / "m.json")
    assert [mixture.provenance[key] for key in ("low", "high", "seed")] == [-0.5, 2.0, 3]
    for name in ("math", "code"):  # a weight of 0 has a row, too
        assert re.search(rf"^{name} +{mixture.alpha.get(name, 0.0):.3f} *$", out, re.MULTILINE)
    assert f"--mixture {tmp_path / 'm.json'}" in out


def test_weights_per_layer_become_an_expert(home, both, tmp_path, capsys):
    few = write_rows(tmp_path / "few.jsonl", 4)
    more = ["--per-layer", "--out", tmp_path / "sums", "--plot", tmp_path / "sums.png", "--max-tokens", 1]
    code, out, err = run(capsys, "adapt", *both, "--examples", few, *SEARCH, *more)
    assert code == 0 and "Ended by max_tokens after 1 iterations" in out, err
    assert Expert.load(tmp_path / "sums").offsets.keys() == Expert.load(home / "math").offsets.keys()
    assert re.search(r"^model\.layers\.1 ", out, re.MULTILINE)


def test_an_interrupted_search_prints_how_to_go_on(home, both, tmp_path, capsys, monkeypatch):
    from peft_svf.adaptation.judge import Judge

    def interrupted(judge, members):
        raise KeyboardInterrupt

    monkeypatch.setattr(Judge, "__call__", interrupted)
    shared = ["adapt", *both, "--examples", write_rows(tmp_path / "few.jsonl", 4), *SEARCH]
    for state, message in {(): "--state FILE", ("--state", tmp_path / "s.json"): str(tmp_path / "s.json")}.items():
        code, _, err = run(capsys, *shared, *state, "--out", tmp_path / "m.json")
        assert code == 130 and "the same command" in err and message in err


def test_a_mixture_is_a_file_or_names_with_weights(tmp_path):
    Mixture({"a": 0.3}).save(tmp_path / "m=1.json")
    assert read_mixture([str(tmp_path / "m=1.json")]).alpha == {"a": 0.3}
    assert read_mixture(["a=0.7", "b=-0.25"]).alpha == {"a": 0.7, "b": -0.25}
    with pytest.raises(FileNotFoundError, match="sums"):
        read_mixture(["sums"])
