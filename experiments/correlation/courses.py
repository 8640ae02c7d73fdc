"""What runs record along their epochs (`experiments.sweep.along`), by name; and rules that compare epochs and arms.

The arms of a sweep differ in the schedule of the learning rate and in weight perturbation. Rules look at two epochs,
the same for all arms: the last that the configuration names, and before it the first that an arm whose rate drops ended
at a lower rate. Of one seed the error of a difference is what the record tells: of accuracies that of the draw of
images, which are the same at every epoch and in every arm, so that differences are taken image by image; of everything
else that of the two estimates as if they were independent, though they share images (too large, if anything). It speaks
of this one net. Two arms of one seed are told and not judged, for how far two trainings part by chance a single seed
does not tell. Of several seeds it is that of the seeds' own differences, by Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from experiments.correlation.coefficients import Array
from experiments.correlation.contrasts import Contrast
from experiments.correlation.judges import Answer, Judge, NotRun, Rules, _shown
from experiments.correlation.rows import Row
from experiments.sweep.records import withstood
from hessdiag.errors import ConfigurationError

SPREADS: Mapping[str, tuple[str, ...]] = {
    "Gauss-Newton trace": ("gauss_newton_trace",),
    "tr(C)": ("noise", "trace"),
    "tr(HC)": ("noise", "curved"),
    "half tr(HS)": ("noise", "half_trace"),
    "half tr(HS) at rest": ("noise", "at_rest"),
}


ARMS = ("constant", "drop", "constant, AWP", "drop, AWP")


@dataclass(frozen=True)
class Seen:
    """A quantity at one epoch: its value, its standard error with degrees of freedom, and of an accuracy each image."""

    value: float
    error: float
    freedom: float
    hits: Array | None = None


def arm(row: Row) -> str:
    """Which part a run plays: "constant" or "drop", with or without AWP."""
    train = row.result.config.train
    rate = "drop" if (train.get("schedule") or {}).get("milestones") else "constant"
    return rate + (", AWP" if (train.get("awp") or {}).get("gamma") else "")


def looks(row: Row) -> list[dict[str, Any]]:
    """The recorded epochs of a run, in order."""
    return list(row.record.get("along") or ())


def epochs(row: Row) -> list[int]:
    """Which epochs were recorded."""
    return [int(look["epoch"]) for look in looks(row)]


def seen(look: Mapping[str, Any], name: str) -> Seen:
    """A quantity of one recorded epoch: "robust test", "clean train" and the like; "norm clean", "norm adversarial"
    (their logarithms with "log "); "Gauss-Newton trace", "tr(C)", "tr(HC)", "half tr(HS)", "half tr(HS) at rest" (all
    of the adversarial loss).
    """
    kind, _, place = name.removeprefix("log ").partition(" ")
    if kind in ("robust", "clean"):
        told = look["accuracy"][place][kind]
        share, number = float(told["value"]), int(told["samples"])
        return Seen(share, math.sqrt(share * (1 - share) / number), number - 1, withstood(told))
    if kind == "norm":
        norm = look["norms"][place]
        low, mid, high = (float(norm[end]) for end in ("low", "rms", "high"))
        if name.startswith("log "):
            low, mid, high = (math.log(end) if end > 0 else -math.inf for end in (low, mid, high))
        # the interval of a measurement is at 95%; of an exact one it has no width
        return Seen(mid, (high - low) / (2 * float(stats.norm.isf(0.025))), max(float(norm["replicates"]) - 1, 1.0))
    if name in SPREADS:
        table: Any = look
        for part in SPREADS[name]:
            table = table[part]
        batches = float(look["noise"]["batches"])
        return Seen(float(table["value"]), float(table["error"]), batches - 1)
    raise ConfigurationError(f"no run records {name!r} along its epochs")


def difference(first: Sequence[Seen], second: Sequence[Seen]) -> Contrast:
    """The second less the first, each a sum of quantities with the signs 1, -1 in turn: (a, b) stands for a - b."""
    parts = [(sign * s, x) for s, side in ((1.0, second), (-1.0, first)) for sign, x in zip((1.0, -1.0), side)]
    value = sum(sign * x.value for sign, x in parts)
    hits = [(sign, x.hits) for sign, x in parts if x.hits is not None]
    if len(hits) == len(parts) and len({len(h) for _, h in hits}) == 1:
        each = np.sum([sign * h for sign, h in hits], axis=0)
        return Contrast(value, float(each.std(ddof=1) / math.sqrt(len(each))), len(each) - 1, 1)
    error = math.sqrt(sum(x.error**2 for _, x in parts))
    return Contrast(value, error, min(x.freedom for _, x in parts), 1)


def over_seeds(found: Sequence[Contrast]) -> Contrast:
    """Of one seed its own; of several their mean, by their scatter."""
    if len(found) == 1:
        return replace(found[0], note="one seed: the luck of images or of the estimate alone")
    values = np.array([one.value for one in found])
    error = float(values.std(ddof=1) / math.sqrt(len(values)))
    return Contrast(float(values.mean()), error, len(values) - 1, len(values))


def _arms(chosen: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Runs that recorded something, by arm and seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in chosen:
        if looks(row):
            found.setdefault(arm(row), {})[row.seed] = row
    return found


def compared(chosen: Sequence[Row]) -> tuple[int, int]:
    """The two epochs: the first recorded at a dropped rate, and the last that was to be recorded."""
    places = set()
    for row in chosen:
        if looks(row) and arm(row).startswith("drop"):
            rates = [float(look["lr"]) for look in looks(row)]
            after = [epoch for epoch, rate in zip(epochs(row), rates) if rate < max(rates) * (1 - 1e-9)]
            end = int(row.result.config.along["epochs"][-1])
            if after and after[0] < end:
                places.add((after[0], end))
    if not places:
        raise NotRun("no run recorded two epochs after its learning rate dropped")
    if len(places) > 1:
        raise ConfigurationError(f"runs were looked at in different epochs: {sorted(places)}")
    return places.pop()


def _at(row: Row, epoch: int, name: str) -> Seen:
    for look in looks(row):
        if look["epoch"] == epoch:
            return seen(look, name)
    raise ConfigurationError(f"{arm(row)}, seed {row.seed}: epoch {epoch} is not recorded (training ended before it?)")


def _seeds(arms: Mapping[str, Mapping[int, Row]], *names: str) -> list[int]:
    """Seeds that every one of the arms has."""
    lacking = [name for name in names if name not in arms]
    if lacking:
        raise NotRun(f"no run of the arm {lacking[0]!r}; there are {', '.join(map(repr, arms)) or 'none'}")
    shared = sorted(set.intersection(*(set(arms[name]) for name in names)))
    if not shared:
        raise ConfigurationError(f"the arms {', '.join(map(repr, names))} share no seed")
    return shared


def _sized(name: str, base: float, rules: Rules) -> tuple[float, float]:
    """δ and the named effect: points of accuracy; of a norm or a trace a share of what it was."""
    if name.partition(" ")[0] in ("robust", "clean") or name.startswith("log "):
        return rules.of(name)
    return rules.delta["norm"] * abs(base), rules.effect["norm"] * abs(base)


def _answer(text: str, found: Contrast, name: str, base: float, sign: float, rules: Rules, *, arms: int = 1) -> Answer:
    delta, effect = _sized(name, base, rules)
    shown = "aa2" if name.partition(" ")[0] in ("robust", "clean") else name  # points
    turned, told = found.times(sign), f"{text} {_shown(found, shown, rules.level)}"
    if arms > 1 and found.seeds < 2:
        return Answer(f"{told}; a single seed does not tell how far two trainings part", value=found.value)
    return Answer(
        told,
        turned.above(),
        turned.below(),
        found.within(delta),
        found.value,
        *found.interval(rules.level),
        found.half(rules.level),
        found.power(effect, rules.level),
    )


def change(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether a quantity of one arm rises (sign 1) or falls (sign -1) from the one epoch to the other; with the arm
    `beyond`, whether it does so by more than there.
    """
    name, arms = rule["quantity"], _arms(chosen)
    start, end = compared(chosen)
    names = [rule["arm"], *([rule["beyond"]] if "beyond" in rule else [])]
    found, bases = [], []
    for seed in _seeds(arms, *names):
        sides = [[_at(arms[part][seed], epoch, name) for part in names] for epoch in (start, end)]
        found.append(difference(*sides))
        bases.append(sides[0][0].value)
    less = f" less that of {rule['beyond']}" if "beyond" in rule else ""
    text = f"change of {rule['arm']}{less}, epoch {start} to {end},"
    return _answer(text, over_seeds(found), name, float(np.mean(bases)), rule["sign"], rules, arms=len(names))


def at_end(chosen: Sequence[Row], rule: Mapping[str, Any], rules: Rules) -> Answer:
    """Whether a quantity of one arm lies above (sign 1) or below (sign -1) that of another at the last epoch."""
    name, arms = rule["quantity"], _arms(chosen)
    _, end = compared(chosen)
    one, other = rule["arm"], rule["beyond"]
    pairs = [[_at(arms[part][seed], end, name) for part in (other, one)] for seed in _seeds(arms, one, other)]
    found = over_seeds([difference([low], [high]) for low, high in pairs])
    base = float(np.mean([low.value for low, _ in pairs]))
    return _answer(f"{one} less {other}, epoch {end},", found, name, base, rule["sign"], rules, arms=2)


COURSES: dict[str, Judge] = {"change": change, "at_end": at_end}
"""Judges of runs that differ in how they were trained, along their epochs."""
