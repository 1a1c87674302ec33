"""Where the tests find what they read."""

from pathlib import Path

REPO = Path(__file__).parents[1]
DATA = REPO / "tests" / "data"
GOLDEN = DATA / "golden"
PRELOAD = REPO / "tests" / "preload"  # of Spark's Python daemon
