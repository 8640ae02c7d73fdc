"""ResNet-18, 16 images: how far two replicates fix the squared norm, propagation against Hutchinson.

<d1, d2> of two independent replicates is unbiased for |diag|^2. From m = 40 replicates of either method (propagation's
with its exact offsets: Gauss-Newton part, direct share and the directions squared exactly) and their products K_ij the
variance of one product is estimated without bias as

    mean over pairs of K_ij^2  -  mean over disjoint pairs of pairs of K_ij K_kl.

The methods take turns, replicate by replicate; a seed covers initial weights, training, images and signs. The curves
(results/resnet18.svg) show error against wall time, set-up included: of |diag|^2 (disjoint blocks of replicates against
propagation's estimate from all of them) and of the diagonal itself (trace of a replicate's covariance over m).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hessdiag as hd
from benchmarks.common import RESULTS, median, store, train
from hessdiag import networks
from hessdiag.data import load
from hessdiag.errors import DataError
from hessdiag.graph import Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate
from hessdiag.methods.hutchinson import probe
from hessdiag.methods.pilot import affordable_rank, product_moments
from hessdiag.signs import Signs


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    network: str = "resnet18"
    activation: str = "rct:beta=1,alpha=14"
    samples: int = 16
    seeds: int = 5
    replicates: int = 40
    steps: int = 5
    batch: int = 16
    lr: float = 0.05
    threads: int = 1
    target: float = 400.0


SETTINGS = Settings()
METHODS = ("propagation", "hutchinson")
BLOCKS = (2, 4, 5, 10, 20)


def images(settings: Settings, seed: int) -> tuple[Tensor, Tensor, str]:
    """Images to train and measure on: CIFAR-10 where it is at hand, else random ones, and which it was."""
    count = settings.samples + settings.batch * settings.steps
    try:
        data = load("cifar10", split="train", samples=count, seed=seed)
    except DataError:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.rand(count, 3, 32, 32, generator=generator)
        return inputs, torch.randint(10, (count,), generator=generator), "random images"
    inputs, targets = next(iter(data.batches(count)))
    return inputs, targets, "CIFAR-10"


def gram(rows: Tensor) -> Tensor:
    """Products of replicates in float64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(1 << 16, dim=1):
        part = part.double()
        total += part @ part.T
    return total


def block_errors(k: Tensor, truth: float) -> dict[int, float]:
    """Relative rms error of the unbiased square from so many replicates, over disjoint blocks of them."""
    errors = {}
    for size in (size for size in BLOCKS if size <= len(k)):
        found = []
        for low in range(0, len(k) - size + 1, size):
            part = k[low : low + size, low : low + size]
            found.append(float(part.sum() - part.trace()) / (size * (size - 1)) / truth - 1.0)
        errors[size] = math.sqrt(sum(e * e for e in found) / len(found))
    return errors


def one_seed(settings: Settings, seed: int) -> dict[str, Any]:
    """Train a net and measure both methods on it."""
    inputs, targets, data = images(settings, seed)
    model = networks.build(settings.network, activation=settings.activation, seed=seed)
    steps, n = settings.steps, settings.samples
    loss = train(model, inputs[n:], targets[n:], steps=steps, batch=settings.batch, lr=settings.lr, seed=seed)
    objective = hd.Objective(model)
    x, y, signs = inputs[:n], targets[:n], Signs(seed)
    out: dict[str, Any] = {"seed": seed, "data": data, "loss": loss, "parameters": objective.size}

    begun = time.perf_counter()
    propagator = Propagator(Linearisation(objective, x, y), keep=False)
    outer, known = propagator.gauss_newton(), propagator.direct()
    rank = affordable_rank(propagator.batch, n)
    propagator.deflate(signs, rank)
    accumulate(known, propagator.deflated())
    share = sum(float(t.square().sum()) for t in outer.values())
    accumulate(known, outer)
    setups = {"propagation": time.perf_counter() - begun}
    begun = time.perf_counter()
    products = Products(objective, x, y, parts=False)
    setups["hutchinson"] = time.perf_counter() - begun

    def propagation(r: int) -> Tensors:
        found = propagator.functional(signs, r)
        accumulate(found, known)
        return found

    def hutchinson(r: int) -> Tensors:
        v = probe(objective, signs, r)
        return {name: v[name] * hv for name, hv in products.hessian(v).items()}

    draw: dict[str, Callable[[int], Tensors]] = {"propagation": propagation, "hutchinson": hutchinson}
    rows = {method: torch.empty(settings.replicates, objective.size) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for r in range(settings.replicates):
        for method in METHODS:
            begun = time.perf_counter()
            found = draw[method](r)
            seconds[method].append(time.perf_counter() - begun)
            torch.cat([(t / n).reshape(-1).float() for t in found.values()], out=rows[method][r])
    products_of = {method: gram(rows[method]) for method in METHODS}
    truth, _, _ = product_moments(products_of["propagation"])
    out |= {"square": truth, "directions": rank, "gauss_newton_share": share / n**2 / truth, "setup_seconds": setups}
    for method, k in products_of.items():
        square, variance, _ = product_moments(k)
        scatter = float(k.trace()) / len(k) - square
        out[method] = {
            "square": square,
            "variance": variance,
            "relative_error": math.sqrt(max(variance, 0.0)) / truth,
            "diagonal_error": math.sqrt(max(scatter, 0.0) / truth),
            "seconds": median(seconds[method]).value,
            "blocks": block_errors(k, truth),
        }
    p, h = out["propagation"], out["hutchinson"]
    out["variance_ratio"] = h["variance"] / p["variance"]
    out["time_ratio"] = median([a / b for a, b in zip(seconds["propagation"], seconds["hutchinson"])]).value
    out["diagonal_ratio"] = (h["diagonal_error"] / p["diagonal_error"]) ** 2
    return out


def plot(seeds: list[dict[str, Any]]) -> None:
    """Error against wall time, a line per method: medians over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for method, marker in zip(METHODS, "os"):
        found = [(s[method], s["setup_seconds"][method]) for s in seeds]
        setup = median([setup for _, setup in found]).value
        each = median([f["seconds"] for f, _ in found]).value
        times = [setup + size * each for size in BLOCKS]
        keyed = [{int(size): e for size, e in f["blocks"].items()} for f, _ in found]
        left.plot(times, [median([k[size] for k in keyed]).value for size in BLOCKS], marker=marker, label=method)
        single = median([f["diagonal_error"] for f, _ in found]).value
        right.plot(times, [single / math.sqrt(size) for size in BLOCKS], marker=marker, label=method)
    left.set_ylabel("relative rms error of |diag|²")
    right.set_ylabel("relative rms error of diag")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="seconds, set-up included")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "resnet18.svg", metadata={"Date": None})
    pyplot.close(figure)


def stored(settings: Settings) -> list[dict[str, Any]]:
    """Seeds of an earlier run with the same settings, however many were asked for then."""
    path = RESULTS / "resnet18.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    same = content["settings"] | {"seeds": settings.seeds} == asdict(settings)
    return list(content["results"]["seeds"])[: settings.seeds] if same else []


def main() -> None:
    """Measure seed by seed, store after each, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SETTINGS.seeds)
    parser.add_argument("--replicates", type=int, default=SETTINGS.replicates)
    parser.add_argument("--resume", action="store_true", help="keep the seeds already stored with these settings")
    given = parser.parse_args()
    settings = replace(SETTINGS, seeds=given.seeds, replicates=given.replicates)
    torch.set_num_threads(min(settings.threads, os.cpu_count() or 1))
    seeds: list[dict[str, Any]] = stored(settings) if given.resume else []
    for seed in range(len(seeds), settings.seeds):
        seeds.append(one_seed(settings, seed))
        ratio = median([s["variance_ratio"] for s in seeds])
        store("resnet18", settings, {"seeds": seeds, "variance_ratio": ratio.__dict__})
        plot(seeds)


if __name__ == "__main__":
    main()
