"""A zip archive held in memory: its directory by `zipfile`, its contents by their checksums, nothing by trust.

Entries that a caller reads are stored or, where it says so, deflated within a budget. Names are never used as paths.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from hessdiag.store.files import BadFileError, shown, size_text

MAX_ENTRIES = 25_000
MAX_NAME = 512
MAX_RATIO = 100
"""Deflated data may grow this much: images and labels do so by less than 10, a bomb by 1,000."""
SMALL = 64 * 2**20
"""Data of up to this size may grow as they like: a mask of zeros is no bomb."""


def entries(archive: bytes) -> dict[str, zipfile.ZipInfo]:
    """The entries by name. Each begins with a signature, so that counting those bounds the work of the directory."""
    if archive.count(b"PK\x01\x02") > MAX_ENTRIES:
        raise BadFileError(f"the zip directory claims more than {MAX_ENTRIES} entries: more than any checkpoint")
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            found = opened.infolist()
    except Exception as error:  # BadZipFile, NotImplementedError, struct.error, ValueError, ...
        raise BadFileError(f"the zip directory is truncated or corrupt ({shown(str(error))})") from None
    table = {entry.filename: entry for entry in found}
    if len(table) < len(found):
        raise BadFileError("the zip archive holds two entries of one name")
    if any(len(name) > MAX_NAME for name in table):
        raise BadFileError("a zip entry's name is absurdly long")
    end = 0
    for entry in sorted(found, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise BadFileError(f"zip entry {shown(entry.filename)} overlaps another: a zip bomb")
        end = entry.header_offset + 30 + entry.compress_size
    return table


def content(archive: bytes, entry: zipfile.ZipInfo, *, deflated: bool = False) -> memoryview:
    """The bytes of one entry, their length and checksum verified; without a copy where they are stored."""
    name, start = shown(entry.filename), entry.header_offset
    if entry.flag_bits & 0x41:
        raise BadFileError(f"zip entry {name} is encrypted")
    head = archive[start : start + 30] if start >= 0 else b""
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise BadFileError(f"zip entry {name} points nowhere: the file is truncated or corrupt")
    start += 30 + sum(struct.unpack_from("<HH", head, 26))
    data = memoryview(archive)[start : start + entry.compress_size]
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        if not deflated:
            raise BadFileError(
                f"zip entry {name} is compressed ({size_text(entry.compress_size)} claiming "
                f"{size_text(entry.file_size)}): torch.save never compresses, a zip bomb does"
            )
        if entry.file_size > max(SMALL, MAX_RATIO * len(data)):
            raise BadFileError(
                f"zip entry {name} of {size_text(len(data))} claims {size_text(entry.file_size)} once unpacked: a zip "
                "bomb; if it is none, save it by numpy.savez, uncompressed"
            )
        try:
            data = memoryview(zlib.decompressobj(-15).decompress(data, entry.file_size + 1))
        except zlib.error:
            raise BadFileError(f"zip entry {name} does not decompress") from None
    elif entry.compress_type != zipfile.ZIP_STORED:
        raise BadFileError(f"zip entry {name} uses compression method {entry.compress_type}")
    if len(data) != entry.file_size:
        raise BadFileError(f"zip entry {name} holds {len(data)} bytes and declares {entry.file_size}")
    if zlib.crc32(data) != entry.CRC:
        raise BadFileError(f"zip entry {name} fails its checksum: the file is corrupt")
    return data
