"""RCT-AF on a GPU in one kernel each: the closed form makes ten temporaries, and a GPU waits for memory.

The formula of `coefficients` at one entry, written out as C++ for one (beta, order), compiled by torch where it runs
(`torch.cuda.jiterator`) with alpha as an argument: a sweep over alpha compiles once. Half
types are computed in float32 and rounded once. Where the compiler refuses, the closed form serves: a warning says so
once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hessdiag.activations.blocks import ordinary
from hessdiag.activations.coefficients import Polynomial, remainder
from hessdiag.activations.formula import TAIL, working_dtype

_refused: list[str] = []  # why a compiler did not take a kernel


def served(*tensors: Tensor) -> bool:
    """True for plain GPU tensors of one type outside every transform."""
    return not _refused and ordinary(*tensors, device="cuda") and len({t.dtype for t in tensors}) == 1


def value(x: Tensor, alpha: float, beta: int, order: int) -> Tensor | None:
    """The derivative of the given order at x; None where the compiler refused."""
    return _run([x], alpha, beta, order)


def product(g: Tensor, x: Tensor, alpha: float, beta: int, order: int) -> Tensor | None:
    """The derivative of the given order at x, times g, rounded once; None where the compiler refused."""
    return _run([x, g], alpha, beta, order)


def _run(tensors: list[Tensor], alpha: float, beta: int, order: int) -> Tensor | None:
    wide = working_dtype(tensors[0], alpha, beta + order) == torch.float64
    try:
        return kernel(beta, order, len(tensors) == 2, wide)(*tensors, alpha=alpha)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _recorded():
            raise
        _refused.append(str(error))
        reason = (str(error).splitlines() or ["no reason given"])[0]
        warnings.warn(f"RCT-AF runs unfused on this GPU, and slower: {reason}", stacklevel=2)
        return None


def _recorded() -> bool:
    """Whether a CUDA graph is being recorded: what fails then is no compiler."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def kernel(beta: int, order: int, times: bool, wide: bool) -> Callable[..., Tensor]:
    """What torch compiles of `source` when it is first called with a type."""
    made: Callable[..., Tensor] = torch.cuda.jiterator._create_jit_fn(source(beta, order, times, wide), alpha=1.0)
    return made


def source(beta: int, order: int, times: bool, wide: bool) -> str:
    """C++ of the derivative at x for a template type T (float for the half types), times g where that is asked for;
    with `wide` it is computed in double.
    """
    real = "double" if wide else "T"
    given = f"T x_given{', T g_given' if times else ''}, double alpha_given"
    result = "bent * g" if times else "bent"
    lines = [
        f"typedef {real} R;",
        "const R x = (R)x_given, alpha = (R)alpha_given, t = x * alpha;",
        *(["const R g = (R)g_given;"] if times else []),
        *_bent(beta, order),
        f"return (T)({result});",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return f"template <typename T> T rct_{beta}_{order}{'_times' if times else ''}({given}) {{\n{body}\n}}"


def _bent(beta: int, order: int) -> list[str]:
    """Statements that end in a constant `bent`, the derivative."""
    if beta == 0 and order == 0:
        return ["const R bent = (x > (R)0 ? x : (R)0) + log1p(exp(t > (R)0 ? -t : t)) / alpha;"]
    lines = ["const R s = (R)1 / ((R)1 + exp(-t));"]
    polynomials = remainder(beta, order)
    if not any(polynomials):
        return [*lines, f"const R bent = {'x * s' if order == 0 else 's'};"]
    lines.append("const R v = s / ((R)1 + exp(t));")
    if any(c and (power + order) % 2 for power, c in enumerate(polynomials)):
        lines.append("const R u = -tanh(t / (R)2);")
    far = f"(sizeof(R) > 4 ? (R){TAIL[torch.float64]} : (R){TAIL[torch.float32]})"
    lines += [f"const R far = {far};", "const R near = t > far ? far : (t < -far ? -far : t);"]
    total = ""
    for power in range(len(polynomials) - 1, 0 if order == 0 else -1, -1):  # Horner's rule in t
        part = _polynomial(polynomials[power])
        if (power + order) % 2 and polynomials[power]:
            part = f"{part} * u"
        total = f"(({total}) * near + {part})" if total else part
    if order == 0:  # one power of t is the factor x
        return [*lines, f"const R bent = x * (s + v * ({total}));"]
    if order == 1:
        return [*lines, f"const R bent = s + v * ({total});"]
    scale = " * ".join(["alpha"] * (order - 1))
    return [*lines, f"const R bent = v * ({total}) * {scale};"]


def _polynomial(coefficients: Polynomial) -> str:
    """Horner's rule in v."""
    total = ""
    for c in reversed(coefficients):
        total = f"({total} * v + (R){c})" if total else f"(R){c}"
    return total or "(R)0"
