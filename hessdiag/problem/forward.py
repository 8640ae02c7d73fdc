"""One forward pass of a model that is not ours: inputs kept as they were, no hooks on gradients, torch's slips mended.

The inputs are copies, since a model may change them in place. A hook on a gradient changes what autograd shows, not
the loss, and is not set; nor are an embedding's `scale_grad_by_freq` and `sparse`. Three of torch's derivatives are
mended, by the same function in operations that have both: hardsigmoid has no second derivative and keeps 1/6 in
float32, CELU keeps 1/alpha in float32 (both of 2.13, 3e-8 off in float64), and bags of embeddings have no second
derivative. A model that switches autocast on inside its own forward is refused: it would be measured as a function of
bfloat16. Compiled models, and what is compiled inside a model, run eagerly meanwhile: compiled code is no sequence of
torch calls, so that neither would be seen. Of scripted ones the operations are watched for what they round. Attention
runs by its formula, on every device: fused kernels have no second derivative, and hide what bends in them.

Inputs may be a tensor, or tensors in tuples, lists, dictionaries and other mappings (a tokenizer's, `UserDict`).
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from hessdiag.errors import UncoveredModelError


def forward(model: nn.Module, inputs: Any, call: Callable[[nn.Module, Any], Any] | None = None) -> Any:
    """What the model gives for a copy of the inputs, called as `call` says."""
    watch = _Rounding() if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()) else None
    with ExitStack() as stack:
        if watch is not None:
            stack.enter_context(watch)
        stack.enter_context(twice_differentiable())
        stack.enter_context(as_written({p.device.type for p in model.parameters()}))
        own = mapped(inputs, lambda x: x.detach().clone())
        out = model(own) if call is None else call(model, own)
    if watch is not None and watch.seen:
        raise UncoveredModelError(AUTOCAST)
    return out


@contextmanager
def as_written(kinds: Iterable[str]) -> Iterator[None]:
    """What is called in here runs call by call: nothing compiled, slips mended, autocast on these devices refused."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; not imported for this
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Mending(kinds))
        yield


def twice_differentiable() -> AbstractContextManager[Any]:
    """Attention by its formula, on every device: the fused kernels have no second derivative and hide what bends."""
    return sdpa_kernel(SDPBackend.MATH)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper: a compiled one shows no graph of torch calls. Parameters are shared."""
    compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())  # not imported for this
    while isinstance(model, compiled):
        model = model._orig_mod
    return model


def mapped(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor replaced by `function` of it."""
    return _pytree.tree_map(lambda x: _leaf(x, function), inputs)


def leaves(inputs: Any) -> Iterator[Any]:
    """Everything in the structure that is no container."""
    for value in _pytree.tree_leaves(inputs):
        if isinstance(value, Mapping):
            yield from leaves(dict(value))
        else:
            yield value


def _leaf(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, MutableMapping):  # of a kind that torch does not look into
        out = copy.copy(value)
        for key in value:
            out[key] = mapped(value[key], function)
        return out
    return value


def _celu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    function = torch.ops.aten.elu_ if inplace else torch.ops.aten.elu
    out: Tensor = function(x, alpha, 1.0, 1.0 / alpha)
    return out


def _celu_(x: Tensor, alpha: float = 1.0) -> Tensor:
    return _celu(x, alpha, True)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(x.add_(3.0), inplace=True).div_(6.0) if inplace else F.relu6(x + 3.0) / 6.0


def _hardsigmoid_(x: Tensor) -> Tensor:
    return _hardsigmoid(x, True)


MAX_NORM = (
    "an embedding with max_norm shortens rows of its table when they are looked up; some of these stand at the bound, "
    "where the loss has a kink that no gradient shows; shorten them once and set max_norm=None, or freeze the table"
)


def _below(weight: Tensor, numbers: Tensor, bound: float | None, order: float) -> None:
    """Refuse a table that is changed by being looked at."""
    if bound is not None:
        with torch.no_grad():
            norms = torch.linalg.vector_norm(weight[torch.unique(numbers)], order, 1)
            if bool((norms >= bound * (1 - 1e-6)).any()):
                raise UncoveredModelError(MAX_NORM)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _below(weight, input, max_norm, norm_type)
    return F.embedding(input, weight, padding_idx)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags as rows of one length, what is missing or padding weighted by zero."""
    _below(weight, input, max_norm, norm_type)
    factors = per_sample_weights
    if input.ndim == 1:
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        starts = offsets[:-1] if include_last_offset else offsets
        places = torch.arange(max(int((ends - starts).max()), 1), device=input.device)
        there = starts[:, None] + places < ends[:, None]
        where = torch.where(there, starts[:, None] + places, 0)
        numbers = input[where]
        factors = None if factors is None else factors[where]
    else:
        numbers, there = input, torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        there = there & (numbers != padding_idx % len(weight))
    rows = F.embedding(torch.where(there, numbers, 0), weight)
    if mode == "max":
        picked = rows.masked_fill(~there[:, :, None], -torch.inf).max(1).values
        return picked.masked_fill(~there.any(1, keepdim=True), 0.0)
    kept = there.to(rows.dtype)
    if mode == "mean":
        kept = kept / kept.sum(1, keepdim=True).clamp(min=1.0)
    rows = rows * kept[:, :, None]
    return (rows if factors is None else rows * factors[:, :, None]).sum(1)


def _no_hook(*_: Any) -> RemovableHandle:
    return RemovableHandle(OrderedDict())


AUTOCAST = (
    "autocast is on where the model runs, which rounds to bfloat16 or float16, and no method here measures what is "
    "rounded: take torch.autocast out of the model's forward or the loss, or from around this call"
)

_MENDED: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.celu: _celu,
    torch.celu: _celu,
    torch.celu_: _celu_,
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: _hardsigmoid_,
    Tensor.register_hook: _no_hook,
}


class _Mending(TorchFunctionMode):
    def __init__(self, kinds: Iterable[str]) -> None:
        super().__init__()
        self._kinds = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The mended function in the place of torch's; none under autocast."""
        if any(map(torch.is_autocast_enabled, self._kinds)):
            raise UncoveredModelError(AUTOCAST)
        return _MENDED.get(func, func)(*args, **(kwargs or {}))


class _Rounding(TorchDispatchMode):
    """Whether anything was rounded to half a float: autocast in a script is no call of Python that could be seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation, its result looked at."""
        out = func(*args, **(kwargs or {}))
        halves = (torch.float16, torch.bfloat16)
        self.seen |= any(isinstance(x, Tensor) and x.dtype in halves for x in _pytree.tree_leaves(out))
        return out


class InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Conversions to a shorter type give float64: a model that computes its norms in float32 is audited in double."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation, its dtype lifted."""
        wanted = dict(kwargs or {})
        if wanted.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            wanted["dtype"] = torch.float64
        return func(*args, **wanted)
