"""CIFAR as parts of lossless WebP strips: a third of the size of the binary layout, for slow ways and small limits.

`NAME-SPLIT-webp.npz`, or `NAME-SPLIT-webp-partKofN.npz` for K = 1..N, with the arrays

    data     uint8, the WebP files of the strips one after the other; a strip is images of 32x32 stacked downwards
    offsets  where each strip begins in `data`, and at last where the last ends
    labels   class numbers of the images in the part
    exact    (optional) False for images that are not the published ones to the bit
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from hessdiag.data.arrays import read_npz
from hessdiag.errors import DataError
from hessdiag.store.files import BadFileError

SIDE = 32
MAX_HEIGHT = 16383  # of a WebP picture
MAX_IMAGES = 100_000
_PART = re.compile(r"-webp(?:-part(\d{1,3})of(\d{1,3}))?\.npz$")


def parts(root: Path, name: str, split: str) -> tuple[list[Path], list[str]]:
    """The parts of a split that lie in a folder, in order, and the names of those that are missing.

    Nothing is missing, and nothing there, where no part lies in the folder at all.
    """
    found: dict[int, Path] = {}
    count = 1
    for path in sorted(root.glob(f"{name}-{split}-webp*.npz")):
        told = _PART.search(path.name)
        if told is not None:
            found[int(told[1] or 1)] = path
            count = max(count, int(told[2] or 1))
    if not found:
        return [], []
    missing = [f"{name}-{split}-webp-part{k}of{count}.npz" for k in range(1, count + 1) if k not in found]
    return [found[k] for k in sorted(found)], missing


def load_parts(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, int]:
    """Images uint8 [N, 3, 32, 32], class numbers, and how many images are marked as not exact."""
    images, labels, inexact = [], [], 0
    for path in paths:
        arrays = read_npz(path, {"data", "offsets", "labels", "exact"})
        try:
            images.append(_images({key: tensor.numpy() for key, tensor in arrays.items()}))
        except BadFileError as reason:
            raise DataError(f"{path}: {reason}") from None
        labels.append(arrays["labels"].numpy())
        if "exact" in arrays:
            inexact += int((~arrays["exact"].bool()).sum())
    return np.concatenate(images), np.concatenate(labels), inexact


def _images(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The images of one part, every size checked before anything is decoded."""
    lacking = [key for key in ("data", "offsets", "labels") if key not in arrays]
    if lacking:
        raise BadFileError(f"no strips of images: it lacks the array {lacking[0]!r}")
    data, offsets, labels = arrays["data"], arrays["offsets"], arrays["labels"]
    if data.dtype != np.uint8 or data.ndim != 1 or offsets.ndim != 1 or labels.ndim != 1:
        raise BadFileError("no strips of images: wants data uint8 [bytes], offsets [strips + 1], labels [images]")
    if offsets.dtype.kind not in "iu" or labels.dtype.kind not in "iu" or not 1 <= len(labels) <= MAX_IMAGES:
        raise BadFileError(f"offsets and labels must be whole numbers, of at most {MAX_IMAGES:,} images")
    bounds = [int(x) for x in offsets]
    inside = len(bounds) > 1 and bounds[0] >= 0 and bounds[-1] <= len(data)
    if not inside or any(a >= b for a, b in itertools.pairwise(bounds)) or len(bounds) - 1 > len(labels):
        raise BadFileError("the offsets of its strips do not lie within its data")
    content = data.tobytes()
    with ThreadPoolExecutor() as pool:
        strips = list(pool.map(lambda ends: _strip(content[ends[0] : ends[1]]), itertools.pairwise(bounds)))
    found = np.concatenate(strips)
    if len(found) != len(labels):
        raise BadFileError(f"{len(found)} images and {len(labels)} labels")
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2))


def _strip(content: bytes) -> np.ndarray:
    """One strip as [n, 32, 32, 3]."""
    try:
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as picture:
            if picture.width != SIDE or not 1 <= picture.height <= MAX_HEIGHT or picture.height % SIDE:
                raise BadFileError(f"a strip of {picture.width}x{picture.height} pixels is none of 32x32 images")
            pixels = np.asarray(picture.convert("RGB"), dtype=np.uint8)
    except BadFileError:
        raise
    except Exception as error:  # decoders raise many classes on damaged files
        raise BadFileError(f"a strip cannot be decoded ({type(error).__name__}): the file is damaged") from None
    return pixels.reshape(-1, SIDE, SIDE, 3)
