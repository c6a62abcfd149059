# SPDX-License-Identifier: Apache-2.0
"""
Expert + base model -> files that other engines read: a merged checkpoint, a LoRA, a GGUF file.

Weights are handled one at a time, so the model is in memory once. A mixture is exported like an expert: it is one,
`0.7 * math + 0.3 * code`. docs/how_to/share.md lists the engines, and what was run. GGUF files go through the writer
of the `gguf` package and cover what was read back and compared, Llama and Qwen2 with the tokenizers below; anything
else is the job of llama.cpp's own converter, and refused with the commands that run it.
"""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..files import extra
from ..rows import Reader
from ..tuner.basis import Basis, exact, rescale
from .base import BaseWeights, refuse_adapters
from .expert import PREFIX, Expert

MISSING = 0.05  # A truncated LoRA may leave out this share of the change of one kind of weight.
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


def merge_expert(expert: Expert, model: PreTrainedModel) -> None:
    """
    Rescale the weights of a base model in place: it becomes the merged model, and nothing of SVF is left in it.

    Args:
        expert ([`Expert`]): z-vectors of this base, such as `0.7 * math + 0.3 * code`.
        model (`PreTrainedModel`): The base, without adapters and not quantised.

    Raises:
        `ValueError`: if the expert belongs to another base, or moves a weight that the model uses in two places; the
            model is then as it was.
    """
    refuse_adapters(model)
    weights, places = BaseWeights(model, expert.config), defaultdict[int, list[str]](list)
    weights.check(expert)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[parameter.data_ptr()].append(name)
    for name in expert.offsets:
        if len(shared := places[weights[name].data_ptr()]) > 1:
            raise ValueError(f"{shared[0]} and {shared[1]} share one weight: z of {name} would rescale both.")
    for name, offset in _progress(expert, "Merging"):
        weight = weights[name]
        Q, offset = _used(weights.basis(name)[0], offset)
        weight.copy_(rescale(weight, Q.to(weight.device), offset.to(weight.device)))


def export_merged(
    expert: Expert, model: PreTrainedModel, folder: str | os.PathLike[str], reader: Reader | None = None
) -> None:
    """
    Write an ordinary checkpoint, for vLLM, SGLang, TGI or llama.cpp's converter; the folder appears when it is whole.

    Args:
        expert, model: As in [`merge_expert`], which changes the model.
        folder (`str` or path): A new folder.
        reader (tokenizer or processor, *optional*): Saved beside the weights.

    Raises:
        `FileExistsError`: if the folder exists.
        `ValueError`: as in [`merge_expert`].
    """
    with new_place(folder) as scratch:
        merge_expert(expert, model)
        model.save_pretrained(scratch)
        if reader is not None:
            reader.save_pretrained(scratch)


def export_lora(
    expert: Expert,
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    rank: int | float | None = None,
    force: bool = False,
) -> dict[str, dict[str, float]]:
    """
    Write an expert as a LoRA, which PEFT loads without this package, and vLLM, SGLang and llama.cpp serve.

    The factors need no SVD: `W' - W = (W Q diag(z - 1)) Q.T` on side "in", mirrored on side "out". With all moved
    directions they are exact: rank k for an expert of `rank=k`, else the largest `min(out, in)`.

    Args:
        expert ([`Expert`]): z-vectors of this base. A mixture of experts of `rank=k` is one LoRA of rank k.
        model (`PreTrainedModel`): The base, not quantised. It stays as it is.
        folder (`str` or path): A new folder.
        rank (`int` or `float`, *optional*):
            An integer keeps as many directions of each weight, the ones that change it most. A float below 1 keeps
            the fewest with that share of the squared change, as in PEFT's `save_as_lora`. Default: all.
        force (`bool`): Write the LoRA even if it leaves out more than 5 % of the change of a kind of weight.

    Returns:
        `dict`: by kind of weight (`"up_proj"`) the largest `rank` and the `error`, the Frobenius norm of what is left
            out over that of the change. The file's metadata has it as well.

    Raises:
        `FileExistsError`: if the folder exists.
        `ValueError`: for another base, stacked weights, or a larger error without `force`.
    """
    refuse_adapters(model)
    weights, factors, ranks = BaseWeights(model), dict[str, Tensor](), dict[str, int]()
    weights.check(expert)
    squares: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for name, offset in _progress(expert, "Factoring"):
        A, B, change, missed = _factors(weights.stored(name), weights.basis(name)[0], offset, rank)
        factors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        ranks[name] = len(A)
        squares[name.rpartition(".")[2]].append((change, missed, len(A)))
    report: dict[str, dict[str, float]] = {}
    for kind, entries in squares.items():
        changes, missing, sizes = zip(*entries, strict=True)
        report[kind] = {"rank": max(sizes), "error": (sum(missing) / (sum(changes) or 1.0)) ** 0.5}
    kind, worst = max(report.items(), key=lambda item: item[1]["error"])
    if worst["error"] > MISSING and not force:
        raise ValueError(
            f"A LoRA of rank {worst['rank']} leaves out {worst['error']:.1%} of the change of {kind}, more than "
            f"{MISSING:.0%}. Keep more directions (all of them, at most {max(expert.sizes.values())}, are exact), or "
            "train the expert with SVFConfig(rank=...); force=True (--force) writes it anyway."
        )
    largest = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        task_type=expert.config.get("task_type"),
        base_model_name_or_path=expert.base_model,
        revision=expert.config.get("revision"),
        inference_mode=True,
        r=largest,
        lora_alpha=largest,  # a scale of 1 everywhere, whether an engine reads the patterns or only `r`
        rank_pattern=smaller,
        alpha_pattern=smaller,
        target_modules=sorted(ranks),
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
    )
    with new_place(folder) as scratch:
        config.save_pretrained(str(scratch))
        metadata = {"format": "pt", "svf_expert": expert.name, "relative_error": json.dumps(report)}
        save_file(factors, scratch / SAFETENSORS_WEIGHTS_NAME, metadata)
    return report


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
    with extra("gguf", "GGUF files need the gguf package"):
        import gguf
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


def _factors(
    weight: Tensor, basis: Basis, offset: Tensor, rank: int | float | None
) -> tuple[Tensor, Tensor, float, float]:
    """
    Factor the change of a weight: `A (n, in)`, `B (out, n)`, its squared norm and that of what `B @ A` leaves out.

    Directions change a weight independently, each by a matrix of norm `abs(S * (z - 1))`.
    """
    Q, offset = _used(basis, offset)
    squares = (basis.S[: len(offset)] * offset).double().square()  # (k,)
    kept = torch.arange(len(offset))
    if rank is not None:
        order = squares.argsort(descending=True)
        shares = squares[order].cumsum(0)
        count = rank if isinstance(rank, int) else int(torch.searchsorted(shares, rank * shares[-1])) + 1
        kept = order[:count].sort().values
    missed = float(squares.sum() - squares[kept].sum())
    W, Q, offset = exact(weight).cpu(), Q[:, kept].to(exact(weight).dtype), offset[kept]
    if basis.side == "in":
        A, B = Q.T, (W @ Q) * offset
    else:
        A, B = offset[:, None] * (Q.T @ W), Q
    return A.contiguous(), B.contiguous(), float(squares.sum()), max(missed, 0.0)


def _used(basis: Basis, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions that an offset moves, `(..., r, k)`, and the offset in their shape, `(..., k)`."""
    offset = offset.view(*basis.Q.shape[:-2], -1)
    return basis.Q[..., : offset.shape[-1]], offset


def _progress(expert: Expert, what: str) -> Any:
    return tqdm(sorted(expert.offsets.items()), desc=what, unit="weight", name="peft_svf.export")


@contextmanager
def new_place(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Make a file or folder that gets its name when it is whole; refuse one that exists, before hours of work.

    Raises `FileExistsError`, and `OSError` if safetensors can't write, on a full disk say; nothing is left then.
    """
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{path} exists already: name another place.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        try:
            yield Path(scratch) / target.name
        except SafetensorError as error:
            raise OSError(f"{path} can't be written: {error}.") from error
        (Path(scratch) / target.name).rename(target)


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
