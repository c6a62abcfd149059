# SPDX-License-Identifier: Apache-2.0
"""Laws of the library: each row has its mixture while the context is open, and nothing of it afterwards."""

import math
import threading

import experts
import oracle
import pico
import pytest
import torch
from experts import GREEDY, SEEDS, alone, assert_same, base, ids, state, write
from peft import LoraConfig, PeftModel, get_peft_model

from peft_svf import Expert, ExpertLibrary, Mixture, SVFConfig
from peft_svf.layer import SVFLayer

FP32, BF16 = torch.float32, torch.bfloat16
TEXTS = ("one two", "3 + 4 =", "x = [];")
STRANGERS = [
    "of another base",
    "a folder that is not there",
    "with vectors that are too short",
    "with too few vectors",
]
MIXED = [{"math": 0.7, "code": 0.3}, {}, {"code": 1.0}]


@pytest.fixture(scope="module")
def folders_in(tmp_path_factory):
    return {dtype: experts.write_all(tmp_path_factory.mktemp("experts"), dtype) for dtype in (FP32, BF16)}


@pytest.fixture(scope="module")
def folders(folders_in):
    return folders_in[FP32]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Experts that do not belong to the base model, or not into a library."""
    folder = tmp_path_factory.mktemp("strangers")
    other_base = base(seed=9, name="another-base")
    damaged = Expert.load(write(folder, "longer", seed=4))
    offsets = damaged.offsets | {name: offset[:5] for name, offset in list(damaged.offsets.items())[:1]}
    return {
        "of another base": (write(folder, "foreign", seed=4, of=other_base), "another-base"),
        "called other": (write(folder, "other", seed=4), "'other'"),
        "a folder that is not there": (folder / "nowhere", "nowhere"),
        "with vectors that are too short": (Expert("short", offsets, damaged.config), "length 5"),
        "with too few vectors": (Expert("few", dict(list(offsets.items())[1:]), damaged.config), "no z-vector"),
    }


@pytest.fixture
def library(folders):
    return ExpertLibrary(base(), [folders["math"], folders["code"]], classifier=folders["kinds"])


@torch.no_grad()
def logits(model, *texts):
    return model(**ids(*(texts or TEXTS))).logits


def with_mixture(library, *alphas, texts=TEXTS):
    with library.activate([Mixture(alpha) for alpha in alphas]) as model:
        return logits(model, *texts)


def one_mixture(library, alpha, *texts):
    with library.activate(Mixture(alpha)) as model:
        return logits(model, *texts)


# --- what it is made of


def test_folders_experts_and_names_of_ones_own_make_the_same_library(folders):
    paths = [folders["math"], folders["code"]]
    made = [
        ExpertLibrary(base(), paths),
        ExpertLibrary(base(), [str(path) for path in paths]),
        ExpertLibrary(base(), [Expert.load(path) for path in paths]),
        ExpertLibrary(base(), {"math": paths[0], "code": Expert.load(paths[1], "anything")}),
    ]
    expected = one_mixture(made[0], {"math": 1.0})
    for library in made:
        assert library.names == ["code", "math"]
        assert library.descriptions == {"code": "about code", "math": "about math"}
        assert torch.equal(one_mixture(library, {"math": 1.0}), expected)
    renamed = ExpertLibrary(base(), {"sums": paths[0]})
    assert renamed.names == ["sums"] and torch.equal(one_mixture(renamed, {"sums": 1.0}), expected)


def test_any_name_is_an_expert(folders):
    names = ["a.b", "keys", "50%", "one two/three", "Ω"]
    library = ExpertLibrary(base(), dict.fromkeys(names, folders["math"]))
    expected = one_mixture(library, {"keys": 1.0})
    assert library.names == sorted(names) and not torch.equal(expected, logits(base()))
    assert all(torch.equal(one_mixture(library, {name: 1.0}), expected) for name in names)


def test_the_adapters_of_a_peft_model_are_experts(folders):
    model = PeftModel.from_pretrained(base(), str(folders["math"]), adapter_name="math")
    model.load_adapter(str(folders["code"]), adapter_name="code")
    adopted = ExpertLibrary(model)
    assert adopted.model is model and adopted.names == ["code", "math"]
    joined = ExpertLibrary(
        PeftModel.from_pretrained(base(), str(folders["math"]), adapter_name="math"), [folders["code"]]
    )
    made = ExpertLibrary(base(), [folders["math"], folders["code"]])
    for alpha in ({"math": 1.0}, {"code": 1.0}, {"math": 0.5, "code": 0.25}):
        assert torch.equal(one_mixture(adopted, alpha), one_mixture(made, alpha))
        assert torch.equal(one_mixture(joined, alpha), one_mixture(made, alpha))


def test_a_model_in_training_keeps_training_what_it_trained(folders):
    model = get_peft_model(base(), SVFConfig())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    ExpertLibrary(model, [folders["math"]])
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_base_model_of_an_expert_keeps_its_name(folders):
    library = ExpertLibrary(base(name="the same weights elsewhere"), [folders["math"]])  # a warning were an error
    assert library.model.peft_config["math"].base_model_name_or_path == experts.BASE


def test_experts_of_different_ranks_and_modules_are_mixed(folders, tmp_path):
    low = write(tmp_path, "low", seed=6, rank=5, target_modules=["q_proj", "up_proj"])
    library = ExpertLibrary(base(), [folders["math"], low])
    alpha = {"math": 0.5, "low": 0.25}
    offsets = Mixture(alpha).offsets({"math": Expert.load(folders["math"]), "low": Expert.load(low)})
    filled = pico.fill(base(), {name: 1 + offset.double() for name, offset in offsets.items()})
    torch.testing.assert_close(one_mixture(library, alpha), logits(filled), atol=2e-4, rtol=1e-4)


# --- mixtures in the model


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_one_hot_mixture_answers_as_that_expert_alone_to_the_bit(dtype, folders_in):
    folders = folders_in[dtype]
    library = ExpertLibrary(base(dtype=dtype), [folders["math"], folders["code"]])
    for name in library.names:
        expected = logits(alone(folders[name], dtype))
        assert torch.equal(one_mixture(library, {name: 1.0}), expected)
        assert not torch.equal(expected, logits(base(dtype=dtype)))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_no_mixture_answers_as_the_base_to_the_bit(dtype, folders_in):
    folders = folders_in[dtype]
    library = ExpertLibrary(base(dtype=dtype), [folders["math"], folders["code"]], folders["kinds"])
    expected = logits(base(dtype=dtype))
    assert torch.equal(one_mixture(library, {}), expected)
    assert torch.equal(one_mixture(library, {"math": 0.0, "other": 1.0}), expected)
    assert torch.equal(with_mixture(library, {"math": 1.0}, {}, {"code": 0.5})[1], expected[1])


def test_a_mixture_answers_with_the_weights_of_the_oracle(library, folders):
    alpha = {"math": 0.7, "code": -0.4}
    offsets = Mixture(alpha).offsets({name: Expert.load(folders[name]) for name in alpha})
    filled = pico.fill(base(), {name: 1 + offset.double() for name, offset in offsets.items()})
    torch.testing.assert_close(one_mixture(library, alpha), logits(filled), atol=2e-4, rtol=1e-4)
    weight = filled.model.layers[0].mlp.up_proj.weight
    z = 1 + offsets["model.layers.0.mlp.up_proj"].double()
    torch.testing.assert_close(
        weight.double(), oracle.rescaled(base().model.layers[0].mlp.up_proj.weight, z), atol=1e-6, rtol=0
    )


def test_rows_with_mixtures_of_their_own_answer_as_one_by_one(library):
    together = with_mixture(library, *MIXED)
    for row, (alpha, text) in enumerate(zip(MIXED, TEXTS, strict=True)):
        torch.testing.assert_close(together[row : row + 1], one_mixture(library, alpha, text), atol=1e-4, rtol=1e-4)
    assert len({str(row[-1].topk(5).values.tolist()) for row in together}) == 3


def test_a_batch_that_agrees_answers_as_one_mixture_to_the_bit(library):
    assert torch.equal(with_mixture(library, *[MIXED[0]] * 3), one_mixture(library, MIXED[0]))


def test_the_rows_must_fit_the_batch(library):
    with pytest.raises(ValueError, match="offsets for 3 rows, but the batch has 2"):
        with_mixture(library, *MIXED, texts=TEXTS[:2])


def test_an_unknown_expert_is_refused_by_name(library):
    with pytest.raises(ValueError, match=r"'maths'.*code, math, other"), library.activate(Mixture({"maths": 1.0})):
        pass


def test_merged_or_disabled_adapters_are_refused(library):
    library.model.merge_adapter(["math"])
    with pytest.raises(ValueError, match="merged: unmerge_adapter"), library.activate(Mixture()):
        pass
    library.model.unmerge_adapter()
    with (
        library.model.disable_adapter(),
        pytest.raises(ValueError, match="disabled"),
        library.activate(Mixture({"math": 1.0})),
    ):
        pass
    assert torch.equal(one_mixture(library, {}), logits(base()))


# --- afterwards


def rows_of(library):
    return [module.svf_rows for module in library.model.modules() if isinstance(module, SVFLayer)]


def test_leaving_activate_restores_the_model(library):
    before, expected = state(library.model), logits(library.model)
    with library.activate([Mixture(alpha) for alpha in MIXED]) as model:
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(library.model), expected) and rows_of(library) == [None] * len(rows_of(library))
    assert_same(library.model, before)


def test_an_exception_restores_the_model(library):
    before, expected = state(library.model), logits(library.model)
    with pytest.raises(KeyError), library.activate(Mixture({"math": 1.0})):
        raise KeyError
    with pytest.raises(ValueError, match="rows"):
        with_mixture(library, *MIXED, texts=TEXTS[:2])
    assert torch.equal(logits(library.model), expected)
    assert_same(library.model, before)


def test_the_inner_of_two_contexts_counts_and_the_outer_comes_back(library):
    outer = one_mixture(library, {"math": 1.0})
    inner = one_mixture(library, {"code": 1.0})
    with library.activate(Mixture({"math": 1.0})) as model:
        assert torch.equal(one_mixture(library, {"code": 1.0}), inner)
        assert torch.equal(one_mixture(library, {}), logits(base()))
        assert torch.equal(logits(model), outer)


def test_the_weights_stay_those_of_the_base_to_the_bit(library):
    pristine = {name: parameter.clone() for name, parameter in base().named_parameters()}
    with_mixture(library, *MIXED)
    with library.activate(Mixture({"math": 1.0})) as model:
        model.generate(**ids(*TEXTS), **GREEDY)
    for name, parameter in library.model.get_base_model().named_parameters():
        if "svf_offset" not in name:
            assert torch.equal(parameter, pristine[name.replace(".base_layer", "")]), name


def test_two_threads_with_different_experts_never_mix(library):
    alphas = [{"math": 1.0}, {"code": 1.0}]

    def answer(alpha):
        with library.activate(Mixture(alpha)) as model:
            return model.generate(**ids(*TEXTS), **GREEDY).tolist()

    expected = [answer(alpha) for alpha in alphas]
    assert expected[0] != expected[1]
    found = [[], []]
    start = threading.Barrier(2)

    def work(place):
        start.wait()
        for _ in range(4):
            found[place].append(answer(alphas[place]))

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[expected[0]] * 4, [expected[1]] * 4]


# --- the classifier


def test_the_classifier_is_no_expert(library, folders):
    assert library.classifier is not None and library.names == ["code", "math"]
    assert set(library.descriptions) == {"code", "math"}
    assert torch.equal(one_mixture(library, {library.classifier: 1.0}), logits(alone(folders["kinds"])))
    named_alike = ExpertLibrary(base(), [folders["math"], folders["kinds"]], classifier=folders["kinds"])
    assert named_alike.names == ["kinds", "math"] and named_alike.classifier not in named_alike.names


def test_the_classifier_of_an_earlier_library_stays_one(library):
    again = ExpertLibrary(library.model)
    assert again.names == library.names and again.classifier == library.classifier


# --- what is refused


def peft_base(folders):
    model = get_peft_model(base(), SVFConfig(), adapter_name="mine")
    model.load_adapter(str(folders["math"]), adapter_name="math")
    return model.train()


@pytest.mark.parametrize("came_as", ["plain model", "PeftModel"])
@pytest.mark.parametrize(
    "place, what",
    [
        *((place, what) for place in ("first", "last", "classifier") for what in STRANGERS),
        ("first", "called other"),  # a classifier is never chosen: it may be called anything
    ],
)
def test_an_expert_that_does_not_fit_is_refused_and_the_model_is_as_it_was(what, place, came_as, folders, strangers):
    stranger, message = strangers[what]
    model = base().train() if came_as == "plain model" else peft_base(folders)
    before = state(model)
    good = [folders["code"], folders["kinds"]]
    sources = {"first": [stranger, *good], "last": [*good, stranger], "classifier": good}[place]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ExpertLibrary(model, sources, classifier=stranger if place == "classifier" else None)
    assert_same(model, before)
    library = ExpertLibrary(model, [folders["code"]])
    assert library.names == (["code"] if came_as == "plain model" else ["code", "math", "mine"])


def test_no_experts_are_refused():
    model = base()
    before = state(model)
    for nothing in ([], (), {}):
        with pytest.raises(ValueError, match="no experts"):
            ExpertLibrary(model, nothing)
    assert_same(model, before)


def test_two_experts_of_one_name_are_refused(folders):
    model = peft_base(folders)
    before = state(model)
    with pytest.raises(ValueError, match=r"Two experts are called 'math'.*dict"):
        ExpertLibrary(model, [folders["math"]])
    assert_same(model, before)
    with pytest.raises(ValueError, match="Two experts are called 'code'"):
        ExpertLibrary(base(), [folders["code"], Expert.load(folders["math"], "code")])


def test_an_expert_cannot_be_called_other(folders):
    with pytest.raises(ValueError, match="stands for the base model"):
        ExpertLibrary(base(), {"other": folders["math"]})


@pytest.mark.parametrize("config", [LoraConfig(), SVFConfig(modules_to_save=["lm_head"])], ids=["LoRA", "head"])
def test_adapters_that_cannot_be_mixed_are_refused(config, folders):
    model = get_peft_model(base(), config)
    before = state(model)
    with pytest.raises(ValueError, match=r"'default'.*cannot be mixed"):
        ExpertLibrary(model, [folders["math"]])
    assert_same(model, before)


def test_a_model_with_adapters_that_is_no_peft_model_is_refused(library, folders):
    inner = library.model.get_base_model()
    with pytest.raises(ValueError, match="pass the PeftModel"):
        ExpertLibrary(inner, [folders["math"]])
    assert torch.equal(one_mixture(library, {"math": 1.0}), logits(alone(folders["math"])))


def test_an_expert_made_by_hand_is_checked_before_the_model_changes(folders):
    offsets = {name: offset * math.nan for name, offset in Expert.load(folders["math"]).offsets.items()}
    with pytest.raises(ValueError, match="finite"):
        ExpertLibrary(base(), [Expert("nan", offsets, Expert.load(folders["math"]).config)])
    assert set(SEEDS) == set(folders)
