"""Operations on the values of uint8 images [N, C, H, W], by the rounding rules of Pillow's ImageOps and ImageEnhance.

Each takes one magnitude per image and leaves type, shape and device as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def invert(images: Tensor, amount: Tensor) -> Tensor:
    """255 - x."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` bits."""
    step = torch.pow(2, 8 - _column(bits.long(), images))
    return (images.long() // step * step).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values at or above the threshold."""
    return torch.where(images >= _column(threshold, images), 255 - images, images)


def grey(images: Tensor) -> Tensor:
    """Luma by Pillow's integer weights: (19595 R + 38470 G + 7471 B + 32768) >> 16; grey images as they are."""
    if images.shape[1] != 3:
        return images[:, :1]
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    """Blend from black."""
    return _blend(torch.zeros_like(images), images, 1 + amount)


def color(images: Tensor, amount: Tensor) -> Tensor:
    """Blend from the grey image."""
    return _blend(grey(images).expand_as(images), images, 1 + amount)


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Blend from the mean luma, rounded."""
    mean = (grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean.expand(images.shape), images, 1 + amount)


def sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """Blend from the image smoothed by (1 1 1; 1 5 1; 1 1 1)/13, whose border is left alone."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5.0
    channels = images.shape[1]
    if min(images.shape[2:]) < 3:
        return images
    sums = F.conv2d(images.float(), kernel.expand(channels, 1, 3, 3), groups=channels)
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (sums.round() / 13.0 + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return _blend(smooth, images, 1 + amount)


def autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    """Stretch each channel so that its darkest value is 0 and its brightest 255."""
    low = images.amin((2, 3), keepdim=True).double()
    high = images.amax((2, 3), keepdim=True).double()
    span = high - low
    # Not 255.0 / span, which torch computes as 255 times the reciprocal: one ulp may cost a grey level.
    scale = torch.full_like(span, 255.0).div(span.clamp_min(1))
    stretched = (images.double() * scale - low * scale).trunc().clamp(0, 255).to(torch.uint8)
    return torch.where(span > 0, stretched, images)


def equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Flatten each channel's histogram: v -> (step // 2 + values below v) // step.

    step = (pixels - those of the brightest value) // 255; nothing happens where it is 0 or only one value occurs.
    """
    count, channels = images.shape[:2]
    flat = images.flatten(2).long()
    histogram = torch.zeros(count, channels, 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - histogram.gather(2, brightest)) // 255
    below = histogram.cumsum(2) - histogram
    table = ((step // 2 + below) // step.clamp_min(1)).clamp(0, 255)
    mapped = table.gather(2, flat).to(torch.uint8).view_as(images)
    several = (histogram > 0).sum(2, keepdim=True) > 1
    return torch.where(((step > 0) & several)[..., None], mapped, images)


def _column(amount: Tensor, images: Tensor) -> Tensor:
    return amount.to(images.device).view(-1, 1, 1, 1)


def _blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """First + share (second - first), clipped and truncated as Pillow does."""
    start = first.float()
    mixed = start + _column(share.float(), second) * (second.float() - start)
    return mixed.clamp(0, 255).to(torch.uint8)
