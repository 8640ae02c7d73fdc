"""APGD against a slow reading of its publication and against linear models; AA-2 as a composition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.attacks import aa2, apgd_ce, apgd_t, evaluate
from experiments.attacks.apgd import apgd, checkpoints
from experiments.attacks.losses import dlr_targeted
from hessdiag.errors import (
    AuditError,
    ConfigurationError,
    DataError,
    EmptyDataError,
    HessdiagError,
    NonFiniteError,
    TargetError,
    UnknownNameError,
)
from hessdiag.problem.perturbation import cross_entropy


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conv_net(classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(144, classes)
    ).double()
    net(torch.rand(64, 1, 8, 8, dtype=torch.float64))
    return net


def images(net: nn.Module, count: int = 24) -> tuple[Tensor, Tensor]:
    """Images with the labels that the net gives them, but for every sixth."""
    x = torch.rand(count, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    logits = net.eval()(x).detach()
    y = logits.argmax(1)
    y[::6] = (y[::6] + 1) % logits.shape[1]
    return x, y


class Linear(nn.Module):
    """Logits W x + b, and in closed form the largest margin z_k - z_y that the ball and the box allow."""

    def __init__(self, features: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.map = nn.Linear(features, classes).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.flatten(1))

    def optimum(self, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        weight, bias = self.map.weight.detach(), self.map.bias.detach()
        margins, points = [], []
        for k in range(len(bias)):
            towards = weight[k] - weight[y]
            point = (x.flatten(1) + eps * towards.sign()).clamp(0, 1)
            margins.append((towards * point).sum(1) + bias[k] - bias[y])
            points.append(point.reshape(x.shape))
        table = torch.stack(margins, 1)
        return table.masked_fill(F.one_hot(y, len(bias)).bool(), -torch.inf), torch.stack(points, 1)


def test_checkpoints_are_the_published_ones() -> None:
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert checkpoints(1) == {1: 1}
    assert checkpoints(10) == {2: 2, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1}


def slow_apgd(net, x, start, y, loss, eps, steps):  # type: ignore[no-untyped-def]
    """Algorithm 1 of arXiv 2003.01690 for one sample, in plain branches: last fooling, best, its loss."""

    def look(point):  # type: ignore[no-untyped-def]
        point = point.detach().requires_grad_(True)
        logits = net(point)
        value = loss(logits)
        return value.item(), torch.autograd.grad(value, point)[0], int(logits.argmax()) != y

    def pi(point):  # type: ignore[no-untyped-def]
        return torch.min(torch.max(point, x - eps), x + eps).clamp(0, 1)

    eta, current, old = 2 * eps, start, start
    value, g, wrong = look(current)
    trace, best, best_g, best_value = [value], current, g, value
    last = current if wrong else None
    gap = max(int(0.22 * steps), 1)
    check, before, kept_then, best_then = gap, 0, False, value
    for k in range(1, steps + 1):
        z = pi(current + eta * g.sign())
        a = 0.75 if k > 1 else 1.0
        old, current = current, pi(current + a * (z - current) + (1 - a) * (current - old))
        value, g, wrong = look(current)
        trace.append(value)
        if wrong:
            last = current
        if value > best_value:
            best, best_g, best_value = current, g, value
        if k == check:
            rises = sum(trace[i] > trace[i - 1] for i in range(before + 1, k + 1))
            halve = rises <= 0.75 * (k - before) or (kept_then and best_value == best_then)
            if halve:
                eta, current, g = eta / 2, best, best_g
            kept_then, best_then, before = not halve, best_value, k
            gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            check += gap
    return last, best, best_value


@pytest.mark.parametrize("kind", ["ce", "dlr"])
def test_batched_apgd_against_a_slow_reading_of_the_algorithm(kind: str) -> None:
    net = conv_net()
    x, y = images(net, 8)
    aim = (y + 2) % 5
    start = (x + 0.1 * (2 * torch.rand(x.shape, generator=seeded(), dtype=x.dtype) - 1)).clamp(0, 1)
    loss, target = (cross_entropy, y) if kind == "ce" else (dlr_targeted, (y, aim))
    run = apgd(net, x, start, y, target, eps=0.1, steps=60, loss=loss)
    for i in range(8):
        one = slice(i, i + 1)

        def single(f: Tensor, one: slice = one) -> Tensor:
            return loss(f, y[one] if kind == "ce" else (y[one], aim[one])).sum()

        last, best, best_value = slow_apgd(net, x[one], start[one], int(y[i]), single, 0.1, 60)
        assert bool(run.fooled[i]) == (last is not None)
        if last is not None:
            torch.testing.assert_close(run.last[one], last, rtol=0, atol=1e-12)
        torch.testing.assert_close(run.best[one], best, rtol=0, atol=1e-12)
        assert run.best_loss[i].item() == pytest.approx(best_value, abs=1e-12)
    assert int(run.fooled.sum()) > 0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 8, 8)])
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_apgd_ce_reaches_the_optimum_of_a_linear_model(shape: tuple[int, ...], batch: int) -> None:
    net = Linear(int(np.prod(shape)), 2, seed=batch)
    x = torch.rand(batch, *shape, generator=seeded(1), dtype=torch.float64)
    y = net(x).argmax(1).detach()
    table, points = net.optimum(x, y, 0.05)
    found = apgd_ce(net, x, y, eps=0.05, generator=seeded())
    assert torch.equal(found.robust, table.amax(1) <= 0)
    torch.testing.assert_close(found.x_best, points[torch.arange(batch), 1 - y], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "classes"), [((12,), 5), ((1, 8, 8), 4)])
def test_flags_of_a_linear_model_are_exact(shape: tuple[int, ...], classes: int) -> None:
    """Several classes: APGD-T aimed at every other class decides each flag as the closed form does."""
    net = Linear(int(np.prod(shape)), classes, seed=classes)
    x = torch.rand(30, *shape, generator=seeded(1), dtype=torch.float64)
    y = net(x).argmax(1).detach()
    y[::7] = (y[::7] + 1) % classes
    clean = net(x).argmax(1).eq(y)
    eps = 0.03 if len(shape) > 1 else 0.12
    table, _ = net.optimum(x, y, eps)
    assert table.amax(1).abs().min() > 1e-4
    truth = clean & (table.amax(1) < 0)
    assert 0 < int(truth.sum()) < int(clean.sum())
    found = apgd_t(net, x, y, eps=eps, generator=seeded())
    assert torch.equal(found.clean, clean)
    assert torch.equal(found.robust, truth)
    worst = aa2(net, x, y, eps=eps, batch_size=20)
    assert torch.equal(worst.robust, truth)
    assert worst.robust_accuracy == pytest.approx(float(truth.double().mean()))


def test_result_is_what_it_claims() -> None:
    net = conv_net()
    x, y = images(net, 40)
    found = aa2(net, x, y, eps=0.08, steps=20)
    broken = found.clean & ~found.robust
    assert int(broken.sum()) > 0
    assert int(found.robust.sum()) > 0
    assert torch.equal(net.eval()(x).argmax(1).eq(y), found.clean)
    assert torch.all(net(found.x_adv).argmax(1)[broken] != y[broken])
    assert torch.equal(found.x_adv[~broken], x[~broken])
    assert (found.x_adv - x).abs().max() <= 0.08 + 1e-12
    assert list(found.per_attack) == ["apgd-ce", "apgd-t"]
    assert torch.all(found.per_attack["apgd-t"] <= found.per_attack["apgd-ce"])
    assert torch.equal(found.per_attack["apgd-t"], found.robust)
    assert found.check.disagreements == 0
    assert found.warnings == ()
    report = found.to_dict()
    assert report["eps"] == "0.08"
    assert report["samples"] == 40
    assert report["robust_accuracy"] == found.robust_accuracy


def test_budget_is_pinned() -> None:
    net = Linear(64, 12)
    x, y = images(net, 2)
    found = aa2(net, x, y, eps="1/100")
    expected = {"steps": 100, "targets": 9, "rho": 0.75, "restarts": 1, "batch_size": 500, "autocast": None}
    assert found.settings == expected
    calls: list[int] = []

    def forward(z: Tensor) -> Tensor:
        calls.append(len(z))
        return net(z)

    robust = apgd_ce(net, x, y, eps=1e-9, generator=seeded(), forward=forward)
    # Clean, start, 100 iterations, one look back.
    assert calls == [2] + [int(robust.clean.sum())] * 102
    calls.clear()
    apgd_t(net, x, y, eps=1e-9, generator=seeded(), forward=forward)
    assert calls == [2] + [int(robust.clean.sum())] * 102 * 9


def test_only_what_still_stands_is_attacked() -> None:
    net = conv_net()
    x, y = images(net, 24)
    alive: list[int] = []

    def forward(z: Tensor) -> Tensor:
        alive.append(len(z))
        return net(z)

    first = apgd_ce(net, x, y, eps=0.08, steps=5, generator=seeded(), forward=forward)
    assert set(alive[1:]) == {int(first.clean.sum())}
    alive.clear()
    found = apgd_t(net, x, y, eps=0.08, steps=5, generator=seeded(), forward=forward)
    sizes = alive[1:]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == int(found.clean.sum())
    assert sizes[-1] < sizes[0]
    assert torch.equal(found.x_adv[~found.clean], x[~found.clean])


@pytest.mark.parametrize("batch", [1, 7, 24])
def test_aa2_does_not_depend_on_batching_or_order(batch: int) -> None:
    net = conv_net()
    x, y = images(net)
    whole = aa2(net, x, y, eps=0.06, steps=12, seed=4)
    parts = aa2(net, x, y, eps=0.06, steps=12, seed=4, batch_size=batch)
    assert torch.equal(parts.robust, whole.robust)
    torch.testing.assert_close(parts.x_adv, whole.x_adv, rtol=0, atol=1e-12)
    other = aa2(net, x, y, eps=0.06, steps=12, seed=5)
    assert not torch.equal(other.x_adv, whole.x_adv)


def test_the_model_is_handed_back_as_it_came() -> None:
    net = conv_net()
    x, y = images(net)
    net.train()
    net[3].eval()
    net[4].bias.requires_grad_(False)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    for attack in ("aa2", "pgd", "pgd:eps=1/20,steps=3"):
        evaluate(net, x, y, attack=attack, eps="1/20")
    assert [m.training for m in net.modules()] == [True, True, True, True, False, True]
    assert [p.requires_grad for p in net.parameters()] == [True] * 5 + [False]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_of_any_integer_type_and_progress() -> None:
    net = conv_net()
    x, y = images(net)
    seen: list[tuple[str, int, int, int]] = []
    found = aa2(net, x, y.int(), eps=0.06, steps=3, batch_size=10, progress=lambda *told: seen.append(told))
    assert found.robust_accuracy == aa2(net, x, y, eps=0.06, steps=3).robust_accuracy
    assert [name for name, *_ in seen[:2]] == ["apgd-ce", "apgd-ce"]
    assert seen[-1][0] == "apgd-t"
    assert seen[-1][1] == seen[-1][2]
    assert seen[-1][3] == int(found.robust.sum())


def test_autocast_is_believed_only_in_full_precision() -> None:
    net = conv_net()
    x, y = images(net, 60)
    net = net.float()
    full = aa2(net, x.float(), y, eps=0.05, steps=20)
    half = aa2(net, x.float(), y, eps=0.05, steps=20, autocast=torch.bfloat16)
    assert half.settings["autocast"] == "torch.bfloat16"
    assert half.check.disagreements == 0
    assert abs(half.robust_accuracy - full.robust_accuracy) <= 0.05

    def wrong_in_half(z: Tensor) -> Tensor:
        f = net(z)
        return -f if torch.is_autocast_enabled("cpu") else f

    fooled_in_half = apgd_ce(
        net,
        x.float(),
        y,
        eps=1e-6,
        steps=2,
        generator=seeded(),
        autocast=torch.bfloat16,
        forward=wrong_in_half,
    )
    assert torch.equal(fooled_in_half.robust, fooled_in_half.clean)


def test_a_verdict_is_in_full_float32_whatever_crafts(monkeypatch: pytest.MonkeyPatch) -> None:
    net = conv_net()
    x, y = images(net, 12)

    class Asking(nn.Module):
        """Notes of each pass whether it is a verdict, and whether TensorFloat-32 is allowed."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = net, set[tuple[bool, bool]]()

        def forward(self, z: Tensor) -> Tensor:
            """The same net."""
            self.seen.add((not torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32))
            out: Tensor = self.net(z)
            return out

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for attack in ("aa2", "pgd:eps=8/255,steps=2"):
        asking = Asking()
        evaluate(asking, x, y, attack=attack, eps="8/255")
        assert asking.seen == {(True, False), (False, True)}


def test_zero_gradients_are_told() -> None:
    net = conv_net()
    x, y = images(net)
    flat = aa2(net, x, y, eps=0.05, steps=2, targets=1, forward=lambda z: net(z).detach() + 0 * z.sum())
    clean = int(flat.clean.sum())
    assert flat.warnings == tuple(
        f"{name}: {clean} runs began at a zero gradient, where it can tell nothing" for name in flat.per_attack
    )


def test_the_whole_run_compiles_to_the_same_images() -> None:
    net = conv_net().requires_grad_(False)
    x, y = images(net, 6)
    start = (x + 0.05 * (2 * torch.rand(x.shape, generator=seeded(), dtype=x.dtype) - 1)).clamp(0, 1)
    plain = apgd(net, x, start, y, y, eps=0.05, steps=2, loss=cross_entropy)
    import torch._dynamo.config as dynamo

    if not hasattr(dynamo, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace autograd.grad")
    with dynamo.patch(trace_autograd_ops=True):
        compiled = torch.compile(apgd, backend="eager", fullgraph=True)
        found = compiled(net, x, start, y, y, eps=0.05, steps=2, loss=cross_entropy)
    torch.testing.assert_close(found.best, plain.best, rtol=0, atol=1e-12)
    assert torch.equal(found.fooled, plain.fooled)


@pytest.mark.parametrize("classes", [2, 3])
def test_too_few_classes_are_refused(classes: int) -> None:
    net = conv_net(classes)
    x, y = images(net)
    for attack in (apgd_t, aa2):
        with pytest.raises(ConfigurationError, match=f"at least 4 classes, the model has {classes}"):
            attack(net, x, y, eps=0.1, **({"generator": seeded()} if attack is apgd_t else {}))
    assert apgd_ce(net, x, y, eps=0.1, steps=2, generator=seeded()).robust.dtype == torch.bool


def test_fewer_classes_than_targets_cut_the_targets() -> None:
    net = conv_net(4)
    x, y = images(net)
    assert aa2(net, x, y, eps=0.02, steps=2).settings["targets"] == 3


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"eps": 2.0}, ConfigurationError, "[0, 1]"),
        ({"eps": torch.tensor([0.1, 0.2])}, ConfigurationError, "one number"),
        ({"eps": "1/0"}, ConfigurationError, "must be a number"),
        ({"steps": 0}, ConfigurationError, "steps must be at least 1"),
        ({"targets": 0}, ConfigurationError, "targets must be at least 1"),
        ({"batch_size": 0}, ConfigurationError, "batch_size must be at least 1"),
        ({"x": lambda x: 2 * x}, DataError, "normalise inside"),
        ({"x": lambda x: x[:0], "y": lambda y: y[:0]}, EmptyDataError, "no samples"),
        ({"y": lambda y: y[:3]}, TargetError, "shape [24]"),
        ({"y": lambda y: y.double()}, TargetError, "integers"),
        ({"y": lambda y: y + 3}, TargetError, "out of range"),
        ({"y": lambda y: y - 1}, TargetError, "label -1"),
        ({"forward": lambda z: z}, ConfigurationError, "[N, classes]"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict, error: type, says: str) -> None:
    net = conv_net()
    x, y = images(net)
    change = dict(change)
    x, y = change.pop("x", lambda v: v)(x), change.pop("y", lambda v: v)(y)
    with pytest.raises(error) as caught:
        aa2(net, x, y, **{"eps": 0.1, "steps": 2, **change})
    assert isinstance(caught.value, HessdiagError)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_starts_come_from_one_source() -> None:
    net = conv_net()
    x, y = images(net)
    for options in ({}, {"generator": seeded(), "noise": lambda _: x}):
        with pytest.raises(ConfigurationError, match="one of the two"):
            apgd_ce(net, x, y, eps=0.1, **options)


def test_nan_under_attack_is_an_error_and_not_a_success() -> None:
    net = conv_net()
    x, y = images(net)

    def breaks_off_the_data(z: Tensor) -> Tensor:
        f = net(z)
        known = (z[:, None] == x[None]).flatten(2).all(2).any(1)
        return f * torch.where(known, 1.0, torch.nan)[:, None]

    with pytest.raises(NonFiniteError, match="running APGD"):
        aa2(net, x, y, eps=0.1, steps=2, forward=breaks_off_the_data)
    with pytest.raises(NonFiniteError, match="24 samples"):
        aa2(net, x, y, eps=0.1, steps=2, forward=lambda z: net(z) * torch.nan)


def test_leaving_the_ball_is_an_audit_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.attacks import apgd as module

    net = conv_net()
    x, y = images(net)
    monkeypatch.setattr(module, "project_linf", lambda points, centre, eps: points.clamp(0, 1))
    with pytest.raises(AuditError, match="left the threat model"):
        aa2(net, x, y, eps=0.05, steps=10)


def test_attacks_by_name() -> None:
    net = conv_net()
    x, y = images(net)
    strong = evaluate(net, x, y, attack="aa2", eps="1/20")
    weak = evaluate(net, x, y, attack="pgd:eps=1/20,steps=2,seed=1")
    usual = evaluate(net, x, y, attack="pgd", eps="1/20", seed=1)
    assert (weak.seed, weak.eps, weak.settings["steps"], usual.settings["steps"]) == (1, "1/20", 2, 20)
    assert strong.robust_accuracy <= usual.robust_accuracy <= weak.robust_accuracy < weak.clean_accuracy
    assert torch.all(net.eval()(usual.x_adv).argmax(1).eq(y) == usual.robust)
    with pytest.raises(UnknownNameError, match="did you mean 'aa2'"):
        evaluate(net, x, y, attack="aa2x", eps=0.1)
    with pytest.raises(ConfigurationError, match="needs eps"):
        evaluate(net, x, y, attack="aa2")
    with pytest.raises(ConfigurationError, match="takes no options"):
        evaluate(net, x, y, attack="aa2:steps=3", eps=0.1)
