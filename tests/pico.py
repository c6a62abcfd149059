# SPDX-License-Identifier: Apache-2.0
"""
Tiny random models of several architectures, made from configs in milliseconds: nothing is downloaded.

Axes have different lengths, biases and norms are not at their initial 0 and 1, and weights are large enough that
rescaling them moves the logits.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

own_methods = pytest.mark.xfail(
    Version(hf.__version__) >= Version("5.24") and Version(version("peft")) < Version("0.22"),
    reason="the `add_adapter` of transformers 5.24 needs peft 0.22",
)

VOCABULARY = 53
WIDTH, MLP, LAYERS, HEADS, KV_HEADS = 24, 40, 2, 4, 2
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
GROUPED = {**WIDE, "num_key_value_heads": KV_HEADS}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **kw: hf.LlamaConfig(**COMMON, **GROUPED, **kw),
    "qwen2": lambda **kw: hf.Qwen2Config(**COMMON, **GROUPED, **kw),
    "gpt2": lambda **kw: hf.GPT2Config(**COMMON, n_embd=WIDTH, n_inner=MLP, n_layer=2, n_head=4, n_positions=64, **kw),
    "opt": lambda **kw: hf.OPTConfig(
        vocab_size=VOCABULARY, init_std=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH, ffn_dim=MLP, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, **kw,
    ),
    "bert": lambda **kw: hf.BertConfig(vocab_size=VOCABULARY, initializer_range=0.2, **WIDE, **kw),
    "t5": lambda **kw: hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_ff=MLP, d_kv=6, num_layers=2, num_heads=4, initializer_factor=1.0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, **kw,
    ),
    "gemma3_text": lambda **kw: hf.Gemma3TextConfig(**COMMON, **GROUPED, head_dim=6, **kw),
    "phi3": lambda **kw: hf.Phi3Config(**COMMON, **GROUPED, **kw),
    "mixtral": lambda **kw: hf.MixtralConfig(
        **COMMON, **GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=6, **kw
    ),
    "qwen3_moe": lambda **kw: hf.Qwen3MoeConfig(**COMMON, **GROUPED, **EXPERTS, head_dim=6, **kw),
    "gpt_oss": lambda **kw: hf.GptOssConfig(  # its stacks are (experts, in, out)
        **COMMON, **GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=6, tie_word_embeddings=False, **kw
    ),
}  # fmt: skip
CLASSES = {"bert": hf.AutoModelForSequenceClassification, "t5": hf.AutoModelForSeq2SeqLM}
STACKED = ["mixtral", "qwen3_moe", "gpt_oss"]
STACKS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CAUSAL = ["llama", "qwen2", "gpt2", "opt", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]


def config(kind: str, **kwargs: Any) -> Any:
    """The config of a tiny model; `kwargs` are fields of its config class."""
    return CONFIGS[kind](**kwargs)


def build(
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    name: str = "",
    model_class: Any = None,
    vocabulary: int = VOCABULARY,
    **kwargs: Any,
) -> Any:
    """
    Build a tiny random model of a kind of `CONFIGS` in evaluation mode; another seed is another base.

    `name` is what it says it was loaded from. `model_class` is an Auto class; default the causal model, BERT with a
    classification head, T5 whole. `vocabulary` is the number of tokens of its tokenizer.
    """
    auto = model_class or CLASSES.get(kind, hf.AutoModelForCausalLM)
    torch.manual_seed(seed)
    fields = config(kind, **kwargs)
    fields.vocab_size = vocabulary
    model = auto.from_config(fields)
    draws = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases and norms
                start = 0.0 if key.endswith("bias") else parameter
                parameter.copy_(start + 0.3 * torch.randn(parameter.shape, generator=draws))
    model.config._name_or_path = model.name_or_path = name
    return model.to(dtype).eval()


def inputs(model: Any, batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids without padding (and decoder ids for an encoder-decoder)."""
    draws = torch.Generator().manual_seed(seed)
    found = {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=draws)}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, length - 2), generator=draws)
    return found


@torch.no_grad()
def logits(model: Any, ids: dict[str, Tensor] | None = None, **kwargs: Any) -> Tensor:
    """What a model answers to `ids` (default [`inputs`])."""
    return model(**(inputs(model) if ids is None else ids), **kwargs).logits


class OneLayer(nn.Module):
    """A single linear layer `fc`, so that a law can be read off one weight."""

    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def one_layer(
    kind: str = "linear",
    out_features: int = 7,
    in_features: int = 11,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> OneLayer:
    """[`OneLayer`] over `nn.Linear` (`"linear"`) or transformers' `Conv1D` (`"conv1d"`), which stores W transposed."""
    torch.manual_seed(seed)
    if kind == "linear":
        fc: nn.Module = nn.Linear(in_features, out_features, bias=bias)
    else:
        fc = Conv1D(out_features, in_features)
        fc.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
    with torch.no_grad():
        fc.weight.normal_()
        if bias:
            fc.bias.normal_()
    return OneLayer(fc).to(dtype).eval()


def checkpoint(model: Any, *settings: dict[str, Any]) -> None:
    """Turn gradient checkpointing on; transformers 5.23 renames the method."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*settings)


def matrix_of(fc: nn.Module) -> Tensor:
    """The weight of a plain or adapted layer as `(out, in)`."""
    base = getattr(fc, "base_layer", fc)
    return base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach()


def svf_layers(model: nn.Module) -> dict[str, Any]:
    """The SVF layers of a model by the names of the modules they replace."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "svf_offset") and hasattr(module, "base_layer")
    }


def randomize(model: nn.Module, adapter: str = "default", seed: int = 0, scale: float = 0.5) -> dict[str, Tensor]:
    """Draw offsets `~ N(0, scale)` for one adapter; returns its z-vectors by module, `(E, k)` by stacked parameter."""
    draws = torch.Generator().manual_seed(seed)
    z = {}
    for name, layer in svf_layers(model).items():
        if adapter in layer.svf_offset:
            offset = layer.svf_offset[adapter].weight
            offset.data.copy_(scale * torch.randn(offset.shape, generator=draws))
            vector = 1 + offset.detach().double()
            if layer.parameter_name:
                name, vector = layer.weight_name(name), vector.view(layer.matrices, -1)
            z[name] = vector
    return z


def fill(model: nn.Module, z: dict[str, Tensor]) -> nn.Module:
    """Write the oracle's weights `U diag(S z) V^T` into a plain model: what an expert must make of it."""
    import oracle

    for name, vector in z.items():
        if vector.dim() == 2:
            stack = model.get_parameter(name)
            stack.data = torch.stack(list(map(oracle.rescaled, stack.data, vector))).to(stack.dtype)
            continue
        module = model.get_submodule(name)
        weight = oracle.rescaled(matrix_of(module), vector).to(module.weight.dtype)
        module.weight.data = (weight.T if isinstance(module, Conv1D) else weight).contiguous()
    return model


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a saved adapter, a `dict`, in place."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a saved adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rows_of(layer: nn.Module, offsets: Tensor, index: Tensor | None = None, merge: bool = True) -> Any:
    """Give the rows of a batch their own offsets in one layer, while the context is open."""
    from peft_svf.tuner.rows import active_rows

    return active_rows({"fc": layer}, {"fc": offsets}, index, merge)
