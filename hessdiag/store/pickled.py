"""A pickle read without running it: by another process, which hands back a plain description (`pickle_child`).

That process is Python without torch, started anew for every file, with limits on memory and processor time where the
system has them, and a wall clock where it has not. Nothing is read in this process: where no other can be started the
file is refused. Starting it takes about as long as starting Python (0.03 s).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hessdiag.store.files import BadFileError, shown, size_text
from hessdiag.store.tensorfiles import TensorFacts

CHILD = Path(__file__).with_name("pickle_child.py")
MAX_PICKLE = 32 * 2**20
MEMORY = 512 * 2**20
"""Bytes that the reading process may take, besides four times the pickle."""
SECONDS = 5
"""Its processor time: a checkpoint of 20,000 tensors takes 0.5."""
WALL_SECONDS = 120.0
MAX_REPLY = 128 * 2**20
MAX_NUMBER_KEYS = 10_000
"""Whole numbers as keys can be chosen to collide: the square of this many steps is bearable."""


@dataclass(frozen=True)
class Stored(TensorFacts):
    """A tensor as a torch pickle describes it: shape and type, and where its numbers lie in which storage."""

    key: str
    numel: int  # of the storage
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Left:
    """What stood here and was left out, by the name of its class."""

    name: str


def command(mode: str, size: int) -> list[str]:
    """How the reading process is started."""
    return [sys.executable, "-I", "-S", str(CHILD), mode, str(MEMORY + 4 * size), str(SECONDS)]


def describe(data: bytes | memoryview, mode: str) -> tuple[list[Any], int]:
    """The values that `data` describes, and the offset behind them; `mode` as in `pickle_child`."""
    reply = memoryview(_ask(data, mode))
    try:
        length = int.from_bytes(reply[:8], "little")
        answer = json.loads(bytes(reply[8 : 8 + length]))
        if "refused" in answer:
            raise BadFileError(str(answer["refused"]))
        reader = _Reader(reply[8 + length :])
        return [reader.value(tree) for tree in answer["trees"]], int(answer["end"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise BadFileError("the process that read the pickle inside gave no answer: refused") from None


def _ask(data: bytes | memoryview, mode: str) -> bytes:
    """What the other process says; one that is ended by a limit, or by the file, is a refusal."""
    if not sys.executable:
        raise BadFileError("no Python is known that could read it in a process of its own; save it as .safetensors")
    try:
        child = subprocess.Popen(
            command(mode, len(data)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise BadFileError(
            f"no process could be started to read it safely ({error.strerror}); save it as .safetensors"
        ) from None
    assert child.stdin is not None
    assert child.stdout is not None
    clock = threading.Timer(WALL_SECONDS, child.kill)
    clock.start()
    try:
        try:
            child.stdin.write(data)
            child.stdin.close()
        except BrokenPipeError:  # it ended before it had read all: its exit code says why
            pass
        most = MAX_REPLY + (len(data) if mode == "arrays" else 0)
        reply = child.stdout.read(most + 1)
        if len(reply) > most:
            raise BadFileError("the values inside repeat one another without end")
        code = child.wait()
    finally:
        clock.cancel()
        child.kill()
        child.wait()
        child.stdout.close()
    if code == 0:
        return reply
    if code in (-getattr(signal, "SIGXCPU", 0), -signal.SIGKILL if hasattr(signal, "SIGKILL") else 1):
        raise BadFileError(f"reading it takes more than {SECONDS} s of processor time, or too much memory: refused")
    raise BadFileError(f"reading the pickle inside brings its reader down (code {code}): refused, nothing was executed")


class _Reader:
    """Descriptions become values; what the child checked is checked again, since it has seen the file."""

    def __init__(self, blobs: memoryview) -> None:
        self.blobs, self.at, self.number_keys = blobs, 0, 0

    def value(self, node: Any) -> Any:
        if not isinstance(node, list):
            return node
        kind, *rest = node
        if kind == "dict":
            return {self.key(key): self.value(item) for key, item in zip(rest[::2], rest[1::2], strict=True)}
        if kind == "list":
            return [self.value(item) for item in rest]
        if kind == "tuple":
            return tuple(self.value(item) for item in rest)
        if kind == "tensor":
            return stored(*rest)
        if kind == "bytes":
            return rest[0].encode("latin-1")
        if kind == "left":
            return Left(str(rest[0]))
        if kind == "array":
            return self.array(*rest)
        raise ValueError(kind)

    def key(self, node: Any) -> Any:
        if type(node) is int:
            self.number_keys += 1
            if self.number_keys > MAX_NUMBER_KEYS or abs(node) >= 2**61 - 1:
                raise BadFileError(f"more than {MAX_NUMBER_KEYS} numbers as keys, or huge ones: refused")
            return node
        found = self.value(node)
        if type(found) not in (str, bytes):
            raise BadFileError("a dict key in the pickle inside is no text")
        return found

    def array(self, code: str, shape: list[int], fortran: bool, length: int) -> np.ndarray:
        if code not in ("u1", "|u1", "i8", "<i8", "i4", "<i4"):
            raise BadFileError("an array in the pickle is not of plain integers")
        dtype, count = np.dtype(code).newbyteorder("<"), 1
        for n in shape:
            count *= n
        if len(shape) > 4 or not all(0 <= n < 2**32 for n in shape) or count * dtype.itemsize != length:
            raise BadFileError(f"an array of shape {tuple(shape)} in the pickle has {length} bytes")
        data, self.at = self.blobs[self.at : self.at + length], self.at + length
        return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def stored(dtype: str, key: str, numel: int, offset: int, size: list[int], stride: list[int]) -> Stored:
    """A tensor over a storage, all of whose elements lie inside it and none of which is repeated at length."""
    if not key.isalnum() or not key.isascii() or len(key) > 32:
        raise BadFileError(f"tensor data named {shown(key)}; torch.save numbers them")
    if not all(type(n) is int and 0 <= n < 2**44 for n in (numel, offset, *size, *stride)):
        raise BadFileError("a tensor in the pickle has no valid shape")
    if len(size) != len(stride) or len(size) > 8:
        raise BadFileError("a tensor in the pickle has more sizes than strides, or fewer")
    found = Stored(tuple(size), getattr(torch, dtype), key, numel, offset, tuple(stride))
    count = found.bytes // found.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if count else offset - 1
    if last >= numel:
        raise BadFileError(f"a tensor of shape {found.shape} reaches element {last} of tensor data that holds {numel}")
    if count > numel:
        size_told = size_text(found.bytes)
        raise BadFileError(f"a tensor of shape {found.shape} ({size_told}) repeats data of {numel} numbers")
    return found
