"""Public architectures at tiny sizes with random weights, built where their packages are installed.

Every entry builds a model in evaluation mode with two samples, their targets, and what an `Objective` needs besides.
Images are small; heads of VGG and AlexNet are narrowed (their linear layers hold a hundred million weights). The nets
at the end are written here: recurrent, generative, physics-informed.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4


@dataclass(frozen=True)
class Case:
    """A model, two samples, and the loss."""

    model: nn.Module
    inputs: Any
    targets: Tensor
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A name within a family, and how it is built."""

    family: str
    name: str
    build: Callable[[], Case]


def images(size: int, *, samples: int = 2, channels: int = 3) -> Tensor:
    """Pictures of noise."""
    return torch.randn(samples, channels, size, size, generator=torch.Generator().manual_seed(1))


def classified(model: nn.Module, inputs: Any, **options: Any) -> Case:
    """Two samples of two classes."""
    return Case(model, inputs, torch.tensor([1, 3]), options)


# -- torchvision


_STUBS = torch.library.Library("torchvision", "FRAGMENT")


def _torchvision() -> Any:
    """Its models; None where it is not installed.

    Where its own operators do not fit this torch they are declared by name alone: no classifier uses them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    while True:
        try:
            return importlib.import_module("torchvision.models")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _STUBS.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [n for n in sys.modules if n.startswith("torchvision")]:
                del sys.modules[name]


TORCHVISION: dict[str, int] = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
    "googlenet": 32, "inception_v3": 75, "maxvit_t": 64, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_x_400mf": 32, "regnet_y_400mf": 32, "resnet18": 32, "resnet50": 32,
    "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_0": 32, "swin_t": 32, "swin_v2_t": 32, "vgg11": 32,
    "vgg11_bn": 32, "vit_b_16": 32, "wide_resnet50_2": 32,
}  # fmt: skip
"""One of every family of classifiers, and the width of the pictures."""


def torchvision_nets() -> Iterator[Architecture]:
    """Those of torchvision."""
    models = _torchvision()
    for name, size in TORCHVISION.items() if models is not None else ():

        def build(name: str = name, size: int = size) -> Case:
            options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
            if name in ("googlenet", "inception_v3"):
                options |= {"aux_logits": False, "init_weights": False}
            if name == "vit_b_16":
                model = models.VisionTransformer(size, 8, 2, 2, 16, 32, num_classes=CLASSES)
            elif name == "maxvit_t":
                model = models.MaxVit((size, size), 8, 2, [8, 16], [1, 1], 8, 0.0, num_classes=CLASSES)
            else:
                model = getattr(models, name)(**options)
            if name == "alexnet" or name.startswith("vgg"):
                width = model.classifier[0 if name.startswith("vgg") else 1].in_features
                model.classifier = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, CLASSES))
            if name == "vit_b_16":
                nn.init.normal_(model.heads[-1].weight)
            return classified(model, images(size))

        yield Architecture("torchvision", name, build)


# -- timm

TIMM: dict[str, dict[str, Any]] = {
    "resnetv2_50": {}, "seresnet18": {}, "skresnet18": {}, "ecaresnet26t": {}, "res2net50_14w_8s": {}, "dla34": {},
    "hrnet_w18_small": {}, "cspresnet50": {}, "repvgg_a0": {}, "nf_resnet26": {}, "mixer_s16_224": {"img_size": 32},
    "resmlp_12_224": {"img_size": 32}, "gmlp_ti16_224": {"img_size": 32}, "deit_tiny_patch16_224": {"img_size": 32},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "cait_xxs24_224": {"img_size": 32, "depth": 2}, "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2},
    "convmixer_768_32": {}, "poolformer_s12": {}, "mobilevit_xxs": {},
    "edgenext_xx_small": {}, "ghostnet_050": {}, "lcnet_050": {}, "tinynet_e": {}, "convnextv2_atto": {},
    "inception_next_atto": {}, "rexnet_100": {},
}  # fmt: skip


def timm_nets() -> Iterator[Architecture]:
    """Those of timm, which needs torchvision itself."""
    if importlib.util.find_spec("timm") is None or _torchvision() is None:
        return
    timm = importlib.import_module("timm")
    for name, options in TIMM.items():

        def build(name: str = name, options: dict[str, Any] = options) -> Case:
            model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
            return classified(model, images(options.get("img_size", 64)))

        yield Architecture("timm", name, build)


# -- transformers


def transformer_nets() -> Iterator[Architecture]:
    """Those of transformers, two layers of width 16; language models on two sequences of five tokens."""
    if importlib.util.find_spec("transformers") is None:
        return
    _torchvision()  # which it imports, if it is there
    lib = importlib.import_module("transformers")
    tokens = torch.tensor([[3, 7, 1, 9, 2], [5, 1, 8, 8, 4]])
    following = tokens.roll(-1, 1)
    size = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

    def language(model: nn.Module, call: Any = None) -> Case:
        return Case(model, tokens, following, {"output": "logits", "forward": call or (lambda m, x: m(input_ids=x))})

    def bert() -> Case:
        config = lib.BertConfig(**size, intermediate_size=24, max_position_embeddings=8, num_labels=CLASSES)
        return classified(lib.BertForSequenceClassification(config), tokens, output="logits")

    def gpt2() -> Case:
        return language(
            lib.GPT2LMHeadModel(lib.GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2))
        )

    def llama() -> Case:
        return language(lib.LlamaForCausalLM(lib.LlamaConfig(**size, intermediate_size=24, num_key_value_heads=2)))

    def vit() -> Case:
        small = {key: value for key, value in size.items() if key != "vocab_size"}
        config = lib.ViTConfig(**small, intermediate_size=24, image_size=16, patch_size=8, num_labels=CLASSES)
        return classified(lib.ViTForImageClassification(config), images(16), output="logits")

    def t5() -> Case:
        config = lib.T5Config(
            vocab_size=11, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        return language(
            lib.T5ForConditionalGeneration(config), lambda m, x: m(input_ids=x, decoder_input_ids=x, use_cache=False)
        )

    def mamba() -> Case:
        config = lib.MambaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, state_size=4, use_mambapy=False)
        return language(lib.MambaForCausalLM(config))

    for name, build in (("BERT", bert), ("GPT-2", gpt2), ("Llama", llama), ("ViT", vit), ("T5", t5), ("Mamba", mamba)):
        yield Architecture("transformers", name, build)


# -- from folders

PYTORCH_CIFAR = {
    "VGG": ("VGG11",), "ResNet18": (), "PreActResNet18": (), "GoogLeNet": (), "DenseNet121": (),
    "ResNeXt29_2x64d": (), "MobileNet": (), "MobileNetV2": (), "DPN26": (), "ShuffleNetG2": (), "SENet18": (),
    "EfficientNetB0": (),
}  # fmt: skip


def cifar_nets(folder: Path | None) -> Iterator[Architecture]:
    """Those of github.com/kuangliu/pytorch-cifar, cloned into a folder."""
    if folder is None:
        return
    sys.path.insert(0, str(folder))
    models = importlib.import_module("models")
    for name, arguments in PYTORCH_CIFAR.items():

        def build(name: str = name, arguments: tuple[Any, ...] = arguments) -> Case:
            return classified(getattr(models, name)(*arguments), images(32))

        yield Architecture("pytorch-cifar", name, build)


ROBUSTBENCH = {
    "resnet": ("ResNet18", {}), "wide_resnet": ("WideResNet", {"depth": 10, "widen_factor": 1}),
    "dm_wide_resnet": ("DMWideResNet", {"num_classes": 10, "depth": 10, "width": 1, "activation_fn": "Swish"}),
    "resnext": (
        "CifarResNeXt",
        {"block": "ResNeXtBottleneck", "cardinality": 2, "depth": 11, "base_width": 4, "num_classes": 10},
    ),
}  # fmt: skip


def robustbench_nets() -> Iterator[Architecture]:
    """Those of the package robustbench, whose architectures are imported one by one."""
    if importlib.util.find_spec("robustbench") is None:
        return
    root = Path(next(iter(importlib.util.find_spec("robustbench").submodule_search_locations or ())))  # type: ignore[union-attr]
    for module, (name, options) in ROBUSTBENCH.items():
        path = root / "model_zoo" / "architectures" / f"{module}.py"

        def build(path: Path = path, name: str = name, options: dict[str, Any] = options) -> Case:
            spec = importlib.util.spec_from_file_location(f"robustbench_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded
            spec.loader.exec_module(loaded)
            own = {key: getattr(loaded, value) if isinstance(value, str) else value for key, value in options.items()}
            return classified(getattr(loaded, name)(**own), images(32))

        yield Architecture("robustbench", name, build)


# -- written here


class Recurrent(nn.Module):
    """A recurrent net over a sequence, and a linear layer on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.net, self.head = kind(3, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 3] to classes."""
        return self.head(self.net(x)[0][:, -1])  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions, skips by concatenation; GroupNorm."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(2, o), nn.SiLU())

        self.one, self.two, self.three = block(3, 4), block(4, 6), block(6, 8)
        self.up_two, self.up_one = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.back_two, self.back_one, self.last = block(12, 6), block(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures to pictures."""
        a = self.one(x)
        b = self.two(F.max_pool2d(a, 2))
        c = self.three(F.max_pool2d(b, 2))
        b = self.back_two(torch.cat([b, self.up_two(c)], 1))
        return self.last(self.back_one(torch.cat([a, self.up_one(b)], 1))).flatten(1)  # type: ignore[no-any-return]


class DCGAN(nn.Module):
    """A generator's pictures as its discriminator sees them; both in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
            nn.Conv2d(8, CLASSES, 4, 1, 0, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Noise to scores."""
        return self.discriminator(self.generator(x[:, :, None, None])).flatten(1)  # type: ignore[no-any-return]


class KAN(nn.Module):
    """Two layers of learned functions on edges: bumps on a grid, weighted, and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, 5))
        self.base = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, CLASSES)])
        self.bumps = nn.ModuleList([nn.Linear(4 * 5, 5, bias=False), nn.Linear(5 * 5, CLASSES, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4] to classes."""
        for base, bumps in zip(self.base, self.bumps):
            x = base(F.silu(x)) + bumps(torch.exp(-((x[..., None] - self.grid) ** 2)).flatten(1))
        return x


class NeuralODE(nn.Module):
    """Four steps of Runge and Kutta through one field, whose weights are used sixteen times."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4] to classes."""
        h = 0.25
        for _ in range(4):
            a = self.field(x)
            b = self.field(x + h / 2 * a)
            c = self.field(x + h / 2 * b)
            x = x + h / 6 * (a + 2 * b + 2 * c + self.field(x + h * c))
        return self.head(x)  # type: ignore[no-any-return]


class PINN(nn.Module):
    """The residual u' + u^2 of a network u(t): the outputs hold a derivative in the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, t: Tensor) -> Tensor:
        """Times to residuals."""
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            u = self.net(t)
            (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            return slope + u**2


def own_nets() -> Iterator[Architecture]:
    """Those written here."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))

    builds: dict[str, Callable[[], Case]] = {
        "RNN": lambda: classified(Recurrent(nn.RNN), noise(4, 3)),
        "LSTM": lambda: classified(Recurrent(nn.LSTM), noise(4, 3)),
        "GRU": lambda: classified(Recurrent(nn.GRU), noise(4, 3)),
        "U-Net": lambda: Case(UNet(), images(8), noise(2 * 64), {"loss": "mse"}),
        "DCGAN": lambda: classified(DCGAN(), noise(6)),
        "KAN": lambda: classified(KAN(), noise(4)),
        "neural ODE": lambda: classified(NeuralODE(), noise(4)),
        "PINN": lambda: Case(PINN(), noise(1), torch.zeros(2, 1), {"loss": "mse"}),
    }
    for name, build in builds.items():
        yield Architecture("written here", name, build)


def architectures(*, cifar: Path | None = None) -> Iterator[Architecture]:
    """All that can be built here."""
    yield from own_nets()
    yield from torchvision_nets()
    yield from timm_nets()
    yield from transformer_nets()
    yield from robustbench_nets()
    yield from cifar_nets(cifar)
