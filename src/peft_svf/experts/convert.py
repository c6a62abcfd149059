# SPDX-License-Identifier: Apache-2.0
"""
What belongs to another project, method or base model -> experts of this base.

Checkpoints of the original project become equal weights. Of a LoRA or a tuned model only the part that z-vectors can
express is left, and the expert's provenance has its share. An expert of another base model of the same shape keeps its
numbers, and whether it helps there only an evaluation can tell. Nothing from a file is run.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..files import extra
from ..tuner.basis import Basis, exact
from ..tuner.fingerprint import Fingerprint
from .base import BaseWeights
from .expert import Expert

LISTED = "learnable_params_module_list."  # keys of `policy_params.pt`: numbers in the order of the model's weights
MODES = ("ordered", "shuffled", "aligned")
SMALLEST = 1e-12  # Squared singular values below this share of the largest have no direction to rescale.


def import_reference(path: str | os.PathLike[str], model: PreTrainedModel, name: str, description: str = "") -> Expert:
    """
    Read an expert of the original project (self-adaptive-llms): `learnable_params.pt` or `policy_params.pt`.

    It holds a logit per singular value: `z = m * sum(S) / sum(S * m)` with `m = sigmoid(logits)`, rounded to bfloat16
    as the original does. The rescaling keeps each weight's nuclear norm.

    The file doesn't name its base, `model`. Raises `ValueError` if it holds more than tensors, or doesn't fit that.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # damaged, or more than tensors, which unpickling would run: each byte has its own error
        content = None
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


def transfer_expert(
    expert: Expert,
    source: nn.Module,
    target: nn.Module,
    mode: Literal["ordered", "shuffled", "aligned"] = "ordered",
    *,
    seed: int = 0,
    name: str | None = None,
) -> Expert:
    """
    Give the z-vectors of an expert to another base model of the same shape (arXiv 2501.06252, section 4.4).

    Args:
        expert ([`Expert`]):
            Both models must have its linear weights, under the same names and with as many singular values.
        source, target (`torch.nn.Module`):
            The model that the expert belongs to and the one that gets it. Both stay as they are.
        mode (`str`):
            `"ordered"`: the i-th number goes to the i-th largest singular value, as in the paper. `"shuffled"`: the
            same numbers in random order, its control. `"aligned"`: each number goes to the direction that points most
            nearly the same way, matched one to one so that the sum of `abs(Q_source.T @ Q_target)` on the narrow side
            of the weight is largest (needs scipy).
        seed (`int`): Seed of the shuffling.
        name (`str`, *optional*): Name of the result; default the expert's.

    Returns:
        [`Expert`] of the target, with its fingerprint, and in `provenance` the source, the mode, the seed, and for
        aligned per module the mean of `abs(cos)` over the matched directions that the expert moves.

    Raises:
        `ValueError`: for another mode, a module that is missing or stacked, a foreign source, or sizes that differ.
    """
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}: choose {', '.join(map(repr, MODES))}.")
    ours, theirs = BaseWeights(source), BaseWeights(target)
    ours.check(expert)
    theirs.check_names(expert)
    draws = torch.Generator().manual_seed(seed)
    offsets, cosines, prints, directions = dict[str, Tensor](), dict[str, float](), {}, {}
    for module, offset in sorted(expert.offsets.items()):
        old, (new, fingerprint) = ours.basis(module)[0], theirs.basis(module)
        if len(old.S) != len(new.S) or (mode == "aligned" and old.side != new.side):
            raise ValueError(
                f"{module} has {len(old.S)} singular values on side {old.side!r} in the source and {len(new.S)} on "
                f"side {new.side!r} in the target: choose a target of the same shape."
            )
        if mode == "aligned":
            offset, cosines[module] = _aligned(offset, old, new)
        elif mode == "shuffled":
            offset = offset[torch.randperm(len(offset), generator=draws)]
        offsets[module], prints[module], directions[module] = offset, fingerprint.to_json(), len(new.S)
    rank = max(map(len, offsets.values()))  # A config has one rank, so shorter offsets get zeros.
    sizes = {module: min(rank, r) for module, r in directions.items()}
    padded = {module: F.pad(offset, (0, sizes[module] - len(offset))) for module, offset in offsets.items()}
    details: dict[str, dict[str, Any]] = {
        "shuffled": {"seed": seed},
        "aligned": {"matching": "assignment", "mean_abs_cosine": cosines},
    }
    provenance = {"transfer": mode, "expert": expert.name, "from": expert.base_model, "to": theirs.name}
    provenance |= details.get(mode, {}) | ({"before": expert.provenance} if expert.provenance else {})
    base = {"base_model_name_or_path": theirs.name, "revision": None, "fingerprint": prints}
    config = expert.config | base | {"rank": rank if sizes != directions else None}
    return Expert(name or expert.name, padded, config, provenance)


def match(similarity: Tensor) -> Tensor:
    """
    Match rows to columns one to one, so that the sum of their similarities is largest.

    `similarity (r, r)` -> the column of each row, `(r,)`.
    """
    with extra("transfer", "mode='aligned' needs scipy"):
        from scipy.optimize import linear_sum_assignment
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])


def _aligned(offset: Tensor, source: Basis, target: Basis) -> tuple[Tensor, float]:
    """Move each entry of an offset `(k,)` to the direction that matches; also the mean `abs(cos)` of these pairs."""
    cosine = (source.Q.double().mT @ target.Q.double()).abs()  # (r, r)
    columns = match(cosine)[: len(offset)]
    moved = torch.zeros(len(target.S))
    moved[columns] = offset
    used = max([len(offset), *(moved.nonzero().flatten() + 1).tolist()])  # no longer than it has to be
    return moved[:used], round(float(cosine[torch.arange(len(offset)), columns].mean()), 6)


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
