"""A data set in memory: what was chosen, under which hash, and its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from hessdiag.errors import (
    ConfigurationError,
    DataError,
    DtypeError,
    EmptyDataError,
    NonFiniteError,
    TargetError,
)
from hessdiag.problem.losses import IGNORE, LOSSES


@dataclass(frozen=True)
class Reading:
    """How a loss reads targets: integers as class numbers, of which `ignored` does not count, or as plain values; what
    a loss of the user's `own` wants of them nobody knows.
    """

    values: bool = False
    ignored: int = IGNORE
    own: bool = False

    @classmethod
    def of(cls, loss: str, ignore_index: int = IGNORE) -> Reading:
        """The reading of a loss by its name; one of the user's own may want class numbers."""
        return cls(loss in LOSSES and loss != "cross_entropy", ignore_index, loss not in LOSSES)


CLASSES = Reading()


@dataclass(frozen=True, eq=False)
class DataSet:
    """Inputs and targets, held in memory, with what is known about where they come from.

    `inputs` are torch.uint8 (0 to 255) or floating point, [N, C, H, W] for images; `targets` are int64 class
    numbers [N]; or, one for each place of a sample, [N, ...]; or floating point for regression. Of the latter two
    `num_classes` is None unless the file says it. `sha256` covers both, with types and shapes.
    """

    inputs: Tensor
    targets: Tensor
    name: str
    split: str
    num_classes: int | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def sha256(self) -> str:
        """sha256 over type, shape and values (row-major) of inputs, then of targets."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Batches:
        """Batches in order, as often as they are asked for; uint8 inputs are divided by 255 in `dtype`."""
        check_batches(batch_size, dtype)
        return Batches(self.inputs, self.targets, batch_size, torch.device(device), dtype)

    def sample(self, samples: int | None, *, seed: int = 0) -> DataSet:
        """`samples` of these chosen at random without replacement, in their original order; None is all of
        them.
        """
        if samples is None:
            return self
        rows = chosen(self, samples, seed)
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])


@dataclass(frozen=True, eq=False)
class Batches:
    """A re-iterable of (inputs in [0, 1], targets); every pass gives the same batches."""

    inputs: Tensor
    targets: Tensor
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.inputs), self.batch_size):
            inputs = self.inputs[start : start + self.batch_size].to(self.device)
            targets = self.targets[start : start + self.batch_size].to(self.device)
            yield (
                scaled(inputs, self.dtype).to(self.dtype),
                targets.to(self.dtype) if targets.is_floating_point() else targets,
            )


def check_batches(batch_size: int, dtype: torch.dtype) -> None:
    """Refuse batches of nothing, and inputs that are to be no floating-point numbers."""
    if batch_size < 1:
        raise ConfigurationError(f"batch size {batch_size}: it must be at least 1")
    if not dtype.is_floating_point:
        raise DtypeError(f"batches of {dtype}: inputs must be floating point")


def scaled(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels in [0, 1], divided in the wanted type: float64 batches carry k/255 to the last bit. All else as it is."""
    return inputs.to(dtype).div_(255) if inputs.dtype == torch.uint8 else inputs


GREY = "grey images [N, H, W] were read as [N, 1, H, W]"


def to_images(inputs: Tensor, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """uint8 images as [N, C, H, W]: [N, H, W] gains a channel, [N, H, W, C] turned if only that can be meant.

    C is 1 or 3. Where both the second and the last dimension could be channels, nothing is guessed. Floats
    are not touched: they may be features, so they are taken as they stand.
    """
    if inputs.dtype != torch.uint8 or inputs.ndim not in (3, 4):
        return inputs, ()
    if inputs.ndim == 3:
        return inputs[:, None], (GREY,)
    first, last = inputs.shape[1] in (1, 3), inputs.shape[3] in (1, 3)
    if first and last:
        raise DataError(
            f"{name}: uint8 images of shape {tuple(inputs.shape)} may have their channels second or last; "
            "store them as [N, C, H, W] floats in [0, 1]"
        )
    if last:
        return inputs.permute(0, 3, 1, 2).contiguous(), ("channels-last images were turned to [N, C, H, W]",)
    return inputs, ()


class _Rows(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    def __len__(self) -> int: ...


def chosen(data: _Rows, samples: int, seed: int) -> Tensor:
    """The numbers of `samples` rows chosen at random without replacement, in order."""
    if samples < 1:
        raise ConfigurationError(f"samples = {samples}: it must be at least 1")
    if samples > len(data):
        raise DataError(f"{data.name} ({data.split}) has {len(data)} samples, fewer than the {samples} asked for")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(data), generator=generator)[:samples].sort().values


def make(
    inputs: Tensor,
    targets: Tensor,
    *,
    name: str,
    split: str,
    num_classes: int | None = None,
    notes: tuple[str, ...] = (),
    reading: Reading = CLASSES,
) -> DataSet:
    """A DataSet of checked tensors: finite inputs, one row of targets each, classes counted; refuses what cannot be
    measured.
    """
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise DataError(f"{name}: inputs and targets must be tensors or arrays")
    inputs, targets = inputs.detach().cpu(), targets.detach().cpu()
    if inputs.ndim < 2 or targets.ndim < 1:
        raise DataError(
            f"{name}: inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} are no [N, ...] and [N]"
        )
    if len(inputs) != len(targets):
        raise DataError(f"{name}: {len(inputs)} inputs and {len(targets)} targets")
    if inputs.numel() == 0:
        raise EmptyDataError(f"{name}: no samples in inputs of shape {tuple(inputs.shape)}")
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise DataError(
            f"{name}: inputs are {inputs.dtype}; store images as uint8 (0 to 255) or as floats in [0, 1], "
            "and tokens under their own name (input_ids)"
        )
    if inputs.dtype in (torch.float16, torch.bfloat16):
        inputs = inputs.float()
    if inputs.is_floating_point():
        refuse_non_finite(inputs, f"{name}: inputs")
        low, high = float(inputs.min()), float(inputs.max())
        if low < 0 or high > 1:
            notes = (*notes, f"inputs span [{low:.4g}, {high:.4g}], not [0, 1]; they are used as they are")
    targets, classes, more = make_targets(targets, num_classes, name, reading)
    return DataSet(inputs, targets, name, split, classes, (*notes, *more))


def make_targets(
    targets: Tensor, num_classes: int | None, name: str, reading: Reading = CLASSES
) -> tuple[Tensor, int | None, tuple[str, ...]]:
    """Checked targets and what is to be said of them: finite floats; class numbers [N], counted; or those of several
    places, [N, ...]: which shape and which of them a model's outputs want, the loss knows.
    """
    targets = targets.detach().cpu()
    if targets.ndim < 1 or len(targets) == 0:
        raise EmptyDataError(f"{name}: no samples in targets of shape {tuple(targets.shape)}")
    if targets.is_floating_point():
        refuse_non_finite(targets, f"{name}: targets")
        return targets, None, ()
    if reading.values and not targets.is_complex():
        return targets.to(torch.float64), None, ()
    if targets.is_complex() or targets.dtype == torch.bool:
        raise TargetError(f"{name}: targets are {targets.dtype}; class numbers are integers")
    notes: tuple[str, ...] = ()
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets, notes = targets[:, 0], ("targets of shape [N, 1] were read as [N]",)
    targets = targets.to(torch.int64)  # uint64 beyond int64 turns negative and is refused
    if targets.ndim > 1:
        return targets, num_classes, notes
    counted = targets[targets != reading.ignored]
    if len(counted) == 0:
        raise EmptyDataError(f"{name}: all targets are {reading.ignored}, the number of those that do not count")
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= 1_000_000:
        hint = "; does -1 mark what does not count? say ignore_index=-1 (--ignore-index -1)" if low == -1 else ""
        raise TargetError(f"{name}: class numbers span {low} to {high}; they count from 0{hint}")
    if num_classes is None:
        num_classes = high + 1
        notes = (*notes, f"{num_classes} classes, taken from the largest target")
    if high >= num_classes:
        raise TargetError(f"{name}: class {high} among the targets of {num_classes} classes")
    return targets, num_classes, notes


def refuse_non_finite(values: Tensor, what: str) -> None:
    """NonFiniteError saying how many values are NaN or infinite, and in which sample first."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        first = int(bad.reshape(len(values), -1).any(1).nonzero()[0])
        raise NonFiniteError(f"{what} hold {int(bad.sum())} NaN or infinite values, the first in sample {first}")
