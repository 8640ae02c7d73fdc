"""`python -m experiments.correlation.scatter`: how seeds scatter in the stored sweeps, and what it does to contrasts.

Prints, tier by tier and for every quantity, the F of the seeds' effects (mean square of seeds over that of the
residuals) and the variance of the seeds' own contrasts over that of the independent model, the figure behind
`contrasts.INFLATION`; then the share of simulated curves without a truth whose contrasts are called different at 5%.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.correlation.coefficients import Array
from experiments.correlation.contrasts import INFLATION, Layout
from experiments.correlation.judges import groups, layout_of
from experiments.correlation.rows import rows, split
from experiments.correlation.verdicts import load_rules, shared_rules
from experiments.sweep.export import SweepResults, read_all

QUANTITIES = ("aa2", "log norm train/clean", "log norm train/adversarial", "log invariant train/adversarial")
LEVELS = (0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0, 50.0)


def measured(results: Sequence[SweepResults], quantity: str) -> Iterator[tuple[float, list[float]]]:
    """Of every complete curve with several seeds, each once: F of the seeds, and the ratios of three contrasts."""
    rules, seen = shared_rules(load_rules()), set[frozenset[str]]()
    for sweep in results:
        if not sweep.figure.startswith("figure"):
            continue
        for key, members in split(rows(sweep), "method", "network", "data", "beta").items():
            runs = frozenset(row.result.key for row in members)
            if runs in seen:  # another sweep holds the same runs
                continue
            seen.add(runs)
            if quantity == "aa2" and key[0] == "standard":  # nothing is robust, nothing scatters
                continue
            layout = layout_of(members, quantity)
            levels, seeds = sorted(layout.cells, key=float), layout.seeds  # type: ignore[arg-type]
            if len(seeds) < 2 or len(layout.y) != len(levels) * len(seeds) or len(levels) < 6:
                continue
            table = layout.table(levels)
            found = groups(levels, rules)
            if all(found.values()):
                yield _figures(table, levels, found)


def _figures(table: Array, levels: Sequence[object], found: dict[str, list[float]]) -> tuple[float, list[float]]:
    seeds, number = table.shape
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    residual = float((left**2).sum()) / ((seeds - 1) * (number - 1))
    effect = number * float(table.mean(1).var(ddof=1))
    weights = [
        np.array([(x in found["band"]) / len(found["band"]) - (x in found[side]) / len(found[side]) for x in levels])
        for side in ("low", "high")
    ]
    t = np.log(np.array(levels, dtype=float))
    weights.append((t - t.mean()) / ((t - t.mean()) ** 2).sum())
    ratios = [float((table @ c).var(ddof=1)) / (residual * float((c**2).sum())) for c in weights]
    return effect / residual, ratios


def alarms(
    seeds: int, dependent: float, louder: float, repeats: int, generator: np.random.Generator
) -> tuple[float, float]:
    """Shares of curves without a truth whose band less low, and band less high, is called different at 5%: `dependent`
    of a run's variance is a smooth curve of its seed, and levels from 20 on scatter `louder` times as much.
    """
    t = np.log(LEVELS)
    root = np.linalg.cholesky(np.exp(-((t[:, None] - t) ** 2) / (2 * 0.7**2)) + 1e-9 * np.eye(len(t)))
    scale = np.where(np.array(LEVELS) >= 20, louder, 1.0)
    found = np.zeros(2)
    for _ in range(repeats):
        own = np.sqrt(1 - dependent) * generator.normal(size=(seeds, len(t)))
        own += np.sqrt(dependent) * generator.normal(size=(seeds, len(t))) @ root.T
        y = (own * scale + 2 * generator.normal(size=(seeds, 1))).ravel()
        layout = Layout(list(LEVELS) * seeds, list(np.repeat(range(seeds), len(t))), y, inflation=INFLATION)
        for i, side in enumerate((LEVELS[:3], LEVELS[6:])):
            contrast = layout.difference(LEVELS[3:6], side)
            if contrast is not None:
                found[i] += min(contrast.above(), contrast.below()) <= 0.025
    low, high = found / repeats
    return float(low), float(high)


def main(arguments: list[str]) -> int:
    """Print both tables."""
    results = read_all(Path(arguments[0] if arguments else "results"))
    for tier in dict.fromkeys(sweep.tier for sweep in results):
        everything: list[float] = []
        told = []
        for quantity in QUANTITIES:
            found = list(measured([sweep for sweep in results if sweep.tier == tier], quantity))
            if found:
                effects, ratios = [f for f, _ in found], [r for _, several in found for r in several]
                everything += ratios
                span = f"{min(effects):.1f}, {np.median(effects):.1f}, {max(effects):.1f}"
                told.append(
                    f"{quantity:33} {len(found):6}  {span:32}  {np.mean(ratios):.2f} over {len(ratios)} contrasts"
                )
        if everything:
            print(f"tier {tier:28} curves  F of seeds (least, median, most)  own variance / independent")
            print("\n".join(told))
            print(f"together: {np.mean(everything):.2f} over {len(everything)} contrasts; the rules take {INFLATION}\n")
    print("seeds  dependent share  louder above 20  band less low, high: called at 5% (1,000 simulated curves)")
    generator = np.random.default_rng(0)
    for seeds in (2, 3, 4, 8):
        for dependent, louder in ((0.0, 1.0), (0.4, 1.0), (0.7, 1.0), (0.3, 2.0)):
            low, high = alarms(seeds, dependent, louder, 1000, generator)
            print(f"{seeds:5}  {dependent:15g}  {louder:15g}  {low:.1%}, {high:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
