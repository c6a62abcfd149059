# SPDX-License-Identifier: Apache-2.0
"""
The dense form of singular-value fine-tuning, as a yardstick: it keeps U, S and V and composes weights in every step.

Written from the paper's description of its method (arXiv 2501.06252, section 3.1): every adapted weight is composed,
`W' = U diag(S * m) V^T * sum(S) / sum(S * m)` with `m = sigmoid(p)`, and copied over the model's weight; the backward
leaves a dense gradient on that weight; the weight is composed again under autograd, and the dense gradient flows
through it to `p`.
"""

import torch
from torch import Tensor, nn


class DenseWeight:
    """One weight in dense form: `layer` gets a separate one, overwritten in every step, with a dense gradient."""

    def __init__(self, layer: nn.Linear) -> None:
        self.U, self.S, self.Vt = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
        self.p, self.layer = nn.Parameter(0.1 + 0.01 * torch.randn_like(self.S)), layer
        self.layer.weight = nn.Parameter(layer.weight.detach().clone())

    @property
    def z(self) -> Tensor:
        """The multipliers of the singular values, the nuclear-norm factor included, shape `(r,)`."""
        m = torch.sigmoid(self.p)
        return m * self.S.sum() / (self.S * m).sum()

    def compose(self) -> Tensor:
        """Compose `U diag(S * m) V^T * sum(S) / sum(S * m)`, shape `(out, in)`, float32."""
        m = torch.sigmoid(self.p)
        return self.U @ torch.diag(self.S * m) @ self.Vt * (self.S.sum() / (self.S * m).sum())

    @torch.no_grad()
    def refresh(self) -> None:
        """Overwrite the weight of the layer, before the forward."""
        self.layer.weight.copy_(self.compose())

    def project(self) -> None:
        """Carry the dense gradient of the weight to `p.grad`, after the backward."""
        assert self.layer.weight.grad is not None
        self.compose().backward(self.layer.weight.grad.float())
        self.layer.weight.grad = None


def dense_form(model: nn.Module, targets: list[str]) -> list[DenseWeight]:
    """Put the linear layers of a model whose names end in one of `targets` into dense form, in place."""
    model.requires_grad_(False)
    named = [m for name, m in model.named_modules() if name.rpartition(".")[2] in targets]
    return [DenseWeight(module) for module in named if isinstance(module, nn.Linear)]
