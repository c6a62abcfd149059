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

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .. import files
from ..evaluation import Summary, evaluate, paired_difference
from ..experts.hub import CARD_NAME, expert_card
from ..rows import Row
from ..tasks import Task
from .run import z_statistics

RESULT_NAME = "result.json"


def held_out(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    task: Task | None = None,
    batch_size: int = 16,
    **generation: Any,
) -> dict[str, Any]:
    """
    Compare the active adapter with the base on rows that chose nothing, neither weights nor checkpoint.

    Args:
        model (`PeftModel`):
            With the adapter that is compared active.
        tokenizer, rows, task, batch_size, generation:
            As in [`evaluate`].

    Returns:
        `dict`: the summaries `base` and `expert` ([`Summary`]), the paired `gain` in accuracy and its
        95 % `gain_interval`.
    """
    expert = evaluate(model, tokenizer, rows, batch_size, task, **generation)
    with model.disable_adapter():
        base = evaluate(model, tokenizer, rows, batch_size, task, **generation)
    gain, interval = paired_difference(expert, base)
    return {"base": base, "expert": expert, "gain": gain, "gain_interval": interval}


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
    batch_size: int = 16,
    **generation: Any,
) -> dict[str, Any]:
    """
    Save what a trainer has learned as an expert, test it, and record how it was made and how good it is.

    The offsets come first, then `result.json`, then the card, each written whole: what fails late loses nothing.
    Secrets in the command and the settings are left out; paths are relative to the project.

    Args:
        trainer ([`ReinforceTrainer`]):
            After `train()`: its model, processing class, state and settings are read.
        task ([`Task`]):
            What was trained.
        test (`Sequence[Mapping]`):
            Rows of one form that were never trained on.
        folder (`str` or path):
            Of the expert.
        command (`str`):
            Repeats the run.
        settings (`Mapping`, *optional*):
            What a file that the command names says, with values that JSON has.
        seconds (`float`, *optional*):
            Wall clock of training.
        base_model (`str`, *optional*):
            Hub id of the base for the card; default what the model was loaded from. A base without any name gets no
            card.
        license (`str`, *optional*):
            Of the expert, such as `"apache-2.0"`.
        batch_size (`int`):
            Rows per forward of the test.
        generation:
            Arguments of `generate` for rows of the generated form.

    Returns:
        `dict`: what `result.json` holds.
    """
    folder, model, state = Path(folder), trainer.model, trainer.state
    model.save_pretrained(folder, save_embedding_layers=False)
    found = held_out(model, trainer.processing_class, test, task, batch_size, **generation)
    z = {key.removeprefix("z/"): value for key, value in z_statistics(model).items() if key.count("/") == 1}
    name = model.peft_config["default"].base_model_name_or_path
    result = {
        "command": files.public(command),
        "settings": files.public(settings),
        "versions": files.versions(),
        "base_model": files.public(name),
        "task": task.name,
        "form": found["expert"].form,
        "split": "test",
        "seed": trainer.args.seed,
        "steps": state.global_step,
        "best_step": state.best_global_step if trainer.args.load_best_model_at_end else None,  # else the last
        "seconds": None if seconds is None else round(seconds),
        **{key: value.to_json() if isinstance(value, Summary) else value for key, value in found.items()},
        "z": {"numbers": sum(p.numel() for key, p in model.named_parameters() if ".svf_offset.default." in key), **z},
        "curve": [entry for entry in state.log_history if "eval_reward" in entry or "reward" in entry],
    }
    files.write(folder / RESULT_NAME, json.dumps(result, indent=1))
    if base := base_model or name:
        card = expert_card(
            folder,
            base_model=_card_name(base),
            base_dtype=model.get_base_model().dtype,
            training=_training(result, trainer.args, str(base)),
            results=[_measurement(result)],
            license=license,
        )
        files.write(folder / CARD_NAME, str(card))
    return result


def _card_name(base: str) -> str:
    """Return the Hub id of a base, or the last part of a local folder, which a card can show."""
    if not Path(base).exists():
        return base
    return re.sub(r"[^\w.]+|\.\.+|--+", "-", Path(base).resolve().name).strip("-._") or "base"


def _training(result: Mapping[str, Any], args: Any, base: str) -> dict[str, Any]:
    """List what a card says about the run, in order."""
    local = _card_name(base) != base
    population = getattr(args, "population", None)
    if population is None:
        step = f"{args.generation_batch_size // args.num_generations} questions with {args.num_generations} samples"
    else:
        questions = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        step = f"{questions} questions with {population} members"
    return {
        "bits of the base": None if local or base == result["base_model"] else result["base_model"],
        "name of the base": "that of a local folder: the Hub may have none like it" if local else None,
        "data": f"{result['task']}, training split, {result['form']} form",
        "steps": f"{result['steps']} of {step}",
        "best step": result["best_step"],
        "learning rate": args.learning_rate,
        "seed": result["seed"],
        "seconds": result["seconds"],
        "command": f"`{result['command']}`",
    }


def _measurement(result: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a card's table of results."""
    expert, (low, high) = result["expert"], result["gain_interval"]
    return {
        "task": result["task"],
        "split": result["split"],
        "metric": f"accuracy ({result['form']} form)",
        "value": round(expert["accuracy"], 4),
        "interval": [round(x, 4) for x in expert["interval"]],
        "base": round(result["base"]["accuracy"], 4),
        "gain": f"{result['gain']:+.3f} [{low:+.3f}, {high:+.3f}]",
        "n": expert["n"],
    }
