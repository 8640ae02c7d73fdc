"""Numbers below the smallest normal one, 1e-38 in float32, are zero for the CPU meanwhile.

A saturated activation has values of x·exp(-α|x|), denormal around x = -0.9 for α = 100. A processor computes with them
many times slower than with zeros, so that a few in a hundred double the time of a training step (`python -m benchmarks
denormals`), while no sum notices that they are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DENORMAL = 1e-40
"""In float32."""


@contextmanager
def denormals_are_zero() -> Iterator[None]:
    """For the CPU's arithmetic within; what was set before is set again. Nothing where the processor cannot."""
    before = are_zero()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def are_zero() -> bool:
    """Whether this thread takes denormal numbers for zero."""
    return not bool(torch.full((1,), DENORMAL, dtype=torch.float32, device="cpu").mul(1.0).count_nonzero())
