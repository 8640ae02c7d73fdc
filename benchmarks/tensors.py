"""Processor time of the public calls against the number of parameter tensors, of deep nets of small layers.

Residual blocks x + 0.3 tanh(norm(linear(x))) of width 8, so that nothing but the number of tensors counts; one thread,
processor time, interleaved, the shortest of the repeats. A call whose time grows with the square shows here: four times
the tensors are to take at most 4.5 times as long. And a net of 2,000 layers, once: what the forecast takes, and the
measurement that it goes before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import hessdiag as hd
from benchmarks.common import store, tell
from hessdiag.graph import Linearisation
from hessdiag.measuring.forecast import forecast


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    tensors: tuple[int, ...] = (100, 400)
    width: int = 8
    samples: int = 16
    replicates: int = 10
    repeats: int = 3
    target: float = 4.5
    deep: int = 4000
    """Tensors of the net of 2,000 layers."""


SETTINGS = Settings()


class Block(nn.Module):
    """x + 0.3 tanh(norm(linear(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        out: Tensor = x + 0.3 * torch.tanh(self.norm(self.linear(x)))
        return out


def objective(tensors: int, width: int) -> hd.Objective:
    """A net of about so many parameter tensors."""
    torch.manual_seed(0)
    blocks = [Block(width) for _ in range(tensors // 4)]
    return hd.Objective(nn.Sequential(*blocks, nn.Linear(width, 3)).double().eval())


CALLS: dict[str, Callable[[hd.Objective, Any, Settings], object]] = {
    "linearise": lambda o, b, s: Linearisation(o, *b[0]),
    "forecast": lambda o, b, s: forecast(o, b),
    "diagonal": lambda o, b, s: hd.diagonal(o, b, method="propagation", replicates=s.replicates),
    "measure": lambda o, b, s: hd.measure(o, b, max_replicates=s.replicates, rtol=1e-6),
}


def run(settings: Settings) -> dict[str, Any]:
    """A row per call."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(settings.samples, settings.width, generator=generator, dtype=torch.float64)
    batches = [(x, torch.randint(0, 3, (settings.samples,), generator=generator))]
    objectives = {tensors: objective(tensors, settings.width) for tensors in settings.tensors}
    rows = []
    for name, call in CALLS.items():
        call(objectives[settings.tensors[0]], batches, settings)  # what the first call imports is not counted
        found: dict[int, list[float]] = {tensors: [] for tensors in settings.tensors}
        for _ in range(settings.repeats):
            for tensors, one in objectives.items():
                begun = time.process_time()
                call(one, batches, settings)
                found[tensors].append(time.process_time() - begun)
        seconds = {str(tensors): min(times) for tensors, times in found.items()}
        first, last = seconds[str(settings.tensors[0])], seconds[str(settings.tensors[-1])]
        rows.append({"call": name, "seconds": seconds, "ratio": last / first})
        tell(name, rows[-1])
    deep = objective(settings.deep, settings.width)
    once = {}
    for name in ("forecast", "measure"):
        begun = time.process_time()
        CALLS[name](deep, batches, settings)
        once[name] = time.process_time() - begun
    tell("2,000 layers", once)
    return {"rows": rows, "deep": once}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=list(SETTINGS.tensors))
    parser.add_argument("--repeats", type=int, default=SETTINGS.repeats)
    given = parser.parse_args()
    settings = replace(SETTINGS, tensors=tuple(given.tensors), repeats=given.repeats)
    found = run(settings)
    if settings == SETTINGS:
        store("tensors", settings, found)


if __name__ == "__main__":
    main()
