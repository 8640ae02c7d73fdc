"""What enters a pass of signs: the seeds of sites, and the outputs' cotangent, made when the pass comes to them.

All seeds at once are as large as all sites, and what they have become at the edges of the sites is as large again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from hessdiag.graph import Linearisation
from hessdiag.graph.linearise import Pull, Pulls
from hessdiag.graph.nodes import Edge
from hessdiag.graph.visit import Source

KEEP_ROOTS = 1 << 26
"""Square roots of all c are kept between replicates up to this size; beyond it signs are drawn as bytes, too."""
Draw = Callable[[int], Tensor]
"""Signs of a site, or its part of a direction."""


class Roots:
    """Square roots of the positive and of the negative c of one batch."""

    def __init__(self, batch: Linearisation) -> None:
        self.batch = batch
        self.small = sum(site.c.numel() * site.c.element_size() for site in batch.sites) <= KEEP_ROOTS
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._ends: dict[int, tuple[float, float]] = {}

    def any(self, number: int, sign: int) -> bool:
        """Whether a site has entries of this sign; a pair is in the passes of both."""
        if number not in self._ends:
            c = self.batch.sites[number].c
            self._ends[number] = (float(c.min()), float(c.max())) if c.numel() else (0.0, 0.0)
        low, high = self._ends[number]
        if self.batch.sites[number].right:
            return low < 0 or high > 0
        return high > 0 if sign > 0 else low < 0

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
        return seed * site.lam, seed * site.c.sign().mul_(sign / site.lam)


class Entering:
    """One pass: what enters at which nodes, for `hessdiag.graph.visit`.

    Of all sites but those `without`, for `drawn`, and of the outputs what `output` makes.
    """

    def __init__(
        self,
        roots: Roots,
        sign: int,
        drawn: Draw | None,
        output: Callable[[], Tensor] | None,
        *,
        without: Collection[int] = (),
    ) -> None:
        self.batch, self._roots, self._sign, self._output = roots.batch, roots, sign, output
        self._drawn: dict[int, Callable[[], Tensor]] = {}
        self._own: dict[int, Tensor] = {}
        """By layer what is known of seeds that have entered."""
        self._asked = Counter(one.site for one in self.batch.direct.values())
        self._direct: dict[int, Tensor | None] = {}
        """By site the seed that layers which feed it directly still ask for."""
        self._nodes: dict[int, tuple[Any, dict[int, list[tuple[Pull, Edge]]]]] = {}
        """Nodes by their id, and by site the legs that look at them."""
        if drawn is not None:
            chosen = [n for n in range(len(self.batch.sites)) if n not in without and roots.any(n, sign)]
            self._drawn = {number: partial(drawn, number) for number in chosen}
        for number in self._drawn:
            for pull, edge in self.batch.legs(number, above=True):
                self._nodes.setdefault(id(edge[0]), (edge[0], {}))[1].setdefault(number, []).append((pull, edge))
        if output is not None:
            end = self.batch.outputs.grad_fn
            self._nodes.setdefault(id(end), (end, {}))
        self.batch.own({})  # what it takes is read before any pass

    @property
    def sources(self) -> dict[int, tuple[Any, Source]]:
        """Nodes by their id, and what enters there."""
        return {key: (node, partial(self._at, node, legs)) for key, (node, legs) in self._nodes.items()}

    @property
    def outputs(self) -> bool:
        """Whether anything enters at the outputs."""
        return self._output is not None

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self._drawn) or self.outputs

    def seeds(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Those of a site, and of its second half if it is a pair."""
        drawn = self._drawn.get(number)
        return (None, None) if drawn is None else self._roots.seeds(number, self._sign, drawn())

    def remote(self, place: int, cotangent: Tensor) -> Tensor:
        """A layer's cotangent without what is known of what has entered."""
        direct = self.batch.direct.get(place)
        if direct is not None:
            cotangent = self.batch.remote(place, cotangent, {direct.site: self._direct.get(direct.site)})
            self._asked[direct.site] -= 1
            if not self._asked[direct.site]:
                self._direct.pop(direct.site, None)
        return cotangent - self._own.pop(place) if place in self._own else cotangent

    def _at(self, node: Any, legs: Mapping[int, list[tuple[Pull, Edge]]]) -> dict[int, Tensor]:
        """What enters at a node, by the number of its output."""
        pulls: Pulls = {}
        for number, looking in legs.items():
            sides = self.seeds(number)
            if self._asked[number]:
                self._direct[number] = sides[0]
            for pull, edge in looking:
                seed = sides[pull[1]]
                if seed is not None:
                    pulls[pull] = edge, self.batch.pulled(pull, seed)
        for place, share in self.batch.own(pulls).items():
            self._own[place] = self._own[place] + share if place in self._own else share
        found: dict[int, Tensor] = {}
        outputs = self.batch.outputs
        if self._output is not None and node is outputs.grad_fn:
            found[outputs.output_nr] = self._output().to(outputs.dtype).reshape(outputs.shape)
        while pulls:
            edge, vector = pulls.pop(next(iter(pulls)))
            found[edge[1]] = found[edge[1]] + vector if edge[1] in found else vector
        return found
