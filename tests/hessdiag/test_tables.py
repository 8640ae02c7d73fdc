"""Embeddings and bags of them: exact and propagation against p products, and what torch does to their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate import gate
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.kernels.propagator import Propagator
from hessdiag.problem.objective import Objective


class Words(nn.Module):
    """Rows looked up, bent, averaged over places, classified."""

    def __init__(self, rows: int = 7, width: int = 4, **options: Any) -> None:
        super().__init__()
        self.table, self.mix, self.fc = nn.Embedding(rows, width, **options), nn.Linear(width, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(F.gelu(self.table(x))))
        return self.fc(h.flatten(1, -2).mean(1) if h.ndim > 2 else h)  # type: ignore[no-any-return]


class Bag(nn.Module):
    """Bags of rows, classified."""

    def __init__(self, rows: int = 7, width: int = 4, **options: Any) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(rows, width, **options), nn.Linear(width, 3)

    def forward(self, x: Any) -> Tensor:
        h = self.bag(*x) if isinstance(x, tuple) else self.bag(x)
        return self.fc(F.silu(h))  # type: ignore[no-any-return]


def numbers(*shape: int, high: int = 7) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


Y = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)])
def test_rows_looked_up(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate(Words(), numbers(*shape), Y)


def test_a_padding_row_is_a_constant_that_is_still_looked_up() -> None:
    torch.manual_seed(0)
    model = Words(padding_idx=2)
    with torch.no_grad():
        model.table.weight[2] = 0.7
    x = numbers(4, 6)
    assert bool((x == 2).any())
    truth = gate(model, x, Y)
    assert not bool(truth["table.weight"][2].any())
    assert bool(truth["table.weight"][3].any())


def test_groups_of_samples_are_summed_before_squaring_and_no_table_is_built_for_a_sample() -> None:
    torch.manual_seed(0)
    model, x = Words(padding_idx=1).double(), numbers(4, 6)
    batch = Linearisation(Objective(model), x, Y)
    square = next(s for s in Propagator(batch).squares if s.layer.name == "table")
    delta = torch.randn(4, 6, 4, dtype=torch.float64)
    each = square.each(delta)["table.weight"]
    for group in (1, 2, 3):
        wanted = torch.stack([part.sum(0) for part in each.split(group)]).square().sum(0)
        torch.testing.assert_close(square.summed(delta, group=group)["table.weight"], wanted)
        (_, parts), *_ = square.per_group(delta, group, squares=False)
        summed = torch.cat(list(parts))
        torch.testing.assert_close(summed, torch.stack([part.sum(0) for part in each.split(group)]))
    torch.testing.assert_close(square.gram(delta), square.push(square.each(delta)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_bags(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    model, x = Bag(mode=mode, padding_idx=padding), numbers(4, 5)
    gate(model, x, Y)
    mended = Objective(model).outputs(x, Y, index=0)
    torch.testing.assert_close(mended, model(x))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_unequal_length_one_of_them_empty(mode: str, last: bool) -> None:
    torch.manual_seed(0)
    model = Bag(mode=mode, padding_idx=0, include_last_offset=last)
    flat, offsets = numbers(9), torch.tensor([0, 3, 3, 4, 9] if last else [0, 3, 3, 4])
    torch.testing.assert_close(Objective(model).outputs((flat, offsets), Y, index=0), model((flat, offsets)))
    gate(model, (flat, offsets), Y)


def test_bags_with_weights_of_their_own() -> None:
    class Weighted(Bag):
        def forward(self, x: Any) -> Tensor:
            return self.fc(
                F.silu(self.bag(x, per_sample_weights=self.weigh(F.one_hot(x, 7).to(self.fc.weight))[..., 0]))
            )

        def __init__(self) -> None:
            super().__init__(mode="sum")
            self.weigh = nn.Linear(7, 1)

    torch.manual_seed(0)
    model, x = Weighted(), numbers(4, 5)
    torch.testing.assert_close(Objective(model).outputs(x, Y, index=0), model(x))
    gate(model, x, Y)


def test_what_torch_does_to_gradients_alone_is_left_out() -> None:
    torch.manual_seed(0)
    plain, x = Words(), numbers(4, 6)
    truth = gate(plain, x, Y)
    for option in ("scale_grad_by_freq", "sparse"):
        torch.manual_seed(0)
        found = gate(Words(**{option: True}), x, Y)
        for name, wanted in truth.items():
            torch.testing.assert_close(found[name], wanted)


def test_a_table_that_is_shortened_when_looked_up() -> None:
    torch.manual_seed(0)
    x = numbers(4, 6)
    with pytest.raises(UncoveredModelError, match="max_norm"):
        hd.measure(Objective(Words(max_norm=1.0)), [(x, Y)])
    wide = Words(max_norm=50.0)
    before = wide.table.weight.detach().clone()
    gate(wide, x, Y)
    assert torch.equal(wide.table.weight, before)


def test_both_commands_measure_it() -> None:
    torch.manual_seed(0)
    model, x = Words(padding_idx=2), numbers(4, 6)
    objective = Objective(model)
    exact = hd.diagonal(objective, [(x, Y)], method="exact")
    found = hd.measure(objective, [(x, Y)], method="propagation", seed=1)
    wanted = float(torch.cat([t.flatten() for t in exact.total.values()]).norm())
    assert abs(found.norm.total.norm - wanted) <= 0.2 * wanted
