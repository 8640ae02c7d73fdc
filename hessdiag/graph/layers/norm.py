"""BatchNorm on running statistics: a = gain * xhat + bias, channel by channel, xhat = (x - mean) / sqrt(var + eps).

G_n = sum_s delta_ns xhat_ns for the gain, sum_s delta_ns for the bias. In its input it is a factor, entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.errors import StochasticModeError
from hessdiag.graph import saved
from hessdiag.graph.chunks import grouped, over_pixels, spread
from hessdiag.graph.layers.layer import Half, Layer, LayerKind, Parts
from hessdiag.graph.sites.normalised import InstanceNorm
from hessdiag.graph.sites.site import Legs
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph


def _scale(node: Any) -> Tensor:
    """1 / sqrt(var + eps); the libraries of graphics cards write eps out."""
    eps = "eps" if saved.has(node, "eps") else "epsilon"
    return torch.rsqrt(saved.tensor(node, "running_var") + saved.number(node, eps))


class Norm(LayerKind):
    """BatchNorm in evaluation mode."""

    name = "norm"
    nodes = frozenset({"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"})
    pointwise = 0
    always_audited = False
    normalises = True

    @classmethod
    def takes(cls, node: Any) -> bool:
        """Not what normalises instances, which to torch is a batch of one sample with all channels of all."""
        return super().takes(node) and not InstanceNorm.takes(node)

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """Statistics of the batch at hand are refused: they mix its samples."""
        if saved.flag(node, "training"):
            raise StochasticModeError(f"BatchNorm on batch statistics {graph.place(node)}; call model.eval()")
        weight, bias = (graph.direct(node, slot) for slot in (1, 2))
        return Layer(cls, graph.layer_name(weight, bias), node, weight, bias) if weight or bias else None

    @classmethod
    def enters(cls, node: Any, graph: Graph) -> bool:
        """A constant x."""
        return not graph.is_live(node.next_functions[0][0])

    @classmethod
    def factor(cls, node: Any, slot: int) -> tuple[bool, Tensor | None]:
        """Gain / sqrt(var + eps)."""
        if slot != cls.pointwise:
            return False, None
        scale = _scale(node)
        gain = saved.tensor_or_none(node, "weight")
        if gain is not None:
            scale = scale * gain
        return True, scale.reshape(1, -1, *(1,) * (saved.tensor(node, "input").ndim - 2))

    def read(self) -> None:
        """x and the statistics."""
        node = self.layer.node
        self._kept: Tensor | None = None
        if self.layer.weight:
            self._x = saved.tensor(node, "input")
            self._mean, self._rate = saved.tensor(node, "running_mean"), _scale(node)

    def per_group(self, delta: Tensor, group: int, *, squares: bool) -> Parts:
        """Of sum_s delta_ns xhat_ns and sum_s delta_ns."""
        if self.layer.weight:
            yield self.layer.weight, iter([grouped(over_pixels(delta * self._normalised()), group * self.fold)])
        if self.layer.bias:
            yield self.layer.bias, iter([grouped(over_pixels(delta), group * self.fold)])

    def over(self, deltas: Sequence[Tensor], signs: Sequence[float]) -> dict[str, Tensor]:
        """The cotangents of all passes meet xhat together."""
        if self.fold > 1:
            return super().over(deltas, signs)
        together = torch.stack(list(deltas))
        scale = torch.tensor(signs, dtype=torch.float64, device=together.device)

        def squared(each: Tensor) -> Tensor:
            sums = each.flatten(3).sum(3) if each.ndim > 3 else each  # [passes, samples, channels]
            return scale @ sums.square().sum(1).double()

        found = {self.layer.bias: squared(together)} if self.layer.bias else {}
        if self.layer.weight:
            found[self.layer.weight] = squared(together * self._normalised())
        return found

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum c xhat^2 and sum c, over samples and pixels."""
        out = {}
        c = c.reshape(self.out)
        if self.layer.weight:
            out[self.layer.weight] = over_pixels(c * self._normalised().square()).sum(0)
        if self.layer.bias:
            out[self.layer.bias] = over_pixels(c).sum(0)
        return out

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """2 g dgain dxhat."""
        node = self.layer.node
        return (
            2.0 * adjoint * _per_channel(self._rate, self.out),
            ((node.next_functions[0], 1.0),),
            ((node.next_functions[1], _Gain(self)),),
        )

    def gram(self, delta: Tensor) -> Tensor:
        """Xhat sum_s (delta xhat) + sum_s delta."""
        out = torch.zeros_like(delta)
        if self.layer.weight:
            x = self._normalised()
            out += x * spread(over_pixels(delta * x), self.fold, delta)
        if self.layer.bias:
            out += spread(over_pixels(delta), self.fold, delta)
        return out

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """One direction per channel."""
        if self.layer.weight:
            yield from _channels(self.layer.weight, self._normalised(), count)
        if self.layer.bias:
            ones = torch.ones_like(saved.tensor(self.layer.node, "input"))
            yield from _channels(self.layer.bias, ones, count)

    def _normalised(self) -> Tensor:
        if self._kept is not None:
            return self._kept
        shape = (1, -1) + (1,) * (self._x.ndim - 2)
        normalised = (self._x - self._mean.reshape(shape)) * self._rate.reshape(shape)
        if self.keep:
            self._kept = normalised
        return normalised


def _per_channel(values: Tensor, shape: torch.Size) -> Tensor:
    """[..., channels] as it meets [rows, channels, ...]."""
    return values.reshape(*values.shape[:-1], 1, -1, *(1,) * (len(shape) - 2))


class _Gain(Half):
    """A channel's gain at all its entries."""

    def __init__(self, of: Norm) -> None:
        self.of = of

    def push(self, tangents: Tensor) -> Tensor:
        return _per_channel(tangents, self.of.out).expand(-1, *self.of.out)

    def pull(self, seed: Tensor) -> Tensor:
        return over_pixels(seed).sum(0)

    def some(self, seed: Tensor, low: int, high: int) -> Tensor:
        return grouped(over_pixels(seed), self.of.fold)[low:high]


def _channels(name: str, values: Tensor, count: int) -> Iterator[tuple[str, slice, Tangent]]:
    channels = values.shape[1]
    for low in range(0, channels, count):
        high = min(low + count, channels)
        seed = values.new_zeros(high - low, *values.shape)
        picked = torch.arange(low, high, device=values.device)
        seed[picked - low, :, picked] = values[:, low:high].transpose(0, 1)
        yield name, slice(low, high), Tangent(seed)
