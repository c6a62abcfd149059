# SPDX-License-Identifier: Apache-2.0
"""
Expert + base model -> one GGUF file for llama.cpp, through the writer of the `gguf` package (extra `gguf`).

Covers what was read back and compared: Llama and Qwen2 with the tokenizers below. Anything else is llama.cpp's own
converter's job, and refused with the commands that run it.
"""

import json
import os
from typing import Any, Literal

import numpy as np
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .expert import Expert
from .export import merge_expert, new_place

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What splits a text before BPE -> llama.cpp's name for it.
SPLITS = {
    WORDS + r"\p{N}{1,3}" + MARKS: "llama-bpe",
    WORDS + r"\p{N}" + MARKS: "qwen2",
    "Digits": "smollm",
    "ByteLevel": "gpt-2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
TYPES = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}


def export_gguf(
    expert: Expert,
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    dtype: Literal["f16", "f32", "q8_0"] = "f16",
) -> None:
    """
    Write the merged model and its tokenizer as one GGUF file, which appears when it is whole.

    Args:
        expert, model: As in [`merge_expert`], which changes the model.
        path (`str` or path): A new file.
        tokenizer (`PreTrainedTokenizerBase`): That of the base, with byte-level BPE.
        dtype (`str`): Of the matrices; vectors are float32, and so is in Q8_0 what has no rows of 32.

    Raises:
        `FileExistsError`: if the file exists.
        `ImportError`: without the `gguf` package.
        `ValueError`: if architecture or tokenizer aren't covered, with the commands that convert them; and as in
            [`merge_expert`].
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError('GGUF files need the gguf package: pip install "peft-svf[gguf]".') from error
    split = _covered(model, tokenizer, path, dtype)
    with new_place(path) as file:
        merge_expert(expert, model)
        writer = gguf.GGUFWriter(file, model.config.model_type)
        _add_config(writer, model, expert.name, gguf.LlamaFileType[TYPES[dtype][1]])
        _add_tokenizer(writer, tokenizer, model.config.vocab_size, split)
        tokenizer.save_pretrained(file.parent)
        words = gguf.SpecialVocab(file.parent, load_merges=True, n_vocab=model.config.vocab_size)
        words.add_to_gguf(writer, quiet=True)
        _write(writer, model, gguf.GGMLQuantizationType[TYPES[dtype][0]])


def _covered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Any, dtype: str) -> str:
    """Return llama.cpp's name of what splits a text before BPE; refuse what isn't covered."""
    config, state = model.config, {}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        state = json.loads(backend.to_str())
    split = (state.get("pre_tokenizer") or {}).get("type", "none")
    if split == "Sequence":
        first = state["pre_tokenizer"]["pretokenizers"][0]
        split = first.get("pattern", {}).get("Regex", first["type"])
    problems = {
        f"architecture {config.model_type!r}": config.model_type not in ("llama", "qwen2"),
        f"rotary scaling {rope!r}": rope != "default",
        "attention or MLP biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        "sliding attention": bool(getattr(config, "use_sliding_window", False)),
        "this tokenizer": (state.get("model") or {}).get("type") != "BPE" or split not in SPLITS,
    }
    if refused := [name for name, present in problems.items() if present]:
        raise ValueError(
            f"GGUF export doesn't cover {' and '.join(refused)}; llama.cpp's converter may. Run "
            f"`peft-svf export ... --to merged --out merged`, then "
            f"`python llama.cpp/convert_hf_to_gguf.py merged --outfile {path} --outtype {dtype}`."
        )
    return SPLITS[split]


def _add_config(writer: Any, model: PreTrainedModel, name: str, file_type: int) -> None:
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int, split: str) -> None:
    """Add the tokens; ids that the embedding has beyond them are unused."""
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))):
        tokens.append(token)
        types.append(NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types + [UNUSED] * (size - len(types)))


def _write(writer: Any, model: PreTrainedModel, packed: Any) -> None:
    """Write header, names and shapes, then the tensors one at a time, so that the model is in memory once."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.config.model_type.upper()], model.config.num_hidden_layers)
    tensors, kinds = model.state_dict(), {}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, tensor in tensors.items():
        whole = tensor.dim() == 1 or (packed == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32)
        kinds[name] = gguf.GGMLQuantizationType.F32 if whole else packed
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
        stored, size = np.dtype(np.uint8), int(np.prod(shape))
        writer.add_tensor_info(names.get_name(name, (".weight", ".bias")), shape, stored, size, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tqdm(tensors.items(), desc="Writing", unit="tensor", name="peft_svf.export"):
        values = np.ascontiguousarray(_interleaved(name, tensor, model.config).float().cpu().numpy())
        writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
    writer.close()


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Put rotary halves side by side in queries and keys of Llama, as llama.cpp has them: `(heads, 2, n)` turned."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
