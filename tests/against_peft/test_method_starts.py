"""How fresh adapters start, and what is drawn from seeds, beside PEFT."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from rotating_methods import DRAWN as ROTATING
from structured_methods import DRAWN as STRUCTURED
from test_methods import CELLS, T, every_cell, loha, lora, oft, tokens
from torch import nn
from twins import LAYERS, PREFIX, Layer, Twins, close, ours_of

from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.registry import config_class, method_types
from inlay.methods.fourierft import FourierFTConfig
from inlay.methods.oft import OFTConfig
from inlay.methods.trainable_tokens import TrainableTokensConfig
from inlay.methods.vera import VeraConfig


@every_cell
def test_starts_where_peft_starts(make, layer):
    """Either both leave the output as it is, or both change it; what is constant in PEFT has the same value."""
    twins = Twins(LAYERS[layer], make())
    base = twins.base(twins.x)
    theirs, ours = twins.theirs(twins.x), twins.ours(twins.x)
    unchanged = torch.allclose(theirs, base, atol=1e-6)
    assert torch.allclose(ours, base, atol=1e-6) == unchanged == twins.state.records["default"].method.identity
    mine = dict(twins.ours.named_parameters())
    for name, parameter in twins.their_parameters().items():
        constant = parameter.numel() > 1 and parameter.min() == parameter.max()
        if constant or "ln_tuning" in name or "magnitude" in name:
            close(mine[name], parameter)


LARGE = Layer(lambda: nn.Linear(200, 300), (2, 200))
LARGE_CONV = Layer(lambda: nn.Conv2d(30, 40, 3), (1, 30, 4, 4))
LARGE_TABLE = Layer(lambda: nn.Embedding(300, 200), (2, 3), 300)
DRAWN = [
    pytest.param(lambda: lora(init_lora_weights=False), LARGE, id="lora"),
    pytest.param(lambda: lora(init_lora_weights="gaussian"), LARGE, id="lora_gaussian"),
    pytest.param(lora, LARGE_CONV, id="lora_conv"),
    pytest.param(lora, LARGE_TABLE, id="lora_embedding"),
    pytest.param(lambda: peft.IA3Config(**T, feedforward_modules=[], init_ia3_weights=False), LARGE, id="ia3"),
    pytest.param(lambda: peft.LoHaConfig(**T, init_weights=False), LARGE, id="loha"),
    pytest.param(
        lambda: peft.LoHaConfig(r=20, **T, init_weights=False, use_effective_conv2d=True), LARGE_CONV, id="loha_conv"
    ),
    pytest.param(lambda: oft(block=20, init_weights=False), LARGE, id="oft"),
    pytest.param(lambda: peft.VeraConfig(r=900, **T, init_weights=False), LARGE, id="vera"),
    *[pytest.param(make, LARGE, id=name) for name, make in ROTATING],
    pytest.param(lambda: peft.FourierFTConfig(n_frequency=1000, **T), LARGE, id="fourier"),
    *[pytest.param(make, LARGE, id=name) for name, make in STRUCTURED],
    pytest.param(lambda: tokens(init_weights=False), LARGE_TABLE, id="tokens"),
]


@pytest.mark.parametrize(("make", "layer"), DRAWN)
def test_random_starts_have_the_same_spread(make, layer):
    twins = Twins(layer, make())
    mine = dict(twins.ours.named_parameters())
    drawn = 0
    for name, parameter in twins.their_parameters().items():
        if not parameter.requires_grad or parameter.numel() < 200 or parameter.std() == 0:
            continue
        drawn += 1
        error = 6 / math.sqrt(2 * parameter.numel())  # six standard deviations of a sample's deviation
        found, expected = mine[name].detach(), parameter.detach()
        assert abs(float(found.std() / expected.std()) - 1) < error
        assert abs(float(found.mean() - expected.mean())) < 12 * float(expected.std()) / math.sqrt(expected.numel())
        # a uniform and a normal distribution of the same deviation have other extremes
        assert float(found.abs().max()) == pytest.approx(float(expected.abs().max()), rel=0.35)
    assert drawn


def test_policy_peft_draws_lohas_start_from_the_same_stream():
    """LoHa's factors are all that its injection draws, so they can be compared number by number."""
    config = loha()
    base = LAYERS["linear"].model()
    ours = copy.deepcopy(base)
    torch.manual_seed(4)
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(4)
    inject(plan(ours, ours_of(config), policy=PEFT))
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine[name.removeprefix(PREFIX)], parameter)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.small = nn.Linear(6, 10)
        self.large = nn.Linear(10, 7)

    def forward(self, x):
        return self.large(torch.tanh(self.small(x)))


@pytest.mark.parametrize("key", [0, 3, 987654321])
def test_vera_projections_come_from_the_key(key):
    torch.manual_seed(0)
    base = Two()
    fields = {"r": 5, "target_modules": ["small", "large"], "projection_prng_key": key}
    model = copy.deepcopy(base)
    state = inject(plan(model, VeraConfig(**fields)))
    theirs = peft.get_peft_model(base, peft.VeraConfig(**fields))
    for role in ("vera_A", "vera_B"):
        mine = state.shared._modules[role]["default"]
        assert torch.equal(mine, getattr(theirs.base_model, role)["default"])
    assert mine.shape == (10, 5)


def test_vera_layers_use_the_corner_that_fits_them():
    torch.manual_seed(0)
    base = Two()
    fields = {"r": 5, "target_modules": ["small", "large"]}
    model = copy.deepcopy(base)
    inject(plan(model, VeraConfig(**fields)))
    theirs = peft.get_peft_model(base, peft.VeraConfig(**fields))
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_()
                mine[name.removeprefix(PREFIX)].copy_(parameter)
    x = torch.randn(3, 6)
    close(model(x), theirs(x))


@pytest.mark.parametrize(("seed", "shape"), [(777, (12, 8)), (5, (7, 30)), (0, (16, 16))])
def test_fourier_places_are_those_of_peft(seed, shape):
    base = nn.Sequential(nn.Linear(*shape))
    model = copy.deepcopy(base)
    fields = {"n_frequency": 25, "random_loc_seed": seed, "target_modules": ["0"]}
    inject(plan(model, FourierFTConfig(**fields)))
    theirs = peft.get_peft_model(base, peft.FourierFTConfig(**fields)).base_model.model[0].indices["default"]
    places = model[0].fourierft_places["default"]
    assert torch.equal(torch.stack([places // shape[0], places % shape[0]]), theirs)
    assert not any("places" in name for name in model.state_dict())


def test_every_method_is_here():
    families = {type(cell.values[0]()).__name__ for cell in CELLS}
    elsewhere = {"PolyConfig"}  # test_tasks_by_sample
    assert families == {config_class(name).__name__ for name in method_types()} - elsewhere


def test_fourier_needs_a_seed():
    with pytest.raises(ValueError, match="random_loc_seed: expected an integer, found None"):
        FourierFTConfig(random_loc_seed=None)
    with pytest.raises(RuntimeError, match="manual_seed"):  # while injecting
        peft.get_peft_model(LAYERS["linear"].model(), peft.FourierFTConfig(n_frequency=4, random_loc_seed=None, **T))


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(oft_block_size=4, **T),
        FourierFTConfig(n_frequency=5, **T),
        TrainableTokensConfig(token_indices=[1, 3], **T),
        VeraConfig(r=4, save_projection=False, **T),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_what_no_checkpoint_holds_is_there_after_a_low_memory_injection(config):
    """The rest is on the meta device until a load assigns it; then both models run alike."""
    full, low = LAYERS["linear"].model(), LAYERS["linear"].model()
    inject(plan(full, config))
    inject(plan(low, config), low_memory=True)
    given = {name: p for name, p in full.named_parameters() if p.requires_grad}
    assert all(p.is_meta for name, p in low.named_parameters() if name in given)
    low.load_state_dict(given, strict=False, assign=True)
    x = LAYERS["linear"].input()
    assert torch.equal(low(x), full(x))
