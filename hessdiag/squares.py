"""Squared per-sample gradients of one layer, summed over samples: a function per layer kind.

A layer's gradient for sample n is G_n = sum_s delta_n[:, s] x_n[:, s]^T over positions s (one for a linear layer on
vectors, tokens, or the output pixels of a convolution, x being the unfolded patches). Curvature propagation needs
sum_n G_n^2: squared before samples are summed, since summing first multiplies the variance by about their number.
`group` > 1 sums that many neighbouring samples before squaring, which is cheaper and noisier.

Where a model folds tokens or patches into the batch axis, a sample owns several neighbouring rows of it: their sum is
G_n. For a linear layer on vectors sum_n G_n^2 = (delta^2)^T (x^2): no per-sample gradient is ever formed. Elsewhere
per-sample gradients exist for one chunk of samples at a time, `CHUNK` bytes at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import UncoveredModelError
from .sites import Layer, edge_shape
from .sites.nodes import constant
from .unfold import chunk_samples, gram_product, grouped, matrix_input, outer, patches


class LayerSquares:
    """The inputs of one layer on one batch, prepared once and contracted with any number of cotangents."""

    def __init__(self, layer: Layer, samples: int, *, keep: bool = False) -> None:
        self.layer = layer
        self.samples = samples
        self._keep = keep
        self._kept: Tensor | None = None
        shape = edge_shape((layer.node, 0))
        if not shape or shape[0] % samples:
            raise UncoveredModelError(
                f"{layer.name!r}: its outputs have the shape {list(shape)} for {samples} samples, which do not lie "
                "along its first axis; use method='hutchinson' (or 'auto')"
            )
        self.rows, self.fold = shape[0], shape[0] // samples
        self._read()

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
                square = self._x.reshape(-1, self._x.shape[-1]).square()
                out[layer.weight] = square.T @ flat if layer.transposed else flat.T @ square
            if layer.bias:
                out[layer.bias] = flat.sum(0)
        elif layer.kind == "conv":
            node = layer.node
            if layer.weight:
                groups, kernel = node._saved_groups, self._kernel
                d = c.reshape(self.rows, groups, kernel[0] // groups, -1)
                step = chunk_samples(groups * kernel[1:].numel() * d.shape[3] * d.element_size(), 1)
                total = torch.zeros(kernel.numel(), dtype=torch.float64, device=c.device)
                for low in range(0, self.rows, step):
                    seen = (
                        self._kept[low : low + step]
                        if self._kept is not None
                        else patches(self._x[low : low + step], node, kernel, groups)
                    )
                    total += torch.einsum("ngas,ngbs->gab", d[low : low + step], seen.square()).reshape(-1)
                out[layer.weight] = total.reshape(kernel)
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
        layer = self.layer
        out = torch.zeros_like(delta)
        if layer.kind == "linear":
            d = delta.reshape(self.samples, -1, delta.shape[-1])
            if layer.weight:
                x = self._x.reshape(self.samples, d.shape[1], -1)
                out += gram_product(x, d).reshape(delta.shape)
            if layer.bias:
                out += d.sum(1, keepdim=True).expand(d.shape).reshape(delta.shape)
        elif layer.kind == "conv":
            if layer.weight:
                out = torch.cat([self._conv_gram(delta, low, high) for low, high in self._chunks(delta, 1)])
            if layer.bias:
                out += self._spread(_pixels(delta), delta)
        elif layer.kind == "norm":
            if layer.weight:
                x = self._normalised()
                out += x * self._spread(_pixels(delta * x), delta)
            if layer.bias:
                out += self._spread(_pixels(delta), delta)
        else:
            step = self._spread(self._broadcast_sum(delta), delta)
            out += step * self._x if layer.kind == "scale" else step
        return out

    # -- what the layer's node saved for its backward pass

    def _read(self) -> None:
        """Once, before any pass: under checkpointing to read takes a forward pass, and cannot be done within one."""
        layer, node = self.layer, self.layer.node
        if layer.kind == "conv":
            self._kernel: torch.Size = node._saved_weight.shape
        if not layer.weight:
            return
        if layer.kind == "linear":
            self._x: Tensor = matrix_input(node)
        elif layer.kind in ("conv", "norm"):
            self._x = node._saved_input.detach()
            if layer.kind == "norm":
                self._mean: Tensor = node._saved_running_mean
                self._scale: Tensor = torch.rsqrt(node._saved_running_var + node._saved_eps)
        else:
            self._x = constant(node, self._slot)

    @property
    def _slot(self) -> int:
        """Which input of a shift or a scale is the parameter."""
        return next(slot for slot, (s, _) in enumerate(self.layer.node.next_functions) if hasattr(s, "variable"))

    def _spread(self, per_row: Tensor, like: Tensor) -> Tensor:
        """Sums over each sample's rows, given back to all of them and shaped to meet `like`."""
        if self.fold > 1:
            per_row = grouped(per_row, self.fold).repeat_interleave(self.fold, 0)
        return per_row if per_row.ndim == like.ndim else per_row.reshape(*per_row.shape, *(1,) * (like.ndim - 2))

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
                yield layer.bias, iter([grouped(_pixels(delta), group * self.fold)])
        elif kind == "norm":
            if layer.weight:
                yield layer.weight, iter([grouped(_pixels(delta * self._normalised()), group * self.fold)])
            if layer.bias:
                yield layer.bias, iter([grouped(_pixels(delta), group * self.fold)])
        else:
            yield from self._elementwise(delta, group)

    def _linear(self, delta: Tensor, group: int, squares: bool) -> Iterator[tuple[str, Tensor | Iterator[Tensor]]]:
        layer = self.layer
        d = delta.reshape(self.samples, -1, delta.shape[-1])
        if layer.weight:
            x = self._x.reshape(self.samples, -1, self._x.shape[-1])
            if squares and group == 1 and d.shape[1] == 1:
                left, right = d[:, 0].square(), x[:, 0].square()
                yield layer.weight, (right.T @ left if layer.transposed else left.T @ right)
            else:
                first, second = (x, d) if layer.transposed else (d, x)
                yield layer.weight, outer(first.transpose(1, 2), second.transpose(1, 2), group)
        if layer.bias:
            yield layer.bias, iter([grouped(d.sum(1), group)])

    def _conv_weight(self, delta: Tensor, group: int) -> Iterator[Tensor]:
        for low, high in self._chunks(delta, group):
            d, seen = self._conv_parts(delta, low, high)
            for part in outer(d, seen, group * self.fold):
                yield part.reshape(-1, *self._kernel)

    def _conv_gram(self, delta: Tensor, low: int, high: int) -> Tensor:
        d, seen = self._conv_parts(delta, low, high)
        gradient = d @ seen.transpose(-1, -2)
        if self.fold > 1:
            gradient = grouped(gradient, self.fold).repeat_interleave(self.fold, 0)
        return (gradient @ seen).reshape(high - low, *delta.shape[1:])

    def _conv_parts(self, delta: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """(cotangent, patches) of some samples, [n, groups, channels of a group, positions] each."""
        node = self.layer.node
        groups = node._saved_groups
        d = delta[low:high].reshape(high - low, groups, self._kernel[0] // groups, -1)
        if self._kept is not None:
            return d, self._kept[low:high]
        seen = patches(self._x[low:high], node, self._kernel, groups)
        if self._keep and low == 0 and high == self.rows:
            self._kept = seen
        return d, seen

    def _chunks(self, delta: Tensor, group: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows of a convolution whose patches and gradients fit into `CHUNK` bytes, samples left whole."""
        groups, positions = self.layer.node._saved_groups, delta[0, 0].numel()
        width = self._kernel[0] // groups + positions
        each = 2 * groups * self._kernel[1:].numel() * width * delta.element_size()
        step = chunk_samples(each, group * self.fold)
        for low in range(0, self.rows, step):
            yield low, min(low + step, self.rows)

    def _normalised(self) -> Tensor:
        if self._kept is not None:
            return self._kept
        shape = (1, -1) + (1,) * (self._x.ndim - 2)
        normalised = (self._x - self._mean.reshape(shape)) * self._scale.reshape(shape)
        if self._keep:
            self._kept = normalised
        return normalised

    def _elementwise(self, delta: Tensor, group: int, *, power: int = 1) -> Iterator[tuple[str, Iterator[Tensor]]]:
        name = self.layer.weight or self.layer.bias
        assert name is not None
        per_row = self._broadcast_sum(delta, power=power)
        shape = self.layer.node.next_functions[self._slot][0].variable.shape
        yield name, iter([grouped(per_row.reshape(self.rows, *shape), group * self.fold)])

    def _broadcast_sum(self, delta: Tensor, *, power: int = 1) -> Tensor:
        """[rows, ...]: what reaches a parameter that is added or multiplied, summed where it was broadcast."""
        shape = self.layer.node.next_functions[self._slot][0].variable.shape
        if self.layer.kind == "scale":
            delta = delta * self._x**power
        if delta.ndim < 1 or (len(shape) == delta.ndim and shape[0] != 1):
            name = self.layer.weight or self.layer.bias
            raise UncoveredModelError(f"parameter {name!r} of shape {list(shape)} does not broadcast over the samples")
        full = (1,) * (delta.ndim - len(shape)) + tuple(shape)
        reduce = [axis for axis in range(1, delta.ndim) if full[axis] == 1]
        return delta.sum(reduce, keepdim=True) if reduce else delta


def _pixels(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.ndim > 2 else x
