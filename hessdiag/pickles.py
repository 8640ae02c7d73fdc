"""A pickle read without running it: an interpreter of the opcodes whose every value is inert.

`read` rebuilds lists, dicts and primitives; a global is only its name, and calling it calls the reader's own
constructor for that name, which describes the object instead of making it. A name without a constructor is
refused, so nothing that the file names is ever imported or called. (Opcodes: `pickletools`; the subset below
is protocols 0 to 4 without persistent ids as text, extension codes and instances.)
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any

from hessdiag.files import BadFileError, shown
from hessdiag.picklerules import MAX_OPCODES, Global, Rules, check_nesting, plain_key

_NAMES = {op.code.encode("latin-1")[0]: op.name for op in pickletools.opcodes}
_MARK = object()


def read(data: bytes, rules: Rules, start: int = 0) -> tuple[Any, int]:
    """The value that the pickle at `start` describes, and the offset behind it."""
    try:
        return _Machine(data, rules, start).run()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, ValueError):
        raise BadFileError("the pickle inside is truncated or corrupt") from None


class _Machine:
    def __init__(self, data: bytes, rules: Rules, start: int) -> None:
        self.data, self.rules, self.at = data, rules, start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        data, opcodes, handlers = self.data, self.rules.opcodes, _HANDLERS
        for _ in range(MAX_OPCODES):
            if self.at >= len(data):
                raise BadFileError("the pickle inside is truncated")
            code = data[self.at]
            self.at += 1
            if code not in opcodes:
                name = _NAMES.get(code)
                what = (
                    f"the pickle opcode {name}"
                    if name
                    else f"the byte {code:#04x} where a pickle opcode belongs"
                )
                raise BadFileError(f"{what} has no place here: refused, nothing was executed")
            if code == 0x2E:  # STOP
                value = self.pop()
                check_nesting(value)
                return value, self.at
            handlers[code](self)
        raise BadFileError(f"the pickle inside has more than {MAX_OPCODES} opcodes")

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise BadFileError("the pickle inside is truncated")
        chunk = self.data[self.at : self.at + count]
        self.at += count
        return chunk

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise BadFileError("a name in the pickle inside has no end")
        text, self.at = self.data[self.at : end], end + 1
        return text.decode("utf-8")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise BadFileError("the pickle inside is corrupt (nothing on its stack)")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise BadFileError("the pickle inside is corrupt (no mark on its stack)")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def string(self, count: int) -> None:
        chunk = self.take(count)
        self.push(chunk.decode("utf-8") if self.rules.text else chunk)

    def global_name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if not self.rules.names(full):
            raise BadFileError(
                f"the pickle asks for {shown(full)}, which is not data: refused, nothing was executed"
            )
        self.push(Global(full))

    def named_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise BadFileError("the pickle inside is corrupt (a global without a name)")
        self.global_name(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise BadFileError(
                "the pickle calls something that is no constructor: refused, nothing was executed"
            )
        self.push(self.rules.call(function.name, arguments))

    def build(self) -> None:
        state = self.pop()
        self.rules.build(self.top(), state)

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise BadFileError("the pickle inside is corrupt (it appends to no list)")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise BadFileError("the pickle inside is corrupt (it sets items of no dict)")
        for key, value in zip(items[::2], items[1::2]):
            target[plain_key(key)] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise BadFileError("the pickle inside is corrupt (it recalls what it never stored)")
        self.push(self.memo[index])

    def keep(self, index: int) -> None:
        self.memo[index] = self.top()

    def persistent(self) -> None:
        if self.rules.persistent is None:
            raise BadFileError("the pickle refers to objects outside itself: refused")
        self.push(self.rules.persistent(self.pop()))


def _long(machine: _Machine, count: int) -> None:
    if count > 64:
        raise BadFileError("an absurdly long integer in the pickle inside")
    machine.push(int.from_bytes(machine.take(count), "little", signed=True))


_HANDLERS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.number("<B"),  # PROTO
    0x95: lambda m: m.number("<Q"),  # FRAME: only a hint
    ord("c"): lambda m: m.global_name(m.line(), m.line()),
    0x93: _Machine.named_on_stack,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("a"): lambda m: (lambda item: m.append([item]))(m.pop()),
    ord("e"): lambda m: m.append(m.to_mark()),
    ord("s"): _Machine.set_item,
    ord("u"): lambda m: m.set_items(m.to_mark()),
    ord("("): lambda m: m.push(_MARK),
    ord("t"): lambda m: m.push(tuple(m.to_mark())),
    ord("l"): lambda m: m.push(m.to_mark()),
    ord("0"): lambda m: (m.pop(), None)[1],
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord(")"): lambda m: m.push(()),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord("Q"): _Machine.persistent,
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("X"): lambda m: m.push(m.take(m.number("<I")).decode("utf-8")),
    0x8C: lambda m: m.push(m.take(m.number("<B")).decode("utf-8")),
    0x8D: lambda m: m.push(m.take(m.number("<Q")).decode("utf-8")),
    ord("U"): lambda m: m.string(m.number("<B")),
    ord("T"): lambda m: m.string(m.number("<i")),
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("q"): lambda m: m.keep(m.number("<B")),
    ord("r"): lambda m: m.keep(m.number("<I")),
    0x94: lambda m: m.keep(len(m.memo)),
    0x8A: lambda m: _long(m, m.number("<B")),
    0x8B: lambda m: _long(m, m.number("<i")),
}
