# SPDX-License-Identifier: Apache-2.0
"""
The far side of the sandbox: two scripts, one that runs a program and one that judges it.

`sandbox` starts both as `python -I -S -B -c SOURCE ROLE ...`, so that no file of theirs can be rewritten. They share
no interpreter. The *program* loads the model's code as a module and serves requests on a pipe: look up names, call,
read or set an attribute, iterate. The *judge* executes the asserts; a name that they take from the program becomes a
plain value or a [`Remote`]. Only tagged literals cross the pipe, so the judge compares values and never runs a method
of the program's objects. Standard library only.
"""

import builtins
import os
import resource
import sys

# Each import costs a program's start some milliseconds: `json`, `types` and `typing` are left out.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:
    Any = object
ModuleType, BuiltinFunctionType = type(sys), type(len)

FRAME = 32 << 20  # bytes of one message, after which the other side counts as broken
SMALL = 1 << 53  # integers beyond it travel in hexadecimal, which has no limit of digits
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
    """The program raised, ended, or returned what isn't a literal."""


class Channel:
    """Messages over two pipes: the length in 8 bytes, then a literal, which the judge reads with `literal_eval`."""

    def __init__(self, source: int, target: int, parse: Any = eval) -> None:
        self.source, self.target, self.parse = source, target, parse

    def send(self, message: Any) -> None:
        data = repr(message).encode("utf-8", "surrogatepass")
        data = len(data).to_bytes(8, "big") + data
        while data:
            data = data[os.write(self.target, data) :]

    def receive(self) -> Any:
        size = int.from_bytes(self._read(8), "big")
        if size > FRAME:
            raise ProgramError(f"a value has more than {FRAME >> 20} MiB")
        try:
            return self.parse(self._read(size).decode("utf-8", "surrogatepass"))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ProgramError("the program wrote to the judge's pipe, or a value is nested too deeply") from None

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.source, min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def encode(value: Any, other: Any) -> Any:
    """Turn a value into a literal with tags; `other` encodes what isn't plain."""
    if value is None or isinstance(value, bool):
        return value
    for kind in type(value).__mro__:
        name = kind.__name__
        if name in VIEWS and kind.__module__ == "builtins":
            return encode(VIEWS[name](value), other)
        if PLAIN.get(name) == kind.__module__:
            break
    else:
        return other(value)
    if name == "str":
        return str.__str__(value)
    if name == "range":
        return [name, [value.start, value.stop, value.step]]
    value = kind(value)
    if name == "int":
        return value if -SMALL < value < SMALL else [name, hex(value)]
    if name in TEXTS:
        return [name, str(value)]
    if name in ("bytes", "bytearray"):
        return [name, value.hex()]
    if name in MAPPINGS:
        return [name, [[encode(key, other), encode(item, other)] for key, item in value.items()]]
    return [name, [encode(item, other) for item in value]]


def decode(message: Any, other: Any) -> Any:
    """Turn such a literal back into a value; `other` decodes the other tags."""
    if not isinstance(message, list):
        return message
    tag, content = message
    if tag not in PLAIN:
        return other(tag, content)
    kind = getattr(__import__(PLAIN[tag]), tag)
    if tag == "range":
        return kind(*content)
    if tag == "int":
        return int(content, 16)
    if tag in TEXTS:
        return kind(content)
    if tag in ("bytes", "bytearray"):
        return kind.fromhex(content)
    if tag in MAPPINGS:
        return kind({decode(key, other): decode(item, other) for key, item in content})
    return kind(decode(item, other) for item in content)


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
        job = self.channel.receive()
        module = ModuleType("solution" if job["serve"] else "__main__")
        sys.modules[module.__name__] = module  # before it runs, as pickling and dataclasses look it up
        space = module.__dict__
        space.update(exit=sys.exit, quit=sys.exit)  # `-S` leaves out the module that defines them
        self.objects.append(space)
        self.reply(lambda code: exec(compile(code, "<code>", "exec"), space), job["code"])
        while True:
            operation, target, arguments, keywords = self.channel.receive()
            arguments, keywords = self.decoded(arguments), self.decoded(keywords)
            self.reply(OPERATIONS[operation], self.objects[target], arguments, keywords)

    def reply(self, action: Any, subject: Any, arguments: Any = (), keywords: Any = None) -> None:
        """Send the result of an action, and its arguments if it changed them: the judge has copies."""
        before = self.encoded(arguments)
        try:
            message = {"value": self.encoded(action(subject, *arguments, **(keywords or {})))}
            if (after := self.encoded(arguments)) != before:
                message["arguments"] = after
        except SystemExit as error:
            message = {"error": ["SystemExit", f"left by exit({error.code!r})"], "code": error.code in (0, None)}
        except BaseException as error:
            import traceback

            traceback.print_exc()
            message = {"error": [type(error).__name__, _text(error)]}
        sys.stdout.flush()
        sys.stderr.flush()
        self.channel.send(message)

    def encoded(self, value: Any) -> Any:
        return encode(value, self._handle)

    def decoded(self, message: Any) -> Any:
        return decode(
            message, lambda tag, content: getattr(builtins, content) if tag == "builtin" else self.objects[content]
        )

    def _handle(self, value: Any) -> Any:
        if isinstance(value, ModuleType):
            return ["module", value.__name__]
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return ["object", self.numbers[id(value)]]


class Remote:
    """An object on the program's side. It can be called and passed back, but equals nothing and isn't true."""

    def __init__(self, judge: "Judge", number: int) -> None:
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._judge.request("call", self._number, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._judge.request("get", self._number, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge.request("set", self._number, (name, value))

    def __iter__(self) -> Any:
        return iter(self._judge.request("iterate", self._number))

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

    def verdict(self, code: str, asserts: list[str]) -> tuple[bool, str]:
        """Return whether the program ran to its end and all asserts passed, and the reason if not."""
        self.channel.send({"code": code, "serve": bool(asserts)})
        try:
            message = self.channel.receive()
            if "error" in message:
                # if asserts follow, an exit isn't a way to success
                return not asserts and message.get("code") is True, _reason(*message["error"])
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
            space = self.request("names", 0, sorted(names))
            if not isinstance(space, dict) or not space.keys() <= names:
                raise ProgramError("the program's names are damaged")
            if any(isinstance(value, Remote) for value in space.values()):
                break
        return {"__name__": "asserts", **space}

    def request(self, operation: str, target: Any, arguments: Any = (), keywords: Any = None) -> Any:
        encoded = encode(list(arguments), self._outgoing), encode(keywords or {}, self._outgoing)
        try:
            self.channel.send([operation, target, *encoded])
            message = self.channel.receive()
            if "error" in message:
                raise _error(*message["error"])
            if "arguments" in message:
                for old, new in zip(arguments, decode(message["arguments"], self._incoming), strict=True):
                    _replace(old, new)
            return decode(message["value"], self._incoming)
        except (EOFError, OSError) as error:
            raise ProgramError("the program ended") from error
        except RecursionError as error:
            raise ProgramError("a value is nested too deeply") from error

    def _outgoing(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return ["object", value._number]
        name = getattr(value, "__name__", "")
        if isinstance(value, (type, BuiltinFunctionType)) and vars(builtins).get(name) is value:
            return ["builtin", name]
        raise TypeError(f"an assert passes {type(value).__name__}, which isn't a literal, to the program")

    def _incoming(self, tag: str, content: Any) -> Any:
        if tag == "module" and content in SHARED:
            return __import__(content)
        if tag == "object" and isinstance(content, int):
            return Remote(self, content)
        raise ProgramError(f"the program returned {tag} {content!r:.40}, which isn't a literal")


def _replace(old: Any, new: Any) -> None:
    """Change a mutable argument to what the program made of it."""
    if hasattr(type(old), "clear"):  # a look at the class: [`Remote`] would send the name to the program
        old.clear()
        (old.extend if hasattr(old, "extend") else old.update)(new)


def _error(name: str, text: str) -> Exception:
    """Return the builtin error of that name, as asserts may expect it, but none that ends a loop or a process."""
    kind: Any = vars(builtins).get(name)
    ends = issubclass(kind, (StopIteration, StopAsyncIteration)) if isinstance(kind, type) else True
    if ends or not issubclass(kind, Exception):
        return ProgramError(f"{name}: {text}" if text else name)
    error = ValueError(text) if issubclass(kind, UnicodeError) else kind(text)
    return error if isinstance(error, Exception) else ProgramError(name)


def _reason(name: str, text: str) -> str:
    if name == "SystemExit":
        return text
    if name == "EOFError":
        return "the program ended before its verdict"
    return (f"{name}: {text}" if text else name)[:300]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return ""


def limit(limits: dict[str, int]) -> None:
    """Set the limits of this process and its children; one that the system lacks is passed over."""
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            continue


def serve_judges(control: int) -> None:
    """Fork a judge for each job: the control socket brings its three pipes, and the last pipe brings the asserts."""
    import json
    import signal
    import socket
    from ast import literal_eval

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaps the judges
    with socket.socket(fileno=control) as source:
        while True:
            _, descriptors, _, _ = socket.recv_fds(source, 1, 3)
            if not descriptors:
                os._exit(0)  # the other side is gone
            if os.fork() == 0:
                break
            for descriptor in descriptors:
                os.close(descriptor)
    job = Channel(descriptors[2], descriptors[2], json.loads).receive()
    limit(job["limits"])
    signal.alarm(job["seconds"])  # an assert may loop
    verdict = Judge(Channel(descriptors[0], descriptors[1], literal_eval)).verdict(job["code"], job["asserts"])
    os.write(descriptors[2], json.dumps(verdict).encode())
    os._exit(0)


def main() -> None:
    """Play the role that the arguments name: `judge SOCKET`, or `program LIMITS IN OUT`."""
    role, *arguments = sys.argv[1:]
    os.chdir(os.environ["TMPDIR"])
    if role == "judge":
        serve_judges(int(arguments[0]))
    limit(eval(arguments[0]))
    try:
        Program(Channel(int(arguments[1]), int(arguments[2]))).run()
    except (EOFError, OSError):
        os._exit(0)  # the judge is done


if __name__ == "__main__":
    main()
