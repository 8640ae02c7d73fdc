"""Build the shipped example: a small residual network with RCT-AF, trained on scikit-learn's digits.

    python -m hessdiag.examples.build_digits [OUT.safetensors]

One thread, float32, every random number from a seeded generator: the same CPU and version of torch give the same
bytes. Training is plain: SGD with momentum and a cosine schedule on cross-entropy.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from hessdiag.checkpoint import save_checkpoint
from hessdiag.data import load
from hessdiag.examples.shipped import EXAMPLES
from hessdiag.networks import build

ACTIVATION = "rct:beta=1,alpha=14"
EPOCHS, BATCH, RATE, MOMENTUM, DECAY, SEED = 12, 64, 0.05, 0.9, 5e-4, 0


def train(*, epochs: int = EPOCHS, seed: int = SEED) -> nn.Module:
    """The trained network, in eval mode."""
    model = build("small_resnet", activation=ACTIVATION, num_classes=10, seed=seed)
    data = load("digits", split="train")
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(data) // BATCH)
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    step = 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(data) - BATCH + 1, BATCH):
            for group in optimiser.param_groups:
                group["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            chosen = order[start : start + BATCH]
            optimiser.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(data.inputs[chosen]), data.targets[chosen]))
            optimiser.step()
            step += 1
    return model.eval()


def accuracy(model: nn.Module, split: str) -> float:
    """Share of a split that is classified right."""
    data = load("digits", split=split)
    with torch.no_grad():
        return float((model(data.inputs).argmax(1) == data.targets).double().mean())


def write(path: Path) -> None:
    """Train and write the checkpoint."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = train()
        save_checkpoint(
            path,
            model,
            epoch=EPOCHS,
            metrics={f"{split}_accuracy": round(accuracy(model, split), 4) for split in ("train", "test")},
            data="digits",
            method="SGD on clean images",
            built_by="hessdiag.examples.build_digits",
        )
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name(EXAMPLES["digits-example"])))
