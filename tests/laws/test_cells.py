"""The tables of ``cells.py`` say exactly what is refused, and the cover really covers."""

from __future__ import annotations

import cells
import pytest
from cell_cover import family_cover, pair_cover
from cells import KINDS, METHODS, STORAGES, UNMERGEABLE, Cell
from subject import Subject, assert_bitwise, tensors_of

from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.state import find_state
from inlay.errors import InlayError, MergeError, UnsupportedError


@pytest.mark.parametrize("method", METHODS)
def test_refusals_are_the_listed_ones(method: str) -> None:
    wrong = []
    for kind in KINDS:
        found, expected = cells.refusal(method, kind), cells.listed(cells.REFUSED, method, kind)
        if (found is None) != (expected is None) or (found is not None and str(expected) not in found):
            wrong.append(f"{kind}: refused with {found!r}, listed as {expected!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("method", METHODS)
def test_a_refusal_is_one_sentence_of_our_own_and_leaves_the_model_alone(method: str) -> None:
    for kind in KINDS:
        if cells.refusal(method, kind) is None:
            continue
        cell = Cell(method, kind, "plain_fp32")
        model = cell.model()
        before, modules = tensors_of(model), list(model.modules())
        with pytest.raises(InlayError) as caught:
            plan(model, cell.config())
        assert "\n" not in str(caught.value)
        assert find_state(model) is None
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        assert_bitwise(tensors_of(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_merged_is_listed(method: str) -> None:
    for kind in KINDS:
        if not cells.works(method, kind):
            continue
        cell = Cell(method, kind, "plain_fp32")
        subject = Subject(cell)
        before = tensors_of(subject.model)
        if cell.unmergeable is None:
            merge(subject.state)
        else:
            with pytest.raises((MergeError, UnsupportedError), match=cell.unmergeable):
                merge(subject.state)
            assert_bitwise(tensors_of(subject.model), before)


@pytest.mark.parametrize("table", [cells.REFUSED, UNMERGEABLE], ids=["refused", "unmergeable"])
def test_every_line_of_a_table_is_needed(table: list[tuple[str, str, str]]) -> None:
    for line in table:
        rest = [other for other in table if other is not line]
        assert any(cells.listed(table, m, k) != cells.listed(rest, m, k) for m in METHODS for k in KINDS), (
            f"{line} says nothing that other lines do not"
        )


def test_cover_has_every_pair() -> None:
    working = {(m, k) for m in METHODS for k in KINDS if cells.works(m, k)}
    stored = {(m, s) for m, _ in working for s in STORAGES}
    for start in range(len(STORAGES)):
        cover = pair_cover(start=start)
        assert len(set(cover)) == len(cover)
        assert {(c.method, c.kind) for c in cover} == working
        assert {(c.method, c.storage) for c in cover} == stored
        assert {(c.kind, c.storage) for c in cover} == {(k, s) for _, k in working for s in STORAGES}
    shares = [pair_cover(start=start, share=3) for start in range(12)]
    assert all({c.method for c in cover} == {m for m, _ in working} for cover in shares)
    met = [cell for cover in shares for cell in cover]
    assert {(c.method, c.kind) for c in met} == working
    assert {(c.method, c.storage) for c in met} == stored
    small = family_cover(start=6)
    assert {cells.family(c.method) for c in small} == {cells.family(m) for m, _ in working}
    assert {c.kind for c in small} == {k for _, k in working}
    assert len(small) <= len({cells.family(m) for m in METHODS}) + len(KINDS)
