"""The published files of CIFAR-10 and CIFAR-100: names, layouts and checksums.

Archives: A. Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html (which lists the md5 of each archive).
The md5 of the single batches of the python archives are those that torchvision checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ADDRESS = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Layout:
    """One published form of a data set: an archive, the folder in it, the files of each split."""

    kind: str  # "python" (pickles) or "binary" (records of label bytes and 3072 pixel bytes)
    archive: str
    md5: str
    folder: str
    files: Mapping[str, tuple[str, ...]]
    known: Mapping[str, str]  # md5 of single files


@dataclass(frozen=True)
class Source:
    """A data set that can be fetched, in the layouts in which it may lie on disk."""

    name: str
    num_classes: int
    label_key: str  # in the python layout
    label_bytes: int  # in the binary layout; the last one is the class
    sizes: Mapping[str, int]
    layouts: tuple[Layout, ...]
    address: str = ADDRESS


_SIZES = {"train": 50_000, "test": 10_000}
_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))

SOURCES: dict[str, Source] = {
    "cifar10": Source(
        name="cifar10",
        num_classes=10,
        label_key="labels",
        label_bytes=1,
        sizes=_SIZES,
        layouts=(
            Layout(
                kind="python",
                archive="cifar-10-python.tar.gz",
                md5="c58f30108f718f92721af3b95e74349a",
                folder="cifar-10-batches-py",
                files={"train": _TEN, "test": ("test_batch",)},
                known={
                    "data_batch_1": "c99cafc152244af753f735de768cd75f",
                    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                    "data_batch_4": "634d18415352ddfa80567beed471001a",
                    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                    "test_batch": "40351d587109b95175f43aff81a1287e",
                },
            ),
            Layout(
                kind="binary",
                archive="cifar-10-binary.tar.gz",
                md5="c32a1d4ab5d03f1284b67883e8d87530",
                folder="cifar-10-batches-bin",
                files={"train": tuple(f"{name}.bin" for name in _TEN), "test": ("test_batch.bin",)},
                known={},
            ),
        ),
    ),
    "cifar100": Source(
        name="cifar100",
        num_classes=100,
        label_key="fine_labels",
        label_bytes=2,
        sizes=_SIZES,
        layouts=(
            Layout(
                kind="python",
                archive="cifar-100-python.tar.gz",
                md5="eb9058c3a382ffc7106e4002c42a8d85",
                folder="cifar-100-python",
                files={"train": ("train",), "test": ("test",)},
                known={
                    "train": "16019d7e3df5f24257cddd939b257f8d",
                    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                },
            ),
            Layout(
                kind="binary",
                archive="cifar-100-binary.tar.gz",
                md5="03b5dce01913d631647c71ecec9e9cb8",
                folder="cifar-100-binary",
                files={"train": ("train.bin",), "test": ("test.bin",)},
                known={},
            ),
        ),
    ),
}
