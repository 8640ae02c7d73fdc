"""Norms without bias, from replicates: point, interval, status, and the decision to stop.

With T unbiased for the squared norm (see `hessdiag.norm.jackknife`), `t` Student's quantile with (groups in
use - 1) degrees of freedom, `x = t * error` and `r = x / T`, the interval of the squared norm is

    [T - x,  T + x (exp(min(r, 1)) - 1) / min(r, 1)],

and that of the norm its square roots. The upper end is that of a logarithmic interval as long as the error is
below the estimate: replicates made of squares are skewed to the right, a low T comes with a low error, and
the symmetric interval then misses nearly always on the same side.

A plug-in norm (the norm of the mean) is too large by the whole variance of the mean and is nowhere given as a
norm.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hessdiag.errors import ConfigurationError
from hessdiag.norm.jackknife import interval, student_quantile, u_statistic
from hessdiag.norm.moments import Moments

STATUS = {
    "ok": "unbiased estimate with its interval",
    "exact": "no sampling error",
    "negative": "the unbiased square is not positive: only an upper bound is known; take more replicates",
    "few replicates": "fewer than four groups of replicates: its error is rough or unknown; take more",
    "noise dominates": "most of the variance comes from pairs of noises: the interval is wide and covers too "
    "often; take more replicates or a method with less variance",
    "few entries dominate": "a handful of entries carry the norm, and one replicate varies by as much as the estimate: "
    "the interval may cover too seldom; take more replicates",
    "heavy tails": "a single replicate varies by more than the estimate itself: few samples or entries "
    "carry it, the interval may cover too seldom; take more replicates",
}
"""Every status and what it says; the first of an estimate's flags is its status."""

# Where coverage was seen to drift (printed by tests/hessdiag/test_norm_coverage.py): one or four entries
# that are single squares, not eight; noise ten times the signal.
MIN_PARTICIPATION = 5.0
"""Fewer entries than this carrying the norm are a handful."""
FEW_SPREAD = 1.0
"""A single replicate must vary by more than this, relative to T, for a handful to matter: quiet ones cover at 95%."""
RESOLVED = 0.5
"""With a larger relative error of T nothing is known of how many entries carry it."""
MAX_NOISE_SHARE = 0.5
"""More of the variance than this made by pairs of noises is noise that dominates."""
MIN_NOISE = 1e-6
"""A relative error of T below this is no noise that could dominate, but rounding, or too little to matter."""
MAX_SPREAD = 1.5
"""A single replicate that varies by more than this, relative to T, makes tails heavy."""


@dataclass(frozen=True)
class NormEstimate:
    """An unbiased squared norm of `entries` diagonal entries, and both sides of E[8] from it."""

    square: float
    """T, unbiased for |d|^2; may be negative."""
    square_error: float
    """Standard error of T by the jackknife; NaN where it cannot be told."""
    norm: float
    """sqrt(T); NaN where T <= 0."""
    rms: float
    """|d| / sqrt(p), the right side of E[8]."""
    mean_scaled: float
    """|d| / p, the left side of E[8]."""
    low: float
    """Lower end of the interval of `rms`."""
    high: float
    """Upper end of the interval of `rms`."""
    entries: int
    replicates: int
    dof: int
    """Degrees of freedom of the quantile used."""
    confidence: float
    sequential: bool
    """Whether the interval allows for stopping as soon as it is narrow."""
    status: str
    flags: tuple[str, ...]
    noise_share: float
    """Share of T's variance made by pairs of noises; NaN where unknown."""
    participation: float
    """Estimated (sum d^2)^2 / sum d^4, the number of entries that carry the norm; NaN where unknown."""
    deleted: tuple[float, ...]
    """T without each group in use: what ratios of measurements with common replicates need."""
    sizes: tuple[int, ...]
    """Replicates in each group in use."""

    @property
    def norm_interval(self) -> tuple[float, float]:
        """Interval of `norm`."""
        return self.low * math.sqrt(self.entries), self.high * math.sqrt(self.entries)

    @property
    def mean_scaled_interval(self) -> tuple[float, float]:
        """Interval of `mean_scaled`."""
        return self.low / math.sqrt(self.entries), self.high / math.sqrt(self.entries)

    @property
    def half_width(self) -> float:
        """Half the interval of `rms` relative to `rms`; infinite where there is no norm."""
        if self.rms == 0.0 and self.high == 0.0:
            return 0.0
        return (self.high - self.low) / (2.0 * self.rms) if self.rms > 0.0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def from_moments(moments: Moments, *, confidence: float = 0.95, sequential: bool = False) -> NormEstimate:
    """The estimate for one set of entries; `sequential` as in `hessdiag.norm.report.estimate`."""
    u = u_statistic(moments.gram, moments.own, moments.sizes)
    dof = min(u.dof, len(moments.sizes) // 2) if sequential else u.dof
    square, variance = float(u.square), float(u.variance)
    count = sum(u.sizes)
    # Every replicate exactly zero, as the functional part of a piecewise-linear network: the norm is zero.
    zero = not np.any(moments.own)
    error = math.sqrt(variance)
    low, high = interval(u.square, np.sqrt(u.variance), student_quantile(confidence, dof))
    pair = float(u.pair_variance)
    noise_share = pair / variance if variance > 0.0 else (math.nan if math.isnan(variance) else 0.0)
    participation = square**2 / moments.fourth if moments.fourth > 0.0 else math.nan
    flags = []
    if square <= 0.0 and not zero:
        flags.append("negative")
    if len(u.sizes) < 4 or math.isnan(variance):
        flags.append("few replicates")
    if noise_share > MAX_NOISE_SHARE and error > MIN_NOISE * abs(square):
        flags.append("noise dominates")
    single = math.sqrt(count * max(variance - pair, 0.0)) if not math.isnan(variance) else 0.0
    if participation < MIN_PARTICIPATION and single > FEW_SPREAD * square > 0.0 and error < RESOLVED * square:
        flags.append("few entries dominate")
    if single > MAX_SPREAD * abs(square):
        flags.append("heavy tails")
    norm = math.sqrt(square) if square > 0.0 or zero else math.nan
    root = math.sqrt(moments.entries)
    return NormEstimate(
        square=square,
        square_error=error,
        norm=norm,
        rms=norm / root,
        mean_scaled=norm / moments.entries,
        low=math.sqrt(float(low)) / root,
        high=math.sqrt(float(high)) / root,
        entries=moments.entries,
        replicates=count,
        dof=dof,
        confidence=confidence,
        sequential=sequential,
        status=flags[0] if flags else "ok",
        flags=tuple(flags),
        noise_share=noise_share,
        participation=participation,
        deleted=tuple(u.deleted.tolist()),
        sizes=u.sizes,
    )


def exact_square(square: float, fourth: float, entries: int, *, confidence: float = 0.95) -> NormEstimate:
    """The estimate that is none: a known sum of squares (and of fourth powers) of so many entries."""
    norm, root = math.sqrt(square), math.sqrt(entries)
    participation = square**2 / fourth if fourth > 0.0 else math.nan
    return NormEstimate(
        square=square,
        square_error=0.0,
        norm=norm,
        rms=norm / root,
        mean_scaled=norm / entries,
        low=norm / root,
        high=norm / root,
        entries=entries,
        replicates=0,
        dof=0,
        confidence=confidence,
        sequential=False,
        status="exact",
        flags=("exact",),
        noise_share=0.0,
        participation=participation,
        deleted=(),
        sizes=(),
    )


def enough(estimate: NormEstimate, *, rtol: float, min_replicates: int = 10) -> bool:
    """Whether to stop: half the interval of `rms` at most `rtol` of it, and `min_replicates` counted.

    Stopping at the first narrow interval selects intervals that are narrow by luck. Two things are done about
    it: no stop before ten replicates, and an `estimate` made with `sequential=True`, whose quantile has at
    most half as many degrees of freedom as there are groups. Without the second, 95% intervals cover 92 to
    94%.
    """
    if not (math.isfinite(rtol) and rtol > 0.0):
        raise ConfigurationError(f"rtol={rtol!r}: a positive number is needed, e.g. 0.05 for five per cent")
    if min_replicates < 2:
        raise ConfigurationError(f"min_replicates={min_replicates!r}: a norm needs at least 2 replicates")
    if estimate.status == "exact":
        return True
    if not estimate.sequential:
        raise ConfigurationError("stopping needs estimate(..., sequential=True): others cover too seldom")
    return estimate.replicates >= min_replicates and estimate.half_width <= rtol


def check_confidence(confidence: float) -> None:
    """Refuse a confidence that is no probability."""
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence={confidence!r}: a number between 0 and 1 is needed, e.g. 0.95")
