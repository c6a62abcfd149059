# SPDX-License-Identifier: Apache-2.0
"""
Features `(prompts, d)`, such as hidden states -> scores of the experts' names: the cheapest first pass.

Fitting needs scikit-learn (extra `probe`) and takes seconds; scoring needs torch alone.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from .. import files

FILES = ("probe.safetensors", "probe.json")
FOLDS = 5  # The cross-validation sets a probe's confidence.
TEMPERATURES = np.logspace(-2, 2, 401).tolist()  # in steps of 2 %


@dataclass(frozen=True, eq=False)
class Probe:
    """
    One linear score per kind: `features @ weight.T + bias`.

    Args:
        labels (`tuple[str, ...]`): The kinds: names of experts and perhaps `"other"`.
        weight (`torch.Tensor` of shape `(kinds, d)`): float32.
        bias (`torch.Tensor` of shape `(kinds,)`): float32.
        provenance (`dict`): Base model, number of prompts, what the features are: JSON values.
    """

    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, finite = len({*self.labels}), self.weight.isfinite().all() and self.bias.isfinite().all()
        shapes = self.weight.dim() == 2 and len(self.weight) == n and self.bias.shape == (len(self.labels),) == (n,)
        if not (shapes and finite):
            raise ValueError(
                f"A probe has finite weights (labels, d) and biases (labels,); got {tuple(self.weight.shape)} and "
                f"{tuple(self.bias.shape)} for the labels {list(self.labels)}."
            )

    def scores(self, features: Tensor) -> Tensor:
        """Score features `(prompts, d)` as logits `(prompts, kinds)`; a `ValueError` for another `d`."""
        if features.shape[-1] != (d := self.weight.shape[1]):
            raise ValueError(
                f"The probe was fitted to {d} features, but this model has {features.shape[-1]}: refit it."
            )
        return features.float().cpu() @ self.weight.T + self.bias

    @classmethod
    def fit(cls, features: Tensor, kinds: Sequence[str], **provenance: Any) -> "Probe":
        """
        Fit a logistic regression with a ridge of `|w|² / 2` on standardised features; deterministic.

        `features (prompts, d)` are hidden states or log-likelihoods; there are two or more kinds, each with two or
        more prompts. The scores are divided by the [`temperature`] of held-out scores, each prompt's from the fit
        without its fold: on the prompts of the fit, a probe is far too sure.
        """
        labels = tuple(sorted(set(kinds)))
        counts = {label: list(kinds).count(label) for label in labels}
        if len(labels) < 2 or min(counts.values()) < 2:
            raise ValueError(f"A probe is fitted to two or more kinds with two or more prompts each; got {counts}.")
        with files.extra("probe", "Fitting needs scikit-learn"):
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import StratifiedKFold, cross_val_predict
            from sklearn.preprocessing import StandardScaler
        scaler = StandardScaler()
        # All folds share one scale, since a fold of two prompts has no spread to standardise by.
        X = scaler.fit_transform(features.detach().double().cpu().numpy())  # (prompts, d)
        y = np.array([labels.index(kind) for kind in kinds])
        model = LogisticRegression(C=1.0, tol=1e-6, max_iter=10_000)
        folds = StratifiedKFold(min(FOLDS, *counts.values()))  # Every kind is in every fit.
        left_out = cross_val_predict(model, X, y, cv=folds, method="decision_function").reshape(len(X), -1)
        model.fit(X, y)
        # For two kinds scikit-learn has one row, whose sigmoid is the probability of the second.
        rows = np.eye(len(labels)) if len(labels) > 2 else np.array([[-0.5], [0.5]])
        beta = 1 / temperature(torch.from_numpy(left_out @ rows.T), torch.from_numpy(y))
        weight = beta * rows @ model.coef_ / scaler.scale_  # The standardisation becomes part of the weights.
        bias = beta * rows @ model.intercept_ - weight @ scaler.mean_
        facts = {"prompts": len(kinds), **provenance}
        return cls(labels, torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), facts)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `probe.safetensors` and `probe.json`, both or neither."""
        tensors = safetensors.torch.save({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()})
        facts = json.dumps({"labels": list(self.labels), "provenance": self.provenance}, indent=1)
        files.write_together(folder, dict(zip(FILES, (tensors, facts), strict=True)))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Probe":
        """Read a probe that [`Probe.save`] wrote; a `ValueError` if a file is damaged."""
        files.settle(folder)
        tensors, facts = (Path(folder) / name for name in FILES)
        try:
            content, (loaded, _) = files.read_json(facts), files.read_tensors(tensors)
            return cls(tuple(content["labels"]), loaded["weight"], loaded["bias"], content["provenance"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The probe in {folder} is damaged: {error!r}. Fit it again.") from error


def temperature(scores: Tensor, labels: Tensor) -> float:
    """
    Find the T of [`TEMPERATURES`] that makes the labels likeliest under `softmax(scores / T)`.

    `scores` are logits `(N, kinds)`, `-inf` for a kind that isn't a choice; `labels (N,)` are the indices of the right
    ones. A share of `1 / (N + 2)` of each label is spread over all kinds (the rule of succession, as in Platt
    scaling): a few prompts that are all scored right don't make it certain.
    """
    scores = scores.detach().double().cpu()
    possible = scores > -torch.inf
    finite = torch.where(possible, scores, 0.0)
    right = finite.gather(1, labels.cpu()[:, None]).squeeze(1)  # (N,)
    spread = 1 / (len(scores) + 2)
    target = (1 - spread) * right + spread * finite.sum(-1) / possible.sum(-1)

    def loss(t: float) -> float:
        return float((scores / t).logsumexp(-1).mean() - target.mean() / t)

    return min(TEMPERATURES, key=loss)
