"""The one module that opens files: what it writes through, replaces, refuses, and how much it reads."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.store import files
from hessdiag.store.files import (
    MAX_VALUES,
    BadFileError,
    check_writable,
    clear_stale,
    parse_json,
    read_bytes,
    read_json,
    replace_file,
    write_bytes,
    write_json,
)
from hessdiag.store.states import read_state, write_state

QUICK = ("--samples", "8", "--batch-size", "8", "--method", "exact", "-q")


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("files") / "small.pt"
    hd.save_checkpoint(path, hd.networks.build("mlp", in_features=64, widths=(3,), seed=0), data="digits")
    return str(path)


@pytest.fixture(scope="module")
def measured(small: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("files") / "m.json"
    assert run("measure", small, *QUICK, "--json", str(path)).exit_code == 0
    return str(path)


def test_a_device_is_written_through_and_stays_one(tmp_path: Path, measured: str) -> None:
    node = tmp_path / "node"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # another /dev/null
        node.write_bytes(b"")
    except PermissionError:
        node = Path("/dev/null")
    check_writable(node)
    write_bytes(node, b"x")
    assert run("compare", measured, measured, "--json", str(node)).exit_code == 0
    assert stat.S_ISCHR(node.stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device_is_an_error() -> None:
    with pytest.raises(BadFileError, match="No space left"):
        write_bytes("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_pipe_is_written_through_or_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BadFileError, match="nobody reads"):
        write_bytes(pipe, b"x")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            write_bytes(pipe, b"y" * 200_000)
            break
        except BadFileError:  # the reader has not opened it yet
            time.sleep(0.01)
    reader.join()
    assert found == [b"y" * 200_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_links_are_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "far" / "real.json", tmp_path / "link.json"
    real.parent.mkdir()
    link.symlink_to(real)
    for content in (b"first", b"second"):  # the link dangles at first
        check_writable(link)
        replace_file(link, content)
        assert link.is_symlink()
        assert real.read_bytes() == content
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(BadFileError, match="cannot be written"):
        write_bytes(link, b"x")


def test_folders_and_sockets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="folder"):
        write_bytes(tmp_path, b"x")
    with pytest.raises(BadFileError, match="folder"):
        check_writable(tmp_path)
    with pytest.raises(BadFileError, match="no folder"):
        check_writable(tmp_path / "absent" / "a.json")


def test_the_folder_is_asked_not_the_file(tmp_path: Path) -> None:
    """A file without write permission is replaced where its folder allows it; not the other way round."""
    file = tmp_path / "a.json"
    file.write_bytes(b"old")
    file.chmod(0o444)
    check_writable(file)
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(BadFileError, match="no permission"):
            check_writable(file)
    finally:
        tmp_path.chmod(0o755)


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("é" * 120), b"x")  # 240 bytes of 255: no room for a longer temporary name
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
import os, sys
from pathlib import Path
from hessdiag.store import files
honest = os.fsync
def wait(handle):
    print("writing", flush=True)
    sys.stdin.readline()
    honest(handle)
files.os.fsync = wait
files.write_bytes(sys.argv[1], b"whole")
"""


@pytest.mark.skipif(files.fcntl is None, reason="no locks here: the age of a file decides")
def test_temporary_files_of_others_at_work_are_left_alone_whatever_the_clock_says(tmp_path: Path) -> None:
    """Of two writers one is killed at work: its file goes at once, the other's stays, though both look a day old."""
    kept = tmp_path / "c.tmp"  # no writer's
    kept.write_bytes(b"")
    target = tmp_path / "target"
    writers = []
    for _ in range(2):
        command = [sys.executable, "-c", WRITER, str(target)]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writers.append(writer)
    (first, second) = tmp_path.glob(".*.tmp")
    for file in (first, second):
        os.utime(file, (0, 0))
    clear_stale(tmp_path)
    assert first.exists()
    assert second.exists()
    writers[0].kill()
    writers[0].communicate()
    clear_stale(tmp_path)
    assert [first.exists(), second.exists()].count(True) == 1
    writers[1].communicate(b"\n")
    assert writers[1].returncode == 0
    assert target.read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == [kept, target]


@pytest.mark.skipif(files.fcntl is None, reason="no locks here: the age of a file decides")
def test_a_file_that_is_cleared_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[Path] = []
    honest = files.fcntl.flock

    def late(handle: int, how: int) -> None:
        if not cleared:
            (stale,) = tmp_path.glob(".*.tmp")
            cleared.append(stale)
            stale.unlink()
        honest(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert cleared
    assert len(list(tmp_path.iterdir())) == 1


def test_json_has_a_budget(tmp_path: Path) -> None:
    assert parse_json(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    cases = (
        (b"[" * 200_000, "nested"),
        (b"[" + b"[]," * (2 * MAX_VALUES) + b"0]", "values"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[NaN]", "no JSON"),
        (b"9" * 100_000, "no JSON"),
    )
    for data, reason in cases:
        with pytest.raises(BadFileError, match=reason):
            parse_json(data)
    write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json") == {"b": 1}
    with pytest.raises(BadFileError, match="limit"):
        read_json(tmp_path / "a.json", budget=4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_result_outlives_outputs_that_fail(small: str, tmp_path: Path) -> None:
    """The number is printed, the second file is there although the first was not, the exit code names the first."""
    page = tmp_path / "m.html"
    found = run("measure", small, *QUICK, "--json", "/dev/full", "--html", str(page))
    assert found.exit_code == 8 + 1
    assert float(found.stdout.split()[0]) > 0
    assert page.exists()
    assert "--json" in found.stderr
    assert "No space left" in found.stderr
    assert len([line for line in found.stderr.splitlines() if "warning" not in line]) == 1
    both = run("measure", small, *QUICK, "--html", "/dev/full", "--save-diagonal", "/dev/full")
    assert both.exit_code == 8 + 2 + 4
    assert both.stdout == found.stdout


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state"
    weights = torch.arange(6.0).reshape(2, 3)
    tree = {
        "numbers": {0: weights, 1: weights.t()},
        "row": (1, 0.1, None, float("nan"), True, "a"),
        "empty": {},
        "image": torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        "list": [torch.tensor(3), torch.zeros(0), {"b": torch.ones(2, dtype=torch.bfloat16)}],
    }
    write_state(path, "test/1", tree)
    back = read_state(path, "test/1")
    assert torch.equal(back["numbers"][0], weights)
    assert torch.equal(back["numbers"][1], weights.t())
    assert repr(back["row"]) == repr(tree["row"])
    assert back["empty"] == {}
    assert torch.equal(back["image"], tree["image"])
    assert back["image"].stride() == tree["image"].stride()
    assert int(back["list"][0]) == 3
    assert back["list"][2]["b"].dtype == torch.bfloat16
    with pytest.raises(BadFileError, match="reads test/2"):
        read_state(path, "test/2")
    with pytest.raises(BadFileError, match="plain values"):
        write_state(path, "test/1", {"x": object()})


def test_any_flipped_bit_of_a_state_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, "test/1", {"w": torch.arange(20.0), "done": 7, "norms": [0.25, 0.5]})
    data = read_bytes(path, budget=1 << 20)
    accepted = []
    for place in range(len(data)):
        for bit in (0, 6):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                read_state(path, "test/1")
                accepted.append(place)
            except BadFileError:
                pass
    # Nothing but the padding that safetensors puts behind its header is without meaning.
    assert all(data[place : place + 1] == b" " for place in accepted)
