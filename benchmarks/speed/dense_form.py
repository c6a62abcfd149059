# SPDX-License-Identifier: Apache-2.0
"""
The dense form of singular-value fine-tuning, as a yardstick: U, S and V are kept, weights are composed anew.

Written from the description of the paper's method (arXiv 2501.06252, section 3.1) and of what its code does in a step:
every adapted weight is composed, `W' = U diag(S * m) V^T * sum(S) / sum(S * m)` with `m = sigmoid(p)`, and copied over
the model's weight; the backward pass leaves a dense gradient on that weight; the weight is composed once more, now
under autograd, and the dense gradient goes through it to `p`. `lean` is the same arithmetic done with care: columns
are scaled instead of multiplying by a diagonal matrix, and the first composition is kept for the backward.
"""

import torch
from torch import Tensor, nn


class DenseWeight:
    """
    One weight in dense form.

    Args:
        layer (`nn.Linear`):
            Gets a weight of its own `(out, in)` that is overwritten in every step and collects a dense gradient.
        lean (`bool`):
            See the module docstring.
    """

    def __init__(self, layer: nn.Linear, lean: bool = False) -> None:
        U, S, Vt = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
        self.U, self.S, self.V = U, S, Vt.mT.contiguous()  # (out, r), (r,), (in, r)
        self.p = nn.Parameter(0.1 + 0.01 * torch.randn(S.shape, device=S.device))
        self.layer, self.lean = layer, lean
        self.layer.weight = nn.Parameter(layer.weight.detach().clone())
        self._composed: Tensor | None = None

    @property
    def z(self) -> Tensor:
        """The multipliers of the singular values, the nuclear-norm factor included, shape `(r,)`."""
        m = torch.sigmoid(self.p)
        return m * self.S.sum() / (self.S * m).sum()

    def compose(self) -> Tensor:
        """`U diag(S * m) V^T * sum(S) / sum(S * m)`, shape `(out, in)`, float32."""
        if self.lean:
            return (self.U * (self.S * self.z)) @ self.V.mT
        m = torch.sigmoid(self.p)
        return self.U @ torch.diag(self.S * m) @ self.V.mT * (self.S.sum() / (self.S * m).sum())

    def refresh(self) -> None:
        """Overwrite the weight of the layer, before the forward."""
        with torch.set_grad_enabled(self.lean):
            composed = self.compose()
        self._composed = composed if self.lean else None
        with torch.no_grad():
            self.layer.weight.copy_(composed)

    def project(self) -> None:
        """Take the dense gradient of the weight to `p.grad`, after the backward."""
        composed = self.compose() if self._composed is None else self._composed
        assert self.layer.weight.grad is not None
        composed.backward(self.layer.weight.grad.to(composed.dtype))
        self.layer.weight.grad = self._composed = None

    def bytes(self) -> dict[str, int]:
        """Memory beside the base model: factors, and the dense gradient while there is one."""
        factors = sum(t.numel() * t.element_size() for t in (self.U, self.S, self.V))
        weight = self.layer.weight
        return {"factors": factors, "gradient": weight.numel() * weight.element_size()}


class DenseForm:
    """
    A model whose target weights are in dense form.

    Args:
        model (`nn.Module`): Its target layers are changed in place.
        targets (`list[str]`): Endings of module names; an empty list takes every `nn.Linear`.
        lean (`bool`): See the module docstring.
    """

    def __init__(self, model: nn.Module, targets: list[str], lean: bool = False) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.weights = [
            DenseWeight(module, lean)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and (not targets or name.rpartition(".")[2] in targets)
        ]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [weight.p for weight in self.weights]

    def refresh(self) -> None:
        """Compose all weights, before the forward."""
        for weight in self.weights:
            weight.refresh()

    def project(self) -> None:
        """Take all dense gradients to the trained vectors, after the backward."""
        for weight in self.weights:
            weight.project()
