# SPDX-License-Identifier: Apache-2.0
"""
Shapes of a model -> numbers of parameters, bytes and flops of SVF and of LoRA: derived, not measured.

`python benchmarks/formulas.py` prints the tables of docs/scaling.md; tests/test_scaling.py checks the formulas
against small real models. Nothing here needs a model, or any package.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

BF16, FP32 = 2, 4  # bytes
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
QV, ALL = ("q_proj", "v_proj"), (*ATTENTION, *MLP)
TARGETS = {"q, v": QV, "MLP": MLP, "all linear": ALL}


@dataclass(frozen=True)
class Shape:
    """Weights of one name: `tall` outputs, `wide` inputs, `count` of them in the model."""

    name: str
    tall: int
    wide: int
    count: int

    @property
    def r(self) -> int:
        """The number of singular values."""
        return min(self.tall, self.wide)

    @property
    def entries(self) -> int:
        """The entries of one weight."""
        return self.tall * self.wide


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder like Llama's: `mlp` of one expert, `experts` MLPs in a layer, `active` ones for a token."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 1
    active: int = 1


SMOLLM2_135M = Architecture("SmolLM2-135M", 576, 1536, 30, 9, 3, 64)
LLAMA_3_8B = Architecture("Llama-3-8B", 4096, 14336, 32, 32, 8, 128)
LLAMA_3_70B = Architecture("Llama-3-70B", 8192, 28672, 80, 64, 8, 128)
QWEN3_235B = Architecture("Qwen3-235B-A22B", 4096, 1536, 94, 64, 4, 128, experts=128, active=8)
MODELS = (LLAMA_3_8B, LLAMA_3_70B, QWEN3_235B)


def weights(model: Architecture, targets: Iterable[str] = ALL) -> list[Shape]:
    """The linear weights of a model that have one of these names; of stacked experts, each matrix."""
    hidden, queries, keys = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    sizes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    sizes |= {"o_proj": (hidden, queries), "down_proj": (hidden, model.mlp)}
    if model.experts > 1:  # transformers stacks the experts and fuses gate and up into one matrix: (E, 2 mlp, hidden)
        sizes["gate_up_proj"] = (2 * model.mlp, hidden)
    else:
        sizes |= dict.fromkeys(("gate_proj", "up_proj"), (model.mlp, hidden))
    count = {name: model.layers * (1 if name in ATTENTION else model.experts) for name in sizes}
    return [Shape(name, *size, count[name]) for name, size in sizes.items() if name in set(targets)]


def _sum(shapes: Sequence[Shape], of: Callable[[Shape], int]) -> int:
    return sum(shape.count * of(shape) for shape in shapes)


def entries(shapes: Sequence[Shape]) -> int:
    """Entries of the weights themselves."""
    return _sum(shapes, lambda s: s.entries)


def svf_parameters(shapes: Sequence[Shape], rank: int | None = None) -> int:
    """Trained numbers of SVF: one for each singular value that it moves."""
    return _sum(shapes, lambda s: min(s.r, rank or s.r))


def lora_parameters(shapes: Sequence[Shape], rank: int = 16) -> int:
    """Trained numbers of LoRA."""
    return _sum(shapes, lambda s: rank * (s.tall + s.wide))


def basis_bytes(shapes: Sequence[Shape], itemsize: int = BF16, rank: int | None = None) -> int:
    """Resident bytes of the bases: `Q (r, k)` in their dtype and `S (k,)` in float32."""
    return _sum(shapes, lambda s: (itemsize * s.r + FP32) * min(s.r, rank or s.r))


def merged_bytes(shapes: Sequence[Shape], itemsize: int = BF16) -> int:
    """Bytes of the merged plan's `W'` or of the factored plan's second factor, beside weights and bases."""
    return itemsize * entries(shapes)


def dense_bytes(shapes: Sequence[Shape], itemsize: int = BF16) -> dict[str, int]:
    """Bytes of the dense form beside the weights: U, S and V, a copy of the base, a dense gradient."""
    factors = _sum(shapes, lambda s: s.r * (s.tall + s.wide) + s.r)
    return {"factors": itemsize * factors, "base": itemsize * entries(shapes), "gradient": itemsize * entries(shapes)}


def cache_bytes(shapes: Sequence[Shape]) -> int:
    """Bytes on disk of the basis cache: Q and S in float32, without headers."""
    return _sum(shapes, lambda s: FP32 * (s.r * s.r + s.r))


def forward_flops(shapes: Sequence[Shape], tokens: int = 1) -> int:
    """Flops of the frozen products of a forward; a backward to the activations has as many."""
    return 2 * tokens * entries(shapes)


def narrow_flops(shapes: Sequence[Shape], tokens: int = 1, rank: int | None = None) -> int:
    """Flops that the narrow plan adds to a forward, and as many again to a backward."""
    return _sum(shapes, lambda s: 4 * tokens * s.r * min(s.r, rank or s.r))


def factored_flops(shapes: Sequence[Shape], tokens: int = 1) -> int:
    """Flops of a forward through the two factors, instead of [`forward_flops`]."""
    return _sum(shapes, lambda s: 2 * tokens * (s.r * s.r + s.entries))


def merge_flops(shapes: Sequence[Shape]) -> int:
    """Flops of building `W'`: an r x r product and one with the weight."""
    return _sum(shapes, lambda s: 2 * s.r**3 + 2 * s.r * s.entries)


def gradient_flops(shapes: Sequence[Shape], tokens: int) -> int:
    """Flops that the gradient of z adds to a backward in the merged plan, by the cheaper of two ways."""
    return _sum(shapes, lambda s: min(2 * tokens * s.r**2 + 2 * s.r**3, 4 * tokens * s.r**2))


def compose_flops(shapes: Sequence[Shape]) -> int:
    """Flops of one composition `U diag(S z) V^T` in the dense form, the diagonal as a matrix; three in a step."""
    return _sum(shapes, lambda s: 2 * s.tall * s.r * s.r + 2 * s.r * s.entries)


def lora_flops(shapes: Sequence[Shape], tokens: int = 1, rank: int = 16) -> int:
    """Flops that LoRA adds to a forward; it adds twice as many to a backward."""
    return _sum(shapes, lambda s: 2 * tokens * rank * (s.tall + s.wide))


def step_flops(shapes: Sequence[Shape], method: str, tokens: int) -> int:
    """Flops of the adapted products in one training step, all tokens in one backward, and of what changes with z."""
    frozen = 2 * forward_flops(shapes, tokens)
    return {
        "frozen": frozen,
        "merged": frozen + gradient_flops(shapes, tokens) + merge_flops(shapes),
        "narrow": frozen + 2 * narrow_flops(shapes, tokens),
        "factored": 2 * factored_flops(shapes, tokens),
        "lora": frozen + 3 * lora_flops(shapes, tokens),
        "dense": frozen + forward_flops(shapes, tokens) + 3 * compose_flops(shapes),
    }[method]


def step_ratio(shapes: Sequence[Shape], method: str, tokens: int) -> float:
    """Flops of a training step over those of the frozen products."""
    return step_flops(shapes, method, tokens) / step_flops(shapes, "frozen", tokens)


def eigh_seconds(shapes: Sequence[Shape], nanoseconds: float = 0.40) -> float:
    """Seconds of one CPU thread for `eigh`, at `nanoseconds * r^3`: 0.40 was measured for r of 1024 and 2048."""
    return _sum(shapes, lambda s: s.r**3) * nanoseconds * 1e-9


def factorise_product_flops(shapes: Sequence[Shape]) -> int:
    """Float64 flops of the Gram matrices and of `W Q`, beside `eigh`."""
    return _sum(shapes, lambda s: 4 * s.r * s.entries)


def human(count: float) -> str:
    """`1.5e9` -> "1.50 GB"; three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Write a Markdown table as lines, with an empty one at the end."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] + [""]


def by_targets(
    models: Iterable[Architecture], names: Iterable[str] = TARGETS
) -> Iterator[tuple[str, str, list[Shape]]]:
    """Yield the model's name, the name of the targets and their weights."""
    return ((model.name, name, weights(model, TARGETS[name])) for model in models for name in names)


def memory_table() -> list[str]:
    """Parameters and bytes of every model and choice of targets."""
    rows = []
    for model, name, shapes in by_targets(MODELS):
        dense, numbers = dense_bytes(shapes), svf_parameters(shapes)
        sizes = (FP32 * numbers, BF16 * entries(shapes), basis_bytes(shapes), basis_bytes(shapes, rank=64))
        sizes += (merged_bytes(shapes), dense["factors"], sum(dense.values()), cache_bytes(shapes))
        expert, *others = map(human, sizes)
        rows.append([model, name, f"{numbers:,}", expert, f"{lora_parameters(shapes):,}", *others])
    head = [
        "model", "targets", "z", "an expert", "LoRA r=16", "W", "bases", "bases, k=64", "+ merged or factored",
        "U, S, V", "dense form in all", "cache on disk",
    ]  # fmt: skip
    return table(head, rows)


def step_table(tokens: Sequence[int] = (2048, 16384, 65536)) -> list[str]:
    """Flops of a training step over the frozen products, by plan and tokens."""
    rows = []
    for model, name, shapes in by_targets([LLAMA_3_8B], ("MLP", "all linear")):
        for count in tokens:
            ratios = (step_ratio(shapes, way, count) for way in ("merged", "narrow", "factored", "lora", "dense"))
            rows.append([model, name, f"{count:,}", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(["model", "targets", "tokens", "merged", "narrow", "factored", "LoRA r=16", "dense form"], rows)


def factorise_table() -> list[str]:
    """Time of one CPU thread in `eigh` for all bases, and the float64 products beside it."""
    rows: dict[str, list[str]] = {}
    for model, _, shapes in by_targets(MODELS):
        cell = f"{eigh_seconds(shapes) / 3600:.2g} h + {factorise_product_flops(shapes) / 1e12:,.0f} Tflop"
        rows.setdefault(model, [model]).append(cell)
    return table(["model", *TARGETS], rows.values())


TABLES = (memory_table, step_table, factorise_table)


if __name__ == "__main__":
    for tabulate in TABLES:
        print(f"<!-- {tabulate.__name__} -->", *tabulate(), sep="\n")
