"""Layers that are served by products at their outputs: exact on average, and chosen where signs are noisier."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from gate import close
from models import beyond_in_the_mean
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import ConfigurationError, NotDeterministicError
from hessdiag.graph import Linearisation
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate
from hessdiag.methods import Plan, reference
from hessdiag.methods.base import Aim
from hessdiag.methods.noise import FEW, choose, spread
from hessdiag.signs import Signs


class Language(nn.Module):
    """A table below a LayerNorm, attention and an MLP; the table may serve as the head, too."""

    def __init__(self, width: int = 4, letters: int = 5, tokens: int = 3, *, tied: bool = False, spread: float = 1.0):
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.position = nn.Parameter(0.3 * spread * torch.randn(1, tokens, width))
        self.norm, self.query, self.key = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, letters, bias=False)
        nn.init.normal_(self.embed.weight, std=spread)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next letter at every place."""
        x = self.embed(x) + self.position
        h = self.norm(x)
        x = x + torch.softmax(self.query(h) @ self.key(h).transpose(1, 2), -1) @ h
        return self.head(self.last(x + self.down(F.gelu(self.up(x)))))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One linear layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(torch.tanh(self.fc(x))))


def language(
    *, tied: bool = False, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = Language(tied=tied, **options).to(dtype)
    x = torch.tensor([[1, 2, 1], [0, 4, 4]])  # numbers that come more than once
    return model, x, torch.tensor([[2, 1, 0], [3, 4, 1]])


def in_the_mean(propagator: Propagator, *, merged: bool) -> Tensors:
    """What is known and, for every random vector, the sum over all unit vectors in its place."""
    batch, probes = propagator.batch, propagator.probes
    out = beyond_in_the_mean(propagator)
    for group in probes.groups:
        entries = sum(probes.entries(group))
        for entry in range(entries):
            v = torch.zeros(batch.samples, entries, dtype=batch.outputs.dtype)
            v[:, entry] = 1
            accumulate(out, probes.beyond(group, v[None]))
    for part in (propagator.direct(), probes.along()):
        accumulate(out, part)
    if not merged:
        apart: Tensors = {}
        accumulate(out, propagator.gauss_newton(apart))
        accumulate(out, apart, -1.0)
        return out
    blank = [torch.zeros(site.c.numel(), dtype=site.c.dtype) for site in batch.sites]
    for column in range(batch.columns):
        unit = torch.zeros(batch.columns, batch.samples, dtype=batch.curvature.signs.dtype)
        unit[column] = 1
        accumulate(out, propagator.beyond(blank, unit))
    accumulate(out, propagator.heads())
    return out


@pytest.mark.parametrize("probes", [{}, {"embed": 1, "position": 1, "up": 1}, {"embed": 1, "up": 2}], ids=len)
@pytest.mark.parametrize(
    ("merged", "dtype", "tolerance"),
    [
        (False, torch.float64, 1e-12),
        (False, torch.float32, 1e-5),
        (True, torch.float64, 1e-12),
        pytest.param(True, torch.float32, 1e-5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_unit_vectors_in_the_place_of_all_that_is_random_are_p_products(
    tied: bool, merged: bool, dtype: torch.dtype, tolerance: float, probes: dict[str, int]
) -> None:
    model, x, y = language(tied=tied)
    truth, outer, _, _ = reference.batch_diagonal(hd.Objective(model), x, y)
    rank = 3 if merged else 0
    batch = Linearisation(hd.Objective(copy.deepcopy(model).to(dtype)), x, y)
    propagator = Propagator(batch, probes=probes)
    if rank and probes:
        propagator.probes.find(Signs(1), rank)
    close(in_the_mean(propagator, merged=merged), truth, outer, tolerance)


class Padded(Language):
    """A row that is no parameter where it is looked up, and one in the head; the head has a bias."""

    def __init__(self) -> None:
        super().__init__(tied=True)
        self.embed.padding_idx = 1
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        """As before, and the bias."""
        return super().forward(x) + self.bias


class Biased(Language):
    """The bias of the head in the head's own node."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight


class Twofold(Language):
    """Two heads on the table: what they have together is left to signs."""

    def __init__(self) -> None:
        super().__init__(tied=True)

    def forward(self, x: Tensor) -> Tensor:
        """The second head sees less."""
        h = self.norm(self.embed(x) + self.position)
        return self.head(self.last(h)) + self.head(torch.tanh(self.down(F.gelu(self.up(h)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", [Padded, Biased, Twofold])
def test_tables_that_are_heads_in_other_ways(kind: type[Language], merged: bool) -> None:
    torch.manual_seed(3)
    model = kind().double()
    x, y = torch.tensor([[1, 2, 1], [0, 4, 4]]), torch.tensor([[2, 1, 0], [3, 4, 1]])
    truth, outer, _, _ = reference.batch_diagonal(hd.Objective(model), x, y)
    propagator = Propagator(Linearisation(hd.Objective(model), x, y), probes={"embed": 1, "position": 1})
    assert bool(propagator.probes.tied) == (kind is not Twofold)
    propagator.probes.find(Signs(1), 3)
    close(in_the_mean(propagator, merged=merged), truth, outer, 1e-12)


def test_a_loss_of_differences_serves_a_tied_table_too() -> None:
    """Of half the squared error the second derivative at the outputs is no function of these."""
    model, x, _ = language(tied=True)
    y = torch.randn(2, 3, 5, dtype=torch.float64)
    objective = hd.Objective(model, lambda f, t: (f - t).square().sum((1, 2)))
    truth, outer, _, _ = reference.batch_diagonal(objective, x, y)
    propagator = Propagator(Linearisation(objective, x, y), probes={"embed": 1})
    close(in_the_mean(propagator, merged=False), truth, outer, 1e-12)


def test_padding_is_no_parameter() -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(5, 4, padding_idx=0)
    model = nn.Sequential(embed, nn.LayerNorm(4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    x, y = torch.tensor([[1, 0, 1], [0, 0, 2]]), torch.tensor([[2, 1, 0], [3, 4, 1]])
    truth, outer, _, _ = reference.batch_diagonal(hd.Objective(model), x, y)
    propagator = Propagator(Linearisation(hd.Objective(model), x, y), probes={"0": 1})
    propagator.probes.find(Signs(1), 2)
    close(in_the_mean(propagator, merged=True), truth, outer, 1e-12)


@pytest.mark.parametrize(
    ("gauss_newton", "parts", "tied"),
    [
        ("exact", True, False), ("exact", False, True), ("signs", True, True), ("signs", False, False),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (
            ("exact", True, True), ("exact", False, False), ("signs", True, False), ("signs", False, True),
        )),
    ],
)  # fmt: skip
def test_a_measurement_by_such_a_plan_has_the_parts_it_was_asked_for(
    gauss_newton: str, parts: bool, tied: bool
) -> None:
    model, x, y = language(tied=tied)
    objective, count = hd.Objective(model), 100
    plan = Plan("propagation", gauss_newton, probes={"embed": 1, "position": 2}, probe_rank=1, parts=parts)
    found = hd.diagonal(objective, [(x, y)], plan=plan, replicates=count)
    exact = hd.diagonal(objective, [(x, y)], method="exact")
    wanted = ("total", "gauss_newton", "functional") if parts or gauss_newton == "exact" else ("total",)
    for part in ("total", "gauss_newton", "functional"):
        assert bool(getattr(found, part)) == (part in wanted)
    rounding = 1e-12 * max(float(truth.abs().max()) for truth in exact.total.values())  # a key's bias is zero
    for name, truth in exact.total.items():
        off = (found.total[name] - truth).abs()
        assert bool((off <= 7.0 * found.standard_errors[name] + rounding).all()), name
        if parts:
            both = found.gauss_newton[name] + found.functional[name]
            assert torch.allclose(both, found.total[name], rtol=1e-9, atol=1e-12)


def test_the_pilot_takes_products_where_a_small_table_meets_a_layernorm() -> None:
    for size, expected in ((0.02, True), (3.0, False)):
        torch.manual_seed(0)
        model = Language(16, 12, 24, spread=size)
        x = torch.randint(0, 12, (8, 25))
        batch = Linearisation(hd.Objective(model), x[:, :-1], x[:, 1:])
        chosen = [choose(batch, 0, samples=8, aim=Aim(), ordered=True, outer=False) for _ in range(2)]
        assert chosen[0] == chosen[1]
        assert ("embed" in chosen[0].probes) == expected, (size, chosen)


def test_a_measurement_takes_them_by_itself_and_is_right() -> None:
    torch.manual_seed(0)
    model = Language(8, 6, 8, spread=0.02)
    x = torch.randint(0, 6, (4, 9))
    data = [(x[:, :-1], x[:, 1:])]
    found = hd.measure(hd.Objective(model), data, method="propagation", rtol=0.2, max_replicates=60)
    assert found.plan.probes
    assert found.norm.gauss_newton is not None
    truth = hd.measure(hd.Objective(model), data, method="exact").norm.total.norm
    low, high = found.norm.total.norm_interval
    assert low - (high - low) <= truth <= high + (high - low)


def test_a_loss_that_holds_numbers_of_the_models_dtype_has_products_too() -> None:
    torch.manual_seed(0)
    model, turn = Language(8, 6, 8, spread=0.02), torch.rand(6, 6)  # float32 meets no double in a product of matrices
    x = torch.randint(0, 6, (4, 9))
    data = [(x[:, :-1], x[:, 1:])]

    def turned(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((outputs @ turn).transpose(1, 2), targets, reduction="none").sum(1)

    found = hd.measure(hd.Objective(model, turned), data, method="propagation", rtol=0.1, max_replicates=60)
    assert found.plan.probes
    truth = hd.measure(hd.Objective(model, turned), data, method="exact").norm.total.norm
    low, high = found.norm.total.norm_interval
    assert low - (high - low) <= truth <= high + (high - low)


def test_replicates_of_the_pilot_are_not_kept() -> None:
    """Each is as large as the model in float64."""
    torch.manual_seed(0)
    rows, seen = torch.randn(FEW, 5).double(), list[Any]()

    def draw(_: int) -> Tensors:
        row = rows[len(seen)].clone()
        assert sum(one() is not None for one in seen) <= 2
        seen.append(weakref.ref(row))
        return {"a": row}

    variance, mean = spread(draw)
    assert variance["a"] == pytest.approx(float(rows.var(0).sum()), rel=1e-13)
    assert torch.allclose(mean["a"], rows.mean(0), rtol=1e-13)
    assert len(seen) == FEW


def test_a_table_that_is_the_head_too_leaves_nothing_to_signs() -> None:
    """A replicate of signs is zero there, whatever the signs; the head's share is closed, and all else products'."""
    model, x, y = language(tied=True)
    batch = Linearisation(hd.Objective(model), x, y)
    propagator = Propagator(batch, probes={"embed": 1})
    assert propagator.probes.tied
    for outer in (False, True):
        drawn = propagator.signed(Signs(3), 0, outer=outer)
        assert not drawn["embed.weight"].any()
        assert all(drawn[name].any() for name in ("position", "up.weight"))


def test_layers_whose_outputs_are_summands_of_one_tensor_share_their_products() -> None:
    model, x, y = language()
    batch = Linearisation(hd.Objective(model), x, y)

    def groups(**counts: int) -> set[frozenset[str]]:
        probes = Propagator(batch, probes=counts).probes
        return {frozenset(probes.squares[place].layer.name for place in group) for group in probes.groups}

    assert groups(embed=1, position=1, up=1) == {frozenset({"embed", "position"}), frozenset({"up"})}
    assert groups(embed=1, position=2) == {frozenset({"embed"}), frozenset({"position"})}


def test_directions_found_before_are_the_first_of_more_and_leave_no_noise_once_they_are_all() -> None:
    model, x, y = language()
    batch = Linearisation(hd.Objective(model), x, y)
    propagator, other = (Propagator(batch, probes={"embed": 1, "position": 1}) for _ in range(2))
    propagator.probes.find(Signs(1), 3)
    few = dict(propagator.probes.basis)
    other.probes.find(Signs(1), 24)  # of 2 or 3 letters and 3 positions of 4 numbers
    for group, basis in other.probes.basis.items():
        assert torch.equal(basis[:, :3], few[group])
        products = basis @ basis.transpose(1, 2)
        assert torch.allclose(products, torch.diag_embed(products.diagonal(dim1=1, dim2=2).round()), atol=1e-10)
        assert bool((products[:, :12, :12].diagonal(dim1=1, dim2=2) > 0.5).all())
    size = sum(float(t.norm()) for t in other.probes.along().values())
    rest = other.probes.replicate(Signs(2), 0)
    assert sum(float(t.norm()) for t in rest.values()) < 1e-9 * size


def test_several_uses_of_a_parameter_are_left_to_signs() -> None:
    torch.manual_seed(0)
    batch = Linearisation(
        hd.Objective(nn.Sequential(Twice(), nn.Linear(4, 3)).double()), torch.randn(2, 4).double(), torch.tensor([0, 1])
    )
    assert [layer.name for _, layer in Propagator.probed(batch)] == []


def test_directions_need_the_samples_in_one_order_and_names_must_be_there() -> None:
    model, x, y = language()
    objective = hd.Objective(model)
    plan = Plan("propagation", "signs", probes={"embed": 1}, probe_rank=2)
    orders = iter(range(100))

    class Turning:
        def __iter__(self) -> Any:
            turn = next(orders) % 2
            yield (x.flip(0), y.flip(0)) if turn else (x, y)
            yield x + 0, y + 0

    with pytest.raises(NotDeterministicError, match="probe_rank"):
        hd.measure(objective, Turning(), plan=plan, deterministic_check=False, audit_model=False, max_replicates=12)
    with pytest.raises(ConfigurationError, match="embed"):
        hd.measure(objective, [(x, y)], plan=Plan("propagation", "signs", probes={"embd": 1}))
