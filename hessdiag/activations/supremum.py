"""The supremum of |sigma''| of any function of one variable: adaptive, and infinite where sigma' jumps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.activations.derivatives import Derivatives
from hessdiag.errors import NonFiniteError

RANGE = 1e4
SMALLEST = 1e-12
RESOLVED = 1e-9  # an interval is resolved when sigma'' accounts for the change of sigma' up to this, relative
JUMP = 1e-7  # what remains unaccounted for at rounding distance is a jump of sigma' if larger than this, relative
WIDEST = 4096  # intervals refined at one level, the worst first


@dataclass(frozen=True)
class Curvature:
    """sup |sigma''| and the points where it is reached (or approached), in increasing order."""

    value: float
    at: tuple[float, ...]


def supremum(function: Callable[[Tensor], Tensor]) -> Curvature:
    """sup |sigma''| of an elementwise function of a float64 tensor.

    sigma' and sigma'' come from autograd (sigma'' from central differences of sigma' where autograd has none or
    contradicts them: about six digits then). On each interval of a grid the change of sigma' is compared with
    Simpson's integral of sigma''; intervals where they differ are halved until they agree or are as narrow as
    rounding allows. What still differs there is a jump of sigma' (or of sigma): the supremum is infinite. Elsewhere the
    largest |sigma''| found is polished between its neighbours.

    Limits: looks at |x| <= 1e4, on a grid that is logarithmic down to 1e-12 around 0 and of step 0.01 for |x| <= 24.
    A feature narrower than the grid is missed if sigma' is the same on both its sides; a jump of sigma' below 1e-7
    of sigma' is not taken for a kink (torch's softplus has one of 2e-9 at its threshold); a transition
    narrower than about 1e-15 |x| is. Growth that has not stopped at |x| = 1e4 counts as infinite, reached at ±inf.
    """
    at = Derivatives(function)
    x, bend, kinks = _refine(at, _grid())
    if kinks:
        return Curvature(math.inf, tuple(sorted({_tidy(k) for k in kinks})))
    top = float(bend.max())
    if math.isinf(top):
        return Curvature(math.inf, tuple(sorted({_tidy(float(v)) for v in x[bend == math.inf]}))[:16])
    ends = tuple(
        side * math.inf
        for side in (-1.0, 1.0)
        if float(at.bend(torch.tensor([side * RANGE]))) >= top * (1 - 1e-12)
        and float(at.bend(torch.tensor([side * RANGE / 2]))) < top * (1 - 1e-6)
    )
    if ends:
        return Curvature(math.inf, ends)
    return _polish(at, x, bend)


def _grid() -> Tensor:
    """Nodes: logarithmic on both sides of 0, uniform where activations usually live."""
    decades = round(math.log10(RANGE / SMALLEST))
    side = torch.logspace(math.log10(SMALLEST), math.log10(RANGE), 24 * decades + 1, dtype=torch.float64)
    side[-1] = RANGE
    uniform = torch.linspace(-24, 24, 4801, dtype=torch.float64)
    return torch.cat([-side, side, uniform, torch.zeros(1, dtype=torch.float64)]).unique()


def _refine(at: Derivatives, nodes: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """All points visited, |sigma''| there, and the places where sigma' or sigma jumps."""
    low, high = nodes[:-1], nodes[1:]
    points, bends, kinks = [], [], []
    floor_of_slope = 0.0
    while low.numel():
        n = low.numel()
        middle = (low + high) / 2
        x = torch.cat([low, middle, high])
        value, slope, second = at(x)
        _refuse_nan(x, value, slope)
        points.append(x)
        bends.append(second.abs())
        floor_of_slope = floor_of_slope or 1e-4 * float(slope[x.abs() <= 24].abs().max())
        excess = torch.maximum(
            _unaccounted(slope, second, high - low, n, floor_of_slope),
            _unaccounted(value, slope, high - low, n, 0.0),
        )
        narrow = (high - low) <= torch.clamp(4e-15 * middle.abs(), min=1e-18)
        kinks += [float(v) for v in middle[narrow & (excess > JUMP)]]
        split = ~narrow & (excess > RESOLVED)
        if int(split.sum()) > WIDEST:
            worst = torch.where(split, excess, torch.zeros_like(excess)).topk(WIDEST).indices
            split = torch.zeros_like(split).index_fill(0, worst, True)
        low, high = torch.cat([low[split], middle[split]]), torch.cat([middle[split], high[split]])
    x, order = torch.cat(points).sort()
    bend = torch.cat(bends)[order]
    keep = torch.cat([torch.ones(1, dtype=torch.bool), x[1:] != x[:-1]]) & ~bend.isnan()
    return x[keep], bend[keep], kinks


def _unaccounted(f: Tensor, slope: Tensor, width: Tensor, n: int, floor: float) -> Tensor:
    """|f(high) - f(low) - Simpson's integral of f'|, relative to the largest |f| of the interval."""
    simpson = width / 6 * (slope[:n] + 4 * slope[n : 2 * n] + slope[2 * n :])
    scale = torch.clamp(f.abs().reshape(3, n).amax(0), min=max(floor, 1e-200))
    off = (f[2 * n :] - f[:n] - simpson).abs() / scale
    return torch.where(off.isfinite(), off, torch.zeros_like(off))


def _refuse_nan(x: Tensor, value: Tensor, slope: Tensor) -> None:
    bad = value.isnan() | slope.isnan()
    if bool(bad.any()):
        raise NonFiniteError(
            f"the function or its derivative is NaN at x = {float(x[bad][0]):.6g}: give a form that holds on the real line"
        )


def _polish(at: Derivatives, x: Tensor, bend: Tensor) -> Curvature:
    """The local maxima near the top, each searched between its neighbours."""
    padded = torch.cat([bend.new_tensor([-1.0]), bend, bend.new_tensor([-1.0])])
    peak = (bend >= padded[:-2]) & (bend > padded[2:]) | (bend > padded[:-2]) & (bend >= padded[2:])
    peak = (peak & (bend >= 0.99 * bend.max())).nonzero().flatten()
    if peak.numel() == 0:  # constant curvature
        peak = x.abs().argmin().reshape(1)
    if peak.numel() > 64:
        peak = peak[bend[peak].topk(64).indices]
    start, start_bend = x[peak], bend[peak]
    low, high = x[(peak - 1).clamp(min=0)], x[(peak + 1).clamp(max=x.numel() - 1)]
    fractions = torch.linspace(0, 1, 17, dtype=torch.float64)
    best, best_bend = start.clone(), start_bend.clone()
    for _ in range(12):
        trial = low[:, None] + (high - low)[:, None] * fractions
        found = at.bend(trial.flatten()).reshape(trial.shape).nan_to_num(-1.0)
        value, index = found.max(1)
        better = value > best_bend
        best = torch.where(better, trial.gather(1, index[:, None])[:, 0], best)
        best_bend = torch.where(better, value, best_bend)
        step = (high - low) / 16
        low, high = torch.maximum(low, best - step), torch.minimum(high, best + step)
    top = float(best_bend.max())
    # The top is flat to rounding over 1e-8 of its width: a node that reaches it is the better witness.
    place = torch.where(start_bend >= top * (1 - 1e-13), start, best)[best_bend >= top * (1 - 1e-9)]
    merged: list[float] = []
    for point in sorted((float(p) for p in place), key=abs):
        if all(abs(point - other) > 1e-6 * max(abs(point), 1e-3 * SMALLEST) for other in merged):
            merged.append(point)
    return Curvature(top, tuple(sorted({0.0 if abs(p) <= 2 * SMALLEST else p for p in merged[:16]})))


def _tidy(place: float) -> float:
    """A kink's place without the rounding of the bisection."""
    return 0.0 if abs(place) <= 2 * SMALLEST else float(f"{place:.12g}")
