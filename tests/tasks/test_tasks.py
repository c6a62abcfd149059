# SPDX-License-Identifier: Apache-2.0
"""Laws of the tasks: splits share nothing, choices give nothing away, checks tell right from wrong."""

import collections
import gzip
import importlib.metadata
import json
import os
import re
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import peft_svf.tasks as registry
from peft_svf.tasks import TASKS, Task, dispatch_prompt, format_reward, get_task, jsonl_task, register_task, task_names
from peft_svf.tasks.competition_math import boxed
from peft_svf.tasks.dispatch import everyday
from peft_svf.tasks.own import same_answer
from peft_svf.tasks.programs import code_block
from peft_svf.tasks.task import plain, read_jsonl, rotated
from peft_svf.tasks.vqa import normalised, vqa_accuracy
from peft_svf.tasks.word_problems import calculated, final_number

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
DATA = Path(os.environ.get("PEFT_SVF_DATA") or EXAMPLES)
FULL = pytest.mark.skipif(DATA == EXAMPLES, reason="PEFT_SVF_DATA does not name the full files")
# Those of which the folder has files: of all but the images' with the full files, of six in the examples.
NAMES = sorted(name for name in TASKS if name == "dispatch" or (DATA / name).is_dir())
SPLITS = ("train", "validation", "test")
CHANCE = 0.25  # 4 choices; of ARC's few rows with 3 or 5 the guessers below gain less than 0.01

# Made by hand, in the fields of each task's files.
ARC = {"id": "a1", "question": "What do bees make?", "choices": ["honey", "milk", "a long chair", "wax"], "answer": 0}
SVAMP = {
    "id": "s1",
    "question": "Ann had 78 red pens and 15 caps. She lost 9 pens. How many pens are left?",
    "answer": 69.0,
    "equation": "( 78.0 - 9.0 )",
}
GSM8K = {
    "id": "g1",
    "question": "Bo packs 6 boxes of 12 eggs and sells 30 eggs. How many are left?",
    "answer": "He has 6*12=<<6*12=72>>72.\n72-30=<<72-30=42>>42 are left.\n#### 42",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function to double a number.",
    "code": "def double_it(n):\r\n\treturn n * 2",
    "test_list": ["assert double_it(2) == 4", "assert double_it(-1) == -2"],
}
HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\n\ndef one(n):\n    """ One more. """\n    return n + 1\n\n\n'
    'def all_more(numbers: List[int]) -> List[int]:\n    """ Each number plus one.\n    >>> all_more([1])\n    [2]\n'
    '    """\n',
    "entry_point": "all_more",
    "canonical_solution": "    return [one(n) for n in numbers]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 3]\n    assert candidate([]) == []\n",
}
MBPP_PRO = {
    "id": 3,
    "raw_problem": "# Write a function to double a number.\ndef double_it(n):\n",
    "raw_solution": "    return n * 2\n",
    "new_problem": "# Given a list of numbers, double each.\ndef double_all(numbers):\n",
    "new_solution": "    return [double_it(n) for n in numbers]\n",
    "test_code": "assert double_all([1, 2]) == [2, 4]\nassert double_all([]) == []",
}
MATH = {"problem": "What is half of one?", "answer": r"\frac{1}{2}"}
VQA = {
    "question": "What brand is this?",
    "image_id": "0004c9478eeda995",
    "question_id": 7,
    "answers": ["Dakota"] * 2 + ["the dakota"] + ["2 eyes"] * 2 + ["nous"] * 5,
    "image": {"path": "somewhere.jpg", "bytes": None},
}


@pytest.fixture(scope="module")
def choice_rows():
    return {name: TASKS[name].rows("test", folder=DATA) for name in NAMES}  # none of the images' tasks is there


def columns(row, count):
    """The columns of so many equal rows, as TRL passes them."""
    return {field: [value] * count for field, value in row.items()}


def write(folder, name, file, records):
    (folder / name).mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / name / f"{file}.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


# Names and files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_by_its_name_and_its_file_opens_with_an_example(name):
    task = get_task(name)
    assert task.name == name and task.description
    text = sys.modules[type(task).__module__].__doc__.lower()
    assert all(word in text for word in ("prompt (", "reward", "source", "licence"))


@pytest.mark.parametrize(
    ("name", "split", "form", "message"),
    [
        ("svamp", "dev", "choice", r"no split 'dev'; it has train, validation, test"),
        ("svamp", "test", "free", r"no form 'free'; it has choice, generate"),
        ("textvqa", "test", "choice", r"no form 'choice'; it has generate"),
        ("humaneval", "train", "choice", r"'humaneval' has no split 'train'; it has test\. It only tests"),
        ("mbpp_pro", "validation", "choice", r"'mbpp_pro' has no split 'validation'; it has test\. It only tests"),
    ],
)
def test_a_split_or_form_that_a_task_lacks_is_refused(name, split, form, message):
    with pytest.raises(ValueError, match=message):
        get_task(name).rows(split, form, folder=DATA)


def test_a_missing_file_is_named_with_the_way_out(tmp_path):
    write(tmp_path, "arc_easy", "test", [ARC])
    with pytest.raises(FileNotFoundError, match=r"arc_easy/train\.jsonl\.gz or .*set PEFT_SVF_DATA to a folder"):
        get_task("arc_easy").load("train", tmp_path)


def test_the_argument_goes_before_the_environment(tmp_path, monkeypatch):
    write(tmp_path / "one", "arc_easy", "test", [ARC])
    write(tmp_path / "two", "arc_easy", "test", [{**ARC, "id": "a2"}])
    monkeypatch.setenv("PEFT_SVF_DATA", str(tmp_path / "one"))
    assert get_task("arc_easy").load("test")[0]["id"] == "a1"
    assert get_task("arc_easy").load("test", tmp_path / "two")[0]["id"] == "a2"


@pytest.fixture
def hub(monkeypatch):
    """Put a function in the place of `datasets.load_dataset`, with no folder of data."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv("PEFT_SVF_DATA", raising=False)
    return lambda function: monkeypatch.setattr(datasets, "load_dataset", function)


def test_without_a_folder_the_hub_has_the_same_fields(hub):
    question = {"id": "a1", "question": ARC["question"], "answerKey": "1"}
    body = {"Body": "Ann had 78 red pens and 15 caps. She lost 9 pens.", "Question": "How many pens are left?"}
    published = {
        ("allenai/ai2_arc", "ARC-Easy", "test"): question | {"choices": {"text": ARC["choices"], "label": [*"1234"]}},
        ("ChilleD/SVAMP", None, "train+test"): {"ID": "s1", **body, "Equation": "( 78.0 - 9.0 )", "Answer": "69.0"},
    }
    hub(lambda path, config, split: [published[path, config, split]] if (path, config, split) in published else [])
    assert get_task("arc_easy").load("test") == [ARC]
    assert get_task("svamp").load("train") == [SVAMP]


def test_a_hub_that_fails_is_reported_with_the_way_out(hub):
    def load_dataset(*args, **kwargs):
        raise OSError("no network")

    hub(load_dataset)
    with pytest.raises(ConnectionError, match=r"openai/gsm8k.*no network.*PEFT_SVF_DATA.*gsm8k/test"):
        get_task("gsm8k").load("test")
    with pytest.raises(ValueError, match=r"'okvqa' has no split 'train'.*only tests"):
        get_task("okvqa").load("train")


# Splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_id(name):
    seen = collections.Counter()
    for split in [split for split in TASKS[name].files if DATA != EXAMPLES or split != "train"]:
        ids = [record["id"] for record in TASKS[name].load(split, DATA)]
        assert len(ids) == len(set(ids)) > 0
        seen.update(ids)
    assert max(seen.values()) == 1


def test_gsm8k_deals_the_train_file_to_train_and_validation(tmp_path):
    write(tmp_path, "gsm8k", "train", [{**GSM8K, "id": str(i)} for i in range(7)])
    assert [record["id"] for record in get_task("gsm8k").load("train", tmp_path)] == ["0", "2", "4", "6"]
    assert [record["id"] for record in get_task("gsm8k").load("validation", tmp_path)] == ["1", "3", "5"]


def test_svamp_keeps_a_story_in_one_split_whatever_the_order_of_the_file(tmp_path):
    stories = ["Ann had many pens", "Bo sold some eggs", "Cy read old books", "Di ran far today", "Ed ate sweet figs"]
    stories += [f"Person{'abcdefghij'[i]} saw {i} birds" for i in range(10)]
    records = [{**SVAMP, "id": f"s{i}", "question": f"{stories[i % 15]} {i}."} for i in range(60)]
    splits = []
    for order in (records, records[::-1]):
        write(tmp_path, "svamp", "all", order)
        splits.append({s: [r["id"] for r in get_task("svamp").load(s, tmp_path)] for s in SPLITS})
    assert splits[0] == splits[1]
    assert sum(len(ids) for ids in splits[0].values()) == 60
    owner = {i: split for split, ids in splits[0].items() for i in ids}
    assert all(owner[f"s{i}"] == owner[f"s{i % 15}"] for i in range(60))


def test_everyday_requests_share_neither_template_nor_filler_between_splits():
    source = everyday()
    templates = [template for split in SPLITS for template in source[split]["templates"]]
    assert len(templates) == len(set(templates))
    for slot in source["train"]["fillers"]:
        fillers = [filler for split in SPLITS for filler in source[split]["fillers"][slot]]
        assert len(fillers) == len(set(fillers))


def test_dispatch_draws_each_kind_equally_often_from_the_same_split(tmp_path):
    sources = [
        *(("arc_easy", ARC, "question", 300), ("arc_challenge", ARC, "question", 300), ("mbpp", MBPP, "text", 400)),
        *(("svamp", SVAMP, "question", 300), ("gsm8k", GSM8K, "question", 600)),
    ]
    for split in SPLITS:
        for name, raw, field, count in sources:
            marks = [f"{split}-{i}" for i in range(count)]
            records = [{**raw, "id": f"{name}-{m}-", "task_id": f"{m}-", field: f"{raw[field]} ({m})"} for m in marks]
            write(tmp_path, name, split, records)
    for split, count in (("train", 360), ("validation", 88), ("test", 300)):
        records = get_task("dispatch").load(split, tmp_path)
        kinds = collections.Counter(record["kind"] for record in records)
        assert kinds == dict.fromkeys(("code", "math", "reasoning", "other"), count)
        assert all(f"-{split}-" in record["id"] for record in records)


# The choice form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_row_has_one_right_choice_among_different_ones(name, choice_rows):
    for row in choice_rows[name]:
        assert set(row) == {"prompt", "choices", "label", "id", "task"}
        assert len(set(row["choices"])) == len(row["choices"]) >= 3
        assert 0 <= row["label"] < len(row["choices"]) and row["task"] == name
        assert row["prompt"][-1]["role"] == "user"


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_rows_and_a_limit_takes_the_first(name, choice_rows):
    assert TASKS[name].rows("test", limit=20, folder=DATA) == choice_rows[name][:20]
    assert TASKS[name].rows("test", limit=20, seed=1, folder=DATA) != choice_rows[name][:20]


@FULL
@pytest.mark.parametrize("name", [name for name in NAMES if (EXAMPLES / name).is_dir()])
def test_the_examples_are_the_first_rows_of_the_full_files(name, choice_rows):
    assert TASKS[name].rows("test", limit=64, folder=EXAMPLES) == choice_rows[name][:64]


def guess(rows, size, rank):
    """Accuracy of always taking the choice of that rank in size; a tie is a fair draw."""
    right = 0.0
    for row in rows:
        sizes = sorted({size(choice) for choice in row["choices"]})
        wanted = sizes[rank] if -len(sizes) <= rank < len(sizes) else sizes[-1]
        taken = [index for index, choice in enumerate(row["choices"]) if size(choice) == wanted]
        right += (row["label"] in taken) / len(taken)
    return right / len(rows)


@pytest.mark.parametrize("rank", [0, 1, -1], ids=["shortest", "second shortest", "longest"])
@pytest.mark.parametrize("name", NAMES)
def test_a_length_only_guesser_is_at_chance(name, rank, choice_rows):
    assert len(choice_rows[name]) > 150
    assert abs(guess(choice_rows[name], len, rank) - CHANCE) < 0.10
    if TASKS[name].kind == "code":  # lines are what a reader sees first
        assert abs(guess(choice_rows[name], lambda choice: choice.count("\n"), rank) - CHANCE) < 0.10


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_a_position_only_guesser_is_at_chance(name, position, choice_rows):
    right = [row["label"] == position for row in choice_rows[name]]
    assert abs(sum(right) / len(right) - CHANCE) < 0.07  # two standard errors of the smallest set, 157 rows


@pytest.mark.parametrize("operation", "+-*/")
@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_an_operation_only_guesser_is_at_chance(name, operation, choice_rows):
    right = 0.0
    for row in choice_rows[name]:
        taken = [i for i, choice in enumerate(row["choices"]) if choice.split()[1] == operation] or range(4)
        right += (row["label"] in taken) / len(taken)
    assert abs(right / len(choice_rows[name]) - CHANCE) < 0.10


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_the_right_calculation_gives_the_answer_and_no_other_does(name, choice_rows):
    answers = {row["id"]: row["answer"] for row in TASKS[name].rows("test", "generate", folder=DATA)}
    for row in choice_rows[name]:
        results = [choice.split(" = ")[1] for choice in row["choices"]]
        assert results[row["label"]] == answers[row["id"]]
        assert results.count(answers[row["id"]]) == 1


def test_programs_hide_their_name_and_keep_their_meaning(choice_rows):
    assert all(re.search(r"\bdef solve\(", choice) for row in choice_rows["mbpp"] for choice in row["choices"])
    others = {"halve it": "/ 2", "drop one off": "- 1", "square everything": "** 2"}
    pool = [{**MBPP, "text": text, "code": f"def double_it(n): return n {code}"} for text, code in others.items()]
    row = get_task("mbpp").choice_row({**MBPP, "id": "mbpp-7"}, pool)
    assert row["choices"][row["label"]] == "def solve(n):\n    return n * 2"


def test_an_option_printed_twice_leaves_the_row_out():
    assert get_task("arc_easy").choice_row({**ARC, "choices": ["honey", "honey", "milk"]}) is None


def test_the_most_frequent_answer_of_math_is_little_better_than_chance(choice_rows):
    if "math" not in choice_rows:
        pytest.skip("PEFT_SVF_DATA has no math")
    often = collections.Counter(row["answer"] for row in TASKS["math"].rows("test", "generate", folder=DATA))
    assert guess(choice_rows["math"], often.__getitem__, -1) < CHANCE + 0.10


def test_wrong_answers_of_math_have_the_shape_of_the_right_one():
    texts = ["12", "34", "56", "78", "90", "5", r"\\frac{1}{2}", "x + 1"]
    records = [{**MATH, "answer": text, "id": f"math-{index}"} for index, text in enumerate(texts)]
    row = get_task("math").choice_row(records[0], records)
    assert row["choices"][row["label"]] == "12" and set(row["choices"]) < set(texts[:5])
    assert get_task("math").choice_row(records[-1], records) is None  # no other answer looks like it


def test_helpers_and_names_of_unseen_programs_are_hidden_too():
    question, solve = get_task("humaneval").question(HUMANEVAL), "def solve(numbers):\n    return "
    assert "solve([1])" in question and "all_more" not in question
    solve += "[helper(n) for n in numbers]"
    assert get_task("humaneval").program(HUMANEVAL) == f"def helper(n):\n    return n + 1\n\n{solve}"
    assert get_task("mbpp_pro").question(MBPP_PRO) == "Given a list of numbers, double each."
    assert get_task("mbpp_pro").program(MBPP_PRO) == solve


# Letters, calculations, solved examples -----------------------------------------------------------------------------


def test_a_letter_names_the_option_that_a_seed_put_there():
    task, seen = get_task("arc_easy"), set()
    for seed in range(8):
        row = task.make_row({**ARC, "id": "a1"}, "letter", seed=seed)
        assert row["options"]["ABCD".index(row["answer"])] == "honey"
        text = row["prompt"][-1]["content"]
        assert text.endswith(f"\nD. {row['options'][3]}\nAnswer with one letter.")
        assert f"{row['answer']}. honey\n" in text
        wrong = "ABCD".replace(row["answer"], "")[0]
        answers = [f" {row['answer']}", wrong, f"{row['answer']}n ant", ""]
        assert task.reward(answers, **columns(row, 4)) == [1.0, -1.0, -1.0, -1.0]
        seen.add(row["answer"])
    assert len(seen) > 2


def test_rotations_put_the_right_option_at_each_letter_once():
    row = get_task("arc_easy").make_row({**ARC, "id": "a1"}, "letter")
    rows = [rotated(row, places) for places in range(4)]
    assert rows[0] == row and sorted(r["answer"] for r in rows) == [*"ABCD"]
    for turned in rows:
        assert turned["options"]["ABCD".index(turned["answer"])] == "honey"
        assert f"{turned['answer']}. honey\n" in turned["prompt"][-1]["content"]
    with pytest.raises(ValueError, match="no lettered options"):
        rotated(get_task("arc_easy").choice_row({**ARC, "id": "a1"}), 1)


@pytest.mark.parametrize(("name", "raw", "solution"), [("svamp", SVAMP, "78 - 9"), ("gsm8k", GSM8K, "(6 * 12) - 30")])
def test_a_calculation_is_graded_by_its_value(name, raw, solution):
    task = get_task(name)
    row = task.make_row({**raw, "id": "1"}, "calculation")
    assert row["calculation"] == task.solved(raw, row) == solution
    answers = [solution, f"{row['answer']} + 0 = 3", "78 + 9"]
    assert task.reward(answers, **columns(row, 3)) == [1.0, 1.0, -1.0]


def test_a_record_whose_calculation_does_not_give_its_answer_has_none():
    assert get_task("svamp").make_row({**SVAMP, "id": "1", "answer": 7}, "calculation") is None
    assert get_task("gsm8k").make_row({**GSM8K, "id": "1", "answer": "#### 7"}, "calculation") is None


@pytest.mark.parametrize("form", ["choice", "generate", "letter"])
def test_shots_are_solved_training_rows_before_each_question(form, tmp_path):
    for split in SPLITS:
        records = [{**ARC, "id": f"{split}{i}", "question": f"{split} {i}?"} for i in range(6)]
        write(tmp_path, "arc_easy", split, records)
    task, made = get_task("arc_easy"), {}
    for split in SPLITS:
        made[split] = task.rows(split, form, folder=tmp_path, system="Be brief.", shots=2, seed=len(split))
        assert len(made[split]) == (4 if split == "train" else 6)
    shots = made["test"][0]["prompt"][:-1]
    assert shots[0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in shots[1:]] == ["user", "assistant"] * 2
    for row in (row for rows in made.values() for row in rows):
        assert row["prompt"][:-1] == shots and row["prompt"][-1]["content"][:9] not in str(shots)
    for question, answer in zip(shots[1::2], shots[2::2], strict=True):
        assert question["content"].startswith("train")
        graded = task.make_row({**ARC, "question": question["content"].partition("?")[0] + "?", "id": "x"}, form)
        if form != "letter":
            assert task.grade(answer["content"], graded) == 1


def test_a_task_without_training_rows_or_with_images_has_no_shots(tmp_path):
    write(tmp_path, "humaneval", "test", [HUMANEVAL])
    with pytest.raises(ValueError, match="has no split 'train'"):
        get_task("humaneval").rows("test", "generate", folder=tmp_path, shots=1)
    textvqa_folder(tmp_path)
    with pytest.raises(ValueError, match="images, which take no solved examples"):
        get_task("textvqa").rows("test", "generate", folder=tmp_path, shots=1)


def test_a_system_prompt_stays_away_from_rows_that_have_one(tmp_path):
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "5 + 1 ="}]
    task = jsonl_task(lines(tmp_path / "train.jsonl", [{**SUMS[5], "prompt": own}, *SUMS[6:9]]).parent)
    rows = task.rows("train", "generate", system="theirs")
    assert collections.Counter(row["prompt"][0]["content"] for row in rows) == {"mine": 1, "theirs": 3}


# Nothing of a test set is trained on --------------------------------------------------------------------------------


def write_text(folder, name, file, text):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / file).write_text(text)


def test_a_test_item_under_another_id_is_left_out_of_the_other_splits(tmp_path):
    twin = {**ARC, "id": "a9", "question": "What do  BEES make?", "choices": ARC["choices"][::-1], "answer": 3}
    other = {**ARC, "id": "a3", "choices": ["honey", "wax", "milk"]}
    for split in ("train", "validation"):
        write(tmp_path, "arc_easy", split, [twin, other])
    write(tmp_path, "arc_easy", "test", [ARC])
    for split in ("train", "validation"):
        assert [record["id"] for record in get_task("arc_easy").load(split, tmp_path)] == ["a3"]
    assert [record["id"] for record in get_task("arc_easy").load("test", tmp_path)] == ["a1"]


@FULL
def test_no_item_of_any_test_split_is_trained_on_by_any_task():
    tested, trained = {}, {}
    for name in set(NAMES) - {"dispatch"}:
        task = TASKS[name]
        tested |= {task.item(record): name for record in task.load("test", DATA)}
        for split in set(task.files) - {"test"}:
            trained |= {task.item(record): name for record in task.load(split, DATA)}
    assert len(tested) > 6500 and len(trained) > 15000
    assert {(tested[item], trained[item]) for item in tested.keys() & trained.keys()} == set()


@FULL
def test_no_problem_of_the_programming_test_sets_is_trained_on():
    mbpp = get_task("mbpp")
    trained = {split: mbpp.load(split, DATA) for split in ("train", "validation")}
    texts = {plain(record["text"]).rstrip(".") for records in trained.values() for record in records}
    raw = [re.findall(r"^# *(.*)$", r["raw_problem"], re.M) for r in get_task("mbpp_pro").load("test", DATA)]
    assert len(raw) == 229
    assert not texts & {plain(" ".join(lines)).rstrip(".") for lines in raw}
    # mbpp_pro is built on the problems of mbpp_plus, in its order
    source = [int(record["task_id"].split("/")[1]) for record in read_jsonl(DATA / "mbpp_plus" / "test.jsonl.gz")]
    numbers = [int(record["id"].split("-")[1]) for record in get_task("mbpp_pro").load("test", DATA)]
    ids = {record["task_id"] for records in trained.values() for record in records}
    assert len(source) == 378 and max(source[number] for number in numbers) <= 510
    assert ids.isdisjoint(source[number] for number in numbers)
    task = get_task("humaneval")
    questions = {plain(task.question(raw).split("\n")[0]) for raw in task.load("test", DATA)}
    assert len(questions) > 100 and not questions & texts


def test_math_trains_outside_math_500_and_refuses_to_without_it(tmp_path):
    records = [{**MATH, "problem": f"What is half of {number}?"} for number in range(100)]
    write(tmp_path, "math", "test", records)
    with pytest.raises(FileNotFoundError, match="math500"):
        get_task("math").load("train", tmp_path)
    write(tmp_path, "math", "math500", records[:20])
    loaded = {split: {r["problem"] for r in get_task("math").load(split, tmp_path)} for split in SPLITS}
    assert loaded["test"] == {record["problem"] for record in records[:20]}
    assert loaded["train"] | loaded["validation"] == {record["problem"] for record in records[20:]}
    assert len(loaded["train"]) + len(loaded["validation"]) == 80 and loaded["validation"]


def test_the_train_set_of_math_on_the_hub_is_not_used(hub):
    test = [{**MATH, "problem": f"P{number}", "unique_id": f"test/algebra/{number}.json"} for number in range(30)]
    train = [{**MATH, "problem": f"Q{number}", "unique_id": f"train/algebra/{number}.json"} for number in range(30)]
    held_out = [{**MATH, "problem": "P0", "unique_id": "test/algebra/0.json"}]
    published = {"train": test + train, "test": held_out}
    hub(lambda path, config, split: published[split])
    found = {r["problem"] for split in ("train", "validation") for r in get_task("math").load(split)}
    assert found == {f"P{number}" for number in range(1, 30)}


# Dispatch -----------------------------------------------------------------------------------------------------------


def test_the_dispatch_prompt_has_the_kinds_first_and_the_question_after_them():
    first, second = (dispatch_prompt(question)[0]["content"] for question in ("Add 2 and 3.", "Why is the sky blue?"))
    fixed = first[: first.index("Add 2")]
    assert second.startswith(fixed + "Why is")
    assert all(kind in fixed for kind in ("code", "math", "reasoning", "other"))
    text = dispatch_prompt("Hi", {"law": "a legal matter", "other": ""})[0]["content"]
    assert "law (a legal matter) or other." in text and "math" not in text


# The generated form and the reward ----------------------------------------------------------------------------------

DOUBLE, MORE = "def double_it(n): return n", "def all_more(a): return "
CHECKED = [
    ("arc_easy", ARC, "Bees make honey. The answer is (A).", "The answer is (B)."),
    ("arc_easy", ARC, "A", "D) glass"),
    ("arc_easy", ARC, "Honey.", "Milk."),
    ("arc_easy", ARC, "At first I said the answer is B, but the answer is **A**.", "A bee makes many things."),
    ("arc_challenge", ARC, "(A) honey", ""),
    ("arc_easy", ARC, "The answer is (a).", "The answer is a plant cell."),  # the article is no letter
    ("arc_easy", ARC, "Answer: **A**", "The best choice a student has is (B)."),
    ("svamp", SVAMP, "78 - 9 = 69. The answer is 69.", "78 - 15 = 63"),
    ("svamp", SVAMP, "69.0", "no idea"),
    ("gsm8k", GSM8K, "6*12 = 72, 72 - 30 = 42\n#### 42", "72"),
    ("gsm8k", GSM8K, "The answer is $42.00, of 72 eggs.", "The answer is 4.2"),
    ("mbpp", MBPP, f"Sure:\n```python\n{DOUBLE} + n\n```\nDone.", f"```\n{DOUBLE}\n```"),
    ("mbpp", MBPP, "def double_it(n): return 2 * n", "print('passed'); exit(0)"),
    ("humaneval", HUMANEVAL, f"```python\n{MORE}[x + 1 for x in a]\n```", f"{MORE}a"),
    ("humaneval", HUMANEVAL, "    return [one(n) for n in numbers]", "    return numbers"),
    ("mbpp_pro", MBPP_PRO, "def double_all(a): return [2 * n for n in a]", "def double_it(n): return 2 * n"),
    ("textvqa", VQA, "The Dakota.", "Nikon"),
    ("okvqa", VQA, "nous", ""),
    ("dispatch", {"id": "d1", "question": "Add.", "kind": "math"}, " Math", "code or math"),
]


@pytest.mark.parametrize(("name", "raw", "right", "wrong"), CHECKED)
def test_a_right_completion_earns_one_and_a_wrong_one_minus_one(name, raw, right, wrong):
    row = TASKS[name].row({"id": "1", **raw})
    chats = [[{"role": "assistant", "content": text}] for text in (right, wrong)]
    assert TASKS[name].reward([right, wrong], **columns(row, 2)) == [1.0, -1.0]
    assert TASKS[name].reward(chats, **columns(row, 2), trainer_state=None) == [1.0, -1.0]


MATH_CHECKED = [
    (r"\frac{1}{2}", r"so it is \boxed{0.5}.", r"\boxed{2}"),
    (r"\frac{1}{2}", r"first \boxed{3}. No: $\boxed{\dfrac12}$", r"\boxed{\frac{1}{2}} or \boxed{3}"),
    ("p - q", r"\boxed{-q + p}", r"\boxed{q - p}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", r"\boxed{(\pi/2, 3)}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", r"\boxed{\text{Carla}}"),
    ("42", "The answer is 42.", "no idea"),
    ("1,234", r"\boxed{1234}", ""),
]


@pytest.mark.parametrize(("answer", "right", "wrong"), MATH_CHECKED)
def test_formulas_are_compared_by_value(answer, right, wrong):
    pytest.importorskip("math_verify")
    row = get_task("math").row({**MATH, "answer": answer, "id": "m1"})
    assert get_task("math").reward([right, wrong], answer=[row["answer"]] * 2) == [1.0, -1.0]


def test_formulas_are_refused_outside_the_main_thread():
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(get_task("math").score, "43", {"answer": "42"}).result()


@pytest.mark.parametrize("name", NAMES)
def test_the_published_answer_is_right(name):
    for row in TASKS[name].rows("test", "generate", limit=10, folder=DATA):
        assert TASKS[name].score(str(row["answer"]), row) == 1


@pytest.mark.parametrize("name", NAMES)
def test_in_the_choice_form_only_the_right_choice_to_the_letter_is_right(name, choice_rows):
    row, count = choice_rows[name][0], len(choice_rows[name][0]["choices"])
    expected = [1.0 if index == row["label"] else -1.0 for index in range(count)]
    assert TASKS[name].reward(row["choices"], **columns(row, count)) == expected


def test_a_format_reward_is_one_where_the_pattern_is_found():
    reward = format_reward(r"answer is -?[\d,.]+\s*$")
    texts = ["so\nthe answer is 1,200.5 ", "the answer is near", "answer is 3, or 4", ""]
    assert reward(completions=texts, prompts=texts) == [1.0, 0.0, 0.0, 0.0]
    assert reward([[{"role": "assistant", "content": text}] for text in texts]) == [1.0, 0.0, 0.0, 0.0]
    assert reward([[{"role": "assistant", "content": None}]]) == [0.0]
    assert format_reward("^<a>.*</a>$")(["<a>\n</a>", "<a>"]) == [1.0, 0.0]


READ = {
    calculated: {
        **{"8 + 3 =": 11, "8+3=12 apples": 11, "(6 * 12) - 30\nso 42": 42, "-3 + 2 × -4": -11, "7 / 2": 3.5},
        **{"$1,200 x 2.": 2400, "2 - 3 - 4": -5, "12 / 2 * 3": 18, "42": 42},
        **dict.fromkeys(["8 +", "8 3", "7 / (3 - 3)", "(8", "8)", "", "8 + three", "__import__('os')", "2 ** 9"]),
        **dict.fromkeys(["+", "3 (4)", "(" * 5000, "1+" * 5000 + "1"]),
    },
    final_number: {
        **{"1,234,567": 1234567, "It costs $3.50.": 3.5, "So x = -7": -7, "from 3 to 5-2": 2, ".5": 0.5, "none": None},
        **{"The answer is: **12**, not 13": 12, "#### 8\nThanks 9": 8, "about 40% of it": 40},
    },
    boxed: {
        r"\boxed{3}. No: \boxed{\dfrac12}": ["3", r"\dfrac12"],
        r"\boxed {\frac{1}{2}}": [r"\frac{1}{2}"],
        r"\boxed{\left\{ 1 \right.}": [r"\left\{ 1 \right."],
        r"\boxed{\boxed{7}}": [r"\boxed{7}"],
        r"a } \boxed{8}": ["8"],
        r"\boxed{9": [],
    },
    normalised: {  # as the VQA evaluation does
        **{"The  Two dogs.": "2 dogs", "none": "0", "1,000": "1000", "$3.50": "$3.50", "U.S.A.": "usa"},
        **{"stop-sign": "stop sign", "yes, sir!": "yes sir", "don't": "dont", "it's": "its", "a\nball": "ball"},
        "women's": "women's",
    },
}


@pytest.mark.parametrize("reader", READ, ids=lambda reader: reader.__name__)
def test_a_reader_finds_what_a_text_says(reader):
    assert {text: reader(text) for text in READ[reader]} == READ[reader]


READERS = {  # what a reader does with a model's text, and texts that backtracking regular expressions are slow on
    **{f"number-{i}": (final_number, text) for i, text in enumerate(("answer is\n", "####\n", "7"))},
    "number-3": (final_number, "-$1,"),
    "own": (lambda text: same_answer(text, {"answer": "42"}), "answer is \n"),
    "words": (lambda text: same_answer(text, {"answer": "a b"}), " \n"),
    "calculation": (calculated, "7 + ("),
    "letter": (lambda text: get_task("arc_easy").score(text, {"answer": "A"}), "answer \n"),
    "kind": (lambda text: get_task("dispatch").score(text, {"answer": "code"}), "cod e"),
    "box": (boxed, "\\boxed{ \n"),
    "boxes": (boxed, "\\boxed{a}"),
    "program": (code_block, "``` \n\t"),
    "people": (lambda text: vqa_accuracy(text, ["yes"] * 10), "it's a, 1 - "),
}


@pytest.mark.parametrize("reader", READERS)
def test_twice_the_text_takes_a_reader_at_most_about_twice_as_long(reader):
    read, unit = READERS[reader]
    starts, fills = ("", "answer", "answer is", "####", "```py", "\\boxed{"), (unit, "\n", " ", "9", "{")

    def seconds(size):
        texts = [start + fill * (size // len(fill)) for start in starts for fill in fills]
        timers = [timeit.Timer(lambda text=text: read(text), timer=time.process_time) for text in texts]
        return sum(min(timer.repeat(3, number=1)) for timer in timers)

    assert seconds(16_000) < 4 * (1.5 * seconds(4_000) + 0.01)


@pytest.mark.parametrize("digits", [65, 5_000, 100_000])
def test_thousands_of_digits_are_a_number_and_a_wrong_one(digits):
    for text in ("9" * digits, f"The answer is {'9' * digits}.", "." + "9" * digits, "0" * digits + "42"):
        assert final_number(text) is not None
        assert get_task("gsm8k").score(text, {"answer": "42"}) == (text[-2:] == "42")


# Questions about images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_a_third_per_person_up_to_one(matches, accuracy):
    people = ["yes"] * matches + ["no"] * (10 - matches)
    assert vqa_accuracy("Yes", people) == get_task("okvqa").score("yes", {"answers": people}) == accuracy
    assert get_task("okvqa").reward(["yes"], answers=[people]) == pytest.approx([2 * accuracy - 1])


def picture(size):
    import seeing

    return seeing.png(seeing.Image.new("RGB", size))


def textvqa_folder(folder):
    images = [f"{number:016x}" for number in range(40)]
    for file, ids in (("train", images[:30]), ("val", images[30:])):
        data = [
            {
                **VQA,
                "image_id": image,
                "question_id": f"{image}-{k}",
                "question": f"What is {k}?",
                "image": f"{image}.jpg",
            }
            for image in ids
            for k in (0, 1)
        ]
        write(folder, "textvqa", file, data)
    return images


def test_textvqa_cuts_by_images_and_tests_on_the_published_validation_set(tmp_path):
    images = textvqa_folder(tmp_path)
    loaded = {split: {r["image_id"] for r in get_task("textvqa").load(split, tmp_path)} for split in SPLITS}
    assert loaded["test"] == set(images[30:])
    assert loaded["train"] | loaded["validation"] == set(images[:30])
    assert loaded["validation"] and loaded["train"].isdisjoint(loaded["validation"])  # an image with all its questions
    (first, *_) = rows = get_task("textvqa").rows("train", "generate", folder=tmp_path)
    image = str(tmp_path / "textvqa" / f"{first['id'].split('-')[1]}.jpg")
    assert first["image"] == {"path": image, "bytes": None}
    assert first["answers"] == VQA["answers"] and first["answer"] == "nous"
    (message,) = first["prompt"]
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"].endswith("Answer with a single word or phrase.")
    assert len({row["id"] for row in rows}) == len(rows)


def test_an_image_is_decoded_only_when_a_row_of_the_data_set_is_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    textvqa_folder(tmp_path)
    rows = get_task("textvqa").rows("test", "generate", limit=3, folder=tmp_path)
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())  # no image is there yet
    for number, row in enumerate(rows):
        path = Path(row["image"]["path"])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture((number + 2, number + 3)))
    assert [table[number]["image"].size for number in range(3)] == [(2, 3), (3, 4), (4, 5)]


def test_from_the_hub_only_the_images_of_the_rows_are_read(hub):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": picture((number + 1, 5)), "path": None} for number in range(8)]
    records = [{**VQA, "question_id": n, "image_id": str(n), "image": image} for n, image in enumerate(images)]
    table = datasets.Dataset.from_list(records).cast_column("image", datasets.Image())
    hub(lambda path, config, split: table)
    assert all(callable(record["image"]) for record in get_task("textvqa").load("test"))
    rows = get_task("textvqa").rows("test", "generate", limit=2)
    shown = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    assert [row["image"].size for row in shown] == [(int(row["id"].split("-")[1]) + 1, 5) for row in rows]


# Tasks of one's own -------------------------------------------------------------------------------------------------


def lines(path, records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


QUIZ = [{"prompt": f"Which is {n}?", "choices": [f"n{n}", f"m{n}", f"k{n}"], "label": n % 3} for n in range(60)]
SUMS = [{"prompt": f"{n} + 1 =", "answer": n + 1, "level": n % 2} for n in range(60)]


def test_a_jsonl_file_becomes_a_task_of_three_splits_that_share_no_prompt(tmp_path):
    task = jsonl_task(lines(tmp_path / "quiz.jsonl", QUIZ + QUIZ[:20]))
    prompts = {split: {row["prompt"][0]["content"] for row in task.rows(split)} for split in SPLITS}
    assert sum(map(len, prompts.values())) == 60 and all(prompts.values())
    assert task.name == "quiz" and len(prompts["train"]) > len(prompts["test"]) > 0


def test_a_jsonl_of_choices_has_both_forms(tmp_path):
    task = jsonl_task(lines(tmp_path / "quiz.jsonl", QUIZ))
    right = {record["prompt"]: record["choices"][record["label"]] for record in QUIZ}
    rows = task.rows("train")
    assert {row["label"] for row in rows} == {0, 1, 2}
    for row in rows:
        assert row["choices"][row["label"]] == right[row["prompt"][0]["content"]]
        assert sorted(task.reward(row["choices"], **columns(row, 3))) == [-1.0, -1.0, 1.0]
    (row, *_) = task.rows("test", "generate")
    text = right[row["prompt"][0]["content"]]
    assert task.reward([f" {text.upper()}.", "x"], **columns(row, 2)) == [1.0, -1.0]


def test_a_jsonl_of_answers_compares_numbers_by_value_and_texts_by_letters(tmp_path):
    task = jsonl_task(lines(tmp_path / "sums.jsonl", SUMS), kind="math")
    (row, *_) = task.rows("train", "generate")
    wanted = int(row["answer"])
    assert row["level"] in (0, 1) and row["task"] == "sums"
    answers = [f"so it is {wanted}.0", str(wanted + 1)]
    assert task.reward(answers, **columns(row, 2)) == [1.0, -1.0]
    with pytest.raises(ValueError, match="has no form 'choice'; it has generate"):
        task.rows("train")
    strict = jsonl_task(tmp_path / "sums.jsonl", score=lambda text, row: text == "always this")
    assert strict.reward(["always this"], **columns(row, 1)) == [1.0]


def test_a_folder_of_jsonl_files_keeps_its_splits_and_refuses_a_prompt_of_the_test(tmp_path):
    lines(tmp_path / "train.jsonl", SUMS[:4])
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write(json.dumps(SUMS[5]))
    task = jsonl_task(tmp_path, name="sums")
    assert [len(task.rows(split, "generate")) for split in ("train", "test")] == [4, 1]
    with pytest.raises(ValueError, match="has no split 'validation'; it has train, test"):
        task.load("validation")
    lines(tmp_path / "train.jsonl", [SUMS[4], {**SUMS[5], "prompt": " 5 +  1 = "}])
    with pytest.raises(ValueError, match=r"1 prompts of train are also in test, such as ' 5 \+  1 = '"):
        jsonl_task(tmp_path, name="sums")


WRONG_LINES = [
    ("{", "not JSON"),
    ([1], "expected an object"),
    ({"prompt": "a"}, "expected 'answer'"),  # the other rules of `rows.check` have their test
    ({"prompt": "a", "choices": ["x"], "label": 0}, "two or more"),
    ({"prompt": "a", "answer": "b", "id": "7"}, r"its id '7' is also that of '.*mine\.jsonl', line 1"),
    ('{"prompt": "a", "answer": NaN}', "not JSON: .*'NaN'"),
    ('{"prompt": "a", "answer": "b", "level": Infinity}', "not JSON: .*'Infinity'"),
    ({"prompt": "a", "completion": "b"}, "got the answer None; its fields are prompt, completion"),
    ({"prompt": "a", "answer": "b", "completions": 1}, "cannot be called 'completions'"),
    ({"prompt": "a", "answer": "b", "self": 1}, "cannot be called 'self'"),
]


@pytest.mark.parametrize(("line", "message"), WRONG_LINES)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = lines(tmp_path / "mine.jsonl", [{**SUMS[0], "id": 7}, "", line])
    with pytest.raises(ValueError, match=rf"mine\.jsonl', line 3: .*{message}"):
        jsonl_task(path)


def test_what_may_differ_between_lines_comes_along_into_one_table(tmp_path):
    from datasets import Dataset

    more = [{"id": 1, "level": None, "of": {"a": 1}}, {"id": "x", "level": 2.5, "of": {"b": [1]}, "answer": "two"}, {}]
    records = [{**record, **extra} for record, extra in zip(SUMS, more * 20, strict=True)]
    for number, record in enumerate(records[3:]):
        record["id"] = number + 2 if number % 2 else f"x{number}"
    records[3]["prompt"] = [{"role": "user", "content": "a chat"}]
    task = jsonl_task(lines(tmp_path / "sums.jsonl", records))
    assert len(Dataset.from_list(task.rows("train", "generate"))) > 30


def test_lines_may_differ_where_no_table_is_made_of_them(tmp_path):
    parts = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    more = [{"level": "hard", "prompt": parts}, {"level": True}, {"tags": [1, "x"]}]
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines(folder / "test.jsonl", [{**record, **extra} for record, extra in zip(SUMS, more, strict=False)])
    assert {str(row.get("level")) for row in jsonl_task(folder).rows("test", "generate")} == {"hard", "True", "0"}


def test_a_row_knows_its_file_and_line(tmp_path):
    path = lines(tmp_path / "quiz.jsonl", [{**record, "id": None} for record in QUIZ])  # no id, like a missing one
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    task = jsonl_task(path)
    rows = {row["id"]: (split, row) for split in SPLITS for row in task.rows(split)}
    assert len(rows) == 60
    for split, row in rows.values():
        number = next(n for n, record in enumerate(QUIZ, 1) if record["prompt"] == row["prompt"][0]["content"])
        assert task.place(split, row) == f"'{path}', line {number}"


def test_choices_among_lines_with_answers_are_texts_to_write(tmp_path):
    task = jsonl_task(lines(tmp_path / "mixed.jsonl", QUIZ + SUMS))
    assert task.forms == ("generate",) and {"n3", "7"} & {row["answer"] for row in task.rows("train", "generate")}


def test_a_source_of_too_few_or_no_lines_is_refused(tmp_path):
    for few in (SUMS[:2], [SUMS[0], SUMS[1]] * 20):
        with pytest.raises(ValueError, match=r"2 different prompts, too few to cut.*folder"):
            jsonl_task(lines(tmp_path / "few.jsonl", few))
    (tmp_path / "table.parquet").write_bytes(b"PAR1\xff")
    with pytest.raises(ValueError, match=r"table\.parquet' isn't UTF-8 text of one JSON object a line"):
        jsonl_task(tmp_path / "table.parquet")
    lines(tmp_path / "test.jsonl", [])
    for place in (tmp_path, tmp_path / "gone.jsonl"):
        with pytest.raises(FileNotFoundError, match=r"is neither a \.jsonl file nor a folder with lines"):
            jsonl_task(place)


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "TASKS", dict(TASKS))


def test_a_registered_task_is_found_and_a_taken_name_refused(tmp_path, clean_registry):
    task = jsonl_task(lines(tmp_path / "quiz.jsonl", QUIZ))
    assert register_task(task) is task and register_task(task) is task
    assert get_task("quiz") is task and "quiz" in task_names()
    with pytest.raises(ValueError, match=r"'gsm8k' is taken by <Task 'gsm8k'"):
        register_task(jsonl_task(tmp_path / "quiz.jsonl", name="gsm8k"))


class Puzzle(Task):
    name, kind, description = "puzzle", "reasoning", "a task of another package"

    def score(self, completion, row):
        return 0.5


def test_an_entry_point_adds_a_task_and_is_loaded_only_when_asked_for(monkeypatch, clean_registry):
    points = {"puzzle": f"{__name__}:Puzzle", "unused": "no.such.module:Task"}
    found = [importlib.metadata.EntryPoint(name, value, "peft_svf.tasks") for name, value in points.items()]

    def entry_points(group, name=None):
        assert group == "peft_svf.tasks"
        return [point for point in found if name in (None, point.name)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert {"puzzle", "unused", "arc_easy"} <= set(task_names())
    assert type(get_task("puzzle")).__name__ == "Puzzle" and get_task("puzzle") is get_task("puzzle")
    with pytest.raises(ValueError, match=r"no task 'arc'; there are .*puzzle"):
        get_task("arc")
