"""What a shell offers for the values of options: names known without torch, which a key press cannot wait for.

tests/hessdiag/test_completion.py compares them with the registries.
"""

from __future__ import annotations

from collections.abc import Callable

ACTIVATIONS = (
    *("relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "softplus", "tanh", "sigmoid", "rct", "swish"),
    "rct:beta=1,alpha=",
    "rct:beta=1,curvature=",
)
NETWORKS = ("mlp", "small_resnet", "resnet18", "preact_resnet18", "wrn28_10")
METHODS = ("auto", "exact", "propagation", "hutchinson", "reference")
LOSSES = ("cross_entropy", "mse", "half_mse", "bce")
DATA = ("digits", "cifar10", "cifar100", "npz:", "safetensors:", "folder:")
FETCHED = ("cifar10", "cifar100")
SPLITS = ("test", "train")
TARGETS = ("data", "population")
WEIGHTS = ("model", "ema")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "float64")
NORMALISATIONS = ("cifar10", "cifar100", "imagenet")
FORWARDS = ("keywords", "positions")
ATTACKS = ("pgd:eps=8/255,steps=10",)
EXAMPLES = ("digits-example",)


def of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """The names that begin as typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def example_or_file(incomplete: str) -> list[str]:
    """A shipped example, or a file that may be a checkpoint; folders too, on the way to one."""
    from pathlib import Path

    head, slash, _ = incomplete.rpartition("/")
    found = [name for name in EXAMPLES if name.startswith(incomplete)]
    try:
        for path in sorted(Path(head or slash or ".").iterdir()):
            shown = f"{head}{slash}{path.name}"
            if shown.startswith(incomplete) and (path.is_dir() or path.suffix in (".pt", ".pth", ".safetensors")):
                found.append(f"{shown}/" if path.is_dir() else shown)
    except OSError:
        pass
    return found
