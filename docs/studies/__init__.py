"""Studies of the method, to be run from the repository's root; they use preprocess/'s modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "preprocess"))
