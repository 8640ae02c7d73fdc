"""What a run trains with: network, forward pass, optimiser, averages, class means."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments import control, groups, methods
from experiments.config import TrainConfig, normalisation
from experiments.methods.averaging import Average
from experiments.methods.awp import perturbed_parameters
from experiments.methods.base import Forward, Method
from experiments.methods.dkl import ClassMeans
from experiments.seeds import derived
from experiments.splitnorm import SplitNorm, plain_network
from experiments.trainer.precision import Precision, given
from hessdiag import networks
from hessdiag.errors import ConfigurationError


@dataclass(eq=False)
class Rig:
    """The moving parts of a run; `model` holds `network` and, for split BatchNorm, the second set."""

    config: TrainConfig
    method: Method
    model: nn.Module
    network: nn.Module
    forward: Forward
    optimiser: torch.optim.SGD
    average: Average
    means: ClassMeans | None
    weights: list[nn.Parameter]  # what AWP moves
    decays: list[float]  # their weight decay

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step, each group by its own factor."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["lr_scale"]


def build_network(config: TrainConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network at its initial weights, groups' and control's factors applied; `shape` is [C, H, W]."""
    sizes: dict[str, Any] = {"in_channels": shape[0]}
    if config.network == "mlp":
        sizes = {"in_features": shape[0] * shape[1] * shape[2]}
    network = networks.build(
        config.network,
        activation=config.activation,
        num_classes=classes,
        normalize=normalisation(config.normalize, config.data),
        seed=derived(config.seed, "initial weights"),
        **{**sizes, **config.network_options},
    )
    network = network.to(getattr(torch, config.dtype))
    groups.scale_initial_values(network, factors(config, network))
    control.scale_statistics(network, config.control)
    return network


def factors(config: TrainConfig, network: nn.Module) -> dict[str, groups.Factors]:
    """The factors of groups and control together, for each parameter of the network."""
    by_group = groups.factors_of(network, config.groups)
    by_control = control.factors_of(network, config.control)
    return {name: own.times(by_control[name]) for name, own in by_group.items()}


def build(
    config: TrainConfig,
    shape: tuple[int, ...],
    classes: int,
    device: torch.device,
    precision: Precision | None = None,
) -> Rig:
    """Everything at its beginning, on the device; `precision` where the configuration leaves it open."""
    precision = precision or given(config)
    method = methods.METHODS[config.method]
    network = build_network(config, shape, classes)
    by_name = factors(config, network)
    model: nn.Module = network
    if method.split_norm and method.extra_views(config.options):
        model = SplitNorm(network)
    model = model.to(device)
    if precision.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    table = groups.optimiser_groups(model, by_name, weight_decay=config.weight_decay)
    optimiser = torch.optim.SGD(table, lr=config.lr, momentum=config.momentum, fused=True)
    means = None
    if method.prior:
        means = ClassMeans(
            classes,
            temperature=float(config.options["temperature"]),
            device=device,
            dtype=getattr(torch, config.dtype),
        )
    weights = perturbed_parameters(plain_network(model))
    decay_of = {id(p): float(group["weight_decay"]) for group in table for p in group["params"]}
    return Rig(
        config=config,
        method=method,
        model=model,
        network=plain_network(model),
        forward=make_forward(model, precision),
        optimiser=optimiser,
        average=Average(model, config.averaging, epochs=config.epochs),
        means=means,
        weights=weights,
        decays=[decay_of[id(p)] for p in weights],
    )


def make_forward(model: nn.Module, precision: Precision) -> Forward:
    """The forward pass in this precision and memory layout, logits in at least float32."""
    split = isinstance(model, SplitNorm)
    half, last = precision.autocast == "bfloat16", precision.channels_last

    def forward(x: Tensor, norm: str = "base") -> Tensor:
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=torch.bfloat16) if half else nullcontext():
            logits: Tensor = model(x, norm) if split else model(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    return forward


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, refused if it is not there; without a wish CUDA if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device {device!r} cannot be used: {reason}") from None
    return chosen
