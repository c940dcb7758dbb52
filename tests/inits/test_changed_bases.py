"""Starts that change base weights: what is kept, given back, refused and said; kinds that PEFT leaves out."""

from __future__ import annotations

import copy
import warnings
from importlib import import_module

import pytest
import torch
from torch import nn

import inlay
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.errors import ConfigError, InlayWarning, MergeError, StateError, UnsupportedError
from inlay.inits.calibration import Spot, rows, spots
from inlay.inits.corda import preprocess_corda
from inlay.inits.decompose import leading, projected
from inlay.inits.loftq import nf4_levels, rounded
from inlay.inits.lora_ga import preprocess_loraga


class Mixed(nn.Module):
    """A table, a grouped convolution and an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.table(x).mT).mT
        return self.attention(h, h, h)[0]


TARGETS = ["table", "conv", "attention"]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Mixed()


@pytest.fixture
def x():
    return torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(2))


def config(start="pissa", **more):
    return inlay.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": start} | more)


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_base_comes_back_bitwise_and_its_bytes_stand_in_the_plan(model, x):
    before, expected = tensors(model), model(x)
    made = plan(model, config())
    wanted = [model.table.weight, model.conv.weight, model.attention.in_proj_weight, model.attention.out_proj.weight]
    assert made.base_bytes == sum(4 * weight.numel() for weight in wanted)
    assert "base bytes kept" in str(made)
    state = inject(made)
    assert set(state.records["default"].rebased) == {
        "table.weight",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert not torch.equal(model.conv.base_layer.weight, before["conv.weight"])
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    eject(model, state)
    assert_equal(tensors(model), before)


def test_merging_keeps_what_it_is(model, x):
    expected = model(x)
    wrapper = inlay.get_peft_model(model, config(target_modules=["table", "attention"]))
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, atol=1e-5, rtol=1e-4)


def test_deleting_gives_each_adapter_s_share_back(model):
    before = tensors(model)
    wrapper = inlay.get_peft_model(model, config())
    with pytest.warns(InlayWarning, match="'second' changes base weights.*'default'.*path_initial_model"):
        wrapper.add_adapter("second", config(r=2))
    wrapper.delete_adapter("default")
    left = wrapper.base_model.model.table.base_layer.weight
    update = before["table.weight"] - left
    assert torch.linalg.matrix_rank(update, atol=1e-4) == 2
    wrapper.delete_adapter("second")
    assert_equal(tensors(wrapper.base_model.model), before)


def test_a_failed_injection_leaves_everything(model, x):
    before = tensors(model)
    preprocess_loraga(
        model,
        config("lora_ga", r=2, lora_ga_config=inlay.LoraGAConfig()),
        lambda: model(x).square().sum().backward(),
    )
    noted = model.conv._peft_loraga_grad

    def fail(state):
        raise RuntimeError("no")

    made = plan(model, config("lora_ga", r=2, lora_ga_config=inlay.LoraGAConfig()))
    with pytest.raises(RuntimeError, match="no"):
        inject(made, then=fail)
    assert_equal(tensors(model), before)
    assert model.conv._peft_loraga_grad is noted


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_3", "olora", "mica", "corda", "lora_ga"])
def test_every_kind_and_dora_start_where_the_model_was(model, x, start, dora):
    targets = ["table", "attention"] if dora else TARGETS
    options = {"corda_config": inlay.CordaConfig()} if start == "corda" else {}
    if start == "lora_ga":
        options = {"lora_ga_config": inlay.LoraGAConfig()}
    if start == "corda":  # its output projection is read and never called
        targets = ["table"] if dora else ["table", "conv"]
    made = config(start, r=2, use_rslora=True, use_dora=dora, target_modules=targets, **options)
    expected = model(x)
    if start == "corda":
        preprocess_corda(model, made, lambda: model(x))
    if start == "lora_ga":
        preprocess_loraga(model, made, lambda: model(x).square().sum().backward())
    state = inject(plan(model, made))
    assert bool(state.records["default"].rebased) == (start != "mica")
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=1e-3)
    A, B = model.table.lora_embedding_A["default"], model.table.lora_embedding_B["default"]
    assert bool((B @ A).any()) == (start != "mica")


def test_groups_are_decomposed_one_by_one(model):
    weight = model.conv.weight.detach().clone()
    inject(plan(model, config(target_modules=["conv"])))
    left = model.conv.base_layer.weight
    for group in range(2):
        rows_ = slice(6 * group, 6 * group + 6)
        U, S, Vh = leading(weight[rows_].flatten(1), 2)
        torch.testing.assert_close((weight - left)[rows_].flatten(1), U * S @ Vh, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding_mode": "reflect", "padding": 2}]
)
def test_what_is_observed_at_a_convolution_is_what_its_weight_multiplies(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2, **options)
    model = nn.Sequential(layer)
    spot = spots(model, inlay.LoraConfig(r=2, target_modules=["0"]))[0]
    image = torch.randn(2, 4, 7, 7)
    found = rows(spot, (image,), {})
    weight = layer.weight.flatten(1).view(2, 3, -1)
    y = (found @ weight.mT).movedim(0, 1).flatten(1) + layer.bias
    torch.testing.assert_close(y, layer(image).movedim(1, -1).flatten(0, 2), atol=1e-5, rtol=1e-4)


def test_experts_are_decomposed_one_by_one():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 10, 6))

        def forward(self, x):
            return torch.einsum("bi,eoi->beo", x, self.up)

    torch.manual_seed(0)
    model = nn.Sequential(Bank())
    x = torch.randn(4, 6)
    expected, before = model(x), model[0].up.detach().clone()
    state = inject(plan(model, config(r=2, target_modules=[], target_parameters=["0.up"])))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    left = model[0].base_layer.up if hasattr(model[0], "base_layer") else model[0].up
    assert (torch.linalg.matrix_rank(before - left, atol=1e-4) == 2).all()
    eject(model, state)
    assert torch.equal(model[0].up, before)


def test_projection_is_as_good_as_the_whole_decomposition():
    torch.manual_seed(0)
    matrix = torch.randn(2, 40, 30) @ torch.diag(0.7 ** torch.arange(30.0))
    for exact, found in zip(leading(matrix, 5), projected(matrix, 5, 6, "name"), strict=True):
        torch.testing.assert_close(found.abs(), exact.abs(), atol=1e-3, rtol=1e-3)
    first, again = (projected(matrix, 5, 2, name)[0] for name in ("a", "a"))
    assert torch.equal(first, again)


# -- LoftQ ------------------------------------------------------------------------------------------------------------

# the sixteen values printed in appendix E of QLoRA (arXiv:2305.14314)
PRINTED = [
    *[-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635],
    *[-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634],
    *[0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
]


def test_nf4_levels_are_the_printed_ones():
    torch.testing.assert_close(torch.tensor(nf4_levels()), torch.tensor(PRINTED), atol=1e-6, rtol=1e-5)


def test_rounding_takes_the_nearest_level_of_each_block():
    torch.manual_seed(0)
    weight = torch.randn(3, 50)
    flat = torch.cat([weight.flatten(), torch.zeros(42)]).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = (flat / scale).unsqueeze(-1).sub(torch.tensor(PRINTED)).abs().argmin(-1)
    expected = (torch.tensor(PRINTED)[nearest] * scale).flatten()[:150].view(3, 50)
    torch.testing.assert_close(rounded(weight, 4), expected, atol=1e-6, rtol=1e-5)
    eight = rounded(weight, 8)
    assert ((eight - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert not rounded(torch.zeros(2, 5), 4).any()
    assert not rounded(torch.zeros(2, 5), 8).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounds", [1, 4])
def test_loftq_makes_up_for_the_error_whatever_the_scale(bits, rounds):
    """PEFT multiplies the factors with alpha / r again in the forward pass, so that they fit at scale 1 only."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48))
    weight = base[0].weight.detach().clone()
    config = inlay.LoraConfig(
        r=8,
        lora_alpha=24,
        target_modules=["0"],
        init_lora_weights="loftq",
        loftq_config=inlay.LoftQConfig(loftq_bits=bits, loftq_iter=rounds),
    )
    assert config.loftq_config == {"loftq_bits": bits, "loftq_iter": rounds}  # as PEFT's file has it
    model = inlay.get_peft_model(base, config)
    layer = model.base_model.model[0]
    held = layer.base_layer.weight.detach()
    torch.testing.assert_close(rounded(held, bits), held, atol=1e-6, rtol=1e-5)
    update = layer.get_delta_weight("default")
    assert (held + update - weight).norm() < 0.9 * (rounded(weight, bits) - weight).norm()
    _, S, _ = torch.linalg.svd(weight - held)
    torch.testing.assert_close((weight - held - update).norm(), S[8:].norm(), atol=1e-4, rtol=1e-3)


def test_replacing_the_factors_of_a_model_that_is_quantised(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 8))
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    base = copy.deepcopy(original)
    with torch.no_grad():
        for layer in base:
            layer.weight.copy_(rounded(layer.weight, 4))
    model = inlay.get_peft_model(base, inlay.LoraConfig(r=4, lora_alpha=12, target_modules=["0", "1"]))
    asked: list[str] = []

    def keep(given, name):
        assert given is model
        asked.append(name)
        return name == "0"

    inlay.replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert asked == ["0", "1"]
    layers = model.base_model.model
    lost = original[0].weight - layers[0].base_layer.weight
    U, S, Vh = leading(lost.detach(), 4)
    torch.testing.assert_close(layers[0].get_delta_weight("default"), U * S @ Vh, atol=1e-5, rtol=1e-4)
    assert not layers[1].get_delta_weight("default").any()
    model.unload()
    again = inlay.get_peft_model(copy.deepcopy(original), inlay.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="No bnb LoRA module"):
        inlay.replace_lora_weights_loftq(again, tmp_path / "model.safetensors")


# -- what is refused, and said ----------------------------------------------------------------------------------------


def test_what_the_config_refuses_and_says():
    with pytest.raises(ConfigError, match="Did you mean 'pissa'"):
        config("pisa")
    with pytest.raises(ConfigError, match="loftq_config"):
        config("loftq")
    with pytest.raises(ConfigError, match="loftq_bits"):
        inlay.LoftQConfig(loftq_bits=3)
    with pytest.raises(ConfigError, match="rho"):
        inlay.EvaConfig(rho=0.5)
    with pytest.warns(InlayWarning, match="eva_config is not set"):
        assert config("eva").eva_config == inlay.EvaConfig()
    with pytest.warns(InlayWarning, match="loftq_config is ignored"):
        assert config("pissa", loftq_config={"loftq_bits": 4}).loftq_config == {}
    assert inlay.LoraConfig(**config("corda", corda_config={"corda_method": "kpm"}).to_dict()).corda_config == (
        inlay.CordaConfig(corda_method="kpm")
    )


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (config(r=16), "16 directions of a weight of 8 x 11, which has 8"),
        (config("olora", lora_alpha=0), "divides by the scale"),
        (config("orthogonal", r=6, target_modules=["conv"]), "even rank"),
        (config("lora_ga", r=6, lora_ga_config=inlay.LoraGAConfig(), target_modules=["table"]), "12 directions"),
    ],
)
def test_what_mathematics_refuses(model, made, reason):
    with pytest.raises(UnsupportedError, match=reason):
        plan(model, made)


def test_a_weight_that_others_read_is_not_changed_behind_their_back():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.head

    torch.manual_seed(0)
    model, x = Tied(), torch.tensor([[1, 4, 9]])
    expected, before = model(x), model.embed.weight.detach().clone()
    with pytest.raises(UnsupportedError, match=r"'embed' shares its weight with 'head'.*ensure_weight_tying"):
        plan(model, config(r=2, target_modules=["embed"]))
    state = inject(plan(model, config(r=2, target_modules=["embed"], ensure_weight_tying=True)))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    eject(model, state)
    assert torch.equal(model.embed.weight, before)


def test_meta_bases_merged_bases_and_missing_measurements(model, x):
    with torch.device("meta"):
        empty = Mixed()
    with pytest.raises(UnsupportedError, match="on the meta device; load the base model's weights first"):
        inject(plan(empty, config()))
    assert not hasattr(empty.conv, "base_layer")
    with pytest.raises(ConfigError, match=r"nothing was measured at 'table'.*preprocess_corda"):
        inject(plan(model, config("corda", corda_config=inlay.CordaConfig(), target_modules=["table"])))
    with pytest.warns(InlayWarning, match="nothing was measured for the start 'lora_ga'"):
        wrapper = inlay.get_peft_model(model, config("lora_ga", r=2, target_modules=["table"]))
    wrapper.merge_adapter()
    with pytest.raises(MergeError, match="'default' is merged into it"):
        wrapper.add_adapter("more", config(target_modules=["table"]))
    assert list(wrapper.peft_config) == ["default"]
    wrapper.unmerge_adapter()


def test_an_adapter_whose_base_cannot_be_found_again_is_not_loaded_in_silence(model, x, tmp_path):
    """PEFT loads a LoRA-GA over the unchanged base without a word."""
    untouched = copy.deepcopy(model)
    made = config("lora_ga", r=2, target_modules=["table", "conv"], lora_ga_config=inlay.LoraGAConfig())
    preprocess_loraga(model, made, lambda: model(x).square().sum().backward())
    wrapper = inlay.get_peft_model(model, made)
    with pytest.warns(InlayWarning, match="path_initial_model_for_weight_conversion"):
        wrapper.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = wrapper(x)
    with pytest.raises(StateError, match="nothing here says how 'table' was"):
        inlay.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "start")
    with warnings.catch_warnings():
        warnings.simplefilter("error", InlayWarning)
        wrapper.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = inlay.PeftModel.from_pretrained(untouched, tmp_path / "lora")
    torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-3)


def test_conversion_keeps_magnitudes_and_patterns(model, x, tmp_path):
    """PEFT drops what is no factor, and refuses rsLoRA with patterns."""
    untouched = copy.deepcopy(model)
    more = {"use_rslora": True, "rank_pattern": {"table": 2}, "alpha_pattern": {"attention": 3}}
    wrapper = inlay.get_peft_model(model, config(target_modules=["table", "attention"], use_dora=True, **more))
    wrapper.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapper.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = inlay.PeftModel.from_pretrained(untouched, tmp_path / "lora")
    torch.testing.assert_close(loaded(x), wrapper(x), atol=1e-4, rtol=1e-3)
    assert loaded.peft_config["default"].rank_pattern == {"table": 4}


def test_layers_take_another_start(model, x):
    wrapper = inlay.get_peft_model(model, config(True, target_modules=["table", "conv"]))
    expected, before = wrapper(x), model.conv.base_layer.weight.detach().clone()
    import_module("inlay.compat.layers")  # the layers then answer to PEFT's names

    model.conv.pissa_init("default", "pissa")
    assert not torch.equal(model.conv.base_layer.weight, before)
    torch.testing.assert_close(wrapper(x), expected, atol=1e-5, rtol=1e-4)
    model.table.mica_init("default")
    model.table.orthogonal_init("default")
    torch.testing.assert_close(wrapper(x), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="nothing was measured"):
        model.conv.corda_init("default", "corda")
    wrapper.unload()
    assert torch.equal(model.conv.weight, before)


def test_spots_are_what_the_config_adapts(model):
    found = spots(model, config(True))
    assert [type(spot) for spot in found] == [Spot] * 4
    assert {spot.name for spot in found} == {"table", "conv", "attention", "attention.out_proj"}


def test_policy_peft_warns_where_policy_inlay_refuses(model, x, tmp_path):
    made = config("lora_ga", r=2, target_modules=["table"], lora_ga_config=inlay.LoraGAConfig())
    with pytest.warns(InlayWarning, match="nothing here says how 'table' was"):
        inject(plan(model, made, policy=PEFT), initialise=False)
