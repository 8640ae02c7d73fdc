"""Losses of sequences: torch's own values and divisors, the Hessian's factor, and models of tokens against products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gate import gate
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import ConfigurationError, TargetError
from hessdiag.graph import Linearisation
from hessdiag.kernels.propagator import Propagator
from hessdiag.methods.batches import numbered
from hessdiag.problem.losses import make_loss

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
N, T, C = 3, 4, 5
OUT = torch.randn(N, T, C, generator=G, dtype=torch.float64) * 2
Y = torch.randint(0, C, (N, T), generator=G)
HOLES = Y.clone()
HOLES[0, 1] = HOLES[2, 0] = HOLES[2, 3] = -100
NONE = HOLES.clone()
NONE[1] = -100
WEIGHTS = torch.tensor([0.5, 2.0, 0.3, 1.5, 1.0], dtype=torch.float64)
SOFT = torch.softmax(torch.randn(N, T, C, generator=G, dtype=torch.float64), -1)


def torchs(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    """torch has the classes on axis 1."""
    return F.cross_entropy(f.transpose(1, 2), y.transpose(1, 2) if y.is_floating_point() else y, **options)


CASES: dict[str, tuple[dict[str, Any], Tensor, Callable[[Tensor], Tensor]]] = {
    "plain": ({}, Y, lambda f: torchs(f, Y)),
    "ignored": ({}, HOLES, lambda f: torchs(f, HOLES)),
    "a sequence of padding alone": ({}, NONE, lambda f: torchs(f, NONE)),
    "another mark": ({"ignore_index": 2}, Y, lambda f: torchs(f, Y, ignore_index=2)),
    "smoothing": (
        {"label_smoothing": 0.1}, HOLES, lambda f: torchs(f, HOLES, label_smoothing=0.1)),
    "class weights": ({"class_weights": WEIGHTS}, HOLES, lambda f: torchs(f, HOLES, weight=WEIGHTS)),
    "class weights and smoothing": (
        {"class_weights": WEIGHTS, "label_smoothing": 0.2}, HOLES,
        lambda f: torchs(f, HOLES, weight=WEIGHTS, label_smoothing=0.2)),
    "shift": ({"shift": 1}, HOLES, lambda f: torchs(f[:, :-1], HOLES[:, 1:])),
    "shift by two, smoothing": (
        {"shift": 2, "label_smoothing": 0.1}, Y, lambda f: torchs(f[:, :-2], Y[:, 2:], label_smoothing=0.1)),
    "probabilities": (
        {"class_axis": -1, "class_weights": WEIGHTS}, SOFT, lambda f: torchs(f, SOFT, weight=WEIGHTS)),
}  # fmt: skip


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_hessian_factor_as_torch_has_them(name: str, first: bool) -> None:
    options, y, reference = CASES[name]
    if first and "shift" in options:
        pytest.skip("a shift is along the second axis, which holds the tokens")
    turn: Callable[[Tensor], Tensor] = (lambda x: x.transpose(1, 2)) if first else (lambda x: x)
    if first and "class_axis" in options:
        options, y = options | {"class_axis": 1}, y.transpose(1, 2)
    loss = make_loss("cross_entropy", **options)
    f = turn(OUT).clone().requires_grad_(True)
    loss.check(f, y)
    weight = loss.weights(f, y).sum()
    value = loss.values(f, y).sum() / weight
    torch.testing.assert_close(value, reference(turn(f)))
    found = loss.curvature(f.detach(), y)
    torch.testing.assert_close(found.loss.sum() / weight, value)
    (gradient,) = torch.autograd.grad(reference(turn(f)), f)
    torch.testing.assert_close(found.gradient / weight, gradient.flatten(1))
    full = torch.autograd.functional.hessian(lambda f: reference(turn(f)), f.detach()).reshape(N, T * C, N, T * C)
    factor = found.factor
    assert len(factor) == found.columns.count == T * (C - 1)
    for n in range(N):
        mine = torch.einsum("s,sc,sd->cd", found.signs, factor[:, n], factor[:, n]) / weight
        assert (mine - full[n, :, n]).norm() <= 1e-13 * full.norm()
        torch.testing.assert_close(found.columns.diagonal()[n] / weight, full[n, :, n].diagonal())
    weights = torch.randn(*factor.shape[:2], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    vectors = torch.randn(N, T * C, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(found.columns.combined(weights), torch.einsum("snc,sn->nc", factor, weights))
    torch.testing.assert_close(found.columns.against(vectors), torch.einsum("snc,nc->sn", factor, vectors))
    torch.testing.assert_close(found.columns.part(3, 9), factor[3:9])


def test_losses_shaped_like_the_outputs_take_any_shape() -> None:
    y = torch.rand(N, T, C, generator=G, dtype=torch.float64)
    for name, reference in (
        ("mse", lambda f: F.mse_loss(f, y)),
        ("half_mse", lambda f: 0.5 * (f - y).square().sum() / N),
        ("bce", lambda f: F.binary_cross_entropy_with_logits(f, y)),
    ):
        loss = make_loss(name)
        f = OUT.clone().requires_grad_(True)
        torch.testing.assert_close(loss.values(f, y).sum() / N, reference(f))
        found = loss.curvature(f.detach(), y)
        (gradient,) = torch.autograd.grad(reference(f), f)
        torch.testing.assert_close(found.gradient / N, gradient.flatten(1))
        full = torch.autograd.functional.hessian(reference, OUT).reshape(N, T * C, N, T * C)
        for n in range(N):
            mine = torch.einsum("sc,sd->cd", found.factor[:, n], found.factor[:, n]) / N
            torch.testing.assert_close(mine, full[n, :, n])


class Language(nn.Module):
    """Tokens looked up, mixed with those before, a class for each; `fold` returns them as rows."""

    def __init__(self, vocabulary: int = 5, width: int = 4, *, fold: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(vocabulary, width), nn.Linear(width, 6)
        self.back, self.head, self.fold = nn.Linear(6, width), nn.Linear(width, vocabulary, bias=bias), fold

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        past = h.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None].to(h.dtype)
        h = h + self.back(torch.tanh(self.mix(past)))
        out = self.head(F.silu(h))
        return out.flatten(0, 1) if self.fold else out  # type: ignore[no-any-return]


X = torch.randint(0, C, (N, T), generator=G)


@pytest.mark.parametrize("name", ["plain", "ignored", "smoothing", "class weights and smoothing", "shift"])
@pytest.mark.parametrize("fold", [False, True])
def test_models_of_tokens(name: str, fold: bool) -> None:
    torch.manual_seed(0)
    options, y, reference = CASES[name]
    model = Language(fold=fold).double()
    truth = gate(model, X, y, **options)
    assert all(bool(t.any()) for t in truth.values())
    survey = hd.diagonal(hd.Objective(model, **options), [(X, y)], method="reference")
    plain = Language()
    plain.load_state_dict(model.state_dict())
    parameters = dict(plain.double().named_parameters())

    def mean(bias: Tensor) -> Tensor:
        return reference(torch.func.functional_call(plain, parameters | {"mix.bias": bias}, (X,)))

    full = torch.autograd.functional.hessian(mean, parameters["mix.bias"].detach())
    torch.testing.assert_close(survey.total["mix.bias"], full.diagonal())


def by_signs(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(The Gauss-Newton part by signs on average over them, with what is known of it; the part exactly)."""
    batch = Linearisation(hd.Objective(model.double(), **options), x, y)
    propagator = Propagator(batch)
    found = propagator.heads()
    for k in range(len(batch.curvature.signs)):
        drawn = torch.zeros(len(batch.curvature.signs), len(y), dtype=torch.float64)
        drawn[k] = 1
        for name, part in propagator.gauss_newton_beyond(drawn).items():
            found[name] += part
    return found, propagator.gauss_newton()


@pytest.mark.parametrize("kind", ["untied", "tied", "classes of a sample", "pixels", "mse"])
def test_the_output_layers_own_share_is_closed(kind: str) -> None:
    torch.manual_seed(0)
    model, x, y, options = Language(), X, HOLES, {"label_smoothing": 0.1}
    if kind == "tied":
        model.head.weight = model.table.weight
    if kind == "classes of a sample":
        model, y = nn.Sequential(model, nn.Flatten(), nn.Linear(T * C, 4)), HOLES[:, 0].clamp(0, 3)
    if kind == "pixels":
        model, x = (
            nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, C, 1)),
            OUT[:, :, :4, None].expand(-1, -1, -1, 4),
        )
        x, y = x[:, :2], HOLES[:, :3, None].expand(-1, -1, 3)
    if kind == "mse":
        y, options = SOFT, {"loss": "mse"}
    found, exact = by_signs(model, x, y, **options)
    for name, wanted in exact.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-14)
    if kind != "tied":
        batch = Linearisation(hd.Objective(model, **options), x, y)
        last = [name for name, _ in model.named_parameters()][-2:]
        drawn = torch.ones(len(batch.curvature.signs), len(y), dtype=torch.float64)
        beyond = Propagator(batch).gauss_newton_beyond(drawn)
        assert len(batch.heads) == 1
        assert not any(bool(beyond[name].any()) for name in last)  # an untied head carries no noise


def test_a_head_whose_parameters_touch_classes_of_one_place_is_left_to_signs() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x))).flatten(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Folded().double()
    x, y = torch.randn(N, 2, 3, dtype=torch.float64), torch.tensor([0, 3, 1])
    found, exact = by_signs(model, x, y)
    assert not Linearisation(hd.Objective(model), x, y).heads
    for name, wanted in exact.items():
        torch.testing.assert_close(found[name], wanted)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_outputs_per_token_with_other_losses(loss: str) -> None:
    torch.manual_seed(0)
    gate(Language(), X, SOFT, loss)


def test_a_convolution_that_classifies_pixels() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, C, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    y = torch.randint(0, C, (N, 3, 2), generator=G)
    y[0, 0, 1] = -100
    gate(Pixels(), torch.randn(N, 2, 3, 2, generator=G, dtype=torch.float64), y)


def test_batches_of_unequal_numbers_of_tokens_give_the_mean_per_token() -> None:
    torch.manual_seed(0)
    model = Language().double()
    whole = hd.diagonal(hd.Objective(model), [(X, NONE)], method="exact").total
    cut = hd.diagonal(hd.Objective(model), [(X[:1], NONE[:1]), (X[1:], NONE[1:])], method="exact").total
    for name, wanted in whole.items():
        torch.testing.assert_close(cut[name], wanted)


@pytest.mark.parametrize(
    ("outputs", "targets", "options", "message"),
    [
        (OUT[:, :, :4], Y, {}, "class_axis=-1"),
        (OUT, SOFT, {}, "class_axis=-1"),
        (OUT, Y[:, :3], {}, r"must have shape \[3, 4\]"),
        (OUT, Y.masked_fill(Y == 1, 9), {}, "target 9 is out of range"),
        (OUT, Y, {"shift": 4}, "needs targets"),
        (OUT, Y[:, :, None].expand(N, T, C).double(), {"shift": 1, "class_axis": -1}, "class indices"),
    ],
)
def test_what_does_not_fit_is_refused(outputs: Tensor, targets: Tensor, options: Any, message: str) -> None:
    with pytest.raises((TargetError, ConfigurationError), match=message):
        make_loss("cross_entropy", **options).check(outputs, targets)


def test_options_of_classes_belong_to_cross_entropy() -> None:
    for options in ({"shift": 1}, {"ignore_index": 0}, {"class_axis": 1}):
        with pytest.raises(ConfigurationError, match="belong to"):
            make_loss("mse", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="class_axis"):
        make_loss("cross_entropy", class_axis=2)


def test_a_plan_that_sums_samples_takes_batches_of_several_lengths() -> None:
    """Each batch padded to its own length: what is left of one joins the next of its length only."""
    torch.manual_seed(0)
    layers = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 7)
    objective = hd.Objective(nn.Sequential(*layers).double(), class_axis=-1)
    data = [(torch.randint(7, (6, t)), torch.randint(7, (6, t))) for t in (5, 5, 7, 3, 3)]
    cut = list(numbered(objective, data, align=4))
    assert [(b.start, *b.targets.shape) for b in cut] == [
        (0, 4, 5), (4, 8, 5), (12, 4, 7), (16, 2, 7), (18, 4, 3), (22, 8, 3)
    ]  # fmt: skip
    ends = (data[0][0], data[1][0]), (data[2][0],), (data[3][0], data[4][0])
    for numbers, whole in zip(((0, 1), (2, 3), (4, 5)), ends):
        assert torch.equal(torch.cat([cut[i].inputs for i in numbers]), torch.cat(whole))
    plan = hd.Plan("propagation", sample_groups={"1": 4, "3": 4, "5": 4}, parts=False)
    exact = hd.diagonal(objective, data).total
    found = hd.diagonal(objective, data, plan=plan, replicates=64)
    off = torch.cat([(found.total[n] - t).reshape(-1) for n, t in exact.items()])
    error = torch.cat([found.standard_errors[n].reshape(-1) for n in exact])
    z = off[error > 1e-12] / error[error > 1e-12]
    assert len(z) > 50
    assert float(z.abs().max()) < 7  # Student's t of 15 groups: beyond it once in a thousand runs
    assert 0.6 < float(z.square().mean()) < 2.0
