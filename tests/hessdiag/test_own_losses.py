"""Losses of the user's own that compute in float32 what they are given in double: measured as their plain twins are, and
held against quotients all the same.

The reference is the dense Hessian of the loss without the conversion, by torch.func in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Half, dense_diagonal
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import AuditError, ConfigurationError
from hessdiag.measuring.audit import audit
from hessdiag.measuring.autograd_check import loss_quotients
from hessdiag.methods.batches import Numbered
from hessdiag.problem import forward
from hessdiag.problem.losses import make_loss

torch.set_num_threads(1)
METHODS = ("auto", "exact", "propagation", "hutchinson", "reference")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
N = 12
Own = Callable[[Tensor, Tensor], Tensor]


def net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def classes(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=g).to(dtype), torch.randint(0, 3, (N,), generator=g)


def labels(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=g).to(dtype), torch.randint(0, 2, (N, 3), generator=g)


def numbers(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=g).to(dtype), torch.rand(N, 3, generator=g).to(dtype)


def _entropy(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


def _bce(f: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y.to(f), reduction="none").mean(1)


def _squares(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().mean(1)


KEPT = torch.tensor([[0.5, -0.2], [0.1, 0.9], [-0.7, 0.3]])
"""A tensor that a loss holds, in float32: of double outputs there is no product with it."""
SHORT: dict[str, tuple[Own, Own, Any]] = {
    "f.float()": (lambda f, y: F.cross_entropy(f.float(), y, reduction="none"), _entropy, classes),
    "dtype=float32": (
        lambda f, y: -F.log_softmax(f, 1, dtype=torch.float32).gather(1, y[:, None])[:, 0], _entropy, classes),
    "there and back": (lambda f, y: F.cross_entropy(f.float(), y, reduction="none").double(), _entropy, classes),
    "autocast off": (
        lambda f, y: torch.autocast("cpu", enabled=False)(F.cross_entropy)(f.float(), y, reduction="none"),
        _entropy, classes),
    "y.float()": (
        lambda f, y: F.binary_cross_entropy_with_logits(f, y.float(), reduction="none").mean(1), _bce, labels),
    "both": (lambda f, y: (f.float() - y.float()).square().mean(1), _squares, numbers),
}  # fmt: skip
HELD: dict[str, tuple[Own, Own, Any]] = {
    "a matrix": (
        lambda f, y: (f @ KEPT).pow(4).sum(1), lambda f, y: (f @ KEPT.to(f)).pow(4).sum(1), numbers),
    "targets": (
        lambda f, y: F.binary_cross_entropy_with_logits(f, KEPT.sigmoid()[:, 0].expand(len(f), 3), reduction="none").sum(1),
        lambda f, y: _bce(f, KEPT.sigmoid()[:, 0].expand(len(f), 3)) * 3, numbers),
}  # fmt: skip


def truth_of(plain: Own, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    x, y = (t.double() if t.is_floating_point() else t for t in batch)
    return dense_diagonal(net(torch.float64), plain, x, y)


@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHORT)
def test_a_loss_in_float32_is_measured_as_its_plain_twin(name: str, method: str, dtype: torch.dtype) -> None:
    loss, plain, make = SHORT[name]
    batch = make(dtype)
    found = hd.measure(hd.Objective(net(dtype), loss), [batch], method=method, max_replicates=10, keep_diagonal=True)
    twin = hd.measure(hd.Objective(net(dtype), plain), [batch], method=method, max_replicates=10)
    assert found.plan.method == twin.plan.method
    assert found.status == twin.status
    assert found.rms == pytest.approx(twin.rms, rel=1e-6)
    assert found.audit is not None
    assert found.audit.dtype == "float64"
    assert max(e.deviation for e in found.audit.entries if e.check in ("identity", "symmetry", "loss")) < 1e-10
    if found.status == "exact":
        assert found.diagonal is not None
        for key, wanted in truth_of(plain, batch).items():
            off = float((found.diagonal.total[key].double() - wanted).norm() / wanted.norm())
            assert off < 1e-5, (key, off)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HELD)
def test_a_loss_that_holds_float32_tensors_is_audited_in_double(name: str, method: str) -> None:
    loss, plain, make = HELD[name]
    batch = make(torch.float32)
    objective = hd.Objective(net(torch.float32), loss)
    found = hd.measure(objective, [batch], method=method, max_replicates=10, keep_diagonal=True)
    twin = hd.measure(hd.Objective(net(torch.float32), plain), [batch], method=method, max_replicates=10)
    assert found.plan.method == twin.plan.method
    assert found.rms == pytest.approx(twin.rms, rel=1e-5)
    assert found.audit is not None
    assert found.audit.dtype == "float64"
    if found.status == "exact":
        assert found.diagonal is not None
        for key, wanted in truth_of(plain, batch).items():
            assert float((found.diagonal.total[key].double() - wanted).norm() / wanted.norm()) < 1e-5


class Forgetful(torch.autograd.Function):
    """Tanh whose second derivative is lost, of what it converts itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.float().tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (g * (1 - x.detach().tanh() ** 2)).to(x)


def _focal(f: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(f.float(), y, reduction="none")
    return (1 - (-losses).exp()).detach() * losses


WRONG: dict[str, tuple[Own, Any]] = {
    "a detached factor": (lambda f, y: ((f.float() * f.float().detach()) - y.float()).square().mean(1), numbers),
    "a detached weight": (_focal, classes),
    "a detached factor of y.float()": (
        lambda f, y: (F.binary_cross_entropy_with_logits(f, y.float(), reduction="none") * f.detach().exp()).mean(1),
        labels),
    "half a gradient": (lambda f, y: F.cross_entropy(Half.apply(f.float()), y, reduction="none"), classes),
    "a lost second derivative": (lambda f, y: (Forgetful.apply(f) - y.float()).square().mean(1), numbers),
}  # fmt: skip
WRONG_HELD: dict[str, tuple[Own, Any]] = {
    "a detached factor": (lambda f, y: ((f @ KEPT).square() * (f @ KEPT).detach().exp()).sum(1), numbers),
    "half a gradient": (lambda f, y: Half.apply(f @ KEPT).pow(4).sum(1), numbers),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_derivative_beside_a_conversion_is_refused(name: str, method: str, dtype: torch.dtype) -> None:
    loss, make = WRONG[name]
    with pytest.raises(AuditError, match=r"loss of .* is off by 0\.[1-9]|loss of .* is off by [1-9]"):
        hd.measure(hd.Objective(net(dtype), loss), [make(dtype)], method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRONG_HELD)
def test_a_wrong_derivative_beside_float32_tensors_is_refused(name: str, method: str) -> None:
    loss, make = WRONG_HELD[name]
    with pytest.raises(AuditError, match="loss of"):
        hd.measure(hd.Objective(net(torch.float32), loss), [make(torch.float32)], method=method)


KINKED: dict[str, Own] = {
    "absolute": lambda f, y: (f.float() - y.float()).abs().mean(1),
    "huber": lambda f, y: F.huber_loss(f.float(), y.float(), reduction="none", delta=0.3).mean(1),
    "hinge": lambda f, y: F.relu(1 - f.float() * y.float().sign()).square().mean(1),
    "huber of a matrix held": lambda f, y: F.huber_loss(f @ KEPT, y[:, :2].float(), reduction="none").mean(1),
    "absolute of a matrix held": lambda f, y: (f @ KEPT).abs().mean(1),
}


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("name", KINKED)
def test_kinks_and_steep_losses_are_not_mistaken_for_wrong_derivatives(name: str, scale: float) -> None:
    """Of two samples, as an audit has them, by themselves: both arithmetics, many draws."""
    g = torch.Generator().manual_seed(0)
    loss = make_loss(KINKED[name])
    held = "held" in name
    for _ in range(40):
        f, y = scale * torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g)
        f, y = (f, y) if held else (f.double(), y.double())
        with forward.InDouble() if not held else torch.no_grad():  # type: ignore[no-untyped-call]
            assert loss_quotients(loss, f, y) <= 1e-2


def _audited(loss: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Passes of the model, calls of the loss and operations seen in double of one audit."""
    seen = {"passes": 0, "losses": 0, "lifted": 0}
    own = forward.InDouble.__torch_dispatch__

    def lifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen["lifted"] += 1
        return own(self, *args, **kwargs)

    def counted(f: Tensor, y: Tensor) -> Tensor:
        seen["losses"] += 1
        return loss(f, y)  # type: ignore[no-any-return]

    class Counted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen["passes"] += 1
            return super().forward(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(forward.InDouble, "__torch_dispatch__", lifted)
    torch.manual_seed(0)
    model = Counted(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = classes(torch.float32)
    objective = hd.Objective(model, loss if isinstance(loss, str) else counted)
    found = audit(objective, Numbered(0, 0, x, y), method="exact", seed=0)
    assert found.passed
    monkeypatch.undo()
    return seen


def test_a_loss_by_name_costs_no_more_and_one_of_the_users_own_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    named = _audited("cross_entropy", monkeypatch)
    plain = _audited(_entropy, monkeypatch)
    short = _audited(SHORT["f.float()"][0], monkeypatch)
    assert named == {"passes": named["passes"], "losses": 0, "lifted": 0}
    assert plain["passes"] == short["passes"] == named["passes"]
    assert plain["lifted"] == 0
    assert short["losses"] == plain["losses"] + 1


SHAPES: dict[str, tuple[Own, str]] = {
    "one number": (lambda f, y: F.mse_loss(f, y), r"shape \[12\], not \[\]; use reduction='none'$"),
    "a value per output": (
        lambda f, y: F.mse_loss(f, y, reduction="none"), r"not \[12, 3\]; of several values a sample take .* \.mean\(1\)"),
    "places apart": (
        lambda f, y: F.mse_loss(f[:, :, None], y[:, :, None], reduction="none"),
        r"not \[12, 3, 1\]; of several .* \.flatten\(1\)\.mean\(1\)"),
    "places as rows": (
        lambda f, y: F.mse_loss(f.flatten(), y.flatten(), reduction="none"),
        r"not \[36\]; of a sample's 3 places take the mean, \.reshape\(len\(outputs\), -1\)\.mean\(1\)"),
    "another number": (lambda f, y: F.mse_loss(f, y, reduction="none")[:5, 0], r"not \[5\]; use reduction='none'$"),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_loss_of_another_shape_is_told_how_to_become_one_value_a_sample(name: str, method: str) -> None:
    loss, words = SHAPES[name]
    with pytest.raises(ConfigurationError, match=words):
        hd.measure(hd.Objective(net(torch.float32), loss), [numbers(torch.float32)], method=method)
