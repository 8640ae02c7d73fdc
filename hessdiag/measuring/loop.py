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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hessdiag.errors import NonFiniteError, ResumeError
from hessdiag.kernels.tensors import accumulate, zeros
from hessdiag.measuring import resume as files
from hessdiag.measuring.ranks import World
from hessdiag.measuring.resume import identity_of
from hessdiag.measuring.totals import Sums
from hessdiag.methods import Case
from hessdiag.methods.batches import NEAR, Batches, Numbered, in_order, numbered, watch
from hessdiag.norm import NormEstimate
from hessdiag.problem.finite import all_finite
from hessdiag.problem.random_states import RandomStates

SAVE_EVERY = 2.0
"""Seconds between two writes of the resume file, at least: a write that takes long is made more rarely."""
SAVE_SHARE = 20.0
"""Work is this much longer than the writes between which it is done."""
MEET_EVERY = 0.5
"""Seconds after which several processes meet within a pass, about: to save, and to stop together."""


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
        drawn: RandomStates | None = None,
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
        self._met, self._turns, self._stride = self.begun, 0, 1
        self._first = drawn if case.survey.shuffled or not case.survey.checked else None
        self._next = None if self._first is None else RandomStates.now(self.batches)
        """Of the pass under way at its begin: what a loader that shuffles draws its order from."""
        self._trails: dict[int, float] = {}
        """Of this place, and of the next: a sum over the batches before it that tells their order."""
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
                found = self.work.known_parts(batch, self._inner(self.plan.method))
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
            self.known_done = True
            self._pass_done()
        self.case.outputs = None  # whether somebody took them or not
        self._stride = 1  # a batch of the rounds takes another time
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
                        for stream, part in self.work.drawn_streams(batch, r).items():
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
            self._pass_done()

    def abandon_round(self) -> None:
        """Forget a round that was interrupted, and the graph that served it."""
        self._partial, self._position = {}, 0
        self.work.forget()

    def save(self) -> None:
        """Write the resume file now, if there is one and no batch is half counted.

        Of several processes the first writes what all of them hold; within a pass they save when they meet.
        """
        if not self._torn and (self.world.size == 1 or not self._position):
            self._save()

    def meet(self, late: bool = False) -> bool:
        """Between two batches: save if it is time, and stop if any process was asked to (KeyboardInterrupt in all).

        True everywhere if any process is `late`. Every process must call it at the same place.
        """
        if self.world.size == 1:
            if World.asked_to_stop:
                raise KeyboardInterrupt
            return late
        now, first = time.monotonic(), self.world.rank == 0
        due = first and self._resume is not None and now - self._saved > self._pause
        turn = (now - self._met) / max(self._turns, 1)  # the first process's clock is everybody's
        stride = max(MEET_EVERY / max(turn, 1e-6), 1.0) if first else 0.0
        wishes = [float(due), float(World.asked_to_stop), float(late), stride]
        save, stop, late_anywhere, stride = self.world.sums(wishes, self.objective.device)
        self._turns, self._stride = 0, int(stride)
        if save or stop:
            self._save_together()
        self._met = time.monotonic()
        if stop:
            raise KeyboardInterrupt
        return late_anywhere > 0

    @property
    def goes_on(self) -> str | None:
        """What to say of work that was interrupted, if it was kept."""
        if self._resume is None or self.unsaved is not None:
            return None
        return f"{self._resume} holds what was done: the same command goes on from there"

    # -- bookkeeping

    def _mine(self) -> Iterator[tuple[int, Numbered]]:
        """Batches of this process that are not yet in the sums; after each turn of all processes they may meet."""
        size, count = self.world.size, self.survey.batches
        each = size == 1 or (count < size and self.known_done)
        if self._next is not None:
            self._next.put(self.batches)
        for position, batch in self._unsummed():
            if each or self.world.mine(position, count):
                yield position, batch
            self._position = position + 1
            if size > 1 and self._position < count and (each or self._position % size == 0):
                self._turns += 1
                if self._turns >= self._stride:
                    self.meet()

    def _unsummed(self) -> Iterator[tuple[int, Numbered]]:
        """Batches that are not yet in the sums: those after the first so many, if these are the ones that are in them.

        Else, as where the order comes from nowhere that is known, the pass begins anew: its sums from zero.
        """
        begun, wanted, trail = self._position, self._trails.get(self._position), 0.0
        watched = watch(self.survey, numbered(self.objective, self.batches, align=self.plan.align))
        for position, batch in enumerate(watched):
            before, trail = trail, trail if self._resume is None else trail + in_order(batch)
            if position >= begun:
                self._trails = {position: before, position + 1: trail}
                yield position, batch
            elif position + 1 == begun:
                other = wanted is None or not abs(trail - wanted) <= NEAR * self.survey.data_size
                if self.world.agree(other, self.objective.device):
                    self._begin_pass_anew()
                    yield from self._unsummed()
                    return

    def _begin_pass_anew(self) -> None:
        self._position = 0
        self._clear_pass()

    def _clear_pass(self) -> None:
        """Take what an unfinished pass has begun out of the sums."""
        if not self.known_done:
            self.known = {}
        for part in self._partial.values():
            for tensor in part.values():
                tensor.zero_()

    def _pass_done(self) -> None:
        self._position, self._trails = 0, {}
        if self._next is not None:
            self._next = RandomStates.now(self.batches)

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

    def _save_in_time(self) -> None:
        """Within a pass of one process; several save when they meet."""
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

    def _save_together(self) -> None:
        """Within a pass, each process holds a share of what is under way: the first writes their sums."""
        if self._resume is None:
            return
        begun, met = time.monotonic(), {}
        for name, share in self.shares():
            self.world.sum_([total := share.clone()])
            if self.world.rank == 0:
                met[name] = total
        self._save(met, begun=begun)

    def _save(self, met: Mapping[str, Tensor] | None = None, *, begun: float | None = None) -> None:
        if self._resume is None or self.world.rank != 0:
            return
        begun, alone = begun or time.monotonic(), self.world.size == 1
        place = self.place(partial=alone or met is not None)
        if place["position"] and self._position in self._trails:  # a file of before may have had none
            place["trail"] = self._trails[self._position]
        if self._first is not None and self._next is not None:
            place["random"] = {"first": self._first.plain(), "next": self._next.plain()}
        tensors = self.tensors(partial=alone) | dict(met or {})
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
        _, place, tensors = files.restore(self._resume, identity=self._identity, off=files.off_by(self.case))
        try:
            self.load(tensors, place)
            if "trail" in place:
                self._trails = {self._position: place["trail"]}
        except (KeyError, TypeError, RuntimeError) as error:
            raise ResumeError(
                f"{self._resume}: does not hold what this measurement needs ({error}); remove it"
            ) from None
        if self._next is not None and "random" in place:
            self._next = put_back(self._resume, place["random"].get("next"), self.batches)
        if self.world.rank:  # what one process had begun is counted once: by the first
            self._clear_pass()

    def _same_everywhere(self) -> None:
        """All processes must go on from one state: a resume file that only some of them see would mix two."""
        if self.world.size == 1 or self._resume is None:
            return
        mine = json.dumps([self.known_done, self.done, self._position, sorted(self._partial)])
        first = self.world.text_from_first(mine, self.objective.device)
        if self.world.agree(mine != first, self.objective.device):
            raise ResumeError(f"{self._resume}: not every process reads the same file; put it where all can")


def first_states(path: Path, progress: Mapping[str, Any], batches: Batches) -> RandomStates:
    """What a loader that shuffles draws from at the begin, set back to what it was when the file was begun."""
    if "random" in progress:
        return put_back(path, progress["random"].get("first"), batches)
    return RandomStates.now(batches)


def put_back(path: Path, stored: Any, batches: Batches) -> RandomStates:
    """Random states from a file, set."""
    try:
        states = RandomStates.from_plain(stored)
        states.put(batches)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ResumeError(f"{path}: damaged: its random states are none ({error}); remove it") from None
    return states


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
