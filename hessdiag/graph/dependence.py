"""What of a model's autograd graph depends on the chosen parameters, and who takes whose output.

A tensor without entries depends on nothing, and nothing on it: an expert that a batch sends no rows is no part of that
batch's graph, and its parameters have zero there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from hessdiag.errors import UncoveredModelError
from hessdiag.graph.nodes import Edge, filled, forward_order, is_leaf, short_name


class Live:
    """The nodes between chosen parameters and outputs, in forward order, with look-ups in either direction."""

    def __init__(self, outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        self.outputs = outputs
        self._chosen = {id(parameter): name for name, parameter in parameters.items()}
        self.nodes = forward_order(outputs.grad_fn, empty=False)
        self._inputs = {id(node): filled(node) for node in self.nodes}
        self._uses: dict[int, list[tuple[Any, int]]] = {}
        self._live = self._mark()
        self._bits: dict[int, int] = {}
        self._below: dict[int, str] = {}  # the layer last passed on the way to a node, by the node's id

    def is_live(self, node: Any) -> bool:
        """True if the node's output depends on a chosen parameter."""
        return node is not None and id(node) in self._live

    def place(self, node: Any) -> str:
        """Where a node stands: the layer last passed on the way to it."""
        below = self._below.get(id(node), "")
        return f"after {below!r}" if below else "at the model's entrance"

    def inputs(self, node: Any) -> list[tuple[int, Edge]]:
        """(input slot, edge) of all that a node of `nodes` is given within the graph and that has entries."""
        return self._inputs[id(node)]

    def consumers(self, node: Any) -> list[tuple[Any, int]]:
        """(node, input slot) of everything that takes `node`'s output, dead branches included."""
        return self._uses.get(id(node), [])

    def outputs_in_use(self, node: Any) -> set[int]:
        """Numbers of the node's outputs that something takes, the model's own outputs included."""
        found = {user.next_functions[slot][1] for user, slot in self.consumers(node)}
        return found | ({self.outputs.output_nr} if node is self.outputs.grad_fn else set())

    def parameter_of(self, node: Any) -> str | None:
        """Name of the chosen parameter that an AccumulateGrad node stands for."""
        return self._chosen.get(id(node.variable)) if is_leaf(node) else None

    def _mark(self) -> set[int]:
        live: set[int] = set()
        for node in self.nodes:
            if is_leaf(node):
                if id(node.variable) in self._chosen:
                    live.add(id(node))
                continue
            for slot, (source, _) in self.inputs(node):
                self._uses.setdefault(id(source), []).append((node, slot))
                if id(source) in live:
                    live.add(id(node))
        return live

    def through(self, node: Any) -> str:
        """Name of a chosen parameter that a node is computed from; empty if there is none."""
        stack, seen = [node], set()
        while stack:
            current = stack.pop()
            if current is None or id(current) in seen or not self.is_live(current):
                continue
            seen.add(id(current))
            if is_leaf(current):
                return self.parameter_of(current) or ""
            stack += [source for _, (source, _) in self.inputs(current)]
        return ""

    def leaf(self, name: str) -> Any:
        """The node that stands for a chosen parameter."""
        return next(node for node in self.nodes if is_leaf(node) and self._chosen.get(id(node.variable)) == name)

    def names_below(self, node: Any) -> list[str]:
        """Names of all chosen parameters that a node is computed from, in their order."""
        leaves = [one for one in self.nodes if is_leaf(one) and self.is_live(one)]
        if not self._bits:
            self._bits = {id(one): 1 << number for number, one in enumerate(leaves)}
            for one in self.nodes:
                for _, (source, _) in self.inputs(one):
                    self._bits[id(one)] = self._bits.get(id(one), 0) | self._bits.get(id(source), 0)
        bits = self._bits.get(id(node), 0)
        return [self._chosen[id(one.variable)] for number, one in enumerate(leaves) if bits >> number & 1]

    def refuse(self, node: Any, what: str, *, twice: bool = True) -> NoReturn:
        """Raise UncoveredModelError: what stands where, and what to do; `twice`: torch can differentiate it twice."""
        advice = "use method='hutchinson' (or 'auto'), or choose other parameters"
        if not twice:
            advice = "no method here measures parameters below it; choose those above (parameters=...)"
        raise UncoveredModelError(f"{short_name(node)} {self.place(node)}: {what}; {advice}")
