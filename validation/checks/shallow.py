"""E[8]-E[18]: the norm, the split of an entry, and the net with one hidden layer, term by term."""

from __future__ import annotations

from functools import lru_cache

import sympy as sp
import torch

import hessdiag as hd
from theory.net import random_net
from theory.symbolic import identities_for
from theory.symbolic.deep import DeepNet
from theory.symbolic.one_hidden_layer import network, output_layer_is_free_of_curvature
from theory.symbolic.printed import norm_ratio, shallow_identities
from validation.bridge import ACTIVATIONS, TOLERANCE, as_model, autograd_diagonal, deviation, engine_diagonal, vector
from validation.checks.deep import rows_of
from validation.evidence import Evidence, Finding, exactly, measured, zeros
from validation.numbers import random_nets
from validation.register import Run, alike, check

REACH = "at three inputs and two neurons"


@lru_cache(maxsize=1)
def _one_hidden_layer() -> dict[str, float]:
    """The printed entries of E[12], E[15], E[18] and gradients of E[13], E[16] against the engine and autograd."""
    spec = "rct:beta=2,alpha=7.0"
    g = torch.Generator().manual_seed(18)
    net = random_net([3, 5, 1], ACTIVATIONS[spec], generator=g)
    x, y = torch.randn(1, 3, generator=g, dtype=torch.float64), torch.randn(1, 1, generator=g, dtype=torch.float64)
    model = as_model(net, spec)
    w1, w2 = net.weights[0], net.weights[1][0]
    b1, b2 = (b for b in net.biases if b is not None)
    z = (x @ w1.T + b1)[0]
    h, slope, bend = (f(z) for f in (net.activation.sigma, net.activation.d1, net.activation.d2))
    residual = float(h @ w2 + b2 - y[0])
    printed = {
        "E15": ((w2 * slope)[:, None] * x) ** 2 + residual * (w2 * bend)[:, None] * x**2,
        "E18": (w2 * slope) ** 2 + residual * w2 * bend,
        "E12": torch.cat([h**2, torch.ones(1, dtype=torch.float64)]),
    }
    entries = list(engine_diagonal(model, x, y, "half_mse").total.values())
    truth = list(autograd_diagonal(model, x, y, "half_mse").values())
    found = {}
    for name, parts in (("E15", [0]), ("E18", [1]), ("E12", [2, 3])):
        flat = printed[name].reshape(-1)
        for which, tensors in (("engine", entries), ("autograd", truth)):
            found[f"{name} {which}"] = deviation(torch.cat([tensors[i].reshape(-1) for i in parts]), flat)
    outputs = model(x)
    gradients = torch.autograd.grad(outputs.sum(), list(model.parameters()))
    found["E13 autograd"] = deviation(gradients[0], (w2 * slope)[:, None] * x)
    found["E16 autograd"] = deviation(gradients[1], w2 * slope)
    return found


NUMBERS = {
    "E12": ("E12 engine", "E12 autograd"),
    "E13": ("E13 autograd",),
    "E14": ("E15 autograd",),
    "E15": ("E15 engine", "E15 autograd"),
    "E16": ("E16 autograd",),
    "E17": ("E18 autograd",),
    "E18": ("E18 engine", "E18 autograd"),
}


def _equation(claim: str, run: Run) -> Evidence:
    numeric = tuple(
        measured(f"{name.split()[0]} as printed equals {name.split()[1]}", _one_hidden_layer()[name], at_most=TOLERANCE)
        for name in NUMBERS.get(claim, ())
    )
    return Evidence(claim, (zeros(identities_for(claim), reach=REACH), *numeric))


@check("E8")
def check_E8(run: Run) -> Evidence:
    """E[8]: the right side is √p times the left side."""
    model = hd.networks.build("mlp", activation="tanh", num_classes=2, in_features=3, widths=(4,), seed=0).double()
    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(5, 3, generator=g, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1]))
    m = hd.measure(hd.Objective(model), [batch], method="exact")
    gap = abs(m.rms / m.mean_scaled / m.parameters**0.5 - 1)
    entries = ", ".join("1" for _ in range(4))
    counterexample = f"p = 4, diagonal ({entries}): left side 1/2, right side 1"
    root = all(norm_ratio(p) == sp.sqrt(p) for p in (1, 2, 4, 9))
    left_is_right = all(row.holds for row in identities_for("E8"))
    found = (
        exactly("right side = left side", left_is_right, counterexample=counterexample),
        exactly("right side = √p · left side", root, condition="up to the factor √p"),
        exactly("the two sides agree", norm_ratio(1) == 1, condition="p = 1"),
        measured("the engine's rms / mean_scaled = √p", gap, at_most=1e-12, label="deviation"),
    )
    return Evidence("E8", found, correction="‖diag(H)/p‖ = (1/√p)·√((1/p)Σh²); the engine reports both, named apart")


@check("E9")
def check_E9(run: Run) -> Evidence:
    """E[9]: the Gauss-Newton split of an entry, for every parameter; on deep nets and for any loss by the engine."""
    cases = random_nets(run.quick)
    engine = max(case.engine for case in cases)
    split = max(case.gauss_newton for case in cases)
    return Evidence(
        "E9",
        (
            zeros(identities_for("E9"), reach=REACH),
            measured("the engine's sum of parts equals autograd", engine, at_most=TOLERANCE),
            measured("the engine's Gauss-Newton part equals theory's", split, at_most=TOLERANCE),
        ),
        note="sizes of the two parts: study gauss_newton",
    )


@check("E10")
def check_E10(run: Run) -> Evidence:
    """E[10], a definition: as displayed, the net that is differentiated; written out, the L = 2 case of E[19]."""
    net, deep = network(1, 2), DeepNet((2,))
    z = deep.forward(1)
    names = {deep.z(1, i): net.z[i] for i in range(2)} | {deep.weight(2, 0, i): net.w2[i] for i in range(2)}
    gap = sp.expand(z[2, 0].xreplace(names | {sp.Symbol("b2_0"): net.b2}) - net.f)
    found = (zeros(identities_for("E10")), exactly("E[10] - E[19] with L = 2 is zero", gap == 0), _forward((3, 5, 1)))
    return Evidence("E10", found)


def _forward(widths: tuple[int, ...]) -> Finding:
    """The engine's network against the forward pass of theory, which writes E[19] out."""
    from theory.net import run as forward

    spec = "rct:beta=1,alpha=7.0"
    g = torch.Generator().manual_seed(19)
    net = random_net(widths, ACTIVATIONS[spec], generator=g)
    x = torch.randn(6, widths[0], generator=g, dtype=torch.float64)
    with torch.no_grad():
        gap = deviation(as_model(net, spec)(x), forward(net, x).outputs)
    return measured("the engine's network computes it", gap, at_most=1e-13, label="deviation")


alike(
    {
        "E11": "E[11]: second derivatives in the output layer vanish.",
        "E12": "E[12]: entries h_i² and 1.",
        "E13": "E[13]: first derivative in a hidden weight.",
        "E14": "E[14]: second derivative in a hidden weight.",
        "E15": "E[15]: diagonal entry of a hidden weight.",
        "E16": "E[16]: first derivative in a hidden bias.",
        "E17": "E[17]: second derivative in a hidden bias.",
        "E18": "E[18]: diagonal entry of a hidden bias.",
    },
    _equation,
)


@check("E19")
def check_E19(run: Run) -> Evidence:
    """E[19], a definition: as displayed, layer by layer, the net that is differentiated and the engine's."""
    return Evidence("E19", (zeros(rows_of("E19")), _forward((3, 4, 5, 4, 2))))


@check("A3.2.output-free")
def check_A3_2_output_free(run: Run) -> Evidence:
    """Section A.3.2: the output layer's entries hold no σ''; nor does the engine's functional part there."""
    g = torch.Generator().manual_seed(32)
    spec = "rct:beta=1,alpha=14.0"
    net = random_net([3, 4, 4, 2], ACTIVATIONS[spec], generator=g)
    x, y = torch.randn(5, 3, generator=g, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    parts = list(engine_diagonal(as_model(net, spec), x, y, "cross_entropy").functional.values())
    largest = float(vector(parts[-2:]).abs().max())
    found = (
        exactly("no σ'' in the entries of W^(2), b^(2)", output_layer_is_free_of_curvature(), reach=REACH),
        zeros(shallow_identities("A3.2.output-free"), reach=REACH),
        measured("the engine's functional part there", largest, at_most=0.0, label="largest entry"),
    )
    return Evidence("A3.2.output-free", found)
