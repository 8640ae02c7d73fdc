"""A layer: the one node where a parameter enters, a = weight * x + bias in some affine form, and what a kind must tell.

Everything is said of the gradients G_n = (da_n/dtheta)^T delta_n of single samples, delta the cotangent of the layer's
outputs. Curvature propagation needs sum_n G_n^2: squared before samples are summed, since summing first multiplies the
variance by about their number. Where a model folds tokens or patches into the batch axis, a sample owns several
neighbouring rows of it: their sum is G_n.

A kind gives `match` and either `each` (all G_n at once) or `per_group` (in chunks, so that they need not exist at
once). All else follows from these: J u for steps u of the parameters by double backward of `each`, which is linear in
delta. What a kind overrides beyond them is speed, and the closed form `weighted`, without which its share of the sites
that it feeds directly is left to signs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.errors import ConfigurationError, UncoveredModelError
from hessdiag.graph import saved
from hessdiag.graph.carried import Carried
from hessdiag.graph.chunks import grouped
from hessdiag.graph.kinds import NodeKind
from hessdiag.graph.nodes import edge_shape, sizes
from hessdiag.graph.sites.site import Legs, Map
from hessdiag.graph.tangents import Tangent

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph

Parts = Iterator[tuple[str, Tensor | Iterator[Tensor]]]
"""For each parameter: its gradients by groups in chunks, or the sum of their squares where that is cheaper."""


@dataclass(frozen=True)
class Layer:
    """One node that applies parameters affinely, once in the graph.

    `weight` and `bias` are names of *chosen* parameters, keys of what is computed from such alone (`Graph.applied`), or
    None; `transposed` marks a matrix stored [in, out].
    """

    kind: type[LayerKind]
    name: str
    node: Any
    weight: str | None
    bias: str | None
    transposed: bool = False
    carried: Carried | None = None
    """How its one parameter reaches it, where other nodes stand between."""

    def part(self, names: Collection[str]) -> Layer:
        """The same node applying some of its parameters alone."""
        weight, bias = (name if name in names else None for name in (self.weight, self.bias))
        return self if (weight, bias) == (self.weight, self.bias) else replace(self, weight=weight, bias=bias)

    @property
    def edge(self) -> GradientEdge:
        """The layer's output in the graph."""
        return GradientEdge(self.node, 0)

    @property
    def own(self) -> tuple[str, ...]:
        """Names of its chosen parameters."""
        return tuple(name for name in (self.weight, self.bias) if name)

    def on(self, samples: int, *, keep: bool = False) -> LayerKind:
        """The layer at work on its batch of so many samples."""
        return self.kind(self, samples, keep=keep)


class Along(Protocol):
    """Sums over the sites above a layer, for tangents [K, *shape] of its output."""

    samples: int

    def total(self, seed: Tangent) -> Tensor:
        """[K, N]: sum over the sites of each sample of c dz^2."""

    def block(self, seed: Tangent) -> Tensor:
        """[N, K, K]: sum over the sites of each sample of c dz_k dz_l."""


class Into(Protocol):
    """Where second derivatives are gathered."""

    def add(self, name: str, indices: slice, values: Tensor) -> None:
        """Those [k, N] of the entries `indices` of a parameter."""

    def outer(self, name: str, low: int, rows: Tensor, columns: Tensor) -> None:
        """Those of the rows low.. of a matrix: sum over n of rows[a, n] columns[n, i]."""

    def scatter(self, name: str, places: Tensor, values: Tensor) -> None:
        """Those [k, N] of entries that each sample names for itself, `places` [k, N]."""


class Half(Map):
    """The parameter's half of a node that is bilinear in it and in its input: dw is linear in dtheta, per sample."""

    @abstractmethod
    def some(self, seed: Tensor, low: int, high: int) -> Tensor:
        """[high - low, *shape of the parameter]: `pull`, sample by sample."""

    def factors(self, seed: Tensor) -> tuple[Tensor, Tensor]:
        """The same as factors, where the layer has them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Way:
    """One way to all second derivatives of a layer's own parameters: directions of its output moved to the sites above.

    `run(along, into, count)` moves `passes` directions, `count` in one pass; `together` must share a pass, and
    `extra(entries)` counts multiplications beyond the passes, for so many entries of sites.
    """

    passes: int
    run: Callable[[Along, Into, int], None]
    together: int = 1
    extra: Callable[[int], float] = lambda entries: 0.0


class LayerKind(NodeKind, ABC):
    """One layer on one batch: its inputs, prepared once and contracted with any number of cotangents."""

    sole: ClassVar[bool] = True
    """Its nodes are of no other kind: where none of their parameters is chosen they are affine in their input."""
    pointwise: ClassVar[int | None] = None
    """The input on which the node acts entry by entry and affinely, if any."""
    bends: ClassVar[bool] = False
    """Its nodes bend in their inputs besides: they are of a kind of site, too."""
    always_audited: ClassVar[bool] = True
    """Its layers are compared in every audit, rather than by lot."""
    sums_samples: ClassVar[bool] = False
    """To sum neighbouring samples before squaring may save time; a pilot tries."""
    normalises: ClassVar[bool] = False
    """Its weight is the gain of a normalisation."""

    @classmethod
    @abstractmethod
    def match(cls, node: Any, graph: Graph) -> Layer | list[Layer] | None:
        """The layer at a node, or None if the node applies no chosen parameter; `graph.refuse` what is not covered.

        A list where the node applies several parameters alike, one layer for each.
        """

    @classmethod
    def enters(cls, node: Any, graph: Graph) -> bool:
        """Whether what a node is given is a constant that holds samples, as a rule, and no table for all of them."""
        return False

    @classmethod
    def constant(cls, node: Any) -> Tensor | None:
        """What a node that samples enter is given; None where it is not told."""
        return saved.first_tensor(node, "mat1", "self", "input")

    @classmethod
    def given(cls, node: Any) -> int | None:
        """The slot of what the parameter is applied to; None where that is a constant throughout."""
        return 0

    @classmethod
    def carries(cls, node: Any, graph: Graph) -> bool:
        """Whether a node of these does nothing but carry a chosen parameter to its layer."""
        return False

    def __init__(self, layer: Layer, samples: int, *, keep: bool = False) -> None:
        self.layer, self.samples, self.keep = layer, samples, keep
        self.out = edge_shape((layer.node, 0))
        if not self.out or self.out[0] % samples:
            raise UncoveredModelError(
                f"{layer.name!r}: its outputs have the shape {list(self.out)} for {samples} samples, which do not lie "
                "along its first axis; use method='hutchinson'"
            )
        self.rows, self.fold = self.out[0], self.out[0] // samples
        self.read()

    def read(self) -> None:
        """Take what the node saved, once and before any pass: under checkpointing it cannot be done within one."""

    # -- gradients of single samples

    def each(self, delta: Tensor) -> dict[str, Tensor]:
        """{parameter name: G_n} with the samples as first axis."""
        out = {}
        for name, parts in self.per_group(delta, 1, squares=False):
            assert not isinstance(parts, Tensor)
            kept = list(parts)  # each a new tensor
            out[name] = kept[0] if len(kept) == 1 else torch.cat(kept)
        return out

    def per_group(self, delta: Tensor, group: int, *, squares: bool) -> Parts:
        """The same summed over groups of neighbouring samples, in chunks; with `squares` their squares' sum serves."""
        for name, gradients in self.each(delta).items():
            yield name, iter([grouped(gradients, group)])

    def summed(self, delta: Tensor, *, group: int = 1) -> dict[str, Tensor]:
        """{parameter name: sum over groups of (sum over the group's samples of G_n)^2}."""
        result: dict[str, Tensor] = {}
        for name, per_group in self.per_group(delta, group, squares=True):
            if isinstance(per_group, Tensor):
                result[name] = per_group
                continue
            for part in per_group:
                square = part.square_().sum(0)
                result[name] = square if name not in result else result[name].add_(square)
        return result

    def over(self, deltas: Sequence[Tensor], signs: Sequence[float]) -> dict[str, Tensor]:
        """{parameter name: sum over passes, each with its sign, of `summed`}, in float64."""
        total: dict[str, Tensor] = {}
        for delta, sign in zip(deltas, signs):
            for name, value in self.summed(delta).items():
                total[name] = value.double().mul_(sign) if name not in total else total[name].add_(value, alpha=sign)
        return total

    def weighted(self, c: Tensor) -> dict[str, Tensor]:
        """{parameter name: sum over samples and positions of c (da/dtheta)^2} for weights c on the layer's outputs."""
        raise NotImplementedError

    def units(self) -> Tensor | None:
        """Numbers that broadcast to the layer's output: entries with different numbers share no scalar parameter. None
        where that is not known.
        """
        return None

    def onto(self, v: Tensor) -> Tensor:
        """Cotangents of the output brought onto what steps of a sample's own parameters can reach, sample by sample, or
        onto anything that holds it: as they stand.
        """
        return v

    def stretch(self) -> Tensor | None:
        """Factors s on the output, so that s v over all unit vectors v of that space is, up to their order and beyond
        `drawn`, one unit step of each parameter; None where that is not so, and all are 1.
        """
        return None

    def drawn(self, signs: Tensor) -> Tensor:
        """Signs on the output as a vector of that space, E[v v^T] being the identity there: brought `onto` it."""
        return self.onto(signs)

    def looked_up(self) -> Tensor | None:
        """Of a layer whose outputs are rows of its weight: their numbers [samples, places], -1 where it is none."""
        return None

    def given_rows(self) -> Tensor | None:
        """Of a layer whose output v is row v of its weight times what it is given: that, [samples, places, width]."""
        return None

    @classmethod
    def has_closed_share(cls) -> bool:
        """Whether the kind gives `weighted`."""
        return cls.weighted is not LayerKind.weighted

    @classmethod
    def one_output(cls, layer: Layer, places: tuple[int, ...]) -> bool:
        """Whether no parameter touches two of the model's outputs of one place, `places` their number and arrangement:
        (classes,) where these stand last, (classes, pixels) where they stand first.
        """
        return False

    def push(self, steps: Mapping[str, Tensor]) -> Tensor:
        """J u: the change of the layer's outputs for steps [samples, ...] of each sample's own parameters."""
        blank, pulled = self._pulled()
        names = [name for name in steps if name in pulled]
        (moved,) = torch.autograd.grad([pulled[n] for n in names], blank, [steps[n] for n in names])
        return moved

    def gram(self, delta: Tensor) -> Tensor:
        """J_n J_n^T delta_n for every sample: the layer's answer to a step of its parameters along G_n."""
        return self.push(self.each(delta))

    def _pulled(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A blank cotangent, and `each` of it as a function of it."""
        meta = sizes(self.layer.node)
        with torch.enable_grad():
            blank = torch.zeros(self.out, dtype=meta.dtype, device=meta.device, requires_grad=True)
            pulled = self.each(blank)
        if not all(found.requires_grad for found in pulled.values()):
            raise ConfigurationError(f"layer kind {self.name!r}: `each` must keep the graph of what it is given")
        return blank, pulled

    @classmethod
    def kept_bytes(cls, layer: Layer) -> int:
        """Bytes that are held between passes with `keep`."""
        return 0

    # -- parameters that are applied more than once

    def some(self, delta: Tensor, low: int, high: int) -> dict[str, Tensor]:
        """G_n of the samples low..high-1."""
        return {name: gradients[low:high] for name, gradients in self.each(delta).items()}

    def factors(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(left, right), [samples, a, s] and [samples, b, s], such that the weight's G_n is left right^T.

        Uses of a weight are joined along s, and `some` serves the bias alone.
        """
        raise NotImplementedError

    @classmethod
    def factored(cls) -> bool:
        """Whether the kind gives `factors`."""
        return cls.factors is not LayerKind.factors

    @classmethod
    def crossing(cls, layer: Layer) -> bool:
        """Whether the node is bilinear in its parameter and its input: not if it only adds it."""
        return layer.weight is not None

    def cross(self, adjoint: Tensor) -> tuple[Tensor, Legs, Legs]:
        """The node's own term 2 <g, d2a(dtheta, dx)>, as a pair: where x depends on the same parameter as well.

        The second half is a `Half` on the edge of the parameter. (c, legs, right); `adjoint` is g.
        """
        raise UncoveredModelError(
            f"{self.layer.name!r} applies a parameter to what depends on the same parameter, and its kind "
            f"{self.name!r} has no rule for that; use method='hutchinson' (or 'auto')"
        )

    # -- second derivatives along single parameters

    def ways(self, parameters: Mapping[str, Tensor]) -> list[Way]:
        """How all of them can be had; whichever costs least is taken. By default one direction per scalar parameter."""

        def run(along: Along, into: Into, count: int) -> None:
            for name, indices, seed in self.directions(parameters, count):
                into.add(name, indices, along.total(seed))

        return [Way(sum(parameters[name].numel() for name in self.layer.own), run)]

    def directions(self, parameters: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, slice, Tangent]]:
        """da along single entries of a parameter, `count` at a time: (its name, which entries, [K, *shape])."""
        blank, pulled = self._pulled()
        for name in self.layer.own:
            with torch.enable_grad():
                entries = pulled[name].sum(0).flatten().unbind()
            for low in range(0, len(entries), count):
                rows = [torch.autograd.grad(one, blank, retain_graph=True)[0] for one in entries[low : low + count]]
                yield name, slice(low, low + len(rows)), Tangent(torch.stack(rows))
