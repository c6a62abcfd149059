# SPDX-License-Identifier: Apache-2.0
"""
Laws of SVF where weights are not simply there: several processes, sharded, partitioned, offloaded, on the meta device.

What needs two processes is a run of two gloo workers, marked slow; each test reads what they left.
"""

import os
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.multiprocessing
import trainers
from peft import PeftModel, get_peft_model
from pico import build, inputs, logits, randomize, svf_layers
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from peft_svf import SVFConfig
from peft_svf.tuner import cache as basis_cache

WEIGHTS = 6  # MLP weights of the pico Llama


def adapt(seed=0, **config):
    return get_peft_model(build("llama", seed=seed, name="pico/llama"), SVFConfig(**config)).train()


def counting(monkeypatch=None):
    """Count the matrices that this process factorises."""
    done = []
    original = basis_cache.factorize

    def factorize(weight):
        done.append(weight.shape)
        return original(weight)

    if monkeypatch is None:
        basis_cache.factorize = factorize
    else:
        monkeypatch.setattr(basis_cache, "factorize", factorize)
    return done


def offsets(model):
    return {name: layer.svf_offset["default"].weight.detach().clone() for name, layer in svf_layers(model).items()}


def batch():
    return inputs(SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False)), batch=4)["input_ids"]


# --- two processes


def worker(rank, folder):
    """What one of two gloo processes does; its findings go into `folder`."""
    os.environ["PEFT_SVF_CACHE"] = f"{folder}/cache"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    factorised = counting()
    model = adapt(plan="merged", init_weights=False)
    found["factorised"] = len(factorised)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    found["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    found["bases are whole"] = all(type(layer.svf_basis) is torch.Tensor for layer in svf_layers(model).values())
    found["fsdp"] = {name: offset.full_tensor() for name, offset in offsets(model).items()}
    model.save_pretrained(f"{folder}/saved", is_main_process=rank == 0)
    found["fsdp logits"] = logits(model.eval(), {"input_ids": batch()})
    found["fsdp served by"] = {layer.svf_chosen for layer in svf_layers(model).values()}
    found["fsdp kept"] = sum(layer.svf_bytes()["merged"] for layer in svf_layers(model).values())
    try:
        model.merge_adapter()
    except TypeError as error:
        found["merge"] = str(error)

    evaluated = adapt(seed=2, task_type="CAUSAL_LM").eval()
    found["whole logits"] = logits(evaluated, {"input_ids": batch()})  # keeps merged weights
    fully_shard(evaluated.base_model)  # the root isn't part of the base, nor is z whole when the call begins
    evaluated.add_adapter("second", SVFConfig())
    found["root logits"] = logits(evaluated, {"input_ids": batch()})

    del factorised[:]
    base = build("llama", seed=1, name="pico/llama")  # not in the cache yet
    for block in base.model.layers:
        fully_shard(block)
    late = get_peft_model(base, SVFConfig())
    found["factorised late"] = len(factorised)
    found["late bases"] = {name: layer.svf_basis for name, layer in svf_layers(late).items()}
    found["late logits"] = logits(late.eval(), {"input_ids": batch()})
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found, in order of their rank, and the folder they saved to."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_one_process_factorises_and_the_others_read(ranks):
    assert sum(found["factorised"] for found in ranks[0]) == WEIGHTS
    assert sum(found["factorised late"] for found in ranks[0]) == WEIGHTS


@pytest.mark.slow
def test_sharded_weights_are_never_copied_whole(ranks):
    for found in ranks[0]:
        assert found["sharded"] and found["bases are whole"]
        assert found["fsdp served by"] == {"narrow"}
        assert found["fsdp kept"] == 0
        assert "sharded weight cannot be merged" in found["merge"]


@pytest.mark.slow
def test_a_model_that_has_answered_is_sharded_at_its_root_and_takes_another_adapter(ranks):
    for found in ranks[0]:
        torch.testing.assert_close(found["root logits"], found["whole logits"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_sharded_z_is_saved_whole_and_loads_in_one_process(ranks):
    (found, _), folder = ranks
    stored = load_file(folder / "saved" / "adapter_model.safetensors")
    same(stored, {f"base_model.model.{name}.svf_offset.weight": z for name, z in found["fsdp"].items()})
    loaded = PeftModel.from_pretrained(build("llama", name="pico/llama"), folder / "saved").eval()
    torch.testing.assert_close(logits(loaded, {"input_ids": batch()}), found["fsdp logits"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_base_that_is_sharded_already_gets_the_bases_of_the_whole_weights(ranks):
    whole = adapt(seed=1).eval()
    for found in ranks[0]:
        same(found["late bases"], {name: layer.svf_basis for name, layer in svf_layers(whole).items()})
        torch.testing.assert_close(found["late logits"], logits(whole, {"input_ids": batch()}), rtol=0, atol=1e-4)


# --- the trainer on shards

FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: FULL_STATE_DICT
num_machines: 1
mixed_precision: 'no'
use_cpu: true
"""
SHARDED = """
import sys, torch, trainers as t
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft_svf.training.evolution import EvolutionConfig, EvolutionTrainer

class Config(t.ReinforceConfig):
    def __post_init__(self):
        super().__post_init__()
        self.device  # starts the processes, which accelerate would not shard as they are no GPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

t.ReinforceConfig = Config
folder, found = sys.argv[1], {}
try:
    t.divided(folder, "choice", 2)
except ValueError as error:
    found["choice"] = str(error)
try:
    args = EvolutionConfig(folder, **t.QUIET)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    EvolutionTrainer(
        t.tiny_model(), t.uneven, args, t.TEXT_ROWS, processing_class=t.TOKENIZER, peft_config=t.SVFConfig()
    )
except ValueError as error:
    found["evolution"] = str(error)
trainer = t.divided(folder, "generate", 2)
trainer.train()
layers = [module for module in trainer.model.modules() if hasattr(module, "svf_chosen")]
found["plans"] = {layer.svf_chosen for layer in layers}
found["kinds"] = {type(p).__name__ for p in trainer.model.parameters()}
found["log"] = trainer.state.log_history[0]["z/mean_distance_from_1"]
found["z"] = t.flat(p.full_tensor() for p in t.offsets(trainer.model))
trainer.save_model(f"{folder}/saved")
torch.save(found, f"{folder}/{trainer.args.process_index}.pt")
trainer.accelerator.end_training()
"""


@pytest.fixture(scope="module")
def trained_on_shards(tmp_path_factory):
    """What two processes found that trained on shards, as accelerate's FSDP2 makes them, and where they saved."""
    folder = tmp_path_factory.mktemp("shards")
    return trainers.in_two_processes(SHARDED, folder, config=FSDP), folder


@pytest.mark.slow
def test_the_trainer_on_shards_takes_the_step_of_one_process_with_the_whole_batch(trained_on_shards, tmp_path):
    (one, other), folder = trained_on_shards
    alone = trainers.divided(tmp_path, "generate", 4)
    start = trainers.trained_z(alone).clone()
    alone.train()
    assert one["kinds"] == {"DTensor"} and one["plans"] == {"narrow"}
    assert torch.equal(one["z"], other["z"])
    trainers.same(one["z"] - start, trainers.trained_z(alone) - start)
    assert one["log"] == other["log"] == pytest.approx(float(start.abs().mean()))
    stored = load_file(folder / "saved" / "adapter_model.safetensors")
    names = [name.replace(".default", "") for name, p in alone.model.named_parameters() if p.requires_grad]
    assert torch.equal(torch.cat([stored[name] for name in names]), one["z"])


@pytest.mark.slow
def test_rows_with_choices_and_evolution_are_refused_on_shards(trained_on_shards):
    for found in trained_on_shards[0]:
        assert "different numbers of forwards" in found["choice"] and "Use DDP" in found["choice"]
        assert "EvolutionTrainer moves whole z-vectors" in found["evolution"]


# --- one process


def test_a_parameter_that_took_the_place_of_the_known_one_is_not_copied():
    """FSDP puts a gathered weight in the place of the sharded one while a module runs; one process cannot shard."""
    model = adapt(plan="merged").eval()
    layers = svf_layers(model).values()
    logits(model)
    assert {layer.svf_chosen for layer in layers} == {"merged"}
    for layer in layers:
        layer.base_layer._parameters["weight"] = nn.Parameter(layer.base_layer.weight.data.clone(), False)
    expected = logits(model)
    assert {layer.svf_chosen for layer in layers} == {"narrow"}
    model.set_plan("merged")  # says that it is there to stay
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert {layer.svf_chosen for layer in layers} == {"merged"}


def test_weights_that_zero3_has_partitioned_are_refused():
    base = build("llama")
    base.model.layers[1].mlp.up_proj.weight.ds_id = 7
    base.model.layers[1].mlp.up_proj.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"ZeRO-3 has partitioned.*use DDP, ZeRO-1 or ZeRO-2, or FSDP2"):
        get_peft_model(base, SVFConfig())
    assert not svf_layers(base)
    model = adapt()
    for layer in svf_layers(model).values():
        layer.base_layer.weight.ds_id = 7
    with pytest.raises(ValueError, match="ZeRO-3"):
        logits(model)


# --- offloaded and on the meta device


def cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def mixed(model, folder):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


everywhere = pytest.mark.parametrize("offload", [cpu, disk, mixed])


@everywhere
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_an_offloaded_base_is_factorised_once_and_answers_as_in_memory(kind, offload, tmp_path, monkeypatch):
    if kind == "gpt2" and offload is mixed:
        pytest.skip("its device map names the modules of Llama")
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "cache"))
    targets = {"target_modules": "all-linear"} if kind == "qwen2" else {}  # k and v have biases
    done = counting(monkeypatch)
    model = get_peft_model(offload(build(kind), tmp_path / "weights"), SVFConfig(**targets)).eval()
    assert len(done) == len(svf_layers(model))
    whole = get_peft_model(build(kind), SVFConfig(**targets)).eval()
    assert len(done) == len(svf_layers(model))
    z = randomize(model)
    assert z.keys() == randomize(whole).keys()
    whole.set_plan("narrow")
    assert torch.equal(logits(model), logits(whole))
    assert any(layer.base_layer.weight.is_meta for layer in svf_layers(model).values())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(kind)))


@everywhere
def test_z_trains_on_an_offloaded_base(offload, tmp_path):
    ids = batch()
    found = []
    for place in (offload, lambda model, _: model):
        model = get_peft_model(place(build("qwen2", dtype=torch.bfloat16), tmp_path), SVFConfig(plan="narrow")).train()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([layer.svf_offset["default"].weight.grad for layer in svf_layers(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@everywhere
def test_an_expert_loads_on_an_offloaded_base_without_a_second_factorisation(offload, tmp_path, monkeypatch):
    trained = adapt().eval()
    randomize(trained)
    trained.save_pretrained(tmp_path / "expert")
    done = counting(monkeypatch)
    base = offload(build("llama", name="pico/llama"), tmp_path / "weights")
    loaded = PeftModel.from_pretrained(base, tmp_path / "expert", offload_folder=str(tmp_path / "more")).eval()
    assert done == []
    trained.set_plan("narrow")
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=1e-4)


@pytest.mark.parametrize("offload", [cpu, disk])
def test_a_model_that_is_offloaded_with_its_adapter_answers_saves_and_merges_as_in_memory(offload, tmp_path):
    model, whole = adapt().eval(), adapt().eval()
    randomize(model)
    randomize(whole)
    whole.set_plan("narrow")
    model = offload(model, tmp_path / "weights")
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "expert")
    loaded = PeftModel.from_pretrained(build("llama", name="pico/llama"), tmp_path / "expert").eval()
    loaded.set_plan("narrow")
    assert torch.equal(logits(loaded), logits(whole))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)


def test_merging_an_offloaded_base_is_merging_it_in_memory(tmp_path):
    model, whole = get_peft_model(cpu(build("llama"), tmp_path), SVFConfig()), adapt()
    for one in (model, whole):
        randomize(one)
        one.eval().merge_adapter()
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build("llama")))


def without_weights():
    """A base whose MLP weights are on the meta device."""
    base = build("llama", name="pico/llama")
    for block in base.model.layers:
        for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            linear.weight = nn.Parameter(linear.weight.data.to("meta"))
    return base


def test_weights_that_come_after_the_adapter_get_their_bases_in_the_next_forward(monkeypatch):
    whole = adapt().eval()
    randomize(whole)
    done = counting(monkeypatch)
    model = get_peft_model(without_weights(), SVFConfig()).eval()
    assert all(layer.svf_basis is None for layer in svf_layers(model).values())
    model.load_state_dict(whole.state_dict(), assign=True)
    whole.set_plan("narrow")
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-4)
    assert done == []
    model.set_plan("merged")
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_expert_is_checked_when_the_weights_of_its_base_have_come(seed, tmp_path):
    trained = adapt().eval()
    randomize(trained)
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(without_weights(), tmp_path, low_cpu_mem_usage=True).eval()
    model.load_state_dict(adapt(seed).state_dict() | offset_state(trained), assign=True)
    if seed:
        with pytest.raises(ValueError, match="does not belong to this base model"):
            logits(model)
    else:
        torch.testing.assert_close(logits(model), logits(trained), rtol=0, atol=1e-4)


def offset_state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "svf_offset" in name}
