"""The share of single layers by products of the Hessian with random vectors at their outputs, sample by sample.

A signed pass squares sums over all sites above a layer: its noise is that of |c_j| summed, whatever cancels in c_j. A
product's is that of one row of the Hessian. Where few parameters have by far the longest rows - a table started at 0.02
below a LayerNorm, whose slope is one over the size of what it is given - the product is the quieter of the two.

For a layer a = J theta, J_n that of sample n, and H_n the Hessian of that sample's loss in a,

    H_kk = sum_n E[ (J_n^T v)_k (J_n^T H_n v)_k ],   E[v v^T] = I on the range of J_n,

v drawn for every sample by itself, though one product serves all samples, since these do not meet: that is what
Hutchinson's own products, with one vector for the parameters of all samples, cannot do. Every such share holds the
Gauss-Newton part, too.

With Q_n an orthonormal basis of few directions (those of H_n times random vectors) and P = I - Q Q^T,

    H = Q Q^T H + H Q Q^T - Q (Q^T H Q) Q^T + P H P:

all but the last is taken exactly, once, in two products a direction, and v becomes P v (after Hutch++: R. A. Meyer,
C. Musco, C. Musco and D. P. Woodruff, 2021).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError
from hessdiag.graph import LayerKind, Linearisation
from hessdiag.kernels.deflation import orthonormal
from hessdiag.kernels.products import once_more
from hessdiag.kernels.tensors import Tensors, accumulate_new
from hessdiag.signs import Signs

PROBES, FOUND = 3, 4  # streams of signs


class Probes:
    """Some layers of one linearised batch, by their place: `counts[place]` products a replicate."""

    def __init__(
        self, batch: Linearisation, squares: Mapping[int, LayerKind], counts: Mapping[int, int], *, start: int
    ) -> None:
        self.batch, self.counts, self.start = batch, dict(counts), start
        self.squares = squares
        self.basis: dict[int, Tensor] = {}
        """By layer [samples, directions, entries of its output], orthonormal: what `find` found."""
        self._edges = {place: squares[place].layer.edge for place in counts}
        self._gradients: dict[int, Tensor] = {}
        if counts:
            with once_more():
                self._gradients = dict(zip(counts, batch.gradients(list(self._edges.values()))))

    def check(self, signs: Signs) -> None:
        """Refuse a layer whose output does not hold the samples in order along its first axis, by two products."""
        half = torch.arange(self.batch.samples) < (self.batch.samples + 1) // 2
        for place, gradient in self._gradients.items():
            v = self._vector(place, signs, FOUND, 0)
            kept = half.to(v)[:, None]
            whole, part = (self._flat(self._hessian(place, u)) for u in (v, self._shaped(place, self._flat(v) * kept)))
            if float((part - whole * kept).norm()) > torch.finfo(gradient.dtype).eps ** 0.5 * float(whole.norm()):
                raise UncoveredModelError(
                    f"{self.squares[place].layer.name!r}: between it and the loss the samples do not stay in order "
                    "along the first axis, so no product belongs to one sample; give a plan without probes"
                )

    def find(self, signs: Signs, rank: int) -> None:
        """So many directions per sample and layer, for `replicate` to leave out."""
        for place in self.counts:
            rows = [self._hessian(place, self._vector(place, signs, FOUND, number)) for number in range(rank)]
            basis = [torch.stack([self.squares[place].onto(row).reshape(self.batch.samples, -1) for row in rows], 1)]
            for _ in range(2):  # twice, since squared condition numbers cost half the digits
                basis = orthonormal(basis, None)
            self.basis[place] = basis[0]

    def along(self) -> Tensors:
        """What the directions give: exact."""
        out: Tensors = {}
        for place, basis in self.basis.items():
            turned = torch.stack([self._flat(self._hessian(place, self._shaped(place, q))) for q in basis.unbind(1)], 1)
            inner = turned @ basis.transpose(1, 2)  # [samples, i, j]: q_i H q_j
            right = 2.0 * turned - inner @ basis
            for q, h in zip(basis.unbind(1), right.unbind(1)):
                self._product(place, self._shaped(place, q), self._shaped(place, h), out)
        return out

    def replicate(self, signs: Signs, replicate: int) -> Tensors:
        """One unbiased replicate of the layers' whole diagonals beyond `along`."""
        out: Tensors = {}
        for place, count in self.counts.items():
            for number in range(count):
                v = self._vector(place, signs, PROBES, replicate, number)
                accumulate_new(out, self.beyond(place, v), 1.0 / count)
        return out

    def beyond(self, place: int, v: Tensor) -> Tensors:
        """The same of one layer for a given vector on its output; summed over all unit vectors it is exact."""
        basis = self.basis.get(place)
        v = self.squares[place].onto(v)
        if basis is not None:
            v = self._across(place, basis, v)
        h = self._hessian(place, v)
        out: Tensors = {}
        self._product(place, v, h if basis is None else self._across(place, basis, h), out)
        return out

    def _vector(self, place: int, signs: Signs, *parts: int) -> Tensor:
        """Signs on the layer's output."""
        gradient, samples = self._gradients[place], self.batch.samples
        shape = torch.Size((samples, gradient.numel() // samples))
        return self._shaped(place, signs.samples(shape, self.start, *parts, place, dtype=gradient.dtype))

    def _hessian(self, place: int, v: Tensor) -> Tensor:
        """H v at the layer's output, every sample's own."""
        gradient = self._gradients[place]
        if not gradient.requires_grad:
            return torch.zeros_like(v)
        with once_more():
            found = torch.autograd.grad([gradient], [self._edges[place]], [v], retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(v) if found is None else found.detach()

    def _across(self, place: int, basis: Tensor, v: Tensor) -> Tensor:
        flat = self._flat(v)
        return self._shaped(place, flat - ((basis @ flat[:, :, None]).transpose(1, 2) @ basis)[:, 0])

    def _product(self, place: int, left: Tensor, right: Tensor, out: Tensors) -> None:
        """Add sum_n (J_n^T left)(J_n^T right), as a difference of squares of halves of one size."""
        sizes = [torch.linalg.vector_norm(self._flat(t), dim=1) for t in (left, right)]
        lam = torch.where(sizes[0] * sizes[1] > 0, sizes[1] / sizes[0], 1.0).sqrt()
        lam = lam.nan_to_num(1.0, 1.0, 1.0).reshape(-1, 1)
        a, b = self._flat(left) * lam, self._flat(right) / lam
        for sign in (1.0, -1.0):
            accumulate_new(out, self.squares[place].summed(self._shaped(place, (a + sign * b) / 2.0)), sign)

    def _flat(self, t: Tensor) -> Tensor:
        return t.reshape(self.batch.samples, -1)

    def _shaped(self, place: int, t: Tensor) -> Tensor:
        return t.reshape(self.squares[place].out)
