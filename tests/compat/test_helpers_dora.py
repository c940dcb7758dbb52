"""``DoraCaching`` beside peft's: equal outputs, and norms that follow every change."""

from __future__ import annotations

import copy

import peft.helpers as theirs
import pytest
import torch
from hotswap_models import Written, close, ids, loaded, pefts

import inlay
import inlay.compat.peft as own
import inlay.compat.peft.helpers as ours
from inlay.core import remember
from inlay.core.policy import INLAY, PEFT
from inlay.methods import dora

DORA = ["lin", "conv", "conv1d_hf", "emb"]


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=lambda policy: policy.name)
def test_dora_caching(tmp_path, policy, monkeypatch):
    written = Written(tmp_path, use_dora=True, target_modules=DORA)
    model, real = loaded(written, policy), pefts(written)
    with ours.DoraCaching(), theirs.DoraCaching(), torch.no_grad():
        for _ in range(2):
            close(model(ids()), real(ids()))
    computed: list[object] = []
    norms = dora.norms_with
    monkeypatch.setattr(dora, "norms_with", lambda *args: computed.append(1) or norms(*args))
    with ours.DoraCaching():
        for _ in range(3):
            close(model(ids()), written.output)
    assert len(computed) == len(DORA)
    close(model(ids()), written.output)
    assert len(computed) == 2 * len(DORA)
    assert not remember.is_remembering()


def test_dora_caching_follows_every_change(tmp_path):
    """Training, loading, scaling, another device or dtype, and in-place changes of the base."""
    first = Written(tmp_path / "a", use_dora=True, target_modules=DORA)
    second = Written(tmp_path / "b", seed=8, r=2, lora_alpha=5, use_dora=True, target_modules=DORA)
    third = Written(tmp_path / "c", seed=9, use_dora=True, target_modules=DORA)
    model = loaded(first)
    reference = copy.deepcopy(model)

    def same():
        with ours.DoraCaching(enabled=False):
            expected = reference(ids())
        close(model(ids()), expected)

    with ours.DoraCaching(), torch.no_grad():
        for _ in range(2):
            same()
        for changed in (model, reference):
            changed.base_model.model.lin.scale_layer(3.0)
        same()
        for changed in (model, reference):
            changed.base_model.model.lin.weight.mul_(2.0)
        same()
        for changed in (model, reference):
            changed.base_model.model.conv.lora_B["default"].weight.add_(0.1)
        same()
        for changed in (model, reference):
            inlay.set_peft_model_state_dict(changed, third.tensors)
        same()
        for changed in (model, reference):
            own.utils.hotswap.hotswap_adapter(changed, second.folder, "default")
        same()
        model.double(), reference.double()
        same()
        model.merge_adapter(), reference.merge_adapter()
        same()
    with ours.DoraCaching():
        model.unmerge_adapter(), reference.unmerge_adapter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(ids()).sum().backward()  # in eval mode, with gradients
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        with ours.DoraCaching(enabled=False):
            reference(ids()).sum().backward()
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(grads[name], parameter.grad)
        optimizer.step()
        torch.optim.SGD(reference.parameters(), lr=0.1).step()
        same()
        model.train(), reference.train()
        same()


def test_peft_keeps_norms_of_weights_that_have_changed(tmp_path):
    written = Written(tmp_path, use_dora=True, target_modules=["lin"])
    for module, model, right in ((ours, loaded(written), True), (theirs, pefts(written), False)):
        with module.DoraCaching(), torch.no_grad():
            model(ids())
            model.base_model.model.lin.lora_B["default"].weight.add_(0.5)
            found = model(ids())
        assert torch.allclose(found, model(ids()), atol=1e-5) is right


def test_dora_caching_as_a_call_and_nested(tmp_path):
    caching = ours.DoraCaching()
    caching(enabled=True)
    assert remember.is_remembering()
    with ours.DoraCaching(enabled=False):
        assert not remember.is_remembering()
    assert remember.is_remembering()
    caching(enabled=False)
    assert not remember.is_remembering()
    with pytest.raises(ZeroDivisionError), caching:
        raise ZeroDivisionError
    assert not remember.is_remembering()
    assert caching.enabled is True
    assert caching.prev_value is None
