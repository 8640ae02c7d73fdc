"""E[7], E[9], E[12]-E[18], E[32], E[33] on whole nets against torch.autograd.functional.hessian over all
parameters.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessdiag.errors import ConfigurationError, TargetError
from theory import losses, shapes
from theory.hessian_diagonal import (
    exact_hessian_diagonal,
    gauss_newton,
    paper_hessian_diagonal,
    started_from_loss,
)
from theory.net import Net, diagonal_net, random_net, run

torch.set_num_threads(1)
TOLERANCE = 1e-10
ACTIVATIONS = [shapes.rct(3.0, 0), shapes.rct(9.0, 1), shapes.rct(6.0, 2), shapes.tanh(), shapes.sine()]


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss with a full, position-dependent Hessian: (Σ_c (f_c - y_c))⁴/4 + Σ_c cosh f_c."""
    return (outputs - targets).sum(1) ** 4 / 4 + torch.cosh(outputs).sum(1)


def reference_loss(kind: str, f: Tensor, y: Tensor) -> Tensor:
    """The same losses by torch's own functions: an oracle that shares nothing with theory.losses."""
    if kind == "half_squared":
        return torch.nn.functional.mse_loss(f, y, reduction="sum") / (2 * len(f))
    if kind == "cross_entropy":
        return torch.nn.functional.cross_entropy(f, y)
    if kind == "bce":
        return torch.nn.functional.binary_cross_entropy_with_logits(f, y, reduction="sum") / len(f)
    return quartic(f, y).mean()


def bound(kind: str, y: Tensor) -> losses.Loss:
    if kind == "quartic":
        return losses.from_callable(quartic, y)
    named = {"half_squared": losses.half_squared, "cross_entropy": losses.cross_entropy}
    return named.get(kind, losses.binary_cross_entropy)(y)


def targets_for(kind: str, n: int, outputs: int, g: torch.Generator) -> Tensor:
    if kind == "cross_entropy":
        return torch.randint(outputs, (n,), generator=g)
    y = torch.randn(n, outputs, generator=g, dtype=torch.float64)
    return (y > 0).to(y.dtype) if kind == "bce" else y


def autograd_diagonal(net: Net, x: Tensor, kind: str, y: Tensor) -> Tensor:
    """Diag of the Hessian over all parameters, W^(1), b^(1), W^(2), ..., through σ alone."""
    shapes_ = [t for w, b in zip(net.weights, net.biases) for t in (w, b) if t is not None]

    def loss(theta: Tensor) -> Tensor:
        parts = list(torch.split(theta, [t.numel() for t in shapes_]))
        h = x
        for l in range(net.depth):
            w, b = parts[2 * l].view_as(net.weights[l]), parts[2 * l + 1]
            z = h @ w.T + b
            h = net.activation.sigma(z)
        return reference_loss(kind, z, y)

    theta = torch.cat([t.reshape(-1) for t in shapes_])
    return torch.autograd.functional.hessian(loss, theta).diagonal()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Net, Tensor, str, Tensor]:
    kind = draw(st.sampled_from(["half_squared", "cross_entropy", "bce", "quartic"]))
    depth = draw(st.integers(1, 7))
    widths = [draw(st.integers(1, 3)) for _ in range(depth)] + [draw(st.integers(1, 3))]
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    net = random_net(
        widths, draw(st.sampled_from(ACTIVATIONS)), generator=g, scale=draw(st.sampled_from([0.5, 1.0, 1.6]))
    )
    x = torch.randn(draw(st.integers(1, 4)), widths[0], generator=g, dtype=torch.float64)
    return net, x, kind, targets_for(kind, len(x), widths[-1], g)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(cases())
def test_exact_diagonal_against_autograd(case: tuple[Net, Tensor, str, Tensor]) -> None:
    """E[9] with the exact D: depth 1 to 7, four losses, scalar and vector outputs, to 1e-10 of the norm."""
    net, x, kind, y = case
    truth = autograd_diagonal(net, x, kind, y)
    split = exact_hessian_diagonal(net, x, bound(kind, y))
    scale = torch.maximum(truth.norm(), split.gauss_newton.vector().norm())
    assert float((split.total.vector() - truth).norm()) <= TOLERANCE * float(scale)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(cases())
def test_paper_diagonal_is_exact_from_the_top_two_hidden_layers_up(
    case: tuple[Net, Tensor, str, Tensor],
) -> None:
    """E[32], E[33] = E[7]: exact for the output layer and hidden layers l >= L-2, for any loss and number
    of outputs.
    """
    net, x, kind, y = case
    exact = exact_hessian_diagonal(net, x, bound(kind, y)).total
    scale = float(exact.vector().norm())
    for form in ("E32", "E33"):
        paper = paper_hessian_diagonal(net, x, bound(kind, y), form=form).total
        for l in range(max(0, net.depth - 3), net.depth):
            assert float((paper.weights[l] - exact.weights[l]).norm()) <= TOLERANCE * scale
            bias, truth = paper.biases[l], exact.biases[l]
            assert bias is not None
            assert truth is not None
            assert float((bias - truth).norm()) <= TOLERANCE * scale


@pytest.mark.parametrize("kind", ["half_squared", "cross_entropy"])
def test_paper_diagonal_is_wrong_below(kind: str) -> None:
    """With five hidden layers the lower entries are off; both printed forms agree with each other."""
    g = torch.Generator().manual_seed(3)
    net = random_net([4, 6, 6, 6, 6, 6, 3], shapes.rct(14.0, 1), generator=g, scale=1.5)
    x = torch.randn(20, 4, generator=g, dtype=torch.float64)
    loss = bound(kind, targets_for(kind, 20, 3, g))
    exact = exact_hessian_diagonal(net, x, loss)
    recursion, paths = (paper_hessian_diagonal(net, x, loss, form=f) for f in ("E32", "E33"))
    for l in range(3):
        a, b = recursion.functional.weights[l], exact.functional.weights[l]
        assert float((a - b).norm() / b.norm()) > 0.02
        assert torch.allclose(a, paths.functional.weights[l], rtol=1e-9)
    assert torch.equal(recursion.gauss_newton.vector(), exact.gauss_newton.vector())


def test_one_hidden_layer_is_e12_to_e18() -> None:
    """E[12], E[15], E[18] written out with indices."""
    g = torch.Generator().manual_seed(0)
    act = shapes.rct(4.0, 2)
    net = random_net([3, 4, 1], act, generator=g)
    x = torch.randn(1, 3, generator=g, dtype=torch.float64)
    y = torch.randn(1, generator=g, dtype=torch.float64)
    total = exact_hessian_diagonal(net, x, losses.half_squared(y)).total
    trace = run(net, x)
    residual = float(trace.outputs[0, 0] - y[0])
    for i in range(4):
        z, w2 = trace.z[1][0, i], net.weights[1][0, i]
        bias = (w2 * act.d1(z)) ** 2 + residual * w2 * act.d2(z)  # E[18]
        assert torch.isclose(total.biases[0][i], bias, rtol=1e-12)  # type: ignore[index]
        assert torch.isclose(total.weights[1][0, i], trace.h[1][0, i] ** 2, rtol=1e-12)  # E[12]
        for j in range(3):
            assert torch.isclose(total.weights[0][i, j], bias * x[0, j] ** 2, rtol=1e-12)  # E[15]
    assert float(total.biases[1][0]) == 1.0  # type: ignore[index]


def test_amplification_by_the_residual() -> None:
    """A.5: with one output and ½(f - y)² the σ'' part scales with f - y; the Gauss-Newton part does not."""
    g = torch.Generator().manual_seed(1)
    net = random_net([3, 4, 4, 4, 1], shapes.rct(6.0, 1), generator=g)
    x = torch.randn(1, 3, generator=g, dtype=torch.float64)
    f = run(net, x).outputs
    near, far = (exact_hessian_diagonal(net, x, losses.half_squared(f - r)) for r in (0.5, 5.0))
    assert torch.allclose(far.functional.vector(), 10 * near.functional.vector(), rtol=1e-12)
    assert torch.equal(far.gauss_newton.vector(), near.gauss_newton.vector())


def relative_top_error(net: Net, x: Tensor, loss: losses.Loss) -> float:
    """Relative error of `started_from_loss` in the weights of the top hidden layer."""
    started = started_from_loss(net, x, loss).weights[net.depth - 2]
    exact = exact_hessian_diagonal(net, x, loss).total.weights[net.depth - 2]
    return float((started - exact).norm() / exact.norm())


def test_starting_from_the_loss_is_worse() -> None:
    """D^(L) = diag ∇²ℓ: top hidden layer exact for a diagonal ∇²ℓ, in no hidden layer for softmax; worse
    than E[32].
    """
    g = torch.Generator().manual_seed(8)
    net = random_net([4, 6, 6, 6, 5], shapes.rct(14.0, 1), generator=g)
    x = torch.randn(30, 4, generator=g, dtype=torch.float64)
    squared = bound("half_squared", targets_for("half_squared", 30, 5, g))
    softmax = bound("cross_entropy", targets_for("cross_entropy", 30, 5, g))
    assert relative_top_error(net, x, squared) < TOLERANCE
    assert relative_top_error(net, x, bound("bce", targets_for("bce", 30, 5, g))) < TOLERANCE
    assert relative_top_error(net, x, softmax) > 1e-3
    for loss in (squared, softmax):
        exact = exact_hessian_diagonal(net, x, loss).total.weights
        started = started_from_loss(net, x, loss).weights
        paper = paper_hessian_diagonal(net, x, loss).total.weights
        second = net.depth - 3  # second hidden layer from the top: E[32] exact, this variant not
        assert float((paper[second] - exact[second]).norm() / exact[second].norm()) < TOLERANCE
        assert float((started[second] - exact[second]).norm() / exact[second].norm()) > 1e-3


def test_paper_diagonal_exact_on_diagonal_weights() -> None:
    g = torch.Generator().manual_seed(2)
    net = diagonal_net(random_net([3, 4, 4, 4, 4, 2], shapes.rct(5.0, 2), generator=g))
    x = torch.randn(9, 3, generator=g, dtype=torch.float64)
    loss = losses.cross_entropy(torch.randint(2, (9,), generator=g))
    a, b = (form(net, x, loss).total.vector() for form in (paper_hessian_diagonal, exact_hessian_diagonal))
    assert float((a - b).norm()) <= TOLERANCE * float(b.norm())


@pytest.mark.parametrize("kind", ["half_squared", "cross_entropy", "bce"])
def test_closed_form_losses_against_autograd(kind: str) -> None:
    g = torch.Generator().manual_seed(4)
    f = 3 * torch.randn(6, 4, generator=g, dtype=torch.float64)
    y = targets_for(kind, 6, 4, g)
    found = bound(kind, y)(f)
    truth = losses.from_callable(
        lambda o, t: torch.stack([reference_loss(kind, o[n : n + 1], t[n : n + 1]) for n in range(len(o))]), y
    )(f)
    for a, b in zip((found.value, found.gradient, found.hessian), (truth.value, truth.gradient, truth.hessian)):
        assert float((a - b).norm()) <= 1e-13 * max(1.0, float(b.norm()))


def test_gauss_newton_part_is_delta_squared_for_the_papers_loss() -> None:
    g = torch.Generator().manual_seed(6)
    net = random_net([2, 3, 3, 1], shapes.tanh(), generator=g)
    x = torch.randn(5, 2, generator=g, dtype=torch.float64)
    parts = gauss_newton(net, x, losses.half_squared(torch.zeros(5, dtype=torch.float64)))
    z = run(net, x).z
    v = z[2].clone().requires_grad_(True)
    (delta,) = torch.autograd.grad((net.activation.sigma(v) @ net.weights[2].T).sum(), v)
    assert torch.allclose(parts[1], delta**2, rtol=1e-12)
    assert torch.equal(parts[2], torch.ones(5, 1, dtype=torch.float64))


def test_refusals() -> None:
    net = random_net([2, 3, 2], shapes.tanh(), generator=torch.Generator().manual_seed(0))
    x = torch.ones(4, 2, dtype=torch.float64)
    with pytest.raises(TargetError, match="do not fit outputs"):
        exact_hessian_diagonal(net, x, losses.half_squared(torch.zeros(4)))
    with pytest.raises(TargetError, match=r"outside 0\.\.1"):
        exact_hessian_diagonal(net, x, losses.cross_entropy(torch.tensor([0, 1, 2, 0])))
    with pytest.raises(ConfigurationError, match="one per sample"):
        exact_hessian_diagonal(net, x, losses.from_callable(lambda f, y: f.sum(), torch.zeros(4)))
    with pytest.raises(ConfigurationError, match="E33"):
        paper_hessian_diagonal(net, x, losses.half_squared(torch.zeros(4, 2)), form="E31")
