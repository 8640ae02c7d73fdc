"""Conv nets: the site identity against autograd, and what keeping equal paths only costs there.

The diagonal recursion of Becker & LeCun (1989), which is what E[27] and E[28] amount to, is written for convolutions:
squared kernels push D down, squared patches collect it. It drops pairs of different paths and, a weight being shared by
all positions, pairs of different positions; so for the weights of a convolution only the top hidden layer is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessdiag.activations import RCTAF
from validation.bridge import autograd_diagonal, deviation, engine_diagonal, vector
from validation.evidence import Finding, measured
from validation.register import Run
from validation.studies.base import Study, study


def build(depth: int, alpha: float, beta: int, *, channels: int = 3, seed: int = 0) -> nn.Sequential:
    """`depth` convolutions 3x3 with an activation after each, then a linear layer; float64, seeded."""
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for l in range(depth):
        layers += [nn.Conv2d(1 if l == 0 else channels, channels, 3, padding=1), RCTAF(alpha=alpha, beta=beta)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / fan**0.5)
    return model.eval()


def batch(samples: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images 4x4 and classes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(3, (samples,), generator=g)


def equal_paths_only(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """Functional part of every convolution's weight by the diagonal recursion with squared kernels."""
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    activation = next(m for m in model if isinstance(m, RCTAF))
    linear = model[-1]
    assert isinstance(linear, nn.Linear)
    inputs, before, h = [], [], x
    with torch.no_grad():
        for conv in convolutions:
            inputs.append(h)
            before.append(conv(h))
            h = activation(before[-1])
        outputs = linear(h.flatten(1))
        gradient = torch.softmax(outputs, 1) - F.one_hot(y, outputs.shape[1])
        adjoint = (gradient @ linear.weight).reshape(h.shape)
        curvature = torch.zeros_like(adjoint)
        found: list[Tensor] = []
        for l in range(len(convolutions) - 1, -1, -1):
            slope, bend = activation.d1(before[l]), activation.d2(before[l])
            curvature = bend * adjoint + slope**2 * curvature
            patches = F.unfold(inputs[l], 3, padding=1) ** 2
            entries = torch.einsum("ncs,nks->ck", curvature.flatten(2), patches) / len(x)
            found.insert(0, entries.reshape(convolutions[l].weight.shape))
            weight = convolutions[l].weight
            adjoint = F.conv_transpose2d(slope * adjoint, weight, padding=1)
            curvature = F.conv_transpose2d(curvature, weight**2, padding=1)
    return found


@study("convolutions")
def run(options: Run) -> Study:
    """Engine against autograd, and the equal-paths form against both, by depth and activation."""
    rows, exact, top = [], 0.0, 0.0
    for depth in (1, 2, 3) if options.quick else (1, 2, 3, 4):
        for alpha, beta in ((1.0, 1), (14.0, 1), (7.0, 2)):
            model = build(depth, alpha, beta)
            x, y = batch(4)
            truth = autograd_diagonal(model, x, y, "cross_entropy")
            engine = engine_diagonal(model, x, y, "cross_entropy")
            gap = deviation(vector(engine.total), vector(truth))
            exact = max(exact, gap)
            names = [name for name, p in model.named_parameters() if p.ndim == 4]
            part = {name: truth[name] - engine.gauss_newton[name] for name in names}
            errors = [deviation(a, part[n]) for a, n in zip(equal_paths_only(model, x, y), names, strict=True)]
            top = max(top, errors[-1])
            for layer, error in enumerate(errors, 1):
                rows.append((depth, beta, alpha, layer, depth + 1 - layer, error, gap))
    lower = sorted(row[5] for row in rows if row[4] > 1)
    findings: tuple[Finding, ...] = (
        measured("the engine's exact diagonal equals autograd", exact, at_most=1e-10),
        measured("equal paths only, top hidden layer", top, at_most=1e-10, label="relative error"),
        measured("equal paths only, below it (median)", lower[len(lower) // 2], at_least=1e-2, label="relative error"),
    )
    columns = (
        "convolutions",
        "β",
        "α",
        "layer",
        "layers to the output",
        "error of equal paths only",
        "engine - autograd",
    )
    title = "Convolutions: relative error of the functional part if only equal paths are kept"
    return Study("convolutions", title, columns, tuple(rows), findings,
                 ("Softmax cross-entropy, three channels, 4x4 images; relative to the true part's norm.",))  # fmt: skip
