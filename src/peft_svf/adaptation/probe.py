# SPDX-License-Identifier: Apache-2.0
"""
A linear probe: hidden states of a prompt -> scores of the experts' names. The cheapest first pass, fitted in seconds.

Goes in: features `(prompts, d)` and the kind of each. Nothing here loads a model or knows what the features are.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

METHODS = ("centroid", "logistic")
FILES = ("probe.safetensors", "probe.json")


@dataclass(frozen=True)
class Probe:
    """
    One linear score per kind: `features @ weight.T + bias`.

    Args:
        labels (`tuple[str, ...]`): The kinds, names of experts and perhaps `"other"`.
        weight (`torch.Tensor` of shape `(kinds, d)`): float32.
        bias (`torch.Tensor` of shape `(kinds,)`): float32.
        provenance (`dict`): Base model, method, number of prompts: JSON values.

    Raises:
        `ValueError`: if the shapes do not belong together, a label stands twice or an entry is not finite.
    """

    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.labels)
        if len(set(self.labels)) != n or self.weight.dim() != 2 or len(self.weight) != n or self.bias.shape != (n,):
            raise ValueError(
                f"A probe has one row of weights and one bias for each of its labels {list(self.labels)}; got shapes "
                f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}."
            )
        if not (torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all()):
            raise ValueError("The weights of a probe must be finite.")

    def scores(self, features: Tensor) -> Tensor:
        """
        Score features `(prompts, d)`: `(prompts, kinds)`, whose softmax are probabilities.

        Raises:
            `ValueError`: if `d` is another.
        """
        if features.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"The probe was fitted on hidden states of {self.weight.shape[1]} numbers, this model's have "
                f"{features.shape[-1]}: fit it on this model."
            )
        return features.float().cpu() @ self.weight.T + self.bias

    @classmethod
    def fit(
        cls,
        features: Tensor,
        kinds: Sequence[str],
        *,
        method: Literal["centroid", "logistic"] = "logistic",
        **provenance: Any,
    ) -> "Probe":
        """
        Fit a probe to features of known kind; deterministic.

        Both methods see features with mean 0 and spread 1 in each direction. `"centroid"` scores by the squared
        distance to the mean of each kind, `"logistic"` is a logistic regression with a ridge of `|w|² / 2`. Their
        confidence is set by [`temperature`] of the scores that each prompt has when it is left out (in five folds for
        the regression): on their own prompts both are far too sure.

        Args:
            features (`torch.Tensor` of shape `(prompts, d)`):
                Hidden states.
            kinds (`Sequence[str]`):
                The kind of each.
            method (`str`):
                `"centroid"` or `"logistic"`.
            provenance:
                JSON values to keep.

        Raises:
            `ValueError`: for fewer than two kinds or fewer than two prompts of one, or another method.
        """
        labels = tuple(sorted(set(kinds)))
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r} for a probe: choose {' or '.join(map(repr, METHODS))}.")
        if len(features) != len(kinds) or len(labels) < 2 or min(map(list(kinds).count, labels)) < 2:
            counts = {label: list(kinds).count(label) for label in labels}
            raise ValueError(
                f"A probe is fitted to two or more kinds with two or more prompts each; got {counts} for "
                f"{len(features)} prompts."
            )
        X = features.detach().double().cpu()  # (prompts, d)
        y = torch.tensor([labels.index(kind) for kind in kinds])
        mean, std = X.mean(0), X.std(0).clamp(min=1e-6)
        X = (X - mean) / std
        solve: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = (
            _centroids if method == "centroid" else _logistic
        )
        weight, bias = solve(X, y, len(labels))
        beta = 1 / temperature(_left_out(solve, X, y, len(labels)), y)
        weight = beta * weight / std  # the standardisation becomes part of the weights
        bias = beta * bias - weight @ mean
        kept = {"method": method, "prompts": len(kinds), **provenance}
        return cls(labels, weight.float(), bias.float(), kept)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `probe.safetensors` and `probe.json`; files that are there are replaced by whole ones."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors, facts = (target / f".{name}.writing" for name in FILES)
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, tensors)
        facts.write_text(json.dumps({"labels": list(self.labels), "provenance": self.provenance}, indent=1))
        for written, name in zip((tensors, facts), FILES, strict=True):
            written.replace(target / name)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Probe":
        """
        Read a probe that [`Probe.save`] wrote.

        Raises:
            `FileNotFoundError`: if a file is missing.
            `ValueError`: if one is damaged.
        """
        tensors, facts = (Path(folder) / name for name in FILES)
        for path in (tensors, facts):
            if not path.is_file():
                raise FileNotFoundError(f"{str(folder)!r} holds no probe: {path.name} is missing.")
        try:
            content, loaded = json.loads(facts.read_text(encoding="utf-8")), load_file(tensors)
            return cls(tuple(content["labels"]), loaded["weight"], loaded["bias"], content["provenance"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The probe in {folder} is damaged: {error!r}. Fit it again.") from error


def temperature(scores: Tensor, labels: Tensor) -> float:
    """
    Find the T that makes the labels likeliest under `softmax(scores / T)`.

    A share of `1 / (N + 2)` of each label is spread over all kinds (the rule of succession, as in Platt scaling), so
    that a few prompts which are all scored right do not make it certain.

    Args:
        scores (`torch.Tensor` of shape `(N, kinds)`):
            Log-likelihoods or other scores; `-inf` for a kind that is none of the choices.
        labels (`torch.Tensor` of shape `(N,)`):
            Place of the right kind.

    Returns:
        `float` between 0.01 and 100: the likelihood is concave in `1 / T`, so bisection on its slope finds the best.
    """
    scores = scores.detach().double().cpu()
    possible = scores > -torch.inf
    finite = torch.where(possible, scores, 0.0)
    right = finite.gather(1, labels.cpu()[:, None]).squeeze(1)  # (N,)
    spread = 1 / (len(scores) + 2)
    wanted = (1 - spread) * right + spread * finite.sum(-1) / possible.sum(-1)

    def slope(beta: float) -> float:
        return float((wanted - ((beta * scores).softmax(-1) * finite).sum(-1)).mean())

    low, high = -2.0, 2.0  # log10 of 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(10**middle) > 0 else (low, middle)
    return float(10 ** -((low + high) / 2))


def _centroids(X: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`-|x - c|² / 2d` up to what all kinds share: `(x · c - |c|² / 2) / d`."""
    centres = torch.stack([X[y == k].mean(0) for k in range(count)])  # (kinds, d)
    return centres / X.shape[1], -(centres**2).sum(-1) / (2 * X.shape[1])


def _logistic(X: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(count, X.shape[1], dtype=X.dtype, requires_grad=True)
    bias = torch.zeros(count, dtype=X.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(X @ weight.T + bias, y, reduction="sum") + (weight**2).sum() / 2
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def _left_out(
    solve: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]], X: Tensor, y: Tensor, count: int
) -> Tensor:
    """The scores `(prompts, kinds)` of each prompt by a probe that has not seen it; every kind is in every fit."""
    folds = torch.zeros_like(y)
    for k in range(count):
        places = (y == k).nonzero().squeeze(1)
        folds[places] = torch.arange(len(places)) % min(5, len(places))
    scores = torch.zeros(len(X), count, dtype=X.dtype)
    for fold in folds.unique():
        out = folds == fold
        weight, bias = solve(X[~out], y[~out], count)
        scores[out] = X[out] @ weight.T + bias
    return scores
