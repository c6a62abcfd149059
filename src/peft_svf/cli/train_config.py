# SPDX-License-Identifier: Apache-2.0
"""
A YAML file and `--field value` overrides -> the settings of a training run.

The file follows TRL: one flat mapping for all classes, `env` for environment variables. How to train is set by the
fields of the config that `algorithm` names (`ReinforceConfig`, `SupervisedConfig`, `EvolutionConfig`).
"""

# ruff: noqa: RUF009  `_key` makes a field
import difflib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

from .. import files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..training import EvolutionConfig, ReinforceConfig, SupervisedConfig
    from ..tuner.config import SVFConfig

OTHER_NAMES = {"lr": "learning_rate", "batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs"}
OTHER_NAMES |= {"model": "model_name_or_path", "steps": "max_steps", "dataset": "task", "out": "output_dir"}


def _key(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ScriptArguments:
    """What to train on, and what the card shows."""

    task: str = field(metadata={"help": "Name of a benchmark, or a JSONL file or folder of your own."})
    form: Literal["choice", "generate", "letter", "calculation"] | None = _key(
        "What the model does: choice (pick a given text), generate (write freely), letter (of a listed option) or "
        "calculation. Default: the task's first; with sft generate."
    )
    system: str | None = _key("System prompt before each question.")
    shots: int = _key("Solved training examples before each question.", 0)
    algorithm: Literal["reinforce", "sft", "evolution"] = _key(
        "reinforce (rewards), sft (right answers) or evolution (rewards, without gradients).", "reinforce"
    )
    train_rows: int | None = _key("At most so many training rows. Default: all.")
    eval_rows: int | None = _key("At most so many validation rows. Default: all.")
    test_rows: int | None = _key("At most so many held-out rows for the test. Default: all.")
    routing: bool = _key("Write a routing key for the first pass: hidden states of training prompts, no text.", True)
    base_model: str | None = _key("Hub id of the base for the card, if the model is a folder.")
    license: str | None = _key("Licence of the expert, such as apache-2.0.")


@dataclass
class ModelArguments:
    """Which base model."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub repository of the base model."})
    model_revision: str | None = _key("Branch, tag or commit of the base model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = _key(
        "Dtype of its weights; auto is the checkpoint's.", "auto"
    )


@dataclass
class SVFArguments:
    """Which singular values move: fields of SVFConfig."""

    target_modules: list[str] | None = _key("What to adapt: names, a regex, all-linear. Default: the MLP weights.")
    exclude_modules: list[str] | None = _key("Weights to leave out.")
    layers_to_transform: list[int] | None = _key("Blocks to adapt. Default: all.")
    first_block: int | None = _key("Lowest block to adapt. With sft and no targets: all-linear from the middle on.")
    rank: int | None = _key("Adapt only so many of the largest singular values. Default: all.")
    basis_dtype: Literal["float32", "bfloat16"] | None = _key("Dtype of the basis. Default: bfloat16 on such a base.")
    description: str | None = _key("What the expert is good at, in a few words; the first pass reads it.")


PARTS = (ModelArguments, ScriptArguments, SVFArguments)
SELECTING = ("target_modules", "exclude_modules", "layers_to_transform")


class Settings(NamedTuple):
    """All settings of a training run."""

    model: ModelArguments
    script: ScriptArguments
    svf: SVFArguments
    training: "ReinforceConfig | SupervisedConfig | EvolutionConfig"
    given: dict[str, Any]  # what file and overrides set, as JSON, without `env`


def read_settings(path: str, overrides: Sequence[str] = ()) -> Settings:
    """
    Read a YAML file of settings; `--field value` overrides win.

    Raises:
        `ImportError`: if TRL is missing; the message names the extra.
        `ValueError`: if the file isn't a YAML mapping, or a setting is unknown, missing, or has a wrong value.
    """
    import torch
    from transformers import HfArgumentParser

    from ..training import EvolutionConfig, ReinforceConfig, SupervisedConfig

    configs: dict[str, Any] = {"reinforce": ReinforceConfig, "sft": SupervisedConfig, "evolution": EvolutionConfig}

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:  # argparse would print the usage of hundreds of fields
            raise ValueError(message)

    content = _read_yaml(path)
    env = content.pop("env", None) or {}
    keys = [*content, *(part[2:].partition("=")[0].replace("-", "_") for part in overrides if part.startswith("--"))]
    try:
        os.environ.update({str(name): str(value) for name, value in dict(env).items()})
        early = Parser([], allow_abbrev=False, add_help=False)
        early.add_argument("--algorithm", default=str(content.get("algorithm")))
        algorithm = early.parse_known_args(list(overrides))[0].algorithm
        classes = (*PARTS, configs.get(algorithm, ReinforceConfig))
        known = {name: str(hint) for part in classes for name, hint in get_type_hints(part).items()}
        for key in keys:
            if key not in known:
                near = OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(str(key), known, n=1)), None)
                hint = f"did you mean '{near}'?" if near else "`peft-svf train --help` lists the most used"
                others = [name for name, config in configs.items() if key in get_type_hints(config)]
                hint = f"it belongs to `algorithm: {others[0]}`" if others else hint
                raise ValueError(f"unknown key '{key}': {hint}")
        parser = Parser(classes, allow_abbrev=False)
        parser.set_defaults(dataloader_pin_memory=torch.cuda.is_available())
        if algorithm == "evolution":
            parser.set_defaults(logging_steps=10)  # TRL's default; transformers' 500 would hide most runs
        actions = {action.dest: action for action in reversed(parser._actions)}  # before their `--no_...`
        actions["output_dir"].required = True
        arguments = [part for key, value in content.items() for part in _as_arguments(actions[key], value, known[key])]
        model, script, svf, training = parser.parse_args_into_dataclasses([*arguments, *overrides])
    except (ValueError, TypeError) as error:
        message = str(error).rstrip(".")
        raise ValueError(f"{path} with its overrides: {message}{'' if message.endswith('?') else '.'}") from error
    values = {**asdict(model), **asdict(script), **asdict(svf), **training.to_dict()}
    given = json.dumps({key: values[key] for key in keys}, default=str)
    return Settings(model, script, svf, training, json.loads(given))


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-5 as a number, which YAML 1.1 takes for a text."""

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, "-+0123456789")
    try:
        content = files.read_bytes(path, 1 << 20)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader)):
            raise ValueError("write out its aliases (*name), ten of which can fill the memory.")
        return dict(yaml.load(content, Loader))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} isn't valid YAML of one `key: value` a line: {error}") from error


def _as_arguments(action: Any, value: Any, hint: str) -> list[str]:
    """Write a setting as arguments of a command line, so that each value is converted by its field's type."""
    if isinstance(value, list) and value and action.nargs == "+":
        return [f"--{action.dest}", *map(str, value)]
    if value is None or isinstance(value, (list, dict)):
        if type(value).__name__.removesuffix("Type") not in hint.replace("Optional", "None"):
            raise ValueError(f"'{action.dest}' is one value, not {'empty' if value is None else value}")
        action.default, action.required = value, False
        return []
    return [f"--{action.dest}={'no' if value is False and 'bool' not in hint else value}"]  # YAML reads `no` as false


def svf_config(
    arguments: SVFArguments, model: "PreTrainedModel", description: str | None = None, *, supervised: bool = False
) -> "SVFConfig":
    """
    Make the adapter's config.

    Args:
        description (`str`, *optional*): Default for one that the arguments lack.
        supervised (`bool`):
            Whether it learns from right answers. The default targets are then all linear weights of the upper half of
            the blocks, which answered better than the MLP weights and kept more of the base's text (docs/results.md).
    """
    import torch

    from ..experts.key import blocks_of
    from ..tuner.config import SVFConfig

    values = asdict(arguments)
    first = values.pop("first_block")
    if supervised and first is None and not any(values[name] for name in SELECTING):
        with suppress(ValueError):  # a model without a stack of blocks for text keeps the other default
            values["target_modules"], first = ["all-linear"], len(blocks_of(model)) // 2
    if values["target_modules"] == ["all-linear"]:
        values["target_modules"] = "all-linear"
    if first:
        stack = blocks_of(model)
        if not 0 < first < len(stack) or values["exclude_modules"] or values["layers_to_transform"]:
            raise ValueError(
                f"first_block is 1 to {len(stack) - 1} for this model, without exclude_modules and "
                f"layers_to_transform; got {first}."
            )
        prefix = next(name for name, module in model.named_modules() if module is stack)
        values["exclude_modules"] = rf"{re.escape(prefix)}\.({'|'.join(map(str, range(first)))})\..*"
    values["basis_dtype"] = values["basis_dtype"] or ("bfloat16" if model.dtype == torch.bfloat16 else "float32")
    values["description"] = values["description"] or description
    return SVFConfig(task_type="CAUSAL_LM", **values)
