"""Transformers, one batch: how much more a replicate of propagation says than Hutchinson in the same time.

    python -m benchmarks.transformers [NAME...] [--device DEVICE] [--full] [--out FOLDER] [--weights FOLDER]

vit128        a ViT of width 128 on digits (patches of 2 x 2, 16 tokens), 16 images
gpt64         a GPT of width 64 on characters, untied, 8 sequences of 64, its table of characters started as torch does
gpt64_small   gpt64 with the table and the positions started at 0.02, as GPT-2's: the first LayerNorm divides by that
gpt256        as gpt64, of width 256, trained on batches of 8 sequences rather than 32
gpt256_tied   the same with the table as its head, started at 0.02

The text is the source code of Python's standard library as the running interpreter has it; its hash stands with the
result.

Both methods measure one and the same trained net on one and the same batch, in float32 and in turns. Hutchinson's
block is that batch, its graph is kept. With V the variance of a replicate, summed over entries (estimated from
replicates, unbiased), t the median time of one and s that of the set-up,

    gain = V_h (t_h + s_h / 30) / (V_p (t_p + s_p / 30)),

for all entries together (`norm`) and tensor by tensor: their geometric mean, and the lowest by name. Tensors whose
diagonal is zero within rounding (a key's bias) are left out, and named. The plan without a name is the pilot's; the
others are that with one thing switched on or off at a time. The pilot's own time is told beside the gain and no part of
it: it is spent once, and the directions that it found need not be found again. A row is stored as soon as it is
measured; rows that are stored already are left out, and trained weights are kept in a folder for the next time.
Without a GPU everything is tiny, a rehearsal whose numbers say nothing, unless `--full` is given.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from benchmarks.common import RESULTS, digits, environment, median
from hessdiag.data import default_root
from hessdiag.errors import ConfigurationError, nearest
from hessdiag.graph import Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate, wait
from hessdiag.methods.base import Aim
from hessdiag.methods.hutchinson import probe
from hessdiag.methods.noise import Choice, choose
from hessdiag.methods.pilot import balance_products
from hessdiag.methods.propagation import EXACT_COLUMNS
from hessdiag.signs import Signs
from hessdiag.store.files import write_bytes

Row = dict[str, Any]
TURN = 4
"""Replicates that a method draws when its turn comes: what the one before left in the caches and of the memory counts
for the first of them alone, and the median is of all.
"""
ONCE = 30
"""Replicates over which the set-up is spread."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how large; `shrink` divides widths and steps."""

    device: str = "cpu"
    replicates: int = 16
    steps: int = 500
    heads: int = 4
    layers: int = 4
    tokens: int = 64
    shrink: int = 1


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Of [samples, tokens, width]."""
        n, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (one(h).view(n, t, self.heads, -1).transpose(1, 2) for one in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Patches of 2 x 2, the mean of the tokens."""

    def __init__(self, width: int, settings: Settings) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Block(width, settings.heads, causal=False) for _ in range(settings.layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Characters in, the next one out at every place."""

    def __init__(self, width: int, vocabulary: int, settings: Settings, spread: float, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, settings.tokens, width))
        self.blocks = nn.Sequential(*(Block(width, settings.heads, causal=True) for _ in range(settings.layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=spread)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every place."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Trained:
    """A net, the batch that is measured, and what is told of them."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    facts: Row


def text() -> tuple[Tensor, int, str]:
    """Characters of a few modules of the standard library as numbers, how many differ, and the hash of all."""
    folder = Path(ast.__file__).parent
    names = ("argparse", "ast", "difflib", "doctest", "inspect", "pdb", "tarfile", "turtle", "typing", "zipfile")
    files = [path for name in names for path in (folder / f"{name}.py", folder / name / "__init__.py")]
    raw = b"".join(path.read_bytes() for path in files if path.is_file())
    kept = bytes(b for b in raw if b == 10 or 32 <= b < 127)
    known = sorted(set(kept))
    table = torch.zeros(256, dtype=torch.long)
    table[torch.tensor(known)] = torch.arange(len(known))
    return (
        table[torch.frombuffer(bytearray(kept), dtype=torch.uint8).long()],
        len(known),
        hashlib.sha256(kept).hexdigest(),
    )


def trained(
    model: nn.Module, draw: Callable[[int], tuple[Tensor, Tensor]], settings: Settings, lr: float, kept: Path | None
) -> float:
    """AdamW with a warm-up, or as it was `kept`; returns the loss of the last steps."""
    if kept is not None and kept.is_file():
        content = torch.load(kept, weights_only=True, map_location=settings.device)
        model.load_state_dict(content["state"])
        model.eval()
        return float(content["loss"])
    steps = max(settings.steps // settings.shrink**2, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50)
        x, y = draw(step)
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    model.eval()
    last = losses[-max(steps // 20, 1) :]
    loss = sum(last) / len(last)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state": model.state_dict(), "loss": loss}, kept)
    return loss


def vit(width: int, settings: Settings, kept: Path | None) -> Trained:
    """Trained on batches of 64 digits."""
    torch.manual_seed(0)
    x, y = (part.to(settings.device) for part in digits(1297))
    model = ViT(width // settings.shrink, settings).to(settings.device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step)).to(x.device)
        return x[chosen], y[chosen]

    return Trained(model, x[:16], y[:16], {"data": "digits", "loss": trained(model, draw, settings, 1e-3, kept)})


def gpt(
    width: int, settings: Settings, kept: Path | None, *, spread: float = 1.0, tied: bool = False, sequences: int = 32
) -> Trained:
    """Trained on batches of so many places of the text."""
    torch.manual_seed(0)
    characters, vocabulary, mark = text()
    model = GPT(width // settings.shrink, vocabulary, settings, spread, tied).to(settings.device)

    def draw(step: int, count: int = sequences) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(characters) - settings.tokens, (count, 1), generator=generator)
        rows = characters[starts + torch.arange(settings.tokens + 1)].to(settings.device)
        return rows[:, :-1], rows[:, 1:]

    loss = trained(model, draw, settings, 1e-3, kept)
    facts = {"data": "Python's standard library", "sha256": mark, "characters": len(characters), "loss": loss}
    return Trained(model, *draw(1 << 20, 8), facts)


NETS: dict[str, Callable[[Settings, Path | None], Trained]] = {
    "vit128": lambda settings, kept: vit(128, settings, kept),
    "gpt64": lambda settings, kept: gpt(64, settings, kept),
    "gpt64_small": lambda settings, kept: gpt(64, settings, kept, spread=0.02),
    "gpt256": lambda settings, kept: gpt(256, settings, kept, sequences=8),
    "gpt256_tied": lambda settings, kept: gpt(256, settings, kept, sequences=8, spread=0.02, tied=True),
}
PLANS: dict[str, Row] = {
    "": {},
    "no balance": {"balance": False},
    "Gauss-Newton by passes of its own": {"merged": False},
    "no products at outputs": {"probes": False},
    "no directions of products": {"probe_rank": False},
    "no directions of signs": {"directions": 0},
    "with directions of signs": {"directions": 8},
    "no closed shares of norms and pairs": {"closed": False},
}


class Drawn:
    """Replicates of one method as rows, for their variance, and their times."""

    def __init__(self, make: Callable[[], Callable[[int], Tensors]], device: str) -> None:
        self.device = torch.device(device)
        begun = self._now()
        self._draw = make()
        self.setup = self._now() - begun
        self.seconds: list[float] = []
        self._sums: list[Tensors] = []

    def one(self, r: int) -> None:
        """One more; the first is thrown away as a warm-up."""
        begun = self._now()
        found = self._draw(r)
        if r:
            self.seconds.append(self._now() - begun)
            self._sums.append({name: t.double() for name, t in found.items()})

    def variance(self) -> dict[str, float]:
        """Of one replicate, summed over the entries of each tensor."""
        return {name: float(torch.stack([one[name] for one in self._sums]).var(0).sum()) for name in self._sums[0]}

    @property
    def price(self) -> float:
        """Seconds of a replicate with its share of the set-up."""
        return median(self.seconds).value + self.setup / ONCE

    def mean(self) -> Tensors:
        """Of all replicates."""
        return {name: sum(one[name] for one in self._sums) / len(self._sums) for name in self._sums[0]}  # type: ignore[misc]

    def _now(self) -> float:
        wait(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Pilot:
    """What a pilot chose, once for all plans."""

    balance: Mapping[int, float]
    choice: Choice
    seconds: float


def pilot(net: Trained) -> Pilot:
    """As a plan's pilot does it, on the batch."""
    begun = time.perf_counter()
    linear = Linearisation(hd.Objective(net.model), net.inputs, net.targets)
    balance = balance_products(linear, 0)
    linear.balance(balance)
    outer = linear.columns <= EXACT_COLUMNS
    aim = Aim(replicates=ONCE, open=True)
    choice = choose(linear, 0, samples=linear.samples, aim=aim, ordered=True, outer=outer)
    return Pilot(balance, choice, time.perf_counter() - begun)


def propagation(
    net: Trained,
    found: Pilot,
    *,
    balance: bool = True,
    merged: bool = True,
    probes: bool = True,
    probe_rank: bool = True,
    directions: int | None = None,
    closed: bool = True,
) -> Callable[[int], Tensors]:
    """Set up, and what draws one replicate."""
    objective, signs = hd.Objective(net.model), Signs(0, net.inputs.device)
    linear = Linearisation(objective, net.inputs, net.targets, closed=closed)
    if balance:
        linear.balance(balance_products(linear, 0))  # part of the set-up
    choice = found.choice
    propagator = Propagator(linear, probes=choice.probes if probes else {})
    columns = linear.columns <= EXACT_COLUMNS
    known = propagator.direct()
    if probes and probe_rank and choice.probe_rank:
        propagator.probes.find(signs, choice.probe_rank)
        accumulate(known, propagator.probes.along())
    apart: Tensors = {}
    accumulate(known, propagator.gauss_newton(apart) if columns else propagator.heads())
    accumulate(known, apart, -1.0)
    if count := choice.deflate if directions is None else directions:
        propagator.deflate(signs, count)
        accumulate(known, propagator.deflated())

    def draw(r: int) -> Tensors:
        drawn = propagator.functional(signs, r, outer=merged and not columns)
        if not (columns or merged):
            apart: Tensors = {}
            accumulate(drawn, propagator.gauss_newton_signed(signs, r, apart))
            accumulate(drawn, apart, -1.0)
        accumulate(drawn, known)
        return drawn

    return draw


def plans(found: Pilot, wanted: Collection[str], *, columns: bool) -> dict[str, Row]:
    """The pilot's and, of those `wanted`, all that differ from it."""
    same = {
        "Gauss-Newton by passes of its own": columns,
        "no products at outputs": not found.choice.probes,
        "no directions of products": not found.choice.probe_rank,
        "no directions of signs": not found.choice.deflate,
    }
    return {plan: options for plan, options in PLANS.items() if not plan or (plan in wanted and not same.get(plan))}


def hutchinson(net: Trained) -> Callable[[int], Tensors]:
    """The same of Hutchinson: the gradient's graph is kept."""
    objective, signs = hd.Objective(net.model), Signs(0, net.inputs.device)
    products = Products(objective, net.inputs, net.targets, parts=False)

    def draw(r: int) -> Tensors:
        v = probe(objective, signs, r)
        return {name: v[name] * hv for name, hv in products.hessian(v).items()}

    return draw


def measure(name: str, settings: Settings, kept: Path | None = None, wanted: Collection[str] = tuple(PLANS)) -> Row:
    """Train a net and measure it."""
    net = NETS[name](settings, kept)
    found_by_pilot = pilot(net)
    columns = net.targets.ndim == 1
    makers: dict[str, Callable[[], Callable[[int], Tensors]]] = {"hutchinson": lambda: hutchinson(net)}
    for plan, options in plans(found_by_pilot, wanted, columns=columns).items():
        makers[f"propagation {plan}".strip()] = lambda options=options: propagation(  # type: ignore[misc]
            net, found_by_pilot, **options
        )
    methods = {method: Drawn(make, settings.device) for method, make in makers.items()}
    for low in range(0, settings.replicates + 1, TURN):
        for drawn in methods.values():
            for r in range(low, min(low + TURN, settings.replicates + 1)):
                drawn.one(r)
    base = methods.pop("hutchinson")
    noise = base.variance()
    best = methods["propagation"].mean()
    size = {n: float(t.square().sum()) for n, t in best.items()}
    zero = [n for n, s in size.items() if s <= 1e-12 * sum(size.values())]
    norm = max(sum(size.values()) - sum(methods["propagation"].variance().values()) / settings.replicates, 0.0)
    row: Row = net.facts | {
        "parameters": sum(p.numel() for p in net.model.parameters()),
        "zero": zero,
        "load": os.getloadavg()[0],
        "pilot": {
            "products a replicate": dict(found_by_pilot.choice.probes),
            "directions": found_by_pilot.choice.probe_rank,
            "directions of signs": found_by_pilot.choice.deflate,
            "predicted gain": _finite(found_by_pilot.choice.hutchinson / found_by_pilot.choice.price),
            "seconds": found_by_pilot.seconds,
        },
        "hutchinson": {"seconds": median(base.seconds).value, "setup": base.setup},
        "plans": {},
    }
    for method, drawn in methods.items():
        found = drawn.variance()
        ratio = base.price / drawn.price
        gains = {n: noise[n] / found[n] * ratio for n in found if n not in zero and found[n] > 0}
        exact = [n for n in found if n not in zero and not found[n] > 0]
        lowest = min(gains, key=lambda n: gains[n])
        row["plans"][method] = {
            "norm": sum(noise.values()) / sum(found.values()) * ratio,
            "tensors": math.exp(sum(math.log(g) for g in gains.values()) / len(gains)),
            "lowest": {lowest: gains[lowest]},
            "without noise": exact,
            "most of the noise": dict(sorted(found.items(), key=lambda item: -item[1])[:4]),
            "relative error": math.sqrt(sum(found.values()) / norm) if norm else None,
            "seconds": median(drawn.seconds).value,
            "setup": drawn.setup,
            "products": median(drawn.seconds).value / median(base.seconds).value,
        }
    return row


def _finite(value: float) -> float | None:
    """None where the pilot did not ask."""
    return value if math.isfinite(value) else None


def sized(device: str, *, full: bool) -> Settings:
    """Full size on a GPU or if asked for, else tiny."""
    return (
        Settings(device) if full or device.startswith("cuda") else Settings(device, replicates=2, layers=1, shrink=16)
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure the nets that are named, all without a name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--plans", nargs="*", metavar="plan", help="which to switch off or on (default: all)")
    parser.add_argument("--weights", type=Path, default=default_root() / "transformers", help="folder of trained nets")
    parser.add_argument("--full", action="store_true", help="full size without a GPU, too")
    options = parser.parse_args(arguments)
    settings = sized(options.device, full=options.full)
    kind = "tiny" if settings.shrink > 1 else settings.device.partition(":")[0]
    path = options.out / f"transformers-{kind}.json"
    rows: dict[str, Row] = {}
    for place in (RESULTS / path.name, path):
        if place.is_file():
            content = json.loads(place.read_text(encoding="utf-8"))
            rows = content["results"] if content["settings"] == asdict(settings) else rows
    for name in options.names or NETS:
        if name not in NETS:
            raise ConfigurationError(f"no net {name!r}; {nearest(name, list(NETS))}")
        if name in rows:
            continue
        kept = None if settings.shrink > 1 else options.weights / f"{name}.pt"
        rows[name] = measure(name, settings, kept, PLANS if options.plans is None else options.plans)
        options.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "settings": asdict(settings), "results": rows}
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
        print(f"{name}: {json.dumps(rows[name], indent=1)}", flush=True)


if __name__ == "__main__":
    main()
