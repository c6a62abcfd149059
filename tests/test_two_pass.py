# SPDX-License-Identifier: Apache-2.0
"""Laws of the model with two passes: what it answers is what the chosen experts answer, and nothing of it stays."""

import asyncio
import logging
import math
import threading

import oracle
import pytest
import torch
from tiny_experts import GREEDY, alone, assert_same, base, state, write
from tiny_model import tiny_tokenizer
from transformers import DynamicCache, GenerationConfig, LlamaModel

from peft_svf import Expert, ExpertLibrary, Mixture, Transformer2Model, two_pass
from peft_svf.adaptation import FirstPass, Search, first_pass
from peft_svf.pipeline import Transformer2Pipeline
from peft_svf.tuner import plans as tuner_plans
from peft_svf.tuner import rows as rows_module
from peft_svf.tuner.layer import Linear, SVFLayer

TEXTS = ["What is 3 + 4?", "def", "Tell me a story."]
tokenizer = tiny_tokenizer()


@pytest.fixture(scope="module")
def model(folders):
    paths = [folders["math"], folders["code"]]
    return Transformer2Model(base(), tiny_tokenizer(), paths, classifier=folders["kinds"])


@pytest.fixture
def no_first_pass(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the first pass was asked")

    monkeypatch.setattr(two_pass, "dispatch", refuse)


def inputs(*texts):
    found = tokenizer(list(texts or TEXTS), return_tensors="pt", padding=True, padding_side="left")
    return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}


def answers(model, texts=(), **kwargs):
    """What follows each prompt, without padding."""
    batch = inputs(*texts)
    output = model.generate(**batch, **(GREEDY | kwargs))
    return [row[row != 0].tolist() for row in output[:, batch["input_ids"].shape[1] :]]


# --- the second pass


def test_other_answers_as_the_base(model, no_first_pass):
    expected = answers(base())
    for nothing in ({"expert": "other"}, {"mixture": {}}, {"mixture": Mixture()}, {"mixture": {"other": 1.0}}):
        assert answers(model, **nothing) == expected
    assert expected != answers(model, expert="math") != answers(model, expert="code") != expected


def test_the_two_passes_are_a_decision_and_a_generation_with_it(model):
    decided = model.first_pass(TEXTS)
    assert len({mixture.choice for mixture in decided}) > 1, "the tiny model chooses one for all: choose other seeds"
    output, mixtures = model.generate(**inputs(), return_dispatch=True, **GREEDY)  # the ids, decoded
    assert mixtures == decided
    assert model.generate(**inputs(), mixture=decided, **GREEDY).tolist() == output.tolist()
    chats = [[{"role": "user", "content": text}] for text in reversed(TEXTS)]  # may differ from what is continued
    assert model.generate(**inputs(), prompts=chats, return_dispatch=True, **GREEDY)[1] == decided[::-1]


def test_without_anything_to_read_the_second_pass_begins_at_the_first_token(folders):
    plain = base()
    plain.config.bos_token_id = plain.generation_config.bos_token_id = 3
    expected = plain.generate(**GREEDY).tolist()
    model = Transformer2Model(plain, tokenizer, [folders["math"]])
    assert model.generate(expert="other", **GREEDY).tolist() == expected
    with pytest.raises(ValueError, match="nothing to read"):
        model.generate(**GREEDY)


def test_a_forward_of_another_coroutine_is_refused_instead_of_mixed(model):
    async def forward():
        return model(**inputs())

    async def beside_a_mixture():
        with model.using("math"):
            await asyncio.create_task(forward())

    with pytest.raises(RuntimeError, match="Another coroutine"):
        asyncio.run(beside_a_mixture())


def test_the_rows_of_inputs_and_of_embeddings_each_have_their_expert(model, no_first_pass):
    batch, each = inputs(), ["math", "other", "code"]
    expected = model.generate(**batch, expert=each, **GREEDY).tolist()
    found = model.generate(inputs=batch["input_ids"], attention_mask=batch["attention_mask"], expert=each, **GREEDY)
    assert found.tolist() == expected
    states = model.get_input_embeddings()(batch["input_ids"])
    embedded = {"inputs_embeds": states, "attention_mask": batch["attention_mask"]}
    new = model.generate(**embedded, expert=each, **GREEDY)
    assert new.tolist() == [row[batch["input_ids"].shape[1] :] for row in expected]
    with pytest.raises(ValueError, match=r"3 prompts, but experts or mixtures for 2"):
        model.generate(**embedded, expert=each[:2], **GREEDY)


# --- given choices

CHOICES = [["yes", "no", "perhaps"], ["4", "48"], ["a", "The end.", "story"]]  # "4" begins "48"


def oracle_probabilities(single, prompt, choices):
    """Softmax of the summed log-likelihoods."""
    ids = (
        tokenizer(prompt).input_ids
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True).input_ids
    )
    ends = [tokenizer.eos_token_id] * any(a != b and b.startswith(a) for a in choices for b in choices)
    with torch.no_grad():
        sums = [oracle.logps(single, ids, tokenizer(text).input_ids + ends).sum() for text in choices]
    return torch.stack(sums).softmax(0).tolist()


@pytest.mark.parametrize("chats", [False, True], ids=["texts", "chats"])
@pytest.mark.parametrize("name", ["math", "other"])
def test_the_probabilities_of_choices_are_those_of_the_expert_alone(name, chats, model, folders):
    single = alone(folders["math"]) if name == "math" else base()
    prompts = [[{"role": "user", "content": text}] for text in TEXTS] if chats else TEXTS
    answered, mixtures = model.choose(prompts, CHOICES, expert=name)
    for prompt, choices, record in zip(prompts, CHOICES, answered, strict=True):
        expected = oracle_probabilities(single, prompt, choices)
        assert list(record["probabilities"]) == choices
        assert list(record["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        best = max(expected)
        assert record["choice"] == choices[expected.index(best)]
        assert record["confidence"] == pytest.approx((best - 1 / len(choices)) / (1 - 1 / len(choices)), abs=1e-4)
    assert [mixture.choice for mixture in mixtures] == [name] * 3


def test_rows_of_several_experts_and_choices_get_what_they_get_alone(model):
    decided = model.first_pass(TEXTS)
    assert len({mixture.choice for mixture in decided}) > 1
    chosen = [{}, {"mixture": [{"math": 0.6}, {"code": 1.0}, {}]}, {"expert": ["math", "other", "code"]}]
    before = state(model.library.model)
    for given in chosen:
        together, mixtures = model.choose(TEXTS, CHOICES, **given)
        assert mixtures == (model.first_pass(TEXTS, **given))
        for i, (text, choices) in enumerate(zip(TEXTS, CHOICES, strict=True)):
            (one,), _ = model.choose([text], choices, **{name: values[i] for name, values in given.items()})
            assert one["probabilities"] == pytest.approx(together[i]["probabilities"], abs=1e-5)
    assert_same(model.library.model, before)


@pytest.mark.parametrize(
    "choices, message",
    [
        ([], "'choices' must be a list of texts that aren't empty"),
        ("yes", "'choices' must be a list of texts"),
        (["yes", "yes"], "'choices' has 'yes' twice"),
        ([1, 2, 3], "'choices' must be a list of texts"),
        ([["yes", "no"]], "There are 3 prompts, but choices for 1"),
        (["x" * 510, "no"], "the model's context is 512"),
    ],
)
def test_choices_that_cannot_be_compared_are_refused(choices, message, model):
    with pytest.raises(ValueError, match=message):
        model.choose(TEXTS, choices, expert="math")


def options():
    """Ways of `generate` that change how the model runs, not what it answers to."""
    assistant = base(seed=7)
    return {
        "greedy": {},
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
        "chunked prefill": {"prefill_chunk_size": 5},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "assisted": {"assistant_model": assistant},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "stop strings": {"stop_strings": ["a", "7"], "tokenizer": tokenizer},
        "repetition penalty": {"repetition_penalty": 1.3},
        "contrastive masks": {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
    }


@pytest.mark.parametrize("new", [6, two_pass.MERGE_FROM], ids=["unmerged", "merged"])
@pytest.mark.parametrize("option", options())
def test_however_it_generates_an_expert_answers_as_that_expert_alone(option, new, model, folders, no_first_pass):
    settings = options()[option] | {"max_new_tokens": new}
    each = TEXTS[:1] if option in ("assisted", "prompt lookup") else TEXTS  # transformers: batches of 1
    for name in ("math", "other"):
        single = alone(folders["math"]) if name == "math" else base()
        assert answers(model, each, expert=name, **settings) == answers(single, each, **settings)


@pytest.mark.parametrize("option", sorted(set(options()) - {"assisted", "prompt lookup"}))
def test_however_it_generates_rows_stay_with_their_mixtures(option, model, no_first_pass):
    each, settings = ("math", {"math": 0.7, "code": 0.3}, {"code": -0.5}), options()[option]
    together = answers(model, mixture=each, **settings)
    singles = [answers(model, [text], mixture=one, **settings) for text, one in zip(TEXTS, each, strict=True)]
    assert together == [answer for answered in singles for answer in answered]


def test_a_new_mixture_is_merged_once_it_has_had_many_forwards_and_then_serves_all_of_its_answers(model, monkeypatch):
    monkeypatch.setattr(tuner_plans, "break_even", lambda *_: math.inf)  # tiny weights are merged for any prompt
    model.library.model.base_model.set_plan("auto")  # nothing is merged
    chosen = []
    real = model.library.activate
    monkeypatch.setattr(model.library, "activate", lambda m, merge=0: chosen.append(bool(merge)) or real(m, merge))
    plans = []
    layer = next(m for m in model.library.model.modules() if isinstance(m, SVFLayer))
    hook = layer.register_forward_hook(lambda module, *_: plans.append(module.svf_chosen))
    many = two_pass.MERGE_FROM
    config = GenerationConfig(max_new_tokens=many, do_sample=False)
    try:
        for settings, expert, merge, plan, later in [
            ({"max_new_tokens": many}, "math", True, "narrow", "merged"),
            ({"max_new_tokens": many}, ["math"] * 3, True, "merged", "merged"),
            ({"max_new_tokens": many - 1}, "math", False, "merged", "merged"),
            ({"max_new_tokens": many}, ["math", "code", "math"], True, "factored", "factored"),  # instead of that copy
            ({"max_new_tokens": many - 1}, "math", False, "narrow", "narrow"),
            ({"max_new_tokens": many - 1}, "code", False, "narrow", "narrow"),
            ({"max_length": many + 30}, "code", True, "narrow", "merged"),
            ({"max_length": 30}, "math", False, "narrow", "narrow"),
            ({"generation_config": config}, "math", True, "narrow", "merged"),
        ]:
            chosen.clear(), plans.clear()
            ignored = {} if "generation_config" in settings else {"do_sample": False}
            model.generate(**inputs(), expert=expert, **settings, **ignored)
            waits = len(plans) if plan == later else two_pass.MERGE_AT - 1
            assert chosen == [merge] and plans == [plan] * waits + [later] * (len(plans) - waits), (settings, plans)
    finally:
        hook.remove()


# --- the first pass


def test_an_explicit_choice_is_certain_and_names_every_expert(model, no_first_pass):
    for chosen, name in (
        ({"expert": "math"}, "math"),
        ({"expert": "other"}, "other"),
        ({"mixture": {"code": 0.8}}, "code"),
    ):
        for mixture in model.first_pass(TEXTS, **chosen):
            assert mixture.choice == name and mixture.confidence == 1.0 and mixture.strategy == "explicit"
            expected = {"code": 0.0, "math": 0.0, "other": 0.0} | {name: 1.0}
            assert mixture.record()["probabilities"] == mixture.probabilities == expected


@pytest.mark.parametrize("chosen", [{"expert": "math"}, {"mixture": {"code": 0.5}}, {}], ids=str)
def test_a_request_decides_once_and_logs_it_and_an_explicit_one_reads_nothing(chosen, model, monkeypatch, caplog):
    read, real = [], two_pass.dispatch
    monkeypatch.setattr(two_pass, "dispatch", lambda *args: read.extend(args[2]) or real(*args))
    pipe = Transformer2Pipeline(model, batch_size=2)
    for decide in (
        lambda: model.generate(**inputs(), **chosen, **GREEDY),
        lambda: pipe(TEXTS, **chosen, **GREEDY),
        lambda: pipe(TEXTS, **{name: [value] * 3 for name, value in chosen.items()}, **GREEDY),
    ):
        caplog.clear(), read.clear()
        with caplog.at_level(logging.DEBUG, logger="peft_svf"):
            decide()
        logged = [record for record in caplog.records if "'choice': " in record.getMessage()]
        assert len(read) == (0 if chosen else 3) and len(logged) == len(TEXTS)
        assert {(r.levelname, r.name) for r in logged} == {("INFO", "peft_svf.two_pass")}


def test_of_many_names_the_nearest_are_named(folders):
    one = Expert.load(folders["math"])
    many = Transformer2Model(base(), tokenizer, {f"math-{i}": one for i in range(40)})
    with pytest.raises(ValueError, match=r"no expert 'math_31'; of the 41 names the nearest are math-31,") as refused:
        many.first_pass(TEXTS, expert="math_31")
    assert str(refused.value).count("math-") == 5


def test_the_strategy_is_the_classifiers_where_there_is_one(model, folders):
    plain = Transformer2Model(base(), tokenizer, [folders["math"]])
    assert (model.default_first_pass.strategy, plain.default_first_pass.strategy) == ("classifier", "prompt")
    assert {m.strategy for m in model.first_pass(TEXTS)} == {"classifier"}
    assert {m.strategy for m in model.first_pass(TEXTS, first_pass="prompt")} == {"prompt"}


def test_the_first_pass_of_a_call_replaces_the_models(model, folders):
    soft = FirstPass("classifier", soft=True)
    other = Transformer2Model(base(), tokenizer, [folders["math"], folders["code"]], folders["kinds"], soft)
    for mixture in other.first_pass(TEXTS):
        assert mixture.alpha == pytest.approx({n: p for n, p in mixture.probabilities.items() if n != "other"})
    assert model.first_pass(TEXTS, first_pass=soft) == other.first_pass(TEXTS)
    assert other.first_pass(TEXTS, first_pass="classifier") == model.first_pass(TEXTS)
    expected = answers(model, mixture=other.first_pass(TEXTS))
    assert answers(other) == answers(model, first_pass=soft) == expected
    never = {"threshold": 1.01}
    assert {m.choice for m in model.first_pass(TEXTS, dispatch_kwargs=never)} == {"other"}
    assert model.first_pass(TEXTS, dispatch_kwargs={"soft": True}) == other.first_pass(TEXTS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mode'"):
        model.first_pass(TEXTS, dispatch_kwargs={"mode": "classifier"})


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"expert": "math", "mixture": {"math": 1.0}}, "not both"),
        ({"expert": ["math"]}, "3 prompts, but experts or mixtures for 1"),
        ({"expert": []}, "3 prompts, but experts or mixtures for 0"),
        ({"expert": ["math", "other", "maths"]}, "no expert 'maths'; there are code, math, other"),
        ({"mixture": {"classifier: kinds": 1.0}}, "no expert 'classifier: kinds'"),
        ({"mixture": [{}, {}, {"code": math.inf}]}, "'code' must be a finite number"),
        ({"first_pass": "magic"}, "no strategy='magic'"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(chosen, message, model):
    before = state(model.library.model)
    for call in (model.first_pass, lambda prompts, **kw: model.generate(**inputs(), prompts=prompts, **kw)):
        with pytest.raises(ValueError, match=message):
            call(TEXTS, **chosen)
    assert_same(model.library.model, before)


# --- what is refused


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_other_weights_is_refused(name, model):
    with pytest.raises(ValueError, match="activations of other weights"):
        model.generate(**inputs(), **{name: DynamicCache()}, expert="math")


def test_what_does_not_fit_the_model_is_refused(model, folders, no_first_pass):
    limit = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"{limit} tokens, but the model's context is {limit}"):
        model.generate(torch.full((1, limit), 50), expert="math", **GREEDY)
    model.generate(torch.full((1, limit - 1), 50), expert="math", max_new_tokens=1)
    with pytest.raises(ValueError, match="2 prompts for 3 rows"):
        model.answer([Mixture()] * 2, **inputs())
    for texts in ("a text", ["two", "texts"], torch.tensor([3, 4])):
        with pytest.raises(TypeError, match=r"reads token ids, a tensor .* call generate\(\*\*tokenizer"):
            model.generate(texts)
    with pytest.raises(ValueError, match="needs a classifier"):
        Transformer2Model(base(), tokenizer, [folders["math"]], first_pass="classifier")


# --- afterwards


def test_between_calls_the_model_is_the_base_with_its_adapters_to_the_bit(model):
    before, pristine = state(model.library.model), dict(base().named_parameters())
    answers(model)
    answers(model, expert=["math", "code", "other"])
    assert_same(model.library.model, before)
    for name, parameter in model.get_base_model().named_parameters():
        if "svf_offset" not in name:
            assert torch.equal(parameter, pristine[name.replace(".base_layer", "")])
    assert answers(model, expert="other") == answers(base())


def test_using_gives_the_model_a_mixture_for_a_while(model, folders):
    ids = inputs("1 + 1 =")
    with torch.no_grad():
        with model.using({"math": 1.0}) as active:
            found = active(**ids).logits
            with model.using(Mixture()):
                assert torch.equal(active(**ids).logits, base()(**ids).logits)
        assert torch.equal(found, alone(folders["math"])(**ids).logits)
    with pytest.raises(ValueError, match="'maths'"), model.using({"maths": 1.0}):
        pass


def test_everything_else_is_the_wrapped_models(model):
    assert model.config is model.library.model.config and model.device.type == "cpu"
    assert model.can_generate() and model.dtype == torch.float32
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


BRIEF = Search(population=8, iterations=1)
EXAMPLES = [{"prompt": "3 + 4 =", "answer": "7"}, {"prompt": "1 + 1 =", "answer": "2"}]


def test_adapt_takes_a_search_or_its_fields(model):
    found = model.adapt(EXAMPLES, search=BRIEF)
    assert found.strategy == "few-shot" and found == model.adapt(EXAMPLES, population=8, iterations=1)
    assert answers(model, mixture=found) == answers(model, mixture=dict(found.alpha))
    with pytest.raises(ValueError, match="a search or its fields, not both"):
        model.adapt(EXAMPLES, search=BRIEF, iterations=1)
    with pytest.raises(TypeError, match="no argument 'temperature': these examples generate nothing"):
        model.adapt(EXAMPLES, temperature=2.0)


def test_what_adapt_found_is_used_by_its_name(folders, no_first_pass):
    model = Transformer2Model(base(), tokenizer, [folders["math"], folders["code"]])
    found = model.adapt(EXAMPLES, search=BRIEF, holdout=[], name="sums")
    assert found.alpha and found.provenance["name"] == "sums"
    expected = answers(model, TEXTS, mixture=found)
    assert answers(model, TEXTS, mixture="sums") == answers(model, TEXTS, expert="sums") == expected
    each = model.first_pass(TEXTS, mixture=["sums", {"math": 1.0}, "code"])
    assert [m.alpha for m in each] == [found.alpha, {"math": 1.0}, {"code": 1.0}]
    assert each[0].provenance == found.provenance
    with model.using("sums") as one:
        by_name = one(**inputs()).logits
    with model.using(found) as one:
        assert torch.equal(one(**inputs()).logits, by_name)
    with pytest.raises(ValueError, match="no expert 'maths'; there are code, math, other, the mixture sums"):
        model.first_pass(TEXTS, mixture="maths")
    with pytest.raises(ValueError, match="A mixture of this library is called 'sums'"):
        model.adapt(EXAMPLES, search=BRIEF, name="sums")


def test_a_forward_beside_another_threads_request_sees_the_base(model):
    ids, expected, logits = inputs("1 + 1 ="), base()(**inputs("1 + 1 =")).logits, []
    forwards = threading.Thread(target=lambda: [logits.append(model.forward(**ids).logits) for _ in range(20)])
    answering = threading.Thread(target=lambda: [answers(model, TEXTS[:1], expert="math") for _ in range(3)])
    for thread in (answering, forwards):
        thread.start()
    for thread in (answering, forwards):
        thread.join()
    with torch.no_grad():
        assert len(logits) == 20 and all(torch.equal(found, expected) for found in logits)
        with model.using("math") as adapted:  # its own thread sees the mixture
            assert torch.equal(model(**ids).logits, adapted(**ids).logits)


def test_adapting_and_using_restore_what_was_there_also_after_an_exception(model, monkeypatch):
    before, ids = state(model.library.model), inputs("1 + 1 =")
    with torch.no_grad(), model.using({"math": 1.0}) as active:
        expected = active(**ids).logits
        with pytest.raises(KeyError), model.using({"code": 1.0}):
            raise KeyError
        assert torch.equal(active(**ids).logits, expected)
        model.adapt(EXAMPLES, search=BRIEF)
        assert torch.equal(active(**ids).logits, expected)
        with monkeypatch.context() as patch:
            patch.setattr(ExpertLibrary, "activate", breaking(ExpertLibrary.activate, at=1))
            with pytest.raises(RuntimeError, match="in the middle"):
                model.adapt(EXAMPLES, search=BRIEF)
        assert torch.equal(active(**ids).logits, expected)
    assert_same(model.library.model, before)


def test_removal_waits_for_both_passes(folders, monkeypatch):
    model = Transformer2Model(base(), tokenizer, [folders["math"], folders["code"]], folders["kinds"])
    expected, decided = answers(model, mixture={"math": 1.0}), [Mixture({"math": 1.0})] * 3

    thread = threading.Thread(target=model.library.remove, args=("math",))

    def decides_while_it_is_removed(*args, **kwargs):
        thread.start()
        thread.join(0.05)
        return decided

    monkeypatch.setattr(two_pass, "dispatch", decides_while_it_is_removed)
    assert answers(model) == expected
    thread.join()
    assert model.library.names == ["code"]


def breaking(real, at):
    """The same function, but its call number `at` raises."""
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("in the middle")
        return real(*args, **kwargs)

    return breaks


STEPS = {
    "first pass": (first_pass, "choice_logps", 1),
    "decision": (first_pass, "Mixture", 2),
    "mixing": (ExpertLibrary, "mix", 1),
    "reading an expert": (ExpertLibrary, "_offsets", 1),
    "activation": (rows_module, "Rows", 5),
    "first layer": (Linear, "forward", 1),
    "second pass, prefill": (Linear, "forward", 20),
    "second pass, later token": (LlamaModel, "forward", 6),
}


@pytest.mark.parametrize("new", [6, two_pass.MERGE_FROM], ids=["unmerged", "merged"])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_every_bit_as_it_was(step, new, folders, monkeypatch):
    model = Transformer2Model(base(), tokenizer, [folders["math"], folders["code"]], folders["kinds"])
    before, pristine = state(model.library.model), answers(base())
    target, name, at = STEPS[step]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, breaking(getattr(target, name), at))
        with pytest.raises(RuntimeError, match="in the middle"):
            answers(model, TEXTS[:1], max_new_tokens=new)
    assert_same(model.library.model, before)
    assert answers(model, expert="other") == pristine
    assert answers(model, expert="math") == answers(alone(folders["math"]))


# --- from_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model in a folder and experts that name it."""
    folder = tmp_path_factory.mktemp("saved")
    base().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    named = [write(folder, name, seed, base(name=str(folder / "base"))) for name, seed in (("math", 2), ("code", 1))]
    return folder / "base", named


def test_from_pretrained_loads_the_base_that_the_experts_name(saved, model):
    folder, named = saved
    settings = FirstPass(threshold=0.5)
    for name, experts in ((None, named), (str(folder), dict(zip(["math", "code"], named, strict=True)))):
        loaded = Transformer2Model.from_pretrained(name, experts, first_pass=settings, dtype=torch.float32)
        assert loaded.library.names == ["code", "math"] and loaded.name_or_path == str(folder)
        assert loaded.default_first_pass is settings
        assert loaded.tokenizer("3 + 4").input_ids == tokenizer("3 + 4").input_ids
        for expert in ("math", "other"):
            assert answers(loaded, expert=expert) == answers(model, expert=expert)


def test_the_revision_that_the_experts_name_is_loaded(saved, monkeypatch):
    _, named = saved
    loads = []
    for loader in (two_pass.AutoModelForCausalLM, two_pass.AutoTokenizer):
        real = loader.from_pretrained
        spy = lambda name, real=real, **kwargs: loads.append(kwargs) or real(name)  # noqa: E731
        monkeypatch.setattr(loader, "from_pretrained", spy)
    pinned = [Expert(e.name, e.offsets, e.config | {"revision": "abc"}) for e in map(Expert.load, named)]
    Transformer2Model.from_pretrained(None, pinned)
    assert loads == [{"revision": "abc"}] * 2
    loads.clear()
    Transformer2Model.from_pretrained(None, [pinned[0], named[1]], revision="mine", dtype="auto")
    assert loads == [{"revision": "mine", "dtype": "auto"}, {"revision": "mine"}]


@pytest.mark.parametrize(
    "facts, message",
    [
        ([{}, {"base_model_name_or_path": "elsewhere"}], r"several base models: .*elsewhere.*model=\"<base model>\""),
        ([{"revision": "abc"}, {"revision": "def"}], "several base models: .*revision abc, revision def"),
        ([{"base_model_name_or_path": None}], r"no base model. Write pipeline\(\"transformer2\", model="),
        ([{"base_model_name_or_path": "tiny (a wheel)"}], r"neither a folder nor a Hub repository: pass .* model="),
        ([], "no base model"),
    ],
)
def test_experts_of_several_bases_or_of_none_need_a_model(facts, message, saved):
    loaded = map(Expert.load, saved[1])
    experts = [Expert(e.name, e.offsets, e.config | fact) for e, fact in zip(loaded, facts, strict=False)]
    with pytest.raises(ValueError, match=message):
        Transformer2Model.from_pretrained(None, experts)


def test_methods_that_return_the_model_return_both_passes(folders):
    model = Transformer2Model(base(), tiny_tokenizer(), [folders["math"]])
    for moved in (model.to("cpu"), model.double(), model.float(), model.eval(), model.requires_grad_(False)):
        assert moved is model
