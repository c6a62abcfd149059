# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501, T201, UP031 - programs on one line each; a command that prints
"""
Attacks on the sandbox: `python tests/tasks/attacks.py` prints which of them each mode holds for the user who runs it.

Standard library only: the sandbox is loaded by its path, so that another user's Python can run this file too.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("sandbox", ROOT / "src" / "peft_svf" / "tasks" / "sandbox.py")
sandbox = importlib.util.module_from_spec(spec)
sys.modules["sandbox"] = sandbox
spec.loader.exec_module(sandbox)

RETURNS_NOTHING = "def f(x): return []\n"
FRAMES = "import sys\nframe = sys._getframe()\nwhile frame:\n    {}\n    frame = frame.f_back\n"
# Each must fail `assert len(f(1)) == 3`.
FAKES = {
    "exit before the asserts": "import os\nos._exit(0)",
    "exit while a call runs": "def f(x):\n    import os\n    os._exit(0)",
    "SystemExit from a call": "def f(x): raise SystemExit(0)",
    "StopIteration from a call": "def f(x): raise StopIteration",
    "`len` patched": RETURNS_NOTHING + "import builtins\nbuiltins.len = lambda x: 3",
    "`len` patched while f runs": "def f(x):\n    import builtins\n    builtins.len = lambda x: 3\n    return []",
    "`len` defined": RETURNS_NOTHING + "len = lambda x: 3",
    "`__builtins__` replaced": RETURNS_NOTHING + "__builtins__ = {'len': lambda x: 3}",
    "a class with __len__": "class A:\n    def __len__(self): return 3\ndef f(x): return A()",
    "a list with its own __len__": "class A(list):\n    def __len__(self): return 3\ndef f(x): return A()",
    "audit hook": RETURNS_NOTHING
    + "import sys, os\nsys.addaudithook(lambda e, a: os._exit(0) if e == 'compile' else None)",
    "gc callback": RETURNS_NOTHING
    + "import gc, builtins\ngc.callbacks.append(lambda p, i: setattr(builtins, 'len', lambda x: 3))\ngc.collect()",
    "trace function": RETURNS_NOTHING
    + "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: setattr(sys, 'x', 1))",
    "sys.modules": RETURNS_NOTHING + "import sys\nfor name in list(sys.modules): sys.modules[name] = None",
    "frames of the harness": RETURNS_NOTHING
    + FRAMES.format("frame.f_globals['encode'] = lambda *a: ['list', [1]] * 3"),
    "ctypes": RETURNS_NOTHING + "import ctypes\nctypes.pythonapi.Py_Exit(0)",
    "atexit": RETURNS_NOTHING + "import atexit, os\natexit.register(os._exit, 0)",
    "signal": RETURNS_NOTHING + "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "kill the parent": RETURNS_NOTHING
    + "import os, signal\nfor pid in (1, os.getppid()):\n    try: os.kill(pid, 0)\n    except OSError: pass",
    "a verdict on every pipe": RETURNS_NOTHING
    + 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"ok": true, "reason": ""}\')\n    except OSError: pass',
    "a replayed report": RETURNS_NOTHING
    + "import os\nfor fd in range(3, 64):\n    try: os.write(fd, (13).to_bytes(8, 'big') + b\"{'value': 3}  \")\n    except OSError: pass",
    "a value nested 100,000 deep": "def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y",
    "deep text on the judge's pipe": RETURNS_NOTHING
    + "import os\ndata = b'[' * 200000\nfor fd in range(3, 64):\n    try: os.write(fd, len(data).to_bytes(8, 'big') + data)\n    except OSError: pass",
    "a message without end": RETURNS_NOTHING
    + "import os\nfor fd in range(3, 64):\n    try: os.write(fd, (1 << 60).to_bytes(8, 'big'))\n    except OSError: pass",
    "printed success": RETURNS_NOTHING + 'print(\'passed\')\nprint(\'{"ok": true, "reason": ""}\')',
    "patched AssertionError": "import builtins\nbuiltins.AssertionError = builtins.Exception = None\ndef f(x): return []",
    "the harness's file rewritten": RETURNS_NOTHING + f"open({str(sandbox.HARNESS)!r}, 'a').write('#')",
}
EVERYTHING = "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return True\n    __hash__ = None\n    def __bool__(s): return True\n    def __lt__(s, o): return True\n    __gt__ = __le__ = __ge__ = __lt__\ndef f(x): return E()"
# Each must fail its assert.
OBJECTS = {
    "an object that equals everything": "assert f(1) == 3",
    "an object unequal to everything": "assert f(1) != 3",
    "an object that is true": "assert f(1)",
    "an object less than everything": "assert f(1) < 3",
}
# Each prints "through" if it gets through.
TRY = "try:\n    {}\n    print('through')\nexcept BaseException as error:\n    print(repr(error))"
FOR_EACH_JUDGE = "import os\nfor p in filter(str.isdigit, os.listdir('/proc')):\n    try:\n        if b'\\0judge\\0' in open(f'/proc/{{p}}/cmdline', 'rb').read(): {}; print('through')\n    except OSError: pass"
EFFECTS = {
    "read a file of the user": "print('through') if open({secret!r}).read() else None",
    "write a file of the user": "open({writable!r}, 'w').write('lost'); print('through')",
    "connect over TCP": TRY.format("import socket; socket.create_connection(('127.0.0.1', {port}), 1)"),
    "connect to a socket file": TRY.format("import socket; socket.socket(socket.AF_UNIX).connect({unix!r})"),
    "connect to an abstract socket": TRY.format(
        "import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + {abstract!r})"
    ),
    "open a FIFO": TRY.format("import os; os.open({fifo!r}, os.O_RDWR | os.O_NONBLOCK)"),
    "write /proc/sys": TRY.format("open('/proc/sys/kernel/hostname', 'w').write('x')"),
    "write /proc/sys/kernel/shmmax": TRY.format("open('/proc/sys/kernel/shmmax', 'w').write('1')"),
    "read the trainer's environment": TRY.format("assert 'sandbox-secret' in open('/proc/{pid}/environ').read()"),
    "open the judge's memory": FOR_EACH_JUDGE.format("open(f'/proc/{p}/mem', 'rb')"),
    "take the judge's sockets": FOR_EACH_JUDGE.format("os.listdir(f'/proc/{p}/fd')"),
    "signal the trainer": TRY.format("import os; os.kill({pid}, 0)"),
    "attach a System V segment": TRY.format("import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1666) >= 0"),
    "remount the root": TRY.format(
        "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/', None, 0x1020, None) == 0"
    ),
    "leave for new namespaces": TRY.format("import ctypes; assert ctypes.CDLL(None).unshare(0x10020000) == 0"),
    "have a capability": "print('through') if int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16) else None",
    "run as the host's root": "print('through') if open('/proc/self/uid_map').read().split()[:2] == ['0', '0'] and __import__('os').getuid() == 0 else None",
    "gain privileges": "print('through') if open('/proc/self/status').read().split('NoNewPrivs:')[1].split()[0] == '0' else None",
    "open the terminal": TRY.format("import os; os.open('/dev/tty', os.O_RDWR)"),
    "read a disk": TRY.format("import glob; open((glob.glob('/dev/[sv]d[a-z]') + ['/dev/mem'])[0], 'rb').read(1)"),
    "fill the disk": TRY.format("[open(str(i), 'wb').write(bytes(8 << 20)) for i in range(8)]"),
    "memory of one process": TRY.format("x = bytearray(4 << 30)"),
    "memory of many processes": "import os, time\nr, w = os.pipe()\nfor _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(120 << 20); os.write(w, b'.'); time.sleep(3); os._exit(0)\nos.close(w)\nif all([os.read(r, 1) for _ in range(8)]): print('through')",
    "memory in memfd": "import os, time\nfor _ in range(50):\n    os.write(os.memfd_create('m'), bytes(15 << 20))\ntime.sleep(1)\nprint('through')",
    "200 processes": TRY.format(
        "import os, time\n    for _ in range(200):\n        if os.fork() == 0: time.sleep(2); os._exit(0)"
    ),
    "an environment with secrets": "import os; print('through') if 'sandbox-secret' in str(os.environ) else None",
    "a process that stays": "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(0.7)\n        open({stays!r}, 'w').write('x') if os.path.exists({stays!r}) else None\n        while True: time.sleep(1)\nelse: print('started')",
}


@contextmanager
def only(mode: str):
    """Run programs in a mode, whose judge is gone afterwards: a program without namespaces could reach it."""
    sandbox._mode = lambda: mode
    try:
        yield
    finally:
        sandbox._starter(os.getpid(), mode).close()
        sandbox._starter.cache_clear()


def run(mode: str) -> dict[str, bool]:
    """Run all attacks in a mode as this user; return whether each was held."""
    with only(mode):
        fakes = {name: [code, "assert len(f(1)) == 3"] for name, code in FAKES.items()}
        fakes |= {name: [EVERYTHING, statement] for name, statement in OBJECTS.items()}
        held = {name: not sandbox.run_python(code, [statement]).ok for name, (code, statement) in fakes.items()}
        return held | {name: effect(name) for name in EFFECTS}


def effect(name: str) -> bool:
    """Run an attack that wants something of the host; return whether it was held."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        paths = {key: str(Path(folder, key)) for key in ("secret", "writable", "unix", "fifo", "stays")}
        for key in ("secret", "writable"):
            Path(paths[key]).write_text("kept")
            os.chmod(paths[key], 0o600)
        os.chmod(folder, 0o755)
        os.mkfifo(paths["fifo"])
        os.chmod(paths["fifo"], 0o666)
        abstract = f"attack-{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as hidden:
            named.bind(paths["unix"])
            named.listen()
            os.chmod(paths["unix"], 0o777)
            hidden.bind("\0" + abstract)
            hidden.listen()
            code = EFFECTS[name]
            values = {**paths, "port": server.getsockname()[1], "pid": os.getpid(), "abstract": abstract}
            for key, value in values.items():
                code = code.replace("{%s!r}" % key, repr(value)).replace("{%s}" % key, str(value))
            if name == "a process that stays":
                mark = f"stays-{os.getpid()}-{time.monotonic_ns()}"
                code = f"MARK = {mark!r}\n" + code.replace(
                    "while True: time.sleep(1)",
                    f"os.execv(sys.executable, [{mark!r}, '-S', '-c', 'import time; time.sleep(5)'])",
                )
                sandbox.run_python(code)
                time.sleep(1)
                listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
                return mark not in listed
            result = sandbox.run_python(code, timeout=8)
            return "through" not in result.stdout


def works(mode: str) -> bool:
    """Check whether a mode works here for this user."""
    with only(mode):
        return sandbox.run_python("pass").ok


if __name__ == "__main__":  # which attacks each mode that works here holds, for this user
    print(json.dumps({mode: run(mode) for mode in sandbox.MODES if works(mode)}))
