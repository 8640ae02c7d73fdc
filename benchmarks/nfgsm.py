"""Images per second of N-FGSM training on one thread of a CPU: `python -m benchmarks nfgsm`.

The net is ResNet-18 of width 16 with stem stride 2 on 32x32 images, batch 128; a step is the trainer's own, from bytes
to moved weights: crop and flip, noise, one gradient by the images, one by the weights, SGD. Timed, in turns, by
processor time, in each precision and layout that a CPU might want:

- RCT-AF of beta 1 and nn.SiLU: what the activation costs;
- the code before: plain floats, contiguous, with beta 1 in closed form as one autograd node, on the same net with
  stride 1 in the stem and 16x16 images;
- products of square matrices: the ceiling. The share of it counts the products of convolutions and of the linear
  layer, nothing else: two forward passes, one backward pass by the images, one by images and weights (two forward
  passes' worth, without the stem's gradient by the images);
- by torch's profiler, apart from the timed turns: the convolutions' share of a step, and what the step would gain
  over the code before if all else were free.

What `autocast = channels_last = "auto"` chooses on this machine is told beside. Images are random bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Median, median, store
from experiments.config import TrainConfig
from experiments.schedules import attack_budget
from experiments.trainer.choosing import choose
from experiments.trainer.images import Images, Sampler, on_device
from experiments.trainer.memory import keep_freed_memory
from experiments.trainer.rig import build, build_network
from experiments.trainer.step import Stepper, Tally
from hessdiag.data.dataset import make

RCT = "rct:beta=1,curvature=7"
ALPHA = 14.0
LAYOUTS = {
    "float, contiguous": {"autocast": "none", "channels_last": False},
    "float, channels_last": {"autocast": "none", "channels_last": True},
    "bfloat16, channels_last": {"autocast": "bfloat16", "channels_last": True},
}
BEFORE = "before: float, contiguous, 16x16"
DEVICE = torch.device("cpu")
S = TypeVar("S", bound=Any)


@dataclass(frozen=True)
class Settings:
    """What was timed."""

    rounds: int = 9
    steps: int = 2
    batch: int = 128
    width: int = 16
    matrix: int = 1024
    profiled: int = 4
    of_silu_target: float = 0.85
    times_before_target: float = 1.8


class ClosedForm(torch.autograd.Function):
    """silu(alpha x)/alpha by whole-tensor operations, its slope s + t s(1-s) recomputed from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The product of x and s(alpha x)."""
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x * ALPHA)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient times the slope."""
        (x,) = ctx.saved_tensors
        t = x * ALPHA
        s, other = torch.sigmoid(t), torch.sigmoid(-t)
        slope = s + s * other * t.clamp(-128.0, 128.0)
        return gradients[0] * slope


class Plain(nn.Module):
    """The activation as it was."""

    def forward(self, x: Tensor) -> Tensor:
        """By `ClosedForm`."""
        result: Tensor = ClosedForm.apply(x)  # type: ignore[no-untyped-call]
        return result


def configuration(settings: Settings, activation: str, stem: int, **more: Any) -> TrainConfig:
    """The campaign's net and method."""
    table = {
        "method": "n_fgsm",
        "network": "resnet18",
        "network_options": {"width": settings.width, "stem_stride": stem},
        "activation": activation,
        "epochs": 12,
        "batch_size": settings.batch,
        "augment": {"crop": 4, "flip": True},
        **more,
    }
    return TrainConfig.from_dict(table)


def pool_of(config: TrainConfig, size: int) -> Images:
    """Eight batches of random bytes."""
    g = torch.Generator().manual_seed(0)
    count = 8 * config.batch_size
    x = torch.randint(256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    y = torch.randint(10, (count,), generator=g)
    return on_device(make(x, y, name="noise", split="train", num_classes=10), config, DEVICE)


def stepper_of(config: TrainConfig, size: int, *, plain: bool = False) -> Callable[[int], None]:
    """The trainer's step, as a function of its number; `plain` puts the former activation in the place of SiLU."""
    pool, rig = pool_of(config, size), build(config, (3, size, size), 10, DEVICE)
    if plain:
        for module in list(rig.network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.SiLU):
                    setattr(module, name, Plain())
    sampler = Sampler(pool, config, torch.arange(len(pool)), views=0)
    stepper, tally, order = Stepper(rig), Tally(DEVICE), sampler.order(1)
    budget = attack_budget(config.attack, eps=config.radius, epoch=1, epochs=config.epochs)
    rig.model.train()

    def step(i: int) -> None:
        views, y = sampler.batch(order, 1, i % sampler.steps)
        stepper(views, y, epoch=1, step=i, lr=0.01, budget=budget, tally=tally)

    return step


def convolutions(step: Callable[[int], None], settings: Settings) -> float:
    """Their share of the processor time of steps."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for i in range(settings.profiled):
            step(i)
    events = profiler.key_averages()
    own = sum(event.self_cpu_time_total for event in events if "convolution" in event.key)
    return float(own / sum(event.self_cpu_time_total for event in events))


def products(settings: Settings, dtype: torch.dtype) -> Callable[[int], None]:
    """The product of two square matrices."""
    a, b = (torch.randn(settings.matrix, settings.matrix).to(dtype) for _ in range(2))
    return lambda i: (a @ b, None)[1]


def flop(settings: Settings) -> float:
    """Operations of a step's products: five forward passes less one of the stem."""
    config = configuration(settings, "silu", 2)
    model = build_network(config, (3, 32, 32), 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(settings.batch, 3, 32, 32))
    counts = counter.get_flop_counts()
    whole, stem = (sum(counts[name].values()) for name in ("Global", "ResNet18.conv1"))
    return float(5 * whole - stem)


def in_turns(rows: dict[str, Callable[[int], None]], settings: Settings) -> dict[str, list[float]]:
    """Processor seconds per call, round by round, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(settings.rounds + 1):
        for name, call in rows.items():
            begin = time.process_time()
            for i in range(settings.steps):
                call(i)
            if turn:
                seconds[name].append((time.process_time() - begin) / settings.steps)
    return seconds


def ratio(above: list[float], below: list[float]) -> Median:
    """The median over rounds of above / below."""
    return median([a / b for a, b in zip(above, below)])


def begun(settings: S, name: str, about: str | None, arguments: list[str] | None) -> S:
    """The settings of a benchmark of training steps with its rounds as asked for; one thread, and memory held."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--rounds", type=int, default=settings.rounds)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the commands that train do
    found: S = replace(settings, rounds=parser.parse_args(arguments).rounds)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Time everything and store results/nfgsm.json."""
    settings = begun(Settings(), "nfgsm", __doc__, arguments)
    rows: dict[str, Callable[[int], None]] = {}
    for layout, options in LAYOUTS.items():
        for activation in (RCT, "silu"):
            rows[f"{activation}, {layout}"] = stepper_of(configuration(settings, activation, 2, **options), 32)
    rows[BEFORE] = stepper_of(configuration(settings, "silu", 1), 16, plain=True)
    for name in ("float32", "bfloat16"):
        rows[f"product, {name}"] = products(settings, getattr(torch, name))
    work = flop(settings)
    seconds = in_turns(rows, settings)
    auto = configuration(settings, RCT, 2, autocast="auto", channels_last="auto")
    pool = pool_of(auto, 32)
    chosen = choose(auto, pool, Sampler(pool, auto, torch.arange(len(pool)), views=0))

    results: dict[str, Any] = {"gflop_per_step": work / 1e9, "auto": chosen.name, "rows": {}, "ceiling": {}}
    for name in ("float32", "bfloat16"):
        results["ceiling"][name] = 2 * settings.matrix**3 / median(seconds[f"product, {name}"]).value / 1e9
    before = median(seconds[BEFORE]).value
    results["before_images_per_second"] = settings.batch / before
    for layout, options in LAYOUTS.items():
        mine, silu = (seconds[f"{activation}, {layout}"] for activation in (RCT, "silu"))
        share = convolutions(rows[f"{RCT}, {layout}"], settings)
        kind = "bfloat16" if options["autocast"] == "bfloat16" else "float32"
        results["rows"][layout] = {
            "images_per_second": settings.batch / median(mine).value,
            "silu_images_per_second": settings.batch / median(silu).value,
            "of_silu": vars(ratio(silu, mine)),
            "times_before": vars(ratio(seconds[BEFORE], mine)),
            "silu_times_before": vars(ratio(seconds[BEFORE], silu)),
            "share_of_convolutions": share,
            "times_before_if_all_else_were_free": before / (median(mine).value * share),
            "share_of_ceiling": work / median(mine).value / 1e9 / results["ceiling"][kind],
        }
    store("nfgsm", settings, results)


if __name__ == "__main__":
    main()
