"""Spelled-out perturbations, noise keyed by sample, and models handed back as they came."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from hessdiag.errors import (
    ConfigurationError,
    DataError,
    EmptyDataError,
    NonFiniteError,
    UnknownNameError,
)
from hessdiag.problem.ascent import check_box, handed_back, project_linf
from hessdiag.problem.perturbation import (
    PGDSpec,
    fraction,
    keyed_pgd,
    keyed_uniform,
    parse_pgd,
    perturb_batches,
)


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()


def images(count: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (count,), generator=generator)


def test_spec_keeps_its_text_and_gives_exact_values() -> None:
    spec = parse_pgd("pgd:eps=8/255,steps=10")
    assert spec == PGDSpec(eps="8/255", steps=10, step="2/255", seed=0)
    assert spec.radius == 8 / 255
    assert spec.step_size == 2 / 255
    full = parse_pgd(" pgd: eps=0.031 , steps=7, step=0.007, seed=42 ")
    assert (full.eps, full.step, full.steps, full.seed) == ("0.031", "0.007", 7, 42)
    assert parse_pgd(str(full)) == full
    assert fraction("1e-2") == Fraction(1, 100)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pdg:eps=8/255,steps=10", "did you mean 'pgd'"),
        ("pgd", "lacks eps"),
        ("pgd:eps=8/255", "lacks steps"),
        ("pgd:steps=10", "lacks eps"),
        ("pgd:epsilon=8/255,steps=10", "did you mean 'eps'"),
        ("pgd:eps=8/255,steps=10,eps=1/255", "given twice"),
        ("pgd:eps=,steps=10", "no value"),
        ("pgd:eps,steps=10", "no value"),
        ("pgd:eps=8/0,steps=10", "eps must be a number"),
        ("pgd:eps=nan,steps=10", "eps must be a number"),
        ("pgd:eps=-8/255,steps=10", "eps must be a number"),
        ("pgd:eps=1e999999999,steps=10", "eps must be a number"),
        ("pgd:eps=8,steps=10", "(0, 1]"),
        ("pgd:eps=0,steps=10", "(0, 1]"),
        ("pgd:eps=8/255,steps=0", "steps must lie"),
        ("pgd:eps=8/255,steps=1.5", "whole number"),
        ("pgd:eps=8/255,steps=10,step=0", "step must lie"),
        ("pgd:eps=8/255,steps=10,seed=-1", "whole number"),
        ("pgd:eps=8/255,steps=10,seed=99999999999999999999", "seed must lie"),
    ],
)
def test_bad_specs_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_pgd(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_noise_of_a_sample_depends_on_seed_stream_and_index_alone() -> None:
    whole = keyed_uniform(range(10), (2, 3), seed=5)
    mixed = keyed_uniform([7, 0, 3], (2, 3), seed=5)
    assert torch.equal(mixed, whole[[7, 0, 3]])
    # A longer sample begins with the same numbers: nothing of the shape enters the key.
    assert torch.equal(keyed_uniform([4], (3,), seed=5)[0], whole[4].flatten()[:3])
    for other in (
        keyed_uniform(range(10), (2, 3), seed=6),
        keyed_uniform(range(10), (2, 3), seed=5, stream=1),
        keyed_uniform(range(1, 11), (2, 3), seed=5),
    ):
        assert not torch.any(other == whole)
    assert keyed_uniform([0], (1,), seed=2**32).item() != keyed_uniform([0], (1,), seed=0).item()


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds of Philox-4x64 as its authors define it (Salmon et al. 2011), in whole numbers of Python."""
    mask, (a, b, c, d), (k, m) = 2**64 - 1, counter, key
    for _ in range(10):
        p, q = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (q >> 64) ^ b ^ k, q & mask, (p >> 64) ^ d ^ m, p & mask
        k, m = (k + 0x9E3779B97F4A7C15) & mask, (m + 0xBB67AE8584CAA73B) & mask
    return [a, b, c, d]


@pytest.mark.parametrize(("seed", "index", "stream"), [(0, 0, 0), (7, 123456, 2), (2**63 + 5, 2**40, 9)])
def test_noise_is_philox_of_the_documented_key_and_counter(seed: int, index: int, stream: int) -> None:
    # numpy counts up before the first block.
    blocks = [philox([n, 0, stream, 0], [seed, index]) for n in (1, 2)]
    expected = [(word >> 11) * 2.0**-52 - 1.0 for block in blocks for word in block]
    found = keyed_uniform([index], (8,), seed=seed, stream=stream)[0]
    assert found.tolist() == expected


@pytest.mark.statistical
def test_noise_is_uniform() -> None:
    """Mean, variance and correlation of neighbours by z-tests at 5 sigma: false alarm 1.7e-6."""
    u = keyed_uniform(range(300), (1, 16, 16), seed=11).flatten(1).numpy()
    n = u.size
    assert u.min() >= -1.0
    assert u.max() < 1.0
    z_mean = u.mean() / np.sqrt(1 / 3 / n)
    z_variance = ((u**2).mean() - 1 / 3) / np.sqrt(4 / 45 / n)
    z_neighbours = (u[1:] * u[:-1]).mean() / np.sqrt(1 / 9 / u[1:].size)
    assert max(abs(z_mean), abs(z_variance), abs(z_neighbours)) < 5.0


def test_noise_refuses_what_is_no_key() -> None:
    for bad in ({"seed": -1}, {"seed": 2**64}, {"seed": 0, "stream": -1}):
        with pytest.raises(ConfigurationError):
            keyed_uniform([0], (2,), **bad)
    with pytest.raises(ConfigurationError):
        keyed_uniform([-1], (2,), seed=0)


@pytest.mark.parametrize("batch", [1, 3, 5, 12])
def test_neither_batching_nor_order_changes_the_perturbation(batch: int) -> None:
    net, (x, y), spec = small_net(), images(), parse_pgd("pgd:eps=0.1,steps=7,seed=3")
    whole = keyed_pgd(net, x, y, range(12), spec)
    parts = perturb_batches(net, list(zip(x.split(batch), y.split(batch), strict=True)), spec)
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), whole, rtol=0, atol=1e-12)
    assert torch.equal(torch.cat([labels for _, labels in parts]), y)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(batch))
    shuffled = keyed_pgd(net, x[order], y[order], order.tolist(), spec)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 8, 8)])
def test_a_linear_model_is_attacked_to_its_optimum(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2)).double()
    x, y = torch.rand(6, *shape, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    weight = net[1].weight
    direction = (weight[1 - y] - weight[y]).sign().reshape(x.shape).detach()
    found = keyed_pgd(net, x, y, range(6), parse_pgd("pgd:eps=0.07,steps=30"))
    torch.testing.assert_close(found, (x + 0.07 * direction).clamp(0, 1), rtol=0, atol=1e-15)


def test_another_loss_and_the_default_agree_with_a_loop() -> None:
    net, (x, y) = small_net().eval(), images()
    spec = parse_pgd("pgd:eps=0.1,steps=4,step=0.04,seed=9")
    losses = {
        "ce": lambda f, t: nn.functional.cross_entropy(f, t, reduction="none"),
        "square": lambda f, t: (f**2).sum(1) + 0 * t,
    }
    for name, loss in losses.items():
        points = (x + 0.1 * keyed_uniform(range(12), (1, 8, 8), seed=9)).clamp(0, 1)
        for _ in range(4):
            points.requires_grad_(True)
            (g,) = torch.autograd.grad(loss(net(points), y).mean(), points)
            points = torch.min(torch.max(points.detach() + 0.04 * g.sign(), x - 0.1), x + 0.1).clamp(0, 1)
        options = {} if name == "ce" else {"loss": loss}
        torch.testing.assert_close(keyed_pgd(net, x, y, range(12), spec, **options), points, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train", "as_is"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_model_is_handed_back_as_it_came(mode: str, keep: bool) -> None:
    net, (x, _) = small_net(), images()
    net.train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net(x).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = {name: p.grad if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    modes, wants = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    with handed_back(net, mode=mode, keep_statistics=keep):
        expected = {"eval": False, "train": True, "as_is": True}[mode]
        assert net.training == expected
        assert not any(p.requires_grad for p in net.parameters())
        net(x)
        moved = not torch.equal(net[1].running_mean, before["1.running_mean"])
        assert moved == (mode == "train")
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == wants
    for name, value in net.state_dict().items():
        stands = mode == "train" and keep and name.startswith("1.") and ("running" in name or "num" in name)
        assert torch.equal(value, before[name]) != stands, name
    for name, p in net.named_parameters():
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or torch.equal(p.grad, grads[name])


def test_the_model_is_handed_back_even_when_crafting_fails() -> None:
    net = small_net().train()
    with pytest.raises(RuntimeError, match="inside"), handed_back(net, mode="eval"):
        raise RuntimeError("inside")
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(UnknownNameError, match="did you mean 'eval'"), handed_back(net, mode="evl"):
        pass


def test_crafting_leaves_inputs_and_the_global_generator_alone() -> None:
    net, (x, y) = small_net(), images()
    x.requires_grad_(True)
    copy, state = x.detach().clone(), torch.get_rng_state()
    found = keyed_pgd(net, x, y, range(12), parse_pgd("pgd:eps=0.1,steps=2"))
    assert torch.equal(x.detach(), copy)
    assert x.grad is None
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_inputs_are_named() -> None:
    net, (x, y), spec = small_net(), images(), parse_pgd("pgd:eps=0.1,steps=2")
    with pytest.raises(DataError, match=r"found \[0.*normalise inside"):
        keyed_pgd(net, x + 0.5, y, range(12), spec)
    with pytest.raises(DataError, match="batch 1"):
        perturb_batches(net, [(x, y), (x - 1, y)], spec)
    with pytest.raises(DataError, match="divide bytes by 255"):
        check_box((x * 255).byte())
    with pytest.raises(DataError, match="nan"):
        check_box(torch.full((2, 3), torch.nan))
    with pytest.raises(EmptyDataError):
        check_box(x[:0])
    with pytest.raises(EmptyDataError):
        perturb_batches(net, [], spec)
    with pytest.raises(ConfigurationError, match="3 sample indices for 12"):
        keyed_pgd(net, x, y, range(3), spec)
    with pytest.raises(ConfigurationError, match="one value per sample"):
        keyed_pgd(net, x, y, range(12), spec, loss=lambda f, t: f.sum())


def test_nan_is_named_and_not_taken_for_a_flat_loss() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = torch.ones(len(x), 1, dtype=x.dtype)
            scale[4] = torch.nan
            return scale * x.flatten(1)[:, :5]

    x, y = images()
    with pytest.raises(NonFiniteError, match=r"1 of 12 samples \(first: 4\).*pgd:eps=0.1"):
        keyed_pgd(Broken(), x, y, range(12), parse_pgd("pgd:eps=0.1,steps=2"))


def test_projection_lands_in_ball_and_box() -> None:
    x, _ = images()
    points = project_linf(x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), x, 0.2)
    assert (points - x).abs().max() <= 0.2 + 1e-15
    assert points.min() >= 0
    assert points.max() <= 1
    inside = (x + 0.01).clamp(0, 1)
    assert torch.equal(project_linf(inside, x, 0.2), inside)
