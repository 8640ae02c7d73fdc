"""What a measurement returns: norms with intervals, shares, audit, plan, provenance; frozen, and plain as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessdiag.errors import UnknownNameError, nearest
from hessdiag.measuring.audit import Audit
from hessdiag.measuring.diagonal import Diagonal
from hessdiag.methods import Plan
from hessdiag.norm import NormEstimate, Ratio, TraceEstimate

if TYPE_CHECKING:
    from hessdiag.show.plot import Figure

SCHEMA = "hessdiag-measurement/1"


@dataclass(frozen=True)
class NormSummary:
    """Norms of one parameter tensor, one group, or everything: the whole diagonal and its two parts."""

    total: NormEstimate
    gauss_newton: NormEstimate | None
    functional: NormEstimate | None
    share_gauss_newton: Ratio | None
    share_functional: Ratio | None
    cosine: Ratio | None = None
    """Of the angle between the two parts: positive where they add up, negative where they cancel."""

    @property
    def rms(self) -> float:
        """sqrt(1/p sum h^2), the right side of E[8]."""
        return self.total.rms

    @property
    def mean_scaled(self) -> float:
        """(1/p) sqrt(sum h^2), the left side of E[8]."""
        return self.total.mean_scaled

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of `rms`."""
        return self.total.low, self.total.high

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {key: None if value is None else _plain(asdict(value)) for key, value in self._items()}

    def _items(self) -> list[tuple[str, Any]]:
        names = ("total", "gauss_newton", "functional", "share_gauss_newton", "share_functional", "cosine")
        return [(name, getattr(self, name)) for name in names]


@dataclass(frozen=True)
class EffectiveCurvature:
    """|gain| max|sigma''| of one normalisation and the activation it feeds: what alpha and the gain say together."""

    layer: str
    activation: str
    max_curvature: float
    mean: float
    largest: float


@dataclass(frozen=True, repr=False)
class Measurement:
    """The norm of a loss's Hessian diagonal on given data, with all that is needed to trust it."""

    norm: NormSummary
    layers: Mapping[str, NormSummary]
    groups: Mapping[str, NormSummary]
    invariant: NormEstimate | None
    invariant_groups: Mapping[str, NormEstimate]
    trace: TraceEstimate
    effective_curvature: tuple[EffectiveCurvature, ...]
    audit: Audit | None
    status: str
    notes: tuple[str, ...]
    plan: Plan
    loss: float
    samples: int
    parameters: int
    seconds: float
    history: tuple[tuple[int, float, float, float], ...]
    provenance: Mapping[str, Any]
    diagonal: Diagonal | None = None

    @property
    def rms(self) -> float:
        """sqrt(1/p sum h^2), the right side of E[8]."""
        return self.norm.rms

    @property
    def mean_scaled(self) -> float:
        """(1/p) sqrt(sum h^2), the left side of E[8]."""
        return self.norm.mean_scaled

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) of `rms` at `confidence`."""
        return self.norm.interval

    @property
    def confidence(self) -> float:
        """Confidence of every interval here."""
        return self.norm.total.confidence

    @property
    def replicates(self) -> int:
        """Replicates behind the estimate; 0 where it is exact."""
        return self.norm.total.replicates

    @property
    def shares(self) -> dict[str, Ratio | None]:
        """Squared norms of the two parts relative to the whole; they add up to 1 only where the parts do not cancel."""
        return {"gauss_newton": self.norm.share_gauss_newton, "functional": self.norm.share_functional}

    def __repr__(self) -> str:
        from hessdiag.show.inline import lines

        return lines(self)

    def _repr_html_(self) -> str:
        from hessdiag.show.inline import fragment

        return fragment(self)

    def rows(self, of: str = "layers") -> list[dict[str, Any]]:
        """One dictionary of plain numbers for each parameter (`of="layers"`) or group (`of="groups"`).

        `pandas.DataFrame(m.rows())` is a table.
        """
        from hessdiag.show.inline import rows

        if of not in ("layers", "groups"):
            raise UnknownNameError(f"rows of {of!r}; {nearest(str(of), ['layers', 'groups'])}")
        return rows(self, of)

    def plot(self, what: str = "norms") -> Figure:
        """A matplotlib figure: "norms" of each parameter, "groups", "convergence", "parts" or "diagonal"."""
        from hessdiag.show.pictures import picture

        return picture(self, what)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the diagonal as JSON, which `hessdiag compare` reads."""
        from hessdiag.show.result_file import document, write_document

        write_document(os.fspath(path), document(self, {}))

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page with numbers and pictures, which needs no network."""
        from hessdiag.show.html import write_page
        from hessdiag.show.result_file import document

        write_page(Path(path), document(self, {}), self.diagonal)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the diagonal itself, as plain JSON values (NaN and infinities as null and strings)."""
        return {
            "schema": SCHEMA,
            "rms": number(self.rms),
            "mean_scaled": number(self.mean_scaled),
            "interval": [number(x) for x in self.interval],
            "confidence": self.confidence,
            "status": self.status,
            "notes": list(self.notes),
            "samples": self.samples,
            "parameters": self.parameters,
            "replicates": self.replicates,
            "loss": number(self.loss),
            "seconds": self.seconds,
            "norm": self.norm.to_dict(),
            "layers": {name: summary.to_dict() for name, summary in self.layers.items()},
            "groups": {name: summary.to_dict() for name, summary in self.groups.items()},
            "invariant": None if self.invariant is None else _plain(asdict(self.invariant)),
            "invariant_groups": {name: _plain(asdict(e)) for name, e in self.invariant_groups.items()},
            "trace": _plain(asdict(self.trace)),
            "effective_curvature": [_plain(asdict(e)) for e in self.effective_curvature],
            "audit": None if self.audit is None else self.audit.to_dict(),
            "plan": self.plan.to_dict(),
            "history": [[number(x) for x in row] for row in self.history],
            "provenance": dict(self.provenance),
        }


def number(value: float) -> float | str | None:
    """A float as strict JSON knows it: NaN is null, infinities are strings."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return number(value) if isinstance(value, float) else value
