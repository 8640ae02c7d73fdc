"""The site identity on every activation and product the allow-list knows, and refusal of everything else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import ELEMENTWISE, Function, Residual, Tokens, dense_diagonal, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import StochasticModeError, UncoveredModelError
from hessdiag.graph import Linearisation, visit
from hessdiag.graph.nodes import Edge, forward_order
from hessdiag.graph.visit import Entrances, Entry
from hessdiag.kernels.exact_batch import check_separate
from hessdiag.kernels.propagator import Propagator
from hessdiag.measuring.comparisons import push

torch.set_num_threads(1)


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


def batch_for(model: nn.Module, n: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = {"Residual": (n, 2, 8, 8), "Tokens": (n, 4, 5)}.get(type(model).__name__, (n, 5))
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def site_sum(linear: Linearisation, parameter: nn.Parameter, along: Tensor) -> tuple[float, float]:
    """(sum c (J u)^2 + loss term, the same of absolute values) for the summed loss."""
    pushed, output = push(linear, [parameter], [along])
    terms = [site.c * left * right for site, (left, right) in zip(linear.sites, pushed)]
    rows = (linear.curvature.factor * output.reshape(1, linear.samples, -1)).sum(2).square().sum(1)
    terms.append(rows * linear.curvature.signs)
    return sum(float(t.sum()) for t in terms), sum(float(t.abs().sum()) for t in terms)


def check_identity(model: nn.Module) -> Linearisation:
    """u^T H u by autograd equals the site sum, u confined to one tensor: relative to the sum of |contributions|."""
    x, y = batch_for(model)
    linear = Linearisation(hd.Objective(model), x, y)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        u = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        loss = cross_entropy(model(x), y).sum()
        (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
        hv = torch.autograd.grad(gradient, parameter, u, allow_unused=True)[0] if gradient.requires_grad else None
        left = 0.0 if hv is None else float((u * hv).sum())
        right, scale = site_sum(linear, parameter, u)
        assert abs(left - right) <= 1e-10 * scale, (name, left, right, scale)
        short = copy.deepcopy(model).float()
        single = Linearisation(hd.Objective(short), x.float(), y)
        rounded, _ = site_sum(single, short.get_parameter(name), u.float())
        assert abs(left - rounded) <= 2e-5 * scale, (name, left, rounded, scale)
    return linear


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_identity_for_every_elementwise_function(name: str) -> None:
    check_identity(seeded(lambda: Function(ELEMENTWISE[name])))


@pytest.mark.parametrize("build", [Residual, Tokens])
def test_identity_for_convolutions_products_and_tokens(build: type[nn.Module]) -> None:
    check_identity(seeded(build))


def test_product_of_functions_of_one_tensor_is_one_site() -> None:
    linear = check_identity(seeded(lambda: Function(lambda x: x * torch.sigmoid(x))))
    assert len(linear.sites) == 2
    linear = check_identity(seeded(lambda: Function(lambda x: x * torch.sigmoid(x.flip(1)))))
    assert sum(bool(site.right) for site in linear.sites) == 2


def test_piecewise_linear_networks_have_no_sites() -> None:
    model = seeded(lambda: Function(lambda x: F.leaky_relu(F.relu6(x).abs(), 0.2)))
    x, y = batch_for(model)
    assert Linearisation(hd.Objective(model), x, y).sites == []


@pytest.mark.parametrize("build", [lambda: Function(F.silu), Residual, Tokens])
def test_per_sample_gradients_of_every_layer_kind(build: type[nn.Module]) -> None:
    model = seeded(build)
    x, y = batch_for(model)
    linear = Linearisation(hd.Objective(model), x, y)
    seeds = [torch.randn_like(site.c) for site in linear.sites]
    output = torch.randn_like(linear.outputs)
    each = Propagator(linear).each(seeds, output)
    names = dict(model.named_parameters())
    for n in range(len(y)):
        only = [torch.zeros_like(s).index_copy_(0, torch.tensor([n]), s[n : n + 1]) for s in seeds]
        one = torch.zeros_like(output).index_copy_(0, torch.tensor([n]), output[n : n + 1])
        for (name, p), truth in zip(names.items(), linear.backward(only, one, list(names.values()))):
            assert truth is not None
            assert (each[name][n] - truth).norm() <= 1e-12 * truth.norm() + 1e-300, (name, n, p.shape)


@pytest.mark.parametrize("group", [1, 2, 3, 16])
def test_squares_over_groups_of_samples(group: int) -> None:
    model = seeded(Residual)
    x, y = batch_for(model)
    linear = Linearisation(hd.Objective(model), x, y)
    propagator = Propagator(linear)
    output = torch.randn_like(linear.outputs)
    each = propagator.each([None] * len(linear.sites), output)
    deltas = linear.backward([None] * len(linear.sites), output, [layer.edge for layer in linear.layers])
    for square, delta in zip(propagator.squares, deltas):
        assert delta is not None
        for name, value in square.summed(delta, group=group).items():
            expected = sum(part.sum(0).square() for part in each[name].split(group))
            assert (value - expected).norm() <= 1e-12 * expected.norm()


class Shared(nn.Module):
    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.inner, self.last, self.parallel = nn.Linear(5, 5), nn.Linear(5, 3), parallel

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.last(h + torch.tanh(self.inner(2 * x)) if self.parallel else torch.tanh(self.inner(h)))


def chain(*inside: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), *inside, nn.Linear(5, 3))


class Lambda(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


UNCOVERED = {
    "complex": (lambda: chain(Lambda(lambda h: torch.fft.irfft(torch.fft.rfft(h) ** 2, n=5))), "complex numbers"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_uncovered_models_are_refused_by_name(name: str) -> None:
    build, message = UNCOVERED[name]
    model = seeded(build)
    x, y = batch_for(model)
    for method in ("exact", "propagation"):
        with pytest.raises(UncoveredModelError) as caught:
            hd.measure(hd.Objective(model), [(x, y)], method=method)
        assert message.lower() in str(caught.value).lower()


@pytest.mark.parametrize("name", ["complex"])
def test_auto_falls_back_to_hutchinson_and_says_so(name: str) -> None:
    model = seeded(UNCOVERED[name][0])
    x, y = batch_for(model)
    m = hd.measure(hd.Objective(model), [(x, y)], rtol=1e-9, max_replicates=400, min_replicates=400, seed=3)
    assert m.plan.method == "hutchinson"
    assert any("site identity" in note for note in m.notes)
    truth = dense_diagonal(model, cross_entropy, x, y)
    exact = (sum(float(t.square().sum()) for t in truth.values()) / m.parameters) ** 0.5
    # A 99.99 % interval, seeded: false alarm 1e-4 per case.
    m = hd.measure(hd.Objective(model), [(x, y)], rtol=1e-9, max_replicates=400, min_replicates=400, confidence=0.9999)
    assert m.interval[0] <= exact <= m.interval[1]


class Twice(nn.Module):
    """x sigmoid(1.3 x), and a function of two tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.3 * x) + torch.atan2(x, x * x + 1.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_scripted_code_is_measured_operation_by_operation(whole: bool) -> None:
    plain = seeded(lambda: chain(Twice()))
    truth = dense_diagonal(plain, cross_entropy, *batch_for(plain))
    model = torch.jit.script(plain) if whole else nn.Sequential(plain[0], torch.jit.script(plain[1]), plain[2])
    x, y = batch_for(plain)
    for _ in range(3):
        model(x)  # scripted code is fused after a few calls, to one node
    assert "DifferentiableGraph" in {n.name().split("::")[-1][:19] for n in forward_order(model(x).grad_fn)}
    found = hd.diagonal(hd.Objective(model), [(x, y)]).total
    for name, wanted in truth.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-13)
    assert hd.measure(hd.Objective(model), [(x, y)], method="propagation", max_replicates=10).status


def test_train_mode_and_dropout_are_refused_by_every_method() -> None:
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    models = {
        "'1'": nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        "dropout": nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
    }
    for message, model in models.items():
        for method in ("auto", "exact", "propagation", "hutchinson", "reference"):
            with pytest.raises(StochasticModeError, match=message):
                hd.measure(hd.Objective(model), [(x, y)], method=method)


@pytest.mark.parametrize("shift", [1, -1])
def test_samples_that_see_their_neighbours_one_way_are_refused(shift: int) -> None:
    """The first of two does not see the second, whichever of them the check happens to look from."""
    model = seeded(lambda: chain(Lambda(lambda h: torch.tanh(h + F.pad(h, (0, 0, 1, 0))[:-1] if shift > 0 else
                                                             h + F.pad(h, (0, 0, 0, 1))[1:])), Lambda(torch.tanh)))  # fmt: skip
    x, y = batch_for(model, n=2)
    with pytest.raises(UncoveredModelError, match="samples of a batch meet"):
        check_separate(Linearisation(hd.Objective(model), x, y))


def test_models_that_mix_samples_are_refused_by_every_method() -> None:
    model = seeded(lambda: chain(Lambda(lambda h: torch.tanh(h - h.mean(0)))))
    x, y = batch_for(model)
    for method in ("auto", "hutchinson"):
        with pytest.raises(UncoveredModelError, match="mixes the samples"):
            hd.measure(hd.Objective(model), [(x, y)], method=method)


def test_chosen_parameters_only() -> None:
    model = seeded(Residual)
    x, y = batch_for(model)
    whole = hd.diagonal(hd.Objective(model), [(x, y)])
    part = hd.diagonal(hd.Objective(model, parameters=r"c2\..*|fc\.bias"), [(x, y)])
    assert set(part.total) == {"c2.weight", "c2.bias", "fc.bias"}
    for name, tensor in part.total.items():
        assert torch.allclose(tensor, whole.total[name], rtol=1e-11, atol=1e-14)


class TwoStems(nn.Module):
    """Two layers with none below them, one of which the output sees through an activation and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.left(x)
        return self.last(torch.tanh(h) + h + F.silu(self.right(torch.cos(x))))


@pytest.mark.parametrize("build", [lambda: Function(F.silu), Residual, Tokens, TwoStems])
def test_a_visit_hands_over_the_cotangents_that_a_backward_pass_returns(build: type[nn.Module]) -> None:
    """Layer by layer the same tensors, each once, and no hook is left behind."""
    model = seeded(build)
    x, y = batch_for(model)
    linear = Linearisation(hd.Objective(model), x, y)
    g = torch.Generator().manual_seed(3)
    seeds = [torch.randn(site.c.shape, generator=g, dtype=site.c.dtype) for site in linear.sites]
    output = torch.randn(linear.outputs.shape, generator=g, dtype=linear.outputs.dtype)
    for chosen, top in ((seeds, output), ([None] * len(seeds), output), ([*seeds[:-1], None], output), (seeds, None)):
        wanted = linear.backward(chosen, top, [layer.edge for layer in linear.layers])
        edges = list(linear.pull(chosen, chosen).values())
        if top is not None:
            edges.append(((linear.outputs.grad_fn, 0), top))

        def source(nodes: Sequence[Any], edges: Sequence[tuple[Edge, Tensor]] = edges) -> list[Entry]:
            """It may run a pass through the same nodes."""
            torch.autograd.grad(linear.outputs, list(model.parameters()), output, retain_graph=True)
            return [(edge, vector.clone(), True) for edge, vector in edges if any(edge[0] is node for node in nodes)]

        entrances = Entrances(linear, [edge for edge, _ in edges])
        for at_once in (False, False, True):
            found: dict[int, Tensor] = {}

            def see(place: int, delta: Tensor, found: dict[int, Tensor] = found) -> None:
                assert place not in found
                found[place] = delta.clone()

            visit(entrances, source, see, at_once=at_once)
            assert set(found) == {place for place, delta in enumerate(wanted) if delta is not None}
            for place, delta in found.items():
                torch.testing.assert_close(delta, wanted[place], rtol=1e-13, atol=1e-14)
