"""`python -m experiments train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.chance import UNLEARNED
from experiments.commands.common import Device, Quiet, Root
from experiments.commands.evaluation import run_attacks
from experiments.commands.options import configuration
from experiments.evaluate import Request
from experiments.train import FINISHED, OVERFITTED, train
from experiments.trainer.memory import keep_freed_memory
from hessdiag.cli.exits import OK
from hessdiag.cli.exits import WIDE as SHORT

# As of hessdiag, 1: there is a result, but short of what was asked for. The status in the output says which.
EXITS = {FINISHED: OK, OVERFITTED: SHORT, UNLEARNED: SHORT}


def command(
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or a TOML file.")] = None,
    method: Annotated[str | None, typer.Option(help="standard, pgd_at, n_fgsm, trades, ...")] = None,
    network: Annotated[str | None, typer.Option(help="resnet18, wrn28_10, small_resnet, ...")] = None,
    activation: Annotated[str | None, typer.Option(help='"silu", "rct:beta=1,curvature=7", ...')] = None,
    data: Annotated[str | None, typer.Option(help="cifar10, cifar100, digits, ...")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    eps: Annotated[str | None, typer.Option(help='Linf radius, such as "8/255".')] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of any entry, again and again.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory; runs/KEY by default.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attack afterwards: aa2:300, aa, pgd; repeatable.")] = None,
    device: Device = None,
    root: Root = None,
    save_seconds: Annotated[float, typer.Option(help="At least so long between two checkpoints.")] = 10.0,
    dry_run: Annotated[bool, typer.Option(help="Print the whole configuration and stop.")] = False,
    quiet: Quiet = False,
) -> int:
    """Train a network; the same command after an interruption goes on where it was."""
    given: dict[str, Any] = {
        "method": method,
        "network": network,
        "activation": activation,
        "data": data,
        "epochs": epochs,
        "eps": eps,
        "seed": seed,
    }
    config, about = configuration(recipe, given, assign or [])
    config.refuse_weak_attack()
    if dry_run:
        print(json.dumps({"key": config.key(), "config": config.to_dict(), **about}, indent=1))
        return 0
    requests = attack if attack is not None else list(about.get("evaluate", {}).get("attacks", []))
    for request in requests:  # refused now, not after the training
        Request.parse(request)
    folder = out or Path("runs") / config.key()
    keep_freed_memory()
    result = train(config, folder, device=device, root=root, progress=not quiet, save_seconds=save_seconds)
    summary: dict[str, Any] = {
        "folder": str(folder),
        "status": result.status,
        "reason": result.reason,
        "epochs": result.epochs,
        "clean_accuracy": result.clean_accuracy,
        "clean_loss": result.clean_loss,
        "train_seconds": round(result.seconds, 2),
        "images_per_second": round(result.images_per_second),
    }
    if requests:
        record = run_attacks(folder, requests, device=device, root=root, quiet=quiet)
        summary["attacks"] = {
            name: {"robust_accuracy": value["robust_accuracy"], "samples": value["samples"]}
            for name, value in record.items()
            if isinstance(value, dict) and "robust_accuracy" in value
        }
        summary["attack_seconds"] = round(record["seconds"], 2)
    print(json.dumps(summary, indent=1))
    if result.reason is not None:
        print(f"{'stopped: ' if result.status == OVERFITTED else ''}{result.reason}", file=sys.stderr)
    return EXITS[result.status]
