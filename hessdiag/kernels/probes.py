"""The share of single layers by products of the Hessian with random vectors at their outputs, sample by sample.

A signed pass squares sums over all sites above a layer: its noise is that of |c_j| summed, whatever cancels in c_j. A
product's is that of one row of the Hessian. Where few parameters have by far the longest rows - a table started at 0.02
below a LayerNorm, whose slope is one over the size of what it is given - the product is the quieter of the two.

For a layer a = J theta, J_n that of sample n, and H_n the Hessian of that sample's loss in a,

    H_kk = sum_n E[ (J_n^T v)_k (J_n^T H_n v)_k ],   E[v v^T] = I on the range of J_n,

v drawn for every sample by itself, though one product serves all samples, since these do not meet: that is what
Hutchinson's own products, with one vector for the parameters of all samples, cannot do. Layers whose outputs are
summands of one tensor - characters and their positions - share their products: v is on the outputs of all of them, and
H_n is their joint Hessian. Every such share holds the Gauss-Newton part. A table that is the head besides comes with
all of its mixed terms (hessdiag.kernels.tied).

With any Q_n and P = I - Q Q^T,

    H = Q Q^T H + H Q Q^T - Q (Q^T H Q) Q^T + P H P:

all but the last is taken exactly, once, and a product becomes (J_n^T v)(J_n^T P H P v) (after Hutch++: R. A. Meyer,
C. Musco, C. Musco and D. P. Woodruff, 2021). Q_n is an orthonormal basis of H v, H^2 v, ... for one random v, each held
against all before it (Lanczos): the products that find a direction are those which its exact share needs, and one
vector's Krylov space holds the largest eigenvalues of either sign early (R. A. Meyer, C. Musco and C. Musco, 2024). On
what H does not know - a key's bias - a direction says nothing then, and adds no noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.errors import UncoveredModelError
from hessdiag.graph import LayerKind, Linearisation
from hessdiag.kernels.products import once_more
from hessdiag.kernels.tensors import Tensors, accumulate_new
from hessdiag.kernels.tied import Tied
from hessdiag.signs import Signs

PROBES, FOUND = 3, 4  # streams of signs
DIRECTIONS = "directions at outputs"
"""Where a batch keeps what was found of them, by group, until their exact shares are taken: a pilot's serve again."""
CHUNK = 1 << 26
"""Bytes of vectors that are drawn at one time."""
AGAIN = 0.1
"""What is left of a unit vector beside the directions known, below which rounding asks for a second look."""
Group = tuple[int, ...]
"""Places of layers that share their products."""


class Probes:
    """Some layers of one linearised batch, by their place: `counts[place]` products a replicate."""

    def __init__(
        self,
        batch: Linearisation,
        squares: Mapping[int, LayerKind],
        counts: Mapping[int, int],
        *,
        start: int,
        tied: Mapping[int, Tied] | None = None,
    ) -> None:
        self.batch, self.counts, self.start = batch, dict(counts), start
        self.squares, self.tied = squares, dict(tied or {})
        self.groups: list[Group] = [
            group
            for count in sorted(set(counts.values()))
            for group in batch.together([place for place in counts if counts[place] == count])
        ]
        self.basis: dict[Group, Tensor] = {}
        """By group [samples, directions, entries of its outputs]: what `find` found."""
        self._turned: dict[Group, Tensor] = {}  # H times these, until `along` has been asked
        self._stretch = {place: squares[place].stretch() for place in counts}
        self._edges = {place: squares[place].layer.edge for place in counts}
        self._gradients: dict[GradientEdge, Tensor] = {}
        edges = [*self._edges.values(), *(edge for one in self.tied.values() for edge in one.edges)]
        if edges:
            with once_more():
                self._gradients = dict(zip(edges, batch.gradients(edges)))

    def check(self, signs: Signs) -> None:
        """Refuse a layer whose output does not hold the samples in order along its first axis, by two products."""
        half = torch.arange(self.batch.samples, device=self.batch.outputs.device) < (self.batch.samples + 1) // 2
        for group in self.groups:
            v = self._drawn(group, self._signs(group, signs, FOUND, 0))
            kept = half.to(v)[:, None]
            whole, part = self._hessian(group, v), self._hessian(group, v * kept)
            if float((part - whole * kept).norm()) > torch.finfo(v.dtype).eps ** 0.5 * float(whole.norm()):
                names = " or ".join(repr(self.squares[place].layer.name) for place in group)
                raise UncoveredModelError(
                    f"{names}: between it and the loss the samples do not stay in order along the first axis, so no "
                    "product belongs to one sample; give a plan without probes"
                )

    def find(self, signs: Signs, rank: int) -> None:
        """So many directions per sample for `replicate` to leave out; those found before are the first of them."""
        kept = self.batch.kept.setdefault(DIRECTIONS, {})
        for group in self.groups:
            seed, known, answers = kept.get(group, (None, None, None))
            if seed != (signs.seed, self.start):
                known = answers = None
            if known is None or known.shape[1] < rank:
                known, answers = self._longer(group, signs, rank, known, answers)
                kept[group] = (signs.seed, self.start), known, answers
            self.basis[group], self._turned[group] = known[:, :rank], answers[:, :rank]

    def _longer(
        self, group: Group, signs: Signs, rank: int, known: Tensor | None, answers: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Directions beyond those known, and H times them."""
        v = self._hessian(group, self._drawn(group, self._signs(group, signs, FOUND, 0)))
        basis, turned = (v.new_zeros(len(v), rank, v.shape[1]) for _ in range(2))
        first = 0
        if known is not None and answers is not None:
            first = known.shape[1]
            basis[:, :first], turned[:, :first], v = known, answers, answers[:, -1]
        for number in range(first, rank):
            basis[:, number] = _fresh(basis[:, :number], v)
            turned[:, number] = v = self._hessian(group, basis[:, number])
        return basis, turned

    def along(self) -> Tensors:
        """What the directions give: exact. Asked once."""
        out: Tensors = {}
        for group, turned in self._turned.items():
            basis = self.basis[group]
            inner = turned @ basis.transpose(1, 2)  # [samples, i, j]: (H q_i) q_j
            right = torch.baddbmm(turned, inner, basis, beta=2.0, alpha=-1.0)
            for q, h in zip(basis.unbind(1), right.unbind(1)):
                self._product(group, q, h, out)
        self._turned = {}
        self.batch.kept.pop(DIRECTIONS, None)
        return out

    def replicate(self, signs: Signs, replicate: int) -> Tensors:
        """One unbiased replicate of the layers' whole diagonals beyond `along`."""
        out: Tensors = {}
        for group in self.groups:
            count = self.counts[group[0]]
            held = self.batch.samples * sum(self.entries(group)) * self.batch.outputs.element_size()
            step = max(CHUNK // held, 1)
            for low in range(0, count, step):
                numbers = range(low, min(low + step, count))
                drawn = torch.stack([self._signs(group, signs, PROBES, replicate, number) for number in numbers])
                accumulate_new(out, self.beyond(group, drawn), 1.0 / count)
        return out

    def beyond(self, group: Group, signs: Tensor) -> Tensors:
        """The sum of the same of one group over given signs [k, samples, entries]; over all unit vectors in their place
        it is exact.
        """
        basis = self.basis.get(group)
        left = torch.stack([self._drawn(group, one) for one in signs], 1)  # the directions are read once for all
        right = left if basis is None else _across(basis, left)
        right = torch.stack([self._hessian(group, one) for one in right.unbind(1)], 1)
        right = right if basis is None else _across(basis, right)
        out: Tensors = {}
        for one, other in zip(left.unbind(1), right.unbind(1)):
            self._product(group, one, other, out)
        return out

    def entries(self, group: Group) -> list[int]:
        """Per layer, how many its output has for one sample."""
        return [self.squares[place].out.numel() // self.batch.samples for place in group]

    def _signs(self, group: Group, signs: Signs, *parts: int) -> Tensor:
        """Signs on the layers' outputs."""
        dtype = self._gradients[self._edges[group[0]]].dtype
        shapes = [torch.Size((self.batch.samples, size)) for size in self.entries(group)]
        drawn = [signs.samples(shape, self.start, *parts, place, dtype=dtype) for place, shape in zip(group, shapes)]
        return torch.cat(drawn, 1)

    def _hessian(self, group: Group, v: Tensor) -> Tensor:
        """H v at the layers' outputs, every sample's own, brought onto the same."""
        given = dict(zip(group, self._split(group, v, 1)))
        roots: list[Any] = [self._gradients[self._edges[place]] for place in given]
        wanted: list[Any] = [self._edges[place] for place in given]
        cotangents = list(given.values())
        heads = [(place, self.tied[place]) for place in given if place in self.tied]
        moved, inputs = list[Tensor](), list[Tensor]()
        for place, one in heads:
            output, input_ = one.edges
            outwards, inwards = one.forward(given[place], self._gradients[output])
            roots += [self._gradients[output], input_]
            cotangents += [outwards, inwards]
            wanted.append(output)
            moved.append(outwards)
            inputs.append(self._gradients[input_])
        live = [n for n, root in enumerate(roots) if isinstance(root, GradientEdge) or root.requires_grad]
        if not live:
            return torch.zeros_like(v)
        with once_more():
            found = torch.autograd.grad(
                [roots[n] for n in live],
                [*wanted, *inputs],
                [cotangents[n] for n in live],
                retain_graph=True,
                allow_unused=True,
            )
        parts = {p: torch.zeros_like(part) if f is None else f.detach() for (p, part), f in zip(given.items(), found)}
        for (place, one), along, outputs, pulled in zip(heads, moved, found[len(given) :], found[len(wanted) :]):
            back = one.back(outputs, pulled, along, self._gradients[one.edges[0]])
            parts[place] = parts[place] + back.reshape(parts[place].shape)
        rows = [self._stretched(place, self.squares[place].onto(part), 1) for place, part in parts.items()]
        return torch.cat([self._flat(row) for row in rows], 1)

    def _product(self, group: Group, left: Tensor, right: Tensor, out: Tensors) -> None:
        """Add sum_n (J_n^T left)(J_n^T right), as a difference of squares of halves of one size."""
        for place, one, other in zip(group, self._split(group, left, -1), self._split(group, right, -1)):
            sizes = [torch.linalg.vector_norm(self._flat(t), dim=1) for t in (one, other)]
            lam = torch.where(sizes[0] * sizes[1] > 0, sizes[1] / sizes[0], 1.0).sqrt()
            lam = lam.nan_to_num(1.0, 1.0, 1.0).reshape(-1, 1)
            a, b = self._flat(one) * lam, self._flat(other) / lam
            for sign in (1.0, -1.0):
                half = ((a + sign * b) / 2.0).reshape(one.shape)
                accumulate_new(out, self.squares[place].summed(half), sign)

    def _drawn(self, group: Group, signs: Tensor) -> Tensor:
        """Signs as vectors of the space in which products are taken."""
        parts = zip(group, self._split(group, signs, 0))
        return torch.cat([self._flat(self.squares[place].drawn(part)) for place, part in parts], 1)

    def _split(self, group: Group, v: Tensor, power: int) -> list[Tensor]:
        """A vector on each layer's output, in its shape, and stretched so often."""
        parts = zip(group, torch.split(v, self.entries(group), 1))
        return [self._stretched(place, part.reshape(self.squares[place].out), power) for place, part in parts]

    def _stretched(self, place: int, v: Tensor, power: int) -> Tensor:
        factor = self._stretch[place]
        return v if factor is None or not power else (v * factor if power > 0 else v / factor)

    def _flat(self, t: Tensor) -> Tensor:
        return t.reshape(self.batch.samples, -1)


def _across(basis: Tensor, v: Tensor) -> Tensor:
    """Vectors [samples, k, entries] without what they have along the basis, sample by sample."""
    return torch.baddbmm(v, v @ basis.transpose(1, 2), basis, alpha=-1.0)


def _fresh(basis: Tensor, v: Tensor) -> Tensor:
    """The unit vector along what v adds to the basis; zero of a sample to which it adds nothing."""
    q = v / _size(v)
    for _ in range(2):
        q = _across(basis, q[:, None])[:, 0]
        if float(torch.linalg.vector_norm(q, dim=1).min()) > AGAIN:
            break
    size = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    floor = 1e2 * torch.finfo(v.dtype).eps
    return torch.where(size > floor, q / _size(q), 0.0).nan_to_num(0.0, 0.0, 0.0)


def _size(v: Tensor) -> Tensor:
    """The norm of each sample's, 1 where that is 0."""
    size = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return torch.where(size > 0, size, 1.0)
