"""The directions in which one layer's parameters move its output, and what second derivatives along them say.

For a layer a = W x + b the functional part of H_kk is sum_j c_j (dz_j/da . da/dtheta_k)^2. Three ways, per
layer whichever costs least:

neurons    a linear layer on vectors: one direction per output unit, all its weights by H_W = Q^T x^2 weights
one direction per scalar parameter, da/dW_ok = the inputs that W_ok sees positions  one direction per output
position: the S x S block B_o of each output channel, then sum_n x_k^T B_o x_k

Directions of all samples share a pass: samples do not mix (checked by whoever calls). A sample that owns several rows
of the batch axis has their outputs moved together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UncoveredModelError
from ..sites import Layer, Linearisation, Site, edge_shape
from ..sites.nodes import constant
from ..squares import LayerSquares
from ..unfold import matrix_input, patches
from .collector import Collector
from .pushforward import Route, Tangent

BANDED = 12  # fewer directions per channel than this are worth no pass of their own


@dataclass(frozen=True)
class Shape:
    """A layer's output seen as [N, groups * channels, positions] and its inputs as [N, groups, fan,
    positions].
    """

    channels: int
    positions: int
    fan: int


class Directions:
    """All functional second derivatives along one layer's own parameters.

    `run(mode, into, count)` fills `into` for every parameter of the layer; `count` is how many directions
    share a pass.
    """

    def __init__(self, batch: Linearisation, layer: Layer, route: Route) -> None:
        self.batch, self.layer, self.route = batch, layer, route
        self.samples = batch.samples
        self.out = edge_shape((layer.node, 0))
        self.shape = self._shape()

    def _shape(self) -> Shape:
        layer = self.layer
        if layer.kind == "conv":
            weight = layer.node._saved_weight
            return Shape(weight.shape[0], self.out[2:].numel(), weight[0].numel())
        if layer.kind == "linear":
            fan = matrix_input(layer.node).shape[-1] if layer.weight else 0
            return Shape(self.out[-1], self.out.numel() // (self.out[-1] * self.samples), fan)
        return Shape(0, 0, 0)

    def modes(self) -> dict[str, int]:
        """Directions that each possible way takes."""
        layer, shape = self.layer, self.shape
        if layer.kind == "linear" and shape.positions == 1:
            return {"neurons": shape.channels}
        parameters = self.batch.objective.parameters
        own = sum(parameters[name].numel() for name in (layer.weight, layer.bias) if name)
        folded = layer.kind == "conv" and self.out[0] != self.samples  # rows of one sample may meet above
        if layer.kind in ("conv", "linear") and layer.weight and not folded:
            return {"weights": own, "positions": shape.channels * shape.positions}
        return {"weights": own}

    def run(self, mode: str, into: Collector, count: int) -> None:
        """Serve every parameter of the layer."""
        if mode == "neurons":
            self._neurons(into, count)
        elif mode == "positions":
            self._positions(into)
        else:
            for name, indices, seed in self._weights(count):
                into.add(name, indices, self._total(seed))

    # -- sums over sites

    def _total(self, seed: Tangent) -> Tensor:
        """[K, N]: sum over the sites of each sample of c dz^2."""
        total = torch.zeros(len(seed.value), self.samples, dtype=torch.float64, device=seed.value.device)
        for _, site, tangent in self.route.run(seed):
            value, c = self._at_site(site, tangent)
            total += (value * c).mul_(value).sum(2)
        return total

    def _at_site(self, site: Site, tangent: Tangent) -> tuple[Tensor, Tensor]:
        """Dz as [K, N, j] and c as [N, j], a pending factor counted with c."""
        value = tangent.value
        factor = tangent.factor
        c = site.c
        if factor is not None:
            c = c * factor.square()
        c = tangent.narrowed(c)
        return value.reshape(len(value), self.samples, -1), c.reshape(self.samples, -1)

    # -- the three ways

    def _neurons(self, into: Collector, count: int) -> None:
        layer, (samples, units) = self.layer, (self.samples, self.shape.channels)
        like = self.batch.outputs
        for low in range(0, units, count):
            high = min(low + count, units)
            seed = torch.zeros(high - low, samples, units, dtype=like.dtype, device=like.device)
            rows = torch.arange(high - low, device=seed.device)
            seed[rows, :, rows + low] = 1
            q = self._total(Tangent(seed.reshape(-1, *self.out)))
            if layer.bias:
                into.add(layer.bias, slice(low, high), q)
            if layer.weight:
                into.outer(layer.weight, low, q, matrix_input(layer.node).reshape(samples, -1).square())

    def _inputs(self) -> Tensor:
        """[rows, groups, fan, positions]; the rows of a linear layer's sample count as positions."""
        node = self.layer.node
        if self.layer.kind == "conv":
            return patches(node._saved_input.detach(), node, node._saved_weight.shape, node._saved_groups)
        x = matrix_input(node)
        return x.reshape(self.samples, 1, self.shape.positions, -1).transpose(2, 3)

    def _weights(self, count: int) -> Iterator[tuple[str, slice, Tangent]]:
        layer = self.layer
        if layer.kind == "conv" or layer.kind == "linear":
            if layer.weight:
                yield from self._products(layer.weight, self._inputs(), count)
            if layer.bias:
                rows = self.out[0] if layer.kind == "conv" else self.samples
                ones = self.batch.outputs.new_ones(rows, 1, 1, self.shape.positions)
                yield from self._products(layer.bias, ones, count)
        elif layer.kind == "norm":
            node = layer.node
            for name, values in (
                (layer.weight, LayerSquares(layer, self.samples)._normalised),
                (layer.bias, None),
            ):
                if name:
                    values_now = torch.ones_like(node._saved_input) if values is None else values()
                    yield from self._channels(name, values_now, count)
        else:
            yield from self._elementwise(count)

    def _products(self, name: str, inputs: Tensor, count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """da/dW_ok: channel o carries the inputs [n, group of o, k, :]."""
        groups, fan = inputs.shape[1], inputs.shape[2]
        channels = self.shape.channels
        if self.layer.kind == "conv" and fan >= BANDED:
            for channel in range(channels):
                rows = inputs[:, channel * groups // channels].transpose(0, 1)
                for low in range(0, fan, count):
                    value = rows[low : low + count].reshape(-1, self.out[0], 1, *self.out[2:])
                    first = channel * fan + low
                    band = (channel, channel + 1)
                    yield name, slice(first, first + len(value)), Tangent(value, None, band)
            return
        last = self.layer.kind == "linear"
        for low in range(0, channels * fan, count):
            flat = torch.arange(low, min(low + count, channels * fan), device=inputs.device)
            o, k = flat // fan, flat % fan
            values = inputs[:, o * groups // channels, k].transpose(0, 1)
            seed = values.new_zeros(len(flat), len(inputs), channels, self.shape.positions)
            seed[torch.arange(len(flat), device=seed.device), :, o] = values
            yield (
                name,
                slice(low, low + len(flat)),
                Tangent((seed.transpose(2, 3) if last else seed).reshape(-1, *self.out)),
            )

    def _channels(self, name: str, values: Tensor, count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """One direction per channel: BatchNorm's gain and bias."""
        channels = values.shape[1]
        for low in range(0, channels, count):
            high = min(low + count, channels)
            seed = values.new_zeros(high - low, *values.shape)
            picked = torch.arange(low, high, device=values.device)
            seed[picked - low, :, picked] = values[:, low:high].transpose(0, 1)
            yield name, slice(low, high), Tangent(seed)

    def _elementwise(self, count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """A parameter added or multiplied elementwise: unit parameters, broadcast as the node broadcasts."""
        layer = self.layer
        name = layer.weight or layer.bias
        assert name is not None
        parameter = self.batch.objective.parameters[name]
        if parameter.ndim == len(self.out) and parameter.shape[0] != 1:
            raise UncoveredModelError(
                f"parameter {name!r} of shape {list(parameter.shape)} does not broadcast over the samples"
            )
        slot = next(i for i, (s, _) in enumerate(layer.node.next_functions) if hasattr(s, "variable"))
        other = None
        if layer.kind == "scale":
            other = constant(layer.node, slot)
        size = parameter.numel()
        for low in range(0, size, count):
            high = min(low + count, size)
            unit = torch.zeros(high - low, size, dtype=parameter.dtype, device=parameter.device)
            rows = torch.arange(high - low, device=unit.device)
            unit[rows, rows + low] = 1
            unit = unit.reshape(-1, *(1,) * (len(self.out) - parameter.ndim), *parameter.shape)
            seed = unit.expand(-1, *self.out) if other is None else (unit * other).expand(-1, *self.out)
            yield name, slice(low, high), Tangent(seed)

    def _positions(self, into: Collector) -> None:
        """One direction per position gives each channel's S x S block; then products with the inputs."""
        layer = self.layer
        inputs = self._inputs()
        groups, fan = inputs.shape[1], inputs.shape[2]
        for o in range(self.shape.channels):
            block = self._block(o)
            if layer.bias:
                into.add(layer.bias, slice(o, o + 1), block.sum((1, 2)).double()[None])
            assert layer.weight is not None
            x = inputs[:, o * groups // self.shape.channels]
            values = ((x @ block) * x).sum(2).T
            into.add(layer.weight, slice(o * fan, (o + 1) * fan), values.double())

    def _block(self, o: int) -> Tensor:
        """[N, S, S]: sum over sites of c dz/da_os dz/da_os' for channel o."""
        samples, places = self.samples, self.shape.positions
        like = self.batch.outputs
        eye = torch.eye(places, dtype=like.dtype, device=like.device)
        if self.layer.kind == "conv":
            value = eye[:, None, None].expand(-1, samples, -1, -1).reshape(places, samples, 1, *self.out[2:])
            seed = Tangent(value, None, (o, o + 1))
        else:
            value = like.new_zeros(places, samples, places, self.shape.channels)
            value[..., o] = eye[:, None]
            seed = Tangent(value.reshape(-1, *self.out))
        block = like.new_zeros(samples, places, places)
        for _, site, tangent in self.route.run(seed):
            t, c = self._at_site(site, tangent)
            block += torch.einsum("knj,nj,lnj->nkl", t, c, t)
        return block
