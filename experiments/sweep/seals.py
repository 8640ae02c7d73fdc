"""What is kept of a run is sealed: `sha256` over the rest of the table, checked when it is read, and ranges.

Tables written before there were seals have none: they are read, checked for ranges, and known as unsealed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.fields import storable

Table = dict[str, Any]
SEAL = "sha256"


class DamagedError(ValueError):
    """A record that is not what was written, or holds what cannot be."""


def sealed(content: Mapping[str, Any]) -> Table:
    """`content` as strict JSON holds it, with its seal."""
    plain: Table = storable(content)
    return {**plain, SEAL: _digest(plain)}


def unsealed(content: Any) -> tuple[Table, bool]:
    """The content without its seal, and whether it had one; DamagedError if it is not what was sealed, or out of
    range.
    """
    if not isinstance(content, dict):
        raise DamagedError("damaged: no table")
    plain = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != _digest(plain):
        raise DamagedError("damaged: not what was written (its sha256 differs)")
    for where, table in _tables(plain, ""):
        if "value" in table and "samples" in table:  # a share of images; ratios of norms have a value, too
            _check(table, dict.fromkeys(("value", "low", "high", "clean"), (0, 1)) | {"samples": (1, math.inf)}, where)
        if "rms" in table:
            _check(table, dict.fromkeys(("rms", "low", "high"), (0, math.inf)), where)
    return plain, SEAL in content


def _digest(plain: Table) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _check(table: Table, ranges: Mapping[str, tuple[float, float]], where: str) -> None:
    numbers = {key: value for key, value in table.items() if isinstance(value, (int, float))}
    for key, (low, high) in ranges.items():
        if key in numbers and not low <= numbers[key] <= high:
            raise DamagedError(f"damaged: {where}{key} is {numbers[key]}, not in [{low}, {high}]")
    if numbers.get("low", -math.inf) > numbers.get("high", math.inf):
        raise DamagedError(f"damaged: {where}low is above {where}high")


def _tables(value: Any, where: str) -> Iterator[tuple[str, Table]]:
    if isinstance(value, dict):
        yield where, value
        for key, item in value.items():
            yield from _tables(item, f"{where}{key}.")
