# SPDX-License-Identifier: Apache-2.0
"""A file, or a set of files, is old or new and never a mixture; files from outside are read within bounds."""

import contextlib
import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from peft_svf import files

OLD, NEW = {"a.json": "old a", "b.bin": b"old b"}, {"a.json": "new a", "b.bin": b"new b"}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_bytes(texts):
    return {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}


def test_a_set_is_old_or_new_wherever_writing_stops(tmp_path, monkeypatch):
    real, outcomes = Path.replace, []
    for stop in range(12):
        folder = tmp_path / str(stop)
        files.write_together(folder, OLD)
        calls = iter(range(100))

        def dying(self, target, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            with contextlib.suppress(KeyboardInterrupt):
                files.write_together(folder, NEW)
        files.settle(folder)
        outcomes.append(contents(folder))
    assert all(outcome in (as_bytes(OLD), as_bytes(NEW)) for outcome in outcomes), outcomes
    assert outcomes[0] == as_bytes(OLD) and outcomes[-1] == as_bytes(NEW)


def test_a_full_disk_leaves_the_old_files_and_no_temporary_ones(tmp_path, monkeypatch):
    files.write_together(tmp_path, OLD)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(OSError, match="disk is full; the old"):
        files.write_together(tmp_path, NEW)
    with pytest.raises(OSError, match=r"disk is full; the old a\.json is intact"):
        files.write(tmp_path / "a.json", "new")
    assert contents(tmp_path) == as_bytes(OLD)


def test_a_pending_file_cannot_reach_outside_its_folder(tmp_path):
    (tmp_path / files.PENDING).write_text(json.dumps(["../a.json"]))
    with pytest.raises(ValueError, match="damaged"):
        files.settle(tmp_path)


PACKED = gzip.compress(b"x" * 1000)
OUTSIDE = {  # name: content, reader, limit, message
    "deep.json": (b"[" * 100_000, files.read_json, files.LIMIT, "deep.json isn't valid JSON"),
    "digits.json": (b"9" * 5000, files.read_json, files.LIMIT, "digits.json isn't valid JSON"),
    "bad.json": (b"{", files.read_json, files.LIMIT, "bad.json isn't valid JSON"),
    "twice.json": (b'{"a": {"b": 1, "b": 2}}', files.read_json, files.LIMIT, "a key is repeated"),
    "bytes.json": (b"\xff\xfe", files.read_json, files.LIMIT, "bytes.json isn't valid JSON"),
    "long.json": (b" " * 101, files.read_json, 100, "more than 100 bytes"),
    "cut.gz": (PACKED[: len(PACKED) // 2], files.read_bytes, 2000, "truncated"),
    "bomb.gz": (PACKED, files.read_bytes, 100, "more than 100 bytes"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_from_outside_that_is_damaged_or_floods_is_refused_by_name(name, tmp_path):
    content, read, limit, message = OUTSIDE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, limit)


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="regular file"):
        files.read_json(tmp_path / "pipe.json")


def test_the_temporary_file_of_a_killed_process_is_cleaned_up_by_the_next_write(tmp_path):
    stale, fresh = tmp_path / ".a.json.1.writing", tmp_path / ".a.json.2.writing"
    for path in (stale, fresh):
        path.write_text("half")
    os.utime(stale, (0, 0))
    files.write(tmp_path / "a.json", "new")
    assert contents(tmp_path) == {"a.json": b"new", fresh.name: b"half"}


SECRETS = {
    "a token of the Hub": "peft-svf train c.yaml hf_abcdefghijklm",
    "JSON in a command": """peft-svf train c.yaml --model_init_kwargs '{"token": "hunter2abc", "revision": "main"}'""",
    "an option": "peft-svf train c.yaml --hub_token hunter2abc --seed 3",
    "an assignment": "peft-svf train c.yaml api_key=hunter2abc",
    "a URL": "https://me:hunter2abc@host/model",
    "a mapping": {"model_init_kwargs": {"token": "hunter2abc"}, "nested": [{"api_key": "hunter2abc"}]},
    "the environment": "set to environment-secret",
}


@pytest.mark.parametrize("value", SECRETS.values(), ids=SECRETS)
def test_secrets_are_never_written(value, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "environment-secret")
    text = json.dumps(files.public(value))
    assert not any(secret in text for secret in ("hunter2", "hf_abc", "environment-secret"))


def test_what_is_public_stays_as_it_is(tmp_path, monkeypatch):
    kept = {
        "eos_token": "</s>",
        "max_tokens": 5,
        "command": "peft-svf train c.yaml --seed 3 --pad_token x",
        "none": None,
    }
    assert files.public(kept) == kept
    monkeypatch.chdir(tmp_path)
    assert files.public(f"train {tmp_path}/runs/a --seed 3") == "train runs/a --seed 3"
    assert files.public(f"{Path.home()}/data") == "~/data"
