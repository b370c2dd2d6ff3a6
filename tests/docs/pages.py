"""Code blocks of the documentation, as a reader finds them."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<before>[^\n]*(?:\n[^\n]+)*)\n+```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL)
SAVE = re.compile(r"\b[Ss]ave\b[^`]*?\bas\s+`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """Fenced block of a page, and the file as which the paragraph before it tells readers to save it."""

    language: str
    code: str
    file: str | None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        saved = SAVE.findall(match["before"])
        found.append(Block(match["language"], match["code"], saved[-1] if saved else None))
    return found


def commands(page: Path) -> list[str]:
    """Return the lines of all bash blocks of a page."""
    return [line for b in blocks(page) if b.language == "bash" for line in b.code.splitlines() if line.strip()]
