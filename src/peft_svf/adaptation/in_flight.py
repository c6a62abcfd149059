# SPDX-License-Identifier: Apache-2.0
"""
The first pass inside the second: at the block of the routing keys the prefill's own states choose each row's mixture.

It can be had if no expert moves weights below that block, because then all mixtures agree up to there. Otherwise the
first pass is a forward of its own that ends at the block. Both read the same tokens, so they decide the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..experts.expert import Mixture
from ..experts.key import blocks_of, hidden_of, key_ids, pooled
from ..experts.library import ExpertLibrary
from ..rows import Reader, chat_text, tokenizer_of
from .first_pass import FirstPass, decide
from .router import checked_keys, router_of

# Arguments of `generate` under which the first forward isn't the prompt's, or not the prompt's alone.
ELSEWHERE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "custom_generate", "inputs_embeds")
PLACE = "<request>"  # stands for the request in a chat template


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
    block = next(iter(checked_keys(library, reader).values())).block
    compiled = any(getattr(module, "_compiled_call_impl", None) for module in library.model.modules())
    return not compiled and not any(settings.get(name) for name in ELSEWHERE) and first_block(library) >= block


@contextmanager
def deciding(
    library: ExpertLibrary,
    reader: Reader,
    first_pass: FirstPass,
    mask: Tensor,
    merge: bool,
    on_dispatch: Callable[[list[Mixture]], Any],
) -> Iterator[PeftModel]:
    """
    Let the next forward, the prefill of a batch, choose a mixture for each row and go on with it.

    Args:
        mask (`torch.Tensor` of shape `(rows, tokens)`): The attention mask of the prompts, which may then be repeated
            side by side.
        merge (`bool`): As in [`ExpertLibrary.activate`].
        on_dispatch (`Callable`): Gets the mixtures as soon as they are chosen.
    """
    router = router_of(library, reader)
    block, pooling = next(iter(checked_keys(library, reader).values())).how
    with ExitStack() as stack:
        model = stack.enter_context(library.activate(Mixture()))

        def choose(module: nn.Module, args: Any, kwargs: Any) -> None:
            handle.remove()
            hidden = hidden_of(args, kwargs)
            copies = len(hidden) // len(mask)  # beams and returned sequences stand side by side
            mixtures = decide(library, router.scores(pooled(hidden[::copies], mask, pooling)), first_pass)
            on_dispatch(mixtures)
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
    writer = reader if getattr(reader, "chat_template", None) else tokenizer_of(reader)
    if not writer.chat_template:
        return rows, True
    turn = [{"role": "user", "content": PLACE}]
    end = chat_text(writer, turn, add_generation_prompt=True).rpartition(PLACE)[2]
    tokenizer = tokenizer_of(reader)
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
