"""A measurement as a document (JSON), as tables for a terminal, and as a page with pictures."""

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
