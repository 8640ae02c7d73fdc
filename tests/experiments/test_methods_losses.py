"""Each training loss against a few lines of its published formula in float64: value, gradient, what is detached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.methods import dajat, dkl, mart, pgd_at, standard, trades
from experiments.methods.base import kl

B, C = 7, 5


def logits(seed: int, classes: int = C) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    f = (3 * torch.randn(B, classes, generator=g, dtype=torch.float64)).requires_grad_()
    a = (3 * torch.randn(B, classes, generator=g, dtype=torch.float64)).requires_grad_()
    return f, a, torch.randint(classes, (B,), generator=g)


def softmax(z: Tensor) -> Tensor:
    e = (z - z.max(1, keepdim=True).values.detach()).exp()
    return e / e.sum(1, keepdim=True)


def nll(z: Tensor, y: Tensor) -> Tensor:
    return -softmax(z)[torch.arange(len(z)), y].log()


def agree(mine: Tensor, reference: Tensor, *inputs: Tensor) -> None:
    assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(mine, inputs, allow_unused=True, retain_graph=True)
    want = torch.autograd.grad(reference, inputs, allow_unused=True)
    for x, y in zip(got, want):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert torch.allclose(x, y, rtol=1e-10, atol=1e-10)


def test_cross_entropy_losses() -> None:
    f, a, y = logits(0)
    agree(standard.loss(f, y), nll(f, y).mean(), f)
    agree(pgd_at.loss(a, y), nll(a, y).mean(), a)


def test_trades_gradient_reaches_both_sides_of_the_divergence() -> None:
    f, a, y = logits(1)
    p, q = softmax(f), softmax(a)
    reference = nll(f, y).mean() + 6.0 * (p * (p.log() - q.log())).sum() / B
    agree(trades.loss(f, a, y, beta=6.0), reference, f, a)
    detached = nll(f, y).mean() + 6.0 * (p.detach() * (p.detach().log() - q.log())).sum() / B
    mine = torch.autograd.grad(trades.loss(f, a, y, beta=6.0), f)[0]
    assert (mine - torch.autograd.grad(detached, f)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", [2, 3])
def test_mart(seed: int) -> None:
    f, a, y = logits(seed)
    p, q, rows = softmax(f), softmax(a), torch.arange(B)
    rival = q.masked_fill(F.one_hot(y, C).bool(), -1).max(1).values
    boosted = -q[rows, y].log() - (1.0001 - rival + 1e-12).log()
    divergence = (p * (p.log() - (q + 1e-12).log())).sum(1)
    reference = boosted.mean() + 5.0 * (divergence * (1.0000001 - p[rows, y])).sum() / B
    agree(mart.loss(f, a, y, beta=5.0), reference, f, a)


def dkl_reference(f: Tensor, a: Tensor, s: Tensor, alpha: float, beta: float) -> Tensor:
    """The published form with its B x C x C tensor."""
    df, da = f[:, :, None] - f[:, None, :], a[:, :, None] - a[:, None, :]
    weights = s[:, :, None] * s[:, None, :]
    wmse = (weights * (df - da) ** 2).sum((1, 2)).mean() / 4
    return beta * wmse + alpha * -(softmax(f).detach() * softmax(a).log()).sum(1).mean()


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_dkl_and_its_linear_form(classes: int) -> None:
    f, a, y = logits(4, classes)
    s = torch.softmax(torch.randn(B, classes, generator=torch.Generator().manual_seed(9), dtype=torch.float64), 1)
    s.requires_grad_()
    mine = dkl.loss(f, a, y, s, alpha=4.0, beta=20.0)
    agree(mine, nll(f, y).mean() + dkl_reference(f, a, s.detach(), 4.0, 20.0), f, a)
    assert torch.autograd.grad(dkl.loss(f, a, y, s, alpha=4.0, beta=20.0), s, allow_unused=True)[0] is None


def test_wmse_is_half_the_variance_of_the_logit_difference() -> None:
    f, a, _ = logits(5)
    s = torch.full((B, C), 1 / C, dtype=torch.float64)
    expected = 0.5 * (f - a).var(1, unbiased=False)
    assert torch.allclose(dkl.weighted_mse(f, a, s), expected, rtol=1e-12)
    shifted = dkl.weighted_mse(f + 1e6, a, s)  # a common shift of the logits changes nothing and cancels no digits
    assert torch.allclose(shifted, expected, rtol=1e-8)


def test_dkl_detaches_the_clean_side_of_its_cross_entropy_only() -> None:
    f, a, _y = logits(6)
    s = torch.softmax(f.detach(), 1)
    soft = dkl.soft_cross_entropy(f, a).sum()
    assert torch.autograd.grad(soft, f, allow_unused=True)[0] is None
    both = torch.autograd.grad(dkl.weighted_mse(f, a, s).sum(), (f, a))
    assert torch.allclose(both[0], -both[1])
    assert both[0].abs().max() > 1e-3


def test_class_means_are_those_of_the_previous_epoch() -> None:
    means = dkl.ClassMeans(3, temperature=2.0, device=torch.device("cpu"), dtype=torch.float64)
    y = torch.tensor([0, 1, 0])
    assert torch.equal(means.of(y), torch.full((3, 3), 1 / 3, dtype=torch.float64))
    f = torch.tensor([[1.0, 2, 0], [0, 1, 4], [3, 0, 0]], dtype=torch.float64)
    means.add(f[:2], y[:2])
    means.add(f[2:], y[2:])
    assert torch.equal(means.rows, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    means.turn()
    p = softmax(f / 2)
    expected = torch.stack([(p[0] + p[2]) / 2, p[1], torch.full((3,), 1 / 3, dtype=torch.float64)])
    assert torch.allclose(means.rows, expected, rtol=1e-12)
    assert not means.sums.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dajat(smoothing: float) -> None:
    views = [logits(seed) for seed in (10, 11, 12)]
    clean, adversarial, y = [v[0] for v in views], [v[1] for v in views], views[0][2]
    target = torch.full((B, C), smoothing / (C - 1), dtype=torch.float64)
    target[torch.arange(B), y] = 1 - smoothing
    per_view, probabilities = [], [softmax(f) for f in clean]
    for f, a in zip(clean, adversarial):
        p, q = softmax(f), softmax(a)
        per_view.append(-(target * p.log()).sum(1).mean() + 11.0 * (p * (p / q).log()).sum(1).mean())
    m = sum(probabilities) / 3
    js = sum((p * (p / m.clamp(1e-7, 1)).log()).sum(1).mean() for p in probabilities) / 3
    reference = sum(per_view) / 3 + 2.0 * js
    mine = dajat.loss(clean, adversarial, y, beta=11.0, js_weight=2.0, smoothing=smoothing)
    agree(mine, reference, *clean, *adversarial)


def test_dajat_clamps_the_mixture() -> None:
    f = torch.tensor([[0.0, -30.0]], dtype=torch.float64)
    m = torch.softmax(f, 1).clamp(1e-7, 1)
    expected = (torch.softmax(f, 1) * (torch.log_softmax(f, 1) - m.log())).sum()
    assert torch.allclose(dajat.js_divergence([f, f]), expected, rtol=1e-12)


def test_dajat_with_one_view_is_trades() -> None:
    f, a, y = logits(13)
    mine = dajat.loss([f], [a], y, beta=6.0, js_weight=2.0)
    agree(mine, trades.loss(f, a, y, beta=6.0), f, a)


def test_kl_stays_finite_where_probabilities_underflow() -> None:
    f = torch.tensor([[800.0, -800.0]], requires_grad=True)
    a = torch.tensor([[-800.0, 800.0]], requires_grad=True)
    value = kl(f, a).sum()
    assert value.item() == pytest.approx(1600.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (f, a)))
