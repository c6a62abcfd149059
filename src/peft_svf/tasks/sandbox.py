# SPDX-License-Identifier: Apache-2.0
r"""
Run code that a model wrote: a text goes in, a verdict comes out.

    run_python("print(6 * 7)")                                          ok=True, stdout="42\n"
    run_python("def f(x): return x", asserts=["assert f(1) == 1"])      ok=True
    run_python("print('passed'); exit(0)", asserts=["assert f(1)"])     ok=False, reason "left by exit(0)"

The judge never shares an interpreter with the code it judges. The program runs in a Python of its own; the asserts run
in a second one, which holds no model code and calls the program's functions over a socket of plain literals (numbers,
strings, bytes, containers, `None`). An object of the program's own classes can be passed back to it, but equals
nothing. The verdict comes from the judge's own socket, which the program doesn't have.

Both run with an environment of four variables, limits on processor time, address space, file size, open files and
processes. `SandboxResult.closed` names what else is closed, which depends on the mode that works here:

- `bwrap` (bubblewrap): own process, network, IPC and mount namespaces (and user namespace, unless root starts it), no
  capabilities, no new privileges, a read-only root that holds Python and the system's libraries alone, read-only
  `/proc`, a minimal `/dev`, and a folder in memory of limited size. `ctypes` is hidden.
- none, if bubblewrap isn't installed or may not make namespaces: the limits alone, and a judge that no other process
  can trace.

No program runs as root: a root user's programs get an unprivileged user id that no other process has.

The memory of all processes of a program counts together: a watch sums 20 times a second what they map and the files in
memory that they hold open, so a program can have more for 50 ms, up to the address space of each process.

Not covered: System V segments that no process has attached (`ctypes` is hidden, which leaves Python no way to make
one); the kernel itself. Without namespaces the program can also open connections, read and write what its user can,
hide memory in an orphan, and, unless root started it, signal and trace the user's other processes, the trainer
included, and leave a process behind in another session. It's a belt for what a model under training runs into, not a
wall against an attacker: for that, train in a container or a virtual machine.
"""

import atexit
import functools
import json
import logging
import marshal
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
HARNESS = Path(__file__).with_name("sandbox_harness.py")
FILE_MB, PROCESSES, FILES, INTERVAL = 16, 32, 64, 0.05
PATIENCE = 4  # wall-clock limit over processor time limit: a busy machine isn't a program's fault
MODES = ("bwrap", "none")
CLOSED = ("network", "processes", "files", "reading")
IDS = range(61184, 65520)  # user ids that systemd also hands out for a time
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
TOOLS = os.pathsep.join((os.defpath, "/usr/sbin", "/sbin"))
INSIDE = "/tmp"  # the folder in memory that a program sees


@dataclass(frozen=True)
class SandboxResult:
    """How a run ended."""

    ok: bool  # the code ran to its end, and every assert passed
    stdout: str  # cut at the limit, as is stderr
    stderr: str
    reason: str  # why it isn't ok; empty if it is
    closed: tuple[str, ...] = ()  # what the run could not reach: `CLOSED`, or nothing


def run_python(
    code: str, asserts: Sequence[str] = (), timeout: float = 5.0, memory_mb: int = 512, output_kb: int = 64
) -> SandboxResult:
    """
    Run Python code in a process that can do little harm.

    Args:
        code (`str`): The program.
        asserts (sequence of `str`, *optional*):
            Statements to run after it, in the judge; `ok` needs all of them. With them the code's `__name__` is
            "solution", so a main block doesn't run.
        timeout (`float`): Seconds of processor time of all processes together; on the wall clock four times that.
        memory_mb (`int`): MiB of memory of all processes together, and of the address space of each.
        output_kb (`int`): KiB of output after which a run is stopped.

    Raises:
        `NotImplementedError`: on a system without POSIX process groups.
        `RuntimeError`: for root, if no Python can be run by another user.
    """
    if os.name != "posix":
        raise NotImplementedError(
            f"The sandbox needs POSIX and this system is '{os.name}': use the choice form, which runs no code."
        )
    limits = {"CPU": int(timeout) + 1, "AS": memory_mb << 20, "FSIZE": FILE_MB << 20, "CORE": 0}
    limits |= {"NOFILE": FILES, "NPROC": PROCESSES}
    job = {"code": code, "asserts": list(asserts), "limits": limits, "seconds": int(PATIENCE * timeout) + 2}
    starter = _starter(os.getpid(), _mode())
    with starter.program() as program, starter.judge(program) as verdict:
        data = json.dumps(job).encode()
        with suppress(BrokenPipeError, ConnectionResetError):
            verdict.sendall(len(data).to_bytes(8, "big") + data)
        texts, reason = _collect(program.process, verdict, timeout, output_kb << 10, memory_mb << 20)
    out, err = (texts[name][: output_kb << 10].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    if not reason and not texts["verdict"]:
        reason = "ended before the verdict"
    ok, reason = (False, reason) if reason else json.loads(texts["verdict"])
    return SandboxResult(ok, out, err, reason, () if starter.mode == "none" else CLOSED)


class _Side:
    """A Python that waits for a program or forks judges, and the socket that leads to it; dead once it is left."""

    def __init__(self, mode: str, role: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="svf-sandbox-")
        self.user = _free_id() if os.getuid() == 0 else None
        if self.user is not None:
            os.chown(self.folder, self.user, self.user)
        self.mode, home = mode, self.folder if mode == "none" else INSIDE
        command = _command(mode)
        output = subprocess.PIPE if role == "program" else subprocess.DEVNULL
        self.socket, end = socket.socketpair()
        with end:
            source = _source(os.path.realpath(sys.executable) in command)
            self.process = subprocess.Popen(
                [*command, "-c", source, role, str(self.user or ""), str(end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={"PATH": TOOLS, "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home},
                pass_fds=[end.fileno()],
                start_new_session=True,
            )

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.mode == "none" and self.user is not None:  # all processes of the id, whatever session they are in
            subprocess.run(["sh", "-c", "kill -9 -1"], user=self.user, group=self.user, extra_groups=(), check=False)
        self.process.wait()
        self.socket.close()
        for pipe in filter(None, (self.process.stdout, self.process.stderr)):
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Starter:
    """Starts each program while the one before runs, as a start takes longer; one process forks all judges."""

    def __init__(self, owner: int, mode: str) -> None:
        self.owner, self.mode, self.lock = owner, mode, threading.Lock()
        self.thread = ThreadPoolExecutor(1)  # stays, as bubblewrap ends with the thread that started it
        self.judges, self.spare = self.start("judge"), self.start("program")
        atexit.register(self.close)

    def start(self, role: str) -> "Future[_Side]":
        return self.thread.submit(_Side, self.mode, role)

    def program(self) -> _Side:
        """Return a program's side that waits for its code."""
        with self.lock:
            spare, self.spare = self.spare, self.start("program")
        return spare.result()

    def judge(self, program: _Side) -> socket.socket:
        """Have a judge forked for a program; return the socket that takes the job and brings the verdict."""
        verdict, report = socket.socketpair()
        with self.lock, report, program.socket:
            descriptors = [program.socket.fileno(), report.fileno()]
            try:
                socket.send_fds(self.judges.result().socket, [b"j"], descriptors)
            except OSError:  # the process that forks judges ended
                self.judges.result().__exit__()
                self.judges = self.start("judge")
                socket.send_fds(self.judges.result().socket, [b"j"], descriptors)
        return verdict

    def close(self) -> None:
        if os.getpid() == self.owner:  # a fork has no part in them
            for side in (self.judges, self.spare):
                side.result().__exit__()


_starter = functools.cache(_Starter)


@functools.cache
def _source(same: bool) -> str:
    """Return the harness as the argument of `-c`, compiled if the same Python runs it, which starts sooner."""
    text = HARNESS.read_text(encoding="utf-8")
    code = marshal.dumps(compile(text, "<sandbox>", "exec", optimize=2)).hex()
    return f"import marshal; exec(marshal.loads(bytes.fromhex('{code}')))" if same else text


@functools.cache
def _mode() -> str:
    """Return "bwrap" if bubblewrap can start a Python here, as kernels and containers may refuse it, else "none"."""
    command, quiet = [*_command("bwrap"), "-c", "pass"], subprocess.DEVNULL
    with suppress(OSError, subprocess.TimeoutExpired):
        if subprocess.call(command, stdin=quiet, stdout=quiet, stderr=quiet, env={"PATH": TOOLS}, timeout=10) == 0:
            return "bwrap"
    logger.warning("Programs run without namespaces, so they reach files and the network: install bubblewrap (bwrap).")
    return "none"


def _command(mode: str) -> list[str]:
    """Return the command that starts a Python in a mode, up to the arguments of the interpreter."""
    root = os.getuid() == 0
    python = [_python(readable=mode == "none" and root), "-I", "-S", "-B"]
    if mode == "none":
        return ["setpriv", "--no-new-privs", *python] if shutil.which("setpriv", path=TOOLS) else python
    spaces = ["--unshare-all", "--unshare-user", "--disable-userns"]
    if root:  # needs no user namespace; the harness changes the user id, which ends these capabilities
        spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        spaces += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    outside = [] if Path(python[0]).is_relative_to(sys.base_prefix) else [python[0]]
    places = [place for place in (*LIBRARIES, sys.base_prefix, *outside) if os.path.exists(place)]
    # bubblewrap creates the parents of a place for its own user alone
    parents = dict.fromkeys(str(parent) for place in places for parent in [*Path(place).parents][-2::-1])
    binds = [part for parent in parents for part in ("--perms", "0755", "--dir", parent)]
    binds += [part for place in places for part in ("--ro-bind", place, place)]
    for hidden in Path(os.__file__).parent.glob("lib-dynload/_ctypes.*"):
        binds += ["--ro-bind", "/dev/null", str(hidden)]
    # fmt: off
    return [
        "bwrap", "--cap-drop", "ALL", *spaces, "--die-with-parent", "--new-session", *binds,
        "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--perms", "0777", "--size", str(FILE_MB << 20), "--tmpfs", INSIDE, "--remount-ro", "/", "--chdir", INSIDE,
        "--", *python,
    ]
    # fmt: on


def _python(readable: bool) -> str:
    """Return the Python below a virtual environment's link, or one of the system if all users have to reach it."""
    for python in filter(None, (os.path.realpath(sys.executable), shutil.which("python3", path=TOOLS))):
        if not readable or all(parent.stat().st_mode & 1 for parent in Path(python).resolve().parents):
            return python
    raise RuntimeError(
        f"The sandbox never runs programs as root, and no other user can start {sys.executable}: install bubblewrap, "
        "or Python outside of /root, or run as another user."
    )


def _free_id() -> int:
    """Return a user id that no process has."""
    taken = set()
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            taken.add(entry.stat().st_uid)
    start = random.randrange(len(IDS))
    return next(id for id in (*IDS[start:], *IDS[:start]) if id not in taken)


def _collect(
    program: subprocess.Popen[bytes], verdict: socket.socket, timeout: float, limit: int, memory: int
) -> tuple[dict[str, bytes], str]:
    """Read what comes until the judge is done or a limit is passed; return the texts and the reason to stop."""
    pipes: dict[str, Any] = {"stdout": program.stdout, "stderr": program.stderr, "verdict": verdict}
    texts, ended, watched = dict.fromkeys(pipes, b""), False, time.monotonic()
    deadline = watched + PATIENCE * timeout
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, name)
        while True:
            events = selector.select(0 if ended else INTERVAL)
            for key, _ in events:
                try:
                    chunk = os.read(key.fd, 65536)
                except ConnectionResetError:  # a judge that ended before it read its job
                    chunk = b""
                if not chunk:
                    selector.unregister(key.fileobj)
                    ended = ended or key.data == "verdict"
                texts[key.data] += chunk
                if len(texts[key.data]) > limit:
                    return texts, f"printed more than {limit >> 10} KiB"
            if ended and not events:
                return texts, ""
            now = time.monotonic()
            if now >= deadline:
                return texts, f"ran longer than {PATIENCE * timeout} s"
            if now - watched >= INTERVAL:
                watched = now
                seconds, used = _usage(program.pid)
                if seconds > timeout:
                    return texts, f"used more than {timeout} s of processor time"
                if used > memory:
                    return texts, f"used more than {memory >> 20} MiB in all"


def _usage(root: int) -> tuple[float, int]:
    """Sum the seconds of a process and its descendants, and the bytes of their pages and open files in memory."""
    ticks, total, files, waiting = 0, 0, dict[int, int](), [root]
    while waiting:
        path = Path("/proc", str(waiting.pop()))
        with suppress(OSError, ValueError):  # it ended
            ticks += sum(map(int, (path / "stat").read_text().rpartition(")")[2].split()[11:15]))
            for line in (path / "status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
                    total += int(line.split()[1]) << 10
            for task in (path / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
            for descriptor in (path / "fd").iterdir():
                opened = descriptor.stat()
                if opened.st_nlink == 0:  # memfd, or deleted
                    files[opened.st_ino] = opened.st_blocks << 9
    return ticks / os.sysconf("SC_CLK_TCK"), total + sum(files.values())
