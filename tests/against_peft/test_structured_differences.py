"""Where PEFT's LoKr, C3A, MiSS, WaveFT or SHiRA is wrong or refuses: what PEFT does, and what Inlay does instead."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet
from structured_methods import c3a, gralora, lokr, miss, shira, waveft
from torch import Tensor, nn
from twins import LAYERS, Layer, Twins, close, ours_of

import inlay
from inlay.core.active import set_active
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.wavelets import filters, wavelets
from inlay.errors import ConfigError, UnsupportedError
from inlay.methods.miss import MissConfig
from inlay.methods.shira import ShiraConfig
from inlay.methods.waveft import WaveFTConfig

T = {"target_modules": ["layer"]}


def test_two_active_c3a_adapters():
    """PEFT feeds the second one the output of the first, which fails unless the layer is square."""
    square = Layer(lambda: nn.Linear(8, 8), (3, 8))
    for layer in (square, LAYERS["linear"]):
        twins = Twins(layer, c3a())
        twins.theirs.add_adapter("more", c3a())
        inject(plan(twins.ours, ours_of(c3a()), "more"))
        twins.equalise()
        mine = dict(twins.ours.named_parameters())
        with torch.no_grad():
            for name, parameter in twins.their_parameters().items():
                mine[name].copy_(parameter)
        twins.theirs.base_model.set_adapter(["default", "more"])
        set_active(twins.state, ["default", "more"])
        merged, _ = twins.merged()
        close(twins.ours(twins.x), merged(twins.x))  # PEFT's merge is right
        if layer is square:
            assert not torch.allclose(twins.theirs(twins.x), merged(twins.x), atol=1e-3)
        else:
            with pytest.raises(RuntimeError):
                twins.theirs(twins.x)


def test_gradient_of_c3as_input():
    """PEFT's backward turns the kernel the wrong way, so that what is below an adapted layer trains wrongly."""
    twins = Twins(LAYERS["linear"], c3a()).equalise()
    _, theirs = twins.run(twins.theirs)
    _, ours = twins.run(twins.ours)
    _, right = twins.run(twins.merged()[0])
    close(ours["x"], right["x"])
    assert not torch.allclose(theirs["x"], right["x"], rtol=1e-2, atol=1e-2)


def test_lokrs_tucker_form_of_a_vector_kernel():
    twins = Twins(LAYERS["conv1d"], lokr(use_effective_conv2d=True))
    with pytest.raises(RuntimeError, match="view size"):
        twins.theirs(twins.x)
    model = copy.deepcopy(twins.base)
    state = inject(plan(model, ours_of(lokr(use_effective_conv2d=True, init_weights=False))))
    y = model(twins.x)
    merge(state)
    close(model(twins.x), y)


def test_lokrs_rank_dropout_may_drop_every_row():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 2))
    config = peft.LoKrConfig(r=2, rank_dropout=0.9, rank_dropout_scale=True, init_weights=False, target_modules=["0"])
    model = copy.deepcopy(base)
    inject(plan(model, ours_of(config)))
    theirs = peft.get_peft_model(base, config)
    x = torch.randn(3, 4)
    assert any(bool(theirs(x).isnan().any()) for _ in range(20))
    outputs = [model(x) for _ in range(200)]
    assert not any(bool(y.isnan().any()) for y in outputs)
    assert any(torch.equal(y, model[0].base_layer(x)) for y in outputs)


@pytest.mark.parametrize("rescale", [False, True])
def test_lokrs_rank_dropout_is_that_of_peft(rescale):
    """Seen over many draws: rows are there or not, and grow in turn only if asked to."""
    twins = Twins(LAYERS["linear"], lokr(rank_dropout=0.4, rank_dropout_scale=rescale, init_weights=False))
    for model in (twins.theirs, twins.ours):
        whole = model.eval()(twins.x).detach() - twins.base(twins.x)
        model.train()
        torch.manual_seed(0)
        changes = torch.stack([model(twins.x).detach() - twins.base(twins.x) for _ in range(300)])
        ratio = (changes / whole)[:, 0, 0]  # (draws, out)
        steps = torch.tensor([0.0, *(8 / kept if rescale else 1.0 for kept in range(1, 9))])
        assert float((ratio.unsqueeze(-1) - steps).abs().amin(-1).max()) < 0.02
        assert float((ratio != 0).float().mean()) == pytest.approx(0.6, abs=0.06)


def test_dropout_of_bat_is_not_forgotten():
    """PEFT takes miss_dropout beside 'bat' and drops nothing."""
    twins = Twins(LAYERS["linear"], miss(init_weights="bat", miss_dropout=0.5)).equalise()
    whole = twins.theirs(twins.x)
    close(twins.ours.eval()(twins.x), whole)
    assert torch.equal(twins.theirs.train()(twins.x), whole)
    twins.ours.train()
    seen = torch.stack([twins.ours(twins.x).detach() for _ in range(2000)])
    assert not torch.allclose(seen[0], whole, atol=1e-3)
    spread = seen.std(0) / len(seen) ** 0.5
    assert bool(((seen.mean(0) - whole).abs() < 6 * spread + 1e-5).all())


def test_wavelets_meet_their_conditions():
    """Orthogonal to all even shifts, with as many vanishing moments as the name says (a coiflet's K stands for 2K)."""
    for name in wavelets():
        low, high = (torch.tensor(values, dtype=torch.float64) for values in filters(name))
        length = low.numel()
        for shift in range(length // 2):
            expected = 1.0 if shift == 0 else 0.0
            for one, other, value in ((low, low, expected), (high, high, expected), (low, high, 0.0), (high, low, 0.0)):
                found = float((one[: length - 2 * shift] * other[2 * shift :]).sum())
                assert found == pytest.approx(value, abs=1e-12), (name, shift)
        order = 1 if name == "haar" else int("".join(filter(str.isdigit, name))) * (2 if name.startswith("coif") else 1)
        place = torch.linspace(-1, 1, length, dtype=torch.float64)
        for moment in range(order):
            assert float((high * place**moment).sum()) == pytest.approx(0, abs=1e-7), (name, moment)
        if name.startswith("coif"):
            centre = torch.arange(length, dtype=torch.float64) - (low * torch.arange(length)).sum() / low.sum()
            for moment in range(1, order):
                assert float((low * (centre / length) ** moment).sum()) == pytest.approx(0, abs=1e-10), (name, moment)


def test_two_of_pefts_coiflets_are_none():
    """Its table has numbers that are not orthogonal for coif4, and 48 of them for coif5, which cannot run."""
    for name in wavelets():
        theirs = torch.tensor(Wavelet(name).rec_lo, dtype=torch.float64)
        ours = torch.tensor(filters(name)[0], dtype=torch.float64)
        if name in ("coif4", "coif5"):
            assert abs(float(theirs.square().sum()) - 1) > 1e-3
        else:
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-11)
            high = torch.tensor(Wavelet(name).rec_hi, dtype=torch.float64)
            torch.testing.assert_close(high, torch.tensor(filters(name)[1], dtype=torch.float64), rtol=0, atol=1e-11)
    with pytest.raises(RuntimeError):
        Twins(LAYERS["linear"], waveft(wavelet_family="coif5")).theirs(LAYERS["linear"].input())
    for name in ("coif4", "coif5"):
        model, x = LAYERS["linear"].model(), LAYERS["linear"].input()
        state = inject(plan(model, WaveFTConfig(n_frequency=20, wavelet_family=name, init_weights=False, **T)))
        y = model(x)
        merge(state)
        close(model(x), y)


def test_a_wavelet_that_peft_takes_and_cannot_run():
    twins = peft.get_peft_model(LAYERS["linear"].model(), waveft(wavelet_family="db20"))
    with pytest.raises(ValueError, match="Unknown wavelet name"):
        twins(LAYERS["linear"].input())
    with pytest.raises(ConfigError, match=r"wavelet_family: expected an orthogonal wavelet .*db1 to db10.*'db20'"):
        WaveFTConfig(wavelet_family="db20")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(6, 4), nn.Linear(4, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(torch.tanh(self.small(x)))


def test_coefficients_are_shared_out_by_size_as_in_peft():
    fields = {"n_frequency": 9, "proportional_parameters": True, "target_modules": ["small", "large"]}
    torch.manual_seed(0)
    base = Two()
    mine = inlay.get_peft_model(copy.deepcopy(base), inlay.WaveFTConfig(**fields))
    theirs = peft.get_peft_model(base, peft.WaveFTConfig(**fields))
    expected = {name: p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in mine.named_parameters() if p.requires_grad} == expected
    assert sorted(shape[0] for shape in expected.values()) == [3, 15]
    values = peft.get_peft_model_state_dict(theirs)
    for value in values.values():
        value.normal_()
    inlay.set_peft_model_state_dict(mine, values)
    close(mine(torch.ones(2, 6)), theirs(torch.ones(2, 6)))


def corner(layer: nn.Module, r: int, **options: object) -> Tensor:
    """A mask of the first entries, row by row."""
    mask = torch.zeros_like(layer.weight)
    mask.view(-1)[: r * sum(layer.weight.shape)] = 1
    return mask


@pytest.mark.parametrize("mask_type", ["random", "corner"])
def test_shira_with_a_mask_of_ones_own(mask_type, tmp_path):
    base = LAYERS["linear"].model()
    config = peft.ShiraConfig(r=2, mask_type=mask_type, **T)
    mine = ShiraConfig(r=2, mask_type=mask_type, **T)
    config.mask_fn = mine.mask_fn = corner
    ours = inlay.get_peft_model(copy.deepcopy(base), mine)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    x = LAYERS["linear"].input()
    with torch.no_grad():
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                if "shira_weight" in name:
                    p.copy_(torch.linspace(-1, 1, p.numel()))
    close(ours(x), theirs(x))
    found = ours.base_model.model.layer.shira_indices["default"]
    assert torch.equal(found, theirs.base_model.model.layer.shira_indices["default"])
    ours.save_pretrained(tmp_path)
    close(inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), ours(x))  # which needs no function
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


def test_masks_that_are_none():
    def wrong_shape(layer: nn.Module, r: int) -> Tensor:
        return corner(layer, r).t()

    def too_many(layer: nn.Module, r: int) -> Tensor:
        return corner(layer, r + 1)

    def not_binary(layer: nn.Module, r: int) -> Tensor:
        return corner(layer, r) + 0.5

    for function, message in (
        (None, "mask_type: expected 'random', or a function in mask_fn; found 'own' and none"),
        (wrong_shape, r"expected a mask of shape \(8, 12\) for 'layer', found \(12, 8\)"),
        (too_many, "20 ones, and zeros; found 40 ones and 56 zeros"),
        (not_binary, "20 ones, and zeros; found 0 ones and 0 zeros"),
    ):
        config = ShiraConfig(r=1, mask_type="own", **T)
        config.mask_fn = function
        model = LAYERS["linear"].model()
        with pytest.raises(ConfigError, match=message):
            inject(plan(model, config))
        assert type(model.layer) is nn.Linear


def test_shira_on_top_of_another_adapter():
    """PEFT refuses it; the update is added like any other."""
    model, x = LAYERS["linear"].model(), LAYERS["linear"].input()
    mixed = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **T), mixed=True)
    with pytest.raises(ValueError, match="nested base layers"):
        mixed.add_adapter("more", shira())
    base = copy.deepcopy(model)(x)
    inject(plan(model, inlay.LoraConfig(r=2, init_lora_weights=False, **T), "one"))
    state = inject(plan(model, ours_of(shira(init_weights=False)), "two"))
    changes = []
    for names in (["one"], ["two"], ["one", "two"]):
        set_active(state, names)
        changes.append(model(x) - base)
    close(changes[2], changes[0] + changes[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (c3a(block_size=5), "block_size=5 does not divide its 12 inputs; a divisor of 4 divides both sides"),
        (gralora(r=6, gralora_k=3), "gralora_k=3 does not divide its 8 outputs"),
        (miss(r=13), "r=13 is more than the 12 columns of its weight"),
        (miss(r=6, init_weights="bat"), "r=6 does not divide its 8 outputs"),
        (miss(mini_r=3, init_weights="mini"), "mini_r=3 does not divide its 8 rows"),
        (shira(r=5), "r=5 asks for 100 of the 96 entries of a weight of 8 x 12"),
        (waveft(n_frequency=97), "a weight of 8 x 12 has 96 entries, found n_frequency=97"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_both(config, message):
    with pytest.raises(UnsupportedError, match=message):
        plan(LAYERS["linear"].model(), ours_of(config))
    with pytest.raises((ValueError, RuntimeError)):
        peft.get_peft_model(LAYERS["linear"].model(), config)


def test_configs_refuse_impossible_values():
    with pytest.raises(ConfigError, match="r: expected a multiple of gralora_k=4, found 6"):
        inlay.GraloraConfig(r=6, gralora_k=4)
    with pytest.raises(ConfigError, match="decompose_factor: expected -1 or a positive number, found 0"):
        inlay.LoKrConfig(decompose_factor=0)
    with pytest.raises(ConfigError, match="mini_r: expected a number greater than 0, found 0"):
        MissConfig(mini_r=0)


def test_norms_of_delora_are_those_of_the_base():
    """Whatever is below it on the layer, in a merge as in a forward pass."""
    model, x = LAYERS["linear"].model(), LAYERS["linear"].input()
    norms = model.layer.weight.norm(dim=0)
    inject(plan(model, inlay.LoraConfig(r=2, init_lora_weights=False, **T), "one"))
    state = inject(plan(model, inlay.DeloraConfig(r=2, init_weights=False, **T), "two"))
    assert torch.equal(model.layer.delora_w_norm["two"], norms)
    set_active(state, ["one", "two"])
    y = model(x)
    merge(state, ["one"])
    close(model(x), y)
    merge(state, ["two"])
    close(model(x), y)
