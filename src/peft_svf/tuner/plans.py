# SPDX-License-Identifier: Apache-2.0
"""
Weight, basis and offset -> the products of a rescaled linear layer, by one of three execution plans.

Takes tensors and returns tensors. Nothing here knows of adapters, configs or files. With `W` the base weight, `Q` its
narrow-side basis, `d = z - 1` the offset and `W' = W (I + Q diag(d) Q^T)` (side "in"; "out" is its mirror image):

| plan | keeps in addition to W and Q | forward | backward |
|---|---|---|---|
| merged | `W'` | `x W'^T`, the cost of the base | `g W'`, and the gradient of z from an r x r product |
| narrow | nothing | `(x + change(x)) W^T` | through the same two thin products |
| factored | `B = W Q` | `((x Q) * z) B^T`, without W | likewise |

The narrow plan takes any base layer, quantised ones too, and gives each row of a batch its own z; so does the factored
one, for plain weights. z = 1 is the base model to the bit in the first two; in the factored plan, which multiplies
`W Q Q^T` out, it is the base up to rounding.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

Plan = Literal["auto", "merged", "narrow", "factored"]
PLANS = ("auto", "merged", "narrow", "factored")

TAIL = 0.1  # share of the median S below which the gradient of z drowns in the rounding of g W (10-40 % in bfloat16)
FEW = 32  # tokens for which upcasting a square factor of 576 to 4096 costs about what it saves
TRANSPOSED_IS_SLOW = 2048  # directions from which a CPU takes 2.4 times as long for a transposed factor (at 4096)
SMALL_Z = {torch.bfloat16: 0.25, torch.float16: 0.25, torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class Load:
    """What a plan is chosen by, for one forward of one layer."""

    tokens: int  # rows of the activation, times the forwards of an optimizer step
    long: int  # max(out, in)
    r: int  # min(out, in)
    k: int  # directions that z moves
    training: bool = False  # a backward pass through z is to be expected, and another z after it
    rows: bool = False  # the rows of the batch have their own z
    base_rows: bool = False  # some of these rows are the base model
    lasting: bool = True  # the same z serves many forwards, as it does in generation, or is merged already
    room: bool = True  # there is memory for a second weight
    precise: bool = True  # the basis is as precise as the weight: what is lost of `Q Q^T = I` the factored plan loses


def break_even(long: int, r: int, k: int) -> float:
    """
    Count the tokens of an optimizer step from which on building `W'` is cheaper than the narrow plan.

    In flops: `W'` costs `2 r^2 k + 2 long r^2` (or `4 long r k` where that is less), projecting the r x r product
    `2 r^2 k`; a token costs `8 r k` narrow, and merged `2 r^2` or `4 r k`, whichever is less.
    """
    build = min(2 * r * r * k + 2 * long * r * r, 4 * long * r * k)
    by_thin = build / (4 * r * k)
    by_product = (build + 2 * r * r * k) / (8 * r * k - 2 * r * r) if 4 * k > r else by_thin
    return min(by_thin, by_product)


def choose(plan: Plan, load: Load) -> Plan:
    """
    Choose the plan for one forward: the user's if it can serve this load, else the cheapest.

    The choice depends on this forward alone, so that a repeated or resumed run chooses the same.
    """
    whole = load.k == load.r and load.precise
    if load.rows:
        fits = plan == "factored" or (plan == "auto" and load.room and not load.training)
        return "factored" if fits and whole and not load.base_rows else "narrow"
    if plan == "factored" and not whole:
        return "narrow"  # directions that stay would need a second factor
    if plan != "auto":
        return plan
    if not load.room:
        return "narrow"
    if load.training:
        return "merged" if load.tokens >= break_even(load.long, load.r, load.k) else "narrow"
    return "merged" if load.lasting or load.tokens >= break_even(load.long, load.r, load.k) else "narrow"


@dataclass
class Merged:
    """A weight with its z folded in, and what else the gradient of z needs."""

    weight: Tensor  # W' (out, in)
    base: Tensor  # W (out, in)
    bias: Tensor | None  # (out,)
    side: str
    Q: Tensor  # (r, k)
    offset: Tensor  # (k,): the values that `weight` was built from
    key: tuple[Any, ...]  # identifies the base weight that it was built from
    tail: Tensor | None = None  # directions whose gradient is taken by the exact thin product
    thin: Tensor | None = field(default=None, repr=False)  # base @ Q[:, tail], or Q[:, tail].T @ base
    # Until the backward of these graphs `weight` must not change; a graph that is dropped, as by checkpointing, goes.
    pending: "WeakSet[_Graph]" = field(default_factory=WeakSet, repr=False)

    def holds(self, offset: Tensor | None) -> bool:
        """Whether it was built from these values: writes through `.data` leave version counters alone."""
        return offset is not None and torch.equal(self.offset, offset)


def transforming() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which custom backwards don't serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_second_derivative() -> None:
    """Raise in a backward that is asked for a graph of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "SVF's merged plan and its stacked experts have first derivatives alone: for `create_graph=True` call "
            "`model.set_plan('narrow')` first, and leave stacked experts out or use `torch.func`."
        )


class _Graph:
    """Lives as long as the autograd graph of one forward."""


@functools.cache
def emulates(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products in a 16-bit dtype, which then take four times float32's."""
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16", "fp16")}
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11
    return dtype in names and not any(capabilities.get(name) for name in names[dtype])


def fast(tensor: Tensor, tokens: int = FEW) -> Tensor:
    """Upcast a 16-bit factor on a CPU that would emulate its products, unless so few tokens do not repay it."""
    if torch.compiler.is_compiling():  # Dynamo warns of the cache of `emulates`.
        return tensor
    slow = tokens >= FEW and tensor.device.type == "cpu" and emulates(tensor.dtype)
    return tensor.float() if slow else tensor


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as it counts: those made in `torch.inference_mode` do not."""
    return 0 if tensor.is_inference() else tensor._version


def key_of(weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """Identify a base weight and the dtype it is used in, up to writes through `.data`, which torch doesn't count."""
    return weight.data_ptr(), version_of(weight), dtype, weight.device


def capturing(x: Tensor) -> bool:
    """
    Whether a CUDA graph is being captured: nothing may wait for the device, and replays must see later values of z.

    The narrow plan reads z from the adapter's parameter itself, or from the tensor given to [`active_rows`].
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def fold(
    weight: Tensor,
    bias: Tensor | None,
    side: str,
    Q: Tensor,
    S: Tensor,
    offset: Tensor,
    key: tuple[Any, ...] = (),
    old: Merged | None = None,
) -> Merged | None:
    """
    Build `W'` for one z, into the memory of an old one if nothing needs that any more.

    The change is computed in the dtype of the weight (see [`fast`]), accumulated in float32, and added before the one
    rounding: on SmolLM2's MLP weights in bfloat16 as far from float64 as rounding alone. `d = 0` gives the weight to
    the bit.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`):
            Base weight in the dtype of the product, possibly a transposed view; `bias (out,)` has that dtype too.
        S (`torch.Tensor` of shape `(k,)`):
            Singular values, for the tail.
        offset (`torch.Tensor` of shape `(k,)`):
            `z - 1`.
        old ([`Merged`], *optional*):
            What was built before for the same weight.

    Returns:
        [`Merged`], or `None` if so many z are near 0 that the narrow plan serves better.
    """
    with torch.inference_mode(False), torch.no_grad():  # what is kept serves training, too
        small = (1 + offset).abs() < SMALL_Z[weight.dtype]
        if weight.dtype in (torch.bfloat16, torch.float16):
            small |= TAIL * S.median() > S
        tail = small.nonzero().squeeze(1) if bool(small.any()) else None
        if tail is not None and len(tail) > max(8, Q.shape[1] // 4):
            return None
        reuse = old is not None and not old.pending and old.weight.shape == weight.shape
        reuse = reuse and old.weight.dtype == weight.dtype and old.weight.device == weight.device  # type: ignore[union-attr]
        out = old.weight if reuse else torch.empty_like(weight)  # type: ignore[union-attr]  # keeps the strides
        wide, Q_, (r, k) = fast(weight), fast(Q), Q.shape
        if 2 * k * max(weight.shape) < r * (k + max(weight.shape)):  # fewer flops than through the r x r matrix
            Q_ = Q_.to(wide.dtype)
            scaled = (Q_ * offset).to(wide.dtype)
            left, right = (wide @ Q_, scaled.mT) if side == "in" else (scaled, Q_.mT @ wide)
        else:
            D = ((Q_ * offset).to(Q_.dtype) @ Q_.mT).to(wide.dtype)  # (r, r)
            left, right = (wide, D) if side == "in" else (D, wide)
        if wide is weight:
            torch.addmm(weight, left, right, out=out)
        else:
            out.copy_(torch.addmm(wide, left, right))
        thin = None
        if tail is not None:
            # W q_i from unrounded q_i: else larger directions leak into it
            thin = factor(weight, side, Q[:, tail])
        return Merged(out, weight, bias, side, Q, offset.detach().clone(), key, tail, thin)


def factor(weight: Tensor, side: str, Q: Tensor) -> Tensor:
    """Multiply out the other factor: `W Q (out, r)` on side "in", `Q^T W (r, in)` on side "out", in W's dtype."""
    wide = weight.to(torch.promote_types(weight.dtype, Q.dtype))
    return (wide @ Q.to(wide.dtype) if side == "in" else Q.to(wide.dtype).mT @ wide).to(weight.dtype)


@dataclass
class Factored:
    """A weight as two factors, and the z that it was last applied with."""

    first: Tensor  # (r, in)
    second: Tensor  # (out, r): `second @ first` is the weight up to rounding
    bias: Tensor | None  # (out,)
    key: tuple[Any, ...]  # identifies the weight
    known: tuple[Any, ...] = ()  # identifies the batch and the offsets that `scale` was made for
    scale: Tensor | None = None  # z in the shape that activations of that batch take

    def remember(self, batch: tuple[Any, ...], offsets: Tensor, scale: Tensor) -> None:
        """Keep the z of the rows of a batch: decoding needs it in every layer and for every token."""
        if not offsets.is_inference():  # could be written to unseen
            self.known, self.scale = (*batch, version_of(offsets)), scale

    def knows(self, batch: tuple[Any, ...], offsets: Tensor) -> bool:
        """Whether `scale` was made from these offsets for such a batch."""
        return self.known == (*batch, version_of(offsets))


def split(weight: Tensor, bias: Tensor | None, side: str, Q: Tensor, key: tuple[Any, ...] = ()) -> Factored:
    """Split a weight `(out, in)` by its whole basis `(r, r)` into two factors, both in its dtype; see [`fast`]."""
    with torch.inference_mode(False), torch.no_grad():
        weight, bias = fast(weight), bias if bias is None else fast(bias)
        B, Q = factor(weight, side, Q), Q.to(weight.dtype)
        first, second = (Q.mT, B) if side == "in" else (B, Q)
        if first.device.type == "cpu" and len(first) >= TRANSPOSED_IS_SLOW:
            first = first.contiguous()
    return Factored(first, second, bias, key)


def factored_linear(x: Tensor, factored: Factored, scale: Tensor) -> Tensor:
    """
    Apply a rescaled weight through its two factors: `(..., in)` -> `(..., out)` in the dtype of `x`.

    `scale` is z, broadcastable to `(..., r)`, in float32: near 1 half precision has too few digits for it. Gradients
    flow to it and to `x`.
    """
    h = F.linear(x.to(factored.first.dtype), factored.first)  # (..., r)
    return F.linear((h * scale).to(h.dtype), factored.second, factored.bias).to(x.dtype)


def merged_linear(x: Tensor, offset: Tensor, merged: Merged) -> Tensor:
    """
    Apply `W'`, with the gradients of the rescaled layer: `(..., in)` -> `(..., out)`, to `x` and to `offset`.

    The forward is the base layer's own call on another weight. The gradient of z is the diagonal of `Q^T (a^T b) Q`
    divided by z, where a and b are the gradient of x and x (side "in"), the gradient of y and y (side "out"); no
    dense gradient of a weight is ever made.
    """
    if torch.is_grad_enabled() and (x.requires_grad or offset.requires_grad):
        return _MergedLinear.apply(x, offset, merged)
    return F.linear(x, merged.weight, merged.bias)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, merged: Merged) -> Tensor:  # type: ignore[override]
        y = F.linear(x, merged.weight, merged.bias)
        needed: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            # y serves only without a bias: where the bias is large (Qwen2.5's k_proj: 20 times the signal) y - bias
            # has lost it in half precision
            from_y = merged.side == "out" and merged.bias is None and merged.tail is None
            ctx.from_y = from_y
            needed = (offset, y if from_y else x)
        ctx.save_for_backward(*needed)
        ctx.merged, ctx.version, ctx.graph = merged, merged.weight._version, _Graph()
        merged.pending.add(ctx.graph)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        refuse_second_derivative()
        merged: Merged = ctx.merged
        merged.pending.discard(ctx.graph)
        if merged.weight._version != ctx.version:
            raise RuntimeError(
                "The z-vector of an SVF layer changed between a forward and a second backward through it: run the "
                "forward again, or use plan='narrow'."
            )
        with torch.autocast(g.device.type, enabled=False):
            wanted = ctx.needs_input_grad
            need_dx = wanted[0] or (wanted[1] and merged.side == "in")
            dx = (fast(g) @ fast(merged.weight)).to(g.dtype) if need_dx else None  # (..., in)
            dz = None
            if wanted[1]:
                offset, saved = ctx.saved_tensors
                dz = _offset_gradient(merged, offset, g, dx, saved, ctx.from_y).to(offset.dtype)
        return dx if wanted[0] else None, dz, None


def _offset_gradient(
    merged: Merged, offset: Tensor, g: Tensor, dx: Tensor | None, saved: Tensor, from_y: bool
) -> Tensor:
    """The gradient `(k,)` of the offset, in float32 (float64 for float64)."""
    Q = merged.Q
    g = g.reshape(-1, g.shape[-1])
    saved = saved.reshape(-1, saved.shape[-1])
    divisor: Tensor = 1 + offset
    if merged.side == "in":
        assert dx is not None
        a, b = dx.reshape(-1, dx.shape[-1]), saved
    elif from_y:
        a, b = g, saved
    else:
        a, b = g, F.linear(saved, merged.base)  # x W^T itself: nothing to divide by
        divisor = torch.ones_like(offset)
    dz = diagonal(a, b, Q)
    if merged.tail is None:
        return dz / divisor
    assert merged.thin is not None
    dz = dz / torch.where(divisor == 0, 1, divisor)
    Q_tail = Q[:, merged.tail].to(g.dtype)
    if merged.side == "in":
        exact = _column_sums(g @ merged.thin, saved @ Q_tail)
    else:
        exact = _column_sums(g @ Q_tail, F.linear(saved, merged.thin))
    dz[merged.tail] = exact.to(dz.dtype)
    return dz


def diagonal(a: Tensor, b: Tensor, Q: Tensor) -> Tensor:
    """
    The diagonal `(k,)` of `Q^T a^T b Q` in float32 (float64): through the r x r product if that is less work.

    The rows of `a` and `b` `(T, r)` are tokens; `Q` is `(r, k)`.
    """
    (T, r), k = a.shape, Q.shape[1]
    a, b = fast(a), fast(b)
    if 2 * T * r * r + 2 * r * r * k >= 4 * T * r * k:
        Q = Q.to(a.dtype)
        return _column_sums(a @ Q, b @ Q)
    if a.dtype == torch.float16:  # sums over tokens leave its range
        a, b = a.float(), b.float()
    K = a.mT @ b  # (r, r), accumulated in float32
    wide = torch.promote_types(K.dtype, Q.dtype)
    return _column_sums(K.to(wide) @ Q.to(wide), Q)


def _column_sums(a: Tensor, b: Tensor) -> Tensor:
    """`(a * b).sum(0)` in float32 (float64), without rounding the products first."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.linalg.vecdot(a.to(wide), b.to(wide), dim=0)
