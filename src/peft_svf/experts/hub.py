# SPDX-License-Identifier: Apache-2.0
"""
An SVF adapter in a model -> a repository on the Hub: offsets, config and a card, in one commit.

`push_expert` uploads; `expert_card` writes the card from a saved adapter. PEFT's own `push_to_hub` overwrites the card
with a blank one (peft 0.21.2, transformers 5.23), so `import peft_svf` sends SVF adapters here instead. Nothing here
loads a model or knows how a z-vector was trained: what the card says of that, the caller says.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME

from .expert import OFFSET_KEY, check_values, read_config, read_tensors

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
TAGS = ["svf", "transformer-squared", "z-vector"]
MARKER = "<!-- Written by peft_svf and written anew by the next push; remove this line to keep what you edit. -->"
CITATION = """```bibtex
@article{sun2025transformersquared,
  title   = {Transformer-Squared: Self-adaptive LLMs},
  author  = {Sun, Qi and Cetin, Edoardo and Tang, Yujin},
  journal = {arXiv preprint arXiv:2501.06252},
  year    = {2025}
}
```"""

# PEFT task type -> (class that loads the base, the Hub's pipeline tag)
TASK_TYPES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}


def push_expert(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    card: ModelCard | str | None = None,
    task: str | None = None,
    training: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Upload one SVF adapter as an expert: `adapter_config.json`, `adapter_model.safetensors`, `README.md`, one commit.

    What can be wrong on this side is found before anything is written to the Hub, and the model stays as it is.

    Args:
        model (`PeftModel`):
            Model with the adapter.
        repo_id (`str`):
            Repository to write to, created if it does not exist.
        adapter_name (`str`, *optional*):
            Which adapter; by default the active one. It lands at the top of the repository whatever its name.
        base_model (`str`, *optional*):
            Hub id of the base model, if the adapter's config names none or a folder of this machine.
        base_revision (`str`, *optional*):
            Commit of the base model; also written into the config, so that `AutoPeftModel` loads it. The card falls
            back on what the config names, then on what the local Hub cache holds as `main`.
        card (`ModelCard` or `str`, *optional*):
            The card to upload, as an object or as text. By default [`expert_card`]'s, unless the repository has a card
            that a person wrote or edited (it lacks the marker line): that one stays.
        task, training, results, license, tags:
            For the card, see [`expert_card`].
        commit_message, commit_description, private, token, revision, create_pr:
            As in `create_repo` and `upload_folder` of `huggingface_hub.HfApi`.

    Returns:
        `huggingface_hub.CommitInfo` of the one commit.

    Raises:
        `ValueError`: if the adapter is unknown or not SVF, if no Hub id of the base model is known, or if an offset is
        not finite.
    """
    name = _chosen_adapter(model, adapter_name)
    base = model.get_base_model()
    configured = model.peft_config[name].base_model_name_or_path or getattr(base, "name_or_path", None)
    base_model = _base_id(configured, base_model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _save(model, name, Path(scratch), base_model, base_revision)
        _offsets(folder)  # refuses what is not finite, whoever writes the card
        known: dict[str, Any] = {"task": task, "training": training, "results": results, "license": license}
        known["base_dtype"] = getattr(base, "dtype", None)
        known["tags"] = [*(getattr(base, "model_tags", None) or ()), *tags]
        text = str(card or expert_card(folder, repo_id=repo_id, **known))
        (folder / CARD_NAME).write_text(text, encoding="utf-8")

        api = HfApi(library_name="peft_svf")
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        _ensure_branch(api, repo_id, revision, token, create_pr)
        keeps_card = card is None and _has_edited_card(api, repo_id, revision, token)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=[CARD_NAME] if keeps_card else None,
            commit_message=commit_message or "Upload SVF expert",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def push_to_hub(
    model: PeftModel, repo_id: str, *, max_shard_size: int | str | None = "50GB", **kwargs: Any
) -> CommitInfo:
    """
    Do what `model.push_to_hub(repo_id, ...)` does for an SVF adapter; `import peft_svf` puts it there.

    Args:
        model (`PeftModel`):
            Model whose active adapter is SVF.
        repo_id (`str`):
            Repository to write to.
        max_shard_size (`int` or `str`, *optional*):
            Taken because transformers' `push_to_hub` takes it; an expert is one file whatever is asked.
        kwargs:
            The others of transformers' `push_to_hub` (`commit_message`, `commit_description`, `private`, `token`,
            `revision`, `create_pr`, `tags`) and of [`push_expert`]; anything else is a `TypeError`.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    if max_shard_size not in ("50GB", None):
        logger.warning(f"max_shard_size={max_shard_size!r} changes nothing: an SVF expert is always a single file.")
    return push_expert(model, repo_id, **{key: value for key, value in kwargs.items() if value is not None})


def expert_card(
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    base_dtype: torch.dtype | str | None = None,
    task: str | None = None,
    training: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    Write the card of a saved expert, from its two files and what the caller knows of its training.

    Args:
        folder (`str` or `os.PathLike`):
            Where `save_pretrained` has put `adapter_config.json` and `adapter_model.safetensors`.
        repo_id (`str`, *optional*):
            Repository or folder that the snippet loads; by default the name of the folder.
        base_model, base_revision (`str`, *optional*):
            Hub id and commit of the base model, if not the config's or, for the commit, the local Hub cache's.
        base_dtype (`torch.dtype` or `str`, *optional*):
            Dtype in which the base was loaded.
        task (`str`, *optional*):
            What the expert was trained on; by default the config's `description`.
        training (`Mapping[str, Any]`, *optional*):
            What repeats the run, in order: data, steps, seed, command, ...
        results (`Sequence[Mapping[str, Any]]`, *optional*):
            One row per measurement: `task`, `value`, and if known `split`, `metric` (default "accuracy"), `base` (the
            base model's value), `interval` (two numbers, 95 %), `n`. Any other key becomes a column.
        license (`str`, *optional*):
            Identifier such as `"apache-2.0"`.
        tags (`Sequence[str]`):
            Tags besides the card's own.

    Returns:
        `huggingface_hub.ModelCard`.

    Raises:
        `ValueError`: if the folder holds no SVF expert, an offset is not finite, or no Hub id of the base is known.
    """
    folder = Path(folder)
    config = read_config(folder)
    offsets, others = _offsets(folder)
    base_model = _base_id(config.get("base_model_name_or_path"), base_model)
    revision = base_revision or config.get("revision") or _cached_commit(base_model)
    base_class, pipeline_tag = TASK_TYPES.get(_task_type(config), ("AutoModel", None))
    repo_id = repo_id or folder.resolve().name
    name = repo_id.split("/")[-1]
    task = task or config.get("description")
    facts = {
        "base model": f"`{base_model}`",
        "base revision": f"`{revision}`" if revision else None,
        "base dtype": f"`{str(base_dtype).removeprefix('torch.')}`" if base_dtype else None,
        "fingerprint of the base": _digest(config.get("fingerprint")),
        "z parameters": f"{sum(d.numel() for d in offsets.values()):,} in {len(offsets)} weights",
        "other trained numbers": others or None,
        "largest singular values moved, per weight": config.get("rank"),
    }
    sections = [
        f"---\n{_metadata(name, base_model, pipeline_tag, license, tags, results or ()).to_yaml()}\n---",
        MARKER,
        f"# {name}",
        (f"An expert for {task}: " if task else "An expert: ")
        + f"one multiplier z per singular value of {len(offsets)} weights of `{base_model}`, whose own weights stay "
        "as they are (SVF, from Transformer², arXiv 2501.06252). z = 1 is the base model.",
        "## Use\n\n" + _snippet(repo_id, base_model, revision, base_class),
        "## What it belongs to\n\n" + _list(facts),
        "The z-vectors fit the singular directions of these very weights: peft_svf compares the fingerprint when the "
        "expert is loaded, and refuses another base.",
        "## Training\n\n" + _list(training) if training else "",
        "## Results\n\n" + _table([_result_row(row) for row in results]) if results else "",
        "## z\n\n" + _table(_z_rows(offsets)),
        "## Citation\n\n" + CITATION,
    ]
    return ModelCard("\n\n".join(section for section in sections if section) + "\n")


# The adapter, from the model to a folder.


def _chosen_adapter(model: PeftModel, name: str | None) -> str:
    """Name the adapter to upload: the given one or the only active one; it must exist and be SVF."""
    if name is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise ValueError(f"A repository holds one expert and {active} are active: pass adapter_name=...")
        name = active[0]
    if name not in model.peft_config:
        raise ValueError(f"There is no adapter {name!r} in this model; it has {sorted(model.peft_config)}.")
    if (kind := model.peft_config[name].peft_type) != "SVF":
        raise ValueError(f"Adapter {name!r} is of PEFT type {kind.value}; only SVF adapters are pushed as experts.")
    return name


def _base_id(configured: str | None, given: str | None) -> str:
    """Return the Hub id of the base model, or say why there is none: a card must not name a path of this machine."""
    name = given or configured
    way_out = 'Pass base_model="org/name", the Hub id under which others find the same weights.'
    if not name:
        raise ValueError(f"The adapter does not know the name of its base model. {way_out}")
    try:
        validate_repo_id(name)
        is_id = given is not None or not os.path.exists(name)
    except HFValidationError:
        is_id = False
    if not is_id:
        raise ValueError(f"The base model is called {name!r}, a local path that means nothing on the Hub. {way_out}")
    return name


def _save(model: PeftModel, name: str, scratch: Path, base_model: str, base_revision: str | None) -> Path:
    """Save one adapter, name its base model in the saved config only, and return the folder that holds its files."""
    folder = scratch if name == "default" else scratch / name  # where PEFT puts it
    if not folder.resolve().is_relative_to(scratch.resolve()):
        raise ValueError(f"Adapter name {name!r} is a path out of the folder that PEFT saves to: rename the adapter.")
    before = model.peft_config[name].base_model_name_or_path
    try:
        model.save_pretrained(str(scratch), selected_adapters=[name])
    finally:
        model.peft_config[name].base_model_name_or_path = before  # PEFT fills it in while saving
    config = read_config(folder) | {"base_model_name_or_path": base_model}
    if base_revision is not None:
        config["revision"] = base_revision
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


# The repository.


def _has_edited_card(api: HfApi, repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    """Tell whether the repository has a card that a person wrote: text, without the marker, no blank template."""
    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
    except (EntryNotFoundError, HfHubHTTPError):
        return False  # no card; whatever else it is, the upload meets it too
    text = Path(path).read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n?", "", text, flags=re.DOTALL).strip()
    edited = bool(body) and MARKER not in body and "[More Information Needed]" not in body
    if edited:
        logger.warning(f"{repo_id} has a card written or edited by hand, which is kept; card=... replaces it.")
    return edited


def _ensure_branch(api: HfApi, repo_id: str, revision: str | None, token: str | bool | None, create_pr: bool) -> None:
    """Create the branch to upload to, if it is one and is missing."""
    if revision is None or revision.startswith("refs/pr"):
        return
    try:
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    except HfHubHTTPError as error:
        # A pull request may be opened by someone who may not create branches; then the branch has to be there.
        if not (create_pr and error.response.status_code == 403):
            raise


# The card's pieces.


def _task_type(config: Mapping[str, Any]) -> str:
    """Name the PEFT task type; an adapter made without one is what its base class is called."""
    base_class = (config.get("auto_mapping") or {}).get("base_model_class", "")
    return config.get("task_type") or ("CAUSAL_LM" if base_class.endswith(("ForCausalLM", "LMHeadModel")) else "")


def _cached_commit(base_model: str) -> str | None:
    """Find the commit of a base model's `main` in this machine's Hub cache: transformers 5.23 does not keep it."""
    cached = try_to_load_from_cache(base_model, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def _digest(fingerprint: Mapping[str, Mapping[str, Any]] | None) -> str | None:
    """Digest the fingerprint, one hash per module, into one hash of the base as far as the expert sees it."""
    if not fingerprint:
        return None
    hashes = {module: entry["sha256"] for module, entry in fingerprint.items()}
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return f"`sha256:{digest}` over {len(hashes)} weights, each in `{CONFIG_NAME}`"


def _snippet(repo_id: str, base_model: str, revision: str | None, base_class: str) -> str:
    pinned = f', revision="{revision}"' if revision else ""
    return f"""```python
import peft_svf  # pip install peft-svf; the import makes the adapter type SVF known to PEFT
from peft import PeftModel
from transformers import {base_class}

base = {base_class}.from_pretrained("{base_model}"{pinned})
model = PeftModel.from_pretrained(base, "{repo_id}")
```"""


def _metadata(
    name: str,
    base_model: str,
    pipeline_tag: str | None,
    license: str | None,
    tags: Sequence[str],
    results: Sequence[Mapping[str, Any]],
) -> ModelCardData:
    """Write what the Hub searches and shows: base, tags, results as a model index."""
    measured = [
        EvalResult(
            task_type=pipeline_tag or "other",
            dataset_type=row["task"],
            dataset_name=row["task"],
            dataset_split=row.get("split"),
            metric_type=row.get("metric", "accuracy"),
            metric_value=row["value"],
        )
        for row in results
    ]
    return ModelCardData(
        base_model=base_model,
        base_model_relation="adapter",
        library_name="peft",  # the Hub does not know another name; the tag `svf` tells these apart
        pipeline_tag=pipeline_tag,
        license=license,
        tags=[*TAGS, f"base_model:adapter:{base_model}", *tags],
        model_name=name,
        eval_results=measured or None,
    )


def _result_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Order one measurement for the table: what was measured, base beside expert, how sure, then the caller's own."""
    interval = "{:.3f} to {:.3f}".format(*row["interval"]) if row.get("interval") else None
    first = {"task": row["task"], "split": row.get("split"), "metric": row.get("metric", "accuracy")}
    values = {"base": row.get("base"), "expert": row["value"], "95 % interval": interval, "n": row.get("n")}
    return first | values | {key: row[key] for key in row if key not in (*first, *values, "value", "interval")}


def _z_rows(offsets: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Summarise z by kind of weight (`up_proj`, `q_proj`, ...), and all together."""
    kinds: dict[str, list[torch.Tensor]] = defaultdict(list)
    for module, offset in offsets.items():
        kinds[f"`{module.rsplit('.', 1)[-1]}`"].append(offset)
    rows = []
    for kind, members in {**kinds, "all": list(offsets.values())}.items():
        d = torch.cat(members)  # (numbers of this kind,)
        size = {"kind": kind, "weights": len(members), "numbers": d.numel()}
        distance = {"mean abs(z - 1)": f"{d.abs().mean():.4f}", "max abs(z - 1)": f"{d.abs().max():.4f}"}
        rows.append(size | distance | {"z": f"{1 + d.min():.4f} to {1 + d.max():.4f}"})
    return rows


def _offsets(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Read the offsets of a saved adapter by module, and count its other trained numbers."""
    tensors = read_tensors(folder)
    modules = {key: match["module"] for key in tensors if (match := OFFSET_KEY.fullmatch(key))}
    offsets = {module: tensors[key].float() for key, module in modules.items()}
    if not offsets:
        raise ValueError(f"{folder} holds no offsets, only {sorted(tensors)[:3]}.")
    check_values(offsets)
    return offsets, sum(tensor.numel() for key, tensor in tensors.items() if key not in modules)


def _list(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as a Markdown table, without the columns that are empty in every row."""
    names = [
        n for n in dict.fromkeys(name for row in rows for name in row) if any(row.get(n) is not None for row in rows)
    ]
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
