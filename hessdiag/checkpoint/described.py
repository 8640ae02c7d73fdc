"""Tensors as a torch pickle describes them: storage, offset, shape and strides, checked while it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hessdiag import picklerules
from hessdiag.files import BadFileError, shown, size_text
from hessdiag.tensorfiles import TensorFacts

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_NAMES = {*STORAGES, *_REBUILD, "torch._utils._rebuild_parameter", "collections.OrderedDict", "torch.Size"}


@dataclass(frozen=True)
class Storage:
    """A block of numbers that the pickle refers to."""

    key: str
    dtype: torch.dtype
    numel: int


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict: the only object here that may carry attributes."""


def wrong_size(storage: Storage, held: int) -> BadFileError:
    """The refusal of tensor data that is not as long as the pickle says."""
    claimed = storage.numel * storage.dtype.itemsize
    return BadFileError(
        f"tensor data {shown(storage.key)} claims {size_text(claimed)}, the file holds {size_text(held)}"
    )


class TensorReader:
    """Descriptions of storages and tensors, collected while the pickle is read."""

    def __init__(self, *, legacy: bool) -> None:
        self.legacy = legacy
        self.storages: dict[str, Storage] = {}
        self.tensor_bytes = 0
        self.rules = picklerules.Rules(
            opcodes=picklerules.TORCH_OPCODES,
            names=_NAMES.__contains__,
            call=self.call,
            build=self.build,
            persistent=self.persistent,
            text=True,
        )

    def persistent(self, reference: Any) -> Storage:
        """A storage: ('storage', type, key, location, numel), and None in the old format (no view)."""
        length = 6 if self.legacy else 5
        if not isinstance(reference, tuple) or len(reference) != length or reference[0] != "storage":
            raise BadFileError("the pickle refers to something that is no tensor data")
        _, kind, key, location, numel = reference[:5]
        if not isinstance(kind, picklerules.Global) or kind.name not in STORAGES:
            raise BadFileError("tensor data of an unknown type")
        if not isinstance(key, str) or not key.isalnum() or not key.isascii() or len(key) > 32:
            raise BadFileError(f"tensor data named {shown(key)}; torch.save numbers them")
        if not isinstance(location, str) or type(numel) is not int or not 0 <= numel < 2**44:
            raise BadFileError("tensor data of no valid size")
        if self.legacy and reference[5] is not None:
            raise BadFileError("views of storages, as torch wrote before 0.4; save it again with a current torch")
        storage = Storage(key, STORAGES[kind.name], numel)
        if self.storages.setdefault(key, storage) != storage:
            raise BadFileError(f"tensor data {shown(key)} is described in two ways")
        return storage

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What `name(*arguments)` would make."""
        if name == "collections.OrderedDict":
            return _ordered(arguments)
        if name in _REBUILD:
            return self.tensor(arguments, 4 if name.endswith("_rebuild_tensor") else 6)
        first: Any = arguments[0] if arguments else None
        plain = len(arguments) == 3 and type(arguments[1]) is bool and arguments[2] == {}
        if name == "torch._utils._rebuild_parameter" and plain and isinstance(first, TensorFacts):
            return first
        sizes = name == "torch.Size" and len(arguments) == 1 and isinstance(first, (list, tuple))
        if sizes and all(type(n) is int for n in first):
            return tuple(first)
        raise BadFileError(f"the pickle calls {shown(name)} in a way torch.save does not: refused")

    def tensor(self, arguments: tuple[Any, ...], expected: int) -> TensorFacts:
        """A tensor over a storage, all of whose elements lie inside it and none of which is repeated at
        length.
        """
        storage, offset, size, stride = arguments[:4] if len(arguments) >= 4 else (None,) * 4
        if len(arguments) != expected or not isinstance(storage, Storage):
            raise BadFileError("a tensor in the pickle is described in a way torch.save does not")
        if expected == 6 and (type(arguments[4]) is not bool or arguments[5] != {}):
            raise BadFileError("a tensor in the pickle carries hooks: refused")
        for numbers in (size, stride, (offset,)):
            if not isinstance(numbers, tuple) or len(numbers) > 8:
                raise BadFileError("a tensor in the pickle has no valid shape")
            if not all(type(n) is int and 0 <= n < 2**44 for n in numbers):
                raise BadFileError("a tensor in the pickle has no valid shape")
        if len(size) != len(stride):
            raise BadFileError("a tensor in the pickle has more sizes than strides, or fewer")
        facts, numel = TensorFacts(size, storage.dtype), math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if numel else offset - 1
        if last >= storage.numel:
            raise BadFileError(
                f"a tensor of shape {size} reaches element {last} of tensor data that holds {storage.numel}"
            )
        if numel > storage.numel:
            raise BadFileError(
                f"a tensor of shape {size} ({size_text(facts.bytes)}) repeats data of {storage.numel} numbers"
            )
        self.tensor_bytes += facts.bytes
        return facts

    def build(self, target: Any, state: Any) -> None:
        """Accept what a state dict carries beside its items, and nothing that could hide a dict's own
        methods.
        """
        if not isinstance(target, _Ordered) or not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise BadFileError("the pickle sets the state of an object that is no state dict: refused")

    def check_total(self) -> None:
        """Refuse tensors that together repeat the stored data many times over."""
        stored = sum(s.numel * s.dtype.itemsize for s in self.storages.values())
        if self.tensor_bytes > 4 * stored + 2**20:
            raise BadFileError(f"tensors of {size_text(self.tensor_bytes)} over {size_text(stored)} of data: refused")


def _ordered(arguments: tuple[Any, ...]) -> _Ordered:
    """OrderedDict() or, as Python 2 wrote it, OrderedDict([[key, value], ...])."""
    table = _Ordered()
    if arguments:
        pairs = arguments[0]
        if len(arguments) != 1 or not isinstance(pairs, list):
            raise BadFileError("an OrderedDict in the pickle is made of no pairs")
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadFileError("an OrderedDict in the pickle is made of no pairs")
            table[picklerules.plain_key(pair[0])] = pair[1]
    return table
