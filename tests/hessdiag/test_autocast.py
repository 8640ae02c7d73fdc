"""Autocast around a measurement is switched off and named; inside the model it is refused, by every method alike."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hessdiag import Objective, diagonal, measure
from hessdiag.errors import HessdiagError, UncoveredModelError
from hessdiag.problem.handing_back import AUTOCAST_OFF

METHODS = ("exact", "propagation", "hutchinson", "reference")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_around_a_measurement_it_is_switched_off_and_told(method: str) -> None:
    model, batches = net(), data()
    plain = measure(Objective(model), batches, method=method, max_replicates=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = measure(Objective(model), batches, method=method, max_replicates=12)
        assert torch.is_autocast_enabled("cpu")
    assert under.rms == plain.rms
    assert AUTOCAST_OFF in under.notes
    assert AUTOCAST_OFF not in plain.notes


def test_of_a_diagonal_and_a_population_it_is_told_too() -> None:
    model, batches = net(), data() * 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = diagonal(Objective(model), batches, method="exact")
        each = diagonal(Objective(model), batches, method="exact", per_sample=True)
        whole = measure(Objective(model), batches, target="population", method="propagation")
    assert found.provenance["notes"] == each.provenance["notes"] == [AUTOCAST_OFF]
    assert AUTOCAST_OFF in whole.notes
    plain = diagonal(Objective(model), batches, method="exact")
    assert "notes" not in plain.provenance
    assert all(torch.equal(found.total[name], value) for name, value in plain.total.items())


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x).float()


@pytest.mark.parametrize("method", METHODS)
def test_inside_the_model_it_is_refused_by_name(method: str) -> None:
    with pytest.raises(UncoveredModelError, match="autocast"):
        measure(Objective(Rounded()), data(), method=method)


def compiled_whole() -> nn.Module:
    return torch.compile(Rounded(), backend="eager")  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    model = Rounded()
    model.compile(backend="eager")
    return model


def compiled_part_inside() -> nn.Module:
    return nn.Sequential(torch.compile(Rounded(), backend="eager"))  # type: ignore[arg-type]


def compiled_part_under_it() -> nn.Module:
    model = Rounded()
    model.net.compile(backend="eager")
    return model


def scripted() -> nn.Module:
    return torch.jit.script(Rounded())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make", [compiled_whole, compiled_in_place, compiled_part_inside, compiled_part_under_it, scripted]
)
def test_inside_a_compiled_or_scripted_model_it_is_refused_too(make: Callable[[], nn.Module], method: str) -> None:
    """Compiled code is no sequence of calls in which autocast could be seen: it is run call by call."""
    with pytest.raises(UncoveredModelError, match="autocast"):
        measure(Objective(make()), data(), method=method, max_replicates=12)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_a_compiled_part_is_measured_as_the_plain_one(method: str) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.fast = torch.compile(self.net, backend="aot_eager")  # which could not be differentiated twice

        def forward(self, x: Tensor) -> Tensor:
            return self.fast(x)  # type: ignore[no-any-return]

    found = measure(Objective(Part(), parameters="net.*"), data(), method=method, max_replicates=12)
    assert found.rms == measure(Objective(net()), data(), method=method, max_replicates=12).rms


@pytest.mark.parametrize("method", METHODS)
def test_inside_the_loss_it_is_refused_as_well(method: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = outputs @ torch.eye(3).to(outputs)
        return nn.functional.cross_entropy(mixed.float(), targets, reduction="none")

    with pytest.raises(UncoveredModelError, match="autocast"):
        measure(Objective(net(), loss), data(), method=method)


class Adapted(nn.Module):
    """A frozen half-precision base, with an adapter of low rank before its activation and a head after it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(5, 6).to(dtype).requires_grad_(False)
        self.down = nn.Linear(5, 2, bias=False)
        self.up = nn.Linear(2, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.base.weight.dtype
        hidden = torch.tanh(self.base(x.to(dtype)) + self.up(self.down(x)).to(dtype))
        return self.head(hidden.to(x.dtype))  # type: ignore[no-any-return]


@pytest.mark.parametrize("audit", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_what_rounds_by_itself_above_a_parameter_is_refused_as_well(
    method: str, dtype: torch.dtype, audit: bool
) -> None:
    """The audit's copy in double rounds nowhere, and agreed; the norms were off by up to 7e-3, and called exact."""
    with pytest.raises(UncoveredModelError, match=rf"'up\.weight' is rounded to {str(dtype)[6:]} \(ToCopy\)"):
        measure(Objective(Adapted(dtype)), data(), method=method, max_replicates=12, audit_model=audit)
    with pytest.raises(UncoveredModelError, match="is rounded"):
        diagonal(Objective(Adapted(dtype)), data(), method="exact", audit_model=audit)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_rounded_below_all_parameters_is_a_constant(method: str) -> None:
    """A head on a frozen base in half precision: a linear layer, with what the base gives as its inputs."""
    model, batches = Adapted(torch.bfloat16), data()
    found = measure(Objective(model, parameters="head.*"), batches, method=method, max_replicates=12)
    with torch.no_grad():
        given = [
            (torch.tanh(model.base(x.bfloat16()) + model.up(model.down(x)).bfloat16()).float(), y) for x, y in batches
        ]
    alone = measure(Objective(nn.Sequential(model.head)), given, method=method, max_replicates=12)
    assert found.rms == pytest.approx(alone.rms, rel=1e-6)
    whole = measure(Objective(model.float()), batches, method="exact")
    assert whole.status == "exact"


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_rounds_is_refused(method: str) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.bfloat16(), targets, reduction="none").float()

    with pytest.raises(UncoveredModelError, match="is rounded to bfloat16"):
        measure(Objective(net(), loss), data(), method=method)


class Drawing:
    """Batches in an order drawn from every global generator there is."""

    def __iter__(self):
        batches = data() * 3
        random.shuffle(batches)
        yield from (batches[i] for i in np.random.permutation(len(batches)).tolist())  # noqa: NPY002
        torch.rand(1)


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_of_torch_numpy_and_python_are_handed_back(fails: bool) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002

    def seed() -> None:
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        torch.manual_seed(7)

    objective = Objective(Rounded() if fails else net())
    seed()
    wanted = draws()
    seed()
    if fails:
        with pytest.raises(HessdiagError):
            measure(objective, Drawing(), method="exact")
    else:
        assert measure(objective, Drawing(), method="exact").samples == 48
    assert draws() == wanted
