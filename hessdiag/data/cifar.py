"""CIFAR-10 and CIFAR-100 from whichever of their layouts lies in the data folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hessdiag.data.arrays import read_npz
from hessdiag.data.batchfiles import parse
from hessdiag.data.dataset import DataSet, make, to_images
from hessdiag.data.published import Layout, Source
from hessdiag.data.strips import load_parts, parts
from hessdiag.errors import DataError
from hessdiag.store.files import BadFileError, read_bytes

FILE_BUDGET = 512 * 2**20
UNPACKED_BUDGET = 512 * 2**20


def load_cifar(source: Source, split: str, root: Path) -> DataSet:
    """One split, from the python or binary folder, `NAME-SPLIT.npz`, parts of WebP strips, or an archive as downloaded,
    in that order.
    """
    for layout in source.layouts:
        for folder in (root / layout.folder, root):
            if all((folder / name).is_file() for name in layout.files[split]):
                paths = [folder / name for name in layout.files[split]]
                return _from_files(source, split, layout, {path: _read(path) for path in paths}, ())
    packed = root / f"{source.name}-{split}.npz"
    if packed.is_file():
        return _from_npz(source, split, packed)
    strips, missing = parts(root, source.name, split)
    if strips and not missing:
        return _from_strips(source, split, strips)
    for layout in source.layouts:
        archive = root / layout.archive
        if archive.is_file():
            return _from_archive(source, split, layout, archive)
    if missing:
        raise DataError(f"{source.name} is not whole in {root}: {', '.join(missing)} is missing; put it there too")
    raise DataError(f"{source.name} is not in {root}: run `hessdiag data {source.name}`, or {by_hand(source)}")


def by_hand(source: Source) -> str:
    """The sentence that says how to get a data set without a network."""
    first = source.layouts[0]
    return (
        f"put {first.archive} (md5 {first.md5}, {source.address}{first.archive}) "
        f"or its folder {first.folder} there by hand, or say where it is by $HESSDIAG_DATA"
    )


def members(archive: bytes, layout: Layout) -> Iterator[tuple[str, bytes]]:
    """The batch files inside a .tar.gz, by their bare names, within a budget; nothing is written anywhere."""
    wanted = {name for names in layout.files.values() for name in names}
    left = UNPACKED_BUDGET
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as packed:
            plain = packed.read(UNPACKED_BUDGET + 1)
        if len(plain) > UNPACKED_BUDGET:
            raise BadFileError(f"unpacks to more than {UNPACKED_BUDGET >> 20} MiB: a bomb, or another archive")
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if name not in wanted or folder != layout.folder:
                    continue
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None or member.size > left:
                    raise BadFileError(f"member {name} is no plain file of sane size")
                left -= member.size
                yield name, stream.read()
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError) as error:
        raise BadFileError(f"a damaged archive ({type(error).__name__})") from None


def _from_files(
    source: Source,
    split: str,
    layout: Layout,
    files: dict[Path, bytes],
    notes: tuple[str, ...],
    verified: bool = False,
) -> DataSet:
    images, labels, unknown = [], [], []
    for path, data in files.items():
        try:
            pixels, classes = parse(data, layout.kind, source)
        except BadFileError as reason:
            raise DataError(f"{path}: {reason}") from None
        images.append(pixels)
        labels.append(classes)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if not verified and layout.known.get(path.name) != md5:
            unknown.append(f"{path.name} {md5}")
    if unknown:
        notes = (*notes, f"md5 of no recorded official file: {', '.join(unknown)}")
    return _finish(source, split, np.concatenate(images), np.concatenate(labels), notes)


def _from_npz(source: Source, split: str, path: Path) -> DataSet:
    arrays = read_npz(path, {"images", "labels"})
    if set(arrays) != {"images", "labels"}:
        raise DataError(f"{path}: wants arrays 'images' [N, 32, 32, 3] and 'labels' [N]")
    images, _ = to_images(arrays["images"], source.name)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, 32, 32):
        raise DataError(f"{path}: images are {images.dtype} {tuple(images.shape)}, not uint8 [N, 32, 32, 3]")
    labels = arrays["labels"]
    if labels.is_floating_point():
        raise DataError(f"{path}: labels are {labels.dtype}, not integers")
    md5 = hashlib.md5(_read(path), usedforsecurity=False).hexdigest()
    return _finish(
        source,
        split,
        images.numpy(),
        labels.numpy(),
        (f"md5 of no recorded official file: {path.name} {md5}",),
    )


def _from_strips(source: Source, split: str, paths: list[Path]) -> DataSet:
    images, labels, inexact = load_parts(paths)
    if int(labels.max()) >= source.num_classes:
        raise DataError(f"{paths[0]}: class {int(labels.max())} among {source.num_classes} classes: another data set?")
    notes: tuple[str, ...] = (f"unpacked from {len(paths)} files of lossless strips ({paths[0].name}, ...)",)
    if inexact:
        notes = (*notes, f"{inexact} images are marked as not the published ones to the bit")
    return _finish(source, split, images, labels, notes)


def _from_archive(source: Source, split: str, layout: Layout, path: Path) -> DataSet:
    data = _read(path)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    notes = () if md5 == layout.md5 else (f"md5 of no recorded official file: {path.name} {md5}",)
    try:
        found = dict(members(data, layout))
    except BadFileError as reason:
        raise DataError(f"{path}: {reason}") from None
    missing = [name for name in layout.files[split] if name not in found]
    if missing:
        raise DataError(f"{path}: {layout.folder}/{missing[0]} is not in it; download it again")
    files = {path / name: found[name] for name in layout.files[split]}
    return _from_files(source, split, layout, files, notes, verified=True)


def _finish(source: Source, split: str, images: np.ndarray, labels: np.ndarray, notes: tuple[str, ...]) -> DataSet:
    if len(images) != source.sizes[split]:
        notes = (*notes, f"{len(images)} images; the official {split} set has {source.sizes[split]}")
    return make(
        torch.from_numpy(images),
        torch.from_numpy(labels.astype(np.int64)),
        name=source.name,
        split=split,
        num_classes=source.num_classes,
        notes=notes,
    )


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, budget=FILE_BUDGET)
    except BadFileError as reason:
        raise DataError(f"{path}: {reason}") from None
