"""Second derivatives along one layer's own parameters: sums over the sites above, for directions of its output.

For a layer a = W x + b the functional part of H_kk is sum_j c_j (dz_j/da . da/dtheta_k)^2. Which directions of a say
all of it is the layer kind's knowledge (`LayerKind.ways`); what they say is summed here. Directions of all samples
share a pass: samples do not mix (checked by whoever calls). A sample that owns several rows of the batch axis has their
outputs moved together. A parameter that is applied more than once has no layer of its own: its directions start at
itself, one for each entry, and pass all its uses. What they add where no sample is, at the sites of what is computed
from parameters alone, is dealt out evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.graph import Layer, Linearisation, Site
from hessdiag.graph.layers import Way
from hessdiag.graph.layers.layer import Along, Into
from hessdiag.graph.route import Route
from hessdiag.graph.tangents import Tangent


@dataclass(frozen=True)
class Shared:
    """A parameter that is applied more than once, or computed with first: directions start at itself, `node`."""

    name: str
    node: Any

    def ways(self, parameters: Mapping[str, Tensor]) -> list[Way]:
        """One direction for each of its entries."""
        parameter = parameters[self.name]
        size = parameter.numel()

        def run(along: Along, into: Into, count: int) -> None:
            for low in range(0, size, count):
                high = min(low + count, size)
                unit = torch.zeros(high - low, size, dtype=parameter.dtype, device=parameter.device)
                rows = torch.arange(high - low, device=unit.device)
                unit[rows, rows + low] = 1
                into.add(self.name, slice(low, high), along.total(Tangent(unit.reshape(-1, *parameter.shape))))

        return [Way(size, run)]


def starts(batch: Linearisation) -> list[Layer | Shared]:
    """Where directions start: at layers, and at shared parameters."""
    return [*batch.layers, *(Shared(name, batch.graph.leaf(name)) for name in batch.graph.shared_names)]


def ways_of(batch: Linearisation, start: Layer | Shared) -> list[Way]:
    """How all second derivatives of what starts there can be had."""
    parameters = batch.objective.parameters
    return start.ways(parameters) if isinstance(start, Shared) else start.on(batch.samples).ways(parameters)


class Directions:
    """Sums over the sites that a route reaches; each pass moves as many directions as the seeds hold."""

    def __init__(self, batch: Linearisation, route: Route) -> None:
        self.batch, self.route, self.samples = batch, route, batch.samples

    def total(self, *seeds: Tangent) -> Tensor:
        """[K, N]: sum over the sites of each sample of c dz^2, one seed for each start of the route."""
        count = sum(len(seed.value) for seed in seeds)
        total = torch.zeros(count, self.samples, dtype=torch.float64, device=seeds[0].value.device)
        for number, site, tangent, other in self.route.run(seeds):
            if number in self.batch.free:
                total += self._free(site, tangent, other)[:, None] / self.samples
                continue
            value, c = self._at_site(site, tangent)
            if other is None:
                total += self.weighted_squares(value, c)
            else:
                total += (value * c).mul_(self._at_site(site, other)[0]).sum(2)
        return total

    def weighted_squares(self, value: Tensor, c: Tensor) -> Tensor:
        """[K, N]: sum over j of c value^2, by products that sum as they go."""
        return (value.square().transpose(0, 1) @ c[:, :, None])[..., 0].T

    def block(self, seed: Tangent) -> Tensor:
        """[N, K, K]: sum over the sites of each sample of c dz_k dz_l (of pairs c dz_k dw_l, whose mean with its
        transpose is meant).
        """
        places = len(seed.value)
        block = self.batch.outputs.new_zeros(self.samples, places, places)
        for _, site, tangent, other in self.route.run([seed]):
            value, c = self._at_site(site, tangent)
            left = value.transpose(0, 1)
            right = left if other is None else self._at_site(site, other)[0].transpose(0, 1)
            block += (left * c[:, None]) @ right.transpose(1, 2)
        return block

    def _free(self, site: Site, tangent: Tangent, other: Tangent | None) -> Tensor:
        """[K]: the sum over a site of the free side."""
        dz = tangent.dense(site.c.shape)
        dw = dz if other is None else other.dense(site.c.shape)
        return (dz.double() * site.c.double() * dw.double()).reshape(len(dz), -1).sum(1)

    def _at_site(self, site: Site, tangent: Tangent) -> tuple[Tensor, Tensor]:
        """dz as [K, N, j] and c as [N, j], a pending factor counted with c."""
        value = tangent.value
        factor = tangent.factor
        c = site.c
        if factor is not None:
            c = c * factor.square()
        c = tangent.narrowed(c)
        return value.reshape(len(value), self.samples, -1), c.reshape(self.samples, -1)


class Recorded:
    """In the place of `Directions`: keeps the seeds that a way would move, and then gives it what they came to.

    So the directions of many layers can share a pass: each way runs twice, first into nothing.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.seeds: list[Tangent] = []
        self.totals: Iterator[Tensor] | None = None

    def total(self, seed: Tangent) -> Tensor:
        """Zeros while seeds are recorded."""
        if self.totals is not None:
            return next(self.totals)
        self.seeds.append(seed)
        return torch.zeros(len(seed.value), self.samples, dtype=torch.float64, device=seed.value.device)

    def block(self, seed: Tangent) -> Tensor:
        """Of a single direction, its total. More of them must share a pass by themselves, and are never recorded."""
        assert len(seed.value) == 1
        return self.total(seed).T[:, :, None].to(seed.value.dtype)


class Nowhere:
    """Where second derivatives go that are not meant."""

    def add(self, name: str, indices: slice, values: Tensor) -> None:
        """Nothing."""

    def outer(self, name: str, low: int, rows: Tensor, columns: Tensor) -> None:
        """Nothing."""

    def scatter(self, name: str, places: Tensor, values: Tensor) -> None:
        """Nothing."""
