"""The JSON of a measurement: written whole, read back with suspicion.

`Measurement.to_dict()` under its own schema, and beside it a block `cli` with what the command line knows: which
file, which data, which perturbation. docs/json.md explains every field.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessdiag.errors import DataError
from hessdiag.measuring.result import SCHEMA, Measurement, number
from hessdiag.norm import NormEstimate
from hessdiag.show.schema import BOUNDS, MEASUREMENT
from hessdiag.store.files import BadFileError, path_text, read_json, write_bytes

CLI_SCHEMA = "hessdiag-cli/1"
NUMBERS = {name for name, kind in NormEstimate.__annotations__.items() if kind in (float, "float")}


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
    """A document written by `hessdiag measure --json`: its version, and every field that is read later, checked."""
    try:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("schema"), str):
            raise BadFileError("is no measurement; give files written by hessdiag measure --json")
        if content["schema"] != SCHEMA:
            raise BadFileError(f"is of schema {content['schema'][:60]!r}; this program reads {SCHEMA}")
        try:
            MEASUREMENT(content, "the measurement")
        except BadFileError as reason:
            raise BadFileError(f"is damaged: {reason}; measure again") from None
    except BadFileError as reason:
        raise DataError(f"{path_text(path)}: {reason}") from None
    return content


def norm_of(values: Mapping[str, Any]) -> NormEstimate:
    """A NormEstimate from its JSON, which `read_document` has checked."""
    plain: dict[str, Any] = {key: _float(value) if key in NUMBERS else value for key, value in values.items()}
    for key in ("deleted", "sizes", "flags"):
        plain[key] = tuple(_float(x) if key == "deleted" else x for x in plain[key])
    return NormEstimate(**{key: plain[key] for key in NormEstimate.__dataclass_fields__})


def strict(value: Any) -> Any:
    """`value` with tuples as lists, and with the floats that JSON lacks as null or strings."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return number(value) if isinstance(value, float) else value


def _float(value: Any) -> float:
    """The inverse of `measurement.result.number`."""
    return float(BOUNDS[value] if value is None or isinstance(value, str) else value)
