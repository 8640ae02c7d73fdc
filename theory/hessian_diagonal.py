"""The Hessian diagonal of a mean loss over N samples: E[9], E[32], E[33] = E[7], and the exact form.

A parameter of neuron i in layer l has c_k = h_j^(l-1) or 1 (E[21]), so with the second derivative Q_i^(l)
of the loss in z_i^(l) its entry is the mean over samples of c_k² Q_i. Q splits as E[9] does: the
Gauss-Newton part Σ J ∇²ℓ J (δ² for the paper's scalar), always exact here, and the functional part D, in
the paper's or in the exact form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from theory._refusals import refuse
from theory.losses import Loss, LossDerivatives
from theory.net import Net, Trace, run
from theory.path_expansion import Curvatures, exact_recursion, paper_recursion, path_sum


@dataclass(frozen=True)
class Entries:
    """Diagonal entries for every W^(l) (shaped like it) and every b^(l) (None where the net has none)."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    def vector(self) -> Tensor:
        """All entries in one vector, W^(1), b^(1), W^(2), ..."""
        parts = [t for pair in zip(self.weights, self.biases) for t in pair if t is not None]
        return torch.cat([t.reshape(-1) for t in parts])


@dataclass(frozen=True)
class HessianDiagonal:
    """E[9]: entries = Gauss-Newton part + functional part."""

    gauss_newton: Entries
    functional: Entries

    @property
    def total(self) -> Entries:
        """The diagonal itself."""
        a, b = self.gauss_newton, self.functional
        biases = tuple(None if p is None or q is None else p + q for p, q in zip(a.biases, b.biases))
        return Entries(tuple(p + q for p, q in zip(a.weights, b.weights)), biases)


def _derivatives(loss: Loss | LossDerivatives, outputs: Tensor) -> LossDerivatives:
    found = loss if isinstance(loss, LossDerivatives) else loss(outputs)
    n, c = outputs.shape
    if found.gradient.shape != (n, c) or found.hessian.shape != (n, c, c):
        refuse(
            f"loss derivatives {tuple(found.gradient.shape)}, {tuple(found.hessian.shape)} "
            f"do not fit {n} samples and {c} outputs"
        )
    return found


def entries(net: Net, trace: Trace, second: tuple[Tensor, ...]) -> Entries:
    """Mean over samples of c_k² Q_i for Q^(1), ..., Q^(L) in `second`, each [N, n_l] (E[21], E[23])."""
    n = len(trace.outputs)
    weights = tuple(q.T @ trace.h[l] ** 2 / n for l, q in enumerate(second))
    biases = tuple(None if b is None else q.mean(0) for b, q in zip(net.biases, second))
    return Entries(weights, biases)


def gauss_newton(net: Net, x: Tensor, loss: Loss | LossDerivatives) -> tuple[Tensor, ...]:
    """Σ_cc' J_ci ∇²ℓ_cc' J_c'i per neuron, [N, n_l] for l = 1..L, J = ∂f/∂z^(l): (δ_i)² for the paper's
    loss.
    """
    trace = run(net, x)
    hessian = _derivatives(loss, trace.outputs).hessian
    jacobian = torch.eye(trace.outputs.shape[1], dtype=x.dtype, device=x.device).expand_as(hessian)
    parts: list[Tensor] = []
    for l in range(net.depth, 0, -1):
        parts.insert(0, ((hessian @ jacobian) * jacobian).sum(1))
        if l > 1:
            jacobian = (jacobian @ net.weights[l - 1]) * trace.slope[l - 1].unsqueeze(1)
    return tuple(parts)


def _split(net: Net, x: Tensor, loss: LossDerivatives, d: Curvatures) -> HessianDiagonal:
    trace = run(net, x)
    functional = (*d.values, torch.zeros_like(trace.outputs))  # the output layer is linear: D^(L) = 0
    return HessianDiagonal(entries(net, trace, gauss_newton(net, x, loss)), entries(net, trace, functional))


def exact_hessian_diagonal(net: Net, x: Tensor, loss: Loss | LossDerivatives) -> HessianDiagonal:
    """The exact diagonal, by the matrix recursion weighted with g = ∂ℓ/∂f."""
    values = _derivatives(loss, run(net, x).outputs)
    return _split(net, x, values, exact_recursion(net, x, cotangent=values.gradient))


def paper_hessian_diagonal(net: Net, x: Tensor, loss: Loss | LossDerivatives, *, form: str = "E32") -> HessianDiagonal:
    """E[32] (recursion), or E[33], which is E[7] (`form="E33"`: explicit paths); g in place of f - y for
    any loss.
    """
    if form not in ("E32", "E33"):
        refuse(f"form {form!r} is unknown; give 'E32' (recursion) or 'E33' (paths, the same as E[7])")
    values = _derivatives(loss, run(net, x).outputs)
    expand = paper_recursion if form == "E32" else path_sum
    return _split(net, x, values, expand(net, x, cotangent=values.gradient))


def started_from_loss(net: Net, x: Tensor, loss: Loss | LossDerivatives) -> Entries:
    """The diagonal recursion started from D^(L) = diag ∇²ℓ (Becker & LeCun 1989): no exact Gauss-Newton part.

    Worse than `paper_hessian_diagonal`: exact in the top hidden layer only where ∇²ℓ is diagonal, in none
    for softmax.
    """
    trace = run(net, x)
    values = _derivatives(loss, trace.outputs)
    start = values.hessian.diagonal(dim1=1, dim2=2)
    d = paper_recursion(net, x, cotangent=values.gradient, start=start)
    return entries(net, trace, (*d.values, start))
