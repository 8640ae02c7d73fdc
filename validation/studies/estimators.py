"""Estimators against their formulas: variance of Hutchinson and of propagation, bias of the plug-in norm, coverage.

Every comparison is a z-test on a seeded sample: |z| < 4 per test. For sums of squares the standard error comes from the
sample itself. Each z alone raises a false alarm in 1 of 16,000 runs if its statistic is normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.graph import Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.methods.hutchinson import probe
from hessdiag.norm import Replicates, estimate
from hessdiag.norm.report import plug_in_square
from hessdiag.problem.objective import Objective
from hessdiag.signs import Signs
from theory.estimators import (
    coverage_of_normal_quantile,
    hutchinson_variance,
    plug_in_bias,
    propagation_estimate_variance,
    unbiased_variance,
)
from validation.bridge import full_hessian, rct_spec, vector
from validation.evidence import Figure, Finding, measured
from validation.register import Run
from validation.studies.base import Cell, Study, study

LIMIT = 4.0


@dataclass(frozen=True)
class Case:
    """A small trained-like MLP with one batch."""

    model: nn.Module
    x: Tensor
    y: Tensor


def case() -> Case:
    """Three hidden layers, so that remote sites exist; p = 115."""
    model = hd.networks.build(
        "mlp", activation=rct_spec(7.0, 1), num_classes=3, in_features=4, widths=(5, 5, 5), seed=3
    )
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(6, 4, generator=g, dtype=torch.float64), torch.randint(3, (6,), generator=g)
    return Case(model.double().eval(), x, y)


def hutchinson_draws(c: Case, count: int, *, seed: int = 0) -> Tensor:
    """Replicates of the engine's Hutchinson estimate of the mean loss, [count, p]."""
    objective = Objective(c.model)
    products, signs = Products(objective, c.x, c.y, parts=False), Signs(seed)
    rows = []
    for i in range(count):
        v = probe(objective, signs, i)
        hv = products.hessian(v)
        rows.append(vector({name: v[name] * hv[name] for name in v}) / products.weight)
    return torch.stack(rows)


def propagation_draws(c: Case, count: int, *, mixed: bool = False, seed: int = 0) -> Tensor:
    """Replicates of the engine's functional part without its direct share, [count, p]."""
    linear = Linearisation(Objective(c.model), c.x, c.y)
    groups = {layer.name: len(c.x) for layer in linear.layers} if mixed else None
    propagator, signs = Propagator(linear, groups=groups), Signs(seed)
    rows = [vector(propagator.functional(signs, i)) / linear.weight for i in range(count)]
    return torch.stack(rows)


def remote_weights(c: Case) -> tuple[Tensor, Tensor]:
    """√|c_j| ∂z_j/∂θ_k of the positive and the negative sites above a parameter's own layer, [N, sites, p].

    The own layer's sites are taken out of the signs by the engine (their share is exact), so they carry no weight here.
    """
    parameters = list(c.model.parameters())
    linears = [m for m in c.model.modules() if isinstance(m, nn.Linear)]
    activation = next(m for m in c.model.modules() if isinstance(m, hd.activations.RCTAF))
    positive, negative = [], []
    for n in range(len(c.x)):
        h, zs = c.x[n], []
        for linear in linears[:-1]:
            zs.append(linear(h))
            h = activation(zs[-1])
        outputs = linears[-1](h)
        gradient = torch.softmax(outputs, 0) - nn.functional.one_hot(c.y[n], len(outputs))
        plus, minus = [], []
        for layer, z in enumerate(zs):
            above = torch.autograd.grad((outputs * gradient.detach()).sum(), z, retain_graph=True)[0]
            slope = activation.d1(z.detach())
            weight = activation.d2(z.detach()) * torch.where(slope != 0, above / slope, torch.zeros_like(above))
            for j in range(len(z)):
                rows = torch.autograd.grad(z[j], parameters, retain_graph=True, materialize_grads=True)
                parts = [r.reshape(-1) * (i // 2 != layer) for i, r in enumerate(rows)]
                row = torch.cat(parts) * weight[j].abs().sqrt()
                zero = torch.zeros_like(row)
                plus.append(row if weight[j] > 0 else zero)
                minus.append(row if weight[j] < 0 else zero)
        positive.append(torch.stack(plus).detach())
        negative.append(torch.stack(minus).detach())
    return torch.stack(positive), torch.stack(negative)


def against(name: str, samples: Tensor, truth: float) -> tuple[tuple[Cell, ...], Finding]:
    """Mean of `samples` against `truth`, with the sample's own standard error."""
    mean, error = float(samples.mean()), float(samples.std()) / math.sqrt(len(samples))
    z = (mean - truth) / error
    row = (name, truth, mean, error, z)
    figure = Figure("z", z, -LIMIT, LIMIT, "allowed")
    return row, Finding(f"{name}: measured agrees with its formula", abs(z) < LIMIT, False, figure=figure)


def as_replicates(model: nn.Module, draws: Tensor, *, groups: int = 16) -> Replicates:
    """The engine's accumulator, filled with given draws."""
    like = {name: p.detach() for name, p in model.named_parameters()}
    found = Replicates(like, groups=groups)
    for i, row in enumerate(draws):
        parts, at = {}, 0
        for name, tensor in like.items():
            parts[name] = row[at : at + tensor.numel()].reshape(tensor.shape)
            at += tensor.numel()
        found.add(parts, i)
    return found


@study("estimators")
def run(options: Run) -> Study:
    """Variances, biases and coverage, measured on the engine's own estimators."""
    c = case()
    count = 600 if options.quick else 2000
    hessian = full_hessian(c.model, c.x, c.y, "cross_entropy").detach()
    diagonal = hessian.diagonal()
    rows, findings = [], []

    def compare(name: str, samples: Tensor, truth: float) -> None:
        row, finding = against(name, samples, truth)
        rows.append(row)
        findings.append(finding)

    draws = hutchinson_draws(c, count)
    spread = (draws - diagonal) ** 2
    compare("Hutchinson, total variance", spread.sum(1), float(hutchinson_variance(hessian).sum()))
    for m in (1, 5):
        means = draws[: count // m * m].reshape(-1, m, draws.shape[1]).mean(1)
        bias = (means**2).sum(1) - float((diagonal**2).sum())
        compare(f"plug-in ‖d‖², bias with {m} probes", bias, float(plug_in_bias(hessian, probes=m)))
    functional = _functional(c)
    for mixed in (False, True):
        signed = propagation_draws(c, count, mixed=mixed)
        formula = propagation_estimate_variance(*remote_weights(c), mixed=mixed)
        name = "samples mixed" if mixed else "per sample"
        compare(f"propagation ({name}), total variance", ((signed - functional) ** 2).sum(1), float(formula.sum()))
        compare(f"propagation ({name}), sum of entries", signed.sum(1), float(functional.sum()))
    rows_t, findings_t = _unbiased(c, draws, hessian)
    rows += rows_t
    findings += findings_t
    rows_c, findings_c = _coverage(c, draws, float((diagonal**2).sum()))
    columns = ("quantity", "formula", "measured", "standard error", "z")
    notes = (
        "Propagation takes a layer's own sites out of the signs; the variance is that of the remote sites.",
        f"Normal quantile with 4 replicates would cover {coverage_of_normal_quantile(4):.3f}, not 0.95.",
    )
    title = "Estimators: measured bias, variance and coverage against their formulas"
    return Study("estimators", title, columns, tuple(rows + rows_c), tuple(findings + findings_c), notes)


def _functional(c: Case) -> Tensor:
    """The functional part less its direct share: the mean of the signed replicates, exactly, from the weights."""
    positive, negative = remote_weights(c)
    return ((positive**2).sum((0, 1)) - (negative**2).sum((0, 1))) / len(c.x)


def _unbiased(c: Case, draws: Tensor, hessian: Tensor) -> tuple[list[tuple[Cell, ...]], list[Finding]]:
    """T of the engine over blocks of four replicates: mean ‖d‖², variance by the U-statistic's formula."""
    from theory.estimators import hutchinson_covariance

    diagonal, m = hessian.diagonal(), 4
    blocks = draws[: len(draws) // m * m].reshape(-1, m, draws.shape[1])[:400]
    values = torch.tensor([estimate(as_replicates(c.model, block)).total.square for block in blocks])
    truth = float((diagonal**2).sum())
    formula = float(unbiased_variance(diagonal, hutchinson_covariance(hessian), m))
    found = [
        against(f"unbiased T of the engine, mean ({m} replicates)", values, truth),
        against(f"unbiased T of the engine, variance ({m} replicates)", (values - truth) ** 2, formula),
    ]
    plug = plug_in_square(as_replicates(c.model, blocks[0]))
    gap = abs(plug / float((blocks[0].mean(0) ** 2).sum()) - 1)
    same = measured("the engine's plug-in square is ‖mean‖²", gap, at_most=1e-12, label="deviation")
    return [row for row, _ in found], [*(finding for _, finding in found), same]


def _coverage(c: Case, draws: Tensor, truth: float) -> tuple[list[tuple[Cell, ...]], list[Finding]]:
    """Share of the engine's intervals that hold ‖d‖², with its binomial error; 88% to 99% is what section 5 allows."""
    rows: list[tuple[Cell, ...]] = []
    findings = []
    for m in (10, 20):
        blocks = draws[: len(draws) // m * m].reshape(-1, m, draws.shape[1])
        inside = 0
        for block in blocks:
            found = estimate(as_replicates(c.model, block)).total
            inside += found.low <= math.sqrt(truth / block.shape[1]) <= found.high
        share = inside / len(blocks)
        error = math.sqrt(max(share * (1 - share), 0.25 / len(blocks)) / len(blocks))
        rows.append((f"coverage of 95% intervals, {m} replicates", 0.95, share, error, (share - 0.95) / error))
        low_allowed = 0.88 - 3 * error
        findings.append(measured(f"coverage with {m} replicates", share, at_least=low_allowed, label="share"))
    return rows, findings
