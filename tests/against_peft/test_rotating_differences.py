"""Methods that rotate, rescale or read the weight, where PEFT is wrong, silent or refuses; and their random starts."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from rotating_methods import ROWS, T, boft, deft, glora, hira, hra, psoft
from torch import Tensor, nn
from transformers.activations import ACT2FN
from twins import LAYERS, PREFIX, Layer, Twins, close, ours_of

from inlay.core.active import set_active
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.errors import ConfigError, InlayWarning, MergeError, UnsupportedError
from inlay.methods.beft import BeftConfig
from inlay.methods.boft import BOFTConfig
from inlay.methods.deft import DeftConfig
from inlay.methods.hra import HRAConfig
from inlay.methods.peanut import ACTIVATIONS, PeanutConfig
from inlay.methods.psoft import PsoftConfig


@pytest.mark.parametrize(("make", "layer"), [pytest.param(make, layers[0], id=name) for name, make, layers in ROWS])
def test_policy_peft_draws_the_start_from_the_same_stream(make, layer):
    config = make()
    base = LAYERS[layer].model()
    ours = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(4)
        theirs = peft.get_peft_model(base, config)
        torch.manual_seed(4)
        inject(plan(ours, ours_of(config), policy=PEFT))
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine[name.removeprefix(PREFIX)], parameter), name


# -- BOFT -------------------------------------------------------------------------------------------------------------


class BlockDiagonal:
    """What PEFT's CUDA extension computes."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize(("factors", "block"), [(2, 4), (3, 2), (3, 4)])
def test_butterflies_are_those_of_peft_with_its_extension(factors, block, monkeypatch):
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    wide = Layer(lambda: nn.Linear(16, 6), (3, 16))
    twins = Twins(wide, boft(boft_block_size=block, boft_n_butterfly_factor=factors)).equalise()
    expected, gradients = twins.run(twins.theirs)
    found, mine = twins.run(twins.ours)
    close(found, expected)
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(mine[name], gradient)
    theirs, ours = twins.merged()
    close(ours.layer.weight, theirs.layer.weight)


def test_boft_has_the_factors_that_it_is_asked_for():
    """Without a compiled extension PEFT takes one factor, whatever the configuration says, and writes the latter."""
    config = boft(boft_block_size=2, boft_n_butterfly_factor=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(LAYERS["linear"].model(), config)
    assert theirs.base_model.model.layer.boft_R["default"].shape == (1, 6, 2, 2)
    assert theirs.peft_config["default"].boft_n_butterfly_factor == 2
    ours = LAYERS["linear"].model()
    inject(plan(ours, ours_of(config)))
    assert ours.layer.boft_R["default"].shape == (2, 6, 2, 2)


def test_boft_dropout_leaves_a_share_of_the_blocks_of_one_factor():
    model = nn.Sequential(nn.Linear(16, 3))
    state = inject(plan(model, BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.3,
                                          init_weights=False, target_modules=["0"])))  # fmt: skip
    entry = model[0].entries["default"][0]
    p = model[0].params(entry)
    whole = entry.method.turns(p)
    seen = set()
    for _ in range(40):
        turns = entry.method.varied(entry.site, p).turns
        left = (turns == 0).all(-1).all(-1)
        assert torch.equal(turns[~left], whole[~left])
        assert sorted(left.sum(1).tolist()) == [0, 2]  # int(0.3 * 8) of the 8 blocks of a factor
        seen.add(tuple(left.flatten().tolist()))
    assert len(seen) > 20
    model.eval()
    assert torch.equal(entry.method.varied(entry.site, model[0].params(entry)).turns, whole)
    assert state.active == ("default",)


# -- convolutions -----------------------------------------------------------------------------------------------------

ODD_CONVS = {
    "dilated": lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2),
    "uneven_stride": lambda: nn.Conv2d(4, 8, 3, stride=(1, 2)),
    "uneven_kernel": lambda: nn.Conv2d(4, 8, (3, 2)),
    "reflecting": lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(4, 8, 3, padding="same"),
}


@pytest.mark.parametrize("make", [lambda: boft(boft_block_size=4), lambda: hra()], ids=["boft", "hra"])
@pytest.mark.parametrize("build", ODD_CONVS.values(), ids=ODD_CONVS)
def test_boft_and_hra_on_any_convolution(make, build):
    """PEFT's forward knows a square kernel, one stride and one padding."""
    layer = Layer(build, (2, 4, 7, 7))
    base, x = layer.model(), layer.input()
    y = base(x)
    try:
        theirs = peft.get_peft_model(copy.deepcopy(base), make())(x)
        assert theirs.shape != y.shape or not torch.allclose(theirs, y, atol=0.1)
    except RuntimeError:
        pass
    state = inject(plan(base, ours_of(make())))
    close(base(x), y)  # the identity at first
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    y = base(x)
    merge(state)
    eject(base, state, restore=False)
    close(base(x), y)


# -- HRA --------------------------------------------------------------------------------------------------------------


def test_hras_joint_reflection_starts_from_independent_vectors():
    """PEFT orthogonalises pairs of equal vectors, so half of them are rounding errors, and R is no reflection."""
    twins = Twins(LAYERS["linear"], hra(apply_GS=True))
    R = twins.theirs.base_model.model.layer.get_delta_weight("default")
    assert float((R @ R.T - torch.eye(12)).abs().max()) > 0.1
    with pytest.warns(InlayWarning, match="apply_GS takes each direction once; the start is a random change"):
        state = inject(plan(model := LAYERS["linear"].model(), HRAConfig(r=4, apply_GS=True, **T)))
    R = model.layer.get_delta_weight("default")
    close(R @ R.T, torch.eye(12))
    assert not state.records["default"].method.identity
    with pytest.raises(UnsupportedError, match="no 13 vectors of 12 features are orthogonal"):
        plan(LAYERS["linear"].model(), HRAConfig(r=13, apply_GS=True, **T))


# -- HiRA, DEFT, GLoRA, PSOFT, BEFT, PEANuT ---------------------------------------------------------------------------


def test_hiras_rank_pattern_is_read():
    """PEFT reads it for the second adapter of a layer."""
    twins = Twins(LAYERS["linear"], hira(r=4, rank_pattern={"layer": 2}))
    theirs = twins.theirs.base_model.model.layer
    assert theirs.hira_A["default"].shape == (4, 12)
    twins.theirs.add_adapter("second", hira(r=4, rank_pattern={"layer": 2}))
    assert theirs.hira_A["second"].shape == (2, 12)
    assert twins.ours.layer.hira_A["default"].shape == (2, 12)


def test_deft_twice_on_a_conv1d():
    """The second adapter's fan_in_fan_out=False turns the layer of both over in PEFT, which then fails."""
    twins = Twins(LAYERS["conv1d_hf"], deft())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twins.theirs.add_adapter("second", deft())
    inject(plan(twins.ours, ours_of(deft(decomposition_method="qr")), "second"))
    expected = twins.base(twins.x)
    for names in (["second"], ["default", "second"]):
        set_active(twins.state, names)
        close(twins.ours(twins.x), expected)


def test_glora_without_a_part_has_no_matrix_of_zeros_to_multiply():
    """PEFT's checkpoint of such a layer holds the zeros, and so does ours."""
    twins = Twins(LAYERS["linear"], glora(config_A_B="none"))
    mine = {name: tensor for name, tensor in twins.ours.state_dict().items() if "zeros" in name}
    theirs = {n.removeprefix(PREFIX): t for n, t in twins.theirs.state_dict().items() if "zeros" in n}
    assert mine.keys() == theirs.keys() == {f"layer.glora_{part}.default.zeros" for part in "AB"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_psoft_in_double_precision_and_the_identity_as_a_series():
    base = LAYERS["linear"].model().double()
    with pytest.raises(TypeError, match="requires float32"):
        peft.get_peft_model(copy.deepcopy(base), psoft())
    inject(plan(base, ours_of(psoft())))
    x = LAYERS["linear"].input().double()
    W = base.layer.base_layer.weight
    A, B = base.layer._psoft_A_cache["default"], base.layer._psoft_B_cache["default"]
    U, S, Vh = torch.linalg.svd(W)
    assert float((B @ A * 1.5 - U[:, :4] * S[:4] @ Vh[:4]).abs().max()) < 1e-12
    assert torch.equal(base(x), base.layer.base_layer(x))
    with pytest.raises(ConfigError, match="num_cayley_neumann_terms: expected a number greater than 1, found 1"):
        PsoftConfig(use_cayley_neumann=True, num_cayley_neumann_terms=1)
    one = peft.get_peft_model(LAYERS["linear"].model(), psoft(use_cayley_neumann=True, num_cayley_neumann_terms=1))
    one(LAYERS["linear"].input()).sum().backward()
    assert one.base_model.model.layer.psoft_R["default"].weight.grad is None


def test_beft_without_a_bias_runs_and_is_not_merged():
    twins = Twins(LAYERS["linear_nobias"], peft.BeftConfig(**T)).equalise()
    close(twins.ours(twins.x), twins.theirs(twins.x))
    with pytest.raises(ValueError, match="has no bias"):
        twins.theirs.merge_adapter()
    with pytest.raises(MergeError, match="has no bias, so an update with a bias cannot be written into it"):
        merge(twins.state)
    with pytest.raises(UnsupportedError, match="has no bias of its own"):
        plan(nn.Sequential(nn.RMSNorm(4)), BeftConfig(target_modules=["0"]))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_peanuts_activations_are_those_of_transformers(name):
    x = torch.linspace(-12, 12, 97)
    close(ACTIVATIONS[name](x), ACT2FN[name](x), 2e-3 if name in ("gelu_fast", "gelu_accurate") else 1e-6)


def test_peanuts_activations_have_no_parameters_of_their_own():
    """An xIELU's would never train: PEFT makes a new one in each forward."""
    assert ACT2FN.keys() - ACTIVATIONS.keys() == {"xielu"}
    with pytest.raises(ConfigError, match="act_fn: expected 'gelu'"):
        PeanutConfig(act_fn="xielu")


def test_deft_with_fewer_outputs_than_directions_says_so():
    with pytest.warns(InlayWarning, match="8 outputs, so 8 directions are taken instead of r=9"):
        plan(LAYERS["linear"].model(), DeftConfig(r=9, **T))


@pytest.mark.parametrize("name", ["hira", "deft", "deft_qr", "psoft", "peanut_deep", "hra"])
def test_the_matrix_of_an_update_is_that_of_peft(name):
    make, layers = next((make, layers) for row, make, layers in ROWS if row == name)
    for layer in layers:
        twins = Twins(LAYERS[layer], make()).equalise()
        theirs = twins.theirs.base_model.model.layer
        if hasattr(theirs, "get_delta_weight"):
            close(twins.ours.layer.get_delta_weight("default"), theirs.get_delta_weight("default"))
