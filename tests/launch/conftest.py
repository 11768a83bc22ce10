"""Makes `tiny_pipelines` importable, here and in the workers (which get the driver's import path)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
