"""How single nodes move tangents forward: by closed rules of kinds and of affine nodes, else by double backward."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hessdiag.graph import affine, layers, sites
from hessdiag.graph.kinds import Given, NodeKind
from hessdiag.graph.nodes import Edge, edge_shape, sizes
from hessdiag.graph.pullback import pullback
from hessdiag.graph.tangents import Tangent

Cache = dict[tuple[str, int, int], Any]
UNKNOWN_FAN = 4
"""Multiplications per entry that a node is taken to cost of which nothing is known."""


def kinds_of(node: Any) -> Iterator[type[NodeKind]]:
    """Whatever kinds answer for a node."""
    yield from layers.KINDS.of(node)
    yield from sites.KINDS.of(node)


def factor_of(node: Any, slot: int) -> tuple[bool, Tensor | None]:
    """(True, d out/d in) where a node acts elementwise on the input in `slot`; None stands for 1."""
    for kind in kinds_of(node):
        known, factor = kind.factor(node, slot)
        if known:
            return True, factor
    return affine.factor(node, slot)


def fan_of(node: Any) -> int:
    """Multiplications per entry of a node's output."""
    return next((fan for fan in (kind.fan(node) for kind in kinds_of(node)) if fan is not None), UNKNOWN_FAN)


def move(node: Any, output: int, shape: torch.Size, given: Sequence[Given]) -> Tangent | None:
    """The tangent of one output of a node by a closed rule, or None where there is none."""
    for kind in kinds_of(node):
        moved = kind.move(node, shape, given)
        if moved is not None:
            return moved
    rule = affine.DENSE.get(node.name())
    if rule is None or len(given) != 1:
        return None
    slot, edge, tangent = given[0]
    return Tangent(rule(node, slot, tangent.dense(edge_shape(edge)), shape))


def forward(node: Any, slot: int, edge: Edge, output: int, value: Tensor) -> Tensor:
    """The tangent [K, *shape] of one output of a node, where only its input `slot`, fed by `edge`, changes."""
    shape = edge_shape((node, output))
    if tuple(edge_shape(edge)) == tuple(shape):
        known, factor = factor_of(node, slot)
        if known:
            return value if factor is None else value * factor
    moved = move(node, output, shape, [(slot, edge, Tangent(value))])
    return double_backward(node, output, shape, [(slot, value)], {}) if moved is None else moved.dense(shape)


def double_backward(
    node: Any, output: int, shape: torch.Size, parts: Sequence[tuple[int, Tensor]], cache: Cache
) -> Tensor:
    """J u for one node from its own backward: the pullback is recorded once, then differentiated along the
    tangents. It is linear in its seed, so any will do; some of torch's own (logcumsumexp) have no derivative at zero.
    """
    key = ("pullback", id(node), output)
    if key not in cache:
        with torch.enable_grad():
            meta = sizes(node, output)
            seed = torch.ones(shape, dtype=meta.dtype, device=meta.device, requires_grad=True)
            outputs = len(node._input_metadata)
            cache[key] = seed, pullback(node, [seed if number == output else None for number in range(outputs)])
    seed, pulled = cache[key]
    count = len(parts[0][1])
    roots, vectors = [], []
    for slot, tangent in parts:
        root = pulled[slot]
        if root is None or not root.requires_grad:
            continue
        with torch.enable_grad():
            root = root.sum_to_size(edge_shape(node.next_functions[slot]))
        roots.append(root)
        vectors.append(tangent.to(root.dtype))
    if not roots:
        return torch.zeros(count, *shape, dtype=seed.dtype, device=seed.device)
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.autograd.grad(roots, seed, vectors, retain_graph=True, is_grads_batched=True)[0]
        batched: Tensor = found.detach()
        return batched
    rows = [torch.autograd.grad(roots, seed, [v[k] for v in vectors], retain_graph=True)[0] for k in range(count)]
    return torch.stack(rows).detach()
