"""Fully connected nets as in E[19]: weights W^(1)..W^(L), biases b^(1)..b^(L), one activation, linear
output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from theory._refusals import refuse
from theory.shapes import Shape, triple


@dataclass(frozen=True)
class Net:
    """An L-layer net: `weights[l-1]` is W^(l) of shape [n_l, n_{l-1}], `biases[l-1]` is b^(l) or None."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activation: Shape

    @property
    def depth(self) -> int:
        """L, the output layer included."""
        return len(self.weights)

    @property
    def widths(self) -> tuple[int, ...]:
        """n_0, ..., n_L."""
        return (self.weights[0].shape[1], *(w.shape[0] for w in self.weights))


@dataclass(frozen=True)
class Trace:
    """One forward pass over N samples. Lists run over the paper's layers: `h[l]` = h^(l), `z[l]` = z^(l)
    with z[0] = x.
    """

    z: tuple[Tensor, ...]
    h: tuple[Tensor, ...]
    slope: tuple[Tensor, ...]
    curvature: tuple[Tensor, ...]

    @property
    def outputs(self) -> Tensor:
        """F = z^(L), [N, n_L]."""
        return self.z[-1]


def make_net(weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None, activation: Any) -> Net:
    """A checked `Net`; `activation` is a `Shape`, three callables, an object with d1 and d2, or σ alone."""
    if not weights:
        refuse("a net needs at least one weight matrix")
    biases = [None] * len(weights) if biases is None else list(biases)
    if len(biases) != len(weights):
        refuse(f"{len(weights)} weight matrices but {len(biases)} biases; give one per layer, None where absent")
    for l, (w, b) in enumerate(zip(weights, biases), 1):
        if w.ndim != 2 or 0 in w.shape:
            refuse(f"W^({l}) has shape {tuple(w.shape)}; a non-empty matrix [n_{l}, n_{l - 1}] is needed")
        if l > 1 and w.shape[1] != weights[l - 2].shape[0]:
            refuse(f"W^({l}) takes {w.shape[1]} inputs but layer {l - 1} has {weights[l - 2].shape[0]} neurons")
        if b is not None and b.shape != w.shape[:1]:
            refuse(f"b^({l}) has shape {tuple(b.shape)} but layer {l} has {w.shape[0]} neurons")
        for tensor in (w, b):
            if tensor is not None and (tensor.dtype != weights[0].dtype or not tensor.is_floating_point()):
                refuse(f"layer {l} holds {tensor.dtype}, layer 1 {weights[0].dtype}", error="DtypeError")
    shape = triple(*activation) if isinstance(activation, tuple) else triple(activation)
    return Net(tuple(w.detach() for w in weights), tuple(b if b is None else b.detach() for b in biases), shape)


def run(net: Net, x: Tensor) -> Trace:
    """E[19] for a batch x of shape [N, n_0], with σ' and σ'' at every hidden pre-activation."""
    if x.ndim != 2 or x.shape[1] != net.widths[0] or len(x) == 0:
        refuse(f"inputs have shape {tuple(x.shape)}; [N, {net.widths[0]}] with N >= 1 is needed")
    if x.dtype != net.weights[0].dtype:
        refuse(f"inputs are {x.dtype}, the net is {net.weights[0].dtype}; convert one", error="DtypeError")
    z, h, slope, curvature = [x], [x], [torch.ones_like(x)], [torch.zeros_like(x)]
    for l, (w, b) in enumerate(zip(net.weights, net.biases), 1):
        value = h[-1] @ w.T if b is None else h[-1] @ w.T + b
        z.append(value)
        if l < net.depth:
            h.append(net.activation.sigma(value))
            slope.append(net.activation.d1(value))
            curvature.append(net.activation.d2(value))
            if not all(bool(torch.isfinite(t).all()) for t in (h[-1], slope[-1], curvature[-1])):
                refuse(f"layer {l} holds NaN or Inf; check inputs and weights", error="NonFiniteError")
    return Trace(tuple(z), tuple(h), tuple(slope), tuple(curvature))


def random_net(
    widths: Sequence[int],
    activation: Any,
    *,
    generator: torch.Generator,
    scale: float = 1.0,
    bias_scale: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Net:
    """W^(l) ~ N(0, scale²/n_{l-1}), b^(l) ~ N(0, bias_scale²) for widths n_0, ..., n_L."""
    if len(widths) < 2:
        refuse(f"widths {tuple(widths)} need an input and an output layer at least")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    weights = [normal(b, a) * (scale / a**0.5) for a, b in pairwise(widths)]
    return make_net(weights, [normal(b) * bias_scale for b in widths[1:]], activation)


def diagonal_net(net: Net) -> Net:
    """`net` with only the diagonals of the weights between hidden layers kept: one path between any two
    hidden neurons.
    """
    weights = [w if l in (0, net.depth - 1) else torch.zeros_like(w) for l, w in enumerate(net.weights)]
    for l in range(1, net.depth - 1):
        k = min(net.weights[l].shape)
        weights[l][range(k), range(k)] = net.weights[l][range(k), range(k)]
    return make_net(weights, net.biases, net.activation)


def most_paths(net: Net) -> int:
    """Largest number of paths of nonzero weights between two hidden neurons. At most 1: the paper's D is
    exact.
    """
    most = 1
    for l in range(1, net.depth - 1):
        count = torch.eye(net.widths[l], dtype=torch.float64, device=net.weights[0].device)
        for w in net.weights[l : net.depth - 1]:
            count = (w != 0).to(torch.float64) @ count
            most = max(most, int(count.max()))
    return most
