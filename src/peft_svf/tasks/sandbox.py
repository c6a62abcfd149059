# SPDX-License-Identifier: Apache-2.0
"""
Run code that a model wrote: a text goes in, a verdict comes out.

    run_python("print(6 * 7)")                                          ok=True, stdout="42\\n"
    run_python("def f(x): return x", asserts=["assert f(1) == 1"])      ok=True
    run_python("print('passed'); exit(0)", asserts=["assert f(1)"])     ok=False, reason "left by exit(0)"

A run is a Python of its own (`-I -S`: no installed packages) in a session of its own. It starts in an empty temporary
folder, its HOME; PATH, LANG, HOME and TMPDIR are its whole environment; processor time, memory of each process, file
size, open files and processes are limited. Its process group is killed at the wall-clock limit and when it ends;
output is cut. Where the kernel allows user namespaces, as most Linux systems do, it has no network interface, sees no
process but its own, leaves none behind, and can write nowhere but in its folder: `SandboxResult.closed` says which of
these held.

The verdict doesn't rest on output or exit code: the run reports on a private pipe after the last assert, and a report
counts only with a random token in it.

What this does not protect against: code that hunts for the token in the harness's frames, that redefines a name the
asserts use, or that returns an object equal to everything can pass asserts it should fail. The code can read every
file that the user can read. Where `closed` is empty it can also open connections, write where the user can write, read
the environment of the user's other processes, and leave a process behind in another session. The kernel doesn't count
a superuser's processes, so a superuser's fork bomb lasts until the wall-clock limit. It's a belt for what a model
under training stumbles into, not a wall against an attacker: for that, run the training in a container or a virtual
machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HARNESS = Path(__file__).with_name("sandbox_harness.py")


@dataclass(frozen=True)
class SandboxResult:
    """
    How a run ended.

    Attributes:
        ok (`bool`): The code ran to its end, and every assert passed.
        stdout (`str`): What it printed, cut at the limit.
        stderr (`str`): The same for errors.
        reason (`str`): Why it isn't ok; empty if it is.
        closed (`tuple[str, ...]`): What the kernel closed off: "network", "processes", "files"; may be empty.
    """

    ok: bool
    stdout: str
    stderr: str
    reason: str
    closed: tuple[str, ...] = ()


def run_python(
    code: str,
    asserts: Sequence[str] = (),
    timeout: float = 5.0,
    memory_mb: int = 512,
    output_kb: int = 64,
) -> SandboxResult:
    """
    Run Python code in a process that can do little harm.

    Args:
        code (`str`):
            The program.
        asserts (sequence of `str`, *optional*):
            Statements to run after it in its namespace; `ok` needs all of them. With them the code's `__name__` is
            "solution", so a main block doesn't run.
        timeout (`float`, defaults to 5.0):
            Wall-clock limit in seconds, the start of the process included.
        memory_mb (`int`, defaults to 512):
            Address space of each process, in MiB.
        output_kb (`int`, defaults to 64):
            A run that prints more than this, in KiB, is stopped.

    Returns:
        [`SandboxResult`]

    Raises:
        `NotImplementedError`: on a system without POSIX process groups.
    """
    if os.name != "posix":
        raise NotImplementedError(
            f"The sandbox needs POSIX processes and this system is '{os.name}'. Use the choice form of the task, "
            "which runs no code, or run in a Linux container."
        )
    # a folder in memory takes its place where the kernel allows mounts; this one is removed in any case
    with tempfile.TemporaryDirectory(prefix="svf-sandbox-", ignore_cleanup_errors=True) as folder:
        token = secrets.token_hex(16)
        job = {
            "token": token,
            "code": code,
            "asserts": list(asserts),
            "folder": folder,
            "cpu_s": int(timeout) + 1,
            "memory_mb": memory_mb,
            "file_mb": 16,
            "processes": 32,
        }
        read_end, write_end = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_HARNESS), str(write_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)
        assert process.stdin and process.stdout and process.stderr  # all three are pipes
        deadline = time.monotonic() + timeout
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode())
                process.stdin.close()
            pipes = {"stdout": process.stdout.fileno(), "stderr": process.stderr.fileno(), "report": read_end}
            said, stopped = _collect(process, pipes, deadline, output_kb * 1024)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            os.close(read_end)
    reports = [line for line in map(_parse, said["report"].split(b"\n")) if line.get("token") == token]
    closed = next((tuple(line["closed"]) for line in reports if "closed" in line), ())
    verdict = next((line for line in reports if "ok" in line), None)
    if stopped:
        ok, reason = False, stopped.format(timeout=timeout, output_kb=output_kb)
    elif verdict is None:
        ok, reason = False, f"ended before the verdict, exit code {process.returncode}"
    else:
        ok, reason = verdict["ok"], verdict["reason"]
    out, err = (said[name][: output_kb * 1024].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    return SandboxResult(ok, out, err, reason, closed)


def _collect(
    process: subprocess.Popen[bytes], pipes: dict[str, int], deadline: float, limit: int
) -> tuple[dict[str, bytes], str]:
    """Read the pipes until the process ends, the time is up or the output is too long; give the texts and why."""
    said = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for name, descriptor in pipes.items():
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ, name)
        while True:
            ended = process.poll() is not None  # before reading: what it wrote is in the pipes by now
            events = selector.select(0 if ended else min(0.05, max(0.0, deadline - time.monotonic())))
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fd)
                said[key.data] += chunk
                if len(said[key.data]) > limit:
                    return said, "printed more than {output_kb} KiB"
            if ended and not events:
                return said, ""
            if time.monotonic() >= deadline:
                return said, "ran longer than {timeout} s"


def _parse(line: bytes) -> dict:
    try:
        parsed = json.loads(line)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
