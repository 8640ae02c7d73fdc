"""What layer kinds and site kinds have in common: which nodes they answer for, and how a tangent passes such a node.

A kind is a class. Two tables hold them, `layers.KINDS` and `sites.KINDS`; whoever meets a node asks the table, and what
no table answers for is refused. A kind needs no rule for tangents: a node without one is moved by double backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError
from hessdiag.graph.nodes import Edge

if TYPE_CHECKING:
    from hessdiag.graph.tangents import Tangent

Given = tuple[int, Edge, "Tangent"]
"""(input slot, the edge that feeds it, its tangent)."""


class NodeKind:
    """A class of nodes of an autograd graph."""

    name: ClassVar[str]
    """By which the table and messages know the kind."""
    nodes: ClassVar[frozenset[str]] = frozenset()
    """Names of the nodes it may answer for, as `grad_fn.name()` tells them (of a custom Function F: "FBackward")."""

    @classmethod
    def takes(cls, node: Any) -> bool:
        """Whether the node is one of these by its name."""
        return node.name() in cls.nodes

    @classmethod
    def factor(cls, node: Any, slot: int) -> tuple[bool, Tensor | None]:
        """(True, d out/d in) where the node acts entry by entry on the input in `slot`; None stands for 1."""
        return False, None

    @classmethod
    def move(cls, node: Any, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
        """The tangent of the node's output, of this shape, by a closed rule; None where there is none."""
        return None

    @classmethod
    def fan(cls, node: Any) -> int | None:
        """Multiplications per entry of the node's output, for the price of a pass; None where nothing is known."""
        return None


_TAKES: Any = NodeKind.takes.__func__  # type: ignore[attr-defined]
K = TypeVar("K", bound=NodeKind)


class Table(Generic[K]):
    """Kinds in the order in which they are asked."""

    def __init__(self, what: str, base: Any, *kinds: type[K]) -> None:
        self.what, self._base = what, base
        self._kinds: dict[str, type[K]] = {kind.name: kind for kind in kinds}
        self._asked: dict[tuple[str, tuple[type[K], ...]], list[type[K]]] = {}

    def __iter__(self) -> Iterator[type[K]]:
        return iter(self._kinds.values())

    def of(self, node: Any) -> list[type[K]]:
        """The kinds that may answer for a node."""
        return [kind for kind in self._by_name(node.name()) if kind.takes(node)]

    def _by_name(self, name: str) -> list[type[K]]:
        """Those that may take a node of this name: by it, or by what else they look at."""
        asked = name, tuple(self._kinds.values())
        if asked not in self._asked:
            self._asked[asked] = [
                kind for kind in asked[1] if name in kind.nodes or getattr(kind.takes, "__func__", None) is not _TAKES
            ]
        return self._asked[asked]

    def add(self, kind: type[K]) -> type[K]:
        """One more kind, asked after the others; a name or a node that another kind answers for is refused."""
        if not (isinstance(kind, type) and issubclass(kind, self._base)):
            raise ConfigurationError(f"a {self.what} is a class derived from {self._base.__name__}, not {kind!r}")
        missing = sorted(getattr(kind, "__abstractmethods__", ()))
        if missing:
            raise ConfigurationError(f"{self.what} {kind.__name__} lacks {', '.join(missing)}")
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"{self.what} {kind.__name__} has no name")
        if name in self._kinds:
            raise ConfigurationError(f"a {self.what} {name!r} is registered already")
        nodes = kind.nodes
        if isinstance(nodes, str) or not nodes or not all(isinstance(node, str) for node in nodes):
            raise ConfigurationError(f"{self.what} {name!r}: `nodes` must be a set of names of autograd nodes")
        for other in self._kinds.values():
            if taken := sorted(nodes & other.nodes):
                raise ConfigurationError(f"{self.what} {name!r}: {other.name!r} answers for {', '.join(taken)} already")
        self._kinds[name] = kind
        return kind

    def remove(self, name: str) -> None:
        """Take a kind out of the table, as a test does with its own."""
        del self._kinds[name]
