"""Ten seeds of APGD beside pyautoattack's: the table of `python -m benchmarks.attacks`, with its figure asserted."""

from __future__ import annotations

import pytest

pytest.importorskip("pyautoattack", reason="AutoAttack needs pip install 'hessdiag[robust]'")

from benchmarks.attacks import compare, trained


@pytest.mark.slow
@pytest.mark.timeout(3600)  # ten seeds of two implementations: five minutes on a quiet core, far more on a busy one
@pytest.mark.statistical
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t"])
def test_mean_robust_accuracy_is_within_half_a_point(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The seeds are fixed: no false alarms; the interval printed beside tells how much of the gap is chance."""
    row = compare(*trained(), attack)
    low, high = row.interval
    with capsys.disabled():
        print(f"\n{attack}: ours - theirs {row.difference:+.3f} points, 95% interval [{low:+.3f}, {high:+.3f}]")
    assert abs(row.difference) <= 0.5
