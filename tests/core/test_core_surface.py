"""What one adapted layer answers when it is asked directly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay import LoraConfig, inject, plan
from inlay.core.merge import merge
from inlay.errors import RoutingError, UnknownAdapterError


class Counting(nn.Linear):
    asked = 0

    @property
    def costly(self):
        type(self).asked += 1
        return self.asked


def model_with(*names, base=nn.Linear):
    model = nn.Sequential(base(4, 4), nn.Linear(4, 4))
    for name in names:
        inject(plan(model, LoraConfig(target_modules=["0", "1"], init_lora_weights=False), name))
    return model


def test_a_property_of_the_base_is_computed_once():
    model = model_with("a", base=Counting)
    assert model[0].costly == 1
    assert Counting.asked == 1


def test_names_by_sample_must_be_adapters_of_the_model():
    model = model_with("a")
    x = torch.randn(2, 4)
    assert torch.allclose(model[0](x, adapter_names=["__base__", "a"])[0], model[0].base_layer(x)[0], atol=1e-6)
    with pytest.raises(UnknownAdapterError, match="'typo'"):
        model[0](x, adapter_names=["typo", "a"])
    with pytest.raises(RoutingError, match="1 names"):
        model[0](x, adapter_names=["a"])


def test_every_change_of_the_list_of_merged_names_arrives():
    layer = model_with("a", "b")[0]
    layer.merged_adapters.append("a")
    layer.merged_adapters.insert(0, "b")
    assert layer.merged_adapters == ["b", "a"]
    layer.merged_adapters[0] = "a"
    del layer.merged_adapters[1]
    assert layer.merged_adapters == ["a"]
    layer.merged_adapters.clear()
    assert not layer.merged


class SelfMerging:
    """A layer that merges itself, and may refuse; unmerging takes everything out."""

    merges_itself = True

    def __init__(self, *merged, refuses=None):
        self.merged_names = list(merged)
        self.refuses = refuses

    def has(self, name):
        return True

    def merge(self, safe_merge=False, adapter_names=None):
        if self.refuses in adapter_names:
            raise ValueError("refused")
        self.merged_names += adapter_names

    def unmerge(self):
        self.merged_names.clear()


class Holder:
    def __init__(self, *layers):
        self.layers = lambda: layers

    def record(self, name):
        return None


def test_a_merge_that_fails_leaves_earlier_merges():
    layers = SelfMerging("a"), SelfMerging(), SelfMerging("a", refuses="b")
    with pytest.raises(ValueError, match="refused"):
        merge(Holder(*layers), ["b"])
    assert [layer.merged_names for layer in layers] == [["a"], [], ["a"]]
