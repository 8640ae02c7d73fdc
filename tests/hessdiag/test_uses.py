"""Parameters that are applied more than once, or computed first: exact and propagation against p products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gate import gate
from test_sites_several import WIDTH, Attention, Block, mlp, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import hessdiag as hd
from hessdiag.errors import UncoveredModelError
from hessdiag.problem.forward import forward

torch.set_num_threads(1)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, high: int = 5, seed: int = 3) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


Y = torch.tensor([0, 2, 1])


class Net(nn.Module):
    """Modules by name, and a forward of them."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], **modules: Any) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Any) -> Tensor:
        return self.run(self, x)


def tied(bias: bool = True) -> Net:
    """A language model whose table is its head."""
    net = Net(
        lambda s, x: s.head(s.back(torch.tanh(s.mix(s.table(x))))),
        table=nn.Embedding(5, 4), mix=nn.Linear(4, 6), back=nn.Linear(6, 4), head=nn.Linear(4, 5, bias=bias),
    )  # fmt: skip
    net.head.weight = net.table.weight
    return net


def elman(s: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 4, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = torch.tanh(s.i(x[:, t]) + s.h(h))
    return s.o(h)


def gru(s: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 4, dtype=x.dtype)
    for t in range(x.shape[1]):
        r, z, n = s.i(x[:, t]).chunk(3, 1)
        hr, hz, hn = s.h(h).chunk(3, 1)
        z = torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
    return s.o(h)


def lstm(s: Any, x: Tensor) -> Tensor:
    h = c = torch.zeros(len(x), 4, dtype=x.dtype)
    for t in range(x.shape[1]):
        i, f, g, o = (s.i(x[:, t]) + s.h(h)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return s.o(h)


def cells(s: Any, x: Tensor) -> Tensor:
    state: Any = None
    for t in range(x.shape[1]):
        state = s.cell(x[:, t], state)
    return s.o(state[0] if isinstance(state, tuple) else state)


def whole(s: Any, x: Tensor) -> Tensor:
    return s.o(s.cell(x)[0].mean(1))


def packed(x: Tensor, lengths: tuple[int, ...], first: bool) -> Any:
    x = x if first else x.transpose(0, 1)
    return nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=first, enforce_sorted=False)


def bundled(s: Any, x: Tensor, lengths: tuple[int, ...] = (4, 2, 1)) -> Tensor:
    found, _ = nn.utils.rnn.pad_packed_sequence(s.cell(packed(x, lengths, True))[0], batch_first=True)
    return s.o(found.sum(1))


def deep(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x))
    for _ in range(3):
        h = torch.tanh(s.b(h) + x)
    return s.c(h.flatten(2).mean(2) if h.ndim > 2 else h)


def albert(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    for _ in range(2):
        h = s.norm(h + s.d(F.gelu(s.u(h))))
    return s.c(h.mean(1) if h.ndim > 2 else h)


def lora(s: Any, x: Tensor) -> Tensor:
    return s.c(torch.tanh(F.linear(x, s.frozen + s.up @ s.down)))


Model = Callable[[], tuple[nn.Module, Any, Tensor]]
X = inputs(3, 4, 3)
MODELS: dict[str, Model] = {
    "tied head": lambda: (tied(), tokens(3, 4), tokens(3, 4, seed=4)),
    "tied head without a bias": lambda: (tied(False), tokens(3, 4), tokens(3, 4, seed=4)),
    "Elman": lambda: (Net(elman, i=nn.Linear(3, 4), h=nn.Linear(4, 4), o=nn.Linear(4, 3)), X, Y),
    "GRU": lambda: (Net(gru, i=nn.Linear(3, 12), h=nn.Linear(4, 12), o=nn.Linear(4, 3)), X, Y),
    "LSTM": lambda: (Net(lstm, i=nn.Linear(3, 16), h=nn.Linear(4, 16), o=nn.Linear(4, 3)), X, Y),
    "RNNCell": lambda: (Net(cells, cell=nn.RNNCell(3, 4), o=nn.Linear(4, 3)), X, Y),
    "GRUCell": lambda: (Net(cells, cell=nn.GRUCell(3, 4), o=nn.Linear(4, 3)), X, Y),
    "LSTMCell": lambda: (Net(cells, cell=nn.LSTMCell(3, 4), o=nn.Linear(4, 3)), X[:, :2], Y),
    "linear applied in depth": lambda: (Net(deep, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3)), inputs(3, 4), Y),
    "convolution applied in depth": lambda: (
        Net(deep, a=nn.Conv2d(2, 2, 3, padding=1), b=nn.Conv2d(2, 2, 3, padding=1), c=nn.Linear(2, 3)),
        inputs(3, 2, 3, 2), Y),
    "grouped convolution applied in depth": lambda: (
        Net(deep, a=nn.Conv1d(4, 4, 3, padding=1), b=nn.Conv1d(4, 4, 3, padding=1, groups=2), c=nn.Linear(4, 3)),
        inputs(3, 4, 5), Y),
    "transposed convolution applied in depth": lambda: (
        Net(deep, a=nn.Conv2d(2, 2, 3, padding=1), b=nn.ConvTranspose2d(2, 2, 3, padding=1), c=nn.Linear(2, 3)),
        inputs(3, 2, 3, 2), Y),
    "grouped, dilated and transposed convolution on its own output": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.b(x))))[..., ::2].flatten(1)[:, :4]),
            b=nn.ConvTranspose1d(4, 4, 2, stride=2, dilation=2, groups=2, output_padding=1), c=nn.Linear(4, 3)),
        inputs(3, 4, 3), Y),
    "siamese": lambda: (
        Net(lambda s, x: s.c(F.silu(s.b(torch.tanh(s.a(x[:, 0])))) - F.silu(s.b(torch.tanh(s.a(x[:, 1]))))),
            a=nn.Linear(4, 5), b=nn.Linear(5, 4), c=nn.Linear(4, 3)),
        inputs(3, 2, 4), Y),
    "batch norm applied twice": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.n(torch.tanh(s.n(torch.tanh(s.a(x))))))),
            a=nn.Linear(4, 4), n=nn.BatchNorm1d(4), c=nn.Linear(4, 3)),
        inputs(3, 4), Y),
    "scale and shift applied twice": lambda: (
        Net(lambda s, x: s.c(torch.tanh(torch.tanh(s.a(x) * s.g + s.b) * s.g + s.b)), a=nn.Linear(4, 4),
            g=nn.Parameter(torch.tensor([0.5, -1.2, 2.0, 0.7])), b=nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.7])),
            c=nn.Linear(4, 3)),
        inputs(3, 4), Y),
    "repeated block": lambda: (
        Net(albert, a=nn.Linear(3, 4), u=nn.Linear(4, 5), d=nn.Linear(5, 4), norm=nn.LayerNorm(4), c=nn.Linear(4, 3)),
        X, Y),
    "weight through a function": lambda: (
        Net(lambda s, x: s.c(torch.tanh(F.linear(x, torch.tanh(s.w), s.v.exp()))), w=nn.Parameter(inputs(5, 4)),
            v=nn.Parameter(inputs(5)), c=nn.Linear(5, 3)),
        inputs(3, 4), Y),
    "gains that are functions": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.a(x) * s.log.exp() + s.one * s.two)), a=nn.Linear(4, 4),
            log=nn.Parameter(inputs(4)), one=nn.Parameter(inputs(4, seed=1)), two=nn.Parameter(inputs(4, seed=2)),
            c=nn.Linear(4, 3)),
        inputs(3, 4), Y),
    "function of a weight applied twice": lambda: (
        Net(lambda s, x: s.c(torch.tanh(F.linear(torch.tanh(F.linear(x, torch.tanh(s.w))), torch.tanh(s.w)))),
            w=nn.Parameter(inputs(4, 4)), c=nn.Linear(4, 3)),
        inputs(3, 4), Y),
    "weight as a view": lambda: (
        Net(lambda s, x: s.c(torch.tanh(F.linear(x, s.w.view(5, 4)))), w=nn.Parameter(inputs(20)), c=nn.Linear(5, 3)),
        inputs(3, 4), Y),
    "places looked up": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.t(x) + s.p(torch.arange(6)))).mean(1), t=nn.Embedding(5, 4),
            p=nn.Embedding(6, 4), c=nn.Linear(4, 3)),
        tokens(3, 6), Y),
    "LoRA": lambda: (
        Net(lora, frozen=nn.Parameter(inputs(4, 4), requires_grad=False), up=nn.Parameter(inputs(4, 2, seed=1)),
            down=nn.Parameter(inputs(2, 4, seed=2)), c=nn.Linear(4, 3)),
        inputs(3, 4), Y),
}  # fmt: skip


MODELS |= {
    "weight norm": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x))).mean((2, 3)))),
            a=parametrizations.weight_norm(nn.Conv2d(2, 3, 2)), b=parametrizations.weight_norm(nn.Conv2d(3, 4, 2)),
            c=parametrizations.weight_norm(nn.Linear(4, 3))),
        inputs(3, 2, 4, 4), Y),
    "weight norm applied twice": lambda: (
        Net(deep, a=nn.Linear(4, 4), b=parametrizations.weight_norm(nn.Linear(4, 4), dim=None), c=nn.Linear(4, 3)),
        inputs(3, 4), Y),
    "spectral norm": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.a(x))), a=parametrizations.spectral_norm(nn.Linear(4, 5)), c=nn.Linear(5, 3)),
        inputs(3, 4), Y),
    "orthogonal": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.a(x))), a=parametrizations.orthogonal(nn.Linear(4, 4)), c=nn.Linear(4, 3)),
        inputs(3, 4), Y),
    "RNN": lambda: (Net(whole, cell=nn.RNN(3, 4, batch_first=True), o=nn.Linear(4, 3)), X, Y),
    "GRU of torch": lambda: (Net(whole, cell=nn.GRU(3, 4, batch_first=True), o=nn.Linear(4, 3)), X, Y),
    "LSTM of torch": lambda: (Net(whole, cell=nn.LSTM(3, 4, batch_first=True), o=nn.Linear(4, 3)), X[:, :2], Y),
    "ReLU, samples second, without biases": lambda: (
        Net(lambda s, x: s.o(s.cell(x.transpose(0, 1))[0].mean(0)), cell=nn.RNN(3, 4, bias=False, nonlinearity="relu"),
            o=nn.Linear(4, 3)), X, Y),
    "LSTM with a projection": lambda: (
        Net(whole, cell=nn.LSTM(3, 4, proj_size=2, batch_first=True), o=nn.Linear(2, 3)), X[:, :3], Y),
    "packed, in the order of their lengths": lambda: (Net(bundled, cell=nn.LSTM(3, 2, batch_first=True), o=nn.Linear(2, 3)), X, Y),
    "packed, in their own order, both ways": lambda: (
        Net(lambda s, x: bundled(s, x, (2, 4, 1)), cell=nn.GRU(3, 2, bidirectional=True, batch_first=True),
            o=nn.Linear(4, 3)), X, Y),
    "packed words of two layers, the last states": lambda: (
        Net(lambda s, x: s.o(s.cell(packed(s.t(x), (1, 3, 2), True))[1][-1]), t=nn.Embedding(5, 3),
            cell=nn.RNN(3, 2, 2, batch_first=True), o=nn.Linear(2, 3)),
        tokens(3, 3), Y),
    "two layers, both ways": lambda: (
        Net(whole, cell=nn.GRU(3, 2, num_layers=2, bidirectional=True, batch_first=True), o=nn.Linear(4, 3)), X[:, :2], Y),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_gate(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    truth = gate(model, x, y)
    assert all(bool(t.any()) for t in truth.values())


RECURRENT = [
    nn.RNN(3, 4, batch_first=True),
    nn.RNN(3, 4, 2, nonlinearity="relu", bias=False),
    nn.GRU(3, 4, 2, bidirectional=True, batch_first=True),
    nn.LSTM(3, 4, 2, bidirectional=True),
    nn.LSTM(3, 4, 2, proj_size=2, batch_first=True),
    nn.LSTM(3, 4, bidirectional=True, bias=False, batch_first=True),
]


@pytest.mark.parametrize("number", range(len(RECURRENT)))
def test_a_recurrent_net_is_the_same_function(number: int) -> None:
    model = RECURRENT[number].double()
    wanted = model(X)
    flat = [wanted[0], *(wanted[1] if isinstance(wanted[1], tuple) else [wanted[1]])]
    found = forward(model, X)
    mine = [found[0], *(found[1] if isinstance(found[1], tuple) else [found[1]])]
    for a, b in zip(mine, flat, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lengths", [(4, 3, 1), (2, 4, 1), (1, 1, 3)])
@pytest.mark.parametrize("number", range(len(RECURRENT)))
def test_a_recurrent_net_of_packed_sequences_is_the_same_function(number: int, lengths: tuple[int, ...]) -> None:
    model = RECURRENT[number].double()

    def run(model: Any, x: Tensor) -> list[Tensor]:
        found, last = model(packed(x, lengths, model.batch_first))
        padded, seen = nn.utils.rnn.pad_packed_sequence(found, model.batch_first, padding_value=0.5, total_length=5)
        assert seen.tolist() == list(lengths)
        return [padded, found.data, *(last if isinstance(last, tuple) else [last])]

    for mine, torchs in zip(forward(model, X, run), run(model, X), strict=True):
        torch.testing.assert_close(mine, torchs)


def test_packed_rows_made_by_hand_run_as_they_are() -> None:
    rows = packed(X, (4, 3, 1), True)
    for number in (0, 2, 5):
        model = RECURRENT[number].double()
        torch.testing.assert_close(forward(model, rows)[0].data, model(rows)[0].data)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_the_same_function_with_its_own_second_derivative(dim: int | None) -> None:
    """torch's own double backward is not symmetric on CPUs: differences of the gradient are the oracle."""
    torch.manual_seed(0)
    model = Net(lambda s, x: s.c(torch.tanh(s.a(x))), a=parametrizations.weight_norm(nn.Linear(4, 5), dim=dim),
                c=nn.Linear(5, 3)).double()  # fmt: skip
    x = inputs(3, 4)
    torch.testing.assert_close(forward(model, x), model(x))
    objective = hd.Objective(model)
    found = hd.diagonal(objective, [(x, Y)], method="exact").total
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter)
        for k in range(parameter.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[k] += step
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), Y), parameter)
                ends.append(gradient.view(-1)[k])
                with torch.no_grad():
                    parameter.view(-1)[k] -= step
            wanted.view(-1)[k] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-8)


class Transformer(nn.Module):
    """Words and places looked up, a causal block, a norm, the table of words as head."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(4, WIDTH), nn.Embedding(3, WIDTH)
        self.block, self.norm = Block(norm, Attention(fused=True), mlp()), norm()
        self.head = nn.Linear(WIDTH, 4, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.block(h)))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_transformer_of_words(tied: bool) -> None:
    torch.manual_seed(0)
    x = tokens(2, 3, high=4)
    truth = gate(Transformer(tied=tied), x, x, shift=1)
    assert ("head.weight" in truth) is not tied


AUDITED = [
    "tied head",
    "LSTM",
    "convolution applied in depth",
    "repeated block",
    "weight norm",
    "LoRA",
    "places looked up",
]


def test_what_bends_without_samples_is_given_for_single_samples_too() -> None:
    torch.manual_seed(0)
    model, x, y = MODELS["gains that are functions"]()
    objective = hd.Objective(model.double())
    each = hd.diagonal(objective, [(x, y)], per_sample=True)
    for n in range(len(y)):
        alone = hd.diagonal(objective, [(x[n : n + 1], y[n : n + 1])], method="reference").total
        for name, wanted in alone.items():
            torch.testing.assert_close(each.total[name][n], wanted, rtol=1e-10, atol=1e-13)


def test_a_parameter_that_bends_where_it_meets_the_samples_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = Net(lambda s, x: s.c(torch.linalg.solve(s.k, x[:, :, None])[..., 0]), k=nn.Parameter(torch.eye(4)),
                c=nn.Linear(4, 3)).double()  # fmt: skip
    for method in ("exact", "propagation"):
        with pytest.raises(
            UncoveredModelError, match="LinalgSolveEx at the model's entrance: an operation that the site"
        ):
            hd.measure(hd.Objective(model), [(inputs(3, 4), Y)], method=method)
    assert hd.measure(hd.Objective(model), [(inputs(3, 4), Y)]).plan.method == "hutchinson"


def test_a_weight_made_for_each_sample_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = Net(lambda s, x: s.c(torch.tanh(F.linear(x, s.a(x).mean(0).view(5, 4)))), a=nn.Linear(4, 20),
                c=nn.Linear(5, 3)).double()  # fmt: skip
    with pytest.raises(UncoveredModelError, match="mixes the samples"):
        hd.measure(hd.Objective(model), [(inputs(3, 4), Y)], method="exact")


def test_batches_and_their_order_leave_a_shared_weight_as_it_is() -> None:
    torch.manual_seed(0)
    model, x, y = MODELS["tied head"]()
    objective = hd.Objective(model.double())
    plan = hd.measure(objective, [(x, y)], method="propagation", max_replicates=10).plan
    whole = hd.diagonal(objective, [(x, y)], plan=plan, replicates=4)
    cut = hd.diagonal(objective, [(x[:2], y[:2]), (x[2:], y[2:])], plan=plan, replicates=4)
    for name, wanted in whole.total.items():
        torch.testing.assert_close(cut.total[name], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", AUDITED)
def test_both_methods_pass_the_audit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    objective = hd.Objective(model)
    exact = hd.diagonal(objective, [(x, y)], method="exact").total
    rms = float(torch.cat([t.flatten() for t in exact.values()]).square().mean().sqrt())
    found = hd.measure(objective, [(x, y)], method="propagation", max_replicates=40, rtol=0.02)
    assert found.norm.total.low * 0.8 <= rms <= found.norm.total.high * 1.2
    assert hd.measure(objective, [(x, y)]).plan.method in ("exact", "propagation")
