"""A device that is not the CPU, where there is no other: it computes on the CPU, and what CUDA would refuse raises.

As a program it measures small nets there and on the CPU, and prints as JSON how far the two are apart. It changes torch
for good, so that it runs in a process of its own (`test_other_device`).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

import hessdiag as hd
from hessdiag.signs import Signs

NAME = "pretend"
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
ENTRY_BY_ENTRY = {aten.where.self, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
NUMBERS = {aten._local_scalar_dense.default, aten.equal.default}
FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m",
    "randperm", "randperm.generator", "linspace", "full",
)  # fmt: skip


class Pretended(Tensor):
    """`inner` is on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=torch.device(NAME, 0)
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:  # type: ignore[override]
        return Tensor.__getitem__(self, _placed(index))

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    __array__ = numpy  # type: ignore[assignment]


def _placed(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_placed, index))
    return torch.tensor(index).to(NAME) if isinstance(index, list) else index


def run(func: Any, args: Any, kwargs: Any) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    refuse(func, args, flat)
    on_cpu = [
        x.inner if isinstance(x, Pretended) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat
    ]
    own, named = pytree.tree_unflatten(on_cpu, spec)
    if func is aten.cudnn_batch_norm.default:
        assert not own[5], "running statistics"
        x = own[0]
        blank = x.new_empty(0)
        out: Any = (aten.native_batch_norm.default(*own)[0], blank, blank, blank.byte())
    elif func is aten._efficientzerotensor.default:
        out = torch.zeros(*own, **named)
    else:
        out = func(*own, **named)
    target = kwargs.get("device")
    if func in NUMBERS or (target is not None and target.type == "cpu"):
        return out
    there = pytree.tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, out)
    return (
        return_and_correct_aliasing(func, args, kwargs, there) if any(isinstance(x, Pretended) for x in flat) else there
    )


def refuse(func: Any, args: Any, flat: list[Any]) -> None:
    """What CUDA refuses: another generator, and tensors of the CPU beside its own, but for single numbers and indices."""
    if any(isinstance(x, torch.Generator) for x in flat):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")
    mine = [x for x in flat if isinstance(x, Pretended)]
    others = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Pretended)]
    if func in ACROSS or not mine or not others:
        return
    if func in BY_INDEX and isinstance(args[0], Pretended):
        others = [x for x in pytree.tree_leaves(args[2:]) if isinstance(x, Tensor) and not isinstance(x, Pretended)]
    single = torch.Tag.pointwise in func.tags or func in ENTRY_BY_ENTRY or func in BY_INDEX
    if any(x.ndim for x in others) or (others and not single):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu in {func}")


def install() -> None:
    """Make the device known to torch, its generators numbers of the CPU's, its batch norm that of a card."""
    setup: Any = backend_registration._setup_privateuseone_for_python_backend
    setup(rename=NAME)
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        own.impl(name, lambda *args, func=func, **kwargs: run(func, args, kwargs), "PrivateUse1")
    KEPT.extend((everything, own))
    plain, before = torch.batch_norm, torch.tensor

    def batch_norm(x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Tensor:
        if isinstance(x, Pretended) and w is not None and b is not None and mean is not None and x.ndim > 2:
            return torch.cudnn_batch_norm(x, w, b, mean, var, training, *rest[:2])[0]  # type: ignore[no-any-return]
        return plain(x, w, b, mean, var, training, *rest)

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **named: Any) -> Tensor:
        made = before(data, **named)
        return (made if device is None else made.to(device)).requires_grad_(requires_grad)

    torch.batch_norm, torch.tensor = batch_norm, tensor
    drawn, begun = Signs._draw, Signs.__init__

    def start(self: Signs, seed: int, device: Any = "cpu") -> None:
        begun(self, seed, "cpu")
        self.place = torch.device(device)  # type: ignore[attr-defined]

    Signs.__init__ = start  # type: ignore[method-assign]
    Signs._draw = lambda self, *args: drawn(self, *args).to(self.place)  # type: ignore[method-assign,attr-defined]


KEPT: list[Any] = []


def moved(model: nn.Module) -> nn.Module:
    """A copy there: `Module.to` would take tied parameters apart, which it does not on a card."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(NAME)) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.to(NAME) for b in model.buffers()})


class Attention(nn.Module):
    """Tied embeddings around a block of attention with a scaled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4), nn.Parameter(0.1 * torch.randn(1, 5, 4))
        self.first, self.last = nn.LayerNorm(4), nn.RMSNorm(4)
        self.rows, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.places
        q, k, v = self.rows(self.first(h)).chunk(3, -1)
        h = h + 0.7 * (1.3 - self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)).tanh())
        return self.last(h) @ self.table.weight.T


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0][:, -1])  # type: ignore[no-any-return]


def images() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), hd.activations.build("rct:beta=1,alpha=6"), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    model[1].running_var.uniform_(0.5, 2.0)  # type: ignore[operator,union-attr]
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, ...], int]] = {
    "images": (images, lambda: torch.rand(3, 2, 6, 6), (3,), 3),
    "attention": (Attention, lambda: torch.randint(7, (2, 5)), (2, 5), 7),
    "recurrent": (Recurrent, lambda: torch.randn(3, 4, 3), (3,), 2),
}
METHODS: dict[str, dict[str, Any]] = {"exact": {}, "propagation": {"replicates": 2}, "hutchinson": {"replicates": 2}}


def mistakes(x: Tensor) -> Iterator[Callable[[], object]]:
    """What must raise, or nothing here would be found."""
    yield lambda: x + torch.ones(3)
    yield lambda: x @ torch.ones(3)
    yield lambda: torch.cat([x, torch.ones(3)])
    yield lambda: torch.tensor(2.0).expand(3) * x
    yield lambda: torch.where(x > 0, x, torch.ones(3))
    yield lambda: torch.ones(3)[x.long()]
    yield lambda: x.numpy()
    yield lambda: torch.randint(2, (3,), device=NAME, generator=torch.Generator())


def raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except (RuntimeError, TypeError):
        return True
    return False


def main() -> None:
    torch.set_num_threads(1)
    install()
    found: dict[str, float] = {}
    for name, (build, draw, shape, classes) in CASES.items():
        torch.manual_seed(0)
        model, x, y = build().double().eval(), draw(), torch.randint(classes, shape)
        x = x.double() if x.is_floating_point() else x
        for method, options in METHODS.items():
            both = []
            for net, batch in ((model, (x, y)), (moved(model), (x.to(NAME), y.to(NAME)))):
                given: Any = {"method": method, "seed": 1, **options}
                both.append(hd.diagonal(hd.Objective(net), [batch], **given).total)
            size = max(float(t.abs().max()) for t in both[0].values())
            assert both[0].keys() == both[1].keys()
            found[f"{name} {method}"] = max(
                float((both[1][k].cpu() - t).abs().max()) / size for k, t in both[0].items()
            )
    caught = [raises(call) for call in mistakes(torch.ones(3).to(NAME))]
    json.dump({"apart": found, "caught": caught}, sys.stdout)


if __name__ == "__main__":
    main()
