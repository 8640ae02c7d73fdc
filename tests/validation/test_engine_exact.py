"""Theory against engine against autograd: E[28]-E[33] and the exact forms on the engine's own networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hessdiag as hd
from theory.net import diagonal_net, random_net
from theory.shapes import linear
from validation.bridge import (
    ACTIVATIONS,
    TOLERANCE,
    as_model,
    as_net,
    autograd_diagonal,
    deviation,
    engine_diagonal,
    full_hessian,
    gauss_newton_matrix,
    rct_spec,
    vector,
)
from validation.numbers import compare
from validation.studies import convolutions

torch.set_num_threads(1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], str, float, str, int, int]:
    hidden = draw(st.integers(0, 6))
    loss = draw(st.sampled_from(["half_mse", "cross_entropy"]))
    outputs = draw(st.integers(2 if loss == "cross_entropy" else 1, 3))
    widths = [draw(st.integers(1, 4)) for _ in range(hidden + 1)] + [outputs]
    spec = draw(st.sampled_from(sorted(ACTIVATIONS)))
    scale = draw(st.sampled_from([0.3, 1.0, 2.0]))
    return widths, spec, scale, loss, draw(st.integers(1, 3)), draw(st.integers(0, 10**6))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(cases())
def test_exact_forms_agree_at_every_depth(case: tuple[list[int], str, float, str, int, int]) -> None:
    """Depth 1 to 7: engine = theory = autograd; the printed form agrees in the top two hidden layers."""
    widths, spec, scale, loss, samples, seed = case
    g = torch.Generator().manual_seed(seed)
    net = random_net(widths, ACTIVATIONS[spec], generator=g, scale=scale)
    found = compare(net, spec, samples=samples, loss=loss, generator=g)
    assert found.engine <= TOLERANCE
    assert found.theory <= TOLERANCE
    assert found.gauss_newton <= TOLERANCE
    assert found.paper_top <= TOLERANCE
    assert found.paper_recursion_against_paths <= TOLERANCE


@pytest.mark.parametrize("outputs,loss", [(1, "half_mse"), (4, "half_mse"), (4, "cross_entropy")])
@pytest.mark.parametrize("hidden", [3, 5])
def test_printed_form_is_wrong_below_the_top_two(hidden: int, outputs: int, loss: str) -> None:
    """Every layer l <= L-3 of every random net is off; more than 5% in the median."""
    errors = []
    for seed, spec in enumerate([rct_spec(1.0, 1), rct_spec(14.0, 1), rct_spec(7.0, 2)]):
        g = torch.Generator().manual_seed(seed)
        net = random_net([4, *[5] * hidden, outputs], ACTIVATIONS[spec], generator=g)
        found = compare(net, spec, samples=8, loss=loss, generator=g)
        assert len(found.below) == hidden - 2
        assert min(found.below) > 1e-6
        errors += found.below
    assert sorted(errors)[len(errors) // 2] > 0.05


@settings(deadline=None, derandomize=True, max_examples=8)
@given(st.sampled_from(["width 1", "diagonal"]), st.integers(3, 6), st.integers(0, 999))
def test_special_nets_where_the_printed_form_is_exact(kind: str, hidden: int, seed: int) -> None:
    """One path between any two hidden neurons: E[28] is exact at every depth."""
    g = torch.Generator().manual_seed(seed)
    spec = rct_spec(7.0, 2)
    width = 1 if kind == "width 1" else 4
    net = random_net([3, *[width] * hidden, 2], ACTIVATIONS[spec], generator=g)
    net = diagonal_net(net) if kind == "diagonal" else net
    found = compare(net, spec, samples=3, loss="half_mse", generator=g)
    assert found.paper_top <= TOLERANCE
    assert max(found.below) <= 1e-7  # relative to the functional part alone, which the Gauss-Newton part may dwarf


def test_linear_activation_has_no_functional_part() -> None:
    """σ linear: D = 0 in every form, the engine finds no site, and the Gauss-Newton part is the diagonal."""
    g = torch.Generator().manual_seed(0)
    net = random_net([3, 4, 4, 4, 2], linear(1.0), generator=g)
    model = hd.networks.build("mlp", activation=nn.Identity, num_classes=2, in_features=3, widths=(4, 4, 4)).double()
    model.load_state_dict(as_model(net, "tanh").state_dict())
    x, y = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    engine = engine_diagonal(model, x, y, "cross_entropy")
    assert float(vector(engine.functional).abs().max()) == 0.0
    assert deviation(vector(engine.total), vector(autograd_diagonal(model, x, y, "cross_entropy"))) <= TOLERANCE


def test_the_reference_is_the_full_hessian_and_splits() -> None:
    """autograd_diagonal is the diagonal of the full Hessian; its Gauss-Newton matrix has the engine's diagonal."""
    g = torch.Generator().manual_seed(1)
    spec = rct_spec(14.0, 1)
    net = random_net([3, 4, 4, 3], ACTIVATIONS[spec], generator=g)
    model = as_model(net, spec)
    x, y = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    full = full_hessian(model, x, y, "cross_entropy")
    assert deviation(vector(autograd_diagonal(model, x, y, "cross_entropy")), full.diagonal()) <= 1e-13
    outer = gauss_newton_matrix(model, x, y, "cross_entropy").diagonal()
    assert deviation(vector(engine_diagonal(model, x, y, "cross_entropy").gauss_newton), outer) <= 1e-13
    back = as_net(model, ACTIVATIONS[spec])
    assert all(torch.equal(a, b) for a, b in zip(back.weights, net.weights, strict=True))


@settings(deadline=None, derandomize=True, max_examples=8)
@given(st.integers(1, 3), st.sampled_from([(1.0, 0), (14.0, 1), (7.0, 2)]), st.integers(0, 999))
def test_convolutions_by_the_site_identity(depth: int, member: tuple[float, int], seed: int) -> None:
    """Engine = autograd on conv nets; equal paths only: exact in the top hidden layer, wrong in each below."""
    model = convolutions.build(depth, *member, channels=2, seed=seed)
    x, y = convolutions.batch(2, seed)
    truth = autograd_diagonal(model, x, y, "cross_entropy")
    engine = engine_diagonal(model, x, y, "cross_entropy")
    assert deviation(vector(engine.total), vector(truth)) <= TOLERANCE
    names = [name for name, p in model.named_parameters() if p.ndim == 4]
    printed = convolutions.equal_paths_only(model, x, y)
    errors = [deviation(a, engine.functional[n]) for a, n in zip(printed, names, strict=True)]
    assert errors[-1] <= 1e-9
    assert all(error > 1e-4 for error in errors[:-1])


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_residual_conv_net(beta: int) -> None:
    """A residual BatchNorm net, engine against autograd, every entry."""
    model = hd.networks.build("small_resnet", activation=rct_spec(7.0, beta), width=2, num_classes=3, seed=beta)
    model = model.double().eval()
    x, y = convolutions.batch(2)
    truth = autograd_diagonal(model, x, y, "cross_entropy")
    assert deviation(vector(engine_diagonal(model, x, y, "cross_entropy").total), vector(truth)) <= TOLERANCE
