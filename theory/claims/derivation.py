"""What docs/derivation.md states and proves, by section; each statement has a check of its name like any claim.

B is the printed recursion E[28] started from B^(L) = 0, D the exact ∂δ/∂z, H the Hessian in a layer's pre-activations,
I the unit matrix.
"""

from __future__ import annotations

from theory.claims.model import Claim

_GAIN = r"\prod_{s=l}^{r-1}\sigma'(z^{(s)}_{p_s})W^{(s+1)}_{p_{s+1}p_s}\sigma'(z^{(s)}_{q_s})W^{(s+1)}_{q_{s+1}q_s}"


def _d(name: str, section: int, statement: str, formula: str = "") -> Claim:
    return Claim(f"D.{name}", f"docs/derivation.md, section {section}", statement, "theorem", formula)


DERIVATION = (
    _d(
        "recursion",
        1,
        "The Hessian in a layer's pre-activations from the one above, for any loss, started from the loss's own.",
        r"H^{(l)}_{ij}=I_{ij}\sigma''(z^{(l)}_i)S^{(l)}_i"
        r"+\sigma'(z^{(l)}_i)\sigma'(z^{(l)}_j)\sum_s\sum_t W^{(l+1)}_{si}H^{(l+1)}_{st}W^{(l+1)}_{tj}",
    ),
    _d(
        "entry",
        1,
        "The entry of a parameter is its neuron's diagonal entry of H, times the square of what it multiplies.",
        r"\frac{\partial^2 f}{\partial\theta_k^2}=c_k^2H^{(l)}_{ii}",
    ),
    _d(
        "sites",
        2,
        "Unrolled: every activation above contributes its σ'', weighted by its adjoint and a squared derivative.",
        r"D^{(l)}_i=\sum_{r=l}^{L-1}\sum_j\sigma''(z^{(r)}_j)S^{(r)}_j"
        r"\left(\frac{\partial z^{(r)}_j}{\partial z^{(l)}_i}\right)^2",
    ),
    _d(
        "pairs",
        3,
        "A squared sum over paths is a sum over ordered pairs of paths with common ends.",
        r"D^{(l)}_i=\sum_{r=l}^{L-1}\sum_{P,Q:(l,i)\to(r,j)}\sigma''(z^{(r)}_j)S^{(r)}_j" + _GAIN,
    ),
    _d(
        "gap",
        3,
        "What the printed recursion leaves out is the pairs of different paths.",
        r"D^{(l)}_i-B^{(l)}_i=\sum_{r=l}^{L-1}\sum_{P\ne Q:(l,i)\to(r,j)}\sigma''(z^{(r)}_j)S^{(r)}_j" + _GAIN,
    ),
    _d(
        "scope",
        4,
        "The printed recursion is exact at layer l for every weight just where each layer strictly between l and L-1 "
        "has one neuron, so always for l >= L-2; elsewhere it is wrong for almost every weight and bias.",
    ),
    _d(
        "start",
        4,
        "Started from diag ∇²ℓ, the printed recursion is exact at l = L-1 where ∇²ℓ is diagonal, and not below.",
    ),
    _d("rescaling", 5, "If θ -> cθ keeps the loss, H_kk becomes H_kk/c_k²: θ_k² H_kk is invariant."),
    _d("unbounded", 5, "Over rescalings that keep the function, the norm E[8] has no upper bound."),
    _d(
        "infimum",
        5,
        "Its infimum: what one rescaling can shrink alone vanishes, the rest has a positive minimum that is attained; "
        "weights before a BatchNorm vanish, a classifier and its bias do not.",
    ),
    _d("trajectory", 6, "SGD takes the same path under α if rates and decays are rescaled with the initialisation."),
    _d("effective", 6, "|γ| max|σ''| of a BatchNorm and its activation does not change with α."),
    _d(
        "input-curvature", 7, "The σ'' part of the input's Hessian has the same site weights as that of the parameters."
    ),
)
