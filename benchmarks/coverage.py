"""How often 95% intervals hold the true norm, over 1,000 seeded measurements in each of several settings.

A measurement here is the engine's own loop, stopping rule and norm; only what does not depend on the seed (one
linearisation, the exact part) is shared between the measurements of a setting. Every measurement draws signs by a seed
of its own, so measurements are independent. The true norm is that of the exact diagonal, in float64.

For the population target the population is known: digits drawn with replacement, so that its Hessian is the mean over
all of them. A measurement there is one deal of the engine's into shards (`shards_of`) of its own draw.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import hessdiag as hd
from benchmarks import transformers
from benchmarks.common import RESULTS, binomial_interval, digits, store, train
from hessdiag import networks
from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact
from hessdiag.measuring.loop import Loop
from hessdiag.measuring.population import shards_of
from hessdiag.measuring.ranks import World
from hessdiag.measuring.stopping import run as run_until
from hessdiag.methods import Case, Plan
from hessdiag.methods.base import Aim, find
from hessdiag.methods.batches import numbered, survey
from hessdiag.norm import NormEstimate, Replicates, estimate


@dataclass(frozen=True)
class Setting:
    """One kind of measurement: `rtol` set stops sequentially, else `replicates` are taken."""

    name: str
    network: str
    options: dict[str, Any]
    steps: int
    samples: int
    method: str = "propagation"
    target: str = "data"
    rtol: float | None = None
    replicates: int = 16
    parameters: str | None = None
    deflate: int = 0
    pilot: bool = False
    """Whether the plan is the pilot's, as of a measurement that is given none, chosen once by a seed of its own."""
    required: bool = True
    measurements: int | None = None
    """Where they are not as many as of the others."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    measurements: int = 1000
    activation: str = "rct:beta=1,alpha=14"
    confidence: float = 0.95
    low: float = 0.93
    high: float = 0.97
    seed: int = 0
    settings: tuple[Setting, ...] = field(
        default=(
            Setting("conv net, fixed", "small_resnet", {}, 50, 32, deflate=16),
            Setting("conv net, sequential", "small_resnet", {}, 50, 32, rtol=0.006, deflate=16),
            Setting("conv net, fixed, signs alone", "small_resnet", {}, 50, 32),
            Setting("population", "mlp", {"widths": (16,), "in_features": 64}, 50, 640, target="population"),
            Setting("MLP, fixed", "mlp", {"widths": (64, 64), "in_features": 64}, 50, 32, deflate=4),
            Setting("MLP, sequential", "mlp", {"widths": (64, 64), "in_features": 64}, 50, 32, rtol=0.001, deflate=4),
            Setting("ViT, fixed", "vit", {"width": 8}, 200, 32, deflate=4, measurements=500),
            Setting("GRU, fixed", "gru", {"width": 8}, 200, 32, replicates=128, pilot=True, measurements=500),
            Setting("GRU, sequential", "gru", {"width": 8}, 200, 32, rtol=0.1, pilot=True, measurements=500),
            Setting(
                "noise dominates: GRU, signs alone", "gru", {"width": 8}, 200, 32, replicates=64, measurements=500,
                required=False,
            ),
            Setting("noise dominates: Hutchinson", "small_resnet", {}, 50, 32, method="hutchinson", required=False),
            Setting(
                "heavy tails: population, well trained", "mlp", {"widths": (16,), "in_features": 64}, 2000, 64,
                target="population", required=False,
            ),
            Setting(
                "few entries: three gains", "small_resnet", {"width": 3}, 50, 4, parameters="bn1.weight",
                required=False,
            ),
        )
    )  # fmt: skip


SETTINGS = Settings()


class Rows(nn.Module):
    """A GRU that reads an image row by row; scores from its last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Of [N, 1, 8, 8]."""
        return self.head(self.gru(x[:, 0])[0][:, -1])  # type: ignore[no-any-return]


_BUILT: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda width: transformers.ViT(width, transformers.Settings(heads=2, layers=1)),
    "gru": Rows,
}


def model_of(setting: Setting, settings: Settings) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained network and all digits, shaped for it."""
    x, y = digits(1297)
    if setting.network in _BUILT:
        torch.manual_seed(settings.seed)
        model = _BUILT[setting.network](**setting.options)
    else:
        model = networks.build(setting.network, activation=settings.activation, seed=settings.seed, **setting.options)
    x = x.flatten(1) if setting.network == "mlp" else x
    train(model, x, y, steps=setting.steps, batch=64, lr=0.1, seed=settings.seed)
    return model, x, y


def true_rms(objective: hd.Objective, x: Tensor, y: Tensor) -> float:
    """The rms of the exact diagonal of these samples, in float64."""
    twin = hd.Objective(copy.deepcopy(objective.model).double(), parameters=list(objective.parameters))
    square, size = 0.0, 0
    sums: dict[str, Tensor] = {}
    for low in range(0, len(y), 256):
        linear = Linearisation(twin, x[low : low + 256].double(), y[low : low + 256])
        for part in exact.batch_diagonal(linear):
            for name, t in part.items():
                sums[name] = sums[name] + t if name in sums else t
    for t in sums.values():
        square += float((t / len(y)).square().sum())
        size += t.numel()
    return math.sqrt(square / size)


def over_signs(setting: Setting, settings: Settings) -> Iterator[tuple[float, NormEstimate]]:
    """(true rms, estimate) of measurements of one data set, by their own signs."""
    model, x, y = model_of(setting, settings)
    x, y = x[: setting.samples], y[: setting.samples]
    objective = hd.Objective(model, parameters=setting.parameters)
    truth = true_rms(objective, x, y)
    plan = Plan(setting.method, parts=False, deflate=setting.deflate)
    case = case_of(objective, [(x, y)], plan)
    if setting.pilot:
        aim = Aim(replicates=setting.replicates) if setting.rtol is None else Aim(setting.rtol)
        plan = find(setting.method).plan(case, aim, "the pilot's")
        case = replace(case, chosen=replace(plan, parts=False))
    loop = Loop(case, invariant=False)
    loop.run_known()
    for number in range(setting.measurements or settings.measurements):
        case.seed = 1000 * settings.seed + number + 1
        loop.work.signs, loop.done, loop.history = case.signs, 0, []
        loop.streams = {name: Replicates(objective.parameters, groups=plan.groups) for name in loop.streams}
        if setting.rtol is None:
            for _ in range(setting.replicates):
                loop.run_round(1)
        else:
            run_until(loop, setting.rtol, settings.confidence, 10, 1000, None)
        stream = loop.stream_of("total")
        assert stream is not None
        sequential = setting.rtol is not None
        yield (
            truth,
            estimate(stream, offset=loop.offset("total"), confidence=settings.confidence, sequential=sequential).total,
        )


def over_data(setting: Setting, settings: Settings) -> Iterator[tuple[float, NormEstimate]]:
    """(true rms of the population, estimate) of measurements that draw their data anew."""
    model, x, y = model_of(setting, settings)
    objective = hd.Objective(model)
    truth = true_rms(objective, x, y)
    generator = torch.Generator().manual_seed(settings.seed)
    for number in range(setting.measurements or settings.measurements):
        chosen = torch.randint(len(y), (setting.samples,), generator=generator)
        batches = [(x[chosen], y[chosen])]
        case = case_of(objective, batches, Plan(setting.method))
        case.seed = number
        stream = shards_of(case, setting.replicates)
        yield truth, estimate(stream, confidence=settings.confidence).total


def case_of(objective: hd.Objective, batches: list[tuple[Tensor, Tensor]], plan: Plan) -> Case:
    """The question of one measurement, unaudited."""
    first = next(iter(numbered(objective, batches)))
    found = replace(survey(objective, batches), checked=True)  # a list comes in one order
    return Case(objective, batches, found, first, 0, World(), chosen=plan)


def run(setting: Setting, settings: Settings) -> dict[str, Any]:
    """Coverage of one setting and what the status says."""
    begun = time.perf_counter()
    draw = over_data if setting.target == "population" else over_signs
    covered = below = 0
    flags: dict[str, int] = {}
    found: list[NormEstimate] = []
    truth = math.nan
    for truth, e in draw(setting, settings):
        covered += e.low <= truth <= e.high
        below += e.high < truth
        for flag in e.flags:
            flags[flag] = flags.get(flag, 0) + 1
        found.append(e)
    count = len(found)
    low, high = binomial_interval(covered, count)
    return {
        "setting": asdict(setting),
        "coverage": covered / count,
        "coverage_interval": (low, high),
        "missed_below": below / count,
        "flagged": sum(bool(e.flags) for e in found) / count,
        "flags": {flag: n / count for flag, n in sorted(flags.items())},
        "true_rms": truth,
        "bias_of_square": sum(e.square for e in found) / count / (truth**2 * found[0].entries) - 1.0,
        "mean_half_width": sum((e.high - e.low) / 2.0 for e in found) / count / truth,
        "mean_replicates": sum(e.replicates for e in found) / count,
        "measurements": count,
        "seconds": time.perf_counter() - begun,
    }


def main() -> None:
    """Measure setting by setting, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=int, default=SETTINGS.measurements)
    parser.add_argument("--only", metavar="NAME", help="measure this setting alone; the others' stored rows stay")
    options = parser.parse_args()
    settings = replace(SETTINGS, measurements=options.measurements)
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    path = RESULTS / "coverage.json"
    for setting in settings.settings:
        if options.only in (None, setting.name):
            found = run(setting, settings)
            if options.only and path.is_file():
                stored = json.loads(path.read_text(encoding="utf-8"))["results"]["rows"]
                rows = {row["setting"]["name"]: row for row in stored}
            rows[setting.name] = found
            order = [s.name for s in settings.settings if s.name in rows]
            store("coverage", settings, {"rows": [rows[name] for name in order]})


if __name__ == "__main__":
    main()
