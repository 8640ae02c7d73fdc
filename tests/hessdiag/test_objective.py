"""Losses against torch and autograd, weighting by samples, and every refusal an objective makes."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import (
    ConfigurationError,
    DeviceError,
    DtypeError,
    EmptyDataError,
    NonFiniteError,
    NoParametersError,
    NotDeterministicError,
    OutOfMemoryError,
    StochasticModeError,
    TargetError,
    UncoveredModelError,
    UnknownNameError,
)
from hessdiag.methods.batches import check_deterministic, survey
from hessdiag.problem.losses import make_loss

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(7, 4, generator=G, dtype=torch.float64) * 3
CLASSES = torch.randint(0, 4, (7,), generator=G)
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
REAL = torch.randn(7, 4, generator=G, dtype=torch.float64)
PROBABILITIES = torch.softmax(REAL, 1)


def focal(f: Tensor, y: Tensor) -> Tensor:
    """A loss whose Hessian is indefinite."""
    p = torch.softmax(f, 1).gather(1, y[:, None])[:, 0]
    return -((1 - p) ** 2) * torch.log(p)


CASES = {
    "cross entropy": (make_loss("cross_entropy"), CLASSES, lambda f: F.cross_entropy(f, CLASSES)),
    "smoothing": (
        make_loss("cross_entropy", label_smoothing=0.2),
        CLASSES,
        lambda f: F.cross_entropy(f, CLASSES, label_smoothing=0.2),
    ),
    "weights": (
        make_loss("cross_entropy", class_weights=WEIGHTS),
        CLASSES,
        lambda f: F.cross_entropy(f, CLASSES, weight=WEIGHTS),
    ),
    "weights and smoothing": (
        make_loss("cross_entropy", class_weights=WEIGHTS, label_smoothing=0.1),
        CLASSES,
        lambda f: F.cross_entropy(f, CLASSES, weight=WEIGHTS, label_smoothing=0.1),
    ),
    "probabilities": (
        make_loss("cross_entropy", class_weights=WEIGHTS, label_smoothing=0.1),
        PROBABILITIES,
        lambda f: F.cross_entropy(f, PROBABILITIES, weight=WEIGHTS, label_smoothing=0.1),
    ),
    "mse": (make_loss("mse"), REAL, lambda f: F.mse_loss(f, REAL)),
    "half mse": (make_loss("half_mse"), REAL, lambda f: 0.5 * (f - REAL).square().sum(1).mean()),
    "bce": (make_loss("bce"), PROBABILITIES, lambda f: F.binary_cross_entropy_with_logits(f, PROBABILITIES)),
    "callable": (make_loss(focal), CLASSES, lambda f: focal(f, CLASSES).mean()),
}


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_hessian_factor(name: str) -> None:
    loss, targets, reference = CASES[name]
    f = LOGITS.clone().requires_grad_(True)
    weight = loss.weights(f, targets).sum()
    value = loss.values(f, targets).sum() / weight
    assert torch.allclose(value, reference(f), rtol=1e-12)
    found = loss.curvature(f.detach(), targets)
    assert torch.allclose(found.loss.sum() / weight, value, rtol=1e-12)
    (gradient,) = torch.autograd.grad(reference(f), f)
    assert (found.gradient / weight - gradient).norm() <= 1e-12 * gradient.norm()
    full = torch.autograd.functional.hessian(reference, LOGITS)
    for n in range(7):
        mine = torch.einsum("s,sc,sd->cd", found.signs, found.factor[:, n], found.factor[:, n]) / weight
        assert (mine - full[n, :, n]).norm() <= 1e-10 * full.norm()
    assert set(found.signs.tolist()) <= {1.0, -1.0}


@pytest.mark.parametrize("name", CASES)
def test_columns_are_summed_and_multiplied_as_if_they_were_written_out(name: str) -> None:
    loss, targets, _ = CASES[name]
    found = loss.curvature(LOGITS, targets)
    factor, generator = found.factor, torch.Generator().manual_seed(3)
    assert len(factor) == found.columns.count == len(found.signs)
    weights = torch.randn(*factor.shape[:2], generator=generator, dtype=torch.float64)
    vectors = torch.randn(*factor.shape[1:], generator=generator, dtype=torch.float64)
    against = torch.einsum("snc,nc->sn", factor, vectors)
    for mine, written in (
        (found.columns.combined(weights), torch.einsum("snc,sn->nc", factor, weights)),
        (found.columns.against(vectors), against),
        (found.times(vectors), torch.einsum("snc,sn,s->nc", factor, against, found.signs)),
        (found.columns.part(1, 2), factor[1:2]),
        (torch.stack([column for column, _ in found.each()]), factor),
    ):
        assert (mine - written).norm() <= 1e-14 * factor.norm() * (1 + weights.norm() + vectors.norm())


def test_a_hundred_thousand_classes_need_no_square() -> None:
    """200 GB if the factor of two samples and 100,000 classes were written out; the Hessian, times a vector, is right."""
    classes = 100_000
    f = torch.randn(2, classes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    v = torch.cos(torch.arange(2 * classes, dtype=torch.float64)).reshape(2, classes)
    p = torch.softmax(f, 1)
    for name, y, wanted in (
        ("cross_entropy", torch.tensor([0, classes - 1]), p * (v - (p * v).sum(1, keepdim=True))),
        ("half_mse", torch.zeros_like(f), v),
        ("bce", torch.zeros_like(f), torch.sigmoid(f) * torch.sigmoid(-f) * v / classes),
    ):
        found = make_loss(name).curvature(f, y)
        assert (found.times(v) - wanted).norm() <= 1e-12 * wanted.norm()
        column = found.columns.part(7, 8)[0]
        assert (found.columns.against(column)[7] - column.square().sum(1)).abs().max() <= 1e-12


def own_cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


def test_a_loss_of_ones_own_of_a_hundred_thousand_outputs_needs_no_square_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """80 GB a sample if its Hessian were written out: products serve Hutchinson, and what needs the square says so."""
    classes = 100_000
    torch.manual_seed(0)
    model = nn.Linear(2, classes)
    batches = [(torch.randn(2, 2), torch.tensor([0, classes - 1]))]
    monkeypatch.setattr(torch.linalg, "eigh", None)
    for method in ("exact", "propagation"):
        with pytest.raises(UncoveredModelError, match=r"160\.0 GB for 2 samples; name a loss .*method='hutchinson'"):
            hd.diagonal(hd.Objective(model, own_cross_entropy), batches, method=method)
    found = hd.measure(hd.Objective(model, own_cross_entropy), batches, max_replicates=4, min_replicates=4)
    wanted = hd.measure(hd.Objective(model), batches, method="hutchinson", max_replicates=4, min_replicates=4)
    assert found.plan.method == "hutchinson"
    assert found.rms == pytest.approx(wanted.rms, rel=1e-4)
    assert found.norm.gauss_newton.square == pytest.approx(wanted.norm.gauss_newton.square, rel=1e-3)


def test_the_batch_of_a_loss_of_ones_own_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.problem.persample.SQUARES", 8 * 4 * 4 * 5)
    fine, large = [(X[:5], Y[:5])], [(X[:6], Y[:6])]
    objective = hd.Objective(net(), own_cross_entropy)
    assert hd.diagonal(objective, fine, method="exact").samples == 5
    with pytest.raises(UncoveredModelError, match="lower the batch size to 5, or use method='hutchinson'"):
        hd.diagonal(objective, large, method="exact")


def test_products_and_columns_of_a_loss_of_ones_own_agree() -> None:
    """Chunks of samples as well; against the closed form, and of a Hessian of either sign against autograd."""
    f = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, v = torch.arange(7) % 5, torch.cos(torch.arange(35, dtype=torch.float64)).reshape(7, 5)

    def saddle(f: Tensor, y: Tensor) -> Tensor:
        return own_cross_entropy(f, y) + f[:, 0] * f[:, 1] ** 2

    for loss, wanted in (
        (own_cross_entropy, make_loss("cross_entropy").curvature(f, y).times(v)),
        (saddle, torch.autograd.functional.hvp(lambda x: saddle(x, y).sum(), f, v)[1]),
    ):
        found = make_loss(loss).curvature(f, y)
        assert (found.times(v) - wanted).norm() <= 1e-12 * wanted.norm()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hessdiag.problem.persample.WRITTEN", 2 * 25)
            written = found.columns.combined(found.columns.against(v) * found.signs[:, None])
        assert (written - wanted).norm() <= 1e-12 * wanted.norm()
        assert loss is not saddle or found.columns.count == 10
        units = torch.eye(5, dtype=torch.float64)[:3]
        assert torch.equal(found.some(3), torch.stack([found.times(unit.expand(7, 5)) for unit in units]))


def test_softmax_factor_keeps_its_digits_where_float32_loses_them() -> None:
    """A sample fitted to a loss of about 5e-7: p - 1 in float32 is off by per cents, here by float64 rounding."""
    f = torch.tensor([[14.5, 0.0, 0.0]])
    found = make_loss("cross_entropy").curvature(f, torch.tensor([0]))
    exact = torch.softmax(f.double(), 1)
    assert abs(float(found.gradient[0, 0]) - float(-(exact[0, 1] + exact[0, 2]))) <= 1e-9 * float(exact[0, 1])
    assert len(found.signs) == 2


def test_extreme_logits_stay_finite() -> None:
    f = torch.tensor([[2000.0, -2000.0, 0.0]])
    for loss, y in (("cross_entropy", torch.tensor([1])), ("bce", torch.tensor([[0.0, 1.0, 0.5]]))):
        found = make_loss(loss).curvature(f, y)
        assert bool(torch.isfinite(found.gradient).all())
        assert bool(torch.isfinite(found.factor).all())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


X = torch.randn(13, 5, generator=G, dtype=torch.float64)
Y = torch.randint(0, 4, (13,), generator=G)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.1, 1.0]])
@pytest.mark.parametrize("method", ["exact", "propagation", "hutchinson", "reference"])
def test_any_cut_into_batches_gives_the_same(method: str, weights: list[float] | None) -> None:
    """Unequal batches included: exact methods to rounding, stochastic ones with the same signs too."""
    objective = hd.Objective(net(), class_weights=weights)
    cuts = ([13], [1, 12], [5, 5, 3], [1] * 13)
    found = []
    for sizes in cuts:
        batches = list(zip(X.split(sizes), Y.split(sizes)))
        found.append(hd.diagonal(objective, batches, method=method, replicates=3, audit_model=False).total)
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert (other[name] - tensor).norm() <= 1e-11 * tensor.norm()


def test_class_weights_divide_by_the_weights_of_the_whole_data() -> None:
    weights = torch.tensor([0.5, 2.0, 0.1, 1.0], dtype=torch.float64)
    model = net()
    found = hd.diagonal(hd.Objective(model, class_weights=weights), [(X[:3], Y[:3]), (X[3:], Y[3:])])
    bias = dict(model.named_parameters())["2.bias"]
    (g,) = torch.autograd.grad(F.cross_entropy(model(X), Y, weight=weights), bias, create_graph=True)
    truth = torch.stack([torch.autograd.grad(g[i], bias, retain_graph=True)[0][i] for i in range(4)])
    assert torch.allclose(found.total["2.bias"], truth, rtol=1e-12)


def test_weight_decay_adds_to_every_entry_of_total_and_gauss_newton() -> None:
    for method in ("exact", "propagation", "hutchinson", "reference"):
        plain = hd.diagonal(hd.Objective(net()), [(X, Y)], method=method)
        decayed = hd.diagonal(hd.Objective(net(), l2=0.25), [(X, Y)], method=method)
        for name, tensor in plain.total.items():
            assert torch.allclose(decayed.total[name], tensor + 0.25, rtol=1e-11)
            assert torch.allclose(decayed.gauss_newton[name], plain.gauss_newton[name] + 0.25, rtol=1e-9, atol=1e-12)
            assert torch.allclose(decayed.functional[name], plain.functional[name], rtol=1e-9, atol=1e-12)


def refused(what: str) -> tuple[type[Exception], str, object]:
    model, double = net(), [(X, Y)]
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")  # type: ignore[index]
    overflow = net()
    with torch.no_grad():
        overflow[2].weight.fill_(1e308)  # type: ignore[union-attr]
    frozen = net().requires_grad_(False)
    shared = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3, bias=False)})
    shared["b"].weight = shared["a"].weight
    quantised = nn.Module()
    quantised.add_module("0", type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic"})())
    spectral = nn.ParameterDict({"w": torch.ones(3, dtype=torch.complex64)})
    m = hd.measure
    table: dict[str, tuple[type[Exception], str, object]] = {
        "no batches": (EmptyDataError, "no batches", lambda: m(hd.Objective(model), [])),
        "empty batch": (EmptyDataError, "batch 1 holds no samples", lambda: m(hd.Objective(model), [*double, (X[:0], Y[:0])])),
        "used generator": (ConfigurationError, "iterator", lambda: m(hd.Objective(model), iter(double))),
        "not iterable": (ConfigurationError, "iterable", lambda: m(hd.Objective(model), 3)),
        "no pair": (ConfigurationError, "batch 0", lambda: m(hd.Objective(model), [X])),
        "single samples": (TargetError, r"single sample.*feed\.batches", lambda: m(hd.Objective(model), [(X[0], Y[0])])),
        "numbers as targets": (TargetError, r"an int; .*feed\.batches", lambda: m(hd.Objective(model), [(X[0], 1)])),
        "forward of one tensor": (ConfigurationError, "a single input, that input by itself", lambda: m(
            hd.Objective(model, forward=lambda model, x: model(x["image"])), double)),
        "target too large": (TargetError, "target 4 is out of range", lambda: m(hd.Objective(model), [(X, Y * 0 + 4)])),
        "target negative": (TargetError, "target -1", lambda: m(hd.Objective(model), [(X, Y * 0 - 1)])),
        "target shape": (TargetError, "shape", lambda: m(hd.Objective(model), [(X, Y[:, None])])),
        "lengths": (TargetError, "13 inputs but 12 targets", lambda: m(hd.Objective(model), [(X, Y[:12])])),
        "mse broadcast": (TargetError, "shape", lambda: m(hd.Objective(model, "mse"), [(X, REAL[:1].expand(13, 4)[:, 0])])),
        "bce range": (TargetError, r"\[0, 1\]", lambda: m(hd.Objective(model, "bce"), [(X, torch.full((13, 4), 2.0))])),
        "float32 data": (DtypeError, "float32", lambda: m(hd.Objective(model), [(X.float(), Y)])),
        "half model": (DtypeError, "float16", lambda: hd.Objective(net().half())),
        "complex model": (DtypeError, "view_as_real", lambda: hd.Objective(spectral)),
        "empty model": (DeviceError, "'0.weight' is on the device 'meta'", lambda: hd.Objective(net().to("meta"))),
        "device": (DeviceError, "meta", lambda: m(hd.Objective(model), [(X.to("meta"), Y)])),
        "nan parameter": (NonFiniteError, "'0.weight'", lambda: hd.Objective(broken)),
        "nan input": (NonFiniteError, "batch 0: the inputs", lambda: m(hd.Objective(model), [(X * float("nan"), Y)])),
        "overflow": (NonFiniteError, "batch 0: layer '2'", lambda: m(hd.Objective(overflow), double)),
        "no parameters": (NoParametersError, "no parameters", lambda: hd.Objective(nn.Tanh())),
        "frozen": (NoParametersError, "requires_grad", lambda: hd.Objective(frozen)),
        "unknown parameter": (NoParametersError, "'3.weight'", lambda: hd.Objective(model, parameters=["3.weight"])),
        "tensors as names": (NoParametersError, r"names, not a Parameter: there are 0\.weight", lambda: hd.Objective(
            model, parameters=list(model.parameters()))),
        "another name": (NoParametersError, "'b.weight' is 'a.weight' under another name", lambda: hd.Objective(
            shared, parameters=["b.weight"])),
        "pattern of another name": (NoParametersError, "'b.weight' is 'a.weight'", lambda: hd.Objective(
            shared, parameters=r"b\..*")),
        "quantised": (NoParametersError, "measure the model that was quantised", lambda: hd.Objective(quantised)),
        "pattern": (NoParametersError, "matches", lambda: hd.Objective(model, parameters=r"layer.*")),
        "loss name": (UnknownNameError, "cross_entropy", lambda: hd.Objective(model, "cross_entrpy")),
        "method name": (UnknownNameError, "propagation", lambda: m(hd.Objective(model), double, method="propagtion")),
        "rtol": (ConfigurationError, "rtol", lambda: m(hd.Objective(model), double, rtol=0.0)),
        "one probe": (ConfigurationError, "whole numbers from 2 on", lambda: m(hd.Objective(model), double, max_replicates=1)),
        "one replicate": (ConfigurationError, "at least 2", lambda: hd.diagonal(hd.Objective(model), double, replicates=1)),
        "confidence": (ConfigurationError, "confidence", lambda: m(hd.Objective(model), double, confidence=1.0)),
        "l2": (ConfigurationError, "l2", lambda: hd.Objective(model, l2=-1.0)),
        "class weights": (ConfigurationError, "3 class weights for 4", lambda: m(hd.Objective(model, class_weights=[1, 1, 1]), double)),
        "reduced callable": (ConfigurationError, "reduction", lambda: m(hd.Objective(model, lambda f, y: f.sum()), double)),
        "population": (ConfigurationError, "at least 32 samples", lambda: m(hd.Objective(model), double, target="population")),
    }  # fmt: skip
    return table[what]


NAMES = [
    "no batches", "empty batch", "used generator", "not iterable", "no pair", "single samples",
    "numbers as targets", "forward of one tensor", "target too large", "target negative",
    "target shape", "lengths", "mse broadcast", "bce range", "float32 data", "half model", "complex model", "empty model", "device", "nan parameter",
    "nan input", "overflow", "no parameters", "frozen", "unknown parameter", "tensors as names",
    "another name", "pattern of another name", "quantised", "pattern", "loss name", "method name", "rtol",
    "one probe", "one replicate", "confidence", "l2", "class weights", "reduced callable", "population",
]  # fmt: skip


@pytest.mark.parametrize("what", NAMES)
def test_bad_input_gets_one_clear_line(what: str) -> None:
    error, message, call = refused(what)
    with pytest.raises(error, match=message) as caught:
        call()  # type: ignore[operator]
    assert isinstance(caught.value, hd.HessdiagError)
    assert "\n" not in str(caught.value)


def test_non_finite_activation_names_the_layer_and_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[0].weight.fill_(1e200)
        model[0].bias.fill_(0)
    model[1] = nn.Identity()
    far = torch.full((2, 5), 1e200, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="batch 1: layer '0'"):
        hd.measure(hd.Objective(model), [(X, Y), (far, Y[:2])])


class Shuffled:
    """Another order in every pass; with `drop_last` other samples too."""

    def __init__(self, drop_last: bool) -> None:
        self.drop_last = drop_last
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> object:
        order = torch.randperm(13, generator=self.generator)
        order = order[:12] if self.drop_last else order
        return iter([(X[part], Y[part]) for part in order.split(4)])


class Augmented(Shuffled):
    def __iter__(self) -> object:
        return iter([(X + 0.01 * torch.randn(X.shape, generator=self.generator, dtype=torch.float64), Y)])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.net(x), 0.5, training=True)


def test_two_passes_tell_data_from_model() -> None:
    objective = hd.Objective(net())
    with pytest.raises(NotDeterministicError, match="drop_last"):
        check_deterministic(objective, Shuffled(True))
    with pytest.raises(NotDeterministicError, match="augmentation"):
        check_deterministic(objective, Augmented(False))
    with pytest.raises((NotDeterministicError, StochasticModeError), match="in training mode and draws random numbers"):
        check_deterministic(hd.Objective(Noisy()), [(X, Y)])
    with pytest.raises((NotDeterministicError, StochasticModeError), match=r"the model is random|dropout"):
        check_deterministic(hd.Objective(Noisy().eval()), [(X, Y)])
    assert check_deterministic(objective, Shuffled(False)).shuffled
    assert not check_deterministic(objective, [(X, Y)]).shuffled


def test_survey_counts_samples_weight_and_loss() -> None:
    found = survey(hd.Objective(net()), [(X[:6], Y[:6]), (X[6:], Y[6:])])
    assert (found.samples, found.batches, found.largest) == (13, 2, 7)
    assert found.mean_loss == pytest.approx(float(F.cross_entropy(net()(X), Y)), rel=1e-12)


class Greedy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def test_out_of_memory_says_what_to_lower() -> None:
    with pytest.raises(OutOfMemoryError, match="lower the batch size"):
        hd.measure(hd.Objective(Greedy()), [(X, Y)])


def test_inputs_in_an_object_are_named() -> None:
    """A batch is cut through tuples and dictionaries; the tensors of a dataclass would stay whole."""

    @dataclass
    class Pair:
        x: Tensor
        more: int = 0

    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model = nn.Linear(4, 3)
    objective = hd.Objective(model, forward=lambda model, inputs: model(inputs.x))
    with pytest.raises(TargetError, match=r"hold a Pair, whose tensors \('x'\) cannot be cut by samples"):
        hd.measure(objective, [(Pair(x), y)])
    advised = hd.Objective(model, forward=lambda model, inputs: model(Pair(**inputs).x))
    assert hd.measure(advised, [({"x": x}, y)]).rms == hd.measure(hd.Objective(model), [(x, y)]).rms


class TwoInputs(nn.Module):
    """Of two tensors by name or place; in eval mode its outputs are those of one layer on their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layer(x + z)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["auto", "exact", "propagation", "hutchinson", "reference"])
@pytest.mark.parametrize("model", [TwoInputs(), nn.Linear(4, 3)])
@pytest.mark.parametrize("given", ["dictionary", "UserDict", "tuple", "list"])
def test_several_inputs_without_forward_lead_to_it(given: str, model: nn.Module, method: str) -> None:
    """The advice, followed, measures."""
    x, y = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3
    by_name = {"x": x, "z": x}
    inputs = {"dictionary": by_name, "UserDict": UserDict(by_name), "tuple": (x, x), "list": [x, x]}[given]
    star, how = ("**", "by name") if given in ("dictionary", "UserDict") else ("*", "one by one")
    kind = "dictionary" if star == "**" else given
    words = (
        rf"the {kind} of inputs as one argument: .*{how}, say Objective\(.*, forward=(lambda model, x: model\(.*x\))\)$"
    )
    with pytest.raises(ConfigurationError, match=words) as caught:
        hd.measure(hd.Objective(model), [(inputs, y)], method=method)
    assert "\n" not in str(caught.value)
    if isinstance(model, TwoInputs) and method == "exact":
        advised = eval(str(caught.value).split("forward=")[1][:-1])
        found = hd.measure(hd.Objective(model, forward=advised), [(inputs, y)])
        assert found.rms == pytest.approx(hd.measure(hd.Objective(model.layer), [(2 * x, y)]).rms, rel=1e-6)


def test_a_models_own_exception_of_one_tensor_is_told_as_it_was() -> None:
    with pytest.raises(ConfigurationError, match="the model raised RuntimeError: mat1 and mat2") as caught:
        hd.measure(hd.Objective(nn.Linear(4, 3)), [(torch.randn(9, 5), torch.arange(9) % 3)])
    assert "forward" not in str(caught.value)
