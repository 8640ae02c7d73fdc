"""Wide residual network 28-10 (Zagoruyko & Komodakis 2016) without the dead block of some public copies.

State-dict keys are those of the public code (conv1, block1.layer.0.bn1, block1.layer.0.convShortcut, bn1,
fc), and so is the initialisation: convolutions N(0, 2/(k²·channels_out)), BatchNorm 1 and 0, linear bias 0.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from hessdiag.errors import ConfigurationError
from hessdiag.networks.resnet import Factory, conv3x3


class WideBlock(nn.Module):
    """conv(act BN) -> conv(act BN) -> + shortcut, the 1x1 shortcut fed by the activated input."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Factory) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.act1 = activation()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.act2 = activation()
        self.conv2 = conv3x3(channels_out, channels_out)
        self.convShortcut: nn.Conv2d | None = None
        if channels_in != channels_out:
            self.convShortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the sum is not in place."""
        active = self.act1(self.bn1(x))
        out: Tensor = self.conv2(self.act2(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    """A run of blocks of one width."""

    def __init__(self, blocks: int, channels_in: int, channels_out: int, stride: int, activation: Factory) -> None:
        super().__init__()
        first = WideBlock(channels_in, channels_out, stride, activation)
        rest = [WideBlock(channels_out, channels_out, 1, activation) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """The stage's output."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-widen; 28-10 by default: 25 activations, 36,479,194 parameters for 10 classes."""

    def __init__(
        self,
        activation: Factory,
        num_classes: int,
        normalize: nn.Module,
        *,
        in_channels: int = 3,
        depth: int = 28,
        widen: int = 10,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ConfigurationError(f"wrn28_10: depth must be 6n + 4 (10, 16, 22, 28, ...), got {depth}")
        if widen < 2:
            raise ConfigurationError(f"wrn28_10: widen must be at least 2, got {widen}")
        n = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.normalize = normalize
        self.conv1 = conv3x3(in_channels, widths[0])
        self.block1 = WideStage(n, widths[0], widths[1], 1, activation)
        self.block2 = WideStage(n, widths[1], widths[2], 2, activation)
        self.block3 = WideStage(n, widths[2], widths[3], 2, activation)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.act = activation()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        out: Tensor = self.fc(self.pool(self.act(self.bn1(x))).flatten(1))
        return out
