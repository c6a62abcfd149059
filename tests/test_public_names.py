# SPDX-License-Identifier: Apache-2.0
"""What README, docs and examples import exists, and the package's public names are those of `__all__`."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import peft_svf

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
SNIPPET = re.compile(r"^ *(?:>>> )?(from peft_svf[\w.]* import (?:\([^)]*\)|.+)|import peft_svf[\w.]*)", re.MULTILINE)
REFERENCE = re.compile(r"^::: (peft_svf[\w.]*)", re.MULTILINE)  # a page that is generated from docstrings


def resolve(name: str) -> object:
    """Find `peft_svf.a.b`, which is a module or a name in one."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(resolve(module) if module else None, attribute)


def imported(source: str) -> list[str]:
    """List the names of the package that a source imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == "peft_svf"]


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_or_script_imports_exists(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        names = [*REFERENCE.findall(text), *imported("\n".join(SNIPPET.findall(text)))]
    else:
        names = imported(text)
    for name in names:
        resolve(name)


def test_public_names_are_those_of_all_and_say_where_they_live():
    assert sorted(peft_svf.__all__) == peft_svf.__all__
    for name in peft_svf.__all__:
        assert getattr(peft_svf, name).__module__.startswith("peft_svf.")
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        peft_svf.no_such_name  # noqa: B018
    assert Path(peft_svf.__file__).with_name("py.typed").is_file()
