"""One function per kind of rule: the runs of one curve, or of one table, in; p-values, figure and interval out.

An answer carries three p-values. `p_for` and `p_against` are one-sided, each of the hypothesis that the claim, or its
opposite, is not so; `p_equal` is that of two one-sided tests: what the claim speaks of is smaller than δ. A claim of
several parts needs all of them (the largest p-value: an intersection-union test) and falls with any of them (the
smallest, times their number: Bonferroni). `verdicts` doubles p_for and p_against, for either may be asserted, and
decides after Holm's correction over the claims of one family. A claim that itself says "no difference" has its
equivalence as p_for, halved, for that test is not doubled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from experiments.correlation.association import within
from experiments.correlation.contrasts import INFLATION, Contrast, Layout
from experiments.correlation.rows import Row, column, curvatures, quantity
from experiments.correlation.shapes import quadratic_weights
from experiments.correlation.ushape import u_shape
from hessdiag.errors import ConfigurationError

NAN = float("nan")


@dataclass(frozen=True)
class Answer:
    """What one curve says: p-values, the figure that carries them, and how sure it could have been.

    `half` is the half-width of the least certain contrast's interval, `power` its chance to see the named effect: that
    of one contrast at the level itself, so of the claim, which needs several and is corrected by Holm, at most that.
    """

    text: str
    p_for: float = 1.0
    p_against: float = 1.0
    p_equal: float = 1.0
    value: float = NAN
    low: float = NAN
    high: float = NAN
    half: float = NAN
    power: float = NAN


@dataclass(frozen=True)
class Rules:
    """The thresholds that all rules share: groups of max|σ''|, level, δ and the named effect by kind of quantity."""

    band: tuple[float, float]
    low: float
    high: float
    level: float
    delta: Mapping[str, float]
    effect: Mapping[str, float]

    def of(self, quantity: str) -> tuple[float, float]:
        """δ and the effect whose power is told, in the quantity's unit (log where it is a logarithm)."""
        if quantity.startswith("log "):
            return float(np.log1p(self.delta["norm"])), float(np.log1p(self.effect["norm"]))
        return self.delta["accuracy"], self.effect["accuracy"]


class NotRun(ConfigurationError):
    """The sweep holds no run of what a claim speaks of; the message says what is missing."""


Judge = Callable[[Sequence[Row], Mapping[str, Any], Rules], Answer]


def level_of(row: Row) -> float:
    """max|σ''| of a run, as levels are compared."""
    return round(row.curvature, 9)


def layout_of(chosen: Sequence[Row], name: str) -> Layout:
    """The runs of one curve by level and seed."""
    finite = [row for row in chosen if np.isfinite(row.curvature)]
    levels = [level_of(row) for row in finite]
    place: dict[Hashable, float] = {level: level for level in levels}
    return Layout(levels, [row.seed for row in finite], quantity(finite, name), inflation=INFLATION, place=place)


def groups(levels: Sequence[Any], rules: Rules) -> dict[str, list[float]]:
    """Levels of a curve that count as low, band and high."""
    return {
        "low": [x for x in levels if x <= rules.low],
        "band": [x for x in levels if rules.band[0] <= x <= rules.band[1]],
        "high": [x for x in levels if x >= rules.high],
    }


def _shown(contrast: Contrast, name: str, level: float) -> str:
    """The contrast as a reader wants it: points of accuracy, per cent of a norm."""
    low, high = contrast.interval(level)
    note = f" ({contrast.note})" if contrast.note else ""
    figures = ", ".join(unit(value, name, sign=True) for value in (low, high))
    return f"{unit(contrast.value, name, sign=True)} [{figures}], {contrast.freedom:.0f} d.f.{note}"


def unit(value: float, name: str, *, sign: bool = False) -> str:
    """A difference in the unit that its name asks for."""
    plus = "+" if sign else ""
    if not np.isfinite(value):
        return "-"
    if name.startswith("log "):
        return f"{100 * np.expm1(min(value, 50.0)):{plus}.3g}%"
    if name in ("aa", "aa2", "clean"):
        return f"{100 * value:{plus}.2f}"
    return f"{value:{plus}.3g}"


def answer(
    text: str,
    shown: Contrast,
    known: Sequence[Contrast],
    name: str,
    rules: Rules,
    *,
    p_for: float = 1.0,
    p_against: float = 1.0,
    p_equal: float = 1.0,
) -> Answer:
    """An answer with the figure and interval of one contrast, and half-width and power of the one that knows least."""
    _, effect = rules.of(name)
    worst = max(known, key=lambda contrast: contrast.half(rules.level))
    sure = worst.half(rules.level), worst.power(effect, rules.level)
    return Answer(text, p_for, p_against, p_equal, shown.value, *shown.interval(rules.level), *sure)


def _sides(chosen: Sequence[Row], name: str, rules: Rules) -> tuple[Layout, dict[str, list[float]], list[Contrast]]:
    """The curve, its groups, and band less low, band less high."""
    layout = layout_of(chosen, name)
    found = groups(layout.cells, rules)
    empty = [group for group, levels in found.items() if not levels]
    if empty:
        raise ConfigurationError(f"no level of the curve counts as {' or '.join(empty)}")
    contrasts = [layout.difference(found["band"], found[side]) for side in ("low", "high")]
    known = [contrast for contrast in contrasts if contrast is not None]
    if len(known) < 2:
        raise ConfigurationError("a single seed does not tell its own scatter")
    return layout, found, known


def _single(layout: Layout, found: Mapping[str, list[float]]) -> dict[float, Contrast]:
    """Band less each single level of low and high."""
    levels = (*found["low"], *found["high"])
    contrasts = {level: layout.difference(found["band"], [level]) for level in levels}
    return {level: contrast for level, contrast in contrasts.items() if contrast is not None}


def _equal(layout: Layout, found: Mapping[str, list[float]], sides: Sequence[Contrast], delta: float) -> float:
    """The p-value of "a side, or a single level of one, lies δ or more from the band": the largest of all."""
    return max(contrast.within(delta) for contrast in (*sides, *_single(layout, found).values()))


def band(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the curve is highest (sign 1) or lowest (sign -1) in the band.

    For: the band lies beyond low and beyond high, and no single level of these beyond the band, by its mean. Against:
    low, high or one of their levels lies beyond the band (Bonferroni over all of them). Equal: both differences, and
    that of every single level of low and high, are smaller than δ.
    """
    name, sign = rule["quantity"], rule["sign"]
    layout, found, sides = _sides(chosen, name, rules)
    delta, _ = rules.of(name)
    turned = [contrast.times(sign) for contrast in sides]
    single = {level: contrast.times(sign) for level, contrast in _single(layout, found).items()}
    worst = min(single, key=lambda level: single[level].value)
    p_for = max(contrast.above() for contrast in turned)
    if single[worst].value < 0:
        p_for = 1.0
    tests = [*turned, *single.values()]
    least = min(sides, key=lambda contrast: sign * contrast.value)
    text = f"band less low {_shown(sides[0], name, rules.level)}, band less high {_shown(sides[1], name, rules.level)}"
    if single[worst].value < 0:
        text += f"; at {worst:g} it is beyond the band by {unit(abs(single[worst].value), name)}"
    p_against = min(1.0, len(tests) * min(contrast.below() for contrast in tests))
    p_equal = _equal(layout, found, sides, delta)
    return answer(text, least, sides, name, rules, p_for=p_for, p_against=p_against, p_equal=p_equal)


def _rise(
    cells: Sequence[Hashable], low: float, high: float, key: Callable[[Any], float]
) -> tuple[dict[Hashable, float], float]:
    """Weights of the least-squares slope over log x within [low, high], times the range of log x: the curve's rise."""
    cells = [cell for cell in cells if low <= key(cell) <= high]
    if len(cells) < 2:
        raise ConfigurationError(f"fewer than two levels in {low:g} to {high:g}")
    t = np.log([key(cell) for cell in cells])
    centred = t - t.mean()
    return dict(zip(cells, np.ptp(t) * centred / (centred**2).sum(), strict=True)), float(np.ptp(t))


def _range(rule: Mapping[str, Any]) -> tuple[float, float]:
    low, high = rule["range"]
    return float(low), float(high)


def rise(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the curve rises (sign 1) or falls (sign -1) over a range: the straight line's change from end to end."""
    name, sign = rule["quantity"], rule["sign"]
    layout = layout_of(chosen, name)
    weights, _ = _rise(layout.cells, *_range(rule), float)
    contrast = layout.contrast(weights)
    if contrast is None:
        raise ConfigurationError("a single seed does not tell its own scatter")
    turned = contrast.times(sign)
    ends = f"{min(map(float, weights)):g} to {max(map(float, weights)):g}"  # type: ignore[arg-type]
    text = f"change from {ends} {_shown(contrast, name, rules.level)}"
    p_equal = contrast.within(rules.of(name)[0])
    return answer(
        text, contrast, [contrast], name, rules, p_for=turned.above(), p_against=turned.below(), p_equal=p_equal
    )  # fmt: skip


def steepest(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether β = 2 falls more over the range than each other β does."""
    name = rule["quantity"]
    kept = [row for row in chosen if row.beta is not None and np.isfinite(row.curvature)]
    if {row.beta for row in kept} != {0, 1, 2}:
        raise NotRun("needs β = 0, 1 and 2")
    cells = [(row.beta, level_of(row)) for row in kept]
    layout = Layout(cells, [row.seed for row in kept], quantity(kept, name), inflation=INFLATION)
    slopes, spans = {}, {}
    for beta in (0, 1, 2):
        own = [cell for cell in layout.cells if cell[0] == beta]  # type: ignore[index]
        slopes[beta], spans[beta] = _rise(own, *_range(rule), lambda cell: float(cell[1]))
    contrasts = []
    for beta in (0, 1):  # per unit of log max|σ''|, then over the range of β = 2
        weights = {**slopes[2], **{cell: -w * spans[2] / spans[beta] for cell, w in slopes[beta].items()}}
        contrast = layout.contrast(weights)
        if contrast is None:
            raise ConfigurationError("a single seed does not tell its own scatter")
        contrasts.append(contrast)
    delta, _ = rules.of(name)
    least = max(contrasts, key=lambda contrast: contrast.value)
    words = ", ".join(f"β=2 less β={b} {_shown(c, name, rules.level)}" for b, c in zip((0, 1), contrasts, strict=True))
    return answer(
        f"difference of changes: {words}", least, contrasts, name, rules,
        p_for=max(contrast.below() for contrast in contrasts),
        p_against=min(1.0, 2 * min(contrast.above() for contrast in contrasts)),
        p_equal=max(contrast.within(delta) for contrast in contrasts),
    )  # fmt: skip


def coincidence(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the curves of all β coincide over max|σ''| or over α, up to δ; `negated` asks whether they differ.

    Coincide: quadratics in log x, fitted to each curve below the bound, lie within δ of each other all over the shared
    range (two one-sided tests at every point of a grid; the largest p-value). Differ: at some shared level two curves
    lie more than δ apart (Bonferroni over pairs and levels, either sign).
    """
    kept = [row for row in chosen if row.beta is not None and np.isfinite(row.curvature)]
    betas = sorted({row.beta for row in kept if row.beta is not None})
    if len(betas) < 2:
        raise NotRun("needs more than one β")
    over = [level_of(row) if rule["over"] == "curvature" else round(row.alpha or NAN, 9) for row in kept]
    inside = [(row, x) for row, x in zip(kept, over, strict=True) if x < rule["below"]]
    kept = [row for row, _ in inside]
    cells = [(row.beta, x) for row, x in inside]
    layout = Layout(cells, [row.seed for row in kept], column(kept, "aa2"), inflation=INFLATION)
    delta, _ = rules.of("aa2")
    levels = {beta: sorted({x for b, x in cells if b == beta and (b, x) in layout.cells}) for beta in betas}
    if any(len(own) < 2 for own in levels.values()):
        raise ConfigurationError("a curve has fewer than two levels below the bound")
    span = max(own[0] for own in levels.values()), min(own[-1] for own in levels.values())
    if not span[0] < span[1]:
        raise ConfigurationError("the curves share no range; run the sweep over common curvatures")
    fits, raw = [], []
    for a, b in itertools.combinations(betas, 2):
        for t in np.linspace(float(np.log(span[0])), float(np.log(span[1])), 9):
            weights: dict[Hashable, float] = {}
            for beta, sign in ((a, 1.0), (b, -1.0)):
                row = quadratic_weights(np.array(levels[beta]), float(np.exp(t)))
                weights |= {(beta, x): sign * w for x, w in zip(levels[beta], row, strict=True)}
            fits.append((layout.contrast(weights), float(np.exp(t))))
        raw += [(layout.difference([(a, x)], [(b, x)]), x) for x in levels[a] if x in levels[b]]
    known = [(contrast, x) for contrast, x in fits if contrast is not None]
    if not known:
        raise ConfigurationError("a single seed does not tell its own scatter")
    apart = [(c, x) for c, x in raw if c is not None]
    far, at = max(known, key=lambda pair: abs(pair[0].value))
    coincide = max(contrast.within(delta) for contrast, _ in known)
    differ = min([1.0, *(len(apart) * min(c.above(delta), c.below(-delta)) for c, _ in apart)])
    where = "max|σ''|" if rule["over"] == "curvature" else "α"
    text = f"fits differ most at {where} = {at:.3g}: {_shown(far, 'aa2', rules.level)}"
    if apart:
        most, place = max(apart, key=lambda pair: abs(pair[0].value))
        text += f"; means differ most at {place:.3g}: {_shown(most, 'aa2', rules.level)}"
    found = text, far, [contrast for contrast, _ in known], "aa2", rules
    if rule.get("negated"):
        return answer(*found, p_for=differ, p_equal=coincide)
    return answer(*found, p_for=coincide / 2, p_against=differ)


def shape(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the curve is U-shaped, wherever its minimum lies, by the two-lines test within seeds.

    Against: one of the two lines has a significant slope of the wrong sign. Equal: as in `band`. The figure is the
    level at which the mean is lowest; where the two lines break is no place of a minimum.
    """
    name = rule["quantity"]
    finite = [row for row in chosen if np.isfinite(row.curvature)]
    layout, levels, sides = _sides(chosen, name, rules)
    if layout.freedom < 1:
        raise ConfigurationError("a single seed does not tell its own scatter")
    found = u_shape(curvatures(finite), quantity(finite, name), seed=[row.seed for row in finite])
    lines = (found.left, found.right)
    wrong = [1 - line.p_value for line in lines if np.isfinite(line.value)]
    slopes = " and ".join(f"{line.value:+.3g} (p = {line.p_value:.2g})" for line in lines)
    widest = max(sides, key=lambda contrast: contrast.half(rules.level))
    means = layout.relative() or layout.means
    lowest = float(min(means, key=lambda level: means[level]))  # type: ignore[arg-type]
    return Answer(
        f"lowest at {lowest:.3g}; two lines break at {found.break_at:.3g}: slopes {slopes}",
        found.p_value,
        min([1.0, *(2 * p for p in wrong)]),
        _equal(layout, levels, sides, rules.of(name)[0]),
        lowest,
        half=widest.half(rules.level),
        power=widest.power(rules.of(name)[1], rules.level),
    )


def association(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether robustness goes with the norm (sign -1: against it) among runs of the same curvature.

    See `association`. Unit: points of accuracy over the range that the log norm covers along the curve. From five
    seeds on, the p-value of matching with other seeds counts where it is the larger.
    """
    finite = [row for row in chosen if np.isfinite(row.curvature)]
    x, y = (quantity(finite, rule[axis]) for axis in ("x", "y"))
    found = within([level_of(row) for row in finite], [row.seed for row in finite], x, y)
    contrast = found.slope
    delta, _ = rules.of(rule["y"])
    sign = rule["sign"]
    p_for, p_against = contrast.times(sign).above(), contrast.times(sign).below()
    if found.matched is not None:
        less, more = found.matched if sign < 0 else found.matched[::-1]
        p_for, p_against = max(p_for, less), max(p_against, more)
    text = f"with the norm's range along the curve goes {_shown(contrast, rule['y'], rules.level)}"
    text += f" of robustness, by runs of one curvature (r = {found.correlation:+.2f})"
    if np.isfinite(found.along):
        text += f"; along the curve Spearman {found.along:+.2f} over {found.cells} levels"
    p_equal = contrast.within(delta)
    return answer(text, contrast, [contrast], rule["y"], rules, p_for=p_for, p_against=p_against, p_equal=p_equal)


def same_place(
    chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules, others: Sequence[Row] | None = None
) -> Answer:
    """Whether the norm is lowest and robustness highest in the same group, the band.

    For: both are so, as `band` says it. Against: between two of the three groups both differ with the same sign, so
    that where the norm is lower, robustness is too (Bonferroni over three pairs and two signs). `others` are the runs
    of another sweep that tell the robustness.
    """
    low, high = rule["low"], rule["high"]
    parts = [
        band(chosen, {"quantity": low, "sign": -1}, rules),
        band(chosen if others is None else others, {"quantity": high, "sign": 1}, rules),
    ]
    curves = [_sides(chosen, low, rules), _sides(chosen if others is None else others, high, rules)]
    against = 1.0
    for a, b in itertools.combinations(("low", "band", "high"), 2):
        pair = [layout.difference(found[a], found[b]) for layout, found, _ in curves]
        known = [contrast for contrast in pair if contrast is not None]
        if len(known) == 2:
            same = (max(c.above() for c in known), max(c.below() for c in known))
            against = min(against, 6 * min(same))
    least = min(parts, key=lambda part: part.power)
    return Answer(
        f"norm: {parts[0].text}; robustness: {parts[1].text}",
        max(part.p_for for part in parts),
        against,
        max(part.p_equal for part in parts),
        half=least.half,
        power=least.power,
    )


def single_run(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether one run per level would do: does its scatter leave the wanted power for the named effect?

    With one run a level, band less low and band less high have standard errors that the seeds tell (contrasts.py).
    For: the larger is below what the wanted power needs, by its chi-squared upper bound. Against: above, even if runs
    of one seed were independent (no inflation), by the lower bound.
    """
    name = rule["quantity"]
    layout, found, sides = _sides(chosen, name, rules)
    if layout.freedom < 1 or len(layout.seeds) < 2 or any(side.note for side in sides):
        raise ConfigurationError("seeds that are shared tell how much one of them scatters; there is only one")
    _, effect = rules.of(name)
    widths = [np.sqrt(1 / len(found["band"]) + 1 / len(found[side])) for side in ("low", "high")]
    least = max(sides, key=lambda side: side.error)
    error, freedom = least.error * np.sqrt(len(layout.seeds)), least.freedom
    bare = float(np.sqrt((layout.residuals() ** 2).sum() / layout.freedom)) * max(widths)
    needed = effect / (stats.norm.isf(rules.level / 2) + stats.norm.ppf(rule["power"]))
    low, high = (error * np.sqrt(freedom / stats.chi2.isf(tail, freedom)) for tail in (0.025, 0.975))
    reached = stats.norm.cdf(effect / error - stats.norm.isf(rules.level / 2)) if error > 0 else 1.0
    text = f"a contrast of single runs has the standard error {unit(error, name)} "
    text += f"[{unit(low, name)}, {unit(high, name)}]: "
    text += f"power {reached:.0%} to see {unit(effect, name)}, {rule['power']:.0%} wanted"
    return Answer(
        text,
        float(stats.chi2.cdf(freedom * (error / needed) ** 2, freedom)),
        float(stats.chi2.sf(layout.freedom * (bare / needed) ** 2, layout.freedom)),
        value=float(error),
        low=float(low),
        high=float(high),
    )


def residual(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether |f - y| is at least `enough` on adversarial training images.

    Of an image that is misclassified the true class has a residual of at least 1/2, so half of the share that is
    misclassified bounds the mean from below: over the first two thirds of the epochs, or, where the record has the
    last epoch only, of that one, since earlier ones misclassify more. A bound from below cannot show that something is
    small, so this rule never says no.
    """
    values = column(chosen, "residual")
    values = values[np.isfinite(values)]
    if not len(values):
        raise NotRun("no run recorded its adversarial accuracy on training images")
    mean, worst = float(values.mean()), float(values.min())
    seeds = {row.seed for row in chosen}
    text = f"mean residual at least {mean:.2f}, of every run at least {worst:.2f}"
    if len(seeds) < 2:
        return Answer(text + "; one seed", value=mean)
    found = stats.ttest_1samp(values, rule["enough"], alternative="greater") if np.ptp(values) > 0 else None
    p = float(found.pvalue) if found is not None else float(worst <= rule["enough"])
    return Answer(text, 1.0 if worst <= rule["enough"] else p, value=mean, low=worst)


def combined(answers: Mapping[str, Answer]) -> Answer:
    """What several curves say together: for all of them the largest p-value, against it the smallest times their
    number, equal where all are; the least power, with its half-width.
    """
    found = list(answers.values())
    if len(found) == 1 and not next(iter(answers)):
        return found[0]
    words = "; ".join(f"{name}: {answer.text}" if name else answer.text for name, answer in answers.items())
    if len(found) == 1:
        return replace(found[0], text=words)
    known = [answer for answer in found if np.isfinite(answer.power)]
    least = min(known, key=lambda answer: answer.power) if known else None  # half-widths may be of two quantities
    return Answer(
        words,
        max(answer.p_for for answer in found),
        min(1.0, len(found) * min(answer.p_against for answer in found)),
        max(answer.p_equal for answer in found),
        half=NAN if least is None else least.half,
        power=NAN if least is None else least.power,
    )


JUDGES: dict[str, Judge] = {
    "band": band,
    "rise": rise,
    "u_shape": shape,
    "association": association,
    "same_place": same_place,
    "single_run": single_run,
    "residual": residual,
}
"""Judges of one curve; a claim about all curves needs all of them."""

WHOLE: dict[str, Judge] = {"steepest": steepest, "coincide": coincidence}
"""Judges of all β at once."""
