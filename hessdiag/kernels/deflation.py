"""Directions of the sites in which a signed pass would be noisiest, taken out of it and squared exactly.

A signed pass squares s.w_k, w_jk = sqrt|c_j| dz_j/dtheta_k, with a variance of 2 ((sum_j w_jk^2)^2 - sum_j w_jk^4).
Within one sample the columns w_k lie mostly along few directions of the space of sites. With an orthonormal basis U of
such directions, chosen without a look at s,

    E[ (s.w)^2 ] = |U^T w|^2 + E[ ((I - U U^T) s . w)^2 ]:

the first term is one pass per direction, once; the second is left to signs, with the variance of what is left of w.
The idea is Hutch++'s (R. A. Meyer, C. Musco, C. Musco and D. P. Woodruff, 2021), here sample by sample and for the
diagonal of a sum of squares. The basis spans A A^T g, A = (w_jk), for signs g keyed as all others are: one backward
pass, each layer's own J J^T per sample, and one pass forward (by double backward), all samples at once. Sites of
positive and of negative c are orthonormalised apart, since a and b are squared apart.
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


class Deflation:
    """`rank` directions per sample and sign: `basis[site]` is [N, rank, entries of the site]."""

    def __init__(self, basis: Sequence[Tensor], positive: Sequence[Tensor]) -> None:
        self.basis = list(basis)
        self.rank = basis[0].shape[1] if basis else 0
        self._positive = list(positive)

    def direction(self, number: int) -> list[Tensor]:
        """Direction `number` of every sample, site by site, [N, entries]; both signs of c side by side."""
        return [u[:, number] for u in self.basis]

    def project(self, signs: Sequence[Tensor], sign: int) -> list[Tensor]:
        """(I - U U^T) s over the sites where c has this sign, zero elsewhere."""
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
    roots = [site.c.abs().sqrt() for site in batch.sites]
    positive = [(site.c > 0).reshape(batch.samples, -1) for site in batch.sites]
    sizes = [torch.Size(p.shape) for p in positive]
    edges = [layer.edge for layer in batch.layers]
    blanks = [torch.zeros_like(root, requires_grad=True) for root in roots]
    with _double(), torch.enable_grad():  # linear in its seeds: its gradient along a is the forward product J a
        forward = batch.backward(list(blanks), None, edges, create_graph=True)
    rows: list[list[Tensor]] = [[] for _ in roots]
    for number in range(rank):
        seeds = [
            root * signs.samples(size, start, number, BASIS, place, dtype=root.dtype).reshape(root.shape)
            for place, (root, size) in enumerate(zip(roots, sizes))
        ]
        deltas = batch.backward(seeds, None, edges)
        if not number:
            _check_apart(batch, seeds, deltas)
        answers = _answers(batch, squares, seeds, deltas)
        ends = [f for f, answer in zip(forward, answers) if f is not None and answer is not None]
        steps = [answer for f, answer in zip(forward, answers) if f is not None and answer is not None]
        with _double():
            moved: Sequence[Tensor | None] = torch.autograd.grad(
                ends, blanks, steps, retain_graph=True, allow_unused=True
            )
        z = [torch.zeros_like(root) if m is None else m.clone() for root, m in zip(roots, moved)]
        for place, answer in enumerate(answers):
            direct = batch.direct.get(place)
            if direct is not None and answer is not None:  # a layer's own share needs no signs
                z[direct.site] -= (answer * direct.slope).reshape(z[direct.site].shape)
        for found, row in zip(rows, _scaled([(dz * root).reshape(batch.samples, -1) for root, dz in zip(roots, z)])):
            found.append(row)
    basis = [torch.stack(rows.pop(0), 1) for _ in roots]
    for _ in range(2):  # twice, since squared condition numbers cost half the digits
        basis = _orthonormal(basis, positive)
    return Deflation(basis, positive)


def _scaled(row: list[Tensor]) -> list[Tensor]:
    """One row per sample, its largest entry 1, so that no product of rows overflows; zero where an entry did."""
    scale = torch.stack([part.abs().amax(1) for part in row]).amax(0).reciprocal()
    scale = torch.where(scale.isfinite(), scale, 0.0)
    return [part.nan_to_num(0.0, 0.0, 0.0).mul_(scale[:, None]) for part in row]


def _check_apart(batch: Linearisation, seeds: Sequence[Tensor], deltas: Sequence[Tensor | None]) -> None:
    """Refuse sites whose entries do not follow the samples in order: a direction must belong to one sample.

    With some samples' cotangents doubled (which is exact), theirs alone must double at the layers.
    """
    twice = torch.tensor([1.0 + (n * 0.618 % 1.0 >= 0.5) for n in range(batch.samples)], device="cpu").to(seeds[0])
    doubled = [(seed.reshape(batch.samples, -1) * twice[:, None]).reshape(seed.shape) for seed in seeds]
    found = batch.backward(doubled, None, [layer.edge for layer in batch.layers])
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


def _orthonormal(rows: list[Tensor], positive: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormal rows per sample, over the positive and over the negative entries; zero rows beyond the rank."""
    turns = []
    for wanted in (list(positive), [~p for p in positive]):
        parts = (row * w[:, None] for row, w in zip(rows, wanted))
        products = sum(torch.bmm(part, part.transpose(1, 2)).double() for part in parts)
        assert isinstance(products, Tensor)
        values, vectors = torch.linalg.eigh(products)
        floor = values[:, -1:] * len(values[0]) * torch.finfo(rows[0].dtype).eps * 10.0
        scale = torch.where(values > floor, values, torch.inf).rsqrt()
        turns.append((vectors * scale[:, None, :]).transpose(1, 2).to(rows[0].dtype))
    for place, p in enumerate(positive):  # one site at a time: the rows are the largest thing held
        row = rows[place]
        rows[place] = torch.where(p[:, None], torch.bmm(turns[0], row), torch.bmm(turns[1], row))
    return rows
