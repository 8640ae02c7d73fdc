"""Batches as the engine wants them, (inputs, targets) of tensors on one device, out of what people have.

Arrays of numpy or torch, a map-style Dataset, and any re-iterable of batches, each a pair or a dictionary: what a
DataLoader gives, or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hessdiag.errors import ConfigurationError, EmptyDataError, TargetError, nearest

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

    `source`: a pair of arrays; a Dataset; or batches. `targets` is the key of the targets where batches are
    dictionaries, the other entries then being the inputs, a single one as it is; by default "labels" and its like.
    Floating-point tensors become `dtype`; integers stay what they are, so that class numbers and tokens keep their
    meaning.

    >>> import numpy
    >>> fed = batches((numpy.zeros((5, 3)), numpy.arange(5)), batch_size=2)
    >>> [(len(x), y.tolist()) for x, y in fed]
    [(2, [0, 1]), (2, [2, 3]), (1, [4])]
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigurationError(f"batch_size={batch_size!r}: a whole number of samples is needed")
    return Fed(source, targets, batch_size, torch.device(device), dtype)


class Fed:
    """A re-iterable of (inputs, targets)."""

    def __init__(
        self, source: Any, targets: str | None, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.targets, self.batch_size, self.device, self.dtype = targets, batch_size, device, dtype
        if isinstance(source, Iterator):
            raise ConfigurationError("an iterator gives its batches once, and several passes are needed: list(...) it")
        if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
            source = DataLoader(source, batch_size=batch_size, shuffle=False)
        self.source = source

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        if _is_pair_of_arrays(self.source):
            inputs, targets = self.source
            if len(inputs) != len(targets):
                raise TargetError(f"{len(inputs)} inputs but {len(targets)} targets")
            if len(inputs) == 0:
                raise EmptyDataError("the arrays hold no samples")
            for start in range(0, len(inputs), self.batch_size):
                end = start + self.batch_size
                yield self._tensors(inputs[start:end]), self._target(targets[start:end], start // self.batch_size)
            return
        for index, batch in enumerate(self.source):
            inputs, targets = self._split(batch, index)
            yield self._tensors(inputs), self._target(targets, index)

    def _split(self, batch: Any, index: int) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            keys = [str(key) for key in batch]
            found = self.targets or next((name for name in NAMES if name in batch), None)
            if found is None or found not in batch:
                hint = nearest(found, keys) if found else f"it holds {', '.join(keys)}: say targets=..."
                raise ConfigurationError(f"batch {index} has no entry of targets; {hint}")
            rest = {key: value for key, value in batch.items() if key != found}
            return (next(iter(rest.values())) if len(rest) == 1 else rest), batch[found]
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ConfigurationError(
            f"batch {index} is neither a pair nor a dictionary but a {type(batch).__name__}{count}: give pairs, e.g. "
            "[(x, y) for x, y, *_ in loader], or dictionaries, whose entries have names"
        )

    def _tensors(self, inputs: Any) -> Any:
        return _pytree.tree_map(self._tensor, inputs)

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _target(self, value: Any, index: int) -> Tensor:
        found = self._tensor(np.asarray(value) if isinstance(value, (list, tuple)) else value)
        if not isinstance(found, Tensor):
            raise TargetError(f"targets of batch {index} are a {type(value).__name__}, no array")
        return found.long() if found.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32) else found


def _is_pair_of_arrays(source: Any) -> bool:
    pair = isinstance(source, (tuple, list)) and len(source) == 2
    return pair and all(isinstance(part, (np.ndarray, Tensor)) for part in source)
