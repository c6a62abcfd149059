# SPDX-License-Identifier: Apache-2.0
"""
What is expected: the paper's formula, arXiv 2501.06252 section 3.1, and plain forwards, both in float64.

`W' = U diag(S z) V^T` shares nothing with `src/`: numpy's SVD, both factors, no offsets, no bases of one side. In and
out go tensors; a weight is `(out, in)`, a z-vector may be shorter than the number of singular values: what is missing
stays, z = 1. Tokens are read by one forward over all of them: no batch, no padding, no cache.
"""

import numpy as np
import torch
from torch import Tensor, nn


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


def logps(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-likelihoods `(len(completion),)` of a completion's tokens after a prompt; gradients flow."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[torch.arange(len(completion)), completion]


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], length: int, end: int) -> list[int]:
    """The likeliest next tokens, up to `length` or the token `end`, by one forward for each."""
    new: list[int] = []
    while len(new) < length and new[-1:] != [end]:
        new.append(int(model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, -1].argmax()))
    return new
