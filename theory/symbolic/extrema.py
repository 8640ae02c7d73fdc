"""Number and place of the extrema of σ'': "2β + 1 extrema" (section 4.2, caption of figure 2).

σ''' times a positive function is an odd exponential polynomial h in y = αx/2. Two exact arguments meet:

* from above, Descartes' rule: the Taylor coefficients of h change sign β times, so h has at most β
  zeros in y > 0
  (β = 1: -4, 0, 2, 4, ...; β = 2: minus, then plus, then minus for good);
* from below, the sign of h at rational points, by interval arithmetic that rounds outward: β certain
  sign changes.

Hence exactly β simple zeros on y > 0, as many on y < 0, and y = 0. Their places are enclosed by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import sympy as sp

from theory.symbolic.intervals import Enclosure, as_enclosure, as_interval, context, evaluate, isolate
from theory.symbolic.maxima import cleared
from theory.symbolic.rct import unit_curvature, x


@dataclass(frozen=True)
class Extremum:
    """One extremum of σ'' at x = place/α with σ''(x) = α · value: both enclosed."""

    place: Enclosure
    value: Enclosure
    kind: str


@dataclass(frozen=True)
class Extrema:
    """All extrema of σ''_{α,β}, from left to right; `exact` says that their number is proved."""

    beta: int
    points: tuple[Extremum, ...]
    at_most: int

    @property
    def count(self) -> int:
        """How many were certainly found."""
        return len(self.points)

    @property
    def exact(self) -> bool:
        """The certain sign changes are as many as Descartes' rule allows at most."""
        return self.count == self.at_most


@lru_cache(maxsize=16)
def extrema(beta: int, *, digits: int = 30) -> Extrema:
    """Extrema of σ''_{1,β}, enclosed to `digits` digits (those of σ''_{α,β} lie at 1/α of the place, α
    times the value).
    """
    tau = unit_curvature(beta)
    slope = cleared(sp.diff(tau, x), beta + 3)
    if slope.parity != 1:
        raise AssertionError("sigma''' of an even sigma'' is odd")
    ctx = context(digits + 30)
    width = Fraction(1, 10**digits)
    changes = slope.signs().changes
    right = isolate(slope, reach=Fraction(12), steps=480, ctx=ctx, width=width)
    positive = cleared(tau, beta + 2)
    points = []
    for bracket, before in right:
        for side in (-1, 1):
            ends = sorted((side * 2 * bracket.low, side * 2 * bracket.high))
            place = Enclosure(ends[0], ends[1])
            y = as_interval(ctx, place.low / 2, place.high / 2)
            cosh = ctx.exp(y) + ctx.exp(-y)
            value = evaluate(positive, ctx, y) / cosh ** (beta + 2)
            points.append(Extremum(place, as_enclosure(value), "maximum" if before > 0 else "minimum"))
    peak = sp.Rational(sp.simplify(tau.subs(x, 0)))
    centre = Enclosure(Fraction(int(peak.p), int(peak.q)), Fraction(int(peak.p), int(peak.q)))
    first = int(sp.sign(slope.coefficient(next(m for m in slope.indices() if slope.coefficient(m) != 0))))
    zero = Enclosure(Fraction(0), Fraction(0))
    points.append(Extremum(zero, centre, "maximum" if first < 0 else "minimum"))
    return Extrema(beta, tuple(sorted(points, key=lambda p: p.place.low)), 2 * changes + 1)
