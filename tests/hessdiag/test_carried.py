"""Parameters that reach their node by a way: every entry from one entry of the parameter, against products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_exact_layers import check, images, shuffle
from test_operations import agree, products, propagated
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.graph import Linearisation

torch.set_num_threads(1)

Use = Callable[[Tensor, dict[str, Tensor]], Tensor]
RELATIVE = torch.tensor([[0, 1, 2], [3, 0, 1], [4, 3, 0]])


class Using(nn.Module):
    """Tokens [N, 3, 4] by a linear layer, a use of hand-made parameters, GELU, a linear layer on what is left."""

    def __init__(self, use: Use, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.own = nn.ParameterDict({name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()})
        self.first, self.use = nn.Linear(2, 4), use
        with torch.no_grad():
            width = self._hidden(torch.zeros(2, 3, 2)).shape[1]
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self._hidden(x)))  # type: ignore[no-any-return]

    def _hidden(self, x: Tensor) -> Tensor:
        return self.use(torch.tanh(self.first(x)), dict(self.own)).flatten(1)


USES: dict[str, tuple[Use, dict[str, tuple[int, ...]]]] = {
    "class token": (lambda h, p: torch.cat([p["token"].expand(len(h), -1, -1), h], 1), {"token": (1, 1, 4)}),
    "two tokens": (
        lambda h, p: torch.cat([p["one"].expand(len(h), -1, -1), h, p["two"].expand(len(h), -1, -1)], 1),
        {"one": (1, 1, 4), "two": (1, 1, 4)},
    ),
    "two tokens in one": (
        lambda h, p: torch.cat([torch.cat([p["one"], p["two"]], 1).expand(len(h), -1, -1), h], 1),
        {"one": (1, 1, 4), "two": (1, 1, 4)},
    ),
    "token by repeat": (lambda h, p: torch.cat([p["token"].repeat(len(h), 1, 1), h], 1), {"token": (1, 1, 4)}),
    "position embedding": (lambda h, p: h + p["position"], {"position": (1, 3, 4)}),
    "position embedding, cut": (lambda h, p: h + p["position"][:, 1:4], {"position": (1, 6, 4)}),
    "position embedding, interpolated at its own size": (
        lambda h, p: h + p["position"].reshape(1, 3, 4).permute(0, 2, 1).contiguous().permute(0, 2, 1),
        {"position": (12,)},
    ),
    "position embedding of two axes": (
        lambda h, p: h.reshape(len(h), 3, 2, 2) + (p["row"][:, None] + p["column"][None]),
        {"row": (3, 2), "column": (2, 2)},
    ),
    "relative positions": (
        lambda h, p: h[:, :, None, :2] + p["table"][RELATIVE.view(-1)].view(3, 3, 2).contiguous()[None],
        {"table": (5, 2)},
    ),
    "layer scale": (lambda h, p: h + p["gamma"] * torch.sin(h), {"gamma": (4,)}),
    "one factor": (lambda h, p: h * p["scale"], {"scale": ()}),
    "one factor of shape 1": (lambda h, p: h * torch.tanh(h * p["scale"]), {"scale": (1,)}),
    "gain of one more": (lambda h, p: (1 + p["gain"]) * h, {"gain": (4,)}),
    "gain by views": (lambda h, p: h * p["gain"].view(1, -1)[:, :, None], {"gain": (3,)}),
    "gain by indexing": (lambda h, p: h * p["gain"][None, :, None] + p["bias"][None, :, None],
                         {"gain": (3,), "bias": (3,)}),
    "gain expanded": (lambda h, p: h * p["gain"].expand_as(h), {"gain": (4,)}),
    "gain expanded and unequal": (
        lambda h, p: h * (p["gain"].expand_as(h) * torch.arange(1.0, 4.0, dtype=h.dtype)[:, None]), {"gain": (4,)}
    ),
    "absolute gain": (lambda h, p: h * p["gain"].abs(), {"gain": (4,)}),
    "bias subtracted": (lambda h, p: h - p["bias"], {"bias": (4,)}),
    "bias that is subtracted from": (lambda h, p: p["bias"] - h, {"bias": (3, 1)}),
    "bias scaled": (lambda h, p: torch.add(h, p["bias"], alpha=0.3) + 2.0 * p["more"], {"bias": (4,), "more": (4,)}),
    "bias by rsub": (lambda h, p: torch.rsub(h, p["bias"], alpha=3), {"bias": (4,)}),
    "learnable swish": (lambda h, p: h * torch.sigmoid(p["alpha"] * h), {"alpha": ()}),
    "parameter over a constant": (lambda h, p: h + p["bias"] / torch.arange(1.0, 5.0, dtype=h.dtype), {"bias": (4,)}),
    "chosen by a mask": (
        lambda h, p: torch.where(torch.tensor([True, False, True])[:, None], p["token"], h), {"token": (4,)}
    ),
    "PReLU": (lambda h, p: F.prelu(h, p["slope"]), {"slope": (1,)}),
    "PReLU of channels": (lambda h, p: F.prelu(h, p["slope"]), {"slope": (3,)}),
    "PReLU by hand": (lambda h, p: F.relu(h) - p["slope"] * F.relu(-h), {"slope": (4,)}),
    "learned queries": (lambda h, p: p["query"].expand(len(h), -1, -1) * h.mean(1, keepdim=True), {"query": (2, 4)}),
    "standardised": (lambda h, p: h * (p["gain"] - p["gain"].mean()), {"gain": (4,)}),
    "mixed": (lambda h, p: h * p["gain"].cumsum(0), {"gain": (4,)}),
    "twice": (lambda h, p: h * p["gain"][:4] + p["gain"][1:], {"gain": (5,)}),
    "in a matrix": (lambda h, p: F.pad(h @ p["weight"].reshape(4, 2), (0, 2)), {"weight": (8,)}),
    "divided by": (lambda h, p: h / (2.0 + p["scale"]), {"scale": (4,)}),
    "alone": (lambda h, p: torch.cat([torch.tanh(p["free"].expand(len(h), -1, -1)), h], 1), {"free": (1, 2, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_parameters_on_their_way(name: str) -> None:
    torch.manual_seed(0)
    use, shapes = USES[name]
    model = shuffle(Using(use, **shapes))
    check(model, images(2, 3, 2))
    model = model.double()
    x = images(2, 3, 2)
    linear = Linearisation(hd.Objective(model), x, torch.tensor([1, 0]))
    agree(propagated(linear), products(model, x), 1e-10)
    m = hd.measure(hd.Objective(model), [(x, torch.tensor([1, 0]))], method="propagation", max_replicates=10)
    assert m.plan.method == "propagation"


def test_outputs_that_are_a_parameter() -> None:
    """Nothing takes them, and every sample has a row."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.own.expand(len(x), -1)

    check(Constant(), images(2, 3))


def test_a_token_joined_to_what_is_constant() -> None:
    """With the token alone chosen nothing else is live, and several take what it was joined to."""
    torch.manual_seed(0)

    def use(h: Tensor, p: dict[str, Tensor]) -> Tensor:
        joined = torch.cat([p["token"].expand(len(h), -1, -1), h], 1) + p["position"]
        return joined + F.layer_norm(joined, (4,)) * torch.tanh(joined.mean(1, keepdim=True))

    model = shuffle(Using(use, token=(1, 1, 4), position=(1, 4, 4)))
    for chosen in (r"own\..*", r"own\.token", r"own\.position", ".*"):
        check(model, images(2, 3, 2), parameters=chosen)


def test_gains_and_biases_by_addcmul() -> None:
    torch.manual_seed(0)
    model = shuffle(Using(lambda h, p: torch.addcmul(p["bias"], p["gain"], h), bias=(1, 1, 4), gain=(1, 1, 4)))
    check(model, images(2, 3, 2))
    model = shuffle(Using(lambda h, p: h.addcmul(p["gain"], h, value=0.3), gain=(4,)))
    check(model, images(2, 3, 2))
