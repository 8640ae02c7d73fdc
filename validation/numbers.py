"""Numbers that several checks share: the paper's forms and the exact ones on the engine's networks, under autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from theory.hessian_diagonal import exact_hessian_diagonal, paper_hessian_diagonal
from theory.net import Net, diagonal_net, random_net
from theory.shapes import linear
from validation.bridge import (
    ACTIVATIONS,
    as_model,
    autograd_diagonal,
    by_layer,
    deviation,
    engine_diagonal,
    layers_of,
    rct_spec,
    theory_loss,
    vector,
)


@dataclass(frozen=True)
class Agreement:
    """Relative deviations on one net, each the largest over its layers; `below` lists those of l <= L-3 for the paper's
    functional part, relative to the true functional part.
    """

    engine: float
    theory: float
    gauss_newton: float
    paper_top: float
    paper_recursion_against_paths: float
    below: tuple[float, ...]


def compare(net: Net, spec: str, *, samples: int, loss: str, generator: torch.Generator) -> Agreement:
    """Theory exact, theory as printed (E[32], E[33]), engine and autograd on one net and one batch."""
    x = torch.randn(samples, net.widths[0], generator=generator, dtype=torch.float64)
    if loss == "cross_entropy":
        y = torch.randint(net.widths[-1], (samples,), generator=generator)
    else:
        y = torch.randn(samples, net.widths[-1], generator=generator, dtype=torch.float64)
    model = as_model(net, spec)
    truth = layers_of(autograd_diagonal(model, x, y, loss))
    engine = engine_diagonal(model, x, y, loss)
    bound = theory_loss(loss, y)
    exact = exact_hessian_diagonal(net, x, bound)
    paper = paper_hessian_diagonal(net, x, bound)
    paths = paper_hessian_diagonal(net, x, bound, form="E33")
    scale = [torch.cat([a, b]) for a, b in zip(by_layer(exact.gauss_newton), by_layer(exact.functional), strict=True)]
    whole = torch.cat(scale)
    printed, printed_paths = by_layer(paper.total), by_layer(paths.total)
    errors = [deviation(a, b, s) for a, b, s in zip(printed, truth, scale, strict=True)]
    true_part = [t - g for t, g in zip(truth, by_layer(exact.gauss_newton), strict=True)]
    cut = max(net.depth - 3, 0)  # layers l = 1..cut stand at a distance of three or more from the output
    gaps = zip(by_layer(paper.functional)[:cut], true_part[:cut], strict=True)
    return Agreement(
        engine=deviation(vector(engine.total), torch.cat(truth), whole),
        theory=deviation(torch.cat(by_layer(exact.total)), torch.cat(truth), whole),
        gauss_newton=deviation(vector(engine.gauss_newton), exact.gauss_newton.vector(), whole),
        paper_top=max(errors[cut:]),
        paper_recursion_against_paths=max(
            deviation(a, b, s) for a, b, s in zip(printed, printed_paths, scale, strict=True)
        ),
        below=tuple(deviation(a, b) for a, b in gaps),
    )


@lru_cache(maxsize=4)
def random_nets(quick: bool) -> tuple[Agreement, ...]:
    """Nets with two to five hidden layers, several activations, scalar and vector outputs."""
    specs = (rct_spec(1.0, 0), rct_spec(14.0, 1), rct_spec(7.0, 2), "tanh")
    found = []
    for hidden in (2, 3, 4) if quick else (1, 2, 3, 4, 5, 6):
        for number, spec in enumerate(specs):
            for outputs, loss in ((1, "half_mse"), (3, "cross_entropy")):
                g = torch.Generator().manual_seed(100 * hidden + 10 * number + outputs)
                net = random_net([3, *[4] * hidden, outputs], ACTIVATIONS[spec], generator=g)
                found.append(compare(net, spec, samples=4, loss=loss, generator=g))
    return tuple(found)


@lru_cache(maxsize=1)
def special_nets() -> dict[str, Agreement]:
    """Nets on which the paper's form is exact at every depth: one path between neurons, or no curvature."""
    found = {}
    spec = rct_spec(7.0, 2)
    for name, widths, diagonal in (
        ("width 1", [3, 1, 1, 1, 1, 2], False),
        ("diagonal weights", [3, 4, 4, 4, 4, 2], True),
    ):
        g = torch.Generator().manual_seed(len(name))
        net = random_net(widths, ACTIVATIONS[spec], generator=g)
        net = diagonal_net(net) if diagonal else net
        found[name] = compare(net, spec, samples=4, loss="half_mse", generator=g)
    return found


@lru_cache(maxsize=1)
def linear_net() -> float:
    """Largest |D| of either form on a net with linear σ: zero, the paper's form being exact in the empty way."""
    g = torch.Generator().manual_seed(3)
    net = random_net([3, 4, 4, 4, 2], linear(1.3), generator=g)
    x = torch.randn(4, 3, generator=g, dtype=torch.float64)
    bound = theory_loss("half_mse", torch.randn(4, 2, generator=g, dtype=torch.float64))
    forms = (exact_hessian_diagonal(net, x, bound), paper_hessian_diagonal(net, x, bound))
    return max(float(form.functional.vector().abs().max()) for form in forms)


def largest(values: Sequence[float]) -> float:
    """The largest, NaN if there is one."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())
