"""Stored results say when the recipe in their sweep's file has changed since."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.sweep import origin
from experiments.sweep.export import Result, SweepResults, read_all
from experiments.sweep.grid import load
from experiments.sweep.keys import RunConfig

TEXT = """
title = "a sweep"
[train]
network = "small_resnet"
data = "digits"
eps = "0.15"
method = "dajat"
epochs = 20
[[grid]]
beta = [0, 1]
curvature = [1, 4]
seed = [0]
"""
RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture
def sweeps(tmp_path: Path) -> Path:
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "figure3.toml").write_text(TEXT)
    return tmp_path


def stored(sweeps: Path, seeds: list[int]) -> SweepResults:
    sweep = load(sweeps / "smoke" / "figure3.toml", seeds=seeds)
    runs = tuple(Result(run.key, run, "", 1.0, {}) for run in sweep.runs)
    return SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 0, runs)


def test_results_of_the_recipe_as_it_is_carry_no_remark_whatever_their_seeds(sweeps: Path) -> None:
    assert origin.differing(stored(sweeps, [0, 5]), sweeps) == []
    part = stored(sweeps, [0])
    assert origin.differing(replace(part, runs=part.runs[:2]), sweeps) == []
    assert origin.differing(replace(part, name="smoke/of_ones_own"), sweeps) == []


def test_what_changed_in_the_recipe_is_named(sweeps: Path) -> None:
    before = stored(sweeps, [0, 1])
    path = sweeps / "smoke" / "figure3.toml"
    path.write_text(TEXT.replace("[[grid]]", "averaging = { tau = 0.5 }\n[measure]\nrtol = 0.2\n[[grid]]"))
    assert origin.differing(before, sweeps) == ["measure.rtol", "train.averaging.tau"]
    path.write_text(TEXT.replace("curvature = [1, 4]", "curvature = [1, 7]"))
    assert origin.differing(before, sweeps) == ["which runs there are"]


def test_settings_that_came_later_take_their_defaults(sweeps: Path) -> None:
    """A run stored before a setting was there is the run with that setting's default."""
    now = stored(sweeps, [0])

    def older(config: RunConfig) -> RunConfig:
        train = {name: value for name, value in config.train.items() if name != "channels_last"}
        return replace(config, train=train)

    old = tuple(replace(run, config=older(run.config)) for run in now.runs)
    assert origin.differing(replace(now, runs=old), sweeps) == []
    odd = tuple(replace(run, config=run.config.replace(train={"of_old": 1})) for run in now.runs)
    assert origin.differing(replace(now, runs=odd), sweeps) == ["settings that are no longer known"]


def test_committed_results_are_told_apart_from_recipes_that_were_corrected_since() -> None:
    (remark,) = [origin.remark(results) for results in read_all(RESULTS) if results.name == "smoke/figure5"]
    if remark:  # until it is run again
        assert "NOT of the recipe that smoke/figure5.toml holds now" in remark
        assert "train.awp.start" in remark
