"""Real text for the demo model: openings to go on from, and pages to be surprised by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

OPENINGS = (
    "The capital of France is",
    "In the beginning of the nineteenth century, most people in Europe lived",
    "To bake a simple loaf of bread, you need flour, water, salt and",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n",
    "The three longest rivers of Europe are",
    "She opened the door, looked out into the rain, and",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam,\n\nI am writing to complain about the train that I took from London to",
)

PAGE_TOKENS = 512
PAGES = 4


def pages(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The first pages of the protocol's description, as token ids. `encode`: text to ids."""
    text = (ROOT / "protos" / "PROTOCOL.md").read_text()
    ids = encode(text)
    return [ids[start : start + PAGE_TOKENS] for start in range(0, PAGES * PAGE_TOKENS, PAGE_TOKENS)]
