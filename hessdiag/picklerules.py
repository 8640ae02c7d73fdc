"""What a pickle that is read may contain: opcodes and globals, plain keys, and how deep its values may nest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hessdiag.files import BadFileError

MAX_OPCODES = 500_000
MAX_DEPTH = 40
# What torch.load(weights_only=True) understands; anything else in a checkpoint is refused before it gets
# there.
TORCH_OPCODES = frozenset(b"cRbaesu(t\x85\x86\x87N\x88\x89)]}QJKMGXUhjqr\x8a\x80.")
MODERN_OPCODES = TORCH_OPCODES | frozenset(b"TBC\x8e\x95\x8c\x8d\x94\x93\x8b0l")


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle mentions, as 'module.name'."""

    name: str


@dataclass(frozen=True)
class Rules:
    """What a pickle may contain: opcodes, globals, and what calling or filling them describes."""

    opcodes: frozenset[int]
    names: Callable[[str], bool]  # may this global be mentioned?
    call: Callable[[str, tuple[Any, ...]], Any]  # the description of name(*arguments)
    build: Callable[[Any, Any], None]  # state given to a description
    persistent: Callable[[Any], Any] | None = None
    text: bool = False  # are Python 2's 8-bit strings text (UTF-8), as torch.load reads them, or bytes?


def plain_key(key: Any) -> Any:
    """`key` if it is a plain dict key; others could recurse without end when hashed."""
    if type(key) not in (str, bytes, int):
        raise BadFileError(f"a dict key of type {type(key).__name__} in the pickle inside")
    return key


def check_nesting(value: Any) -> None:
    """Refuse values nested deeper than MAX_DEPTH (or in themselves), and those that repeat without end."""
    level, depth, seen = [value], 0, 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, (list, tuple)):
                below.extend(item)
            if seen + len(below) > MAX_OPCODES:
                raise BadFileError("the values inside repeat one another without end")
        depth, seen, level = depth + 1, seen + len(below), below
        if depth > MAX_DEPTH:
            raise BadFileError(f"values nested more than {MAX_DEPTH} deep")
