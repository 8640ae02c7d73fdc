"""Every operation of `operations` between two layers: right by the exact method and by propagation, or refused by name.

The oracle is one Hessian-vector product per parameter. Propagation is compared without statistics: every one-hot vector
in the place of its signs, summed. Nothing raises a foreign error, in float64 and in float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
from operations import OPERATIONS, Operation, like
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessdiag as hd
from hessdiag.errors import HessdiagError, UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.propagator import Propagator

torch.set_num_threads(1)

REFUSED = {
    # a product of two matrices without an axis of samples
    "chain_matmul", "corrcoef", "cov",
    # no second derivative in torch
    "multi_margin_loss", "multilabel_margin_loss", "segment_reduce",
    # samples one by one, without an axis of their own
    "dot", "kron", "renorm", "tensorinv",
}  # fmt: skip
COVERED = [name for name in OPERATIONS if name not in REFUSED]
ALWAYS = COVERED[::6]
"""Compared in every run; the others are `slow`."""
IN_PARTS: dict[str, Operation] = {
    "hardsigmoid": lambda h: F.relu6(2 * h + 3) / 6,
    "cdist": lambda h: (h[..., :, None, :] - (0.7 * h.flip(1) + 0.2)[..., None, :, :]).square().sum(-1).sqrt(),
    "embedding_bag by live weights": lambda h: h @ like(h, 6, 2),
}
"""For the oracle: the same function where torch has no second derivative of its own, and the engine has."""
TARGETS = torch.tensor([1, 0])


class Between(nn.Module):
    """A linear layer, the operation, GELU, a linear layer."""

    def __init__(self, shape: tuple[int, ...], operation: Operation) -> None:
        super().__init__()
        self.shape, self.operation = shape, operation
        self.first = nn.Linear(2, torch.Size(shape).numel())
        with torch.no_grad():
            width = self._hidden(torch.ones(2, 2)).shape[1]
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self._hidden(x)))  # type: ignore[no-any-return]

    def _hidden(self, x: Tensor) -> Tensor:
        return self.operation(self.first(x).reshape(len(x), *self.shape)).reshape(len(x), -1)


def built(name: str) -> tuple[Between, Tensor]:
    torch.manual_seed(0)
    model = Between(*OPERATIONS[name]).double()
    return model, torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def products(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The Hessian's diagonal of the summed loss, one product for each parameter."""
    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = F.cross_entropy(model(x), TARGETS, reduction="sum")
    found = {}
    for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values()), create_graph=True)):
        flat = torch.zeros(gradient.numel(), dtype=torch.float64)
        for k, entry in enumerate(gradient.flatten()):
            (row,) = torch.autograd.grad(entry, parameters[name], retain_graph=True, materialize_grads=True)
            flat[k] = row.flatten()[k]
        found[name] = flat.reshape(gradient.shape)
    return found


class OneHot:
    """In the place of a source of signs: zero but for one entry of one site of every sample."""

    def __init__(self, place: int, entry: int) -> None:
        self.place, self.entry = place, entry

    def samples(self, shape: torch.Size, start: int, *key: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.zeros(shape, dtype=dtype)
        if key[-1] == self.place:
            drawn[:, self.entry] = 1
        return drawn


def propagated(linear: Linearisation) -> dict[str, Tensor]:
    """What propagation gives on average over its signs, both parts."""
    propagator = Propagator(linear)
    total = propagator.gauss_newton()
    parts = [propagator.direct()]
    for place, site in enumerate(linear.sites):
        for entry in range(site.c.numel() // linear.samples):
            parts.append(propagator.functional(OneHot(place, entry), 0))  # type: ignore[arg-type]
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value
    return total


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    whole = max(float(value.norm()) for value in wanted.values())
    for name, value in wanted.items():
        off = float((found[name].double() - value).norm())
        assert off <= tolerance * (float(value.norm()) + 1e-2 * whole) + 1e-14, (name, off, float(value.norm()))


def check(name: str) -> None:
    model, x = built(name)
    oracle = copy.deepcopy(model)
    oracle.operation = IN_PARTS.get(name, oracle.operation)
    try:
        wanted = products(oracle, x)
    except RuntimeError as error:
        if torch.__version__ >= (2, 13) or "is not implemented" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} has no second derivative to compare with: {error}")
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        linear = Linearisation(hd.Objective(copy.deepcopy(model).to(dtype)), x.to(dtype), TARGETS)
        outer, inner = exact.batch_diagonal(linear)
        agree({n: outer[n] + inner[n] for n in outer}, wanted, tolerance)
        agree(propagated(linear), wanted, tolerance)


@pytest.mark.parametrize("name", ALWAYS)
def test_operations_between_two_layers(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COVERED if name not in ALWAYS])
def test_all_other_operations_between_two_layers(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_operations_that_are_refused_by_name(name: str) -> None:
    """One line that names the layer before it, by both methods, and no other error."""
    model, x = built(name)
    for dtype in (torch.float64, torch.float32):
        objective = hd.Objective(copy.deepcopy(model).to(dtype))
        with pytest.raises(HessdiagError, match=r"'first'|Backward\d kept no") as caught:
            exact.batch_diagonal(Linearisation(objective, x.to(dtype), TARGETS))
        assert "\n" not in str(caught.value)


def test_how_many_are_covered() -> None:
    assert not REFUSED - set(OPERATIONS)
    assert len(OPERATIONS) >= 440
    assert len(REFUSED) == 10
    assert len(COVERED) >= 440


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tensorinv", "bends in all samples together"),
        ("segment_reduce", "torch has no second derivative of it; no method here measures parameters below it"),
        ("chain_matmul", "samples one by one in a loop"),
    ],
)
def test_why_a_node_is_refused_by_test(name: str, reason: str) -> None:
    model, x = built(name)
    with pytest.raises(UncoveredModelError, match=reason):
        Linearisation(hd.Objective(model), x, TARGETS)


def test_what_was_overwritten_in_place_says_so() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = 1.0 * self.first(x)
            y = torch.special.i1e(h)
            h += 1.0
            return self.last(y)  # type: ignore[no-any-return]

    x = torch.ones(2, 2)
    with pytest.raises(UncoveredModelError, match="overwritten in place"):
        Linearisation(hd.Objective(Overwritten()), x, TARGETS)
