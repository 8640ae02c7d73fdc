"""What a state dict that does not name its network can be: options told by shapes, and hints for messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hessdiag.checkpoint.build import Normalize, facts_of
from hessdiag.checkpoint.layout import class_counts, stripped, torchvision_resnet, translate
from hessdiag.errors import CheckpointError
from hessdiag.store.files import shown
from hessdiag.store.tensorfiles import TensorFacts

OWN = "use --model package.module:factory"
STEMS = ("resnet18", "preact_resnet18", "small_resnet")  # width and stride of a stem named conv1


def public_config(
    weights: Mapping[str, TensorFacts],
    *,
    network: str | None,
    activation: Any,
    num_classes: int | None,
    normalize: Normalize | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of a file that does not name its network: what the user gave, and sizes that shapes tell.

    The network and the activation are never guessed: another activation fits the same tensors. So does another
    stride of the stem, which is 1 unless the user says otherwise, and a note says so.
    """
    if network is None:
        raise CheckpointError(f"the file does not name its network: pass network= (--network); {hint(weights)}")
    if activation is None:
        raise CheckpointError(
            "the file does not say which activation it was trained with, and another gives wrong numbers in "
            "silence: pass activation= (--activation), such as relu or rct:beta=1,alpha=14"
        )
    names = stripped(weights)
    notes: tuple[str, ...] = ()
    if num_classes is None:
        num_classes = class_counts(names)
        notes = (f"{num_classes} classes, from the shape of the last layer",) if num_classes else ()
    config = {"network": network, "activation": activation, "normalize": normalize}
    if num_classes is not None:
        config["num_classes"] = num_classes
    if network == "mlp" and "in_features" not in options and "layers.0.weight" not in names:
        ends = [name.removesuffix("layers.0.weight") for name in names if name.endswith(".layers.0.weight")]
        told = " or ".join(f"--prefix {shown(end)[1:-1]}" for end in ends[:3])
        told = f"say which by prefix= ({told})" if ends else hint(weights)
        raise CheckpointError(f"it holds no layers.0.weight, the first matrix of an mlp; {told}")
    sizes = {key: value for key, value in infer_options(network, names).items() if key not in options}
    if sizes:
        notes = (*notes, "from the shapes: " + ", ".join(f"{key}={value}" for key, value in sizes.items()))
    if network in STEMS and "stem_stride" not in options:
        notes = (*notes, 'stem_stride=1, which no tensor tells: for another, options={"stem_stride": 2} in Python')
    if network == "preact_resnet18":
        notes = (
            *notes,
            "shortcut convolutions take the activated input; some public copies feed them the raw one",
        )
    return {**config, **sizes, **options}, notes


def infer_options(network: str, names: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """Sizes of a registered network that its tensors' shapes tell, where they differ from the default."""
    first = names.get("conv1.weight")
    found: dict[str, Any] = {}
    if first is not None and len(first.shape) == 4:
        if network in STEMS:
            found = {"in_channels": first.shape[1], "width": first.shape[0]}
        elif network == "wrn28_10":
            found = {"in_channels": first.shape[1], **_wide(names)}
    if network == "mlp":
        found = _layers(names)
    defaults = {"in_channels": 1 if network == "small_resnet" else 3, "depth": 28, "widen": 10, "bias": True}
    defaults["width"] = 8 if network == "small_resnet" else 64
    return {key: value for key, value in found.items() if defaults.get(key) != value}


def hint(weights: Mapping[str, TensorFacts]) -> str:
    """What the tensors look like: registered networks that fit, or what family they are of."""
    from hessdiag import networks

    names = stripped(weights)
    found = fitting(names)
    if found:
        return f"its tensors are those of {' or '.join(found)}"
    of_torchvision = torchvision_resnet(names)
    if of_torchvision is not None:
        return of_torchvision
    if any(name.startswith("layer.0.block.0.batchnorm_0.") for name in names):
        return f"it looks like DeepMind's WideResNet, whose padding differs from wrn28_10: {OWN}"
    return f"registered: {', '.join(networks.NETWORKS)}; for any other {OWN}"


def fitting(names: Mapping[str, TensorFacts]) -> tuple[str, ...]:
    """The registered networks whose tensors are those of the file, with the options that the shapes tell."""
    from hessdiag import networks

    found = []
    classes = class_counts(names)
    for network in networks.NETWORKS:
        options = infer_options(network, names)
        if options.get("depth", 0) > len(names):
            continue
        if classes is not None:
            options["num_classes"] = classes
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                sketch = networks.build(network, **options)
            translate(names, facts_of(sketch))
        except Exception:  # does not fit, in one way or another
            continue
        label = network + "".join(f" {key}={value}" for key, value in options.items() if key in ("depth", "widen"))
        found.append(label)
    return tuple(found)


def _wide(names: Mapping[str, TensorFacts]) -> dict[str, int]:
    """Depth 6n + 4 from the number n of blocks in a stage, the factor from the first stage's width."""
    first = names.get("block1.layer.0.conv1.weight")
    blocks = {
        part for part in (name.split(".")[2] for name in names if name.startswith("block1.layer.")) if part.isdecimal()
    }
    if first is None or len(first.shape) != 4 or not blocks:
        return {}
    return {"depth": 6 * len(blocks) + 4, "widen": first.shape[0] // 16}


def _layers(names: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """Sizes of an MLP: its matrices in order."""
    matrices = [
        f for key, f in names.items() if key.startswith("layers.") and key.endswith(".weight") and len(f.shape) == 2
    ]
    if not matrices:
        return {}
    widths = [facts.shape[0] for facts in matrices[:-1]]
    return {"in_features": matrices[0].shape[1], "widths": widths, "bias": "layers.0.bias" in names}
