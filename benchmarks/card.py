"""What one GPU does in a few minutes: training speed, a GPT's replicate, what an activation costs, norms.

    python -m benchmarks.card [throughput] [nanogpt] [table2] [norms] [--out FOLDER]

throughput  standard and N-FGSM training of ResNet-18 (bfloat16 autocast, channels-last, steps replayed as a graph; with
            augmentation) beside a plain eager loop of the same method: with torch's defaults, and in bfloat16 with the
            channels last; the ratio is to the faster of the two
nanogpt     seconds and memory of a gradient, of a product and of a replicate of propagation on a GPT of 124 million
            parameters (`benchmarks.nanogpt`), all sequences together and one after the other
table2      milliseconds and memory of a standard step with ReLU, SiLU and RCT-AF: eager float32, and compiled, each
            with a compiler that has seen nothing before
norms       ResNet-18 on 64 images: the norm of its Hessian's diagonal within 5% by propagation, and how far
            Hutchinson's probes come in the same time

A row is stored as soon as it is measured; rows that are stored already are left out. Without a GPU everything is tiny:
a rehearsal, whose numbers say nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import hessdiag as hd
from benchmarks import nanogpt, training
from benchmarks.common import RESULTS, environment
from experiments.sweep.run import saved_bytes
from hessdiag import networks
from hessdiag.data import load
from hessdiag.data.dataset import DataSet
from hessdiag.errors import ConfigurationError, DataError, nearest
from hessdiag.store.files import write_bytes

ACTIVATIONS = ("relu", "silu", *(f"rct:beta={b},curvature=7" for b in (0, 1, 2)))
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured, and how large."""

    device: str
    width: int = 64
    batch: int = 128
    steps: int = 30
    warmup: int = 10
    images: int = 64
    rtol: float = 0.05
    compile: bool = True


def sized(device: str) -> Settings:
    """Full size on a GPU, tiny on a CPU."""
    if device.startswith("cuda"):
        return Settings(device)
    return Settings(device, width=2, batch=8, steps=2, warmup=1, images=8, rtol=0.5, compile=False)


def fresh_compiler() -> AbstractContextManager[Any]:
    """No compiled code of before, in memory or on disk, for what runs within."""
    from torch._inductor import utils

    torch._dynamo.reset()
    make = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # the name until torch 2.7
    context: AbstractContextManager[Any] = make()
    return context


def throughput(method: str, settings: Settings) -> Row:
    """Images per second of the trainer and of the plain loop."""
    same = training.Settings(
        settings.device,
        width=settings.width,
        batch=settings.batch,
        steps=settings.steps,
        warmup=settings.warmup,
    )
    eager, half = training.plain(method, same), training.plain(method, same, half=True)
    mine, _ = training.ours(method, same)
    return {
        "images_per_second": settings.batch / mine,
        "plain_images_per_second": settings.batch / eager,
        "plain_half_images_per_second": settings.batch / half,
        "ratio": min(eager, half) / mine,
    }


def gpt(name: str, settings: Settings) -> Row:
    """A row of `benchmarks.nanogpt`."""
    shape = nanogpt.Shape() if settings.device.startswith("cuda") else nanogpt.TINY
    return asdict(shape) | nanogpt.measure(name, settings.device, shape)


def table2(name: str, settings: Settings) -> Row:
    """Milliseconds per standard step and memory with one activation, "eager NAME" or "compiled NAME"."""
    gc.collect()  # nothing of the row before counts for the peak
    how, _, activation = name.partition(" ")
    device = torch.device(settings.device)
    data = noise(settings)
    x, y = data.inputs[: settings.batch].to(device).float() / 255, data.targets[: settings.batch].to(device)
    model = networks.build("resnet18", activation=activation, width=settings.width, seed=0).to(device)
    kept = saved_bytes(model, x, y, known=[x, *model.parameters()]) / 1e9
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    forward: Callable[[torch.Tensor], torch.Tensor] = model
    with fresh_compiler():
        if how == "compiled" and settings.compile:
            forward = torch.compile(model)

        def step(_: int) -> None:
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(forward(x), y).backward()  # type: ignore[no-untyped-call]
            optimiser.step()

        for i in range(settings.warmup):
            step(i)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = training.timed(step, training.Settings(settings.device, steps=settings.steps, warmup=0))
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"milliseconds": 1e3 * seconds, "kept_gb": kept if how == "eager" else None, "peak_gb": peak}


def norms(activation: str, settings: Settings) -> Row:
    """The norm on a net after 20 steps of training, by propagation, and by Hutchinson in the same time."""
    device = torch.device(settings.device)
    data, count = pictures(settings), settings.images
    model = networks.build("resnet18", activation=activation, width=settings.width, seed=0).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in data.batches(settings.batch, device=device):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.eval()
    objective, batches = hd.Objective(model), data.sample(count, seed=1).batches(count, device=device)
    row: Row = {"data": data.name, "parameters": objective.size}
    for method in ("propagation", "hutchinson"):
        limit = None if method == "propagation" else max(row["propagation"]["seconds"], 1.0)
        found = hd.measure(objective, batches, method=method, rtol=settings.rtol, max_seconds=limit)
        row[method] = {"rms": found.rms, "half_width": found.norm.total.half_width, "replicates": found.replicates}
        row[method] |= {"seconds": found.seconds, "status": found.status}
    return row


def noise(settings: Settings) -> DataSet:
    """Random bytes shaped like CIFAR-10."""
    return training.images(training.Settings(settings.device, batch=settings.batch))


def pictures(settings: Settings) -> DataSet:
    """20 batches of CIFAR-10 where it is at hand, else random ones."""
    try:
        return load("cifar10", split="train", samples=20 * settings.batch, seed=0)
    except DataError:
        return noise(settings)


PARTS: dict[str, tuple[Callable[[str, Settings], Row], tuple[str, ...]]] = {
    "throughput": (throughput, ("n_fgsm", "standard")),
    "nanogpt": (gpt, tuple(nanogpt.ROWS)),
    "table2": (table2, tuple(f"{how} {name}" for how in ("eager", "compiled") for name in ACTIVATIONS)),
    "norms": (norms, ("rct:beta=1,alpha=14", "silu")),
}


def measure(part: str, settings: Settings, folder: Path, stored: Path) -> int:
    """The rows of a part that `stored` has not; written after each, with those, to `folder`. Returns how many were
    measured.
    """
    function, names = PARTS[part]
    if part == "throughput":  # its steps are replayed instead
        settings = replace(settings, compile=False)
    name = f"card-{part}-{settings.device.partition(':')[0]}.json"
    path, rows, measured = folder / name, dict[str, Row](), 0
    for place in (stored / name, path):
        if place.is_file():
            content = json.loads(place.read_text(encoding="utf-8"))
            if content["settings"] == asdict(settings):
                rows = content["results"]
    for row in names:
        if row in rows:
            continue
        rows[row] = function(row, settings)
        measured += 1
        folder.mkdir(parents=True, exist_ok=True)
        where = environment()
        if settings.device.startswith("cuda"):
            where["card"] = torch.cuda.get_device_name(settings.device)
        content = {"environment": where, "settings": asdict(settings), "results": rows}
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
        print(f"{part} {row}: {json.dumps(rows[row])}", flush=True)
    return measured


def main(arguments: list[str] | None = None) -> None:
    """Measure the parts that are named, all without a name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    for part in options.parts or PARTS:
        if part not in PARTS:
            raise ConfigurationError(f"no part {part!r}; {nearest(part, list(PARTS))}")
        measure(part, sized(options.device), options.out, RESULTS)


if __name__ == "__main__":
    main()
