"""D_i^(l) = ∂δ_i^(l)/∂z_i^(l) in the paper's form and in the exact form, batched over samples.

In all of it g is the cotangent of the outputs, δ^(L) = g: g = 1 for the paper's scalar f (then D belongs
to f), or g = ∂ℓ/∂f for any loss (then D belongs to Σ_c g_c f_c, the functional part of the loss's
Hessian). The base D^(L) = 0 carries no loss curvature; `start` changes that.

    paper                                              exact
    `paper_recursion`  E[28], E[30]                    `exact_recursion`  diag H, H = diag(σ''S) + σ'WᵀH⁺Wσ'
    `path_sum`         E[31], one path at a time       `pair_sum`         pairs of paths with common ends
                                                       `site_sum`         Σ σ'' S (∂z_j^r/∂z_i^l)²

The two agree for l >= L-2 on every net; for all l where no two paths join the same two hidden neurons
(`theory.net.most_paths`) or σ is linear; and for no net in general, since E[27] drops the pairs of
different paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from theory._refusals import refuse
from theory.net import Net, Trace, run

LARGEST = 2**27
"""Elements an explicit enumeration may hold at once (1 GiB in float64)."""


@dataclass(frozen=True)
class Curvatures:
    """D^(1), ..., D^(L-1), each [N, n_l], for the hidden layers; `layer(l)` counts as the paper does."""

    values: tuple[Tensor, ...]

    def layer(self, l: int) -> Tensor:
        """D^(l), 1 <= l <= L-1."""
        if not 1 <= l <= len(self.values):
            refuse(f"layer {l} is no hidden layer; 1 to {len(self.values)} are")
        return self.values[l - 1]


def cotangents(net: Net, trace: Trace, g: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """δ^(l) and S^(l), E[20], E[28], for l = 0..L (S^(L) unused and empty; δ^(0) = S^(0) = Σ_t δ_t W_t)."""
    f = trace.outputs
    if g is None:
        if f.shape[1] != 1:
            refuse(f"a net with {f.shape[1]} outputs needs cotangent = dloss/doutputs of shape {tuple(f.shape)}")
        g = torch.ones_like(f)
    if g.shape != f.shape or g.dtype != f.dtype:
        refuse(f"cotangent is {tuple(g.shape)} {g.dtype}; the outputs are {tuple(f.shape)} {f.dtype}")
    delta, s = [g], [g.new_zeros(0)]
    for l in range(net.depth - 1, -1, -1):
        s.insert(0, delta[0] @ net.weights[l])
        delta.insert(0, trace.slope[l] * s[0])
    return tuple(delta), tuple(s)


def paper_recursion(
    net: Net, x: Tensor, *, cotangent: Tensor | None = None, start: Tensor | None = None, form: str = "E28"
) -> Curvatures:
    """E[28]: D = σ''S + σ'² Σ_t D_t W_ti², from D^(L) = `start` (zero, as the paper has it).

    `form="E30"` writes S as δ/σ' (E[29]) and refuses where σ' is 0, since E[30] is then 0/0.
    """
    if form not in ("E28", "E30"):
        refuse(f"form {form!r} is unknown; give 'E28' (with S) or 'E30' (with δ/σ')")
    trace = run(net, x)
    delta, s = cotangents(net, trace, cotangent)
    d = torch.zeros_like(trace.outputs) if start is None else start
    if d.shape != trace.outputs.shape:
        refuse(f"start is {tuple(d.shape)}; D^(L) has the shape of the outputs, {tuple(trace.outputs.shape)}")
    values: list[Tensor] = []
    for l in range(net.depth - 1, 0, -1):
        slope = trace.slope[l]
        if form == "E30" and bool((slope == 0).any()):
            refuse(f"sigma' vanishes in layer {l}: E[30] is 0/0 there; use form='E28'", error="NonFiniteError")
        own = s[l] if form == "E28" else delta[l] / slope
        d = trace.curvature[l] * own + slope**2 * (d @ net.weights[l] ** 2)
        values.insert(0, d)
    return Curvatures(tuple(values))


def hessian_matrices(
    net: Net, x: Tensor, *, cotangent: Tensor | None = None, start: Tensor | None = None, lowest: int = 1
) -> tuple[Tensor, ...]:
    """H^(l) = ∂²(g·f)/∂z^(l)∂z^(l), [N, n_l, n_l] for l = `lowest`..L-1, from H^(L) = `start` (zero, or
    ∇²ℓ).
    """
    trace = run(net, x)
    _, s = cotangents(net, trace, cotangent)
    n, c = trace.outputs.shape
    h = trace.outputs.new_zeros(n, c, c) if start is None else start
    if h.shape != (n, c, c):
        refuse(f"start is {tuple(h.shape)}; the loss Hessian of {n} samples, {c} outputs is {(n, c, c)}")
    matrices: list[Tensor] = []
    for l in range(net.depth - 1, lowest - 1, -1):
        w, slope = net.weights[l], trace.slope[l]
        h = (w.T @ h @ w) * slope.unsqueeze(1) * slope.unsqueeze(2) + torch.diag_embed(trace.curvature[l] * s[l])
        matrices.insert(0, h)
    return tuple(matrices)


def exact_recursion(net: Net, x: Tensor, *, cotangent: Tensor | None = None, start: Tensor | None = None) -> Curvatures:
    """D^(l) = diag H^(l), exactly; with `start` = ∇²ℓ [N, C, C] the Gauss-Newton part is included.

    The first hidden layer needs the diagonal of its H alone, so no n_1 × n_1 matrix is formed.
    """
    trace = run(net, x)
    if net.depth == 1:
        return Curvatures(())
    above = hessian_matrices(net, x, cotangent=cotangent, start=start, lowest=2)
    _, s = cotangents(net, trace, cotangent)
    values = [h.diagonal(dim1=1, dim2=2) for h in above]
    w, slope, own = net.weights[1], trace.slope[1], trace.curvature[1] * s[1]
    upper = above[0] if above else start
    if upper is not None:
        own = own + slope**2 * ((upper @ w) * w).sum(1)
    return Curvatures((own, *values))


def site_sum(net: Net, x: Tensor, *, cotangent: Tensor | None = None) -> Curvatures:
    """Exact, one site at a time: D_i^(l) = Σ_{r>=l} Σ_j σ''(z_j^r) S_j^r (∂z_j^r/∂z_i^l)²."""
    trace = run(net, x)
    _, s = cotangents(net, trace, cotangent)
    values = []
    for l in range(1, net.depth):
        total = trace.curvature[l] * s[l]
        jacobian = torch.eye(net.widths[l], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        for r in range(l + 1, net.depth):
            jacobian = net.weights[r - 1] @ (trace.slope[r - 1].unsqueeze(2) * jacobian)
            total = total + ((trace.curvature[r] * s[r]).unsqueeze(2) * jacobian**2).sum(1)
        values.append(total)
    return Curvatures(tuple(values))


def _gains(net: Net, trace: Trace, l: int, r: int, copies: int) -> Tensor:
    """Π σ'W along every path (l,i) -> (r,j), enumerated: [N, n_l, paths between, n_r]."""
    widths = net.widths[l : r + 1]
    between = math.prod(widths[1:-1])
    size = len(trace.outputs) * widths[0] * widths[-1] * between**copies
    if size > LARGEST:
        refuse(
            f"the paths from layer {l} to layer {r} need {size:,} numbers, {LARGEST:,} are allowed; "
            "use paper_recursion or exact_recursion, or fewer samples",
            error="BudgetError",
        )
    grid = torch.cartesian_prod(*(torch.arange(n, device=trace.outputs.device) for n in widths)).reshape(-1, r - l + 1)
    gain = trace.outputs.new_ones(len(trace.outputs), len(grid))
    for step in range(r - l):
        source, to = grid[:, step], grid[:, step + 1]
        gain = gain * trace.slope[l + step][:, source] * net.weights[l + step][to, source]
    return gain.reshape(len(gain), widths[0], between, widths[-1])


def _bends(net: Net, l: int) -> Iterator[int]:
    yield from range(l + 1, net.depth)


def path_sum(net: Net, x: Tensor, *, cotangent: Tensor | None = None) -> Curvatures:
    """E[31] as printed, path by path: Σ_r Σ_{P: (l,i)->(r,j)} σ'' S Π σ'² W². Equal to `paper_recursion`."""
    trace = run(net, x)
    _, s = cotangents(net, trace, cotangent)
    values = []
    for l in range(1, net.depth):
        total = trace.curvature[l] * s[l]
        for r in _bends(net, l):
            squares = _gains(net, trace, l, r, 1) ** 2
            total = total + torch.einsum("nipj,nj->ni", squares, trace.curvature[r] * s[r])
        values.append(total)
    return Curvatures(tuple(values))


def pair_sum(net: Net, x: Tensor, *, cotangent: Tensor | None = None, pairs: str = "all") -> Curvatures:
    """Σ over ordered pairs of paths with common ends, enumerated: `pairs` "all" (exact), "equal" (E[31]),
    "different".

    "different" is exactly what the paper's form leaves out.
    """
    if pairs not in ("all", "equal", "different"):
        refuse(f"pairs = {pairs!r} is unknown; give 'all', 'equal' or 'different'")
    trace = run(net, x)
    _, s = cotangents(net, trace, cotangent)
    values = []
    for l in range(1, net.depth):
        total = trace.curvature[l] * s[l] if pairs != "different" else torch.zeros_like(trace.z[l])
        for r in _bends(net, l):
            gain = _gains(net, trace, l, r, 2)
            product = gain.unsqueeze(3) * gain.unsqueeze(2)  # [N, n_l, P, Q, n_r]
            same = torch.eye(gain.shape[2], dtype=torch.bool, device=gain.device)[:, :, None]
            if pairs != "all":
                product = product * (same if pairs == "equal" else ~same)
            total = total + torch.einsum("nipqj,nj->ni", product, trace.curvature[r] * s[r])
        values.append(total)
    return Curvatures(tuple(values))
