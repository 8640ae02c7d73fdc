"""A measurement read back from its JSON: its norms with their intervals, and the ratio to another that is paired where
that can be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hessdiag.errors import ConfigurationError
from hessdiag.measuring.result import Measurement
from hessdiag.norm import NormEstimate, Ratio, ratio
from hessdiag.show.comparison import unpaired
from hessdiag.show.result_file import norm_of, read_document


@dataclass(frozen=True, repr=False)
class StoredResult:
    """What a file of `hessdiag measure --json` or `Measurement.save_json` holds.

    `norm`, `invariant`, and those of the tensors by name (`layers`) and of their groups, with intervals; `content` is
    everything, as docs/json.md has it.
    """

    norm: NormEstimate
    invariant: NormEstimate | None
    layers: Mapping[str, NormEstimate]
    groups: Mapping[str, NormEstimate]
    content: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> StoredResult:
        """From a document that was checked."""
        invariant = content.get("invariant")
        layers, groups = (
            {name: norm_of(summary["total"]) for name, summary in content[key].items()} for key in ("layers", "groups")
        )
        whole = norm_of(content["norm"]["total"])
        return cls(whole, None if invariant is None else norm_of(invariant), layers, groups, content)

    @property
    def rms(self) -> float:
        """sqrt(1/p sum h^2)."""
        return self.norm.rms

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) of `rms` at `confidence`."""
        return self.norm.low, self.norm.high

    @property
    def confidence(self) -> float:
        """Of every interval."""
        return self.norm.confidence

    @property
    def status(self) -> str:
        """`ok`, `exact`, or what to know."""
        return str(self.content["status"])

    def __repr__(self) -> str:
        low, high = self.interval
        told = "exact" if self.norm.status == "exact" else f"[{low:.4g}, {high:.4g}] at {100 * self.confidence:g}%"
        return f"StoredResult: rms norm {self.rms:.4g}, {told}, {self.norm.entries:,} parameters; status {self.status}"

    def ratio(self, other: StoredResult | Measurement, *, confidence: float = 0.95) -> Ratio:
        """This norm relative to the `other`, with its interval: paired where both had the same random signs.

        `Ratio.paired` says whether they had; `hessdiag compare` says why not, and what else differs.
        """
        if isinstance(other, Measurement):
            other = StoredResult.of(other.to_dict())
        if not isinstance(other, StoredResult):
            raise ConfigurationError(f"a ratio to a {type(other).__name__}: a result or a measurement is needed")
        common = unpaired(other.content, self.content) is None
        return ratio(self.norm, other.norm, paired=common, confidence=confidence)


def read_result(path: str | os.PathLike[str]) -> StoredResult:
    """The result in the file at `path`, of `hessdiag measure --json` or `Measurement.save_json`; others are refused.

    `read_result("b.json").ratio(read_result("a.json"))` is what `hessdiag compare a.json b.json` prints.
    """
    return StoredResult.of(read_document(os.fspath(path)))
