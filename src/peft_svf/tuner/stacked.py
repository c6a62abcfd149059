# SPDX-License-Identifier: Apache-2.0
"""
SVF of a parameter that isn't a linear layer: the stacked weights `(E, out, in)` of fused mixture-of-experts modules.

What a module does with its stack (routing, grouped products) is its own business: it is run as it is, with a rescaled
stack in the parameter's place. One z-vector holds the multipliers of all its matrices, one after the other. Private
names of PEFT were read in 0.21.2.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .basis import rescale
from .config import SVFConfig
from .layer import SVFLayer
from .plans import Merged, capturing, key_of, refuse_second_derivative, transforming
from .weights import offloaded, readable

SWAPPING = threading.RLock()  # While a module holds a rescaled stack, one thread runs it.


class ParamWrapper(SVFLayer):
    """
    SVF of one parameter `(E, out, in)` or `(out, in)` of any module.

    PEFT nests one wrapper per parameter and knows them by this class's name. In training the rescaled stack is made in
    each forward and kept by autograd until the module's backward (activation checkpointing shortens that), where its
    gradient, of the same size, is projected on z; in inference it is made once for each z.
    """

    parameter_name: str

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: SVFConfig, **kwargs: Any
    ) -> None:
        bare: Any = base_layer.get_base_layer() if isinstance(base_layer, SVFLayer) else base_layer
        weight = getattr(bare, parameter_name)
        _refuse_offloaded(bare, parameter_name)
        if weight.dim() not in (2, 3) or not readable(weight):
            raise ValueError(
                f"Target parameter {parameter_name!r} of {type(bare).__name__} has shape {tuple(weight.shape)} and "
                f"dtype {weight.dtype}: SVF adapts floating point matrices (out, in) and stacks of them (experts, "
                "out, in)."
            )
        self.parameter_name = parameter_name
        self.matrices = len(weight) if weight.dim() == 3 else 1
        super().__init__(base_layer, adapter_name, config, (weight.shape[-1], weight.shape[-2]), **kwargs)

    @property
    def base_weight(self) -> Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    def weight_name(self, name: str) -> str:
        return f"{name.replace('.base_layer', '')}.{self.parameter_name}"

    def get_base_weight(self) -> Tensor:
        return self.base_weight.data

    def set_base_weight(self, weight: Tensor) -> None:
        self.base_weight.data = weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.svf_merged = None
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        rows = self.rows
        if (offset := self._offset_in_force(rows)) is None:
            return self.base_layer(*args, **kwargs)
        _refuse_offloaded(self.get_base_layer(), self.parameter_name)
        with SWAPPING:
            if rows is not None and rows.mixed:
                return self._by_rows(args, kwargs)
            with self._in_place(self._stack(offset)):
                return self.base_layer(*args, **kwargs)

    def _stack(self, offset: Tensor) -> Tensor:
        """Return the rescaled stack, in the dtype of the base's: with its gradient in training, else kept."""
        weight = self.base_weight
        if transforming():
            self.svf_chosen = "narrow"
            return self._rescale(weight, offset)
        if torch.is_grad_enabled() and (offset.requires_grad or weight.requires_grad):
            self.svf_chosen = "narrow"
            Q = self._basis()
            return _Rescale.apply(weight, Q, offset.view(*Q.shape[:-2], Q.shape[-1]))
        # FSDP shows a whole stack only while the module runs, so none is kept.
        if not self._planned_for or weight is not self._planned_for[0] or capturing(weight):
            self.svf_chosen = "narrow"
            with torch.no_grad():
                return self._rescale(weight.data, offset.detach())
        self.svf_chosen = "merged"
        key, kept = key_of(weight, weight.dtype), self.svf_merged
        if kept is None or kept.key != key or not kept.holds(offset):
            with torch.inference_mode(False), torch.no_grad():
                offset = offset.detach().clone()
                stack = self._rescale(weight.data, offset)
                kept = self.svf_merged = Merged(stack, weight.data, None, self.side, self._basis(), offset, key)
        return kept.weight

    @contextmanager
    def _in_place(self, stack: Tensor) -> Iterator[None]:
        """Put a stack in the parameter's place while the base module runs."""
        parameters = self.get_base_layer()._parameters
        before = parameters[self.parameter_name]
        parameters[self.parameter_name] = stack  # type: ignore[assignment]  # in place: their order stays
        try:
            yield
        finally:
            parameters[self.parameter_name] = before

    def _by_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """
        Run the bare module once for each z of a mixed batch, on the tokens of its rows; the outermost wrapper does it.

        Experts get all tokens of the batch, row by row, with their routing: tensors of one length.
        """
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        lengths = {len(tensor) for tensor in tensors}
        if len(tensors) < 2 or len(lengths) > 1:
            raise ValueError(
                f"{type(self.get_base_layer()).__name__} does not take its tokens and their routing side by side, so "
                "the rows of a batch cannot have z-vectors of their own here: give the batch one mixture, or leave "
                f"{self.parameter_name!r} out of `target_parameters`."
            )
        (tokens,) = lengths
        chain = {wrapper: rows for wrapper in self._nested() if (rows := wrapper.rows) is not None and rows.mixed}
        spread = [rows.of(torch.Size([tokens]), self.execution) for rows in chain.values()]  # each (tokens, k)
        unique, which = torch.cat(spread, dim=1).unique(dim=0, return_inverse=True)
        output: Tensor | None = None
        for index, row in enumerate(unique):
            chosen = (which == index).nonzero().squeeze(1)
            part_args = [value[chosen] if isinstance(value, Tensor) else value for value in args]
            part_kwargs = {key: value[chosen] if isinstance(value, Tensor) else value for key, value in kwargs.items()}
            with ExitStack() as stack:
                for wrapper, offset in zip(chain, row.split([part.shape[1] for part in spread]), strict=True):
                    if offset.any():
                        stack.enter_context(wrapper._in_place(wrapper._rescale(wrapper.base_weight, offset)))
                part = self.get_base_layer()(*part_args, **part_kwargs)
            output = part.new_empty(tokens, *part.shape[1:]) if output is None else output
            output[chosen] = part
        assert output is not None
        return output

    def _nested(self) -> "Iterator[ParamWrapper]":
        """This wrapper and those inside it."""
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Merge this wrapper and those inside it, and give the bare module back."""
        for wrapper in self._nested():
            super(ParamWrapper, wrapper).unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.get_base_layer()

    def extra_repr(self) -> str:
        return f"parameter={self.parameter_name!r}, matrices={self.matrices}, directions={self.directions}"


def _refuse_offloaded(base: nn.Module, name: str) -> None:
    """Raise `ValueError` if the module's hook would put the base stack back in the place of the rescaled one."""
    if offloaded(base):
        raise ValueError(
            f"{name!r} of {type(base).__name__} is offloaded by accelerate, so SVF cannot rescale its stacked "
            "weights: give the model more room (`max_memory`), or adapt `target_modules`, which may be offloaded."
        )


class _Rescale(torch.autograd.Function):
    """[`rescale`] of a stack whose backward keeps nothing of its size: dz_i = (W q_i) . (G q_i)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, Q: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight, Q, offset)
        return rescale(weight, Q, offset)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        refuse_second_derivative()
        weight, Q, offset = ctx.saved_tensors
        dW = rescale(G, Q, offset) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return dW, None, None
        parts = []
        matrices = weight.flatten(0, -3) if weight.dim() == 3 else weight.unsqueeze(0)
        for W, g, q in zip(matrices, G.view_as(matrices), Q.view(len(matrices), *Q.shape[-2:]), strict=True):
            q = q.to(W.dtype)  # (r, k)
            if W.shape[0] >= W.shape[1]:
                a, b = W @ q, g @ q  # (out, k)
            else:
                a, b = W.mT @ q, g.mT @ q  # (in, k)
            parts.append(torch.linalg.vecdot(a.to(offset.dtype), b.to(offset.dtype), dim=0))
        return dW, None, torch.stack(parts).view_as(offset)
