"""Exact diagonals against one double-backward product per parameter: layer kinds, affine nodes, losses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from test_operations import TARGETS, agree, products, propagated
from torch import Tensor, nn
from torch.nn import functional as F

from hessdiag.errors import BudgetError, UncoveredModelError
from hessdiag.graph import LayerKind, Linearisation, route
from hessdiag.graph.layers import conv
from hessdiag.kernels import exact_batch as exact
from hessdiag.methods import reference
from hessdiag.problem.objective import Objective


def check(model: nn.Module, x: Tensor, *, outputs: int = 3, loss: object = "cross_entropy", **options: object) -> None:
    """The parts agree to 1e-10 of the norms, in float32 to 1e-5; samples add up; chunks do not matter."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(5)
    if loss == "cross_entropy":
        y = torch.randint(0, outputs, (len(x),), generator=generator)
    else:
        y = torch.rand(len(x), outputs, generator=generator, dtype=torch.float64)
    objective = Objective(model, loss, **options)  # type: ignore[arg-type]
    total, outer, _, _ = reference.batch_diagonal(objective, x, y)
    batch = Linearisation(objective, x, y)
    short = _in_float32(objective, x, y, loss, options)
    for memory in (1 << 28, 1):
        gauss_newton, functional = exact.batch_diagonal(batch, memory=memory)
        for name, wanted in total.items():
            scale = 1e-10 * float(wanted.norm() + outer[name].norm()) + 1e-14
            assert float((gauss_newton[name] - outer[name]).norm()) <= scale, name
            assert float((gauss_newton[name] + functional[name] - wanted).norm()) <= scale, name
            assert float((functional[name] - (wanted - outer[name])).norm()) <= scale, name
    for name, wanted in total.items():
        scale = 1e-5 * float(wanted.norm() + outer[name].norm()) + 1e-7
        assert float((short[0][name] - outer[name]).norm()) <= scale, name
        assert float((short[0][name] + short[1][name] - wanted).norm()) <= scale, name
    each = exact.batch_diagonal(batch, per_sample=True)
    for summed, single in zip((gauss_newton, functional), each):
        for name, value in summed.items():
            assert single[name].shape == (len(x), *value.shape)
            torch.testing.assert_close(single[name].sum(0), value, rtol=1e-10, atol=1e-13)


def _in_float32(
    objective: Objective, x: Tensor, y: Tensor, loss: object, options: dict[str, object]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(Gauss-Newton, functional) of the same model and data in float32."""
    model = copy.deepcopy(objective.model).float()
    targets = y.float() if y.is_floating_point() else y
    single = Objective(model, loss, **options)  # type: ignore[arg-type]
    return exact.batch_diagonal(Linearisation(single, x.float(), targets))


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffle(model: nn.Module, seed: int = 1) -> nn.Module:
    """Running statistics, gains and biases away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(
                noise.abs() + 0.5
                if name.endswith("running_var")
                else noise / max(value.reshape(len(value) if value.ndim else 1, -1).shape[1], 1) ** 0.5
            )
    return model


class Head(nn.Module):
    """layer -> GELU -> layer -> tanh -> mean over positions -> linear: sites at and above the layer under test."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.second, self.fc = first, second, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(F.gelu(self.first(x))))
        return self.fc(h.flatten(2).mean(2) if h.ndim > 2 else h)  # type: ignore[no-any-return]


CONVOLUTIONS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], int]] = {
    "plain 2d": (nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3), (5, 5), 4),
    "strided": (nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 2, stride=(1, 2)), (6, 7), 4),
    "dilated": (
        nn.Conv2d(2, 3, 3, dilation=2, padding=2, bias=False),
        nn.Conv2d(3, 2, (2, 1), dilation=(2, 1)),
        (6, 5),
        2,
    ),
    "grouped": (nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4, padding=1), (5, 5), 4),
    "pointwise": (nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1, groups=1), (4, 3), 4),
    "few positions": (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 1), (4, 4), 3),
    "same padding": (nn.Conv2d(2, 3, 3, padding="same"), nn.Conv2d(3, 2, 3, padding="same", bias=False), (4, 4), 2),
    "1d": (nn.Conv1d(2, 3, 3, stride=2), nn.Conv1d(3, 4, 2, dilation=2), (9,), 4),
    "3d": (nn.Conv3d(2, 3, 2), nn.Conv3d(3, 2, (1, 2, 1), padding=(0, 1, 0)), (3, 3, 3), 2),
}


TRANSPOSED: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], int]] = {
    "2d": (nn.ConvTranspose2d(2, 3, 3), nn.ConvTranspose2d(3, 4, 2, padding=1), (2, 2), 4),
    "strided": (nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 2, 2, stride=(1, 2)), (2, 3), 2),
    "output padding": (
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(3, 2, 2, dilation=3, output_padding=2, bias=False), (2, 2), 2,
    ),
    "dilated": (nn.ConvTranspose2d(2, 3, 2, dilation=2, bias=False), nn.Conv2d(3, 2, 2), (3, 2), 2),
    "grouped": (nn.ConvTranspose2d(2, 4, 2, groups=2, stride=2), nn.ConvTranspose2d(4, 4, 2, groups=2), (2, 2), 4),
    "1d": (nn.ConvTranspose1d(2, 3, 3, stride=2), nn.ConvTranspose1d(3, 4, 2, dilation=2), (3,), 4),
    "3d": (nn.ConvTranspose3d(2, 3, 2), nn.ConvTranspose3d(3, 2, (1, 2, 1), padding=(0, 1, 0)), (2, 1, 2), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name: str) -> None:
    torch.manual_seed(0)
    first, second, shape, width = TRANSPOSED[name]
    model, x = shuffle(Head(first, second, width)), images(2, 2, *shape)
    check(model, x)
    check(model, x, parameters=r"first\.weight|second\.bias")
    agree(propagated(Linearisation(Objective(model), x, TARGETS)), products(model, x), 1e-10)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    torch.manual_seed(0)
    first, second, shape, width = CONVOLUTIONS[name]
    check(shuffle(Head(first, second, width)), images(4, 2, *shape))


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        (nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2), (2, 4, 4)),
        (nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), (2, 4, 4)),
        (nn.BatchNorm1d(5), nn.BatchNorm1d(5), (5,)),
        (nn.BatchNorm1d(3), nn.Conv1d(3, 3, 2), (3, 4)),
        (nn.BatchNorm3d(2), nn.Conv3d(2, 2, 2), (2, 2, 2, 2)),
        (nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 2), (2, 3, 3)),
    ],
)
def test_batch_norm(first: nn.Module, second: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    width = {nn.Conv1d: 3, nn.Conv2d: 3, nn.Conv3d: 2}.get(type(second), 2 if len(shape) > 1 else 5)
    check(shuffle(Head(first, second, width)), images(4, *shape))


class Tokens(nn.Module):
    """Linear layers on the last axis of [N, T, d], mixed over tokens between them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.mix, self.b = nn.Linear(3, 4, bias=bias), nn.Linear(5, 2), nn.Linear(4, 3, bias=bias)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.a(x))
        h = torch.tanh(self.mix(h.transpose(1, 2))).transpose(1, 2)
        return self.fc(F.softplus(self.b(h)).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_tokens(bias: bool) -> None:
    torch.manual_seed(0)
    check(shuffle(Tokens(bias)), images(3, 5, 3))


class Own(nn.Module):
    """Parameters applied by hand: shift, scale, a matrix stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(1, 3, 2)
        self.gain, self.shift = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.ones(1, 3, 3, 3))
        self.matrix, self.lift = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.gelu(self.c(x)) * self.gain + self.shift).mean((2, 3))
        return self.fc(F.silu(h @ self.matrix + self.lift))  # type: ignore[no-any-return]


def test_parameters_applied_by_hand() -> None:
    torch.manual_seed(0)
    check(shuffle(Own()), images(4, 1, 4, 4))


class Middle(nn.Module):
    """convolution -> operation under test -> GELU -> linear."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.operation = nn.Conv2d(1, 4, 2), operation
        with torch.no_grad():
            width = operation(torch.tanh(self.conv(torch.zeros(2, 1, 5, 5)))).flatten(1).shape[1]
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.operation(torch.tanh(self.conv(x)))
        return self.fc(F.gelu(h).flatten(1))  # type: ignore[no-any-return]


def _three_ways(h: Tensor) -> Tensor:
    """A scaled tensor seen through a view, through a convolution, and as a factor."""
    turned = h.reshape(len(h), 4, 2, 8)
    mixed = F.conv2d(h, torch.arange(16.0, dtype=h.dtype).reshape(4, 4, 1, 1) / 20)
    mixed = F.conv2d(2 * mixed, torch.ones(4, 4, 1, 1, dtype=h.dtype) / 5) * mixed
    return torch.cat([turned.reshape(len(h), 4, 4, 4), mixed], 1)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda h: h.reshape(len(h), 2, 2, 16),
    "flatten": lambda h: h.flatten(1),
    "mean": lambda h: h.mean((2, 3)),
    "mean of the last axes": lambda h: h.mean((-1, -2), keepdim=True),
    "sum": lambda h: h.sum(2),
    "sum of a negative axis": lambda h: h.sum(-1, keepdim=True),
    "average pool": lambda h: F.avg_pool2d(h, 2),
    "ragged average pool": lambda h: F.avg_pool2d(h, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average pool 1d": lambda h: F.avg_pool1d(h.flatten(2), 2),
    "average pool 3d": lambda h: F.avg_pool3d(h[:, None], 2),
    "adaptive average pool": lambda h: F.adaptive_avg_pool2d(h, (3, 2)),
    "maximum pool": lambda h: F.max_pool2d(h, 2),
    "overlapping maximum pool": lambda h: F.max_pool2d(h, 3, 1, 1),
    "adaptive maximum pool": lambda h: F.adaptive_max_pool2d(h, 2),
    "amax": lambda h: h.amax(1),
    "maximum": lambda h: torch.maximum(h, 0.3 * h + 0.1),
    "cat": lambda h: torch.cat([h, 2 * h], 1),
    "cat with a constant": lambda h: torch.cat([torch.ones_like(h), h], 2),
    "stack": lambda h: torch.stack([h, h.flip(1)], 1),
    "split": lambda h: h.split(2, 1)[0] - 3 * h.split(2, 1)[1],
    "unbind": lambda h: h.unbind(2)[1] + h.unbind(2)[3],
    "select": lambda h: h[:, 1],
    "slice": lambda h: h[:, 1:3, ::2],
    "index": lambda h: h[:, [2, 0, 2]],
    "index select": lambda h: h.index_select(1, torch.tensor([3, 1])),
    "permute": lambda h: h.permute(0, 2, -1, 1),
    "transpose": lambda h: h.transpose(-1, 1),
    "squeeze": lambda h: h[:, :1].squeeze(1).unsqueeze(-1),
    "expand": lambda h: h.mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "repeat": lambda h: h.repeat(1, 2, 1, 1),
    "zero padding": lambda h: F.pad(h, (1, 0)),
    "reflection padding": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "replication padding": lambda h: F.pad(h, (2, 1, 0, 1), mode="replicate"),
    "nearest upsampling": lambda h: F.interpolate(h, scale_factor=2),
    "bilinear upsampling": lambda h: F.interpolate(h, size=(5, 3), mode="bilinear", align_corners=False),
    "pixel shuffle": lambda h: F.pixel_shuffle(h, 2),
    "flip and roll": lambda h: h.flip(2).roll(1, 3),
    "masked fill": lambda h: h.masked_fill(torch.eye(4, dtype=torch.bool), 0.5),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "cumulative sum": lambda h: h.cumsum(2),
    "unfold": lambda h: F.unfold(h, 2),
    "constants": lambda h: 2 - (3 * h + 1) / 4,
    "scaled sums": lambda h: torch.add(h, h.flip(1), alpha=-2) - torch.sub(h.mean(1, keepdim=True), h, alpha=0.5),
    "reversed subtraction": lambda h: torch.rsub(h, h.roll(1, 1), alpha=3),
    "division by a tensor": lambda h: h / torch.arange(1.0, 5.0, dtype=h.dtype),
    "broadcast sum": lambda h: h + h.mean((2, 3), keepdim=True),
    "broadcast factor": lambda h: h.mean(1, keepdim=True) * torch.arange(1.0, 4.0, dtype=h.dtype)[:, None, None],
    "matrix by einsum": lambda h: torch.einsum("nchw,cd->ndhw", h, torch.arange(8.0, dtype=h.dtype).reshape(4, 2) / 8),
    "frozen linear": lambda h: F.linear(h, torch.arange(8.0, dtype=h.dtype).reshape(2, 4) / 8),
    "frozen transposed convolution": lambda h: F.conv_transpose2d(
        h, torch.ones(4, 2, 2, 2, dtype=h.dtype) / 7, stride=2
    ),
    "clamp": lambda h: h.clamp(-0.4, 0.5),
    "relu6 and leaky": lambda h: F.relu6(h + 0.1) - F.leaky_relu(h, 0.2),
    "hardswish": lambda h: F.hardswish(3 * h),
    "abs": lambda h: h.abs(),
    "square": lambda h: h * h,
    "power": lambda h: (h + 2) ** 3,
    "hand-written swish": lambda h: h * torch.sigmoid(h),
    "gate": lambda h: h * torch.sigmoid(h.flip(1)),
    "broadcast gate": lambda h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
    "gate by a convolution": lambda h: (1.5 * h) * F.conv2d(1.5 * h, torch.ones(4, 4, 1, 1, dtype=h.dtype) / 3),
    "one tensor, three ways": lambda h: _three_ways(1.5 * h),
    "in place": lambda h: F.silu(h * 1.5, inplace=True).mul_(2.0).add_(1.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nodes(name: str) -> None:
    torch.manual_seed(0)
    check(shuffle(Middle(OPERATIONS[name])), images(3, 1, 5, 5))


@pytest.mark.parametrize(
    "name", ["average pool", "cat", "broadcast gate", "scaled sums", "frozen linear", "maximum pool"]
)
def test_rules_against_double_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every closed rule switched off, double backward node by node gives the same functional part."""
    torch.manual_seed(0)
    model = shuffle(Middle(OPERATIONS[name])).double()
    batch = Linearisation(Objective(model), images(3, 1, 5, 5), torch.tensor([0, 2, 1]))
    wanted = exact.batch_diagonal(batch)[1]
    moved: list[str] = []

    def counted(node: object, *rest: object) -> Tensor:
        moved.append(node.name())  # type: ignore[attr-defined]
        return by_double_backward(node, *rest)  # type: ignore[arg-type]

    by_double_backward = route.double_backward
    monkeypatch.setattr(route, "double_backward", counted)
    monkeypatch.setattr(route, "move", lambda *_: None)
    monkeypatch.setattr(route, "factor_of", lambda *_: (False, None))
    found = exact.batch_diagonal(batch)[1]
    assert "TanhBackward0" in moved
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-14)


def saddle(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose Hessian in the outputs is indefinite."""
    return torch.sin(outputs * targets).sum(1) + outputs[:, 0] * outputs[:, 1] - (outputs**3).mean(1)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("cross_entropy", {"label_smoothing": 0.2}),
        ("cross_entropy", {"class_weights": [0.5, 2.0, 1.0]}),
        ("mse", {}),
        ("half_mse", {}),
        ("bce", {}),
        (saddle, {}),
    ],
)
@pytest.mark.parametrize("chain", [True, False])
def test_losses(loss: object, options: dict[str, object], chain: bool) -> None:
    torch.manual_seed(0)
    if chain:
        model: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
        check(shuffle(model), images(5, 4), loss=loss, **options)
    else:
        check(shuffle(Head(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2), 2)), images(4, 1, 4, 4), loss=loss, **options)


def test_chosen_parameters_and_frozen_layers() -> None:
    torch.manual_seed(0)
    model = shuffle(Head(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 2), 2))
    check(model, images(4, 1, 4, 4), parameters=["second.bias", "first.weight"])
    check(model, images(4, 1, 4, 4), parameters="fc.*")
    model.second.requires_grad_(False)  # type: ignore[union-attr]
    check(model, images(4, 1, 4, 4))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(torch.tanh(h - h.mean(0)))  # type: ignore[no-any-return]


def test_samples_that_meet_are_refused() -> None:
    batch = Linearisation(Objective(Mixing().double()), images(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(UncoveredModelError, match="samples of a batch meet"):
        exact.batch_diagonal(batch)


def test_budget_and_progress() -> None:
    torch.manual_seed(0)
    model = Head(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2), 2).double()
    batch = Linearisation(Objective(model), images(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    price = exact.cost(batch)
    assert price.passes > 0
    assert price.flops > 0
    assert price.bytes > 0
    with pytest.raises(BudgetError, match="propagation"):
        exact.batch_diagonal(batch, budget=price.flops / 2)
    seen: list[tuple[int, int]] = []
    exact.batch_diagonal(batch, budget=2 * price.flops, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_graph_serves_twice() -> None:
    torch.manual_seed(0)
    model = Head(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2), 2).double()
    batch = Linearisation(Objective(model), images(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    first, second = exact.batch_diagonal(batch), exact.batch_diagonal(batch)
    for a, b in zip(first, second):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(p.grad is None for p in model.parameters())


def test_biases_alone() -> None:
    """The lowest linear layer then keeps no copy of its weight in the graph."""
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    for model in (nn.Linear(4, 3), shuffle(deep)):
        check(model, images(5, 4), parameters=".*bias")


class LastProduct(nn.Module):
    """A product as the last place that bends: its one factor is also the input of the layer that makes the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 3, 1)
        self.c, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = 1.5 * self.b(torch.tanh(self.a(x)))
        return self.fc((h * self.c(h)).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_site_still_sees_what_its_node_consumes() -> None:
    torch.manual_seed(0)
    check(shuffle(LastProduct()), images(3, 1, 4, 4))


BY_COST = {  # images, weight, stride, padding, dilation, transposed, groups
    "one pixel of many channels": ((6, 5, 1, 1), (4, 5, 1, 1), 1, 0, 1, False, 1),
    "single pixels, one channel": ((6, 1, 3, 3), (4, 1, 1, 1), 1, 0, 1, False, 1),
    "single pixels, few": ((6, 5, 2, 2), (4, 5, 1, 1), 1, 0, 1, False, 1),
    "single pixels, many": ((6, 5, 4, 4), (4, 5, 1, 1), 1, 0, 1, False, 1),
    "single pixels, strided": ((6, 5, 5, 5), (4, 5, 1, 1), 2, 0, 1, False, 1),
    "many small images": ((300, 2, 4, 4), (3, 2, 3, 3), 2, 1, 1, False, 1),
    "many small images, dilated": ((300, 2, 4, 4), (3, 2, 2, 2), 1, 1, 2, False, 1),
    "many small images, transposed": ((300, 2, 4, 4), (2, 3, 3, 3), 2, 1, 1, True, 1),
    "groups": ((300, 2, 4, 4), (4, 1, 3, 3), 1, 1, 1, False, 2),
}


@pytest.mark.parametrize("name", BY_COST)
def test_convolutions_by_what_costs_least_are_convolutions(name: str) -> None:
    """Every way to them against torch's own kernel."""
    shape, kernel, stride, padding, dilation, transposed, groups = BY_COST[name]
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randn(s, dtype=torch.float64, generator=generator) for s in (shape, kernel))
    options = (stride,) * 2, (padding,) * 2, (dilation,) * 2, transposed, (0, 0), groups
    wanted = torch.convolution(a, w, None, *options)
    found = conv.convolved(a, w, options)
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= 1e-13 * float(wanted.norm())


def test_several_columns_at_once_are_one_after_the_other() -> None:
    """`over` of a layer against the sum of `summed`, pass by pass, with signs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(),
        nn.Linear(75, 3),
    )  # fmt: skip
    model = shuffle(model).double().eval()
    batch = Linearisation(Objective(model), images(5, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
    signs = [1.0, -1.0, 1.0]
    for layer in (one.on(batch.samples) for one in batch.layers):
        deltas = [torch.randn(layer.out, dtype=torch.float64) for _ in signs]
        wanted = LayerKind.over(layer, deltas, signs)
        found = layer.over(deltas, signs)
        assert found.keys() == wanted.keys() == set(layer.layer.own)
        for name, value in wanted.items():
            assert float((found[name].reshape(value.shape) - value).norm()) <= 1e-12 * float(value.norm())
