"""Shears, shifts and rotations of uint8 images [N, C, H, W], uncovered pixels grey (128), as Pillow samples them.

Each output pixel with centre (x + 1/2, y + 1/2) takes the input at the affine image of that point. Shears interpolate
with Pillow's cubic kernel, shifts and rotations take the pixel that holds the point.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FILL = 128


def translate_x(images: Tensor, share: Tensor) -> Tensor:
    """Sample `share` of the width further right."""
    return _nearest(images, _matrix(images, shift_x=share.to(images.device) * images.shape[3]))


def translate_y(images: Tensor, share: Tensor) -> Tensor:
    """Sample `share` of the height further down."""
    # The public code multiplies by the height here, by the width above.
    return _nearest(images, _matrix(images, shift_y=share.to(images.device) * images.shape[2]))


def shear_x(images: Tensor, amount: Tensor) -> Tensor:
    """Sample at (x + amount y, y)."""
    return _bicubic(images, _matrix(images, xy=amount.to(images.device)))


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """Sample at (x, y + amount x)."""
    return _bicubic(images, _matrix(images, yx=amount.to(images.device)))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn counter-clockwise around the centre."""
    height, width = images.shape[2:]
    angle = -degrees.to(images.device, torch.float64) * (math.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    middle_x, middle_y = width / 2.0, height / 2.0
    shift_x = middle_x - (cosine * middle_x + sine * middle_y)
    shift_y = middle_y - (-sine * middle_x + cosine * middle_y)
    return _nearest(images, torch.stack([cosine, sine, shift_x, -sine, cosine, shift_y], 1))


def _matrix(
    images: Tensor,
    *,
    xy: Tensor | None = None,
    shift_x: Tensor | None = None,
    yx: Tensor | None = None,
    shift_y: Tensor | None = None,
) -> Tensor:
    """Rows (a, b, c, d, e, f): the point (x, y) is sampled at (a x + b y + c, d x + e y + f)."""
    matrix = torch.zeros(len(images), 6, dtype=torch.float64, device=images.device)
    matrix[:, 0] = matrix[:, 4] = 1.0
    for column, value in ((1, xy), (2, shift_x), (3, yx), (5, shift_y)):
        if value is not None:
            matrix[:, column] = value.to(torch.float64)
    return matrix


def _points(images: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device, dtype=torch.float64)[None, None, :] + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float64)[None, :, None] + 0.5
    a, b, c, d, e, f = (column.view(-1, 1, 1) for column in matrix.unbind(1))
    return a * x + b * y + c, d * x + e * y + f


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    height, width = images.shape[2:]
    index = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).flatten(1)
    return images.flatten(2).gather(2, index[:, None, :].expand(-1, images.shape[1], -1)).view_as(images)


def _inside(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    height, width = images.shape[2:]
    return ((x >= 0) & (x < width) & (y >= 0) & (y < height))[:, None]


def _nearest(images: Tensor, matrix: Tensor) -> Tensor:
    x, y = _points(images, matrix)
    taken = _take(images, y.floor().long(), x.floor().long())
    return torch.where(_inside(images, x, y), taken, FILL)


def _bicubic(images: Tensor, matrix: Tensor) -> Tensor:
    x, y = _points(images, matrix)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    total = torch.zeros(images.shape, dtype=torch.float64, device=images.device)
    for j in range(4):
        weight_y = _cubic((y - 0.5 - top), j)
        for i in range(4):
            weight = weight_y * _cubic((x - 0.5 - left), i)
            pixel = _take(images, (top + (j - 1)).long(), (left + (i - 1)).long())
            total += weight[:, None] * pixel
    value = total.clamp(0, 255).to(torch.uint8)  # truncated, as Pillow does
    return torch.where(_inside(images, x, y), value, FILL)


def _cubic(d: Tensor, tap: int) -> Tensor:
    """Weight of tap 0..3 at the offset d in [0, 1) from tap 1, by the kernel of Pillow's transform (a = -1)."""
    v1, v2, v3, v4 = (1.0 if tap == k else 0.0 for k in range(4))
    p1, p2 = v2, -v1 + v3
    p3, p4 = 2 * (v1 - v2) + v3 - v4, -v1 + v2 - v3 + v4
    return p1 + d * (p2 + d * (p3 + d * p4))
