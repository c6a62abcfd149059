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
process but its own, leaves none behind, and can write nowhere but in its folder. Where bubblewrap (`bwrap`) is
installed and works, it sets these up and hides the user's files as well: what remains to be read is Python and the
system's libraries. `SandboxResult.closed` says which of these held.

The verdict doesn't rest on output or exit code: the run reports on a private pipe after the last assert, and a report
counts only with a random token in it. Before the asserts the modules that they and the harness use are put back as
they were, so a patched `len` or `math.isclose` doesn't judge.

What this does not protect against: code that hunts for the token in the harness's frames, that defines a name of its
own which the asserts use (`len = ...`), that patches a class (`Fraction.__eq__`), or that returns an object equal to
everything can pass asserts it should fail.
The limit on memory is that of one process: as many children as are allowed can together take that many times as much.
Without bubblewrap the code can read every file that the user can read. Where `closed` is empty it can also open
connections, write where the user can write, read the environment of the user's other processes and end them, and leave
a process behind in another session; a superuser's fork bomb then lasts until the wall-clock limit, as the kernel
doesn't count a superuser's processes. The kernel itself is as open as to any program. It's a belt for what a model
under training stumbles into, not a wall against an attacker: for that, run the training in a container or a virtual
machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_HARNESS = Path(__file__).with_name("sandbox_harness.py")
FILE_MB, PROCESSES = 16, 32
# What Python needs of the system beside its own folder; what a system lacks is passed over.
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")


@dataclass(frozen=True)
class SandboxResult:
    """
    How a run ended.

    Attributes:
        ok (`bool`): The code ran to its end, and every assert passed.
        stdout (`str`): What it printed, cut at the limit.
        stderr (`str`): The same for errors.
        reason (`str`): Why it isn't ok; empty if it is.
        closed (`tuple[str, ...]`): What was closed off: "network", "processes" (those outside), "files" (writing
            them), with bubblewrap also "reading" (the user's files); may be empty.
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
        token, wrapper = secrets.token_hex(16), _bubblewrap(folder)
        job = {
            "token": token,
            "code": code,
            "asserts": list(asserts),
            "folder": folder,
            "closed": ["network", "processes", "files", "reading"] if wrapper else [],
            "cpu_s": int(timeout) + 1,
            "memory_mb": memory_mb,
            "file_mb": FILE_MB,
            "processes": PROCESSES,
        }
        deadline = time.monotonic() + timeout
        with _harness(folder, [*_real_time(), *wrapper]) as (process, pipes):
            assert process.stdin  # a pipe
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode())
                process.stdin.close()
            said, stopped = _collect(process, pipes, deadline, output_kb * 1024)
    reason = stopped.format(timeout=timeout, output_kb=output_kb)
    return _verdict(said, token, reason, process.returncode, output_kb * 1024)


@contextlib.contextmanager
def _harness(folder: str, wrapper: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, int]]]:
    """Start the harness, give what there is to read from; in the end it's dead and reaped, its pipes closed."""
    read_end, write_end = os.pipe()
    try:
        process = subprocess.Popen(
            [*wrapper, _python(), "-I", "-S", str(_HARNESS), str(write_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
            pass_fds=(write_end,),
            start_new_session=True,
        )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    assert process.stdin and process.stdout and process.stderr  # all three are pipes
    try:
        yield process, {"stdout": process.stdout.fileno(), "stderr": process.stderr.fileno(), "report": read_end}
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        os.close(read_end)


def _verdict(said: dict[str, bytes], token: str, stopped: str, exit_code: int, limit: int) -> SandboxResult:
    """Read the reports that carry the token, and put the result together."""
    reports = [line for line in map(_parse, said["report"].split(b"\n")) if line.get("token") == token]
    closed = next((tuple(line["closed"]) for line in reports if "closed" in line), ())
    verdict = next((line for line in reports if "ok" in line), None)
    if stopped:
        ok, reason = False, stopped
    elif verdict is None:
        ok, reason = False, f"ended before the verdict, exit code {exit_code}"
    else:
        ok, reason = verdict["ok"], verdict["reason"]
    out, err = (said[name][:limit].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    return SandboxResult(ok, out, err, reason, closed)


def _bubblewrap(folder: str) -> list[str]:
    """Give the command that wraps a run in bubblewrap; nothing where it isn't installed or doesn't work."""
    program = shutil.which("bwrap")
    return _wrapper(program, folder) if program and _bubblewrap_works(program) else []


@functools.cache
def _bubblewrap_works(program: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="svf-sandbox-") as folder:
        return _starts_python(_wrapper(program, folder))


@functools.cache
def _real_time() -> list[str]:
    """Give the command that lets the harness count a superuser's processes before thousands of them get a turn."""
    command = ["chrt", "--rr", "1"]
    return command if os.getuid() == 0 and _starts_python(command) else []


def _starts_python(wrapper: Sequence[str]) -> bool:
    """Tell whether a command can start a Python here: kernels and containers may refuse it."""
    command = [*wrapper, _python(), "-I", "-S", "-c", "pass"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _wrapper(program: str, folder: str) -> list[str]:
    readable = [
        path for place in (*_SYSTEM, sys.base_prefix, str(_HARNESS)) for path in ("--ro-bind-try", place, place)
    ]
    # fmt: off
    return [
        program, "--unshare-all", "--die-with-parent", "--new-session", *readable,
        "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(FILE_MB * 2**20), "--tmpfs", folder, "--remount-ro", "/", "--chdir", folder, "--",
    ]
    # fmt: on


def _python() -> str:
    return os.path.realpath(sys.executable)  # the link in a virtual environment leads to a folder that stays outside


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
