"""Section 3 on the engine's networks: what α can and cannot do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hessdiag as hd
from theory import rescaling
from validation.bridge import deviation, engine_diagonal, vector
from validation.coordinates import (
    KINDS,
    Steps,
    batch,
    build,
    counterpart,
    rescaled_groups,
    rule_of,
    state_gap,
    trajectory,
)

torch.set_num_threads(1)

pairs = st.tuples(
    st.sampled_from(KINDS), st.floats(0.3, 40), st.floats(0.3, 40), st.sampled_from([0, 1, 2]), st.integers(0, 99)
)


@settings(deadline=None, derandomize=True, max_examples=24)
@given(pairs)
def test_same_function_for_every_alpha(case: tuple[str, float, float, int, int]) -> None:
    """net_α(θ) = net_α'(cθ) in eval mode, running statistics and eps included."""
    kind, alpha, other, beta, seed = case
    model = build(kind, alpha, beta, seed=seed)
    twin = counterpart(kind, model, alpha, other, beta)
    x, _ = batch(kind, 5, seed)
    with torch.no_grad():
        assert deviation(twin(x), model(x)) <= 1e-10


@settings(deadline=None, derandomize=True, max_examples=6)
@given(pairs)
def test_every_diagonal_entry_goes_as_one_over_c_squared(case: tuple[str, float, float, int, int]) -> None:
    """H_kk -> H_kk/c_k² for both parts, per tensor; θ_k² H_kk stays."""
    kind, alpha, other, beta, seed = case
    model = build(kind, alpha, beta, seed=seed)
    twin = counterpart(kind, model, alpha, other, beta)
    rule, (x, y) = rule_of(kind, model), batch(kind, 2, seed)
    one, two = (engine_diagonal(net, x, y, "cross_entropy") for net in (model, twin))
    for part in ("total", "gauss_newton", "functional"):
        wanted = rescaling.rescale_diagonal(getattr(one, part), rule, alpha / other)
        scale = rescaling.rescale_diagonal(one.gauss_newton, rule, alpha / other)
        for name, tensor in getattr(two, part).items():
            assert deviation(tensor, wanted[name], scale[name]) <= 1e-8, (part, name)
    before = rescaling.invariant_entries(one.total, dict(model.named_parameters()))
    after = rescaling.invariant_entries(two.total, dict(twin.named_parameters()))
    assert deviation(vector(after), vector(before)) <= 1e-8


@pytest.mark.parametrize("beta", [0, 2])
@pytest.mark.parametrize(
    "kind,other", [*((kind, 1.75) for kind in KINDS), ("mlp", 2.0), ("small_resnet", 2.0), ("preact_resnet18", 2.0)]
)
def test_same_trajectory_over_20_steps(kind: str, other: float, beta: int) -> None:
    """SGD with momentum and decay in training mode: rates × c², decay ÷ c²; running statistics follow.

    14/1.75 = 8 changes coordinates without rounding, which 17 BatchNorms on few pixels amplify; 14/2 = 7 rounds.
    """
    alpha, steps = 14.0, Steps()
    model = build(kind, alpha, beta, seed=5)
    twin = counterpart(kind, model, alpha, other, beta)
    rule = rule_of(kind, model)
    groups = rescaled_groups(twin, rule, alpha / other, steps)
    losses = torch.stack(trajectory(kind, model, steps))
    twins = torch.stack(trajectory(kind, twin, steps, groups))
    assert float((losses[-1] - losses[0]).abs()) > 1e-3  # it moved
    assert deviation(twins, losses) <= 1e-9
    assert state_gap(model, twin, rule, alpha / other) <= 1e-8


@pytest.mark.parametrize("kind", ["mlp", "small_resnet"])
def test_plain_rates_leave_the_trajectory(kind: str) -> None:
    """The same learning rate in both coordinates is another training: that is how α acts."""
    alpha, steps = 14.0, Steps()
    model = build(kind, alpha, 1, seed=5)
    twin = counterpart(kind, model, alpha, 1.0, 1)
    losses = torch.stack(trajectory(kind, model, steps))
    twins = torch.stack(trajectory(kind, twin, steps))
    assert deviation(twins, losses) > 1e-3


@pytest.mark.parametrize("kind", ["small_resnet", "preact_resnet18"])
def test_eps_and_running_statistics_matter(kind: str) -> None:
    """With eps left alone the function is equal to O(eps/var) only; with running statistics left alone not at all."""
    model = build(kind, 14.0, 1)
    x, _ = batch(kind, 5)
    with torch.no_grad():
        truth = model(x)
        without_eps = deviation(counterpart(kind, model, 14.0, 1.0, 1, eps=False)(x), truth)
        without_statistics = deviation(counterpart(kind, model, 14.0, 1.0, 1, statistics=False)(x), truth)
    assert 1e-6 < without_eps < without_statistics
    assert without_statistics > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_function_with_a_norm_100_times_as_large(kind: str) -> None:
    """The worked example: α -> α/factor makes E[8] 100 times as large, function and invariant norm unmoved."""
    model = build(kind, 14.0, 1)
    x, y = batch(kind, 3)
    rule = rule_of(kind, model)
    found = hd.measure(hd.Objective(model), [(x, y)], method="exact", keep_diagonal=True)
    assert found.diagonal is not None
    factor = rescaling.factor_for_norm(dict(found.diagonal.total), rule, 100.0)
    twin = counterpart(kind, model, 14.0, 14.0 / factor, 1)
    other = hd.measure(hd.Objective(twin), [(x, y)], method="exact")
    with torch.no_grad():
        assert deviation(twin(x), model(x)) <= 1e-9
    assert other.rms / found.rms == pytest.approx(100.0, rel=1e-6)
    assert other.mean_scaled / found.mean_scaled == pytest.approx(100.0, rel=1e-6)
    assert found.invariant is not None
    assert other.invariant is not None
    assert other.invariant.rms == pytest.approx(found.invariant.rms, rel=1e-6)
    assert math.isclose(other.loss, found.loss, rel_tol=1e-9)
    for a, b in zip(found.effective_curvature, other.effective_curvature, strict=True):
        assert a.mean == pytest.approx(b.mean, rel=1e-6)
        assert a.max_curvature != pytest.approx(b.max_curvature, rel=1e-3)
