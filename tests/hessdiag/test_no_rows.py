"""Routed experts that a batch sends no rows, look-ups of nothing, axes of no length: zero there, and right elsewhere.

The oracle is double backward in float64, entry by entry, of the model as torch runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gate import gate
from test_mended import compare
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.methods import METHODS
from hessdiag.problem.forward import as_written

torch.set_num_threads(1)
WIDTH, EXPERTS, CLASSES = 4, 4, 3
Data = list[tuple[Tensor, Tensor]]


class Gated(nn.Module):
    """SwiGLU: a product of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.a(x)) * self.b(x))  # type: ignore[no-any-return]


class Convolved(nn.Module):
    """A convolution, and one turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 2, 3, padding=1), nn.ConvTranspose1d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x[:, None])))[:, 0]  # type: ignore[no-any-return]


class Normed(nn.Module):
    """Every normalisation: their gains, biases and sites."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.layer, self.group = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GroupNorm(1, WIDTH)
        self.root, self.batch = nn.RMSNorm(WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.root(torch.tanh(self.batch(self.group(torch.sin(self.layer(self.a(x)))))))  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """Gain, shift and divisor as bare parameters, and PReLU's slope."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.t, self.q = (nn.Parameter(torch.randn(WIDTH)) for _ in range(3))
        self.bent = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bent(x * self.g) + self.t) / (1.5 + self.q.square())


class Twice(nn.Module):
    """One matrix applied to what it gave, the sum of a matrix and a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((WIDTH, WIDTH), (WIDTH, 2), (2, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w + self.a @ self.b
        return torch.tanh(F.linear(torch.tanh(F.linear(x, w)), w))


class Contracted(nn.Module):
    """Products of tensors with a parameter and with each other, a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.two = nn.Parameter(torch.randn(2, WIDTH, WIDTH)), nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("nd,hde->nhe", x, self.a)
        return self.two(torch.einsum("nhe,nhf->nef", y, y).softmax(-1).sum(1), x)  # type: ignore[no-any-return]


class Attending(nn.Module):
    """Attention of two heads over two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([x, torch.tanh(x)], 1)
        return self.mix(z, z, z)[0].sum(1)  # type: ignore[no-any-return]


class Looking(nn.Module):
    """A table, and a bag of its rows, looked up by signs of what comes in; `plain` as products with one-hot rows."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        self.table, self.bag, self.a = nn.Embedding(2, WIDTH), nn.EmbeddingBag(2, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        numbers = (x.detach() > 0).long()
        if self.plain:
            hot = F.one_hot(numbers, 2).to(x)
            row, mean = hot[:, 0] @ self.table.weight, hot.mean(1) @ self.bag.weight
        else:
            row, mean = self.table(numbers[:, 0]), self.bag(numbers)
        return torch.tanh(self.a(x) * row + mean)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "gated": Gated,
    "convolved": Convolved,
    "normed": Normed,
    "scaled": Scaled,
    "twice": Twice,
    "contracted": Contracted,
    "attending": Attending,
    "looking": Looking,
}


class Routed(nn.Module):
    """A block as Mixtral has it: every token goes to its best two experts, their rows found by `torch.where`, by the
    pieces of one sorted tensor, or not at all where there are none.
    """

    def __init__(self, make: Callable[[], nn.Module], how: str = "where") -> None:
        super().__init__()
        self.table, self.gate = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts, self.head = nn.ModuleList(make() for _ in range(EXPERTS)), nn.Linear(WIDTH, CLASSES)
        self.how, self.rows = how, list[list[int]]()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = x.reshape(-1, WIDTH)
        w, chosen = self.gate(h).softmax(1).topk(2, -1)
        w, out = w / w.sum(-1, keepdim=True), torch.zeros_like(h)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        self.rows.append(counts)
        if self.how == "split":
            order = chosen.flatten().argsort(stable=True)
            given = zip(self.experts, h[order // 2].split(counts))
            done = torch.cat([expert(part) for expert, part in given]) * w.flatten()[order, None]
            return self.head(x + out.index_add(0, order // 2, done).reshape(x.shape))  # type: ignore[no-any-return]
        for k, expert in enumerate(self.experts):
            token, place = torch.where(chosen == k)
            if len(token) or self.how != "skip":
                out.index_add_(0, token, expert(h[token]) * w[token, place, None])
        return self.head(x + out.reshape(x.shape))  # type: ignore[no-any-return]


def routed(make: Callable[[], nn.Module] = Gated, how: str = "where", seed: int = 2) -> Routed:
    torch.manual_seed(seed)
    return Routed(make, how).double().eval()


def tokens(*sizes: tuple[int, int], seed: int = 3) -> Data:
    """Batches of so many samples and tokens."""
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, 7, size, generator=made), torch.randint(0, CLASSES, size, generator=made)) for size in sizes
    ]


ONES = tokens((1, 4), (1, 1), (1, 5), (1, 2))


def comes_and_goes(model: Routed, data: Data) -> bool:
    """Whether some expert has rows in the first batch and none in a later one, and some other the other way round."""
    model.rows.clear()
    for x, _ in data:
        model(x)
    first, later = torch.tensor(model.rows[0]) > 0, torch.tensor(model.rows[1:]) > 0
    return bool((first & ~later).any()) and bool((~first & later).any())


def summed(model: nn.Module, data: Data) -> Tensor:
    losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in data]
    return torch.stack(losses).sum()


def truth(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    """Second derivatives, one entry after the other; zero where nothing reaches the parameter."""
    parameters, found = dict(model.named_parameters()), {}
    gradients = torch.autograd.grad(total, list(parameters.values()), create_graph=True, allow_unused=True)
    for (name, p), gradient in zip(parameters.items(), gradients):
        entries = torch.zeros(p.numel(), dtype=p.dtype)
        for k in range(p.numel() if gradient is not None and gradient.requires_grad else 0):
            assert gradient is not None
            (row,) = torch.autograd.grad(gradient.flatten()[k], p, retain_graph=True, allow_unused=True)
            entries[k] = 0.0 if row is None else row.flatten()[k]
        found[name] = entries.reshape(p.shape)
    return found


def mean_truth(model: nn.Module, data: Data) -> dict[str, Tensor]:
    return {n: t / sum(y.numel() for _, y in data) for n, t in truth(model, summed(model, data)).items()}


def objective(model: nn.Module, **options: Any) -> hd.Objective:
    return hd.Objective(model, class_axis=-1, **options)


def flat(tensors: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def check(model: nn.Module, data: Data, wanted: dict[str, Tensor], **options: Any) -> hd.Diagonal:
    """The diagonal against the truth: to rounding, or with errors |z| <= 7 everywhere (200 entries of 64 replicates,
    Student's t: false alarms below 1e-6).
    """
    found = hd.diagonal(objective(model), data, replicates=64, **options)
    names = list(wanted)
    off, size = flat(found.total, names) - flat(wanted, names), float(flat(wanted, names).norm())
    errors = flat(found.standard_errors, names)
    noisy = errors > 1e-13 * size
    assert float(off[~noisy].norm()) <= 1e-10 * size
    assert bool(noisy.any()) == (not METHODS[found.provenance["method"]].deterministic)
    z = torch.cat([off[noisy] / errors[noisy], torch.zeros(1)])
    assert float(z.abs().max()) <= 7.0
    return found


LONG = ("contracted", "attending", "normed")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(pytest.param(name, "where", marks=pytest.mark.slow if name in LONG else ()) for name in KINDS),
        ("gated", "split"),
        ("gated", "skip"),
        ("looking", "split"),
    ],
)
def test_every_kind_of_layer_in_experts_without_rows(name: str, how: str) -> None:
    model = routed(KINDS[name], how)
    assert comes_and_goes(model, ONES)
    plain = routed(lambda: Looking(plain=True), how) if name == "looking" else model
    plain.load_state_dict(model.state_dict())
    check(model, ONES, mean_truth(plain, ONES), method="exact")
    for x, y in ONES[1:2]:  # and propagation, every one-hot vector in the place of its signs; float32, too
        model.rows.clear()
        found = gate(model, x, y, class_axis=-1)
        for key, entries in truth(plain, summed(plain, [(x, y)])).items():
            torch.testing.assert_close(found[key], entries, rtol=1e-10, atol=1e-12)
            expert = key.split(".")[1]
            if key.startswith("experts") and not _rows(model, x)[int(expert)]:
                assert not bool(found[key].any())


def _rows(model: Routed, x: Tensor) -> list[int]:
    model.rows.clear()
    model(x)
    return model.rows[0]


@pytest.mark.parametrize("method", ["exact", "propagation", "hutchinson", "reference", "auto"])
def test_every_method(method: str) -> None:
    model = routed()
    wanted = mean_truth(model, ONES)
    check(model, ONES, wanted, method=method)
    found = hd.measure(objective(model), ONES, method=method, rtol=0.2, max_replicates=100)
    assert found.audit is not None
    assert found.audit.passed
    norm = float(flat(wanted, list(wanted)).square().mean().sqrt())
    low, high = found.interval
    assert low * (1 - 1e-9) - 0.05 * norm <= norm <= high * (1 + 1e-9) + 0.05 * norm


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gauss_newton": "signs"},
        pytest.param({"deflate": 2}, marks=pytest.mark.slow),
        {"sample_groups": {"experts.0.a": 2}},
    ],
)
def test_plans_of_propagation(options: dict[str, Any]) -> None:
    """Experts come and go beneath one plan, that of the first batch."""
    model = routed()
    plan = hd.measure(objective(model), ONES, method="propagation", max_replicates=12).plan.to_dict()
    check(model, ONES, mean_truth(model, ONES), plan=plan | options)


def test_single_samples() -> None:
    model = routed()
    found = hd.diagonal(objective(model), ONES, method="exact", per_sample=True)
    for n, pair in enumerate(ONES):
        for name, entries in truth(model, summed(model, [pair])).items():
            torch.testing.assert_close(found.total[name][n], entries, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "propagation", "hutchinson"])
def test_one_expert_alone(method: str) -> None:
    """Chosen alone, an expert may leave a batch with no parameter at all."""
    model = routed()
    assert any(_rows(model, x)[2] == 0 for x, _ in ONES)
    wanted = {name: t for name, t in mean_truth(model, ONES).items() if name.startswith("experts.2.")}
    norm = float(flat(wanted, list(wanted)).square().mean().sqrt())
    found = hd.measure(objective(model, parameters="experts.2.*"), ONES, method=method, max_replicates=100)
    low, high = found.interval
    assert low * (1 - 1e-9) - 0.05 * norm <= norm <= high * (1 + 1e-9) + 0.05 * norm


@pytest.mark.parametrize("method", ["exact", pytest.param("propagation", marks=pytest.mark.slow)])
def test_a_population(method: str) -> None:
    """Shards of single sequences; replicates of the same data, their error that of data besides."""
    model, data = routed(), tokens(*[(1, 1 + n % 3) for n in range(33)])
    found = hd.measure(objective(model), data, method=method, target="population", keep_diagonal=True)
    assert found.diagonal is not None
    wanted = mean_truth(model, data)
    for name, entries in found.diagonal.total.items():  # the estimate of the population is the sample's own diagonal
        off = (entries - wanted[name]).abs()
        assert bool((off <= 6.0 * found.diagonal.standard_errors[name] + 1e-10).all())


@pytest.mark.parametrize("sizes", [((2, 4), (4, 3)), ((3, 2), (1, 4)), ((4, 1), (3, 1), (1, 1))])
def test_samples_that_go_different_ways(sizes: tuple[tuple[int, int], ...]) -> None:
    """Of several samples a batch's experts have rows without an axis of samples: refused by name, or by products."""
    model, data = routed(), tokens(*sizes)
    wanted = mean_truth(model, data)
    for method in ("exact", "propagation"):
        with pytest.raises(UncoveredModelError, match="hutchinson"):
            hd.diagonal(objective(model), data, method=method)
    assert check(model, data, wanted, method="reference") is not None
    check(model, data, wanted, method="auto")


def test_a_first_batch_of_one_sample_before_one_of_several() -> None:
    """What the first batch lets `auto` choose does not serve the second: refused by name, and products serve both."""
    model, data = routed(), tokens((1, 4), (3, 2))
    for method in ("exact", "propagation", "auto"):
        with pytest.raises(UncoveredModelError, match="hutchinson"):
            hd.measure(objective(model), data, method=method)
    check(model, data, mean_truth(model, data), method="hutchinson")


def test_samples_that_go_the_same_way() -> None:
    """Two samples of the same tokens: every expert has as many rows of each, or none."""
    model = routed()
    x, _ = ONES[0]
    for count in (2, 3):
        ids = x.expand(count, -1).clone()
        gate(model, ids, torch.arange(ids.numel()).reshape(ids.shape) % CLASSES, class_axis=-1)


def test_what_no_sample_reaches_is_told_of_all_batches() -> None:
    """An expert without rows in the first batch has some in another: only what no batch reaches is said to be zero."""
    model = routed()
    rows = torch.tensor([_rows(model, x) for x, _ in ONES[:2]]).sum(0)
    assert 0 in rows
    empty = [name for name, _ in model.named_parameters() if name.startswith("experts") and not rows[int(name[8])]]
    for l2, what in ((0.0, "zero"), (0.1, "those of l2 alone")):
        told = "; ".join(hd.measure(objective(model, l2=l2), ONES[1::-1]).notes)
        assert f"parameters that do not reach the outputs (their entries are {what}): {', '.join(empty)}" in told
    every = [*ONES, *tokens(*[(1, 6)] * 8, seed=5)]
    assert (torch.tensor([_rows(model, x) for x, _ in every]).sum(0) > 0).all()
    assert "do not reach" not in "; ".join(hd.measure(objective(model), every).notes)


class Unattended(nn.Module):
    """Queries to which no key answers: an axis of no length within each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.k, self.head = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k = torch.tanh(self.a(x))[:, None], self.k(x[:, None][:, :0])
        return self.head((q + (q @ k.transpose(1, 2)).softmax(-1) @ k)[:, 0])  # type: ignore[no-any-return]


def test_an_axis_of_no_length() -> None:
    torch.manual_seed(0)
    model, y = Unattended().double(), torch.tensor([0, 1, 2])
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    found = gate(model, x, y)
    for name, entries in truth(model, F.cross_entropy(model(x), y, reduction="sum")).items():
        torch.testing.assert_close(found[name], entries, rtol=1e-10, atol=1e-12)
    batch = Linearisation(hd.Objective(model), x, y)
    assert batch.graph.unused == ("k.weight", "k.bias")


NONE = torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize(
    "look_up",
    [
        lambda w: F.embedding(NONE, w),
        lambda w: F.embedding(NONE.reshape(0, 3), w, padding_idx=1),
        lambda w: F.embedding(NONE.reshape(2, 0), w),
        lambda w: F.embedding_bag(NONE.reshape(0, 3), w),
        lambda w: F.embedding_bag(NONE, w, NONE),
        lambda w: F.embedding_bag(NONE, w, torch.zeros(3, dtype=torch.long), mode="sum"),
        lambda w: F.embedding_bag(NONE, w, torch.zeros(3, dtype=torch.long), mode="max"),
    ],
)
def test_look_ups_of_nothing(look_up: Callable[[Tensor], Tensor]) -> None:
    """torch's values and gradients, and a second derivative, which torch has not."""
    table = torch.randn(5, WIDTH, dtype=torch.float64)
    compare(look_up, table)
    with as_written({"cpu"}):
        found = look_up(table.requires_grad_())
    along = torch.ones_like(found, requires_grad=True)
    (slope,) = torch.autograd.grad((found * along).sum(), table, create_graph=True)
    (change,) = torch.autograd.grad((slope * slope.detach().cos()).sum(), along)
    assert change.shape == found.shape
    assert not bool(change.any())
