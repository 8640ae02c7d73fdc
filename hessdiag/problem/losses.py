"""The losses known by name, with closed forms of their gradient and their Hessian's factor (see `persample`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.errors import ConfigurationError, TargetError, UnknownNameError, nearest
from hessdiag.problem.persample import CallableLoss, Columns, Curvature, Diagonals, Loss, PerSample, as_rows


class CrossEntropy(Loss):
    """Softmax cross-entropy -sum_k q_k log p_k, with class weights and label smoothing as torch defines them.

    With any targets q the Hessian is (sum_k q_k)(diag p - p p^T) = S S^T, S = diag(sqrt p) - p sqrt(p)^T, of
    rank C - 1: its null direction sqrt(p) is turned onto the last axis by a Householder reflection and dropped.
    """

    name = "cross_entropy"

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        if not 0.0 <= label_smoothing <= 1.0:
            raise ConfigurationError(f"label_smoothing must lie in [0, 1], not {label_smoothing}")
        if class_weights is not None and (class_weights.ndim != 1 or not bool((class_weights >= 0).all())):
            raise ConfigurationError("class_weights must be one non-negative number per class")
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Outputs [N, C]; targets are class indices [N] in 0..C-1, or probabilities [N, C]."""
        if outputs.ndim != 2:
            raise TargetError(
                f"cross_entropy needs outputs of shape [N, C], the model gave {list(outputs.shape)}; "
                "flatten them or pass loss=callable"
            )
        classes = outputs.shape[1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ConfigurationError(f"{len(self.class_weights)} class weights for {classes} outputs")
        if targets.is_floating_point():
            if bool((targets < 0).any()):
                raise TargetError("probability targets must not be negative")
            if targets.ndim == 1 and len(targets) == len(outputs) and bool((targets == targets.round()).all()):
                raise TargetError(
                    f"targets are whole numbers stored as {targets.dtype}: if they are classes, give targets.long(); "
                    "for regression say loss='mse'"
                )
            if targets.shape != outputs.shape:
                raise TargetError(
                    f"probability targets must have the outputs' shape {list(outputs.shape)}, not {list(targets.shape)}"
                )
            return
        if targets.ndim != 1 or len(targets) != len(outputs):
            raise TargetError(f"class targets must have shape [{len(outputs)}], not {list(targets.shape)}")
        if targets.dtype == torch.bool or targets.is_complex():
            raise TargetError(f"class targets must be integers, not {targets.dtype}")
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise TargetError(f"target {wrong} is out of range: the model has {classes} outputs (0 to {classes - 1})")

    def _soft_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        classes, dtype = outputs.shape[1], outputs.dtype
        weight = None if self.class_weights is None else self.class_weights.to(outputs)
        if targets.is_floating_point():
            soft = targets.to(dtype) * (1 - self.label_smoothing) + self.label_smoothing / classes
            return soft if weight is None else soft * weight
        soft = F.one_hot(targets.long(), classes).to(dtype) * (1 - self.label_smoothing)
        soft = soft + self.label_smoothing / classes
        return soft if weight is None else soft * weight

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-sum_k q_k log softmax(f)_k."""
        return -(self._soft_targets(outputs, targets) * F.log_softmax(outputs, 1)).sum(1)

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Weights of the target classes, as torch divides by them; 1 for probability targets."""
        if self.class_weights is None or targets.is_floating_point():
            return super().weights(outputs, targets)
        return self.class_weights.to(outputs.device, torch.float64)[targets.long()]

    def curvature(self, outputs: Tensor, targets: Tensor) -> Curvature:
        """Closed form; C - 1 columns, all of positive sign."""
        f = outputs.detach().double()
        q = self._soft_targets(f, targets)
        mass = q.sum(1, keepdim=True)
        log_p = F.log_softmax(f, 1)
        p = log_p.exp()
        columns = SoftmaxColumns(p, (0.5 * log_p).exp(), mass.sqrt())
        signs = torch.ones(columns.count, dtype=f.dtype, device=f.device)
        return Curvature(-(q * log_p).sum(1), mass * p - q, columns, signs)


class SoftmaxColumns(Columns):
    """S R without its last column, times sqrt(mass): S = diag(sqrt p) - p sqrt(p)^T, R = I - 2 a a^T the reflection
    that turns S's null direction sqrt(p) onto the last axis (a along sqrt(p) + e_C).

    Both are a diagonal and a product of two vectors, so that sums and products cost N C and no square is written.
    """

    def __init__(self, p: Tensor, root: Tensor, scale: Tensor) -> None:
        self.p, self.root, self.scale = p, root, scale
        self.count = p.shape[1] - 1
        axis = root.clone()
        axis[:, -1] += 1.0
        self.axis: Tensor = axis / axis.norm(dim=1, keepdim=True)

    def part(self, low: int, high: int) -> Tensor:
        """S (e_c - 2 a_c a)."""
        picked = self.axis[:, low:high].T[:, :, None]
        out: Tensor = picked * (-2.0 * self._s(self.axis))
        rows = torch.arange(high - low, device=out.device)
        root = self.root[:, low:high].T
        out -= root[:, :, None] * self.p
        out[rows, :, rows + low] += root
        return out.mul_(self.scale)

    def combined(self, weights: Tensor) -> Tensor:
        """S R w."""
        w = F.pad(weights.T, (0, 1))
        return self.scale * self._s(w - 2.0 * (w * self.axis).sum(1, keepdim=True) * self.axis)

    def against(self, vectors: Tensor) -> Tensor:
        """R S^T v without its last entry."""
        u: Tensor = self.root * (vectors - (self.p * vectors).sum(1, keepdim=True))
        u = u - 2.0 * (u * self.axis).sum(1, keepdim=True) * self.axis
        return (self.scale * u)[:, :-1].T

    def _s(self, v: Tensor) -> Tensor:
        rooted = self.root * v
        return rooted - self.p * rooted.sum(1, keepdim=True)


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


def make_loss(loss: str | PerSample, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> Loss:
    """A loss by its name, or around a per-sample callable."""
    if (label_smoothing or class_weights is not None) and loss != "cross_entropy":
        raise ConfigurationError("label_smoothing and class_weights belong to loss='cross_entropy'")
    if callable(loss):
        return CallableLoss(loss)
    if loss == "cross_entropy":
        return CrossEntropy(label_smoothing=label_smoothing, class_weights=class_weights)
    if loss in ("mse", "half_mse"):
        return SquaredError(half=loss == "half_mse")
    if loss == "bce":
        return BinaryCrossEntropy()
    raise UnknownNameError(f"unknown loss {loss!r}; {nearest(str(loss), list(LOSSES))}, or a callable per sample")


def _same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise TargetError(
            f"{name} needs targets of the outputs' shape {list(outputs.shape)}, not {list(targets.shape)} "
            "(broadcasting would silently compare every pair)"
        )
