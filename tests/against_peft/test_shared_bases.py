"""Seeded bases and shared vectors beside PEFT: drawn alike, shared alike, and where PEFT is wrong."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from test_methods import pvera, tinylora, vblora
from torch import nn
from twins import LAYERS, PREFIX, Twins, by_our_names, close, hf_conv1d, ours_of

import inlay
from inlay.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from inlay.core.active import set_active
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 7)
        self.third = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def three() -> Three:
    torch.manual_seed(0)
    return Three()


NAMES = ["first", "second", "third"]


@pytest.mark.filterwarnings("ignore:.*save_projection")
@pytest.mark.parametrize(
    "make",
    [
        lambda **f: peft.PveraConfig(r=5, projection_prng_key=9, **f),
        lambda **f: peft.RandLoraConfig(r=3, projection_prng_key=9, **f),
        lambda **f: peft.RandLoraConfig(r=4, projection_prng_key=2, sparse=True, **f),
        lambda **f: peft.RandLoraConfig(r=4, projection_prng_key=2, very_sparse=True, save_projection=False, **f),
        lambda **f: peft.UniLoraConfig(r=3, theta_d_length=17, proj_seed=8, **f),
        lambda **f: peft.UniLoraConfig(r=2, theta_d_length=500, save_indices=True, **f),
        lambda **f: peft.TinyLoraConfig(r=3, u=4, projection_seed=5, **f),
        lambda **f: peft.TinyLoraConfig(u=4, projection_seed=5, save_projection=False, **f),
    ],
    ids=["pvera", "randlora", "sparse", "very_sparse", "unilora", "unilora_rare", "tinylora", "tinylora_seeded"],
)
def test_what_is_drawn_from_the_seed(make):
    config, base = make(target_modules=NAMES), three()
    ours = copy.deepcopy(base)
    inject(plan(ours, ours_of(config)))
    theirs = peft.get_peft_model(base, config)
    expected = {name: b for name, b in theirs.named_buffers(remove_duplicate=False) if "default" in name}
    found = dict(ours.named_buffers())
    assert found
    for name, buffer in found.items():
        there = expected[f"{PREFIX}{name}" if f"{PREFIX}{name}" in expected else f"base_model.{name}"]
        if "tinylora_A" in name or "tinylora_B" in name:  # singular vectors, computed more precisely here
            close(buffer, there)
        else:
            assert torch.equal(buffer, there), name
    x, _ = torch.randn(4, 6), (ours.eval(), theirs.eval())
    mine = by_our_names(ours)
    with torch.no_grad():
        for name, parameter in by_our_names(theirs).items():
            if parameter.requires_grad:
                mine[name].copy_(parameter.normal_())
    close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), three()(x), atol=1e-3)


@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_layers_share_a_vector_in_the_groups_of_peft(tying):
    config = peft.TinyLoraConfig(u=2, weight_tying=tying, target_modules=NAMES, init_weights="uniform")
    ours, theirs = three(), peft.get_peft_model(three(), config)
    inject(plan(ours, ours_of(config)))
    mine = by_our_names(ours)
    expected = {name: p for name, p in by_our_names(theirs).items() if p.requires_grad}
    assert {name for name, p in mine.items() if p.requires_grad} == expected.keys()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(expected.items())):
            mine[name].copy_(parameter.fill_(1.0 + number))
    x = torch.randn(3, 6)
    close(ours(x), theirs(x))


def test_pvera_draws_what_peft_draws_in_training():
    twins = Twins(LAYERS["linear"], pvera(generator_seed=4), policy=PEFT).equalise()
    twins.ours.train(), twins.theirs.train()
    first = twins.ours(twins.x)
    close(first, twins.theirs(twins.x))
    second = twins.ours(twins.x)
    close(second, twins.theirs(twins.x))
    assert not torch.allclose(first, second, atol=1e-3)


def test_pvera_samples_around_its_mean_on_every_kind():
    """The mean over many samples is the output of eval mode, and the spread that of the formula."""
    for layer in ("linear", "conv2d_grouped", "embedding"):
        torch.manual_seed(0)
        model = LAYERS[layer].model()
        inject(plan(model, ours_of(pvera(init_weights=False))))
        with torch.no_grad():
            for parameter in model.layer.parameters():
                parameter.mul_(0.3)
        x = LAYERS[layer].input()
        mean = model.eval()(x)
        drawn = torch.stack([model.train()(x) for _ in range(600)])
        error = drawn.std(0) / 600**0.5
        assert (error > 0).all()
        assert ((drawn.mean(0) - mean).abs() < 6 * error).all()


def test_randloras_bases_are_saved_once():
    """PEFT writes them once more for each layer; docs/differences.md."""
    config = peft.RandLoraConfig(r=3, target_modules=NAMES)
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(three(), config))
    mine = inlay.get_peft_model(three(), ours_of(config))
    saved = get_peft_model_state_dict(mine)
    assert sum("randlora_A" in key for key in theirs) == 4
    assert sum("randlora_A" in key for key in saved) == 1
    set_peft_model_state_dict(mine, theirs)
    spoilt = {key: value + 1 if "first.randlora_A" in key else value for key, value in theirs.items()}
    with pytest.raises(RuntimeError, match="randlora_A"):  # two values for one tensor
        set_peft_model_state_dict(mine, spoilt)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = hf_conv1d(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_second_tinylora_adapter_on_conv1d():
    """PEFT forgets that the weight is stored transposed; docs/differences.md."""
    torch.manual_seed(0)
    base, x = Wide(), torch.randn(3, 12)
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, tinylora(init_weights="uniform"))
    theirs.add_adapter("more", tinylora(init_weights="uniform"))
    theirs.set_adapter("more")
    with pytest.raises(RuntimeError, match="shape"):
        theirs(x)
    alone = copy.deepcopy(ours)
    config = ours_of(tinylora(init_weights="uniform"))
    inject(plan(alone, config, "more"), seed=3)
    state = inject(plan(ours, config), seed=1)
    inject(plan(ours, config, "more"), seed=3)
    set_active(state, ["more"])
    close(ours(x), alone(x))


def test_a_layers_projection_depends_on_its_own_adapter():
    """PEFT numbers a layer when its first adapter comes, so a second one draws otherwise than alone."""
    first, second = (peft.TinyLoraConfig(u=3, target_modules=names) for names in (NAMES, ["third"]))
    alone = peft.get_peft_model(three(), second).base_model.model.third.tinylora_P["default"]
    theirs = peft.get_peft_model(three(), first)
    theirs.add_adapter("more", second)
    assert not torch.equal(theirs.base_model.model.third.tinylora_P["more"], alone)
    ours = three()
    inject(plan(ours, ours_of(first)))
    inject(plan(ours, ours_of(second), "more"))
    assert torch.equal(ours.third.tinylora_P["more"], alone)


def test_tinylora_starts_from_memory_that_was_never_written_in_peft_and_uniform_here():
    model = LAYERS["linear"].model()
    state = inject(plan(model, ours_of(tinylora(init_weights=False, init_v_bound=0.1))))
    v = state.shared._modules["tinylora_v"]["default"].get_parameter("0")
    assert 0 < float(v.abs().max()) <= 0.1


def test_packed_logits_cannot_be_trained_further():
    config = ours_of(vblora(save_only_topk_weights=True))
    model, again = (inlay.get_peft_model(LAYERS["linear"].model(), copy.deepcopy(config)) for _ in range(2))
    x = LAYERS["linear"].input()
    set_peft_model_state_dict(again, get_peft_model_state_dict(model))
    close(again.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        again.train()(x)
    model.train()(x)


def test_a_weight_that_vectors_do_not_divide_is_refused():
    config = inlay.VBLoRAConfig(vector_length=5, target_modules=["layer"])
    with pytest.raises(ValueError, match="vector_length=5 does not divide its 12 inputs"):
        plan(LAYERS["linear"].model(), config)
    with pytest.raises(ValueError, match="num_vectors=1"):
        inlay.VBLoRAConfig(num_vectors=1, topk=2)
