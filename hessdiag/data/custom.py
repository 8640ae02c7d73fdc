"""Data from the user's own code: `package.module:factory`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.data.dataset import DataSet, make
from hessdiag.errors import DataError, EmptyDataError, HessdiagError
from hessdiag.store.factories import import_object

MAX_SAMPLES = 5_000_000


def load_custom(text: str, *, split: str, seed: int) -> DataSet:
    """Call the factory, with `split` and `seed` if it has such parameters, and take what it returns.

    A DataSet, a pair (inputs, targets) of tensors or arrays, or an iterable of batches (inputs, targets).
    """
    factory = import_object(text)
    if not callable(factory):
        raise DataError(f"{text} is no function: it must return (inputs, targets), a DataSet or batches")
    try:
        known = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        known = {}  # type: ignore[assignment]
    options = {key: value for key, value in (("split", split), ("seed", seed)) if key in known}
    try:
        made = factory(**options)
        if isinstance(made, DataSet):
            return made
        inputs, targets = _pair(made, text)
    except HessdiagError:
        raise
    except Exception as error:
        raise DataError(f"{text} raised {type(error).__name__}: {error}") from error
    return make(inputs, targets, name=text, split=split if "split" in options else "all")


def _pair(made: Any, text: str) -> tuple[Tensor, Tensor]:
    if isinstance(made, (tuple, list)) and len(made) == 2 and all(isinstance(x, (Tensor, np.ndarray)) for x in made):
        return _tensor(made[0]), _tensor(made[1])
    if not isinstance(made, Iterable):
        raise DataError(f"{text} returned {type(made).__name__}, not (inputs, targets), a DataSet or batches")
    inputs, targets, total = [], [], 0
    for batch in made:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"{text} gave a batch of type {type(batch).__name__}; batches are pairs (inputs, targets)")
        inputs.append(_tensor(batch[0]))
        targets.append(_tensor(batch[1]))
        total += len(inputs[-1])
        if total > MAX_SAMPLES:
            raise DataError(f"{text} gave more than {MAX_SAMPLES} samples; return fewer")
    if not inputs:
        raise EmptyDataError(f"{text} gave no batches")
    return torch.cat(inputs), torch.cat(targets)


def _tensor(value: Any) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
