"""Where a method of PEFT is wrong, silent or refuses: what PEFT does, and what Inlay does instead."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from test_methods import T, ia3, loha, lora, norm, oft, tokens
from torch import nn
from twins import LAYERS, PREFIX, Twins, close, ours_of

from inlay.core.active import set_active
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.errors import ConfigError, InlayWarning, TargetError, UnsupportedError
from inlay.methods.ia3 import IA3Config
from inlay.methods.ln_tuning import LNTuningConfig
from inlay.methods.loha import LoHaConfig
from inlay.methods.trainable_tokens import TrainableTokensConfig
from inlay.methods.vera import VeraConfig


def test_gradient_of_lohas_tucker_form():
    twins = Twins(LAYERS["conv2d"], loha(use_effective_conv2d=True)).equalise()
    close(*(model(twins.x) for model in (twins.ours, twins.theirs)))
    _, theirs = twins.run(twins.theirs)
    _, ours = twins.run(twins.ours)
    values = {name: p.detach().double().requires_grad_() for name, p in twins.ours.named_parameters()}
    part = {name.split(".")[1]: value for name, value in values.items() if "hada" in name}
    first, second = (
        torch.einsum("ijkl,io,jc->ockl", part[f"hada_t{i}"], part[f"hada_w{i}_a"], part[f"hada_w{i}_b"]) for i in (1, 2)
    )
    conv = twins.base.layer
    weight = conv.weight.double() + 5 / 3 * first * second
    y = nn.functional.conv2d(twins.x.double(), weight, conv.bias.double(), conv.stride, conv.padding)
    (y * torch.linspace(-1.0, 2.0, y.numel()).cos().view(y.shape)).sum().backward()
    wrong = set()
    for name, value in values.items():
        if "hada" not in name:
            continue
        assert value.grad is not None
        close(ours[name], value.grad.float(), 1e-4)
        if not torch.allclose(theirs[name], value.grad.float(), rtol=1e-2, atol=1e-2):
            wrong.add(name.split(".")[1])
    assert wrong == {"hada_w1_a", "hada_w2_a"}


def test_lohas_rank_dropout_may_drop_every_row():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 2))
    config = peft.LoHaConfig(r=2, rank_dropout=0.9, init_weights=False, target_modules=["0"])
    model = copy.deepcopy(base)
    inject(plan(model, ours_of(config)))
    theirs = peft.get_peft_model(base, config)
    x = torch.randn(3, 4)
    assert any(bool(theirs(x).isnan().any()) for _ in range(20))
    outputs = [model(x) for _ in range(200)]
    assert not any(bool(y.isnan().any()) for y in outputs)
    assert any(torch.equal(y, model[0].base_layer(x)) for y in outputs)


def test_lohas_rank_dropout_is_that_of_peft_where_rows_remain():
    """Seen over many draws: the same rows, scaled alike, and the update on average where nothing vanishes."""
    twins = Twins(LAYERS["linear"], loha(rank_dropout=0.4)).equalise()
    seen = []
    for model in (twins.theirs, twins.ours):
        model.train()
        base = twins.base(twins.x)
        torch.manual_seed(0)
        changes = torch.stack([model(twins.x).detach() - base for _ in range(400)])
        model.eval()
        whole = model(twins.x).detach() - base
        ratio = (changes / whole)[:, 0, 0]  # (draws, out): 0 or 1 / share of the rows kept
        seen.append(sorted({round(v, 3) for v in ratio.flatten().tolist()}))
        assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    steps = [0.0, *(round(8 / kept, 3) for kept in range(8, 1, -1))]
    for values in seen:
        assert len(values) >= 6
        assert all(min(abs(value - step) for step in [*steps, 8.0]) < 0.01 for value in values)


def test_tokens_keep_the_bias_of_a_head():
    twins = Twins(LAYERS["linear"], tokens()).equalise()
    x, layer = twins.x.double(), twins.base.layer
    delta = twins.ours.layer.trainable_tokens_delta["default"].double()
    weight = layer.weight.double().index_copy(0, torch.tensor([7, 2, 5]), delta)
    right = nn.functional.linear(x, weight, layer.bias.double())
    close(twins.ours(twins.x), right.float())
    close(twins.theirs(twins.x), (right - layer.bias).float())


def test_tokens_of_two_adapters_must_differ():
    twins = Twins(LAYERS["embedding"], tokens())
    config = peft.TrainableTokensConfig(token_indices=[1, 5], **T)
    twins.theirs.add_adapter("more", config)
    inject(plan(twins.ours, ours_of(config), "more"))
    twins.theirs.base_model.set_adapter(["default", "more"])
    with pytest.raises(ValueError, match="already defined"):
        twins.theirs(twins.x)
    with pytest.raises(UnsupportedError, match=r"'more' and 'default' cannot be active together: .*\[5\]"):
        set_active(twins.state, ["default", "more"])
    assert twins.state.active == ("default",)
    with pytest.raises(UnsupportedError, match="cannot be active together"):
        merge(twins.state, ["default", "more"])
    merge(twins.state, ["default"])
    with pytest.raises(UnsupportedError, match="cannot be active together"):
        merge(twins.state, ["more"])


@pytest.mark.parametrize(
    ("indices", "layer", "message"),
    [
        ([], "embedding", "token_indices is empty"),
        ([11], "embedding", "token 11 is beyond its 11 rows"),
        ([1], "conv2d", "tokens are the rows of an embedding"),
    ],
)
def test_tokens_that_cannot_train(indices, layer, message):
    with pytest.raises(UnsupportedError, match=message):
        plan(LAYERS[layer].model(), TrainableTokensConfig(token_indices=indices, **T))
    with pytest.raises(ConfigError, match=r"each token once, found \[4\] twice"):
        TrainableTokensConfig(token_indices=[4, 1, 4])


def test_a_padding_token_is_told():
    """Torch gives its row no gradient, with adapters or not; PEFT says nothing."""
    model = LAYERS["embedding_padding"].model()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.TrainableTokensConfig(token_indices=[2, 3], **T))
    with pytest.warns(InlayWarning, match="token 2 is the padding token"):
        made = plan(model, TrainableTokensConfig(token_indices=[2, 3], **T))
    inject(made)
    for one, layer in ((model, model.layer), (theirs, theirs.base_model.model.layer)):
        one(torch.tensor([[2, 3]])).sum().backward()
        gradient = layer.trainable_tokens_delta["default"].grad
        assert torch.equal(gradient, torch.stack([torch.zeros(8), torch.ones(8)]))


def test_two_tuned_norms_add_up():
    twins = Twins(LAYERS["layernorm"], norm())
    twins.theirs.add_adapter("more", norm())
    inject(plan(twins.ours, LNTuningConfig(**T), "more"))
    layers = twins.ours.layer.ln_tuning_layers
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(torch.randn_like(parameter))
    twins.theirs.base_model.set_adapter(["default", "more"])
    with pytest.raises(ValueError, match="more than one adapter"):
        twins.theirs(twins.x)
    set_active(twins.state, ["default", "more"])
    base = twins.base.layer
    weight, bias = (
        getattr(layers["default"], name) + getattr(layers["more"], name) - getattr(base, name)
        for name in ("weight", "bias")
    )
    right = nn.functional.layer_norm(twins.x.double(), (12,), weight.double(), bias.double())
    close(twins.ours(twins.x), right.float())


def test_statistics_of_a_tuned_batch_norm():
    """PEFT copies them with the layer, so that its adapters have statistics of their own; here they are the base's."""
    twins = Twins(LAYERS["batchnorm"], norm())
    twins.theirs.train()(twins.x)
    twins.ours.train()(twins.x)
    theirs = twins.theirs.base_model.model.layer
    assert torch.equal(theirs.base_layer.running_mean, torch.zeros(4))
    close(twins.ours.layer.base_layer.running_mean, theirs.ln_tuning_layers["default"].running_mean)
    assert not any("ln_tuning_layers.default.running" in name for name in twins.ours.state_dict())


def test_ia3_reads_whole_names():
    """PEFT takes any ending of a path for a feed-forward module, also the middle of a name."""
    config = {"target_modules": ".*layer", "feedforward_modules": ["yer"]}

    def model():
        return nn.Sequential(LAYERS["linear"].model())

    theirs = peft.get_peft_model(model(), peft.IA3Config(**config)).base_model.model
    assert theirs[0].layer.ia3_l["default"].shape == (1, 12)
    with pytest.raises(TargetError, match="feedforward_modules: yer matches nothing"):
        plan(model(), IA3Config(**config))


def test_each_ia3_adapter_says_which_of_its_modules_are_feed_forward():
    """PEFT asks the first adapter of a layer only."""
    twins = Twins(LAYERS["linear"], ia3())
    twins.theirs.add_adapter("more", ia3(feedforward=True))
    inject(plan(twins.ours, IA3Config(feedforward_modules=["layer"], **T), "more"))
    assert twins.theirs.base_model.model.layer.ia3_l["more"].shape == (8, 1)
    assert twins.ours.layer.ia3_l["more"].shape == (1, 12)


def test_ia3_on_more_layers():
    for layer in ("embedding", "conv1d"):
        with pytest.raises(ValueError, match="is not supported"):
            peft.get_peft_model(LAYERS[layer].model(), ia3())
        for feedforward in ([], ["layer"]):
            assert plan(LAYERS[layer].model(), IA3Config(feedforward_modules=feedforward, **T)).placements
    with pytest.raises(UnsupportedError, match="takes back any factor on its input"):
        plan(LAYERS["layernorm"].model(), IA3Config(feedforward_modules=["layer"], **T))


class Widths(nn.Module):
    def __init__(self):
        super().__init__()
        self.small = nn.Linear(4, 6)
        self.large = nn.Linear(6, 9)

    def forward(self, x):
        return self.large(self.small(x))


def test_a_second_vera_adapter_has_projections_of_its_own():
    """In PEFT it shares the first one's, so that its key, rank and layers must fit them."""
    torch.manual_seed(0)
    base = Widths()
    small = {"r": 3, "target_modules": ["small"], "projection_prng_key": 1}
    wide = {"r": 5, "target_modules": ["large"], "projection_prng_key": 2}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**small))
    with pytest.raises(ValueError, match="must be the same for all adapters"):
        theirs.add_adapter("more", peft.VeraConfig(**wide))
    with pytest.raises(ValueError, match="or greater is required"):
        theirs.add_adapter("more", peft.VeraConfig(**{**wide, "projection_prng_key": 1}))
    model, alone = copy.deepcopy(base), copy.deepcopy(base)
    state = inject(plan(model, VeraConfig(**small)))
    inject(plan(model, VeraConfig(**wide), "more"))
    inject(plan(alone, VeraConfig(**wide), "more"))
    for one in (model, alone):
        with torch.no_grad():
            one.large.vera_lambda_b["more"].fill_(0.7)
    set_active(state, ["more"])
    x = torch.randn(2, 4)
    close(model(x), alone(x))
    assert not torch.allclose(model(x), base(x), atol=1e-3)
    set_active(state, ["default", "more"])
    merge(state)
    close(model(x), alone(x))  # the first one is fresh


def test_a_chain_of_methods_is_what_peft_nests():
    """PEFT's mixed model wraps one layer in another; the chain has the same order."""
    makers = {"l": lora, "h": lambda: loha(init_weights=False), "o": lambda: oft(init_weights=False)}
    for order in (["l", "h", "o"], ["o", "l", "h"], ["h", "o", "l"]):
        torch.manual_seed(0)
        base = LAYERS["linear"].model()
        ours, x = copy.deepcopy(base), LAYERS["linear"].input()
        theirs = peft.get_peft_model(base, makers[order[0]](), adapter_name=order[0], mixed=True)
        for name in order[1:]:
            theirs.add_adapter(name, makers[name]())
        theirs.set_adapter(order)
        state = None
        for name in order:
            state = inject(plan(ours, ours_of(makers[name]()), name))
        assert state is not None
        set_active(state, order)
        mine = dict(ours.named_parameters())
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if "base_layer.weight" not in name and not name.endswith("bias"):
                    mine[name.removeprefix(PREFIX).replace("base_layer.", "")].copy_(parameter)
        y = theirs.eval()(x)
        close(ours(x), y)
        merge(state)
        close(ours(x), y)


def test_lohas_tucker_form_in_three_dimensions():
    with pytest.raises(TypeError, match="not supported"):
        peft.get_peft_model(LAYERS["conv3d"].model(), loha(use_effective_conv2d=True))
    model, x = LAYERS["conv3d"].model(), LAYERS["conv3d"].input()
    state = inject(plan(model, LoHaConfig(r=3, use_effective_conv2d=True, init_weights=False, **T)))
    assert model.layer.hada_t1["default"].shape == (3, 3, 2, 1, 3)
    y = model(x)
    merge(state)
    close(model(x), y)
