"""Data as a re-iterable of batches: counted, numbered, checked for saying the same thing twice.

Every average in this project is weighted by samples, so the weight of the whole data must be known; one pass counts it.
A second pass, every batch cut in two at random, is compared with the first: it catches what is not deterministic, says
whether data or model changed, and catches a model that lets the samples of any batch meet. Parts of neighbouring
batches go through the model together where they can, so that it takes no more passes than the first. Losses are
compared with those of each sample alone in the first batch, and of parts of the others. Where the sites must cover the
model, every batch's graph is read on the way, so that a batch they do not cover is known before the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree

from hessdiag.errors import (
    ConfigurationError,
    EmptyDataError,
    HessdiagError,
    NotDeterministicError,
    StochasticModeError,
    UncoveredModelError,
)
from hessdiag.graph.reading import Graph, detach_guard
from hessdiag.problem.forward import leaves, mapped
from hessdiag.problem.handing_back import memory_errors
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import CallableLoss
from hessdiag.problem.random_states import RandomStates
from hessdiag.signs import cpu_generator

Batches = Iterable[Any]
NEAR = 1e-9
"""Two sums of fingerprints are the same data if they differ by less, relative to the sum of sizes."""


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
    counted: int
    """Samples that have a loss: those whose targets are all ignored have none."""
    shuffled: bool = False
    checked: bool = False
    uncovered: str | None = None
    """Why the site identity does not serve some batch, if that was looked at."""
    loss_off: float = 0.0
    """What rounding may change of `loss` where the samples come in another order, or on another machine."""

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

    @cached_property
    def marks(self) -> Tensor:
        """Fingerprints of its samples, as they were when first asked for."""
        return fingerprint(self.inputs, self.targets)

    def part(self, chosen: Tensor) -> Numbered:
        """Some samples of the batch."""
        count = len(self.targets)
        inputs = mapped(self.inputs, lambda x: x[chosen] if _by_sample(x, count) else x)
        return Numbered(self.index, self.start, inputs, self.targets[chosen])

    @property
    def numbers(self) -> int:
        """How many numbers a sample has in the inputs."""
        count = len(self.targets)
        cut: list[Tensor] = [x for x in leaves(self.inputs) if _by_sample(x, count)]
        return sum(x.numel() for x in cut) // count

    def few(self, count: int) -> Numbered:
        """The first samples of the batch, `count` of them or all there are."""
        return self.part(torch.arange(min(count, len(self.targets)), device=self.targets.device))


def numbered(objective: Objective, batches: Batches, *, align: int = 1) -> Iterator[Numbered]:
    """Batches one after the other; with `align` > 1 re-cut into multiples of it, but for the last of a shape."""
    start = 0
    rest: tuple[Any, Tensor] | None = None
    index = 0
    for index, batch in enumerate(_iterate(batches)):
        inputs, targets = objective.check_batch(batch, index)
        if align > 1 and isinstance(inputs, Tensor):
            if rest is not None:
                both = joined(Numbered(index, start, *rest), Numbered(index, start, inputs, targets))
                if both is None:  # batches that are padded to lengths of their own
                    yield Numbered(index - 1, start, *rest)
                    start += len(rest[1])
                else:
                    inputs, targets = both.inputs, both.targets
            full = len(targets) // align * align
            rest = (inputs[full:], targets[full:]) if full < len(targets) else None
            if full == 0:
                continue
            inputs, targets = inputs[:full], targets[:full]
        yield Numbered(index, start, inputs, targets)
        start += len(targets)
    if rest is not None:
        yield Numbered(index, start, *rest)


Read = Callable[[Numbered], Tensor | None]
Notice = Callable[[Numbered], None]


class Longest:
    """A few samples of the batch with the most numbers a sample, where the first batch has fewer; None before."""

    def __init__(self, samples: int) -> None:
        self.few: Numbered | None = None
        self._samples, self._most = samples, 0

    def __call__(self, batch: Numbered) -> None:
        """Look at the next batch."""
        if batch.numbers > self._most:
            self._most, self.few = batch.numbers, batch.few(self._samples) if batch.index else None


@dataclass(frozen=True)
class Seen:
    """Of one batch of the first pass: fingerprints of its samples, of their outputs, and the outputs' largest entry."""

    marks: Tensor
    outputs: Tensor
    size: float


class Pass(Sequence[Seen]):
    """What one pass saw, batch by batch, in one tensor.

    It grows with the data by 16 bytes a sample. Small tensors of its own for each batch would lie between what the
    batches freed, and glibc could not use that again: of a stream of 1 GB, 1.2 GB stayed with the process.
    """

    def __init__(self) -> None:
        self._values = torch.zeros(2, 0, dtype=torch.float64, device="cpu")
        self._ends = [0]
        self._sizes: list[float] = []

    def append(self, marks: Tensor, outputs: Tensor, size: float) -> None:
        """Add the next batch's: see `Seen`."""
        low, high = self._ends[-1], self._ends[-1] + len(marks)
        if high > self._values.shape[1]:
            grown = marks.new_zeros(2, max(2 * high, 1 << 12))
            grown[:, :low] = self._values[:, :low]
            self._values = grown
        self._values[0, low:high] = marks
        self._values[1, low:high] = outputs
        self._ends.append(high)
        self._sizes.append(size)

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> Seen: ...

    @overload
    def __getitem__(self, index: slice) -> list[Seen]: ...

    def __getitem__(self, index: int | slice) -> Seen | list[Seen]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        marks, outputs = self._values[:, self._ends[index] : self._ends[index + 1]]
        return Seen(marks, outputs, self._sizes[index])


def survey(
    objective: Objective,
    batches: Batches,
    *,
    coverage: bool = False,
    keep: Pass | None = None,
    against: Sequence[Seen] | None = None,
    read: Read | None = None,
    notice: Notice | None = None,
) -> Survey:
    """One pass: samples, weight, loss and fingerprints of the data.

    `coverage` reads the graphs of all batches but the first. `keep` takes what a second pass is held `against`. `read`
    is handed the first batch, and may give its outputs; `notice` sees every one.
    """
    objective.check_modes()
    samples = count = largest = counted = 0
    weight = loss = data = size = order = noise = 0.0
    uncovered: str | None = None
    with torch.no_grad():
        if against is None:
            passed = _whole(objective, batches, coverage, read, notice)
        else:
            passed = _in_two(objective, numbered(objective, batches), against, coverage)
        for batch, marks, outputs, refusal in passed:
            uncovered = uncovered or refusal
            largest_entry = _largest(outputs)
            if keep is not None:
                keep.append(marks, fingerprint(outputs, batch.targets, targets=False), largest_entry)
            batch_loss, batch_weight = objective.summed_losses(outputs, batch.targets, index=batch.index)
            if against is None:
                check_loss(objective, outputs, batch)
            loss += float(batch_loss.double())
            weight += float(batch_weight)
            noise += largest_entry * len(marks)  # of a fitted loss all is rounding of the outputs
            data += float(marks.sum())
            size += float(marks.abs().sum())
            order += in_order(batch)
            samples += len(batch.targets)
            counted += int(objective.loss.counted(batch.targets).sum())
            count += 1
            largest = max(largest, len(batch.targets))
    if samples == 0:
        raise EmptyDataError("the data hold no batches; a generator that was used up gives none either")
    if weight <= 0:
        raise EmptyDataError("all samples have class weight zero: the mean loss is 0/0")
    off, unit = (1e-10, 1e-14) if objective.dtype == torch.float64 else (1e-5, 1e-5)
    found = Survey(samples, count, largest, weight, loss, data, size, order, counted, uncovered=uncovered)
    return replace(found, loss_off=off * abs(loss) + unit * noise + 1e-30)


def check_deterministic(
    objective: Objective,
    batches: Batches,
    *,
    coverage: bool = False,
    read: Read | None = None,
    notice: Notice | None = None,
) -> Survey:
    """Two passes compared; the exception says whether the data or the model changed between them."""
    seen = Pass()
    first = survey(objective, batches, keep=seen, read=read, notice=notice)
    second = survey(objective, batches, coverage=coverage, against=seen)
    if first.samples != second.samples:
        raise NotDeterministicError(
            f"two passes over the data gave {first.samples} and {second.samples} samples; pass a fixed set of batches"
        )
    if abs(first.data - second.data) > NEAR * (first.data_size + 1e-300):
        raise NotDeterministicError(
            "the data differ between two passes (random augmentation, or shuffling with drop_last): "
            "fix them, e.g. batches = list(loader)"
        )
    if abs(first.loss - second.loss) > first.loss_off:
        raise NotDeterministicError(
            f"the model is random: the same data gave losses {first.mean_loss:.9g} and {second.mean_loss:.9g} "
            "(functional dropout, noise, batch statistics); make it deterministic, e.g. by model.eval()"
        )
    shuffled = abs(first.order - second.order) > NEAR * (first.data_size + 1e-300)
    return replace(first, shuffled=shuffled, checked=True, uncovered=second.uncovered)


def watch(facts: Survey, batches: Iterable[Numbered]) -> Iterator[Numbered]:
    """Hand the batches of a later pass on; at its end, refuse data that are not those of the survey."""
    samples, data = 0, 0.0
    for batch in batches:
        yield batch
        samples += len(batch.targets)
        if facts.checked:
            data += float(batch.marks.sum())
    changed = facts.checked and abs(data - facts.data) > NEAR * (facts.data_size + 1e-300)
    if samples != facts.samples or changed:
        what = f"{samples} samples, not {facts.samples}" if samples != facts.samples else "other values"
        raise NotDeterministicError(
            f"the data changed during the measurement: a later pass gave {what}; pass a fixed set of batches"
        )


def in_order(batch: Numbered) -> float:
    """A sum of the fingerprints of a batch that tells in which places of the data its samples stand."""
    marks = batch.marks
    places = torch.arange(batch.start, batch.start + len(marks), dtype=torch.float64, device=marks.device)
    return float((marks * torch.cos(places)).sum())


class Stamp:
    """What a batch held when something was made of it: a loader may fill the same tensors anew, or change their order.

    `holds` says whether a batch holds the same samples in the same order, and no tensor of it was written to since.
    """

    def __init__(self, batch: Numbered) -> None:
        self._of, self._start, self._count = batch, batch.start, len(batch.targets)
        self._tensors = _tensors(batch)
        self._written = [x._version for x in self._tensors]
        self._marks = batch.marks

    def holds(self, batch: Numbered) -> bool:
        """Whether it is `batch` still."""
        if batch.start != self._start or len(batch.targets) != self._count:
            return False
        if [x._version for x in self._tensors] != self._written:
            return False
        now = fingerprint(batch.inputs, batch.targets) if batch is self._of else batch.marks
        return torch.equal(self._marks, now)


def _tensors(batch: Numbered) -> list[Tensor]:
    """Those that tell how often they were written to."""
    return [x for x in (*leaves(batch.inputs), batch.targets) if isinstance(x, Tensor) and not x.is_inference()]


def check_apart(objective: Objective, batch: Numbered, seen: Sequence[Seen]) -> None:
    """Refuse a model that mixes the samples of a batch: cut in two, the batch must give the outputs that were seen."""
    with torch.no_grad():
        for _ in _in_two(objective, [batch], seen, False):
            pass


def check_loss(objective: Objective, outputs: Tensor, batch: Numbered) -> None:
    """Refuse a callable loss with a gradient of its own in the parameters, and one that lets samples meet.

    The losses known by name do neither.
    """
    loss = objective.loss
    if not isinstance(loss, CallableLoss):
        return
    if batch.index == 0:
        with torch.enable_grad():
            alone = loss.values(outputs.detach(), batch.targets)
            taken = _taken(alone, objective)
        if taken:
            raise ConfigurationError(
                f"the loss {loss.name!r} depends on parameter {taken!r} itself, beside the outputs (a penalty?), "
                "so it is no mean over samples; give weight decay by l2=, or let the model return what is penalised"
            )
        loss.curvature(outputs[:2], batch.targets[:2]).some(1)  # raises where there is none
    whole, count = loss.values(outputs, batch.targets), len(batch.targets)
    parts = list(torch.split(torch.arange(count, device="cpu"), 1)) if batch.index == 0 else _halves(batch)
    cut = torch.zeros_like(whole)
    for chosen in parts:
        where = chosen.to(whole.device)
        cut[where] = loss.values(outputs[where], batch.targets[where])
    off = float((whole - cut).double().abs().max()) / (_largest(whole) or 1.0)
    if off > _APART[objective.dtype]:
        raise UncoveredModelError(
            f"the loss {loss.name!r} mixes the samples of a batch: alone, a sample's loss changes by "
            f"{off:.1e} of its size; it is no mean over samples, and no method here measures it"
        )


_APART = {torch.float64: 1e-8, torch.float32: 1e-3}


_Passed = tuple[Numbered, Tensor, Tensor, str | None]  # a batch, its fingerprints, its outputs, why it is not covered


def _whole(
    objective: Objective, batches: Batches, coverage: bool, read: Read | None, notice: Notice | None
) -> Iterator[_Passed]:
    """Every batch as it is."""
    for batch in numbered(objective, batches):
        refusal = None
        if notice is not None:
            notice(batch)
        outputs = None
        if read is not None and not batch.index:
            with drawing_refused(objective):
                outputs = read(batch)
        if outputs is None:
            outputs, refusal = _outputs(objective, batch, coverage and batch.index > 0)
        yield batch, batch.marks, outputs, refusal


def _outputs(objective: Objective, batch: Numbered, look: bool) -> tuple[Tensor, str | None]:
    """Outputs of a batch and, if asked to look, why the site identity does not cover it."""
    with torch.set_grad_enabled(look), drawing_refused(objective):
        outputs = objective.outputs(batch.inputs, batch.targets, index=batch.index)
        if not look:
            return outputs, None
        try:
            detach_guard(outputs)
            Graph(outputs, objective.parameters)
        except UncoveredModelError as error:
            return outputs.detach(), f"batch {batch.index}: {error}"
    return outputs.detach(), None


@contextmanager
def drawing_refused(objective: Objective) -> Iterator[None]:
    """Refuse a model in training mode that draws random numbers: it may be another function once in many passes.

    In eval mode a draw is most often for nothing, and what it changes is found where two passes differ.
    """
    cards = [objective.device] if objective.device.type == "cuda" else []
    before, on_cards = RandomStates.now(), [torch.cuda.get_rng_state(device) for device in cards]
    yield
    drew = not RandomStates.now().same(before)
    drew |= any(not torch.equal(torch.cuda.get_rng_state(d), state) for d, state in zip(cards, on_cards))
    if drew and any(module.training for module in objective.model.modules()):
        raise StochasticModeError(
            "the model is in training mode and draws random numbers (dropout, stochastic depth, LayerDrop, noise): it "
            "may be another function in some passes; call model.eval(), and take out what draws even then"
        )


@dataclass
class _Cut:
    """A batch in two parts (or in one, of a single sample), and the outputs of those that went through the model."""

    batch: Numbered
    chosen: list[Tensor]
    found: dict[int, Tensor] = field(default_factory=dict)
    refusal: str | None = None
    joined: bool = False

    def part(self, number: int) -> Numbered:
        """The samples of one part."""
        return self.batch.part(self.chosen[number].to(self.batch.targets.device))

    def outputs(self) -> Tensor:
        """Those of the whole batch, put together."""
        first = self.found[0]
        out = first.new_zeros(len(self.batch.targets), *first.shape[1:])
        for number, chosen in enumerate(self.chosen):
            out[chosen.to(out.device)] = self.found[number]
        return out


def _in_two(
    objective: Objective, batches: Iterable[Numbered], seen: Sequence[Seen], coverage: bool
) -> Iterator[_Passed]:
    """Outputs of every batch from its two parts, held against those of the whole; the first batch comes last.

    The first part of each batch goes together with the second of the next, that of the last with the first batch's.
    """
    head: _Cut | None = None
    last: _Cut | None = None
    for batch in batches:
        cut = _Cut(batch, _halves(batch))
        if last is None:
            head = last = cut
            continue
        _run(objective, last, cut, coverage)
        if last is not head:
            yield _compared(objective, last, seen, coverage)
        last = cut
    if head is None or last is None:
        return
    _run(objective, last, head, coverage)
    if last is not head:
        yield _compared(objective, last, seen, coverage)
    yield _compared(objective, head, seen, coverage)


def _run(objective: Objective, a: _Cut, b: _Cut, coverage: bool) -> None:
    """The first part of `a` and the last of `b` through the model, at once where they can be joined."""
    wanted = [(a, 0), (b, len(b.chosen) - 1)] if a is not b else [(a, n) for n in range(len(a.chosen))]
    parts = [cut.part(number) for cut, number in wanted]
    both = joined(*parts) if a is not b and len(b.chosen) == 2 else None
    if both is not None:
        look = coverage and (a.batch.index > 0 or b.batch.index > 0)
        try:
            found, why = _outputs(objective, both, look)
        except (HessdiagError, RuntimeError):
            found, why = torch.empty(0), "one of the two"
        if why is None:  # else each by itself, so that the right one is named
            for (cut, number), out in zip(wanted, torch.split(found, [len(part.targets) for part in parts])):
                cut.found[number], cut.joined = out, True
            return
    for (cut, number), part in zip(wanted, parts):
        if number not in cut.found:
            try:
                cut.found[number], why = _outputs(objective, part, coverage and cut.batch.index > 0)
            except ConfigurationError:
                _refuse_if_one_for_all(objective, cut.batch, cut.chosen[number])
                raise
            cut.refusal = cut.refusal or why


def _refuse_if_one_for_all(objective: Objective, batch: Numbered, chosen: Tensor) -> None:
    """Name an input of as many rows as there are samples that serves all of them: left whole, parts agree with all."""
    count, given = len(batch.targets), [x for x in leaves(batch.inputs) if _by_sample(x, len(batch.targets))]
    if len(given) < 2:
        return
    names, whole = _names(batch.inputs), _outputs(objective, batch, False)[0][chosen]
    for leaf in given:
        inputs = mapped(batch.inputs, lambda x, own=leaf: x[chosen] if x is not own and _by_sample(x, count) else x)  # type: ignore[misc]
        try:
            part = _outputs(objective, Numbered(batch.index, batch.start, inputs, batch.targets[chosen]), False)[0]
        except (HessdiagError, RuntimeError):
            continue
        if float((part - whole).abs().max()) <= _APART[objective.dtype] * (_largest(whole) or 1.0):
            raise ConfigurationError(
                f"batch {batch.index}: inputs{names.get(id(leaf), '')} of shape {list(leaf.shape)} has as many rows as "
                f"there are samples ({count}), and was cut with them, but is one for all of them: give it an axis of "
                "samples, e.g. by .expand(samples, ...), make it in the model or in forward=, or change the batch size"
            )


def _names(inputs: Any, name: str = "") -> dict[int, str]:
    """What tensors in the inputs are called, by their ids: keys and places, the innermost last."""
    if isinstance(inputs, Mapping):
        pairs: list[tuple[Any, Any]] = list(inputs.items())
    elif isinstance(inputs, (list, tuple)):
        pairs = list(enumerate(inputs))
    else:
        return {id(inputs): name}
    return {key: called for place, value in pairs for key, called in _names(value, f"{name}[{place!r}]").items()}


def joined(a: Numbered, b: Numbered) -> Numbered | None:
    """Samples of two batches as one, where their inputs are alike: of one shape, or the same for all samples."""
    flat, other = ([*leaves(part.inputs), part.targets] for part in (a, b))
    sizes = [len(part.targets) for part in (a, b)]

    def cut(x: Any, y: Any) -> bool:
        return _by_sample(x, sizes[0]) and _by_sample(y, sizes[1])

    def alike(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return x is y
        if x.dtype != y.dtype or x.device != y.device:
            return False
        return x.shape[1:] == y.shape[1:] if cut(x, y) else torch.equal(x, y)

    strange = any(isinstance(x, Mapping) for part in (a, b) for x in _pytree.tree_leaves(part.inputs))  # of any order
    if strange or _pytree.tree_structure(a.inputs) != _pytree.tree_structure(b.inputs):
        return None
    if not all(alike(x, y) for x, y in zip(flat, other)):
        return None
    rest = iter(other)

    def both(x: Any) -> Any:
        y = next(rest)
        return torch.cat([x, y]) if cut(x, y) else x

    inputs = _pytree.tree_map(both, a.inputs)
    return Numbered(a.index, a.start, inputs, torch.cat([a.targets, b.targets]))


def _compared(objective: Objective, cut: _Cut, seen: Sequence[Seen], coverage: bool) -> _Passed:
    """The batch's outputs, held against those of the whole batch."""
    batch, outputs = cut.batch, cut.outputs()
    marks = batch.marks
    if len(cut.chosen) < 2:
        return batch, marks, outputs, cut.refusal
    before = seen[batch.index] if batch.index < len(seen) else None
    if before is None or not torch.equal(before.marks, marks):  # not looked at, or in another order
        whole = _outputs(objective, batch, False)[0]
        before = Seen(marks, fingerprint(whole, batch.targets, targets=False), _largest(whole))
    now = fingerprint(outputs, batch.targets, targets=False)
    entries = outputs[0].numel()
    off = float((now - before.outputs).abs().max()) / (before.size * entries**0.5 or 1.0)
    if off > _APART[objective.dtype] and cut.joined:  # with samples of another batch; by themselves they may agree
        alone = _Cut(batch, cut.chosen)
        _run(objective, alone, alone, coverage)
        return _compared(objective, alone, seen, coverage)
    if off > _APART[objective.dtype]:
        again = fingerprint(_outputs(objective, batch, False)[0], batch.targets, targets=False)
        if not torch.equal(again, fingerprint(_outputs(objective, batch, False)[0], batch.targets, targets=False)):
            raise NotDeterministicError(
                f"batch {batch.index}: the model is random: the same samples gave other outputs (functional dropout, "
                "noise, batch statistics); make it deterministic, e.g. by model.eval()"
            )
        _refuse_if_one_for_all(objective, batch, cut.chosen[0])
        raise UncoveredModelError(
            f"batch {batch.index}: the model mixes the samples of a batch: cut in two, its outputs change by {off:.1e} "
            "of their size; its loss is no mean over samples, and no method here measures it"
        )
    return batch, marks, outputs, cut.refusal


def _halves(batch: Numbered) -> list[Tensor]:
    """The samples of a batch dealt at random into two parts; one where there is one sample."""
    count = len(batch.targets)
    order = torch.randperm(count, generator=cpu_generator(batch.index), device="cpu")
    return [part.sort().values for part in torch.split(order, (count + 1) // 2)]


def _taken(losses: Tensor, objective: Objective) -> str | None:
    """The first chosen parameter that losses of detached outputs still depend on."""
    if not losses.requires_grad:
        return None
    names = list(objective.parameters)
    found = torch.autograd.grad(losses.sum(), list(objective.parameters.values()), allow_unused=True)
    return next((name for name, gradient in zip(names, found) if gradient is not None), None)


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _iterate(batches: Batches) -> Iterator[Any]:
    if isinstance(batches, Iterator):
        raise ConfigurationError("batches is an iterator, which gives its data only once; pass a list or a DataLoader")
    if isinstance(batches, tuple) and len(batches) == 2 and isinstance(batches[1], Tensor):
        yield batches
        return
    try:
        with memory_errors("it was the data that did not fit, not the work on them: hold or load fewer at once"):
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


def fingerprint(inputs: Any, labels: Tensor, *, targets: bool = True) -> Tensor:
    """One number per sample, a fixed random-looking function of its values (and of its target)."""
    count = len(labels)
    marks = torch.zeros(count, dtype=torch.float64, device=labels.device)
    parts = [x for x in leaves(inputs) if _by_sample(x, count)]
    for number, leaf in enumerate([*parts, labels] if targets else parts):
        flat = leaf.detach().double().reshape(count, -1)
        wave = _wave(flat.shape[1], number, flat.device)
        mark = flat @ wave
        if not bool(mark.isfinite().all()):  # as of masks that are added
            mark = flat.nan_to_num(*_NOT_FINITE) @ wave
        marks += mark
    return marks


_NOT_FINITE = (1234.5, 4321.25, -5678.75)
"""What NaN and the two infinities count as."""


@lru_cache(maxsize=8)
def _wave(count: int, number: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.cos(torch.arange(count, dtype=torch.float64, device=device) * (1.7 + number) + 0.3)
