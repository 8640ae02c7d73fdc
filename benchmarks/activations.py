"""RCT-AF beside nn.SiLU: forward and first backward, eager, on one thread.

All functions take turns on the same tensor; a ratio is the median over the turns of RCT-AF's processor time over
nn.SiLU's in the same turn. They run in a fresh process whose allocator keeps freed memory: fresh pages would cost both
sides alike and hide the difference. What the time goes to is told by torch's profiler, apart from the timed turns:
kernels with a transcendental function, light passes over memory (sums, products, conversions), and the rest, calls.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import median, store
from hessdiag.activations import RCTAF

CALLS = {"as_strided", "detach", "empty", "empty_like", "empty_strided", "select", "slice", "split", "unbind"}
TRANSCENDENTAL = {"exp", "log", "sigmoid", "silu", "silu_backward", "softplus_backward"}
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "1073741824"}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    entries: int = 2_100_000
    alpha: float = 14.0
    repeats: int = 60
    profiled: int = 10
    threads: int = 1
    float32_targets: tuple[float, ...] = (2.0, 1.6, 3.0)  # of beta = 0, 1, 2
    bfloat16_targets: tuple[float, ...] = (2.0, 1.5, 3.0)


SETTINGS = Settings()


def turn(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of forward and of first backward."""
    begun = clock()
    y = function(x)
    between = clock()
    torch.autograd.grad(y, x, g)
    return between - begun, clock() - between


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of what autograd keeps for backward."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(sizes)


def parts(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, repeats: int) -> dict[str, float]:
    """Shares of the processor time: transcendental kernels, light passes, calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            turn(function, x, g, time.process_time)
    shares = {"transcendental": 0.0, "light": 0.0, "calls": 0.0}
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::").removesuffix("_")
        kernel = event.key.startswith("aten::") and name not in CALLS
        kind = "transcendental" if name in TRANSCENDENTAL else "light" if kernel else "calls"
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: share / total for kind, share in shares.items()}


def compare(dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    """Times, ratios and bytes of beta = 0, 1, 2 beside nn.SiLU, in this process."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(settings.entries, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    functions: dict[str, nn.Module] = {"SiLU": nn.SiLU()}
    functions |= {f"beta = {beta}": RCTAF(settings.alpha, beta) for beta in range(3)}
    clock = time.process_time if settings.threads == 1 else time.perf_counter  # processor time adds up over threads
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for function in functions.values():
        turn(function, x, g, clock)
    for _ in range(settings.repeats):
        for name, function in functions.items():
            found[name].append(turn(function, x, g, clock))
    base, saved = found["SiLU"], saved_bytes(functions["SiLU"], x)
    return {
        name: {
            "forward": median([f for f, _ in times]).value,
            "backward": median([b for _, b in times]).value,
            "ratio": asdict(median([sum(ours) / sum(theirs) for ours, theirs in zip(times, base)])),
            "ratio_of_fastest": min(map(sum, times)) / min(map(sum, base)),
            "saved": saved_bytes(functions[name], x) / saved,
            "parts": parts(functions[name], x, g, settings.profiled),
        }
        for name, times in found.items()
    }


def in_fresh_process(settings: Settings) -> dict[str, Any]:
    """`compare` of both types in a process of its own."""
    flags = [f"--{key}={getattr(settings, key)}" for key in ("entries", "repeats", "threads")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.activations", "--here", *flags],
        env={**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": str(settings.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Measure, print and store; with --here measure in this process and print the results alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON, store nothing")
    for key in ("entries", "repeats", "threads"):
        parser.add_argument(f"--{key}", type=int, default=getattr(SETTINGS, key))
    given = parser.parse_args()
    settings = Settings(entries=given.entries, repeats=given.repeats, threads=given.threads)
    torch.set_num_threads(settings.threads)
    if given.here:
        types = (torch.float32, torch.bfloat16)
        print(json.dumps({str(t).removeprefix("torch."): compare(t, settings) for t in types}))
        return
    found = in_fresh_process(settings)
    store("activations" if settings.threads == 1 else f"activations-{settings.threads}threads", settings, found)


if __name__ == "__main__":
    main()
