# SPDX-License-Identifier: Apache-2.0
"""
What others have trained -> experts: checkpoints of the original project, LoRAs, fully tuned models.

The original's z-vectors become equal weights. Of a LoRA or a tuned model only the part that z-vectors can express is
left, and the expert's provenance has its share. Nothing from a file is run.
"""

import os
import pickle
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..tuner.basis import exact
from ..tuner.fingerprint import Fingerprint
from .base import BaseWeights
from .expert import Expert

LISTED = "learnable_params_module_list."  # keys of `policy_params.pt`: numbers in the order of the model's weights
SMALLEST = 1e-12  # Squared singular values below this share of the largest have no direction to rescale.


def import_reference(path: str | os.PathLike[str], model: PreTrainedModel, name: str, description: str = "") -> Expert:
    """
    Read an expert of the original project (self-adaptive-llms): `learnable_params.pt` or `policy_params.pt`.

    It holds a logit per singular value: `z = m * sum(S) / sum(S * m)` with `m = sigmoid(logits)`, rounded to bfloat16
    as the original does. The rescaling keeps each weight's nuclear norm.

    The file doesn't name its base, `model`. Raises `ValueError` if it holds more than tensors, or doesn't fit that.
    """
    content: Any = None
    with suppress(pickle.UnpicklingError):  # of more than tensors, which would be run
        content = torch.load(path, map_location="cpu", weights_only=True)
    weights, offsets, prints = BaseWeights(model), dict[str, Tensor](), dict[str, Fingerprint]()
    logits = _named(content, model) if isinstance(content, dict) else {}
    if not logits or not all(
        isinstance(p, Tensor) and module in weights and p.shape == (min(weights[module].shape),)
        for module, p in logits.items()
    ):
        raise ValueError(
            f"{path} isn't a learnable_params.pt or policy_params.pt of {weights.name}: it should hold tensors alone, "
            "a logit for each singular value of each MLP weight."
        )
    for module, logit in sorted(logits.items()):
        basis, prints[module] = weights.basis(module)
        S, mask = basis.S.double(), torch.sigmoid(logit.detach()).to(torch.bfloat16).double()
        offsets[module] = (mask * (S.sum() / (S * mask).sum()) - 1).float()
    return Expert(name, offsets, _config(weights, description, prints), {"imported": "self-adaptive-llms"})


def nearest_expert(
    tuned: PreTrainedModel | PeftModel, name: str, base: PreTrainedModel | None = None, description: str = ""
) -> Expert:
    """
    Find the expert whose weights are nearest to those of a tuned model (least squares, per singular value).

    A change `D` of a weight becomes `z_i = 1 + u_i.T @ D @ v_i / S_i`; what turns singular directions is lost.

    Args:
        tuned (`PreTrainedModel` or `PeftModel`):
            A fully tuned model, or the base with one active adapter that adds to linear weights, such as a LoRA.
        name, description (`str`): Of the expert.
        base (`PreTrainedModel`, *optional*): The base of a fully tuned model.

    Returns:
        [`Expert`] with `provenance["explained"]`: by kind of weight and in `"all"` the share of the squared change.

    Raises:
        `ValueError`: if nothing has changed in linear weights, or the models don't fit.
    """
    weights = BaseWeights(tuned if base is None else base)
    offsets, prints = dict[str, Tensor](), dict[str, Fingerprint]()
    change, kept = defaultdict[str, float](float), defaultdict[str, float](float)
    for module, delta in _added(tuned) if base is None else _differences(tuned, base, change):
        basis, prints[module] = weights.basis(module)
        W, D, Q = exact(weights.stored(module)).cpu(), exact(delta).cpu(), basis.Q
        W, D = (W @ Q, D @ Q) if basis.side == "in" else (W.T @ Q, D.T @ Q)  # columns S_i u_i or S_i v_i
        squares = W.square().sum(0)  # (r,)
        offsets[module] = torch.where(squares > SMALLEST * squares.max(), (W * D).sum(0) / squares, 0.0)
        for kind in (module.rpartition(".")[2], "all"):
            change[kind] += float(delta.double().square().sum())
            kept[kind] += float((W * offsets[module]).double().square().sum())
    if not offsets:
        raise ValueError("No linear weight has changed: is it the same model?")
    explained = {kind: round(kept[kind] / change[kind], 4) for kind in kept}
    provenance = {"imported": "nearest z", "explained": explained}
    return Expert(name, offsets, _config(weights, description, prints), provenance)


def _named(content: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return logits by module; a list of them has the order of the model's MLP weights."""
    if not all(key.startswith(LISTED) for key in content):
        return {key.removesuffix(".weight"): value for key, value in content.items()}
    names = [name.removesuffix(".weight") for name in model.state_dict() if "mlp" in name]
    return dict(zip(names, content.values(), strict=True)) if len(names) == len(content) else {}


def _added(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Visit what an adapter adds to the weights of linear modules, `(out, in)`."""
    (adapter,) = model.active_adapters
    config = model.peft_config[adapter]
    if config.modules_to_save or getattr(config, "bias", "none") != "none" or getattr(config, "use_dora", False):
        raise ValueError(f"Adapter {adapter!r} does more than add to linear weights: merge it, and import the model.")
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            delta = layer.get_delta_weight(adapter).detach()  # type: ignore[operator]
            yield name, delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta


def _differences(tuned: nn.Module, base: nn.Module, change: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    """Visit the differences of linear weights, `(out, in)`; those of other parameters are added to `change`."""
    before, modules = dict(base.named_parameters()), dict(base.named_modules())
    for name, parameter in tuned.named_parameters():
        if name not in before or before[name].shape != parameter.shape:
            raise ValueError(f"The base has no {name} {tuple(parameter.shape)} as the tuned model has: load its base.")
        delta, owner = parameter.detach().float() - before[name].detach().float(), modules[name.rpartition(".")[0]]
        if isinstance(owner, (nn.Linear, Conv1D)) and name.endswith(".weight") and delta.any():
            yield name.removesuffix(".weight"), delta.T if isinstance(owner, Conv1D) else delta
        else:
            change["all"] += float(delta.double().square().sum())


def _config(weights: BaseWeights, description: str, prints: dict[str, Fingerprint]) -> dict[str, Any]:
    return {
        "peft_type": "SVF",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": weights.name,
        "description": description,
        "fingerprint": {module: entry.to_json() for module, entry in prints.items()},
        "target_modules": sorted(prints),
    }
