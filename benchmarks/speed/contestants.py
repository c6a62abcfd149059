# SPDX-License-Identifier: Apache-2.0
"""
Name of a contestant -> the same model or layer adapted that way; all of them share the base weights.

A plan that this version of the package does not have raises [`~race.NotAvailable`], which a race reports.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from dense_form import DenseForm
from peft import IA3Config, LoraConfig, PeftConfig, TinyLoraConfig, get_peft_model
from race import NotAvailable
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peft_svf.tuner.weights
from peft_svf import SVFConfig
from peft_svf.tuner.basis import Basis, side_of
from peft_svf.tuner.fingerprint import Fingerprint
from peft_svf.tuner.layer import SVFLayer

ROOT = Path(__file__).resolve().parents[2]
BASE = "base"
LORA, LORA_BASE_DTYPE = "LoRA r=16, as shipped", "LoRA r=16, base dtype"
TINYLORA, IA3 = "TinyLoRA", "IA3"
DENSE, LEAN = "dense form", "dense form, lean"
AUTO, MERGED, NARROW, FACTORED, TRUNCATED = "SVF auto", "SVF merged", "SVF narrow", "SVF factored", "SVF k=64"
DEFAULT = "SVF as shipped"  # every field at its default: whatever basis dtype and plan that is
SVF = (AUTO, MERGED, NARROW, FACTORED, TRUNCATED, DEFAULT)
MLP = ["gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, list[str]] = {"mlp": MLP, "all": ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]}
SPREAD = 0.05  # of the random offsets: no contestant is timed at z = 1


def smollm2(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """SmolLM2-135M-Instruct, see examples/smollm2.py."""
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import load_smollm2

    return load_smollm2(dtype)[0].eval().requires_grad_(False)


def tiny(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random Llama of a few thousand numbers, for trying the benchmark itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def wide(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """One random decoder layer of the width of a 1.1B Llama, where bytes outweigh Python."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=2048, intermediate_size=5632, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=4, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def trunk(model: PreTrainedModel, layers: int) -> nn.Module:
    """The first decoder layers of a model, without its head."""
    cut = sharing(model.get_decoder())
    cut.layers = cut.layers[:layers]
    cut.config = copy.deepcopy(cut.config)
    cut.config.num_hidden_layers = layers
    return cut


def sharing(model: nn.Module) -> Any:
    """A copy whose parameters are objects of their own over the same memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo.update({id(buffer): buffer for buffer in model.buffers()})
    return copy.deepcopy(model, memo)


def plan_of(name: str) -> str:
    """The execution plan of an SVF contestant."""
    return "auto" if name in (TRUNCATED, DEFAULT) else name.removeprefix("SVF ")


def svf_config(name: str, **fields: Any) -> SVFConfig:
    """
    The config of an SVF contestant. The basis is in the dtype of the models here, bfloat16, save for `DEFAULT`.

    Raises:
        `NotAvailable`: if this version of the package has no such plan.
    """
    if name == DEFAULT:
        return SVFConfig(**fields)
    plan = plan_of(name)
    rank = {"rank": 64} if name == TRUNCATED else {}
    fields = {"basis_dtype": "bfloat16", **rank, **fields}
    if "plan" in SVFConfig.__dataclass_fields__:
        return SVFConfig(plan=plan, **fields)
    if plan not in ("narrow", "auto") or name == AUTO:
        raise NotAvailable(f"this version of peft-svf has no plan={plan!r}")
    return SVFConfig(**fields)


def config_of(name: str, targets: list[str]) -> tuple[PeftConfig, dict[str, Any]]:
    """The PEFT config of a contestant, and the keyword arguments of `get_peft_model` that go with it."""
    if name in (LORA, LORA_BASE_DTYPE):
        kwargs = {"autocast_adapter_dtype": False} if name == LORA_BASE_DTYPE else {}
        return LoraConfig(target_modules=targets, r=16, lora_alpha=32), kwargs
    if name == TINYLORA:
        return TinyLoraConfig(target_modules=targets), {}
    if name == IA3:
        inside = [target for target in targets if target == "down_proj"]
        return IA3Config(target_modules=targets, feedforward_modules=inside), {}
    return svf_config(name, target_modules=targets), {}


def adapted(base: nn.Module, name: str, targets: list[str], seed: int = 0) -> Any:
    """A copy of a model with the adapter of a contestant, at random trained values, sharing the base weights."""
    torch.manual_seed(seed)
    config, kwargs = config_of(name, targets)
    model = get_peft_model(sharing(base), config, **kwargs)
    scatter(model)
    return model


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Move every z-vector away from 1."""
    for module in model.modules():
        if isinstance(module, SVFLayer):
            for offset in module.svf_offset.values():
                offset.weight.normal_(std=SPREAD)


def training_step(
    base: nn.Module, name: str, targets: list[str], embedded: list[Tensor], cotangent: Tensor
) -> Callable[[], None]:
    """
    One optimizer step of a contestant: forwards and backwards of the micro-batches, what a new z asks for, Adam.

    The gradient runs down to the embeddings in all contestants, as it does through all but the first layer of a model.

    Args:
        base (`nn.Module`): A model that takes `inputs_embeds`.
        name (`str`): The contestant.
        targets (`list[str]`): Endings of the names of the modules it adapts.
        embedded (`list[torch.Tensor]` of shape `(batch, length, hidden)`): Micro-batches.
        cotangent (`torch.Tensor`, same shape): Gradient of the loss by the last hidden state.
    """
    dense = None
    if name in (DENSE, LEAN):
        model = sharing(base)
        dense = DenseForm(model, targets, lean=name == LEAN)
        trained = dense.parameters()
    else:
        model = sharing(base) if name == BASE else adapted(base, name, targets)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if name in SVF and len(embedded) > 1 and hasattr(model.base_model, "set_plan"):
            model.base_model.set_plan(plan_of(name), len(embedded))
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        if dense is not None:
            dense.refresh()
        for batch in embedded:
            hidden = batch.detach().requires_grad_()
            model(inputs_embeds=hidden, use_cache=False)[0].backward(cotangent)
        if dense is not None:
            dense.project()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return insisting(step, model, name)


class OneLayer(nn.Module):
    """A model of a single linear layer, so that PEFT adapts it."""

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc


def random_linear(out_features: int, in_features: int, dtype: torch.dtype, device: str = "cpu") -> nn.Linear:
    """A frozen layer with random weights and no bias."""
    fc = nn.Linear(in_features, out_features, bias=False, device="meta").to_empty(device=device).to(dtype)
    with torch.no_grad():
        fc.weight.normal_(std=in_features**-0.5)
    return fc.requires_grad_(False)


def reflection(r: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """
    An orthogonal matrix `(r, r)` without zeros that costs nothing to make: I - 2 v v^T.

    It stands in for the basis of a large random weight: the time of a product does not depend on its directions.
    """
    v = torch.randn(r, device=device)
    v /= v.norm()
    return (torch.eye(r, device=device) - 2 * torch.outer(v, v)).to(dtype)


def adapted_layer(fc: nn.Linear, name: str, Q: Tensor, S: Tensor) -> nn.Module:
    """
    One layer as a contestant has it inside a model.

    Args:
        fc (`nn.Linear`): The base layer; its weight is shared.
        name (`str`): The contestant.
        Q (`torch.Tensor` of shape `(r, r)`), S (`torch.Tensor` of shape `(r,)`): Its basis and singular values.
    """
    torch.manual_seed(0)
    fc = sharing(fc)
    if name == BASE:
        return fc
    if name in (DENSE, LEAN):
        raise NotAvailable("the dense form is a matter of whole steps")
    if name not in SVF:
        config, kwargs = config_of(name, ["fc"])
        return get_peft_model(OneLayer(fc), config, **kwargs).base_model.model.fc
    config = svf_config(name, target_modules=["fc"], basis_dtype=str(Q.dtype).removeprefix("torch."))
    found = Basis(side_of(*fc.weight.shape), Q, S), Fingerprint("0" * 64, torch.zeros(32))
    with patch.object(peft_svf.tuner.weights, "fetch", lambda names, *_, **__: dict.fromkeys(names, found)):
        layer = get_peft_model(OneLayer(fc), config).base_model.model.fc
    scatter(layer)
    return layer


def insisting(run: Callable[[], Any], model: nn.Module, name: str) -> Callable[[], Any]:
    """
    `run`, which in its first call sees that a plan that was asked for by name is the one that runs.

    Layers whose values a plan does not suit take the narrow one; that all of them do would be another contestant.
    """
    if name not in (MERGED, NARROW, FACTORED):
        return run
    layers = [module for module in model.modules() if isinstance(module, SVFLayer) and hasattr(module, "svf_chosen")]
    unseen = bool(layers)

    def checked() -> Any:
        nonlocal unseen
        result = run()
        if unseen and plan_of(name) not in (chosen := {str(layer.svf_chosen) for layer in layers}):
            raise NotAvailable(f"asked for the plan {plan_of(name)!r}, the layers ran {', '.join(sorted(chosen))}")
        unseen = False
        return result

    return checked


def layer_step(layer: nn.Module, name: str, x: Tensor, g: Tensor) -> Callable[[], None]:
    """Forward and backward of one layer, to its input and its adapter."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        layer(x).backward(g)

    return insisting(run, layer, name)
