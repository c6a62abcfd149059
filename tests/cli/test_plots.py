# SPDX-License-Identifier: Apache-2.0
"""Laws of figures: what is drawn is what was computed, and what is computed are plain means of abs(z - 1)."""

import io
import itertools
import math

import pytest
import torch

from peft_svf import Expert, Mixture
from peft_svf.cli.plots import (
    distances,
    draw_alpha,
    draw_decisions,
    draw_effects,
    draw_layers,
    draw_probabilities,
    new_figure,
    save_figure,
    spectrum,
)


def expert(**lengths):
    """An expert with random z by module name, `__` for a dot."""
    draws = torch.Generator().manual_seed(0)
    return Expert("e", {name.replace("__", "."): torch.randn(k, generator=draws) for name, k in lengths.items()})


@pytest.fixture
def axes():
    return new_figure(1)[1][0]


def labels(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def test_distances_are_the_means_of_each_layer_and_kind():
    found = expert(model__layers__10__mlp__up=3, model__layers__2__mlp__up=5, model__layers__2__attn__q=7)
    layers, kinds, table = distances(found)
    assert layers == ["2", "10"] and sorted(kinds) == ["attn.q", "mlp.up"]  # by number, not by letter
    for module, offset in found.offsets.items():
        _, _, layer, *kind = module.split(".")
        mean = sum(map(abs, offset.tolist())) / len(offset)
        assert table[layers.index(layer), kinds.index(".".join(kind))] == pytest.approx(mean)
    assert math.isnan(table[layers.index("10"), kinds.index("attn.q")])


def test_experts_of_a_layer_are_one_kind_and_stacks_and_lone_modules_have_names():
    found = expert(layers__0__mlp__experts__0__up=3, layers__0__mlp__experts__1__up=5)
    layers, kinds, table = distances(found)
    assert (layers, kinds) == (["0"], ["mlp.experts.up"])
    assert table.item() == pytest.approx(torch.cat(list(found.offsets.values())).abs().mean().item())
    layers, _, table = distances(expert(encoder__block__0__wi=3, decoder__block__0__wi=4, decoder__block__1__wi=5))
    assert layers == ["decoder.block.0", "decoder.block.1", "encoder.block.0"] and table.shape == (3, 1)
    assert distances(expert(fc=3))[:2] == (["-"], ["fc"])


def test_the_spectrum_is_cut_into_parts_whose_means_are_averaged_over_weights():
    found = Expert("e", {"a": torch.tensor([4.0, -2.0, 1.0, 1.0]), "b": torch.tensor([1.0, 0.0]), "c": torch.ones(1)})
    assert spectrum(found, 2).tolist() == pytest.approx([(3 + 1) / 2, (1 + 0) / 2])  # "c" is too short
    assert spectrum(found, 5) is None


def test_effects_of_blocks_are_bars_with_the_interval_of_the_examples(axes):
    effects = {"all": [2.0, 4.0], **{f"model.layers.{i}": [0.1 * i, 0.3 * i] for i in range(40)}}
    draw_effects(axes, effects, "price")
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.2 * i for i in range(40)])
    (low, high) = axes.collections[0].get_segments()[10]
    assert (high[1] - low[1]) / 2 == pytest.approx(1.96 * 1.0 / 2**0.5)
    assert labels(axes.xaxis) == [str(i) for i in range(0, 40, 3)]
    assert axes.get_title() == "price: all blocks +3.00 nats, 2 examples"


def test_weights_per_layer_are_drawn_as_they_are(axes):
    layers = {"model.layers.0": {"a": -0.5, "b": 0.25}, "model.layers.1": {"a": 1.5, "b": 1.0}}
    draw_layers(axes, layers, "sums")
    (image,) = axes.images
    assert image.get_array().tolist() == [[-0.5, 0.25], [1.5, 1.0]] and image.get_clim() == (-0.5, 1.5)
    assert labels(axes.yaxis) == ["0", "1"] and labels(axes.xaxis) == ["a", "b"]


def test_the_chosen_expert_of_each_prompt_is_in_bold(axes):
    mixtures = [
        Mixture({"a": 1.0}, probabilities={"a": 0.9, "b": 0.1, "other": 0.0}),
        Mixture(probabilities={"a": 0.3, "b": 0.4, "other": 0.3}),  # below the threshold: the base
        Mixture({"b": 1.0}),  # explicit
    ]
    draw_probabilities(axes, ["one", "two", "a prompt that is much too long for a label"], mixtures)
    texts = {t.get_position(): (t.get_text(), t.get_weight()) for t in axes.texts}
    assert texts[0, 0] == ("0.90", "bold") and texts[1, 0] == ("0.10", "normal")
    assert texts[2, 1] == ("0.30", "bold") and texts[1, 1] == ("0.40", "normal")
    assert texts[1, 2] == ("1.00", "bold")
    assert all(len(label) <= 30 for label in labels(axes.yaxis))


def apart(axes):
    """Return whether the labels of the rows don't overlap."""
    axes.figure.savefig(io.BytesIO())
    boxes = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    return len(boxes) > 2 and not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize("count", [3, 30, 400])
def test_labels_do_not_run_into_each_other_however_many_prompts_there_are(count, tmp_path):
    names = ["mathematics-gsm8k", "code-mbpp-python", "reasoning-arc-easy", "poetry", "history-of-europe", "other"]
    mixtures, drawn = [Mixture({}, probabilities=dict.fromkeys(names, 1 / 6)) for _ in range(count)], []

    def draw(axes):
        drawn.append(axes)
        draw_probabilities(axes, ["a prompt: $5 for a pen,\n$ and \\frac for a label"] * count, mixtures)

    save_figure(tmp_path / "p.png", draw, count, len(names))
    assert apart(drawn[0])
    assert len(drawn[0].texts) == (len(names) * count if count <= 30 else 0)


def test_decisions_are_drawn_with_their_counts(axes):
    draw_decisions(axes, {"math": {"math": 3, "other": 1}, "code": {"code": 2}}, "first pass")
    counts = {t.get_position(): t.get_text() for t in axes.texts}
    assert labels(axes.xaxis) == ["code", "math", "other"]
    assert [counts[j, 0] for j in range(3)] == ["0", "3", "1"] and [counts[j, 1] for j in range(3)] == ["2", "0", "0"]


def test_a_figure_is_made_without_the_users_backend():
    import matplotlib

    before = matplotlib.get_backend(auto_select=False)
    figure, axes = new_figure(3)
    assert len(axes) == 3 and figure.canvas.manager is None
    assert matplotlib.get_backend(auto_select=False) == before


def test_bars_are_the_weights_and_what_is_left_for_the_base(axes):
    draw_alpha(axes, Mixture({"a": 0.75, "b": -0.25}), ["a", "b", "c"])
    assert labels(axes.yaxis) == ["a", "b", "c", "other"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.75, -0.25, 0.0, 0.5])
