# SPDX-License-Identifier: Apache-2.0
r"""
Run code that a model wrote: a text goes in, a verdict comes out.

    run_python("print(6 * 7)")                                          ok=True, stdout="42\n"
    run_python("def f(x): return x", asserts=["assert f(1) == 1"])      ok=True
    run_python("print('passed'); exit(0)", asserts=["assert f(1)"])     ok=False, reason "left by exit(0)"

The judge never shares an interpreter with the code it judges. The program runs in a Python of its own; the asserts run
in a second one, which holds no model code and calls the program's functions over a pipe of plain literals (numbers,
strings, bytes, containers, `None`). An object of the program's own classes can be passed back to it, but equals
nothing. The verdict comes from the judge's own pipe, which the program doesn't have.

Both run with an environment of four variables, limits on processor time, address space, file size, open files and
processes, and in the closest of three modes that works here; `SandboxResult.closed` says what it closes:

- `bwrap` (bubblewrap): own process, network, IPC and mount namespaces (and user namespace, unless root starts it), no
  capabilities, no new privileges, a read-only root that holds Python and the system's libraries alone, read-only
  `/proc`, a minimal `/dev`, and a folder in memory of limited size. `ctypes` is hidden.
- `unshare` (util-linux): the same by `unshare`, `mount`, `chroot` and `setpriv`.
- neither: the limits alone.

Nothing runs as root: a root user's programs get an unprivileged user id that no other process has.

One watch counts the memory of all processes of a program: what they map, and the files in memory that they hold open.
It looks 20 times a second, so a program can have more for 50 ms, up to the address space of each process.

Not covered: System V segments that no process has attached (they end with the IPC namespace; `ctypes` is hidden, which
leaves Python no way to make one); the kernel itself. Without namespaces the program can also open connections, read
and write what its user can, and, unless root started it, signal and trace the user's other processes, the judge
included, and leave a process behind in another session. It's a belt for what a model under training runs into, not a
wall against an attacker: for that, train in a container or a virtual machine.
"""

import atexit
import contextlib
import functools
import json
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HARNESS = Path(__file__).with_name("sandbox_harness.py")
FILE_MB, PROCESSES, FILES, INTERVAL = 16, 32, 64, 0.05
MODES = ("bwrap", "unshare", "none")
CLOSED = ("network", "processes", "files", "reading")
IDS = range(61184, 65520)  # user ids that systemd also hands out for a time
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
TOOLS = os.pathsep.join((os.defpath, "/usr/sbin", "/sbin"))
INSIDE = "/tmp"  # the folder in memory that a program sees
# Builds a root of its own in new namespaces: $1 root, $2 bytes of the folder, then read-only places, `--`, a command.
ROOT = """
set -e
root=$1 size=$2; shift 2
mount -t tmpfs -o size=1m,mode=755 none "$root"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${1%/*}"; : > "$root$1"; fi
    mount --bind "${1}" "$root$1"
    case $1 in /dev/*) safe=ro,nosuid;; *) safe=ro,nosuid,nodev;; esac
    mount -o "remount,bind,$safe" "$root$1"
    shift
done
shift
if [ "$1" != "" ]; then mount --bind /dev/null "$root$1"; fi
mkdir "$root/proc" "$root/tmp"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -o remount,bind,ro,nosuid,nodev,noexec "$root/proc"
mount -t tmpfs -o "size=$size,mode=777,nosuid,nodev,noexec" none "$root/tmp"
mount -o remount,bind,ro "$root"
shift
exec "$@"
"""


@dataclass(frozen=True)
class SandboxResult:
    """
    How a run ended.

    Attributes:
        ok (`bool`): The code ran to its end, and every assert passed.
        stdout, stderr (`str`): Its output, cut at the limit.
        reason (`str`): Why it isn't ok; empty if it is.
        closed (`tuple[str, ...]`): What was closed off: "network", "processes" (those outside), "files" (writing
            them), "reading" (the user's files); empty without namespaces.
    """

    ok: bool
    stdout: str
    stderr: str
    reason: str
    closed: tuple[str, ...] = ()


def run_python(
    code: str, asserts: Sequence[str] = (), timeout: float = 5.0, memory_mb: int = 512, output_kb: int = 64
) -> SandboxResult:
    """
    Run Python code in a process that can do little harm.

    Args:
        code (`str`):
            The program.
        asserts (sequence of `str`, *optional*):
            Statements to run after it, in the judge; `ok` needs all of them. With them the code's `__name__` is
            "solution", so a main block doesn't run.
        timeout (`float`, defaults to 5.0):
            Wall-clock limit in seconds, the start of the processes included.
        memory_mb (`int`, defaults to 512):
            Memory of all processes together, and address space of each, in MiB.
        output_kb (`int`, defaults to 64):
            A run that prints more than this, in KiB, is stopped.

    Returns:
        [`SandboxResult`]

    Raises:
        `NotImplementedError`: on a system without POSIX process groups.
        `RuntimeError`: for root, if no Python can be run by another user.
    """
    if os.name != "posix":
        raise NotImplementedError(
            f"The sandbox needs POSIX processes and this system is '{os.name}'. Use the choice form of the task, "
            "which runs no code, or run in a Linux container."
        )
    deadline, mode = time.monotonic() + timeout, _mode()
    limits = {
        "RLIMIT_CPU": int(timeout) + 1,
        "RLIMIT_AS": memory_mb << 20,
        "RLIMIT_FSIZE": FILE_MB << 20,
        "RLIMIT_NOFILE": FILES,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_CORE": 0,
    }
    job = {"code": code, "asserts": list(asserts), "limits": limits, "seconds": int(timeout) + 2}
    with contextlib.ExitStack() as stack:
        requests, replies = _pipe(stack), _pipe(stack)
        verdict, report = (stack.enter_context(end) for end in socket.socketpair())
        _fork_judge(mode, [replies[0].fileno(), requests[1].fileno(), report.fileno()])
        program = _start(stack, mode, ["program", repr(limits)], [requests[0], replies[1]])
        for end in (*requests, *replies, report):
            end.close()
        data = json.dumps(job).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            verdict.sendall(len(data).to_bytes(8, "big") + data)
        pipes = {"stdout": program.stdout, "stderr": program.stderr, "verdict": verdict}
        texts, reason = _collect(program.pid, pipes, deadline, output_kb << 10, memory_mb << 20)
    out, err = (texts[name][: output_kb << 10].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    if not reason and not texts["verdict"]:
        reason = "ended before the verdict"
    reason = reason.format(timeout=timeout, output_kb=output_kb, memory_mb=memory_mb)
    ok, reason = (False, reason) if reason else json.loads(texts["verdict"])
    return SandboxResult(ok, out, err, reason, () if mode == "none" else CLOSED)


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    source, target = os.pipe()
    return stack.enter_context(os.fdopen(source, "rb", 0)), stack.enter_context(os.fdopen(target, "wb", 0))


def _start(
    stack: contextlib.ExitStack, mode: str, arguments: list[str], pipes: Sequence[Any]
) -> subprocess.Popen[bytes]:
    """Start one side; when the stack closes, it is dead and reaped."""
    folder = tempfile.mkdtemp(prefix="svf-sandbox-")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    user = _free_id() if os.getuid() == 0 else None
    if user is not None:
        os.chown(folder, user, user)
    home, output = INSIDE, subprocess.DEVNULL
    other: dict[str, Any] = {}
    if mode == "none":
        home = folder
        other = {} if user is None else {"user": user, "group": user, "extra_groups": ()}
    command = _command(mode, folder, user)
    if arguments[0] == "program":
        output = subprocess.PIPE
    else:  # bubblewrap would end the judge with the thread that started it
        command = [part for part in command if part != "--die-with-parent"]
    command += ["-c", _source(os.path.realpath(sys.executable) in command), *arguments]
    process = subprocess.Popen(
        [*command, *(str(pipe.fileno()) for pipe in pipes)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=folder,
        env={"PATH": TOOLS, "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home},
        pass_fds=[pipe.fileno() for pipe in pipes],
        start_new_session=True,
        **other,
    )
    for pipe in filter(None, (process.stdout, process.stderr)):
        stack.enter_context(pipe)
    stack.callback(_kill, process, user if mode == "none" else None)
    return process


LOCK = threading.Lock()
# By process and mode, the one that forks the judges, as a start is slow: its socket, and what ends it.
JUDGES: dict[tuple[int, str], tuple[socket.socket, contextlib.ExitStack]] = {}


def _fork_judge(mode: str, descriptors: list[int]) -> None:
    """Have a judge forked with these pipes."""
    key = os.getpid(), mode
    with LOCK:
        for _ in range(2):
            if key not in JUDGES:
                control, other = socket.socketpair()
                stack = contextlib.ExitStack()  # stays open: the process ends with the control socket
                _start(stack, mode, ["judge"], [other])
                other.close()
                JUDGES[key] = control, stack
            with contextlib.suppress(OSError):
                socket.send_fds(JUDGES[key][0], [b"j"], descriptors)
                return
            _end_judge(key)  # it ended: start another
    raise RuntimeError("The sandbox's judge doesn't start.")


def _end_judge(key: tuple[int, str]) -> None:
    for part in JUDGES.pop(key):
        part.close()


@atexit.register
def _end_judges() -> None:
    for key in [key for key in JUDGES if key[0] == os.getpid()]:
        _end_judge(key)


def _kill(process: subprocess.Popen[bytes], user: int | None) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if user is not None:  # all processes of the id, whatever session they are in
        kill = [_python(user), "-I", "-S", "-c", "import os; os.kill(-1, 9)"]
        with contextlib.suppress(OSError):
            subprocess.run(kill, user=user, group=user, extra_groups=(), check=False)
    process.wait()


@functools.cache
def _source(same: bool) -> str:
    """Return the harness as the argument of `-c`, compiled if the same Python runs it: its start counts."""
    text = HARNESS.read_text(encoding="utf-8")
    code = marshal.dumps(compile(text, "<sandbox>", "exec", optimize=2)).hex()
    return f"import marshal; exec(marshal.loads(bytes.fromhex('{code}')))" if same else text


@functools.cache
def _mode() -> str:
    """Return the closest mode that can start a Python here: kernels and containers may refuse namespaces."""
    user = _free_id() if os.getuid() == 0 else None
    for mode in MODES[:-1]:
        with tempfile.TemporaryDirectory(prefix="svf-sandbox-") as folder, contextlib.suppress(OSError):
            command = [*_command(mode, folder, user), "-c", "pass"]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, env={"PATH": TOOLS}, timeout=10
            )
            if done.returncode == 0:
                return mode
    return "none"


def _command(mode: str, folder: str, user: int | None) -> list[str]:
    """Return the command that starts a Python in a mode, up to the arguments of the interpreter."""
    python = [_python(None if mode != "none" else user), "-I", "-S", "-B"]
    if mode == "none":
        return ["setpriv", "--no-new-privs", *python] if shutil.which("setpriv", path=TOOLS) else python
    drop = ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    if user is not None:
        drop += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    tools = [] if mode == "bwrap" and user is None else [shutil.which("setpriv", path=TOOLS) or ""]
    outside = [place for place in (python[0], *tools) if not Path(place).is_relative_to(sys.base_prefix)]
    places = [place for place in (*LIBRARIES, sys.base_prefix, *outside) if os.path.exists(place)]
    size, hidden = str(FILE_MB << 20), next(map(str, Path(os.__file__).parent.glob("lib-dynload/_ctypes.*")), "")
    if mode == "unshare":
        spaces = ["--pid", "--net", "--ipc", "--mount", "--uts", "--fork", "--kill-child"]
        spaces += ["--user", "--map-root-user"] if user is None else []
        devices = [device for device in DEVICES if os.path.exists(device)]
        script = ["sh", "-c", ROOT, "sh", folder, size, *places, *devices, "--", hidden]
        return ["unshare", *spaces, *script, "chroot", folder, *drop, *python]
    # root needs no user namespace, and its programs really change their user id
    spaces = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    if user is not None:
        spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        spaces += [part for name in ("SETUID", "SETGID", "SETPCAP") for part in ("--cap-add", f"CAP_{name}")]
    # bubblewrap creates the parents of a place for its own user alone
    parents = dict.fromkeys(str(parent) for place in places for parent in [*Path(place).parents][-2::-1])
    binds = [part for parent in parents for part in ("--perms", "0755", "--dir", parent)]
    binds += [part for place in places for part in ("--ro-bind", place, place)]
    binds += ["--ro-bind", "/dev/null", hidden] if hidden else []
    # fmt: off
    return [
        "bwrap", *spaces, "--die-with-parent", "--new-session", *binds,
        "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--perms", "0777", "--size", size, "--tmpfs", INSIDE, "--remount-ro", "/", "--chdir", INSIDE, "--",
        *(drop if user is not None else []), *python,
    ]
    # fmt: on


def _python(user: int | None) -> str:
    """Return a Python that a user id can start: the one below a virtual environment's link, or the system's."""
    python = os.path.realpath(sys.executable)
    if user is None or _starts(python, user):
        return python
    system = shutil.which("python3", path=TOOLS)
    if system is None or not _starts(system, user):
        raise RuntimeError(
            f"The sandbox never runs programs as root, and no other user can start {python}. Install Python outside "
            "of /root, install bubblewrap, or run as another user."
        )
    return system


@functools.lru_cache
def _starts(python: str, user: int) -> bool:
    command = [python, "-I", "-S", "-c", ""]
    try:
        return subprocess.run(command, user=user, group=user, cwd="/", check=False).returncode == 0
    except OSError:
        return False


def _free_id() -> int:
    """Return a user id that no process has."""
    taken = set()
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            taken.add(entry.stat().st_uid)
    start = random.randrange(len(IDS))
    return next(id for id in (*IDS[start:], *IDS[:start]) if id not in taken)


def _collect(
    program: int, pipes: dict[str, Any], deadline: float, limit: int, memory: int
) -> tuple[dict[str, bytes], str]:
    """Read the pipes until the judge is done or a limit is passed; return the texts and the reason to stop."""
    texts, watched, ended = dict.fromkeys(pipes, b""), time.monotonic(), False
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe.fileno(), selectors.EVENT_READ, name)
        while True:
            now = time.monotonic()
            events = selector.select(0 if ended else min(INTERVAL, max(0.0, deadline - now)))
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fd)
                    ended = ended or key.data == "verdict"
                texts[key.data] += chunk
                if len(texts[key.data]) > limit:
                    return texts, "printed more than {output_kb} KiB"
            if ended and not events:
                return texts, ""
            if now >= deadline:
                return texts, "ran longer than {timeout} s"
            if now - watched >= INTERVAL:
                watched = now
                if _memory(program) > memory:
                    return texts, "used more than {memory_mb} MiB in all"


def _memory(root: int) -> int:
    """Sum the memory of a process and its descendants: private pages, and the files in memory they hold open."""
    total, files, waiting = 0, dict[int, int](), [root]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(OSError, ValueError):
            path = Path("/proc", str(process))
            for task in (path / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
            for line in (path / "status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
                    total += int(line.split()[1]) << 10
            for descriptor in (path / "fd").iterdir():
                opened = descriptor.stat()
                if opened.st_nlink == 0:  # memfd, or deleted
                    files[opened.st_ino] = opened.st_blocks << 9
    return total + sum(files.values())
