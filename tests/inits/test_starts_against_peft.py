"""Starts beside PEFT's: the same factors up to sign and rotation, so the same product and the same new base."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
import warnings

import peft
import pytest
import torch
from torch import nn

import inlay
from inlay.compat.entry import get_peft_model as peft_named_get
from inlay.inits.corda import preprocess_corda
from inlay.inits.decompose import leading
from inlay.inits.lora_ga import preprocess_loraga
from inlay.models.eva import get_eva_state_dict, initialize_lora_eva_weights

PREFIX = "base_model.model."
LAYERS = ["low", "mid", "high"]


class Model(nn.Module):
    """Two layers that read one input, which has fewer directions than features."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(12, 20)
        self.mid = nn.Linear(20, 16)
        self.high = nn.Linear(20, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.low(x))
        return torch.cat([self.mid(hidden), self.high(hidden)], -1)


@pytest.fixture
def base() -> Model:
    torch.manual_seed(3)
    return Model()


@pytest.fixture
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    spread = torch.diag(torch.linspace(0.02, 2, 12))
    return [torch.randn(1, 60, 12, generator=generator) @ spread + 0.3 for _ in range(4)]


def fields(start, **more):
    return {"r": 3, "lora_alpha": 5, "target_modules": list(LAYERS), "init_lora_weights": start, **more}


def both(base, start, ours=None, theirs=None, before=None, **more):
    """Return PEFT's and our model with an adapter, after ``before(module of functions, model, config)``."""
    mine = copy.deepcopy(base), inlay.LoraConfig(**fields(start, **more, **(ours or {})))
    other = copy.deepcopy(base), peft.LoraConfig(**fields(start, **more, **(theirs or {})))
    if before is not None:
        before("peft", *other)
        before("inlay", *mine)
    return peft.get_peft_model(*other), inlay.get_peft_model(*mine)


def update(model, name):
    layer = model.get_submodule(PREFIX + name)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (layer.scaling["default"] * B @ A).detach()


def assert_same_start(theirs, ours, base, atol=2e-6):
    for name in LAYERS:
        torch.testing.assert_close(update(ours, name), update(theirs, name), atol=atol, rtol=1e-4)
        weight = ours.get_submodule(PREFIX + name).base_layer.weight
        torch.testing.assert_close(weight, theirs.get_submodule(PREFIX + name).base_layer.weight, atol=atol, rtol=1e-4)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), base(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
@pytest.mark.parametrize("rs", [False, True])
def test_decompositions_of_the_weight(base, start, rs):
    theirs, ours = both(base, start, use_rslora=rs, rank_pattern={"mid": 5}, alpha_pattern={"high": 2})
    assert_same_start(theirs, ours, base)
    grads = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (theirs, ours)]
    assert grads[0] == grads[1]
    if start == "mica":
        for name in LAYERS:
            B = [m.get_submodule(PREFIX + name).lora_B["default"].weight for m in (theirs, ours)]
            torch.testing.assert_close(B[0] @ B[0].T, B[1] @ B[1].T, atol=1e-5, rtol=0)
            assert not update(ours, name).any()


def test_random_projection_finds_the_same_directions(base):
    with torch.no_grad():  # far apart, so that they can be told from each other
        for name in LAYERS:
            weight = getattr(base, name).weight
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(U @ torch.diag(2.0 ** -torch.arange(len(S))) @ Vh)
    theirs, ours = both(base, "pissa_niter_16")
    assert_same_start(theirs, ours, base, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_are_decomposed_in_float32(base, dtype):
    theirs, ours = both(base.to(dtype), "pissa")
    for name in LAYERS:
        weights = [m.get_submodule(PREFIX + name).base_layer.weight for m in (theirs, ours)]
        assert weights[1].dtype == dtype
        torch.testing.assert_close(weights[1], weights[0], atol=2e-3, rtol=0)
        # PEFT rounds its factors to the base's precision in passing
        torch.testing.assert_close(update(ours, name), update(theirs, name), atol=2e-3, rtol=0)
        exact = leading((weights[1] + update(ours, name)).float(), 3)
        torch.testing.assert_close(update(ours, name), exact[0] * exact[1] @ exact[2], atol=2e-3, rtol=0)


def test_orthogonal_start_draws_what_peft_draws(base):
    torch.manual_seed(9)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields("orthogonal") | {"r": 4}))
    torch.manual_seed(9)
    ours = peft_named_get(copy.deepcopy(base), inlay.LoraConfig(**fields("orthogonal") | {"r": 4}))
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(mine[name], parameter, atol=1e-6, rtol=1e-5)
    for name in LAYERS:
        assert update(ours, name).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(base, data, mode, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda as theirs_preprocess

    def before(whose, model, config):
        function = theirs_preprocess if whose == "peft" else preprocess_corda
        function(model, config, lambda: [model(x) for x in data])

    files = {"cache_file": str(tmp_path / "a" / "cache.pt"), "covariance_file": str(tmp_path / "b" / "cov.pt")}
    options = {"corda_method": mode, **files}
    theirs, ours = both(
        base,
        "corda",
        {"corda_config": inlay.CordaConfig(corda_method=mode)},
        {"corda_config": CordaConfig(**options)},
        before,
    )
    assert_same_start(theirs, ours, base)
    for file in files:  # PEFT's files are read, and running the model is not needed then
        model = copy.deepcopy(base)
        one = inlay.CordaConfig(corda_method=mode, **{file: files[file]})
        config = inlay.LoraConfig(**fields("corda", corda_config=one))
        preprocess_corda(model, config)
        assert model.low.eigens.U_WC.shape == (20, 3)
        assert_same_start(theirs, inlay.get_peft_model(model, config), base)
        assert not hasattr(model.low, "eigens")


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit", "weight_svd"])
def test_lora_ga(base, data, direction, scale):
    def before(whose, model, config):
        function = peft.preprocess_loraga if whose == "peft" else preprocess_loraga
        function(model, config, lambda: [(model(x) ** 3).sum().backward() for x in data])

    options = {"direction": direction, "scale": scale}
    theirs, ours = both(
        base,
        "lora_ga",
        {"lora_ga_config": inlay.LoraGAConfig(**options)},
        {"lora_ga_config": peft.LoraGAConfig(**options)},
        before,
    )
    for name in LAYERS if direction != "random" else ():  # which are drawn; signs of directions are arbitrary
        for side in ("lora_A", "lora_B"):
            found, expected = (getattr(m.get_submodule(PREFIX + name), side)["default"].weight for m in (ours, theirs))
            # PEFT's largest singular value of the weight comes from a coarse random projection
            rtol = 0.05 if scale == "weight_svd" else 1e-3
            torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-4, rtol=rtol)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), base(x), atol=2e-4, rtol=1e-3)
    for model in (theirs, ours):
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rho", [1.0, 3.0])
@pytest.mark.parametrize("whiten", [False, True])
def test_eva(base, data, rho, whiten):
    with torch.no_grad():
        base.low.weight[:, :10] *= 0.05  # then `mid` and `high` read little more than two directions
    options = {"rho": rho, "whiten": whiten}
    theirs, ours = both(
        base, "eva", {"eva_config": inlay.EvaConfig(**options)}, {"eva_config": peft.EvaConfig(**options)}, r=4
    )
    batches = [{"x": x} for x in data]
    how = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    expected = peft.get_eva_state_dict(theirs, batches, **how)
    found = get_eva_state_dict(ours, batches, **how)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    if rho > 1:
        assert len({len(value) for value in found.values()}) > 1
    for name, value in found.items():
        if whiten and not name.endswith("low"):  # PEFT divides what two layers read in common twice, in place
            cosine = nn.functional.cosine_similarity(value.double(), expected[name].double())
            assert (cosine > 0.99).all()
            assert not torch.allclose(value.double(), expected[name].double(), rtol=0.05)
            continue
        torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=1e-2, check_dtype=False)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(expected))
    initialize_lora_eva_weights(ours, eva_state_dict=expected)
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(ours.peft_config["default"], field) == getattr(theirs.peft_config["default"], field)
    assert set(ours.peft_config["default"].target_modules) == set(theirs.peft_config["default"].target_modules)
    mine = dict(ours.named_parameters())
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(mine[name], parameter), name
        assert mine[name].requires_grad == parameter.requires_grad
    for name in LAYERS:
        layers = [m.get_submodule(PREFIX + name) for m in (theirs, ours)]
        if hasattr(layers[0], "scaling"):
            assert layers[0].scaling == dict(layers[1].scaling)


def test_eva_takes_out_layers_without_a_rank(base):
    directions = {"low": torch.eye(12)[:6], "mid": torch.zeros(0, 20), "high": torch.eye(20)[:3]}
    ours = inlay.get_peft_model(base, inlay.LoraConfig(**fields("eva", eva_config=inlay.EvaConfig())))
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(**fields("eva", eva_config=peft.EvaConfig())))
    initialize_lora_eva_weights(ours, eva_state_dict=directions)
    peft.initialize_lora_eva_weights(theirs, eva_state_dict={PREFIX + k: v for k, v in directions.items()})
    assert type(ours.base_model.model.mid) is nn.Linear
    assert ours.base_model.model.low.lora_A["default"].weight.shape == (6, 12)
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(ours.peft_config["default"], field) == getattr(theirs.peft_config["default"], field)
    assert set(ours.peft_config["default"].target_modules) == {"low", "high"}
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_principal_components_are_those_of_all_rows_together():
    from peft.utils.incremental_pca import IncrementalPCA as Theirs

    from inlay.inits.incremental_pca import IncrementalPCA

    torch.manual_seed(0)
    X = torch.randn(90, 8) @ torch.diag(torch.arange(1.0, 9)) + 2
    ours, theirs = IncrementalPCA(4), Theirs(4)
    for part in X.split(30):
        ours.partial_fit(part)
        theirs.partial_fit(part)
    names = ["components_", "singular_values_", "mean_", "var_", "explained_variance_ratio_", "n_samples_seen_"]
    for name in [*names, "explained_variance_", "noise_variance_"]:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), check_dtype=False, atol=1e-4, rtol=1e-4)
    whole = IncrementalPCA(8).fit(X)
    torch.testing.assert_close(whole.mean_, X.double().mean(0))
    torch.testing.assert_close(whole.var_, X.double().var(0, correction=0))
    for arguments, text in [((9,), "9 invalid for n_features=8"), ((5,), "less or equal to the batch number")]:
        rows = X if arguments == (9,) else X[:3]
        with pytest.raises(ValueError, match=text):
            IncrementalPCA(*arguments).partial_fit(rows)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_checkpoints_go_both_ways(base, tmp_path, start):
    """Loading repeats the start on the original base, on either side."""
    theirs, ours = both(base, start)
    x = torch.randn(4, 12)
    with torch.no_grad():
        for model in (theirs, ours):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected = [theirs(x), ours(x)]
    loaded = [
        inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs"),
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"),
    ]
    low = inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", low_cpu_mem_usage=True)
    for model, wanted in [*zip(loaded, expected, strict=True), (low, expected[0])]:
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(loaded[0].unload().low.weight, base.low.weight)


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_conversion_to_an_ordinary_lora(base, tmp_path, start, rs):
    """What is saved gives the trained output on the original base; PEFT loads it, and writes the same."""
    theirs, ours = both(base, start, use_rslora=rs)
    x = torch.randn(4, 12)
    for model, folder in ((theirs, "their_start"), (ours, "our_start")):
        model.save_pretrained(tmp_path / folder)
    with torch.no_grad():
        mine = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                mine[name].copy_(parameter)
    expected = ours(x)
    ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "our_start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start_folder = str(tmp_path / "their_start")
        theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=start_folder)
    for load, folder in ((inlay, "ours"), (peft, "ours"), (inlay, "theirs")):
        loaded = load.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-3)
        assert torch.equal(loaded.base_model.model.low.base_layer.weight, base.low.weight)
        config = loaded.peft_config["default"]
        assert (config.r, config.init_lora_weights) == (6, True)
        assert config.lora_alpha == pytest.approx(5 * (2**0.5 if rs else 2))


def test_subtracting_a_start_that_is_in_the_model(base):
    theirs, ours = both(base, "pissa")
    for model in (theirs, ours):
        model.add_adapter("start", type(model.peft_config["default"])(**fields(True)))
    with torch.no_grad():
        mine = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
                mine[name].copy_(parameter)
    expected = theirs.base_model.subtract_mutated_init(peft.get_peft_model_state_dict(theirs), "start", {})
    found = ours.base_model.subtract_mutated_init(inlay.get_peft_model_state_dict(ours), "start", {})
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
