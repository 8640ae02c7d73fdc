"""Functions that are computed by others (`mended`), held against torch's own on what this very model hands to them.

Once in a measurement, a few samples go through the model, and each call that is mended is made twice more in float64:
by torch, and by what takes its place. Values that differ beyond rounding would make it another function that is
measured. Rounding does not add up on the way, as it would in the outputs of a model that rounds or compares; what torch
draws at random, and what it refuses, is not compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from hessdiag.errors import UncoveredModelError
from hessdiag.problem.forward import Call, Mending, forward
from hessdiag.problem.sparse import is_dense

OFF = 1e-6
"""Of the largest entry that comes out: torch keeps 1/6 and 1/alpha of some activations in float32."""
CANCELLED = 1e-6
"""Of the largest that goes in: distances of neighbours by a product of matrices."""
MASK = 1e6
"""Entries beyond it are masks."""


def check_mended(model: nn.Module, inputs: Any, call: Call | None = None) -> None:
    """Refuse a model of which a call gives another value here than by torch."""
    found: dict[str, float] = {}

    def comparing(kinds: Iterable[str]) -> Mending:
        return _Comparing(kinds, found)

    with torch.enable_grad():
        forward(model, inputs, call, mode=comparing)
    if found:
        name, off = next(iter(found.items()))
        raise UncoveredModelError(
            f"{name} is computed by other operations here, which give another value for this model, off by {off:.1e} "
            "of its size: that is a fault of hessdiag, and no method here measures this model"
        )


class _Comparing(Mending):
    def __init__(self, kinds: Iterable[str], found: dict[str, float]) -> None:
        super().__init__(kinds)
        self._found = found

    def run(self, func: Any, mended: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The mended function, after a look at what both give."""
        with contextlib.suppress(Exception):  # what either does not take is not compared; the call itself says it
            off = _off(func, mended, args, named)
            if off > 1.0:
                self._found.setdefault(getattr(func, "__name__", str(func)), off * OFF)
        return super().run(func, mended, args, named)


def _off(func: Any, mended: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> float:
    """How far the two are apart, in units of what rounding may do; 0 where torch's own value does not repeat."""

    def torchs() -> list[Tensor]:
        with torch.no_grad():
            ordered, by_name = _double((args, named), derived=False)
            return _tensors(func(*ordered, **by_name))

    ordered, by_name = _double((args, named), derived=True)
    mine = _tensors(mended(*ordered, **by_name))
    if not mine:
        return 0.0
    wanted = torchs()
    into = max((_largest(x) for x in _tensors((args, named))), default=0.0)
    off = max(_apart(a, b, into) for a, b in zip(mine, wanted, strict=True))
    if off > 1.0 and any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(torchs(), wanted)):
        return 0.0
    return off


def _double(given: Any, *, derived: bool) -> Any:
    """The same arguments in float64, apart from those given; what was one tensor stays one."""
    made: dict[int, Tensor] = {}
    longer = {torch.float32: torch.float64, torch.complex64: torch.complex128}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in made:
            own = x.detach().clone().to(longer.get(x.dtype, x.dtype))
            if derived and x.requires_grad:
                own = own.requires_grad_()
                own = own if x.is_leaf else own.clone()  # which may be changed in place
            made[id(x)] = own
        return made[id(x)]

    return _pytree.tree_map(copy, given)


def _tensors(values: Any) -> list[Tensor]:
    """Those that hold real or complex numbers, every entry, as real ones."""
    found = [x.detach() for x in _pytree.tree_leaves(values) if isinstance(x, Tensor) and is_dense(x)]
    found = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in found]
    return [x for x in found if x.is_floating_point()]


def _apart(a: Tensor, b: Tensor, into: float) -> float:
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    if a.shape != b.shape or not all(torch.equal(kind(a), kind(b)) for kind in kinds):
        return float("inf")
    off = float((a - b).nan_to_num().abs().max()) if a.numel() else 0.0  # nan where both are infinite
    return off / (OFF * _largest(b) + CANCELLED * into + torch.finfo(torch.float64).tiny)


def _largest(x: Tensor) -> float:
    """The largest entry that is no mask."""
    size = x.abs()
    kept = size[size <= MASK]
    return float(kept.max()) if kept.numel() else 0.0
