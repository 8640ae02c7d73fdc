"""Float32 is whole while the project measures and judges, and set as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.problem.whole_float32 import whole_float32


def settings() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture(params=[(True, "highest"), (True, "medium"), (False, "high")])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, str]]:
    """What the user has set."""
    kept = settings()
    torch.backends.cudnn.allow_tf32 = request.param[0]
    torch.set_float32_matmul_precision(request.param[1])
    yield request.param
    torch.backends.cudnn.allow_tf32 = kept[0]
    torch.set_float32_matmul_precision(kept[1])


def test_what_was_set_before_is_set_again(before: tuple[bool, str]) -> None:
    with whole_float32():
        assert settings() == (False, "highest")
        with whole_float32():
            assert settings() == (False, "highest")
        assert settings() == (False, "highest")
    assert settings() == before
    with pytest.raises(ZeroDivisionError), whole_float32():
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has no settings for single kinds")
def test_what_was_set_kind_by_kind_is_set_again() -> None:
    cudnn: Any = torch.backends.cudnn
    kinds: list[Any] = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]
    before = [kind.fp32_precision for kind in kinds]
    wanted = ["ieee", "tf32", "tf32"]
    try:
        for kind, precision in zip(kinds, wanted):
            kind.fp32_precision = precision
        with whole_float32():
            assert [kind.fp32_precision for kind in kinds] == ["ieee"] * 3
        assert [kind.fp32_precision for kind in kinds] == wanted
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = precision


class Asking(nn.Module):
    """A net that notes what is set where it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 2), set[tuple[bool, str]]()

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        self.seen.add(settings())
        out: Tensor = self.linear(x)
        return out


def test_a_measurement_is_in_whole_float32(before: tuple[bool, str]) -> None:
    model = Asking().eval()
    hd.measure(hd.Objective(model, "cross_entropy"), [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))])
    assert model.seen == {(False, "highest")}
    assert settings() == before
