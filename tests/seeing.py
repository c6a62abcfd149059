# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that see, each with a processor that reads their images, and what is asked about two of these."""

import io
import json

import torch
import transformers as hf
from pico import GROUPED
from PIL import Image
from tiny_model import tiny_tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

MARKS = {
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}
KINDS = list(MARKS)
PICTURE = {"idefics3": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
LANGUAGE = r".*(text_model|language_model).*\.(gate|up|down)_proj"
IMAGES = [Image.new("RGB", (20, 12), (200, 10, 10)), Image.new("RGB", (16, 16), (0, 10, 250))]
TEXT = {**GROUPED, "max_position_embeddings": 512, "initializer_range": 0.2}
TEXT |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 28, "patch_size": 4, "initializer_range": 0.2}


def template(kind: str) -> str:
    """Reads contents that are lists of parts, as the templates of SmolVLM do: a string's text would be lost."""
    return (
        "{% for m in messages %}<{{ m['role'][0] }}>{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + PICTURE[kind] + "{% elif p['type'] == 'text' %}{{ p['text'] }}"
        "{% endif %}{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )


class ImagesOnly(hf.Qwen2_5_VLProcessor):
    """Qwen's processor without that for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        hf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor(kind: str = "idefics3"):
    """Character tokens, images of 16 times 16 pixels (or for Qwen the size they have), 4 tokens or more for each."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<u>", "<a>", *MARKS[kind]]})
    tokenizer.chat_template = template(kind)  # as it is when the folder of a processor is read
    if kind == "qwen2_5_vl":
        images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 512})
        return ImagesOnly(images, tokenizer, chat_template=template(kind))
    sizes = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}
    images = hf.Idefics3ImageProcessorPil(**sizes, do_image_splitting=False)
    return hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template(kind))


def model(kind: str = "idefics3", name: str = "seeing", seed: int = 0):
    """A model that reads what [`processor`] gives; its answers depend on the images."""
    tokenizer = processor(kind).tokenizer
    ids = dict(zip(MARKS[kind], tokenizer.convert_tokens_to_ids(MARKS[kind]), strict=True))
    text = {**TEXT, "vocab_size": len(tokenizer)}
    if kind == "qwen2_5_vl":
        vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 24, "spatial_merge_size": 2, "temporal_patch_size": 2}
        config = hf.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
            vision_config={**VISION, **vision, "window_size": 16, "fullatt_block_indexes": [1]},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    else:
        config = hf.Idefics3Config(
            image_token_id=ids["<image>"],
            scale_factor=2,
            pad_token_id=0,
            vision_config={**VISION, "image_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            text_config={"model_type": "llama", **text},
        )
    torch.manual_seed(seed)
    found = hf.AutoModelForImageTextToText.from_config(config).eval()
    found.config._name_or_path = found.name_or_path = name
    return found


def png(image) -> bytes:
    """An image as the content of a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def asks(image, text: str) -> list[dict]:
    """A chat about an image, which is one of [`IMAGES`] by its number, or anything that a part may name."""
    part = {"type": "image", "image": IMAGES[image] if isinstance(image, int) else image}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def write_textvqa(folder):
    """Write the published files of TextVQA with two images and a few questions."""
    data = folder / "textvqa"
    data.mkdir(parents=True)
    for number, image in enumerate(IMAGES):
        image.save(data / f"{number}.png")
    for split, count in {"train": 40, "val": 4}.items():
        rows = [
            {"question_id": i, "question": f"What is {i}?", "image_id": i, "image": f"{i % 2}.png",
             "answers": ["red" if i % 2 == 0 else "blue"] * 10}
            for i in range(count)
        ]  # fmt: skip
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
