"""Batches x replicates: the loop of every measurement, streaming, interruptible, resumable, shared between processes.

Two phases. *Known*: what one pass gives exactly (the whole diagonal of a deterministic method; the Gauss-Newton part of
propagation). *Rounds*: replicates, a few at once, each summed over all batches before it is counted. The state is
sums only: one float64 vector per parameter for each group of replicates (plus one for each replicate under way).
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagonal import exact, hutchinson, reference
from ..diagonal.parts import Tensors, accumulate, zeros
from ..diagonal.propagation import Propagator
from ..diagonal.result import Diagonal
from ..errors import NonFiniteError, ResumeError
from ..norm import NormEstimate, Replicates, estimate
from ..objective import Objective
from ..signs import Signs
from ..sites import Linearisation, edge_shape
from ..stream import Batches, Numbered, Survey, numbered, watch
from . import resume as files
from .plan import KEEP_BYTES, Plan
from .world import World

SAVE_EVERY = 2.0
"""Seconds between two writes of the resume file, at least: a write that takes long is made more rarely."""
SAVE_SHARE = 20.0
"""Work is this much longer than the writes between which it is done."""


@dataclass(frozen=True)
class Event:
    """What a progress callback is told: a phase, how far in it, and the norm as far as it is known."""

    phase: str
    done: int
    total: int
    replicates: int
    estimate: NormEstimate | None
    seconds: float


Callback = Callable[[Event], None]


class Loop:
    """The state of one measurement; `known`, then `rounds` until `stop` says so."""

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        plan: Plan,
        survey: Survey,
        *,
        seed: int,
        world: World,
        invariant: bool,
        progress: Callback | None,
        resume: Path | None,
        identity: dict[str, Any],
    ) -> None:
        self.objective, self.batches, self.plan, self.survey = objective, batches, plan, survey
        self.seed, self.world, self.progress = seed, world, progress
        self.signs = Signs(seed, objective.device)
        self.begun = self._saved = time.monotonic()
        parameters = objective.parameters
        theta2 = {n: p.detach().square() for n, p in parameters.items()} if invariant else None
        exact_outer = plan.method == "propagation" and plan.gauss_newton == "exact"
        self.gauss_newton: Tensors | None = zeros(parameters) if plan.deterministic or exact_outer else None
        self.functional: Tensors | None = (
            zeros(parameters) if plan.deterministic or plan.method == "propagation" else None
        )
        self.streams = {
            name: Replicates(parameters, groups=plan.groups, weights=theta2, device=objective.device)
            for name in self._stream_names()
        }
        self.known_done = False
        self.done = 0
        self.history: list[tuple[int, float, float, float]] = []
        self._resume, self._identity = resume, identity
        self._partial: dict[str, Tensors] = {}
        self._position = 0
        self._prepared: Any = None
        self._torn = False
        self._pause = SAVE_EVERY
        if resume is not None and resume.exists():
            self._restore()
        self._same_everywhere()

    @property
    def has_known(self) -> bool:
        """Whether part of the diagonal comes exactly from one pass."""
        return self.functional is not None

    def offset(self, stream: str) -> Tensors | None:
        """What is known exactly besides the replicates of a stream ("total", "gauss_newton" or "functional").

        The Gauss-Newton part where it was taken exactly, the direct share of the functional part, and weight decay.
        """
        l2 = self.objective.l2 if stream != "functional" else 0.0
        parts = [
            sums
            for sums, kind in ((self.gauss_newton, "gauss_newton"), (self.functional, "functional"))
            if sums is not None and stream in ("total", kind)
        ]
        if not parts and not l2:
            return None
        out = zeros(self.objective.parameters)
        for part in parts:
            accumulate(out, part)
        for tensor in out.values() if l2 else ():
            tensor += l2
        return out

    def stream_of(self, part: str) -> Replicates | None:
        """The replicates that carry what is random of a part (the total's are the functional's where g is exact)."""
        if part in self.streams:
            return self.streams[part]
        return self.streams.get("functional") if part == "total" else None

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.monotonic() - self.begun

    def run_known(self) -> None:
        """The phase that needs one pass."""
        if not self.has_known or self.known_done:
            self.known_done = True
            return
        for position, batch in self._mine():
            with self._whole():
                self._known_batch(batch)
                self._after_batch(position + 1)
            self._save_in_time()
            self._tell(
                "exact part" if not self.plan.deterministic else self.plan.method,
                position + 1,
                self.survey.batches,
            )
        with self._whole(), undivided():
            for tensors in (self.gauss_newton, self.functional):
                self.world.sum_((tensors or {}).values())
                for name, tensor in (tensors or {}).items():
                    tensor /= self.survey.weight
                    if not bool(torch.isfinite(tensor).all()):
                        raise NonFiniteError(
                            f"the diagonal of {name!r} holds NaN or Inf: overflow in {self.objective.dtype}"
                        )
            self.known_done, self._position = True, 0
        self.save()

    def run_round(self, count: int) -> None:
        """`count` more replicates, one pass over the data."""
        numbers = range(self.done, self.done + count)
        if self._partial:  # a round taken up again keeps its size
            numbers = range(self.done, self.done + len(self._partial) // len(self.streams))
        else:
            self._partial = {f"{r}.{s}": zeros(self.objective.parameters) for r in numbers for s in self.streams}
        for position, batch in self._mine():
            with self._whole():
                for r in numbers:
                    if self.world.mine(position, self.survey.batches, r):
                        for stream, part in self._replicate(batch, r).items():
                            accumulate(self._partial[f"{r}.{stream}"], part)
                self._after_batch(position + 1)
            self._save_in_time()
            self._tell("replicates", position + 1, self.survey.batches)
        with self._whole(), undivided():
            for r in numbers:
                for stream, replicates in self.streams.items():
                    sums = self._partial.pop(f"{r}.{stream}")
                    self.world.sum_(sums.values())
                    for tensor in sums.values():
                        tensor /= self.survey.weight
                    replicates.add(sums, r)
            self.done = numbers.stop
            self._position = 0

    def current(self, confidence: float) -> NormEstimate:
        """The norm of the whole diagonal as it stands."""
        stream = self.stream_of("total")
        assert stream is not None
        total = estimate(stream, offset=self.offset("total"), confidence=confidence, sequential=True).total
        if self.history and self.history[-1][0] == total.replicates:  # looked at before, or taken up from a file
            self.history.pop()
        self.history.append((total.replicates, total.rms, total.low, total.high))
        return total

    def abandon_round(self) -> None:
        """Forget a round that was interrupted, and the graph that served it."""
        self._partial, self._position, self._prepared = {}, 0, None

    def diagonal(self, facts: dict[str, Any]) -> Diagonal:
        """The diagonal as it stands, its parts, and standard errors of the total."""
        kind, samples = self.plan.method, self.survey.samples
        if self.plan.deterministic:
            total, outer, inner = (self.offset(part) or {} for part in ("total", "gauss_newton", "functional"))
            errors = {name: torch.zeros_like(t) for name, t in total.items()}
            return Diagonal(total, outer, inner, errors, kind, samples, provenance=facts)
        stream = self.stream_of("total")
        assert stream is not None
        total = stream.mean(offset=self.offset("total"))
        random = self.streams.get("functional")
        inner = {} if random is None else random.mean(offset=self.offset("functional"))
        outer = {name: total[name] - inner[name] for name in inner}
        return Diagonal(
            total,
            outer,
            inner,
            stream.standard_error(),
            kind,
            samples,
            stream.count,
            status="estimate",
            provenance=facts,
        )

    def save(self) -> None:
        """Write the resume file now, if there is one and no batch is half counted."""
        if not self._torn:
            self._save()

    # -- one batch

    def _known_batch(self, batch: Numbered) -> None:
        plan = self.plan
        assert self.functional is not None
        if plan.method == "reference":
            assert self.gauss_newton is not None
            total, outer, _, _ = reference.batch_diagonal(
                self.objective,
                batch.inputs,
                batch.targets,
                index=batch.index,
                progress=self._inner("reference"),
            )
            accumulate(self.gauss_newton, outer)
            accumulate(self.functional, {name: total[name] - outer[name] for name in total})
            return
        linear = Linearisation(self.objective, batch.inputs, batch.targets, index=batch.index, balance=plan.balance)
        if plan.method == "exact":
            outer, inner = exact.batch_diagonal(linear, progress=self._inner("exact"))
            assert self.gauss_newton is not None
            accumulate(self.gauss_newton, outer)
            accumulate(self.functional, inner)
            return
        propagator = self._propagator(linear, batch)
        accumulate(self.functional, propagator.direct())
        if self.gauss_newton is not None:
            accumulate(self.gauss_newton, propagator.gauss_newton())

    def _replicate(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        if self.plan.method == "hutchinson":
            return self._hutchinson(batch, r)
        propagator = self._prepare(
            batch,
            lambda: self._propagator(
                Linearisation(
                    self.objective, batch.inputs, batch.targets, index=batch.index, balance=self.plan.balance
                ),
                batch,
            ),
        )
        functional: Tensors = propagator.functional(self.signs, r)
        if "total" not in self.streams:
            return {"functional": functional}
        outer = propagator.gauss_newton_signed(self.signs, r)
        return {
            "functional": functional,
            "gauss_newton": outer,
            "total": {name: functional[name] + outer[name] for name in outer},
        }

    def _hutchinson(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        products = self._prepare(
            batch,
            lambda: hutchinson.Products(
                self.objective, batch.inputs, batch.targets, index=batch.index, parts=self.plan.parts
            ),
        )
        v = hutchinson.probe(self.objective, self.signs, r)
        total = {name: (v[name] * hv).double() for name, hv in products.hessian(v).items()}
        if not self.plan.parts:
            return {"total": total}
        outer = {name: (v[name] * gv).double() for name, gv in products.gauss_newton(v).items()}
        return {"total": total, "gauss_newton": outer, "functional": {n: total[n] - outer[n] for n in total}}

    def _propagator(self, linear: Linearisation, batch: Numbered) -> Propagator:
        keep = self.survey.batches == 1 and _patch_bytes(linear) <= KEEP_BYTES
        propagator = Propagator(linear, start=batch.start, groups=self.plan.sample_groups, keep=keep)
        if self.survey.batches == 1:
            self._prepared = (batch.start, propagator)
        return propagator

    def _prepare(self, batch: Numbered, make: Callable[[], Any]) -> Any:
        """The graph of a batch, kept for all replicates of the batch (and for good if it is the only one)."""
        if self._prepared is None or self._prepared[0] != batch.start:  # one batch may have been cut in two
            self._prepared = None
            self._prepared = (batch.start, make())
        return self._prepared[1]

    # -- bookkeeping

    def _stream_names(self) -> list[str]:
        if self.plan.deterministic:
            return []
        if self.plan.method == "propagation":
            return ["functional"] if self.plan.gauss_newton == "exact" else ["total", "gauss_newton", "functional"]
        return ["total", "gauss_newton", "functional"] if self.plan.parts else ["total"]

    def _mine(self) -> Iterator[tuple[int, Numbered]]:
        """Batches of this process that are not yet in the sums."""
        few = self.survey.batches < self.world.size
        watched = watch(self.survey, numbered(self.objective, self.batches, align=self.plan.align))
        for position, batch in enumerate(watched):
            if position < self._position:
                continue
            if self.world.size == 1 or (few and self.known_done) or self.world.mine(position, self.survey.batches):
                yield position, batch

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is interrupted in here leaves sums that must not be saved: the file keeps the state before."""
        self._torn = True
        yield
        self._torn = False

    def _after_batch(self, position: int) -> None:
        self._position = position
        if self.survey.batches > 1:
            self._prepared = None
        if World.asked_to_stop and not self.known_done:
            raise KeyboardInterrupt

    def _save_in_time(self) -> None:
        """Within a round; several processes save between rounds only, when their sums have met."""
        if self.world.size == 1 and self._resume is not None and time.monotonic() - self._saved > self._pause:
            self._save()

    def _inner(self, phase: str) -> Callable[[int, int], None]:
        return lambda done, total: self._tell(phase, done, total)

    def _tell(self, phase: str, done: int, total: int, norm: NormEstimate | None = None) -> None:
        if self.progress is not None:
            self.progress(Event(phase, done, total, self.done, norm, self.seconds))

    def tell_norm(self, norm: NormEstimate) -> None:
        """Report the norm as it stands."""
        self._tell("norm", self.done, self.done, norm)

    def _save(self) -> None:
        several = self.world.size > 1
        if self._resume is None or self.world.rank != 0 or (several and not self.known_done and self._position):
            return
        begun = time.monotonic()
        tensors: dict[str, Tensor] = {}
        for label, sums in (("gauss_newton", self.gauss_newton), ("functional", self.functional)):
            tensors |= {f"known|{label}|{n}": t for n, t in (sums or {}).items()}
        for stream, replicates in self.streams.items():
            tensors |= {f"stream|{stream}|{k}": t for k, t in replicates.state_dict().items()}
        partial = {} if several else self._partial  # of several processes, each holds a share of its own
        for key, sums in partial.items():
            tensors |= {f"partial|{key}|{n}": t for n, t in sums.items()}
        progress = {
            "known_done": self.known_done,
            "done": self.done,
            "position": 0 if several else self._position,
            "partial": list(partial),
            "history": self.history,
            "plan": self.plan.to_dict(),
        }
        files.store(self._resume, identity=self._identity, progress=progress, tensors=tensors)
        self._saved = time.monotonic()
        self._pause = max(SAVE_EVERY, SAVE_SHARE * (self._saved - begun))

    def _restore(self) -> None:
        assert self._resume is not None
        _, progress, tensors = files.restore(self._resume, identity=self._identity)
        try:
            for label, sums in (("gauss_newton", self.gauss_newton), ("functional", self.functional)):
                for name, tensor in (sums or {}).items():
                    tensor.copy_(tensors[f"known|{label}|{name}"])
            for stream, replicates in self.streams.items():
                prefix = f"stream|{stream}|"
                replicates.load_state_dict({k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
            for key in progress["partial"]:
                self._partial[key] = {
                    n: tensors[f"partial|{key}|{n}"].to(self.objective.device) for n in self.objective.parameters
                }
            self.known_done, self.done = bool(progress["known_done"]), int(progress["done"])
            self._position = int(progress["position"])
            self.history = [tuple(row) for row in progress["history"]]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ResumeError(
                f"{self._resume}: does not hold what this measurement needs ({error}); remove it"
            ) from None
        if self.world.rank:  # what one process had begun is counted once: by the first
            unfinished = [] if self.known_done else [self.gauss_newton, self.functional]
            for part in [*unfinished, *self._partial.values()]:
                for tensor in (part or {}).values():
                    tensor.zero_()

    def _same_everywhere(self) -> None:
        """All processes must go on from one state: a resume file that only some of them see would mix two."""
        if self.world.size == 1 or self._resume is None:
            return
        mine = json.dumps([self.known_done, self.done, self._position, sorted(self._partial)])
        first = self.world.text_from_first(mine, self.objective.device)
        if self.world.agree(mine != first, self.objective.device):
            raise ResumeError(f"{self._resume}: not every process reads the same file; put it where all can")


def _patch_bytes(batch: Linearisation) -> int:
    """Bytes that the unfolded inputs of all convolutions take."""
    total = 0
    for layer in batch.layers:
        if layer.kind == "conv" and layer.weight:
            out = edge_shape((layer.node, 0))
            kernel = layer.node._saved_weight[0].numel() * layer.node._saved_groups
            total += kernel * out[0] * out[2:].numel() * batch.outputs.element_size()
    return total


@contextmanager
def undivided() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that all streams hold the same replicates."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
