"""`theory.rescaling`: same function, same trajectory, transformed diagonal; MLP, post- and pre-activation
BatchNorm nets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hessdiag.errors import ConfigurationError
from theory import rescaling, shapes

torch.set_num_threads(1)


class Activation(nn.Module):
    """σ_{α,β}, differentiated by autograd alone."""

    def __init__(self, alpha: float, beta: int) -> None:
        super().__init__()
        self.shape = shapes.rct(alpha, beta)

    def forward(self, x: Tensor) -> Tensor:
        return self.shape.sigma(x)


class Block(nn.Module):
    def __init__(self, width: int, act: nn.Module, *, pre: bool, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.act, self.pre = act, pre

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """A residual net with one block and a strided second stage with a projection shortcut."""

    def __init__(self, act: nn.Module, *, pre: bool, width: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.pre, self.act = pre, act
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=pre or bias)
        self.norm = nn.BatchNorm2d(width)
        self.block = Block(width, act, pre=pre, bias=bias)
        self.down = nn.Conv2d(width, width, 1, stride=2, bias=bias)
        self.down_norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.pre:
            h = self.down(self.act(self.down_norm(self.block(h))))
            h = self.act(self.norm(h))
        else:
            h = self.act(self.down_norm(self.down(self.block(self.act(self.norm(h))))))
        return self.fc(h.mean((2, 3)))


def mlp(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 3))


BUILDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "mlp": mlp,
    "resnet": lambda act: ResNet(act, pre=False),
    "preact": lambda act: ResNet(act, pre=True),
    "resnet-biased": lambda act: ResNet(act, pre=False, bias=True),
    "preact-biased": lambda act: ResNet(act, pre=True, bias=True),
}


def make(kind: str, alpha: float, beta: int, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A net with generic parameters and running statistics in float64, inputs and classes."""
    g = torch.Generator().manual_seed(seed)
    net = BUILDERS[kind](Activation(alpha, beta)).double()
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=g, dtype=t.dtype) * 0.5)
            if name.endswith("running_var"):
                t.copy_(t.abs() + 0.1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.05
    shape = (6, 4) if kind == "mlp" else (6, 1, 4, 4)
    return (
        net.eval(),
        torch.randn(shape, generator=g, dtype=torch.float64),
        torch.randint(3, (6,), generator=g),
    )


def rule_for(kind: str, net: nn.Module) -> rescaling.Rule:
    names = list(net.state_dict())
    if kind == "mlp":
        return rescaling.mlp_rule(names, ["0", "2", "4", "6"])
    if kind.startswith("resnet"):
        stem = "stem" if kind.endswith("biased") else None
        return rescaling.resnet_rule(names, stem="norm", classifier="fc", stem_convolution=stem)
    return rescaling.preact_rule(names, stem="stem", classifier="fc")


def transformed(kind: str, net: nn.Module, factor: float, alpha: float, beta: int, *, eps: bool = True) -> nn.Module:
    """The net with σ_{alpha,beta} in the coordinates reached by `factor`."""
    rule = rule_for(kind, net)
    other = BUILDERS[kind](Activation(alpha, beta)).double()
    other.load_state_dict(rescaling.rescale(net.state_dict(), rule, factor))
    old = {n: m.eps for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    new = rescaling.rescale_eps(old, rule, factor) if eps else old
    for n, m in other.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = new[n]
    return other.eval()


cases = st.tuples(st.sampled_from(list(BUILDERS)), st.floats(0.2, 40), st.sampled_from([0, 1, 2]), st.integers(0, 999))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(cases)
def test_same_function(case: tuple[str, float, int, int]) -> None:
    """net_α(θ) = net_1(cθ), running statistics and eps included, for every α and β."""
    kind, alpha, beta, seed = case
    net, x, _ = make(kind, alpha, beta, seed)
    other = transformed(kind, net, alpha, 1.0, beta)
    with torch.no_grad():
        assert torch.allclose(net(x), other(x), rtol=1e-11, atol=1e-11)


def test_between_two_curvatures() -> None:
    """rescale(state, rule, a1/a2) leads from σ_{a1} to σ_{a2}."""
    net, x, _ = make("resnet", 14.0, 1)
    other = transformed("resnet", net, 14.0 / 3.0, 3.0, 1)
    with torch.no_grad():
        assert torch.allclose(net(x), other(x), rtol=1e-11)


@pytest.mark.parametrize("kind", ["resnet", "preact"])
def test_what_happens_when_eps_or_statistics_are_left_alone(kind: str) -> None:
    """Eps left alone: equal to O(eps/var) only. Running statistics left alone: another function."""
    net, x, _ = make(kind, 10.0, 1)
    with torch.no_grad():
        truth = net(x)
        without_eps = transformed(kind, net, 10.0, 1.0, 1, eps=False)(x)
        stale = transformed(kind, net, 10.0, 1.0, 1)
        state = {**stale.state_dict()}
        state.update({n: t for n, t in net.state_dict().items() if "running" in n})
        stale.load_state_dict(state)
        off_eps, off_stale = float((without_eps - truth).norm()), float((stale(x) - truth).norm())
    assert off_eps > 1e-4 * float(truth.norm())
    assert off_stale > 2 * off_eps

    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 1e-9
    with torch.no_grad():
        gap = float((transformed(kind, net, 10.0, 1.0, 1, eps=False)(x) - net(x)).norm())
    assert gap < 1e-5 * off_eps


def diagonal(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Diagonal of the cross-entropy's Hessian by one Hessian-vector product per parameter."""
    params = dict(net.named_parameters())
    grads = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(params.values()), create_graph=True)
    found = {}
    for (name, p), g in zip(params.items(), grads):
        flat = [
            torch.autograd.grad(v, p, retain_graph=True, materialize_grads=True)[0].reshape(-1)[k]
            for k, v in enumerate(g.reshape(-1))
        ]
        found[name] = torch.stack(flat).view_as(p)
    return found


@pytest.mark.parametrize("kind", ["mlp", "resnet", "preact"])
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_every_diagonal_entry_transforms(kind: str, beta: int) -> None:
    """H_kk -> H_kk/c_k², while θ²H_kk and |γ| max|σ''| stay; the norm of E[8] does not."""
    alpha = 6.0
    net, x, y = make(kind, alpha, beta, 3)
    other, rule = transformed(kind, net, alpha, 1.0, beta), rule_for(kind, net)
    before, after = diagonal(net, x, y), diagonal(other, x, y)
    scale = max(float(h.norm()) for h in before.values())
    expected = rescaling.rescale_diagonal(before, rule, alpha)
    for name, h in after.items():
        reference = scale / rescaling.scales(rule, alpha)[name] ** 2
        assert float((h - expected[name]).norm()) <= 1e-10 * reference, name
    states = net.state_dict(), other.state_dict()
    kept = [rescaling.invariant_entries(h, s) for h, s in zip((before, after), states)]
    for name in before:
        assert float((kept[0][name] - kept[1][name]).norm()) <= 1e-10 * scale
    assert abs(rescaling.root_mean_square(after) / rescaling.root_mean_square(before) - 1) > 0.1
    if kind != "mlp":
        peak = alpha * 2 ** (beta - 2)
        gains = [rescaling.effective_curvature(s["norm.weight"], c) for s, c in zip(states, (peak, peak / alpha))]
        assert torch.allclose(*gains, rtol=1e-12)


def optimise(net: nn.Module, groups: list[dict[str, object]], x: Tensor, y: Tensor, steps: int) -> None:
    net.train()
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", list(BUILDERS))
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_same_trajectory(kind: str, beta: int) -> None:
    """20 steps of SGD with momentum, weight decay, BatchNorm in train mode: lr × c², decay ÷ c² per group."""
    alpha, lr, decay = 3.0, 0.02, 5e-3
    net, x, y = make(kind, alpha, beta, 1)
    start = copy.deepcopy(net)
    other, rule = transformed(kind, net, alpha, 1.0, beta), rule_for(kind, net)
    sizes = rescaling.rescale_optimizer(rule, alpha, lr=lr, weight_decay=decay)
    optimise(net, [{"params": list(net.parameters()), "lr": lr, "weight_decay": decay}], x, y, 20)
    groups = [
        {"params": [p], "lr": sizes[n].lr, "weight_decay": sizes[n].weight_decay} for n, p in other.named_parameters()
    ]
    optimise(other, groups, x, y, 20)
    expected = rescaling.rescale(net.state_dict(), rule, alpha)
    moved = sum(float((a - b).detach().norm()) for a, b in zip(net.parameters(), start.parameters()))
    assert moved > 0.1
    for name, t in other.state_dict().items():
        assert torch.allclose(t, expected[name], rtol=1e-9, atol=1e-9), name


def test_without_rescaled_rates_the_trajectory_differs() -> None:
    """The same function and one learning rate for all: after 20 steps two different functions."""
    net, x, y = make("resnet", 6.0, 1, 1)
    other = transformed("resnet", net, 6.0, 1.0, 1)
    for n in (net, other):
        optimise(n, [{"params": list(n.parameters()), "lr": 0.02, "weight_decay": 5e-3}], x, y, 20)
    with torch.no_grad():
        assert float((net(x) - other(x)).norm()) > 1e-2 * float(net(x).norm())


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_the_same_function_with_a_norm_a_hundred_times_larger(kind: str) -> None:
    """The worked example: one factor, in closed form, gives E[8] × 100 and leaves every output alone."""
    alpha = 8.0
    net, x, y = make(kind, alpha, 1, 5)
    rule, before = rule_for(kind, net), diagonal(net, x, y)
    factor = rescaling.factor_for_norm(before, rule, 100.0)
    other = transformed(kind, net, factor, alpha / factor, 1)
    with torch.no_grad():
        assert torch.allclose(net(x), other(x), rtol=1e-9, atol=1e-11)
    after = diagonal(other, x, y)
    assert rescaling.root_mean_square(after) / rescaling.root_mean_square(before) == pytest.approx(100, rel=1e-8)


def test_refusals() -> None:
    net, _, _ = make("resnet", 2.0, 1)
    names = list(net.state_dict())
    with pytest.raises(ConfigurationError, match="no BatchNorm of this net"):
        rescaling.resnet_rule(names, stem="stem", classifier="fc")
    with pytest.raises(ConfigurationError, match=r"needs 'head\.weight'"):
        rescaling.resnet_rule(names, stem="norm", classifier="head")
    biased = list(make("resnet-biased", 2.0, 1)[0].state_dict())
    with pytest.raises(ConfigurationError, match="name the first layer as stem_convolution"):
        rescaling.resnet_rule(biased, stem="norm", classifier="fc")
    with pytest.raises(ConfigurationError, match=r"'act\.alpha' is no weight"):
        rescaling.resnet_rule([*names, "act.alpha"], stem="norm", classifier="fc")
    with pytest.raises(ConfigurationError, match="must be positive"):
        rescaling.scales(rule_for("resnet", net), 0.0)
    with pytest.raises(ConfigurationError, match="says nothing of"):
        rescaling.rescale({"other": torch.ones(1)}, rule_for("resnet", net), 2.0)
