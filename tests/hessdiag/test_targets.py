"""Targets from files mean what the loss reads in them: the command measures what Python measures of the same arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load_named
from hessdiag.errors import EmptyDataError, TargetError

NETS = """
import torch
from torch import nn
def pixels(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
def words(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
def logits(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
def logit(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The code of NETS, to be imported, and weights beside it."""
    found = tmp_path_factory.mktemp("nets")
    (found / "their_nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(found)
        torch.manual_seed(0)
        for name in ("pixels", "words", "logits", "logit"):
            torch.save(getattr(import_module("their_nets"), name)().state_dict(), found / f"{name}.pt")
        yield found


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


PREDICTED: dict[str, Any] = {
    "mse": ("mse", lambda f: f, lambda f, y: F.mse_loss(f, y)),
    "bce": ("bce", torch.sigmoid, lambda f, y: F.binary_cross_entropy_with_logits(f, y)),
    "cross_entropy": ("cross_entropy", lambda f: torch.softmax(f, 1), F.cross_entropy),
    "callable": (squares, lambda f: f, lambda f, y: squares(f, y).mean()),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_targets_that_the_model_itself_predicts_are_constants(name: str) -> None:
    """Made without no_grad, as in self-distillation. Against the second derivatives by autograd, targets held fixed."""
    loss, meant, plain = PREDICTED[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    x, other = torch.randn(6, 5).double(), torch.softmax(torch.randn(6, 3), 1).double()
    drawn = 0.5 * meant(model(x)) + 0.5 * other
    fixed = drawn.detach().clone()
    gradients = torch.autograd.grad(plain(model(x), fixed), list(model.parameters()), create_graph=True)
    truth = {}
    for (key, parameter), gradient in zip(model.named_parameters(), gradients):
        rows = [torch.autograd.grad(g, parameter, retain_graph=True)[0].flatten() for g in gradient.flatten()]
        truth[key] = torch.stack(rows).diagonal().reshape(parameter.shape)
    for method in ("exact", "reference"):
        found = hd.diagonal(hd.Objective(model, loss=loss), [(x, drawn)], method=method)
        for key, entries in truth.items():
            torch.testing.assert_close(found.total[key], entries, rtol=1e-10, atol=1e-13)
    for method in ("propagation", "hutchinson"):
        pair = [hd.diagonal(hd.Objective(model, loss=loss), [(x, y)], method=method).total for y in (drawn, fixed)]
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in truth)
    assert drawn.requires_grad


def test_class_weights_with_a_graph_are_constants() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    batch, weights = (torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])), torch.rand(3).double() + 0.5
    drawn = weights.clone() * model(batch[0]).mean().exp() / model(batch[0]).mean().exp().detach()
    for method in ("exact", "reference"):
        found = [
            hd.measure(hd.Objective(model, class_weights=own), [batch], method=method).rms
            for own in (drawn, drawn.detach().clone())
        ]
        assert found[0] == found[1]


def _net(folder: Path, name: str) -> nn.Module:
    return hd.load_checkpoint(folder / f"{name}.pt", factory=f"their_nets:{name}").model


def _measured(folder: Path, name: str, arrays: dict[str, Any], *options: str, home: Path) -> Any:
    np.savez(home / "d.npz", **arrays)
    line = ["measure", str(folder / f"{name}.pt"), "--model", f"their_nets:{name}"]
    line += ["--data", f"npz:{home / 'd.npz'}", "--no-spread", "--method", "exact", *options]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, line)


def _arrays(shape: tuple[int, ...], targets: tuple[int, ...], top: int, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "inputs": rng.random((8, *shape), dtype=np.float32),
        "targets": rng.integers(0, top, (8, *targets)).astype(dtype),
    }


@pytest.mark.parametrize(
    ("net", "shape", "targets", "top", "loss"),
    [
        ("pixels", (1, 5, 5), (5, 5), 3, "cross_entropy"),
        ("words", (5, 4), (5,), 3, "cross_entropy"),
        ("logits", (4,), (3,), 2, "bce"),
        ("logit", (4,), (1,), 2, "bce"),
        ("logits", (4,), (3,), 7, "mse"),
    ],
)
@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_whole_numbers_of_any_shape(
    folder: Path,
    net: str,
    shape: tuple[int, ...],
    targets: tuple[int, ...],
    top: int,
    loss: str,
    dtype: str,
    tmp_path: Path,
) -> None:
    arrays = _arrays(shape, targets, top, dtype)
    told = _measured(folder, net, arrays, "--loss", loss, "-q", home=tmp_path)
    assert told.exit_code == 0, told.stderr
    y = torch.from_numpy(arrays["targets"])
    y = y.long() if loss == "cross_entropy" else y.float()
    objective = hd.Objective(_net(folder, net), loss)
    expected = hd.measure(objective, (torch.from_numpy(arrays["inputs"]), y), method="exact").rms
    assert float(told.stdout.split()[0]) == pytest.approx(expected, rel=1e-6)


def test_truth_values_are_values(folder: Path, tmp_path: Path) -> None:
    arrays = _arrays((4,), (3,), 2, "bool")
    told = _measured(folder, "logits", arrays, "--loss", "bce", "-q", home=tmp_path)
    assert told.exit_code == 0, told.stderr


@pytest.mark.parametrize(("mark", "dtype"), [(-1, "int64"), (255, "uint8")])
def test_samples_that_do_not_count(folder: Path, mark: int, dtype: str, tmp_path: Path) -> None:
    """Neither in the classes, nor in the accuracy, nor in chance."""
    arrays = _arrays((4,), (), 3, dtype)
    inputs = torch.from_numpy(arrays["inputs"])
    arrays["targets"] = _net(folder, "logits")(inputs).argmax(1).numpy().astype(dtype)  # all right
    counted = arrays["targets"][:4].copy()
    arrays["targets"][4:] = mark
    told = _measured(folder, "logits", arrays, "--ignore-index", str(mark), "--json", "-", home=tmp_path)
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)
    expected = hd.measure(
        hd.Objective(_net(folder, "logits")), (inputs[:4], torch.from_numpy(counted).long()), method="exact"
    )
    assert found["rms"] == pytest.approx(expected.rms, rel=1e-6)
    accuracy = found["cli"]["accuracy"]
    assert (accuracy["value"], accuracy["samples"]) == (1.0, 4)
    assert accuracy["classes"] == counted.max() + 1
    assert accuracy["chance"] == pytest.approx(max(np.bincount(counted) / 4))


@pytest.mark.parametrize(
    ("net", "shape", "targets", "options", "words"),
    [
        ("logit", (4,), (), "", "one logit say loss='bce' (--loss bce)"),
        ("logit", (4,), (), "--loss bce", "give targets[:, None]"),
        ("logits", (4,), (3,), "", "several labels a sample: loss='bce' (--loss bce)"),
    ],
)
def test_the_message_names_the_loss_that_was_meant(
    folder: Path,
    net: str,
    shape: tuple[int, ...],
    targets: tuple[int, ...],
    options: str,
    words: str,
    tmp_path: Path,
) -> None:
    told = _measured(folder, net, _arrays(shape, targets, 2, "int64"), *options.split(), home=tmp_path)
    assert told.exit_code == 3
    assert words in told.stderr


@pytest.mark.parametrize(("shape", "words"), [((5, 6, 1), "transpose(0, 3, 1, 2)"), ((5, 6), "store inputs[:, None]")])
def test_images_of_another_order_are_told(folder: Path, shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    told = _measured(folder, "pixels", _arrays(shape, (5, 6), 3, "int64"), home=tmp_path)
    assert told.exit_code == 3
    assert words in told.stderr


def test_numbers_below_zero_ask_for_the_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, inputs=np.ones((3, 2)), targets=[0, -1, 1])
    with pytest.raises(TargetError, match=r"span -1 to 1; .*--ignore-index -1"):
        load_named(f"npz:{path}")
    assert load_named(f"npz:{path}", ignore_index=-1).num_classes == 2
    np.savez(path, inputs=np.ones((3, 2)), targets=[-1, -1, -1])
    with pytest.raises(EmptyDataError, match="do not count"):
        load_named(f"npz:{path}", ignore_index=-1)
    values = load_named(f"npz:{path}", loss="mse")
    assert values.targets.tolist() == [-1.0, -1.0, -1.0]
    assert values.num_classes is None
