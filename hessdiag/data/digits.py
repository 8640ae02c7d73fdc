"""scikit-learn's digits: 1797 images of 8x8, with a split that no library version can move."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from hessdiag.data.dataset import DataSet, make
from hessdiag.errors import DataError

TEST_SAMPLES = 500
_CONTENT = "f6d9e39f37dc45d327f6db33428ee58970ccceabb2535a5c179de35886b70443"


def load_digits(split: str) -> DataSet:
    """The `train` (1297) or `test` (500) part, float32 in [0, 1] as [N, 1, 8, 8], in scikit-learn's order.

    Sample i ranks by sha256("hessdiag/digits/i") within its class; the first of each class are the test set,
    as many as 500/1797 of the class, rounded so that they sum to 500 by the largest remainders.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    table = sklearn_digits()
    pixels = np.asarray(table.data, dtype=np.float64)
    labels = np.asarray(table.target, dtype=np.int64)
    content = hashlib.sha256(pixels.astype("<f8").tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    if content != _CONTENT:
        raise DataError(f"scikit-learn's digits are not the known ones (sha256 {content[:12]}, not {_CONTENT[:12]})")
    in_test = np.zeros(len(labels), dtype=bool)
    in_test[_test_indices(labels)] = True
    chosen = in_test if split == "test" else ~in_test
    # Pixels are 0 to 16; sixteenths are exact in float32.
    images = torch.from_numpy((pixels[chosen] / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    return make(images, torch.from_numpy(labels[chosen]), name="digits", split=split, num_classes=10)


def _test_indices(labels: np.ndarray) -> list[int]:
    classes = [np.flatnonzero(labels == label).tolist() for label in range(10)]
    shares = [TEST_SAMPLES * len(members) / len(labels) for members in classes]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(10), key=lambda label: counts[label] - shares[label])
    for label in by_remainder[: TEST_SAMPLES - sum(counts)]:
        counts[label] += 1
    return [
        index
        for members, count in zip(classes, counts)
        for index in sorted(members, key=lambda i: hashlib.sha256(f"hessdiag/digits/{i}".encode()).digest())[:count]
    ]
