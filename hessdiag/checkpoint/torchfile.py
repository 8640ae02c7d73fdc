"""What a file of `torch.save` holds: its pickle described by another process, its tensors made from checked bytes.

The description (`hessdiag.store.pickled`) says of every tensor its storage, offset, shape and strides; these are
checked against the bytes that are really there, and the bytes against their checksum. `torch.load` sees none of it.

A TorchScript archive (torch.jit.save) is such a zip with code beside the pickle. Its entries of code, which alone are
compressed, are never unpacked: the tensors are the attributes of its modules, named by the way to them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.store import pickled, zips
from hessdiag.store.files import BadFileError, shown, size_text
from hessdiag.store.pickle_child import LEGACY_MAGIC
from hessdiag.store.pickled import MAX_PICKLE, Stored
from hessdiag.store.tensorfiles import MAX_KEY

LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class Parsed:
    """A torch file understood: its values with Stored for tensors, and the bytes of every storage."""

    kind: str
    tree: Any
    storages: Mapping[str, memoryview]


def is_zip(head: bytes) -> bool:
    """Does a file that begins so claim to be a zip archive?"""
    return head[:4] == b"PK\x03\x04"


def is_legacy(head: bytes) -> bool:
    """Does a file that begins so claim to be a pickle, as torch.save wrote before version 1.6?"""
    return len(head) > 2 and head[0] == 0x80 and head[1] <= 5


def parse(data: bytes) -> Parsed:
    """What the file holds; refuses what is damaged or made to hurt."""
    return _parse_zip(data) if is_zip(data) else _parse_legacy(data)


def tensors(parsed: Parsed, table: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Those tensors themselves; a storage that several share is made once."""
    made: dict[str, Tensor] = {}
    found = {}
    for name, facts in table.items():
        if facts.key not in made:
            data = bytearray(parsed.storages[facts.key])
            made[facts.key] = torch.frombuffer(data, dtype=facts.dtype) if data else torch.empty(0, dtype=facts.dtype)
        found[name] = made[facts.key].as_strided(facts.shape, facts.stride, facts.offset)
    return found


def _parse_zip(data: bytes) -> Parsed:
    table = zips.entries(data)
    described = [name for name in table if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(described) != 1:
        raise BadFileError(_other_zip(table))
    root = described[0][: -len("data.pkl")]
    script = f"{root}constants.pkl" in table
    for name in table:
        if ".." in name or "\\" in name or not name.isprintable() or not name.startswith(root):
            raise BadFileError(f"zip entry {shown(name)} is none that torch.save writes")
    if f"{root}byteorder" in table and bytes(zips.content(data, table[f"{root}byteorder"])) != b"little":
        raise BadFileError("written on a big-endian machine; save it again on a little-endian one")
    inside = zips.content(data, table[described[0]])
    if len(inside) > MAX_PICKLE:
        raise BadFileError(f"the pickle inside has {size_text(len(inside))}; the limit is {size_text(MAX_PICKLE)}")
    (tree,), end = pickled.describe(inside, "script" if script else "zip")
    if end != len(inside):
        raise BadFileError("bytes behind the end of the pickle inside")
    storages = {}
    for key, facts in _storages(tree).items():
        entry = table.get(f"{root}data/{key}")
        if entry is None:
            raise BadFileError(f"the tensor data {shown(key)} is missing from the archive")
        if entry.file_size != facts.numel * facts.dtype.itemsize:
            raise _wrong_size(facts, entry.file_size)
        storages[key] = zips.content(data, entry)
    if script:
        return Parsed("TorchScript", _attributes(tree), storages)
    return Parsed("torch zip", tree, storages)


def _other_zip(table: Mapping[str, Any]) -> str:
    """What a zip archive without data.pkl is, and what to do with it."""
    if any(name.endswith(".npy") for name in table):
        return "an .npz of arrays, no checkpoint: data are given by --data npz:PATH"
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in table):
        return "an exported program (torch.export): save model.state_dict() with torch.save instead"
    return "a zip archive that torch.save did not write (it holds no data.pkl)"


def _attributes(tree: Any) -> dict[str, Any]:
    """Every tensor of a script module by the path of attributes to it, as its state dict names it."""
    found: dict[str, Any] = {}
    todo = [("", tree)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            if len(path) > MAX_KEY:  # before it is written again for each of its attributes
                raise BadFileError("a name in the TorchScript archive is absurdly long")
            todo.extend((f"{path}.{key}" if path else str(key), item) for key, item in reversed(value.items()))
        elif isinstance(value, Stored):
            if path in found:
                raise BadFileError(f"two attributes of the TorchScript archive are called {shown(path)}")
            found[path] = value
    if not found:
        raise BadFileError(
            "a TorchScript archive without tensors of its own (a frozen one keeps them inside its code): save "
            "model.state_dict() of the module it was made from with torch.save"
        )
    return found


def _parse_legacy(data: bytes) -> Parsed:
    """Five pickles (magic, version, machine, object, storage keys), then each storage with its length."""
    trees, at = pickled.describe(memoryview(data)[:MAX_PICKLE], "legacy")
    if trees[0] != LEGACY_MAGIC:
        raise BadFileError("a pickle that torch.save did not write: refused, nothing was executed")
    _, version, machine, tree, keys = trees
    if version != LEGACY_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise BadFileError("an old torch file of another version or byte order; save it again with a current torch")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise BadFileError("the old torch file's list of storages is corrupt")
    wanted, storages = _storages(tree), {}
    if sorted(keys) != sorted(wanted):
        raise BadFileError("the old torch file lists other storages than its tensors use")
    for key in keys:
        facts = wanted[key]
        if at + 8 > len(data):
            raise BadFileError("truncated: the data of some tensors is missing")
        (numel,) = struct.unpack_from("<q", data, at)
        begin, at = at + 8, at + 8 + facts.numel * facts.dtype.itemsize
        if numel != facts.numel or at > len(data):
            raise _wrong_size(facts, len(data) - begin)
        storages[key] = memoryview(data)[begin:at]
    if at != len(data):
        raise BadFileError(f"{len(data) - at} bytes behind the last tensor")
    return Parsed("torch legacy", tree, storages)


def _storages(tree: Any) -> dict[str, Stored]:
    """One tensor for every storage; refuses those that contradict each other or together repeat the data."""
    found: dict[str, Stored] = {}
    total = 0
    for facts in _all_stored(tree):
        total += facts.bytes
        other = found.setdefault(facts.key, facts)
        if (other.dtype, other.numel) != (facts.dtype, facts.numel):
            raise BadFileError(f"tensor data {shown(facts.key)} is described in two ways")
    held = sum(facts.numel * facts.dtype.itemsize for facts in found.values())
    if total > 4 * held + 2**20:
        raise BadFileError(f"tensors of {size_text(total)} over {size_text(held)} of data: refused")
    return found


def _all_stored(tree: Any) -> Iterator[Stored]:
    todo = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, Stored):
            yield value
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, (list, tuple)):
            todo.extend(value)


def _wrong_size(facts: Stored, held: int) -> BadFileError:
    claimed = size_text(facts.numel * facts.dtype.itemsize)
    return BadFileError(f"tensor data {shown(facts.key)} claims {claimed}, the file holds {size_text(held)}")
