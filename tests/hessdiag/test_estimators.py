"""Propagation and Hutchinson: unbiased, with the variance their formulas give, and errors they report.

z-tests are seeded; each compares at |z| < 5 over a few hundred entries at most: false alarms below 1e-3 in all.
"""

from __future__ import annotations

import pytest
import torch
from models import Function, Residual, Tokens, dense_diagonal, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.graph import Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.methods.hutchinson import probe
from hessdiag.methods.pilot import balance_products
from hessdiag.signs import BLOCK, Signs, key

torch.set_num_threads(1)
BUILDERS = {"chain": lambda: Function(F.silu), "residual": Residual, "tokens": Tokens}


def losses(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


def data(model: nn.Module, n: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = {"Residual": (n, 2, 8, 8), "Tokens": (n, 4, 5)}.get(type(model).__name__, (n, 5))
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def z_scores(draws: Tensor, truth: Tensor) -> Tensor:
    """Scores of the mean against the truth where there is noise; where there is none the mean must be the truth."""
    error = draws.std(0) / len(draws) ** 0.5
    noisy = error > 1e-12 * truth.norm()
    assert (draws.mean(0) - truth)[~noisy].norm() <= 1e-10 * truth.norm()
    return ((draws.mean(0) - truth) / error)[noisy]


@pytest.mark.statistical
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", BUILDERS)
def test_propagation_has_the_right_mean(name: str, groups: int) -> None:
    model = seeded(BUILDERS[name])
    x, y = data(model)
    truth = {n: t * len(y) for n, t in dense_diagonal(model, losses, x, y).items()}
    linear = Linearisation(hd.Objective(model), x, y)
    propagator = Propagator(linear, groups={layer.name: groups for layer in linear.layers}, keep=True)
    known, signs = flat(propagator.gauss_newton()) + flat(propagator.direct()), Signs(7)
    draws = torch.stack([known + flat(propagator.functional(signs, r)) for r in range(300)])
    z = z_scores(draws, flat(truth))
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean().sqrt() < 1.5


@pytest.mark.statistical
def test_gauss_newton_by_signs_has_the_right_mean() -> None:
    model = seeded(Residual)
    x, y = data(model)
    propagator = Propagator(Linearisation(hd.Objective(model), x, y))
    exact, known, signs = flat(propagator.gauss_newton()), flat(propagator.heads()), Signs(3)
    assert bool(known.any())
    z = z_scores(torch.stack([known + flat(propagator.gauss_newton_signed(signs, r)) for r in range(300)]), exact)
    assert z.abs().max() < 5


@pytest.mark.statistical
def test_indefinite_losses_take_negative_columns_to_the_other_side() -> None:
    def focal(f: Tensor, y: Tensor) -> Tensor:
        p = torch.softmax(f, 1).gather(1, y[:, None])[:, 0]
        return -((1 - p) ** 2) * torch.log(p)

    model = seeded(lambda: Function(torch.tanh))
    x, y = data(model)
    truth = flat(dense_diagonal(model, focal, x, y))
    found = hd.diagonal(hd.Objective(model, focal), [(x, y)], method="exact")
    assert (flat(dict(found.total)) - truth).norm() <= 1e-10 * truth.norm()
    propagator = Propagator(Linearisation(hd.Objective(model, focal), x, y))
    signs = Signs(5)
    z = z_scores(
        torch.stack([flat(propagator.gauss_newton_signed(signs, r)) for r in range(300)]),
        flat(propagator.gauss_newton()),
    )
    assert z.abs().max() < 5


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    names = [name for name, _ in model.named_parameters()]
    parameters = [p for _, p in model.named_parameters()]
    loss = losses(model(x), y).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, parameters, retain_graph=True)]) for g in gradient]
    order = torch.cat([torch.full((p.numel(),), sorted(names).index(n)) for n, p in model.named_parameters()])
    permutation = torch.argsort(order, stable=True)
    return torch.stack(rows)[permutation][:, permutation]


@pytest.mark.statistical
def test_hutchinson_has_the_mean_and_the_variance_of_its_formula() -> None:
    """Var d_k = sum_{j != k} H_kj^2; the ratio of empirical to formula within 5 of its own standard errors."""
    model = seeded(lambda: Function(F.silu, width=4))
    x, y = data(model)
    full = dense_hessian(model, x, y)
    products, signs = Products(hd.Objective(model), x, y), Signs(11)
    draws = []
    for r in range(600):
        v = probe(hd.Objective(model), signs, r)
        draws.append(flat({n: v[n] * h for n, h in products.hessian(v).items()}) / len(y))
    stack = torch.stack(draws)
    assert z_scores(stack, full.diagonal()).abs().max() < 5
    formula = full.square().sum() - full.diagonal().square().sum()
    empirical = (stack - full.diagonal()).square().sum(1)
    assert abs(empirical.mean() - formula) < 5 * empirical.std() / len(draws) ** 0.5


@pytest.mark.statistical
def test_propagation_has_the_variance_of_its_formula() -> None:
    """Per sample and sign Var a^2 = 2 [(sum w^2)^2 - sum w^4], w_j = sqrt|c_j| dz_j/dtheta over the remote sites."""
    model = seeded(lambda: Function(F.silu, width=4))
    x, y = data(model, 3)
    linear = Linearisation(hd.Objective(model), x, y)
    propagator = Propagator(linear)
    names = [name for name, _ in model.named_parameters()]
    formula = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(3):
        rows: dict[tuple[str, int], list[Tensor]] = {}
        for number, site in enumerate(linear.sites):
            for j in range(site.c[n].numel()):
                seed = torch.zeros_like(site.c)
                seed[n].reshape(-1)[j] = site.c[n].reshape(-1)[j].abs().sqrt()
                seeds = [seed if i == number else None for i in range(len(linear.sites))]
                sign = 1 if site.c[n].reshape(-1)[j] > 0 else -1
                found = linear.backward(seeds, None, [dict(model.named_parameters())[m] for m in names])
                for place, layer in enumerate(linear.layers):
                    remote = not (place in linear.direct and linear.direct[place].site == number)
                    for name, g in zip(names, found):
                        if name in (layer.weight, layer.bias) and g is not None and remote:
                            rows.setdefault((name, sign), []).append(g)
        for (name, _), terms in rows.items():
            w = torch.stack(terms)
            formula[name] += 2 * (w.square().sum(0).square() - w.pow(4).sum(0))
    signs = Signs(2)
    draws = torch.stack([flat(propagator.functional(signs, r)) for r in range(1500)])
    spread = (draws - draws.mean(0)).square().sum(1)
    expected = float(flat(formula).sum())
    assert expected > 0
    assert abs(float(spread.mean()) * 1500 / 1499 - expected) < 5 * float(spread.std()) / 1500**0.5


@pytest.mark.statistical
def test_reported_standard_errors_are_those_of_the_spread() -> None:
    """Mean of the reported squared errors against the variance over 60 seeds, entries pooled; ratio within 25 %."""
    model = seeded(lambda: Function(F.silu, width=4))
    x, y = data(model)
    found = [
        hd.diagonal(
            hd.Objective(model),
            [(x, y)],
            method="propagation",
            replicates=16,
            seed=s,
            audit_model=False,
            deterministic_check=False,
        )
        for s in range(60)
    ]
    reported = torch.stack([flat(dict(d.standard_errors)).square() for d in found]).mean(0).sum()
    spread = torch.stack([flat(dict(d.total)) for d in found]).var(0).sum()
    assert 0.75 < float(reported / spread) < 1.33


def test_balance_of_products_reduces_variance_and_keeps_the_mean() -> None:
    class Lopsided(Function):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(0.01 * torch.tanh(h) * torch.sigmoid(100 * self.middle(h)))

    model = seeded(lambda: Lopsided(torch.tanh))
    x, y = data(model, 24)
    plain = Linearisation(hd.Objective(model), x, y)
    balance = balance_products(plain, 0)
    balanced = Linearisation(hd.Objective(model), x, y, balance=balance)
    variance = []
    for linear in (plain, balanced):
        signs = Signs(4)
        draws = torch.stack([flat(Propagator(linear).functional(signs, r)) for r in range(200)])
        variance.append(float(draws.var(0).sum()))
    assert set(balance) == {0}
    assert variance[1] < variance[0] / 2


def test_signs_belong_to_samples_not_to_batches() -> None:
    signs = Signs(9)
    whole = signs.samples(torch.Size((50, 3)), 0, 1, 2, dtype=torch.float32)
    parts = [
        signs.samples(torch.Size((n, 3)), start, 1, 2, dtype=torch.float32)
        for start, n in ((0, 7), (7, BLOCK), (7 + BLOCK, 50 - 7 - BLOCK))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert set(whole.flatten().tolist()) == {1.0, -1.0}
    many = signs.samples(torch.Size((4096, 4)), 0, 5, dtype=torch.float64)
    assert many.mean().abs() < 5 / many.numel() ** 0.5
    correlation = (many.T @ many / len(many)).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / len(many) ** 0.5
    assert len({key(0, a, b) for a in range(50) for b in range(50)}) == 2500


def test_per_sample_diagonals_average_to_the_diagonal() -> None:
    model = seeded(Residual)
    x, y = data(model)
    objective = hd.Objective(model)
    whole = hd.diagonal(objective, [(x[:2], y[:2]), (x[2:], y[2:])])
    single = hd.diagonal(objective, [(x[:2], y[:2]), (x[2:], y[2:])], per_sample=True)
    for name, tensor in whole.total.items():
        assert single.total[name].shape == (6, *tensor.shape)
        assert (single.total[name].mean(0) - tensor).norm() <= 1e-12 * tensor.norm()
