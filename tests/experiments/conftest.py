"""What tests of the experiments share lies beside them, in the test that it was written for."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
