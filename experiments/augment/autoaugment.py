"""AutoAugment for CIFAR on the device, one group of images per operation instead of one image at a time.

Choices are drawn on the host, so that the groups are known without waiting for the device; pixels never leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from experiments.augment import colour, geometry
from experiments.augment.policy import POLICY, SIGNED, magnitude
from hessdiag.errors import DataError

Operation = Callable[[Tensor, Tensor], Tensor]

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "invert": colour.invert,
        "posterize": colour.posterize,
        "solarize": colour.solarize,
        "brightness": colour.brightness,
        "color": colour.color,
        "contrast": colour.contrast,
        "sharpness": colour.sharpness,
        "autocontrast": colour.autocontrast,
        "equalize": colour.equalize,
        "translate_x": geometry.translate_x,
        "translate_y": geometry.translate_y,
        "shear_x": geometry.shear_x,
        "shear_y": geometry.shear_y,
        "rotate": geometry.rotate,
    }
)


@dataclass(frozen=True)
class Choices:
    """For each image a sub-policy, whether each of its two steps is taken, and the sign of each magnitude."""

    policy: Tensor
    taken: Tensor
    sign: Tensor


def draw(count: int, generator: torch.Generator) -> Choices:
    """Uniform sub-policies, steps taken with their probabilities, signs by fair coins; `generator` is the host's."""
    policy = torch.randint(len(POLICY), (count,), generator=generator)
    chances = torch.tensor([[step[1] for step in pair] for pair in POLICY])[policy]
    taken = torch.rand((count, 2), generator=generator) < chances
    sign = 1.0 - 2.0 * torch.randint(2, (count, 2), generator=generator)
    return Choices(policy, taken, sign)


def autoaugment(images: Tensor, choices: Choices) -> Tensor:
    """The images after the two steps of their sub-policies."""
    if images.dtype != torch.uint8:
        raise DataError(f"AutoAugment works on uint8 images [N, C, H, W], not {images.dtype}")
    result = images
    for place in range(2):
        result = _step(result, choices, place)
    return result


def _step(images: Tensor, choices: Choices, place: int) -> Tensor:
    groups: dict[str, tuple[list[int], list[float]]] = {}
    rows = zip(choices.policy.tolist(), choices.taken[:, place].tolist(), choices.sign[:, place].tolist())
    for index, (policy, taken, sign) in enumerate(rows):
        if taken:
            name, _, level = POLICY[policy][place]
            members, amounts = groups.setdefault(name, ([], []))
            members.append(index)
            amounts.append(magnitude(name, level) * (sign if name in SIGNED else 1.0))
    result = images.clone()
    for name in sorted(groups):
        members, amounts = groups[name]
        where = torch.tensor(members).to(images.device, non_blocking=True)
        amount = torch.tensor(amounts, dtype=torch.float64).to(images.device, non_blocking=True)
        result.index_copy_(0, where, OPERATIONS[name](images.index_select(0, where), amount))
    return result
