"""A linear layer on the last axis: a_t = W x_t + b for every position (token) t of a sample.

G_n = sum_t delta_nt x_nt^T for the weight, sum_t delta_nt for the bias. On vectors (one position) sum_n G_n^2 =
(delta^2)^T (x^2), and no gradient of a single sample is ever formed; with positions they exist in chunks. Exact second
derivatives, on vectors: one direction per output unit, then H_W = Q^T x^2. With positions: one direction per weight, or
one per output position, whichever costs less (see `positions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError
from hessdiag.graph import saved
from hessdiag.graph.chunks import gram_product, grouped, outer
from hessdiag.graph.kinds import Given
from hessdiag.graph.layers.layer import Along, Into, Layer, Parts, Way
from hessdiag.graph.layers.positions import PositionWise
from hessdiag.graph.nodes import Edge, edge_shape, is_leaf, sizes
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph

_TURNED = frozenset({"TBackward0", "TransposeBackward0", "PermuteBackward0"})
_SLOTS: dict[str, tuple[int, int, int | None]] = {
    "AddmmBackward0": (1, 2, 0),
    "MmBackward0": (0, 1, None),
    "LinearBackward0": (0, 1, 2),
}
"""Input slots of x, W and b."""


def given(node: Any) -> Tensor:
    """What a linear layer was given, from what its node saved."""
    found = saved.first_tensor(node, "mat1", "self", "input")
    if found is None:
        raise UncoveredModelError(f"{node.name()} did not save its input; is the weight's gradient needed?")
    return found


def input_edge(node: Any) -> Edge:
    """The edge of x."""
    edge: Edge = node.next_functions[_SLOTS[node.name()][0]]
    return edge


def is_plain(node: Any) -> bool:
    """No factor before the product."""
    return saved.number(node, "alpha", 1.0) == 1


def matrix(node: Any) -> Tensor | None:
    """W as [out, in], or None where the node kept none (x needs no gradient)."""
    if node.name() == "LinearBackward0":
        return saved.tensor(node, "weight")
    turned = saved.tensor_or_none(node, "mat2")
    return None if turned is None else turned.T


class Linear(PositionWise):
    """Addmm, mm and linear of a weight that is a parameter, or one turned."""

    name = "linear"
    nodes = frozenset(_SLOTS)
    always_audited = False

    @classmethod
    def match(cls, node: Any, graph: Graph) -> Layer | None:
        """W must be the parameter itself or its transpose, b as wide as the outputs, x no parameter."""
        left, right, extra = _SLOTS[node.name()]
        sources = [source for source, _ in node.next_functions]
        bias = None
        if extra is not None and extra < len(sources) and graph.is_live(sources[extra]) and is_leaf(sources[extra]):
            bias = graph.direct(node, extra)
            shape, width = sources[extra].variable.shape, sizes(node).shape[-1]
            if shape.numel() != width:
                graph.refuse(node, f"bias {bias!r} of shape {list(shape)} for {width} outputs")
        turned = _turned(sources[right], graph)
        weight = graph.direct(node, right) if is_leaf(sources[right]) else turned
        if weight is None and graph.is_live(sources[right]):
            if turned is None and graph.through(sources[right]):
                graph.refuse(node, f"a weight computed from {graph.through(sources[right])!r} (a parametrisation)")
            graph.refuse(
                node,
                "a product of two matrices that both depend on the parameters"
                if graph.is_live(sources[left])
                else "a matrix that is computed from parameters",
            )
        if is_leaf(sources[left]) and graph.is_live(sources[left]):
            graph.refuse(node, f"parameter {graph.parameter_of(sources[left])!r} applied from the left")
        scaled = not is_plain(node) or saved.number(node, "beta", 1.0) != 1
        if node.name() == "AddmmBackward0" and scaled and (weight or bias):
            graph.refuse(node, "a scaled addmm")
        if not (weight or bias):
            return None
        transposed = weight is not None and (turned is None) != (node.name() == "LinearBackward0")
        return Layer(cls, graph.layer_name(weight, bias), node, weight, bias, transposed)

    @classmethod
    def carries(cls, node: Any, graph: Graph) -> bool:
        """A transposed weight on its way to its layer, read there."""
        return _turned(node, graph) is not None

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """dx W^T."""
        if len(given) != 1 or given[0][0] != _SLOTS[node.name()][0]:
            return None
        _, edge, tangent = given[0]
        weight = matrix(node)
        if weight is None:
            raise UncoveredModelError(f"{node.name()} did not save its matrix; is the input's gradient needed?")
        moved: Tensor = tangent.dense(edge_shape(edge)) @ weight.T
        alpha = saved.number(node, "alpha", 1.0)
        return Tangent(moved if alpha == 1.0 else moved * alpha)

    @classmethod
    def fan(cls, node: Any) -> int:
        """Width of the input."""
        if node.name() == "LinearBackward0":
            return int(saved.tensor(node, "weight").shape[1])
        return saved.integers(node, "mat2_sym_sizes")[0]

    def read(self) -> None:
        """x."""
        if self.layer.weight:
            self._x = given(self.layer.node)

    def per_group(self, delta: Tensor, group: int, *, squares: bool) -> Parts:
        """Of G_n = sum_t delta_nt x_nt^T and sum_t delta_nt."""
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

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """sum c x^2 and sum c, over samples and positions."""
        layer, out = self.layer, {}
        flat = c.reshape(-1, self.out[-1])
        if layer.weight:
            square = self._x.reshape(-1, self._x.shape[-1]).square()
            out[layer.weight] = square.T @ flat if layer.transposed else flat.T @ square
        if layer.bias:
            out[layer.bias] = flat.sum(0)
        return out

    def gram(self, delta: Tensor) -> Tensor:
        """X X^T delta, and the sum over positions for the bias."""
        out = torch.zeros_like(delta)
        d = delta.reshape(self.samples, -1, delta.shape[-1])
        if self.layer.weight:
            x = self._x.reshape(self.samples, d.shape[1], -1)
            out += gram_product(x, d).reshape(delta.shape)
        if self.layer.bias:
            out += d.sum(1, keepdim=True).expand(d.shape).reshape(delta.shape)
        return out

    # -- second derivatives along single parameters

    @property
    def channels(self) -> int:
        """Output units."""
        return self.out[-1]

    @property
    def positions(self) -> int:
        """Tokens of a sample."""
        return self.out.numel() // (self.out[-1] * self.samples)

    @property
    def fan_in(self) -> int:
        """Input units."""
        return self._x.shape[-1] if self.layer.weight else 0

    def seen(self) -> Tensor:
        """x as [N, 1, fan, positions]."""
        return self._x.reshape(self.samples, 1, self.positions, -1).transpose(2, 3)

    def ones(self) -> Tensor:
        """What the bias sees."""
        meta = sizes(self.layer.node)
        return torch.ones(self.samples, 1, 1, self.positions, dtype=meta.dtype, device=meta.device)

    def placed(self, seed: Tensor) -> Tensor:
        """[K, n, channels, positions] with the positions before the channels."""
        return seed.transpose(2, 3)

    def eye(self, channel: int) -> Tangent:
        """One direction per token, in one output unit."""
        meta, places = sizes(self.layer.node), self.positions
        eye = torch.eye(places, dtype=meta.dtype, device=meta.device)
        value = eye.new_zeros(places, self.samples, places, self.channels)
        value[..., channel] = eye[:, None]
        return Tangent(value.reshape(-1, *self.out))

    def ways(self, parameters: Mapping[str, Tensor]) -> list[Way]:
        """On vectors one direction per output unit; with positions as in `positions`."""
        if self.positions == 1:
            return [Way(self.channels, self._neurons)]
        return super().ways(parameters)

    def _neurons(self, along: Along, into: Into, count: int) -> None:
        layer, units, meta = self.layer, self.channels, sizes(self.layer.node)
        for low in range(0, units, count):
            high = min(low + count, units)
            seed = torch.zeros(high - low, self.samples, units, dtype=meta.dtype, device=meta.device)
            rows = torch.arange(high - low, device=seed.device)
            seed[rows, :, rows + low] = 1
            q = along.total(Tangent(seed.reshape(-1, *self.out)))
            if layer.bias:
                into.add(layer.bias, slice(low, high), q)
            if layer.weight:
                into.outer(layer.weight, low, q, self._x.reshape(self.samples, -1).square())


def _turned(node: Any, graph: Graph) -> str | None:
    """The chosen parameter behind one transposition, if that is all there is."""
    if node is None or node.name() not in _TURNED:
        return None
    source = node.next_functions[0][0]
    if not (is_leaf(source) and graph.is_live(source) and source.variable.ndim == 2):
        return None
    dims = saved.integers(node, "dims") or (saved.integer(node, "dim0", 0), saved.integer(node, "dim1", 1))
    if [int(d) % 2 for d in dims] not in ([0, 1], [1, 0]) or (
        node.name() == "PermuteBackward0" and int(dims[0]) % 2 == 0
    ):
        return None  # a turn that turns nothing
    if (uses := len(graph.consumers(node))) > 1:
        graph.refuse(node, f"parameter {graph.parameter_of(source)!r} (transposed) used {uses} times")
    return graph.direct(node, 0)
