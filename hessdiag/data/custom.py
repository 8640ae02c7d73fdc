"""Data from the user's own code: `package.module:factory`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.data.dataset import DataSet
from hessdiag.data.named import PAIRS, Arrays, NamedDataSet, of_table
from hessdiag.errors import DataError, EmptyDataError, HessdiagError
from hessdiag.feed import holds_samples, in_batches
from hessdiag.store.factories import import_object

MAX_SAMPLES = 5_000_000
ROWS = 256
"""Samples that are put together at once."""
PLAIN = ((PAIRS[0][0],), PAIRS[0][1])


def load_custom(text: str, *, split: str, seed: int, arrays: Arrays) -> DataSet | NamedDataSet:
    """Call the factory, with `split` and `seed` if it has such parameters, and take what it returns.

    A DataSet; a pair (inputs, targets) of tensors or arrays, or an iterable of such pairs; a dictionary of arrays, or
    an iterable of such dictionaries, in which `arrays` says what is what; a Dataset of torch, or rows of either kind.
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
        if isinstance(made, (DataSet, NamedDataSet)):
            return made
        table, which = _table(made, text, arrays)
    except HessdiagError:
        raise
    except Exception as error:
        raise DataError(f"{text} raised {type(error).__name__}: {error}") from error
    told = split if "split" in options else "all"
    return of_table(table, which, name=text, split=told, reading=arrays.reading)


def _table(made: Any, text: str, arrays: Arrays) -> tuple[dict[str, Tensor], tuple[tuple[str, ...], str]]:
    """What it returned as one table of arrays, and which of them are inputs and targets."""
    if isinstance(made, Mapping):
        table = {str(key): _tensor(value) for key, value in made.items()}
        return table, arrays.choose(table, text)
    if isinstance(made, (tuple, list)) and len(made) == 2 and all(isinstance(x, (Tensor, np.ndarray)) for x in made):
        return {"inputs": _tensor(made[0]), "targets": _tensor(made[1])}, PLAIN
    if not holds_samples(made):
        raise DataError(f"{text} returned {type(made).__name__}, not (inputs, targets), a DataSet or batches")
    parts: dict[str, list[Tensor]] = {}
    total, named = 0, False
    for batch in in_batches(made, ROWS, arrays.targets):
        if isinstance(batch, Mapping):
            pieces, named = {str(key): _tensor(value) for key, value in batch.items()}, True
        elif isinstance(batch, (tuple, list)) and len(batch) == 2 and not isinstance(batch[0], Mapping):
            pieces = {"inputs": _tensor(batch[0]), "targets": _tensor(batch[1])}
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            pieces, named = {str(key): _tensor(value) for key, value in batch[0].items()}, True
            pieces["targets"] = _tensor(batch[1])
        else:
            raise DataError(
                f"{text} gave a batch of type {type(batch).__name__}; "
                "batches are pairs (inputs, targets) or dictionaries"
            )
        if parts and set(parts) != set(pieces):
            raise DataError(f"{text} gave batches of other names: {', '.join(parts)}, then {', '.join(pieces)}")
        for key, value in pieces.items():
            parts.setdefault(key, []).append(value)
        total += len(next(iter(pieces.values()), ()))
        if total > MAX_SAMPLES:
            raise DataError(f"{text} gave more than {MAX_SAMPLES} samples; return fewer")
    if not parts:
        raise EmptyDataError(f"{text} gave no batches")
    table = {key: torch.cat(values) for key, values in parts.items()}
    return table, arrays.choose(table, text) if named else PLAIN


def _tensor(value: Any) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
