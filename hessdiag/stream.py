"""Data as a re-iterable of batches: counted, numbered, checked for saying the same thing twice.

Every average in this project is weighted by samples, so the weight of the whole data must be known; one pass counts it.
A second pass is compared with the first to catch what is not deterministic, and to say whether data or model changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError, EmptyDataError, NotDeterministicError, UncoveredModelError
from .forward import leaves, mapped
from .objective import Objective

Batches = Iterable[Any]


@dataclass(frozen=True)
class Survey:
    """What one pass over the data found; `order` differs where samples come in another order, the rest may not.

    `checked` says that a second pass agreed, and that later ones are held to it.
    """

    samples: int
    batches: int
    largest: int
    weight: float
    loss: float
    data: float
    data_size: float
    order: float
    shuffled: bool = False
    checked: bool = False

    @property
    def mean_loss(self) -> float:
        """The loss that is measured, without weight decay."""
        return self.loss / self.weight


@dataclass(frozen=True)
class Numbered:
    """A checked batch with its index and the number of samples before it."""

    index: int
    start: int
    inputs: Any
    targets: Tensor

    def part(self, chosen: Tensor) -> Numbered:
        """Some samples of the batch."""
        count = len(self.targets)
        inputs = mapped(self.inputs, lambda x: x[chosen] if _by_sample(x, count) else x)
        return Numbered(self.index, self.start, inputs, self.targets[chosen])

    def few(self, count: int) -> Numbered:
        """The first samples of the batch, `count` of them or all there are."""
        return self.part(torch.arange(min(count, len(self.targets)), device=self.targets.device))


def numbered(objective: Objective, batches: Batches, *, align: int = 1) -> Iterator[Numbered]:
    """Batches one after the other; with `align` > 1 re-cut so that all but the last hold a multiple of it."""
    start = 0
    rest: tuple[Any, Tensor] | None = None
    index = 0
    for index, batch in enumerate(_iterate(batches)):
        inputs, targets = objective.check_batch(batch, index)
        if align > 1 and isinstance(inputs, Tensor):
            if rest is not None:
                inputs, targets = torch.cat([rest[0], inputs]), torch.cat([rest[1], targets])
            full = len(targets) // align * align
            rest = (inputs[full:], targets[full:]) if full < len(targets) else None
            if full == 0:
                continue
            inputs, targets = inputs[:full], targets[:full]
        yield Numbered(index, start, inputs, targets)
        start += len(targets)
    if rest is not None:
        yield Numbered(index, start, *rest)


def survey(objective: Objective, batches: Batches) -> Survey:
    """One pass without gradients: samples, weight, loss and fingerprints of the data."""
    objective.check_modes()
    samples = count = largest = 0
    weight = loss = data = size = order = 0.0
    with torch.no_grad():
        for batch in numbered(objective, batches):
            batch_loss, batch_weight = objective.summed_loss(batch.inputs, batch.targets, index=batch.index)
            loss += float(batch_loss.double())
            weight += float(batch_weight)
            marks = fingerprint(batch.inputs, batch.targets)
            place = torch.arange(batch.start, batch.start + len(marks), dtype=torch.float64, device=marks.device)
            data += float(marks.sum())
            size += float(marks.abs().sum())
            order += float((marks * torch.cos(place)).sum())
            samples += len(batch.targets)
            count += 1
            largest = max(largest, len(batch.targets))
    if samples == 0:
        raise EmptyDataError("the data hold no batches; a generator that was used up gives none either")
    if weight <= 0:
        raise EmptyDataError("all samples have class weight zero: the mean loss is 0/0")
    return Survey(samples, count, largest, weight, loss, data, size, order)


def check_deterministic(objective: Objective, batches: Batches) -> Survey:
    """Two passes compared; the exception says whether the data or the model changed between them."""
    first, second = survey(objective, batches), survey(objective, batches)
    if first.samples != second.samples:
        raise NotDeterministicError(
            f"two passes over the data gave {first.samples} and {second.samples} samples; pass a fixed set of batches"
        )
    if abs(first.data - second.data) > 1e-9 * (first.data_size + 1e-300):
        raise NotDeterministicError(
            "the data differ between two passes (random augmentation, or shuffling with drop_last): "
            "fix them, e.g. batches = list(loader)"
        )
    tolerance = 1e-10 if objective.dtype == torch.float64 else 1e-5
    if abs(first.loss - second.loss) > tolerance * (abs(first.loss) + 1e-30):
        raise NotDeterministicError(
            f"the model is random: the same data gave losses {first.mean_loss:.9g} and {second.mean_loss:.9g} "
            "(functional dropout, noise, batch statistics); make it deterministic, e.g. by model.eval()"
        )
    shuffled = abs(first.order - second.order) > 1e-9 * (first.data_size + 1e-300)
    return replace(first, shuffled=shuffled, checked=True)


def watch(facts: Survey, batches: Iterable[Numbered]) -> Iterator[Numbered]:
    """Hand the batches of a later pass on; at its end, refuse data that are not those of the survey."""
    samples, data = 0, 0.0
    for batch in batches:
        yield batch
        samples += len(batch.targets)
        if facts.checked:
            data += float(fingerprint(batch.inputs, batch.targets).sum())
    changed = facts.checked and abs(data - facts.data) > 1e-9 * (facts.data_size + 1e-300)
    if samples != facts.samples or changed:
        what = f"{samples} samples, not {facts.samples}" if samples != facts.samples else "other values"
        raise NotDeterministicError(
            f"the data changed during the measurement: a later pass gave {what}; pass a fixed set of batches"
        )


def check_apart(objective: Objective, first: Numbered) -> None:
    """Refuse a model that mixes the samples of a batch: cut from its batch, a sample must give the same outputs."""
    count = len(first.targets)
    if count < 2:
        return
    alone = first.part(torch.arange(count - 1, count, device=first.targets.device))
    tolerance = 1e-8 if objective.dtype == torch.float64 else 1e-3
    with torch.no_grad():
        outputs = objective.outputs(first.inputs, first.targets, index=first.index)
        cut = objective.outputs(alone.inputs, alone.targets, index=first.index)
        losses = objective.loss.values(outputs, first.targets)[-1:]
        lone = objective.loss.values(outputs[-1:], alone.targets)
    off = _apart(outputs[-1:], cut)
    if off > tolerance:
        raise UncoveredModelError(
            f"the model mixes the samples of a batch: alone, a sample's outputs change by {off:.1e} of their size; "
            "its loss is no mean over samples, and no method here measures it"
        )
    off = _apart(losses, lone)
    if off > tolerance:
        raise UncoveredModelError(
            f"the loss {objective.loss.name!r} mixes the samples of a batch: alone, a sample's loss changes by "
            f"{off:.1e} of its size; it is no mean over samples, and no method here measures it"
        )


def _apart(whole: Tensor, cut: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    if not whole.numel():
        return 0.0
    a, b = whole.detach().double(), cut.detach().double()
    return float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)


def _iterate(batches: Batches) -> Iterator[Any]:
    if isinstance(batches, Iterator):
        raise ConfigurationError("batches is an iterator, which gives its data only once; pass a list or a DataLoader")
    if isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(x, Tensor) for x in batches):
        yield batches
        return
    try:
        yield from batches
    except TypeError as error:
        if not isinstance(batches, Iterable):
            raise ConfigurationError(
                f"batches must be an iterable of (inputs, targets), not {type(batches).__name__}"
            ) from error
        raise


def _by_sample(value: Any, count: int) -> bool:
    """Whether a leaf of the inputs has one entry per sample (a mask or a table for all samples has not)."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count


def fingerprint(inputs: Any, targets: Tensor) -> Tensor:
    """One number per sample, a fixed random-looking function of its values."""
    marks = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    parts = [x for x in leaves(inputs) if _by_sample(x, len(targets))]
    for number, leaf in enumerate([*parts, targets]):
        flat = leaf.detach().double().reshape(len(targets), -1)
        wave = torch.cos(torch.arange(flat.shape[1], dtype=torch.float64, device=flat.device) * (1.7 + number) + 0.3)
        marks += flat @ wave
    return marks
