"""APGD-CE and APGD-T of experiments.attacks beside pyautoattack's: `python -m benchmarks.attacks`.

A small residual net is trained on digits with N-FGSM (eps 0.15); then 300 test images are attacked at eps 0.15
by either implementation with ten seeds, 100 iterations, one start, 9 targets. Per attack: mean robust
accuracy of both, the mean difference with its 95% interval over seeds (Student's t, 9 degrees of freedom,
seeds paired), and seconds of the processor per seed, both on the same images in one batch. Then both attacks after one
another (AA-2) in one batch and in three: on how many images the verdict is another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.common import store, tell
from experiments.attacks import aa2, apgd_ce, apgd_t, n_fgsm
from hessdiag import networks
from hessdiag.data import DataSet, load

EPS = 0.15
IMAGES = 300
SEEDS = 10


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    seeds: int = SEEDS
    images: int = IMAGES
    eps: float = EPS
    margin: float = 0.5
    smaller: int = 100


@dataclass(frozen=True)
class Comparison:
    """Robust accuracy in percent by seed, and seconds per seed."""

    attack: str
    ours: Tensor
    theirs: Tensor
    our_seconds: float
    their_seconds: float

    @property
    def difference(self) -> float:
        """Mean of ours minus theirs, in points."""
        return float((self.ours - self.theirs).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% of Student's t around the difference; seeds are paired."""
        gap = self.ours - self.theirs
        half = float(stats.t.ppf(0.975, len(gap) - 1) * gap.std() / len(gap) ** 0.5)
        return self.difference - half, self.difference + half


def trained(epochs: int = 15) -> tuple[nn.Module, Tensor, Tensor]:
    """A small residual net trained with N-FGSM on the digits, and its test images and labels."""
    train, test = (load("digits", split=split) for split in ("train", "test"))
    net = networks.build("small_resnet", activation="silu", seed=0)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, epochs=epochs, steps_per_epoch=21)
    inputs, targets = _batch(train)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=generator).split(64):
            net.train()
            adversarial = n_fgsm(net, inputs[chosen], targets[chosen], eps=EPS, generator=generator)
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(adversarial), targets[chosen]).backward()
            optimiser.step()
            steps.step()
    x, y = _batch(test)
    return net.eval(), x[:IMAGES], y[:IMAGES]


def _batch(data: DataSet) -> tuple[Tensor, Tensor]:
    batches = list(data.batches(1000))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def ours(net: nn.Module, x: Tensor, y: Tensor, attack: str, seed: int) -> float:
    """Robust accuracy in percent by experiments.attacks."""
    run = apgd_ce if attack == "apgd-ce" else apgd_t
    return 100 * float(run(net, x, y, eps=EPS, generator=torch.Generator().manual_seed(seed)).robust.double().mean())


def theirs(net: nn.Module, x: Tensor, y: Tensor, attack: str, seed: int) -> float:
    """Robust accuracy in percent by pyautoattack."""
    return 100 * float(standing(net, x, y, [attack], seed, len(x)).double().mean())


def standing(net: nn.Module, x: Tensor, y: Tensor, attacks: list[str], seed: int, batch_size: int) -> Tensor:
    """Which images withstand these attacks of pyautoattack, by its own evaluation loop."""
    import pyautoattack

    whole = pyautoattack.AutoAttack(
        net, eps=EPS, seed=seed, version="custom", attacks=attacks, device="cpu", norm="Linf"
    )
    whole.apgd.n_restarts = whole.apgd_targeted.n_restarts = 1
    whole.apgd_targeted.n_target_classes = 9
    adversarial, _ = whole.run_standard_evaluation(x, y, batch_size=batch_size)
    with torch.no_grad():
        return net(adversarial).argmax(1) == y  # type: ignore[no-any-return]


def moved(net: nn.Module, x: Tensor, y: Tensor, smaller: int) -> dict[str, int]:
    """On how many images the verdict of AA-2 is another in smaller batches."""
    sizes = (len(x), smaller)
    mine = [aa2(net, x, y, eps=EPS, batch_size=size).robust for size in sizes]
    other = [standing(net, x, y, ["apgd-ce", "apgd-t"], 0, size) for size in sizes]
    return {name: int((a != b).sum()) for name, (a, b) in {"ours": mine, "theirs": other}.items()}


def compare(net: nn.Module, x: Tensor, y: Tensor, attack: str, seeds: int = SEEDS) -> Comparison:
    """Both implementations over the same seeds."""
    found: list[tuple[Tensor, float]] = []
    runs: list[Callable[..., float]] = [ours, theirs]
    for run in runs:
        began = time.process_time()
        values = torch.tensor([run(net, x, y, attack, seed) for seed in range(seeds)], dtype=torch.float64)
        found.append((values, (time.process_time() - began) / seeds))
    return Comparison(attack, found[0][0], found[1][0], found[0][1], found[1][1])


def main() -> None:
    """Print the table, and store it."""
    parser = argparse.ArgumentParser(description="APGD beside pyautoattack on digits.")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    seeds = parser.parse_args().seeds
    net, x, y = trained()
    with torch.no_grad():
        clean = 100 * float((net(x).argmax(1) == y).double().mean())
    found = {}
    for attack in ("apgd-ce", "apgd-t"):
        row = compare(net, x, y, attack, seeds)
        found[attack] = {
            "ours": float(row.ours.mean()),
            "theirs": float(row.theirs.mean()),
            "difference": row.difference,
            "interval": row.interval,
            "our_seconds": row.our_seconds,
            "their_seconds": row.their_seconds,
        }
        tell(attack, found[attack])
    settings = Settings(seeds=seeds)
    store("attacks", settings, {"clean": clean, "attacks": found, "moved": moved(net, x, y, settings.smaller)})


if __name__ == "__main__":
    main()
