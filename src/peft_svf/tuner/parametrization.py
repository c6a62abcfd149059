# SPDX-License-Identifier: Apache-2.0
"""
What is trained -> the offset `z - 1` that scales singular values.

Three maps stay: the paper's z itself and the two masks of the paper's code ("sigmoid" and "reference", which ablations
and the import of the original checkpoints need).

Each map sends the parameter 0 to the offset 0, so that every expert starts as the base model to the bit. Nothing here
knows of modules.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Parametrization = Literal["offset", "sigmoid", "reference"]
PARAMETRIZATIONS = get_args(Parametrization)

REFERENCE_START = 0.1  # where the code of arXiv 2501.06252 starts its parameter, up to noise of 0.01


def offset_of(parameter: Tensor, kind: Parametrization, limit: float, S: Tensor | None = None) -> Tensor:
    """
    Map a trained parameter to the offset `z - 1`.

    | kind | z |
    |---|---|
    | `"offset"` | `1 + d`, the paper's equation |
    | `"sigmoid"` | `limit * sigmoid(p0 + d)`, 0 to `limit`, the mask of the paper's code; `p0` makes it 1 at d = 0 |
    | `"reference"` | with that mask `m = sigmoid(0.1 + d)`, `m * sum(S) / sum(S * m)`: the nuclear norm stays |

    Args:
        parameter (`torch.Tensor` of shape `(..., k)`):
            What is trained. Gradients flow to it.
        kind (`str`):
            One of `PARAMETRIZATIONS`.
        limit (`float`):
            See the table.
        S (`torch.Tensor` of shape `(..., k)`, *optional*):
            Singular values, for `"reference"`.

    Returns:
        `torch.Tensor` like `parameter`; exactly 0 where all of a weight's parameters are 0.
    """
    if kind == "sigmoid":
        start = torch.logit(torch.tensor(1 / limit, dtype=torch.float64)).to(parameter.dtype)
        return _relative_sigmoid(parameter, start)
    if kind == "reference":
        assert S is not None
        S = S.to(parameter.dtype)
        change = _relative_sigmoid(parameter, torch.tensor(REFERENCE_START, dtype=parameter.dtype))
        mean = (S * change).sum(-1, keepdim=True) / S.sum(-1, keepdim=True)
        return (change - mean) / (1 + mean)
    return parameter


def _relative_sigmoid(d: Tensor, start: Tensor) -> Tensor:
    """`sigmoid(start + d) / sigmoid(start) - 1` without cancellation: exactly 0 at d = 0."""
    # sigma(a + d) / sigma(a) = (1 + e^-a) / (1 + e^-(a + d)); minus 1 it is e^-a (1 - e^-d) / (1 + e^-(a + d))
    start = start.to(d.device)
    return -torch.expm1(-d) * torch.exp(-start) * torch.sigmoid(start + d)
