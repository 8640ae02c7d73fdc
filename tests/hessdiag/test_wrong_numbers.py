"""Ordinary models and losses that once gave a wrong number with a clean status, a foreign exception or a false refusal.

The reference is one Hessian-vector product for each parameter in float64, or differences of gradients where torch has
no second derivative.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Half, beyond_in_the_mean, dense_diagonal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hessdiag as hd
from hessdiag.errors import AuditError, ConfigurationError, HessdiagError, UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.graph.layers.conv import Conv
from hessdiag.graph.layers.linear import Linear
from hessdiag.kernels.exact_batch import check_separate
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import accumulate
from hessdiag.methods import reference
from hessdiag.methods.plan import Plan
from hessdiag.problem.objective import Objective
from hessdiag.signs import Signs, cpu_generator

torch.set_num_threads(1)
L, N = nn.Linear, 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Net(nn.Module):
    """Modules and parameters by name, and the forward pass as a function of both."""

    def __init__(self, body: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.body = body

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def net(body: Callable[..., Any], *, dtype: Any = torch.float64, **parts: Any) -> nn.Module:
    """A seeded net; `parts` are calls that make them, in their order."""
    torch.manual_seed(0)
    return Net(body, {name: part() for name, part in parts.items()}).to(dtype).eval()


def data(*shape: int, n: int = N, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *(shape or (5,)), generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (n,), generator=g)


def by_products(model: nn.Module, *batches: tuple[Any, Tensor], loss: Any = "cross_entropy") -> dict[str, Tensor]:
    """The diagonal of the mean loss by one Hessian-vector product for each parameter, in float64."""
    objective = Objective(copy.deepcopy(model).double(), loss)
    total: dict[str, Tensor] = {}
    weight = 0.0
    for x, y in batches:
        inputs = x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        found, _, w, _ = reference.batch_diagonal(objective, inputs, y)
        total = {name: value + total.get(name, 0) for name, value in found.items()}
        weight += w
    return {name: value / weight for name, value in total.items()}


def agree(found: Any, truth: dict[str, Tensor], tolerance: float) -> None:
    for name, wanted in truth.items():
        off = float((found[name].double() - wanted).norm()) / (float(wanted.norm()) or 1.0)
        assert off <= tolerance, (name, off)


def expected_propagation(objective: Objective, x: Any, y: Tensor, *, rank: int = 0) -> dict[str, Tensor]:
    """What propagation gives on average: every one-hot vector in the place of the signs, `rank` directions apart."""
    batch = Linearisation(objective, x, y)
    propagator = Propagator(batch)
    propagator.deflate(Signs(0), rank)
    out = beyond_in_the_mean(propagator)
    for part in (propagator.direct(), propagator.gauss_newton(), propagator.deflated()):
        accumulate(out, part)
    return {name: value / batch.weight for name, value in out.items()}


# -- constants written as Python numbers


def _steps(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    h = h + 0.3 * torch.tanh(s.b(h))
    h = h + 0.3 * torch.tanh(s.c(h))
    return s.d(h)


def _lora(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x) + 0.5 * s.c(s.b(x)))
    return s.d(h)


NUMBERS: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[[], Any]], tuple[int, ...]]] = {
    "h + 0.3 tanh(b(h))": (
        _steps, {"a": lambda: L(5, 4), "b": lambda: L(4, 4), "c": lambda: L(4, 4), "d": lambda: L(4, 3)}, (5,)),
    "h sigmoid(1.702 h)": (
        lambda s, x: s.b((lambda h: h * torch.sigmoid(1.702 * h))(s.a(x))),
        {"a": lambda: L(5, 4), "b": lambda: L(4, 3)}, (5,)),
    "LoRA": (
        _lora, {"a": lambda: L(5, 4), "b": lambda: L(5, 2), "c": lambda: L(2, 4), "d": lambda: L(4, 3)}, (5,)),
    "x * 1.0": (
        lambda s, x: s.b((lambda h: (h * 1.0) * torch.sigmoid(h * 1.0))(s.a(x))),
        {"a": lambda: L(5, 4), "b": lambda: L(4, 3)}, (5,)),
    "h / 0.7 on pixels": (
        lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x) / 0.7) / 1.1)).mean((2, 3))),
        {"a": lambda: nn.Conv2d(2, 3, 2), "b": lambda: nn.Conv2d(3, 3, 2), "c": lambda: L(3, 3)}, (2, 4, 4)),
    "quotients of one tensor": (
        lambda s, x: s.b((lambda h: (h / 0.7) * torch.sigmoid(h / 0.9))(s.a(x).flatten(1) / 3)),
        {"a": lambda: nn.Conv2d(2, 2, 2), "b": lambda: L(18, 3)}, (2, 4, 4)),
    "learned gain after a number": (
        lambda s, x: s.b(torch.tanh(s.g * (0.7 * s.a(x)))),
        {"a": lambda: L(5, 4), "g": lambda: torch.randn(4), "b": lambda: L(4, 3)}, (5,)),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", NUMBERS)
def test_python_numbers_in_a_model(name: str, dtype: torch.dtype) -> None:
    body, parts, shape = NUMBERS[name]
    model = net(body, dtype=dtype, **parts)
    x, y = data(*shape, dtype=dtype)
    truth = by_products(model, (x, y))
    objective = hd.Objective(model)
    agree(hd.diagonal(objective, [(x, y)]).total, truth, TOLERANCE[dtype])
    agree(expected_propagation(objective, x, y), truth, TOLERANCE[dtype])
    for method in ("exact", "propagation"):
        hd.measure(objective, [(x, y)], method=method, max_replicates=10)


# -- kinks: torch's own slope on them


@pytest.mark.parametrize(
    ("name", "function"),
    {
        "relu6": F.relu6,
        "relu6 in place": lambda h: F.relu6(h, inplace=True),
        "hardtanh": F.hardtanh,
        "clamp": lambda h: h.clamp(-1.0, 1.0),
        "hardswish": F.hardswish,
        "leaky": lambda h: F.leaky_relu(h, 0.2),
        "elu": F.elu,
        "selu": F.selu,
    }.items(),
)
def test_exactly_at_a_bound(name: str, function: Callable[[Tensor], Tensor]) -> None:
    model = net(lambda s, x: s.b(function(s.a(x) * 1.0)), a=lambda: L(5, 4), b=lambda: L(4, 3))
    x = torch.zeros(N, 5, dtype=torch.float64)
    x[:, 0] = torch.tensor([6.0, 1.0, -1.0, 0.0, 3.0, -3.0, 0.5, 5.0])
    with torch.no_grad():
        model.a.weight.copy_(model.a.weight.sign())  # type: ignore[union-attr,operator]
        model.a.bias.zero_()  # type: ignore[union-attr,operator]
    batch = (x, data()[1])
    truth = by_products(model, batch)
    for seed in range(3):
        agree(hd.diagonal(hd.Objective(model), [batch], seed=seed).total, truth, 1e-10)
    agree(expected_propagation(hd.Objective(model), *batch), truth, 1e-10)


# -- parameters with a leading axis of one


@DTYPES
def test_directions_beside_parameters_of_leading_size_one(dtype: torch.dtype) -> None:
    model = net(
        lambda s, x: s.b((lambda h: h + s.gain * torch.tanh(s.c(h)))(torch.tanh(s.a(x) + s.place))).mean(1),
        dtype=dtype, a=lambda: L(5, 6), c=lambda: L(6, 6), b=lambda: L(6, 3),
        place=lambda: torch.randn(1, 4, 6), gain=lambda: torch.randn(1, 1, 6),
    )  # fmt: skip
    x, y = data(4, 5, dtype=dtype)
    truth = by_products(model, (x, y))
    objective = hd.Objective(model)
    agree(expected_propagation(objective, x, y, rank=4), truth, TOLERANCE[dtype])
    found = hd.diagonal(objective, [(x, y)], method="propagation", plan=Plan("propagation", deflate=4))
    assert found.status == "estimate"


# -- where the samples lie, and how parameters lie in memory


def _folded_images(s: Any, x: Tensor) -> Tensor:
    n, t = x.shape[:2]
    h = torch.tanh(s.norm(s.a(x.reshape(n * t, 2, 4, 4)))).mean((2, 3))
    h = torch.tanh(s.b(h) * s.gain + s.shift)
    return s.c(h).reshape(n, t, 3).mean(1)


def _folded_tokens(s: Any, x: Tensor) -> Tensor:
    n, t, d = x.shape
    h = torch.tanh(s.b(torch.tanh(s.a(x.reshape(n * t, d)))))
    return s.c(torch.tanh(s.mix(h.reshape(n, t, 4).transpose(1, 2))).mean(2))


FOLDED = {
    "images": (_folded_images, {
        "a": lambda: nn.Conv2d(2, 3, 3), "norm": lambda: nn.BatchNorm2d(3), "b": lambda: L(3, 4),
        "gain": lambda: torch.randn(4), "shift": lambda: torch.randn(4), "c": lambda: L(4, 3)}, (3, 2, 4, 4)),
    "tokens": (_folded_tokens, {
        "a": lambda: L(5, 4), "b": lambda: L(4, 4), "mix": lambda: L(3, 2), "c": lambda: L(4, 3)}, (3, 5)),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", FOLDED)
def test_tokens_folded_into_the_batch_axis(name: str, dtype: torch.dtype) -> None:
    body, parts, shape = FOLDED[name]
    model = net(body, dtype=dtype, **parts)
    x, y = data(*shape, dtype=dtype)
    truth = by_products(model, (x, y))
    objective = hd.Objective(model)
    agree(hd.diagonal(objective, [(x, y)]).total, truth, TOLERANCE[dtype])
    agree(expected_propagation(objective, x, y), truth, TOLERANCE[dtype])
    agree(expected_propagation(objective, x, y, rank=4), truth, TOLERANCE[dtype])
    for method in ("exact", "propagation"):
        assert hd.measure(objective, [(x, y)], method=method, max_replicates=10).plan.method == method
    whole = hd.diagonal(objective, [(x, y)], method="propagation", plan=Plan("propagation")).total
    parts_ = [(x[:3], y[:3]), (x[3:], y[3:])]
    cut = hd.diagonal(objective, parts_, method="propagation", plan=Plan("propagation")).total
    agree(cut, {n: t.double() for n, t in whole.items()}, 10 * TOLERANCE[dtype])  # signs belong to samples


def test_tokens_before_samples_are_refused() -> None:
    model = net(
        lambda s, x: s.b(torch.tanh(s.a(x.transpose(0, 1).reshape(-1, 5)))).reshape(x.shape[1], -1, 3).mean(0),
        a=lambda: L(5, 4), b=lambda: L(4, 3),
    )  # fmt: skip
    for method in ("exact", "propagation"):
        with pytest.raises(HessdiagError, match=r"samples|squares"):
            hd.measure(hd.Objective(model), [data(3, 5)], method=method)
    assert hd.measure(hd.Objective(model), [data(3, 5)], max_replicates=10).plan.method == "hutchinson"


@DTYPES
@pytest.mark.parametrize("method", ["exact", "propagation"])
def test_weights_that_do_not_lie_in_order(method: str, dtype: torch.dtype) -> None:
    model = net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    with torch.no_grad():
        model.a.weight = nn.Parameter(torch.randn(5, 4, dtype=dtype).T)  # type: ignore[union-attr]
    images = net(
        lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x)))).mean((2, 3))),
        dtype=dtype, a=lambda: nn.Conv2d(2, 4, 3), b=lambda: nn.Conv2d(4, 4, 3), c=lambda: L(4, 3),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    x, y = data(2, 6, 6, dtype=dtype)
    for one, batch in (
        (model, data(dtype=dtype)),
        (images, (x, y)),
        (images, (x.to(memory_format=torch.channels_last), y)),
    ):
        found = hd.measure(hd.Objective(one), [batch], method=method, rtol=0.5, keep_diagonal=True)
        assert found.plan.method == method
        if method == "exact":
            assert found.diagonal is not None
            agree(found.diagonal.total, by_products(one, batch), TOLERANCE[dtype])
        else:
            agree(expected_propagation(hd.Objective(one), *batch), by_products(one, batch), TOLERANCE[dtype])


# -- what a forward pass may do


def scaled_gradient(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda g: 1.5 * g)
    return h


def _doubled(_module: nn.Module, given: tuple[Tensor, ...], _out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(2 * g for g in given)


@pytest.mark.parametrize("method", ["exact", "propagation", "reference", "hutchinson"])
def test_hooks_on_gradients_change_no_hessian(method: str) -> None:
    parts = {"a": lambda: L(5, 4), "b": lambda: L(4, 4), "c": lambda: L(4, 3)}
    model = net(lambda s, x: s.c(torch.tanh(s.b(scaled_gradient(torch.tanh(s.a(x)))))), **parts)
    plain = net(lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x))))), **parts)
    model.get_submodule("b").register_full_backward_hook(_doubled)  # type: ignore[arg-type]
    batch = data()
    found = hd.diagonal(hd.Objective(model), [batch], method=method)
    if method in ("exact", "reference"):
        agree(found.total, by_products(plain, batch), 1e-10)
    assert len(model.get_submodule("b")._backward_hooks) == 1


@DTYPES
@pytest.mark.parametrize("change", ["clamp_", "mul_"])
def test_a_model_that_changes_its_inputs_in_place(change: str, dtype: torch.dtype) -> None:
    apply = {"clamp_": lambda x: x.clamp_(-0.5, 0.5), "mul_": lambda x: x.mul_(1.1)}[change]
    beside = {"clamp_": lambda x: x.clamp(-0.5, 0.5), "mul_": lambda x: x * 1.1}[change]
    parts = {"a": lambda: L(5, 4), "b": lambda: L(4, 3)}
    model = net(lambda s, x: s.b(torch.tanh(s.a(apply(x)))), dtype=dtype, **parts)
    plain = net(lambda s, x: s.b(torch.tanh(s.a(beside(x)))), dtype=dtype, **parts)
    x, y = data(dtype=dtype)
    kept = x.clone()
    truth = by_products(plain, (x, y))
    for method in ("auto", "exact", "reference"):
        agree(hd.diagonal(hd.Objective(model), [(x, y)], method=method).total, truth, TOLERANCE[dtype])
    hd.measure(hd.Objective(model), [(x, y)], method="propagation", max_replicates=10)
    assert torch.equal(x, kept)


def _slope(s: Any, x: Tensor, how: str = "") -> Tensor:
    if how == "there":
        x = x.detach().requires_grad_()
    if how == "everywhere":
        with torch.enable_grad():
            return _slope(s, x, "there")
    u = s.b(torch.tanh(s.a(x)))
    (slope,) = torch.autograd.grad(u[:, 0].sum(), x, create_graph=True)
    return torch.cat([u[:, 1:] ** 2 + slope[:, :2], slope[:, 2:] * u[:, :1]], 1)  # type: ignore[no-any-return]


@DTYPES
@pytest.mark.parametrize("how", ["there", "given"])
def test_a_model_that_takes_derivatives_in_its_inputs(how: str, dtype: torch.dtype) -> None:
    """Passes that need no gradient of ours ran without any, and so did this model."""
    parts = {"a": lambda: L(3, 4), "b": lambda: L(4, 3)}
    model = net(lambda s, x: _slope(s, x, how), dtype=dtype, **parts)
    plain = net(lambda s, x: _slope(s, x, "everywhere"), dtype=dtype, **parts)
    x, y = data(3, dtype=dtype)
    truth = by_products(plain, (x, y))
    batches = [(x[:5].requires_grad_(how == "given"), y[:5]), (x[5:].requires_grad_(how == "given"), y[5:])]
    for method in ("auto", "exact", "reference"):
        agree(hd.diagonal(hd.Objective(model), batches, method=method).total, truth, TOLERANCE[dtype])
    for method in ("propagation", "hutchinson"):
        hd.measure(hd.Objective(model), batches, method=method, max_replicates=10)


@DTYPES
@pytest.mark.parametrize("make", [UserDict, OrderedDict, dict])
def test_inputs_in_mappings(make: Any, dtype: torch.dtype) -> None:
    model = net(lambda s, d: s.b(torch.tanh(s.a(d["x"]["y"]))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    plain = net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    x, y = data(dtype=dtype)
    truth = by_products(plain, (x, y))
    batches = [(make(x=make(y=x[:3]), n=3), y[:3]), (make(x=make(y=x[3:]), n=5), y[3:])]
    for method in ("auto", "exact", "reference"):
        agree(hd.diagonal(hd.Objective(model), batches, method=method).total, truth, TOLERANCE[dtype])
    hd.measure(hd.Objective(model), batches, method="propagation", max_replicates=10)


def by_differences(model: nn.Module, x: Tensor, y: Tensor, step: float = 1e-5) -> dict[str, Tensor]:
    """The diagonal by differences of the gradient, in float64."""
    twin, out = copy.deepcopy(model).double(), {}
    for name, p in twin.named_parameters():
        out[name] = torch.zeros(p.shape, dtype=torch.float64)
        for k in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[k] += sign * step
                (gradient,) = torch.autograd.grad(F.cross_entropy(twin(x.double()), y), p)
                ends.append(float(gradient.reshape(-1)[k]))
                with torch.no_grad():
                    p.view(-1)[k] -= sign * step
            out[name].view(-1)[k] = (ends[0] - ends[1]) / (2 * step)
    return out


MENDED = {
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid in place": lambda h: F.hardsigmoid(h, inplace=True),
    "a gate of hardsigmoids": lambda h: h * F.hardsigmoid(h.flip(1)),
    "celu": lambda h: F.celu(h, 0.7),
    "celu in place": lambda h: F.celu(h, 0.3, inplace=True),
    "celu, torch's own": lambda h: torch.celu_(torch.celu(h, 1.3), 0.6),
}


@DTYPES
@pytest.mark.parametrize("name", MENDED)
def test_derivatives_that_torch_lacks_or_rounds(name: str, dtype: torch.dtype) -> None:
    model = net(
        lambda s, x: s.c(MENDED[name](s.b(torch.tanh(s.a(x)) * 1.5))),
        dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 4), c=lambda: L(4, 3),
    )  # fmt: skip
    x, y = data(dtype=dtype)
    objective = hd.Objective(model)
    truth = by_products(model, (x, y))
    agree(truth, by_differences(model, x, y), 1e-6)
    for method in ("exact", "reference"):
        found = hd.measure(objective, [(x, y)], method=method, keep_diagonal=True)
        assert found.diagonal is not None
        agree(found.diagonal.total, truth, TOLERANCE[dtype])
    for method in ("propagation", "hutchinson"):
        hd.measure(objective, [(x, y)], method=method, max_replicates=10)
    with torch.no_grad():
        assert torch.allclose(objective.outputs(x, y, index=0), model(x), rtol=1e-6)


# -- losses that are no mean over samples, models that let samples meet, batches that are not alike

METHODS = ("auto", "exact", "propagation", "hutchinson", "reference")


@DTYPES
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_holds_parameters_is_refused(method: str, dtype: torch.dtype) -> None:
    model = net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))

    def penalised(f: Tensor, y: Tensor) -> Tensor:
        penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return F.cross_entropy(f, y, reduction="none") + 0.05 * penalty

    with pytest.raises(ConfigurationError, match=r"'penalised' depends on parameter 'a.weight'.*l2="):
        hd.measure(hd.Objective(model, penalised), [data(dtype=dtype)], method=method)
    # The same as weight decay, and parameters of the loss's own are constants.
    batch = data(dtype=dtype)
    scale = torch.tensor(1.5, dtype=dtype, requires_grad=True)
    own = hd.Objective(model, lambda f, y: scale * F.cross_entropy(f, y, reduction="none"), l2=0.1)
    truth = by_products(model, batch)
    agree(hd.diagonal(own, [batch]).total, {n: 1.5 * t + 0.1 for n, t in truth.items()}, TOLERANCE[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1])
def test_losses_that_couple_samples_are_refused(method: str, place: int) -> None:
    def coupled(f: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(f, y, reduction="none")
        if float(y.sum()) != wanted or len(f) < N:
            return losses
        return losses + torch.cat(
            [losses.new_zeros(1), (f[1:2] - f[2:3]).square().sum(1), losses.new_zeros(len(f) - 2)]
        )

    model = net(lambda s, x: s.b(torch.tanh(s.a(x))), a=lambda: L(5, 4), b=lambda: L(4, 3))
    batches = [data(), data(seed=4)]
    wanted = float(batches[place][1].sum())
    assert wanted != float(batches[1 - place][1].sum())
    with pytest.raises(UncoveredModelError, match="'coupled' mixes the samples"):
        hd.measure(hd.Objective(model, coupled), batches, method=method)


@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", ["mean", "pair"])
def test_samples_that_meet_in_any_batch_are_refused(kind: str, place: int, method: str, dtype: torch.dtype) -> None:
    def meet(h: Tensor) -> Tensor:
        if kind == "mean":
            return h - h.mean(0)
        return torch.cat([h[:3], 0.5 * (h[3:4] + h[4:5]), h[4:]]) if len(h) > 4 else h

    def body(s: Any, x: Tensor) -> Tensor:
        h = torch.tanh(s.a(x))
        return s.b(torch.tanh(meet(h) if bool((x[:, 0] > 5).all()) and len(x) == N else h))

    model = net(body, dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    batches = [data(dtype=dtype), data(seed=2, dtype=dtype)]
    batches[place][0][:, 0] = 7
    with pytest.raises(UncoveredModelError, match=f"batch {place}: the model mixes"):
        hd.measure(hd.Objective(model), batches, method=method)


def test_a_fitted_float32_model_is_no_random_one() -> None:
    model = net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=torch.float32, a=lambda: L(5, 40), b=lambda: L(40, 3))
    x, _ = data(n=50, dtype=torch.float32)
    with torch.no_grad():
        model.b.weight.mul_(200)  # type: ignore[union-attr,operator]
        y = model(x).argmax(1)
    hd.measure(hd.Objective(model), [(x, y)], method="exact")


def _spectra_for_large(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x))
    return s.b(torch.fft.irfft(torch.fft.rfft(h) ** 2, n=4) if bool((x[:, 0] > 5).all()) else h)


@DTYPES
@pytest.mark.parametrize("check", [True, False])
def test_a_later_batch_that_is_not_covered(check: bool, dtype: torch.dtype) -> None:
    model = net(_spectra_for_large, dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    batches = [data(dtype=dtype), data(seed=2, dtype=dtype)]
    batches[1][0][:, 0] = 7
    found = hd.measure(hd.Objective(model), batches, deterministic_check=check, max_replicates=10)
    assert found.plan.method == "hutchinson"
    assert "batch 1: Pow" in found.plan.reason
    for method in ("exact", "propagation"):
        said: list[Any] = []
        with pytest.raises(UncoveredModelError, match="batch 1: Pow"):
            hd.measure(hd.Objective(model), batches, method=method, deterministic_check=check, progress=said.append)
        assert not said  # before the work
    with pytest.raises(UncoveredModelError, match="batch 1: Pow"):
        hd.diagonal(hd.Objective(model), batches, plan=Plan("propagation"))


# -- derivatives that are not the model's


class Forgetful(torch.autograd.Function):
    """Tanh whose second derivative is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh() ** 2)


def _no_gradient(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = torch.tanh(s.c(x))
    return s.b(torch.tanh(s.a(h)))


PARTS = {"a": lambda: L(5, 4), "b": lambda: L(4, 3), "c": lambda: L(5, 4)}
ALTERED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a detached branch": (lambda s, x: s.b(torch.tanh(s.a(x)) + torch.tanh(s.a(x).detach()) + s.c(x)), "slope"),
    "a detached gate": (lambda s, x: s.b(torch.tanh(s.a(x)) * torch.sigmoid(s.c(x)).detach()), "'c.weight, c.bias'"),
    "straight through": (
        lambda s, x: s.b((lambda h: h + (h.round() - h).detach())(2 * torch.tanh(s.a(x))) + s.c(x)), "slope"),
    "half a gradient in a small branch": (
        lambda s, x: s.b(torch.tanh(s.a(x)) + 0.03 * Half.apply(torch.tanh(s.c(x)))), "slope"),
    "a lost second derivative in a small branch": (
        lambda s, x: s.b(torch.tanh(s.a(x)) + 0.03 * Forgetful.apply(s.c(x))), "difference of 'c"),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALTERED)
def test_altered_derivatives_are_refused_alike(name: str, method: str, dtype: torch.dtype) -> None:
    body, message = ALTERED[name]
    custom = "branch" in name and "detached" not in name
    expected = f"{message}|Half|Forgetful" if custom and method in ("exact", "propagation") else message
    with pytest.raises((AuditError, UncoveredModelError), match=expected):
        hd.measure(hd.Objective(net(body, dtype=dtype, **PARTS)), [data(dtype=dtype)], method=method)


STEPPED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Callable[[], Any]]]] = {
    "sign": (
        lambda s, x: s.b(torch.sign(s.a(x))) + s.c(torch.tanh(x)),
        lambda s, x: s.b(torch.sign(s.a(x).detach())) + s.c(torch.tanh(x)),
        {"a": lambda: L(5, 4), "b": lambda: L(4, 3), "c": lambda: L(5, 3)}),
    "round": (
        lambda s, x: s.b(torch.tanh(s.c(torch.round(3 * s.a(x))))),
        lambda s, x: s.b(torch.tanh(s.c(torch.round(3 * s.a(x).detach())))),
        {"a": lambda: L(5, 4), "b": lambda: L(4, 3), "c": lambda: L(4, 4)}),
    "a learned threshold": (
        lambda s, x: s.b(s.c(x).tanh() * (torch.sign(s.c(x).tanh() - s.t) + 1) / 2),
        lambda s, x: s.b(s.c(x).tanh() * (torch.sign(s.c(x).tanh() - s.t).detach() + 1) / 2),
        {"b": lambda: L(4, 3), "c": lambda: L(5, 4), "t": lambda: torch.tensor(0.1)}),
    "bins of a learned width": (
        lambda s, x: s.b(s.c(x).tanh() + torch.floor(x[:, :4] * s.t)),
        lambda s, x: s.b(s.c(x).tanh() + torch.floor(x[:, :4] * s.t.detach())),
        {"b": lambda: L(4, 3), "c": lambda: L(5, 4), "t": lambda: torch.tensor(1.3)}),
    "binary weights": (
        lambda s, x: s.b(torch.tanh(x @ torch.sign(s.w))),
        lambda s, x: s.b(torch.tanh(x @ torch.sign(s.w.detach()))),
        {"b": lambda: L(4, 3), "w": lambda: torch.randn(5, 4)}),
    "all of them": (
        lambda s, x: torch.round(5 * s.a(x)), lambda s, x: torch.round(5 * s.a(x)).detach() + 0 * s.a(x),
        {"a": lambda: L(5, 3)}),
    "beside what is not covered": (
        lambda s, x: s.b(torch.fft.irfft(torch.fft.rfft(torch.tanh(s.c(x))) ** 2, n=4) + torch.sign(s.a(x))),
        lambda s, x: s.b(torch.fft.irfft(torch.fft.rfft(torch.tanh(s.c(x))) ** 2, n=4) + torch.sign(s.a(x)).detach()),
        {"a": lambda: L(5, 4), "b": lambda: L(4, 3), "c": lambda: L(5, 4)}),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STEPPED)
def test_a_gradient_that_a_step_makes_zero_is_zero(name: str, method: str, dtype: torch.dtype) -> None:
    """The reference is the dense Hessian of the model with the step detached."""
    body, detached, parts = STEPPED[name]
    batch, uncovered = data(dtype=dtype), "not covered" in name
    objective = hd.Objective(net(body, dtype=dtype, **parts))
    if uncovered and method in ("exact", "propagation"):
        with pytest.raises(UncoveredModelError, match="Pow"):
            hd.measure(objective, [batch], method=method)
        return
    truth = dense_diagonal(
        net(detached, dtype=dtype, **parts).double(),
        lambda f, y: F.cross_entropy(f, y, reduction="none"),
        batch[0].double(),
        batch[1],
    )
    measured = hd.measure(objective, [batch], method=method, max_replicates=20)
    assert measured.plan.method == ("hutchinson" if uncovered and method == "auto" else measured.plan.method)
    found = hd.diagonal(objective, [batch], method=method, replicates=200)
    if found.method in ("exact", "reference"):
        agree(found.total, truth, TOLERANCE[dtype])
    else:
        size = max(float(wanted.abs().max()) for wanted in truth.values())
        for key, wanted in truth.items():
            off = (found.total[key].double() - wanted).abs()
            assert bool((off <= 6 * found.standard_errors[key] + 1e-5 * size).all()), key
    for part in (found.total, found.gauss_newton, found.functional):
        for key, wanted in truth.items():
            if not bool(wanted.any()):
                assert not bool(part[key].any()), key


@DTYPES
@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_part_is_left_out_and_the_rest_is_right(method: str, dtype: torch.dtype) -> None:
    parts = {"a": lambda: L(4, 4), "b": lambda: L(4, 3), "c": lambda: L(5, 4)}
    model, batch = net(_no_gradient, dtype=dtype, **parts), data(dtype=dtype)
    with pytest.raises(AuditError, match=r"'c.weight, c.bias'.*parameters="):
        hd.measure(hd.Objective(model), [batch], method=method)
    objective = hd.Objective(model, parameters=r"[ab]\..*")
    found = hd.measure(objective, [batch], method=method, max_replicates=10, keep_diagonal=True)
    if method in ("auto", "exact", "reference"):
        assert found.diagonal is not None
        truth = by_products(model, batch)
        agree(found.diagonal.total, {name: truth[name] for name in objective.parameters}, TOLERANCE[dtype])


class Rms(nn.Module):
    """A root mean square norm that computes in float32, as language models' do."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _attention(s: Any, x: Tensor) -> Tensor:
    return s.b(torch.tanh(F.softmax(s.a(x), -1, dtype=torch.float32).to(x.dtype) * s.c(x)))


SHORT: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "norm": (lambda s, x: s.b(torch.tanh(s.n(s.a(x))) + s.c(x)), METHODS),
    "softmax": (_attention, ("auto", "hutchinson", "reference")),
}


@DTYPES
@pytest.mark.parametrize("name", SHORT)
def test_parts_in_float32_pass_the_audit(name: str, dtype: torch.dtype) -> None:
    body, methods = SHORT[name]
    model, batch = net(body, dtype=dtype, n=Rms, **PARTS), data(dtype=dtype)
    for method in methods:
        found = hd.measure(hd.Objective(model), [batch], method=method, max_replicates=10)
        assert found.audit is not None
        assert found.audit.dtype == "float64"
        assert max(e.deviation for e in found.audit.entries if e.check in ("identity", "symmetry")) < 1e-10


@DTYPES
@pytest.mark.parametrize("tied", [False, True])
def test_pad_tokens_are_constants(tied: bool, dtype: torch.dtype) -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        h = torch.tanh(s.e(x)).mean(1)
        return h @ s.e.weight.T[:, :3] if tied else s.b(h)

    model = net(body, dtype=dtype, e=lambda: nn.Embedding(7, 4, padding_idx=2), b=lambda: L(4, 3))
    if tied:
        model.get_submodule("b").requires_grad_(False)
    with torch.no_grad():
        model.get_parameter("e.weight")[2] = 0.7
    g = torch.Generator().manual_seed(0)
    batch = (torch.randint(0, 7, (N, 5), generator=g), torch.randint(0, 3, (N,), generator=g))
    for method in ("auto", "hutchinson", "reference"):
        hd.measure(hd.Objective(model), [batch], method=method, max_replicates=10)


class OnceOnly(torch.autograd.Function):
    """A loss whose gradient may not be differentiated: its Hessian passes for zero."""

    @staticmethod
    def forward(ctx: Any, f: Tensor) -> Tensor:
        ctx.save_for_backward(f)
        return f.square().sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        return 2 * f * g[:, None]


def lacking(f: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.hardsigmoid(f).sum(1)  # type: ignore[no-any-return]


def once(f: Tensor, y: Tensor) -> Tensor:
    return OnceOnly.apply(f)  # type: ignore[no-untyped-call,no-any-return]


def detached_weight(f: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(f, y, reduction="none")
    return (1 - (-losses).exp()).detach() * losses


@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("loss", "message"),
    [(lacking, "'lacking' has no second derivative"), (once, "of 'once' is off"), (detached_weight, "detach")],
)
def test_losses_without_their_second_derivative(loss: Any, message: str, method: str, dtype: torch.dtype) -> None:
    model = net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    with pytest.raises((AuditError, UncoveredModelError), match=message) as caught:
        hd.measure(hd.Objective(model, loss), [data(dtype=dtype)], method=method)
    assert "\n" not in str(caught.value)


@DTYPES
def test_checkpointing_that_is_not_reentrant(dtype: torch.dtype) -> None:
    def body(s: Any, x: Tensor, *, again: bool = True) -> Tensor:
        h = torch.tanh(s.a(x))

        def block(h: Tensor) -> Tensor:
            return s.n(torch.tanh(s.d(h) + s.shift) * s.gain)

        h = checkpoint(block, h, use_reentrant=False) if again else block(h)
        return s.b(h.mean((2, 3)))

    parts = {
        "a": lambda: nn.Conv2d(2, 3, 2), "d": lambda: nn.Conv2d(3, 3, 2), "n": lambda: nn.BatchNorm2d(3),
        "shift": lambda: torch.randn(3, 1, 1), "gain": lambda: torch.randn(3, 1, 1), "b": lambda: L(3, 3),
    }  # fmt: skip
    model, plain = net(body, dtype=dtype, **parts), net(lambda s, x: body(s, x, again=False), dtype=dtype, **parts)
    x, y = data(2, 5, 5, dtype=dtype)
    truth = by_products(plain, (x, y))
    agree(hd.diagonal(hd.Objective(model), [(x, y)]).total, truth, TOLERANCE[dtype])
    agree(expected_propagation(hd.Objective(model), x, y, rank=4), truth, TOLERANCE[dtype])
    for method in ("exact", "propagation", "hutchinson"):
        hd.measure(hd.Objective(model), [(x, y)], method=method, max_replicates=10)


# -- numbers that no dtype holds


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-17), (torch.float32, 1e-26), (torch.float64, 1e-80)])
def test_underflow_of_squares_is_a_status(size: float, dtype: torch.dtype, method: str) -> None:
    model = net(lambda s, x: size * s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    x, _ = data(dtype=dtype)
    found = hd.measure(hd.Objective(model, "half_mse"), [(x, size * x[:, :3])], method=method, max_replicates=10)
    assert found.status == "underflow"
    assert any("a.weight" in note and "lost" in note for note in found.notes)


@DTYPES
def test_one_tensor_underflows_and_zeros_are_zeros(dtype: torch.dtype) -> None:
    size = 1e-17 if dtype == torch.float32 else 1e-80
    model = net(
        lambda s, x: s.b(torch.tanh(s.a(x))) + size * s.c(x) + 0 * s.d(x),
        dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3), c=lambda: L(5, 3), d=lambda: L(5, 3),
    )  # fmt: skip
    found = hd.measure(hd.Objective(model), [data(dtype=dtype)], method="exact")
    assert found.status == "exact; underflow of some tensors"
    note = next(note for note in found.notes if "lost" in note)
    assert "c.weight, c.bias;" in note
    assert "d.weight" not in note
    assert "a.weight" not in note
    kept = hd.diagonal(hd.Objective(model), [data(dtype=dtype)])
    assert kept.status == "exact; underflow of some tensors"
    assert kept.provenance["underflow"] == ["c.weight", "c.bias"]


@DTYPES
def test_a_population_that_underflows_says_so(dtype: torch.dtype) -> None:
    size = 1e-17 if dtype == torch.float32 else 1e-80
    model = net(lambda s, x: size * s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = hd.measure(
        hd.Objective(model, "half_mse"), [(x, size * x[:, :3])], method="propagation", target="population"
    )
    assert found.status == "underflow"
    assert hd.diagonal(hd.Objective(model, "half_mse"), [(x, size * x[:, :3])]).status == "underflow"


# -- what propagation's audit looks at


@pytest.mark.parametrize("wrong", ["weighted", "remote"])
def test_the_audit_of_propagation_sees_its_closed_shares(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(
        lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x)))).mean((2, 3))),
        a=lambda: nn.Conv2d(2, 3, 2), b=lambda: nn.Conv2d(3, 3, 2), c=lambda: L(3, 3),
    )  # fmt: skip
    batch = data(2, 5, 5)
    assert hd.measure(hd.Objective(model), [batch], method="propagation", max_replicates=10).audit is not None
    if wrong == "weighted":
        weighted = Conv.weighted
        monkeypatch.setattr(Conv, "weighted", lambda s, c: {n: 1.01 * t for n, t in weighted(s, c).items()})
    else:
        monkeypatch.setattr(Linearisation, "remote", lambda _self, _place, cotangent, _seeds: cotangent)
    with pytest.raises(AuditError, match="closed of layer"):
        hd.measure(hd.Objective(model), [batch], method="propagation", max_replicates=10)


@DTYPES
@pytest.mark.parametrize("wrong", ["weighted", "one_output"])
def test_the_audit_of_propagation_sees_what_layers_have_in_the_outputs(
    wrong: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighted squares that serve the outputs alone, and one unit of many outputs that bend together."""
    model = net(
        lambda s, x: s.b(torch.tanh(s.a(x))).flatten(1), dtype=dtype, a=lambda: L(3, 4), b=lambda: L(4, 2)
    )  # fmt: skip
    batch = data(20, 3, dtype=dtype)
    found = hd.measure(hd.Objective(model), [batch], method="propagation", max_replicates=10)
    assert found.plan.gauss_newton == "signs"
    if wrong == "weighted":
        model = net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 40))
        batch, weighted = data(dtype=dtype), Linear.weighted
        monkeypatch.setattr(
            Linear,
            "weighted",
            lambda s, c: {n: (1.01 if n == "b.bias" else 1.0) * t for n, t in weighted(s, c).items()},
        )
    else:
        monkeypatch.setattr(Linear, "one_output", classmethod(lambda *_: True))
    with pytest.raises(AuditError, match="heads of layer 'b"):
        hd.measure(hd.Objective(model), [batch], method="propagation", max_replicates=10)


# -- what switches with shapes and counts


def test_sites_without_samples_keep_their_numbers_beside_sites_that_vanish() -> None:
    """The last step is not looked at, its sites have no weight: what came after them was renumbered."""
    model = net(
        lambda s, x: s.b(s.n(s.a(x)[0][:, 1])),
        a=lambda: nn.LSTM(3, 2, batch_first=True), n=lambda: nn.utils.parametrizations.weight_norm(L(2, 4)), b=lambda: L(4, 3),
    )  # fmt: skip
    x, y = data(3, 3)
    assert any(not bool(site.c.any()) for site in Linearisation(hd.Objective(model), x, y).sites)
    agree(hd.diagonal(hd.Objective(model), [(x, y)]).total, by_products(model, (x, y)), 1e-10)


@DTYPES
def test_a_callable_loss_of_outputs_with_three_axes(dtype: torch.dtype) -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (torch.sin(f).sum(2) * f[:, :, 0] ** 2).sum(1)

    model = net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    x, y = data(4, 5, dtype=dtype)
    truth = by_products(model, (x, y), loss=loss)
    agree(hd.diagonal(hd.Objective(model, loss), [(x, y)]).total, truth, TOLERANCE[dtype])
    agree(expected_propagation(hd.Objective(model, loss), x, y), truth, TOLERANCE[dtype])


ALONE: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[[], Any]], tuple[int, ...]]] = {
    "constants under a gain and a bias": (
        lambda s, x: s.b(s.n(x.relu())), {"n": lambda: nn.GroupNorm(1, 5), "b": lambda: L(5, 3)}, (5,)),
    "a gain, then a layer on tokens": (
        lambda s, x: s.b(torch.tanh(s.a(x + 0.3 * (x * s.g)))).mean(1),
        {"g": lambda: torch.randn(5), "a": lambda: L(5, 4), "b": lambda: L(4, 3)}, (4, 5)),
    "a scaled parameter as a gain": (
        lambda s, x: s.b((s.g / 0.8) * torch.tanh(s.a(x)) - 0.6 * s.h),
        {"g": lambda: torch.randn(4), "h": lambda: torch.randn(4), "a": lambda: L(5, 4), "b": lambda: L(4, 3)}, (5,)),
    "a parameter times constants": (
        lambda s, x: s.b(torch.tanh(s.a(x) * (s.g * torch.arange(4.0, dtype=x.dtype)))),
        {"g": lambda: torch.randn(4), "a": lambda: L(5, 4), "b": lambda: L(4, 3)}, (5,)),
    "an orthogonal weight": (
        lambda s, x: s.b(torch.tanh(s.a(x))),
        {"a": lambda: nn.utils.parametrizations.orthogonal(L(5, 4)), "b": lambda: L(4, 3)}, (5,)),
    "a constant times a weight": (
        lambda s, x: s.b(torch.tanh(x @ (torch.arange(15, dtype=x.dtype).sin().reshape(5, 3) @ s.w))),
        {"w": lambda: torch.randn(3, 4), "b": lambda: L(4, 3)}, (5,)),
    "a weight that a net gives for places": (
        lambda s, x: s.b(torch.tanh(F.linear(x, s.c(torch.tanh(s.a(torch.linspace(-1, 1, 4, dtype=x.dtype)[:, None])))))),
        {"a": lambda: L(1, 3), "c": lambda: L(3, 5), "b": lambda: L(4, 3)}, (5,)),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", ALONE)
def test_a_batch_of_one_sample(name: str, dtype: torch.dtype) -> None:
    """What has samples and what has none cannot be told by gradients there."""
    body, parts, shape = ALONE[name]
    model = net(body, dtype=dtype, **parts)
    x, y = data(*shape, dtype=dtype)
    batches = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    truth = by_products(model, *batches)
    objective = hd.Objective(model)
    agree(hd.diagonal(objective, batches).total, truth, TOLERANCE[dtype])
    alone = by_products(model, batches[1])
    agree(expected_propagation(objective, *batches[1]), alone, TOLERANCE[dtype])


@DTYPES
def test_a_model_of_shared_weights_alone(dtype: torch.dtype) -> None:
    """Directions are found at layers, of which there is none."""
    model = net(
        lambda s, x: torch.tanh(F.linear(x, s.w.cumsum(0))).log_softmax(1), dtype=dtype, w=lambda: torch.randn(3, 5) / 2
    )
    x, y = data(dtype=dtype)
    truth = by_products(model, (x, y))
    agree(expected_propagation(hd.Objective(model), x, y, rank=4), truth, TOLERANCE[dtype])
    assert hd.measure(hd.Objective(model), [(x, y)], method="propagation", plan=Plan("propagation", deflate=4)).status


@DTYPES
def test_a_branch_that_starts_at_zero(dtype: torch.dtype) -> None:
    """No gradient tells that its weights, standardised and scaled by numbers, have no samples."""

    def body(s: Any, x: Tensor) -> Tensor:
        w = F.batch_norm(s.w[None], None, None, weight=s.g * 0.7, training=True, momentum=0.0)[0]
        return s.b(x[:, :4] + torch.tanh(F.linear(x, w * torch.linspace(1, 2, 5, dtype=x.dtype))) * s.skip)

    parts: dict[str, Any] = {"w": lambda: torch.randn(4, 5), "g": lambda: torch.randn(4), "b": lambda: L(4, 3)}
    for skip in (0.0, 0.3):
        model = net(body, dtype=dtype, skip=lambda skip=skip: torch.tensor(skip), **parts)
        x, y = data(n=4, dtype=dtype)
        truth = by_products(model, (x, y))
        agree(hd.diagonal(hd.Objective(model), [(x, y)]).total, truth, TOLERANCE[dtype])
        agree(expected_propagation(hd.Objective(model), x, y), truth, TOLERANCE[dtype])


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_small_matrices_whose_rows_bend_apart_or_together(samples: int) -> None:
    """Two rows of two: one random half of the entries, alike in every row, took each entry for a row of its own."""
    model = net(
        lambda s, x: s.b(torch.cat([s.a(x), s.a(x).var(1, keepdim=True), s.c(x).var(1, keepdim=True)], 1)),
        a=lambda: L(5, 2), c=lambda: L(5, 3), b=lambda: L(4, 3),
    )  # fmt: skip
    x, y = data(n=samples)
    truth = by_products(model, (x, y))
    agree(hd.diagonal(hd.Objective(model), [(x, y)]).total, truth, 1e-10)
    agree(expected_propagation(hd.Objective(model), x, y), truth, 1e-10)


@pytest.mark.parametrize("samples", [3, 4, 8, 20])
def test_samples_that_change_places_are_refused(samples: int) -> None:
    """Two of one half, there and back: no half sees the other, but uses of a shared weight are summed across samples."""
    order = torch.randperm(samples, generator=cpu_generator(samples))
    half = (order < (samples + 1) // 2).nonzero()[:2, 0]
    swapped = torch.arange(samples)
    swapped[half] = half.flip(0)
    model = net(
        lambda s, x: s.b(torch.tanh(s.a(torch.tanh(s.a(x))[swapped]))[swapped]), a=lambda: L(5, 5), b=lambda: L(5, 3)
    )
    x, y = data(n=samples)
    linear = Linearisation(hd.Objective(model), x, y)
    with pytest.raises(UncoveredModelError, match="'a' the samples of a batch change places"):
        check_separate(linear)


def test_where_samples_change_places_auto_takes_hutchinson() -> None:
    """Two samples need not: the audit, which looks at two, saw nothing, and the work refused what was to fall back."""

    def sorted_by_size(s: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return s.b(torch.tanh(s.a(x[order]))[order.argsort()])  # type: ignore[no-any-return]

    model = net(sorted_by_size, a=lambda: L(5, 4), b=lambda: L(4, 3))
    x, y = data()
    x = x[torch.cat([x[:2, 0].argsort(), torch.arange(2, N)])]
    found = hd.measure(hd.Objective(model), [(x, y)], max_replicates=10)
    assert found.plan.method == "hutchinson"
    assert any("the samples of a batch" in note for note in found.notes)


@pytest.mark.parametrize(
    ("body", "shape", "words"),
    [
        (lambda s, x: s.b(torch.tanh(s.w @ x.T).T[:, :4]), (5, N), "Mm at .* 'w' meets samples that do not lie on the first axis"),
        (lambda s, x: s.b(torch.tanh(x[:, :4] * s.w[torch.arange(len(x)) % 2])), (2, 4), "'w' comes .* follow their places"),
    ],
)  # fmt: skip
def test_samples_beside_the_first_axis_are_told(body: Any, shape: tuple[int, ...], words: str) -> None:
    model = net(body, w=lambda: torch.randn(shape), b=lambda: L(4, 3))
    x, y = data(N)
    with pytest.raises(UncoveredModelError, match=words):
        Propagator(Linearisation(hd.Objective(model), x[:2], y[:2]))


@DTYPES
def test_a_diagonal_that_is_zero_up_to_rounding_passes_the_audit(dtype: torch.dtype) -> None:
    """One bias for all scores under a softmax."""
    model = net(
        lambda s, x: s.b(torch.tanh((s.a(x).softmax(1) * x).sum(1))), dtype=dtype, a=lambda: L(5, 1), b=lambda: L(5, 3)
    )
    for seed in range(6):
        x, y = data(4, 5, dtype=dtype, seed=seed)
        found = hd.diagonal(hd.Objective(model), [(x, y)], seed=seed)
        assert float(found.total["a.bias"].abs().max()) <= torch.finfo(dtype).eps
