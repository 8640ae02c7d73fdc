"""From the sums of a finished loop to a Measurement: norms of everything, per tensor and per group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UncoveredModelError
from ..graph import Linearisation
from ..graph.sites.elementwise import curvature_of
from ..norm import NormEstimate, NormReport, TraceEstimate, cosine, estimate, exact_norm, share, trace
from ..objective import Objective
from ..stream import Numbered
from .audit import Audit
from .loop import Loop
from .result import EffectiveCurvature, Measurement, NormSummary

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


def summarise(
    loop: Loop,
    *,
    first: Numbered,
    audit: Audit | None,
    status: str,
    notes: list[str],
    confidence: float,
    seconds: float,
    keep_diagonal: bool,
    provenance: Mapping[str, Any],
) -> Measurement:
    """The result of one measurement."""
    objective = loop.objective
    groups = parameter_groups(objective)
    total, outer, inner, invariant, traces = _reports(loop, groups, confidence)
    norm = _summary(
        total.total,
        None if outer is None else outer.total,
        None if inner is None else inner.total,
        confidence=confidence,
    )
    tensors = {
        n: _summary(e, _of(outer, "tensors", n), _of(inner, "tensors", n), confidence=confidence)
        for n, e in total.tensors.items()
    }
    by_group = {
        n: _summary(e, _of(outer, "groups", n), _of(inner, "groups", n), confidence=confidence)
        for n, e in total.groups.items()
    }
    effective, unused = _effective(objective, first)
    if unused:
        notes = [
            *notes,
            f"parameters that do not reach the outputs (their entries are zero): {', '.join(unused)}",
        ]
    eps = torch.finfo(objective.dtype).eps
    if norm.total.replicates and norm.total.high > 0.0 and norm.total.half_width <= 32.0 * eps:  # all share a rounding
        notes = [*notes, f"the interval is of sampling alone, and narrower than rounding in {objective.dtype}"]
    lost = _underflown(objective, first, total)
    if lost:
        status = "underflow" if len(lost) == len(total.tensors) else f"{status}; underflow of some tensors"
        notes = [
            *notes,
            f"squares below what {objective.dtype} holds, digits or all of them lost: {', '.join(lost)}; "
            + ("use float64 (model.double())" if objective.dtype == torch.float32 else "scale the model up"),
        ]
    reason = f"{loop.plan.method}: {loop.plan.reason}" if loop.plan.reason else loop.plan.method
    weight = sum(float(p.detach().double().square().sum()) for p in objective.parameters.values())
    return Measurement(
        norm=norm,
        layers=tensors,
        groups=by_group,
        invariant=invariant.total if invariant else None,
        invariant_groups=invariant.groups if invariant else {},
        trace=traces,
        effective_curvature=effective,
        audit=audit,
        status=status,
        notes=(reason, *notes),
        plan=loop.plan,
        loss=loop.survey.mean_loss + 0.5 * objective.l2 * weight,
        samples=loop.survey.samples,
        parameters=objective.size,
        seconds=seconds,
        history=tuple(loop.history),
        provenance=provenance,
        diagonal=loop.diagonal(dict(provenance)) if keep_diagonal else None,
    )


COLUMNS_SEEN = 8


def _underflown(objective: Objective, first: Numbered, report: NormReport) -> list[str]:
    """Tensors whose squares are lost in the dtype, or whose norm's are in float64, though the outputs depend on them.

    Only a norm that small is looked at: a zero is one if no column of the loss's Hessian factor reaches the parameters.
    """
    small, double = torch.finfo(objective.dtype), torch.finfo(torch.float64)
    least = max((small.tiny / small.eps) ** 2, double.tiny / double.eps)  # of squares of entries
    doubtful = [name for name, norm in report.tensors.items() if abs(norm.square) < least]
    if not doubtful:
        return []
    few = first.few(2)
    with torch.enable_grad():
        outputs = objective.outputs(few.inputs, few.targets, index=few.index)
    factor = objective.loss.curvature(outputs.detach(), few.targets).factor[:COLUMNS_SEEN]
    found = set()
    for column in factor if outputs.requires_grad else ():
        seed = column.to(outputs.dtype).reshape(outputs.shape)
        wanted = [objective.parameters[name] for name in doubtful]
        gradients = torch.autograd.grad(outputs, wanted, seed, retain_graph=True, allow_unused=True)
        found |= {name for name, g in zip(doubtful, gradients) if g is not None and bool(g.any())}
    return [name for name in doubtful if name in found]


def _reports(
    loop: Loop, groups: dict[str, str], confidence: float
) -> tuple[NormReport, NormReport | None, NormReport | None, NormReport | None, TraceEstimate]:
    """Norms of total, Gauss-Newton and functional part, of the weighted entries, and the trace."""
    if loop.plan.deterministic:
        diagonal = loop.diagonal({})
        squares = {n: p.detach().double().square() for n, p in loop.objective.parameters.items()}
        weighted = {n: squares[n] * t for n, t in diagonal.total.items()}
        value = sum(float(t.sum()) for t in diagonal.total.values())
        parts = [
            exact_norm(x, groups=groups, confidence=confidence)
            for x in (diagonal.total, diagonal.gauss_newton, diagonal.functional, weighted)
        ]
        return parts[0], parts[1], parts[2], parts[3], TraceEstimate(value, 0.0, value, value, 0, confidence)
    stream = loop.stream_of("total")
    assert stream is not None
    offset = loop.offset("total")
    total = estimate(stream, offset=offset, groups=groups, confidence=confidence, sequential=True)
    invariant = estimate(stream, offset=offset, weighted=True, groups=groups, confidence=confidence)
    traces = trace(stream, offset=offset, confidence=confidence)
    return (
        total,
        _part(loop, "gauss_newton", groups, confidence),
        _part(loop, "functional", groups, confidence),
        invariant,
        traces,
    )


def _part(loop: Loop, part: str, groups: dict[str, str], confidence: float) -> NormReport | None:
    """Norms of one part: from its replicates, exact where nothing of it is random, None where it was not taken."""
    stream, offset = loop.streams.get(part), loop.offset(part)
    if stream is not None:
        return estimate(stream, offset=offset, groups=groups, confidence=confidence)
    return (
        exact_norm(offset, groups=groups, confidence=confidence) if loop.gauss_newton is not None and offset else None
    )


def _of(report: NormReport | None, split: str, name: str) -> NormEstimate | None:
    return None if report is None else (report.tensors if split == "tensors" else report.groups)[name]


def _summary(
    total: NormEstimate, outer: NormEstimate | None, inner: NormEstimate | None, *, confidence: float
) -> NormSummary:
    first, second = (None if part is None else share(part, total, confidence=confidence) for part in (outer, inner))
    angle = None if outer is None or inner is None else cosine(outer, inner, total, confidence=confidence)
    return NormSummary(total, outer, inner, first, second, angle)


def _effective(objective: Objective, first: Numbered) -> tuple[tuple[EffectiveCurvature, ...], tuple[str, ...]]:
    """|gain| max|sigma''| of each normalisation that feeds an activation directly; parameters that reach nothing."""
    one = first.few(1)  # the graph's shape is that of any sample
    try:
        linear = Linearisation(objective, one.inputs, one.targets, index=one.index)
    except UncoveredModelError:
        return (), ()
    norms = {id(layer.node): layer for layer in linear.layers if layer.kind.normalises and layer.weight}
    found = []
    for node in linear.graph.of_kind("elementwise"):
        layer = norms.get(id(node.next_functions[0][0]))
        if layer is None or layer.weight is None:
            continue
        gain: Tensor = objective.parameters[layer.weight].detach().double().abs()
        label, largest = curvature_of(node)
        found.append(
            EffectiveCurvature(layer.name, label, largest, float(gain.mean()) * largest, float(gain.max()) * largest)
        )
    return tuple(found), linear.graph.unused
