"""A result at a prompt and in a notebook: six lines, a fragment, rows for a table, pictures, files, progress."""

from __future__ import annotations

import math
import sys
import types
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hessdiag as hd
from hessdiag.data import load
from hessdiag.errors import ConfigurationError, DataError, UnknownNameError
from hessdiag.norm import ratio as norm_ratio
from hessdiag.show import read_document


def _measured(**options: Any) -> hd.Measurement:
    model = hd.networks.build("mlp", in_features=64, widths=(6, 5), activation="silu", seed=0).eval()
    return hd.measure(hd.Objective(model), load("digits", samples=24).batches(12), **options)


@pytest.fixture(scope="module")
def exact() -> hd.Measurement:
    return _measured()


@pytest.fixture(scope="module")
def noisy() -> hd.Measurement:
    return _measured(method="hutchinson", rtol=1e-6, max_replicates=12, keep_diagonal=True)


def test_repr_is_six_lines_with_the_numbers(exact: hd.Measurement, noisy: hd.Measurement) -> None:
    for m in (exact, noisy):
        text = repr(m)
        assert text.count("\n") == 5
        assert max(map(len, text.splitlines())) <= 120
        assert f"{m.rms:.4g}" in text
        assert f"{m.trace.value:.4g}" in text
    assert "exact for these 24 samples" in repr(exact)
    assert "12 replicates" in repr(noisy)
    assert "at 95%" in repr(noisy)


def test_a_notebook_shows_a_fragment_without_what_could_run(exact: hd.Measurement) -> None:
    html = exact._repr_html_()
    body = html[html.index("<div") :]
    ET.fromstring(body)  # well formed: every tag is closed
    assert f"{exact.rms:.4g}" in body
    assert all(name in body for name in exact.layers)
    assert "<script" not in html
    assert len(html) < 20_000


def test_rows_are_a_table(exact: hd.Measurement, noisy: hd.Measurement) -> None:
    rows = noisy.rows()
    assert [row["parameter"] for row in rows] == list(noisy.layers)
    assert all(row["low"] <= row["rms"] <= row["high"] for row in rows if row["status"] == "ok")
    assert sum(row["entries"] for row in rows) == noisy.parameters
    assert all(isinstance(x, (str, int, float)) for row in rows for x in row.values())
    assert len({tuple(row) for row in [*rows, *exact.rows()]}) == 1  # the same columns always
    assert sum(r["rms"] ** 2 * r["entries"] for r in exact.rows()) == pytest.approx(exact.norm.total.square)
    groups = exact.rows("groups")
    assert [row["group"] for row in groups] == list(exact.groups)
    assert groups[0]["invariant_rms"] == exact.invariant_groups[groups[0]["group"]].rms
    with pytest.raises(UnknownNameError, match="did you mean 'layers'"):
        exact.rows("layer")


def test_rows_make_a_frame(exact: hd.Measurement) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(exact.rows())
    assert frame["rms"].dtype == float
    assert len(frame) == len(exact.layers)


def test_pictures(exact: hd.Measurement, noisy: hd.Measurement) -> None:
    for what in ("norms", "groups", "convergence", "diagonal"):
        ET.fromstring(noisy.plot(what)._repr_svg_())
    dots = [line for line in exact.plot().axes[0].lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == [s.rms for s in exact.layers.values()]
    assert exact.plot("parts").axes
    with pytest.raises(ConfigurationError, match="keep_diagonal=True"):
        exact.plot("diagonal")
    with pytest.raises(ConfigurationError, match="exact"):
        exact.plot("convergence")
    assert [row[0] for row in noisy.history] == list(range(4, 13))  # the first look tells how it came to it
    assert noisy.history[-1][1:] == (noisy.rms, *noisy.interval)
    with pytest.raises(UnknownNameError, match="did you mean 'norms'"):
        exact.plot("norm")


def test_files(exact: hd.Measurement, noisy: hd.Measurement, tmp_path: Path) -> None:
    exact.save_json(tmp_path / "m.json")
    content = read_document(tmp_path / "m.json")
    assert content["rms"] == exact.rms
    noisy.save_html(str(tmp_path / "m.html"))
    page = (tmp_path / "m.html").read_text()
    assert f"{noisy.rms:.4g}" in page
    assert page.count("<img") >= 3  # the diagonal was kept: it has its picture


class _Handle:
    def __init__(self, shown: list[str]) -> None:
        self.shown = shown

    def update(self, item: str) -> None:
        self.shown.append(item)


def test_progress_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def display(item: str, *, display_id: bool) -> _Handle:
        assert display_id
        shown.append(item)
        return _Handle(shown)

    shell: Any = types.SimpleNamespace(kernel=object())
    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell
    screen: Any = types.ModuleType("IPython.display")
    screen.HTML, screen.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    monkeypatch.setattr("hessdiag.measuring.progress.PAUSE", 0.0)
    m = _measured(method="hutchinson", rtol=1e-6, max_replicates=12, progress=True)
    assert m.replicates == 12
    assert "reading" in shown[0]
    assert any("replicate 12, 2 of 2" in line for line in shown)
    assert any("rms 0." in line and "[" in line for line in shown)
    assert "rms" not in shown[-1]  # taken away at the end
    shown.clear()
    del shell.kernel  # IPython on a terminal
    _measured(progress=True)
    assert shown == []


def test_progress_of_ones_own_and_none_into_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    hd.measure(
        hd.Objective(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))),
        load("digits", samples=8).batches(4),
        progress=lambda event: seen.append(event.phase),
    )
    assert seen
    _measured(progress=True)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_repr_of_a_diagonal_tells_its_noise() -> None:
    model, data = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5))), [(torch.ones(4, 3), torch.arange(4) % 3)]
    known, drawn = (hd.diagonal(hd.Objective(model), data, method=method) for method in ("exact", "hutchinson"))
    rms = float(known.total["0.weight"].square().mean().sqrt())
    assert f"  0.weight [3, 3]: rms {rms:.4g}\n" in repr(known)
    assert "Diagonal of 60 entries: hutchinson, 4 samples, 16 replicates, estimate\n" in repr(drawn)
    assert repr(drawn).count("of which noise") == 8
    assert "  and 2 more\n" in repr(drawn)


def test_a_result_is_read_back(exact: hd.Measurement, noisy: hd.Measurement, tmp_path: Path) -> None:
    other = _measured(method="hutchinson", rtol=1e-6, max_replicates=12, seed=1)
    for name, m in (("exact", exact), ("noisy", noisy), ("other", other)):
        m.save_json(tmp_path / f"{name}.json")
    found = hd.read_result(tmp_path / "noisy.json")
    assert found.norm == noisy.norm.total
    assert found.invariant == noisy.invariant
    for held, summaries in ((found.layers, noisy.layers), (found.groups, noisy.groups)):
        assert repr(held) == repr({name: summary.total for name, summary in summaries.items()})  # NaN is NaN there
    assert (found.rms, found.interval, found.confidence, found.status) == (
        noisy.rms, noisy.interval, noisy.confidence, noisy.status,
    )  # fmt: skip
    assert found.content["provenance"]["seed"] == 0
    assert f"{noisy.rms:.4g}" in repr(found)
    assert "exact" in repr(hd.read_result(str(tmp_path / "exact.json")))
    same, apart = found.ratio(noisy), hd.read_result(tmp_path / "other.json").ratio(found)
    assert (same.value, same.low, same.high, same.paired) == (1.0, 1.0, 1.0, True)
    assert apart == norm_ratio(other.norm.total, noisy.norm.total)
    assert not apart.paired
    wide = found.ratio(hd.read_result(tmp_path / "other.json"), confidence=0.99)
    assert wide.high / wide.low > apart.high / apart.low
    with pytest.raises(ConfigurationError, match="a ratio to a float"):
        found.ratio(1.0)  # type: ignore[arg-type]
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(DataError, match=r"odd\.json: is no measurement"):
        hd.read_result(tmp_path / "odd.json")


def test_rows_of_a_diagonal(noisy: hd.Measurement) -> None:
    model = hd.networks.build("mlp", in_features=64, widths=(6, 5), activation="silu", seed=0).eval()
    batches = load("digits", samples=24).batches(12)
    rows = hd.diagonal(hd.Objective(model), batches).rows()
    assert all(type(x) in (str, int, float) for row in rows for x in row.values())
    exact = _measured()
    assert [row["parameter"] for row in rows] == list(exact.layers)
    assert [row["rms"] for row in rows] == pytest.approx([s.rms for s in exact.layers.values()], rel=1e-6)
    assert sum(row["trace"] for row in rows) == pytest.approx(exact.trace.value, rel=1e-6)
    for row, summary in zip(rows, exact.layers.values()):
        assert summary.gauss_newton is not None
        assert summary.functional is not None
        assert row["gauss_newton"] == pytest.approx(summary.gauss_newton.rms, rel=1e-6)
        assert row["functional"] == pytest.approx(summary.functional.rms, rel=1e-6, abs=1e-12)
        assert row["noise"] == 0.0
        assert row["smallest"] <= row["largest"]
    assert noisy.diagonal is not None
    noise = noisy.diagonal.rows()
    assert all(row["noise"] > 0.0 for row in noise)
    assert noise[0]["largest"] == float(next(iter(noisy.diagonal.total.values())).max())
    bare = replace(noisy.diagonal, gauss_newton={}, functional={})
    assert all(math.isnan(row["functional"]) for row in bare.rows())
