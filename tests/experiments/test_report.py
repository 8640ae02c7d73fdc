"""What the analysis of one sweep must see through: a β that moves norm and robustness at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from experiments.correlation.report import WITHIN, correlations


def runs_of(generator: np.random.Generator, *, apart: float, slope: float) -> list[SimpleNamespace]:
    """Three curves of four levels and three seeds: β moves norm and robustness by `apart`, a run's own norm its
    robustness by `slope`.
    """
    runs = []
    for beta in (0, 1, 2):
        for level in range(4):
            for seed in range(3):
                x, noise = generator.normal(size=2)
                norm, robust = np.exp(x + apart * beta), slope * x + noise - apart * beta
                value = {"norm train/clean": norm, "aa2": robust, "clean": noise, "effective": 1.0 + level}.get
                about = {"beta": beta, "seed": seed, "configuration": (beta, level)}
                runs.append(SimpleNamespace(**about, value=lambda n, v=value: v(n, np.nan)))
    return runs


def found_in(generator: np.random.Generator, **truth: float) -> dict[tuple[str, str], dict[str, float]]:
    found = correlations(runs_of(generator, **truth))  # type: ignore[arg-type]
    return {(c["kind"], c["given"]): c for c in found if (c["norm"], c["place"]) == ("norm", "train/clean")}


@pytest.mark.statistical
def test_what_beta_does_to_both_is_no_relation_among_runs_of_one_activation():
    """100 repetitions at 5%: fails once in 10,000 seeds. Along the activations β alone makes a correlation of -0.8."""
    generator, alarms, along, seen = np.random.default_rng(23), 0, [], 0
    for _ in range(100):
        common = found_in(generator, apart=3.0, slope=0.0)
        along.append(common["spearman", "nothing"]["value"])
        alarms += common["pearson", WITHIN]["p_value"] <= 0.05
        hidden = found_in(generator, apart=3.0, slope=2.0)["pearson", WITHIN]
        seen += hidden["low"] > 0 and hidden["p_value"] <= 0.05
    assert np.mean(along) < -0.7
    assert alarms <= stats.binom.isf(1e-4, 100, 0.05)
    assert seen > 95


def test_coefficients_along_curves_are_descriptions():
    found = found_in(np.random.default_rng(24), apart=1.0, slope=0.0)
    for (_, given), row in found.items():
        assert (row["low"] is None) is (row["p_value"] is None) is (given != WITHIN)
    assert {given for _, given in found} == {"nothing", "clean accuracy", "effective curvature", WITHIN}


def test_one_seed_has_no_runs_to_compare():
    runs = [run for run in runs_of(np.random.default_rng(25), apart=0.0, slope=0.0) if run.seed == 0]
    assert WITHIN not in {c["given"] for c in correlations(runs)}  # type: ignore[arg-type]
