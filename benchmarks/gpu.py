# SPDX-License-Identifier: Apache-2.0
"""
The speed of SVF on one GPU, with Llama-3-8B's shapes and random weights in bfloat16; ends within eight minutes.

    python benchmarks/gpu.py                          # everything
    python benchmarks/gpu.py --cases G1,G4            # some of it
    python benchmarks/gpu.py --device cpu --tiny      # the program itself, in seconds

G1 to G4 (one layer, the merge of all weights, decoding, factorising) need torch alone. G5 and G6 (training step and
decoding of the whole model) need PEFT and transformers in the versions of pyproject.toml; where they are missing, the
start says which wheels would help and the rest runs. Writes gpu_results/gpu-<time>.json, anew after every race; its
page comes from `python benchmarks/speed/report.py FILE`.

Bases are stand-ins: orthogonal matrices that are not the weights' own, because no time here depends on directions, and
factorising all weights takes longer than the run. G3 times that on its own.
"""

import argparse
import importlib
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))
sys.path.insert(0, str(ROOT / "src"))

import formulas  # noqa: E402
from race import NotAvailable, Race, Run, cuda_clock, race, wall_clock  # noqa: E402

BASE, LORA, LORA_BASE_DTYPE = "base", "LoRA r=16, float32", "LoRA r=16, base dtype"
PLANS = ("merged", "narrow", "factored", "k=64")
TINY = formulas.Architecture("tiny", 24, 40, 2, 4, 2, 6)
SPREAD = 0.05  # of the random offsets


def missing_packages() -> list[str]:
    """The requirements of pyproject.toml that are not met here, as pip writes them; torch aside."""
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("\ndependencies = [", 1)[1].split("]", 1)[0]
    missing = []
    for line in re.findall(r'"([^"]+)"', block):
        requirement = Requirement(line)
        try:
            if requirement.specifier.contains(version(requirement.name)):
                continue
        except PackageNotFoundError:
            pass
        missing.append(line)
    return [line for line in missing if not line.startswith("torch>")]


def own(name: str) -> Any:
    """Import a module of the package that needs torch alone, past the package's `__init__` where PEFT is missing."""
    if "peft_svf" not in sys.modules and missing_packages():
        package = types.ModuleType("peft_svf")
        package.__path__ = [str(ROOT / "src" / "peft_svf")]
        sys.modules["peft_svf"] = package
    return importlib.import_module(f"peft_svf.{name}")


@dataclass(frozen=True)
class Bench:
    """
    The run, where it runs, and until when.

    Args:
        run (`Run`): Collects the races.
        device (`str`): `"cuda"` or `"cpu"`.
        tiny (`bool`): Shapes of a few thousand numbers.
        deadline (`float`): On `time.monotonic`, in seconds.
    """

    run: Run
    device: str
    tiny: bool
    deadline: float

    @property
    def model(self) -> formulas.Architecture:
        """Whose shapes are used."""
        return TINY if self.tiny else formulas.LLAMA_3_8B

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def race(self, done: Race, contestants: dict[str, Any], budget: float, most: int = 15) -> None:
        """Run a race with CUDA events (on a CPU with the wall clock), within what time is left."""
        clock = cuda_clock if self.device == "cuda" else wall_clock
        budget, least, most = (0.0, 1, 1) if self.tiny else (min(budget, self.left / 3), 3, most)
        sample = 0.0 if self.tiny else 0.01
        rehearse = 0.0 if self.tiny else 5.0
        seed = self.run.content["settings"]["seed"]
        limits = {"budget": budget, "least": least, "most": most, "sample": sample, "rehearse": rehearse}
        self.run.add(race(done, contestants, clock=clock, seed=seed, **limits))

    def skipped(self, key: str, seconds: float) -> bool:
        """Whether less time is left than a case needs; it is then noted as skipped."""
        if self.left >= seconds or self.tiny:
            return False
        self.run.fact(f"{key}/skipped", f"{self.left:.0f} s were left of the time, it needs about {seconds:.0f}")
        return True

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """Random normal numbers on the device."""
        return torch.empty(shape, device=self.device, dtype=dtype).normal_(std=scale)


def reflection(r: int, bench: Bench) -> Tensor:
    """An orthogonal matrix `(r, r)` without zeros that costs nothing to make: I - 2 v v^T, bfloat16."""
    v = bench.randn(r, dtype=torch.float32)
    v /= v.norm()
    return (torch.eye(r, device=bench.device) - 2 * torch.outer(v, v)).bfloat16()


class Layer:
    """
    One weight with its stand-in basis, and its forwards by every plan: plain functions of `peft_svf.tuner.plans`.

    Args:
        bench ([`Bench`]): Where it lies.
        tall (`int`), wide (`int`): Outputs and inputs.
    """

    def __init__(self, bench: Bench, tall: int, wide: int) -> None:
        self.bench, self.r = bench, min(tall, wide)
        self.side = "in" if tall >= wide else "out"
        self.weight = bench.randn(tall, wide, scale=wide**-0.5)
        self.Q = reflection(self.r, bench)
        self.S = torch.linspace(2, 0.5, self.r, device=bench.device)
        self.offset = bench.randn(self.r, dtype=torch.float32, scale=SPREAD).requires_grad_()

    def forward(self, name: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """The forward of a contestant, and what it trains."""
        basis, plans = own("tuner.basis"), own("tuner.plans")
        if name == BASE:
            return lambda x: F.linear(x, self.weight), []
        if name in (LORA, LORA_BASE_DTYPE):
            return self._lora(torch.float32 if name == LORA else torch.bfloat16)
        if name == "merged":
            merged = plans.fold(self.weight, None, self.side, self.Q, self.S, self.offset.detach())
            return lambda x: plans.merged_linear(x, self.offset, merged), [self.offset]
        if name == "factored":
            factored = plans.split(self.weight, None, self.side, self.Q)
            return lambda x: plans.factored_linear(x, factored, 1 + self.offset), [self.offset]
        k = min(64, self.r) if name == "k=64" else self.r
        Q, offset = self.Q[:, :k].contiguous(), self.offset.detach()[:k].clone().requires_grad_()
        if self.side == "in":
            return lambda x: F.linear(x + basis.change(x, Q, offset), self.weight), [offset]

        def out(x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return y + basis.change(y, Q, offset)

        return out, [offset]

    def _lora(self, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        tall, wide = self.weight.shape
        A = self.bench.randn(16, wide, dtype=dtype, scale=wide**-0.5).requires_grad_()
        B = self.bench.randn(tall, 16, dtype=dtype, scale=0.01).requires_grad_()

        def forward(x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return (y + 2 * F.linear(F.linear(x.to(dtype), A), B)).to(y.dtype)

        return forward, [A, B]


def attempt(build: Callable[..., Any], *args: Any) -> Any:
    """What `build` gives, or why it cannot be had here: a module or function that is missing, too little memory."""
    try:
        return build(*args)
    except (NotAvailable, ImportError, AttributeError, torch.cuda.OutOfMemoryError) as error:
        return NotAvailable(f"{type(error).__name__}: {error}"[:300])


def g1(bench: Bench) -> None:
    """G1: forward and backward of one layer."""
    tokens = (2, 8) if bench.tiny else (1, 16, 256, 2048, 16384)
    shapes = {(s.tall, s.wide) for s in formulas.weights(bench.model)}
    for tall, wide in sorted(shapes, reverse=True):
        layer = Layer(bench, tall, wide)

        def step(name: str, layer: Layer = layer, x: Any = None, g: Any = None) -> Callable[[], None]:
            forward, trained = layer.forward(name)

            def run() -> None:
                x.grad = None
                for tensor in trained:
                    tensor.grad = None
                forward(x).backward(g)

            return run

        for count in tokens:
            if bench.skipped("G1", 20):
                return
            x, g = bench.randn(count, wide).requires_grad_(), bench.randn(count, tall)
            names = (BASE, LORA, LORA_BASE_DTYPE, *PLANS)
            contestants = {name: attempt(step, name, layer, x, g) for name in names}
            about = {"out": tall, "in": wide, "tokens": count, "dtype": "bfloat16"}
            bench.race(Race("G1", f"G1/{tall}x{wide}/{count}", f"Layer {tall}x{wide}, {count} tokens", about),
                       contestants, 1.2)  # fmt: skip


def g2(bench: Bench) -> None:
    """G2: merging all weights of the model, one layer's tensors standing for those of all layers."""
    if bench.skipped("G2", 45):
        return
    shapes = formulas.weights(bench.model)
    layers = {shape: Layer(bench, shape.tall, shape.wide) for shape in shapes}

    def all_weights(of_one: Callable[[Layer], Any]) -> Callable[[], None]:
        def run() -> None:
            for shape, layer in layers.items():
                for _ in range(shape.count):
                    of_one(layer)

        return run

    def fold() -> Callable[[], None]:
        plans, last = own("tuner.plans"), {}

        def one(layer: Layer) -> None:
            last[layer] = plans.fold(
                layer.weight, None, layer.side, layer.Q, layer.S, layer.offset.detach(), (), last.get(layer)
            )

        return all_weights(one)

    def compose() -> Callable[[], None]:
        factors = {}
        for shape, layer in layers.items():
            factors[layer] = [bench.randn(side, shape.r, dtype=torch.float32) for side in (shape.tall, shape.wide)]

        def one(layer: Layer) -> None:
            U, V = factors[layer]
            layer.weight.copy_(U @ torch.diag(layer.S) @ V.mT)

        return all_weights(one)

    spare = {layer: torch.empty_like(layer.weight) for layer in layers.values()}
    contestants = {
        "copying all weights": all_weights(lambda layer: spare[layer].copy_(layer.weight)),
        "merged: build all W'": attempt(fold),
        "dense form: one composition": attempt(compose),
    }
    about = {"model": bench.model.name, "weights": sum(shape.count for shape in shapes)}
    bench.race(Race("G2", "G2/all", "Merging all weights", about), contestants, 15.0, most=5)


def g3(bench: Bench) -> None:
    """G3: factorising one weight of each shape; all of the model by count. A smaller square one against the SVD."""
    factorize, seconds = own("tuner.basis").factorize, {}
    clock = cuda_clock if bench.device == "cuda" else wall_clock
    for shape in sorted({(s.tall, s.wide) for s in formulas.weights(bench.model)}):
        if bench.skipped("G3", 60):
            return
        weight = bench.randn(1, *shape)
        warm_up = clock(lambda weight=weight: factorize(weight), 1)
        seconds[shape] = min(warm_up, clock(lambda weight=weight: factorize(weight), 1))
        bench.run.fact(f"G3/factorise {shape[0]}x{shape[1]}", {"seconds": seconds[shape]})
    side = 24 if bench.tiny else 2048
    square = bench.randn(side, side).double()
    if not bench.skipped("G3/svd", 60):
        factorize(square)
        ours = clock(lambda: factorize(square), 1)
        torch.linalg.svd(square[:64, :64])
        svd = clock(lambda: torch.linalg.svd(square, full_matrices=False), 1)
        bench.run.fact("G3/torch.linalg.svd in float64", {"r": len(square), "seconds": svd, "factorize": ours})
    total = sum(shape.count * seconds[shape.tall, shape.wide] for shape in formulas.weights(bench.model))
    bench.run.fact("G3/all weights, by count (derived)", {"model": bench.model.name, "seconds": total})


def g4(bench: Bench) -> None:
    """G4: one decoding step through all linear layers, 64 rows with a mixture each, replayed as a CUDA graph."""
    rows, counts = (3, (1, 2)) if bench.tiny else (64, (1, 8, 64))
    if bench.skipped("G4", 60):
        return
    shapes = formulas.weights(bench.model)
    depth = bench.model.layers
    if bench.device == "cuda":
        per_layer = sum(2 * (2 * s.entries + s.r**2) for s in shapes)
        depth = max(1, min(depth, int(0.8 * torch.cuda.mem_get_info()[0] / per_layer)))
    stack = [Layer(bench, s.tall, s.wide) for _ in range(depth) for s in shapes]
    inputs = {s.wide: bench.randn(rows, 1, s.wide) for s in shapes}
    tables = [bench.randn(max(counts), layer.r, dtype=torch.float32, scale=SPREAD) for layer in stack]
    offsets = [torch.empty(rows, layer.r, device=bench.device) for layer in stack]  # filled by `activate`

    def activate(experts: int) -> Callable[[], None]:
        alpha = torch.rand(rows, experts, device=bench.device)
        alpha /= alpha.sum(1, keepdim=True)

        def run() -> None:
            for table, offset in zip(tables, offsets, strict=True):
                torch.mm(alpha, table[:experts], out=offset)

        return run

    def decode(name: str) -> Callable[[], Any]:
        basis, plans = own("tuner.basis"), own("tuner.plans")
        factors = [plans.split(layer.weight, None, layer.side, layer.Q) for layer in stack if name == "factored"]

        def run() -> None:
            for i, layer in enumerate(stack):
                x, offset = inputs[layer.weight.shape[1]], offsets[i][:, None]
                if name == BASE:
                    F.linear(x, layer.weight)
                elif name == "factored":
                    plans.factored_linear(x, factors[i], 1 + offset)
                elif layer.side == "in":
                    Q = layer.Q[:, :64] if name == "k=64" else layer.Q
                    F.linear(x + basis.change(x, Q, offset[..., : Q.shape[1]]), layer.weight)
                else:
                    Q = layer.Q[:, :64] if name == "k=64" else layer.Q
                    y = F.linear(x, layer.weight)
                    y + basis.change(y, Q, offset[..., : Q.shape[1]])

        return graphed(run) if bench.device == "cuda" else run

    with torch.no_grad():
        activate(max(counts))()
        contestants = {name: attempt(decode, name) for name in (BASE, "narrow", "factored", "k=64")}
        for count in counts:
            contestants[f"activating mixtures of {count} experts"] = attempt(activate, count)
        about = {"rows": rows, "layers": depth, "weights": len(stack), "dtype": "bfloat16"}
        done = Race("G4", "G4/linears", "Decoding, all linear layers, a mixture for each row", about)
        bench.race(done, contestants, 12.0)
        for count in counts:  # what a step costs may not depend on how many experts its mixtures are over
            activate(count)()
            again = {name: contestants[name] for name in (BASE, "narrow", "factored")}
            title = f"The same with mixtures of {count} experts"
            bench.race(Race("G4", f"G4/linears/{count}", title, {**about, "experts": count}), again, 4.0)


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """Capture what `run` launches; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch asks for before a capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def whole_model(bench: Bench) -> Iterator[Any]:
    """The model with random weights on the device; until the end bases are stand-ins, shared by all its copies."""
    from unittest.mock import patch

    from transformers import LlamaConfig, LlamaForCausalLM

    m = bench.model
    config = LlamaConfig(
        vocab_size=64 if bench.tiny else 128256, hidden_size=m.hidden, intermediate_size=m.mlp,
        num_hidden_layers=m.layers, num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim,
        max_position_embeddings=8192, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    import peft_svf.tuner.weights
    from peft_svf.tuner.basis import Basis, side_of
    from peft_svf.tuner.fingerprint import Fingerprint

    known: dict[str, tuple[Basis, Fingerprint]] = {}

    def stand_ins(names: Any, weight_of: Callable[[str], Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        for name in (names := list(names)):
            if name.removeprefix("model.") not in known:
                shape = weight_of(name).shape
                r = min(shape)
                basis = Basis(side_of(*shape), reflection(r, bench), torch.linspace(2, 0.5, r))
                known[name.removeprefix("model.")] = (basis, Fingerprint("0" * 64, torch.zeros(32)))
        return {name: known[name.removeprefix("model.")] for name in names}

    with patch.object(peft_svf.tuner.weights, "fetch", stand_ins):
        yield model


def g5(bench: Bench, model: Any) -> None:
    """G5: an optimizer step of the whole stack, without the head, by the package's own layers and PEFT's."""
    import contestants as c

    names = [c.BASE, c.LORA, c.LORA_BASE_DTYPE, c.MERGED, c.NARROW, c.FACTORED, c.TRUNCATED]
    # At 8192 tokens the merged copy of one contestant, not of two, fits beside what the others keep for the backward.
    grid = [("mlp", 4, 512, [*names, c.AUTO]), ("mlp", 4, 2048, names), ("all", 4, 512, names)]
    if bench.tiny:
        grid = [("mlp", 1, 8, [*names, c.AUTO]), ("all", 1, 8, names)]
    for where, rows, length, of in grid:
        if bench.skipped(f"G5/{where}/{rows * length}", 60):
            return
        _stack_steps(bench, model.get_decoder(), where, (rows, length, model.config.hidden_size), of)
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def _stack_steps(bench: Bench, decoder: Any, where: str, shape: tuple[int, int, int], names: list[str]) -> None:
    import contestants as c

    rows, length, _ = shape
    embedded, cotangent = [bench.randn(*shape)], bench.randn(*shape, scale=1 / length)
    peaks: dict[str, int] = {}

    def noting(name: str) -> Callable[[], None]:
        step = c.training_step(decoder, name, c.TARGETS[where], embedded, cotangent)

        def run() -> None:
            if name in peaks or bench.device != "cuda":
                step()
                return
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() - start

        return run

    steps = {name: attempt(noting, name) for name in names}
    about = {"rows": rows, "length": length, "targets": where, "layers": bench.model.layers, "head": False}
    key = f"{where}/{rows * length}"
    done = Race("G5", f"G5/{key}", f"Training step, {where} targets, {rows * length} tokens", about)
    bench.race(done, steps, 20.0, most=5)
    bench.run.fact(f"G5/{key}: peak bytes of the first step beyond those before it", peaks)


def g6(bench: Bench, model: Any) -> None:
    """G6: decoding with the whole model, 64 rows with a mixture each, through `ExpertLibrary`."""
    if bench.skipped("G6", 75):
        return
    import cases
    from contestants import AUTO, MLP, sharing

    from peft_svf.experts.expert import Mixture

    rows, counts = (3, (2, 3)) if bench.tiny else (64, (2, 8, 64))
    prompt = torch.randint(3, model.config.vocab_size, (rows, 32), device=bench.device)
    with torch.no_grad():
        steps = {BASE: cases.decoding(sharing(model), prompt)}
        for count in counts:
            own_library = cases.library(model, count, MLP, 0)
            cases.set_plan(own_library.model, AUTO)
            alphas = torch.rand(rows, count)
            mixtures = [Mixture({str(i): float(a) for i, a in enumerate(row / row.sum())}) for row in alphas]
            step = cases.decoding(own_library.model, prompt)

            def activated(own_library: Any = own_library, mixtures: Any = mixtures, step: Any = step) -> None:
                with own_library.activate(mixtures):
                    step()

            start = time.monotonic()
            activated()
            bench.run.fact(f"G6/activation and a step, first time, {count} experts", time.monotonic() - start)
            open_library = own_library.activate(mixtures)
            open_library.__enter__()  # until the process ends: a generation enters it once
            steps[f"{AUTO}, {count} experts"] = step
        about = {"rows": rows, "prompt": 32, "targets": MLP, "experts": list(counts)}
        title = "Decoding the whole model, a mixture for each row (launches included)"
        bench.race(Race("G6", "G6/model", title, about), steps, 20.0)


CASES: dict[str, Callable[..., None]] = {"G1": g1, "G2": g2, "G3": g3, "G4": g4, "G5": g5, "G6": g6}
ORDER = ("G1", "G2", "G4", "G5", "G6", "G3")  # factorising last: it takes what time is left


def main(arguments: list[str] | None = None) -> Path:
    """Run the benchmark; returns the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas (default: all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes of a few thousand numbers")
    parser.add_argument("--minutes", type=float, default=7.5, help="until when cases are begun (default: 7.5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("gpu_results"), help="folder of the result"
    )
    options = parser.parse_args(arguments)
    chosen = [name.strip().upper() for name in options.cases.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(CASES)):
        parser.error(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny tries the program itself")
    if options.device == "cpu" and not options.tiny:
        parser.error("the full shapes are for a GPU; add --tiny")
    torch.manual_seed(options.seed)
    settings = {"seed": options.seed, "tiny": options.tiny, "device": options.device, "cases": chosen, "threads": 1}
    run = Run(options.out, settings, prefix="gpu")
    bench = Bench(run, options.device, options.tiny, time.monotonic() + 60 * options.minutes)
    missing = missing_packages()
    run.fact("packages that are missing", missing)
    if missing and {"G5", "G6"} & set(chosen):
        print("G5 and G6 need: " + " ".join(repr(line) for line in missing) + " (wheels by pip download, beforehand)")
    with ExitStack() as stack:
        model = None
        for name in ORDER:
            if name not in chosen or (name in ("G5", "G6") and missing):
                continue
            try:
                if name in ("G5", "G6"):
                    model = model or stack.enter_context(whole_model(bench))
                    CASES[name](bench, model)
                else:
                    CASES[name](bench)
            except Exception as error:  # the other cases still have their say; the file says what became of this one
                run.fact(f"{name}/failed", f"{type(error).__name__}: {error}"[:500])
            if options.device == "cuda":
                torch.cuda.empty_cache()
    run.finish()
    for done in run.content["races"]:
        middle = {key: statistics.median(samples) for key, samples in done["samples"].items()}
        first = next(iter(middle.values()), 1.0)
        print(f"{done['key']:28}" + "  ".join(f"{key} {x / first:.2f}" for key, x in middle.items()))
    print(f"Wrote {run.path}")
    return run.path


if __name__ == "__main__":
    main()
