# SPDX-License-Identifier: Apache-2.0
"""Laws of `eval`, `dispatch` and `adapt` beyond single experts: first passes, weights per layer, budgets."""

import json
import re

import pytest
import tiny_experts
import torch
from command_line import run, write_rows
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from peft_svf import Expert, Mixture, Transformer2Model, plots
from peft_svf.adaptation import FirstPass, Search, fit_calibration, fit_probe, fit_temperature
from peft_svf.adaptation.judge import Judge
from peft_svf.adaptation.probe import Probe
from peft_svf.cli import find_task
from peft_svf.evaluation import choice_logps

KINDS = [("1 + 1 =", "math"), ("9 - 4 =", "math"), ("write a loop", "code"), ("sort a list", "code"), ("hi", "other")]
KINDS += [("tell a joke", "other")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny base, random experts `code` and `math`, a classifier, rows, and prompts of known kind."""
    folder = tmp_path_factory.mktemp("first_pass")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("code", "math", "kinds")):
        tiny_experts.write(folder, name, seed, of=AutoModelForCausalLM.from_pretrained(folder / "base"))
    write_rows(folder / "rows.jsonl", 40)
    (folder / "kinds.jsonl").write_text("\n".join(json.dumps({"prompt": p, "expert": e}) for p, e in KINDS))
    return folder


@pytest.fixture(scope="module")
def model(home):
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    return Transformer2Model(base, tiny_tokenizer(), [home / "code", home / "math"], home / "kinds")


def both(home):
    return ["--experts", home / "code", home / "math"]


def chats(prompts):
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def fitted(model):
    prompts, kinds = zip(*KINDS, strict=True)
    return fit_probe(model.library, model.tokenizer, chats(prompts), kinds)


# What is typed -> what the same is in Python.
FIRST_PASSES = {
    "prompt": (["--strategy", "prompt"], {}),
    "soft": (["--strategy", "prompt", "--soft"], {"soft": True}),
    "mix": (
        ["--strategy", "prompt", "--threshold", "0.3", "--fallback", "mix"],
        {"threshold": 0.3, "fallback": "mix"},
    ),
    "hot": (["--strategy", "prompt", "--temperature", "3", "--soft"], {"temperature": 3.0, "soft": True}),
    "written": (["--strategy", "prompt", "--read", "generate"], {"read": "generate"}),
}
every_first_pass = pytest.mark.parametrize("case", [*FIRST_PASSES, "classifier", "probe"])


def typed(case, home, model):
    """The arguments of a first pass, and the same in Python."""
    if case == "classifier":
        return ["--classifier", home / "kinds"], FirstPass("classifier")
    if case == "probe":
        return ["--strategy", "probe", "--fit", home / "kinds.jsonl"], FirstPass("probe", probe=fitted(model))
    options, settings = FIRST_PASSES[case]
    return options, FirstPass(**settings)


# --- eval


@every_first_pass
def test_two_passes_answer_each_row_as_the_mixture_that_its_first_pass_chose(case, home, model, tmp_path, capsys):
    options, settings = typed(case, home, model)
    arguments = ["eval", *both(home), "--task", home / "rows.jsonl", "--records", "--out", tmp_path / "r.json"]
    code, out, err = run(capsys, *arguments, *options)
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    rows = find_task(str(home / "rows.jsonl")).rows("test")
    mixtures = model.first_pass([row["prompt"] for row in rows], first_pass=settings)
    records, right = found["summaries"]["two_pass"]["records"], 0
    assert len(rows) == len(records) > 2
    for row, mixture, record in zip(rows, mixtures, records, strict=True):
        with model.using(mixture) as active, torch.no_grad():
            shares = choice_logps(active, model.tokenizer, [row])[0].softmax(-1)
        assert record["id"] == row["id"] and record["dispatch"]["choice"] == mixture.choice
        assert record["dispatch"]["alpha"] == pytest.approx(mixture.alpha, abs=1e-5)
        assert record["choice"] == int(shares.argmax())
        assert record["probability"] == pytest.approx(float(shares.max()), abs=1e-4)
        right += int(shares.argmax()) == row["label"]
    assert found["summaries"].keys() == {"base", "code", "math", "two_pass"}
    assert found["summaries"]["two_pass"]["accuracy"] == pytest.approx(right / len(rows))
    counts = {name: [m.choice for m in mixtures].count(name) for name in {m.choice for m in mixtures}}
    assert found["first_pass"]["chosen"] == counts
    assert re.search(rf"^two passes +{right / len(rows):.3f} ", out, re.MULTILINE)
    for name, count in counts.items():
        assert re.search(rf"^chosen by the first pass.*{name} {count}\b", out, re.MULTILINE)


def test_a_threshold_that_nothing_reaches_leaves_the_base(home, tmp_path, capsys):
    shared = [*both(home), "--task", home / "rows.jsonl", "--records", "--out", tmp_path / "r.json"]
    code, _, _ = run(capsys, "eval", *shared, "--strategy", "prompt", "--threshold", "1")
    found = json.loads((tmp_path / "r.json").read_text())
    base, two_pass = (found["summaries"][way]["records"] for way in ("base", "two_pass"))
    assert code == 0 and found["first_pass"]["chosen"] == {"other": len(base)}
    assert [{**record, "dispatch": None} for record in base] == [{**record, "dispatch": None} for record in two_pass]
    assert found["gains"]["two_pass"]["gain"] == 0.0


def test_a_probe_that_was_saved_while_it_was_fitted_decides_the_same(home, model, tmp_path, capsys):
    shared = ["eval", *both(home), "--task", home / "rows.jsonl", "--mixture", "math=1", "--strategy", "probe"]
    fit = ["--fit", home / "kinds.jsonl", "--probe", tmp_path / "probe"]
    assert run(capsys, *shared, *fit, "--records", "--out", tmp_path / "fit.json")[0] == 0
    assert torch.equal(Probe.load(tmp_path / "probe").weight, fitted(model).weight)
    saved = ["--probe", tmp_path / "probe", "--records", "--out", tmp_path / "saved.json"]
    assert run(capsys, *shared, *saved)[0] == 0
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("fit", "saved"))
    assert one["summaries"].keys() == {"base", "mixture", "two_pass"}
    assert one["summaries"]["two_pass"]["records"] == other["summaries"]["two_pass"]["records"]


# --- dispatch


@every_first_pass
def test_dispatch_decides_as_first_pass_does(case, home, model, capsys):
    options, settings = typed(case, home, model)
    prompts = ["what is larger", "5 + 3 =", "write a program"]
    code, out, err = run(capsys, "dispatch", *prompts, *both(home), *options)
    assert code == 0, err
    for prompt, mixture in zip(prompts, model.first_pass(prompts, first_pass=settings), strict=True):
        (line,) = re.findall(rf"^(.*\S) +{re.escape(prompt)}$", out, re.MULTILINE)
        assert line.startswith(mixture.choice) and f" {mixture.confidence:.2f}" in line
        if mixture.alpha not in ({}, {mixture.choice: 1.0}):
            assert all(f"{name} {weight:.3f}" in line for name, weight in mixture.alpha.items())


def test_prompts_of_known_kind_fit_the_temperature(home, model, capsys):
    code, out, _ = run(capsys, "dispatch", "x + 1", *both(home), "--strategy", "prompt", "--fit", home / "kinds.jsonl")
    prompts, kinds = zip(*KINDS, strict=True)
    temperature = fit_temperature(model.library, model.tokenizer, chats(prompts), kinds)
    (mixture,) = model.first_pass(["x + 1"], first_pass=FirstPass(temperature=temperature))
    assert code == 0 and f"temperature fitted to {len(KINDS)} prompts: {temperature:.3f}" in out
    assert re.search(rf"^{mixture.choice} +{mixture.confidence:.2f} +x \+ 1$", out, re.MULTILINE)


@pytest.mark.parametrize("strategy", ["prompt", "classifier"])
def test_a_calibration_that_was_saved_while_it_was_fitted_decides_the_same(strategy, home, model, tmp_path, capsys):
    prompts, kinds = zip(*KINDS, strict=True)
    given = (model.library, model.tokenizer, chats(prompts), kinds)
    settings = FirstPass(strategy, calibration=fit_calibration(*given, FirstPass(strategy)), soft=True)
    (mixture,) = model.first_pass(["x + 1"], first_pass=settings)
    classifier = ["--classifier", home / "kinds"] if strategy == "classifier" else []
    shared = ["dispatch", "x + 1", *both(home), *classifier, "--strategy", strategy, "--soft"]
    shared += ["--calibration", tmp_path / "calibration"]
    said = ", ".join(f"{name} {weight:.3f}" for name, weight in mixture.alpha.items())
    for fit in (["--fit", home / "kinds.jsonl"], []):
        code, out, err = run(capsys, *shared, *fit)
        assert code == 0, err
        assert re.search(rf"^{mixture.choice} +{mixture.confidence:.2f} +{said}, other .* x \+ 1$", out, re.MULTILINE)
    assert torch.equal(Probe.load(tmp_path / "calibration").weight, settings.calibration.weight)


def drawn(monkeypatch, name):
    """The arguments of a figure's panels, each time one is drawn."""
    found, real = [], getattr(plots, name)
    monkeypatch.setattr(plots, name, lambda axes, *args: found.append(args) or real(axes, *args))
    return found


def test_prompts_of_known_kind_are_drawn_by_kind_and_others_by_their_probabilities(
    home, model, tmp_path, capsys, monkeypatch
):
    by_kind, singly = drawn(monkeypatch, "draw_decisions"), drawn(monkeypatch, "draw_probabilities")
    shared = ["dispatch", *both(home), "--strategy", "prompt", "--file", home / "kinds.jsonl", "--plot"]
    assert run(capsys, *shared, tmp_path / "kinds.png")[0] == 0
    decided = model.first_pass(chats([prompt for prompt, _ in KINDS]), first_pass="prompt")
    counts = {kind: {} for _, kind in KINDS}
    for (_, kind), mixture in zip(KINDS, decided, strict=True):
        counts[kind][mixture.choice] = counts[kind].get(mixture.choice, 0) + 1
    assert [found[0] for found in by_kind] == [counts] and not singly
    assert run(capsys, shared[0], "of no kind", *shared[1:], tmp_path / "all.png")[0] == 0
    assert [len(found[0]) for found in singly] == [1 + len(KINDS)] and len(by_kind) == 1


# --- adapt


def few(path, count=4):
    return write_rows(path, count)


SEARCH = ["--population", 5, "--iterations", 2, "--elites", 0.4]
AS_PYTHON = {"population": 5, "iterations": 2, "elites": 0.4}


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]


def test_weights_per_layer_become_an_expert_that_eval_takes(home, tmp_path, capsys, monkeypatch):
    layered = drawn(monkeypatch, "draw_layers")
    arguments = ["adapt", *both(home), "--examples", few(tmp_path / "few.jsonl"), *SEARCH, "--method", "cma"]
    more = ["--per-layer", "--out", tmp_path / "sums", "--plot", tmp_path / "sums.png"]
    code, out, err = run(capsys, *arguments, *more)
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    model = Transformer2Model(base, tiny_tokenizer(), [home / "code", home / "math"])
    search = Search(method="cma", per_layer=True, **AS_PYTHON)
    mixture = model.adapt(rows_of(tmp_path / "few.jsonl"), search=search, name="sums")
    found, expected = Expert.load(tmp_path / "sums"), model.library.expert("sums")
    assert found.offsets.keys() == expected.offsets.keys()
    for module, offset in expected.offsets.items():
        torch.testing.assert_close(found.offsets[module], offset)
    assert [(list(layers), title) for layers, title in layered] == [(list(mixture.provenance["layers"]), "sums")]
    for block, row in mixture.provenance["layers"].items():
        assert re.search(rf"^{block} +" + " +".join(f"{w:.3f}" for w in row.values()) + "$", out, re.MULTILINE)
    shared = ["eval", "--experts", tmp_path / "sums", "--task", home / "rows.jsonl", "--limit", 3]
    assert run(capsys, *shared, "--out", tmp_path / "r.json")[0] == 0
    assert "sums" in json.loads((tmp_path / "r.json").read_text())["summaries"]


def test_the_range_of_the_weights_their_name_and_a_held_out_file_are_those_of_python(home, tmp_path, capsys):
    checks = few(tmp_path / "checks.jsonl", 3)
    more = ["--low", -0.5, "--high", 2, "--name", "wide", "--holdout", checks, "--temperature", 3]
    more += ["--out", tmp_path / "m.json"]
    code, _, err = run(capsys, "adapt", *both(home), "--examples", few(tmp_path / "few.jsonl"), *SEARCH, *more)
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    model = Transformer2Model(base, tiny_tokenizer(), [home / "code", home / "math"])
    search = Search(low=-0.5, high=2.0, temperature=3, **AS_PYTHON)
    expected = model.adapt(rows_of(tmp_path / "few.jsonl"), search=search, name="wide", holdout=rows_of(checks))
    found = Mixture.load(tmp_path / "m.json")
    assert found.alpha == pytest.approx(expected.alpha) and found.provenance["name"] == "wide"
    assert [found.provenance[key] for key in ("low", "high", "temperature")] == [-0.5, 2.0, 3.0]
    assert found.provenance["held_out"]["examples"] == 3


def test_a_budget_ends_the_search_and_is_named(home, tmp_path, capsys):
    arguments = [
        "adapt",
        *both(home),
        "--examples",
        few(tmp_path / "few.jsonl"),
        *SEARCH,
        "--out",
        tmp_path / "m.json",
    ]
    code, out, _ = run(capsys, *arguments, "--max-tokens", 1)
    assert code == 0 and "Ended by max_tokens after 1 of 2 iterations" in out
    assert len(Mixture.load(tmp_path / "m.json").provenance["history"]) == 1


def test_an_interrupted_search_says_how_it_goes_on_and_a_finished_one_that_it_has_ended(
    home, tmp_path, capsys, monkeypatch
):
    shared = ["adapt", *both(home), "--examples", few(tmp_path / "few.jsonl"), *SEARCH, "--out", tmp_path / "m.json"]
    state = ["--state", tmp_path / "state.json"]
    judged, real = [], Judge.__call__

    def interrupted(judge, members):
        judged.append(members)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return real(judge, members)

    monkeypatch.setattr(Judge, "__call__", interrupted)
    code, _, err = run(capsys, *shared, *state)
    assert code == 130 and err.strip().endswith(f"Interrupted: the same command goes on from {tmp_path}/state.json.")
    assert run(capsys, *shared, *state)[0] == 0
    judged[1:] = []
    code, _, err = run(capsys, *shared[:-1], tmp_path / "n.json")
    assert code == 130 and "begins anew; with --state FILE it would go on" in err
    code, _, err = run(capsys, *shared, *state)
    assert code == 2 and "from a search that has ended" in err and "peft-svf eval --mixture" in err


# --- what a user can get wrong


def wrong(home, tmp_path):
    (tmp_path / "unlabelled.jsonl").write_text('{"prompt": "x", "expert": "math"}\n{"prompt": "y"}\n')
    (tmp_path / "unknown.jsonl").write_text('{"prompt": "x", "expert": "maths"}\n{"prompt": "y", "expert": "code"}\n')
    (tmp_path / "one.jsonl").write_text('{"prompt": "x", "expert": "math"}\n{"prompt": "y", "expert": "code"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "probe.json").write_text("{}")
    few(tmp_path / "few.jsonl")
    two = both(home)
    eval_ = ["eval", *two, "--task", home / "rows.jsonl", "--out", tmp_path / "r.json"]
    dispatch = ["dispatch", "x", *two]
    adapt = ["adapt", *two, "--examples", tmp_path / "few.jsonl", "--out", tmp_path / "m.json"]
    probe = ["--strategy", "probe"]
    return {
        "no such strategy": ([*eval_, "--strategy", "guess"], "invalid choice: 'guess'"),
        "no experts": (["eval", "--model", home / "base", "--task", home / "rows.jsonl", "--soft"], "--experts"),
        "no first pass": ([*eval_, "--soft"], "--soft is of a first pass"),
        "no classifier": ([*dispatch, "--strategy", "classifier"], "needs a classifier: name it by --classifier"),
        "no probe": ([*eval_, *probe], "needs a probe: name it by --probe, or prompts to fit one to by --fit"),
        "probe is not there": ([*dispatch, *probe, "--probe", tmp_path / "nothing"], "holds no probe"),
        "two strategies": ([*dispatch, "--strategy", "prompt", "--probe", tmp_path], "--probe goes with"),
        "classifier unused": (
            [*dispatch, *probe, "--classifier", home / "kinds", "--probe", "p"],
            "--classifier goes",
        ),
        "classifier not there": ([*dispatch, "--classifier", tmp_path / "nobody"], "nobody"),
        "threshold": (
            [*eval_, "--strategy", "prompt", "--threshold", "2"],
            "--threshold: expected a number from 0 to",
        ),
        "temperature": ([*dispatch, "--temperature", "0"], "--temperature: expected a number above 0, got '0'"),
        "fallback": ([*dispatch, "--fallback", "none"], "invalid choice: 'none'"),
        "reading": ([*dispatch, "--read", "aloud"], "invalid choice: 'aloud'"),
        "probe that writes": ([*dispatch, *probe, "--probe", "p", "--read", "generate"], "--read generate"),
        "two temperatures": ([*dispatch, "--fit", home / "kinds.jsonl", "--temperature", "2"], "--fit finds"),
        "calibrated probe": ([*dispatch, *probe, "--probe", "p", "--calibration", "c"], "--calibration goes with"),
        "calibration is not there": ([*dispatch, "--calibration", tmp_path / "nothing"], "nothing"),
        "calibration is there": (
            [*dispatch, "--fit", home / "kinds.jsonl", "--calibration", tmp_path],
            "name another place by --calibration",
        ),
        "calibration of no strategy": ([*eval_, "--calibration", "c"], "--calibration is of a first pass"),
        "no labels file": ([*dispatch, *probe, "--fit", tmp_path / "nothing.jsonl"], "nothing.jsonl"),
        "no label": ([*dispatch, *probe, "--fit", tmp_path / "unlabelled.jsonl"], "Line 2 of"),
        "no such label": ([*dispatch, *probe, "--fit", tmp_path / "unknown.jsonl"], "no expert 'maths'"),
        "too few of a kind": ([*dispatch, *probe, "--fit", tmp_path / "one.jsonl"], "two or more prompts each"),
        "no prompts to fit": ([*dispatch, *probe, "--fit", tmp_path / "empty.jsonl"], "has no line"),
        "probe is there": (
            [*dispatch, *probe, "--fit", home / "kinds.jsonl", "--probe", tmp_path],
            "is there already",
        ),
        "taken name": (["eval", "--experts", f"base={home / 'math'}", *eval_[4:]], "An expert called 'base'"),
        "no row": ([*eval_, "--limit", "0"], "--limit: expected a whole number from 1, got '0'"),
        "no batch": ([*eval_, "--batch-size", "none"], "--batch-size: expected a whole number from 1, got 'none'"),
        "no range": ([*adapt, "--low", "1", "--high", "0.5"], "--low and --high"),
        "infinite range": ([*adapt, "--high", "inf"], "--high: expected a number, got 'inf'"),
        "no name": (["adapt", *two, "--examples", tmp_path / "few.jsonl", "--per-layer"], "name it by --name"),
        "name of an expert": ([*adapt, "--per-layer", "--name", "math"], "An expert of this library is called 'math'"),
        "folder is there": ([*adapt[:-1], home, "--per-layer"], "is there already"),
        "holdout": ([*adapt, "--holdout", "some"], "--holdout is leave-one-out, none"),
        "no method": ([*adapt, "--method", "walk"], "There is no search 'walk'"),
        "no tokens": ([*adapt, "--max-tokens", "-1"], "--max-tokens: expected a whole number from 1"),
        "no seconds": ([*adapt, "--max-seconds", "0"], "--max-seconds: expected a number above 0"),
        "nothing generated": ([*adapt, "--max-new-tokens", "9"], "--max-new-tokens is of generated answers"),
    }


def test_what_a_user_gets_wrong_is_one_line_and_code_2(home, tmp_path, capsys):
    for case, (argv, said) in wrong(home, tmp_path).items():
        code, out, err = run(capsys, *argv)
        assert code == 2, (case, out, err)
        last = err.strip().splitlines()[-1]
        assert last.startswith(f"peft-svf {argv[0]}: error: ") and said in last, (case, last)
        assert "Traceback" not in err, case
    assert not (tmp_path / "r.json").exists() and not (tmp_path / "m.json").exists()
