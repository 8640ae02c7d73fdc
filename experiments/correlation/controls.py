"""The control of α: the same function with other parameters, and one factor of α at a time.

A network that imitates another α by all factors (`experiments.control`) computes the same function along training and
has another norm. If the norm explained robustness, the two would differ in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.correlation.contrasts import Contrast, Layout
from experiments.correlation.judges import Answer, Judge, NotRun, Rules, _shown, answer, unit
from experiments.correlation.rows import Row, quantity
from experiments.parts import CONTROL_FACTORS, CONTROL_FAMILIES
from hessdiag.errors import ConfigurationError

ARMS = {"all": CONTROL_FACTORS, "init": ("init",), "lr": ("lr",), "decay": ("decay",)}


def arm(row: Row) -> tuple[str, float | None]:
    """Which arm of the control a run belongs to, and the α that it imitates: "none" and its own, without control."""
    control = row.result.config.train.get("control") or {}
    target = control.get("as_alpha")
    if target is None:
        return "none", row.alpha
    if set(control.get("families", CONTROL_FAMILIES)) != set(CONTROL_FAMILIES):
        return "other", float(target)
    factors = set(control.get("factors", CONTROL_FACTORS))
    return next((name for name, wanted in ARMS.items() if factors == set(wanted)), "other"), float(target)


def roles(chosen: Sequence[Row]) -> list[str]:
    """The part that each run plays: an arm; "same" has the imitated α as its own; "none" has the α of those that
    imitate, and no control.
    """
    arms = [arm(row) for row in chosen]
    imitated = {target for kind, target in arms if kind != "none"}
    own = {row.alpha for row, (kind, _) in zip(chosen, arms, strict=True) if kind != "none"}
    plain = {alpha: "same" if alpha in imitated else "none" if alpha in own else "other" for _, alpha in arms}
    return [plain[alpha] if kind == "none" else kind for kind, alpha in arms]


def _difference(chosen: Sequence[Row], above: str, below: str, name: str) -> Contrast:
    """The one part less the other."""
    cells = roles(chosen)
    if above not in cells or below not in cells:
        there = ", ".join(sorted(set(cells)))
        raise NotRun(f"the control needs its parts {above!r} and {below!r}; there are {there}")
    found = Layout(cells, [row.seed for row in chosen], quantity(chosen, name)).difference([above], [below])
    if found is None:
        raise ConfigurationError("too few runs: more than one seed is needed")
    return found


def same_function(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether the same function has another norm and, within δ, the same robustness.

    For: the ratio of the norms lies beyond δ of a norm and robustness within δ. Against: robustness differs by more
    than δ, or the norms by less.
    """
    robust = _difference(chosen, "all", "same", "aa2")
    norm = _difference(chosen, "all", "same", rule["quantity"])
    delta, least = rules.delta["accuracy"], float(np.log1p(rules.delta["norm"]))
    ends = [np.exp(norm.value), *np.exp(norm.interval(rules.level))]
    text = f"robustness {_shown(robust, 'aa2', rules.level)}; "
    text += f"ratio of the norms {ends[0]:.3g} [{ends[1]:.3g}, {ends[2]:.3g}]"
    other = min(norm.above(least), norm.below(-least))
    p_against = min(robust.above(delta), robust.below(-delta), norm.within(least) / 2)
    p_for = max(robust.within(delta) / 2, other)
    return answer(text, robust, [robust], "aa2", rules, p_for=p_for, p_against=min(1.0, 2 * p_against))


def factor(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether a quantity moves when one factor of α alone is imitated: for, either way; equal, within δ."""
    name = rule["quantity"]
    found = _difference(chosen, rule["arm"], "none", name)
    delta, _ = rules.of(name)
    text = f"{rule['arm']} less none {_shown(found, name, rules.level)}; δ {unit(delta, name)}"
    p_for = min(found.above(), found.below())
    return answer(text, found, [found], name, rules, p_for=p_for, p_equal=found.within(delta))


CONTROLS: dict[str, Judge] = {"same_function": same_function, "factor": factor}
