"""The campaign's sweeps: one setting, the levels and seeds that are promised, runs shared and not repeated; and each
goes from training to its record at a tiny size.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.card import shrunk
from experiments.correlation.rows import rows
from experiments.figures.curves import DRAWINGS
from experiments.figures.extras import control, has_angles, norms
from experiments.parts import step_size
from experiments.sweep import export
from experiments.sweep.grid import Sweep, load
from experiments.sweep.run import run_one
from hessdiag.activations import max_curvature

NAMES = ("pilot", "main", "trades", "control", "standard", "cifar100")
LEVELS = [0.5, 1, 2, 4, 7, 10, 20, 50]


@functools.cache
def campaign(name: str, stage: int | None = None) -> Sweep:
    return load(f"campaign/{name}", stage=stage)


def levels(sweep: Sweep, method: str) -> set[tuple[float, int]]:
    """Pairs of max|σ''| and seed."""
    chosen = [run.train for run in sweep.runs if run.train["method"] == method]
    return {(round(max_curvature(train["activation"]), 6), train["seed"]) for train in chosen}


def test_every_sweep_has_the_same_setting() -> None:
    """All but method, data, activation, seed, control and what TRADES needs."""
    own = {"method", "options", "attack", "data", "activation", "seed", "control"}
    settings = set()
    for name in NAMES:
        for run in campaign(name).runs:
            train = {key: value for key, value in run.train.items() if key not in own}
            settings.add(json.dumps([train, run.attack, run.measure], sort_keys=True))
    assert len(settings) == 1
    (text,) = settings
    train, attack, measure = json.loads(text)
    assert train["network_options"] == {"width": 16, "stem_stride": 2}
    assert (train["epochs"], train["batch_size"], train["lr"]) == (12, 128, 0.1)
    assert (train["autocast"], train["channels_last"]) == ("none", True)
    assert train["train_samples"] is None
    assert (attack["aa2_samples"], attack["samples_seed"], attack["eps"]) == (1000, 0, "8/255")
    assert (measure["splits"], measure["losses"]) == (["train"], ["clean", "adversarial"])
    assert (measure["samples"], measure["rtol"], measure["samples_seed"]) == (256, 0.05, 0)


def test_levels_and_seeds_are_those_promised() -> None:
    first = {(level, seed) for level in LEVELS for seed in range(3)}
    assert levels(campaign("main", 1), "pgd_at") == first
    assert levels(campaign("main", 2), "pgd_at") == {(level, seed) for level in LEVELS for seed in range(4)}
    twelve = [*LEVELS, 3, 5.5, 8.5, 14]
    assert levels(campaign("main"), "pgd_at") == {(level, seed) for level in twelve for seed in range(8)}
    assert levels(campaign("trades"), "trades") == {(x, seed) for x in (1, 2, 4, 7, 15, 50) for seed in range(3)}
    assert levels(campaign("cifar100"), "pgd_at") == {(x, seed) for x in (1, 2, 4, 7, 15, 50) for seed in range(2)}
    assert [len(campaign("standard", stage).runs) for stage in (1, 2)] == [48, 72]
    assert levels(campaign("standard", 1), "standard") == {(level, seed) for level in LEVELS for seed in range(2)}


def test_any_prefix_of_a_stage_is_paired_over_curvature() -> None:
    for name in NAMES:
        stage = campaign(name, 1)
        seeds = [run.train["seed"] for run in stage.runs]
        assert seeds == sorted(seeds)
        per_seed = {seed: [r.train["activation"] for r in stage.runs if r.train["seed"] == seed] for seed in seeds}
        assert len({tuple(names) for names in per_seed.values()}) == 1


def test_runs_that_sweeps_share_are_one_run_and_the_pilots_seeds_are_its_own() -> None:
    keys = {name: {run.key for run in campaign(name).runs} for name in NAMES}
    main = {run.key for run in campaign("main", 1).runs}
    assert len(main & keys["trades"]) == 24
    assert len({run.key for run in campaign("control", 1).runs} & main) == 3
    pilot = campaign("pilot")
    assert pilot.figure == "none"
    counted = {run.train["seed"] for name in NAMES if name != "pilot" for run in campaign(name).runs}
    assert not counted & {run.train["seed"] for run in pilot.runs}
    assert {level for level, _ in levels(pilot, "pgd_at")} == {4}


def test_trades_can_reach_the_edge_of_the_ball() -> None:
    attacks = [run.train["attack"] for run in campaign("trades").runs if run.train["method"] == "trades"]
    assert len(attacks) == 18
    for attack in attacks:
        assert attack["steps"] == 2
        assert attack["steps"] * step_size(attack["step"], 8 / 255) >= 8 / 255


def test_the_control_has_every_arm_for_every_seed() -> None:
    for stage, seeds in ((1, 3), (2, 6)):
        sweep = campaign("control", stage)
        arms: dict[str, set[int]] = {}
        for run in sweep.runs:
            arms.setdefault(sweep.variants[run.key], set()).add(run.train["seed"])
            factors = run.train["control"]
            assert factors["as_alpha"] in (None, 12)
            wanted = 6 if sweep.variants[run.key] == "high curvature" else 2
            assert max_curvature(run.train["activation"]) == pytest.approx(wanted)
        assert len(arms) == 6
        assert all(found == set(range(seeds)) for found in arms.values())


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 random images in the place of either set of CIFAR."""
    rng = np.random.default_rng(0)
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        for split in ("train", "test"):
            images = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
            np.savez(tmp_path / f"{name}-{split}.npz", images=images, labels=rng.integers(0, classes, 64))
    monkeypatch.setenv("HESSDIAG_DATA", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "card", "card_standard"])
def test_a_run_of_each_sweep_goes_through_and_is_drawn(tmp_path: Path, data: None, name: str) -> None:
    sweep = campaign(name)
    first = next(run for run in sweep.runs if name != "trades" or run.train["method"] == "trades")
    config = shrunk(first)
    record = run_one(config, tmp_path / "run")
    assert record["train"]["epochs"] == 1
    assert len(record["train"]["history"]["loss"]) == 1
    assert record["clean_accuracy"]["samples"] == 64
    assert record["aa2"]["samples"] == 4
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["aa2"]["outcomes"]), np.uint8), count=4)
    assert bits.mean() == record["aa2"]["value"]
    assert (record["pgd"] is None) == (not first.attack["pgd_samples"])
    assert set(record["norms"]) == {"train/clean", "train/adversarial"}
    for loss, norm in record["norms"].items():
        assert norm["rms"] > 0, loss
        assert -1 <= norm["cosine"]["low"] <= norm["cosine"]["high"] <= 1
        assert norm["plugin"]["biased"]
        assert norm["invariant"]["high"] > 0  # so few replicates may leave an upper bound alone
        assert norm["share_gauss_newton"]["value"] > 0
    assert len(record["effective_curvature"]) >= 8
    assert all(layer["mean"] > 0 for layer in record["effective_curvature"])
    assert {"train", "norm train/clean", "plugin train/adversarial"} <= set(record["seconds"])
    assert config.schema.startswith("1.")

    done = (export.Result(config.key, config, sweep.variants[first.key], 1.0, record),)
    saved = export.save(export.SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 0, done), tmp_path)
    assert saved == tmp_path / "campaign" / f"{name}.json"
    (found,) = export.read_all(tmp_path)
    chosen = rows(found)
    assert has_angles(chosen)
    if sweep.figure in DRAWINGS:
        DRAWINGS[sweep.figure](found, chosen, tmp_path / "figure")
        norms(found, chosen, tmp_path / "norms")
        assert (tmp_path / "norms.png").exists()
    elif sweep.figure == "control":
        control(found, chosen, tmp_path / "figure")
    assert (tmp_path / "figure.png").exists() == (sweep.figure != "none")
