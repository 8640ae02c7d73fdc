"""Memory that runs out is told as such, with advice that fits the place, and ends in exit code 5."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from hessdiag import Objective, data, measure
from hessdiag.cli.program import app
from hessdiag.errors import OutOfMemoryError

TORCH = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"


def full(*_: Any, **__: Any) -> Any:
    raise MemoryError


def full_of_tensors(*_: Any, **__: Any) -> Any:
    raise RuntimeError(TORCH)


def test_of_images_it_is_not_the_batch_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a" / "0.png")
    monkeypatch.setattr(Image.Image, "convert", full)
    found = CliRunner().invoke(app, ["measure", "digits-example", "--data", f"folder:{tmp_path}"])
    assert found.exit_code == 5
    assert found.stderr.count("\n") == 1
    assert "out of memory" in found.stderr
    assert "held in memory whole" in found.stderr
    assert "batch" not in found.stderr
    with pytest.raises(OutOfMemoryError, match="held in memory whole"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("fails", [full, full_of_tensors])
def test_of_json_too(fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(sys.modules["hessdiag.show.result_file"], "read_json", fails)
    found = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert found.exit_code == 5
    assert found.stderr.count("\n") == 1
    assert "out of memory" in found.stderr
    assert "batch" not in found.stderr


def test_of_a_pass_it_is_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.cli.setup.forward", full_of_tensors)
    found = CliRunner().invoke(app, ["measure", "digits-example"])
    assert found.exit_code == 5
    assert "out of memory; lower --batch-size" in found.stderr


class Loader:
    """Gives one batch, and has no memory for the next."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
        full()


def test_of_a_loader_it_is_the_data() -> None:
    with pytest.raises(OutOfMemoryError, match="it was the data") as caught:
        measure(Objective(nn.Linear(3, 2)), Loader(), method="exact")
    assert "batch" not in str(caught.value)


def test_of_a_loss_in_python_it_is_no_fault_of_the_loss() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return full_of_tensors()

    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(OutOfMemoryError, match="lower the batch size"):
        measure(Objective(nn.Linear(3, 2), loss), batches, method="exact")
