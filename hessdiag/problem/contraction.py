"""Sums of products of samples with something that has none, as linear layers.

einsum would turn them into products of matrices batch by batch, bilinear into a kernel of its own, a vector into a
product without an axis for what comes out: a parameter is not known as one there. Distances between rows have no second
derivative as torch's own kernel; they are lengths of differences.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.problem.spectra import by_parts

LARGEST = 1 << 26
"""Entries of a product that is written out."""


def einsum(*args: Any) -> Tensor:
    """torch's; of two operands with samples in one of them, told by the first letter of the result, a linear layer, or
    where letters are shared by all three, a product and a sum.
    """
    equation, *operands = _flat(args)
    if not isinstance(equation, str) or not all(isinstance(x, Tensor) for x in operands):
        return torch.functional.einsum(*args)
    if len(operands) > 2 and any(x.requires_grad for x in operands):
        first = _first_of(equation)
        if first is not None:
            pair, rest = first
            return einsum(rest, einsum(pair, *operands[:2]), *operands[2:])
    if len(operands) != 2:
        return torch.functional.einsum(*args)
    return by_parts(lambda x, w: _contracted(equation, x, w))(*operands)


def _first_of(equation: str) -> tuple[str, str] | None:
    """Of several operands: the contraction of the first two, and that of its result with the rest."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    a, b, *others = given.split(",")
    if not arrow or "." in given:
        return None
    wanted = [*out, *"".join(others)]
    kept = "".join(dict.fromkeys(letter for letter in wanted if letter in a or letter in b))
    return f"{a},{b}->{kept}", f"{','.join([kept, *others])}->{out}"


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0], *args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else args


def _contracted(equation: str, x: Any, w: Any) -> Tensor:
    found = _as_layer(equation, x, w)
    return torch.functional.einsum(equation, x, w) if found is None else found


def _as_layer(equation: str, x: Any, w: Any) -> Tensor | None:
    if not (isinstance(x, Tensor) and isinstance(w, Tensor)):
        return None
    letters = _letters(equation, x.ndim, w.ndim)
    if letters is None:
        return None
    of_x, of_w, out = letters
    if out and out[0] not in of_x:
        x, w, of_x, of_w = w, x, of_w, of_x
    if not out or out[0] not in of_x or out[0] in of_w or not w.requires_grad:
        return None
    plain = all(len(set(side)) == len(side) for side in letters)
    summed = [k for k in of_x if k in of_w and k not in out]
    if not plain or not summed or (set(of_x) ^ set(of_w)) - set(out):
        return None
    size = dict(zip(of_x, x.shape)) | dict(zip(of_w, w.shape))
    if any(dict(zip(of_x, x.shape)).get(k, size[k]) != size[k] for k in size):
        return None
    shared = [k for k in out if k in of_x and k in of_w]
    rows, units = [k for k in out if k in of_x and k not in of_w], [k for k in out if k not in of_x]
    if shared and prod(size.values()) > LARGEST:
        return None
    if shared:
        order = rows + shared + units + summed
        product = _spread_out(x, of_x, order) * _spread_out(w, of_w, order)
        given = product.sum(tuple(range(len(order) - len(summed), len(order))))
    else:
        flat = _turned(x, of_x, rows + summed).reshape(*(size[k] for k in rows), prod(size[k] for k in summed))
        weight = _turned(w, of_w, units + summed)
        if len(units) != 1 or len(summed) != 1:
            weight = weight.reshape(prod(size[k] for k in units), prod(size[k] for k in summed))
        given = F.linear(flat, weight).reshape(*(size[k] for k in rows + units))
    return _turned(given, rows + shared + units, list(out))


def _letters(equation: str, *axes: int) -> tuple[str, str, str] | None:
    """Those of both operands and of the result, dots written as capitals; None where they are not told one by one."""
    equation = equation.replace(" ", "")
    given, arrow, out = equation.partition("->")
    sides = given.split(",")
    if not arrow or len(sides) != 2 or any(letter.isupper() for letter in equation):
        return None
    most = max((n - len(side) + 3 for side, n in zip(sides, axes) if "..." in side), default=0)
    names = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:most]
    full = [
        side.replace("...", names[most - (n - len(side) + 3) :] if "..." in side else "")
        for side, n in zip(sides, axes)
    ]
    if any(len(side) != n for side, n in zip(full, axes)):
        return None
    return full[0], full[1], out.replace("...", names)


def _turned(x: Tensor, have: Any, want: list[str]) -> Tensor:
    order = [list(have).index(k) for k in want]
    return x if order == list(range(len(order))) else x.permute(order)


def _spread_out(x: Tensor, have: str, order: list[str]) -> Tensor:
    """Axes in this order, of length one where there is none."""
    x = _turned(x, have, [k for k in order if k in have])
    sizes = iter(x.shape)
    return x.reshape([next(sizes) if k in have else 1 for k in order])


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """sum_ij W_oij x_i y_j + b_o: a linear layer of all products x_i y_j."""
    products = (input1[..., :, None] * input2[..., None, :]).flatten(-2)
    return F.linear(products, weight.flatten(1), bias)


def matmul(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's; a vector stands as a matrix of one column."""

    def run(*args: Any, **named: Any) -> Tensor:
        if len(args) == 2 and not named and all(isinstance(x, Tensor) for x in args):
            a: Tensor = args[0]
            b: Tensor = args[1]
            if b.ndim == 1 and a.ndim > 1 and b.requires_grad:
                return (a @ b[:, None]).squeeze(-1)
            if a.ndim == 1 and b.ndim > 2 and a.requires_grad:
                return (b.mT @ a[:, None]).squeeze(-1)
        return plain(*args, **named)

    return by_parts(run)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's; a vector of weights stands as one unit, complex numbers by their parts."""
    if weight.ndim == 1 and bias is None:
        return matmul(torch.matmul)(input, weight)
    if not (input.is_complex() and weight.is_complex()):
        return F.linear(input, weight, bias)
    out = by_parts(F.linear)(input, weight)
    return out if bias is None else out + bias


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, *args: Any, **named: Any) -> Tensor:
    """torch's, where it is not for being differentiated or the differences would be too many to hold."""
    wanted = (x1.requires_grad or x2.requires_grad) and prod(x1.shape) * x2.shape[-2] <= LARGEST
    if not wanted:
        return torch.functional.cdist(x1, x2, p, *args, **named)
    apart = x1[..., :, None, :] - x2[..., None, :, :]
    same = (apart == 0).all(-1)  # torch takes the slope there for zero: a row and itself
    lengths: Tensor = torch.linalg.vector_norm(apart.masked_fill(same[..., None], 1.0), p, -1)
    return lengths.masked_fill(same, 0.0)
