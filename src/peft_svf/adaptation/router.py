# SPDX-License-Identifier: Apache-2.0
"""
Routing keys of a library's experts -> a classifier of pooled hidden states, fitted in milliseconds.

Each kind is a normal density around the mean of its states, with one covariance for all: the experts' keys, and for
`"other"` everyday requests in several languages (`other.json`). Left-out states set its confidence and the distance
from which nothing is near.

If no expert moves weights below the keys' block, all mixtures agree up to there, and the prefill's own states choose
each row's mixture. Otherwise the first pass is a forward of its own that ends at the block. Both read the same tokens,
so they decide the same.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .. import files
from ..evaluation import context_of
from ..experts.expert import OTHER, Mixture
from ..experts.key import ANCHOR, RoutingKey, blocks_of, hidden_of, key_ids, pooled, read_states
from ..experts.library import ExpertLibrary
from ..rows import Reader, chat_text, tokenizer_of
from ..tuner.cache import cache_dir
from .probe import temperature

logger = logging.getLogger(__name__)
EVERYDAY = Path(__file__).with_name("other.json")
SHRINKAGE = 0.5  # The covariance moves by this share to its mean variance; chosen in benchmarks/routing.py.
FOLDS = 5
PLACE = "<request>"  # stands for the request in a chat template
# Arguments of `generate` under which the first forward isn't the prompt's, or not the prompt's alone.
ELSEWHERE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "custom_generate", "inputs_embeds")
FAR = 5.0  # times the squared distance that 95 % of left-out states keep from their kind; nearer are unseen sources


@dataclass(eq=False)
class Router:
    """Scores of kinds for pooled states."""

    names: tuple[str, ...]  # the experts, named mixtures, and "other" last
    means: Tensor  # (kinds, d)
    directions: Tensor  # (m, d), orthonormal
    variances: Tensor  # (m,), of the shared covariance along them
    rest: float  # its variance in every other direction
    temperature: float = 1.0  # divides the log-densities
    far: float = torch.inf  # squared Mahalanobis distance from all experts beyond which a state is "other"
    how: tuple[int, str] = (0, "both")  # block and pooling of the states, as in `RoutingKey`

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


_KEPT: WeakKeyDictionary[ExpertLibrary, tuple[dict[str, RoutingKey], Router]] = WeakKeyDictionary()


def keys_of(library: ExpertLibrary) -> dict[str, RoutingKey]:
    """
    Return the routing keys of all experts and of named mixtures.

    Raises a `ValueError` if an expert has none, or a key reads otherwise than the others do.
    """
    keys: dict[str, RoutingKey] = {}
    for name, key in library.keys.items():
        if key is None:
            raise ValueError(
                f"The expert {name!r} has no routing key: make one of prompts that it is for, with peft-svf key or "
                "make_key, or choose another first pass."
            )
        keys[name] = key
        first = next(iter(keys))
        if key.how != keys[first].how:
            raise ValueError(
                f"The routing keys of {first!r} and {name!r} can't be compared, because they read {keys[first].how} "
                f"and {key.how} (blocks, pooling): make that of {name!r} again with peft-svf key --block "
                f"{keys[first].block} --pooling {keys[first].pooling}, or the other as this one is."
            )
    return keys


def router_of(library: ExpertLibrary, tokenizer: Reader) -> Router:
    """Return the router of a library, fitted again after experts have come or gone; a `ValueError` for odd keys."""
    keys = keys_of(library)
    if (kept := _KEPT.get(library)) is not None and kept[0] == keys:  # Keys compare by identity.
        return kept[1]
    name, *_ = keys
    block, pooling = keys[name].how
    with library.activate(Mixture()) as model:
        try:
            (anchor,) = read_states(model, key_ids(tokenizer, [ANCHOR]), block, pooling)
            for name in keys:
                keys[name].check(anchor)
        except ValueError as error:
            raise ValueError(f"Expert {name!r}: {error}") from error
        other = _everyday(model, tokenizer, anchor, block, pooling)
    router = Router.fit({**{name: key.states for name, key in keys.items()}, OTHER: other})
    router.how = block, pooling
    _KEPT[library] = keys, router
    return router


def _everyday(model: PeftModel, tokenizer: Reader, anchor: Tensor, block: int, pooling: str) -> Tensor:
    """Read the everyday requests, `(n, width)`; kept on disk beside the bases, by base, block and pooling."""
    content = EVERYDAY.read_bytes()
    name = hashlib.sha256(content + f"{block} {pooling}".encode() + anchor.numpy().tobytes()).hexdigest()
    path = cache_dir() / "routing" / f"{name}.safetensors"
    ids = [row[: context_of(model)] for row in key_ids(tokenizer, json.loads(content))]
    with suppress(OSError, ValueError, SafetensorError, KeyError):
        states = load(files.read_bytes(path))["states"]
        if states.shape == (len(ids), len(anchor)) and states.isfinite().all():
            return states
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
    scores = torch.full((len(ids), len(router.names)), -torch.inf)
    scores[:, -1] = 0.0
    if rows := [i for i, row in enumerate(ids) if row]:
        with library.activate(Mixture()) as model:
            states = read_states(model, [ids[i] for i in rows], *router.how, batch_size)
        scores[rows] = router.scores(states)
    return scores


def first_block(library: ExpertLibrary) -> int:
    """Return the lowest block that an expert of a library moves; -1 if one moves weights outside of the blocks."""
    base = library.model.get_base_model()
    stack = blocks_of(base)
    prefix = next(name for name, module in base.named_modules() if module is stack)
    moved = {name for expert in library.names for name in library.expert(expert).sizes}
    inside = [name.removeprefix(f"{prefix}.").split(".")[0] for name in moved if name.startswith(f"{prefix}.")]
    return min(map(int, inside)) if len(inside) == len(moved) else -1


def can_decide(library: ExpertLibrary, reader: Reader, settings: Mapping[str, Any]) -> bool:
    """Whether the prefill of a `generate` with these settings can choose the mixtures."""
    block, _ = router_of(library, reader).how
    compiled = any(getattr(module, "_compiled_call_impl", None) for module in library.model.modules())
    return not compiled and not any(settings.get(name) for name in ELSEWHERE) and first_block(library) >= block


@contextmanager
def deciding(
    library: ExpertLibrary, reader: Reader, mask: Tensor, decide: Callable[[Tensor], list[Mixture]], merge: int
) -> Iterator[PeftModel]:
    """
    Let the next forward, the prefill of a batch, choose a mixture for each row and go on with it.

    `mask (rows, tokens)` is that of the prompts, which the prefill may repeat side by side; `decide` turns their
    scores into mixtures.
    """
    router = router_of(library, reader)
    block, pooling = router.how
    with ExitStack() as stack:
        model = stack.enter_context(library.activate(Mixture()))

        def choose(module: nn.Module, args: Any, kwargs: Any) -> None:
            handle.remove()
            hidden = hidden_of(args, kwargs)
            copies = len(hidden) // len(mask)  # beams and returned sequences stand side by side
            mixtures = decide(router.scores(pooled(hidden[::copies], mask, pooling)))
            stack.enter_context(library.activate(mixtures, merge))

        handle = blocks_of(library.model)[block].register_forward_pre_hook(choose, with_kwargs=True)
        stack.callback(handle.remove)
        yield model


def key_rows(reader: Reader, ids: Tensor, mask: Tensor) -> tuple[list[list[int]], bool]:
    """
    Return the tokens of each row as keys read them, and whether these are the rows themselves.

    A row that doesn't end as the chat template does was tokenised without it; it is read as a user's turn.
    """
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    tokenizer = tokenizer_of(reader)
    writer = reader if getattr(reader, "chat_template", None) else tokenizer
    if not writer.chat_template:
        return rows, True
    turn = [{"role": "user", "content": PLACE}]
    end = chat_text(writer, turn, add_generation_prompt=True).rpartition(PLACE)[2]
    plain = [i for i, row in enumerate(rows) if not tokenizer.decode(row[-64:]).endswith(end)]
    for i in plain:
        (rows[i],) = key_ids(reader, [tokenizer.decode(rows[i], skip_special_tokens=True)])
    return rows, not plain


def mask_of(model: PeftModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention mask that `generate` would take, `(rows, tokens)`."""
    if mask is not None:
        return mask
    config: Any = model.generation_config
    pad, eos = config.pad_token_id, config.eos_token_id
    stops = eos if isinstance(eos, list) else [eos]
    return torch.ones_like(ids) if pad is None or pad in stops else ids.ne(pad).long()
