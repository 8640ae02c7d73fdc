"""Random crops after padding, and mirror images, of a whole batch in one gather."""

from __future__ import annotations

import torch
from torch import Tensor


def crop_and_flip(
    images: Tensor, *, pad: int, mode: str = "zeros", flip: bool = True, generator: torch.Generator
) -> Tensor:
    """Each image [C, H, W] shifted by up to `pad` pixels either way, and mirrored with probability 1/2.

    The same as padding by `pad` ("zeros" or "reflect") and cropping at a uniform offset. Type and device are those of
    `images`; nothing waits for the device.
    """
    count, channels, height, width = images.shape
    device = images.device
    if pad == 0 and not flip:
        return images
    rows = torch.arange(height, device=device).expand(count, height)
    columns = torch.arange(width, device=device).expand(count, width)
    if pad:
        shift = torch.randint(-pad, pad + 1, (2, count, 1), generator=generator, device=device)
        rows, columns = rows + shift[0], columns + shift[1]
    if flip:
        mirrored = torch.rand((count, 1), generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if mode == "reflect":
        rows, columns = _reflected(rows, height), _reflected(columns, width)
        inside = None
    else:
        good_rows = (rows >= 0) & (rows < height)
        good_columns = (columns >= 0) & (columns < width)
        inside = good_rows[:, None, :, None] & good_columns[:, None, None, :]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    taken = images.flatten(2).gather(2, index[:, None, :].expand(count, channels, -1)).view_as(images)
    return taken if inside is None else taken * inside.to(taken.dtype)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Positions beyond an edge mirrored at the outermost pixel, which is not repeated."""
    index = index.abs()
    return (size - 1) - ((size - 1) - index).abs()
