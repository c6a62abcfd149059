# SPDX-License-Identifier: Apache-2.0
"""
An SVF adapter in a model -> a repository on the Hub: offsets, config and a card, in one commit.

`expert_card` fills in `expert_card.md` from a saved adapter. PEFT's own `push_to_hub` overwrites the card with a blank
one (peft 0.21.2, transformers 5.23), so `import peft_svf` sends SVF adapters here instead. Nothing here loads a model.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import (
    CommitInfo,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .. import files
from .expert import Expert, download, read_config, read_offsets
from .key import KEY_NAME, RoutingKey

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
PICTURE = "blocks.png"
TEMPLATE = Path(__file__).with_name("expert_card.md")
TAGS = ("svf", "transformer-squared", "z-vector")
HIDDEN = {"value", "interval", "dataset", "benchmark"}  # keys of a result that get no column
FACTS = {"task", "training", "results", "license", "tags"}
OURS = ("[More Information Needed]", "arXiv 2501.06252")  # texts of PEFT's blank card and of this package's

# PEFT task type -> (class that loads the base, the Hub's pipeline tag)
TASK_TYPES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}


def push_expert(
    model: PeftModel | Expert,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    card: ModelCard | str | None = None,
    beside: str | os.PathLike[str] | None = None,
    **facts_and_options: Any,
) -> CommitInfo:
    """
    Upload an expert or SVF adapter: `adapter_config.json`, `adapter_model.safetensors`, `README.md`, in one commit.

    What is wrong on this side is refused before anything is written to the Hub. The model stays as it is. Picture
    and LoRA of an earlier push go, and its routing key if an [`Expert`] is pushed: they may be another expert's.

    Args:
        model (`PeftModel` or [`Expert`]): Model with the adapter, or an expert, which brings its routing key along.
        repo_id (`str`): Repository to write to, created if it does not exist.
        adapter_name (`str`, *optional*): Default: the active adapter. It lands at the top of the repository.
        base_model, base_revision (`str`, *optional*):
            Hub id and commit of the base model, if the adapter's config names none or a local folder. They are written
            into the uploaded config as well.
        card (`ModelCard` or `str`, *optional*):
            Default: [`expert_card`]'s, unless the repository has a card that a person wrote, which stays.
        beside (`str` or path, *optional*):
            Folder of more files. The card shows `blocks.png` and explains `lora/`, a folder of [`export_lora`].
        facts_and_options:
            `task`, `training`, `results`, `license` and `tags` of [`expert_card`]; `commit_message`,
            `commit_description`, `private`, `token`, `revision` and `create_pr` as in `huggingface_hub.HfApi`.

    Raises:
        `ValueError`: if the adapter is unknown or not SVF, no Hub id of the base model is known, or z is not finite.
    """
    if isinstance(model, Expert):
        base, name, configured = None, "default", model.base_model
    else:
        base, active = model.get_base_model(), [adapter_name] if adapter_name else model.active_adapters
        if len(active) != 1 or getattr(model.peft_config.get(active[0]), "peft_type", None) != "SVF":
            raise ValueError(
                f"{active} isn't one SVF adapter of this model: pass adapter_name=..., one of {[*model.peft_config]}."
            )
        name = active[0]
        configured = model.peft_config[name].base_model_name_or_path or getattr(base, "name_or_path", None)
    base_model = base_id(configured, base_model)
    facts = {name: facts_and_options.pop(name) for name in FACTS & facts_and_options.keys()}
    options = {"commit_message": "Upload SVF expert", **facts_and_options}
    facts["tags"] = [*(getattr(base, "model_tags", None) or ()), *facts.get("tags", ())]
    with tempfile.TemporaryDirectory() as scratch:
        folder = _save(model, name, Path(scratch), base_model, base_revision)
        if beside is not None:
            shutil.copytree(beside, folder, dirs_exist_ok=True)
        made = expert_card(folder, repo_id=repo_id, base_dtype=getattr(base, "dtype", None), **facts)
        (folder / CARD_NAME).write_text(str(card or made), encoding="utf-8")
        _write_benchmarks(folder, facts.get("results") or ())
        stale = [PICTURE, "lora/*", *[KEY_NAME] * isinstance(model, Expert)]
        return upload(folder, repo_id, keeps_card=card is None, stale=stale, **options)


def upload(
    folder: Path,
    repo_id: str,
    *,
    keeps_card: bool = True,
    stale: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """
    Upload a folder in one commit, into a repository that is made if need be.

    `keeps_card` leaves a person's card, and `stale` names files that go if the folder has none of them.
    """
    api = HfApi(library_name="peft_svf", token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns=[CARD_NAME] if keeps_card and _has_other_card(repo_id, revision, token) else None,
        delete_patterns=[*stale],
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
    )


def expert_card(
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    base_dtype: torch.dtype | str | None = None,
    task: str | None = None,
    training: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    Write the card of a saved expert, from its files and what the caller knows of its training.

    Args:
        folder (`str` or path): Folder of the expert.
        repo_id (`str`, *optional*): Repository that the snippets load; default the name of the folder.
        base_model (`str`, *optional*): Hub id of the base model, if not the config's.
        base_dtype (`torch.dtype` or `str`, *optional*): Dtype in which the base was loaded.
        task (`str`, *optional*): What the expert was trained on; default the config's `description`.
        training (`Mapping[str, Any]`, *optional*): What repeats the run, in order: data, steps, seed, command, ...
        results (`Sequence[Mapping[str, Any]]`):
            One row per measurement: `task`, `value`, and if known `split`, `metric` (default "accuracy"), `base` (the
            base model's value), `interval` (two numbers, 95 %), `n`. `dataset` is its id on the Hub. `benchmark`, the
            id of a task of that dataset's `eval.yaml`, puts the value on the dataset's board: for answers that were
            generated, on the whole test split. Any other key becomes a column.
        license (`str`, *optional*), tags (`Sequence[str]`): For the metadata, such as `"apache-2.0"`.

    Raises:
        `ValueError`: if the folder holds no SVF expert, z is not finite, or no Hub id of the base is known.
    """
    folder = Path(folder)
    config, (offsets, others, _) = read_config(folder), read_offsets(folder)
    base_model = base_id(config.get("base_model_name_or_path"), base_model)
    base_class, pipeline_tag = TASK_TYPES.get(task_type(config), ("AutoModel", None))
    repo_id = repo_id or folder.resolve().name
    hashes = {module: entry["sha256"] for module, entry in (config.get("fingerprint") or {}).items()}
    measured = [_measured(row, pipeline_tag) for row in results] or None
    facts = {"pipeline_tag": pipeline_tag, "model_name": repo_id.split("/")[-1], "eval_results": measured}
    cached = try_to_load_from_cache(base_model, "config.json")  # its folder is the commit, which transformers forgets
    kinds: dict[str, list[torch.Tensor]] = defaultdict(list)
    for module, offset in offsets.items():
        kinds[f"`{module.rpartition('.')[2]}`"].append(offset)
    kinds["all"] = [*offsets.values()]
    return ModelCard.from_template(
        card_data(base_model, license, tags, **facts),
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        base_class=base_class,
        two_pass=base_class == "AutoModelForCausalLM",
        task=task or config.get("description"),
        revision=config.get("revision") or (Path(cached).parent.name if isinstance(cached, str) else None),
        dtype=str(base_dtype).removeprefix("torch.") if base_dtype else None,
        digest=hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest() if hashes else None,
        numbers=f"{sum(map(len, offsets.values())):,}",
        weights=len(offsets),
        rank=config.get("rank"),
        key=RoutingKey.load(folder),
        others=sum(tensor.numel() for tensor in others.values()),
        training={key: files.public(str(value)) for key, value in (training or {}).items() if value is not None},
        results=table([_result_row(row) for row in results]),
        picture=PICTURE if (folder / PICTURE).is_file() else None,
        lora=_lora(folder / "lora"),
        z={kind: (len(members), torch.cat(members)) for kind, members in kinds.items()},
    )


def card_data(base_model: str, license: str | None, tags: Sequence[str], **facts: Any) -> ModelCardData:
    """Make the metadata by which the Hub finds a card, its base and its pipeline."""
    return ModelCardData(
        base_model=base_model,
        base_model_relation="adapter",
        library_name="peft",  # the Hub knows no other name; the tag `svf` tells these apart
        license=license,
        tags=[*TAGS, f"base_model:adapter:{base_model}", *tags],
        **facts,
    )


def base_id(configured: str | None, chosen: str | None) -> str:
    """Return the Hub id of the base model, and refuse a path of this machine: it means nothing on a card."""
    name = chosen or configured or ""
    try:
        validate_repo_id(name)
        if chosen or not os.path.exists(name):
            return name
    except HFValidationError:
        pass
    raise ValueError(
        f"The name of the base model, {name or None!r}, means nothing on the Hub. "
        'Pass base_model="org/name" (on the command line --model org/name), the Hub id of the same weights.'
    )


def _save(model: PeftModel | Expert, name: str, scratch: Path, base_model: str, base_revision: str | None) -> Path:
    """Save an expert, name its base model in the saved config only, and return the folder that holds its files."""
    if isinstance(model, Expert):
        model.save(scratch)
    else:
        before = model.peft_config[name].base_model_name_or_path
        try:
            model.save_pretrained(str(scratch), selected_adapters=[name])
        finally:
            model.peft_config[name].base_model_name_or_path = before  # PEFT fills it in while saving
    folder = scratch if name == "default" else scratch / name  # PEFT puts it there
    config = read_config(folder) | {"base_model_name_or_path": base_model}
    if base_revision is not None:
        config["revision"] = base_revision
    files.write(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def _has_other_card(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether the repository has a card that neither this package nor PEFT's blank template wrote."""
    path = download(repo_id, revision=revision, token=token, allow_patterns=CARD_NAME) / CARD_NAME
    text = ModelCard(path.read_text("utf-8")).text if path.is_file() else ""
    stays = bool(text.strip()) and not any(mark in text for mark in OURS)
    if stays:
        logger.warning(f"{repo_id} has a card of its own, which stays; card=expert_card(folder) replaces it.")
    return stays


def _lora(folder: Path) -> dict[str, float] | None:
    """Return the rank of a LoRA beside an expert, and the largest share of a kind's change that it leaves out."""
    if not folder.is_dir():
        return None
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        kinds = json.loads(file.metadata()["relative_error"]).values()
    return {key: max(kind[key] for kind in kinds) for key in ("rank", "error")}


def task_type(config: Mapping[str, Any]) -> str:
    """Return the PEFT task type; an adapter made without one has that of its base class."""
    base_class = (config.get("auto_mapping") or {}).get("base_model_class", "")
    return config.get("task_type") or ("CAUSAL_LM" if base_class.endswith(("ForCausalLM", "LMHeadModel")) else "")


def _measured(row: Mapping[str, Any], pipeline_tag: str | None) -> EvalResult:
    """Write a measurement as the Hub's model index has it."""
    dataset, metric = row.get("dataset", row["task"]), row.get("metric", "accuracy")
    return EvalResult(
        task_type=pipeline_tag or "other",
        dataset_type=dataset,
        dataset_name=row["task"],
        dataset_split=row.get("split"),
        metric_type=metric.partition(" (")[0],
        metric_name=metric,
        metric_value=row["value"],
    )


def _write_benchmarks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write measurements on the Hub's benchmarks as `.eval_results/TASK.yaml`, which the model's page shows."""
    for row in rows:
        if row.get("benchmark"):
            notes = f"{row.get('metric', 'accuracy')}, an SVF expert, n = {row.get('n', 'unknown')}"
            entry = EvalResultEntry(row["dataset"], row["benchmark"], row["value"], notes=notes)
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            files.write(folder / ".eval_results" / f"{row['benchmark']}.yaml", text)


def _result_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Order a measurement for the table: what was measured, base beside expert, how sure, then other columns."""
    interval = "{:.3f} to {:.3f}".format(*row["interval"]) if row.get("interval") else None
    first = {"task": row["task"], "split": row.get("split"), "metric": row.get("metric", "accuracy")}
    values = {"base": row.get("base"), "expert": row["value"], "95 % interval": interval, "n": row.get("n")}
    return first | values | {key: row[key] for key in row if key not in HIDDEN | {*first, *values}}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as a Markdown table, without the columns that are empty in every row."""
    filled = {key for row in rows for key in row if row[key] is not None}
    order = [key for key in dict.fromkeys(key for row in rows for key in row) if key in filled]
    lines = [order, ["---"] * len(order), *([_cell(row.get(key)) for key in order] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
