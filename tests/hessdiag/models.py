"""Small models that bend in every way the engine must see, and models it must refuse; shared by several tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag.activations import RCTAF
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import accumulate, zeros


class Half(torch.autograd.Function):
    """Half of what comes in, on the way back alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


class Function(nn.Module):
    """Two linear layers with any function of the hidden tensor between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.middle(self.function(self.first(x)))))


class Residual(nn.Module):
    """Strided, dilated and grouped convolutions, BatchNorm, gating, in-place SiLU, residual sums, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(4)
        self.c2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.b2 = nn.BatchNorm2d(4)
        self.c3 = nn.Conv2d(4, 4, 3, stride=2)
        self.gate = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.b1(self.c1(x)))
        u = self.b2(self.c2(h))
        h = F.silu(h + u * torch.sigmoid(u), inplace=True)
        h = torch.tanh(self.c3(F.max_pool2d(h, 2, stride=1)))
        gate = torch.sigmoid(self.gate(h.mean((2, 3))))
        return self.fc((h * gate[:, :, None, None]).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers on the last axis of a sequence, a shift by position, a learned gain per feature, gating."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 6) * 0.3)
        self.gain = nn.Parameter(torch.randn(6))
        self.inner = nn.Linear(5, 6)
        self.value, self.gate = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x) + self.position) * self.gain
        return self.last((self.value(h) * F.softplus(self.gate(h))).mean(1))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in eval mode whose BatchNorms have seen life."""
    torch.manual_seed(seed)
    model = build().double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def dense_diagonal(
    model: nn.Module, losses: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Diagonal of the Hessian of the mean loss from the dense Hessian by torch.func: shares no code with the engine."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    out = {}
    for name, value in parameters.items():

        def loss(one: Tensor, name: str = name) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return losses(functional_call(model, {**parameters, name: one}, (x,)), y).mean()

        full = jacrev(jacrev(loss))(value).reshape(value.numel(), value.numel())
        out[name] = full.diagonal().reshape(value.shape)
    return out


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, beta=3.0),
    "elu": F.elu,
    "elu in place": lambda x: F.elu(x, inplace=True),
    "selu": F.selu,
    # torch 2.13 rounds 1/alpha to float32 in celu's backward: with 0.7 its own gradient is 6e-9 off, with 0.5 exact.
    "celu": lambda x: F.celu(x, 0.5),
    "celu in place": lambda x: F.celu_(x, 0.5),
    "tanh": torch.tanh,
    "tanh in place": lambda x: x.tanh_(),
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda x: x.sigmoid_(),
    "log sigmoid": F.logsigmoid,
    "hardswish": F.hardswish,
    "relu method": lambda x: x.relu(),
    "relu in place": lambda x: x.relu_(),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "leaky relu in place": lambda x: F.leaky_relu_(x, 0.1),
    "relu6": F.relu6,
    "square": lambda x: x**2,
    "cube": lambda x: 0.3 * x**3,
    "exp": lambda x: torch.exp(0.3 * x),
    "expm1": lambda x: torch.expm1(0.3 * x),
    "log1p": lambda x: torch.log1p(x**2),
    "sqrt": lambda x: torch.sqrt(x**2 + 0.5),
    "rsqrt": lambda x: torch.rsqrt(x**2 + 0.5),
    "reciprocal": lambda x: torch.reciprocal(x**2 + 1.0),
    "log": lambda x: torch.log(x**2 + 1.0),
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "rct 0": RCTAF(alpha=5.0, beta=0),
    "rct 1": RCTAF(alpha=5.0, beta=1),
    "rct 2": RCTAF(alpha=5.0, beta=2),
    "rct 3": RCTAF(alpha=3.0, beta=3),
    "swish by hand": lambda x: x * torch.sigmoid(x),
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "mish by hand": lambda x: x * torch.tanh(F.softplus(x)),
    "square by product": lambda x: x * x,
    "two curves": lambda x: torch.tanh(x) * F.silu(1.5 * x - 0.2),
    "sum of curves": lambda x: torch.tanh(x) + torch.sin(-x),
    "curve of a curve": lambda x: torch.tanh(F.silu(x) * 2),
    "glu": lambda x: x * torch.sigmoid(x.flip(1)),
}


def beyond_in_the_mean(propagator: Propagator) -> dict[str, Tensor]:
    """What propagation leaves to signs, on average over them: every one-hot vector in their place, summed."""
    out = zeros(propagator.batch.objective.parameters)
    batch = propagator.batch
    shapes = [
        (1, site.c.numel()) if number in batch.free else (batch.samples, site.c.numel() // batch.samples)
        for number, site in enumerate(batch.sites)
    ]
    for place, (_, entries) in enumerate(shapes):
        for entry in range(entries):
            unit = [torch.zeros(shape, dtype=site.c.dtype) for shape, site in zip(shapes, batch.sites)]
            unit[place][:, entry] = 1
            accumulate(out, propagator.beyond(unit))
    return out


class Chained(nn.Module):
    """Two linear layers and a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(5, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def chained(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """The same in float64."""
    return Chained(function).double()
