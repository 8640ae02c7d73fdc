"""The JSON of a measurement: written whole, read back with suspicion.

`Measurement.to_dict()` under its own schema, and beside it a block `cli` with what the command line knows: which
file, which data, which perturbation. docs/json.md explains every field.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessdiag.errors import DataError
from hessdiag.files import BadFileError, path_text, read_bytes, write_bytes
from hessdiag.measurement.result import SCHEMA, Measurement, number
from hessdiag.norm import NormEstimate

CLI_SCHEMA = "hessdiag-cli/1"
BUDGET = 1 << 28
_NUMBERS = (
    "square",
    "square_error",
    "norm",
    "rms",
    "mean_scaled",
    "low",
    "high",
    "noise_share",
    "participation",
)


def document(measurement: Measurement, cli: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known about one measurement, as plain values of strict JSON."""
    return measurement.to_dict() | {"cli": strict({"schema": CLI_SCHEMA, **cli})}


def write_document(path: str | Path, content: Mapping[str, Any]) -> None:
    """One JSON file, replaced as a whole or not at all."""
    try:
        write_bytes(path, to_json(content).encode())
    except BadFileError as error:
        raise DataError(f"{path_text(path)}: {error}") from None


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """To a file, or to stdout where the path is `-`."""
    if path == "-":
        sys.stdout.write(to_json(content))
    else:
        write_document(path, content)


def to_json(content: Mapping[str, Any]) -> str:
    """The text of a document: strict JSON, floats to the last bit."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_document(path: str | Path) -> dict[str, Any]:
    """A document written by `hessdiag measure --json`, its version and the fields needed later checked."""
    try:
        content = json.loads(read_bytes(path, budget=BUDGET).decode())
    except BadFileError as error:
        raise DataError(f"{path_text(path)}: {error}") from None
    except (ValueError, RecursionError):
        raise DataError(
            f"{path_text(path)}: is no JSON; give files written by hessdiag measure --json"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("schema"), str):
        raise DataError(
            f"{path_text(path)}: is no measurement; give files written by hessdiag measure --json"
        )
    if content["schema"] != SCHEMA:
        raise DataError(
            f"{path_text(path)}: is of schema {content['schema'][:60]!r}; this program reads {SCHEMA}"
        )
    try:
        norm_of(content["norm"]["total"])
        for part in ("plan", "provenance", "layers", "groups"):
            if not isinstance(content[part], dict):
                raise TypeError(part)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path_text(path)}: a damaged measurement ({type(error).__name__}: {error})"
        ) from None
    return content


def norm_of(values: Mapping[str, Any]) -> NormEstimate:
    """A NormEstimate from its JSON."""
    plain = dict(values)
    for key in _NUMBERS:
        plain[key] = _float(plain[key])
    for key in ("entries", "replicates", "dof"):
        if type(plain[key]) is not int:
            raise TypeError(f"{key} is no whole number")
    plain["confidence"] = _float(plain["confidence"])
    plain["deleted"] = tuple(_float(x) for x in plain["deleted"])
    plain["sizes"] = tuple(int(x) for x in plain["sizes"])
    plain["flags"] = tuple(str(x) for x in plain["flags"])
    plain["status"] = str(plain["status"])
    return NormEstimate(**plain)


def strict(value: Any) -> Any:
    """`value` with tuples as lists, and with the floats that JSON lacks as null or strings."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return number(value) if isinstance(value, float) else value


def _float(value: Any) -> float:
    """The inverse of `measurement.result.number`."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        if value not in ("inf", "-inf"):
            raise ValueError(f"{value[:30]!r} is no number")
        return math.inf if value == "inf" else -math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(value).__name__} where a number belongs")
    return float(value)
