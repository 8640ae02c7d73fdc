"""sup |sigma''| against closed forms, dense grids and functions whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hessdiag.activations import RCTAF, REGISTRY, Curvature, alpha_for, build, curvature, max_curvature, rct, rct_d2
from hessdiag.activations.supremum import supremum
from hessdiag.errors import ConfigurationError, NonFiniteError

INF = float("inf")

# Maxima of |sigma''| by calculus: tanh 4/(3√3) at ±atanh(1/√3), sigmoid √3/18 at ±ln(2+√3), GELU √(2/π) at 0.
KNOWN = {
    "silu": (0.5, (0.0,)),
    "swish": (0.5, (0.0,)),
    "gelu": (math.sqrt(2 / math.pi), (0.0,)),
    "gelu:approximate=tanh": (math.sqrt(2 / math.pi), (0.0,)),
    "softplus": (0.25, (0.0,)),
    "softplus:beta=14": (3.5, (0.0,)),
    "tanh": (4 / (3 * math.sqrt(3)), (-math.atanh(1 / math.sqrt(3)), math.atanh(1 / math.sqrt(3)))),
    "sigmoid": (math.sqrt(3) / 18, (-math.log(2 + math.sqrt(3)), math.log(2 + math.sqrt(3)))),
    "elu": (1.0, (0.0,)),
    "relu": (INF, (0.0,)),
    "leaky_relu": (INF, (0.0,)),
    "leaky_relu:negative_slope=0.999": (INF, (0.0,)),
    "elu:alpha=0.99": (INF, (0.0,)),
    "selu": (INF, (0.0,)),
    "softplus:threshold=2": (INF, (2.0,)),
    "rct:beta=0,alpha=28": (7.0, (0.0,)),
    "rct:beta=1,alpha=14": (7.0, (0.0,)),
    "rct:beta=2,alpha=7": (7.0, (0.0,)),
}


@pytest.mark.parametrize("spec", KNOWN)
def test_registry_members(spec: str) -> None:
    value, at = KNOWN[spec]
    found = curvature(spec)
    assert found.value == pytest.approx(value, rel=1e-9)
    assert found.at == pytest.approx(at, rel=1e-6, abs=1e-9)
    assert max_curvature(spec) == found.value
    assert curvature(build(spec)) == found


def test_every_registry_member_has_an_answer() -> None:
    assert {name for name in REGISTRY if math.isinf(max_curvature(name))} == {"relu", "leaky_relu", "selu"}


def test_mish_is_not_what_the_paper_lists() -> None:
    """Table 1 of arXiv 2603.23860 lists 0.362; an independent search over the closed form finds 0.6442."""

    def minus_bend(x: float) -> float:
        with torch.enable_grad():
            z = torch.tensor(x, dtype=torch.float64, requires_grad=True)
            y = z * torch.tanh(torch.log1p(torch.exp(z)))
            (slope,) = torch.autograd.grad(y, z, create_graph=True)
            return -abs(float(torch.autograd.grad(slope, z)[0]))

    best = optimize.minimize_scalar(minus_bend, bounds=(-1, 1), method="bounded", options={"xatol": 1e-10})
    found = curvature("mish")
    assert found.value == pytest.approx(-best.fun, rel=1e-10)
    assert found.at == pytest.approx((best.x,), abs=1e-6)
    assert (round(found.value, 4), round(found.at[0], 4)) == (0.6442, -0.0879)


@pytest.mark.parametrize("beta", range(9))
def test_rct_members_against_a_dense_grid(beta: int) -> None:
    x = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    dense = float(rct_d2(x, 1.0, beta).abs().max())
    for alpha in (1.0, 14.0, 0.01):
        act = RCTAF(alpha, beta)
        assert act.max_curvature == pytest.approx(alpha * dense, rel=1e-6)
        assert curvature(act).value == act.max_curvature
        for place in curvature(act).at:
            here = float(act.d2(torch.tensor(place, dtype=torch.float64)).abs())
            assert here == pytest.approx(act.max_curvature, rel=1e-9)
    numerical = supremum(lambda z: rct(z, 14.0, beta))
    assert numerical.value == pytest.approx(14 * dense, rel=1e-6)


@pytest.mark.parametrize("beta", [0, 1, 2, 3, 5])
def test_alpha_for_is_the_inverse(beta: int) -> None:
    alpha = alpha_for(max_curvature=7.0, beta=beta)
    assert RCTAF(alpha, beta).max_curvature == pytest.approx(7.0, rel=1e-14)
    if beta <= 2:
        assert alpha == 28 / 2**beta
    for bad in (0.0, -1.0, INF, float("nan"), "7"):
        with pytest.raises(ConfigurationError, match="max_curvature"):
            alpha_for(max_curvature=bad, beta=beta)  # type: ignore[arg-type]


CALLABLES: dict[str, tuple[Callable[[Tensor], Tensor], float, tuple[float, ...] | None]] = {
    "line": (lambda x: 2 * x, 0.0, (0.0,)),
    "parabola": (lambda x: x**2, 2.0, (0.0,)),
    "squared relu": (lambda x: F.relu(x) ** 2, 2.0, (0.0,)),
    "cubic": (lambda x: x**3, INF, (-INF, INF)),
    "exponential": (torch.exp, INF, (INF,)),
    "cusp": (lambda x: x.abs() ** 1.5, INF, (0.0,)),
    "sine": (torch.sin, 1.0, None),
    "asinh": (torch.asinh, 2 / (3 * math.sqrt(3)), (-math.sqrt(0.5), math.sqrt(0.5))),
    "narrow": (lambda x: F.silu(1e6 * x) / 1e6, 5e5, (0.0,)),
    "wide": (lambda x: F.silu(1e-3 * x) / 1e-3, 5e-4, (0.0,)),
    "shifted": (lambda x: F.silu(50 * (x - 5.123)) / 50, 25.0, (5.123,)),
    "far": (lambda x: F.silu(x - 300), 0.5, (300.0,)),
    "hardswish": (F.hardswish, INF, (-3.0, 3.0)),
    "hardtanh": (F.hardtanh, INF, (-1.0, 1.0)),
    "relu6": (F.relu6, INF, (0.0, 6.0)),
    "hidden kink": (lambda x: rct(x, 50.0, 2) + 1e-3 * (x - 3.3).abs(), INF, (3.3,)),
    "far kink": (lambda x: F.relu(x - 777.7), INF, (777.7,)),
    "steps": (torch.sign, INF, (0.0,)),
    "celu": (F.celu, 1.0, (0.0,)),
    "softsign": (F.softsign, 2.0, (0.0,)),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_arbitrary_functions(name: str) -> None:
    function, value, at = CALLABLES[name]
    found = curvature(function)
    assert found.value == pytest.approx(value, rel=1e-9, abs=1e-12)
    if at is not None:
        assert found.at == pytest.approx(at, rel=1e-6, abs=1e-6)


# By calculus: w² for sin(wx), w² 4/(3√3) for tanh(wx), w² √3/18 for sigmoid(wx), 2w for exp(-wx²), w √(2/π) for gelu(wx)/w.
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    **{f"sin({w}x)": (lambda x, w=w: torch.sin(w * x), w * w) for w in (11, 14, 15, 25, 30, 31, 45, 50, 100)},
    "cos(30x)": (lambda x: torch.cos(30 * x), 900),
    "sine of turns": (lambda x: torch.sin(2 * math.pi * 7 * x + 0.3), (14 * math.pi) ** 2),
    "sine of a large sum": (lambda x: torch.sin(100 * (x + 1000)), 1e4),
    "snake": (lambda x: x + torch.sin(15 * x) ** 2 / 15, 30),
    "far step": (lambda x: torch.tanh(40 * (x - 77)), 1600 * 4 / (3 * math.sqrt(3))),
    "far step, one product": (lambda x: torch.tanh(40 * x - 40 * 77), 1600 * 4 / (3 * math.sqrt(3))),
    "far steep step": (lambda x: torch.tanh(1e6 * (x + 77)), 1e12 * 4 / (3 * math.sqrt(3))),
    "far wide step": (lambda x: torch.tanh((x - 9000) / 50), 4 / (3 * math.sqrt(3)) / 2500),
    "far sigmoid": (lambda x: torch.sigmoid(-40 * (x - 77)), 1600 * math.sqrt(3) / 18),
    "far gelu": (lambda x: F.gelu(50 * (x - 777)) / 50, 50 * math.sqrt(2 / math.pi)),
    "gaussian": (lambda x: torch.exp(-1600 * (x - 10 / 3) ** 2), 3200),
    "steep softplus": (lambda x: F.softplus(x, beta=1e6), 2.5e5),
    "identity of two": (lambda x: F.relu(x) - F.relu(-x), 0),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_have_a_finite_supremum(name: str) -> None:
    """However rounding of x, or of numbers on the way, makes sigma' jump where it is near 0."""
    function, value = SMOOTH[name]
    assert curvature(function).value == pytest.approx(value, rel=1e-9, abs=1e-12)


KINKS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    "sine of |x|": (lambda x: torch.sin(30 * x.abs()), (0.0,)),
    "slow sine": (lambda x: torch.sin(3 * x) + 1e-4 * F.relu(x - 3), (3.0,)),
    "sine": (lambda x: torch.sin(30 * x) + 1e-4 * F.relu(x + 3.3), (-3.3,)),
    "fast sine": (lambda x: torch.sin(100 * x) + 1e-3 * F.relu(x - 23), (23.0,)),
    "sine, farther": (lambda x: torch.sin(30 * x) + 1e-4 * F.relu(x - 50), (50.0,)),
    "slow sine, far": (lambda x: torch.sin(3 * x) + 1e-3 * F.relu(x + 400), (-400.0,)),
    "beside a far step": (lambda x: torch.tanh(40 * (x - 77)) + 1e-2 * F.relu(x - 77.01), (77.01,)),
    "on a step": (lambda x: torch.tanh(x) + 1e-5 * F.relu(x - 3), (3.0,)),
    "on a bend of half a million": (lambda x: F.silu(1e6 * x) / 1e6 + 1e-6 * x.abs(), (0.0,)),
    "shifted": (lambda x: F.relu(x + 1000), (-1000.0,)),
    "slight": (lambda x: F.leaky_relu(x - 3.3, 1 - 1e-6), (3.3,)),
    "narrow": (lambda x: F.hardtanh(1e6 * x) / 1e6, (-1e-6, 1e-6)),
    "steps on a sine": (lambda x: torch.sin(3 * x) + 1e-3 * torch.sign(x), (0.0,)),
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_are_found_in_what_bends_and_oscillates(name: str) -> None:
    function, at = KINKS[name]
    found = curvature(function)
    assert found.value == INF
    assert found.at == pytest.approx(at, rel=1e-6, abs=1e-12)


def test_the_highest_of_many_peaks_far_out() -> None:
    """The envelope's top is near x = 35: peaks 0.1 apart, hundreds of which are within a hundredth of the highest."""

    def bend(x: Tensor) -> Tensor:
        e, s, c = torch.exp(-((x / 50) ** 2)), torch.sin(30 * x), torch.cos(30 * x)
        p, q = 1 - 2 * x**2 / 2500, -6 * x / 2500 + 4 * x**3 / 2500**2  # (x e)'/e, (x e)''/e
        return (e * (q * s + 60 * p * c - 900 * x * s)).abs()

    dense = float(bend(torch.linspace(30, 40, 4_000_001, dtype=torch.float64)).max())
    found = max_curvature(lambda x: x * torch.sin(30 * x) * torch.exp(-((x / 50) ** 2)))
    assert found == pytest.approx(dense, rel=1e-8)


class Twice(torch.autograd.Function):
    """SiLU whose second derivative autograd takes to be that of a constant: silently zero."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return F.silu(x)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach()  # type: ignore[attr-defined]
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class Once(Twice):
    """SiLU that autograd refuses to differentiate twice."""

    @staticmethod
    @once_differentiable
    def backward(ctx: object, g: Tensor) -> Tensor:
        return Twice.backward(ctx, g)


@pytest.mark.parametrize("function", [Twice.apply, Once.apply])
def test_second_derivatives_autograd_has_not(function: Callable[[Tensor], Tensor]) -> None:
    assert curvature(function).value == pytest.approx(0.5, rel=1e-6)
    kinked = curvature(lambda x: function(x) + (x - 1).abs())
    assert kinked.value == INF
    assert kinked.at == pytest.approx((1.0,), abs=1e-6)


def test_modules_are_taken_as_they_are_and_left_so() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.scale * x)

    module = Scaled()
    assert max_curvature(module) == pytest.approx(4.5, rel=1e-9)
    assert module.scale.dtype == torch.float32
    assert module.scale.requires_grad
    assert module.training
    assert max_curvature(nn.SiLU) == pytest.approx(0.5)
    assert curvature(nn.PReLU()) == Curvature(INF, (0.0,))


def test_what_has_no_curvature_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="elementwise"):
        curvature(lambda x: torch.softmax(x, 0))
    with pytest.raises(ConfigurationError, match="random"):
        curvature(lambda x: x + torch.rand(x.shape, dtype=x.dtype, generator=GENERATOR))
    with pytest.raises(ConfigurationError, match="elementwise"):
        curvature(lambda x: x.sum())
    with pytest.raises(ConfigurationError, match="failed on a float64 vector"):
        curvature(lambda x: x @ torch.eye(3))
    with pytest.raises(ConfigurationError, match="a name, a module or a function"):
        curvature(3)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="NaN"):
        curvature(torch.log)
    with pytest.raises(NonFiniteError, match="NaN"):  # E[5] as printed, where exp overflows
        curvature(lambda x: (torch.exp(2 * x) + (x + 1) * torch.exp(x)) * x / (torch.exp(x) + 1) ** 2)


GENERATOR = torch.Generator().manual_seed(0)
