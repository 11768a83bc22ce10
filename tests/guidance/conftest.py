"""Makes the tiny pipelines without text encoders (shared with the tests of pipelines) importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "pipeline"))
