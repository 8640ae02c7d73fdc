"""A node of torch's own that no list knows, admitted by test: its backward says whether it is affine, or how it bends.

Affine: the pullback does not depend on the inputs. Otherwise, with one live input u, the node's Hessian contracted with
the adjoints of its outputs in use, a matrix on the entries of u, is applied to a vector of ones and to random ones.
Where both agree with one diagonal c, that is a site on u, sum of c du^2; where they do not, or with several live
inputs, entries bend together: in small blocks, which are filled (`contracted`), or the node is refused. The tests are
made of every batch, with the numbers of that batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.activations.admission import refusal_of
from hessdiag.graph.nodes import edge_key, edge_shape, sizes
from hessdiag.graph.pullback import Recorded, random_like
from hessdiag.graph.sites.contracted import BLOCKS, LARGEST, Contracted
from hessdiag.graph.sites.site import Site, SiteKind

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph

DIAGONAL = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the Hessian's largest entries, what may be left beside its diagonal."""
OVERWRITTEN = (
    "what it saved for its derivative was overwritten in place: no gradient exists; "
    "use the out-of-place form of the operation after it"
)
ONCE = "torch has no second derivative of it"
_KEPT = "hessdiag live inputs"


class Tested(SiteKind):
    """Asked last, and of whatever node is left."""

    name = "tested"

    @classmethod
    def takes(cls, node: Any) -> bool:
        """None by name."""
        return False

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """True where it bends, False where it is affine; refused where neither can be said."""
        slots = [slot for slot, (source, _) in graph.inputs(node) if graph.is_live(source)]
        if getattr(node, "_forward_cls", None) is not None:
            graph.refuse(node, refusal_of(node))
        try:
            bent = _bent(node, slots)
        except RuntimeError as error:
            reason = _reason(error)
            graph.refuse(node, reason, twice=reason != ONCE)
        if not bent:
            return False
        used = tuple(sorted(graph.outputs_in_use(node)))
        several = len({edge_key(node.next_functions[slot]) for slot in slots}) > 1
        seeds = {number: seed for number, seed in enumerate(_seeds(node)) if number in used and seed is not None}
        order = {id(one): place for place, one in enumerate(graph.nodes)}
        node.metadata[_KEPT] = slots, None, order, used
        if not several and _is_diagonal(node, slots, seeds):
            return True
        if len(seeds) < len(used) or any(seed.dtype not in DIAGONAL for seed in seeds.values()):
            graph.refuse(node, "an operation that the site identity does not cover: its entries bend together")
        contracted = Contracted(node, slots, seeds, order)
        axes = contracted.rows()
        if axes is None and graph.is_free(node):  # no samples, but one block
            axes = 0
        if axes is None:
            graph.refuse(node, "an operation that the site identity does not cover: it bends in all samples together")
        block, entries = contracted.size(axes)
        if block > LARGEST or entries > BLOCKS:
            graph.refuse(
                node, f"an operation that the site identity does not cover: {block} of its entries bend together"
            )
        node.metadata[_KEPT] = slots, axes, order, used
        return True

    @classmethod
    def outputs(cls, node: Any) -> tuple[int, ...]:
        """Those in use."""
        used: tuple[int, ...] = node.metadata[_KEPT][3]
        return used

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        """Of a node with one output."""
        return cls.written(node, {0: adjoint}, name)

    @classmethod
    def written(cls, node: Any, adjoints: Mapping[int, Tensor], name: str) -> list[Site]:
        """The diagonal of its Hessian as a site on its input, or its blocks."""
        slots, axes, order, _ = node.metadata[_KEPT]
        if axes is not None:
            return [Contracted(node, slots, adjoints, order).site(name, axes)]
        return [Site(name, _diagonal(node, slots, adjoints), ((node.next_functions[slots[0]], 1.0),))]


def _seeds(node: Any) -> list[Tensor | None]:
    """Random cotangents for its outputs, None where one has no derivative."""
    found: list[Tensor | None] = []
    for number, meta in enumerate(node._input_metadata):
        known = meta.dtype.is_floating_point or meta.dtype.is_complex
        found.append(random_like(torch.Size(meta.shape), meta.dtype, meta.device, number) if known else None)
    return found


def _bent(node: Any, slots: Sequence[int]) -> bool:
    """Whether the pullback depends on the inputs."""
    seeds = [None if seed is None else seed.requires_grad_() for seed in _seeds(node)]
    recorded = Recorded(node, seeds, slots)
    recorded.answers(seeds)
    changes = [change for change in recorded.along(recorded.random(1)) if change is not None]
    return any(bool((change != 0).any()) for change in changes)


def _recorded(node: Any, slots: Sequence[int], adjoints: Mapping[int, Tensor]) -> Recorded:
    recorded = Recorded(node, [adjoints.get(number) for number in range(len(node._input_metadata))], slots)
    recorded.edges = recorded.edges[:1]
    return recorded


def _product(recorded: Recorded, slots: Sequence[int], vector: Tensor) -> Tensor:
    (change,) = recorded.along([vector] * len(slots))
    return torch.zeros_like(vector) if change is None else change


def _diagonal(node: Any, slots: Sequence[int], adjoints: Mapping[int, Tensor]) -> Tensor:
    meta, recorded = sizes(*node.next_functions[slots[0]]), _recorded(node, slots, adjoints)
    ones = torch.ones(edge_shape(recorded.edges[0]), dtype=meta.dtype, device=meta.device)
    return _product(recorded, slots, ones)


def _is_diagonal(node: Any, slots: Sequence[int], adjoints: Mapping[int, Tensor]) -> bool:
    """Whether H r = (H 1) r for random r."""
    c, recorded = _diagonal(node, slots, adjoints), _recorded(node, slots, adjoints)
    if c.dtype not in DIAGONAL:
        return False
    for number in (2, 3):
        r = random_like(c.shape, c.dtype, c.device, number)
        found = _product(recorded, slots, r)
        off = (found - c * r).abs()
        if bool((off > DIAGONAL[c.dtype] * torch.maximum(found.abs().max(), c.abs().max())).any()):
            return False
    return True


def _reason(error: RuntimeError) -> str:
    """Why autograd could not tell."""
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "inplace" in said:
        return OVERWRITTEN
    if "not implemented" in said or "not supported" in said or "differentiated twice" in said:
        return ONCE
    return f"an operation that the site identity does not cover: its backward does not run by itself ({said})"
