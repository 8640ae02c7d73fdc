"""Data sets by name: digits, files, folders and the user's own code."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hessdiag.data import DataSet, load
from hessdiag.errors import (
    ConfigurationError,
    DataError,
    DtypeError,
    EmptyDataError,
    NonFiniteError,
    TargetError,
    UnknownNameError,
)

DIGITS_TEST = "f3d0d9bdb38d0ba7fbf83d9ed6ead28c033fc82f5e83648ea1198fd2a329c773"


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_digits_are_all_of_scikit_learns_and_the_parts_are_disjoint() -> None:
    table = load_digits()
    train, test = load("digits", split="train"), load("digits", split="test")
    assert train.inputs.shape == (1297, 1, 8, 8)
    assert test.inputs.shape == (500, 1, 8, 8)
    found = torch.cat([train.inputs, test.inputs]).flatten(1).double() * 16
    both = torch.cat([found, torch.cat([train.targets, test.targets])[:, None]], 1)
    expected = torch.tensor(np.c_[table.data, table.target])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, expected.tolist()))
    assert len({tuple(row) for row in both.tolist()}) == 1797  # no image occurs twice, so the parts are disjoint
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0.0, 1.0)
    assert train.num_classes == test.num_classes == 10


def test_digits_split_is_stratified_and_fixed() -> None:
    counts = load("digits").targets.bincount()
    total = torch.from_numpy(load_digits().target).bincount()
    assert int(counts.sum()) == 500
    assert float((counts - 500 * total / 1797).abs().max()) < 1
    # Computed once; another value means that a published number would no longer be about the same samples.
    assert load("digits").sha256 == DIGITS_TEST


def test_samples_are_chosen_by_seed_without_replacement_in_order() -> None:
    whole = load("digits")
    chosen = load("digits", samples=100, seed=3)
    assert len(chosen) == 100
    rows = [tuple(x) for x in whole.inputs.flatten(1).tolist()]
    positions = [rows.index(tuple(x)) for x in chosen.inputs.flatten(1).tolist()]
    assert positions == sorted(set(positions))
    assert torch.equal(whole.targets[positions], chosen.targets)
    assert load("digits", samples=100, seed=3).sha256 == chosen.sha256
    assert load("digits", samples=100, seed=4).sha256 != chosen.sha256
    assert load("digits", samples=500).sha256 == whole.sha256
    state = torch.get_rng_state()
    load("digits", samples=10)
    assert torch.equal(torch.get_rng_state(), state)


def test_sha256_covers_values_types_and_shapes() -> None:
    data = load("digits", samples=3)
    digest = hashlib.sha256()
    digest.update(b"torch.float32 (3, 1, 8, 8)\n" + data.inputs.numpy().tobytes())
    digest.update(b"torch.int64 (3,)\n" + data.targets.numpy().tobytes())
    assert data.sha256 == digest.hexdigest()


def test_batches_are_re_iterable_and_exact(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(7, 3, 4, 5), labels=np.arange(7))
    data = load(f"npz:{tmp_path / 'a.npz'}")
    batches = data.batches(3, dtype=torch.float64)
    assert len(batches) == 3
    for _ in range(2):
        inputs, targets = zip(*batches)
        assert [len(x) for x in inputs] == [3, 3, 1]
        assert torch.equal(torch.cat(inputs), data.inputs.double() / 255)
        assert torch.equal(torch.cat(targets), torch.arange(7))
    assert {x.dtype for x, _ in data.batches(3)} == {torch.float32}
    for bad, kind in ((0, ConfigurationError), (-1, ConfigurationError)):
        with pytest.raises(kind, match="at least 1"):
            data.batches(bad)
    with pytest.raises(DtypeError, match="floating point"):
        data.batches(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "kind", "reason"),
    [
        ({"name": "digit"}, UnknownNameError, "did you mean 'digits'"),
        ({"name": "digits", "split": "validation"}, ConfigurationError, "'train' or 'test'"),
        ({"name": "digits", "samples": 0}, ConfigurationError, "at least 1"),
        ({"name": "digits", "samples": 501}, DataError, "has 500 samples, fewer than the 501"),
        ({"name": "npz:"}, DataError, "names no path"),
        ({"name": "npz:/absent/a.npz"}, DataError, "no such file"),
        ({"name": "folder:/absent"}, DataError, "no such folder"),
        ({"name": "no_such_module_x:make"}, ConfigurationError, "no module 'no_such_module_x'"),
    ],
)
def test_refusals(given: dict[str, Any], kind: type[Exception], reason: str) -> None:
    with pytest.raises(kind, match=reason) as caught:
        load(**given)
    assert "\n" not in str(caught.value)


# --- arrays ---


@pytest.mark.parametrize(
    ("shape", "expected", "note"),
    [
        ((4, 3, 8, 9), (4, 3, 8, 9), ""),
        ((4, 8, 9, 3), (4, 3, 8, 9), "channels-last"),
        ((4, 8, 9, 1), (4, 1, 8, 9), "channels-last"),
        ((4, 8, 9), (4, 1, 8, 9), "grey"),
        ((4, 5, 8, 9), (4, 5, 8, 9), ""),
        ((4, 20), (4, 20), ""),
    ],
)
@pytest.mark.parametrize("scheme", ["npz", "safetensors"])
def test_image_layouts(
    shape: tuple[int, ...], expected: tuple[int, ...], note: str, scheme: str, tmp_path: Path
) -> None:
    images, path = pixels(*shape), tmp_path / "a"
    if scheme == "npz":
        with open(path, "wb") as stream:
            np.savez_compressed(stream, inputs=images, targets=np.array([0, 1, 2, 1]))
    else:
        table = {"inputs": torch.from_numpy(images), "targets": torch.tensor([0, 1, 2, 1])}
        safetensors.torch.save_file(table, path)
    data = load(f"{scheme}:{path}")
    assert tuple(data.inputs.shape) == expected
    reference = images[:, None] if len(shape) == 3 else images.transpose(0, 3, 1, 2) if "last" in note else images
    assert np.array_equal(data.inputs.numpy(), reference)
    assert note in " ".join(data.notes)
    assert (data.num_classes, data.split) == (3, "all")


def test_ambiguous_channels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(4, 3, 32, 3), labels=np.zeros(4, int))
    with pytest.raises(DataError, match="channels second or last"):
        load(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    ("arrays", "kind", "reason"),
    [
        ({"x": pixels(2, 2)}, DataError, "wants arrays 'inputs' and 'targets'"),
        ({"inputs": pixels(2, 2), "targets": [0]}, DataError, "2 inputs and 1 targets"),
        ({"inputs": pixels(0, 2), "targets": np.zeros(0, int)}, EmptyDataError, "no samples"),
        (
            {"inputs": np.array([[0.0, np.nan]]), "targets": [0]},
            NonFiniteError,
            "1 NaN or infinite values, the first in sample 0",
        ),
        ({"inputs": np.ones((2, 2)), "targets": [0.0, np.inf]}, NonFiniteError, "targets hold 1"),
        ({"inputs": np.ones((2, 2), int), "targets": [0, 1]}, DataError, "store images as uint8"),
        ({"inputs": np.ones((2, 2)), "targets": [0, -1]}, TargetError, "span -1 to 0"),
        ({"inputs": np.ones((2, 2)), "targets": [0, 10**12]}, TargetError, "count from 0"),
        (
            {"inputs": np.ones((2, 2)), "targets": [0, 3], "num_classes": 3},
            TargetError,
            "class 3 among the targets of 3",
        ),
        ({"inputs": np.ones((2, 2)), "targets": [0, 1], "num_classes": [2, 2]}, DataError, "one positive integer"),
        ({"inputs": np.ones((2, 2)), "targets": [[True], [False]]}, TargetError, "class numbers are integers"),
        ({"inputs": np.ones(2), "targets": [0, 1]}, DataError, r"no \[N, \.\.\.\]"),
        ({"inputs": np.array(["a", "b"]), "targets": [0, 1]}, DataError, "only plain numbers"),
        ({"inputs": np.array([{}, {}]), "targets": [0, 1]}, DataError, "never pickles"),
    ],
)
def test_arrays_that_cannot_be_measured(
    arrays: dict[str, Any], kind: type[Exception], reason: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **{key: np.asarray(value) for key, value in arrays.items()}, allow_pickle=True)
    with pytest.raises(kind, match=reason) as caught:
        load(f"npz:{tmp_path / 'a.npz'}")
    assert "\n" not in str(caught.value)


def test_regression_targets_and_unusual_floats(tmp_path: Path) -> None:
    inputs = np.linspace(-1, 3, 8, dtype=np.float16).reshape(4, 2)
    np.savez(tmp_path / "a.npz", inputs=inputs, targets=np.array([0.5, 1, 2, 3]))
    data = load(f"npz:{tmp_path / 'a.npz'}")
    assert data.num_classes is None
    assert data.inputs.dtype == torch.float32
    assert "inputs span [-1, 3], not [0, 1]; they are used as they are" in data.notes
    _, targets = next(iter(data.batches(4, dtype=torch.float64)))
    assert targets.dtype == torch.float64


def test_column_major_and_big_endian_arrays(tmp_path: Path) -> None:
    inputs = np.asfortranarray(np.arange(6.0).reshape(2, 3) / 6)
    np.savez(tmp_path / "a.npz", inputs=inputs, targets=np.array([1, 0], dtype=">i4"))
    data = load(f"npz:{tmp_path / 'a.npz'}")
    assert torch.equal(data.inputs, torch.from_numpy(np.ascontiguousarray(inputs)))
    assert data.targets.tolist() == [1, 0]


def npy(shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (npy("(10000000000,)"), "needs 9.3 GiB, the file holds 0 bytes"),
        (npy("(-1,)"), "no valid shape"),
        (npy("(2,)", b"123"), "needs 2 bytes"),
        (npy("__import__('os').system('echo executed > executed')"), "no valid .npy header"),
        (b"junk", "no valid .npy header"),
    ],
)
def test_hostile_arrays(member: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("inputs.npy", member)
        archive.writestr("targets.npy", npy("(1,)", b"0"))
    with pytest.raises(DataError, match=reason):
        load("npz:a.npz")
    assert not Path("executed").exists()


def test_zip_bomb_of_arrays(tmp_path: Path) -> None:
    """A megabyte that claims to be 4 GiB, and 27 bytes that claim to be 9 GiB: refused before they grow."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inputs.npy", bytes(2**20))
        archive.writestr("targets.npy", b"x")
    data = bytearray(buffer.getvalue())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 2**32 - 2)
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"claims 4\.0 GiB once unpacked: a zip bomb"):
        load(f"npz:{path}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("inputs", "targets", "num_classes"):
            archive.writestr(f"{name}.npy", b"x" * 9)
    data = bytearray(buffer.getvalue())
    at = -1
    for _ in range(3):
        at = data.index(b"PK\x01\x02", at + 1)
        struct.pack_into("<H", data, at + 10, 8)  # deflated
        struct.pack_into("<I", data, at + 24, 3 * 2**30)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"claims 3\.0 GiB once unpacked: a zip bomb"):
        load(f"npz:{path}")


# --- folders ---


def picture(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).convert(mode).save(path) if mode else Image.fromarray(array).save(path)


def test_folder_of_images(tmp_path: Path) -> None:
    images = pixels(5, 6, 7, 3)
    for index, label in enumerate(["zebra", "ant", "ant", "zebra", "moth"]):
        picture(tmp_path / label / f"{index}.png", images[index])
    (tmp_path / "ant" / "notes.txt").write_text("x")
    data = load(f"folder:{tmp_path}")
    order = [1, 2, 4, 0, 3]
    assert np.array_equal(data.inputs.numpy(), images[order].transpose(0, 3, 1, 2))
    assert data.targets.tolist() == [0, 0, 1, 2, 2]
    assert data.num_classes == 3
    assert data.notes == ("classes: ant, moth, zebra", "1 entries without an image suffix were left out")


def test_folder_with_splits_and_grey_images(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png", pixels(4, 4))
    picture(tmp_path / "test" / "a" / "0.png", pixels(5, 5, seed=1))
    picture(tmp_path / "test" / "a" / "1.png", pixels(5, 5, 3, seed=2))
    train, test = load(f"folder:{tmp_path}", split="train"), load(f"folder:{tmp_path}", split="test")
    assert tuple(train.inputs.shape) == (1, 1, 4, 4)
    assert (train.split, test.split) == ("train", "test")
    assert tuple(test.inputs.shape) == (2, 3, 5, 5)
    assert torch.equal(test.inputs[0, 0], test.inputs[0, 2])
    assert any("three equal channels" in note for note in test.notes)


def test_a_folder_for_validation_is_a_test(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png", pixels(4, 4))
    with pytest.raises(DataError, match=r"'train' holds no images; .* is folder:.*/train meant\?"):
        load(f"folder:{tmp_path}")
    picture(tmp_path / "val" / "a" / "0.png", pixels(5, 5))
    found = load(f"folder:{tmp_path}")
    assert (found.split, tuple(found.inputs.shape)) == ("val", (1, 1, 5, 5))
    assert "the folder val was taken for test" in found.notes
    picture(tmp_path / "test" / "a" / "0.png", pixels(6, 6))
    assert load(f"folder:{tmp_path}").split == "test"
    (tmp_path / "classes").mkdir()
    picture(tmp_path / "classes" / "val" / "0.png", pixels(4, 4))  # a class of that name
    assert load(f"folder:{tmp_path / 'classes'}").split == "all"


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class subfolders"):
        load(f"folder:{tmp_path}")
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="'a' holds no images"):
        load(f"folder:{tmp_path}")
    picture(tmp_path / "a" / "0.png", pixels(4, 4))
    picture(tmp_path / "a" / "1.png", pixels(5, 4))
    with pytest.raises(DataError, match=r"1\.png: 4x5 pixels, while 0\.png has 4x4"):
        load(f"folder:{tmp_path}")
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="no image in a known format"):
        load(f"folder:{tmp_path}")
    content = (tmp_path / "a" / "0.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        load(f"folder:{tmp_path}")
    picture(tmp_path / "a" / "1.png", pixels(4, 4, 4))
    with pytest.raises(DataError, match="mode RGBA"):
        load(f"folder:{tmp_path}")
    picture(tmp_path / "a" / "1.png", np.zeros((4097, 4097), np.uint8))
    with pytest.raises(DataError, match="a bomb"):
        load(f"folder:{tmp_path}")
    (tmp_path / "a" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    with pytest.raises(DataError, match="no image in a known format"):
        load(f"folder:{tmp_path}")


# --- the user's own code ---

THEIRS = """
import numpy as np, torch
from hessdiag.data import load
def pair(): return torch.rand(6, 2), torch.arange(6) % 3
def arrays(): return np.full((2, 2), 9, np.uint8), np.array([0, 1])
def batches(split, seed):
    assert (split, seed) == ("train", 5)
    for i in range(3): yield torch.full((2, 4), i / 3), torch.tensor([i, i])
def data_set(): return load("digits", samples=5)
def wrong(): return 7
def empty(): return []
def broken(): raise KeyError("x")
def odd(): return [torch.zeros(2)]
def images(): return torch.arange(48.0).reshape(6, 1, 2, 4) / 48
def torchs(): return torch.utils.data.TensorDataset(images(), torch.arange(6) % 3)
def rows(): return [(x, int(y)) for x, y in torchs()]
class Named(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return {"image": images()[i], "label": i % 3}
number = 3
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_data_a.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    pair = load("their_data_a:pair")
    assert (len(pair), pair.num_classes, pair.split) == (6, 3, "all")
    assert load("their_data_a:arrays").inputs.dtype == torch.uint8
    batches = load("their_data_a:batches", split="train", seed=5, samples=4)
    assert (len(batches), batches.split) == (4, "train")
    assert isinstance(load("their_data_a:data_set"), DataSet)
    for name, kind, reason in (
        ("wrong", DataError, "returned int"),
        ("empty", EmptyDataError, "no batches"),
        ("broken", DataError, "raised KeyError: 'x'"),
        ("odd", DataError, "batch of type Tensor"),
        ("number", DataError, "is no function"),
        ("absent", ConfigurationError, "no attribute 'absent'"),
    ):
        with pytest.raises(kind, match=reason):
            load(f"their_data_a:{name}")


@pytest.mark.parametrize("name", ["torchs", "rows", "Named"])
def test_a_factory_may_return_what_a_dataset_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_data_b.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    found = load(f"their_data_b:{name}")
    assert torch.equal(found.inputs, torch.arange(48.0).reshape(6, 1, 2, 4) / 48)
    assert found.targets.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_pipe_in_a_folder_of_images_is_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        load(f"folder:{tmp_path}")
