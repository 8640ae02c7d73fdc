"""The losses known by name, with closed forms of their gradient and their Hessian's factor (see `persample`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.errors import ConfigurationError, TargetError, UnknownNameError, nearest
from hessdiag.problem.persample import WRITTEN, CallableLoss, Columns, Curvature, Diagonals, Loss, PerSample, as_rows
from hessdiag.store.states import digest

IGNORE = -100
"""torch's own ignore_index."""
TOLD = 32
"""Class weights that a result names one by one."""


class CrossEntropy(Loss):
    """Softmax cross-entropy -sum_k q_k log p_k: class weights, label smoothing and ignored targets as torch has them.

    A sample has one place, outputs [N, C], or several: a sequence [N, T, C] with targets [N, T], or with the classes
    first, as in images, [N, C, ...] with targets [N, ...]. Places of one sample interact in the model, so the sample is
    the whole sequence, its loss the sum over places, and what it adds to the divisor the number of places that are not
    ignored (the class weights of their targets): over all data the mean per place, as torch has it for one batch.
    `shift` compares what stands at place t with the target at t + shift: outputs[:, :-shift] with targets[:, shift:].

    With any targets q the Hessian of a place is (sum_k q_k)(diag p - p p^T) = S S^T, S = diag(sqrt p) - p sqrt(p)^T, of
    rank C - 1: its null direction sqrt(p) is turned onto the last axis by a Householder reflection and dropped.
    """

    name = "cross_entropy"

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        ignore_index: int = IGNORE,
        class_axis: int | None = None,
        shift: int = 0,
    ) -> None:
        if not 0.0 <= label_smoothing <= 1.0:
            raise ConfigurationError(f"label_smoothing must lie in [0, 1], not {label_smoothing}")
        if class_weights is not None and (class_weights.ndim != 1 or not bool((class_weights >= 0).all())):
            raise ConfigurationError("class_weights must be one non-negative number per class")
        if class_axis not in (None, 1, -1):
            raise ConfigurationError(f"class_axis is 1 ([N, C, ...]) or -1 ([N, ..., C]), not {class_axis!r}")
        if not isinstance(shift, int) or isinstance(shift, bool) or shift < 0:
            raise ConfigurationError(f"shift must be a whole number >= 0, not {shift!r}")
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.ignore_index, self.class_axis, self.shift = ignore_index, class_axis, shift

    @property
    def options(self) -> dict[str, Any]:
        """Whatever makes it another loss; of many class weights their number and a hash."""
        found: dict[str, Any] = {}
        if self.label_smoothing:
            found["label_smoothing"] = float(self.label_smoothing)
        if self.class_weights is not None:
            weights = self.class_weights.double()
            few = len(weights) <= TOLD
            found["class_weights"] = (
                weights.tolist() if few else f"{len(weights)} numbers, sha256 {digest(weights)[:12]}"
            )
        if self.ignore_index != IGNORE:
            found["ignore_index"] = int(self.ignore_index)
        if self.class_axis is not None:
            found["class_axis"] = int(self.class_axis)
        if self.shift:
            found["shift"] = self.shift
        return found

    def by_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[N, T, C] where a model returns the places of all samples as rows, [N T, C], for targets [N, T]."""
        rows = outputs.ndim == 2 and targets.ndim > 1 and not targets.is_floating_point()
        folded = rows and len(targets) < len(outputs) == targets.numel()
        return outputs.reshape(*targets.shape, -1) if folded else outputs

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets are class indices, in 0..C-1 or ignored, one per place; or probabilities shaped like the outputs."""
        if outputs.ndim < 2:
            raise TargetError(
                f"cross_entropy needs outputs of shape [N, C] or [N, T, C], the model gave {list(outputs.shape)}; "
                "let it return one column per class, or pass loss=callable"
            )
        if targets.is_floating_point():
            if targets.ndim == 1 and len(targets) == len(outputs) and bool((targets == targets.round()).all()):
                raise TargetError(
                    f"targets are whole numbers stored as {targets.dtype}: if they are classes, give targets.long() "
                    "(in a file: store int64); for regression say loss='mse' (--loss mse)"
                )
            if targets.shape != outputs.shape:
                raise TargetError(
                    f"probability targets must have the outputs' shape {list(outputs.shape)}, not {list(targets.shape)}"
                )
            if bool((targets < 0).any()):
                raise TargetError("probability targets must not be negative")
            if self.shift:
                raise ConfigurationError("shift is for targets that are class indices")
        elif targets.dtype == torch.bool or targets.is_complex():
            raise TargetError(f"class targets must be integers, not {targets.dtype}")
        classes = outputs.shape[self._axis(outputs.shape, targets)]
        if classes == 1:
            raise TargetError(
                f"outputs {list(outputs.shape)} have one class, whose cross-entropy is zero whatever the model; of one "
                "logit say loss='bce' (--loss bce)"
            )
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ConfigurationError(f"{len(self.class_weights)} class weights for {classes} outputs")
        if targets.is_floating_point():
            return
        if self.shift and (targets.ndim != 2 or targets.shape[1] <= self.shift):
            raise TargetError(
                f"shift={self.shift} needs targets [N, T] with T > {self.shift}, not {list(targets.shape)}"
            )
        ends = [int(end) for end in targets.aminmax()] if targets.numel() else [0]
        if ends[0] >= 0 and ends[-1] < classes:
            return
        wrong = targets[((targets < 0) | (targets >= classes)) & (targets != self.ignore_index)]
        if len(wrong):
            counted = int(wrong.max()) == classes and bool((wrong == classes).all()) and int(targets.min()) > 0
            raise TargetError(
                f"target {int(wrong[0])} is out of range: the model has {classes} outputs (0 to {classes - 1}); "
                + ("do the classes count from 1? take 1 off; " if counted else "")
                + f"only ignore_index={self.ignore_index} may lie outside"
            )

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-sum_k q_k log softmax(f)_k, summed over the places of a sample."""
        log_p = F.log_softmax(self._places(outputs, targets), -1)
        if targets.is_floating_point():
            return -(self._probabilities(outputs, targets) * log_p).sum((1, 2))
        numbers, kept = self._numbers(targets, log_p.dtype)
        scale = self._class_weights(log_p)
        here = kept if scale is None else kept * scale[numbers]
        loss = -(1 - self.label_smoothing) * here * log_p.gather(-1, numbers[..., None])[..., 0]
        if self.label_smoothing:
            smooth = log_p.sum(-1) if scale is None else log_p @ scale
            loss = loss - self.label_smoothing / log_p.shape[-1] * kept * smooth
        return loss.sum(1)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Places that are not ignored, or the weights of their classes, as torch divides by them."""
        if targets.is_floating_point():
            places = targets.numel() // max(len(targets) * targets.shape[self._axis(targets.shape, targets)], 1)
            return super().weights(outputs, targets) * places
        numbers, kept = self._numbers(targets, torch.float64)
        weight = self._class_weights(kept)
        return (kept if weight is None else kept * weight[numbers]).sum(1).to(outputs.device)

    def classified(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Shifted, and without what is ignored."""
        if targets.is_floating_point():
            return None
        numbers, kept = self._numbers(targets, torch.float64)
        counts = kept > 0
        return numbers[counts], self._places(outputs, targets).argmax(-1)[counts]

    def counted(self, targets: Tensor) -> Tensor:
        """Those with a place that is not ignored; a class of weight zero counts where smoothing gives it a loss."""
        if targets.is_floating_point():
            return super().counted(targets)
        if self.label_smoothing:
            return self._numbers(targets, torch.float64)[1].any(1)
        return self.weights(targets, targets) > 0

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Closed form; C - 1 columns a place, all of positive sign."""
        first = outputs.ndim > 2 and self._axis(outputs.shape, targets) == 1
        columns = SoftmaxColumns(self._places(outputs.detach(), targets), first=first)
        if targets.is_floating_point():
            q = self._probabilities(outputs.detach().double(), targets)
            loss = -(q * columns.log_p()).sum((1, 2))
            return SoftmaxCurvature(loss, columns, q.sum(-1, keepdim=True), rest=q)
        numbers, kept = self._numbers(targets, torch.float64)
        scale = self._class_weights(columns.size)
        one, smooth = 1 - self.label_smoothing, self.label_smoothing / columns.f.shape[-1]
        here = one * (kept if scale is None else kept * scale[numbers])
        loss, mass, rest = -(here * columns.log_p_at(numbers)).sum(1), here[..., None], None
        if smooth:
            rest = smooth * kept[..., None] * (columns.size.new_ones(columns.f.shape[-1]) if scale is None else scale)
            loss, mass = loss - (rest * columns.log_p()).sum((1, 2)), mass + rest.sum(-1, keepdim=True)
        return SoftmaxCurvature(loss, columns, mass, here=(numbers, here), rest=rest)

    # -- places and classes

    def _axis(self, shape: torch.Size, targets: Tensor) -> int:
        """Where the classes are; refused where the shapes leave it open."""
        if len(shape) == 2 or self.class_axis == 1:
            axis = 1
        elif self.class_axis == -1:
            axis = len(shape) - 1
        else:
            ends = [axis for axis in (1, len(shape) - 1) if shape[:axis] + shape[axis + 1 :] == targets.shape]
            if targets.is_floating_point() or len(ends) == 2:
                raise TargetError(
                    f"outputs {list(shape)} with targets {list(targets.shape)} may have their classes first or "
                    "last; say Objective(..., class_axis=-1) for [N, T, C], class_axis=1 for [N, C, T]"
                )
            axis = ends[0] if ends else len(shape) - 1
        wanted = shape if targets.is_floating_point() else shape[:axis] + shape[axis + 1 :]
        if targets.shape != wanted:
            raise TargetError(
                f"class targets for outputs of shape {list(shape)} must have shape {list(wanted)}, "
                f"not {list(targets.shape)}{_many(targets) if targets.shape == shape else ''}"
            )
        return axis

    def _places(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[N, places, C]."""
        if outputs.ndim == 2:
            return outputs[:, None]
        moved = outputs.movedim(self._axis(outputs.shape, targets), -1)
        return moved.reshape(len(outputs), -1, moved.shape[-1])

    def _numbers(self, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(class of every place, 0 where it is ignored; 1 where it counts, else 0), [N, places]."""
        numbers = targets.long()
        if self.shift:
            ended = torch.full_like(numbers[:, : self.shift], self.ignore_index)
            numbers = torch.cat([numbers[:, self.shift :], ended], 1)
        numbers = numbers.reshape(len(numbers), -1)
        kept = numbers != self.ignore_index
        return numbers * kept, kept.to(dtype)

    def _probabilities(self, like: Tensor, targets: Tensor) -> Tensor:
        """Targets [N, places, C], smoothed and weighted."""
        soft = self._places(targets.to(like.dtype), targets) * (1 - self.label_smoothing)
        soft = soft + self.label_smoothing / soft.shape[-1]
        weight = self._class_weights(soft)
        return soft if weight is None else soft * weight

    def _class_weights(self, like: Tensor) -> Tensor | None:
        return None if self.class_weights is None else self.class_weights.to(like)


class SoftmaxColumns(Columns):
    """S R without its last column, times `scale`, at every place: S = diag(sqrt p) - p sqrt(p)^T, R = I - 2 a a^T the
    reflection that turns S's null direction sqrt(p) onto the last axis (a along sqrt(p) + e_C).

    Both are a diagonal and a product of two vectors, so that sums and products cost N C a place and no square is
    written: S a = sqrt(p_C) (e_C - p) / |sqrt(p) + e_C|. Columns go place by place. Of N places C numbers nothing is
    kept but the outputs themselves, [N, places, C] as the model gives them: log p is f less its largest and less the
    logarithm of a sum. `scale` is [N, places, 1], `first` says that the outputs have their classes before the places.
    """

    apart = True

    def __init__(self, f: Tensor, *, first: bool = False) -> None:
        self.f, self.first = f, first
        self.scale = torch.ones((), dtype=torch.float64, device=f.device)
        self.places = (f.shape[2], f.shape[1]) if first else (f.shape[2],)
        self._each = f.shape[2] - 1
        self.count = f.shape[1] * self._each
        self.step = max(WRITTEN // max(f[0].numel(), 1), 1) if len(f) else 1
        self.top = f.amax(-1, keepdim=True).double()
        sums = [
            (part.double() - top).exp_().sum(-1, keepdim=True)
            for part, top in zip(torch.split(f, self.step), torch.split(self.top, self.step))
        ]
        self.size = torch.cat(sums).log_()
        self._last = (0.5 * (f[..., -1:].double() - self.top - self.size)).exp()
        self._length = (2.0 * (1.0 + self._last)).sqrt()

    def log_p(self, here: tuple[slice, slice] = (slice(None), slice(None))) -> Tensor:
        """Of some samples and places."""
        return (self.f[here].double() - self.top[here]).sub_(self.size[here])

    def log_p_at(self, numbers: Tensor) -> Tensor:
        """Of one class at every place."""
        return (self.f.gather(-1, numbers[..., None]).double() - self.top - self.size)[..., 0]

    def flat(self, values: Tensor) -> Tensor:
        """[..., places, C] in the order of the outputs, [..., their number]."""
        return (values.transpose(-1, -2) if self.first else values).flatten(-2)

    def diagonal(self) -> Tensor:
        """scale^2 p (1 - p)."""
        log_p = self.log_p()
        return self.flat(torch.expm1(log_p).neg_().mul_(log_p.exp_()).mul_(self.scale.square()))

    def part(self, low: int, high: int) -> Tensor:
        """S (e_c - 2 a_c a)."""
        columns = torch.arange(low, high, device=self.f.device)
        place, c = columns // max(self._each, 1), columns % max(self._each, 1)
        rows = torch.arange(len(columns), device=columns.device)
        f, top, size, last, length = (
            x.transpose(0, 1)[place] for x in (self.f, self.top, self.size, self._last, self._length)
        )
        log_p = (f.double() - top).sub_(size)  # [k, N, C]
        root = (0.5 * log_p[rows, :, c]).exp()[..., None]
        scale = self.scale.expand_as(self.top).transpose(0, 1)[place]
        turned = -2.0 * root / length**2 * last  # S a is last / length (e_C - p), a_c is root / length
        value = log_p.exp().mul_(-root - turned)
        value[rows, :, c] += root[..., 0]
        value[..., -1] += turned[..., 0]
        out = value.new_zeros(len(columns), *self.f.shape)
        out[rows, :, place] = value.mul_(scale)
        return self.flat(out)

    def combined(self, weights: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """S R w."""
        found = torch.empty(self.f.shape, dtype=dtype, device=self.f.device)
        drawn = weights.T.reshape(len(found), self.f.shape[1], self._each)
        scale = self.scale.expand_as(self.top)
        for here in self.blocks():
            last, length = self._last[here], self._length[here]
            root = self.log_p(here).mul_(0.5).exp_()
            out = torch.zeros_like(root)  # w_C is 0
            torch.mul(root[..., :-1], drawn[here], out=out[..., :-1])
            inner = out.sum(-1, keepdim=True)  # sqrt(p).w
            turned = -2.0 * inner / length**2 * last
            out -= root.square_().mul_(inner + turned)
            out[..., -1:] += turned
            found[here] = out.mul_(scale[here])
        return self.flat(found)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Samples and places that are worked on at a time."""
        samples, places, classes = self.f.shape
        few = min(max(WRITTEN // max(classes, 1), 1), max(places, 1))
        for low in range(0, samples, self.step):
            for first in range(0, places, few if self.step == 1 else max(places, 1)):
                yield slice(low, low + self.step), slice(first, first + few if self.step == 1 else places)

    def against(self, vectors: Tensor) -> Tensor:
        """R S^T v without its last entry."""
        n, places, classes = self.f.shape
        v = vectors.reshape(n, classes, places).transpose(1, 2) if self.first else vectors.reshape(n, places, classes)
        log_p = self.log_p()
        root = (0.5 * log_p).exp()
        u = root * (v - (log_p.exp() * v).sum(-1, keepdim=True))
        along = ((u * root).sum(-1, keepdim=True) + u[..., -1:]) / self._length**2
        u = (u - 2.0 * along * root)[..., :-1]
        return (self.scale * u).flatten(1).T


class SoftmaxCurvature(Curvature):
    """Of a cross-entropy with targets q = `rest`, and besides at every place one class with its weight, `here`.

    All signs are 1. The gradient (sum_k q_k) p - q is made anew whenever it is asked for.
    """

    def __init__(
        self,
        loss: Tensor,
        columns: SoftmaxColumns,
        mass: Tensor,
        *,
        here: tuple[Tensor, Tensor] | None = None,
        rest: Tensor | None = None,
    ) -> None:
        columns.scale = mass.sqrt()
        signs = torch.ones((), dtype=torch.float64, device=loss.device).expand(columns.count)
        self.loss, self._factor = loss, (columns, signs)
        self._softmax, self._mass, self._here, self._rest = columns, mass, here, rest

    @property
    def gradient(self) -> Tensor:
        """[N, C] in the order of the outputs."""
        return self.gradient_in(torch.float64)

    def gradient_in(self, dtype: torch.dtype) -> Tensor:
        """Some places at a time."""
        columns = self._softmax
        found = torch.empty(columns.f.shape, dtype=dtype, device=columns.f.device)
        mass = self._mass.expand_as(columns.top)
        for here in columns.blocks():
            part = columns.log_p(here).exp_().mul_(mass[here])
            if self._rest is not None:
                part -= self._rest.expand(columns.f.shape)[here]
            if self._here is not None:
                numbers, weights = self._here
                part.scatter_add_(-1, numbers[here][..., None], -weights[here][..., None])
            found[here] = part
        return columns.flat(found)


class SquaredError(Loss):
    """scale * |f - y|^2 per sample: scale = 1/C is torch's "mse", scale = 1/2 the paper's squared loss (A.1)."""

    def __init__(self, *, half: bool) -> None:
        self.half = half
        self.name = "half_mse" if half else "mse"

    def _scale(self, flat: Tensor) -> float:
        return 0.5 if self.half else 1.0 / flat.shape[1]

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets have the outputs' shape."""
        _same_shape(self.name, outputs, targets)

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error per sample."""
        difference = (
            (outputs - targets.to(outputs.dtype)).flatten(1)
            if outputs.ndim > 1
            else (outputs - targets.to(outputs.dtype))[:, None]
        )
        return self._scale(difference) * difference.square().sum(1)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Hessian 2 scale I: C columns."""
        f = as_rows(outputs.detach().double())
        difference = f - as_rows(targets.double())
        scale = self._scale(f)
        columns = Diagonals(torch.full_like(f, (2.0 * scale) ** 0.5))
        signs = torch.ones(columns.count, dtype=f.dtype, device=f.device)
        return Curvature(scale * difference.square().sum(1), 2.0 * scale * difference, columns, signs)


class BinaryCrossEntropy(Loss):
    """Logistic loss of each output against a target in [0, 1], averaged over the outputs of a sample."""

    name = "bce"

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets have the outputs' shape and lie in [0, 1]."""
        _same_shape(self.name, outputs, targets)
        if bool((targets < 0).any()) or bool((targets > 1).any()):
            raise TargetError("bce targets must lie in [0, 1]")

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over outputs of softplus(f) - y f."""
        return as_rows(F.softplus(outputs, threshold=40.0) - targets.to(outputs.dtype) * outputs).mean(1)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Diagonal Hessian p (1 - p) / C."""
        f, y = as_rows(outputs.detach().double()), as_rows(targets.double())
        classes = f.shape[1]
        p = torch.sigmoid(f)
        root = (p * torch.sigmoid(-f) / classes).sqrt()
        loss = (F.softplus(f, threshold=40.0) - y * f).mean(1)
        signs = torch.ones(classes, dtype=f.dtype, device=f.device)
        return Curvature(loss, (p - y) / classes, Diagonals(root), signs)


LOSSES = ("cross_entropy", "mse", "half_mse", "bce")


def make_loss(
    loss: str | PerSample,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE,
    class_axis: int | None = None,
    shift: int = 0,
) -> Loss:
    """A loss by its name, or around a per-sample callable."""
    given = label_smoothing or class_weights is not None or ignore_index != IGNORE or class_axis is not None or shift
    if given and loss != "cross_entropy":
        raise ConfigurationError(
            "label_smoothing, class_weights, ignore_index, class_axis and shift belong to loss='cross_entropy'"
        )
    if callable(loss):
        return CallableLoss(loss)
    if loss == "cross_entropy":
        return CrossEntropy(
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            ignore_index=ignore_index,
            class_axis=class_axis,
            shift=shift,
        )
    if loss in ("mse", "half_mse"):
        return SquaredError(half=loss == "half_mse")
    if loss == "bce":
        return BinaryCrossEntropy()
    raise UnknownNameError(f"unknown loss {loss!r}; {nearest(str(loss), list(LOSSES))}, or a callable per sample")


def _many(targets: Tensor) -> str:
    """What integers in the shape of the outputs can be."""
    several = "several labels a sample: loss='bce' (--loss bce)"
    if bool((targets.sum(1) == 1).all()) and int(targets.min()) == 0:
        return f"; these look one-hot: give targets.argmax(1), or floats for probabilities; if they are {several}"
    return f"; if they are {several}"


def _same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        column = outputs.shape == (*targets.shape, 1)
        raise TargetError(
            f"{name} needs targets of the outputs' shape {list(outputs.shape)}, not {list(targets.shape)} "
            f"(broadcasting would silently compare every pair){'; give targets[:, None]' if column else ''}"
        )
