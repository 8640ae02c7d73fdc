"""One function per kind of rule: rows of a curve in, an answer with its figure and interval out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from experiments.correlation.association import associate
from experiments.correlation.coefficients import Array
from experiments.correlation.coincidence import coincide
from experiments.correlation.noise import curve
from experiments.correlation.peaks import locate
from experiments.correlation.rows import Row, column, curvatures
from experiments.correlation.ushape import u_shape

YES, NO, UNDECIDED = "yes", "no", "undecided"


@dataclass(frozen=True)
class Answer:
    """What one curve says, in words and numbers."""

    answer: str
    text: str
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class Rules:
    """The thresholds that all rules share."""

    band: tuple[float, float]
    level: float
    margin: float
    resamples: int
    generator: np.random.Generator


Judge = Callable[[Sequence[Row], Mapping[str, Any], Rules], Answer]


def quantity(chosen: Sequence[Row], name: str) -> Array:
    """A number of every row; "log ..." takes its natural logarithm."""
    if name.startswith("log "):
        with np.errstate(invalid="ignore", divide="ignore"):
            values: Array = np.log(column(chosen, name.removeprefix("log ")))
        return values
    return column(chosen, name)


def _finite(chosen: Sequence[Row]) -> list[Row]:
    return [row for row in chosen if np.isfinite(row.curvature)]


def peak_in_band(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the extreme of the curve lies in the band, by two fits."""
    chosen, lowest = _finite(chosen), bool(rule.get("lowest", False))
    x, y = curvatures(chosen), quantity(chosen, rule.get("quantity", "aa2"))
    smooth, steps = (
        locate(x, y, fit=fit, lowest=lowest, resamples=rules.resamples, generator=rules.generator)
        for fit in ("quadratic", "unimodal")
    )
    low, high = rules.band
    inside = low <= smooth.low and smooth.high <= high and low <= steps.at <= high
    outside = all(peak.high < low or peak.low > high for peak in (smooth, steps))
    what = "minimum" if lowest else "peak"
    text = f"{what} at {smooth.at:.3g} [{smooth.low:.3g}, {smooth.high:.3g}] (quadratic in log)"
    text += f", {steps.at:.3g} [{steps.low:.3g}, {steps.high:.3g}] (unimodal)"
    if not smooth.from_seeds:
        text += ", one seed"
    return Answer(YES if inside else NO if outside else UNDECIDED, text, smooth.at, smooth.low, smooth.high)


def _slope(chosen: Sequence[Row], rule: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Slope over log max|σ''| within the rule's range, its standard error and degrees of freedom."""
    low, high = rule["range"]
    kept = [row for row in _finite(chosen) if low <= row.curvature <= high]
    y = quantity(kept, rule["quantity"])
    if len({round(row.curvature, 9) for row in kept}) < 2 or not np.isfinite(y).any():
        return None
    t, finite = np.log(curvatures(kept)), np.isfinite(y)
    t, y = t[finite], y[finite]
    centred = t - t.mean()
    spread = float((centred**2).sum())
    if len(t) < 3 or spread <= 0:
        return None
    slope = float((centred * y).sum() / spread)
    residual = float(((y - y.mean() - slope * centred) ** 2).sum() / (len(t) - 2))
    freedom = float(len(t) - 2)
    try:
        everything = _finite(chosen)
        noise = curve(curvatures(everything), quantity(everything, rule["quantity"]))
    except ValueError:
        noise = None
    if noise is not None and noise.from_seeds and noise.sigma**2 > residual:
        residual, freedom = noise.sigma**2, float(noise.freedom)
    return slope, float(np.sqrt(residual / spread)), freedom


def slope(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the curve rises (sign 1) or falls (sign -1) over the range."""
    found = _slope(chosen, rule)
    if found is None:
        return Answer(UNDECIDED, "fewer than three runs in the range")
    value, error, freedom = found
    half = float(stats.t.isf(rules.level / 2, freedom)) * error
    low, high = value - half, value + half
    sign = rule["sign"]
    answer = YES if min(sign * low, sign * high) > 0 else NO if max(sign * low, sign * high) < 0 else UNDECIDED
    return Answer(answer, f"slope {value:+.3g} [{low:+.3g}, {high:+.3g}] per unit of log max|σ''|", value, low, high)


def steepest(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether β = 2 has a lower slope than each other β."""
    slopes = {beta: _slope([row for row in chosen if row.beta == beta], rule) for beta in (0, 1, 2)}
    if any(found is None for found in slopes.values()):
        return Answer(UNDECIDED, "fewer than three runs of some β in the range")
    known = {beta: found for beta, found in slopes.items() if found is not None}
    answers, texts = [], []
    for beta in (0, 1):
        difference = known[2][0] - known[beta][0]
        error = float(np.hypot(known[2][1], known[beta][1]))
        half = float(stats.t.isf(rules.level / 2, known[2][2] + known[beta][2])) * error
        answers.append(YES if difference + half < 0 else NO if difference - half > 0 else UNDECIDED)
        texts.append(f"β=2 less β={beta}: {difference:+.3g} ± {half:.2g}")
    return Answer(combined(answers), "difference of slopes " + ", ".join(texts))


def coincidence(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the curves of all β coincide over max|σ''| or α; `negated` asks whether they differ."""
    chosen = [row for row in chosen if row.beta is not None]
    x = curvatures(chosen) if rule["over"] == "curvature" else np.array([row.alpha or np.nan for row in chosen])
    group = [row.beta for row in chosen]
    keep = {"margin": rules.margin, "below": rule["below"], "resamples": rules.resamples}
    found = coincide(x, column(chosen, "aa2"), group, generator=rules.generator, **keep)
    text = f"fits at most {found.distance:.3g} apart, below {found.upper:.3g} at 95%; margin {found.margin:g}"
    if found.verdict == "differ":
        text += f"; at {found.worst_at:.3g} they differ by {found.worst:.3g}, at least {found.worst_low:.3g}"
    yes, no = ("differ", "coincide") if rule.get("negated") else ("coincide", "differ")
    answer = YES if found.verdict == yes else NO if found.verdict == no else UNDECIDED
    return Answer(answer, text, found.distance, 0.0, found.upper)


def shape(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the curve is U-shaped by the two-lines test."""
    chosen = _finite(chosen)
    found = u_shape(curvatures(chosen), quantity(chosen, rule["quantity"]))
    text = f"two lines break at {found.break_at:.3g}: slopes {found.left.value:+.3g} (p = {found.left.p_value:.2g})"
    text += (
        f" and {found.right.value:+.3g} (p = {found.right.p_value:.2g}); quadratic p = {found.quadratic_p_value:.2g}"
    )
    wrong = any(s.p_value > 1 - rules.level / 2 for s in (found.left, found.right) if np.isfinite(s.value))
    return Answer(YES if found.holds(rules.level) else NO if wrong else UNDECIDED, text, found.break_at)


def association(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether Spearman's correlation has the claimed sign."""
    x, y = quantity(chosen, rule["x"]), quantity(chosen, rule["y"])
    return _signed(x, y, [row.configuration for row in chosen], rule["sign"], rules)


def crossed(chosen: Sequence[Row], others: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """The same between x of one sweep and y of another, matched by activation."""
    ys: dict[str, list[float]] = {}
    for row, value in zip(others, quantity(others, rule["y"]), strict=True):
        if np.isfinite(value):
            ys.setdefault(row.activation, []).append(float(value))
    kept = [row for row in chosen if row.activation in ys]
    if not kept:
        return Answer(UNDECIDED, "the two sweeps share no activation")
    y = np.array([float(np.mean(ys[row.activation])) for row in kept])
    return _signed(quantity(kept, rule["x"]), y, [row.activation for row in kept], rule["sign"], rules)


def _signed(x: Array, y: Array, cluster: Sequence[object], sign: int, rules: Rules) -> Answer:
    found = associate(x, y, cluster=cluster, resamples=rules.resamples, generator=rules.generator)
    if not np.isfinite(found.low):
        return Answer(UNDECIDED, f"{found.configurations} configurations are too few")
    signed = sorted((sign * found.low, sign * found.high))
    answer = YES if signed[0] > 0 else NO if signed[1] < 0 else UNDECIDED
    text = f"Spearman {found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}], p = {found.p_value:.2g}"
    return Answer(answer, f"{text}, {found.configurations} configurations", found.value, found.low, found.high)


def same_place(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the interval of one curve's minimum meets that of the other's maximum, both within the measured range:
    one that reaches its end, as noise makes it, meets everything.
    """
    chosen = _finite(chosen)
    x, count, generator = curvatures(chosen), rules.resamples, rules.generator
    low = locate(x, quantity(chosen, rule["low"]), lowest=True, resamples=count, generator=generator)
    high = locate(x, quantity(chosen, rule["high"]), resamples=count, generator=generator)
    meet = low.low <= high.high and high.low <= low.high
    ends = float(x.min()) * (1 + 1e-9), float(x.max()) * (1 - 1e-9)
    inside = all(ends[0] < peak.low and peak.high < ends[1] for peak in (low, high))
    text = f"norm lowest at {low.at:.3g} [{low.low:.3g}, {low.high:.3g}]"
    text += f", robustness highest at {high.at:.3g} [{high.low:.3g}, {high.high:.3g}]"
    return Answer(NO if not meet else YES if inside else UNDECIDED, text)


def signal(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether a curve moves by more than a seed does."""
    chosen = _finite(chosen)
    measured = curve(curvatures(chosen), quantity(chosen, rule["quantity"]))
    if not measured.from_seeds:
        return Answer(UNDECIDED, "a single seed does not tell its own scatter")
    moved = float(np.ptp(measured.mean))
    if moved == 0 and measured.sigma == 0:
        return Answer(UNDECIDED, "every run gave the same: neither curvature nor seed moves it")
    ratio = moved / measured.sigma if measured.sigma > 0 else np.inf
    answer = YES if ratio >= rule["enough"] else NO if ratio < rule["little"] else UNDECIDED
    text = f"range of the curve {moved:.3g}, scatter of a seed {measured.sigma:.3g}: ratio {ratio:.2g}"
    return Answer(answer, text, ratio)


def combined(answers: Sequence[str]) -> str:
    """Of several that must all hold."""
    if NO in answers:
        return NO
    return YES if answers and all(answer == YES for answer in answers) else UNDECIDED


JUDGES: dict[str, Judge] = {
    "peak_in_band": peak_in_band,
    "slope": slope,
    "steepest": steepest,
    "coincide": coincidence,
    "u_shape": shape,
    "association": association,
    "same_place": same_place,
    "signal": signal,
}
