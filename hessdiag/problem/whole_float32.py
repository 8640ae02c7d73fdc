"""Float32 meanwhile means float32: no TensorFloat-32, which keeps ten bits of every factor (rounding by 5e-4).

On NVIDIA GPUs from Ampere on, torch takes it for convolutions unless told not to. A batch of another size, for which
cuDNN may take another kernel, would then differ by as much, as if the model let the samples of a batch meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WHOLE = "ieee"


@contextmanager
def whole_float32() -> Iterator[None]:
    """Convolutions and matrix products of float32 in float32 within; what was set before is set again."""
    try:
        matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set one by one, which these do not tell
        with _one_by_one():
            yield
        return
    try:
        torch.backends.cudnn.allow_tf32 = False
        if matmul != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)


@contextmanager
def _one_by_one() -> Iterator[None]:
    """The same by torch's settings for single kinds of operation, where those are in use."""
    cudnn: Any = torch.backends.cudnn
    kinds: list[Any] = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = WHOLE
        yield
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision
