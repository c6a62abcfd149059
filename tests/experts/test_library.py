# SPDX-License-Identifier: Apache-2.0
"""Laws of the library: each row has its mixture while the context is open, and nothing of it afterwards."""

import asyncio
import linecache
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pico
import pytest
import tiny_experts
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save_file
from tiny_experts import alone, assert_same, base, ids, state, write
from tiny_model import tiny_tokenizer

from peft_svf import Expert, ExpertLibrary, Mixture, SVFConfig
from peft_svf.adaptation import Search
from peft_svf.adaptation.few_shot import few_shot
from peft_svf.experts import library as library_module
from peft_svf.experts import transfer_expert
from peft_svf.tuner.layer import SVFLayer

FP32, BF16 = torch.float32, torch.bfloat16
WEIGHTS = "adapter_model.safetensors"
TEXTS = ("one two", "3 + 4 =", "x = [];")
MIXED = [{"math": 0.7, "code": 0.3}, {}, {"code": 1.0}]
MANY = [{"e5": 1.0}, {"e2": 0.5, "e0": 0.5}, {}]


@pytest.fixture(scope="module")
def folders_in(folders, tmp_path_factory):
    return {FP32: folders, BF16: tiny_experts.write_all(tmp_path_factory.mktemp("experts"), BF16)}


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Experts that don't belong to the base model, or not into a library, with what their refusal names."""
    folder = tmp_path_factory.mktemp("strangers")
    other_base = base(seed=9, name="another-base")
    damaged = Expert.load(write(folder, "longer", seed=4))
    offsets = damaged.offsets | {name: offset[:5] for name, offset in list(damaged.offsets.items())[:1]}
    return {
        "of another base": (write(folder, "foreign", seed=4, of=other_base), "another-base"),
        "called other": (write(folder, "other", seed=4), "'other'"),
        "a folder that is not there": (folder / "nowhere", "nowhere"),
        "with vectors that are too short": (Expert("short", offsets, damaged.config), "length 5"),
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


def one_mixture(library, alpha, *texts, merge=False):
    with library.activate(Mixture(alpha), merge) as model:
        return logits(model, *texts)


# --- what it is made of


def test_folders_experts_and_names_of_ones_own_make_the_same_library(folders):
    paths = [folders["math"], folders["code"]]
    made = [
        ExpertLibrary(base(), paths),
        ExpertLibrary(base(), [str(paths[0]), Expert.load(paths[1])]),
        ExpertLibrary(base(), {"math": paths[0], "code": Expert.load(paths[1], "anything")}),
    ]
    expected = one_mixture(made[0], {"math": 1.0})
    for library in made:
        assert library.names == ["code", "math"]
        assert library.descriptions == {"code": "about code", "math": "about math"}
        assert torch.equal(one_mixture(library, {"math": 1.0}), expected)
    names = ["a.b", "keys", "50%", "one two/three", "Ω"]
    renamed = ExpertLibrary(base(), dict.fromkeys(names, paths[0]))
    assert renamed.names == sorted(names)
    assert all(torch.equal(one_mixture(renamed, {name: 1.0}), expected) for name in names)
    assert ExpertLibrary(base(), paths[0]).names == ["math"]


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
    assert library.expert("math").base_model == tiny_experts.BASE


# --- mixtures in the model


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_one_hot_is_that_expert_alone_and_none_is_the_base_to_the_bit(dtype, folders_in):
    folders, expected = folders_in[dtype], logits(base(dtype=dtype))
    library = ExpertLibrary(base(dtype=dtype), [folders["math"], folders["code"]], folders["kinds"])
    for name in library.names:
        alone_ = logits(alone(folders[name], dtype))
        assert torch.equal(one_mixture(library, {name: 1.0}, merge=True), alone_) and not torch.equal(alone_, expected)
    assert torch.equal(one_mixture(library, {"math": 0.0, "other": 1.0}), expected)
    assert torch.equal(with_mixture(library, {"math": 1.0}, {}, {"code": 0.5})[1], expected[1])
    assert torch.equal(logits(library.model), expected)


def test_a_mixture_of_any_ranks_and_modules_answers_with_the_weights_of_the_oracle(folders, tmp_path):
    low = write(tmp_path, "low", seed=6, rank=5, target_modules=["q_proj", "up_proj"])
    library = ExpertLibrary(base(), [folders["math"], low])
    alpha = {"math": 0.5, "low": -0.25}
    offsets = Mixture(alpha).offsets({name: library.expert(name) for name in alpha})
    filled = pico.fill(base(), {name: 1 + offset.double() for name, offset in offsets.items()})
    torch.testing.assert_close(one_mixture(library, alpha), logits(filled), atol=2e-4, rtol=1e-4)
    merged = one_mixture(library, alpha, merge=True)
    torch.testing.assert_close(merged, one_mixture(library, alpha), atol=1e-4, rtol=1e-4)


def test_rows_with_mixtures_of_their_own_answer_as_one_by_one(library):
    together = with_mixture(library, *MIXED)
    for row, (alpha, text) in enumerate(zip(MIXED, TEXTS, strict=True)):
        torch.testing.assert_close(together[row : row + 1], one_mixture(library, alpha, text), atol=1e-4, rtol=1e-4)
    assert len({str(row[-1].topk(5).values.tolist()) for row in together}) == 3
    assert torch.equal(with_mixture(library, *[MIXED[0]] * 3), one_mixture(library, MIXED[0]))
    with library.activate([Mixture(alpha) for alpha in MIXED], merge=True) as model:  # rows are never merged
        assert torch.equal(logits(model), together)
    assert all(layer.svf_merged is None for layer in library.layers().values()), "a second copy of the base's weights"


def test_merged_or_disabled_adapters_are_refused(folders):
    library = ExpertLibrary(PeftModel.from_pretrained(base(), str(folders["math"]), adapter_name="math"))
    library.model.merge_adapter(["math"])
    with pytest.raises(ValueError, match="merged or disabled"):
        one_mixture(library, {})
    library.model.unmerge_adapter()
    with library.model.disable_adapter(), pytest.raises(ValueError, match="merged or disabled"):
        one_mixture(library, {"math": 1.0})
    assert torch.equal(one_mixture(library, {}), logits(base()))


# --- afterwards


def test_leaving_activate_restores_the_model_also_after_an_exception(library):
    before, expected = state(library.model), logits(library.model)
    with library.activate([Mixture(alpha) for alpha in MIXED]) as model:
        assert not torch.equal(logits(model), expected)
    with pytest.raises(KeyError), library.activate(Mixture({"math": 1.0})):
        raise KeyError
    with pytest.raises(ValueError, match="offsets for 3 rows, but the batch has 2"):
        with_mixture(library, *MIXED, texts=TEXTS[:2])
    assert torch.equal(logits(library.model), expected)
    assert all(module.rows is None for module in library.model.modules() if isinstance(module, SVFLayer))
    assert_same(library.model, before)


def test_the_inner_of_two_contexts_counts_and_the_outer_comes_back(library):
    outer = one_mixture(library, {"math": 1.0})
    inner = one_mixture(library, {"code": 1.0})
    with library.activate(Mixture({"math": 1.0})) as model:
        assert torch.equal(one_mixture(library, {"code": 1.0}), inner)
        assert torch.equal(one_mixture(library, {}), logits(base()))
        assert torch.equal(logits(model), outer)


# --- who may do what, and interruptions


def test_another_thread_cannot_close_a_context_and_its_owner_still_can(library):
    expected, context = logits(base()), library.activate(Mixture({"math": 1.0}))
    context.__enter__()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="opened by another thread"):
        pool.submit(context.__exit__, None, None, None).result()
    assert torch.equal(logits(library.model), one_mixture(library, {"math": 1.0}))
    context.__exit__(None, None, None)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(one_mixture, library, {}).result(timeout=60), expected)


def test_two_coroutines_of_one_thread_are_refused_instead_of_mixed(library):
    expected = one_mixture(library, {"math": 1.0})

    async def first(opened, refused):
        with library.activate(Mixture({"math": 1.0})) as model:
            opened.set()
            await refused.wait()
            return logits(model)

    async def second(opened, refused):
        await opened.wait()
        with pytest.raises(RuntimeError, match="Another coroutine"):
            one_mixture(library, {"code": 1.0})
        refused.set()

    async def both():
        opened, refused = asyncio.Event(), asyncio.Event()
        return (await asyncio.gather(first(opened, refused), second(opened, refused)))[0]

    assert torch.equal(asyncio.run(both()), expected)
    assert torch.equal(one_mixture(library, {}), logits(base()))


SOURCES = {library_module.__file__}


def interrupted_at(step, library):
    """Raise KeyboardInterrupt at the step-th line of `activate` and of what it calls; whether it came to that."""
    left = [step]

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in SOURCES:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # Python runs no signal handlers while it enters or leaves a block
        if event == "line" and not line.startswith(("with ", "try:")):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        with library.activate(Mixture({"math": 1.0})):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left[0] <= 0


def test_an_interruption_at_any_line_leaves_neither_rows_nor_lock(tmp_path):
    folder = write(tmp_path, "math", seed=2, target_modules=["q_proj"], layers_to_transform=[0])
    library = ExpertLibrary(base(), [folder])
    one_mixture(library, {"math": 1.0})
    expected, step = logits(base()), 1
    with ThreadPoolExecutor(1) as pool:
        while interrupted_at(step, library):
            assert torch.equal(logits(library.model), expected), step
            assert library._open == (), step
            assert pool.submit(library.lock.acquire, timeout=5).result(), step
            pool.submit(library.lock.release).result()
            step += 1
    assert step > 20


# --- stacked weights

LINEAR = {"target_modules": ["q_proj"]}


def mixture_of_experts():
    return pico.build("mixtral", name="tiny-moe", vocabulary=base().config.vocab_size)


def test_stacked_experts_are_mixed(tmp_path):
    one = {"target_parameters": pico.STACKS["target_parameters"][1:]}
    settings = {"both": pico.STACKS, "one": one, "linear": LINEAR}
    paths = [
        write(tmp_path, name, seed=i, of=mixture_of_experts(), scale=0.3, **config)
        for i, (name, config) in enumerate(settings.items())
    ]
    library = ExpertLibrary(mixture_of_experts(), paths[::-1])  # the last parameter is wrapped first
    for path in paths:
        expected = logits(PeftModel.from_pretrained(mixture_of_experts(), str(path)).eval())
        torch.testing.assert_close(one_mixture(library, {path.name: 1.0}), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(one_mixture(library, {}), logits(mixture_of_experts()))
    both = 0.5 * library.expert("both") + 0.25 * library.expert("both")
    both.save(tmp_path / "sum")
    expected = logits(PeftModel.from_pretrained(mixture_of_experts(), str(tmp_path / "sum")).eval())
    torch.testing.assert_close(one_mixture(library, {"both": 0.75}), expected, atol=1e-5, rtol=1e-5)
    mixed = [{"both": 0.5, "one": 0.5}, {}, {"linear": 1.0, "one": -0.25}]
    together = with_mixture(library, *mixed)
    for row, (alpha, text) in enumerate(zip(mixed, TEXTS, strict=True)):
        torch.testing.assert_close(together[row : row + 1], one_mixture(library, alpha, text), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no experts of stacked weights"):
        few_shot(library, tiny_tokenizer(), [{"prompt": "1", "answer": "2"}], Search(per_layer=True), name="layers")
    with pytest.raises(ValueError, match=r"no linear weight .*mlp\.experts, .*'both' moves: stacked weights"):
        transfer_expert(library.expert("both"), mixture_of_experts(), mixture_of_experts())


def test_stacked_experts_that_cannot_be_added_change_nothing(tmp_path):
    other = mixture_of_experts()
    torch.nn.init.normal_(other.model.layers[1].mlp.experts.down_proj)
    other.name_or_path = "another-moe"
    foreign = write(tmp_path, "foreign", of=other, **pico.STACKS)
    library = ExpertLibrary(mixture_of_experts(), [write(tmp_path, "q", of=mixture_of_experts(), **LINEAR)])
    before, expected = state(library.model), logits(library.model)
    with pytest.raises(ValueError, match=r"Expert 'foreign' does not belong.*layers\.1\.mlp\.experts\.down_proj"):
        library.add(foreign)
    short = Expert.load(write(tmp_path, "short", of=mixture_of_experts(), **pico.STACKS))
    offsets = {name: offset[:5] for name, offset in short.offsets.items()}
    with pytest.raises(ValueError, match="length 5"):
        library.add(Expert("short", offsets, short.config))
    assert_same(library.model, before)
    assert torch.equal(logits(library.model), expected)


# --- the classifier


def test_the_classifier_is_no_expert(library, folders):
    assert library.classifier is not None and library.names == ["code", "math"]
    assert set(library.descriptions) == {"code", "math"}
    by_classifier = one_mixture(library, {library.classifier: 1.0}, merge=True)
    assert torch.equal(by_classifier, logits(alone(folders["kinds"])))
    for refused in (library.remove, library.expert):
        with pytest.raises(ValueError, match="no expert 'classifier: kinds'"):
            refused(library.classifier)
    named_alike = ExpertLibrary(base(), [folders["math"], folders["kinds"]], classifier=folders["kinds"])
    assert named_alike.names == ["kinds", "math"] and named_alike.classifier not in named_alike.names


# --- adding and removing


def many(tmp_path, count):
    """Folders of experts with different z-vectors."""
    first = Expert.load(write(tmp_path, "first"))
    made = {}
    for i in range(count):
        draws = torch.Generator().manual_seed(i)
        offsets = {m: 0.3 * torch.randn(o.shape, generator=draws) for m, o in first.offsets.items()}
        made[f"e{i}"] = tmp_path / f"e{i}"
        Expert(f"e{i}", offsets, first.config).save(made[f"e{i}"])
    return made


def test_an_added_expert_answers_as_one_of_the_first_and_a_removed_one_is_gone(library, folders):
    before = one_mixture(library, {"math": 1.0})
    assert library.add(folders["kinds"]) == "kinds" and library.names == ["code", "kinds", "math"]
    assert library.descriptions["kinds"] == "about kinds"
    assert torch.equal(one_mixture(library, {"kinds": 1.0}, merge=True), logits(alone(folders["kinds"])))
    assert torch.equal(one_mixture(library, {"math": 1.0}), before)
    library.remove("math")
    assert library.names == ["code", "kinds"]
    with pytest.raises(ValueError, match=r"no expert 'math'.*code, kinds, other"):
        one_mixture(library, {"math": 1.0})
    library.add(folders["code"], "math")
    assert torch.equal(one_mixture(library, {"math": 1.0}), one_mixture(library, {"code": 1.0}))


def test_an_added_expert_may_move_other_weights_and_more_directions(folders, tmp_path):
    low = write(tmp_path, "low", seed=6, rank=5, target_modules=["up_proj"])
    wide = write(tmp_path, "wide", seed=7, target_modules=["q_proj", "up_proj"])
    library = ExpertLibrary(base(), [low])
    expected = one_mixture(library, {"low": 1.0})
    library.add(wide)
    together = ExpertLibrary(base(), [low, wide])
    for alpha in ({"low": 1.0}, {"wide": 1.0}, {"low": 0.5, "wide": 0.25}):
        assert torch.equal(one_mixture(library, alpha), one_mixture(together, alpha))
    torch.testing.assert_close(one_mixture(library, {"low": 1.0}), expected, atol=1e-5, rtol=1e-5)
    with library.activate(Mixture({"low": 1.0})), pytest.raises(ValueError, match=r"outside of activate\(\)"):
        library.add(write(tmp_path, "more", target_modules=["o_proj"]))


def test_an_expert_that_cannot_be_added_changes_nothing(library, folders, strangers, tmp_path):
    damaged = write(tmp_path, "damaged", seed=4)
    (damaged / WEIGHTS).write_bytes((damaged / WEIGHTS).read_bytes()[:-9])
    expected, before = one_mixture(library, {"math": 1.0}), state(library.model)
    known = [(damaged, "'damaged'.*is damaged"), (folders["math"], "is called 'math'")]
    for source, message in [*strangers.values(), *known]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            library.add(source)
        assert library.names == ["code", "math"] and torch.equal(one_mixture(library, {"math": 1.0}), expected)
        assert_same(library.model, before)


def test_files_that_change_or_go_away_are_named(library, tmp_path):
    folder = write(tmp_path, "moving", seed=4)
    library.add(Expert.load(folder, lazy=True))
    whole = (folder / WEIGHTS).read_bytes()
    write(tmp_path, "moving", seed=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"'moving'.*has changed since"):
        one_mixture(library, {"moving": 1.0})
    tensors = {key: tensor * math.nan for key, tensor in load(whole).items()}
    save_file(tensors, folder / WEIGHTS)
    expected, before = one_mixture(library, {"math": 1.0}), state(library.model)
    with pytest.raises(ValueError, match=r"'moving'.*isn't a vector of finite"):
        one_mixture(library, {"moving": 0.5, "math": 0.5})
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="moving"):
        one_mixture(library, {"moving": 1.0})
    assert torch.equal(one_mixture(library, {"math": 1.0}), expected)
    assert_same(library.model, before)
    (folder / WEIGHTS).write_bytes(whole)
    one_mixture(library, {"moving": 1.0})


def test_a_named_mixture_is_kept_beside_the_experts(library, folders, tmp_path):
    sums = Mixture({"math": 0.7, "code": 0.2}, "few-shot", 1.0, {}, {"seed": 1})
    sums.save(tmp_path / "sums.json")
    library.add_mixture("sums", sums)
    library.add_mixture("saved", tmp_path / "sums.json")
    assert library.mixture("sums") == library.mixture("saved") == sums and list(library.mixtures) == ["saved", "sums"]
    assert library.mixture("math") == Mixture({"math": 1.0}) and library.mixture("other") == Mixture()
    assert library.names == ["code", "math"] and list(library.descriptions) == ["code", "math"]
    library.remove("sums")
    assert list(library.mixtures) == ["saved"]
    library.add(folders["code"], "sums")  # the name is free again


def test_names_are_unique_over_experts_and_mixtures(library, folders):
    library.add_mixture("sums", Mixture({"math": 0.5}))
    taken = {"sums": "A mixture of this library is called 'sums'", "other": "The base model .* is called 'other'"}
    for name, message in (taken | {"math": "An expert of this library is called 'math'"}).items():
        for add in (library.add_mixture, lambda name, _: library.add(folders["math"], name)):
            with pytest.raises(ValueError, match=message):
                add(name, Mixture())
    with pytest.raises(ValueError, match="no expert 'maths'; there are code, math, other, the mixture"):
        library.add_mixture("new", Mixture({"maths": 1.0}))


def test_the_last_expert_and_one_of_a_named_mixture_stay(library):
    library.add_mixture("sums", Mixture({"math": 0.5}))
    with pytest.raises(ValueError, match=r"'math' is in the mixture 'sums'"):
        library.remove("math")
    library.remove("sums")
    library.remove("math")
    with pytest.raises(ValueError, match="'code' is the last expert"):
        library.remove("code")
    assert library.names == ["code"]


# --- hundreds of experts


def test_the_expert_used_longest_ago_makes_room_and_is_read_again(tmp_path):
    folders = many(tmp_path, 6)
    free = ExpertLibrary(base(), folders)
    each = 4 * sum(free.expert("e0").sizes.values())
    library = ExpertLibrary(base(), folders, limit_bytes=3 * each + each // 2)
    seen = []
    for name in ("e0", "e1", "e2", "e0", "e3", "e4", "e1"):
        assert torch.equal(one_mixture(library, {name: 1.0}), one_mixture(free, {name: 1.0}))
        assert library.nbytes <= library.limit_bytes
        seen.append(library.in_memory)
    assert seen[3:] == [["e1", "e2", "e0"], ["e2", "e0", "e3"], ["e0", "e3", "e4"], ["e3", "e4", "e1"]]
    assert torch.equal(with_mixture(library, *MANY), with_mixture(free, *MANY))


def test_a_mixture_of_more_experts_than_the_limit_holds_is_that_mixture(tmp_path):
    folders = many(tmp_path, 3) | {"low": write(tmp_path, "low", seed=6, rank=5, target_modules=["q_proj", "up_proj"])}
    free, tight = ExpertLibrary(base(), folders), ExpertLibrary(base(), folders, limit_bytes=1)  # one always fits
    rows = [{"e0": 0.5, "low": 0.25}, dict.fromkeys(folders, 0.25), {}]
    for alpha in rows:
        torch.testing.assert_close(one_mixture(tight, alpha), one_mixture(free, alpha), atol=1e-5, rtol=1e-5)
        assert len(tight.in_memory) == 1
    torch.testing.assert_close(with_mixture(tight, *rows), with_mixture(free, *rows), atol=1e-5, rtol=1e-5)


def test_hundreds_of_experts_add_no_adapter_and_are_read_when_they_are_needed(tmp_path):
    expert = Expert.load(write(tmp_path, "expert"))
    library = ExpertLibrary(base(), {f"e{i}": expert for i in range(300)})
    assert len(library.names) == 300 and len(library.model.peft_config) == 1 and library.nbytes == 0
    with_mixture(library, *({f"e{i}": 1.0} for i in range(3)))
    assert library.in_memory == ["e0", "e1", "e2"]


# --- while it answers


def test_removal_waits_for_other_requests_and_leaves_an_active_mixture_alone(library):
    with library.lock:
        thread = threading.Thread(target=library.remove, args=("math",))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and library.names == ["code", "math"]
        one_mixture(library, {"math": 1.0})
    thread.join()
    library.add(library.expert("code"), "again")
    with library.activate(Mixture({"code": 1.0})) as model:
        expected = logits(model)
        library.remove("code")
        assert torch.equal(logits(model), expected)


def test_experts_come_and_go_while_others_answer(tmp_path):
    folders = many(tmp_path, 8)
    each = 4 * sum(Expert.load(folders["e0"]).sizes.values())
    free = ExpertLibrary(base(), folders)
    expected = {name: one_mixture(free, {name: 1.0}) for name in folders}
    library = ExpertLibrary(base(), {name: folders[name] for name in ("e0", "e1")}, limit_bytes=2 * each)
    wrong, start = [], threading.Barrier(3)

    def ask(name):
        start.wait()
        for _ in range(30):
            if not torch.equal(one_mixture(library, {name: 1.0}), expected[name]):
                wrong.append(name)

    def change():
        start.wait()
        for i in (2, 3, 4, 5, 6, 7, 2, 3, 4):
            library.add(folders[f"e{i}"])
            if not torch.equal(one_mixture(library, {f"e{i}": 1.0}), expected[f"e{i}"]):
                wrong.append(f"e{i}")
            library.remove(f"e{i}")

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("e0", "e1")]
    threads.append(threading.Thread(target=change))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and library.names == ["e0", "e1"]


def test_a_compiled_model_has_no_graph_per_expert(graphs, tmp_path):
    library = ExpertLibrary(base(), many(tmp_path, 3))
    compiled = torch.compile(library.model, backend=graphs.backend)
    forms = {
        "one": lambda i: [{f"e{i}": 1.0}],
        "rows": lambda i: [{f"e{i}": 1.0}, {f"e{(i + 1) % 3}": 0.5}, {"e0": 0.25}],
    }
    seen = 0
    for form, alphas in forms.items():
        counts = set()
        for i in range(3):
            with library.activate([Mixture(alpha) for alpha in alphas(i)]):
                answer = logits(compiled)
            torch.testing.assert_close(answer, with_mixture(library, *alphas(i)), atol=1e-4, rtol=1e-4)
            counts.add(len(graphs))
        assert len(counts) == 1 and counts.pop() > seen, form
        seen = len(graphs)


# --- failures


@pytest.mark.parametrize("adapters", [0, 1])
@pytest.mark.parametrize("at", [1, 3])
def test_a_library_that_cannot_be_made_leaves_every_bit_as_it_was(at, adapters, folders, tmp_path, monkeypatch):
    model = get_peft_model(base(), SVFConfig(target_modules=["q_proj"]), adapter_name="mine") if adapters else base()
    before, calls = state(model), []
    real = ExpertLibrary._admit

    def breaks(self, expert):
        real(self, expert)
        calls.append(expert.name)
        if len(calls) == at:
            raise RuntimeError("in the middle")

    monkeypatch.setattr(ExpertLibrary, "_admit", breaks)
    other = write(tmp_path, "other weights", target_modules=["o_proj"])
    with pytest.raises(RuntimeError, match="in the middle"):
        ExpertLibrary(model, [folders["math"], folders["code"], other])
    assert_same(model, before)


# --- what is refused


def peft_base(folders):
    model = get_peft_model(base(), SVFConfig(), adapter_name="mine")
    model.load_adapter(str(folders["math"]), adapter_name="math")
    return model.train()


@pytest.mark.parametrize("came_as", ["plain model", "PeftModel"])
@pytest.mark.parametrize("place", ["first", "last", "classifier"])
def test_an_expert_that_does_not_fit_is_refused_and_the_model_is_as_it_was(place, came_as, folders, strangers):
    model = base().train() if came_as == "plain model" else peft_base(folders)
    before, good = state(model), [folders["code"], folders["kinds"]]
    for what, (stranger, message) in strangers.items():
        if what == "called other" and place == "classifier":
            continue  # a classifier is never chosen: it may be called anything
        sources = {"first": [stranger, *good], "last": [*good, stranger], "classifier": good}[place]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ExpertLibrary(model, sources, classifier=stranger if place == "classifier" else None)
        assert_same(model, before)
    library = ExpertLibrary(model, [folders["code"]])
    assert library.names == (["code"] if came_as == "plain model" else ["code", "math", "mine"])


def test_no_experts_and_two_of_one_name_are_refused(folders):
    with pytest.raises(ValueError, match="no experts"):
        ExpertLibrary(base(), {})
    with pytest.raises(ValueError, match=r"An expert of this library is called 'math'.*dict"):
        ExpertLibrary(peft_base(folders), [folders["math"]])


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
    assert torch.equal(one_mixture(library, {"math": 1.0}, merge=True), logits(alone(folders["math"])))
