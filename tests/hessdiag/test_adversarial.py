"""Models in public idioms against the dense Hessian, and inputs that once gave a wrong number or a raw traceback."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import beyond_in_the_mean, dense_diagonal
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import (
    AuditError,
    ConfigurationError,
    DtypeError,
    HessdiagError,
    NoParametersError,
    NotDeterministicError,
    TargetError,
    UncoveredModelError,
)
from hessdiag.graph import Linearisation
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import accumulate
from hessdiag.methods.plan import Plan

torch.set_num_threads(1)
N = 4
L, C = nn.Linear, nn.Conv2d


class Built(nn.Module):
    """Modules and parameters by name, and the forward pass as a function of both."""

    def __init__(self, forward: Callable[..., Any], shapes: dict[str, tuple[int, ...]], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.body = forward

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def data(*shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, *shape, generator=g, dtype=torch.float64), torch.randint(0, 3, (N,), generator=g)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(L(5, 4), nn.Tanh(), L(4, 3)).to(dtype).eval()


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


def expected_propagation(objective: hd.Objective, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The expectation of propagation over its signs: one pass per scalar site instead of random ones."""
    batch = Linearisation(objective, x, y)
    propagator = Propagator(batch)
    out = beyond_in_the_mean(propagator)
    for part in (propagator.direct(), propagator.gauss_newton()):
        accumulate(out, part)
    return {name: value / batch.weight for name, value in out.items()}


def highway(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.i(x))
    t = torch.sigmoid(s.t(h))
    return s.o(t * F.relu(s.h(h)) + (1 - t) * h)


def unet(s: Any, x: Tensor) -> Tensor:
    a = torch.tanh(s.a(x))
    b = F.silu(s.b(F.max_pool2d(a, 2)))
    return s.c(torch.cat([a, F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)], 1)).mean((2, 3))


def excite(s: Any, x: Tensor) -> Tensor:
    h = s.c(x)
    gate = torch.sigmoid(s.e(h.mean((2, 3))))
    return s.f((h * gate[:, :, None, None]).mean((2, 3)))


def in_place(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    k = h + 1
    F.relu_(h)
    out = 2 * torch.sin(k)
    out += torch.tanh(h)
    return s.b(out)


def root_mean_square(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.b(h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-3))


COVERED: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "squeeze and excite": ((2, 4, 4), lambda: Built(excite, {}, c=C(2, 3, 3), e=L(3, 3), f=L(3, 3))),
    "depthwise, hardswish": ((2, 5, 5), lambda: Built(
        lambda s, x: s.f(F.hardswish(s.d(F.hardswish(s.b(s.c(x))))).mean((2, 3))), {},
        c=C(2, 3, 3, stride=2, padding=1), b=nn.BatchNorm2d(3), d=C(3, 3, 2, groups=3), f=L(3, 3))),
    "u-net": ((2, 4, 4), lambda: Built(unet, {}, a=C(2, 2, 3, padding=1), b=C(2, 2, 1), c=C(4, 3, 1))),
    "transposed convolution frozen": ((2, 4, 4), lambda: Built(
        lambda s, x: s.f(torch.tanh(s.t(torch.tanh(s.c(x)))).mean((2, 3))), {},
        c=C(2, 2, 3), t=nn.ConvTranspose2d(2, 3, 2).requires_grad_(False), f=L(3, 3))),
    "pixel shuffle": ((2, 4, 4), lambda: Built(
        lambda s, x: s.d(torch.tanh(F.pixel_shuffle(torch.tanh(s.c(x)), 2))).mean((2, 3)), {}, c=C(2, 4, 3),
        d=C(1, 3, 2))),
    "gated tokens": ((3, 5), lambda: Built(
        lambda s, x: s.o(F.silu(s.a(x)) * s.b(x)).mean(1), {}, a=L(5, 3), b=L(5, 3, bias=False), o=L(3, 3))),
    "highway": ((5,), lambda: Built(highway, {}, i=L(5, 3), t=L(3, 3), h=L(3, 3), o=L(3, 3))),
    "max-out": ((5,), lambda: Built(
        lambda s, x: s.b(torch.tanh(s.a(x).view(len(x), 3, 4).amax(1))), {}, a=L(5, 12), b=L(4, 3))),
    "rms norm by hand": ((5,), lambda: Built(root_mean_square, {}, a=L(5, 4), b=L(4, 3))),
    "matrix turned by .T": ((5,), lambda: Built(
        lambda s, x: torch.tanh(x @ s.w.T) @ s.v.T, {"w": (4, 5), "v": (3, 4)})),
    "square matrix turned by nothing": ((5,), lambda: Built(
        lambda s, x: s.b(torch.tanh(x @ s.w.mT)), {"w": (5, 5)}, b=L(5, 3))),
    "matrix and bias as they are": ((5,), lambda: Built(
        lambda s, x: torch.tanh(x @ s.w + s.k) @ s.v + s.d, {"w": (5, 4), "k": (4,), "v": (4, 3), "d": (1, 3)})),
    "a scalar added": ((5,), lambda: Built(
        lambda s, x: s.b(torch.tanh(s.a(x) + s.k)), {"k": ()}, a=L(5, 4), b=L(4, 3))),
    "layer scale": ((3, 5), lambda: Built(
        lambda s, x: s.b(x + s.g * torch.tanh(s.a(x))).mean(1), {"g": (5,)}, a=L(5, 5), b=L(5, 3))),
    "positional embedding": ((3, 5), lambda: Built(
        lambda s, x: s.b(torch.tanh(s.a(x) + s.pos)).mean(1), {"pos": (1, 3, 4)}, a=L(5, 4), b=L(4, 3))),
    "in place": ((5,), lambda: Built(in_place, {}, a=L(5, 4), b=L(4, 3))),
    "branches": ((5,), lambda: Built(
        lambda s, x: s.b((lambda h: torch.where(h > 0, torch.sin(h), h**3))(s.a(x))), {}, a=L(5, 4), b=L(4, 3))),
    "mixer": ((3, 5), lambda: Built(
        lambda s, x: s.b((lambda h: h + torch.tanh(s.t(h.transpose(1, 2))).transpose(1, 2))(s.a(x))).mean(1), {},
        a=L(5, 4), t=L(3, 3), b=L(4, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", COVERED)
def test_public_idioms_against_the_dense_hessian(name: str) -> None:
    shape, build = COVERED[name]
    torch.manual_seed(3)
    model = build().double().eval()
    x, y = data(*shape)
    truth = dense_diagonal(model, cross_entropy, x, y)
    objective = hd.Objective(model)
    whole = hd.diagonal(objective, [(x, y)]).total
    mean = expected_propagation(objective, x, y)
    for key in objective.parameters:
        assert (whole[key] - truth[key]).norm() <= 1e-9 * truth[key].norm() + 1e-15, key
        assert (mean[key] - truth[key]).norm() <= 1e-9 * truth[key].norm() + 1e-15, key


def used_twice(s: Any, x: Tensor) -> Tensor:
    turned = s.w.t()
    return s.b(torch.tanh(x @ turned) + torch.tanh(2 * x @ turned))


def overwritten(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    k = F.silu(h)
    h.mul_(2)
    return s.b(k + h)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a bias that is one number": (lambda: Built(
        lambda s, x: s.b(torch.tanh(torch.addmm(s.k, x, s.w))), {"k": (1,), "w": (5, 4)}, b=L(4, 3)), r"shape \[1\]"),
    "overwritten in place": (lambda: Built(overwritten, {}, a=L(5, 4), b=L(4, 3)), "overwritten in place"),
    "complex": (lambda: Built(
        lambda s, x: s.b(torch.fft.irfft(torch.fft.rfft(s.a(x)) ** 2, n=4)), {}, a=L(5, 4), b=L(4, 3)), "complex numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_and_where(name: str) -> None:
    build, message = REFUSED[name]
    torch.manual_seed(3)
    model = build().double()
    with pytest.raises(UncoveredModelError, match=message) as caught:
        hd.diagonal(hd.Objective(model), [data(5)])
    assert "\n" not in str(caught.value)


def test_a_batch_cut_in_two_keeps_its_halves_apart() -> None:
    """Groups of 16 samples cut a batch of 21 into 16 and 5; the graph of one must not serve the other."""
    torch.manual_seed(3)
    model = Built(lambda s, x: s.b(torch.tanh(s.c(x)).mean((2, 3))), {}, c=C(2, 2, 3), b=L(2, 3)).double()
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(21, 2, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (21,), generator=g)
    objective = hd.Objective(model)
    exact = hd.diagonal(objective, [(x, y)]).total
    plan = Plan("propagation", sample_groups={"c": 16, "b": 16})
    found = hd.diagonal(objective, [(x, y)], method="propagation", plan=plan, replicates=100)
    # Seeded; normal quantile for 5e-5 per entry, 45 entries: false alarm 0.2 %.
    z = (found.total["c.weight"] - exact["c.weight"]) / found.standard_errors["c.weight"].clamp(min=1e-12)
    assert float(z.abs().max()) < 4.1
    assert torch.allclose(found.total["b.weight"], exact["b.weight"])


class Quiet(torch.autograd.Function):
    """Tanh whose backward forgets how it depends on its input: second derivatives are silently wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return g * (1 - r.detach() ** 2)


def segments(h: Tensor) -> Tensor:
    """Sums of the two halves of a row: torch has no second derivative of this operation."""
    return torch.segment_reduce(h, "sum", lengths=torch.full((len(h), 2), 2), axis=1)


def straight_through(h: Tensor) -> Tensor:
    return h + (h.round() - h).detach()


@pytest.mark.parametrize("function", [Quiet.apply, straight_through])
@pytest.mark.parametrize("method", ["reference", "hutchinson"])
def test_second_derivatives_that_are_not_the_models_fail_the_audit(function: Any, method: str) -> None:
    torch.manual_seed(3)
    model = Built(lambda s, x: s.b(function(s.a(x))), {}, a=L(5, 4), b=L(4, 3)).double()
    with pytest.raises(AuditError, match=r"difference|slope"):
        hd.measure(hd.Objective(model), [data(5)], method=method, max_replicates=10)


def test_hooks_on_parameters_change_no_hessian_and_are_kept() -> None:
    x, y = data(5)
    truth = dense_diagonal(mlp(), cross_entropy, x, y)
    model = mlp()
    weight = model.get_parameter("0.weight")
    weight.register_hook(lambda g: 0 * g)
    for method in ("exact", "reference"):
        found = hd.diagonal(hd.Objective(model), [(x, y)], method=method).total
        assert torch.allclose(found["0.weight"], truth["0.weight"], rtol=1e-9)
    cross_entropy(model(x), y).sum().backward()
    assert weight.grad is not None
    assert not bool(weight.grad.any())


@pytest.mark.parametrize("kind", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
@pytest.mark.parametrize("doubling", [False, True])
def test_hooks_on_every_module_change_no_hessian_and_are_kept(kind: str, doubling: bool) -> None:
    """Those that only look hide the layers behind nodes of their own; those that change gradients, the Hessian."""
    x, y = data(5)
    truth = dense_diagonal(mlp(), cross_entropy, x, y)
    model, calls = mlp(), [0]

    def hook(_module: nn.Module, *gradients: tuple[Tensor | None, ...]) -> Any:
        calls[0] += 1
        return tuple(None if g is None else 2 * g for g in gradients[0]) if doubling else None

    handle = getattr(nn.modules.module, kind)(hook)
    try:
        for method in ("exact", "reference"):
            found = hd.diagonal(hd.Objective(model), [(x, y)], method=method).total
            for name, entries in truth.items():
                assert torch.allclose(found[name], entries, rtol=1e-9, atol=1e-15)
        assert hd.measure(hd.Objective(model), [(x, y)], method="propagation", max_replicates=10).plan.method
        assert not calls[0]
        cross_entropy(model(x), y).sum().backward()
        assert calls[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("method", ["exact", "propagation", "hutchinson", "reference"])
def test_default_device_and_dtype_do_not_matter(method: str) -> None:
    x, y = data(5)
    model = mlp()
    expected = hd.diagonal(hd.Objective(model), [(x, y)], method=method).total
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        found = hd.diagonal(hd.Objective(model), [(x, y)], method=method).total
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Moody(nn.Module):
    """Counts its calls in a buffer bound anew each time, makes another, and draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.a = L(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.register_buffer("last", x.detach())
        return self.a(torch.tanh(x) + 0 * torch.randn(5, dtype=x.dtype))


def test_buffers_and_random_state_are_handed_back() -> None:
    model = Moody().double().eval()
    state = torch.get_rng_state()
    hd.measure(hd.Objective(model), [data(5)])
    assert torch.equal(state, torch.get_rng_state())
    assert float(model.calls) == 0
    assert set(model.state_dict()) == {"a.weight", "a.bias", "calls"}


def test_inference_mode_around_the_measurement_does_no_harm() -> None:
    objective, batches = hd.Objective(mlp()), [data(5)]
    with torch.inference_mode():
        inside = hd.measure(objective, batches, method="exact").rms
    assert inside == hd.measure(objective, batches, method="exact").rms


class Later:
    """Two passes alike, then other data."""

    def __init__(self, *, shorter: bool) -> None:
        self.passes, self.shorter = 0, shorter

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        x, y = data(5)
        yield x, y
        if self.passes < 3 or not self.shorter:
            yield x + (0.1 if self.passes > 2 else 0.0), y


@pytest.mark.parametrize("shorter", [True, False])
def test_data_that_change_after_the_second_pass_are_refused(shorter: bool) -> None:
    with pytest.raises(NotDeterministicError, match="later pass"):
        hd.measure(hd.Objective(mlp()), Later(shorter=shorter), method="exact")


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_a_loss_that_mixes_samples_is_refused(method: str) -> None:
    def contrast(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f - f.mean(0), y, reduction="none")

    with pytest.raises(UncoveredModelError, match="'contrast' mixes the samples"):
        hd.measure(hd.Objective(mlp(), contrast), [data(5)], method=method)


def test_an_objective_older_than_its_model_is_refused() -> None:
    model = mlp()
    objective = hd.Objective(model)
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)  # type: ignore[index]
    with pytest.raises(ConfigurationError, match="make it anew"):
        hd.measure(objective, [data(5)])


def test_fitted_samples_do_not_fail_the_audit() -> None:
    """At loss 1e-9 autograd's own products have lost their digits; the audit asks for no more than it has."""
    model = mlp()
    x, _ = data(5)
    with torch.no_grad():
        model[2].weight.mul_(60)  # type: ignore[index]
        y = model(x).argmax(1)
    for method in ("exact", "propagation"):
        assert hd.measure(hd.Objective(model), [(x, y)], method=method, max_replicates=10).audit is not None


def test_inputs_with_tables_and_numbers_beside_the_samples() -> None:
    x, y = data(5)
    plain = hd.measure(hd.Objective(mlp()), [(x, y)], method="exact").rms
    model = mlp()
    wrapped = Built(lambda s, d: s.m(d["x"] @ d["eye"]) * d["one"], {}, m=model)
    batch = {"x": x, "eye": torch.eye(5, dtype=torch.float64), "one": torch.tensor(1.0, dtype=torch.float64)}
    assert hd.measure(hd.Objective(wrapped), [(batch, y)], method="exact").rms == pytest.approx(plain, rel=1e-12)


def test_a_loss_holding_float32_tensors() -> None:
    x, y = data(5)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="none")
    found = hd.measure(hd.Objective(mlp(torch.float32), loss), [(x.float(), y)], method="exact").rms
    double = copy.deepcopy(loss).double()
    assert found == pytest.approx(hd.measure(hd.Objective(mlp(), double), [(x, y)], method="exact").rms, rel=1e-5)


def raising(f: Tensor, y: Tensor) -> Tensor:
    raise ValueError("no\nsecond line")


X, Y = data(5)
BAD: dict[str, tuple[Callable[[], Any], type[HessdiagError]]] = {
    "wrong width": (lambda: hd.measure(hd.Objective(mlp()), [(data(6)[0], Y)]), ConfigurationError),
    "numpy": (lambda: hd.measure(hd.Objective(mlp()), [(X.numpy(), Y)]), ConfigurationError),
    "nested dtype": (lambda: hd.measure(hd.Objective(Built(lambda s, d: s.a(d[0]), {}, a=mlp())), [((X.float(),), Y)]),
                     DtypeError),
    "integers": (lambda: hd.measure(hd.Objective(mlp()), [(X.long(), Y)]), DtypeError),
    "complex outputs": (lambda: hd.measure(hd.Objective(Built(lambda s, x: s.a(x) + 0j, {}, a=mlp())), [(X, Y)]),
                        DtypeError),
    "loss raises": (lambda: hd.measure(hd.Objective(mlp(), raising), [(X, Y)]), ConfigurationError),
    "loss is a number": (lambda: hd.measure(hd.Objective(mlp(), lambda f, y: 3.0), [(X, Y)]),  # type: ignore[arg-type,return-value]
                         ConfigurationError),
    "loss detached": (lambda: hd.measure(hd.Objective(mlp(), lambda f, y: f.detach()[:, 0]), [(X, Y)]),
                      ConfigurationError),
    "negative probabilities": (lambda: hd.measure(hd.Objective(mlp()), [(X, -torch.rand(N, 3))]), TargetError),
    "no entries": (lambda: hd.Objective(Built(lambda s, x: s.a(x), {"u": (0, 3)}, a=mlp())), NoParametersError),
    "lazy": (lambda: hd.Objective(nn.Sequential(nn.LazyLinear(3))), ConfigurationError),
    "bad expression": (lambda: hd.Objective(mlp(), parameters="("), ConfigurationError),
    "seed": (lambda: hd.measure(hd.Objective(mlp()), [(X, Y)], seed=1.5), ConfigurationError),  # type: ignore[arg-type]
    "min_replicates": (lambda: hd.measure(hd.Objective(mlp()), [(X, Y)], min_replicates="5"),  # type: ignore[arg-type]
                       ConfigurationError),
    "no method": (lambda: hd.measure(hd.Objective(mlp()), [(X, Y)], method=None), ConfigurationError),  # type: ignore[arg-type]
    "a bare model": (lambda: hd.measure(mlp(), [(X, Y)]), ConfigurationError),  # type: ignore[arg-type]
    "no second derivative": (lambda: hd.measure(
        hd.Objective(Built(lambda s, x: s.b(segments(s.a(x))), {}, a=L(5, 4), b=L(2, 3)).double()),
        [(X, Y)], method="hutchinson"), UncoveredModelError),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name: str) -> None:
    run, kind = BAD[name]
    with pytest.raises(kind) as caught:
        run()
    assert "\n" not in str(caught.value)
