"""Arrays of bytes: pixels are measured as their floats are, and what can be no pixels is refused, however it comes.

The oracle is the same data stored as what they mean: float32, the library called on tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load_named
from hessdiag.errors import DataError, TargetError

NETS = """
import numpy as np
import torch
from torch import nn
class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
    def forward(self, x):
        return self.head(torch.tanh(self.table(x).mean(1)))
def dense(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
def coder(): return nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 12))
def pictures(): return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
def strings(): return nn.Sequential(nn.Conv1d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))
codes = Codes
def own(outputs, targets): return (outputs - targets).square().mean(1)
turned = np.random.default_rng(3).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
def factory(): return turned, np.arange(10) % 3
def rows(): return [(x, int(y)) for x, y in zip(*factory())]
"""
LABELS = np.arange(10) % 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "byte_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def net(name: str) -> Any:
    import byte_nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    return getattr(byte_nets, name)().eval()


def measured(name: str, arrays: dict[str, np.ndarray] | str, *options: str) -> Result:
    torch.save(net(name).state_dict(), "w.pt")
    data = arrays if isinstance(arrays, str) else "npz:d.npz"
    if not isinstance(arrays, str):
        np.savez("d.npz", **arrays)
    more = ("--method", "exact", "--no-spread", *options)
    return CliRunner().invoke(app, ["measure", "w.pt", "--model", f"byte_nets:{name}", "--data", data, *more])


def floats(name: str, inputs: np.ndarray, targets: np.ndarray, loss: str = "cross_entropy") -> float:
    pair = torch.from_numpy(inputs.astype("float32")), torch.from_numpy(targets)
    return hd.measure(hd.Objective(net(name), loss), pair, method="exact").rms


def bits(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8)


def grey(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("beside", [{}, {"scale": np.ones((10, 1), "float32")}], ids=["one", "several"])
@pytest.mark.parametrize("name", ["inputs", "fingerprint"])
def test_bytes_of_zero_and_one_are_no_pixels(name: str, beside: dict[str, np.ndarray], folder: Path) -> None:
    arrays = {name: bits(10, 12), **beside}
    told = measured("dense", {**arrays, "y": LABELS})
    assert told.exit_code == 3
    assert (
        f"input '{name}' is uint8 of 0 and 1, which as pixels would be black: store a mask as bool or int64, features "
        "as floats" in told.stderr
    )
    if not beside:
        told = measured("dense", {name: arrays[name].astype("float32"), "y": LABELS}, "-q")
        assert float(told.stdout.split()[0]) == pytest.approx(floats("dense", arrays[name], LABELS), rel=1e-6)


def test_a_string_of_one_hot_bytes_is_refused_as_stored(folder: Path) -> None:
    """Not as the images that it would have become."""
    strings = np.eye(4, dtype=np.uint8)[np.random.default_rng(2).integers(0, 4, (10, 6))].transpose(0, 2, 1)
    told = measured("strings", {"inputs": strings, "targets": LABELS})
    assert "features as floats" in told.stderr
    assert "[1, 4, 6]" not in told.stderr


def test_pixels_are_divided_and_it_is_said(folder: Path) -> None:
    arrays = {"inputs": grey(10, 12), "targets": LABELS}
    told = measured("dense", arrays, "--json", "-")
    found = json.loads(told.stdout)
    assert "input 'inputs' is uint8 and divided by 255" in found["cli"]["data"]["notes"]
    assert found["rms"] == pytest.approx(floats("dense", arrays["inputs"] / np.float32(255), LABELS), rel=1e-6)


def test_what_the_model_does_not_take_is_told_by_what_is_stored(folder: Path) -> None:
    told = measured("strings", {"inputs": grey(10, 4, 6), "targets": LABELS})
    assert told.exit_code == 3
    assert "its uint8 array [N, 4, 6] was read as grey images, which have one channel: if it is none, store floats" in (
        told.stderr
    )
    codes = np.random.default_rng(2).integers(0, 9, (10, 6), dtype=np.uint8)
    told = measured("codes", {"code": codes, "y": LABELS})
    assert told.exit_code == 3
    assert "store tokens as int64" in told.stderr
    told = measured("codes", {"code": codes.astype("int64"), "y": LABELS}, "-q")
    assert told.exit_code == 0, told.stderr


def test_an_autoencoder_of_bytes_is_refused_and_of_floats_measured(folder: Path) -> None:
    images = grey(10, 12)
    told = measured("coder", {"inputs": images, "targets": images}, "--loss", "mse")
    assert told.exit_code == 3
    assert "targets are uint8 up to 255, and targets are not divided by 255 as inputs are: store floats in [0, 1]" in (
        told.stderr
    )
    halves = (images / 255).astype("float32")
    told = measured("coder", {"inputs": images, "targets": halves}, "--loss", "mse", "-q")
    assert float(told.stdout.split()[0]) == pytest.approx(floats("coder", halves, halves, "mse"), rel=1e-6)
    numbers = images.astype("int64")
    told = measured("coder", {"inputs": images, "targets": numbers}, "--loss", "mse", "-q")
    assert float(told.stdout.split()[0]) == pytest.approx(floats("coder", halves, images.astype("f4"), "mse"), rel=1e-6)


def test_bytes_that_count_are_values(folder: Path) -> None:
    """Beside inputs that are no bytes, and with a loss of one's own, which may want class numbers."""
    x, y = np.random.default_rng(4).random((10, 12), dtype="float32"), grey(10, 3)
    note = "targets are uint8 and taken as they stand, not divided by 255"
    for loss, inputs in (("mse", x), ("byte_nets:own", grey(10, 12))):
        told = measured("dense", {"inputs": inputs, "targets": y}, "--loss", loss, "--json", "-")
        assert told.exit_code == 0, told.stderr
        assert note in json.loads(told.stdout)["cli"]["data"]["notes"]
    found = load_named("npz:d.npz", loss="cross_entropy")
    assert note not in found.notes
    np.savez("d.npz", inputs=x.reshape(10, 1, 3, 4), targets=grey(10, 1, 3, 4))
    with pytest.raises(TargetError, match=r"float.* if they are pixels"):
        load_named("npz:d.npz", loss="half_mse")
    np.savez("d.npz", inputs=grey(10, 12), targets=bits(10, 3))
    assert note not in load_named("npz:d.npz", loss="bce").notes


@pytest.mark.parametrize("name", ["factory", "rows"])
def test_images_of_a_factory_are_turned_as_those_of_a_file(name: str, folder: Path) -> None:
    import byte_nets

    images = byte_nets.turned.transpose(0, 3, 1, 2) / np.float32(255)
    told = measured("pictures", f"byte_nets:{name}", "--json", "-")
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)
    assert "channels-last images were turned to [N, C, H, W]" in found["cli"]["data"]["notes"]
    assert found["rms"] == pytest.approx(floats("pictures", np.ascontiguousarray(images), LABELS), rel=1e-6)


def test_black_pictures_are_pictures(folder: Path) -> None:
    """In a folder nothing but pixels can be meant."""
    from PIL import Image

    for label in "ab":
        (folder / label).mkdir()
        Image.fromarray(bits(4, 4)).save(folder / label / "0.png")
    assert int(load_named(f"folder:{folder}").inputs.max()) == 1  # type: ignore[union-attr]


def test_arrays_of_a_factory_are_held_to_the_same(folder: Path) -> None:
    (folder / "bit_data.py").write_text(
        "import numpy as np\ndef make(): return np.ones((4, 3), np.uint8), np.arange(4)\n"
    )
    with pytest.raises(DataError, match="of 0 and 1"):
        load_named("bit_data:make")
