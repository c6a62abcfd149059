# SPDX-License-Identifier: Apache-2.0
"""
A trained adapter and held-out rows -> the folder of an expert: offsets, `result.json` and the card.

What `peft-svf train` does once training is over. Nothing here trains, and nothing prints.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..evaluation import BaseText, evaluate, paired_difference
from ..experts.hub import CARD_NAME, expert_card
from ..rows import Row
from ..tasks import Task, everyday_requests
from .run import z_statistics

RESULT_NAME = "result.json"


def write_expert(
    trainer: Any,
    task: Task,
    test: Sequence[Row],
    folder: str | os.PathLike[str],
    *,
    command: str,
    settings: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    base_model: str | None = None,
    license: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Save what a trainer has learned as an expert, compare it with the base, and return what `result.json` holds.

    The offsets come first, then `result.json`, then the card, each written whole: what fails late loses nothing.
    Secrets in the command and the settings are left out; paths are relative to the project.

    Args:
        trainer ([`ReinforceTrainer`], [`SupervisedTrainer`] or [`EvolutionTrainer`]):
            After `train()`.
        test (`Sequence[Row]`):
            Rows of one form that chose nothing, neither weights nor checkpoint.
        command (`str`), settings (`Mapping`, *optional*):
            What repeats the run, and the contents of the file that it names, with values that JSON has.
        seconds (`float`, *optional*):
            Wall clock of training.
        base_model, license (`str`, *optional*):
            For the card: the base's Hub id, if not the name it was loaded by, and the expert's license.
        task, options:
            As in [`evaluate`].
    """
    folder, model = Path(folder), trainer.model
    model.save_pretrained(folder, save_embedding_layers=False)
    trainer.save_key(folder)
    name = model.peft_config["default"].base_model_name_or_path
    result = {
        "command": files.public(command),
        "settings": files.public(settings),
        "versions": files.versions(),
        "base_model": files.public(name),
        "task": task.name,
        "split": "test",
        **_training(trainer),
        "seconds": None if seconds is None else round(seconds),
        **_measurements(trainer, task, test, **options),
    }
    base_model = base_model or name
    facts = result["card"] = _card_facts(result, trainer.args, base_model) if base_model else {}
    files.write(folder / RESULT_NAME, json.dumps(result, indent=1))
    if base_model:
        facts = {"base_dtype": model.get_base_model().dtype, **facts}
        card = expert_card(folder, base_model=_card_name(base_model), license=license, **facts)
        files.write(folder / CARD_NAME, str(card))
    return result


def _training(trainer: Any) -> dict[str, Any]:
    """Describe the run: what it minimised, how far it got, and how far z moved."""
    args, state, weight = trainer.args, trainer.state, getattr(trainer.args, "retention", 0)
    numbers = sum(p.numel() for key, p in trainer.model.named_parameters() if ".svf_offset.default." in key)
    z = {key.removeprefix("z/"): value for key, value in z_statistics(trainer.model).items() if key.count("/") == 1}
    kept = f" + {weight:g} KL(base || policy) on everyday answers of the base" if weight else ""
    return {
        "objective": trainer.objective + kept,
        "seed": args.seed,
        "steps": state.global_step,
        "best_step": state.best_global_step if args.load_best_model_at_end else None,  # else the last
        "strength": trainer.strength,
        "z": {"numbers": numbers, **z},
        "curve": [entry for entry in state.log_history if {"loss", "eval_reward", "reward"} & entry.keys()],
    }


def _measurements(trainer: Any, task: Task, test: Sequence[Row], **options: Any) -> dict[str, Any]:
    """Compare the expert with its base on test rows and, if the run was to keep it, on the base's own text."""
    model, reader = trainer.model, trainer.processing_class
    expert = evaluate(model, reader, test, task=task, **options)
    with model.disable_adapter():
        base = evaluate(model, reader, test, task=task, **options)
        watched = trainer.args.keep_text is not None or getattr(trainer.args, "retention", 0.0) > 0
        text = BaseText.of(model, reader, everyday_requests("test", 32)) if watched else None
    gain, interval = paired_difference(expert, base)
    return {
        "form": expert.form,
        "base": base.to_json(),
        "expert": expert.to_json(),
        "gain": gain,
        "gain_interval": interval,
        "text_loss": text and text.loss(model, reader),
    }


def _card_name(base: str) -> str:
    """Return the Hub id of a base, or the last part of a local folder, which a card can show."""
    if not Path(base).exists():
        return base
    return re.sub(r"[^\w.]+|\.\.+|--+", "-", Path(base).resolve().name).strip("-._") or "base"


def _card_facts(result: Mapping[str, Any], args: Any, base: str) -> dict[str, Any]:
    """List what a card shows of the run, in order, and the row of its table of results."""
    local = _card_name(base) != base
    expert, (low, high) = result["expert"], result["gain_interval"]
    if population := getattr(args, "population", None):
        questions = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        step = f"{questions} questions with {population} members"
    elif samples := getattr(args, "num_generations", None):
        step = f"{args.generation_batch_size // samples} questions with {samples} samples"
    else:
        step = f"{args.train_batch_size * args.gradient_accumulation_steps * args.world_size} right answers"
    training = {
        "bits of the base": None if local or base == result["base_model"] else result["base_model"],
        "name of the base": "that of a local folder: the Hub may have none like it" if local else None,
        "data": f"{result['task']}, training split, {result['form']} form",
        "objective": result["objective"],
        "steps": f"{result['steps']} of {step}",
        "best step": result["best_step"],
        "learning rate": args.learning_rate,
        "seed": result["seed"],
        "seconds": result["seconds"],
        "command": f"`{result['command']}`",
    }
    measurement = {
        "task": result["task"],
        "split": result["split"],
        "metric": f"accuracy ({result['form']} form)",
        "value": round(expert["accuracy"], 4),
        "interval": [round(end, 4) for end in expert["interval"]],
        "base": round(result["base"]["accuracy"], 4),
        "gain": f"{result['gain']:+.3f} [{low:+.3f}, {high:+.3f}]",
        "n": expert["n"],
    }
    return {"training": training, "results": [measurement]}
