"""A table that is the head as well: of every sample the rows that it looks up, exactly; and what a replicate costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate import close, gate
from models import beyond_in_the_mean
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hessdiag as hd
from benchmarks.nanogpt import GPT, Shape
from hessdiag.graph import Linearisation
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import accumulate
from hessdiag.methods import reference
from hessdiag.signs import Signs

torch.set_num_threads(1)
WIDTH, ROWS = 3, 6
X = torch.tensor([[1, 2, 1, 4], [2, 2, 2, 2]])
"""Rows 0, 3 and 5 are looked up by no sample, most others by one, and some more than once."""
Y = torch.tensor([[2, 1, 4, 0], [2, 3, 5, 2]])
HOLES = Y.masked_fill(Y == 2, -100)


class Language(nn.Module):
    """Rows looked up, mixed with those before; the table makes the outputs, too."""

    def __init__(self, *, bias: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(ROWS, WIDTH, padding_idx=padding), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """Scores at every place."""
        return self.head(self.mixed(self.table(x)))  # type: ignore[no-any-return]

    def mixed(self, h: Tensor) -> Tensor:
        """A layer between the two."""
        return h + torch.tanh(self.mix(h.cumsum(1)))  # type: ignore[no-any-return]


class Scaled(Language):
    """Outputs at a temperature."""

    def forward(self, x: Tensor) -> Tensor:
        """As before."""
        return super().forward(x) * 0.7


class Twice(Language):
    """Looked up for what is read and for what is said."""

    def forward(self, x: Tensor) -> Tensor:
        """As before, from the rows before, too."""
        return self.head(self.mixed(self.table(x)) * torch.tanh(self.table(x.roll(1, 1))))  # type: ignore[no-any-return]


class Thrice(Language):
    """The table between the look-up and the head besides: every row meets every sample."""

    def forward(self, x: Tensor) -> Tensor:
        """As before, with a soft choice of rows."""
        h = self.table(x)
        return super().forward(x) + self.head(torch.softmax(F.linear(h, self.table.weight), -1)[..., :WIDTH])  # type: ignore[no-any-return]


class Bent(Language):
    """Another use of the table, without samples."""

    def forward(self, x: Tensor) -> Tensor:
        """As before, and outputs of the rows' own lengths."""
        return super().forward(x) + F.linear(torch.ones_like(self.table(x)), torch.tanh(self.table.weight))


def cases() -> dict[str, tuple[nn.Module, Tensor, dict[str, Any], bool]]:
    """(model, targets, options, whether the rows looked up are enough), by name."""
    torch.manual_seed(0)
    return {
        "plain": (Language(), Y, {}, True),
        "ignored targets and smoothing": (Language(), HOLES, {"label_smoothing": 0.1}, True),
        "bias": (Language(bias=True), Y, {}, True),
        "padding": (Language(padding=2), Y, {}, True),
        "scaled": (Scaled(), Y, {}, True),
        "looked up twice": (Twice(), Y, {}, True),
        "squared error": (Language(), torch.randn(2, 4, ROWS), {"loss": "mse"}, True),
        "three uses": (Thrice(), Y, {}, False),
        "a function of the table": (Bent(), Y, {}, False),
    }


@pytest.mark.parametrize("name", cases())
def test_rows_that_a_sample_looks_up_are_enough(name: str) -> None:
    model, y, options, enough = cases()[name]
    gate(model, X, y, **options)
    model = model.double()
    y = y.double() if y.is_floating_point() else y
    objective = hd.Objective(model, **options)
    truth, outer, _, _ = reference.batch_diagonal(objective, X, y)
    propagator = Propagator(Linearisation(objective, X, y))
    assert bool(propagator.uses.tables) is enough
    found, columns = beyond_in_the_mean(propagator), propagator.batch.columns
    blank = [torch.zeros_like(site.c) for site in propagator.batch.sites]
    for column in range(columns):  # both parts in the same passes
        unit = torch.zeros(columns, len(X), dtype=torch.float64)
        unit[column] = 1
        accumulate(found, propagator.beyond(blank, unit))
    for part in (propagator.direct(), propagator.heads()):
        accumulate(found, part)
    close(found, truth, outer, 1e-12)


@pytest.mark.parametrize("outer", [False, True])
def test_rows_that_no_sample_looks_up_carry_no_noise(outer: bool) -> None:
    model, y, options, _ = cases()["padding"]
    drawn = Propagator(Linearisation(hd.Objective(model, **options), X, y)).functional(Signs(0), 0, outer=outer)
    assert drawn["table.weight"].any(1).tolist() == [False, True, False, False, True, False]  # 2 is that of padding


def products(vocabulary: int) -> tuple[int, int]:
    """Multiplications and additions in products of matrices: of a gradient, and of a replicate."""
    torch.manual_seed(0)
    shape = Shape(layers=2, heads=2, width=16, vocabulary=vocabulary, tokens=32, sequences=2)
    model = GPT(shape).eval()
    x = torch.randint(ROWS, (shape.sequences, shape.tokens))
    propagator = Propagator(Linearisation(hd.Objective(model), x, x.roll(1, 1)))

    def gradient() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
        torch.autograd.grad(loss, list(model.parameters()))

    taken = []
    for work in (gradient, lambda: propagator.functional(Signs(0), 0, outer=True)):
        with FlopCounterMode(display=False) as counter:
            work()
        taken.append(counter.get_total_flops())
    return taken[0], taken[1]


def test_a_replicate_meets_every_row_of_the_table_once_where_a_gradient_meets_it_three_times() -> None:
    """To bring the outputs' cotangent down to the head's input. No sample has a table of its own."""
    (gradient, replicate), (wider, drawn) = products(1024), products(2048)
    once = 2 * (2 * 32) * 16 * 1024
    assert wider - gradient == 3 * once
    assert drawn - replicate == once
