"""docs/decisions.md: each decision has an id of its own, and an id that the code names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
IDS = re.findall(r"^\* \*\*([A-Z]\d+)\. ", TEXT, re.MULTILINE)
NAMED = re.compile(r"\(decision ([A-Z]\d+)\)")


def test_every_decision_has_an_id_of_its_own() -> None:
    assert len(re.findall(r"^\* ", TEXT, re.MULTILINE)) == len(IDS)
    assert [one for one in IDS if IDS.count(one) > 1] == []


def test_a_section_has_one_letter_and_counts_upwards() -> None:
    for section in TEXT.split("\n## ")[1:]:
        found = re.findall(r"^\* \*\*([A-Z])(\d+)\. ", section, re.MULTILINE)
        numbers = [int(number) for _, number in found]
        assert len({letter for letter, _ in found}) == 1, section.splitlines()[0]
        assert numbers == sorted(numbers), section.splitlines()[0]


def test_what_the_code_names_exists() -> None:
    named = {one for path in (ROOT / "matmorph").rglob("*.py") for one in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert len(named) >= 10
    assert named - set(IDS) == set()
