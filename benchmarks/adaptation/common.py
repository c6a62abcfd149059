# SPDX-License-Identifier: Apache-2.0
"""
What the measurements of adaptation share: SmolLM2-135M with the experts of examples/, cells with a result file each.

A cell is one measurement; it writes `<folder>/<cell>.json` once, with command, seed, versions and machine, and is not
run again while that file is there. The folder is named for the content of the experts and the edition of the
measurements: retrained experts, or other settings or code that move figures, get a new one.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import disable_progress_bars
from transformers.utils import logging

from peft_svf import Expert, Mixture, Transformer2Model
from peft_svf.evaluation import NINETY_FIVE, evaluate
from peft_svf.tasks import get_task
from peft_svf.training.result import versions, write_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # smollm2.py
EXPERTS = ("code", "math", "reasoning")
FOLDERS = {name: ROOT / "examples" / "experts" / name for name in EXPERTS}
CLASSIFIER = ROOT / "examples" / "classifiers" / "dispatch"
BATCH = 16
EDITION = 3  # raised with every change of settings or code that moves figures


class Cell(NamedTuple):
    """One measurement: what its file is called, and what finds the JSON values in it."""

    name: str
    measure: Callable[[], dict[str, Any]]


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="wall clock after which no further cell begins")
    parser.add_argument("--only", default="", help="part of the name of the cells to run, such as few_shot-svamp")
    parser.add_argument("--rows", type=int, help="at most so many questions of a task, for trying; needs --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result files; default results/<hash of the experts>")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.rows and not args.out:
        raise SystemExit("--rows is for trying: give --out, too, so that its results stay apart.")
    args.out = args.out or results_folder()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    disable_progress_bars()  # one line per cell
    logging.disable_progress_bar()
    return args


def fingerprints() -> dict[str, str]:
    """A hash of the z-vectors of each expert and of the classifier."""
    folders = {**FOLDERS, "classifier": CLASSIFIER}
    return {
        name: hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        for name, folder in folders.items()
    }


def results_folder() -> Path:
    """The folder of the experts and measurements as they are now."""
    content = "".join([*fingerprints().values(), str(EDITION)])
    return HERE / "results" / hashlib.sha256(content.encode()).hexdigest()[:12]


def run_cells(cells: Sequence[Cell], args: argparse.Namespace, keep_going: bool = False) -> list[str]:
    """
    Run the cells that have no file yet, in their order, until the time is used up.

    Returns:
        The names of cells that raised, which are told and passed over with `keep_going`.
    """
    experts = fingerprints()
    start, missing = time.monotonic(), [cell for cell in cells if not (args.out / f"{cell.name}.json").exists()]
    missing = [cell for cell in missing if args.only in cell.name]
    failed = []
    print(f"{len(missing)} of {len(cells)} cells to run; budget {args.minutes:g} min", flush=True)
    for done, cell in enumerate(missing):
        spent = (time.monotonic() - start) / 60
        if spent >= args.minutes:
            print(f"{len(missing) - done} cells not run: the {args.minutes:g} min are used up", flush=True)
            break
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            result = cell.measure()
        except Exception:
            if not keep_going:
                raise
            failed.append(cell.name)
            print(f"{spent:5.1f} min  {cell.name} failed: {traceback.format_exc()}", flush=True)
            continue
        result = {
            "cell": cell.name,
            "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
            "started": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
            "seed": args.seed,
            "versions": {"python": platform.python_version(), **versions(), "cma": version("cma")},
            "machine": machine(),
            "experts": experts,
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            **result,
        }
        path = args.out / f"{cell.name}.json"
        if path.exists():  # another process was faster
            raise SystemExit(f"{path} is there already: results are not written over.")
        write_file(path, json.dumps(result) + "\n")
        shown = f"accuracy {result['accuracy']:.3f}, " if "accuracy" in result else ""
        print(f"{spent:5.1f} min  {cell.name}: {shown}{result['cpu_seconds']} CPU s", flush=True)
    return failed


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 1),  # what else ran
    }


@functools.cache
def load(dtype: torch.dtype = torch.bfloat16) -> Transformer2Model:
    """The base model with the experts and the classifier; in float32 their bases are float32, too."""
    from smollm2 import load_smollm2

    base, tokenizer = load_smollm2(dtype)
    experts = {name: Expert.load(folder) for name, folder in FOLDERS.items()}
    if dtype == torch.float32:
        experts = {n: Expert(n, e.offsets, e.config | {"basis_dtype": "float32"}) for n, e in experts.items()}
    return Transformer2Model(base, tokenizer, experts, CLASSIFIER)


def score(model: Transformer2Model, rows: Sequence[Mapping[str, Any]], alpha: Mapping[str, float]) -> dict[str, Any]:
    """Accuracy of one mixture on rows of the choice form, with [id, right] of each."""
    with model.using(Mixture(dict(alpha))) as active:
        return scored([(r["id"], int(r["right"])) for r in evaluate(active, model.tokenizer, rows, BATCH).records])


def scored(records: Sequence[tuple[str, int]]) -> dict[str, Any]:
    return {"n": len(records), "accuracy": sum(right for _, right in records) / len(records), "records": records}


def questions(task: str, count: int, args: argparse.Namespace, split: str = "test", start: int = 0) -> list[dict]:
    """Rows of the choice form, `start` of them left out, at most `--rows`."""
    return get_task(task).rows(split, limit=start + min(count, args.rows or count), seed=args.seed)[start:]


def found(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of a cell, `None` if it was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and 95 % half-width of `one - other` in accuracy over the rows of both."""
    before = dict(other["records"])
    gaps = torch.tensor([right - before[row] for row, right in one["records"]], dtype=torch.float64)
    return float(gaps.mean()), NINETY_FIVE * float(gaps.std(correction=0)) / len(gaps) ** 0.5
