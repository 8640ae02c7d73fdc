"""A GPT of GPT-2's smallest size, tied: one replicate of propagation beside a gradient and a Hessian-vector product.

12 layers of width 768 with 12 heads, 1,024 tokens, a vocabulary of 50,257 filled up to 50,304, GELU, LayerNorm with
bias, no dropout; weights random as GPT-2's are before training. Tokens are random: no time or memory depends on them.
Everything is float32, with no TF32 anywhere.

A replicate is drawn by a fixed plan: every layer by signs, both parts in the same passes, the head's own share closed.
A pilot would leave the table and the positions of such a net to products of the Hessian at their outputs, some tens a
replicate and more to find directions: each of those costs about what the product beside it costs here.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from benchmarks.common import median
from hessdiag.errors import ran_out
from hessdiag.graph import Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate, wait, zeros
from hessdiag.methods.hutchinson import probe
from hessdiag.problem.full_float32 import full_float32
from hessdiag.signs import Signs

Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """How large the net and its batch are."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50304
    tokens: int = 1024
    sequences: int = 4
    repeats: int = 5
    limit: float = 8.0
    """Seconds after which nothing of a row is repeated once more."""


TINY = Shape(layers=2, heads=2, width=16, vocabulary=64, tokens=16, sequences=4, repeats=2)


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of [sequences, tokens, width]."""
        n, t, d = x.shape
        parts = self.joint(self.norm1(x)).split(d, 2)
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Tokens in, scores of the next one at every place out; the head is the table of tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.table.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for last in (block.out, block.narrow):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * shape.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """[sequences, tokens, vocabulary]."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.table(tokens) + self.places(places))))  # type: ignore[no-any-return]


class Bench:
    """The net on one device, and clocks."""

    def __init__(self, device: str, shape: Shape) -> None:
        self.device, self.shape = torch.device(device), shape
        self.clear()  # what ran out of memory before may still be held
        torch.manual_seed(0)
        with self.device:
            self.model = GPT(shape).eval()
        text = torch.randint(
            shape.vocabulary, (shape.sequences, shape.tokens + 1), generator=torch.Generator().manual_seed(0)
        )
        text = text.to(self.device)
        self.batch: Batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.objective = hd.Objective(self.model)
        self.signs = Signs(0, self.device)

    def blocks(self, size: int) -> list[Batch]:
        """The batch, so many sequences at a time."""
        return list(zip(*(part.split(size) for part in self.batch)))

    def now(self) -> float:
        """The time, once the device has done what it was told."""
        wait(self.device)
        return time.perf_counter()

    def turns(self, count: int) -> Iterator[int]:
        """So many, or fewer where the time of a row is over: two at least."""
        begun = self.now()
        for turn in range(count):
            if turn < 2 or self.now() - begun < self.shape.limit:
                yield turn

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of one call."""
        begun = self.now()
        work()
        return self.now() - begun

    def clear(self) -> None:
        """Nothing of before counts for the next peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """GiB allocated at most since then, the net included."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None


def gradient(bench: Bench) -> Row:
    """Forward and backward as in training, attention by whatever kernel torch takes."""
    x, y = bench.batch

    def work() -> None:
        loss = F.cross_entropy(bench.model(x).flatten(0, 1), y.flatten())
        torch.autograd.grad(loss, list(bench.model.parameters()))

    work()
    return {"seconds": median([bench.timed(work) for _ in bench.turns(bench.shape.repeats)]).value}


def product(bench: Bench, size: int) -> Row:
    """A Hessian-vector product by double backward: from nothing, and again where the gradient's graph is at hand."""
    v = probe(bench.objective, bench.signs, 0)
    setups, again = [], []
    for turn in bench.turns(bench.shape.repeats):
        total: Tensors = {}
        built = taken = 0.0
        for x, y in bench.blocks(size):
            begun = bench.now()
            products = Products(bench.objective, x, y, parts=False)
            middle = bench.now()
            found = products.hessian(v)
            for name, part in found.items():
                total[name] = part if name not in total else total[name].add_(part)
            built, taken = built + middle - begun, taken + bench.now() - middle
            del products, found
        if turn or bench.shape.repeats == 1:  # the first warms up
            setups.append(built)
            again.append(taken)
    built, taken = median(setups).value, median(again).value
    return {"seconds": built + taken, "again_seconds": taken if size >= bench.shape.sequences else None}


def replicate(bench: Bench, size: int) -> Row:
    """Set up once, then drawn; where the sequences go by one after the other each set-up serves one replicate."""
    whole, repeats = size >= bench.shape.sequences, bench.shape.repeats
    total = zeros(bench.objective.parameters)
    setups, exact, drawn = [], [], []
    for turn in bench.turns(1 if whole else repeats):
        built, closed, taken, start = 0.0, 0.0, dict[int, float](), 0
        for x, y in bench.blocks(size):
            begun = bench.now()
            propagator = Propagator(Linearisation(bench.objective, x, y), start=start)
            built += bench.now() - begun
            if not turn:  # once in a measurement
                begun = bench.now()
                for part in (propagator.direct, propagator.heads):
                    accumulate(total, part())
                closed += bench.now() - begun
            for r in bench.turns(repeats if whole else 1):
                begun = bench.now()
                accumulate(total, propagator.functional(bench.signs, turn + r, outer=True))
                taken[r] = taken.get(r, 0.0) + bench.now() - begun
            start += len(x)
            del propagator
        setups.append(built)
        exact.append(closed)
        drawn += taken.values()
    row: Row = {"drawn_seconds": median(drawn).value, "setup_seconds": median(setups).value, "closed_seconds": exact[0]}
    return row | {"seconds": row["drawn_seconds"] + (0.0 if whole else row["setup_seconds"])}


ROWS: dict[str, Callable[[Bench], Row]] = {
    "gradient": gradient,
    "replicate": lambda bench: replicate(bench, bench.shape.sequences),
    "product": lambda bench: product(bench, bench.shape.sequences),
    "replicate, two sequences at a time": lambda bench: replicate(bench, 2),
    "replicate, a sequence at a time": lambda bench: replicate(bench, 1),
    "product, a sequence at a time": lambda bench: product(bench, 1),
}


def measure(name: str, device: str, shape: Shape) -> Row:
    """One row. Out of memory, it says so."""
    bench = Bench(device, shape)
    found: Row = {"parameters": bench.objective.size}
    try:
        with full_float32():
            beside = gradient(bench)["seconds"]  # in the same minute, and what a device does once is done
            bench.clear()
            found |= ROWS[name](bench)
            found["gradients"] = found["seconds"] / beside
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        found["out of memory"] = str(error).splitlines()[0]
    return found | {"peak_gib": bench.peak()}
