"""What is saved comes back: weights, averaged weights, and all that the file says of itself."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hessdiag import networks
from hessdiag.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
from hessdiag.errors import CheckpointError, ConfigurationError

BOTH = pytest.mark.parametrize("suffix", ["pt", "safetensors"])


def small(**options: Any) -> nn.Module:
    given = {"activation": "rct:beta=1,alpha=7", "normalize": ((0.5,), (0.25,)), "seed": 1, **options}
    model = networks.build("small_resnet", **given)
    generator = torch.Generator().manual_seed(0)
    model.train()
    model(torch.rand(16, 1, 8, 8, generator=generator))  # running statistics other than the initial ones
    return model.eval()


def outputs(model: nn.Module) -> torch.Tensor:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: torch.Tensor = model(x)
    return result


@BOTH
def test_round_trip(suffix: str, tmp_path: Path) -> None:
    model, path = small(), tmp_path / f"a.{suffix}"
    save_checkpoint(path, model, epoch=7, metrics={"clean": 0.9, "steps": [1, 2]}, dataset="digits", method="standard")
    loaded = load_checkpoint(path)
    assert torch.equal(outputs(loaded.model), outputs(model))
    assert not loaded.model.training
    assert loaded.config == model.config
    assert (loaded.epoch, loaded.metrics) == (7, {"clean": 0.9, "steps": [1, 2]})
    assert loaded.extra == {"dataset": "digits", "method": "standard"}
    assert loaded.weights == "model"
    assert loaded.notes == ()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


@BOTH
def test_stride_of_the_stem_is_kept_and_is_1_where_a_file_is_older_than_the_option(suffix: str, tmp_path: Path) -> None:
    model, path = small(stem_stride=2), tmp_path / f"a.{suffix}"
    save_checkpoint(path, model)
    loaded = load_checkpoint(path, options={"stem_stride": 2})
    assert loaded.config["stem_stride"] == 2
    assert torch.equal(outputs(loaded.model), outputs(model))
    with pytest.raises(CheckpointError, match="the file says stem_stride '2', you asked for '1'"):
        load_checkpoint(path, options={"stem_stride": 1})

    old = small()
    config: Any = old.config
    del config["stem_stride"]
    save_checkpoint(path, old)
    assert torch.equal(outputs(load_checkpoint(path, options={"stem_stride": 1}).model), outputs(old))
    with pytest.raises(CheckpointError, match="the file says stem_stride '1', you asked for '2'"):
        load_checkpoint(path, options={"stem_stride": 2})


@BOTH
def test_equal_contents_give_equal_bytes(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in ("first", "second")]
    for path in paths:
        save_checkpoint(path, small(), ema=small(seed=2), epoch=1, metrics={"b": 1, "a": 2}, one=1, two=2)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert load_checkpoint(paths[0]).sha256 == load_checkpoint(paths[1]).sha256


@BOTH
def test_averaged_weights_are_chosen_and_named(suffix: str, tmp_path: Path) -> None:
    model, average, path = small(), small(seed=2), tmp_path / f"a.{suffix}"
    save_checkpoint(path, model, ema=average)
    assert torch.equal(outputs(load_checkpoint(path, weights="model").model), outputs(model))
    assert torch.equal(outputs(load_checkpoint(path, weights="ema").model), outputs(average))
    chosen = load_checkpoint(path)
    assert torch.equal(outputs(chosen.model), outputs(average))
    assert chosen.weights == "ema"
    assert "averaged" in chosen.notes[0]
    save_checkpoint(path, model)
    assert load_checkpoint(path).weights == "model"
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_checkpoint(path, weights="ema")
    with pytest.raises(ConfigurationError, match="'best'"):
        load_checkpoint(path, weights="best")


@BOTH
def test_float64_weights_stay_float64(suffix: str, tmp_path: Path) -> None:
    model, path = small().double(), tmp_path / f"a.{suffix}"
    save_checkpoint(path, model)
    loaded = load_checkpoint(path)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    assert loaded.notes == ("weights stored as torch.float64: the model is torch.float64",)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(loaded.model(x), model(x))


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    model, path = small().half(), tmp_path / "a.pt"
    save_checkpoint(path, model)
    loaded = load_checkpoint(path)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert "torch.float16" in loaded.notes[0]


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, small())
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(CheckpointError, match="No space left"):
                save_checkpoint(path, small(seed=5))
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_views_do_not_drag_their_storage_into_the_file(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.zeros(1_000_000)[:4].view(2, 2)
    save_checkpoint(tmp_path / "a.pt", layer, config={})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_tied_weights_survive_safetensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "a.safetensors", model, config={})
    loaded = load_checkpoint(tmp_path / "a.safetensors", factory=lambda: copy.deepcopy(model))
    assert torch.equal(loaded.model.state_dict()["1.weight"], model[0].weight)


@BOTH
def test_a_users_own_model(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(CheckpointError, match=r"no \.config"):
        save_checkpoint(path, model)
    save_checkpoint(path, model, config={})
    with pytest.raises(CheckpointError, match="factory="):
        load_checkpoint(path)

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    loaded = load_checkpoint(path, factory=make)
    x = torch.rand(5, 3)
    assert torch.equal(loaded.model(x), model(x))
    with pytest.raises(CheckpointError, match=r"2 missing \(3\.weight, 3\.bias\)"):
        load_checkpoint(path, factory=lambda: make().append(nn.Linear(2, 2)))
    with pytest.raises(ConfigurationError, match="raised ZeroDivisionError"):
        load_checkpoint(path, factory=lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match="returned int"):
        load_checkpoint(path, factory=lambda: 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match="leave out network"):
        load_checkpoint(path, factory=make, network="mlp")


def test_normalisation_goes_before_a_users_own_model(tmp_path: Path) -> None:
    """And is that of the last load alone; what a factory cannot heed is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    x = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    mean, std = (0.3, 0.1, 0.7), (0.35, 0.2, 0.1)
    wanted = model((x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None])
    own = copy.deepcopy(model)
    for _ in range(2):
        loaded = load_checkpoint(tmp_path / "bare.pt", factory=own, normalize=(mean, std)).model
        torch.testing.assert_close(loaded(x), wanted, rtol=1e-14, atol=1e-14)
    assert list(loaded.state_dict()) == ["1.weight", "1.bias"]
    torch.testing.assert_close(copy.deepcopy(loaded)(x), wanted, rtol=1e-14, atol=1e-14)
    for wrong in (x.long(), x[:, 0, 0, 0]):
        with pytest.raises(ConfigurationError, match="leave it out, and normalise the data"):
            loaded(wrong)
    assert torch.equal(load_checkpoint(tmp_path / "bare.pt", factory=own).model(x), model(x))
    with pytest.raises(ConfigurationError, match="one of each per channel"):
        load_checkpoint(tmp_path / "bare.pt", factory=own, normalize=((0.1,), (0.1, 0.2)))
    with pytest.raises(ConfigurationError, match="leave out num_classes and options"):
        load_checkpoint(tmp_path / "bare.pt", factory=own, num_classes=2, options={"width": 3})


def test_factory_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_code_a.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 1)\n")
    monkeypatch.chdir(tmp_path)
    save_checkpoint("a.pt", nn.Linear(2, 1), config={})
    assert isinstance(load_checkpoint("a.pt", factory="their_code_a:make").model, nn.Linear)
    for text, reason in (
        ("their_code_a:absent", "no attribute 'absent'"),
        ("no_such_module_b:make", "no module 'no_such_module_b'"),
        ("nonsense", "package.module:name"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            load_checkpoint("a.pt", factory=text)


def test_arguments_must_agree_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, small())
    load_checkpoint(path, network="small_resnet", activation="rct:alpha=7,beta=1", num_classes=10)
    load_checkpoint(path, activation="rct:beta=1,curvature=3.5", normalize=((0.5,), (0.25,)), options={"width": 8})
    for given in (
        {"activation": "silu"},
        {"activation": "rct:beta=1,alpha=14"},
        {"network": "resnet18"},
        {"num_classes": 100},
        {"normalize": ((0.0,), (1.0,))},
        {"options": {"width": 9}},
    ):
        with pytest.raises(
            CheckpointError,
            match=f"the file says .*{next(iter(given)) if 'options' not in given else 'width'}",
        ):
            load_checkpoint(path, **given)  # type: ignore[arg-type]


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", small())
    before = torch.get_rng_state()
    load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_refusals_when_saving(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(CheckpointError, match=r"end the name in \.pt"):
        save_checkpoint(tmp_path / "a.bin", model)
    with pytest.raises(CheckpointError, match="No such file"):
        save_checkpoint(tmp_path / "absent" / "a.pt", model)
    with pytest.raises(CheckpointError, match=r"metrics\.x is a Tensor"):
        save_checkpoint(tmp_path / "a.pt", model, metrics={"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"extra\.x is a object"):
        save_checkpoint(tmp_path / "a.pt", model, x=object())
    with pytest.raises(CheckpointError, match="differ in their tensors"):
        save_checkpoint(tmp_path / "a.pt", model, ema=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="no count"):
        save_checkpoint(tmp_path / "a.pt", model, epoch=-1)
    assert list(tmp_path.iterdir()) == []


def test_wrappers_are_not_saved(tmp_path: Path) -> None:
    model = small()
    save_checkpoint(tmp_path / "a.pt", nn.DataParallel(model), config=model.config)
    assert load_checkpoint(tmp_path / "a.pt").notes == ()
    wrapped = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "b.pt", wrapped, config=model.config)
    assert torch.equal(outputs(load_checkpoint(tmp_path / "b.pt").model), outputs(model))


@BOTH
def test_summary_tells_what_is_inside(suffix: str, tmp_path: Path) -> None:
    model, path = small(), tmp_path / f"a.{suffix}"
    save_checkpoint(path, model, ema=model, epoch=2, metrics={"clean": 0.5}, dataset="digits")
    summary = inspect_checkpoint(path)
    assert summary.layout == "hessdiag/1"
    assert summary.kind == ("torch zip" if suffix == "pt" else "safetensors")
    assert summary.size == path.stat().st_size
    assert summary.sha256 == load_checkpoint(path).sha256
    assert (summary.config, summary.epoch, summary.metrics) == (model.config, 2, {"clean": 0.5})
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    state = model.state_dict()
    told = {(entry.weights, entry.name): entry for entry in summary.tensors}
    assert set(told) == {(which, name) for which in ("model", "ema") for name in state}
    for name, value in state.items():
        entry = told["model", name]
        assert entry.shape == tuple(value.shape)
        assert entry.dtype == str(value.dtype).removeprefix("torch.")
        assert entry.bytes == value.numel() * value.element_size()
    assert json.loads(json.dumps(summary.to_dict()))["tensors"][0]["name"] == summary.tensors[0].name
