"""The RCT-AF family as a module."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from hessdiag.activations.rct import check_alpha, check_beta, rct, rct_d1, rct_d2
from hessdiag.activations.supremum import supremum
from hessdiag.errors import ConfigurationError


class RCTAF(nn.Module):
    """Recursive curvature-tunable activation (arXiv 2603.23860, section 3.1): softplus, Swish and beyond.

    `alpha` > 0 sets the curvature, `beta` >= 0 counts the applications of f -> f'·x. Both are configuration:
    plain numbers, not buffers, so a network's state dict has the same keys as with any other activation.
    """

    alpha: float
    beta: int

    def __init__(self, alpha: float = 14.0, beta: int = 1) -> None:
        super().__init__()
        self.alpha = check_alpha(alpha)
        self.beta = check_beta(beta)

    def forward(self, x: Tensor) -> Tensor:
        """sigma(x), saving one tensor for backward."""
        return rct(x, self.alpha, self.beta)

    def d1(self, x: Tensor) -> Tensor:
        """sigma'(x) in closed form."""
        return rct_d1(x, self.alpha, self.beta)

    def d2(self, x: Tensor) -> Tensor:
        """sigma''(x) in closed form."""
        return rct_d2(x, self.alpha, self.beta)

    @property
    def max_curvature(self) -> float:
        """Largest |sigma''|: alpha/4, alpha/2, alpha for beta = 0, 1, 2; alpha times that of alpha = 1."""
        return self.alpha * unit_curvature(self.beta)

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return f"alpha={self.alpha:g}, beta={self.beta}"


@cache
def unit_curvature(beta: int) -> float:
    """Largest |sigma''| at alpha = 1: sigma''(0) = 2^beta/4 for beta <= 2, the numerical supremum beyond."""
    if check_beta(beta) <= 2:
        return 2.0**beta / 4
    return supremum(lambda x: rct(x, 1.0, beta)).value


def alpha_for(*, max_curvature: float, beta: int = 1) -> float:
    """The alpha at which sup |sigma''| equals `max_curvature`.

    >>> alpha_for(max_curvature=7.0, beta=1)
    14.0
    """
    try:
        wanted = check_alpha(max_curvature)
    except ConfigurationError as error:
        raise ConfigurationError(f"max_curvature: {str(error).replace('alpha', 'it', 1)}") from None
    return wanted / unit_curvature(beta)
