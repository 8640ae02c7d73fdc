"""The methods' table, what stands behind it, the passes they take, and Hutchinson's blocks of samples."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import seeded
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.errors import AuditError, ConfigurationError, ResumeError, UnknownNameError
from hessdiag.kernels.products import Products
from hessdiag.kernels.tensors import accumulate, zeros
from hessdiag.measuring.ranks import World
from hessdiag.methods import METHODS, Case, base
from hessdiag.methods.batches import Numbered, numbered, survey
from hessdiag.methods.hutchinson import blocks, probe

ROOT = Path(__file__).parents[2]
ENGINE = [p for p in (ROOT / "hessdiag").rglob("*.py") if not {"cli", "show"} & set(p.parts)]


def small() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3))).double()


def data(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    before = dict(base._TABLE)
    yield
    base._TABLE.clear()
    base._TABLE.update(before)


# -- the table


def test_no_method_is_compared_by_name_outside_its_file() -> None:
    """No `method == "..."` and the like: what differs is asked of the method."""
    found = []
    for path in ENGINE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                asked = any(getattr(side, "attr", getattr(side, "id", "")) == "method" for side in sides)
                literal = [c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)]
                if asked and (set(literal) & {*METHODS, "auto"}):
                    found.append(f"{path}:{node.lineno}")
    assert not found


def test_no_function_of_the_engine_takes_more_than_seven_parameters() -> None:
    """Besides what users call (`measure`, `diagonal`, `Objective`) and torch calls: a stand-in has the signature of what
    it stands for. Networks and checkpoints are not the engine.
    """
    rooms = ("measuring", "methods", "kernels", "norm", "graph", "layers", "sites", "problem")
    found, seen = [], 0
    for path in ENGINE:
        attack = path.stem in ("ascent", "perturbation")  # a user's door too
        if (path.parent.name not in rooms and path.stem != "signs") or attack:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                seen += 1
                taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([a for a in taken if a not in ("self", "cls")]) > 7:
                    found.append(f"{path.name}:{node.name}")
    assert seen > 300
    stand_in = "attention.py:multi_head"
    assert sorted(found) == [stand_in, "entry.py:diagonal", "entry.py:measure", "objective.py:__init__"]


@pytest.mark.parametrize("name", [n for n in hd.__all__ if inspect.isroutine(getattr(hd, n)) or n in ("Objective",
    "Method", "Work")])  # fmt: skip
def test_public_docstrings_name_every_parameter(name: str) -> None:
    public = getattr(hd, name)
    every = [public]
    if inspect.isclass(public):
        every += [f for n, f in vars(public).items() if inspect.isfunction(f) and not n.startswith("_")]
    for function in every:
        text = inspect.getdoc(function) or ""
        for parameter in inspect.signature(function).parameters:
            if parameter != "self":
                assert re.search(rf"`[^`]*\b{parameter}\b[^`]*`", text), f"{name}: {parameter}"


# -- a method from outside


def example() -> str:
    blocks_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(), re.S)
    assert len(blocks_) == 1
    return blocks_[0]


def test_the_documented_example_runs_and_agrees(table: None, capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    exec(example(), scope)
    assert capsys.readouterr().out.strip().endswith("True")
    assert abs(scope["mine"].rms / scope["theirs"].rms - 1) < 1e-7
    assert [e.check for e in scope["mine"].audit.entries].count("own") == 4
    with pytest.raises(UnknownNameError, match="differences"):
        hd.measure(hd.Objective(small()), [data()], method="diferences")


def test_a_method_from_outside_serves_every_command(table: None) -> None:
    """Diagonal by one-hot products: both commands, several batches, the population target, the forecast, resume."""
    from hessdiag.measuring.forecast import forecast

    hd.register_method(_method(OneByOne, deterministic=True))
    objective, batches = hd.Objective(small(), l2=0.1), [data(), data(30, 2)]
    truth = hd.diagonal(objective, batches)
    for name, t in hd.diagonal(objective, batches, method="outside").total.items():
        assert torch.allclose(t, truth.total[name], rtol=1e-10, atol=1e-14)
    found, wanted = (hd.measure(objective, batches, method=m, target="population") for m in ("outside", "exact"))
    assert found.rms == pytest.approx(wanted.rms, rel=1e-10)
    assert "outside" in [one.method for one in forecast(objective, batches)]


def test_what_a_method_gives_is_not_changed_under_it(table: None) -> None:
    """Tensors that a method keeps are its own, unless it says that it hands them over."""
    hd.register_method(_method(Kept, deterministic=True))
    objective = hd.Objective(small())
    first = hd.measure(objective, [data()], method="outside").rms
    assert hd.measure(objective, [data()], method="outside").rms == first


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_wrong_registration_is_caught_by_the_audit(table: None, factor: float) -> None:
    hd.register_method(_method(OneByOne, deterministic=True, factor=factor))
    if factor == 1.0:
        assert hd.measure(hd.Objective(small()), [data()], method="outside").audit.passed  # type: ignore[union-attr]
        return
    for call in (hd.measure, hd.diagonal):
        with pytest.raises(AuditError, match=r"own of .*the method is wrong"):
            call(hd.Objective(small()), [data()], method="outside")  # type: ignore[operator]


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_a_stochastic_method_from_outside_is_measured_or_caught(table: None, shift: float) -> None:
    """Gaussian probes; a bias of far more than eight errors of their mean is caught, one within them cannot be."""
    hd.register_method(_method(Gaussian, factor=shift))
    objective, batches = hd.Objective(small()), [data(), data(30, 2)]
    if not shift:
        m = hd.measure(objective, batches, method="outside", rtol=0.2, max_replicates=400)
        truth = hd.measure(objective, batches, method="exact").rms
        assert m.interval[0] <= truth <= m.interval[1]
        assert m.replicates >= 10
        return
    with pytest.raises(AuditError, match="own of"):
        hd.measure(objective, batches, method="outside")


def _less(parts: Any) -> Any:
    return {part: {n: t for n, t in given.items() if n != "2.weight"} for part, given in parts.items()}


def _every(parts: Any, change: Any) -> Any:
    return {part: {n: change(t) for n, t in given.items()} for part, given in parts.items()}


GIVEN: dict[str, tuple[Any, str]] = {
    "nothing": (lambda parts: None, "gives None, where a dictionary with "),
    "a tensor": (lambda parts: torch.ones(3), "gives a Tensor, where a dictionary with "),
    "another part": (lambda parts: {"totl": parts.popitem()[1]}, r"gives \['totl'\], where a dictionary with "),
    "tensors alone": (lambda parts: {part: torch.ones(3) for part in parts}, "gives a Tensor as '.*', no dictionary of"),
    "too few": (_less, "gives nothing for parameter '2.weight' in '"),
    "too many": (
        lambda parts: {part: {**given, "more": torch.ones(1)} for part, given in parts.items()},
        "gives 'more', no chosen parameter, in '"),
    "flat": (lambda parts: _every(parts, Tensor.flatten), r"gives shape \[20\] for '0.weight' in '.*shape \[4, 5\] is"),
    "numpy": (lambda parts: _every(parts, Tensor.numpy), "gives a ndarray for '0.weight' in '.*'; a tensor of"),
}  # fmt: skip


@pytest.mark.parametrize("call", ["measure", "measure without an audit", "diagonal", "population"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", GIVEN)
def test_what_a_method_gives_must_be_tensors_like_the_parameters(
    name: str, stochastic: bool, call: str, table: None
) -> None:
    """One line that says what came and what is wanted, wherever the method is asked."""
    change, words = GIVEN[name]
    own = Gaussian if stochastic else OneByOne
    which = "replicate" if stochastic else "known"

    def changed(self: hd.Work, *given: Any) -> Any:
        return change(getattr(own, which)(self, *given))

    hd.register_method(_method(type("Changed", (own,), {which: changed}), deterministic=not stochastic))
    objective, batches = hd.Objective(small()), [data(200)]
    calls = {
        "measure": hd.measure,
        "measure without an audit": partial(hd.measure, audit_model=False),
        "diagonal": partial(hd.diagonal, audit_model=False),
        "population": partial(hd.measure, audit_model=False, target="population"),
    }
    with pytest.raises(ConfigurationError, match=rf"^method 'outside': {which}\(batch, \w+\) {words}") as caught:
        calls[call](objective, batches, method="outside")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_method_without_what_its_kind_needs_is_told(deterministic: bool, table: None) -> None:
    hd.register_method(_method(type("Idle", (hd.Work,), {}), deterministic=deterministic))
    wanted = r"deterministic = True, .* no known\(" if deterministic else r"deterministic = False, .* no replicate\("
    with pytest.raises(ConfigurationError, match=f"method 'outside' has {wanted}"):
        hd.measure(hd.Objective(small()), [data()], method="outside")


def test_what_is_no_method_is_refused(table: None) -> None:
    class Nameless(hd.Method):
        work = hd.Work

    for wrong in (hd.Method, object(), hd.Method(), Nameless(), _method(OneByOne, name="auto"),
                  _method(OneByOne, name="exact"), _method(OneByOne, name="two words")):  # fmt: skip
        with pytest.raises(ConfigurationError):
            hd.register_method(wrong)  # type: ignore[arg-type]


def _method(work: type[hd.Work], *, name: str = "outside", deterministic: bool = False, factor: float = 1.0) -> Any:
    made = type("Outside", (hd.Method,), {"name": name, "deterministic": deterministic})()
    made.work = type("Worker", (work,), {"factor": factor})
    return made


class OneByOne(hd.Work):
    """One Hessian-vector product per parameter; the parts are not told apart."""

    factor = 1.0

    def known(self, batch: Numbered, tell: Any) -> dict[str, dict[str, Tensor]]:
        products = Products(self.case.objective, batch.inputs, batch.targets, parts=False)
        total = {}
        for name, p in self.case.objective.parameters.items():
            entries = products.entries(name, list(range(p.numel())))
            total[name] = self.factor * torch.tensor(entries, dtype=torch.float64).reshape(p.shape)
        return {"gauss_newton": total, "functional": {name: torch.zeros_like(t) for name, t in total.items()}}


class Kept(OneByOne):
    """The same tensors at every call."""

    memory: dict[int, Any] = {}  # noqa: RUF012

    def known(self, batch: Numbered, tell: Any) -> dict[str, dict[str, Tensor]]:
        return self.memory.setdefault(len(batch.targets), super().known(batch, tell))


class Gaussian(hd.Work):
    """Hutchinson's estimator with normal probes; `factor` is added to every entry."""

    factor = 0.0

    def replicate(self, batch: Numbered, r: int) -> dict[str, dict[str, Tensor]]:
        products = Products(self.case.objective, batch.inputs, batch.targets, parts=False)
        generator = torch.Generator().manual_seed(1000 * self.case.seed + r)
        v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
             for n, p in self.case.objective.parameters.items()}  # fmt: skip
        return {"total": {n: v[n] * hv + self.factor for n, hv in products.hessian(v).items()}}


# -- passes


class Counted(nn.Sequential):
    """Counts its forward passes, and those of its copies."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.passes += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("method", "most"), [("auto", 10), ("exact", 10), ("propagation", 10), ("hutchinson", 10), ("reference", 10)]
)
def test_forward_passes_of_a_measurement_of_two_batches(method: str, most: int) -> None:
    """19 and 18 of auto and exact, 17 and 15 of the others, before there was a case and a twin that share theirs."""
    model = Counted(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3)).double()
    Counted.passes = 0
    hd.measure(hd.Objective(model), [data(20), data(20, 2)], method=method, max_replicates=10)
    assert Counted.passes <= most


def test_the_population_target_reports_the_loss_with_weight_decay() -> None:
    objective = hd.Objective(small(), l2=0.5)
    losses = [hd.measure(objective, [data()], target=target).loss for target in ("data", "population")]
    assert losses[0] == losses[1]
    assert losses[0] > hd.measure(hd.Objective(small()), [data()]).loss + 0.1


def test_resume_files_of_an_older_form_are_refused_in_one_line(tmp_path: Path) -> None:
    from hessdiag.store.states import write_state

    path = tmp_path / "r.st"
    write_state(path, "hessdiag-resume/2", {"identity": {}, "progress": {}, "tensors": {}})
    with pytest.raises(ResumeError, match="hessdiag-resume/2") as caught:
        hd.measure(hd.Objective(small()), [data()], method="hutchinson", resume=path)
    assert "\n" not in str(caught.value)


# -- Hutchinson, a probe per block of samples


def test_a_batch_is_cut_where_it_straddles_blocks() -> None:
    x, y = data(50)
    cut = [(b, p.start, len(p.targets)) for b, p in blocks(Numbered(0, 30, x, y), 32)]
    assert [(b, n) for b, _, n in cut] == [(0, 2), (1, 32), (2, 16)]
    whole = torch.cat([p.inputs for _, p in blocks(Numbered(0, 30, x, y), 32)])
    assert torch.equal(whole, x)
    assert [b for b, _ in blocks(Numbered(0, 64, x, y), 64)] == [1]
    assert [b for b, _ in blocks(Numbered(0, 30, x, y), 0)] == [0]


@pytest.mark.parametrize("block", [0, 16, 64])
def test_batching_changes_no_estimate(block: int) -> None:
    x, y = data(70)
    plan = hd.Plan("hutchinson", block=block)
    found = [
        hd.diagonal(hd.Objective(small()), list(zip(x.split(n), y.split(n))), plan=plan, replicates=4).total
        for n in (70, 20, 7)
    ]
    for other in found[1:]:
        for name, t in found[0].items():
            assert torch.allclose(t, other[name], rtol=1e-10, atol=1e-13)


def _case(objective: hd.Objective, batches: list[tuple[Tensor, Tensor]], plan: hd.Plan) -> Case:
    first = next(iter(numbered(objective, batches)))
    return Case(objective, batches, survey(objective, batches), first, 0, World(), chosen=plan)


def _hessians(objective: hd.Objective, x: Tensor, y: Tensor, block: int) -> Iterator[Tensor]:
    """The Hessian of each block's summed loss, dense."""
    size = objective.size
    for low in range(0, len(y), block):
        products = Products(objective, x[low : low + block], y[low : low + block], parts=False)
        rows = []
        for k in range(size):
            unit = torch.zeros(size, dtype=torch.float64)
            unit[k] = 1
            parts = unit.split([p.numel() for p in objective.parameters.values()])
            v = {n: u.reshape(p.shape) for (n, p), u in zip(objective.parameters.items(), parts)}
            rows.append(torch.cat([t.flatten() for t in products.hessian(v).values()]))
        yield torch.stack(rows)


@pytest.mark.statistical
def test_blocks_have_the_mean_and_the_variance_of_their_formula() -> None:
    """Mean and variance sum_b sum_{j != k} (H_b)_kj^2 of 1200 replicates; 39 entries: below 1e-4 false alarms each."""
    objective, (x, y), block = hd.Objective(small()), data(12), 4
    hessians = torch.stack(list(_hessians(objective, x, y, block)))
    mean = hessians.sum(0).diagonal()
    variance = hessians.square().sum((0, 2)) - hessians.diagonal(dim1=1, dim2=2).square().sum(0)
    work = METHODS["hutchinson"].work(_case(objective, [(x, y)], hd.Plan("hutchinson", block=block, parts=False)))
    batch = Numbered(0, 0, x, y)
    draws = torch.stack(
        [torch.cat([t.flatten() for t in work.replicate(batch, r)["total"].values()]) for r in range(1200)]
    )
    z = (draws.mean(0) - mean) / (variance / len(draws)).sqrt()
    assert float(z.abs().max()) < 5.5
    assert torch.allclose(draws.var(0), variance, rtol=0.35)


def test_one_block_is_the_plain_estimator() -> None:
    """`block=0`: one probe for all data, v * (H v) to the last bit."""
    objective, (x, y) = hd.Objective(small()), data()
    case = _case(objective, [(x, y)], hd.Plan("hutchinson", block=0, parts=False))
    found = METHODS["hutchinson"].work(case).replicate(Numbered(0, 0, x, y), 3)["total"]
    v = probe(objective, case.signs, 3)
    wanted = zeros(objective.parameters)
    accumulate(wanted, {n: v[n] * hv for n, hv in Products(objective, x, y, parts=False).hessian(v).items()})
    assert all(torch.equal(found[name], t) for name, t in wanted.items())


def test_plans_from_before_there_were_blocks_keep_their_one_probe() -> None:
    old: Mapping[str, Any] = {k: v for k, v in hd.Plan("hutchinson").to_dict().items() if k != "block"}
    assert hd.Plan.from_dict(old).block == 0
    assert hd.Plan.from_dict(hd.Plan("hutchinson").to_dict()).block == hd.Plan("hutchinson").block > 0
