# SPDX-License-Identifier: Apache-2.0
"""
Routing keys of a library's experts -> a classifier of pooled hidden states, fitted in milliseconds.

Each kind is a normal density around the mean of its states, with one covariance for all: the experts' keys, and for
`"other"` everyday requests in several languages (`other.json`). Left-out states set its confidence and the distance
from which nothing is near. Nothing here runs a second pass.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .. import files
from ..evaluation import context_of
from ..experts.expert import OTHER, Mixture
from ..experts.key import ANCHOR, RoutingKey, key_ids, read_states
from ..experts.library import ExpertLibrary
from ..rows import Reader
from ..tuner.cache import cache_dir
from .probe import temperature

logger = logging.getLogger(__name__)
EVERYDAY = Path(__file__).with_name("other.json")
SHRINKAGE = 0.2  # of the covariance towards its mean variance
FOLDS = 5
FAR = 5.0  # times the squared distance that 95 % of left-out states keep from their kind; nearer are unseen sources


@dataclass(eq=False)
class Router:
    """
    Scores of kinds for pooled states.

    Args:
        names (`tuple[str, ...]`): The kinds: experts, and `"other"` last.
        means (`torch.Tensor` of shape `(kinds, d)`): Their centres.
        directions (`torch.Tensor` of shape `(m, d)`): Orthonormal; the shared covariance is `rest` across them.
        variances (`torch.Tensor` of shape `(m,)`): Along them.
        rest (`float`): The variance in every other direction.
        temperature (`float`): Divides the log-densities.
        far (`float`): Squared Mahalanobis distance from all experts beyond which a state is `"other"`.
    """

    names: tuple[str, ...]
    means: Tensor
    directions: Tensor
    variances: Tensor
    rest: float
    temperature: float = 1.0
    far: float = torch.inf

    @classmethod
    def fit(cls, states: Mapping[str, Tensor]) -> "Router":
        """
        Fit to the states `(n, d)` of each kind, `"other"` last; deterministic.

        Each fifth of the states is left out of a fit in turn; their scores set the temperature and the distance.
        """
        names, parts = tuple(states), [part.float() for part in states.values()]
        X, y = torch.cat(parts), torch.tensor([kind for kind, part in enumerate(parts) for _ in part])
        draws = torch.Generator().manual_seed(0)
        fold = torch.cat([torch.randperm(len(part), generator=draws) % FOLDS for part in parts])
        fold[torch.bincount(y)[y] == 1] = FOLDS  # The only state of a kind is in every fit.
        distances = torch.full((len(X), len(parts)), torch.nan)
        for out in (fold == number for number in range(FOLDS)):
            distances[out] = cls._densities(names, X[~out], y[~out]).distances(X[out])
        known = fold < FOLDS
        distances, kinds = distances[known], y[known]
        own = distances.gather(1, kinds[:, None]).squeeze(1)
        scale = float(own.mean().sqrt())  # keeps the search for a temperature within its bounds, whatever the width
        router = cls._densities(names, X, y)
        router.temperature = scale * temperature(-distances / (2 * scale), kinds)
        router.far = FAR * float(own.quantile(0.95))
        return router

    @classmethod
    def _densities(cls, names: tuple[str, ...], X: Tensor, y: Tensor) -> "Router":
        means = torch.stack([X[y == kind].mean(0) for kind in range(len(names))])
        _, s, directions = torch.linalg.svd(X - means[y], full_matrices=False)
        variances = s.square() / len(X)
        rest = max(SHRINKAGE * float(variances.sum()) / X.shape[1], 1e-12)
        return cls(names, means, directions, (1 - SHRINKAGE) * variances + rest, rest)

    def distances(self, states: Tensor) -> Tensor:
        """Compute squared Mahalanobis distances of states `(n, d)` to the means, `(n, kinds)`."""
        apart = states.float()[:, None] - self.means  # (n, kinds, d)
        along = (apart @ self.directions.T).square()
        across = (apart.square().sum(-1) - along.sum(-1)).clamp(min=0)
        return (along / self.variances).sum(-1) + across / self.rest

    def scores(self, states: Tensor) -> Tensor:
        """Score states `(n, d)` as logits `(n, kinds)`; what is far from every expert can only be `"other"`."""
        distances = self.distances(states)
        scores = -distances / (2 * self.temperature)
        scores[(distances[:, :-1] > self.far).all(-1), :-1] = -torch.inf
        return scores


@dataclass(eq=False)
class _Kept:
    """What is known of a library between decisions."""

    keys: dict[str, RoutingKey]
    anchor: Tensor
    router: Router | None = None


_KEPT: WeakKeyDictionary[ExpertLibrary, _Kept] = WeakKeyDictionary()


def keys_of(library: ExpertLibrary) -> dict[str, RoutingKey]:
    """
    Return the routing key of each expert, by name.

    Raises:
        `ValueError`: if an expert has none, or one reads otherwise than the others do.
    """
    keys = {name: library.expert(name).key for name in library.names}
    if missing := [name for name, key in keys.items() if key is None]:
        raise ValueError(
            f"The expert {missing[0]!r} has no routing key: make one of prompts that it is for, with "
            "peft-svf key or make_key, or choose another first pass."
        )
    whole = {name: key for name, key in keys.items() if key is not None}
    first, *others = whole
    if odd := [name for name in others if whole[name].how != whole[first].how]:
        raise ValueError(
            f"The routing keys of {first!r} and {odd[0]!r} can't be compared, because they read {whole[first].how} "
            f"and {whole[odd[0]].how} (blocks, pooling): make one of them again with peft-svf key."
        )
    return whole


def checked_keys(library: ExpertLibrary, tokenizer: Reader) -> dict[str, RoutingKey]:
    """Return [`keys_of`] a library, after comparing new ones with how its base model reads; a `ValueError` by name."""
    keys, kept = keys_of(library), _KEPT.get(library)
    if kept is not None and kept.keys.keys() == keys.keys() and all(kept.keys[name] is keys[name] for name in keys):
        return keys
    block, pooling = next(iter(keys.values())).how
    for name, key in keys.items():
        try:
            with library.activate(Mixture()) as model:
                (anchor,) = read_states(model, key_ids(tokenizer, [ANCHOR]), block, pooling)
                key.check(anchor)
        except ValueError as error:
            raise ValueError(f"Expert {name!r}: {error}") from error
    _KEPT[library] = _Kept(keys, anchor)
    return keys


def router_of(library: ExpertLibrary, tokenizer: Reader) -> Router:
    """Return the router of a library; fitted again after experts have come or gone."""
    keys = checked_keys(library, tokenizer)
    kept = _KEPT[library]
    if kept.router is None:
        other = _everyday(library, tokenizer, kept.anchor, *next(iter(keys.values())).how)
        kept.router = Router.fit({**{name: key.states for name, key in keys.items()}, OTHER: other})
    return kept.router


def _everyday(library: ExpertLibrary, tokenizer: Reader, anchor: Tensor, block: int, pooling: str) -> Tensor:
    """Read the everyday requests, `(n, width)`; kept on disk beside the bases, by base, block and pooling."""
    content = EVERYDAY.read_bytes()
    name = hashlib.sha256(content + f"{block} {pooling}".encode() + anchor.numpy().tobytes()).hexdigest()
    path = cache_dir() / "routing" / f"{name}.safetensors"
    ids = [row[: context_of(library.model)] for row in key_ids(tokenizer, json.loads(content))]
    with suppress(OSError, ValueError, SafetensorError, KeyError):
        states = load(files.read_bytes(path))["states"]
        if states.shape == (len(ids), len(anchor)) and states.isfinite().all():
            return states
    with library.activate(Mixture()) as model:
        states = read_states(model, ids, block, pooling).half()
    try:
        files.write(path, save({"states": states}))
    except OSError as error:
        logger.info(f"{path} cannot be written ({error}); everyday requests are read again next time.")
    return states


def key_scores(
    library: ExpertLibrary, tokenizer: Reader, ids: Sequence[Sequence[int]], batch_size: int = 16
) -> Tensor:
    """Read token ids by the first blocks and score the kinds: logits `(prompts, kinds)`; `"other"` without tokens."""
    router = router_of(library, tokenizer)
    block, pooling = next(iter(checked_keys(library, tokenizer).values())).how
    scores = torch.full((len(ids), len(router.names)), -torch.inf)
    scores[:, -1] = 0.0
    if rows := [i for i, row in enumerate(ids) if row]:
        with library.activate(Mixture()) as model:
            states = read_states(model, [ids[i] for i in rows], block, pooling, batch_size)
        scores[rows] = router.scores(states)
    return scores
