"""Sparse tensors: in a model's buffers measured as their dense twins are, in batches and parameters refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import dense_diagonal
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import ConfigurationError, NonFiniteError, UncoveredModelError
from hessdiag.measuring.forecast import MOST, fitting, forecast

torch.set_num_threads(1)
METHODS = ("auto", "exact", "propagation", "hutchinson", "reference")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "coo, some entries in two parts": lambda a: torch.sparse_coo_tensor(
        a.nonzero().T.repeat(1, 2), (a[a != 0] / 2).repeat(2), a.shape, check_invariants=False
    ),
    "csr": Tensor.to_sparse_csr,
}
NODES, N = 6, 10


class Graph(nn.Module):
    """Signals on the nodes of a graph, [N, nodes], brought together by its adjacency, a buffer."""

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("adjacency", adjacency)
        self.inner, self.last = nn.Linear(1, 4), nn.Linear(4 * NODES, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x[..., None]))
        h = self.bring(h.permute(1, 0, 2).reshape(NODES, -1)).reshape(NODES, len(x), 4).permute(1, 0, 2)
        return self.last(torch.tanh(h).reshape(len(x), -1))  # type: ignore[no-any-return]

    def bring(self, h: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, h)


class FromTheLeft(Graph):
    """The same by an operator that has no place for samples."""

    def bring(self, h: Tensor) -> Tensor:
        return self.adjacency @ h


class SamplesFirst(Graph):
    """The same with the samples first."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x[..., None])).transpose(1, 2) @ self.adjacency.T
        return self.last(torch.tanh(h).transpose(1, 2).reshape(len(x), -1))  # type: ignore[no-any-return]


def adjacency(dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(NODES, NODES, generator=g) < 0.4).to(dtype) / 2


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, NODES, generator=g, dtype=torch.float64).to(dtype), torch.randint(0, 3, (N,), generator=g)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_buffer_is_measured_as_its_dense_twin(layout: str, method: str, dtype: torch.dtype) -> None:
    batch, a = data(dtype), adjacency(dtype)
    model, twin = Graph(LAYOUTS[layout](a)).to(dtype), Graph(a).to(dtype)
    before, buffer = model.adjacency.clone(), model.adjacency
    found = hd.measure(hd.Objective(model), [batch], method=method, max_replicates=10, keep_diagonal=True)
    dense = hd.measure(hd.Objective(twin), [batch], method=method, max_replicates=10)
    assert (found.plan.method, found.status) == (dense.plan.method, dense.status)
    assert found.rms == pytest.approx(dense.rms, rel=1e-5)
    assert found.audit is not None
    assert found.audit.dtype == "float64"
    if found.status == "exact":
        assert found.diagonal is not None
        truth = dense_diagonal(
            Graph(a.double()).double(),
            lambda f, y: F.cross_entropy(f, y, reduction="none"),
            batch[0].double(),
            batch[1],
        )
        for name, wanted in truth.items():
            off = float((found.diagonal.total[name].double() - wanted).norm() / wanted.norm())
            assert off < (1e-10 if dtype == torch.float64 else 1e-5), name
    assert model.adjacency is buffer
    assert torch.equal(buffer.to_dense(), before.to_dense())


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_the_left_auto_takes_hutchinson_and_the_others_say_how_to_write_it(layout: str) -> None:
    batch, a = data(torch.float64), adjacency(torch.float64)
    objective = hd.Objective(FromTheLeft(LAYOUTS[layout](a)).double())
    found = hd.measure(objective, [batch], max_replicates=10)
    assert found.plan.method == "hutchinson"
    dense = hd.measure(hd.Objective(FromTheLeft(a).double()), [batch], max_replicates=10)
    assert found.rms == pytest.approx(dense.rms, rel=1e-10)
    truth = hd.measure(objective, [batch], method="reference").rms
    for method in ("exact", "propagation"):
        with pytest.raises(UncoveredModelError, match=r"Mm after 'inner': a constant matrix is .* h @ A.T.*sparse.mm"):
            hd.measure(objective, [batch], method=method)
    for advised in (SamplesFirst(a).double(), Graph(LAYOUTS[layout](a)).double()):
        assert hd.measure(hd.Objective(advised), [batch], method="exact").rms == pytest.approx(truth, rel=1e-10)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sparse_buffer_that_is_not_finite_is_refused_by_name(layout: str, value: float) -> None:
    a = adjacency(torch.float32)
    a[tuple(a.nonzero()[0])] = value
    with pytest.raises(NonFiniteError, match="'adjacency' holds NaN or Inf"):
        hd.Objective(Graph(LAYOUTS[layout](a)))


def test_costs_of_a_model_with_a_sparse_buffer_are_told() -> None:
    (x, y), a = data(torch.float32), adjacency(torch.float32)
    objective, dense = hd.Objective(Graph(a.to_sparse())), hd.Objective(Graph(a))
    assert fitting(objective, x[:2], y[:2]) == fitting(dense, x[:2], y[:2]) == MOST
    assert [one.method for one in forecast(objective, [(x, y)])] == list(METHODS[1:])


class Moving(Graph):
    """Its buffer is replaced, and changed in place, by every pass."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            self.adjacency.mul_(0.5)
        return out


def test_a_sparse_buffer_that_a_pass_changes_is_handed_back() -> None:
    a = adjacency(torch.float32)
    model = Moving(a.to_sparse()).eval()
    objective = hd.Objective(model)
    hd.measure(objective, [data(torch.float32)], method="exact")
    model.train()
    with pytest.raises(hd.errors.HessdiagError):  # a later pass is of another function
        hd.measure(objective, [data(torch.float32)], method="exact")
    assert torch.equal(model.adjacency.to_dense(), a)
    assert model.adjacency.layout == torch.sparse_coo


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[0], x[1, :4], *x[2:]])


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[0], x[1, :4], *x[2:]], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:.*(beta|prototype)")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Tensor.to_sparse, r"batch 1 holds a sparse tensor \(torch.sparse_coo\).*to_dense\(\).*buffer"),
        (Tensor.to_sparse_csr, r"batch 1 holds a sparse tensor \(torch.sparse_csr\)"),
        (nested, "batch 1 holds a nested tensor.*to_padded_tensor"),
        (jagged, "batch 1 holds a nested tensor.*to_padded_tensor"),
    ],
)
def test_batches_of_sparse_and_nested_tensors_are_refused(make: Any, words: str, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NODES, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = data(torch.float32)
    for inputs, objective in (
        (make(x), hd.Objective(model)),
        ({"x": make(x), "z": x}, hd.Objective(model, forward=lambda m, i: m(i["z"]))),
    ):
        plain = x if isinstance(inputs, Tensor) else {"x": x, "z": x}
        with pytest.raises(ConfigurationError, match=words) as caught:
            hd.measure(objective, [(plain, y), (inputs, y)], method=method)
        assert "\n" not in str(caught.value)


def test_sparse_targets_and_parameters_are_refused() -> None:
    x, y = data(torch.float32)
    model = nn.Linear(NODES, 3)
    with pytest.raises(ConfigurationError, match="batch 0 holds a sparse tensor"):
        hd.measure(hd.Objective(model, "mse"), [(x, F.one_hot(y, 3).float().to_sparse())])
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    with pytest.raises(UncoveredModelError, match=r"parameter 'weight' is sparse .* values"):
        hd.Objective(model)
    model.weight.requires_grad_(False)
    assert list(hd.Objective(model).parameters) == ["bias"]
