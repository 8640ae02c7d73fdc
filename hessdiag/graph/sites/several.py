"""A function of several tensors, entry by entry: a power, an angle, an interpolation by a gate.

Its first and second derivatives are those of the formula, by autograd on copies of what the node saved, expanded to the
output's shape. With inputs that enter affinely alone the node is none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.graph import saved
from hessdiag.graph.kinds import Given
from hessdiag.graph.nodes import edge_shape, sizes
from hessdiag.graph.sites.site import Pairs, Pointwise
from hessdiag.graph.tangents import Tangent, broadcast

if TYPE_CHECKING:
    from hessdiag.graph.reading import Graph

Formula = Callable[..., Tensor]
_FORMULAS: dict[str, tuple[Mapping[int, str], Formula]] = {
    "AddcdivBackward0": ({1: "tensor1", 2: "tensor2"}, torch.div),
    "AddcmulBackward0": ({1: "tensor1", 2: "tensor2"}, torch.mul),
    "LerpBackward1": ({0: "self", 1: "end", 2: "weight"}, lambda a, b, w: a + w * (b - a)),
    "Atan2Backward0": ({0: "self", 1: "other"}, torch.atan2),
    "HypotBackward0": ({0: "self", 1: "other"}, torch.hypot),
    "PowBackward1": ({0: "self", 1: "exponent"}, torch.pow),
    "XlogyBackward0": ({0: "self", 1: "other"}, torch.xlogy),
    "SpecialXlog1PyBackward0": ({0: "self", 1: "other"}, torch.special.xlog1py),
    "Logaddexp2Backward0": ({0: "self", 1: "other"}, torch.logaddexp2),
}
"""By node: the inputs that it bends in, under the names by which they are saved, and the function of them."""


class Several(Pointwise):
    """Products with an addend, powers, angles, interpolations."""

    name = "several"
    nodes = frozenset(_FORMULAS)
    live_inputs = 2

    @classmethod
    def match(cls, node: Any, graph: Graph) -> bool:
        """One of the inputs that it bends in depends on parameters, and all of these were saved."""
        names, _ = _FORMULAS[node.name()]
        live = any(graph.is_live(node.next_functions[slot][0]) for slot in names if slot < len(node.next_functions))
        return live and _inputs(node) is not None

    @classmethod
    def second(cls, node: Any) -> Pairs:
        """Those of the formula, in all inputs that have a gradient."""
        slots = [slot for slot in _FORMULAS[node.name()][0] if node.next_functions[slot][0] is not None]
        first, leaves = _first(node)
        pairs: dict[tuple[int, int], Tensor] = {}
        for place, i in enumerate(slots):
            if first[i].requires_grad:
                rest, ones = slots[place:], torch.ones_like(first[i])
                found = torch.autograd.grad(
                    first[i], [leaves[j] for j in rest], ones, retain_graph=True, materialize_grads=True
                )
                pairs |= {(i, j): value.detach() for j, value in zip(rest, found)}
        return pairs

    @classmethod
    def factor(cls, node: Any, slot: int) -> tuple[bool, Tensor | None]:
        """The formula's first derivative; 1 for an addend."""
        names, _ = _FORMULAS[node.name()]
        if slot not in names:
            return True, None
        return (False, None) if _inputs(node) is None else (True, _first(node)[0][slot].detach())

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """The sum over inputs of first derivative times tangent."""
        if _inputs(node) is None:
            return None
        first, total = _first(node)[0], None
        for slot, edge, tangent in given:
            part = broadcast(tangent.dense(edge_shape(edge)), shape)
            part = part * first[slot].detach() if slot in first else part.expand(len(part), *shape)
            total = part if total is None else total + part
        return None if total is None else Tangent(total)


def _inputs(node: Any) -> dict[int, Tensor] | None:
    """The inputs of the formula, each of the output's shape and dtype; None where one was not saved."""
    meta = sizes(node)
    found = {slot: saved.tensor_or_none(node, name) for slot, name in _FORMULAS[node.name()][0].items()}
    if any(value is None for value in found.values()):
        return None
    return {
        slot: torch.empty(meta.shape, dtype=meta.dtype, device=meta.device).copy_(value)
        for slot, value in found.items()
        if value is not None
    }


def _first(node: Any) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """(first derivatives with their graph, the copies that they are taken in)."""
    _, function = _FORMULAS[node.name()]
    inputs = _inputs(node)
    assert inputs is not None
    with torch.enable_grad():
        leaves = {slot: value.requires_grad_() for slot, value in inputs.items()}
        value = function(*leaves.values()) * saved.number(node, "value", 1.0)
        first = torch.autograd.grad(value.sum(), list(leaves.values()), create_graph=True)
    return dict(zip(leaves, first)), leaves
