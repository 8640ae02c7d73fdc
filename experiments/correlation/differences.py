"""Is one side higher than another? Contrasts within seeds between configurations of a table, or between networks.

The weakest of one side less the strongest of the other is a difference picked among all pairs. That all pairs lie
above a bound needs no correction (an intersection-union test: the largest p-value). That one of many lies below it
does, for the luck of the draw picks it: Bonferroni over the pairs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from experiments.correlation.contrasts import Contrast, Layout
from experiments.correlation.judges import Answer, NotRun, Rules, _shown, answer
from experiments.correlation.rows import Row, quantity
from hessdiag.errors import ConfigurationError


def compare(high: Sequence[Row], low: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether every configuration of `high` lies above every one of `low` (or, for "not_lower", at most δ below)."""
    if not high or not low:
        raise NotRun("one of the two sides was not run")
    name = rule["quantity"]
    rows = [*high, *low]
    layout = Layout([row.configuration for row in rows], [row.seed for row in rows], quantity(rows, name))
    sides = [list(dict.fromkeys(row.configuration for row in side)) for side in (high, low)]
    pairs = [layout.difference([a], [b]) for a in sides[0] for b in sides[1]]
    known = [contrast for contrast in pairs if contrast is not None]
    if len(known) < len(pairs):
        raise ConfigurationError("too few runs: more than one seed is needed")
    least = min(known, key=lambda contrast: contrast.value)
    what = "weakest less strongest configuration, " if len(known) > 1 else ""
    return _answer(known, least, what, rule, rules)


def matched(high: Sequence[Row], low: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """The mean difference over the activations (and methods) that both sides have."""
    if not high or not low:
        raise NotRun("one of the two sides was not run")
    name = rule["quantity"]
    rows = [(side, row) for side, members in ((1, high), (0, low)) for row in members]
    cells: list[Hashable] = [(side, row.method, row.activation) for side, row in rows]
    layout = Layout(cells, [row.seed for _, row in rows], quantity([row for _, row in rows], name))
    shared = [cell[1:] for cell in layout.cells if cell[0] == 1 and (0, *cell[1:]) in layout.cells]  # type: ignore[index]
    if not shared:
        raise ConfigurationError("the two sides share no activation")
    contrast = layout.difference([(1, *cell) for cell in shared], [(0, *cell) for cell in shared])
    if contrast is None:
        raise ConfigurationError("too few runs: more than one seed is needed")
    return _answer([contrast], contrast, f"mean over {len(shared)} shared activations, ", rule, rules)


def _answer(known: Sequence[Contrast], least: Contrast, what: str, rule: Mapping[str, Any], rules: Rules) -> Answer:
    name = rule["quantity"]
    delta, _ = rules.of(name)
    equal = max(contrast.within(delta) for contrast in known) if rule.get("bounded", True) else 1.0
    floor = -delta if rule["rule"] == "not_lower" else 0.0
    return answer(
        what + _shown(least, name, rules.level), least, known, name, rules,
        p_for=max(contrast.above(floor) for contrast in known),
        p_against=min(1.0, len(known) * min(contrast.below(floor) for contrast in known)),
        p_equal=1.0 if floor else equal,
    )  # fmt: skip
