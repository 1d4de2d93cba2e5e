"""Paths that the tests share."""

from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens"
"""Numbers computed by the original systems on small random weights."""
