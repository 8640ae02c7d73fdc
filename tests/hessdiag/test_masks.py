"""A causal mask that a model holds as a buffer, minus infinity where nothing is looked at."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessdiag as hd
from hessdiag.errors import NonFiniteError

T = 5


class Causal(nn.Module):
    """A small decoder whose mask is torch's own, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 7)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.tokens(x), src_mask=self.mask))


def made(dtype: torch.dtype) -> tuple[Causal, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randint(0, 7, (2, 4, T))
    return Causal().to(dtype).eval(), x, y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_with_its_mask_in_a_buffer_is_measured(dtype: torch.dtype) -> None:
    """Against plain double backward, entry by entry."""
    model, x, y = made(dtype)
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model.double()(x).flatten(0, 1), y.flatten())
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    squares = 0.0
    for gradient, parameter in zip(gradients, parameters):
        for k, entry in enumerate(gradient.flatten()):
            (row,) = torch.autograd.grad(entry, parameter, retain_graph=True)
            squares += float(row.flatten()[k]) ** 2
    truth = (squares / sum(p.numel() for p in parameters)) ** 0.5
    model.to(dtype)
    near = 1e-10 if dtype == torch.float64 else 1e-5
    for method in ("exact", "reference"):
        found = hd.measure(hd.Objective(model), [(x, y)], method=method)
        assert found.status == "exact"
        assert found.rms == pytest.approx(truth, rel=near)
    assert bool(model.mask.isneginf().any())


def test_a_checkpoint_holds_the_mask_and_a_parameter_of_minus_infinity_is_refused(tmp_path: Path) -> None:
    model, x, _ = made(torch.float32)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    found = hd.load_checkpoint(tmp_path / "net.pt", factory=Causal).model
    assert torch.equal(found(x), model(x))
    with torch.no_grad():
        model.out.bias[2] = -float("inf")
    with pytest.raises(NonFiniteError, match=r"'out\.bias' holds NaN or Inf"):
        hd.Objective(model)
    with torch.no_grad():
        model.out.bias[2] = 0.0
        model.mask[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="'mask' holds NaN or Inf"):
        hd.Objective(model)


class Choices(nn.Module):
    """Actions of which one is never allowed."""

    def __init__(self, low: float) -> None:
        super().__init__()
        self.low, self.inside, self.out = low, nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        never = torch.tensor([False, False, True, False])
        return self.out(torch.tanh(self.inside(x))).masked_fill(never, self.low)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_masked_by_a_number_are_those_left_out_and_by_infinity_are_told_how(dtype: torch.dtype) -> None:
    """The oracle has no such output."""
    torch.manual_seed(0)
    model, x, y = Choices(-1e9).to(dtype), torch.randn(8, 5, dtype=dtype), torch.tensor([0, 1, 3, 0, 1, 3, 0, 1])
    left = nn.Sequential(copy.deepcopy(model.inside), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(left[2], name).copy_(getattr(model.out, name)[[0, 1, 3]])
    truth = hd.diagonal(hd.Objective(left.double()), [(x.double(), y - (y == 3).long())], method="reference").total
    near = 1e-12 if dtype == torch.float64 else 1e-6
    for method in ("exact", "reference"):
        found = hd.diagonal(hd.Objective(model), [(x, y)], method=method).total
        assert torch.allclose(found["inside.weight"].double(), truth["0.weight"], rtol=0, atol=near)
        assert torch.allclose(found["out.weight"][[0, 1, 3]].double(), truth["2.weight"], rtol=0, atol=near)
        assert not bool(found["out.weight"][2].any())
    model.low = -float("inf")
    with pytest.raises(NonFiniteError, match=r"8 of 32 outputs are minus infinity .* put them at -1e9 instead"):
        hd.measure(hd.Objective(model), [(x, y)])
