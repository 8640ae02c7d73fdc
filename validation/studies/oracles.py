"""Two other libraries as oracles: PyHessian (trace, top eigenvalue) and BackPACK (diagonal of chains).

Each is skipped with a reason where it is not installed. PyHessian 0.1 draws from torch's global generator, which is
forked here, and its density calls torch.eig, which torch no longer has.
"""

from __future__ import annotations

import importlib
import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from hessdiag.problem.objective import Objective
from validation.bridge import deviation, engine_diagonal, full_hessian, vector
from validation.evidence import Figure, Finding, measured
from validation.register import Run
from validation.studies.base import Cell, Study, study
from validation.studies.gauss_newton import build, digits, train

Row = tuple[Cell, ...]


def missing(name: str) -> str:
    """Why a library cannot be used, empty if it can; a library without one of its own dependencies cannot."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} is skipped: {error}"
    return ""


def pyhessian(model: nn.Module, x: Tensor, y: Tensor, label: str, probes: int) -> tuple[list[Row], list[Finding], str]:
    """Trace (z-test on its own probes, false alarms 1 in 10,000) and largest eigenvalue of one batch's Hessian."""
    from pyhessian import hessian

    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            oracle = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
            drawn = torch.tensor(oracle.trace(maxIter=probes, tol=0.0), dtype=torch.float64)
            (largest,), _ = oracle.eigenvalues(maxIter=1000, tol=1e-9)
            try:
                oracle.density(iter=3, n_v=1)
                density = "density ran"
            except (RuntimeError, AttributeError) as failure:
                density = f"PyHessian's density fails: {str(failure).split('.')[0]}"
        finally:
            torch.set_default_dtype(before)
            model.zero_grad(set_to_none=True)
    ours = float(vector(engine_diagonal(model, x, y, "cross_entropy").total).sum())
    mean, error = float(drawn.mean()), float(drawn.std()) / math.sqrt(probes)
    z = abs(mean - ours) / error
    values = torch.linalg.eigvalsh(full_hessian(model, x, y, "cross_entropy"))
    top = float(values[values.abs().argmax()])
    gap = abs(largest - top) / abs(top)
    figure = Figure("z", z, 0.0, 3.9, "allowed")
    findings = [
        Finding(f"{label}: PyHessian's trace agrees with the engine's", z < 3.9, False, figure=figure),
        measured(f"{label}: PyHessian's top eigenvalue is the full Hessian's", gap, at_most=1e-3, label="deviation"),
    ]
    rows: list[Row] = [
        (label, "PyHessian trace", ours, mean, error),
        (label, "PyHessian top eigenvalue", top, float(largest), None),
    ]
    return rows, findings, density


def backpack(widths: tuple[int, ...], activation: type[nn.Module], seed: int) -> tuple[list[Row], list[Finding]]:
    """DiagHessian and DiagGGNExact of a chain, entry by entry."""
    from backpack import backpack as passes
    from backpack import extend
    from backpack.extensions import DiagGGNExact, DiagHessian

    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / p.shape[-1] ** 0.5)
    x = torch.randn(8, widths[0], generator=g, dtype=torch.float64)
    y = torch.randint(widths[-1], (8,), generator=g)
    ours = engine_diagonal(model, x, y, "cross_entropy")
    model, criterion = extend(model), extend(nn.CrossEntropyLoss())
    with passes(DiagHessian(), DiagGGNExact()):
        criterion(model(x), y).backward()
    theirs = torch.cat([p.diag_h.reshape(-1) for p in model.parameters()])
    outer = torch.cat([p.diag_ggn_exact.reshape(-1) for p in model.parameters()])
    label = f"chain {'-'.join(map(str, widths))}, {activation.__name__}"
    total, split = deviation(vector(ours.total), theirs), deviation(vector(ours.gauss_newton), outer)
    findings = [
        measured(f"{label}: BackPACK's DiagHessian", total, at_most=1e-10, label="deviation"),
        measured(f"{label}: BackPACK's DiagGGNExact", split, at_most=1e-10, label="deviation"),
    ]
    norm = float(vector(ours.total).norm())
    return [(label, "BackPACK ‖diag H‖", norm, float(theirs.norm()), None)], findings


@study("oracles")
def run(options: Run) -> Study:
    """Both oracles, each where it applies."""
    rows: list[Row] = []
    findings: list[Finding] = []
    notes: list[str] = []
    if not missing("pyhessian"):
        x, y = digits(400)
        kinds = (("conv", 14.0),) if options.quick else (("mlp", 14.0), ("conv", 14.0))
        for kind, alpha in kinds:
            model = train(build(kind, alpha), "cross_entropy", 40, x, y, seed=0)
            Objective(model)  # refuses what cannot be measured before the oracle is asked
            more, found, density = pyhessian(model, x[:16], y[:16], kind, 100 if options.quick else 600)
            rows += more
            findings += found
            notes = [f"{density}; its trace and eigenvalues are used."]
    else:
        notes.append(missing("pyhessian"))
    if not missing("backpack"):
        for widths, activation, seed in (((6, 8, 8, 3), nn.Tanh, 0), ((6, 8, 8, 8, 8, 3), nn.Sigmoid, 1)):
            more, found = backpack(widths, activation, seed)
            rows += more
            findings += found
        notes.append("BackPACK covers chains of linear layers with activations it knows; RCT-AF is none of them.")
    else:
        notes.append(missing("backpack"))
    columns = ("model", "quantity", "here", "oracle", "oracle's standard error")
    return Study(
        "oracles", "Independent oracles: PyHessian and BackPACK", columns, tuple(rows), tuple(findings), tuple(notes)
    )
