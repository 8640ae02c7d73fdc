"""Random small models as users write them, by a seed: layers, residuals, gates, attention, norms, reshapes, losses.

A model is a list of steps on vectors "v" [n, f], sequences "s" [n, t, f] or images "i" [n, c, h, w]; each step is drawn
from `STEPS`, may change the kind, and may share its parameters with an earlier one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]
SAMPLES = 3


class Step(nn.Module):
    """One step: what it holds by name, and a function of that and of the hidden tensor."""

    def __init__(self, name: str, run: Callable[[Any, Any], Any], **parts: Any) -> None:
        super().__init__()
        self.name, self.run = name, run
        for key, part in parts.items():
            setattr(self, key, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, h: Any) -> Any:
        return self.run(self, h)

    def extra_repr(self) -> str:
        return self.name


class Cubic(torch.autograd.Function):
    """x + x^3 / 5 by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + x**3 / 5

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 + 0.6 * x * x)


CURVES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("tanh", torch.tanh), ("gelu", F.gelu), ("silu", F.silu), ("mish", F.mish), ("softplus", F.softplus),
    ("elu", F.elu), ("relu", F.relu), ("leaky", lambda h: F.leaky_relu(h, 0.1)), ("sigmoid", torch.sigmoid),
    ("sin", torch.sin), ("custom", lambda h: Cubic.apply(h)), ("relu in place", lambda h: F.relu(h * 1.1, inplace=True)),
    ("square", lambda h: 0.3 * h**2), ("abs", torch.abs), ("hardswish", F.hardswish),
    ("swish by hand", lambda h: h * torch.sigmoid(1.702 * h)), ("logsigmoid", F.logsigmoid),
    ("h / sqrt(1 + h^2)", lambda h: h / torch.sqrt(1 + h * h)), ("softsign", F.softsign),
    ("tanhshrink", F.tanhshrink), ("erf", torch.erf), ("atan", torch.atan), ("exp", lambda h: torch.exp(0.3 * h)),
    ("clamp", lambda h: h.clamp(-0.8, 1.1)), ("pow", lambda h: (h * h + 0.5) ** 0.7), ("h * h", lambda h: h * h),
    ("numbers", lambda h: (h / 0.7 - 0.2) * 1.3), ("1 - h", lambda h: 1 - h), ("-h", lambda h: -h),
    ("log1p", lambda h: torch.log1p(h * h)), ("where", lambda h: torch.where(h > 0.1, h, 0.4 * torch.sin(h))),
    ("where constant", lambda h: torch.where(h > 0, h, torch.zeros_like(h))),
    ("masked fill", lambda h: h.masked_fill(h < -0.7, -0.7)), ("hypot", lambda h: torch.hypot(h, torch.ones_like(h))),
    ("lerp", lambda h: torch.lerp(h, torch.tanh(h), torch.sigmoid(h))), ("maximum", lambda h: torch.maximum(h, 0.3 * h + 0.2)),
    ("addcmul", lambda h: torch.addcmul(h, h, torch.sin(h), value=0.7)),
    ("cat slices", lambda h: torch.cat([torch.tanh(h[..., :1]), h[..., 1:] * 0.9], -1)),
    ("assigned", lambda h: _assigned(h)),
]  # fmt: skip


def _assigned(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[..., 1:] = torch.tanh(h[..., 1:])
    out[..., :1] = h[..., :1]
    return out


@dataclass
class Builder:
    """Draws steps; `pool` are those whose parameters may be used again."""

    rng: random.Random
    pool: list[tuple[str, Shape, Shape, Step]] = field(default_factory=list)

    def some(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def normal(self, *shape: int, size: float = 0.7) -> Tensor:
        return torch.randn(shape) * size

    def curve(self, shape: Shape) -> Step:
        name, function = self.rng.choice(CURVES)
        return Step(name, _Calls(function))


class _Calls:
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, s: Any, h: Tensor) -> Tensor:
        return self.function(h)


# -- steps by kind: each gives (step, shape after it), shapes without the samples


Made = tuple[Step, Shape]


def linear(b: Builder, shape: Shape) -> Made:
    width = b.rng.randint(2, 5)
    how = b.some(
        "plain", "plain", "plain", "no bias", "matmul", "function", "einsum", "view", "weight norm", "scaled", "frozen"
    )
    out = (*shape[:-1], width)
    if how == "matmul":
        return Step(how, lambda s, h: h @ s.w + s.b, w=b.normal(shape[-1], width), b=b.normal(width)), out
    if how == "function":
        return Step(
            how, lambda s, h: F.linear(h, torch.tanh(s.w), s.b.exp()), w=b.normal(width, shape[-1]), b=b.normal(width)
        ), out
    if how == "einsum":
        return Step(how, lambda s, h: torch.einsum("...f,gf->...g", h, s.w), w=b.normal(width, shape[-1])), out
    if how == "view":
        n = shape[-1]
        return Step(how, lambda s, h: F.linear(h, s.w.view(width, n)), w=b.normal(width * n)), out
    if how == "weight norm":
        return Step(how, lambda s, h: s.m(h), m=nn.utils.parametrizations.weight_norm(nn.Linear(shape[-1], width))), out
    if how == "scaled":
        return Step(
            how, lambda s, h: 0.5 * F.linear(h, s.w * 1.7, -s.b), w=b.normal(width, shape[-1]), b=b.normal(width)
        ), out
    if how == "frozen":
        m = nn.Linear(shape[-1], width)
        m.weight.requires_grad_(False)
        return Step(how, lambda s, h: s.m(h), m=m), out
    return Step(how, lambda s, h: s.m(h), m=nn.Linear(shape[-1], width, bias=how == "plain")), out


def gain(b: Builder, shape: Shape) -> Made:
    last = (1,) * (len(shape) - 1) + shape[-1:] if len(shape) < 3 else (shape[0], 1, 1)
    form = b.some(last, shape, (1, *shape), (1,), ())
    how = b.some(
        "mul",
        "add",
        "sub",
        "rsub",
        "exp",
        "scaled",
        "div",
        "both",
        "sigmoid",
        "prelu",
        "learned power",
        "where",
        "table",
    )
    w = b.normal(*form)
    if how == "mul":
        return Step(how, lambda s, h: h * s.w, w=w), shape
    if how == "add":
        return Step(how, lambda s, h: h + s.w, w=w), shape
    if how == "sub":
        return Step(how, lambda s, h: h - 0.6 * s.w, w=w), shape
    if how == "rsub":
        return Step(how, lambda s, h: s.w - h, w=w), shape
    if how == "exp":
        return Step(how, lambda s, h: h * s.w.exp(), w=w), shape
    if how == "scaled":
        return Step(how, lambda s, h: (s.w / 0.8) * h, w=w), shape
    if how == "div":
        return Step(how, lambda s, h: h / (1.5 + s.w * s.w), w=w), shape
    if how == "both":
        return Step(how, lambda s, h: torch.tanh(h * s.w + s.v) * s.w, w=w, v=b.normal(*form)), shape
    if how == "sigmoid":
        return Step(how, lambda s, h: torch.sigmoid(s.w) * h + (1 - torch.sigmoid(s.w)) * torch.tanh(h), w=w), shape
    if how == "prelu":
        width = shape[0]
        return Step(how, lambda s, h: F.prelu(h, s.w), w=b.normal(b.some(1, width))), shape
    if how == "learned power":
        return Step(how, lambda s, h: torch.sigmoid(s.w * h) * h, w=w), shape
    if how == "where":
        return Step(
            how, lambda s, h: torch.where(torch.arange(h.shape[-1]) % 2 == 0, h, s.w * torch.ones_like(h)), w=w
        ), shape
    count = 4
    places = torch.randint(0, count, shape[:-1] + (1,)) if len(shape) > 1 else torch.randint(0, count, ())
    table = b.normal(count, shape[-1])
    if len(shape) == 1:
        return Step(how, lambda s, h: h + s.w[places], w=table), shape
    return Step(how, lambda s, h: h + s.w[places[..., 0]], w=table), shape


def norm(b: Builder, shape: Shape) -> Made:
    if len(shape) == 3:
        c = shape[0]
        how = b.some("bn", "gn", "ln", "in", "ln all", "in affine")
        if how == "bn":
            m: nn.Module = nn.BatchNorm2d(c)
            m.running_mean.normal_()  # type: ignore[union-attr,operator]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
        elif how == "gn":
            m = nn.GroupNorm(b.some(1, c), c)
        elif how == "ln":
            m = nn.LayerNorm(shape[1:])
        elif how == "ln all":
            m = nn.LayerNorm(shape)
        else:
            m = nn.InstanceNorm2d(c, affine=how == "in affine")
        if shape[1] * shape[2] < 2:
            m = nn.LayerNorm(shape)
    else:
        how = b.some("ln", "rms", "no gain", "bn", "normalize", "rms by hand", "standardise")
        width = shape[-1]
        if how == "rms":
            m = nn.RMSNorm(width)
        elif how == "no gain":
            m = nn.LayerNorm(width, elementwise_affine=False)
        elif how == "bn" and len(shape) == 1:
            m = nn.BatchNorm1d(width)
            m.running_mean.normal_()  # type: ignore[union-attr,operator]
        elif how == "normalize":
            return Step(how, lambda s, h: F.normalize(h, dim=-1)), shape
        elif how == "rms by hand":
            return Step(
                how, lambda s, h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3) * s.w, w=b.normal(width)
            ), shape
        elif how == "standardise":
            return Step(
                how,
                lambda s, h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 0.1).sqrt(),
            ), shape
        else:
            m = nn.LayerNorm(width)
    for p in m.parameters():
        nn.init.normal_(p, 0.8, 0.4)
    return Step(how, lambda s, h: s.m(h), m=m), shape


def inner(b: Builder, shape: Shape, depth: int) -> Step:
    """Some steps that keep the shape."""
    steps = []
    for _ in range(b.rng.randint(1, 2)):
        make = b.rng.choice([keep_mix, keep_curve, norm, gain])
        steps.append(make(b, shape)[0])
    return Step("inner", lambda s, h: s.m(h), m=nn.Sequential(*steps))


def keep_curve(b: Builder, shape: Shape) -> Made:
    return b.curve(shape), shape


def keep_mix(b: Builder, shape: Shape) -> Made:
    """A layer from a shape to itself, a new one or one that was used already."""
    known = [step for _, a, c, step in b.pool if a == shape and c == shape]
    if known and b.rng.random() < 0.35:
        return b.rng.choice(known), shape
    if len(shape) == 3:
        c = shape[0]
        m: nn.Module = b.some(
            nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1, bias=False), nn.Conv2d(c, c, 3, padding=1, groups=c),
            nn.ConvTranspose2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=2, dilation=2),
        )  # fmt: skip
    elif len(shape) == 2 and b.rng.random() < 0.3:
        m = Step("tokens mixed", lambda s, h: s.w @ h, w=b.normal(shape[0], shape[0]))
    else:
        m = nn.Linear(shape[-1], shape[-1])
    step = Step("mix", lambda s, h: s.m(h), m=m)
    b.pool.append(("mix", shape, shape, step))
    return step, shape


def residual(b: Builder, shape: Shape) -> Made:
    how = b.some("h + f", "h + 0.3 f", "h - f", "h + g f", "mean of both", "inner on a norm")
    f = inner(b, shape, 1)
    if how == "h + f":
        return Step(how, lambda s, h: h + s.f(h), f=f), shape
    if how == "h + 0.3 f":
        return Step(how, lambda s, h: h + 0.3 * s.f(h), f=f), shape
    if how == "h - f":
        return Step(how, lambda s, h: h.sub(s.f(h), alpha=0.5), f=f), shape
    if how == "h + g f":
        return Step(how, lambda s, h: h + s.g * s.f(h), f=f, g=b.normal(1)), shape
    if how == "mean of both":
        return Step(how, lambda s, h: torch.stack([h, s.f(h)]).mean(0), f=f), shape
    return Step(how, lambda s, h: h + s.f(s.n(h)), f=f, n=norm(b, shape)[0]), shape


def gate(b: Builder, shape: Shape) -> Made:
    f, g = inner(b, shape, 1), inner(b, shape, 1)
    how = b.some("f sigmoid(g)", "f g", "f / (1 + g^2)", "highway", "glu", "f g h", "max", "outer gate", "pow")
    runs: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "f sigmoid(g)": lambda s, h: s.f(h) * torch.sigmoid(s.g(h)),
        "f g": lambda s, h: s.f(h) * s.g(h),
        "f / (1 + g^2)": lambda s, h: s.f(h) / (1 + s.g(h) ** 2),
        "highway": lambda s, h: (lambda t: t * s.f(h) + (1 - t) * h)(torch.sigmoid(s.g(h))),
        "glu": lambda s, h: F.glu(torch.cat([s.f(h), s.g(h)], -1), -1),
        "f g h": lambda s, h: s.f(h) * s.g(h) * h,
        "max": lambda s, h: torch.maximum(s.f(h), s.g(h)),
        "outer gate": lambda s, h: h * torch.sigmoid(s.f(h).mean(-1, keepdim=True)),
        "pow": lambda s, h: torch.sigmoid(s.f(h)) ** (1 + torch.sigmoid(s.g(h))),
    }
    return Step(how, runs[how], f=f, g=g), shape


def soft(b: Builder, shape: Shape) -> Made:
    how = b.some("softmax", "log softmax", "minus logsumexp", "over tokens")
    axis = 1 if how == "over tokens" else -1
    if how == "log softmax":
        return Step(how, lambda s, h: F.log_softmax(h, -1)), shape
    if how == "minus logsumexp":
        return Step(how, lambda s, h: h - h.logsumexp(-1, keepdim=True)), shape
    return Step(how, lambda s, h: F.softmax(1.3 * h, axis)), shape


def moved(b: Builder, shape: Shape) -> Made:
    how = b.some("flip", "roll", "cumsum", "sort", "chunk", "index", "pad", "repeat")
    width = shape[-1]
    if how == "flip":
        return Step(how, lambda s, h: h.flip(-1)), shape
    if how == "roll":
        return Step(how, lambda s, h: h.roll(1, -1)), shape
    if how == "cumsum":
        return Step(how, lambda s, h: h.cumsum(-1)), shape
    if how == "sort":
        return Step(how, lambda s, h: h.sort(-1)[0]), shape
    if how == "chunk" and width % 2 == 0:
        return Step(how, lambda s, h: torch.cat(h.chunk(2, -1)[::-1], -1)), shape
    if how == "index":
        order = torch.randint(0, width, (width,))
        return Step(how, lambda s, h: h[..., order]), shape
    if how == "pad":
        return Step(how, lambda s, h: F.pad(h, (1, 0))), (*shape[:-1], width + 1)
    return Step("repeat", lambda s, h: h.repeat_interleave(2, -1)), (*shape[:-1], 2 * width)


# -- steps of one kind alone


def from_vectors(b: Builder, shape: Shape) -> Made:
    width = shape[0]
    how = b.some("bilinear", "to tokens", "outer", "experts", "cosine", "group norm", "kernel", "two uses", "norm")
    if how == "bilinear":
        out = b.rng.randint(2, 4)
        return Step(how, lambda s, h: s.m(h, torch.tanh(h)), m=nn.Bilinear(width, width, out)), (out,)
    if how == "to tokens":
        t, f = b.rng.randint(2, 3), b.rng.randint(2, 3)
        return Step(how, lambda s, h: s.m(h).view(len(h), t, f), m=nn.Linear(width, t * f)), (t, f)
    if how == "outer":
        return Step(how, lambda s, h: torch.einsum("ni,nj->nij", h[:, :3], torch.sin(h))), (min(width, 3), width)
    if how == "experts":
        step = Step(
            how, lambda s, h: (torch.softmax(s.r(h), -1)[:, :, None] * torch.stack([e(h) for e in s.e], 1)).sum(1),
            r=nn.Linear(width, 2), e=nn.ModuleList([nn.Linear(width, 3) for _ in range(2)]),
        )  # fmt: skip
        return step, (3,)
    if how == "cosine":
        return Step(
            how, lambda s, h: F.linear(F.normalize(h, dim=-1), F.normalize(s.w, dim=-1)) * 3, w=b.normal(3, width)
        ), (3,)
    if how == "group norm":
        groups = 2 if width % 2 == 0 and width > 2 else 1
        if width // groups < 2:
            return linear(b, shape)
        return Step(how, lambda s, h: s.m(h), m=nn.GroupNorm(groups, width)), shape
    if how == "kernel":
        return Step(how, lambda s, h: torch.exp(-0.3 * (h[:, None] - s.c).pow(2).sum(-1)), c=b.normal(3, width)), (3,)
    if how == "two uses":
        return Step(how, lambda s, h: s.m(h) + torch.tanh(s.m(h.flip(-1))), m=nn.Linear(width, 3)), (3,)
    return Step(how, lambda s, h: torch.cat([h, h.norm(dim=-1, keepdim=True)], -1)), (width + 1,)


def from_tokens(b: Builder, shape: Shape) -> Made:
    t, f = shape
    how = b.some(
        "attention", "attention", "cross attention", "mean", "flatten", "last", "max", "places", "class token", "conv1d",
        "mha", "sdpa", "rnn", "gru", "lstm", "cumsum", "pool by attention", "mixer", "transpose", "folded", "causal",
        "encoder layer", "learned query", "einsum",
    )  # fmt: skip
    lin = nn.Linear
    if how in ("attention", "causal"):
        mask = torch.triu(torch.ones(t, t, dtype=torch.bool), 1)

        def run(s: Any, h: Tensor) -> Tensor:
            q, k, v = s.qkv(h).chunk(3, -1)
            scores = q @ k.transpose(1, 2) / f**0.5
            if how == "causal":
                scores = scores.masked_fill(mask, float("-inf"))
            return s.o(scores.softmax(-1) @ v)

        return Step(how, run, qkv=lin(f, 3 * f), o=lin(f, f)), shape
    if how == "cross attention":
        return Step(how, lambda s, h: (s.q(h[:, :1]) @ s.k(h).mT).softmax(-1) @ s.k(h), q=lin(f, f), k=lin(f, f)), (
            1,
            f,
        )
    if how == "mean":
        return Step(how, lambda s, h: h.mean(1)), (f,)
    if how == "flatten":
        return Step(how, lambda s, h: h.flatten(1)), (t * f,)
    if how == "last":
        return Step(how, lambda s, h: h[:, -1]), (f,)
    if how == "max":
        return Step(how, lambda s, h: h.max(1)[0]), (f,)
    if how == "places":
        w = nn.Embedding(t, f)
        return Step(how, lambda s, h: h + s.w(torch.arange(t)), w=w), shape
    if how == "class token":
        return Step(how, lambda s, h: torch.cat([s.w.expand(len(h), -1, -1), h], 1), w=b.normal(1, 1, f)), (t + 1, f)
    if how == "conv1d":
        out = b.rng.randint(2, 4)
        m = b.some(nn.Conv1d(f, out, 3, padding=1), nn.Conv1d(f, out, 2, padding=1, stride=1), nn.Conv1d(f, out, 1))
        after = t + (1 if m.kernel_size == (2,) else 0)
        return Step(how, lambda s, h: s.m(h.transpose(1, 2)).transpose(1, 2), m=m), (after, out)
    if how == "mha":
        return Step(
            how, lambda s, h: s.m(h, h, h, need_weights=False)[0], m=nn.MultiheadAttention(f, 1, batch_first=True)
        ), shape
    if how == "sdpa":
        return Step(how, lambda s, h: F.scaled_dot_product_attention(s.q(h), h, torch.tanh(h)), q=lin(f, f)), shape
    if how in ("rnn", "gru", "lstm"):
        kind = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[how]
        return Step(how, lambda s, h: s.m(h)[0], m=kind(f, 2, batch_first=True)), (t, 2)
    if how == "cumsum":
        return Step(how, lambda s, h: h.cumsum(1)), shape
    if how == "pool by attention":
        return Step(how, lambda s, h: (s.a(h).softmax(1) * h).sum(1), a=lin(f, 1)), (f,)
    if how == "mixer":
        return Step(how, lambda s, h: h + s.m(h.transpose(1, 2)).transpose(1, 2), m=lin(t, t)), shape
    if how == "transpose":
        return Step(how, lambda s, h: h.transpose(1, 2)), (f, t)
    if how == "folded":
        return Step(how, lambda s, h: torch.tanh(s.m(h.reshape(-1, f))).reshape(len(h), t, -1), m=lin(f, 3)), (t, 3)
    if how == "encoder layer":
        m = nn.TransformerEncoderLayer(f, 1, 3, batch_first=True, activation="gelu", norm_first=b.some(True, False))
        return Step(how, lambda s, h: s.m(h), m=m), shape
    if how == "learned query":
        return Step(how, lambda s, h: (s.q @ h.mT).softmax(-1) @ h, q=b.normal(2, f)), (2, f)
    return Step(how, lambda s, h: torch.einsum("ntf,tfg->ntg", h, s.w), w=b.normal(t, f, 3)), (t, 3)


def from_images(b: Builder, shape: Shape) -> Made:
    c, hh, ww = shape
    how = b.some(
        "conv", "conv", "conv", "pool", "max pool", "mean", "flatten", "se", "tokens", "up", "transposed", "depthwise",
        "unfold", "spatial gate", "shuffle", "prelu", "adaptive", "norm pool",
    )  # fmt: skip
    out = b.rng.randint(2, 3)
    if how == "mean":
        return Step(how, lambda s, h: h.mean((2, 3))), (c,)
    if how == "flatten":
        return Step(how, lambda s, h: h.flatten(1)), (c * hh * ww,)
    if how == "tokens":
        return Step(how, lambda s, h: h.flatten(2).transpose(1, 2)), (hh * ww, c)
    if how == "se":
        return Step(
            how, lambda s, h: h * torch.sigmoid(s.m(F.silu(h.mean((2, 3)))))[..., None, None], m=nn.Linear(c, c)
        ), shape
    if how == "spatial gate":
        return Step(how, lambda s, h: h * torch.sigmoid(s.m(h)), m=nn.Conv2d(c, 1, 3, padding=1)), shape
    if how == "prelu":
        return Step(how, lambda s, h: s.m(h), m=nn.PReLU(c)), shape
    if how == "up" and hh * ww <= 12:
        mode = b.some("nearest", "bilinear")
        return Step(how, lambda s, h: F.interpolate(h, scale_factor=2, mode=mode)), (c, 2 * hh, 2 * ww)
    if how == "transposed" and hh * ww <= 12:
        m: nn.Module = nn.ConvTranspose2d(c, out, 2, stride=b.some(1, 2))
        return Step(how, lambda s, h: s.m(h), m=m), tuple(m(torch.zeros(1, *shape)).shape[1:])
    if how == "depthwise":
        m = nn.Conv2d(c, 2 * c, 3, padding=1, groups=c, bias=b.some(True, False))
        return Step(how, lambda s, h: s.m(h), m=m), (2 * c, hh, ww)
    if how == "unfold" and min(hh, ww) > 2:
        return Step(how, lambda s, h: F.unfold(h, 2).transpose(1, 2)), ((hh - 1) * (ww - 1), 4 * c)
    if how == "shuffle" and c == 4:
        return Step(how, lambda s, h: F.pixel_shuffle(h, 2)), (1, 2 * hh, 2 * ww)
    if how == "adaptive":
        return Step(how, lambda s, h: F.adaptive_avg_pool2d(h, (1, 2))), (c, 1, 2)
    if how == "norm pool" and min(hh, ww) > 1:
        return Step(how, lambda s, h: F.lp_pool2d(h.abs() + 0.3, 2, 2)), (c, hh // 2, ww // 2)
    if how in ("pool", "max pool") and min(hh, ww) > 1:
        f = F.avg_pool2d if how == "pool" else F.max_pool2d
        return Step(how, lambda s, h: f(h, 2)), (c, hh // 2, ww // 2)
    size = b.some(1, 2, 3)
    mode = b.some("zeros", "zeros", "reflect", "circular")
    pad = 1 if size == 3 and min(hh, ww) > 1 else 0
    if size > min(hh, ww) + 2 * pad:
        size = 1
    m = nn.Conv2d(c, out, size, padding=pad, stride=b.some(1, 1, 2), padding_mode=mode if pad else "zeros")
    return Step("conv", lambda s, h: s.m(h), m=m), tuple(m(torch.zeros(1, *shape)).shape[1:])


ANY = [linear, linear, keep_curve, keep_curve, keep_curve, gain, norm, residual, gate, keep_mix, soft, moved]
OWN = {1: from_vectors, 2: from_tokens, 3: from_images}
LIMIT = 24


@dataclass
class Case:
    """A model, batches of (inputs, targets), and the objective's options."""

    model: nn.Module
    batches: list[tuple[Any, Tensor]]
    options: dict[str, Any]
    names: list[str]


class Whole(nn.Module):
    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Any) -> Any:
        for step in self.steps:
            x = step(x)
        return x


def draw(seed: int, *, samples: int = SAMPLES, longest: int = 7) -> Case:
    """The random model of a seed, in float64."""
    torch.manual_seed(seed)
    b = Builder(random.Random(seed))
    kind = b.some(1, 1, 2, 2, 3, 3, 4)
    shape: Shape = {1: (4,), 2: (3, 3), 3: (2, 4, 3), 4: (3,)}[kind]
    tokens = kind == 4
    sizes = [samples] if b.rng.random() < 0.5 else [samples, 1, 2]
    steps: list[Step] = []
    names: list[str] = []

    def add(made: Made) -> Shape:
        steps.append(made[0])
        names.append(f"{made[0].name} -> {made[1]}")
        return made[1]

    if tokens:
        padding = b.some(None, 0)
        if b.rng.random() < 0.25:
            shape = add((Step("bag", lambda s, x: s.m(x), m=nn.EmbeddingBag(5, 3, mode=b.some("sum", "mean"))), (3,)))
        else:
            shape = add((Step("embedding", lambda s, x: s.m(x), m=nn.Embedding(5, 3, padding_idx=padding)), (3, 3)))
    for _ in range(b.rng.randint(2, longest)):
        pick = b.rng.random()
        if torch.Size(shape).numel() > LIMIT:
            shape = add(OWN[len(shape)](b, shape) if len(shape) > 1 else linear(b, shape))
        elif pick < 0.4:
            shape = add(OWN[len(shape)](b, shape))
        else:
            make = b.rng.choice(ANY)
            if make is linear and len(shape) == 3:
                make = keep_mix
            shape = add(make(b, shape))
    while torch.Size(shape).numel() > LIMIT:
        shape = (
            add((Step("mean", lambda s, h: h.mean(1)), shape[1:])) if len(shape) > 1
            else add((Step("cut", lambda s, h: h[:, :5]), (5,)))
        )  # fmt: skip
    if len(shape) == 3 and b.rng.random() < 0.5:
        shape = add((Step("flat", lambda s, h: h.flatten(1)), (torch.Size(shape).numel(),)))
    if b.rng.random() < 0.7 and len(shape) < 3:
        width = b.rng.randint(2, 4)
        shape = add(
            (
                Step("head", lambda s, h: s.m(h), m=nn.Linear(shape[-1], width, bias=b.some(True, False))),
                (*shape[:-1], width),
            )
        )
    model = Whole(steps).double().eval()
    batches = []
    options, targets = loss_of(b, shape)
    for size in sizes:
        x = torch.randint(0, 5, (size, 3)) if tokens else torch.randn(size, *INPUTS[kind], dtype=torch.float64)
        batches.append((x, targets(size)))
    return Case(model, batches, options, names)


INPUTS = {1: (4,), 2: (3, 3), 3: (2, 4, 3)}


def huber(f: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(f, y, reduction="none").flatten(1).sum(1)


def log_cosh(f: Tensor, y: Tensor) -> Tensor:
    d = (f - y).flatten(1)
    return torch.log(torch.cosh(d)).sum(1) + 0.2 * (d.sum(1)) ** 2


def coupled(f: Tensor, y: Tensor) -> Tensor:
    z = f.flatten(1)
    return torch.sin(z).sum(1) * z[:, 0] + z.pow(3).mean(1) / 3 - (y.flatten(1) * z).sum(1)


def focal(f: Tensor, y: Tensor) -> Tensor:
    p = torch.softmax(f.flatten(1), -1)
    q = p.gather(1, y.flatten(1)[:, :1].abs().long() % p.shape[1])[:, 0]
    return -((1 - q) ** 2) * torch.log(q)


def loss_of(b: Builder, shape: Shape) -> tuple[dict[str, Any], Callable[[int], Tensor]]:
    """(options of the objective, targets of so many samples)."""
    real = lambda n: torch.randn(n, *shape, dtype=torch.float64)  # noqa: E731
    how = b.some("ce", "ce", "ce", "ce", "mse", "half_mse", "bce", huber, log_cosh, coupled, focal)
    options: dict[str, Any] = {}
    if callable(how):
        return {"loss": how}, real
    if how in ("mse", "half_mse"):
        return {"loss": how}, real
    if how == "bce":
        return {"loss": how}, lambda n: torch.rand(n, *shape, dtype=torch.float64)
    if len(shape) == 3:
        classes, places = shape[0], shape[1:]
        options["class_axis"] = 1
    else:
        classes, places = shape[-1], shape[:-1]
        if len(shape) == 2:
            options["class_axis"] = -1
    if classes < 2:
        return {"loss": "mse"}, real
    options["loss"] = "cross_entropy"
    if b.rng.random() < 0.3:
        options["label_smoothing"] = 0.1
    if b.rng.random() < 0.3:
        options["class_weights"] = [0.5 + k for k in range(classes)]
    if b.rng.random() < 0.15:

        def soft(n: int) -> Tensor:
            z = torch.randn(n, *shape, dtype=torch.float64)
            return torch.softmax(z, 1 if len(shape) == 3 else -1)

        return options, soft
    if len(shape) == 2 and shape[0] > 1 and b.rng.random() < 0.3:
        options["shift"] = 1
    holes = b.rng.random() < 0.4

    def classes_of(n: int) -> Tensor:
        y = torch.randint(0, classes, (n, *places))
        if holes and places:
            y = torch.where(torch.rand(y.shape) < 0.3, -100, y)
        elif holes and n > 1:
            y[0] = -100
        return y

    return options, classes_of
