"""What denormal numbers cost on a CPU, over max|σ''|: `python -m benchmarks denormals`.

The step of `nfgsm`, and `hd.diagonal` by propagation of the same net (two replicates, without the audit, which is in
float64), each with denormal numbers taken for zero as the
project does (`hessdiag/problem/denormals.py`), and without; in turns, by processor time of one thread. Beside them: how
many of an activation's values are denormal, where its arguments are standard normal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

import hessdiag as hd
from benchmarks import nfgsm
from benchmarks.common import median, store
from hessdiag import activations
from hessdiag.problem import handing_back
from hessdiag.problem.denormals import denormals_are_zero

SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Settings:
    """What was timed."""

    curvatures: tuple[float, ...] = (1.0, 7.0, 20.0, 50.0)
    rounds: int = 5
    warmup: int = 8
    samples: int = 4
    replicates: int = 2


@contextmanager
def as_they_are() -> Iterator[None]:
    """Measurements that leave denormal numbers what they are."""
    with mock.patch.object(handing_back, "denormals_are_zero", nullcontext):
        yield


def share_of_denormals(activation: str) -> float:
    """Of the values of an activation at standard normal arguments."""
    value = activations.build(activation)(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    return float(((value != 0.0) & (value.abs() < SMALLEST)).double().mean())


def seconds_of(call: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def row(curvature: float, settings: Settings) -> dict[str, Any]:
    """Seconds of both kinds of work, with and without, and their ratio."""
    activation = f"rct:beta=1,curvature={curvature:g}"
    config = nfgsm.configuration(nfgsm.Settings(), activation, 2, autocast="none", channels_last=True)
    step, network = nfgsm.stepper_of(config, 32), nfgsm.build_network(config, (3, 32, 32), 10).eval()
    for i in range(settings.warmup):
        step(i)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(settings.samples, 3, 32, 32, generator=generator)
    batch = x, torch.randint(0, 10, (settings.samples,), generator=generator)
    objective = hd.Objective(calibrated(network, x))

    def diagonal() -> object:
        return hd.diagonal(objective, batch, method="propagation", replicates=settings.replicates, audit_model=False)

    times: dict[str, list[float]] = {"step": [], "step, as they are": [], "diagonal": [], "diagonal, as they are": []}
    for _ in range(settings.rounds):
        with denormals_are_zero():
            times["step"].append(seconds_of(lambda: step(0)))
        times["step, as they are"].append(seconds_of(lambda: step(0)))
        times["diagonal"].append(seconds_of(diagonal))
        with as_they_are():
            times["diagonal, as they are"].append(seconds_of(diagonal))
    found: dict[str, Any] = {"denormal values": share_of_denormals(activation)}
    for kind in ("step", "diagonal"):
        slow, fast = times[f"{kind}, as they are"], times[kind]
        found[f"{kind}, seconds"] = median(fast).value
        found[f"{kind}, times as long with them"] = asdict(median([a / b for a, b in zip(slow, fast)]))
    return found


def calibrated(network: nn.Module, x: torch.Tensor) -> nn.Module:
    """With running statistics of its own, so that arguments of activations are of the size of training's."""
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(x)
    return network.eval()


def main(arguments: list[str] | None = None) -> None:
    """Time everything and store results/denormals.json."""
    settings = nfgsm.begun(Settings(), "denormals", __doc__, arguments)
    store("denormals", settings, {"max|σ''|": {f"{c:g}": row(c, settings) for c in settings.curvatures}})


if __name__ == "__main__":
    main()
