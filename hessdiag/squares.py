"""Squared per-sample gradients of one layer, summed over samples: a function per layer kind.

A layer's gradient for sample n is G_n = sum_s delta_n[:, s] x_n[:, s]^T over positions s (one for a linear layer on
vectors, tokens, or the output pixels of a convolution, x being the unfolded patches). Curvature propagation needs
sum_n G_n^2: squared before samples are summed, since summing first multiplies the variance by about their number.
`group` > 1 sums that many neighbouring samples before squaring, which is cheaper and noisier.

For a linear layer on vectors sum_n G_n^2 = (delta^2)^T (x^2): no per-sample gradient is ever formed. Elsewhere
per-sample gradients exist for one chunk of samples at a time, `CHUNK` bytes at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import UncoveredModelError
from .sites import Layer, edge_shape
from .unfold import chunk_samples, gram_product, grouped, matrix_input, outer, patches


class LayerSquares:
    """The inputs of one layer on one batch, prepared once and contracted with any number of cotangents."""

    def __init__(self, layer: Layer, samples: int, *, keep: bool = False) -> None:
        self.layer = layer
        self.samples = samples
        self._keep = keep
        self._kept: Tensor | None = None

    def summed(self, delta: Tensor, *, group: int = 1) -> dict[str, Tensor]:
        """{parameter name: sum over groups of (sum over the group's samples of G_n)^2}."""
        result: dict[str, Tensor] = {}
        for name, per_group in self._gradients(delta, group):
            if isinstance(per_group, Tensor):
                result[name] = per_group
                continue
            for part in per_group:
                square = part.square_().sum(0)
                result[name] = square if name not in result else result[name].add_(square)
        return result

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """{parameter name: sum over samples and positions of c (da/dtheta)^2} for weights c on the layer's outputs."""
        layer, out = self.layer, {}
        c = c.reshape(edge_shape((layer.node, 0)))
        if layer.kind == "linear":
            flat = c.reshape(-1, c.shape[-1])
            if layer.weight:
                x = matrix_input(layer.node)
                square = x.reshape(-1, x.shape[-1]).square()
                out[layer.weight] = square.T @ flat if layer.transposed else flat.T @ square
            if layer.bias:
                out[layer.bias] = flat.sum(0)
        elif layer.kind == "conv":
            node = layer.node
            if layer.weight:
                groups, weight = node._saved_groups, node._saved_weight
                d = c.reshape(self.samples, groups, weight.shape[0] // groups, -1)
                step = chunk_samples(groups * weight[0].numel() * d.shape[3] * d.element_size(), 1)
                total = torch.zeros(weight.numel(), dtype=torch.float64, device=c.device)
                for low in range(0, self.samples, step):
                    seen = (
                        self._kept[low : low + step]
                        if self._kept is not None
                        else patches(node._saved_input.detach()[low : low + step], node, groups)
                    )
                    total += torch.einsum("ngas,ngbs->gab", d[low : low + step], seen.square()).reshape(-1)
                out[layer.weight] = total.reshape(weight.shape)
            if layer.bias:
                out[layer.bias] = c.flatten(2).sum((0, 2))
        elif layer.kind == "norm":
            if layer.weight:
                out[layer.weight] = _pixels(c * self._normalised().square()).sum(0)
            if layer.bias:
                out[layer.bias] = _pixels(c).sum(0)
        else:
            for name, parts in self._elementwise(c, 1, power=2):
                out[name] = torch.cat(list(parts)).sum(0)
        return out

    def each(self, delta: Tensor) -> dict[str, Tensor]:
        """{parameter name: G_n} with the samples as first axis."""
        out = {}
        for name, parts in self._gradients(delta, 1, squares=False):
            assert not isinstance(parts, Tensor)
            out[name] = torch.cat([part.clone() for part in parts])
        return out

    def gram(self, delta: Tensor) -> Tensor:
        """J_n J_n^T delta_n for every sample: the layer's answer to a step of its parameters along G_n."""
        layer, node = self.layer, self.layer.node
        out = torch.zeros_like(delta)
        if layer.kind == "linear":
            d = delta.reshape(self.samples, -1, delta.shape[-1])
            if layer.weight:
                x = matrix_input(node).reshape(self.samples, d.shape[1], -1)
                out += gram_product(x, d).reshape(delta.shape)
            if layer.bias:
                out += d.sum(1, keepdim=True).expand(d.shape).reshape(delta.shape)
        elif layer.kind == "conv":
            if layer.weight:
                out = torch.cat([self._conv_gram(delta, low, high) for low, high in self._chunks(delta, 1)])
            if layer.bias:
                out += delta.flatten(2).sum(2).reshape(*delta.shape[:2], *(1,) * (delta.ndim - 2))
        elif layer.kind == "norm":
            axes = tuple(range(2, delta.ndim))
            if layer.weight:
                x = self._normalised()
                out += x * ((delta * x).sum(axes, keepdim=True) if axes else delta * x)
            if layer.bias:
                out += delta.sum(axes, keepdim=True) if axes else delta
        else:
            for _, parts in self._elementwise(delta, 1):
                step = torch.cat(list(parts))
                step = step.reshape(self.samples, *(1,) * (delta.ndim - step.ndim), *step.shape[1:])
                out += step * self._other() if layer.kind == "scale" else step
        return out

    # -- one generator of per-group gradients for each parameter

    def _gradients(
        self, delta: Tensor, group: int, *, squares: bool = True
    ) -> Iterator[tuple[str, Tensor | Iterator[Tensor]]]:
        kind, layer = self.layer.kind, self.layer
        if kind == "linear":
            yield from self._linear(delta, group, squares)
        elif kind == "conv":
            if layer.weight:
                yield layer.weight, self._conv_weight(delta, group)
            if layer.bias:
                yield layer.bias, iter([grouped(delta.flatten(2).sum(2), group)])
        elif kind == "norm":
            if layer.weight:
                yield layer.weight, iter([grouped(_pixels(delta * self._normalised()), group)])
            if layer.bias:
                yield layer.bias, iter([grouped(_pixels(delta), group)])
        else:
            yield from self._elementwise(delta, group)

    def _linear(self, delta: Tensor, group: int, squares: bool) -> Iterator[tuple[str, Tensor | Iterator[Tensor]]]:
        layer = self.layer
        d = delta.reshape(self.samples, -1, delta.shape[-1])
        if layer.weight:
            x = matrix_input(layer.node).reshape(self.samples, -1, matrix_input(layer.node).shape[-1])
            if squares and group == 1 and d.shape[1] == 1:
                left, right = d[:, 0].square(), x[:, 0].square()
                yield layer.weight, (right.T @ left if layer.transposed else left.T @ right)
            else:
                first, second = (x, d) if layer.transposed else (d, x)
                yield layer.weight, outer(first.transpose(1, 2), second.transpose(1, 2), group)
        if layer.bias:
            yield layer.bias, iter([grouped(d.sum(1), group)])

    def _conv_weight(self, delta: Tensor, group: int) -> Iterator[Tensor]:
        weight = self.layer.node._saved_weight
        for low, high in self._chunks(delta, group):
            d, seen = self._conv_parts(delta, low, high)
            for part in outer(d, seen, group):
                yield part.reshape(-1, *weight.shape)

    def _conv_gram(self, delta: Tensor, low: int, high: int) -> Tensor:
        d, seen = self._conv_parts(delta, low, high)
        return ((d @ seen.transpose(-1, -2)) @ seen).reshape(high - low, *delta.shape[1:])

    def _conv_parts(self, delta: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """(cotangent, patches) of some samples, [n, groups, channels of a group, positions] each."""
        node = self.layer.node
        groups, weight = node._saved_groups, node._saved_weight
        d = delta[low:high].reshape(high - low, groups, weight.shape[0] // groups, -1)
        if self._kept is not None:
            return d, self._kept[low:high]
        seen = patches(node._saved_input.detach()[low:high], node, groups)
        if self._keep and low == 0 and high == self.samples:
            self._kept = seen
        return d, seen

    def _chunks(self, delta: Tensor, group: int) -> Iterator[tuple[int, int]]:
        """Ranges of samples of a convolution whose patches and gradients fit into `CHUNK` bytes."""
        weight = self.layer.node._saved_weight
        groups, positions = self.layer.node._saved_groups, delta[0, 0].numel()
        width = weight.shape[0] // groups + positions
        step = chunk_samples(2 * groups * weight[0].numel() * width * delta.element_size(), group)
        for low in range(0, self.samples, step):
            yield low, min(low + step, self.samples)

    def _normalised(self) -> Tensor:
        if self._kept is not None:
            return self._kept
        node = self.layer.node
        x: Tensor = node._saved_input.detach()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale: Tensor = torch.rsqrt(node._saved_running_var + node._saved_eps)
        mean: Tensor = node._saved_running_mean
        normalised = (x - mean.reshape(shape)) * scale.reshape(shape)
        if self._keep:
            self._kept = normalised
        return normalised

    def _other(self) -> Tensor:
        """What the parameter of a `scale` layer multiplies."""
        node = self.layer.node
        first = hasattr(node.next_functions[0][0], "variable")
        other: Tensor = node._saved_other if first else node._saved_self
        return other.detach()

    def _elementwise(self, delta: Tensor, group: int, *, power: int = 1) -> Iterator[tuple[str, Iterator[Tensor]]]:
        layer = self.layer
        leaf = next(slot for slot, (s, _) in enumerate(layer.node.next_functions) if hasattr(s, "variable"))
        shape = layer.node.next_functions[leaf][0].variable.shape
        name = layer.weight or layer.bias
        assert name is not None
        if layer.kind == "scale":
            delta = delta * self._other() ** power
        if delta.ndim < 1 or len(delta) != self.samples or (len(shape) == delta.ndim and shape[0] != 1):
            raise UncoveredModelError(f"parameter {name!r} of shape {list(shape)} does not broadcast over the samples")
        full = (1,) * (delta.ndim - len(shape)) + tuple(shape)
        reduce = [axis for axis in range(1, delta.ndim) if full[axis] == 1]
        per_sample = delta.sum(reduce, keepdim=True) if reduce else delta
        yield name, iter([grouped(per_sample.reshape(self.samples, *shape), group)])


def _pixels(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.ndim > 2 else x
