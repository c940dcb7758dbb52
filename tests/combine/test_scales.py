"""Scaling at run time, for every method whose update has a scale."""

from __future__ import annotations

import pytest
import torch
from cells import METHODS, Cell, additive, method_of, works
from subject import Subject
from torch import Tensor

from inlay.core.layer import AdaptedLayer
from inlay.errors import UnsupportedError
from inlay.models.temporary import rescale_adapter_scale

LINEAR = [name for name in METHODS if works(name, "linear") and not method_of(name).couples]
# those without a scale, so that none loses its scale in silence
BARE = {
    "ia3",
    "ia3_input",
    "oft",
    "oft_cayley",
    "oft_shared",
    "pvera",
    "boft",
    "boft_butterfly",
    "hra",
    "hra_joint",
    "road",
    "road_2",
    "road_4",
    "hira",
    "deft",
    "deft_qr",
    "deft_para",
    "glora",
    "glora_vector",
    "glora_constant",
    "beft",
    "c3a",
    "c3a_zero",
    "miss",
    "miss_mini",
    "miss_bat",
    "delora",
    "vblora",
    "unilora",
    "tinylora",
    "tinylora_apart",
    "vera",
    "ln_tuning",
    "supertuning",
    "osf",
    "poly",
    "frod",
    "adamss",
    "trainable_tokens",
}


def added(subject: Subject) -> Tensor:
    """Return what the adapter adds to the first layer's output, which is linear in its scale."""
    with torch.no_grad():
        return subject.model.first(subject.x) - subject.model.first.base_layer(subject.x)


@pytest.mark.parametrize("method", [name for name in LINEAR if name not in BARE])
def test_a_scale_multiplies_the_update_and_comes_back(method):
    subject = Subject(Cell(method, "linear", "plain_fp64"))
    subject.model.eval()
    layer: AdaptedLayer = subject.model.first
    before, own = added(subject), layer.scaling["one"]
    assert bool((before.abs() > 1e-3).any())
    with rescale_adapter_scale(subject.model, -0.5):
        assert layer.scaling["one"] == -0.5 * own
        half = added(subject)
    torch.testing.assert_close(added(subject), before, rtol=0, atol=0)
    layer.scale_layer(-0.5)
    torch.testing.assert_close(added(subject), half, rtol=0, atol=0)
    layer.unscale_layer(-0.5)
    torch.testing.assert_close(added(subject), before)
    layer.set_scale("one", -0.5)
    torch.testing.assert_close(added(subject), half)
    layer.unscale_layer()
    torch.testing.assert_close(added(subject), before, rtol=0, atol=0)
    if additive(method) and method != "supertuning_supra":  # whose single entries have no scale
        torch.testing.assert_close(half, -0.5 * before)
    else:
        assert not torch.allclose(half, before)


@pytest.mark.parametrize("method", [name for name in LINEAR if name in BARE])
def test_without_a_scale_it_is_refused(method):
    subject = Subject(Cell(method, "linear", "plain_fp64"))
    with pytest.raises(UnsupportedError, match="has no scaling to change"):
        subject.model.first.scale_layer(2.0)
