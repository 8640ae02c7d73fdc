"""The plan of a measurement: what is computed how. Fixed before the first replicate, stored, and can be given.

The same seed, plan, dtype, device and number of threads give the same bits. A pilot on samples of the first batch,
thrown away, chooses what is better measured than guessed: how many neighbouring samples to sum before squaring, and
the balance of each product of activations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..diagonal.parts import Tensors
from ..diagonal.propagation import Propagator
from ..errors import ConfigurationError, UnknownNameError, nearest
from ..objective import Objective
from ..signs import BLOCK, Signs
from ..sites import Linearisation, edge_shape
from ..stream import Numbered

METHODS = ("exact", "propagation", "hutchinson", "reference")
EXACT_COLUMNS = 32
"""Loss-factor columns up to which the Gauss-Newton part is taken exactly, in one pass each."""
KEEP_BYTES = 1 << 28
"""Patches of a single-batch data set are kept between replicates up to this size."""
PILOT_SAMPLES = 2 * BLOCK
"""Samples of the first batch that a pilot looks at: enough to tell groups from single samples."""
_PILOT = 1 << 40  # replicate numbers of the pilot, never those of a measurement


@dataclass(frozen=True)
class Plan:
    """What a measurement does; `reason` says why this method."""

    method: str
    gauss_newton: str = "exact"
    groups: int = 16
    at_once: int = 1
    sample_groups: Mapping[str, int] = field(default_factory=dict)
    balance: Mapping[int, float] = field(default_factory=dict)
    parts: bool = True
    reason: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError(f"unknown method {self.method!r}; {nearest(self.method, [*METHODS, 'auto'])}")
        if self.gauss_newton not in ("exact", "signs"):
            raise ConfigurationError(f"gauss_newton must be 'exact' or 'signs', not {self.gauss_newton!r}")
        if self.groups < 4 or self.at_once < 1:
            raise ConfigurationError("a plan needs groups >= 4 and at_once >= 1")

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
    reason: str = "",
) -> Plan:
    """The plan for a method, with a pilot where the method has something to choose."""
    size = objective.size
    groups = replicate_groups(size)
    at_once = 1 if batches == 1 else max(1, min(8, (1 << 28) // (8 * size)))
    if method != "propagation":
        return Plan(method, groups=groups, at_once=at_once, reason=reason)
    if len(first.targets) > PILOT_SAMPLES:
        first = first.part(torch.arange(PILOT_SAMPLES, device=first.targets.device))
    batch = Linearisation(objective, first.inputs, first.targets, index=first.index)
    columns = len(batch.curvature.signs)
    gauss_newton = "exact" if columns <= EXACT_COLUMNS else "signs"
    balance = balance_products(batch, seed)
    if balance:
        batch = Linearisation(objective, first.inputs, first.targets, index=first.index, balance=balance)
    chosen = choose_groups(batch, seed)
    return Plan(method, gauss_newton, groups, at_once, chosen, balance, True, reason)


def choose_groups(batch: Linearisation, seed: int, *, candidates: tuple[int, ...] = (1, BLOCK)) -> dict[str, int]:
    """How many samples to sum before squaring, by variance times time of pilot replicates.

    Summing is chosen only where it wins by a factor of two, so that the noise of a clock does not decide.
    """
    convolutions = [layer.name for layer in batch.layers if layer.kind == "conv"]
    if not convolutions or not batch.sites or batch.samples < BLOCK:
        return {}
    signs = Signs(seed, batch.outputs.device)
    cost: dict[int, float] = {}
    for group in candidates:
        propagator = Propagator(batch, groups={layer.name: group for layer in batch.layers})
        propagator.functional(signs, _PILOT)  # first call prepares
        begun = time.perf_counter()
        pair = [propagator.functional(signs, _PILOT + i) for i in (1, 2)]
        seconds = time.perf_counter() - begun
        cost[group] = seconds * _half_difference(*pair)
    best = min(cost, key=lambda g: cost[g])
    if best == 1 or cost[best] * 2.0 > cost[1]:
        return {}
    return {layer.name: best for layer in batch.layers}


def balance_products(batch: Linearisation, seed: int) -> dict[int, float]:
    """Lambda of each product of activations, so that both factors reach the parameters with equal strength.

    lambda^4 = |J_b^T s|^2 / |J_a^T s|^2 with random signs s on the product's entries: two backward passes each.
    """
    halves: dict[int, int] = {}
    for number, site in enumerate(batch.sites):
        if site.product is not None and site.product not in halves:
            halves[site.product] = number
    signs = Signs(seed, batch.outputs.device)
    parameters = list(batch.objective.parameters.values())
    balance: dict[int, float] = {}
    for product, number in halves.items():
        site = batch.sites[number]
        s = signs.plain(site.c, _PILOT, number) * site.c.abs().sqrt()
        strength = []
        for edge, _ in site.legs:
            seed_ = s.sum_to_size(edge_shape(edge))
            found = torch.autograd.grad(
                [torch.autograd.graph.GradientEdge(*edge)],
                parameters,
                [seed_],
                retain_graph=True,
                allow_unused=True,
            )
            strength.append(sum(float(g.double().square().sum()) for g in found if g is not None))
        a, b = strength
        if a > 0 and b > 0:
            balance[product] = min(max((b / a) ** 0.25, 1e-3), 1e3)
    return balance


def _half_difference(a: Tensors, b: Tensors) -> float:
    """Unbiased total variance of one replicate, from two."""
    return 0.5 * sum(float((a[name] - b[name]).square().sum()) for name in a)


def double_copy(objective: Objective) -> Objective:
    """The same objective on a float64 copy of the model, for checks at float64 accuracy."""
    import copy

    twin = copy.copy(objective)
    twin.model = copy.deepcopy(objective.model).double()
    everything = dict(twin.model.named_parameters())
    twin.parameters = {name: everything[name] for name in objective.parameters}
    twin.dtype = torch.float64
    return twin


def as_double(value: Any) -> Any:
    """Floating-point tensors of a structure in float64."""
    from torch.utils import _pytree

    return _pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)
