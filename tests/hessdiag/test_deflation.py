"""Deflated propagation: the same mean, what is taken out is taken out exactly, and less is left to signs.

z-tests are seeded; each compares at |z| < 5 over a few hundred entries at most: false alarms below 1e-3 in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import Function, Residual, Tokens, dense_diagonal, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import BudgetError, NotDeterministicError, ResumeError
from hessdiag.graph import Linearisation
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import accumulate
from hessdiag.methods.base import Aim
from hessdiag.methods.noise import choose
from hessdiag.methods.pilot import DEFLATE, DEFLATE_LEAST, product_moments, replicates_needed
from hessdiag.methods.plan import Plan
from hessdiag.signs import Signs

torch.set_num_threads(1)
BUILDERS = {
    "chain": lambda: Function(F.silu),
    "wide": lambda: Function(F.silu, 24),
    "residual": Residual,
    "tokens": Tokens,
}
SHAPES = {"Residual": (2, 8, 8), "Tokens": (4, 5)}


def losses(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


def prepared(name: str, n: int = 6) -> tuple[nn.Module, Tensor, Tensor, Propagator]:
    model = seeded(BUILDERS[name])
    g = torch.Generator().manual_seed(1)
    x = torch.randn((n, *SHAPES.get(type(model).__name__, (5,))), generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (n,), generator=g)
    return model, x, y, Propagator(Linearisation(hd.Objective(model), x, y), keep=True)


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def known(propagator: Propagator) -> Tensor:
    parts = propagator.gauss_newton()
    accumulate(parts, propagator.direct())
    accumulate(parts, propagator.deflated())
    return flat(parts)


@pytest.mark.parametrize("name", BUILDERS)
def test_gram_is_the_per_sample_jacobian_times_its_transpose(name: str) -> None:
    """<e, J J^T d> = <J^T e, J^T d> for every sample and layer."""
    *_, propagator = prepared(name)
    g = torch.Generator().manual_seed(2)
    for square, layer in zip(propagator.squares, propagator.batch.layers):
        shape = layer.node._input_metadata[0].shape
        d, e = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
        left, right = square.each(d), square.each(e)
        wanted = torch.stack([(left[n] * right[n]).flatten(1).sum(1) for n in left]).sum(0)
        found = (e * square.gram(d)).reshape(len(wanted), -1).sum(1)
        assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-11 * float(wanted.abs().max()))


@pytest.mark.statistical
@pytest.mark.parametrize("name", BUILDERS)
def test_the_mean_stays_and_the_variance_falls(name: str) -> None:
    model, x, y, propagator = prepared(name)
    truth = flat(dense_diagonal(model, losses, x, y)) * len(y)
    signs, spread = Signs(7), []
    for rank in (0, 4):
        propagator.deflate(signs, rank)
        start = known(propagator)
        draws = torch.stack([start + flat(propagator.functional(signs, r)) for r in range(300)])
        error = draws.std(0) / len(draws) ** 0.5
        noisy = error > 1e-10 * truth.norm()
        assert (draws.mean(0) - truth)[~noisy].norm() <= 1e-9 * truth.norm()
        z = ((draws.mean(0) - truth) / error)[noisy]
        assert z.numel() == 0 or z.abs().max() < 5
        spread.append(float(draws.var(0).sum()))
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("name", ["chain", "tokens"])
def test_a_full_basis_leaves_nothing_to_signs(name: str) -> None:
    model, x, y, propagator = prepared(name)
    truth = flat(dense_diagonal(model, losses, x, y)) * len(y)
    signs = Signs(7)
    propagator.deflate(signs, max(sum(site.c[0].numel() for site in propagator.batch.sites), 1))
    found = known(propagator)
    assert (found - truth).norm() <= 1e-10 * truth.norm()
    assert flat(propagator.functional(signs, 0)).norm() <= 1e-10 * truth.norm()


@pytest.mark.parametrize("name", ["residual", "wide"])
def test_the_basis_is_orthonormal_and_belongs_to_the_sample(name: str) -> None:
    """Keyed like all signs: a sample's basis does not depend on the batch it is met in."""
    model, x, y, propagator = prepared(name)
    whole = propagator.deflate(Signs(3), 3)
    assert whole is not None
    assert any(site.right for site in propagator.batch.sites) == (name == "residual")
    for wanted in (None,) if name == "residual" else (True, False):  # signs of c apart where there are no pairs
        parts = [
            u if wanted is None else u * ((site.c > 0).reshape(len(y), 1, -1) == wanted)
            for u, site in zip(whole.basis, propagator.batch.sites)
        ]
        products = sum(torch.bmm(part, part.transpose(1, 2)) for part in parts)
        assert torch.allclose(products, torch.eye(3, dtype=torch.float64).expand(len(y), 3, 3), atol=1e-12)
    rest = Propagator(Linearisation(hd.Objective(model), x[2:], y[2:]), start=2)
    part = rest.deflate(Signs(3), 3)
    assert part is not None
    signs = [torch.randn(site.c.shape, dtype=torch.float64) for site in propagator.batch.sites]
    for sign in (1, -1):  # the space that is left out, whichever basis spans it
        left = whole.project(signs, sign), part.project([s[2:] for s in signs], sign)
        assert all(torch.allclose(a[2:], b, atol=1e-9) for a, b in zip(*left))


def batches_of(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size)))


def measured(model: nn.Module, batches: object, rank: int, **options: object) -> hd.Measurement:
    plan = Plan("propagation", deflate=rank)
    return hd.measure(hd.Objective(model), batches, plan=plan, max_replicates=12, rtol=1e-6, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [12, 5])
def test_a_measurement_deflates_and_any_cut_into_batches_gives_the_same(size: int) -> None:
    model, x, y, _ = prepared("residual", n=12)
    truth = flat(dense_diagonal(model, losses, x, y)).square().mean().sqrt()
    found = measured(model, batches_of(x, y, size), 4)
    whole, plain = measured(model, [(x, y)], 4), measured(model, [(x, y)], 0)
    assert found.plan.deflate == 4
    assert abs(found.norm.rms - whole.norm.rms) <= 1e-9 * whole.norm.rms
    low, high = found.interval
    assert low - (high - low) < float(truth) < high + (high - low)
    assert high - low < plain.interval[1] - plain.interval[0]


def test_the_pilot_deflates_noisy_nets_and_leaves_quiet_ones_and_shuffled_data_alone() -> None:
    model, x, y, propagator = prepared("residual", n=12)

    def rank(batch: Linearisation, samples: int, aim: Aim) -> int:
        return choose(batch, 0, samples=samples, aim=aim, ordered=True).deflate

    assert rank(propagator.batch, 12, Aim(rtol=1e-3)) == DEFLATE
    assert rank(propagator.batch, 12, Aim(rtol=5.0)) == 0  # ten replicates do
    assert rank(propagator.batch, 10**7, Aim(rtol=1e-3)) == 0  # no memory for so many
    few, many = (rank(propagator.batch, 12, Aim(replicates=r)) for r in (16, 100))
    assert DEFLATE_LEAST <= few < many == DEFLATE
    relu = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    quiet = Linearisation(hd.Objective(relu), torch.randn(4, 5, dtype=torch.float64), y[:4])
    assert rank(quiet, 4, Aim()) == 0

    class Shuffled:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            order = torch.randperm(len(y))
            return iter(batches_of(x[order], y[order], 5))

    found = hd.measure(hd.Objective(model), Shuffled(), method="propagation", max_replicates=10)
    assert found.plan.deflate == 0
    with pytest.raises(NotDeterministicError, match="deflate=0"):
        hd.measure(
            hd.Objective(model), Shuffled(), plan=Plan("propagation", deflate=3), deterministic_check=False,
            max_replicates=10,
        )  # fmt: skip


@pytest.mark.statistical
def test_products_of_replicates_tell_their_moments_and_how_many_are_needed() -> None:
    """d_i = d + noise of covariance S: v = 2 d.S d + tr S^2, z = d.S d; z-tests over 4,000 draws of 5 replicates.

    False alarms below 1e-5 at |z| < 4.5. The number needed brings the error of |d| to rtol / 1.96, within 10%.
    """
    g = torch.Generator().manual_seed(5)
    d = torch.rand(20, generator=g, dtype=torch.float64)
    spread = 2.0 * torch.rand(20, generator=g, dtype=torch.float64)

    def draw(count: int, m: int) -> Tensor:
        x = d + spread * torch.randn(count, m, 20, generator=g, dtype=torch.float64)
        return x @ x.transpose(1, 2)

    z = float((d * spread).square().sum())
    truth = torch.tensor([float(d.square().sum()), 2 * z + float(spread.pow(4).sum()), z])
    found = torch.tensor([product_moments(k) for k in draw(4000, 5)])
    scores = (found.mean(0) - truth) / (found.std(0) / len(found) ** 0.5)
    assert scores.abs().max() < 4.5

    rtol = 0.1
    need = replicates_needed(draw(1, 2000)[0], rtol)
    products = draw(3000, need)
    pairs = products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(1)
    error = float((pairs / (need * (need - 1))).std()) / float(d.square().sum()) / 2.0
    assert 0.9 < 1.96 * error / rtol < 1.1
    assert replicates_needed(draw(1, 2000)[0], rtol, share=0.1) < need
    noise = spread * torch.randn(2000, 20, generator=g, dtype=torch.float64)
    whole, half = ((d + noise * size) @ (d + noise * size).T for size in (1.0, 0.5**0.5))
    quiet = replicates_needed(half, rtol), replicates_needed(whole, rtol, quieter=0.5)
    assert abs(quiet[0] / quiet[1] - 1) < 0.1


def test_a_few_replicates_with_heavy_tails_do_not_call_signs_cheap() -> None:
    """Two of eight replicates lie far out along directions of their own, so that z comes out negative.

    By hand: v = z_largest * 2, so the number needed grows from that of v alone to that of a covariance of v / 2.
    """
    products = torch.eye(8, dtype=torch.float64) + 1.0
    products[2, :] = products[:, 2] = torch.tensor([1.6, 1.6, 9.0, 1.6, 0.1, 0.1, 0.1, 1.9], dtype=torch.float64)
    square, v, z = product_moments(products)
    assert z < 0 < v
    share, rtol = 1 / 16, 0.05
    plain = replicates_needed(products, rtol, share=share)
    cautious = replicates_needed(products, rtol, share=share, cautious=True)
    spread = 2 * (v / 2) / square**2 * share**0.5
    by_hand = next(n for n in range(10, 1000) if 1.96 * (2 * spread / n) ** 0.5 / 2 <= rtol)
    assert plain < by_hand == cautious


def test_a_resumed_deflated_measurement_has_the_same_bits(tmp_path: Path) -> None:
    model, x, y, _ = prepared("residual", n=12)
    batches = batches_of(x, y, 5)
    whole = measured(model, batches, 4)

    class Stop(Exception):
        pass

    def stop(event: hd.Event) -> None:
        if event.phase == "norm" and event.replicates >= 10:
            raise Stop

    path = tmp_path / "resume.safetensors"
    with pytest.raises(Stop):
        measured(model, batches, 4, resume=path, progress=stop)
    again = measured(model, batches, 4, resume=path)
    assert (again.norm.rms, again.interval) == (whole.norm.rms, whole.interval)
    with pytest.raises(ResumeError):
        measured(model, batches, 3, resume=path)


def test_a_given_plan_whose_directions_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, _ = prepared("residual", n=12)
    monkeypatch.setattr("hessdiag.methods.propagation.GIVEN_BYTES", 1000)
    with pytest.raises(BudgetError, match="deflate=0"):
        measured(model, [(x, y)], 4)
