"""The benchmarks' tools, that every script says what its rows must reach, and that results and their page are in step.

Nothing is timed here.
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import catalogue, learners, learning, report, topics
from benchmarks.block import Block, errors, exact, gradients
from benchmarks.harness import Figure, Row, Run, Timings, at_least, at_most
from benchmarks.memory import allocated_bytes, kept_for_backward
from benchmarks.table import bound, lines, number
from inlay.core.registry import method_types

SCRIPTS = catalogue.scripts()
MEASURED = [path for path in sorted(catalogue.RESULTS.glob("*.json")) if path.stem != learning.NAME]
UNITS = {"x", "s", "B", "rel", ""}


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """Let the collections before each measurement look only at what the test makes, not at what others left behind."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_its_rows_must_reach(script: str) -> None:
    rows = catalogue.rows(script)
    assert rows
    assert any(target.gate is not None or target.goal is not None for row in rows for target in row.targets)
    for row in rows:
        assert row.what
        assert set(row.quick) <= set(row.measure.__code__.co_varnames), row.name
        assert row.floor or not any("floor" in target.of for target in row.targets), row.name
        for target in row.targets:
            if target.gate is not None and target.goal is not None:
                assert target.met(target.gate, target.goal), f"{row.name}: the goal is weaker than the gate"


def test_every_script_with_rows_is_in_the_catalogue_and_no_name_is_taken_twice() -> None:
    with_rows = {p.stem for p in catalogue.FOLDER.glob("*.py") if "standalone(__spec__.name)\n" in p.read_text("utf-8")}
    assert with_rows - {"harness"} == set(SCRIPTS)
    names = [row.name for script in SCRIPTS for row in catalogue.rows(script)]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_results_belong_to_rows_and_name_no_host(path: Path) -> None:
    result = catalogue.read_result(path.stem)
    rows = {row.name: row for row in catalogue.rows(path.stem)}
    assert result["rows"].keys() <= rows.keys()
    assert {"processor", "torch", "inlay", "commit", "date"} <= result["environment"].keys()
    text = path.read_text(encoding="utf-8")
    assert platform.node() not in text
    assert str(Path.home()) not in text
    for name in result["rows"]:
        figures = catalogue.figures_of(result, rows[name])
        assert {figure.unit for figure in figures.values()} <= UNITS
        for target in rows[name].targets:
            if figures and (result["against_peft"] or "peft" not in target.of):
                assert target.of in figures, f"{name}: no figure {target.of!r}; there are: {', '.join(figures)}"


def test_the_page_is_what_the_results_say() -> None:
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.performance(), "run `python -m benchmarks report`"


def test_the_page_on_learning_is_what_the_result_says() -> None:
    result = catalogue.read_result(learning.NAME)
    text = report.LEARNING.read_text(encoding="utf-8")
    assert text == learning.document(result), "run `python -m benchmarks report`"
    assert set(result["methods"]) == set(learners.METHODS)
    assert {sentence.partition(":")[0] for sentence in learning.missed(result)} == set(learning.KNOWN)
    assert platform.node() not in text


def test_every_method_of_the_registry_learns() -> None:
    assert {name.partition(",")[0] for name in learners.METHODS} == set(method_types())


@pytest.mark.parametrize("name", ["LORA", "C3A", "TRAINABLE_TOKENS"])
def test_a_student_gets_near_its_teacher(name: str) -> None:
    found = learning.teach(learners.METHODS[name], quick=True)
    assert found["frozen"] > 0.01
    assert found["trained"] < learning.LIMIT * found["frozen"]


@pytest.mark.parametrize(("falls", "sentences"), [(0.4, 0), (0.39, 1), (-0.4, 1), (float("nan"), 1)])
def test_a_fall_within_four_errors_is_no_learning(falls: float, sentences: int) -> None:
    entry = {"teacher": {"frozen": 1.0, "trained": 0.1}, "text": {"falls": falls, "error": 0.1}}
    assert len(learning.missed({"methods": {"LORA": entry}})) == sentences


def test_the_head_of_names_is_calibrated_and_follows_the_names() -> None:
    names = torch.eye(3, 5)
    topics_of = torch.arange(60) % 3
    features = 0.2 * names[topics_of] + 0.1 * torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    head = topics.named_head(names, features, topics_of)
    centred = names - names.mean(0)
    assert torch.allclose(nn.functional.normalize(head.weight), nn.functional.normalize(centred), atol=1e-6)
    chances = head(features).softmax(1)
    assert torch.allclose(chances.mean(0), torch.full((3,), 1 / 3), atol=1e-3)  # where the offsets' gradient is zero
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_a_missed_goal_has_a_reason() -> None:
    for script in SCRIPTS:
        result = catalogue.read_result(script)
        for row in catalogue.rows(script):
            for text in report.missed(row, catalogue.figures_of(result, row)):
                assert "No reason is given" not in text, f"{script}: {row.name}: {text}"


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (at_most(1.2, 1.1), 1.05, "goal"),
        (at_most(1.2, 1.1), 1.15, "gate"),
        (at_most(1.2, 1.1), 1.25, "missed"),
        (at_least(15), 16, "gate"),
        (at_least(15), 14, "missed"),
        (at_most(None, 3), 2, "goal"),
        (at_most(None, 3), 4, "missed"),
        (at_most(None), 4, ""),
        (at_most(1.2), None, "-"),
    ],
)
def test_verdicts(target, value, verdict) -> None:
    assert target.verdict(value) == verdict


def test_ratios_are_taken_within_a_round() -> None:
    timings = Timings({"inlay": [1.0, 20.0, 3.0], "floor": [1.0, 10.0, 1.0]})
    assert timings.over("inlay", "floor") == Figure(2.0, 1.0, 3.0)
    assert timings.figures("inlay / floor", "peft / inlay").keys() == {"inlay / floor", "inlay", "floor"}
    with pytest.raises(KeyError, match="'inlay / flor' names an action that is not there"):
        timings.figures("inlay / flor")


@pytest.mark.usefixtures("little_garbage")
def test_what_prepares_an_action_runs_once_a_round_and_its_result_is_handed_over() -> None:
    seen: list[int] = []
    made = iter(range(10))
    timings = Run().alternate({"one": (lambda: next(made), seen.append), "two": lambda: None}, rounds=2)
    assert seen == [0, 1, 2]  # a round that warms up, then two
    assert {name: len(values) for name, values in timings.seconds.items()} == {"one": 2, "two": 2}


def test_each_target_is_a_line_with_peft_beside_it() -> None:
    row = Row("a row", "", (at_most(1.2, 1.1),), lambda run: {}, "a floor")
    figures = {"inlay / floor": Figure(1.15, 1.1, 1.2), "peft / floor": Figure(1.5), "peft / inlay": Figure(1.3)}
    assert list(lines(row, figures)) == [
        ("a row", "inlay / floor", "<= 1.2x", "<= 1.1x", "1.15x", "1.10x - 1.20x", "1.50x", "gate"),
        ("", "peft / inlay", "", "", "1.30x", "", "", ""),
    ]


def test_numbers_carry_their_units() -> None:
    values = [(1.234, "x"), (1.0234, "x"), (150.2, "x"), (0.00012, "s"), (1 << 20, "B"), (3, ""), (0.0012, "rel")]
    assert [number(*value) for value in values] == ["1.23x", "1.023x", "150x", "120 us", "1 MiB", "3", "1.2e-03"]
    assert bound(at_most(4 << 20), 4 << 20, "B") == "<= 4 MiB"


def test_bytes_kept_for_backward_are_counted_once_a_storage_and_without_parameters() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)
    assert kept_for_backward(lambda: (x @ weight) + (x @ weight), [weight]) == 4 * 8 * 4
    assert kept_for_backward(lambda: (x @ weight).exp(), [weight]) == 2 * 4 * 8 * 4


@pytest.mark.usefixtures("little_garbage")
def test_allocations_inside_an_operation_are_seen() -> None:
    peak, left = allocated_bytes(lambda: torch.ones(1000).add(1))
    assert left == 4000
    assert peak >= 8000
    assert allocated_bytes(lambda: None) == (0, 0)


@pytest.mark.parametrize("dora", [False, True])
def test_the_exact_step_agrees_with_peft(dora: bool) -> None:
    import peft

    block = Block.make(torch.float64, 64, 128, 128)
    model = block.adapted(peft, r=4, lora_alpha=8, use_dora=dora)
    right = exact(block, model, 2.0, dora)
    assert len(right) == 2 + (3 if dora else 2) * 7
    assert max(errors(gradients(block, model), right)) < (1e-6 if dora else 1e-12)
