"""Every method on a device that is not the CPU, pretended where there is none (`pretended`): to the CPU's entries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this version of torch lets no device be written in Python",
    ),
]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    script = Path(__file__).with_name("pretended.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_every_method_gives_there_what_it_gives_on_the_cpu(found: dict[str, Any]) -> None:
    assert len(found["apart"]) == 9
    assert max(found["apart"].values()) < 1e-12


def test_what_a_card_refuses_is_refused_there(found: dict[str, Any]) -> None:
    assert all(found["caught"])
    assert len(found["caught"]) == 8
