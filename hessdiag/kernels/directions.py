"""Second derivatives along one layer's own parameters: sums over the sites above, for directions of its output.

For a layer a = W x + b the functional part of H_kk is sum_j c_j (dz_j/da . da/dtheta_k)^2. Which directions of a say
all of it is the layer kind's knowledge (`LayerKind.ways`); what they say is summed here. Directions of all samples
share a pass: samples do not mix (checked by whoever calls). A sample that owns several rows of the batch axis has their
outputs moved together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessdiag.graph import Layer, Linearisation, Site
from hessdiag.graph.route import Route
from hessdiag.graph.tangents import Tangent


class Directions:
    """Sums over the sites that one layer reaches; each pass moves as many directions as the seed holds."""

    def __init__(self, batch: Linearisation, layer: Layer, route: Route) -> None:
        self.batch, self.route, self.samples = batch, route, batch.samples
        self.ways = layer.on(batch.samples).ways(batch.objective.parameters)

    def total(self, seed: Tangent) -> Tensor:
        """[K, N]: sum over the sites of each sample of c dz^2."""
        total = torch.zeros(len(seed.value), self.samples, dtype=torch.float64, device=seed.value.device)
        for _, site, tangent, other in self.route.run(seed):
            value, c = self._at_site(site, tangent)
            total += (value * c).mul_(value if other is None else self._at_site(site, other)[0]).sum(2)
        return total

    def block(self, seed: Tangent) -> Tensor:
        """[N, K, K]: sum over the sites of each sample of c dz_k dz_l (of pairs c dz_k dw_l, whose mean with its
        transpose is meant).
        """
        places = len(seed.value)
        block = self.batch.outputs.new_zeros(self.samples, places, places)
        for _, site, tangent, other in self.route.run(seed):
            t, c = self._at_site(site, tangent)
            block += torch.einsum("knj,nj,lnj->nkl", t, c, t if other is None else self._at_site(site, other)[0])
        return block

    def _at_site(self, site: Site, tangent: Tangent) -> tuple[Tensor, Tensor]:
        """dz as [K, N, j] and c as [N, j], a pending factor counted with c."""
        value = tangent.value
        factor = tangent.factor
        c = site.c
        if factor is not None:
            c = c * factor.square()
        c = tangent.narrowed(c)
        return value.reshape(len(value), self.samples, -1), c.reshape(self.samples, -1)
