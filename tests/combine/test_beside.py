"""What an adapter has beside its low-rank update, which layers the new one has, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from combine_pairs import Pair, lora, update

import inlay
from inlay.compat.entry import get_peft_model as drop_in
from inlay.errors import (
    AdapterNameError,
    CombinationError,
    ConfigError,
    ConfigTypeError,
    NoCombinationError,
    UnknownAdapterError,
    UnknownFieldError,
)

EXACT = [("cat", {}), ("svd", {"svd_rank": 8})]


def delta_output(model: Any, pair: Pair, name: str) -> list[torch.Tensor]:
    """Return what an adapter adds to the outputs."""
    model.set_adapter(name)
    with torch.no_grad():
        on = model(pair.x, pair.y)
        with model.disable_adapter():
            off = model(pair.x, pair.y)
    return [a - b for a, b in zip(on, off, strict=True)]


def weights_of(model: Any, name: str) -> torch.Tensor:
    """Return the weight of ``layer`` with an adapter merged into it."""
    model.set_adapter(name)
    return copy.deepcopy(model).merge_and_unload().layer.weight.detach().double()


# -- biases and magnitudes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("combination", "options"), [*EXACT, ("linear", {})])
def test_lora_bias(combination, options):
    """PEFT's new adapter loses the biases."""
    pair = Pair("linear", lora(r=4, lora_bias=True), lora(r=4))
    pair.combine(["a", "b"], [0.5, 2.0], "new", combination, **options)
    bias = dict(pair.ours.named_parameters())["base_model.model.layer.lora_B.a.bias"]
    found = dict(pair.ours.named_parameters())["base_model.model.layer.lora_B.new.bias"]
    torch.testing.assert_close(found, 0.5 * bias * 6 / 4)
    theirs = dict(pair.theirs.named_parameters())["base_model.model.layer.lora_B.new.bias"]
    assert not theirs.any()
    if combination != "linear":
        expected = [
            0.5 * a + 2.0 * b
            for a, b in zip(delta_output(pair.ours, pair, "a"), delta_output(pair.ours, pair, "b"), strict=True)
        ]
        for mine, wanted in zip(delta_output(pair.ours, pair, "new"), expected, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d_hf", "conv2d", "embedding"])
@pytest.mark.parametrize("others", [{}, {"use_dora": True}])
def test_dora_magnitudes(kind, others):
    """The magnitude's distance to the norm of the base row adds up; PEFT starts from the base's norms again."""
    pair = Pair(kind, lora(r=4, use_dora=True), lora(r=4, **others))
    pair.ours.add_weighted_adapter(["a"], [1.0], "same")
    layer = next(m for m in pair.ours.modules() if hasattr(m, "base_layer"))
    base = layer.base_affine().weight.double()
    weight = {}
    for name in ("a", "same"):
        pair.ours.set_adapter(name)
        weight[name] = layer.fold(layer.chain()).weight
    torch.testing.assert_close(weight["same"], weight["a"], rtol=1e-5, atol=1e-6)
    pair.theirs.add_weighted_adapter(["a"], [1.0], "same")
    for model in (pair.theirs, pair.ours):
        model.set_adapter("same")
    theirs, mine = pair.outputs()
    assert not torch.allclose(theirs[0], mine[0], atol=1e-2)
    # magnitudes by the formula, in float64
    pair.ours.add_weighted_adapter(["a", "b"], [0.6, -0.3], "new", "cat")
    norm = base.norm(dim=1)
    expected = norm.clone()
    for name, share in (("a", 0.6), ("b", -0.3)):
        p = layer.params(layer.entries[name][0])
        held = p.get("magnitude")
        rows = (base + update(pair.ours, name)[0]).norm(dim=1) if held is None else held.double().flatten()
        expected += share * (rows - norm)
    p = layer.params(layer.entries["new"][0])
    torch.testing.assert_close(p.magnitude.double().flatten(), expected, rtol=1e-5, atol=1e-5)
    assert pair.ours.peft_config["new"].use_dora


def test_dora_beside_lora_bias_is_refused():
    pair = Pair("linear", lora(r=4, use_dora=True), lora(r=4, lora_bias=True))
    with pytest.raises(CombinationError, match="DoRA"):
        pair.ours.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")


# -- copies and tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["a", "b"])
def test_a_full_copy_is_carried_over(holder):
    """PEFT gives the new adapter an untrained copy, or none if the first adapter has none."""
    fields = [lora(r=4), lora(r=4)]
    fields["ab".index(holder)]["modules_to_save"] = ["head"]
    pair = Pair("linear", *fields)
    pair.combine(["a", "b"], [0.5, 0.5], "new", "svd")
    copies = pair.ours.base_model.model.head.modules_to_save
    assert torch.equal(copies["new"].weight, copies[holder].weight)
    assert copies["new"].weight is not copies[holder].weight
    assert pair.ours.peft_config["new"].modules_to_save == ["head"]
    theirs = pair.theirs.base_model.model.head
    if holder == "a":
        assert torch.equal(theirs.modules_to_save["new"].weight, theirs.original_module.weight)
    else:
        assert "new" not in theirs.modules_to_save


@pytest.mark.parametrize("named", [True, False])
def test_token_rows_add_up(named):
    """PEFT's new adapter has the base's rows."""

    def fields(tokens: list[int]) -> dict[str, Any]:
        given: Any = {"layer": tokens} if named else tokens
        return {"target_modules": ["other"], "r": 4, "trainable_token_indices": given}

    if not named:
        pytest.importorskip("transformers")
    pair = Pair.__new__(Pair)
    torch.manual_seed(0)
    from combine_pairs import Net

    net = Net(torch.nn.Embedding(13, 8)).eval()
    if not named:
        net.get_input_embeddings = lambda: net.layer  # type: ignore[assignment]
    base = net.layer.weight.detach().clone()
    pair.x, pair.y = torch.tensor([[1, 4, 7, 2]]), torch.randn(2, 6)
    pair.ours = inlay.get_peft_model(net, inlay.LoraConfig(**fields([1, 4])), "a").eval()
    pair.ours.add_adapter("b", inlay.LoraConfig(**fields([7, 4])))
    rows = {}
    for name, parameter in pair.ours.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
            rows[name.rpartition(".")[2]] = parameter.detach()
    pair.ours.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new", "cat")
    tokens = pair.ours.peft_config["new"].trainable_token_indices
    assert (tokens["layer"] if named else tokens) == [1, 4, 7]
    expected = base.clone()
    expected[[1, 4]] += 0.5 * (rows["a"] - base[[1, 4]])
    order = pair.ours.peft_config["b"].trainable_token_indices
    order = order["layer"] if named else order
    expected[order] += -2.0 * (rows["b"] - base[order])
    pair.ours.set_adapter("new")
    with torch.no_grad():
        found = pair.ours(pair.x, pair.y)[0]
    torch.testing.assert_close(found, expected[pair.x], rtol=1e-5, atol=1e-5)


# -- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", ["svd", "cat", "linear", "ties", "dare_ties_svd"])
def test_adapters_of_different_layers(combination):
    pair = Pair("linear", lora(r=4), lora(r=4, target_modules=["other"]))
    pair.ours.add_weighted_adapter(["a", "b"], [0.5, 2.0], "new", combination, density=1.0)
    for path, name, weight in (("layer", "a", 0.5), ("other", "b", 2.0)):
        found, held = update(pair.ours, "new", path), update(pair.ours, name, path)
        torch.testing.assert_close(found, weight * held, rtol=1e-5, atol=1e-5)
    assert pair.ours.peft_config["new"].target_modules == {"layer", "other"}


def test_expressions_are_united_as_in_peft():
    pair = Pair("linear", lora(r=4, target_modules="lay.*"), lora(r=4, target_modules="oth.*"))
    pair.combine(["a", "b"], [0.5, 2.0], "new", "svd")
    assert pair.ours.peft_config["new"].target_modules == "(lay.*)|(oth.*)"
    assert pair.theirs.peft_config["new"].target_modules == "(lay.*)|(oth.*)"
    for found, expected in zip(*pair.outputs(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [torch.nn.ModuleDict({"q": torch.nn.Linear(6, 6), "v": torch.nn.Linear(6, 6)}) for _ in range(2)]
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.model["layers"]:
            x = block["v"](block["q"](x))
        return x


def test_layers_that_the_united_names_do_not_mean():
    """One adapter on layer 0 and another on layer 1: PEFT takes the first one's layers for both and fails."""
    configs = [{"target_modules": [name], "layers_to_transform": [i], "r": 2} for i, name in enumerate("qv")]
    models = []
    for module in (peft, inlay):
        model = module.get_peft_model(Blocks(), module.LoraConfig(**configs[0]), "a")
        model.add_adapter("b", module.LoraConfig(**configs[1]))
        models.append(model)
    with pytest.raises(ValueError, match="No matching LoRAs"):
        models[0].add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    models[1].add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    new = {name for name, _ in models[1].named_parameters() if ".new." in name}
    assert new == {
        f"base_model.model.model.layers.{path}.lora_{part}.new.weight" for path in ("0.q", "1.v") for part in "AB"
    }


# -- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", ["svd", "cat", "ties_svd", "linear"])
def test_half_precision_adapters(combination):
    """Computed in float32, kept in the dtype of the adapters that they come from."""
    pair = Pair("linear", lora(r=4), lora(r=4))
    for model in (pair.theirs, pair.ours):
        model.to(torch.bfloat16)
    pair.x, pair.y = pair.x.bfloat16(), pair.y.bfloat16()
    pair.combine(["a", "b"], [0.5, 0.3], "new", combination, density=1.0)
    layer = next(m for m in pair.ours.modules() if hasattr(m, "base_layer"))
    assert layer.lora_A["new"].weight.dtype == torch.bfloat16
    exact = sum(w * update(pair.ours, n) for n, w in (("a", 0.5), ("b", 0.3)))
    if combination in ("svd", "cat"):
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        rank = 8 if combination == "cat" else 4
        best = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
        torch.testing.assert_close(update(pair.ours, "new"), best, rtol=2e-2, atol=2e-2)
    assert all(torch.isfinite(y).all() for y in pair.ours(pair.x, pair.y))


# -- refusals ---------------------------------------------------------------------------------------------------------


def snapshot(model: Any) -> dict[str, Any]:
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"values": values, "grads": grads, "active": model.active_adapters, "names": list(model.peft_config)}


def unchanged(before: dict[str, Any], model: Any) -> None:
    after = snapshot(model)
    assert after["names"] == before["names"]
    assert after["active"] == before["active"]
    assert after["grads"] == before["grads"]
    assert after["values"].keys() == before["values"].keys()
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())


REFUSALS: dict[str, tuple[list[dict[str, Any]], tuple[Any, ...], dict[str, Any], type[Exception]]] = {
    "unknown adapter": ([lora(r=4)] * 2, (["a", "z"], [1, 1], "new"), {}, UnknownAdapterError),
    "no adapter": ([lora(r=4)] * 2, ([], [], "new"), {}, CombinationError),
    "unknown type": ([lora(r=4)] * 2, (["a", "b"], [1, 1], "new", "tie"), {}, CombinationError),
    "ranks": ([lora(r=4), lora(r=2)], (["a", "b"], [1, 1], "new", "linear"), {}, CombinationError),
    "patterns": (
        [lora(r=4, target_modules=["layer", "other"], rank_pattern={"layer": 2}), lora(r=4)],
        (["a", "b"], [1, 1], "new", "linear"),
        {},
        CombinationError,
    ),
    "kinds of targets": (
        [lora(r=4), lora(r=4, target_modules="layer")],
        (["a", "b"], [1, 1], "new"),
        {},
        CombinationError,
    ),
    "copies": ([lora(r=4, modules_to_save=["head"])] * 2, (["a", "b"], [1, 1], "new"), {}, CombinationError),
    "bias": ([lora(r=4, bias="all"), lora(r=4)], (["a", "b"], [1, 1], "new"), {}, CombinationError),
    "no density": ([lora(r=4)] * 2, (["a", "b"], [1, 1], "new", "ties"), {}, ConfigTypeError),
    "density": ([lora(r=4)] * 2, (["a", "b"], [1, 1], "new", "ties"), {"density": -1}, ConfigError),
    "election": (
        [lora(r=4)] * 2,
        (["a", "b"], [1, 1], "new", "ties"),
        {"density": 0.5, "majority_sign_method": "votes"},
        CombinationError,
    ),
    "parameters": (
        [{"target_parameters": ["layer.weight"], "r": 4}] * 2,
        (["a", "b"], [1, 1], "new"),
        {},
        CombinationError,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_have_pefts_types_and_change_nothing(case):
    fields, args, kwargs, error = REFUSALS[case]
    pair = Pair("linear", *fields)
    before = snapshot(pair.ours)
    errors = pair.both(lambda m: m.add_weighted_adapter(*args, **kwargs))
    assert errors[0] is not None
    assert type(errors[1]) is error
    assert isinstance(errors[1], type(errors[0]))
    unchanged(before, pair.ours)


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        ((["a", "b"], [1.0], "new"), {}, CombinationError),
        (("a", [1.0], "new"), {}, ConfigTypeError),
        ((["a", "b"], [1.0, float("nan")], "new"), {}, ConfigError),
        ((["a", "b"], [1.0, 1.0], "new"), {"svd_rank": 0}, ConfigError),
        ((["a", "b"], [1.0, 1.0], "new"), {"svd_clamp": 1.5}, ConfigError),
        ((["a", "b"], [1.0, 1.0], "a.b"), {}, AdapterNameError),
    ],
)
def test_what_only_inlay_refuses(args, kwargs, error):
    pair = Pair("linear", lora(r=4), lora(r=4))
    before = snapshot(pair.ours)
    with pytest.raises(error):
        pair.ours.add_weighted_adapter(*args, **kwargs)
    unchanged(before, pair.ours)


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    """PEFT leaves a half-made adapter behind."""
    import inlay.combine.lora as module

    pair = Pair("linear", lora(r=4, target_modules=["layer", "other"]), lora(r=4))
    before = snapshot(pair.ours)
    write, calls = module.write_factors, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return write(*args)

    monkeypatch.setattr(module, "write_factors", failing)
    with pytest.raises(MemoryError):
        pair.ours.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    unchanged(before, pair.ours)
    with pytest.raises(TypeError):
        pair.theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "ties_svd")
    assert "new" in pair.theirs.peft_config


def test_an_existing_name():
    pair = Pair("linear", lora(r=4), lora(r=4))
    with pytest.raises(AdapterNameError, match="already an adapter 'b'"):
        pair.ours.add_weighted_adapter(["a"], [1.0], "b")
    quiet = drop_in(torch.nn.Sequential(torch.nn.Linear(4, 4)), inlay.LoraConfig(target_modules=["0"]), "a")
    for model in (quiet, pair.theirs):
        before = snapshot(model)
        model.add_weighted_adapter(["nobody"], [1.0], "a")
        unchanged(before, model)


def test_one_adapter_alone_at_another_rank():
    """PEFT ignores what is asked for beside one adapter; Inlay does it, unless it stands in for PEFT."""
    pair = Pair("linear", lora(r=6), lora(r=4))
    pair.combine(["a"], [1.0], "new", "svd", svd_rank=2)
    assert pair.theirs.peft_config["new"].r == 6
    assert pair.ours.peft_config["new"].r == 2
    best = torch.linalg.svdvals(update(pair.ours, "a")[0])[2:].norm()
    error = (update(pair.ours, "new") - update(pair.ours, "a")).norm()
    assert error.item() == pytest.approx(best.item(), rel=1e-5)


def test_the_new_adapter_is_not_active_and_trains_when_it_is():
    pair = Pair("linear", lora(r=4), lora(r=4))
    for model in (pair.theirs, pair.ours):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")
        assert model.active_adapters == ["a"]
        flags = {name: p.requires_grad for name, p in model.named_parameters() if ".new." in name}
        assert flags
        assert not any(flags.values())
        model.set_adapter("new")
        assert all(p.requires_grad for name, p in model.named_parameters() if ".new." in name)
        assert model.base_model.model.peft_config.keys() == {"a", "b", "new"}


def test_configurations_equal_pefts():
    pair = Pair("linear", lora(r=4, lora_dropout=0.1), lora(r=2, lora_alpha=3))
    pair.combine(["a", "b"], [0.5, 0.5], "new", "svd")
    theirs, mine = (model.peft_config["new"].to_dict() for model in (pair.theirs, pair.ours))
    different = {key for key in theirs if key in mine and theirs[key] != mine[key]}
    assert not different


# -- other methods ----------------------------------------------------------------------------------------------------


def test_a_method_without_combination_in_peft():
    pair = Pair("linear", {"target_modules": ["layer"], "r": 4}, method="LoHaConfig")
    pair.ours.add_weighted_adapter(["a"], [1.0], "new")
    assert pair.ours.peft_config["new"].peft_type == "LORA"
    with pytest.raises(NoCombinationError, match="LoHa is not linear"):
        pair.ours.add_weighted_adapter(["a", "a"], [1.0, 1.0], "newer", "linear")
    with pytest.raises(AttributeError):
        pair.theirs.add_weighted_adapter(["a"], [1.0], "new")
    assert issubclass(NoCombinationError, AttributeError)


def test_two_methods_have_no_form_in_common():
    pair = Pair("linear", lora(r=4))
    pair.ours.add_adapter("b", inlay.IA3Config(target_modules=["layer"], feedforward_modules=[]))
    with pytest.raises(CombinationError, match="different methods"):
        pair.ours.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "linear")


def ia3(targets: list[str], feedforward: list[str] = ()) -> dict[str, Any]:  # type: ignore[assignment]
    return {"target_modules": targets, "feedforward_modules": list(feedforward)}


@pytest.mark.parametrize("kind", ["linear", "conv1d_hf", "conv2d"])
@pytest.mark.parametrize("feedforward", [[], ["layer"]])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5], [2.0]])
def test_ia3_equals_peft(kind, feedforward, weights):
    pair = Pair(kind, *[ia3(["layer"], feedforward)] * 2, method="IA3Config")
    pair.combine(["a", "b"][: len(weights)], weights, "new")
    theirs = dict(pair.theirs.named_parameters())
    mine = {name: p for name, p in pair.ours.named_parameters() if name.endswith(".new")}
    assert mine
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-6)
        assert not parameter.requires_grad or pair.ours.active_adapters == ["new"]
    for found, expected in zip(*pair.outputs(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ia3_on_different_layers():
    """An adapter that leaves a layer alone multiplies by 1 there; PEFT counts it as 0 and shrinks the layer."""
    pair = Pair("linear", ia3(["layer"]), ia3(["other"]), method="IA3Config")
    pair.combine(["a", "b"], [0.5, 0.5], "new")
    mine, theirs = dict(pair.ours.named_parameters()), dict(pair.theirs.named_parameters())
    for path, name in (("layer", "a"), ("other", "b")):
        key = f"base_model.model.{path}.ia3_l."
        torch.testing.assert_close(mine[f"{key}new"], 0.5 * mine[f"{key}{name}"] + 0.5)
        torch.testing.assert_close(theirs[f"{key}new"], 0.5 * mine[f"{key}{name}"])


def test_ia3_on_different_sides_is_refused():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = inlay.get_peft_model(net, inlay.IA3Config(target_modules=["0"], feedforward_modules=[]), "a")
    model.add_adapter("b", inlay.IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    before = snapshot(model)
    with pytest.raises(CombinationError, match="same side"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")
    unchanged(before, model)


def test_ia3_takes_no_other_option():
    pair = Pair("linear", ia3(["layer"]), ia3(["layer"]), method="IA3Config")
    errors = pair.both(lambda m: m.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", combination_type="ties"))
    assert type(errors[1]) is UnknownFieldError
    assert isinstance(errors[1], type(errors[0]))


def test_mixed_targets_of_ia3_are_refused():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = inlay.get_peft_model(net, inlay.IA3Config(target_modules=["0"], feedforward_modules=[]), "a")
    model.add_adapter("b", inlay.IA3Config(target_modules="0", feedforward_modules=[]))
    with pytest.raises(CombinationError, match="regular expression"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")


@pytest.mark.parametrize("kind", ["linear", "conv2d_grouped"])
@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_adapters_with_room_for_hotswapping(kind, combination):
    """Tensors that were given room for a larger rank end in zeros, which change no combination."""
    from inlay.checkpoint.hotswap import prepare_model_for_compiled_hotswap

    pair, other = (Pair(kind, lora(r=4), lora(r=4)) for _ in range(2))
    other.ours.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", combination, svd_rank=4)
    prepare_model_for_compiled_hotswap(pair.ours, target_rank=8)
    pair.ours.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", combination, svd_rank=4)
    torch.testing.assert_close(update(pair.ours, "new"), update(other.ours, "new"), rtol=1e-5, atol=1e-5)
