"""What an audit sees, over many seeds: its random directions must not miss a wrong derivative, nor refuse a right one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_wrong_numbers import DTYPES, agree, by_products, data, net
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import AuditError
from hessdiag.measuring import audit as audit_module
from hessdiag.measuring.audit import PERIOD, Audit, audit, random_directions
from hessdiag.measuring.autograd_check import Moved
from hessdiag.methods.batches import Numbered
from hessdiag.show import sentences
from hessdiag.signs import Signs

L = nn.Linear
METHODS = ("exact", "propagation", "hutchinson", "reference")
SEEDS = range(8)


def audited(
    model: nn.Module, batch: tuple[Tensor, Tensor], method: str, seed: int, loss: Any = "cross_entropy"
) -> Audit:
    """The audit alone, of the first samples of a batch."""
    return audit(hd.Objective(model, loss), Numbered(0, 0, *batch), method=method, seed=seed)


# -- directions that cancel: one number, and entries that only differ under a softmax


def scaled(p: Tensor, factor: float) -> Tensor:
    """p itself, its gradient `factor` times the true one (as learned step sizes of quantisers have it)."""
    return p if factor == 1.0 else (p - p * factor).detach() + p * factor


def _one_number(factor: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda s, x: s.b(torch.tanh(s.a(x))) * scaled(s.g, factor)


def _branches(factor: float) -> Callable[[Any, Tensor], Tensor]:
    def body(s: Any, x: Tensor) -> Tensor:
        inner = torch.stack([torch.tanh(layer(x)) for layer in s.a], 1)
        return s.b((torch.softmax(scaled(s.g, factor), 0)[:, None] * inner).sum(1))  # type: ignore[no-any-return]

    return body


def _mixed(entries: int, factor: float, dtype: torch.dtype, start: int = 0) -> nn.Module:
    return net(
        _branches(factor), dtype=dtype, a=lambda: nn.ModuleList(L(5, 4) for _ in range(entries)), b=lambda: L(4, 3),
        g=lambda: torch.randn(entries, generator=torch.Generator().manual_seed(start)) if start else torch.zeros(entries),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_gradient_of_one_number_is_seen_by_every_seed(method: str, shape: tuple[int, ...]) -> None:
    """The direction was the sum of two that cancelled for every other seed: the number was not moved."""
    batch = data()
    g = lambda: torch.full(shape or (), 0.7)  # noqa: E731
    wrong, right = (
        net(_one_number(factor), a=lambda: L(5, 4), b=lambda: L(4, 3), g=g if shape != (3,) else lambda: torch.randn(3))
        for factor in (0.1, 1.0)
    )
    for seed in SEEDS:
        assert audited(right, batch, method, seed).passed
        with pytest.raises(AuditError, match="autograd's gradient is not the model's"):
            audited(wrong, batch, method, seed).require()


@DTYPES
@pytest.mark.parametrize("entries", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_branches_mixed_by_a_softmax_pass_for_every_seed(method: str, entries: int, dtype: torch.dtype) -> None:
    """Signs that are all alike move nothing below a softmax: half of the seeds for two branches."""
    batch = data(dtype=dtype)
    for start in range(6):
        model = _mixed(entries, 1.0, dtype, start)
        for seed in range(3 * start, 3 * start + 3):
            found = audited(model, batch, method, seed)
            assert found.passed, (seed, found.worst)
    agree(hd.diagonal(hd.Objective(model), [batch]).total, by_products(model, batch), 1e-5)


@pytest.mark.parametrize("entries", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_gradient_below_a_softmax_is_seen_by_every_seed(method: str, entries: int) -> None:
    batch, model = data(), _mixed(entries, 0.1, torch.float64, 1)
    for seed in SEEDS:
        with pytest.raises(AuditError, match="autograd's gradient is not the model's"):
            audited(model, batch, method, seed).require()


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_below_a_softmax_alone(method: str) -> None:
    """Chosen by itself, nothing else holds up the scales of the comparisons."""
    batch, model = data(), _mixed(2, 1.0, torch.float64, 1)
    objective = hd.Objective(model, parameters=["g"])
    for seed in SEEDS:
        assert audit(objective, Numbered(0, 0, *batch), method=method, seed=seed).passed, seed


def test_no_two_entries_of_a_direction_are_alike() -> None:
    model = nn.Sequential(L(70, 60), L(60, 3))
    for p in random_directions(hd.Objective(model), Signs(0)).values():
        sizes = p.abs().flatten()
        assert float(sizes.min()) >= 0.5
        assert float(sizes.max()) <= 1.5
        assert abs(float(sizes.mean()) - 1.0) < 0.1
        assert sizes.unique().numel() == min(len(sizes), PERIOD)
    few = random_directions(hd.Objective(nn.Linear(4, 2)), Signs(1))["weight"].abs().flatten()
    assert float(few.sort().values.diff().min()) > 0.01


# -- functions that torch does not differentiate at a zero cotangent


@DTYPES
def test_logcumsumexp_is_measured_by_every_method(dtype: torch.dtype) -> None:
    """Its pullback is linear, but NaN where it is differentiated at zero, as forward products were."""
    model = net(lambda s, x: s.b(torch.logcumsumexp(s.a(x), 1)), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3))
    batch = data(dtype=dtype)
    truth = by_products(model, batch)
    for method in METHODS:
        for seed in SEEDS:
            found = audited(model, batch, method, seed)
            assert found.passed, (method, seed, found.worst)
    for method in ("auto", "exact", "reference"):
        agree(
            hd.diagonal(hd.Objective(model), [batch], method=method).total,
            truth,
            1e-10 if dtype == torch.float64 else 1e-5,
        )
    assert hd.measure(hd.Objective(model), [batch], method="auto").plan.method == "exact"
    for method in ("propagation", "hutchinson"):
        for plan in (None, hd.Plan(method, deflate=3) if method == "propagation" else None):
            found = hd.diagonal(hd.Objective(model), [batch], method=method, plan=plan, replicates=150)
            off = {n: (found.total[n].double() - truth[n]).abs() - 6 * found.standard_errors[n] for n in truth}
            assert all(float(o.max()) < 1e-6 for o in off.values()), (method, plan)


# -- models and losses without an ordinary copy in float64


class Tenth(torch.autograd.Function):
    """A product with g in float32 alone (as a kernel of one's own), whose gradient for g is `factor` times the true one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor, factor: float) -> Tensor:
        if h.dtype != torch.float32:
            raise RuntimeError("this kernel is for float32")
        ctx.save_for_backward(h, g)
        ctx.factor = factor
        return h * g

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor, None]:
        h, g = ctx.saved_tensors
        return delta * g, ctx.factor * (delta * h).sum(0), None


class Forgets(torch.autograd.Function):
    """tanh in float32 alone, whose second derivative is lost where `factor` is not 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("this kernel is for float32")
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return delta * (1 - (x if ctx.factor == 1.0 else x.detach()).tanh() ** 2), None


class Rounds(torch.autograd.Function):
    """tanh in float32 of whatever comes in, by other code than torch's; its gradient is `factor` times the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return torch.from_numpy(np.tanh(x.detach().numpy().astype("float32")))

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.factor * delta.to(x.dtype) * (1 - torch.tanh(x) ** 2), None


@DTYPES
@pytest.mark.parametrize("method", METHODS[2:])
def test_what_rounds_in_code_of_its_own_is_compared_in_float32(method: str, dtype: torch.dtype) -> None:
    """It was refused as something that cannot be differentiated twice: lifted conversions met what was not lifted."""
    right, wrong = (
        net(
            lambda s, x, factor=factor: s.b(Rounds.apply(s.a(x), factor).to(x.dtype)),
            dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3),
        )
        for factor in (1.0, 0.3)
    )  # fmt: skip
    for seed in SEEDS:
        assert audited(right, data(dtype=dtype), method, seed).passed
        with pytest.raises(AuditError, match="autograd's gradient is not the model's"):
            audited(wrong, data(dtype=dtype), method, seed).require()


class Odd(nn.Module):
    """A net of two layers and a gain, and one reason why it has no ordinary copy in float64."""

    def __init__(self, factor: float, kind: str) -> None:
        super().__init__()
        self.a, self.g, self.b = L(5, 4), nn.Parameter(torch.rand(4) + 0.5), L(4, 3)
        self.factor, self.kind = factor, kind
        held = torch.randn(5, 5)
        if kind == "attribute":
            self.held = held
        elif kind == "nested":
            self.tables = {"first": [held, (held.T.contiguous(),)]}
        elif kind == "closure":
            self.body = lambda x: x @ held.to(x.device)
        elif kind == "lock":
            self.lock = threading.Lock()
        elif kind == "closed over":
            self.body = lambda x: self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attribute":
            x = x @ self.held
        elif self.kind == "nested":
            x = x @ self.tables["first"][0] @ self.tables["first"][1][0]
        elif self.kind == "closure":
            x = self.body(x)
        elif self.kind == "made in forward":
            x = x @ torch.eye(5, dtype=torch.float32)
        z = self.body(x) if self.kind == "closed over" else self.a(x)
        h = Forgets.apply(z, self.factor) if self.kind == "forgets in float32" else torch.tanh(z)
        if self.kind == "leaves its pass behind":
            self.last = h
        if self.kind == "gradient in float32":
            return self.b(Tenth.apply(h, self.g, self.factor))  # type: ignore[no-any-return]
        wrong = self.kind != "forgets in float32"
        return self.b(h * scaled(self.g, self.factor if wrong else 1.0))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """For torch.jit.script."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.a, self.g, self.b = L(5, 4), nn.Parameter(torch.rand(4) + 0.5), L(4, 3)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        g = (self.g - self.factor * self.g).detach() + self.factor * self.g
        return self.b(h * g)


ODD = ("attribute", "nested", "closure", "made in forward", "lock", "leaves its pass behind", "closed over")
SHORT = ("gradient in float32", "forgets in float32")


def odd(kind: str, factor: float, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind.startswith("scripted"):
        model: nn.Module = torch.jit.script(Plain(factor))
        if kind == "scripted inside":
            model = nn.Sequential(L(5, 5), model)
        return model.to(dtype).eval()
    return Odd(factor, kind).to(dtype).eval()


def by_itself(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


CONSTANTS = ("attribute", "nested", "closure", "made in forward")
"""In float32: beside a float64 model they do not run at all."""
CASES = [(kind, torch.float32) for kind in (*ODD, "scripted", "scripted inside", *SHORT)] + [
    (kind, torch.float64) for kind in (*ODD, "scripted", "scripted inside") if kind not in CONSTANTS
]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_what_has_no_ordinary_copy_is_held_against_quotients(kind: str, dtype: torch.dtype) -> None:
    """Wrong gradients were accepted there, with a clean status; right ones pass, and the model is not changed."""
    batch = data(dtype=dtype)
    for seed in range(4):
        right, wrong = (odd(kind, factor, dtype, seed) for factor in (1.0, 0.1))
        for model in (right, wrong):
            model(batch[0])
        before = by_itself(right)
        pointers = {name: p.data_ptr() for name, p in right.named_parameters()}
        attributes = {key: value for key, value in right.__dict__.items() if not isinstance(value, Tensor)}
        for method in METHODS[2:] if kind in SHORT else METHODS:  # the others cover no function of one's own
            found = audited(right, batch, method, seed)
            checks = {e.check for e in found.entries}
            assert found.passed, (method, found.worst)
            assert {"slope", "difference"} <= checks
            assert not found.notes
            assert (found.dtype == "float32") == (dtype == torch.float32 and (kind in SHORT or "scripted" in kind))
            lost = audited(wrong, batch, method, seed)
            assert not lost.passed
            if kind == "forgets in float32":  # for all that is known of a function of one's own, it may have kinks
                assert ("difference", "a.weight") in {(e.check, e.layer) for e in lost.left_out}
                continue
            with pytest.raises(AuditError, match="autograd's gradient is not the model's"):
                lost.require()
        assert all(
            torch.equal(before[name], t) and before[name].dtype == t.dtype for name, t in by_itself(right).items()
        )
        assert pointers == {name: p.data_ptr() for name, p in right.named_parameters()}
        assert all(right.__dict__[key] is value for key, value in attributes.items())


@pytest.mark.parametrize("kind", ["lock", "gradient in float32"])
def test_a_model_that_is_lent_or_moved_is_put_back_after_an_exception(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = odd(kind, 1.0, torch.float32), data(dtype=torch.float32)
    before, own = by_itself(model), dict(model._parameters)
    pointers = [p.data_ptr() for p in model.parameters()]
    moved: list[bool] = []

    def interrupted(self: Moved, **_: Any) -> None:
        p = next(iter(self.parameters.values()))
        moved.append(p.data_ptr() not in pointers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Moved, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hd.measure(hd.Objective(model), [batch], method="reference")
    assert moved == [True]
    assert all(torch.equal(before[name], t) for name, t in by_itself(model).items())
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert all(model._parameters[name] is p for name, p in own.items())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_was_computed_beforehand_is_seen_in_the_model_itself() -> None:
    """An attribute with its graph has no copy: there it would be of other parameters, or cut off from them."""

    class Ahead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = L(5, 4), L(4, 3)
            self.w = self.a.weight * 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(x @ self.w.T))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    for method in METHODS:
        with pytest.raises(AuditError, match="autograd's gradient is not the model's"):
            hd.measure(hd.Objective(Ahead(), parameters=r"a.weight|b.*"), [data(dtype=torch.float32)], method=method)


class Kinked(nn.Module):
    """ReLU in a kernel of float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = L(5, 400), L(400, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("this kernel is for float32")
        return self.b(torch.relu(self.a(x)).square())  # type: ignore[no-any-return]


def test_what_cannot_be_compared_is_told_and_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(L(5, 4), nn.Tanh(), L(4, 3)), data(dtype=torch.float32)

    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not here")

    for name in ("copied", "lent", "set_apart"):
        monkeypatch.setattr(audit_module, name, refuses)
    found = hd.measure(hd.Objective(model), [batch], method="exact")
    assert found.audit is not None
    assert not found.audit.passed
    left = [e for e in found.audit.entries if e.deviation is None]
    assert [e.check for e in left] == ["slope"] + 4 * ["difference"]
    assert not any(e.passed for e in left)
    assert any("not compared with difference quotients: slope of 'the whole model'" in note for note in found.notes)
    assert any("not compared" in note for note in hd.diagonal(hd.Objective(model), [batch]).provenance["notes"])
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))["audit"]
    assert told["passed"] is False
    assert [e["deviation"] for e in told["entries"]].count(None) == 5
    assert "5 comparisons could not be made" in sentences.audit(found.to_dict())


@pytest.mark.parametrize("method", METHODS)
def test_kinks_in_float32_alone_are_no_reason_to_refuse(method: str) -> None:
    """Steps as long as float32 needs cross them: what is off there is left open, and told."""
    torch.manual_seed(0)
    model = Kinked()
    for seed in range(4):
        found = audited(model, data(dtype=torch.float32), method, seed)
        found.require()
        assert found.passed == (not found.notes)
        assert next(e for e in found.entries if e.check == "slope").passed


@DTYPES
def test_a_loss_that_cannot_be_compared_is_told(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = (
        net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=dtype, a=lambda: L(5, 4), b=lambda: L(4, 3)),
        data(dtype=dtype),
    )
    monkeypatch.setattr(audit_module, "loss_quotients", lambda *_: None)
    found = audited(model, batch, "reference", 0, lambda f, y: F.cross_entropy(f, y, reduction="none"))
    assert [e.check for e in found.left_out] == ["loss"]
    assert not found.passed
    found.require()


def test_a_loss_of_probabilities_is_told_why_it_was_not_compared() -> None:
    """Beside 0 and 1 there is no place to move outputs to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid()).double()
    with torch.no_grad():
        model[2].weight.mul_(30)
    x, y = data()[0], torch.randint(0, 2, (len(data()[0]), 3)).double()
    found = audited(model, (x, y), "exact", 0, lambda f, t: F.binary_cross_entropy(f, t, reduction="none").mean(1))
    (note,) = found.notes
    assert "the loss '<lambda>' (it does not run at outputs moved a little" in note
    assert "give logits" in note
    assert "float64" not in note


SHORT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize("error", [RuntimeError(SHORT_OF_MEMORY), MemoryError()])
@pytest.mark.parametrize("place", ["copied and lent", "run"])
def test_that_float64_did_not_fit_in_memory_is_told(
    error: Exception, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise how strict the audit is would hang on free memory without a word."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), data(dtype=torch.float32)

    honest = audit_module._run

    def full(objective: Any, *few: Any) -> Any:
        if few and objective.dtype == torch.float32:
            return honest(objective, *few)
        raise error

    assert not audited(model, batch, "exact", 0).notes
    for name in ("copied", "lent") if place == "copied and lent" else ("_run",):
        monkeypatch.setattr(audit_module, name, full)
    found = audited(model, batch, "exact", 0)
    found.require()
    assert (found.dtype, found.cramped) == ("float32", True)
    assert found.notes[-1] == "audited in float32: the model in float64 did not fit in memory"


def _focal(weight: Tensor | None, factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        ce = F.cross_entropy(f, y, weight=weight, reduction="none")
        p = torch.exp(-ce)
        return (1 - (p if factor == 1.0 else p.detach())) ** 2 * ce

    return loss


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_holds_float32_weights_is_compared_in_double(method: str) -> None:
    """Its quotients were not taken: a deviation of 0.0 was reported of what nobody had compared."""
    model, batch = (
        net(lambda s, x: s.b(torch.tanh(s.a(x))), dtype=torch.float32, a=lambda: L(5, 4), b=lambda: L(4, 3)),
        data(dtype=torch.float32),
    )
    for seed in SEEDS:
        right = audited(model, batch, method, seed, _focal(torch.ones(3), 1.0))
        assert right.passed
        assert right.dtype == "float64"
        with pytest.raises(AuditError, match=r"loss of 'loss' is off by 0\.\d"):
            audited(model, batch, method, seed, _focal(torch.ones(3), 0.1)).require()


# -- what it costs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "passes"), [("ordinary", 4), ("attribute", 4), ("lock", 4)])
def test_an_audit_takes_four_forward_passes(kind: str, passes: int, method: str) -> None:
    """One of the middle, one of an end of a difference, two for bounds that the model sets itself; the others are for
    what these leave in doubt.
    """
    seen: list[int] = []
    model, batch = odd(kind, 1.0, torch.float32), data(dtype=torch.float32)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: seen.append(1) if isinstance(module, Odd) else None
    )
    try:
        assert audited(model, batch, method, 0).passed
    finally:
        handle.remove()
    assert len(seen) == passes
