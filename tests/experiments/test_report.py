"""What the analysis of one sweep must see through: a β that moves norm and robustness at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.correlation.report import correlations


def runs_of(generator: np.random.Generator, *, apart: float, slope: float) -> list[SimpleNamespace]:
    """Three curves of eight levels: β moves norm and robustness by `apart`, the norm alone robustness by `slope`."""
    runs = []
    for beta in (0, 1, 2):
        for level in range(8):
            x, noise = generator.normal(size=2)
            norm, robust = np.exp(x + apart * beta), slope * x + noise - apart * beta
            value = {"norm train/clean": norm, "aa2": robust, "clean": noise, "effective": 1.0 + level}.get
            runs.append(SimpleNamespace(beta=beta, configuration=(beta, level), value=lambda n, v=value: v(n, np.nan)))
    return runs


def spearman(generator: np.random.Generator, **truth: float) -> dict[str, dict[str, float]]:
    found = correlations(runs_of(generator, **truth), 200, generator)  # type: ignore[arg-type]
    return {c["given"]: c for c in found if (c["kind"], c["norm"], c["place"]) == ("spearman", "norm", "train/clean")}


@pytest.mark.statistical
def test_what_beta_does_to_both_is_no_relation_within_its_curves():
    """30 repetitions at 5%: more than 7 false alarms have a chance of 2e-4."""
    generator, alarms, alone, seen = np.random.default_rng(23), 0, 0, 0
    for _ in range(30):
        common = spearman(generator, apart=3.0, slope=0.0)
        alone += common["nothing"]["high"] < 0
        alarms += common["β"]["p_value"] <= 0.05
        hidden = spearman(generator, apart=3.0, slope=2.0)
        seen += hidden["β"]["low"] > 0 and hidden["β"]["p_value"] <= 0.05
    assert alone == 30
    assert alarms <= 7
    assert seen >= 27


def test_one_curve_has_nothing_within_which_to_look():
    generator = np.random.default_rng(24)
    runs = [run for run in runs_of(generator, apart=0.0, slope=0.0) if run.beta == 0]
    assert "β" not in {c["given"] for c in correlations(runs, 100, generator)}  # type: ignore[arg-type]
