"""Training images on the device, as bytes where they are bytes; batches augmented there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.augment import autoaugment, crop_and_flip, draw
from experiments.config import TrainConfig
from experiments.methods import METHODS
from experiments.seeds import generator
from hessdiag.data.dataset import DataSet
from hessdiag.errors import DataError


@dataclass(frozen=True, eq=False)
class Images:
    """Inputs [N, C, H, W] and labels on a device, with the type in which the network wants them."""

    inputs: Tensor
    labels: Tensor
    classes: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.inputs)

    def plain(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] without augmentation, and labels."""
        return as_floats(self.inputs.index_select(0, index), self.dtype), self.labels.index_select(0, index)


def on_device(data: DataSet, config: TrainConfig, device: torch.device) -> Images:
    """The data set as `Images`, refused unless it is made of classes and of pixels in [0, 1]."""
    if data.num_classes is None or data.targets.is_floating_point():
        raise DataError(f"{data.name}: training needs class labels, not {data.targets.dtype} targets")
    if data.inputs.ndim != 4:
        raise DataError(f"{data.name}: training needs images [N, C, H, W], not {list(data.inputs.shape)}")
    dtype = getattr(torch, config.dtype)
    inputs = data.inputs
    if inputs.dtype != torch.uint8:
        low, high = (float(bound) for bound in torch.aminmax(inputs))
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"{data.name}: pixels must lie in [0, 1], found [{low:.4g}, {high:.4g}]; store them so and let "
                "normalize = [[means], [deviations]] do the rest inside the network"
            )
        inputs = inputs.to(dtype)
        if config.augment.auto != "none":
            raise DataError(f"{data.name}: AutoAugment needs uint8 images, these are {data.inputs.dtype}")
    if config.augment.pad == "reflect" and config.augment.crop >= min(inputs.shape[2:]):
        raise DataError(f"{data.name}: cannot reflect {config.augment.crop} pixels of images {list(inputs.shape[2:])}")
    return Images(inputs.to(device), data.targets.to(device), data.num_classes, dtype)


def as_floats(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes divided by 255; floats as they are."""
    return images.to(dtype).div_(255) if images.dtype == torch.uint8 else images.to(dtype)


class Sampler:
    """Batches of one epoch: a permutation keyed by (seed, epoch), augmentation keyed by (seed, epoch, step)."""

    def __init__(self, images: Images, config: TrainConfig, index: Tensor, *, views: int) -> None:
        self.images, self.config, self.index, self.views = images, config, index, views
        # Where a method counts views of its own, AutoAugment is theirs alone, also where it is told to have none.
        self._auto = METHODS[config.method].view_option is None
        size, count = config.batch_size, len(index)
        self.steps = count // size if config.drops_last else -(-count // size)
        if self.steps == 0:
            raise DataError(f"{count} training images give no batch of {size} with drop_last; lower batch_size")

    @property
    def per_epoch(self) -> int:
        """How many images one epoch shows."""
        return min(self.steps * self.config.batch_size, len(self.index))

    def order(self, epoch: int) -> Tensor:
        """The epoch's permutation of the training images, on the device."""
        host = generator("cpu", self.config.seed, "order", epoch)
        shuffled = torch.randperm(len(self.index), generator=host)
        device = self.images.inputs.device
        return self.index.index_select(0, shuffled.to(device))

    def batch(self, order: Tensor, epoch: int, step: int) -> tuple[list[Tensor], Tensor]:
        """The views of one batch, each in [0, 1], and its labels."""
        size = self.config.batch_size
        index = order[step * size : (step + 1) * size]
        raw = self.images.inputs.index_select(0, index)
        result = [self._augmented(raw, epoch, step, view=0, auto=self._auto)]
        result += [self._augmented(raw, epoch, step, view=v, auto=True) for v in range(1, self.views + 1)]
        return result, self.images.labels.index_select(0, index)

    def _augmented(self, raw: Tensor, epoch: int, step: int, *, view: int, auto: bool) -> Tensor:
        settings, seed = self.config.augment, self.config.seed
        place = settings.auto if auto else "none"
        images = raw
        if place != "none":
            host = generator("cpu", seed, "autoaugment", epoch, step, view)
            choices = draw(len(raw), host)
        if place == "before":
            images = autoaugment(images, choices)
        if settings.crop or settings.flip:
            chance = generator(raw.device, seed, "crop", epoch, step, view)
            images = crop_and_flip(images, pad=settings.crop, mode=settings.pad, flip=settings.flip, generator=chance)
        if place == "after":
            images = autoaugment(images, choices)
        return as_floats(images, self.images.dtype)
