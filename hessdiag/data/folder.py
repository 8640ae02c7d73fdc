"""A folder of images, one subfolder per class."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from hessdiag.data.dataset import DataSet, make
from hessdiag.errors import DataError
from hessdiag.store.files import BadFileError, read_bytes

# Formats that Pillow decodes itself; no EPS, which starts Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"}
VALIDATION = ("val", "valid", "validation")
MAX_PIXELS = 4096 * 4096
MAX_BYTES = 8 * 2**30
MAX_FILE = 64 * 2**20


def load_folder(path: Path, split: str, name: str) -> DataSet:
    """Images of equal size from PATH/CLASS/*, or PATH/SPLIT/CLASS/* where that exists; classes in order of
    name. For test, beside a folder train, val will do.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    try:
        told = _split_of(path, split)
        base = path / told if told else path
        classes = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
        members = [(index, p) for index, label in enumerate(classes) for p in sorted((base / label).iterdir())]
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror or error})") from None
    if not classes:
        raise DataError(f"{base}: no class subfolders; put images in {base}/CLASS/")
    images = [(index, p) for index, p in members if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    notes: tuple[str, ...] = (f"classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}",)
    if len(images) < len(members):
        notes = (*notes, f"{len(members) - len(images)} entries without an image suffix were left out")
    empty = set(range(len(classes))) - {index for index, _ in images}
    if empty:
        label = classes[min(empty)]
        deeper = any(p.is_dir() for index, p in members if index == min(empty))
        hint = f"; its images lie deeper: is folder:{base / label} meant?" if deeper else ""
        raise DataError(f"{base}: class folder {label!r} holds no images{hint}")
    if told not in (None, split):
        notes = (*notes, f"the folder {told} was taken for {split}")
    arrays: list[np.ndarray] = []
    total = 0
    for _, file in images:
        arrays.append(_read(file))
        total += arrays[-1].size
        if arrays[-1].shape[1:] != arrays[0].shape[1:]:
            sizes = [f"{a.shape[2]}x{a.shape[1]}" for a in (arrays[0], arrays[-1])]
            raise DataError(f"{file}: {sizes[1]} pixels, while {images[0][1].name} has {sizes[0]}; sizes must agree")
        if total > MAX_BYTES:
            raise DataError(f"{base}: more than {MAX_BYTES >> 30} GiB of pixels; measure on fewer images")
    if len({a.shape[0] for a in arrays}) > 1:
        arrays = [np.repeat(a, 3, axis=0) if a.shape[0] == 1 else a for a in arrays]
        notes = (*notes, "grey images among coloured ones were given three equal channels")
    targets = torch.tensor([index for index, _ in images])
    inputs = torch.from_numpy(np.stack(arrays))
    return make(inputs, targets, name=name, split=told or "all", num_classes=len(classes), notes=notes)


def _split_of(path: Path, split: str) -> str | None:
    """The subfolder of that split; beside a folder train, one for validation will do as test."""
    if (path / split).is_dir():
        return split
    others = VALIDATION if split == "test" and (path / "train").is_dir() else ()
    return next((name for name in others if (path / name).is_dir()), None)


def _read(file: Path) -> np.ndarray:
    """One image as uint8 [C, H, W] with one or three channels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning; the limit below is stricter
            with Image.open(io.BytesIO(read_bytes(file, budget=MAX_FILE)), formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise DataError(f"{file}: {picture.width}x{picture.height} pixels, more than {MAX_PIXELS}: a bomb?")
                if picture.mode not in ("L", "RGB", "P", "1"):
                    raise DataError(f"{file}: mode {picture.mode}; save it as grey or RGB without transparency")
                if "transparency" in picture.info:
                    raise DataError(f"{file}: has transparency; save it as grey or RGB without")
                mode = {"P": "RGB", "1": "L"}.get(picture.mode, picture.mode)
                pixels = np.asarray(picture.convert(mode), dtype=np.uint8)
    except (DataError, MemoryError):  # an image that does not fit is not damaged
        raise
    except BadFileError as reason:
        raise DataError(f"{file}: {reason}") from None
    except Image.DecompressionBombError:
        raise DataError(f"{file}: a decompression bomb (more than {MAX_PIXELS} pixels)") from None
    except UnidentifiedImageError:
        raise DataError(f"{file}: no image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise many classes on damaged files
        raise DataError(f"{file}: cannot be decoded ({type(error).__name__}): the image is damaged") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
