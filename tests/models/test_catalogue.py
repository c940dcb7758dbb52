"""The table of methods says of each what planning says, and the page of the documentation is that table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cells import METHODS, family

from inlay.cli import main
from inlay.core.registry import method_types
from inlay.models.catalogue import FORMS, LAYERS, MethodFacts, catalogue, markdown

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture(scope="module")
def rows() -> list[MethodFacts]:
    return catalogue()


def test_the_page_is_the_table(rows: list[MethodFacts]) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(rows), "run: inlay methods --markdown > docs/methods.md"


def test_every_method_is_there_and_has_what_a_reader_asks_for(rows: list[MethodFacts]) -> None:
    assert {row.peft_type.partition(",")[0] for row in rows} >= set(method_types())
    for row in rows:
        assert row.title, row.peft_type
        assert row.formula.startswith("``") or "``" in row.formula or row.peft_type == "TRAINABLE_TOKENS", row.peft_type
        assert row.paper or row.peft_type == "TRAINABLE_TOKENS", row.peft_type
        assert row.kinds, row.peft_type
        assert set(row.kinds) | set(row.refused) == set(LAYERS)
        for why in row.refused.values():
            assert re.fullmatch(r"[^\n]{20,}", why), (row.peft_type, why)


def test_every_method_has_a_cell() -> None:
    forms = {form.upper() for forms in FORMS.values() for form in forms}
    assert {family(method) for method in METHODS} - forms == set(method_types())


def test_known_counts(rows: list[MethodFacts]) -> None:
    found = {row.peft_type: row.parameters for row in rows}
    assert found["LORA"] == 8 * (4096 + 4096)
    assert found["LORA, DoRA"] == 8 * (4096 + 4096) + 4096
    assert found["LORA, QA-LoRA"] == 8 * (4096 // 16 + 4096)
    assert found["LORA, BD-LoRA"] == 8 * (4096 + 4096 // 4)
    assert found["LORA, KaSA"] == 8 * (4096 + 4096) + 8
    assert found["LORA, VeLoRA"] == 8 * (4096 + 4096)
    assert found["LORA, MonteCLoRA"] == 8 * (4096 + 4096) + 8 + 8
    assert found["VERA"] == 4096 + 256
    assert found["FOURIERFT"] == 1000


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "vera"]) == 0
    said = capsys.readouterr().out
    assert "2310.11454" in said
    assert "diag(b) B diag(d) A" in said
    assert "projection_prng_key" in said
    assert main(["methods", "verra"]) == 2
    assert "'VERA'" in capsys.readouterr().err
