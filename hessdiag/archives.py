"""A zip archive held in memory, checked before any of it is believed.

Only what `torch.save` and `numpy.savez` write is accepted: one disk, no encryption, stored or deflated
entries that neither overlap nor claim more than a budget. Names are never used as paths. (Format: PKWARE
APPNOTE 6.3.)
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from hessdiag.files import BadFileError, shown, size_text

MAX_ENTRIES = 25_000
MAX_NAME = 512
STORED, DEFLATED = 0, 8


@dataclass(frozen=True)
class Entry:
    """One file of an archive as its central directory describes it."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    start: int  # of the data


def entries(archive: bytes, *, budget: int, compressed: bool = False) -> dict[str, Entry]:
    """The entries by name; `compressed` says whether deflate is legitimate here; sizes must stay within
    `budget`.
    """
    try:
        found = _central_directory(archive)
    except (struct.error, IndexError, OverflowError):
        raise BadFileError("the zip directory is truncated or corrupt") from None
    table: dict[str, Entry] = {}
    total = 0
    for entry in found:
        if entry.name in table:
            raise BadFileError(f"the zip archive holds {shown(entry.name)} twice")
        if entry.method == DEFLATED and not compressed:
            raise BadFileError(
                f"zip entry {shown(entry.name)} is compressed ({size_text(entry.packed)} claiming "
                f"{size_text(entry.size)}): torch.save never compresses, a zip bomb does"
            )
        if entry.method not in (STORED, DEFLATED):
            raise BadFileError(f"zip entry {shown(entry.name)} uses compression method {entry.method}")
        if entry.method == STORED and entry.packed != entry.size:
            raise BadFileError(f"zip entry {shown(entry.name)} is stored but its two sizes differ")
        total += entry.size
        if total > budget:
            raise BadFileError(f"zip entries claim more than {size_text(budget)} once unpacked: a zip bomb")
        table[entry.name] = entry
    end = 0
    for entry in sorted(found, key=lambda e: e.start):
        if entry.start < end:
            raise BadFileError(f"zip entry {shown(entry.name)} overlaps another: a zip bomb")
        end = entry.start + entry.packed
    return table


def content(archive: bytes, entry: Entry) -> bytes:
    """The bytes of one entry, its length and checksum verified; never more than the entry declares."""
    packed = archive[entry.start : entry.start + entry.packed]
    if entry.method == STORED:
        data = packed
    else:
        engine = zlib.decompressobj(-15)
        try:
            data = engine.decompress(packed, entry.size + 1)
        except zlib.error:
            raise BadFileError(f"zip entry {shown(entry.name)} does not decompress") from None
    if len(data) != entry.size:
        raise BadFileError(f"zip entry {shown(entry.name)} holds {len(data)} bytes and declares {entry.size}")
    if zlib.crc32(data) != entry.crc:
        raise BadFileError(f"zip entry {shown(entry.name)} fails its checksum: the file is corrupt")
    return data


def _central_directory(archive: bytes) -> list[Entry]:
    at = archive.rfind(b"PK\x05\x06", max(0, len(archive) - 65_557))
    if at < 0:
        raise BadFileError("a zip archive without its directory: the file is truncated")
    disk, start_disk, here, count, length, offset, _ = struct.unpack_from("<HHHHIIH", archive, at + 4)
    if disk or start_disk or here != count:
        raise BadFileError("a zip archive in several parts")
    end = at
    if 0xFFFF in (count,) or 0xFFFFFFFF in (length, offset) or archive[at - 20 : at - 16] == b"PK\x06\x07":
        locator = at - 20
        if locator < 0 or archive[locator : locator + 4] != b"PK\x06\x07":
            raise BadFileError("the zip directory is truncated or corrupt")
        _, end, _ = struct.unpack_from("<IQI", archive, locator + 4)
        if end + 56 > len(archive) or archive[end : end + 4] != b"PK\x06\x06":
            raise BadFileError("the zip directory is truncated or corrupt")
        count, length, offset = struct.unpack_from("<QQQ", archive, end + 32)
    if count > MAX_ENTRIES or length > count * (46 + 2 * MAX_NAME):
        raise BadFileError(
            f"the zip directory claims {count} entries in {size_text(length)}: more than any checkpoint"
        )
    if offset + length != end:
        raise BadFileError(
            "the zip directory is not where the archive says: the file is truncated or was tampered with"
        )
    found = []
    for _ in range(count):
        entry, offset = _entry(archive, offset, end)
        found.append(entry)
    if offset != end:
        raise BadFileError("the zip directory holds more than it declares")
    return found


def _entry(archive: bytes, offset: int, end: int) -> tuple[Entry, int]:
    """The directory entry at `offset` and where the next one begins."""
    if archive[offset : offset + 4] != b"PK\x01\x02":
        raise BadFileError("the zip directory is truncated or corrupt")
    flags, method = struct.unpack_from("<HH", archive, offset + 8)
    crc, packed, size, names, extras, comments = struct.unpack_from("<IIIHHH", archive, offset + 16)
    (local,) = struct.unpack_from("<I", archive, offset + 42)
    body = offset + 46
    follow = body + names + extras + comments
    if follow > end or names > MAX_NAME:
        raise BadFileError("a zip entry's name is absurdly long or runs out of the directory")
    try:
        name = archive[body : body + names].decode("utf-8")
    except UnicodeDecodeError:
        raise BadFileError("a zip entry's name is not UTF-8") from None
    if flags & 0x41:
        raise BadFileError(f"zip entry {shown(name)} is encrypted")
    at, stop = body + names, body + names + extras
    while at + 4 <= stop:
        tag, width = struct.unpack_from("<HH", archive, at)
        if tag == 1:  # zip64: 8-byte values, in this order, for those fields that are full of ones
            value = at + 4
            if size == 0xFFFFFFFF:
                (size,), value = struct.unpack_from("<Q", archive, value), value + 8
            if packed == 0xFFFFFFFF:
                (packed,), value = struct.unpack_from("<Q", archive, value), value + 8
            if local == 0xFFFFFFFF:
                (local,), value = struct.unpack_from("<Q", archive, value), value + 8
        at += 4 + width
    if archive[local : local + 4] != b"PK\x03\x04":
        raise BadFileError(f"zip entry {shown(name)} points nowhere: the file is truncated or corrupt")
    local_names, local_extras = struct.unpack_from("<HH", archive, local + 26)
    if archive[local + 30 : local + 30 + local_names] != archive[body : body + names]:
        raise BadFileError(f"zip entry {shown(name)} has another name in its own header")
    start = local + 30 + local_names + local_extras
    if start + packed > len(archive):
        raise BadFileError(f"zip entry {shown(name)} claims {size_text(packed)}, more than the file holds")
    return Entry(name, method, crc, packed, size, start), follow
