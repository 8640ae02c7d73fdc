"""Post-activation residual networks (He et al. 2016): ResNet-18 for small images, and a small one.

Attribute names, hence state-dict keys, are those of the public CIFAR code (conv1, bn1, layer1.0.conv1,
layer1.0.shortcut.0, linear). Initialisation is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from hessdiag.errors import ConfigurationError

Factory = Callable[[], nn.Module]


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1; BatchNorm follows, so it has no bias."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """act(BN conv) -> BN conv -> + shortcut -> act; the shortcut is BN(1x1 conv) where shapes differ."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Factory) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.act1 = activation()
        self.conv2 = conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.act2 = activation()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the sum is not in place."""
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        result: Tensor = self.act2(out + self.shortcut(x))
        return result


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem, no initial pool: 17 activations, 11,173,962 parameters for 10 classes.

    stem_stride: 2 halves the images before the first stage, at a quarter of the work and with the same parameters.
    """

    def __init__(
        self,
        activation: Factory,
        num_classes: int,
        normalize: nn.Module,
        *,
        in_channels: int = 3,
        width: int = 64,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = conv3x3(in_channels, width, stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        self.layer1 = _stage(width, width, 1, activation)
        self.layer2 = _stage(width, 2 * width, 2, activation)
        self.layer3 = _stage(2 * width, 4 * width, 2, activation)
        self.layer4 = _stage(4 * width, 8 * width, 2, activation)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.act1(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.linear(self.pool(x).flatten(1))
        return out


class SmallResNet(nn.Module):
    """A stem and a few basic blocks of one width, one per entry of `strides`: 2,626 parameters by default."""

    def __init__(
        self,
        activation: Factory,
        num_classes: int,
        normalize: nn.Module,
        *,
        in_channels: int = 1,
        width: int = 8,
        strides: Sequence[int] = (1, 2),
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if not strides:
            raise ConfigurationError("small_resnet: strides must name one block at least, for instance (1, 2)")
        self.normalize = normalize
        self.conv1 = conv3x3(in_channels, width, stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        self.blocks = nn.Sequential(*[BasicBlock(width, width, stride, activation) for stride in strides])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.blocks(self.act1(self.bn1(self.conv1(self.normalize(x)))))
        out: Tensor = self.linear(self.pool(x).flatten(1))
        return out


def _stage(channels_in: int, channels_out: int, stride: int, activation: Factory) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(channels_in, channels_out, stride, activation),
        BasicBlock(channels_out, channels_out, 1, activation),
    )
