"""What an audit sees, over many seeds: its random directions must not miss a wrong derivative, nor refuse a right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_wrong_numbers import DTYPES, agree, by_products, data, net
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.errors import AuditError
from hessdiag.measuring.audit import PERIOD, Audit, audit, random_directions
from hessdiag.methods.batches import Numbered
from hessdiag.signs import Signs

L = nn.Linear
METHODS = ("exact", "propagation", "hutchinson", "reference")
SEEDS = range(8)


def audited(
    model: nn.Module, batch: tuple[Tensor, Tensor], method: str, seed: int, loss: Any = "cross_entropy"
) -> Audit:
    """The audit alone, of the first samples of a batch."""
    return audit(hd.Objective(model, loss), Numbered(0, 0, *batch), method=method, seed=seed)


# -- directions that cancel: one number, and entries that only differ under a softmax


def scaled(p: Tensor, factor: float) -> Tensor:
    """p itself, its gradient `factor` times the true one (as learned step sizes of quantisers have it)."""
    return p if factor == 1.0 else (p - p * factor).detach() + p * factor


def _one_number(factor: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda s, x: s.b(torch.tanh(s.a(x))) * scaled(s.g, factor)


def _branches(factor: float) -> Callable[[Any, Tensor], Tensor]:
    def body(s: Any, x: Tensor) -> Tensor:
        inner = torch.stack([torch.tanh(layer(x)) for layer in s.a], 1)
        return s.b((torch.softmax(scaled(s.g, factor), 0)[:, None] * inner).sum(1))  # type: ignore[no-any-return]

    return body


def _mixed(entries: int, factor: float, dtype: torch.dtype, start: int = 0) -> nn.Module:
    return net(
        _branches(factor), dtype=dtype, a=lambda: nn.ModuleList(L(5, 4) for _ in range(entries)), b=lambda: L(4, 3),
        g=lambda: torch.randn(entries, generator=torch.Generator().manual_seed(start)) if start else torch.zeros(entries),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_gradient_of_one_number_is_seen_by_every_seed(method: str, shape: tuple[int, ...]) -> None:
    """The direction was the sum of two that cancelled for every other seed: the number was not moved."""
    batch = data()
    g = lambda: torch.full(shape or (), 0.7)  # noqa: E731
    wrong, right = (
        net(_one_number(factor), a=lambda: L(5, 4), b=lambda: L(4, 3), g=g if shape != (3,) else lambda: torch.randn(3))
        for factor in (0.1, 1.0)
    )
    for seed in SEEDS:
        assert audited(right, batch, method, seed).passed
        with pytest.raises(AuditError, match="autograd's gradient is not the model's"):
            audited(wrong, batch, method, seed).require()


@DTYPES
@pytest.mark.parametrize("entries", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_branches_mixed_by_a_softmax_pass_for_every_seed(method: str, entries: int, dtype: torch.dtype) -> None:
    """Signs that are all alike move nothing below a softmax: half of the seeds for two branches."""
    batch = data(dtype=dtype)
    for start in range(6):
        model = _mixed(entries, 1.0, dtype, start)
        for seed in range(3 * start, 3 * start + 3):
            found = audited(model, batch, method, seed)
            assert found.passed, (seed, found.worst)
    agree(hd.diagonal(hd.Objective(model), [batch]).total, by_products(model, batch), 1e-5)


@pytest.mark.parametrize("entries", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_gradient_below_a_softmax_is_seen_by_every_seed(method: str, entries: int) -> None:
    batch, model = data(), _mixed(entries, 0.1, torch.float64, 1)
    for seed in SEEDS:
        with pytest.raises(AuditError, match="autograd's gradient is not the model's"):
            audited(model, batch, method, seed).require()


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_below_a_softmax_alone(method: str) -> None:
    """Chosen by itself, nothing else holds up the scales of the comparisons."""
    batch, model = data(), _mixed(2, 1.0, torch.float64, 1)
    objective = hd.Objective(model, parameters=["g"])
    for seed in SEEDS:
        assert audit(objective, Numbered(0, 0, *batch), method=method, seed=seed).passed, seed


def test_no_two_entries_of_a_direction_are_alike() -> None:
    model = nn.Sequential(L(70, 60), L(60, 3))
    for p in random_directions(hd.Objective(model), Signs(0)).values():
        sizes = p.abs().flatten()
        assert float(sizes.min()) >= 0.5
        assert float(sizes.max()) <= 1.5
        assert abs(float(sizes.mean()) - 1.0) < 0.1
        assert sizes.unique().numel() == min(len(sizes), PERIOD)
    few = random_directions(hd.Objective(nn.Linear(4, 2)), Signs(1))["weight"].abs().flatten()
    assert float(few.sort().values.diff().min()) > 0.01


# -- functions that torch does not differentiate at a zero cotangent


@DTYPES
def test_logcumsumexp_is_measured_by_every_method(dtype: torch.dtype) -> None:
    """Its pullback is linear, but NaN where it is differentiated at zero, as forward products were."""
    model = net(lambda s, x: s.b(torch.logcumsumexp(s.a(x), 1)), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    batch = data(dtype=dtype)
    truth = by_products(model, batch)
    for method in METHODS:
        for seed in SEEDS:
            found = audited(model, batch, method, seed)
            assert found.passed, (method, seed, found.worst)
    for method in ("auto", "exact", "reference"):
        agree(
            hd.diagonal(hd.Objective(model), [batch], method=method).total,
            truth,
            1e-10 if dtype == torch.float64 else 1e-5,
        )
    assert hd.measure(hd.Objective(model), [batch], method="auto").plan.method == "exact"
    for method in ("propagation", "hutchinson"):
        for plan in (None, hd.Plan(method, deflate=3) if method == "propagation" else None):
            found = hd.diagonal(hd.Objective(model), [batch], method=method, plan=plan, replicates=400)
            off = {n: (found.total[n].double() - truth[n]).abs() - 6 * found.standard_errors[n] for n in truth}
            assert all(float(o.max()) < 1e-6 for o in off.values()), (method, plan)
