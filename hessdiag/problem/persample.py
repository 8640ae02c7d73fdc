"""A loss per sample: what a measurement needs to know of it, and any callable as one; all in float64.

For one sample with outputs f and loss l(f) the measurement needs the value l, the gradient dl/df and a
factor of the output Hessian: columns s with signs e such that  d2l/df2 = sum_c e_c s_c s_c^T. Where the columns have a
closed form they are never a C x C square: what is needed are sums of them and products with them.
Everything is computed in float64 from the outputs: in float32 the softmax of a well-fitted sample has lost
the digits of p - 1 that the gradient consists of.

Every loss here is *a sum over samples divided by a weight that is known only when all data were seen*
(the number of samples; of sequences the number of their tokens that count; for class weights the sum of the
weights of the targets). The weight of each sample is returned beside its loss, and the division is left to whoever
sums. A mean over a population is then E[loss of a sample] / E[its weight]: per token, not per sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError, HessdiagError, NonFiniteError, UncoveredModelError, ran_out
from hessdiag.problem.forward import as_written

PerSample = Callable[[Tensor, Tensor], Tensor]


class Columns:
    """The columns s_c of a factor of the C x C output Hessians, [columns, N, C], used without being written out.

    Written out they are a C x C square per sample: 80 GB for one sample of 100,000 classes.
    """

    count: int
    apart: bool = False
    """Whether outputs at different places (tokens, pixels) are known to have no mixed derivative."""
    places: tuple[int, ...] = ()
    """Those of one place may: (classes,) where these stand last, (classes, pixels) where they stand first."""

    def diagonal(self) -> Tensor:
        """sum_c s_c^2, [N, C]: the Hessian's own diagonal where all signs are positive."""
        raise NotImplementedError

    def part(self, low: int, high: int) -> Tensor:
        """Columns low..high-1, [high - low, N, C]."""
        raise NotImplementedError

    def combined(self, weights: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """sum_c w_cn s_cn, [N, C], for weights [columns, N]: computed in float64, given in `dtype`."""
        raise NotImplementedError

    def against(self, vectors: Tensor) -> Tensor:
        """<s_cn, v_n>, [columns, N], for vectors [N, C]."""
        raise NotImplementedError


class Written(Columns):
    """Columns that are there as a tensor."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self.count = len(factor)

    def part(self, low: int, high: int) -> Tensor:
        """A slice of the tensor."""
        return self.factor[low:high]

    def combined(self, weights: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The sum as it stands."""
        return (self.factor * weights[:, :, None]).sum(0).to(dtype)

    def against(self, vectors: Tensor) -> Tensor:
        """The products as they stand."""
        return (self.factor * vectors[None]).sum(2)


class Diagonals(Columns):
    """One column per output, with one entry: for a Hessian diag(root^2), root [N, C]."""

    apart, places = True, (1,)

    def __init__(self, root: Tensor) -> None:
        self.root = root
        self.count = root.shape[1]

    def diagonal(self) -> Tensor:
        """root^2."""
        return self.root.square()

    def part(self, low: int, high: int) -> Tensor:
        """root_nc e_c."""
        out = self.root.new_zeros(high - low, *self.root.shape)
        rows = torch.arange(high - low, device=out.device)
        out[rows, :, rows + low] = self.root[:, low:high].T
        return out

    def combined(self, weights: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """root w."""
        return (self.root * weights.T).to(dtype)

    def against(self, vectors: Tensor) -> Tensor:
        """root v."""
        return (self.root * vectors).T


class Curvature:
    """What the loss looks like at the outputs of one batch: `columns` of its Hessian's factor, `signs` [columns].

    d2l_n/df2 = sum_c signs[c] s_cn s_cn^T, for the loss *summed* over samples.
    """

    def __init__(self, loss: Tensor, gradient: Tensor, columns: Columns, signs: Tensor) -> None:
        self.loss, self._gradient = loss, gradient
        self._factor = columns, signs

    @property
    def gradient(self) -> Tensor:
        """dl/df, [N, C]."""
        return self._gradient

    def gradient_in(self, dtype: torch.dtype) -> Tensor:
        """The same, computed in float64 and given in `dtype`."""
        return self.gradient.to(dtype)

    @property
    def columns(self) -> Columns:
        """The columns s_c."""
        return self._factor[0]

    @property
    def signs(self) -> Tensor:
        """The signs e_c, [columns]."""
        return self._factor[1]

    @property
    def factor(self) -> Tensor:
        """All columns written out, [columns, N, C]."""
        return self.columns.part(0, self.columns.count)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Columns [k, N, C] with their signs [k], as many at a time as may be written out."""
        step = max(WRITTEN // max(self.gradient.numel(), 1), 1)
        for low in range(0, self.columns.count, step):
            high = min(low + step, self.columns.count)
            yield self.columns.part(low, high), self.signs[low:high]

    def each(self) -> Iterator[tuple[Tensor, float]]:
        """One column [N, C] with its sign after the other."""
        for columns, signs in self.blocks():
            yield from zip(columns, signs.tolist())

    def some(self, count: int) -> Tensor:
        """A few vectors [k, N, C] of the Hessians' range, as many as there are or `count`."""
        return self.columns.part(0, min(count, self.columns.count))

    def times(self, vectors: Tensor) -> Tensor:
        """d2l_n/df2 v_n, [N, C]."""
        return self.columns.combined(self.columns.against(vectors) * self.signs[:, None])


WRITTEN = 1 << 22
"""Entries of columns written out at a time."""
SQUARES = 1 << 30
"""Bytes that the C x C squares of one batch may take, where a loss has no closed form."""


class Loss:
    """One named loss: value, gradient and Hessian factor per sample."""

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """What it was told beside its name, as plain values; what was left as it comes is not among it."""
        return {}

    def by_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The outputs with the samples as first axis, where a model has folded their places into it."""
        return outputs

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise TargetError if the targets do not fit the outputs."""

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss per sample [N], differentiable, in the dtype of the outputs."""
        raise NotImplementedError

    def in_double(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(outputs in float64, loss per sample in that dtype)."""
        f = outputs.double()
        return f, self.values(f, targets)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What each sample adds to the divisor of the mean: 1 unless places or classes are counted."""
        return torch.ones(len(targets), dtype=torch.float64, device=outputs.device)

    def classified(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """(classes that targets name, those that outputs name) of all places that count; None where these are none."""
        if targets.is_floating_point() or targets.ndim != 1 or outputs.ndim != 2:
            return None
        return targets, outputs.argmax(1)

    def counted(self, targets: Tensor) -> Tensor:
        """Whether a sample has a loss at all, [N]: one whose targets are all ignored has none, and no weight."""
        return torch.ones(len(targets), dtype=torch.bool, device=targets.device)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Loss, gradient and Hessian factor at `outputs`, in float64 and shaped [N, C]."""
        raise NotImplementedError


class CallableLoss(Loss):
    """Any twice-differentiable `function(outputs, targets) -> loss per sample [N]`, by autograd (see `ByProducts`)."""

    def __init__(self, function: PerSample) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The function itself, its shape checked."""
        try:
            with as_written({outputs.device.type}):
                loss = self.function(outputs, targets)
        except HessdiagError:
            raise
        except Exception as error:
            if ran_out(error):
                raise
            text = (str(error).splitlines() or [""])[0]
            raise ConfigurationError(f"loss {self.name!r} raised {type(error).__name__}: {text}") from error
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise ConfigurationError(f"loss {self.name!r} must return a real tensor, one value per sample")
        if loss.shape != (len(outputs),):
            raise ConfigurationError(
                f"loss {self.name!r} must return one value per sample, shape [{len(outputs)}], not {list(loss.shape)}; "
                + _one_each(loss, len(outputs))
            )
        return loss

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Value and gradient by autograd, whose graph serves products with the Hessian."""
        with torch.enable_grad():
            f, loss = self.in_double(outputs.detach().requires_grad_(True), targets)
            if not loss.requires_grad:
                raise ConfigurationError(
                    f"loss {self.name!r} does not depend differentiably on the outputs (is it detached?)"
                )
            with self._twice():
                (gradient,) = torch.autograd.grad(loss.sum(), f, create_graph=True)
            return ByProducts(self, loss, f, gradient)

    @contextmanager
    def _twice(self) -> Iterator[None]:
        """Refuse a function that torch cannot differentiate twice."""
        try:
            yield
        except RuntimeError as error:
            if ran_out(error):
                raise
            raise UncoveredModelError(
                f"the loss {self.name!r} has no second derivative in torch ({str(error).splitlines()[0]}); write "
                "it in operations that have one; no method here measures it"
            ) from error

    def in_double(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the outputs' own dtype where the function holds tensors that insist on it."""
        f = outputs.double()
        try:
            return f, self.values(f, targets.double() if targets.is_floating_point() else targets)
        except ConfigurationError as error:
            if outputs.dtype == torch.float64 or not isinstance(error.__cause__, RuntimeError):
                raise
        return outputs, self.values(outputs, targets)


def _one_each(loss: Tensor, samples: int) -> str:
    """How a loss of another shape becomes one value per sample."""
    if loss.ndim == 0 or len(loss) % samples:
        return "use reduction='none'"
    if len(loss) > samples:
        return (
            f"of a sample's {len(loss) // samples} places take the mean, .reshape(len(outputs), -1).mean(1), or the sum"
        )
    mean = ".mean(1)" if loss.ndim == 2 else ".flatten(1).mean(1)"
    return f"of several values a sample take the mean, {mean}, or the sum"


class ByProducts(Curvature):
    """Of a loss without a closed form: products with its Hessian by autograd, N C numbers each.

    Only who asks for columns has the C x C Hessian of each sample written out, by C products, and eigen-decomposed:
    columns of negative eigenvalue carry sign -1, so every column index has one sign for all samples: 2C columns, the
    first C with the positive parts, the last C with the negative, where there are any.
    """

    def __init__(self, of: CallableLoss, loss: Tensor, f: Tensor, gradient: Tensor) -> None:
        self._of, self._f, self._slope = of, f, as_rows(gradient)
        self.loss, self._gradient = loss.detach().double(), self._slope.detach().double()

    def times(self, vectors: Tensor) -> Tensor:
        """d2l_n/df2 v_n as the derivative of <gradient, v>."""
        if not self._slope.requires_grad:
            return torch.zeros_like(self.gradient)
        with self._of._twice():
            along = vectors.to(self._slope.dtype)
            (found,) = torch.autograd.grad(self._slope, self._f, along, retain_graph=True, allow_unused=True)
        out = torch.zeros_like(self.gradient) if found is None else as_rows(found).detach().double()
        if not bool(torch.isfinite(out).all()):
            raise NonFiniteError(f"the loss {self._of.name!r} has a second derivative that is NaN or Inf")
        return out

    def some(self, count: int) -> Tensor:
        """The first columns of the Hessians themselves."""
        return torch.stack([self.times(unit) for unit in self._units(min(count, self.gradient.shape[1]))])

    def _units(self, count: int) -> Iterator[Tensor]:
        for c in range(count):
            unit = torch.zeros_like(self.gradient)
            unit[:, c] = 1.0
            yield unit

    @cached_property
    def _factor(self) -> tuple[Columns, Tensor]:  # type: ignore[override]
        samples, classes = self.gradient.shape
        each = 8 * classes**2
        if samples * each > SQUARES:
            fit = SQUARES // each
            advice = f"lower the batch size to {fit}" if fit else "name a loss (cross_entropy, mse, half_mse, bce)"
            raise UncoveredModelError(
                f"the loss {self._of.name!r} has no closed form, and its second derivatives in {classes} outputs take "
                f"{samples * each / 1e9:.1f} GB for {samples} samples; {advice}, or use method='hutchinson', which "
                "does not need them written out"
            )
        hessian = self.gradient.new_empty(samples, classes, classes)
        for c, unit in enumerate(self._units(classes)):
            hessian[:, :, c] = self.times(unit)
        values = self.gradient.new_empty(samples, classes)
        step = max(WRITTEN // classes**2, 1)
        for low in range(0, samples, step):  # the square of a sample gives way to its vectors
            part = hessian[low : low + step]
            values[low : low + step], part[:] = torch.linalg.eigh(0.5 * (part + part.transpose(1, 2)))
        hessian *= values.abs().sqrt()[:, None, :]
        vectors, signs = hessian.permute(2, 0, 1), self.gradient.new_ones(classes)
        negative = (values < 0).T[:, :, None]
        if not bool(negative.any()):
            return Written(vectors.contiguous()), signs
        factor = torch.cat([vectors.masked_fill(negative, 0.0), vectors.masked_fill(~negative, 0.0)])
        return Written(factor), torch.cat([signs, -signs])


def as_rows(tensor: Tensor) -> Tensor:
    """[N, C] from [N] or [N, ...]."""
    return tensor[:, None] if tensor.ndim == 1 else tensor.flatten(1)
