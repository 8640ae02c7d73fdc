"""Guaranteed enclosures: exponential polynomials in interval arithmetic, and the bisection that isolates
their zeros.

Every number that leaves here is a pair of rationals between which the truth lies; mpmath rounds outward.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mpmath.ctx_iv import MPIntervalContext  # type: ignore[import-untyped]

from theory._refusals import refuse
from theory.symbolic.series import ExponentialPolynomial

Interval = Any


def context(digits: int = 60) -> Interval:
    """A private interval context, so that no global precision is touched."""
    ctx = MPIntervalContext()
    ctx.dps = digits
    return ctx


@dataclass(frozen=True)
class Enclosure:
    """low <= truth <= high, guaranteed."""

    low: Fraction
    high: Fraction

    @property
    def middle(self) -> float:
        """The midpoint as a float: for display, not for proofs."""
        return float((self.low + self.high) / 2)

    @property
    def width(self) -> float:
        """High - low."""
        return float(self.high - self.low)

    def within(self, low: float, high: float) -> bool:
        """The whole enclosure lies in [low, high]."""
        return bool(Fraction(low) <= self.low and self.high <= Fraction(high))


def as_interval(ctx: Interval, low: Fraction, high: Fraction) -> Interval:
    """The smallest machine interval around [low, high]."""
    a = ctx.mpf(low.numerator) / low.denominator
    b = ctx.mpf(high.numerator) / high.denominator
    return ctx.mpf([a.a, b.b])


def as_enclosure(interval: Interval) -> Enclosure:
    """Exact rationals of an interval's two binary endpoints."""
    return Enclosure(_fraction(interval._mpi_[0]), _fraction(interval._mpi_[1]))


def _fraction(raw: Any) -> Fraction:
    sign, mantissa, exponent, _ = raw
    value: Fraction = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -value if sign else value


def evaluate(function: ExponentialPolynomial, ctx: Interval, at: Interval) -> Interval:
    """F over an interval, by interval arithmetic."""
    total = ctx.mpf(0)
    for (k, j), c in function.terms.items():
        rate = ctx.mpf(int(k.p)) / int(k.q)
        total += ctx.mpf(int(c.p)) / int(c.q) * at**j * ctx.exp(rate * at)
    return total


def sign_at(function: ExponentialPolynomial, point: Fraction, ctx: Interval) -> int:
    """The certain sign of F at a rational point; refuses where the enclosure holds zero."""
    low, high = evaluate(function, ctx, as_interval(ctx, point, point))._mpi_
    if low[0] == 0 and low[1] > 0:
        return 1
    if high[0] == 1 and high[1] > 0:
        return -1
    refuse(f"the sign at {point} is not certain with {ctx.dps} digits; ask for more digits")


def isolate(
    function: ExponentialPolynomial, *, reach: Fraction, steps: int, ctx: Interval, width: Fraction
) -> tuple[tuple[Enclosure, int], ...]:
    """Brackets of certain sign changes of F in (0, reach], each narrowed to `width`, with the sign of F
    before it.
    """
    grid = [reach * i / steps for i in range(1, steps + 1)]
    signs = [sign_at(function, point, ctx) for point in grid]
    found = []
    for a, b, before, after in zip(grid, grid[1:], signs, signs[1:]):
        if before == after:
            continue
        low, high = a, b
        while high - low > width:
            middle = (low + high) / 2
            if sign_at(function, middle, ctx) == before:
                low = middle
            else:
                high = middle
        found.append((Enclosure(low, high), before))
    return tuple(found)
