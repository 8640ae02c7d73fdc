"""Directions of the sites in which a signed pass would be noisiest, taken out of it and squared exactly.

A signed pass squares s.w_k, w_jk = sqrt|c_j| dz_j/dtheta_k, with a variance of 2 ((sum_j w_jk^2)^2 - sum_j w_jk^4).
Within one sample the columns w_k lie mostly along few directions of the space of sites. With an orthonormal basis U of
such directions, chosen without a look at s,

    E[ (s.w)^2 ] = |U^T w|^2 + E[ ((I - U U^T) s . w)^2 ]:

the first term is one pass per direction, once; the second is left to signs, with the variance of what is left of w.
The idea is Hutch++'s (R. A. Meyer, C. Musco, C. Musco and D. P. Woodruff, 2021), here sample by sample and for the
diagonal of a sum of squares. The basis spans A A^T g, A = (w_jk), for signs g keyed as all others are: one backward
pass, each layer's own J J^T per sample, and one pass forward (by double backward), all samples at once. Sites of
positive and of negative c are orthonormalised apart, since a and b are squared apart. Where there are pairs, a^2 - b^2
is a product A B of passes with the same signs: E[A B] = sum_u A(u) B(u) + E[A((I - U U^T) s) B((I - U U^T) s)] for one
basis of all sites, which spans A A^T g and B B^T g by turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError
from hessdiag.graph import LayerKind, Linearisation
from hessdiag.signs import Signs

BASIS = 2  # stream of signs
DEFLATION = "directions of signs"
"""Where a batch keeps those found last: a pilot's serve again."""


class Deflation:
    """`rank` directions per sample (and sign, if `positive` is given): `basis[site]` is [N, rank, its entries]."""

    def __init__(self, basis: Sequence[Tensor], positive: Sequence[Tensor] | None) -> None:
        self.basis = list(basis)
        self.rank = basis[0].shape[1] if basis else 0
        self._positive = None if positive is None else list(positive)

    def direction(self, number: int) -> list[Tensor]:
        """Direction `number` of every sample, site by site, [N, entries]; both signs of c side by side."""
        return [u[:, number] for u in self.basis]

    def project(self, signs: Sequence[Tensor], sign: int) -> list[Tensor]:
        """(I - U U^T) s, over the sites where c has this sign if signs are apart, zero elsewhere."""
        if self._positive is None:
            rows = [s.reshape(len(u), -1) for s, u in zip(signs, self.basis)]
            parts = sum(torch.bmm(u, s[:, :, None]) for u, s in zip(self.basis, rows))
            assert isinstance(parts, Tensor)
            return [s - torch.bmm(parts.transpose(1, 2), u)[:, 0] for u, s in zip(self.basis, rows)]
        wanted = [p if sign > 0 else ~p for p in self._positive]
        kept = [s.reshape(w.shape) * w for s, w in zip(signs, wanted)]
        along = sum(torch.bmm(u, s[:, :, None]) for u, s in zip(self.basis, kept))
        assert isinstance(along, Tensor)
        along = along.transpose(1, 2)
        return [s - torch.bmm(along, u)[:, 0] * w for u, s, w in zip(self.basis, kept, wanted)]


def deflation(batch: Linearisation, squares: Sequence[LayerKind], signs: Signs, *, start: int, rank: int) -> Deflation:
    """A basis of `rank` directions for one linearised batch; `start` is its first sample in the whole data.

    Of fewer where a sample has fewer sites. A sample whose directions overflow gets none: it is left to signs.
    """
    rank = min(rank, max(sum(site.c.numel() // batch.samples for site in batch.sites), 1))
    paired = any(site.right for site in batch.sites)
    sides = [Side(batch, second) for second in ((False, True) if paired else (False,))]
    positive = [(site.c > 0).reshape(batch.samples, -1) for site in batch.sites]
    sizes = [torch.Size(p.shape) for p in positive]
    rows: list[list[Tensor]] = [[] for _ in sizes]
    for number in range(rank):
        side = sides[number % len(sides)]
        seeds = [
            root * signs.samples(size, start, number, BASIS, place, dtype=root.dtype).reshape(root.shape)
            for place, (root, size) in enumerate(zip(side.roots, sizes))
        ]
        deltas = side.backward(seeds)
        if number < len(sides):
            _check_apart(batch, side, seeds, deltas)
        answers = _answers(batch, squares, seeds, deltas)
        z = side.forward(answers)
        for place, answer in enumerate(answers):
            direct = batch.direct.get(place)
            if direct is not None and answer is not None:  # a layer's own share needs no signs
                z[direct.site] -= (answer * direct.slope).reshape(z[direct.site].shape)
        turned = [(dz * root).reshape(batch.samples, -1) for root, dz in zip(side.roots, z)]
        for found, row in zip(rows, _scaled(turned)):
            found.append(row)
    basis = [torch.stack(rows.pop(0), 1) for _ in sizes]
    for _ in range(2):  # twice, since squared condition numbers cost half the digits
        basis = orthonormal(basis, None if paired else positive)
    return Deflation(basis, None if paired else positive)


class Side:
    """Seeds of all sites, with the first or with the second halves of pairs: A or B of the product form."""

    def __init__(self, batch: Linearisation, second: bool) -> None:
        self._batch, self._second = batch, second
        self._edges = [layer.edge for layer in batch.layers]
        self._pairs = [bool(site.right) for site in batch.sites]
        self.roots = []
        for site in batch.sites:
            lam = (1.0 / site.lam if second else site.lam) if site.right else 1.0
            root = site.c.abs().sqrt_()
            self.roots.append(root * site.c.sign().mul_(lam) if second else root.mul_(lam))
        self._blanks = [torch.ones_like(root, requires_grad=True) for root in self.roots]
        with _double(), torch.enable_grad():  # linear in its seeds (any will do): its gradient along a is J a
            self._forward = self.backward(self._blanks, create_graph=True)

    def backward(self, seeds: Sequence[Tensor], *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        """Cotangents of the layers."""
        left = [None if pair and self._second else seed for seed, pair in zip(seeds, self._pairs)]
        right = [seed if pair and self._second else None for seed, pair in zip(seeds, self._pairs)]
        return self._batch.backward(left, None, self._edges, right=right, create_graph=create_graph)

    def forward(self, steps: Sequence[Tensor | None]) -> list[Tensor]:
        """dz (or dw) of every site for steps of the layers' outputs."""
        ends = zip(self._forward, steps)
        pairs = [(f, step) for f, step in ends if f is not None and f.requires_grad and step is not None]
        moved: Sequence[Tensor | None] = [None] * len(self._blanks)
        if pairs:  # else every layer stands behind a step (sign, round, floor)
            roots, along = [f for f, _ in pairs], [step for _, step in pairs]
            with _double():
                moved = torch.autograd.grad(roots, self._blanks, along, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(root) if m is None else m.clone() for root, m in zip(self.roots, moved)]


def _scaled(row: list[Tensor]) -> list[Tensor]:
    """One row per sample, its largest entry 1, so that no product of rows overflows; zero where an entry did."""
    scale = torch.stack([part.abs().amax(1) for part in row]).amax(0).reciprocal()
    scale = torch.where(scale.isfinite(), scale, 0.0)
    return [part.nan_to_num(0.0, 0.0, 0.0).mul_(scale[:, None]) for part in row]


def _check_apart(batch: Linearisation, side: Side, seeds: Sequence[Tensor], deltas: Sequence[Tensor | None]) -> None:
    """Refuse sites whose entries do not follow the samples in order: a direction must belong to one sample.

    With some samples' cotangents doubled (which is exact), theirs alone must double at the layers.
    """
    twice = torch.tensor([1.0 + (n * 0.618 % 1.0 >= 0.5) for n in range(batch.samples)], device="cpu").to(seeds[0])
    doubled = [(seed.reshape(batch.samples, -1) * twice[:, None]).reshape(seed.shape) for seed in seeds]
    found = side.backward(doubled)
    for layer, delta, other in zip(batch.layers, deltas, found):
        if delta is not None and other is not None:
            expected = delta.reshape(batch.samples, -1) * twice[:, None]
            off = float((other.reshape(expected.shape) - expected).norm())
            if off > torch.finfo(delta.dtype).eps ** 0.5 * float(expected.norm()):
                raise UncoveredModelError(
                    f"{layer.name!r}: between it and the loss the samples do not stay in order along the first axis, "
                    "so no direction belongs to one sample; give a plan with deflate=0"
                )


@contextmanager
def _double() -> Iterator[None]:
    """What autograd says of a double backward that it does not have, as one line."""
    try:
        yield
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise UncoveredModelError(
            f"directions take a double backward: {str(error).splitlines()[0]}; give a plan with deflate=0"
        ) from error


def _answers(
    batch: Linearisation,
    squares: Sequence[LayerKind],
    seeds: Sequence[Tensor],
    deltas: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """J J^T of every layer, applied to its cotangent from remote sites."""
    return [
        None if delta is None else square.gram(batch.remote(place, delta, seeds))
        for place, (square, delta) in enumerate(zip(squares, deltas))
    ]


def orthonormal(rows: list[Tensor], positive: Sequence[Tensor] | None) -> list[Tensor]:
    """Orthonormal rows per sample, over the positive and over the negative entries if these are given; zero rows beyond
    the rank.
    """
    turns = []
    for wanted in ([None] * len(rows),) if positive is None else (list(positive), [~p for p in positive]):
        parts = (row if w is None else row * w[:, None] for row, w in zip(rows, wanted))
        products = sum(torch.bmm(part, part.transpose(1, 2)).double() for part in parts)
        assert isinstance(products, Tensor)
        values, vectors = torch.linalg.eigh(products)
        floor = values[:, -1:] * len(values[0]) * torch.finfo(rows[0].dtype).eps * 10.0
        scale = torch.where(values > floor, values, torch.inf).rsqrt()
        turns.append((vectors * scale[:, None, :]).transpose(1, 2))
    for place, row in enumerate(rows):  # one site at a time: the rows are the largest thing held; of its own dtype each
        turned = [torch.bmm(turn.to(row.dtype), row) for turn in turns]
        rows[place] = turned[0] if positive is None else torch.where(positive[place][:, None], turned[0], turned[1])
    return rows
