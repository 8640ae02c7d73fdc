"""Is one side higher than another? Differences of means with Student's interval, the scatter pooled over seeds.

The weakest of one side less the strongest of the other is a difference picked among all pairs. Its lower end, above
which every pair lies, needs no correction (an intersection-union test). Its upper end does: one pair of many below 0
suffices, and the luck of the draw picks it. That end is Bonferroni's over the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.correlation.coefficients import Array
from experiments.correlation.rows import Row


def difference(high: Sequence[Row], low: Sequence[Row], name: str, level: float) -> tuple[float, float, float] | None:
    """Smallest mean of `high` less largest mean of `low` over configurations, with Student's interval; its upper end is
    corrected for the number of pairs.
    """
    groups: list[tuple[Array, ...]] = []
    for side in (high, low):
        values: dict[object, list[float]] = {}
        for row in side:
            value = row.value(name)
            if np.isfinite(value):
                values.setdefault(row.configuration, []).append(value)
        if not values:
            return None
        groups.append(tuple(np.array(v) for v in values.values()))
    everything = [*groups[0], *groups[1]]
    freedom = sum(len(v) - 1 for v in everything)
    if not freedom:
        return None
    sigma = np.sqrt(sum(float(((v - v.mean()) ** 2).sum()) for v in everything) / freedom)
    weakest, strongest = min(groups[0], key=np.mean), max(groups[1], key=np.mean)
    value = float(weakest.mean() - strongest.mean())
    error = float(sigma * np.sqrt(1 / len(weakest) + 1 / len(strongest)))
    pairs = len(groups[0]) * len(groups[1])
    below, above = (float(stats.t.isf(tail, freedom)) * error for tail in (level / 2, level / (2 * pairs)))
    return value, value - below, value + above


def matched(high: Sequence[Row], low: Sequence[Row], name: str, level: float) -> tuple[float, float, float] | None:
    """Mean of `high` less mean of `low` over the activations that both have, with Student's interval."""
    sides: list[dict[str, Array]] = []
    for side in (high, low):
        values: dict[str, list[float]] = {}
        for row in side:
            value = row.value(name)
            if np.isfinite(value):
                values.setdefault(row.activation, []).append(value)
        sides.append({activation: np.array(found) for activation, found in values.items()})
    shared = [activation for activation in sides[0] if activation in sides[1]]
    cells = [side[activation] for activation in shared for side in sides]
    freedom = sum(len(v) - 1 for v in cells)
    if not freedom:
        return None
    variance = sum(float(((v - v.mean()) ** 2).sum()) for v in cells) / freedom
    value = float(np.mean([sides[0][activation].mean() - sides[1][activation].mean() for activation in shared]))
    error = np.sqrt(variance * sum(1 / len(v) for v in cells)) / len(shared)
    half = float(stats.t.isf(level / 2, freedom) * error)
    return value, value - half, value + half
