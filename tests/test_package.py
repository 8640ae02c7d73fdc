"""What is published: the wheel holds the engine alone and works without the repository, the sdist holds the tests' needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="pip install hatchling")

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("theory", "validation", "experiments", "benchmarks", "tests")


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """By the hook that pip calls; nothing is fetched."""
    call = f"import hatchling.build as b; print(b.build_{kind}({str(out)!r}))"
    return out / run(sys.executable, "-c", call, cwd=source).split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(where, filter="data")
    (folder,) = where.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_engine_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hessdiag"}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hessdiag").rglob("*") if p.is_file()}
    here = {name for name in here if "__pycache__" not in name}
    assert {name for name in names if name.startswith("hessdiag/")} == here
    assert {"hessdiag/py.typed", "hessdiag/examples/digits-example.safetensors"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_say_what_it_is_and_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (place,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        told = Parser().parsestr(archive.read(place).decode())
    import hessdiag

    assert told["Name"] == "hessdiag"
    assert told["Version"] == hessdiag.__version__
    assert told["License-Expression"] == "MIT"
    assert told["Requires-Python"] == ">=3.10"
    assert told["Description-Content-Type"] == "text/markdown"
    assert "How sharply" in told.get_payload()
    assert {"robust", "ray", "docs", "dev"} <= set(told.get_all("Provides-Extra", []))
    classifiers = told.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers


@pytest.mark.slow
def test_the_wheel_works_in_a_bare_environment(wheel: Path, tmp_path: Path) -> None:
    """Installed alone, its dependencies lent; started from an empty folder, where the repository is not to be seen."""
    bare = tmp_path / "bare"
    run(sys.executable, "-m", "venv", "--without-pip", str(bare), cwd=tmp_path)
    python = bare / "bin" / "python"
    pip = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    run(sys.executable, *pip, cwd=tmp_path)
    (packages,) = bare.glob("lib/python*/site-packages")
    lent = [folder for folder in sys.path if folder.endswith("site-packages")]  # whose own .pth files are not read
    (packages / "lent.pth").write_text("\n".join(lent) + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    version = run(str(bare / "bin" / "hessdiag"), "--version", cwd=empty, PYTHONPATH="")
    assert version.split()[-1] == wheel.name.split("-")[1]
    rooms = sorted(path.parent.name for path in (ROOT / "hessdiag").glob("*/__init__.py"))
    assert len(rooms) > 10
    look = "import importlib, sys\nimport hessdiag as hd\nassert 'bare' in hd.__file__, hd.__file__\n"
    look += f"for room in {rooms!r}: importlib.import_module('hessdiag.' + room)\n"
    look += f"assert not set({OTHERS!r}) & set(sys.modules)\n"
    run(str(python), "-c", look, cwd=empty, PYTHONPATH="")
    measure = ("measure", "digits-example", "--samples", "32", "--quiet", "--no-spread")
    told = run(str(bare / "bin" / "hessdiag"), *measure, cwd=empty, PYTHONPATH="")
    rms, low, high = map(float, told.split())
    assert 0 < low <= rms <= high


def test_the_sdist_holds_what_its_tests_need(unpacked: Path) -> None:
    """Every tracked file but those of the hosting; and nothing that is not."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not in a git work tree")
    hosting = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
    wanted = {name for name in listed.stdout.splitlines() if not name.startswith(hosting)}
    there = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    untracked = there - wanted - {"PKG-INFO", ".gitignore"}
    assert not wanted - there
    assert not [name for name in untracked if name.startswith((".venv", "runs/", "build/"))]


@pytest.mark.slow
def test_a_wheel_from_the_sdist_is_the_wheel_and_the_sdists_tests_can_run(
    unpacked: Path, wheel: Path, tmp_path: Path
) -> None:
    again = build("wheel", unpacked, tmp_path)

    def record(path: Path) -> list[str]:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("RECORD")]
            return sorted(archive.read(name).decode().splitlines())

    assert record(again) == record(wheel)
    told = run(sys.executable, "-m", "pytest", "--collect-only", "-q", cwd=unpacked, PYTHONPATH=str(unpacked))
    assert "error" not in told.splitlines()[-1]
    few = ("tests/test_house.py", "tests/hessdiag/test_networks.py")
    run(sys.executable, "-m", "pytest", "-q", *few, cwd=unpacked, PYTHONPATH=str(unpacked))
