"""The split E[9] measured: how much of ‖diag H‖ is functional, by α, at initialisation and along a short training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.data import load
from validation.bridge import engine_diagonal, rct_spec, vector
from validation.evidence import measured
from validation.register import Run
from validation.studies.base import Study, Table, study

LOSSES = ("cross_entropy", "half_mse")


def build(kind: str, alpha: float) -> nn.Module:
    """A small network for 8x8 digits, seeded, float64."""
    if kind == "mlp":
        model = hd.networks.build("mlp", activation=rct_spec(alpha, 1), in_features=64, widths=(16, 16, 16), seed=1)
    else:
        model = hd.networks.build("small_resnet", activation=rct_spec(alpha, 1), width=4, seed=1)
    return model.double()


def digits(samples: int) -> tuple[Tensor, Tensor]:
    """Training digits in float64."""
    data = load("digits", split="train", samples=samples, seed=0)
    return data.inputs.double(), data.targets


def loss_of(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over classes or one-hot targets."""
    if name == "cross_entropy":
        return F.cross_entropy(outputs, targets)
    return ((outputs - F.one_hot(targets, 10)) ** 2).sum(1).mean() / 2


def train(model: nn.Module, loss: str, steps: int, x: Tensor, y: Tensor, *, seed: int) -> nn.Module:
    """Plain SGD with momentum on batches of 64, in place."""
    g = torch.Generator().manual_seed(seed)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05 if loss == "cross_entropy" else 0.02, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=g)
        optimiser.zero_grad()
        loss_of(loss, model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model.eval()


def shares(model: nn.Module, loss: str, x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """Training loss, rms of the diagonal, and ‖functional‖, ‖Gauss-Newton‖ over ‖diag‖, on the given samples."""
    targets = y if loss == "cross_entropy" else F.one_hot(y, 10).double()
    parts = engine_diagonal(model.eval(), x, targets, loss)
    total, functional, outer = (vector(p) for p in (parts.total, parts.functional, parts.gauss_newton))
    with torch.no_grad():
        value = float(loss_of(loss, model(x), y))
    rms = float(total.norm()) / len(total) ** 0.5
    return value, rms, float(functional.norm() / total.norm()), float(outer.norm() / total.norm())


def draw(table: Table, canvas: Any) -> None:
    """Share of the functional part over α, one panel per stage."""
    stages = sorted({row[3] for row in table["rows"]})
    panels = canvas.subplots(1, len(stages), sharey=True)
    for panel, steps in zip(panels, stages, strict=True):
        for kind in ("mlp", "conv"):
            for loss in LOSSES:
                rows = [row for row in table["rows"] if row[0] == kind and row[1] == loss and row[3] == steps]
                label = f"{kind}, {'CE' if loss == 'cross_entropy' else 'MSE'}"
                panel.plot([row[2] for row in rows], [row[6] for row in rows], marker="o", label=label)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(f"{steps} steps")
        panel.set_xlabel("α (β = 1)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("‖functional part‖ / ‖diag H‖")
    panels[0].legend(fontsize=8)


@study("gauss_newton", draw=draw)
def run(options: Run) -> Study:
    """MLP and residual conv net on digits, MSE and cross-entropy."""
    alphas = (1.0, 14.0) if options.quick else (1.0, 4.0, 14.0, 50.0)
    stages = (0, 60) if options.quick else (0, 60, 300)
    x, y = digits(1297)
    probe = slice(0, 16 if options.quick else 32)
    rows = []
    for kind in ("mlp", "conv"):
        for loss in LOSSES:
            for alpha in alphas:
                model, done = build(kind, alpha), 0
                for steps in stages:
                    model = train(model, loss, steps - done, x, y, seed=steps)
                    done = steps
                    rows.append((kind, loss, alpha, steps, *shares(model, loss, x[probe], y[probe])))
    gap = max(abs(row[6]) for row in _piecewise_linear(x[:8], y[:8]))
    findings = (
        measured("functional share of a ReLU net", gap, at_most=0.0, label="share"),
        measured(
            "smallest functional share at α > 1", min(r[6] for r in rows if r[2] > 1), at_least=1e-12, label="share"
        ),
    )
    columns = ("network", "loss", "α", "steps", "loss value", "rms of diag H", "functional share", "Gauss-Newton share")
    notes = (
        "Shares are norms relative to ‖diag H‖; they add up to one only where the parts do not cancel, "
        "and can exceed one.",
        f"Digits, SGD with momentum 0.9 on batches of 64, diagonal exact on {probe.stop} training samples.",
    )
    title = "Gauss-Newton split E[9]: size of the functional part by α, at initialisation and along training"
    return Study("gauss_newton", title, columns, tuple(rows), findings, notes)


def _piecewise_linear(x: Tensor, y: Tensor) -> list[tuple[Any, ...]]:
    model = hd.networks.build("mlp", activation="relu", in_features=64, widths=(16, 16), seed=1).double()
    return [("relu", "cross_entropy", 0.0, 0, *shares(model, "cross_entropy", x, y))]
