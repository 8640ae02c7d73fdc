"""State dicts of public code: their names are translated, the outputs stay those of the network they came
from.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessdiag import networks
from hessdiag.checkpoint import inspect_checkpoint, load_checkpoint
from hessdiag.checkpoint.guess import hint
from hessdiag.checkpoint.layout import translate
from hessdiag.errors import CheckpointError, UnknownNameError
from hessdiag.store.files import BadFileError
from hessdiag.store.tensorfiles import TensorFacts

State = dict[str, Tensor]
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 4},
    "preact_resnet18": {"width": 4},
    "wrn28_10": {"depth": 10, "widen": 2},
}


def source(network: str, **options: Any) -> nn.Module:
    model = networks.build(network, seed=0, **{**SMALL[network], **options})
    model.train()(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def write(path: Path, value: Any, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def same(loaded: nn.Module, model: nn.Module) -> bool:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "net", "model", "model_state_dict"])
def test_wrapped_and_bare(network: str, legacy: bool, wrapper: str | None, tmp_path: Path) -> None:
    model = source(network)
    state = model.state_dict()
    content = state if wrapper is None else {wrapper: state, "epoch": 76, "optimizer": {"lr": 0.1, "state": {}}}
    path = write(tmp_path / "a.pth", content, legacy=legacy)
    loaded = load_checkpoint(path, network=network, activation="relu")
    assert same(loaded.model, model)
    assert loaded.epoch == (None if wrapper is None else 76)
    expected = "bare state dict" if wrapper is None else f"state dict under '{wrapper}'"
    assert loaded.notes[0] == f"read as a {expected}"
    assert loaded.config["network"] == network
    assert loaded.config["activation"] == "relu"


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.", "module.model._orig_mod."],
)
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    model = source("resnet18")
    state = {prefix + name: value for name, value in model.state_dict().items()}
    loaded = load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu")
    assert same(loaded.model, model)
    assert any(note.startswith("names stripped of") for note in loaded.notes)


def test_averaged_model_of_torch(tmp_path: Path) -> None:
    model = source("resnet18")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loaded = load_checkpoint(write(tmp_path / "a.pt", averaged.state_dict()), network="resnet18", activation="relu")
    assert same(loaded.model, model)
    assert "names stripped of n_averaged module." in loaded.notes


def test_compiled_part_inside(tmp_path: Path) -> None:
    model = source("resnet18")
    state = {name.replace("layer1.", "layer1._orig_mod."): value for name, value in model.state_dict().items()}
    assert same(load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu").model, model)


def test_dead_block_of_trades_is_dropped_with_a_note(tmp_path: Path) -> None:
    model = source("wrn28_10")
    state = model.state_dict()
    dead = {f"sub_{name}": value for name, value in state.items() if name.startswith("block1.")}
    loaded = load_checkpoint(write(tmp_path / "a.pt", {**state, **dead}), network="wrn28_10", activation="relu")
    assert same(loaded.model, model)
    assert f"{len(dead)} tensors of sub_block1 dropped: that code never uses them" in loaded.notes
    assert not any("sub_block1" in name for name in loaded.model.state_dict())


class SplitBlock(nn.Module):
    """DAJAT's block, written here from its description: two BatchNorms at every place, of which tests use the
    first.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        for name in ("bn1", "bn1_auto", "bn2", "bn2_auto"):
            setattr(self, name, nn.BatchNorm2d(channels_out))
        self.shortcut, self.shortcut_bn, self.shortcut_bn_auto = (
            nn.Sequential(),
            nn.Sequential(),
            nn.Sequential(),
        )
        if stride != 1:
            self.shortcut.append(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False))
            self.shortcut_bn.append(nn.BatchNorm2d(channels_out))
            self.shortcut_bn_auto.append(nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut_bn(self.shortcut(x)))


class SplitNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1, self.bn1_auto = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        for stage in range(4):
            before, after, stride = width << max(stage - 1, 0), width << stage, 1 if stage == 0 else 2
            blocks = SplitBlock(before, after, stride), SplitBlock(after, after, 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def test_split_batch_norms_of_dajat(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    model = SplitNet()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) / 4 + 0.1)
    model.eval()
    # The average covers the counters of BatchNorm too, which become floats by that.
    state = {"module." + name: value.float() for name, value in model.state_dict().items()}
    loaded = load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu")
    x = torch.rand(2, 3, 16, 16, generator=generator)
    torch.testing.assert_close(loaded.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert any("*_auto BatchNorms dropped" in note for note in loaded.notes)
    assert "shortcut_bn.0 read as shortcut.1" in loaded.notes


def test_auto_norm_without_a_base_twin_is_not_dropped(tmp_path: Path) -> None:
    state = source("resnet18").state_dict()
    state["layer1.0.extra_auto.weight"] = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(layer1\.0\.extra_auto\.weight\)"):
        load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu")


def test_classifier_called_otherwise(tmp_path: Path) -> None:
    model = source("resnet18")
    state = {name.replace("linear.", "fc."): value for name, value in model.state_dict().items()}
    loaded = load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu")
    assert same(loaded.model, model)
    assert "fc read as linear" in loaded.notes


def test_torchvisions_names_with_a_stem_for_small_images(tmp_path: Path) -> None:
    model = source("resnet18")
    state = {
        name.replace("linear.", "fc.").replace("shortcut.", "downsample."): value
        for name, value in model.state_dict().items()
    }
    path = write(tmp_path / "a.pt", state)
    loaded = load_checkpoint(path, network="resnet18", activation="relu")
    assert same(loaded.model, model)
    assert any("no tensor tells a max-pooling behind the stem" in note for note in loaded.notes)
    assert any("its tensors are those of resnet18" in note for note in inspect_checkpoint(path).notes)


@pytest.mark.parametrize(
    ("blocks", "bottleneck", "classes", "words"),
    [
        ((2, 2, 2, 2), False, 1000, "--model torchvision.models:resnet18"),
        ((3, 4, 6, 3), False, 7, "make() returns torchvision.models.resnet34(num_classes=7)"),
        ((3, 4, 23, 3), True, 1000, "--model torchvision.models:resnet101"),
    ],
)
def test_torchvisions_own_nets_are_named(blocks: tuple[int, ...], bottleneck: bool, classes: int, words: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    for stage, count in enumerate(blocks):
        for block in range(count):
            for conv in range(3 if bottleneck else 2):
                side = 1 if bottleneck and conv != 1 else 3
                width = 64 * 2**stage
                shapes[f"layer{stage + 1}.{block}.conv{conv + 1}.weight"] = (width, width, side, side)
    shapes["fc.weight"] = (classes, 512)
    weights = {name: TensorFacts(shape, torch.float32) for name, shape in shapes.items()}
    assert hint(weights).endswith(words)
    wider = weights | {"layer1.0.conv2.weight": TensorFacts((128, 128, 3, 3), torch.float32)}
    assert "torchvision" not in hint(wider)
    target = weights | {"conv1.weight": TensorFacts((64, 3, 3, 3), torch.float32)}
    with pytest.raises(BadFileError, match="its stem of 7x7"):
        translate(weights, target)
    with pytest.raises(BadFileError, match=r"shape \(64, 3, 3, 3\), the network wants \(64, 3, 7, 7\)"):
        translate(target, weights)


def test_counters_absent_as_in_old_torch(tmp_path: Path) -> None:
    model = source("resnet18")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    loaded = load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu")
    assert same(loaded.model, model)
    assert "20 num_batches_tracked absent (torch before 0.4.1): set to 0" in loaded.notes


def test_normalisation_stored_among_the_weights(tmp_path: Path) -> None:
    constants = ((0.25, 0.5, 0.75), (0.5, 0.25, 0.125))
    model = source("resnet18", normalize=constants)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state["normalize.mean"], state["normalize.std"] = (torch.tensor(c).view(1, 3, 1, 1) for c in constants)
    path = write(tmp_path / "a.pt", state)
    for given in (None, constants):
        loaded = load_checkpoint(path, network="resnet18", activation="relu", normalize=given)
        assert same(loaded.model, model)
        assert any("file's own constants" in note for note in loaded.notes)
    with pytest.raises(CheckpointError, match="other than the given ones"):
        load_checkpoint(path, network="resnet18", activation="relu", normalize=((0.0,) * 3, (1.0,) * 3))


def test_class_counts_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", source("resnet18", num_classes=100).state_dict())
    with pytest.raises(CheckpointError, match="checkpoint has 100 classes, network built for 10"):
        load_checkpoint(path, network="resnet18", activation="relu", num_classes=10)
    loaded = load_checkpoint(path, network="resnet18", activation="relu")
    assert loaded.config["num_classes"] == 100
    assert "100 classes, from the shape of the last layer" in loaded.notes


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    state = source("resnet18").state_dict()
    del state["bn1.weight"]
    state.update({f"extra{i}": torch.zeros(1) for i in range(8)})
    with pytest.raises(
        CheckpointError, match=r"1 missing \(bn1\.weight\); 8 unexpected \(extra0, .*extra5 and 2 more\)"
    ):
        load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu")


def test_names_that_collide_once_stripped(tmp_path: Path) -> None:
    state = {"module.a._orig_mod.w": torch.zeros(1), "module.a.w": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"two tensors are called 'a\.w'"):
        load_checkpoint(write(tmp_path / "a.pt", state), network="mlp", activation="relu")


@pytest.mark.parametrize("network", SMALL)
def test_network_and_activation_must_be_named(network: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {f"module.{name}": value for name, value in source(network).state_dict().items()})
    with pytest.raises(CheckpointError, match=f"pass network= .* its tensors are those of {network}"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="pass activation="):
        load_checkpoint(path, network=network)
    with pytest.raises(UnknownNameError, match="resnet81"):
        load_checkpoint(path, network="resnet81", activation="relu")
    assert any(f"its tensors are those of {network}" in note for note in inspect_checkpoint(path).notes)


def test_wide_network_of_another_depth(tmp_path: Path) -> None:
    model = source("wrn28_10", depth=16)
    path = write(tmp_path / "a.pt", model.state_dict())
    loaded = load_checkpoint(path, network="wrn28_10", activation="relu")
    assert same(loaded.model, model)
    assert loaded.config["depth"] == 16
    assert "from the shapes: depth=16, widen=2" in loaded.notes
    with pytest.raises(CheckpointError, match="those of wrn28_10 depth=16 widen=2"):
        load_checkpoint(path)


def test_deepminds_network_is_named_in_the_hint(tmp_path: Path) -> None:
    state = {"init_conv.weight": torch.zeros(1), "layer.0.block.0.batchnorm_0.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="DeepMind's WideResNet"):
        load_checkpoint(write(tmp_path / "a.pt", state))


def test_preact_note_tells_of_the_other_variant(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", source("preact_resnet18").state_dict())
    assert any(
        "activated input" in note for note in load_checkpoint(path, network="preact_resnet18", activation="relu").notes
    )


@pytest.mark.parametrize("network", ["resnet18", "preact_resnet18"])
def test_the_stride_of_the_stem_is_told_by_the_user_or_said_to_be_assumed(network: str, tmp_path: Path) -> None:
    model = source(network, stem_stride=2)
    path = write(tmp_path / "a.pt", model.state_dict())
    assumed = load_checkpoint(path, network=network, activation="relu")
    assert any("stem_stride=1, which no tensor tells" in note for note in assumed.notes)
    assert assumed.config["stem_stride"] == 1
    assert not same(assumed.model, model)
    told = load_checkpoint(path, network=network, activation="relu", options={"stem_stride": 2})
    assert not any("stem_stride" in note for note in told.notes)
    assert same(told.model, model)


def test_mlp_sizes_come_from_the_shapes(tmp_path: Path) -> None:
    model = networks.build("mlp", in_features=6, widths=(5, 4), num_classes=3, bias=False, seed=0)
    loaded = load_checkpoint(write(tmp_path / "a.pt", model.state_dict()), network="mlp", activation="tanh")
    assert loaded.config == {**model.config, "activation": "tanh"}


def test_averaged_weights_of_public_code(tmp_path: Path) -> None:
    model, average = source("resnet18"), source("resnet18", activation="silu")
    for tensor in average.state_dict().values():
        tensor.mul_(0.5) if tensor.is_floating_point() else tensor
    path = write(tmp_path / "a.pt", {"model": model.state_dict(), "model_ema": average.state_dict()})
    chosen = load_checkpoint(path, network="resnet18", activation="silu")
    assert chosen.weights == "ema"
    assert same(chosen.model, average)
    assert not same(load_checkpoint(path, network="resnet18", activation="silu", weights="model").model, average)


def test_parameters_instead_of_tensors(tmp_path: Path) -> None:
    model = source("resnet18")
    state = {**model.state_dict(), **dict(model.named_parameters())}
    assert isinstance(state["conv1.weight"], nn.Parameter)
    assert same(load_checkpoint(write(tmp_path / "a.pt", state), network="resnet18", activation="relu").model, model)


def test_the_default_networks_in_full(tmp_path: Path) -> None:
    """ResNet-18 at its real size, from the old format that the first public checkpoints have, in memory
    alone.
    """
    model = networks.build("resnet18", num_classes=10, seed=0)
    buffer = io.BytesIO()
    torch.save({"state_dict": model.state_dict()}, buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "rn18.pt"
    path.write_bytes(buffer.getvalue())
    loaded = load_checkpoint(path, network="resnet18", activation="rct:beta=1,alpha=14")
    assert sum(p.numel() for p in loaded.model.parameters()) == inspect_checkpoint(path).parameters == 11_173_962
