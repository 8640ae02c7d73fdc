"""In which precision and memory layout a run computes: given by its configuration, or chosen once by timing a step.

bfloat16 concerns the forward and backward passes of training and of the attack within it, and the looks at watched and
held-out images. Weights, running statistics, loss and optimiser are in the configuration's own type, and so is all that
is stored as a verdict: clean accuracy, evaluations under attack, norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.config import AUTO, TrainConfig
from hessdiag.errors import ConfigurationError


@dataclass(frozen=True)
class Precision:
    """What is settled before the first step; `step_seconds` says what each candidate took, where it was timed."""

    autocast: str = "none"
    channels_last: bool = False
    step_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables: "bfloat16, channels_last"."""
        return f"{'float' if self.autocast == 'none' else self.autocast}, {layout(self.channels_last)}"

    @property
    def note(self) -> str:
        """One line on what was timed."""
        times = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in self.step_seconds.items())
        return f"computes in {self.name}: a step took {times}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the run's directory."""
        times = {name: float(f"{seconds:.4g}") for name, seconds in self.step_seconds.items()}
        return {"autocast": self.autocast, "channels_last": self.channels_last, "step_seconds": times}

    def described(self, config: TrainConfig) -> dict[str, Any]:
        """The same for a record, with the types of what is not touched by it."""
        training = config.dtype if self.autocast == "none" else f"{self.autocast} autocast"
        own = {"weights": config.dtype, "training": training, "evaluation": config.dtype}
        return own | {key: value for key, value in self.to_dict().items() if key != "autocast"}


def layout(channels_last: bool) -> str:
    """The memory layout's name."""
    return "channels_last" if channels_last else "contiguous"


def candidates(config: TrainConfig) -> list[Precision]:
    """What the configuration leaves open, the plain one first."""
    half = [config.autocast]
    if config.autocast == AUTO:  # which leaves float64 alone
        half = ["none", "bfloat16"] if config.dtype == "float32" else ["none"]
    last = [False, True] if config.channels_last == AUTO else [bool(config.channels_last)]
    return [Precision(autocast, channels_last) for autocast in half for channels_last in last]


def given(config: TrainConfig) -> Precision:
    """What the configuration says, refused where it leaves the choice to a timed step."""
    found = candidates(config)
    if len(found) > 1:
        raise ConfigurationError("autocast or channels_last is 'auto': a step must be timed first (train() does)")
    return found[0]


def stored(table: Any, config: TrainConfig) -> Precision | None:
    """The choice that a run's directory holds; None where it is not one of this configuration's."""
    if not isinstance(table, Mapping):
        return None
    chosen = Precision(table.get("autocast", ""), table.get("channels_last", False), {})
    if chosen not in candidates(config):
        return None
    times = table.get("step_seconds")
    return Precision(chosen.autocast, chosen.channels_last, dict(times) if isinstance(times, Mapping) else {})
