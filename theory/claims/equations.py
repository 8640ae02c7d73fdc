"""E[1]-E[33]: one claim per numbered equation, the formula as printed.

The LaTeX below is the only place where an equation is written: `theory.symbolic.printed` reads it and evaluates it.
"""

from __future__ import annotations

from theory.claims.model import Claim, Kind

_PATHS = r"\sum_{r=l}^{L-1}\sum_{P:(l,i)\to(r,j)}\sigma''(z^{(r)}_j)\frac{\delta^{(r)}_j}{\sigma'(z^{(r)}_j)}"
_GAIN = r"\prod_{s=l}^{r-1}[\sigma'(z^{(s)}_{i_s})]^2(W^{(s+1)}_{i_{s+1},i_s})^2"
_ENTRY = r"[\nabla^2_\theta\hat L]_{kk}=(\delta^{(l)}_i c_k)^2+(f-y)c_k^2"
_BRACKET = (
    r"\sigma''(z^{(l)}_i)\frac{\delta^{(l)}_i}{\sigma'(z^{(l)}_i)}"
    r"+[\sigma'(z^{(l)}_i)]^2\sum_t D^{(l+1)}_t(W^{(l+1)}_{ti})^2"
)


def _e(number: int, section: str, kind: Kind, statement: str, formula: str) -> Claim:
    return Claim(f"E{number}", f"equation {number}, section {section}", statement, kind, formula)


EQUATIONS = (
    _e(
        1,
        "3.1",
        "definition",
        "The base function of RCT-AF is softplus sharpened by α.",
        r"\sigma_{\beta=0}(x)=\frac1\alpha\ln(1+e^{\alpha x})",
    ),
    _e(
        2,
        "3.1",
        "derivation",
        "Second derivative of the base function.",
        r"\sigma''_{\beta=0}(x)=\frac{\alpha e^{-\alpha x}}{(1+e^{-\alpha x})^2}",
    ),
    _e(
        3,
        "3.1",
        "derivation",
        "One step f -> f'·x from β = 0 gives Swish with parameter α.",
        r"\sigma_{\beta=1}(x)=\left(\sigma_{\beta=0}(x)\right)'\cdot x=\frac{x}{1+e^{-\alpha x}}",
    ),
    _e(
        4,
        "3.1",
        "derivation",
        "Second derivative of the first-order variant.",
        r"\sigma''_{\beta=1}(x)=\frac{\alpha e^{\alpha x}(e^{\alpha x}(2-\alpha x)+\alpha x+2)}"
        r"{(e^{\alpha x}+1)^3}",
    ),
    _e(
        5,
        "3.1",
        "derivation",
        "Two steps f -> f'·x from β = 0.",
        r"\sigma_{\beta=2}(x)=\left(\left(\sigma_{\beta=0}(x)\right)'\cdot x\right)'\cdot x"
        r"=\frac{(e^{2\alpha x}+(\alpha x+1)e^{\alpha x})x}"
        r"{e^{2\alpha x}+2e^{\alpha x}+1}",
    ),
    _e(
        6,
        "3.1",
        "derivation",
        "Second derivative of the second-order variant.",
        r"\sigma''_{\beta=2}(x)=\alpha e^{\alpha x}\left((\alpha x-1)(\alpha x-4)e^{2\alpha x}"
        r"-4(\alpha^2x^2-2)e^{\alpha x}+(\alpha x+1)(\alpha x+4)\right)/(e^{\alpha x}+1)^4",
    ),
    _e(
        7,
        "3.2",
        "derivation",
        "Hessian diagonal of a deep net as a sum over paths, each with its gain squared (= E[33]).",
        _ENTRY + r"\times" + _PATHS + _GAIN,
    ),
    _e(
        8,
        "3.2",
        "derivation",
        "The normalised Hessian diagonal norm; left side (1/p)‖diag‖, right side ‖diag‖/√p.",
        r"\|\operatorname{diag}(\nabla^2_\theta\hat L)/p\|_2"
        r"=\sqrt{\frac1p\sum_{k=1}^p[\nabla^2_\theta\hat L]_{kk}^2}",
    ),
    _e(
        9,
        "A.2",
        "derivation",
        "Gauss-Newton split of a diagonal entry for ½(f-y)².",
        r"[\nabla^2_\theta\hat L]_{kk}=\left(\frac{\partial f}{\partial\theta_k}\right)^2"
        r"+(f-y)\frac{\partial^2 f}{\partial\theta_k^2}",
    ),
    _e(
        10,
        "A.3.1",
        "definition",
        "The net with one hidden layer of m neurons and a linear output.",
        r"z_i=\sum_j W^{(1)}_{ij}x_j+b^{(1)}_i,\ h_i=\sigma(z_i),\ f=\sum_i W^{(2)}_i h_i+b^{(2)}",
    ),
    _e(
        11,
        "A.3.2",
        "derivation",
        "f is linear in the output layer's parameters.",
        r"\frac{\partial^2 f}{\partial(W^{(2)}_i)^2}=0,\quad\frac{\partial^2 f}{\partial(b^{(2)})^2}=0",
    ),
    _e(
        12,
        "A.3.2",
        "derivation",
        "Output layer entries: h_i² and 1.",
        r"[\nabla^2_\theta\hat L]_{W^{(2)}_i,W^{(2)}_i}=h_i^2,\quad"
        r"[\nabla^2_\theta\hat L]_{b^{(2)},b^{(2)}}=1",
    ),
    _e(
        13,
        "A.3.3",
        "derivation",
        "First derivative in a hidden weight.",
        r"\frac{\partial f}{\partial W^{(1)}_{ij}}=W^{(2)}_i\sigma'(z_i)x_j",
    ),
    _e(
        14,
        "A.3.3",
        "derivation",
        "Second derivative in a hidden weight.",
        r"\frac{\partial^2 f}{\partial(W^{(1)}_{ij})^2}=W^{(2)}_i\sigma''(z_i)x_j^2",
    ),
    _e(
        15,
        "A.3.3",
        "derivation",
        "Diagonal entry of a hidden weight.",
        r"[\nabla^2_\theta\hat L]_{W^{(1)}_{ij},W^{(1)}_{ij}}=(W^{(2)}_i\sigma'(z_i)x_j)^2"
        r"+(f-y)W^{(2)}_i\sigma''(z_i)x_j^2",
    ),
    _e(
        16,
        "A.3.4",
        "derivation",
        "First derivative in a hidden bias.",
        r"\frac{\partial f}{\partial b^{(1)}_i}=W^{(2)}_i\sigma'(z_i)",
    ),
    _e(
        17,
        "A.3.4",
        "derivation",
        "Second derivative in a hidden bias.",
        r"\frac{\partial^2 f}{\partial(b^{(1)}_i)^2}=W^{(2)}_i\sigma''(z_i)",
    ),
    _e(
        18,
        "A.3.4",
        "derivation",
        "Diagonal entry of a hidden bias.",
        r"[\nabla^2_\theta\hat L]_{b^{(1)}_i,b^{(1)}_i}=(W^{(2)}_i\sigma'(z_i))^2+(f-y)W^{(2)}_i\sigma''(z_i)",
    ),
    _e(
        19,
        "A.4.1",
        "definition",
        "Forward pass of the L-layer net with linear output.",
        r"z^{(l)}=W^{(l)}h^{(l-1)}+b^{(l)},\ h^{(l)}=\sigma(z^{(l)}),\ h^{(0)}=x,\ f=z^{(L)}",
    ),
    _e(
        20,
        "A.4.1",
        "derivation",
        "Backpropagated gradients, δ = ∂f/∂z.",
        r"\delta^{(L)}=1,\quad\delta^{(l)}_i=\sigma'(z^{(l)}_i)\sum_t\delta^{(l+1)}_t W^{(l+1)}_{ti}",
    ),
    _e(
        21,
        "A.4.2",
        "definition",
        "Derivative of a pre-activation in its own parameter: an input, or 1.",
        r"c_k=\frac{\partial z^{(l)}_i}{\partial\theta_k}=h^{(l-1)}_j\text{ or }1",
    ),
    _e(
        22,
        "A.4.2",
        "derivation",
        "First derivative in any parameter.",
        r"\frac{\partial f}{\partial\theta_k}=\delta^{(l)}_i c_k",
    ),
    _e(
        23,
        "A.4.2",
        "derivation",
        "Second derivative in any parameter, by way of D = ∂δ/∂z.",
        r"\frac{\partial^2 f}{\partial\theta_k^2}=\frac{\partial\delta^{(l)}_i}{\partial z^{(l)}_i}c_k^2",
    ),
    _e(
        24,
        "A.4.3",
        "derivation",
        "Product rule for D.",
        r"D^{(l)}_i=\sigma''(z^{(l)}_i)\sum_t\delta^{(l+1)}_tW^{(l+1)}_{ti}+\sigma'(z^{(l)}_i)\sum_t"
        r"\frac{\partial\delta^{(l+1)}_t}{\partial z^{(l)}_i}W^{(l+1)}_{ti}",
    ),
    _e(
        25,
        "A.4.3",
        "definition",
        "A pre-activation from the layer below.",
        r"z^{(l+1)}_t=\sum_j W^{(l+1)}_{tj}\sigma(z^{(l)}_j)+b^{(l+1)}_t",
    ),
    _e(
        26,
        "A.4.3",
        "derivation",
        "Its derivative in one pre-activation below.",
        r"\frac{\partial z^{(l+1)}_t}{\partial z^{(l)}_i}=W^{(l+1)}_{ti}\sigma'(z^{(l)}_i)",
    ),
    _e(
        27,
        "A.4.3",
        "derivation",
        "The chain rule for δ through its own pre-activation alone, neighbours left out.",
        r"\frac{\partial\delta^{(l+1)}_t}{\partial z^{(l)}_i}=D^{(l+1)}_t W^{(l+1)}_{ti}\sigma'(z^{(l)}_i)",
    ),
    _e(
        28,
        "A.4.3",
        "derivation",
        "The recurrence for D, with S = Σ δ W.",
        r"D^{(l)}_i=\sigma''(z^{(l)}_i)S^{(l)}_i+[\sigma'(z^{(l)}_i)]^2\sum_t D^{(l+1)}_t(W^{(l+1)}_{ti})^2",
    ),
    _e(
        29,
        "A.4.3",
        "derivation",
        "S as δ/σ', where σ' is not zero.",
        r"S^{(l)}_i=\frac{\delta^{(l)}_i}{\sigma'(z^{(l)}_i)}",
    ),
    _e(
        30,
        "A.4.3",
        "derivation",
        "The recurrence with δ/σ' in place of S; base case D^(L) = 0.",
        r"D^{(l)}_i=" + _BRACKET,
    ),
    _e(
        31,
        "A.4.4",
        "derivation",
        "The recurrence expanded into a sum over single paths.",
        r"D^{(l)}_i=" + _PATHS + _GAIN,
    ),
    _e(
        32,
        "A.4.5",
        "derivation",
        "General diagonal entry, recursive form.",
        _ENTRY + r"\Bigl[" + _BRACKET + r"\Bigr]",
    ),
    _e(
        33,
        "A.4.5",
        "derivation",
        "General diagonal entry, expanded form.",
        _ENTRY + r"\times" + _PATHS + _GAIN,
    ),
)
