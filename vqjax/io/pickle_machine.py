# SPDX-License-Identifier: Apache-2.0
"""Runs the data part of a pickle and nothing else: no import, no call, no attribute access.

A pickle is a program. Python's own unpickler resolves the names in it to live objects and calls
them; here a name stays a name (`Global`), and what it would have been called on goes to a function
of ours that knows a handful of names. Everything else becomes an inert `Stub`. Memory and time are
bounded by the length of the pickle: nothing is ever copied more often than an instruction is read.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from vqjax.errors import VqjaxError

MAX_BYTES = 64 << 20
MAX_STEPS = 4_000_000
_MAX_LINE = 1024  # names, and numbers of the text opcodes
_MAX_STUB_NAME = 200
_MAX_INTEGER_BYTES = 64
_SCALARS = (str, bytes, bool, float, type(None))


class Global(NamedTuple):
    """A name in the pickle that Python would import: never resolved."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Stub:
    """Stands for an object that we do not build. Takes any construction and state, keeps none.

    The name is cut: a few bytes of a pickle can make another stub of a long one.
    """

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name[:_MAX_STUB_NAME]

    def __repr__(self) -> str:
        return f"<stub of {self.name}>"


def run(
    data: bytes,
    position: int,
    *,
    call: Callable[[str, tuple], Any],
    persistent: Callable[[Any], Any],
) -> tuple[Any, int]:
    """Builds the object of the pickle that starts at `position`.

    Args:
      data: the pickle, more may follow it.
      call: makes the result of calling the named global with arguments, without running anything.
      persistent: makes the object that a persistent id of the file stands for.

    Returns:
      Dicts, lists, tuples, strings, numbers, `Global`, `Stub` and what `call` and `persistent`
      made; and the position after the pickle.

    Raises:
      VqjaxError: if it is cut off, malformed, too large, or uses what a checkpoint never needs.
    """
    machine = _Machine(data, position, call, persistent)
    for _ in range(MAX_STEPS):
        opcode = machine.take(1)
        if opcode == b".":
            return machine.pop(), machine.position
        step = _STEPS.get(opcode)
        if step is None:
            _fail(f"opcode {opcode!r} at byte {machine.position - 1} has no place in a checkpoint")
        step(machine)
    _fail(f"more than {MAX_STEPS} pickle instructions")


def _fail(what: str) -> NoReturn:
    raise VqjaxError(what)


class _Machine:
    """Stack, memo and reading position of one run."""

    def __init__(self, data: bytes, position: int, call: Callable, persistent: Callable):
        self.data, self.position = data, position
        self.call, self.persistent = call, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def take(self, count: int) -> bytes:
        found = self.data[self.position : self.position + count]
        if len(found) < count:
            _fail(f"the pickle ends early: {count} bytes wanted at byte {self.position}")
        self.position += count
        return found

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            _fail(f"no end of line within {_MAX_LINE} bytes of byte {self.position}")
        return self.text(self.take(end + 1 - self.position)[:-1])

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return _fail(f"text before byte {self.position} is not UTF-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            _fail(f"nothing on the stack at byte {self.position}")
        return self.stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            _fail(f"no mark on the stack at byte {self.position}")
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            _fail(f"memo entry {index} used before it is set")
        self.push(self.memo[index])

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if len(pairs) % 2:
            _fail(f"a dict key without a value at byte {self.position}")
        if isinstance(target, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                target[_dict_key(key)] = value

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)

    def reduce(self, args: Any, function: Any) -> None:
        if not isinstance(args, tuple):
            _fail(f"a call at byte {self.position} without a tuple of arguments")
        if not isinstance(function, Global):
            self.push(Stub(f"the result of calling a {type(function).__name__}"))
        elif function == ("collections", "OrderedDict"):
            self.push(self.ordered_dict(args))
        else:
            self.push(self.call(str(function), args))

    def ordered_dict(self, args: tuple) -> dict:
        pairs = args[0] if len(args) == 1 and isinstance(args[0], list) else []
        self.copied += len(pairs)  # the same list may be named again and again
        if self.copied > MAX_STEPS:
            _fail("dicts made from lists hold too many items")
        found = {}
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                _fail("an ordered dict made from something else than pairs")
            found[_dict_key(pair[0])] = pair[1]
        return found

    def global_(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            _fail(f"a global at byte {self.position} whose name is no text")
        longest = max(len(module), len(name))
        if longest > _MAX_LINE:  # every call of it would copy that much
            _fail(
                f"a global at byte {self.position} whose name has {longest} characters, "
                f"at most {_MAX_LINE} make sense"
            )
        self.push(Global(module, name))


def _dict_key(key: Any) -> Any:
    """Keys that hash in constant time; a deeply nested tuple would exhaust the C stack."""
    if type(key) in _SCALARS or isinstance(key, Global):
        return key
    if type(key) is int and abs(key) < 1 << 62:
        return key
    return Stub("a dict key that is neither text nor a small number")


def _long(m: _Machine, size: int) -> None:
    if not 0 <= size <= _MAX_INTEGER_BYTES:
        _fail(f"an integer of {size} bytes, at most {_MAX_INTEGER_BYTES} make sense")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


def _text_number(m: _Machine, convert: Callable[[str], Any]) -> None:
    line = m.line().rstrip("L")
    if len(line) > _MAX_INTEGER_BYTES:
        _fail(f"a number of {len(line)} digits")
    try:
        m.push({"00": False, "01": True}[line] if line in ("00", "01") else convert(line))
    except ValueError:
        _fail(f"{line!r} is no number")


def _old_text(m: _Machine, size: int) -> None:
    """Strings of Python 2, which were bytes: text where they can be."""
    raw = m.take(max(size, 0))
    try:
        m.push(raw.decode())
    except UnicodeDecodeError:
        m.push(raw)


def _pop_or_unmark(m: _Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.pop()


def _dict(m: _Machine) -> None:
    pairs = m.pop_mark()
    m.push({})
    m.set_items(pairs)


def _class_call(m: _Machine, parts: list[Any]) -> None:
    if not parts:
        _fail(f"an object without a class at byte {m.position}")
    m.reduce(tuple(parts[1:]), parts[0])


def _inst(m: _Machine) -> None:
    m.global_(m.line(), m.line())
    name = m.pop()
    m.reduce(tuple(m.pop_mark()), name)


def _new_with_keywords(m: _Machine) -> None:
    m.pop()
    m.reduce(m.pop(), m.pop())


def _stack_global(m: _Machine) -> None:
    name = m.pop()
    m.global_(m.pop(), name)


def _tuple(m: _Machine, count: int) -> None:
    items = [m.pop() for _ in range(count)]
    m.push(tuple(reversed(items)))


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": _pop_or_unmark,
    b"1": lambda m: m.pop_mark(),
    b"2": lambda m: m.push(m.top()),
    # Numbers.
    b"F": lambda m: _text_number(m, float),
    b"I": lambda m: _text_number(m, int),
    b"L": lambda m: _text_number(m, int),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8a": lambda m: _long(m, m.number("<B")),
    b"\x8b": lambda m: _long(m, m.number("<i")),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    # Text and bytes.
    b"S": lambda m: m.push(m.line().strip("\"'")),
    b"T": lambda m: _old_text(m, m.number("<i")),
    b"U": lambda m: _old_text(m, m.number("<B")),
    b"V": lambda m: m.push(m.line()),
    b"X": lambda m: m.push(m.text(m.take(m.number("<I")))),
    b"\x8c": lambda m: m.push(m.text(m.take(m.number("<B")))),
    b"\x8d": lambda m: m.push(m.text(m.take(m.number("<Q")))),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"\x96": lambda m: m.push(m.take(m.number("<Q"))),
    # Containers. Sets hash their items, and no checkpoint needs one: stubs.
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: _tuple(m, 1),
    b"\x86": lambda m: _tuple(m, 2),
    b"\x87": lambda m: _tuple(m, 3),
    b"}": lambda m: m.push({}),
    b"d": _dict,
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"\x8f": lambda m: m.push(Stub("set")),
    b"\x90": lambda m: m.pop_mark(),
    b"\x91": lambda m: (m.pop_mark(), m.push(Stub("frozenset"))),
    # Memo.
    b"p": lambda m: (_text_number(m, int), m.put(m.pop())),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": lambda m: (_text_number(m, int), m.get(m.pop())),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    # What Python would import and call; the state of an object (b) is dropped.
    b"c": lambda m: m.global_(m.line(), m.line()),
    b"\x93": _stack_global,
    b"R": lambda m: m.reduce(m.pop(), m.pop()),
    b"\x81": lambda m: m.reduce(m.pop(), m.pop()),
    b"\x92": _new_with_keywords,
    b"i": _inst,
    b"o": lambda m: _class_call(m, m.pop_mark()),
    b"b": lambda m: m.pop(),
    b"Q": lambda m: m.push(m.persistent(m.pop())),
    # Framing.
    b"\x80": lambda m: m.number("<B"),
    b"\x95": lambda m: m.number("<Q"),
}
