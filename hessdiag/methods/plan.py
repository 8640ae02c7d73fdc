"""The plan of a measurement: what is computed how. Fixed before the first replicate, stored, and can be given.

The same seed, plan, dtype, device and number of threads give the same bits. What is better measured than guessed is
chosen by a pilot (`hessdiag.methods.pilot`) on samples of the first batch, thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hessdiag.errors import ConfigurationError, nearest
from hessdiag.methods.base import find

if TYPE_CHECKING:
    from hessdiag.methods.case import Case

PROBE_BLOCK = 64
"""Samples that share one of Hutchinson's probes."""


@dataclass(frozen=True)
class Plan:
    """What a measurement does; `reason` says why this method."""

    method: str
    gauss_newton: str = "exact"
    groups: int = 16
    at_once: int = 1
    sample_groups: Mapping[str, int] = field(default_factory=dict)
    balance: Mapping[int, float] = field(default_factory=dict)
    deflate: int = 0
    parts: bool = True
    reason: str = ""
    block: int = PROBE_BLOCK
    """Neighbouring samples that share one probe of Hutchinson's; 0: all of them."""
    probes: Mapping[str, int] = field(default_factory=dict)
    """By layer, products a replicate that serve it instead of signs (`hessdiag.kernels.probes`)."""
    probe_rank: int = 0
    """Directions per sample of these layers that are taken exactly."""

    def __post_init__(self) -> None:
        find(self.method)
        if self.gauss_newton not in ("exact", "signs"):
            raise ConfigurationError(f"gauss_newton must be 'exact' or 'signs', not {self.gauss_newton!r}")
        counts = (*self.sample_groups.values(), *self.probes.values())
        whole = (self.groups, self.at_once, self.deflate, self.block, self.probe_rank, *counts)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in whole):
            raise ConfigurationError("groups, at_once, deflate, block, probes and the like of a plan are whole numbers")
        if not all(lam and abs(lam) < float("inf") for lam in self.balance.values()):
            raise ConfigurationError("the balance of a plan holds finite numbers other than 0")
        if self.groups < 4 or not 1 <= self.at_once <= 4096 or min(self.deflate, self.block, self.probe_rank) < 0:
            raise ConfigurationError(
                "a plan needs groups >= 4, at_once in 1 to 4096, and deflate, block and probe_rank of at least 0"
            )
        if any(count < 1 for count in counts):
            raise ConfigurationError("the sample_groups and probes of a plan are at least 1")

    @property
    def ordered(self) -> bool:
        """Whether directions belong to samples, which must come in one order then."""
        return self.deflate > 0 or (self.probe_rank > 0 and bool(self.probes))

    @property
    def align(self) -> int:
        """Samples that must stay in one batch: the largest group summed before squaring."""
        return max(self.sample_groups.values(), default=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"balance": {str(k): v for k, v in self.balance.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`; unknown keys are refused. Plans from before there were blocks had one probe."""
        known = set(cls.__dataclass_fields__)
        for key in values:
            if key not in known:
                raise ConfigurationError(f"unknown key {key!r} in a plan; {nearest(key, sorted(known))}")
        balance = {int(k): float(v) for k, v in dict(values.get("balance", {})).items()}
        return cls(**{"block": 0, **values, "balance": balance})


def replicate_groups(size: int) -> int:
    """Jackknife groups for p parameters: 16, and 8 where sixteen vectors of float64 would be gigabytes."""
    return 16 if size <= 4_000_000 else 8


def at_once(case: Case) -> int:
    """Replicates in one pass over several batches, as memory allows."""
    return 1 if case.single else max(1, min(8, (1 << 28) // (8 * case.objective.size)))
