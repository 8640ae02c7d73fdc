"""A convolution of any dimension: a_os = sum_k W_ok x_ks + b_o, x_s the patch that output pixel s sees.

G_n = sum_s delta_ns x_ns^T, in chunks of samples whose patches and gradients fit into memory; the bias as the sum over
pixels. Exact second derivatives as in `positions`; channels that mix nothing yet travel alone, in a band.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.chunks import chunk_samples, grouped, outer, over_pixels, spread
from hessdiag.graph.kinds import Given
from hessdiag.graph.layers.layer import Half, Layer, Parts
from hessdiag.graph.layers.positions import PositionWise
from hessdiag.graph.nodes import edge_shape, sizes
from hessdiag.graph.sites.site import Legs, Map
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph

WRITTEN = 128
"""Entries of an image up to which many images are convolved by one product with the convolution as a matrix."""
PIXELS = 16
"""Pixels from which a convolution of single pixels is a product for each image."""
BANDED = 12
"""Fewer directions per channel than this are worth no pass of their own."""


def patches(x: Tensor, node: Any, kernel: torch.Size, groups: int, positions: Sequence[int] | None = None) -> Tensor:
    """[n, groups, C/groups * kernel, positions]: what each output position of a convolution sees.

    `positions`: how many there are on each axis, where the convolution has more than are wanted.
    """
    kernel = kernel[2:]
    dims = len(kernel)
    stride, padding, dilation = (_per_axis(saved.integers(node, k), dims) for k in ("stride", "padding", "dilation"))
    if any(padding):
        x = torch.nn.functional.pad(x, [p for axis in reversed(range(dims)) for p in (padding[axis],) * 2])
    x = x.contiguous()
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(dims)]
    out = out if positions is None else list(positions)
    base = x.stride()
    view = x.as_strided(
        (*x.shape[:2], *kernel, *out),
        (
            *base[:2],
            *(base[2 + i] * dilation[i] for i in range(dims)),
            *(base[2 + i] * stride[i] for i in range(dims)),
        ),
    )
    return view.reshape(len(x), groups, -1, prod(out))


def convolved(images: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Tensor:
    """A convolution, by what costs least on a processor: the libraries' kernels need hundreds of multiplications for
    each number. `options` are those of `torch.convolution` after the bias.
    """
    (stride, padding, _, transposed, _, groups), entries = options, images[0].numel()
    if images.device.type != "cpu" or groups > 1:
        return torch.convolution(images, weight, None, *options)
    one = weight[0, 0].numel() == 1 and not transposed and not any(padding) and all(step == 1 for step in stride)
    pixels = images[0, 0].numel()
    if one and pixels == 1:
        return (images.flatten(1) @ weight.flatten(1).T).reshape(-1, len(weight), *images.shape[2:])
    if one and (images.shape[1] == 1 or pixels >= PIXELS):
        matrix, flat = weight.flatten(1), images.flatten(2)
        moved = flat * matrix if images.shape[1] == 1 else matrix @ flat
        return moved.reshape(len(images), len(weight), *images.shape[2:])
    if entries <= WRITTEN and len(images) >= 8 * entries:
        unit = torch.eye(entries, dtype=images.dtype, device=images.device).reshape(-1, *images.shape[1:])
        matrix = torch.convolution(unit, weight, None, *options)
        return (images.flatten(1) @ matrix.flatten(1)).reshape(-1, *matrix.shape[1:])
    return torch.convolution(images, weight, None, *options)


def _per_axis(values: tuple[int, ...], dims: int) -> tuple[int, ...]:
    return values if len(values) == dims else values * dims


class Conv(PositionWise):
    """Convolutions in any number of groups."""

    name = "conv"
    nodes = frozenset({"ConvolutionBackward0"})
    always_audited = False
    sums_samples = True

    @classmethod
    def takes(cls, node: Any) -> bool:
        """A convolution that is not transposed."""
        return node.name() in cls.nodes and not saved.flag(node, "transposed")

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """Weight and bias must be the parameters themselves."""
        weight, bias = graph.direct(node, 1), graph.direct(node, 2)
        return Layer(cls, graph.layer_name(weight, bias), node, weight, bias) if weight or bias else None

    @classmethod
    def enters(cls, node: Any, graph: Graph) -> bool:
        """A constant x."""
        return not graph.is_live(node.next_functions[0][0])

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """The convolution of the tangent; of its band alone while it has one."""
        if len(given) != 1 or given[0][0] != 0:
            return None
        _, edge, tangent = given[0]
        weight, groups = saved.tensor(node, "weight"), saved.integer(node, "groups")
        stride, padding = saved.integers(node, "stride"), saved.integers(node, "padding")
        transposed = saved.flag(node, "transposed")
        settled = tangent.settled()
        if settled.band is not None and groups == 1 and not transposed:
            value, weight = settled.value, weight[:, settled.band[0] : settled.band[1]]
        else:
            value = settled.dense(edge_shape(edge))
        images = value.flatten(0, 1)
        if not transposed and weight[0, 0].numel() == 1 and not any(padding):
            # a strided convolution of one pixel picks pixels; the libraries' own kernels for it can be ten times slower
            images = images[(slice(None), slice(None), *(slice(None, None, step) for step in stride))].contiguous()
            stride = (1,) * len(stride)
        given_by = stride, padding, saved.integers(node, "dilation"), transposed
        moved = convolved(images, weight, (*given_by, saved.integers(node, "output_padding"), groups))
        return Tangent(moved.reshape(len(value), *shape), owned=True)

    @classmethod
    def fan(cls, node: Any) -> int:
        """Weights of one output channel."""
        return int(saved.tensor(node, "weight")[0].numel())

    def read(self) -> None:
        """x, and the shape of W."""
        node = self.layer.node
        self._kernel = saved.tensor(node, "weight").shape
        self._groups = saved.integer(node, "groups")
        self._kept: Tensor | None = None
        if self.layer.weight:
            self._x = saved.tensor(node, "input")

    def per_group(self, delta: Tensor, group: int, *, squares: bool) -> Parts:
        """Of G_n = sum_s delta_ns x_ns^T and sum_s delta_ns."""
        if self.layer.weight:
            yield self.layer.weight, self._weights(delta, group)
        if self.layer.bias:
            yield self.layer.bias, iter([grouped(over_pixels(delta), group * self.fold)])

    def over(self, deltas: Sequence[Tensor], signs: Sequence[float]) -> dict[str, Tensor]:
        """The cotangents of all passes meet the patches of a sample in one product."""
        if self.fold > 1 or not self.layer.weight:
            return super().over(deltas, signs)
        groups, wide = self._groups, len(deltas) * self._kernel[0] // self._groups
        together = torch.stack([d.reshape(self.rows, groups, wide // len(deltas), -1) for d in deltas], 2)
        together = together.flatten(2, 3)  # [rows, groups, passes * channels of a group, pixels]
        scale = torch.tensor(signs, dtype=torch.float64, device=together.device)
        total = torch.zeros(groups, len(deltas), wide // len(deltas), self._kernel[1:].numel()).to(scale)
        each = groups * self._kernel[1:].numel() * (wide + together.shape[3]) * together.element_size()
        step = chunk_samples(2 * each, 1, together.device)
        for low in range(0, self.rows, step):
            seen = patches(self._x[low : low + step], self.layer.node, self._kernel, groups)
            square = (together[low : low + step] @ seen.transpose(-1, -2)).square_().sum(0)
            total += square.reshape(total.shape)
        found = {self.layer.weight: torch.einsum("k,gkab->gab", scale, total).reshape(self._kernel)}
        if self.layer.bias:
            bias = together.sum(3).square_().sum(0).double().reshape(groups, len(deltas), -1)
            found[self.layer.bias] = torch.einsum("k,gka->ga", scale, bias).reshape(-1)
        return found

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum c x^2 and sum c, over samples and pixels."""
        out = {}
        c = c.reshape(self.out)
        if self.layer.weight:
            groups, kernel = self._groups, self._kernel
            d = c.reshape(self.rows, groups, kernel[0] // groups, -1)
            step = chunk_samples(groups * kernel[1:].numel() * d.shape[3] * d.element_size(), 1, d.device)
            total = torch.zeros(kernel.numel(), dtype=torch.float64, device=c.device)
            for low in range(0, self.rows, step):
                seen = (
                    self._kept[low : low + step]
                    if self._kept is not None
                    else patches(self._x[low : low + step], self.layer.node, kernel, groups)
                )
                total += torch.einsum("ngas,ngbs->gab", d[low : low + step], seen.square()).reshape(-1)
            out[self.layer.weight] = total.reshape(kernel)
        if self.layer.bias:
            out[self.layer.bias] = c.flatten(2).sum((0, 2))
        return out

    @classmethod
    def one_output(cls, layer: Layer, places: tuple[int, ...]) -> bool:
        """One channel, at every pixel."""
        shape = edge_shape((layer.node, 0))
        return places == (1,) or places == (shape[1], shape[2:].numel())

    def units(self) -> Tensor:
        """Output channels."""
        channels = torch.arange(self.out[1], device=sizes(self.layer.node).device)
        return channels.reshape(-1, *(1,) * (len(self.out) - 2))

    def gram(self, delta: Tensor) -> Tensor:
        """(G_n of delta) X, chunk by chunk, and the sum over pixels for the bias."""
        out = torch.zeros_like(delta)
        if self.layer.weight:
            out = torch.cat([self._answer(delta, low, high) for low, high in self._chunks(delta, 1)])
        if self.layer.bias:
            out += spread(over_pixels(delta), self.fold, delta)
        return out

    @classmethod
    def kept_bytes(cls, layer: Layer) -> int:
        """Of the patches of all samples."""
        if not layer.weight:
            return 0
        node, out = layer.node, edge_shape((layer.node, 0))
        kernel = saved.tensor(node, "weight")[0].numel() * saved.integer(node, "groups")
        return kernel * out[0] * out[2:].numel() * int(sizes(node).dtype.itemsize)

    # -- parameters that are applied more than once

    def some(self, delta: Tensor, low: int, high: int) -> dict[str, Tensor]:
        """G_n of some samples."""
        layer, out = self.layer, {}
        first, last = low * self.fold, high * self.fold
        if layer.weight:
            d, seen = self._parts(delta, first, last)
            out[layer.weight] = grouped((d @ seen.transpose(-1, -2)).reshape(-1, *self._kernel), self.fold)
        if layer.bias:
            out[layer.bias] = grouped(over_pixels(delta[first:last]), self.fold)
        return out

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """2 sum_s g_s^T dW dx_s, x_s what pixel s sees: pairs of lam_s dx_sk and (dW^T g_s)_k / lam_s."""
        node = self.layer.node
        g = adjoint.reshape(self.rows, self._groups, self._kernel[0] // self._groups, -1)
        size = torch.linalg.vector_norm(g, dim=2, keepdim=True)
        lam, live = size.sqrt(), size > 0
        c = (2.0 * live.to(g.dtype)).expand(-1, -1, self._kernel[1:].numel(), -1).contiguous()
        half = _Turned(self, g / torch.where(live, lam, 1.0))
        return c, ((node.next_functions[0], _Seen(self, lam)),), ((node.next_functions[1], half),)

    # --

    def _weights(self, delta: Tensor, group: int) -> Iterator[Tensor]:
        for low, high in self._chunks(delta, group):
            d, seen = self._parts(delta, low, high)
            for part in outer(d, seen, group * self.fold):
                yield part.reshape(-1, *self._kernel)

    def _answer(self, delta: Tensor, low: int, high: int) -> Tensor:
        d, seen = self._parts(delta, low, high)
        gradient = d @ seen.transpose(-1, -2)
        if self.fold > 1:
            gradient = grouped(gradient, self.fold).repeat_interleave(self.fold, 0)
        return (gradient @ seen).reshape(high - low, *delta.shape[1:])

    def _parts(self, delta: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """(cotangent, patches) of some samples, [n, groups, channels of a group, positions] each."""
        d = delta[low:high].reshape(high - low, self._groups, self._kernel[0] // self._groups, -1)
        if self._kept is not None:
            return d, self._kept[low:high]
        seen = patches(self._x[low:high], self.layer.node, self._kernel, self._groups)
        if self.keep and low == 0 and high == self.rows:
            self._kept = seen
        return d, seen

    def _chunks(self, delta: Tensor, group: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows whose patches and gradients fit into a chunk, samples left whole."""
        positions = delta[0, 0].numel()
        width = self._kernel[0] // self._groups + positions
        each = 2 * self._groups * self._kernel[1:].numel() * width * delta.element_size()
        step = chunk_samples(each, group * self.fold, delta.device)
        for low in range(0, self.rows, step):
            yield low, min(low + step, self.rows)

    # -- second derivatives along single parameters

    @property
    def blocks(self) -> bool:  # type: ignore[override]
        """Unless rows of one sample may meet above."""
        return self.fold == 1

    @property
    def channels(self) -> int:
        """Output channels."""
        return self._kernel[0]

    @property
    def positions(self) -> int:
        """Output pixels."""
        return self.out[2:].numel()

    @property
    def fan_in(self) -> int:
        """Weights of one output channel."""
        return self._kernel[1:].numel()

    def seen(self) -> Tensor:
        """The patches."""
        return patches(self._x, self.layer.node, self._kernel, self._groups)

    def ones(self) -> Tensor:
        """What the bias sees."""
        meta = sizes(self.layer.node)
        return torch.ones(self.rows, 1, 1, self.positions, dtype=meta.dtype, device=meta.device)

    def placed(self, seed: Tensor) -> Tensor:
        """As they are."""
        return seed

    def eye(self, channel: int) -> Tangent:
        """One direction per pixel, in the band of one channel."""
        meta, places = sizes(self.layer.node), self.positions
        eye = torch.eye(places, dtype=meta.dtype, device=meta.device)
        value = eye[:, None, None].expand(-1, self.samples, -1, -1).reshape(places, self.samples, 1, *self.out[2:])
        return Tangent(value, None, (channel, channel + 1))

    def _products(self, name: str, inputs: Tensor, count: int) -> Iterator[tuple[str, slice, Tangent]]:
        groups, fan = inputs.shape[1], inputs.shape[2]
        if fan < BANDED:
            yield from super()._products(name, inputs, count)
            return
        for channel in range(self.channels):
            rows = inputs[:, channel * groups // self.channels].transpose(0, 1)
            for low in range(0, fan, count):
                value = rows[low : low + count].reshape(-1, self.out[0], 1, *self.out[2:])
                first = channel * fan + low
                yield name, slice(first, first + len(value)), Tangent(value, None, (channel, channel + 1))


class _Seen(Map):
    """What each pixel sees of dx, scaled: [rows, groups, entries, pixels]."""

    def __init__(self, of: Conv, lam: Tensor) -> None:
        self.of, self.lam = of, lam

    def push(self, tangents: Tensor) -> Tensor:
        return self._patches(tangents.flatten(0, 1)).reshape(len(tangents), *self._shape()) * self.lam

    def pull(self, seed: Tensor) -> Tensor:
        edge = self.of.layer.node.next_functions[0]
        with torch.enable_grad():
            blank = torch.zeros(edge_shape(edge), dtype=seed.dtype, device=seed.device, requires_grad=True)
            seen = self._patches(blank)
        (found,) = torch.autograd.grad(seen, blank, seed * self.lam, create_graph=seed.requires_grad)
        return found

    def _patches(self, images: Tensor) -> Tensor:
        return patches(images, self.of.layer.node, self.of._kernel, self.of._groups)

    def _shape(self) -> tuple[int, ...]:
        return self.of.rows, self.of._groups, self.of._kernel[1:].numel(), self.lam.shape[-1]


class _Turned(Half):
    """(dW^T g_s) / lam_s at every pixel, g / lam given."""

    def __init__(self, of: Conv, g: Tensor) -> None:
        self.of, self.g = of, g

    def push(self, tangents: Tensor) -> Tensor:
        w = tangents.reshape(len(tangents), self.of._groups, -1, self.of._kernel[1:].numel())
        return torch.einsum("ngas,kgab->kngbs", self.g, w)

    def pull(self, seed: Tensor) -> Tensor:
        return torch.einsum("ngas,ngbs->gab", self.g, seed).reshape(self.of._kernel)

    def some(self, seed: Tensor, low: int, high: int) -> Tensor:
        rows = slice(low * self.of.fold, high * self.of.fold)
        return grouped((self.g[rows] @ seed[rows].transpose(-1, -2)).reshape(-1, *self.of._kernel), self.of.fold)
