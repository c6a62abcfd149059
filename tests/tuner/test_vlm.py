# SPDX-License-Identifier: Apache-2.0
"""Laws of SVF on models that see: the language side by default, the vision tower on request. Tiny, random."""

import io

import oracle
import pytest
import seeing
import torch
import transformers as hf
from datasets import Dataset, Image
from peft import PeftModel, get_peft_model
from pico import matrix_of, randomize, svf_layers
from torch import nn
from trainers import FORMS, QUIET, SHORT, STILL, Recorder, flat, offsets, same, trained_z, uneven

from peft_svf import SVFConfig
from peft_svf.evaluation import evaluate
from peft_svf.tasks import get_task
from peft_svf.training.reinforce import ReinforceConfig

IMAGE, VOCABULARY = 60, 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 28, "image_size": 16, "patch_size": 4, "initializer_range": 0.2}
TOWER = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2}


def smolvlm():
    config = hf.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=TOWER, image_token_id=IMAGE, scale_factor=2
    )
    return config, {"pixel_values": torch.randn(1, 1, 3, 16, 16)}, 4


def mistral3():
    """Its vision tower (Pixtral) has a gate_proj, an up_proj and a down_proj, too."""
    config = hf.Mistral3Config(
        text_config={"model_type": "mistral", "head_dim": 6, **TEXT},
        vision_config={"model_type": "pixtral", **TOWER},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return config, {"pixel_values": torch.randn(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}, 4


def qwen2_5_vl():
    """So has this one."""
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 24, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1], "hidden_size": 16, "intermediate_size": 28}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
        vision_config={**vision, "patch_size": 4, "initializer_range": 0.2},
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    pixels = {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return config, pixels, 4


KINDS = {"smolvlm": smolvlm, "mistral3": mistral3, "qwen2_5_vl": qwen2_5_vl}
every_kind = pytest.mark.parametrize("kind", KINDS)
LANGUAGE = {"smolvlm": "model.text_model.", "mistral3": "model.language_model.", "qwen2_5_vl": "model.language_model."}
TOWERS = {
    "smolvlm": r".*vision_model.*\.(fc1|fc2)",
    "mistral3": r".*vision_tower.*feed_forward\.(gate|up|down)_proj",
    "qwen2_5_vl": r".*visual\.blocks.*\.(gate|up|down)_proj",
}


def build(kind):
    """A model that sees, and a question about one image."""
    torch.manual_seed(0)
    config, pixels, tokens = KINDS[kind]()
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    model.config._name_or_path = model.name_or_path = f"pico/{kind}"
    ids = torch.tensor([[5, 62, *[IMAGE] * tokens, 63, 9, 11, 23]])
    if kind == "qwen2_5_vl":
        pixels["mm_token_type_ids"] = (ids == IMAGE).int()
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


@torch.no_grad()
def logits(model, question):
    return model(**question).logits


def linears(model, prefix=""):
    return {n for n, module in model.named_modules() if n.startswith(prefix) and isinstance(module, nn.Linear)}


def fill(model, z):
    for name, vector in z.items():
        module = model.get_submodule(name)
        module.weight.data = oracle.rescaled(matrix_of(module), vector).float()
    return model


@every_kind
def test_default_targets_are_the_mlp_weights_of_the_language_side(kind):
    base, _ = build(kind)
    ends = (".gate_proj", ".up_proj", ".down_proj")
    wanted = {name for name in linears(base, LANGUAGE[kind]) if name.endswith(ends)}
    assert len(wanted) == 6
    model = get_peft_model(base, SVFConfig())
    model.add_adapter("other", SVFConfig(layers_to_transform=[1]))
    layers = svf_layers(model)
    assert layers.keys() == wanted
    second = {name for name, layer in layers.items() if "other" in layer.svf_offset}
    assert second == {name for name in wanted if name.startswith(f"{LANGUAGE[kind]}layers.1.")} and len(second) == 3


@every_kind
@pytest.mark.parametrize("side", ["language", "vision"])
def test_forward_and_gradient_are_those_of_the_paper_formula(kind, side):
    base, question = build(kind)
    expected = logits(base, question)
    model = get_peft_model(base, SVFConfig(target_modules=None if side == "language" else TOWERS[kind])).eval()
    assert torch.equal(logits(model, question), expected)
    assert all(("vision" in name or "visual" in name) == (side == "vision") for name in svf_layers(model))
    z = randomize(model)
    twin = fill(build(kind)[0], z)
    assert (logits(twin, question) - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, question), logits(twin, question), rtol=0, atol=1e-4)
    for one in (model, twin):
        one(**question, labels=question["input_ids"]).loss.backward()
    for name, layer in svf_layers(model).items():
        dz = oracle.dense_gradient(matrix_of(layer), z[name], twin.get_submodule(name).weight.grad)
        found = layer.svf_offset["default"].weight.grad
        assert (found - dz).norm() <= 1e-3 * dz.norm() + 1e-7, name
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all(".svf_offset." in name for name in trained)


@every_kind
@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_save_then_load_is_exact(kind, by, tmp_path):
    base, question = build(kind)
    model = get_peft_model(base, SVFConfig()).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = build(kind)[0]
    if by == "peft":
        loaded = PeftModel.from_pretrained(loaded, tmp_path).eval()
    else:
        loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded, question), logits(model, question))


@every_kind
def test_the_checkpoint_of_a_model_that_sees_gives_the_bases(kind, tmp_path):
    base, _ = build(kind)
    base.save_pretrained(tmp_path)
    stored = hf.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = get_peft_model(base, SVFConfig())
    rounded = get_peft_model(stored, SVFConfig(basis_from="checkpoint", basis_dtype="float32"))
    for name, layer in svf_layers(rounded).items():
        assert torch.equal(layer.svf_basis, svf_layers(exact)[name].svf_basis)


# --- training on images


def textvqa_rows():
    """Rows of TextVQA as they come out of a file: undecoded images, questions of different lengths."""
    task = get_task("textvqa")
    return [
        task.row({"question": "what" * (1 + i), "answers": ["a"] * 10, "id": str(i), "image": {"bytes": png(image)}})
        for i, image in enumerate([*seeing.IMAGES, seeing.IMAGES[0]])
    ]


def png(image):
    found = io.BytesIO()
    image.save(found, "png")
    return found.getvalue()


def sees_and_learns(kind, folder, **settings):
    model, processor = seeing.model(kind), seeing.processor(kind)
    model.lm_head.weight.data.mul_(0.1)  # several tokens are likely
    data = Dataset.from_list(textvqa_rows()).cast_column("image", Image())
    args = ReinforceConfig(str(folder), save_strategy="no", **QUIET, **{**SHORT, "num_generations": 4, **settings})
    return Recorder(
        model, uneven, args, data, eval_dataset=data, processing_class=processor,
        peft_config=SVFConfig(init_weights=False),
    )  # fmt: skip


@pytest.mark.parametrize("kind", seeing.KINDS)
def test_the_gradient_on_images_is_reinforce_on_each_row_with_its_own(kind, tmp_path):
    trainer = sees_and_learns(kind, tmp_path, **STILL)
    processor, model = trainer.processing_class, trainer.model
    trainer.train()
    (output,), (rows,), (texts,) = trainer.outputs, trainer.inputs, trainer.texts
    assert len({row["id"] for row in rows}) == 3

    def logps(i):
        """Log-probability of a completion by one plain forward over an unpadded prompt that is written by hand."""
        row = rows[i]
        text = f"<u>{seeing.PICTURE[kind]}{row['prompt'][0]['content'][1]['text']}<end><a>"
        inputs = processor(text=[text], images=[[row["image"]]], return_tensors="pt")
        prompt = inputs.pop("input_ids")
        tokens = output["completion_ids"][i][output["completion_mask"][i].bool()][None]
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                rest = torch.full_like(tokens, name == "attention_mask")
                inputs[name] = torch.cat([inputs[name], rest], dim=1)
        found = model(input_ids=torch.cat([prompt, tokens], dim=1), use_cache=False, **inputs).logits.log_softmax(-1)
        return found[0, prompt.shape[1] - 1 : -1].gather(1, tokens[0][:, None]).sum()

    policy = torch.stack([logps(i) for i in range(len(rows))])
    rewards = torch.tensor(uneven([[{"content": text}] for text in texts]))
    groups = rewards.view(-1, 4)
    advantages = (groups - (groups.sum(1, keepdim=True) - groups) / 3).flatten()  # minus the mean of the other three
    expected = torch.autograd.grad(-(advantages * policy).mean(), offsets(model))
    same(trainer.gradients[0], flat(expected))


@pytest.mark.parametrize("kind", seeing.KINDS)
def test_an_expert_learns_on_images_is_evaluated_and_saved(kind, tmp_path):
    trainer = sees_and_learns(kind, tmp_path / "run", max_steps=2, eval_strategy="steps", eval_steps=2)
    before = trained_z(trainer).clone()
    trainer.train()
    assert (trained_z(trainer) != before).all()
    assert [record["eval_reward"] for record in trainer.state.log_history if "eval_reward" in record]
    trainer.save_model(str(tmp_path / "expert"))
    expert = PeftModel.from_pretrained(seeing.model(kind), str(tmp_path / "expert"))
    assert torch.equal(flat(p for n, p in expert.named_parameters() if ".svf_offset." in n), trained_z(trainer))
    # the processor that training leaves reads the same rows for evaluation
    summary = evaluate(trainer.model, trainer.processing_class, textvqa_rows(), max_new_tokens=3)
    assert (summary.task, summary.n) == ("textvqa", 3)


@pytest.mark.parametrize("kind", seeing.KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_text_train_a_model_that_sees(kind, form, tmp_path):
    rows, reward = FORMS[form]
    args = ReinforceConfig(str(tmp_path), save_strategy="no", **QUIET, **SHORT, num_generations=4)
    trainer = Recorder(
        seeing.model(kind), reward, args, Dataset.from_list(rows), processing_class=seeing.processor(kind),
        peft_config=SVFConfig(init_weights=False),
    )  # fmt: skip
    before = trained_z(trainer).clone()
    trainer.train()
    assert float(trainer.gradients[0].norm()) > 0 and (trained_z(trainer) != before).any()
