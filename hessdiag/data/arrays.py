"""Arrays out of .npz and .safetensors files."""

from __future__ import annotations

import io
from pathlib import Path
from zipfile import ZipInfo

import numpy as np
import torch
from torch import Tensor

from hessdiag.data.dataset import DataSet
from hessdiag.data.named import COUNT, Arrays, NamedDataSet, of_table
from hessdiag.errors import DataError
from hessdiag.store import tensorfiles, zips
from hessdiag.store.files import BadFileError, read_bytes, size_text

FILE_BUDGET = 8 * 2**30
MAX_NPY_HEADER = 1 << 16
MAX_UNPACKED = 4 * zips.SMALL
"""What all arrays of a small file may grow to together."""


def load_npz(path: Path, name: str, arrays: Arrays) -> DataSet | NamedDataSet:
    """A data set from arrays of an .npz, those that `arrays` says or their names; pickles are refused."""
    try:
        data = read_bytes(path, budget=FILE_BUDGET)
        if data[:6] == b"\x93NUMPY":
            raise BadFileError(
                "one array (.npy); numpy.savez('data.npz', inputs=..., targets=...) makes what npz: reads"
            )
        table = zips.entries(data)
        if table and not any(key.endswith(".npy") for key in table):
            raise BadFileError("a zip archive without arrays: a checkpoint? npz: reads what numpy.savez writes")
        which = arrays.choose([key[:-4] for key in table if key.endswith(".npy")], str(path))
        found = _unpacked(data, table, [*which[0], which[1], COUNT])
    except BadFileError as reason:
        raise DataError(f"{path}: {reason}") from None
    return of_table(found, which, name=name, split="all", reading=arrays.reading)


def load_safetensors(path: Path, name: str, arrays: Arrays) -> DataSet | NamedDataSet:
    """The same from the tensors of a .safetensors file."""
    try:
        data = read_bytes(path, budget=FILE_BUDGET)
        facts, _ = tensorfiles.read_header(data)
        which = arrays.choose(facts, str(path))
        return of_table(tensorfiles.read_tensors(data), which, name=name, split="all", reading=arrays.reading)
    except BadFileError as reason:
        raise DataError(f"{path}: {reason}") from None


def read_npz(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """Those of the `wanted` arrays that an .npz holds; sizes are checked before anything is unpacked."""
    try:
        data = read_bytes(path, budget=FILE_BUDGET)
        return _unpacked(data, zips.entries(data), sorted(wanted))
    except BadFileError as reason:
        raise DataError(f"{path}: {reason}") from None


def _unpacked(data: bytes, table: dict[str, ZipInfo], wanted: list[str]) -> dict[str, Tensor]:
    """Those of the wanted arrays that are there, within a budget for all of them."""
    found: dict[str, Tensor] = {}
    total = 0
    for key in wanted:
        entry = table.get(f"{key}.npy")
        if entry is None:
            continue
        if found and total + entry.file_size > max(MAX_UNPACKED, zips.MAX_RATIO * len(data)):
            raise BadFileError(
                f"its arrays claim more than {size_text(total)} once unpacked: a zip bomb; if it is none, save them by "
                "numpy.savez, uncompressed"
            )
        found[key] = torch.from_numpy(parse_npy(zips.content(data, entry, deflated=True), key))
        total += entry.file_size
    return found


def parse_npy(data: bytes | memoryview, key: str) -> np.ndarray:
    """The array in the bytes of an .npy file (numpy.lib.format, versions 1 to 3), objects refused."""
    stream = io.BytesIO(data[:MAX_NPY_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        reader = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}.get(version[0])
        if reader is None:
            raise BadFileError(f"array {key} is in .npy version {version[0]}, which is not read here")
        shape, fortran, dtype = reader(stream)
    except BadFileError:
        raise
    except Exception:  # the header is text that numpy evaluates as a literal: any of a dozen classes
        raise BadFileError(f"array {key} has no valid .npy header") from None
    if dtype.kind not in "fiub" or dtype.hasobject:
        raise BadFileError(f"array {key} holds {dtype}: only plain numbers are read, never pickles")
    if len(shape) > 8 or any(n < 0 for n in shape):
        raise BadFileError(f"array {key} has no valid shape")
    count = 1
    for n in shape:
        count *= n
    if count * dtype.itemsize != len(data) - stream.tell():
        raise BadFileError(
            f"array {key} of shape {shape} needs {size_text(count * dtype.itemsize)}, "
            f"the file holds {size_text(len(data) - stream.tell())}"
        )
    flat = np.frombuffer(data, dtype=dtype, offset=stream.tell()).astype(dtype.newbyteorder("="))
    return flat.reshape(shape, order="F" if fortran else "C")
