"""What a sweep will cost, said before it starts: from runs of the same kind, or from a pilot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from experiments.sweep.keys import RunConfig
from hessdiag.errors import BudgetError
from hessdiag.show.text import counted

Timing = tuple[RunConfig, float]


@dataclass(frozen=True)
class Estimate:
    """`seconds` is the work of the runs that are left, on one worker each; `unknown` runs have no timing.

    `failed` runs have no retry left: they are neither done nor to do.
    """

    runs: int
    done: int
    seconds: float
    source: str
    unknown: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        """How many runs are to do."""
        return self.runs - self.done - self.failed

    def wall(self, workers: int) -> float:
        """Seconds until the last run ends, if the workers do not disturb each other."""
        return self.seconds / max(1, min(workers, self.left)) if self.left else 0.0

    def sentence(self, workers: int) -> str:
        """What the command prints before it starts."""
        left = self.left
        if self.done == self.runs:
            return f"{counted(self.runs, 'run')}, all done"
        failed = f"{self.failed} failed (--retries tries them again), " if self.failed else ""
        text = f"{counted(self.runs, 'run')}, {self.done} done, {failed}{left} to do"
        if not left:
            return text
        if self.unknown == left:
            return f"{text}; no timing of such runs yet: the first run done will tell"
        if self.unknown:
            text += f" ({self.unknown} of a kind not timed yet)"
        each = duration(self.seconds / max(1, left - self.unknown))
        return f"{text}; about {each} each ({self.source}), {duration(self.wall(workers))} on {workers} workers"


def estimate(
    runs: Sequence[RunConfig],
    done: Iterable[str],
    timings: Iterable[tuple[str, Sequence[Timing]]],
    *,
    failed: Iterable[str] = (),
    pilot: Callable[[RunConfig], float | None] | None = None,
) -> Estimate:
    """Cost of `runs` that are not in `done` nor in `failed`, from the first source that timed runs of the family."""
    finished, lost = set(done), set(failed)
    known: dict[str, tuple[float, str]] = {}
    for source, entries in timings:
        groups: dict[str, list[float]] = {}
        for config, seconds in entries:
            groups.setdefault(config.family, []).append(seconds)
        for family, values in groups.items():
            known.setdefault(family, (statistics.fmean(values), f"{source}: {counted(len(values), 'run')}"))
    seconds, unknown, sources, tried = 0.0, 0, dict[str, None](), set[str]()
    for run in runs:
        if run.key in finished | lost:
            continue
        if run.family not in known and pilot is not None and run.family not in tried:
            tried.add(run.family)
            if (timed := pilot(run)) is not None:
                known[run.family] = (timed, "a pilot")
        if run.family in known:
            seconds += known[run.family][0]
            sources[known[run.family][1]] = None
        else:
            unknown += 1
    ready, over = (sum(run.key in keys for run in runs) for keys in (finished, lost))
    return Estimate(len(runs), ready, seconds, "; ".join(sources), unknown, over)


def check_budget(cost: Estimate, workers: int, minutes: float | None) -> None:
    """Refuse a sweep that costs more than the stated budget, or nobody knows how much."""
    if minutes is None:
        return
    if cost.unknown:
        unknown = counted(cost.unknown, "run")
        raise BudgetError(f"--budget {minutes:g}: {unknown} not timed yet; the pilot would time one")
    if cost.wall(workers) > 60 * minutes:
        raise BudgetError(
            f"the sweep needs about {duration(cost.wall(workers))}, more than --budget {minutes:g} min; "
            "take more workers, fewer seeds (--seeds 0) or a smaller tier"
        )


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 40 s, 12 min, 3.5 h, 2.1 d."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"
