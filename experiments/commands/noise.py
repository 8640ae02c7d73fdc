"""`python -m experiments noise CHECKPOINT`: the noise of a training step, and half of tr(H Sigma) for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.commands.common import Root, TrainedOn
from hessdiag.errors import ConfigurationError
from hessdiag.store.files import BadFileError, write_json


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's directory, or a checkpoint file that trained here.")],
    samples: Annotated[int, typer.Option(help="Images for the curvature.", min=1)] = 256,
    batches: Annotated[int, typer.Option(help="Batches for the noise, of other images.", min=3)] = 32,
    batch_size: Annotated[int | None, typer.Option(help="Of training, by default.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="The step's rate; that of training by default.", min=0.0)] = None,
    eps: Annotated[str | None, typer.Option(help="Linf radius; 0: clean images; by default that of training.")] = None,
    data: TrainedOn = None,
    seed: Annotated[int, typer.Option(help="Of the choice of images and of the attack.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option(help="Write what is printed to this file.")] = None,
    root: Root = None,
) -> int:
    """tr(C), tr(HC) and half of tr(H Sigma), Sigma = lr^2 C, of the loss at PGD-10 images, on training images.

    C is the covariance of the gradient of a training batch, H the Hessian on other images; each with a 95% interval.

    Example: python -m experiments noise runs/a --batches 16
    """
    from experiments.noise import dealt, noise
    from experiments.trained import load_trained
    from hessdiag import Objective
    from hessdiag.data import load
    from hessdiag.problem.perturbation import fraction, parse_pgd, perturb_batches

    trained = load_trained(checkpoint)
    given = trained.training
    name, radius = data or given.get("data"), eps or given.get("eps")
    size, rate = batch_size or given.get("batch_size"), given.get("lr") if lr is None else lr
    for option, value in (("--data", name), ("--eps", radius), ("--batch-size", size), ("--lr", rate)):
        if value is None:
            raise ConfigurationError(f"{trained.path}: does not say how it was trained; give {option}")
    whole = load(str(name), split="train", seed=int(given.get("data_seed", 0)), root=root)
    sets = dealt(whole, samples, batches, int(size), seed=seed)  # type: ignore[arg-type]
    measured, small = (part.batches(int(size)) for part in sets)  # type: ignore[arg-type]
    if fraction(str(radius), "--eps") > 0:
        spec = parse_pgd(f"pgd:eps={radius},steps=10,seed={seed}")
        measured, small = (perturb_batches(trained.model, part, spec) for part in (measured, small))  # type: ignore[assignment]
    found = noise(Objective(trained.model), measured, small)
    half = found.half_trace(float(rate))  # type: ignore[arg-type]
    told: dict[str, Any] = {"samples": samples, "batches": found.batches, "batch_size": found.batch_size, "eps": radius}
    told |= {"lr": rate, "trace": vars(found.trace), "curved": vars(found.curved), "half_trace": vars(half)}
    print(f"{trained.path}, epoch {trained.epoch}: {found.batches} batches of {size}, eps {radius}, lr {rate:g}")
    for label, spread in (("tr(C)", found.trace), ("tr(HC)", found.curved), ("tr(H Sigma)/2", half)):
        print(f"  {label:14} {spread.value:11.4g}   95%: {spread.low:.4g} to {spread.high:.4g}")
    if json is not None:
        try:
            write_json(json, told)
        except BadFileError as reason:
            raise ConfigurationError(f"--json {json}: {reason}") from None
    return 0
