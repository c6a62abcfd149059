# SPDX-License-Identifier: Apache-2.0
"""What is exported answers as the expert does: in plain transformers, in PEFT's LoRA, and read back from GGUF."""

import json
import os
import string
from pathlib import Path

import oracle
import pico
import pytest
import torch
from command_line import run
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from peft_svf import Expert, SVFConfig
from peft_svf.experts.export import export_gguf, export_lora, export_merged, merge_expert, new_place

EXAMPLE = Path(__file__).parents[2] / "benchmarks" / "experts" / "math"
KINDS = ["llama", "qwen2", "gpt2"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def answers(model):
    ids = pico.inputs(model)["input_ids"]
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)


def write(folder, kind="llama", seed=1, scale=0.5, base=None, **config):
    """Save a base and an expert of it; return the expert and the model that answers with it."""
    home = folder / f"{kind}-base"
    (pico.build(kind) if base is None else base).save_pretrained(home)
    model = get_peft_model(load(home), SVFConfig(task_type="CAUSAL_LM", **config))
    pico.randomize(model, seed=seed, scale=scale)
    model.save_pretrained(folder / f"{kind}-{seed}")
    return Expert.load(folder / f"{kind}-{seed}"), model.eval()


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def byte_level(size):
    """A tokenizer with byte-level BPE and as many tokens as the model has embeddings, or a few less."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = [*special, *string.ascii_lowercase, *string.digits, "Ġ", "th", "the"]
    vocabulary = {token: i for i, token in enumerate(alphabet[:size])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_merged_checkpoint_answers_as_the_expert_does(kind, tmp_path):
    stacks = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]} if kind == "mixtral" else {}
    expert, model = write(tmp_path, kind, **stacks)
    export_merged(expert, load(tmp_path / f"{kind}-base"), tmp_path / "merged", byte_level(53))
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(pico.logits(merged), pico.logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(answers(merged), answers(model))
    assert not torch.equal(pico.logits(merged), pico.logits(load(tmp_path / f"{kind}-base")))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the")["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_weights_are_those_of_merge_and_unload(kind, dtype, tmp_path):
    expert, _ = write(tmp_path, kind)  # its checkpoint is float32: the basis is that of the file
    base, merged = tmp_path / f"{kind}-base", load(tmp_path / f"{kind}-base", dtype=dtype)
    merge_expert(expert, merged)
    model = PeftModel.from_pretrained(load(base, dtype=dtype), tmp_path / f"{kind}-1").merge_and_unload()
    for name, parameter in model.named_parameters():
        ours, theirs = merged.get_parameter(name).float(), parameter.float()
        apart = 0 if dtype == torch.float32 else 0.01  # the tuner keeps the basis of a bfloat16 model in bfloat16
        assert (ours - theirs).norm() <= apart * theirs.norm(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [None, 5])
def test_lora_of_all_directions_is_the_expert(kind, rank, tmp_path):
    expert, model = write(
        tmp_path, kind, rank=rank, target_modules=["down_proj", "q_proj"] if kind != "gpt2" else None
    )
    report = export_lora(expert, load(tmp_path / f"{kind}-base"), tmp_path / "lora")
    lora = PeftModel.from_pretrained(load(tmp_path / f"{kind}-base"), tmp_path / "lora").eval()
    torch.testing.assert_close(pico.logits(lora), pico.logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(answers(lora), answers(model))
    assert all(of["error"] == 0 and of["rank"] <= (rank or 24) for of in report.values())


def test_mixture_of_experts_of_rank_k_is_one_lora_of_rank_k(tmp_path):
    a, _ = write(tmp_path, seed=1, rank=5)
    b, _ = write(tmp_path, seed=2, rank=5)
    mixture, base = 0.7 * a + 0.4 * b, tmp_path / "llama-base"
    report = export_lora(mixture, load(base), tmp_path / "lora")
    assert {of["rank"] for of in report.values()} == {5}
    merged = load(base)
    merge_expert(mixture, merged)
    lora = PeftModel.from_pretrained(load(base), tmp_path / "lora").eval()
    torch.testing.assert_close(pico.logits(lora), pico.logits(merged), rtol=1e-4, atol=1e-4)


def test_truncated_lora_keeps_the_best_directions_and_reports_what_it_leaves_out(tmp_path):
    expert, _ = write(tmp_path)
    base = load(tmp_path / "llama-base")
    report = export_lora(expert, base, tmp_path / "lora", rank=9, force=True)
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["relative_error"]) == report
        for kind, of in report.items():
            missed = total = 0.0
            for name in (name for name in expert.z if name.endswith(kind)):
                W = pico.matrix_of(base.get_submodule(name)).double()
                change = oracle.rescaled(W, expert.z[name]) - W
                A, B = (file.get_tensor(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
                left = change - B.double() @ A.double()
                best = torch.linalg.svdvals(change)[9:].norm()
                torch.testing.assert_close(left.norm(), best, rtol=1e-4, atol=1e-5)
                missed, total = missed + left.norm().square(), total + change.norm().square()
            assert of["error"] == pytest.approx(float((missed / total).sqrt()), rel=1e-3)


def test_share_of_the_change_sets_the_rank_of_each_weight(tmp_path):
    expert, model = write(tmp_path)
    report = export_lora(expert, load(tmp_path / "llama-base"), tmp_path / "lora", rank=0.999)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] and config["lora_alpha"] == config["r"]
    assert len({config["r"], *config["rank_pattern"].values()}) > 1
    assert all(0 < of["error"] <= 0.001**0.5 for of in report.values())
    lora = PeftModel.from_pretrained(load(tmp_path / "llama-base"), tmp_path / "lora").eval()
    near = (pico.logits(lora) - pico.logits(model)).norm() / pico.logits(model).norm()
    assert 0 < near < 0.05


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype, near", [("f32", 0), ("f16", 5e-3), ("q8_0", 5e-2)])
def test_gguf_read_back_is_the_merged_model(kind, dtype, near, tmp_path):
    config = pico.config(kind, tie_word_embeddings=kind == "qwen2")
    config.hidden_size, config.intermediate_size = 32, 64  # rows of 32, so that Q8_0 has something to pack
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    expert, model = write(tmp_path, kind, base=base)
    export_gguf(expert, load(tmp_path / f"{kind}-base"), tmp_path / "files" / "x.gguf", byte_level(53), dtype)
    back = load(tmp_path / "files", gguf_file="x.gguf", dtype=torch.float32)
    expected = pico.logits(model)
    assert (pico.logits(back) - expected).norm() <= (near or 1e-5) * expected.norm()
    if dtype == "f32":
        assert torch.equal(answers(back), answers(model))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "files", gguf_file="x.gguf")
        assert tokenizer("the 7th")["input_ids"] == byte_level(53)("the 7th")["input_ids"]


def test_what_cannot_be_exported_is_refused_by_name_and_nothing_is_left(tmp_path):
    expert, model = write(tmp_path)
    home, out = tmp_path / "llama-base", tmp_path / "out"
    stacks = {"target_parameters": ["experts.gate_up_proj"], "target_modules": []}
    stacked, _ = write(tmp_path, "mixtral", **stacks)
    gpt2, _ = write(tmp_path, "gpt2")
    tied = load(home)
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    packed = load(home)
    packed.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(40, 24, dtype=torch.int8), False)
    half = Expert("half", {name: offset[:7] for name, offset in expert.offsets.items()}, {"rank": 7})
    refusals = {
        "does not belong to this base": lambda: export_merged(expert, pico.build("llama", seed=3, name="x"), out),
        "has adapters": lambda: export_merged(expert, model, out),
        "share one weight": lambda: export_merged(half, tied, out),
        "up_proj of .*, a Linear, has no linear weight.*not quantised": lambda: export_merged(expert, packed, out),
        "stacked weights go into merged": lambda: export_lora(stacked, load(tmp_path / "mixtral-base"), out),
        r"leaves out \d\d": lambda: export_lora(expert, load(home), out, rank=3),
        "architecture 'gpt2'.*convert_hf_to_gguf.py merged": lambda: export_gguf(
            gpt2, load(tmp_path / "gpt2-base"), out, byte_level(53)
        ),
        "exists already": lambda: export_merged(expert, load(home), home),
    }
    for message, refused in refusals.items():
        with pytest.raises((ValueError, FileExistsError), match=message):
            refused()
        assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_a_full_disk_leaves_nothing_and_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"can't be written: .*No space left"), new_place(tmp_path / "new") as scratch:
        scratch.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert not os.listdir(tmp_path)


@pytest.mark.real
@pytest.mark.filterwarnings("default")
def test_all_exports_of_a_real_expert_give_its_greedy_tokens(tmp_path):
    home = os.environ["PEFT_SVF_SMOLLM2"]
    tokenizer = AutoTokenizer.from_pretrained(home)
    expert = Expert.load(EXAMPLE)

    def base():
        return load(home, dtype=torch.float32)

    def tokens(model):
        prompts = ["What is 7 + 8?", "Write a function that adds two numbers.", "Why is the sky blue?"]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        encoded = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
        return [model.generate(**x, max_new_tokens=32, do_sample=False).tolist() for x in encoded]

    plain, expected = tokens(base()), tokens(PeftModel.from_pretrained(base(), EXAMPLE).eval())
    assert all(a != b for a, b in zip(plain, expected, strict=True))
    export_merged(expert, base(), tmp_path / "merged", tokenizer)
    assert tokens(load(tmp_path / "merged")) == expected
    for rank in (None, 512):
        report = export_lora(expert, base(), tmp_path / f"{rank}", rank)
        assert all(of["error"] < (0.025 if rank else 1e-9) for of in report.values())
        assert tokens(PeftModel.from_pretrained(base(), tmp_path / f"{rank}").eval()) == expected
    for dtype in ("f32", "f16", "q8_0"):
        export_gguf(expert, base(), tmp_path / f"svf-{dtype}.gguf", tokenizer, dtype)
        assert tokens(load(tmp_path, gguf_file=f"svf-{dtype}.gguf", dtype=torch.float32)) == expected
    text = "Hello, 1234 wörld!\n\tdef f(x):  return x"
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="svf-f32.gguf")
    assert again(text).input_ids == tokenizer(text).input_ids and again.chat_template == tokenizer.chat_template


def test_command_line_exports_a_mixture_and_imports_it_again(tmp_path, capsys):
    write(tmp_path, seed=1, rank=5)
    write(tmp_path, seed=2, rank=5)
    home = tmp_path / "llama-base"
    byte_level(53).save_pretrained(home)
    sources = [f"math={tmp_path / 'llama-1'}", f"code={tmp_path / 'llama-2'}"]
    mixed = ["export", *sources, "--mixture", "math=0.7", "--mixture", "code=0.3"]
    merged, lora, file = tmp_path / "merged", tmp_path / "lora", tmp_path / "x.gguf"
    assert run(capsys, *mixed, "--to", "merged", "--out", merged)[0] == 0
    status, out, _ = run(capsys, *mixed, "--to", "lora", "--out", lora)
    assert status == 0 and "down_proj  5     0.00%" in out and "--max-lora-rank 8" in out
    assert run(capsys, *mixed, "--to", "gguf", "--out", file, "--type", "f32")[0] == 0 and file.is_file()
    expected = pico.logits(load(merged))
    for source in (merged, lora):
        out = tmp_path / f"from-{source.name}"
        status, shown, _ = run(capsys, "import", source, "--model", home, "--out", out, "--description", "both")
        assert status == 0 and "all" in shown and "100.0%" in shown
        again = PeftModel.from_pretrained(load(home), out).eval()
        torch.testing.assert_close(pico.logits(again), expected, rtol=1e-3, atol=1e-3)
        assert Expert.load(out).description == "both"
    for message, argv in {
        "a weight by --mixture": ["export", *sources, "--to", "lora", "--out", tmp_path / "new"],
        "exclude each other": [*mixed, "--to", "lora", "--out", tmp_path / "new", "--rank", "3", "--energy", "0.9"],
        "exists already": [*mixed, "--to", "merged", "--out", merged],
        "there are math, code": ["export", *sources, "--mixture", "art=1", "--to", "lora", "--out", tmp_path / "new"],
    }.items():
        status, _, error = run(capsys, *argv)
        assert status and message in error
