"""What an epoch costs with the norm watched, in processor time: `python -m benchmarks callbacks`.

An epoch is a plain loop of SGD over all training images in batches of 128: the residual net of width 8 on digits
(1,297 images), and ResNet-18 of width 16 with stem stride 2 on CIFAR-10 (50,000; as many random images where it is
not at hand). After each epoch every `Watch` measures the model as it stands. The ratio is (epoch + watch) / epoch, of
the same epoch; the first epoch, which has the pilot, is told apart. Ratios are medians over the later epochs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import median, store
from hessdiag import networks
from hessdiag.callbacks import Watch
from hessdiag.data import load
from hessdiag.errors import DataError


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    digits_epochs: int = 10
    cifar_epochs: int = 3
    samples: tuple[int, ...] = (64, 128)
    rtol: float = 0.1
    batch: int = 128
    activation: str = "rct:beta=1,curvature=7"
    lr: float = 0.05


def epoch(model: nn.Module, inputs: Tensor, targets: Tensor, optimiser: torch.optim.Optimizer, batch: int) -> None:
    """One pass in random order."""
    model.train()
    for chosen in torch.randperm(len(inputs)).split(batch):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimiser.step()


def timed(model: nn.Module, inputs: Tensor, targets: Tensor, epochs: int, settings: Settings) -> dict[str, Any]:
    """Seconds of each epoch, and of each watch after it."""
    optimiser = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9)
    watches = {
        n: Watch((inputs[:n], targets[:n]), samples=n, rtol=settings.rtol, max_seconds=None) for n in settings.samples
    }
    alone: list[float] = []
    watched: dict[int, list[float]] = {n: [] for n in watches}
    replicates: dict[int, list[int]] = {n: [] for n in watches}
    for _ in range(epochs):
        begin = time.process_time()
        epoch(model, inputs, targets, optimiser, settings.batch)
        alone.append(time.process_time() - begin)
        for n, watch in watches.items():
            begin = time.process_time()
            found = watch(model)
            watched[n].append(time.process_time() - begin)
            replicates[n].append(watch.last.replicates if watch.last else 0)
            told = f"{found['hessian_rms']:.3g}, {replicates[n][-1]} replicates"
            print(f"  {alone[-1]:7.2f} s an epoch, {watched[n][-1]:6.2f} s for {n} samples: {told}", flush=True)
    rows: dict[str, Any] = {}
    for n, watch in watches.items():
        last = watch.last
        assert last is not None
        ratios = [(a + w) / a for a, w in zip(alone, watched[n])]
        rows[f"{n} samples"] = {
            "method": last.plan.method,
            "replicates": replicates[n],
            "watch_seconds": vars(median(watched[n][1:])),
            "first_ratio": ratios[0],
            "ratio": vars(median(ratios[1:])),
        }
    return {"epoch_seconds": median(alone).value, "images": len(inputs), "watches": rows}


def cifar() -> tuple[Tensor, Tensor, str]:
    """Its training images, or as many random ones."""
    try:
        data = load("cifar10", split="train")
    except DataError:
        return torch.rand(50_000, 3, 32, 32), torch.randint(10, (50_000,)), "random images"
    inputs, targets = next(iter(data.batches(len(data))))
    return inputs, targets, "CIFAR-10"


def main(arguments: list[str] | None = None) -> None:
    """Time both nets and store results/callbacks.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.callbacks", description=__doc__)
    parser.add_argument("--digits-epochs", type=int, default=Settings.digits_epochs)
    parser.add_argument("--cifar-epochs", type=int, default=Settings.cifar_epochs)
    settings = Settings(**vars(parser.parse_args(arguments)))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    inputs, targets = next(iter(load("digits", split="train").batches(1297)))
    small = networks.build("small_resnet", activation=settings.activation, seed=0)
    results["residual net of width 8, digits"] = timed(small, inputs, targets, settings.digits_epochs, settings)
    inputs, targets, name = cifar()
    large = networks.build("resnet18", activation=settings.activation, seed=0, width=16, stem_stride=2)
    results[f"ResNet-18 of width 16, {name}"] = timed(large, inputs, targets, settings.cifar_epochs, settings)
    for net, row in results.items():
        for samples, one in row["watches"].items():
            value, low, high = (one["ratio"][key] for key in ("value", "low", "high"))
            first = f"the first epoch {one['first_ratio']:.2f}"
            print(f"{net}, {samples}: an epoch takes {value:.3g} [{low:.3g}, {high:.3g}] times as long; {first}")
    print(store("callbacks", settings, results))


if __name__ == "__main__":
    main()
