"""`python -m experiments.correlation.closer SWEEP`: a closer look at a sweep's curves, which no rule asks for.

Exploratory, all of it: it describes what stands behind the rules' contrasts, and decides nothing.

- Every run of a sweep attacks the same n images, and keeps which of them held. With d[s, i] the contrast of image i
  within seed s, its mean d[., i] over S seeds scatters over the images as other test images would have it: the error
  with the nets held fixed is sd_i(d[., i]) / sqrt(n). The rules' error holds the images fixed and lets seeds vary. For
  other images and other seeds both variances add up, less that of what is left of d[s, i], which is in both:
  sum (d[s, i] - d[s, .] - d[., i] + d[., .])² / ((S - 1)(n - 1) S n).
- Two seeds of one level disagree on a share q of the images. Independent images alone would scatter the accuracy of a
  run by sqrt(q / 2n); beside it stands how runs do scatter.
- Is a level more robust because it is right more often? Clean accuracy, and of the images that are classified rightly
  the share that stays so. Because it fits better? Accuracy on the adversarial training images of the last epoch.
- Does a relation of norm and robustness (`association`) hold without each single level, and where levels may scatter
  unequally (`association.shuffled`)?

`python -m experiments figures` stores the reports in results/closer.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.correlation.association import shuffled, within
from experiments.correlation.coefficients import Array
from experiments.correlation.contrasts import Contrast
from experiments.correlation.judges import Rules, groups, layout_of, level_of
from experiments.correlation.rows import Row, learned, quantity, rows, split
from experiments.correlation.verdicts import load_rules, shared_rules
from experiments.sweep.export import read, read_all
from experiments.sweep.records import NORMAL, withstood
from hessdiag.errors import ConfigurationError

Plain = dict[str, Any]
DRAWS = 1000
SIDES = ("low", "high")
ACCURACIES = {
    "clean": "clean accuracy",
    "kept": "of what is right without an attack, AA-2 leaves right",
    "fitted": "accuracy on the adversarial training images of the last epoch",
}
SHARPNESSES = ("log norm train/clean", "log norm train/adversarial", "log invariant train/adversarial")


def curves(chosen: Sequence[Row], rules: Rules) -> dict[str, Plain]:
    """A report of every curve whose runs keep what became of each image."""
    found = {}
    for (method, network, data, beta), members in split(learned(chosen), "method", "network", "data", "beta").items():
        if beta is None or any(row.variant for row in members):
            continue
        if report := closer(members, rules):
            found[f"{method}, {network}, {data}, β = {beta}"] = report
    return found


def closer(members: Sequence[Row], rules: Rules, *, seed: int = 0) -> Plain:
    """The report of one curve; empty where nothing is kept."""
    steps = {name: one for name in ("aa2", "pgd") if (one := _steps(members, name))}
    if not steps:
        return {}
    told: Plain = {"steps": steps}
    table, levels, seeds = _outcomes(members, "aa2")
    found = groups(levels, rules)
    if table is not None and len(table) > 1 and all(found.values()):
        generator = np.random.default_rng([seed, len(levels)])
        whole = [row for row in members if row.seed in seeds]
        told["contrasts"] = _contrasts(whole, table, levels, found, rules)
        told["scatter"] = _scatter(table)
        told["best in band"] = _best_in_band(table, levels, found["band"], generator)
        for name in ACCURACIES:
            told[name] = _plain(members, name, found, rules)
        told["flat is robust, without"] = _without(members, levels, rules)
        told["flat is robust, shuffled"] = {name: _shuffled(whole, levels, name) for name in SHARPNESSES}
    return told


def _outcomes(members: Sequence[Row], attack: str) -> tuple[Array | None, list[float], list[int]]:
    """[seeds, levels, images] of the seeds that have every level; the levels; these seeds."""
    levels = sorted({level_of(row) for row in members if np.isfinite(row.curvature)})
    by_run = {(row.seed, level_of(row)): withstood(row.record.get(attack) or {}) for row in members}
    every = {seed: [by_run.get((seed, level)) for level in levels] for seed in sorted({row.seed for row in members})}
    complete = {seed: line for seed, line in every.items() if all(one is not None for one in line)}
    if len({len(one) for line in complete.values() for one in line if one is not None}) != 1:
        return None, levels, []
    return np.array(list(complete.values())), levels, list(complete)


def over_images(difference: Array) -> tuple[float, float]:
    """Mean and error over images of [seeds, images], the nets held fixed."""
    each = difference.mean(0)
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def _ends(value: float, error: float) -> list[float]:
    return [value - NORMAL * error, value + NORMAL * error]


def both(difference: Array, by_seeds: float) -> float:
    """The error for other seeds and other images, `by_seeds` that for other seeds alone."""
    seeds, number = difference.shape
    _, by_images = over_images(difference)
    left = difference - difference.mean(0) - difference.mean(1, keepdims=True) + difference.mean()
    shared = float((left**2).sum()) / ((seeds - 1) * (number - 1) * seeds * number)
    return float(np.sqrt(max(by_images**2 + by_seeds**2 - shared, by_images**2, by_seeds**2)))


def _contrasts(
    members: Sequence[Row], table: Array, levels: list[float], found: dict[str, list[float]], rules: Rules
) -> Plain:
    layout, told = layout_of(members, "aa2"), {}
    for side in SIDES:
        by_seed = layout.difference(found["band"], found[side])
        if by_seed is None:
            continue
        places = [[levels.index(level) for level in found[group]] for group in ("band", side)]
        difference = table[:, places[0]].mean(1) - table[:, places[1]].mean(1)
        value, by_images = over_images(difference)
        joint = Contrast(value, both(difference, by_seed.error), by_seed.freedom, by_seed.seeds)
        told[f"band less {side}"] = {
            "value": value,
            "error by seeds": by_seed.error,
            "error by images": by_images,
            "error by both": joint.error,
            "by images": _ends(value, by_images),
            "by both": list(joint.interval(rules.level)),
            "p by seeds": by_seed.two_sided(),
            "p by both": joint.two_sided(),
        }
    return told


def _scatter(table: Array) -> Plain:
    """How runs of one level scatter, and what the draw of the images alone would do, pooled over the levels."""
    seeds, _, number = table.shape
    apart = [float((table[a] != table[b]).mean()) for a in range(seeds) for b in range(a)]
    share = float(np.mean(apart))
    runs = float(np.sqrt(table.mean(-1).var(0, ddof=1).mean()))
    return {"disagree": share, "images alone": float(np.sqrt(share / 2 / number)), "runs": runs}


def _best_in_band(table: Array, levels: list[float], band: list[float], generator: np.random.Generator) -> Plain:
    """How often the most robust level lies in the band, for other draws of the images, and of the seeds too."""
    seeds, _, number = table.shape
    inside = np.array([level in band for level in levels])
    counts = np.zeros(2)
    for _ in range(DRAWS):
        images = generator.integers(0, number, number)
        drawn = table[:, :, images].mean(-1)
        counts += inside[drawn.mean(0).argmax()], inside[drawn[generator.integers(0, seeds, seeds)].mean(0).argmax()]
    return {"images": float(counts[0] / DRAWS), "images and seeds": float(counts[1] / DRAWS)}


def _plain(members: Sequence[Row], name: str, found: dict[str, list[float]], rules: Rules) -> Plain:
    """Both contrasts of a quantity by the rules' error, and the groups' means."""
    layout = layout_of(members, name)
    told: Plain = {group: float(np.mean([layout.means[level] for level in found[group]])) for group in found}
    for side in SIDES:
        contrast = layout.difference(found["band"], found[side])
        if contrast is not None:
            told[f"band less {side}"] = {"value": contrast.value, "interval": list(contrast.interval(rules.level))}
    return told


def _without(members: Sequence[Row], levels: Sequence[float], rules: Rules) -> Plain:
    """The relation among runs of one curvature by norm: all levels, then all but one."""
    told: Plain = {}
    for name in SHARPNESSES:
        told[name] = {}
        for left_out in (None, *levels):
            kept = [row for row in members if level_of(row) != left_out]
            try:
                found = within(
                    [row.configuration for row in kept],
                    [row.seed for row in kept],
                    quantity(kept, name),
                    quantity(kept, "aa2"),
                )
            except ConfigurationError:
                continue
            key = "none" if left_out is None else f"{left_out:g}"
            interval = list(found.slope.interval(rules.level))
            told[name][key] = {"value": found.slope.value, "interval": interval, "r": found.correlation}
    return told


def _shuffled(members: Sequence[Row], levels: Sequence[float], name: str) -> float:
    """The p-value of the relation where levels may scatter unequally; of whole seeds."""
    ordered = sorted(members, key=lambda row: (row.seed, level_of(row)))
    x, y = (quantity(ordered, of).reshape(-1, len(levels)) for of in (name, "aa2"))
    return shuffled(x, y)


def _steps(members: Sequence[Row], attack: str) -> list[Plain]:
    """From each level to the next, image by image, the nets held fixed."""
    table, levels, _ = _outcomes(members, attack)
    if table is None or len(levels) < 2:
        return []
    steps = []
    for place in range(len(levels) - 1):
        value, error = over_images(table[:, place + 1] - table[:, place])
        about = {"from": levels[place], "to": levels[place + 1]}
        steps.append({**about, "value": value, "interval": _ends(value, error)})
    return steps


def told(report: Plain) -> list[str]:
    """A report as lines."""
    lines = []
    for name, one in report.get("contrasts", {}).items():
        errors = " / ".join(f"{100 * one[f'error by {of}']:.2f}" for of in ("seeds", "images", "both"))
        lines += [
            f"  AA-2, {name}: other seeds, as the rules have it: p {one['p by seeds']:.2g} before any correction",
            f"    other images, the nets fixed: {_points(one['value'], one['by images'])}",
            f"    other images and seeds: {_points(one['value'], one['by both'])}, p {one['p by both']:.2g}",
            f"    errors by seeds / images / both: {errors}",
        ]
    if scatter := report.get("scatter"):
        shares = report["best in band"]
        lines += [
            f"  two seeds of a level disagree on {100 * scatter['disagree']:.1f}% of the images",
            f"    the images alone scatter a run by {100 * scatter['images alone']:.2f} points; runs scatter by "
            f"{100 * scatter['runs']:.2f}",
            f"  the best level lies in the band in {shares['images']:.1%} of draws of the images, in "
            f"{shares['images and seeds']:.1%} of draws of images and seeds",
        ]
    for name, title in ACCURACIES.items():
        if name in report:
            one = report[name]
            means = ", ".join(f"{group} {100 * one[group]:.1f}%" for group in ("low", "band", "high"))
            sides = [side for side in one if side.startswith("band less")]
            apart = "; ".join(f"{side} {_points(one[side]['value'], one[side]['interval'])}" for side in sides)
            lines.append(f"  {title}: {means}; {apart}")
    for name, levels in report.get("flat is robust, without", {}).items():
        whole = levels.get("none")
        single = [(level, one) for level, one in levels.items() if level != "none"]
        if whole and single:
            lines.append(f"  AA-2 over {name}: {_points(whole['value'], whole['interval'])}, r {whole['r']:+.2f}")
            lines.append(f"    p {report['flat is robust, shuffled'][name]:.2g} where levels may scatter unequally")
            for level, one in (f(single, key=lambda each: each[1]["value"]) for f in (min, max)):
                lines.append(f"    without {level}: {_points(one['value'], one['interval'])}, r {one['r']:+.2f}")
    for name, steps in report["steps"].items():
        for step in steps:
            apart = _points(step["value"], step["interval"])
            lines.append(f"  {name}, {step['to']:g} less {step['from']:g}, the nets fixed: {apart}")
    return lines


def _points(value: float, interval: Sequence[float]) -> str:
    low, high = (f"{100 * end:+.2f}" for end in interval)
    return f"{100 * value:+.2f} [{low}, {high}]"


def main(arguments: list[str]) -> int:
    """Print the report of every sweep named, or of all."""
    home = Path("results")
    sweeps = [read(home / f"{name}.json") for name in arguments] or read_all(home)
    rules = shared_rules(load_rules())
    for sweep in sweeps:
        for curve, report in curves(rows(sweep), rules).items():
            print("\n".join([f"{sweep.name}, {curve}", *told(report)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
