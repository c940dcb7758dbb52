"""Every attribute of peft's layers is there on Inlay's, with an equal value; what is not is listed with its reason."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from layer_twins import CASES, INPUTS, LAYERS, twins
from torch import Tensor, nn

MODULE = set(dir(nn.Module()))
# (attribute, cases or None for all): why it is not the same
REASONS: dict[str, str] = {
    "_abc_impl": "bookkeeping of Python's own",
    "kwargs": "what peft's injection happens to pass to constructors; nothing reads it",
    "adapter_layer_names": "Inlay names what the layer has; see test_names_of_what_is_here",
    "other_param_names": "Inlay names what the layer has; see test_names_of_what_is_here",
    "lora_variants": "DoRA is a method of the engine and no variant; a user's variants are, see test_user_layers",
    "lora_variant": "DoRA is a method of the engine and no variant",
    "_create_new_hook": "a step of peft's constructor; the engine carries hooks over by itself",
    "_error_message_name": "a word for peft's own error message",
    "_forward_wrapped": "a part of peft's forward that wrappers of users' own give",
    "_forward_wrapped_mixed_batch": "a part of peft's forward that wrappers of users' own give",
    "_forward_wrapped_passthrough": "a part of peft's forward that wrappers of users' own give",
    "_getattr_wrapped": "a part of peft's attribute lookup that wrappers of users' own give",
    "_hasattr_wrapped": "a part of peft's attribute lookup that wrappers of users' own give",
    "init_modules": "a step of peft's constructor",
    "check_module": "a step of peft's constructor",
    "_get_ia3_scaling_for_weight": "a step of peft's merge",
    "_init_empty_weights": "a step of peft's constructor",
    "create_adapter_parameters": "a step of peft's update_layer",
    "_collect_token_weights": "a step of peft's merge under DeepSpeed",
    "_tied_adapter": "storage of tied_adapter",
}
SOME: dict[tuple[str, str], str] = {
    ("mha", "out_proj"): "peft hides the adapted projection; its weight and bias are the same in both",
    ("tokens_beside", "token_adapter"): "the engine keeps the rows at the layer, and no layer inside it",
    ("tokens_beside", "_check_forward_args"): "a part of peft's forward",
    ("tokens_beside", "_mixed_batch_forward"): "a part of peft's forward",
    ("tokens_beside", "active_adapter"): "a list, as on every layer",
    ("tokens_beside", "_active_adapter"): "a list, as on every layer",
    ("copies", "_check_forward_args"): "a part of peft's forward",
    ("copies", "_mixed_batch_forward"): "a part of peft's forward",
    ("oft-emb", "in_features"): "peft has an embedding's two numbers the other way round there alone",
    ("oft-emb", "out_features"): "peft has an embedding's two numbers the other way round there alone",
    ("oft-emb", "_embed"): "a part of peft's forward",
    ("oft-emb", "oft_dropout"): "peft forgets it on embeddings",
    ("ln_tuning", "in_features"): "peft does not know a norm's features",
    ("ln_tuning", "out_features"): "peft does not know a norm's features",
}


def same(theirs: Any, ours: Any) -> bool:
    """Whether two values are the same for those who read them."""
    if isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and torch.allclose(theirs.float(), ours.float(), atol=1e-6)
    if hasattr(theirs, "keys"):
        return set(theirs.keys()) == set(ours.keys()) and all(same(theirs[key], ours[key]) for key in theirs.keys())  # noqa: SIM118
    if isinstance(theirs, nn.Module):
        left, right = dict(theirs.named_parameters()), dict(ours.named_parameters())
        return set(left) == set(right) and all(same(left[name], right[name]) for name in left)
    if callable(theirs):
        return callable(ours)
    return bool(theirs == ours)


def accounted(case: str, layer: str, name: str) -> bool:
    return name in REASONS or any((key, name) in SOME for key in (case, layer, f"{case}-{layer}"))


@pytest.mark.parametrize(("case", "path"), LAYERS, ids=lambda value: str(value))
def test_every_attribute(case: str, path: str) -> None:
    theirs, ours = (model.get_submodule(path) for model in twins(case))
    missing, differing, looked = [], [], 0
    for name in sorted(set(dir(theirs)) - MODULE):
        if name.startswith("__") or accounted(case, path, name):
            continue
        try:
            value = getattr(theirs, name)
        except AttributeError:
            continue
        looked += 1
        if not hasattr(ours, name):
            missing.append(name)
        elif not same(value, getattr(ours, name)):
            differing.append((name, value, getattr(ours, name)))
    assert not missing
    assert not differing
    assert looked > 12


@pytest.mark.parametrize(("case", "path"), LAYERS, ids=lambda value: str(value))
def test_methods_take_what_peft_takes(case: str, path: str) -> None:
    theirs, ours = (model.get_submodule(path) for model in twins(case))
    for name in sorted(set(dir(theirs)) - MODULE):
        value = inspect.getattr_static(type(theirs), name, None)
        if name.startswith("_") or accounted(case, path, name) or not inspect.isfunction(value):
            continue
        here = inspect.signature(getattr(ours, name)).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in here.values()):
            continue
        there = [n for n, p in inspect.signature(getattr(theirs, name)).parameters.items() if p.kind < 2]
        if (case, name) == ("ln_tuning", "merge"):
            there.reverse()  # peft has the two the other way round there alone
        assert [n for n in here if n in there] == there, name


@pytest.mark.parametrize(("case", "path"), LAYERS, ids=lambda value: str(value))
def test_names_of_what_is_here(case: str, path: str) -> None:
    theirs, ours = (model.get_submodule(path) for model in twins(case))
    filled = {name for name in theirs.adapter_layer_names if len(_attribute(theirs, name))}
    assert filled - {"lora_magnitude_vector.default.weight"} <= set(ours.adapter_layer_names)
    for name in (*ours.adapter_layer_names, *ours.other_param_names):
        assert "default" in _attribute(ours, name)


def _attribute(layer: Any, path: str) -> Any:
    for part in path.split("."):
        layer = getattr(layer, part)
    return layer


@pytest.mark.parametrize(("case", "path"), LAYERS, ids=lambda value: str(value))
def test_forward_and_weights(case: str, path: str) -> None:
    theirs, ours = (model.eval().get_submodule(path) for model in twins(case))
    torch.manual_seed(2)
    x = INPUTS[path]()
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    expected = first(theirs(*x))
    assert torch.allclose(first(ours(*x)), expected, atol=1e-5)
    if hasattr(theirs, "get_base_weight") and path not in ("mha", "exp"):  # there peft raises
        assert torch.equal(ours.get_base_weight(), theirs.get_base_weight())
    if hasattr(theirs, "get_delta_weight"):
        assert torch.allclose(ours.get_delta_weight("default"), theirs.get_delta_weight("default"), atol=1e-6)
    if hasattr(theirs, "supports_lora_conversion"):
        assert ours.supports_lora_conversion() == theirs.supports_lora_conversion()
    if hasattr(theirs, "merge") and not (case == "lora_options" and path == "conv"):
        before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        ours.merge()
        theirs.merge()
        assert ours.merged is True
        assert ours.merged_adapters == theirs.merged_adapters == ["default"]
        assert torch.allclose(first(ours(*x)), expected, atol=1e-5)
        ours.unmerge()
        assert ours.merged_adapters == []
        assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def gradients(layer: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in layer.named_parameters() if "base_layer" not in n and "original" not in n}


@pytest.mark.parametrize(("case", "path"), [pair for pair in LAYERS if pair[0] != "tokens_beside"], ids=str)
def test_switching(case: str, path: str) -> None:
    second = case != "vera"
    theirs, ours = (model.get_submodule(path) for model in twins(case, second=second))
    if path == "mha":
        pytest.skip("peft switches the output projection by its own name, which test_construct does")
    other = "other" if second else "default"
    for change in (
        lambda layer: layer.set_adapter(other),
        lambda layer: layer.set_requires_grad("default", True),
        lambda layer: layer.set_adapter("default", inference_mode=True),
        lambda layer: layer.set_requires_grad([other, "default"], False),
    ):
        change(theirs)
        change(ours)
        assert gradients(ours) == gradients(theirs)
        assert ours.active_adapters == theirs.active_adapters
    assert ours._get_available_adapters() == theirs._get_available_adapters()
    if hasattr(theirs, "_all_available_adapter_names"):
        assert ours._all_available_adapter_names() == theirs._all_available_adapter_names()
    assert theirs.disable_adapters is ours.disable_adapters is False
    theirs.enable_adapters(False)
    ours.enable_adapters(False)
    assert theirs.disable_adapters is ours.disable_adapters is True
    x = INPUTS[path]()
    assert torch.allclose(ours(*x), theirs(*x), atol=1e-6)


@pytest.mark.parametrize("case", ["lora", "ia3", "loha", "oft", "copies"])
def test_deleting(case: str) -> None:
    path = CASES[case][2][0]
    theirs, ours = (model.get_submodule(path) for model in twins(case, second=True))
    arguments = (["other"],) if case == "copies" else ()
    for layer in (theirs, ours):
        if case == "copies":
            layer.delete_adapter("default", *arguments)
        else:
            with pytest.warns(UserWarning, match="other"):
                layer.delete_adapter("default")
    assert ours.active_adapters == theirs.active_adapters == ["other"]
    assert gradients(ours) == gradients(theirs)
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("path", ["lin", "conv"])
def test_scales(path: str) -> None:
    theirs, ours = (model.get_submodule(path) for model in twins("lora"))
    for change in (
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.set_scale("absent", 3.0),
        lambda layer: layer.scaling.update({"default": 7.0}),
        lambda layer: layer.unscale_layer(),
    ):
        change(theirs)
        change(ours)
        assert dict(ours.scaling) == dict(theirs.scaling)
        x = INPUTS[path]()
        assert torch.allclose(ours(*x), theirs(*x), atol=1e-5)


def test_scaling_the_active_adapters_reaches_embeddings() -> None:
    theirs, ours = (model.get_submodule("emb") for model in twins("lora"))
    for layer in (theirs, ours):
        layer.scale_layer(0.5)
    assert dict(theirs.scaling) == {"default": 1.0}  # peft looks for the adapter among the factors of linear layers
    assert dict(ours.scaling) == {"default": 0.5}


def test_switching_a_layer_off_leaves_gradients_alone() -> None:
    theirs, ours = (model.lin for model in twins("lora"))
    for layer in (theirs, ours):
        layer.enable_adapters(False)
    assert not any(gradients(theirs).values())
    assert all(gradients(ours).values())


def test_layers_answer_as_soon_as_the_namespace_is_used() -> None:
    code = (
        "import torch, inlay.compat; from inlay.compat.peft import LoraConfig, get_peft_model;"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=['0']));"
        "layer = model.base_model.model[0]; layer.reset_lora_parameters('default', True);"
        "assert len(layer.lora_embedding_A) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_private_switches_can_be_set() -> None:
    _, ours = twins("lora", second=True)
    layer = ours.lin
    layer._active_adapter = ["other"]
    assert layer.active_adapters == ["other"]
    layer._disable_adapters = True
    assert layer.disable_adapters
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_call_disables_what_the_layer_says() -> None:
    from inlay.core.call import opened

    _, ours = twins("lora")
    assert not ours.lin.disable_adapters
    with opened(ours.lin.state, disabled=True):
        assert ours.lin.disable_adapters
    assert not ours.lin.disable_adapters


def test_the_books_of_merging_can_be_kept_by_hand() -> None:
    _, ours = twins("lora")
    layer, x = ours.lin, torch.randn(2, 6)
    expected = layer(x)
    layer.base_layer.weight.data += layer.get_delta_weight("default")
    layer.merged_adapters.append("default")
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.base_layer.weight.data -= layer.get_delta_weight(layer.merged_adapters.pop())
    assert not layer.merged
    assert torch.allclose(layer(x), expected, atol=1e-5)
