"""The population target where samples weigh differently: its arithmetic, its bias and interval, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.errors import ConfigurationError, EmptyDataError
from hessdiag.measuring.population import add_pairs, deal
from hessdiag.norm import Replicates, estimate, trace
from hessdiag.norm.jackknife import ratio_pseudo_values

SKIP: dict[str, Any] = {"audit_model": False, "deterministic_check": False}
UNEQUAL = [0.05, 1.0, 1.0, 1.0]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def _data(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, (torch.rand(count, generator=generator) < 0.3).long()


def _singles(objective: hd.Objective, x: Tensor, y: Tensor) -> Tensor:
    """Undivided second derivatives of every sample's loss, a row each, l2 times its weight among them."""
    found = hd.diagonal(objective, [(x, y)], per_sample=True, **SKIP).total
    rows = torch.cat([t.flatten(1) for t in found.values()], 1)
    return rows + objective.l2 * (objective.loss.weights(y, y) - 1.0)[:, None]


def test_pseudo_values_are_those_of_the_jackknife() -> None:
    rng = np.random.default_rng(0)
    y, v = rng.normal(size=(7, 3)), rng.uniform(0.1, 2.0, 7)
    a, b = ratio_pseudo_values(v)
    whole = y.sum(0) / v.sum()
    for i in range(7):
        rest = np.delete(y, i, 0).sum(0) / np.delete(v, i).sum()
        assert a[i] * y[i] + b[i] * whole == pytest.approx(7 * whole - 6 * rest, rel=1e-12)
    a, b = ratio_pseudo_values(np.full(7, 3.0))
    assert a == pytest.approx(np.full(7, 1 / 3), rel=1e-15)
    assert b == pytest.approx(np.zeros(7), abs=1e-15)


@pytest.mark.parametrize("class_weights", [None, UNEQUAL], ids=["equal", "unequal"])
def test_norm_and_trace_are_those_of_the_ratio_of_means_and_their_intervals_hold(
    class_weights: list[float] | None,
) -> None:
    """300 data sets of 48 samples from a population of 4000, whose norm and trace are known."""
    objective = hd.Objective(_network(), class_weights=class_weights)
    x, y = _data(4000)
    rows, weights = _singles(objective, x, y), objective.loss.weights(y, y)
    truth = rows.sum(0) / weights.sum()
    wanted = float(truth @ truth), float(truth.sum())
    sets, samples, shards = 300, 48, 16
    generator = torch.Generator().manual_seed(2)
    squares, traces = [], []
    for _ in range(sets):
        chosen = torch.randint(len(rows), (samples,), generator=generator)
        of = nn.functional.one_hot(torch.arange(samples) % shards).T.double() / (samples // shards)
        stream = Replicates({"d": truth}, target="population")
        pairs = [{"d": row} for row in of @ rows[chosen]]
        add_pairs(stream, pairs, (of @ weights[chosen]).numpy(), l2=0.0)
        norm, sums = estimate(stream).total, trace(stream)
        covered = norm.low <= math.sqrt(wanted[0] / norm.entries) <= norm.high
        squares.append((norm.square, norm.square_error**2, covered))
        traces.append((sums.value, sums.error**2, sums.low <= wanted[1] <= sums.high))
    for found, value in zip((squares, traces), wanted):
        values, variances, inside = np.array(found, dtype=float).T
        assert abs(values.mean() - value) < 4 * values.std() / math.sqrt(sets)
        scatter = (values - values.mean()) ** 2
        slack = 4 * math.sqrt((scatter.var() + variances.var()) / sets)
        assert abs(variances.mean() - scatter.mean()) < slack
        assert slack < 0.75 * scatter.mean()
        assert inside.mean() > 0.88  # 0.93 or more in truth: below it by chance once in a thousand


def test_a_measurement_takes_the_pairs_of_its_shards() -> None:
    """Class weights, ignored targets and weight decay, beside the jackknife written out."""
    objective = hd.Objective(_network(), class_weights=UNEQUAL, l2=0.02)
    x, y = _data(70)
    y[torch.randperm(70, generator=torch.Generator().manual_seed(4))[:20]] = -100
    found = hd.measure(objective, list(zip(x.split(30), y.split(30))), method="exact", target="population", seed=5)
    kept = y != -100
    rows, weights, shard = _singles(objective, x[kept], y[kept]), objective.loss.weights(y, y)[kept], deal(50, 16, 5)
    pairs = [(rows[shard == i].mean(0), float(weights[shard == i].mean())) for i in range(16)]

    def ratio(left_out: int | None) -> Tensor:
        left = [pair for i, pair in enumerate(pairs) if i != left_out]
        out: Tensor = sum(y for y, _ in left) / sum(v for _, v in left)  # type: ignore[assignment]
        return out

    pseudo = torch.stack([16 * ratio(None) - 15 * ratio(i) for i in range(16)])
    gram = pseudo @ pseudo.T
    assert found.norm.total.square == pytest.approx(float(gram.sum() - gram.trace()) / (16 * 15), rel=1e-10)
    assert found.trace.value == pytest.approx(float(pseudo.sum(1).mean()), rel=1e-10)
    assert found.trace.error == pytest.approx(float(pseudo.sum(1).std()) / 4, rel=1e-10)


def test_samples_without_a_loss_change_nothing() -> None:
    """With two samples a shard and 60% ignored, shards without weight were divided by zero."""
    objective = hd.Objective(_network())
    x, y = _data(80)
    kept = torch.rand(80, generator=torch.Generator().manual_seed(3)) < 0.4
    kept[:2] = False
    marked = torch.where(kept, y, -100)
    assert 32 <= int(kept.sum()) < 40
    whole, few = (
        hd.measure(objective, data, method="hutchinson", target="population")
        for data in (list(zip(x.split(32), marked.split(32))), [(x[kept], y[kept])])
    )
    assert whole.rms == pytest.approx(few.rms, rel=1e-12)
    assert whole.interval == pytest.approx(few.interval, rel=1e-12)
    assert whole.provenance["counted"] == int(kept.sum())


def test_sequences_of_several_lengths_are_weighed_by_their_tokens() -> None:
    """Of samples that are all alike but for their lengths, the population's diagonal is that of any one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.ones(64, 6, dtype=torch.long)
    y = torch.where(torch.arange(6) < torch.randint(1, 7, (64, 1), generator=torch.Generator().manual_seed(1)), 2, -100)
    objective = hd.Objective(model, class_axis=-1)
    found = hd.measure(objective, [(x, y)], method="exact", target="population")
    one = hd.measure(objective, [(x[:1], x[:1] + 1)], method="exact")
    assert found.rms == pytest.approx(one.rms, rel=1e-12)
    assert found.interval == pytest.approx((one.rms, one.rms), rel=1e-9)


def test_the_diagonal_is_kept_with_its_errors() -> None:
    objective = hd.Objective(_network(), class_weights=UNEQUAL)
    found = hd.measure(objective, [_data(64)], method="exact", target="population", keep_diagonal=True)
    assert found.diagonal is not None
    assert found.diagonal.status == "estimate"
    assert found.diagonal.replicates == 16
    assert sum(float(t.sum()) for t in found.diagonal.total.values()) == pytest.approx(found.trace.value, rel=1e-12)
    assert all(bool((t > 0).all()) for t in found.diagonal.standard_errors.values())


def test_refusals(tmp_path: Path) -> None:
    x, y = _data(40)
    objective = hd.Objective(_network())
    with pytest.raises(ConfigurationError, match="the population target is one pass"):
        hd.measure(objective, [(x, y)], target="population", resume=tmp_path / "state")
    assert not (tmp_path / "state").exists()
    with pytest.raises(ConfigurationError, match="only 20 of these 40 have targets that count"):
        hd.measure(objective, [(x, torch.where(torch.arange(40) < 20, y, -100))], target="population")
    # Smoothing gives a class of weight zero a loss: its samples count, and may fill a shard that nothing divides.
    smooth = hd.Objective(_network(), class_weights=[0.0, 1.0, 1.0, 1.0], label_smoothing=0.1)
    with pytest.raises(EmptyDataError, match=r"of 16: its \d samples are all of classes of weight zero"):
        hd.measure(smooth, [(x, (torch.arange(40) < 4).long())], target="population")
