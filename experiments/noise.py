"""The noise of a training step and what the loss's curvature makes of it (after Xu & Zhang, arXiv 2410.07719).

With g_b the gradient of a batch of B samples and C = Cov(g_b), one step of rate η spreads the weights by Σ = η² C, and
the loss rises by ½ tr(HΣ) = ½ η² tr(HC) for it: the first term of the covariance's growth, whatever H's signs. K
batches that share no sample give, with Q_ij = g_i·H g_j,

    T = (tr Q - 1ᵀQ1/K)/(K - 1),      E T = tr(HC),

without bias if H is of other samples; over all ways to deal given samples into batches the mean of T is tr(HS)/B
exactly, S the covariance of single gradients with N - 1 below. tr(C) is the same with the identity in the place of H.
The interval is the jackknife's over batches, with t of K - 1 degrees of freedom. BatchNorm uses its running statistics:
with those of the batch a loss is no mean over samples.

At rest in a quadratic bowl, with momentum μ, direction by direction (`theory.dynamics.stationary_variance`)

    ½ tr(HΣ) = Σ_i η c_i (1 + μ) / (2 (1 - μ) (2(1 + μ) - η h_i)) = η tr(C) / (4 (1 - μ)) (1 + O(ηh)),

h_i > 0 the eigenvalues of H, c_i the noise along them: to first order H is not in it. The trace of the Gauss-Newton
part G = Σ_n J_nᵀ B_n B_nᵀ J_n / N is the mean of |Σ_n J_nᵀ B_n s_n|² / N over random signs s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from hessdiag.data import DataSet
from hessdiag.errors import ConfigurationError, EmptyDataError
from hessdiag.kernels.products import Products
from hessdiag.problem.handing_back import as_it_was
from hessdiag.problem.objective import Objective
from hessdiag.signs import Signs, cpu_generator

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Spread:
    """An estimate with its standard error and interval."""

    value: float
    error: float
    low: float
    high: float

    def times(self, factor: float) -> Spread:
        """The same of a multiple that is not negative."""
        return Spread(*(factor * value for value in vars(self).values()))


@dataclass(frozen=True)
class Noise:
    """tr(C) and tr(HC) of batches of `batch_size`, from so many of them."""

    trace: Spread
    curved: Spread
    batches: int
    batch_size: int

    def half_trace(self, lr: float) -> Spread:
        """½ tr(HΣ) for the noise of one step, Σ = lr² C."""
        return self.curved.times(0.5 * lr**2)

    def at_rest(self, lr: float, momentum: float) -> Spread:
        """½ tr(HΣ) for the Σ at which SGD comes to rest in a bowl, to first order in lr: lr tr(C) / (4 (1 - μ))."""
        return self.trace.times(lr / (4 * (1 - momentum)))


def dealt(data: DataSet, samples: int, batches: int, batch_size: int, *, seed: int = 0) -> tuple[DataSet, DataSet]:
    """Samples for the curvature, and others, in a random order, for so many batches."""
    wanted = samples + batches * batch_size
    if wanted > len(data):
        raise ConfigurationError(
            f"{data.name} holds {len(data)} samples; {samples} for the curvature and {batches} batches of {batch_size} "
            f"need {wanted}: fewer batches"
        )
    order = torch.randperm(len(data), generator=cpu_generator(seed))
    one, other = order[:samples], order[samples:wanted]
    return tuple(replace(data, inputs=data.inputs[rows], targets=data.targets[rows]) for rows in (one, other))  # type: ignore[return-value]


def noise(objective: Objective, measured: Batches, minibatches: Batches, *, confidence: float = 0.95) -> Noise:
    """The noise of `minibatches` (of one size, without a common sample) and its curvature on the samples `measured`."""
    with as_it_was(objective.model):
        objective.check_modes()
        rows, size = _gradients(objective, minibatches)
        rows -= rows.mean(0)
        return Noise(
            trace=from_products(rows.double() @ rows.double().T, confidence),
            curved=from_products(_products(objective, measured, rows), confidence),
            batches=len(rows),
            batch_size=size,
        )


def from_products(products: Tensor, confidence: float = 0.95) -> Spread:
    """T of the products Q [K, K], with its jackknife over batches."""
    count = len(products)
    if count < 3:
        raise ConfigurationError(f"{count} batches: at least 3 say something of their spread")
    q = 0.5 * (products + products.T).double()
    trace, total = q.diagonal().sum(), q.sum()
    value = float((trace - total / count) / (count - 1))
    left = trace - q.diagonal()
    rest = total - 2 * q.sum(1) + q.diagonal()
    without = (left - rest / (count - 1)) / (count - 2)
    error = float(((count - 1) / count * (without - without.mean()).square().sum()).sqrt())
    half = float(student.ppf(0.5 + confidence / 2, count - 1)) * error
    return Spread(value, error, value - half, value + half)


def gauss_newton_trace(
    objective: Objective, measured: Batches, *, replicates: int = 16, seed: int = 0, confidence: float = 0.95
) -> Spread:
    """tr(G) of the mean loss over the samples measured, with Student's interval over so many replicates of signs."""
    if replicates < 2:
        raise ConfigurationError(f"{replicates} replicates: at least 2 say something of their spread")
    with as_it_was(objective.model):
        objective.check_modes()
        values, weight, seen = torch.zeros(replicates, dtype=torch.float64), 0.0, 0
        parameters, signs = list(objective.parameters.values()), Signs(seed)
        for index, batch in enumerate(measured):
            inputs, targets = objective.check_batch(batch, index)
            with torch.enable_grad():
                outputs = objective.outputs(inputs, targets, index=index)
            curvature = objective.loss.curvature(outputs, targets)
            if bool((curvature.signs < 0).any()):
                raise ConfigurationError(f"loss {objective.loss.name!r} is not convex in the outputs: G is no square")
            shape = torch.Size((len(targets), curvature.columns.count))
            weight += float(objective.loss.weights(outputs.detach(), targets).sum())
            for replicate in range(replicates):
                drawn = signs.samples(shape, seen, replicate, dtype=torch.float64).T.to(outputs.device)
                mixed = curvature.columns.combined(drawn).to(outputs.dtype).reshape(outputs.shape)
                found = torch.autograd.grad(outputs, parameters, mixed, retain_graph=True, allow_unused=True)
                values[replicate] += sum(float(part.double().square().sum()) for part in found if part is not None)
            seen += len(targets)
    if not weight:
        raise EmptyDataError("no samples to measure the trace on")
    values /= weight
    error = float(values.std() / replicates**0.5)
    half = float(student.ppf(0.5 + confidence / 2, replicates - 1)) * error
    return Spread(float(values.mean()), error, float(values.mean()) - half, float(values.mean()) + half)


def _gradients(objective: Objective, minibatches: Batches) -> tuple[Tensor, int]:
    """The gradient of each batch's mean loss, [K, p], and the batch size."""
    rows, sizes = [], []
    parameters = list(objective.parameters.values())
    for index, batch in enumerate(minibatches):
        inputs, targets = objective.check_batch(batch, index)
        with torch.enable_grad():
            loss, weight = objective.summed_loss(inputs, targets, index=index)
            found = torch.autograd.grad(loss / float(weight), parameters, allow_unused=True)
        rows.append(torch.cat([_flat(g, p) for g, p in zip(found, parameters)]))
        sizes.append(len(targets))
    if len(set(sizes)) > 1:
        raise ConfigurationError(f"batches of {min(sizes)} and of {max(sizes)} samples: the noise is that of one size")
    if not rows:
        raise EmptyDataError("no batches to take the noise of")
    return torch.stack(rows), sizes[0]


def _products(objective: Objective, measured: Batches, rows: Tensor) -> Tensor:
    """g_i·H g_j, [K, K], H of the mean loss over the samples measured (and of weight decay)."""
    parameters = objective.parameters
    sizes = [p.numel() for p in parameters.values()]
    sums = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    weight = 0.0
    for index, batch in enumerate(measured):
        inputs, targets = objective.check_batch(batch, index)
        products = Products(objective, inputs, targets, index=index, parts=False)
        weight += products.weight
        for column, row in enumerate(rows):
            parts = zip(parameters.items(), torch.split(row, sizes))
            found: Any = products.hessian({name: part.reshape(p.shape) for (name, p), part in parts})
            turned = torch.cat([_flat(found[name], p) for name, p in parameters.items()])
            sums[:, column] += rows.double() @ turned.double()
    if not weight:
        raise EmptyDataError("no samples to measure the curvature on")
    return sums / weight + objective.l2 * (rows.double() @ rows.double().T)


def _flat(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like).flatten() if value is None else value.detach().flatten()
