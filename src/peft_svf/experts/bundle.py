# SPDX-License-Identifier: Apache-2.0
"""
A library, with its mixtures and the settings of a first pass <-> one folder or Hub repository: a bundle.

`transformer2_config.json` lists what is in it; each expert lies in a folder of its own, and the base model is only
named. `adapter_config.json` names it too, by which transformers and the Hub know whose bundle it is. What the settings
mean is unknown here.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from peft.utils import CONFIG_NAME

from .. import files
from .expert import Expert, Mixture
from .hub import CARD_NAME, TAGS, base_id, table, task_type, upload
from .library import ExpertLibrary, Source
from .saved import download

BUNDLE_NAME = "transformer2_config.json"
PLAIN = re.compile(r"\w[\w.-]*")  # names that can be a folder's
CARD = """\
# {name}

Experts of `{base}` between which a first pass chooses, request by request (Transformer², arXiv 2501.06252).

```python
import peft_svf  # pip install peft-svf; the import registers the pipeline
from transformers import pipeline

answer = pipeline("transformer2", model="{repo_id}")
print(answer("What is 7 + 8?", return_dispatch=True))
```

{experts}
"""


@dataclass(frozen=True)
class Bundle:
    """
    What a bundle holds.

    Args:
        base_model, revision (`str`, *optional*): The base that its experts belong to.
        experts (`dict[str, ...]`): Folders inside the bundle, or repositories, by name.
        classifier (folder or repository, *optional*): The expert of the first pass.
        mixtures (`dict[str, Mixture]`): Named mixtures.
        first_pass (`dict[str, Any]`): Settings; a `Path` is the folder of a part that was saved by itself.
    """

    base_model: str | None
    revision: str | None
    experts: dict[str, Source]
    classifier: Source | None = None
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    first_pass: dict[str, Any] = field(default_factory=dict)


def save_bundle(library: ExpertLibrary, folder: str | os.PathLike[str], first_pass: Mapping[str, Any]) -> None:
    """Write a library and the settings of its first pass; the list of contents comes last."""
    target = Path(folder)
    names = {name: name if PLAIN.fullmatch(name) else f"expert {i}" for i, name in enumerate(library.names)}
    experts = {name: library.expert(name) for name in names}
    for name, expert in experts.items():
        expert.save(target / "experts" / names[name])
    if library.classifier:
        library._experts[library.classifier].save(target / "classifier")
    settings: dict[str, Any] = {}
    for key, value in first_pass.items():
        if hasattr(value, "save"):
            value.save(target / key)
        settings[key] = {"folder": key} if hasattr(value, "save") else value
    base, revision = _base(library, experts)
    content = {
        "base_model_name_or_path": base,
        "revision": revision,
        "experts": {name: f"experts/{place}" for name, place in names.items()},
        "classifier": "classifier" if library.classifier else None,
        "mixtures": {name: asdict(mixture) for name, mixture in library.mixtures.items()},
        "first_pass": settings,
        "versions": files.versions(),
    }
    config = {"peft_type": "SVF", "base_model_name_or_path": base, "revision": revision}
    config["task_type"] = task_type(next(iter(experts.values())).config) or None
    files.write(target / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    files.write(target / BUNDLE_NAME, json.dumps(content, indent=2) + "\n")


def push_bundle(
    library: ExpertLibrary,
    repo_id: str,
    first_pass: Mapping[str, Any],
    *,
    base_model: str | None = None,
    license: str | None = None,
    **options: Any,
) -> CommitInfo:
    """
    Upload a library as a bundle with a card, in one commit.

    Args:
        base_model (`str`, *optional*): Hub id of the base, if the experts name a local folder.
        license (`str`, *optional*): For the card.
        options: As in [`push_expert`]: `private`, `token`, `revision`, `create_pr`, `commit_message`.

    Raises:
        `ValueError`: if no Hub id of the base is known; nothing is uploaded then.
    """
    base = base_id(_base(library, {name: library.expert(name) for name in library.names})[0], base_model)
    with tempfile.TemporaryDirectory() as scratch:
        save_bundle(library, scratch, first_pass)
        for path in Path(scratch).rglob("*_config.json"):
            config = files.read_json(path) | {"base_model_name_or_path": base}
            files.write(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
        tags = [*TAGS, "transformer2", f"base_model:adapter:{base}"]
        data = ModelCardData(
            base_model=base, base_model_relation="adapter", library_name="peft", license=license, tags=tags
        )
        rows = [{"expert": name, "good at": text or None} for name, text in library.descriptions.items()]
        text = CARD.format(name=repo_id.split("/")[-1], base=base, repo_id=repo_id, experts=table(rows))
        (Path(scratch) / CARD_NAME).write_text(str(ModelCard(f"---\n{data}\n---\n\n{text}")), encoding="utf-8")
        return upload(Path(scratch), repo_id, **{"commit_message": "Upload SVF experts", **options})


def find_bundle(
    source: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> Path | None:
    """Return the folder of a bundle, downloaded from one commit if it lies on the Hub; `None` for anything else."""
    if os.path.isdir(source):
        return Path(source) if (Path(source) / BUNDLE_NAME).is_file() else None
    try:
        listed = hf_hub_download(str(source), BUNDLE_NAME, revision=revision, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    return download(str(source), revision=Path(listed).parent.name, token=token)


def read_bundle(folder: Path) -> Bundle:
    """Read what a bundle lists. Raises `ValueError` if its file is damaged."""
    content = files.read_json(folder / BUNDLE_NAME)

    def place(source: str) -> Source:
        inside = (folder / source).resolve()
        return inside if inside.is_relative_to(folder.resolve()) and inside.is_dir() else source

    try:
        first_pass = {
            key: folder / os.path.basename(value["folder"]) if isinstance(value, dict) else value
            for key, value in content.get("first_pass", {}).items()
        }
        return Bundle(
            content["base_model_name_or_path"],
            content.get("revision"),
            {name: place(source) for name, source in content["experts"].items()},
            place(content["classifier"]) if content.get("classifier") else None,
            {name: Mixture(**mixture) for name, mixture in content.get("mixtures", {}).items()},
            first_pass,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / BUNDLE_NAME} is damaged ({error!r}): fetch it again.") from error


def _base(library: ExpertLibrary, experts: Mapping[str, Expert]) -> tuple[str | None, str | None]:
    """Name the base of a library and its revision: as its experts do, else as the model itself."""
    for expert in experts.values():
        if expert.base_model:
            return expert.base_model, expert.config.get("revision")
    return getattr(library.model.get_base_model(), "name_or_path", None) or None, None
