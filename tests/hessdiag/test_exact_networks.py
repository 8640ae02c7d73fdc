"""Exact diagonals on networks that hypothesis makes: layer kinds, residual sums, pools, gates and losses mixed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ELEMENTWISE, Function, Residual, Tokens, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.graph import Linearisation
from hessdiag.graph.moves import fan_of
from hessdiag.graph.route import Route
from hessdiag.kernels import chain, price
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.directions import starts
from hessdiag.kernels.price import Price, prices
from hessdiag.methods import reference
from hessdiag.problem.objective import Objective

CURVES = {
    "gelu": F.gelu,
    "silu": F.silu,
    "silu in place": lambda h: F.silu(h, inplace=True),
    "tanh": torch.tanh,
    "elu in place": lambda h: F.elu(h, inplace=True),
    "softplus": F.softplus,
    "mish": F.mish,
    "relu": F.relu,
    "swish by hand": lambda h: h * torch.sigmoid(h),
}


class Unit(nn.Module):
    """One block of a drawn network on [N, 4, H, W]; every kind keeps the four channels."""

    def __init__(self, kind: str, curve: str) -> None:
        super().__init__()
        self.kind, self.curve = kind, CURVES[curve]
        if kind in ("residual", "gate", "cat"):
            self.a = nn.Conv2d(4, 4, 3, padding=1, groups=2 if kind == "gate" else 1)
            self.b = nn.Conv2d(8 if kind == "cat" else 4, 4, 1)
        elif kind == "dilated":
            self.a = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
        elif kind == "strided":
            self.a = nn.Conv2d(4, 4, 3, padding=1, stride=2)
        elif kind == "depthwise":
            self.a = nn.Conv2d(4, 4, 2, padding=1, groups=4)
        elif kind == "norm":
            self.a = nn.BatchNorm2d(4)
        elif kind == "tokens":
            self.a = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        if self.kind == "pool":
            return F.avg_pool2d(h, 2, ceil_mode=True)
        if self.kind == "maximum":
            return F.max_pool2d(h, 2, 1, 1)
        if self.kind == "residual":
            return h + self.b(self.curve(self.a(h)))  # type: ignore[no-any-return]
        if self.kind == "gate":
            return self.curve(self.a(h)) * torch.sigmoid(self.b(h).mean((2, 3), keepdim=True))  # type: ignore[no-any-return]
        if self.kind == "cat":
            return self.b(torch.cat([self.curve(self.a(h)), h], 1))  # type: ignore[no-any-return]
        if self.kind == "tokens":
            return self.curve(self.a(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        return self.curve(self.a(h))  # type: ignore[no-any-return]


class Drawn(nn.Module):
    def __init__(self, units: list[tuple[str, str]], outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 2, bias=False)
        self.units = nn.Sequential(*(Unit(*unit) for unit in units))
        self.fc = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(torch.tanh(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


def saddle(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.sin(outputs * targets).sum(1) + outputs[:, 0] * outputs[:, 1]


def compare(model: nn.Module, loss: object, outputs: int, x: Tensor) -> Linearisation:
    y = torch.rand(len(x), outputs, dtype=torch.float64)
    objective = Objective(model, loss)  # type: ignore[arg-type]
    if loss == "cross_entropy":
        y = y.argmax(1)
    total, outer, _, _ = reference.batch_diagonal(objective, x, y)
    batch = Linearisation(objective, x, y)
    gauss_newton, functional = exact.batch_diagonal(batch)
    whole = sum(float(value.norm()) ** 2 for value in total.values()) ** 0.5
    for name, wanted in total.items():
        scale = 1e-10 * (float(wanted.norm()) + float(outer[name].norm())) + 1e-15 * whole
        assert float((gauss_newton[name] - outer[name]).norm()) <= scale, name
        assert float((gauss_newton[name] + functional[name] - wanted).norm()) <= scale, name
    return batch


def randomise(model: nn.Module) -> nn.Module:
    model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_()
                module.bias.normal_()
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


KINDS = ["residual", "gate", "cat", "dilated", "strided", "depthwise", "norm", "tokens", "pool", "maximum"]
LOSSES = {"cross_entropy": "cross_entropy", "mse": "mse", "half_mse": "half_mse", "bce": "bce", "saddle": saddle}


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    units=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(sorted(CURVES))), min_size=1, max_size=4),
    loss=st.sampled_from(sorted(LOSSES)),
    outputs=st.integers(2, 4),
    samples=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_drawn_networks(units: list[tuple[str, str]], loss: str, outputs: int, samples: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = randomise(Drawn(units, outputs))
    compare(model, LOSSES[loss], outputs, torch.randn(samples, 1, 6, 6, dtype=torch.float64))


class Perceptron(nn.Module):
    def __init__(self, widths: list[int], curves: list[str], bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(widths))
        self.curves = curves

    def forward(self, h: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            h = layer(h)
            if place < len(self.curves):
                h = CURVES[self.curves[place]](h)
        return h


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=7),
    curves=st.lists(st.sampled_from(sorted(CURVES)), min_size=7, max_size=7),
    curved_output=st.booleans(),
    bias=st.booleans(),
    loss=st.sampled_from(sorted(LOSSES)),
    seed=st.integers(0, 2**16),
)
def test_chains_at_every_switch(
    widths: list[int], curves: list[str], curved_output: bool, bias: bool, loss: str, seed: int
) -> None:
    """Rows, a full matrix from any level on, and the passes for general networks say the same."""
    torch.manual_seed(seed)
    widths = [*widths, max(widths[-1], 2)]
    used = curves[: len(widths) - (1 if curved_output else 2)]
    model = Perceptron(widths, used, bias).double()
    batch = compare(model, LOSSES[loss], widths[-1], torch.randn(3, widths[0], dtype=torch.float64))
    levels = chain.find_chain(batch)
    assert levels is not None
    assert len(levels) == len(widths) - 1
    wanted = dict(chain.functional(levels, 0, 3, switch=None))
    for switch in range(len(levels)):
        for place, q in chain.functional(levels, 0, 3, switch=switch):
            other = wanted[place]
            zero = torch.zeros(3, levels[place].width, dtype=torch.float64)
            other = zero if other is None else other
            torch.testing.assert_close(zero if q is None else q, other, rtol=1e-9, atol=1e-12)
    functional = exact.batch_diagonal(batch)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "find_chain", lambda _: None)
        general = exact.batch_diagonal(batch)[1]
    for name, value in functional.items():
        torch.testing.assert_close(general[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "written"), [(n, w) for n in ("chain", "net", "indefinite") for w in (1, 70, 10**9)] + [("chain", None)]
)
def test_columns_in_blocks_are_all_counted(name: str, written: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of the loss's factor that are written out block by block give what they give at once: 512 samples of 100
    classes are two blocks as they are.
    """
    classes, samples = (100, 512) if written is None else (7, 9)
    loss: Any = bowl_and_saddle if name == "indefinite" else "cross_entropy"
    if written is not None:
        monkeypatch.setattr("hessdiag.problem.persample.WRITTEN", written)
    torch.manual_seed(0)
    middle = Beside() if name == "net" else nn.Tanh()
    model = nn.Sequential(nn.Linear(6, 5), middle, nn.SiLU(), nn.Linear(5, classes)).double()
    batches = [(torch.randn(samples, 6, dtype=torch.float64), torch.randint(classes, (samples,)))]
    objective = Objective(model, loss)
    linear = Linearisation(objective, *batches[0])
    assert (chain.find_chain(linear) is None) == (name == "net")
    assert (len(list(linear.curvature.blocks())) > 1) == (written != 10**9)
    found, wanted = (hd.diagonal(objective, batches, method=method) for method in ("exact", "reference"))
    for part in ("total", "gauss_newton", "functional"):
        for key, tensor in getattr(wanted, part).items():
            assert (getattr(found, part)[key] - tensor).norm() <= 1e-10 * wanted.total[key].norm(), (part, key)


class Beside(nn.Module):
    """A residual sum: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_convolutions_at_a_single_position_share_passes(dtype: torch.dtype) -> None:
    """Their way by positions has one direction a channel, and small layers' directions share a pass."""
    convs = [nn.Conv2d(2, 3, 3, stride=2, padding=1), *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))]
    body = [part for conv in convs for part in (conv, nn.Tanh())]
    model = seeded(lambda: nn.Sequential(*body, nn.Flatten(), nn.Linear(3, 3))).to(dtype)
    x, y = torch.randn(5, 2, 2, 2, dtype=dtype), torch.arange(5) % 3
    objective = Objective(model, loss="cross_entropy")
    ours = hd.diagonal(objective, [(x, y)], method="exact").total
    truth = hd.diagonal(objective, [(x, y)], method="reference").total
    for name, t in truth.items():
        torch.testing.assert_close(
            ours[name], t, rtol=0, atol=(1e-12 if dtype == torch.float64 else 1e-6) * float(t.abs().max())
        )


def bowl_and_saddle(f: Tensor, y: Tensor) -> Tensor:
    """A loss per sample with Hessians of either sign."""
    return F.cross_entropy(f, y, reduction="none") + f[:, 0] * f[:, 1]


def test_what_is_no_chain() -> None:
    """Skips, normalisation with parameters and positions go the general way."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.c(h + torch.tanh(self.b(h)))  # type: ignore[no-any-return]

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normed = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    for model in (Skip(), normed):
        torch.manual_seed(0)
        assert chain.find_chain(compare(model.double().eval(), "cross_entropy", 2, x)) is None
    normed[1].requires_grad_(False)
    assert chain.find_chain(compare(normed, "cross_entropy", 2, x)) is not None


def test_single_precision_is_summed_in_double() -> None:
    torch.manual_seed(0)
    model = randomise(Drawn([("residual", "gelu"), ("strided", "tanh")], 3))
    x, y = torch.randn(16, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (16,))
    fine = exact.batch_diagonal(Linearisation(Objective(model), x, y))
    coarse = exact.batch_diagonal(Linearisation(Objective(model.float()), x.float(), y))
    for wanted, found in zip(fine, coarse):
        for name, value in wanted.items():
            assert found[name].dtype == torch.float64
            assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-12


@pytest.mark.parametrize("name", ["residual", "tokens", "resnet18", "preact_resnet18", "glu"])
def test_the_price_of_all_layers_is_that_of_their_routes(name: str) -> None:
    """`prices` walks the graph once for all layers; here each walks its own route. They agree to the last entry."""
    shapes = {"residual": (2, 8, 8), "tokens": (4, 5), "glu": (5,)}
    builds: dict[str, Any] = {"residual": Residual, "tokens": Tokens, "glu": lambda: Function(ELEMENTWISE["glu"])}
    build = builds.get(name, lambda: hd.networks.build(name, activation="silu", num_classes=3, width=2))
    model = seeded(build)
    x = torch.randn(3, *shapes.get(name, (3, 8, 8)), dtype=torch.float64)
    batch = Linearisation(hd.Objective(model), x, torch.tensor([0, 1, 2]))
    sites, begins = exact._bent(batch), starts(batch)
    for start, found in zip(begins, prices(batch.graph, begins, [site for _, site in sites])):
        route = Route(batch.graph, [(start.node, 0)], sites, {})
        assert found == (walked(route) if route.sites else Price(0.0, 0, 0, 0))


def walked(route: Route) -> Price:
    """What one direction of every sample takes on its way."""
    work, peak, alive = 0.0, 0, dict[tuple[int, int], int]()
    for stop in route.stops:
        for _, key, shape in stop.outputs:
            alive[key] = shape.numel()
            work += alive[key] * fan_of(stop.node) if stop.node is not route.starts[0][0] else 0.0
        peak = max(peak, sum(alive.values()))
        for key in stop.ends:
            alive.pop(key, None)
    sites = sum(site.c.numel() for _, site in route.sites)
    return Price(work + 4.0 * sites, peak, sites, len(route.nodes) - 1)


def test_the_price_is_found_by_walking_the_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per node, however many layers there are; a deep net of small layers is no work for a pass per layer."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.3 * torch.tanh(self.inner(x))

    counts = []
    for depth in (30, 120):
        model = nn.Sequential(*[Block() for _ in range(depth)], nn.Linear(4, 3)).double()
        batch = Linearisation(hd.Objective(model), torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
        calls = 0
        original = price.fan_of

        def counted(node: Any, original: Any = original) -> int:
            nonlocal calls
            calls += 1
            return original(node)

        monkeypatch.setattr(price, "fan_of", counted)
        cost = exact.cost(batch)
        monkeypatch.setattr(price, "fan_of", original)
        counts.append(calls)
        assert cost.effort > cost.flops
    assert counts[1] <= 4.5 * counts[0]
