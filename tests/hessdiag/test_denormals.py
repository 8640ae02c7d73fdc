"""Denormal numbers are zero while the project computes, which changes no bit of a result, and as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import hessdiag as hd
from hessdiag import activations
from hessdiag.problem import ascent, handing_back
from hessdiag.problem.denormals import are_zero, denormals_are_zero
from hessdiag.problem.perturbation import keyed_pgd, parse_pgd

pytestmark = pytest.mark.skipif(
    not torch.set_flush_denormal(False), reason="this processor does not take denormal numbers for zero"
)
SHARP = "rct:beta=1,curvature=50"


@pytest.fixture(params=[False, True])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What the user has set."""
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def test_what_was_set_before_is_set_again(before: bool) -> None:
    assert are_zero() is before
    with denormals_are_zero():
        assert are_zero()
        with denormals_are_zero():
            assert are_zero()
        assert are_zero()
    assert are_zero() is before
    with pytest.raises(ZeroDivisionError), denormals_are_zero():
        raise ZeroDivisionError
    assert are_zero() is before


class Asking(nn.Module):
    """A net that notes whether denormal numbers are zero where it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 2), set[bool]()

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        self.seen.add(are_zero())
        out: Tensor = self.linear(x)
        return out


def test_a_measurement_and_an_attack_take_them_for_zero(before: bool) -> None:
    model, x, y = Asking().eval(), torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    hd.measure(hd.Objective(model), (x, y))
    hd.diagonal(hd.Objective(model), (x, y))
    with ascent.handed_back(model):
        keyed_pgd(model, x, y, [0, 1, 2, 3], parse_pgd("pgd:eps=8/255,steps=2"))
    assert model.seen == {True}
    assert are_zero() is before


@pytest.mark.parametrize("method", ["exact", "propagation", "hutchinson", "reference"])
def test_no_bit_of_a_measurement_changes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sharp = [activations.build(SHARP) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), sharp[0], nn.Conv2d(4, 4, 3), sharp[1], nn.Flatten(), nn.Linear(64, 3))
    x, y = 4.0 * torch.randn(16, 1, 8, 8), torch.arange(16) % 3
    first = sharp[0](model[0](x))
    assert ((first != 0.0) & (first.abs() < torch.finfo(torch.float32).tiny)).any()

    def found() -> list[Tensor]:
        one = hd.diagonal(hd.Objective(model), (x, y), method=method, replicates=8, seed=1)
        return [*one.total.values(), *one.gauss_newton.values(), *one.functional.values()]

    with_zeros = found()
    monkeypatch.setattr(handing_back, "denormals_are_zero", nullcontext)
    as_they_are = found()
    assert all(torch.equal(a, b) for a, b in zip(with_zeros, as_they_are))
