"""`python -m experiments attack CHECKPOINT`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from experiments.commands.common import Device, NotSaid, Quiet, Root, TrainedOn
from experiments.commands.evaluation import run_attacks


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's directory, or a checkpoint file.")],
    attack: Annotated[list[str], typer.Option(help="aa, aa2, pgd; aa2:300 for 300 images; again and again.")],
    eps: Annotated[str | None, typer.Option(help="Linf radius; by default that of training.")] = None,
    data: TrainedOn = None,
    weights: Annotated[str | None, typer.Option(help="model, or ema for averaged weights.")] = None,
    network: NotSaid = None,
    activation: NotSaid = None,
    num_classes: Annotated[int | None, typer.Option(help="Of a public checkpoint that does not say.")] = None,
    seed: Annotated[int, typer.Option(help="Of the attacks.")] = 0,
    samples_seed: Annotated[int, typer.Option(help="Of the choice of test images.")] = 0,
    batch_size: Annotated[int, typer.Option()] = 250,
    device: Device = None,
    root: Root = None,
    out: Annotated[Path | None, typer.Option(help="Where result.json goes; beside the checkpoint by default.")] = None,
    quiet: Quiet = False,
) -> int:
    """Attack a trained network; AutoAttack goes on where it was after an interruption."""
    given = {"network": network, "activation": activation, "num_classes": num_classes}
    record = run_attacks(
        checkpoint,
        attack,
        eps=eps,
        name=data,
        device=device,
        root=root,
        seed=seed,
        samples_seed=samples_seed,
        batch_size=batch_size,
        weights=weights,
        out=out,
        quiet=quiet,
        given=given,
    )
    print(json.dumps(record, indent=1))
    return 0
