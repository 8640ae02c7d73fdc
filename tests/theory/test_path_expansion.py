"""E[28]-E[33] and the exact forms of `theory.path_expansion` against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessdiag.errors import BudgetError, ConfigurationError, DtypeError, NonFiniteError
from theory import shapes
from theory.error import error_by_layer
from theory.net import Net, diagonal_net, make_net, most_paths, random_net, run
from theory.path_expansion import (
    exact_recursion,
    hessian_matrices,
    pair_sum,
    paper_recursion,
    path_sum,
    site_sum,
)

torch.set_num_threads(1)
TOLERANCE = 1e-10
ACTIVATIONS = [
    *(shapes.rct(alpha, beta) for alpha in (1.0, 7.0) for beta in (0, 1, 2)),
    shapes.rct(30.0, 2),
    shapes.tanh(),
    shapes.sine(),
    shapes.quadratic(0.7),
    shapes.triple(torch.nn.functional.gelu),
    shapes.triple(torch.nn.functional.mish),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def upper_part(net: Net, l: int, z: Tensor) -> Tensor:
    """F as a function of one sample's z^(l), through σ alone: nothing of d1, d2."""
    for w, b in zip(net.weights[l:], net.biases[l:]):
        z = w @ net.activation.sigma(z) + (0 if b is None else b)
    return z


def autograd_matrices(net: Net, x: Tensor, g: Tensor) -> list[Tensor]:
    """∂²(g·f)/∂z^(l)² by torch.autograd.functional.hessian, sample by sample."""
    z = run(net, x).z
    found = []
    for l in range(1, net.depth):
        rows = [
            torch.autograd.functional.hessian(lambda v, l=l, n=n: (upper_part(net, l, v) * g[n]).sum(), z[l][n])
            for n in range(len(x))
        ]
        found.append(torch.stack(rows))
    return found


def assert_close(found: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
    reference = float((truth if scale is None else scale).norm())
    assert float((found - truth).norm()) <= TOLERANCE * reference + 1e-300


@st.composite
def nets(draw: st.DrawFn, *, outputs: int = 3, shallow: int = 1, deep: int = 7) -> tuple[Net, Tensor, Tensor]:
    """A random net of depth L = 1..7 with inputs and a cotangent."""
    depth = draw(st.integers(shallow, deep))
    widths = [draw(st.integers(1, 4)) for _ in range(depth)] + [draw(st.integers(1, outputs))]
    g = generator(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([0.3, 1.0, 2.0]))
    net = random_net(widths, draw(st.sampled_from(ACTIVATIONS)), generator=g, scale=scale)
    x = torch.randn(draw(st.integers(1, 3)), widths[0], generator=g, dtype=torch.float64)
    x = x * draw(st.sampled_from([0.1, 1.0, 3.0]))
    return net, x, torch.randn(len(x), widths[-1], generator=g, dtype=torch.float64)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(nets())
def test_exact_forms_agree_with_autograd_at_every_depth(case: tuple[Net, Tensor, Tensor]) -> None:
    """Matrix recursion, site sum and pair sum against autograd, relative to Σ|contributions| per layer."""
    net, x, g = case
    truth = autograd_matrices(net, x, g)
    magnitude = site_sum_of_magnitudes(net, x, g)
    forms = [exact_recursion(net, x, cotangent=g), site_sum(net, x, cotangent=g)]
    if math.prod(net.widths[1:-1]) <= 64:
        forms.append(pair_sum(net, x, cotangent=g))
    for l, matrix in enumerate(truth, 1):
        for form in forms:
            assert_close(form.layer(l), matrix.diagonal(dim1=1, dim2=2), magnitude[l - 1])
    for found, matrix in zip(hessian_matrices(net, x, cotangent=g), truth):
        assert_close(found, matrix, torch.maximum(matrix.norm(), magnitude[0].norm()))


def site_sum_of_magnitudes(net: Net, x: Tensor, g: Tensor) -> list[Tensor]:
    """Σ |σ'' S| (∂z/∂z)², against which rounding is measured: sites of opposite sign cancel."""
    trace = run(net, x)
    shape = net.activation
    absolute = make_net(net.weights, net.biases, shape)
    found = []
    for l in range(1, net.depth):
        delta = g
        total = torch.zeros_like(trace.z[l])
        sums = {}
        for r in range(net.depth - 1, l - 1, -1):
            s = delta @ absolute.weights[r]
            sums[r] = (trace.curvature[r] * s).abs()
            delta = trace.slope[r] * s
        jacobian = torch.eye(net.widths[l], dtype=x.dtype).expand(len(x), -1, -1)
        for r in range(l, net.depth):
            if r > l:
                jacobian = net.weights[r - 1] @ (trace.slope[r - 1].unsqueeze(2) * jacobian)
            total = total + (sums[r].unsqueeze(2) * jacobian**2).sum(1)
        found.append(total)
    return found


@settings(deadline=None, derandomize=True, max_examples=60)
@given(nets())
def test_paper_forms_agree_with_each_other(case: tuple[Net, Tensor, Tensor]) -> None:
    """E[28] = E[31] = equal pairs on every net; exact - E[31] = different pairs."""
    net, x, g = case
    scale = site_sum_of_magnitudes(net, x, g)
    recursion = paper_recursion(net, x, cotangent=g)
    paths = path_sum(net, x, cotangent=g)
    exact = exact_recursion(net, x, cotangent=g)
    for l in range(1, net.depth):
        reference = torch.maximum(scale[l - 1].norm(), (recursion.layer(l) - exact.layer(l)).norm())
        assert_close(paths.layer(l), recursion.layer(l), reference)
    if math.prod(net.widths[1:-1]) <= 64:
        equal = pair_sum(net, x, cotangent=g, pairs="equal")
        different = pair_sum(net, x, cotangent=g, pairs="different")
        for l in range(1, net.depth):
            reference = torch.maximum(scale[l - 1].norm(), different.layer(l).norm())
            assert_close(equal.layer(l), recursion.layer(l), reference)
            assert_close(different.layer(l), exact.layer(l) - recursion.layer(l), reference)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(nets())
def test_paper_is_exact_in_the_top_two_hidden_layers(case: tuple[Net, Tensor, Tensor]) -> None:
    """E[28] for l >= L-2, for scalar and vector outputs."""
    net, x, g = case
    scale = site_sum_of_magnitudes(net, x, g)
    exact, paper = exact_recursion(net, x, cotangent=g), paper_recursion(net, x, cotangent=g)
    for l in range(max(1, net.depth - 2), net.depth):
        assert_close(paper.layer(l), exact.layer(l), scale[l - 1])


@pytest.mark.parametrize("hidden", [3, 4, 5, 6])
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("activation", [shapes.rct(1.0, 1), shapes.rct(14.0, 1), shapes.rct(7.0, 2), shapes.tanh()])
def test_paper_is_wrong_below_the_top_two(hidden: int, outputs: int, activation: shapes.Shape) -> None:
    """E[27], E[28], E[30]-E[33] fail for l <= L-3 on each of six random nets, by more than 5% in the
    median.
    """
    errors = []
    for seed in range(6):
        g = generator(seed)
        net = random_net([4, *[5] * hidden, outputs], activation, generator=g)
        x = torch.randn(16, 4, generator=g, dtype=torch.float64)
        cotangent = torch.randn(16, outputs, generator=g, dtype=torch.float64)
        for row in error_by_layer(net, x, cotangent=cotangent):
            if row.distance <= 2:
                assert row.relative < TOLERANCE
            else:
                assert row.relative > 1e-6, (seed, row)
                errors.append(row.relative)
    assert sorted(errors)[len(errors) // 2] > 0.05


def test_division_by_the_slope_has_a_hole() -> None:
    """E[29], E[30] equal E[28] where σ' != 0 and are refused where σ' = 0; S has no hole."""
    g = generator(5)
    net = random_net([3, 4, 4, 4, 1], shapes.rct(2.0, 1), generator=g)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    for a, b in zip(paper_recursion(net, x).values, paper_recursion(net, x, form="E30").values):
        assert_close(b, a)
    flat = make_net([torch.ones(2, 1).double(), torch.ones(1, 2).double()], None, shapes.quadratic(1.0))
    at = torch.tensor([[-1.0]], dtype=torch.float64)  # σ'(-1) = 0
    assert paper_recursion(flat, at).layer(1).tolist() == [[1.0, 1.0]]
    with pytest.raises(NonFiniteError, match=r"E\[30\] is 0/0"):
        paper_recursion(flat, at, form="E30")


@pytest.mark.parametrize("beta", [1, 2])
def test_the_slope_of_the_family_vanishes_somewhere(beta: int) -> None:
    """σ' of RCT-AF changes sign for β = 1, 2, so E[29] has its hole inside the family; σ' > 0 for β = 0."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert bool((shapes.rct(1.0, beta).d1(x) < 0).any())
    assert bool((shapes.rct(1.0, 0).d1(x) > 0).all())


def special_nets() -> list[tuple[str, Net]]:
    act = shapes.rct(5.0, 2)
    return [
        ("width 1", random_net([3, 1, 1, 1, 1, 1, 2], act, generator=generator(1))),
        ("diagonal weights", diagonal_net(random_net([3, 4, 4, 4, 4, 2], act, generator=generator(2)))),
        ("linear sigma", random_net([3, 4, 4, 4, 4, 2], shapes.linear(1.3), generator=generator(3))),
    ]


@pytest.mark.parametrize("name,net", special_nets())
def test_special_nets_where_the_paper_is_exact(name: str, net: Net) -> None:
    """Width 1 and diagonal weights have one path between two neurons; linear σ has D = 0 altogether."""
    g = generator(9)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64)
    cotangent = torch.randn(7, 2, generator=g, dtype=torch.float64)
    exact, paper = exact_recursion(net, x, cotangent=cotangent), paper_recursion(net, x, cotangent=cotangent)
    truth = autograd_matrices(net, x, cotangent)
    for l in range(1, net.depth):
        assert_close(exact.layer(l), truth[l - 1].diagonal(dim1=1, dim2=2))
        assert_close(paper.layer(l), exact.layer(l))
    if name == "linear sigma":
        assert all(float(d.abs().max()) == 0 for d in exact.values)
    else:
        assert most_paths(net) == 1
        assert float(exact.layer(1).norm()) > 1e-8


def test_many_paths_are_counted() -> None:
    net = random_net([2, 3, 4, 5, 3, 1], shapes.tanh(), generator=generator(0))
    assert most_paths(net) == 20


def test_linear_in_the_second_derivative_site_by_site() -> None:
    """A.5, "linear dependence on σ''": D is linear in σ'' with σ and σ' held fixed (not in α, which moves
    all three).
    """
    base = shapes.tanh()
    g = generator(4)
    net = random_net([3, 4, 4, 4, 1], base, generator=g)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)

    def with_curvature(d2: shapes.Function) -> list[Tensor]:
        other = make_net(net.weights, net.biases, (base.sigma, base.d1, d2))
        return list(exact_recursion(other, x).values)

    one, two = with_curvature(torch.sin), with_curvature(torch.cos)
    mixed = with_curvature(lambda v: 2 * torch.sin(v) - 3 * torch.cos(v))
    for a, b, c in zip(one, two, mixed):
        assert_close(c, 2 * a - 3 * b)


def test_every_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        net = random_net([2, 3, 3, 1], shapes.tanh(), generator=generator(0), dtype=dtype)
        assert exact_recursion(net, torch.ones(2, 2, dtype=dtype)).layer(1).dtype == dtype


def test_refusals_say_what_and_where() -> None:
    net = random_net([2, 3, 2], shapes.tanh(), generator=generator(0))
    x = torch.ones(4, 2, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="2 outputs needs cotangent"):
        exact_recursion(net, x)
    with pytest.raises(ConfigurationError, match=r"inputs have shape"):
        exact_recursion(net, x[:, :1])
    with pytest.raises(DtypeError, match="convert one"):
        exact_recursion(net, x.float())
    with pytest.raises(ConfigurationError, match=r"W\^\(2\) takes 5 inputs"):
        make_net([torch.ones(3, 2), torch.ones(1, 5)], None, shapes.tanh())
    wide = random_net([2, 60, 60, 60, 60, 1], shapes.tanh(), generator=generator(0))
    with pytest.raises(BudgetError, match="use paper_recursion"):
        path_sum(wide, x.repeat(4, 1))
