# SPDX-License-Identifier: Apache-2.0
"""
Run every Python and shell block of the README and the documentation: page by page, in order, from a fresh folder.

Blocks run as they are written. What they download lies in the Hub's cache beforehand: tiny random models and experts
under the names that the pages use. A block with `title="name"` is written to that file, in whatever language. A block
that can't run here has `<!-- skip: reason -->` on the line above it, and the reason is reported.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import nbformat
import pico
import pytest
import seeing
import torch
from filelock import FileLock
from nbclient import NotebookClient
from peft import get_peft_model
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.cli import main

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"(?:<!-- skip: (?P<reason>[^\n]+) -->\n)?"
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"\n]+)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
PAGES = {page: list(FENCE.finditer(page.read_text())) for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXPERTS = {"math": "a number to work out", "code": "a program to write", "dispatch": "naming the kind of a request"}


def publish(repo_id: str, folder: str | Path, again: bool = True, **_) -> None:
    """Put a folder into the Hub's cache, as if it had been downloaded; tests side by side share the cache."""
    name = huggingface_hub.file_download.repo_folder_name(repo_id=repo_id, repo_type="model")
    home, revision = Path(huggingface_hub.constants.HF_HUB_CACHE) / name, "0" * 40
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        if again or not (home / "refs").exists():
            shutil.copytree(folder, home / "snapshots" / revision, dirs_exist_ok=True)
            (home / "refs").mkdir(exist_ok=True)
            (home / "refs" / "main").write_text(revision)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Fill the Hub's cache, and return the folder of the model that stands for SmolLM2."""
    folder = tmp_path_factory.mktemp("hub")
    config = tiny_model().config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 4096})
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "smollm2")
    tiny_tokenizer().save_pretrained(folder / "smollm2")
    publish(SMOLLM2, folder / "smollm2", again=False)
    seeing.model().save_pretrained(folder / "smolvlm")
    seeing.processor().save_pretrained(folder / "smolvlm")
    publish("HuggingFaceTB/SmolVLM-256M-Instruct", folder / "smolvlm", again=False)
    for seed, (name, description) in enumerate(EXPERTS.items()):
        base = AutoModelForCausalLM.from_pretrained(SMOLLM2)
        model = get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", description=description))
        pico.randomize(model, seed=seed, scale=0.1)
        model.save_pretrained(str(folder / name))
        publish(f"me/{name}", folder / name, again=False)
    return folder


@pytest.fixture
def clone(hub, tmp_path, monkeypatch):
    """Enter a fresh folder that looks like a clone of the repository, with experts of the tiny model."""
    ignored = shutil.ignore_patterns("experts", "__pycache__")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=ignored)
    for folder in (ROOT / "examples" / "experts").iterdir():
        shutil.copytree(hub / "math", tmp_path / "examples" / "experts" / folder.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # `import examples`, as from the root of a clone
    monkeypatch.delitem(sys.modules, "examples", raising=False)
    monkeypatch.setenv("PEFT_SVF_SMOLLM2", str(hub / "smollm2"))
    monkeypatch.setenv("PEFT_SVF_DATA", str(ROOT / "examples" / "data"))
    (tmp_path / "empty").mkdir()

    def create_repo(self, repo_id, **_):
        publish(repo_id, tmp_path / "empty", again=False)
        return huggingface_hub.RepoUrl(repo_id)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, *, repo_id, folder_path, **_: publish(repo_id, folder_path),
    )
    return tmp_path


def shell(code: str) -> None:
    """Run a shell block line by line: `peft-svf` in this process, which has torch imported, the rest by bash."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["peft-svf"]:
            assert main(words[1:]) in (None, 0), line
        elif words:
            subprocess.run(
                ["bash", "-c", line],
                check=True,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )


CASES = [
    pytest.param(page, id=page.name)
    for page, blocks in PAGES.items()
    if any(block["language"] in ("python", "bash") for block in blocks)
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", CASES)
def test_every_block_of_a_page_runs(page, clone):
    names = {"__name__": "__main__"}
    for block in PAGES[page]:
        language, title, code = block["language"], block["title"], block["code"]
        if title:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(code)
        if block["reason"]:
            continue
        line = page.read_text()[: block.start("code")].count("\n")
        if language == "python":
            exec(compile("\n" * line + code, str(page), "exec"), names)
        elif language == "bash":
            shell(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = [page.parent / link for link in LINK.findall(page.read_text())]
    assert [str(link) for link in links if not link.exists()] == []
    outside = [str(link) for link in links if ROOT / "docs" not in link.resolve().parents]
    assert page == ROOT / "README.md" or outside == [], "the site holds docs/ alone: write the file's name instead"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["quickstart", "qsvf", "demo"])
def test_examples_run(name, clone, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *(["--questions", "4"] if name == "demo" else [])])
    runpy.run_path(str(clone / "examples" / f"{name}.py"), run_name="__main__")
    if name == "qsvf":  # trained on the packed base, better on the whole one too
        losses = re.findall(r"loss .*: +([\d.]+) -> ([\d.]+)", capsys.readouterr().out)
        assert len(losses) == 2 and all(float(after) < float(before) for before, after in losses)


NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def run_notebook(path):
    """Run a notebook beside itself; return what it shows now and what it showed when it was written."""
    notebook = nbformat.read(path, 4)
    shown = [cell.get("outputs", []) for cell in notebook.cells]
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    return [cell.get("outputs", []) for cell in notebook.cells], shown


def texts(outputs):
    return [[output.get("text") or output["data"]["text/plain"] for output in part] for part in outputs]


@pytest.mark.slow
def test_the_notebook_runs(clone):
    run_notebook(clone / "examples" / NOTEBOOK.name)


@pytest.mark.real
def test_the_notebook_shows_what_it_prints():
    now, shown = run_notebook(NOTEBOOK)
    written = ["".join("".join(part) for part in texts(outputs)) for outputs in (now, shown)]
    assert written[0] == written[1], "jupyter execute --inplace examples/quickstart.ipynb"
