"""Several measurements side by side: the ratio of each norm to the first, with its interval.

Two measurements with the same seed, plan and data used the same random signs in the same replicates; what they have in
common then cancels in the ratio (`hessdiag.norm.ratio(paired=True)`). Otherwise they count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hessdiag.errors import HessdiagError
from hessdiag.norm import NormEstimate, Ratio, ratio
from hessdiag.show.columns import Column, print_table
from hessdiag.show.result_file import norm_of
from hessdiag.show.text import digits, interval, loss, percent, plain, value


@dataclass(frozen=True)
class Row:
    """One measurement and its ratio to the first (None for the first itself)."""

    name: str
    activation: str | None
    max_curvature: float
    estimate: NormEstimate
    share_functional: Mapping[str, Any] | None
    invariant: NormEstimate | None
    ratio: Ratio | None
    invariant_ratio: Ratio | None
    unpaired: str | None
    """Why the ratio is not paired, or None."""
    differs: tuple[str, ...]
    """What was measured otherwise than in the first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "activation": self.activation,
            "max_curvature": self.max_curvature,
            "rms": self.estimate.rms,
            "interval": [self.estimate.low, self.estimate.high],
            "replicates": self.estimate.replicates,
            "ratio": None if self.ratio is None else asdict(self.ratio),
            "invariant_ratio": None if self.invariant_ratio is None else asdict(self.invariant_ratio),
            "unpaired": self.unpaired,
            "differs": list(self.differs),
        }


def compare(documents: Sequence[tuple[str, dict[str, Any]]], *, confidence: float = 0.95) -> list[Row]:
    """One row per document, ratios to the first."""
    name, first = documents[0]
    base, base_invariant = _estimates(first)
    rows = []
    for place, (name, content) in enumerate(documents):
        own, invariant = _estimates(content)
        activation, top = curvature_of(content)
        found, weighted, reason = None, None, None
        if place:
            reason = unpaired(first, content)
            found = ratio(own, base, paired=reason is None, confidence=confidence)
            if invariant is not None and base_invariant is not None:
                weighted = ratio(invariant, base_invariant, paired=reason is None, confidence=confidence)
        share = content["norm"].get("share_functional")
        differs = tuple(differences(first, content)) if place else ()
        rows.append(Row(name, activation, top, own, share, invariant, found, weighted, reason, differs))
    return rows


def unpaired(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Why two measurements cannot be paired; None where they can, or where one is exact and nothing is random."""
    if a["plan"]["method"] != b["plan"]["method"]:
        return "the methods differ"
    if not a["replicates"] and not b["replicates"]:
        return "both are exact"
    if a["provenance"]["seed"] != b["provenance"]["seed"]:
        return "the seeds differ"
    if any(
        a["plan"].get(key) != b["plan"].get(key)
        for key in ("gauss_newton", "groups", "sample_groups", "deflate", "probes", "probe_rank", "parts")
    ):
        return "the plans differ: measure the second with --plan FIRST.json"
    if not _same_data(a, b):
        return "the data differ"
    if not _same_order(a, b):
        return "the data come in another order"
    sizes = [{name: row["total"]["entries"] for name, row in x["layers"].items()} for x in (a, b)]
    if sizes[0] != sizes[1]:
        return "the parameters differ"
    if a["norm"]["total"]["sizes"] != b["norm"]["total"]["sizes"]:
        counts = f"{a['replicates']} and {b['replicates']}"
        return f"unequal replicates ({counts}): give both the same --min-replicates and --max-replicates"
    return None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else than the model is not the same, so that a ratio would mix two causes."""
    found = []
    if not _same_data(a, b):
        found.append("data or perturbation")
    found += _losses(a, b)
    for key in ("l2", "target", "dtype"):
        if a["provenance"].get(key) != b["provenance"].get(key):
            found.append(f"{key} ({a['provenance'].get(key)}, {b['provenance'].get(key)})")
    found += [
        f"{key} ({', '.join(given)})" for key in ("normalize", "output", "forward") if (given := _given(a, b, key))
    ]
    if a["parameters"] != b["parameters"]:
        found.append(f"parameters ({a['parameters']:,}, {b['parameters']:,})")
    return found


def _losses(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """How the losses differ. Files of before there were `loss_options` do not tell theirs: taken for none, unless the
    other file has some.
    """
    facts = [x["provenance"] for x in (a, b)]
    if facts[0].get("loss") != facts[1].get("loss") or (facts[0].get("loss_options") or {}) != (
        facts[1].get("loss_options") or {}
    ):
        told = [loss(x) if "loss_options" in x else f"{loss(x)}, its options not told" for x in facts]
        return [f"loss ({'; '.join(told)})"]
    given = _given(a, b, "loss")  # functions of one name in different places
    return [f"loss ({'; '.join(given)})"] if given else []


def _given(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> list[str]:
    """What an option of the command line was in either, if both files tell and it was not the same."""
    held = [x.get("cli") or {} for x in (a, b)]
    if any(key not in cli for cli in held) or held[0][key] == held[1][key]:
        return []
    return ["none" if cli[key] is None else plain(cli[key]) for cli in held]


def curvature_of(content: Mapping[str, Any]) -> tuple[str | None, float]:
    """The activation of the model and its max|sigma''|; NaN where the document does not tell."""
    from hessdiag import activations

    spec = (((content.get("cli") or {}).get("checkpoint") or {}).get("config") or {}).get("activation")
    if isinstance(spec, str):
        try:
            return spec, activations.max_curvature(spec)
        except HessdiagError:
            return spec, math.nan
    found = {(p["activation"], p["max_curvature"]) for p in content["effective_curvature"]}
    if len(found) == 1:
        label, top = found.pop()
        return str(label), float(top) if isinstance(top, (int, float)) else math.nan
    return None, math.nan


def print_comparison(out: Console, rows: Sequence[Row], *, confidence: float) -> None:
    """The table, and below it what a reader must know of each ratio."""
    columns = (
        Column("measurement", text=True),
        Column("max|σ''|", 3),
        Column("rms", 1),
        Column("interval", 4),
        Column("functional", 6),
        Column("ratio"),
        Column(f"{100 * confidence:g}%"),
        Column("paired", 5),
    )
    lines = []
    for row in rows:
        e, r = row.estimate, row.ratio
        cells = [plain(row.name), value(row.max_curvature), value(e.rms, digits(e.low, e.high))]
        cells.append("exact" if e.status == "exact" else interval(e.low, e.high, 3))
        cells.append(percent(_plain(row.share_functional)))
        if r is None:
            cells += ["1", "", ""]
        else:
            cells += [value(r.value), interval(r.low, r.high, 3) if r.low < r.high else "exact"]
            cells.append("yes" if row.unpaired is None else "no")
        lines.append(cells)
    out.print(Text(f"Norms relative to {plain(rows[0].name)}", style="bold"))
    print_table(out, columns, lines)
    invariant = [f"{plain(r.name)} {_bounds(r.invariant_ratio)}" for r in rows if r.invariant_ratio is not None]
    if invariant:
        out.print(Text(f"  invariant norms: {'; '.join(invariant)}"))
    for row in rows[1:]:
        for line in _remarks(row):
            out.print(Padding(Text(f"{plain(row.name)}: {line}"), (0, 0, 0, 2), expand=False))


def _bounds(r: Ratio) -> str:
    return value(r.value) if r.low == r.high else f"{value(r.value)} {interval(r.low, r.high, 3)}"


def _remarks(row: Row) -> list[str]:
    lines = [] if row.unpaired == "both are exact" else [f"not paired: {row.unpaired}"]
    if row.unpaired is None:
        lines = ["paired: common signs, so that what both have in common cancels"]
    lines += [f"measured otherwise: {what}" for what in row.differs]
    if row.estimate.status not in ("ok", "exact"):
        lines.append(f"status {row.estimate.status}")
    return lines


def _plain(share: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if share is None else dict(share)


def _estimates(content: Mapping[str, Any]) -> tuple[NormEstimate, NormEstimate | None]:
    invariant = content.get("invariant")
    return norm_of(content["norm"]["total"]), None if invariant is None else norm_of(invariant)


def _same_data(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """By the hash of the clean data and the perturbation; where a result of Python has no such, by the fingerprints of
    what was measured at.
    """
    hashed = _hashes(a, b)
    return hashed[0] == hashed[1] if hashed else _agree(a, b, "data_fingerprint")


def _same_order(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Of the same data: hashes hold it. Of files of before there was `data_order` the fingerprints, sums over samples,
    may show it in their last digit.
    """
    held = [x["provenance"] for x in (a, b)]
    if _hashes(a, b):
        return True
    if all("data_order" in facts for facts in held):
        return _agree(a, b, "data_order")
    return bool(held[0].get("data_fingerprint") == held[1].get("data_fingerprint"))


def _hashes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(sha256 of the clean data, perturbation) of either, if both tell."""
    held = [x.get("cli") or {} for x in (a, b)]
    if not all(cli.get("data") for cli in held):
        return []
    return [(cli["data"]["sha256"], (cli.get("perturbation") or {}).get("spec")) for cli in held]


def _agree(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> bool:
    """Whether two sums over samples are the same, whatever the batches made of their last digits."""
    x, y = (facts["provenance"].get(key) for facts in (a, b))
    if not isinstance(x, (int, float)) or not isinstance(y, (int, float)):
        return bool(x == y)
    return math.isclose(x, y, rel_tol=1e-9)
