"""The published batch files of CIFAR become arrays; the python layout is pickled, and is read without
unpickling.
"""

from __future__ import annotations

import numpy as np

from hessdiag.data.published import Source
from hessdiag.store import pickled
from hessdiag.store.files import BadFileError, shown

PIXELS = 3 * 32 * 32


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


def _parse_python(data: bytes, source: Source) -> tuple[np.ndarray, np.ndarray]:
    (table,), _ = pickled.describe(data, "arrays")
    if not isinstance(table, dict):
        raise BadFileError("no CIFAR batch: the pickle holds no dict")
    table = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in table.items()}
    pixels, labels = table.get("data"), table.get(source.label_key)
    if not isinstance(pixels, np.ndarray) or labels is None:
        held = ", ".join(f"{shown(key)} ({getattr(table[key], 'name', 'plain')})" for key in list(table)[:6])
        raise BadFileError(f"no batch of {source.name}: wants 'data' and {source.label_key!r}, holds {held}")
    if isinstance(labels, np.ndarray):
        labels = labels.reshape(-1).tolist()
    if not isinstance(labels, list) or not all(type(x) is int and 0 <= x < 256 for x in labels):
        raise BadFileError(f"{source.label_key!r} is no list of class numbers")
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise BadFileError(f"'data' is no uint8 array [N, {PIXELS}]")
    if len(pixels) != len(labels):
        raise BadFileError(f"{len(pixels)} images and {len(labels)} labels")
    return np.array(pixels), np.array(labels, dtype=np.uint8)
