"""The processes of a torchrun: joined with a time limit, left in order, and told when one is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from hessdiag.errors import DistributedError
from hessdiag.measuring.ranks import World

PATIENCE = 2.0
"""Seconds after which a second Ctrl-C is meant: a terminal and torchrun both send the first."""
_asked_at = 0.0


@contextmanager
def joined(device: str, timeout: float) -> Iterator[World]:
    """The world that torchrun describes, or a single process; a lost process is an error, never a wait for ever."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        with told_as_ctrl_c():
            yield World.current()
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DistributedError(f"the processes did not meet within {timeout:g} s ({reason})") from error
    before = [signal.signal(signal.SIGTERM, _told_to_stop), signal.signal(signal.SIGINT, _interrupted)]
    try:
        yield World.current()
    except DistributedError:
        # Torchrun's SIGTERM must not end this process before its error is told, nor may leaving wait for the dead.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except KeyboardInterrupt:  # all of them end now, and torchrun tells each to as soon as one has
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        World.asked_to_stop = World.stops_together = False
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])
    dist.destroy_process_group()


def leave_lost(code: int) -> None:
    """End at once where another process is lost: an orderly exit would wait for it."""
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def told_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, which a queue sends some time before the end, is for one process what Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_ctrl_c(_number: int, _frame: FrameType | None) -> None:
    if callable(signal.getsignal(signal.SIGINT)):  # which may have to wait until sums agree
        signal.raise_signal(signal.SIGINT)
    else:  # in the background of a shell Ctrl-C is ignored
        raise KeyboardInterrupt


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C: all processes stop after the same batch; a second one a while later stops this one at once."""
    global _asked_at
    now = time.monotonic()
    if World.asked_to_stop and now - _asked_at > PATIENCE:
        raise KeyboardInterrupt
    if not World.asked_to_stop:
        World.asked_to_stop, _asked_at = True, now


def _told_to_stop(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM, of a queue through torchrun, or as torchrun ends the others when one process died.

    Where there is something to lose it is Ctrl-C: if another one died, that is found out when the processes meet.
    """
    if World.stops_together:
        World.asked_to_stop = True
        return
    raise DistributedError(
        "told to stop, as happens when another process died; start the job again (with --resume it continues)"
    )
