"""RCT-AF against mpmath: values in every dtype, derivatives by every route, memory."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from hessdiag.activations import MAX_BETA, RCTAF, RCTFunction, blocks, rct, rct_d1, rct_d2
from hessdiag.activations.coefficients import sigmoid_polynomial, stirling_second
from hessdiag.activations.formula import closed_form
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
    y = rct(x, 14.0, 2)  # before torch 2.7 a node lives as long as its output
    node = y.grad_fn
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
    assert float(((got.double() - exact) / exact.abs().clamp(min=1e-3)).abs().max()) < 0.51 * EPS[torch.float16] + 1e-5


@pytest.mark.parametrize("beta", [0, 2])
def test_compiles_as_one_graph(beta: int) -> None:
    act = RCTAF(14.0, beta)
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    x = torch.linspace(-3, 3, 31, dtype=torch.float64, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, act(x), rtol=1e-14, atol=1e-14)
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, act.d1(x.detach()), rtol=0, atol=1e-13)


def first_backward(x: Tensor, g: Tensor, alpha: float, beta: int) -> tuple[Tensor, Tensor]:
    """sigma(x) and g·sigma'(x), as training computes them."""
    z = x.detach().requires_grad_()
    y = rct(z, alpha, beta)
    (slope,) = torch.autograd.grad(y, z, g)
    return y.detach(), slope


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_training_sees_the_same_function(beta: int, dtype: torch.dtype) -> None:
    """Value and first backward beside the closed form in float64, through the bend and far into either tail."""
    for alpha in (1.0, 14.0, 0.037, 1e3):
        x = torch.cat([points(alpha, dtype), (torch.linspace(-60, 60, 4001, dtype=torch.float64) / alpha).to(dtype)])
        g = torch.linspace(-3, 3, len(x), dtype=torch.float64).to(dtype)
        y, slope = first_backward(x, g, alpha, beta)
        assert y.dtype == slope.dtype == dtype
        value, first = (closed_form(x.double(), alpha, beta, order) for order in (0, 1))
        off = (y.double() - value).abs() / (x.double().abs() + 1 / alpha)
        assert float(off.max()) < 6 * EPS[dtype]
        bound = 9 if (dtype, beta) == (torch.float32, 1) else 6  # nn.SiLU's own gradient: see below
        off = (slope.double() - g.double() * first).abs() / g.double().abs().clamp(min=1e-3)
        assert float(off.max()) < bound * EPS[dtype] * max(1.0, float(first.abs().max()))


def test_float32_gradient_of_swish_is_as_good_as_that_of_silu() -> None:
    x = torch.linspace(-40, 40, 100_001)
    exact = closed_form(x.double(), 1.0, 1, 1)
    z = x.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(nn.functional.silu(z).sum(), z)
    _, ours = first_backward(x, torch.ones_like(x), 1.0, 1)
    assert float((ours - exact).abs().max()) <= 1.01 * float((theirs - exact).abs().max())


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_left_tail_keeps_its_digits(beta: int) -> None:
    """Relative to the value itself, down to exp(-80): neither the blocks nor their fused kernels cancel there."""
    x = torch.linspace(-80, -2.6, 3001) / 14
    y, slope = first_backward(x, torch.ones_like(x), 14.0, beta)
    for got, order in ((y, 0), (slope, 1)):
        exact = closed_form(x.double(), 14.0, beta, order)
        solid = exact.abs() > 0.1 * closed_form(x.double(), 14.0, 0, order)  # away from the zeros of the derivative
        assert float(((got - exact) / exact).abs()[solid].max()) < 3e-5  # exp(t) turns eps·|t| into a relative error


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_halves_are_computed_in_float32_and_rounded_once(beta: int, dtype: torch.dtype) -> None:
    """Each of all half numbers in a wide range: within half a step of the exact value, and a little of float32's."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[every.isfinite() & (every.abs() < 20) & (every.abs() > 1e-4)]
    for alpha in (0.7, 14.0):
        for got, order in zip(first_backward(x, torch.ones_like(x), alpha, beta), (0, 1)):
            exact = closed_form(x.double(), alpha, beta, order)
            step = 2.0 ** (exact.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()) * torch.finfo(dtype).eps
            own = 2e-5 if (beta, order) == (2, 1) else 2e-6 / min(1.0, alpha)  # t²·(1 - s) in float32, |t| up to 17
            assert bool(((got.double() - exact).abs() <= 0.5001 * step + own).all())


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_blocks_are_one_piece(beta: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, a last block of one entry, more than one thread's share: what a block holds does not matter."""
    generator = torch.Generator().manual_seed(beta)
    for size in (1, 7, 255, 256, 257, 1025):
        x, g = (2 * torch.randn(size, generator=generator).to(dtype) for _ in range(2))
        whole = first_backward(x, g, 14.0, beta)
        monkeypatch.setattr(blocks, "BLOCK", 128)
        parts = first_backward(x, g, 14.0, beta)
        monkeypatch.undo()
        for a, b in zip(whole, parts):  # the ends of vectors are computed by scalar code: the last digits may differ
            torch.testing.assert_close(a, b, rtol=2 * EPS[dtype], atol=4 * EPS[dtype])
        for order in (1, 2):
            torch.testing.assert_close(
                derivative(x, 14.0, beta, order), closed_form(x, 14.0, beta, order), rtol=1e-5, atol=6 * EPS[dtype]
            )


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_memory_formats_in_blocks(beta: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense tensors keep their strides without a copy; gaps, overlaps and gradients of another format come out right."""
    monkeypatch.setattr(blocks, "BLOCK", 64)
    base = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.randn(8, 12, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = {
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.permute(3, 1, 0, 2),
        "offset": wide[3:7].reshape(-1)[13:].view(-1),
        "gaps": wide[::2, ::3],
        "expanded": base[:1, :, :, :1].expand(4, 6, 5, 7),
        "reversed": base.flip(0)[::1],
        "ones": base[:, :, :1, :1].to(memory_format=torch.channels_last),
    }
    for name, x in given.items():
        plain = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        gradients = [plain, torch.ones((), dtype=dtype).expand(x.shape)]
        if x.dim() == 4:
            gradients.append(plain.to(memory_format=torch.channels_last))
        for g in gradients:
            y, slope = first_backward(x, g, 3.0, beta)
            y0, slope0 = first_backward(x.contiguous(), g.contiguous(), 3.0, beta)
            torch.testing.assert_close(y, y0, rtol=2 * EPS[dtype], atol=4 * EPS[dtype], msg=name)
            torch.testing.assert_close(slope, slope0, rtol=2 * EPS[dtype], atol=4 * EPS[dtype], msg=name)
            assert y.stride() == torch.empty_like(x).stride()
            assert slope.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_training_at_the_ends_of_the_range(beta: int, dtype: torch.dtype) -> None:
    """Where alpha·x overflows the function is max(x, 0); NaN stays NaN; extreme alphas take the closed form."""
    x = torch.tensor([-3e38, 3e38, -1e30, 1e30], dtype=dtype)
    for alpha in (50.0, 0.5, 1e12, 1e35):
        y, slope = first_backward(x, torch.full_like(x, 2.0), alpha, beta)
        assert torch.equal(y, x.clamp(min=0))
        assert torch.equal(slope, 2.0 * (x > 0).to(dtype))
    for large in (1e18, 1e19, 1e20, 1e37):  # powers of x overflow before x does, and no other entry warns of it
        z = torch.tensor([-large, large], dtype=dtype)
        y, slope = first_backward(z, torch.full_like(z, 2.0), 14.0, beta)
        assert torch.equal(y, z.clamp(min=0))
        assert slope.tolist() == [0.0, 2.0]
    far = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    y, slope = first_backward(far, torch.ones_like(far), 14.0, beta)
    assert y[0].isnan() and slope[0].isnan() and y[1] == float("inf")
    assert slope[1:].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_defaults_of_torch_change_nothing(beta: int, dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 9).to(dtype)
    expected = first_backward(x, torch.ones_like(x), 14.0, beta)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = first_backward(x, torch.ones_like(x), 14.0, beta)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_double_backward_of_float32_training(beta: int) -> None:
    """With create_graph the first backward is a node of its own, in every type; without it, the same numbers."""
    x = torch.linspace(-2, 2, 301).requires_grad_()
    y = rct(x, 14.0, beta)
    (fast,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(fast, slope.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(second, rct_d2(x.detach(), 14.0, beta), rtol=0, atol=1e-5)


def test_a_traced_module_takes_any_size() -> None:
    traced = torch.jit.trace(RCTAF(14.0, 1), torch.ones(3), check_trace=False)  # type: ignore[no-untyped-call]
    x = torch.linspace(-1, 1, 200_001)
    torch.testing.assert_close(traced(x), rct(x, 14.0, 1))


def test_the_import_leaves_the_compiler_alone() -> None:
    script = "import sys, hessdiag.activations; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


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
