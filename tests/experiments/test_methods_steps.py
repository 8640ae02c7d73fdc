"""Whole training steps against plain loops written from the methods' descriptions, in float64.

The loops share the batches, the noise generators and the loss functions (tested by themselves) with the trainer; order
of passes, modes of BatchNorm, gradients, weight perturbation, averages and schedules are theirs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.config import TrainConfig
from experiments.methods import METHODS, dajat, dkl, mart, trades
from experiments.seeds import generator
from experiments.splitnorm import SplitNorm
from experiments.train import train
from experiments.trainer.images import Images, Sampler, on_device
from experiments.trainer.loop import split_index
from experiments.trainer.rig import build_network
from hessdiag.data.dataset import DataSet, make

EPOCHS, SIZE = 2, 8
CPU = torch.device("cpu")


def images(channels: int = 3, count: int = 16) -> DataSet:
    g = torch.Generator().manual_seed(5)
    x = torch.randint(256, (count, channels, 8, 8), generator=g, dtype=torch.uint8)
    y = torch.arange(count) % 4
    return make(x, y, name="noise", split="train", num_classes=4)


def configuration(method: str, **more: Any) -> TrainConfig:
    table = {
        "method": method,
        "network": "small_resnet",
        "network_options": {"width": 4, "strides": [1]},
        "activation": "silu",
        "data": "digits",
        "epochs": EPOCHS,
        "batch_size": SIZE,
        "lr": 0.1,
        "weight_decay": 0.01,
        "schedule": {"name": "constant", "milestones": [], "factors": []},
        "eps": "0.1",
        "dtype": "float64",
        "watch": {"every": 0},
        "seed": 3,
    }
    return TrainConfig.from_dict(table | more)


class Reference:
    """SGD by hand on a network built the same way."""

    def __init__(self, config: TrainConfig, data: DataSet, views: int = 0) -> None:
        self.config, self.net = config, build_network(config, tuple(data.inputs.shape[1:]), 4)
        pool = on_device(data, config, CPU)
        self.sampler = Sampler(pool, config, split_index(len(pool), config, CPU)[0], views=views)
        self.velocity: dict[int, Tensor] = {}

    def batches(self, epoch: int) -> Any:
        order = self.sampler.order(epoch)
        for step in range(self.sampler.steps):
            views, y = self.sampler.batch(order, epoch, step)
            yield step, views, y, generator("cpu", self.config.seed, "attack", epoch, step)

    def sgd(self, loss: Tensor, parameters: list[Tensor], decay_at: list[Tensor] | None = None) -> None:
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients)):
                g = g + self.config.weight_decay * (p if decay_at is None else decay_at[i])
                v = self.velocity[id(p)] = 0.9 * self.velocity[id(p)] + g if id(p) in self.velocity else g
                p -= self.config.lr * v


def ascend(net: nn.Module, x: Tensor, start: Tensor, loss: Any, *, eps: float, step: float, steps: int) -> Tensor:
    point = start
    for _ in range(steps):
        point = point.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(net(point)), point)
        point = torch.min(torch.max(point + step * g.sign(), x - eps), x + eps).clamp(0, 1)
    return point.detach()


def gauss(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.001 * torch.randn(x.shape, generator=g, dtype=x.dtype)


def kl_to(clean: Tensor) -> Any:
    p = torch.softmax(clean.detach(), 1)
    return lambda z: (p * (p.log() - torch.log_softmax(z, 1))).sum()


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.allclose(got[key].double(), value.double(), rtol=1e-9, atol=1e-9), key


@pytest.mark.parametrize("method", ["trades", "mart"])
def test_trades_and_mart(method: str) -> None:
    data = images()
    config = configuration(method, attack={"steps": 3, "step": "0.04"})
    ref = Reference(config, data)
    net, parameters = ref.net, list(ref.net.parameters())
    for epoch in range(1, EPOCHS + 1):
        for _, (x,), y, g in ref.batches(epoch):
            net.eval()
            with torch.no_grad():
                clean = net(x)
            loss = kl_to(clean) if method == "trades" else lambda z, y=y: F.cross_entropy(z, y, reduction="sum")
            adversarial = ascend(net, x, gauss(x, g), loss, eps=0.1, step=0.04, steps=3)
            net.train()
            if method == "trades":  # three passes, the third as the divergence's target
                first, other, again = net(x), net(adversarial), net(x)
                value = F.cross_entropy(first, y) + trades.loss(again, other, y, beta=6.0)
                value = value - F.cross_entropy(again, y)
            else:
                value = mart.loss(net(x), net(adversarial), y, beta=5.0)
            ref.sgd(value, parameters)
    result = train(config, sets=(data, data), device="cpu")
    same(dict(result.model.state_dict()), dict(net.state_dict()))


@pytest.mark.parametrize("method", ["n_fgsm", "fgsm_rs"])
def test_one_step_methods_craft_in_training_mode(method: str) -> None:
    data, eps = images(), 0.1
    config = configuration(method)
    ref = Reference(config, data)
    net, parameters = ref.net, list(ref.net.parameters())
    net.train()
    for epoch in range(1, EPOCHS + 1):
        for _, (x,), y, g in ref.batches(epoch):
            width = 2 * eps if method == "n_fgsm" else eps
            noise = width * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)
            start = (x + noise).clamp(0, 1).requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(net(start), y), start)  # moves the running statistics
            if method == "n_fgsm":
                point = (start + eps * slope.sign()).clamp(0, 1)
            else:
                delta = (start - x + 1.25 * eps * slope.sign()).clamp(-eps, eps)
                point = (x + delta).clamp(0, 1)
            ref.sgd(F.cross_entropy(net(point.detach()), y), parameters)
    result = train(config, sets=(data, data), device="cpu")
    same(dict(result.model.state_dict()), dict(net.state_dict()))


def perturb(net: nn.Module, loss: Any, gamma: float) -> dict[str, Tensor]:
    """Deltas from a copy in training mode."""
    proxy = copy.deepcopy(net).train()
    named = {n: p for n, p in proxy.named_parameters() if p.dim() > 1 and "weight" in n}
    gradients = torch.autograd.grad(loss(proxy), list(named.values()))
    return {n: gamma * p.detach().norm() * g / g.norm() for (n, p), g in zip(named.items(), gradients)}


def test_dkl_with_class_means_weight_perturbation_and_epoch_average() -> None:
    data = images()
    more = {"awp": {"gamma": 0.01, "start": 2}, "options": {"attack_beta": 1.0}, "epochs": 3}
    config = configuration("dkl", **more, schedule={"name": "constant"})
    ref = Reference(config, data)
    net, parameters = ref.net, list(ref.net.parameters())
    table, average = dict(ref.net.named_parameters()), None
    means = torch.full((4, 4), 0.25, dtype=torch.float64)
    for epoch in range(1, 4):
        sums, eps = torch.zeros(4, 4, dtype=torch.float64), 0.1 * epoch / 3
        for _, (x,), y, g in ref.batches(epoch):
            s = means[y]
            net.eval()
            with torch.no_grad():
                clean = net(x)

            def inner(z: Tensor, clean: Tensor = clean, s: Tensor = s) -> Tensor:
                return dkl.divergence(clean, z, s, alpha=1.0, beta=1.0).sum()

            adversarial = ascend(net, x, gauss(x, g), inner, eps=eps, step=eps / 2, steps=5)

            def loss(n: nn.Module, x: Tensor = x, a: Tensor = adversarial, y: Tensor = y, s: Tensor = s) -> Tensor:
                f = n(x)
                loss.clean = f.detach()  # type: ignore[attr-defined]
                return dkl.loss(f, n(a), y, s, alpha=4.0, beta=20.0)

            net.train()
            deltas = perturb(net, loss, 0.01) if epoch >= 2 else {}
            with torch.no_grad():
                for name, delta in deltas.items():
                    table[name] += delta
            ref.sgd(loss(net), parameters)
            with torch.no_grad():
                for name, delta in deltas.items():
                    table[name] -= delta
            sums.index_add_(0, y, torch.softmax(loss.clean / 4.0, 1))  # type: ignore[attr-defined]
        means = sums / sums.sum(1, keepdim=True)
        state = {k: v.double().clone() for k, v in net.state_dict().items() if v.is_floating_point()}
        average = state if average is None else {k: 0.9 * average[k] + 0.1 * v for k, v in state.items()}
    result = train(config, sets=(data, data), device="cpu")
    assert result.weights == "ema"
    assert average is not None
    got = {k: v for k, v in result.model.state_dict().items() if v.is_floating_point()}
    same(got, average)


def test_only_views_of_its_own_are_autoaugmented_where_a_method_counts_them() -> None:
    """DAJAT without further views is ACAT: its one view is cropped and mirrored, as its first is with two."""
    pool = Images(
        torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        torch.zeros(16, dtype=torch.long), 10, torch.float32,
    )  # fmt: skip

    def views(method: str, count: int, auto: str) -> list[Tensor]:
        table = {"method": method, "data": "cifar10", "network": "resnet18", "augment": {"auto": auto}}
        config = TrainConfig.from_dict(table | ({"options": {"auto_views": count}} if method == "dajat" else {}))
        sampler = Sampler(pool, config, torch.arange(16), views=METHODS[method].extra_views(config.options))
        return sampler.batch(sampler.order(1), 1, 0)[0]

    plain = views("dajat", 0, "none")[0]
    assert [len(views("dajat", count, "before")) for count in (0, 2)] == [1, 3]
    assert torch.equal(views("dajat", 0, "before")[0], plain)
    first, *others = views("dajat", 2, "before")
    assert torch.equal(first, plain)
    assert not any(torch.equal(view, plain) for view in others)
    assert not torch.equal(views("pgd_at", 0, "before")[0], views("pgd_at", 0, "none")[0])


def test_dajat_with_two_sets_of_batchnorm() -> None:
    data = images()
    config = configuration(
        "dajat",
        epochs=4,
        awp={"gamma": 0.01, "start": 2},
        averaging={"tau": 0.9, "after": 0.5, "per": "iteration"},
        schedule={"name": "cosine"},
        attack={"budget": "as_published"},
    )
    ref = Reference(config, data, views=2)
    base = ref.net
    auto = copy.deepcopy(base)  # shares everything but its BatchNorms
    for name, module in base.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parent, _, leaf = name.rpartition(".")
            setattr(auto.get_submodule(parent), leaf, module)
    own = [p for p in auto.parameters() if not any(p is q for q in base.parameters())]
    parameters, table = [*base.parameters(), *own], dict(base.named_parameters())
    budgets = {1: (2, 1.0), 2: (3, 2 / 3), 3: (4, 0.5), 4: (5, 0.5)}
    average: dict[str, Tensor] | None = None
    for epoch in range(1, 5):
        eps, (steps, share) = 0.1 * epoch / 4, budgets[epoch]
        lr = 0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (epoch - 1) / 4, dtype=torch.float64)).item())
        ref.config = config.replace({"lr": lr})
        if epoch == 3:
            average = {k: v.clone() for k, v in base.state_dict().items()}
        for _, views, y, g in ref.batches(epoch):
            base.eval(), auto.eval()
            nets, crafted = [base, auto, auto], []
            starts = [gauss(views[0], g), *gauss(torch.cat(views[1:]), g).split(SIZE)]
            for net, x, start in zip(nets, views, starts):
                with torch.no_grad():
                    target = kl_to(net(x))
                crafted.append(ascend(net, x, start, target, eps=eps, step=share * eps, steps=steps))
            base.train(), auto.train()

            def plain(n: nn.Module, x: Tensor = views[0], a: Tensor = crafted[0], y: Tensor = y) -> Tensor:
                return trades.loss(n(x), n(a), y, beta=11.0)

            deltas = perturb(base, plain, 0.01) if epoch >= 2 else {}
            with torch.no_grad():
                for name, delta in deltas.items():
                    table[name] += delta
            clean, other = [], []
            for net, x, a in zip(nets, views, crafted):
                clean.append(net(x))
                other.append(net(a))
            ref.sgd(dajat.loss(clean, other, y, beta=11.0, js_weight=2.0), parameters)
            with torch.no_grad():
                for name, delta in deltas.items():
                    table[name] -= delta
            if average is not None:
                for k, v in base.state_dict().items():
                    average[k] = 0.9 * average[k] + 0.1 * v if v.is_floating_point() else v.clone()
    result = train(config, sets=(data, data), device="cpu")
    assert average is not None
    assert result.weights == "ema"
    same(dict(result.model.state_dict()), average)


def test_split_norm_moves_its_own_statistics_only() -> None:
    config = configuration("dajat")
    net = build_network(config, (3, 8, 8), 4)
    split = SplitNorm(net).train()
    before = {k: v.clone() for k, v in split.state_dict().items()}
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    base = split(x)
    after_base = {k for k, v in split.state_dict().items() if not torch.equal(v, before[k])}
    assert after_base
    assert all((k.startswith("network.") and "running" in k) or "num_batches" in k for k in after_base)
    assert torch.allclose(split(x, "auto"), base)  # the copies begin as they are
    changed = {k for k, v in split.state_dict().items() if k.startswith("auto.") and not torch.equal(v, before[k])}
    assert len(changed) == len(after_base)


def test_attacks_leave_no_gradient_and_no_statistics_behind() -> None:
    config = configuration("pgd_at", attack={"bn": "eval", "steps": 2})
    from experiments.schedules import Budget
    from experiments.trainer.crafting import Crafter
    from experiments.trainer.rig import build

    rig = build(config, (3, 8, 8), 4, CPU)
    rig.model.train()
    before = {k: v.clone() for k, v in rig.model.state_dict().items()}
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)
    Crafter(rig)([x], torch.arange(4), budget=Budget(0.1, 2, 0.05), generator=noise)
    assert all(torch.equal(v, before[k]) for k, v in rig.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in rig.model.parameters())
    assert rig.model.training
