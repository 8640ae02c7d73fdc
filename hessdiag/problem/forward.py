"""One forward pass of a model that is not ours: inputs kept as they were, no hooks on gradients, torch's slips mended.

The inputs are copies, since a model may change them in place. Functions whose derivatives torch slips in, or whose
kernels hide what they do, are computed by others (see `mended`); hooks on gradients are not set. A model that switches
autocast on inside its own forward is refused: it would be measured as a function of bfloat16. Compiled models, and what
is compiled inside a model, run eagerly meanwhile: compiled code is no sequence of torch calls, so that neither would be
seen. Of scripted ones the operations are watched for what they round. Checkpointed parts keep what they compute: run
again from a backward pass, they would be torch's own. Attention runs by its formula, on every device: fused kernels
have no second derivative, and hide what bends in them.

Inputs may be a tensor, or tensors in tuples, lists, dictionaries and other mappings (a tokenizer's, `UserDict`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hessdiag.errors import UncoveredModelError
from hessdiag.problem.mended import MENDED

Call = Callable[[nn.Module, Any], Any]


def forward(
    model: nn.Module, inputs: Any, call: Call | None = None, *, mode: Callable[..., TorchFunctionMode] | None = None
) -> Any:
    """What the model gives for a copy of the inputs, called as `call` says; `mode` looks on as functions are mended."""
    watch = _Rounding() if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()) else None
    with ExitStack() as stack:
        if watch is not None:
            stack.enter_context(watch)
        stack.enter_context(twice_differentiable())
        stack.enter_context(as_written({p.device.type for p in model.parameters()}, mode))

        def run(derived: bool) -> Any:
            own = mapped(inputs, lambda x: x.detach().clone().requires_grad_(derived and x.is_floating_point()))
            return model(own) if call is None else call(model, own)

        try:
            out = run(False)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            out = _derived(run)
    if watch is not None and watch.seen:
        raise UncoveredModelError(AUTOCAST)
    return out


def _derived(run: Callable[[bool], Any]) -> Any:
    """Of a model whose outputs hold derivatives, in its inputs as a rule: equations of physics, forces."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        out = run(True)
    return out if recorded else mapped(out, lambda x: x.detach())


@contextmanager
def as_written(kinds: Iterable[str], mode: Callable[..., TorchFunctionMode] | None = None) -> Iterator[None]:
    """What is called in here runs call by call: nothing compiled, slips mended, autocast on these devices refused."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; not imported for this
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context((mode or Mending)(kinds))
        stack.enter_context(scripts_by_operation())
        stack.enter_context(_kept_in_full())
        yield


@contextmanager
def _kept_in_full() -> Iterator[None]:
    """Calls of torch.utils.checkpoint, of either variant, as calls of what they are given."""
    module: Any = torch.utils.checkpoint
    names = {"_checkpoint_without_reentrant_generator": _once, "CheckpointFunction": _Plain}
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, names[name])
        yield
    finally:
        for name, own in before.items():
            setattr(module, name, own)


def _once(*_: Any, **__: Any) -> Iterator[None]:
    """Nothing before what is checkpointed, nothing after it."""
    yield


class _Plain:
    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        """What is checkpointed, called."""
        return function(*args)


@contextmanager
def scripts_by_operation() -> Iterator[None]:
    """Scripted functions run operation by operation, too, rather than as one node that hides what bends in it."""
    jit: Any = torch.jit
    for function in jit._state._python_cu.get_functions():  # what was compiled before is kept otherwise
        function._debug_flush_compilation_cache()
    with jit.optimized_execution(False):
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


def mapped(inputs: Any, function: Callable[[Any], Any], *, of: type | tuple[type, ...] = Tensor) -> Any:
    """The same structure with every tensor, or whatever is `of` some types, replaced by `function` of it."""
    return _pytree.tree_map(lambda x: _leaf(x, function, of), inputs)


def leaves(inputs: Any) -> Iterator[Any]:
    """Everything in the structure that is no container."""
    for value in _pytree.tree_leaves(inputs):
        if isinstance(value, Mapping):
            yield from leaves(dict(value))
        else:
            yield value


def _leaf(value: Any, function: Callable[[Any], Any], of: type | tuple[type, ...]) -> Any:
    if isinstance(value, of):
        return function(value)
    if isinstance(value, MutableMapping):  # of a kind that torch does not look into
        out = copy.copy(value)
        for key in value:
            out[key] = mapped(value[key], function, of=of)
        return out
    return value


AUTOCAST = (
    "autocast is on where the model runs, which rounds to bfloat16 or float16, and no method here measures what is "
    "rounded: take torch.autocast out of the model's forward or the loss, or from around this call"
)


class Mending(TorchFunctionMode):
    """Mended functions in the places of torch's."""

    def __init__(self, kinds: Iterable[str]) -> None:
        super().__init__()
        self._kinds = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The mended function in the place of torch's; none under autocast."""
        if any(map(torch.is_autocast_enabled, self._kinds)):
            raise UncoveredModelError(AUTOCAST)
        mended, named = MENDED.get(func), dict(kwargs or {})
        if mended is None:
            return func(*args, **named)
        if not args and "input" in named:  # torch's name for what comes first
            args = (named.pop("input"),)
        return self.run(func, mended, args, named)

    def run(self, _func: Any, mended: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What takes the place of a call of torch's function."""
        return mended(*args, **named)


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


@contextmanager
def in_double() -> Iterator[None]:
    """What is given in double is computed in double: conversions to a shorter type and constants of one are lifted."""
    with InDouble(), _Lifted():  # type: ignore[no-untyped-call]
        yield


class _Lifted(TorchFunctionMode):
    """Tensors of a shorter type beside one in float64 are taken in float64: torch has no product of the two."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation on what is lifted, but for what it writes to."""
        named = dict(kwargs or {})
        if func is torch.autograd.grad:  # what it is asked for are nodes of a graph
            return func(*args, **named)
        if torch.float64 in {x.dtype for x in _pytree.tree_leaves((args, named)) if isinstance(x, Tensor)}:
            name = getattr(func, "__name__", "")
            writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name[:3] == "__i"
            kept = {"out": named.pop("out")} if "out" in named else {}
            args = (*args[:writes], *_pytree.tree_map(_lifted, args[writes:]))
            named = _pytree.tree_map(_lifted, named) | kept
        return func(*args, **named)


def _lifted(value: Any) -> Any:
    short = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return value.double() if short else value


class InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Conversions to a shorter type give float64: a model that computes its norms in float32 is audited in double."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation, its dtype lifted."""
        wanted = dict(kwargs or {})
        if func is torch.ops.aten.detach.default and not isinstance(args[0], Tensor):
            return torch.tensor(args[0], dtype=torch.float64)  # what a node saved of a Python number is unwrapped here
        if wanted.get("dtype") in (torch.float32, torch.float16, torch.bfloat16):
            wanted["dtype"] = torch.float64
        return func(*args, **wanted)
