"""Which arrays of a file are inputs and which are targets, and data sets whose inputs are several named arrays.

A file says it by its names: `inputs` and `targets`, `images` and `labels`; or targets under one of the names that
`hessdiag.feed` knows, and the other arrays are inputs. Where it does not, the user does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hessdiag.data.dataset import (
    CLASSES,
    DataSet,
    Reading,
    check_batches,
    chosen,
    make,
    make_targets,
    refuse_non_finite,
    scaled,
    to_images,
)
from hessdiag.errors import ConfigurationError, DataError, TargetError, nearest
from hessdiag.feed import NAMES
from hessdiag.store.files import shown

PAIRS = (("inputs", "targets"), ("images", "labels"))
COUNT = "num_classes"
MOST = 32
"""Inputs that a model may take."""


@dataclass(frozen=True)
class Arrays:
    """Which arrays the user says are meant, None leaving it to their names, and how the loss reads the targets."""

    inputs: tuple[str, ...] | None = None
    targets: str | None = None
    reading: Reading = CLASSES

    @classmethod
    def of(cls, inputs: Sequence[str] | None, targets: str | None, reading: Reading = CLASSES) -> Arrays:
        """From what was given to `load`."""
        if inputs is not None and (isinstance(inputs, str) or not inputs or len(set(inputs)) < len(inputs)):
            raise ConfigurationError(f"inputs={inputs!r}: the names of arrays, each once")
        return cls(None if inputs is None else tuple(inputs), targets, reading)

    @property
    def given(self) -> bool:
        """Has the user said anything?"""
        return self.inputs is not None or self.targets is not None

    def choose(self, held: Iterable[str], where: str) -> tuple[tuple[str, ...], str]:
        """The names of the inputs and of the targets, among those that are held."""
        names = [name for name in held if name != COUNT]
        told = ", ".join(shown(name)[1:-1] for name in names[:8]) + (", ..." if len(names) > 8 else "")
        for name in (*(self.inputs or ()), *((self.targets,) if self.targets else ())):
            if name not in names:
                raise DataError(f"{where}: no array {name!r}; {nearest(name, [shown(n)[1:-1] for n in names[:50]])}")
        if not self.given:
            pairs = [pair for pair in PAIRS if pair[0] in names and pair[1] in names]
            if len(pairs) == 1:
                return (pairs[0][0],), pairs[0][1]
            if pairs:
                raise DataError(f"{where}: holds {told}: say which are meant by inputs= and targets= (--inputs images)")
        targets = self.targets or next((name for name in NAMES if name in names), None)
        rest = [name for name in names if name != targets]
        if targets is None:
            guess = next((name for name in names if name.lower().startswith(("y", "label", "target"))), None)
            more = f"say which are the targets: targets= (--targets {shown(guess)[1:-1] if guess else 'NAME'})"
            raise DataError(f"{where}: wants arrays 'inputs' and 'targets', it has {told or 'none'}; {more}")
        inputs = self.inputs or tuple(rest)
        if targets in inputs:
            raise ConfigurationError(f"{where}: {targets!r} cannot be input and target at once")
        if not inputs:
            raise DataError(f"{where}: holds {told} alone: targets without inputs")
        if len(inputs) > MOST:
            raise DataError(f"{where}: {len(inputs)} arrays beside {targets!r}: say inputs= (--inputs NAME,NAME)")
        return inputs, targets


@dataclass(frozen=True, eq=False)
class NamedDataSet:
    """As `DataSet`, but `inputs` are several arrays by name, or one that is not images: floats as they are, uint8 as
    pixels 0 to 255, integers (tokens) and truth values (masks) unchanged.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor
    name: str
    split: str
    num_classes: int | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def sha256(self) -> str:
        """sha256 over name, type, shape and values (row-major) of every input, then of the targets."""
        digest = hashlib.sha256()
        for name, tensor in (*self.inputs.items(), ("", self.targets)):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> NamedBatches:
        """Batches in order, as often as they are asked for."""
        check_batches(batch_size, dtype)
        return NamedBatches(self.inputs, self.targets, batch_size, torch.device(device), dtype)

    def sample(self, samples: int | None, *, seed: int = 0) -> NamedDataSet:
        """As `DataSet.sample`."""
        if samples is None:
            return self
        rows = chosen(self, samples, seed)
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, targets=self.targets[rows])


@dataclass(frozen=True, eq=False)
class NamedBatches:
    """A re-iterable of ({name: inputs}, targets); every pass gives the same batches."""

    inputs: Mapping[str, Tensor]
    targets: Tensor
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    def __len__(self) -> int:
        return -(-len(self.targets) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for start in range(0, len(self.targets), self.batch_size):
            end = start + self.batch_size
            inputs = {name: self._on_device(tensor[start:end]) for name, tensor in self.inputs.items()}
            targets = self.targets[start:end].to(self.device)
            yield inputs, targets.to(self.dtype) if targets.is_floating_point() else targets

    def _on_device(self, tensor: Tensor) -> Tensor:
        tensor = scaled(tensor.to(self.device), self.dtype)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def of_table(
    table: Mapping[str, Tensor],
    which: tuple[tuple[str, ...], str],
    *,
    name: str,
    split: str,
    reading: Reading = CLASSES,
) -> DataSet | NamedDataSet:
    """The data set of these arrays: a plain one where the inputs are one array of floats or pixels."""
    inputs, targets = which
    count = class_count(table.get(COUNT), name)
    first = table[inputs[0]]
    pixels = any(table[key].dtype == torch.uint8 for key in inputs)
    more = _bytes_as_targets(table[targets], pixels, reading, name)
    if len(inputs) == 1 and (first.is_floating_point() or first.dtype == torch.uint8 or inputs[0] in _CONVENTIONAL):
        divided = _pixels(first, f"{name}: input {inputs[0]!r}") if pixels else ()
        first, notes = to_images(first, name)
        notes += divided + more
        return make(first, table[targets], name=name, split=split, num_classes=count, notes=notes, reading=reading)
    found, classes, notes = make_targets(table[targets], count, name, reading)
    notes += more
    named: dict[str, Tensor] = {}
    for key in inputs:
        named[key], more = _input(table[key], f"{name}: input {key!r}", len(found))
        notes += more
    return NamedDataSet(named, found, name, split, classes, notes)


def class_count(value: Tensor | None, where: str) -> int | None:
    """The number of classes that a file declares."""
    if value is None:
        return None
    if value.numel() != 1 or value.is_floating_point() or int(value) < 1:
        raise DataError(f"{where}: num_classes must be one positive integer")
    return int(value)


_CONVENTIONAL = tuple(pair[0] for pair in PAIRS)


def _pixels(value: Tensor, what: str) -> tuple[str, ...]:
    """What is said of bytes that become pixels; those that can be none are refused."""
    if value.numel() and int(value.max()) <= 1:
        raise DataError(
            f"{what} is uint8 of 0 and 1, which as pixels would be black: store a mask as bool or int64, features as "
            "floats"
        )
    return (f"{what.rpartition(': ')[2]} is uint8 and divided by 255",)


def _bytes_as_targets(targets: Tensor, pixels: bool, reading: Reading, name: str) -> tuple[str, ...]:
    """What is said of bytes that are the loss's values, which nothing divides; refused where they look like pixels:
    they are images, or the inputs are bytes, `pixels`, and are divided.
    """
    values = reading.values or (reading.own and targets.ndim > 1)
    if not values or targets.dtype != torch.uint8 or targets.numel() == 0 or int(targets.max()) <= 1:
        return ()
    if reading.values and (pixels or targets.ndim > 2):
        raise TargetError(
            f"{name}: targets are uint8 up to {int(targets.max())}, and targets are not divided by 255 as inputs are: "
            "store floats in [0, 1] if they are pixels, int64 if they are numbers as they stand"
        )
    return ("targets are uint8 and taken as they stand, not divided by 255",)


def _input(value: Tensor, what: str, rows: int) -> tuple[Tensor, tuple[str, ...]]:
    """One array by name, refused where it cannot be what a model takes."""
    value = value.detach().cpu()
    if value.ndim < 1 or len(value) != rows:
        held = f"{len(value)} rows" if value.ndim else "one number"
        raise DataError(f"{what} has {held}, the targets {rows}: say which arrays are inputs (inputs=, --inputs A,B)")
    if value.dtype == torch.uint8:
        return value, _pixels(value, what)
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if value.is_floating_point():
        refuse_non_finite(value, what)
    elif value.is_complex():
        raise DataError(f"{what} is complex")
    elif value.dtype != torch.bool:
        value = value.to(torch.int64)
    return value, ()
