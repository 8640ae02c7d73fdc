"""Parameters whose effect cancels up to rounding: the audit lets them pass, and no wrong identity with them.

A bias below a norm that subtracts the mean, and that of the keys of attention, where they stand alone: shared by two
uses, or chosen without their weight. Whatever is computed of them is rounding, and its relative error of order one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_wrong_numbers import DTYPES, Forgetful, agree, by_products, data, net
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import AuditError
from hessdiag.graph.layers.layer import LayerKind
from hessdiag.graph.sites.elementwise import Elementwise
from hessdiag.measuring.audit import audit
from hessdiag.methods.batches import Numbered

METHODS = ("exact", "propagation", "hutchinson", "reference", "auto")
EPS = torch.finfo(torch.float64).eps
L = nn.Linear


def _normed(s: Any, x: Tensor) -> Tensor:
    x = F.silu(s.i(s.c(x)))
    return s.b(F.silu(s.i(s.d(x))).amax((2, 3)))


def _twice(s: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = F.silu(s.i(s.c(x)))
    return s.b(x.amax((2, 3)))


def _attention(uses: int) -> Callable[[Any, Tensor], Tensor]:
    def body(s: Any, x: Tensor) -> Tensor:
        for _ in range(uses):
            x = s.n(x + torch.softmax(s.q(x) @ s.k(x).mT / 2, -1) @ s.v(x))
        return s.b(x.mean(1))

    return body


def _conv() -> nn.Module:
    return nn.Conv2d(2, 2, 3, padding=1)


CONVS = {"c": _conv, "d": _conv, "i": lambda: nn.InstanceNorm2d(2, affine=True), "b": lambda: L(2, 3)}
ATTENTION = {name: lambda: L(4, 4) for name in "qkv"} | {"n": lambda: nn.LayerNorm(4), "b": lambda: L(4, 3)}
CANCELLED: dict[str, tuple[Any, dict[str, Any], tuple[int, ...], str | None, tuple[str, ...]]] = {
    "a convolution used twice below its norm": (
        _twice, {name: CONVS[name] for name in "cib"}, (2, 5, 5), None, ("c.bias",)),
    "biases below norms": (_normed, CONVS, (2, 5, 5), ".*bias", ("c.bias", "d.bias")),
    "one of them alone": (_normed, CONVS, (2, 5, 5), "c.bias", ("c.bias",)),
    "keys of attention used twice": (_attention(2), ATTENTION, (3, 4), None, ("k.bias",)),
    "biases of attention": (_attention(1), ATTENTION, (3, 4), ".*bias", ("k.bias",)),
    "keys alone": (_attention(1), ATTENTION, (3, 4), "k.bias", ("k.bias",)),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", CANCELLED)
def test_what_cancels_is_measured_by_every_method(name: str, dtype: torch.dtype) -> None:
    body, parts, shape, chosen, zero = CANCELLED[name]
    model, batch = net(body, dtype=dtype, **parts), data(*shape, n=4, dtype=dtype)
    objective = hd.Objective(model, parameters=chosen)
    for method in METHODS if dtype == torch.float64 else ("auto",):
        found = hd.measure(objective, [batch], method=method, min_replicates=4, max_replicates=4)
        assert found.plan.method == ("exact" if method == "auto" else method)
    truth = by_products(model, batch)
    size = max(float(t.abs().max()) for t in truth.values())
    assert all(float(truth[bias].abs().max()) < 1e3 * EPS * size for bias in zero)
    total = hd.diagonal(objective, [batch]).total
    assert all(float(total[bias].abs().max()) < 1e3 * torch.finfo(dtype).eps * size for bias in zero)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    agree(total, {n: truth[n] for n in total if n not in zero}, tolerance)


def _all_but_cancelled(s: Any, x: Tensor) -> Tensor:
    """Of the bias, 1e-4 is left."""
    z = s.c(x)
    return s.b(torch.tanh(z - (1 - 1e-4) * z.mean(1, keepdim=True)).square().mean(1))


def _small(s: Any, x: Tensor) -> Tensor:
    return s.b(s.a(x).mean(1) + 1e-6 * torch.tanh(s.c(x)).mean(1))


@pytest.mark.parametrize("method", ["exact", "propagation"])
@pytest.mark.parametrize(
    ("body", "chosen"), [(_all_but_cancelled, r"[cb]\.bias"), (_all_but_cancelled, r"c\.bias"), (_small, None)]
)
def test_a_wrong_identity_is_seen_where_little_is_left(
    body: Any, chosen: str | None, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Elementwise.second

    def wrong(node: Any) -> Any:
        factor = 1.001 if node.name() == "TanhBackward0" else 1.0
        return {pair: second * factor for pair, second in original(node).items()}

    model, batch = net(body, a=lambda: L(4, 4), c=lambda: L(4, 4), b=lambda: L(4, 3)), data(3, 4)
    objective = hd.Objective(model, parameters=chosen or ".*")
    if body is _all_but_cancelled:
        model.get_submodule("a").requires_grad_(False)
    hd.measure(objective, [batch], method=method, max_replicates=10)
    monkeypatch.setattr(Elementwise, "second", wrong)
    entries = audit(objective, Numbered(0, 0, *batch), method=method, seed=0).entries
    assert [e.layer for e in entries if e.check == "identity" and not e.passed] == ["c"]


@pytest.mark.parametrize("method", ["hutchinson", "reference"])
def test_a_lost_second_derivative_is_seen_in_one_bias_alone(method: str) -> None:
    model = net(lambda s, x: s.b(Forgetful.apply(s.c(x)).mean(1)), c=lambda: L(4, 4), b=lambda: L(4, 3))
    with pytest.raises(AuditError, match=r"difference of 'c\.bias'"):
        hd.measure(hd.Objective(model, parameters=r"c\.bias"), [data(3, 4)], method=method, max_replicates=10)


@pytest.mark.parametrize("method", ["exact", "propagation"])
def test_a_gradient_of_what_has_none_is_seen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that gives something to a parameter whose gradient is zero, not zero up to rounding."""
    original = LayerKind.each

    def wrong(self: LayerKind, delta: Tensor) -> dict[str, Tensor]:
        return {n: torch.ones_like(g) if n == "c.bias" else g for n, g in original(self, delta).items()}

    model = net(
        lambda s, x: s.b(s.a(x) + s.c(0.0 * x).mul(0.0)), a=lambda: L(5, 4), c=lambda: L(5, 4), b=lambda: L(4, 3)
    )
    monkeypatch.setattr(LayerKind, "each", wrong)
    with pytest.raises(AuditError, match=r"squares of layer 'c\.bias'"):
        hd.measure(hd.Objective(model), [data()], method=method, max_replicates=10)
