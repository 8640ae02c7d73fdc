"""A short run of the loader's fuzzer; fuzz/fuzz_checkpoint.py runs it at length."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    path = Path(__file__).parent / "fuzz" / "fuzz_checkpoint.py"
    spec = importlib.util.spec_from_file_location("fuzz_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_checkpoint"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutated_files_raise_only_our_errors(
    count: int, fuzzer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzer.pickled, "SECONDS", 2)
    report = fuzzer.run(count, 12345, tmp_path)
    assert report.offenders == []
    assert report.total == count
    assert report.grown < 200
    assert 2**20 < report.held < 2**29  # it is seen, however much this process held before
    assert sum(report.refused.values()) > count / 1.5


def test_a_mutation_that_hits_a_weight_only_is_accepted(fuzzer: ModuleType, tmp_path: Path) -> None:
    # How many of a few random mutations are harmless is a matter of luck (torch writes addresses of memory into its old
    # format), so that the fuzzer tells loads from refusals is shown on one that is.
    report = fuzzer.Report()
    (legacy,) = (seed for seed in fuzzer.seeds(tmp_path) if seed.name == "legacy")
    path = tmp_path / "mutated"
    data = bytearray(legacy.data)
    data[-4] ^= 1  # the last bit of the last weight
    path.write_bytes(data)
    fuzzer.attempt(path, legacy.options, False, report, "a")
    assert (report.accepted, report.total) == (1, 1), report


def test_the_fuzzer_notices_a_foreign_exception(
    fuzzer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(path: Path) -> None:
        raise KeyError("state_dict")

    monkeypatch.setattr(fuzzer, "inspect_checkpoint", careless)
    report = fuzzer.Report()
    fuzzer.attempt(tmp_path / "a", {}, True, report, "a")
    assert report.offenders == ["a: KeyError: 'state_dict'"]


def test_the_fuzzer_notices_a_load_that_takes_the_processor_too_long_and_no_other(
    fuzzer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzer, "inspect_checkpoint", lambda path: sum(range(200_000)))
    report = fuzzer.Report(limit=1e-4)
    fuzzer.attempt(tmp_path / "a", {}, True, report, "a")
    assert len(report.offenders) == 1
    assert "took" in report.offenders[0]
    monkeypatch.setattr(fuzzer, "inspect_checkpoint", lambda path: time.sleep(0.2))  # the machine is busy elsewhere
    report = fuzzer.Report(limit=0.1)
    fuzzer.attempt(tmp_path / "a", {}, True, report, "a")
    assert report.offenders == []


def test_the_fuzzer_notices_a_written_file(fuzzer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.addaudithook(fuzzer._watch)
    monkeypatch.setattr(fuzzer, "inspect_checkpoint", lambda path: path.write_text("x"))
    report = fuzzer.Report()
    fuzzer.attempt(tmp_path / "a", {}, True, report, "a")
    assert report.offenders == ["a: did ['open']"]


def test_what_a_reader_holds_is_seen_below_this_process_s_own_peak(fuzzer: ModuleType, tmp_path: Path) -> None:
    """100 MB of a child after 500 MB here: neither hidden by those nor taken for them; a signal and a code come through."""
    bytes(500 << 20)
    note = str(tmp_path / "note")
    for code, wanted, least in (
        ("x = b'x' * (100 << 20)", 0, 100 << 20),
        ("import os; os._exit(7)", 7, 1 << 20),
        ("import os; os.kill(os.getpid(), 24)", -24, 1 << 20),
    ):
        command = fuzzer.noting(lambda mode, size, code=code: [sys.executable, "-I", "-S", "-c", code], note)("", 0)
        assert subprocess.run(command, check=False).returncode == wanted
        assert least <= fuzzer.most_held(note) < least + (60 << 20)
    assert fuzzer.most_held(note) == 0
