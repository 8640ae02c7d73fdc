"""measure() as a whole: agreement, repeatability, the model handed back, interruption, resume, audit, populations."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Function, Residual, dense_diagonal, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import AuditError, BudgetError, ConfigurationError, ResumeError, UnknownNameError
from hessdiag.graph import LayerKind
from hessdiag.graph.sites.elementwise import Elementwise
from hessdiag.measuring import audit as audit_module
from hessdiag.measuring.loop import Event, Loop
from hessdiag.measuring.population import deal
from hessdiag.measuring.ranks import World
from hessdiag.methods import Case
from hessdiag.methods.base import Work
from hessdiag.methods.batches import Numbered, survey

torch.set_num_threads(1)
G = torch.Generator().manual_seed(1)
X = torch.randn(24, 2, 8, 8, generator=G, dtype=torch.float64)
Y = torch.randint(0, 3, (24,), generator=G)
BATCHES = [(X[:10], Y[:10]), (X[10:], Y[10:])]


def losses(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return seeded(Residual)


@pytest.fixture(scope="module")
def truth(model: nn.Module) -> dict[str, Tensor]:
    return dense_diagonal(model, losses, X, Y)


def rms(parts: Any) -> float:
    values = torch.cat([t.flatten().double() for t in parts.values()])
    return float(values.square().mean().sqrt())


def plain(m: hd.Measurement) -> dict[str, Any]:
    """Everything but the clock."""
    found = m.to_dict()
    found.pop("seconds")
    found["provenance"].pop("when")
    return found


@pytest.mark.parametrize("method", ["exact", "reference"])
def test_exact_methods_agree_with_the_dense_hessian(model: nn.Module, truth: dict[str, Tensor], method: str) -> None:
    m = hd.measure(hd.Objective(model), BATCHES, method=method, keep_diagonal=True)
    assert m.status == "exact"
    assert m.diagonal is not None
    for name, tensor in truth.items():
        assert (m.diagonal.total[name] - tensor).norm() <= 1e-10 * tensor.norm()
        assert m.layers[name].rms == pytest.approx(rms({name: tensor}), rel=1e-10)
    assert m.rms == pytest.approx(rms(truth), rel=1e-10)
    assert m.mean_scaled == pytest.approx(m.rms / m.parameters**0.5, rel=1e-12)
    assert m.interval == (m.rms, m.rms)
    weighted = {n: dict(model.named_parameters())[n].detach().square() * t for n, t in truth.items()}
    assert m.invariant is not None
    assert m.invariant.rms == pytest.approx(rms(weighted), rel=1e-10)
    assert m.trace.value == pytest.approx(sum(float(t.sum()) for t in truth.values()), rel=1e-10)
    outer, inner = (
        torch.cat([t.flatten() for t in d.values()]) for d in (m.diagonal.gauss_newton, m.diagonal.functional)
    )
    assert m.norm.cosine is not None
    assert m.norm.cosine.value == pytest.approx(float(torch.cosine_similarity(outer, inner, dim=0)), rel=1e-10)


@pytest.mark.parametrize("method", ["propagation", "hutchinson"])
def test_stochastic_methods_cover_the_truth(model: nn.Module, truth: dict[str, Tensor], method: str) -> None:
    """Intervals at 99.9 %, seeded, three per case: false alarm 0.3 % each."""
    m = hd.measure(hd.Objective(model), BATCHES, method=method, rtol=0.02, confidence=0.999, max_replicates=300, seed=1)
    assert m.interval[0] <= rms(truth) <= m.interval[1]
    assert abs(m.trace.value - sum(float(t.sum()) for t in truth.values())) <= m.trace.high - m.trace.value
    exact = hd.measure(hd.Objective(model), BATCHES, method="exact")
    share, known = m.shares["functional"], exact.shares["functional"]
    assert share is not None
    assert known is not None
    assert share.low <= known.value <= share.high
    assert m.norm.cosine is not None
    assert exact.norm.cosine is not None
    assert m.norm.cosine.low <= exact.norm.cosine.value <= m.norm.cosine.high


def test_same_seed_same_bits_and_another_seed_others(model: nn.Module) -> None:
    run = [hd.measure(hd.Objective(model), BATCHES, method="propagation", max_replicates=12, seed=s) for s in (0, 0, 1)]
    assert plain(run[0]) == plain(run[1])
    assert run[0].rms != run[2].rms
    assert run[0].rms == pytest.approx(run[2].rms, rel=0.2)


def test_a_stored_plan_can_be_given(model: nn.Module) -> None:
    first = hd.measure(hd.Objective(model), BATCHES, method="propagation", max_replicates=12)
    plan = hd.Plan.from_dict(json.loads(json.dumps(first.plan.to_dict())))
    again = hd.measure(hd.Objective(model), BATCHES, plan=plan, max_replicates=12)
    assert again.rms == first.rms
    with pytest.raises(UnknownNameError):
        hd.Plan("propagatoin")


def test_result_is_strict_json(model: nn.Module) -> None:
    for method in ("exact", "propagation"):
        text = json.dumps(hd.measure(hd.Objective(model), BATCHES, method=method).to_dict(), allow_nan=False)
        assert json.loads(text)["schema"] == "hessdiag-measurement/1"


class Watched(nn.Module):
    """A model with everything that a careless measurement would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(lambda: Function(torch.tanh))
        self.frozen = nn.Linear(3, 3).double()
        self.quiet = nn.Dropout(0.0)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) + self.quiet(self.frozen(x[:, :3]))


def test_model_comes_back_as_it_was_also_after_an_error() -> None:
    model = Watched().train()
    model.net.eval()
    model.frozen.requires_grad_(False)
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,))
    F.cross_entropy(model(x), y).backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    objective = hd.Objective(model)
    for method in ("exact", "propagation", "hutchinson", "reference"):
        hd.measure(objective, [(x, y)], method=method, max_replicates=10)
    with pytest.raises(hd.HessdiagError):
        hd.measure(objective, [(x, y), (x * float("inf"), y)])
    with pytest.raises(ZeroDivisionError):
        hd.measure(objective, [(x, y)], method="propagation", progress=lambda event: 1 / 0)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("frozen"))
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_progress_reports_phases_and_norm(model: nn.Module) -> None:
    events: list[Event] = []
    hd.measure(hd.Objective(model), BATCHES, method="propagation", max_replicates=12, progress=events.append)
    assert {"exact part", "replicates", "norm"} <= {e.phase for e in events}
    assert all(0 < e.done <= e.total for e in events)
    assert events[-1].estimate is not None


def test_ctrl_c_returns_what_is_there(model: nn.Module) -> None:
    def stop(event: Event) -> None:
        if event.replicates >= 6:
            raise KeyboardInterrupt

    m = hd.measure(hd.Objective(model), BATCHES, method="propagation", rtol=1e-6, progress=stop)
    assert "interrupted" in m.status
    assert m.replicates >= 2
    assert m.rms > 0
    with pytest.raises(KeyboardInterrupt):
        hd.measure(
            hd.Objective(model),
            BATCHES,
            method="propagation",
            progress=lambda e: (_ for _ in ()).throw(KeyboardInterrupt()),
        )


def test_limits_say_that_the_tolerance_was_not_reached(model: nn.Module) -> None:
    m = hd.measure(hd.Objective(model), BATCHES, method="propagation", rtol=1e-6, max_replicates=11)
    assert "before rtol=1e-06 was reached" in m.status
    assert m.replicates == 11
    m = hd.measure(hd.Objective(model), BATCHES, method="propagation", rtol=1e-6, max_seconds=1e-3)
    assert "before rtol=1e-06 was reached" in m.status


def test_more_replicates_than_can_be_told_apart_are_not_begun(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of the most there can be, and says so."""
    options = {"method": "hutchinson", "rtol": 1e-9}
    most = hd.measure(hd.Objective(model), BATCHES, max_replicates=20, **options)
    for place in ("hessdiag.norm.replicates", "hessdiag.measuring.stopping"):
        monkeypatch.setattr(f"{place}.CAPACITY", 20)
    found = hd.measure(hd.Objective(model), BATCHES, max_replicates=40, **options)
    assert found.replicates == 20
    assert (found.rms, found.interval) == (most.rms, most.interval)
    assert found.status.endswith("stopped at 20 replicates, the most there can be, before rtol=1e-09 was reached")
    for refused in (
        lambda: hd.measure(hd.Objective(model), BATCHES, min_replicates=65537, max_replicates=65537),
        lambda: hd.diagonal(hd.Objective(model), BATCHES, method="hutchinson", replicates=65537),
    ):
        with pytest.raises(ConfigurationError, match="65536"):
            refused()


def test_accumulators_do_not_grow_with_replicates(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = Loop.current

    def current(self: Loop, confidence: float) -> Any:
        held = [t for stream in self.streams.values() for t in stream.state_dict().values()]
        sizes.append(sum(t.numel() * t.element_size() for t in held))
        return original(self, confidence)

    monkeypatch.setattr(Loop, "current", current)
    m = hd.measure(hd.Objective(model), BATCHES, method="propagation", rtol=1e-6, max_replicates=60)
    assert len(set(sizes)) == 1
    assert sizes[0] <= 8 * 16 * m.parameters + (1 << 17)


@pytest.mark.parametrize("method", ["propagation", "hutchinson", "exact"])
def test_resumed_equals_uninterrupted_bit_for_bit(
    model: nn.Module, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    batches = list(zip(X.split(5), Y.split(5)))
    options: dict[str, Any] = {"method": method, "rtol": 1e-6, "max_replicates": 12, "audit_model": False}
    whole = hd.measure(hd.Objective(model), batches, **options)
    path, left, killed = tmp_path / "state.safetensors", 0, 0

    class Kill(BaseException):
        pass

    def kill(event: Event) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Kill

    while True:
        left = 5 + 11 * killed  # dies later and later, at points that fall anywhere
        try:
            m = hd.measure(hd.Objective(model), batches, **options, resume=path, progress=kill)
            break
        except Kill:
            killed += 1
    assert killed >= 2
    assert plain(m) == plain(whole)


def test_resume_files_of_another_measurement_are_refused(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "state"
    hd.measure(hd.Objective(model), BATCHES, method="propagation", max_replicates=10, resume=path)
    with pytest.raises(ResumeError, match="seed"):
        hd.measure(hd.Objective(model), BATCHES, max_replicates=10, resume=path, seed=1)
    with pytest.raises(ResumeError, match="method 'propagation'"):
        hd.measure(hd.Objective(model), BATCHES, method="hutchinson", resume=path)
    with pytest.raises(ResumeError, match="batches=2"):
        hd.measure(hd.Objective(model), BATCHES[:1], resume=path)
    with pytest.raises(ResumeError, match="data"):
        hd.measure(hd.Objective(model), [(X[:10] * 2, Y[:10]), BATCHES[1]], resume=path)
    with pytest.raises(ResumeError, match="loss="):
        hd.measure(hd.Objective(seeded(Residual, 1)), BATCHES, resume=path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResumeError, match="remove it"):
        hd.measure(hd.Objective(model), BATCHES, resume=path)


def agrees(audit: audit_module.Audit) -> bool:
    """To rounding; H u to what a one-sided step of 1e-7 leaves out, half of it times the next derivative: 6.1e-6 here."""
    return all(e.deviation < (1e-5 if e.check == "difference" else 1e-10) for e in audit.entries)


def test_audit_passes_and_says_what_it_compared(model: nn.Module) -> None:
    m = hd.measure(hd.Objective(model), BATCHES, method="exact")
    assert m.audit is not None
    assert m.audit.passed
    assert {e.check for e in m.audit.entries} == {"identity", "squares", "entries", "slope", "difference"}
    assert agrees(m.audit)
    float32 = seeded(Residual).float()
    m = hd.measure(hd.Objective(float32), [(X.float(), Y)], method="propagation")
    assert m.audit is not None
    assert m.audit.dtype == "float64"
    assert agrees(m.audit)


def test_audit_catches_a_wrong_layer_formula(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LayerKind.each

    def wrong(self: LayerKind, delta: Tensor) -> dict[str, Tensor]:
        return {n: g * 1.01 if n == "c2.weight" else g for n, g in original(self, delta).items()}

    monkeypatch.setattr(LayerKind, "each", wrong)
    with pytest.raises(AuditError, match=r"squares of layer 'c2\.weight'"):
        hd.measure(hd.Objective(model), BATCHES, method="propagation")
    m = hd.measure(hd.Objective(model), BATCHES, method="auto", max_replicates=10)
    assert m.plan.method == "hutchinson"
    assert any("audit failed" in note for note in m.notes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_audit_catches_squares_that_are_summed_wrongly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of single samples are right, and what signed passes make of them is not."""
    model, original = seeded(Residual).to(dtype), LayerKind.summed

    def wrong(self: LayerKind, delta: Tensor, *, group: int = 1) -> dict[str, Tensor]:
        found = original(self, delta, group=group)
        return {n: g * 1.02 if n == "c2.weight" else g for n, g in found.items()}

    monkeypatch.setattr(LayerKind, "summed", wrong)
    with pytest.raises(AuditError, match=r"sums of layer 'c2\.weight'"):
        hd.measure(hd.Objective(model), [(X.to(dtype), Y)], method="propagation")


def test_audit_catches_a_wrong_second_derivative(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Elementwise.second

    def wrong(node: Any) -> Any:
        factor = 1.001 if node.name() == "GeluBackward0" else 1.0
        return {pair: second * factor for pair, second in original(node).items()}

    monkeypatch.setattr(Elementwise, "second", wrong)
    with pytest.raises(AuditError, match="identity of layer"):
        hd.measure(hd.Objective(model), BATCHES, method="propagation")


def test_audit_always_includes_the_first_layers() -> None:
    deep = nn.Sequential(*[m for _ in range(14) for m in (nn.Linear(4, 4), nn.Tanh())]).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    m = hd.measure(hd.Objective(deep), [(x, y)], method="propagation", max_replicates=10)
    assert m.audit is not None
    checked = {e.layer for e in m.audit.entries if e.check == "identity"}
    assert "0" in checked
    assert len(checked) == audit_module.LAYERS


def test_auto_takes_exact_where_it_is_cheap_and_says_why(model: nn.Module) -> None:
    m = hd.measure(hd.Objective(model), BATCHES)
    assert m.plan.method == "exact"
    assert "multiplications" in m.plan.reason


@pytest.mark.parametrize("method", ["exact", "reference"])
def test_exact_methods_beyond_their_budget_name_propagation(model: nn.Module, method: str) -> None:
    for call in (hd.measure, hd.diagonal):
        with pytest.raises(BudgetError, match="propagation"):
            call(hd.Objective(model), BATCHES, method=method, budget=1.0)


def test_population_shards_are_a_partition_and_the_norm_is_unbiased() -> None:
    """120 data sets from a known population; mean of T within 5 standard errors of the population's square."""
    shard = deal(50, 16, 3)
    assert sorted(torch.bincount(shard).tolist()) == sorted([4] * 2 + [3] * 14)
    model = seeded(lambda: Function(torch.tanh, width=3))
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(
            0, 3, (n,), generator=generator
        )

    big = hd.diagonal(
        hd.Objective(model), [draw(5000) for _ in range(20)], audit_model=False, deterministic_check=False
    )
    target = rms(big.total) ** 2
    squares, naive = [], []
    for seed in range(120):
        batch = draw(32)
        m = hd.measure(
            hd.Objective(model),
            [batch],
            method="exact",
            target="population",
            seed=seed,
            audit_model=False,
            deterministic_check=False,
        )
        squares.append(m.norm.total.square / m.parameters)
        naive.append(
            rms(hd.diagonal(hd.Objective(model), [batch], audit_model=False, deterministic_check=False).total) ** 2
        )
    values = torch.tensor(squares)
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - target) < 5 * error
    assert float(torch.tensor(naive).mean()) > target + 5 * error


def test_saved_diagonal_holds_parts_and_errors(model: nn.Module, tmp_path: Path) -> None:
    from safetensors import safe_open

    d = hd.diagonal(hd.Objective(model), BATCHES, method="propagation", replicates=8)
    d.save(tmp_path / "d.safetensors")
    with safe_open(str(tmp_path / "d.safetensors"), "pt") as file:
        assert file.metadata()["format"] == "hessdiag-diagonal/1"
        for name, tensor in d.total.items():
            assert torch.equal(file.get_tensor(f"total|{name}"), tensor)
            assert torch.equal(file.get_tensor(f"standard_error|{name}"), d.standard_errors[name])
            parts = file.get_tensor(f"gauss_newton|{name}") + file.get_tensor(f"functional|{name}")
            assert torch.allclose(parts, tensor, rtol=1e-12, atol=1e-15)


class Refilled:
    """A loader whose every pass has an order of its own, in the same tensors batch after batch or in new ones."""

    def __init__(self, *, anew: bool) -> None:
        self.anew, self.passes = anew, 0
        self.x, self.y = torch.empty_like(X[:8]), torch.empty_like(Y[:8])

    def __iter__(self) -> Any:
        self.passes += 1
        order = torch.randperm(24, generator=torch.Generator().manual_seed(self.passes))
        for rows in order.split(8):
            x, y = self.x.copy_(X[rows]), self.y.copy_(Y[rows])
            yield (x.clone(), y.clone()) if self.anew else (x, y)


@pytest.mark.parametrize("method", ["exact", "propagation", "hutchinson"])
def test_a_loader_that_fills_the_same_tensors_anew_is_read_anew(model: nn.Module, method: str) -> None:
    options: Any = {"method": method, "max_replicates": 10, "deterministic_check": False, "audit_model": False}
    if method == "propagation":
        options["plan"] = hd.Plan("propagation")
    one, other = (hd.measure(hd.Objective(model), Refilled(anew=anew), **options) for anew in (True, False))
    assert other.norm.total.square == pytest.approx(one.norm.total.square, rel=1e-10)


def test_why_a_method_does_not_serve_holds_no_graph() -> None:
    """A traceback's frames hold what was computed in them: here the first batch's graph, until the end."""
    graphs: list[Any] = []

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x.flip(1)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (grads[0] + grads[0].flip(1)) * ctx.saved_tensors[0].flip(1)

    class Uncovered(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = Turned.apply(self[0](x))
            if h.grad_fn is not None:
                graphs.append(weakref.ref(h.grad_fn))
            return self[1](h)

    x, y = torch.randn(120, 5, generator=G, dtype=torch.float64), torch.arange(120) % 3
    held: list[bool] = []
    m = hd.measure(
        hd.Objective(Uncovered(nn.Linear(5, 4), nn.Linear(4, 3)).double()),
        [(x[:96], y[:96]), (x[96:], y[96:])],  # more than a probe's block: the first batch's graph serves nobody
        max_replicates=10,
        progress=lambda event: held.append(graphs[0]() is not None),
    )
    assert m.plan.method == "hutchinson"
    assert held
    assert not any(held)


def test_what_is_kept_of_a_batch_is_gone_before_it_is_made_again(model: nn.Module) -> None:
    objective = hd.Objective(model)
    facts = survey(objective, BATCHES)
    work = Work(Case(objective, BATCHES, facts, Numbered(0, 0, *BATCHES[0]), 0, World()))
    alive = weakref.ref(work.kept(Numbered(0, 0, *BATCHES[0]), Made))

    def make() -> Made:
        assert alive() is None
        return Made()

    assert work.kept(Numbered(0, 0, *BATCHES[0]), make) is alive()
    work.kept(Numbered(0, 0, X[:10].flip(0), Y[:10]), make)


class Made:
    """What is prepared of a batch."""


def test_effective_curvature_pairs_gain_and_activation() -> None:
    net = hd.networks.build("small_resnet", activation="rct:beta=1,alpha=14").eval()
    with torch.no_grad():
        net.bn1.weight.fill_(-3.0)  # type: ignore[union-attr,operator]
    m = hd.measure(
        hd.Objective(net), [(torch.rand(4, 1, 8, 8), torch.arange(4))], max_replicates=10, method="propagation"
    )
    found = {e.layer: e for e in m.effective_curvature}
    assert found["bn1"].mean == pytest.approx(21.0)
    assert found["bn1"].max_curvature == 7.0


def test_frozen_parameters_are_left_out_with_a_note_where_nobody_chose() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1])
    model[0].requires_grad_(False)
    note = "frozen parameters are left out (requires_grad=False): 0.weight, 0.bias"
    found = hd.measure(hd.Objective(model), batch)
    assert set(found.layers) == {"2.weight", "2.bias"}
    assert note in found.notes
    assert note in hd.diagonal(hd.Objective(model), batch).provenance["notes"]
    chosen = hd.measure(hd.Objective(model, parameters=["2.weight"]), batch)
    assert not any("left out" in note for note in chosen.notes)
    model.requires_grad_(True)
    assert not any("left out" in note for note in hd.measure(hd.Objective(model), batch).notes)
