"""The published batch files of CIFAR become arrays; the python layout is pickled, and is read without
unpickling.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hessdiag import picklerules, pickles
from hessdiag.data.registry import Source
from hessdiag.files import BadFileError, shown

PIXELS = 3 * 32 * 32
_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NAMES = {*_RECONSTRUCT, "numpy.ndarray", "numpy.dtype", "_codecs.encode"}


def parse(data: bytes, kind: str, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and class numbers int64 [N] from one batch file of that kind."""
    pixels, labels = (_parse_binary if kind == "binary" else _parse_python)(data, source)
    if not len(labels):
        raise BadFileError("no images")
    if int(labels.max()) >= source.num_classes:
        raise BadFileError(
            f"class {int(labels.max())} among {source.num_classes} classes: another data set, or damaged"
        )
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _parse_binary(data: bytes, source: Source) -> tuple[np.ndarray, np.ndarray]:
    record = source.label_bytes + PIXELS
    if len(data) % record:
        raise BadFileError(f"{len(data)} bytes are no whole number of records of {record}")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    return rows[:, source.label_bytes :].copy(), rows[:, source.label_bytes - 1]


class _Array:
    """What the pickle says of a numpy array."""

    values: np.ndarray | None = None


class _Type:
    """What the pickle says of a dtype."""

    def __init__(self, code: str) -> None:
        self.code = code


def _parse_python(data: bytes, source: Source) -> tuple[np.ndarray, np.ndarray]:
    rules = picklerules.Rules(opcodes=picklerules.MODERN_OPCODES, names=_NAMES.__contains__, call=_call, build=_build)
    table, _ = pickles.read(data, rules)
    if not isinstance(table, dict):
        raise BadFileError("no CIFAR batch: the pickle holds no dict")
    table = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in table.items()}
    pixels, labels = table.get("data"), table.get(source.label_key)
    if not isinstance(pixels, _Array) or labels is None:
        held = ", ".join(shown(key) for key in list(table)[:6])
        raise BadFileError(f"no batch of {source.name}: wants 'data' and {source.label_key!r}, holds {held}")
    if isinstance(labels, _Array):
        labels = [] if labels.values is None else labels.values.reshape(-1).tolist()
    if not isinstance(labels, list) or not all(type(x) is int and 0 <= x < 256 for x in labels):
        raise BadFileError(f"{source.label_key!r} is no list of class numbers")
    images = pixels.values
    if images is None or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != PIXELS:
        raise BadFileError(f"'data' is no uint8 array [N, {PIXELS}]")
    if len(images) != len(labels):
        raise BadFileError(f"{len(images)} images and {len(labels)} labels")
    return np.ascontiguousarray(images), np.array(labels, dtype=np.uint8)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    if name in _RECONSTRUCT:
        return _Array()
    if name == "numpy.dtype" and arguments and isinstance(arguments[0], (str, bytes)):
        code = arguments[0]
        return _Type(code.decode("latin-1") if isinstance(code, bytes) else code)
    if name == "_codecs.encode" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
        # How Python 3 writes bytes in protocol 2.
        try:
            return arguments[0].encode("latin-1")
        except UnicodeEncodeError:
            raise BadFileError("bytes in the pickle are not bytes") from None
    raise BadFileError(f"the pickle calls {shown(name)} in a way no CIFAR batch does: refused, nothing was executed")


def _build(target: Any, state: Any) -> None:
    """Give an array its state (version, shape, dtype, column-major, bytes), which must agree with itself."""
    if isinstance(target, _Type):
        return  # byte order and alignment; only one-byte types and small integers are read, checked below
    if not isinstance(target, _Array) or not isinstance(state, tuple) or len(state) != 5:
        raise BadFileError("the pickle sets the state of something that is no array")
    _, shape, kind, column_major, content = state
    if not isinstance(kind, _Type) or kind.code not in ("u1", "|u1", "i8", "<i8", "i4", "<i4"):
        raise BadFileError("an array in the pickle is not of plain integers")
    dtype = np.dtype(kind.code).newbyteorder("<")
    if not isinstance(content, bytes) or not isinstance(shape, tuple):
        raise BadFileError("an array in the pickle has no bytes or no shape")
    if not all(type(n) is int and 0 <= n < 2**32 for n in shape) or len(shape) > 4:
        raise BadFileError("an array in the pickle has no valid shape")
    count = 1
    for n in shape:
        count *= n
    if count * dtype.itemsize != len(content):
        raise BadFileError(f"an array of shape {shape} in the pickle has {len(content)} bytes")
    target.values = np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if column_major else "C")
