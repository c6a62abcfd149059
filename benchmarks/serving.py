# SPDX-License-Identifier: Apache-2.0
"""
What does `peft-svf serve` answer in a second, with one mixture and with many, and how soon?

    python benchmarks/serving.py              # about a quarter of an hour, ten minutes of it the memory
    python benchmarks/serving.py --tiny       # a random model, seconds: for trying

The server is a process of its own; clients are threads with the real `openai` client over loopback. Weights are
SmolLM2-135M's with the experts of examples/. Each cell writes one JSON to `results/serving`:

- `throughput`: new tokens in a second for 8 clients with 8 mixtures at once, for the same requests one after another,
  and for 8 clients on the base; the order alternates in each repetition, and ratios are formed within it.
- `first-token`: seconds to the first text of a stream, for 1, 8 and 32 clients that start together.
- `memory`: resident bytes of the server while 4 clients ask for ten minutes.
"""

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from harness import RESULTS, ROOT, Cell, parser_of, run_cells

SUBJECTS = ("a lighthouse", "the tides", "bread", "chess", "a long winter", "maps", "the violin", "an old bridge")


class Load(NamedTuple):
    """A running server, what it serves, and how much is asked of it."""

    client: Any
    process: psutil.Process
    experts: Sequence[str]
    new_tokens: int
    repetitions: int
    soak: float  # seconds

    def mixtures(self, count: int = 8) -> list[dict[str, float]]:
        """Draw mixtures of all experts."""
        draw = random.Random(0)
        return [{name: round(draw.random() / len(self.experts), 3) for name in self.experts} for _ in range(count)]

    def ask(self, number: int, mixture: dict[str, float]) -> int:
        """Ask for a long answer; return how many tokens came."""
        answer = self.client.chat.completions.create(**self._body(number, mixture))
        return answer.usage.completion_tokens

    def wait(self, number: int, mixture: dict[str, float]) -> float:
        """Ask for a stream; return the seconds to its first text."""
        start, first = time.perf_counter(), 0.0
        for chunk in self.client.chat.completions.create(**self._body(number, mixture), stream=True):
            if not first and chunk.choices[0].delta.content:
                first = time.perf_counter() - start
        return first

    def _body(self, number: int, mixture: dict[str, float]) -> dict[str, Any]:
        prompt = f"Write a long story about {SUBJECTS[number % len(SUBJECTS)]}."
        chat = [{"role": "user", "content": prompt}]
        extra = {"mixture": mixture} if mixture else {"expert": "other"}
        return {
            "model": "base", "messages": chat, "max_tokens": self.new_tokens, "temperature": 0, "extra_body": extra
        }  # fmt: skip


@contextmanager
def serving(settings: argparse.Namespace) -> Iterator[Load]:
    """Start a server in a process of its own, and wait until it answers."""
    from openai import OpenAI

    with tempfile.TemporaryDirectory() as folder, socket.socket() as place:
        base, experts = tiny(Path(folder)) if settings.tiny else real()
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        place.close()
        command = [sys.executable, "-m", "peft_svf.cli", "serve", str(base), "--port", str(port)]
        command += ["--dtype", settings.dtype, *(part for expert in experts for part in ("--experts", str(expert)))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
        with open(Path(folder) / "log", "w") as log, subprocess.Popen(command, stderr=log, env=environment) as process:
            try:
                client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
                for _ in range(600):
                    time.sleep(0.5)
                    try:
                        client.models.list()
                        break
                    except Exception:
                        if process.poll() is not None:
                            raise RuntimeError((Path(folder) / "log").read_text()[-2000:]) from None
                size = (8, 1, 2.0) if settings.tiny else (64, 3, 60 * settings.minutes)
                yield Load(client, psutil.Process(process.pid), [expert.name for expert in experts], *size)
            finally:
                process.terminate()


def real() -> tuple[Path, list[Path]]:
    """SmolLM2-135M-Instruct and the experts of examples/."""
    from smollm2 import smollm2_folder

    return smollm2_folder(), sorted(path for path in (ROOT / "examples" / "experts").iterdir() if path.is_dir())


def tiny(folder: Path) -> tuple[Path, list[Path]]:
    """A random model with two random experts."""
    from peft import get_peft_model
    from tiny_model import tiny_model, tiny_tokenizer
    from transformers import AutoModelForCausalLM

    from peft_svf import SVFConfig

    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name in ("math", "code"):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", init_weights=False)).save_pretrained(str(folder / name))
    return folder / "base", [folder / "math", folder / "code"]


def at_once(clients: int, call: Callable[[int, dict[str, float]], Any], mixtures: Sequence[Any]) -> list[Any]:
    """Make calls from as many threads."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(call, range(len(mixtures)), mixtures))


def throughput(load: Load) -> dict[str, Any]:
    """Measure new tokens in a second."""
    ways = {"8 mixtures": (8, load.mixtures()), "one after another": (1, load.mixtures()), "base": (8, [{}] * 8)}
    at_once(8, load.ask, load.mixtures())  # warm
    rows: list[dict[str, float]] = []
    for repetition in range(load.repetitions):
        row = {}
        for name in list(ways)[:: 1 if repetition % 2 else -1]:
            start = time.perf_counter()
            tokens = sum(at_once(ways[name][0], load.ask, ways[name][1]))
            row[name] = tokens / (time.perf_counter() - start)
        rows.append(row)
        print({name: round(value, 1) for name, value in row.items()}, flush=True)
    others = ("one after another", "base")
    over = {name: statistics.median(row["8 mixtures"] / row[name] for row in rows) for name in others}
    return {"new_tokens": load.new_tokens, "tokens_per_second": rows, "ratio": over}


def first_token(load: Load) -> dict[str, Any]:
    """Measure seconds to the first text."""
    seconds = {}
    for clients in (1, 8, 32):
        taken = sorted(at_once(clients, load.wait, load.mixtures(clients)))
        seconds[clients] = {"median": statistics.median(taken), "max": taken[-1], "all": taken}
        print(f"{clients:3} clients: {seconds[clients]['median']:.2f} s, at most {taken[-1]:.2f} s", flush=True)
    return {"seconds": seconds}


def memory(load: Load) -> dict[str, Any]:
    """Read the server's memory while it answers."""
    start, samples, answers = time.monotonic(), [], 0
    while time.monotonic() - start < load.soak:
        answers += len(at_once(4, load.ask, load.mixtures(4)))
        samples.append((round(time.monotonic() - start, 1), load.process.memory_info().rss))
    quarter = max(1, len(samples) // 4)
    first, last = (statistics.median(size for _, size in part) for part in (samples[:quarter], samples[-quarter:]))
    print(f"{answers} answers, memory of the last quarter over the first: {last / first:.3f}", flush=True)
    return {"answers": answers, "growth": last / first, "samples": samples}


CELLS = {"throughput": throughput, "first-token": first_token, "memory": memory}


def main(arguments: list[str] | None = None) -> list[str]:
    """Run the cells that have no file; return the names of those that failed."""
    parser = parser_of(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a random model, and little of everything")
    parser.add_argument("--threads", type=int, default=2, help="of the server (default: 2)")
    parser.add_argument("--dtype", default="auto", help="of the model (default: the checkpoint's, bfloat16)")
    parser.add_argument("--minutes", type=float, default=10, help="of the memory's cell (default: 10)")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving", help="folder of the results")
    settings = parser.parse_args(arguments)
    about = {"dtype": settings.dtype, "threads": settings.threads, "tiny": settings.tiny}
    with serving(settings) as load:
        cells = [Cell(name, lambda measure=measure: {**about, **measure(load)}) for name, measure in CELLS.items()]
        return run_cells(cells, settings.out, settings.only)


if __name__ == "__main__":
    sys.exit(bool(main()))
