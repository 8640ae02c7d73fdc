"""The state of interrupted work: plain values and tensors in one safetensors file, whole or absent.

Metadata: `format` (what kind of state), `content` (the tree as JSON, tensors by number) and `sha256` over both and over
every tensor. One flipped bit, in whichever part, is refused when the file is read: a wrong state that looks right would
end in a wrong number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hessdiag.store.files import BadFileError, PathLike, parse_json, read_bytes, shown, write_bytes
from hessdiag.store.tensorfiles import looks_like, read_header, read_tensors

BUDGET = 1 << 36


def write_state(path: PathLike, kind: str, content: Any) -> None:
    """Write a tree of dicts, lists, tuples, tensors and plain values; a failure (BadFileError) leaves the old file."""
    tensors: list[Tensor] = []
    tree = json.dumps(_down(content, tensors))
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    meta = {"format": kind, "content": tree, "sha256": digest(*tensors, text=kind + tree)}
    write_bytes(path, save(named, metadata=meta))


def read_state(path: PathLike, kind: str, *, device: torch.device | str = "cpu") -> Any:
    """What `write_state` was given, tensors on `device`; BadFileError says what is wrong with the file."""
    data = read_bytes(path, budget=BUDGET, accepts=looks_like)
    facts, meta = read_header(data)
    told = meta.get("format", "")
    if told != kind:
        raise BadFileError(f"of format {shown(told)}, this program reads {kind}")
    found = read_tensors(data)
    if set(found) != {str(number) for number in range(len(facts))}:
        raise BadFileError("damaged: its tensors are not numbered")
    tensors = [found[str(number)] for number in range(len(found))]
    tree = meta.get("content", "")
    if digest(*tensors, text=kind + tree) != meta.get("sha256"):
        raise BadFileError("damaged: it is not what was written (its sha256 differs)")
    return _up(parse_json(tree.encode(), finite=False), [tensor.to(device) for tensor in tensors])


def digest(*tensors: Tensor, text: str = "") -> str:
    """SHA-256 of a text, and of shapes, dtypes and bytes."""
    total = hashlib.sha256(text.encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
        total.update(plain.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _down(value: Any, tensors: list[Tensor]) -> Any:
    """`value` for JSON: tables as pairs (their keys may be numbers), tuples marked, tensors as their number."""
    if isinstance(value, Tensor):
        # A clone: safetensors refuses tensors that share memory, and a view would write what it does not show.
        tensors.append(value.detach().cpu().clone(memory_format=torch.contiguous_format))
        order = torch.empty_like(value).stride()  # channels_last stays so: optimisers' sums depend on it
        return {"tensor": [len(tensors) - 1, None if order == tensors[-1].stride() else list(order)]}
    if isinstance(value, Mapping):
        return {"table": [[key, _down(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_down(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_down(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise BadFileError(f"a {type(value).__name__} cannot be stored: tensors and plain values only")


def _up(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, list):
        return [_up(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, item),) = value.items()
    if kind == "tensor":
        return _ordered(tensors[item[0]], item[1])
    if kind == "tuple":
        return tuple(_up(part, tensors) for part in item)
    return {key: _up(part, tensors) for key, part in item}


def _ordered(tensor: Tensor, stride: list[int] | None) -> Tensor:
    """The same numbers with these strides, which leave no hole."""
    if stride is None:
        return tensor
    if tensor.numel() != 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True)):
        raise BadFileError("damaged: a tensor's strides are not those of its shape")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
