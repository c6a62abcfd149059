# SPDX-License-Identifier: Apache-2.0
"""Experts of a tiny random Llama, as PEFT saves them, and what a model must look like again afterwards."""

from pathlib import Path

import pico
import torch
from peft import PeftModel, get_peft_model
from tiny_model import tiny_model, tiny_tokenizer

from peft_svf import SVFConfig

BASE = "tiny-base"
SEEDS = {"code": 1, "math": 2, "kinds": 3}  # the last serves as a classifier
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def base(seed=0, dtype=torch.float32, name=BASE):
    """A base model with a name, so that experts of another one are refused."""
    model = tiny_model(seed, dtype)
    model.config._name_or_path = model.name_or_path = name
    return model


def write(folder: Path, name: str, seed: int = 0, of=None, scale: float = 0.5, **config) -> Path:
    """Save an expert with random offsets in `folder/name`, of the tiny base model or of another one."""
    settings = {"task_type": "CAUSAL_LM", "description": f"about {name}"} | config
    model = get_peft_model(of if of is not None else base(), SVFConfig(**settings))
    pico.randomize(model, seed=seed, scale=scale)
    model.save_pretrained(str(folder / name))
    return folder / name


def write_all(folder: Path, dtype=torch.float32) -> dict[str, Path]:
    """One expert for each name of `SEEDS`, made on the base model in a dtype."""
    return {name: write(folder, name, seed, base(dtype=dtype)) for name, seed in SEEDS.items()}


def alone(path: Path, dtype=torch.float32):
    """The model with one expert as PEFT itself loads it."""
    return PeftModel.from_pretrained(base(dtype=dtype), str(path)).eval()


def ids(*texts: str):
    """Texts of one length as token ids."""
    return {"input_ids": tiny_tokenizer()(list(texts), return_tensors="pt").input_ids}


def state(model) -> dict:
    """Everything that must be as before: modules, parameters and buffers with what trains, mode, adapters."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "tensors": {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors},
        "training": model.training,
        "adapters": sorted(getattr(model, "peft_config", {})),
        "active": getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None,
    }


def assert_same(model, before: dict) -> None:
    now = state(model)
    for key in ("modules", "training", "adapters", "active"):
        assert now[key] == before[key], key
    assert list(now["tensors"]) == list(before["tensors"])
    for name, (tensor, requires_grad) in before["tensors"].items():
        assert torch.equal(now["tensors"][name][0], tensor), name
        assert now["tensors"][name][1] == requires_grad, name
