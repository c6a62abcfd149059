# SPDX-License-Identifier: Apache-2.0
"""
Tokens -> what a causal model keeps of them, each prompt read once, and what all begin with once for all.

Choices, samples and generations continue from there. Takes a model with a cache of keys and values, and prompts as
tokens. Nothing here knows a row, a task or a reward.
"""

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# What `forward` and `generate` call a cache: since transformers 5.24; before; before, in models without attention.
CACHES = ("cache", "past_key_values", "cache_params")
# Arguments of the forward that begins a generation, if nothing but text is read.
TEXT_ONLY = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHES}


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model inside the wrappers of distributed training and PEFT."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Turn dropout and gradients off while the context is open; afterwards each module has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def cache_name(model: Any) -> str:
    """Return which of [`CACHES`] a model takes and returns, by its forward's signature: code from the Hub may lag."""
    takes = inspect.signature(unwrapped(model).forward).parameters
    return next((name for name in CACHES if name in takes), CACHES[0])


def _read(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Read prompts `(N, P)`, behind a cache if there is one: logits `(N, 1, V)` of their last tokens, and a cache."""
    # An index, because the slice that `1` means isn't contiguous, and the head would be copied once per row.
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    output = read_on(model, ids, mask, cache, logits_to_keep=last)
    cache = getattr(output, cache_name(model))
    if cache is None or not cache.get_seq_length():  # a checkpointed layer
        raise ValueError("Scoring choices shares the prompt's cache: turn gradient checkpointing off.")
    return output.logits, cache


def read_on(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any, **kwargs: Any) -> Any:
    """Call the model on the last `ids.shape[1]` places of `mask`, with the positions that padding calls for."""
    if "position_ids" in inspect.signature(unwrapped(model).forward).parameters:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, use_cache=True, **{cache_name(model): cache}, **kwargs)


def context_of(model: Any) -> int | None:
    """Return the number of tokens that a model can see; `None` if its config sets no limit."""
    return getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)


class Reading(NamedTuple):
    """What a model keeps of prompts that it has read."""

    mask: Tensor  # (N, P), 0 at padding, which is on the left
    logits: Tensor  # (N, vocabulary), of the token after each prompt
    cache: Any  # keys and values of the P places


def read_prompts(model: PreTrainedModel, prompts: Sequence[list[int]], pad: int = 0, members: int = 1) -> Reading:
    """
    Read each prompt once, and what all of them begin with once for all. Gradients flow.

    Prompts have one token or more; `members` are as in [`peft_svf.evaluation.choice_logps`].

    Returns:
        [`Reading`] of `members * len(prompts)` prompts, ordered by member.
    """
    device, width, cache = next(model.parameters()).device, max(map(len, prompts)), None
    window = getattr(unwrapped(model).config.get_text_config(), "sliding_window", None) or width
    shared = common_prefix(prompts) if width <= window else 0  # a window's places are gone once it has slid on
    if shared:
        begin = torch.tensor([prompts[0][:shared]] * members, device=device)  # (M, shared)
        _, cache = _read(model, begin, torch.ones_like(begin))
        cache.batch_repeat_interleave(len(prompts))
    rest = [[pad] * (width - len(prompt)) + prompt[shared:] for prompt in prompts]
    seen = [[1] * shared + [0] * (width - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts]
    mask = torch.tensor(seen * members, device=device)  # (M * N, P), the padding behind what is shared
    logits, cache = _read(model, torch.tensor(rest * members, device=device), mask, cache)
    if shared and not mask.all():
        mask, order = mask.sort(dim=-1, stable=True)  # the padding comes first
        for layer in cache.layers:
            places = order[:, None, :, None]
            layer.keys = layer.keys.take_along_dim(places, dim=2)
            layer.values = layer.values.take_along_dim(places, dim=2)
    return Reading(mask, logits[:, -1], cache)


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Count the tokens that all prompts begin with; one token of each prompt is left out."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return min(len(list(same)), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0


def repeated(cache: Any, rows: Tensor) -> Any:
    """Return rows of a key/value cache as another cache."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.batch_select_indices(rows)
    return cache


class Prompts(NamedTuple):
    """A batch of prompts without repetitions."""

    distinct: list[list[int]]  # tokens of each distinct prompt
    places: Tensor  # (B,): which of them each row of the batch is


def distinct_rows(rows: Sequence[Sequence[int]]) -> Prompts | None:
    """Find the distinct prompts among the tokens of rows; `None` if none is repeated and all begin differently."""
    numbers: dict[tuple[int, ...], int] = {}
    places = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    distinct = [list(row) for row in numbers]
    if not all(distinct) or (len(distinct) == len(rows) and not common_prefix(distinct)):
        return None
    return Prompts(distinct, torch.tensor(places))


def distinct_prompts(ids: Tensor, mask: Tensor) -> Prompts | None:
    """Find the distinct prompts as [`distinct_rows`], among tokens `(B, P)` whose mask is 0 at padding."""
    prompts = distinct_rows([row[seen].tolist() for row, seen in zip(ids, mask.bool(), strict=True)])
    return prompts and prompts._replace(places=prompts.places.to(ids.device))


def can_share(model: Any) -> bool:
    """Check that a model caches keys and values, whose rows can be repeated, unlike the state of Mamba."""
    config = unwrapped(model).config
    return not config.is_encoder_decoder and _attends(DynamicCache(config=config)) and cache_name(model) in CACHES[:2]


def checkpoints_activations(model: Any) -> bool:
    """Check whether gradient checkpointing is on, which drops the cache."""
    inner = unwrapped(model)
    return inner.training and any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())


def _attends(cache: Any) -> bool:
    """Check that all layers of a cache hold keys and values."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


@contextmanager
def shared_prompts(model: Any, members: int = 1) -> Iterator[None]:
    """
    Let `model.generate` read each distinct prompt of its batch once while the context is open.

    The first forward of a generation takes its cache and logits from the shared reading; later ones are unchanged.
    Batches that have more than text, and models without such a cache, are read as usual. `members` are copies of the
    rows in the batch, each under another adapter.
    """
    inner, name = unwrapped(model), cache_name(model)
    if not can_share(model):
        yield
        return
    forward, patched = inner.forward, "forward" in vars(inner)  # TRL patches it too

    @functools.wraps(forward)
    def reading_once(*args: Any, **kwargs: Any) -> Any:
        ids, mask, cache = kwargs.get("input_ids"), kwargs.get("attention_mask"), kwargs.get(name)
        begins = cache is not None and not cache.get_seq_length() and _attends(cache)
        if args or ids is None or not begins or checkpoints_activations(inner):
            return forward(*args, **kwargs)
        mask = torch.ones_like(ids) if mask is None else mask  # `generate` drops one that hides nothing
        if ids.shape != mask.shape:
            return forward(**kwargs)
        extra = any(kwargs[key] is not None and kwargs[key] is not False for key in kwargs.keys() - TEXT_ONLY)
        first = ids.shape[0] // members
        prompts = None if extra else distinct_prompts(ids[:first], mask[:first])
        if prompts is None or max(map(len, prompts.distinct)) < ids.shape[1]:  # padded to a multiple
            return forward(**kwargs)
        inner.forward = forward
        try:
            read = read_prompts(inner, prompts.distinct, members=members)
        finally:
            inner.forward = reading_once
        offsets = torch.arange(members, device=ids.device)[:, None] * len(prompts.distinct)
        rows = (offsets + prompts.places).flatten()
        assert cache is not None
        cache.layers = repeated(read.cache, rows).layers
        return CausalLMOutputWithPast(logits=read.logits[rows][:, None], past_key_values=cache)

    inner.forward = reading_once
    try:
        yield
    finally:
        if patched:
            inner.forward = forward
        else:
            del inner.forward


def completion_logps(
    model: Any,
    prompts: Prompts,
    completions: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    read: Reading | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Score completions `(B, C)` behind prompts that are read once. Gradients flow through both.

    The model has TRL's fused head, which never holds the logits of all places; `temperature` is the head's. `mask` is
    0 at padding, on the right. `read` is the reading of the distinct prompts, if they have been read already.

    Returns:
        Log-probabilities and entropies, both `torch.Tensor` of shape `(B, C)`, 0 at padding.
    """
    read = read_prompts(model, prompts.distinct) if read is None else read
    places = prompts.places
    first = (read.logits.float() / temperature).log_softmax(-1)  # (distinct, vocabulary)
    logps = first[places, completions[:, 0]][:, None]
    entropies = -(first.exp() * first).sum(-1)[places][:, None]
    if completions.shape[1] > 1:
        seen = torch.cat([read.mask[places], mask[:, :-1]], dim=1)
        labels = completions[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        cache = repeated(read.cache, places)
        rest = read_on(model, completions[:, :-1], seen, cache, shift_labels=labels, fused_lm_head=True)
        logps = torch.cat([logps, rest.log_probs], dim=1)
        entropies = torch.cat([entropies, rest.entropy], dim=1)
    return logps * mask, entropies * mask
