"""What a run records along its epochs: accuracies, norms, traces, and the noise of a training step.

After each of the chosen epochs, on a copy of the live weights in eval mode: clean and PGD accuracy on fixed images of
the training set (those trained on) and of the test set, image by image; the rms norm of the Hessian's diagonal of the
clean and of the adversarial loss, on fixed training images; and of the adversarial loss, at PGD images made anew for
these weights, the Gauss-Newton trace, tr(C) and tr(HC) (see `experiments.noise`), and ½ tr(HΣ) both for one step
and at rest, with the learning rate that the epoch ended with. C is that of batches as large as training's, without
augmentation. Each epoch leaves a sealed file that names the weights it saw: a run that is interrupted and repeats an
epoch keeps what it has, and what belongs to other weights is measured again.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.attacks import evaluate
from experiments.noise import dealt, gauss_newton_trace, noise
from experiments.sweep.clock import Clock
from experiments.sweep.keys import RunConfig
from experiments.sweep.norms import crafted, estimated
from experiments.sweep.records import Record, norm_record, outcomes, proportion
from experiments.sweep.seals import DamagedError, sealed, unsealed
from experiments.sweep.settings import LOSSES
from hessdiag import Objective
from hessdiag.data import DataSet
from hessdiag.errors import StoreError
from hessdiag.store.files import BadFileError, read_json, replace_file
from hessdiag.store.states import digest

SPLIT_UP = ("groups", "invariant_groups", "layers")  # left to the measurement at the end


class Along:
    """Looks at a network after chosen epochs; for `train(look=)`."""

    def __init__(self, config: RunConfig, folder: Path, sets: tuple[DataSet, DataSet], device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.settings = config.along
        training, test = sets
        count, seed = self.settings["images"], self.settings["samples_seed"]
        self.images = {
            name: data.sample(min(count, len(data)), seed=seed) for name, data in (("train", training), ("test", test))
        }
        self.size = int(config.train["batch_size"])
        self.measured, self.others = dealt(
            training, self.settings["samples"], self.settings["batches"], self.size, seed=seed
        )

    def __call__(self, epoch: int, lr: float, network: nn.Module) -> None:
        """Record the epoch, if it is one of those chosen and not known for these very weights."""
        if epoch not in self.settings["epochs"]:
            return
        weights = digest(*network.state_dict().values())
        known = self._read(epoch)
        if known is not None and known["weights"] == weights:
            return
        model = copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        entry = {"epoch": epoch, "lr": lr, "weights": weights, **self.look(model, lr)}
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._path(epoch), json.dumps(sealed(entry), sort_keys=True, allow_nan=False).encode())

    def entries(self, done: int) -> list[Record]:
        """What was recorded of the epochs up to `done`."""
        found = []
        for epoch in self.settings["epochs"]:
            if epoch > done:
                continue
            entry = self._read(epoch)
            if entry is None:
                raise StoreError(f"{self._path(epoch)}: gone or damaged; delete {self.folder.parent}, to train again")
            found.append(entry)
        return found

    def look(self, model: nn.Module, lr: float) -> Record:
        """All of it, of one network."""
        clock, settings = Clock(), self.settings
        accuracy = {split: self._accuracy(model, data) for split, data in self.images.items()}
        clock.lap("accuracy")
        goal, norms = Objective(model, "cross_entropy"), {}
        measured = {loss: self._batches(model, self.measured, settings["batch_size"], loss) for loss in LOSSES}
        for loss, batches in measured.items():
            found = norm_record(estimated(goal, batches, settings))
            norms[loss] = {name: value for name, value in found.items() if name not in SPLIT_UP}
            clock.lap(f"norm {loss}")
        hard = measured["adversarial"]
        options = {"seed": settings["seed"], "confidence": settings["confidence"]}
        trace = gauss_newton_trace(goal, hard, replicates=settings["replicates"], **options)
        clock.lap("trace")
        small = self._batches(model, self.others, self.size, "adversarial")
        step = noise(goal, hard, small, confidence=settings["confidence"])
        clock.lap("noise")
        return {
            "accuracy": accuracy,
            "norms": norms,
            "gauss_newton_trace": vars(trace),
            "noise": {
                "trace": vars(step.trace),
                "curved": vars(step.curved),
                "half_trace": vars(step.half_trace(lr)),
                "at_rest": vars(step.at_rest(lr, float(self.config.train["momentum"]))),
                "batches": step.batches,
                "batch_size": step.batch_size,
            },
            "seconds": clock.laps,
        }

    def _accuracy(self, model: nn.Module, data: DataSet) -> Record:
        settings, number = self.settings, len(data)
        ((x, y),) = data.batches(number, device=self.device)
        spec = f"pgd:eps={self.config.attack['eps']},steps={settings['pgd_steps']},seed={settings['seed']}"
        found = evaluate(model, x, y, attack=spec, batch_size=self.config.attack["batch_size"])
        clean, robust = (proportion(int(hit.sum()), number) for hit in (found.clean, found.robust))
        return {"clean": clean, "robust": robust | {"outcomes": outcomes(found.robust)}}

    def _batches(self, model: nn.Module, data: DataSet, size: int, loss: str) -> Any:
        settings = self.settings
        eps, steps, seed = self.config.attack["eps"], settings["pgd_steps"], settings["samples_seed"]
        return crafted(model, data.batches(size, device=self.device), loss=loss, eps=eps, steps=steps, seed=seed)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{epoch}.json"

    def _read(self, epoch: int) -> Record | None:
        """What is there and whole."""
        if not self._path(epoch).exists():
            return None
        try:
            return unsealed(read_json(self._path(epoch)))[0]
        except (BadFileError, DamagedError):
            return None
