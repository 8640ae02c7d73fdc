"""One live line on standard error while a run trains."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Reporter:
    """What the loop tells while it runs; this one says nothing."""

    def note(self, text: str) -> None:
        """Something to know of how the run computes."""

    def step(self, epoch: int, step: int) -> None:
        """A step was made; called often, must not wait for the device."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """An epoch has ended."""


def line(metrics: Mapping[str, Any], epochs: int) -> str:
    """`epoch 3/30  loss 1.234  5,120 img/s  clean 81.2%  PGD 54.7%`."""
    parts = [f"epoch {metrics['epoch']}/{epochs}", f"loss {metrics['loss']:.3f}"]
    parts.append(f"{metrics['images_per_second']:,.0f} img/s")
    for name, label in (("clean", "clean"), ("pgd", "PGD")):
        if metrics.get(name) is not None:
            parts.append(f"{label} {100 * metrics[name]:.1f}%")
    return "  ".join(parts)


class _Plain(Reporter):
    """A line per epoch, where standard error is no terminal."""

    def __init__(self, label: str, epochs: int) -> None:
        self.epochs = epochs
        print(label, file=sys.stderr)

    def note(self, text: str) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Print the line: steps have none."""
        print(line(metrics, self.epochs), file=sys.stderr, flush=True)


class _Live(Reporter):
    """A bar with the last epoch's numbers."""

    def __init__(self, bar: Any, label: str, epochs: int, steps: int, done: int) -> None:
        self.bar, self.epochs, self.steps = bar, epochs, steps
        self.task = bar.add_task(label, total=epochs * steps, completed=done * steps, seen=f"epoch {done}/{epochs}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)

    def step(self, epoch: int, step: int) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=(epoch - 1) * self.steps + step + 1)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Show the epoch's numbers."""
        self.bar.update(self.task, seen=line(metrics, self.epochs))


@contextmanager
def reporting(show: bool, label: str, *, epochs: int, steps: int, done: int) -> Iterator[Reporter]:
    """A reporter for one run: silent, plain lines, or a live bar on a terminal."""
    if not show:
        yield Reporter()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Plain(label, epochs)
        return
    texts = TextColumn("{task.description}"), TextColumn("{task.fields[seen]}")
    columns = [texts[0], BarColumn(20), texts[1], TimeRemainingColumn()]
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        yield _Live(bar, label, epochs, steps, done)
