"""Do the two parts of the diagonal add or cancel? Cosine of Gauss-Newton and functional part, by loss.

Both share with the curvature in the input the weights c_j = σ''(z_j) ∂ℓ/∂h_j of the activations (docs/derivation.md,
section 7): where an attack has climbed to a ridge of the loss, the σ'' part of the input's Hessian is negative, and so
is the bulk of the c_j. Small residual nets on digits, exact diagonals in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from validation.bridge import engine_diagonal, vector
from validation.evidence import Finding, measured
from validation.register import Run
from validation.studies.base import Study, study
from validation.studies.gauss_newton import build, digits

EPS = 0.15


def attack(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, share: float, seed: int) -> Tensor:
    """PGD in the ball of `EPS` and in [0, 1], from a random start, steps of `share` of the radius."""
    g = torch.Generator().manual_seed(seed)
    shift = (torch.rand(x.shape, generator=g, dtype=x.dtype) * 2 - 1) * EPS
    shift = (x + shift).clamp(0, 1) - x
    for _ in range(steps):
        shift.requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x + shift), y), shift)
        shift = (shift.detach() + share * EPS * slope.sign()).clamp(-EPS, EPS)
        shift = (x + shift).clamp(0, 1) - x
    return x + shift


def train(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, adversarial: bool) -> nn.Module:
    """SGD with momentum, decay and a falling rate; adversarial: on images of 3 PGD steps against the model in eval
    mode.
    """
    g = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        chosen = torch.randint(len(x), (64,), generator=g)
        images, classes = x[chosen], y[chosen]
        if adversarial:
            images = attack(model.eval(), images, classes, steps=3, share=0.5, seed=step)
        optimiser.zero_grad()
        F.cross_entropy(model.train()(images), classes).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model.eval()


def input_parts(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal of ∇²_x ℓ per sample and pixel, [N, pixels]: Gauss-Newton part and the rest, the σ'' part."""
    at = x.clone().requires_grad_(True)
    outputs = model(at)
    (slope,) = torch.autograd.grad(F.cross_entropy(outputs, y, reduction="sum"), at, create_graph=True)
    flat = slope.reshape(len(x), -1)
    columns = []
    for k in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, k].sum(), at, retain_graph=True)
        columns.append(row.reshape(len(x), -1)[:, k])
    rows = [torch.autograd.grad(outputs[:, c].sum(), at, retain_graph=True)[0] for c in range(outputs.shape[1])]
    jacobian = torch.stack([r.reshape(len(x), -1) for r in rows], 1)
    p = outputs.detach().softmax(1)
    curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    outer = ((curvature @ jacobian) * jacobian).sum(1)
    return outer, torch.stack(columns, 1) - outer


@dataclass(frozen=True)
class Parts:
    """On one batch: loss, norms of the two parts (rms), their cosine, share of negative entries, and the trace of the
    σ'' part of the input's Hessian, mean over samples.
    """

    loss: float
    gauss_newton: float
    functional: float
    cosine: float
    negative: float
    input_trace: float


def parts(model: nn.Module, x: Tensor, y: Tensor) -> Parts:
    """See `Parts`."""
    found = engine_diagonal(model, x, y, "cross_entropy")
    outer, bend, total = vector(found.gauss_newton), vector(found.functional), vector(found.total)
    root = len(total) ** 0.5
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y))
    return Parts(
        loss,
        float(outer.norm()) / root,
        float(bend.norm()) / root,
        float(outer @ bend / (outer.norm() * bend.norm())),
        float((total < 0).double().mean()),
        float(input_parts(model, x, y)[1].sum(1).mean()),
    )


@study("parts")
def run(options: Run) -> Study:
    """Standard and adversarial training, three α, both losses of the same network."""
    x, y = digits(1297)
    images, classes = x[:64] if options.quick else x[:256], y[:64] if options.quick else y[:256]
    rows = []
    for trained in ("standard", "adversarial"):
        for alpha in (14.0,) if options.quick else (2.0, 14.0, 28.0):
            steps = 300 if options.quick else 600
            model = train(build("conv", alpha), x, y, steps=steps, adversarial=trained == "adversarial")
            for loss in ("clean", "adversarial"):
                at = images if loss == "clean" else attack(model, images, classes, steps=10, share=0.25, seed=1)
                p = parts(model, at, classes)
                rows.append(
                    (trained, alpha, alpha / 2, loss, p.loss, p.gauss_newton, p.functional, p.cosine, p.negative,
                     p.input_trace)
                )  # fmt: skip
    findings: list[Finding] = []
    for row in rows:
        if row[1] < 14:
            continue
        name = f"{row[0]} training, α = {row[1]:g}, {row[3]} loss: cosine of the two parts"
        if row[3] == "clean":
            findings.append(measured(name, row[7], at_least=0.0, label="cosine"))
        else:
            findings.append(measured(name, row[7], at_most=0.0, label="cosine"))
    agree = sum((row[7] > 0) == (row[9] > 0) for row in rows)
    columns = (
        "training", "α", "max|σ''|", "loss", "value", "rms Gauss-Newton", "rms functional", "cosine",
        "negative entries", "σ'' part of tr ∇²_x ℓ",
    )  # fmt: skip
    notes = (
        f"Small residual net, β = 1, digits, ε = {EPS}, {len(images)} training images, adversarial: PGD-10. A positive "
        "cosine: the parts add; a negative one: they cancel.",
        f"Cosine and σ'' part of the input's Hessian have one sign in {agree} of {len(rows)} rows.",
    )
    title = "Gauss-Newton and functional part: cosine on the clean and on the adversarial loss"
    return Study("parts", title, columns, tuple(rows), tuple(findings), notes)
