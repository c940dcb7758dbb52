"""Where PEFT's OFT is wrong, silent or refuses: what PEFT does, and what Inlay does instead."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from test_methods import T, oft
from torch import nn
from twins import LAYERS, PREFIX, Layer, Twins, close, ours_of

from inlay.core.active import set_active
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.errors import ConfigError, InlayWarning, UnsupportedError
from inlay.methods.oft import OFTConfig


@pytest.mark.parametrize("layer", ["conv2d_square", "conv2d_dilated", "conv2d_grouped", "conv1d", "conv3d"])
def test_oft_on_kernels(layer):
    """The patches under a kernel are rotated: the identity at first, and a merge changes nothing."""
    model = LAYERS[layer].model()
    base, x = copy.deepcopy(model), LAYERS[layer].input()
    state = inject(plan(model, OFTConfig(oft_block_size=6, **T)))
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    y = model(x)
    assert not torch.allclose(y, base(x), atol=1e-3)
    merge(state)
    eject(model, state, restore=False)
    close(model(x), y)


def test_oft_on_kernels_in_peft():
    twins = Twins(LAYERS["conv2d_square"], oft())
    shapes = {name: p.shape for name, p in twins.ours.named_parameters()}
    assert shapes == {name: p.shape for name, p in twins.their_parameters().items()}  # so checkpoints can be read
    assert not torch.allclose(twins.theirs(twins.x), twins.base(twins.x), atol=0.1)
    twins.equalise()
    y = twins.theirs(twins.x)
    theirs, ours = twins.merged()
    assert not torch.allclose(theirs(twins.x), y, atol=0.1)
    close(ours(twins.x), theirs(twins.x))  # PEFT's merge is right, its forward is not
    close(twins.ours(twins.x), ours(twins.x))


def test_oft_on_grouped_pointwise_convolutions():
    """PEFT runs them and cannot merge them; a block that reaches across groups cannot be held by the weight."""
    grouped = Layer(lambda: nn.Conv2d(8, 8, 1, groups=2), (3, 8, 5, 5))
    twins = Twins(grouped, oft(block=2)).equalise()
    close(twins.ours(twins.x), twins.theirs(twins.x))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        copy.deepcopy(twins.theirs).merge_and_unload()
    y = twins.ours(twins.x)
    merge(twins.state)
    close(twins.ours(twins.x), y)
    with pytest.raises(UnsupportedError, match=r"across the groups.*oft_block_size that divides 4"):
        plan(grouped.model(), OFTConfig(oft_block_size=8, **T))


def test_oft_twice_on_a_layer():
    """PEFT applies two rotations in one order when it runs and in the other when it merges."""
    twins = Twins(LAYERS["linear"], oft(init_weights=False))
    config = oft(init_weights=False)
    twins.theirs.add_adapter("more", config)
    inject(plan(twins.ours, ours_of(config), "more"))
    twins.theirs.base_model.set_adapter(["default", "more"])
    set_active(twins.state, ["default", "more"])
    ours = dict(twins.ours.named_parameters())
    with torch.no_grad():
        for name, parameter in twins.their_parameters().items():
            ours[name].copy_(parameter)
    y = twins.ours(twins.x)
    theirs = twins.theirs(twins.x)
    merged, mine = twins.merged()
    assert not torch.allclose(merged(twins.x), theirs, atol=1e-3)
    close(mine(twins.x), y)
    close(merged(twins.x), y)


def test_ofts_module_dropout():
    """PEFT takes the field and never uses it; Inlay leaves blocks as they are."""
    twins = Twins(LAYERS["linear"], oft(module_dropout=0.5)).equalise()
    whole = twins.theirs(twins.x)
    twins.theirs.train()
    twins.ours.train()
    assert torch.equal(twins.theirs(twins.x), whole)
    seen = torch.stack([twins.ours(twins.x).detach() for _ in range(100)])
    weight, bias = twins.base.layer.weight, twins.base.layer.bias
    merge(twins.state)
    rotated = twins.ours.layer.weight
    parts = []  # the share of each block of 4 inputs, without and with its rotation
    for start in range(0, 12, 4):
        block = slice(start, start + 4)
        parts.append([nn.functional.linear(twins.x[..., block], w[:, block]) for w in (weight, rotated)])
    possible = torch.stack(
        [parts[0][i] + parts[1][j] + parts[2][k] + bias for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    )
    which = (seen.flatten(1)[:, None] - possible.flatten(1)[None]).abs().amax(-1)
    assert float(which.amin(-1).max()) < 1e-5
    assert len(set(which.argmin(-1).tolist())) == 8


def test_coft_does_not_change_its_parameters_when_it_runs():
    twins = Twins(LAYERS["linear"], oft(coft=True, eps=0.4)).equalise()
    ours, theirs = (dict(m.named_parameters()) for m in (twins.ours, twins.theirs))
    before = ours["layer.oft_R.default.weight"].detach().clone()
    close(twins.ours(twins.x), twins.theirs(twins.x))
    assert torch.equal(ours["layer.oft_R.default.weight"], before)
    changed = theirs[f"{PREFIX}layer.oft_R.default.weight"]
    assert not torch.allclose(changed, before, atol=1e-3)
    # what PEFT wrote is the projection: skew matrices of norm eps / sqrt(blocks)
    assert torch.allclose(changed.norm(dim=1) * 2**0.5, torch.full((3,), 0.4 / 3**0.5), atol=1e-6)


def test_oft_with_one_term_trains_nothing():
    twins = Twins(LAYERS["linear"], oft(num_cayley_neumann_terms=2))
    theirs = peft.get_peft_model(copy.deepcopy(twins.base), oft(num_cayley_neumann_terms=1))
    assert not theirs(twins.x).requires_grad
    with pytest.raises(ConfigError, match="num_cayley_neumann_terms: expected a number greater than 1, found 1"):
        OFTConfig(num_cayley_neumann_terms=1)


def test_an_adjusted_block_size_is_told():
    with pytest.warns(InlayWarning, match="oft_block_size=5 does not divide its 12 features; 4 is taken"):
        made = plan(LAYERS["linear"].model(), OFTConfig(oft_block_size=5, **T))
    assert made.placements[0].options == {"r": 3, "oft_block_size": 4}
    with pytest.warns(UserWarning, match="Adjusted `oft_block_size` to"):
        theirs = peft.get_peft_model(LAYERS["linear"].model(), oft(block=5))
    assert theirs.base_model.model.layer.oft_block_size["default"] == 4
