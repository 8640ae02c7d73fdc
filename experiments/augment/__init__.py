"""Augmentation of image batches on their own device."""

from experiments.augment.autoaugment import Choices, autoaugment, draw
from experiments.augment.crops import crop_and_flip

__all__ = ["Choices", "autoaugment", "crop_and_flip", "draw"]
