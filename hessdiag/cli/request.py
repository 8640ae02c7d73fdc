"""What `hessdiag measure` was asked for: plain values, checked for contradictions before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hessdiag.errors import ConfigurationError
from hessdiag.store import files


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of one measurement, as typed."""

    checkpoint: str | None
    network: str | None
    activation: str | None
    num_classes: int | None
    model: str | None
    weights: str | None
    key: str | None
    prefix: str | None
    output: str | None
    forward: str | None
    normalize: str | None
    data: str | None
    inputs: str | None
    targets: str | None
    split: str
    samples: int | None
    data_seed: int
    data_root: Path | None
    batch_size: int | None
    loss: str
    label_smoothing: float
    ignore_index: int
    shift: int | None
    l2: float
    layers: str | None
    attack: str | None
    method: str
    rtol: float
    confidence: float
    min_replicates: int
    max_replicates: int
    max_seconds: float | None
    target: str
    seed: int
    plan: Path | None
    device: str
    dtype: str | None
    spread: bool
    resume: Path | None
    save_diagonal: Path | None
    json: str | None
    html: Path | None
    quiet: bool
    dry_run: bool
    timeout: float

    @property
    def source(self) -> str:
        """Where the weights come from: what was named, the folder of --model hf:DIR, or the shipped example."""
        if self.checkpoint is not None:
            return self.checkpoint
        if self.model is None:
            return "digits-example"
        scheme, colon, _ = self.model.partition(":")
        if colon and scheme == "hf":
            return self.model
        raise ConfigurationError(
            f"--model {self.model} needs weights: hessdiag measure WEIGHTS.pt --model {self.model}"
        )

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        outputs = {"--save-diagonal": self.save_diagonal, "--html": self.html, "--resume": self.resume}
        if self.json not in (None, "-"):
            outputs["--json"] = Path(self.json)
        for option, path in outputs.items():
            if path is not None:
                check_writable(path, option)
        if self.resume is not None and self.target == "population":
            raise ConfigurationError("--resume serves --target data only: the population target is one pass")
        if self.model is not None:
            told = {"network": self.network, "activation": self.activation, "num-classes": self.num_classes}
            if idle := [f"--{name}" for name, value in told.items() if value is not None]:
                raise ConfigurationError(f"--model builds the whole network: leave out {' and '.join(idle)}")
        if not self.timeout > 0:
            raise ConfigurationError(f"--timeout {self.timeout}: a positive number of seconds is needed")


def check_writable(path: Path, option: str) -> None:
    """Refuse an output path now rather than after hours of work."""
    try:
        files.check_writable(path)
    except files.BadFileError as reason:
        raise ConfigurationError(f"{option} {path}: {reason}") from None
