"""Products of complex numbers by their real and imaginary parts, as of spectra in Fourier layers.

    a b = (a' b' - a'' b'') + i (a' b'' + a'' b')

Each of the four is a product of real tensors, in which parameters, samples and sites are what they are anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[..., Tensor]


def by_parts(product: Product) -> Product:
    """The same product; of two complex tensors that take part in gradients, by products of their parts."""

    def run(*args: Any, **named: Any) -> Tensor:
        if len(args) != 2 or named or not all(map(_complex, args)) or not any(map(_counts, args)):
            return product(*args, **named)
        a, b = args
        (re, im), (other, beside) = (a.real, a.imag), (b.real, b.imag)
        return torch.complex(product(re, other) - product(im, beside), product(re, beside) + product(im, other))

    return run


def entry_by_entry(product: Product) -> Product:
    """The same of products of single entries, of which one side may be real, or a number."""
    both = by_parts(product)

    def run(*args: Any, **named: Any) -> Tensor:
        if len(args) != 2 or named or not any(map(_complex, args)) or not any(map(_counts, args)):
            return product(*args, **named)
        a, b = args
        if _complex(a) and _complex(b):
            return both(a, b)
        z, x = (a, b) if _complex(a) else (b, a)
        if isinstance(x, complex):
            return torch.complex(z.real * x.real - z.imag * x.imag, z.real * x.imag + z.imag * x.real)
        return torch.complex(product(z.real, x), product(z.imag, x))

    return run


def divided(quotient: Product) -> Product:
    """The same quotient; of a complex tensor and a real one, part by part."""

    def run(*args: Any, **named: Any) -> Tensor:
        if len(args) != 2 or named or not _complex(args[0]) or not any(map(_counts, args)):
            return quotient(*args, **named)
        a, b = args
        if not isinstance(b, Tensor) or b.is_complex():
            return quotient(a, b)
        return torch.complex(quotient(a.real, b), quotient(a.imag, b))

    return run


def _complex(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_complex()


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
