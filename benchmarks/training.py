"""Images per second of the training methods, and what activations cost: `python -m benchmarks.training`.

Each method is timed twice in one run: the trainer (bfloat16 autocast, channels-last, on a GPU replayed as a graph and,
with --compile, compiled; augmentation included) and a plain eager loop of the same method with torch's defaults
(float32 with TF32 as torch sets it, no compilation, batches ready on the device). The floor is what the method's
forward-equivalent units would take at the speed of the trainer's own forward pass: a step of the attack costs 2 units,
a training pass 3 (one backward pass being two forward passes); on a GPU, where that pass is launched kernel by kernel,
it is none. Images are random bytes shaped like CIFAR-10; without a GPU everything is tiny.

The second table is that of the paper's Table 2 (arXiv 2603.23860): standard training steps of ResNet-18, batch 128, in
plain float32, with the largest memory allocated on a GPU, or the bytes kept for the backward pass on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import store, tell
from benchmarks.plain_loops import STEPS
from experiments.config import TrainConfig
from experiments.schedules import attack_budget
from experiments.splitnorm import SplitNorm
from experiments.sweep.run import saved_bytes
from experiments.trainer.compiling import fresh_compiler
from experiments.trainer.images import Sampler, on_device
from experiments.trainer.precision import Precision
from experiments.trainer.rig import build, make_forward
from experiments.trainer.step import Stepper, Tally
from hessdiag import networks
from hessdiag.data.dataset import DataSet, make
from hessdiag.kernels.tensors import wait

METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "n_fgsm": {},
    "pgd_at": {"attack": {"steps": 10}},
    "trades": {"attack": {"steps": 10, "step": "2/255"}},
    "dajat": {"attack": {"budget": "as_coded", "ramp": "none"}, "awp": {"gamma": 0.0}, "averaging": {"per": "none"}},
}
# Forward-equivalent units per image: 3 views x (1 target + 5 steps x 2 + 2 passes x 3) for DAJAT.
UNITS = {"standard": 3, "n_fgsm": 5, "pgd_at": 23, "trades": 28, "dajat": 51}
ACTIVATIONS = ("relu", "silu", "gelu", "mish", "softplus", *(f"rct:beta={b},curvature=7" for b in (0, 1, 2)))


@dataclass(frozen=True)
class Settings:
    """What was timed."""

    device: str
    network: str = "resnet18"
    width: int = 64
    batch: int = 128
    steps: int = 30
    warmup: int = 10
    compile: bool = False
    activation: str = "rct:beta=1,curvature=7"


def timed(step: Callable[[int], None], settings: Settings) -> float:
    """Seconds per step, after the warm-up."""
    for i in range(settings.warmup):
        step(i)
    wait(torch.device(settings.device))
    begin = time.perf_counter()
    for i in range(settings.steps):
        step(settings.warmup + i)
    wait(torch.device(settings.device))
    return (time.perf_counter() - begin) / settings.steps


def images(settings: Settings) -> DataSet:
    """Random bytes shaped like CIFAR-10."""
    g = torch.Generator().manual_seed(0)
    count = settings.batch * 8
    x = torch.randint(256, (count, 3, 32, 32), generator=g, dtype=torch.uint8)
    return make(x, torch.randint(10, (count,), generator=g), name="noise", split="train", num_classes=10)


def configuration(method: str, settings: Settings) -> TrainConfig:
    """The method with the trainer's fast options."""
    table: dict[str, Any] = {
        "method": method,
        "network": settings.network,
        "network_options": {"width": settings.width},
        "activation": settings.activation,
        "epochs": 10**6,
        "batch_size": settings.batch,
        "lr": 0.01,
        "schedule": {"name": "constant", "milestones": [], "factors": []},
        "autocast": "bfloat16",
        "channels_last": True,
        "compile": settings.compile,
        **METHODS[method],
    }
    return TrainConfig.from_dict(table)


def ours(method: str, settings: Settings) -> tuple[float, float]:
    """Seconds per step of the trainer, and of one forward pass in its precision."""
    device = torch.device(settings.device)
    config = configuration(method, settings)
    pool = on_device(images(settings), config, device)
    rig = build(config, (3, 32, 32), 10, device)
    index, views = torch.arange(len(pool), device=device), rig.method.extra_views(config.options)
    sampler = Sampler(pool, config, index, views=views)
    stepper, tally = Stepper(rig), Tally(device)
    budget = attack_budget(config.attack, eps=config.radius, epoch=1, epochs=1)
    order = sampler.order(1)
    rig.model.train()

    def step(i: int) -> None:
        views, y = sampler.batch(order, 1, i % sampler.steps)
        stepper(views, y, epoch=1, step=i, lr=0.01, budget=budget, tally=tally)

    whole = timed(step, settings)
    forward = torch.compile(rig.forward) if settings.compile else rig.forward
    x = sampler.batch(order, 1, 0)[0][0]

    def once(i: int) -> None:
        with torch.no_grad():
            forward(x)

    return whole, timed(once, settings)


class Half(nn.Module):
    """A network in the trainer's precision and memory layout."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.logits = make_forward(self.inner, Precision("bfloat16", True))

    def forward(self, x: Tensor) -> Tensor:
        """Logits in float32."""
        return self.logits(x)


def plain(method: str, settings: Settings, *, half: bool = False) -> float:
    """Seconds per step of the plain loop, with `half` in the trainer's precision and memory layout."""
    net = networks.build(settings.network, activation=settings.activation, width=settings.width, seed=0)
    model: nn.Module = (SplitNorm(net) if method == "dajat" else net).to(settings.device).train()
    if half:
        model = Half(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    data = images(settings)
    views: list[Tensor] = [
        data.inputs[k * settings.batch : (k + 1) * settings.batch].to(settings.device).float() / 255 for k in range(3)
    ]
    y = data.targets[: settings.batch].to(settings.device)
    return timed(lambda i: STEPS[method](model, optimiser, tuple(views), y), settings)


def speeds(settings: Settings) -> dict[str, dict[str, float]]:
    """Per method: images per second of both, their ratio, and the floor."""
    table = {}
    for method in METHODS:
        eager = plain(method, settings)
        with fresh_compiler(settings.compile):
            mine, forward = ours(method, settings)
        table[method] = {
            "images_per_second": settings.batch / mine,
            "plain_images_per_second": settings.batch / eager,
            "ratio": eager / mine,
            "floor_images_per_second": settings.batch / (UNITS[method] * forward),
        }
        tell(method, table[method])
    return table


def activations(settings: Settings) -> dict[str, dict[str, float | None]]:
    """Per activation: milliseconds per standard step, memory, and both relative to SiLU."""
    table: dict[str, dict[str, float | None]] = {}
    data = images(settings)
    x = data.inputs[: settings.batch].to(settings.device).float() / 255
    y = data.targets[: settings.batch].to(settings.device)
    for name in ACTIVATIONS:
        model = networks.build(settings.network, activation=name, width=settings.width, seed=0).to(settings.device)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        peak = None
        if settings.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(settings.device)
        seconds = timed(lambda i, m=model, o=optimiser: STEPS["standard"](m, o, (x,), y), settings)  # type: ignore[misc]
        if settings.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(settings.device) / 1e9
        kept = saved_bytes(model, x, y, known=[x, *model.parameters()]) / 1e9
        table[name] = {"milliseconds": 1e3 * seconds, "peak_gb": peak, "kept_gb": kept}
        del model, optimiser
    for row in table.values():
        for key in ("milliseconds", "kept_gb", "peak_gb"):
            mine, reference = row[key], table["silu"][key]
            row[f"{key}_over_silu"] = None if mine is None or reference is None else mine / reference
    return table


def main(arguments: list[str] | None = None) -> None:
    """Time everything and store results/training-DEVICE.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--activation", default=Settings.activation)
    options = parser.parse_args(arguments)
    gpu = options.device.startswith("cuda")
    settings = Settings(
        device=options.device,
        width=64 if gpu else 4,
        batch=128 if gpu else 16,
        steps=options.steps or (30 if gpu else 3),
        warmup=10 if gpu else 1,
        compile=gpu if options.compile is None else options.compile,
        activation=options.activation,
    )
    results: dict[str, Any] = {"speeds": speeds(settings), "activations": activations(settings)}
    if gpu:
        results["card"] = {"name": torch.cuda.get_device_name(options.device)}
    store(f"training-{options.device.partition(':')[0]}", settings, results)


if __name__ == "__main__":
    main()
