# SPDX-License-Identifier: Apache-2.0
"""
Routing keys of a library's experts -> a classifier of pooled hidden states, fitted in milliseconds.

Logistic regression on standardised states scores the kinds: the experts, and `"other"` with everyday requests in
several languages (`other.json`). What is far from all experts is `"other"` as well.

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
from ..experts.key import ANCHOR, PLACE, RoutingKey, blocks_of, hidden_of, key_ids, last_turns, pooled, read_states
from ..experts.library import ExpertLibrary
from ..rows import Reader, chat_text, tokenizer_of
from ..tuner.cache import cache_dir

logger = logging.getLogger(__name__)
EVERYDAY = Path(__file__).with_name("other.json")
CONSTANT = 3.0  # A free intercept learns how many states a kind has, none doesn't keep far text off small keys.
# Arguments of `generate` under which the first forward isn't the prompt's, or not the prompt's alone.
ELSEWHERE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "custom_generate", "inputs_embeds")
FAR = 3.0  # times the squared distance that 95 % of left-out states keep from their kind; nearer are unseen sources


@dataclass(eq=False)
class Router:
    """Scores of kinds for pooled states."""

    names: tuple[str, ...]  # the experts, named mixtures, and "other" last
    centre: Tensor  # (d,), of all states
    scale: Tensor  # (d,), standard deviations around the means of the kinds
    means: Tensor  # (kinds, d), of states on this scale
    weights: Tensor  # (kinds, d + 1), of logistic regression on this scale; the last is that of a constant
    far: float  # squared distance from all experts, on this scale, beyond which a state is "other"
    how: tuple[int, str] = (0, "both")  # block and pooling of the states, as in `RoutingKey`

    @classmethod
    def fit(cls, states: Mapping[str, Tensor]) -> "Router":
        """Fit to the states `(n, d)` of each kind, `"other"` last; deterministic."""
        parts = [part.float() for part in states.values()]
        X, y = torch.cat(parts), torch.tensor([kind for kind, part in enumerate(parts) for _ in part])
        count, centre, means = torch.bincount(y), X.mean(0), torch.stack([part.mean(0) for part in parts])
        scale = (X - means[y]).square().mean(0).sqrt()
        scale = scale.clamp(min=max(0.01 * float(scale.mean()), 1e-6))  # rounding moves what is constant here
        router = cls(tuple(states), centre, scale, (means - centre) / scale, torch.zeros(len(parts), 0), torch.inf)
        apart = router.distances(X).gather(1, y[:, None]).squeeze(1)
        several = count[y] > 1
        left_out = apart * (count / (count - 1)).square()[y]  # The mean without a state is so much farther from it.
        router.far = FAR * float(left_out[several].quantile(0.95))
        router.weights = _logistic(router._features(X), y, len(parts))
        return router

    def _features(self, states: Tensor) -> Tensor:
        """Standardise states `(n, d)` and append the constant, `(n, d + 1)`."""
        return nn.functional.pad((states.float() - self.centre) / self.scale, (0, 1), value=CONSTANT)

    def distances(self, states: Tensor) -> Tensor:
        """Compute squared Mahalanobis distances, with a diagonal covariance, of states `(n, d)`: `(n, kinds)`."""
        return (self._features(states)[:, None, :-1] - self.means).square().sum(-1)

    def scores(self, states: Tensor) -> Tensor:
        """Score states `(n, d)` as logits `(n, kinds)`; what is far from every expert can only be `"other"`."""
        scores = self._features(states) @ self.weights.T
        scores[(self.distances(states)[:, :-1] > self.far).all(-1), :-1] = -torch.inf
        return scores


def _logistic(X: Tensor, y: Tensor, kinds: int) -> Tensor:
    """Return the weights `(kinds, d)` of multinomial logistic regression with an L2 penalty of 1/2, by L-BFGS."""
    W, right = X.new_zeros(kinds, X.shape[1]), nn.functional.one_hot(y, kinds)
    solver = torch.optim.LBFGS([W], max_iter=100, tolerance_grad=1e-3, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        logps = (X @ W.T).log_softmax(-1)
        W.grad = (logps.exp() - right).T @ X + W
        return W.square().sum() / 2 - (logps * right).sum()

    solver.step(loss)  # type: ignore[arg-type]  # takes tensors as well
    return W


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
    ids = [row[: context_of(model)] for row in key_ids(tokenizer, json.loads(EVERYDAY.read_bytes()))]
    name = hashlib.sha256(f"{ids} {block} {pooling}".encode() + anchor.numpy().tobytes()).hexdigest()
    path = cache_dir() / "routing" / f"{name}.safetensors"
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

    A row that doesn't end as the chat template does was tokenised without it; it is read as a user's turn. Of several
    turns the last one is read.
    """
    whole = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    rows, tokenizer = last_turns(reader, whole), tokenizer_of(reader)
    writer = reader if getattr(reader, "chat_template", None) else tokenizer
    if not writer.chat_template:
        return rows, True
    turn = [{"role": "user", "content": PLACE}]
    end = chat_text(writer, turn, add_generation_prompt=True).rpartition(PLACE)[2]
    plain = [i for i, row in enumerate(rows) if not tokenizer.decode(row[-64:]).endswith(end)]
    for i in plain:
        (rows[i],) = key_ids(reader, [tokenizer.decode(rows[i], skip_special_tokens=True)])
    return rows, rows == whole


def mask_of(model: PeftModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention mask that `generate` would take, `(rows, tokens)`."""
    if mask is not None:
        return mask
    config: Any = model.generation_config
    pad, eos = config.pad_token_id, config.eos_token_id
    stops = eos if isinstance(eos, list) else [eos]
    return torch.ones_like(ids) if pad is None or pad in stops else ids.ne(pad).long()
