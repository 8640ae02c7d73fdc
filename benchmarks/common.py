"""What every benchmark shares: where results go, what machine they come from, intervals of a median, a trained net."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import hessdiag
from hessdiag import networks
from hessdiag.data import load
from hessdiag.store.files import write_bytes

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Median:
    """A median (or another summary, as its maker says) and its interval."""

    value: float
    low: float
    high: float
    coverage: float
    """Probability that the interval holds the true value."""

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def median(values: Sequence[float], *, confidence: float = 0.95) -> Median:
    """The median, and the narrowest symmetric pair of order statistics that covers it with `confidence`, or all."""
    ordered = sorted(values)
    n = len(ordered)
    cut = 0
    while cut + 1 < (n + 1) // 2 and 1.0 - 2.0 * float(stats.binom.cdf(cut + 1, n, 0.5)) >= confidence:
        cut += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2.0
    return Median(middle, ordered[cut], ordered[n - 1 - cut], 1.0 - 2.0 * float(stats.binom.cdf(cut, n, 0.5)))


def ratio_of_means(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Median:
    """mean(a) / mean(b) of paired values, with the percentile interval of 10,000 seeded bootstrap draws of pairs."""
    x, y = np.asarray(a), np.asarray(b)
    chosen = np.random.default_rng(0).integers(len(x), size=(10_000, len(x)))
    drawn = x[chosen].sum(1) / y[chosen].sum(1)
    low, high = np.quantile(drawn, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return Median(float(x.sum() / y.sum()), float(low), float(high), confidence)


def binomial_interval(hits: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a probability."""
    tail = (1.0 - confidence) / 2.0
    low = float(stats.beta.ppf(tail, hits, count - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1.0 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return low, high


def environment() -> dict[str, Any]:
    """Versions, machine and threads of this run."""
    return {
        "hessdiag": hessdiag.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def spread(m: Mapping[str, float], *, digits: int = 3) -> str:
    """A stored median with its interval."""
    return f"{m['value']:.{digits}g} [{m['low']:.{digits}g}, {m['high']:.{digits}g}]"


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Whatever is stored, as one row of text: nested keys joined, medians with their intervals."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict) and {"value", "low", "high"} <= set(value):
        return {prefix: spread(value)}
    if isinstance(value, dict):
        pairs = [(f"{prefix} {key}".strip(), item) for key, item in value.items()]
        return {k: text for key, item in pairs for k, text in flat(item, key).items()}
    if isinstance(value, (list, tuple)):
        return {prefix: ", ".join(t for item in value for t in flat(item, prefix).values())}
    if isinstance(value, float):
        return {prefix: f"{value:.4g}"}
    return {} if value is None else {prefix: str(value)}


def tell(name: str, row: Any) -> None:
    """Print one row as it comes; what is stored is printed as a table in the end."""
    print(f"{name}: " + ", ".join(f"{key} {text}".strip() for key, text in flat(row).items()), flush=True)


def store(name: str, settings: Any, results: Mapping[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write FOLDER/NAME.json as a whole (environment, settings, a dataclass, results), and print its table."""
    from benchmarks.tables import table

    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "settings": asdict(settings), "results": results}
    path = folder / f"{name}.json"
    text = json.dumps(content, indent=1)
    write_bytes(path, (text + "\n").encode())
    print(f"{table(name, json.loads(text))}\n{path}", flush=True)
    return path


def digits(samples: int, *, seed: int = 0, split: str = "train") -> tuple[Tensor, Tensor]:
    """So many digits (float32 in [0, 1], [N, 1, 8, 8]) and their classes."""
    data = load("digits", split=split, samples=samples, seed=seed)
    return next(iter(data.batches(samples)))


def train(model: nn.Module, inputs: Tensor, targets: Tensor, *, steps: int, batch: int, lr: float, seed: int) -> float:
    """`steps` of SGD with momentum 0.9; leaves the model in eval mode and returns its mean loss there."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (batch,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(inputs), targets))


def small_resnet(activation: str, *, steps: int, seed: int, **options: Any) -> nn.Module:
    """The residual conv net on 8x8 digits, trained for `steps` (0: freshly initialised), in eval mode."""
    model = networks.build("small_resnet", activation=activation, seed=seed, **options)
    inputs, targets = digits(1297)
    train(model, inputs, targets, steps=steps, batch=64, lr=0.1, seed=seed)
    return model
