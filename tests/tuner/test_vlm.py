# SPDX-License-Identifier: Apache-2.0
"""Laws of SVF on models that see: the language side by default, the vision tower on request. Tiny, random."""

import oracle
import pytest
import seeing
import torch
from datasets import Dataset, Image
from peft import PeftModel, get_peft_model
from pico import fill, matrix_of, randomize, svf_layers
from trainers import FORMS, STILL, flat, offsets, same, trained_z, trainer_of, uneven

from peft_svf import SVFConfig
from peft_svf.evaluation import evaluate
from peft_svf.tasks import get_task

every_kind = pytest.mark.parametrize("kind", seeing.KINDS)
LANGUAGE = {"idefics3": "model.text_model.", "qwen2_5_vl": "model.language_model."}
TOWERS = {"idefics3": r".*vision_model.*\.(fc1|fc2)", "qwen2_5_vl": r".*visual\.blocks.*\.(gate|up|down)_proj"}


def question(kind):
    """A question about one image, as its processor reads it."""
    text = f"<u>{seeing.PICTURE[kind]}what?<end><a>"
    inputs = seeing.processor(kind)(text=[text], images=[[seeing.IMAGES[0]]], return_tensors="pt")
    return {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}


@torch.no_grad()
def logits(model, kind):
    return model(**question(kind)).logits


@every_kind
def test_default_targets_are_the_mlp_weights_of_the_language_side(kind):
    wanted = {f"{LANGUAGE[kind]}layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}
    model = get_peft_model(seeing.model(kind), SVFConfig())
    model.add_adapter("other", SVFConfig(layers_to_transform=[1]))
    layers = svf_layers(model)
    assert layers.keys() == wanted
    second = {name for name, layer in layers.items() if "other" in layer.svf_offset}
    assert second == {name for name in wanted if ".layers.1." in name}


@every_kind
@pytest.mark.parametrize("side", ["language", "vision"])
def test_forward_and_gradient_are_those_of_the_paper_formula(kind, side):
    base, ids = seeing.model(kind), question(kind)
    expected = logits(base, kind)
    model = get_peft_model(base, SVFConfig(target_modules=None if side == "language" else TOWERS[kind])).eval()
    assert torch.equal(logits(model, kind), expected)
    assert all(("vision" in name or "visual" in name) == (side == "vision") for name in svf_layers(model))
    z = randomize(model)
    twin = fill(seeing.model(kind), z)
    assert (logits(twin, kind) - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, kind), logits(twin, kind), rtol=0, atol=1e-4)
    for one in (model, twin):
        one(**ids, labels=ids["input_ids"]).loss.backward()
    for name, layer in svf_layers(model).items():
        dz = oracle.dense_gradient(matrix_of(layer), z[name], twin.get_submodule(name).weight.grad)
        found = layer.svf_offset["default"].weight.grad
        assert (found - dz).norm() <= 1e-3 * dz.norm() + 1e-7, name
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all(".svf_offset." in name for name in trained)


@every_kind
@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_save_then_load_is_exact(kind, by, tmp_path):
    model = get_peft_model(seeing.model(kind), SVFConfig()).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = seeing.model(kind)
    if by == "peft":
        loaded = PeftModel.from_pretrained(loaded, tmp_path).eval()
    else:
        loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded, kind), logits(model, kind))


def textvqa_rows():
    """Rows of TextVQA as they come out of a file: undecoded images, questions of different lengths."""
    task = get_task("textvqa")
    return [
        task.row(
            {"question": "what" * (1 + i), "answers": ["a"] * 10, "id": str(i), "image": {"bytes": seeing.png(image)}}
        )
        for i, image in enumerate([*seeing.IMAGES, seeing.IMAGES[0]])
    ]


def sees_and_learns(kind, folder, **settings):
    model = seeing.model(kind)
    model.lm_head.weight.data.mul_(0.1)  # several tokens are likely
    data = Dataset.from_list(textvqa_rows()).cast_column("image", Image())
    settings = {"num_generations": 4, "eval_rows": data, "reader": seeing.processor(kind), **settings}
    return trainer_of(folder, data, uneven, model=model, **settings)


@every_kind
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


@every_kind
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


@every_kind
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_text_train_a_model_that_sees(kind, form, tmp_path):
    model, reader = seeing.model(kind), seeing.processor(kind)
    trainer = trainer_of(tmp_path, *FORMS[form], model=model, reader=reader, num_generations=4)
    before = trained_z(trainer).clone()
    trainer.train()
    assert float(trainer.gradients[0].norm()) > 0 and (trained_z(trainer) != before).any()
