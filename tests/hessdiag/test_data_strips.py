"""CIFAR in parts of WebP strips: the images come back to the bit; what is missing, damaged or hostile is named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hessdiag.data import load
from hessdiag.data.strips import parts
from hessdiag.errors import DataError

PER_STRIP = 3


def made_up(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def packed(images: np.ndarray, labels: np.ndarray, **more: Any) -> dict[str, Any]:
    """The arrays of one part."""
    strips = []
    for first in range(0, len(images), PER_STRIP):
        stream = io.BytesIO()
        Image.fromarray(images[first : first + PER_STRIP].reshape(-1, 32, 3)).save(
            stream, "WEBP", lossless=True, exact=True
        )
        strips.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, strips)])
    return {"data": np.frombuffer(b"".join(strips), dtype=np.uint8), "offsets": offsets, "labels": labels, **more}


def test_parts_come_back_in_order_and_to_the_bit(tmp_path: Path) -> None:
    images, labels = made_up(17)
    exact = np.ones(10, dtype=bool)
    exact[4] = False
    np.savez(tmp_path / "cifar10-train-webp-part2of2.npz", **packed(images[10:], labels[10:]))
    np.savez(tmp_path / "cifar10-train-webp-part1of2.npz", **packed(images[:10], labels[:10], exact=exact))
    np.savez(tmp_path / "cifar10-test-webp.npz", **packed(images[:5], labels[:5]))
    got = load("cifar10", split="train", root=tmp_path)
    assert torch.equal(got.inputs, torch.from_numpy(images.transpose(0, 3, 1, 2)))
    assert got.targets.tolist() == labels.tolist()
    assert any("1 images are marked" in note for note in got.notes)
    assert len(load("cifar10", split="test", root=tmp_path)) == 5


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    images, labels = made_up(4)
    np.savez(tmp_path / "cifar10-train-webp-part1of3.npz", **packed(images, labels))
    assert parts(tmp_path, "cifar10", "train")[1] == [
        "cifar10-train-webp-part2of3.npz",
        "cifar10-train-webp-part3of3.npz",
    ]
    with pytest.raises(DataError, match=r"not whole.*part2of3\.npz, .*part3of3\.npz is missing"):
        load("cifar10", split="train", root=tmp_path)
    with pytest.raises(DataError, match="hessdiag data cifar10"):
        load("cifar10", split="test", root=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": np.zeros(3, dtype=np.uint8)}, "4 images and 3 labels"),
        ({"labels": np.full(4, 10, dtype=np.uint8)}, "class 10 among 10"),
        ({"offsets": np.array([0, 10**6])}, "do not lie within"),
        ({"offsets": np.array([0])}, "do not lie within"),
        ({"offsets": np.array([0, 40])}, "cannot be decoded"),
        ({"data": np.zeros((2, 2), dtype=np.uint8)}, "no strips of images"),
        ({"offsets": np.array([0.0, 1.0])}, "whole numbers"),
    ],
)
def test_a_damaged_part_is_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "cifar10-test-webp.npz", **{**packed(*made_up(4)), **change})
    with pytest.raises(DataError, match=words) as caught:
        load("cifar10", split="test", root=tmp_path)
    assert "cifar10-test-webp.npz" in str(caught.value)


@pytest.mark.parametrize("size", [(64, 32), (32, 48)])
def test_a_picture_of_another_size_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "WEBP", lossless=True)
    content = stream.getvalue()
    arrays = {"data": np.frombuffer(content, dtype=np.uint8), "offsets": np.array([0, len(content)])}
    np.savez(tmp_path / "cifar10-test-webp.npz", labels=np.zeros(1, dtype=np.uint8), **arrays)
    with pytest.raises(DataError, match=f"a strip of {size[0]}x{size[1]} pixels"):
        load("cifar10", split="test", root=tmp_path)
