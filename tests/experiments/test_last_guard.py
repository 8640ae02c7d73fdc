"""`python -m experiments` ends as `hessdiag` does: one line, no traceback, a documented exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import main
from experiments.commands import train as command
from experiments.config import MAX_TOML
from experiments.sweep.export import FORMAT
from hessdiag.cli.exits import CODES

TRAIN = "train --method standard --network mlp --data digits --quiet --device cpu --epochs 1 --set train_samples=64"


def refused(code: int, err: str) -> None:
    assert code in CODES
    assert err.count("\n") == 1
    assert err.startswith("experiments: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("raised", "wanted", "says"),
    [
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
        (RecursionError("deep\nin it"), 70, "internal error, RecursionError: deep in it; run with --debug"),
        (OSError(5, "Input/output error"), 70, "internal error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_is_raised(
    raised: BaseException,
    wanted: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(command, "train", fails)
    code = main([*TRAIN.split(), "--out", str(tmp_path)])
    err = capsys.readouterr().err
    refused(code, err)
    assert code == wanted
    assert says in err
    assert "batch" not in err
    assert main([*TRAIN.split(), "--out", str(tmp_path), "--debug"]) == wanted
    assert ("Traceback" in capsys.readouterr().err) == (wanted != 130)


def test_wrong_usage_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epocs", "3"]) == 2
    assert "No such option" in capsys.readouterr().err
    assert main(["recipes", "--help"]) == 0
    assert "--debug" in capsys.readouterr().out
    assert main(["recipes"]) == 0


@pytest.mark.parametrize(
    "opened", ["a = " + "[" * 50_000, "a = " + "{b=" * 50_000, "[" + "a." * 50_000 + "a]", "[" + "a." * 50 + "a]"]
)
@pytest.mark.parametrize("words", [["train", "--recipe"], ["sweep"]])
def test_toml_nested_deeply(
    words: list[str], opened: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(opened) < MAX_TOML
    (tmp_path / "deep.toml").write_text(opened)
    code = main([*words, "deep.toml"])
    err = capsys.readouterr().err
    refused(code, err)
    assert code == 2
    assert "deep.toml" in err


DAMAGED = {
    "empty": b"",
    "noise": bytes(range(256)) * 40,
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "header": (10**15).to_bytes(8, "little") + b"{}",
    "cut": None,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_state_is_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TRAIN.split(), "--out", str(tmp_path), "--save-seconds", "0"]
    assert main(words) in (0, 1)
    (tmp_path / "result.json").unlink()
    state, content = tmp_path / "state.pt", DAMAGED[kind]
    state.write_bytes(state.read_bytes()[:-9] if content is None else content)
    capsys.readouterr()
    code = main(words)
    err = capsys.readouterr().err
    refused(code, err)
    assert code == 3
    assert str(state) in err


@pytest.mark.parametrize("row", [3, "x", None, [1], {"key": 3}])
def test_a_row_that_is_no_object(row: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "smoke").mkdir()
    told = {"name": "smoke/figure3", "tier": "smoke", "figure": "f", "title": "t", "missing": 0}
    (tmp_path / "smoke" / "figure3.json").write_text(json.dumps({"format": FORMAT, **told, "runs": [row]}))
    code = main(["verdicts", "--results", str(tmp_path)])
    err = capsys.readouterr().err
    refused(code, err)
    assert code == 3
    assert "figure3.json: cannot be read" in err
