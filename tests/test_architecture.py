# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: who imports whom, what `import peft_svf` costs, who prints, who uses private names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "peft_svf"

# A wing (or a single module beside the wings) imports from rows above it, never from its own row.
ROWS = [
    ["files"],
    ["rows"],
    ["tuner", "tasks"],
    ["evaluation"],
    ["experts"],
    ["training", "adaptation"],
    ["two_pass", "evolution"],
    ["pipeline"],
    ["_registration"],
    ["__init__"],
    ["cli"],
]
# Inside a wing a module imports from rows above it as well.
WINGS = {
    "tuner": [
        ["basis", "fingerprint", "plans"],
        ["cache", "config", "targets"],
        ["weights", "rows"],
        ["layer"],
        ["stacked", "loading"],
        ["model"],
    ],
    "experts": [
        ["key"],
        ["expert"],
        ["base"],
        ["library", "hub", "export", "convert"],
        ["bundle"],
    ],
    "training": [["run"], ["retention", "evolution", "result"], ["objective"], ["reinforce", "supervised"]],
    "adaptation": [["probe", "search"], ["judge", "router"], ["first_pass"], ["few_shot"]],
}
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}
PRIVATE_NAMES_ALLOWED = {
    "_registration",
    "tuner.layer",
    "tuner.stacked",
    "tuner.weights",
    "tuner.model",
    "training.reinforce",
}
MAY_PRINT = {"cli"}

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def module_of(path: Path) -> str:
    """`src/peft_svf/rows.py` -> "rows"; everything in `tasks/` -> "tasks"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, str]]:
    """
    Every import of a file, inside functions too, as (absolute module, imported name or "").

    Relative imports are resolved against the file's own package.
    """
    package = ["peft_svf", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found += [(module, alias.name) for alias in node.names]
    return found


def own_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports: {"basis", "config"}; a name from the package itself: "__init__"."""
    found = set()
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] == "peft_svf":
            if len(parts) > 1:
                found.add(parts[1])
            elif name and ((PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()):
                found.add(name)
            else:
                found.add("__init__")
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_module_imports_only_from_rows_above(path):
    module = module_of(path)
    assert module in RANK, f"{module} has no rank yet: give it a row in ROWS"
    for other in own_modules(path) - {module}:
        assert other in RANK, f"{module} imports peft_svf.{other}, which has no rank"
        assert RANK[other] < RANK[module], f"{module} (row {RANK[module]}) imports {other} (row {RANK[other]})"


@pytest.mark.parametrize("wing", WINGS)
def test_inside_a_wing_a_module_imports_only_from_rows_above(wing):
    rank = {module: rank for rank, row in enumerate(WINGS[wing]) for module in row}
    files = [path for path in (PACKAGE / wing).glob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in files} == set(rank)
    for path in files:
        siblings = {module.split(".")[2] for module, _ in imports(path) if module.startswith(f"peft_svf.{wing}.")}
        assert all(rank[other] < rank[path.stem] for other in siblings), (path.stem, siblings)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_private_names_of_peft_and_trl_stay_in_four_modules(path):
    private = [
        f"{module}:{name}" if name else module
        for module, name in imports(path)
        if module.split(".")[0] in ("peft", "trl")
        and any(part.startswith("_") and not part.startswith("__") for part in [*module.split("."), name])
    ]
    assert not private or ".".join(path.relative_to(PACKAGE).with_suffix("").parts) in PRIVATE_NAMES_ALLOWED, private


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_cli_prints(path):
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls or module_of(path) in MAY_PRINT, f"prints in lines {calls}"


def test_every_source_file_opens_with_its_licence():
    files = [*FILES, *(p for folder in ("tests", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.py"))]
    first_lines = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8").split("\n", 1)[0] for p in files}
    assert files
    assert [name for name, line in first_lines.items() if line != "# SPDX-License-Identifier: Apache-2.0"] == []


def test_import_brings_no_extra_along():
    # PEFT itself imports bitsandbytes where it is installed, so what counts is what the package adds to its libraries.
    code = (
        "import sys, peft, transformers.pipelines; before = set(sys.modules); import peft_svf; "
        "print(' '.join({name.split('.')[0] for name in set(sys.modules) - before}), '|', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added, everything = (set(part.split()) for part in done.stdout.strip().splitlines()[-1].split("|"))
    assert "peft_svf" in added
    assert not added & {"trl", "datasets", "matplotlib", "bitsandbytes", "gguf", "pandas", "lm_eval", "fastapi"}
    assert not everything & {"trl", "datasets", "matplotlib"}


def test_evolution_strategies_have_a_short_path():
    from peft_svf import evolution, training

    assert evolution.EvolutionConfig is training.EvolutionConfig
    assert evolution.EvolutionTrainer is training.EvolutionTrainer


def module(name):
    return importlib.import_module(f"peft_svf.{name}")


NEEDS = {  # library: its extra, what needs it
    "datasets": ("eval", lambda: module("tasks").get_task("gsm8k").load("test")),
    "math_verify": ("eval", lambda: module("tasks").get_task("math").score("$1$", {"answer": "1"})),
    "trl": ("train", lambda: module("training.reinforce")),
    "cma": ("search", lambda: module("adaptation.search").CovarianceAdaptation(None, np.zeros((1, 2)))),
    "ray": ("ray", lambda: module("adaptation.judge").RayEvaluator(None)),
    "scipy.optimize": ("transfer", lambda: module("experts.convert").match(torch.eye(2))),
}


@pytest.mark.parametrize("library", NEEDS)
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    extra, needs_it = NEEDS[library]
    monkeypatch.delenv("PEFT_SVF_DATA", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    for name in ("objective", "reinforce"):  # are imported again
        monkeypatch.delitem(sys.modules, f"peft_svf.training.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'peft-svf\[{extra}\]'"):
        needs_it()
