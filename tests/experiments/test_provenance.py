"""A result names the commit of the code that made it, where that code lies in a checkout of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from experiments import provenance

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def named() -> str | None:
    provenance.commit.cache_clear()
    try:
        return provenance.provenance(torch.device("cpu"))["commit"]
    finally:
        provenance.commit.cache_clear()


def test_the_commit_is_named_and_that_code_was_changed_since(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert named() == head
    (checkout / "results.json").write_text("{}")  # what is not of the code changes nothing
    assert named() == head
    (checkout / "code.py").write_text("2\n")
    assert named() == head + "+"


def test_code_without_a_checkout_of_its_own_names_none(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = checkout / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(provenance, "ROOT", inside)
    assert named() is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(provenance, "ROOT", checkout)
    assert named() is None
