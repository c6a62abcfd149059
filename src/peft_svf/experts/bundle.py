# SPDX-License-Identifier: Apache-2.0
"""
A library, with its mixtures and the settings of a first pass <-> one folder or Hub repository: a bundle.

`transformer2_config.json` lists the contents. Each expert has its folder; the base model is only named, also in
`adapter_config.json`, where transformers and the Hub look for it. What the settings mean is unknown here.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME

from .. import files
from .expert import Mixture, download
from .hub import CARD_NAME, base_id, card_data, table, task_type, upload
from .key import KEY_NAME, RoutingKey
from .library import ExpertLibrary, Source

BUNDLE_NAME = "transformer2_config.json"
PLAIN = re.compile(r"\w[\w.-]*")  # names that can be a folder's
CARD = """\
---
{{ card_data }}
---

# {{ name }}

Experts of `{{ base }}` between which a first pass chooses, request by request (Transformer², arXiv 2501.06252).

```python
import peft_svf  # pip install peft-svf; the import registers the pipeline
from transformers import pipeline

answer = pipeline("transformer2", model="{{ repo_id }}")
print(answer([{"role": "user", "content": "What is 7 + 8?"}], return_dispatch=True))
```

{{ experts }}
"""


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds: experts are folders inside it, or repositories."""

    base_model: str | None
    revision: str | None
    experts: dict[str, Source]
    classifier: Source | None
    mixtures: dict[str, Mixture]
    keys: dict[str, RoutingKey | None]  # of mixtures
    first_pass: dict[str, Any]  # settings; a `Path` is the folder of a part that was saved by itself


def save_bundle(
    library: ExpertLibrary,
    folder: str | os.PathLike[str],
    first_pass: Mapping[str, Any],
    base_model: str | None = None,
) -> None:
    """Write a library and the settings of its first pass; `base_model` is another name for the experts' base."""
    target, (base, revision) = Path(folder), _base(library)
    named = {"base_model_name_or_path": base_model or base, "revision": revision}
    renamed = {"base_model_name_or_path": base_model} if base_model else {}
    places = {n: f"experts/{n if PLAIN.fullmatch(n) else f'expert {i}'}" for i, n in enumerate(library.names)}
    classifier = {library.classifier: "classifier"} if library.classifier else {}
    for name, place in (places | classifier).items():
        expert = library._experts[name]
        replace(expert, config=expert.config | renamed).save(target / place)
    settings = dict(first_pass)
    for key, value in first_pass.items():
        if hasattr(value, "save"):
            value.save(target / key)
            settings[key] = {"folder": key}
    mixtures = {name: asdict(mixture) for name, mixture in library.mixtures.items()}
    for i, name in enumerate(mixtures):
        if (routing := library.keys.get(name)) is not None:
            mixtures[name]["key"] = f"mixtures/{i}"
            files.write(target / mixtures[name]["key"] / KEY_NAME, routing.to_bytes())
    content = named | {
        "experts": places,
        "classifier": "classifier" if library.classifier else None,
        "mixtures": mixtures,
        "first_pass": settings,
        "versions": files.versions(),
    }
    config = {"peft_type": "SVF", "task_type": task_type(library.expert(library.names[0]).config) or None} | named
    files.write(target / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    files.write(target / BUNDLE_NAME, json.dumps(content, indent=2) + "\n")  # last, so that all is there


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

    `base_model` is the Hub id of the base if the experts name a local folder; without any, nothing is uploaded and a
    `ValueError` raised. `options` are those of [`push_expert`]: `private`, `token`, `revision`, `create_pr`, ...
    """
    base = base_id(_base(library)[0], base_model)
    rows = [{"expert": name, "good at": text or None} for name, text in library.descriptions.items()]
    facts = {"name": repo_id.split("/")[-1], "base": base, "repo_id": repo_id, "experts": table(rows)}
    card = ModelCard.from_template(card_data(base, license, ["transformer2"]), template_str=CARD, **facts)
    with tempfile.TemporaryDirectory() as scratch:
        save_bundle(library, scratch, first_pass, base)
        card.save(Path(scratch) / CARD_NAME)
        return upload(Path(scratch), repo_id, **{"commit_message": "Upload SVF experts", **options})


def find_bundle(
    source: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> Path | None:
    """Return the folder of a bundle, downloaded from one commit of the Hub if need be; `None` for anything else."""
    if os.path.isdir(source):
        return Path(source) if (Path(source) / BUNDLE_NAME).is_file() else None
    try:
        listed = download(str(source), revision=revision, token=token, allow_patterns=BUNDLE_NAME)
    except (FileNotFoundError, HFValidationError):
        return None
    return download(str(source), revision=listed.name, token=token) if (listed / BUNDLE_NAME).is_file() else None


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
        mixtures = content.get("mixtures", {})
        places = {name: os.path.basename(m.pop("key")) for name, m in mixtures.items() if "key" in m}
        return Bundle(
            content["base_model_name_or_path"],
            content.get("revision"),
            {name: place(source) for name, source in content["experts"].items()},
            place(content["classifier"]) if content.get("classifier") else None,
            {name: Mixture(**mixture) for name, mixture in mixtures.items()},
            {name: RoutingKey.load(folder / "mixtures" / place) for name, place in places.items()},
            first_pass,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / BUNDLE_NAME} is damaged ({error!r}): fetch it again.") from error


def _base(library: ExpertLibrary) -> tuple[str | None, str | None]:
    """Name the base of a library and its revision: as its experts do, else as the model itself."""
    for name in library.names:
        if (expert := library.expert(name)).base_model:
            return expert.base_model, expert.config.get("revision")
    return getattr(library.model.get_base_model(), "name_or_path", None) or None, None
