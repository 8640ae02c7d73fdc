"""A transposed convolution: a_ot = sum over pixels s and kernel places k with t = stride s + k of W_iok x_is, plus b_o.

It is the convolution with input and output exchanged: G_n[i, o, k] = sum_s x_is delta_o(stride s + k), of the patches
of delta that each input pixel reaches. Exact second derivatives along W_iok move what x_i puts into channel o by place
k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.chunks import chunk_samples, grouped, outer
from hessdiag.graph.layers.conv import Conv, patches
from hessdiag.graph.layers.layer import Half, Layer, LayerKind
from hessdiag.graph.sites.site import Legs
from hessdiag.graph.tangents import Tangent


class Transposed(Conv):
    """Transposed convolutions of any dimension, groups, dilation and output padding."""

    name = "transposed conv"

    @classmethod
    def takes(cls, node: Any) -> bool:
        """A convolution that is transposed."""
        return node.name() in cls.nodes and saved.flag(node, "transposed")

    @classmethod
    def fan(cls, node: Any) -> int:
        """Weights per output pixel and channel, each of which meets every stride-th pixel."""
        weight, strides = saved.tensor(node, "weight"), saved.integers(node, "stride")
        groups = saved.integer(node, "groups")
        return max(int(weight[:, 0].numel() / groups / torch.Size(strides).numel()), 1)

    @classmethod
    def kept_bytes(cls, layer: Layer) -> int:
        """Nothing is held."""
        return 0

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum c x^2 and sum c, over samples and pixels."""
        out = {}
        c = c.reshape(self.out)
        if self.layer.weight:
            total = torch.zeros(self._kernel, dtype=torch.float64, device=c.device)
            for part in self._outer(self._x.square(), c, 1):
                total += part.sum(0)
            out[self.layer.weight] = total
        if self.layer.bias:
            out[self.layer.bias] = c.flatten(2).sum((0, 2))
        return out

    def gram(self, delta: Tensor) -> Tensor:
        """By double backward of the gradients."""
        return LayerKind.gram(self, delta)

    def over(self, deltas: Sequence[Tensor], signs: Sequence[float]) -> dict[str, Tensor]:
        """One pass after the other."""
        return LayerKind.over(self, deltas, signs)

    def some(self, delta: Tensor, low: int, high: int) -> dict[str, Tensor]:
        """Of some samples."""
        return LayerKind.some(self, delta, low, high)

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """2 sum_is dx_is (dW g_s)_i, g_s what pixel s reaches of g: pairs of lam_s dx_is and (dW g_s)_i / lam_s."""
        node, given = self.layer.node, self._x.shape
        g = patches(adjoint.reshape(self.out), node, self._kernel, self._groups, given[2:])
        size = torch.linalg.vector_norm(g, dim=2, keepdim=True)
        lam, live = size.sqrt(), size > 0
        shape = (self.rows, self._groups, given[1] // self._groups, -1)
        c = (2.0 * live.to(g.dtype)).expand(shape).reshape(given)
        half = _Turned(self, g / torch.where(live, lam, 1.0))
        edges = node.next_functions
        return c, ((edges[0], lam.expand(shape).reshape(given)),), ((edges[1], half),)

    def _weights(self, delta: Tensor, group: int) -> Iterator[Tensor]:
        yield from self._outer(self._x, delta, group * self.fold)

    def _outer(self, x: Tensor, delta: Tensor, group: int) -> Iterator[Tensor]:
        """Sums over groups of rows of x_is delta_o(stride s + k), in chunks of rows whose patches fit into memory."""
        places = x[0, 0].numel()
        each = 2 * self._kernel[1:].numel() * self._groups * places * delta.element_size()
        step = chunk_samples(each, group, delta.device)
        for low in range(0, self.rows, step):
            seen = patches(delta[low : low + step], self.layer.node, self._kernel, self._groups, x.shape[2:])
            own = x[low : low + step].reshape(len(seen), self._groups, -1, places)
            for part in outer(own, seen, group):
                yield part.reshape(-1, *self._kernel)

    # -- second derivatives along single parameters

    @property
    def blocks(self) -> bool:  # type: ignore[override]
        """Weights lie otherwise than output channels."""
        return False

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.out[1]

    @property
    def fan_in(self) -> int:
        """Weights of one output channel."""
        return self._kernel[0] // self._groups * self._kernel[2:].numel()

    def seen(self) -> Tensor:
        """[rows, input channels, kernel places, output pixels]: what x_i puts where by each place."""
        node, kernel = self.layer.node, self._kernel[2:]
        eye = torch.eye(kernel.numel(), dtype=self._x.dtype, device=self._x.device).reshape(1, -1, *kernel)
        spread = torch.convolution(
            self._x.reshape(-1, 1, *self._x.shape[2:]),
            eye,
            None,
            saved.integers(node, "stride"),
            saved.integers(node, "padding"),
            saved.integers(node, "dilation"),
            True,
            saved.integers(node, "output_padding"),
            1,
        )
        return spread.reshape(self.rows, self._kernel[0], kernel.numel(), -1)

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """Channel o carries what x_i puts there by place k, for every i, o and k."""
        if self.layer.weight:
            seen = self.seen()
            each, places = self._kernel[1], self._kernel[2:].numel()
            for low in range(0, self._kernel.numel(), count):
                flat = torch.arange(low, min(low + count, self._kernel.numel()), device=seen.device)
                i, k = flat // (each * places), flat % places
                o = i * self._groups // self._kernel[0] * each + flat // places % each
                seed = seen.new_zeros(len(flat), self.rows, self.channels, self.positions)
                seed[torch.arange(len(flat), device=seen.device), :, o] = seen[:, i, k].transpose(0, 1)
                yield self.layer.weight, slice(low, low + len(flat)), Tangent(seed.reshape(-1, *self.out))
        if self.layer.bias:
            yield from self._products(self.layer.bias, self.ones(), count)


class _Turned(Half):
    """(dW g_s) / lam_s at every input pixel, g / lam given: [rows, groups, entries, pixels]."""

    def __init__(self, of: Transposed, g: Tensor) -> None:
        self.of, self.g = of, g

    def push(self, tangents: Tensor) -> Tensor:
        w = tangents.reshape(len(tangents), self.g.shape[1], -1, self.g.shape[2])
        return torch.einsum("kgab,ngbs->kngas", w, self.g).reshape(len(w), *self.of._x.shape)

    def pull(self, seed: Tensor) -> Tensor:
        return torch.einsum("ngas,ngbs->gab", self._apart(seed), self.g).reshape(self.of._kernel)

    def some(self, seed: Tensor, low: int, high: int) -> Tensor:
        rows = slice(low * self.of.fold, high * self.of.fold)
        each = self._apart(seed)[rows] @ self.g[rows].transpose(-1, -2)
        return grouped(each.reshape(-1, *self.of._kernel), self.of.fold)

    def _apart(self, seed: Tensor) -> Tensor:
        return seed.reshape(*self.g.shape[:2], -1, self.g.shape[3])
