"""Batches as the engine wants them, (inputs, targets) of tensors on one device, out of what people have.

Arrays of numpy or torch, as a pair or by name; a map-style Dataset, and whatever else holds samples row by row, as
those of the library `datasets` do; and any re-iterable of batches, each a pair or a dictionary: what a DataLoader
gives, or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from hessdiag.errors import ConfigurationError, DeviceError, DtypeError, EmptyDataError, TargetError, nearest
from hessdiag.problem.forward import mapped

NAMES = ("labels", "label", "targets", "target", "y")
"""Keys under which dictionaries hold their targets, the first that is there."""


def batches(
    source: Any,
    *,
    targets: str | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Fed:
    """(inputs, targets), as often as asked for: `Objective` and `measure` take them.

    `source`: a pair of arrays, or a dictionary of them; a Dataset of torch or of the library `datasets`, or a list of
    rows; or batches. `targets` is the key of the targets in dictionaries, the other entries then being the inputs, a
    single one as it is; by default "labels" and its like. Floating-point tensors become `dtype`; integers stay what
    they are, so that class numbers and tokens keep their meaning.

    >>> import numpy
    >>> fed = batches((numpy.zeros((5, 3)), numpy.arange(5)), batch_size=2)
    >>> [(len(x), y.tolist()) for x, y in fed]
    [(2, [0, 1]), (2, [2, 3]), (1, [4])]
    """
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ConfigurationError(f"batch_size={batch_size!r}: a whole number of samples is needed")
    return Fed(source, targets, int(batch_size), _device(device), dtype)


class Fed:
    """A re-iterable of (inputs, targets)."""

    def __init__(
        self, source: Any, targets: str | None, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.targets, self.batch_size, self.device, self.dtype = targets, batch_size, device, dtype
        if isinstance(source, Iterator):
            raise ConfigurationError("an iterator gives its batches once, and several passes are needed: list(...) it")
        if not holds_samples(source):
            raise ConfigurationError(f"{type(source).__name__} holds no samples: give arrays, a Dataset or batches")
        self.source = source

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        whole = self._whole()
        if whole is None:
            for index, batch in enumerate(in_batches(self.source, self.batch_size, self.targets)):
                inputs, targets = self._split(batch, f"batch {index}")
                yield self._tensors(inputs), self._target(targets, index)
            return
        inputs, targets = whole
        count = _length(targets)
        if count is None:
            raise TargetError(
                f"the targets are {_one(targets)}, not one for each sample; give an array of as many as inputs"
            )
        for name, value in inputs.items() if isinstance(inputs, dict) else [("", inputs)]:
            told = f" {name!r}" if name else ""
            if isinstance(value, list) and any(isinstance(part, list) for part in value):
                raise ConfigurationError(f"the inputs{told} are lists of unequal lengths: pad or crop them to one")
            held = _length(value)
            if held is None:
                raise TargetError(f"the inputs{told} are {_one(value)}, not one for each of {count} targets")
            if held != count:
                raise TargetError(f"{held} inputs{told} but {count} targets")
        if count == 0:
            raise EmptyDataError("the arrays hold no samples")
        for index, start in enumerate(range(0, count, self.batch_size)):
            here = slice(start, start + self.batch_size)
            cut = {key: x[here] for key, x in inputs.items()} if isinstance(inputs, dict) else inputs[here]
            yield self._tensors(cut), self._target(targets[here], index)

    def _whole(self) -> tuple[Any, Any] | None:
        """(inputs, targets) where the source is arrays with all samples."""
        if isinstance(self.source, Mapping):
            inputs, targets = self._split(self.source, "the dictionary")
        elif _is_pair(self.source):
            inputs, targets = self.source
        else:
            return None
        if isinstance(inputs, Mapping):
            return {key: _array(value) for key, value in inputs.items()}, _array(targets)
        return _array(inputs), _array(targets)

    def _split(self, batch: Any, where: str) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            keys = [str(key) for key in batch]
            found = self.targets or _target_key(batch)
            if found is None or found not in batch:
                hint = nearest(found, keys) if found else f"it holds {', '.join(keys)}: say targets=..."
                raise ConfigurationError(f"{where} has no entry of targets; {hint}")
            rest = {key: value for key, value in batch.items() if key != found}
            return (next(iter(rest.values())) if len(rest) == 1 else rest), batch[found]
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ConfigurationError(
            f"{where} is neither a pair nor a dictionary but a {type(batch).__name__}{count}: give pairs, e.g. "
            "[(x, y) for x, y, *_ in loader], or dictionaries, whose entries have names"
        )

    def _tensors(self, inputs: Any) -> Any:
        return mapped(inputs, self._tensor, of=(Tensor, np.ndarray))

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc":
                raise DtypeError(
                    f"inputs are an array of {_kind(value)}: give numbers; of text a tokenizer's input_ids, of "
                    "categories numpy.unique(x, return_inverse=True)[1]"
                )
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _target(self, value: Any, index: int) -> Tensor:
        array = np.asarray(value) if isinstance(value, (list, tuple)) else value
        if isinstance(array, np.ndarray) and array.dtype.kind not in "biufc":
            raise TargetError(
                f"targets of batch {index} are {_kind(array)}, no numbers: number the classes over all data, "
                "numpy.unique(y, return_inverse=True)[1]"
            )
        found = self._tensor(array)
        if not isinstance(found, Tensor):
            raise TargetError(f"targets of batch {index} are a {type(value).__name__}, no array")
        return found.long() if found.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32) else found


def _device(device: torch.device | str) -> torch.device:
    """A device that torch knows and that is there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device={device!r}: it is 'cpu', 'cuda', 'cuda:1' or another that torch knows") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device={device!r}: this torch sees no CUDA device; say device='cpu'")
    return found


def _length(value: Any) -> int | None:
    """How many samples it holds, None of what holds one thing."""
    if isinstance(value, (np.ndarray, Tensor)):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, Sized) else None


def _one(value: Any) -> str:
    return "a single number" if isinstance(value, (np.ndarray, Tensor, int, float)) else f"a {type(value).__name__}"


def _kind(array: np.ndarray) -> str:
    return "text" if array.dtype.kind in "UST" else "Python objects" if array.dtype.kind == "O" else str(array.dtype)


def holds_samples(source: Any) -> bool:
    """Can it be gone through, or asked for its samples by number?"""
    return isinstance(source, Iterable) or (hasattr(source, "__len__") and hasattr(source, "__getitem__"))


def in_batches(source: Any, size: int, targets: str | None = None) -> Iterator[Any]:
    """The batches that `source` gives, or its rows put together, `size` at a time.

    Rows are what a Dataset has: map-style ones of torch, those of `datasets` (which have `column_names`), and all
    whose first item has one number as its target. `targets` is the key of that in dictionaries.
    """
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        yield from DataLoader(source, batch_size=size, shuffle=False, collate_fn=_together)
        return
    items = iter(source) if isinstance(source, Iterable) else (source[number] for number in range(len(source)))
    for first in items:
        if hasattr(source, "column_names") or _is_row(first, targets):
            every = chain([first], items)
            while rows := list(islice(every, size)):
                yield _together(rows)
        else:
            yield first


def _is_row(item: Any, targets: str | None) -> bool:
    """Is it one sample, its target one number?"""
    if isinstance(item, Mapping):
        value = item.get(targets or _target_key(item))
    else:
        value = item[1] if isinstance(item, (tuple, list)) and len(item) == 2 else None
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 0
    return isinstance(value, (bool, int, float, np.generic))


def _target_key(item: Mapping[Any, Any]) -> str | None:
    return next((name for name in NAMES if name in item), None)


def _together(rows: list[Any]) -> Any:
    """Rows as one batch, as a DataLoader has it; lists of numbers are arrays, not so many columns."""
    try:
        return default_collate([_listless(row) for row in rows])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"the samples cannot be stacked ({str(error).splitlines()[0]}): make them alike, by padding or cropping, "
            "or give a DataLoader that does (collate_fn)"
        ) from None


def _listless(row: Any) -> Any:
    if isinstance(row, Mapping):
        return {key: _array(value) for key, value in row.items()}
    return tuple(_listless(part) for part in row) if isinstance(row, tuple) else _array(row)


def _array(value: Any) -> Any:
    """Lists of numbers, and of such lists, as an array; what else there is as it is."""
    if not isinstance(value, list) or any(isinstance(part, (Tensor, np.ndarray)) for part in value):
        return value
    try:
        found = np.asarray(value)
    except ValueError:  # of unequal lengths
        return value
    return found if found.dtype.kind in "biuf" else value


def _is_pair(source: Any) -> bool:
    """All inputs and the array of all targets; of two batches the second is a pair or a dictionary."""
    pair = isinstance(source, (tuple, list)) and len(source) == 2
    return pair and isinstance(source[1], (np.ndarray, Tensor))
