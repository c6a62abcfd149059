# SPDX-License-Identifier: Apache-2.0
"""
The paper's formula, arXiv 2501.06252 section 3.1, in float64 and in full: `W' = U diag(S * z) V^T`.

Shares nothing with `src/`: numpy's SVD, both factors, no offsets, no bases of one side. In and out go tensors; a
weight is `(out, in)`, a z-vector may be shorter than the number of singular values: what is missing stays, z = 1.
"""

import numpy as np
import torch
from torch import Tensor


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def _factors(weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(_array(weight), full_matrices=False)


def _whole(z: Tensor, size: int) -> np.ndarray:
    return np.concatenate([_array(z), np.ones(size - z.numel())])


def singular_values(weight: Tensor) -> Tensor:
    """All singular values, descending."""
    return torch.from_numpy(_factors(weight)[1])


def rescaled(weight: Tensor, z: Tensor) -> Tensor:
    """`U diag(S * z) V^T` of shape `(out, in)`, float64."""
    U, S, Vt = _factors(weight)
    return torch.from_numpy(U @ np.diag(S * _whole(z, S.size)) @ Vt)


def output(weight: Tensor, bias: Tensor | None, z: Tensor, x: Tensor) -> Tensor:
    """`x W'^T + bias` for tokens `x (..., in)`, float64."""
    y = _array(x) @ _array(rescaled(weight, z)).T
    return torch.from_numpy(y if bias is None else y + _array(bias))


def dense_gradient(weight: Tensor, z: Tensor, G: Tensor) -> Tensor:
    """`dz (len(z),)` from the gradient `G = dL/dW' (out, in)` of the rescaled weight: `dz_i = S_i u_i^T G v_i`."""
    U, S, Vt = _factors(weight)
    return torch.from_numpy(S * np.einsum("oi,on,in->i", U, _array(G), Vt))[: z.numel()]


def gradients(weight: Tensor, z: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """
    Gradients of a loss with `dL/dy = g (..., out)` at `y = x W'^T + bias`.

    Returns:
        `dz (len(z),)` by [`dense_gradient`] with `G = sum_t g_t x_t^T`, and `dx = g W'`.
    """
    x_rows, g_rows = (_array(t).reshape(-1, t.shape[-1]) for t in (x, g))
    dz = dense_gradient(weight, z, torch.from_numpy(g_rows.T @ x_rows))
    return dz, torch.from_numpy(_array(g) @ _array(rescaled(weight, z)))
