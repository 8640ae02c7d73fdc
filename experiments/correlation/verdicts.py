"""From results to verdicts on the paper's empirical claims, by the rules in rules.toml alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import load_toml
from experiments.correlation import judges
from experiments.correlation.differences import difference, matched
from experiments.correlation.judges import NO, UNDECIDED, YES, Answer, Rules
from experiments.correlation.printed import PRINTED
from experiments.correlation.rows import Row, one_family, rows, split
from experiments.correlation.sources import ORDER, best, command
from experiments.sweep.export import SweepResults
from hessdiag.errors import ConfigurationError

HOLDS, CONDITIONS = "holds numerically", "holds under conditions"
NOT_TESTED, CONTRADICTED = "not tested", "contradicted by measurement"
PICKED = "weakest less strongest configuration (upper end corrected for the pick among all pairs)"


@dataclass(frozen=True)
class Verdict:
    """What the results say of one claim; `scope` names the setting, `figure` where to see it."""

    claim: str
    verdict: str
    evidence: str
    figure: str
    tier: str
    scope: str
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN as null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def load_rules() -> dict[str, Any]:
    """The thresholds and the rule of every claim."""
    return load_toml(Path(__file__).with_name("rules.toml"))


def verdicts(results: Sequence[SweepResults], *, rules: Mapping[str, Any] | None = None) -> dict[str, Verdict]:
    """A verdict for every claim that has a rule, from the largest tier that has results for its figure."""
    table = load_rules() if rules is None else rules
    found: dict[str, Verdict] = {}
    for claim, rule in table["claims"].items():
        if rule["rule"] != "all_of":
            found[claim] = _verdict(claim, rule, results, table)
    for claim, rule in table["claims"].items():
        if rule["rule"] == "all_of":
            found[claim] = _all_of(claim, [found[name] for name in rule["of"]])
    found.update(_cells(results, table))
    return found


def _untested(claim: str, figure: str, why: str, tier: str = "", scope: str = "") -> Verdict:
    return Verdict(claim, NOT_TESTED, why, figure, tier, scope)


def _verdict(claim: str, rule: Mapping[str, Any], results: Sequence[SweepResults], table: Mapping[str, Any]) -> Verdict:
    tiers = [sweep for tier in ORDER if (sweep := best(results, rule["figure"], [tier])) is not None]
    if not tiers:
        return _untested(claim, rule["figure"], f"no results: {command(rule['figure'])}")
    verdict = _judged(claim, rule, tiers[0], results, table)
    if verdict.verdict != NOT_TESTED:
        return verdict
    smaller = [_judged(claim, rule, sweep, results, table) for sweep in tiers[1:]]  # told, though not what decides
    also = [f"a smaller tier: {other.verdict} ({other.evidence})" for other in smaller if other.verdict != NOT_TESTED]
    return replace(verdict, evidence="; ".join([verdict.evidence, *also]))


def _judged(
    claim: str,
    rule: Mapping[str, Any],
    sweep: SweepResults,
    results: Sequence[SweepResults],
    table: Mapping[str, Any],
) -> Verdict:
    shared = Rules(
        (float(table["band"][0]), float(table["band"][1])),
        float(table["level"]),
        float(table["margin"][sweep.tier]),
        int(table["resamples"]),
        np.random.default_rng([int(table["seed"]), *claim.encode()]),
    )
    chosen = [row for row in rows(sweep) if "data" not in rule or row.data == rule["data"]]
    if not chosen:
        needed = command(rule["figure"], "quick")  # the smallest tier has digits only
        return _untested(claim, rule["figure"], f"no results on {rule['data']}: {needed}", sweep.tier, sweep.title)
    answers = _answers(rule, chosen, results, sweep.tier, shared)
    words = [f"{name}: {answer.text}" if name else answer.text for name, answer in answers.items()]
    lacking = f"; {sweep.missing} runs missing" if sweep.missing else ""
    evidence = f"{rule['figure']}, tier {sweep.tier} ({sweep.title}{lacking}): " + "; ".join(words)
    given = [answer.answer for answer in answers.values()]
    verdict = _word(given, sweep.tier)
    if verdict == NOT_TESTED:
        evidence = "measured, but undecided: " + evidence
    only = next(iter(answers.values())) if len(answers) == 1 else Answer("", "")
    return Verdict(claim, verdict, evidence, rule["figure"], sweep.tier, sweep.title, only.value, only.low, only.high)


def _word(answers: Sequence[str], tier: str) -> str:
    if NO in answers:
        return CONTRADICTED
    if YES not in answers:
        return NOT_TESTED
    return HOLDS if tier == "paper" and UNDECIDED not in answers else CONDITIONS


def _answers(
    rule: Mapping[str, Any], chosen: list[Row], results: Sequence[SweepResults], tier: str, shared: Rules
) -> dict[str, Answer]:
    kind = rule["rule"]
    if kind in ("higher", "not_lower"):
        return {"": _compare(rule, chosen, shared)}
    if kind == "association" and "with" in rule:
        same = [sweep for sweep in results if _settings(rows(sweep)) == _settings(chosen)]
        other = best(same, rule["with"], [tier])  # two settings are never matched with each other
        if other is None:
            return {"": Answer(UNDECIDED, f"no results of {rule['with']} on the same tier, network and data")}
        return {"": judges.crossed(chosen, rows(other), rule, shared)}
    names = rule.get("curves")
    curves = split(chosen, *names) if names else {(): chosen}
    answers = {}
    for values, members in curves.items():
        if names and "beta" in names and members[0].beta is None:
            continue
        name = ", ".join(f"β={v}" if n == "beta" else str(v) for n, v in zip(names or (), values, strict=True))
        one_family(members, f"{rule['figure']}: {name}")
        try:
            answers[name] = judges.JUDGES[kind](members, rule, shared)
        except ConfigurationError as error:
            answers[name] = Answer(UNDECIDED, str(error))
    return answers


def _settings(chosen: Sequence[Row]) -> set[tuple[str, str]]:
    return {(row.network, row.data) for row in chosen}


def _compare(rule: Mapping[str, Any], chosen: list[Row], shared: Rules) -> Answer:
    above, below = ([row for row in chosen if _fits(row, rule[side])] for side in ("high", "low"))
    compare = matched if rule.get("matched") else difference
    found = compare(above, below, rule["quantity"], shared.level)
    if found is None:
        return Answer(UNDECIDED, "too few runs: more than one seed is needed")
    value, low, high = found
    floor = -shared.margin if rule["rule"] == "not_lower" else 0.0
    what = "mean difference over shared activations" if rule.get("matched") else PICKED
    text = f"{what}: {value:+.3g} [{low:+.3g}, {high:+.3g}]"
    return Answer(YES if low > floor else NO if high < floor else UNDECIDED, text, value, low, high)


def _fits(row: Row, wanted: Mapping[str, Sequence[Any]]) -> bool:
    for name, values in wanted.items():
        value = getattr(row, name)
        if ("none" if value is None else value) not in values:
            return False
    return True


def _all_of(claim: str, parts: Sequence[Verdict]) -> Verdict:
    given = [part.verdict for part in parts]
    if CONTRADICTED in given:
        verdict = CONTRADICTED
    elif NOT_TESTED in given:
        verdict = NOT_TESTED
    else:
        verdict = HOLDS if all(word == HOLDS for word in given) else CONDITIONS
    evidence = "; ".join(f"{part.claim}: {part.verdict}" for part in parts)
    figures = ", ".join(dict.fromkeys(part.figure for part in parts))
    return Verdict(
        claim, verdict, evidence, figures, ", ".join(dict.fromkeys(part.tier for part in parts if part.tier)), ""
    )


def _cells(results: Sequence[SweepResults], table: Mapping[str, Any]) -> dict[str, Verdict]:
    """Tables 1 and 2 cell by cell; accuracies are compared on the paper's own setting only."""
    found: dict[str, Verdict] = {}
    one, two = best(results, "table1"), best(results, "table2")
    for cell in PRINTED:
        for name, printed, quantity in (("standard", cell.standard, "clean"), ("robust", cell.robust, "aa")):
            if printed is not None:
                found[f"T1.{cell.key}.{name}"] = _accuracy(
                    f"T1.{cell.key}.{name}", cell.activation, printed, quantity, one, table
                )
        for name, quantity in (("memory", "peak_memory"), ("time", "train_seconds")):
            found[f"T2.{cell.key}.{name}"] = _cost(f"T2.{cell.key}.{name}", cell.activation, name, quantity, two, table)
    return found


def _accuracy(
    claim: str, activation: str, printed: float, quantity: str, sweep: SweepResults | None, table: Mapping[str, Any]
) -> Verdict:
    if sweep is None or sweep.tier != "paper":
        return _untested(claim, "table1", "needs the paper's own setting: " + command("table1", "paper"))
    values = [row.value(quantity) for row in rows(sweep) if row.activation == activation]
    values = [value for value in values if value == value]
    if not values:
        return _untested(claim, "table1", f"no run of {activation}", sweep.tier, sweep.title)
    mean, allowed = float(np.mean(values)), float(table["tolerance"]["accuracy"])
    text = f"table1, tier paper: {100 * mean:.2f}% over {len(values)} seeds, printed {printed}%"
    verdict = HOLDS if abs(mean - printed / 100) <= allowed else CONTRADICTED
    return Verdict(claim, verdict, text, "table1", sweep.tier, sweep.title, mean)


def _cost(
    claim: str, activation: str, name: str, quantity: str, sweep: SweepResults | None, table: Mapping[str, Any]
) -> Verdict:
    """Costs relative to ReLU's, for the card is not the paper's; a CPU says nothing about a GPU's memory."""
    means = {}
    for wanted in (activation, "relu"):
        values = [row.value(quantity) for row in rows(sweep) if row.activation == wanted] if sweep else []
        values = [value for value in values if value == value]
        means[wanted] = float(np.mean(values)) if values else float("nan")
    on_gpu = sweep is not None and any(
        str((row.record.get("provenance") or {}).get("device", "")).startswith("cuda") for row in rows(sweep)
    )
    if sweep is None or not on_gpu or not means["relu"] > 0 or means[activation] != means[activation]:
        return _untested(claim, "table2", "needs a GPU: " + command("table2", "quick"))
    printed = {row.activation: row.memory if name == "memory" else row.minutes for row in PRINTED}
    ours, theirs = means[activation] / means["relu"], printed[activation] / printed["relu"]
    text = f"table2, tier {sweep.tier} ({sweep.title}): {ours:.2f} of ReLU's, printed {theirs:.2f}"
    close = abs(ours / theirs - 1) <= float(table["tolerance"]["ratio"])
    return Verdict(claim, CONDITIONS if close else CONTRADICTED, text, "table2", sweep.tier, sweep.title, ours)
