# SPDX-License-Identifier: Apache-2.0
"""Laws of the tasks: splits share nothing, choices give nothing away, checks tell right from wrong."""

import collections
import gzip
import json
import os
import re
from pathlib import Path

import pytest

from peft_svf.tasks import TASKS, Task, dispatch_prompt, get_task
from peft_svf.tasks.everyday import FILLERS, TEMPLATES
from peft_svf.tasks.word_problem import final_number

EXAMPLES = Path(__file__).parent.parent / "examples" / "data"
DATA = Path(os.environ.get("PEFT_SVF_DATA") or EXAMPLES)
NAMES = sorted(TASKS)
SPLITS = ("train", "validation", "test")
CHANCE = 0.25  # 4 choices; of ARC's few rows with 3 or 5 the guessers below gain less than 0.01

# Made by hand, in the fields of each task's files.
ARC = {
    "id": "a1",
    "question": "What do bees make?",
    "choices": ["honey", "milk", "a long wooden chair", "glass"],
    "answer": 0,
}
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
    "test_setup_code": "",
}


@pytest.fixture(scope="module")
def choice_rows():
    return {name: TASKS[name].rows("test", folder=DATA) for name in NAMES}


def write(folder, name, file, records):
    (folder / name).mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / name / f"{file}.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


# Names and files ----------------------------------------------------------------------------------------------------


def test_every_task_is_found_by_its_name():
    assert all(get_task(name).name == name for name in TASKS)
    assert all(isinstance(task, Task) and task.description for task in TASKS.values())


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no task 'arc'.*arc_challenge, arc_easy, dispatch"):
        get_task("arc")


def test_an_unknown_split_or_form_is_refused():
    with pytest.raises(ValueError, match=r"no split 'dev'.*train, validation, test"):
        get_task("svamp").load("dev", DATA)
    with pytest.raises(ValueError, match=r"no form 'free'.*choice, generate"):
        get_task("svamp").rows("test", form="free", folder=DATA)


def test_a_missing_file_names_the_path_and_what_is_there(tmp_path):
    write(tmp_path, "arc_easy", "test", [ARC])
    with pytest.raises(FileNotFoundError) as caught:
        get_task("arc_easy").load("train", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "arc_easy" / "train.jsonl.gz") in message
    assert "test.jsonl.gz" in message and "PEFT_SVF_DATA" in message


def test_the_argument_goes_before_the_environment(tmp_path, monkeypatch):
    write(tmp_path / "one", "arc_easy", "test", [ARC])
    write(tmp_path / "two", "arc_easy", "test", [{**ARC, "id": "a2"}])
    monkeypatch.setenv("PEFT_SVF_DATA", str(tmp_path / "one"))
    assert get_task("arc_easy").load("test")[0]["id"] == "a1"
    assert get_task("arc_easy").load("test", tmp_path / "two")[0]["id"] == "a2"


def test_without_a_folder_the_hub_is_asked_for_the_same_fields(monkeypatch):
    datasets = pytest.importorskip("datasets")
    published = {
        "allenai/ai2_arc": {
            "id": "a1",
            "question": ARC["question"],
            "choices": {"text": ARC["choices"], "label": ["1", "2", "3", "4"]},
            "answerKey": "1",
        },
        "ChilleD/SVAMP": {
            "ID": "s1",
            "Body": "Ann had 78 red pens and 15 caps. She lost 9 pens.",
            "Question": "How many pens are left?",
            "Equation": "( 78.0 - 9.0 )",
            "Answer": "69.0",
        },
    }
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return [published[path]]

    monkeypatch.delenv("PEFT_SVF_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert get_task("arc_easy").load("test") == [ARC]
    assert get_task("svamp").load("train") == [SVAMP]
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "test"), ("ChilleD/SVAMP", None, "train+test")]


def test_a_hub_that_fails_is_reported_with_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.delenv("PEFT_SVF_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"openai/gsm8k.*no network.*PEFT_SVF_DATA.*gsm8k/test"):
        get_task("gsm8k").load("test")


# Splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_id(name):
    seen = collections.Counter()
    for split in SPLITS if DATA != EXAMPLES else SPLITS[1:]:
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
    templates = [template for split in SPLITS for template in TEMPLATES[split]]
    assert len(templates) == len(set(templates))
    for slot in FILLERS["train"]:
        fillers = [filler for split in SPLITS for filler in FILLERS[split][slot]]
        assert len(fillers) == len(set(fillers))


def test_dispatch_draws_each_kind_equally_often_from_the_same_split(tmp_path):
    for split in SPLITS:
        write(tmp_path, "arc_easy", split, [{**ARC, "id": f"ae-{split}-{i}"} for i in range(300)])
        write(tmp_path, "arc_challenge", split, [{**ARC, "id": f"ac-{split}-{i}"} for i in range(300)])
        write(tmp_path, "mbpp", split, [{**MBPP, "task_id": f"{split}-{i}"} for i in range(400)])
        write(tmp_path, "svamp", split, [{**SVAMP, "id": f"s-{split}-{i}"} for i in range(300)])
        write(tmp_path, "gsm8k", split, [{**GSM8K, "id": f"g-{split}-{i}"} for i in range(600)])
    for split, count in (("train", 1440), ("validation", 352), ("test", 1200)):
        records = get_task("dispatch").load(split, tmp_path)
        kinds = collections.Counter(record["kind"] for record in records)
        assert kinds == dict.fromkeys(("code", "math", "reasoning", "other"), count // 4)
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


@pytest.mark.skipif(DATA == EXAMPLES, reason="PEFT_SVF_DATA does not name the full files")
@pytest.mark.parametrize("name", NAMES)
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
    assert len(choice_rows[name]) > 190
    assert abs(guess(choice_rows[name], len, rank) - CHANCE) < 0.10
    if name == "mbpp":  # lines are what a reader sees first
        assert abs(guess(choice_rows[name], lambda choice: choice.count("\n"), rank) - CHANCE) < 0.10


@pytest.mark.parametrize("name", NAMES)
def test_a_position_only_guesser_is_at_chance(name, choice_rows):
    rows = choice_rows[name]
    for position in range(4):
        share = sum(row["label"] == position for row in rows) / len(rows)
        assert abs(share - CHANCE) < 0.07  # two standard errors of the smallest set, 203 rows


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
    row = get_task("mbpp").choice_row(
        {**MBPP, "id": "mbpp-7"},
        [
            {**MBPP, "text": text, "code": f"def double_it(n):\n    return n {code}"}
            for text, code in [("halve it", "/ 2"), ("drop one off", "- 1"), ("square everything", "** 2")]
        ],
    )
    assert row["choices"][row["label"]] == "def solve(n):\n    return n * 2"


def test_an_option_printed_twice_leaves_the_row_out():
    assert get_task("arc_easy").choice_row({**ARC, "choices": ["honey", "honey", "milk"]}) is None


# Dispatch -----------------------------------------------------------------------------------------------------------


def test_the_dispatch_prompt_has_a_fixed_start_and_the_question_after_it():
    first, second = (dispatch_prompt(question)[0]["content"] for question in ("Add 2 and 3.", "Why is the sky blue?"))
    fixed = first[: first.index("Add 2")]
    assert all(kind in fixed for kind in ("code", "math", "reasoning", "other"))
    assert second.startswith(fixed + "Why is")


def test_the_dispatch_prompt_takes_other_kinds():
    text = dispatch_prompt("Hi", {"law": "a legal matter", "other": ""})[0]["content"]
    assert "law (a legal matter) or other." in text and "math" not in text


# The generated form and the reward ----------------------------------------------------------------------------------

CHECKED = [
    ("arc_easy", ARC, "Bees make honey. The answer is (A).", "The answer is (B)."),
    ("arc_easy", ARC, "A", "D) glass"),
    ("arc_easy", ARC, "Honey.", "Milk."),
    ("arc_easy", ARC, "At first I said the answer is B, but the answer is **A**.", "A bee makes many things."),
    ("arc_challenge", ARC, "(A) honey", ""),
    ("svamp", SVAMP, "78 - 9 = 69. The answer is 69.", "78 - 15 = 63"),
    ("svamp", SVAMP, "69.0", "no idea"),
    ("gsm8k", GSM8K, "6*12 = 72, 72 - 30 = 42\n#### 42", "72"),
    ("gsm8k", GSM8K, "The answer is $42.00, of 72 eggs.", "The answer is 4.2"),
    (
        "mbpp",
        MBPP,
        "Sure:\n```python\ndef double_it(n):\n    return n + n\n```\nDone.",
        "```\ndef double_it(n): return n\n```",
    ),
    ("mbpp", MBPP, "def double_it(n): return 2 * n", "print('passed'); exit(0)"),
    ("dispatch", {"id": "d1", "question": "Add.", "kind": "math"}, " Math", "code or math"),
]


@pytest.mark.parametrize(("name", "raw", "right", "wrong"), CHECKED)
def test_a_right_completion_earns_one_and_a_wrong_one_minus_one(name, raw, right, wrong):
    row = TASKS[name].row({"id": "1", **raw})
    columns = {field: [value] * 2 for field, value in row.items()}
    assert TASKS[name].reward([right, wrong], **columns) == [1.0, -1.0]
    chats = [[{"role": "assistant", "content": text}] for text in (right, wrong)]
    assert TASKS[name].reward(chats, **columns, trainer_state=None) == [1.0, -1.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_answer_is_right(name):
    for row in TASKS[name].rows("test", "generate", limit=10, folder=DATA):
        assert TASKS[name].check(str(row["answer"]), row)


@pytest.mark.parametrize("name", NAMES)
def test_in_the_choice_form_only_the_right_choice_to_the_letter_is_right(name, choice_rows):
    row = choice_rows[name][0]
    columns = {field: [value] * len(row["choices"]) for field, value in row.items()}
    expected = [1.0 if index == row["label"] else -1.0 for index in range(len(row["choices"]))]
    assert TASKS[name].reward(row["choices"], **columns) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567", 1234567),
        ("It costs $3.50.", 3.5),
        ("So x = -7", -7),
        ("from 3 to 5-2", 2),
        ("The answer is: **12**, not 13", 12),
        ("#### 8\nThanks 9", 8),
        (".5", 0.5),
        ("about 40% of it", 40),
        ("none", None),
    ],
)
def test_the_final_number_is_read_as_people_write_it(text, number):
    assert final_number(text) == number
