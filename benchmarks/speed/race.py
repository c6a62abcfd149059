# SPDX-License-Identifier: Apache-2.0
"""
Callables -> samples of their time, taken side by side; samples -> ratios; all of a run -> one JSON file.

Contestants of a race run in one process, in another random order in each repetition, so that a slow moment of the
machine hits all of them. A ratio is formed within a repetition; its median and range over the repetitions is what is
reported. This module needs only torch.
"""

import gc
import json
import math
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Clock = Callable[[Callable[[], Any], int], float]
PACKAGES = ("torch", "transformers", "peft", "peft-svf", "safetensors", "numpy")


class NotAvailable(Exception):
    """A contestant that cannot be had here: a plan that this version lacks, a package that is not installed."""


def cpu_clock(run: Callable[[], Any], inner: int) -> float:
    """Seconds of CPU time of the process per call: a busy machine does not count."""
    start = time.process_time()
    for _ in range(inner):
        run()
    return (time.process_time() - start) / inner


def wall_clock(run: Callable[[], Any], inner: int) -> float:
    """Seconds per call by the clock on the wall."""
    start = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - start) / inner


def cuda_clock(run: Callable[[], Any], inner: int) -> float:
    """Seconds per call between two CUDA events."""
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
    """
    What one race measured.

    Args:
        case (`str`): Case of the benchmark, `"B2"`.
        key (`str`): Names the race within the run, `"B2/mlp"`.
        title (`str`): For the page.
        about (`dict`): Shapes, tokens, dtypes.
        clock (`str`): Which clock the samples are from.
        inner (`int`): Calls per sample.
        samples (`dict[str, list[float]]`): Seconds per call; entry i of all contestants is from repetition i.
        not_available (`dict[str, str]`): Contestants that did not run, with the reason.
    """

    case: str
    key: str
    title: str
    about: dict[str, Any] = field(default_factory=dict)
    clock: str = ""
    inner: int = 1
    samples: dict[str, list[float]] = field(default_factory=dict)
    not_available: dict[str, str] = field(default_factory=dict)


def race(
    result: Race,
    contestants: Mapping[str, Callable[[], Any] | NotAvailable],
    *,
    clock: Clock = cpu_clock,
    budget: float = 10.0,
    least: int = 3,
    most: int = 21,
    sample: float = 0.002,
    rehearse: float = 0.05,
    seed: int = 0,
) -> Race:
    """
    Time contestants against each other.

    Args:
        result ([`Race`]):
            Filled and returned.
        contestants (`Mapping[str, Callable]`):
            What to call, by name. One that raises in its warm-up is left out, with its message.
        clock (`Clock`):
            [`cpu_clock`], [`wall_clock`] or [`cuda_clock`].
        budget (`float`):
            Seconds for all repetitions together; it sets their number between `least` and `most`.
        sample (`float`):
            Calls shorter than this many seconds are repeated within a sample.
        rehearse (`float`):
            Contestants whose first call is shorter than this many seconds are called twice more before the estimate.
        seed (`int`):
            Of the orders.
    """
    result.clock = clock.__name__
    first: dict[str, float] = {}
    for name, run in contestants.items():
        try:
            if isinstance(run, NotAvailable):
                raise run
            first[name] = clock(run, 1)
            if first[name] < rehearse:  # the first call also allocates and compiles
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
    gc.disable()  # a collection would be charged to whom it happens to
    try:
        for _ in range(repetitions):
            for name in order.sample(names, len(names)):
                result.samples[name].append(clock(contestants[name], result.inner))  # type: ignore[arg-type]
    finally:
        gc.enable()
    return result


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest of the ratios within the repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def ratio(samples: Mapping[str, list[float]], name: str, *over: str) -> Ratio | None:
    """Time of `name` over the sum of the times of `over`, or `None` where one of them did not run."""
    if not all(samples.get(key) for key in (name, *over)):
        return None
    ratios = [x / sum(parts) for x, *parts in zip(samples[name], *(samples[key] for key in over), strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def machine() -> dict[str, Any]:
    """The processor, its cores and memory, the GPU if there is one."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    found: dict[str, Any] = {"system": platform.system(), "processor": model, "cores": os.cpu_count()}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """The versions of the packages that matter here; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Run:
    """
    One run of a benchmark and its file, which is written anew, whole, after every race.

    Args:
        folder (`Path`): Where the file goes; its name is the time of the start, and an existing one is left alone.
        settings (`dict`): What the run was asked for; the seed among them.
        prefix (`str`): Of the name.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], prefix: str = "speed") -> None:
        self.start = time.monotonic()
        now = datetime.now(timezone.utc)
        self.content: dict[str, Any] = {
            "benchmark": prefix,
            "started": now.isoformat(timespec="seconds"),
            "command": shlex.join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
            "settings": settings,
            "versions": versions(),
            "machine": machine(),
            "seconds": 0.0,
            "races": [],
            "facts": {},
        }
        folder.mkdir(parents=True, exist_ok=True)
        stem, number = f"{prefix}-{now.strftime('%Y%m%d-%H%M%S')}", 1
        while True:
            self.path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
            try:
                self.path.touch(exist_ok=False)
                break
            except FileExistsError:
                number += 1
        self._write()

    @property
    def elapsed(self) -> float:
        """Seconds since the start, by the clock on the wall."""
        return time.monotonic() - self.start

    def add(self, done: Race) -> Race:
        """Keep a race and say how it went."""
        self.content["races"].append(asdict(done))
        self._write()
        middle = {name: statistics.median(samples) for name, samples in done.samples.items()}
        base = next(iter(middle.values()), 1.0)
        row = ", ".join(f"{name} {x / base:.2f}" for name, x in middle.items())
        count = len(next(iter(done.samples.values()), []))
        print(f"[{self.elapsed:4.0f} s] {done.key} (x{count}, {base * 1e3:.3g} ms): {row}", flush=True)
        for name, reason in done.not_available.items():
            print(f"         {name}: not available: {reason}", flush=True)
        return done

    def fact(self, key: str, value: Any) -> None:
        """Keep a measurement that is no race: bytes, errors, counts."""
        self.content["facts"][key] = value
        self._write()
        print(f"[{self.elapsed:4.0f} s] {key}: {json.dumps(value)[:300]}", flush=True)

    def finish(self) -> None:
        """Write the time that the whole run took."""
        self._write()

    def _write(self) -> None:
        self.content["seconds"] = round(self.elapsed, 1)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".writing-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self.content, file, indent=1)
        os.chmod(temporary, 0o644)
        os.replace(temporary, self.path)
