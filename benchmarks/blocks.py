"""Hutchinson's probes, one per block of samples against one for all: variance, and variance times processor time.

Trained nets on digits; the sum over all entries of the sample variance of `replicates` replicates of the total, and the
processor time of one. Both relative to one probe for all samples (`Plan.block` = 0), the estimators taking turns.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hessdiag as hd
from benchmarks.common import digits, small_resnet, store, tell, train
from hessdiag import networks
from hessdiag.measuring.ranks import World
from hessdiag.methods import METHODS, Case, Plan
from hessdiag.methods.batches import numbered, survey


@dataclass(frozen=True)
class Settings:
    """What was run."""

    samples: int = 256
    replicates: int = 24
    steps: int = 200
    blocks: tuple[int, ...] = (0, 128, 64, 32, 16)


def nets(settings: Settings) -> dict[str, nn.Module]:
    """An MLP and the residual conv net, each as drawn and trained."""
    found: dict[str, nn.Module] = {}
    x, y = digits(1297)
    for steps in (0, settings.steps):
        mlp = networks.build("mlp", activation="silu", seed=0, in_features=64, widths=(64, 64))
        train(mlp, x, y, steps=steps, batch=64, lr=0.1, seed=0)
        found[f"MLP 64-64-64-10, {steps} steps"] = mlp.eval()
        found[f"residual conv net, {steps} steps"] = small_resnet("silu", steps=steps, seed=0)
    return found


def compare(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """By block: variance and variance times time, relative to one probe for all."""
    objective, batches = hd.Objective(model), [digits(settings.samples)]
    facts, first = survey(objective, batches), next(iter(numbered(objective, batches)))
    works = {}
    for block in settings.blocks:
        plan = Plan("hutchinson", block=block, parts=False)
        works[block] = METHODS["hutchinson"].work(Case(objective, batches, facts, first, 0, World(), chosen=plan))
    rows: dict[int, list[Tensor]] = {block: [] for block in settings.blocks}
    seconds = dict.fromkeys(settings.blocks, 0.0)
    for number in range(-1, settings.replicates):
        for block, work in works.items():
            start = time.process_time()
            drawn = work.replicate(first, max(number, 0))["total"]
            if number >= 0:  # the first of all prepares
                seconds[block] += time.process_time() - start
                rows[block].append(torch.cat([t.flatten() for t in drawn.values()]))
    spread = {block: float(torch.stack(found).var(0).sum()) for block, found in rows.items()}
    return {
        str(block): {
            "variance": spread[block] / spread[0],
            "time": seconds[block] / seconds[0],
            "variance times time": spread[block] * seconds[block] / (spread[0] * seconds[0]),
        }
        for block in settings.blocks
    }


def main() -> None:
    """Measure net by net, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=Settings.samples)
    parser.add_argument("--replicates", type=int, default=Settings.replicates)
    options = parser.parse_args()
    settings = Settings(options.samples, options.replicates)
    results: dict[str, Any] = {}
    for name, model in nets(settings).items():
        results[name] = compare(model, settings)
        for block, row in results[name].items():
            tell(f"{name}, block {block}", row)
    store("blocks", settings, results)


if __name__ == "__main__":
    main()
