"""What every run of a sweep would stumble over, looked at once before the first begins: its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from experiments.config import TrainConfig
from experiments.sweep.grid import Sweep
from experiments.train import load_sets
from experiments.trainer.loop import check_held_out
from hessdiag.errors import ConfigurationError, DataError


def check(sweeps: Iterable[Sweep], *, tell: Callable[[str], object] | None = None) -> None:
    """Load each data set that the runs name; `tell` is told what is missing where it need not be here.

    A name that means nothing and a set of which all is held out are refused in any case.
    """
    seen = set()
    for sweep in sweeps:
        for run in sweep.runs:
            wanted = tuple(run.train[name] for name in ("data", "train_samples", "data_seed", "held_out"))
            if wanted in seen:
                continue
            seen.add(wanted)
            try:
                training, _ = load_sets(settings := TrainConfig.from_dict(run.train))
                check_held_out(len(training), settings)
            except DataError as error:
                if tell is None:
                    raise DataError(f"sweep {sweep.name}: {error}") from error
                tell(f"note: sweep {sweep.name}: {error}")
            except ConfigurationError as error:
                raise type(error)(f"sweep {sweep.name}: {error}") from error
