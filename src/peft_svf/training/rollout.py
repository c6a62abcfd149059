# SPDX-License-Identifier: Apache-2.0
"""
Prompts that several samples share -> one reading of each, when samples are drawn and when they are differentiated.

Several completions of one prompt need its keys and values once, and a beginning that all prompts share, such as
few-shot examples, is read once for all. Goes in: a causal model with a cache of keys and values, and padded prompts.
Nothing here knows what a reward is.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..evaluation import CACHES, Reading, cache_name, common_prefix, read_on, read_prompts, repeated, unwrapped

# Arguments of the forward that begins a generation, if nothing but text is read.
TEXT_ONLY = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHES}


class Prompts(NamedTuple):
    """
    A batch of prompts without repetitions.

    Args:
        distinct (`list[list[int]]`): Tokens of each distinct prompt.
        places (`torch.Tensor` of shape `(B,)`): Which of them each row of the batch is.
    """

    distinct: list[list[int]]
    places: Tensor


def distinct_rows(rows: Sequence[Sequence[int]]) -> Prompts | None:
    """
    Find the distinct prompts among the tokens of rows.

    Returns:
        [`Prompts`], or `None` if sharing would save nothing: no prompt is repeated and all begin differently.
    """
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
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


@contextmanager
def shared_prompts(model: Any, members: int = 1) -> Iterator[None]:
    """
    Let `model.generate` read each distinct prompt of its batch once while the context is open.

    The first forward of a generation takes its cache and logits from the shared reading; later ones are unchanged.
    Batches that have more than text, and models without such a cache, are read as usual.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model.
        members (`int`):
            Copies of the rows in the batch, each under another adapter, as in [`choice_logps`].
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
    Score completions behind prompts that are read once. Gradients flow through both.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model with TRL's fused head, which never holds the logits of all places.
        prompts ([`Prompts`]):
            Of the rows.
        completions, mask (`torch.Tensor` of shape `(B, C)`):
            Tokens, and 0 at padding on the right.
        temperature (`float`):
            Of the fused head.
        read ([`Reading`], *optional*):
            Of the distinct prompts, if they have been read already.

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


__all__ = [
    "Prompts",
    "can_share",
    "checkpoints_activations",
    "completion_logps",
    "distinct_prompts",
    "distinct_rows",
    "shared_prompts",
]
