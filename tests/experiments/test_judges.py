"""The judges' answers on curves whose truth is known, and how answers become verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.correlation import judges, u_shape
from experiments.correlation.differences import difference
from experiments.correlation.rows import rows
from experiments.correlation.sources import command
from experiments.correlation.verdicts import load_rules, verdicts
from experiments.sweep.export import Result, SweepResults
from experiments.sweep.grid import load

LEVELS = np.array([0.5, 1, 2, 4, 7, 10, 15, 25])
SWEEPS = Path(__file__).parents[2] / "experiments" / "sweeps"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shared_rules(**options):
    settings = {"band": (4.0, 10.0), "level": 0.05, "margin": 0.05, "resamples": 200, "generator": rng(16)}
    return judges.Rules(**{**settings, **options})


class Fake:
    """A run with a curvature and numbers by name."""

    def __init__(self, curvature, configuration="", **numbers):
        self.curvature, self.configuration, self.numbers = curvature, configuration, numbers

    def value(self, name):
        return self.numbers[name]


def test_a_side_without_a_slope_contradicts_no_u():
    """Three levels leave one on the right: its slope is undefined, and nothing is known of it."""
    runs = [
        Fake(x, norm=y) for x, y in zip(np.repeat([1.0, 2, 4], 3), [3, 3.1, 2.9, 2, 2.1, 1.9, 3, 3.1, 2.9], strict=True)
    ]
    assert np.isnan(u_shape([run.curvature for run in runs], [run.value("norm") for run in runs]).right.value)
    assert judges.shape(runs, {"quantity": "norm"}, shared_rules()).answer == "undecided"


def test_wide_intervals_that_meet_show_no_common_place():
    """Intervals to the ends of the range meet whatever the truth; narrow ones inside it tell."""
    generator = rng(17)
    rule = {"low": "norm", "high": "robust"}

    def answer(noise, place):
        runs = [
            Fake(x, norm=np.log(x / 5) ** 2 + noise * a, robust=-(np.log(x / place) ** 2) + noise * b)
            for x, a, b in zip(np.repeat(LEVELS, 3), *generator.normal(size=(2, 24)), strict=True)
        ]
        return judges.same_place(runs, rule, shared_rules()).answer

    assert [answer(0.05, 5), answer(0.05, 2), answer(2.0, 5)] == ["yes", "no", "undecided"]


def test_a_curve_that_never_moves_has_no_signal():
    runs = [Fake(x, aa2=0.0) for x in np.repeat(LEVELS, 3)]
    rule = {"quantity": "aa2", "enough": 4.0, "little": 2.0}
    assert judges.signal(runs, rule, shared_rules()).answer == "undecided"


@pytest.mark.statistical
def test_the_pair_that_luck_picks_is_corrected_for():
    """Nine equal configurations of three seeds: the interval of weakest less strongest lies below 0 in at most 2.5% of
    400 repetitions, above it in none (fails once in 10,000 seeds); where all of one side are far below, always.
    """
    generator, below, above = rng(18), 0, 0

    def side(names, shift=0.0):
        return [Fake(1.0, name, aa2=shift + generator.normal()) for name in names for _ in range(3)]

    for _ in range(400):
        _, low, high = difference(side("abc"), side("ABCDEF"), "aa2", 0.05)
        below, above = below + (high < 0), above + (low > 0)
    assert below <= stats.binom.isf(1e-4, 400, 0.025)
    assert above <= stats.binom.isf(1e-4, 400, 0.025)
    assert difference(side("abc", -10.0), side("AB"), "aa2", 0.05)[2] < 0
    assert difference(side("abc", 10.0), side("AB"), "aa2", 0.05)[1] > 0


def made(name: str, seeds: list[int], *, missing: int = 0) -> SweepResults:
    """A sweep in which norm and robustness fall together, so that each is the other's whole truth."""
    sweep = load(SWEEPS / f"{name}.toml", seeds=seeds)
    order = list(dict.fromkeys(run.train["activation"] for run in sweep.runs))
    runs = []
    for run in sweep.runs:
        place = order.index(run.train["activation"])
        level = 0.9 - 0.01 * place + 0.001 * run.train["seed"]
        record = {
            "max_curvature": 1.0 + place % 8,
            "aa2": {"value": level},
            "norms": {"train/clean": {"rms": level}},
        }
        runs.append(Result(run.key, run, sweep.variants[run.key], 1.0, record))
    return SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, missing, tuple(runs))


def quick_rules() -> dict[str, object]:
    return {**load_rules(), "resamples": 100}


def test_two_sweeps_are_matched_on_one_network_and_one_data_set_only():
    """A tier has sweeps of several nets: the norm of one is never set against the robustness of another."""
    norms, same = made("smoke/figure7", [0]), made("smoke/figure3", [0])
    assert verdicts([norms, same], rules=quick_rules())["F7.training-regime"].verdict == "contradicted by measurement"
    other = [run.config.replace(train={"network_options": {"width": 32}}) for run in same.runs]
    wide = tuple(replace(run, key=c.key, config=c) for run, c in zip(same.runs, other, strict=True))
    assert {row.network for row in rows(replace(same, runs=wide))} != {row.network for row in rows(norms)}
    for results in ([norms, replace(same, runs=wide)], [replace(same, runs=wide + wide[:1]), norms, same]):
        found = verdicts(results, rules=quick_rules())["F7.training-regime"]
        wanted = "contradicted by measurement" if same in results else "not tested"
        assert found.verdict == wanted
    assert "same tier, network and data" in verdicts([norms, replace(same, runs=wide)])["F7.training-regime"].evidence


def test_a_run_of_the_other_sweep_without_a_number_hides_no_seed():
    norms, robust = made("smoke/figure7", [0]), made("smoke/figure3", [0, 1])
    broken = replace(robust.runs[0], record={**robust.runs[0].record, "aa2": None})
    found = verdicts([norms, replace(robust, runs=(broken, *robust.runs[1:]))], rules=quick_rules())
    assert "24 configurations" in found["F7.training-regime"].evidence


def test_what_is_missing_is_said_and_what_makes_it_is_a_command_that_exports():
    found = verdicts([made("smoke/figure3", [0], missing=3)], rules=quick_rules())
    assert "; 3 runs missing)" in found["S4.5.flat-is-robust"].evidence
    for claim in ("F7a.u-shape", "T1.relu.robust", "T2.relu.time"):
        assert found[claim].evidence.endswith("--export")
    assert (
        command("figure5") == "python -m experiments sweep experiments/sweeps/smoke/figure5.toml --seeds 0,1,2 --export"
    )


def test_a_claim_about_other_data_names_the_sweep_that_has_them():
    found = verdicts([made("smoke/figure6", [0])], rules=quick_rules())["F6.cifar100-peaks-in-4-10"]
    assert (found.verdict, found.tier) == ("not tested", "smoke")
    assert found.evidence.endswith("python -m experiments sweep experiments/sweeps/quick/figure6.toml --export")
    assert load(SWEEPS / "quick" / "figure6.toml").runs[0].train["data"] == "cifar100"


def test_a_smaller_tier_that_decides_is_told_where_the_largest_does_not():
    """The largest tier with results is the one that is judged; what a smaller one shows stands beside it."""
    smoke, quick = made("smoke/figure3", [0, 1, 2]), made("quick/figure3_cpu", [0])
    alone = verdicts([smoke], rules=quick_rules())["S4.1.single-run"]
    both = verdicts([smoke, quick], rules=quick_rules())["S4.1.single-run"]
    assert (alone.verdict, both.verdict, both.tier) == ("holds under conditions", "not tested", "quick")
    assert f"a smaller tier: {alone.verdict} ({alone.evidence})" in both.evidence
