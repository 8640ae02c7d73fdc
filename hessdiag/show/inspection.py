"""What `hessdiag inspect` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hessdiag.checkpoint import CheckpointSummary
from hessdiag.show.columns import Column, print_pairs, print_table
from hessdiag.show.text import bytes_, counted, plain, value


def print_summary(out: Console, found: CheckpointSummary, *, tensors: bool) -> None:
    """Format, network, training facts, metrics; every tensor if asked for."""
    out.print(Text(plain(found.path), style="bold"))
    rows = [
        ("file", f"{found.kind}, {found.layout}, {bytes_(found.size)}"),
        ("sha256", found.sha256),
        ("weights", f"{counted(found.parameters, 'parameter')} in {counted(_count(found, 'model'), 'tensor')}"),
    ]
    if found.has_ema:
        rows.append(("averaged weights", counted(_count(found, "ema"), "tensor")))
    if found.epoch is not None:
        rows.append(("epoch", str(found.epoch)))
    for heading, table in (("", found.config), ("metrics: ", found.metrics), ("", found.extra)):
        rows += [(plain(heading + name, 40), plain(shown)) for name, shown in _flat(table)]
    curvature = _curvature(found.config.get("activation"))
    if curvature:
        rows.append(("max|σ''|", curvature))
    print_pairs(out, rows)
    for note in found.notes:
        out.print(Padding(Text(f"note: {plain(note)}"), (0, 0, 0, 2), expand=False))
    if tensors:
        _tensors(out, found)


def _tensors(out: Console, found: CheckpointSummary) -> None:
    columns = (
        Column("tensor", text=True),
        Column("shape"),
        Column("dtype", 1),
        Column("bytes", 3),
        Column("of", 2),
    )
    rows = [
        [plain(e.name), "x".join(map(str, e.shape)) or "scalar", e.dtype, f"{e.bytes:,}", e.weights]
        for e in found.tensors
    ]
    out.print()
    print_table(out, columns, rows)


def _count(found: CheckpointSummary, which: str) -> int:
    return sum(entry.weights == which for entry in found.tensors)


def _flat(table: Mapping[str, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Nested plain values as rows, two levels deep."""
    rows: list[tuple[str, str]] = []
    for key, entry in table.items():
        if isinstance(entry, Mapping) and depth < 1:
            rows += _flat(entry, f"{prefix}{key}.", depth + 1)
        elif entry is not None:
            number = isinstance(entry, float)
            rows.append((f"{prefix}{key}", value(entry, 6) if number else str(entry)))
    return rows


def _curvature(spec: Any) -> str | None:
    from hessdiag import activations
    from hessdiag.errors import HessdiagError

    if not isinstance(spec, str):
        return None
    try:
        top = activations.max_curvature(spec)
    except HessdiagError:
        return None
    return "infinite: the activation has a kink" if math.isinf(top) else value(top)
