"""A measurement as a document (JSON), as tables for a terminal, and as a page with pictures.

Public names are imported when first used: what draws a curve need not wait for what measures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessdiag.show.result_file import CLI_SCHEMA, document, norm_of, read_document, to_json, write_document
    from hessdiag.show.table import print_measurement

__all__ = [
    "CLI_SCHEMA",
    "document",
    "norm_of",
    "print_measurement",
    "read_document",
    "to_json",
    "write_document",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "table" if name == "print_measurement" else "result_file"
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
