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
from hessdiag.graph.layers.layer import Along, Half, Into, Layer, Parts, Way
from hessdiag.graph.layers.positions import PositionWise
from hessdiag.graph.nodes import Edge, edge_shape, is_leaf, sizes
from hessdiag.graph.sites.site import Legs
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


def input_of(node: Any) -> Tensor:
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
        """W must be a parameter or computed from such alone, b as wide as the outputs, x no parameter."""
        left, right, extra = _SLOTS[node.name()]
        edges = node.next_functions
        bias = None
        if extra is not None and extra < len(edges) and graph.is_free(edges[extra][0]):
            bias = graph.direct(node, extra)
            shape, width = edge_shape(edges[extra]), sizes(node).shape[-1]
            if shape.numel() != width:
                graph.refuse(node, f"bias {bias!r} of shape {list(shape)} for {width} outputs")
        if graph.is_free(edges[left][0]):
            graph.refuse(node, f"parameter {graph.through(edges[left][0])!r} applied from the left")
        if graph.is_live(edges[right][0]) and not graph.is_free(edges[right][0]):
            both = (
                "both matrices depend on the inputs and on parameters, and neither has an axis of samples (samples one "
                "by one in a loop, or a batch times itself)"
            )
            constant = (
                "a constant matrix is applied from the left, where the samples should stand (write h @ A.T, the "
                "samples first, or torch.sparse.mm(A, h))"
            )
            graph.refuse(node, both if graph.is_live(edges[left][0]) else constant)
        turned = _turned(edges[right][0], graph)
        weight = graph.apply(turned) if turned is not None else graph.direct(node, right)
        scaled = not is_plain(node) or saved.number(node, "beta", 1.0) != 1
        if node.name() == "AddmmBackward0" and scaled and (weight or bias):
            graph.refuse(node, "a scaled addmm")
        if not (weight or bias):
            return None
        transposed = weight is not None and (turned is None) != (node.name() == "LinearBackward0")
        return Layer(cls, graph.layer_name(weight, bias), node, weight, bias, transposed)

    @classmethod
    def given(cls, node: Any) -> int:
        """That of x."""
        return _SLOTS[node.name()][0]

    @classmethod
    def enters(cls, node: Any, graph: Graph) -> bool:
        """A constant x."""
        return not graph.is_live(input_edge(node)[0])

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """dx W^T + x dW^T."""
        x, w, _ = _SLOTS[node.name()]
        if any(slot not in (x, w) for slot, _, _ in given):
            return None
        total: Tensor | None = None
        for slot, edge, tangent in given:
            value = tangent.dense(edge_shape(edge))
            if slot == x:
                weight = matrix(node)
                if weight is None:
                    raise UncoveredModelError(f"{node.name()} did not save its matrix; is the input's gradient needed?")
                part: Tensor = value @ weight.T
            else:
                value = value.transpose(1, 2) if node.name() == "LinearBackward0" else value
                rows = input_of(node)
                part = (rows.reshape(-1, rows.shape[-1]) @ value).reshape(len(value), *shape)
            total = part if total is None else total + part
        assert total is not None
        alpha = saved.number(node, "alpha", 1.0)
        return Tangent(total if alpha == 1.0 else total * alpha)

    @classmethod
    def fan(cls, node: Any) -> int:
        """Width of the input."""
        if node.name() == "LinearBackward0":
            return int(saved.tensor(node, "weight").shape[1])
        return saved.integers(node, "mat2_sym_sizes")[0]

    def read(self) -> None:
        """x."""
        if self.layer.weight:
            self._x = input_of(self.layer.node)

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

    @classmethod
    def one_output(cls, layer: Layer, places: tuple[int, ...]) -> bool:
        """One unit, of a place each time."""
        return len(places) == 1 and edge_shape((layer.node, 0))[-1] % places[0] == 0

    def units(self) -> Tensor:
        """Output units."""
        return torch.arange(self.out[-1], device=sizes(self.layer.node).device)

    def given_rows(self) -> Tensor | None:
        """x, of a matrix stored [out, in]."""
        if self.layer.transposed or not self.layer.weight:
            return None
        return self._x.reshape(self.samples, -1, self._x.shape[-1])

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

    # -- parameters that are applied more than once

    def some(self, delta: Tensor, low: int, high: int) -> dict[str, Tensor]:
        """Of the bias; the weight has factors."""
        assert self.layer.bias is not None
        return {self.layer.bias: delta.reshape(self.samples, -1, delta.shape[-1])[low:high].sum(1)}

    def factors(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """delta^T and x^T, the positions last."""
        return self._factors(delta, self._x)

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """2 sum_t g_t^T dW dx_t: pairs of lam_t dx_ti and (dW^T g_t)_i / lam_t, lam_t = |g_t|^(1/2), at every t."""
        node = self.layer.node
        x, w, _ = _SLOTS[node.name()]
        size = torch.linalg.vector_norm(adjoint, dim=-1, keepdim=True)
        lam, live = size.sqrt(), size > 0
        c = (2.0 * live.to(adjoint.dtype)).expand(edge_shape(node.next_functions[x]))
        rate = torch.where(live, lam, 1.0).reciprocal()
        half = _Turned(self, adjoint, rate, stored_in=node.name() != "LinearBackward0")
        return c, ((node.next_functions[x], lam),), ((node.next_functions[w], half),)

    def _factors(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        d = delta.reshape(self.samples, -1, delta.shape[-1]).transpose(1, 2)
        x = x.reshape(self.samples, -1, x.shape[-1]).transpose(1, 2)
        return (x, d) if self.layer.transposed else (d, x)

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


class _Turned(Half):
    """(dW^T g_t) / lam_t at every position; W comes as [in, out] or as [out, in]."""

    def __init__(self, of: Linear, g: Tensor, rate: Tensor, *, stored_in: bool) -> None:
        self.of, self.g, self.rate, self.stored_in = of, g, rate, stored_in

    def push(self, tangents: Tensor) -> Tensor:
        w = tangents.transpose(1, 2) if self.stored_in else tangents
        moved = self.g.reshape(-1, self.g.shape[-1]) @ w
        return moved.reshape(len(w), *self.g.shape[:-1], w.shape[-1]) * self.rate

    def pull(self, seed: Tensor) -> Tensor:
        d, x = (t.reshape(-1, t.shape[-1]) for t in (self.g, seed * self.rate))
        return x.T @ d if self.stored_in else d.T @ x

    def some(self, seed: Tensor, low: int, high: int) -> Tensor:
        left, right = self.factors(seed)
        return left[low:high] @ right[low:high].transpose(1, 2)

    def factors(self, seed: Tensor) -> tuple[Tensor, Tensor]:
        return self.of._factors(self.g, seed * self.rate)


def _turned(node: Any, graph: Graph) -> Edge | None:
    """The chosen parameter behind one transposition, if that is all there is."""
    if node is None or node.name() not in _TURNED:
        return None
    edge: Edge = node.next_functions[0]
    if not (is_leaf(edge[0]) and graph.is_free(edge[0]) and edge[0].variable.ndim == 2):
        return None
    dims = saved.integers(node, "dims") or (saved.integer(node, "dim0", 0), saved.integer(node, "dim1", 1))
    if [int(d) % 2 for d in dims] not in ([0, 1], [1, 0]) or (
        node.name() == "PermuteBackward0" and int(dims[0]) % 2 == 0
    ):
        return None  # a turn that turns nothing
    return edge
