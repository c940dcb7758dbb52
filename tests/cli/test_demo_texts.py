"""The demo's held-out texts are held out: by module, and without near-copies in training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "docstrings.py"


@pytest.fixture(scope="module")
def docstrings():
    spec = importlib.util.spec_from_file_location("demo_docstrings", DEMO)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_docstrings"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_docstrings"]


def test_no_module_and_no_text_is_on_both_sides(docstrings):
    learn, held = docstrings.collect()
    assert not {entry.module for entry in learn} & {entry.module for entry in held}
    assert not {entry.text for entry in learn} & {entry.text for entry in held}
    for topic in docstrings.TOPICS:
        for side, least in ((learn, 100), (held, 40)):
            assert sum(entry.label == topic for entry in side) >= least, topic
            assert len({entry.module for entry in side if entry.label == topic}) >= 2, topic
    counts = [sum(entry.label == topic for entry in held) for topic in docstrings.TOPICS]
    assert max(counts) < 0.4 * len(held)  # so that the most frequent topic is a poor answer


def test_near_copies_are_recognised(docstrings):
    words = docstrings._words
    assert docstrings._alike(words("Return the arc sine of x."), words("Return the arc sine of x"))
    assert not docstrings._alike(words("Return the arc sine of x."), words("Open a socket and listen on a port."))
