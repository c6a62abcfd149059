# SPDX-License-Identifier: Apache-2.0
"""
A trained adapter and held-out rows -> the folder of an expert: offsets, `result.json` and the card.

What `peft-svf train` does once training is over. Nothing here trains, and nothing prints.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..evaluation import Summary, evaluate, paired_difference
from ..experts.expert import OFFSET_KEY, read_tensors
from ..experts.hub import CARD_NAME, expert_card
from ..rows import Row
from ..tasks import Task
from .run import z_statistics

PACKAGES = ("peft-svf", "torch", "transformers", "peft", "trl")
RESULT_NAME = "result.json"


def versions() -> dict[str, str]:
    """The versions of this package and of those that decide a number, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it: what was there stays until the new one is whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.writing")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(target)


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
    Save what a trainer has learned as an expert, test it, and write down how it was made and how good it is.

    The offsets come first, then `result.json`, then the card, each written whole: what fails late loses nothing.

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
    result = {
        "command": command,
        "settings": settings,
        "versions": versions(),
        "base_model": model.peft_config["default"].base_model_name_or_path,
        "task": task.name,
        "form": found["expert"].form,
        "split": "test",
        "seed": trainer.args.seed,
        "steps": state.global_step,
        "best_step": state.best_global_step if trainer.args.load_best_model_at_end else None,  # else the last
        "seconds": None if seconds is None else round(seconds),
        **{key: value.to_json() if isinstance(value, Summary) else value for key, value in found.items()},
        "z": {"numbers": sum(t.numel() for key, t in read_tensors(folder).items() if OFFSET_KEY.fullmatch(key)), **z},
        "curve": [entry for entry in state.log_history if "eval_reward" in entry or "reward" in entry],
    }
    write_file(folder / RESULT_NAME, json.dumps(result, indent=1))
    if named := base_model or result["base_model"]:
        dtype = model.get_base_model().dtype
        write_file(folder / CARD_NAME, _card(folder, result, trainer.args, str(named), dtype, license))
    return result


def _step(args: Any) -> str:
    """What one step sees, of the settings of either trainer."""
    if (members := getattr(args, "population", None)) is not None:
        questions = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return f"{questions} questions with {members} members"
    return f"{args.generation_batch_size // args.num_generations} questions with {args.num_generations} samples"


def _card(folder: Path, result: Mapping[str, Any], args: Any, base: str, dtype: Any, license: str | None) -> str:
    base_id = base
    if Path(base).exists():  # a folder of this machine: its last part is all that a card can say of it
        base_id = re.sub(r"[^\w.]+|\.\.+|--+", "-", Path(base).resolve().name).strip("-._") or "base"
    form = {"choice": "softmax over the options' log-likelihoods", "generate": "generated answers"}[result["form"]]
    training = {
        "bits of the base": result["base_model"] if base_id == base != result["base_model"] else None,
        "name of the base": "that of a local folder: the Hub may have none like it" if base_id != base else None,
        "data": f"{result['task']}, training split, {result['form']} form ({form})",
        "reward": "+1 right, -1 wrong",
        "steps": f"{result['steps']} of {_step(args)}",
        "best step": result["best_step"],
        "learning rate": args.learning_rate,
        "seed": result["seed"],
        "seconds": result["seconds"],
        "command": f"`{result['command']}`",
    }
    expert, interval = result["expert"], result["gain_interval"]
    row = {
        "task": result["task"],
        "split": result["split"],
        "metric": f"accuracy ({result['form']} form)",
        "value": round(expert["accuracy"], 4),
        "interval": [round(x, 4) for x in expert["interval"]],
        "base": round(result["base"]["accuracy"], 4),
        "gain": f"{result['gain']:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]",
        "n": expert["n"],
    }
    card = expert_card(folder, base_model=base_id, base_dtype=dtype, training=training, results=[row], license=license)
    return str(card)
