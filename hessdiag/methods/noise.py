"""What a plan takes against noise: whatever is predicted to gain most at equal time.

Beside signs alone there are products at the outputs of the layers in which signs are noisiest, k a replicate, with
directions taken out of them (`hessdiag.kernels.probes`), and directions taken out of the signs themselves
(`hessdiag.kernels.deflation`). The variance that each leaves is measured on the pilot's samples, by replicates whose
signs no measurement uses. Time is counted in replicates by signs and no clock is read here: the same net gets the same
plan. With V the variance of a replicate, t its time and s that of what is done once, the least of

    V (t + s / R)        for the mean of R replicates,
    s + t R(V)           for a norm within rtol, which takes R(V) of them,

is taken. Groups of layers with noise n_g a product leave V = V_rest + sum n_g / k_g in t = t_0 + c sum k_g; V t is
least at k_g = sqrt(n_g t_0 / (c V_rest)) (Cauchy and Schwarz).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.kernels.deflation import DEFLATION
from hessdiag.kernels.probes import DIRECTIONS
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate
from hessdiag.methods.base import Aim
from hessdiag.methods.hutchinson import probe
from hessdiag.methods.pilot import (
    DEFLATE_BYTES,
    DEFLATE_LEAST,
    LEAST_REPLICATES,
    PILOT,
    ROUNDED,
    affordable_rank,
    replicates_needed,
    rounding,
)
from hessdiag.methods.plan import PROBE_BLOCK
from hessdiag.signs import Signs

REPLICATES, FEW, MANY = 8, 4, 32
"""Of a pilot by signs where a tolerance is aimed at, of all that is tried, and of both before a method is left."""
QUIET = 1.0
"""A replicate by signs whose variance is less than this, relative to the squared norm, is left as it is."""
SHARE, MOST = 0.03, 4
"""Groups of layers with less of what noise is left than this are left to signs, and all beyond so many."""
COUNTS, RANKS = (1, 2, 4, 8, 16, 32), (0, 16, 32, 64, 96)
"""Products a replicate, and directions per sample."""
PRODUCT = 0.4
"""Replicates by signs that a product at outputs takes, or a direction with its exact share (measured: 0.3 to 0.45)."""
DIRECTION, PROJECTED = 2.0, 0.25
"""Those that a direction of signs takes, once (1.4 to 2.3), and what it adds to each replicate (0.15 to 0.4)."""
DIRECTION_SHARE = 0.75
"""Of the time of all replicates by signs, the most that directions of signs may take."""
HUTCHINSON = 0.7
"""Those that one of Hutchinson's products takes (0.55 to 0.9)."""
PAYS = 1.5
"""What is taken must be better by this much than signs alone, so that chance does not decide."""
BETTER, FURTHER = 0.8, 0.95
"""What is added to something must bring the price down to this, at least, and more of the same to that."""
WORTH = 60.0
"""Replicates by signs over the pilot's samples below which products are not tried, as trying takes about as long."""
LEFT = 0.8
"""Of the noise of signs, the most that a few directions may leave for more of them to be tried."""
NEARLY = 1.1
"""Of prices no further apart than this that with fewer products is taken: all other tensors pay for them."""
HELD = 1 << 28
"""Bytes of the pilot's replicates; of a larger model every so many entries are looked at."""


@dataclass(frozen=True)
class Choice:
    """What a plan takes: products a replicate by layer, their directions, and those of signs; and the prices."""

    probes: Mapping[str, int] = field(default_factory=dict)
    probe_rank: int = 0
    deflate: int = 0
    price: float = 1.0
    signs: float = 1.0
    """The price of signs alone."""
    hutchinson: float = math.inf


class Gain:
    """One pilot's look at a batch: the noise of signs, and what any way to less of it would take."""

    def __init__(
        self,
        batch: Linearisation,
        seed: int,
        *,
        samples: int,
        aim: Aim,
        ordered: bool,
        groups: Mapping[str, int] | None,
        outer: bool,
    ) -> None:
        self.batch, self.samples, self.aim, self.ordered, self.outer = batch, samples, aim, ordered, outer
        self.groups, self.signs = groups, Signs(seed, batch.outputs.device)
        plain = Propagator(batch, groups=groups)
        self.known = plain.direct()
        if outer:
            accumulate(self.known, plain.gauss_newton())
        else:
            accumulate(self.known, plain.heads())
        count = FEW if aim.replicates else REPLICATES
        rows = _Rows(self.known)

        def drawn(r: int) -> Tensors:
            found = self.by_signs(plain, r)
            if not aim.replicates:
                rows.see(found)
            return found

        self.noise, mean = spread(drawn, count)
        self.total = math.fsum(self.noise.values())
        self.size = sum(float((mean[n] + self.known[n]).square().sum()) for n in mean) - self.total / count
        self._products = None if aim.replicates else rows.products()
        self.need = self.needed(self.total) if self.total else 0.0

    def by_signs(self, propagator: Propagator, r: int) -> Tensors:
        """What a replicate leaves to signs."""
        return propagator.signed(self.signs, r, outer=not self.outer)

    def noise_of(self, group: Sequence[int], found: Mapping[str, float]) -> float:
        """That of the parameters of some layers."""
        layers = [*self.batch.layers, *self.batch.shared]
        return math.fsum(found.get(name, 0.0) for name in {key for place in group for key in layers[place].own})

    def needed(self, variance: float) -> float:
        """How many replicates of this variance the aim takes."""
        if self._products is None:
            return float(self.aim.replicates or 0)
        share, quieter = self.batch.samples / self.samples, variance / self.total
        return replicates_needed(
            self._products, self.aim.rtol, share=share, cautious=True, most=100_000, quieter=quieter
        )

    def price(self, variance: float, each: float, once: float) -> float:
        """The time that such replicates take, in replicates by signs; where their number is asked for, times their
        variance beside that of signs.
        """
        if self.aim.replicates:
            return (once + each * self.need) * variance / self.total
        return once + each * self.needed(variance)

    def counts(self, rest: float, noises: Sequence[float], once: float) -> list[tuple[float, list[int]]]:
        """(price, products a replicate of each group) beside signs that leave `rest`, the least price first."""
        first = 1.0 + (once / self.need if self.aim.replicates else 0.0)
        ideal = [math.sqrt(n * first / (PRODUCT * max(rest, 1e-6 * self.total))) for n in noises]
        found = []
        for scale in (1.0, 0.5, 0.25, 0.125, 0.0):
            tried = [min(COUNTS, key=lambda k, i=i: abs(math.log(k / max(i * scale, 1.0)))) for i in ideal]  # type: ignore[misc]
            variance = rest + sum(n / k for n, k in zip(noises, tried))
            found.append((self.price(variance, 1.0 + PRODUCT * sum(tried), once), tried))
        return sorted(found)

    def hutchinson(self, count: int) -> float:
        """The price of Hutchinson's replicates, by so many; where there are more samples than these, as if their noise
        were all coherent, as far as a block goes.
        """
        batch = self.batch
        products = Products(batch.objective, None, batch.targets, parts=False, outputs=batch.outputs)

        def draw(r: int) -> Tensors:
            v = probe(batch.objective, self.signs, r)
            return {name: (v[name] * hv).double() for name, hv in products.hessian(v).items()}

        coherent = max(min(PROBE_BLOCK, self.samples) / batch.samples, 1.0)
        return self.price(math.fsum(spread(draw, count)[0].values()) * coherent, HUTCHINSON, 0.0)


class _Rows:
    """The pilot's replicates in float32, of a large model every so many entries, for their products."""

    def __init__(self, known: Tensors) -> None:
        self._known = known
        size = sum(t.numel() for t in known.values())
        self._step = 1 + 4 * REPLICATES * size // HELD
        self._rows: list[Tensor] = []

    def see(self, drawn: Tensors) -> None:
        """One more."""
        parts = [(t + self._known[name]).flatten()[:: self._step].float() for name, t in drawn.items()]
        self._rows.append(torch.cat(parts))

    def products(self) -> Tensor:
        """<d_i, d_j>, in the unit of the largest."""
        out = torch.tensor([[float((a * b).sum(dtype=torch.float64)) for b in self._rows] for a in self._rows])
        return out.to("cpu", torch.float64)


class _Served:
    """Layers that products serve, in groups that share them."""

    def __init__(self, gain: Gain, names: Sequence[str], beside: float = 0.0) -> None:
        self._gain = gain
        self.propagator = Propagator(gain.batch, groups=gain.groups, probes=dict.fromkeys(names, 1))
        self._probes = self.propagator.probes
        self._probes.check(gain.signs)
        entries = sum(sum(self._probes.entries(group)) for group in self._probes.groups)
        self.held = 2.0 * gain.batch.outputs.element_size() * entries * gain.samples
        """Bytes of a direction and of what it is turned to."""
        self._beside = beside

    @property
    def count(self) -> int:
        """How many groups."""
        return len(self._probes.groups)

    def noises(self, rank: int) -> list[float] | None:
        """Of one product of each group, with so many directions taken out; None where memory does not hold them."""
        if rank:
            if not self._gain.ordered or rank * (self.held + self._beside) > DEFLATE_BYTES:
                return None
            self._probes.find(self._gain.signs, rank)
        found, _ = spread(lambda r: self._probes.replicate(self._gain.signs, r))
        return [self._gain.noise_of(group, found) for group in self._probes.groups]

    def forget(self) -> None:
        """Let go of the directions."""
        for group in self._probes.groups:
            self._gain.batch.kept.get(DIRECTIONS, {}).pop(group, None)

    def products(self, counts: Sequence[int]) -> dict[str, int]:
        """As a plan has them: by layer."""
        found: dict[str, int] = {}
        for group, count in zip(self._probes.groups, counts):
            for place in group:
                name = self._probes.squares[place].layer.name
                found[name] = max(count, found.get(name, 0))
        return found


def choose(
    batch: Linearisation,
    seed: int,
    *,
    samples: int,
    aim: Aim,
    ordered: bool,
    groups: Mapping[str, int] | None = None,
    outer: bool = True,
) -> Choice:
    """What to take against the noise of `samples` samples, the first of which are `batch`.

    Directions need the samples in one order (`ordered`), a double backward, and memory. `outer`: the Gauss-Newton part
    is known exactly. What Hutchinson would take is asked where the `aim` is open and signs are noisy.
    """
    if not batch.sites:
        return Choice()
    gain = Gain(batch, seed, samples=samples, aim=aim, ordered=ordered, groups=groups, outer=outer)
    if not gain.total:
        return Choice()
    price = gain.price(gain.total, 1.0, 0.0)
    alone = found = _Found(Choice(price=price, signs=price), gain.total)
    noisy = gain.total > QUIET * gain.size
    chosen = _with_directions(gain, alone)
    tried = aim.replicates or chosen.price > WORTH * batch.samples / samples
    if noisy and tried and not batch.free:
        found = _with_products(gain, alone)
        if found is not alone:
            other = _with_directions(gain, found)
            chosen = other if other.price * NEARLY < chosen.price else chosen
    kept = found.propagator.probes.groups if found.propagator and chosen.probe_rank else ()
    if not chosen.deflate:
        batch.kept.pop(DEFLATION, None)
    batch.kept[DIRECTIONS] = {group: d for group, d in batch.kept.get(DIRECTIONS, {}).items() if group in kept}
    if noisy and aim.open:
        chosen = replace(chosen, hutchinson=gain.hutchinson(FEW))
        if chosen.hutchinson * PAYS < chosen.price:  # a few replicates with heavy tails say little
            chosen = replace(chosen, hutchinson=gain.hutchinson(MANY))
            if chosen.price == chosen.signs:
                plain = Propagator(batch, groups=groups)
                drawn = spread(lambda r: gain.by_signs(plain, r), MANY)
                chosen = replace(chosen, price=gain.price(math.fsum(drawn[0].values()), 1.0, 0.0))
    return chosen


@dataclass(frozen=True)
class _Found:
    """A choice, the variance of what it leaves to signs and of its products, the time that these take, its passes."""

    choice: Choice
    rest: float
    products: float = 0.0
    each: float = 0.0
    once: float = 0.0
    propagator: Propagator | None = None


def _with_products(gain: Gain, alone: _Found) -> _Found:
    """Products at the outputs of the noisiest groups of layers, as long as one more pays."""
    layers = [*gain.batch.layers, *gain.batch.shared]
    candidates = gain.batch.together([place for place, _ in Propagator.probed(gain.batch)])
    names, rest, best, held = list[str](), gain.total, alone.choice.price, 0.0
    known: dict[int, list[float]] = {rank: [] for rank in RANKS[:2]}
    for group in sorted(candidates, key=lambda g: -gain.noise_of(g, gain.noise))[:MOST]:
        own = gain.noise_of(group, gain.noise)
        if own < SHARE * rest:
            break
        mine = [name for name in dict.fromkeys(layers[place].name for place in group) if name not in names]
        try:
            one = _Served(gain, mine, held)
            tried = {rank: left for rank in known if (left := one.noises(rank)) is not None}
        except UncoveredModelError:  # no product there
            continue
        both = {rank: [*known[rank], *tried[rank]] for rank in known if rank in tried}
        price = min(gain.counts(rest - own, each, PRODUCT * r * len(each))[0][0] for r, each in both.items())
        if price < BETTER * best:
            names, rest, best, known, held = [*names, *mine], rest - own, price, both, held + one.held
        else:
            one.forget()
    if not names:
        return alone
    served = _Served(gain, names)
    rest = math.fsum(spread(lambda r: gain.by_signs(served.propagator, r))[0].values())  # mixed terms may be left
    best, found = alone.choice.price / PAYS, alone
    for rank in RANKS:
        noises = served.noises(rank)
        if noises is None:
            break
        once = PRODUCT * rank * served.count
        ways = gain.counts(rest, noises, once)
        if ways[0][0] > best * (FURTHER if found is not alone and rank > RANKS[1] else 1.0):
            if rank < RANKS[1]:
                continue
            break
        best = ways[0][0]
        price, counts = min((one for one in ways if one[0] <= NEARLY * best), key=lambda one: sum(one[1]))
        choice = replace(alone.choice, probes=served.products(counts), probe_rank=rank, price=price)
        beyond = math.fsum(n / k for n, k in zip(noises, counts))
        found = _Found(choice, rest, beyond, PRODUCT * sum(counts), once, served.propagator)
    return found


def _with_directions(gain: Gain, found: _Found) -> Choice:
    """Directions of signs, where they leave enough less to these: as many as memory and time allow, or a few."""
    batch, choice = gain.batch, found.choice
    most = DIRECTION_SHARE * (2.0 * gain.need if gain.aim.replicates else gain.need - LEAST_REPLICATES) / DIRECTION
    rank = min(affordable_rank(batch, gain.samples), int(most))

    def price(rest: float, directions: int) -> float:
        each = 1.0 + PROJECTED + found.each
        return gain.price(rest + found.products, each, found.once + DIRECTION * directions)

    if (
        not gain.ordered
        or batch.crossing
        or batch.free
        or rank < DEFLATE_LEAST
        or price(0.0, DEFLATE_LEAST) > choice.price / PAYS
    ):
        return choice
    propagator = found.propagator or Propagator(batch, groups=gain.groups)
    try:
        if rounding(propagator, gain.signs, gain.known, DEFLATE_LEAST) > ROUNDED:
            return choice
        best = choice
        for directions in sorted({DEFLATE_LEAST, rank}):
            propagator.deflate(gain.signs, directions)
            left = math.fsum(spread(lambda r: gain.by_signs(propagator, r))[0].values())
            if price(left, directions) < BETTER * best.price:
                best = replace(choice, deflate=directions, price=price(left, directions))
            if left > LEFT * found.rest:
                break
        return best
    except UncoveredModelError:  # no double backward
        return choice


def spread(draw: Callable[[int], Tensors], count: int = FEW) -> tuple[dict[str, float], Tensors]:
    """(variance of one replicate, summed over the entries of each tensor; the mean), from a few.

    One after the other: sum_k (1 - 1/k) |d_k - mean of those before|^2 = (R - 1) variance, and none is kept.
    """
    mean, variance = draw(PILOT), dict[str, float]()
    for number in range(1, count):
        for name, found in draw(PILOT + number).items():
            off = found - mean[name]
            apart = float(off.square().sum()) * number / (number + 1) / (count - 1)
            variance[name] = variance.get(name, 0.0) + apart
            mean[name] += off / (number + 1)
    return variance, mean
