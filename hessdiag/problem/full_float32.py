"""float32 computes in float32 meanwhile, with 24 bits: no TF32 on cards, no bfloat16 in the CPU's products.

torch computes convolutions in TF32 on cards unless told otherwise, and products of matrices as well after
`torch.set_float32_matmul_precision("high")`: 11 bits, 1e-3 off, where what is compared here differs by 1e-6.

From torch 2.9 on precisions form a tree: what a kind of operation is not told it has from its backend, and that from
`torch.backends.fp32_precision`. Set from the top down, only where it is still another, and set back from below, every
switch stands as before, and what was left open stays open. cuDNN's older switch goes with them where it can be read: it
refuses to be once the newer say something else, and `torch.backends.cudnn.flags` within a model reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]
"""How it is read, how it is set, and its value for full precision."""
TREE = ("", "cudnn", "cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
"""Of `torch.backends`, the general before the particular."""
PRECISION = "fp32_precision"


@contextmanager
def full_float32() -> Iterator[None]:
    """For everything within; what was set before is set again."""
    undo: list[tuple[Callable[[Any], None], Any]] = []
    try:
        for get, put, full in _switches():
            before = get()
            if before != full:
                undo.append((put, before))
                put(full)
        yield
    finally:
        for put, before in reversed(undo):
            put(before)


def _switches() -> Iterator[Switch]:
    backends: Any = torch.backends
    older = partial(getattr, backends.cudnn, "allow_tf32")
    with suppress(RuntimeError):  # set by the newer switches to what this one cannot say
        older()
        yield older, partial(setattr, backends.cudnn, "allow_tf32"), False
    if not hasattr(backends, PRECISION):
        yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
        return
    for path in TREE:
        owner = backends
        for name in filter(None, path.split(".")):
            owner = getattr(owner, name, None)
        if hasattr(owner, PRECISION):
            yield partial(getattr, owner, PRECISION), partial(setattr, owner, PRECISION), "ieee"
