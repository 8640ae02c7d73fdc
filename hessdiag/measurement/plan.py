"""The plan of a measurement: what is computed how. Fixed before the first replicate, stored, and can be given.

The same seed, plan, dtype, device and number of threads give the same bits. What is better measured than guessed is
chosen by a pilot (`hessdiag.measurement.pilot`) on samples of the first batch, thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import ConfigurationError, UncoveredModelError, UnknownNameError, nearest
from ..forward import mapped
from ..graph import Linearisation
from ..objective import Objective
from ..stream import Numbered
from .pilot import PILOT_SAMPLES, balance_products, choose_groups, choose_rank

METHODS = ("exact", "propagation", "hutchinson", "reference")
SITE_METHODS = ("exact", "propagation")
"""Those that rest on the site identity."""
EXACT_COLUMNS = 32
"""Loss-factor columns up to which the Gauss-Newton part is taken exactly, in one pass each."""
KEEP_BYTES = 1 << 28
"""Patches of a single-batch data set are kept between replicates up to this size."""


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

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError(f"unknown method {self.method!r}; {nearest(self.method, [*METHODS, 'auto'])}")
        if self.gauss_newton not in ("exact", "signs"):
            raise ConfigurationError(f"gauss_newton must be 'exact' or 'signs', not {self.gauss_newton!r}")
        whole = (self.groups, self.at_once, self.deflate, *self.sample_groups.values())
        if any(isinstance(n, bool) or not isinstance(n, int) for n in whole):
            raise ConfigurationError("groups, at_once, deflate and sample_groups of a plan are whole numbers")
        if not all(lam and abs(lam) < float("inf") for lam in self.balance.values()):
            raise ConfigurationError("the balance of a plan holds finite numbers other than 0")
        if self.groups < 4 or not 1 <= self.at_once <= 4096 or self.deflate < 0:
            raise ConfigurationError("a plan needs groups >= 4, at_once in 1 to 4096 and deflate >= 0")
        if any(group < 1 for group in self.sample_groups.values()):
            raise ConfigurationError("the sample_groups of a plan are at least 1")

    @property
    def deterministic(self) -> bool:
        """True where one pass gives the diagonal itself."""
        return self.method in ("exact", "reference")

    @property
    def align(self) -> int:
        """Samples that must stay in one batch: the largest group summed before squaring."""
        return max(self.sample_groups.values(), default=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"balance": {str(k): v for k, v in self.balance.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`; unknown keys are refused."""
        known = set(cls.__dataclass_fields__)
        for key in values:
            if key not in known:
                raise ConfigurationError(f"unknown key {key!r} in a plan; {nearest(key, sorted(known))}")
        balance = {int(k): float(v) for k, v in dict(values.get("balance", {})).items()}
        return cls(**{**values, "balance": balance})


def replicate_groups(size: int) -> int:
    """Jackknife groups for p parameters: 16, and 8 where sixteen vectors of float64 would be gigabytes."""
    return 16 if size <= 4_000_000 else 8


def make_plan(
    objective: Objective,
    first: Numbered,
    *,
    method: str,
    seed: int,
    samples: int,
    batches: int,
    ordered: bool = True,
    rtol: float = 0.05,
    replicates: int | None = None,
    reason: str = "",
) -> Plan:
    """The plan for a method, with a pilot where the method has something to choose.

    `ordered`: the samples are known to come in the same order in every pass. Directions are taken out of the signs as
    far as they pay for a norm within `rtol`, or for the mean of so many `replicates`.
    """
    size = objective.size
    groups = replicate_groups(size)
    at_once = 1 if batches == 1 else max(1, min(8, (1 << 28) // (8 * size)))
    if method != "propagation":
        return Plan(method, groups=groups, at_once=at_once, reason=reason)
    first = first.few(PILOT_SAMPLES)
    batch = Linearisation(objective, first.inputs, first.targets, index=first.index)
    columns = len(batch.curvature.signs)
    gauss_newton = "exact" if columns <= EXACT_COLUMNS else "signs"
    balance = balance_products(batch, seed)
    if balance:
        batch = Linearisation(objective, first.inputs, first.targets, index=first.index, balance=balance)
    chosen = choose_groups(batch, seed)
    rank = 0
    if ordered:
        outer = gauss_newton == "exact"
        rank = choose_rank(batch, seed, samples=samples, rtol=rtol, replicates=replicates, groups=chosen, outer=outer)
    return Plan(method, gauss_newton, groups, at_once, chosen, balance, rank, True, reason)


def double_copy(objective: Objective) -> Objective:
    """The same objective on a float64 copy of the model, for checks at float64 accuracy."""
    import copy

    if any(isinstance(module, torch.jit.ScriptModule) for module in objective.model.modules()):
        raise UncoveredModelError("a copy of scripted code is compiled anew, and shares no graph with the original")
    twin = copy.copy(objective)
    twin.model = copy.deepcopy(objective.model).double()
    everything = dict(twin.model.named_parameters())
    twin.parameters = {name: everything[name] for name in objective.parameters}
    twin.dtype = torch.float64
    return twin


def as_double(value: Any) -> Any:
    """Floating-point tensors of a structure in float64."""
    return mapped(value, lambda x: x.double() if x.is_floating_point() else x)
