"""Covariance of SGD near a minimum: closed forms, Lyapunov's equation and simulation; the flatness term of a small net.

After Xu & Zhang (arXiv 2410.07719). For the trained net H is indefinite, so the stationary covariance is that of its
Gauss-Newton part, and for H itself the transient is given; which is which stands in the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import hessdiag as hd
from theory import dynamics
from validation.bridge import full_hessian, gauss_newton_matrix, rct_spec
from validation.evidence import Finding, measured
from validation.register import Run
from validation.studies.base import Cell, Study, Table, study
from validation.studies.gauss_newton import digits, train

Row = tuple[Cell, ...]


def _quadratic(n: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """H, a noise that commutes with it, its eigenvalues, and a noise that does not."""
    g = np.random.default_rng(seed)
    basis = np.linalg.qr(g.standard_normal((n, n)))[0]
    h, c = np.linspace(0.5, 6.0, n), g.uniform(0.5, 2.0, n)
    other = g.standard_normal((n, n))
    return (basis * h) @ basis.T, (basis * c) @ basis.T, (h, c, basis), other @ other.T / n


def _z(found: dynamics.Simulation, truth: Any) -> float:
    gaps = np.abs(found.covariance - truth) / found.covariance_error
    return float(gaps.max())


def _simulated(label: str, h: Any, c: Any, truth: Any, *, lr: float, momentum: float, steps: int, runs: int) -> Row:
    found = dynamics.simulate(h, c, lr, steps, runs=runs, generator=np.random.default_rng(8), momentum=momentum)
    flat = dynamics.flatness(h, truth)
    return (label, momentum, steps, flat, dynamics.flatness(h, found.covariance), _z(found, truth))


def draw(table: Table, canvas: Any) -> None:
    """½ tr(HΣ_t) of the trained net over steps."""
    rows = [row for row in table["rows"] if str(row[0]).startswith("digits")]
    panel = canvas.subplots()
    for label in dict.fromkeys(row[0] for row in rows):
        chosen = [row for row in rows if row[0] == label and row[2] is not None]
        panel.plot([row[2] for row in chosen], [row[3] for row in chosen], marker="o", label=label)
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=1e-6)
    panel.set_xlabel("steps")
    panel.set_ylabel("½ tr(HΣ)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


@study("dynamics", draw=draw)
def run(options: Run) -> Study:
    """Quadratics first, then the measured net."""
    n, lr = 4, 0.1
    h, commuting, (values, noises, basis), general = _quadratic(n, 5)
    runs = 4000 if options.quick else 20000
    rows: list[Row] = []
    findings: list[Finding] = []
    for momentum in (0.0, 0.9):
        lyapunov = dynamics.stationary_covariance(h, commuting, lr, momentum=momentum)
        closed = (basis * dynamics.stationary_variance(values, noises, lr, momentum=momentum)) @ basis.T
        gap = float(np.linalg.norm(closed - lyapunov) / np.linalg.norm(lyapunov))
        findings.append(measured(f"closed form against Lyapunov, momentum {momentum:g}", gap, at_most=1e-10))
        steps = 400
        rows.append(_simulated("stationary", h, commuting, lyapunov, lr=lr, momentum=momentum, steps=steps, runs=runs))
        early = dynamics.transient_covariance(h, general, lr, 7, momentum=momentum)
        rows.append(_simulated("transient", h, general, early, lr=lr, momentum=momentum, steps=7, runs=runs))
    lyapunov = dynamics.stationary_covariance(h, general, lr)
    gap = float(np.linalg.norm(dynamics.stationary_closed_form(h, general, lr) - lyapunov) / np.linalg.norm(lyapunov))
    findings.append(measured("closed form against Lyapunov, noise that does not commute", gap, at_most=1e-10))
    worst = max(float(row[5]) for row in rows if row[5] is not None)
    findings.append(measured("largest |z| of a simulated covariance entry", worst, at_most=5.0, label="z"))
    more, found = _net(options)
    columns = ("case", "momentum", "steps", "½ tr(HΣ)", "simulated", "largest |z|")
    notes = (
        "Largest |z| over the 10 different entries of each of four matrices: 5 raises a false "
        "alarm in about 1 of 40,000 runs if entries are normal.",
        "Digits rows: MLP, α = 14, β = 1; noise covariance from per-sample gradients, batch 32.",
    )
    title = "SGD near a minimum: closed forms, Lyapunov's equation, simulation; flatness of a small net"
    return Study("dynamics", title, columns, tuple(rows + more), tuple(findings + found), notes)


def _net(options: Run) -> tuple[list[Row], list[Finding]]:
    """Flatness ½ tr(HΣ) of a trained MLP with p = 212: stationary for Gauss-Newton (damped), transient for H."""
    x, y = digits(1297)
    x = torch.nn.functional.avg_pool2d(x, 2).flatten(1)
    model = hd.networks.build(
        "mlp", activation=rct_spec(14.0, 1), in_features=16, widths=(6, 6), num_classes=10, seed=0
    )
    model = train(model.double(), "cross_entropy", 400 if options.quick else 1500, x, y, seed=0)
    part = slice(0, 64 if options.quick else 256)
    x, y, lr, batch, damping = x[part], y[part], 0.02, 32, 1e-3
    hessian = full_hessian(model, x, y, "cross_entropy").detach().numpy()
    outer = gauss_newton_matrix(model, x, y, "cross_entropy").detach().numpy()
    rows_of = []
    for k in range(len(x)):
        loss = torch.nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        rows_of.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]))
    noise = np.cov(torch.stack(rows_of).numpy().T) / batch
    hessian, outer = (hessian + hessian.T) / 2, (outer + outer.T) / 2
    damped = outer + damping * np.eye(len(outer))
    lowest = float(np.linalg.eigvalsh(hessian)[0])
    stationary = dynamics.stationary_covariance(damped, noise, lr)
    rows: list[Row] = [
        ("digits, Gauss-Newton + 0.001, stationary", 0.0, None, dynamics.flatness(outer, stationary), None, None)
    ]
    for steps in (1, 3, 10, 30, 100, 300):
        sigma = dynamics.transient_closed_form(hessian, noise, lr, steps)
        rows.append(("digits, H, transient", 0.0, steps, dynamics.flatness(hessian, sigma), None, None))
        sigma = dynamics.transient_closed_form(damped, noise, lr, steps)
        rows.append(
            ("digits, Gauss-Newton + 0.001, transient", 0.0, steps, dynamics.flatness(outer, sigma), None, None)
        )
    step = dynamics.transient_covariance(hessian, noise, lr, 10)
    closed = dynamics.transient_closed_form(hessian, noise, lr, 10)
    gap = float(np.linalg.norm(step - closed) / np.linalg.norm(step))
    refused = not dynamics.is_stable(hessian, lr)
    findings = [
        measured("the trained net's H has a negative eigenvalue, so no stationary covariance", lowest, at_most=-1e-12,
                 label="lowest eigenvalue"),
        Finding("a stationary covariance for that H does not exist", refused, False),
        measured("transient for indefinite H, closed form against recursion", gap, at_most=1e-8),
    ]  # fmt: skip
    return rows, findings
