"""Stochastic diagonals by curvature propagation over sites, split by sign.

After J. Martens, I. Sutskever and K. Swersky, "Estimating the Hessian by Back-propagating Curvature" (ICML 2012), in a
form that stays real and needs first-order backward passes only. With independent signs s_j per sample and site

    a = sum_{c_j > 0} s_j sqrt(c_j) dz_j/dtheta,   b = sum_{c_j < 0} s_j sqrt(-c_j) dz_j/dtheta,
    E[a^2 - b^2] = functional part,

each of a and b one backward pass with many roots, squared *per sample* layer by layer. A pair, c dz dw, draws one sign
for both halves: with s sqrt|c| lam dz = A and s sgn(c) sqrt|c| dw / lam = B its share of a is (A + B)/2, that of b
(A - B)/2, so that a^2 - b^2 = A B. (Read as A = a + b and B = a - b the same two passes are the product form: all sites
seed A and B with the same signs, and their product is taken per sample.)

What needs no signs is taken out of them. The Gauss-Newton part is exact in one pass per column of the loss's Hessian
factor (C - 1 for softmax cross-entropy), or takes one signed pass instead, but for the share of a layer that feeds the
outputs directly, sum_n (d2l_n/df_j^2) (df_j/dtheta)^2: `heads`. And a layer that feeds a site tensor by an
elementwise map (through its normalisation and a residual sum) has its share of that site in closed form,
sum_j c_j slope_j^2 (da_j/dtheta)^2: `direct`, once; the signed passes then carry the remote sites only, the layer's own
seed being subtracted from its cotangent before squaring. The same holds of a layer that feeds a LayerNorm through a
sum, and of one half of a pair whose other half does not depend on the layer (a query's own leg of its product with the
keys): that share is zero. And the directions of a sample's sites in which signs would be noisiest can be squared one by
one, once: `deflate`, `deflated` (hessdiag.kernels.deflation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hessdiag.graph import LayerKind, Linearisation, Site, edge_shape, visit
from hessdiag.kernels.deflation import Deflation, deflation
from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.kernels.uses import Uses
from hessdiag.signs import Signs

FUNCTIONAL, GAUSS_NEWTON = 0, 1  # streams of signs
KEEP_ROOTS = 1 << 26
"""Square roots of all c are kept between replicates up to this size; beyond it signs are drawn as bytes, too."""


class Propagator:
    """Passes over one linearised batch: squares prepared once, then as many replicates as wanted.

    `groups` gives, per layer name, how many neighbouring samples are summed before squaring (1: per sample).
    `start` is the batch's first sample in the whole data; it keys the signs.
    """

    def __init__(
        self,
        batch: Linearisation,
        *,
        start: int = 0,
        groups: Mapping[str, int] | None = None,
        keep: bool = False,
        deflation: Deflation | None = None,
    ) -> None:
        self.batch = batch
        self.deflation = deflation
        self.start = start
        self.squares = [layer.on(batch.samples, keep=keep) for layer in batch.layers]
        self._groups = [(groups or {}).get(layer.name, 1) for layer in batch.layers]
        self.uses = Uses(batch)
        self._edges = [layer.edge for layer in (*batch.layers, *batch.shared)]
        size = sum(site.c.numel() * site.c.element_size() for site in batch.sites)
        self._small = size <= KEEP_ROOTS
        self._roots: dict[int, list[Tensor | None]] = {}
        self._blank: list[Tensor | None] = [None] * len(batch.sites)

    def direct(self) -> Tensors:
        """The functional part's share of the sites that each layer feeds directly: exact, no pass at all."""
        out = zeros(self.batch.objective.parameters)
        for place, direct in self.batch.direct.items():
            c = self.batch.sites[direct.site].c
            slope = direct.slope
            weight = c.reshape(edge_shape((self.batch.layers[place].node, 0))) * slope * slope
            accumulate(out, self.squares[place].weighted(weight))
        for place in self.batch.rowed:
            accumulate(out, self.squares[place].weighted(self.batch.own_weight(place)))
        return out

    def deflate(self, signs: Signs, rank: int) -> Deflation | None:
        """Find `rank` directions per sample for the signed passes to leave out, if there is anything to leave out."""
        if rank and self.batch.sites and not self.batch.free and not self.batch.crossing:
            self.deflation = deflation(self.batch, self.squares, signs, start=self.start, rank=rank)
        return self.deflation

    def deflated(self, *, absolute: bool = False) -> Tensors:
        """The functional part's share along the directions left out: exact, two passes a direction.

        `absolute` adds what sites of negative c contribute rather than taking it off: rounding is relative to that.
        """
        out = zeros(self.batch.objective.parameters)
        single = [1] * len(self.squares)
        for number in range(self.deflation.rank if self.deflation is not None else 0):
            assert self.deflation is not None
            direction = self.deflation.direction(number)
            for sign in (1, -1):
                self._square_pass(*self._seeds(sign, direction), None, out, 1.0 if absolute else float(sign), single)
        return out

    def functional(self, signs: Signs, replicate: int) -> Tensors:
        """One unbiased replicate of the functional part beyond its `direct` and `deflated` shares, samples summed."""
        samples = self.batch.samples
        drawn = []
        for number, site in enumerate(self.batch.sites):
            owners = 1 if number in self.batch.free else samples
            shape = torch.Size((owners, site.c.numel() // owners))
            dtype = site.c.dtype if self._small or self.deflation is not None else torch.int8
            drawn.append(signs.samples(shape, self.start, replicate, FUNCTIONAL, number, dtype=dtype))
        return self.beyond(drawn)

    def beyond(self, drawn: Sequence[Tensor]) -> Tensors:
        """The same for given signs, shaped like the sites; summed over all unit vectors in their place it is exact."""
        out = zeros(self.batch.objective.parameters)
        for sign in (1, -1):
            kept = drawn if self.deflation is None else self.deflation.project(drawn, sign)
            self._square_pass(*self._seeds(sign, kept), None, out, float(sign), self._groups)
        return out

    def gauss_newton(self) -> Tensors:
        """The Gauss-Newton part exactly: one pass per column of the loss's Hessian factor."""
        out = zeros(self.batch.objective.parameters)
        curvature = self.batch.curvature
        single = [1] * len(self.squares)
        for column, sign in curvature.each():
            self._square_pass(self._blank, self._blank, column, out, sign, single)
        return out

    def heads(self) -> Tensors:
        """The Gauss-Newton part's share of the layers that feed the outputs directly: exact, no pass at all."""
        out = zeros(self.batch.objective.parameters)
        for place, direct in self.batch.heads.items():
            layer, slope = self._head(place), direct.slope
            bent = self.batch.curvature.columns.diagonal().to(slope.dtype).reshape(edge_shape((layer.layer.node, 0)))
            accumulate(out, layer.weighted(bent * slope * slope))
        return out

    def _head(self, place: int) -> LayerKind:
        if place < len(self.squares):
            return self.squares[place]
        return self.batch.shared[place - len(self.squares)].on(self.batch.samples)

    def gauss_newton_signed(self, signs: Signs, replicate: int) -> Tensors:
        """One unbiased replicate of the Gauss-Newton part beyond its `heads`: columns summed under random signs.

        Per eigenvalue sign. Of a parameter that is applied elsewhere, too, the random square of its head is taken off.
        """
        curvature = self.batch.curvature
        shape = torch.Size((self.batch.samples, len(curvature.signs)))
        drawn = signs.samples(shape, self.start, replicate, GAUSS_NEWTON, dtype=curvature.signs.dtype).T
        return self.gauss_newton_beyond(drawn)

    def gauss_newton_beyond(self, drawn: Tensor) -> Tensors:
        """The same for given signs [columns, samples]; summed over all unit vectors in their place it is exact."""
        out, curvature = zeros(self.batch.objective.parameters), self.batch.curvature
        for sign in (1.0, -1.0):
            chosen = curvature.signs == sign
            if bool(chosen.any()):
                seed = curvature.columns.combined(drawn * chosen[:, None])
                self._square_pass(self._blank, self._blank, seed, out, sign, self._groups, heads=True)
        return out

    def each(self, seeds: Sequence[Tensor | None], output_seed: Tensor | None) -> Tensors:
        """Per-sample gradients [N, ...] of every parameter for given cotangents."""
        return dict(self.each_of(self.batch.backward(seeds, output_seed, self._edges, above=True), seeds))

    def each_of(self, deltas: Sequence[Tensor | None], seeds: Sequence[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """The same for the layers' cotangents that such a pass gave, one parameter after the other."""
        for square, delta in zip(self.squares, deltas):
            if delta is not None:
                yield from square.each(delta.detach()).items()
        shared = {place: d.detach() for place, d in enumerate(deltas[len(self.squares) :]) if d is not None}
        yield from self.uses.each(shared, seeds).items()

    def _seeds(self, sign: int, drawn: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Signs (or a direction) times sqrt(max(+-c, 0)), site by site, None where it vanishes; and those of the second
        halves of pairs.
        """
        roots = self._roots.get(sign)
        if roots is None:
            roots = [self._root(site, sign) for site in self.batch.sites]
            if self._small:
                self._roots[sign] = roots
        left: list[Tensor | None] = []
        right: list[Tensor | None] = []
        for site, root, s in zip(self.batch.sites, roots, drawn):
            seed: Tensor | None = None
            if root is not None:
                seed = root * s.reshape(root.shape) if self._small else root.mul_(s.reshape(root.shape))
            pair = seed is not None and bool(site.right)
            left.append(seed * site.lam if seed is not None and pair else seed)
            right.append(seed * site.c.sign().mul_(sign / site.lam) if seed is not None and pair else None)
        return left, right

    def _root(self, site: Site, sign: int) -> Tensor | None:
        """sqrt(max(+-c, 0)), of a pair sqrt|c| / 2."""
        part = site.c.abs() if site.right else (site.c * sign).clamp_(min=0)
        return part.sqrt_().mul_(0.5 if site.right else 1.0) if bool(part.any()) else None

    def _square_pass(
        self,
        seeds: Sequence[Tensor | None],
        right: Sequence[Tensor | None],
        output_seed: Tensor | None,
        out: Tensors,
        sign: float,
        groups: Sequence[int],
        heads: bool = False,
    ) -> None:
        if output_seed is None and all(seed is None for seed in (*seeds, *right)):
            return

        shared: dict[int, Tensor] = {}
        own = self.batch.own(seeds, right)

        def square(place: int, delta: Tensor) -> None:
            head = heads and place in self.batch.heads
            if head and place >= len(self.squares):
                accumulate(out, self._head(place).summed(delta.detach()), -sign)
            elif head:
                return
            if place >= len(self.squares):
                shared[place - len(self.squares)] = delta.detach()
                return
            delta = self.batch.remote(place, delta, seeds)
            if place in own:
                delta = delta - own.pop(place)
            accumulate(out, self.squares[place].summed(delta.detach(), group=groups[place]), sign)

        visit(self.batch, seeds, output_seed, square, right=right)
        if self.batch.shared:
            accumulate(out, self.uses.squared(shared, right), sign)
            accumulate(out, self._free_squares(seeds, right), sign)

    def _free_squares(self, seeds: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensors:
        """What the sites of the free side give: squares of one gradient, which no sample shares."""
        if not self.batch.free:
            return {}
        parameters, free = self.uses.parameters, self.batch.free
        left, other = ([s if n in free else None for n, s in enumerate(side)] for side in (seeds, right))
        found = self.batch.backward(left, None, list(parameters.values()), right=other)
        return {name: g.detach().square() for name, g in zip(parameters, found) if g is not None}
