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

from hessdiag.errors import NonFiniteError, ResumeError
from hessdiag.kernels.tensors import accumulate, zeros
from hessdiag.measuring import resume as files
from hessdiag.measuring.ranks import World
from hessdiag.measuring.resume import identity_of
from hessdiag.measuring.totals import Sums
from hessdiag.methods import Case
from hessdiag.methods.batches import Numbered, numbered, watch
from hessdiag.norm import NormEstimate
from hessdiag.problem.finite import all_finite

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


class Loop(Sums):
    """One measurement under way: `run_known`, then `run_round` until the caller has enough."""

    def __init__(
        self,
        case: Case,
        *,
        invariant: bool = True,
        progress: Callback | None = None,
        resume: Path | None = None,
    ) -> None:
        super().__init__(case, invariant=invariant)
        if not self.method.sites:
            case.read = None  # a graph that nobody will use
        self.batches, self.world, self.progress = case.batches, case.world, progress
        self.work = self.method.work(case)
        self.begun = self._saved = time.monotonic()
        self._resume, self._identity = resume, {} if resume is None else identity_of(case)
        self._torn = False
        self.unsaved: str | None = None
        """Why the resume file is older than what was done, if it is."""
        self._pause = SAVE_EVERY
        self._kept = resume is not None and resume.exists()
        if self._kept:
            self._restore()
        self._same_everywhere()

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
                found = self.work.known(batch, self._inner(self.plan.method))
                self.add_known(found, own=self.work.hands_over)
                self._after_batch(batch, position + 1)
            self._save_in_time()
            phase = self.plan.method if self.method.deterministic else "exact part"
            self._tell(phase, position + 1, self.survey.batches)
        with self._whole(), undivided():
            for part in self.method.known(self.plan):
                if part not in self.known:  # no batch was this process's
                    self.known[part] = zeros(self.objective.parameters)
                elif self.world.size > 1 and not self._own:
                    self.known[part] = {name: t.clone() for name, t in self.known[part].items()}
                self.world.sum_(self.known[part].values())
            self._own = self._own or self.world.size > 1
            self.divide_known()
            for part in self.method.known(self.plan):
                for name, tensor in self.known[part].items():
                    if not all_finite(tensor):
                        raise NonFiniteError(
                            f"the diagonal of {name!r} holds NaN or Inf: overflow in {self.objective.dtype}"
                        )
            self.known_done, self._position = True, 0
        self.case.outputs = None  # whether somebody took them or not
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
                        for stream, part in self.work.replicate(batch, r).items():
                            accumulate(self._partial[f"{r}.{stream}"], part)
                self._after_batch(batch, position + 1)
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
            self.case.outputs = None
            self._position = 0

    def abandon_round(self) -> None:
        """Forget a round that was interrupted, and the graph that served it."""
        self._partial, self._position = {}, 0
        self.work.forget()

    def save(self) -> None:
        """Write the resume file now, if there is one and no batch is half counted."""
        if not self._torn:
            self._save()

    # -- bookkeeping

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

    def _after_batch(self, batch: Numbered, position: int) -> None:
        self._position = position
        if self.survey.batches > 1:
            self.work.spare(batch)
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
        # Of several processes, each holds a share of its own of what is under way: that is not saved.
        place, tensors = self.place(partial=not several), self.tensors(partial=not several)
        try:
            files.store(self._resume, identity=self._identity, progress=place, tensors=tensors)
            self.unsaved, self._kept = None, True
        except ResumeError as error:
            if not self._kept:  # little is lost yet, and nothing could be kept
                raise
            self.unsaved = f"{files.UNSAVED}: {error}"
        self._saved = time.monotonic()
        self._pause = max(SAVE_EVERY, SAVE_SHARE * (self._saved - begun))

    def _restore(self) -> None:
        assert self._resume is not None
        _, place, tensors = files.restore(self._resume, identity=self._identity)
        try:
            self.load(tensors, place)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ResumeError(
                f"{self._resume}: does not hold what this measurement needs ({error}); remove it"
            ) from None
        if self.world.rank:  # what one process had begun is counted once: by the first
            if not self.known_done:
                self.known = {}
            for part in self._partial.values():
                for tensor in part.values():
                    tensor.zero_()

    def _same_everywhere(self) -> None:
        """All processes must go on from one state: a resume file that only some of them see would mix two."""
        if self.world.size == 1 or self._resume is None:
            return
        mine = json.dumps([self.known_done, self.done, self._position, sorted(self._partial)])
        first = self.world.text_from_first(mine, self.objective.device)
        if self.world.agree(mine != first, self.objective.device):
            raise ResumeError(f"{self._resume}: not every process reads the same file; put it where all can")


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
