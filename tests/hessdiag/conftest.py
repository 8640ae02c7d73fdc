"""What tests of the engine share lies beside them: `models`, `children`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "fuzz")]
