"""Custom autograd Functions between two layers: admitted by test, refused by name, never trusted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import chained
from test_exact_layers import check, images
from test_operations import TARGETS, agree, products, propagated
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.errors import UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.graph.sites.elementwise import curvature_of

torch.set_num_threads(1)


class _Swish(torch.autograd.Function):
    """As many public models write it."""

    @staticmethod
    def forward(ctx: Any, i: Tensor) -> Tensor:
        result = i * torch.sigmoid(i)
        ctx.save_for_backward(i)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        i = ctx.saved_tensors[0]
        sigmoid_i = torch.sigmoid(i)
        return grad_output * (sigmoid_i * (1 + i * (1 - sigmoid_i)))


class Softplus(torch.autograd.Function):
    """A number besides, carried by the node; forward without a context."""

    @staticmethod
    def forward(x: Tensor, beta: float) -> Tensor:
        return torch.log1p(torch.exp(-(beta * x).abs())) / beta + x.clamp(min=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.beta = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * torch.sigmoid(ctx.beta * ctx.saved_tensors[0]), None


class Rectifier(torch.autograd.Function):
    """Piecewise linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


class Overwriting(torch.autograd.Function):
    """In place, as those do that save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.tanh_()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.saved_tensors[0] ** 2)


def beta(x: Tensor) -> Tensor:
    return Softplus.apply(x, 2.5)  # type: ignore[no-any-return, no-untyped-call]


def overwriting(x: Tensor) -> Tensor:
    return Overwriting.apply(1.0 * x)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("function", [_Swish.apply, beta, Rectifier.apply, overwriting])
def test_elementwise_functions_are_admitted(function: Any) -> None:
    torch.manual_seed(0)
    model = chained(function)
    check(model, images(2, 5))
    agree(propagated(Linearisation(hd.Objective(model), images(2, 5), TARGETS)), products(model, images(2, 5)), 1e-10)
    assert hd.measure(hd.Objective(model), [(images(2, 5), TARGETS)]).plan.method != "hutchinson"


def test_the_same_function_as_torch_has_it_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    mine, torchs = chained(_Swish.apply), chained(nn.functional.silu)
    torchs.load_state_dict(mine.state_dict())
    found = [hd.diagonal(hd.Objective(model), [(images(2, 5), TARGETS)]).total for model in (mine, torchs)]
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-11, atol=1e-14)


def test_its_curvature_is_searched_for() -> None:
    output = _Swish.apply(torch.ones(3, requires_grad=True))  # type: ignore[no-untyped-call]
    name, most = curvature_of(output.grad_fn)
    assert name == "swish"
    assert most == pytest.approx(hd.activations.max_curvature("silu"), rel=1e-6)


class Sign(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Forgetful(torch.autograd.Function):
    """Right once: its backward forgets what it depends on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach()
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.kept.tanh() ** 2)


class Centred(torch.autograd.Function):
    """Not elementwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g - g.mean(-1, keepdim=True)


class Scaled(torch.autograd.Function):
    """A number that nothing tells afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x.tanh() * scale, x)
        return x.tanh() * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        t, _ = ctx.saved_tensors
        return g * (1 - t * t), None


class Gate(torch.autograd.Function):
    """Two tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return g * y, g * x


REFUSED = {
    "Sign": (Sign.apply, "backward is not its first derivative"),
    "Forgetful": (Forgetful.apply, "backward is not its second derivative"),
    "Centred": (Centred.apply, "not elementwise"),
    "Scaled": (lambda x: Scaled.apply(x, 0.5), "does not carry 'scale'"),
    "Gate": (lambda x: Gate.apply(x, x.flip(-1)), "several tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str) -> None:
    function, reason = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(UncoveredModelError, match=reason) as caught:
        Linearisation(hd.Objective(chained(function)), images(2, 5), TARGETS)
    assert str(caught.value).startswith(f"{name} after 'first'")
