"""Sums of products of samples with something that has none, as linear layers.

einsum would turn them into products of matrices batch by batch, bilinear into a kernel of its own, where a parameter is
not known as one.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 1 << 26
"""Entries of a product that is written out."""


def einsum(*args: Any) -> Tensor:
    """torch's; of two operands with samples in one of them, told by the first letter of the result, a linear layer, or
    where letters are shared by all three, a product and a sum.
    """
    found = _as_layer(*args)
    return torch.functional.einsum(*args) if found is None else found


def _as_layer(*args: Any) -> Tensor | None:
    if len(args) == 2 and isinstance(args[1], (tuple, list)):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str) or not all(isinstance(x, Tensor) for x in args[1:]):
        return None
    x, w = args[1:]
    letters = _letters(args[0], x.ndim, w.ndim)
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
