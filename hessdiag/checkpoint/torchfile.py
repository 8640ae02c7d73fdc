"""What a file of `torch.save` holds, known before `torch.load` is allowed to see it.

The pickle inside is read by an interpreter whose values are inert (`hessdiag.pickles`), so that every
tensor's storage, offset, shape and strides are checked against the bytes that are really there. Only then
does `torch.load(weights_only=True)` make tensors: from the same bytes, and for zip files from an archive
rebuilt out of the checked records, since two zip readers may disagree about a crafted file.
"""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hessdiag import archives, picklerules, pickles
from hessdiag.checkpoint.described import Storage, TensorReader, wrong_size
from hessdiag.files import BadFileError, shown, size_text

MAX_PICKLE = 32 * 2**20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


@dataclass
class Parsed:
    """A torch file understood: its values with TensorFacts for tensors, and what to hand to torch.load."""

    kind: str
    tree: Any
    payload: Callable[[], bytes]
    storages: dict[str, Storage] = field(default_factory=dict)


def is_zip(head: bytes) -> bool:
    """Does a file that begins so claim to be a zip archive?"""
    return head[:4] == b"PK\x03\x04"


def is_legacy(head: bytes) -> bool:
    """Does a file that begins so claim to be a pickle, as torch.save wrote before version 1.6?"""
    return len(head) > 2 and head[0] == 0x80 and head[1] <= 5


def parse(data: bytes) -> Parsed:
    """What the file holds; refuses whatever is not tensors and plain values."""
    return _parse_zip(data) if is_zip(data) else _parse_legacy(data)


def materialise(parsed: Parsed) -> Any:
    """The same values with real tensors, made by torch.load(weights_only=True)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(parsed.payload()), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # RuntimeError, UnpicklingError, EOFError, KeyError, ...: any is a refusal
        raise BadFileError(f"torch.load refuses it ({type(error).__name__}: {shown(str(error), 80)})") from None


def _parse_zip(data: bytes) -> Parsed:
    table = archives.entries(data, budget=len(data))
    pickled = [name for name in table if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise BadFileError("a zip archive that torch.save did not write (it holds no data.pkl)")
    root = pickled[0][: -len("data.pkl")]
    if f"{root}constants.pkl" in table:
        raise BadFileError("a TorchScript archive holds code: save model.state_dict() with torch.save instead")
    for name in table:
        if ".." in name or "\\" in name or not name.isprintable() or not name.startswith(root):
            raise BadFileError(f"zip entry {shown(name)} is none that torch.save writes")
    if f"{root}byteorder" in table and archives.content(data, table[f"{root}byteorder"]) != b"little":
        raise BadFileError("written on a big-endian machine; save it again on a little-endian one")
    if table[pickled[0]].size > MAX_PICKLE:
        raise BadFileError(
            f"the pickle inside has {size_text(table[pickled[0]].size)}; the limit is {size_text(MAX_PICKLE)}"
        )
    pickle_bytes = archives.content(data, table[pickled[0]])
    reader = TensorReader(legacy=False)
    tree, end = pickles.read(pickle_bytes, reader.rules)
    if end != len(pickle_bytes):
        raise BadFileError("bytes behind the end of the pickle inside")
    records = {}
    for key, storage in reader.storages.items():
        entry = table.get(f"{root}data/{key}")
        if entry is None:
            raise BadFileError(f"the tensor data {shown(key)} is missing from the archive")
        if entry.size != storage.numel * storage.dtype.itemsize:
            raise wrong_size(storage, entry.size)
        archives.content(data, entry)  # for its checksum
        records[key] = entry
    reader.check_total()
    return Parsed("torch zip", tree, partial(_rebuilt, data, pickle_bytes, records), reader.storages)


def _rebuilt(data: bytes, pickle_bytes: bytes, records: Mapping[str, archives.Entry]) -> bytes:
    """An archive of nothing but the checked records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle_bytes)
        archive.writestr("archive/byteorder", "little")
        for key, entry in records.items():
            archive.writestr(f"archive/data/{key}", archives.content(data, entry))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _parse_legacy(data: bytes) -> Parsed:
    """Five pickles (magic, version, machine, object, storage keys), then each storage with its length."""
    plain = picklerules.Rules(
        opcodes=picklerules.TORCH_OPCODES, names=lambda _: False, call=_no_call, build=_no_call, text=True
    )
    magic, at = pickles.read(data, plain)
    if magic != LEGACY_MAGIC:
        raise BadFileError("a pickle that torch.save did not write: refused, nothing was executed")
    version, at = pickles.read(data, plain, at)
    machine, at = pickles.read(data, plain, at)
    if version != LEGACY_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise BadFileError("an old torch file of another version or byte order; save it again with a current torch")
    reader = TensorReader(legacy=True)
    tree, at = pickles.read(data, reader.rules, at)
    keys, at = pickles.read(data, plain, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise BadFileError("the old torch file's list of storages is corrupt")
    if sorted(keys) != sorted(reader.storages):
        raise BadFileError("the old torch file lists other storages than its tensors use")
    for key in keys:
        storage = reader.storages[key]
        if at + 8 > len(data):
            raise BadFileError("truncated: the data of some tensors is missing")
        (numel,) = struct.unpack_from("<q", data, at)
        at += 8 + storage.numel * storage.dtype.itemsize
        if numel != storage.numel or at > len(data):
            raise wrong_size(storage, max(len(data) - (at - storage.numel * storage.dtype.itemsize), 0))
    if at != len(data):
        raise BadFileError(f"{len(data) - at} bytes behind the last tensor")
    reader.check_total()
    return Parsed("torch legacy", tree, lambda: data, reader.storages)


def _no_call(*_: Any) -> Any:
    raise BadFileError("a call where the file's header belongs: refused, nothing was executed")
