"""The spread over samples: its arithmetic on drawn diagonals, its diagonals on networks, and what it promises of more data."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load
from hessdiag.errors import ConfigurationError, EmptyDataError
from hessdiag.measuring.spread import WIDTH, Spread, _shards, _sketch, of_groups, spread


def _network(widths: tuple[int, ...] = (6, 5)) -> nn.Module:
    model = hd.networks.build("mlp", in_features=64, widths=widths, activation="silu", seed=0)
    for p in model.parameters():
        p.data.mul_(2.0)  # a network that is sure of itself: samples then differ much
    return model.eval()


def test_moments_are_unbiased_with_and_without_noise() -> None:
    """Groups drawn around a known d with known covariance: square, bias and variance on average what they should be."""
    rng = np.random.default_rng(0)
    groups, entries, draws = 16, 12, 4000
    d = rng.normal(size=entries)
    scale = rng.uniform(0.3, 1.0, size=entries)
    for noise in (0.0, 0.8):
        found = []
        for _ in range(draws):
            rows = d + scale * rng.normal(size=(groups, entries))
            if noise:
                first, second = (rows + noise * rng.normal(size=rows.shape) for _ in range(2))
            else:
                first = second = rows
            m = of_groups(first, second, np.ones(groups))
            found.append((m.square, m.bias, m.variance))
        square, bias, variance = np.array(found).T
        error = square.std() / math.sqrt(draws)
        assert abs(square.mean() - d @ d) < 4 * error
        assert abs(bias.mean() - (scale**2).sum() / groups) < 4 * bias.std() / math.sqrt(draws)
        # The variance of T by the groups alone, noise or not: 4 d'Sd / G + 2 tr(S^2) / (G (G - 1)).
        linear = 4 * (d**2 @ scale**2) / groups
        pairs = 2 * (scale**4).sum() / (groups * (groups - 1))
        slack = 4 * variance.std() / math.sqrt(draws)
        # Where there are signs the pairs are counted twice at most (Efron & Stein), never too little.
        most = linear + (3 if noise else 1) * pairs
        assert linear + pairs - slack < variance.mean() < most + slack


def test_exact_groups_are_the_diagonals_of_their_samples() -> None:
    model = _network().double()
    objective, data = hd.Objective(model), load("digits", samples=40)
    m = hd.measure(objective, data.batches(16, dtype=torch.float64))
    found = spread(m, objective, data.batches(16, dtype=torch.float64), groups=8)
    assert (found.groups, found.group_size, found.samples) == (8, 5, 40)
    # All samples are in some group: the norm less what few samples make it too large by is T itself, to rounding.
    rows = []
    for shard in _shards(objective, data.batches(16, dtype=torch.float64), 40, 8, 5, 16):
        parts = hd.diagonal(objective, list(shard)).total
        rows.append(torch.cat([t.reshape(-1) for t in parts.values()]).double().numpy())
    gram = np.stack(rows) @ np.stack(rows).T
    t = (gram.sum() - np.trace(gram)) / (8 * 7)
    assert found.square == pytest.approx(t, rel=1e-10)
    assert found.square + found.bias == pytest.approx(m.norm.total.square, rel=1e-10)
    whole = found.expected(40)
    assert whole[0] == pytest.approx(m.rms, rel=1e-10)
    assert whole[1] == pytest.approx(whole[2], rel=1e-10)  # nothing is left to draw


def test_one_by_one_equals_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _network().double()
    objective, batches = hd.Objective(model), load("digits", samples=40).batches(16, dtype=torch.float64)
    m = hd.measure(objective, batches)
    a = spread(m, objective, batches)
    monkeypatch.setattr("hessdiag.measuring.spread.PER_SAMPLE_BYTES", 0.0)
    b = spread(m, objective, batches)
    assert a.passes == b.passes == 16
    assert a.square == pytest.approx(b.square, rel=1e-10)
    assert a.square_error == pytest.approx(b.square_error, rel=1e-8)


@pytest.mark.slow
def test_signs_do_not_count_as_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by Hutchinson in the groups too: the spread agrees with the exact one, far below the noise of the signs."""
    model = _network()
    objective, batches = hd.Objective(model), load("digits", samples=200).batches(50)
    m = hd.measure(objective, batches, method="hutchinson", rtol=1e-6, max_replicates=256)
    exact = spread(m, objective, batches)
    assert exact.passes == 16
    monkeypatch.setattr("hessdiag.measuring.spread.AUTO_EXACT_FLOPS", 0.0)
    noisy = spread(m, objective, batches)
    assert noisy.passes == 32
    assert noisy.square_error == pytest.approx(exact.square_error, rel=0.5)
    assert noisy.bias == pytest.approx(exact.bias, rel=0.5)


def test_the_interval_for_the_whole_data_covers_it() -> None:
    model = _network().double()
    objective, whole = hd.Objective(model), load("digits")
    truth = hd.measure(objective, whole.batches(250, dtype=torch.float64)).rms
    kept, inside, points = 40, 0, []
    for seed in range(kept):
        batches = whole.sample(64, seed=seed).batches(64, dtype=torch.float64)
        m = hd.measure(objective, batches, audit_model=False, deterministic_check=False)
        rms, low, high = spread(m, objective, batches).expected(500)
        inside += low <= truth <= high
        points.append((m.rms, rms))
    assert inside >= 33  # of 40 at 95%: below it by chance once in five thousand
    plain, expected = (float(np.mean([p[k] ** 2 for p in points])) for k in (0, 1))
    error = float(np.std([p[1] ** 2 for p in points])) / math.sqrt(kept)
    assert abs(expected - truth**2) < 4 * error
    assert plain > expected  # the norm of few samples is too large


def test_moments_of_a_ratio_are_unbiased() -> None:
    """Groups of three samples of which few weigh much, from two kinds of sample: as class weights make them."""
    rng = np.random.default_rng(1)
    groups, each, entries, draws = 16, 3, 12, 1500
    kinds, weights = rng.normal(size=(2, entries)), np.array([0.05, 1.0])
    share = np.array([0.7, 0.3])
    d = (share * weights) @ kinds / (share @ weights)
    found = []
    for _ in range(draws):
        kind = (rng.random((groups, each)) < share[1]).astype(int)
        single = weights[kind][..., None] * (kinds[kind] + 0.5 * rng.normal(size=(groups, each, entries)))
        rows, v = single.mean(1), weights[kind].mean(1)
        m = of_groups(rows, rows, v)
        whole = rows.sum(0) / v.sum()
        assert m.square + m.bias == pytest.approx(whole @ whole, rel=1e-9)
        found.append((m.square, m.variance))
    square, variance = np.array(found).T
    assert abs(square.mean() - d @ d) < 4 * square.std() / math.sqrt(draws)
    assert abs((rows / v[:, None]).mean(0) @ d - d @ d) > 0.05 * d @ d  # what a mean of ratios is off by
    scatter = (square - square.mean()) ** 2
    assert abs(variance.mean() / scatter.mean() - 1) < 0.15


def _by_hand(objective: hd.Objective, groups: list[Any], size: int) -> tuple[float, float]:
    """|d|^2 of the ratio d of all groups, and of the products of different pseudo-values of the jackknife."""
    weights = np.array([sum(float(objective.loss.weights(y, y).sum()) for _, y in group) for group in groups]) / size
    rows = []
    for group, weight in zip(groups, weights):
        parts = hd.diagonal(objective, list(group), audit_model=False, deterministic_check=False).total
        rows.append(weight * torch.cat([t.reshape(-1) for t in parts.values()]).double().numpy())
    ratio = [np.delete(rows, i, 0).sum(0) / np.delete(weights, i).sum() for i in range(len(rows))]
    whole, count = np.sum(rows, 0) / weights.sum(), len(rows)
    pseudo = count * whole - (count - 1) * np.stack(ratio)
    gram = pseudo @ pseudo.T
    return float(whole @ whole), float(gram.sum() - np.trace(gram)) / (count * (count - 1))


def _told(found: Spread) -> list[float]:
    return [found.rms, found.low, found.high, found.bias]


def _tokens(lengths: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 16 sequences, padded to a length of each batch's own; a third of the targets do not count."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for length in lengths:
        x, y = torch.randint(7, (2, 16, length), generator=generator)
        out.append((x, torch.where(torch.rand(y.shape, generator=generator) < 0.3, -100, y)))
    return out


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (5, 6, 4, 5)], ids=["one length", "several"])
def test_sequences_count_by_their_tokens(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Class weights, ignored targets, weight decay, batches that cannot be joined: one by one as by group, and beside
    the jackknife written out; all groups together have the norm that was measured.
    """
    torch.manual_seed(0)
    layers = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7)
    model, batches = nn.Sequential(*layers).double(), _tokens(lengths)
    batches[1][1][:9] = -100  # whole sequences
    found = {}
    for scale in (1.0, 100.0):
        weights = scale * torch.linspace(0.2, 1.0, 7, dtype=torch.float64)
        objective = hd.Objective(model, class_axis=-1, class_weights=weights, l2=0.01)
        m = hd.measure(objective, batches, method="exact")
        found[scale] = spread(m, objective, batches, groups=11)
        assert found[scale].samples == 64
        assert found[scale].group_size == 5  # 55 of them count
        whole, square = _by_hand(objective, _shards(objective, batches, 55, 11, 5, 16), 5)
        assert m.norm.total.square == pytest.approx(whole, rel=1e-10)
        assert found[scale].square == pytest.approx(square, rel=1e-10)
        assert found[scale].low < found[scale].rms < found[scale].high
    assert _told(found[100.0]) == pytest.approx(_told(found[1.0]), rel=1e-9)
    monkeypatch.setattr("hessdiag.measuring.spread.PER_SAMPLE_BYTES", 0.0)
    by_group = spread(m, objective, batches, groups=11)
    assert by_group.passes == 11
    assert _told(by_group) == pytest.approx(_told(found[1.0]), rel=1e-9)


def test_what_a_batch_says_for_all_its_samples_stays_with_them() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return inputs["by"] * self.layer(torch.tanh(inputs["x"]) + inputs["shift"])

    torch.manual_seed(0)
    shift = torch.rand(6).double()
    batches = [
        ({"x": torch.rand(8, 6).double(), "by": torch.tensor(float(k)), "shift": shift}, torch.randint(3, (8,)))
        for k in (1, 1, 5, 5)
    ]
    objective = hd.Objective(Scaled().double())
    m = hd.measure(objective, batches)
    found = spread(m, objective, batches, groups=8)
    whole, square = _by_hand(objective, _shards(objective, batches, 32, 8, 4, 8), 4)
    assert m.norm.total.square == pytest.approx(whole, rel=1e-10)
    assert found.square == pytest.approx(square, rel=1e-10)


def test_a_sketch_keeps_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(WIDTH + 5, generator=generator), "v": torch.ones(1000)} for _ in range(2))
    x, y = _sketch(a), _sketch(b)
    assert len(x) == len(y) == WIDTH
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in side.values())) for side in (a, b)]
    truth = sum(float((a[name].double() * b[name].double()).sum()) for name in a)
    bound = 5 * math.sqrt(2 / WIDTH) * norms[0] * norms[1]
    assert abs(float(x @ y) - truth) < bound
    assert abs(float(x @ x) - norms[0] ** 2) < 5 * math.sqrt(2 / WIDTH) * norms[0] ** 2
    small = {"w": torch.arange(6.0).reshape(2, 3)}
    assert _sketch(small).tolist() == [0, 1, 2, 3, 4, 5]


def test_structured_batches_and_part_of_the_samples() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.layer(torch.tanh(inputs["a"] + inputs["b"]))

    torch.manual_seed(0)
    batches = [({"a": torch.rand(10, 4), "b": torch.rand(10, 4)}, torch.randint(0, 3, (10,))) for _ in range(9)]
    objective = hd.Objective(Pair().eval())
    m = hd.measure(objective, batches)
    all_, some = spread(m, objective, batches), spread(m, objective, batches, samples=48)
    assert (all_.group_size, some.group_size) == (5, 3)
    assert some.square_error == pytest.approx(all_.square_error, rel=0.7)  # scaled to all 90


def test_refusals() -> None:
    objective, batches = hd.Objective(_network()), load("digits", samples=20).batches(10)
    m = hd.measure(objective, batches)
    with pytest.raises(ConfigurationError, match="8 to 16"):
        spread(m, objective, batches, groups=3)
    with pytest.raises(ConfigurationError, match="these batches have 10"):
        spread(m, objective, list(batches)[:1])
    with pytest.raises(ConfigurationError, match="give its own"):
        spread(m, hd.Objective(_network((3,))), batches)
    few = load("digits", samples=7).batches(10)
    with pytest.raises(EmptyDataError, match="at least 8"):
        spread(hd.measure(objective, few), objective, few)
    with pytest.raises(ConfigurationError, match="more are needed"):
        spread(m, objective, batches).expected(19)


def _command(*args: str) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["measure", *args])


def test_the_command_tells_it() -> None:
    found = _command("digits-example", "--samples", "24")
    assert found.exit_code == 0, found.output
    for words in (
        "exact for these 24 samples",
        "other samples",
        "all 500 samples",
        "16 groups of 1 sample",
        "take about",
    ):
        assert words in found.stdout, words
    content = json.loads(_command("digits-example", "--samples", "24", "--json", "-").stdout)
    told = content["cli"]["spread"]
    assert told["low"] < told["rms"] < told["high"]
    assert told["whole"]["samples"] == 500
    assert told["bytes"] == 16 * 2626 * 8
    without = _command("digits-example", "--samples", "24", "--no-spread")
    assert "other samples would" in without.stdout
    assert "groups of" not in without.stdout


def test_a_failing_spread_keeps_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), KeyboardInterrupt(), EmptyDataError("gone")):

        def broken(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("hessdiag.cli.measuring.spread", broken)
        found = _command("digits-example", "--samples", "8")
        assert found.exit_code == 0, found.output
        assert "not told" in found.stdout
