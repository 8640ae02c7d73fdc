"""Augmentation on the device against image-by-image code: crops by slices, AutoAugment by Pillow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from experiments.augment import autoaugment, crop_and_flip, draw
from experiments.augment.autoaugment import OPERATIONS, Choices
from experiments.augment.policy import POLICY, SIGNED, magnitude
from hessdiag.errors import DataError


def pictures(count: int = 24, size: int = 32) -> Tensor:
    """Smooth pictures with edges and noise, some of low contrast, one flat."""
    g = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(count, 3, 5, 5, generator=g), size=size, mode="bilinear")
    x = (255 * coarse + 20 * torch.randn(count, 3, size, size, generator=g)).clamp(0, 255)
    x = torch.cat([x, torch.zeros(4, 3, size, size)])
    x[1] = 100 + x[1] / 10
    x[2] = 77
    x[3, 0] = 5
    return x[:count].round().to(torch.uint8)


def image(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def turned(picture: Image.Image, degrees: float) -> Image.Image:
    rotated = picture.convert("RGBA").rotate(degrees)
    return Image.composite(rotated, Image.new("RGBA", rotated.size, (128,) * 4), rotated).convert("RGB")


def moved(picture: Image.Image, matrix: tuple[float, ...], sampling: Any) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, sampling, fillcolor=(128, 128, 128))


CUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
PILLOW: dict[str, Any] = {
    "invert": lambda p, m: ImageOps.invert(p),
    "posterize": lambda p, m: ImageOps.posterize(p, int(m)),
    "solarize": lambda p, m: ImageOps.solarize(p, m),
    "brightness": lambda p, m: ImageEnhance.Brightness(p).enhance(1 + m),
    "color": lambda p, m: ImageEnhance.Color(p).enhance(1 + m),
    "contrast": lambda p, m: ImageEnhance.Contrast(p).enhance(1 + m),
    "sharpness": lambda p, m: ImageEnhance.Sharpness(p).enhance(1 + m),
    "autocontrast": lambda p, m: ImageOps.autocontrast(p),
    "equalize": lambda p, m: ImageOps.equalize(p),
    "translate_x": lambda p, m: moved(p, (1, 0, m * p.size[0], 0, 1, 0), NEAREST),
    "translate_y": lambda p, m: moved(p, (1, 0, 0, 0, 1, m * p.size[1]), NEAREST),
    "shear_x": lambda p, m: moved(p, (1, m, 0, 0, 1, 0), CUBIC),
    "shear_y": lambda p, m: moved(p, (1, 0, 0, m, 1, 0), CUBIC),
    "rotate": turned,
}
# Share of values that may differ by one grey level, and by more: rounding in fixed point inside Pillow.
TOLERANCE = {"shear_x": (0.02, 0.0), "shear_y": (0.02, 0.0), "rotate": (0.0, 0.002), "translate_x": (0.0, 0.0)}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_are_pillows(name: str) -> None:
    x = pictures()
    for level in (0, 3, 6, 9):
        for sign in (1, -1) if name in SIGNED else (1,):
            amount = sign * magnitude(name, level)
            got = OPERATIONS[name](x, torch.full((len(x),), amount, dtype=torch.float64)).int()
            want = torch.stack([tensor(PILLOW[name](image(p), amount)) for p in x]).int()
            off_by_one, more = TOLERANCE.get(name, (0.0, 0.0))
            gap = (got - want).abs()
            assert (gap > 0).double().mean() <= off_by_one + more, (name, level, sign)
            assert (gap > 1).double().mean() <= more, (name, level, sign)


def test_magnitudes_differ_from_image_to_image() -> None:
    x = pictures(3)
    amounts = torch.tensor([0.1, -0.5, 0.9], dtype=torch.float64)
    for name, operation in OPERATIONS.items():
        if name in SIGNED:
            one_by_one = torch.cat([operation(x[i : i + 1], amounts[i : i + 1]) for i in range(3)])
            assert torch.equal(operation(x, amounts), one_by_one)


def test_the_policy_is_applied_step_by_step() -> None:
    x = pictures(50)
    choices = draw(50, torch.Generator().manual_seed(1))
    expected = []
    for i, p in enumerate(x):
        picture = p[None]
        for place, (name, _, level) in enumerate(POLICY[int(choices.policy[i])]):
            if choices.taken[i, place]:
                sign = float(choices.sign[i, place]) if name in SIGNED else 1.0
                amount = torch.tensor([sign * magnitude(name, level)], dtype=torch.float64)
                picture = OPERATIONS[name](picture, amount)
        expected.append(picture)
    assert torch.equal(autoaugment(x, choices), torch.cat(expected))


def test_the_policy_is_the_published_one() -> None:
    assert len(POLICY) == 25
    assert POLICY[0] == (("invert", 0.1, 7), ("contrast", 0.2, 6))
    assert POLICY[13] == (("brightness", 0.9, 6), ("color", 0.2, 8))
    assert POLICY[24] == (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1))
    assert [magnitude("posterize", level) for level in range(10)] == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]
    assert magnitude("solarize", 0) == 256
    assert magnitude("solarize", 9) == 0
    assert magnitude("translate_x", 9) == pytest.approx(150 / 331)
    assert magnitude("rotate", 3) == pytest.approx(10)


@pytest.mark.statistical
def test_choices_have_the_stated_probabilities() -> None:
    """z-tests on 25 sub-policies, 50 steps and the signs: 76 tests at |z| < 4.5, false alarm below 0.0006."""
    n = 20_000
    choices = draw(n, torch.Generator().manual_seed(2))
    assert_z(torch.bincount(choices.policy, minlength=25).tolist(), [n] * 25, [1 / 25] * 25)
    for place in range(2):
        hits = [int(choices.taken[choices.policy == k, place].sum()) for k in range(25)]
        trials = [int((choices.policy == k).sum()) for k in range(25)]
        assert_z(hits, trials, [POLICY[k][place][1] for k in range(25)])
    assert_z([int((choices.sign > 0).sum())], [2 * n], [0.5])


def assert_z(hits: list[int], trials: list[int], chances: list[float]) -> None:
    for hit, count, p in zip(hits, trials, chances):
        spread = math.sqrt(count * p * (1 - p))
        assert abs(hit - count * p) <= 4.5 * spread + 1e-9


def test_bytes_are_asked_for() -> None:
    choices = Choices(torch.zeros(1, dtype=torch.long), torch.ones(1, 2).bool(), torch.ones(1, 2))
    with pytest.raises(DataError, match="uint8"):
        autoaugment(torch.rand(1, 3, 8, 8), choices)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_crops_are_slices_of_the_padded_image(mode: str, dtype: torch.dtype) -> None:
    x = pictures(40, 8).to(dtype)
    got = crop_and_flip(x, pad=2, mode=mode, flip=True, generator=torch.Generator().manual_seed(3))
    padded = F.pad(x.double(), (2, 2, 2, 2), **({"mode": "reflect"} if mode == "reflect" else {})).to(dtype)
    seen = set()
    for i in range(len(x)):
        found = []
        for dy in range(5):
            for dx in range(5):
                window = padded[i, :, dy : dy + 8, dx : dx + 8]
                found += [(dy, dx, f) for f in (0, 1) if torch.equal(got[i], window.flip(2) if f else window)]
        assert found
        seen.add(found[0])
    assert got.dtype == dtype
    assert len(seen) > 15


@pytest.mark.statistical
def test_shifts_and_mirrors_are_uniform() -> None:
    """A lone bright pixel tells the shift: 25 positions and the mirror, |z| < 4.5, false alarm below 0.0002."""
    n = 5_000
    x = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    x[:, 0, 4, 4] = 1
    got = crop_and_flip(x, pad=2, flip=True, generator=torch.Generator().manual_seed(4))
    counts = got.flatten(1).sum(0).view(9, 9)[2:7, 2:7].flatten().tolist()
    assert_z(counts, [n] * 25, [1 / 25] * 25)
    x = torch.zeros(n, 1, 3, 3, dtype=torch.uint8)
    x[:, 0, 1, 0] = 1
    mirrored = crop_and_flip(x, pad=0, flip=True, generator=torch.Generator().manual_seed(5))[:, 0, 1, 2]
    assert_z([int(mirrored.sum())], [n], [0.5])


def test_nothing_to_do() -> None:
    x = pictures(2, 8)
    assert crop_and_flip(x, pad=0, flip=False, generator=torch.Generator()) is x
