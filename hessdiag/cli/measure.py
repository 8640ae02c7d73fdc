"""`hessdiag measure`: from a checkpoint file to a norm with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hessdiag.cli import complete
from hessdiag.cli.complete import of
from hessdiag.cli.exits import guarded
from hessdiag.cli.request import Request

NAME = "measure"
EXAMPLES = """[bold]Examples[/bold]

hessdiag measure digits-example

hessdiag measure model.pt --samples 500 --rtol 0.02 --json model.json --html model.html

hessdiag measure trades.pt --network resnet18 --activation rct:beta=1,alpha=14 --data cifar10

hessdiag measure model.pt --attack pgd:eps=8/255,steps=10

hessdiag measure weights.pt --model mycode.nets:make --data mycode.sets:validation

hessdiag measure --model hf:./bert --data npz:tokens.npz     [dim]# arrays input_ids, attention_mask, labels[/dim]

hessdiag measure model.pt --dry-run

hessdiag measure model.pt --resume model.resume      [dim]# killed? the same line goes on[/dim]

torchrun --nproc-per-node 4 -m hessdiag measure model.pt --samples 2000

Exit codes: 0 fine; 1 a result, but wider than --rtol; 2 usage; 3 bad file or data; 4 not measurable so; 5 memory or device; 6 a process was lost; 8 and more: an output was not written; 130 interrupted."""  # noqa: E501

MODEL, DATA, WHAT, HOW, OUT = "The model", "The data", "What is measured", "How", "Output"


@guarded
def command(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete.example_or_file,
            help="A .pt, .pth or .safetensors file, the index or the folder of several; or the name of a shipped one: "
            "digits-example. With --model hf:DIR the weights of DIR.",
            show_default="digits-example",
        ),
    ] = None,
    *,
    network: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.NETWORKS),
            help="Network of a bare state dict: resnet18, preact_resnet18, wrn28_10, small_resnet, mlp, as they are "
            "built for CIFAR; that of ImageNet is --model torchvision.models:resnet18.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.ACTIVATIONS),
            help="Its activation: silu, rct:beta=1,alpha=14, ...",
            rich_help_panel=MODEL,
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(help="Its number of classes, where the weights leave it open.", min=1, rich_help_panel=MODEL),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Your own model, package.module:factory, which runs that code; or hf:DIR, a folder as transformers "
            "writes it (hf:NAME: in the local cache).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Where in the file the state dict lies, e.g. trainer.model.", rich_help_panel=MODEL),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Take the tensors under this prefix alone, e.g. student.", rich_help_panel=MODEL),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="What is meant of a model that returns more than a tensor: a field or key (logits), a place (0), or "
            "package.module:function of it.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.FORWARDS),
            help="How to call a model of several inputs: keywords, positions, or package.module:function of (model, "
            "inputs).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.WEIGHTS),
            help="model or ema: which of a file's weights. By default the averaged ones, if any.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.NORMALISATIONS),
            help="Normalise inputs in [0, 1] before the model: cifar10, cifar100, imagenet, or MEANS:DEVIATIONS, "
            "one number a channel, e.g. 0.13:0.31.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.DATA),
            help="digits, cifar10, cifar100, npz:PATH, safetensors:PATH, folder:PATH or package.module:factory. "
            "By default the set named in the checkpoint.",
            rich_help_panel=DATA,
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Which arrays of the file the model takes, e.g. input_ids,attention_mask.", rich_help_panel=DATA
        ),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Which array of the file are the targets, e.g. labels.", rich_help_panel=DATA)
    ] = None,
    split: Annotated[
        str, typer.Option(autocompletion=of(complete.SPLITS), help="test or train.", rich_help_panel=DATA)
    ] = "test",
    samples: Annotated[
        int | None,
        typer.Option(help="So many samples, chosen at random; by default all.", min=1, rich_help_panel=DATA),
    ] = None,
    data_seed: Annotated[int, typer.Option(help="Seed of that choice.", rich_help_panel=DATA)] = 0,
    data_root: Annotated[
        Path | None,
        typer.Option(help="Folder of cifar10 and cifar100; else $HESSDIAG_DATA.", rich_help_panel=DATA),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Samples at once; else as many as 3 GB hold, at most 128.", min=1, rich_help_panel=DATA),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            autocompletion=of(complete.LOSSES),
            help="cross_entropy, mse, half_mse, bce, or package.module:function.",
            rich_help_panel=WHAT,
        ),
    ] = "cross_entropy",
    label_smoothing: Annotated[
        float, typer.Option(help="Label smoothing of cross_entropy.", rich_help_panel=WHAT)
    ] = 0.0,
    ignore_index: Annotated[
        int, typer.Option(help="Targets of this number do not count, in cross_entropy.", rich_help_panel=WHAT)
    ] = -100,
    shift: Annotated[
        int | None,
        typer.Option(
            help="Compare the output at a place with the target so many places later: 1 for language models. By "
            "default as a model does that computes its own loss; else 0.",
            min=0,
            rich_help_panel=WHAT,
        ),
    ] = None,
    l2: Annotated[
        float, typer.Option(help="Add (l2/2)|theta|^2 to the loss; off by default.", rich_help_panel=WHAT)
    ] = 0.0,
    layers: Annotated[
        str | None,
        typer.Option(help="Regular expression for the parameters to measure, e.g. 'layer3.*'.", rich_help_panel=WHAT),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.ATTACKS),
            help="Measure at perturbed inputs, crafted once per sample and held fixed: pgd:eps=8/255,steps=10.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            autocompletion=of(complete.TARGETS),
            help="data: these samples. population: the distribution they come from.",
            rich_help_panel=WHAT,
        ),
    ] = "data",
    method: Annotated[
        str,
        typer.Option(
            autocompletion=of(complete.METHODS),
            help="auto, exact, propagation, hutchinson or reference.",
            rich_help_panel=HOW,
        ),
    ] = "auto",
    rtol: Annotated[
        float,
        typer.Option(help="Stop when half the interval is this small, relative to the norm.", rich_help_panel=HOW),
    ] = 0.05,
    confidence: Annotated[float, typer.Option(help="Of every interval.", rich_help_panel=HOW)] = 0.95,
    min_replicates: Annotated[
        int,
        typer.Option(
            help="At least so many replicates: estimates of the diagonal, each by random signs of its own. What is "
            "exact has none.",
            rich_help_panel=HOW,
        ),
    ] = 10,
    max_replicates: Annotated[int, typer.Option(help="At most so many.", rich_help_panel=HOW)] = 1000,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Draw no replicates after that, and give what is there; exact passes are finished.",
            rich_help_panel=HOW,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random signs and of the attack.", rich_help_panel=HOW)] = 0,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Measure by the plan of an earlier result (its JSON), as pairs for compare want.",
            rich_help_panel=HOW,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(autocompletion=of(complete.DEVICES), help="auto, cpu, cuda or cuda:N.", rich_help_panel=HOW)
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            autocompletion=of(complete.DTYPES),
            help="float32 or float64; by default the weights' own.",
            rich_help_panel=HOW,
        ),
    ] = None,
    spread: Annotated[
        bool,
        typer.Option(
            help="Also tell how far the norm would be with other samples; about the work of measuring up to 512 "
            "of them once more.",
            rich_help_panel=HOW,
        ),
    ] = True,
    resume: Annotated[
        Path | None,
        typer.Option(help="Keep the state here; if the file exists, go on from it.", rich_help_panel=HOW),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds that processes of a torchrun wait for one another.", rich_help_panel=HOW),
    ] = 600.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what each method would cost, and stop.", rich_help_panel=HOW),
    ] = False,
    json: Annotated[
        str | None, typer.Option(help="Write everything as JSON; - for stdout.", rich_help_panel=OUT)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained page with pictures.", rich_help_panel=OUT)
    ] = None,
    save_diagonal: Annotated[
        Path | None,
        typer.Option(help="Write the diagonal and its standard errors (safetensors).", rich_help_panel=OUT),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="One line: rms, low, high. No progress.", rich_help_panel=OUT),
    ] = False,
) -> int:
    """Measure the norm of a loss's Hessian diagonal, with its interval.

    Prints rms and mean-scaled norm, the shares of Gauss-Newton and functional part, the rescaling-invariant
    companion, effective curvature, trace and audit, by group and by parameter.
    """
    request = Request(**locals())
    from hessdiag.cli.measuring import run

    return run(request)
