"""Exact diagonals against their peers: `python -m benchmarks.exact`.

MLPs on 64 samples in float32 against BackPACK's DiagHessian (`pip install backpack-for-pytorch unfoldNd`): the call
that a user makes, `hessdiag.diagonal(objective, batches, method="exact")`, with all its checks; beside it the call with
its checks off, the kernel alone (a forward pass, linearisation and both parts), and what each part of the call takes,
backward passes counted. And the kernel on the residual conv net with 64 digits, which BackPACK refuses, against batched
Hessian-vector products with unit vectors (the gradient's graph built once, 16 vectors at a time by one vectorised
double backward). The two sides take turns in one run; ratios are medians over the turns with an interval of order
statistics, of wall time and of processor time (which other work on the machine disturbs less). Peak memory is how far
one evaluation raises the peak resident set of a process of its own (Linux: VmHWM, set back just before) that has
evaluated a tiny net. Ours returns two parts, Gauss-Newton and functional; its peers the total alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import exact_sides
from benchmarks.common import Median, digits, median, small_resnet, store, tell
from benchmarks.exact_sides import CURVES, WIDTHS, backpack, deviation, mlp, ours, problem, products, public
from hessdiag import Objective
from hessdiag.graph import Linearisation, route, tangents
from hessdiag.graph.layers import conv
from hessdiag.kernels import directions
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.tensors import hold_freed_memory
from hessdiag.measuring import audit, comparisons, entry
from hessdiag.methods import batches
from hessdiag.methods import exact as methods_exact

PASSES = "backward passes"


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


def floor_seconds(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Time of the same convolutions alone, on random tensors: no method that makes these passes is faster."""
    batch = Linearisation(Objective(model), x, y)
    calls: list[tuple[Any, ...]] = []
    honest = conv.convolved

    def recorded(images: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Tensor:
        calls.append((images.shape, weight.shape, options))
        return honest(images, weight, options)

    with patched({conv: {"convolved": recorded}}):
        exact.batch_diagonal(batch)
    total = 0.0
    tensors: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad():
        for image, weight, options in calls:
            a = tensors.setdefault(tuple(image), torch.randn(image))
            w = tensors.setdefault(tuple(weight), torch.randn(weight))
            start = time.perf_counter()
            honest(a, w, options)
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


@contextmanager
def patched(changes: Mapping[Any, Mapping[str, Any]]) -> Iterator[None]:
    """Attributes of modules and classes replaced, and put back."""
    before = [(home, name, home.__dict__[name]) for home, names in changes.items() for name in names]
    try:
        for home, names in changes.items():
            for name, value in names.items():
                setattr(home, name, value)
        yield
    finally:
        for home, name, value in before:
            setattr(home, name, value)


PARTS = {
    "the batch linearised": (entry, "Linearisation"),
    "second pass": (batches, "_in_two"),
    "twin": (audit, "_twin"),
    "twin linearised": (audit, "Linearisation"),
    "its gradient": (audit, "Products"),
    "its products J u": (comparisons, "Forward"),
    "identity": (comparisons, "identity"),
    "squares": (comparisons, "squares"),
    "entries": (comparisons, "entries"),
    "derivatives": (comparisons, "quotients"),
    "the diagonal": (methods_exact.exact, "batch_diagonal"),
}
"""What a public call does, by the functions that do it: all but the first and the last are checks. "entries" takes the
diagonal of the twin besides."""
CONV_PARTS = {
    "linearised": (exact_sides, "Linearisation"),
    "samples told apart": (exact, "check_separate"),
    "Gauss-Newton part": (exact, "_gauss_newton"),
    "directions moved": (exact, "_move"),
    "of these convolutions": (conv, "convolved"),
    "squares at sites": (directions.Directions, "weighted_squares"),
    "slopes": (tangents.Tangent, "settled"),
    "sums": (route, "added"),
}
"""The same of the kernel on a conv net; what a moved direction takes beyond the last four is bookkeeping."""


def part_seconds(run: Callable[[], Any], parts: Mapping[str, tuple[Any, str]], rounds: int) -> dict[str, float]:
    """Processor time that each part takes of a call, and how many backward passes it makes: medians over rounds."""
    spent: dict[str, list[float]] = {name: [] for name in (*parts, PASSES)}

    def timed(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            start = time.process_time()
            found = honest(*given, **options)
            found = list(found) if isinstance(found, Iterator) else found
            spent[name][-1] += time.process_time() - start
            return found

        return call

    def counted(*given: Any, **options: Any) -> Any:
        spent[PASSES][-1] += 1
        return honest_grad(*given, **options)

    honest_grad = torch.autograd.grad
    changes: dict[Any, dict[str, Any]] = {torch.autograd: {"grad": counted}}
    for name, (home, function) in parts.items():
        changes.setdefault(home, {})[function] = timed(name, getattr(home, function))
    with patched(changes):
        for _ in range(rounds):
            for row in spent.values():
                row.append(0.0)
            run()
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
            parts = part_seconds(mine, PARTS, settings.rounds)
            memory = [peak_megabytes(method, net, curve, settings) for method in ("public", "backpack")]
            found = {
                "turns": turns,
                "kernel": bare.first,
                "unchecked": bare,
                "parts": parts,
                "megabytes": memory,
                "deviation": error,
            }
            tell(f"{net} {curve}", found)
            yield f"{net} {curve}", found


def run_conv(settings: Settings) -> dict[str, Any]:
    """The residual conv net against batched products, both with freed memory held as a call holds it."""
    hold_freed_memory()
    model = small_resnet("silu", steps=50, seed=0)
    x, y = digits(settings.samples)
    size = sum(p.numel() for p in model.parameters())
    mine, theirs = ours(model, x, y), products(model, x, y)
    diagonal = mine()
    turns = take_turns(mine, theirs, settings.conv_rounds)
    error = deviation(diagonal, theirs())
    floor = median([floor_seconds(model, x, y) for _ in range(5)]).value
    forward = forward_seconds(model, x)
    parts = part_seconds(mine, CONV_PARTS, settings.conv_rounds)
    found = {
        "parameters": size, "turns": turns, "deviation": error, "floor": floor, "forward": forward, "parts": parts
    }  # fmt: skip
    tell("residual conv net", found)
    return found


def main() -> None:
    """Run, print the table, write results/exact.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--conv-rounds", type=int, default=7)
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
