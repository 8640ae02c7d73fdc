"""Models that share their copies, write to their own weights, draw random numbers, or do otherwise with long samples."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.callbacks import Watch
from hessdiag.errors import AuditError, StochasticModeError, UncoveredModelError

METHODS = ("exact", "propagation", "hutchinson", "reference")
DTYPES = (torch.float64, torch.float32)


def pair(dtype: torch.dtype, samples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (samples,), generator=generator)


# -- a copy that is the model itself


class Lender(nn.Module):
    """A part that is never copied, as frozen encoders and large tables are not."""

    def __init__(self, *, table: bool) -> None:
        super().__init__()
        self.table, self.a = table, nn.Linear(3, 4)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lender:
        if not self.table:
            return self
        new = Lender.__new__(Lender)
        nn.Module.__init__(new)
        new.table, new.a = True, self.a
        return new

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_a_copy_shares_are_not_moved(method: str, table: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Lender(table=table), nn.Linear(4, 3)).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        found = hd.measure(hd.Objective(model), [pair(dtype)], method=method, max_replicates=10)
        assert found.audit is not None
        assert found.audit.passed
        assert found.audit.dtype == "float64"  # lent in double, not left in its own precision
    watch = Watch([pair(dtype)], method=method, max_seconds=5)
    watch(model)
    assert all(torch.equal(before[name], p) and p.dtype == dtype for name, p in model.named_parameters())


# -- a forward pass that writes to its own weights


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(min=0)
        return super().forward(x)


class Renormed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("kind", [Clamped, Renormed, InPlace])
def test_a_constraint_within_forward_is_refused_at_its_bound(
    kind: Callable[..., nn.Module], method: str, dtype: torch.dtype
) -> None:
    """With a single entry (or row) there, on whichever side the random move lies, for several seeds."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(kind(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
        with torch.no_grad():
            model[0].weight.abs_().mul_(0.1).add_(0.01)
            if kind is Renormed:
                model[0].weight[0] *= 0.6 / model[0].weight[0].norm()
            else:
                model[0].weight[0, 0] = 0.0 if kind is Clamped else 0.3
            model(pair(dtype)[0])
        with pytest.raises(UncoveredModelError, match=r"writes to its own parameter '0\.weight'"):
            hd.measure(hd.Objective(model), [pair(dtype)], method=method, seed=seed, max_replicates=10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Clamped, Renormed])
def test_a_constraint_that_binds_nowhere_is_the_model_without_it(
    kind: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight.abs_().mul_(0.1).add_(0.05)
    plain.load_state_dict(model.state_dict())
    found, expected = (hd.measure(hd.Objective(m), [pair(dtype)], method="exact") for m in (model, plain))
    assert found.rms == pytest.approx(expected.rms, rel=1e-12 if dtype == torch.float64 else 1e-6)


# -- a model that draws


class Dropped(nn.Module):
    """LayerDrop as it is written in transformers: a block is left out now and then, in training mode alone."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.a, self.b = source, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        drawn = {
            "torch": lambda: float(torch.rand([])),
            "python": random.random,
            "numpy": lambda: float(np.random.rand()),  # noqa: NPY002 (models do)
        }[self.source]()
        if self.training and drawn < 1e-9:
            return self.b(x)  # type: ignore[no-any-return]
        return self.b(x + torch.tanh(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
@pytest.mark.parametrize("check", [True, False])
def test_a_model_in_training_mode_that_draws_is_refused_however_seldom_it_matters(source: str, check: bool) -> None:
    torch.manual_seed(0)
    model, data = Dropped(source), [pair(torch.float32), pair(torch.float32)]
    for method in METHODS:
        with pytest.raises(StochasticModeError, match=r"draws random numbers .* call model\.eval\(\)"):
            hd.measure(hd.Objective(model), data, method=method, deterministic_check=check)
    model.eval()
    assert hd.measure(hd.Objective(model), data, method="exact").status == "exact"
    model.a.train()  # a part of it is enough
    with pytest.raises(StochasticModeError):
        hd.measure(hd.Objective(model), data, method="exact")


# -- a model that does otherwise with long samples


class Truncated(nn.Module):
    """Back-propagation through time, cut every few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h.detach() if t and t % 4 == 0 else h)
        return self.out(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", [(4, 9), (9, 4), (4, 3, 9, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_the_longest_batch_is_audited_too(method: str, order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Truncated().double()
    batches = [(torch.randn(3, length, 2).double(), torch.tensor([0, 1, 2])) for length in order]
    with pytest.raises(AuditError, match="slope of 'the whole model'"):
        hd.measure(hd.Objective(model), batches, method=method, max_replicates=10)
    short = [batch for batch in batches if batch[0].shape[1] <= 4]
    found = hd.measure(hd.Objective(model), short, method=method, max_replicates=10)
    assert found.audit is not None
    assert found.audit.passed
    assert found.audit.samples == 2  # the first is the longest


def test_what_is_audited_of_the_longest_batch_is_told() -> None:
    torch.manual_seed(0)
    model = nn.GRU(2, 3, batch_first=True).double()
    objective = hd.Objective(model, lambda f, y: F.cross_entropy(f, y, reduction="none"), output=lambda f: f[0][:, -1])
    batches = [(torch.randn(3, length, 2).double(), torch.tensor([0, 1, 2])) for length in (2, 5, 4)]
    found = hd.measure(objective, batches, method="exact")
    assert found.audit is not None
    assert found.audit.samples == 4
    assert sum(entry.check == "slope" for entry in found.audit.entries) == 2
