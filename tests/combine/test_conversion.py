"""``convert_to_lora`` and ``save_as_lora``: beside PEFT's where it converts, and against the adapter itself."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from cells import METHODS, Cell, method_of, works
from combine_pairs import Pair, layer_of, lora, made_layer
from peft.tuners.lora.conversion import convert_to_lora as their_convert
from subject import Subject

import inlay
from inlay.checkpoint import set_peft_model_state_dict
from inlay.combine.change import change_of
from inlay.compat.entry import get_peft_model as drop_in
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.errors import (
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    ConversionError,
    InlayWarning,
    UnknownAdapterError,
)

both_layers: dict[str, Any] = {"target_modules": ["layer", "other"]}
BESIDE_PEFT = {
    "loha": ("LoHaConfig", {"r": 3, **both_layers}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "scaling": 30.0, **both_layers}),
    "vera": ("VeraConfig", {"r": 5, "target_modules": ["other", "head"]}),
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6, **both_layers}),
    "by_expression": ("LoHaConfig", {"r": 3, "target_modules": "lay.r|other"}),
}


def equal_pair(name: str, **more: Any) -> Pair:
    method, fields = BESIDE_PEFT[name]
    pair = Pair("linear", {**fields, **more}, method=method)
    mine = dict(pair.ours.named_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in pair.theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
                mine[key].copy_(parameter)
        buffers = dict(pair.ours.named_buffers())
        for key, buffer in pair.theirs.named_buffers():
            if key in buffers:
                buffers[key].copy_(buffer)
    return pair


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [1, 0.4, 0.999])
@pytest.mark.parametrize("name", BESIDE_PEFT)
def test_equals_peft_on_linear_layers(name, rank, tmp_path):
    pair = equal_pair(name)
    for found, expected in zip(*pair.outputs(), strict=True):  # the adapters are the same, to begin with
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    their_config, theirs = their_convert(pair.theirs, rank, "a")
    config, mine = inlay.convert_to_lora(pair.ours, rank, "a")
    assert theirs.keys() == mine.keys()
    for key in theirs:
        assert theirs[key].shape == mine[key].shape
        if "lora_A" in key:
            other = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(mine[other] @ mine[key], theirs[other] @ theirs[key], rtol=1e-4, atol=1e-5)
    assert config.r == their_config.r
    assert config.lora_alpha == their_config.lora_alpha
    inlay.save_as_lora(tmp_path, pair.ours, rank, "a")
    bare = copy.deepcopy(pair.theirs).unload()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    again = inlay.PeftModel.from_pretrained(bare, tmp_path).eval()
    held = {key.replace(".default", ""): value for key, value in loaded.named_parameters() if "lora_" in key}
    assert held.keys() == mine.keys()
    assert all(torch.equal(held[key], value) for key, value in mine.items())
    with torch.no_grad():
        for found, expected in zip(again(pair.x, pair.y), loaded(pair.x, pair.y), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


CONVERTED = ["linear", "linear_nobias", "conv1d_hf", "conv1d_strided", "conv2d", "conv2d_grouped", "conv2d_depthwise"]
CONVERTED += [
    "conv3d",
    "convtranspose1d_grouped",
    "convtranspose2d",
    "convtranspose3d",
    "embedding",
    "embedding_padding",
    "embedding_max_norm",
    "embedding_scaled",
]
# every method with a quarter of its kinds, and every kind in turn; what depends on the data is refused
FITTING = {m: [kind for kind in CONVERTED if works(m, kind)] for m in METHODS if method_of(m).mergeable}
CELLS = [
    Cell(method, kind, "plain_fp64")
    for i, (method, kinds) in enumerate(FITTING.items())
    for j, kind in enumerate(kinds)
    if method != "lora_base_bias"
    and not (method == "beft" and "embedding" in kind)
    and ((i + j) % 4 == 0 or (len(kinds) < 4 and j == 0))
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_whole_change_is_held_by_enough_rank(cell):
    """Every method on every kind: with all of the energy, the LoRA's outputs are the adapter's."""
    subject = Subject(cell)
    config, tensors = inlay.convert_to_lora(subject.model, 1.0, "one")
    twin = copy.deepcopy(subject.untouched)
    inject(plan(twin, config, "twin"))
    set_peft_model_state_dict(twin, tensors, "twin")
    with torch.no_grad():
        expected, found = subject.model(subject.x), twin(subject.x)
    assert not torch.allclose(expected, subject.base_output(), atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv1d_hf", "conv2d", "conv2d_grouped", "embedding"])
@pytest.mark.parametrize("method", ["loha", "dora", "ia3"])
def test_the_result_loads_in_peft(kind, method, tmp_path):
    torch.manual_seed(0)
    layer, x = made_layer(kind)
    net = torch.nn.Sequential(layer)
    fields: dict[str, Any] = {"target_modules": ["0"]}
    config = {
        "loha": lambda: inlay.LoHaConfig(r=2, init_weights=False, **fields),
        "dora": lambda: inlay.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **fields),
        "ia3": lambda: inlay.IA3Config(feedforward_modules=[], init_ia3_weights=False, **fields),
    }[method]()
    if method == "dora" and kind == "conv2d_grouped":
        pytest.skip("DoRA has no such update")
    model = inlay.get_peft_model(copy.deepcopy(net), config).eval()
    with torch.no_grad():
        expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inlay.save_as_lora(tmp_path, model, 1.0)
        loaded = peft.PeftModel.from_pretrained(net, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-3, atol=1e-3)


def test_a_rank_is_the_best_of_its_size():
    pair = equal_pair("loha")
    change, _ = change_of(layer_of(pair.ours), "a")
    values = torch.linalg.svdvals(change.double())
    for rank in (1, 2, 5):
        _, tensors = inlay.convert_to_lora(pair.ours, rank, "a")
        A, B = (tensors[f"base_model.model.layer.lora_{part}.weight"].double() for part in "AB")
        assert (B @ A - change).norm().item() == pytest.approx(values[rank:].norm().item(), rel=1e-4)
    for share in (0.3, 0.8, 0.99):
        config, tensors = inlay.convert_to_lora(pair.ours, share, "a")
        r = tensors["base_model.model.layer.lora_A.weight"].shape[0]
        energy = values.square()
        assert energy[:r].sum() >= share * energy.sum()
        assert energy[: r - 1].sum() < share * energy.sum()
        assert (config.rank_pattern or {"layer": config.r}).get("layer", config.r) == r


def test_a_change_of_nothing_has_rank_one_as_in_peft():
    _, fields = BESIDE_PEFT["loha"]
    net = Pair("linear", lora(r=1)).ours.unload()
    model = inlay.get_peft_model(copy.deepcopy(net), inlay.LoHaConfig(**fields))
    other = peft.get_peft_model(net, peft.LoHaConfig(**fields))
    config, tensors = inlay.convert_to_lora(model, 0.5)
    their_config, theirs = their_convert(other, 0.5)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        key: tuple(value.shape) for key, value in theirs.items()
    }
    assert config.r == their_config.r == 1


def test_full_copies_come_along():
    """PEFT names the tensors of deeper copies by their last part alone, and takes those of every adapter."""
    net = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(4, 4), "head": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))}
    )
    fields: dict[str, Any] = {"r": 2, "target_modules": ["a"], "modules_to_save": ["head"]}
    model = inlay.get_peft_model(copy.deepcopy(net), inlay.LoHaConfig(**fields))
    config, tensors = inlay.convert_to_lora(model, 2)
    assert config.modules_to_save == ["head"]
    copies = model.base_model.model["head"].modules_to_save["default"]
    prefix = "base_model.model.head."
    assert {key for key in tensors if "head" in key} == {f"{prefix}{name}" for name, _ in copies.named_parameters()}
    other = peft.get_peft_model(copy.deepcopy(net), peft.LoHaConfig(**fields))
    _, theirs = their_convert(other, 2)
    assert {key for key in theirs if "head" in key} == {f"{prefix}weight", f"{prefix}bias"}


def test_layers_that_were_excluded_stay_so():
    """PEFT forgets the names that are excluded, and adapts those layers when it loads the result."""
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    fields: dict[str, Any] = {"r": 2, "target_modules": "[ab]", "exclude_modules": ["b"]}
    model = inlay.get_peft_model(copy.deepcopy(net), inlay.LoHaConfig(**fields))
    config, _ = inlay.convert_to_lora(model, 2)
    assert config.exclude_modules == {"b"}
    other = peft.get_peft_model(copy.deepcopy(net), peft.LoHaConfig(**fields))
    assert not their_convert(other, 2)[0].exclude_modules


@pytest.mark.parametrize("module", [peft, inlay])
def test_ranks_of_layers_whose_path_ends_another(module, tmp_path):
    """A rank pattern means endings too, so one of the two has to be anchored."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 6), "b": torch.nn.ModuleDict({"a": torch.nn.Linear(6, 6)})})
    model = inlay.get_peft_model(copy.deepcopy(net), inlay.LoHaConfig(r=3, target_modules=["a"], init_weights=False))
    with torch.no_grad():
        model.base_model.model["a"].hada_w1_a["default"][2:] = 0.0  # an update of rank 2
    _, tensors = inlay.convert_to_lora(model, 0.9999)
    ranks = {key: value.shape[0] for key, value in tensors.items() if "lora_A" in key}
    assert len(set(ranks.values())) == 2
    inlay.save_as_lora(tmp_path, model, 0.9999)
    loaded = module.PeftModel.from_pretrained(net, tmp_path)
    held = {name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name}
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[key], value) for key, value in tensors.items())


def test_a_bare_model_and_a_wrapped_one():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    fields: dict[str, Any] = {"r": 2, "target_modules": ["a"]}
    bare = inlay.inject_adapter_in_model(inlay.LoHaConfig(**fields), copy.deepcopy(net))
    other = peft.inject_adapter_in_model(peft.LoHaConfig(**fields), copy.deepcopy(net))
    assert (
        set(inlay.convert_to_lora(bare, 2)[1])
        == set(their_convert(other, 2)[1])
        == {
            "a.lora_A.weight",
            "a.lora_B.weight",
        }
    )


def test_a_file_of_a_bare_model_has_the_names_of_files(tmp_path):
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    config = inlay.LoHaConfig(r=2, target_modules=["a"], init_weights=False)
    bare = inlay.inject_adapter_in_model(config, copy.deepcopy(net))
    inlay.save_as_lora(tmp_path, bare, 4)
    loaded = peft.PeftModel.from_pretrained(net, tmp_path)
    held = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert all(p.any() for p in held.values())


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    pair = equal_pair("loha")
    _, plain = inlay.convert_to_lora(pair.ours, 2, "a")
    _, compiled = inlay.convert_to_lora(pair.ours, 2, "a", compile_kwargs={"backend": "aot_eager"})
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(compiled[key].abs(), plain[key].abs(), rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was(capsys):
    pair = equal_pair("loha")
    before = {name: p.clone() for name, p in pair.ours.named_parameters()}
    config = copy.deepcopy(pair.ours.peft_config["a"])
    inlay.convert_to_lora(pair.ours, 2, "a", progressbar=True)
    assert "Converting to LoRA" in "".join(capsys.readouterr())
    assert all(torch.equal(before[name], p) for name, p in pair.ours.named_parameters())
    assert pair.ours.peft_config["a"] == config
    assert list(pair.ours.peft_config) == ["a"]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 0.0, 1.5, -0.1, 20])
def test_ranks_that_are_refused_as_in_peft(rank):
    pair = equal_pair("loha")
    with pytest.raises(ValueError):
        their_convert(pair.theirs, rank, "a")
    with pytest.raises(ConfigError):
        inlay.convert_to_lora(pair.ours, rank, "a")


@pytest.mark.parametrize(("rank", "error"), [(-2, ConfigError), (True, ConfigTypeError), ("4", ConfigTypeError)])
def test_ranks_that_only_inlay_refuses(rank, error):
    with pytest.raises(error):
        inlay.convert_to_lora(equal_pair("loha").ours, rank, "a")


def test_no_adapters_at_all():
    for convert in (their_convert, inlay.convert_to_lora):
        with pytest.raises(TypeError):
            convert(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2)
    with pytest.raises(ConversionError):
        inlay.convert_to_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2)
    with pytest.raises(UnknownAdapterError):
        inlay.convert_to_lora(equal_pair("loha").ours, 2, "b")


def test_layers_that_no_lora_can_stand_for():
    attention = torch.nn.MultiheadAttention(8, 2)
    model = inlay.get_peft_model(torch.nn.Sequential(attention), inlay.LoraConfig(target_modules=["0"]))
    with pytest.raises(ConversionError, match="attention"):
        inlay.convert_to_lora(model, 2)
    norm = inlay.get_peft_model(torch.nn.Sequential(torch.nn.LayerNorm(4)), inlay.LNTuningConfig(target_modules=["0"]))
    other = peft.get_peft_model(torch.nn.Sequential(torch.nn.LayerNorm(4)), peft.LNTuningConfig(target_modules=["0"]))
    with pytest.raises(TypeError):
        their_convert(other, 2)
    with pytest.raises(ConversionError, match="norm"):
        inlay.convert_to_lora(norm, 2)


@pytest.mark.parametrize("method", ["IA3Config", "OFTConfig"])
def test_a_method_that_multiplies(method):
    """PEFT refuses it; Inlay converts it, unless it stands in for PEFT."""
    fields: dict[str, Any] = {"target_modules": ["0"]}
    fields |= {"feedforward_modules": []} if method == "IA3Config" else {"oft_block_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), getattr(peft, method)(**fields))
    quiet = drop_in(torch.nn.Sequential(torch.nn.Linear(8, 8)), getattr(inlay, method)(**fields))
    ours = inlay.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), getattr(inlay, method)(**fields))
    with pytest.raises(TypeError):
        their_convert(theirs, 2)
    with pytest.raises(ConversionError, match="depends on the layer's weight"):
        inlay.convert_to_lora(quiet, 2)
    assert not theirs.supports_lora_conversion()
    assert not quiet.supports_lora_conversion()
    assert ours.supports_lora_conversion()
    assert inlay.convert_to_lora(ours, 2)[1]


def test_biases_of_the_base_are_refused_as_in_peft():
    fields: dict[str, Any] = {"target_modules": ["0"], "bias": "all"}
    for module, convert, error in ((peft, their_convert, ValueError), (inlay, inlay.convert_to_lora, ConfigError)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = module.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), module.LoraConfig(**fields))
            with pytest.raises(error):
                convert(model, 2)


def test_a_lora_is_converted_with_a_warning():
    pair = equal_pair("lora")
    with pytest.warns(UserWarning, match="already a LoRA"):
        their_convert(pair.theirs, 2, "a")
    with pytest.warns(InlayWarning, match="is a LoRA already"):
        inlay.convert_to_lora(pair.ours, 2, "a")


@pytest.mark.filterwarnings("ignore")
def test_dora_is_converted_with_its_magnitude():
    """PEFT converts the low-rank part alone."""
    pair = equal_pair("lora", use_dora=True, target_modules=["layer"])
    bare = {"theirs": copy.deepcopy(pair.theirs).unload(), "ours": copy.deepcopy(pair.ours).unload()}
    expected = pair.outputs()[1][0]
    _, theirs = their_convert(pair.theirs, 8, "a")
    _, mine = inlay.convert_to_lora(pair.ours, 8, "a")
    for tensors, right in ((mine, True), (theirs, False)):
        A, B = (tensors[f"base_model.model.layer.lora_{part}.weight"] for part in "AB")
        found = bare["ours"].layer(pair.x) + pair.x @ A.T @ B.T
        assert torch.allclose(found, expected, atol=1e-4) == right


def test_a_bias_of_an_embedding_is_refused():
    subject = Subject(Cell("beft", "embedding", "plain_fp64"))
    with pytest.raises(ConversionError, match="an embedding has none"):
        inlay.convert_to_lora(subject.model, 1.0, "one")


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path):
    pair = equal_pair("loha")
    with pytest.raises(ConfigError):
        inlay.save_as_lora(tmp_path / "new", pair.ours, 20, "a")
    assert not (tmp_path / "new").exists()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError):
        inlay.save_as_lora(file, pair.ours, 2, "a")
