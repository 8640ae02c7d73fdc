"""Norms, traces and plug-in squares of accumulated replicates: per tensor, per group of tensors, in total."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError, NonFiniteError, NoParametersError
from hessdiag.norm.estimates import NormEstimate, check_confidence, exact_square, from_moments
from hessdiag.norm.jackknife import student_quantile
from hessdiag.norm.moments import Moments
from hessdiag.norm.replicates import Replicates


@dataclass(frozen=True)
class NormReport:
    """Estimates for every tensor, for every group of tensors, and for all of them together."""

    total: NormEstimate
    tensors: dict[str, NormEstimate]
    groups: dict[str, NormEstimate]


@dataclass(frozen=True)
class TraceEstimate:
    """Mean trace, its standard error and Student interval; a by-product of the replicates."""

    value: float
    error: float
    low: float
    high: float
    replicates: int
    confidence: float


def estimate(
    replicates: Replicates,
    *,
    offset: Mapping[str, Tensor] | None = None,
    weighted: bool = False,
    groups: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    sequential: bool = False,
) -> NormReport:
    """Norms of `offset + d`, or of its weighted entries: every tensor, every group of `groups`, the total.

    `groups` names the group of each tensor, e.g. {"conv1.weight": "convolutions", ...}. `sequential=True`
    where the number of replicates is decided by looking at the intervals (`enough`): they are then wide
    enough to allow for it.
    """
    check_confidence(confidence)
    if replicates.count < 2:
        raise ConfigurationError(f"{replicates.count} replicates: a norm without bias needs at least 2")
    moments = replicates.moments(offset=offset, weighted=weighted)

    def of(names: Iterable[str]) -> NormEstimate:
        together = _sum(moments[name] for name in names)
        return from_moments(together, confidence=confidence, sequential=sequential)

    by_group = {group: of(names) for group, names in _members(list(moments), groups).items()}
    return NormReport(of(moments), {name: of([name]) for name in moments}, by_group)


def course(
    replicates: Replicates, *, offset: Mapping[str, Tensor] | None = None, confidence: float = 0.95
) -> list[NormEstimate]:
    """The norm of all entries after the first 4, 5, ... groups of replicates, and after all: what `estimate` says last,
    with how it came to it. Intervals are sequential ones. Nothing but the Gram matrix of the groups is needed.
    """
    check_confidence(confidence)
    if replicates.count < 2:
        raise ConfigurationError(f"{replicates.count} replicates: a norm without bias needs at least 2")
    moments = _sum(replicates.moments(offset=offset).values())
    used = sum(n > 0 for n in moments.sizes)
    earlier = [moments.first(groups) for groups in range(4, used)]
    return [from_moments(m, confidence=confidence, sequential=True) for m in (*earlier, moments)]


def exact_norm(
    diagonal: Mapping[str, Tensor], *, groups: Mapping[str, str] | None = None, confidence: float = 0.95
) -> NormReport:
    """Norms of a diagonal that is known exactly, in the same form and without sampling error."""
    check_confidence(confidence)
    if not diagonal:
        raise NoParametersError("the norm of nothing: the diagonal has no tensor")
    powers: dict[str, tuple[float, float, int]] = {}
    for name, tensor in diagonal.items():
        values = tensor.detach().to(torch.float64).square()
        square, fourth = float(values.sum()), float(values.square().sum())
        if not math.isfinite(square):
            raise NonFiniteError(f"the diagonal of {name!r} holds NaN, Inf or values too large to square")
        powers[name] = (square, fourth, values.numel())

    def total(names: Iterable[str]) -> NormEstimate:
        square, fourth, entries = (sum(column) for column in zip(*(powers[name] for name in names)))
        return exact_square(square, fourth, int(entries), confidence=confidence)

    by_group = {group: total(names) for group, names in _members(list(powers), groups).items()}
    return NormReport(total(powers), {name: total([name]) for name in powers}, by_group)


def plug_in_square(replicates: Replicates, *, offset: Mapping[str, Tensor] | None = None) -> float:
    """|mean of the replicates|^2: too large by the variance of that mean. For validation, never a norm."""
    total = _sum(replicates.moments(offset=offset).values())
    return float(total.gram.sum()) / sum(total.sizes) ** 2


def trace(
    replicates: Replicates, *, offset: Mapping[str, Tensor] | None = None, confidence: float = 0.95
) -> TraceEstimate:
    """Trace of `offset + d`, from every replicate: Student with (replicates - 1) degrees of freedom."""
    check_confidence(confidence)
    count, total, squares = replicates.trace_sums()
    if count < 2:
        raise ConfigurationError(f"{count} replicates: the error of a trace needs at least 2")
    replicates._check_offset(offset)
    known = sum(float(g.detach().sum(dtype=torch.float64)) for g in (offset or {}).values())
    mean = total / count
    error = math.sqrt(max(squares - count * mean**2, 0.0) / (count - 1) / count)
    half = student_quantile(confidence, count - 1) * error
    value = mean + known
    return TraceEstimate(value, error, value - half, value + half, count, confidence)


def _sum(moments: Iterable[Moments]) -> Moments:
    return reduce(add, moments)


def _members(names: list[str], groups: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Group name -> tensor names."""
    if groups is None:
        return {}
    odd = sorted(set(names) ^ set(groups))
    if odd:
        raise ConfigurationError(f"groups: {odd[0]!r} is in the parameters or in the groups but not in both")
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(groups[name], []).append(name)
    return out
