# SPDX-License-Identifier: Apache-2.0
"""
The cases B1 to B10 on a CPU: what is built, what is called, what is kept. `run.py` calls them, `report.py` judges.

Each takes a [`Bench`] and adds races and facts to its run. Times are of one thread in CPU time, unless the run was
asked for more threads. Real weights are SmolLM2-135M's in bfloat16; large ones have Llama-3-8B's shapes and random
values.
"""

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import formulas
import torch
from contestants import (
    AUTO,
    BASE,
    DEFAULT,
    DENSE,
    FACTORED,
    IA3,
    LEAN,
    LORA,
    LORA_BASE_DTYPE,
    MERGED,
    MLP,
    NARROW,
    SPREAD,
    TARGETS,
    TINYLORA,
    TRUNCATED,
    OneLayer,
    adapted,
    adapted_layer,
    config_of,
    insisting,
    layer_step,
    random_linear,
    reflection,
    sharing,
    smollm2,
    tiny,
    training_step,
    trunk,
    wide,
)
from dense_form import DenseWeight
from peft import get_peft_model
from race import NotAvailable, Race, Run, cpu_clock, race, wall_clock
from safetensors.torch import load
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache

from peft_svf import SVFConfig
from peft_svf.evaluation import cache_name
from peft_svf.experts.expert import Expert, Mixture
from peft_svf.experts.library import ExpertLibrary
from peft_svf.tuner.basis import exact, factorize, rescale
from peft_svf.tuner.cache import cache_dir, fetch
from peft_svf.tuner.fingerprint import ACCEPT, REFUSE, distance, sketch
from peft_svf.tuner.layer import Linear as SVFLinear
from peft_svf.tuner.layer import SVFLayer

Contestants = dict[str, Callable[[], Any] | NotAvailable]
BF16, FP32 = torch.bfloat16, torch.float32
SMALL = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # SmolLM2-135M, out x in
LARGE = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]  # Llama-3-8B
PLANS = (AUTO, MERGED, NARROW, FACTORED, TRUNCATED)


@dataclass(frozen=True)
class Settings:
    """
    What a run is asked for.

    Args:
        quick (`bool`): Fewer cells and repetitions; its figures are for trying, not for quoting.
        tiny (`bool`): A random model of a few thousand numbers: tries the program itself.
        seed (`int`): Of weights, activations and orders.
        threads (`int`): 1 counts CPU time, more the wall clock.
    """

    quick: bool = False
    tiny: bool = False
    seed: int = 0
    threads: int = 1


class Bench:
    """A run with its settings, and the models that several cases share."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.settings = run, settings
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)

    @property
    def small(self) -> bool:
        """Whether this is a quick or a tiny run."""
        return self.settings.quick or self.settings.tiny

    @cached_property
    def model(self) -> Any:
        """The real model, bfloat16, frozen."""
        return tiny() if self.settings.tiny else smollm2()

    def race(self, done: Race, contestants: Contestants, budget: float, most: int = 21) -> Race:
        """Run a race whose repetitions together take about `budget` seconds, in a quick run a tenth of that."""
        share, least, sample = (0.1, 2, 0.0005) if self.small else (1.0, 3, 0.002)
        clock = cpu_clock if self.settings.threads == 1 else wall_clock
        most = 2 if self.settings.tiny else most
        race(
            done, contestants, clock=clock, budget=share * budget, least=least, most=most, sample=sample,
            seed=self.settings.seed,
        )  # fmt: skip
        return self.run.add(done)


def attempt(build: Callable[..., Callable[[], Any]], *args: Any, **kwargs: Any) -> Callable[[], Any] | NotAvailable:
    """What `build` gives, or why this version cannot give it."""
    try:
        return build(*args, **kwargs)
    except NotAvailable as error:
        return error


def linears(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers of a model whose names end in one of the targets."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }


def layer_and_basis(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    """A random layer with a stand-in basis, see [`~contestants.reflection`], and singular values without a tail."""
    r = min(out_features, in_features)
    return random_linear(out_features, in_features, dtype), reflection(r, dtype), torch.linspace(2, 0.5, r)


def b1(bench: Bench) -> None:
    """B1: forward and backward of one layer. The merged plan's `W'` is built once before: B3 times that."""
    cells = [(m, n, tokens, dtype) for m, n in SMALL for dtype in (FP32, BF16) for tokens in (1, 16, 256, 2048)]
    cells += [(m, n, tokens, BF16) for m, n in LARGE for tokens in (16, 256)]
    if bench.settings.quick:
        cells = [(m, n, tokens, BF16) for m, n in ((576, 576), (1536, 576)) for tokens in (16, 256, 2048)]
    if bench.settings.tiny:
        cells = [(40, 24, 4, BF16), (24, 40, 64, FP32)]
    for cell in cells:
        _layer(bench, *cell)


def _layer(bench: Bench, m: int, n: int, tokens: int, dtype: torch.dtype) -> None:
    fc, Q, S = layer_and_basis(m, n, dtype)
    x = torch.randn(tokens, n).to(dtype).requires_grad_()
    g = torch.randn(tokens, m).to(dtype)
    large = max(m, n) >= 4096
    names = [BASE, LORA, LORA_BASE_DTYPE, IA3, *PLANS]
    if not large:
        names.insert(3, TINYLORA)  # its set-up is an SVD, minutes for a large weight
    if dtype == FP32:
        names.remove(LORA_BASE_DTYPE)  # the same thing

    def step(name: str) -> Callable[[], Any]:
        return layer_step(adapted_layer(fc, name, Q, S), name, x, g)

    contestants = {name: attempt(step, name) for name in names}
    kind = str(dtype).removeprefix("torch.")
    about = {"out": m, "in": n, "tokens": tokens, "dtype": kind}
    done = Race("B1", f"B1/{m}x{n}/{kind}/{tokens}", f"Layer {m}x{n}, {kind}, {tokens} tokens", about)
    bench.race(done, contestants, 9.0 if large else 1.2)


def b2(bench: Bench) -> None:
    """B2: an optimizer step of the first layers without the head, on 8x256 tokens; B2': over four micro-batches."""
    full = not bench.small
    for where, targets in TARGETS.items():
        names = [BASE, LORA, LORA_BASE_DTYPE, TINYLORA, IA3, *PLANS, DEFAULT, DENSE]
        names += [LEAN] if where == "mlp" else []
        _steps(bench, f"B2/{where}", f"Training step, {where} targets", targets, names, 6 if full else 2, 8, 1, 80.0)
    names = [BASE, LORA, LORA_BASE_DTYPE, AUTO, MERGED, NARROW, DENSE]
    _steps(bench, "B2/mlp/x4", "Training step, mlp targets, 4 micro-batches", MLP, names, 2, 8 if full else 2, 4, 45.0)


def _steps(
    bench: Bench, key: str, title: str, targets: list[str], names: list[str],
    layers: int, rows: int, micro_batches: int, budget: float,
) -> None:  # fmt: skip
    length = 8 if bench.settings.tiny else 256
    cut = trunk(bench.model, min(layers, bench.model.config.num_hidden_layers))
    shape = (rows, length, cut.config.hidden_size)
    embedded = [torch.randn(shape).bfloat16() for _ in range(micro_batches)]
    cotangent = torch.randn(shape).bfloat16() / length
    contestants = {name: attempt(training_step, cut, name, targets, embedded, cotangent) for name in names}
    about = {
        "layers": cut.config.num_hidden_layers, "rows": rows, "length": length, "micro_batches": micro_batches,
        "targets": targets, "dtype": "bfloat16", "head": False,
    }  # fmt: skip
    bench.race(Race("B2", key, title, about), contestants, budget, most=9)


def b3(bench: Bench) -> None:
    """B3: what a step of z costs beside the tokens: building `W'` and projecting the r x r product."""
    for m, n in [(40, 24)] if bench.settings.tiny else SMALL[-2:] if bench.small else SMALL:
        fc, Q, S = layer_and_basis(m, n, BF16)
        weight, r = fc.weight, min(m, n)
        offset, K, g = SPREAD * torch.randn(r), torch.randn(r, r), torch.randn(m, n).bfloat16()
        square = torch.randn(r, r).bfloat16()

        def gemm(weight: Tensor = weight, square: Tensor = square, m: int = m, n: int = n) -> Tensor:
            square @ square
            return weight @ square if m >= n else square @ weight

        contestants: Contestants = {
            "products alone": gemm,
            "build W'": _fold(weight, Q, S, offset),
            "project": lambda Q=Q, K=K: ((K.mT @ Q.float()) * Q.float()).sum(0),
            "merge (float32)": lambda weight=weight, Q=Q, offset=offset: rescale(weight, Q, offset),
        }
        for name in (DENSE, LEAN):
            dense = DenseWeight(sharing(fc), lean=name == LEAN)

            def compose_and_back(dense: DenseWeight = dense, g: Tensor = g) -> None:
                dense.refresh()
                dense.layer.weight.grad = g.clone()
                dense.project()

            contestants[f"{name}: compose, project"] = compose_and_back
        bench.race(Race("B3", f"B3/{m}x{n}", f"Work of a step, {m}x{n}", {"out": m, "in": n}), contestants, 5.0)


def _fold(weight: Tensor, Q: Tensor, S: Tensor, offset: Tensor) -> Callable[[], Any] | NotAvailable:
    """Building `W'` for the merged plan, into the memory of the last one."""
    try:
        from peft_svf.tuner.plans import fold
    except ImportError:
        return NotAvailable("this version of peft-svf has no merged plan")
    side = "in" if weight.shape[0] >= weight.shape[1] else "out"
    last = [None]

    def run() -> None:
        last[0] = fold(weight, None, side, Q, S, offset, (), last[0])

    return run


def b4(bench: Bench) -> None:
    """B4: decoding one token for each row of a batch, every row with a mixture of its own."""
    shapes = [(40, 24)] if bench.settings.tiny else [(1536, 576)] if bench.small else [(1536, 576), (4096, 4096)]
    for m, n in shapes:
        for rows in (4,) if bench.settings.tiny else (16,) if bench.small else (1, 4, 16, 64):
            _decode_layer(bench, m, n, rows)
    _decode_model(bench)


def _decode_layer(bench: Bench, m: int, n: int, rows: int) -> None:
    fc, Q, S = layer_and_basis(m, n, BF16)
    x = torch.randn(rows, 1, n).bfloat16()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())

        def forward(name: str) -> Callable[[], Any]:
            layer = adapted_layer(fc, name, Q, S).eval()
            if isinstance(layer, SVFLayer):
                assert layer.svf_basis is not None
                stack.enter_context(layer.rows(SPREAD * torch.randn(rows, layer.svf_basis.shape[1])))
            return insisting(lambda: layer(x), layer, name)

        def lora() -> Callable[[], Any]:
            config, kwargs = config_of(LORA_BASE_DTYPE, ["fc"])
            model = get_peft_model(OneLayer(sharing(fc)), config, adapter_name="0", **kwargs)
            for row in range(1, rows):
                model.add_adapter(str(row), config, autocast_adapter_dtype=False)
            layer = model.eval().base_model.model.fc
            return lambda: layer(x, adapter_names=[str(row) for row in range(rows)])

        names = (BASE, AUTO, NARROW, FACTORED, TRUNCATED)
        contestants = {name: attempt(forward, name) for name in names}
        contestants["LoRA r=16, one adapter per row"] = lora()
        about = {"out": m, "in": n, "rows": rows, "dtype": "bfloat16"}
        title = f"Decoding layer {m}x{n}, {rows} rows, a mixture each"
        bench.race(Race("B4", f"B4/{m}x{n}/{rows}", title, about), contestants, 2.0)


def library(base: Any, experts: int, targets: list[str], seed: int) -> ExpertLibrary:
    """A library of random experts over a copy of a model."""
    draws = torch.Generator().manual_seed(seed)
    config = SVFConfig(task_type="CAUSAL_LM", target_modules=targets, basis_dtype="bfloat16").to_dict()
    sizes = {name: min(module.weight.shape) for name, module in linears(base, targets).items()}
    made = {
        str(i): Expert(
            str(i), {name: SPREAD * torch.randn(r, generator=draws) for name, r in sizes.items()}, dict(config)
        )
        for i in range(experts)
    }
    return ExpertLibrary(sharing(base), made)


def set_plan(model: Any, name: str) -> None:
    """Give the layers of a model the plan of a contestant."""
    plan = name.removeprefix("SVF ")
    if hasattr(model.base_model, "set_plan"):
        model.base_model.set_plan(plan)
    elif plan != "narrow":
        raise NotAvailable(f"this version of peft-svf has no plan={plan!r}")


def decoding(model: Any, prompt: Tensor, **kwargs: Any) -> Callable[[], None]:
    """One decoding step `(rows, 1)` behind the key-value cache of a prompt; the cache stays as it is."""
    cache = DynamicCache(config=model.config)
    kwargs |= {cache_name(model): cache, "use_cache": True}
    model(input_ids=prompt, **kwargs)
    token = prompt[:, -1:]

    def step() -> None:
        model(input_ids=token, **kwargs)
        cache.crop(-1)

    return step


@torch.no_grad()
def _decode_model(bench: Bench) -> None:
    rows, counts = (4, (2, 4)) if bench.settings.tiny else (16, (2, 16) if bench.small else (2, 8, 32))
    prompt = torch.randint(3, bench.model.config.vocab_size, (rows, 32))
    draws = torch.Generator().manual_seed(bench.settings.seed)
    contestants: Contestants = {BASE: decoding(sharing(bench.model), prompt)}
    with ExitStack() as stack:

        def mixed(plan: str, experts: int) -> Callable[[], Any]:
            own = library(bench.model, experts, MLP, bench.settings.seed)
            set_plan(own.model, plan)
            alphas = torch.rand(rows, experts, generator=draws)
            mixtures = [Mixture({str(i): float(a) for i, a in enumerate(row / row.sum())}) for row in alphas]
            stack.enter_context(own.activate(mixtures))
            return insisting(decoding(own.model, prompt), own.model, plan)

        def lora() -> Callable[[], Any]:
            config, kwargs = config_of(LORA_BASE_DTYPE, MLP)
            model = get_peft_model(sharing(bench.model), config, adapter_name="0", **kwargs).eval()
            for row in range(1, rows):
                model.add_adapter(str(row), config, autocast_adapter_dtype=False)
            return decoding(model, prompt, adapter_names=[str(row) for row in range(rows)])

        for count in counts:
            contestants[f"{AUTO}, {count} experts"] = attempt(mixed, AUTO, count)
        for plan in (NARROW, FACTORED):
            contestants[f"{plan}, {counts[0]} experts"] = attempt(mixed, plan, counts[0])
        contestants[f"LoRA r=16, {rows} adapters"] = attempt(lora)
        about = {"rows": rows, "prompt": 32, "targets": MLP, "experts": list(counts), "dtype": "bfloat16"}
        title = f"Decoding, {rows} rows, a mixture each, mlp targets"
        bench.race(Race("B4", "B4/model", title, about), contestants, 35.0, most=31)


@torch.no_grad()
def b5(bench: Bench) -> None:
    """B5: changing the expert of a model, beside a forward of one token and of many."""
    vocabulary = bench.model.config.vocab_size
    one, many = torch.randint(3, vocabulary, (1, 1)), torch.randint(3, vocabulary, (1, 256))
    base = sharing(bench.model)
    contestants: Contestants = {"forward of 1 token": lambda: base(one), "forward of 256 tokens": lambda: base(many)}

    def switching(name: str, then: Tensor | None) -> Callable[[], Any]:
        config, kwargs = config_of(name, MLP)
        model = get_peft_model(sharing(bench.model), config, adapter_name="0", **kwargs).eval()
        model.add_adapter("1", config)
        for module in model.modules():
            if isinstance(module, SVFLayer):
                for offset in module.svf_offset.values():
                    offset.weight.normal_(std=SPREAD)
        state = [0]

        def run() -> None:
            state[0] = 1 - state[0]
            model.set_adapter(str(state[0]))
            if then is not None:
                model(then)

        return run

    contestants["LoRA: set_adapter"] = attempt(switching, LORA_BASE_DTYPE, None)
    contestants["SVF: set_adapter"] = attempt(switching, NARROW, None)
    contestants["SVF merged: set_adapter, 1 token"] = attempt(switching, MERGED, one)
    contestants["SVF narrow: set_adapter, 1 token"] = attempt(switching, NARROW, one)
    done = Race("B5", "B5/mlp", "Changing the expert, mlp targets", {"targets": MLP, "dtype": "bfloat16"})
    bench.race(done, contestants, 12.0)


@torch.no_grad()
def b6(bench: Bench) -> None:
    """B6: greedy generation for 8 prompts of 32 tokens."""
    rows, new = (2, 4) if bench.settings.tiny else (8, 4 if bench.small else 16)
    prompt = torch.randint(3, bench.model.config.vocab_size, (rows, 32))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 2}

    def generating(model: Any) -> Callable[[], Any]:
        model.eval()
        return lambda: model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)

    def merged_adapter() -> Callable[[], Any]:
        model = adapted(bench.model, NARROW, MLP)
        model.merge_adapter()
        return generating(model)

    base, again = generating(sharing(bench.model)), generating(sharing(bench.model))
    about = {"rows": rows, "prompt": 32, "new_tokens": new, "targets": MLP, "dtype": "bfloat16"}

    def by(name: str) -> Callable[[], Any]:
        model = adapted(bench.model, name, MLP)
        return insisting(generating(model), model, name)

    merged = {
        BASE: base,
        "base, another copy": again,  # how far apart equal things come out
        "SVF, merge_adapter()": attempt(merged_adapter),
        MERGED: attempt(by, MERGED),
        AUTO: attempt(by, AUTO),
    }
    title = "Generation with one expert in the weights"
    bench.race(Race("B6", "B6/merged", title, about), merged, 60.0, most=15)
    names = [LORA, LORA_BASE_DTYPE, IA3, NARROW, FACTORED, TRUNCATED]
    names += [] if bench.small else [TINYLORA]  # its set-up takes as long as all the rest
    beside = {BASE: base} | {name: attempt(by, name) for name in names}
    bench.race(Race("B6", "B6/beside", "Generation beside the weights", about), beside, 40.0, most=7)


def b7(bench: Bench) -> None:
    """B7: factorising the linear layers of two decoder layers; getting the bases of six from the cache."""
    cut = trunk(bench.model, 2 if bench.small else 6)
    weights = {name: module.weight.detach() for name, module in linears(cut, TARGETS["all"]).items()}
    factorised = [weight for name, weight in weights.items() if name.startswith(("layers.0.", "layers.1."))]

    def each(run: Callable[[Tensor], Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            for weight in factorised:
                run(weight)

        return all_of_them

    contestants: Contestants = {
        "torch.linalg.svd, float64": each(lambda w: torch.linalg.svd(w.double(), full_matrices=False)),
        "torch.linalg.svd, float32": each(lambda w: torch.linalg.svd(w.float(), full_matrices=False)),
        "SVF factorize": each(factorize),
    }
    done = Race("B7", "B7/factorise", "Factorising the linear layers", {"matrices": len(factorised)})
    bench.race(done, contestants, 25.0)
    _cache(bench, "B7/cache", "Getting bases from the cache", cut)
    wider = bench.model if bench.settings.tiny else wide()
    _cache(bench, "B7/cache/2048", "Getting bases from the cache, a layer of width 2048", trunk(wider, 1))


@contextmanager
def private_cache() -> Iterator[None]:
    """A basis cache of its own, empty at first and gone afterwards."""
    before = os.environ.get("PEFT_SVF_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PEFT_SVF_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["PEFT_SVF_CACHE"]
            else:
                os.environ["PEFT_SVF_CACHE"] = before


def _cache(bench: Bench, key: str, title: str, cut: Any) -> None:
    weights = {name: module.weight.detach() for name, module in linears(cut, TARGETS["all"]).items()}

    def hashing() -> None:
        for weight in weights.values():
            hashlib.sha256(exact(weight).contiguous().numpy().data).hexdigest()

    with private_cache(), tempfile.TemporaryDirectory() as folder:
        fetch(weights, weights.__getitem__)
        files = sorted(cache_dir().glob("*.safetensors"))
        contestants: Contestants = {
            "hashing the weights": hashing,
            "reading the bases": lambda: [load(path.read_bytes()) for path in files],
            "cache hit": lambda: touch(basis.Q for basis, _ in fetch(weights, weights.__getitem__).values()),
            "cache hit, file known": second_start(cut, folder),
        }
        about = {"weights": len(weights), "bytes": sum(path.stat().st_size for path in files)}
        bench.race(Race("B7", key, title, about), contestants, 15.0)


def second_start(cut: Any, folder: str) -> Callable[[], None]:
    """
    What a model loaded from a checkpoint file does for its bases when that file has been seen before.

    The file is known by path, size and mtime from the first `get_peft_model`, if this version keeps a memo of that.
    """
    cut.save_pretrained(folder)
    model = get_peft_model(
        AutoModel.from_pretrained(folder, dtype=BF16), SVFConfig(target_modules=TARGETS["all"], basis_dtype="float32")
    )
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]

    def again() -> None:
        for layer in layers:
            if hasattr(layer, "set_basis"):
                layer.set_basis(None, None)
            else:
                layer.svf_basis = None
        model.base_model.fetch_bases()
        touch(layer.svf_basis for layer in layers)

    return again


def touch(tensors: Iterable[Tensor]) -> None:
    """Read a number of every page: files are mapped, and what nobody looks at is not read."""
    for tensor in tensors:
        tensor.view(-1)[:: 4096 // tensor.element_size()].sum()


def b8(bench: Bench) -> None:
    """B8: bytes. Resident, saved for the backward, at the peak of a fresh process; dense gradients must be none."""
    bench.run.fact("B8/resident", _resident())
    cut = trunk(bench.model, 2)
    rows, length = (2, 8) if bench.settings.tiny else (8, 256)
    embedded = torch.randn(rows, length, cut.config.hidden_size).bfloat16()
    saved, dense = {}, {}
    for where, targets in TARGETS.items():
        for name in (BASE, LORA, LORA_BASE_DTYPE, *PLANS):
            try:
                model = sharing(cut) if name == BASE else adapted(cut, name, targets)
            except NotAvailable:
                continue
            saved[f"{where}/{name}"] = saved_bytes(model, embedded)
            if name.startswith("SVF"):
                own = [p for key, p in model.named_parameters() if "svf_" not in key and p.grad is not None]
                dense[f"{where}/{name}"] = sum(p.grad.numel() for p in own)
    bench.run.fact("B8/saved_for_backward", {"layers": 2, "tokens": rows * length, "bytes": saved})
    bench.run.fact("B8/dense_gradient_entries_on_base_weights", dense)
    if not bench.small:
        names = (BASE, LORA, AUTO, NARROW, FACTORED, DENSE)
        bench.run.fact("B8/peak_rss_of_a_fresh_process", {name: fresh_process(name) for name in names})


def _resident() -> dict[str, Any]:
    """
    Bytes that SVF layers of Llama-3-8B's shapes keep, counted on the layers themselves (their tensors on the meta
    device), beside those of U, S and V.
    """
    found: dict[str, Any] = {}
    for where, targets in TARGETS.items():
        kept = factors = 0
        for shape in formulas.weights(formulas.LLAMA_3_8B, targets):
            fc = nn.Linear(shape.wide, shape.tall, bias=False, device="meta", dtype=BF16)
            layer = SVFLinear(fc, "default", SVFConfig())
            r = min(shape.tall, shape.wide)
            Q, S = torch.empty(r, r, dtype=BF16, device="meta"), torch.empty(r, device="meta")
            if hasattr(layer, "set_basis"):
                layer.set_basis(Q, S)
            else:
                layer.svf_basis = Q
            tensors = [layer.svf_basis, getattr(layer, "svf_values", None)]
            kept += shape.count * sum(t.numel() * t.element_size() for t in tensors if t is not None)
            factors += shape.count * 2 * (r * (shape.tall + shape.wide) + r)
        found[where] = {"model": "Llama-3-8B", "dtype": "bfloat16", "svf": kept, "u_s_v": factors}
    return found


def saved_bytes(model: nn.Module, embedded: Tensor) -> int:
    """Run a forward and a backward and count the bytes that autograd kept between them, weights not included."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(inputs_embeds=embedded.detach().requires_grad_(), use_cache=False)[0]
    hidden.backward(torch.ones_like(hidden))
    return sum(kept.values())


def fresh_process(name: str) -> int:
    """Peak resident bytes of a process that does nothing but one training step of a contestant."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--peak-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak_of(name: str) -> int:
    """One training step of 8x256 tokens through six layers, then the peak resident bytes of this process."""
    torch.set_num_threads(1)
    cut = trunk(smollm2(), 6)
    embedded = torch.randn(8, 256, cut.config.hidden_size).bfloat16()
    training_step(cut, name, MLP, [embedded], torch.randn_like(embedded))()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def b9(bench: Bench) -> None:
    """B9: whom the fingerprint lets share an expert: other drivers yes, weights rounded to bfloat16 no."""
    distances: dict[str, list[float]] = {"float32 SVD": [], "float64 SVD": [], "weight rounded to bfloat16": []}
    for stored in list(linears(trunk(bench.model, 1), ("q_proj", "k_proj", "up_proj", "down_proj")).values()):
        weight = stored.weight.detach().float()
        weight = weight * (1 + 2**-9 * (torch.rand_like(weight) - 0.5))  # digits that bfloat16 cannot hold
        reference = sketch(factorize(weight).Q)
        others = {"weight rounded to bfloat16": factorize(weight.bfloat16()).Q}
        for kind in (torch.float32, torch.float64):
            u, _, vh = torch.linalg.svd(weight.to(kind), full_matrices=False)
            driver = "float32 SVD" if kind == torch.float32 else "float64 SVD"
            others[driver] = (vh.mT if weight.shape[0] >= weight.shape[1] else u).double()
        for key, Q in others.items():
            distances[key].append(distance(sketch(Q), reference))
    bench.run.fact("B9/probe_distance", {"accept": ACCEPT, "refuse": REFUSE, "distance": distances})


def b10(bench: Bench) -> None:
    """B10: z = 1 is the base model to the bit; gradients of z against an SVD in float64, tail and z = 0 included."""
    bench.run.fact("B10/z_of_ones_equals_base", {**_identity(bench, BF16), **_identity(bench, FP32)})
    errors = {}
    fc = linears(trunk(bench.model, 1), ("q_proj", "up_proj", "down_proj"))
    for name, module in fc.items():
        for plan in (MERGED, NARROW, FACTORED):
            for kept in (FP32, BF16):
                key = f"{name.rpartition('.')[2]}/{plan}, basis {str(kept).removeprefix('torch.')}"
                try:
                    errors[key] = gradient_error(module, plan, kept)
                except NotAvailable:
                    continue
    bench.run.fact("B10/gradient_of_z_in_bfloat16", errors)


@torch.no_grad()
def _identity(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    base = bench.model if dtype == BF16 else sharing(bench.model).to(dtype)
    ids = torch.randint(3, base.config.vocab_size, (2, 16))
    expected, found = base(ids).logits, {}
    for name in (AUTO, MERGED, NARROW, FACTORED):
        try:
            config, _ = config_of(name, MLP)
        except NotAvailable:
            continue
        model = get_peft_model(sharing(base), config).eval()
        states = {"": model(ids).logits}
        if name == NARROW:
            model.merge_adapter()
            states[", merge_adapter()"] = model(ids).logits
            model.unmerge_adapter()
            states[", unmerged again"] = model(ids).logits
        for state, logits in states.items():
            worst = float((logits - expected).abs().max())
            found[f"{str(dtype).removeprefix('torch.')}/{name}{state}"] = {
                "equal": torch.equal(logits, expected),
                "worst": worst,
            }
    return found


def gradient_error(module: nn.Linear, plan: str, kept: torch.dtype, tokens: int = 2048) -> dict[str, float]:
    """
    Relative errors of the gradient of z, in bfloat16, against `dz_i = S_i sum_t (g U)_ti (x V)_ti` in float64.

    `kept` is the dtype of the basis. One z in a hundred is 0. The tail are the smallest 5 % of the singular values.
    """
    weight = module.weight.detach()
    U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    basis = factorize(weight)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, weight.shape[1], generator=draws).bfloat16()
    g = torch.randn(tokens, weight.shape[0], generator=draws).bfloat16()
    expected = S * ((g.double() @ U) * (x.double() @ Vt.mT)).sum(0)
    layer = adapted_layer(module, plan, basis.Q.to(kept), basis.S.float())
    offset = layer.svf_offset["default"].weight
    with torch.no_grad():
        offset[::100] = -1.0
    layer_step(layer, plan, x, g)()
    assert offset.grad is not None
    error = (offset.grad.double() - expected).abs()
    relative, tail = error / expected.abs(), max(1, len(S) // 20)
    return {
        "norm": float(error.norm() / expected.norm()),
        "median": float(relative.median()),
        "tail_median": float(relative[-tail:].median()),
        "where_z_is_0_median": float(relative[::100].median()),
    }


CASES: dict[str, Callable[[Bench], None]] = {
    "B1": b1, "B2": b2, "B3": b3, "B4": b4, "B5": b5, "B6": b6, "B7": b7, "B8": b8, "B9": b9, "B10": b10,
}  # fmt: skip


def settings_record(settings: Settings) -> dict[str, Any]:
    """The settings as they go into the result."""
    return asdict(settings)
