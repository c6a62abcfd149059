# SPDX-License-Identifier: Apache-2.0
"""
Weight -> basis of its singular directions; basis and z-vector -> rescaled weight or activation.

Takes weight matrices and returns tensors. Nothing here knows modules, files or adapters.

A weight `W (out, in)` with thin SVD `U diag(S) V^T`, `r = min(out, in)`, is rescaled by a z-vector to
`U diag(S * z) V^T` (arXiv 2501.06252, section 3.1). With the *offset* `d = z - 1` and `Q` the orthogonal basis on the
narrow side of `W`, the same matrix is

    W (I + Q diag(d) Q^T)     side "in"  (out >= in, Q = V (in, in))
    (I + Q diag(d) Q^T) W     side "out" (out <  in, Q = U (out, out))

so one square factor is kept, the singular values themselves cancel, and `d = 0` adds an exact zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 32  # The power method then overlooks only a direction within a few percent of the smallest in Q.


@dataclass(frozen=True)
class Basis:
    """
    Singular directions of one weight on its narrow side.

    Args:
        side (`str`):
            Where `Q` multiplies: `"in"` if out >= in (`Q = V`), else `"out"` (`Q = U`).
        Q (`torch.Tensor` of shape `(r, r)`):
            Orthogonal; column i is the direction of the i-th largest singular value.
        S (`torch.Tensor` of shape `(r,)`):
            Singular values, descending.
    """

    side: str
    Q: Tensor
    S: Tensor


def side_of(out_features: int, in_features: int) -> str:
    """Name the narrow side of a weight: `"in"` if `out_features >= in_features`, else `"out"`."""
    return "in" if out_features >= in_features else "out"


def exact(weight: Tensor) -> Tensor:
    """Upcast a weight without loss: float64 stays, everything else becomes float32."""
    return weight if weight.dtype == torch.float64 else weight.float()


def factorize(weight: Tensor) -> Basis:
    """
    Compute the canonical basis of a weight ("svf-basis v1"): float64 Gram matrix, float64 `eigh`, descending order.

    It agrees with a float64 SVD even if neighbouring singular values almost coincide, for about half its work; in
    float32, groups of such directions come out turned.

    Args:
        weight (`torch.Tensor` of shape `(..., out, in)`):
            Floating point, on any device. Leading dimensions are batched.

    Returns:
        [`Basis`] in float64 on the device of `weight`. Signs are cosmetic: the largest entry of a column is positive.

    Raises:
        `ValueError`: if the weight has NaN or infinite entries.
    """
    side = side_of(*weight.shape[-2:])
    wide = weight.detach().double()
    tall = wide if side == "in" else wide.mT  # (..., long, r): both sides are the "in" case of the tall matrix
    gram = tall.mT @ tall  # (..., r, r)
    if not torch.isfinite(gram).all():
        raise ValueError(f"The weight of shape {tuple(weight.shape)} has NaN or infinite entries: it has no basis.")
    Q = torch.linalg.eigh(gram).eigenvectors
    S = torch.linalg.vector_norm(tall @ Q, dim=-2)  # not sqrt(eigenvalue), which loses the small half of the digits
    order = S.argsort(dim=-1, descending=True, stable=True)
    S = S.gather(-1, order)
    Q = Q.gather(-1, order.unsqueeze(-2).expand_as(Q))
    largest = Q.gather(-2, Q.abs().argmax(dim=-2, keepdim=True))
    return Basis(side, Q * torch.where(largest < 0, -1.0, 1.0), S)


def change(x: Tensor, Q: Tensor, offset: Tensor) -> Tensor:
    """
    Compute what rescaling the components of `x` along the columns of `Q` adds to it: `((x @ Q) * offset) @ Q.T`.

    Args:
        x (`torch.Tensor` of shape `(..., n)`):
            Activations, or rows of a weight.
        Q (`torch.Tensor` of shape `(n, k)`):
            Orthonormal columns. Products run in the dtype of `Q`, and the rescaling in the dtype of `offset`.
        offset (`torch.Tensor`, broadcastable to `(..., k)`):
            `z - 1`. Gradients flow to `offset` and `x`.

    Returns:
        `torch.Tensor` of shape `(..., n)` in the dtype of `x`; exactly 0 where `offset` is 0.
    """
    h = x.to(Q.dtype) @ Q  # (..., k)
    return ((h * offset).to(Q.dtype) @ Q.mT).to(x.dtype)


def rescale(weight: Tensor, Q: Tensor, offset: Tensor) -> Tensor:
    """
    Multiply the singular values of a weight by `1 + offset` along the columns of its basis.

    `U diag(S * z) V^T` (arXiv 2501.06252) with one factor, see the module docstring. An offset of 0 gives the weight
    back to the bit.

    Args:
        weight (`torch.Tensor` of shape `(..., out, in)`):
            Base weight, or a stack of them.
        Q (`torch.Tensor` of shape `(..., min(out, in), k)`):
            The first `k` columns of its basis.
        offset (`torch.Tensor` of shape `(..., k)`):
            `z - 1`, dimensionless.

    Returns:
        `torch.Tensor` of shape `(..., out, in)` in the dtype of `weight`, computed in float32 (float64 for float64).
    """
    wide = exact(weight)
    Q, offset = Q.to(wide.dtype), offset.to(wide.dtype).unsqueeze(-2)
    if side_of(*weight.shape[-2:]) == "in":
        return (wide + change(wide, Q, offset)).to(weight.dtype)
    return (wide + change(wide.mT, Q, offset).mT).to(weight.dtype)


def deviation(weight: Tensor, Q: Tensor, S: Tensor) -> float:
    """
    Measure how far Q and S are from being directions and singular values of a weight, with a random vector `c`.

    They are its own if and only if `Q^T (Q c) = c` and `W^T (W (Q c)) = Q (S^2 * c)` (side "out": `W (W^T (Q c))`) for
    any `c`, and S descends. `c` is new in each call, so nobody can prepare a basis for it. The first `k` are its top
    `k` if no direction that is left has a larger singular value; power iterations on the rest estimate its largest.

    Args:
        weight (`torch.Tensor` of shape `(out, in)` or `(E, out, in)`):
            Weight, in float32 or float64.
        Q (`torch.Tensor` of shape `(r, k)` or `(E, r, k)`):
            Directions, all or the first `k`.
        S (`torch.Tensor` of shape `(k,)` or `(E, k)`):
            Singular values.

    Returns:
        `float`: the largest relative error of the three; about 1 for another weight, infinity if S does not descend or
        an entry is not finite. A weight that is rounded relative to its basis adds twice its own error.
    """
    if not (torch.isfinite(S).all() and (S >= 0).all() and (S.diff(dim=-1) <= 0).all()):
        return float("inf")
    draws = torch.Generator()
    draws.seed()
    lead, (r, k) = Q.shape[:-2], Q.shape[-2:]
    c, u = (torch.randn((*lead, n, 1), generator=draws, dtype=torch.float64).to(Q.device) for n in (k, r))
    wide = Q.double()
    v = wide @ c  # (..., r, 1)
    tall = weight if side_of(*weight.shape[-2:]) == "in" else weight.mT
    S = S.to(weight.dtype).unsqueeze(-1)
    unit = S.amax(dim=-2, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)  # keeps the squares in range
    expected = wide @ ((S / unit).double().square() * c)
    error = tall.mT @ (tall @ v.to(tall.dtype) / unit) / unit - expected
    scale = torch.linalg.vector_norm(expected, dim=-2)
    turned = torch.linalg.vector_norm(error, dim=-2) / torch.where(scale > 0, scale, 1)
    skewed = (wide.mT @ v - c).abs().amax(dim=-2)
    missed = torch.zeros_like(skewed)
    if k < r:
        for _ in range(ITERATIONS):  # u (..., r, 1) converges to the largest direction that Q leaves out
            u = u - wide @ (wide.mT @ u)
            u = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
            u = (tall.mT @ (tall @ u.to(tall.dtype) / unit) / unit).double()
        largest = torch.linalg.vector_norm(u - wide @ (wide.mT @ u), dim=-2)  # square of its singular value
        missed = largest - (S[..., -1:, :] / unit).double().square().squeeze(-1)
    worst = float(torch.stack([turned, skewed, missed]).max())
    return worst if worst == worst else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """Return the [`deviation`] that rounding Q and S to a dtype causes, with a margin of ten."""
    return 64 * torch.finfo(dtype).eps
