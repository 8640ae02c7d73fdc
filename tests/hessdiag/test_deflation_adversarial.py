"""Deflated propagation under attack: its mean exactly, badly scaled nets, plans of other models, missing derivatives.

The mean over all signs is exact, no statistics: (I - U U^T) is applied to one unit vector of each sample's sites after
the other, and the squares are added up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import Function, Tokens, beyond_in_the_mean, dense_diagonal, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.activations import RCTAF
from hessdiag.errors import ConfigurationError, NotDeterministicError, ResumeError, UncoveredModelError
from hessdiag.graph import Linearisation, chunks
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import accumulate
from hessdiag.methods.base import Aim
from hessdiag.methods.noise import choose
from hessdiag.methods.plan import Plan
from hessdiag.signs import Signs

torch.set_num_threads(1)


class Line(nn.Module):
    """Strided grouped and dilated convolutions of one axis, a norm, a gain, a shift with an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), nn.Conv1d(4, 4, 2, dilation=2, bias=False)
        self.n, self.gain, self.last = nn.BatchNorm1d(4), nn.Parameter(torch.randn(4, 1)), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.randn(4, 3, 1) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.n(self.b(F.silu(self.a(x)))) * self.gain)
        return self.last(F.gelu(h[..., None] + self.shift).mean((2, 3)))


class Volume(nn.Module):
    """Convolutions of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 2, 2, padding=(0, 1, 0)), nn.Conv3d(2, 2, (1, 2, 2), groups=2)
        self.last = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.adaptive_avg_pool3d(F.gelu(self.b(F.mish(self.a(x)))), 1).flatten(1))


class Turned(nn.Module):
    """Matrices stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 4) * 0.7)
        self.gain, self.last = nn.Parameter(torch.randn(4)), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain * torch.tanh(torch.sigmoid(x @ self.w) @ self.v))


class Gates(nn.Module):
    """Products whose factors are broadcast over channels or pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.pixel = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 2), nn.Conv2d(3, 1, 1)
        self.gate, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.c(x))
        h = h * torch.sigmoid(self.gate(h.mean((2, 3))))[:, :, None, None]
        h = F.softplus(self.d(h * torch.sigmoid(self.pixel(h))))
        return self.last((h * h.mean(1, keepdim=True)).mean((2, 3)))


class Gated(nn.Module):
    """A product of a factor `scale` times as large and one that much flatter."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.a, self.v, self.g, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.last(self.v(h) * self.scale * torch.sigmoid(self.g(h) / self.scale))


class SamplesSecond(nn.Module):
    """An activation that sees [tokens, samples, features]: its entries do not follow the samples in order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(F.silu(self.a(x)))).transpose(0, 1)
        return self.last(torch.sigmoid(2.0 * h).transpose(0, 1).mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[int, float] | None]] = {
    "line": (Line, (4, 2, 9), None),
    "volume": (Volume, (3, 1, 3, 3, 3), None),
    "turned": (Turned, (4, 5), None),
    "gates": (Gates, (3, 2, 5, 5), None),
    "gates out of balance": (Gates, (3, 2, 5, 5), {0: 3.0, 1: 0.2, 2: 7.0}),
    "tokens": (Tokens, (3, 4, 5), None),
    "one sample": (lambda: Function(torch.tanh), (1, 5), None),
    "c of one sign": (lambda: nn.Sequential(Function(F.softplus), nn.Linear(3, 1), nn.Softplus()), (3, 5), None),
    "no sites": (lambda: Function(F.relu), (3, 5), None),
}


def losses(f: Tensor, y: Tensor) -> Tensor:
    return f[:, 0] if f.shape[1] == 1 else F.cross_entropy(f, y, reduction="none")


def data(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), torch.randint(0, 3, shape[:1], generator=g)


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def mean(propagator: Propagator) -> tuple[Tensor, Tensor]:
    """(what is exact, the mean over all signs of the rest)."""
    known = propagator.gauss_newton()
    accumulate(known, propagator.direct())
    accumulate(known, propagator.deflated())
    return flat(known), flat(beyond_in_the_mean(propagator))


@pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name in CASES for rank in (1, 3, 200) if rank < 200 or "gates" not in name]
)
def test_the_mean_over_all_signs_is_the_diagonal(name: str, rank: int) -> None:
    build, shape, balance = CASES[name]
    model = seeded(build)
    x, y = data(*shape)
    truth = flat(dense_diagonal(model, losses, x, y)) * len(y)
    objective = hd.Objective(model, losses if name == "c of one sign" else "cross_entropy")
    propagator = Propagator(Linearisation(objective, x, y, balance=balance))
    found = propagator.deflate(Signs(3), rank)
    known, rest = mean(propagator)
    assert (known + rest - truth).norm() <= 1e-12 * truth.norm()
    assert found is None or found.rank <= sum(site.c[0].numel() for site in propagator.batch.sites)
    if rank == 200:
        assert rest.norm() <= 1e-20 * truth.norm()


def test_chosen_parameters_are_as_all_of_them() -> None:
    model = seeded(Gates)
    x, y = data(3, 2, 5, 5)
    wanted = "d.*|gate.*|c.bias|last.weight"
    propagator = Propagator(Linearisation(hd.Objective(model, parameters=wanted), x, y))
    propagator.deflate(Signs(3), 3)
    known, rest = mean(propagator)
    truth = dense_diagonal(model, losses, x, y)
    chosen = flat({name: truth[name] for name in propagator.batch.objective.parameters}) * len(y)
    assert (known + rest - chosen).norm() <= 1e-12 * chosen.norm()


def close(found: hd.Measurement, truth: float, *, beyond: float = 1e-6) -> bool:
    """Within one and a half half-widths, or rounding."""
    low, high = found.interval
    return abs(found.rms - truth) <= 0.75 * (high - low) + beyond * truth


def exact(model: nn.Module, x: Tensor, y: Tensor) -> float:
    twin = copy.deepcopy(model).double()
    return hd.measure(hd.Objective(twin), [(x.double(), y)], method="exact", audit_model=False).rms


def single(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("name", ["alpha 50", "weights", "one sample", "overflow", "underflow", "scales by feature"])
def test_float32_and_badly_scaled(name: str) -> None:
    """Against exact in float64. The products of rows overflow in "overflow": without scaling, an error of eigh."""
    x, y = data(12, 5, dtype=torch.float32)
    model = single(lambda: Function(RCTAF(alpha=50.0, beta=1) if name == "alpha 50" else torch.tanh, width=12))
    with torch.no_grad():
        if name == "weights":
            model.first.weight *= 1e3  # type: ignore[union-attr]
            model.middle.weight *= 1e-3  # type: ignore[union-attr]
        if name in ("overflow", "underflow"):
            size = 1e12 if name == "overflow" else 1e-12
            x *= size
            model.first.weight /= size  # type: ignore[union-attr]
        if name == "one sample":
            x[0] *= 1e9
            model.first.weight /= 1e9  # type: ignore[union-attr]
        if name == "scales by feature":
            model = single(Gated)
            size = 10.0 ** torch.linspace(-3, 3, 6)[:, None]
            model.v.weight *= size  # type: ignore[union-attr]
            model.last.weight /= size.T  # type: ignore[union-attr]
            model.g.weight /= size  # type: ignore[union-attr]
    truth = exact(model, x, y)
    for plan in (None, Plan("propagation", deflate=4), Plan("propagation", deflate=16)):
        found = hd.measure(
            hd.Objective(model), [(x, y)], method="propagation", plan=plan, max_replicates=20, rtol=1e-6,
            audit_model=False,
        )  # fmt: skip
        assert close(found, truth), (plan, found.rms / truth - 1.0, found.norm.total.half_width)


def test_what_cancels_in_rounding_is_refused_or_left_to_signs() -> None:
    """The halves of a product 10^4 out of balance: directions gave twice the norm, with an interval of 0.03%."""
    x, y = data(12, 5, dtype=torch.float32)
    model = single(Gated)
    objective = hd.Objective(model)
    with pytest.raises(ConfigurationError, match="deflate=0"):
        hd.measure(objective, [(x, y)], plan=Plan("propagation", balance={0: 1e4}, deflate=8), audit_model=False)
    far, near = (Linearisation(objective, x, y, balance={0: lam}) for lam in (1e4, 1.0))
    assert choose(far, 0, samples=12, aim=Aim(rtol=1e-4), ordered=True).deflate == 0
    assert choose(near, 0, samples=12, aim=Aim(rtol=1e-4), ordered=True).deflate > 0
    twin = hd.Objective(model.double())
    plan = Plan("propagation", balance={0: 1e4}, deflate=8)
    found = hd.measure(twin, [(x.double(), y)], plan=plan, max_replicates=12, audit_model=False)
    low, high = found.interval
    assert low <= exact(model, x, y) <= high  # noise, and no more: it shows in the interval


def test_a_balance_that_names_no_pair_is_none() -> None:
    x, y = data(6, 5)
    objective = hd.Objective(single(Gated).double())
    fresh, used = (Linearisation(objective, x, y) for _ in range(2))
    used.balance({0: 7.0})
    used.balance({})
    assert [site.lam for site in used.sites] == [site.lam for site in fresh.sites]


def test_an_interval_narrower_than_rounding_says_so() -> None:
    x, y = data(6, 5, dtype=torch.float32)
    model = single(lambda: Function(torch.tanh))
    notes = {}
    for dtype in (torch.float32, torch.float64):
        plan = Plan("propagation", deflate=12 if dtype == torch.float32 else 1)
        objective = hd.Objective(copy.deepcopy(model).to(dtype))
        found = hd.measure(objective, [(x.to(dtype), y)], plan=plan, max_replicates=10)
        notes[dtype] = any("narrower than rounding in torch.float32" in note for note in found.notes)
        assert close(found, exact(model, x, y))
    assert notes == {torch.float32: True, torch.float64: False}


def test_no_curvature_in_any_site_is_no_noise() -> None:
    """All c zero: replicates differ in the last bit of the mean at most, and nothing asks for more of them."""
    model = seeded(lambda: nn.Sequential(Function(torch.tanh), nn.Tanh(), nn.Linear(3, 3)))
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[index]
    x, y = data(9, 5)
    found = hd.measure(hd.Objective(model), [(x, y)], plan=Plan("propagation", deflate=2), max_replicates=12)
    assert close(found, exact(model, x, y), beyond=1e-12)
    assert "noise dominates" not in found.norm.total.flags
    none = hd.measure(hd.Objective(model, parameters="0.*"), [(x, y)], plan=found.plan, max_replicates=12)
    assert (none.rms, none.interval, none.status) == (0.0, (0.0, 0.0), "ok")


def test_without_a_double_backward_directions_are_left_out_or_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hessdiag.problem.forward.MENDED", {})  # hardsigmoid as torch has it
    model = single(lambda: nn.Sequential(Function(torch.tanh), nn.Hardsigmoid(), nn.Linear(3, 4), nn.SiLU()))
    model = nn.Sequential(model, nn.Linear(4, 3)).double()
    x, y = data(6, 5)
    linear = Linearisation(hd.Objective(model), x, y)
    assert choose(linear, 0, samples=6, aim=Aim(rtol=1e-4), ordered=True).deflate == 0
    with pytest.raises(UncoveredModelError, match=r"hardsigmoid.*deflate=0"):
        Propagator(linear).deflate(Signs(0), 2)


def test_sites_that_do_not_follow_the_samples_are_never_deflated() -> None:
    """A direction would mix samples before squaring: a biased number. The audit refuses the model; so does this."""
    model = seeded(SamplesSecond)
    x, y = data(3, 4, 5)
    linear = Linearisation(hd.Objective(model), x, y)
    assert choose(linear, 0, samples=3, aim=Aim(rtol=1e-4), ordered=True).deflate == 0
    with pytest.raises(UncoveredModelError, match="in order"):
        Propagator(linear).deflate(Signs(0), 2)
    with pytest.raises(hd.errors.HessdiagError):
        hd.diagonal(hd.Objective(model), [(x, y)], plan=Plan("propagation", deflate=2))


def test_gram_products_in_chunks_and_in_either_order(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    for positions, width, out in ((1, 4, 3), (9, 2, 3), (3, 5, 4)):
        x = torch.randn(7, positions, width, generator=g, dtype=torch.float64)
        d = torch.randn(7, positions, out, generator=g, dtype=torch.float64)
        wanted = torch.einsum("npf,nqf,nqo->npo", x, x, d)
        for size in (1 << 26, 100):
            monkeypatch.setattr(chunks, "CHUNK", size)
            assert torch.allclose(chunks.gram_product(x, d), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "values",
    [{"deflate": "4"}, {"deflate": 4.0}, {"deflate": True}, {"deflate": None}, {"balance": {0: 0.0}},
     {"balance": {"0": float("nan")}}, {"at_once": 1.5}, {"sample_groups": {"a": 2.5}}],
)  # fmt: skip
def test_a_plan_that_means_nothing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Plan.from_dict({"method": "propagation", **values})


def batches_of(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size)))


class Stop(BaseException):
    """Stands for a process that ends."""


@pytest.mark.parametrize(("phase", "after"), [("exact part", 2), ("replicates", 5)])
def test_taken_up_in_the_middle_of_a_phase(
    phase: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch is one sample; directions of batches already counted are found anew, bit for bit."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    model, path, seen = seeded(Gates), tmp_path / "r.st", [0]
    x, y = data(13, 2, 5, 5)

    def run(cut: tuple[int, ...] = (4, 4, 4, 1), balance: float = 2.0, **options: object) -> hd.Measurement:
        plan = Plan("propagation", deflate=3, at_once=4, balance={0: balance})
        return hd.measure(  # type: ignore[call-overload,no-any-return]
            hd.Objective(model), list(zip(x.split(cut), y.split(cut))), plan=plan, max_replicates=12, rtol=1e-9,
            audit_model=False, **options,
        )  # fmt: skip

    def stop(event: hd.Event) -> None:
        seen[0] += event.phase == phase
        if seen[0] == after:
            raise Stop

    whole = run()
    with pytest.raises(Stop):
        run(resume=path, progress=stop)
    with pytest.raises(ResumeError, match="balance"):  # what directions gave belongs to the balance they had
        run(resume=path, balance=3.0)
    with pytest.raises(ResumeError):  # as many batches, cut elsewhere
        run(resume=path, cut=(5, 3, 4, 1))
    again = run(resume=path)
    assert (again.rms, again.interval, again.history) == (whole.rms, whole.interval, whole.history)
    assert close(whole, float(flat(dense_diagonal(model, losses, x, y)).square().mean().sqrt()))


def test_marks_of_a_batch_may_differ_in_their_last_digit_only() -> None:
    model = seeded(lambda: Function(torch.tanh))
    x, y = data(8, 5)

    class Drifting:
        """Values that differ from pass to pass, as those of an attack on a device that adds in any order."""

        def __init__(self, size: float) -> None:
            self.passes, self.size = 0, size

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            return iter(batches_of(x * (1.0 + self.size * self.passes), y, 4))

    def run(size: float) -> hd.Measurement:
        return hd.measure(
            hd.Objective(model), Drifting(size), plan=Plan("propagation", deflate=2), max_replicates=10,
            deterministic_check=False,
        )  # fmt: skip

    assert run(1e-15).plan.deflate == 2
    with pytest.raises(NotDeterministicError):
        run(1e-3)


@pytest.mark.parametrize("loss", ["signs", "bce", "weights"])
def test_other_losses_agree_with_exact(loss: str) -> None:
    """Many classes (Gauss-Newton by signs), vectors of probabilities, class weights with smoothing and decay."""
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 3)))
    x, y = data(9, 5)
    objective = {
        "signs": lambda: hd.Objective(model),
        "bce": lambda: hd.Objective(model, "bce"),
        "weights": lambda: hd.Objective(model, l2=1e-3, label_smoothing=0.1, class_weights=[0.5, 2.0, 1.0]),
    }[loss]()
    targets = torch.eye(3, dtype=torch.float64)[y] if loss == "bce" else y
    batches = batches_of(x, targets, 4)
    plan = Plan("propagation", gauss_newton="signs" if loss == "signs" else "exact", deflate=3)
    truth = hd.measure(objective, batches, method="exact").rms
    found = hd.measure(objective, batches, plan=plan, max_replicates=60, rtol=1e-9)
    assert close(found, truth)


def test_the_population_target_takes_any_plan_without_its_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.methods.propagation.GIVEN_BYTES", 10)
    model = seeded(lambda: Function(torch.tanh))
    x, y = data(40, 5)
    found = hd.measure(hd.Objective(model), [(x, y)], plan=Plan("propagation", deflate=3), target="population")
    assert found.plan.deflate == 0
