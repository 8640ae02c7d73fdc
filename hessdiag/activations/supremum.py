"""The supremum of |sigma''| of any function of one variable: adaptive, and infinite where sigma' jumps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.activations.derivatives import STEP, WIDTH, Derivatives
from hessdiag.errors import NonFiniteError

EPS = torch.finfo(torch.float64).eps
RANGE = 1e4
SMALLEST = 1e-12
CENTRE = 24.0
RESOLVED = 1e-9  # an interval is resolved when sigma'' accounts for the change of sigma' up to this, relative
JUMP = 1e-7  # what is unaccounted for at rounding distance is a jump of sigma' if larger than this, relative
GRAIN = 1e-8  # no larger a shift of x is put down to the rounding of numbers on the way
LEVELS = 16  # of refinement at which WIDEST intervals are halved in the centre, and as many beyond
WIDEST = 32768
DEEPEST = 4096  # intervals halved at each level from there on
PLACES = 16  # how many places are told at most, the nearest to 0


@dataclass(frozen=True)
class Curvature:
    """The supremum of |sigma''| and the points where it is reached (or approached), in increasing order."""

    value: float
    at: tuple[float, ...]


def supremum(function: Callable[[Tensor], Tensor]) -> Curvature:
    """The supremum of |sigma''| of an elementwise function of a float64 tensor.

    sigma' and sigma'' come from autograd (sigma'' from central differences of sigma' where autograd has none
    or contradicts them: about six digits then). On each interval of a grid the change of sigma' is compared
    with Simpson's integral of sigma''; intervals where they differ are halved until they agree or are as
    narrow as rounding allows. What still differs there by more than rounding may make of a smooth function is a jump
    of sigma' (or of sigma): the supremum is infinite. Elsewhere the largest |sigma''| found is polished between its
    neighbours.

    Limits: looks at |x| <= 1e4, on a grid that is logarithmic down to 1e-12 around 0 and of step 0.01 for
    |x| <= 24. A feature narrower than the grid is missed if sigma' is the same on both its sides; a jump of
    sigma' below 1e-7 of sigma' is not taken for a kink (torch's softplus has one of 2e-9 at its threshold); a
    transition narrower than about 4e-15 |x| is. The rounding of x moves sigma' by up to about 1e-15 |x sigma''|, that
    of larger numbers on the way by more: a jump which is no larger cannot be told from it and is not taken for a
    kink. Where oscillations are too many to be resolved, those nearest to 0 are: kinks of sin(wx) + f(x), w up to 300,
    are found for |x| <= 24 and up to about 2000/w, and may be missed beyond, or where w is larger. Growth that has
    not stopped at |x| = 1e4 counts as infinite, reached at ±inf, and so does growth as a power of the distance from a
    point (|x|^1.5 at 0).
    """
    at = Derivatives(function)
    x, bend, kinks = _refine(at, _grid())
    if kinks:
        return Curvature(math.inf, _places([_tidy(k) for k in kinks]))
    infinite = bend == math.inf
    if bool(infinite.any()):
        places = x[infinite].clamp(-RANGE, RANGE).tolist()
        return Curvature(math.inf, _places([math.copysign(math.inf, p) if abs(p) > 1 else p for p in places]))
    top = float(bend.max())
    edge, inside = (at.bend(torch.tensor([-s, s], dtype=torch.float64)) for s in (RANGE, RANGE / 2))
    growing = (edge >= top * (1 - 1e-12)) & (inside < top * (1 - 1e-6))
    if bool(growing.any()):
        return Curvature(math.inf, _places([s for s, g in zip((-math.inf, math.inf), growing.tolist()) if g]))
    return _polish(at, x, bend)


def _grid() -> Tensor:
    """Nodes: logarithmic on both sides of 0, uniform where activations usually live."""
    decades = round(math.log10(RANGE / SMALLEST))
    side = torch.logspace(math.log10(SMALLEST), math.log10(RANGE), 24 * decades + 1, dtype=torch.float64)
    side[-1] = RANGE
    uniform = torch.arange(-100 * int(CENTRE), 100 * int(CENTRE) + 1, dtype=torch.float64) / 100
    nodes = torch.cat([-side, side, uniform]).sort().values
    return nodes[torch.cat([torch.ones(1, dtype=torch.bool), nodes[1:] != nodes[:-1]])]


def _refine(at: Derivatives, nodes: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """All points visited, |sigma''| there, and the places where sigma' or sigma jumps.

    Every point is evaluated once: in torch 2.6 the slope of hardswish at its kinks is that of either side, whichever
    the place in the vector brings about, and a jump that no interval holds is lost.
    """
    known = _evaluated(at, nodes)
    sizes = [_Size(), _Size()]
    points, bends, suspects = [nodes], [known[3].abs()], []
    for size, f in zip(sizes, known[1:3]):
        size.add(nodes, f)
    low, high = known[:, :-1], known[:, 1:]
    level = 0
    while low.shape[1]:
        middle = _evaluated(at, (low[0] + high[0]) / 2)
        points.append(middle[0])
        bends.append(middle[3].abs())
        narrow = high[0] - low[0] <= torch.clamp(4e-15 * middle[0].abs(), min=1e-18)
        excess = torch.zeros_like(middle[0])
        jumps = torch.zeros_like(narrow)
        for order, size in enumerate(sizes, 1):
            size.add(middle[0], middle[order])
            three = torch.stack([low, middle, high], 1)[[0, order, order + 1]]
            unaccounted = _unaccounted(*three)
            unaccounted -= 4 * EPS * middle[0].abs() * three[2].abs().amax(0)
            relative = unaccounted / torch.maximum(three[1].abs().amax(0), size.floor(middle[0]))
            relative = torch.where(relative.isfinite(), relative, torch.zeros_like(relative))
            excess = torch.maximum(excess, relative)
            found = narrow & (relative > JUMP)
            jumps[found] |= ~_rounding(at, order, three[:, :, found], unaccounted[found])
        suspects += list(zip(middle[0, jumps].tolist(), excess[jumps].tolist()))
        split = _most_wanted(middle[0], torch.where(narrow, torch.zeros_like(excess), excess), level)
        level += 1
        low, middle, high = (ends[:, split] for ends in (low, middle, high))
        low, high = torch.cat([low, middle], 1), torch.cat([middle, high], 1)
    x, order_of_x = torch.cat(points).sort()
    bend = torch.cat(bends)[order_of_x]
    keep = torch.cat([torch.ones(1, dtype=torch.bool), x[1:] != x[:-1]]) & ~bend.isnan()
    return x[keep], bend[keep], _isolate(suspects)


class _Size:
    """The largest |f| met so far for |x| <= CENTRE, and in each octave beyond on either side."""

    def __init__(self) -> None:
        self._octaves = math.ceil(math.log2(RANGE / CENTRE))
        self._largest = torch.zeros(2 * self._octaves + 3, dtype=torch.float64)

    def add(self, x: Tensor, f: Tensor) -> None:
        finite = f.isfinite()
        self._largest.scatter_reduce_(0, self._octave(x[finite]), f[finite].abs(), "amax")

    def floor(self, x: Tensor) -> Tensor:
        """A ten-thousandth of the largest in the centre and within an octave of x: changes of less are rounding's."""
        near = torch.stack([self._largest[:-2], self._largest[1:-1], self._largest[2:]]).amax(0)
        return 1e-4 * torch.maximum(near[self._octave(x) - 1], self._largest[self._octaves + 1]).clamp(min=1e-196)

    def _octave(self, x: Tensor) -> Tensor:
        """A place in the table; its two ends stay empty."""
        octave = (x.abs() / CENTRE).clamp(min=1).log2().ceil() * x.sign()
        return octave.long() + self._octaves + 1


def _evaluated(at: Derivatives, x: Tensor) -> Tensor:
    """The points, sigma, sigma' and sigma'' there."""
    value, slope, second = at(x)
    _refuse_nan(x, value, slope)
    return torch.stack([x, value, slope, second])


def _unaccounted(x: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """|f(high) - f(low) - Simpson's integral of f'|; each is given at the low end, the middle and the high end."""
    return (f[2] - f[0] - (x[2] - x[0]) / 6 * (slope[0] + 4 * slope[1] + slope[2])).abs()


def _rounding(at: Derivatives, order: int, known: Tensor, jump: Tensor) -> Tensor:
    """Whether rounding may have made the jumps of f, the derivative of order - 1, between low and high end.

    Numbers rounded on the way from x to f shift x by some grain, and f by up to grain |f'|: the jump is what a grain
    of jump / |f'| would make. So f is looked at up to twice as far beside the interval (within a few of its widths if
    that grain is larger than GRAIN). Rounding makes f depart there, too, from the integral of f' by a fair part of
    the jump, or leaves the two sides as they would be without it; a true jump does neither.
    """
    x, _, slope = known
    spacing = torch.nextafter(x[1].abs(), torch.full_like(x[1], math.inf)) - x[1].abs()
    grain = jump / slope.abs().amax(0)
    step = torch.where(grain <= GRAIN, torch.maximum(grain / 4, spacing), x[2] - x[0])
    outward = step * torch.arange(1, 10, dtype=torch.float64)[:, None]
    points = torch.stack([x[0] - outward, x[2] + outward]).clamp(-RANGE, RANGE)
    f, slope = _evaluated(at, points.flatten())[order : order + 2].reshape(2, *points.shape)
    departs = _off(points[:, :1], points, f[:, :1], f, slope[:, :1], slope).abs().amax((0, 1))
    across = _off(points[0, 0], points[1, 0], f[0, 0], f[1, 0], slope[0, 0], slope[1, 0]).abs()
    return (departs > jump / 4) | (across < jump / 2)


def _off(x: Tensor, y: Tensor, f: Tensor, g: Tensor, slope: Tensor, steep: Tensor) -> Tensor:
    """g at y less f at x, less the trapezoid of their slopes."""
    return g - f - (y - x) * (slope + steep) / 2


def _most_wanted(x: Tensor, excess: Tensor, level: int) -> Tensor:
    """Which intervals to halve: of those not resolved the worst in the centre and the nearest beyond, or the worst.

    While intervals are wide oscillations are many, and each must be resolved before a kink in it stands out; deeper
    down little but kinks and rounding is left, and kinks are the larger.
    """
    split = excess > RESOLVED
    centre = x.abs() <= CENTRE
    wide = [(split & centre, excess, WIDEST), (split & ~centre, 1 / x.abs(), WIDEST)]
    for part, rank, most in wide if level < LEVELS else [(split, excess, DEEPEST)]:
        if int(part.sum()) > most:
            split = split & ~part
            split[torch.where(part, rank, torch.zeros_like(rank)).topk(most).indices] = True
    return split


def _isolate(suspects: list[tuple[float, float]]) -> list[float]:
    """One place per kink: central differences smear a kink over their step, the true place stands out."""
    kinks: list[float] = []
    for place, _ in sorted(suspects, key=lambda pair: -pair[1]):
        if all(abs(place - kink) > 4 * STEP * max(abs(kink), WIDTH) for kink in kinks):
            kinks.append(place)
    return kinks


def _refuse_nan(x: Tensor, value: Tensor, slope: Tensor) -> None:
    bad = value.isnan() | slope.isnan()
    if bool(bad.any()):
        raise NonFiniteError(
            f"the function or its derivative is NaN at x = {float(x[bad][0]):.6g}: "
            "give a form that holds for every |x| <= 1e4"
        )


def _polish(at: Derivatives, x: Tensor, bend: Tensor) -> Curvature:
    """The local maxima near the top, each searched between its neighbours."""
    padded = torch.cat([bend.new_tensor([-1.0]), bend, bend.new_tensor([-1.0])])
    high_enough = bend >= 0.99 * bend.max()
    peak = (high_enough & (bend >= padded[:-2]) & (bend >= padded[2:])).nonzero().flatten()
    nearest, highest = x[peak].abs().argsort()[:64], bend[peak].argsort(descending=True)[:64]
    peak = torch.cat([peak[nearest], peak[highest], bend.argmax().reshape(1)])
    low, high = x[(peak - 1).clamp(min=0)], x[(peak + 1).clamp(max=x.numel() - 1)]
    best, best_bend = x[peak].clone(), bend[peak].clone()
    fractions = torch.linspace(0, 1, 17, dtype=torch.float64)
    for _ in range(12):
        trial = low[:, None] + (high - low)[:, None] * fractions
        value, index = at.bend(trial.flatten()).reshape(trial.shape).nan_to_num(-1.0).max(1)
        better = value > best_bend
        best = torch.where(better, trial.gather(1, index[:, None])[:, 0], best)
        best_bend = torch.where(better, value, best_bend)
        step = (high - low) / 16
        low, high = torch.maximum(low, best - step), torch.minimum(high, best + step)
    top = float(best_bend.max())
    every, order = torch.cat([x, best]).sort()
    slack = 1e-9 if at.exact else 1e-6
    places = _witnesses(every, torch.cat([bend, best_bend])[order], top, slack)
    return Curvature(math.inf if all(_diverges(at, p) for p in places) else top, places)


def _diverges(at: Derivatives, place: float) -> bool:
    """Whether |sigma''| grows as a power of the distance, between 0 and -1, close to `place`."""
    distance = max(1.0, abs(place)) * torch.logspace(-10, -6, 5, dtype=torch.float64)
    for side in (-1, 1):
        bend = at.bend(place + side * distance)
        ratio = bend[:-1] / bend[1:]
        if bool(((ratio > 1.2) & (ratio < 10)).all()):
            return True
    return False


def _witnesses(x: Tensor, bend: Tensor, top: float, slack: float) -> tuple[float, ...]:
    """One point per run of points that reach the top: the best one, or a plateau's nearest to 0."""
    reached = bend >= top * (1 - slack)
    runs = (reached.int().diff(prepend=torch.zeros(1, dtype=torch.int32)) > 0).cumsum(0)
    places = []
    for run in runs[reached].unique().tolist():  # type: ignore[no-untyped-call]
        inside = reached & (runs == run)
        exact = x[inside & (bend >= top * (1 - 1e-12))]
        if exact.numel() == 0:
            exact = x[inside]
        nearest = float(exact[exact.abs().argmin()])
        plateau = float(exact.max() - exact.min()) > 1e-2 * float(exact.abs().max())
        place = nearest if plateau else float(x[inside][bend[inside].argmax()])
        places.append(0.0 if abs(place) <= 2 * SMALLEST else place)
    return _places(places)


def _places(places: list[float]) -> tuple[float, ...]:
    """The few nearest to 0, each once, in increasing order."""
    return tuple(sorted(sorted(set(places), key=abs)[:PLACES]))


def _tidy(place: float) -> float:
    """A kink's place without the rounding of the bisection."""
    return 0.0 if abs(place) <= 2 * SMALLEST else float(f"{place:.12g}")
