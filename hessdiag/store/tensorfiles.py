"""The header of a safetensors file, checked word by word before the library maps any of it.

Layout (huggingface/safetensors, README "Format"): 8 bytes of header length, little-endian; that much JSON,
tensor name to {dtype, shape, data_offsets} plus "__metadata__" of strings; then the data, without holes.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from hessdiag.store.files import BadFileError, shown, size_text

MAX_HEADER = 8 * 2**20
MAX_TENSORS = 20_000
MAX_KEY = 512
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorFacts:
    """Shape and type of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def looks_like(head: bytes) -> bool:
    """Does a file that begins so claim to be safetensors?"""
    return len(head) >= 9 and head[8:9] == b"{"


def header_length(head: bytes, size: int) -> int:
    """The length that a file of `size` bytes declares for its header, refused if it cannot be true."""
    if len(head) < 10:
        raise BadFileError("a safetensors file too short for its header")
    (length,) = struct.unpack_from("<Q", head)
    if length > size - 8:
        raise BadFileError(f"the safetensors header claims {length} bytes, the file has {size}")
    if length > MAX_HEADER:
        raise BadFileError(f"the safetensors header claims {size_text(length)}; the limit is {size_text(MAX_HEADER)}")
    return int(length)


def read_header(data: bytes) -> tuple[dict[str, TensorFacts], dict[str, str]]:
    """Tensors and metadata that a safetensors file declares, refused unless they account for every byte of
    it.
    """
    length = header_length(data, len(data))
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_repeats)
    except RecursionError:
        raise BadFileError("the safetensors header is nested too deeply") from None
    except ValueError:  # JSON and UTF-8 errors, and integers of thousands of digits
        raise BadFileError("the safetensors header is no JSON") from None
    if not isinstance(header, dict):
        raise BadFileError("the safetensors header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFileError("the safetensors metadata holds more than strings")
    if len(header) > MAX_TENSORS:
        raise BadFileError(f"{len(header)} tensors; the limit is {MAX_TENSORS}")
    spans = []
    tensors = {}
    for name, entry in header.items():
        check_key(name)
        tensors[name], begin, end = _tensor(name, entry)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise BadFileError(f"tensor {shown(name)} overlaps another or leaves a hole in the file")
        at = end
    if at != len(data) - 8 - length:
        raise BadFileError(f"tensors claim {at} bytes, the file holds {len(data) - 8 - length}")
    return tensors, metadata


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header was checked."""
    try:
        return dict(safetensors.torch.load(data))
    except Exception as error:  # the library's own class and several of Python's
        raise BadFileError(f"safetensors cannot read it ({shown(str(error), 80)})") from None


def check_key(name: object) -> str:
    """`name` if it can be the name of a tensor: text of sane length without controls or steps through
    folders.
    """
    if not isinstance(name, str):
        raise BadFileError(f"a tensor key of type {type(name).__name__}, where names belong")
    if not name or len(name) > MAX_KEY:
        raise BadFileError(f"a tensor key of {len(name)} characters; the limit is {MAX_KEY}")
    if not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        # Legitimate keys are attribute paths; ours for averaged weights use a colon.
        raise BadFileError(f"tensor key {shown(name)} is no attribute path (controls, slashes or '..')")
    return name


def _tensor(name: str, entry: Any) -> tuple[TensorFacts, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadFileError(f"tensor {shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFileError(f"tensor {shown(name)} has type {shown(dtype)}; known: {', '.join(DTYPES)}")
    if not (isinstance(shape, list) and len(shape) <= 8 and all(_is_count(n) for n in shape)):
        raise BadFileError(f"tensor {shown(name)} has no valid shape")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(n) for n in offsets)):
        raise BadFileError(f"tensor {shown(name)} has no valid data_offsets")
    facts = TensorFacts(tuple(shape), DTYPES[dtype])
    begin, end = offsets
    if end - begin != facts.bytes:
        raise BadFileError(
            f"tensor {shown(name)} of shape {tuple(shape)} needs {size_text(facts.bytes)}, "
            f"the file gives it {max(end - begin, 0)} bytes"
        )
    return facts, begin, end


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("repeated key")
    return table
