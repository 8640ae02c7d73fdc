"""Pre-activation ResNet-18 (He et al. 2016, "Identity mappings"), as public adversarial-training code has it.

The shortcut convolution takes the activated input and has no BatchNorm; a BatchNorm and an activation stand
before the pool. State-dict keys: conv1, layer1.0.bn1, layer1.0.conv1, layer2.0.shortcut.0, bn, linear.
"""

from __future__ import annotations

from torch import Tensor, nn

from hessdiag.networks.resnet import Factory, conv3x3


class PreActBlock(nn.Module):
    """conv(act BN) -> conv(act BN) -> + shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: Factory) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.act1 = activation()
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.act2 = activation()
        self.conv2 = conv3x3(channels_out, channels_out)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the sum is not in place."""
        active = self.act1(self.bn1(x))
        out: Tensor = self.conv2(self.act2(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18: 17 activations, 11,172,170 parameters for 10 classes; `stem_stride` as in ResNet18."""

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
        self.layer1 = _stage(width, width, 1, activation)
        self.layer2 = _stage(width, 2 * width, 2, activation)
        self.layer3 = _stage(2 * width, 4 * width, 2, activation)
        self.layer4 = _stage(4 * width, 8 * width, 2, activation)
        self.bn = nn.BatchNorm2d(8 * width)
        self.act = activation()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(self.normalize(x))))))
        out: Tensor = self.linear(self.pool(self.act(self.bn(x))).flatten(1))
        return out


def _stage(channels_in: int, channels_out: int, stride: int, activation: Factory) -> nn.Sequential:
    return nn.Sequential(
        PreActBlock(channels_in, channels_out, stride, activation),
        PreActBlock(channels_out, channels_out, 1, activation),
    )
