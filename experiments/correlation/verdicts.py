"""From results to verdicts on the paper's empirical claims, by the rules in rules.toml alone: claims by settings.

A setting is a stored sweep. Every setting that has runs of what a claim speaks of gives it a word of its own; none
hides another. From the p-values of an answer (`judges`), after Holm's correction (Holm 1979) over the claims of one
family in the setting:

    equivalence, p_equal at most the level        no difference beyond δ
    2 p_for at most the level                     holds (the paper's own setting), transfers (any other)
    2 p_against at most the level                 contradicts (the paper's own setting), does not transfer (any other)
    otherwise                                     inconclusive: half-width and power are told
    nothing was run                               not tested
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import load_toml
from experiments.correlation import judges
from experiments.correlation.controls import CONTROLS
from experiments.correlation.courses import COURSES
from experiments.correlation.differences import compare, matched
from experiments.correlation.judges import Answer, NotRun, Rules
from experiments.correlation.printed import PRINTED
from experiments.correlation.rows import Row, one_family, planned, rows, split
from experiments.correlation.sources import command
from experiments.sweep import grid
from experiments.sweep.export import SweepResults
from hessdiag.errors import ConfigurationError
from hessdiag.show.text import counted

HOLDS, CONTRADICTS = "holds", "contradicts"
TRANSFERS, DOES_NOT = "transfers", "does not transfer"
EQUAL, INCONCLUSIVE, NOT_TESTED = "no difference beyond δ", "inconclusive", "not tested"
DEPENDS = "depends on the setting"
WORDS = (HOLDS, CONTRADICTS, TRANSFERS, DOES_NOT, EQUAL, INCONCLUSIVE, NOT_TESTED, DEPENDS)
CONFIRMATORY, EXPLORATORY = "confirmatory", "exploratory"
CURVE = ("method", "network", "data", "beta")
PAPERS = "clean"  # the paper's own norm among those of [norms]
SAME = {"one setting": True, "one tier": False}


@dataclass(frozen=True)
class Cell:
    """What one setting says of one claim; `curves` has the word of each curve alone, uncorrected."""

    setting: str
    word: str
    text: str
    status: str = EXPLORATORY
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    half: float = float("nan")
    power: float = float("nan")
    p_for: float = 1.0
    p_against: float = 1.0
    p_equal: float = 1.0
    p_holm: float = float("nan")
    curves: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What all settings say of one claim (by one norm, where it speaks of a norm): the word that the paper's own
    setting gives, else the one that the others share; `figure` is where to see it.
    """

    claim: str
    verdict: str
    evidence: str
    figure: str
    norm: str = ""
    statement: str = ""
    tier: str = ""
    scope: str = ""
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    cells: tuple[Cell, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN as null; the cells by their setting."""
        found = {name: value for name, value in asdict(self).items() if name != "cells"}
        cells = {cell.setting: asdict(cell) for cell in self.cells}
        found["settings"] = {name: {k: v for k, v in cell.items() if k != "setting"} for name, cell in cells.items()}
        return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and value != value else value


def load_rules() -> dict[str, Any]:
    """The thresholds and the rule of every claim."""
    return load_toml(Path(__file__).with_name("rules.toml"))


def key(claim: str, norm: str) -> str:
    """The name of a row: the claim's, and the norm where it is not the paper's."""
    return claim if norm in ("", PAPERS) else f"{claim} [{norm}]"


def verdicts(results: Sequence[SweepResults], *, rules: Mapping[str, Any] | None = None) -> dict[str, Verdict]:
    """A verdict for every claim that has a rule, by each norm it may speak of, with a word from every setting."""
    table = load_rules() if rules is None else rules
    shared = shared_rules(table)
    found: dict[str, Verdict] = {}
    answers: dict[str, dict[str, _Judged]] = {}
    entries = _entries(table)
    for name, entry in entries.items():
        if entry["rule"] != "all_of":
            answers[name] = _judge(entry, results, table, shared)
    for name, entry in entries.items():
        if entry["rule"] == "all_of":
            answers[name] = _all_of(entry, answers)
    corrected = _holm(entries, answers)
    for name, entry in entries.items():
        cells = tuple(
            _cell(setting, judged, corrected.get((name, setting)), shared) for setting, judged in answers[name].items()
        )
        found[name] = _verdict(entry, cells)
    return found | _cells(results, table)


def shared_rules(table: Mapping[str, Any]) -> Rules:
    """The thresholds of all rules."""
    low, high = table["band"]
    return Rules(
        (float(low), float(high)),
        float(table["low"]),
        float(table["high"]),
        float(table["level"]),
        {name: float(value) for name, value in table["delta"].items()},
        {name: float(value) for name, value in table["effect"].items()},
    )


def _entries(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every rule, once for each norm that it is judged for."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("claims", "hypotheses"):
        for claim, rule in table[kind].items():
            speaks = any(rule.get(part) == "norm" for part in ("quantity", "x", "low"))
            for norm in rule.get("norms", list(table["norms"])) if speaks else [""]:
                entry = {**rule, "claim": claim, "norm": norm, "statement": rule.get("statement", "")}
                if norm:
                    about = table["norms"][norm]
                    entry |= {p: about["quantity"] for p in ("quantity", "x", "low") if rule.get(p) == "norm"}
                    entry["leave_out"] = about.get("leave_out", {})
                    entry["family"] = f"{rule['family']}, {norm}" if "norms" not in rule else rule["family"]
                found[key(claim, norm)] = entry
    return found


@dataclass(frozen=True)
class _Judged:
    """An answer, or that there is none, with what stands beside it in the matrix."""

    answer: Answer
    tier: str
    status: str
    curves: Mapping[str, Answer]
    asked: bool = True  # False: the sweep has no run of what the claim speaks of


def _judge(
    entry: Mapping[str, Any], results: Sequence[SweepResults], table: Mapping[str, Any], shared: Rules
) -> dict[str, _Judged]:
    found = {}
    for sweep in results:
        if sweep.figure not in entry["figures"] or not sweep.runs:
            continue
        seen = sweep.name in table["seen"]
        chosen = [row for row in rows(sweep) if _fits(row, entry.get("where", {}))]
        spent = {} if seen else entry.get("leave_out", {}).get(sweep.name, {})
        left_out = [row for row in chosen if spent and _fits(row, spent)]
        if left_out:  # the runs that suggested a hypothesis do not test it
            chosen = [row for row in chosen if not _fits(row, spent)]
        status = EXPLORATORY if seen else entry["status"]
        lacking = _lacking(entry, chosen, sweep)
        try:
            if not chosen:
                raise NotRun(_spent(left_out) or "no run of what the claim speaks of")
            _several(entry, chosen, lacking)
            curves = _answers(entry, chosen, sweep, results, shared)
        except NotRun as error:
            found[sweep.name] = _Judged(Answer(str(error)), sweep.tier, status, {}, asked=False)
            continue
        except ConfigurationError as error:
            curves = {"": Answer(str(error))}
        answer = judges.combined(curves)
        if lacking:  # what is there may still say no
            text = f"no run yet of {', '.join(lacking)}; {answer.text}"
            answer = replace(answer, p_for=1.0, p_equal=1.0, text=text)
        notes = [_spent(left_out), *_troubled(chosen), _undone(sweep), _elsewhere_too(entry, chosen, sweep, results)]
        answer = replace(answer, text=" ".join([answer.text, *(f"({note})" for note in notes if note)]))
        found[sweep.name] = _Judged(answer, sweep.tier, status, curves)
    return found


def _several(entry: Mapping[str, Any], chosen: Sequence[Row], lacking: Sequence[str]) -> None:
    """A claim about several networks or methods is not tested by one of them."""
    about = entry.get("several")
    there = {getattr(row, about) for row in chosen if row.beta is not None} if about else set()
    if about and len(there) < 2:
        rest = f"; no run yet of {', '.join(lacking)}" if lacking else ""
        raise NotRun(f"needs several values of {about}, and has {', '.join(sorted(there)) or 'none'} alone{rest}")


def _lacking(entry: Mapping[str, Any], chosen: Sequence[Row], sweep: SweepResults) -> list[str]:
    """The curves that the sweep's file asks for and of which nothing is there; none where the file is of other runs."""
    path = grid.SWEEPS / f"{sweep.name}.toml"
    if entry["rule"] not in {**judges.JUDGES, **judges.WHOLE} or not sweep.missing or not path.is_file():
        return []
    asked = [row for row in planned(grid.load(path)) if _fits(row, entry.get("where", {}))]
    wanted, there = (set(split((r for r in some if r.beta is not None), *CURVE)) for some in (asked, chosen))
    if not there <= wanted:
        return []
    varying = [i for i in range(len(CURVE)) if len({values[i] for values in wanted}) > 1]
    return [_named(values, varying) for values in sorted(wanted - there)]


def _named(values: Sequence[Any], varying: Sequence[int]) -> str:
    """A curve by what tells it from the others."""
    return ", ".join(f"β={values[i]}" if CURVE[i] == "beta" else str(values[i]) for i in varying)


def _spent(left_out: Sequence[Row]) -> str:
    """Which seeds suggested the hypothesis, and so do not test it."""
    seeds = sorted({row.seed for row in left_out})
    return f"seed {', '.join(map(str, seeds))} left out: it suggested the hypothesis" if seeds else ""


def _troubled(chosen: Sequence[Row]) -> Iterator[str]:
    """Which of the runs judged did not learn or collapsed: the rules judge all that are done."""
    dead = [row for row in chosen if not row.learned]
    collapsed = [row for row in chosen if row.collapsed and row.learned]
    for what, some in (("did not learn", dead), ("collapsed (catastrophic overfitting)", collapsed)):
        if some:
            told = ", ".join(f"{row.activation} seed {row.seed}" for row in some[:3]) + ", ..." * (len(some) > 3)
            yield f"judged with the others: {counted(len(some), 'run')} {what}: {told}"


def _undone(sweep: SweepResults) -> str:
    """What is missing, and by name what failed: the rules bridge its place as they bridge that of a run to come."""
    failed = ", ".join(f"{run.label}: {run.error}" for run in sweep.failed[:3]) + ", ..." * (len(sweep.failed) > 3)
    return sweep.undone + (f" ({failed})" if failed else "")


def _elsewhere_too(
    entry: Mapping[str, Any], chosen: Sequence[Row], sweep: SweepResults, results: Sequence[SweepResults]
) -> str:
    """Which other setting of the claim has some of the same runs: the two words are not independent."""
    own = {row.key for row in chosen}
    shared = {
        other.name: len(own & {run.key for run in other.runs})
        for other in results
        if other.name != sweep.name and other.figure in entry["figures"]
    }
    return "; ".join(f"{number} of its {len(own)} runs are {name}'s too" for name, number in shared.items() if number)


def _answers(
    entry: Mapping[str, Any], chosen: list[Row], sweep: SweepResults, results: Sequence[SweepResults], shared: Rules
) -> dict[str, Answer]:
    kind = entry["rule"]
    if kind in ("higher", "not_lower"):
        return {"": _compare(entry, chosen, sweep, results, shared)}
    if kind in CONTROLS or kind in COURSES:
        return {"": {**CONTROLS, **COURSES}[kind](chosen, entry, shared)}
    whole = kind in judges.WHOLE
    names = CURVE[:3] if whole else CURVE
    groups = split((row for row in chosen if row.beta is not None), *names)
    if not groups:
        raise NotRun("no run of the family of activations")
    varying = [i for i in range(len(names)) if len({values[i] for values in groups}) > 1]
    answers: dict[str, Answer] = {}
    idle: list[NotRun] = []
    for values, members in groups.items():
        name = _named(values, varying)
        one_family(members, f"{sweep.name}: {name}")
        try:
            if kind == "same_place" and "with" in entry:
                others = _elsewhere(members[0], sweep, entry["with"], results)
                answers[name] = judges.same_place(members, entry, shared, others)
            else:
                answers[name] = {**judges.JUDGES, **judges.WHOLE}[kind](members, entry, shared)
        except NotRun as error:
            idle.append(error)
        except ConfigurationError as error:
            answers[name] = Answer(str(error))
    if not answers:
        raise idle[0]
    return answers


def _elsewhere(like: Row, sweep: SweepResults, figure: str, results: Sequence[SweepResults]) -> list[Row]:
    """The runs of another figure on the same tier, network, data and β: two settings are never matched."""
    for other in results:
        if other.figure == figure and other.tier == sweep.tier:
            found = [r for r in rows(other) if (r.network, r.data, r.beta) == (like.network, like.data, like.beta)]
            if found:
                one_family(found, other.name)
                return found
    raise NotRun(f"no results of {figure} on the same tier, network and data")


def _compare(
    entry: Mapping[str, Any], chosen: list[Row], sweep: SweepResults, results: Sequence[SweepResults], shared: Rules
) -> Answer:
    pool = chosen
    if "with" in entry:  # other sweeps of the tier that train alike on other data
        like = {(row.method, row.network) for row in chosen}
        elsewhere = [other for other in results if other.tier == sweep.tier and other.figure in entry["with"]]
        pool = chosen + [r for other in elsewhere for r in rows(other) if (r.method, r.network) in like]
        pool = list({row.key: row for row in pool}.values())  # a run that several sweeps share counts once
    for (method, network, data), members in split(pool, "method", "network", "data").items():
        one_family(members, f"{sweep.name}: {method}, {network}, {data}")
    high, low = ([row for row in pool if _fits(row, entry[side])] for side in ("high", "low"))
    return (matched if entry.get("matched") else compare)(high, low, entry, shared)


def _fits(row: Row, wanted: Mapping[str, Sequence[Any]]) -> bool:
    for name, values in wanted.items():
        value = getattr(row, name)
        if ("none" if value is None else value) not in values:
            return False
    return True


def _all_of(entry: Mapping[str, Any], answers: Mapping[str, Mapping[str, _Judged]]) -> dict[str, _Judged]:
    """A claim that rests on others: in each setting that has them all, or over the sweeps of each tier."""
    parts = {name: answers[name] for name in entry["of"]}
    within = SAME[entry["within"]]
    places: dict[str, dict[str, list[_Judged]]] = {}
    for name, settings in parts.items():
        for setting, judged in settings.items():
            if judged.asked:
                place = setting if within else f"tier {judged.tier}"
                places.setdefault(place, {}).setdefault(name, []).append(judged)
    found = {}
    for place, members in places.items():
        if within and len(members) < len(parts):
            continue
        flat = {
            name: judges.combined({str(i): judged.answer for i, judged in enumerate(several)})
            for name, several in members.items()
        }
        text = "; ".join(f"{name}: p_for {a.p_for:.2g}, p_against {a.p_against:.2g}" for name, a in flat.items())
        together = replace(judges.combined(flat), text=text)
        if len(flat) < len(parts):  # what is missing may still say no
            lacking = ", ".join(name for name in parts if name not in flat)
            together = replace(together, p_for=1.0, p_equal=1.0, text=f"not run: {lacking}; {text}")
        all_ = [judged for several in members.values() for judged in several]
        status = EXPLORATORY if any(judged.status == EXPLORATORY for judged in all_) else entry["status"]
        found[place] = _Judged(together, all_[0].tier, status, flat)
    return found


def _smallest(answer: Answer) -> float:
    return min(1.0, 2 * answer.p_for, 2 * answer.p_against, answer.p_equal)


def _holm(
    entries: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Mapping[str, _Judged]]
) -> dict[tuple[str, str], tuple[float, float]]:
    """By claim and setting: what multiplies its p-values, and the adjusted smallest one."""
    families: dict[tuple[str, str], list[tuple[str, Answer]]] = {}
    for name, entry in entries.items():
        for setting, judged in answers[name].items():
            if judged.asked:
                families.setdefault((entry["family"], setting), []).append((name, judged.answer))
    found = {}
    for (_, setting), members in families.items():
        ordered = sorted(members, key=lambda pair: _smallest(pair[1]))
        so_far = 0.0
        for rank, (name, answer) in enumerate(ordered):
            times = float(len(ordered) - rank)
            so_far = max(so_far, min(1.0, times * _smallest(answer)))
            found[name, setting] = times, so_far
    return found


def word(answer: Answer, tier: str, level: float, times: float = 1.0, least: float = 0.0) -> str:
    """The word for an answer whose p-values are multiplied by `times`, and are at least `least` (Holm's)."""
    equal, yes, no = (max(least, times * p) <= level for p in (answer.p_equal, 2 * answer.p_for, 2 * answer.p_against))
    if equal:
        return EQUAL
    if yes and not no:
        return HOLDS if tier == "paper" else TRANSFERS
    if no:
        return CONTRADICTS if tier == "paper" else DOES_NOT
    return INCONCLUSIVE


def _cell(setting: str, judged: _Judged, holm: tuple[float, float] | None, shared: Rules) -> Cell:
    answer = judged.answer
    if holm is None:
        return Cell(setting, NOT_TESTED, answer.text, judged.status)
    times, adjusted = holm
    curves = judged.curves if len(judged.curves) > 1 else {}
    return Cell(
        setting,
        word(answer, judged.tier, shared.level, times, adjusted),
        answer.text,
        judged.status,
        answer.value,
        answer.low,
        answer.high,
        answer.half,
        answer.power,
        answer.p_for,
        answer.p_against,
        answer.p_equal,
        adjusted,
        {name: word(a, judged.tier, shared.level) for name, a in curves.items()},
    )


def overall(cells: Iterable[Cell]) -> str:
    """One word for all settings: the paper's own where it decides, else what those that decide share."""
    words = [cell.word for cell in cells if cell.word != NOT_TESTED]
    for decisive in (HOLDS, CONTRADICTS):
        if decisive in words:
            return decisive if not {HOLDS, CONTRADICTS} <= set(words) else DEPENDS
    decided = {w for w in words if w != INCONCLUSIVE}
    if not decided:
        return INCONCLUSIVE if words else NOT_TESTED
    return decided.pop() if len(decided) == 1 else DEPENDS


def _verdict(entry: Mapping[str, Any], cells: tuple[Cell, ...]) -> Verdict:
    asked = [cell for cell in cells if cell.word != NOT_TESTED]
    figure = ", ".join(entry.get("figures", ()))
    about = (entry["claim"], overall(cells))
    if not asked:
        needed = entry.get("needs") or command(entry.get("figures", ["figure3"])[0])
        told = [f"{cell.setting}: {cell.text}" for cell in cells]
        evidence = "; ".join([*told, f"no results: {needed}"])
        return Verdict(*about, evidence, figure, entry["norm"], entry["statement"], cells=cells)
    only = asked[0] if len(asked) == 1 else Cell("", "", "")
    return Verdict(
        *about,
        "; ".join(sentence(cell) for cell in asked),
        figure,
        entry["norm"],
        entry["statement"],
        ", ".join(dict.fromkeys(cell.setting.partition("/")[0].removeprefix("tier ") for cell in asked)),
        ", ".join(cell.setting for cell in asked),
        only.value,
        only.low,
        only.high,
        cells,
    )


def sentence(cell: Cell) -> str:
    """One setting in words."""
    sure = ""
    if cell.word == INCONCLUSIVE and np.isfinite(cell.power):
        sure = f" (power {cell.power:.0%} for the named effect, of one contrast before Holm's correction)"
    return f"{cell.setting}: {cell.word}{sure}: {cell.text}"


def _cells(results: Sequence[SweepResults], table: Mapping[str, Any]) -> dict[str, Verdict]:
    """Tables 1 and 2 cell by cell; accuracies are compared on the paper's own setting only."""
    found: dict[str, Verdict] = {}
    ones = [sweep for sweep in results if sweep.figure == "table1" and sweep.tier == "paper" and sweep.runs]
    twos = [sweep for sweep in results if sweep.figure == "table2" and sweep.runs]
    for cell in PRINTED:
        for name, printed, quantity in (("standard", cell.standard, "clean"), ("robust", cell.robust, "aa")):
            if printed is not None:
                claim = f"T1.{cell.key}.{name}"
                compared = [_accuracy(cell.activation, printed, quantity, sweep, table) for sweep in ones]
                needs = "needs the paper's own setting: " + command("table1", "paper")
                found[claim] = _table(claim, "table1", [c for c in compared if c is not None], needs)
        for name, quantity in (("memory", "peak_memory"), ("time", "train_seconds")):
            claim = f"T2.{cell.key}.{name}"
            costs = [_cost(cell.activation, name, quantity, sweep, table) for sweep in twos]
            needs = "needs a GPU: " + command("table2", "quick")
            found[claim] = _table(claim, "table2", [c for c in costs if c is not None], needs)
    return found


def _table(claim: str, figure: str, cells: Sequence[Cell], needs: str) -> Verdict:
    entry = {"claim": claim, "norm": "", "statement": "", "figures": [figure], "needs": needs}
    return _verdict(entry, tuple(cells))


def _mean(sweep: SweepResults, activation: str, quantity: str) -> tuple[float, int]:
    values = [row.value(quantity) for row in rows(sweep) if row.activation == activation]
    values = [value for value in values if value == value]
    return (float(np.mean(values)) if values else float("nan")), len(values)


def _accuracy(
    activation: str, printed: float, quantity: str, sweep: SweepResults, table: Mapping[str, Any]
) -> Cell | None:
    mean, number = _mean(sweep, activation, quantity)
    if not number:
        return None
    word = HOLDS if abs(mean - printed / 100) <= float(table["tolerance"]["accuracy"]) else CONTRADICTS
    text = f"{100 * mean:.2f}% over {number} seeds, printed {printed}%"
    return Cell(sweep.name, word, text, CONFIRMATORY, mean)


def _cost(activation: str, name: str, quantity: str, sweep: SweepResults, table: Mapping[str, Any]) -> Cell | None:
    """Costs relative to ReLU's, for the card is not the paper's; a CPU says nothing about a GPU's memory."""
    on_gpu = any(str((row.record.get("provenance") or {}).get("device", "")).startswith("cuda") for row in rows(sweep))
    (mean, number), (base, _) = (_mean(sweep, wanted, quantity) for wanted in (activation, "relu"))
    if not on_gpu or not number or not base > 0:
        return None
    printed = {row.activation: row.memory if name == "memory" else row.minutes for row in PRINTED}
    ours, theirs = mean / base, printed[activation] / printed["relu"]
    close = abs(ours / theirs - 1) <= float(table["tolerance"]["ratio"])
    words = (HOLDS, CONTRADICTS) if sweep.tier == "paper" else (TRANSFERS, DOES_NOT)
    text = f"{ours:.2f} of ReLU's over {number} seeds, printed {theirs:.2f}"
    return Cell(sweep.name, words[0] if close else words[1], text, CONFIRMATORY, ours)
