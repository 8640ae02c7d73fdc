"""RCT-AF against mpmath: values in every dtype, derivatives by every route, memory."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from hessdiag.activations import MAX_BETA, RCTAF, RCTFunction, rct, rct_d1, rct_d2
from hessdiag.activations.coefficients import sigmoid_polynomial, stirling_second
from hessdiag.activations.rct import derivative
from hessdiag.errors import ConfigurationError, DtypeError

# t = alpha·x: around 0, through the bend, into the tails where exp underflows, up to the largest promised.
TS = [0.0] + [
    sign * t
    for t in (1e-30, 1e-8, 1e-3, 0.1, 0.5, 1.0, 1.5, 2.4, 4.0, 8.0, 17.0, 20.5, 44.0, 87.0, 104.0, 127.0)
    + (130.0, 256.0, 300.0, 700.0, 745.0, 1023.0, 1025.0, 3000.0, 9990.0, 1e4)
    for sign in (1, -1)
]
EPS = {torch.float64: 2.2e-16, torch.float32: 1.2e-7, torch.float16: 9.8e-4, torch.bfloat16: 7.9e-3}


def reference(x: float, alpha: float, beta: int, top: int) -> list[mp.mpf]:
    """The derivatives up to order `top`, from the Taylor series of the sigmoid and the recursion f -> f'·x."""
    with mp.workdps(60):
        t = mp.mpf(alpha) * mp.mpf(x)
        count = top + beta
        series = [1 / (1 + mp.exp(-t))]
        for n in range(count):  # s' = s - s²
            square = mp.fsum(series[i] * series[n - i] for i in range(n + 1))
            series.append((series[n] - square) / (n + 1))
        softplus = mp.log1p(mp.exp(-abs(t))) + max(t, mp.mpf(0))
        d = [softplus / alpha] + [series[n] * mp.factorial(n) * mp.mpf(alpha) ** n for n in range(count)]
        for _ in range(beta):  # (x f')^(m) = x f^(m+1) + m f^(m)
            d = [x * d[m + 1] + m * d[m] for m in range(len(d) - 1)]
        return d[: top + 1]


def points(alpha: float, dtype: torch.dtype) -> Tensor:
    x = (torch.tensor(TS, dtype=torch.float64) / alpha).to(dtype)
    x = x[x.isfinite()]
    return x[(x.double() * alpha).abs() <= 1e4]


def worst_error(x: Tensor, y: Tensor, alpha: float, beta: int, order: int) -> float:
    """Largest error relative to the natural scale: |x| + 1/alpha, or the derivative's largest value."""
    assert y.isfinite().all()
    truth = [reference(float(v), alpha, beta, order)[order] for v in x.double()]
    top = max(1.0 if order == 1 else 0.0, *(float(abs(v)) for v in truth))
    scales = x.double().abs() + 1 / alpha if order == 0 else torch.full_like(x.double(), top)
    return max(float(abs(mp.mpf(float(a)) - b)) / float(s) for a, b, s in zip(y.double(), truth, scales))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_values_agree_with_mpmath_in_every_dtype(dtype: torch.dtype, beta: int) -> None:
    for alpha in (1.0, 14.0, 0.037, 1e3):
        x = points(alpha, dtype)
        for order, f in enumerate((rct, rct_d1, rct_d2)):
            y = f(x, alpha, beta)
            assert y.dtype == dtype
            assert worst_error(x, y, alpha, beta, order) < 6 * EPS[dtype]


@pytest.mark.parametrize("beta", [0, 1, 2, 4, 7, 11, MAX_BETA])
def test_second_derivative_of_large_beta(beta: int) -> None:
    x = torch.cat([points(2.0, torch.float64), torch.linspace(-40, 40, 81, dtype=torch.float64)])
    assert worst_error(x, rct_d2(x, 2.0, beta), 2.0, beta, 2) < 1e-10
    assert worst_error(x, rct_d2(x.float(), 2.0, beta), 2.0, beta, 2) < 1e-4


@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_extreme_alpha_and_extreme_inputs_stay_finite(beta: int) -> None:
    for alpha, dtype in (
        (1e12, torch.float32),
        (1e35, torch.float32),
        (1e-35, torch.float32),
        (1e4, torch.float16),
    ):
        x = points(alpha, dtype)
        assert worst_error(x, rct_d1(x, alpha, beta), alpha, beta, 1) < 6 * EPS[dtype]
    far = torch.tensor([-3e38, 3e38, -1e30, 1e30])  # alpha·x overflows
    assert torch.equal(rct(far, 50.0, beta), far.clamp(min=0))
    assert torch.equal(rct_d1(far, 50.0, beta), (far > 0).float())
    assert torch.equal(rct_d2(far, 50.0, beta), torch.zeros(4))
    assert rct(torch.tensor([float("nan")]), 1.0, beta).isnan().all()


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_closed_forms_as_printed(beta: int) -> None:
    """E[1] to E[6] of the paper, where they do not overflow."""
    x, a = torch.linspace(-2, 2, 101, dtype=torch.float64), 5.0
    t, e = a * x, torch.exp(a * x)
    bend2 = (t - 1) * (t - 4) * e**2 - 4 * (t**2 - 2) * e + (t + 1) * (t + 4)
    printed = [
        (torch.log(1 + e) / a, a / e / (1 + 1 / e) ** 2),
        (x / (1 + 1 / e), a * e * (e * (2 - t) + t + 2) / (e + 1) ** 3),
        ((e**2 + (t + 1) * e) * x / (e**2 + 2 * e + 1), a * e * bend2 / (e + 1) ** 4),
    ][beta]
    torch.testing.assert_close(rct(x, a, beta), printed[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rct_d2(x, a, beta), printed[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", range(6))
def test_second_derivative_is_even_and_alpha_is_a_change_of_coordinates(beta: int) -> None:
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    torch.testing.assert_close(rct_d2(x, 3.0, beta), rct_d2(-x, 3.0, beta), rtol=0, atol=1e-11)
    torch.testing.assert_close(rct(x, 3.0, beta), rct(3.0 * x, 1.0, beta) / 3.0, rtol=1e-13, atol=1e-13)
    step = 1e-3  # the integral of sigma'' is 1 for each member
    grid = torch.arange(-40, 40, step, dtype=torch.float64)
    assert float(rct_d2(grid, 3.0, beta).sum() * step) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_autograd_once_twice_and_three_times(beta: int) -> None:
    x = points(14.0, torch.float64).requires_grad_()
    y = rct(x, 14.0, beta)
    for order in (1, 2, 3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert worst_error(x.detach(), y.detach(), 14.0, beta, order) < 3e-14


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_gradcheck(beta: int) -> None:
    x = torch.tensor([-1.3, -0.4, 0.0, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: rct(z, 3.0, beta), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        lambda z: rct(z, 3.0, beta), x, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def reverse(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: grad(lambda z: f(z).sum())(x)


def forward(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("function", [rct, RCTFunction.apply])
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_every_nesting_of_forward_and_reverse_mode(beta: int, function: Callable[..., Tensor]) -> None:
    """Second order in all four orders, third in all eight, at the kink, in the bend and in the tails."""
    x = torch.tensor([-300.0, -2.0, -0.3, 0.0, 1e-9, 0.2, 1.0, 300.0], dtype=torch.float64)
    f = lambda z: function(z, 3.0, beta)  # noqa: E731
    for order in (1, 2, 3):
        expected = derivative(x, 3.0, beta, order)
        assert float(expected.abs().max()) > 0.5  # a silent zero cannot pass
        for nesting in itertools.product((reverse, forward), repeat=order):
            g = f
            for transform in nesting:
                g = transform(g)
            torch.testing.assert_close(g(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_vmap_and_batched_gradients(beta: int) -> None:
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    f = lambda z: rct(z, 3.0, beta)  # noqa: E731
    torch.testing.assert_close(vmap(grad(grad(f)))(x), rct_d2(x, 3.0, beta))
    torch.testing.assert_close(vmap(f, in_dims=1, out_dims=1)(x.view(1, 7)), f(x).view(1, 7))
    z = x.clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(f(z), z, torch.eye(7, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(jacobian, torch.diag(rct_d1(x, 3.0, beta)))


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_dual_numbers_over_reverse_mode(beta: int) -> None:
    """Forward over reverse with torch.autograd alone."""
    x = torch.tensor([-1.0, -0.1, 0.0, 0.4], dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        (slope,) = torch.autograd.grad(rct(dual, 3.0, beta).sum(), dual)
        primal, tangent = forward_ad.unpack_dual(slope)
    torch.testing.assert_close(primal, rct_d1(x, 3.0, beta))
    torch.testing.assert_close(tangent, rct_d2(x, 3.0, beta))


def saved_bytes(f: Callable[[Tensor], Tensor], x: Tensor) -> list[int]:
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f(x)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_one_tensor_like_silu_for_every_beta(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    silu = saved_bytes(nn.SiLU(), x)
    assert silu == [x.numel() * x.element_size()]
    for beta in range(MAX_BETA + 1):
        assert saved_bytes(RCTAF(14.0, beta), x) == silu


def test_the_graph_node_tells_what_it_is() -> None:
    x = torch.zeros(2, requires_grad=True)
    node = rct(x, 14.0, 2).grad_fn
    assert node is not None
    assert (node.alpha, node.beta, node.order) == (14.0, 2, 0)  # type: ignore[attr-defined]
    assert node.saved_tensors[0] is x  # type: ignore[attr-defined]
    assert type(node).__name__ == "RCTFunctionBackward"


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_layouts_shapes_and_autocast(beta: int) -> None:
    act = RCTAF(3.0, beta)
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = act(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert g.is_contiguous(memory_format=torch.channels_last)
    for shape in ((0,), (0, 3), (), (1,)):
        z = torch.ones(shape, requires_grad=True)
        assert act(z).shape == shape
        assert torch.autograd.grad(act(z).sum(), z)[0].shape == shape
    strided = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))[::2, ::3]
    torch.testing.assert_close(act(strided), act(strided.contiguous()))
    linear = nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = act(linear(torch.ones(2, 3)))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_half_gradients_are_rounded_once(beta: int) -> None:
    """The slope multiplies in float32: the gradient is right to half a step of float16."""
    x = torch.linspace(-1, 1, 41).half().requires_grad_()
    g = torch.linspace(0.1, 7, 41).half()
    (got,) = torch.autograd.grad(rct(x, 14.0, beta), x, g)
    exact = rct_d1(x.detach().double(), 14.0, beta) * g.double()
    assert got.dtype == torch.float16
    assert (
        float(((got.double() - exact) / exact.abs().clamp(min=1e-3)).abs().max())
        < 0.51 * EPS[torch.float16] + 1e-5
    )


@pytest.mark.parametrize("beta", [0, 2])
def test_compiles_as_one_graph(beta: int) -> None:
    act = RCTAF(14.0, beta)
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    x = torch.linspace(-3, 3, 31, dtype=torch.float64, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, act(x), rtol=1e-14, atol=1e-14)
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, act.d1(x.detach()), rtol=0, atol=1e-13)


def test_module_is_configuration_only() -> None:
    act = RCTAF(alpha=7, beta=2)
    assert isinstance(act.alpha, float)
    assert [*act.state_dict(), *act.parameters(), *act.buffers()] == []
    x = torch.linspace(-2, 2, 9)
    for twin in (copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        assert torch.equal(twin(x), act(x))
    assert torch.equal(act.d1(x), rct_d1(x, 7.0, 2))
    assert torch.equal(act.d2(x), rct_d2(x, 7.0, 2))
    assert repr(act) == "RCTAF(alpha=7, beta=2)"
    assert repr(RCTAF()) == "RCTAF(alpha=14, beta=1)"


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "14", None, True, torch.tensor(1.0)])
def test_bad_alpha_is_refused(alpha: object) -> None:
    with pytest.raises(ConfigurationError, match="alpha"):
        RCTAF(alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="alpha"):
        rct(torch.ones(1), alpha, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [-1, 1.0, "1", None, True, MAX_BETA + 1])
def test_bad_beta_is_refused(beta: object) -> None:
    with pytest.raises(ConfigurationError, match="beta"):
        RCTAF(beta=beta)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_inputs_that_are_not_real_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match="floating-point"):
        rct(torch.zeros(2, dtype=dtype), 1.0, 1)


def test_coefficients() -> None:
    assert [stirling_second(5, k) for k in range(7)] == [0, 1, 15, 25, 10, 1, 0]
    assert sigmoid_polynomial(2) == (1,)
    assert sigmoid_polynomial(4) == (1, -12)
