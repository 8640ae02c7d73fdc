"""What runs record along their epochs: it changes nothing else, survives interruption, and reaches figure and verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments.__main__ import main
from experiments.config import TrainConfig
from experiments.correlation import courses, forecast
from experiments.correlation.judges import NotRun
from experiments.correlation.rows import Row, planned, rows
from experiments.correlation.verdicts import INCONCLUSIVE, NOT_TESTED, load_rules, shared_rules, verdicts
from experiments.figures import epochs
from experiments.figures.build import build
from experiments.sweep import export, grid, run
from experiments.sweep import pilot as pilots
from experiments.sweep.along import Along
from experiments.sweep.export import Result, SweepResults
from experiments.sweep.keys import RunConfig
from experiments.sweep.pilot import pilot
from experiments.sweep.records import outcomes, proportion
from experiments.sweep.run import Sets, run_one
from experiments.sweep.settings import complete
from experiments.train import TrainResult, train
from hessdiag.errors import ConfigurationError, StoreError

RULES = shared_rules(load_rules())
RESULTS = Path(__file__).parents[2] / "results"
ARMS = list(courses.ARMS)


def small(config: RunConfig) -> RunConfig:
    """A run of the smoke sweep that takes a second."""
    looks = {"epochs": [1, 4, 8], "images": 40, "samples": 8, "batch_size": 8, "batches": 3, "replicates": 3}
    fast = {"method": "exact", "min_replicates": 4, "max_replicates": 4, "pgd_steps": 3}
    return config.replace(train={"epochs": 8, "train_samples": 80}, attack={"aa2_samples": 4}, along=looks | fast)


def smoke(**along: Any) -> RunConfig:
    """Its arm whose rate drops."""
    return small(grid.load("smoke/overfitting").runs[1]).replace(along=along)


def along_of(config: RunConfig, folder: Path) -> tuple[TrainConfig, Along, Sets]:
    settings = TrainConfig.from_dict(config.train)
    sets = Sets(settings)
    return settings, Along(config, folder, sets.pair, torch.device("cpu")), sets


def kept(result: TrainResult) -> list[Any]:
    """Weights to the bit, and all of the history but what a clock says."""
    weights = [value.numpy().tobytes() for value in result.model.state_dict().values()]
    clocks = ("seconds", "images_per_second")
    return [*weights, *({k: v for k, v in row.items() if k not in clocks} for row in result.history)]


def test_runs_that_record_nothing_on_the_way_keep_the_key_they_had() -> None:
    """Keys in files that were exported before there was such a record, made anew by today's code."""
    checked = 0
    for path in sorted(RESULTS.glob("*/*.json")):
        for line in json.loads(path.read_text()).get("runs", []):
            if "along" not in line["config"]:
                config = RunConfig.from_dict(line["config"])
                assert config.along == {}
                assert config.key == line["key"]
                checked += 1
    assert checked > 100
    plain = grid.load("campaign/pilot").runs[0]
    stored = {line["key"] for line in json.loads((RESULTS / "campaign" / "pilot.json").read_text())["runs"]}
    assert plain.key in stored
    assert "along" not in plain.to_dict()
    assert complete(RunConfig(plain.train, plain.attack, plain.measure, along={"images": 7})).key == plain.key


def test_what_is_recorded_is_part_of_the_key_and_of_the_family() -> None:
    config = smoke()
    again = RunConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (again.key, again.along) == (config.key, config.to_dict()["along"])
    other = config.replace(along={"epochs": [1, 4]})
    assert other.key != config.key
    assert other.family != config.family


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epochs": [3, 2]}, "must be increasing"),
        ({"epochs": [0, 2]}, "from 1 on"),
        ({"epochs": [5, 500]}, "training ends after 8, before 500"),
        ({"batches": 2}, "at least 3 batches"),
        ({"images": 0}, "at least 1"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"epochz": [1]}, "along.epochz"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_training(wrong: dict[str, Any], told: str) -> None:
    config = smoke(**wrong)
    with pytest.raises(ConfigurationError, match=told):
        complete(config)


def test_looking_changes_nothing_of_the_training(tmp_path: Path) -> None:
    settings, along, sets = along_of(smoke(), tmp_path / "along")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    looked = train(settings, sets=sets.pair, look=along)
    assert torch.equal(torch.get_rng_state(), before)
    assert kept(looked) == kept(train(settings, sets=sets.pair))
    assert [entry["epoch"] for entry in along.entries(8)] == [1, 4, 8]
    assert [entry["lr"] for entry in along.entries(8)] == pytest.approx([0.1, 0.01, 0.001])


def test_a_look_says_what_a_plain_loop_says(tmp_path: Path) -> None:
    """Clean accuracy on fixed images, and the norm of the clean loss, from the network alone."""
    config = smoke().replace(train={"network_options": {"widths": [4]}})
    settings, along, sets = along_of(config, tmp_path)
    model = train(settings, sets=sets.pair).model
    look = along.look(model, 0.02)
    for split, data in zip(("train", "test"), sets.pair, strict=True):
        chosen = data.sample(40, seed=0)
        hits = model(chosen.inputs.float()).argmax(1).eq(chosen.targets)
        told = look["accuracy"][split]
        assert told["clean"] == proportion(int(hits.sum()), 40)
        assert told["robust"]["value"] <= told["clean"]["value"]
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(told["robust"]["outcomes"]), np.uint8), count=40)
        assert bits.mean() == told["robust"]["value"]
    measured = along.measured
    assert len(measured) == 8
    squares = 0.0
    loss = F.cross_entropy(model(measured.inputs.float()), measured.targets)
    for gradient, parameter in zip(
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True), model.parameters(), strict=True
    ):
        for place, entry in enumerate(gradient.flatten()):
            (row,) = torch.autograd.grad(entry, parameter, retain_graph=True)
            squares += float(row.flatten()[place].double()) ** 2
    count = sum(parameter.numel() for parameter in model.parameters())
    assert look["norms"]["clean"]["rms"] == pytest.approx(math.sqrt(squares / count), rel=1e-4)
    noise = look["noise"]
    assert noise["half_trace"]["value"] == pytest.approx(0.5 * 0.02**2 * noise["curved"]["value"])
    assert noise["at_rest"]["value"] == pytest.approx(0.02 * noise["trace"]["value"] / (4 * (1 - 0.9)))
    shared = {tuple(row.flatten().tolist()) for row in along.measured.inputs}
    assert not shared & {tuple(row.flatten().tolist()) for row in along.others.inputs}


def test_an_interrupted_run_keeps_what_it_saw_and_sees_what_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = smoke()
    whole = run_one(config, tmp_path / "whole")["along"]
    seen: list[int] = []
    look = Along.look

    def counted(self: Along, model: nn.Module, lr: float) -> Any:
        if len(seen) == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        seen.append(1)
        return look(self, model, lr)

    monkeypatch.setattr(Along, "look", counted)
    monkeypatch.setattr(run, "train", lambda *args, **options: train(*args, **options, save_seconds=0.0))
    with pytest.raises(KeyboardInterrupt):
        run_one(config, tmp_path / "run")
    again = run_one(config, tmp_path / "run")["along"]
    assert len(seen) == 3  # the first epoch's look is not done twice

    def plain(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]

    assert plain(again) == plain(whole)


def test_a_look_at_other_weights_or_a_damaged_one_is_done_again(tmp_path: Path) -> None:
    settings, along, sets = along_of(smoke(), tmp_path)
    model = train(settings, sets=sets.pair).model
    along(1, 0.1, model)
    path = tmp_path / "1.json"
    first = path.read_bytes()
    along(1, 0.1, model)
    assert path.read_bytes() == first
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    along(1, 0.1, model)
    second = path.read_bytes()
    assert json.loads(second)["weights"] != json.loads(first)["weights"]
    path.write_bytes(second.replace(b'"lr": 0.1', b'"lr": 0.2'))
    with pytest.raises(StoreError, match="gone or damaged"):
        along.entries(1)
    along(1, 0.1, model)
    (entry,) = along.entries(1)
    assert entry["lr"] == 0.1
    along(2, 0.1, model)
    assert not (tmp_path / "2.json").exists()  # none of the chosen epochs


def test_from_the_smoke_sweep_to_record_export_figure_and_verdict(tmp_path: Path) -> None:
    sweep = grid.load("smoke/overfitting")
    assert [sweep.variants[member.key] for member in sweep.runs] == ARMS
    done = []
    for member in sweep.runs:
        config = small(member)
        record = run_one(config, tmp_path / config.key)
        assert [entry["epoch"] for entry in record["along"]] == [1, 4, 8]
        assert record["norms"] == {}
        done.append(Result(config.key, config, sweep.variants[member.key], 1.0, record))
    results = SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 0, tuple(done))
    export.save(results, tmp_path / "results")
    (found,) = export.read_all(tmp_path / "results")
    assert [courses.arm(row) for row in rows(found)] == ARMS
    built = build(tmp_path / "results", tmp_path / "figures", resamples=100)
    (picture,) = (one for one in built.pictures if one.figure == "overfitting")
    assert picture.path == tmp_path / "figures" / "overfitting_smoke"
    for ending in (".png", ".svg"):
        assert picture.path.with_suffix(ending).stat().st_size > 1000
    text = picture.path.with_suffix(".svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in text for name in ARMS)
    mine = {name: v for name, v in built.verdicts.items() if v.figure == "overfitting"}
    assert len(mine) == 6
    assert all(cell.status == "exploratory" for verdict in mine.values() for cell in verdict.cells)
    assert mine["H.awp-against-overfitting"].verdict == INCONCLUSIVE
    assert "single seed" in mine["H.awp-against-overfitting"].evidence


@pytest.mark.slow
def test_the_whole_smoke_sweep_by_its_commands(tmp_path: Path) -> None:
    places = ["--store", str(tmp_path / "store"), "--results", str(tmp_path / "results")]
    command = ["sweep", "smoke/overfitting", *places, "--workers", "1", "--no-pilot", "--export"]
    assert main(command) == 0
    assert main(["figures", "--results", str(tmp_path / "results"), "--resamples", "100"]) == 0
    assert (tmp_path / "results" / "figures" / "overfitting_smoke.svg").exists()
    (found,) = export.read_all(tmp_path / "results")
    for member in found.runs:
        assert [entry["epoch"] for entry in member.record["along"]] == [10, 30, 40, 50, 60]
        assert all(entry["noise"]["trace"]["value"] > 0 for entry in member.record["along"])


def test_the_pilot_counts_the_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside parts whose times are given: of two that are timed either may take longer on a busy machine."""
    monkeypatch.setattr("experiments.sweep.pilot._attacks", lambda *_: 2.0)
    monkeypatch.setattr("experiments.sweep.pilot._norms", lambda *_: 3.0)
    honest = pilots._training
    monkeypatch.setattr("experiments.sweep.pilot._training", lambda *given: (1.0, honest(*given)[1]))
    config = smoke()
    without = RunConfig(config.train, config.attack, config.measure, config.schema)
    assert pilot(without) == 6.0
    assert pilot(config) > 6.0


def test_the_campaigns_arms_share_all_but_rate_and_awp_and_are_looked_at_around_each_drop() -> None:
    for tier, count in (("campaign", 12), ("paper", 12), ("quick", 4), ("smoke", 4)):
        sweep = grid.load(f"{tier}/overfitting")
        assert len(sweep.runs) == count
        shared = set()
        for member in sweep.runs:
            train = {k: v for k, v in member.train.items() if k not in ("schedule", "awp", "seed")}
            shared.add(json.dumps([train, member.attack, member.measure, member.along], sort_keys=True))
        assert len(shared) == 1
        for seed in {member.train["seed"] for member in sweep.runs}:
            assert [sweep.variants[m.key] for m in sweep.runs if m.train["seed"] == seed] == ARMS
        looks, epochs = sweep.runs[0].along["epochs"], sweep.runs[0].train["epochs"]
        drops = [math.ceil(share * epochs) for share in (0.5, 0.75)]
        assert looks[-1] == epochs
        if tier != "smoke":
            assert {place for drop in drops for place in (drop - 1, drop)} <= set(looks)
        assert sweep.runs[1].train["schedule"]["milestones"] == [0.5, 0.75]
    assert len(grid.load("campaign/overfitting", stage=1).runs) == 4


def test_nothing_is_forecast_for_it_nor_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Its arms are no levels of a curve: their scatter says nothing of a sweep over curvature."""
    assert main(["power", "campaign/overfitting"]) == 2
    assert "compare epochs of a run" in capsys.readouterr().err
    stored = [sweep for sweep in export.read_all(RESULTS) if sweep.figure == "overfitting"]
    runs = planned(grid.load("campaign/main", stage=1))
    assert stored
    assert forecast.nearest_scatter(runs, "figure3", "aa2", stored) is None


# Rules, on courses made by hand.


def look_of(epoch: int, lr: float, hits: list[int], curved: float, norm: float, error: float = 0.5) -> dict[str, Any]:
    bits = torch.tensor(hits, dtype=torch.bool)
    told = proportion(sum(hits), len(hits))
    accuracy = {"clean": told, "robust": told | {"outcomes": outcomes(bits)}}
    spread = {"value": curved, "error": error, "low": curved - 2 * error, "high": curved + 2 * error}
    names = ("trace", "curved", "half_trace", "at_rest")
    measured = {"rms": norm, "low": 0.9 * norm, "high": norm / 0.9, "replicates": 31}
    return {
        "epoch": epoch,
        "lr": lr,
        "accuracy": {"train": accuracy, "test": accuracy},
        "norms": {"clean": measured, "adversarial": measured},
        "gauss_newton_trace": spread,
        "noise": {**dict.fromkeys(names, spread), "batches": 13, "batch_size": 20},
    }


def course(arm: int, looks: list[dict[str, Any]], seed: int = 0) -> Row:
    config = grid.load("smoke/overfitting", seeds=[seed]).runs[arm]
    result = Result(config.key, config, ARMS[arm], 1.0, {"along": looks, "max_curvature": 4.0})
    return rows(SweepResults("smoke/overfitting", "overfitting", "smoke", "", 0, (result,)))[0]


FALL = {"quantity": "robust test", "arm": "drop", "sign": -1}


def test_the_footer_tells_the_bars_of_arms_with_one_seed_and_with_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [look_of(10, 0.1, [1, 0], 1.0, 1.0), look_of(60, 0.01, [1, 0], 1.0, 1.0)]
    chosen = [course(0, looks), course(1, looks), course(1, looks, seed=1)]
    told: list[str] = []
    monkeypatch.setattr(epochs, "label", lambda axis, text: told.append(text))
    for some in (chosen, chosen[:2], chosen[1:]):
        runs = tuple(row.result for row in some)
        epochs.overfitting(SweepResults("smoke/overfitting", "overfitting", "smoke", "", 0, runs), some, tmp_path / "x")
    spread, interval = "; bars: one standard deviation of a seed", "95% intervals as recorded; dotted"
    assert f"{spread}; where an arm has a single seed, {interval}" in told[0]
    assert f"; bars: {interval}" in told[1]
    assert f"{spread}; dotted" in told[2]


def test_a_change_of_accuracy_is_taken_image_by_image() -> None:
    """40 images: 10 are lost, 2 are won, the others stay: mean -0.2, with the scatter of these differences."""
    before, after = [1] * 30 + [0] * 10, [1] * 20 + [0] * 10 + [1] * 2 + [0] * 8
    row = course(
        1, [look_of(10, 0.1, before, 1.0, 1.0), look_of(30, 0.01, before, 1, 1), look_of(60, 0.01, after, 1, 1)]
    )
    assert courses.compared([row]) == (30, 60)
    found = courses.change([row], FALL, RULES)
    each = np.array([-1.0] * 10 + [1.0] * 2 + [0.0] * 28)
    assert found.value == pytest.approx(-0.2)
    contrast = courses.difference(*[[courses.seen(look, "robust test")] for look in row.record["along"][1:]])
    assert contrast.error == pytest.approx(each.std(ddof=1) / math.sqrt(40))
    assert contrast.freedom == 39
    assert found.p_for == pytest.approx(contrast.below())
    assert found.p_for < 0.05 < found.p_against
    assert "one seed" in found.text


def test_two_arms_of_one_seed_are_told_and_not_judged_those_of_three_are() -> None:
    kept_, lost = [1] * 30 + [0] * 10, [1] * 20 + [0] * 20
    rule = {"quantity": "robust test", "arm": "drop, AWP", "beyond": "drop", "sign": 1}
    chosen: list[Row] = []
    for seed in range(3):
        ends = [1] * (20 + seed) + [0] * (20 - seed)
        chosen.append(
            course(
                1, [look_of(30, 0.1, kept_, 1, 1), look_of(40, 0.01, kept_, 1, 1), look_of(60, 0.01, ends, 1, 1)], seed
            )
        )
        chosen.append(
            course(
                3, [look_of(30, 0.1, lost, 1, 1), look_of(40, 0.01, lost, 1, 1), look_of(60, 0.01, lost, 1, 1)], seed
            )
        )
    one = courses.change(chosen[:2], rule, RULES)
    assert (one.p_for, one.p_against, one.p_equal) == (1.0, 1.0, 1.0)
    assert one.value == pytest.approx(0.25)
    found = courses.change(chosen, rule, RULES)  # 10, 9 and 8 images of 40
    assert found.value == pytest.approx(9 / 40)
    assert found.high - found.low == pytest.approx(2 * 4.302653 * (1 / 40) / math.sqrt(3), rel=1e-5)
    assert found.p_for < 0.01


def test_a_trace_changes_by_more_than_both_estimates_scatter_or_is_not_said_to() -> None:
    hits = [1, 0, 1, 0]
    rule = {"quantity": "tr(HC)", "arm": "drop", "sign": 1}
    for rise, sure in ((0.5, False), (5.0, True)):
        row = course(
            1, [look_of(30, 0.1, hits, 9, 1), look_of(40, 0.01, hits, 2, 1), look_of(60, 0.001, hits, 2 + rise, 1)]
        )
        found = courses.change([row], rule, RULES)
        assert found.value == pytest.approx(rise)
        assert found.high - found.value == pytest.approx(2.178813 * math.sqrt(0.5), rel=1e-5)  # t of 12 d.f.
        assert (found.p_for < 0.025) == sure
    same = course(
        1, [look_of(30, 0.1, hits, 9, 1), look_of(40, 0.01, hits, 2, 1, 0.01), look_of(60, 0.01, hits, 2, 1, 0.01)]
    )
    assert courses.change([same], rule, RULES).p_equal < 1e-6  # within a tenth of 2
    grown = course(1, [look_of(30, 0.1, hits, 9, 1), look_of(40, 0.01, hits, 2, 1), look_of(60, 0.01, hits, 2, 2.0)])
    log = courses.change([grown], {**rule, "quantity": "log norm adversarial"}, RULES)
    assert log.value == pytest.approx(math.log(2))
    assert log.p_for < 1e-3


def test_what_was_not_run_is_not_tested_and_what_was_looked_at_elsewhere_is_refused() -> None:
    hits = [1, 0]
    constant = course(0, [look_of(30, 0.1, hits, 1, 1), look_of(60, 0.1, hits, 1, 1)])
    with pytest.raises(NotRun, match="dropped"):
        courses.change([constant], FALL, RULES)
    early = course(1, [look_of(30, 0.1, hits, 1, 1), look_of(40, 0.01, hits, 1, 1), look_of(60, 0.01, hits, 1, 1)])
    late = course(3, [look_of(30, 0.1, hits, 1, 1), look_of(50, 0.01, hits, 1, 1), look_of(60, 0.01, hits, 1, 1)])
    with pytest.raises(ConfigurationError, match="different epochs"):
        courses.compared([early, late])
    with pytest.raises(NotRun, match="no run of the arm 'drop, AWP'"):
        courses.at_end([early], {"quantity": "tr(C)", "arm": "drop, AWP", "beyond": "drop", "sign": -1}, RULES)
    stopped = course(1, [look_of(30, 0.1, hits, 1, 1), look_of(40, 0.01, hits, 1, 1)], seed=1)
    assert courses.compared([early, stopped]) == (40, 60)
    with pytest.raises(ConfigurationError, match=r"drop, seed 1: epoch 60 is not recorded"):
        courses.change([early, stopped], FALL, RULES)
    with pytest.raises(ConfigurationError, match="no run records 'tr'"):
        courses.seen(early.record["along"][0], "tr")
    bare = SweepResults("smoke/overfitting", "overfitting", "smoke", "", 0, (course(1, []).result,))
    assert {v.verdict for v in verdicts([bare]).values()} == {NOT_TESTED}
