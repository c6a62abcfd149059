# SPDX-License-Identifier: Apache-2.0
"""
A row: its schema, its prompt (text or chat), its pictures, and how a model reads them.

A *reader* is a tokenizer, or the processor of a model that sees. Nothing here knows a model or a task.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, TypeAlias

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

Row: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | list[dict[str, Any]]
Reader: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
SOURCES = {"image", "path", "url", "base64"}  # keys under which an image part may name its picture


def check(row: Any, where: str, answered: bool = False) -> None:
    """
    Check a row against the one schema that tasks, examples and evaluation share.

    `prompt` is a text or a chat and isn't empty. `choices`, if any, are different texts, and `label` is the index of
    the right one. Other fields are free; a field that is `None` is missing.

    Args:
        row (`Mapping[str, Any]`): The row.
        where (`str`): Its name in messages, such as `"Row 'arc-7'"` or `"'mine.jsonl', line 3"`.
        answered (`bool`): Whether it must have `answer`, a text or a number, or two or more `choices` with `label`.

    Raises:
        `ValueError`: for the first rule that the row breaks.
    """
    if isinstance(row, Mapping):
        wrong = _wrong_prompt(row.get("prompt")) or _wrong_answer(row, answered)
        wrong += f"; its fields are {', '.join(map(str, row))}" if wrong else ""
    else:
        wrong = f"expected an object with 'prompt', got {type(row).__name__}"
    if wrong:
        raise ValueError(f"{where}: {wrong}.")


def _wrong_prompt(prompt: Any) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        return (
            f"'prompt' must be a text or a chat, that is a list of messages with 'role' and 'content' (a text, or "
            f"parts with 'type'), got {prompt!r:.80}"
        )
    parts = [part for message in messages for part in _parts(message)]
    filled = any(part["type"] != "text" or str(part.get("text", "")).strip() for part in parts)
    return "" if filled else "'prompt' is empty: there is nothing an answer could follow"


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        return False
    content = message["content"]
    parts = isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content)
    return content is None or isinstance(content, str) or parts


def _wrong_answer(row: Row, answered: bool) -> str:
    choices, label, answer = (row.get(name) for name in ("choices", "label", "answer"))
    if choices is None:
        text = str(answer) if isinstance(answer, (str, int, float)) and not isinstance(answer, bool) else ""
        if answered and not text.strip():
            return f"expected 'answer', a text or a number, or 'choices' with 'label', got the answer {answer!r:.80}"
        return ""
    if not isinstance(choices, (list, tuple)) or not choices or not all(isinstance(c, str) and c for c in choices):
        return f"'choices' must be a list of texts that aren't empty, got {choices!r:.80}"
    if twice := [text for text in choices if choices.count(text) > 1]:
        return f"'choices' has {twice[0]!r:.80} twice, so there is no single right one"
    if answered and len(choices) < 2:
        return f"'choices' must be two or more texts, got {choices!r:.80}"
    is_index = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices)
    if not is_index and (answered or label is not None):
        return f"'label' must be an index from 0 to {len(choices) - 1}, got {label!r:.80}"
    return ""


def tokenizer_of(reader: Reader) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or the tokenizer itself."""
    return reader.tokenizer if isinstance(reader, ProcessorMixin) else reader


def pad_id(reader: Reader) -> int:
    """Return the token that fills a batch: padding, else the end of text, else 0 (masked, so any token will do)."""
    tokenizer = tokenizer_of(reader)
    return next((id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)


def prompt_text(reader: Reader, prompt: Prompt) -> str:
    """Write a prompt as the model reads it: a chat by its template, or as lines without one; a string stays."""
    if isinstance(prompt, str):
        return prompt
    if (writer := _writer(reader)) is None:
        return "".join(f"{part['text']}\n" for message in prompt for part in _parts(message) if part.get("text"))
    return chat_text(writer, prompt, add_generation_prompt=True)


def chat_text(writer: Reader, chat: list[dict[str, Any]], **kwargs: Any) -> str:
    """Apply a chat template; one that reads only lists of parts, and drops a string silently, gets parts."""
    sample = [{"role": "user", "content": "sample"}]
    if "sample" not in str(writer.apply_chat_template(sample, tokenize=False)):
        chat = [{**message, "content": _parts(message)} for message in chat]
    return str(writer.apply_chat_template(chat, tokenize=False, **kwargs))


def _writer(reader: Reader) -> Reader | None:
    """Return the processor or tokenizer that has a chat template."""
    return next((writer for writer in (reader, tokenizer_of(reader)) if writer.chat_template is not None), None)


def prompt_ids(reader: Reader, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Tokenise prompts for generation: special tokens come from the template or the tokenizer."""
    encoded, tokenizer = [], tokenizer_of(reader)
    for prompt in prompts:
        plain = isinstance(prompt, str) or _writer(reader) is None
        ids = tokenizer(prompt_text(reader, prompt), add_special_tokens=plain).input_ids
        if plain and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # an answer follows
            ids = ids[:-1]
        encoded.append(ids)
    return encoded


def encode(reader: Reader, prompts: Sequence[Prompt]) -> BatchEncoding:
    """
    Encode a batch of prompts for `generate`, padded on the left; chats with pictures go through the processor.

    Returns:
        `input_ids` and `attention_mask` `(prompts, tokens)`, with pixels and what else a processor makes.

    Raises:
        `ValueError`: if a prompt has no tokens, or has a picture and `reader` is a tokenizer.
    """
    if any(has_image({"prompt": prompt}) for prompt in prompts):
        return _encode_images(reader, prompts)
    encoded = prompt_ids(reader, prompts)
    if [] in encoded:
        raise ValueError(f"Prompt {encoded.index([])} of the batch is empty: there is nothing an answer could follow.")
    width, pad = max(map(len, encoded)), pad_id(reader)
    ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in encoded])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in encoded])
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def _encode_images(reader: Reader, prompts: Sequence[Prompt]) -> Any:
    if not isinstance(reader, ProcessorMixin) or any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "A prompt has an image, which a tokenizer cannot read: pass the model's processor, "
            "AutoProcessor.from_pretrained(...), in its place, and chats (lists of messages) for all prompts."
        )
    if reader.tokenizer.pad_token_id is None:
        reader = copy.deepcopy(reader)  # the caller's stays as it is
        reader.tokenizer.pad_token = reader.tokenizer.convert_ids_to_tokens(pad_id(reader))
    return reader.apply_chat_template(
        [in_parts({"prompt": prompt}) for prompt in prompts],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def has_image(row: Row) -> bool:
    """Return whether a row has a picture, in a column or in its chat."""
    chat = [] if isinstance(row["prompt"], str) else row["prompt"]
    kinds = (part.get("type") for message in chat for part in _parts(message))
    return row.get("image") is not None or bool(row.get("images")) or "image" in kinds


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the content of a message as parts, without the empty fields that a table adds to them."""
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{key: value for key, value in part.items() if value is not None} for part in parts]


def in_parts(row: Row) -> list[dict[str, Any]]:
    """Return the chat of a row with parts for contents; if all were texts, its pictures go before the question."""
    messages = [{**message, "content": _parts(message)} for message in row["prompt"]]
    question = next((message for message in messages if message["role"] == "user"), None)
    if question is not None and all(isinstance(message["content"], str) for message in row["prompt"]):
        question["content"] = [*({"type": "image"} for _ in _pictures(row)), *question["content"]]
    return messages


def _pictures(row: Row) -> list[Any]:
    return list(row.get("images") or ([] if row.get("image") is None else [row["image"]]))


def prompt_of(row: Row) -> Prompt:
    """
    Return the prompt of a row with its pictures opened and in their places.

    Raises:
        `ValueError`: if the prompt is a string, if images and image parts differ in number, if a picture is missing or
            damaged.
    """
    if not has_image(row):
        return row["prompt"]
    pictures, chat = _pictures(row), [] if isinstance(row["prompt"], str) else in_parts(row)
    parts = (part for message in chat for part in message["content"])
    places = [part for part in parts if part.get("type") == "image" and not SOURCES & part.keys()]
    if len(places) != len(pictures):  # a prompt that is a string has no places
        raise ValueError(
            f"Row {row.get('id')!r} has {len(places)} image parts in its prompt and {len(pictures)} images: expected "
            "one for each, in its column 'image' or a list in 'images', and a prompt that is a list of messages. Its "
            f"columns are {', '.join(row)}."
        )
    for part, picture in zip(places, pictures, strict=True):
        try:
            part["image"] = _opened(picture)
        except (OSError, TypeError) as error:  # Pillow raises these for anything that isn't a whole picture
            raise ValueError(f"Row {row.get('id')!r} has an image that cannot be read: {error}") from error
    return chat


def _opened(picture: Any) -> Any:
    """Open a picture (PIL image, file name, bytes, or `{"path", "bytes"}`) as a PIL image in RGB."""
    from PIL import Image

    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if not isinstance(picture, (bytes, str, os.PathLike)):
        return load_image(picture)
    with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
        return load_image(opened)
