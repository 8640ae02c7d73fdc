"""What enters a pass of signs: the seeds of sites, and the outputs' cotangent, made when the pass comes to them.

All seeds at once are as large as all sites, and what they have become at the edges of the sites is as large again.
Where that is little, they are made at once all the same: a hook at every node takes time of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessdiag.graph import Linearisation
from hessdiag.graph.linearise import Pull, Pulls
from hessdiag.graph.nodes import Edge
from hessdiag.graph.visit import Entrances, Entry

KEEP_ROOTS = 1 << 26
"""Up to this size of all c their square roots are kept between replicates, and all seeds enter at once; beyond it signs
are drawn as bytes, too, once in each pass.
"""
Draw = Callable[[int], Tensor]
"""Signs of a site, or its part of a direction."""


@dataclass(frozen=True)
class _Plan:
    """Where seeds of the same sites enter, the outputs' cotangent with them or not: the same in every pass."""

    sites: Collection[int]
    entrances: Entrances
    legs: Mapping[int, Mapping[int, Sequence[tuple[Pull, Edge]]]]
    """By the id of a node, and by site, the legs that look at it."""
    asked: Counter[int]
    """How often a pass asks for the seeds of a site."""


class Roots:
    """Square roots of the positive and of the negative c of one batch, sites `without` left out; where they enter."""

    def __init__(self, batch: Linearisation, without: Collection[int] = ()) -> None:
        self.batch, self._without = batch, without
        self.small = sum(site.c.numel() * site.c.element_size() for site in batch.sites) <= KEEP_ROOTS
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._plans: dict[tuple[int, bool], _Plan] = {}

    def plan(self, sign: int, output: bool) -> _Plan:
        """Of the sites with c of this sign (0: of none)."""
        if (sign, output) not in self._plans:
            self._plans[sign, output] = self._planned(sign, output)
        return self._plans[sign, output]

    def seeds(self, number: int, sign: int, drawn: Tensor) -> tuple[Tensor, Tensor | None]:
        """Signs (or a direction) times sqrt(max(+-c, 0)), and of a pair those of its second half."""
        site = self.batch.sites[number]
        root = self._kept.get((number, sign))
        if root is None:
            root = site.c.abs().sqrt_().mul_(0.5) if site.right else (site.c * sign).clamp_(min=0).sqrt_()
        if self.small:
            self._kept[number, sign] = root
        s = drawn.reshape(root.shape)
        seed = root * s if self.small else root.mul_(s)
        if not site.right:
            return seed, None
        other = seed * site.c.sign().mul_(sign / site.lam)
        return seed if site.lam == 1.0 else seed * site.lam, other

    def _planned(self, sign: int, output: bool) -> _Plan:
        batch = self.batch
        sites = [n for n in range(len(batch.sites)) if sign and n not in self._without and self._any(n, sign)]
        asked = Counter(one.site for one in batch.direct.values())
        asked.update(batch.free | batch.crossing.keys())  # when the pass is over
        legs: dict[int, dict[int, list[tuple[Pull, Edge]]]] = {}
        edges: list[Edge] = []
        for number in sites:
            for pull, edge in batch.legs(number, above=True):
                legs.setdefault(id(edge[0]), {}).setdefault(number, []).append((pull, edge))
                edges.append(edge)
        for mine in legs.values():
            asked.update(mine.keys())
        if output:
            edges.append((batch.outputs.grad_fn, batch.outputs.output_nr))
        batch.own({})  # what it takes is read before any pass
        return _Plan(frozenset(sites), Entrances(batch, edges), legs, asked)

    def _any(self, number: int, sign: int) -> bool:
        """Whether a site has entries of this sign; a pair is in the passes of both."""
        c = self.batch.sites[number].c
        low, high = (float(c.min()), float(c.max())) if c.numel() else (0.0, 0.0)
        if self.batch.sites[number].right:
            return low < 0 or high > 0
        return high > 0 if sign > 0 else low < 0


class Entering:
    """One pass: what enters at which nodes, for `hessdiag.graph.visit`.

    Of all sites of `roots`, for `drawn`, and of the outputs what `output` makes.
    """

    def __init__(self, roots: Roots, sign: int, drawn: Draw | None, output: Callable[[], Tensor] | None) -> None:
        self.batch, self._roots, self._sign, self._output, self._drawn = roots.batch, roots, sign, output, drawn
        self._plan = roots.plan(0 if drawn is None else sign, output is not None)
        self._own: dict[int, Tensor] = {}
        """By layer what is known of seeds that have entered."""
        self._asked = Counter(self._plan.asked)
        self._seeds: dict[int, tuple[Tensor, Tensor | None]] = {}
        """By site, those that will be asked for again."""

    @property
    def entrances(self) -> Entrances:
        """The edges at which it does."""
        return self._plan.entrances

    @property
    def outputs(self) -> bool:
        """Whether anything enters at the outputs."""
        return self._output is not None

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self._plan.sites) or self.outputs

    def seeds(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Those of a site, and of its second half if it is a pair."""
        if self._drawn is None or number not in self._plan.sites:
            return None, None
        found = self._seeds.pop(number, None)
        if found is None:
            found = self._roots.seeds(number, self._sign, self._drawn(number))
        self._asked[number] -= 1
        if self._asked[number] > 0:
            self._seeds[number] = found
        return found

    def remote(self, place: int, cotangent: Tensor) -> Tensor:
        """A layer's cotangent without what is known of what has entered."""
        direct = self.batch.direct.get(place)
        if direct is not None:
            cotangent = self.batch.remote(place, cotangent, {direct.site: self.seeds(direct.site)[0]})
        return cotangent - self._own.pop(place) if place in self._own else cotangent

    def at(self, nodes: Sequence[Any]) -> list[Entry]:
        """What enters at some nodes."""
        pulls: Pulls = {}
        ours: set[Pull] = set()
        for node in nodes:
            for number, looking in self._plan.legs.get(id(node), {}).items():
                sides = self.seeds(number)
                for pull, edge in looking:
                    seed = sides[pull[1]]
                    if seed is not None:
                        pulls[pull] = edge, self.batch.pulled(pull, seed)
                        if not self._roots.small and _fresh(pulls[pull][1], seed):
                            ours.add(pull)
        shares = self.batch.own(pulls)
        for place, share in shares.items():
            self._own[place] = self._own[place] + share if place in self._own else share
        if shares:
            ours.clear()  # they may be what enters, as it is
        found: list[Entry] = [(edge, vector, pull in ours) for pull, (edge, vector) in pulls.items()]
        outputs = self.batch.outputs
        if self._output is not None and any(node is outputs.grad_fn for node in nodes):
            end = outputs.grad_fn, outputs.output_nr
            found.append((end, self._output().to(outputs.dtype).reshape(outputs.shape), False))
        return found


def _fresh(vector: Tensor, seed: Tensor) -> bool:
    """Whether what a seed became is a tensor of its own, and one that can be written over."""
    return vector.is_contiguous() and vector.untyped_storage().data_ptr() != seed.untyped_storage().data_ptr()
