"""LoRA's variants while they train, beside PEFT: gradients, draws, terms of the loss, and where the two differ."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn
from torch.distributions import Dirichlet, kl_divergence
from twins import LAYERS, Layer, Twins, by_our_names, close, ours_of
from variant_tables import T, blocks, lora

import inlay
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.errors import ConfigError
from inlay.methods.monteclora import MonteCLoRA, dirichlet_divergence

LINEAR = LAYERS["linear"]


def trained(twins: Twins) -> None:
    twins.theirs.train()
    twins.ours.train()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 5, 12])
@pytest.mark.parametrize("init", ["batch_average", "batch_average_once", "random"])
def test_velora_trains_on_what_peft_trains_on(init, groups, dora):
    """With DoRA, which PEFT refuses, the gradient of A is that without it where the magnitudes are the norms."""
    config = peft.LoraConfig(r=4, lora_alpha=6, velora_config=peft.VeloraConfig(groups, 0.7, init), **T)
    twins = Twins(LINEAR, config).equalise()
    ours = twins.ours
    if init == "random":
        ours.layer.lora_velora_embed["default"].copy_(twins.theirs.base_model.layer.lora_velora_embed["default"])
    trained(twins)
    if dora:
        mine = ours_of(config)
        mine.use_dora = True
        other = copy.deepcopy(twins.base)
        inject(plan(other, mine))
        other.load_state_dict(ours.state_dict(), strict=False)
        layer = other.layer
        with torch.no_grad():
            update = layer.get_delta_weight("default")
            norm = (layer.base_layer.weight + update).norm(dim=1)
            layer.lora_magnitude_vector["default"].weight.copy_(norm)
        ours = other.train()
    for x in (twins.x, twins.x + 1.0):  # the direction of the first batch stays, or not
        twins.x = x
        expected, gradients = twins.run(twins.theirs)
        found, own = twins.run(ours)
        close(found, expected)
        close(own["layer.lora_A.default.weight"], gradients["layer.lora_A.default.weight"])
        if not dora:
            assert own.keys() == gradients.keys()
            for name, gradient in gradients.items():
                close(own[name], gradient)
    if init != "batch_average":  # which is of its batch, and not kept here
        close(ours.layer.lora_velora_embed["default"], twins.theirs.base_model.layer.lora_velora_embed["default"])


def test_a_file_says_the_direction_of_veloras_first_batch():
    """PEFT writes it and does not go by it when training goes on."""
    config = peft.LoraConfig(r=4, velora_config=peft.VeloraConfig(3, init_type="batch_average_once"), **T)
    twins = Twins(LINEAR, config)
    trained(twins)
    saved = torch.tensor([0.6, 0.0, 0.8, 0.0])
    mine, theirs = twins.ours.layer.lora_velora_embed, twins.theirs.base_model.layer.lora_velora_embed
    mine["default"].copy_(saved)
    theirs["default"].copy_(saved)
    twins.ours(twins.x)
    twins.theirs(twins.x)
    assert torch.equal(mine["default"], saved)
    assert not torch.allclose(theirs["default"], saved, atol=0.1)


def montes(samples: int = 3, **fields) -> Twins:
    options = peft.MontecloraConfig(num_samples=samples, sample_scaler=0.3, buffer_size=1, kl_loss_weight=0.2, **fields)
    twins = Twins(LINEAR, lora(monteclora_config=options, **T)()).equalise()
    trained(twins)
    return twins


class Draws:
    """Numbers for one draw of ours, and for the draw of PEFT that comes to the same.

    PEFT draws a matrix for each component of the mixture, and we draw their sum, which is normal with deviation |w|.
    """

    def __init__(self, samples: int, r: int, fan_in: int) -> None:
        generator = torch.Generator().manual_seed(8)
        self.own = [torch.randn(shape, generator=generator) for shape in ((samples,), (r, r), (r, fan_in))]
        self.at = 0

    def noise(self, like):
        found = self.own[self.at % 3]
        self.at += 1
        assert found.shape == like.shape
        return found

    def theirs(self, mixture):
        first, square, matrix = self.own
        n, inverse = len(mixture), (-mixture).exp()
        spread = (inverse * (1 - 2 / n) + inverse.sum() / n**2) + 1e-6
        w = torch.softmax(mixture - mixture.mean() + spread.sqrt() * first, -1)
        parts = torch.stack([matrix.T * share / w.norm() for share in w])
        return {"z_mvn": parts, "z_wishart": square @ square.T, "z_dirichlet": first}


def test_monteclora_draws_what_peft_draws(monkeypatch):
    twins = montes()
    sampler: MontecloraSampler = twins.theirs.base_model.layer.lora_monteclora_sampler["default"]
    draws = Draws(3, 4, 12)
    monkeypatch.setattr(MonteCLoRA, "noise", draws.noise)
    given = draws.theirs(sampler.expert_weights_prior.detach())
    monkeypatch.setattr(sampler.sampler, "get", lambda: given)
    expected, gradients = twins.run(twins.theirs)
    found, mine = twins.run(twins.ours)
    assert draws.at == 3
    close(found, expected)
    assert mine.keys() == gradients.keys()
    assert {name.rpartition(".")[2] for name in mine} >= {"std_prior", "expert_weights_prior"}
    for name, gradient in gradients.items():
        close(mine[name], gradient, 2e-5)
    twins.ours.eval()
    twins.theirs.eval()
    close(twins.ours(twins.x), twins.theirs(twins.x))
    assert draws.at == 3  # nothing is drawn


@pytest.mark.parametrize("entropy", [False, True])
def test_the_loss_of_monteclora_is_pefts_but_for_the_mixture(monkeypatch, entropy):
    twins = montes(use_entropy=entropy)
    sampler: MontecloraSampler = twins.theirs.base_model.layer.lora_monteclora_sampler["default"]
    draws = Draws(3, 4, 12)
    monkeypatch.setattr(MonteCLoRA, "noise", draws.noise)
    given = draws.theirs(sampler.expert_weights_prior.detach())
    monkeypatch.setattr(sampler.sampler, "get", lambda: given)
    twins.theirs(twins.x)
    own = inlay.penalty(twins.ours)
    theirs = twins.theirs.base_model._get_monteclora_loss()
    alpha = sampler.expert_weights_prior.exp()
    close(own - 0.2 * dirichlet_divergence(alpha, 0.1), theirs - 0.2 * sampler.dirichlet_kl(alpha), 1e-4)
    assert inlay.penalty(twins.ours.eval()) is None
    assert twins.theirs.eval().base_model._get_monteclora_loss() == 0


def test_the_divergence_of_the_mixture_is_one():
    """PEFT adds where the formula subtracts, so that its value is below 0 or far off, and infinite for many samples."""
    alpha = torch.tensor([0.4, 1.3, 2.0, 0.2], dtype=torch.float64)
    prior = torch.full_like(alpha, 0.1)
    expected = kl_divergence(Dirichlet(alpha), Dirichlet(prior))
    close(dirichlet_divergence(alpha, 0.1), expected)
    assert abs(float(dirichlet_divergence(prior, 0.1))) < 1e-9
    theirs = MontecloraSampler(6, 2, 4, dirichlet_prior=0.1, buffer_size=1, dtype=torch.float64)
    assert abs(float(theirs.dirichlet_kl(alpha)) - float(expected)) > 1
    many = MontecloraSampler(6, 2, 40, dirichlet_prior=0.1, buffer_size=1, dtype=torch.float32)
    wide = torch.full((40,), 1.6)
    assert not math.isfinite(float(many.dirichlet_kl(wide)))
    assert math.isfinite(float(dirichlet_divergence(wide, 0.1)))


def test_the_loss_of_kasa_is_pefts():
    options = peft.KasaConfig(beta=0.3, gamma=0.2)
    twins = Twins(LINEAR, lora(kasa_config=options, **T)()).equalise()
    trained(twins)
    expected = twins.theirs.base_model._get_kasa_loss()
    found = inlay.penalty(twins.ours)
    close(found, expected)
    found.backward()
    expected.backward()
    theirs = by_our_names(twins.theirs)
    for name, parameter in twins.ours.named_parameters():
        if parameter.grad is not None:
            close(parameter.grad, theirs[name].grad)


def test_qalora_is_what_peft_runs_over_gptq():
    """PEFT has the variant for GPTQ's layers alone, and its functions can be called over any; it cannot merge it."""
    base = LINEAR.model()
    mine = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, lora(qalora_group_size=3, **T)()).base_model.layer
    QALoraLinearVariant.init(theirs, "default", peft.LoraConfig(qalora_group_size=3))
    with torch.no_grad():
        theirs.lora_B["default"].weight.normal_()
    inject(plan(mine, inlay.LoraConfig(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=3, **T)))
    mine.layer.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora" in k}, strict=False)
    x = LINEAR.input()
    expected = QALoraLinearVariant.forward(theirs, "default", x, theirs.base_layer(x))
    close(mine(x), expected)
    assert mine.layer.lora_A["default"].weight.shape == (4, 4)
    mine.layer.merge()
    close(mine(x), expected)
    with pytest.raises(NotImplementedError):
        QALoraLinearVariant.merge_unsafe(theirs, "default", theirs.base_layer.weight)


def test_peft_leaves_qalora_out_of_ordinary_layers():
    theirs = peft.get_peft_model(LINEAR.model(), lora(use_qalora=True, qalora_group_size=3, **T)())
    mine = LINEAR.model()
    inject(plan(mine, inlay.LoraConfig(r=4, use_qalora=True, qalora_group_size=3, **T)))
    assert theirs.base_model.layer.lora_A["default"].weight.shape == (4, 12)
    assert mine.layer.lora_A["default"].weight.shape == (4, 4)


DRAWN = {
    "kasa": {"kasa_config": peft.KasaConfig()},
    "bdlora_a": {"use_bdlora": blocks(a=["layer"])},
    "bdlora_b": {"use_bdlora": blocks(b=["layer"])},
    "velora": {"velora_config": peft.VeloraConfig(num_groups=5, init_type="random")},
    "monteclora": {"monteclora_config": peft.MontecloraConfig(num_samples=5, buffer_size=1)},
}


@pytest.mark.parametrize("name", DRAWN)
def test_policy_peft_draws_from_the_same_stream(name):
    """The buffer that PEFT's MonteCLoRA fills afterwards is not drawn here, so a second layer has other values."""
    config = peft.LoraConfig(r=4, **DRAWN[name], **T)
    base = Layer(lambda: nn.Linear(40, 30), (2, 40)).model()
    ours = copy.deepcopy(base)
    torch.manual_seed(4)
    theirs = peft.get_peft_model(base, config).base_model.model
    torch.manual_seed(4)
    inject(plan(ours, ours_of(config), policy=PEFT))
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if "base_layer" in key:
            close(found[key], tensor)
        else:
            assert torch.equal(found[key], tensor), key


PARTS = {
    "use_dora": True,
    "use_bdlora": blocks(b=["layer"]),
    "kasa_config": peft.KasaConfig(),
    "velora_config": peft.VeloraConfig(num_groups=4),
    "monteclora_config": peft.MontecloraConfig(num_samples=3, buffer_size=1),
}
PAIRS = [(a, b) for i, a in enumerate(PARTS) for b in list(PARTS)[i + 1 :]]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_peft_refuses_what_is_combined_here(pair):
    fields = {name: PARTS[name] for name in pair}
    config = peft.LoraConfig(r=4, lora_alpha=6, **fields, **T)
    with pytest.raises(ValueError, match="variant"):
        peft.get_peft_model(LINEAR.model(), config)
    ours = LINEAR.model()
    weight = ours.layer.weight.detach().double()
    inject(plan(ours, ours_of(config)))
    with torch.no_grad():
        for parameter in ours.layer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    held = {key.removeprefix("layer.").replace(".default", ""): v.double() for key, v in ours.state_dict().items()}
    if "kasa_config" in pair:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        weight = U[:, :4] * S[:4] @ Vh[:4]
    B = held["lora_B.weight"]
    if "use_bdlora" in pair:
        B = torch.block_diag(*B.chunk(2))
    update = 1.5 * (B * held.get("lora_diag", torch.ones(4))) @ held["lora_A.weight"]
    weight = weight + update
    if "use_dora" in pair:
        weight = held["lora_magnitude_vector.weight"].unsqueeze(1) * weight / weight.norm(dim=1, keepdim=True)
    x = LINEAR.input()
    close(ours(x), (x.double() @ weight.T + held["base_layer.bias"]).float(), 1e-4)


def test_a_start_from_the_weight_is_not_scaled_by_kasas_random_values():
    """In PEFT the update that PiSSA took out of the weight comes back with random singular values."""
    fields = {"init_lora_weights": "pissa", **T}
    base = LINEAR.model()
    x = LINEAR.input()
    expected = {}
    for name, model in (("ours", copy.deepcopy(base)), ("theirs", copy.deepcopy(base))):
        if name == "ours":
            inject(plan(model, inlay.LoraConfig(r=2, kasa_config={}, **fields)))
        else:
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, kasa_config=peft.KasaConfig(), **fields))
        expected[name] = model(x)
    U, S, Vh = torch.linalg.svd(base.layer.weight, full_matrices=False)
    shortened = torch.nn.functional.linear(x, U[:, :6] * S[:6] @ Vh[:6], base.layer.bias)
    close(expected["ours"], shortened, 1e-4)
    assert not torch.allclose(expected["theirs"], shortened, atol=0.05)


def test_kasa_gives_the_weight_back():
    base = LINEAR.model()
    weight = base.layer.weight.detach().clone()
    ours = inlay.get_peft_model(copy.deepcopy(base), inlay.LoraConfig(r=2, kasa_config={}, **T))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, kasa_config=peft.KasaConfig(), **T))
    assert torch.equal(ours.unload().layer.weight, weight)
    assert not torch.allclose(theirs.unload().layer.weight, weight)


def test_kasa_becomes_a_lora_over_the_weight_as_it_was():
    base = LINEAR.model()
    config = {"r": 2, "lora_alpha": 3, **T}
    ours = inlay.get_peft_model(copy.deepcopy(base), inlay.LoraConfig(kasa_config={}, **config))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(kasa_config=peft.KasaConfig(), **config))
    with torch.no_grad():
        ours.base_model.layer.lora_B["default"].weight.normal_()
    x = LINEAR.input()
    expected = ours(x)
    made, tensors = inlay.convert_to_lora(ours, rank=4)
    over = inlay.get_peft_model(copy.deepcopy(base), made)
    inlay.set_peft_model_state_dict(over, tensors)
    close(over(x), expected, 1e-4)
    with pytest.raises(TypeError, match="conversion"):
        peft.convert_to_lora(theirs, rank=4)


def test_what_kasa_is_beside():
    base = LINEAR.model()
    first, second = {"r": 2, **T}, {"r": 2, "kasa_config": {}, **T}
    model = inlay.get_peft_model(copy.deepcopy(base), inlay.LoraConfig(**first))
    with pytest.warns(inlay.InlayWarning, match="changes base weights"):
        model.add_adapter("other", inlay.LoraConfig(**second))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**first))
    with pytest.raises(ValueError, match="KaSA"):
        theirs.add_adapter("other", peft.LoraConfig(r=2, kasa_config=peft.KasaConfig(), **T))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_qalora": True, "init_lora_weights": "pissa"}, "use_qalora.*init_lora_weights='pissa'"),
        ({"use_bdlora": {}, "init_lora_weights": "olora"}, "use_bdlora.*init_lora_weights='olora'"),
        ({"use_bdlora": {}, "init_lora_weights": "orthogonal"}, "use_bdlora.*init_lora_weights='orthogonal'"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, "target_modules_bd_a"),
        ({"velora_config": {"num_groups": 0}}, "num_groups"),
        ({"velora_config": {"scale": 0.0}}, "scale"),
        ({"velora_config": {"init_type": "mean"}}, "init_type"),
        ({"kasa_config": {"beta": -1.0}}, "beta"),
        ({"monteclora_config": {"num_samples": 0}}, "num_samples"),
    ],
)
def test_configs_refuse_by_field(fields, named):
    with pytest.raises(ConfigError, match=named):
        inlay.LoraConfig(**fields)
