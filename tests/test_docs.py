"""What the documentation claims about this repository."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_fault_is_shown_by_a_test_that_exists():
    text = (ROOT / "docs" / "guide" / "faults.md").read_text()
    rows = [line.split("|")[-2] for line in text.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    assert len(rows) > 10 and all(named)
    assert {name for names in named for name in names} <= existing
