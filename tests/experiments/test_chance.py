"""Whether a network learned anything is decided by tests at their level, and a run that did not says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.__main__ import main
from experiments.chance import LEVEL, UNLEARNED, Answers, answers, better_than_guessing
from experiments.config import TrainConfig
from experiments.sweep import records
from experiments.train import train
from hessdiag.data.dataset import DataSet, make


class Lookup(nn.Module):
    """Gives image n, whose one pixel is n/255, the n-th row of a table of logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[(x.flatten() * 255).round().long()]


def numbered(labels: Tensor) -> DataSet:
    inputs = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return make(inputs, labels, name="numbered", split="test", num_classes=int(labels.max()) + 1)


def seen(logits: Tensor, labels: Tensor) -> Answers:
    return answers(Lookup(logits), numbered(labels), batch_size=64, dtype=torch.float32)


def test_the_numbers_against_their_definitions() -> None:
    chance = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((90,), 0), torch.full((60,), 1), torch.full((50,), 2)])
    logits = torch.randn(200, 3, generator=chance)
    found = seen(logits, labels)
    losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    shares = torch.tensor([0.45, 0.3, 0.25], dtype=torch.float64)
    gains = -(losses + shares[labels].log())
    assert found.correct == int(logits.argmax(1).eq(labels).sum())
    assert found.commonest == pytest.approx(0.45)
    assert found.entropy == pytest.approx(float(-(shares * shares.log()).sum()))
    assert found.loss == pytest.approx(float(losses.mean()))
    assert found.gain == pytest.approx(float(gains.mean() / gains.std() * math.sqrt(200)))


def test_better_than_guessing_is_the_exact_binomial_test() -> None:
    n, p = 40, 0.3
    for k in range(n + 1):
        tail = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
        assert better_than_guessing(k, n, p) == (tail < LEVEL)


def test_who_ignores_the_images_has_learned_nothing() -> None:
    labels = torch.arange(200) % 10
    for logits in (torch.zeros(200, 10), torch.full((200, 10), -3.0).index_fill_(1, torch.tensor([4]), 3.0)):
        found = seen(logits, labels)
        assert not found.learned
        assert found.reason is not None
        assert "10.0% of 200 test images" in found.reason
    assert seen(torch.full((200, 10), math.nan), labels).reason is not None


def test_networks_that_do_not_look_are_called_learners_no_more_often_than_the_level_says() -> None:
    chance = torch.Generator().manual_seed(1)
    labels = torch.arange(200) % 10
    count = sum(seen(torch.randn(200, 10, generator=chance) * scale, labels).learned for scale in (0.01, 1) * 1000)
    assert count <= 10  # two tests of level 0.001, 2,000 networks: 4 expected at most, more than 10 once in 300


def test_either_accuracy_or_loss_shows_what_was_learned() -> None:
    chance = torch.Generator().manual_seed(2)
    labels = torch.arange(200) % 10
    right = nn.functional.one_hot(labels, 10).float()
    overconfident = 60 * torch.where(torch.rand(200, 1, generator=chance) < 0.4, right, right.roll(1, 1))
    found = seen(overconfident, labels)
    assert found.loss > found.entropy  # by itself it would say chance
    assert found.learned
    timid = 0.3 * right + torch.nn.functional.one_hot(torch.full((200,), 3), 10)  # answers 3, but leans the right way
    found = seen(timid, labels)
    assert found.accuracy == pytest.approx(0.1)
    assert found.learned
    assert found.reason is None


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_that_did_not_learn_says_so_in_its_status_and_its_exit_code(
    epochs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "train --method standard --network small_resnet --data digits --quiet --device cpu --set lr=0"
    code = main([*words.split(), "--epochs", str(epochs), "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert code == 1
    assert summary["status"] == UNLEARNED
    assert summary["clean_loss"] == pytest.approx(math.log(10), abs=0.5)
    assert "did not learn" in err
    assert json.loads((tmp_path / "result.json").read_text())["status"] == UNLEARNED
    code = main([*words.split(), "--epochs", str(epochs), "--out", str(tmp_path)])  # found finished, told again
    assert code == 1


def test_a_run_that_learned_is_finished() -> None:
    base = {"method": "standard", "network": "small_resnet", "data": "digits", "epochs": 3}
    result = train(TrainConfig.from_dict(base), device="cpu")
    assert result.status == "finished"
    assert result.reason is None
    assert result.clean_loss < math.log(10)


def test_records_from_before_runs_said_so_are_judged_by_their_accuracy() -> None:
    def record(share: float, **more: Any) -> dict[str, Any]:
        return {"clean_accuracy": {"value": share, "samples": 500}, "train": {"status": "finished", **more}}

    assert records.unlearned(record(0.102), "digits")
    assert not records.unlearned(record(0.2), "digits")
    assert not records.unlearned(record(0.102, clean_loss=2.2), "digits")  # the run judged itself
    assert records.unlearned(record(0.2, status=UNLEARNED), "digits")
    assert not records.unlearned(record(0.01), "folder:somewhere")
    assert not records.unlearned({}, "digits")
