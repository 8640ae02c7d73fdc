"""The directory of one run: config.json, metrics.jsonl, last.pt, state.pt, result.json, each whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from experiments.config import TrainConfig
from experiments.fields import storable
from experiments.splitnorm import plain_state
from experiments.trainer.precision import Precision, stored
from experiments.trainer.rig import Rig
from experiments.trainer.state import FORMAT, Standing, read_state, write_state
from hessdiag.checkpoint import save_checkpoint
from hessdiag.errors import CheckpointError, ResumeError
from hessdiag.store import states
from hessdiag.store.files import BadFileError, clear_stale, read_json, write_bytes


class Folder:
    """Where a run writes. Every write is atomic: killed or out of space, the file before it stands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, config: TrainConfig) -> None:
        """Make the directory, or see that it belongs to this very configuration."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            clear_stale(self.path)
        except OSError as error:
            raise ResumeError(f"{self.path}: cannot be used ({error.strerror or error})") from None
        mine = {"key": config.key(), "config": config.to_dict()}
        there = self.read_json("config.json")
        if there is None:
            self.write_json("config.json", mine)
        elif there.get("key") != mine["key"]:
            raise ResumeError(
                f"{self.path}: holds a run of another configuration ({differing(there.get('config'), config)}); "
                "use another directory"
            )

    def precision(self, config: TrainConfig) -> Precision | None:
        """What was chosen for this run by a timed step, if it was."""
        return stored((self.read_json("config.json") or {}).get("precision"), config)

    def keep_precision(self, chosen: Precision) -> None:
        """Put the choice beside the configuration, before the first step; the run goes on with it after a stop."""
        self.write_json("config.json", {**(self.read_json("config.json") or {}), "precision": chosen.to_dict()})

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The table in a JSON file, None where there is none."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            content = read_json(path)
        except BadFileError as error:
            raise ResumeError(f"{path}: cannot be read ({error}); delete it or use another directory") from None
        if not isinstance(content, dict):
            raise ResumeError(f"{path}: no table; delete it or use another directory")
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Put a table there in one step."""
        text = json.dumps(storable(content), indent=1, sort_keys=True, allow_nan=False) + "\n"
        self._write(name, text.encode())

    def save(self, rig: Rig, standing: Standing) -> None:
        """Metrics, the network as others load it, and what the run needs to go on."""
        try:
            rows = [json.dumps(storable(row), sort_keys=True, allow_nan=False) for row in standing.history]
            self._write("metrics.jsonl", "".join(f"{row}\n" for row in rows).encode())
            self.save_network(rig, standing)
            write_state(self.path / "state.pt", rig, standing)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self.safe()} See to the disk and start the same command again") from None

    def safe(self) -> str:
        """A sentence about the last good checkpoint."""
        path = self.path / "last.pt"
        if not path.exists():
            return "No checkpoint had been written yet."
        state = self.path / "state.pt"
        epoch = self._epoch_of(state) if state.exists() else 0
        return f"The last good checkpoint, of epoch {epoch}, is {path}."

    def save_network(self, rig: Rig, standing: Standing) -> None:
        """last.pt: the plain network, averaged weights beside it where there are any; best.pt: the selected epoch."""
        config, average = rig.config, rig.average.state
        own: Any = rig.network.config
        norms = changed_eps(rig)
        last = standing.history[-1] if standing.history else {}
        about: dict[str, Any] = {
            # With eps other than the network's own a builder by name would be wrong in silence.
            "config": {} if norms else own,
            "training": config.to_dict(),
            "key": config.key(),
            "eps": config.eps,
            "bn_eps": norms,
            "network": dict(own),
        }
        ema = None if average is None else plain_state(average)
        save_checkpoint(
            self.path / "last.pt", rig.network, ema=ema, epoch=standing.epoch, metrics=storable(last), **about
        )
        if standing.best is not None:
            metrics = {"held_out_pgd": standing.best["pgd"]}
            epoch, state = standing.best["epoch"], standing.best["state"]
            save_checkpoint(self.path / "best.pt", state, epoch=epoch, metrics=metrics, **about)

    def resume(self, rig: Rig) -> Standing:
        """Where the run stands, the rig put there; the beginning if nothing was saved."""
        standing = read_state(self.path / "state.pt", rig)
        return standing or Standing()

    def _epoch_of(self, path: Path) -> int:
        try:
            return int(states.read_state(path, FORMAT)["epoch"])
        except (BadFileError, KeyError, TypeError, ValueError):
            return 0

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_bytes(self.path / name, content)
        except BadFileError as reason:
            raise CheckpointError(f"{self.path / name}: {reason}") from None


def changed_eps(rig: Rig) -> dict[str, float]:
    """BatchNorms whose eps is not torch's 1e-5, by name: the control changes it."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms = ((name, module) for name, module in rig.network.named_modules() if isinstance(module, kinds))
    return {name: module.eps for name, module in norms if module.eps != 1e-5}


def differing(there: Any, config: TrainConfig) -> str:
    """The first entries in which a stored configuration differs."""
    if not isinstance(there, Mapping):
        return "unreadable"
    mine = config.to_dict()
    keys = [key for key in sorted({*mine, *there}) if mine.get(key) != there.get(key)]
    shown = [f"{key} {there.get(key)!r} there, {mine.get(key)!r} here" for key in keys[:3]]
    return ", ".join(shown) or "an older version"
