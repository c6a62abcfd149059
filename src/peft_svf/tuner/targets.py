# SPDX-License-Identifier: Apache-2.0
"""
Architecture -> the modules that SVF targets by default, and which modules it can adapt at all.
"""

import logging
import re
from typing import Any

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

# The MLP weights of each architecture (the paper's choice). A string is a regex over whole names: BERT's
# `layer.0.output.dense` is its MLP, `layer.0.attention.output.dense` is not.
GATED = ["gate_proj", "up_proj", "down_proj"]
BERT = r"(?:.*\.)?layer\.(\d+\.(?:intermediate|output)\.dense)"
ARCHITECTURES: dict[str, list[str] | str] = {  # MLP weights -> model types
    "arcee cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3 gemma3_text gemma3n_text glm4 "
    "glm4_moe gpt_oss granite helium hunyuan_v1_dense llama llama4_text ministral mistral mistral3 mixtral olmo olmo2 "
    "olmo3 qwen2 qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm": GATED,
    "bert camembert deberta deberta-v2 electra roberta xlm-roberta": BERT,
    "bloom falcon gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"],
    "gpt2 gpt_bigcode gpt_neo starcoder2": ["mlp.c_fc", "mlp.c_proj"],
    # OPT flattens batch and tokens before its MLP; the layer repeats offsets of rows to the flattened rows
    "bart blenderbot m2m_100 marian mbart opt pegasus phi whisper": ["fc1", "fc2"],
    "t5 mt5 umt5": ["wi", "wi_0", "wi_1", "wo"],
    "distilbert": ["ffn.lin1", "ffn.lin2"],
    "glm phi3": ["gate_up_proj", "down_proj"],
    "gptj": ["fc_in", "fc_out"],
    "mpt": ["ffn.up_proj", "ffn.down_proj"],
}
DEFAULT_TARGETS = {model_type: targets for types, targets in ARCHITECTURES.items() for model_type in types.split()}
ATTENTION = ["q_proj", "v_proj"]
# Kernels of these models read the weights of their projections; WavLM hands its attention's to a fused function.
READERS = {
    **dict.fromkeys(["mamba", "falcon_mamba"], "dt_proj out_proj"),
    **dict.fromkeys(["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"], "out_proj"),
    "jamba": "dt_proj",
    "wavlm": "q_proj k_proj v_proj out_proj",
}
READING = re.compile(r"Mixer|Mamba|WavLMAttention")
TIME_FIRST = {"fsmt", "led", "longformer", "mask2former", "maskformer", "oneformer", "xlnet"}  # (tokens, rows, ...)
EXPERT = re.compile(r"experts?\.\d+(\.|$)|^\..*\.\d+\.")  # `experts.3.up_proj`; a number inside a block
BLOCK = re.compile(r".+?\.\d+(?=\.)")  # up to the first number: a block's experts have numbers too


def block_of(name: str) -> str:
    """Name the block of a module: `"model.layers.0"` for `"model.layers.0.mlp.up_proj"`; the name itself if none."""
    block = BLOCK.match(name)
    return block[0] if block else name


def of_one_expert(name: str) -> bool:
    """Whether a module belongs to one of numbered experts, which get only the tokens that a router sends to them."""
    return EXPERT.search(name) is not None or EXPERT.search(name.removeprefix(block_of(name))) is not None


def adaptable(module: nn.Module) -> bool:
    """Whether a module is linear: `nn.Linear`, transformers' `Conv1D` or packed by a library that PEFT knows."""
    return isinstance(module, (nn.Linear, Conv1D)) or resolve_quantization_backend(module) is not None


def batch_first(model: nn.Module) -> bool:
    """Whether a model is known to keep activations as `(rows, tokens, ...)`, and flattened ones in that order."""
    return isinstance(model, PreTrainedModel) and getattr(model.config, "model_type", None) not in TIME_FIRST


def reads_weight(model: nn.Module, parent: nn.Module, name: str) -> bool:
    """Whether a module is known to compute with the weight of its child itself, without running the child."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    names = READERS.get(model_type, "").split() if isinstance(model_type, str) else []
    return isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or (
        name in names and READING.search(type(parent).__name__) is not None
    )


def default_targets(model: nn.Module, model_type: str | None) -> set[str] | str:
    """
    Name the modules that SVF adapts by default: the MLP weights, the paper's choice.

    If these aren't linear modules (fused experts), they are attention q and v; if the table lacks the architecture,
    they are what LoRA adapts. Both are logged. In a multimodal model they are in the text decoder; name the modules of
    a vision tower to adapt it.

    Raises:
        `ValueError`: if neither SVF's table nor LoRA's has the architecture.
    """
    side = _language_side(model)
    if side is not None:
        name, module, text_type = side
        endings = default_targets(module, text_type)
        last = name.rpartition(".")[2]  # "language_model.layers.0.mlp.up_proj": no vision tower has such a name
        inner = [inner for inner, part in module.named_modules() if adaptable(part) and _ends(inner, endings)]
        return {f"{last}.{name.removesuffix('.base_layer')}" for name in inner}
    targets = DEFAULT_TARGETS.get(model_type)  # type: ignore[arg-type]
    if targets is None:
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
        if targets is None:
            raise ValueError(
                f"Please specify `target_modules` in `peft_config`: there is no default for the architecture "
                f"{model_type!r}. Name endings of its linear layers or 'all-linear' will do."
            )
        logger.info(f"SVF's table of MLP weights has no {model_type!r}: it targets what LoRA does there, {targets}.")
        return targets if isinstance(targets, str) else set(targets)
    names = [name.removesuffix(".base_layer") for name, module in model.named_modules() if adaptable(module)]
    if isinstance(targets, str):  # spelled out as endings, so that `layers_to_transform` applies to it as well
        return {match[1] for name in names if (match := re.fullmatch(targets, name))}
    if not any(_ends(name, set(targets)) for name in names):
        logger.info(f"The MLP weights of {model_type!r} aren't linear modules: SVF targets attention q and v.")
        targets = ATTENTION
    return set(targets)


def _language_side(model: nn.Module) -> tuple[str, nn.Module, str | None] | None:
    """Find the text decoder of a multimodal model: its name, module and model type; `None` for other models."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config:
        return None
    parts = ((name, part) for name, part in model.named_modules() if getattr(part, "config", None) is text)
    name, part = next(parts, ("", model))
    return (name, part, getattr(text, "model_type", None)) if name else None


def _ends(name: str, targets: set[str] | str) -> bool:
    """Whether PEFT would take a module for a target."""
    name = name.removesuffix(".base_layer")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)
