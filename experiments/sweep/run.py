"""One run: train, attack, measure, and put all of it into one record.

The record holds what the figures and the correlations need and what makes the numbers checkable: accuracies
with the number of images behind them, norms with intervals, the shares of their two parts and the angle between
them, layers, groups, the rescaling-invariant companion, the effective curvature |gamma| max|σ''|, how training went
epoch by epoch, what was recorded at chosen epochs, the seconds each part took, versions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import hessdiag
from experiments.attacks import evaluate
from experiments.config import TrainConfig
from experiments.provenance import provenance
from experiments.sweep.along import Along
from experiments.sweep.clock import Clock
from experiments.sweep.keys import RunConfig
from experiments.sweep.norms import crafted, estimated
from experiments.sweep.records import Record, history_record, norm_record, outcomes, proportion, vars_of
from experiments.train import chosen_sets, train
from hessdiag import data
from hessdiag.activations import max_curvature
from hessdiag.data import DataSet
from hessdiag.problem import objective

ATTACKS = ("aa2", "aa", "pgd")
PGD = "pgd:eps={eps},steps=10,seed={seed}"


def run_one(config: RunConfig, out: Path) -> Record:
    """Do the run in directory `out` and return its record."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock()
    settings = TrainConfig.from_dict(config.train)
    sets = Sets(settings)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    along = Along(config, out / "along", sets.pair, device) if config.along else None
    result = train(settings, out / "train", device=device, sets=sets.pair, look=along)
    model = result.model
    clock.lap("train")
    kept = {name: value for name, value in result.to_dict().items() if name not in ("config", "provenance")}
    record: Record = {
        "train": {**kept, "history": history_record(result.history)},
        "max_curvature": max_curvature(settings.activation),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "clean_accuracy": proportion(round(result.clean_accuracy * result.test_samples), result.test_samples),
        "cost": cost(config, model, device, sets),
        **attacked(config, laid_out(model, result.precision.channels_last), device, out, clock, sets),
        **measured(config, model, device, clock, sets),
    }
    if along is not None:
        record["along"] = along.entries(result.epochs)
    record["seconds"] = clock.laps
    record["provenance"] = provenance(device)
    return record


def laid_out(model: torch.nn.Module, channels_last: bool) -> torch.nn.Module:
    """The network for attacks: in the layout that was the faster one in training."""
    if not channels_last:
        return model
    copied: torch.nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


class Sets:
    """The data of a run, each split read once, when it is first asked for."""

    def __init__(self, settings: TrainConfig) -> None:
        self.settings = settings

    @cached_property
    def train(self) -> DataSet:
        """All training images."""
        return data.load(self.settings.data, split="train", seed=self.settings.data_seed)

    @cached_property
    def test(self) -> DataSet:
        """All test images."""
        return data.load(self.settings.data, split="test")

    @cached_property
    def pair(self) -> tuple[DataSet, DataSet]:
        """The training images that the configuration chooses, and the test images."""
        return chosen_sets(self.settings, self.train, self.test)

    def __getitem__(self, split: str) -> DataSet:
        return self.train if split == "train" else self.test


def cost(config: RunConfig, model: torch.nn.Module, device: torch.device, sets: Sets) -> Record:
    """What the activation costs in memory: the peak on a GPU, and the bytes kept for one training step's backward pass.

    The bytes are those of every distinct tensor that autograd saves, weights among them, for one batch in training
    mode: the same on any device.
    """
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    training = sets.train
    batch = min(config.train["batch_size"], len(training))
    inputs, targets = next(iter(training.sample(batch).batches(batch, device=device)))
    copied = copy.deepcopy(model).train()  # training mode moves running statistics: not those of the run's model
    return {"peak_memory": peak, "saved_bytes": saved_bytes(copied, inputs, targets)}


def saved_bytes(
    model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, *, known: Iterable[torch.Tensor] = ()
) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass, those of `known` aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that holds its own output itself is never freed, nor is what is below it

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)  # held, so that no address is used again
    del loss
    return sum(seen.values())


def attacked(
    config: RunConfig, model: torch.nn.Module, device: torch.device, out: Path, clock: Clock, sets: Sets
) -> Record:
    """AA-2, AA and PGD-10 on the chosen test images, with the outcome of each: all runs of a sweep share them."""
    attack = config.attack
    record: Record = {"eps": attack["eps"], **dict.fromkeys(ATTACKS)}
    if not any(attack.get(f"{kind}_samples") for kind in ATTACKS):
        return record
    test = sets.test
    for kind in ATTACKS:
        number = min(attack.get(f"{kind}_samples", 0), len(test))
        if not number:
            continue
        chosen = test.sample(number, seed=attack["samples_seed"])
        ((x, y),) = chosen.batches(number, device=device)
        found = evaluate(
            model,
            x,
            y,
            attack=PGD.format(**attack) if kind == "pgd" else kind,
            eps=attack["eps"],
            seed=attack["seed"],
            batch_size=attack["batch_size"],
            directory=out / kind if kind == "aa" else None,
        )
        record[kind] = proportion(int(found.robust.sum()), number) | {"clean": int(found.clean.sum()) / number}
        record[kind] |= {"outcomes": outcomes(found.robust), "warnings": list(found.warnings)}
        clock.lap(kind)
    return record


def measured(config: RunConfig, model: torch.nn.Module, device: torch.device, clock: Clock, sets: Sets) -> Record:
    """The norm of the diagonal for every split and loss that is asked for, and the effective curvatures."""
    settings = config.measure
    norms: Record = {}
    curvature: list[Record] = []
    for split in settings["splits"]:
        full = sets[split]
        chosen = full.sample(min(settings["samples"], len(full)), seed=settings["samples_seed"])
        for loss in settings["losses"]:
            batches: Any = crafted(
                model,
                chosen.batches(settings["batch_size"], device=device),
                loss=loss,
                eps=config.attack["eps"],
                steps=settings["pgd_steps"],
                seed=settings["samples_seed"],
            )
            goal = objective.Objective(model, "cross_entropy")
            found = estimated(goal, batches, settings)
            entry = norm_record(found)
            norms[f"{split}/{loss}"] = entry
            curvature = [vars_of(layer) for layer in found.effective_curvature]
            clock.lap(f"norm {split}/{loss}")
            if settings["plugin_probes"]:
                entry["plugin"] = plugin(goal, batches, settings["plugin_probes"], settings["seed"])
                clock.lap(f"plugin {split}/{loss}")
    return {"norms": norms, "effective_curvature": curvature}


def plugin(goal: objective.Objective, batches: Any, probes: int, seed: int) -> Record:
    """The plug-in norm: the norm of the mean of so many Hutchinson probes, as the literature would report it.

    It is no estimate of the norm of the diagonal: its square is too large by (|H|_F² - |diag|²)/probes in
    the mean. It stands here to show what a study that reports it would have concluded.
    """
    estimate = hessdiag.diagonal(
        goal,
        batches,
        method="hutchinson",
        replicates=probes,
        seed=seed,
        deterministic_check=False,
        audit_model=False,
    )
    square = sum(float((part.double() ** 2).sum()) for part in estimate.total.values())
    entries = sum(part.numel() for part in estimate.total.values())
    return {
        "rms": math.sqrt(square / entries),
        "probes": probes,
        "biased": True,
        "label": "plug-in Hutchinson norm",
    }
