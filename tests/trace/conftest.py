"""Makes `denoisers` and `splitting` (shared by the tests of trace and stage) importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "stage"))
