# SPDX-License-Identifier: Apache-2.0
"""TRL's own trainers take SVF adapters as they are: what they move, what they refer to, what they send to vLLM."""

import math
from contextlib import nullcontext

import pico
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_model import tiny_model
from trainers import QUIET, TEXT_ROWS, TOKENIZER, offsets, trained_z, uneven
from transformers import LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.generation.vllm_generation import VLLMGeneration

from peft_svf import SVFConfig


def said(text):
    return [{"role": "assistant", "content": text}]


ROLLOUTS = {"num_generations": 3, "per_device_train_batch_size": 6, "max_completion_length": 5}
BATCHING = {"use_transformers_continuous_batching": True}  # its cache takes 60 % of the memory if it isn't bounded
BATCHING["transformers_continuous_batching_config"] = {"num_blocks": 32, "max_batch_tokens": 128}
PAIRS = {"per_device_train_batch_size": 2, "max_length": 64}
STOCK = {  # trainer, its config with settings, its rows
    "grpo": (GRPOTrainer, GRPOConfig, ROLLOUTS, TEXT_ROWS),
    "grpo-batching": (GRPOTrainer, GRPOConfig, {**ROLLOUTS, **BATCHING}, TEXT_ROWS),
    "rloo": (RLOOTrainer, RLOOConfig, ROLLOUTS, TEXT_ROWS),
    "sft": (SFTTrainer, SFTConfig, PAIRS, [{"messages": row["prompt"] + said("abc")} for row in TEXT_ROWS]),
    "dpo": (
        DPOTrainer, DPOConfig, PAIRS,
        [{"prompt": row["prompt"], "chosen": said("abc"), "rejected": said("xy")} for row in TEXT_ROWS],
    ),
    "kto": (
        KTOTrainer, KTOConfig, {**PAIRS, "loss_type": "kto"},
        [{"prompt": r["prompt"], "completion": said("abc"), "label": i % 2 == 0} for i, r in enumerate(TEXT_ROWS)],
    ),
    "reward": (
        RewardTrainer, RewardConfig, PAIRS,
        [{"chosen": row["prompt"] + said("abc"), "rejected": row["prompt"] + said("xy")} for row in TEXT_ROWS],
    ),
}  # fmt: skip
REFERRING = ["grpo", "rloo", "dpo", "kto"]  # those that compare with a reference model


def base_of(kind):
    if kind != "reward":
        return tiny_model(), "CAUSAL_LM"
    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config).eval(), "SEQ_CLS"


def stock(kind, folder, model, peft_config=None, **settings):
    trainer, config, own, rows = STOCK[kind]
    common = {"output_dir": str(folder), "save_strategy": "no", "max_steps": 2, "learning_rate": 0.01, **QUIET}
    rewards = {"reward_funcs": uneven} if kind.startswith(("grpo", "rloo")) else {}
    return trainer(
        model=model, args=config(**{**common, **own, **settings}), train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER, peft_config=peft_config, **rewards,
    )  # fmt: skip


@pytest.mark.parametrize("kind", STOCK)
def test_stock_trainers_move_z_alone_and_save_an_ordinary_adapter(kind, tmp_path):
    model, task = base_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("score")}
    trainer = stock(kind, tmp_path, model, SVFConfig(task_type=task))
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trainable if "score.modules_to_save" in name}
    assert bool(heads) is (kind == "reward")  # PEFT trains the head of a classifier along
    assert trainable - heads and all("svf_offset" in name for name in trainable - heads)
    start = trained_z(trainer)
    trainer.train()
    moved = [p for n, p in trainer.model.named_parameters() if "svf_offset" in n]
    assert all(float(parameter.detach().abs().max()) > 1e-3 for parameter in moved)
    assert not torch.equal(start, trained_z(trainer))
    trainer.save_model(str(tmp_path / "expert"))
    loaded = PeftModel.from_pretrained(base_of(kind)[0], tmp_path / "expert", is_trainable=True)
    assert all(torch.equal(*pair) for pair in zip(offsets(loaded), offsets(trainer.model), strict=True))
    after = trainer.model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", REFERRING)
def test_a_trained_expert_passed_in_is_its_own_reference(kind, tmp_path):
    model = get_peft_model(tiny_model(), SVFConfig(task_type="CAUSAL_LM", init_weights=False))
    trainer = stock(kind, tmp_path, model, beta=0.1)
    layers = pico.svf_layers(trainer.model)
    assert layers
    start = {name: layer.svf_offset["default"].weight.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        assert torch.equal(layer.svf_offset["ref"].weight, start[name])
        assert layer.svf_offset["default"].weight.requires_grad
        assert not layer.svf_offset["ref"].weight.requires_grad
    trainer.train()
    for name, layer in layers.items():
        assert torch.equal(layer.svf_offset["ref"].weight, start[name])
        assert not torch.equal(layer.svf_offset["default"].weight, start[name])


@pytest.mark.parametrize("kind, loss", [("dpo", math.log(2)), ("kto", 0.5)])
def test_the_base_is_the_reference_of_a_new_expert(kind, loss, tmp_path):
    """Policy and reference agree before the first step: the loss is that of a margin of 0."""
    trainer = stock(kind, tmp_path, tiny_model(), SVFConfig(task_type="CAUSAL_LM"), max_steps=1, beta=0.1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)


class Alone:
    """One process without sharding, as TRL's helper would find it."""

    is_fsdp = False

    def gather_params(self, parameters):
        return nullcontext()


def stream(model):
    """TRL's own iterator over the names and values that it sends, without an engine to send to."""
    generation = object.__new__(VLLMGeneration)
    generation.model, generation._dist = model, Alone()
    return generation._iter_named_params()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stream_to_vllm_is_the_merged_base_under_its_own_names(dtype):
    plain = tiny_model(dtype=dtype)
    svf = SVFConfig(task_type="CAUSAL_LM", init_weights=False, basis_dtype="float32")
    model = get_peft_model(tiny_model(dtype=dtype), svf)
    z = {name: 1 + layer.svf_offset["default"].weight.detach() for name, layer in pico.svf_layers(model).items()}
    sent = {name: value.clone() for name, value in stream(model)}
    wanted = dict(pico.fill(tiny_model(dtype=dtype), z).named_parameters())
    assert list(sent) == list(dict(plain.named_parameters()))
    adapted = {f"{name}.weight" for name in z}
    assert adapted and adapted < set(sent)
    for name, value in sent.items():
        assert (value.dtype, value.shape) == (dtype, wanted[name].shape)
        if name in adapted:
            torch.testing.assert_close(value, wanted[name].detach())
            assert not torch.equal(value, plain.get_parameter(name))
        else:
            assert torch.equal(value, plain.get_parameter(name))


def test_a_hundred_syncs_in_bfloat16_do_not_drift():
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), SVFConfig(task_type="CAUSAL_LM", init_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = {name: value.clone() for name, value in stream(model)}
    for _ in range(99):
        for name, value in stream(model):
            assert torch.equal(value, first[name]), name
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_modules_that_are_saved_whole_are_sent_under_their_own_name():
    model = get_peft_model(tiny_model(), SVFConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    sent = {name: value.clone() for name, value in stream(model)}
    assert set(sent) == {name for name, _ in tiny_model().named_parameters()}
    torch.testing.assert_close(sent["lm_head.weight"], tiny_model().lm_head.weight.detach() + 1)
