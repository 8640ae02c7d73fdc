"""Exact diagonals against their peers: `python -m benchmarks.exact`.

MLPs on 64 samples in float32 against BackPACK's DiagHessian (`pip install backpack-for-pytorch unfoldNd`): the call
that a user makes, `hessdiag.diagonal(objective, batches, method="exact")`, with all its checks; beside it the call with
its checks off, the kernel alone (a forward pass, linearisation and both parts), and what each check costs. And the
residual conv net on 64 digits, which BackPACK refuses, against batched Hessian-vector products with unit vectors (the
gradient's graph built once, 16 vectors at a time by one vectorised double backward). The two sides take turns in one
run; ratios are medians over the turns with an interval of order statistics, of wall time and of processor time (which
other work on the machine disturbs less). Peak memory is how far one evaluation raises the peak resident set of a
process of its own (Linux: VmHWM, set back just before) that has evaluated a tiny net. Ours returns two parts,
Gauss-Newton and functional; its peers the total alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Median, digits, median, small_resnet, store, tell
from benchmarks.exact_sides import CURVES, WIDTHS, backpack, deviation, mlp, ours, problem, products, public
from hessdiag import Objective
from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact


@dataclass(frozen=True)
class Settings:
    """What was run."""

    rounds: int
    conv_rounds: int
    samples: int
    threads: int


@dataclass(frozen=True)
class Comparison:
    """Seconds of either side, and how many times faster the first is by the wall and by the processor's clock."""

    first: Median
    second: Median
    wall: Median
    processor: Median


def take_turns(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> Comparison:
    """Interleaved rounds of two evaluations."""
    clocks = (time.perf_counter, time.process_time)
    times: list[list[list[float]]] = [[[], []], [[], []]]
    for _ in range(rounds):
        for side, run in enumerate((first, second)):
            starts = [clock() for clock in clocks]
            run()
            for into, clock, start in zip(times[side], clocks, starts):
                into.append(clock() - start)
    wall, processor = ([b / a for a, b in zip(times[0][clock], times[1][clock])] for clock in (0, 1))
    return Comparison(median(times[0][0]), median(times[1][0]), median(wall), median(processor))


def peak_megabytes(method: str, net: str, curve: str, settings: Settings) -> float:
    """Rise of the peak resident set by one evaluation, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.exact", "--memory", method, net, curve]
    command += ["--samples", str(settings.samples), "--threads", str(settings.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _measure_memory(method: str, net: str, curve: str, samples: int) -> None:
    make = {"public": public, "backpack": backpack}[method]
    tiny = (WIDTHS[net][0], 16, 16, 10)
    make(mlp(tiny, curve), *problem(tiny, 2))()
    run = make(mlp(WIDTHS[net], curve), *problem(WIDTHS[net], samples))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _status("VmRSS")
    run()
    print((_status("VmHWM") - before) / 1024)


def _status(entry: str) -> float:
    """Kilobytes, from the kernel's own account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(entry + ":")))


class Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the arguments of every convolution that runs under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; note it if it is a convolution."""
        if func is torch.ops.aten.convolution.default:
            self.calls.append((args[0].shape, args[1].shape, *args[3:]))
        return func(*args, **(kwargs or {}))


def floor_seconds(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Time of the same convolutions alone, on random tensors: no method that makes these passes is faster."""
    batch = Linearisation(Objective(model), x, y)
    with Convolutions() as record:
        exact.batch_diagonal(batch)
    total = 0.0
    tensors: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad():
        for image, weight, *rest in record.calls:
            a = tensors.setdefault(tuple(image), torch.randn(image))
            w = tensors.setdefault(tuple(weight), torch.randn(weight))
            start = time.perf_counter()
            torch.convolution(a, w, None, *rest)
            total += time.perf_counter() - start
    return total


def forward_seconds(model: nn.Module, x: Tensor, count: int = 20) -> float:
    """One plain forward pass of the batch."""
    times = []
    with torch.no_grad():
        for _ in range(count):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return median(times).value


CHECKS = {
    "second pass": ("hessdiag.methods.batches", "_in_two"),
    "twin": ("hessdiag.measuring.audit", "_twin"),
    "identity": ("hessdiag.measuring.comparisons", "identity"),
    "squares": ("hessdiag.measuring.comparisons", "squares"),
    "entries": ("hessdiag.measuring.comparisons", "entries"),
    "derivatives": ("hessdiag.measuring.comparisons", "quotients"),
}
"""What the checks of a public call do, by the functions that do it."""


def check_seconds(run: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Processor time that each check takes of a call: medians over rounds."""
    spent: dict[str, list[float]] = {name: [] for name in CHECKS}
    homes = {name: (import_module(module), function) for name, (module, function) in CHECKS.items()}
    honest = {name: getattr(*home) for name, home in homes.items()}

    def timed(name: str) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            start = time.process_time()
            found = honest[name](*given, **options)
            found = list(found) if isinstance(found, Iterator) else found
            spent[name][-1] += time.process_time() - start
            return found

        return call

    try:
        for name, (module, function) in homes.items():
            setattr(module, function, timed(name))
        for _ in range(rounds):
            for row in spent.values():
                row.append(0.0)
            run()
    finally:
        for name, (module, function) in homes.items():
            setattr(module, function, honest[name])
    return {name: median(row).value for name, row in spent.items()}


def run_mlps(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every MLP against BackPACK, as they come."""
    for net, widths in WIDTHS.items():
        for curve in CURVES:
            torch.manual_seed(0)
            model = mlp(widths, curve)
            twin = mlp(widths, curve)
            twin.load_state_dict(model.state_dict())
            x, y = problem(widths, settings.samples)
            mine, theirs = public(model, x, y), backpack(twin, x, y)
            error = deviation({name: value * len(y) for name, value in mine().items()}, theirs())
            turns = take_turns(mine, theirs, settings.rounds)
            bare = take_turns(ours(model, x, y), public(model, x, y, checked=False), settings.rounds)
            checks = check_seconds(mine, settings.rounds)
            memory = [peak_megabytes(method, net, curve, settings) for method in ("public", "backpack")]
            found = {
                "turns": turns,
                "kernel": bare.first,
                "unchecked": bare,
                "checks": checks,
                "megabytes": memory,
                "deviation": error,
            }
            tell(f"{net} {curve}", found)
            yield f"{net} {curve}", found


def run_conv(settings: Settings) -> dict[str, Any]:
    """The residual conv net against batched products."""
    model = small_resnet("silu", steps=50, seed=0)
    x, y = digits(settings.samples)
    size = sum(p.numel() for p in model.parameters())
    mine, theirs = ours(model, x, y), products(model, x, y)
    diagonal = mine()
    turns = take_turns(mine, theirs, settings.conv_rounds)
    error = deviation(diagonal, theirs())
    floor = median([floor_seconds(model, x, y) for _ in range(5)]).value
    forward = forward_seconds(model, x)
    found = {"parameters": size, "turns": turns, "deviation": error, "floor": floor, "forward": forward}
    tell("residual conv net", found)
    return found


def main() -> None:
    """Run, print the table, write results/exact.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--conv-rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--only", choices=("mlp", "conv"), help="one half, without writing results")
    parser.add_argument("--memory", nargs=3, metavar=("METHOD", "NET", "CURVE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory:
        method, net, curve = options.memory
        _measure_memory(method, net, curve, options.samples)
        return
    settings = Settings(options.rounds, options.conv_rounds, options.samples, torch.get_num_threads())
    results: dict[str, Any] = {"mlp": {}}
    if options.only != "mlp":
        results["conv"] = run_conv(settings)
    for name, row in () if options.only == "conv" else run_mlps(settings):
        results["mlp"][name] = row
        if options.only is None:
            store("exact", settings, plain(results))


def plain(value: Any) -> Any:
    """Dataclasses as plain values, for JSON."""
    if isinstance(value, (Median, Comparison)):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
