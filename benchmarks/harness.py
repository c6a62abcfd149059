# SPDX-License-Identifier: Apache-2.0
"""
What all benchmarks share: cells that run once and leave one JSON each, and races of callables with their ratios.

Contestants of a race run in one process, in a new random order in each repetition, so that a slow moment of the
machine hits all of them. A ratio is formed within a repetition; reports give its median and range over repetitions.
"""

import argparse
import gc
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peft_svf import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))  # smollm2.py

Clock = Callable[[Callable[[], Any], int], float]


class NotAvailable(Exception):
    """A contestant that cannot run here, with the reason."""


def cpu_clock(run: Callable[[], Any], inner: int, now: Callable[[], float] = time.process_time) -> float:
    """Measure seconds of CPU time of this process per call, which a busy machine hardly changes."""
    start = now()
    for _ in range(inner):
        run()
    return (now() - start) / inner


def wall_clock(run: Callable[[], Any], inner: int) -> float:
    """Measure seconds per call."""
    return cpu_clock(run, inner, time.perf_counter)


def cuda_clock(run: Callable[[], Any], inner: int) -> float:
    """Measure seconds per call between two CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / inner


@dataclass
class Race:
    """The measurements of one race."""

    case: str  # "B2"
    key: str  # "B2/mlp"
    title: str  # on the page
    about: dict[str, Any] = field(default_factory=dict)  # shapes, tokens, dtypes
    clock: str = ""
    inner: int = 1  # calls per sample
    samples: dict[str, list[float]] = field(default_factory=dict)  # seconds per call; entry i is of repetition i
    not_available: dict[str, str] = field(default_factory=dict)  # contestants that did not run, with the reason


def race(
    result: Race,
    contestants: Mapping[str, Callable[[], Any] | NotAvailable],
    *,
    clock: Clock = cpu_clock,
    budget: float = 10.0,
    least: int = 3,
    most: int = 21,
    sample: float = 0.002,
    seed: int = 0,
) -> Race:
    """
    Time contestants against each other, in place of `result`; one that raises in its warm-up is left out.

    Args:
        budget (`float`): Seconds for all repetitions together; sets their number between `least` and `most`.
        sample (`float`): Calls shorter than this many seconds are repeated within a sample.
        seed (`int`): Seed of the orders.
    """
    result.clock, first = clock.__name__, {}
    for name, run in contestants.items():
        try:
            if isinstance(run, NotAvailable):
                raise run
            clock(run, 1)  # allocates and compiles
            first[name] = min(clock(run, 1), clock(run, 1))
        except Exception as error:
            result.not_available[name] = f"{type(error).__name__}: {error}".removeprefix("NotAvailable: ")[:300]
    if not first:
        return result
    result.inner = max(1, min(1000, math.ceil(sample / max(min(first.values()), 1e-7))))
    repetitions = max(least, min(most, int(budget / (sum(first.values()) * result.inner))))
    names, order = list(first), random.Random(seed)
    result.samples = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection would be charged to whichever contestant triggers it
    try:
        for _ in range(repetitions):
            for name in order.sample(names, len(names)):
                result.samples[name].append(clock(contestants[name], result.inner))  # type: ignore[arg-type]
    finally:
        gc.enable()
    return result


class Ratio(NamedTuple):
    """Median, smallest and largest of the ratios within the repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def ratio(samples: Mapping[str, list[float]], name: str, *over: str) -> Ratio | None:
    """Divide the time of `name` by the sum of the times of `over`; `None` if one of them did not run."""
    if not all(samples.get(key) for key in (name, *over)):
        return None
    ratios = [x / sum(parts) for x, *parts in zip(samples[name], *(samples[key] for key in over), strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def machine() -> dict[str, Any]:
    """Describe the processor, its cores, memory and load, and the GPU if there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    facts: dict[str, Any] = {"system": platform.system(), "processor": model or platform.machine()}
    facts |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    facts["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
    return facts


def header(seed: int) -> dict[str, Any]:
    """Record what every result file carries: command, start, seed, versions, machine."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": {"python": platform.python_version(), **files.versions()},
        "machine": machine(),
    }


class Run:
    """One run of the speed benchmark and its file: a new one, named for the start, written after every race."""

    def __init__(self, folder: Path, settings: dict[str, Any], prefix: str = "speed") -> None:
        self.start = time.monotonic()
        self.content: dict[str, Any] = {"benchmark": prefix, **header(settings["seed"]), "settings": settings}
        self.content |= {"seconds": 0.0, "races": [], "facts": {}}
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{prefix}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
        numbers = ("", *(f"-{i}" for i in range(2, 100)))
        self.path = next(p for i in numbers if not (p := folder / f"{stem}{i}.json").exists())
        self.write()

    def add(self, done: Race) -> Race:
        """Keep a race and print how it went."""
        self.content["races"].append(asdict(done))
        self.write()
        middle = {name: statistics.median(samples) for name, samples in done.samples.items()}
        base = next(iter(middle.values()), 1.0)
        row = ", ".join(f"{name} {x / base:.2f}" for name, x in middle.items())
        count = len(next(iter(done.samples.values()), []))
        print(f"[{self.content['seconds']:4.0f} s] {done.key} (x{count}, {base * 1e3:.3g} ms): {row}", flush=True)
        for name, reason in done.not_available.items():
            print(f"         {name}: not available: {reason}", flush=True)
        return done

    def fact(self, key: str, value: Any) -> None:
        """Keep a measurement that isn't a race: bytes, errors, counts."""
        self.content["facts"][key] = value
        self.write()
        print(f"[{self.content['seconds']:4.0f} s] {key}: {json.dumps(value)[:300]}", flush=True)

    def write(self) -> None:
        """Write the file."""
        self.content["seconds"] = round(time.monotonic() - self.start, 1)
        files.write(self.path, json.dumps(self.content, indent=1))


class Cell(NamedTuple):
    """One measurement: the stem of its file, and a function that returns its JSON values."""

    name: str
    measure: Callable[[], dict[str, Any]]


def run_cells(cells: Sequence[Cell], folder: Path, only: str = "", minutes: float = 60, seed: int = 0) -> list[str]:
    """Run the cells without a file until the minutes are over; return the names of those that raised."""
    start, failed = time.monotonic(), []
    missing = [cell for cell in cells if only in cell.name and not (folder / f"{cell.name}.json").exists()]
    print(f"{len(missing)} of {len(cells)} cells to run, {minutes:g} minutes", flush=True)
    for i, cell in enumerate(missing):
        if time.monotonic() - start >= 60 * minutes:
            print(f"{len(missing) - i} cells not run: the time is over", flush=True)
            break
        about, wall, cpu = header(seed), time.perf_counter(), time.process_time()
        try:
            result = cell.measure()
        except Exception:
            failed.append(cell.name)
            print(f"{cell.name} failed: {traceback.format_exc()}", flush=True)
            continue
        spent = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        files.write(folder / f"{cell.name}.json", json.dumps({"cell": cell.name, **about, **spent, **result}) + "\n")
        shown = f"accuracy {result['accuracy']:.3f}, " if "accuracy" in result else ""
        print(f"{cell.name}: {shown}{spent['cpu_seconds']} CPU s", flush=True)
    return failed


def result_of(folder: Path, name: str) -> dict[str, Any] | None:
    """Read the result of a cell; `None` if it was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that has cells."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of the cells to run")
    return parser


def run_trainings(doc: str | None, trainings: Iterable[Any], measure: Callable[[Any], Any], folder: Path) -> None:
    """Run the trainings without a result, each in its own process."""
    parser = parser_of(doc)
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # the one of a process
    args, cells = parser.parse_args(), {training.name: training for training in trainings}
    if args.cell:
        cell = cells[args.cell]
        sys.exit(bool(run_cells([Cell(cell.name, lambda: measure(cell))], folder, seed=cell.seed)))
    for name in cells:
        if args.only in name and result_of(folder, name) is None:
            subprocess.run([sys.executable, sys.argv[0], "--cell", name])
