# SPDX-License-Identifier: Apache-2.0
"""
Prompts of rows, texts or chats, with pictures or without -> what a model reads: text, token ids, pixels.

A *reader* is a tokenizer, or the processor of a model that sees. Nothing here knows a model or what a row asks.
"""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

Row = Mapping[str, Any]
Prompt = str | list[dict[str, Any]]
Reader: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
SOURCES = {"image", "path", "url", "base64"}  # where the part of a message may have its picture


def tokenizer_of(reader: Reader) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor; a tokenizer itself."""
    return reader.tokenizer if isinstance(reader, ProcessorMixin) else reader


def prompt_text(reader: Reader, prompt: Prompt) -> str:
    """
    Write a prompt as the model reads it, up to where its answer begins.

    A chat goes through the template of the tokenizer or processor; without one its contents stand on lines of their
    own, and a string is left as it is.
    """
    if isinstance(prompt, str):
        return prompt
    if (writer := _writer(reader)) is None:
        return "".join(f"{part['text']}\n" for message in prompt for part in _parts(message) if part.get("text"))
    return chat_text(writer, prompt, add_generation_prompt=True)


def chat_text(writer: Reader, chat: list[dict[str, Any]], **kwargs: Any) -> str:
    """
    Write a chat by the template of a tokenizer or processor, which gets the other arguments.

    A template of a model that sees may read lists of parts alone, and silently leave out the text of a string.
    """
    probe = [{"role": "user", "content": "probe"}]
    if "probe" not in str(writer.apply_chat_template(probe, tokenize=False)):
        chat = [{**message, "content": _parts(message)} for message in chat]
    return str(writer.apply_chat_template(chat, tokenize=False, **kwargs))


def _writer(reader: Reader) -> Reader | None:
    """Who has the chat template, processor or tokenizer."""
    return next((each for each in (reader, tokenizer_of(reader)) if each.chat_template is not None), None)


def prompt_ids(reader: Reader, prompts: Sequence[Prompt]) -> list[list[int]]:
    """
    Tokenise prompts as generation does: a chat template writes its special tokens, plain text gets the tokenizer's.
    """
    found, tokenizer = [], tokenizer_of(reader)
    for prompt in prompts:
        plain = isinstance(prompt, str) or _writer(reader) is None
        ids = tokenizer(prompt_text(reader, prompt), add_special_tokens=plain).input_ids
        if plain and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # an answer follows
            ids = ids[:-1]
        found.append(ids)
    return found


def has_image(row: Row) -> bool:
    """Tell whether a row has a picture, in a column of its own or in its chat."""
    chat = [] if isinstance(row["prompt"], str) else row["prompt"]
    kinds = (part.get("type") for message in chat for part in _parts(message))
    return row.get("image") is not None or bool(row.get("images")) or "image" in kinds


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as parts, without the empty fields that a table adds to them."""
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{key: value for key, value in part.items() if value is not None} for part in parts]


def read_images(reader: Reader, rows: Sequence[Row]) -> Any:
    """
    Give rows with images as the model sees them: left-padded ids, pixels, and what else its processor makes.

    Raises:
        `ValueError`: for a tokenizer, a prompt that is a string, images that are not one for each image part, and a
            picture that is damaged.
        `FileNotFoundError`: if there is no such picture.
    """
    if not isinstance(reader, ProcessorMixin):
        name = next(row.get("id") for row in rows if has_image(row))
        raise ValueError(
            f"Row {name!r} has an image, which a tokenizer cannot read: pass the model's processor, "
            "AutoProcessor.from_pretrained(...), in its place."
        )
    return reader.apply_chat_template(
        [_illustrated(row) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def in_parts(row: Row) -> list[dict[str, Any]]:
    """The chat of a row, all contents as parts; where all were texts, its pictures have a place in the question."""
    messages = [{**message, "content": _parts(message)} for message in row["prompt"]]
    asked = next((m for m in messages if m["role"] == "user"), None)
    if asked is not None and all(isinstance(message["content"], str) for message in row["prompt"]):
        asked["content"] = [*({"type": "image"} for _ in _pictures(row)), *asked["content"]]
    return messages


def _pictures(row: Row) -> list[Any]:
    return list(row.get("images") or ([] if row.get("image") is None else [row["image"]]))


def _illustrated(row: Row) -> list[dict[str, Any]]:
    """The chat of a row, all contents as parts, with its pictures in them."""
    name = row.get("id")
    if isinstance(row["prompt"], str):
        raise ValueError(
            f"Row {name!r} has an image, but its prompt is a string: write it as a chat, a list of messages."
        )
    pictures, messages = _pictures(row), in_parts(row)
    parts = (part for message in messages for part in message["content"])
    places = [part for part in parts if part.get("type") == "image" and not SOURCES & part.keys()]
    if len(places) != len(pictures):
        raise ValueError(
            f"Row {name!r} has {len(places)} image parts in its prompt and {len(pictures)} images: expected one for "
            f"each, in its column 'image' or a list in 'images'. Its columns are {', '.join(row)}."
        )
    for part, picture in zip(places, pictures, strict=True):
        part["image"] = _opened(picture, name)
    return messages


def _opened(picture: Any, name: Any) -> Any:
    """A picture that is a PIL image, the name of a file, its bytes, or `{"path", "bytes"}`, as a PIL image in RGB."""
    from PIL import Image

    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    try:
        if isinstance(picture, (bytes, str, os.PathLike)):
            with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
                return load_image(opened)
        return load_image(picture)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Row {name!r} names the image '{picture}', and there is no such file.") from error
    except (OSError, TypeError) as error:  # Pillow's for what is no picture, or only a part of one
        raise ValueError(f"Row {name!r} has an image that cannot be read: {error}") from error
