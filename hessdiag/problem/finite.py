"""Whether all entries of a tensor are finite, most often by their sum alone."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """True where none is NaN or Inf: either would be left in the sum, which may overflow without them."""
    values = values.detach()
    return isfinite(float(values.sum())) or bool(torch.isfinite(values).all())
