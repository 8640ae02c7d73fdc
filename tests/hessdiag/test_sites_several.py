"""Sites with several inputs: with every one-hot vector in the place of the signs propagation is p products, and so is
`exact`. No statistics: this is the gate of every kind of site.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gate import gate
from models import beyond_in_the_mean
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from hessdiag.errors import UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate
from hessdiag.problem.forward import as_written
from hessdiag.signs import Signs

torch.set_num_threads(1)
SAMPLES, TOKENS, WIDTH, HEADS, CLASSES = 3, 4, 6, 2, 3


class Head(nn.Module):
    """A body on [N, T, D] between two linear layers; logits of the tokens are averaged, or those of the first taken."""

    def __init__(self, body: nn.Module, *, first: bool = False) -> None:
        super().__init__()
        self.before, self.body, self.after, self.first = nn.Linear(5, WIDTH), body, nn.Linear(WIDTH, CLASSES), first

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.body(self.before(x)))
        return y[:, 0] if self.first else y.mean(1)


class Applied(nn.Module):
    """Two linear layers with any function of their outputs between."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.a(x), self.b(x))


class Cumulated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(-1)


class Attention(nn.Module):
    """Causal, of several heads: fused, or written by hand; with queries and keys of length one if told."""

    def __init__(self, *, fused: bool, normalised: bool = False) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fused, self.normalised = fused, normalised

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (part.view(n, t, HEADS, d // HEADS).transpose(1, 2) for part in self.into(x).split(d, 2))
        if self.normalised:
            q, k = F.normalize(q, dim=-1) * 3.0, F.normalize(k, dim=-1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (d // HEADS) ** -0.5
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class RMSNorm(nn.Module):
    """Written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1) * self.gain


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + mixing(norm(x)), x + mlp(norm(x))."""

    def __init__(self, norm: Callable[[], nn.Module], mixing: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.one, self.mixing, self.two, self.mlp = norm(), mixing, norm(), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(self.one(x))
        return x + self.mlp(self.two(x))


class ViT(nn.Module):
    """Patches by a convolution, a block without mask, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.block, self.norm = Block(norm, MultiHead(), mlp()), norm()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.block(tokens)).mean(1))


class MultiHead(Attention):
    def __init__(self) -> None:
        super().__init__(fused=True)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (part.view(n, t, HEADS, d // HEADS).transpose(1, 2) for part in self.into(x).split(d, 2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class Experts(nn.Module):
    """A softmax gate times experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class GroupNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)
        self.norm, self.again = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4, affine=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.one(x)))
        return self.head(self.again(self.two(h)).square().mean((2, 3)))


def norm() -> nn.Module:
    return nn.LayerNorm(WIDTH, eps=0.1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Head(Applied(function))


def one(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return both(lambda a, b: function(a) * torch.tanh(b))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "softmax": one(lambda a: a.softmax(-1)),
    "softmax over tokens": one(lambda a: a.softmax(1)),
    "log-softmax": one(lambda a: F.log_softmax(a, -1)),
    "logsumexp": one(lambda a: a.logsumexp(-1, keepdim=True)),
    "logsumexp without its axis": one(lambda a: a.logsumexp(1).unsqueeze(1)),
    "layernorm": one(lambda a: F.layer_norm(a, (WIDTH,), eps=0.3)),
    "layernorm over two axes": one(lambda a: F.layer_norm(a, (TOKENS, WIDTH))),
    "layernorm of two features": one(lambda a: F.layer_norm(a.unflatten(-1, (-1, 2)), (2,)).flatten(-2)),
    "layernorm with a gain": lambda: Head(nn.Sequential(nn.Linear(WIDTH, WIDTH), norm(), nn.Tanh())),
    "rmsnorm": one(lambda a: F.rms_norm(a, (WIDTH,), eps=0.1)),
    "bmm": both(lambda a, b: torch.bmm(torch.bmm(a, b.transpose(1, 2)), b)),
    "baddbmm": both(lambda a, b: torch.baddbmm(a, a.tanh() @ b.transpose(1, 2), b, beta=0.7, alpha=1.3)),
    "einsum": both(lambda a, b: torch.einsum("ntd,nsd,nse->nte", a, b, a)),
    "gating": both(lambda a, b: a * b),
    "broadcast product": both(lambda a, b: a * b.mean(-1, keepdim=True)),
    "quotient": both(lambda a, b: a / (b.square() + 1.0)),
    "broadcast quotient": both(lambda a, b: a / b.exp().sum(-1, keepdim=True)),
    "quotient of constants": one(lambda a: 2.0 / a.exp() + torch.arange(1.0, 7.0) / (1.0 + a.square())),
    "length": one(lambda a: torch.linalg.vector_norm(a, dim=-1, keepdim=True)),
    "length over two axes": one(lambda a: a.norm(dim=(1, 2)).reshape(-1, 1, 1)),
    "cosine similarity": both(lambda a, b: F.cosine_similarity(a, b, dim=-1).unsqueeze(-1) * a),
    "cumulative product": one(lambda a: a.cumprod(-1)),
    "inverses": one(lambda a: torch.linalg.inv(a[..., :4].unflatten(-1, (2, 2)) + 4 * torch.eye(2)).flatten(-2).repeat(1, 1, 2)[..., :6]),
    "several that depend on each other": both(lambda a, b: torch.logaddexp(a.tanh(), a * b)),
    "gpt": lambda: Head(nn.Sequential(Block(norm, Attention(fused=True), mlp()), norm()), first=False),
    "gpt by hand": lambda: Head(Block(norm, Attention(fused=False), mlp())),
    "qk norm": lambda: Head(Block(norm, Attention(fused=False, normalised=True), mlp()), first=False),
    "encoder layer": lambda: Head(nn.TransformerEncoderLayer(WIDTH, HEADS, 8, 0.0, F.gelu, batch_first=True)),
    "encoder layer, norm first": lambda: Head(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 8, 0.0, F.silu, batch_first=True, norm_first=True)),
    "vit": ViT,
    "rmsnorm and swiglu": lambda: Head(Block(RMSNorm, Attention(fused=True), SwiGLU())),
    "experts": lambda: Head(Block(norm, Experts(), Experts())),
    "groupnorm": GroupNet,
}  # fmt: skip
IMAGES = {"vit", "groupnorm"}


def prepared(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(len(name))
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    g = torch.Generator().manual_seed(1)
    shape = (SAMPLES, 1, 6, 6) if name in IMAGES else (SAMPLES, TOKENS, 5)
    return model, torch.randn(shape, generator=g, dtype=torch.float64), torch.arange(SAMPLES) % CLASSES


def truth(model: nn.Module, x: Tensor, y: Tensor) -> Tensors:
    """One product per parameter, the loss summed."""
    products = Products(hd.Objective(model), x, y, parts=False)
    found = {}
    for name, parameter in model.named_parameters():
        entries = products.entries(name, list(range(parameter.numel())))
        found[name] = torch.tensor(entries, dtype=torch.float64).reshape(parameter.shape)
    return found


def agree(found: Tensors, expected: Tensors, tolerance: float) -> None:
    """Tensor by tensor, relative to its norm; where that is zero, to the whole."""
    whole = sum(float(t.square().sum()) for t in expected.values()) ** 0.5
    for name, wanted in expected.items():
        size = float(wanted.norm())
        off = float((found[name].double() - wanted).norm())
        assert off <= tolerance * (size if size > 1e-9 * whole else whole), (name, off, size, whole)


def in_the_mean(linear: Linearisation, rank: int = 0) -> Tensors:
    propagator = Propagator(linear)
    propagator.deflate(Signs(0), rank)
    out = beyond_in_the_mean(propagator)
    for part in (propagator.gauss_newton(), propagator.direct(), propagator.deflated()):
        accumulate(out, part)
    return out


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "vit" else ()) for n in MODELS])
def test_every_one_hot_vector_in_the_place_of_the_signs_is_p_products(name: str) -> None:
    model, x, y = prepared(name)
    gate(model, x, y)


@pytest.mark.parametrize("name", ["gpt by hand", "vit", "rmsnorm and swiglu", "experts", "groupnorm"])
def test_directions_taken_out_of_the_signs_leave_the_mean(name: str) -> None:
    model, x, y = prepared(name)
    expected = truth(model, x, y)
    agree(in_the_mean(Linearisation(hd.Objective(model), x, y), 3), expected, 1e-12)


@pytest.mark.parametrize("name", ["gpt", "qk norm", "vit", "rmsnorm and swiglu", "experts", "groupnorm"])
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_measurements_are_audited_and_right(name: str, dtype: torch.dtype) -> None:
    model, x, y = prepared(name)
    expected = sum(float(t.square().sum()) for t in truth(model, x, y).values()) ** 0.5 / SAMPLES
    objective = hd.Objective(model.to(dtype))
    expected /= objective.size**0.5
    batch = [(x.to(dtype), y)]
    exact = hd.measure(objective, batch, method="exact")
    assert exact.rms == pytest.approx(expected, rel=1e-10 if dtype == torch.float64 else 2e-4)
    found = hd.measure(objective, batch, method="auto", rtol=0.05, max_replicates=60)
    assert found.provenance["method"] in ("exact", "propagation")
    drawn = hd.measure(objective, batch, method="propagation", rtol=0.02, max_replicates=60)
    low, high = drawn.interval
    assert low - (high - low) <= expected <= high + (high - low)


def test_a_large_block_of_entries_that_bend_together_is_refused_by_its_size() -> None:
    model = nn.Sequential(nn.Linear(5, 300), Cumulated(), nn.Linear(300, CLASSES))
    with pytest.raises(UncoveredModelError, match=r"Cumprod.*300 of its entries bend together"):
        Linearisation(hd.Objective(model), torch.randn(2, 5), torch.tensor([0, 1]))


MASKS: dict[str, dict[str, Tensor | None]] = {
    "none": {},
    "causal": {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), "is_causal": True},
    "by number and by padding": {
        "attn_mask": torch.randn(SAMPLES * HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)).double(),
        "key_padding_mask": torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]).bool(),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [None, False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_the_samples_first_is_torchs(mask: str, weights: bool | None, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double()
    x = torch.randn(*((SAMPLES, TOKENS) if batch_first else (TOKENS, SAMPLES)), WIDTH).double()
    other = torch.randn_like(x)
    for inputs in ((x, x, x), (x, other, other)):
        options = MASKS[mask] | {"need_weights": weights is not None, "average_attn_weights": bool(weights)}
        wanted = layer(*inputs, **options)
        with as_written({"cpu"}):
            found = layer(*inputs, **options)
        assert (found[0] - wanted[0]).abs().max() <= 1e-14
        assert (found[1] is None) == (wanted[1] is None)
        if wanted[1] is not None:
            assert (found[1] - wanted[1]).abs().max() <= 1e-14
