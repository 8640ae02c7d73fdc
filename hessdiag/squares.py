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
from typing import Any

import torch
from torch import Tensor

from .errors import UncoveredModelError
from .sites import Layer, edge_shape

CHUNK = 1 << 26


class LayerSquares:
    """The inputs of one layer on one batch, prepared once and contracted with any number of cotangents."""

    def __init__(self, layer: Layer, samples: int, *, keep: bool = False) -> None:
        self.layer = layer
        self.samples = samples
        self._keep = keep
        self._kept: Tensor | None = None
        self._linear_input: Tensor | None = None

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
                x = _matrix_input(layer.node)
                square = x.reshape(-1, x.shape[-1]).square()
                out[layer.weight] = square.T @ flat if layer.transposed else flat.T @ square
            if layer.bias:
                out[layer.bias] = flat.sum(0)
        elif layer.kind == "conv":
            node = layer.node
            if layer.weight:
                groups, weight = node._saved_groups, node._saved_weight
                d = c.reshape(self.samples, groups, weight.shape[0] // groups, -1)
                step = _chunk_samples(groups * weight[0].numel() * d.shape[3] * d.element_size(), 1)
                total = torch.zeros(weight.numel(), dtype=torch.float64, device=c.device)
                for low in range(0, self.samples, step):
                    patches = (
                        self._kept[low : low + step]
                        if self._kept is not None
                        else _patches(node._saved_input.detach()[low : low + step], node, groups)
                    )
                    total += torch.einsum("ngas,ngbs->gab", d[low : low + step], patches.square()).reshape(-1)
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
                yield layer.bias, iter([_grouped(delta.flatten(2).sum(2), group)])
        elif kind == "norm":
            if layer.weight:
                yield layer.weight, iter([_grouped(_pixels(delta * self._normalised()), group)])
            if layer.bias:
                yield layer.bias, iter([_grouped(_pixels(delta), group)])
        else:
            yield from self._elementwise(delta, group)

    def _linear(self, delta: Tensor, group: int, squares: bool) -> Iterator[tuple[str, Tensor | Iterator[Tensor]]]:
        layer = self.layer
        d = delta.reshape(self.samples, -1, delta.shape[-1])
        if layer.weight:
            x = _matrix_input(layer.node).reshape(self.samples, -1, _matrix_input(layer.node).shape[-1])
            if squares and group == 1 and d.shape[1] == 1:
                left, right = d[:, 0].square(), x[:, 0].square()
                yield layer.weight, (right.T @ left if layer.transposed else left.T @ right)
            else:
                first, second = (x, d) if layer.transposed else (d, x)
                yield layer.weight, _outer(first.transpose(1, 2), second.transpose(1, 2), group)
        if layer.bias:
            yield layer.bias, iter([_grouped(d.sum(1), group)])

    def _conv_weight(self, delta: Tensor, group: int) -> Iterator[Tensor]:
        node = self.layer.node
        groups, weight = node._saved_groups, node._saved_weight
        x = node._saved_input.detach()
        d = delta.reshape(self.samples, groups, weight.shape[0] // groups, -1)
        per_sample = 2 * d.shape[1] * weight[0].numel() * (d.shape[2] + d.shape[3]) * d.element_size()
        step = _chunk_samples(per_sample, group)
        whole = self._kept
        for low in range(0, self.samples, step):
            high = min(low + step, self.samples)
            patches = _patches(x[low:high], node, groups) if whole is None else whole[low:high]
            if self._keep and whole is None and low == 0 and high == self.samples:
                self._kept = patches
            for part in _outer(d[low:high], patches, group):
                yield part.reshape(-1, *weight.shape)

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

    def _elementwise(self, delta: Tensor, group: int, *, power: int = 1) -> Iterator[tuple[str, Iterator[Tensor]]]:
        layer = self.layer
        leaf = next(slot for slot, (s, _) in enumerate(layer.node.next_functions) if hasattr(s, "variable"))
        shape = layer.node.next_functions[leaf][0].variable.shape
        name = layer.weight or layer.bias
        assert name is not None
        if layer.kind == "scale":
            other = layer.node._saved_other if leaf == 0 else layer.node._saved_self
            delta = delta * other.detach() ** power
        if delta.ndim < 1 or len(delta) != self.samples or (len(shape) == delta.ndim and shape[0] != 1):
            raise UncoveredModelError(f"parameter {name!r} of shape {list(shape)} does not broadcast over the samples")
        full = (1,) * (delta.ndim - len(shape)) + tuple(shape)
        reduce = [axis for axis in range(1, delta.ndim) if full[axis] == 1]
        per_sample = delta.sum(reduce, keepdim=True) if reduce else delta
        yield name, iter([_grouped(per_sample.reshape(self.samples, *shape), group)])


def _matrix_input(node: Any) -> Tensor:
    for attribute in ("_saved_mat1", "_saved_self", "_saved_input"):
        saved = getattr(node, attribute, None)
        if isinstance(saved, Tensor):
            return saved.detach()
    raise UncoveredModelError(f"{node.name()} did not save its input; is the weight's gradient needed?")


def _patches(x: Tensor, node: Any, groups: int) -> Tensor:
    """[n, groups, C/groups * kernel, positions]: what each output position of a convolution sees, for any dimension."""
    kernel = node._saved_weight.shape[2:]
    dims = len(kernel)
    stride, padding, dilation = (
        _per_axis(getattr(node, f"_saved_{k}"), dims) for k in ("stride", "padding", "dilation")
    )
    if any(padding):
        x = torch.nn.functional.pad(x, [p for axis in reversed(range(dims)) for p in (padding[axis],) * 2])
    x = x.contiguous()
    out = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(dims)]
    base = x.stride()
    view = x.as_strided(
        (*x.shape[:2], *kernel, *out),
        (
            *base[:2],
            *(base[2 + i] * dilation[i] for i in range(dims)),
            *(base[2 + i] * stride[i] for i in range(dims)),
        ),
    )
    positions = 1
    for size in out:
        positions *= size
    return view.reshape(len(x), groups, -1, positions)


def _per_axis(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value)
    return values if len(values) == dims else values * dims


def _outer(left: Tensor, right: Tensor, group: int) -> Iterator[Tensor]:
    """sum_s left[n, ..., a, s] right[n, ..., b, s], summed over groups of samples, in chunks of samples."""
    samples = len(left)
    step = _chunk_samples(left[0].numel() // left.shape[-1] * right.shape[-2] * left.element_size(), group)
    for low in range(0, samples, step):
        a, b = left[low : low + step], right[low : low + step]
        full = len(a) // group * group
        for first, last, size in ((0, full, group), (full, len(a), max(len(a) - full, 1))):
            if first < last:
                yield _joined(a[first:last], size) @ _joined(b[first:last], size).transpose(-1, -2)


def _joined(x: Tensor, group: int) -> Tensor:
    """Neighbouring samples become further positions: [n, ..., a, s] -> [n/group, ..., a, group * s]."""
    if group == 1:
        return x
    return x.reshape(-1, group, *x.shape[1:]).movedim(1, -2).flatten(-2)


def _grouped(x: Tensor, group: int) -> Tensor:
    """Sums over groups of neighbouring samples (the last group may be smaller); a new tensor."""
    if group == 1:
        return x.clone()
    full = len(x) // group * group
    parts = [x[:full].reshape(-1, group, *x.shape[1:]).sum(1)] if full else []
    if full < len(x):
        parts.append(x[full:].sum(0, keepdim=True))
    return torch.cat(parts)


def _pixels(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.ndim > 2 else x


def _chunk_samples(bytes_per_sample: int, group: int) -> int:
    return max(CHUNK // max(bytes_per_sample, 1) // group, 1) * group
