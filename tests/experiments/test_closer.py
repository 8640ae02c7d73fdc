"""A closer look at a curve: errors over images and seeds by simulation, outcomes by hand, the stored runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.correlation.association import shuffled
from experiments.correlation.closer import both, closer, curves, over_images, told
from experiments.correlation.rows import Row, rows
from experiments.correlation.verdicts import load_rules, shared_rules
from experiments.fields import storable
from experiments.sweep.export import read, rounded
from experiments.sweep.records import withstood

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def main() -> list[Row]:
    return rows(read(RESULTS / "campaign/main.json"))


def test_the_error_for_other_images_and_seeds_is_that_of_a_crossed_design() -> None:
    """Means of S seeds on n images, each with an effect of its own: the variance that is told, and that there is."""
    generator = np.random.default_rng(0)
    seeds, number, repeats = 4, 150, 2000
    told, seen = np.zeros(repeats), np.zeros(repeats)
    for k in range(repeats):
        d = 0.1 * generator.normal(size=(seeds, 1)) + generator.normal(size=number)
        d = d + 0.5 * generator.normal(size=(seeds, number))
        by_seeds = d.mean(1).std(ddof=1) / np.sqrt(seeds)
        told[k], seen[k] = both(d, by_seeds) ** 2, d.mean() ** 2
    true = 0.1**2 / seeds + 1 / number + 0.25 / seeds / number
    for values in (told, seen):
        assert abs(values.mean() - true) < 4 * values.std(ddof=1) / np.sqrt(repeats)


def test_errors_with_the_nets_fixed_are_those_of_the_images() -> None:
    value, error = over_images(np.array([[1.0, 0.0, 0.0, -1.0], [1.0, 1.0, 0.0, 0.0]]))
    each = [1.0, 0.5, 0.0, -0.5]
    assert value == pytest.approx(np.mean(each))
    assert error == pytest.approx(np.std(each, ddof=1) / 2)


def test_outcomes_are_the_accuracy(main: list[Row]) -> None:
    for row in main:
        outcomes = withstood(row.record["aa2"])
        assert outcomes is not None
        assert len(outcomes) == 1000
        assert outcomes.mean() == pytest.approx(row.value("aa2"))


def test_a_curve_of_the_main_sweep(main: list[Row]) -> None:
    """Contrasts from the runs, one by one; a text for each part."""
    report = closer(main, shared_rules(load_rules()))
    table = {(row.curvature, row.seed): row for row in main}
    levels = sorted({row.curvature for row in main})
    low, band = levels[:3], levels[3:6]
    for name, of in (("contrasts", "aa2"), ("clean", "clean"), ("fitted", "fitted")):
        apart = [
            np.mean([table[level, seed].value(of) for level in band])
            - np.mean([table[level, seed].value(of) for level in low])
            for seed in range(3)
        ]
        assert report[name]["band less low"]["value"] == pytest.approx(np.mean(apart))
    apart = [
        withstood(table[levels[1], seed].record["aa2"]) - withstood(table[levels[0], seed].record["aa2"])  # type: ignore[operator]
        for seed in range(3)
    ]
    step = report["steps"]["aa2"][0]
    assert (step["from"], step["to"], step["value"]) == (levels[0], levels[1], pytest.approx(np.mean(apart)))
    kept = [row.value("aa2") / row.record["aa2"]["clean"] for row in main if row.curvature in low]
    assert report["kept"]["low"] == pytest.approx(np.mean(kept))
    fitted = [row.record["train"]["last_epoch"]["train_adversarial"] for row in main if row.curvature in low]
    assert report["fitted"]["low"] == pytest.approx(np.mean(fitted))
    norms, robust = (
        np.array([[table[level, seed].value(of) for level in levels] for seed in range(3)])
        for of in ("norm train/clean", "aa2")
    )
    assert report["flat is robust, shuffled"]["log norm train/clean"] == shuffled(np.log(norms), robust)
    assert report["scatter"]["images alone"] == pytest.approx(np.sqrt(report["scatter"]["disagree"] / 2000))
    lines = "\n".join(told(report))
    for part in (
        "the nets fixed",
        "other images and seeds",
        "disagree",
        "clean accuracy",
        "leaves right",
        "adversarial training images",
        "scatter unequally",
        "without 0.5",
    ):
        assert part in lines


def test_what_is_stored_is_what_the_runs_say(main: list[Row]) -> None:
    stored = json.loads((RESULTS / "closer.json").read_text())["campaign/main"]
    assert stored == json.loads(json.dumps(rounded(storable(curves(main, shared_rules(load_rules()))))))


def test_nothing_is_said_of_runs_that_keep_no_outcomes() -> None:
    assert curves(rows(read(RESULTS / "smoke/figure3.json")), shared_rules(load_rules())) == {}


def test_a_seed_that_lacks_a_level_is_in_neither_error(main: list[Row]) -> None:
    """What is said of two whole seeds is said of them alone, whatever runs there are of a third."""
    rules = shared_rules(load_rules())
    two = closer([row for row in main if row.seed < 2], rules)["contrasts"]
    more = closer([row for row in main if row.seed < 2 or row.curvature < 5], rules)["contrasts"]
    assert two == more
