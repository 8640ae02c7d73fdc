"""What a study is: a table of measured numbers, findings about them, and a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hessdiag.errors import ConfigurationError
from validation.evidence import Finding
from validation.register import Run

Cell = str | float | int | None


@dataclass(frozen=True)
class Study:
    """Rows under `columns`; `findings` are what was compared; `notes` what a reader must know."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        odd = [row for row in self.rows if len(row) != len(self.columns)]
        if odd:
            raise ConfigurationError(
                f"study {self.name}: a row has {len(odd[0])} cells for {len(self.columns)} columns"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "findings": [f.to_dict() for f in self.findings],
            "notes": list(self.notes),
        }


Table = dict[str, Any]
Draw = Callable[[Table, Any], None]


@dataclass(frozen=True)
class Registered:
    """A study by name: what runs it, and what draws its stored table into a matplotlib figure."""

    name: str
    function: Callable[[Run], Study]
    module: str
    draw: Draw | None
    reads_results: bool


STUDIES: dict[str, Registered] = {}


def study(
    name: str, *, draw: Draw | None = None, reads_results: bool = False
) -> Callable[[Callable[[Run], Study]], Callable[[Run], Study]]:
    """Register a study; one that reads stored results is made anew when they change."""

    def register(function: Callable[[Run], Study]) -> Callable[[Run], Study]:
        if name in STUDIES:
            raise ConfigurationError(f"there are two studies called {name!r}")
        STUDIES[name] = Registered(name, function, function.__module__, draw, reads_results)
        return function

    return register
