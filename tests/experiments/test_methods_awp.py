"""Adversarial weight perturbation: norm ratio, exact restore, and the public order of operations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.methods.averaging import Average
from experiments.methods.awp import Perturbed, ascent, buffers_kept, perturbation, perturbed_parameters
from experiments.parts import Averaging
from hessdiag import networks


def small(seed: int = 0) -> nn.Module:
    net = networks.build("small_resnet", activation="silu", width=4, strides=(1,), seed=seed)
    return net.double()


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(6, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (6,), generator=g)


def test_what_is_perturbed() -> None:
    net = small()
    chosen = {name for name, p in net.named_parameters() if any(p is q for q in perturbed_parameters(net))}
    assert chosen == {"conv1.weight", "blocks.0.conv1.weight", "blocks.0.conv2.weight", "linear.weight"}


def test_norm_ratio_and_direction() -> None:
    net, (x, y) = small(), data()
    weights = perturbed_parameters(net)
    deltas = ascent(net, weights, 0.01, lambda: F.cross_entropy(net(x), y))
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), weights)
    for w, d, g in zip(weights, deltas, gradients):
        assert (d.norm() / w.norm()).item() == pytest.approx(0.01, rel=1e-10)
        assert torch.allclose(d / d.norm(), g / g.norm(), atol=1e-12)


def test_a_zero_gradient_gives_no_perturbation() -> None:
    (delta,) = perturbation([torch.ones(2, 2)], [torch.zeros(2, 2)], 0.01)
    assert not delta.any()


def test_restore_is_exact_in_float32() -> None:
    net = small().float()
    weights = perturbed_parameters(net)
    before = [w.detach().clone() for w in weights]
    g = torch.Generator().manual_seed(1)
    moved = Perturbed(weights, [0.3 * torch.randn(w.shape, generator=g) for w in weights])
    assert not any(torch.equal(a, b) for a, b in zip(before, weights))
    moved.restore([0.0] * len(weights))
    assert all(torch.equal(a, b) for a, b in zip(before, weights))


def test_statistics_of_the_ascent_are_not_kept() -> None:
    net, (x, y) = small(), data()
    before = {k: v.clone() for k, v in net.named_buffers()}
    ascent(net, perturbed_parameters(net), 0.01, lambda: F.cross_entropy(net(x), y))
    assert all(torch.equal(before[k], v) for k, v in net.named_buffers())
    with buffers_kept(net):
        net(x)
        assert not torch.equal(before["bn1.running_mean"], net.get_buffer("bn1.running_mean"))
    assert torch.equal(before["bn1.running_mean"], net.get_buffer("bn1.running_mean"))


def test_steps_equal_those_at_the_perturbed_weights() -> None:
    """The public order: w += delta, gradient and SGD step with decay there, w -= delta."""
    ours, theirs, (x, y) = small(), small(), data()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    sgd = [torch.optim.SGD(net.parameters(), **options) for net in (ours, theirs)]
    for _ in range(4):
        weights = perturbed_parameters(ours)
        deltas = ascent(ours, weights, 0.02, lambda: F.cross_entropy(ours(x), y))
        moved = Perturbed(weights, deltas)
        sgd[0].zero_grad()
        F.cross_entropy(ours(x), y).backward()
        moved.restore([0.05] * len(weights))
        sgd[0].step()

        proxy = copy.deepcopy(theirs)
        wanted = [n for n, p in proxy.named_parameters() if p.dim() > 1 and "weight" in n]
        loss = -F.cross_entropy(proxy(x), y)
        table = dict(proxy.named_parameters())
        for name, g in zip(wanted, torch.autograd.grad(loss, [table[n] for n in wanted])):
            diff = -g * (table[name].norm() / (g.norm() + 1e-20))
            table[name].data = 0.02 * diff
        own = dict(theirs.named_parameters())
        with torch.no_grad():
            for name in wanted:
                own[name].add_(table[name])
        sgd[1].zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        sgd[1].step()
        with torch.no_grad():
            for name in wanted:
                own[name].sub_(table[name])
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
        assert torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-10)


def test_average_per_iteration_begins_after_its_share_of_epochs() -> None:
    net = nn.Linear(1, 1, bias=False)
    average = Average(net, Averaging("iteration", tau=0.9, after=0.5), epochs=4)
    value, expected = 0.0, None
    for epoch in range(1, 5):
        average.before_epoch(epoch)
        if epoch == 3:
            expected = value
        for _ in range(3):
            value += 1.0
            nn.init.constant_(net.weight, value)
            average.after_step()
            if expected is not None:
                expected = 0.9 * expected + 0.1 * value
        average.after_epoch(epoch)
        assert (average.state is None) == (epoch < 3)
    assert average.state is not None
    assert expected is not None
    assert average.state["weight"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("epochs", "steps"), [(20, 11), (200, 391), (4, 1)])
def test_an_average_per_run_forgets_as_much_however_long_the_run_is(epochs: int, steps: int) -> None:
    """Weights 1 until the average begins and 0 after it: what is left of the 1 is tau."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    average = Average(net, Averaging("run", tau=4e-4, after=0.75), epochs=epochs)
    average.paced(steps)
    nn.init.constant_(net.weight, 1.0)
    for epoch in range(average.start + 1, epochs + 1):
        average.before_epoch(epoch)
        nn.init.constant_(net.weight, 0.0)
        for _ in range(steps):
            average.after_step()
    assert average.state is not None
    assert average.state["weight"].item() == pytest.approx(4e-4, rel=1e-9)


def test_average_per_epoch_starts_as_the_first_and_covers_statistics() -> None:
    net = nn.BatchNorm1d(1)
    average = Average(net, Averaging("epoch", tau=0.9), epochs=3)
    for epoch in (1, 2, 3):
        nn.init.constant_(net.weight, float(epoch))
        assert net.running_mean is not None
        assert net.num_batches_tracked is not None
        net.running_mean.fill_(10.0 * epoch)
        net.num_batches_tracked.fill_(epoch)
        average.after_epoch(epoch)
    assert average.state is not None
    assert average.state["weight"].item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3)
    assert average.state["running_mean"].item() == pytest.approx(10 * (0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3))
    assert average.state["num_batches_tracked"].item() == 3
