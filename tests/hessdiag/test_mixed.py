"""Mixed precision by accelerate: the function of the weights in their own precision, and the model handed back as it came.

The reference is the same model as it was before it was prepared.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from accelerated import prepared
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.callbacks import TrainerWatch, Watch
from hessdiag.errors import HessdiagError, UncoveredModelError
from hessdiag.problem.handing_back import AUTOCAST_OFF, MIXED_OFF

torch.set_num_threads(1)
METHODS = ("auto", "exact", "propagation", "hutchinson", "reference")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Around(nn.Module):
    """As DistributedDataParallel stands around what it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 5, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(2)]


PREPARED: dict[str, Callable[[], nn.Module]] = {
    "the model": lambda: prepared(Net()),
    "a function for a method": lambda: prepared(Net(), bound=False),
    "inside another": lambda: Around(prepared(Net())),
    "twice": lambda: prepared(Around(prepared(Net()))),
}


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """The very objects that stand for forward, and what the model gives."""
    own = [(vars(m).get("forward"), vars(m).get("_original_forward")) for m in model.modules()]
    with torch.no_grad():
        return [*own, tuple(model(data()[0][0]).flatten().tolist())]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PREPARED)
def test_what_accelerate_prepared_is_measured_in_the_precision_of_its_weights(name: str, method: str) -> None:
    model = PREPARED[name]()
    before, plain = state(model), state(Net())
    assert before[-1] != plain[-1]  # it rounds
    found = hd.measure(hd.Objective(model), data(), method=method, max_replicates=10)
    wanted = hd.measure(hd.Objective(Net()), data(), method=method, max_replicates=10)
    assert found.rms == pytest.approx(wanted.rms, rel=1e-12)
    assert (found.plan.method, found.status) == (wanted.plan.method, wanted.status)
    assert found.notes.count(MIXED_OFF) == 1
    assert AUTOCAST_OFF not in found.notes
    assert MIXED_OFF not in wanted.notes
    assert state(model) == before


def test_of_a_diagonal_and_a_population_as_well() -> None:
    model, batches = prepared(Net()), data() * 10
    before = state(model)
    found = hd.diagonal(hd.Objective(model), batches)
    truth = hd.diagonal(hd.Objective(Net()), batches).total
    assert found.provenance["notes"] == [MIXED_OFF]
    assert all(torch.equal(found.total[name], wanted) for name, wanted in truth.items())
    each = hd.diagonal(hd.Objective(model), batches, per_sample=True)
    assert each.total["last.bias"].mean(0) == pytest.approx(truth["last.bias"], rel=1e-5)
    whole = hd.measure(hd.Objective(model), batches, target="population", method="propagation")
    plain = hd.measure(hd.Objective(Net()), batches, target="population", method="propagation")
    assert whole.rms == plain.rms
    assert state(model) == before


class Failing:
    """Data that end in an exception of somebody's own, after some batches."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from data()
        raise self.error


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), MemoryError()])
def test_after_an_exception_it_is_handed_back_too(error: BaseException) -> None:
    model = PREPARED["twice"]()
    before = state(model)
    with pytest.raises((type(error), HessdiagError)):
        hd.measure(hd.Objective(model), Failing(error), method="exact")
    assert state(model) == before
    x, y = data()[0]
    with pytest.raises(HessdiagError):
        hd.measure(hd.Objective(model), [(x * float("nan"), y)])
    assert state(model) == before


def doubled(model: nn.Module) -> nn.Module:
    """Somebody's own change of what the model gives, told as decorators tell it."""
    before: Any = model.forward

    @functools.wraps(before)
    def forward(self: nn.Module, *args: Any) -> Tensor:
        return 2 * before(*args)  # type: ignore[no-any-return]

    model.forward = MethodType(forward, model)
    return model


def kept_as_original(model: nn.Module) -> nn.Module:
    """The same by someone who keeps the former forward under accelerate's name."""
    model._original_forward = model.forward  # type: ignore[assignment]
    return doubled(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [doubled, kept_as_original])
def test_what_somebody_else_put_around_a_forward_stays(wrap: Any, method: str) -> None:
    """Below the mixed precision it is part of the function; above it nobody can tell, and autocast is refused."""
    batches = data()
    plain = hd.measure(hd.Objective(wrap(Net())), batches, method=method, max_replicates=10)
    below = prepared(wrap(Net()))
    before = state(below)
    assert hd.measure(hd.Objective(below), batches, method=method, max_replicates=10).rms == plain.rms
    assert plain.rms != hd.measure(hd.Objective(Net()), batches, method=method, max_replicates=10).rms
    assert state(below) == before
    above = wrap(prepared(Net()))
    before = state(above)
    with pytest.raises(UncoveredModelError, match="autocast is on where the model runs"):
        hd.measure(hd.Objective(above), batches, method=method)
    assert state(above) == before


def test_autocast_of_the_models_own_is_refused_all_the_same() -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    with pytest.raises(UncoveredModelError, match="autocast"):
        hd.measure(hd.Objective(prepared(Own())), data())


def test_a_watch_measures_it_and_says_so() -> None:
    model = prepared(Net())
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = Watch(data())
        row = watch(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            around = Watch(data())
            assert around(model)["hessian_rms"] == row["hessian_rms"]
    assert row["hessian_rms"] == Watch(data())(Net())["hessian_rms"]
    assert watch.last is not None
    assert around.last is not None
    assert MIXED_OFF in watch.last.notes
    assert {MIXED_OFF, AUTOCAST_OFF} <= set(around.last.notes)
    assert state(model) == before


def test_the_loss_of_a_trainer_in_mixed_precision_is_compared_in_full() -> None:
    """Asked for under autocast it would be off by a part in a thousand: another loss, for all that is known."""

    class Answer(dict):  # type: ignore[type-arg]
        __getattr__ = dict.__getitem__

    class Named(Net):
        def forward(self, x: Tensor) -> Any:
            return Answer(logits=super().forward(x))

    class Trainer:
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(model(inputs["x"]).logits, inputs["labels"])

    model = Named()
    model._original_forward = model.forward
    model.forward = MethodType(torch.autocast("cpu", dtype=torch.bfloat16)(Named.forward), model)
    x, y = data()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = TrainerWatch(Trainer(), [{"x": x, "labels": y}])
        assert watch(model)["hessian_rms"] == pytest.approx(hd.measure(hd.Objective(Net()), [(x, y)]).rms, rel=1e-12)
