"""Layers whose weights act alike at every position: a_ns = W x_ns + b, s a token or an output pixel.

Exact second derivatives along W_ok (output channel o, entry k of what a position sees) in one of two ways: one
direction per weight, da_s = x_ks in channel o; or one direction per output position, which gives the block
B_o [S, S] = sum over the sites of c dz_s dz_s' of each sample and channel, and then x_k^T B_o x_k for all its weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hessdiag.graph.layers.layer import Along, Into, LayerKind, Way
from hessdiag.graph.tangents import Tangent


class PositionWise(LayerKind):
    """What linear layers with positions and convolutions share in exact second derivatives."""

    blocks = True
    """One direction per position may serve."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Output channels."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """Output positions of a row."""

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Weights of one output channel."""

    @abstractmethod
    def seen(self) -> Tensor:
        """[rows, groups, fan, positions]: what each output position sees."""

    @abstractmethod
    def ones(self) -> Tensor:
        """The same for the bias."""

    @abstractmethod
    def placed(self, seed: Tensor) -> Tensor:
        """[K, rows, channels, positions] in the order of the layer's output."""

    @abstractmethod
    def eye(self, channel: int) -> Tangent:
        """One direction per position, in one channel."""

    def ways(self, parameters: Mapping[str, Tensor]) -> list[Way]:
        """One direction per weight, or one per position."""
        ways = super().ways(parameters)
        if self.layer.weight and self.blocks:
            passes, places, fan = self.channels * self.positions, self.positions, self.fan_in

            def extra(entries: int) -> float:
                return passes * (entries + self.samples * fan * places) * 1.0 * places / 8

            ways.append(Way(passes, self._positions, places, extra))
        return ways

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """Channel o carries what W_ok sees, for every o and k."""
        if self.layer.weight:
            yield from self._products(self.layer.weight, self.seen(), count)
        if self.layer.bias:
            yield from self._products(self.layer.bias, self.ones(), count)

    def _products(self, name: str, inputs: Tensor, count: int) -> Iterator[tuple[str, slice, Tangent]]:
        groups, fan = inputs.shape[1], inputs.shape[2]
        channels = self.channels
        for low in range(0, channels * fan, count):
            flat = torch.arange(low, min(low + count, channels * fan), device=inputs.device)
            o, k = flat // fan, flat % fan
            values = inputs[:, o * groups // channels, k].transpose(0, 1)
            seed = values.new_zeros(len(flat), len(inputs), channels, self.positions)
            seed[torch.arange(len(flat), device=seed.device), :, o] = values
            yield name, slice(low, low + len(flat)), Tangent(self.placed(seed).reshape(-1, *self.out))

    def _positions(self, along: Along, into: Into, count: int) -> None:
        """One direction per position gives each channel's S x S block; then products with the inputs."""
        inputs = self.seen()
        groups, fan = inputs.shape[1], inputs.shape[2]
        weight, bias = self.layer.weight, self.layer.bias
        assert weight is not None
        for o in range(self.channels):
            block = along.block(self.eye(o))
            if bias:
                into.add(bias, slice(o, o + 1), block.sum((1, 2)).double()[None])
            x = inputs[:, o * groups // self.channels]
            values = ((x @ block) * x).sum(2).T
            into.add(weight, slice(o * fan, (o + 1) * fan), values.double())
