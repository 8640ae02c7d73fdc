"""Functions that the forward pass computes by others: torch's values and gradients, and models of them at the gate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gate import gate
from test_uses import Net, X, Y, inputs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hessdiag as hd
from hessdiag.errors import StochasticModeError, UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.problem.compared import check_mended
from hessdiag.problem.forward import as_written
from hessdiag.problem.mended import MENDED

torch.set_num_threads(1)


def compare(function: Callable[..., Any], *given: Any) -> None:
    """Values and gradients of all tensors, as torch has them."""
    leaves = [x.requires_grad_() for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    wanted = function(*given)
    with as_written({"cpu"}):
        found = function(*given)
    for mine, torchs in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, torchs)
        along = inputs(*mine.shape, seed=7)
        pair = [
            torch.autograd.grad((x * along).sum(), leaves, retain_graph=True, allow_unused=True) for x in (mine, torchs)
        ]
        for one, other in zip(*pair):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_groups_of_channels_that_are_last_in_memory() -> None:
    """torch's second derivative for a gain or bias alone ends the process there: also of one pixel, which is both."""
    for pixels in (1, 3):
        x = inputs(3, 4, pixels, pixels).to(memory_format=torch.channels_last)
        compare(lambda x, w, b: F.group_norm(x, 2, w, b), x, inputs(4, seed=1), inputs(4, seed=2))
        layers = nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * pixels**2, 3)
        model = nn.Sequential(*layers).double()
        images, y = inputs(3, 2, pixels + 1, pixels + 1), torch.tensor([0, 1, 2])
        last = copy.deepcopy(model).to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        found = [hd.diagonal(hd.Objective(net), [(x, y)], method="reference") for net, x in ((model, images), last)]
        for name, entries in found[0].total.items():
            torch.testing.assert_close(found[1].total[name], entries)


EINSUMS = [
    ("nf,fg->ng", (2, 3), (3, 4)), ("nf,gf->ng", (2, 3), (4, 3)), ("ntf,tfg->ntg", (2, 5, 3), (5, 3, 4)),
    ("...f,gf->...g", (2, 5, 3), (4, 3)), ("n...f,fg->n...g", (2, 5, 2, 3), (3, 4)), ("nthd,hde->nte", (2, 5, 3, 4), (3, 4, 6)),
    ("bnd,hkd->bhnk", (2, 5, 3), (4, 6, 3)), ("hdk,btd->bhtk", (4, 3, 6), (2, 5, 3)), ("bhtk,hkd->btd", (2, 4, 5, 6), (4, 6, 3)),
    ("nef,efg->neg", (2, 3, 4), (3, 4, 5)), ("nchw,cd->ndhw", (2, 3, 4, 2), (3, 5)), ("ni,nj->nij", (2, 3), (2, 4)),
    ("nf,f->n", (2, 3), (3,)), ("nf,f", (2, 3), (3,)), ("ntf,sf->nts", (2, 5, 3), (5, 3)), ("nii,ij->nj", (2, 3, 3), (3, 4)),
    ("ntf,gh->ntg", (2, 5, 3), (4, 2)), ("nf,gf->gn", (2, 3), (4, 3)), ("n f, f g -> n g", (2, 3), (3, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "first", "second"), EINSUMS, ids=[row[0] for row in EINSUMS])
def test_sums_of_products(equation: str, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    compare(lambda a, b: torch.einsum(equation, a, b), inputs(*first), inputs(*second, seed=1))
    compare(lambda a, b: torch.einsum(equation, [a, b]), inputs(*first), inputs(*second, seed=1))


SEVERAL = ["nab,air,rbj->nij", "air,rbj,nab->nij", "nab,air,rbj,j->n", "nab, air, rbj -> jn", "nab,air,rbj"]


@pytest.mark.parametrize("equation", SEVERAL)
def test_sums_of_products_of_several(equation: str) -> None:
    size = dict(zip("nabirj", (2, 3, 4, 2, 5, 3)))
    sides = equation.replace(" ", "").partition("->")[0].split(",")
    compare(
        lambda *given: torch.einsum(equation, *given),
        *(inputs(*(size[k] for k in side), seed=n) for n, side in enumerate(sides)),
    )


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("bias", "zero"), [(True, False), (False, True), (True, True)])
def test_attention_to_keys_of_its_own(bias: bool, zero: bool, weights: bool, mask: bool) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, add_bias_kv=bias, add_zero_attn=zero, batch_first=True).double()
    out = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float64) if mask else None
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64) if mask else None
    compare(
        lambda x, *_: net(x, x, x, need_weights=weights, key_padding_mask=out, attn_mask=causal)[0],
        inputs(2, 3, 4), *net.parameters(),
    )  # fmt: skip


@pytest.mark.parametrize("mask", ["causal", "none masked", "own key last", "truth values"])
@pytest.mark.parametrize(("bias", "zero"), [(False, False), (True, False), (False, True), (True, True)])
def test_attention_under_the_hint_that_it_is_causal(bias: bool, zero: bool, mask: str) -> None:
    """Without weights and padding torch goes by the hint: the mask that is given is not looked at, nor the own key."""
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, add_bias_kv=bias, add_zero_attn=zero, batch_first=True).double()
    given = {
        "causal": nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64),
        "none masked": torch.zeros(3, 3, dtype=torch.float64),
        "own key last": torch.eye(3, dtype=torch.float64).log(),
        "truth values": torch.ones(3, 3, dtype=torch.bool).triu(1),
    }[mask]
    for weights in (False, True):
        compare(
            lambda x, *_, w=weights: net(x, x, x, attn_mask=given, is_causal=True, need_weights=w)[0],
            inputs(2, 3, 4), *net.parameters(),
        )  # fmt: skip


class Causal(nn.Module):
    """Attention by torch's own forward under the hint, to a key of its own as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True, **options), nn.Linear(4, 3)
        self.mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x, x, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0][:, 1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_the_loss_of_attention_to_keys_of_its_own_is_the_models(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    net, x, y = Causal(**options).double().eval(), inputs(4, 5, 4), torch.tensor([0, 1, 2, 0])
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(net(x), y)
        gradients = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        truth = {
            name: torch.stack([torch.autograd.grad(g, p, retain_graph=True)[0].flatten() for g in gradient.flatten()])
            for (name, p), gradient in zip(net.named_parameters(), gradients)
        }
    for method in ("exact", "reference"):
        found = hd.measure(hd.Objective(net), [(x, y)], method=method, keep_diagonal=True)
        assert found.loss == pytest.approx(loss.item(), rel=1e-12)
        assert found.diagonal is not None
        for name, rows in truth.items():
            entries = rows.diagonal().reshape(found.diagonal.total[name].shape)
            torch.testing.assert_close(found.diagonal.total[name], entries, rtol=1e-9, atol=1e-14)


WRONG: dict[str, tuple[Any, Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "celu": (F.celu, lambda x, *_, **__: F.elu(x, 1.01), F.celu),
    "hardsigmoid": (F.hardsigmoid, lambda x, *_, **__: F.relu6(x + 3.0) / 6.0 + 1e-3, F.hardsigmoid),
    "mul": (torch.mul, lambda x, y: x * y + 1e-4, lambda x: torch.mul(x, x)),
    "multi_head_attention_forward": (
        F.multi_head_attention_forward,
        lambda *args, **named: F.multi_head_attention_forward(*args, **{**named, "attn_mask": None}),
        nn.MultiheadAttention(4, 2, batch_first=True).double().requires_grad_(False),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WRONG)
def test_another_function_in_the_place_of_torchs_is_refused_by_name(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong mended function after the other; the right ones of the same models pass."""
    function, wrong, used = WRONG[name]
    torch.manual_seed(0)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)

    class Using(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = attention(h, h, h, attn_mask=mask)[0] if isinstance(used, nn.Module) else used(h)
            return self.last(h).mean(1)  # type: ignore[no-any-return]

    attention = copy.deepcopy(used).to(dtype) if isinstance(used, nn.Module) else None
    objective, batch = hd.Objective(Using().to(dtype)), (inputs(4, 3, 4).to(dtype), torch.tensor([0, 1, 2, 0]))
    hd.measure(objective, [batch], method="reference")
    monkeypatch.setitem(MENDED, function, wrong)
    for method in ("exact", "propagation", "hutchinson", "reference", "auto"):
        with pytest.raises(UncoveredModelError, match=f"{name} is computed by other operations here"):
            hd.measure(objective, [batch], method=method)
    hd.measure(objective, [batch], method="reference", audit_model=False)


def test_what_is_drawn_at_random_is_not_called_another_function() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x, x, x, need_weights=False)[0]).mean(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x, net = inputs(4, 3, 4), Dropping().double().train()
    check_mended(net, x)
    with pytest.raises(StochasticModeError, match="draws random numbers"):
        hd.measure(hd.Objective(net), [(x, torch.tensor([0, 1, 2, 0]))], method="reference")


def test_the_comparison_changes_nothing_of_the_model() -> None:
    """Tables and tensors that are changed in place are compared on copies; random states stay as they were."""

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4, max_norm=50.0), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(x) + 0.0
            return self.head(torch.celu_(h).div_(1.0 + h.detach().abs()).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, x = Changing().double(), torch.tensor([[0, 1], [2, 3]])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    wanted = net(x)
    check_mended(net, x)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert torch.equal(net(x), wanted)


def test_shapes_that_do_not_fit_are_torchs_to_refuse() -> None:
    for shape in ((2, 3), (4, 3, 1)):
        with pytest.raises(RuntimeError) as told:
            torch.einsum("nf,gf->ng", inputs(2, 4), inputs(*shape))
        with as_written({"cpu"}), pytest.raises(RuntimeError) as found:
            torch.einsum("nf,gf->ng", inputs(2, 4), inputs(*shape).requires_grad_())
        assert str(found.value) == str(told.value)


ALIKE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "x / w": lambda x, w: x / w,
    "w / x": lambda x, w: w / x,
    "in place": lambda x, w: (1.0 * x).div_(w),
    "x ** w": lambda x, w: x**w,
    "w ** x": lambda x, w: w**x,
    "the larger": torch.maximum,
    "clipped": lambda x, w: x.clamp(max=w),
    "clipped twice": lambda x, w: torch.clamp(x, 0.5 * w, max=w),
    "on the way": lambda x, w: torch.lerp(x, x * x, w),
    "an angle": lambda x, w: torch.atan2(w, x),
    "with an addend": lambda x, w: torch.addcdiv(x, w, x, value=0.3),
    "a number": lambda x, w: 2.0 / w + x**2 + (x / 3.0) * w**-1.5,
}


@pytest.mark.parametrize("shape", [(3,), (1, 3), (), (1, 1, 3), (4, 3)], ids=str)
@pytest.mark.parametrize("name", ALIKE)
def test_a_parameter_beside_samples(name: str, shape: tuple[int, ...]) -> None:
    compare(ALIKE[name], inputs(2, 4, 3).abs() + 0.5, inputs(*shape, seed=2).abs() + 1.0)


MOMENTS: list[Callable[[Tensor], Any]] = [
    lambda x: torch.var_mean(x, 1),
    lambda x: torch.var_mean(x, (1, 2), False),
    lambda x: torch.var_mean(x, dim=1, correction=0, keepdim=True),
    lambda x: torch.std_mean(x, unbiased=False, dim=-1),
    lambda x: torch.std_mean(x, 1, True, True),
    lambda x: torch.var_mean(x, True),
    torch.var_mean,
    lambda x: x.var(-1),
    lambda x: x.std((1, 2), unbiased=False, keepdim=True),
    lambda x: torch.std(x, dim=1, correction=0),
    lambda x: x.var(),
    lambda x: x.std(axis=1, keepdims=True),
    lambda x: x.var(1, False, True),
    lambda x: torch.std(torch.cat([x, x[:, :1].expand(2, 5, 3)], 1)[:, 5:], 1),
]


@pytest.mark.parametrize("wide", [1, 256])
@pytest.mark.parametrize("number", range(len(MOMENTS)))
def test_moments(number: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.problem.mended.WIDE", wide)
    compare(MOMENTS[number], inputs(2, 5, 3))


def test_moments_of_many_entries_bend_in_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.problem.mended.WIDE", 2)
    torch.manual_seed(0)
    model = Net(
        lambda s, x: s.c((lambda h: (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 0.1))(s.a(x))),
        a=nn.Linear(4, 5), c=nn.Linear(5, 3),
    )  # fmt: skip
    gate(model, inputs(3, 4), Y)


def packed_and_written(where: str, x: Tensor) -> Any:
    """Packed rows that are changed in place, or rows picked twice: what is remembered of them is not what they are."""
    torch.manual_seed(0)
    net, rnn = nn.GRU(3, 4), nn.utils.rnn
    if where in ("picked", "source", "twice"):
        x = x * 1
        order = torch.tensor([3, 1, 3, 2] if where == "twice" else [3, 1, 0, 2])
        rows = x.index_select(0, order)
        if where != "twice":
            (x if where == "source" else rows).mul_(2.0)
        given = rnn.pack_padded_sequence(rows, torch.tensor([6, 5, 5, 1]), batch_first=True)
    else:
        given = rnn.pack_padded_sequence(x, torch.tensor([2, 6, 1, 4]), batch_first=True, enforce_sorted=False)
    if where == "input":
        given.data.mul_(2.0)
    out, last = net(given)
    if where == "output":
        out.data.relu_()
    return rnn.pad_packed_sequence(out, batch_first=True)[0], last


@pytest.mark.parametrize("where", ["nowhere", "input", "output", "picked", "source", "twice"])
def test_packed_rows_written_to_are_what_they_are(where: str) -> None:
    compare(lambda x: packed_and_written(where, x), inputs(4, 6, 3).float())


def test_other_functions() -> None:
    compare(F.bilinear, inputs(2, 5, 3), inputs(2, 5, 4), inputs(6, 3, 4), inputs(6))
    compare(lambda x, w, b: F.instance_norm(x, None, None, w, b, eps=0.1), inputs(2, 3, 4, 4), inputs(3), inputs(3))
    compare(lambda x: torch.fft.rfft(x).abs(), inputs(2, 5))
    compare(lambda x: torch.angle(torch.fft.rfft(x)[:, 1:]), inputs(2, 5))
    compare(lambda x, y: torch.view_as_real(torch.polar(x, y)), inputs(2, 5).abs(), inputs(2, 5))


def spectrum(*shape: int, seed: int = 0) -> Tensor:
    return torch.complex(inputs(*shape, seed=seed), inputs(*shape, seed=seed + 1))


COMPLEX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * w": lambda x, w: x * w,
    "x * a constant": lambda x, w: x * spectrum(3, seed=5) + (1 + 2j) * w,
    "x * a real": lambda x, w: x * w.real + w.imag * x,
    "x / a real": lambda x, w: x / w.real,
    "x @ w": lambda x, w: x @ w[:, None] + torch.matmul(w, x.mT)[..., None],
    "einsum": lambda x, w: torch.einsum("ntf,gf->ntg", x, torch.stack([w, 2 * w])),
    "linear": lambda x, w: F.linear(x, torch.stack([w, 2 * w]), w[:2]),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_products_of_complex_numbers(name: str) -> None:
    def whole(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.view_as_real(COMPLEX[name](torch.complex(a, b), torch.complex(c, d)))

    compare(whole, inputs(2, 5, 3), inputs(2, 5, 3, seed=1), inputs(3, seed=2), inputs(3, seed=3))


def test_vectors_as_matrices() -> None:
    compare(lambda x, v: x @ v, inputs(2, 5, 3), inputs(3))
    compare(torch.mv, inputs(2, 3), inputs(3))
    compare(lambda x, v: v @ x, inputs(2, 5, 3), inputs(5))
    compare(lambda x, v: v @ x, inputs(5, 3), inputs(5))
    compare(lambda v, w: v @ w, inputs(3), inputs(3))
    compare(F.linear, inputs(2, 5, 3), inputs(3))


KEYWORDS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda x, v: torch.matmul(input=x, other=v),
    lambda x, v: torch.mv(input=x[0], vec=v),
    lambda x, v: torch.mul(input=x, other=v),
    lambda x, v: torch.div(input=x, other=v, rounding_mode=None),
    lambda x, v: torch.abs(input=x) * v,
    lambda x, v: torch.celu(input=x, alpha=0.5) * v,
    lambda x, v: torch.var_mean(input=x * v, dim=1),
    lambda x, v: torch.index_select(input=x * v, dim=0, index=torch.tensor([1, 0, 1])),
    lambda x, v: F.linear(input=x, weight=v[None]),
    lambda x, v: torch.addcmul(input=x, tensor1=x, tensor2=v, value=0.3),
    lambda x, v: torch.lerp(input=x, end=v, weight=x),
]


@pytest.mark.parametrize("number", range(len(KEYWORDS)))
def test_operands_by_keyword(number: int) -> None:
    compare(KEYWORDS[number], inputs(2, 5, 3), inputs(3).abs() + 1)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_distances(p: float) -> None:
    compare(lambda x, y: torch.cdist(x, y, p), inputs(2, 5, 3), inputs(4, 3, seed=1))
    compare(lambda x: torch.cdist(x, x, p=p, compute_mode="donot_use_mm_for_euclid_dist"), inputs(2, 5, 3))


@pytest.mark.parametrize("samples", [1, 2])
def test_gradients_of_an_instance_norm_under_channels_that_lie_last(samples: int) -> None:
    """torch 2.13 has them wrong for one sample, as a loss of pixels brings them."""
    x, along = inputs(samples, 2, 4, 4).requires_grad_(), inputs(samples, 2, 4, 4, seed=1)
    mean = x.mean((2, 3), keepdim=True)
    plain = (x - mean) / ((x - mean).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    with as_written({"cpu"}):
        found = F.instance_norm(x)
    for laid in (along, along.contiguous(memory_format=torch.channels_last)):
        pair = [torch.autograd.grad(out, x, laid, retain_graph=True)[0] for out in (found, plain)]
        torch.testing.assert_close(*pair)


IMAGES = inputs(3, 2, 3, 2)


def _tracked() -> nn.Module:
    norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    norm(3 * inputs(4, 2, 3, 3, seed=4).float() + 1)
    return norm.eval()


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "bilinear layer": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.b(s.a(x), torch.tanh(x)))), a=nn.Linear(4, 3), b=nn.Bilinear(3, 4, 5),
            c=nn.Linear(5, 3)),
        inputs(3, 4)),
    "bilinear layer of one tensor, twice": lambda: (
        Net(lambda s, x: s.c(s.b(*(2 * [torch.tanh(s.b(x, x))]))), b=nn.Bilinear(4, 4, 4, bias=False), c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "heads by einsum": lambda: (
        Net(lambda s, x: s.c(torch.einsum("nthk,hkd->ntd", torch.tanh(torch.einsum("ntf,hkf->nthk", x, s.q)), s.o)[:, 0]),
            q=nn.Parameter(inputs(2, 2, 3)), o=nn.Parameter(inputs(2, 2, 4)), c=nn.Linear(4, 3)),
        X),
    "a train of tensors": lambda: (
        Net(lambda s, x: s.c(torch.tanh(torch.einsum("nab,air,rbj->nij", x, s.g, s.h)).flatten(1)),
            g=nn.Parameter(inputs(4, 3, 2)), h=nn.Parameter(inputs(2, 3, 2, seed=1)), c=nn.Linear(6, 3)),
        X),
    "attention to keys of its own": lambda: (
        Net(lambda s, x: s.c(s.a(x, x, x)[0].sum(1)), a=nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True),
            c=nn.Linear(4, 3)),
        inputs(3, 2, 4)),
    "a matrix for every place, by einsum": lambda: (
        Net(lambda s, x: s.c(torch.einsum("ntf,tfg->ntg", torch.tanh(torch.einsum("ntf,tgf->ntg", x, s.w)), s.w).sum(1)),
            w=nn.Parameter(inputs(4, 3, 3)), c=nn.Linear(3, 3)),
        X),
    "vectors that samples are multiplied by": lambda: (
        Net(lambda s, x: s.c(torch.softmax(torch.tanh(s.a(x)) @ s.q, -1)[:, None] @ x)[:, 0] + (s.k @ x)[:, :3],
            a=nn.Linear(4, 3), q=nn.Parameter(inputs(3)), k=nn.Parameter(inputs(2)), c=nn.Linear(4, 3)),
        inputs(3, 2, 4)),
    "a vector that a matrix gives, twice": lambda: (
        Net(lambda s, x: s.c((lambda h: torch.stack([h @ (s.m @ s.v), torch.mv(h, s.v)], -1))(torch.tanh(s.a(x)))),
            a=nn.Linear(4, 3), m=nn.Parameter(inputs(3, 3)), v=nn.Parameter(inputs(3)), c=nn.Linear(2, 3)),
        inputs(3, 4)),
    "Fourier layer": lambda: (
        Net(lambda s, x: s.c(torch.tanh(torch.fft.irfft(torch.einsum(
                "nif,iof->nof", torch.fft.rfft(torch.tanh(s.a(x)), n=6)[:, :, :3], torch.view_as_complex(s.w)), n=6)).mean(2)),
            a=nn.Conv1d(2, 2, 1), w=nn.Parameter(inputs(2, 3, 3, 2)), c=nn.Linear(3, 3)),
        inputs(3, 2, 4)),
    "gates on spectra": lambda: (
        Net(lambda s, x: s.c((lambda z: (torch.relu(z.abs() + s.b) * z / (1 + s.b.square()) * z.conj()).real + z.imag)(
                torch.fft.fft(s.a(x)) * torch.view_as_complex(s.w))),
            a=nn.Linear(4, 3), w=nn.Parameter(inputs(3, 2)), b=nn.Parameter(inputs(3)), c=nn.Linear(3, 3)),
        inputs(3, 4)),
    "distances to learned centres": lambda: (
        Net(lambda s, x: s.c(torch.exp(-torch.cdist(s.a(x), s.k))), a=nn.Linear(4, 2), k=nn.Parameter(inputs(5, 2)),
            c=nn.Linear(5, 3)),
        inputs(3, 4)),
    "distances of rows to one another": lambda: (
        Net(lambda s, x: s.c(torch.exp(-(lambda h: torch.cdist(h, h))(s.a(x)) ** 2).sum(1)),
            a=nn.Linear(4, 3, bias=False), c=nn.Linear(2, 3)),
        inputs(3, 2, 4)),
    "weights divided by their length": lambda: (
        Net(lambda s, x: s.c(torch.tanh(x @ F.normalize(s.w, dim=0) / s.v.norm())), w=nn.Parameter(inputs(4, 3)),
            v=nn.Parameter(inputs(2, 3)), c=nn.Linear(3, 3)),
        inputs(3, 4)),
    "weights under a softmax": lambda: (
        Net(lambda s, x: s.c((torch.softmax(s.m, 0) * torch.stack([torch.tanh(s.a(x)), torch.sin(s.b(x))], -1)).sum(-1)
                * torch.logsumexp(s.w, 0)), m=nn.Parameter(inputs(2)), w=nn.Parameter(inputs(4, 3)), a=nn.Linear(4, 3),
            b=nn.Linear(4, 3), c=nn.Linear(3, 3)),
        inputs(3, 4)),
    "a parametrisation on a constant, with as many rows as two samples have": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.a(x))), a=nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), c=nn.Linear(3, 3)),
        inputs(3, 3)),
    "places, as many as samples, through a layer": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.a(x) + s.b(inputs(3, 2, seed=9).to(x.dtype))).sum(1)), a=nn.Linear(4, 3),
            b=nn.Linear(2, 3), c=nn.Linear(3, 3)),
        inputs(3, 3, 4)),
    "scores of places": lambda: (
        Net(lambda s, x: s.c((torch.softmax(x @ x.mT + (lambda t: t @ t.T)(torch.tanh(s.b(inputs(3, 2, seed=9).to(x.dtype)))), -1)
                @ torch.tanh(s.a(x))).sum(1)), a=nn.Linear(4, 3), b=nn.Linear(2, 3), c=nn.Linear(3, 3)),
        inputs(3, 3, 4)),
    "divided by a parameter": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.a(x) / s.w)), a=nn.Linear(4, 4), w=nn.Parameter(inputs(4).abs() + 0.5),
            c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "standardised by parameters": lambda: (
        Net(lambda s, x: s.c(torch.tanh((x - s.m) / s.v.exp().sqrt())), m=nn.Parameter(inputs(4)),
            v=nn.Parameter(inputs(4, seed=1)), c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "divided by a temperature, twice": lambda: (
        Net(lambda s, x: s.c(torch.softmax(s.a(x) / s.t, -1) / s.t), a=nn.Linear(4, 4), t=nn.Parameter(torch.tensor(1.3)),
            c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "means of a learned power": lambda: (
        Net(lambda s, x: s.c((2 * torch.sigmoid(s.a(x)) ** s.p).mean((2, 3)) ** (0.3 / s.p)), a=nn.Conv2d(2, 3, 2),
            p=nn.Parameter(torch.tensor([3.0])), c=nn.Linear(3, 3)),
        IMAGES),
    "divided in place": lambda: (
        Net(lambda s, x: s.c(torch.tanh((1.0 * s.a(x)).div_(s.w))), a=nn.Linear(4, 4), w=nn.Parameter(inputs(4).abs() + 0.5),
            c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "clipped at a parameter": lambda: (
        Net(lambda s, x: s.c(torch.minimum(F.silu(s.a(x)), s.alpha) ** 2), a=nn.Linear(4, 4),
            alpha=nn.Parameter(torch.tensor(0.1)), c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "a parameter raised to samples": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.k.exp().pow(x))), k=nn.Parameter(inputs(4)), c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "instance norms with gains": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.n(s.b(torch.tanh(s.n(s.a(x)))))).mean((2, 3))), a=nn.Conv2d(2, 2, 1),
            b=nn.Conv2d(2, 2, 2, padding=1), n=nn.InstanceNorm2d(2, affine=True), c=nn.Linear(2, 3)),
        IMAGES),
    "moments in a pair": lambda: (
        Net(lambda s, x: s.c((lambda h, v, m: (h - m) / (v + 0.1).sqrt())(s.a(x), *torch.var_mean(s.a(x), 1, keepdim=True))),
            a=nn.Linear(4, 4), c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "sizes and angles of a spectrum": lambda: (
        Net(lambda s, x: s.c(torch.cat([(z := torch.fft.rfft(s.a(x))).abs(), z[:, 1:2].angle()], 1)), a=nn.Linear(4, 4),
            c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "determinants": lambda: (
        Net(lambda s, x: s.c(torch.linalg.slogdet(s.a(x).reshape(-1, 2, 2, 2) + 3 * torch.eye(2))[1]), a=nn.Linear(4, 8),
            c=nn.Linear(2, 3)),
        inputs(3, 4)),
    "both factors of a matrix": lambda: (
        Net(lambda s, x: s.c(sum(torch.linalg.qr(s.a(x).reshape(-1, 2, 2))).flatten(1)), a=nn.Linear(4, 4),
            c=nn.Linear(4, 3)),
        inputs(3, 4)),
    "learned initial states": lambda: (
        Net(lambda s, x: s.c(s.r(x, (s.h.expand(1, len(x), 2).contiguous(), s.k.repeat(1, len(x), 1)))[0][:, -1]),
            r=nn.LSTM(4, 2, batch_first=True), h=nn.Parameter(inputs(1, 1, 2, seed=2)),
            k=nn.Parameter(inputs(1, 1, 2, seed=3)), c=nn.Linear(2, 3)),
        inputs(3, 2, 4)),
    "learned initial states of as many layers as samples": lambda: (
        Net(lambda s, x: s.c(s.r(x, s.h.expand(3, len(x), 2).contiguous())[0][:, -1]),
            r=nn.RNN(4, 2, 3, batch_first=True), h=nn.Parameter(inputs(3, 1, 2, seed=2)), c=nn.Linear(2, 3)),
        inputs(3, 2, 4)),
    "instance norm by running statistics": lambda: (
        Net(lambda s, x: s.c(torch.tanh(s.n(s.a(x))).mean((2, 3))), a=nn.Conv2d(2, 2, 2), n=_tracked(), c=nn.Linear(2, 3)),
        inputs(3, 2, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_gate(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    truth = gate(model, x, Y)
    assert all(bool(t.any()) for t in truth.values())


@pytest.mark.parametrize("name", ["bilinear layer", "divided by a parameter", "instance norms with gains"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_methods_pass_the_audit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    objective = hd.Objective(model.to(dtype))
    for method in ("exact", "propagation"):
        assert hd.measure(objective, [(x.to(dtype), Y)], method=method, max_replicates=10).plan.method == method


AGAIN: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True).eval(),
    "attention": lambda: Net(lambda s, x: s.m(x, x, x)[0], m=nn.MultiheadAttention(4, 2, batch_first=True)),
    "recurrent": lambda: Net(lambda s, x: s.r(x)[0], r=nn.GRU(4, 4, batch_first=True)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()),
    "hardsigmoid": lambda: Net(lambda s, x: F.hardsigmoid(s.a(x)) * x, a=nn.Linear(4, 4)),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.Tanh()),
    "quotient": lambda: Net(lambda s, x: torch.tanh(x / s.t), t=inputs(4) + 3),
}


class Again(nn.Module):
    """A part that a backward pass is to run again, or not."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.a, self.part, self.c = nn.Linear(4, 4), part, nn.Linear(4, 3)
        self.how: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c((self.part(h) if self.how is None else checkpoint(self.part, h, use_reentrant=self.how)).mean(1))


@pytest.mark.parametrize(("name", "reentrant"), [*((name, False) for name in AGAIN), ("hardsigmoid", True)])
def test_checkpointed_parts_are_measured_as_the_plain_ones(name: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model, data = Again(AGAIN[name]()).double(), [(inputs(3, 3, 4), Y)]
    found = []
    for how in (None, reentrant):
        model.how, objective = how, hd.Objective(model)
        found.append([hd.diagonal(objective, data, method=m, replicates=2).total for m in ("exact", "hutchinson")])
    for plain, other in zip(*found):
        assert all(torch.equal(other[parameter], value) for parameter, value in plain.items())


def _fails() -> None:
    raise ValueError("inside")


def test_checkpointing_is_handed_back_after_an_error_as_well() -> None:
    module: Any = torch.utils.checkpoint
    before = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    with as_written({"cpu"}):
        assert module.CheckpointFunction is not before[0]
        with pytest.raises(ValueError, match="inside"):
            checkpoint(_fails, use_reentrant=False)
    with pytest.raises(ValueError, match="inside"), as_written({"cpu"}):
        _fails()
    assert before == (module.CheckpointFunction, module._checkpoint_without_reentrant_generator)


@pytest.mark.parametrize("training", [True, False])
def test_instance_norms_with_running_statistics_are_torchs(training: bool) -> None:
    norm = _tracked().train(training)
    compare(lambda x, w, b: F.instance_norm(x, norm.running_mean, norm.running_var, w, b, training, 0.0),
            inputs(3, 2, 3, 3).float(), inputs(2).float(), inputs(2, seed=1).float())  # fmt: skip


def test_products_of_the_batch_with_itself_are_refused_by_name() -> None:
    model = Net(lambda s, x: s.c((lambda h: h @ h.T @ h)(s.a(x))), a=nn.Linear(4, 4), c=nn.Linear(4, 3)).double()
    with pytest.raises(UncoveredModelError, match=r"Mm after 'a': both matrices depend on .* a batch times itself"):
        Linearisation(hd.Objective(model), inputs(3, 4), Y)
