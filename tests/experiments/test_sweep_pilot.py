"""The pilot: what is timed, how it is scaled, and that the cost is told before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.sweep import pilot as module
from experiments.sweep.cost import estimate
from experiments.sweep.grid import load
from experiments.sweep.keys import RunConfig
from experiments.sweep.pilot import pilot
from experiments.sweep.run import Sets
from hessdiag.data import load as load_data

SWEEPS = Path(__file__).parents[2] / "experiments" / "sweeps"
SMALL = {"network_options": {"width": 4}, "epochs": 3}


def small(name: str, **train: object) -> RunConfig:
    return load(SWEEPS / "smoke" / f"{name}.toml").runs[0].replace(train={**SMALL, **train}, measure={"samples": 16})


def test_each_part_is_scaled_to_what_was_asked(monkeypatch):
    """Epochs times images times the time of one, gradients times the time of one, norms times splits and losses."""
    config = small("figure3", epochs=30)
    settings = module.TrainConfig.from_dict(config.train)
    digits, test = load_data("digits", split="train"), load_data("digits", split="test")
    device, asked = torch.device("cpu"), []

    def train(short, *, sets, device):
        asked.append((short, [len(part) for part in sets]))
        last = {"images_per_second": 100.0, "seconds": 256 / 100 + 0.5}
        return type("Result", (), {"history": [{}, last], "model": torch.nn.Identity()})

    monkeypatch.setattr(module, "train", train)
    seconds, _ = module._training(replace(settings, held_out=97), digits, test, device)
    assert seconds == pytest.approx(30 * (len(digits) - 97) / 100 + 30 / settings.watch.every * 0.5)
    short, sizes = asked[0]
    assert (short.epochs, short.lr, short.held_out, sizes[0]) == (2, 0.0, 0, 2 * settings.batch_size)

    class Ticks:
        def __init__(self) -> None:
            self.now = 0.0

        def monotonic(self) -> float:
            self.now += 1.0
            return self.now

    monkeypatch.setattr(module, "time", Ticks())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    each = 1.0 / min(300, config.attack["batch_size"])
    assert module._attacks(config, model, test, device) == pytest.approx(300 * (100 + 0.5 * 900) * each)
    assert module._attacks(small("figure7"), model, test, device) == pytest.approx(300 * 100 * each)
    none = config.replace(attack={"aa2_samples": 0, "aa_samples": 0})
    assert module._attacks(none, model, test, device) == 0.0

    def measured(config, model, device, clock, sets):
        clock.laps["norm"] = 3.0

    monkeypatch.setattr(module, "measured", measured)
    assert (
        module._norms(config.replace(measure={"samples": 256}), model, Sets(settings), 1000, device) == 2 * 4 * 3.0 * 4
    )
    assert module._norms(config.replace(measure={"splits": []}), model, Sets(settings), 1000, device) == 0.0


@pytest.mark.parametrize("name", ["figure3", "figure5", "table2"])
def test_a_pilot_times_and_leaves_threads_and_generators_alone(name):
    config = small(name)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    found = pilot(config, threads=1)
    assert 0.0 < found < 600.0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_family_is_timed_once_even_where_that_fails():
    runs, asked = load(SWEEPS / "smoke" / "figure3.toml").runs, []

    def fails(config):
        asked.append(config)

    cost = estimate(runs, [], [], pilot=fails)
    assert (len(asked), cost.unknown, cost.seconds) == (1, len(runs), 0.0)


def test_the_cost_is_told_before_the_start_and_no_pilot_leaves_it_out(tmp_path, capsys):
    text = (SWEEPS / "smoke" / "table2.toml").read_text(encoding="utf-8").replace("epochs = 20", "epochs = 2")
    path = tmp_path / "table2.toml"
    path.write_text('tier = "smoke"\n' + text, encoding="utf-8")
    line = ["sweep", str(path), "--store", str(tmp_path / "s"), "--results", str(tmp_path / "r"), "--dry-run"]
    assert main(line) == 0
    told = capsys.readouterr().err
    assert "timing a few steps first" in told
    assert "each (a pilot)" in told
    assert main([*line, "--no-pilot"]) == 0
    assert "no timing of such runs yet" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
