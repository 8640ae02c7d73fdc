"""tr(HC) of a training step's noise: exact where all samples are there, without bias, with an interval that covers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.__main__ import main
from experiments.noise import Noise, Spread, dealt, from_products, gauss_newton_trace, noise
from hessdiag import Objective
from hessdiag.data import load
from hessdiag.errors import ConfigurationError, EmptyDataError
from theory import dynamics


def toy(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    return model, torch.randn(6, 3, dtype=torch.float64).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2])


def written_out(model: nn.Module, x: Tensor, y: Tensor, others: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """tr(S) and tr(HS) from all p² entries and every sample's gradient, by torch.func alone."""
    names = [name for name, _ in model.named_parameters()]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        given = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes)}
        return F.cross_entropy(torch.func.functional_call(model, given, (inputs,)), targets)

    gradients = torch.stack([torch.func.grad(loss)(start, x[k : k + 1], y[k : k + 1]) for k in range(len(y))])
    hessian = torch.func.hessian(loss)(start, *others)
    centred = gradients - gradients.mean(0)
    covariance = centred.T @ centred / (len(y) - 1)
    return float(covariance.trace()), float((hessian @ covariance).trace())


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_of_single_samples_it_is_the_covariance_written_out(dtype: torch.dtype, close: float) -> None:
    model, x, y = toy()
    others = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(5) % 3
    trace, curved = written_out(model, x, y, others)
    measured = [(others[0][:3].to(dtype), others[1][:3]), (others[0][3:].to(dtype), others[1][3:])]
    single = [(x[k : k + 1].to(dtype), y[k : k + 1]) for k in range(6)]
    found = noise(Objective(model.to(dtype)), measured, single)
    assert (found.batches, found.batch_size) == (6, 1)
    assert found.trace.value == pytest.approx(trace, rel=close)
    assert found.curved.value == pytest.approx(curved, rel=close)
    assert found.half_trace(0.1).value == pytest.approx(0.005 * curved, rel=close)
    assert found.half_trace(0.1).low < found.half_trace(0.1).value < found.half_trace(0.1).high


def test_over_all_ways_to_deal_six_samples_into_pairs_it_has_no_bias() -> None:
    model, x, y = toy()
    trace, curved = written_out(model, x, y, (x, y))
    deals = {frozenset(frozenset(order[k : k + 2]) for k in (0, 2, 4)) for order in permutations(range(6))}
    assert len(deals) == 15
    found = [
        noise(Objective(model), [(x, y)], [(x[sorted(pair)], y[sorted(pair)]) for pair in sorted(deal, key=min)])
        for deal in deals
    ]
    assert sum(one.trace.value for one in found) / 15 == pytest.approx(trace / 2, rel=1e-10)
    assert sum(one.curved.value for one in found) / 15 == pytest.approx(curved / 2, rel=1e-10)


@pytest.mark.statistical
def test_the_interval_covers() -> None:
    """Gaussian gradients with an indefinite H: 2,000 intervals of 95% from 24 batches. Their share is that of a binomial
    about 0.93 to 0.95; below 0.915 lies 5 deviations off 0.94.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.linspace(-1.0, 3.0, 12, dtype=torch.float64)
    scale = torch.linspace(0.2, 2.0, 12, dtype=torch.float64)
    truth = float((h * scale.square()).sum())
    hits, values = 0, []
    for _ in range(2000):
        g = torch.randn(24, 12, generator=generator, dtype=torch.float64) * scale + 1.0
        found = from_products((g * h) @ g.T)
        values.append(found.value)
        hits += found.low <= truth <= found.high
    drawn = torch.tensor(values)
    assert abs(float(drawn.mean()) - truth) < 5 * float(drawn.std()) / 2000**0.5
    assert 0.915 < hits / 2000 < 0.98


def test_what_is_refused() -> None:
    model, x, y = toy()
    objective = Objective(model)
    with pytest.raises(ConfigurationError, match="of one size"):
        noise(objective, [(x, y)], [(x[:2], y[:2]), (x[2:], y[2:])])
    with pytest.raises(ConfigurationError, match="at least 3"):
        noise(objective, [(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])])
    with pytest.raises(EmptyDataError, match="no batches"):
        noise(objective, [(x, y)], [])
    with pytest.raises(EmptyDataError, match="no samples"):
        noise(objective, [], [(x[k : k + 1], y[k : k + 1]) for k in range(6)])


@pytest.mark.parametrize("method", ["standard", "n_fgsm"])
def test_of_a_trained_network_end_to_end(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training writes the net; the command finds data, radius, batch size and rate in it; batches are of other images."""
    command = ["train", "--method", method, "--quiet", "--out", str(tmp_path / "run")]
    table = {"network": "mlp", "network_options": {"widths": [4]}, "data": "digits", "epochs": 1, "batch_size": 50}
    for name, value in {**table, "augment": {"crop": 0, "flip": False}, "watch": {"samples": 8}}.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    if method == "n_fgsm":
        command += ["--set", 'eps="0.1"']
    assert main(command) in (0, 1)
    radius = [] if method == "n_fgsm" else ["--eps", "0"]
    line = ["noise", str(tmp_path / "run"), "--samples", "60", "--batches", "8", *radius]
    capsys.readouterr()
    assert main([*line, "--json", str(tmp_path / "a.json")]) == 0
    told = json.loads((tmp_path / "a.json").read_text())
    assert (told["batches"], told["batch_size"]) == (8, 50)
    assert told["lr"] == (0.2 if method == "n_fgsm" else 0.1)  # its default
    assert told["trace"]["low"] < told["trace"]["value"] < told["trace"]["high"]
    assert told["trace"]["value"] > 0
    assert told["half_trace"]["value"] == pytest.approx(0.5 * told["lr"] ** 2 * told["curved"]["value"])
    assert capsys.readouterr().out.count("95%") == 3
    assert main([*line, "--batches", "1000"]) == 2
    assert "fewer batches" in capsys.readouterr().err


def test_samples_are_dealt_once() -> None:
    whole = load("digits", split="train")
    numbered = replace(whole, targets=torch.arange(len(whole)))
    one, other = dealt(numbered, 100, 10, 20)
    assert len({*one.targets.tolist(), *other.targets.tolist()}) == 300


def test_weight_decay_adds_to_the_curvature_and_not_to_the_noise() -> None:
    """H gains l2 times the identity; the decay's own gradient is the same in every batch."""
    model, x, y = toy()
    trace, curved = written_out(model, x, y, (x, y))
    single = [(x[k : k + 1], y[k : k + 1]) for k in range(6)]
    found = noise(Objective(model, l2=0.3), [(x, y)], single)
    assert found.trace.value == pytest.approx(trace, rel=1e-10)
    assert found.curved.value == pytest.approx(curved + 0.3 * trace, rel=1e-10)


def gauss_newton_written_out(model: nn.Module, x: Tensor) -> float:
    """tr(G) of the mean cross-entropy from every sample's Jacobian and diag(p) - p pᵀ, by torch.func alone."""
    parameters = dict(model.named_parameters())
    total = 0.0
    for k in range(len(x)):
        sample = x[k : k + 1]
        jacobian = torch.func.jacrev(lambda given: torch.func.functional_call(model, given, (sample,))[0])(parameters)  # noqa: B023
        j = torch.cat([part.flatten(1) for part in jacobian.values()], 1).detach()
        p = model(sample)[0].detach().softmax(0)
        total += float((j.T @ (p.diag() - p[:, None] * p) @ j).trace())
    return total / len(x)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_gauss_newton_trace_of_single_samples_of_two_classes_is_exact(dtype: torch.dtype, close: float) -> None:
    """One sample, one column: its sign squares away, and every replicate says the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    truth = gauss_newton_written_out(model, x)
    single = [(x[k : k + 1].to(dtype), torch.tensor([k % 2])) for k in range(5)]
    found = gauss_newton_trace(Objective(model.to(dtype)), single, replicates=2)
    assert found.value == pytest.approx(truth, rel=close)
    assert found.error <= close * truth


@pytest.mark.statistical
def test_the_gauss_newton_trace_has_no_bias_and_its_error_is_that_of_its_scatter() -> None:
    """2,000 replicates on batches of several samples and classes: 5 of their own errors at most."""
    model, x, y = toy()
    truth = gauss_newton_written_out(model, x)
    found = gauss_newton_trace(Objective(model), [(x[:4], y[:4]), (x[4:], y[4:])], replicates=2000, seed=1)
    assert 0 < found.error < 0.05 * truth
    assert abs(found.value - truth) < 5 * found.error
    cut = gauss_newton_trace(Objective(model), [(x, y)], replicates=4, seed=1)
    again = gauss_newton_trace(Objective(model), [(x, y)], replicates=4, seed=1)
    assert cut == again


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_at_rest_is_what_the_stationary_covariance_of_a_bowl_gives(momentum: float) -> None:
    """Lyapunov's equation for a noise that does not commute with H: equal to first order, with the next order's size."""
    draw = np.random.default_rng(0)
    root, other = draw.standard_normal((2, 5, 5))
    h, c = root @ root.T + np.eye(5), other @ other.T
    still = Spread(float(np.trace(c)), 0.0, 0.0, 0.0)
    for lr in (1e-3, 1e-5):
        sigma = dynamics.stationary_covariance(h, c, lr, momentum=momentum)
        truth = dynamics.flatness(h, sigma)
        ours = Noise(still, still, 5, 1).at_rest(lr, momentum).value
        next_order = lr * np.linalg.eigvalsh(h).max() / (2 * (1 + momentum))
        assert 0 <= truth / ours - 1 <= 1.1 * next_order


def test_what_the_trace_refuses() -> None:
    model, x, y = toy()
    with pytest.raises(ConfigurationError, match="at least 2"):
        gauss_newton_trace(Objective(model), [(x, y)], replicates=1)
    with pytest.raises(EmptyDataError, match="no samples"):
        gauss_newton_trace(Objective(model), [])

    def saddle(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0] ** 2 - outputs[:, 1] ** 2

    with pytest.raises(ConfigurationError, match="not convex"):
        gauss_newton_trace(Objective(model, loss=saddle), [(x, y)])
