"""Plain tables (from TOML, JSON or a command line) become frozen dataclasses, and back; nothing unknown passes.

Every refusal says where in the table it stands and, for a misspelt key, which known one is nearest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from hessdiag.errors import ConfigurationError, UnknownNameError, nearest

T = TypeVar("T")


def read(kind: type[T], table: Mapping[str, Any], *, where: str = "") -> T:
    """An instance of the dataclass `kind` from a table of plain values; missing keys take their defaults."""
    if not isinstance(table, Mapping):
        raise ConfigurationError(f"{where or 'the configuration'} must be a table, not {table!r}")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise UnknownNameError(f"unknown key {_path(where, key)!r}; {nearest(str(key), sorted(known))}")
        values[key] = _value(hints[key], value, _path(where, key))
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigurationError(f"{_path(where, name)} is not given, and it has no default")
    return kind(**values)


def plain(value: Any) -> Any:
    """The inverse of `read`: dataclasses as tables, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def digest(value: Any) -> str:
    """The name of a configuration: the first 20 hexadecimal digits of SHA-256 over its JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:20]


def storable(value: Any) -> Any:
    """`value` as strict JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):  # NumPy's numbers
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over`, tables within tables merged and everything else replaced."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(cast(Mapping[str, Any], old), value) if both else value
    return result


def _path(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type, or a refusal that names both."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [part for part in arguments if part is not type(None)]
        if set(inner) == {bool, str}:  # a switch that has words, too: its owner says which
            return value
        return _value(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        return read(cast(type[Any], hint), value, where=where)
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ConfigurationError(f"{where} must be a list, not {value!r}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or hint in (dict, Mapping) or str(origin).endswith("Mapping'>"):
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{where} must be a table, not {value!r}")
        return dict(value)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise ConfigurationError(f"{where} must be finite and within the range of a float, not {number!r}")
        return number
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)  # eps = 0.031 means what eps = "0.031" means
    if hint is typing.Any or hint is Any:
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ConfigurationError(f"{where} must be {wanted.get(hint, str(hint))}, not {value!r}")
