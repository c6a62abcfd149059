# SPDX-License-Identifier: Apache-2.0
"""
What does `peft-svf serve` answer in a second, with one mixture and with many, how soon, and for how long?

    python benchmarks/serving.py              # about a quarter of an hour, ten minutes of it the soak
    python benchmarks/serving.py --tiny       # a random model: for trying, and for a soak that isn't about speed

The server is a process of its own; clients are threads with the real `openai` client over loopback. Weights are
SmolLM2-135M's with the experts of examples/. Each cell writes one JSON to `results/serving`:

- `throughput`: new tokens in a second for 8 clients with 8 mixtures at once, for the same requests one after another,
  and for 8 clients on the base; the order alternates in each repetition, and ratios are formed within it, also those
  of the server's CPU time, which a busy machine hardly changes.
- `first-token`: seconds to the first text of a stream, for 1, 8 and 32 clients that start together.
- `soak`: ten minutes of clients that ask, leave at random times, send wrong bodies and keys, and add and remove an
  expert, at a bounded rate: answers that differ from `generate`'s, and resident bytes of the server.
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from harness import RESULTS, ROOT, Cell, Ratio, parser_of, ratio, run_cells

SUBJECTS = ("a lighthouse", "the tides", "bread", "chess", "a long winter", "maps", "the violin", "an old bridge")
KEY, ADMIN = "a-key", "an-admin-key"
CHAT = [{"role": "user", "content": "What is 3 * 14?"}]
NEW = 16  # tokens of an answer in the soak


class Load(NamedTuple):
    """A running server, what it serves, and how much is asked of it."""

    client: Any
    process: psutil.Process
    base: Path
    experts: Sequence[Path]
    new_tokens: int
    repetitions: int
    soak: float  # seconds
    leaving: int  # clients that leave in the soak

    def mixtures(self, count: int = 8) -> list[dict[str, float]]:
        """Draw mixtures of all experts."""
        draw, number = random.Random(0), len(self.experts)
        return [{expert.name: round(draw.random() / number, 3) for expert in self.experts} for _ in range(count)]

    def cpu(self) -> float:
        """Read the CPU seconds that the server has used."""
        times = self.process.cpu_times()
        return times.user + times.system

    def ask(self, number: int, mixture: dict[str, float]) -> int:
        """Ask for a long answer; return how many tokens came."""
        answer = self.client.chat.completions.create(**self._body(number, mixture))
        return answer.usage.completion_tokens

    def wait(self, number: int, mixture: dict[str, float]) -> float:
        """Ask for a stream; return the seconds to its first text."""
        start = time.perf_counter()
        with self.client.chat.completions.create(**self._body(number, mixture), stream=True) as chunks:
            next(chunk for chunk in chunks if chunk.choices[0].delta.content)
            return time.perf_counter() - start

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

    with tempfile.TemporaryDirectory() as name, socket.socket() as place:
        folder = Path(name)
        base, experts = tiny(folder) if settings.tiny else real()
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        place.close()
        command = [sys.executable, "-m", "peft_svf.cli", "serve", str(base), "--port", str(port)]
        command += ["--dtype", settings.dtype, *(part for expert in experts for part in ("--experts", str(expert)))]
        command += ["--folder", str(experts[0].parent)]
        keys = {"PEFT_SVF_API_KEYS": KEY, "PEFT_SVF_ADMIN_KEYS": ADMIN}
        environment = {**os.environ, **keys, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
        with open(folder / "log", "w") as log, subprocess.Popen(command, stderr=log, env=environment) as process:
            try:
                client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=600, max_retries=0)
                for _ in range(600):
                    time.sleep(0.5)
                    try:
                        client.models.list()
                        break
                    except Exception:
                        if process.poll() is not None:
                            raise RuntimeError((folder / "log").read_text()[-2000:]) from None
                size = (8, 1) if settings.tiny else (settings.tokens, settings.repetitions)
                soak = 60 * settings.minutes, settings.leaving
                yield Load(client, psutil.Process(process.pid), base, experts, *size, *soak)
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
    """Measure new tokens in a second, and the server's CPU seconds for a token."""
    ways = {"8 mixtures": (8, load.mixtures()), "one after another": (1, load.mixtures()), "base": (8, [{}] * 8)}
    at_once(8, load.ask, load.mixtures())  # warm
    wall: dict[str, list[float]] = {name: [] for name in ways}  # seconds for a token
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(load.repetitions):
        for name in list(ways)[:: 1 if repetition % 2 else -1]:
            start, used = time.perf_counter(), load.cpu()
            tokens = sum(at_once(ways[name][0], load.ask, ways[name][1]))
            wall[name].append((time.perf_counter() - start) / tokens)
            cpu[name].append((load.cpu() - used) / tokens)
            print(f"{name}: {1 / wall[name][-1]:.1f} tokens/s, {1 / cpu[name][-1]:.1f} in a CPU second", flush=True)
    ratios: dict[str, dict[str, Ratio | None]] = {}
    for kind, seconds in (("wall", wall), ("cpu", cpu)):
        ratios[kind] = {name: ratio(seconds, name, "8 mixtures") for name in ("one after another", "base")}
        print(f"{kind}: 8 mixtures over " + ", ".join(f"{name} {value}" for name, value in ratios[kind].items()))
    return {"new_tokens": load.new_tokens, "seconds_per_token": wall, "cpu_seconds_per_token": cpu, "ratio": ratios}


def first_token(load: Load) -> dict[str, Any]:
    """Measure seconds to the first text, and the server's CPU seconds until the last client has one."""
    seconds = {}
    for clients in (1, 8, 32):
        rounds, cpu = [], []
        for _ in range(load.repetitions):
            used = load.cpu()
            rounds.append(sorted(at_once(clients, load.wait, load.mixtures(clients))))
            cpu.append(load.cpu() - used)
        medians = [statistics.median(taken) for taken in rounds]
        seconds[clients] = {"median": statistics.median(medians), "medians": medians, "cpu": cpu, "rounds": rounds}
        print(f"{clients:3} clients: {', '.join(f'{m:.2f}' for m in medians)} s, CPU {statistics.median(cpu):.2f} s")
    return {"seconds": seconds}


def soak(load: Load) -> dict[str, Any]:
    """Let clients of all kinds at the server, and read its memory meanwhile."""
    samples: list[tuple[float, int]] = []
    start = time.monotonic()

    def sample() -> None:
        samples.append((round(time.monotonic() - start, 1), load.process.memory_info().rss))

    storm = Storm(str(load.client.base_url), answers_alone(load), load.experts[0].name)
    counts = asyncio.run(storm.run(load.soak, load.leaving, sample=sample))
    quarter = max(1, len(samples) // 4)
    first, last = (statistics.median(size for _, size in part) for part in (samples[:quarter], samples[-quarter:]))
    print(f"{dict(counts)}, memory of the last quarter over the first: {last / first:.3f}", flush=True)
    return {"counts": counts, "growth": last / first, "first": first, "last": last, "samples": samples}


def answers_alone(load: Load) -> list[tuple[dict[str, float], str]]:
    """Return what `generate` answers under some mixtures."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_svf import Transformer2Model

    base, tokenizer = AutoModelForCausalLM.from_pretrained(load.base), AutoTokenizer.from_pretrained(load.base)
    model = Transformer2Model(base.float(), tokenizer, list(load.experts))
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = []
    for mixture in [{}, {load.experts[0].name: 1.0}, *load.mixtures(3)]:
        ids = model.generate(**inputs, mixture=mixture, max_new_tokens=NEW, do_sample=False)
        answers.append((mixture, tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers


class Storm:
    """
    Clients that ask rightly and wrongly, leave, and change the experts, all at once; `counts` is what happened.

    Args:
        url (`str`): Of the server, with `/v1`; its keys are `KEY` and `ADMIN`.
        answers (`list[tuple[dict, str]]`): Mixtures, and what has to be answered under them.
        source (`str`): The expert of the server's folder that comes and goes; it is among the mixtures, alone.
    """

    def __init__(self, url: str, answers: Sequence[tuple[Mapping[str, float], str]], source: str) -> None:
        from openai import AsyncOpenAI

        self.answers, self.source, self.draw = answers, source, random.Random(0)
        self.counts = Counter({"answers": 0, "wrong answers": 0, "left": 0})
        settings: dict[str, Any] = {"base_url": url, "timeout": 600, "max_retries": 0}
        self.client, self.admin = (AsyncOpenAI(api_key=key, **settings) for key in (KEY, ADMIN))
        self.longest = 0.0  # seconds of an answer so far

    async def create(self, **changes: Any) -> Any:
        """Send a request."""
        body = {"model": "base", "messages": CHAT, "max_tokens": NEW, "temperature": 0}
        return await self.client.chat.completions.create(**{**body, **changes})

    async def ask(self) -> None:
        """Wait for an answer, and compare it."""
        start, (mixture, expected) = time.monotonic(), self.draw.choice(self.answers)
        answer = await self.create(extra_body={"mixture": mixture})
        self.longest = max(self.longest, time.monotonic() - start)
        self.counts["answers"] += 1
        self.counts["wrong answers"] += answer.choices[0].message.content != expected

    async def leave(self) -> None:
        """Leave before the first token, or later."""
        mixture, _ = self.draw.choice(self.answers)

        async def read() -> None:
            async for _ in await self.create(max_tokens=4 * NEW, extra_body={"mixture": mixture}, stream=True):
                self.counts["pieces that those who left have seen"] += 1

        try:
            await asyncio.wait_for(read(), self.draw.random() * self.longest)
        except asyncio.TimeoutError:
            self.counts["left"] += 1

    async def ask_wrongly(self) -> None:
        """Send what has to be refused."""
        from openai import APIStatusError

        key = {"extra_headers": {"authorization": "Bearer no"}}
        wrong = [{"messages": []}, {"extra_body": {"wishes": 3}}, {"model": "nobody"}, {"max_tokens": "many"}, key]
        try:
            await self.create(**self.draw.choice(wrong))
            self.counts["not refused"] += 1
        except APIStatusError as error:
            form = set(error.response.json()["error"]) == {"message", "type", "param", "code"}
            self.counts[f"refused with {error.status_code}" if form else "refused in another form"] += 1

    async def change(self) -> None:
        """Add an expert, ask it, and remove it."""
        await self.admin.post("/experts", body={"source": self.source, "name": "guest"}, cast_to=object)
        answer = await self.create(model="guest")
        expected = next(text for mixture, text in self.answers if mixture == {self.source: 1.0})
        self.counts["wrong answers"] += answer.choices[0].message.content != expected
        await self.admin.delete("/experts/guest", cast_to=object)
        self.counts["experts added and removed"] += 1

    async def run(
        self, seconds: float, leaving: int, rate: float = 4.0, sample: Callable[[], None] = lambda: None
    ) -> Counter[str]:
        """Ask `rate` times a second, while so many leave; call `sample` a hundred times meanwhile."""
        start = time.monotonic()

        async def repeat(call: Callable[[], Awaitable[None]], every: float) -> None:
            while time.monotonic() - start < seconds or (call == self.leave and self.counts["left"] < leaving):
                begin = time.monotonic()
                await call()
                await asyncio.sleep(max(0.0, every - (time.monotonic() - begin)))

        async def measure() -> None:
            sample()

        await self.ask()  # so that those who leave know how long an answer takes
        kinds = [*[(self.ask, 4 / rate)] * 4, *[(self.leave, 8 * seconds / leaving)] * 8]
        kinds += [(self.ask_wrongly, 1.0), (self.change, 2.0), (measure, seconds / 100)]
        await asyncio.gather(*(repeat(call, every) for call, every in kinds))
        await self.ask()
        await asyncio.gather(self.client.close(), self.admin.close())
        return self.counts


CELLS = {"throughput": throughput, "first-token": first_token, "soak": soak}


def main(arguments: list[str] | None = None) -> list[str]:
    """Run the cells that have no file; return the names of those that failed."""
    parser = parser_of(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a random model, and little of everything")
    parser.add_argument("--threads", type=int, default=2, help="of the server (default: 2)")
    parser.add_argument("--dtype", default="auto", help="of the model (default: the checkpoint's, bfloat16)")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer (default: 48)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--minutes", type=float, default=10, help="of the soak (default: 10)")
    parser.add_argument("--leaving", type=int, default=1000, help="clients that leave in the soak (default: 1000)")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving", help="folder of the results")
    settings = parser.parse_args(arguments)
    about = {"dtype": settings.dtype, "threads": settings.threads, "tiny": settings.tiny}
    with serving(settings) as load:
        cells = [Cell(name, lambda measure=measure: {**about, **measure(load)}) for name, measure in CELLS.items()]
        return run_cells(cells, settings.out, settings.only)


if __name__ == "__main__":
    sys.exit(bool(main()))
