"""What the tests measure with; it is the library's own, so that methods of others are tested alike."""

from inlay.testing.subject import (
    ULPS,
    Outcome,
    Subject,
    Trial,
    assert_bitwise,
    assert_close,
    assert_same_outcome,
    exact_input,
    loss,
    outcome,
    perturb,
    tensors_of,
    written,
)

__all__ = [
    "ULPS",
    "Outcome",
    "Subject",
    "Trial",
    "assert_bitwise",
    "assert_close",
    "assert_same_outcome",
    "exact_input",
    "loss",
    "outcome",
    "perturb",
    "tensors_of",
    "written",
]
