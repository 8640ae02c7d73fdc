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
one, once: `deflate`, `deflated` (hessdiag.kernels.deflation). Layers in which signs would be noisier than products of
the Hessian at their outputs are left to these: `probes` (hessdiag.kernels.probes). Of a table that is the head as well
the rows that a sample looks up alone are left to signs (hessdiag.kernels.rows).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hessdiag.graph import Layer, LayerKind, Linearisation, edge_shape, visit
from hessdiag.kernels.deflation import DEFLATION, Deflation, deflation
from hessdiag.kernels.entering import Draw, Entering, Roots
from hessdiag.kernels.probes import Probes
from hessdiag.kernels.rows import Factors
from hessdiag.kernels.tensors import Tensors, accumulate, accumulate_new, zeros
from hessdiag.kernels.tied import Tied
from hessdiag.kernels.uses import Uses
from hessdiag.signs import Signs

FUNCTIONAL, GAUSS_NEWTON = 0, 1  # streams of signs


class Propagator:
    """Passes over one linearised batch: squares prepared once, then as many replicates as wanted.

    `groups` gives, per layer name, how many neighbouring samples are summed before squaring (1: per sample). `probes`
    gives, per layer name, by how many products its share is had instead, in each replicate.
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
        probes: Mapping[str, int] | None = None,
    ) -> None:
        self.batch = batch
        self.deflation = deflation
        self.start = start
        self.squares = [layer.on(batch.samples, keep=keep) for layer in batch.layers]
        self._groups = [(groups or {}).get(layer.name, 1) for layer in batch.layers]
        self.uses = Uses(batch)
        self._edges = [layer.edge for layer in (*batch.layers, *batch.shared)]
        _ = batch.heads, batch.direct  # read before any pass
        found = self.probed(batch) if probes else []
        chosen = {place: (probes or {})[layer.name] for place, layer in found if layer.name in (probes or {})}
        heads = self._heads_of(chosen)
        tied = {place: Tied(self.layer(place), self.layer(head)) for place, head in heads.items()}
        self._tied = {head: str(self.layer(head).layer.weight) for head in heads.values()}
        """By place of the head, tables of which nothing is left to signs: closed in the head, products for the rest."""
        self.roots = Roots(batch, {number for number in batch.crossing if self._crossed(number) in self._tied})
        self.probes = Probes(batch, {place: self.layer(place) for place in chosen}, chosen, start=start, tied=tied)

    @staticmethod
    def probed(batch: Linearisation) -> list[tuple[int, Layer]]:
        """Layers that products may serve, by their place in `layers` and beyond them in `shared`.

        Not those that feed the outputs directly, nor what is computed from parameters first, nor parameters with
        several uses besides: products at one output say nothing of what two uses have together.
        """
        computed = {key for key, known in batch.graph.applied.items() if known.computed}
        layers = [(n, one) for n, one in enumerate([*batch.layers, *batch.shared]) if n not in batch.heads]
        uses = Counter(key for _, layer in layers for key in layer.own)
        return [(n, one) for n, one in layers if not computed & set(one.own) and all(uses[k] == 1 for k in one.own)]

    def _heads_of(self, chosen: Collection[int]) -> dict[int, int]:
        """By place of a look-up that products serve: that of the one head which applies the same table."""
        found = {}
        for place in chosen:
            layers = [*self.batch.layers, *self.batch.shared]
            others = [n for n, one in enumerate(layers) if n != place and set(one.own) & set(layers[place].own)]
            if len(others) == 1 and Tied.serves(self.layer(place), self.layer(others[0])):
                found[place] = others[0]
        return found

    def direct(self) -> Tensors:
        """The functional part's share of the sites that each layer feeds directly: exact, no pass at all."""
        out = zeros(self.batch.objective.parameters)
        for place, direct in self.batch.direct.items():
            if place in self.probes.counts:
                continue
            c = self.batch.sites[direct.site].c
            slope = direct.slope
            weight = c.reshape(edge_shape((self.batch.layers[place].node, 0))) * slope * slope
            accumulate(out, self.squares[place].weighted(weight))
        for place in self.batch.rowed.keys() - self.probes.counts.keys():
            accumulate(out, self.squares[place].weighted(self.batch.own_weight(place)))
        return out

    def deflate(self, signs: Signs, rank: int) -> Deflation | None:
        """Find `rank` directions per sample for the signed passes to leave out, if there is anything to leave out."""
        if rank and self.batch.sites and self.batch.layers and not self.batch.free and not self.batch.crossing:
            mark = (signs.seed, self.start, rank, [site.lam for site in self.batch.sites])
            known, self.deflation = self.batch.kept.get(DEFLATION, (None, None))
            if known != mark:
                self.deflation = deflation(self.batch, self.squares, signs, start=self.start, rank=rank)
                self.batch.kept[DEFLATION] = mark, self.deflation
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
                entering = self._entering(direction.__getitem__, of=sign)
                self._square_pass(entering, out, 1.0 if absolute else float(sign), single)
        return out

    def functional(self, signs: Signs, replicate: int, *, outer: bool = False) -> Tensors:
        """One unbiased replicate of the functional part beyond its `direct` and `deflated` shares, samples summed.

        With `outer` the Gauss-Newton part beyond its `heads` as well: merged into the same passes, it costs none. Of
        layers that products serve it is there in any case, beyond `probes.along`.
        """
        out = self.signed(signs, replicate, outer=outer)
        accumulate(out, self.probes.replicate(signs, replicate))
        return out

    def signed(self, signs: Signs, replicate: int, *, outer: bool = False) -> Tensors:
        """What of it is left to signs."""
        held = self.roots.small or self.deflation is not None

        def draw(number: int) -> Tensor:
            c = self.batch.sites[number].c
            owners = 1 if number in self.batch.free else self.batch.samples
            shape, dtype = torch.Size((owners, c.numel() // owners)), c.dtype if held else torch.int8
            return signs.samples(shape, self.start, replicate, FUNCTIONAL, number, dtype=dtype)

        drawn = [draw(number) for number in range(len(self.batch.sites))] if held else draw
        return self.beyond(drawn, self._columns(signs, replicate) if outer else None)

    def beyond(self, drawn: Sequence[Tensor] | Draw, outer: Tensor | None = None) -> Tensors:
        """The same for given signs, shaped like the sites, and `outer`, those of the columns of the loss's factor.

        Summed over all unit vectors in the place of either it is exact.
        """
        out = zeros(self.batch.objective.parameters)
        draw = drawn if callable(drawn) else drawn.__getitem__
        for sign in (1, -1):
            kept = draw
            if self.deflation is not None:
                whole = [draw(number) for number in range(len(self.batch.sites))]
                kept = self.deflation.project(whole, sign).__getitem__
            top = None if outer is None else self._output(outer, float(sign))
            entering = self._entering(kept, top, of=sign)
            self._square_pass(entering, out, float(sign), self._groups, heads=top is not None)
        return out

    def gauss_newton(self, apart: Tensors | None = None) -> Tensors:
        """The Gauss-Newton part exactly: one pass per column of the loss's Hessian factor.

        To `apart` is added what of it the products of `probes` hold as well.
        """
        apart = {} if apart is None else apart
        out = zeros(self.batch.objective.parameters)
        curvature = self.batch.curvature
        single = [1] * len(self.squares)
        for column, sign in curvature.each():
            self._square_pass(self._entering(None, partial(_same, column)), out, sign, single, apart=apart)
        return out

    def heads(self) -> Tensors:
        """The Gauss-Newton part's share of the layers that feed the outputs directly: exact, no pass at all."""
        out = zeros(self.batch.objective.parameters)
        for place, direct in self.batch.heads.items():
            layer, slope = self.layer(place), direct.slope
            bent = self.batch.curvature.columns.diagonal().to(slope.dtype).reshape(edge_shape((layer.layer.node, 0)))
            accumulate(out, layer.weighted(bent * slope * slope))
        return out

    def layer(self, place: int) -> LayerKind:
        """The layer at a place of `layers`, and beyond them of `shared`."""
        if place < len(self.squares):
            return self.squares[place]
        return self.batch.shared[place - len(self.squares)].on(self.batch.samples)

    def gauss_newton_signed(self, signs: Signs, replicate: int, apart: Tensors | None = None) -> Tensors:
        """One unbiased replicate of the Gauss-Newton part beyond its `heads`: columns summed under random signs.

        Per eigenvalue sign. Of a parameter that is applied elsewhere, too, the random square of its head is taken off.
        """
        return self.gauss_newton_beyond(self._columns(signs, replicate), apart)

    def gauss_newton_beyond(self, drawn: Tensor, apart: Tensors | None = None) -> Tensors:
        """The same for given signs [columns, samples]; summed over all unit vectors in their place it is exact."""
        out = zeros(self.batch.objective.parameters)
        apart = {} if apart is None else apart
        for sign in (1.0, -1.0):
            top = self._output(drawn, sign)
            if top is not None:
                self._square_pass(self._entering(None, top), out, sign, self._groups, heads=True, apart=apart)
        return out

    def _columns(self, signs: Signs, replicate: int) -> Tensor:
        """Signs of the columns of the loss's factor, [columns, samples], as bytes: there may be as many as outputs."""
        shape = torch.Size((self.batch.samples, self.batch.columns))
        return signs.samples(shape, self.start, replicate, GAUSS_NEWTON, dtype=torch.int8).T

    def _output(self, drawn: Tensor, sign: float) -> Callable[[], Tensor] | None:
        """What sums the columns of this eigenvalue sign under signs; None where there are none."""
        chosen = self.batch.curvature.signs == sign
        if not bool(chosen.any()):
            return None
        columns, dtype = self.batch.curvature.columns, self.batch.outputs.dtype
        return lambda: columns.combined(drawn if bool(chosen.all()) else drawn * chosen[:, None], dtype)

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

    def _crossed(self, number: int) -> int | None:
        """The place of the layer whose own bilinear term a site is."""
        place = self.batch.crossing.get(number)
        return None if place is None else place + len(self.squares)

    def _entering(self, drawn: Draw | None, output: Callable[[], Tensor] | None = None, *, of: int = 1) -> Entering:
        """Signs of sites (or a direction) for c of the sign `of`, and the outputs' cotangent."""
        return Entering(self.roots, of, drawn, output)

    def _square_pass(
        self,
        entering: Entering,
        out: Tensors,
        sign: float,
        groups: Sequence[int],
        *,
        heads: bool = False,
        apart: Tensors | None = None,
    ) -> None:
        """Add the squares of one pass to `out`: of layers that products serve with `apart` alone, where they are told
        apart besides.
        """
        if not entering:
            return

        shared: dict[int, Tensor] = {}
        first, served = len(self.squares), set(self._tied.values())
        without = served if apart is None else set()
        tables = self.uses.tables if heads or not entering.outputs else {}
        """Of which it is asked what the pass holds beyond their heads."""
        of_heads: dict[int, Factors] = {}

        def square(place: int, delta: Tensor) -> None:
            table = tables.get(place - first)
            if table is not None:
                if table.name not in without:
                    of_heads[place - first] = table.of_head(delta.detach())
                return
            if place in self.probes.counts and place not in self.probes.tied:
                self._probed(place, delta.detach(), out, apart, sign)
            elif place >= len(self.squares) and (heads or apart is not None) and place in self.batch.heads:
                self._head_alone(place, delta.detach(), out if heads else None, apart, sign)
            elif heads and place in self.batch.heads:
                return
            if place >= len(self.squares):
                shared[place - len(self.squares)] = delta.detach()
            elif place not in self.probes.counts:
                delta = entering.remote(place, delta)
                accumulate(out, self.squares[place].summed(delta.detach(), group=groups[place]), sign)

        visit(entering.entrances, entering.at, square, at_once=self.roots.small)
        if self.batch.shared:
            more = self.batch.free | self.batch.crossing.keys()
            sides = [entering.seeds(n) if n in more else (None, None) for n in range(len(self.batch.sites))]
            seeds, right = ([side[second] for side in sides] for second in (0, 1))
            found = self.uses.squared(shared, right, without={*without, *(rows.name for rows in tables.values())})
            if tables:
                found |= self.uses.beyond_heads(of_heads, shared, right, without=without)
            accumulate(out, found, sign)
            if apart is not None:
                accumulate_new(apart, {name: square for name, square in found.items() if name in served}, sign)
            accumulate(out, self._free_squares(seeds, right), sign)

    def _probed(self, place: int, delta: Tensor, out: Tensors, apart: Tensors | None, sign: float) -> None:
        """What a pass holds of a layer that products serve. Of one use among several it is its own square alone, which
        is in `out` with that of all uses, and taken off if not wanted.
        """
        shared = place >= len(self.squares)
        if apart is None and not shared:
            return
        found = self.layer(place).summed(delta)
        if apart is not None:
            accumulate_new(apart, found, sign)
        if apart is None or not shared:
            accumulate(out, found, -sign if apart is None else sign)

    def _head_alone(self, place: int, delta: Tensor, out: Tensors | None, apart: Tensors | None, sign: float) -> None:
        """Take off the square that a pass holds of the head's use alone, whose share is closed. Of a table that
        products serve there is none unless it is told apart.
        """
        table = self._tied.get(place)
        for name, found in self.layer(place).summed(delta).items():
            if name == table and apart is not None:
                accumulate_new(apart, {name: found}, -sign)
            if out is not None and (name != table or apart is not None):
                accumulate(out, {name: found}, -sign)

    def _free_squares(self, seeds: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensors:
        """What the sites of the free side give: squares of one gradient, which no sample shares."""
        if not self.batch.free:
            return {}
        parameters, free = self.uses.parameters, self.batch.free
        left, other = ([s if n in free else None for n, s in enumerate(side)] for side in (seeds, right))
        found = self.batch.backward(left, None, list(parameters.values()), right=other)
        return {name: g.detach().square() for name, g in zip(parameters, found) if g is not None}


def _same(tensor: Tensor) -> Tensor:
    return tensor
