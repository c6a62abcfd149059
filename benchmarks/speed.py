# SPDX-License-Identifier: Apache-2.0
"""
Time SVF beside the frozen base, LoRA, TinyLoRA, IA3 and the dense form, side by side in one process.

    python benchmarks/speed.py                     # all cases, at most a quarter of an hour on two free cores
    python benchmarks/speed.py --quick             # about two minutes; too few repetitions to quote
    python benchmarks/speed.py --cases B2,B6       # some of the cases below
    python benchmarks/speed.py --threads 2         # wall clock instead of the CPU time of one thread

Weights are SmolLM2-135M's in bfloat16 (a random model of a few thousand numbers with `--tiny`). `gpu.py` runs the
cases on a GPU, with Llama-3-8B's shapes, random weights and an orthogonal stand-in for each basis, on whose directions
no time depends. Nothing is timed at z = 1.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import formulas
import torch
from dense_form import dense_form
from harness import RESULTS, NotAvailable, Race, Run, cpu_clock, cuda_clock, race, wall_clock
from peft import IA3Config, LoraConfig, PeftConfig, TinyLoraConfig, get_peft_model
from smollm2 import load_smollm2
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from peft_svf import Expert, ExpertLibrary, Mixture, SVFConfig
from peft_svf.tuner.basis import factorize
from peft_svf.tuner.layer import SVFLayer, svf_layers

Contestants = dict[str, Callable[[], Any] | NotAvailable]
BF16 = torch.bfloat16
BASE, DENSE = "base", "dense form"
LORA, LORA_BASE_DTYPE, TINYLORA, IA3 = "LoRA r=16, as shipped", "LoRA r=16, base dtype", "TinyLoRA", "IA3"
AUTO, MERGED, NARROW, FACTORED, TRUNCATED = "SVF auto", "SVF merged", "SVF narrow", "SVF factored", "SVF k=64"
FLOAT32 = "SVF auto, float32 basis"
PLANS = (AUTO, MERGED, NARROW, FACTORED, TRUNCATED)
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS = {"mlp": MLP, "all": ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]}
SPREAD = 0.05  # standard deviation of the random offsets


class Bench:
    """A run, its settings (the options of `main`), and the model that several cases share."""

    def __init__(self, run: Run, settings: argparse.Namespace) -> None:
        self.run, self.settings = run, settings
        self.small = settings.quick or settings.tiny
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)

    @cached_property
    def model(self) -> Any:
        """The frozen base model in bfloat16."""
        if self.settings.tiny:
            return llama(formulas.Architecture("tiny", 128, 160, 2, 4, 2, 32), self.settings.device)
        if self.settings.device == "cuda":
            return llama(formulas.LLAMA_3_8B, "cuda")
        return load_smollm2(BF16)[0].eval().requires_grad_(False)

    def randn(self, *shape: int) -> Tensor:
        """Draw bfloat16 numbers on the device."""
        return torch.randn(shape, device=self.settings.device).bfloat16()

    def ids(self, rows: int, length: int) -> Tensor:
        """Draw token ids."""
        return torch.randint(3, self.model.config.vocab_size, (rows, length), device=self.settings.device)

    def race(self, done: Race, contestants: Contestants, budget: float, most: int = 21) -> None:
        """Run a race whose repetitions take about `budget` seconds together, a tenth of it in a quick run."""
        clock = wall_clock if self.settings.threads > 1 else cpu_clock
        clock = cuda_clock if self.settings.device == "cuda" else clock
        limits = {"least": 2 if self.small else 3, "most": 2 if self.settings.tiny else most}
        limits |= {"budget": budget / 10 if self.small else budget, "sample": 0.0005 if self.small else 0.002}
        self.run.add(race(done, contestants, clock=clock, seed=self.settings.seed, **limits))


def llama(shape: formulas.Architecture, device: str = "cpu") -> Any:
    """Build a random Llama of given shapes in bfloat16, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=8192, pad_token_id=0, eos_token_id=2, dtype=BF16,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM._from_config(config).eval().requires_grad_(False)


def trunk(model: Any, layers: int) -> Any:
    """Take the first decoder layers of a model, without its head."""
    cut = sharing(model.get_decoder())
    cut.layers = cut.layers[:layers]
    cut.config = copy.deepcopy(cut.config)
    cut.config.num_hidden_layers = len(cut.layers)
    return cut


def sharing(model: nn.Module) -> Any:
    """Copy a model into new parameter objects over the same memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo.update({id(buffer): buffer for buffer in model.buffers()})
    return copy.deepcopy(model, memo)


def linears(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """List the linear layers whose names end in one of the targets."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and name.rpartition(".")[2] in targets}


def plan_of(name: str) -> str:
    """Return the execution plan of an SVF contestant."""
    return name.removeprefix("SVF ") if name in (MERGED, NARROW, FACTORED) else "auto"


def config_of(name: str, targets: list[str]) -> tuple[PeftConfig, dict[str, Any]]:
    """Return the PEFT config of a contestant and the keyword arguments of `get_peft_model` that go with it."""
    if name in (LORA, LORA_BASE_DTYPE):
        kwargs = {"autocast_adapter_dtype": False} if name == LORA_BASE_DTYPE else {}
        return LoraConfig(target_modules=targets, r=16, lora_alpha=32), kwargs
    if name == TINYLORA:
        return TinyLoraConfig(target_modules=targets), {}
    if name == IA3:
        inside = [target for target in targets if target == "down_proj"]
        return IA3Config(target_modules=targets, feedforward_modules=inside), {}
    fields = {"rank": 64} if name == TRUNCATED else {"basis_dtype": "float32"} if name == FLOAT32 else {}
    return SVFConfig(target_modules=targets, plan=plan_of(name), **fields), {}


def adapted(base: nn.Module, name: str, targets: list[str], **kwargs: Any) -> Any:
    """Copy a model and add the adapter of a contestant at random trained values; base weights are shared."""
    torch.manual_seed(0)
    config, more = config_of(name, targets)
    if next(base.parameters()).is_cuda and isinstance(config, SVFConfig):
        return stand_in(base, config)
    model = get_peft_model(sharing(base), config, **more, **kwargs)
    scatter(model)
    return model


def stand_in(base: nn.Module, config: SVFConfig) -> Any:
    """Adapt a model with orthogonal stand-ins for its bases: those of an 8B model take hours."""
    model = get_peft_model(copy.deepcopy(base).to("meta"), config)  # without weights there is no basis to compute
    layers = svf_layers(model)
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        module, _, leaf = name.rpartition(".")
        place = layers[module].get_base_layer() if module in layers else model.base_model.model.get_submodule(module)
        frozen = nn.Parameter(tensor.data, requires_grad=False)
        setattr(place, leaf, frozen if isinstance(tensor, nn.Parameter) else tensor)
    for layer in layers.values():
        device, k = layer.get_base_layer().weight.device, layer.size_of(config.rank)
        Q = reflection(layer.directions, device)
        layer.set_basis(Q[:, :k].contiguous(), torch.linspace(2, 0.5, k, device=device))
        for offset in layer.svf_offset.values():
            offset.weight = nn.Parameter(torch.zeros(k, device=device))
    model.base_model.set_plan(config.plan)
    scatter(model)
    return model


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Move every z-vector away from 1."""
    for module in model.modules():
        if isinstance(module, SVFLayer):
            for offset in module.svf_offset.values():
                offset.weight.normal_(std=SPREAD)


def reflection(r: int, device: Any) -> Tensor:
    """Make an orthogonal matrix `(r, r)` without zeros that costs nothing: I - 2 v vᵀ."""
    v = torch.randn(r, device=device)
    v /= v.norm()
    return (torch.eye(r, device=device) - 2 * torch.outer(v, v)).to(BF16)


def insisting(run: Callable[[], Any], model: nn.Module, name: str) -> Callable[[], Any]:
    """Check in the first call that a plan that was asked for by name is the one that runs."""
    layers = [m for m in model.modules() if isinstance(m, SVFLayer)] if name in (MERGED, NARROW, FACTORED) else []

    def checked() -> Any:
        result = run()
        if layers and plan_of(name) not in (chosen := {str(layer.svf_chosen) for layer in layers}):
            raise NotAvailable(f"asked for the plan {plan_of(name)!r}, the layers ran {', '.join(sorted(chosen))}")
        layers.clear()
        return result

    return checked


def training_step(base: nn.Module, name: str, targets: list[str], embedded: list[Tensor], g: Tensor) -> Any:
    """
    One optimizer step of a contestant: all micro-batches, the work that a new z needs, AdamW.

    The gradient runs from `g`, that of the last hidden state, down to the embedded micro-batches `(batch, length,
    hidden)` in all contestants, as it does through all but the first layer of a model.
    """
    dense = []
    if name == DENSE:
        model = sharing(base)
        dense = dense_form(model, targets)
        trained = [weight.p for weight in dense]
    else:
        model = sharing(base) if name == BASE else adapted(base, name, targets)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if name.startswith("SVF") and len(embedded) > 1:
            model.base_model.set_plan(plan_of(name), len(embedded))
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        for weight in dense:
            weight.refresh()
        for batch in embedded:
            hidden = batch.detach().requires_grad_()
            model(inputs_embeds=hidden, use_cache=False)[0].backward(g)
        for weight in dense:
            weight.project()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return insisting(step, model, name)


def b2(bench: Bench) -> None:
    """B2: an optimizer step of the first layers without the head on 8x256 tokens, and over four micro-batches."""
    layers, rows, length = (2, 2, 8) if bench.settings.tiny else (2 if bench.small else 6, 8, 256)
    rest = [DENSE] if bench.settings.device == "cpu" else []
    for where, targets in TARGETS.items():
        names = [BASE, LORA, LORA_BASE_DTYPE, TINYLORA, IA3, *PLANS, FLOAT32, *rest]
        names = [name for name in names if bench.settings.device == "cpu" or name != TINYLORA]
        _steps(bench, f"B2/{where}", f"Training step, {where} targets", targets, names, (layers, rows, length, 1))
    names = [BASE, LORA, LORA_BASE_DTYPE, AUTO, MERGED, NARROW, *rest]
    title = "Training step, mlp targets, 4 micro-batches"
    _steps(bench, "B2/mlp/x4", title, MLP, names, (2, 2 if bench.small else 8, length, 4))


def _steps(bench: Bench, key: str, title: str, targets: list[str], names: list[str], size: tuple[int, ...]) -> None:
    layers, rows, length, micro_batches = size
    cut = trunk(bench.model, layers)
    embedded = [bench.randn(rows, length, cut.config.hidden_size) for _ in range(micro_batches)]
    steps = {name: partial(training_step, cut, name, targets, embedded, embedded[0] / length) for name in names}
    about = {"layers": layers, "rows": rows, "length": length, "micro_batches": micro_batches, "head": False}
    bench.race(Race("B2", key, title, about), {name: built() for name, built in steps.items()}, 60.0, most=9)


def lora_rows(base: nn.Module, targets: list[str], rows: int) -> Any:
    """Add as many LoRA adapters as the batch has rows."""
    config, kwargs = config_of(LORA_BASE_DTYPE, targets)
    model = get_peft_model(sharing(base), config, adapter_name="0", **kwargs)
    for row in range(1, rows):
        model.add_adapter(str(row), config, autocast_adapter_dtype=False)
    return model.eval()


def library_of(base: Any, experts: int, plan: str) -> ExpertLibrary:
    """Make a library of random experts on the MLP weights of a model."""
    model = adapted(base, plan, MLP, adapter_name="0") if next(base.parameters()).is_cuda else sharing(base)
    config = SVFConfig(task_type="CAUSAL_LM", target_modules=MLP, plan=plan_of(plan)).to_dict()
    sizes = {name: min(module.weight.shape) for name, module in linears(base, MLP).items()}
    drawn = [{name: SPREAD * torch.randn(r) for name, r in sizes.items()} for _ in range(experts)]
    library = ExpertLibrary(model, {str(i): Expert(str(i), offsets, dict(config)) for i, offsets in enumerate(drawn)})
    library.model.base_model.set_plan(plan_of(plan))
    return library


def decoding(model: Any, prompt: Tensor, **kwargs: Any) -> Callable[[], None]:
    """One decoding step `(rows, 1)` on the key-value cache of a prompt; the cache stays as it is."""
    cache = DynamicCache(config=model.config)
    kwargs |= {"past_key_values": cache, "use_cache": True}
    model(input_ids=prompt, **kwargs)

    def step() -> None:
        model(input_ids=prompt[:, -1:], **kwargs)
        cache.crop(-1)

    return step


@torch.no_grad()
def b4(bench: Bench) -> None:
    """B4: decoding one token for each row of a batch, every row with its own mixture."""
    rows, counts = (4, (2, 4)) if bench.settings.tiny else (16, (2, 16) if bench.small else (2, 8, 32))
    prompt = bench.ids(rows, 32)
    contestants: Contestants = {BASE: decoding(sharing(bench.model), prompt)}
    with ExitStack() as stack:
        for plan, experts in [*((AUTO, count) for count in counts), (NARROW, counts[0]), (FACTORED, counts[0])]:
            library = library_of(bench.model, experts, plan)
            alphas = torch.rand(rows, experts)
            alphas /= alphas.sum(1, keepdim=True)
            mixtures = [Mixture({str(i): float(a) for i, a in enumerate(row)}) for row in alphas]
            stack.enter_context(library.activate(mixtures))
            step = decoding(library.model, prompt)
            contestants[f"{plan}, {experts} experts"] = insisting(step, library.model, plan)
        names = [str(row) for row in range(rows)]
        lora = lora_rows(bench.model, MLP, rows)
        contestants[f"LoRA r=16, {rows} adapters"] = decoding(lora, prompt, adapter_names=names)
        about = {"rows": rows, "prompt": 32, "targets": MLP, "experts": list(counts), "dtype": "bfloat16"}
        title = f"Decoding, {rows} rows, a mixture each, mlp targets"
        bench.race(Race("B4", "B4/model", title, about), contestants, 35.0, most=31)


@torch.no_grad()
def b6(bench: Bench) -> None:
    """B6: greedy generation for 8 prompts of 32 tokens."""
    rows, new = (2, 4) if bench.settings.tiny else (8, 4 if bench.small else 16)
    prompt = bench.ids(rows, 32)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 2}

    def by(name: str, merge: bool = False) -> Callable[[], Any]:
        model = sharing(bench.model) if name == BASE else adapted(bench.model, name, MLP)
        if merge:
            model.merge_adapter()
        generate = partial(model.eval().generate, input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        return insisting(generate, model, "" if merge else name)

    base = by(BASE)
    merged = {BASE: base, "base, another copy": by(BASE), "SVF, merge_adapter()": by(NARROW, merge=True)}
    about = {"rows": rows, "prompt": 32, "new_tokens": new, "targets": MLP, "dtype": "bfloat16"}
    title = "Generation with one expert in the weights"
    bench.race(Race("B6", "B6/merged", title, about), merged | {n: by(n) for n in (MERGED, AUTO)}, 60.0, most=15)
    names = [LORA, LORA_BASE_DTYPE, IA3, NARROW, FACTORED, TRUNCATED]
    beside = {BASE: base} | {name: by(name) for name in names}
    bench.race(Race("B6", "B6/beside", "Generation beside the weights", about), beside, 40.0, most=7)


def b7(bench: Bench) -> None:
    """B7: factorising linear layers."""
    cut = trunk(bench.model, 2 if bench.small else 6)
    weights = [module.weight.detach() for module in linears(cut, TARGETS["all"]).values()][:14]

    def each(run: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return lambda: [run(weight) for weight in weights]

    svd = partial(torch.linalg.svd, full_matrices=False)
    contestants: Contestants = {"torch.linalg.svd, float64": each(lambda w: svd(w.double()))}
    contestants |= {"torch.linalg.svd, float32": each(lambda w: svd(w.float())), "SVF factorize": each(factorize)}
    about = {"matrices": len(weights)}
    bench.race(Race("B7", "B7/factorise", "Factorising the linear layers", about), contestants, 25.0)


@torch.no_grad()
def b8(bench: Bench) -> None:
    """B8: z = 1 against the base, bit by bit, on the device at hand."""
    ids, equal = bench.ids(2, 16), {}
    expected = bench.model(ids).logits
    for name in (AUTO, MERGED, NARROW):  # products of factors round differently
        model = adapted(bench.model, name, MLP).eval()
        for layer in svf_layers(model).values():
            for offset in layer.svf_offset.values():
                offset.weight.zero_()
        equal[name] = torch.equal(model(ids).logits, expected)
    bench.run.fact("B8/z_of_ones_equals_base", equal)


CASES = {"B2": b2, "B4": b4, "B6": b6, "B7": b7, "B8": b8}


def main(arguments: list[str] | None = None, prefix: str = "speed") -> Path:
    """Run the benchmark; return the result file."""
    from report import speed_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names separated by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer cells and repetitions")
    parser.add_argument("--tiny", action="store_true", help="a random model of a few thousand numbers")
    parser.add_argument("--threads", type=int, default=1, help="1 counts CPU time, more the wall clock (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed", help="folder of the result")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT uses names that transformers renames
    chosen = [name.strip().upper() for name in options.cases.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(CASES)):
        parser.error(f"there is no case {', '.join(unknown)}; choose from {', '.join(CASES)}")
    run = Run(options.out, vars(options) | {"out": str(options.out), "cases": chosen}, prefix)
    bench = Bench(run, options)
    for name in chosen:
        try:
            CASES[name](bench)
        except torch.cuda.OutOfMemoryError as error:  # the other cases still fit
            run.fact(f"{name}/failed", str(error)[:300])
    run.write()
    print(f"Wrote {run.path.name} and {speed_page(run.path).name} in {options.out}")
    return run.path


if __name__ == "__main__":
    main()
