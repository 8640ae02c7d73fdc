"""What enters a pass of signs, and where: at edges that nothing else reaches, in their precision, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gate import gate, one_hot
from test_bytes import propagator, shape
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from benchmarks import transformers
from benchmarks.nanogpt import GPT
from hessdiag.graph import Linearisation
from hessdiag.graph.nodes import Edge
from hessdiag.graph.visit import Entrances
from hessdiag.kernels import entering
from hessdiag.kernels.propagator import FUNCTIONAL, Propagator
from hessdiag.methods import reference
from hessdiag.methods.noise import Choice
from hessdiag.signs import Signs

torch.set_num_threads(1)
G = torch.Generator().manual_seed(5)
X = torch.randn(3, 4, generator=G, dtype=torch.float64)
EXACT, MANY = 3, 1200  # classes: more than 1000 leave the Gauss-Newton part to signs


class Split(nn.Module):
    """A function of a linear map's output, and a head."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.first, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, classes)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x), self.other(x)))


def gated(h: Tensor, _: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    return torch.cat([a * b.sigmoid(), a], 1)


def second_bent(h: Tensor, _: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    return torch.cat([a, b.sin()], 1)


def unbound(h: Tensor, other: Tensor) -> Tensor:
    return torch.stack([part.tanh() if n % 2 else part * part.exp() for n, part in enumerate(h.unbind(1))], 1) + other


def dead_half(h: Tensor, _: Tensor) -> Tensor:
    return h.sigmoid().chunk(2, 1)[1].tanh().repeat(1, 2)


def least_and_most(h: Tensor, _: Tensor) -> Tensor:
    least, most = h.aminmax(dim=1, keepdim=True)
    return torch.cat([least, most.tanh()], 1).repeat(1, 2)


def singular(h: Tensor, _: Tensor) -> Tensor:
    return torch.linalg.svdvals(h.reshape(-1, 2, 2)).tanh().repeat(1, 2)


def split_below(h: Tensor, other: Tensor) -> Tensor:
    a, b = (h.tanh() * other).chunk(2, 1)
    return torch.cat([a.exp() * b, b], 1)


_NODE: Any = torch.ones(1, requires_grad=True).aminmax(dim=0)[0].grad_fn
SPLITS = [
    *(gated, second_bent, unbound, dead_half, singular, split_below),
    pytest.param(
        least_and_most,
        marks=pytest.mark.skipif("NotImplemented" in _NODE.name(), reason="this torch has no derivative of aminmax"),
    ),
]


def split(function: Callable[[Tensor, Tensor], Tensor], classes: int = EXACT) -> Split:
    torch.manual_seed(1)
    return Split(function, classes).double()


def targets(classes: int) -> Tensor:
    return torch.randint(classes, (3,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is taken for one whose seeds would not fit."""
    monkeypatch.setattr(entering, "KEEP_ROOTS", 0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("function", SPLITS)
def test_nodes_of_several_outputs(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A hook at one of which an output was not reached has None there, and may put nothing in its place."""
    gate(split(function), X, targets(EXACT))


@pytest.mark.parametrize("classes", [EXACT, MANY])
@pytest.mark.parametrize("function", SPLITS)
def test_large_batches_draw_the_same_replicates(
    function: Callable[[Tensor, Tensor], Tensor], classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for keep in (entering.KEEP_ROOTS, 0):
        monkeypatch.setattr(entering, "KEEP_ROOTS", keep)
        objective = hd.Objective(split(function, classes))
        found.append(hd.diagonal(objective, [(X, targets(classes))], method="propagation", replicates=3).total)
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-10, atol=1e-12 * float(plain.abs().max()))


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate": lambda h, other: (h.tanh() * other.double().sigmoid()).to(h.dtype),
    "below a cast": lambda h, other: ((h.tanh() * other.double()).sin() * other).to(h.dtype),
    "softmax": lambda h, other: h.softmax(-1, dtype=torch.float64).to(h.dtype) * other,
    "quotient": lambda h, other: (h / (2 + other.double().sigmoid())).to(h.dtype).tanh(),
}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("function", MIXED.values(), ids=MIXED)
def test_what_enters_has_the_precision_of_its_edge(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Also where a factor is in double precision and the net is not."""
    gate(split(function), X, targets(EXACT))


class _Scaled(torch.autograd.Function):
    """x, whatever the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return x + 0 * scale

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return cotangents[0], None


def test_a_function_of_ones_own_may_give_nothing_to_an_input() -> None:
    """So that what enters there needs a zero of its own."""
    x = torch.ones(2, 3, requires_grad=True)
    scale = (2 * x).chunk(2, 0)[0]
    outputs = _Scaled.apply(x, scale)
    linear = Linearisation(hd.Objective(split(gated)), X, targets(EXACT))
    linear.graph.nodes = [x.grad_fn, scale.grad_fn, outputs.grad_fn]
    edges: list[Edge] = [(outputs.grad_fn, 0), (scale.grad_fn, 0)]
    assert Entrances(linear, edges).tops == edges


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the signs of each site are drawn from now on."""
    found: Counter[int] = Counter()
    draw = Signs.samples

    def samples(self: Signs, shape: torch.Size, start: int, *parts: int, dtype: torch.dtype) -> Tensor:
        if len(parts) == 3 and parts[1] == FUNCTIONAL:
            found[parts[2]] += 1
        return draw(self, shape, start, *parts, dtype=dtype)

    monkeypatch.setattr(Signs, "samples", samples)
    return found


class Tied(nn.Module):
    """A table as its own head, a gate between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return F.linear(h * self.gate(h).sigmoid(), self.embed.weight.tanh())


def of_table() -> Propagator:
    torch.manual_seed(0)
    x = torch.randint(7, (3, 5))
    return Propagator(Linearisation(hd.Objective(Tied(), class_axis=-1), x, x.roll(1, 1)))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("make", [lambda: propagator(2), of_table])
def test_signs_are_drawn_once_a_pass(make: Callable[[], Propagator], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a site looks at several nodes, and layers ask for its seeds again."""
    work = make()
    count = counted(monkeypatch)
    work.functional(Signs(0), 0, outer=True)
    sites = work.batch.sites
    assert any(len({id(edge[0]) for edge in site.edges}) > 1 for site in sites)
    for number, site in enumerate(sites):
        both = bool(site.right) or (bool((site.c > 0).any()) and bool((site.c < 0).any()))
        assert 0 < count[number] <= 1 + both, site.name


@pytest.mark.parametrize("without", ["", "along"])
@pytest.mark.parametrize("model", [GPT(shape(2)), Tied()], ids=["attention", "table"])
def test_what_enters_is_written_over_where_nothing_else_holds_it(
    model: nn.Module, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not seeds that layers ask for again, nor what is known of a layer's share: of one site it is what enters."""
    x = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(3))
    batch = Linearisation(hd.Objective(model.double().eval(), class_axis=-1), x, x.roll(1, 1))
    found = []
    for keep in (entering.KEEP_ROOTS, 0):
        monkeypatch.setattr(entering, "KEEP_ROOTS", keep)
        work = Propagator(batch)
        work.roots = entering.Roots(
            batch, {n for n, site in enumerate(batch.sites) if without and without in site.name}
        )
        found.append(work.functional(Signs(0), 0, outer=True))
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-10, atol=1e-12 * float(plain.abs().max()))


@pytest.mark.usefixtures("large")
def test_seeds_are_dropped_when_they_have_entered() -> None:
    """And none is left of a pass."""
    work = propagator(2)
    for sign in (1, -1):
        one = work._entering(lambda number: torch.ones_like(work.batch.sites[number].c), of=sign)
        out: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in work.batch.objective.parameters.items()}
        work._square_pass(one, out, 1.0, [1] * len(work.squares))
        assert not one._seeds


@pytest.mark.usefixtures("large")
def test_shares_that_are_not_closed_are_left_to_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the benchmark of transformers asks for them."""
    seen: list[Linearisation] = []

    def watched(linear: Linearisation, **options: Any) -> Propagator:
        seen.append(linear)
        return Propagator(linear, **options)

    monkeypatch.setattr(transformers, "Propagator", watched)
    torch.manual_seed(0)
    settings = transformers.Settings(layers=1, heads=1, tokens=2)
    x = torch.randint(3, (2, 2))
    model = transformers.GPT(2, 3, settings, 1.0, False).double()
    net = transformers.Trained(model, x, x.roll(1, 1), {})
    pilot = transformers.Pilot({}, Choice(), 0.0)
    own = []
    for closed in (True, False):
        transformers.propagation(net, pilot, balance=False, closed=closed)(0)
        seeds = [torch.ones_like(site.c) for site in seen[-1].sites]
        own.append(seen[-1].own(seen[-1].pull(seeds, seeds, above=True)))
    assert own[0]
    assert not own[1]
    truth, _, _, _ = reference.batch_diagonal(hd.Objective(model), x, x.roll(1, 1))
    for name, found in one_hot(Propagator(seen[1])).items():
        torch.testing.assert_close(found, truth[name], rtol=1e-10, atol=1e-10)
