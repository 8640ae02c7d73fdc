"""Residual conv net: squared error of the diagonal at the wall time of 100 Hutchinson probes, set-up included.

Each repeat times Hutchinson (graph of the gradient, then 100 probes), gives propagation the same time (linearisation,
direct share, exact Gauss-Newton part, the directions that are squared exactly, then as many replicates as were finished
in it) and compares |d_hat - d|^2 of both with the exact diagonal d, taken in float64. The methods take turns; ratios
are formed within a repeat.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

import hessdiag as hd
from benchmarks.common import digits, median, ratio_of_means, small_resnet, store
from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.methods.hutchinson import probe
from hessdiag.methods.pilot import affordable_rank
from hessdiag.signs import Signs


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    activation: str = "rct:beta=1,alpha=14"
    samples: int = 64
    probes: int = 100
    repeats: int = 15
    training_steps: tuple[int, ...] = (0, 200)
    seed: int = 0
    target: float = 150.0


SETTINGS = Settings()


def truth(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    """The exact diagonal in float64."""
    linear = Linearisation(hd.Objective(copy.deepcopy(model).double()), x.double(), y)
    outer, inner = exact.batch_diagonal(linear)
    return {name: (outer[name] + inner[name]) / len(y) for name in outer}


def hutchinson(objective: hd.Objective, x: Tensor, y: Tensor, probes: int, seed: int) -> tuple[Tensors, float]:
    """(diagonal, seconds) of so many probes."""
    begun = time.perf_counter()
    signs, out = Signs(seed), zeros(objective.parameters)
    products = Products(objective, x, y, parts=False)
    for r in range(probes):
        v = probe(objective, signs, r)
        accumulate(out, {name: v[name] * hv for name, hv in products.hessian(v).items()}, 1.0 / (probes * len(y)))
    return out, time.perf_counter() - begun


def propagation(objective: hd.Objective, x: Tensor, y: Tensor, seconds: float, seed: int) -> tuple[Tensors, int, float]:
    """(diagonal, replicates finished within so many seconds, seconds of set-up)."""
    begun = time.perf_counter()
    signs, sums = Signs(seed), zeros(objective.parameters)
    propagator = Propagator(Linearisation(objective, x, y), keep=True)
    known = propagator.gauss_newton()
    accumulate(known, propagator.direct())
    propagator.deflate(signs, affordable_rank(propagator.batch, len(y)))
    accumulate(known, propagator.deflated())
    setup, count = time.perf_counter() - begun, 0
    while True:
        found = propagator.functional(signs, count)
        if count and time.perf_counter() - begun > seconds:
            break
        accumulate(sums, found)
        count += 1
    return {name: (known[name] + sums[name] / count) / len(y) for name in sums}, count, setup


def squared_error(found: Tensors, exactly: Tensors) -> float:
    """|d_hat - d|^2."""
    return sum(float((found[name] - exactly[name]).square().sum()) for name in exactly)


def one_net(settings: Settings, steps: int) -> dict[str, Any]:
    """All repeats on one net."""
    model = small_resnet(settings.activation, steps=steps, seed=settings.seed)
    x, y = digits(settings.samples, seed=settings.seed)
    objective = hd.Objective(model)
    exactly = truth(model, x, y)
    square = sum(float(t.square().sum()) for t in exactly.values())
    rows = []
    for repeat in range(-1, settings.repeats):  # the first warms up
        h, seconds = hutchinson(objective, x, y, settings.probes if repeat >= 0 else 5, 2 * repeat + 10)
        p, count, setup = propagation(objective, x, y, seconds, 2 * repeat + 11)
        if repeat >= 0:
            errors = squared_error(h, exactly) / square, squared_error(p, exactly) / square
            rows.append((errors[0] / errors[1], *errors, seconds, float(count), setup))
    ratio, h_error, p_error, times, counts, setups = (list(column) for column in zip(*rows))
    return {
        "training_steps": steps,
        "parameters": objective.size,
        "ratio": median(ratio).__dict__,
        "ratio_of_means": ratio_of_means(h_error, p_error).__dict__,
        "hutchinson_relative_error": (sum(h_error) / len(rows)) ** 0.5,
        "propagation_relative_error": (sum(p_error) / len(rows)) ** 0.5,
        "seconds": median(times).value,
        "replicates": median(counts).value,
        "setup_seconds": median(setups).value,
        "repeats": len(rows),
    }


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=SETTINGS.repeats)
    settings = replace(SETTINGS, repeats=parser.parse_args().repeats)
    nets = []
    for steps in settings.training_steps:
        nets.append(one_net(settings, steps))
        store("convnet", settings, {"nets": nets})


if __name__ == "__main__":
    main()
