"""What `hessdiag measure` was asked for: plain values, checked for contradictions before any work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hessdiag.errors import ConfigurationError


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

    def inputs_read(self) -> dict[str, str | Path | None]:
        """What is read, by what it is, as far as it has a path of its own."""
        from hessdiag.checkpoint.pretrained import SCHEME
        from hessdiag.data.load import SCHEMES
        from hessdiag.examples import example_path

        source = self.source.removeprefix(SCHEME)
        scheme, colon, rest = (self.data or "").partition(":")
        model = self.model or ""
        return {
            f"the checkpoint {source}": source if os.path.exists(source) else example_path(source),
            f"the model {model}": model.removeprefix(SCHEME) if model.startswith(SCHEME) else None,
            f"the data {self.data}": os.path.expanduser(rest) if colon and scheme in SCHEMES else None,
            "the plan": self.plan,
        }

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        from hessdiag.cli.places import check_places

        outputs = {
            "--json": self.json,
            "--html": self.html,
            "--save-diagonal": self.save_diagonal,
            "--resume": self.resume,
        }
        check_places(outputs, self.inputs_read())
        if self.resume is not None and self.target == "population":
            raise ConfigurationError("--resume serves --target data only: the population target is one pass")
        if self.model is not None:
            told = {"network": self.network, "activation": self.activation, "num-classes": self.num_classes}
            if idle := [f"--{name}" for name, value in told.items() if value is not None]:
                raise ConfigurationError(f"--model builds the whole network: leave out {' and '.join(idle)}")
        if not self.timeout > 0:
            raise ConfigurationError(f"--timeout {self.timeout}: a positive number of seconds is needed")
