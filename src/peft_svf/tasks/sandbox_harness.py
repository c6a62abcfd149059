# SPDX-License-Identifier: Apache-2.0
"""
The far side of the sandbox: two scripts, one that runs a program and one that judges it.

`sandbox` starts both as `python -I -S -B -c SOURCE ROLE ...`, so that no file of theirs can be rewritten. The
*program* loads the model's code as a module and serves requests on a socket: look up names, call, read or set an
attribute, iterate. The *judge* executes the asserts; a name that they take from the program becomes a plain value or a
[`Remote`]. What crosses the socket is an expression of literals, calls of a few constructors and handles, which the
judge reads without running it: it never runs a method of the program's objects. Standard library only.
"""

import builtins
import os
import sys

# Each import costs a program's start some milliseconds, so `types` and `typing` are left out.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:
    Any = object
ModuleType, BuiltinFunctionType = type(sys), type(len)

FRAME = 32 << 20  # bytes of one message, after which the other side counts as broken
# Classes whose values cross the pipe, with their modules; a subclass is read as the first of these among its bases.
PLAIN = {
    **dict.fromkeys(("int", "float", "complex", "str", "bytes", "bytearray", "range"), "builtins"),
    **dict.fromkeys(("list", "tuple", "set", "frozenset", "dict"), "builtins"),
    **dict.fromkeys(("deque", "Counter", "OrderedDict"), "collections"),
    **{"Fraction": "fractions", "Decimal": "decimal"},
}
VIEWS: Any = {"dict_keys": set, "dict_items": set, "dict_values": list}
TEXTS, MAPPINGS = ("float", "complex", "Fraction", "Decimal"), ("dict", "Counter", "OrderedDict")
# Modules of the program that asserts may use by name; the judge imports its own copy.
SHARED = {
    *("math", "cmath", "datetime", "collections", "fractions", "decimal", "re", "itertools", "string", "copy"),
    *("random", "heapq", "bisect", "statistics", "time", "typing", "sys"),
}


class ProgramError(Exception):
    """The program returned what isn't a literal, or raised what isn't a builtin error."""


def write(value: Any, handle: Any) -> str:
    """Write a value as an expression; `handle` names what isn't plain."""
    if value is None or isinstance(value, bool):
        return repr(value)
    for kind in type(value).__mro__:
        name = kind.__name__
        if name in VIEWS and kind.__module__ == "builtins":
            return write(VIEWS[name](value), handle)
        if PLAIN.get(name) == kind.__module__:
            break
    else:
        return handle(value)
    if name == "int":
        return hex(value)  # has no limit of digits
    if name == "str":
        return repr(str.__str__(value))
    if name == "range":
        return f"range({value.start}, {value.stop}, {value.step})"
    if name in TEXTS:
        return f"{name}({str(value)!r})"
    if name in ("bytes", "bytearray"):
        return f"{name}({bytes(value)!r})"
    if name in MAPPINGS:
        pairs = ", ".join(f"[{write(key, handle)}, {write(item, handle)}]" for key, item in kind(value).items())
        return f"{name}(dict([{pairs}]))"
    return f"{'' if name == 'list' else name}([{', '.join(write(item, handle) for item in kind(value))}])"


def read(text: str, handle: Any) -> Any:
    """Read such an expression, and nothing else; `handle` resolves the names."""
    import ast

    def value(node: Any) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Name):
            return handle(node.id)
        return getattr(__import__(PLAIN[node.func.id]), node.func.id)(*map(value, node.args))

    return value(ast.parse(text, mode="eval").body)


class Channel:
    """Messages over a socket: the length in 8 bytes, then an expression."""

    def __init__(self, descriptor: int) -> None:
        self.source, self.target = (os.fdopen(descriptor, mode, closefd=False) for mode in ("rb", "wb"))

    def send(self, text: str) -> None:
        data = text.encode()
        self.target.write(len(data).to_bytes(8, "big") + data)
        self.target.flush()

    def receive(self) -> bytes:
        head = self.source.read(8)
        size = int.from_bytes(head, "big")
        if size > FRAME:
            raise ValueError(f"a value has more than {FRAME >> 20} MiB, or the program wrote to this socket")
        data = self.source.read(size)
        if len(head) < 8 or len(data) < size:
            raise EOFError
        return data


# What the judge may request of an object; of a module's names those that exist.
OPERATIONS: Any = {
    "names": lambda space, *names: {name: space[name] for name in names if name in space},
    "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
    "get": getattr,
    "set": setattr,
    "iterate": list,
}


class Program:
    """Serves the names of a module and the objects that were handed out."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.objects, self.numbers = channel, list[Any](), dict[int, int]()

    def run(self) -> None:
        limits, code, serve = self.receive()
        limit(limits)
        module = ModuleType("solution" if serve else "__main__")
        sys.modules[module.__name__] = module  # before it runs, as pickling and dataclasses look it up
        space = module.__dict__
        space.update(exit=sys.exit, quit=sys.exit)  # `-S` leaves out the module that defines them
        self.objects.append(space)
        self.reply(lambda code: exec(compile(code, "<code>", "exec"), space), code)
        while True:
            operation, subject, arguments, keywords = self.receive()
            self.reply(OPERATIONS[operation], subject, arguments, keywords)

    def receive(self) -> Any:
        return eval(self.channel.receive(), {}, self)  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> Any:
        """Resolve a name of an expression; `KeyError` leaves it to the builtins."""
        if name.startswith("object_"):
            return self.objects[int(name[7:])]
        return getattr(__import__(PLAIN[name]), name)

    def reply(self, action: Any, subject: Any, arguments: Any = (), keywords: Any = None) -> None:
        """Send the result of an action, and its arguments if it changed them: the judge has copies."""
        before = write(arguments, self.handle)
        try:
            message = {"value": action(subject, *arguments, **(keywords or {}))}
            if write(arguments, self.handle) != before:
                message["arguments"] = arguments
            text = write(message, self.handle)
        except SystemExit as error:
            ended = error.code in (0, None)
            text = write({"error": ["SystemExit", f"left by exit({error.code!r})"], "ended": ended}, repr)
        except BaseException as error:
            import traceback

            traceback.print_exc()
            text = write({"error": [type(error).__name__, _text(error)]}, repr)
        sys.stdout.flush()
        sys.stderr.flush()
        self.channel.send(text)

    def handle(self, value: Any) -> str:
        if isinstance(value, ModuleType) and value.__name__ in SHARED:
            return f"module_{value.__name__}"
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return f"object_{self.numbers[id(value)]}"


class Remote:
    """An object on the program's side. It can be called and passed back, but equals nothing and isn't true."""

    def __init__(self, judge: "Judge", number: int) -> None:
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._judge.request("call", self, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._judge.request("get", self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge.request("set", self, (name, value))

    def __iter__(self) -> Any:
        return iter(self._judge.request("iterate", self))

    def __eq__(self, other: object) -> bool:
        raise ProgramError("an object of the program's own class was compared")

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ProgramError("an object of the program's own class isn't true or false")

    __hash__ = object.__hash__


class Judge:
    """Executes asserts; what they take from the program is requested over the channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def verdict(self, limits: dict[str, int], code: str, asserts: list[str]) -> tuple[bool, str]:
        """Return whether the program ran to its end and all asserts passed, and the reason if not."""
        try:
            message = self.exchange([limits, code, bool(asserts)])
            if "error" in message:
                # if asserts follow, an exit isn't a way to success
                return not asserts and message.get("ended") is True, _reason(*message["error"])
            space = self.names(asserts)
        except Exception as error:
            return False, _reason(type(error).__name__, _text(error))
        for number, statement in enumerate(asserts, 1):
            try:
                exec(compile(statement, f"<assert {number}>", "exec"), space)
            except BaseException as error:
                reason = _reason(type(error).__name__, _text(error))
                return False, f"assert {number} of {len(asserts)}: {reason}"
        return True, ""

    def names(self, asserts: list[str]) -> dict[str, Any]:
        """Return the asserts' namespace. A builtin is the program's only if the asserts use nothing else of it."""
        import ast

        trees = [ast.parse(statement) for statement in asserts]
        used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used = {name for name in used if not name.startswith("__")}
        for names in (used - vars(builtins).keys(), used & vars(builtins).keys()):
            space = self.request("names", Remote(self, 0), sorted(names))
            if not isinstance(space, dict) or not space.keys() <= names:
                raise ProgramError("the program's names are damaged")
            if any(isinstance(value, Remote) for value in space.values()):
                break
        return {"__name__": "asserts", **space}

    def request(self, operation: str, subject: Any, arguments: Any = (), keywords: Any = None) -> Any:
        message = self.exchange([operation, subject, list(arguments), keywords or {}])
        if "error" in message:
            raise _error(*message["error"])
        for old, new in zip(arguments, message.get("arguments", ()), strict=False):
            if hasattr(type(old), "clear"):  # a look at the class: [`Remote`] would send the name to the program
                old.clear()
                (old.extend if hasattr(old, "extend") else old.update)(new)
        return message["value"]

    def exchange(self, message: Any) -> Any:
        """Send a message to the program and return its answer, a mapping of plain values and [`Remote`]s."""
        text = write(message, self.name)
        self.channel.send(text)
        data = self.channel.receive()
        try:
            return read(data.decode(), self.value)
        except Exception:
            raise ProgramError("a value is nested too deeply, or the program wrote to this socket") from None

    def name(self, value: Any) -> str:
        if isinstance(value, Remote):
            return f"object_{value._number}"
        name = getattr(value, "__name__", "")
        if isinstance(value, (type, BuiltinFunctionType)) and vars(builtins).get(name) is value:
            return name
        raise TypeError(f"an assert passes {type(value).__name__}, which isn't a literal, to the program")

    def value(self, name: str) -> Any:
        kind, _, key = name.partition("_")
        return __import__(key) if kind == "module" and key in SHARED else Remote(self, int(key))


def _error(name: str, text: str) -> Exception:
    """Return the builtin error of that name, as asserts may expect it, but none that ends a loop or a process."""
    kind: Any = vars(builtins).get(name)
    kept = isinstance(kind, type) and issubclass(kind, Exception) and "Iteration" not in name
    if not kept:
        return ProgramError(f"{name}: {text}" if text else name)
    return ValueError(text) if issubclass(kind, UnicodeError) else kind(text)


def _reason(name: str, text: str) -> str:
    if name == "SystemExit":
        return text
    if name in ("EOFError", "BrokenPipeError", "ConnectionResetError"):
        return "the program ended before its verdict"
    return (f"{name}: {text}" if text else name)[:300]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return ""


def limit(limits: dict[str, int]) -> None:
    """Set the limits of this process and its children; one that the system lacks is passed over."""
    import resource

    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, ValueError, OSError):
            continue


def serve_judges(control: int) -> None:
    """Fork a judge for each job: the control socket brings its two: to the program, and back with the verdict."""
    import ast  # noqa: F401 - before the fork, as each judge needs it
    import json
    import signal
    import socket

    try:  # a program of the same user can neither trace this process nor open its memory or its pipes
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    except (ImportError, OSError, AttributeError):
        pass  # `ctypes` is hidden in namespaces, which close that off already
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps the judges
    with socket.socket(fileno=control) as source:
        while True:
            _, descriptors, _, _ = socket.recv_fds(source, 1, 2)
            if not descriptors:
                os._exit(0)  # the other side is gone
            if os.fork() == 0:
                break
            for descriptor in descriptors:
                os.close(descriptor)
    job = json.loads(Channel(descriptors[1]).receive())
    limit(job["limits"])
    signal.alarm(job.pop("seconds"))  # an assert may wait
    verdict = Judge(Channel(descriptors[0])).verdict(**job)
    os.write(descriptors[1], json.dumps(verdict).encode())
    os._exit(0)


def main() -> None:
    """Play the role that the arguments name, as another user if they name one: `ROLE USER SOCKET`."""
    role, user, descriptor = sys.argv[1:]
    if user:
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
    os.chdir(os.environ["TMPDIR"])
    if role == "judge":
        serve_judges(int(descriptor))
    try:
        Program(Channel(int(descriptor))).run()
    except (EOFError, OSError):
        os._exit(0)  # the judge is done


if __name__ == "__main__":
    main()
