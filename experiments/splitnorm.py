"""Two sets of BatchNorms around shared convolutions (DAJAT): "base" for plain images, "auto" for augmented ones."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.func import functional_call

from hessdiag.errors import ConfigurationError, UnknownNameError, nearest

NORMS = ("base", "auto")
_SEPARATOR = "/"


class SplitNorm(nn.Module):
    """A network, and a copy of each of its BatchNorms that stands in for it when norm = "auto".

    `network` is the plain network with the base BatchNorms: what is tested and what is saved.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        kinds = nn.modules.batchnorm._BatchNorm
        norms = {name: module for name, module in network.named_modules() if isinstance(module, kinds)}
        if not norms:
            raise ConfigurationError("split BatchNorm: the network has no BatchNorm; choose another method or network")
        self.auto = nn.ModuleDict({name.replace(".", _SEPARATOR): copy.deepcopy(m) for name, m in norms.items()})

    def forward(self, x: Tensor, norm: str = "base") -> Tensor:
        """Logits with the chosen BatchNorms; "auto" moves the running statistics of the copies."""
        if norm == "base":
            logits: Tensor = self.network(x)
            return logits
        if norm != "auto":
            raise UnknownNameError(f"unknown set of BatchNorms {norm!r}; {nearest(norm, list(NORMS))}")
        substitutes = {}
        for name, module in self.auto.items():
            for key, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    substitutes[f"{name.replace(_SEPARATOR, '.')}.{key}"] = value
        logits = functional_call(self.network, substitutes, (x,))
        return logits


def plain_network(model: nn.Module) -> nn.Module:
    """The network itself, without the second set."""
    return model.network if isinstance(model, SplitNorm) else model


def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a `SplitNorm` reduced to that of its network; any other as it is."""
    if not any(key.startswith("network.") for key in state):
        return state
    return {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}


def plain_name(name: str) -> str:
    """The name, in the network, of a parameter or of the one it stands in for."""
    if name.startswith("auto."):
        return name.removeprefix("auto.").replace(_SEPARATOR, ".")
    return name.removeprefix("network.")
