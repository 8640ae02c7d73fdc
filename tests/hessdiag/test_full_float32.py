"""A measurement computes float32 with all its bits, whatever a user has allowed, and leaves every switch as it was."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.errors import HessdiagError
from hessdiag.problem import full_float32
from hessdiag.problem.full_float32 import PRECISION, TREE

BACKENDS: Any = torch.backends
NEW = hasattr(torch.backends, PRECISION)
new = pytest.mark.skipif(not NEW, reason="this torch has no fp32_precision")


def owner(path: str) -> Any:
    found = BACKENDS
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


def switches() -> dict[str, Any]:
    """All that can be read."""
    found: dict[str, Any] = {path: getattr(owner(path), PRECISION) for path in TREE} if NEW else {}
    for name, read in (
        ("conv", lambda: BACKENDS.cudnn.allow_tf32),
        ("matmul", lambda: BACKENDS.cuda.matmul.allow_tf32),
        ("word", torch.get_float32_matmul_precision),
    ):
        try:
            found[name] = read()
        except RuntimeError as error:  # the older switches do not say beside the newer ones
            found[name] = str(error)
    return found


def is_full() -> bool:
    found = switches()
    if NEW:
        return all(found[path] == "ieee" for path in TREE)
    return found["conv"] is False and found["word"] == "highest"


SETTINGS = (
    "as torch has it",
    "older, high",
    "older, medium",
    "older, none",
    "newer, all",
    "newer, some",
    "newer, none",
)


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a user has set, set back to what torch starts with."""
    if request.param.startswith("newer") and not NEW:
        pytest.skip("this torch has no fp32_precision")
    if request.param in ("older, high", "older, medium"):
        torch.set_float32_matmul_precision(request.param.split()[1])
    elif request.param == "older, none":
        torch.backends.cudnn.allow_tf32 = False
    elif request.param == "newer, all":
        BACKENDS.fp32_precision = "tf32"
    elif request.param == "newer, some":
        BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cuda.matmul.fp32_precision = "ieee", "tf32"
        BACKENDS.mkldnn.conv.fp32_precision = "bf16"
    elif request.param == "newer, none":
        BACKENDS.fp32_precision = "ieee"
    yield switches()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if NEW:
        for path in TREE:
            owner(path).fp32_precision = "tf32" if path in ("cudnn.conv", "cudnn.rnn") else "none"


def test_what_was_set_before_is_set_again(setting: dict[str, Any]) -> None:
    with full_float32.full_float32():
        assert is_full()
        with full_float32.full_float32():
            assert is_full()
        assert is_full()
    assert switches() == setting
    with pytest.raises(ZeroDivisionError), full_float32.full_float32():
        raise ZeroDivisionError
    assert switches() == setting


@new
def test_what_was_left_open_stays_open() -> None:
    """A switch that follows a more general one follows it afterwards, too."""
    BACKENDS.cuda.matmul.fp32_precision = "none"
    with full_float32.full_float32():
        pass
    try:
        BACKENDS.fp32_precision = "tf32"
        assert BACKENDS.cuda.matmul.fp32_precision == "tf32"
    finally:
        BACKENDS.fp32_precision = "none"


@pytest.mark.parametrize("word", ["highest", "high"])
@pytest.mark.parametrize("tf32", [False, True])
def test_before_torch_2_9(monkeypatch: pytest.MonkeyPatch, word: str, tf32: bool) -> None:
    said = [word]
    cudnn = SimpleNamespace(allow_tf32=tf32)
    older = SimpleNamespace(
        backends=SimpleNamespace(cudnn=cudnn),
        get_float32_matmul_precision=lambda: said[-1],
        set_float32_matmul_precision=said.append,
    )
    monkeypatch.setattr(full_float32, "torch", older)
    with full_float32.full_float32():
        assert (cudnn.allow_tf32, said[-1]) == (False, "highest")
    assert (cudnn.allow_tf32, said[-1]) == (tf32, word)


class Asking(nn.Module):
    """A net that notes whether float32 is whole where it runs, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen, self.fails = nn.Linear(3, 2), set[bool](), False

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        self.seen.add(is_full())
        out: Tensor = self.linear(x)
        return out * float("nan") if self.fails else out


def test_measurements_are_within_it_also_when_they_fail(setting: dict[str, Any]) -> None:
    model, x, y = Asking().eval(), torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    hd.measure(hd.Objective(model), [(x, y)], method="exact")
    hd.diagonal(hd.Objective(model), [(x, y)], method="propagation", replicates=2)
    assert switches() == setting
    model.fails = True
    with pytest.raises(HessdiagError):
        hd.measure(hd.Objective(model), [(x, y)])
    assert switches() == setting
    assert model.seen == {True}


def test_no_bit_depends_on_what_is_allowed(setting: dict[str, Any]) -> None:
    """On processors with instructions for bfloat16 "medium" would round the products of matrices to it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    data = [(torch.randn(64, 64), torch.arange(64) % 10)]
    found = hd.diagonal(hd.Objective(net), data)
    with full_float32.full_float32():
        plain = hd.diagonal(hd.Objective(net), data)
    assert all(torch.equal(found.total[name], plain.total[name]) for name in plain.total)
    assert switches() == setting
