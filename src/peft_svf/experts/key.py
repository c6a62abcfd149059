# SPDX-License-Identifier: Apache-2.0
"""
Prompts of one kind -> a `RoutingKey`: what the base model makes of them in its first blocks.

The keys of several experts show whose kind of request a prompt is. A key holds pooled hidden states, no text, and is
stored beside its expert as `routing.safetensors`. Nothing here knows how a library decides.
"""

import inspect
import os
import random
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save
from torch import Tensor, nn

from .. import files
from ..evaluation.reading import evaluating
from ..rows import Prompt, Reader, chat_text, prompt_ids, tokenizer_of

KEY_NAME = "routing.safetensors"
POOLINGS = ("both", "mean", "last")
SHARE = 3  # a key reads a third of the blocks; a sixth decides worse (docs/results.md)
LIMIT = 64  # prompts of a key
BYTES = 32 << 20  # limit of a file; 64 states of width 16,384 take 2 MB
LARGEST = 65504.0  # the largest float16
PLACE = "<request>"  # stands for a message in a chat template
ANCHOR = "The quick brown fox jumps over the lazy dog."
APART = 0.5  # Rounding and quantisation move the anchor by less than this share of the spread of a key's states.


@dataclass(frozen=True, eq=False)
class RoutingKey:
    """
    Pooled hidden states of prompts that an expert is for, and of a fixed text, the anchor.

    Args:
        states (`torch.Tensor` of shape `(n, width)`): float16, one row for each prompt.
        anchor (`torch.Tensor` of shape `(width,)`): float16; what the base makes of a text that all keys share.
        block (`int`): The block whose input was pooled, which is the number of blocks that ran.
        pooling (`str`): `"mean"` over the tokens of a prompt, its `"last"` token, or `"both"`, one after the other.

    Raises:
        `ValueError`: for shapes that don't match, no states, entries that aren't finite, or an unknown pooling.
    """

    states: Tensor
    anchor: Tensor
    block: int
    pooling: str = "both"

    def __post_init__(self) -> None:
        shapes = tuple(self.states.shape), tuple(self.anchor.shape)
        finite = all(bool((part.abs() <= LARGEST).all()) for part in (self.states, self.anchor))  # NaN isn't
        whole = self.states.dim() == 2 and self.states.numel() > 0 and shapes[1] == shapes[0][1:]
        if not (whole and finite and self.block >= 1 and self.pooling in POOLINGS):
            raise ValueError(
                f"a routing key has finite states (n, width), an anchor (width,), a block from 1 and a pooling of "
                f"{POOLINGS}; got {shapes}, {'finite' if finite else 'not finite'}, and {self.how}."
            )
        for name in ("states", "anchor"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu().half().contiguous())

    @property
    def how(self) -> tuple[int, str]:
        """The block and the pooling: only states that agree in both can be compared."""
        return self.block, self.pooling

    def to_bytes(self) -> bytes:
        """Write the key as a safetensors file."""
        metadata = {"format": "pt", "block": str(self.block), "pooling": self.pooling}
        return save({"states": self.states, "anchor": self.anchor}, metadata)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "RoutingKey | None":
        """Read the key of an expert's folder, `None` if it has none. Raises `ValueError` if the file is damaged."""
        try:
            tensors, facts = files.read_tensors(Path(folder) / KEY_NAME, BYTES)
        except FileNotFoundError:
            return None
        states, anchor = (tensors.get(name, torch.zeros(0)) for name in ("states", "anchor"))
        return cls(states, anchor, int(facts.get("block", 0)), facts.get("pooling", ""))

    def check(self, anchor: Tensor) -> None:
        """Raise `ValueError` if a model, in which the anchor has this state, reads otherwise than the key's base."""
        states, apart = self.states.float(), float("inf")
        spread = (states - states.mean(0)).square().sum(-1).mean().sqrt()
        if alike := anchor.shape == self.anchor.shape:
            apart = float((self.anchor.float() - anchor.float().cpu()).norm())
        if not alike or (len(states) > 1 and not apart <= APART * spread):
            raise ValueError(
                f"its routing key, of width {states.shape[1]}, comes from another base model or chat template: a "
                f"fixed text lies {apart:.3g} from where it was, and the key's own prompts {spread:.3g} from their "
                "mean. Make it again with make_key or peft-svf key."
            )


def make_key(
    model: nn.Module,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    *,
    block: int | None = None,
    pooling: str = "both",
    limit: int = LIMIT,
    seed: int = 0,
    batch_size: int = 16,
) -> RoutingKey:
    """
    Read some prompts of one kind by the first blocks of the base model.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The base model; adapters are off while it reads.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer or processor; images are skipped.
        prompts (`Sequence[str | list[dict]]`):
            What the expert is for, such as its training prompts. A text is read as a user's turn if there is a chat
            template, by the library too.
        block (`int`, *optional*): Blocks to run; default a third of them, at least 1.
        pooling (`str`): As in [`RoutingKey`].
        limit (`int`), seed (`int`): Of more prompts, so many are drawn.
        batch_size (`int`): Prompts per forward.

    Raises:
        `ValueError`: without prompts, for a block that the model doesn't have, or a model without a stack of blocks.
    """
    ids = [row for row in key_ids(tokenizer, prompts) if row]
    if not ids:
        raise ValueError("A routing key needs prompts: pass some that its expert is for.")
    drawn = random.Random(seed).sample(ids, min(limit, len(ids)))
    block = max(1, len(blocks_of(model)) // SHARE) if block is None else block
    with ExitStack() as stack:
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        states = read_states(model, [*drawn, *key_ids(tokenizer, [ANCHOR])], block, pooling, batch_size)
    return RoutingKey(states[:-1], states[-1], block, pooling)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Find the stack of blocks that reads text. Raises `ValueError` if there is none, as in an encoder-decoder."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "config", None)
    if config is not None and not getattr(config, "is_encoder_decoder", False):
        depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
        for module in base.get_decoder().modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth > 0:
                return module
    raise ValueError(
        f"A routing key reads the first blocks of a decoder: {type(base).__name__} has no stack of blocks for text."
    )


def key_ids(tokenizer: Reader, prompts: Sequence[Prompt]) -> list[list[int]]:
    """
    Tokenise prompts as a key reads them: without images, and texts as a user's turn if there is a template.

    A chat is read without what lies between its first and its last user's turn, as [`last_turns`] does.
    """
    has_template = tokenizer_of(tokenizer).chat_template or getattr(tokenizer, "chat_template", None)
    chats: list[Prompt] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            chats.append([{"role": "user", "content": prompt}] if has_template and prompt.strip() else prompt.strip())
            continue
        contents = [message.get("content") for message in prompt]
        texts = [[p for p in c if p.get("type") == "text"] if isinstance(c, list) else c for c in contents]
        chats.append([{**message, "content": text} for message, text in zip(prompt, texts, strict=True)])
    return last_turns(tokenizer, prompt_ids(tokenizer, chats))


def last_turns(reader: Reader, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """
    Return token ids without what lies between what precedes the first user's turn, such as a system prompt, and the
    last one: another request doesn't decide about this one. Rows with a single turn stay as they are.
    """
    tokenizer = tokenizer_of(reader)
    writer = reader if getattr(reader, "chat_template", None) else tokenizer
    if not writer.chat_template:
        return [[*row] for row in rows]
    turn, answer = ({"role": role, "content": PLACE} for role in ("user", "assistant"))
    parts = chat_text(writer, [turn, answer, turn]).split(PLACE)
    suffixes = (parts[0][i:] for i in range(len(parts[0]) + 1))
    opening = next(suffix for suffix in suffixes if parts[-2].endswith(suffix))  # of any user's turn
    read = []
    for row in rows:
        text = tokenizer.decode(row)
        first, last = text.find(opening), text.rfind(opening)
        several = opening.strip() and first < last
        text = text[:first] + text[last:]
        read.append(tokenizer(text, add_special_tokens=False).input_ids if several else [*row])
    return read


def read_states(
    model: nn.Module, ids: Sequence[Sequence[int]], block: int, pooling: str = "both", batch_size: int = 16
) -> Tensor:
    """
    Read token ids, a list for each prompt, up to a block; prompts of similar length share a batch.

    Returns `(prompts, width)`, float32 on the CPU. Raises as [`early_exit`].
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    for start in range(0, len(order), batch_size):
        rows = [ids[i] for i in order[start : start + batch_size]]
        width = len(rows[-1])
        padded = torch.tensor([[0] * (width - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        parts.append(early_exit(model, padded, mask, block, pooling))
    return torch.cat(parts)[torch.tensor(order).argsort()]


class _Enough(Exception):
    """Ends a forward at the block of a key."""


def early_exit(model: nn.Module, ids: Tensor, mask: Tensor, block: int, pooling: str) -> Tensor:
    """
    Run the blocks below a block and pool its input: `(rows, width)`, float32 on the CPU.

    The forward is the model's own; a hook ends it by an exception. Under `model.compile()` it runs uncompiled.

    Args:
        ids, mask (`torch.Tensor` of shape `(rows, tokens)`): Token ids and attention mask, padded on any side.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks, states = blocks_of(base), list[Tensor]()
    if not 0 < block < len(blocks):
        raise ValueError(f"A routing key reads 1 to {len(blocks) - 1} blocks of this model, not {block}.")
    device = base.get_input_embeddings().weight.device
    ids, mask = ids.to(device), mask.to(device)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(pooled(hidden_of(args, kwargs), mask, pooling))
        raise _Enough

    handle = blocks[block].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with evaluating(model), suppress(_Enough), torch.compiler.set_stance("force_eager"):
            model(**inputs)
    finally:
        handle.remove()
    return states[0]


def hidden_of(args: Any, kwargs: Any) -> Tensor:
    """Return the hidden states `(rows, tokens, width)` that a block is called with."""
    hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if hidden is None or hidden.dim() != 3:
        raise ValueError("A routing key can't read this model: its blocks don't pass on (rows, tokens, width).")
    return hidden


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool hidden states `(rows, tokens, width)` over the tokens of the mask: `(rows, width)`, float32 on the CPU."""
    mask = mask.to(hidden.device)
    states = []
    if pooling != "last":
        states.append(torch.einsum("btd,bt->bd", hidden.float(), mask.float()) / mask.sum(-1, keepdim=True))
    if pooling != "mean":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
        states.append(hidden[torch.arange(len(hidden), device=hidden.device), last].float())
    return torch.cat(states, -1).clamp(-LARGEST, LARGEST).cpu()
