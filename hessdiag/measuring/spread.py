"""How far a norm would move with other samples: the delete-a-group jackknife over groups of samples.

A norm that is exact for 64 samples says nothing of the next 64. The samples are dealt, by a fixed seed, into G groups
of equal size; D_g is the diagonal of the mean loss of group g. With d the diagonal for the distribution that they come
from, S the covariance of one sample's diagonal, and n samples,

    E |D|^2 = |d|^2 + tr(S)/n   for the diagonal D of all n:   the norm of few samples is too large,
    T = mean over g != h of D_g . D_h,   E T = |d|^2,

where weights of samples differ with the pseudo-values of the ratio (sum of second derivatives) / (sum of weights) for
the D_g, and the jackknife over groups gives Var T (`hessdiag.norm.jackknife`, for both). Where the method draws signs,
every group is measured twice with independent ones, a and b: cov(T_a, T_b) by the jackknife is then the variance by
samples alone, and D_g^a . D_g^b keeps no noise. Nothing of it depends on how many replicates the norm itself took.

For N > n samples of the same kind, these n among them, the square is expected to be T + tr(S)/N, with the variance of T
times (1 - n/N): what is left when N = n is that of no sampling at all.

Memory: beyond `WIDTH` entries a diagonal is kept as a sketch (Charikar, Chen & Farach-Colton 2002): each entry, with
a random sign, in one of `WIDTH` random places. Products of two sketches are unbiased for those of the diagonals, with
an error of at most sqrt(2/WIDTH) |D_g| |D_h|, 0.3%.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError, EmptyDataError, UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.kernels.exact_batch import cost
from hessdiag.measuring.choose import AUTO_EXACT_FLOPS
from hessdiag.measuring.entry import diagonal
from hessdiag.measuring.result import Measurement
from hessdiag.methods import Plan, find
from hessdiag.methods.batches import Batches, Numbered, joined, numbered
from hessdiag.norm.estimates import check_confidence
from hessdiag.norm.jackknife import (
    interval,
    jackknife_covariance,
    ratio_pseudo_values,
    student_quantile,
    u_statistic,
)
from hessdiag.problem.forward import mapped
from hessdiag.problem.objective import Objective
from hessdiag.signs import cpu_generator, key

LEAST, MOST = 8, 16
"""Groups of samples: fewer say too little of a variance, more gain little and cost passes."""
SAMPLES = 512
"""Samples that are looked at, at most: the variance by samples is then scaled to all of them."""
WIDTH = 1 << 18
"""Entries of a diagonal that are kept as they are; more are sketched."""
PER_SAMPLE_BYTES = 64e6
"""Up to so many bytes, exact diagonals are taken for single samples in one pass and summed by group."""
Rows = np.ndarray[Any, Any]
_CHUNK = 1 << 22
_DEAL = 20
"""Seed of the deal: fixed, so that two measurements on the same samples have the same groups."""


@dataclass(frozen=True)
class Spread:
    """What other samples of the same kind would give, in terms of `rms`; NaN where noise hides it."""

    rms: float
    """For the distribution that the samples come from; lower than the norm of few samples as a rule."""
    low: float
    high: float
    square: float
    square_error: float
    """Standard error of `square` by the choice of samples alone, for all `samples`."""
    bias: float
    """tr(S)/n (and the bias of a ratio, where weights differ): what the squared norm of n samples is too large by."""
    groups: int
    group_size: int
    samples: int
    """Samples of the measurement."""
    entries: int
    confidence: float
    seconds: float
    bytes: int
    """Held for the groups' diagonals."""
    passes: int
    """Diagonals taken, each of one group."""

    @property
    def half_width(self) -> float:
        """Half the interval relative to `rms`."""
        return (self.high - self.low) / (2.0 * self.rms) if self.rms > 0.0 else math.inf

    def expected(self, samples: int) -> tuple[float, float, float]:
        """(rms, low, high) expected of `samples` of the same kind, those measured among them."""
        if samples < self.samples:
            raise ConfigurationError(f"{samples} samples expected of {self.samples}: more are needed")
        square = self.square + self.bias * self.samples / samples
        error = self.square_error * math.sqrt(1.0 - self.samples / samples)
        return _ends(square, error, self.groups, self.entries, self.confidence)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"half_width": self.half_width}


def spread(
    measured: Measurement,
    objective: Objective,
    batches: Batches,
    *,
    groups: int = MOST,
    samples: int | None = SAMPLES,
    confidence: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Spread:
    """The spread over samples of the norm in `measured`, which was taken of `objective` on `batches`.

    At most `samples` of them, chosen by a fixed seed, are looked at (None: all). The work is about that of measuring
    these once more.
    """
    begun = time.monotonic()
    confidence = measured.confidence if confidence is None else confidence
    check_confidence(confidence)
    if not isinstance(groups, int) or not LEAST <= groups <= MOST:
        raise ConfigurationError(f"groups={groups!r}: {LEAST} to {MOST} groups of samples")
    if measured.provenance.get("target") == "population":
        raise ConfigurationError("the population target has its spread over samples in its interval already")
    if measured.parameters != objective.size:
        raise ConfigurationError(
            f"the measurement has {measured.parameters} parameters, the objective {objective.size}: give its own"
        )
    count = int(measured.provenance.get("counted", measured.samples))
    if count < LEAST:
        what = "samples" if count == measured.samples else "samples with targets that count"
        raise EmptyDataError(f"{count} {what}: at least {LEAST} are needed to tell how far others would be")
    used = count if samples is None else min(count, max(samples, LEAST))
    groups = min(groups, used)
    size = used // groups
    shards = _shards(objective, batches, count, groups, size, int(measured.provenance["largest_batch"]))
    weights = np.array([shard.weight for shard in shards]) / size
    if not weights.all():
        raise EmptyDataError(f"a group of {size} samples is all of classes of weight zero: more samples are needed")
    first, second, passes = _sketches(measured, objective, shards, weights, progress)
    found = of_groups(first, second, weights)
    used = groups * size
    scale = used / count
    square, bias = measured.norm.total.square, found.bias * scale
    centre, error = square - bias, math.sqrt(found.variance * scale) if found.variance > 0 else math.nan
    rms, low, high = _ends(centre, error, groups, objective.size, confidence)
    return Spread(
        rms=rms,
        low=low,
        high=high,
        square=centre,
        square_error=error,
        bias=bias,
        groups=groups,
        group_size=size,
        samples=measured.samples,
        entries=objective.size,
        confidence=confidence,
        seconds=time.monotonic() - begun,
        bytes=first.nbytes + (0 if second is first else second.nbytes),
        passes=passes,
    )


@dataclass(frozen=True)
class _Moments:
    """|d|^2 without bias, its variance by samples, and tr(S)/n, all for the samples in the groups together."""

    square: float
    variance: float
    bias: float


def of_groups(first: Rows, second: Rows, weights: Rows) -> _Moments:
    """From the sums of the groups' second derivatives, one row each, and of their weights, both divided by the size.

    `second` has independent signs, or is the same array if exact.
    """
    groups = len(first)
    sizes = (1,) * groups
    exact = second is first
    own, other = (x[:, None] for x in ratio_pseudo_values(weights))
    means = [x.sum(0) / weights.sum() for x in (first, second)]
    first, second = (own * x + other * mean for x, mean in zip((first, second), means))
    halves = [u_statistic(x @ x.T, np.square(x).sum(1), sizes) for x in ((first,) if exact else (first, second))]
    a, b = halves[0], halves[-1]
    square = 0.5 * float(a.square + b.square)
    variance = float(a.variance if exact else jackknife_covariance(a.square, a.deleted, b.square, b.deleted, sizes))
    scatter = (float((first * second).sum()) / groups - square) / groups
    # The ratio itself is what was measured, the mean of its pseudo-values has less bias.
    return _Moments(square, variance, scatter + float(means[0] @ means[1] - first.mean(0) @ second.mean(0)))


def _ends(square: float, error: float, groups: int, entries: int, confidence: float) -> tuple[float, float, float]:
    low, high = interval(np.array(square), np.array(error), student_quantile(confidence, groups - 1))
    rms = math.sqrt(square / entries) if square > 0 else math.nan
    if math.isnan(error):
        return rms, math.nan, math.nan
    return rms, math.sqrt(float(low) / entries), math.sqrt(float(high) / entries)


class _Group:
    """The samples of one group, as batches no larger than the caller's, of those that are alike."""

    def __init__(self, parts: list[Numbered], weight: float, largest: int) -> None:
        self.weight = weight
        self._parts: list[Numbered] = []
        for part in parts:
            for place, pile in enumerate(self._parts):
                both = joined(pile, part) if len(pile.targets) + len(part.targets) <= largest else None
                if both is not None:
                    self._parts[place] = both
                    break
            else:
                self._parts.append(part)

    @property
    def batches(self) -> list[tuple[Any, Tensor]]:
        """Pairs of inputs and targets."""
        return [(part.inputs, part.targets) for part in self._parts]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return iter(self.batches)


def _shards(objective: Objective, batches: Batches, count: int, groups: int, size: int, largest: int) -> list[_Group]:
    """The groups' samples: a random deal, its seed fixed, of `groups * size` of the `count` samples with a loss."""
    order = torch.randperm(count, generator=cpu_generator(_DEAL), device="cpu")
    group = torch.full((count,), -1, dtype=torch.long, device="cpu")
    group[order[: groups * size]] = torch.arange(groups * size, device="cpu") % groups
    parts: list[list[Numbered]] = [[] for _ in range(groups)]
    weights = [0.0] * groups
    seen = 0
    for batch in numbered(objective, batches):
        with_loss = objective.loss.counted(batch.targets).nonzero()[:, 0]
        here = group[seen : seen + len(with_loss)].to(with_loss.device)
        seen += len(with_loss)
        for g in sorted(set(here.tolist()) - {-1}):
            part = batch.part(with_loss[: len(here)][here == g])
            parts[g].append(replace(part, inputs=mapped(part.inputs, lambda x: x.detach().clone())))
            weights[g] += float(objective.loss.weights(part.targets, part.targets).sum())
    if seen != count:
        raise ConfigurationError(f"the measurement had {count} samples, these batches have {seen}: give the same")
    return [_Group(part, weight, largest) for part, weight in zip(parts, weights)]


def _sketches(
    measured: Measurement,
    objective: Objective,
    shards: list[_Group],
    weights: Rows,
    progress: Callable[[int, int], None] | None,
) -> tuple[Rows, Rows, int]:
    """One row for each group, its second derivatives summed and divided by its size, l2 times its weight among them:
    exact ones, or two sets of estimates with independent signs.
    """
    size = sum(len(targets) for _, targets in shards[0])
    total = len(shards) * size
    plan = _plan(measured, objective, shards, total)
    exact = find(plan.method).singles
    if exact and 16.0 * total * objective.size <= PER_SAMPLE_BYTES:
        whole = [batch for shard in shards for batch in shard]
        single = diagonal(objective, whole, plan=plan, per_sample=True, **_OPTIONS).total
        rows = []
        for g, weight in enumerate(weights):
            surplus = objective.l2 * (1.0 - weight)  # it is on every sample once, whatever its weight
            of = {name: t[g * size : (g + 1) * size].double().mean(0) - surplus for name, t in single.items()}
            rows.append(_sketch(of))
        first = np.stack(rows)
        return first, first, len(shards)
    halves: list[list[Rows]] = [[], []]
    times = 1 if exact else 2
    # No more passes than the measurement took.
    taken = measured.replicates * int(measured.provenance["batches"])
    replicates = max(2, taken // (2 * sum(len(shard.batches) for shard in shards)))
    for g, shard in enumerate(shards):
        for half in range(times):
            seed = key(int(measured.provenance["seed"]), g, half)
            found = diagonal(objective, shard, plan=plan, seed=seed, replicates=replicates, **_OPTIONS)
            halves[half].append(_sketch(found.total) * weights[g])
        if progress is not None:
            progress(g + 1, len(shards))
    first = np.stack(halves[0])
    return first, first if exact else np.stack(halves[1]), times * len(shards)


def _plan(measured: Measurement, objective: Objective, shards: list[_Group], total: int) -> Plan:
    """Exact where that is cheap, whatever the measurement used: no noise is then in the way. Else its own method."""
    plan = replace(measured.plan, deflate=0, probe_rank=0)
    if find(plan.method).singles:
        return plan
    inputs, targets = shards[0].batches[0]
    try:
        linear = Linearisation(objective, inputs, targets, index=0)
        cheap = cost(linear).flops * total / linear.samples <= AUTO_EXACT_FLOPS
    except UncoveredModelError:
        cheap = False
    failed = plan.reason.startswith("the site identity does not serve")  # its audit, though it covers the graph
    if cheap and not failed:
        return replace(plan, method="exact")
    return replace(plan, method="hutchinson") if find(plan.method).deterministic else plan


_OPTIONS: dict[str, Any] = {"budget": None, "deterministic_check": False, "audit_model": False}


def _sketch(tensors: Mapping[str, Tensor]) -> Rows:
    """The entries, or their signed sums in `WIDTH` places; the same places for every group."""
    entries = sum(t.numel() for t in tensors.values())
    if entries <= WIDTH:
        flat = torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors.values()])
        return flat.numpy()
    out = torch.zeros(WIDTH, dtype=torch.float64, device="cpu")
    generator = cpu_generator(_DEAL)
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            values = flat[start : start + _CHUNK].double().cpu()
            # One draw for both: the sign is its last bit, the place the others.
            drawn = torch.randint(2 * WIDTH, (len(values),), generator=generator, device="cpu")
            out.index_add_(0, drawn >> 1, values * (1 - 2 * (drawn & 1)).double())
    return out.numpy()
