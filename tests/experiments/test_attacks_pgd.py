"""PGD and its one-step cousins: against plain float64 loops, against a known optimum, and without a trace."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.attacks import clean_logits, compiled_ascent, fgsm_rs, n_fgsm, pgd
from experiments.attacks.losses import dlr_targeted, kl_to_clean, margin
from experiments.attacks.pgd import starting_point
from hessdiag.errors import (
    ConfigurationError,
    DataError,
    HessdiagError,
    NonFiniteError,
    UnknownNameError,
)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 5)).double()
    net(torch.rand(64, 1, 8, 8, dtype=torch.float64))
    return net


def images(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (count,), generator=generator)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def project(points: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.min(torch.max(points, x - eps), x + eps).clamp(0, 1)


def loop(
    net: nn.Module,
    x: Tensor,
    start: Tensor,
    eps: float,
    step: float,
    steps: int,
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    points = start
    for _ in range(steps):
        points = points.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(net(points)), points)
        points = project(points.detach() + step * gradient.sign(), x, eps)
    return points


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_trades_attack_against_a_loop() -> None:
    net, (x, y) = small_net(), images()
    clean = F.softmax(net.eval()(x), 1).detach()
    start = x + 0.001 * torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    expected = loop(net, x, start, 0.1, 0.02, 10, lambda f: F.kl_div(F.log_softmax(f, 1), clean, reduction="sum"))
    options = {"eps": 0.1, "step": 0.02, "steps": 10, "start": "gauss", "loss": "kl"}
    close(pgd(net.train(), x, y, generator=seeded(), **options), expected)
    close(pgd(net, x, None, generator=seeded(), **options), expected)
    cached = clean_logits(net, x)
    close(pgd(net, x, cached, generator=seeded(), **options), expected)
    assert not torch.equal(clean_logits(net, x, bn="train"), cached)


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_madry_attack_against_a_loop_in_both_modes(bn: str) -> None:
    net, (x, y) = small_net(), images()
    start = (x + 0.1 * (2 * torch.rand(x.shape, generator=seeded(), dtype=x.dtype) - 1)).clamp(0, 1)
    expected = loop(net.train(bn == "train"), x, start, 0.1, 0.03, 7, lambda f: F.cross_entropy(f, y, reduction="sum"))
    found = pgd(small_net().train(bn == "eval"), x, y, eps=0.1, step=0.03, steps=7, generator=seeded(), bn=bn)
    close(found, expected)


def test_as_is_takes_the_mode_as_it_stands() -> None:
    net, (x, y) = small_net(), images()
    options = {"eps": 0.1, "step": 0.03, "steps": 3, "start": "none"}
    for mode in (True, False):
        named = pgd(net, x, y, bn="train" if mode else "eval", **options)
        close(pgd(net.train(mode), x, y, bn="as_is", **options), named)


def test_callable_loss_gets_its_target_unread() -> None:
    net, (x, y) = small_net().eval(), images()
    other = y.roll(1)

    def loss(f: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(f, target[0], reduction="none") + 0.5 * F.cross_entropy(f, target[1], reduction="none")

    expected = loop(net, x, x, 0.1, 0.05, 3, lambda f: loss(f, (y, other)).sum())
    close(pgd(net, x, (y, other), eps=0.1, step=0.05, steps=3, start="none", loss=loss), expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 8, 8), (3, 4, 6)])
@pytest.mark.parametrize("batch", [1, 2, 17])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_linear_model_is_attacked_to_its_optimum(shape: tuple[int, ...], batch: int, loss: str) -> None:
    torch.manual_seed(batch)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2)).double()
    x, y = torch.rand(batch, *shape, dtype=torch.float64), torch.randint(2, (batch,))
    w = net[1].weight.detach()
    best = (x + 0.07 * (w[1 - y] - w[y]).sign().reshape(x.shape)).clamp(0, 1)
    for start in ("uniform", "gauss", "none"):
        found = pgd(net, x, y, eps=0.07, step=0.02, steps=12, start=start, loss=loss, generator=seeded())
        torch.testing.assert_close(found, best, rtol=0, atol=1e-15)


def test_losses_against_their_formulas() -> None:
    f = torch.randn(6, 5, generator=seeded(), dtype=torch.float64)
    g = torch.randn(6, 5, generator=seeded(4), dtype=torch.float64)
    y, t = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 0, 4, 2, 3, 4])
    for i in range(6):
        z, ordered = f[i].tolist(), sorted(f[i].tolist(), reverse=True)
        p, q = g[i].softmax(0), f[i].softmax(0)
        others = [z[k] for k in range(5) if k != y[i]]
        close(margin(f, y)[i], torch.tensor(max(others) - z[y[i]], dtype=torch.float64))
        close(kl_to_clean(f, g)[i], (p * (p / q).log()).sum())
        ratio = -(z[y[i]] - z[t[i]]) / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)
        close(dlr_targeted(f, (y, t))[i], torch.tensor(ratio, dtype=torch.float64))


def test_given_start_and_the_gaussian_start_are_not_clamped_first() -> None:
    x = torch.zeros(4, 1, 8, 8)
    gauss = starting_point(x, "gauss", 0.1, seeded())
    assert gauss.min() < 0
    assert 0.0008 < gauss.std() < 0.0012
    uniform = starting_point(x + 0.5, "uniform", 0.1, seeded())
    assert 0.09 < (uniform - 0.5).abs().max() <= 0.1
    given = torch.full_like(x, 3.0)
    assert torch.equal(starting_point(x, given, 0.1, None), given)
    assert starting_point(x, "uniform", 0.1, seeded()).min() == 0


def test_eps_and_step_as_text_fraction_or_tensor_are_the_same() -> None:
    net, (x, y) = small_net(), images()
    options = {"steps": 3, "start": "none"}
    expected = pgd(net, x, y, eps=8 / 255, step=2 / 255, **options)
    assert torch.equal(pgd(net, x, y, eps="8/255", step="2/255", **options), expected)
    assert torch.equal(pgd(net, x, y, eps=Fraction(8, 255), step=Fraction(2, 255), **options), expected)
    eps, step = (torch.tensor(value / 255, dtype=torch.float64) for value in (8, 2))
    assert torch.equal(pgd(net, x, y, eps=eps, step=step, **options), expected)
    per_sample = torch.linspace(0, 0.2, len(x), dtype=torch.float64).view(-1, 1, 1, 1)
    found = pgd(net, x, y, eps=per_sample, step=per_sample, **options)
    reached = (found - x).abs().flatten(1).amax(1)
    assert torch.all(reached <= per_sample.flatten() + 1e-15)
    assert torch.all(reached[1:] > 0.5 * per_sample.flatten()[1:])


def n_fgsm_by_hand(net: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    eta = 2 * eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
    eta = torch.max(torch.min(eta, 1 - x), 0 - x).requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(net(x + eta), y), eta)
    delta = eta.detach() + eps * g.sign()
    return x + torch.max(torch.min(delta, 1 - x), 0 - x)


def fgsm_rs_by_hand(net: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    delta = eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
    delta = torch.max(torch.min(delta, 1 - x), 0 - x).requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(net(x + delta), y), delta)
    delta = (delta.detach() + 1.25 * eps * g.sign()).clamp(-eps, eps)
    return x + torch.max(torch.min(delta, 1 - x), 0 - x)


@pytest.mark.parametrize(("attack", "by_hand"), [(fgsm_rs, fgsm_rs_by_hand), (n_fgsm, n_fgsm_by_hand)])
def test_one_step_attacks_against_their_published_steps(attack: Callable, by_hand: Callable) -> None:
    net, twin, (x, y) = small_net().train(), small_net().train(), images()
    found = attack(net, x, y, eps=0.1, generator=seeded())
    close(found, by_hand(twin, x, y, 0.1, seeded()))
    # BatchNorm trains in these attacks, and its running statistics stand as they would have.
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value)
    before = net[1].running_mean.clone()
    attack(net, x, y, eps=0.1, generator=seeded(), keep_statistics=False)
    assert torch.equal(net[1].running_mean, before)
    inside = attack(net, x, y, eps=0.1, generator=seeded(), bn="eval")
    close(inside, by_hand(net.eval(), x, y, 0.1, seeded()))


def test_reach_of_the_one_step_attacks() -> None:
    net, (x, y) = small_net(), images()
    x = 0.5 + 0.01 * x
    assert (fgsm_rs(net, x, y, eps=0.1, generator=seeded()) - x).abs().max() <= 0.1 + 1e-15
    wide = (n_fgsm(net, x, y, eps=0.1, generator=seeded()) - x).abs().max()
    assert 0.25 < wide <= 0.3 + 1e-15
    assert (fgsm_rs(net, x, y, eps=0.1, generator=seeded(), step=0.0) - x).abs().max() <= 0.1
    assert 0.15 < (n_fgsm(net, x, y, eps=0.1, generator=seeded(), step=0.0) - x).abs().max() <= 0.2


@pytest.mark.parametrize("bn", ["eval", "train", "as_is"])
def test_the_model_is_handed_back_as_it_came(bn: str) -> None:
    net, (x, y) = small_net().train(), images()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4](torch.ones(1, 144, dtype=torch.float64)).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradient = net[4].weight.grad.clone()
    state, labels, inputs = torch.get_rng_state(), y.clone(), x.clone()
    for loss in ("ce", "kl"):
        pgd(net, x, y, eps=0.1, step=0.05, steps=2, generator=seeded(), loss=loss, bn=bn)
    assert [m.training for m in net.modules()] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net[4].weight.grad, gradient)
    assert net[0].bias.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, inputs)
    assert torch.equal(y, labels)
    pgd(net, x, y, eps=0.1, step=0.05, steps=2, generator=seeded(), bn="train", keep_statistics=True)
    assert int(net[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 2


def test_ball_and_range_and_seed() -> None:
    net, (x, y) = small_net().float(), images()
    x = x.float()
    options = {"eps": "8/255", "step": "2/255", "steps": 10}
    first = pgd(net, x, y, generator=seeded(5), **options)
    assert (first - x).abs().max() <= 8 / 255 + 1e-6
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(pgd(net, x, y, generator=seeded(5), **options), first)
    assert not torch.equal(pgd(net, x, y, generator=seeded(6), **options), first)


def test_bfloat16_autocast_keeps_images_in_float32_and_the_loss_high() -> None:
    net, (x, y) = small_net().float().eval(), images(200)
    x = x.float()
    options = {"eps": 0.1, "step": 0.025, "steps": 10}
    half = pgd(net, x, y, generator=seeded(), autocast=torch.bfloat16, **options)
    full = pgd(net, x, y, generator=seeded(), **options)
    assert half.dtype == torch.float32
    assert (half - x).abs().max() <= 0.1 + 1e-6
    before, at_half, at_full = (F.cross_entropy(net(z), y).item() for z in (x, half, full))
    assert at_half - before > 0.95 * (at_full - before) > 0
    assert clean_logits(net, x, autocast=torch.bfloat16).dtype == torch.float32


def test_forward_replaces_the_model_that_is_handed_back() -> None:
    net, (x, y) = small_net().train(), images()
    seen = []

    def forward(z: Tensor) -> Tensor:
        seen.append(net.training)
        return -net(z)

    found = pgd(net, x, y, eps=0.1, step=0.05, steps=2, start="none", forward=forward)
    assert seen == [False, False]
    assert net.training
    close(found, loop(net.eval(), x, x, 0.1, 0.05, 2, lambda f: F.cross_entropy(-f, y, reduction="sum")))


def test_the_compiled_loop_gives_the_same_images() -> None:
    net, (x, y) = small_net(), images()
    ascent = compiled_ascent(backend="aot_eager")
    for scale in (1.0, 0.5):
        eps, step = torch.tensor(0.1 * scale), torch.tensor(0.03 * scale)
        options = {"eps": eps, "step": step, "steps": 3, "start": "none"}
        close(pgd(net, x, y, ascent=ascent, **options), pgd(net, x, y, **options))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"eps": 1.5}, ConfigurationError, "[0, 1]"),
        ({"eps": "255"}, ConfigurationError, "[0, 1]"),
        ({"eps": float("nan")}, ConfigurationError, "[0, 1]"),
        ({"eps": -0.1}, ConfigurationError, "[0, 1]"),
        ({"eps": torch.tensor(1.5)}, ConfigurationError, "[0, 1]"),
        ({"eps": "eight"}, ConfigurationError, "must be a number"),
        ({"steps": 0}, ConfigurationError, "at least 1"),
        ({"start": "uniforn"}, UnknownNameError, "did you mean 'uniform'"),
        ({"start": "uniform"}, ConfigurationError, "generator="),
        ({"start": torch.zeros(1)}, ConfigurationError, "shape [1]"),
        ({"loss": "cee"}, UnknownNameError, "did you mean 'ce'"),
        ({"loss": lambda f, y: f.sum()}, ConfigurationError, "one value per sample"),
        ({"bn": "evaluation"}, UnknownNameError, "known: eval, train, as_is"),
        ({"x": -1.0}, DataError, "normalise inside the model"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict, error: type, says: str) -> None:
    net, (x, y) = small_net(), images()
    options = {"eps": 0.1, "step": 0.05, "steps": 2, "start": "none", **change}
    shift = options.pop("x", 0.0)
    with pytest.raises(error) as caught:
        pgd(net, x + shift, y, **options)
    assert isinstance(caught.value, HessdiagError)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nan_logits_are_named_unless_the_check_is_waived() -> None:
    net, (x, y) = small_net(), images()
    with torch.no_grad():
        net[4].weight[0, 0] = torch.nan
    options = {"eps": 0.1, "step": 0.05, "generator": seeded()}
    with pytest.raises(NonFiniteError, match="10 of 10 samples"):
        pgd(net, x, y, steps=2, **options)
    with pytest.raises(NonFiniteError, match="FGSM"):
        n_fgsm(net, x, y, eps=0.1, generator=seeded())
    assert pgd(net, x, y, steps=2, check=False, **options).isfinite().all()
