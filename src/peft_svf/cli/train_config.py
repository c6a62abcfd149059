# SPDX-License-Identifier: Apache-2.0
"""
A YAML file and `--field value` overrides -> the settings of a training run.

The file follows TRL: one flat mapping for all classes, `env` for environment variables. How it is trained are the
fields of `ReinforceConfig`, or of `EvolutionConfig` where `algorithm` says so; here stands the rest: which model,
which task, which singular values.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

import torch
import yaml
from transformers import PreTrainedModel

from ..tuner.config import SVFConfig

if TYPE_CHECKING:
    from ..training.evolution import EvolutionConfig
    from ..training.reinforce import ReinforceConfig

TASK_HELP = "Name of a benchmark, or a JSONL file of your own: prompt and answer, or prompt, choices and label."


@dataclass
class ScriptArguments:
    """What is trained on, and what the card says."""

    task: str = field(metadata={"help": TASK_HELP})
    form: Literal["choice", "generate"] | None = field(
        default=None, metadata={"help": "choice: pick one of the row's texts; generate: free text. Default what fits."}
    )
    algorithm: Literal["reinforce", "evolution"] = field(
        default="reinforce",
        metadata={"help": "reinforce: policy gradients; evolution: evolution strategies, forward passes only."},
    )
    train_rows: int | None = field(default=None, metadata={"help": "Training rows at most; default all."})
    eval_rows: int | None = field(default=None, metadata={"help": "Validation rows at most; default all."})
    test_rows: int | None = field(default=None, metadata={"help": "Held-out rows for the card; default all."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base for the card, where the model is a folder."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the expert, such as apache-2.0."})


@dataclass
class ModelArguments:
    """Which base model."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub repository of the base model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of its weights; auto is that of the checkpoint."})


@dataclass
class SVFArguments:
    """Which singular values move: fields of SVFConfig."""

    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names, a regex (one string), or all-linear; default the MLP weights."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Indices of the layers."})
    rank: int | None = field(default=None, metadata={"help": "Move only so many of the largest singular values."})
    basis_dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "Dtype of the basis; default bfloat16 on a bfloat16 base, else float32."}
    )
    description: str | None = field(
        default=None, metadata={"help": "What the expert is good at, in a few words; the first pass reads it."}
    )


NEEDED = {
    "model_name_or_path": "the folder or Hub repository of the base model",
    "task": "the benchmark or the JSONL file that is trained on",
    "output_dir": "the folder that becomes the expert",
}
TRAINING_HELP = """

  How it is trained: every field of ReinforceConfig, which is TRL's GRPOConfig. The first to set:
    output_dir           Folder of the expert; its checkpoints lie in it.
    max_steps            Optimizer steps.
    per_device_train_batch_size, num_generations
                         Completions per step and device; completions per prompt.
    learning_rate, seed, eval_strategy, eval_steps, save_steps, load_best_model_at_end, early_stopping_patience
  With algorithm: evolution every field of EvolutionConfig, which is transformers' TrainingArguments:
    per_device_train_batch_size, population
                         Rows per step and device; members that answer each.
    sigma, shaping       How far members lie from the mean; how their rewards are weighed.
  With both:
    report_to            Where logs go: tensorboard, wandb, ...; default nowhere.

Ctrl-C finishes the step and saves a checkpoint, which --resume goes on from; a second Ctrl-C ends at once.
Several devices: torchrun --nproc_per_node 2 -m peft_svf train CONFIG.yaml, or accelerate launch -m peft_svf ..."""


class Settings(NamedTuple):
    """Everything that a training run is told."""

    model: ModelArguments
    script: ScriptArguments
    svf: SVFArguments
    training: "ReinforceConfig | EvolutionConfig"
    given: dict[str, Any]  # what file and overrides say, as JSON has it, without tokens and `env`


def read_settings(path: str, overrides: Sequence[str] = ()) -> Settings:
    """
    Read a YAML file of settings, over which `--field value` overrides win.

    Args:
        path (`str`):
            A mapping of fields of [`ModelArguments`], [`ScriptArguments`], [`SVFArguments`] and
            [`ReinforceConfig`], or with `algorithm: evolution` [`EvolutionConfig`]; `env` sets
            environment variables, as in TRL's files.
        overrides (`Sequence[str]`):
            The rest of a command line.

    Returns:
        [`Settings`].

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ImportError`: if TRL is missing; the message names the extra.
        `ValueError`: if the file is no YAML mapping, or a key is unknown, missing, of the other algorithm or of
            another type.
    """
    from ..training.reinforce import ReinforceConfig  # names the extra where TRL is missing

    from trl import TrlParser  # isort: skip
    from ..training.evolution import EvolutionConfig

    class Parser(TrlParser):
        def error(self, message: str) -> None:  # argparse would print the usage of hundreds of fields
            raise ValueError(f"{path} with its overrides: {message}.")

    content = _read_yaml(path)
    variables = content.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise ValueError(f"{path}: 'env' is a mapping of environment variables, got {variables!r}.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    algorithms = {"reinforce": ReinforceConfig, "evolution": EvolutionConfig}
    algorithm = _algorithm(content, overrides)
    if algorithm not in list(algorithms):  # a list of a file has no hash
        raise ValueError(f"{path}: 'algorithm' is {' or '.join(map(repr, algorithms))}, got {algorithm!r}.")
    classes = (ModelArguments, ScriptArguments, SVFArguments, algorithms.pop(algorithm))
    parser = Parser(classes, allow_abbrev=False)
    known = {entry.name: str(entry.type) for each in classes for entry in fields(each)}
    for other, config in algorithms.items():
        _refuse_other(path, [*content, *_names(overrides)], known, algorithm, other, {f.name for f in fields(config)})
    given = [*content, *_names(overrides)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "peft-svf train --help lists those that exist."
            raise ValueError(f"{path} with its overrides has an unknown key {key!r}: {hint}")
    for key, what in NEEDED.items():
        if content.get(key) is None and key not in _names(overrides):
            raise ValueError(f"{path} names no {key}: {what}.")
    hints = {name: str(hint) for each in classes for name, hint in get_type_hints(each).items()}
    for key, value in content.items():
        _refuse_kind(path, key, value, hints[key])
    # what transformers and TRL turn on by default and then refuse, or warn of, where the device has none
    if not torch.cuda.is_available():
        parser.set_defaults(bf16=False, dataloader_pin_memory=False)
    elif not torch.cuda.is_bf16_supported():
        parser.set_defaults(bf16=False)
    if algorithm == "evolution":
        parser.set_defaults(logging_steps=10)  # as TRL's configs; transformers' 500 would show nothing of most runs
    # numbers as text, so that they go through the same types as those of the command line
    texts = {k: v if v is None or isinstance(v, (list, dict)) else str(v) for k, v in content.items()}
    parser.set_defaults_with_config(**texts)
    model, script, svf, training = parser.parse_args_into_dataclasses(list(overrides))
    _check_training(training, algorithm)
    values = {**asdict(model), **asdict(script), **asdict(svf), **training.to_dict()}
    # paths as they were written: transformers puts the home folder in
    values |= {k: str(v) for k, v in content.items() if isinstance(values[k], str) and k not in _names(overrides)}
    public = _without_tokens({key: values[key] for key in dict.fromkeys(given)})
    as_json = json.loads(json.dumps(public, default=str))
    return Settings(model, script, svf, training, as_json)


def _without_tokens(value: Any) -> Any:
    """A setting without what gives access, at any depth: the entries `token` and `..._token`."""
    if isinstance(value, dict):
        secret = {key for key in value if str(key) == "token" or str(key).endswith("_token")}
        return {key: _without_tokens(inner) for key, inner in value.items() if key not in secret}
    return list(map(_without_tokens, value)) if isinstance(value, (list, tuple)) else value


def _refuse_kind(path: str, key: str, value: Any, hint: str) -> None:
    """Raise a `ValueError` for nothing, a list, a mapping, true or false where the type of a field has none."""
    kinds = {"list": (list, "one value, not a list"), "dict": (dict, "one value, not a mapping")}
    if value is None and "None" not in hint and "Optional" not in hint:
        raise ValueError(f"{path}: {key!r} has no value: leave the line out for its default.")
    for kind, (of, what) in kinds.items():
        if isinstance(value, of) and kind not in hint:
            raise ValueError(f"{path}: {key!r} is {what}; got {value}.")
    if isinstance(value, bool) and re.search("int|float|Strategy", hint):
        raise ValueError(f'{path}: {key!r} is neither true nor false; a word such as no stands in quotes: "no".')


def _check_training(config: "ReinforceConfig | EvolutionConfig", algorithm: str) -> None:
    """Raise a `ValueError` for what would end a run in its course: loggers that are not here, unknown metrics."""
    from transformers.integrations import get_available_reporting_integrations

    here = [*get_available_reporting_integrations(), "flyte"]  # which transformers does not look for
    if absent := [name for name in config.report_to or () if name not in here]:
        raise ValueError(f"report_to: {absent[0]!r} is not installed here, or no logger of transformers.")
    weights = config.reward_weights
    if weights is not None and not (isinstance(weights, list) and len(weights) == 1):
        raise ValueError(f"reward_weights is a list of one weight, as a task has one reward; got {weights}.")
    metric = (config.metric_for_best_model or "reward").removeprefix("eval_")
    known = ["reward"] if algorithm == "evolution" else ["reward", "reward_std", "entropy", "loss"]
    if getattr(config, "beta", 0):
        known.append("kl")
    if config.eval_strategy != "no" and metric not in known and (algorithm == "evolution" or "/" not in metric):
        raise ValueError(f"metric_for_best_model: there is no {metric!r} in an evaluation, but {', '.join(known)}.")


def _read_yaml(path: str) -> dict[Any, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no settings file '{path}'.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: it needs one `key: value` a line.")
    return content


def _names(overrides: Sequence[str]) -> list[str]:
    """The fields that overrides name, written `--some_field value`, `--some-field value` or `--some_field=value`."""
    return [part[2:].partition("=")[0].replace("-", "_") for part in overrides if part.startswith("--")]


def _algorithm(content: Mapping[Any, Any], overrides: Sequence[str]) -> Any:
    """The algorithm that file and overrides name: it decides which other fields there are."""
    for part, after in zip(reversed(overrides), [None, *reversed(overrides)], strict=False):
        name, equals, value = part.partition("=")
        if name == "--algorithm":
            return value if equals else after
    return content.get("algorithm", "reinforce")


def _refuse_other(
    path: str, given: Sequence[Any], known: Mapping[str, str], algorithm: str, other: str, theirs: set[str]
) -> None:
    """Raise a `ValueError` for a setting that the other algorithm has alone."""
    if odd := [key for key in given if key in theirs and key not in known]:
        raise ValueError(
            f"{path} with its overrides: {odd[0]!r} is a setting of algorithm {other!r}, and this run's is "
            f"{algorithm!r}: leave it out, or set `algorithm: {other}`."
        )


def svf_config(arguments: SVFArguments, model: PreTrainedModel, description: str | None = None) -> SVFConfig:
    """Make the adapter's config; `description` stands in where the arguments have none."""
    given = {entry.name: getattr(arguments, entry.name) for entry in fields(arguments)}
    if given["target_modules"] == ["all-linear"]:
        given["target_modules"] = "all-linear"
    given["basis_dtype"] = given["basis_dtype"] or ("bfloat16" if model.dtype == torch.bfloat16 else "float32")
    given["description"] = given["description"] or description
    return SVFConfig(task_type="CAUSAL_LM", **given)


def describe() -> str:
    """List the keys of a settings file, for `--help`."""
    lines = ["keys of CONFIG.yaml (`--key value` after it overrides one, `env:` sets environment variables):"]
    for arguments in (ModelArguments, ScriptArguments, SVFArguments):
        lines += ["", f"  {arguments.__doc__}"]
        lines += [f"    {entry.name:20} {entry.metadata['help']}" for entry in fields(arguments)]
    return "\n".join(lines) + TRAINING_HELP
