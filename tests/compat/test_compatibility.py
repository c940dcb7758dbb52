"""``docs/compatibility.md`` is what the installed PEFT and Inlay are; every gap has a reason."""

from __future__ import annotations

import pytest

from tests.compat.compatibility import DOCUMENT, NOT_OFFERED, Row, counted, document, public_names, rows


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows()


def test_the_page_is_up_to_date(found):
    assert DOCUMENT.read_text(encoding="utf-8") == document(found), "run python -m tests.compat.compatibility"


def test_every_public_name_is_listed(found):
    assert {(row.home, row.name) for row in found} == set(public_names())
    assert len(found) > 600


def test_every_gap_has_a_reason(found):
    unsaid = [f"{row.home}.{row.name}" for row in found if row.status != "yes" and not row.why]
    assert not unsaid


def test_no_reason_is_given_for_what_is_there(found):
    there = {f"{row.home}.{row.name}" for row in found if row.status == "yes"}
    assert sorted(there & NOT_OFFERED.keys()) == []


def test_more_than_95_percent_of_what_is_built_is_there(found):
    have, total = counted(found)
    assert total > 2000
    assert have / total > 0.95
