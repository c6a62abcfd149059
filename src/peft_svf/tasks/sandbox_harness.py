# SPDX-License-Identifier: Apache-2.0
"""
The far side of the sandbox: a script that gives its rights away, then runs the code it's handed.

Started by `sandbox` as `python -I -S sandbox_harness.py REPORT_FD`, with the job as JSON on standard input. Three
processes: this one leaves for new namespaces, unless bubblewrap has done so, and waits; a second is the first process
of the new process namespace, so that all others die with it, and counts them; the third sets the limits and runs the
code. A line of JSON on the report pipe counts only with the job's token in it. Standard library only, and nothing of
`peft_svf`, which isn't on the script's path.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

# <sched.h>, <sys/mount.h>, <sys/prctl.h>; the number of mount_setattr is the same on all architectures
NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x00020000 | 0x08000000  # user, net, pid, mount, ipc
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
PR_SET_PDEATHSIG = 1
GUARD_S = 0.02  # a fork bomb makes some hundred processes in that time


def isolate(folder: str, megabytes: int) -> list[str]:
    """
    Leave for new namespaces, as far as the kernel lets this user.

    Returns:
        What is closed off from here on: "network" (no interface), "processes" (children die with the run, the
        processes outside can't be read), "files" (all is read-only but `folder`, which lies in memory). Empty off
        Linux or where user namespaces are forbidden.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(NEW_NAMESPACES) != 0:
        return []
    closed = ["network", "processes"]
    with contextlib.suppress(OSError):
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    path = os.fsencode(folder)
    room = f"size={megabytes}m,mode=700".encode()
    if (
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", path, b"tmpfs", MS_NOSUID | MS_NODEV, room) == 0
        and _read_only(libc, b"/", AT_RECURSIVE, True)
        and _read_only(libc, path, 0, False)
    ):
        closed.append("files")
    os.chdir(folder)
    return closed


def limit(job: dict[str, Any]) -> None:
    """Set the limits of this process and its children; one that the system lacks is passed over."""
    megabyte = 2**20
    for name, value in {
        "RLIMIT_CPU": job["cpu_s"],
        "RLIMIT_AS": job["memory_mb"] * megabyte,
        "RLIMIT_FSIZE": job["file_mb"] * megabyte,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": job["processes"],
        "RLIMIT_CORE": 0,
    }.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def run(job: dict[str, Any], report: Callable[..., None]) -> None:
    """Run the code, then the asserts in its namespace, and report how far it came."""
    asserts = job["asserts"]
    for name in imported(asserts):
        with contextlib.suppress(Exception):
            __import__(name)
    modules = [module for module in list(sys.modules.values()) if isinstance(module, type(sys))]
    before = [(vars(module), dict(vars(module))) for module in modules]
    mine, ours, numbered = globals(), dict(globals()), list(enumerate(asserts, 1))
    space: dict[str, Any] = {"__name__": "solution" if asserts else "__main__", "__builtins__": builtins}
    space["exit"] = space["quit"] = sys.exit  # `-S` leaves out the module that defines them
    try:
        exec(compile(job["code"], "<code>", "exec"), space)
    except SystemExit as error:
        # with asserts to come an exit is no way to success
        done = not asserts and error.code in (0, None)
        return report(ok=done, reason="" if done else f"left by exit({error.code!r})")
    except BaseException as error:
        return report(ok=False, reason=_said(error))
    for number, line in numbered:
        mine.clear()  # the code may have put an `exec` of its own here, now or in what an assert calls
        mine.update(ours)
        for names, original in before:  # no function is called by its name until here: it could be a patched one
            names.update(original)
        sys.settrace(None)
        sys.setprofile(None)
        space["__builtins__"] = builtins
        try:
            exec(compile(line, f"<assert {number}>", "exec"), space)
        except BaseException as error:
            return report(ok=False, reason=f"assert {number} of {len(asserts)}: {_said(error)}")
    return report(ok=True, reason="")


def imported(statements: Sequence[str]) -> list[str]:
    """Name the modules that statements import; a statement that can't be read imports none."""
    names = []
    for statement in statements:
        with contextlib.suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(statement)):
                if isinstance(node, ast.Import):
                    names += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.append(node.module)
    return names


def reap(worker: int, most: int, report: Callable[..., None]) -> int:
    """
    Wait for the worker, and for orphans, which the first process of a namespace inherits.

    With `most` they are counted in `/proc`, and when they are more, all are killed: the kernel's limit doesn't bind a
    superuser.

    Returns:
        The worker's exit status.
    """
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG if most else 0)
        if pid == worker:
            return status
        if pid == 0:
            if sum(name.isdigit() for name in os.listdir("/proc")) > most:
                report(ok=False, reason=f"started more than {most} processes")
                os.kill(-1, signal.SIGKILL)
            signal.sigtimedwait({signal.SIGCHLD}, GUARD_S)


def main() -> None:
    """Read the job, isolate, fork twice, run."""
    channel = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    token, write, dumps = job.pop("token"), os.write, json.dumps

    def report(**said: Any) -> None:
        write(channel, (dumps({"token": token, **said}) + "\n").encode())

    closed = job["closed"] or isolate(job["folder"], job["file_mb"])
    report(closed=closed)
    _die_with_parent()
    first = os.fork()
    if first:
        os._exit(_exit_code(os.waitpid(first, 0)[1]))
    _die_with_parent()
    # the old /proc lists processes of another namespace; where the kernel refuses a new one it stays, to no use
    counted = bool(job["closed"]) or (closed and ctypes.CDLL(None).mount(b"proc", b"/proc", b"proc", 0, None) == 0)
    if counted:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # to be waited for, not to be lost
    worker = os.fork()
    if worker:
        os._exit(_exit_code(reap(worker, job["processes"] if counted else 0, report)))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # only the counting process goes first
    _die_with_parent()
    limit(job)
    try:
        run(job, report)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)  # no exit handlers of the code


def _read_only(libc: Any, path: bytes, flags: int, on: bool) -> bool:
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY if on else 0, 0 if on else MOUNT_ATTR_RDONLY, 0, 0)
    return libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, attributes, ctypes.sizeof(attributes)) == 0


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__


if __name__ == "__main__":
    main()
