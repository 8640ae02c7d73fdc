"""From the sums of a finished loop to a Measurement: norms of everything, per tensor and per group."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import UncoveredModelError
from hessdiag.graph.sites.elementwise import curvature_of
from hessdiag.measuring.audit import Audit
from hessdiag.measuring.diagonal import Diagonal
from hessdiag.measuring.provenance import provenance
from hessdiag.measuring.result import EffectiveCurvature, Measurement, NormSummary
from hessdiag.measuring.totals import Sums
from hessdiag.methods import Case
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, TOTAL
from hessdiag.methods.batches import Numbered
from hessdiag.norm import (
    NormEstimate,
    NormReport,
    Replicates,
    TraceEstimate,
    cosine,
    estimate,
    exact_norm,
    share,
    trace,
)
from hessdiag.problem.objective import Objective

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_CONVS = nn.modules.conv._ConvNd


def parameter_groups(objective: Objective) -> dict[str, str]:
    """Group of each parameter: what a rescaling acts on as one."""
    owners = {id(p): module for module in objective.model.modules() for p in module.parameters(recurse=False)}
    groups = {}
    for name, parameter in objective.parameters.items():
        owner, last = owners.get(id(parameter)), name.rpartition(".")[2]
        if isinstance(owner, _NORMS):
            groups[name] = "norm gain" if last == "weight" else "norm bias"
        elif last == "bias":
            groups[name] = "bias"
        elif isinstance(owner, _CONVS):
            groups[name] = "convolution"
        elif isinstance(owner, nn.Linear):
            groups[name] = "linear"
        else:
            groups[name] = "other"
    return groups


@dataclass(frozen=True)
class Reports:
    """Norms of the total, of its parts where they were taken, of the weighted entries, and the trace."""

    total: NormReport
    outer: NormReport | None
    inner: NormReport | None
    invariant: NormReport | None
    trace: TraceEstimate


@dataclass(frozen=True)
class Course:
    """How a measurement went: what is told beside its norms."""

    target: str
    audit: Audit | None
    status: str
    notes: list[str]
    begun: float
    effective: tuple[EffectiveCurvature, ...]
    unreached: tuple[str, ...] = ()
    """Parameters that the first samples do not reach; others may (an expert that they are not sent to)."""
    history: tuple[tuple[int, float, float, float], ...] = ()
    diagonal: Callable[[dict[str, Any]], Diagonal] | None = None


def summarise(case: Case, found: Reports, course: Course) -> Measurement:
    """The result of one measurement."""
    objective, confidence, total = case.objective, found.total.total.confidence, found.total
    norm = _summary(
        total.total,
        None if found.outer is None else found.outer.total,
        None if found.inner is None else found.inner.total,
        confidence=confidence,
    )
    tensors, by_group = (
        {
            n: _summary(e, _of(found.outer, kind, n), _of(found.inner, kind, n), confidence=confidence)
            for n, e in estimates.items()
        }
        for kind, estimates in (("tensors", total.tensors), ("groups", total.groups))
    )
    status, notes = course.status, list(course.notes)
    eps = torch.finfo(objective.dtype).eps
    if norm.total.replicates and norm.total.high > 0.0 and norm.total.half_width <= 32.0 * eps:  # all share a rounding
        notes.append(f"the interval is of sampling alone, and narrower than rounding in {objective.dtype}")
    squares = {name: estimate.square for name, estimate in total.tensors.items()}
    alone = {name: objective.l2**2 * objective.parameters[name].numel() for name in course.unreached}
    unreached = [name for name, square in alone.items() if isclose(squares[name], square, rel_tol=1e-12)]
    if unreached:
        what = "zero" if objective.l2 == 0.0 else "those of l2 alone"
        notes.append(f"parameters that do not reach the outputs (their entries are {what}): {', '.join(unreached)}")
    lost = underflown(objective, case.first, squares)
    if lost:
        status = underflow(status, lost, squares)
        notes.append(
            f"squares below what {objective.dtype} holds, digits or all of them lost: {', '.join(lost)}; "
            + ("use float64 (model.double())" if objective.dtype == torch.float32 else "scale the model up")
        )
    reason = f"{case.plan.method}: {case.plan.reason}" if case.plan.reason else case.plan.method
    weight = sum(float(p.detach().double().square().sum()) for p in objective.parameters.values())
    facts = provenance(case, target=course.target)
    return Measurement(
        norm=norm,
        layers=tensors,
        groups=by_group,
        invariant=found.invariant.total if found.invariant else None,
        invariant_groups=found.invariant.groups if found.invariant else {},
        trace=found.trace,
        effective_curvature=course.effective,
        audit=course.audit,
        status=status,
        notes=(reason, *notes),
        plan=case.plan,
        loss=case.survey.mean_loss + 0.5 * objective.l2 * weight,
        samples=case.survey.samples,
        parameters=objective.size,
        seconds=time.monotonic() - course.begun,
        history=course.history,
        provenance=facts,
        diagonal=None if course.diagonal is None else course.diagonal(dict(facts)),
    )


COLUMNS_SEEN = 8


def underflow(status: str, lost: Collection[str], everything: Collection[str]) -> str:
    """The status of a result that has lost the squares of some tensors."""
    return "underflow" if len(lost) == len(everything) else f"{status}; underflow of some tensors"


def underflown(objective: Objective, first: Numbered, squares: Mapping[str, float]) -> list[str]:
    """Tensors whose squares are lost in the dtype, or whose norm's are in float64, though the outputs depend on them.

    `squares` are those of the norms.

    Only a norm that small is looked at: a zero is one if no column of the loss's Hessian factor reaches the parameters.
    """
    small, double = torch.finfo(objective.dtype), torch.finfo(torch.float64)
    least = max((small.tiny / small.eps) ** 2, double.tiny / double.eps)  # of squares of entries
    doubtful = [name for name, square in squares.items() if abs(square) < least]
    if not doubtful:
        return []
    few = first.few(2)
    with torch.enable_grad():
        outputs = objective.outputs(few.inputs, few.targets, index=few.index)
    curvature = objective.loss.curvature(outputs.detach(), few.targets)
    found = set()
    for column in curvature.some(COLUMNS_SEEN) if outputs.requires_grad else ():
        seed = column.to(outputs.dtype).reshape(outputs.shape)
        wanted = [objective.parameters[name] for name in doubtful]
        gradients = torch.autograd.grad(outputs, wanted, seed, retain_graph=True, allow_unused=True)
        found |= {name for name, g in zip(doubtful, gradients) if g is not None and bool(g.any())}
    return [name for name in doubtful if name in found]


def reports(sums: Sums, confidence: float) -> Reports:
    """From the sums of a finished loop."""
    groups = parameter_groups(sums.objective)
    if sums.method.deterministic:
        diagonal = sums.diagonal({})
        squares = {n: p.detach().double().square() for n, p in sums.objective.parameters.items()}
        weighted = {n: squares[n] * t for n, t in diagonal.total.items()}
        value = sum(float(t.sum()) for t in diagonal.total.values())
        total, outer, inner, invariant = (
            exact_norm(x, groups=groups, confidence=confidence)
            for x in (diagonal.total, diagonal.gauss_newton, diagonal.functional, weighted)
        )
        return Reports(total, outer, inner, invariant, TraceEstimate(value, 0.0, value, value, 0, confidence))
    stream = sums.stream_of(TOTAL)
    assert stream is not None
    offset = sums.offset(TOTAL)
    return Reports(
        estimate(stream, offset=offset, groups=groups, confidence=confidence, sequential=True),
        _part(sums, GAUSS_NEWTON, groups, confidence),
        _part(sums, FUNCTIONAL, groups, confidence),
        estimate(stream, offset=offset, weighted=True, groups=groups, confidence=confidence),
        trace(stream, offset=offset, confidence=confidence),
    )


def reports_of_shards(objective: Objective, stream: Replicates, confidence: float) -> Reports:
    """From one replicate of the total per shard of a population."""
    groups = parameter_groups(objective)
    return Reports(
        estimate(stream, groups=groups, confidence=confidence),
        None,
        None,
        estimate(stream, weighted=True, groups=groups, confidence=confidence),
        trace(stream, confidence=confidence),
    )


def _part(sums: Sums, part: str, groups: dict[str, str], confidence: float) -> NormReport | None:
    """Norms of one part: from its replicates, exact where nothing of it is random, None where it was not taken."""
    stream, offset = sums.streams.get(part), sums.offset(part)
    if stream is not None:
        return estimate(stream, offset=offset, groups=groups, confidence=confidence)
    return exact_norm(offset, groups=groups, confidence=confidence) if GAUSS_NEWTON in sums.known and offset else None


def _of(report: NormReport | None, split: str, name: str) -> NormEstimate | None:
    return None if report is None else (report.tensors if split == "tensors" else report.groups)[name]


def _summary(
    total: NormEstimate, outer: NormEstimate | None, inner: NormEstimate | None, *, confidence: float
) -> NormSummary:
    first, second = (None if part is None else share(part, total, confidence=confidence) for part in (outer, inner))
    angle = None if outer is None or inner is None else cosine(outer, inner, total, confidence=confidence)
    return NormSummary(total, outer, inner, first, second, angle)


def effective(case: Case) -> tuple[tuple[EffectiveCurvature, ...], tuple[str, ...]]:
    """|gain| max|sigma''| of each normalisation that feeds an activation directly; parameters that the first samples do
    not reach.
    """
    try:
        graph = case.graph
    except UncoveredModelError:
        return (), ()
    norms = {id(layer.node): layer for layer in graph.layers if layer.kind.normalises and layer.weight}
    found = []
    for node in graph.of_kind("elementwise"):
        layer = norms.get(id(node.next_functions[0][0]))
        if layer is None or layer.weight is None:
            continue
        gain: Tensor = case.objective.parameters[layer.weight].detach().double().abs()
        label, largest = curvature_of(node)
        found.append(
            EffectiveCurvature(layer.name, label, largest, float(gain.mean()) * largest, float(gain.max()) * largest)
        )
    return tuple(found), graph.unused
