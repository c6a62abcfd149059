# SPDX-License-Identifier: Apache-2.0
"""Laws of interrupted and divided runs: what is resumed, or shared by processes, is the one run it would have been."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from trainers import (
    CHOICE_ROWS,
    EVALUATED,
    FORMS,
    RUN,
    Evolving,
    divided,
    environment,
    evolution_of,
    in_two_processes,
    random_rows,
    right_choice,
    same,
    soft_model,
    trained_z,
    trainer_of,
)

from peft_svf.training.run import last_checkpoint

SAVED = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "more",
    [
        {"beta": 0.1, "gradient_accumulation_steps": 2, "retention": 5.0, **EVALUATED},
        {"steps_per_generation": 2, "save_steps": 2},
    ],
    ids=["accumulated", "old rollouts"],
)
def test_every_kind_of_run_resumes_exactly(more, form, tmp_path):
    rows, reward = FORMS[form]
    settings = {**RUN, **SAVED, "max_steps": 4, "per_device_train_batch_size": 6, **more}
    whole = trainer_of(tmp_path / "whole", 6 * rows, reward, **settings)
    whole.train()
    again = trainer_of(tmp_path / "again", 6 * rows, reward, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.texts == whole.texts[-len(again.texts) :]
    assert torch.equal(trained_z(again), trained_z(whole))


@pytest.fixture(scope="module", params=["reinforce", "evolution"])
def whole_run(request, tmp_path_factory):
    """Three epochs of four steps, each in an order of its own."""
    folder, rows = tmp_path_factory.mktemp("whole"), random_rows(8)
    make, settings = trainer_of, {**RUN, **SAVED, "num_generations": 4, "per_device_train_batch_size": 8}
    settings["prompt_filter"] = True
    if request.param == "evolution":
        make, settings = evolution_of, {**SAVED, "per_device_train_batch_size": 2, "kind": Evolving}
    settings["max_steps"] = 12
    whole = make(folder, rows, right_choice, **settings)
    whole.train()
    assert whole.inputs[:4] != whole.inputs[4:8] != whole.inputs[8:]
    if request.param == "reinforce":
        assert any(log.get("prompts/replaced") for log in whole.state.log_history)
    return make, rows, settings, whole, folder


@pytest.mark.parametrize("step", [4, 5], ids=["end of first epoch", "second"])
def test_a_run_resumes_in_the_order_of_its_epoch_and_with_its_filter(step, whole_run, tmp_path):
    make, rows, settings, whole, folder = whole_run
    again = make(tmp_path, rows, right_choice, **settings)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert again.inputs == whole.inputs[step:]
    assert torch.equal(trained_z(again), trained_z(whole))


def test_early_stopping_goes_on_counting(tmp_path):
    def constant(completions, **_):
        return [0.5] * len(completions)

    settings = {**RUN, **EVALUATED, **SAVED, "early_stopping_patience": 3, "load_best_model_at_end": True}
    trainer_of(tmp_path, CHOICE_ROWS, constant, **{**settings, "max_steps": 2}).train()
    again = trainer_of(tmp_path, CHOICE_ROWS, constant, **{**settings, "max_steps": 9})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4  # the first is the best, then three no better: one of them before, two now


@pytest.mark.parametrize("damage", ["missing", "cut off", '"global_step": -3', '"epoch": "two"', "counter", "depth"])
def test_a_checkpoint_that_was_being_written_or_is_damaged_is_passed_over(damage, tmp_path):
    rows = random_rows(24)
    settings = {**RUN, **SAVED, "max_steps": 3}
    whole = trainer_of(tmp_path, rows, right_choice, **settings)
    whole.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    elif damage == "cut off":
        state.write_text(state.read_text()[:200])
    elif damage == "depth":
        state.write_text("[" * 100_000)
    elif damage == "counter":
        broken = {"EarlyStoppingCallback": {"args": {}, "attributes": {"early_stopping_patience_counter": "1"}}}
        state.write_text(json.dumps({**json.loads(state.read_text()), "stateful_callbacks": broken}))
    else:
        state.write_text(re.sub(damage.split(":")[0] + r": [\d.]+", damage, state.read_text()))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    again = trainer_of(tmp_path, rows, right_choice, **settings)
    with pytest.raises(ValueError, match=r"checkpoint-3' isn't a whole checkpoint.*earlier one, or --resume"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again.train(resume_from_checkpoint=True)
    assert again.texts == whole.texts[2:]
    assert torch.equal(trained_z(again), trained_z(whole))


def test_resuming_without_a_whole_checkpoint_says_so(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint in .* of 1 folders"):
        trainer_of(tmp_path, CHOICE_ROWS, right_choice, **RUN).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 0.5}])
def test_a_run_that_has_ended_is_not_trained_further(length, tmp_path):
    rows = random_rows(24)
    settings = {**RUN, **SAVED, **length, "lr_scheduler_type": "constant"}
    whole = trainer_of(tmp_path, rows, right_choice, **settings)
    whole.train()
    steps = whole.state.global_step
    again = trainer_of(tmp_path, rows, right_choice, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps > 0 and again.texts == []
    assert torch.equal(trained_z(again), trained_z(whole))
    longer = {name: 2 * value if value > 0 else value for name, value in length.items()}
    further = trainer_of(tmp_path, rows, right_choice, **settings | longer)
    further.train(resume_from_checkpoint=True)
    assert further.state.global_step == 2 * steps


def test_a_checkpoint_is_resumed_on_its_own_base_alone_and_then_in_silence(tmp_path, caplog):
    settings = {**RUN, **SAVED, "max_steps": 2}
    own, same_base, other = (soft_model(seed=seed) for seed in (0, 0, 5))
    own.name_or_path = same_base.name_or_path = other.name_or_path = "base"
    trainer_of(tmp_path, CHOICE_ROWS, right_choice, model=own, **settings).train()
    again = trainer_of(tmp_path, CHOICE_ROWS, right_choice, model=same_base, **settings | {"max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert "no fingerprint" not in caplog.text
    other = trainer_of(tmp_path, CHOICE_ROWS, right_choice, model=other, **settings)
    with pytest.raises(ValueError, match="does not belong to this base model"):
        other.train(resume_from_checkpoint=True)


KILLED = """
import os, signal, sys, trainers as t

folder, form, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows, reward = t.FORMS[form]

def deadly(*args, **kwargs):  # in the middle of a step: rolled out, not yet learned
    if trainer.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return reward(*args, **kwargs)

trainer = t.trainer_of(
    folder, 6 * rows, deadly, svf=t.SVFConfig(), save_strategy="steps", save_steps=2, warmup_steps=2, beta=0.1,
    **{**t.RUN, "max_steps": 6},
)
trainer.train(resume_from_checkpoint=step < 0 or None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(form, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(KILLED)

    def run(name, step):
        command = [sys.executable, str(script), str(tmp_path / name), form, str(step)]
        return subprocess.run(command, capture_output=True, text=True, env=environment())

    assert run("killed", 3).returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "killed").glob("checkpoint-*")} == {"checkpoint-2"}
    resumed, whole = run("killed", -1), run("whole", 99)
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-3000:] + whole.stderr[-3000:]
    one, other = (tmp_path / name / "checkpoint-6" for name in ("killed", "whole"))
    z, wanted = load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors")
    assert wanted and z.keys() == wanted.keys() and all(torch.equal(z[name], wanted[name]) for name in z)
    assert max(float(value.abs().max()) for value in wanted.values()) > 0.01
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert equal(*(torch.load(path / file, weights_only=False) for path in (one, other))), file
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (one, other)]
    ours, theirs = ([{k: v for k, v in entry.items() if k != "step_time"} for entry in log] for log in logs)
    assert ours == theirs and len(ours) == 6


def equal(one, other):
    """The same values in the same nesting, tensors and arrays to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "shape"):
        return bool((one == other).all())
    return one == other


DIVIDED = """
import sys, torch, trainers as t
trainer = t.divided(sys.argv[1], sys.argv[2], rows_each=int(sys.argv[3]))
trainer.train()
torch.save(t.trained_z(trainer), f"{sys.argv[1]}/{trainer.args.process_index}.pt")
trainer.accelerator.end_training()  # processes that leave at different times abort each other
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, rows_each", [("generate", 2), ("choice", 2), ("choice", 1), ("penalty", 6), ("right answers", 2)]
)
def test_two_processes_take_the_step_of_one_with_twice_the_batch(kind, rows_each, tmp_path):
    one, other = in_two_processes(DIVIDED, tmp_path, kind, rows_each)
    alone = divided(tmp_path, kind, 2 * rows_each)
    start = trained_z(alone).clone()
    alone.train()
    assert torch.equal(one, other)
    same(one - start, trained_z(alone) - start)
