"""Train one network as a configuration says.

    config = TrainConfig.from_dict({"method": "n_fgsm", "data": "digits", "network": "small_resnet", ...})
    result = train(config, Path("runs/first"))

The same call after an interruption goes on from the last saved epoch, on the CPU to the same bits (same number of
threads), and returns at once what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments import chance, methods
from experiments.chance import UNLEARNED
from experiments.config import TrainConfig
from experiments.folder import Folder
from experiments.provenance import provenance
from experiments.splitnorm import plain_state
from experiments.trainer import rig as rigs
from experiments.trainer.choosing import choose
from experiments.trainer.compiling import fresh_compiler
from experiments.trainer.images import Images, Sampler, on_device
from experiments.trainer.loop import Loop, split_index
from experiments.trainer.precision import Precision
from experiments.trainer.progress import reporting
from experiments.trainer.state import Standing
from hessdiag import data
from hessdiag.data.dataset import DataSet
from hessdiag.errors import ConfigurationError
from hessdiag.problem.denormals import denormals_are_zero

FINISHED, OVERFITTED = "finished", "catastrophic_overfitting"
Look = Callable[[int, float, nn.Module], None]


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained network in eval mode, with averaged or selected weights where the configuration asks for them."""

    config: TrainConfig
    model: nn.Module
    weights: str  # "model", "ema" or "best"
    status: str  # "finished", "catastrophic_overfitting" or "did_not_learn"
    reason: str | None
    epochs: int
    history: tuple[Mapping[str, Any], ...]
    clean_accuracy: float
    clean_loss: float
    test_samples: int
    seconds: float
    images_per_second: float
    precision: Precision
    steps: str  # how they were made: "one by one", or on a card "replayed as a CUDA graph"
    data: Mapping[str, Any]
    provenance: Mapping[str, Any]
    folder: Path | None

    @property
    def key(self) -> str:
        """The configuration's hash."""
        return self.config.key()

    @property
    def metrics(self) -> dict[str, Any]:
        """Plain numbers for tables: how training went and ended."""
        last = {key: value for key, value in (self.history[-1] if self.history else {}).items() if key != "seconds"}
        return {
            **last,
            "status": self.status,
            "reason": self.reason,
            "clean_accuracy": self.clean_accuracy,
            "clean_loss": self.clean_loss,
            "train_seconds": self.seconds,
            "images_per_second": self.images_per_second,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for result.json."""
        return {
            "key": self.key,
            "config": self.config.to_dict(),
            "status": self.status,
            "reason": self.reason,
            "epochs": self.epochs,
            "weights": self.weights,
            "clean_accuracy": self.clean_accuracy,
            "clean_loss": self.clean_loss,
            "test_samples": self.test_samples,
            "eps": self.config.eps,
            "seed": self.config.seed,
            "last_epoch": dict(self.history[-1]) if self.history else {},
            "train_seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "precision": self.precision.described(self.config),
            "steps": self.steps,
            "data": dict(self.data),
            "provenance": dict(self.provenance),
        }


@denormals_are_zero()
def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    device: str | torch.device | None = None,
    root: Path | str | None = None,
    sets: tuple[DataSet, DataSet] | None = None,
    progress: bool = False,
    save_seconds: float = 10.0,
    look: Look | None = None,
) -> TrainResult:
    """Train, and test on clean images.

    out: the run's directory; None writes nothing. root: where data lies (see `hessdiag.data.load`); `sets` gives
    training and test data themselves. save_seconds: at least so long between two saves, which come at the end of an
    epoch; a run that is killed repeats what came after the last. look: called after each epoch, before it is saved,
    with its number, its last learning rate and the network as it stands, which must be left as it is; an epoch that a
    run repeats is looked at again. Denormal numbers are zero meanwhile (`hessdiag.problem.denormals`).

    NonFiniteError where the loss, a weight or a running statistic becomes NaN or Inf; catastrophic overfitting ends
    training early, and a network whose answers on the test images are those of chance (`chance`) has not learned: both
    are named in `status` and `reason`.
    """
    config.refuse_weak_attack()
    home = rigs.pick_device(device)
    train_set, test_set = sets or load_sets(config, root)
    images = on_device(train_set, config, home)
    index, held_out, watch_index = split_index(len(images), config, home)
    shape = tuple(images.inputs.shape[1:])
    folder = None if out is None else Folder(Path(out))
    if folder is not None:
        folder.open(config)
    views = methods.METHODS[config.method].extra_views(config.options)
    sampler = Sampler(images, config, index, views=views)
    precision = _precision(config, images, sampler, folder)
    rig = rigs.build(config, shape, images.classes, home, precision)
    standing = Standing() if folder is None else folder.resume(rig)
    taken_up = standing.epoch
    with (
        reporting(progress, config.label, epochs=config.epochs, steps=sampler.steps, done=standing.epoch) as reporter,
        fresh_compiler(config.compile),
    ):
        if precision.step_seconds:
            reporter.note(precision.note)
        loop = Loop(
            rig=rig,
            images=images,
            sampler=sampler,
            watch_index=watch_index,
            held_out=held_out,
            reporter=reporter,
            saved=lambda: "" if folder is None else folder.safe(),
        )
        save = _saver(folder, rig, config, save_seconds)

        def after_epoch(standing: Standing) -> None:
            if look is not None:
                look(standing.epoch, float(standing.history[-1]["lr"]), rig.network)
            save(standing)

        loop.run(standing, after_epoch)
    model, weights = _chosen(rig, standing)
    seen = chance.answers(model, test_set, batch_size=max(config.batch_size, 500), dtype=images.dtype)
    status = OVERFITTED if standing.reason is not None else FINISHED if seen.learned else UNLEARNED
    train_seconds = [row["seconds"] for row in standing.history]
    shown = sampler.per_epoch * len(standing.history)
    before = {} if folder is None else folder.read_json("result.json") or {}
    result = TrainResult(
        config=config,
        model=model,
        weights=weights,
        status=status,
        reason=standing.reason or seen.reason,
        epochs=standing.epoch,
        history=tuple(standing.history),
        clean_accuracy=seen.accuracy,
        clean_loss=seen.loss,
        test_samples=seen.samples,
        seconds=standing.seconds,
        images_per_second=shown / max(sum(train_seconds), 1e-9),
        precision=precision,
        steps=loop.stepper.how if standing.epoch > taken_up else str(before.get("steps", loop.stepper.how)),
        data={
            "name": train_set.name,
            "train_sha256": train_set.sha256,
            "test_sha256": test_set.sha256,
            "train_samples": len(index),
            "notes": [*train_set.notes, *test_set.notes],
        },
        provenance=provenance(home),
        folder=None if folder is None else folder.path,
    )
    if folder is not None:
        folder.write_json("result.json", {**before, **result.to_dict()})
    return result


def load_sets(config: TrainConfig, root: Path | str | None = None) -> tuple[DataSet, DataSet]:
    """The training images that the configuration chooses, and the whole test set."""
    training = data.load(config.data, split="train", seed=config.data_seed, root=root)
    return chosen_sets(config, training, data.load(config.data, split="test", root=root))


def chosen_sets(config: TrainConfig, training: DataSet, test: DataSet) -> tuple[DataSet, DataSet]:
    """The same from whole sets that are loaded already."""
    if training.split == test.split:
        raise ConfigurationError(
            f"{config.data} has no test split of its own ({training.split!r} only): give train(sets=(training, test))"
        )
    return training.sample(config.train_samples, seed=config.data_seed), test


def _precision(config: TrainConfig, images: Images, sampler: Sampler, folder: Folder | None) -> Precision:
    """What the run's directory holds, else what the configuration says or a timed step shows, kept from then on."""
    if folder is not None and (kept := folder.precision(config)) is not None:
        return kept
    precision = choose(config, images, sampler)
    if folder is not None and precision.step_seconds:
        folder.keep_precision(precision)
    return precision


def _saver(folder: Folder | None, rig: rigs.Rig, config: TrainConfig, save_seconds: float) -> Any:
    last = time.monotonic()

    def after_epoch(standing: Standing) -> None:
        nonlocal last
        done = standing.epoch == config.epochs or standing.reason is not None
        if folder is not None and (done or time.monotonic() - last >= save_seconds):
            folder.save(rig, standing)
            last = time.monotonic()

    return after_epoch


def _chosen(rig: rigs.Rig, standing: Standing) -> tuple[nn.Module, str]:
    """The network with the weights that the run reports, in eval mode; contiguous, as a measurement needs it."""
    network = rig.network
    which = "model"
    state = None
    if rig.average.state is not None:
        which, state = "ema", plain_state(rig.average.state)
    if standing.best is not None:
        which, state = "best", standing.best["state"]
    if state is not None:
        network.load_state_dict(state)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network.eval(), which
