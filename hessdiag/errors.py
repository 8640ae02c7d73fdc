"""Every refusal of this project: one base class, each message saying what, where and what to do instead.

`HessdiagError` is what a caller catches; `str(error)` is one line fit for a terminal.
"""

from __future__ import annotations


class HessdiagError(Exception):
    """Base class of every error this project raises on purpose."""


class ConfigurationError(HessdiagError, ValueError):
    """An argument or option has no meaning: probes < 2, rtol <= 0, an unknown name, conflicting choices."""


class UnknownNameError(ConfigurationError):
    """A name is in no registry; the message lists the known ones and the nearest."""


class EmptyDataError(HessdiagError, ValueError):
    """No batches, or batches without samples."""


class NoParametersError(HessdiagError, ValueError):
    """Nothing to differentiate: no parameter, none that requires a gradient, or none that was chosen exists."""


class TargetError(HessdiagError, ValueError):
    """Targets do not fit the loss or the outputs: out of range, wrong shape, wrong type."""


class DtypeError(HessdiagError, TypeError):
    """Inputs and parameters differ in dtype, or the dtype cannot carry the computation."""


class DeviceError(HessdiagError, ValueError):
    """Inputs and parameters live on different devices, or the device is not there."""


class NonFiniteError(HessdiagError, ArithmeticError):
    """NaN or Inf in a parameter, an activation or a loss; the message names the layer and the batch."""


class NotDeterministicError(HessdiagError, ValueError):
    """Two passes over the data disagree; the message says whether the data or the model changed."""


class StochasticModeError(HessdiagError, ValueError):
    """BatchNorm or dropout in training mode: the loss is then no mean over samples. Refused by every method."""


class UncoveredModelError(HessdiagError, NotImplementedError):
    """The site identity does not cover the model; the message names the operation and where it stands."""


class AuditError(HessdiagError, AssertionError):
    """A measurement's own check failed: the identity or a layer's formula disagrees with autograd."""


class BudgetError(HessdiagError, ValueError):
    """The work asked for costs more than the stated budget; the message names a cheaper method."""


class OutOfMemoryError(HessdiagError, MemoryError):
    """Memory ran out; the message says what to lower."""


class CheckpointError(HessdiagError, ValueError):
    """A checkpoint file is missing, corrupt, hostile, or of another network."""


class DataError(HessdiagError, ValueError):
    """A data set is missing, corrupt or of the wrong shape; the message says where to put it or how to get it."""


class ResumeError(HessdiagError, ValueError):
    """A resume file belongs to another measurement, or cannot be read."""


class DistributedError(HessdiagError, RuntimeError):
    """Another process of the same measurement died or fell out of step."""


class StoreError(HessdiagError, ValueError):
    """A result store is unwritable, foreign or of a version that cannot be read."""


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out: an exception of Python, of CUDA, or of torch's allocator, which has no class for it."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)


def nearest(name: str, known: list[str]) -> str:
    """A sentence listing `known`, with the name nearest to `name` first: for messages about unknown names."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
